"""Whatever a study file holds, reading it ends in a study or in a message: never in a traceback, never without end."""

import copy
import datetime
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from duet_ray.config import StudyConfig, config_from, load_config
from duet_ray.errors import ConfigError
from tests.safety.fuzzing import looking, result_or_message

GOOD: dict[str, Any] = {
    "name": "maths",
    "seed": 3,
    "model": {"path": "some/model", "revision": "abc", "dtype": "float32"},
    "domains": [
        {"name": "a", "source": "a.jsonl", "columns": {"prompt": "question"}, "bounds": [0.1, 0.9]},
        {"name": "b", "source": ["b/*.csv", "hf:owner/name"], "subset": "s", "format": "text"},
    ],
    "data": {"validation_fraction": 0.1, "max_bad_rows": 2},
    "mixture": {"n_rows": 100, "when_short": "repeat", "max_repeats": 2.0},
    "selection": {"method": "influence", "weighting": {"kind": "softmax", "temperature": 0.5}},
    "search": {
        "n_trials": 3,
        "n_start": 4,
        "acquisition": "qlognei",
        "prior": {"a": 0.5, "b": 0.5},
        "constraints": ["a + b >= 0.2", "a <= 0.8"],
        "optimize": "both",
        "also": {"training.learning_rate": {"log": [1e-5, 1e-3]}, "training.epochs": {"choices": [1, 2]}},
        "objective": {"require": ["safety >= base - 0.01"]},
    },
    "sampling": {"k": 4, "racing": {"at": [0.25, 0.5], "keep": 0.5}},
    "training": {"rank": 8, "target_modules": ["q_proj"], "layers": [0, 1], "learning_rate": 1e-4},
    "feedback": {"kind": "lm_eval", "tasks": {"gsm8k": 1.0}, "metric": "acc,none", "direction": "maximize", "limit": 9},
    "also": [
        {
            "kind": "function",
            "function": "m:f",
            "arguments": {"x": [1, {"y": 2}]},
            "direction": "maximize",
            "name": "safety",
        },
        {"kind": "heldout_loss", "file": "task.jsonl", "columns": {"prompt": "q"}},
    ],
    "fleet": {"groups": 2, "min_groups": 1, "gpus_per_worker": 0.5},
    "confirm": {"finalists": 1, "repeats": 2},
    "storage": "./studies",
    "store": "postgresql+psycopg://me@host/db",
    "artifacts": "s3://bucket/folder",
}  # fmt: skip
"""Nearly every kind of value that a study file can hold."""

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {k: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join(['*' + before] * 10)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

WORDS = (
    *("name", "seed", "model", "domains", "search", "also", "feedback", "kind", "source", "a", "b", "x"),
    *(": ", ":", "\n", "\n  ", "\n- ", "- ", "[", "]", "{", "}", ", ", "? ", "| ", "> ", "|\n", "#", "---\n", "...\n"),
    *(
        "&a ",
        "*a",
        "<<: ",
        "!!int ",
        "!!float ",
        "!!bool ",
        "!!null ",
        "!!timestamp ",
        "!!binary ",
        "!!set ",
        "!!omap ",
    ),
    *("!!python/object/apply:os.system ", "!!python/name:os.system ", "!x ", "%YAML 1.2\n", "%TAG ! x\n"),
    *("'", '"', "\\", "\t", " ", "\r", "\0", "\x1b", "\x85", "\u2028", "\ufeff", "\ud800", "\U0001f600", "é"),
    *("1", "0", "-1", "1e999", ".inf", "-.inf", ".nan", "0x" + "f" * 5000, "9" * 5000, "1:30", "0o17", "0b2", "1_000"),
    *("2001-13-45", "2001-02-03", "2001-02-03T25:00:00", "true", "no", "~", "null", "1.5", "''", '"\\0"', '"\\ud800"'),
)

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, -(10**30), 2**63, 10**400, 0.0, -0.0, 1e308])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*WORDS, "x" * 400, "~nobody/x", "../..", "/", "hf:", "hf:."])
    | st.binary(max_size=4)
    | st.dates()
    | st.datetimes(),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=5) | st.integers() | st.none() | st.booleans(), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path of plain data but the root."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


PLACES = list(places(GOOD))


@st.composite
def changed_data(draw: st.DrawFn) -> dict[str, Any]:
    """The good study with keys removed, renamed or added, and values replaced."""
    data = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(PLACES))
        here: Any = data
        try:
            for part in path[:-1]:
                here = here[part]
            here[path[-1]]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took it away
        kind = draw(st.sampled_from(["replace", "replace", "replace", "swap", "remove", "rename", "add"]))
        if kind == "replace":
            here[path[-1]] = draw(plain)
        elif kind == "swap":
            other: Any = GOOD
            for part in draw(st.sampled_from(PLACES)):
                other = other[part]
            here[path[-1]] = copy.deepcopy(other)
        elif kind == "remove":
            del here[path[-1]]
        elif isinstance(here, dict):
            value = here.pop(path[-1]) if kind == "rename" else draw(plain)
            here[draw(st.sampled_from(["x", "n_trails", "kind", "range", 1, None]) | st.text(max_size=6))] = value
    return data


@st.composite
def changed_text(draw: st.DrawFn) -> str:
    """The good file with pieces cut out, doubled, moved, or words put in between."""
    text = yaml.safe_dump(GOOD, sort_keys=False, default_flow_style=draw(st.sampled_from([None, False, True])))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["cut", "double", "put"]))
        if kind == "cut":
            text = text[:start] + text[end:]
        elif kind == "double":
            text = text[:end] + text[start:end] + text[end:]
        else:
            text = text[:start] + draw(st.sampled_from(WORDS)) + text[start:]
    return text


def check(path: Path, content: bytes, overrides: list[str] | tuple[str, ...] = ()) -> Any:
    path.write_bytes(content)
    found = result_or_message(lambda: load_config(path, overrides))
    if isinstance(found, StudyConfig):
        again = config_from(yaml.safe_load(found.to_yaml()), folder=found.folder)
        assert again.model_dump(mode="json") == found.model_dump(mode="json"), "what is stored is what was read"
        assert found.study_folder.parent == found.resolve_path(found.storage)
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "study.yaml"


def test_the_good_one_is_good(file: Path) -> None:
    assert isinstance(check(file, yaml.safe_dump(GOOD).encode()), StudyConfig)


@looking(150)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_random_bytes(file: Path, content: bytes) -> None:
    assert isinstance(check(file, content), str)


@looking(400)
@given(words=st.lists(st.sampled_from(WORDS), max_size=25))
def test_what_looks_like_yaml(file: Path, words: list[str]) -> None:
    assert isinstance(check(file, "".join(words).encode("utf-8", "surrogatepass")), str)


@looking(250)
@given(data=changed_data())
def test_a_study_with_changes(file: Path, data: dict[str, Any]) -> None:
    check(file, yaml.safe_dump(data, sort_keys=False).encode("utf-8", "surrogatepass"))


@looking(150)
@given(data=changed_data())
def test_a_study_as_plain_data(data: dict[str, Any]) -> None:
    found = result_or_message(lambda: config_from(data, folder=Path()))
    if isinstance(found, StudyConfig):
        found.to_yaml()


@looking(150)
@given(text=changed_text())
def test_a_file_with_changes(file: Path, text: str) -> None:
    found = check(file, text.encode("utf-8", "surrogatepass"))
    if isinstance(found, str):
        assert re.search(r"\(study\.yaml( line \d+)?\)$|cannot be read", found, re.MULTILINE), found


@looking(250)
@given(
    path=st.sampled_from([".".join(map(str, p)) for p in PLACES])
    | st.sampled_from(["[0]", "domains[0].name", "domains[9]", "a.b.c", ""])
    | st.text(max_size=12),
    equals=st.sampled_from(["=", "=", "=", "", "=="]),
    value=st.lists(st.sampled_from(WORDS), max_size=4).map("".join) | st.text(max_size=12),
)  # fmt: skip
def test_overrides(file: Path, path: str, equals: str, value: str) -> None:
    check(file, GOOD_TEXT, [path + equals + value])


GOOD_TEXT = yaml.safe_dump(GOOD, sort_keys=False).encode()

CASES = {
    "billion laughs": LAUGHS,
    "a billion merges": MERGED,
    "a billion empty lists": LAUGHS.replace("x", "[]"),
    "a long value in many places": f"a: &a {'x' * 200_000}\nb: [{','.join(['*a'] * 9000)}]",
    "a long key above many values": f"? {'k' * 100_000}\n: [{','.join(['x'] * 40_000)}]",
    "an anchor within itself": "a: &a [*a]",
    "a mapping within itself": "a: &a {b: *a}",
    "deep brackets": "[" * 100_000,
    "deep braces": "a: " + "{a: " * 3000,
    "deep lines": "".join("  " * depth + "a:\n" for depth in range(400)),
    "large": "a: b\n" * 300_000,
    "a list as key": "? [a, b]\n: c",
    "a mapping as key": "{{a: b}: c}",
    "a number as key": "1: a\n2: b",
    "null as key": "~: a",
    "a 13th month": "name: 2001-13-45",
    "an hour too many": "name: 2001-02-03T99:00:00",
    "no integer": "seed: !!int x",
    "an empty integer": "seed: !!int ''",
    "no truth": "seed: !!bool maybe",
    "no number": "seed: !!float x",
    "no base64": "seed: !!binary é",
    "code": "seed: !!python/object/apply:os.system [touch code-was-run]",
    "thousands of digits": "seed: " + "9" * 5000,
    "thousands of hexadecimal digits": "seed: 0x" + "f" * 5000,
    "two documents": "a: b\n---\nc: d",
    "no document": "# nothing",
    "a lone surrogate": 'name: "\\ud800"',
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", CASES)
def test_cases(file: Path, name: str) -> None:
    found = check(file, CASES[name].encode())
    assert isinstance(found, str)
    assert len(found) < 10_000
    assert not Path("code-was-run").exists()


SETTINGS = {
    "dates to choose from": ("search.also", {"training.epochs": {"choices": [datetime.date(2001, 2, 3), 1]}}),
    "bytes to choose from": ("search.also", {"training.epochs": {"choices": [b"1", 1]}}),
    "not a number, as an argument": ("also", [{"kind": "function", "arguments": {"x": float("nan")}}]),
    "infinite": ("training.learning_rate", float("inf")),
    "not a number": ("training.alpha", float("nan")),
    "a NUL in a path": ("domains", [{"name": "a", "source": "a\0.jsonl"}]),
    "a huge seed": ("seed", 10**400),
    "out of the storage": ("name", "../../elsewhere"),
    "out of the storage by a domain": ("domains", [{"name": "..", "source": "a.jsonl"}]),
    "a metric that is a path": ("also", [{"kind": "heldout_loss", "file": "a.jsonl", "name": "../x"}]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_refused(name: str) -> None:
    key, value = SETTINGS[name]
    data = copy.deepcopy(GOOD)
    here = data
    *parents, last = key.split(".")
    for part in parents:
        here = here[part]
    here[last] = value
    with pytest.raises(ConfigError, match=re.escape(key)):
        config_from(data, folder=Path())


@pytest.mark.parametrize(
    "override",
    [
        "a=&a [*a]",
        "a=" + LAUGHS,
        "seed=0x" + "f" * 5000,
        "[" + "9" * 5000 + "]=1",
        ".".join("a" * 5000) + "=1",
        "a=2001-13-45",
    ],
)
def test_overrides_that_are_refused(file: Path, override: str) -> None:
    assert isinstance(check(file, GOOD_TEXT, [override[:100_000]]), str)


def test_a_file_that_is_nested_too_deeply_says_where(file: Path) -> None:
    found = check(file, ("name: x\na: " + "[" * 40 + "]" * 40).encode())
    assert found == "nested more than 32 deep (study.yaml line 2)"


@pytest.mark.parametrize("kind", ["folder", "ring", "closed", "long name"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "study.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "ring":
        path.symlink_to(path)
    elif kind == "closed":
        path.write_text("name: a")
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
    else:
        path = tmp_path / ("n" * 300)
    with pytest.raises(ConfigError):
        load_config(path)


def test_a_value_of_the_environment_is_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    data = copy.deepcopy(GOOD)
    data["also"][0]["arguments"] = {"server": "https://ann:plain-words@host", "note": "it is plain-words"}
    with pytest.raises(ConfigError) as error:
        config_from(data, folder=Path())
    assert [problem.path for problem in error.value.problems] == ["also[0].arguments.server"]
    monkeypatch.setenv("HF_TOKEN", "plain-words")
    with pytest.raises(ConfigError) as error:
        config_from(data, folder=Path())
    assert [p.path for p in error.value.problems] == ["also[0].arguments.note", "also[0].arguments.server"]
    assert "plain-words" not in str(error.value)
