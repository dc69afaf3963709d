"""What must never be written down: text that has the shape of a secret, and the secrets of this process's environment.

Used twice. A study file that holds such text is refused (`looks_secret`), and whatever we write or print passes
`redact` on its way out. A pattern knows only shapes that somebody thought of; the values of the environment are
known exactly, whatever they look like. Eating an ordinary word now and then is the price, and kept small: names and
values are matched narrowly, and a value must have eight characters.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote

MARK = "[redacted]"
MIN_VALUE_CHARACTERS = 8

_SHAPES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (hint, re.compile(pattern, re.DOTALL))
    for hint, pattern in (
        ("hf_", r"\bhf_[A-Za-z0-9]{20,}"),
        ("sk-", r"\bsk-[A-Za-z0-9_-]{20,}"),
        ("gh", r"\bgh[pousr]_[A-Za-z0-9]{30,}"),
        ("github_pat_", r"\bgithub_pat_[A-Za-z0-9_]{22,}"),
        ("glpat-", r"\bglpat-[A-Za-z0-9_-]{20,}"),
        ("xox", r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),
        ("akia", r"\bAKIA[0-9A-Z]{16}\b"),
        ("asia", r"\bASIA[0-9A-Z]{16}\b"),
        ("aiza", r"\bAIza[A-Za-z0-9_-]{35}"),
        ("eyj", r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*"),
        # Up to its end, or to the end of the text where that is cut off.
        ("private key", r"-----BEGIN [A-Z ]*PRIVATE KEY.*?(?:-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-*|\Z)"),
        # The group is kept. A digit, for "the bearer acknowledges …" is no token.
        ("bearer", r"(\b[Bb](?:earer|EARER)\s+)(?=[A-Za-z._~+/=-]*[0-9])[A-Za-z0-9._~+/=-]{16,}"),
        ("authorization", r"(\b[Aa]uthorization['\"]?\s*[:=]\s*['\"]?(?:Basic|Token)\s+)[A-Za-z0-9._~+/=-]{6,}"),
        ("://", r"(://[^/\s:@'\"]*:)[^/\s'\"]+(?=@)"),
        ("password=", r"(\b(?:PG)?(?:[Pp]assword|PASSWORD)=['\"]?)[^\s&'\";]+"),
    )
)
"""(what the lower-cased text must contain for the pattern to be tried, the pattern). A first group is no secret."""

_SECRET_VARIABLE = re.compile(
    r"(?:.*_)?TOKEN|(?:.*_)?(?:API|ACCESS|PRIVATE|SECRET)?KEY|AWS_ACCESS_KEY_ID"
    r"|.*(?:SECRET|PASSWORD|PASSWD|PASSPHRASE|CONNECTION_STRING).*"
)
_SECRET_KEY = re.compile(
    r"(?:.*[_-])?(?:password|passwd|passphrase|secret|secret[_-]?key|api[_-]?key|access[_-]?key|private[_-]?key"
    r"|(?:access|auth|bearer|hub|hf|api)[_-]?token)"
)


def looks_secret(text: str) -> bool:
    """Whether some part of the text has the shape of a known kind of secret."""
    lowered = text.lower()
    return any(hint in lowered and pattern.search(text) is not None for hint, pattern in _SHAPES)


def names_secret(key: str) -> bool:
    """Whether a key of a mapping says that its value is a secret: `password`, `api_key`; not `pad_token`."""
    return _SECRET_KEY.fullmatch(key.lower()) is not None


def redact(text: str) -> str:
    """The text with `[redacted]` in the place of every secret. Doing it again changes nothing.

    A few microseconds for a line. The environment is looked at each time, since a token may be set on the way.
    """
    return _redacted(text, _secrets_of(os.environ))


def redact_data(data: Any) -> Any:
    """Plain data (mappings, lists, text) with every text redacted, and what stands under `password` and the like."""
    return _redacted_data(data, _secrets_of(os.environ))


class RedactingFormatter(logging.Formatter):
    """Formats log records, tracebacks included, and redacts what comes out."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _redacted(text: str, values: re.Pattern[str] | None) -> str:
    if values is not None:
        text = values.sub(MARK, text)
    lowered = text.lower()
    for hint, pattern in _SHAPES:
        if hint in lowered:
            text = pattern.sub(_keep_first_group, text)
    return text


def _keep_first_group(match: re.Match[str]) -> str:
    return (match[1] if match.re.groups else "") + MARK


def _redacted_data(data: Any, values: re.Pattern[str] | None) -> Any:
    if isinstance(data, str):
        return _redacted(data, values)
    if isinstance(data, Mapping):
        return {
            _redacted_data(key, values): MARK
            if isinstance(key, str) and isinstance(value, str) and value and names_secret(key)
            else _redacted_data(value, values)
            for key, value in data.items()
        }
    if isinstance(data, list | tuple):
        return [_redacted_data(value, values) for value in data]
    return data


def _secrets_of(environment: Mapping[str, str]) -> re.Pattern[str] | None:
    """A pattern of the values that must not be shown, as they stand and as JSON and URLs write them."""
    found = [
        value
        for name in environment
        if _is_secret_variable(name)
        and len(value := environment.get(name, "").strip()) >= MIN_VALUE_CHARACTERS
        and value not in MARK
    ]
    return _any_of(tuple(found)) if found else None


@lru_cache(maxsize=4096)
def _is_secret_variable(name: str) -> bool:
    return _SECRET_VARIABLE.fullmatch(name.upper()) is not None


@lru_cache(maxsize=16)
def _any_of(values: Iterable[str]) -> re.Pattern[str]:
    forms = {form for value in values for form in (value, json.dumps(value)[1:-1], quote(value, safe=""))}
    return re.compile("|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True)))
