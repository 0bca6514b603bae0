"""ELECTRA: token ids and masked positions in; generator and discriminator losses, logits and samples out.

Sizes, initial weights, sharing and heads follow google-research/electra (model/modeling.py, run_pretraining.py).
Shapes: B rows, L tokens a row, K masked slots a row, H hidden, E embedding and V vocabulary size.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LAYER_NORM_EPS = 1e-12  # BERT's
HEAD_SIZE = 64  # of the generator's heads (run_pretraining.py, get_generator_config)
DROPOUT_STEPS = 2**16  # probabilities that the CPU's dropout tells apart
VOCABULARY_CHUNK = 2**20  # fp32 logits worked on at a time: they stay in the cache


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the pair; the defaults are ELECTRA-Small's (paper, table 6)."""

    vocab_size: int = 30522
    """Word pieces; also how many are learned where no --vocab is given."""
    embedding_size: int = 128
    """Width of the embeddings that generator and discriminator share."""
    hidden_size: int = 256
    """Width of the discriminator's layers."""
    layers: int = 12
    """Depth of both encoders."""
    heads: int = 4
    """Attention heads of the discriminator."""
    feed_forward_size: int = 1024
    """Inner width of the discriminator's feed-forward blocks."""
    generator_size: float = 0.25
    """Generator's width as a share of the discriminator's."""
    max_positions: int = 512
    """Rows of the position table: no example can be longer."""
    dropout: float = 0.1
    """On embeddings, attention probabilities and sublayer outputs."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights, cut at two of them."""

    def generator(self) -> "EncoderSize":
        """The generator's encoder (run_pretraining.py, get_generator_config)."""
        hidden = round(self.hidden_size * self.generator_size)
        return EncoderSize(hidden, max(1, hidden // HEAD_SIZE), 4 * hidden)

    def discriminator(self) -> "EncoderSize":
        return EncoderSize(self.hidden_size, self.heads, self.feed_forward_size)


class EncoderSize(NamedTuple):
    hidden: int
    heads: int
    feed_forward: int


class ElectraOutput(NamedTuple):
    """What one joint forward pass gives; sums divided by counts make the paper's losses."""

    generator_losses: Tensor  # (B, K) cross entropy, 0 at empty slots
    discriminator_losses: Tensor  # (B, L) binary cross entropy, 0 at padding
    generator_logits: Tensor  # (B, K, V)
    sampled: Tensor  # (B, K) ids drawn from the generator
    discriminator_logits: Tensor  # (B, L)
    replaced: Tensor  # (B, L) bool, the discriminator's labels


class Dropout(nn.Dropout):
    """nn.Dropout whose masks cost a sixth on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or not self.training or not self.p:
            return super().forward(x)
        kept, scale = kept_and_scale(x, self.p)
        return x * kept * scale


def kept_and_scale(x: Tensor, dropout: float) -> tuple[Tensor, float]:
    """A dropout mask of 1 and 0 in the shape and type of `x`, on the CPU, and the factor for what is kept.

    From 16 random bits an element: the probability is the nearest multiple of 1 / DROPOUT_STEPS, and the factor is exact
    for that.
    """
    dropped = round(dropout * DROPOUT_STEPS)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None).view(torch.int16)
    kept = torch.empty(x.shape, dtype=x.dtype)
    torch.ge(bits[:x.numel()].view(x.shape), dropped - DROPOUT_STEPS // 2, out=kept)
    return kept, DROPOUT_STEPS / max(1, DROPOUT_STEPS - dropped)


class Embeddings(nn.Module):
    """Token, position and segment embeddings, summed and normalized: (B, L) ids to (B, L, E)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.embedding_size)
        self.position = nn.Embedding(config.max_positions, config.embedding_size)
        self.segment = nn.Embedding(2, config.embedding_size)
        self.norm = nn.LayerNorm(config.embedding_size, eps=LAYER_NORM_EPS)
        self.dropout = Dropout(config.dropout)

    def forward(self, ids: Tensor, segments: Tensor) -> Tensor:
        positions = self.position.weight[: ids.shape[1]]  # (L, E)
        return self.dropout(self.norm(self.token(ids) + positions + self.segment(segments)))


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
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`mask` (B, 1, 1, L) is true at the keys that may be attended; None: all."""
        x = self.attention_norm(x + self.dropout(self.attention_output(self.attend(x, mask))))
        inner, output = self.feed_forward(x), self.feed_forward_output
        inner = GeluLinear.apply(inner, output.weight.to(inner.dtype), output.bias.to(inner.dtype))
        return self.feed_forward_norm(x + self.dropout(inner))

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        B, L, H = x.shape
        qkv = self.query_key_value(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, heads, L, H')
        dropout = self.dropout.p if self.training else 0.0
        if x.is_cuda or not self.training:
            attended = F.scaled_dot_product_attention(*qkv, mask, dropout)
        else:
            attended = Attention.apply(qkv, mask, dropout)
        return attended.transpose(1, 2).reshape(B, L, H)


class Attention(torch.autograd.Function):
    """F.scaled_dot_product_attention with its gradient, written out: twice as fast on the CPU, where torch's is slow with
    dropout, and it keeps fewer copies. qkv (3, B, heads, L, H') to (B, heads, L, H')."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        qkv = qkv.contiguous()
        q, k, v = qkv.flatten(1, 2)  # each (B x heads, L, H')
        weights = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5)
        if mask is not None:
            weights.view(*qkv.shape[1:4], -1).masked_fill_(~mask, -math.inf)
        weights = weights.softmax(-1)
        kept, ctx.scale = kept_and_scale(weights, dropout) if dropout else (None, 1.0)
        ctx.save_for_backward(qkv, weights, kept)
        dropped = weights if kept is None else weights * kept
        return torch.baddbmm(q.new_empty(()), dropped, v, beta=0, alpha=ctx.scale).view(qkv.shape[1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        qkv, weights, kept = ctx.saved_tensors
        q, k, v = qkv.flatten(1, 2)
        gradient = gradient.flatten(0, 1)
        found = torch.empty_like(qkv)
        to_q, to_k, to_v = found.flatten(1, 2)

        def multiply(out: Tensor, a: Tensor, b: Tensor, factor: float) -> Tensor:
            return torch.baddbmm(out, a, b, beta=0, alpha=factor, out=out)
        dropped = weights if kept is None else weights * kept
        multiply(to_v, dropped.mT, gradient, ctx.scale)
        to_weights = multiply(dropped if kept is not None else torch.empty_like(weights), gradient, v.mT, ctx.scale)
        if kept is not None:
            to_weights *= kept
        scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
        multiply(to_q, scores, k, q.shape[-1] ** -0.5)
        multiply(to_k, scores.mT, q, q.shape[-1] ** -0.5)
        return found, None, None


class GeluLinear(torch.autograd.Function):
    """F.linear(F.gelu(x), weight, bias) that keeps x alone and computes the GELU again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        to_weight = rows.mT @ F.gelu(x).flatten(0, -2)
        return torch.ops.aten.gelu_backward(gradient @ weight, x), to_weight, rows.sum(0)


class Encoder(nn.Module):
    """Embeddings (shared by the caller), projection to the hidden size where it differs, layers."""

    recompute = False  # what a layer computes, for its gradient, rather than keep it

    def __init__(self, config: ModelConfig, size: EncoderSize, embeddings: Embeddings):
        super().__init__()
        self.embeddings = embeddings
        same = size.hidden == config.embedding_size
        self.project = nn.Identity() if same else nn.Linear(config.embedding_size, size.hidden)
        self.layers = nn.ModuleList(Layer(size, config.dropout) for _ in range(config.layers))

    def forward(self, ids: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        """(B, L) ids to (B, L, H) vectors; keys where `mask` (B, L) is false are never attended."""
        x = self.project(self.embeddings(ids, segments))
        hidden = None if not mask.is_cuda and mask.all() else mask[:, None, None, :]  # on CUDA the question costs a wait
        for layer in self.layers:
            x = checkpoint(layer, x, hidden, use_reentrant=False) if self.recompute else layer(x, hidden)
        return x


class Generator(nn.Module):
    """Masked language model: vocabulary logits at chosen positions, output table tied to the token embeddings."""

    def __init__(self, config: ModelConfig, embeddings: Embeddings | None = None):
        super().__init__()
        size = config.generator()
        self.encoder = Encoder(config, size, embeddings or Embeddings(config))
        self.dense = nn.Linear(size.hidden, config.embedding_size)
        self.norm = nn.LayerNorm(config.embedding_size, eps=LAYER_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        initialize(self, config.initializer_range)

    def forward(self, ids: Tensor, segments: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, K, V) at `positions` (B, K) of each row, and nowhere else."""
        x = self.encoder(ids, segments, mask)
        x = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))  # (B, K, H)
        x = self.norm(F.gelu(self.dense(x)))
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

    def forward(self, ids: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, L)."""
        return self.prediction(F.gelu(self.dense(self.encoder(ids, segments, mask)))).squeeze(-1)


class Classifier(nn.Module):
    """The discriminator's encoder and the original's fine-tuning head (model/modeling.py; finetune/classification_tasks.py).

    The head is the [CLS] vector, dropout and one linear layer of `outputs`: class logits, or one real number.
    """

    def __init__(self, config: ModelConfig, outputs: int):
        super().__init__()
        size = config.discriminator()
        self.encoder = Encoder(config, size, Embeddings(config))
        self.dropout = Dropout(config.dropout)
        self.prediction = nn.Linear(size.hidden, outputs)
        initialize(self, config.initializer_range)
        glorot(self.prediction)

    def forward(self, ids: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        """(B, L) ids to (B, outputs)."""
        return self.prediction(self.dropout(self.encoder(ids, segments, mask)[:, 0]))

    def depths(self) -> list[tuple[list[nn.Parameter], int]]:
        """Parameters from the embeddings (0, the projection with them) through layer n (n) to the head (layers + 1)."""
        encoder = self.encoder
        parts = [[*encoder.embeddings.parameters(), *encoder.project.parameters()],
                 *(list(layer.parameters()) for layer in encoder.layers), list(self.prediction.parameters())]
        return [(parameters, depth) for depth, parameters in enumerate(parts)]


class Electra(nn.Module):
    """Generator and discriminator over one set of embeddings, trained jointly (paper, section 2)."""

    def __init__(self, config: ModelConfig, grad_checkpointing: bool = False):
        super().__init__()
        embeddings = Embeddings(config)
        self.generator = Generator(config, embeddings)
        self.discriminator = Discriminator(config, embeddings)
        self.generator.encoder.recompute = self.discriminator.encoder.recompute = grad_checkpointing

    def forward(self, ids: Tensor, segments: Tensor, mask: Tensor, masked_ids: Tensor, positions: Tensor,
                chosen: Tensor, draws: Tensor) -> ElectraOutput:
        """Both losses for original `ids` and `masked_ids` (B, L), predicted at `positions` (B, K) where `chosen` holds.

        `mask` (B, L) is false at padding. Samples follow from `draws` (B, K, ...) of sampler_draws.
        """
        generator_logits = self.generator(masked_ids, segments, mask, positions)
        originals = ids.gather(1, positions)
        blocks = block_logsumexp(generator_logits.detach())
        losses = CrossEntropy.apply(generator_logits, originals, blocks.logsumexp(-1))
        sampled = gumbel_sample(generator_logits, draws, blocks)
        corrupted = corrupt(ids, positions, chosen, sampled)
        replaced = corrupted != ids  # a lucky guess counts as original (paper, section 2)
        logits = self.discriminator(corrupted, segments, mask).float()
        detection = F.binary_cross_entropy_with_logits(logits, replaced.float(), reduction="none")
        return ElectraOutput(losses * chosen, detection * mask, generator_logits, sampled, logits,
                             replaced)


def corrupt(ids: Tensor, positions: Tensor, chosen: Tensor, sampled: Tensor) -> Tensor:
    """Copy of `ids` (B, L) with `sampled` (B, K) at those of the `positions` (B, K) that are `chosen`."""
    return ids.scatter(1, positions, torch.where(chosen, sampled, ids.gather(1, positions)))


class CrossEntropy(torch.autograd.Function):
    """Cross entropy (...) in fp32 of logits (..., V) of any type, whose logsumexp (...) is known already.

    Beside the logits and their gradient, in the logits' own type, it keeps nothing of the vocabulary's size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, logsumexp: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets, logsumexp)
        return logsumexp - logits.gather(-1, targets[..., None]).squeeze(-1).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, logsumexp = ctx.saved_tensors
        found = torch.empty_like(logits)
        parts = (tensor.flatten(0, -2).split(rows_of_a_chunk(logits)) for tensor in
                 (found, logits, targets[..., None], logsumexp[..., None], gradient[..., None]))
        for out, some, target, total, factor in zip(*parts, strict=True):
            softmax = (some.float() - total).exp_()
            softmax.scatter_add_(-1, target, torch.full_like(total, -1.0))
            torch.mul(softmax, factor, out=out) if out.dtype == softmax.dtype else out.copy_(softmax.mul_(factor))
        return found, None, None


def rows_of_a_chunk(logits: Tensor) -> int:
    return max(1, VOCABULARY_CHUNK // logits.shape[-1])


@torch.no_grad()
def block_logsumexp(logits: Tensor) -> Tensor:
    """Logarithms (..., ceil(V / width)) of the summed exponentials of logits (..., V), `block_width` at a time, in fp32."""
    V = logits.shape[-1]
    width = block_width(V)
    whole = V // width * width
    sums = []
    for some in logits.reshape(-1, V).split(rows_of_a_chunk(logits)):
        sums.append(some[:, :whole].float().unflatten(-1, (-1, width)).logsumexp(-1))
        if whole < V:
            sums[-1] = torch.cat([sums[-1], some[:, whole:].float().logsumexp(-1, keepdim=True)], -1)
    return torch.cat(sums).view(*logits.shape[:-1], -1)


def block_width(V: int) -> int:
    """About sqrt(V), rounded up."""
    return math.isqrt(V - 1) + 1 if V > 1 else 1


@torch.no_grad()
def gumbel_sample(logits: Tensor, draws: Tensor, blocks: Tensor | None = None) -> Tensor:
    """One exact sample (...) from softmax(logits (..., V)), by the Gumbel-max trick on sampler_draws; no gradient.

    Drawn in two levels, first a block of about sqrt(V) entries by its probability (`blocks`: their block_logsumexp, where
    it is known), then an entry inside it: the same distribution from 2 sqrt(V) random numbers instead of V. Everything
    random is fp32 whatever the logits' type: `torch.nn.functional.gumbel_softmax` draws in the logits' type, where half
    precision rounds exponential draws to 0 and gives inf - inf = NaN (pytorch#41663).
    """
    V = logits.shape[-1]
    width = block_width(V)
    blocks = block_logsumexp(logits) if blocks is None else blocks
    first, second = draws.split([blocks.shape[-1], width], -1)
    block = (blocks + gumbel_noise(first)).argmax(-1, keepdim=True)
    inside = block * width + torch.arange(width, device=logits.device)  # (..., width)
    beyond = inside >= V
    entries = logits.gather(-1, inside.clamp(max=V - 1)).float().masked_fill(beyond, -math.inf)
    return inside.gather(-1, (entries + gumbel_noise(second)).argmax(-1, keepdim=True)).squeeze(-1)


def sampler_draws(rows: tuple[int, ...], V: int, device: torch.device, rng: torch.Generator | None = None) -> Tensor:
    """Exponential draws (*rows, ceil(V / width) + width), fp32, for gumbel_sample."""
    width = block_width(V)
    return torch.empty(*rows, -(-V // width) + width, device=device).exponential_(generator=rng)


def gumbel_noise(draws: Tensor) -> Tensor:
    """-log of fp32 exponential draws, finite for each of them, 0 and infinity included."""
    limits = torch.finfo(torch.float32)
    return -draws.clamp(limits.tiny, limits.max).log()


# How our parameter names become those of transformers' ElectraForMaskedLM and ElectraForPreTraining.
NAMES = {
    r"^encoder\.embeddings\.token": "electra.embeddings.word_embeddings",
    r"^encoder\.embeddings\.position": "electra.embeddings.position_embeddings",
    r"^encoder\.embeddings\.segment": "electra.embeddings.token_type_embeddings",
    r"^encoder\.embeddings\.norm": "electra.embeddings.LayerNorm",
    r"^encoder\.project": "electra.embeddings_project",
    r"^encoder\.layers\.": "electra.encoder.layer.",
    r"\.attention_output\.": ".attention.output.dense.",
    r"\.attention_norm\.": ".attention.output.LayerNorm.",
    r"\.feed_forward\.": ".intermediate.dense.",
    r"\.feed_forward_output\.": ".output.dense.",
    r"\.feed_forward_norm\.": ".output.LayerNorm.",
}
HEAD_NAMES = {
    Generator: {r"^(dense)": r"generator_predictions.\1", r"^norm": "generator_predictions.LayerNorm",
                r"^bias": "generator_lm_head.bias"},
    Discriminator: {r"^(dense)": r"discriminator_predictions.\1",
                    r"^prediction": "discriminator_predictions.dense_prediction"},
}
TIED = ("generator_lm_head.weight", "electra.embeddings.word_embeddings.weight")


IGNORED = re.compile(r"discriminator_predictions\..*|classifier\..*")  # no encoder weights


def transformers_names(model: Generator | Discriminator | Encoder) -> dict[str, list[str]]:
    """For each of our weights the transformers weights it holds: one, or query, key and value stacked."""
    names = {}
    for ours in model.state_dict():
        theirs = f"encoder.{ours}" if isinstance(model, Encoder) else ours
        for pattern, replacement in (NAMES | HEAD_NAMES.get(type(model), {})).items():
            theirs = re.sub(pattern, replacement, theirs)
        parts = ("query", "key", "value") if ".query_key_value." in theirs else ("",)
        names[ours] = [theirs.replace(".query_key_value.", f".attention.self.{part}.") for part in parts]
    return names


def to_transformers(model: Generator | Discriminator | Encoder) -> dict[str, Tensor]:
    """One network's weights under transformers' names."""
    weights = model.state_dict()
    theirs = {name: part for ours, names in transformers_names(model).items()
              for name, part in zip(names, weights[ours].chunk(len(names)), strict=True)}
    return theirs | ({TIED[0]: theirs[TIED[1]]} if isinstance(model, Generator) else {})


@torch.no_grad()
def classifier_to_transformers(model: Classifier, scale: float) -> dict[str, Tensor]:
    """Weights of an ElectraForSequenceClassification whose logits are `scale` times the outputs of `model`.

    It has a dense layer and a GELU before the last layer: the dense layer gives each output z as z and -z, the last layer
    puts them together again, since gelu(z) - gelu(-z) = z. Units that this leaves over stay 0.
    """
    outputs, H = model.prediction.weight.shape
    signs = torch.cat([torch.eye(outputs), -torch.eye(outputs)])  # (2 outputs, outputs)
    dense, bias, last = torch.zeros(H, H), torch.zeros(H), torch.zeros(outputs, H)
    dense[:2 * outputs] = scale * signs @ model.prediction.weight
    bias[:2 * outputs] = scale * signs @ model.prediction.bias
    last[:, :2 * outputs] = signs.T
    return to_transformers(model.encoder) | {"classifier.dense.weight": dense, "classifier.dense.bias": bias,
                                             "classifier.out_proj.weight": last,
                                             "classifier.out_proj.bias": torch.zeros(outputs)}


def load_transformers(model: Generator | Discriminator | Encoder, weights: dict[str, Tensor]) -> None:
    """Fills one network from transformers' weights; KeyError or RuntimeError where they don't match it one to one, or an
    output table is not the tied one.

    An encoder leaves the heads of a discriminator or a classifier aside, and takes names without "electra." too, as
    ElectraModel saves them.
    """
    names = transformers_names(model)
    if isinstance(model, Encoder):
        prefix = "electra." if any(name.startswith("embeddings.") for name in weights) else ""
        weights = {prefix + name: weight for name, weight in weights.items() if not IGNORED.fullmatch(prefix + name)}
    weights = {name: weight for name, weight in weights.items() if name != "electra.embeddings.position_ids"}  # of old files
    surplus = set(weights) - {name for some in names.values() for name in some} - {TIED[0]}
    if surplus:
        raise KeyError(f"weights without a place: {', '.join(sorted(surplus))}")
    if TIED[0] in weights and not torch.equal(weights[TIED[0]], weights[TIED[1]]):
        raise KeyError(f"{TIED[0]} is not {TIED[1]}, to which it is tied here")
    model.load_state_dict({ours: torch.cat([weights[name] for name in some]) for ours, some in names.items()})


def from_transformers_config(theirs: dict[str, Any]) -> ModelConfig:
    """Sizes of a transformers ELECTRA's config.json; ValueError for one that this encoder does not compute."""
    wanted = {"model_type": "electra", "hidden_act": "gelu", "type_vocab_size": 2, "layer_norm_eps": LAYER_NORM_EPS,
              "position_embedding_type": "absolute"}
    for name, value in wanted.items():
        if theirs.get(name, value) != value:
            raise ValueError(f"{name} is {theirs[name]!r}, {value!r} is wanted")
    fields = {"vocab_size": "vocab_size", "embedding_size": "embedding_size", "hidden_size": "hidden_size",
              "layers": "num_hidden_layers", "heads": "num_attention_heads", "feed_forward_size": "intermediate_size",
              "max_positions": "max_position_embeddings", "dropout": "hidden_dropout_prob",
              "initializer_range": "initializer_range"}
    return ModelConfig(**{ours: theirs[name] for ours, name in fields.items() if name in theirs})  # same defaults


def to_transformers_config(config: ModelConfig, size: EncoderSize) -> dict[str, Any]:
    """What ElectraConfig takes for one of the two networks."""
    return {"vocab_size": config.vocab_size, "embedding_size": config.embedding_size, "hidden_size": size.hidden,
            "num_hidden_layers": config.layers, "num_attention_heads": size.heads, "intermediate_size": size.feed_forward,
            "max_position_embeddings": config.max_positions, "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.dropout, "initializer_range": config.initializer_range,
            "layer_norm_eps": LAYER_NORM_EPS, "type_vocab_size": 2, "hidden_act": "gelu"}


def training_flops(config: ModelConfig, length: int, predictions: int) -> int:
    """FLOPs of training on one example: three times the forward pass's matrix multiplications.

    Of `length` tokens, `predictions` of them through the generator's vocabulary head; embedding look-ups are free.
    """
    E, V = config.embedding_size, config.vocab_size
    multiplications = 0
    for H, _, inner in (config.generator(), config.discriminator()):
        layer = 4 * H * H + 2 * H * inner + 2 * length * H  # a token's: projections, feed-forward, attention
        multiplications += length * (config.layers * layer + (E * H if E != H else 0))
    multiplications += predictions * (config.generator().hidden * E + E * V)
    multiplications += length * (config.hidden_size**2 + config.hidden_size)
    return 3 * 2 * multiplications


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
    """tf.layers.dense's default for matrices, which the original leaves in three places."""
    nn.init.xavier_uniform_(linear.weight)
