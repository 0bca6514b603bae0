"""What a pretraining run looks like: its metrics.jsonl becomes curves.png, held-out examples become a table.

    python -m studies.curves runs/NAME     # draws runs/NAME/curves.png again
"""

import json
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import tyro

from utils import read_settings, replacing, reports_input_errors, require

if TYPE_CHECKING:
    from dataset import Batch, Masked, Vocabulary
    from model import ElectraOutput

SAMPLES = 4  # held-out examples in the table
# Panels of the figure and the metrics that each of them shows
PANELS = {"generator: loss": ["mlm_loss"], "discriminator: loss": ["disc_loss"], "discriminator: AUC": ["disc_auc"],
          "generator: accuracy": ["mlm_accuracy", "sampled_accuracy"],
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


def draw_curves(run: Path, published: bool) -> None:
    """Writes curves.png into a run folder, with the published points up to the step reached if `published`."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would report on its font cache
    from matplotlib.figure import Figure  # imported where it is used: it takes a second
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
    curves = read_curves(run, published)
    figure = Figure((12.0, 6.0), dpi=72)
    margins = {"left": 0.04, "right": 0.99, "bottom": 0.12, "top": 0.95, "hspace": 0.2, "wspace": 0.15}
    grid = figure.subplots(2, len(PANELS) // 2, sharex=True, gridspec_kw=margins)
    for axes, (title, names) in zip(grid.flat, PANELS.items(), strict=True):
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
    caption = f"{run}; {PUBLISHED_NOTE}" if curves["published"] else str(run)
    figure.text(0.5, 0.02, caption, ha="center", fontsize="small")
    with replacing(run / "curves.png") as temporary:
        figure.savefig(temporary, format="png", pil_kwargs={"optimize": True})


def read_curves(run: Path, published: bool) -> dict[str, list[dict[str, float]]]:
    """The records of metrics.jsonl, and the published ones, by the label of their curve."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    reached = records[-1]["step"] if published else 0
    return {"training": [record for record in records if not record["heldout"]],
            "held out": [record for record in records if record["heldout"] and record["step"] > 0],  # the axis is logarithmic
            "published": [record for record in PUBLISHED if record["step"] <= reached]}


def sample_table(vocabulary: "Vocabulary", batch: "Batch", masked: "Masked", output: "ElectraOutput") -> str:
    """The first examples of a batch as a Markdown table: their pieces before, in and after the generator, and those that
    the discriminator flags."""
    rows = {"original": (batch.ids, torch.zeros_like(batch.attention_mask)),
            "masked": (masked.ids, masked.ids != batch.ids),
            "generated": (output.corrupted_ids, output.replaced),
            "flagged": (output.corrupted_ids, output.discriminator_logits > 0)}
    lines = ["| example | in bold what is masked, replaced, or flagged as replaced |", "|---|---|"]
    for number, tokens in enumerate(batch.attention_mask[:SAMPLES]):
        for name, (ids, bold) in rows.items():
            pieces = [vocabulary.tokenizer.id_to_token(piece) for piece in ids[number, tokens].tolist()]
            words = [f"**{escape(piece)}**" if is_bold else escape(piece)
                     for piece, is_bold in zip(pieces, bold[number, tokens].tolist(), strict=True)]
            text = " ".join(words).replace(" &#35;&#35;", "")  # joins word pieces, whose ## is escaped
            lines.append(f"| {number + 1} {name} | {text} |")
    return "\n".join(lines)


def escape(piece: str) -> str:
    """Signs that Markdown could read as markup, as HTML entities."""
    return re.sub(r"[^\w\s]|_", lambda sign: f"&#{ord(sign[0])};", piece)


if __name__ == "__main__":
    sys.exit(main())
