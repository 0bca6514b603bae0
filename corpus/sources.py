"""Names on the command line to sources, and sources to records: finding files, recognizing their formats, reading them.

A record is what one parser takes at a time: the bytes of a page or of a text, a row of a data set as a string, or a
RawDocument that only says what was damaged. Reading runs in the main process and parsing in others.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from convert.hub import check_hub_name, reach_hub
from dataset import OPENERS, READ_ERRORS
from utils import InputError, require

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
READ_BYTES = 1 << 19  # of a file at a time
LONGEST_RECORD = 1 << 26  # bytes of a page or row; a longer one is taken as damaged, so that memory stays bounded
LONGEST_TEXT = 1 << 22  # bytes; longer texts (BookCorpus in one file) are cut into documents of about this size
HIDDEN_NAMESPACES = ("6", "14")  # keys of files and categories in any dump: links to them show no prose

FILE_DAMAGED = "files damaged, in part or whole"
RECORD_DAMAGED = "pages and rows damaged"


class Source(NamedTuple):
    """One input file, or one data set on the Hugging Face hub."""

    name: str
    path: Path | None  # None for a data set on the hub
    format: str  # a key of RECORD_READERS
    is_wiki: bool  # true if it was given to --wiki, false if to --books
    hidden_namespaces: str = ""  # regular expression of the names that a dump gives to HIDDEN_NAMESPACES


class RawDocument(NamedTuple):
    """A document as its parser gives it, or the reason why it is left out."""

    title: str
    paragraphs: list[str]
    reason: str = ""  # why the document is left out; empty if it isn't
    is_split: bool = False  # whether the paragraphs are single sentences already


Record = bytes | str | RawDocument


# Finding sources


def find_sources(name: str, is_wiki: bool) -> list[Source]:
    """The files that `name` stands for in alphabetical order, or the data set of that name on the hub.

    InputError if there is nothing to read, or if a data set lacks the column "text".
    """
    path = Path(name)
    if not path.exists():
        candidates = [Source(name, None, "hub", is_wiki)]
    elif path.is_dir():
        visible = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith((".", "_"))]
        candidates = [recognize(file, is_wiki, is_named=False) for file in sorted(visible)]
    else:
        candidates = [recognize(path, is_wiki, is_named=True)]
    sources = [source for source in candidates if source is not None]
    for source in sources:
        check_data_set(source)
    if not sources:
        flag = "--wiki" if is_wiki else "--books"
        formats = "a MediaWiki XML dump, WikiExtractor's output" if is_wiki else "text (.txt), Markdown (.md)"
        raise InputError(f"{flag} {name} holds no file of a known format: expected {formats}, or .parquet, .arrow or "
                         ".jsonl with a column \"text\"")
    return sources


def recognize(path: Path, is_wiki: bool, is_named: bool) -> Source | None:
    """The source that a file is, or None if its format is unknown. `is_named`: the user named this very file."""
    try:
        head = next(read_chunks(path), b"")
    except READ_ERRORS:  # any format will do: read_records fails in the same way and reports it
        return Source(str(path), path, "dump" if is_wiki else "text", is_wiki)
    uncompressed_name = path.stem if path.suffix in OPENERS else path.name
    file_format = recognize_format(head, Path(uncompressed_name).suffix.lower(), is_wiki, is_named)
    if file_format is None:
        return None
    names = find_hidden_namespaces(head) if file_format == "dump" else ""
    return Source(str(path), path, file_format, is_wiki, names)


def recognize_format(head: bytes, suffix: str, is_wiki: bool, is_named: bool) -> str | None:
    """The format of a file, by the bytes at its beginning and, for texts, by its suffix; None if it is unknown."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"\xff\xff\xff\xff"):  # begins every message of an Arrow stream
        return "arrow"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    # WikiExtractor's JSON files have no suffix; a book, on the other hand, may hold such a line in its text.
    may_be_json = text.startswith(b"{") if is_wiki else suffix.startswith(".json")
    if may_be_json and re.search(rb'"text"\s*:\s*"', text):
        return "json"
    if b"\0" in head and not head.startswith(UTF16_MARKS):
        return None  # a picture, an archive, a PDF
    if is_wiki and (text.startswith(b"<mediawiki") or b"<page>" in text):
        return "dump"
    if is_wiki:
        return "extracted" if b"<doc " in text else None
    if suffix in (".md", ".markdown"):
        return "markdown"
    return "text" if suffix == ".txt" or is_named else None


def find_hidden_namespaces(head: bytes) -> str:
    """The names of HIDDEN_NAMESPACES in a dump's own language, from its beginning, as a regular expression."""
    keys = "|".join(HIDDEN_NAMESPACES)
    names = re.findall(rf'<namespace key="(?:{keys})"[^>]*>([^<]+)<', head.decode(errors="replace"))
    return "|".join(map(re.escape, names))


def check_data_set(source: Source) -> None:
    """Opens a data set, so that an InputError comes now rather than when hours have been spent on other sources."""
    if RECORD_READERS[source.format] is not read_data_set:
        return
    try:
        open_data_set(source)
    except InputError:
        raise
    except Exception:  # Arrow raises many types for a damaged file; read_records fails in the same way and reports it
        return


# Reading records


def read_records(source: Source, bar: tqdm) -> Iterator[Record]:
    """The records of a source; one that can't be read to its end gives a last record that says so."""
    records = RECORD_READERS[source.format](source, bar)
    if source.format in ROW_FORMATS and not source.is_wiki:
        records = join_single_lines(records)
    try:
        yield from records
    except InputError:
        raise
    except Exception as error:  # decompressors, Arrow and data sets each raise types of their own
        message = " ".join(f"{type(error).__name__}: {error}".split())
        yield RawDocument(f"{source.name} ({message[:200]})", [], FILE_DAMAGED)


def read_chunks(path: Path, bar: tqdm | None = None) -> Iterator[bytes]:
    """The bytes of a file, decompressed; `bar` advances by the bytes of the file as it is."""
    position = 0
    with open(path, "rb") as raw_file:
        file = OPENERS[path.suffix](raw_file, "rb") if path.suffix in OPENERS else raw_file
        while chunk := file.read1(READ_BYTES):
            if bar is not None:
                bar.update(raw_file.tell() - position)
            position = raw_file.tell()
            yield chunk


def read_until(end: bytes, source: Source, bar: tqdm) -> Iterator[bytes]:
    """The parts of a file up to and with each `end`; the last one may lack it."""
    rest = b""
    try:
        for chunk in read_chunks(source.path, bar):
            *whole, rest = (rest + chunk).split(end)
            for record in whole:
                yield record + end
            if len(rest) > LONGEST_RECORD:
                yield rest[:READ_BYTES]  # enough to name the damaged record
                rest = b""
    except READ_ERRORS:
        if rest:
            yield rest
        raise
    yield rest


def read_text(source: Source, bar: tqdm) -> Iterator[bytes]:
    """A text file as a whole; if it is longer than LONGEST_TEXT, in parts."""
    rest = bytearray()
    try:
        for chunk in read_chunks(source.path, bar):
            rest += chunk
            if len(rest) > LONGEST_TEXT:
                end = last_boundary(rest)
                yield bytes(rest[:end])
                del rest[:end]
    except READ_ERRORS:
        if rest:
            yield bytes(rest)
        raise
    yield bytes(rest)


def last_boundary(text: bytearray) -> int:
    """Where to cut a long text: after its last blank line, else after its last line, else at its end."""
    for boundary in (b"\n\n", b"\n"):
        if boundary in text:
            return text.rfind(boundary) + len(boundary)
    return len(text)


def read_json(source: Source, bar: tqdm) -> Iterator[Record]:
    """The texts of a file that holds a JSON object a line."""
    for number, line in enumerate(read_until(b"\n", source, bar), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"].encode(errors="ignore").decode()  # drops lone surrogates: UTF-8 has none
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            yield RawDocument(f"{source.name}, line {number}", [], RECORD_DAMAGED)
        else:
            yield text


def read_data_set(source: Source, bar: tqdm) -> Iterator[bytes | str]:
    """The texts of a data set, streamed, "" for a missing one. TypeError if the column holds neither strings nor bytes."""
    rows = open_data_set(source)
    if source.path is not None:
        bar.update(source.path.stat().st_size)
    for row in rows:
        text = row["text"] or ""
        if source.is_wiki and isinstance(text, bytes):
            text = text.decode("utf-8", "replace")  # the parser of articles takes strings
        if not isinstance(text, bytes | str):
            raise TypeError(f"expected strings in the column \"text\", found {type(text).__name__}")
        yield text


def open_data_set(source: Source) -> Iterable[dict[str, Any]]:
    """The rows of a data set; InputError if there is none of this name or if it lacks the column "text"."""
    if source.format == "parquet":
        columns, rows = open_parquet(source.path)
    else:
        rows = load_data_set(source)
        columns = rows.column_names or ["text"]  # a streamed set may not know its columns
    require("text" in columns, f"{source.name} has the columns {', '.join(columns)}: expected a column \"text\"")
    return rows


def open_parquet(path: Path) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Columns and rows of a parquet file in constant memory; that of the datasets library grows with the file."""
    from pyarrow import parquet
    file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES)
    columns = file.schema_arrow.names
    batches = file.iter_batches(256, columns=["text"], use_threads=False)
    return columns, (row for batch in batches for row in batch.to_pylist())


def load_data_set(source: Source) -> Any:
    """A data set by the datasets library, streamed; a name on the hub may have a configuration after a colon."""
    import datasets  # not at the top: the import takes two seconds
    if source.path is not None:
        return datasets.load_dataset(source.format, data_files=str(source.path), split="train", streaming=True)
    name, _, configuration = source.name.partition(":")
    missing = f"{'--wiki' if source.is_wiki else '--books'} {source.name} is no file or folder here"
    check_hub_name(name, missing)
    try:
        reach_hub()
        return datasets.load_dataset(name, configuration or None, split="train", streaming=True)
    except Exception as error:  # no network, no such set, no such configuration: each a type of its own
        raise InputError(
            f"{missing}, and it could not be downloaded from the Hugging Face hub ({type(error).__name__}): check the name "
            "(wikimedia/wikipedia:20231101.en is one) and the network, or name files") from None


def join_single_lines(rows: Iterable[Record]) -> Iterator[Record]:
    """The rows of a data set of books; rows that are single lines, as BookCorpus has them, are joined to texts."""
    lines: list[str] = []
    size = 0
    for row in rows:
        is_line = isinstance(row, str) and "\n" not in row.strip()
        if lines and (not is_line or size > LONGEST_TEXT):
            yield "\n".join(lines)
            lines, size = [], 0
        if is_line:
            lines.append(row)
            size += len(row)
        else:
            yield row
    if lines:
        yield "\n".join(lines)


RECORD_READERS: dict[str, Callable[[Source, tqdm], Iterator[Record]]] = {
    "dump": partial(read_until, b"</page>"),
    "extracted": partial(read_until, b"</doc>"),
    "json": read_json,
    "text": read_text,
    "markdown": read_text,
    "parquet": read_data_set,
    "arrow": read_data_set,
    "hub": read_data_set,
}
ROW_FORMATS = ("json", "parquet", "arrow", "hub")
