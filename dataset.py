"""Lines of text in, masked pretraining batches out: corpus, vocabulary, examples, token store, batches, masking.

    python dataset.py --wiki PATH ... --books PATH ... --output corpus.txt    # Wikipedia and books to such lines

Shapes: B rows, L tokens a row, K masked slots a row.
"""

import ast
import bz2
import codecs
import contextlib
import gzip
import hashlib
import html
import importlib.metadata
import io
import json
import lzma
import math
import mmap
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import sysconfig
import unicodedata
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby, islice, pairwise, repeat
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from xml.etree import ElementTree

import huggingface_hub
import mwparserfromhell
import numpy as np
import sentencex
import torch
import tyro
from huggingface_hub import constants
from markdown_it import MarkdownIt
from mwparserfromhell import nodes
from mwparserfromhell.wikicode import Wikicode
from pebble import ProcessExpired, ProcessPool
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm

from utils import InputError, locked, replacing, reports_input_errors, shuffled, write_text

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
STDIN = Path("-")
TOKENIZER_FILES = ["tokenizer.json", "vocab.txt", "tokenizer_config.json"]  # one of the first two; what vocab.txt can't say
CASES = {"cased": (False, None), "uncased": (True, None), "uncased-accents": (True, False)}  # wordpiece's last arguments
SEEN = {"e": "uncased: the networks see lower case without accents", "E": "cased: the networks see no accents",
        "é": "uncased: the networks see lower case with accents"}  # by what becomes of É
LONGEST_LINE = 100_000  # characters; the rest of a longer line is read as further lines
CHUNK = 2_048  # lines tokenized, examples written together
GIL_SECONDS = 5e-4  # of a turn in Python of tokenizing and packing; by default it is ten times as long
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
        number, pending, wanted = 0, False, (0 in self.heldout) == heldout
        for line in read_lines(self.paths):
            if line and wanted:
                pending = True
                yield line
            elif not line and pending:
                pending = False
                yield ""
            if bool(line) == self.by_line:
                number += 1
                wanted = (number in self.heldout) == heldout


def read_lines(paths: Iterable[Path]) -> Iterator[str]:
    """Stripped lines of text files (plain, .gz, .bz2, .xz), runs of blank lines as one "", and "" after each file.

    STDIN is standard input. InputError for a file that can't be read.
    """
    for path in paths:
        blank, ended = True, True  # was the last line blank, and read to its end?
        try:
            with (contextlib.nullcontext(standard_input()) if path == STDIN else
                  OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig", errors="replace")) as file:
                for line in iter(partial(file.readline, LONGEST_LINE), ""):
                    text = line.strip()
                    if text or (ended and not blank):
                        yield text
                        blank = not text
                    ended = line.endswith("\n")
        except READ_ERRORS as error:
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


# Conversion: Wikipedia and books to one sentence a line


@dataclass(frozen=True)
class Conversion:
    """Converts Wikipedia and books to one text file: a sentence a line, a blank line after each document."""

    output: str
    """Text file to write; one that is there is not overwritten."""
    wiki: tuple[str, ...] = ()
    """MediaWiki XML dumps, WikiExtractor's output (<doc> or --json), data sets with a column "text" (.parquet, .arrow,
    .jsonl), any of them also as .gz, .bz2 or .xz, folders of them, or a data set's name on the hub with its configuration:
    wikimedia/wikipedia:20231101.en."""
    books: tuple[str, ...] = ()
    """Books as plain text or Markdown, text with a sentence a line, data sets as above, folders of them (there: .txt, .md,
    .parquet, .arrow, .jsonl), or a data set's name on the hub."""
    language: str = "en"
    """Code of the language whose rules split sentences."""
    processes: int = 0
    """Processes that parse and split; 0: one for each core. The output is the same."""


UNIT = 1 << 19  # bytes that a process converts at a time
RECORD_COST = 100  # bytes that a record counts for beside its own
LONGEST_RECORD = 1 << 26  # bytes of a page or row; more is taken as damage
LONGEST_BOOK = 1 << 22  # bytes; longer texts, as BookCorpus in one file, are cut into documents of this size
PATIENCE = 60.0  # seconds for a unit, then for each of its records alone
TOLD = 10  # damages that are named one by one
SEEN_SLOTS = 1 << 24  # digests of documents that are remembered, in 128 MiB: of 14 million all but one in some thousands
SEEN_PROBES = 256

DAMAGED_FILE, DAMAGED, FAILING, HANGING = BROKEN = (
    "files damaged, in part or whole", "pages and rows damaged", "pages on which the parser fails",
    "pages on which the parser hangs or dies")
MARKUP, FRAGMENT = "sentences with formulas or left-over markup", "headings, list entries and fragments"


class Source(NamedTuple):
    """One file, or a data set on the hub."""

    name: str
    path: Path | None
    kind: str  # a key of READERS, or of datasets' readers; "damaged" where not even its beginning can be read
    wiki: bool
    namespaces: str = ""  # regular expression of a dump's own names for those of NO_PROSE


class Found(NamedTuple):
    """A document as a reader finds it, or why it is none."""

    title: str
    paragraphs: list[str]
    dropped: str = ""
    split: bool = False  # the paragraphs are sentences already


class Document(NamedTuple):
    """A document as it is written, or why it isn't."""

    title: str
    text: str  # a sentence a line
    dropped: str
    left_out: Counter  # what isn't in `text`, by its reason


@reports_input_errors
def main(argv: list[str]) -> int:
    settings = tyro.cli(Conversion, args=argv)
    output = Path(settings.output)
    for message, wrong in {
        "nothing to convert: name Wikipedia with --wiki, books with --books": not settings.wiki + settings.books,
        f"--output {output} is there already: delete it or choose another": output.exists(),
        f"--processes {settings.processes} must be at least 0": settings.processes < 0,
    }.items():
        if wrong:
            raise InputError(message)
    sources = [source for name in settings.wiki for source in find_sources(name, True)]
    sources += [source for name in settings.books for source in find_sources(name, False)]
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # without the temporary file, as Ctrl-C
    output.parent.mkdir(parents=True, exist_ok=True)
    size = sum(source.path.stat().st_size for source in sources if source.path)
    with (replacing(output) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file,
          tqdm(desc="Converting", total=size or None, unit="B", unit_scale=True, mininterval=1, disable=None) as bar):
        bundles = (bundle for source in sources for bundle in bundled(source, bar))
        tally = write_documents(file, converted(bundles, settings.processes or cpu_count(), settings.language))
        if not tally["documents"]:
            reasons = ", ".join(f"{count:,} {name}" for name, count in (+tally).most_common())
            raise InputError(f"no document in {', '.join(settings.wiki + settings.books)}; left out: {reasons or 'nothing'}")
    print(f"{output}:")
    for name in ("documents", "sentences", "words"):
        print(f"{tally.pop(name):>16,} {name}")
    print("left out:" if +tally else "nothing was left out")
    for name, count in (+tally).most_common():
        print(f"{count:>16,} {name}")
    return 0


def write_documents(file: TextIO, documents: Iterable[Document]) -> Counter:
    """Writes those that hold text and weren't there before; counts them, their sentences and words, and what is left out."""
    tally, seen = Counter(), SeenDocuments()
    for document in documents:
        tally.update(document.left_out)
        dropped = document.dropped or ("" if seen.add(document.text) else "duplicates of other documents")
        if not dropped:
            file.write(document.text + "\n")
            tally.update(documents=1, sentences=document.text.count("\n"), words=len(document.text.split()))
            continue
        tally[dropped] += 1
        if dropped in BROKEN and sum(tally[reason] for reason in BROKEN) <= TOLD:
            tqdm.write(f"warning: left out of {dropped}: {document.title}", file=sys.stderr)
    return tally


class SeenDocuments:
    """Digests of the documents so far, in memory that doesn't grow; where it is full, old ones are forgotten."""

    def __init__(self) -> None:
        memory = mmap.mmap(-1, 8 * (SEEN_SLOTS + SEEN_PROBES))  # shared: the processes of the pool keep no copies
        self.table = np.frombuffer(memory, np.uint64)
        self.table[:] = 1  # 1: free; written, so that no page comes later

    def add(self, text: str) -> bool:
        """Whether the text is new."""
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) | 2
        probes = self.table[(key >> 2) % SEEN_SLOTS:][:SEEN_PROBES]
        if (probes == key).any():
            return False
        free = np.flatnonzero(probes == 1)
        probes[free[0] if len(free) else (key >> 32) % SEEN_PROBES] = key
        return True


# Its sources


def find_sources(name: str, wiki: bool) -> list[Source]:
    """The files that `name` stands for, in alphabetical order, or a data set; InputError if there is nothing to read."""
    path, flag = Path(name), "--wiki" if wiki else "--books"
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith((".", "_")))
    sources = [Source(name, None, "hub", wiki)]
    if path.exists():
        sources = [source for file in files if (source := find_kind(file, wiki, named=file == path)).kind]
    for number, source in enumerate(sources):
        if READS[source.kind] is read_data_set:
            try:
                open_data_set(source)  # what is wrong with it is told before hours have been spent on others
            except InputError:
                raise
            except Exception:  # Arrow's
                sources[number] = source._replace(kind="damaged")
    if not sources:
        wanted = "a MediaWiki XML dump, WikiExtractor's output" if wiki else "text (.txt), Markdown (.md)"
        raise InputError(f"{flag} {name} holds nothing known: {wanted}, or .parquet, .arrow or .jsonl with a column text")
    return sources


def find_kind(path: Path, wiki: bool, named: bool) -> Source:
    """How a file is to be read, by what it begins with; without a kind for one of another sort."""
    suffix = Path(path.stem if path.suffix in OPENERS else path.name).suffix.lower()
    try:
        head = next(file_chunks(path), b"")
    except READ_ERRORS:
        return Source(str(path), path, "damaged", wiki)
    if kind := {b"PAR1": "parquet", b"\xff\xff\xff\xff": "arrow"}.get(head[:4]):
        return Source(str(path), path, kind, wiki)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.search(rb'"text"\s*:\s*"', text) and (text.startswith(b"{") if wiki else suffix.startswith(".json")):
        return Source(str(path), path, "json", wiki)
    if b"\0" in head and not head.startswith(UTF16_MARKS):  # a picture, an archive, a PDF
        return Source(str(path), path, "", wiki)
    if not wiki:
        kind = "markdown" if suffix in (".md", ".markdown") else "book" if suffix == ".txt" or named else ""
        return Source(str(path), path, kind, wiki)
    if text.startswith(b"<mediawiki") or b"<page>" in text:
        names = re.findall(rf'<namespace key="(?:{"|".join(NO_PROSE)})"[^>]*>([^<]+)<', text.decode(errors="replace"))
        return Source(str(path), path, "dump", wiki, "|".join(map(re.escape, names)))
    return Source(str(path), path, "extracted" if b"<doc " in text else "", wiki)


def file_chunks(path: Path, bar: tqdm | None = None) -> Iterator[bytes]:
    """A file's bytes, unpacked; `bar` follows the place in the file itself."""
    before = 0
    with open(path, "rb") as raw:
        file = OPENERS[path.suffix](raw, "rb") if path.suffix in OPENERS else raw
        while chunk := file.read1(UNIT):
            if bar is not None:
                bar.update(raw.tell() - before)
            before = raw.tell()
            yield chunk


def bundled(source: Source, bar: tqdm) -> Iterator[tuple[Source, list[Any]]]:
    """A source's records (each a Found, or what its reader takes), about a UNIT at a time; damage ends it, as a record."""
    records, size = [], 0
    try:
        for record in READS[source.kind](source, bar):
            records.append(record)
            size += len(record) + RECORD_COST
            if size >= UNIT:
                yield source, records
                records, size = [], 0
    except InputError:
        raise
    except Exception as error:  # of decompressors, Arrow and data sets: each its own type
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        records.append(Found(f"{source.name} ({reason})", [], DAMAGED_FILE))
    if records:
        yield source, records


def read_ended(end: bytes, source: Source, bar: tqdm) -> Iterator[bytes]:
    """A file's stretches up to each `end`; the last one may lack it."""
    rest = b""
    try:
        for chunk in file_chunks(source.path, bar):
            *whole, rest = (rest + chunk).split(end)
            yield from (record + end for record in whole)
            if len(rest) > LONGEST_RECORD:
                yield rest[:UNIT]
                rest = b""
    except READ_ERRORS:
        yield rest
        raise
    yield rest


def read_parts(source: Source, bar: tqdm) -> Iterator[bytes]:
    """A book's text; a longer one's in parts."""
    rest = bytearray()
    try:
        for chunk in file_chunks(source.path, bar):
            rest += chunk
            if len(rest) > LONGEST_BOOK:
                end = rest.rfind(b"\n\n") + 2 if b"\n\n" in rest else rest.rfind(b"\n") + 1 or len(rest)
                yield bytes(rest[:end])
                del rest[:end]
    except READ_ERRORS:
        yield bytes(rest)
        raise
    yield bytes(rest)


def read_json(source: Source, bar: tqdm) -> Iterator[Any]:
    """The texts of a file with a JSON object a line."""
    def rows() -> Iterator[Any]:
        for number, line in enumerate(read_ended(b"\n", source, bar), 1):
            try:
                if line.strip():
                    yield json.loads(line)["text"].encode(errors="ignore").decode()  # without lone surrogates
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                yield Found(f"{source.name}, line {number}", [], DAMAGED)
    return whole_texts(rows(), source.wiki)


def read_data_set(source: Source, bar: tqdm) -> Iterator[Any]:
    """The texts of a data set, streamed."""
    rows = open_data_set(source)
    bar.update(source.path.stat().st_size if source.path else 0)
    return whole_texts((row["text"] or "" for row in rows), source.wiki)


def open_data_set(source: Source) -> Any:
    """A data set's rows; InputError if they have no column "text", or there is no such set here nor on the hub."""
    if source.kind == "parquet":  # datasets' memory grows with the file
        from pyarrow import parquet
        file = parquet.ParquetFile(source.path, pre_buffer=False, buffer_size=UNIT)
        check_columns(source, file.schema_arrow.names)
        return (row for batch in file.iter_batches(256, columns=["text"], use_threads=False) for row in batch.to_pylist())
    import datasets  # here, because it takes two seconds
    if source.path:
        rows = datasets.load_dataset(source.kind, data_files=str(source.path), split="train", streaming=True)
    else:
        name, _, configuration = source.name.partition(":")
        check_hub_name(name, wanted := f"{'--wiki' if source.wiki else '--books'} {source.name} is no file or folder here")
        try:
            reach_hub()
            rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        except Exception as error:  # no network, no such set, no such configuration: each its own type
            raise InputError(f"{wanted}, and the Hugging Face hub gave none ({type(error).__name__}): check its "
                             "name (wikimedia/wikipedia:20231101.en is one) and the network, or name files") from None
    check_columns(source, rows.column_names or ["text"])
    return rows


def check_columns(source: Source, names: list[str]) -> None:
    if "text" not in names:
        raise InputError(f"{source.name} has the columns {', '.join(names)}: \"text\" is wanted")


def whole_texts(rows: Iterator[Any], wiki: bool) -> Iterator[Any]:
    """Articles as they are; of books the rows that are single lines put together, as BookCorpus has them."""
    if wiki:
        yield from rows
        return
    lines, size = [], 0
    for row in rows:
        single = isinstance(row, str) and "\n" not in row.strip()
        if lines and (not single or size > LONGEST_BOOK):
            yield "\n".join(lines)
            lines, size = [], 0
        if not single:
            yield row
            continue
        lines.append(row)
        size += len(row)
    if lines:
        yield "\n".join(lines)


def read_damaged(source: Source, bar: tqdm) -> Iterator[Found]:
    yield Found(source.name, [], DAMAGED_FILE)


READS: dict[str, Callable[[Source, tqdm], Iterator[Any]]] = {
    "dump": partial(read_ended, b"</page>"), "extracted": partial(read_ended, b"</doc>"), "json": read_json,
    "book": read_parts, "markdown": read_parts, "parquet": read_data_set, "arrow": read_data_set, "hub": read_data_set,
    "damaged": read_damaged}


# Its processes


def cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def converted(bundles: Iterator[tuple[Source, list[Any]]], processes: int, language: str) -> Iterator[Document]:
    """The documents of all records in their order. A process that hangs or dies is replaced and costs the record alone."""
    with ProcessPool(processes, context=multiprocessing.get_context("fork")) as pool:
        def send(source: Source, records: list[Any]) -> Any:
            return pool.schedule(convert, args=[source, records, language], timeout=PATIENCE)

        def received(source: Source, records: list[Any], future: Any) -> list[Document]:
            try:
                return future.result()
            except (TimeoutError, ProcessExpired):
                if len(records) == 1:
                    return [Document(record_title(source, records[0]), "", HANGING, Counter())]
                return [document for record in records for document in received(source, [record], send(source, [record]))]

        waiting: deque = deque()
        try:
            for source, records in bundles:
                waiting.append((source, records, send(source, records)))
                if len(waiting) > 2 * processes:
                    yield from received(*waiting.popleft())
            while waiting:
                yield from received(*waiting.popleft())
        except BaseException:
            pool.stop()
            raise


def convert(source: Source, records: list[Any], language: str) -> list[Document]:
    """Records to documents, in a process of the pool."""
    documents = []
    for record in records:
        try:
            found = [record] if isinstance(record, Found) else list(READERS[source.kind](source, record))
            documents += [finished(some, source.wiki, language) for some in found]
        except Exception:  # whatever a page may do to a parser
            documents.append(Document(record_title(source, record), "", FAILING, Counter()))
    return documents


def record_title(source: Source, record: Any) -> str:
    """What a message calls a record."""
    text = record.decode(errors="replace") if isinstance(record, bytes) else str(record)
    text = text.rpartition("<page>")[2][:2_000]
    title = re.search(r"<title>([^<\n]{0,300})</title>|<doc [^>\n]{0,999}?title=\"([^\n]{0,300}?)\">", text)
    return f"{html.unescape(title[1] or title[2])} in {source.name}" if title else source.name


def finished(found: Found, wiki: bool, language: str) -> Document:
    """Sentences of the paragraphs that are prose."""
    lines, left_out = [], Counter()
    for paragraph in found.paragraphs:
        if not found.split and not is_prose(paragraph, SHORTEST_PARAGRAPH if wiki else 1):
            left_out[FRAGMENT] += bool(paragraph)
            continue
        for sentence in [paragraph] if found.split else sentences(paragraph, language):
            if LEFT_OVER.search(sentence):
                left_out[MARKUP] += 1
            elif any(map(str.isalnum, sentence)):
                lines.append(sentence)
    text = "".join(f"{line}\n" for line in lines)
    return Document(found.title, text, found.dropped or ("" if text else "documents without prose"), left_out)


# Its text

# Zero-width and control characters, soft hyphens; line ends of other sorts are folded with the white space
INVISIBLE = dict.fromkeys([*range(9), *range(14, 28), *range(127, 133), *range(134, 160), 0xAD, *range(0x200B, 0x2010),
                           *range(0x202A, 0x202F), *range(0x2060, 0x2065), 0xFEFF])
SHORTEST_PARAGRAPH = 40  # bytes; shorter lines of an article are headings
LONGEST_HEADING = 160
HOLE = "\ufffc"  # where a formula stood; the sentence is left out
LEFT_OVER = re.compile(rf"{HOLE}|\b(?:formula|codice)_\d|\[\[|\]\]|\{{\{{|\}}\}}|\||'''|==|<[A-Za-z/]|&#?\w+;")
BEFORE_NUMBER = re.compile(r"\b(?:art|ch|figs?|nos?|op|pp?|vols?|v|jan|feb|mar|apr|aug|sept?|oct|nov|dec)\.$", re.IGNORECASE)
BEFORE_NAME = re.compile(r"\b(?:M|Mme|Mrs?|Ms|Messrs|Dr|St|Prof|Rev|Hon|Capt|Col|Gen|Lt|Lieut|Maj|Sgt)\.$|^\W*\d+[.)]\W*$")
QUOTATION = re.compile(r"([\"“«])([^\"“”«»]+)([\"”»])")
GAPS = (  # what dropped templates, notes and dashes leave: empty brackets, blanks and commas beside punctuation
    (re.compile(r"\s*(?:[(\[][\s,;:/–-]*[)\]]|\"\"|“”)|^[\s,;:*#]+"), ""), (re.compile(r"([(\[])[\s,;:]+"), r"\1"),
    (re.compile(r"(?<![\s,;])[\s,;]+([)\]])"), r"\1"), (re.compile(r"\s+([,;]|\.(?=\s|$))"), r"\1"),
    (re.compile(r",(?=[,.])"), ""))


def tidy(text: str) -> str:
    """Unicode NFC, entities as characters, white space folded, nothing invisible."""
    text = html.unescape(html.unescape(text)) if "&" in text else text
    return " ".join(unicodedata.normalize("NFC", text.translate(INVISIBLE)).split())


def closed(text: str) -> str:
    """A tidy paragraph without GAPS."""
    text = tidy(text)
    for pattern, replacement in (GAPS[0], *GAPS):  # brackets inside brackets
        text = pattern.sub(replacement, text)
    return text


def is_prose(paragraph: str, shortest: int) -> bool:
    """Whether it ends in punctuation and has `shortest` bytes, or is too long for a heading or an entry of a list."""
    ended = unicodedata.category(paragraph.rstrip(" )]*")[-1:] or "x").startswith("P")
    return len(paragraph) > LONGEST_HEADING or (ended and len(paragraph.encode()) >= shortest)


def sentences(text: str, language: str = "en") -> list[str]:
    """Split by sentencex, and quotations of several sentences too; mended where it splits before a small letter, a name or
    a number."""
    found: list[str] = []
    small = text.islower()
    for part in map(str.strip, sentencex.segment(language, text)):
        if found and ((part[:1].islower() and not small) or BEFORE_NAME.search(found[-1]) or
                      (part[:1].isdigit() and BEFORE_NUMBER.search(found[-1]))):
            found[-1] += f" {part}"
        elif quotation := QUOTATION.fullmatch(part):
            first, *more = sentences(quotation[2], language) or [""]
            found += [quotation[1] + first, *more]
            found[-1] += quotation[3]
        elif part:
            found.append(part)
    return found


# Its articles

NO_PROSE = ("6", "14")  # keys of the namespaces whose links show no prose: files and categories
FILE_NAMES = "File|Image|Media|Category|Bild|Fichier|Imagen|Immagine|Imagem|Изображение"  # of old links in any dump
LANGUAGE_LINK = re.compile(r"[a-z]{2,3}(?:-[a-z]+)*:\S|simple:\S")
COMMENT = re.compile(r"<!--.*?(?:-->|\Z)|<ref\b[^<>]*/>|<ref\b[^<>]*>(?:(?!<ref\b).){0,9999}?</ref\s*>|__[^\W\d_]+__",
                     re.DOTALL | re.IGNORECASE)
HEADING = re.compile(r"^(={1,6})(.+?)\1[ \t]*$", re.MULTILINE)
LIST_SECTIONS = set("""references|external links|see also|notes|notes and references|references and notes|footnotes|
citations|sources|bibliography|further reading|works cited|gallery|einzelnachweise|weblinks|siehe auch|literatur|
notes et références|références|liens externes|voir aussi|примечания|ссылки|см. также|литература|referencias|
enlaces externos|véase también|note|collegamenti esterni|altri progetti|voci correlate|ligações externas|ver também|
referências""".replace("\n", "").split("|"))
CLOSING_SECTIONS = LIST_SECTIONS - {"notes", "sources", "bibliography", "gallery", "note", "literatur", "литература"}
DISAMBIGUATION = re.compile(
    r"\{\{\s*+(?!(?:nota|ver) )(?:[\w –-]+ )?(?:disambig|disambiguation|disamb|dab|hndis|geodis|begriffsklärung|homonymie|"
    r"desambiguación|desambiguação|disambigua|неоднозначность|αποσαφήνιση)(?: page| cleanup)?\s*[|}]|__DISAMBIG__",
    re.IGNORECASE)
MAY_REFER = re.compile(r"[^.]{0,200}\b(?:(?:may|can|could|might) (?:\w+ )?(?:refer to|mean|stand for)|refers to)\b[^.]*:")
# Tags and templates that show no text, or a wrong one without their rules
HOLES = {"math", "mvar", "tmath", "chem", "chem2", "ce", "hiero", "score", "val", "frac", "sfrac", "music", "us$"}
UNSEEN = {"ref", "references", "table", "gallery", "timeline", "imagemap", "graph", "mapframe", "maplink", "source",
          "syntaxhighlight", "pre", "templatestyles", "section", "indicator", "includeonly"}
TEMPLATES = {  # of those inside sentences the most frequent, and what they show of their arguments
    "lang": "{2}", "nowrap": "{1}", "nobr": "{1}", "abbr": "{1}", "as of": "As of {1}", "as of lc": "as of {1}",
    "circa": "c. {1}", "c.": "c. {1}", "nbsp": " ", "snd": " – ", "spaced ndash": " – ", "ndash": "–", "mdash": "—",
    "'": "'", "'s": "'s", "ill": "{1}", "interlanguage link": "{1}", "nihongo": "{1}", "uss": "USS {1}", "hms": "HMS {1}",
    "ss": "SS {1}", "quote": "\n{1}\n", "blockquote": "\n{1}\n", "convert": "{1} {2}", "cvt": "{1} {2}"}
RANGES = {"to", "and", "or", "by", "x", "-", "–"}  # between two values of {{convert}}
HTML_TAG = re.compile(r"</?(?:a|abbr|b|big|blockquote|br|center|cite|code|dd|div|dl|dt|em|font|h\d|hr|i|li|nowiki|ol|p|poem|"
                      r"ref|s|small|span|strike|strong|su[bp]|t[dhrt]|table|tt|u|ul|var)\b[^<>]*>", re.IGNORECASE)
EXTRACTOR_MARK = re.compile(r"^(?:BULLET|INDENT|NUMBERED)::::.*$", re.MULTILINE)


def read_pages(source: Source, record: bytes) -> Iterator[Found]:
    """The page of a MediaWiki dump that ends here; before it, perhaps, the beginnings of damaged ones."""
    head, *pages = record.split(b"<page>")
    broken = pages[:-1] + ([head] if b"<title>" in head else [])
    for page in pages[-1:]:
        try:
            tree = ElementTree.fromstring(b"<page>" + page)
        except ElementTree.ParseError:
            broken.append(page)
            continue
        title, text = tree.findtext("title", ""), "".join(part.text or "" for part in tree.findall("revision/text")[-1:])
        if tree.findtext("ns", "0") != "0":
            yield Found(title, [], "pages of other namespaces")
        elif tree.find("redirect") is not None or re.match(r"\s*#redirect", text, re.IGNORECASE):
            yield Found(title, [], "redirects")
        elif "(disambiguation)" in title or DISAMBIGUATION.search(text):
            yield Found(title, [], "disambiguation pages")
        else:
            yield Found(title, article_paragraphs(wikitext_prose(text, source.namespaces)))
    yield from (Found(record_title(source, page), [], DAMAGED) for page in broken)


def read_extracted(source: Source, record: bytes) -> Iterator[Found]:
    """The article of WikiExtractor's output that ends here; its first line is its title."""
    _, *articles = record.decode(errors="replace").split("<doc ")
    for number, article in enumerate(articles, 1):
        head, _, text = article.replace("\r\n", "\n").partition(">\n")
        title = record_title(source, f"<doc {head}>")
        if number < len(articles) or not text.endswith("</doc>"):
            yield Found(title, [], DAMAGED)
        else:
            yield read_article(title, text.removesuffix("</doc>").partition("\n")[2])


def read_row(source: Source, record: str) -> Iterator[Found]:
    """An article, or what `whole_texts` makes of books."""
    yield from [read_article(record[:80], record)] if source.wiki else read_book(source, record)


def read_article(title: str, text: str) -> Found:
    """An article as plain text, a paragraph or a heading a line."""
    lines = EXTRACTOR_MARK.sub("", text.replace("\nSection::::", "\n")).split("\n")
    ends = (number for number, line in enumerate(lines) if line.strip(" .:").casefold() in CLOSING_SECTIONS)
    paragraphs = article_paragraphs("\n".join(lines[:next(ends, None)]))
    disambiguation = "(disambiguation)" in title or MAY_REFER.fullmatch(next(filter(None, paragraphs), ""))
    return Found(title, paragraphs, "disambiguation pages" if disambiguation else "")


def article_paragraphs(text: str) -> list[str]:
    """Lines without tags and emphasis."""
    return list(map(closed, HTML_TAG.sub("", html.unescape(text)).replace("'''", "").replace("''", "").split("\n")))


def wikitext_prose(text: str, namespaces: str) -> str:
    """What wikitext shows as prose, a paragraph a line, HOLE for formulas; without LIST_SECTIONS."""
    text, parts, start, left_out = COMMENT.sub("", text), [], 0, 0
    for heading in HEADING.finditer(text):
        level = len(heading[1])
        parts += [] if left_out else [text[start:heading.start()]]
        if not left_out or level <= left_out:
            left_out = level if heading[2].strip("' \t").casefold() in LIST_SECTIONS else 0
        start = heading.end()
    parts += [] if left_out else [text[start:]]
    unseen = re.compile(rf"\s*(?:{FILE_NAMES}{namespaces and '|' + namespaces})\s*:", re.IGNORECASE)
    return shown(mwparserfromhell.parse("\n".join(parts)), unseen)


def shown(code: Wikicode, unseen: re.Pattern) -> str:
    """The text that a reader of the page sees, that of nodes inside nodes included."""
    parts = []
    for node in code.nodes:
        if isinstance(node, nodes.Text):
            parts.append(node.value)
        elif isinstance(node, nodes.Wikilink):
            title = str(node.title)
            if not unseen.match(title) and (node.text is not None or not LANGUAGE_LINK.match(title)):
                parts.append(shown(node.text, unseen) if node.text is not None else title.lstrip(":"))
        elif isinstance(node, nodes.ExternalLink) and node.title is not None:
            parts.append(shown(node.title, unseen))
        elif isinstance(node, nodes.HTMLEntity):
            parts.append(html.unescape(str(node)))
        elif isinstance(node, nodes.Template):
            parts.append(shown_template(node, unseen))
        elif isinstance(node, nodes.Tag):
            name = str(node.tag).strip().lower()
            if name in HOLES:
                parts.append(HOLE)
            elif name in ("br", "li", "dd", "dt", "p"):
                parts.append("\n")
            if name not in UNSEEN | HOLES and node.contents is not None:
                parts.append(shown(node.contents, unseen))
    return "".join(parts)


def shown_template(node: nodes.Template, unseen: re.Pattern) -> str:
    """Text of one of TEMPLATES, HOLE for one of HOLES, else nothing."""
    name = str(node.name).strip().casefold()
    name += " lc" * (name == "as of" and node.has("lc"))
    if name not in TEMPLATES:
        return HOLE if name in HOLES else ""
    arguments = {str(argument.name).strip(): shown(argument.value, unseen).strip() for argument in node.params}
    wanted = "{1} {2} {3} {4}" if name in ("convert", "cvt") and arguments.get("2") in RANGES else TEMPLATES[name]
    return re.sub(r"\{(\d)\}", lambda place: arguments.get(place[1], ""), wanted)


# Its books

WIDEST = 100  # characters: text whose lines are mostly shorter is hard-wrapped
SENTENCE_LINES = 500  # by which it is seen whether a text has a sentence a line
GUTENBERG = re.compile(r"\A.*?^(?:\*{3} ?START OF TH[EI]S? PROJECT GUTENBERG.{0,300}?\*{3}|"
                       r"\*END[* ]+THE SMALL PRINT[^\n]*)\s*$|"
                       r"^(?:\*{3} ?END OF TH[EI]S? PROJECT GUTENBERG|End of (?:th(?:e|is) )?Project Gutenberg).*?"
                       r"(?:^\*{3} ?START OF TH[EI]S? PROJECT GUTENBERG[^*]*\*{3}\s*$|\Z)",
                       re.DOTALL | re.MULTILINE | re.IGNORECASE)
CREDITS = re.compile(r"(?:(?:this )?e-?(?:text|book) (?:was )?(?:produced|prepared|transcribed|scanned) by|produced by|"
                     r"transcribed (?:from|by)|transcriber.s note)\b", re.IGNORECASE)
PAGE_NUMBER = re.compile(r"\W*(?:(?:pg|page|p)\.?\s*)?(?:\d{1,4}|[ivxlc]{1,7})\W*", re.IGNORECASE)
PAGE_MARK = re.compile(r"(^[ \t]*)?(?:[\[{](?:\d{1,3}|p(?:g|age)\.?\s*[\divxlc]{1,7})[\]}]|"
                       r"\[(?:illustration|footnote|sidenote)(?:[^\[\]]|\[[^\[\]]{0,99}\]){0,999}\])"
                       r"(?(1)[ \t]*\n|)", re.IGNORECASE | re.MULTILINE)  # with its line, where it stands alone
EMPHASIS = re.compile(r"(?<!\w)_(?=\S)(.{1,999}?)(?<=\S)_(?!\w)", re.DOTALL)
CHAPTER = re.compile(
    r"(?i:(?:chapter|book|part|volume|vol\.|canto|act|scene|section|stave|letter|appendix)\s+(?:the\s+)?(?:[\divxlc]+|one|two|three|"
    r"four|five|six|seven|eight|nine|ten|eleven|twelve|first|second|third|fourth|fifth|last))\b(?![ ,;]+[a-z]).*|"
    r"(?i:(?:table of )?contents|preface|prologue|epilogue|introduction|the end|finis|dedication|(?:list of )?illustrations|"
    r"footnotes?|notes|index|errata)\W*")


def read_book(source: Source, record: bytes | str) -> Iterator[Found]:
    """The paragraphs of a book, or the documents of a text with a sentence a line."""
    text = GUTENBERG.sub("", record if isinstance(record, str) else decoded(record))
    if source.kind == "markdown":
        yield Found(source.name, [closed(p) for p in markdown_paragraphs(text) if not is_heading(p)])
        return
    lines = text.split("\n")
    if has_sentence_lines(lines):
        for blank, some in groupby(lines, lambda line: not line.strip()):
            if not blank:
                yield Found(source.name, list(map(tidy, some)), split=True)
        return
    paragraphs = joined_paragraphs(PAGE_MARK.sub("", text).split("\n"))
    yield Found(source.name, [closed(p) for p in paragraphs if not is_heading(p) and not CREDITS.match(p)])


def decoded(record: bytes) -> str:
    """UTF-8 with or without a mark, UTF-16 with one; lines that are neither are read as Windows' Latin-1."""
    if record.startswith(UTF16_MARKS):
        text = record.decode("utf-16", "replace")
    else:
        try:
            text = record.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = "\n".join(decoded_line(line) for line in record.split(b"\n"))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decoded_line(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return line.decode("cp1252", "replace")


def markdown_paragraphs(text: str) -> list[str]:
    """Paragraphs without headings, code, pictures, links' addresses and emphasis."""
    blanks = {"softbreak": " ", "hardbreak": " "}
    return ["".join(blanks.get(child.type, child.content) for child in token.children
                    if child.type in ("text", "code_inline", *blanks))
            for before, token in pairwise(MarkdownIt().parse(text)) if before.type == "paragraph_open"]


def has_sentence_lines(lines: list[str]) -> bool:
    """Whether most lines are single sentences, as BookCorpus's, rather than paragraphs or parts of one."""
    sample = lines[:SENTENCE_LINES]
    held = [line.strip() for line in sample if line.strip()]
    ended = sum(not line[-1].isalnum() and line[-1] not in ",;" for line in held)
    return (len(held) > 0.8 * len(sample) and ended > 0.8 * len(held)
            and sum(len(sentences(line)) for line in held) < 1.1 * len(held))


def joined_paragraphs(lines: list[str]) -> list[str]:
    """Paragraphs of text whose lines may be hard-wrapped.

    A line goes on in the next one if the next one's first word would not have fitted into it; a paragraph in the next one
    if it is long or the next one begins small, but it has no end: there a page ended.
    """
    lines = [line.rstrip() for before, line in pairwise(["", *lines])
             if not line.strip() or not PAGE_NUMBER.fullmatch(line) or (before.strip() and line.rstrip()[-1] in ".!?”\"")]
    lengths = sorted(len(line) for line in lines if line)
    usual = lengths[len(lengths) * 9 // 10] if lengths else 0
    paragraphs: list[str] = []
    for blank, some in groupby(lines, lambda line: not line.strip()):
        block = [] if blank else list(some)
        widest = max(map(len, block), default=0)
        width = usual if usual <= WIDEST else widest if WIDEST // 2 <= widest <= WIDEST else 0
        for before, line in pairwise(["", *block]):
            ended = paragraphs[-1] if paragraphs else ""
            hyphen = ended.endswith("-") and ended[-2:-1].isalpha()
            full = before and width and len(before) + 1 + len(line.split()[0]) > 0.8 * width
            torn = (ended[-1:].isalnum() or hyphen) and (line.lstrip()[0].islower() or len(ended) > LONGEST_HEADING)
            goes_on = ((full and (before[0].isspace() or not line[0].isspace())) or
                       ((torn or BEFORE_NAME.search(ended)) and not is_heading(ended) and not is_heading(line)))
            if goes_on:
                paragraphs[-1] = ended + ("" if hyphen else " ") + line.strip()
            else:
                paragraphs.append(line.strip())
    return [EMPHASIS.sub(r"\1", paragraph) for paragraph in paragraphs]


def is_heading(paragraph: str) -> bool:
    """A chapter's title: by its words, or short and in capitals."""
    return len(paragraph) <= LONGEST_HEADING and (CHAPTER.fullmatch(paragraph) is not None or
                                      (paragraph.isupper() and paragraph[0] not in "\"“‘'"))


READERS: dict[str, Callable[[Source, Any], Iterator[Found]]] = {
    "dump": read_pages, "extracted": read_extracted, **dict.fromkeys(("json", "parquet", "arrow", "hub"), read_row),
    "book": read_book, "markdown": read_book}


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
    check_hub_name(name, wanted)
    try:
        reach_hub()
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # no network, no such model: each its own type
        with contextlib.suppress(OSError, ValueError):
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        raise InputError(f"{wanted}, and the Hugging Face hub gave none ({type(error).__name__})") from None


def check_hub_name(name: str, wanted: str) -> None:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InputError(f"{wanted}, nor a name on the hub")


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
    """Ids of each line with any, and [] for the end of a document; the next chunks are tokenized while one is packed."""
    def encode(chunk: list[str]) -> list[list[int]]:
        return [ids for line, ids in zip(chunk, vocabulary.encode(chunk), strict=True) if ids or not line]

    before = sys.getswitchinterval()
    with ThreadPoolExecutor(1) as thread, contextlib.ExitStack() as stack:
        sys.setswitchinterval(GIL_SECONDS)
        stack.callback(sys.setswitchinterval, before)
        chunks = iter(lambda: list(islice(lines, CHUNK)), [])
        futures = (thread.submit(encode, chunk) for chunk in chunks)
        ahead = deque(islice(futures, 2))  # two, so that the thread need not wait while lines are read
        while ahead:
            encoded = ahead.popleft().result()
            ahead.extend(islice(futures, 1))
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
    """Writes `examples` to the files that `Store` maps, some at a time, and to the disk."""
    end = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(stem.with_suffix(f".{name}"), "wb")) for name in STORE_FILES}
        np.array([0], STORE_FILES["ends"]).tofile(files["ends"])
        for chunk in iter(lambda: list(islice(examples, CHUNK)), []):
            flat = array("H")
            for first, second in chunk:
                flat.fromlist(first)
                flat.fromlist(second)
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


if __name__ == "__main__":
    sys.exit(main())
