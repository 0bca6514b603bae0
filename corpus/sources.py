"""Names on the command line to sources, and sources to records: finding files, recognizing their formats, reading them.

A record is what one parser takes at a time: the bytes of a page or of a text, a row of a data set as a string, or a
RawDocument that only says what was damaged. Reading runs in the main process and parsing in others.
"""

import codecs
import html
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import chardet
from tqdm import tqdm

from convert.hub import check_hub_name, reach_hub
from dataset import OPENERS, READ_ERRORS
from utils import InputError, require

READ_BYTES = 1 << 19  # of a file at a time
LONGEST_RECORD = 1 << 26  # bytes of a page or row; a longer one is taken as damaged, so that memory stays bounded
LONGEST_TEXT = 1 << 22  # characters; longer texts (BookCorpus in one file) are cut into documents of about this size
HIDDEN_NAMESPACES = ("6", "14")  # keys of files and categories in any dump: links to them show no prose
# Names of the namespaces that any wiki understands. Dumps without <ns> name those of their language at the beginning.
NAMESPACES = ("(?:(?:User|Wikipedia|Project|File|Image|MediaWiki|Template|Help|Category|Portal|Draft|Module|Book|"
              "TimedText)(?: talk)?|Talk|Media|Special)")

TEXT_SUFFIXES = {".txt": "text", ".text": "text", ".md": "markdown", ".markdown": "markdown"}
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
# What is not read as text, even if the file is named: tables and markup, by suffix or by their first bytes.
OTHER_SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv", ".html", ".htm", ".xml", ".tex", ".epub", ".tar", ".zip", ".zst")
OTHER_BEGINNING = re.compile(rb"%PDF-|%!PS|\{\\rtf|PK\x03\x04|<!doctype html|<html|<\?xml", re.IGNORECASE)
JSON_BEGINNING = re.compile(rb'\{\s*"[^"\n]*"\s*:')
# The marks at the beginning of a file that tell its encoding; UTF-32 before UTF-16, whose mark its own begins with.
ENCODING_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
                  codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# Encodings that hold all characters of those that the detector names, and more.
SUPERSETS = {"ascii": "cp1252", "iso8859-1": "cp1252", "gb2312": "gb18030", "gbk": "gb18030", "shift_jis_2004": "cp932",
             "shift_jis": "cp932", "euc_kr": "cp949"}
DETECTED_BYTES = 200_000  # of a text by which its encoding is detected
WINDOWS_1252 = "windows-1252 for single bytes"  # name of an error handler: old books mix it with UTF-8

FILE_HIDDEN = "hidden files"
FILE_UNKNOWN = "files of unknown formats"
ENCODING_UNKNOWN = "files whose encoding is not recognized; --encoding names it"
FILE_DAMAGED = "files damaged, in part or whole"
RECORD_DAMAGED = "pages and rows damaged"


class Source(NamedTuple):
    """One input file, or one data set on the Hugging Face hub."""

    name: str
    path: Path | None  # None for a data set on the hub and for a file that isn't read
    format: str  # a key of RECORD_READERS
    is_wiki: bool  # true if it was given to --wiki, false if to --books
    hidden_namespaces: str = ""  # regular expression of the names that a dump gives to HIDDEN_NAMESPACES
    namespaces: str = NAMESPACES  # regular expression of the names of all namespaces that hold no articles
    encoding: str = "utf-8"  # of a text
    reason: str = ""  # why a file isn't read; empty if it is


class RawDocument(NamedTuple):
    """A document as its parser gives it, or the reason why it is left out."""

    title: str
    paragraphs: list[str]
    reason: str = ""  # why the document is left out; empty if it isn't
    is_split: bool = False  # whether the paragraphs are single sentences already


Record = bytes | str | RawDocument


# Finding sources


def find_sources(name: str, is_wiki: bool, encoding: str = "") -> list[Source]:
    """The files that `name` stands for in alphabetical order, or the data set of that name on the hub.

    `encoding` is that of texts which have no mark and are not UTF-8; it is detected where it is empty. Files that can't
    be read are sources with a `reason`. InputError if there is nothing to read, or if a data set lacks the column "text".
    """
    path = Path(name)
    if not path.exists():
        sources = [Source(name, None, "hub", is_wiki)]
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
        sources = [recognize(file, is_wiki, encoding, path) for file in files]
    else:
        sources = [recognize(path, is_wiki, encoding)]
    for source in sources:
        check_data_set(source)
    if all(source.reason for source in sources):
        flag = "--wiki" if is_wiki else "--books"
        formats = "a MediaWiki XML dump, WikiExtractor's output" if is_wiki else "text (.txt), Markdown (.md)"
        counts = Counter(source.reason for source in sources)
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise InputError(f"{flag} {name} holds no file of a known format ({reasons or 'it is empty'}): expected {formats}, "
                         "or .parquet, .arrow or .jsonl with a column \"text\"")
    return sources


def recognize(path: Path, is_wiki: bool, encoding: str, folder: Path | None = None) -> Source:
    """The source that a file is. `folder`: where it was found; None if the user named this very file."""
    unread = Source(str(path), None, "unread", is_wiki, reason=FILE_UNKNOWN)
    if folder is not None and any(part.startswith(".") for part in path.relative_to(folder).parts):
        return unread._replace(reason=FILE_HIDDEN)
    if not path.is_file():  # a link to a folder or to nothing
        return unread
    try:
        head = next(read_chunks(path), b"")
    except READ_ERRORS:  # any format will do: read_records fails in the same way and reports it
        return Source(str(path), path, "dump" if is_wiki else "text", is_wiki)
    uncompressed_name = path.stem if path.suffix.lower() in OPENERS else path.name
    suffix = Path(uncompressed_name).suffix.lower()
    file_format = recognize_format(head, suffix, is_wiki, is_named=folder is None)
    if file_format is None:
        return unread
    source = Source(str(path), path, file_format, is_wiki)
    if file_format == "dump":
        return source._replace(hidden_namespaces="|".join(namespace_names(head, HIDDEN_NAMESPACES)),
                               namespaces="|".join([NAMESPACES, *namespace_names(head)]))
    if file_format in TEXT_SUFFIXES.values():
        encoding = recognize_encoding(head, encoding)
        return source._replace(encoding=encoding) if encoding else unread._replace(reason=ENCODING_UNKNOWN)
    return source


def recognize_format(head: bytes, suffix: str, is_wiki: bool, is_named: bool) -> str | None:
    """The format of a file, by the bytes at its beginning and, for texts, by its suffix; None if it is unknown."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"\xff\xff\xff\xff"):  # begins every message of an Arrow stream
        return "arrow"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    # WikiExtractor's JSON files have no suffix; a book, on the other hand, may hold such a line in its text.
    may_be_json = text.startswith(b"{") if is_wiki else suffix in JSON_SUFFIXES or JSON_BEGINNING.match(text)
    if may_be_json:
        return "json" if re.search(rb'"text"\s*:\s*"', text) else None
    if is_wiki:
        if text.startswith(b"<mediawiki") or b"<page>" in text:
            return "dump"
        return "extracted" if b"<doc " in text else None
    if OTHER_BEGINNING.match(text):
        return None
    is_text = is_named and suffix not in OTHER_SUFFIXES
    return TEXT_SUFFIXES.get(suffix, "text" if is_text else None)


def recognize_encoding(head: bytes, encoding: str) -> str:
    """The encoding of a text by its beginning: by its mark, as UTF-8, else `encoding` or what is detected, or ""."""
    for mark, marked_encoding in ENCODING_MARKS.items():
        if head.startswith(mark):
            return marked_encoding
    detected = detect_encoding(head) if b"\0" in head else ""
    is_wide = detected.startswith(("utf-16", "utf-32"))
    if head.count(0) > 1 + len(head) / 100 and not is_wide:
        return encoding if "utf" in encoding.lower() else ""  # binary
    text = head.replace(b"\0", b"")
    lines = [line for line in text.split(b"\n") if not line.isascii()]
    if (encoding or is_wide) and not lines:
        return encoding or detected
    # The escape character begins Japanese in seven bits. Lines that are not UTF-8 are damaged, or in Windows-1252.
    if b"\x1b" not in text and sum(map(is_utf8, lines)) >= len(lines) / 2:
        return "utf-8"
    if encoding or is_wide:
        return encoding or detected
    return detect_encoding(text if len(text) <= DETECTED_BYTES else b"\n".join(lines))


def detect_encoding(text: bytes) -> str:
    """The encoding in which chardet takes a text to be, or what holds all its characters; "" for what is no text."""
    detected = chardet.detect(text, compat_names=False, max_bytes=DETECTED_BYTES)["encoding"] or ""
    return SUPERSETS.get(detected, detected)


def is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def namespace_names(head: bytes, keys: tuple[str, ...] = ()) -> list[str]:
    """The names that a dump gives to these namespaces, or to all but that of articles, as regular expressions."""
    names = re.findall(r'<namespace key="(-?\d+)"[^>]*>([^<]+)<', head.decode(errors="replace"))
    return [re.escape(html.unescape(name)) for key, name in names if key in keys or (not keys and key != "0")]


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
        opener = OPENERS.get(path.suffix.lower())
        file = opener(raw_file, "rb") if opener else raw_file
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


def read_text(source: Source, bar: tqdm) -> Iterator[str]:
    """A text file as a whole; if it is longer than LONGEST_TEXT, in parts."""
    codecs.register_error(WINDOWS_1252, decode_single_bytes)
    errors = WINDOWS_1252 if source.encoding.startswith("utf-8") else "replace"
    decoder = codecs.getincrementaldecoder(source.encoding)(errors)
    rest = ""
    try:
        for chunk in read_chunks(source.path, bar):
            rest += decoder.decode(chunk)
            if len(rest) > LONGEST_TEXT:
                end = last_boundary(rest)
                yield rest[:end]
                rest = rest[end:]
    except READ_ERRORS:
        if rest:
            yield rest
        raise
    yield rest + decoder.decode(b"", final=True)


def decode_single_bytes(error: UnicodeError) -> tuple[str, int]:
    """What bytes that are not UTF-8 are in Windows-1252, as an error handler of codecs."""
    return error.object[error.start:error.end].decode("cp1252", "replace"), error.end


def last_boundary(text: str) -> int:
    """Where to cut a long text: after its last blank line, else after its last line, else at its end."""
    for boundary in ("\n\n", "\n\r\n", "\n"):
        if boundary in text:
            return text.rfind(boundary) + len(boundary)
    return len(text)


def explain_unread(source: Source, _: tqdm) -> Iterator[RawDocument]:
    """One record that says why a file is not read."""
    yield RawDocument(source.name, [], source.reason)


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


def read_data_set(source: Source, bar: tqdm) -> Iterator[str]:
    """The texts of a data set, streamed, "" for a missing one. TypeError if the column holds neither strings nor bytes."""
    rows = open_data_set(source)
    if source.path is not None:
        bar.update(source.path.stat().st_size)
    for row in rows:
        text = row["text"] or ""
        if isinstance(text, bytes):
            text = text.decode(recognize_encoding(text, "") or "utf-8", "replace")
        if not isinstance(text, str):
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
    "unread": explain_unread,
}
ROW_FORMATS = ("json", "parquet", "arrow", "hub")
