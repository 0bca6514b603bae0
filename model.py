"""ELECTRA: token ids and masked positions in; generator and discriminator losses, logits and samples out.

Sizes, initial weights, sharing and heads follow google-research/electra ("G": model/modeling.py, run_pretraining.py).
Shapes: B rows, L tokens a row, K masked slots a row, H hidden size, E embedding size, V vocabulary size.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from utils import InputError, bounded, from_table, load, one_line, require, save

if TYPE_CHECKING:
    from dataset import Batch, Masked

LAYER_NORM_EPS = 1e-12  # BERT's
NETWORK_FILES = {"generator": "gen.pt", "discriminator": "disc.pt", "mlm": "mlm.pt"}  # in a run's folder, by kind
CLASSIFIERS = ("classifier", "token classifier")  # kinds of fine-tuned networks
GENERATOR_HEAD_SIZE = 64  # width of the generator's attention heads (G, run_pretraining.py, get_generator_config)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of generator and discriminator; the defaults are ELECTRA-Small's (paper, table 6)."""

    vocab_size: int = bounded(30522, at_least=6)
    """Word pieces; also how many are learned where no --vocab is given."""
    embedding_size: int = bounded(128, at_least=1)
    """Width of the embeddings that generator and discriminator share."""
    hidden_size: int = bounded(256, at_least=1)
    """Width of the discriminator's layers."""
    layers: int = bounded(12, at_least=1)
    """Number of layers of each encoder."""
    heads: int = bounded(4, at_least=1)
    """Attention heads of the discriminator."""
    feed_forward_size: int = bounded(1024, at_least=1)
    """Inner width of the discriminator's feed-forward blocks."""
    generator_size: float = bounded(0.25, above=0, at_most=1)
    """Width of the generator as a share of the discriminator's."""
    max_positions: int = bounded(512, at_least=5)
    """Rows of the position table: no example can be longer."""
    dropout: float = bounded(0.1, at_least=0, below=1)
    """On embeddings, attention probabilities and sublayer outputs."""
    initializer_range: float = bounded(0.02, above=0)
    """Standard deviation of the initial weights, cut at two of them."""

    def generator(self) -> "EncoderSize":
        """Sizes of the generator's encoder (G, run_pretraining.py, get_generator_config)."""
        hidden = round(self.hidden_size * self.generator_size)
        return EncoderSize(hidden, max(1, hidden // GENERATOR_HEAD_SIZE), 4 * hidden)

    def discriminator(self) -> "EncoderSize":
        """Sizes of the discriminator's encoder."""
        return EncoderSize(self.hidden_size, self.heads, self.feed_forward_size)

    def check(self) -> None:
        """Raises InputError for a width that is not a multiple of the number of heads."""
        require(self.hidden_size % self.heads == 0,
                f"model.hidden_size = {self.hidden_size} must be a multiple of model.heads = {self.heads}")
        width, heads, _ = self.generator()
        require(width > 0 and width % heads == 0,
                f"model.generator_size = {self.generator_size} makes the generator {width} wide with {heads} heads: "
                "expected a width that is a positive multiple of the heads")


class EncoderSize(NamedTuple):
    hidden: int
    heads: int
    feed_forward: int


class ElectraOutput(NamedTuple):
    """The result of one joint forward pass; an objective (studies/objectives.py) leaves None what it doesn't compute."""

    generator_logits: Tensor  # (B, K, V)
    generator_losses: Tensor  # (B, K) cross entropy, 0 at unused slots
    sampled_ids: Tensor | None = None  # (B, K), drawn from the generator
    corrupted_ids: Tensor | None = None  # (B, L), the discriminator's input
    replaced: Tensor | None = None  # (B, L) bool, the discriminator's labels
    discriminator_logits: Tensor | None = None  # (B, L)
    discriminator_losses: Tensor | None = None  # (B, L) binary cross entropy, 0 at padding
    large_losses: Tensor | None = None  # (B, K) or (B, L), of a masked language model in the discriminator's place


# Layers

class Embeddings(nn.Module):
    """Token, position and segment embeddings, summed and normalized: ids (B, L), or their vectors, to (B, L, E)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.embedding_size)
        self.position = nn.Embedding(config.max_positions, config.embedding_size)
        self.segment = nn.Embedding(2, config.embedding_size)
        self.norm = nn.LayerNorm(config.embedding_size, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor, segments: Tensor) -> Tensor:
        tokens = ids if ids.is_floating_point() else self.token(ids)  # (B, L, E)
        positions = self.position.weight[: ids.shape[1]]  # (L, E)
        return self.dropout(self.norm(tokens + positions + self.segment(segments)))


class Layer(nn.Module):
    """One post-LayerNorm transformer layer: (B, L, H) to (B, L, H)."""

    def __init__(self, size: EncoderSize, dropout: float):
        super().__init__()
        self.heads = size.heads
        self.query_key_value = nn.Linear(size.hidden, 3 * size.hidden)
        self.attention_output = nn.Linear(size.hidden, size.hidden)
        self.attention_norm = nn.LayerNorm(size.hidden, eps=LAYER_NORM_EPS)
        self.feed_forward = nn.Linear(size.hidden, size.feed_forward)
        self.feed_forward_output = nn.Linear(size.feed_forward, size.hidden)
        self.feed_forward_norm = nn.LayerNorm(size.hidden, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.attention = attention  # replaced in bf16 on a CPU (benchmarks/bf16_cpu_kernels.py)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """`attention_mask` (B, 1, 1, L) is true at the keys that may be attended to."""
        B, L, H = x.shape
        qkv = self.query_key_value(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, heads, L, H / heads)
        attended = self.attention(qkv, attention_mask, self.dropout.p if self.training else 0.0)
        attended = attended.transpose(1, 2).reshape(B, L, H)
        x = self.attention_norm(x + self.dropout(self.attention_output(attended)))
        inner = F.gelu(self.feed_forward(x))  # (B, L, feed-forward size)
        return self.feed_forward_norm(x + self.dropout(self.feed_forward_output(inner)))


# With a mask, the backward pass of cuDNN's attention gives NaN for the queries if the number of tokens is an odd multiple of
# 64 and the logsumexp of a query's scores is below -88.7 (torch 2.11 to 2.13 on H100 and H200; PyTorch's issue 196678).
torch.backends.cuda.enable_cudnn_sdp(False)


def attention(qkv: Tensor, attention_mask: Tensor, dropout: float) -> Tensor:
    """Queries, keys and values (3, B, heads, L, H / heads) to attended values (B, heads, L, H / heads)."""
    return F.scaled_dot_product_attention(*qkv, attention_mask, dropout)


class Encoder(nn.Module):
    """Embeddings (given by the caller, who may share them), projection to the hidden size if it differs, layers."""

    def __init__(self, config: ModelConfig, size: EncoderSize, embeddings: Embeddings):
        super().__init__()
        self.embeddings = embeddings
        needs_projection = size.hidden != config.embedding_size
        self.project = nn.Linear(config.embedding_size, size.hidden) if needs_projection else nn.Identity()
        self.layers = nn.ModuleList(Layer(size, config.dropout) for _ in range(config.layers))
        self.grad_checkpointing = False  # compute each layer again for its gradient rather than keep its activations

    def forward(self, ids: Tensor, segments: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) ids to (B, L, H) vectors. Tokens where `attention_mask` (B, L) is false are padding, never attended to."""
        x = self.project(self.embeddings(ids, segments))
        keys = attention_mask[:, None, None, :]
        for layer in self.layers:
            x = checkpoint(layer, x, keys, use_reentrant=False) if self.grad_checkpointing else layer(x, keys)
        return x


# Networks

class Generator(nn.Module):
    """Masked language model: vocabulary logits at chosen positions, output table tied to the token embeddings.

    `size` is the generator's unless given: a network of kind "mlm" has the discriminator's.
    """

    def __init__(self, config: ModelConfig, embeddings: Embeddings | None = None, size: EncoderSize | None = None):
        super().__init__()
        size = size or config.generator()
        self.encoder = Encoder(config, size, embeddings or Embeddings(config))
        self.dense = nn.Linear(size.hidden, config.embedding_size)
        self.norm = nn.LayerNorm(config.embedding_size, eps=LAYER_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        initialize(self, config.initializer_range)

    def forward(self, ids: Tensor, segments: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, K, V) at `positions` (B, K) only: at every position they would fill a GPU's memory."""
        x = self.encoder(ids, segments, attention_mask)  # (B, L, H)
        return self.predict(x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1])))

    def predict(self, x: Tensor) -> Tensor:
        """The encoder's vectors (B, K, H) to logits (B, K, V)."""
        x = self.norm(F.gelu(self.dense(x)))  # (B, K, E)
        return F.linear(x, self.encoder.embeddings.token.weight, self.bias)


class Discriminator(nn.Module):
    """Replaced-token detector: a logit of "replaced" for every token."""

    def __init__(self, config: ModelConfig, embeddings: Embeddings | None = None):
        super().__init__()
        size = config.discriminator()
        self.encoder = Encoder(config, size, embeddings or Embeddings(config))
        self.dense = nn.Linear(size.hidden, size.hidden)
        self.prediction = nn.Linear(size.hidden, 1)
        initialize(self, config.initializer_range)
        glorot(self.prediction)

    def forward(self, ids: Tensor, segments: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B, L)."""
        x = self.encoder(ids, segments, attention_mask)
        return self.prediction(F.gelu(self.dense(x))).squeeze(-1)


class Classifier(nn.Module):
    """The discriminator's encoder with the original's head for fine-tuning (G, finetune/classification).

    The head is the [CLS] vector, dropout and one linear layer of `outputs`: class logits, or one real number. With
    `every_token` it is applied to the vector of each token (G, finetune/tagging).
    """

    def __init__(self, config: ModelConfig, outputs: int, every_token: bool = False):
        super().__init__()
        self.every_token = every_token
        size = config.discriminator()
        self.encoder = Encoder(config, size, Embeddings(config))
        self.dropout = nn.Dropout(config.dropout)
        self.prediction = nn.Linear(size.hidden, outputs)
        initialize(self, config.initializer_range)
        glorot(self.prediction)

    def forward(self, ids: Tensor, segments: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) ids to (B, outputs), or to (B, L, outputs)."""
        x = self.encoder(ids, segments, attention_mask)
        return self.prediction(self.dropout(x if self.every_token else x[:, 0]))

    def parameters_by_depth(self) -> list[list[nn.Parameter]]:
        """Parameters of the embeddings with their projection, of each layer from the lowest up, and of the head."""
        encoder = self.encoder
        return [[*encoder.embeddings.parameters(), *encoder.project.parameters()],
                *(list(layer.parameters()) for layer in encoder.layers),
                list(self.prediction.parameters())]


def initialize(module: nn.Module, std: float) -> None:
    """The original's initial weights: truncated normal, biases 0, Glorot for the embedding projection."""
    for name, child in module.named_modules():
        if name.endswith("project") and isinstance(child, nn.Linear):
            glorot(child)
        elif isinstance(child, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(child.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(child, nn.Linear):
            nn.init.zeros_(child.bias)


def glorot(linear: nn.Linear) -> None:
    """The default of tf.layers.dense, which the original leaves in three places."""
    nn.init.xavier_uniform_(linear.weight)


# The joint step

class Electra(nn.Module):
    """Generator and discriminator over one set of embeddings, trained jointly (paper, section 2).

    The objectives that the paper compares it with (studies/objectives.py) replace single methods of it.
    """

    networks = ("generator", "discriminator")  # what a run saves; the last one is for fine-tuning
    kept_prob, random_prob = 0.15, 0.0  # of the chosen tokens, that stay visible, that become random pieces
    stages = 1  # parts of the run, each with the whole schedule

    def __init__(self, config: ModelConfig):
        super().__init__()
        embeddings = Embeddings(config)
        self.generator = Generator(config, embeddings)
        self.discriminator = Discriminator(config, embeddings)
        self.cross_entropy, self.sample = cross_entropy, gumbel_sample  # replaced as `attention`

    def forward(self, batch: "Batch", masked: "Masked", draws: Tensor) -> ElectraOutput:
        """Both losses for one batch.

        `batch` (dataset.Batch) holds the original ids, segments and attention mask (B, L); `masked` (dataset.Masked) the
        ids with [MASK] (B, L), the positions to predict (B, K) and which of these slots are chosen (B, K). Samples follow
        from `draws` (B, K, ...) of `self.draws`.
        """
        output = self.generate(batch, masked, draws)
        return self.detect(output, output.corrupted_ids, batch, masked)

    def generate(self, batch: "Batch", masked: "Masked", draws: Tensor) -> ElectraOutput:
        """The generator's half of the output."""
        # The generator predicts the chosen tokens.
        logits = self.generator(masked.ids, batch.segments, batch.attention_mask, masked.positions)
        original_ids = batch.ids.gather(1, masked.positions)  # (B, K)
        losses = self.cross_entropy(logits, original_ids) * masked.chosen  # (B, K)

        # Its samples replace them. No gradient passes through sampling (paper, section 2).
        sampled_ids = self.sample(logits, draws)  # (B, K)
        corrupted_ids = corrupt(batch.ids, masked.positions, masked.chosen, sampled_ids)
        replaced = corrupted_ids != batch.ids  # a lucky guess counts as original (paper, section 2)
        return ElectraOutput(logits, losses, sampled_ids, corrupted_ids, replaced)

    def detect(self, output: ElectraOutput, corrupted: Tensor, batch: "Batch", masked: "Masked") -> ElectraOutput:
        """The output with the discriminator's half, which detects replaced tokens in the `corrupted` ids (B, L)."""
        logits = self.discriminator(corrupted, batch.segments, batch.attention_mask).float()
        losses = F.binary_cross_entropy_with_logits(logits, output.replaced.float(), reduction="none")
        return ElectraOutput(*output[:5], logits, losses * self.judged(batch, masked))  # torch 2.11 compiles no _replace

    def judged(self, batch: "Batch", masked: "Masked") -> Tensor:
        """The tokens (B, L) over which the discriminator's loss is a mean: all but padding (paper, section 2)."""
        return batch.attention_mask

    def draws(self, masked: "Masked", rng: torch.Generator) -> Tensor:
        """The random numbers that `forward` samples with, a row of them for each row of the batch."""
        return sampler_draws(masked.positions.shape, self.generator.bias.numel(), masked.ids.device, rng)

    def measure(self, output: ElectraOutput, batch: "Batch", masked: "Masked") -> dict[str, tuple[Tensor, str]]:
        """Sums of losses and accuracies over part of a batch, each over the "chosen" or the "judged" tokens."""
        judged = self.judged(batch, masked)
        detected = ((output.discriminator_logits > 0) == output.replaced) & judged
        return self.measure_generator(output, batch, masked) | {
            "disc_loss": (output.discriminator_losses.sum(), "judged"), "disc_accuracy": (detected.sum(), "judged")}

    def measure_generator(self, output: ElectraOutput, batch: "Batch", masked: "Masked") -> dict[str, tuple[Tensor, str]]:
        """The generator's part of `measure`."""
        guessed = (output.sampled_ids == batch.ids.gather(1, masked.positions)) & masked.chosen
        return {"mlm_loss": (output.generator_losses.sum(), "chosen"), "sampled_accuracy": (guessed.sum(), "chosen")}

    def loss(self, means: dict[str, Tensor], disc_weight: float) -> Tensor:
        """The joint loss of a batch (paper, section 2.1)."""
        return means["mlm_loss"] + disc_weight * means["disc_loss"]

    def begin_step(self, stage: int, first: bool) -> None:
        """Called before each step with the number of its stage and whether it is the stage's first. ELECTRA has one."""


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross entropy (...) in fp32 of logits (..., V) of any type and the true ids (...)."""
    losses = F.cross_entropy(logits.flatten(0, -2).float(), ids.flatten(), reduction="none")
    return losses.view_as(ids)


def corrupt(ids: Tensor, positions: Tensor, chosen: Tensor, sampled_ids: Tensor) -> Tensor:
    """Copy of `ids` (B, L) with `sampled_ids` (B, K) at those of the `positions` (B, K) that are `chosen`."""
    return ids.scatter(1, positions, torch.where(chosen, sampled_ids, ids.gather(1, positions)))


# The Gumbel sampler

@torch.no_grad()
def gumbel_sample(logits: Tensor, draws: Tensor) -> Tensor:
    """One exact sample (...) from softmax(logits (..., V)), by the Gumbel-max trick on sampler_draws; no gradient.

    The sample is drawn in two levels, first a block of about sqrt(V) entries by its probability, then an entry inside it:
    the same distribution from 2 sqrt(V) random numbers instead of V. Everything random is fp32 whatever the logits' type:
    `torch.nn.functional.gumbel_softmax` draws in the logits' type, where half precision rounds exponential draws to 0
    and gives inf - inf = NaN (pytorch#41663).
    """
    V = logits.shape[-1]
    width = block_width(V)
    padding = -V % width
    blocks = F.pad(logits.float(), (0, padding), value=-math.inf).unflatten(-1, (-1, width))  # (..., V / width, width)
    block_draws, entry_draws = draws.split([blocks.shape[-2], width], -1)
    block = (blocks.logsumexp(-1) + gumbel_noise(block_draws)).argmax(-1, keepdim=True)
    entries = blocks.take_along_dim(block[..., None], -2).squeeze(-2)  # (..., width)
    entry = (entries + gumbel_noise(entry_draws)).argmax(-1, keepdim=True)
    return (block * width + entry).squeeze(-1)


def sampler_draws(shape: tuple[int, ...], V: int, device: torch.device, rng: torch.Generator | None = None) -> Tensor:
    """Exponential draws (*shape, blocks + width) in fp32 for gumbel_sample: of each block, then of each place in a block."""
    width = block_width(V)
    blocks = math.ceil(V / width)
    return torch.empty(*shape, blocks + width, device=device).exponential_(generator=rng)


def block_width(V: int) -> int:
    """sqrt(V) rounded up."""
    return math.isqrt(V - 1) + 1


def gumbel_noise(draws: Tensor) -> Tensor:
    """-log of fp32 exponential draws, finite for each of them, 0 and infinity included."""
    limits = torch.finfo(torch.float32)
    return -draws.clamp(limits.tiny, limits.max).log()


# Weights files: gen.pt, disc.pt, mlm.pt, model.pt

class SavedNetwork(NamedTuple):
    """One network with everything that using it needs: the content of a weights file."""

    kind: str  # generator, discriminator, mlm, classifier or token classifier
    network: nn.Module
    config: ModelConfig
    tokenizer: str  # JSON of the tokenizers library
    task: str = ""  # on which a classifier was fine-tuned
    report: str = ""  # how it was trained, in Markdown, for a model card


def save_network(path: Path, saved: SavedNetwork) -> None:
    """Writes a weights file whole or not at all; it holds tensors and plain values only."""
    save(path, {"kind": saved.kind, "model": dataclasses.asdict(saved.config), "vocabulary": saved.tokenizer,
                "weights": saved.network.state_dict(), "task": saved.task, "report": saved.report})


def load_network(path: Path, kinds: Sequence[str], flag: str) -> SavedNetwork:
    """The content of a weights file of one of `kinds`, its network in evaluation mode on the CPU.

    Raises InputError, naming the command-line `flag`, for a file that is missing, damaged, of another kind, or lacks a
    weight, and for weights that are not finite.
    """
    expected = f"{flag} expects the {' or '.join(kinds)} that Pretraining.py or Finetuning.py wrote"
    require(path.is_file(), f"{path} is {'a folder' if path.is_dir() else 'missing'}: {expected}")
    content = load(path)
    is_weights_file = isinstance(content, dict) and {"kind", "model", "vocabulary", "weights"} <= content.keys()
    require(is_weights_file, f"{path} is not a weights file: {expected}")
    require(content["kind"] in kinds, f"{path} holds a {content['kind']}: {expected}")
    try:
        config = from_table(ModelConfig, content["model"], "model")
        network = network_of_weights(content["kind"], config, content["weights"])
    except Exception as error:  # sizes and weights of wrong types raise many types of errors
        raise InputError(f"the parts of {path} don't fit together ({one_line(error)}): {expected}") from None
    finite = all(weight.isfinite().all() for weight in network.parameters())
    require(finite, f"{path} has weights that are not finite numbers, so its training failed: choose another file")
    return SavedNetwork(content["kind"], network.eval(), config, content["vocabulary"], content.get("task", ""),
                        str(content.get("report", "")))


def build_network(kind: str, config: ModelConfig) -> nn.Module:
    """A generator, discriminator or "mlm" (one of NETWORK_FILES) with initial weights."""
    if kind == "mlm":
        return Generator(config, size=config.discriminator())
    return {"generator": Generator, "discriminator": Discriminator}[kind](config)


def network_of_weights(kind: str, config: ModelConfig, weights: dict[str, Tensor]) -> nn.Module:
    """A network with these weights. Raises an error unless every weight is there in its shape, and no other."""
    if config.layers > len(weights):  # a damaged number would build layers without end
        raise ValueError(f"{config.layers} layers from {len(weights)} weights")
    with torch.device("meta"):  # takes no memory, so sizes that don't match the weights can do no harm
        if kind in CLASSIFIERS:
            network = Classifier(config, len(weights["prediction.bias"]), every_token=kind == "token classifier")
        else:
            network = build_network(kind, config)
    for name, weight in weights.items():
        if not weight.is_contiguous():  # a large shape over few numbers
            raise ValueError(f"{name} is not contiguous")
    network.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    return network
