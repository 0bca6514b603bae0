"""GLUE's tasks: official files, or the same rows from the Hugging Face hub, in; rows of texts and labels out."""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from utils import InputError, require

GLUE_URL = "https://gluebenchmark.com/tasks"
HUB_NAME = "nyu-mll/glue"
PAIR = ("sentence1", "sentence2")
BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
MNLI_LABELS = ("contradiction", "entailment", "neutral")
COLA_COLUMNS = ["source", "label", "star", "sentence"]  # of CoLA's files without a header
Line = tuple[int, list[str]]  # a line's number and its fields
ALIASES = {"diagnostic": "ax", "sts": "stsb", "sst": "sst2"}  # other names of tasks and folders in use


@dataclass(frozen=True)
class Task:
    """A task of classification or regression; its columns, labels and files are those of GLUE's official files."""

    name: str  # of its folder and, unless `tests` says otherwise, of its submission file
    texts: tuple[str, ...]  # columns of the one or two texts
    label: str  # column of the label
    labels: tuple[str, ...]  # classes in the order of the model's outputs; empty for regression
    metrics: tuple[str, ...]  # names in tasks.metrics.METRICS; tables show the first
    epochs: int = 3  # those of the original (google-research/electra, finetune/configure_finetuning.py)
    robust_epochs: int = 3  # 20 for small sets (Zhang et al., arXiv 2006.05987; Mosbach et al., arXiv 2006.04884)
    both_orders: bool = False  # train on both orders of a pair (the original's double_unordered)
    highest: float = 0.0  # label of a regression task; the lowest is 0
    dev: dict[str, str] = field(default_factory=lambda: {"": "dev.tsv"})  # dev files by the prefix of their scores
    tests: dict[str, str] = field(default_factory=dict)  # test files by submission file; empty: test.tsv by `name`
    headless: tuple[str, ...] = ()  # files without a header; their columns are CoLA's
    trained_on: str = ""  # key of the task whose model predicts this one, which has no training data

    @property
    def outputs(self) -> int:
        """Number of the model's outputs."""
        return len(self.labels) or 1

    def test_files(self) -> dict[str, str]:
        """Test files by submission file."""
        return self.tests or {self.name: "test.tsv"}

    def label_texts(self, labels: Iterable[float]) -> list[str]:
        """Labels, which are numbers of classes or real, as the task's files have them."""
        return [self.labels[int(label)] if self.labels else repr(float(label)) for label in labels]


TASKS = {
    "cola": Task("CoLA", ("sentence",), "label", BINARY, ("matthews", "accuracy"), robust_epochs=20,
                 headless=("train.tsv", "dev.tsv")),
    "sst2": Task("SST-2", ("sentence",), "label", BINARY, ("accuracy",)),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", BINARY, ("accuracy", "f1"), robust_epochs=20,
                 both_orders=True),
    "stsb": Task("STS-B", PAIR, "score", (), ("spearman", "pearson"), epochs=10, robust_epochs=20, both_orders=True,
                 highest=5.0),
    "qqp": Task("QQP", ("question1", "question2"), "is_duplicate", BINARY, ("accuracy", "f1")),
    "mnli": Task("MNLI", PAIR, "gold_label", MNLI_LABELS, ("accuracy",),
                 dev={"matched": "dev_matched.tsv", "mismatched": "dev_mismatched.tsv"},
                 tests={"MNLI-m": "test_matched.tsv", "MNLI-mm": "test_mismatched.tsv"}),
    "qnli": Task("QNLI", ("question", "sentence"), "label", ENTAILMENT, ("accuracy",)),
    "rte": Task("RTE", PAIR, "label", ENTAILMENT, ("accuracy",), epochs=10, robust_epochs=20),
    "wnli": Task("WNLI", PAIR, "label", BINARY, ("accuracy",), robust_epochs=20),
    "ax": Task("AX", PAIR, "", MNLI_LABELS, (), dev={}, tests={"AX": "diagnostic.tsv"}, trained_on="mnli"),
}


def task_key(name: str) -> str:
    """The key in TASKS of a task's name in any case, with or without dashes; "" if there is no such task."""
    plain = re.sub(r"[-_ ]", "", name.lower())
    plain = ALIASES.get(plain, plain)
    return plain if plain in TASKS else ""


# Rows


class Row(NamedTuple):
    """One example of a task."""

    index: str  # its name in submission files
    texts: tuple[str, ...]
    label: float  # number of the class, or the real label; NaN where there is none


class TaskData(NamedTuple):
    """The rows of one task."""

    key: str
    task: Task
    train: list[Row]
    skipped: int  # number of malformed training rows left out
    dev: dict[str, list[Row]]  # by the prefix of their scores' names
    tests: dict[str, list[Row]]  # by submission file


class TaskFiles:
    """The files of one task: in its folder of `data_dir`, or their counterparts on the hub if there is none."""

    def __init__(self, key: str, data_dir: Path):
        self.key, self.task = key, TASKS[key]
        paths = sorted(data_dir.iterdir()) if data_dir.is_dir() else []
        folders = [path for path in paths if path.is_dir() and task_key(path.name) == key]
        self.on_hub = not folders
        self.folder = folders[0] if folders else data_dir / self.task.name

    def has(self, file: str) -> bool:
        """Whether the folder has the file."""
        return (self.folder / file).is_file()

    def read(self, file: str, split: str) -> tuple[list[Row], int]:
        """What parse_rows makes of the official `file`; its `split` is train, dev or test."""
        if self.on_hub:
            hub_split = Path(file).stem.replace("dev", "validation").replace("diagnostic", "test")
            lines = hub_lines(self.hub_splits[hub_split], self.task)
            return parse_rows(lines, f"{HUB_NAME} {hub_split}", self.task, split)
        path = self.folder / file
        header = COLA_COLUMNS if file in self.task.headless else None
        return parse_rows(tsv_lines(path, header), str(path), self.task, split)

    @cached_property
    def hub_splits(self) -> dict[str, Any]:
        """All splits by the hub's names, downloaded or from the cache of `datasets`; InputError without either."""
        import datasets  # both are imported where they are used: they take two seconds
        from convert.hub import reach_hub
        try:
            reach_hub()
        except Exception:  # no network, no such host, offline mode: each its own type
            datasets.config.HF_HUB_OFFLINE = True  # load_dataset then uses its cache without half a minute of retries
        try:
            return datasets.load_dataset(HUB_NAME, self.key)
        except Exception as error:
            train = [] if self.task.trained_on else ["train.tsv"]
            files = ", ".join([*train, *self.task.dev.values(), *self.task.test_files().values()])
            raise InputError(f"there is no folder {self.folder}, and the Hugging Face hub gave no {self.key} "
                             f"({type(error).__name__}): download {files} from {GLUE_URL} into {self.folder}, or set "
                             "--data-dir") from None


def read_task(key: str, data_dir: Path, training: bool, predicting: bool) -> TaskData:
    """The rows for training a task's model, or for applying one: then only the dev files that are in `data_dir`.

    Test rows are read if `predicting`, and always those of a task without training data. Raises InputError for a file
    that is missing or isn't the task's.
    """
    model_key = TASKS[key].trained_on or key
    task, files = TASKS[model_key], TaskFiles(model_key, data_dir)
    train, skipped = files.read("train.tsv", "train") if training else ([], 0)
    dev = {split: files.read(file, "dev")[0] for split, file in task.dev.items() if training or files.has(file)}
    tests = read_tests(key, data_dir) if predicting or key != model_key else {}
    return TaskData(model_key, task, train, skipped, dev, tests)


def read_tests(key: str, data_dir: Path) -> dict[str, list[Row]]:
    """Test rows by submission file: the task's, and those in `data_dir` of tasks that its model predicts too."""
    tests = {}
    for other in [key, *(other for other, task in TASKS.items() if task.trained_on == key)]:
        files = TaskFiles(other, data_dir)
        for submission, file in TASKS[other].test_files().items():
            if other == key or files.has(file):
                tests[submission], _ = files.read(file, "test")
    return tests


def read_all_tasks(data_dir: Path, predicting: bool) -> list[TaskData]:
    """Every task whose training and dev files are in `data_dir`, for training; prints what the others lack."""
    tasks = []
    for key, task in TASKS.items():
        if task.trained_on:
            continue
        files = TaskFiles(key, data_dir)
        missing = [file for file in ("train.tsv", *task.dev.values()) if not files.has(file)]
        if missing:
            print(f"{task.name} left out: no {', '.join(missing)} in {files.folder}")
        else:
            tasks.append(read_task(key, data_dir, training=True, predicting=predicting))
    require(bool(tasks), f"no task's train.tsv and dev.tsv in {data_dir}: get them from {GLUE_URL} or set --data-dir")
    return tasks


def parse_rows(lines: Iterator[Line], source: str, task: Task, split: str) -> tuple[list[Row], int]:
    """Rows of lines, of which the first is the header, and how many were left out.

    A row is malformed if it has another number of fields than the header or an empty text. Such a row is left out of
    the training rows, refused among the dev rows, which all count, and kept among the test rows, which all need an
    answer. Raises InputError with the line's number for a malformed dev row, a wrong header or label, and if there are
    no rows.
    """
    number, columns = next(lines, (1, []))
    for name in task.texts if split == "test" else (*task.texts, task.label):
        count = columns.count(name)
        require(count == 1, f"{source}, line {number}: the header {', '.join(columns)[:200]} has {count} columns "
                f"{name!r}, expected one, as in the official files ({GLUE_URL})")
    rows, skipped = [], 0
    for number, fields in lines:
        place = f"{source}, line {number}"
        values = dict(zip(columns, fields, strict=False))
        texts = tuple(values.get(name, "") for name in task.texts)
        malformed = len(fields) != len(columns) or not all(text.strip() for text in texts)
        if malformed and split == "train":
            skipped += 1
            continue
        require(not malformed or split == "test", f"{place}: {len(fields)} fields, expected {len(columns)}, or an "
                "empty text. Every dev row counts: repair the line")
        index = values.get("index", values.get("id", ""))
        label = math.nan if split == "test" else read_label(values[task.label], task, place)
        rows.append(Row(index if index.isdecimal() else str(len(rows)), texts, label))
    require(bool(rows), f"{source} has no rows of {task.name}: expected the official file ({GLUE_URL})")
    return rows, skipped


def read_user_rows(file: str, task: Task) -> list[Row]:
    """A user's texts, one a line or a pair separated by a tab; the index of each is the number of its line."""
    rows = []
    for number, texts in tsv_lines(Path(file)):
        require(len(texts) == len(task.texts),
                f"{file}, line {number}: {len(texts)} texts separated by tabs, {task.name} has {len(task.texts)}")
        rows.append(Row(str(number), tuple(texts), math.nan))
    require(bool(rows), f"no text in {file}: expected one a line, or a pair separated by a tab")
    return rows


def read_label(text: str, task: Task, place: str) -> float:
    """The number of the class, or the real label; InputError naming the `place` if it is not one of the task's."""
    if text in task.labels:
        return float(task.labels.index(text))
    with contextlib.suppress(ValueError):
        if not task.labels and 0 <= float(text) <= task.highest:
            return float(text)
    expected = ", ".join(task.labels) or f"a number from 0 to {task.highest:g}"
    raise InputError(f"{place}: the label {text!r} is not one of {task.name}'s, expected {expected}")


# Lines


def tsv_lines(path: Path, header: list[str] | None = None) -> Iterator[Line]:
    """The lines that aren't empty, after the `header` of a file without one.

    Fields end at tabs and nowhere else: quotes are part of a text. Raises InputError for a file that can't be read as
    UTF-8.
    """
    if header:
        yield 0, header
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:  # a lone \r is part of its field
            for number, line in enumerate(file, 1):
                line = line.rstrip("\r\n")
                if line:
                    yield number, line.split("\t")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read: {error}") from None


def hub_lines(rows: Any, task: Task) -> Iterator[Line]:
    """The lines that the official file has for a split on the hub (a datasets.Dataset)."""
    yield 0, ["index", *task.texts, task.label]
    text_columns = [name for name in rows.column_names if name not in ("label", "idx")]  # in the official order
    has_names = task.labels not in ((), BINARY)  # the labels of the other tasks are numbers
    for number, row in enumerate(rows):
        texts = [re.sub(r"[\t\r\n]+", " ", row[name]) for name in text_columns]
        label = row["label"]  # -1 in test rows
        if has_names and label >= 0:
            label = rows.features["label"].int2str(label)
        yield number, [str(number), *texts, str(label)]
