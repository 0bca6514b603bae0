"""Files of rows (.tsv, .csv, .jsonl, .parquet, CoNLL's columns, the hub's data sets) in, records by column out; and back."""

import csv
import io
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tasks.task import Task
from utils import InputError, one_line, replacing, require

CONLLU_COLUMNS = ["id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc"]
INDEX_COLUMNS = ("index", "id")  # of GLUE's files, the first that is there
DOCUMENT_MARK = "-DOCSTART-"  # a line of its own in CoNLL-2003's files
Line = tuple[int, list[str]]  # a line's number and its fields


class Record(NamedTuple):
    """A row by column; of a task of tokens a sentence, with a list in each column."""

    line: int  # number of its first line, or of the row in a file without lines
    values: dict[str, Any]
    problem: str = ""  # why it is malformed


def read_records(path: Path, task: Task, columns: Sequence[str]) -> Iterator[Record]:
    """The records of a file, of which each has at least these `columns` unless it is malformed.

    Raises InputError, with the line, for a file that can't be read, has another format than its suffix says, or lacks a
    column.
    """
    suffix = path.suffix.lower()
    if suffix in READERS:
        return READERS[suffix](path, task, columns)
    if task.kind == "tokens":
        return word_records(path, task, columns)
    require(suffix in SEPARATORS, f"{path}: the format of {suffix or 'a name without a suffix'} is not known: expected "
            f"{', '.join([*SEPARATORS, *READERS])}")
    return separated_records(path, task, columns)


# Lines with separators: .tsv and .csv

SEPARATORS = {".tsv": "\t", ".csv": ","}


def separated_records(path: Path, task: Task, columns: Sequence[str]) -> Iterator[Record]:
    """Records of lines whose fields a separator divides, and of which the first may be the header."""
    lines = separated_lines(path, task)
    first = next(lines, (1, []))
    header, rows = split_header(path, first, lines, task.header, columns)
    if task.label not in columns:  # each row needs an answer
        rows = joined_lines(rows, header)
    for number, fields in rows:
        problem = ""
        if len(fields) != len(header):
            problem = f"{len(fields)} fields, expected {len(header)}"
            if any(field.startswith('"') for field in fields):
                problem += '; if quotation marks surround its fields, write quotes = "fields" in the task'
        yield Record(number, dict(zip(header, fields, strict=False)), problem)


def separated_lines(path: Path, task: Task) -> Iterator[Line]:
    """Fields by line, of the lines that aren't empty."""
    suffix = path.suffix.lower()
    separator = task.separator or SEPARATORS.get(suffix, "\t")
    quoted = task.quotes == "fields" or (task.quotes == "auto" and suffix == ".csv")
    return quoted_lines(path, separator) if quoted else plain_lines(path, separator, task.quotes == "auto")


def joined_lines(rows: Iterator[Line], header: list[str]) -> Iterator[Line]:
    """Rows that a line break within a text has torn, whole again.

    A line with too few fields and no number in the column `index` or `id` is the rest of the row above.
    """
    index = next((header.index(name) for name in INDEX_COLUMNS if name in header), None)
    row = None
    for number, fields in rows:
        is_short = len(fields) < len(header)
        has_number = index is not None and index < len(fields) and fields[index].isdecimal()
        if row and is_short and index is not None and not has_number:
            joined = [*row[1][:-1], f"{row[1][-1]} {fields[0]}", *fields[1:]]
            row = row[0], joined
            continue
        if row:
            yield row
        row = number, fields
    if row:
        yield row


def split_header(path: Path, first: Line, lines: Iterator[Line], header: Sequence[str],
                 columns: Sequence[str]) -> tuple[list[str], Iterator[Line]]:
    """The names of the columns and the other lines; the first line is a header if it names the `columns`."""
    number, fields = first
    if set(columns) <= set(fields):
        header = fields
    elif header:
        lines = itertools.chain([first], lines)
    require_columns(header or fields, columns, f"{path}, line {number}")
    return list(header or fields), lines


def require_columns(names: Sequence[str], columns: Sequence[str], place: str) -> None:
    """Raises InputError unless each of the `columns` is there once."""
    for name in columns:
        count = list(names).count(name)
        hint = ""
        if len(names) == 1:
            hint = "; if another character divides the columns, write separator = in the task"
        if any(column.startswith('"') for column in names):
            hint = '; if quotation marks surround its fields, write quotes = "fields" in the task'
        require(count == 1, f"{place}: the header {', '.join(names)[:200]} has {count} columns {name!r}, expected one. If "
                f"this line is a row already, write header = [names of the columns] in the task{hint}")


def plain_lines(path: Path, separator: str, judging: bool) -> Iterator[Line]:
    """Fields end at separators and nowhere else: quotes are part of a text. If `judging`, fields quoted as in CSV are
    refused."""
    for number, line in text_lines(path):
        if line:
            fields = line.split(separator)
            if judging and '""' in line:
                require(not any(is_quoted(field) for field in fields),
                        f'{path}, line {number}: its quotation marks are doubled as in CSV: write quotes = "fields" in the '
                        'task, or quotes = "text" if they are part of the text')
            yield number, fields


def is_quoted(field: str) -> bool:
    """Whether a field is surrounded by quotation marks and all those in it are doubled, as in CSV."""
    inner = field[1:-1]
    return len(field) > 2 and field[0] == field[-1] == '"' and '""' in inner and '"' not in inner.replace('""', "")


def quoted_lines(path: Path, separator: str) -> Iterator[Line]:
    """Fields as Python's csv module reads them; the number is that of a row's first line."""
    number = 1
    with open_text(path, newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        while True:
            number = reader.line_num + 1
            try:
                fields = next(reader, None)
            except (csv.Error, UnicodeDecodeError) as error:
                raise InputError(f"{path}, line {undecodable_line(path) or number}: it can't be read as CSV: {error}. "
                                 "Is a quotation mark not closed, or the file not UTF-8?") from None
            if fields is None:
                return
            if fields:
                yield number, fields


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines by number, without their ends; InputError, with the line, for a file that can't be read as UTF-8."""
    try:
        with open_text(path, newline="\n") as file:  # a lone \r is part of its field
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {undecodable_line(path)}: it can't be read as UTF-8: {error}") from None


def open_text(path: Path, newline: str) -> io.TextIOWrapper:
    """InputError for a file that can't be opened."""
    try:
        return open(path, encoding="utf-8-sig", newline=newline)
    except OSError as error:
        raise InputError(f"{path} can't be read: {error}") from None


def undecodable_line(path: Path) -> int:
    """Number of the first line that is not UTF-8, 0 if there is none."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return 0


# JSON lines, parquet, the hub


def json_records(path: Path, _: Task, columns: Sequence[str]) -> Iterator[Record]:
    """Records of JSON objects, one a line."""
    seen = False
    for number, line in text_lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: it is not JSON: {error}") from None
        require(isinstance(values, dict), f"{path}, line {number}: expected a JSON object, found {line[:80]}")
        if not seen:
            require_columns(list(values), columns, f"{path}, line {number}")
            seen = True
        missing = [name for name in columns if name not in values]
        yield Record(number, values, f"no {', '.join(missing)}" if missing else "")


def parquet_records(path: Path, _: Task, columns: Sequence[str]) -> Iterator[Record]:
    """Records of a parquet file."""
    import pyarrow.parquet  # imported where it is used
    try:
        file = pyarrow.parquet.ParquetFile(path)
        require_columns(file.schema_arrow.names, columns, str(path))
        rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
        for number, values in enumerate(rows, 1):
            yield Record(number, values)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} can't be read as parquet: {one_line(error)}") from None


def hub_records(rows: Any, source: str, columns: Sequence[str], classes: Sequence[str]) -> Iterator[Record]:
    """Records of a datasets.Dataset. Numbers of classes become their names, unless the task's `classes` are numbers."""
    require_columns(rows.column_names, columns, source)
    names = {}
    for column, feature in rows.features.items():
        feature = getattr(feature, "feature", feature)  # of a list
        if hasattr(feature, "names"):
            names[column] = feature.names

    def named(column: str, value: Any) -> Any:
        if isinstance(value, list):
            return [named(column, item) for item in value]
        is_class = column in names and value is not None and value >= 0  # -1: no label
        return names[column][value] if is_class and str(value) not in classes else value

    for number, row in enumerate(rows, 1):
        yield Record(number, {column: named(column, value) for column, value in row.items()})


# CoNLL's columns: a word a line with its labels, a blank line after each sentence


def word_records(path: Path, task: Task, columns: Sequence[str]) -> Iterator[Record]:
    """A record for each sentence. Without a header the first column holds the words, the last one the labels."""
    is_conllu = path.suffix.lower() == ".conllu"
    lines = word_lines(path, task.separator, is_conllu)
    first = next((line for line in lines if line[1]), (1, []))
    header = list(task.header[:len(first[1])]) or (CONLLU_COLUMNS if is_conllu else numbered_columns(len(first[1]), columns))
    header, lines = split_header(path, first, lines, header, columns)
    for is_blank, group in itertools.groupby(lines, key=lambda line: not line[1]):
        sentence = list(group)
        if is_blank or sentence[0][1][0] == DOCUMENT_MARK:
            continue
        problems = [f"line {number} has {len(fields)} columns, expected {len(header)}" for number, fields in sentence
                    if len(fields) != len(header)]
        words = zip(*(fields for _, fields in sentence), strict=False)
        values = {name: list(column) for name, column in zip(header, words, strict=False)}
        yield Record(sentence[0][0], values, "; ".join(problems[:1]))


def word_lines(path: Path, separator: str, is_conllu: bool) -> Iterator[Line]:
    """The columns of each word, none at a sentence's end; of CoNLL-U without comments, joined words and empty nodes."""
    for number, line in text_lines(path):
        if is_conllu and line.startswith("#"):
            continue
        divides = separator or ("\t" if "\t" in line else None)
        fields = line.split(divides) if line.strip() else []
        if not is_conllu or not fields or fields[0].isdecimal():
            yield number, fields


def numbered_columns(count: int, columns: Sequence[str]) -> list[str]:
    """Names of a file's columns: the words come first, the label, if it is asked for, last, and numbers between them."""
    names = [columns[0], *map(str, range(2, count + 1))]
    if len(columns) > 1 and count > 1:
        names[-1] = columns[1]
    return names[:count]


READERS: dict[str, Callable[[Path, Task, Sequence[str]], Iterator[Record]]] = {
    ".jsonl": json_records, ".ndjson": json_records, ".parquet": parquet_records}


# Writing


def write_records(path: Path, records: Sequence[dict[str, Any]], task: Task) -> None:
    """Writes records in the format of the suffix, as read_records reads them; of a task of tokens columns of words."""
    suffix = path.suffix.lower()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if suffix == ".parquet":
            import pyarrow.parquet  # imported where it is used
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), temporary)
        elif suffix in READERS:
            temporary.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
        elif task.kind == "tokens":
            temporary.write_text("\n".join(map(word_text, records)), "utf-8")
        else:
            temporary.write_text(separated_text(records, task, suffix), "utf-8")


def separated_text(records: Sequence[dict[str, Any]], task: Task, suffix: str) -> str:
    """A header and a line for each record, quoted where the file that was read is."""
    separator = task.separator or SEPARATORS.get(suffix, "\t")
    rows = [list(records[0]), *(list(record.values()) for record in records)]
    if task.quotes == "fields" or (task.quotes == "auto" and suffix == ".csv"):
        text = io.StringIO()
        csv.writer(text, delimiter=separator, lineterminator="\n").writerows(rows)
        return text.getvalue()
    return "".join(separator.join(map(str, row)) + "\n" for row in rows)


def word_text(sentence: dict[str, list[Any]]) -> str:
    """A sentence as CoNLL's columns: a tab between them where a word holds a space."""
    rows = [list(map(str, row)) for row in zip(*sentence.values(), strict=True)]
    separator = "\t" if any(" " in field for row in rows for field in row) else " "
    return "".join(separator.join(row) + "\n" for row in rows)


def text_of(value: Any) -> str:
    """A field as text: nothing for null and for the NaN that stands for it, whole numbers without a point."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def lists_of(values: Iterable[Any]) -> list[str]:
    """A list of fields as texts."""
    return [text_of(value) for value in values]
