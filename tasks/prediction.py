"""A classifier and rows in; its outputs, scores, and files of predictions out, also of a user's file of new rows."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dataset import Vocabulary
from model import Classifier
from tasks.data import Row, by_sentence, labels_of, unlabelled_row
from tasks.encoding import encode_rows, length_batches
from tasks.files import READERS, SEPARATORS, Record, read_records, text_lines, write_records
from tasks.results import write_answers, write_tsv
from tasks.task import Task
from utils import Precision, require


class Predictor(NamedTuple):
    """A classifier and all that its answers depend on."""

    classifier: Classifier
    task: Task
    vocabulary: Vocabulary
    precision: Precision
    max_length: int
    batch_size: int
    every: bool  # whether predictions have the probability of every class


@torch.inference_mode()
def predict(predictor: Predictor, rows: Sequence[Row]) -> np.ndarray:
    """The head's outputs (answers, outputs) for every row, or for every word of every row, in their order.

    They are NaN for the words of a sentence that were cut off. InputError if an output is not finite.
    """
    classifier, task, vocabulary, precision, max_length, batch_size, _ = predictor
    classifier.eval()
    examples = encode_rows(rows, task, vocabulary, max_length)
    ends = np.cumsum([len(labels_of(row)) for row in rows])
    outputs = np.full((ends[-1], task.outputs), np.nan, np.float32)
    device = classifier.prediction.weight.device
    for numbers, batch in length_batches(examples.segments, vocabulary, max_length, batch_size, np.random.default_rng(0)):
        with precision.autocast():
            logits = examples.answers(numbers, classifier(*batch.to(device))).float().cpu()
        require(bool(logits.isfinite().all()),
                "the model's outputs are not finite numbers: it has diverged, lower --learning-rate")
        starts = [ends[number] - len(labels_of(rows[number])) for number in numbers]
        places = [start + np.arange(len(examples.positions[number])) for start, number in zip(starts, numbers, strict=True)]
        outputs[np.concatenate(places)] = logits.numpy()
    return outputs


def evaluate(predictor: Predictor, splits: dict[str, list[Row]], folder: Path | None = None) -> dict[str, float]:
    """The task's metrics over all rows of each split; answers and errors go into files of `folder` named after the split."""
    from tasks.metrics import task_scores  # imported where it is used: scikit-learn and scipy take two seconds
    task, scores = predictor.task, {}
    for split, rows in splits.items():
        outputs = predict(predictor, rows)
        values = task_scores(task, rows, task.predicted_labels(outputs))
        scores |= {f"{split}_{name}" if split else name: value for name, value in values.items()}
        if folder:
            write_answers(folder, {"": "dev", "test": "test"}.get(split, f"dev-{split}"), task, rows, outputs)
    return scores


def write_predictions(predictor: Predictor, unlabelled: dict[str, list[Row]], folder: Path, user_file: "UserFile | None",
                      user_folder: Path) -> None:
    """Predictions of the unlabelled files into `folder`, as GLUE takes them, and of the user's rows into `user_folder`."""
    task = predictor.task
    for name, rows in unlabelled.items():
        outputs = predict(predictor, rows)
        if task.range:  # the server of GLUE refuses what is beyond it
            outputs = outputs.clip(0.0, 1.0)
        columns = prediction_columns(predictor, rows, outputs)
        if not predictor.every:
            columns = {"prediction": columns["prediction"]}
        texts = [[" ".join(map(str, value)) if isinstance(value, list) else str(value) for value in column]
                 for column in columns.values()]
        write_tsv(folder / f"{name}.tsv", ["index", *columns], [row.index for row in rows], *texts)
        tqdm.write(f"predictions: {folder / f'{name}.tsv'}")
    if user_file:
        columns = prediction_columns(predictor, user_file.rows, predict(predictor, user_file.rows))
        predicted = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        records = [record | new for record, new in zip(user_file.records, predicted, strict=True)]
        write_records(user_folder / user_file.target, records, user_file.task)
        tqdm.write(f"predictions: {user_folder / user_file.target}")


def prediction_columns(predictor: Predictor, rows: Sequence[Row], outputs: np.ndarray) -> dict[str, list[Any]]:
    """Columns of predictions and probabilities for a model's outputs, an entry a row; of tokens a list for each sentence."""
    task = predictor.task
    labels = task.predicted_labels(outputs)
    columns = {"prediction": task.label_texts(labels) if task.classes else labels.tolist()}
    if task.classes:
        # A word that was cut off has none: it is written as 0.
        probabilities = np.nan_to_num(torch.tensor(outputs).softmax(-1).double().numpy()).round(4)  # (answers, classes)
        columns["probability"] = probabilities.max(-1).tolist()
        if predictor.every:
            columns |= {f"p_{name}": probabilities[:, number].tolist() for number, name in enumerate(task.classes)}
    if task.kind == "tokens":
        return {name: by_sentence(rows, values) for name, values in columns.items()}
    return columns


# A user's file


class UserFile(NamedTuple):
    """New rows, with all columns of the file."""

    records: list[dict[str, Any]]
    rows: list[Row]
    task: Task  # as the file is read and written
    target: str  # name of the file with the predictions


def read_user_file(path: Path, task: Task) -> UserFile:
    """A table with the task's text columns; or texts, one a line or a pair separated by a tab.

    Which of both it is follows from the suffix, and of a .tsv from its header. InputError for a row that doesn't fit.
    """
    suffix = path.suffix.lower()
    if suffix != Path(task.train).suffix.lower():  # the task describes files of its own suffix
        task = dataclasses.replace(task, separator="", quotes="auto", header=())
    is_table = suffix in READERS or suffix in SEPARATORS or (task.kind == "tokens" and suffix != ".txt")
    if suffix == ".tsv" and task.kind == "texts":
        first = next((line.split("\t") for _, line in text_lines(path) if line), [])
        is_table = set(task.texts) <= set(first) or len(first) != len(task.texts)
    records = list(read_records(path, task, list(task.texts)) if is_table else line_records(path, task))
    rows = []
    for record in records:
        require(not record.problem, f"{path}, line {record.line}: {record.problem}: repair the row")
        rows.append(unlabelled_row(record, task, len(rows)))
    require(bool(rows), f"no text in {path}: expected one a line, a pair separated by a tab, or a table with the columns "
            f"{', '.join(task.texts)}")
    written = {"prediction", "probability", *(f"p_{name}" for name in task.classes)} if task.classes else {"prediction"}
    clash = sorted(written & records[0].values.keys()) if is_table else []
    require(not clash, f"{path} has a column {', '.join(clash)} already: rename it")
    line_suffix = ".conll" if task.kind == "tokens" else ".tsv"
    target = f"{path.stem}-predictions{suffix if is_table else line_suffix}"
    return UserFile([record.values for record in records], rows, task, target)


def line_records(path: Path, task: Task) -> Iterator[Record]:
    """A record for each line that isn't blank: its number and its one or two texts, or its words."""
    for number, line in text_lines(path):
        if not line.strip():
            continue
        if task.kind == "tokens":
            yield Record(number, {task.texts[0]: line.split()})
            continue
        texts = line.split("\t")
        require(len(texts) == len(task.texts),
                f"{path}, line {number}: {len(texts)} texts separated by tabs, {task.name} has {len(task.texts)}")
        # Columns come in this order; predictions are filled in later.
        answer = {"line": number, "prediction": ""} | ({"probability": ""} if task.classes else {})
        yield Record(number, answer | dict(zip(task.texts, texts, strict=True)))
