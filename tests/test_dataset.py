"""dataset.py: reading, splitting, examples like the original's, the store, batches and masking."""

import bz2
import gzip
import lzma
import multiprocessing
import os
import pickle
import random
import signal

import numpy as np
import pytest
import torch
from conftest import story

import dataset
from corpus.vocabulary import learned_vocabulary, wordpiece
from dataset import (KEPT_PROB, SPECIAL_TOKENS, Batch, TrainingBatches, Vocabulary, collate, existing_masks,
                     line_examples, mask_tokens, packed_examples, prepare, read_lines,
                     scan_corpus, stored_batch)
from studies.tracking import describe_text
from utils import InputError

# Reading and splitting


@pytest.mark.parametrize("opener", [open, gzip.open, bz2.open, lzma.open])
def test_all_kinds_of_files_read_alike(tmp_path, opener):
    suffix = {open: "txt", gzip.open: "gz", bz2.open: "bz2", lzma.open: "xz"}[opener]
    path = tmp_path / f"text.{suffix}"
    with opener(path, "wb") as file:
        file.write("\ufeff  one é \r\n\r\n\n \ntwo\nthree".encode())
    assert list(read_lines([path, path])) == ["one é", "", "two", "three", ""] * 2


def test_heldout_documents_never_enter_training(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"{n} a\n{n} b" for n in range(1000)), encoding="utf-8")
    corpus = scan_corpus((path,))
    sides = [list(corpus.split(heldout)) for heldout in (False, True)]
    documents = [{line.split()[0] for line in side if line} for side in sides]
    assert len(documents[1]) == 10 and len(documents[0]) == 990 and not documents[0] & documents[1]
    for side in sides:  # every document whole, and ended
        assert [line.split()[1] if line else "" for line in side] == ["a", "b", ""] * (len(side) // 3)


def test_few_documents_still_hold_some_out(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"line {n}" for n in range(50)), encoding="utf-8")
    assert len(scan_corpus((path,)).heldout) == dataset.FEWEST_HELDOUT


def test_without_blank_lines_a_run_of_lines_is_held_out_and_packing_runs_through(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"line {n}" for n in range(5000)), encoding="utf-8")
    corpus = scan_corpus((path,))
    heldout, train = list(corpus.split(True)), list(corpus.split(False))
    assert heldout == [f"line {n}" for n in range(4950, 5000)] + [""]
    assert train.count("") == 1 and len(train) == 4951


@pytest.mark.parametrize("length", [500_000, dataset.LONGEST_LINE // 5])
def test_a_line_of_megabytes_is_read_in_pieces(tmp_path, length):
    path = tmp_path / "text.txt"
    path.write_text("word " * length + "\nend", encoding="utf-8")
    lines = list(read_lines([path]))
    assert max(map(len, lines)) <= dataset.LONGEST_LINE and "".join(lines).count("word") == length
    assert lines.count("") == 1 and lines[-2:] == ["end", ""]


# Examples


class OriginalBuilder:
    """The rules of electra's build_pretraining_dataset.py, written down a second time, plainly, as the reference."""

    def __init__(self, max_length, rng):
        self.max_length, self.target, self.rng = max_length, max_length, rng
        self.lines, self.size = [], 0

    def add(self, line):
        if not line:
            return self.make() if self.size else None
        self.lines.append(line)
        self.size += len(line)
        return self.make() if self.size >= self.target else None

    def make(self):
        limit = 10**5 if self.rng.random() < 0.1 else (self.target - 3) // 2
        a, b = [], []
        for line in self.lines:
            to_first = not a or len(a) + len(line) < limit
            if not to_first and not b and len(a) < limit:
                to_first = self.rng.random() < 0.5
            (a if to_first else b).extend(line)
        a = a[:self.max_length - 2]
        b = b[:max(0, self.max_length - len(a) - 3)]
        self.lines, self.size = [], 0
        self.target = self.max_length
        if self.rng.random() < 0.05:
            self.target = self.rng.randint(5, self.max_length)
        return a, b


@pytest.mark.parametrize("max_length", [12, 64, 128])
def test_packed_examples_are_the_originals(max_length):
    rng = random.Random(1)
    lines = [[rng.randrange(5, 99) for _ in range(rng.randint(1, 40))] if rng.random() > 0.1 else [] for _ in range(20_000)]
    lines.append([])
    builder = OriginalBuilder(max_length, random.Random(5))
    expected = [example for example in map(builder.add, lines) if example]
    examples = list(packed_examples(lines, max_length, random.Random(5)))
    assert examples == expected
    assert max(len(a) + len(b) + 2 + bool(b) for a, b in examples) == max_length


def test_line_examples_are_the_lines():
    assert list(line_examples([[7] * 9, [], [8] * 3], 6, random.Random(0))) == [([7] * 4, []), ([8] * 3, [])]


# Vocabulary


def test_special_tokens_in_a_text_are_text(vocabulary):
    ids = vocabulary.encode(["the [MASK] cat [SEP]"])[0]
    assert not {vocabulary.mask, vocabulary.sep} & set(ids)


# Store


def test_store_holds_the_examples_and_is_built_once(tmp_path, corpus_file, vocabulary, monkeypatch):
    arguments = ((corpus_file,), vocabulary, 32, "packed", tmp_path / "cache")
    data = prepare(*arguments)
    lines = vocabulary.encode(list(scan_corpus((corpus_file,)).split(False)))
    expected = list(packed_examples(lines, 32, random.Random(0)))
    assert len(data.train) == len(expected)
    for n, (first, second) in enumerate(expected):
        ids = data.train.ids[data.train.ends[n]:data.train.ends[n + 1]].tolist()
        assert ids == first + second and data.train.first[n] == len(first)
    assert data.counts["unknown"] == 0 and data.counts["kept"] <= data.counts["tokens"]
    assert 0 < len(data.heldout) < len(data.train) / 5

    monkeypatch.setattr(dataset, "build_store", lambda *_: pytest.fail("built again"))
    assert prepare(*arguments).key == data.key
    moved = tmp_path / "moved.txt"
    moved.write_bytes(corpus_file.read_bytes())
    assert prepare((moved,), *arguments[1:]).key == data.key


def test_a_changed_corpus_vocabulary_length_or_kind_is_noticed(tmp_path, vocabulary):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(story()), encoding="utf-8")

    def key(length=32, kind="packed", vocabulary=vocabulary):
        return prepare((corpus,), vocabulary, length, kind, tmp_path / "cache").key

    keys = [key(), key(length=33), key(kind="line")]
    corpus.write_text(corpus.read_text(encoding="utf-8").replace("cat", "dog", 1), encoding="utf-8")
    keys.append(key())
    pieces = {piece: number for number, piece in enumerate([*vocabulary.pieces(), "extra"])}
    keys.append(key(vocabulary=Vocabulary(wordpiece(pieces, lowercase=True), "tests")))
    assert len(set(keys)) == 5


def test_a_vocabulary_that_does_not_know_the_corpus_is_refused(tmp_path, corpus_file):
    pieces = {piece: number for number, piece in enumerate([*SPECIAL_TOKENS, *"αβγδ"])}
    foreign = Vocabulary(wordpiece(pieces, lowercase=True), "tests")
    with pytest.raises(InputError, match=r"are \[UNK\]"):
        prepare((corpus_file,), foreign, 32, "packed", tmp_path / "cache")


def test_more_than_one_percent_of_unknown_pieces_is_warned_of(tmp_path, vocabulary, capsys):
    for share, warned in ((0.005, False), (0.02, True), (0.2, True)):
        path = tmp_path / f"{share}.txt"
        lines = [["the", "old", "dog", "sees", "a"] * 2 for _ in range(1000)]
        for number in range(round(10_000 * share)):
            lines[number % 1000][number // 1000] = "茶"
        path.write_text("\n".join(map(" ".join, lines)), encoding="utf-8")
        describe_text(prepare((path,), vocabulary, 32, "packed", tmp_path / "cache"), vocabulary, 0.15)
        err = capsys.readouterr().err
        assert (f"{share:.1%} of the word pieces are [UNK]" in err) == warned
        assert ("Raise --model.vocab-size" in err) == warned


def build_and_die(corpus, tokenizer, cache, where):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    if where == "between the sides":
        dataset.refuse_unknown = die
    else:
        dataset.json.dumps = die  # the last thing a build does
    prepare((corpus,), Vocabulary.from_json(tokenizer, "tests"), 32, "packed", cache)


@pytest.mark.parametrize("where", ["between the sides", "at the end"])
def test_a_killed_build_leaves_nothing_half_valid(tmp_path, corpus_file, vocabulary, where):
    arguments = (corpus_file, vocabulary.to_json(), tmp_path / "cache", where)
    process = multiprocessing.get_context("spawn").Process(target=build_and_die, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.suffix for path in (tmp_path / "cache").glob("store-*") if path.is_dir()] == [".building"]
    data = prepare((corpus_file,), vocabulary, 32, "packed", tmp_path / "cache")
    assert len(data.train) and not list((tmp_path / "cache").glob("*.building"))


# Batches


@pytest.fixture(scope="module")
def data(tmp_path_factory, corpus_file):
    cache = tmp_path_factory.mktemp("cache")
    learned = learned_vocabulary((corpus_file,), 150, "uncased", cache)
    return {kind: (learned, prepare((corpus_file,), learned, 32, kind, cache)) for kind in ("packed", "line")}


def test_batches_lay_out_segments_as_the_models_expect(data):
    vocabulary, both = data["packed"]
    batch = stored_batch(both.train, np.arange(len(both.train)), vocabulary, 32)
    assert batch.ids.shape[1] == 32
    for n, (ids, segments, mask) in enumerate(zip(*batch, strict=True)):
        first = both.train.first[n]
        pieces = both.train.ids[both.train.ends[n]:both.train.ends[n + 1]].tolist()
        row = [vocabulary.cls, *pieces[:first], vocabulary.sep]
        types = [0] * len(row)
        if pieces[first:]:
            row += [*pieces[first:], vocabulary.sep]
            types += [1] * (len(pieces[first:]) + 1)
        padding = 32 - len(row)
        assert ids.tolist() == row + [vocabulary.pad] * padding
        assert segments.tolist() == types + [0] * padding
        assert mask.tolist() == [True] * len(row) + [False] * padding


@pytest.mark.parametrize("kind", ["packed", "line"])
def test_an_epoch_visits_every_example_at_most_once_in_a_new_order(data, kind, monkeypatch):
    vocabulary, both = data[kind]
    batches = TrainingBatches(both.train, vocabulary, 32, 7, kind == "line", seed=3)
    seen = []
    monkeypatch.setattr(dataset, "stored_batch", lambda store, numbers, *_: seen.append(numbers))
    for step in range(2 * batches.batches):
        batches[step]
    first, second = np.split(np.concatenate(seen), 2)
    for epoch in (first, second):
        assert len(set(epoch.tolist())) == len(epoch) == len(both.train) // 7 * 7
    assert (first != second).any()
    batches[1]
    assert (seen[-1] == seen[1]).all()  # any step by its number


@pytest.mark.parametrize("kind", ["packed", "line"])
def test_batches_travel_to_worker_processes_by_path(data, kind):
    vocabulary, both = data[kind]
    batches = TrainingBatches(both.train, vocabulary, 32, 4, kind == "line", seed=1)
    sent = pickle.dumps(batches)
    assert len(sent) < 20_000 + len(vocabulary.to_json())
    assert all(torch.equal(a, b) for a, b in zip(batches[5], pickle.loads(sent)[5], strict=True))


def test_line_batches_hold_rows_of_similar_length(data):
    vocabulary, both = data["line"]
    batches = TrainingBatches(both.train, vocabulary, 32, 8, True, seed=0)
    shuffled = TrainingBatches(both.train, vocabulary, 32, 8, False, seed=0)
    padding = [np.mean([1 - source[step].attention_mask.float().mean().item() for step in range(batches.batches)])
               for source in (batches, shuffled)]
    assert padding[0] < 0.7 * padding[1]


# Masking


def random_batch(vocabulary, lengths, L, seed=0):
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(L) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, vocabulary.size, mask.shape, generator=rng)
    ids[:, 0] = vocabulary.cls
    ids.scatter_(1, torch.tensor(lengths)[:, None] - 1, vocabulary.sep)
    return Batch(ids.masked_fill(~mask, vocabulary.pad), torch.zeros_like(ids), mask)


@pytest.mark.parametrize(("mask_prob", "max_length", "most"), [(0.15, 128, 19), (0.15, 512, 77), (0.25, 128, 32)])
def test_counts_are_exact(vocabulary, mask_prob, max_length, most):
    lengths = list(range(3, max_length + 1))
    batch = random_batch(vocabulary, lengths, max_length)
    masked = mask_tokens(batch, vocabulary, mask_prob, max_length)
    wanted = (torch.tensor(lengths).float() * mask_prob).round().clamp(1, most).int()
    assert masked.chosen.sum(1).tolist() == wanted.tolist()
    assert masked.chosen.sum(1).max() == most


def test_masking_chooses_without_replacement_and_never_special_tokens(vocabulary):
    batch = random_batch(vocabulary, [24] * 4000, 24)
    batch.ids[:, 5], batch.ids[:, 6] = vocabulary.mask, vocabulary.unk
    original = batch.ids.clone()
    masked = mask_tokens(batch, vocabulary, 0.15, 24)
    assert torch.equal(batch.ids, original)
    assert all(len(set(row)) == len(row) for row in masked.positions.tolist())
    hits = torch.bincount(masked.positions[masked.chosen], minlength=24)
    assert (hits[[0, 5, 23]] == 0).all()  # [CLS], [MASK], [SEP]; [UNK] at 6 may be chosen
    share = hits[[n for n in range(24) if n not in (0, 5, 23)]] / 4000
    assert (share - 3 / 21).abs().max() < 5 * (3 / 21 / 4000) ** 0.5  # uniform over the candidates

    chosen = torch.zeros_like(batch.attention_mask).scatter(1, masked.positions, masked.chosen)
    assert torch.equal(masked.ids[~chosen], original[~chosen])
    hidden = masked.ids[chosen] == vocabulary.mask
    assert torch.equal(masked.ids[chosen][~hidden], original[chosen][~hidden])  # none becomes a random token
    assert hidden.float().mean().item() == pytest.approx(1 - KEPT_PROB, abs=5 * (0.15 * 0.85 / hidden.numel()) ** 0.5)


def test_a_row_without_candidates_is_left_alone(vocabulary):
    batch = random_batch(vocabulary, [2, 4, 9], 9)
    batch.ids[1, 1:3] = vocabulary.mask
    masked = mask_tokens(batch, vocabulary, 0.5, 9)
    assert masked.chosen.sum(1).tolist() == [0, 0, 4]
    assert torch.equal(masked.ids[:2], batch.ids[:2])


def test_existing_masks_are_the_places_that_hold_a_mask(vocabulary):
    rows = [[7, vocabulary.mask, 8], [vocabulary.mask, 9, vocabulary.mask, vocabulary.mask]]
    batch = collate([(row, []) for row in rows], vocabulary, 8)
    masked = existing_masks(batch, vocabulary)
    assert torch.equal(masked.ids, batch.ids)
    found = [sorted(row[used].tolist()) for row, used in zip(masked.positions, masked.chosen, strict=True)]
    assert found == [[2], [1, 3, 4]] and masked.positions.shape == (2, 3)
