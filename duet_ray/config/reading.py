"""A study file read and checked, and two of them compared."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from duet_ray.config.contradictions import contradictions
from duet_ray.config.sections import FEEDBACK_KINDS, StudyConfig
from duet_ray.errors import ConfigError, Problem
from duet_ray.secret_text import redact
from duet_ray.study_file import either, explain, later_keys, leaves, line_of, parse, secrets, set_value, unusable

MAY_CHANGE: tuple[str, ...] = (
    "fleet",
    "storage",
    "store",
    "artifacts",
    "keep_best",
    "confirm",
    "sampling.max_retries",
    "search.n_trials",
    "training.checkpoint_minutes",
)
"""What a resume may change: nothing here alters a ratio or a row, but for the rounding that comes with another
`fleet.workers_per_group`. `search.n_trials` may only grow."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study file.

    Args:
        path: the YAML file.
        overrides: `"search.n_trials=20"` and the like, as `--set` takes them; lists by index (`domains[0].name=a`).

    Raises:
        ConfigError: with every problem found: unknown keys (with a suggestion), wrong types, contradictions.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such study file; `duet init {file}` writes one to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    data, lines = parse(text, file.name)
    for override in overrides:
        set_value(data, override)
    return config_from(data, folder=file.resolve().parent, file=file.name, lines=lines)


def config_from(
    data: Mapping[str, Any], *, folder: Path, file: str | None = None, lines: Mapping[str, int] | None = None
) -> StudyConfig:
    """Check a study given as plain data; `load_config` without the file. Raises `ConfigError` as it does."""
    lines = lines or {}

    def problem(path: str, message: str) -> Problem:
        # A mistake is shown with the value that was given, which may be a secret in the wrong place.
        return Problem(path=path, message=redact(message), file=file, line=line_of(lines, path))

    if problems := [problem(where, message) for where, message in unusable(data)]:
        raise ConfigError(problems)  # there is nothing more to say of such text, and no way to print such numbers
    problems = [problem(where, message) for where, message in later_keys(data)]
    later = {p.path for p in problems}
    try:
        config = StudyConfig.model_validate(data)
    except ValidationError as error:
        for item in error.errors():
            where, message = explain(item, data, StudyConfig, FEEDBACK_KINDS)
            if problems and problems[-1].path == where and where not in later:
                message = either(problems.pop().message, message)
            if where not in later:
                problems.append(problem(where, message))
    else:
        problems += [problem(where, message) for where, message in contradictions(config)]
    named = {p.path for p in problems}
    problems += [problem(where, message) for where, message in secrets(data) if where not in named]
    if problems:
        raise ConfigError(sorted(problems, key=lambda p: (p.line or 0, p.path)))
    return config.placed_in(folder)


def differences(stored: StudyConfig, given: StudyConfig) -> list[str]:
    """What in `given` forbids resuming `stored`: lines like `training.rank: 16 -> 32`; empty when it may resume."""
    old, new = dict(leaves(stored.model_dump(mode="json"))), dict(leaves(given.model_dump(mode="json")))
    found = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) == new.get(key):
            continue
        if key == "search.n_trials" and new[key] >= old[key]:
            continue
        if key != "search.n_trials" and any(key == m or key.startswith(m + ".") for m in MAY_CHANGE):
            continue
        found.append(f"{key}: {old.get(key)!r} -> {new.get(key)!r}")
    return found


def fingerprint(data: Any) -> str:
    """A short SHA-256 over plain data: equal data, equal fingerprint, on any machine."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
