"""A task and its files in; rows of texts and labels, checked and counted, out."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tasks.files import INDEX_COLUMNS, Record, hub_records, lists_of, read_records, text_of
from tasks.task import Task, with_classes
from utils import InputError, require

HELDOUT_DIVISOR = 10  # one training row in ten is held out where there is no dev file
MOST_CLASSES = 20  # more labels than that, and half as many as there are rows, are no classes
LISTED_CLASSES = 30  # printed with their counts


class Row(NamedTuple):
    """One example of a task."""

    index: str  # its name in files of predictions
    texts: tuple[str, ...]  # one or two, or the words of a sentence
    label: Any  # number of the class, or the real label; NaN where there is none; of a sentence a tuple of them
    line: int = 0  # of its file


class TaskData(NamedTuple):
    """The rows of one task."""

    key: str
    task: Task
    train: list[Row]
    skipped: int  # number of malformed training rows left out
    dev: dict[str, list[Row]]  # by the prefix of their scores' names
    test: list[Row]
    unlabelled: dict[str, list[Row]]  # by the name of the file with their predictions
    notes: list[str]  # what the user should know of the rows
    held_out: bool  # whether the dev rows were taken from the training file


class TaskFiles:
    """The files of a task in a folder, or its splits on the Hugging Face hub."""

    def __init__(self, task: Task, folder: Path):
        self.task, self.folder = task, folder
        self.hub_name = [name for name in (task.dataset, task.subset) if name]
        self.on_hub = bool(self.hub_name)

    def has(self, file: str) -> bool:
        """Whether the folder has the file."""
        return (self.folder / file).is_file()

    def place(self, file: str) -> str:
        """The name of a file in messages."""
        return f"{self.hub_name[0]} {file}" if self.on_hub else str(self.folder / file)

    def records(self, file: str, columns: list[str]) -> Iterator[Record]:
        """The records of a file or split with these `columns`."""
        if not self.on_hub:
            return read_records(self.folder / file, self.task, columns)
        require(file in self.hub_splits, f"{self.hub_name[0]} has no split {file}: it has {', '.join(self.hub_splits)}")
        return hub_records(self.hub_splits[file], self.place(file), columns, self.task.classes)

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
            return datasets.load_dataset(*self.hub_name)
        except Exception as error:
            raise InputError(f"{self.missing} ({type(error).__name__})") from None

    @property
    def missing(self) -> str:
        """What to do without the hub."""
        return f"the Hugging Face hub gave no data set {' '.join(self.hub_name)}: name files instead"


def read_data(key: str, task: Task, files: TaskFiles, training: bool, predicting: bool) -> TaskData:
    """The rows for training a task's model, or for applying one: then only the dev and test files that are there.

    Unlabelled rows are read if `predicting`. Raises InputError for a file that is missing or isn't the task's.
    """
    train, skipped, held_out = [], 0, False
    if training:
        entries, skipped = read_entries(files, task, task.train, "train")
        source = files.place(task.train)
        if not (task.classes or task.range):
            task = with_classes(task, classes_of(entries, source), source)
        train = number_labels(entries, task, source)
    dev_files = {name: file for name, file in task.dev_files().items() if training or files.has(file)}
    dev = {name: read_labelled(files, task, file, "dev") for name, file in dev_files.items()}
    has_test = task.test and (training or files.has(task.test))
    test = read_labelled(files, task, task.test, "test") if has_test else []
    if training and not dev:
        held_out = True
        train, dev[""] = hold_out(train, task, files.place(task.train))
    unlabelled_files = task.unlabelled_files() if predicting else {}
    unlabelled = {name: read_unlabelled(files, task, file) for name, file in unlabelled_files.items()}
    notes = list(notes_on(train, skipped, dev, task, files)) if training else []
    return TaskData(key, task, train, skipped, dev, test, unlabelled, notes, held_out)


# Rows


def read_labelled(files: TaskFiles, task: Task, file: str, split: str) -> list[Row]:
    """The rows of a labelled file, in which every row counts."""
    entries, _ = read_entries(files, task, file, split)
    return number_labels(entries, task, files.place(file))


def read_entries(files: TaskFiles, task: Task, file: str, split: str) -> tuple[list[Row], int]:
    """Rows whose labels are texts still, and how many were left out.

    A row is malformed if it has another number of fields than the header, or an empty text or label. It is left out of
    the training rows, and refused among the others, which all count. Raises InputError, with the line, for such a row and
    if there are no rows.
    """
    rows, skipped, source = [], 0, files.place(file)
    for record in files.records(file, [*task.texts, task.label]):
        row, problem = labelled_row(record, task, len(rows))
        if problem and split == "train":
            skipped += 1
            continue
        require(not problem, f"{source}, line {record.line}: {problem}. Every {split} row counts: repair the row, or delete "
                "it to have the scores of the other rows")
        rows.append(row)
    require(bool(rows), f"{source} has no rows of {task.name}: expected the columns {', '.join([*task.texts, task.label])}")
    return rows, skipped


def labelled_row(record: Record, task: Task, number: int) -> tuple[Row, str]:
    """A row whose label is text, and what is wrong with it."""
    label = record.values.get(task.label)
    if task.kind == "tokens":
        words, labels = record.values.get(task.texts[0]), label
        if record.problem or not (isinstance(words, list) and isinstance(labels, list)):
            return Row("", (), ()), record.problem or "expected lists of words and labels"
        row = Row(index_of(record) or str(number), tuple(lists_of(words)), tuple(lists_of(labels)), record.line)
        is_whole = words and len(words) == len(labels) and all(row.texts) and all(row.label)
        return row, "" if is_whole else f"{len(words)} words and {len(labels)} labels, or an empty one"
    texts = tuple(text_of(record.values.get(name)) for name in task.texts)
    row = Row(index_of(record) or str(number), texts, text_of(label).strip(), record.line)
    if record.problem:
        return row, record.problem
    empty = [name for name, text in zip((*task.texts, task.label), (*texts, row.label), strict=True) if not text.strip()]
    return row, f"an empty {' and '.join(empty)}" if empty else ""


def index_of(record: Record) -> str:
    """The index of a row in its file, empty if it has none."""
    indexes = [text_of(record.values.get(name)) for name in INDEX_COLUMNS]
    return next(filter(str.isdecimal, indexes), "")


def read_unlabelled(files: TaskFiles, task: Task, file: str) -> list[Row]:
    """The rows of a file without labels, which all need an answer: texts may be empty, indexes may not come twice."""
    rows, lines_by_index, source = [], {}, files.place(file)
    for record in files.records(file, list(task.texts)):
        row = unlabelled_row(record, task, len(rows))
        place = f"{source}, line {record.line}"
        require(not record.problem or index_of(record) != "",
                f"{place}: {record.problem}. Every row needs an answer: repair the row")
        require(row.index not in lines_by_index,
                f"{place}: the index {row.index} is that of line {lines_by_index.get(row.index)} too: repair one of them")
        lines_by_index[row.index] = record.line
        rows.append(row)
    require(bool(rows), f"{source} has no rows of {task.name}: expected the columns {', '.join(task.texts)}")
    return rows


def unlabelled_row(record: Record, task: Task, number: int) -> Row:
    """A row to predict. Its name in files of predictions is its index if it has one, else its `number`."""
    values = [record.values.get(name) for name in task.texts]
    index = index_of(record) or str(number)
    if task.kind == "texts":
        return Row(index, tuple(map(text_of, values)), math.nan, record.line)
    words = lists_of(values[0]) if isinstance(values[0], list) else text_of(values[0]).split()
    return Row(index, tuple(words), (math.nan,) * len(words), record.line)


# Labels


def classes_of(entries: list[Row], source: str) -> set[str]:
    """The labels of training rows; InputError if they look like real numbers or like texts."""
    labels = Counter(label for row in entries for label in labels_of(row))
    total = sum(labels.values())
    require(len(labels) <= max(MOST_CLASSES, total // 2),
            f"{source}: {len(labels):,} different labels in {total:,} rows are no classes: for regression write range = "
            "[lowest, highest], else name another label column")
    return set(labels)


def labels_of(row: Row) -> tuple[Any, ...]:
    """The labels of a row: one, or one for each word."""
    return row.label if isinstance(row.label, tuple) else (row.label,)


def true_labels(rows: Sequence[Row]) -> np.ndarray:
    """The labels of all rows, or of all their words, one after the other."""
    return np.array([label for row in rows for label in labels_of(row)])


def by_sentence(rows: Sequence[Row], values: Sequence[Any]) -> list[list[Any]]:
    """The `values` of all words, a list for each sentence."""
    ends = np.cumsum([len(row.texts) for row in rows])
    return [list(values[end - len(row.texts):end]) for row, end in zip(rows, ends, strict=True)]


def number_labels(entries: list[Row], task: Task, source: str) -> list[Row]:
    """Rows with labels as numbers; InputError, with the line, for a label that is not one of the task's."""
    numbers = {name: number for number, name in enumerate(task.classes)}

    def number_of(label: str, line: int) -> float:
        if label in numbers:
            return numbers[label]
        value = number_or_nan(label)
        if task.range and task.range[0] <= value <= task.range[1]:
            return value
        expected = "a number from {:g} to {:g}".format(*task.range) if task.range else listed(task.classes)
        raise InputError(f"{source}, line {line}: the label {label!r} is not one of {task.name}'s, expected {expected}. "
                         "Repair the row, or the classes or range of the task")

    rows = []
    for row in entries:
        labels = tuple(number_of(label, row.line) for label in labels_of(row))
        rows.append(row._replace(label=labels if task.kind == "tokens" else labels[0]))
    return rows


def number_or_nan(text: str) -> float:
    """The number that a text holds, NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def listed(names: Iterable[str]) -> str:
    """Names in a row, of which the first LISTED_CLASSES are enough."""
    names = list(names)
    more = f" and {len(names) - LISTED_CLASSES} more" if len(names) > LISTED_CLASSES else ""
    return ", ".join(names[:LISTED_CLASSES]) + more


# Held-out rows and what there is to say about the rows


def hold_out(rows: list[Row], task: Task, source: str) -> tuple[list[Row], list[Row]]:
    """Training rows without a tenth of them, drawn once for all seeds, and that tenth, in which classes have their shares.

    Raises InputError for a class of one row, which can't be on both sides.
    """
    from sklearn.model_selection import train_test_split  # imported where it is used: it takes a second
    labels = None
    size = max(1, len(rows) // HELDOUT_DIVISOR)
    if task.classes and task.kind == "texts":
        labels = [row.label for row in rows]
        first_row = {}
        for row in rows:
            first_row.setdefault(row.label, row)
        for number, count in Counter(labels).items():
            line = first_row[number].line
            hint = ". If this line is the header, check its names" if line == 1 else ""
            require(count > 1, f"{source}, line {line}: the class {task.classes[number]!r} has this row only, so it can't "
                    f"be in training and held-out rows: add rows, name a dev file, or leave it out{hint}")
        size = max(size, len(set(labels)))
    require(len(rows) >= 2 * size, f"{source} has {len(rows)} rows, too few to hold out {size} of them: name a dev file")
    train, dev = train_test_split(range(len(rows)), test_size=size, random_state=0, stratify=labels)
    return [rows[number] for number in sorted(train)], [rows[number] for number in sorted(dev)]


def notes_on(train: list[Row], skipped: int, dev: dict[str, list[Row]], task: Task, files: TaskFiles) -> Iterator[str]:
    """Sizes and classes of the rows, and warnings of what makes scores mean less."""
    sizes = ", ".join(f"{len(rows):,} {name or 'dev'} rows" for name, rows in dev.items())
    unit = "labelled words of " if task.kind == "tokens" else ""
    labels = Counter(label for row in train for label in labels_of(row))
    left_out = f" ({skipped:,} malformed ones left out)" if skipped else ""
    yield f"{task.name}: {len(train):,} training rows{left_out}, {sizes}"
    if task.classes:
        total = sum(labels.values())
        counts = [(name, labels[number]) for number, name in enumerate(task.classes)]
        shares = [f"{name} {count:,} ({count / total:.1%})" for name, count in counts]
        yield f"{task.name}: {unit}{len(task.classes)} classes: {listed(shares)}"
    for number, name in enumerate(task.classes):
        if labels[number] == 0:
            used = sum(label == number for rows in dev.values() for row in rows for label in labels_of(row))
            yield f"warning: no training row has the class {name!r}, which comes {used:,} times in dev"
        elif labels[number] == 1:
            line = next(row.line for row in train if number in labels_of(row))
            hint = ". Is this line the header?" if line == 1 else ""
            yield f"warning: {files.place(task.train)}, line {line}: the class {name!r} comes here only{hint}"
    trained_texts = {row.texts for row in train}
    for name, rows in dev.items():
        repeated = [row for row in rows if row.texts in trained_texts]
        place = files.place(task.dev_files().get(name, task.train))
        if repeated:
            yield (f"warning: {len(repeated):,} of {len(rows):,} {name or 'dev'} rows have the texts of a training row, the "
                   f"first in {place}, line {repeated[0].line}")
        if task.range and len({row.label for row in rows}) < 2:
            yield f"warning: {place} has one label only: a correlation is not defined and counts as 0"

