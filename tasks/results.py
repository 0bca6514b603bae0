"""What fine-tuning runs leave: results.json, files of predictions, statistics over seeds and GLUE's table."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tasks.glue import TASKS, Task
from utils import InputError, require, write_text

# Dev scores of others, whose tables leave WNLI out (google-research/electra; richarddwang/electra_pytorch)
PUBLISHED_TASKS = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]
PUBLISHED = {
    "ELECTRA-Small++, median": (57.0, 91.2, 88.0, 87.5, 89.0, 81.3, 88.4, 66.7),
    "ELECTRA-Small-OWT, median": (56.8, 88.3, 87.4, 86.8, 88.3, 78.9, 87.9, 68.5),
    "richarddwang Small-OWT, mean of 10": (58.7, 88.0, 86.0, 86.2, 88.6, 80.4, 87.5, 67.5),
}


class RunResult(NamedTuple):
    """One run, as results.json holds it."""

    task: str
    seed: int
    scores: dict[str, float]
    settings: dict[str, Any]  # all that the scores depend on, besides task and seed
    source: str
    train_rows: int
    skipped_rows: int
    dev_rows: dict[str, int]
    device: str
    seconds: float


def read_results(path: Path) -> dict[tuple[str, int], RunResult]:
    """The runs in results.json by task and seed; none if there is no such file."""
    if not path.exists():
        return {}
    try:
        runs = [RunResult(**run) for run in json.loads(path.read_text(encoding="utf-8"))["runs"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} can't be read as results: delete it or choose another --output") from None
    return {(run.task, run.seed): run for run in runs}


def write_results(path: Path, runs: Iterable[RunResult]) -> None:
    write_text(path, json.dumps({"runs": [run._asdict() for run in runs]}, indent=1))


def require_same_settings(run: RunResult, settings: dict[str, Any], folder: Path) -> None:
    """Raises InputError if the `run` in `folder` was made with other settings."""
    for name, value in settings.items():
        before = run.settings.get(name)
        require(before == value, f"{folder} holds {run.task}, seed {run.seed}, with {name} = {before}, "
                f"this command has {value}: choose another --output")


def write_tsv(path: Path, header: list[str], *columns: list[str]) -> None:
    """Writes columns of equal length below their header; the folder is created if need be."""
    lines = ["\t".join(fields) for fields in (header, *zip(*columns, strict=True))]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")


# Statistics


def scores_text(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())


def median_score(runs: list[RunResult]) -> float:
    """Median of the task's first metric, in hundredths."""
    return 100 * statistics.median(next(iter(run.scores.values())) for run in runs)


def statistics_text(task: Task, runs: list[RunResult]) -> str:
    """Median, mean, standard deviation (n - 1) and each run, in hundredths, a line for each metric."""
    lines = []
    for name in runs[0].scores:
        values = [100 * run.scores[name] for run in runs]
        deviation = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
        lines.append(f"{task.name} {name}: median {statistics.median(values):.2f}, mean {statistics.mean(values):.2f}, "
                     f"std {deviation}, n {len(values)} ({', '.join(f'{value:.2f}' for value in values)})")
    return "\n".join(lines)


def glue_table(scores: dict[str, float], name: str) -> str:
    """A Markdown table of a model's scores by task, below the published ones, with averages over the same tasks."""
    columns = [key for key in PUBLISHED_TASKS if key in scores]
    rows = {row: dict(zip(PUBLISHED_TASKS, values, strict=True)) for row, values in PUBLISHED.items()}
    rows[name] = scores
    heads = [f"{TASKS[key].name} {TASKS[key].metrics[0]}" for key in columns]
    lines = ["| dev | " + " | ".join([*heads, "average"]) + " |", "|---" * (len(columns) + 2) + "|"]
    for row, row_scores in rows.items():
        values = [row_scores[key] for key in columns]
        average = [statistics.mean(values)] if values else []
        lines.append(f"| {row} | " + " | ".join(f"{value:.1f}" for value in [*values, *average]) + " |")
    return "\n".join(lines)
