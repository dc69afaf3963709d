"""lm-eval's task files read as text: which tasks there are and what they measure, without loading one.

`lm_eval.TaskManager` takes seconds and its tasks fetch their data. A task file is YAML with a `task:` (or `group:`) and
a `metric_list`; it may include others. That is enough to find a mistyped name or metric where there is no network.
Tasks that are Python classes, and groups, say nothing of their metrics here.
"""

import os
import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

_NAME = re.compile(r"^(?:task|group): *[\"']?([^\s\"'#\[\]{}]+)[\"']? *(?:#.*)?$", re.MULTILINE)


class _Loader(yaml.SafeLoader):
    """Safe YAML, in which `!function` is the name of a function and nothing is imported."""


_Loader.add_constructor("!function", lambda _, node: str(node.value))


@cache
def known_tasks() -> Mapping[str, Path]:
    """Task or group → its file, of the installed lm-eval."""
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    return task_files(Path(spec.origin).parent / "tasks")


def task_files(folder: Path) -> Mapping[str, Path]:
    """Task or group → its file, in a folder and below it."""
    found: dict[str, Path] = {}
    for place, _, names in os.walk(folder):
        for file in (Path(place, name) for name in sorted(names) if name.endswith(".yaml")):
            for name in _NAME.findall(file.read_text(encoding="utf-8", errors="replace")):
                found.setdefault(name, file)
    return found


def metrics_of(file: Path) -> list[str] | None:
    """The metrics of a task as lm-eval prints them, `metric,filter`; None where its file does not tell."""
    try:
        data = _read(file, ())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    metrics, filters = data.get("metric_list"), data.get("filter_list") or [{"name": "none"}]
    if "group" in data or "class" in data or not isinstance(metrics, list) or not isinstance(filters, list):
        return None
    try:
        return [f"{metric['metric']},{each['name']}" for each in filters for metric in metrics]
    except (KeyError, TypeError):
        return None


def _read(file: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    """A task file with what it includes, its own keys first."""
    if file in including:
        raise ValueError(f"{file} includes itself")
    data = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    if not isinstance(data, dict):
        raise ValueError(f"{file} is no mapping")
    included = data.pop("include", [])
    merged: dict[str, Any] = {}
    for other in included if isinstance(included, list) else [included]:
        merged |= _read(file.parent / str(other), (*including, file))
    return merged | data
