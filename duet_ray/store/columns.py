"""What is made of text and data on their way into a table, so that no writer has to think of it.

Text from outside (reasons, results, notes) is freed of secrets here and nowhere else: what a table holds ends in
reports and logs. And what one database takes, the other must take too: PostgreSQL refuses a NUL in a text, half a
surrogate pair and, in JSON, NaN and infinities.
"""

import math
from collections.abc import Mapping
from typing import Any

from sqlalchemy import JSON, Dialect, Text
from sqlalchemy.types import TypeDecorator

from duet_ray.secret_text import redact, redact_data

_NUMBER = "$number"
"""Key of the object that stands for a number that JSON has no sign for: `{"$number": "nan"}`."""


class Words(TypeDecorator[str]):
    """Text for people, without secrets."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else _writable(redact(value)).replace("\0", "\ufffd")


class Plain(TypeDecorator[Any]):
    """Plain data (mappings, lists, text, numbers), every float to its last bit."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return _to_json(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        return _from_json(value)


class Told(Plain):
    """Plain data with what others have said in it, freed of secrets but for the keys that identify the row."""

    impl = JSON
    cache_ok = True

    def __init__(self, *, but: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.but = but

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        clean = redact_data(value)
        if isinstance(value, Mapping):
            clean = {**clean, **{key: value[key] for key in self.but if key in value}}
        return _to_json(clean)


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_NUMBER: str(value)}
    if isinstance(value, str):
        return _writable(value)
    if isinstance(value, Mapping):
        return {_to_json(key): _to_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(inner) for inner in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_NUMBER}:
            return float(value[_NUMBER])
        return {key: _from_json(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_from_json(inner) for inner in value]
    return value


def _writable(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode("utf-8")
