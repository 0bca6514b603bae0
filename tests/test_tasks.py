"""tasks/: GLUE's official files or the hub in, the same rows out; metrics; examples; files that are not the task's."""

import datasets
import numpy as np
import pytest
from conftest import HEADERS, write_file

from tasks.data import Row, TaskFiles, read_data, read_entries, number_labels, read_unlabelled
from tasks.encoding import cut_longest_first, encode_rows, encode_texts
from tasks.glue import TASKS, TRAINED, GlueFiles, read_task, task_key
from tasks.metrics import METRICS
from utils import InputError

ENTAILMENT = ["entailment", "not_entailment"]
HUB = {  # text columns and classes of nyu-mll/glue
    "cola": (["sentence"], ["unacceptable", "acceptable"]),
    "sst2": (["sentence"], ["negative", "positive"]),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
    "stsb": (["sentence1", "sentence2"], None),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "qnli": (["question", "sentence"], ENTAILMENT),
    "rte": (["sentence1", "sentence2"], ENTAILMENT),
    "wnli": (["sentence1", "sentence2"], ["not_entailment", "entailment"]),
    "ax": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
}


def read_file(path, key, split):
    files = TaskFiles(TASKS[key], path.parent)
    if split == "test":
        return read_unlabelled(files, TASKS[key], path.name)
    entries, skipped = read_entries(files, TASKS[key], path.name, split)
    return number_labels(entries, TASKS[key], str(path)), skipped


# Tasks and metrics


def test_every_task_is_found_by_its_official_name_and_names_metrics_that_exist():
    for key, task in TASKS.items():
        assert task_key(task.name) == task_key(task.name.lower()) == key
        assert set(task.metrics) <= METRICS.keys() and bool(task.metrics) != bool(task.trained_on)
    assert task_key("diagnostic") == "ax" and task_key("STS") == "stsb" and task_key("nothing") == ""


def test_correlation_with_equal_predictions_is_zero():
    labels = np.array([0.0, 2.5, 5.0])
    assert METRICS["pearson"](labels, np.ones(3)) == METRICS["spearman"](labels, np.ones(3)) == 0.0
    assert METRICS["spearman"](labels, np.array([1.0, 10.0, 100.0])) == pytest.approx(1.0)


# Official files


@pytest.mark.parametrize("key", TASKS)
def test_official_files_are_read_by_the_names_in_their_headers(tmp_path, key):
    """Every column but the task's own is filled with x, so a wrong column would show."""
    name = TASKS[key].name
    for seed, ((folder, file), columns) in enumerate(HEADERS.items()):
        if folder == name:
            write_file(tmp_path / name.lower() / file, key, columns, 7, seed)
    data = read_task(key, tmp_path, training=not TASKS[key].trained_on, predicting=True)
    splits = [data.train, *data.dev.values(), *data.unlabelled.values()]
    assert [len(rows) for rows in splits if rows] == [7] * sum(folder == name for folder, _ in HEADERS)
    for rows in splits:
        assert all(text.endswith(' "') and len(text) > 4 for row in rows for text in row.texts)
    for rows in (data.train, *data.dev.values()):
        if TASKS[key].classes:
            assert [row.label for row in rows] == [n % len(TASKS[key].classes) for n in range(len(rows))]
        assert all(0 <= row.label <= (5 if TASKS[key].range else 2) for row in rows)
    assert all(np.isnan(row.label) for rows in data.unlabelled.values() for row in rows)


def test_malformed_training_rows_are_skipped_and_counted(tmp_path):
    path = tmp_path / "train.tsv"
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    path.write_text(head + '0\t1\t2\ta "b\tc\t1\r\n1\t1\t2\ta\t\t0\n2\t1\t2\ta\n3\t1\t2\tx\ty\t0\n', encoding="utf-8")
    rows, skipped = read_file(path, "qqp", "train")
    assert skipped == 2 and rows == [Row("0", ('a "b', "c"), 1, 2), Row("3", ("x", "y"), 0, 5)]


@pytest.mark.parametrize(("file", "text", "message"), [
    ("train.tsv", "index\tsentence1\tlabel\n0\ta\tentailment\n", "line 1"),
    ("train.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", "line 2: the label 'maybe'"),
    ("dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\ta\tb\n", "line 3"),
    ("dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\t\tb\tentailment\n", "line 2"),
    ("dev.tsv", "index\tsentence1\tsentence2\tlabel\n", "no rows"),
    ("train.tsv", b"index\tsentence1\tsentence2\tlabel\n0\t\xff\tb\tentailment\n", "can't be read"),
    ("train.tsv", None, "can't be read"),
])
def test_wrong_files_are_refused_by_name_and_line(tmp_path, file, text, message):
    for name in ("train.tsv", "dev.tsv"):
        write_file(tmp_path / "RTE" / name, "rte", HEADERS["RTE", name], 5, 0)
    path = tmp_path / "RTE" / file
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        read_task("rte", tmp_path, training=True, predicting=False)
    assert message in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("label", ["5.1", "-0.1", "nan", "inf", "high"])
def test_real_labels_outside_the_scale_are_refused(tmp_path, label):
    path = tmp_path / "dev.tsv"
    path.write_text(f"sentence1\tsentence2\tscore\na\tb\t5.0\nc\td\t{label}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 3: the label .* a number from 0 to 5"):
        read_file(path, "stsb", "dev")


def test_a_fine_tuned_model_needs_only_the_files_that_are_there(tmp_path):
    write_file(tmp_path / "MNLI" / "dev_matched.tsv", "mnli", HEADERS["MNLI", "dev_matched.tsv"], 5, 0)
    data = read_task("mnli", tmp_path, training=False, predicting=False)
    assert data.train == [] and list(data.dev) == ["matched"] and data.unlabelled == {}


# The hub


def hub_splits(key, labels):
    """What load_dataset gives for a task, with a tab and a line break in each text."""
    columns, classes = HUB[key]
    label_type = datasets.ClassLabel(names=classes) if classes else datasets.Value("float32")
    features = datasets.Features({column: datasets.Value("string") for column in columns} | {
        "label": label_type, "idx": datasets.Value("int32")})

    def split(labels):
        rows = [{column: f"{column}\t{n}\nx" for column in columns} | {"label": label, "idx": n}
                for n, label in enumerate(labels)]
        return datasets.Dataset.from_list(rows, features=features)
    if key == "ax":
        return {"test": split([-1, -1])}
    suffixes = ("_matched", "_mismatched") if key == "mnli" else ("",)
    return {"train": split(labels)} | {f"validation{suffix}": split(labels) for suffix in suffixes} | {
        f"test{suffix}": split([-1, -1]) for suffix in suffixes}


@pytest.fixture
def hub(monkeypatch):
    """A hub that has every task, with the labels 0, 1, 1 (of STS-B 0, 2.5, 5)."""
    monkeypatch.setattr("convert.hub.reach_hub", lambda: None)
    def load_dataset(_, key):
        return hub_splits(key, [0, 1, 1] if HUB[key][1] else [0, 2.5, 5])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.parametrize("key", [key for key in TASKS if key != "ax"])
def test_the_hub_gives_the_rows_of_the_official_files_and_writes_none(tmp_path, hub, key):
    data = read_task(key, tmp_path, training=True, predicting=True)
    columns, classes = HUB[key]
    if "entailment" in TASKS[key].classes:  # classes by name, in an order of the hub's own
        labels = [TASKS[key].classes.index(classes[number]) for number in (0, 1, 1)]
    else:
        labels = [0, 1, 1] if classes else [0, 2.5, 5]
    texts = [tuple(f"{column} {n} x" for column in columns) for n in range(len(labels))]
    expected = [Row(str(n), texts[n], label, n + 1) for n, label in enumerate(labels)]
    assert data.dev.keys() == TASKS[key].dev_files().keys() and data.unlabelled.keys() == TASKS[key].unlabelled_files().keys()
    assert all(rows == expected for rows in (data.train, *data.dev.values()))
    for rows in data.unlabelled.values():
        assert [(row.index, row.texts) for row in rows] == [(row.index, row.texts) for row in expected[:2]]
    assert list(tmp_path.iterdir()) == []


def test_the_hub_gives_the_diagnostic_rows_to_a_fine_tuned_mnli_model(tmp_path, hub):
    data = read_task("ax", tmp_path, training=False, predicting=False)
    assert data.key == "mnli" and data.dev == {} and [row.index for row in data.unlabelled["AX"]] == ["0", "1"]


def test_without_the_hub_its_cache_is_used_and_an_absent_task_names_files_and_publisher(tmp_path, monkeypatch):
    def no_network():
        raise ConnectionError

    def cached(_, key):
        assert datasets.config.HF_HUB_OFFLINE  # else it would try again for half a minute
        if key != "rte":
            raise ConnectionError
        return hub_splits(key, [0, 1])
    monkeypatch.setattr("convert.hub.reach_hub", no_network)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", cached)
    assert len(list(GlueFiles("rte", tmp_path).records("train.tsv", ["sentence1", "label"]))) == 2
    with pytest.raises(InputError) as error:
        read_task("mnli", tmp_path, training=True, predicting=False)
    assert all(text in str(error.value) for text in ("dev_mismatched.tsv", "gluebenchmark.com", "--data-dir"))


# Encoding


def test_examples_hold_both_texts(vocabulary):
    texts = [("the dog", "a cat")]
    (first, second), = encode_texts(texts, vocabulary, 20)[0]
    assert [list(first), list(second)] == vocabulary.encode(["the dog", "a cat"])


def test_pairs_are_cut_longest_first():
    def plain(first, second, room):  # one piece at a time, as the original
        first, second = list(first), list(second)
        while len(first) + len(second) > room:
            (first if len(first) > len(second) else second).pop()
        return first, second
    for a, b, room in [(3, 9, 6), (9, 3, 6), (5, 5, 7), (1, 2, 10), (0, 9, 4)]:
        first, second = cut_longest_first(list(range(a)), list(range(b)), room)
        assert (list(first), list(second)) == plain(range(a), range(b), room)
