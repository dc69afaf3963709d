"""Raw records → prompts and completions: the formats a study file can name.

| format | columns | becomes |
|---|---|---|
| prompt_completion | prompt, completion (or response) | one question, one answer |
| alpaca | instruction, input (may be missing), output | one question, one answer |
| messages | messages: list of {role, content} | a conversation |
| sharegpt | conversations: list of {from, value} | a conversation |
| text | text | text alone, every token of it learned |
| multiple_choice | question, choices (a list), answer, labels (may be missing) | question, the right choice's text |

`answer` of a multiple choice is one of `labels`, where there are any, else an index from 0.

A column map (`columns: {prompt: question}`) says where our column stands in the user's file: by a column's name; by a
path into a nested one (`answer.value`, which goes through lists: `answers.text` of a list of answers is the list of
their texts); or by a text with such names in braces (`"Question: {question}\\nAnswer:"`), in which a list stands as
one line an item. What does not fit is a bad row with its reason; a column that no row has is one error, not as many
bad rows as there are rows.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from duet_ray.config import DataFormat
from duet_ray.domains.readers import BadRow, Record, column_names, read_records
from duet_ray.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]

COLUMNS: Mapping[DataFormat, tuple[str, ...]] = {
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "input", "output"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "text": ("text",),
    "multiple_choice": ("question", "choices", "answer", "labels"),
}
"""Format → its columns, as they are called when no map is given."""

_OPTIONAL = {("alpaca", "input"), ("multiple_choice", "labels")}
_ALIASES = {("prompt_completion", "completion"): "response"}

_PLACE = re.compile(r"\{([^{}]+)\}")
"""A column in a text of columns."""

_SHAREGPT_ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
_ROLES: Mapping[str, Role] = {role: role for role in get_args(Role)}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRow:
    """A row that its format accepts, not yet tokenised."""

    file: str
    line: int
    form: Literal["pair", "chat", "text"]
    """`pair`: one question and its answer; `chat`: any conversation; `text`: no question at all."""
    messages: tuple[Message, ...]
    """All turns; for `text` a single assistant turn, since all of it is learned."""

    @property
    def prompt(self) -> str:
        """What stands before the last answer, for people to read: turns labelled when there are several."""
        before = self.messages[: self._last_answer]
        if self.form != "chat":
            return "".join(m.content for m in before)
        return "\n".join(f"{m.role}: {m.content}" for m in before)

    @property
    def completion(self) -> str:
        """The last answer; for `text` all of the text."""
        return self.messages[self._last_answer].content

    @property
    def _last_answer(self) -> int:
        return max(i for i, m in enumerate(self.messages) if m.role == "assistant")

    @property
    def key(self) -> int:
        """64 bits of the row's content: rows with the same turns have the same key, whatever their format."""
        digest = hashlib.blake2b(digest_size=8)
        for message in self.messages:
            content = message.content.encode()
            digest.update(f"{message.role}:{len(content)}:".encode() + content)
        return int.from_bytes(digest.digest(), "big")


class _Refused(Exception):
    """A row does not fit its format; the message is the bad row's reason."""


def check_columns(format: DataFormat, columns: Mapping[str, str], setting: str = "columns") -> None:
    """Refuse a column map that names columns the format does not have.

    Raises:
        DataError: with the columns that the format does have.
    """
    if unknown := sorted(columns.keys() - set(COLUMNS[format])):
        raise DataError(
            f"{setting}: {', '.join(unknown)}: no such column in format {format}; "
            f"a map goes from ours ({', '.join(COLUMNS[format])}) to those in your file"
        )


def parse_record(record: Record, format: DataFormat, columns: Mapping[str, str]) -> ParsedRow | BadRow:
    """Read one record as `format`, or say why it cannot be."""
    try:
        values = {ours: _value(record.data, format, ours, columns) for ours in COLUMNS[format]}
        form, messages = _turns(format, values)
    except _Refused as refused:
        return BadRow(record.file, record.line, str(refused))
    return ParsedRow(file=record.file, line=record.line, form=form, messages=messages)


def read_rows(
    files: Sequence[Path | str], format: DataFormat, columns: Mapping[str, str], *, setting: str = "columns"
) -> Iterator[ParsedRow | BadRow]:
    """Parse the rows of some files, one after the other, in their order.

    Args:
        files: jsonl, json, csv, tsv or parquet.
        format: see the module.
        columns: our column → the column in the files; empty where they are called alike.
        setting: the YAML path of the column map, for messages.

    Raises:
        DataError: a file cannot be read at all; the map names a column the format lacks; or, at the end of the
            files, a column was not found in any row.
    """
    check_columns(format, columns, setting)
    paths = [Path(f) for f in files]
    records = (record for path in paths for record in read_records(path, wanted=wanted_columns(format, columns)))
    yield from parse_records(records, format, columns, there=lambda: column_names(paths[0]), setting=setting)


def wanted_columns(format: DataFormat, columns: Mapping[str, str]) -> frozenset[str]:
    """The columns of a file that `parse_record` may look at."""
    aliases = {alias for (owner, _), alias in _ALIASES.items() if owner == format}
    named = {name for ours in COLUMNS[format] for name in _named(columns.get(ours, ours))}
    return frozenset({part for name in named | aliases for part in _heads(name)})


def parse_records(
    records: Iterator[Record | BadRow],
    format: DataFormat,
    columns: Mapping[str, str],
    *,
    there: Callable[[], Collection[str]],
    setting: str,
) -> Iterator[ParsedRow | BadRow]:
    """Parse records; at their end, raise `DataError` if a column was in none of them.

    `there` gives the columns that the error then names.
    """
    missing = {ours for ours in COLUMNS[format] if (format, ours) not in _OPTIONAL}
    n_records = 0
    for record in records:
        if isinstance(record, BadRow):
            yield record
            continue
        n_records += 1
        if missing:
            missing -= {
                ours
                for ours in missing
                if _look_up(record.data, _name(record.data, format, ours, columns)) is not _NOTHING
            }
        yield parse_record(record, format, columns)
    if n_records and missing:
        names = ", ".join(repr(columns.get(ours, ours)) for ours in COLUMNS[format] if ours in missing)
        known = ", ".join(there()) or "none"
        raise DataError(
            f"column{'s' if len(missing) > 1 else ''} {names} not found in any row; columns there: {known}; "
            f"set {setting}, e.g. {setting}: {{{sorted(missing)[0]}: <the column in your file>}}, or another format"
        )


def _name(data: Mapping[str, Any], format: DataFormat, ours: str, columns: Mapping[str, str]) -> str:
    """How our column is called in this row."""
    alias = _ALIASES.get((format, ours))
    if alias and ours not in columns and ours not in data and alias in data:
        return alias
    return columns.get(ours, ours)


def _value(data: Mapping[str, Any], format: DataFormat, ours: str, columns: Mapping[str, str]) -> Any:
    name = _name(data, format, ours, columns)
    what = f"column {name!r}"
    value = _look_up(data, name)
    if value is _NOTHING or value is None:
        if (format, ours) in _OPTIONAL:
            return ""
        raise _Refused(f"{what} is null" if value is None else f"{what} not found")
    if format == "multiple_choice" and ours != "question":
        return value if ours == "answer" else _list_of(value, what)
    return _listed(value, name) if format in ("messages", "sharegpt") else _text(value, what)


_NOTHING = object()


def _look_up(data: Any, name: str) -> Any:
    """What stands at a column, a path, or a text of columns; `_NOTHING` where it leads nowhere."""
    if isinstance(data, Mapping) and name in data:
        return data[name]
    if places := _PLACE.findall(name):
        values = {place: _look_up(data, place) for place in places}
        if any(value is None or value is _NOTHING for value in values.values()):
            return _NOTHING
        return _PLACE.sub(lambda match: _shown(values[match[1]], f"column {match[1]!r}"), name)
    head, _, rest = name.partition(".")
    if not rest:
        return _NOTHING
    inner = data.get(head, _NOTHING) if isinstance(data, Mapping) else _NOTHING
    if inner is _NOTHING:
        return _NOTHING
    if isinstance(inner, list):
        found = [_look_up(item, rest) for item in inner]
        return _NOTHING if any(value is _NOTHING for value in found) else found
    return _look_up(inner, rest)


def _named(name: str) -> list[str]:
    """The columns that stand in a text of columns; a name that is none itself."""
    return _PLACE.findall(name) or [name]


def _heads(name: str) -> tuple[str, str]:
    """A column that a name may mean: the name as a whole, or the first part of a path."""
    return name, name.partition(".")[0]


def _shown(value: Any, what: str) -> str:
    """A value within a text: a list as one line an item, a whole number as such."""
    items = value if isinstance(value, list) else [value]
    return "\n".join(
        str(item) if isinstance(item, int) and not isinstance(item, bool) else _text(item, what) for item in items
    )


def _list_of(value: Any, what: str) -> list[Any]:
    """A list; in a CSV cell it is a JSON list."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list):
        raise _Refused(f"{what} must be a list")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _Refused(f"{what} must be text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # U+DC80 … U+DCFF is how the CSV reader hands on a byte that is not UTF-8.
        is_byte = 0xDC80 <= ord(value[error.start]) <= 0xDCFF
        raise _Refused(f"{what} is not valid {'UTF-8' if is_byte else 'Unicode'} at character {error.start}") from None
    return value


def _answer(value: str, what: str) -> str:
    if not value.strip():
        raise _Refused(f"{what} is empty: nothing to learn")
    return value


def _listed(value: Any, name: str) -> list[Any]:
    """A list of turns; a mapping of equally long lists (how `datasets` shows a sequence of structs) is turned round."""
    if isinstance(value, Mapping) and value and all(isinstance(v, list) for v in value.values()):
        if len({len(v) for v in value.values()}) != 1:
            raise _Refused(f"column {name!r}: lists of different lengths")
        return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise _Refused(f"column {name!r} must be a list of turns, got {type(value).__name__}")
    return value


def _turns(
    format: DataFormat, values: Mapping[str, Any]
) -> tuple[Literal["pair", "chat", "text"], tuple[Message, ...]]:
    if format == "text":
        return "text", (Message("assistant", _answer(values["text"], "text")),)
    if format == "prompt_completion":
        return "pair", _pair(values["prompt"], _answer(values["completion"], "completion"))
    if format == "alpaca":
        given = values["input"]
        question = f"{values['instruction']}\n\n{given}" if given.strip() else values["instruction"]
        return "pair", _pair(question, _answer(values["output"], "output"))
    if format == "multiple_choice":
        return "pair", _pair(values["question"], _right_choice(values["choices"], values["labels"], values["answer"]))
    if format == "messages":
        return "chat", _conversation(values["messages"], "role", "content", _ROLES)
    return "chat", _conversation(values["conversations"], "from", "value", _SHAREGPT_ROLES)


def _right_choice(choices: list[Any], labels: list[Any], answer: Any) -> str:
    """The text of the choice that `answer` names, by its label or by its index."""
    names = [_label(label, "a label") for label in labels] if labels else [str(i) for i in range(len(choices))]
    if len(names) != len(choices):
        raise _Refused(f"there are {len(choices)} choices and {len(names)} labels")
    given = _label(answer, "answer")
    if names.count(given) != 1:
        raise _Refused(f"answer must be one of {', '.join(names)[:80]}, got {given[:80]!r}")
    return _answer(_text(choices[names.index(given)], "the right choice"), "the right choice")


def _label(value: Any, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _Refused(f"{what} must be text or a whole number, got {type(value).__name__}")
    return str(value).strip()


def _pair(prompt: str, completion: str) -> tuple[Message, ...]:
    return Message("user", prompt), Message("assistant", completion)


def _conversation(turns: list[Any], role_key: str, content_key: str, roles: Mapping[str, Role]) -> tuple[Message, ...]:
    messages = tuple(_message(n, t, role_key, content_key, roles) for n, t in enumerate(turns, start=1))
    if not any(m.role == "assistant" for m in messages):
        raise _Refused("no assistant turn: nothing to learn")
    if messages[0].role == "assistant":
        raise _Refused("begins with an assistant turn: there is nothing that it answers")
    return messages


def _message(number: int, turn: Any, role_key: str, content_key: str, roles: Mapping[str, Role]) -> Message:
    if not isinstance(turn, Mapping):
        raise _Refused(f"turn {number} must be an object with {role_key} and {content_key}, got {type(turn).__name__}")
    given = turn.get(role_key)
    role = roles.get(given) if isinstance(given, str) else None
    if role is None:
        shown = repr(given[:80]) if isinstance(given, str) else type(given).__name__
        raise _Refused(f"turn {number}: {role_key} must be one of {', '.join(roles)}, got {shown}")
    for extra in ("tool_calls", "function_call"):
        if turn.get(extra):
            raise _Refused(f"turn {number}: {extra} cannot be learned yet")
    if turn.get(content_key) is None:
        raise _Refused(f"turn {number}: {content_key} is {'null' if content_key in turn else 'missing'}")
    content = _text(turn[content_key], f"turn {number}: {content_key}")
    return Message(role, _answer(content, f"turn {number}: {content_key}") if role == "assistant" else content)
