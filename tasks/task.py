"""What a fine-tuning task is: a TOML file, a row of GLUE's table or the text in model.pt in, a checked Task out."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from utils import bounded, check_bounds, from_table, read_toml, require

# Metrics by what a task predicts; the first ones are those of a task that names none.
CLASS_METRICS = ("accuracy", "macro_f1", "f1", "matthews")
REAL_METRICS = ("pearson", "spearman")
SPAN_METRICS = ("span_f1", "span_precision", "span_recall")
SPAN_LABEL = re.compile(r"O|[BIES]-.+")  # of IOB1, IOB2, IOE and IOBES, the schemes of seqeval
UNPREDICTED = -1  # in place of a class: of a word beyond the length to which its sentence was cut


@dataclass(frozen=True)
class Task:
    """A task of classification, regression or token classification, in the terms of the TOML file that describes it.

    Names of files are relative to the folder of the TOML file.
    """

    train: str
    """File of labelled rows: .tsv, .csv, .jsonl or .parquet, or columns of words and labels; with `dataset` its split."""
    texts: tuple[str, ...]
    """Columns of the one or two texts, or the column of the words."""
    label: str
    """Column of the label."""
    name: str = ""
    """Of the results' folder. Empty: the name of the TOML file."""
    kind: Literal["texts", "tokens"] = "texts"
    """texts: a label for each row; tokens: a label for each word of a sentence."""
    dataset: str = ""
    """Name of a data set on the Hugging Face hub, of which train, dev, test and unlabelled then name splits."""
    subset: str = ""
    """Name of a configuration of the data set."""
    dev: str | dict[str, str] = ""
    """File of labelled rows to evaluate on, or several by the prefix of their scores. Empty: a tenth of the training
    rows."""
    test: str = ""
    """File of labelled rows whose scores are reported beside those of dev."""
    unlabelled: str | dict[str, str] = ""
    """File of rows that --predict labels, or several by the name of the file with the predictions."""
    classes: tuple[str | int, ...] = ()
    """Labels in the order of the model's outputs. Empty: those of the training file, unless there is a range."""
    range: tuple[float, float] | None = None
    """Lowest and highest label of a regression task."""
    metrics: tuple[str, ...] = ()
    """accuracy, macro_f1, f1, matthews; for regression pearson, spearman; for spans of tokens span_f1, span_precision,
    span_recall. Tables show the first."""
    both_orders: bool = False
    """Train on both orders of a pair (the original's double_unordered)."""
    epochs: int = bounded(3, at_least=1)
    """Of the original protocol (google-research/electra, finetune/configure_finetuning.py)."""
    robust_epochs: int = bounded(3, at_least=1)
    """Of --protocol robust; 20 for small sets (Zhang et al., arXiv 2006.05987; Mosbach et al., arXiv 2006.04884)."""
    max_length: int = bounded(128, at_least=5)
    """Most tokens of an example, unless --max-length is given."""
    header: tuple[str, ...] = ()
    """Names of the columns of a file without a header."""
    separator: str = ""
    """Between columns. Empty: a comma in .csv, a tab in .tsv, a tab or spaces between a word and its labels."""
    quotes: Literal["auto", "fields", "text"] = "auto"
    """Quotation marks surround fields, as in .csv, or are part of the text, as in .tsv."""
    trained_on: str = ""
    """Key in TASKS of the task whose model predicts this one, which has no training data."""

    @property
    def outputs(self) -> int:
        """Number of the model's outputs."""
        return len(self.classes) or 1

    @property
    def network(self) -> str:
        """What a weights file calls the network that is trained for the task."""
        return "classifier" if self.kind == "texts" else "token classifier"

    @property
    def scale(self) -> tuple[float, float]:
        """Factor and offset from the model's output, which is trained to be 0 to 1, to a real label."""
        lowest, highest = self.range or (0.0, 1.0)
        return highest - lowest, lowest

    def dev_files(self) -> dict[str, str]:
        """Dev files by the prefix of their scores."""
        return by_name(self.dev, "")

    def unlabelled_files(self) -> dict[str, str]:
        """Unlabelled files by the name of the file with their predictions."""
        return by_name(self.unlabelled, self.name)

    def label_texts(self, labels: Iterable[float]) -> list[str]:
        """Labels, which are numbers of classes or real, as the task's files have them."""
        if not self.classes:
            return [repr(float(label)) for label in labels]
        outside = "O" if "O" in self.classes else "_"  # in place of UNPREDICTED
        return [self.classes[int(label)] if label != UNPREDICTED else outside for label in labels]

    def predicted_labels(self, outputs: np.ndarray) -> np.ndarray:
        """Numbers of classes (N,) or real labels for a model's outputs (N, outputs); UNPREDICTED where they are NaN."""
        if self.classes:
            return np.where(np.isnan(outputs[:, 0]), UNPREDICTED, outputs.argmax(-1))
        factor, offset = self.scale
        return outputs[:, 0].astype(np.float64) * factor + offset

    def to_json(self) -> str:
        """The text by which model.pt remembers its task."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


def by_name(files: str | dict[str, str], name: str) -> dict[str, str]:
    """Files by their names, of which a single one has `name`."""
    if isinstance(files, str):
        return {name: files} if files else {}
    return files


def read_task_file(path: Path) -> Task:
    """The task that a TOML file describes; InputError for an unknown key, a wrong type or terms that don't fit together."""
    return checked_task({"name": path.stem} | read_toml(path, f"--task {path}"), str(path))


def task_of_json(text: str, source: str) -> Task:
    """The task of Task.to_json; InputError, naming the `source`, for any other text."""
    try:
        table = json.loads(text)
    except ValueError:
        table = None
    require(isinstance(table, dict), f"{source} names the task {text[:80]!r}: expected a model.pt that Finetuning.py wrote")
    return checked_task(table, source)


def checked_task(table: dict[str, Any], source: str) -> Task:
    """The task with all its terms; InputError, naming the `source`, if they don't fit together."""
    missing = [name for name in ("train", "texts", "label") if not table.get(name)]
    require(not missing, f"{source} lacks {', '.join(missing)}: expected a task with train (a file), texts (a list of "
            "columns) and label (a column)")
    task = from_table(Task, table, source)
    check_bounds(task)
    task = dataclasses.replace(task, classes=tuple(map(str, task.classes)))
    require(re.fullmatch(r"[^/\\\0]+", task.name) is not None and not task.name.startswith("."),
            f"{source}: the name {task.name!r} can't be that of a folder")
    require(len(task.texts) <= (1 if task.kind == "tokens" else 2),
            f"{source}: texts names {len(task.texts)} columns, expected one or two, and one where kind is tokens")
    require(len(set(task.classes)) == len(task.classes), f"{source}: classes names one twice")
    require(len(task.classes) != 1, f"{source}: there is one class, {task.classes}: expected at least two")
    require(not (task.both_orders and len(task.texts) < 2), f"{source}: both_orders is for pairs: texts names one column")
    require(bool(task.dataset) or not task.subset, f"{source}: subset = {task.subset!r} without dataset: name its data set")
    if task.range:
        require(-math.inf < task.range[0] < task.range[1] < math.inf,
                f"{source}: range = {list(task.range)}: expected the lowest label first, and finite numbers")
        require(not task.classes and task.kind == "texts", f"{source}: range is for regression, without classes or tokens")
    return with_metrics(task, source) if task.classes or task.range else task


def with_classes(task: Task, classes: Iterable[str], source: str) -> Task:
    """The task with the classes that its training file has, numbers in their order and words in the alphabet's."""
    names = sorted(set(classes))
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        names.sort(key=int)
    require(len(names) > 1, f"{source}: every label is {', '.join(names)!r}: expected at least two classes")
    return with_metrics(dataclasses.replace(task, classes=tuple(names)), source)


def with_metrics(task: Task, source: str) -> Task:
    """The task, with metrics if it names none; InputError for a metric that doesn't suit what it predicts."""
    spans = task.kind == "tokens" and all(SPAN_LABEL.fullmatch(name) for name in task.classes)
    suitable = REAL_METRICS if task.range else (*(SPAN_METRICS if spans else ()), *CLASS_METRICS)
    for name in task.metrics:
        require(name in suitable, f"{source}: the metric {name} is not one of {', '.join(suitable)}"
                + (": spans need labels like B-NP, I-NP and O" if name in SPAN_METRICS else ""))
        require(name != "f1" or len(task.classes) == 2,
                f"{source}: f1 is that of the second of two classes, there are {len(task.classes)}: use macro_f1")
    defaults = (*SPAN_METRICS, "accuracy") if spans else suitable[:2]
    return dataclasses.replace(task, metrics=task.metrics or defaults)
