"""One pretraining step computed in several ways, for the benchmarks to compare: this project's, two wirings of
transformers' networks, and the matrix products alone."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bf16_cpu_kernels import use_bf16_cpu_kernels
from convert.names import config_to_transformers
from dataset import Batch, Vocabulary
from model import Electra, ModelConfig, cross_entropy, gumbel_sample
from Pretraining import Pretraining, Run, training_step
from utils import Adam, Precision, decay_groups

SPECIAL_IDS = SimpleNamespace(pad=0, unk=100, cls=101, sep=102, mask=103)  # of BERT's vocabulary
MASK_PROB = 0.15
HIDDEN_PROB = 0.85  # share of the chosen tokens that become [MASK]

Step = Callable[[int], None]  # takes the number of the step


class Workload(NamedTuple):
    """What all variants compute."""

    model: ModelConfig
    batch_size: int
    length: int
    device: torch.device
    precision: Precision

    def settings(self, grad_checkpointing: bool = False) -> Pretraining:
        return Pretraining(batch_size=self.batch_size, max_length=self.length, warmup_steps=1, mask_prob=MASK_PROB,
                           grad_checkpointing=grad_checkpointing, model=self.model)

    def uses_kernels(self) -> bool:
        """Whether Pretraining.py calls use_bf16_cpu_kernels here."""
        return self.device.type == "cpu" and self.precision.dtype == torch.bfloat16

    def batch(self) -> Batch:
        """Rows of random word pieces in two segments, without padding."""
        rng = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, 30000, (self.batch_size, self.length), generator=rng)
        middle = self.length // 2
        ids[:, 0], ids[:, middle], ids[:, -1] = SPECIAL_IDS.cls, SPECIAL_IDS.sep, SPECIAL_IDS.sep
        segments = (torch.arange(self.length) > middle).long().expand_as(ids).contiguous()
        return Batch(ids, segments, torch.ones_like(ids, dtype=torch.bool))


# This project's step


def project_step(workload: Workload, grad_checkpointing: bool = False, kernels: str = "all") -> Step:
    """The step of Pretraining.py. `kernels`: all, none, or only those in the layers."""
    run = new_run(workload, SPECIAL_IDS, grad_checkpointing, kernels)
    rng, batch = torch.Generator(workload.device), workload.batch()

    def step(number: int) -> None:
        training_step(run, batch, number, rng)
    return step


def new_run(workload: Workload, vocabulary: Vocabulary | SimpleNamespace, grad_checkpointing: bool = False,
            kernels: str = "all") -> Run:
    """What Pretraining.py builds before its first step; it has neither data nor an output folder."""
    settings = workload.settings(grad_checkpointing)
    electra = Electra(workload.model).to(workload.device).train()
    for encoder in (electra.generator.encoder, electra.discriminator.encoder):
        encoder.grad_checkpointing = grad_checkpointing
    if workload.uses_kernels() and kernels != "none":
        use_bf16_cpu_kernels(electra)
    if kernels == "layers":
        electra.cross_entropy, electra.sample = cross_entropy, gumbel_sample
    optimizer = Adam(decay_groups(electra, settings.weight_decay), settings.learning_rate)
    return Run(settings, workload.model, output=Path(), device=workload.device, precision=workload.precision,
               vocabulary=vocabulary, data=None, electra=electra, parallel=electra, optimizer=optimizer,
               scaler=workload.precision.scaler())


# The step with the networks of transformers


class TransformersPair(nn.Module):
    """transformers' generator and discriminator with shared embeddings, and two ways to wire them."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining  # slow to import
        generator_config = config_to_transformers(model, model.generator())
        self.generator = ElectraForMaskedLM(ElectraConfig(**generator_config))
        discriminator_config = config_to_transformers(model, model.discriminator())
        self.discriminator = ElectraForPreTraining(ElectraConfig(**discriminator_config))
        self.discriminator.electra.embeddings = self.generator.electra.embeddings
        self.gumbel = torch.distributions.Gumbel(0.0, 1.0)

    def public(self, batch: Batch, attention_mask: Tensor, chosen: Tensor, masked_ids: Tensor) -> Tensor:
        """The loss as public re-implementations compute it."""
        output = self.generator(input_ids=masked_ids, attention_mask=attention_mask, token_type_ids=batch.segments)
        logits = output.logits[chosen].float()
        mlm_loss = F.cross_entropy(logits, batch.ids[chosen])
        with torch.no_grad():
            sampled_ids = (logits + self.gumbel.sample(logits.shape).to(logits.device)).argmax(-1)
        return mlm_loss + self.detection_loss(batch, attention_mask, chosen, sampled_ids)

    def careful(self, batch: Batch, attention_mask: Tensor, chosen: Tensor, masked_ids: Tensor) -> Tensor:
        """The same loss from logits at the chosen positions only."""
        generator = self.generator
        output = generator.electra(input_ids=masked_ids, attention_mask=attention_mask, token_type_ids=batch.segments)
        vectors = generator.generator_predictions(output.last_hidden_state[chosen])
        logits = generator.generator_lm_head(vectors).float()
        mlm_loss = F.cross_entropy(logits, batch.ids[chosen])
        with torch.no_grad():
            sampled_ids = (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)
        return mlm_loss + self.detection_loss(batch, attention_mask, chosen, sampled_ids)

    def detection_loss(self, batch: Batch, attention_mask: Tensor, chosen: Tensor, sampled_ids: Tensor) -> Tensor:
        corrupted_ids = batch.ids.clone()
        corrupted_ids[chosen] = sampled_ids
        output = self.discriminator(input_ids=corrupted_ids, attention_mask=attention_mask,
                                    token_type_ids=batch.segments)
        replaced = (corrupted_ids != batch.ids).float()
        return 50 * F.binary_cross_entropy_with_logits(output.logits.float(), replaced)


def transformers_step(workload: Workload, wiring: str) -> Step:
    """A training step with transformers' networks; `wiring` names a method of TransformersPair."""
    settings, device = workload.settings(), workload.device
    pair = TransformersPair(workload.model).to(device).train()
    loss_of = getattr(pair, wiring)
    fused = True if wiring == "careful" else None  # None: PyTorch's default
    groups = decay_groups(pair, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, settings.learning_rate, eps=1e-6, fused=fused)
    scaler, host_batch = workload.precision.scaler(), workload.batch()

    def step(number: int) -> None:
        batch = host_batch.to(device)
        special = (batch.ids == SPECIAL_IDS.cls) | (batch.ids == SPECIAL_IDS.sep)
        chosen = (torch.rand(batch.ids.shape, device=device) < MASK_PROB) & ~special
        hidden = chosen & (torch.rand(batch.ids.shape, device=device) < HIDDEN_PROB)
        masked_ids = batch.ids.masked_fill(hidden, SPECIAL_IDS.mask)
        with workload.precision.autocast():
            loss = loss_of(batch, batch.attention_mask.long(), chosen, masked_ids)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(pair.parameters(), settings.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return step


# The matrix products alone


def matrix_products(workload: Workload) -> Step:
    """Every matrix multiplication of `project`, and those of the gradients of both factors."""
    shapes = product_shapes(workload)
    factors = {}
    for shape in set(shapes):
        count, M, K, N = shape
        sizes = ((count, M, K), (count, K, N), (count, M, N))
        factors[shape] = [torch.randn(size, device=workload.device, dtype=workload.precision.dtype) for size in sizes]

    def multiply(a: Tensor, b: Tensor) -> None:
        if len(a) > 1:
            torch.bmm(a, b)
        else:
            torch.mm(a[0], b[0])

    def step(number: int) -> None:
        for shape in shapes:
            a, b, gradient = factors[shape]
            multiply(a, b)
            multiply(gradient, b.mT)
            multiply(a.mT, gradient)
    return step


def product_shapes(workload: Workload) -> list[tuple[int, int, int, int]]:
    """(count, M, K, N) of the forward pass: `count` products of (M, K) and (K, N) matrices."""
    model, L = workload.model, workload.length
    tokens = workload.batch_size * L
    shapes = []
    for hidden, heads, inner in (model.generator(), model.discriminator()):
        if hidden != model.embedding_size:
            shapes.append((1, tokens, model.embedding_size, hidden))
        head_count, head_size = workload.batch_size * heads, hidden // heads
        for _ in range(model.layers):
            shapes += [(1, tokens, hidden, 3 * hidden), (1, tokens, hidden, hidden),  # query, key, value; output
                       (head_count, L, head_size, L), (head_count, L, L, head_size),  # scores; attended values
                       (1, tokens, hidden, inner), (1, tokens, inner, hidden)]  # feed-forward
    # The heads of discriminator and generator.
    predictions = workload.batch_size * round(MASK_PROB * L)
    shapes += [(1, tokens, model.hidden_size, model.hidden_size),
               (1, predictions, model.generator().hidden, model.embedding_size),
               (1, predictions, model.embedding_size, model.vocab_size)]
    return shapes


# Time


def seconds(step: Step, number: int, device: torch.device) -> float:
    began = time.perf_counter()
    step(number)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
