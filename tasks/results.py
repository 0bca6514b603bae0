"""What fine-tuning runs leave: results.json and results.md, predictions, errors, statistics over seeds, tables of models."""

import hashlib
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dataset import Vocabulary
from model import SavedNetwork
from tasks.data import Row, TaskData, by_sentence, true_labels
from tasks.files import word_text
from tasks.glue import TASKS
from tasks.task import Task
from utils import InputError, replacing, require, write_text

SUREST_ERRORS = 20  # wrong answers in errors.tsv
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
    scores: dict[str, float]  # of the dev rows
    test_scores: dict[str, float]  # of the labelled test rows, as test_NAME
    settings: dict[str, Any]  # all that the scores depend on, besides task and seed
    source: str
    train_rows: int
    skipped_rows: int
    dev_rows: dict[str, int]
    device: str
    seconds: float


def output_folders(sources: Sequence[str], output: str | None, name: str) -> list[Path]:
    """Results folders of networks: `output`, with a folder in it for each of several; else runs/RUN/`name`, where RUN is the
    run folder of the weights or their name on the hub; without a name the folder of the file."""
    folders = []
    for path in map(Path, sources):
        folder = path.parent if path.suffix == ".pt" else path
        run = folder.resolve().name
        if output:
            folders.append(Path(output, run) if len(sources) > 1 else Path(output))
        else:
            folders.append(Path("runs", run, name) if name else folder)
    require(len(set(folders)) == len(folders), f"two of --weights would have their results in one of the folders "
            f"{', '.join(map(str, folders))}: give the runs different names")
    return folders


def read_results(path: Path) -> dict[tuple[str, int], RunResult]:
    """The runs in results.json by task and seed; none if there is no such file."""
    if not path.exists():
        return {}
    try:
        runs = [RunResult(**{"test_scores": {}} | run) for run in json.loads(path.read_text(encoding="utf-8"))["runs"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} can't be read as results: delete it or choose another --output") from None
    return {(run.task, run.seed): run for run in runs}


def write_results(folder: Path, runs: Sequence[RunResult]) -> None:
    """Writes results.json, and the same as tables into results.md."""
    write_text(folder / "results.json", json.dumps({"runs": [run._asdict() for run in runs]}, indent=1))
    sections = ["# Fine-tuning results\n\nScores are in hundredths, of the dev rows unless they are called test."]
    for key in dict.fromkeys(run.task for run in runs):
        sections.append(f"## {key}\n\n{runs_table([run for run in runs if run.task == key])}")
    write_text(folder / "results.md", "\n\n".join(sections) + "\n")


def runs_table(runs: Sequence[RunResult]) -> str:
    """A Markdown table of one task's runs, with median, mean and standard deviation, and their settings."""
    names = list(all_scores(runs[0]))
    rows = [[f"seed {run.seed}", *(f"{100 * all_scores(run)[name]:.2f}" for name in names)] for run in runs]
    columns = [[100 * all_scores(run)[name] for run in runs] for name in names]
    for label, summary in (("median", statistics.median), ("mean", statistics.mean), ("std (n - 1)", statistics.stdev)):
        if len(runs) > 1:
            rows.append([label, *(f"{summary(column):.2f}" for column in columns)])
    run = runs[-1]
    sizes = ", ".join(f"{count:,} {name}" for name, count in {"training": run.train_rows, **run.dev_rows}.items())
    return (f"Weights: `{run.source}`; rows: {sizes}.\n\n{markdown_table(['', *names], rows)}\n\n"
            f"```json\n{json.dumps(run.settings)}\n```")


def all_scores(run: RunResult) -> dict[str, float]:
    """Scores of the dev rows and of the test rows."""
    return run.scores | run.test_scores


def require_same_settings(name: str, before: dict[str, Any], settings: dict[str, Any], folder: Path) -> None:
    """Raises InputError if the run `name` in `folder` was made with other settings than these."""
    for key, value in settings.items():
        require(before.get(key) == value, f"{folder} holds {name} with {key} = {before.get(key)}, this command has {value}: "
                "choose another --output")


def weights_key(saved: SavedNetwork, vocabulary: Vocabulary) -> str:
    """A text that changes with any weight of the encoder and any piece of the vocabulary."""
    digest = hashlib.blake2b(vocabulary.to_json().encode(), digest_size=8)
    for weight in saved.network.encoder.state_dict().values():
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def run_report(task: Task, run: RunResult) -> str:
    """A run in Markdown, for a model card."""
    content = json.dumps(run._asdict(), indent=1)
    return f"Fine-tuned on {task.name}; dev: {scores_text(run.scores)}.\n\n## The run\n\n```json\n{content}\n```"


def write_tsv(path: Path, header: list[str], *columns: list[str]) -> None:
    """Writes columns of equal length below their header; the folder is created if need be."""
    lines = ["\t".join(fields) for fields in (header, *zip(*columns, strict=True))]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")


# What a run leaves beside its scores


def write_answers(folder: Path, split: str, task: Task, rows: Sequence[Row], outputs: np.ndarray) -> None:
    """The labels and predictions of a split's rows (dev.tsv, or CoNLL's columns in dev.conll), errors and confusions."""
    predictions = task.predicted_labels(outputs)
    labels, predicted = task.label_texts(true_labels(rows)), task.label_texts(predictions)
    if task.kind == "tokens":
        columns = zip((row.texts for row in rows), by_sentence(rows, labels), by_sentence(rows, predicted), strict=True)
        sentences = [dict(zip(("word", "label", "prediction"), values, strict=True)) for values in columns]
        with replacing(folder / f"{split}.conll") as temporary:
            temporary.write_text("\n".join(map(word_text, sentences)), encoding="utf-8")
    else:
        write_tsv(folder / f"{split}.tsv", ["label", "prediction"], labels, predicted)
    suffix = split.removeprefix("dev")
    write_tsv(folder / f"errors{suffix}.tsv", *surest_errors(task, rows, outputs))
    if task.classes:
        from sklearn.metrics import confusion_matrix  # imported where it is used: it takes a second
        matrix = confusion_matrix(true_labels(rows), predictions, labels=range(len(task.classes)))
        counts = [list(map(str, column)) for column in matrix.T.tolist()]
        write_tsv(folder / f"confusion{suffix}.tsv", ["label", *(f"predicted {name}" for name in task.classes)],
                  list(task.classes), *counts)


def surest_errors(task: Task, rows: Sequence[Row], outputs: np.ndarray) -> tuple[list[str], ...]:
    """The SUREST_ERRORS wrong answers of which the model was surest, as a header and columns.

    Of a regression task those farthest from the label; of a task of tokens words, with their sentence.
    """
    labels, predictions = true_labels(rows), task.predicted_labels(outputs)
    if task.classes:
        sureness = torch.tensor(outputs).softmax(-1).amax(-1).numpy().astype(np.float64)
        wrong = (predictions != labels) & ~np.isnan(sureness)
    else:
        sureness = np.abs(predictions - labels)
        wrong = sureness > 0
    order = [number for number in np.argsort(-sureness, kind="stable") if wrong[number]][:SUREST_ERRORS]
    if task.kind == "tokens":
        places = [(row, word) for row in rows for word in row.texts]
        texts = [[places[number][1] for number in order], [" ".join(places[number][0].texts) for number in order]]
        header, chosen = ["word", "sentence"], [places[number][0] for number in order]
    else:
        chosen = [rows[number] for number in order]
        texts = [[one_field(row.texts[column]) for row in chosen] for column in range(len(task.texts))]
        header = list(task.texts)
    measures = [f"{sureness[number]:.4f}" for number in order]
    return (["line", "label", "prediction", "probability" if task.classes else "difference", *header],
            [str(row.line) for row in chosen], task.label_texts(labels[order]), task.label_texts(predictions[order]),
            measures, *texts)


def one_field(text: str) -> str:
    """A text without tabs and line breaks."""
    return " ".join(text.split())


def write_held_out(path: Path, data: TaskData) -> None:
    """The rows that were taken from the training file, by their lines there."""
    rows, task = data.dev[""], data.task
    texts = [one_field(" ".join(row.texts)) for row in rows]
    labels = [" ".join(task.label_texts(row.label if isinstance(row.label, tuple) else [row.label])) for row in rows]
    write_tsv(path, ["line", "label", "text"], [str(row.line) for row in rows], labels, texts)


# Statistics


def scores_text(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())


def statistics_text(name: str, runs: Sequence[RunResult]) -> str:
    """Median, mean, standard deviation (n - 1) and each run, in hundredths, a line for each metric."""
    lines = []
    for metric in all_scores(runs[0]):
        values = [100 * all_scores(run)[metric] for run in runs]
        std = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
        lines.append(f"{name} {metric}: median {statistics.median(values):.2f}, mean {statistics.mean(values):.2f}, "
                     f"std {std}, n {len(values)} ({', '.join(f'{value:.2f}' for value in values)})")
    return "\n".join(lines)


def models_table(models: dict[str, dict[str, list[RunResult]]]) -> str:
    """A Markdown table with a row for each model, of its runs by task: medians over the seeds and standard deviations.

    Of several tasks it has the first metric and an average, below the published scores of the same tasks; of one task all
    metrics.
    """
    first = next(iter(models.values()))
    if len(first) == 1:
        (key, runs), = first.items()
        names = list(all_scores(runs[0]))
        rows = [[model, *(spread([100 * all_scores(run)[name] for run in by_task[key]]) for name in names)]
                for model, by_task in models.items()]
        return markdown_table([f"{key}, dev", *names], rows)
    keys = [key for key in PUBLISHED_TASKS if key in first]
    rows = []
    for name, published in PUBLISHED.items():
        values = [dict(zip(PUBLISHED_TASKS, published, strict=True))[key] for key in keys]
        rows.append([name, *(f"{value:.1f}" for value in values), f"{statistics.mean(values):.1f}" if keys else "-"])
    for model, by_task in models.items():
        values = [[100 * next(iter(run.scores.values())) for run in by_task[key]] for key in keys]
        averages = [statistics.mean(column) for column in zip(*values, strict=True)]  # of each seed
        average = f"{statistics.mean(map(statistics.median, values)):.1f}{deviation(averages)}" if keys else "-"
        rows.append([model, *map(spread, values), average])
    heads = [f"{TASKS[key].name} {TASKS[key].metrics[0]}" for key in keys]
    return markdown_table(["dev", *heads, "average"], rows)


def spread(values: Sequence[float]) -> str:
    """Median and standard deviation (n - 1)."""
    return f"{statistics.median(values):.1f}{deviation(values)}"


def deviation(values: Sequence[float]) -> str:
    return f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
