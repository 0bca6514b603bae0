"""Lines of text in, masked pretraining batches out: corpus, vocabulary, examples, token store, batches, masking.

Rules marked "G" are those of google-research/electra. Shapes: B rows, L tokens a row, K masked slots a row.
"""

import bz2
import contextlib
import gzip
import hashlib
import json
import lzma
import math
import os
import random
import shutil
import unicodedata
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from utils import InputError, locked, require, write_text

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)
STDIN = Path("-")  # standard input in place of a file
LONGEST_LINE = 100_000  # characters; the rest of a longer line is read as further lines
HELDOUT_DIVISOR = 100  # one document in 100 is held out
FEWEST_HELDOUT = 4  # documents; a corpus with less than ten times as many holds out lines instead

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# What a normalizer leaves of "É" tells what it does to case and accents.
CASE_NOTES = {"e": "uncased: the networks see lower case without accents or vowel signs (of Hindi or Thai, for instance)",
              "é": "uncased: the networks see lower case with accents", "É": "cased: the networks see case and accents",
              "E": "cased: the networks see no accents"}
LARGEST_VOCABULARY = 2**16  # ids are stored as uint16
STORE_VERSION = 3  # part of the cache key: raise it when the examples or their layout change
STORE_DTYPES = {"ids": np.uint16, "ends": np.int64, "first": np.uint16}
CHUNK_LINES = 2_048  # lines tokenized, or examples written, at a time
ONE_SEGMENT_PROB = 0.1  # share of examples with a single segment (G, build_pretraining_dataset.py)
RANDOM_LENGTH_PROB = 0.05  # share of examples with a random target length (G, build_pretraining_dataset.py)
UNLIMITED = 100_000  # a first segment's target length where there is to be no second (G, build_pretraining_dataset.py)
KEPT_PROB = 0.15  # share of the chosen tokens that stay visible (G, pretrain/pretrain_helpers.py)
SLOT_ROUNDING = 0.005  # added to mask_prob for the number of slots of a row (G, configure_pretraining.py)
POOL_BATCHES = 64  # batches whose examples are sorted by length together

Segments = tuple[Sequence[int], Sequence[int]]  # ids of the first and of the second segment, without special tokens


# Corpus: files of lines

class Corpus(NamedTuple):
    """Text files, one sentence a line, and how they divide into training and held-out text."""

    paths: tuple[Path, ...]
    lines: int  # lines that hold text
    invalid: int  # lines with bytes that are not UTF-8
    by_line: bool  # true: `heldout` holds numbers of lines; false: numbers of documents
    heldout: frozenset[int] | range

    def split(self, heldout: bool) -> Iterator[str]:
        """The lines of the held-out or of the training text; "" ends a document."""
        number = 0  # of the line or document
        on_this_side = (0 in self.heldout) == heldout
        document_open = False
        for line in read_lines(self.paths):
            if line and on_this_side:
                document_open = True
                yield line
            elif not line and document_open:
                document_open = False
                yield ""
            unit_ended = bool(line) if self.by_line else not line
            if unit_ended:
                number += 1
                on_this_side = (number in self.heldout) == heldout


def read_lines(paths: Iterable[Path]) -> Iterator[str]:
    """Stripped lines of UTF-8 text (plain, .gz, .bz2, .xz), runs of blank lines as one "", and "" after each file.

    Bytes that are not UTF-8 are read as U+FFFD. Raises InputError for a file that can't be read.
    """
    for path in paths:
        last_line_blank, last_line_ended = True, True
        try:
            with OPENERS.get(path.suffix.lower(), open)(0 if path == STDIN else path, "rt", encoding="utf-8-sig",
                                                errors="replace") as file:
                for line in iter(partial(file.readline, LONGEST_LINE), ""):
                    text = line.strip()
                    if text or (last_line_ended and not last_line_blank):
                        yield text
                        last_line_blank = not text
                    last_line_ended = line.endswith("\n")
        except READ_ERRORS as error:
            raise InputError(f"text file {path} can't be read: {error}") from None
        if not last_line_blank:
            yield ""


def scan_corpus(paths: tuple[Path, ...]) -> Corpus:
    """Counts the corpus and decides what is held out: 1% of the documents, at least FEWEST_HELDOUT.

    A corpus without blank lines, or with few documents, holds out its last 1% of lines, at least 20 but at most a fifth.
    Raises InputError for an empty or binary corpus.
    """
    lines = invalid = documents = 0
    for line in tqdm(read_lines(paths), "Counting lines", unit=" lines", leave=False, mininterval=1, disable=None):
        require("\0" not in line, "the corpus holds NUL bytes, so it is binary: expected UTF-8 text, one sentence a line")
        lines += bool(line)
        documents += not line
        invalid += "\ufffd" in line
    require(lines > 0, f"no text in {', '.join(map(str, paths))}: expected one sentence a line")
    require(invalid <= lines / 2, f"{invalid:,} of {lines:,} lines of the corpus are not UTF-8: convert it, for instance "
                                  "with iconv")
    if documents <= len(paths) or documents < 10 * FEWEST_HELDOUT:
        count = max(lines // HELDOUT_DIVISOR, min(20, lines // 5))
        return Corpus(paths, lines, invalid, True, range(lines - count, lines))
    heldout = random.Random(0).sample(range(documents), max(FEWEST_HELDOUT, documents // HELDOUT_DIVISOR))
    return Corpus(paths, lines, invalid, False, frozenset(heldout))


# Vocabulary

class Vocabulary:
    """A tokenizer and the ids of its special tokens. InputError if one is missing or ids overflow uint16."""

    def __init__(self, tokenizer: Tokenizer, source: str):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # "[SEP]" in a text is text
        ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
        missing = [token for token, number in zip(SPECIAL_TOKENS, ids, strict=True) if number is None]
        require(not missing, f"the vocabulary {source} has no {', '.join(missing)}: expected one like BERT's")
        self.size = max(tokenizer.get_vocab().values()) + 1
        require(self.size <= LARGEST_VOCABULARY, f"the vocabulary {source} has {self.size:,} pieces, expected at most "
                                                 f"{LARGEST_VOCABULARY:,}, which the token store can hold")
        self.tokenizer = tokenizer
        self.pad, self.unk, self.cls, self.sep, self.mask = ids
        letter = tokenizer.normalizer.normalize_str("É") if tokenizer.normalizer else "É"
        self.case_note = CASE_NOTES.get(unicodedata.normalize("NFC", letter), f"the networks see {letter} for É")

    def encode(self, lines: list[str]) -> list[list[int]]:
        """Ids of each line, without special tokens."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(lines, add_special_tokens=False)]

    def pieces(self) -> list[str]:
        """Every piece in the order of its id, as vocab.txt has them."""
        return [self.tokenizer.id_to_token(number) or "" for number in range(self.size)]

    def to_json(self) -> str:
        """All that `from_json` needs, the handling of case and accents included."""
        return self.tokenizer.to_str()

    @classmethod
    def from_json(cls, text: str, source: str) -> "Vocabulary":
        """InputError, naming the `source`, if `text` is not a tokenizer's JSON."""
        try:
            return cls(Tokenizer.from_str(text), source)
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{source} holds no usable tokenizer: {error}") from None

    @classmethod
    def of_network(cls, saved: Any, source: str) -> "Vocabulary":
        """The vocabulary of a model.SavedNetwork; InputError if it has more pieces than the network has rows for."""
        vocabulary, rows = cls.from_json(saved.tokenizer, source), saved.config.vocab_size
        require(vocabulary.size <= rows, f"{source} has {vocabulary.size:,} pieces and weights for {rows:,}: they belong "
                                         "to different models")
        return vocabulary


# Examples: one or two segments of word pieces

def packed_examples(lines: Iterable[list[int]], max_length: int, rng: random.Random) -> Iterator[Segments]:
    """Packs tokenized lines (an empty one ends a document) into examples as the original does (G, ExampleBuilder).

    Random draws come in the original's order: the same `rng` and lines give the same examples.
    """
    current: list[list[int]] = []
    length, target = 0, max_length
    for line in lines:
        # Lines are collected until their pieces reach the target length or the document ends.
        if line:
            current.append(line)
            length += len(line)
        document_ends = not line
        if length == 0 or (length < target and not document_ends):
            continue
        first, second = split_segments(current, target, rng)
        # What is beyond the length is dropped; [CLS] and one or two [SEP] need room too.
        first = first[:max_length - 2]
        yield first, second[:max(0, max_length - len(first) - 3)]
        current, length = [], 0
        # A few examples are shorter, so that the networks see all lengths.
        target = rng.randint(5, max_length) if rng.random() < RANDOM_LENGTH_PROB else max_length


def split_segments(lines: list[list[int]], target: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """Distributes the lines of one example over two segments, each about half of the target length.

    A later line that fits goes to the first segment even after the second has begun. So the order of lines can change,
    as it can in the original.
    """
    single_segment = rng.random() < ONE_SEGMENT_PROB
    first_target = UNLIMITED if single_segment else (target - 3) // 2  # 3: [CLS] and two [SEP]
    first, second = [], []
    for line in lines:
        fits = len(first) + len(line) < first_target
        # A line that crosses the target of the first segment goes there half of the time.
        if not first or fits or (not second and len(first) < first_target and rng.random() < 0.5):
            first += line
        else:
            second += line
    return first, second


def line_examples(lines: Iterable[list[int]], max_length: int, rng: random.Random) -> Iterator[Segments]:
    """Each line becomes one example of one segment."""
    return ((line[:max_length - 2], []) for line in lines if line)


# Token store: the examples of a corpus on disk

class Store:
    """Examples of the training or of the held-out text, memory-mapped. Worker processes open it by its path.

    `ids` (uint16): both segments of every example, one after the other; `ends` (int64, N + 1): where example n ends and
    n + 1 begins; `first` (uint16, N): length of the first segment.
    """

    def __init__(self, stem: Path):
        self.stem = stem
        self.ids, self.ends, self.first = (np.memmap(stem.with_suffix(f".{name}"), dtype=dtype, mode="r")
                                           for name, dtype in STORE_DTYPES.items())

    def __len__(self) -> int:
        return len(self.first)

    def __reduce__(self) -> tuple:
        return Store, (self.stem,)


class Data(NamedTuple):
    """A tokenized corpus and what was counted while it was built."""

    train: Store
    heldout: Store
    counts: dict[str, int]  # lines, invalid lines, tokens, kept tokens, unknown tokens
    key: str  # changes with the content of corpus and vocabulary and with how they were cut into examples


def content_key(*parts: object) -> str:
    """A short name for a cache entry that depends on all `parts`."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def corpus_hash(paths: Iterable[Path]) -> str:
    """Changes with any byte of the files; InputError for one that can't be read."""
    total = hashlib.blake2b()
    for path in paths:
        try:
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "blake2b").digest())
        except OSError as error:
            raise InputError(f"corpus file {path} can't be read ({error.strerror}): name text files") from None
    return total.hexdigest()


def prepare(paths: tuple[Path, ...], vocabulary: Vocabulary, max_length: int, examples: str, cache: Path) -> Data:
    """The tokenized corpus, built once: its cache entry is named by the content of all it depends on, once it is whole.

    Memory doesn't grow with the corpus. Raises InputError if the text is not usable or the vocabulary doesn't know it.
    """
    key = content_key(corpus_hash(paths), vocabulary.to_json(), max_length, examples, STORE_VERSION)
    folder = cache / f"store-{key}"
    with locked(folder.with_suffix(".lock")):
        if not folder.exists():
            building = folder.with_suffix(".building")
            shutil.rmtree(building, ignore_errors=True)  # of a build that was killed
            building.mkdir()
            build_store(building, scan_corpus(paths), vocabulary, max_length, examples)
            building.rename(folder)
    counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    return Data(Store(folder / "train"), Store(folder / "heldout"), counts, folder.name)


def build_store(folder: Path, corpus: Corpus, vocabulary: Vocabulary, max_length: int, examples: str) -> None:
    """Tokenizes training and held-out text of `corpus` into `folder`, with what was counted beside them."""
    counts = {"tokens": 0, "kept": 0, "unknown": 0, "lines": corpus.lines, "invalid": corpus.invalid}
    bar = tqdm(desc="Tokenizing", total=corpus.lines, unit=" lines", leave=False, mininterval=1, disable=None)
    make_examples = packed_examples if examples == "packed" else line_examples
    for side in ("train", "heldout"):
        lines = encoded_lines(corpus.split(side == "heldout"), vocabulary, counts, bar)
        kept = write_examples(folder / side, make_examples(lines, max_length, random.Random(0)))
        refuse_unknown(counts)
        require(kept > 0, f"too little text: {corpus.lines:,} lines leave nothing for the {side} side")
        counts["kept"] += kept
    write_text(folder / "counts.json", json.dumps(counts))


def encoded_lines(lines: Iterator[str], vocabulary: Vocabulary, counts: dict[str, int], bar: tqdm) -> Iterator[list[int]]:
    """Ids of each line that has any, and [] for the end of a document; adds to `counts`."""
    chunks = iter(lambda: list(islice(lines, CHUNK_LINES)), [])
    with ThreadPoolExecutor(1) as thread:
        jobs = ((chunk, thread.submit(vocabulary.encode, chunk)) for chunk in chunks)
        job = next(jobs, None)
        while job:
            next_job = next(jobs, None)  # tokenized by the thread while this chunk is packed
            chunk, future = job
            # A line without pieces is dropped, because [] marks the end of a document.
            encoded = [ids for line, ids in zip(chunk, future.result(), strict=True) if ids or not line]
            counts["tokens"] += sum(map(len, encoded))
            counts["unknown"] += sum(ids.count(vocabulary.unk) for ids in encoded)
            if counts["tokens"] > 1_000_000:  # before that, a few foreign lines at the beginning could mislead
                refuse_unknown(counts)
            yield from encoded
            bar.update(sum(map(bool, encoded)))
            job = next_job


def refuse_unknown(counts: dict[str, int]) -> None:
    """Raises InputError if most pieces are unknown."""
    require(counts["unknown"] <= counts["tokens"] / 2,
            f"{counts['unknown']:,} of {counts['tokens']:,} word pieces are [UNK]: this vocabulary does not know the "
            "corpus (another language or alphabet?)")


def write_examples(stem: Path, examples: Iterator[Segments]) -> int:
    """Writes `examples` durably to the files that `Store` maps, a chunk at a time; returns the number of pieces."""
    end = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(stem.with_suffix(f".{name}"), "wb")) for name in STORE_DTYPES}
        np.array([0], STORE_DTYPES["ends"]).tofile(files["ends"])
        for chunk in iter(lambda: list(islice(examples, CHUNK_LINES)), []):
            pieces = array("H")
            for first, second in chunk:
                pieces.fromlist(first)
                pieces.fromlist(second)
            pieces.tofile(files["ids"])
            ends = end + np.cumsum([len(first) + len(second) for first, second in chunk])
            ends.astype(STORE_DTYPES["ends"]).tofile(files["ends"])
            np.array([len(first) for first, _ in chunk], STORE_DTYPES["first"]).tofile(files["first"])
            end = int(ends[-1])
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return end


# Batches

class Batch(NamedTuple):
    """Rows as the networks take them."""

    ids: Tensor  # (B, L) int64: [CLS] first segment [SEP] second segment [SEP] [PAD] ...
    segments: Tensor  # (B, L) int64, 1 for the second segment and its [SEP]
    attention_mask: Tensor  # (B, L) bool, false at padding

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def stored_batch(store: Store, numbers: np.ndarray, vocabulary: Vocabulary, max_length: int,
                 full_width: bool = False) -> Batch:
    """The examples (B,) of a store as one batch, with `full_width` always padded to `max_length`."""
    starts = store.ends[numbers]
    return lay_out(store.ids, starts, store.first[numbers].astype(np.int64), store.ends[numbers + 1] - starts,
                   vocabulary, max_length, full_width)


def collate(examples: Sequence[Segments], vocabulary: Vocabulary, max_length: int) -> Batch:
    """Examples in memory as one batch."""
    first = np.array([len(segment) for segment, _ in examples])
    pieces = first + [len(segment) for _, segment in examples]
    ids = np.concatenate([np.asarray(segment, np.int64) for example in examples for segment in example])
    return lay_out(ids, np.cumsum(pieces) - pieces, first, pieces, vocabulary, max_length)


def lay_out(ids: np.ndarray, starts: np.ndarray, first: np.ndarray, pieces: np.ndarray, vocabulary: Vocabulary,
            max_length: int, full_width: bool = False) -> Batch:
    """A batch of B examples, padded to `max_length`, or without `full_width` to the longest row, in multiples of 8.

    Example b has `pieces[b]` pieces from `ids[starts[b]]` on, of which the first `first[b]` are the first segment.
    """
    has_second = pieces > first
    lengths = pieces + np.where(has_second, 3, 2)
    longest = -(-int(lengths.max()) // 8) * 8  # matrix kernels are fastest at multiples of 8
    width = max_length if full_width else min(max_length, longest)
    column = np.arange(width)
    first, lengths = first[:, None], lengths[:, None]
    # A token's place among the pieces: [CLS] comes before them, and the first [SEP] between the segments.
    place = starts[:, None] + column - 1 - (column > first)
    rows = np.asarray(ids).take(place, mode="clip").astype(np.int64)  # (B, L); padding takes whatever follows
    rows[:, 0] = vocabulary.cls
    rows[(column == first + 1) | (column == lengths - 1)] = vocabulary.sep
    attention_mask = column < lengths
    rows[~attention_mask] = vocabulary.pad
    segments = (attention_mask & (column > first + 1)).astype(np.int64)
    return Batch(torch.from_numpy(rows), torch.from_numpy(segments), torch.from_numpy(attention_mask))


class TrainingBatches(torch.utils.data.Dataset):
    """Batch of any training step, by the step's number: every epoch in a new random order, in 4 bytes of memory an example.

    With `by_length`, the examples of POOL_BATCHES batches are sorted by length, cut into batches and these shuffled. With
    `full_width`, every batch has the same shape.
    """

    def __init__(self, store: Store, vocabulary: Vocabulary, max_length: int, batch_size: int, by_length: bool, seed: int,
                 full_width: bool = False):
        self.store, self.vocabulary, self.max_length = store, vocabulary, max_length
        self.batch_size, self.by_length, self.seed, self.full_width = batch_size, by_length, seed, full_width
        self.batches = len(store) // batch_size  # of an epoch; the rest is left to other epochs
        require(self.batches > 0, f"the corpus makes {len(store)} training examples, too little text for one batch of "
                                  f"{batch_size}: add text or lower --batch-size")
        self.epoch, self.order = None, None  # of the batch that was asked for last

    def __getitem__(self, step: int) -> Batch:
        epoch, batch = divmod(step, self.batches)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self.epoch_order(epoch)
        return stored_batch(self.store, self.order[batch], self.vocabulary, self.max_length, self.full_width)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Numbers of the examples in every batch of an epoch (batches, batch size)."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(np.arange(len(self.store), dtype=np.uint32))
        order = order[:self.batches * self.batch_size].reshape(self.batches, self.batch_size)
        if self.by_length:
            for begin in range(0, self.batches, POOL_BATCHES):
                pool = order[begin:begin + POOL_BATCHES].ravel()
                lengths = self.store.ends[pool + 1] - self.store.ends[pool]  # without special tokens
                batches = pool[np.stack(batches_by_length(lengths, self.batch_size))]
                order[begin:begin + POOL_BATCHES] = rng.permutation(batches)
        return order


def batches_by_length(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The numbers 0..N - 1 of examples with these lengths (N,), shortest first, in batches; only the last may be smaller."""
    order = np.argsort(lengths, kind="stable")
    return np.split(order, range(batch_size, len(order), batch_size))


# Masking

class Masked(NamedTuple):
    """What the generator sees and where it predicts."""

    ids: Tensor  # (B, L) int64, with [MASK]
    positions: Tensor  # (B, K) int64, distinct in a row
    chosen: Tensor  # (B, K) bool: slots in use


def maskable(batch: Batch, vocabulary: Vocabulary) -> Tensor:
    """Tokens (B, L) that may be chosen: all but padding, [CLS], [SEP] and [MASK]."""
    allowed = batch.attention_mask
    for special in (vocabulary.pad, vocabulary.cls, vocabulary.sep, vocabulary.mask):
        allowed = allowed & (batch.ids != special)
    return allowed


def mask_tokens(batch: Batch, vocabulary: Vocabulary, mask_prob: float, max_length: int,
                rng: torch.Generator | None = None, kept_prob: float = KEPT_PROB, random_prob: float = 0.0) -> Masked:
    """Chooses and hides tokens as the original does, but without replacement (G, pretrain/pretrain_helpers.py, mask).

    A row of n tokens, [CLS] and [SEP] counted, gets max(1, min(N, round(mask_prob * n))) positions, with N the number of
    slots for `max_length`, and never more than its maskable tokens. Of the chosen tokens a share of `kept_prob` stays
    visible, and a share of `random_prob` becomes random pieces. Works on the batch's device, without waiting for it.
    """
    B, L = batch.ids.shape
    device = batch.ids.device
    slots = max(1, int((mask_prob + SLOT_ROUNDING) * max_length))
    K = min(slots, max(1, math.ceil(mask_prob * L)))  # no row of L tokens needs more
    allowed = maskable(batch, vocabulary)
    counts = (batch.attention_mask.sum(1).float() * mask_prob).round().clamp(1, slots)
    counts = counts.minimum(allowed.sum(1))  # (B,)
    # Each token gets a random number. The K smallest pick the positions; tokens that can't be chosen come last.
    random_keys = torch.rand((B, L), device=device, generator=rng).masked_fill(~allowed, 2.0)
    positions = random_keys.topk(K, largest=False).indices  # (B, K)
    chosen = torch.arange(K, device=device) < counts[:, None]  # (B, K)
    # Most of the chosen tokens become [MASK]. All of them are predicted.
    fate = torch.rand((B, K), device=device, generator=rng)
    tokens = batch.ids.gather(1, positions).masked_fill(chosen & (fate >= kept_prob + random_prob), vocabulary.mask)
    if random_prob:
        pieces = torch.randint(vocabulary.size, (B, K), device=device, generator=rng)
        tokens = tokens.where(~chosen | (fate < kept_prob) | (fate >= kept_prob + random_prob), pieces)
    return Masked(batch.ids.scatter(1, positions, tokens), positions, chosen)


def existing_masks(batch: Batch, vocabulary: Vocabulary) -> Masked:
    """The places where rows hold [MASK] already, and no others."""
    is_mask = batch.ids == vocabulary.mask
    chosen, positions = is_mask.int().topk(int(is_mask.sum(1).max()))
    return Masked(batch.ids, positions, chosen.bool())
