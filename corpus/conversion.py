"""Sources to documents as they are written: records are grouped into work units, which a pool of processes converts."""

import multiprocessing
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import NamedTuple

from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

from corpus.books import parse_book
from corpus.sentences import MARKUP, UNKNOWN_TEMPLATE, is_prose, split_sentences
from corpus.sources import (ENCODING_UNKNOWN, FILE_DAMAGED, FILE_UNKNOWN, RECORD_DAMAGED, RawDocument, Record, Source,
                            read_records)
from corpus.wikipedia import parse_extracted, parse_pages, parse_row, record_title

UNIT_BYTES = 1 << 19  # of records that a process converts at a time
RECORD_OVERHEAD = 100  # bytes that each record counts for on top of its own, so that units of short rows stay small
UNIT_TIMEOUT_S = 60.0  # for a work unit, and then for each of its records alone
SHORTEST_PARAGRAPH = 40  # bytes; a shorter line of an article is taken as a heading or list entry, however it ends

PARSER_FAILED = "pages on which the parser fails"
PARSER_HUNG = "pages on which the parser hangs or dies"
# Reasons that the user should know one by one.
FAULTS = (FILE_UNKNOWN, ENCODING_UNKNOWN, FILE_DAMAGED, RECORD_DAMAGED, PARSER_FAILED, PARSER_HUNG)


class WorkUnit(NamedTuple):
    """Records of one source that one process converts together."""

    source: Source
    records: list[Record]


class Document(NamedTuple):
    """A document as it is written, or the reason why it is left out."""

    title: str
    text: str  # a sentence a line
    reason: str  # why the document is left out; empty if it isn't
    left_out: Counter[str]  # how many of its sentences and paragraphs aren't in `text`, by the reason


def work_units(sources: Iterable[Source], bar: tqdm) -> Iterator[WorkUnit]:
    """The records of the sources, about UNIT_BYTES at a time."""
    for source in sources:
        records: list[Record] = []
        size = 0
        for record in read_records(source, bar):
            records.append(record)
            size += RECORD_OVERHEAD
            if not isinstance(record, RawDocument):
                size += len(record)
            if size >= UNIT_BYTES:
                yield WorkUnit(source, records)
                records, size = [], 0
        if records:
            yield WorkUnit(source, records)


def convert_units(units: Iterable[WorkUnit], processes: int, language: str) -> Iterator[Document]:
    """The documents of all units, in their order. Only the record on which a process hangs or dies is lost."""
    # Forked processes start at once, with everything imported.
    with ProcessPool(processes, context=multiprocessing.get_context("fork")) as pool:
        pending: deque[tuple[WorkUnit, Future]] = deque()
        try:
            for unit in units:
                pending.append((unit, submit(pool, unit, language)))
                # So many wait that no process is idle, and so few that memory stays bounded.
                if len(pending) > 2 * processes:
                    yield from collect(pool, *pending.popleft(), language)
            while pending:
                yield from collect(pool, *pending.popleft(), language)
        except BaseException:
            pool.stop()  # without it, leaving the block would wait for the units that are under way
            raise


def submit(pool: ProcessPool, unit: WorkUnit, language: str) -> Future:
    return pool.schedule(convert_unit, args=[unit, language], timeout=UNIT_TIMEOUT_S)


def collect(pool: ProcessPool, unit: WorkUnit, future: Future, language: str) -> list[Document]:
    """The documents of a unit. If its process hung or died, its records are converted again, each by itself."""
    try:
        return future.result()
    except (TimeoutError, ProcessExpired):
        if len(unit.records) == 1:
            return [Document(record_title(unit.source, unit.records[0]), "", PARSER_HUNG, Counter())]
    documents = []
    for record in unit.records:
        single = WorkUnit(unit.source, [record])
        documents += collect(pool, single, submit(pool, single, language), language)
    return documents


def convert_unit(unit: WorkUnit, language: str) -> list[Document]:
    """The documents of a unit, in a process of the pool; a record on which a parser fails is reported as a document."""
    documents = []
    for record in unit.records:
        try:
            raw_documents = parse_record(unit.source, record, language)
            documents += [make_document(raw, unit.source.is_wiki, language) for raw in raw_documents]
        except Exception:  # a damaged page may raise anything in a parser
            documents.append(Document(record_title(unit.source, record), "", PARSER_FAILED, Counter()))
    return documents


def parse_record(source: Source, record: Record, language: str) -> list[RawDocument]:
    if isinstance(record, RawDocument):
        return [record]
    if not source.is_wiki:
        return list(parse_book(source, record, language))
    parsers = {"dump": parse_pages, "extracted": parse_extracted}  # the other formats have rows
    return list(parsers.get(source.format, parse_row)(source, record))


def make_document(raw: RawDocument, is_wiki: bool, language: str) -> Document:
    """The sentences of the paragraphs that are prose, without those that hold markup or no letter and no digit."""
    lines = []
    left_out: Counter[str] = Counter()
    for paragraph in raw.paragraphs:
        if raw.is_split:
            sentences = [paragraph]
        elif is_prose(paragraph, SHORTEST_PARAGRAPH if is_wiki else 1):
            sentences = split_sentences(paragraph, language)
        else:
            if paragraph:
                left_out["headings, list entries and fragments"] += 1
            continue
        for sentence in sentences:
            if UNKNOWN_TEMPLATE in sentence:
                left_out["sentences with templates that are not known"] += 1
            elif MARKUP.search(sentence):
                left_out["sentences with formulas or left-over markup"] += 1
            elif any(map(str.isalnum, sentence)):
                lines.append(f"{sentence}\n")
    reason = raw.reason or ("" if lines else "documents without prose")
    return Document(raw.title, "".join(lines), reason, left_out)
