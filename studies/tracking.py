"""What a run measures: metrics.jsonl and TensorBoard events; from them curves.png; held-out examples as a table.

    python -m studies.tracking runs/NAME     # draws runs/NAME/curves.png again
"""

import contextlib
import json
import logging
import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from utils import rank, read_settings, replacing, reports_input_errors, require, write_text

if TYPE_CHECKING:
    from dataset import Batch, Data, Masked, Vocabulary
    from model import ElectraOutput

UNKNOWN_SHARE = 0.01  # of the pieces; above it a warning says how much of the text the networks can't see
BASELINE_PIECES = 10_000_000  # of the held-out text, for the frequencies of the pieces
STALLED_EVALUATIONS = 5  # evaluations without progress that cause a warning
SAMPLES = 4  # held-out examples in the table
# Panels of the figure and the metrics that each of them shows
PANELS = {"generator: loss": ["mlm_loss", "large_mlm_loss"], "discriminator: loss": ["disc_loss"],
          "discriminator: AUC": ["disc_auc"], "generator: accuracy": ["mlm_accuracy", "sampled_accuracy"],
          "discriminator: accuracy, precision, recall": ["disc_accuracy", "disc_precision", "disc_recall"],
          "learning rate": ["learning_rate"]}
STYLES: dict[str, dict[str, Any]] = {
    "training": {"linewidth": 0.8, "alpha": 0.6}, "held out": {"marker": "o", "markersize": 3},
    "published": {"marker": "X", "markersize": 9, "markeredgecolor": "black", "linestyle": "none", "zorder": 3}}
# ELECTRA-Small on OpenWebText, read off a picture in google-research/electra issue 3: on training data, without dropout,
# the AUC with padding counted
PUBLISHED = [
    {"step": 10_000, "mlm_loss": 5.1, "disc_loss": 0.248},
    {"step": 50_000, "mlm_loss": 3.65, "disc_loss": 0.221, "disc_auc": 0.875},
    {"step": 100_000, "mlm_loss": 3.51, "disc_loss": 0.208, "disc_auc": 0.890},
    {"step": 200_000, "mlm_loss": 3.43, "disc_loss": 0.194, "disc_auc": 0.904, "mlm_accuracy": 0.433,
     "sampled_accuracy": 0.328, "disc_accuracy": 0.930, "disc_precision": 0.740},
    {"step": 1_000_000, "mlm_loss": 3.26, "disc_loss": 0.160, "disc_auc": 0.935, "mlm_accuracy": 0.454,
     "sampled_accuracy": 0.351, "disc_accuracy": 0.942, "disc_precision": 0.783}]
PUBLISHED_NOTE = "published: Small on OpenWebText, google-research/electra issue 3, read off a picture"


@dataclass(frozen=True)
class Curves:
    """Draws the curves of a pretraining run again, from its metrics.jsonl."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder."""
    published: bool = False
    """Add the published curve of ELECTRA-Small, for a run with the paper's settings."""


@reports_input_errors
def main(argv: list[str]) -> int:
    settings = read_settings(Curves, argv)
    run = Path(settings.run)
    require((run / "metrics.jsonl").is_file(), f"{run} holds no metrics.jsonl: expected the folder of a pretraining run")
    draw_curves(run, settings.published)
    print(run / "curves.png")
    return 0


class RunningMeans:
    """Means over the steps since the last line of metrics, kept on the device so that steps needn't wait for it."""

    def __init__(self, device: torch.device, state: dict[str, Any]):
        self.device = device
        self.reset(state)

    def reset(self, state: dict[str, Any]) -> None:
        """Begins with the `state` of an earlier run, or at zero."""
        self.names = state.get("names", [])
        self.sums = torch.tensor(state.get("sums", []), device=self.device)
        self.tokens = torch.tensor(state.get("tokens", 0), device=self.device)
        # Steps made, steps skipped, length of the series of skipped steps that the last one ends, and the longest series.
        self.counts = torch.tensor(state.get("counts", [0, 0, 0, 0]), device=self.device)
        self.seconds = state.get("seconds", 0.0)
        self.started = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """What a resumed run begins with."""
        return {"names": self.names, "sums": self.sums.tolist(), "tokens": self.tokens.item(),
                "counts": self.counts.tolist(), "seconds": self.seconds + time.perf_counter() - self.started}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block out of tokens_per_second."""
        self.seconds += time.perf_counter() - self.started
        yield
        self.started = time.perf_counter()

    def add(self, values: dict[str, Tensor], tokens: Tensor, finite: Tensor) -> None:
        """Adds the values () of one step of so many `tokens`; a step that is not `finite`, () bool, is only counted.

        Where other values begin (--objective two-stage), their means begin there.
        """
        if list(values) != self.names:
            self.names, self.sums = list(values), torch.zeros(len(values), device=self.device)
            self.counts[0] = 0
        self.sums += torch.where(finite, torch.stack(list(values.values())), 0.0)
        self.tokens += tokens
        made, skipped, series, longest_series = self.counts
        series = (series + 1) * ~finite
        self.counts = torch.stack([made + finite, skipped + ~finite, series, longest_series.maximum(series)])

    def close(self) -> dict[str, float]:
        """The means since the last call, without losses if every step was skipped. A series of skipped steps goes on."""
        made, skipped, series, longest_series = self.counts.tolist()
        values = {name: total / made for name, total in zip(self.names, self.sums.tolist(), strict=True) if made}
        seconds = self.seconds + time.perf_counter() - self.started
        values |= {"tokens_per_second": self.tokens.item() / seconds, "skipped_steps": skipped,
                   "longest_skipped_series": longest_series}
        self.reset({"names": self.names, "sums": [0.0] * len(self.names), "counts": [0, 0, series, 0]})
        return values


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; lines that a crash cut off are left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


class MetricsLog:
    """metrics.jsonl of a run, one JSON object a line, and the same numbers as TensorBoard events. Rank 0 writes.

    Lines of steps after `first_step` were written by a run that stopped before it saved them; they are dropped.
    """

    def __init__(self, folder: Path, first_step: int):
        self.path = folder / "metrics.jsonl"
        records = read_metrics(self.path) if first_step and self.path.exists() else []
        self.records = [record for record in records if record["step"] <= first_step]
        if rank() == 0:
            from torch.utils.tensorboard import SummaryWriter  # imported where it is used: it takes a second
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
            self.events = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else 0)

    def write(self, step: int, heldout: bool, values: dict[str, float]) -> None:
        """Adds one line, and TensorBoard's scalars under train/ or heldout/."""
        record = {"step": step, "heldout": heldout} | values
        self.records.append(record)
        if rank():
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in values.items():
            self.events.add_scalar(f"{'heldout' if heldout else 'train'}/{name}", value, step)
        self.events.flush()

    def write_markdown(self, step: int, tag: str, text: str) -> None:
        """Adds a text to TensorBoard."""
        if rank() == 0:
            self.events.add_text(tag, text, step)
            self.events.flush()


def report_skipped_steps(values: dict[str, float], step: int, most_in_a_row: int) -> None:
    """Warns of skipped steps; InputError if too many came in a row. Takes the length of that series out of `values`."""
    longest_series = values.pop("longest_skipped_series")
    if values["skipped_steps"]:
        tqdm.write(f"warning: {values['skipped_steps']} of the steps up to step {step:,} skipped, because their loss or "
                   "gradient was not finite")
    require(longest_series < most_in_a_row,
            f"{longest_series} steps in a row without a finite loss and gradient: the run has diverged. Resume with "
            "--extend and a lower --learning-rate, or choose another --output")


def describe_text(data: "Data", vocabulary: "Vocabulary", kept_prob: float) -> None:
    """Prints what there is of training and held-out text and what the networks see of it; warns if much is unknown.

    `kept_prob` is the share of the chosen tokens that stay visible.
    """
    counts = data.counts
    if counts["invalid"]:
        print(f"{counts['invalid']:,} of {counts['lines']:,} lines had bytes that are not UTF-8, read as U+FFFD")
    print(f"data: {counts['lines']:,} lines, {counts['tokens']:,} word pieces of which {counts['kept']:,} are in examples "
          f"and {counts['unknown']:,} unknown; an epoch has {len(data.train):,} training examples with "
          f"{int(data.train.ends[-1]):,} pieces in all; {len(data.heldout):,} examples are held out")
    print(f"vocabulary: {vocabulary.size:,} pieces; {vocabulary.case_note}")
    unknown = counts["unknown"] / counts["tokens"]
    if unknown > UNKNOWN_SHARE and rank() == 0:
        print(f"warning: {unknown:.1%} of the word pieces are [UNK]: the networks can't tell them apart, and scores look "
              "better than they are, since [UNK] is easy to predict. Raise --model.vocab-size if the vocabulary is learned, "
              "otherwise name one of the text's language with --vocab (a Unigram tokenizer.json where no blanks separate "
              "words)", file=sys.stderr)
    entropy, share = unigram_baseline(data.heldout.ids)
    print(f"held-out text: unigram entropy {entropy:.3f} nats; knowing frequencies alone gives an MLM loss of "
          f"{(1 - kept_prob) * entropy:.3f}; the most frequent piece has a share of {share:.3f}")


def unigram_baseline(ids: np.ndarray) -> tuple[float, float]:
    """What needs no context: the entropy in nats of the frequencies of pieces (N,), and the share of the most frequent."""
    frequencies = np.bincount(ids[:BASELINE_PIECES])
    p = frequencies[frequencies > 0] / frequencies.sum()
    return float(-(p * np.log(p)).sum()), float(p.max())


def learning_warnings(heldout: list[dict[str, float]], frequency_loss: float) -> Iterator[str]:
    """What STALLED_EVALUATIONS evaluations without progress suggest.

    `frequency_loss` is the MLM loss of a network that knows the frequencies of pieces only: their entropy, but nothing for
    the chosen tokens that stay visible.
    """
    if len(heldout) <= STALLED_EVALUATIONS:
        return
    before, recent = heldout[-STALLED_EVALUATIONS - 1], heldout[-STALLED_EVALUATIONS:]
    if all("disc_auc" in metrics and metrics["disc_auc"] < 0.5 + 2 * metrics["disc_auc_error"] for metrics in recent):
        yield (f"the discriminator has been at chance for {STALLED_EVALUATIONS} evaluations: the learning rate may be too "
               "high, disc_weight too low, or the generator may know no more than word frequencies yet")
    if min(metrics["mlm_loss"] for metrics in recent) > max(0.99 * before["mlm_loss"], 0.95 * frequency_loss):
        yield (f"the generator's loss has not moved for {STALLED_EVALUATIONS} evaluations and is near that of word "
               f"frequencies ({frequency_loss:.2f}): the learning rate may be too high or too low, or more steps are needed")


class Detection(NamedTuple):
    """How well scores separate positives from negatives; `auc_error` is the AUC's standard error."""

    accuracy: float
    precision: float
    recall: float
    auc: float
    auc_error: float


def detection_metrics(labels: np.ndarray, scores: np.ndarray) -> Detection:
    """Of bool `labels` (N,) and real `scores` (N,), predicted true where positive; AUC is NaN if there is one class only."""
    from sklearn.metrics import precision_score, recall_score, roc_auc_score  # imported where used: it takes a second
    predicted = scores > 0
    auc = float(roc_auc_score(labels, scores)) if 0 < labels.sum() < len(labels) else math.nan
    return Detection(float((predicted == labels).mean()), float(precision_score(labels, predicted, zero_division=0.0)),
                     float(recall_score(labels, predicted, zero_division=0.0)), auc, auc_error(auc, labels))


def auc_error(auc: float, labels: np.ndarray) -> float:
    """Standard error of an AUC (Hanley and McNeil, 1982, equation 2)."""
    positives, negatives = max(1, int(labels.sum())), max(1, int((~labels).sum()))
    q1, q2 = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (q1 - auc * auc) + (negatives - 1) * (q2 - auc * auc)
    return (variance / (positives * negatives)) ** 0.5


def draw_curves(folder: Path, published: bool) -> None:
    """Writes curves.png into a run folder, with the published points up to the step reached if `published`."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would report on its font cache
    from matplotlib.figure import Figure  # imported where it is used: it takes a second
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
    curves = read_curves(folder, published)
    recorded = {name for records in curves.values() for record in records for name in record}
    panels = {title: names for title, names in PANELS.items() if recorded & set(names)}  # an objective lacks some
    figure = Figure((12.0, 6.0), dpi=72)
    margins = {"left": 0.04, "right": 0.99, "bottom": 0.12, "top": 0.95, "hspace": 0.2, "wspace": 0.15}
    grid = figure.subplots(2, max(1, math.ceil(len(panels) / 2)), sharex=True, squeeze=False, gridspec_kw=margins)
    for axes, (title, names) in zip(grid.flat, panels.items(), strict=False):
        for number, name in enumerate(names):
            for label, records in curves.items():
                points = [(record["step"], record[name]) for record in records if name in record]
                if points:
                    axes.plot(*zip(*points, strict=True), label=f"{name}, {label}", color=f"C{number}", **STYLES[label])
        axes.set(title=title, xscale="log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize="small")
    for axes in grid[1]:
        axes.set_xlabel("steps")
    caption = f"{folder}; {PUBLISHED_NOTE}" if curves["published"] else str(folder)
    figure.text(0.5, 0.02, caption, ha="center", fontsize="small")
    with replacing(folder / "curves.png") as temporary:
        figure.savefig(temporary, format="png", pil_kwargs={"optimize": True})


def read_curves(folder: Path, published: bool) -> dict[str, list[dict[str, float]]]:
    """The records of metrics.jsonl, and the published ones, by the label of their curve."""
    records = read_metrics(folder / "metrics.jsonl")
    reached = records[-1]["step"] if published and records else 0
    return {"training": [record for record in records if not record["heldout"]],
            # The axis is logarithmic, so it can't show step 0.
            "held out": [record for record in records if record["heldout"] and record["step"] > 0],
            "published": [record for record in PUBLISHED if record["step"] <= reached]}


def sample_table(vocabulary: "Vocabulary", batch: "Batch", masked: "Masked", output: "ElectraOutput") -> str:
    """The first examples of a batch as a Markdown table of their pieces: original, masked, generated, and flagged by the
    discriminator."""
    rows = {"original": (batch.ids, torch.zeros_like(batch.attention_mask)),
            "masked": (masked.ids, masked.ids != batch.ids)}
    if output.replaced is not None:
        rows["generated"] = output.corrupted_ids, output.replaced
    if output.discriminator_logits is not None:
        rows["flagged"] = output.corrupted_ids, output.discriminator_logits > 0
    lines = ["| example | in bold what is masked, replaced, or flagged as replaced |", "|---|---|"]
    for number, is_token in enumerate(batch.attention_mask[:SAMPLES]):
        for name, (ids, bold) in rows.items():
            pieces = [vocabulary.tokenizer.id_to_token(piece_id) or "[no piece]"
                      for piece_id in ids[number, is_token].tolist()]
            words = [f"**{escape(piece)}**" if is_bold else escape(piece)
                     for piece, is_bold in zip(pieces, bold[number, is_token].tolist(), strict=True)]
            text = " ".join(words).replace(" &#35;&#35;", "")  # joins continuations that are not in bold
            lines.append(f"| {number + 1} {name} | {text} |")
    return "\n".join(lines)


def escape(piece: str) -> str:
    """Replaces each character that Markdown could read as markup by an HTML entity."""
    return re.sub(r"[^\w\s]|_", lambda sign: f"&#{ord(sign[0])};", piece)


if __name__ == "__main__":
    sys.exit(main())
