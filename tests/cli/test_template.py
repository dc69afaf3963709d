"""The commented study file: it names every key there is, shows what each is when left out, and its examples work."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from duet_ray.cli.init import template
from duet_ray.config import StudyConfig, config_from
from duet_ray.study_file import parse, set_value

_COMMENTED = re.compile(r"^(\s*)# (\s*)(?=([a-z_.]+:( |$)|- kind:))")


def uncommented() -> str:
    """The template with every key in force. A comment is a key behind `# `; prose never begins like one."""
    return "\n".join(_COMMENTED.sub(r"\1\2", line) for line in template().splitlines())


def everything() -> tuple[dict[str, Any], dict[str, int]]:
    return parse(uncommented(), "template.yaml")


def examples() -> list[str]:
    """The paths whose commented value is an example and no default: `e.g.` says so."""
    lines = uncommented().splitlines()
    return [path for path, line in everything()[1].items() if "e.g." in lines[line - 1] and "[" not in path]


def fields(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, default) of every key of a section and those in it; a list's items and a choice's kinds are not told
    apart in the path."""
    for name, field in section.model_fields.items():
        inner = list(sections(field.annotation))
        default = field.get_default(call_default_factory=True)
        yield f"{path}{name}", default
        for each in inner:
            yield from fields(each, f"{path}{name}.")


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from sections(inner)


def values(data: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every key that holds no section; a list of sections is gone through under one path."""
    for key, value in data.items():
        for item in value if isinstance(value, list) and value and isinstance(value[0], dict) else [value]:
            if isinstance(item, dict) and item:
                yield from values(item, f"{path}{key}.")
            else:
                yield f"{path}{key}", item


def found_at(data: Any, path: str) -> list[Any]:
    """The values at a path, over all items of lists, and over all settings of `search.also`."""
    if not path:
        return [data]
    if isinstance(data, list):
        return [value for item in data for value in found_at(item, path)]
    head, _, rest = path.partition(".")
    if not isinstance(data, dict):
        return []
    if head in data:
        return found_at(data[head], rest)
    return [v for key, value in data.items() if key.startswith("training.") for v in found_at(value, path)]


@pytest.mark.parametrize("path", sorted({path for path, _ in fields(StudyConfig)}))
def test_every_key_is_there(path: str) -> None:
    data, _ = everything()
    if path.startswith(("feedback.", "also.")):  # every kind may be either
        assert found_at([data["feedback"], *data["also"]], path.partition(".")[2])
    else:
        assert found_at(data, path), f"{path} is not in duet_ray/cli/template.yaml: explain it there"


def test_what_is_commented_out_is_the_default() -> None:
    data, in_force = everything()[0], dict(values(yaml.safe_load(template())))
    defaults = dict(fields(StudyConfig))
    defaults |= {f"feedback.{key}": value for key, value in fields(sections_of_feedback()["heldout_loss"])}
    shown = 0
    for path, value in values(data):
        if path in in_force or any(path.startswith(example) for example in examples()):
            continue
        default = defaults[path]
        assert default is not PydanticUndefined, path
        assert value == json.loads(json.dumps(default)), f"{path}: the template says {value!r}, it is {default!r}"
        shown += 1
    assert shown > 50, "or the test shows nothing"


def sections_of_feedback() -> dict[str, type[BaseModel]]:
    from duet_ray.config.sections import FEEDBACK_KINDS

    return dict(FEEDBACK_KINDS)


NEEDED: dict[str, list[str]] = {
    "search.also": ["search.optimize=both"],
    "sampling.racing": ["sampling.k=4"],
    "selection.surrogate": ["selection.method=influence"],
}
"""What an example takes for granted, as its comment says."""


def test_the_examples_are_those() -> None:
    assert sorted(examples()) == sorted([*NEEDED, "search.fidelity", "search.objective", "also"])


@pytest.mark.parametrize("path", [path for path in examples() if path != "search.objective"])
def test_an_example_is_sound(path: str) -> None:
    data = yaml.safe_load(template())
    for override in NEEDED.get(path, []):
        set_value(data, override)
    set_value(data, f"{path}={json.dumps(found_example(path))}")
    config_from(data, folder=Path())


def found_example(path: str) -> Any:
    here: Any = everything()[0]
    for part in path.split("."):
        here = here[part]
    return here


@pytest.mark.parametrize("key", ["weights", "pareto", "require"])
def test_the_example_of_an_objective_is_sound_with_feedback_of_these_names(key: str) -> None:
    data = yaml.safe_load(template())
    data["feedback"]["name"] = "exam"
    second = {**data["feedback"], "name": "safety", "format": "multiple_choice", "metric": "accuracy"}
    data["also"] = [{**second, "direction": "maximize"}]
    data["search"] |= {"acquisition": "qlognei", "objective": {key: found_example("search.objective")[key]}}
    config_from(data, folder=Path())


def test_the_jobs_have_the_same_file() -> None:
    jobs = Path(__file__).parents[2] / "jobs" / "template.yaml"
    assert jobs.read_text(encoding="utf-8") == template()
