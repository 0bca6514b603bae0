"""GLUE's tasks in the terms of a user's own: a table of them, and their official files or the same rows from the hub."""

import dataclasses
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tasks.data import Row, TaskData, TaskFiles, listed, read_data, read_unlabelled
from tasks.files import Record, hub_records
from tasks.task import Task, read_task_file, task_of_json, with_metrics
from utils import require

GLUE_URL = "https://gluebenchmark.com/tasks"
PAIR = ("sentence1", "sentence2")
BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
MNLI_LABELS = ("contradiction", "entailment", "neutral")
ALIASES = {"diagnostic": "ax", "sts": "stsb", "sst": "sst2"}  # other names of tasks and folders in use

# Epochs are those of the original; 20 with the robust protocol for small sets.
official = partial(Task, train="train.tsv", dev="dev.tsv", unlabelled="test.tsv", quotes="text")
TASKS = {
    "cola": official(name="CoLA", texts=("sentence",), label="label", classes=BINARY, metrics=("matthews", "accuracy"),
                     robust_epochs=20, header=("source", "label", "star", "sentence")),
    "sst2": official(name="SST-2", texts=("sentence",), label="label", classes=BINARY, metrics=("accuracy",)),
    "mrpc": official(name="MRPC", texts=("#1 String", "#2 String"), label="Quality", classes=BINARY,
                     metrics=("accuracy", "f1"), robust_epochs=20, both_orders=True),
    "stsb": official(name="STS-B", texts=PAIR, label="score", range=(0.0, 5.0), metrics=("spearman", "pearson"), epochs=10,
                     robust_epochs=20, both_orders=True),
    "qqp": official(name="QQP", texts=("question1", "question2"), label="is_duplicate", classes=BINARY,
                    metrics=("accuracy", "f1")),
    "mnli": official(name="MNLI", texts=PAIR, label="gold_label", classes=MNLI_LABELS, metrics=("accuracy",),
                     dev={"matched": "dev_matched.tsv", "mismatched": "dev_mismatched.tsv"},
                     unlabelled={"MNLI-m": "test_matched.tsv", "MNLI-mm": "test_mismatched.tsv"}),
    "qnli": official(name="QNLI", texts=("question", "sentence"), label="label", classes=ENTAILMENT, metrics=("accuracy",)),
    "rte": official(name="RTE", texts=PAIR, label="label", classes=ENTAILMENT, metrics=("accuracy",), epochs=10,
                    robust_epochs=20),
    "wnli": official(name="WNLI", texts=PAIR, label="label", classes=BINARY, metrics=("accuracy",), robust_epochs=20),
    "ax": official(name="AX", texts=PAIR, label="", classes=MNLI_LABELS, train="", dev="", unlabelled="diagnostic.tsv",
                   trained_on="mnli"),
}
TRAINED = {key: task for key, task in TASKS.items() if not task.trained_on}


def task_key(name: str) -> str:
    """The key in TASKS of a task's name in any case, with or without dashes; "" if there is no such task."""
    plain = re.sub(r"[-_ ]", "", name.lower())
    plain = ALIASES.get(plain, plain)
    return plain if plain in TASKS else ""


class GlueFiles(TaskFiles):
    """The files of one task: in its folder of `data_dir`, or their counterparts on the hub if there is none."""

    def __init__(self, key: str, data_dir: Path):
        paths = sorted(data_dir.iterdir()) if data_dir.is_dir() else []
        folders = [path for path in paths if path.is_dir() and task_key(path.name) == key]
        super().__init__(TASKS[key], folders[0] if folders else data_dir / TASKS[key].name)
        self.on_hub = not folders
        self.hub_name = ["nyu-mll/glue", key]

    def records(self, file: str, columns: list[str]) -> Iterator[Record]:
        """The records of an official file, or those that it has for a split on the hub."""
        if not self.on_hub:
            return super().records(file, columns)
        rows = self.hub_splits[Path(file).stem.replace("dev", "validation").replace("diagnostic", "test")]
        return self.official_records(hub_records(rows, self.place(file), ["label"], self.task.classes))

    def official_records(self, records: Iterator[Record]) -> Iterator[Record]:
        """Records of the hub with the names of the official columns; the texts come in their order."""
        for number, record in enumerate(records):
            texts = [re.sub(r"[\t\r\n]+", " ", text) for name, text in record.values.items() if name not in ("label", "idx")]
            values = dict(zip(self.task.texts, texts, strict=True)) | {"index": str(number)}
            yield Record(record.line, values | {self.task.label: record.values["label"]})

    @property
    def missing(self) -> str:
        files = [self.task.train, *self.task.dev_files().values(), *self.task.unlabelled_files().values()]
        return (f"there is no folder {self.folder}, and the Hugging Face hub gave no {self.hub_name[1]}: download "
                f"{', '.join(filter(None, files))} from {GLUE_URL} into {self.folder}, or set --data-dir")


def read_tasks(name: str | None, data_dir: Path, trained: Task | None, predicting: bool) -> list[TaskData]:
    """The rows of all of GLUE, one of its tasks or that of a TOML file, for training.

    Or for applying a model, whose task is `trained`; InputError for another one.
    """
    if name is not None and name.lower() == "all":
        return read_all_tasks(data_dir, predicting)
    return [read_named_task(name, data_dir, trained, predicting)]


def read_named_task(name: str | None, data_dir: Path, trained: Task | None, predicting: bool) -> TaskData:
    """The rows of one task. Without a name it is that of the model that was `trained`, without rows."""
    if name is None:
        return TaskData(trained.name, trained, [], 0, {}, [], {}, [], False)
    key, path = task_key(name), Path(name)
    require(key != "" or path.suffix == ".toml", f"--task {name} is neither a TOML file nor one of {', '.join(TASKS)}, all")
    task = read_task_file(path) if path.suffix == ".toml" else TASKS[TASKS[key].trained_on or key]
    if trained:
        task = task_of_model(task, trained)
    if path.suffix == ".toml":
        require(not predicting or bool(task.unlabelled), f"--predict: {path} names no unlabelled file; for one file of new "
                "rows there is --predict-file")
        data = read_data(task.name, task, TaskFiles(task, path.parent), trained is None, predicting)
    else:
        data = read_task(key, data_dir, trained is None, predicting)
    return data._replace(task=dataclasses.replace(data.task, max_length=trained.max_length)) if trained else data


def task_of_model(task: Task, trained: Task) -> Task:
    """The `task` with the classes or the range of the model that was `trained` on it; InputError if that is another task."""
    same = task.name == trained.name and task.kind == trained.kind
    same_labels = task.classes in ((), trained.classes) and task.range in (None, trained.range)
    require(same and same_labels, f"--weights was fine-tuned on {trained.name}, with the labels "
            f"{listed(trained.classes) or list(trained.range)}: expected this task or none")
    return with_metrics(dataclasses.replace(task, classes=trained.classes, range=trained.range), task.name)


def saved_task(text: str, source: str) -> Task:
    """The task of a model.pt, by the text that it remembers: Task.to_json, or a key in older files."""
    return TASKS[text] if text in TASKS else task_of_json(text, source)


def read_task(key: str, data_dir: Path, training: bool, predicting: bool) -> TaskData:
    """The rows for training the model of a task, or for applying it: then only the dev files that are in `data_dir`.

    Test rows are read if `predicting`, and always those of a task without training data. Raises InputError for a file
    that is missing or isn't the task's.
    """
    model_key = TASKS[key].trained_on or key
    data = read_data(model_key, TASKS[model_key], GlueFiles(model_key, data_dir), training, False)
    unlabelled = read_tests(key, data_dir) if predicting or key != model_key else {}
    return data._replace(unlabelled=unlabelled)


def read_tests(key: str, data_dir: Path) -> dict[str, list[Row]]:
    """Test rows by submission file: the task's, and those in `data_dir` of tasks that its model predicts too."""
    tests = {}
    for other in [key, *(other for other, task in TASKS.items() if task.trained_on == key)]:
        files = GlueFiles(other, data_dir)
        for submission, file in TASKS[other].unlabelled_files().items():
            if other == key or files.has(file):
                tests[submission] = read_unlabelled(files, TASKS[other], file)
    return tests


def read_all_tasks(data_dir: Path, predicting: bool) -> list[TaskData]:
    """Every task whose training and dev files are in `data_dir`, for training; prints what the others lack."""
    tasks = []
    for key, task in TRAINED.items():
        files = GlueFiles(key, data_dir)
        missing = [file for file in (task.train, *task.dev_files().values()) if not files.has(file)]
        if missing:
            print(f"{task.name} left out: no {', '.join(missing)} in {files.folder}")
        else:
            tasks.append(read_task(key, data_dir, training=True, predicting=predicting))
    require(bool(tasks), f"no task's train.tsv and dev.tsv in {data_dir}: get them from {GLUE_URL} or set --data-dir")
    return tasks
