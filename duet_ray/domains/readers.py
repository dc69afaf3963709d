"""Raw records out of jsonl, json, csv, tsv and parquet files, one at a time, each with its file and line.

A row that cannot be read is a `BadRow` with its place and reason, and reading goes on behind it; only a file that
makes no sense as a whole (not parquet, a JSON array that breaks off) is a `DataError`. Nothing is held but the piece
being read. Lines count from 1 as an editor shows them (a CSV header is line 1); parquet counts its rows from 1.
"""

import codecs
import csv
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from duet_ray.errors import DataError

_CHUNK = 1 << 20
_PARQUET_ROWS = 1024


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, where it stands, and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.reason}"


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file as it stands there, before any format is applied."""

    file: str
    line: int
    data: Mapping[str, Any]


def read_records(
    path: Path, *, name: str | None = None, wanted: Collection[str] | None = None
) -> Iterator[Record | BadRow]:
    """Yield the records of one file in their order.

    Args:
        path: its suffix names the reader: one of `READERS`.
        name: how the file is called in records and messages; its path by default.
        wanted: columns that will be looked at; a columnar reader leaves the others on disk.

    Raises:
        DataError: unknown suffix, or the file as a whole cannot be read.
    """
    name = str(path) if name is None else name
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{name}: unknown kind of file {path.suffix!r}; must be one of {', '.join(READERS)}")
    try:
        yield from reader(path, name, wanted)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{name}: cannot be read: {error}") from error


def _read_jsonl(path: Path, name: str, wanted: Collection[str] | None) -> Iterator[Record | BadRow]:
    # Lines are split as bytes: one line of bad UTF-8 must not take its neighbours with it.
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            content = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
            if content.strip():
                yield _parse_line(content, name, line)


def _parse_line(raw: bytes, name: str, line: int) -> Record | BadRow:
    try:
        data = json.loads(raw.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(name, line, f"not valid UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return BadRow(name, line, f"not valid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        return BadRow(name, line, f"not usable JSON: {error}")
    return _object(data, name, line)


def _object(data: Any, name: str, line: int) -> Record | BadRow:
    if not isinstance(data, dict):
        return BadRow(name, line, f"must be a JSON object, got {type(data).__name__}")
    return Record(name, line, data)


def _read_json(path: Path, name: str, wanted: Collection[str] | None) -> Iterator[Record | BadRow]:
    """An array of objects; or, as many files called .json are, one object a line."""
    with path.open("rb") as file:
        first_line = file.readline().removeprefix(codecs.BOM_UTF8)
        while first_line and not first_line.strip():
            first_line = file.readline()
    if first_line.lstrip()[:1] == b"[":
        yield from _read_array(path, name)
    elif not first_line or isinstance(_parse_line(first_line, name, 1), Record):
        yield from _read_jsonl(path, name, wanted)
    else:
        raise DataError(f"{name}: must hold an array of objects, [{{…}}, {{…}}], or one object a line")


def _read_array(path: Path, name: str) -> Iterator[Record | BadRow]:
    with path.open("r", encoding="utf-8-sig", newline="") as file:
        array = _ArrayReader(file, name)
        try:
            yield from array
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: not valid UTF-8 after line {array.line}: {error.reason}") from None


class _ArrayReader:
    """Takes a JSON array apart element by element, reading on only when an element is not complete yet."""

    def __init__(self, file: IO[str], name: str) -> None:
        self.file, self.name, self.line = file, name, 1
        self.text, self.at, self.ended = "", 0, False
        self.decode = json.JSONDecoder().raw_decode

    def __iter__(self) -> Iterator[Record | BadRow]:
        self._expect("[", "an array")
        if self._peek() == "]":
            return self._close()
        while True:
            self._peek()
            line = self.line
            yield _object(self._element(), self.name, line)
            if self._expect(",]", "',' or ']' after a row") == "]":
                self.at -= 1
                return self._close()

    def _close(self) -> None:
        self._expect("]", "']'")
        if self._peek():
            raise self._broken("text behind the array's end")

    def _peek(self) -> str:
        """The next character that is not white space; "" at the end of the file."""
        while True:
            while self.at < len(self.text):
                character = self.text[self.at]
                if not character.isspace():
                    return character
                self.line += character == "\n"
                self.at += 1
            if not self._more():
                return ""

    def _expect(self, choices: str, what: str) -> str:
        character = self._peek()
        if not character or character not in choices:
            raise self._broken(f"{what} expected, got {character or 'the end of the file'!r}")
        self.at += 1
        return character

    def _element(self) -> Any:
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                # An element that touches the end of what was read may go on behind it (12|34).
                if end < len(self.text) or not self._more():
                    self.line += self.text.count("\n", self.at, end)
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                if not self._more():
                    raise self._broken(f"not valid JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise self._broken(f"not usable JSON: {error}") from None

    def _more(self) -> bool:
        """Read on, twice as much as is held: an element of any size is tried only log(size) times."""
        if self.ended:
            return False
        self.text = self.text[self.at :]
        self.at = 0
        piece = self.file.read(max(_CHUNK, len(self.text)))
        self.text += piece
        self.ended = not piece
        return not self.ended

    def _broken(self, reason: str) -> DataError:
        return DataError(f"{self.name}:{self.line}: {reason}")


def _read_csv(path: Path, name: str, wanted: Collection[str] | None, delimiter: str = ",") -> Iterator[Record | BadRow]:
    # Bytes that are not UTF-8 become lone surrogates here, which the format check refuses: a bad row, not a crash.
    with path.open("r", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                if header is None:
                    raise DataError(f"{name}:{line}: the header is not valid CSV: {error}") from None
                yield BadRow(name, line, f"not valid CSV: {error}")
                continue
            if cells is None:
                return
            if not cells:
                continue
            if header is None:
                header = cells
                if twice := sorted({c for c in header if header.count(c) > 1}):
                    raise DataError(f"{name}:{line}: the header names {', '.join(twice)} more than once")
            elif len(cells) != len(header):
                yield BadRow(name, line, f"has {len(cells)} cells where the header has {len(header)}")
            else:
                yield Record(name, line, dict(zip(header, cells, strict=True)))


def _read_tsv(path: Path, name: str, wanted: Collection[str] | None) -> Iterator[Record | BadRow]:
    return _read_csv(path, name, wanted, delimiter="\t")


def _read_parquet(path: Path, name: str, wanted: Collection[str] | None) -> Iterator[Record | BadRow]:
    with pq.ParquetFile(path) as file:
        columns = [c for c in file.schema_arrow.names if wanted is None or c in wanted] or None
        line = 1
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            yield from batch_records(batch, name, line)
            line += batch.num_rows


def batch_records(batch: pa.RecordBatch, name: str, first: int) -> Iterator[Record | BadRow]:
    """The rows of an Arrow batch as records numbered from `first`."""
    # What Python cannot hold (the year 200,000; an unknown time zone) must not take the other rows with it.
    try:
        rows: list[Mapping[str, Any]] = batch.to_pylist()
    except (ValueError, TypeError, ArithmeticError, LookupError, pa.ArrowException):
        for index in range(batch.num_rows):
            try:
                yield Record(name, first + index, batch.slice(index, 1).to_pylist()[0])
            except UnicodeDecodeError as error:
                yield BadRow(name, first + index, f"not valid UTF-8 at byte {error.start} of a value")
            except (ValueError, TypeError, ArithmeticError, LookupError, pa.ArrowException) as error:
                yield BadRow(name, first + index, f"holds a value that cannot be read: {error}")
        return
    for index, row in enumerate(rows):
        yield Record(name, first + index, row)


_Reader = Callable[[Path, str, Collection[str] | None], Iterator[Record | BadRow]]

READERS: Mapping[str, _Reader] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
"""File suffix → reader."""


def column_names(path: Path) -> list[str]:
    """The columns of a file's schema or header, or of its first record; empty where there is none.

    Raises:
        DataError: the file cannot be read.
    """
    if path.suffix.lower() == ".parquet":
        try:
            return list(pq.read_schema(path).names)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
    return next((list(r.data) for r in read_records(path) if isinstance(r, Record)), [])
