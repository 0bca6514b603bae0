"""Wikipedia and books to one text file: a sentence a line, a blank line after each document, each document once.

    python -m corpus --wiki PATH ... --books PATH ... --output corpus.txt
"""

import hashlib
import mmap
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from tqdm import tqdm

from corpus.conversion import FAULTS, Document, convert_units, work_units
from corpus.sources import Source, find_sources
from utils import InputError, bounded, read_settings, replacing, reports_input_errors, require

NAMED_FAULTS = 10  # faults of each sort that are reported one by one; the summary counts all
HASH_SLOTS = 1 << 24  # in 128 MiB; of 14 million documents all but one in some thousands keep their slots
HASH_PROBES = 256  # slots in which a hash may lie


@dataclass(frozen=True)
class CorpusSettings:
    """Converts Wikipedia and books to one text file: a sentence a line, a blank line after each document."""

    output: str
    """Text file to write; an existing one is not overwritten."""
    wiki: tuple[str, ...] = ()
    """MediaWiki XML dumps, WikiExtractor's output (<doc> or --json), data sets with a column "text" (.parquet, .arrow,
    .jsonl), any of them also as .gz, .bz2 or .xz, folders of them, or the name of a data set on the hub with its
    configuration: wikimedia/wikipedia:20231101.en."""
    books: tuple[str, ...] = ()
    """Books as plain text or Markdown, text with a sentence a line, data sets as above, folders of them (there: .txt,
    .text, .md, .markdown, .parquet, .arrow, .jsonl), or the name of a data set on the hub."""
    language: str = "en"
    """Code of the language by whose rules sentences are split."""
    encoding: str = ""
    """Encoding of the books that are not UTF-8 and have no byte order mark; detected for each file where it isn't
    given."""
    processes: int = bounded(0, at_least=0)
    """Processes that parse and split; 0: one for each core. The output is the same for any number."""


@reports_input_errors
def main(argv: list[str]) -> int:
    settings = read_settings(CorpusSettings, argv)
    output = Path(settings.output)
    names = settings.wiki + settings.books
    require(len(names) > 0, "nothing to convert: name Wikipedia with --wiki, books with --books")
    require(not output.exists(), f"--output {output} already exists: delete it or choose another")
    require(not settings.encoding or is_encoding(settings.encoding),
            f"--encoding {settings.encoding} is not known: expected a name such as windows-1251, shift_jis or gb18030")
    sources: list[Source] = []
    for name in settings.wiki:
        sources += find_sources(name, is_wiki=True)
    for name in settings.books:
        sources += find_sources(name, is_wiki=False, encoding=settings.encoding)
    # SIGTERM, like Ctrl-C, ends in an exception, so that the temporary file is deleted.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    output.parent.mkdir(parents=True, exist_ok=True)
    size = sum(source.path.stat().st_size for source in sources if source.path is not None)
    with (replacing(output) as temporary,
          open(temporary, "w", encoding="utf-8", newline="\n") as file,
          tqdm(desc="Converting", total=size or None, unit="B", unit_scale=True, mininterval=1, disable=None) as bar):
        units = work_units(sources, bar)
        documents = convert_units(units, settings.processes or cpu_count(), settings.language)
        written, left_out = write_documents(file, documents)
        if not written:  # an error inside of the block, so that no empty file takes the name
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())
            raise InputError(f"no document in {', '.join(names)}; left out: {reasons or 'nothing'}")
    print(f"{output}:")
    for name, count in written.items():
        print(f"{count:>16,} {name}")
    print("left out:" if left_out else "nothing was left out")
    for reason, count in left_out.most_common():
        print(f"{count:>16,} {reason}")
    return 0


def is_encoding(name: str) -> bool:
    """Whether Python knows a text encoding of this name."""
    try:
        "a".encode(name)
    except LookupError:
        return False
    return True


def cpu_count() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def write_documents(file: TextIO, documents: Iterable[Document]) -> tuple[Counter[str], Counter[str]]:
    """Writes the documents that hold text and aren't duplicates; reports the first faults of each sort on stderr.

    Returns how many documents, sentences and words were written, and how much was left out by its reason.
    """
    written: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    duplicates = DuplicateFilter()
    for document in documents:
        left_out.update(document.left_out)
        reason = document.reason
        if not reason and not duplicates.add(document.text):
            reason = "duplicates of other documents"
        if not reason:
            file.write(document.text + "\n")
            words = len(document.text.split())
            written.update(documents=1, sentences=document.text.count("\n"), words=words)
            continue
        left_out[reason] += 1
        if reason in FAULTS and left_out[reason] <= NAMED_FAULTS:
            tqdm.write(f"warning: {document.title} is left out: {reason}", file=sys.stderr)
    return written, +left_out


class DuplicateFilter:
    """A hash set of the texts so far, in memory that doesn't grow; where it is full, old texts are forgotten."""

    def __init__(self) -> None:
        # Anonymous shared memory: the processes of the pool, which are forked, don't copy it.
        memory = mmap.mmap(-1, 8 * (HASH_SLOTS + HASH_PROBES))
        self.hashes = np.frombuffer(memory, np.uint64)
        self.hashes[:] = 1  # marks a free slot; writing it takes the memory now rather than when hours have passed

    def add(self, text: str) -> bool:
        """Remembers the text; returns whether it was new."""
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        text_hash = int.from_bytes(digest) | 2  # never 1
        first = (text_hash >> 2) % HASH_SLOTS
        slots = self.hashes[first:first + HASH_PROBES]
        if (slots == text_hash).any():
            return False
        free = np.flatnonzero(slots == 1)
        slot = free[0] if len(free) else (text_hash >> 32) % HASH_PROBES
        slots[slot] = text_hash
        return True


if __name__ == "__main__":
    sys.exit(main())
