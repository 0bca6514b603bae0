"""Evaluation on held-out text: networks and a task in, metrics and a table of samples out.

Pretraining.py evaluates its own run with it, studies/compare.py the networks of several runs.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataset import Batch, Data, Masked, Store, Vocabulary, mask_tokens, maskable, stored_batch
from model import Electra
from studies.tracking import detection_metrics, sample_table
from utils import Precision, derived_seed, gather_from_processes, rank, require, world_size


class HeldoutTask(NamedTuple):
    """Held-out text, and what its masks and the sampler's random numbers follow from."""

    store: Store
    vocabulary: Vocabulary
    max_length: int  # tokens of an example
    mask_prob: float  # share of an example's tokens that are chosen; the objective says how many of them stay visible
    seed: int
    eval_examples: int  # at most; evenly spread over the store
    batch_size: int  # results don't depend on it, except for rounding


def heldout_task(data: Data, vocabulary: Vocabulary, settings: Any) -> HeldoutTask:
    """The task on which a run evaluates itself; of its settings of Pretraining.py those are read that are used here."""
    return HeldoutTask(data.heldout, vocabulary, settings.max_length, settings.mask_prob, settings.seed,
                       settings.eval_examples, batch_size=math.ceil(settings.batch_size / settings.accumulate))


class EvaluatedPart(NamedTuple):
    """What one batch contributes to an evaluation."""

    sums: dict[str, tuple[float, int]]  # by metric, with the number of tokens that it is summed over
    samples: str  # the first examples as a table; "" for other batches
    labels: np.ndarray | None  # of the tokens that could have been replaced: whether they were
    scores: np.ndarray | None  # the discriminator's logits for them


def evaluate(electra: Electra, task: HeldoutTask, precision: Precision) -> tuple[dict[str, float], str]:
    """Metrics of the networks on a task, with the same masks each time, and the first examples as a table.

    The losses are the training's. Everything else about the discriminator is measured on the tokens that could have been
    replaced: padding and special tokens would be easy negatives. Processes share the batches out and all return the same.
    The networks are in training mode afterwards. Raises InputError if a loss is not finite.
    """
    numbers = np.linspace(0, len(task.store) - 1, min(task.eval_examples, len(task.store))).astype(np.int64)
    batches = np.array_split(numbers, math.ceil(len(numbers) / task.batch_size))
    electra.eval()
    own_parts = [evaluate_batch(electra, task, precision, batch) for batch in batches[rank()::world_size()]]
    electra.train()

    parts = [part for parts in gather_from_processes(own_parts) for part in parts]
    metrics = {name: sum(part.sums[name][0] for part in parts) / max(1, sum(part.sums[name][1] for part in parts))
               for name in parts[0].sums}
    require(all(map(math.isfinite, metrics.values())),
            "the losses on held-out text are not finite: the run has diverged; train it with a lower --learning-rate")
    if parts[0].labels is not None:
        detection = detection_metrics(np.concatenate([part.labels for part in parts]),
                                      np.concatenate([part.scores for part in parts]))
        metrics |= {f"disc_{name}": value for name, value in detection._asdict().items()}
    return metrics, parts[0].samples


@torch.no_grad()
def evaluate_batch(electra: Electra, task: HeldoutTask, precision: Precision, numbers: np.ndarray) -> EvaluatedPart:
    """Evaluates the held-out examples with these numbers (B,)."""
    device = next(electra.parameters()).device
    batch = stored_batch(task.store, numbers, task.vocabulary, task.max_length, full_width=True).to(device)
    masked, draws = masks_of_examples(electra, task, batch, numbers)
    with precision.autocast():
        output = electra(batch, masked, draws)
    judged = electra.judged(batch, masked)
    counts = {"chosen": int(masked.chosen.sum()), "judged": int(judged.sum())}
    predicted = (output.generator_logits.argmax(-1) == batch.ids.gather(1, masked.positions)) & masked.chosen
    measured = electra.measure(output, batch, masked) | {"mlm_accuracy": (predicted.sum(), "chosen")}
    labels = scores = None
    if output.discriminator_logits is not None:
        replaceable = judged & maskable(batch, task.vocabulary)
        labels, scores = (tensor[replaceable].cpu().numpy() for tensor in (output.replaced, output.discriminator_logits))
    return EvaluatedPart({name: (total.item(), counts[over]) for name, (total, over) in measured.items()},
                         sample_table(task.vocabulary, batch, masked, output) if numbers[0] == 0 else "", labels, scores)


def masks_of_examples(electra: Electra, task: HeldoutTask, batch: Batch, numbers: np.ndarray) -> tuple[Masked, Tensor]:
    """The masked batch and the sampler's random numbers, for each example from a seed of its own number, `numbers` (B,).

    So an evaluation doesn't depend on how the examples are divided into batches.
    """
    rng = torch.Generator(batch.ids.device)
    rows, draws = [], []
    for row, number in enumerate(numbers):
        rng.manual_seed(derived_seed(task.seed, int(number)))
        example = Batch(*(tensor[row:row + 1] for tensor in batch))
        rows.append(mask_tokens(example, task.vocabulary, task.mask_prob, task.max_length, rng, electra.kept_prob,
                                electra.random_prob))
        draws.append(electra.draws(rows[-1], rng))
    return Masked(*map(torch.cat, zip(*rows, strict=True))), torch.cat(draws)
