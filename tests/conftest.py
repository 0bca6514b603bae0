"""What the tests share: a small corpus to learn, a vocabulary that knows it, GLUE-like files, small runs."""

import json
import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' networks are small, and other tests need the other cores

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import Pretraining
import studies.tracking
from corpus.vocabulary import wordpiece
from dataset import SPECIAL_TOKENS, Vocabulary
from model import Electra, ModelConfig, SavedNetwork, save_network
from tasks.glue import TASKS, task_key


WORDS = """the a old new red green cat dog bird house tree river sees likes finds eats near under over and but
then""".split()

MNLI = ("index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
        "sentence1 sentence2").split()
LABELS = ["label1", "label2", "label3", "label4", "label5"]
HEADERS = {  # of the official files; none: CoLA's
    ("CoLA", "train.tsv"): None, ("CoLA", "dev.tsv"): None, ("CoLA", "test.tsv"): ["index", "sentence"],
    ("SST-2", "train.tsv"): ["sentence", "label"], ("SST-2", "dev.tsv"): ["sentence", "label"],
    ("SST-2", "test.tsv"): ["index", "sentence"],
    **{("MRPC", f"{split}.tsv"): ["index" if split == "test" else "Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
       for split in ("train", "dev", "test")},
    **{("STS-B", f"{split}.tsv"): ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1",
                                   "sentence2", *(["score"] if split != "test" else [])]
       for split in ("train", "dev", "test")},
    ("QQP", "train.tsv"): ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
    ("QQP", "dev.tsv"): ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
    ("QQP", "test.tsv"): ["id", "question1", "question2"],
    ("MNLI", "train.tsv"): [*MNLI, "label1", "gold_label"],
    **{("MNLI", f"dev_{kind}.tsv"): [*MNLI, *LABELS, "gold_label"] for kind in ("matched", "mismatched")},
    **{("MNLI", f"test_{kind}.tsv"): MNLI for kind in ("matched", "mismatched")},
    **{("QNLI", f"{split}.tsv"): ["index", "question", "sentence", *(["label"] if split != "test" else [])]
       for split in ("train", "dev", "test")},
    **{(name, f"{split}.tsv"): ["index", "sentence1", "sentence2", *(["label"] if split != "test" else [])]
       for name in ("RTE", "WNLI") for split in ("train", "dev", "test")},
    ("AX", "diagnostic.tsv"): ["index", "sentence1", "sentence2"],
}
TINY = {"--steps": 8, "--batch-size": 6, "--max-length": 24, "--warmup-steps": 2, "--log-every": 2, "--eval-every": 4,
        "--eval-examples": 20, "--save-every": 4, "--learning-rate": 1e-3, "--model.vocab-size": 60,
        "--model.embedding-size": 8, "--model.hidden-size": 16, "--model.layers": 1, "--model.heads": 2,
        "--model.feed-forward-size": 32, "--model.generator-size": 0.5, "--model.max-positions": 32,
        "--model.dropout": 0.1, "--device": "cpu", "--precision": "fp32"}


@pytest.fixture(autouse=True)
def deterministic():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    """Most tests do without curves.png and its half second."""
    monkeypatch.setattr(studies.tracking, "draw_curves", lambda *_: None)


@pytest.fixture(scope="session")
def vocabulary():
    pieces = [*SPECIAL_TOKENS, *WORDS, ".", "##s", "é"]
    return Vocabulary(wordpiece({piece: number for number, piece in enumerate(pieces)}, lowercase=True), "tests")


def story(documents=60, seed=0):
    """Documents of 3 to 12 sentences of 3 to 14 words, each the next in WORDS: a language one layer can learn."""
    rng = random.Random(seed)

    def sentence():
        start, length = rng.randrange(len(WORDS)), rng.randint(3, 14)
        return " ".join(WORDS[(start + n) % len(WORDS)] for n in range(length)) + "."
    return ["\n".join(sentence() for _ in range(rng.randint(3, 12))) for _ in range(documents)]


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n".join(story()) + "\n", encoding="utf-8")
    return path


def write_pair(folder, vocabulary, seed=0, **sizes):
    """gen.pt and disc.pt of random weights as a pretraining run writes them; the generator's are large enough to differ."""
    torch.manual_seed(seed)
    config = ModelConfig(**{"vocab_size": vocabulary.size, "embedding_size": 8, "hidden_size": 16, "layers": 1, "heads": 2,
                            "feed_forward_size": 32, "generator_size": 0.5, "max_positions": 30, "initializer_range": 1.0}
                         | sizes)
    folder.mkdir(parents=True, exist_ok=True)
    electra = Electra(config)
    for name, file in (("generator", "gen.pt"), ("discriminator", "disc.pt")):
        save_network(folder / file, SavedNetwork(name, getattr(electra, name), config, vocabulary.to_json()))
    return folder / "gen.pt", folder / "disc.pt"


def write_file(path, key, columns, rows, seed):
    """`rows` rows of random words; CoLA's second column is its label."""
    task, rng = TASKS[key], np.random.default_rng(seed)
    lines = [] if columns is None else ["\t".join(columns)]
    for number in range(rows):
        label = task.classes[number % len(task.classes)] if task.classes else f"{rng.uniform(0, 5):.3f}"
        values = {"index": str(number), "id": str(number), task.label: label, "label": label}
        columns_here = columns or ["source", "label", "star", "sentence"]
        words = {name: " ".join(rng.choice(WORDS, rng.integers(2, 9))) + ' "' for name in task.texts}
        lines.append("\t".join({"star": ""} .get(name, (words | values).get(name, "x")) for name in columns_here))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def glue(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    for seed, ((name, file), columns) in enumerate(HEADERS.items()):
        write_file(folder / name / file, task_key(name), columns, 9 if file == "train.tsv" else 14, seed)
    return folder


@pytest.fixture
def command(tmp_path, corpus_file):
    """A command line of a run of seconds; keywords replace or add flags."""
    def build(output="run", **flags):
        flags = TINY | {"--corpus": corpus_file, "--output": tmp_path / output, "--cache": tmp_path / "cache"} | {
            "--" + name.replace("__", ".").replace("_", "-"): value for name, value in flags.items()}
        return [str(word) for flag in flags.items() for word in flag if word is not True]
    return build


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


class RefuseWaits(TorchDispatchMode):
    """Fails on every operation for which the host has to wait for the device."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in self.WAITS, function
        return function(*args, **(kwargs or {}))


class Killed(BaseException):
    """Ends a run where it stands, as kill -9 does."""


def stop_after_save(monkeypatch, at):
    """A run that stops just after the checkpoint of step `at`, as if killed."""
    write = Pretraining.write_checkpoint

    def stopping(run, step, means):
        write(run, step, means)
        if step == at:
            raise Killed
    monkeypatch.setattr(Pretraining, "write_checkpoint", stopping)


def assert_same(a, b):
    """Bit for bit, through nested state."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b
