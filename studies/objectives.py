"""Training objectives to compare ELECTRA with: each changes one thing of model.Electra (paper, section 3.4 and table 5).

    python Pretraining.py --objective mlm --output runs/bert
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import Batch, Masked
from model import Discriminator, Electra, ElectraOutput, Generator, ModelConfig, glorot, gumbel_noise
from utils import require


class MaskedLM(Electra):
    """BERT's objective: one network, of the discriminator's size, predicts the chosen tokens (Devlin et al., 2019)."""

    networks = ("mlm",)
    kept_prob, random_prob = 0.1, 0.1  # of BERT, section 3.1; the other 80% become [MASK]

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        del self.generator, self.discriminator
        self.mlm = Generator(config, size=config.discriminator())

    def forward(self, batch: Batch, masked: Masked, draws: Tensor) -> ElectraOutput:
        """Logits and losses of one batch, under the generator's names; `draws` are not used."""
        logits = self.mlm(masked.ids, batch.segments, batch.attention_mask, masked.positions)
        losses = self.cross_entropy(logits, batch.ids.gather(1, masked.positions))
        return ElectraOutput(logits, losses * masked.chosen)

    def draws(self, masked: Masked, rng: torch.Generator) -> Tensor:
        """Nothing is sampled, so a row has no draws."""
        return torch.empty(len(masked.ids), 0, device=masked.ids.device)

    def measure(self, output: ElectraOutput, batch: Batch, masked: Masked) -> dict[str, tuple[Tensor, str]]:
        return {"mlm_loss": (output.generator_losses.sum(), "chosen")}

    def loss(self, means: dict[str, Tensor], disc_weight: float) -> Tensor:
        return means["mlm_loss"]


class Electra15(Electra):
    """ELECTRA 15%: the discriminator's loss is a mean over the chosen tokens instead of over all."""

    def judged(self, batch: Batch, masked: Masked) -> Tensor:
        return torch.zeros_like(batch.attention_mask).scatter(1, masked.positions, masked.chosen)


class Untied(Electra):
    """ELECTRA whose networks have embeddings of their own instead of sharing them (paper, section 3.2)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.discriminator = Discriminator(config)


class ReplaceMLM(Electra):
    """Replace MLM: a large network predicts the chosen tokens from a text in which the generator's samples replace them.

    Both losses are cross entropies over the same vocabulary. The paper gives no weight for them; here both have weight 1.
    """

    networks = ("generator", "mlm")

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        del self.discriminator
        self.mlm = Generator(config, self.generator.encoder.embeddings, config.discriminator())

    def forward(self, batch: Batch, masked: Masked, draws: Tensor) -> ElectraOutput:
        """The generator's half of the output and the large network's losses (B, K)."""
        output = self.generate(batch, masked, draws)
        logits = self.mlm(output.corrupted_ids, batch.segments, batch.attention_mask, masked.positions)
        losses = self.cross_entropy(logits, batch.ids.gather(1, masked.positions))
        return ElectraOutput(*output[:5], large_losses=losses * masked.chosen)

    def measure(self, output: ElectraOutput, batch: Batch, masked: Masked) -> dict[str, tuple[Tensor, str]]:
        return self.measure_generator(output, batch, masked) | {"large_mlm_loss": (output.large_losses.sum(), "chosen")}

    def loss(self, means: dict[str, Tensor], disc_weight: float) -> Tensor:
        return means["mlm_loss"] + means["large_mlm_loss"]


class AllTokensMLM(ReplaceMLM):
    """All-tokens MLM: as Replace MLM, but the large network predicts every token, with a copy mechanism.

    Its distribution is D * [the input token] + (1 - D) * softmax(logits), with D the sigmoid of one more linear layer.
    That layer is kept in the checkpoints alone; mlm.pt holds the network below it.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.copy = nn.Linear(config.hidden_size, 1)
        glorot(self.copy)
        nn.init.zeros_(self.copy.bias)

    def forward(self, batch: Batch, masked: Masked, draws: Tensor) -> ElectraOutput:
        """The generator's half of the output and the large network's losses (B, L)."""
        output = self.generate(batch, masked, draws)
        x = self.mlm.encoder(output.corrupted_ids, batch.segments, batch.attention_mask)  # (B, L, H)
        copy_logits = self.copy(x).squeeze(-1).float()  # (B, L)
        predicted = F.logsigmoid(-copy_logits) - self.cross_entropy(self.mlm.predict(x), batch.ids)
        copied = F.logsigmoid(copy_logits)  # is right where the token was not replaced
        losses = -torch.where(output.replaced, predicted, torch.logaddexp(copied, predicted))
        return ElectraOutput(*output[:5], large_losses=losses * batch.attention_mask)

    def measure(self, output: ElectraOutput, batch: Batch, masked: Masked) -> dict[str, tuple[Tensor, str]]:
        return self.measure_generator(output, batch, masked) | {"large_mlm_loss": (output.large_losses.sum(), "judged")}


class TwoStage(Untied):
    """The generator is trained alone; the discriminator begins with its weights and is trained while it stays as it is.

    Each stage has half of the steps, with a warm-up and a decay of its own (paper, section 3.2; it gives no schedule). The
    generator's embeddings must stay as they are, so the discriminator has its own.
    """

    stages = 2

    def __init__(self, config: ModelConfig):
        require(config.generator() == config.discriminator(),
                "--objective two-stage copies the generator's weights into the discriminator, but their widths, heads and "
                f"feed-forward widths are {tuple(config.generator())} and {tuple(config.discriminator())}: set "
                "--model.generator-size 1, --model.heads to a 64th of the width, --model.feed-forward-size to 4 times it")
        super().__init__(config)
        self.stage = 0

    def begin_step(self, stage: int, first: bool) -> None:
        """Before the first step of the second stage the discriminator's encoder gets the generator's weights."""
        self.stage = stage
        if stage == 1 and first:
            self.discriminator.encoder.load_state_dict(self.generator.encoder.state_dict())

    def forward(self, batch: Batch, masked: Masked, draws: Tensor) -> ElectraOutput:
        """The generator's half of the output; in the second stage, without its gradient, all of it."""
        if self.stage == 0:
            return self.generate(batch, masked, draws)
        with torch.no_grad():
            output = self.generate(batch, masked, draws)
        return self.detect(output, output.corrupted_ids, batch, masked)

    def measure(self, output: ElectraOutput, batch: Batch, masked: Masked) -> dict[str, tuple[Tensor, str]]:
        if output.discriminator_logits is None:
            return self.measure_generator(output, batch, masked)
        return super().measure(output, batch, masked)

    def loss(self, means: dict[str, Tensor], disc_weight: float) -> Tensor:
        return means["mlm_loss"] if self.stage == 0 else means["disc_loss"]


class StraightThrough(Electra):
    """ELECTRA whose discriminator's gradient reaches the generator through straight-through Gumbel-softmax samples.

    The discriminator reads hard samples; the gradient passes as if it had read softmax((logits + noise) / temperature)
    (Jang et al., 2017, section 2.2). So the generator learns to help the discriminator, not to mislead it.
    """

    def __init__(self, config: ModelConfig, temperature: float):
        super().__init__(config)
        self.temperature = temperature
        self.sample = gumbel_argmax

    def draws(self, masked: Masked, rng: torch.Generator) -> Tensor:
        """Exponential draws (B, K, V) in fp32: the soft sample needs noise for every piece."""
        V = self.generator.bias.numel()
        return torch.empty(*masked.positions.shape, V, device=masked.ids.device).exponential_(generator=rng)

    def forward(self, batch: Batch, masked: Masked, draws: Tensor) -> ElectraOutput:
        """As Electra's."""
        output = self.generate(batch, masked, draws)
        embeddings = self.discriminator.encoder.embeddings.token
        soft_samples = ((output.generator_logits.float() + gumbel_noise(draws)) / self.temperature).softmax(-1)
        soft_vectors = (soft_samples @ embeddings.weight.detach()).float() * masked.chosen[..., None]  # (B, K, E)
        gradient_only = soft_vectors - soft_vectors.detach()  # zeros that carry the gradient
        vectors = embeddings(output.corrupted_ids)  # (B, L, E)
        vectors = vectors.scatter_add(1, masked.positions[..., None].expand_as(gradient_only), gradient_only)
        return self.detect(output, vectors, batch, masked)


@torch.no_grad()
def gumbel_argmax(logits: Tensor, draws: Tensor) -> Tensor:
    """One exact sample (...) from softmax(logits (..., V)), with `draws` (..., V) for every piece."""
    return (logits.float() + gumbel_noise(draws)).argmax(-1)


OBJECTIVES = {"electra": Electra, "mlm": MaskedLM, "electra-15": Electra15, "untied": Untied, "replace-mlm": ReplaceMLM,
              "all-tokens-mlm": AllTokensMLM, "two-stage": TwoStage, "straight-through": StraightThrough}


def build_objective(name: str, config: ModelConfig, temperature: float, kept_prob: float | None = None) -> Electra:
    """The networks of an objective with initial weights.

    `temperature` is straight-through's; `kept_prob` is the share of the chosen tokens that stay visible, by default the
    objective's own.
    """
    electra = StraightThrough(config, temperature) if name == "straight-through" else OBJECTIVES[name](config)
    if kept_prob is not None:
        electra.kept_prob = kept_prob
    return electra
