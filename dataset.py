"""Lines of text in, masked pretraining batches out: corpus, vocabulary, examples, token store, batches, masking.

Shapes: B rows, L tokens a row, K masked slots a row.
"""

import ast
import bz2
import contextlib
import gzip
import hashlib
import importlib.metadata
import io
import json
import lzma
import math
import os
import random
import re
import shutil
import sys
import sysconfig
import unicodedata
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import huggingface_hub
import numpy as np
import torch
from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm

from utils import InputError, locked, replacing, shuffled, write_text

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
STDIN = Path("-")
TOKENIZER_FILES = ["tokenizer.json", "vocab.txt", "tokenizer_config.json"]  # one of the first two; what vocab.txt can't say
CASES = {"cased": (False, None), "uncased": (True, None), "uncased-accents": (True, False)}  # wordpiece's last arguments
SEEN = {"e": "uncased: the networks see lower case without accents", "E": "cased: the networks see no accents",
        "é": "uncased: the networks see lower case with accents"}  # by what becomes of É
LONGEST_LINE = 100_000  # characters; the rest of a longer line is read as further lines
CHUNK = 1_024  # lines tokenized together
HELDOUT_SHARE = 100  # one document in so many is held out
FEWEST_HELDOUT = 4  # documents; with less than ten times as many, lines are held out instead
LEARNING_LINES = 1_000_000  # of the corpus, evenly spread, from which a vocabulary is learned
UINT16 = 65_536
STORE_VERSION = 3  # part of the cache key: raise it when the examples or their layout change

ONE_SEGMENT = 0.1  # share of examples with a single segment     (google-research/electra,
RANDOM_LENGTH = 0.05  # share of examples with a random target    build_pretraining_dataset.py)
KEPT = 0.15  # share of chosen tokens left as they are (pretrain_helpers.py)
ROUNDING = 0.005  # added to mask_prob for the most masked tokens of a row (configure_pretraining.py)
POOL = 64  # batches whose examples are sorted by length together


# Corpus


class Corpus(NamedTuple):
    """Text files, one sentence a line, and how they divide into training and held-out text."""

    paths: tuple[Path, ...]
    lines: int  # that hold text
    invalid: int  # of them, with bytes that are not UTF-8 (or with U+FFFD, which those are read as)
    by_line: bool  # whether `heldout` numbers lines or documents
    heldout: frozenset[int] | range

    def split(self, heldout: bool) -> Iterator[str]:
        """The lines of one side; "" ends a document (a blank line or a file's end in the corpus)."""
        number, pending = 0, False
        for line in read_lines(self.paths):
            if line and (number in self.heldout) == heldout:
                pending = True
                yield line
            elif not line and pending:
                pending = False
                yield ""
            number += bool(line) if self.by_line else not line


def read_lines(paths: Iterable[Path]) -> Iterator[str]:
    """Stripped lines of text files (plain, .gz, .bz2, .xz), runs of blank lines as one "", and "" after each file.

    STDIN is standard input. InputError for a file that can't be read.
    """
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    for path in paths:
        blank, ended = True, True  # was the last line blank, and read to its end?
        try:
            with (contextlib.nullcontext(standard_input()) if path == STDIN else
                  openers.get(path.suffix, open)(path, "rt", encoding="utf-8-sig", errors="replace")) as file:
                for line in iter(partial(file.readline, LONGEST_LINE), ""):
                    text = line.strip()
                    if text or (ended and not blank):
                        yield text
                        blank = not text
                    ended = line.endswith("\n")
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise InputError(f"text file {path} can't be read: {error}") from None
        if not blank:
            yield ""


def standard_input() -> TextIO:
    """sys.stdin, read as files are: UTF-8, other bytes as U+FFFD."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")
    return sys.stdin


def scan_corpus(paths: tuple[Path, ...]) -> Corpus:
    """Counts the corpus and decides what is held out: 1% of the documents, at least FEWEST_HELDOUT.

    Without blank lines, or with hardly a document, it is a contiguous 1% of the lines, and packing runs through.
    InputError for an empty or binary corpus.
    """
    lines = invalid = ends = 0
    for line in tqdm(read_lines(paths), "Counting lines", unit=" lines", leave=False, mininterval=1, disable=None):
        if "\0" in line:
            raise InputError("the corpus holds NUL bytes, so it is binary: one sentence a line of UTF-8 text is wanted")
        lines += bool(line)
        ends += not line
        invalid += "\ufffd" in line
    if not lines:
        raise InputError(f"no text in {', '.join(map(str, paths))}: one sentence a line is wanted")
    if invalid > lines / 2:
        raise InputError(f"{invalid:,} of {lines:,} lines of the corpus are not UTF-8: convert it, for instance with iconv")
    if ends <= len(paths) or ends < 10 * FEWEST_HELDOUT:
        return Corpus(paths, lines, invalid, True, range(lines - max(lines // HELDOUT_SHARE, min(20, lines // 5)), lines))
    heldout = random.Random(0).sample(range(ends), max(FEWEST_HELDOUT, ends // HELDOUT_SHARE))
    return Corpus(paths, lines, invalid, False, frozenset(heldout))


# The embedded corpus: English documentation that is on every machine where this project runs


def documentation_corpus(cache: Path, requirements: Path) -> Path:
    """A corpus of the docstrings of the standard library and of the packages in `requirements`; built once, cached.

    A document is a module, a line a sentence. Documents and paragraphs met before are dropped.
    """
    names = re.findall(r"^[\w.-]+", requirements.read_text(encoding="utf-8"), re.MULTILINE)
    found = [package for name in names for package in importlib.metadata.distributions(name=name)]
    versions = [f"{package.name} {package.version}" for package in found]
    path = cache / f"documentation-{digest(versions, sys.version, STORE_VERSION)}.txt"
    with locked(path.with_suffix(".lock")):
        if path.exists():
            return path
        library = Path(sysconfig.get_path("stdlib"))
        files = [file for file in sorted(library.rglob("*.py")) if "site-packages" not in file.parts]
        files += sorted({Path(file.locate()) for package in found for file in package.files or () if file.suffix == ".py"})
        files = [file for file in files if not {"test", "tests", "testing", "idlelib"} & set(file.parts)]
        seen: set[str] = set()
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as output, ProcessPoolExecutor() as pool:
            modules = pool.map(docstring_paragraphs, files, chunksize=32)
            for paragraphs in tqdm(modules, "Collecting documentation", len(files), unit=" modules", disable=None):
                fresh = [paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph not in seen]
                seen.update(fresh)
                if fresh:
                    output.write("\n".join(sentence for text in fresh for sentence in sentences(text)) + "\n\n")
    return path


def docstring_paragraphs(path: Path) -> list[str]:
    """Paragraphs of English prose in a Python file's docstrings: no code, no parameter lists, no markup."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    paragraphs = []
    for block in re.split(r"\n\s*\n", "\n\n".join(filter(None, docstrings))):
        if re.search(r">>>|^\s*[-=~^]{3,}\s*$|^\s*[.:]{2} |```", block, re.MULTILINE):  # doctests, headings, directives
            continue
        text = re.sub(r":\w+(?::\w+)*:`~?([^`<]+)(?: <[^>]*>)?`|[`*]+", r"\1", " ".join(block.split()))
        words = re.findall(r"(?<!\S)[A-Za-z][a-z'-]*[.,;:!?)]?(?!\S)", text)
        if len(words) >= 8 and len(words) > 0.8 * len(text.split()):
            paragraphs.append(text)
    return paragraphs


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)


# Vocabulary


class Vocabulary:
    """A WordPiece tokenizer and the ids of its special tokens. InputError if one is missing or ids overflow uint16."""

    def __init__(self, tokenizer: Tokenizer, source: str):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # "[SEP]" in a text is text
        ids = [tokenizer.token_to_id(token) for token in SPECIAL]
        if None in ids:
            raise InputError(f"the vocabulary {source} has no {SPECIAL[ids.index(None)]}: a BERT-like one is wanted")
        self.size = max(tokenizer.get_vocab().values()) + 1
        if self.size > UINT16:
            raise InputError(f"the vocabulary {source} has {self.size:,} pieces, the token store fits {UINT16:,}")
        letter = tokenizer.normalizer.normalize_str("É") if tokenizer.normalizer else "É"
        self.seen = SEEN.get(unicodedata.normalize("NFC", letter), "")  # of case and accents, where anything is lost
        self.tokenizer = tokenizer
        self.pad, self.unk, self.cls, self.sep, self.mask = ids

    def encode(self, lines: list[str]) -> list[list[int]]:
        """Ids of each line, without special tokens."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(lines, add_special_tokens=False)]

    def pieces(self) -> list[str]:
        """Every piece in the order of its id, as vocab.txt has them."""
        return [self.tokenizer.id_to_token(number) or "" for number in range(self.size)]

    def state(self) -> str:
        """All that `from_state` needs, the handling of case and accents included."""
        return self.tokenizer.to_str()

    def to_transformers(self, longest: int) -> dict[str, str]:
        """Files from which transformers' tokenizers give the same pieces, with [CLS] and [SEP] around one or two texts.

        There "[MASK]" in a text is the mask. `longest` is the most pieces that their truncation leaves.
        """
        tokenizer = Tokenizer.from_str(self.state())
        tokenizer.add_special_tokens(SPECIAL)
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", self.sep), ("[CLS]", self.cls))
        tokenizer.decoder = decoders.WordPiece()
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest,  # of every version's
                    "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
        settings |= {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
        if isinstance(tokenizer.normalizer, normalizers.BertNormalizer):  # for ElectraTokenizer, which builds its own
            settings |= {"do_lower_case": tokenizer.normalizer.lowercase,
                         "strip_accents": tokenizer.normalizer.strip_accents,
                         "tokenize_chinese_chars": tokenizer.normalizer.handle_chinese_chars}
        texts = (tokenizer.to_str(pretty=True), "\n".join(self.pieces()) + "\n", json.dumps(settings, indent=1))
        return dict(zip(TOKENIZER_FILES, texts, strict=True))

    @classmethod
    def from_state(cls, state: str, source: str) -> "Vocabulary":
        return cls(Tokenizer.from_str(state), source)


def wordpiece(pieces: dict[str, int], lowercase: bool, strip_accents: bool | None = None) -> Tokenizer:
    """BERT's tokenizer over these pieces; lower case also strips accents, as the original does, if nothing else is said."""
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def learn_vocabulary(corpus: Corpus, size: int, case: str = "uncased") -> Vocabulary:
    """At most `size` word pieces from the training text, in alphabetical order after the special tokens.

    Of the letters the most frequent are known, at most 256 or a sixteenth of `size`: Wikipedia has thousands of rare ones.
    They are given to the trainer as if special, since it numbers letters by chance and breaks ties by number: the same text
    would give another vocabulary each time.
    """
    tokenizer = wordpiece({}, *CASES[case])
    words = Counter()
    for line in islice(corpus.split(False), 0, None, corpus.lines // LEARNING_LINES + 1):
        normalized = tokenizer.normalizer.normalize_str(line)
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized))
    letters = Counter()
    for word, count in words.items():
        letters.update(dict.fromkeys(word, count))
    known = sorted(letters, key=lambda letter: (-letters[letter], letter))[:max(256, size // 16)]
    inner = {letter for word in words for letter in word[1:]} & set(known)
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, limit_alphabet=len(known), initial_alphabet=known, show_progress=False,
        special_tokens=[*SPECIAL, *known, *(f"##{letter}" for letter in sorted(inner))])
    tokenizer.train_from_iterator((word for word, count in words.items() for word in repeat(word, count)), trainer)
    pieces = [*SPECIAL, *sorted(set(tokenizer.get_vocab()) - set(SPECIAL))]
    return Vocabulary(wordpiece({piece: number for number, piece in enumerate(pieces)}, *CASES[case]), "learned")


def load_vocabulary(source: str, case: str = "auto") -> Vocabulary:
    """From a vocab.txt, a folder with a tokenizer.json or vocab.txt, or a name on the Hugging Face hub.

    `case`, a key of CASES, is for a vocab.txt; auto: as found_case has it. InputError if it is given with a tokenizer.json.
    """
    path = Path(source)
    if not path.exists():
        path = hub_folder(source, f"--vocab {source} is no file or folder here", TOKENIZER_FILES)
    if path.is_dir():
        inside = [path / name for name in TOKENIZER_FILES[:2] if (path / name).is_file()]
        if not inside:
            raise InputError(f"--vocab {source} is a folder without tokenizer.json or vocab.txt")
        path = inside[0]
    try:
        if path.suffix == ".json" and case != "auto":
            raise InputError(f"--case {case} is for vocab.txt and learned vocabularies, {path} has a handling of its own: "
                             "leave --case out or name a vocab.txt with --vocab")
        if path.suffix == ".json":
            return Vocabulary(Tokenizer.from_file(str(path)), source)
        pieces = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        tokenizer = wordpiece({piece: number for number, piece in enumerate(pieces)},
                              *(CASES.get(case) or found_case(pieces, path.with_name("tokenizer_config.json"))))
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"--vocab {source} can't be read: {error}") from None
    if len(set(pieces)) < len(pieces):
        twice = next(piece for piece, count in Counter(pieces).items() if count > 1)
        raise InputError(f"--vocab {source} has {twice!r} more than once: one piece a line is wanted")
    return Vocabulary(tokenizer, source)


def found_case(pieces: list[str], settings: Path) -> tuple[bool, bool | None]:
    """Whether to lowercase and to strip accents: as transformers' `settings` beside a vocab.txt say, if they are there.

    Otherwise cased if any piece has a capital letter, with accents if stripping them would change any piece.
    """
    said = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if "do_lower_case" in said:
        return said["do_lower_case"], said.get("strip_accents")
    text = "\n".join(set(pieces) - set(SPECIAL))
    if text != text.lower():
        return CASES["cased"]
    bare = normalizers.BertNormalizer(clean_text=False, handle_chinese_chars=False, strip_accents=True, lowercase=False)
    return CASES["uncased" if bare.normalize_str(text) == text else "uncased-accents"]


def hub_folder(name: str, wanted: str, patterns: list[str]) -> Path:
    """Files of a model on the hub, fetched or from the local cache; InputError, saying what was `wanted`, without any."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InputError(f"{wanted}, nor a name on the hub")
    try:
        reach_hub()
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # no network, no such model: each its own type
        with contextlib.suppress(OSError, ValueError):
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        raise InputError(f"{wanted}, and the Hugging Face hub gave none ({type(error).__name__})") from None


def reach_hub() -> None:
    """Raises at once where the hub is out of reach; its own functions would try for minutes."""
    huggingface_hub.get_session().head(constants.ENDPOINT, timeout=5)


# Examples


Segments = tuple[Sequence[int], Sequence[int]]  # ids of the first and of the second segment, without special tokens


def packed_examples(lines: Iterable[list[int]], max_length: int, rng: random.Random) -> Iterator[Segments]:
    """Lines (an empty one ends a document) as the original's ExampleBuilder makes examples of them.

    Random draws come in its order: the same `rng` and lines give the same examples. Order inside an example can
    change, since a later line that fits goes to the first segment even after the second has begun.
    """
    current: list[list[int]] = []
    length, target = 0, max_length
    for line in lines:
        if line:
            current.append(line)
            length += len(line)
        if not length or (line and length < target):
            continue
        unlimited = rng.random() < ONE_SEGMENT
        first_target = 100_000 if unlimited else (target - 3) // 2  # 3: [CLS] and two [SEP]
        first, second = [], []
        for sentence in current:
            below = len(first) < first_target
            if (not first or len(first) + len(sentence) < first_target
                    or (not second and below and rng.random() < 0.5)):
                first += sentence
            else:
                second += sentence
        first = first[:max_length - 2]
        yield first, second[:max(0, max_length - len(first) - 3)]
        current, length = [], 0
        target = rng.randint(5, max_length) if rng.random() < RANDOM_LENGTH else max_length


def line_examples(lines: Iterable[list[int]], max_length: int, rng: random.Random) -> Iterator[Segments]:
    """Each line one example of one segment."""
    return ((line[:max_length - 2], []) for line in lines if line)


EXAMPLES: dict[str, Callable] = {"packed": packed_examples, "line": line_examples}


# Token store

STORE_FILES = {"ids": np.uint16, "ends": np.int64, "first": np.uint16}


class Store:
    """Examples of one side of the split, memory-mapped; it travels to worker processes by its path.

    `ids` (uint16): both segments of every example, one after the other; `ends` (int64, N + 1): where example n ends and
    n + 1 begins; `first` (uint16, N): length of the first segment.
    """

    def __init__(self, stem: Path):
        self.stem = stem
        self.ids, self.ends, self.first = (np.memmap(stem.with_suffix(f".{name}"), dtype=kind, mode="r")
                                           for name, kind in STORE_FILES.items())

    def __len__(self) -> int:
        return len(self.first)

    def __reduce__(self) -> tuple:
        return Store, (self.stem,)


class Data(NamedTuple):
    """The two sides of a tokenized corpus and what was counted while building them."""

    train: Store
    heldout: Store
    counts: dict[str, int]
    key: str  # names the content of corpus and vocabulary and how they were cut into examples


def corpus_digest(paths: Iterable[Path]) -> str:
    """Changes with any byte of the files; InputError for one that can't be read."""
    total = hashlib.blake2b()
    for path in paths:
        try:
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "blake2b").digest())
        except OSError as error:
            raise InputError(f"corpus file {path} can't be read ({error.strerror}): name text files") from None
    return total.hexdigest()


def digest(*parts: object) -> str:
    """A short name for a cache entry that depends on all `parts`."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def prepare(paths: tuple[Path, ...], source: str | Vocabulary | None, vocab_size: int, max_length: int, kind: str,
            cache: Path, case: str = "auto") -> tuple[Vocabulary, Data]:
    """The vocabulary (from `source`, learned if that is None) and the token store of a corpus, each built once.

    `case` is a key of CASES, or auto: uncased for a learned vocabulary, else as load_vocabulary finds it. Cache entries are
    named by the content of all they depend on and take their name when they are whole. Memory does not grow with the
    corpus. InputError if the text, the vocabulary and `vocab_size` don't fit together.
    """
    content = corpus_digest(paths)
    scan = lru_cache(lambda: scan_corpus(paths))
    if isinstance(source, Vocabulary):
        vocabulary = source
    elif source is None:
        case = "uncased" if case == "auto" else case
        path = cache / f"vocabulary-{digest(content, vocab_size, case, STORE_VERSION)}.json"
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                write_text(path, learn_vocabulary(scan(), vocab_size, case).state())
        vocabulary = Vocabulary.from_state(path.read_text(encoding="utf-8"), str(path))
    else:
        vocabulary = load_vocabulary(source, case)
        if vocabulary.size != vocab_size:
            raise InputError(f"the vocabulary {source} has {vocabulary.size:,} pieces, the model "
                             f"{vocab_size:,}: set --model.vocab-size {vocabulary.size}")
    folder = cache / f"store-{digest(content, vocabulary.state(), max_length, kind, STORE_VERSION)}"
    with locked(folder.with_suffix(".lock")):
        if not folder.exists():
            building = folder.with_suffix(".building")
            shutil.rmtree(building, ignore_errors=True)  # a killed build's
            building.mkdir()
            build_store(building, scan(), vocabulary, max_length, kind)
            building.rename(folder)
    counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    return vocabulary, Data(Store(folder / "train"), Store(folder / "heldout"), counts, folder.name)


def build_store(folder: Path, corpus: Corpus, vocabulary: Vocabulary, max_length: int, kind: str) -> None:
    """Tokenizes both sides of `corpus` into `folder`, with what was counted beside them."""
    counts = dict.fromkeys(("tokens", "kept", "unknown"), 0) | {"lines": corpus.lines, "invalid": corpus.invalid}
    bar = tqdm(desc="Tokenizing", total=corpus.lines, unit=" lines", leave=False, mininterval=1, disable=None)
    for side in ("train", "heldout"):
        lines = encoded_lines(corpus.split(side == "heldout"), vocabulary, counts, bar)
        kept = counts["kept"]
        write_examples(folder / side, EXAMPLES[kind](lines, max_length, random.Random(0)), counts)
        refuse_unknown(counts)
        if counts["kept"] == kept:
            raise InputError(f"too little text: {corpus.lines:,} lines leave nothing for the {side} side")
    (folder / "counts.json").write_text(json.dumps(counts), encoding="utf-8")


def encoded_lines(lines: Iterator[str], vocabulary: Vocabulary, counts: dict[str, int], bar: tqdm) -> Iterator[list[int]]:
    """Ids of each line with any, and [] for the end of a document; the next chunk is tokenized while one is packed."""
    def encode(chunk: list[str]) -> list[list[int]]:
        return [ids for line, ids in zip(chunk, vocabulary.encode(chunk), strict=True) if ids or not line]

    with ThreadPoolExecutor(1) as thread:
        chunks = iter(lambda: list(islice(lines, CHUNK)), [])
        futures = (thread.submit(encode, chunk) for chunk in chunks)
        ahead = next(futures, None)
        while ahead:
            encoded, ahead = ahead.result(), next(futures, None)
            counts["tokens"] += sum(map(len, encoded))
            counts["unknown"] += sum(line.count(vocabulary.unk) for line in encoded)
            if counts["tokens"] > 1_000_000:  # before that a foreign opening may mislead
                refuse_unknown(counts)
            yield from encoded
            bar.update(sum(map(bool, encoded)))


def refuse_unknown(counts: dict[str, int]) -> None:
    if counts["unknown"] > counts["tokens"] / 2:
        raise InputError(f"{counts['unknown']:,} of {counts['tokens']:,} word pieces are [UNK]: this vocabulary does not "
                         "know the corpus (another language or alphabet?)")


def write_examples(stem: Path, examples: Iterator[Segments], counts: dict[str, int]) -> None:
    """Writes `examples` to the files that `Store` maps, a few megabytes at a time, and to the disk."""
    end = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(stem.with_suffix(f".{name}"), "wb")) for name in STORE_FILES}
        np.array([0], STORE_FILES["ends"]).tofile(files["ends"])
        for chunk in iter(lambda: list(islice(examples, 8192)), []):
            flat = array("H")
            for first, second in chunk:
                flat.extend(first)
                flat.extend(second)
            flat.tofile(files["ids"])
            ends = end + np.cumsum([len(first) + len(second) for first, second in chunk])
            ends.astype(STORE_FILES["ends"]).tofile(files["ends"])
            np.array([len(first) for first, _ in chunk], STORE_FILES["first"]).tofile(files["first"])
            end = int(ends[-1])
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    counts["kept"] += end


# Batches


class Batch(NamedTuple):
    """Rows as the models take them."""

    ids: Tensor  # (B, L) int64: [CLS] first [SEP] second [SEP] [PAD] ...
    segments: Tensor  # (B, L) int64, 1 for the second segment and its [SEP]
    mask: Tensor  # (B, L) bool, false at padding

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def collate(examples: Sequence[Segments], vocabulary: Vocabulary, max_length: int) -> Batch:
    """Examples as one batch, padded to the longest row rounded up to a multiple of 8, but not beyond `max_length`."""
    lengths = np.array([len(first) + len(second) + (3 if len(second) else 2) for first, second in examples])
    width = min(max_length, -(-int(lengths.max()) // 8) * 8)
    ids = np.full((len(examples), width), vocabulary.pad, dtype=np.int64)
    segments = np.zeros_like(ids)
    ids[:, 0] = vocabulary.cls
    for row, ((first, second), length) in enumerate(zip(examples, lengths, strict=True)):
        middle = 1 + len(first)
        ids[row, 1:middle] = first
        ids[row, middle] = vocabulary.sep
        if len(second):
            ids[row, middle + 1:length - 1] = second
            ids[row, length - 1] = vocabulary.sep
            segments[row, middle + 1:length] = 1
    mask = np.arange(width) < lengths[:, None]
    return Batch(torch.from_numpy(ids), torch.from_numpy(segments), torch.from_numpy(mask))


class Collator:
    """Examples of a store, by number, as one batch."""

    def __init__(self, store: Store, vocabulary: Vocabulary, max_length: int):
        self.store, self.vocabulary, self.max_length = store, vocabulary, max_length

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Lengths (N,) of examples (N,), special tokens counted."""
        pieces = self.store.ends[numbers + 1] - self.store.ends[numbers]
        return pieces + 2 + (pieces > self.store.first[numbers])

    def __call__(self, numbers: np.ndarray) -> Batch:
        examples = []
        for number in numbers:
            start, end = self.store.ends[number], self.store.ends[number + 1]
            middle = start + int(self.store.first[number])
            examples.append((self.store.ids[start:middle], self.store.ids[middle:end]))
        return collate(examples, self.vocabulary, self.max_length)


class TrainingBatches(torch.utils.data.Dataset):
    """Batch of any training step, by the step's number: every epoch in a new order, all in constant memory.

    Where `by_length`, the examples of POOL batches are sorted by length, cut into batches and those shuffled.
    """

    def __init__(self, collate: Collator, batch_size: int, by_length: bool, seed: int):
        self.collate = collate
        self.size, self.batch_size, self.seed = len(collate.store), batch_size, seed
        self.batches = self.size // batch_size  # an epoch's; what doesn't fill a batch is left to other epochs
        self.by_length, self.pool, self.pooled = by_length, (-1, -1), np.empty(0)
        if not self.batches:
            raise InputError(f"the corpus makes {self.size} training examples, too little text for one batch of "
                             f"{batch_size}: add text or lower --batch-size")

    def __getitem__(self, step: int) -> Batch:
        epoch, batch = divmod(step, self.batches)
        if not self.by_length:
            return self.collate(self.numbers(epoch, batch, batch + 1))
        if self.pool != (epoch, batch // POOL):
            self.pool = epoch, batch // POOL
            self.pooled = self.sorted_pool(*self.pool)
        return self.collate(self.pooled[batch % POOL])

    def numbers(self, epoch: int, first: int, last: int) -> np.ndarray:
        """Examples of batches first..last - 1 of an epoch."""
        return shuffled(np.arange(first * self.batch_size, last * self.batch_size), self.size, (self.seed, epoch))

    def sorted_pool(self, epoch: int, pool: int) -> np.ndarray:
        """Examples (batches, batch size) of a pool."""
        numbers = self.numbers(epoch, pool * POOL, min((pool + 1) * POOL, self.batches))
        numbers = numbers[np.argsort(self.collate.lengths(numbers), kind="stable")].reshape(-1, self.batch_size)
        return np.random.default_rng((self.seed, epoch, pool)).permutation(numbers)


def similar_batches(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """All examples, given by `lengths` (N,), in batches of similar length and random order; only one may be smaller."""
    order = rng.permutation(len(lengths))
    batches = []
    for pool in np.split(order, range(POOL * batch_size, len(order), POOL * batch_size)):
        ordered = pool[np.argsort(lengths[pool], kind="stable")]
        batches += np.split(ordered, range(batch_size, len(ordered), batch_size))
    return [batches[number] for number in rng.permutation(len(batches))]


# Masking


class Masked(NamedTuple):
    """What the generator sees and where it predicts."""

    ids: Tensor  # (B, L) int64, with [MASK]
    positions: Tensor  # (B, K) int64, distinct in a row
    chosen: Tensor  # (B, K) bool: slots in use


def candidates(batch: Batch, vocabulary: Vocabulary) -> Tensor:
    """Tokens (B, L) that may be chosen: all but padding, [CLS], [SEP] and [MASK]."""
    allowed = batch.mask
    for special in (vocabulary.pad, vocabulary.cls, vocabulary.sep, vocabulary.mask):
        allowed = allowed & (batch.ids != special)
    return allowed


def mask_tokens(batch: Batch, vocabulary: Vocabulary, mask_prob: float, max_length: int,
                rng: torch.Generator | None = None) -> Masked:
    """Chooses and hides tokens as the original does, but without replacement (pretrain_helpers.py, mask).

    A row of n tokens, [CLS] and [SEP] counted, gets max(1, min(N, round(mask_prob * n))) positions, with N the most
    for `max_length`, and never more than its candidates: all but special tokens and padding. Of the chosen 85% become
    [MASK], the others stay, to be predicted all the same. Works on the batch's device, without waiting for it.
    """
    B, L = batch.ids.shape
    most = max(1, int((mask_prob + ROUNDING) * max_length))
    slots = min(most, max(1, math.ceil(mask_prob * L)))  # no row needs more
    allowed = candidates(batch, vocabulary)
    wanted = (batch.mask.sum(1).float() * mask_prob).round().clamp(1, most).minimum(allowed.sum(1))
    draws = torch.rand((B, L), device=batch.ids.device, generator=rng).masked_fill(~allowed, 2.0)
    positions = draws.topk(slots, largest=False).indices  # candidates in random order, then the rest
    chosen = torch.arange(slots, device=batch.ids.device) < wanted[:, None]
    hidden = chosen & (torch.rand(positions.shape, device=batch.ids.device, generator=rng) >= KEPT)
    tokens = batch.ids.gather(1, positions)
    return Masked(batch.ids.scatter(1, positions, tokens.masked_fill(hidden, vocabulary.mask)), positions, chosen)


def given_masks(batch: Batch, vocabulary: Vocabulary) -> Masked:
    """The places where rows hold [MASK] already, and no others."""
    hidden = batch.ids == vocabulary.mask
    used, positions = hidden.int().topk(int(hidden.sum(1).max()))
    return Masked(batch.ids, positions, used.bool())


# GLUE

GLUE_URL = "https://gluebenchmark.com/tasks"
BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
COLA_COLUMNS = ["source", "label", "star", "sentence"]  # of its files without a header


class Task(NamedTuple):
    """One task of GLUE as its official files have it."""

    name: str  # of its folder and, unless `tests` says otherwise, of its submission file
    texts: tuple[str, ...]  # columns of the one or two texts
    label: str  # column of the label
    labels: tuple[str, ...]  # classes; none: a real number from 0 to `highest`
    metrics: tuple[str, ...]  # names in Finetuning.METRICS; the first is the one that tables show
    epochs: int = 3  # finetune/configure_finetuning.py
    robust_epochs: int = 3  # 20 for small sets (Zhang et al., 2006.05987; Mosbach et al., 2006.04884)
    both_orders: bool = False  # trained on both orders of a pair (its double_unordered)
    highest: float = 0.0
    dev: dict[str, str] = {"": "dev.tsv"}  # noqa: RUF012  what metrics are called after: file
    tests: dict[str, str] = {}  # noqa: RUF012  submission file: test file; none: that of `name`
    headless: tuple[str, ...] = ()  # files that begin without a header
    model: str = ""  # the task on which its model is trained, where it has no training data

    def test_files(self) -> dict[str, str]:
        return self.tests or {self.name: "test.tsv"}


PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": Task("CoLA", ("sentence",), "label", BINARY, ("matthews", "accuracy"), robust_epochs=20,
                 headless=("train.tsv", "dev.tsv")),
    "sst2": Task("SST-2", ("sentence",), "label", BINARY, ("accuracy",)),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", BINARY, ("accuracy", "f1"), robust_epochs=20,
                 both_orders=True),
    "stsb": Task("STS-B", PAIR, "score", (), ("spearman", "pearson"), 10, 20, both_orders=True, highest=5.0),
    "qqp": Task("QQP", ("question1", "question2"), "is_duplicate", BINARY, ("accuracy", "f1")),
    "mnli": Task("MNLI", PAIR, "gold_label", ("contradiction", "entailment", "neutral"), ("accuracy",),
                 dev={"matched": "dev_matched.tsv", "mismatched": "dev_mismatched.tsv"},
                 tests={"MNLI-m": "test_matched.tsv", "MNLI-mm": "test_mismatched.tsv"}),
    "qnli": Task("QNLI", ("question", "sentence"), "label", ENTAILMENT, ("accuracy",)),
    "rte": Task("RTE", PAIR, "label", ENTAILMENT, ("accuracy",), 10, 20),
    "wnli": Task("WNLI", PAIR, "label", BINARY, ("accuracy",), robust_epochs=20),
    "ax": Task("AX", PAIR, "", ("contradiction", "entailment", "neutral"), (), dev={}, tests={"AX": "diagnostic.tsv"},
               model="mnli"),
}
FOLDER_NAMES = {"diagnostic": "ax", "sts": "stsb", "sst": "sst2"}  # other names in use


class Row(NamedTuple):
    """A row of a GLUE file."""

    index: str
    texts: tuple[str, ...]
    label: float  # number of the class, or the real label; NaN where there is none


def task_key(name: str) -> str:
    """The key in TASKS of a name in any case, with or without dashes; "" for a name of no task."""
    plain = re.sub(r"[-_ ]", "", name.lower())
    plain = FOLDER_NAMES.get(plain, plain)
    return plain if plain in TASKS else ""


def task_folder(data: Path, key: str) -> Path | None:
    """The task's folder in `data`, by its official or a lower-case name."""
    folders = sorted(data.iterdir()) if data.is_dir() else []
    return next((path for path in folders if path.is_dir() and task_key(path.name) == key), None)


def read_rows(path: Path, task: Task, split: str) -> tuple[list[Row], int]:
    """Rows of a GLUE file and how many were skipped; `split` is train, dev or test.

    A malformed row (another number of fields than the header's, or an empty text) of the training file is skipped, of
    the dev file refused, of the test file kept, with what it has. InputError with the line's number for that, a wrong
    header and a label that is not the task's. Fields are split at tabs and nowhere else: quotes are text.
    """
    wanted = [*task.texts, *([task.label] if split != "test" else [])]
    rows, skipped, columns = [], 0, COLA_COLUMNS if path.name in task.headless else None
    for number, fields in tsv_lines(path):
        where = f"{path}, line {number}"
        if columns is None:
            columns = fields
            for name in wanted:
                if columns.count(name) != 1:
                    raise InputError(f"{where}: the header {', '.join(columns)[:200]} has {columns.count(name)} columns "
                                     f"{name!r}, one is wanted, as in the official files ({GLUE_URL})")
            continue
        row = dict(zip(columns, fields, strict=False))
        texts = tuple(row.get(name, "") for name in task.texts)
        malformed = len(fields) != len(columns) or not all(text.strip() for text in texts)
        if malformed and split == "train":
            skipped += 1
            continue
        if malformed and split == "dev":
            raise InputError(f"{where}: {len(fields)} fields where {len(columns)} are wanted, or an empty text: repair it, "
                             "every dev row counts")
        index = row.get("index", row.get("id", ""))
        rows.append(Row(index if index.isdecimal() else str(len(rows)), texts,
                        math.nan if split == "test" else read_label(row[task.label], task, where)))
    if not rows:
        raise InputError(f"{path} has no rows of {task.name}: the official file is wanted ({GLUE_URL})")
    return rows, skipped


def tsv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields of the lines that aren't empty; InputError for a file that can't be read as UTF-8."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:  # a lone \r is part of its field
            for number, line in enumerate(file, 1):
                if line := line.rstrip("\r\n"):
                    yield number, line.split("\t")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read: {error}") from None


def read_label(text: str, task: Task, where: str) -> float:
    """The class's number, or the real label."""
    if task.labels and text in task.labels:
        return float(task.labels.index(text))
    with contextlib.suppress(ValueError):
        if not task.labels and 0 <= float(text) <= task.highest:
            return float(text)
    wanted = ", ".join(task.labels) or f"a number from 0 to {task.highest:g}"
    raise InputError(f"{where}: the label {text!r} is not {task.name}'s, {wanted} is wanted")


def encode_rows(rows: list[Row], vocabulary: Vocabulary, max_length: int, swap: bool = False) -> list[Segments]:
    """Pieces of each row's texts, cut longest first to fit `max_length`; `swap` turns pairs around. uint16 arrays."""
    order = -1 if swap else 1
    examples = []
    for chunk in (rows[start:start + CHUNK] for start in range(0, len(rows), CHUNK)):
        columns = [vocabulary.encode(list(texts)) for texts in zip(*(row.texts[::order] for row in chunk), strict=True)]
        for parts in zip(*columns, strict=True):
            first, second = parts if len(parts) > 1 else (parts[0], [])
            first, second = cut_longest_first(first, second, max_length - (3 if second else 2))
            examples.append((np.array(first, np.uint16), np.array(second, np.uint16)))
    return examples


def cut_longest_first(first: list[int], second: list[int], room: int) -> Segments:
    """Pieces are taken one by one from the end of the longer segment, of the second where both are as long (as G does)."""
    a, b = len(first), len(second)
    while a + b > room:
        a, b = (a - 1, b) if a > b else (a, b - 1)
    return first[:a], second[:b]


def fetch_task(key: str, data: Path) -> Path:
    """Writes a task's files, from the hub's nyu-mll/glue, in the official layout below `data`.

    InputError, saying which files are wanted and who publishes them, where the hub is out of reach.
    """
    task = TASKS[key]
    try:
        reach_hub()
        import datasets  # here, because it takes two seconds
        sets = datasets.load_dataset("nyu-mll/glue", key)
    except Exception as error:  # each failure its own type
        names = [*(["train.tsv"] if task.dev else []), *task.dev.values(), *task.test_files().values()]
        raise InputError(f"no folder {task.name} in {data}, and the hub gave none ({type(error).__name__}): get it from "
                         f"{GLUE_URL} and put {', '.join(names)} into {data / task.name}, or set --data-dir") from None
    building = data / f"{task.name}.building"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    test_name = next(iter(task.test_files().values()))
    for split, rows in sets.items():  # train, validation, test; of MNLI validation_matched ...
        name = test_name if split == "test" else f"{split.replace('validation', 'dev')}.tsv"
        write_task_file(building / name, task, rows)
    return building.rename(data / task.name)


def write_task_file(path: Path, task: Task, rows: Iterable[dict[str, Any]]) -> None:
    """One split from the hub as the official file has it, with the columns that `read_rows` needs."""
    def plain(text: str) -> str:
        return re.sub(r"[\t\r\n]+", " ", text)

    def word(label: float) -> str:
        return rows.features["label"].int2str(label) if task.labels not in ((), BINARY) else str(label)

    names = [name for name in rows.column_names if name not in ("label", "idx")]  # of the texts, in their order
    test = path.name in task.test_files().values()
    headless = path.name in task.headless
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        if not headless:
            print("index", *task.texts, *([] if test else [task.label]), sep="\t", file=file)
        for number, row in enumerate(rows):
            texts = [plain(row[name]) for name in names]
            fields = ["", row["label"], "", *texts] if headless else [number, *texts]
            print(*fields, *([] if test or headless else [word(row["label"])]), sep="\t", file=file)
