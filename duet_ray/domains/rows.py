"""Tokenised rows on disk: an Arrow IPC file, memory-mapped, so that drawing a mixture only picks row ids.

Opening costs the same for a thousand rows and for ten million; pages are shared by all processes of a machine and
never need to fit in its memory. All record batches but the last have one size, so that row i stands in batch
i // size and no index is kept.
"""

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from duet_ray.domains.encode import EncodedRow
from duet_ray.domains.formats import ParsedRow
from duet_ray.errors import DataError
from duet_ray.records import TokenRow

BATCH_ROWS = 1024

_FIELDS = [
    pa.field("input_ids", pa.large_list(pa.int32())),
    pa.field("loss_mask", pa.large_list(pa.bool_())),
    pa.field("n_tokens", pa.int32()),
    pa.field("file", pa.int32()),
    pa.field("line", pa.int64()),
    pa.field("prompt", pa.large_string()),
    pa.field("completion", pa.large_string()),
    pa.field("text", pa.large_string()),
]
_SCHEMA = pa.schema(_FIELDS)


class RowSet:
    """The rows of one half of a domain, read from disk as they are asked for."""

    def __init__(self, path: Path) -> None:
        """Open a file that `RowWriter` wrote.

        Raises:
            DataError: the file is missing or broken.
        """
        self.path = Path(path)
        try:
            self._file = pa.ipc.open_file(pa.memory_map(str(self.path)))
            metadata = self._file.schema.metadata
            self._files: list[str] = json.loads(metadata[b"files"])
            self._batch_rows = int(metadata[b"batch_rows"])
            full = self._file.num_record_batches - 1
            self._n_rows = full * self._batch_rows + self._batch(full).num_rows if full >= 0 else 0
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.path}: not a file of tokenised rows: {error}") from error

    def __len__(self) -> int:
        return self._n_rows

    def __reduce__(self) -> tuple[type["RowSet"], tuple[Path]]:
        return RowSet, (self.path,)

    @cached_property
    def n_tokens(self) -> np.ndarray:
        """`(n_rows,)` int32: the length of every row."""
        batches = [self._batch(b).column("n_tokens").to_numpy() for b in range(self._file.num_record_batches)]
        return np.concatenate([np.zeros(0, np.int32), *batches])

    def same_rows(self, other: "RowSet") -> bool:
        """Whether the other set holds the same rows of the same sources in the same order, however tokenised."""
        if len(self) != len(other) or self._files != other._files:
            return False
        numbers = range(self._file.num_record_batches)
        columns = ["file", "line", "prompt", "completion"]
        return all(self._batch(b).select(columns).equals(other._batch(b).select(columns)) for b in numbers)

    def row(self, i: int) -> TokenRow:
        """The row with id `i`."""
        return self.rows([i])[0]

    def rows(self, ids: Sequence[int] | np.ndarray) -> list[TokenRow]:
        """Rows in the order asked for; an id may come more than once. The arrays are read-only.

        Raises:
            IndexError: an id is outside 0 … len − 1.
        """
        found: list[TokenRow] = [None] * len(ids)  # type: ignore[list-item]
        for places, batch in self._pick(ids, ["input_ids", "loss_mask"]):
            tokens, mask = batch.column("input_ids"), batch.column("loss_mask")
            ends = tokens.offsets.to_numpy()
            ids_flat = tokens.values.to_numpy()
            mask_flat = mask.values.to_numpy(zero_copy_only=False)
            for row, place in enumerate(places):
                span = slice(ends[row], ends[row + 1])
                found[place] = TokenRow(_frozen(ids_flat[span]), _frozen(mask_flat[span]))
        return found

    def texts(self, ids: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Rows as people read them: `{"row", "source", "line", "prompt", "completion", "text"}`, in the order asked.

        Raises:
            IndexError: an id is outside 0 … len − 1.
        """
        found: list[dict[str, Any]] = [{}] * len(ids)
        for places, batch in self._pick(ids, ["file", "line", "prompt", "completion", "text"]):
            for place, values in zip(places, batch.to_pylist(), strict=True):
                source = self._files[values.pop("file")]
                found[place] = {"row": int(ids[place]), "source": source, **values}
        return found

    def _batch(self, number: int) -> pa.RecordBatch:
        return self._file.get_batch(number)

    def _pick(self, ids: Sequence[int] | np.ndarray, columns: list[str]) -> list[tuple[np.ndarray, pa.RecordBatch]]:
        """Per record batch touched: positions in `ids`, and those rows, in the same order."""
        wanted = np.asarray(ids, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self._n_rows):
            raise IndexError(f"{self.path.name} has rows 0 to {self._n_rows - 1}, got ids {ids!r}")
        numbers, inside = np.divmod(wanted, self._batch_rows)
        order = np.argsort(numbers, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1) if len(order) else []
        return [
            (places, self._batch(int(numbers[places[0]])).select(columns).take(pa.array(inside[places])))
            for places in groups
        ]


class RowWriter:
    """Writes such a file, batch by batch. Use as a context manager; what is written is on the disk at its end."""

    def __init__(self, path: Path, files: Sequence[str]) -> None:
        """Args:
        path: the new file.
        files: names that the column `file` counts into.
        """
        metadata = {"files": json.dumps(list(files), ensure_ascii=False), "batch_rows": str(BATCH_ROWS)}
        self._schema = _SCHEMA.with_metadata(metadata)
        self._sink = path.open("wb")
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        self._waiting: list[pa.RecordBatch] = []
        self.n_rows = 0

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush(final=True)
                self._writer.close()
                self._sink.flush()
                os.fsync(self._sink.fileno())
        finally:
            self._sink.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Append rows, any number of them."""
        self.n_rows += batch.num_rows
        self._waiting.append(batch)
        if sum(b.num_rows for b in self._waiting) >= BATCH_ROWS:
            self._flush(final=False)

    def _flush(self, final: bool) -> None:
        table = pa.Table.from_batches(self._waiting, schema=_SCHEMA).combine_chunks()
        self._waiting = []
        for batch in table.to_batches(max_chunksize=BATCH_ROWS):
            if batch.num_rows == BATCH_ROWS or final:
                self._writer.write_batch(batch.replace_schema_metadata(self._schema.metadata))
            else:
                self._waiting.append(batch)


def to_batch(rows: Sequence[ParsedRow], encoded: Sequence[EncodedRow], files: dict[str, int]) -> pa.RecordBatch:
    """Rows and their tokens as one Arrow batch. `files`: file name → its number."""
    lengths = np.asarray([len(e.tokens) for e in encoded], dtype=np.int32)
    ends = pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    ids = np.concatenate([np.zeros(0, np.int32), *[e.tokens.input_ids for e in encoded]])
    mask = np.concatenate([np.zeros(0, bool), *[e.tokens.loss_mask for e in encoded]])
    columns = [
        pa.LargeListArray.from_arrays(ends, pa.array(ids)),
        pa.LargeListArray.from_arrays(ends, pa.array(mask)),
        pa.array(lengths),
        pa.array([files[r.file] for r in rows], pa.int32()),
        pa.array([r.line for r in rows], pa.int64()),
        pa.array([r.prompt for r in rows], pa.large_string()),
        pa.array([r.completion for r in rows], pa.large_string()),
        pa.array([e.text for e in encoded], pa.large_string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def split_file(path: Path, held_out: np.ndarray, train: Path, validation: Path) -> None:
    """Copy a file of rows into two, batch by batch. `held_out`: `(n_rows,)` bool, True for validation."""
    source = RowSet(path)
    with RowWriter(train, source._files) as kept, RowWriter(validation, source._files) as out:
        for number in range(source._file.num_record_batches):
            batch = source._batch(number)
            first = number * source._batch_rows
            chosen = pa.array(held_out[first : first + batch.num_rows])
            out.write(batch.filter(chosen))
            kept.write(batch.filter(pc.invert(chosen)))


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
