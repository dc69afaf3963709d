"""Multiple-choice items out of a file: `{"question": …, "choices": [..], "answer": 1}`, one a row.

`answer` counts from 0. `columns` maps these names to those of the file. A row that cannot be used is an error with
its file and line, and all of them are reported at once: unlike a training row, a missing item changes the task.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duet_ray.domains import BadRow, Record, read_records
from duet_ray.errors import FeedbackError

COLUMNS = ("question", "choices", "answer")
N_SHOWN = 10
"""Bad rows named in a message."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question with its choices."""

    file: str
    line: int
    question: str
    choices: tuple[str, ...]
    answer: int
    """The index of the right choice, from 0."""


def read_items(file: Path, columns: Mapping[str, str]) -> list[Item]:
    """Read every item of a jsonl, json, csv or parquet file. In a CSV cell, `choices` is a JSON list.

    Raises:
        FeedbackError: the column map names a column that is none of `COLUMNS`, or rows cannot be used.
        DataError: the file as a whole cannot be read.
    """
    if unknown := sorted(columns.keys() - set(COLUMNS)):
        raise FeedbackError(
            f"feedback.columns: {', '.join(unknown)}: no such column in format multiple_choice; "
            f"a map goes from ours ({', '.join(COLUMNS)}) to those in your file"
        )
    rows = [record if isinstance(record, BadRow) else _parse(record, columns) for record in read_records(file)]
    if bad := [row for row in rows if isinstance(row, BadRow)]:
        raise FeedbackError(bad_rows(file, bad))
    return [row for row in rows if isinstance(row, Item)]


def bad_rows(file: Path, bad: list[BadRow]) -> str:
    """One message for the rows of a task that cannot be used."""
    more = [f"… and {len(bad) - N_SHOWN} more"] if len(bad) > N_SHOWN else []
    lines = "\n  ".join([str(row) for row in bad[:N_SHOWN]] + more)
    return f"feedback.file: {len(bad)} rows of {file} cannot be used; every row of a task must be sound\n  {lines}"


def _parse(record: Record, columns: Mapping[str, str]) -> Item | BadRow:
    values = {}
    for ours in COLUMNS:
        name = columns.get(ours, ours)
        if record.data.get(name) is None:
            there = ", ".join(map(str, record.data)) or "none"
            return BadRow(record.file, record.line, f"column {name!r} not found or null; columns there: {there}")
        values[ours] = record.data[name]
    choices = _choices(values["choices"])
    if not isinstance(values["question"], str):
        reason = f"question must be text, got {type(values['question']).__name__}"
    elif len(choices) < 2 or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        reason = "choices must be a list of at least two texts, none of them empty"
    elif (answer := _index(values["answer"])) is None or not 0 <= answer < len(choices):
        reason = f"answer must be the index of a choice, 0 to {len(choices) - 1}, got {values['answer']!r}"
    else:
        return Item(
            file=record.file, line=record.line, question=values["question"], choices=tuple(choices), answer=answer
        )
    return BadRow(record.file, record.line, reason)


def _choices(value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return []
    return list(value) if isinstance(value, list | tuple) else []


def _index(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    return value if isinstance(value, int) else None
