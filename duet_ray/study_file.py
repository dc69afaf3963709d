"""The text of a study file: YAML with the line of every key, overrides, and errors in words a user can act on.

What a study file may hold is said in `config/`; how it is read, and how a mistake in it is explained, is said here.
"""

import datetime
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from duet_ray.errors import ConfigError, Problem
from duet_ray.secret_text import names_secret, redact

LATER: Mapping[str, str] = {
    "search.asynchronous": "asynchronous search is not built yet: use `concurrent_trials`",
}
"""Keys of later versions: refused with a reason, so that nobody thinks they had an effect."""

PLANNED: Mapping[str, Sequence[str]] = {
    "feedback.kind": ("deferred",),
}
"""Values of later versions, by key."""


MAX_CHARACTERS, MAX_VALUES, MAX_DEPTH, MAX_KEY = 250_000, 50_000, 32, 128
"""Of a study file. Values, and ten times the characters, are counted where its anchors lead: a few lines of anchors
can stand for billions of values."""


def parse(text: str, file: str) -> tuple[dict[str, Any], dict[str, int]]:
    """YAML text to plain data, and the line of every path in it.

    Raises:
        ConfigError: it is no YAML, no mapping, has a key twice, or is far too large for a study file.
    """
    places = _Places(file)
    try:
        data = _plain(text, places)
    except _NotPlain as error:
        raise ConfigError([Problem(path="", message=error.message, file=file, line=error.line)]) from None
    if not isinstance(data, dict):
        raise ConfigError([Problem(path="", message="a study file is a mapping of keys to values", file=file, line=1)])
    return data, places.lines


class _NotPlain(Exception):
    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.message, self.line = message, line


def _plain(text: str, places: "_Places") -> Any:
    """YAML text to plain data, after its places were collected: what is too large is never made into data."""
    if len(text) > MAX_CHARACTERS:
        raise _NotPlain(f"must have at most {MAX_CHARACTERS:,} characters, got {len(text):,}")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        places.collect(node)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        message = f"not valid YAML: {getattr(error, 'problem', None) or error}"
        raise _NotPlain(message, mark.line + 1 if mark else None) from None
    except RecursionError:
        raise _NotPlain("nested too deeply") from None
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # What PyYAML says of a 13th month, of `!!int x`, of a number of thousands of digits.
        raise _NotPlain(f"not readable: {type(error).__name__}: {error}") from None


class _Places:
    """The line of every path of a file."""

    def __init__(self, file: str) -> None:
        self.lines: dict[str, int] = {}
        self._file = file
        self._twice: list[Problem] = []
        self._n_characters = 0

    def collect(self, node: yaml.Node) -> None:
        """Walk the file.

        Raises:
            ConfigError: a key stands twice.
            _NotPlain: it is too large or too deep, or has a key that is no word.
        """
        self._walk(node, "", 0)
        if self._twice:
            raise ConfigError(self._twice)

    def _walk(self, node: yaml.Node, path: str, depth: int) -> None:
        line = node.start_mark.line + 1
        if depth > MAX_DEPTH:
            raise _NotPlain(f"nested more than {MAX_DEPTH} deep", line)
        if len(self.lines) > MAX_VALUES or self._n_characters > 10 * MAX_CHARACTERS:
            raise _NotPlain(f"more than {MAX_VALUES:,} values, or very long ones, with its anchors written out", line)
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key_node, value_node in node.value:
                line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode) or len(key_node.value) > MAX_KEY:
                    raise _NotPlain(f"a key must be a word of at most {MAX_KEY} characters", line)
                inner = f"{path}.{key_node.value}" if path else key_node.value
                if inner in seen:
                    problem = Problem(path=inner, message="stands twice; keep one", file=self._file, line=line)
                    self._twice.append(problem)
                seen.add(inner)
                self.lines[inner] = line
                self._walk(value_node, inner, depth + 1)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                inner = f"{path}[{index}]"
                self.lines[inner] = item.start_mark.line + 1
                self._walk(item, inner, depth + 1)
        else:
            self._n_characters += len(node.value)


def line_of(lines: Mapping[str, int], path: str) -> int | None:
    """The line of a path, or of the nearest path above it that stands in the file."""
    while path:
        if path in lines:
            return lines[path]
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return None


def explain(item: Any, data: Any, root: type[BaseModel], kinds: Mapping[str, type[BaseModel]]) -> tuple[str, str]:
    """One pydantic error as (YAML path, message that says what is wrong and what is right).

    Args:
        item: from `ValidationError.errors()`.
        data: what was validated.
        root: the schema.
        kinds: the sections that a `kind` chooses between, which pydantic puts into its locations.
    """
    location = _real_location(item["loc"], data)
    where = _join(location)
    error, given = item["type"], item.get("input")
    if error == "extra_forbidden":
        choices = _keys_at(item["loc"][:-1], root, kinds)
        close = difflib.get_close_matches(str(location[-1]), choices, n=1, cutoff=0.6)
        hint = f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(sorted(choices))}"
        return where, f"unknown key; {hint}"
    if error == "missing":
        return where, "is required and missing"
    if error == "union_tag_not_found":
        return where, f"needs `kind`: one of {', '.join(kinds)}"
    if error == "union_tag_invalid":
        return _wrong_choice(f"{where}.kind", item["ctx"]["tag"], f"one of {', '.join(kinds)}", list(kinds))
    if error in ("literal_error", "enum"):
        expected = str(item["ctx"]["expected"])
        return _wrong_choice(where, given, expected, re.findall(r"'([^']*)'", expected))
    if error == "value_error":
        return where, str(item["ctx"]["error"])
    message = item["msg"].replace("Input should be", "must be").replace("Input", "it")
    return where, f"{message}, got {_short(given)}"


def either(one: str, other: str) -> str:
    """Two messages about a value that may be one thing or another, in one sentence."""
    head, separator, given = one.rpartition(", got ")
    other_head, _, other_given = other.rpartition(", got ")
    if separator and given == other_given:
        return f"{head}, or {other_head.removeprefix('must be ')}, got {given}"
    return f"{one}; or {other}"


def _wrong_choice(where: str, given: Any, expected: str, choices: Sequence[str]) -> tuple[str, str]:
    planned = PLANNED.get(where, ())
    hint = f" ({given} is planned and not built yet)" if given in planned else _close(given, choices)
    return where, f"must be {expected}, got {given!r}{hint}"


def _close(given: Any, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(given), choices, n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _real_location(location: Sequence[int | str], data: Any) -> list[int | str]:
    """Pydantic's location without the tags of unions, which do not stand in the file."""
    kept: list[int | str] = []
    for position, part in enumerate(location):
        last = position == len(location) - 1
        in_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if in_list or (isinstance(data, Mapping) and part in data):
            data, keep = data[part], True
        else:
            keep = last and isinstance(data, Mapping) and "[" not in str(part)  # `literal['a']` names a kind, no key
        if keep:
            kept.append(part)
    return kept


def _keys_at(location: Sequence[int | str], root: type[BaseModel], kinds: Mapping[str, type[BaseModel]]) -> list[str]:
    """The keys that the schema knows at a location as pydantic reports it (kinds included)."""
    model = root
    for part in location:
        if part in kinds:
            model = kinds[str(part)]
        elif part in model.model_fields:
            model = _section_of(model.model_fields[str(part)].annotation) or model
    return list(model.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if found := _section_of(inner):
            return found
    return None


def _join(parts: Sequence[int | str]) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


def leaves(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping) and data:
        for key, value in data.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, list) and data:
        for index, value in enumerate(data):
            yield from leaves(value, f"{path}[{index}]")
    else:
        yield path, data


def later_keys(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for path, message in LATER.items():
        inner: Any = data
        for part in path.split("."):
            inner = inner.get(part) if isinstance(inner, Mapping) else None
        if inner is not None:
            yield path, message


def secrets(data: Any) -> Iterator[tuple[str, str]]:
    """Values that look like secrets, are some of this environment's, or have a key that says so: (path, what to do)."""
    for path, value in leaves(data):
        key = re.split(r"[.\[]", path)[-1]
        if isinstance(value, str) and value and (redact(value) != value or names_secret(key)):
            yield path, "looks like a secret; take it out and set it in the environment (HF_TOKEN and the like)"


def unusable(data: Any) -> Iterator[tuple[str, str]]:
    """What no file, tokenizer or database can take, or would come back as something else: (path, what it is)."""
    for path, value in leaves(data):
        if "\0" in path or (isinstance(value, str) and "\0" in value):
            yield path.replace("\0", "\\0"), "holds a NUL character; remove it"
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            yield path, f"must be a number of at most 63 bits, got one of {value.bit_length():,}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield path, f"must be a finite number, got {value}"
        elif isinstance(value, datetime.date):
            yield path, f"must be text, not a date: write '{value}' in quotes"
        elif isinstance(value, bytes | set):
            yield path, f"must be text, a number, true, false, null, a list or a mapping, got {type(value).__name__}"


def set_value(data: dict[str, Any], override: str) -> None:
    """Apply one `path=value`."""
    path, separator, text = override.partition("=")
    words = re.findall(r"[^.\[\]]+|\[[0-9]{1,9}\]", path)
    parts: list[int | str] = [int(word[1:-1]) if word.startswith("[") else word for word in words]
    if not separator or not 0 < len(parts) <= MAX_DEPTH:
        raise ConfigError(f"--set {override}: must be path=value, e.g. --set search.n_trials=20")
    try:
        value = _plain(text, _Places("--set"))
    except _NotPlain as error:
        raise ConfigError(f"--set {override}: the value is wrong: {error.message}") from None
    here: Any = data
    for position, part in enumerate(parts[:-1]):
        try:
            if isinstance(here, dict) and isinstance(part, str):
                here = here.setdefault(part, {})
            else:
                here = here[part]
        except (KeyError, IndexError, TypeError):
            raise ConfigError(
                f"--set {override}: there is no `{_join(parts[: position + 1])}` in the study file"
            ) from None
    try:
        here[parts[-1]] = value
    except (IndexError, TypeError):
        raise ConfigError(f"--set {override}: there is no `{path}` in the study file") from None
