"""tasks/: GLUE's official files or the hub in, the same rows out; metrics; examples; files that are not the task's."""

import csv
import dataclasses
import json

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import HEADERS, write_file

from tasks.data import Row, TaskFiles, number_labels, read_data, read_entries, read_unlabelled
from tasks.encoding import cut_longest_first, encode_rows, encode_texts
from tasks.glue import TASKS, TRAINED, GlueFiles, read_task, task_key
from tasks.metrics import METRICS, task_scores
from tasks.task import UNPREDICTED, read_task_file, task_of_json
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
    assert data.dev.keys() == TASKS[key].dev_files().keys()
    assert data.unlabelled.keys() == TASKS[key].unlabelled_files().keys()
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


# A user's own task


ROWS = [("1", 'He said "no", twice.', "good"), ("2", "A cat,\na dog; a bird", "bad"), ("3", "red\ttree", "good"),
        ("4", "the river", "bad")]


def write_table(path, rows, header=("id", "text", "verdict")):
    """Rows in the format of the suffix; "quoted.tsv" with quotation marks around its fields."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(header, row, strict=True))) + "\n\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(zip(header, row, strict=True)) for row in rows]), path)
    else:
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t").writerows([header, *rows])
    return path


def own_task(folder, text="", **files):
    """The task of a TOML file in the folder, with its files."""
    table = {"train": "train.csv", "texts": ["text"], "label": "verdict"}
    path = folder / "own.toml"
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items() if f"{key} =" not in text]
    path.write_text("\n".join([*lines, text]), encoding="utf-8")
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content, encoding="utf-8")
    return read_task_file(path)


def read_own(folder, text="", training=True, predicting=False, **files):
    task = own_task(folder, text, **files)
    return read_data(task.name, task, TaskFiles(task, folder), training, predicting)


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "train.parquet", "quoted.tsv"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    write_table(tmp_path / name, ROWS)
    quotes = 'quotes = "fields"\n' if name == "quoted.tsv" else ""
    data = read_own(tmp_path, f'train = "{name}"\ndev = "{name}"\n{quotes}classes = ["good", "bad"]')
    assert [(row.index, row.texts[0], row.label) for row in data.train] == [
        (index, text, ["good", "bad"].index(verdict)) for index, text, verdict in ROWS]
    assert data.dev[""] == data.train and data.task.metrics == ("accuracy", "macro_f1")


def test_lines_are_counted_where_a_text_holds_line_breaks(tmp_path):
    write_table(tmp_path / "train.csv", ROWS)
    assert [row.line for row in read_own(tmp_path, 'dev = "train.csv"').train] == [2, 3, 5, 6]


def test_classes_are_read_from_the_training_file_in_their_order(tmp_path):
    text = "text,verdict\na,10\nb,9\nc,10\nd,2\n"
    data = read_own(tmp_path, 'dev = "train.csv"', train_csv=text)
    assert data.task.classes == ("2", "9", "10") and [row.label for row in data.train] == [2, 1, 2, 0]
    assert any("3 classes: 2 1 (25.0%), 9 1 (25.0%), 10 2 (50.0%)" in note for note in data.notes)
    # pandas writes whole numbers beside an empty field as floats.
    write_table(tmp_path / "train.parquet", [("a", 1.0), ("b", 2.0), ("c", None)], ("text", "verdict"))
    task = own_task(tmp_path, 'train = "train.parquet"')
    entries, skipped = read_entries(TaskFiles(task, tmp_path), task, "train.parquet", "train")
    assert [row.label for row in entries] == ["1", "2"] and skipped == 1


def test_without_dev_a_stratified_tenth_is_held_out_once_for_all_seeds(tmp_path):
    lines = [f"text {n},{'rare' if n % 5 == 0 else 'often'}" for n in range(200)]
    (tmp_path / "train.csv").write_text("text,verdict\n" + "\n".join(lines), encoding="utf-8")
    data, again = read_own(tmp_path), read_own(tmp_path)
    dev = data.dev[""]
    assert data.held_out and data == again and len(dev) == 20 and sum(row.label == 1 for row in dev) == 4
    assert sorted(row.line for row in (*data.train, *dev)) == list(range(2, 202))


def test_what_makes_scores_mean_less_is_told(tmp_path):
    data = read_own(tmp_path, 'dev = "dev.csv"\nclasses = ["bad", "good", "odd"]',
                    train_csv="text,verdict\na,good\nb,good\nc,bad\n", dev_csv="text,verdict\nx,odd\nb,good\ny,bad\n")
    notes = "\n".join(data.notes)
    assert "no training row has the class 'odd', which comes 1 times in dev" in notes
    assert f"{tmp_path / 'train.csv'}, line 4: the class 'bad' comes here only" in notes
    assert f"1 of 3 dev rows have the texts of a training row, the first in {tmp_path / 'dev.csv'}, line 3" in notes
    data = read_own(tmp_path, 'dev = "dev.csv"\nrange = [-1, 1]', train_csv="text,verdict\na,0.5\nb,-1\n",
                    dev_csv="text,verdict\na,1\n")
    assert any("one label only: a correlation is not defined" in note for note in data.notes)
    assert [row.label for row in data.train] == [0.5, -1.0] and data.task.metrics == ("pearson", "spearman")


GOOD = "text,verdict\na,good\nb,bad\nc,good\nd,bad\n"


@pytest.mark.parametrize(("text", "train", "message"), [
    ("", "text,label\na,good\n", "train.csv, line 1: the header text, label has 0 columns 'verdict'"),
    ("", "a nice film,good\nb,bad\n", "write header = [names of the columns]"),
    ("", "text;verdict\na;good\n", "write separator = "),
    ("", "text,verdict,verdict\na,good,x\n", "has 2 columns 'verdict'"),
    ("", "text,verdict\na,good\nb,\"bad\n", "train.csv, line 3: it can't be read as CSV"),
    ("", b"text,verdict\na,good\n\xff,bad\n", "train.csv, line 3: it can't be read"),
    ("", "text,verdict\na,good\nb,good\n", "train.csv: every label is 'good'"),
    ("", "text,verdict\n" + "".join(f"t,{n / 7}\n" for n in range(50)), "50 different labels in 50 rows are no classes"),
    ("", "text,verdict\na,good\nb,bad\nc,good\n", "train.csv, line 3: the class 'bad' has this row only"),
    ('header = ["text", "verdict"]', "Text,Verdict\n" + GOOD[13:], "line 1: the class 'Verdict' has this row only"),
    ("", "text,verdict\n", "train.csv has no rows"),
    ('dev = "dev.csv"', GOOD, "dev.csv can't be read"),
    ('range = [0, 5]', "text,verdict\na,3\nb,high\n", "line 3: the label 'high' is not one of own's, expected a number"),
    ('classes = ["good", "bad"]', "text,verdict\na,good\nb,Bad\n", "line 3: the label 'Bad' is not one of own's, expected"),
    ('train = "train.tsv"', 'text\tverdict\n"a ""b"" c"\tgood\n', 'line 2: its quotation marks are doubled as in CSV'),
    ('train = "train.tsv"', '"text"\t"verdict"\n"a"\t"good"\n', 'write quotes = "fields" in the task'),
    ('train = "train.jsonl"', '{"text": "a", "verdict": 1}\n{"text": "b",\n', "train.jsonl, line 2: it is not JSON"),
    ('train = "train.jsonl"', '["a", 1]\n', "line 1: expected a JSON object"),
    ('train = "train.jsonl"', '{"txt": "a", "verdict": 1}\n', "line 1: the header txt, verdict has 0 columns 'text'"),
    ('train = "train.parquet"', "PAR1", "train.parquet can't be read as parquet"),
    ('train = "train.doc"', "x", "the format of .doc is not known: expected .tsv, .csv, .jsonl"),
])
def test_a_file_that_does_not_fit_is_refused_with_file_and_line(tmp_path, text, train, message):
    name = text.split('"')[1] if text.startswith("train") else "train.csv"
    (tmp_path / name).write_bytes(train if isinstance(train, bytes) else train.encode())
    with pytest.raises(InputError) as error:
        read_own(tmp_path, text)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_malformed_rows_are_skipped_in_training_and_named_in_dev(tmp_path):
    files = {"train_csv": "text,verdict\na,good\nb\n,bad\nc,\nd,bad\n", "dev_csv": GOOD}
    assert read_own(tmp_path, 'dev = "dev.csv"', **files).skipped == 3
    for row, problem in (("b", "1 fields, expected 2"), (",bad", "an empty text"), ("c,", "an empty verdict")):
        files["dev_csv"] = f"{GOOD}{row}\n"
        with pytest.raises(InputError) as error:
            read_own(tmp_path, 'dev = "dev.csv"', **files)
        assert f"dev.csv, line 6: {problem}. Every dev row counts: repair the row, or delete it" in str(error.value)


@pytest.mark.parametrize(("text", "message"), [
    ("epoch = 3", "unknown key 'epoch', did you mean 'epochs'?"), ("epochs = 0", "epochs = 0 must be at least 1"),
    ('metrics = ["f2"]\nclasses = ["a", "b"]', "the metric f2 is not one of accuracy"),
    ('metrics = ["f1"]\nclasses = ["a", "b", "c"]', "use macro_f1"), ('metrics = ["accuracy"]\nrange = [0, 1]', "pearson"),
    ('metrics = ["span_f1"]\nclasses = ["N", "V"]\nkind = "tokens"', "span_f1"),
    ("range = [5, 0]", "the lowest label first"), ("range = [0, inf]", "finite numbers"),
    ('subset = "x"', "without dataset"), ('classes = ["a"]', "at least two"), ("both_orders = true", "pairs"),
    ('classes = ["a", "a"]', "names one twice"), ('texts = ["a", "b", "c"]', "one or two"), ("texts = []", "lacks texts"),
    ('kind = "words"', "kind"), ('name = "../x"', "that of a folder"), ("train = ", "can't be read as TOML"),
    ('texts = "text"', "texts")])
def test_terms_that_do_not_fit_together_are_refused(tmp_path, text, message):
    with pytest.raises(InputError) as error:
        own_task(tmp_path, text)
    assert message in str(error.value)


def test_a_task_survives_the_text_in_model_pt(tmp_path):
    own = own_task(tmp_path, 'classes = [0, 1]\ndev = {a = "a.csv", b = "b.csv"}\nmax_length = 64')
    for task in (*TRAINED.values(), own):
        assert task_of_json(task.to_json(), "") == task


def test_a_data_set_of_the_hub_gives_the_names_of_its_classes(tmp_path, monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "verdict": datasets.ClassLabel(names=["bad", "good"])})
    split = datasets.Dataset.from_list([{"text": f"text {n}", "verdict": n % 2} for n in range(40)], features=features)
    monkeypatch.setattr("convert.hub.reach_hub", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: {"train": split} if name == ("some/reviews", "en") else None)
    data = read_own(tmp_path, 'dataset = "some/reviews"\nsubset = "en"\ntrain = "train"')
    assert data.task.classes == ("bad", "good") and len(data.dev[""]) == 4 and len(data.train) == 36
    with pytest.raises(InputError, match="some/reviews has no split dev: it has train"):
        read_own(tmp_path, 'dataset = "some/reviews"\nsubset = "en"\ntrain = "train"\ndev = "dev"')


# Test rows of GLUE


@pytest.mark.parametrize(("lines", "expected"), [
    ("0\ta\tb\n1\tc\nd\te\n2\tf\tg\n", [("0", ("a", "b")), ("1", ("c d", "e")), ("2", ("f", "g"))]),
    ("0\ta\tb\nc\n1\td\te\n", [("0", ("a", "b c")), ("1", ("d", "e"))]),
    ("0\ta\tb\n1\tc\n2\td\te\n", [("0", ("a", "b")), ("1", ("c", "")), ("2", ("d", "e"))]),
])
def test_a_torn_test_row_is_made_whole_and_every_index_comes_once(tmp_path, lines, expected):
    (tmp_path / "test.tsv").write_text("id\tquestion1\tquestion2\n" + lines, encoding="utf-8")
    assert [(row.index, row.texts) for row in read_file(tmp_path / "test.tsv", "qqp", "test")] == expected


def test_an_index_that_comes_twice_is_refused_with_both_lines(tmp_path):
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\ta\n1\tb\n0\tc\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"test.tsv, line 4: the index 0 is that of line 2 too"):
        read_file(tmp_path / "test.tsv", "sst2", "test")


# Tokens


CONLL = """-DOCSTART- -X- O

U.N. NNP B-ORG
official NN O
Ekeus NNP B-PER

Red JJ B-LOC
Sea NNP I-LOC
. . O
"""


def read_tokens(folder, text="", name="train.conll", content=CONLL):
    (folder / name).write_text(content, encoding="utf-8")
    return read_own(folder, f'kind = "tokens"\ntexts = ["word"]\nlabel = "tag"\ntrain = "{name}"\ndev = "{name}"\n{text}')


def test_conll_s_columns_are_sentences_of_words_and_labels(tmp_path):
    data = read_tokens(tmp_path)
    assert data.task.classes == ("B-LOC", "B-ORG", "B-PER", "I-LOC", "O")
    assert data.task.metrics == ("span_f1", "span_precision", "span_recall", "accuracy")
    assert [(row.texts, data.task.label_texts(row.label), row.line) for row in data.train] == [
        (("U.N.", "official", "Ekeus"), ["B-ORG", "O", "B-PER"], 3), (("Red", "Sea", "."), ["B-LOC", "I-LOC", "O"], 7)]
    parts = read_tokens(tmp_path, 'header = ["word", "tag", "chunk"]')
    assert parts.task.classes == (".", "JJ", "NN", "NNP") and parts.task.metrics == ("accuracy", "macro_f1")
    rows = [{"word": list(row.texts), "tag": data.task.label_texts(row.label)} for row in data.train]
    same = read_tokens(tmp_path, name="train.jsonl", content="".join(json.dumps(row) + "\n" for row in rows))
    assert [row[:3] for row in same.train] == [row[:3] for row in data.train]


def test_conllu_is_read_without_comments_joined_words_and_empty_nodes(tmp_path):
    def line(number, form, tag):
        return "\t".join([number, form, "_", tag, *"______"])
    text = "\n".join(["# text = du riz", line("1-2", "du", "_"), line("1", "de", "ADP"), line("2", "le riz", "NOUN"),
                      line("2.1", "x", "X"), ""])
    (tmp_path / "train.conllu").write_text(text, encoding="utf-8")
    data = read_own(tmp_path, 'kind = "tokens"\ntexts = ["form"]\nlabel = "upos"\ntrain = "train.conllu"\n'
                              'dev = "train.conllu"')
    assert [row.texts for row in data.train] == [("de", "le riz")] and data.task.classes == ("ADP", "NOUN")


@pytest.mark.parametrize(("content", "message"), [
    (CONLL.replace("Sea NNP I-LOC", "Sea I-LOC"), "train.conll, line 7: line 8 has 2 columns, expected 3"),
    ("a B-X\nc O\n\nb\n", "line 4: line 4 has 1 columns, expected 2"),
])
def test_a_word_without_its_label_is_refused_by_its_line(tmp_path, content, message):
    with pytest.raises(InputError) as error:
        read_tokens(tmp_path, content=content)
    assert message in str(error.value)


def test_the_first_piece_of_a_word_carries_its_label_and_long_sentences_are_cut(vocabulary):
    task = dataclasses.replace(TASKS["sst2"], kind="tokens", classes=("A", "B", "O"))
    rows = [Row("0", ("dogs", "the", "\u200b", "cats"), (0, 1, 2, 0)), Row("1", ("cat",), (1,))]
    examples = encode_rows(rows, task, vocabulary, 20)
    assert list(examples.segments[0][0]) == [*vocabulary.encode(["dogs the"])[0], vocabulary.unk,
                                             *vocabulary.encode(["cats"])[0]]
    assert [list(places) for places in examples.positions] == [[1, 3, 4, 5], [1]] and examples.cut == 0
    short = encode_rows(rows, task, vocabulary, 5)  # three pieces
    assert [list(places) for places in short.positions] == [[1, 3], [1]] and short.cut == 1
    assert [list(labels) for labels in short.labels] == [[0, 1], [1]]
    outputs = torch.arange(2 * 8 * 3.0).view(2, 8, 3)
    assert torch.equal(examples.answers(np.array([1, 0]), outputs), outputs[[0, 1, 1, 1, 1], [1, 1, 3, 4, 5]])


def test_spans_count_as_conlleval_counts_them():
    """A hand count: of the spans PER(0), LOC(2-3), ORG(5) the first and the last are found, and one more is invented."""
    task = dataclasses.replace(TASKS["sst2"], kind="tokens", classes=("O", "B-PER", "B-LOC", "I-LOC", "B-ORG"),
                               metrics=("span_f1", "span_precision", "span_recall", "accuracy"))
    rows = [Row("0", tuple("abcd"), (1, 0, 2, 3)), Row("1", tuple("ef"), (0, 4))]
    scores = task_scores(task, rows, np.array([1, 0, 2, 0, 2, 4]))
    assert scores == pytest.approx({"span_precision": 2 / 4, "span_recall": 2 / 3, "span_f1": 4 / 7, "accuracy": 4 / 6})
    cut = task_scores(task, rows, np.array([1, 0, UNPREDICTED, UNPREDICTED, 0, 4]))  # counts as no span, and as wrong
    assert cut == pytest.approx({"span_precision": 1, "span_recall": 2 / 3, "span_f1": 4 / 5, "accuracy": 4 / 6})
