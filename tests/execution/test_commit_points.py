"""SIGKILL at every point where something is written for good: the same command goes on, and ends as a calm study.

The driver, the store and the artifacts are the real ones; the groups are threads that train nothing (`tests.light`).
"""

import ast
import inspect
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from duet_ray.store import Store
from tests.execution.test_study_run import essence, trials_of
from tests.light.zygote import Zygote
from tests.toy_study import write_toy_study

STUDY: dict[str, Any] = {"search__n_start": 3, "search__n_trials": 1, "keep_best": 1}

WRITES: dict[str, tuple[int, ...]] = {
    "create_study": (1,),
    "update_study": (1, 2),
    "add_trial": (1, 2, 5, 7),
    "add_sample": (1, 2, 7, 11),
    "add_observation": (1, 2, 5),
    "finish_trial": (1, 2),
    "set_posterior": (1,),
    "drop_artifact": (1, 3),
    "add_seconds": (1,),
}
"""Method of the store → the calls of it at which the driver is killed, each in a study of its own."""

ELSEWHERE = {
    "fail_trial": "test_a_trial_that_fails",
    "add_past_runs": "tests/store: written by an import, which runs nothing",
    "renew": "tests/store: says only that the driver lives",
}
"""Writes that a study without trouble does not make."""


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as started:
        yield started


@pytest.fixture(scope="module")
def calm(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = write_toy_study(tmp_path_factory.mktemp("calm"), **STUDY)
    session = zygote.start(study)
    assert session.wait() == 0, session.output()
    assert Counter(trained(study)).most_common(1)[0][1] == 1
    return study


def trained(study: Path) -> list[str]:
    return (study.parent / "trained.log").read_text().split()


def test_every_write_of_the_store_is_in_the_list() -> None:
    tree = ast.parse(inspect.getsource(inspect.getmodule(Store)))  # type: ignore[arg-type]
    writes = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Name) and d.id == "_writes" for d in node.decorator_list)
    }
    assert len(writes) > 8
    assert writes | {"renew"} == WRITES.keys() | ELSEWHERE.keys()


def go_on_after(
    zygote: Zygote, study: Path, calm: Path, kill: tuple[Literal["store", "files", "os"], str, str, int]
) -> None:
    """Kill a study there, go on, and compare with a calm one."""
    killed = zygote.start(study, kill=kill)
    assert killed.wait() is None, f"it was not killed:\n{killed.output()}"
    resumed = zygote.start(study)
    assert resumed.wait() == 0, resumed.output()
    assert essence(trials_of(study)) == essence(trials_of(calm))
    again = {key: n for key, n in Counter(trained(study)).items() if n > 1}
    assert len(again) <= 1, "one group: one sample was in flight"
    assert all(n == 2 for n in again.values())
    assert kept(study) == kept(calm), "the same models are kept"


def kept(study: Path) -> set[str]:
    folder = study.parent / "studies" / "toy"
    store = Store(folder)
    names = set(store.kept_artifacts().values())
    store.close()
    assert names == {str(p.relative_to(folder)) for p in folder.glob("artifacts/*/*/adapter")}
    return names


@pytest.mark.parametrize("when", ["inside", "after"])
@pytest.mark.parametrize(("method", "nth"), [(m, n) for m, calls in WRITES.items() for n in calls], ids=str)
def test_a_commit_of_the_store(zygote: Zygote, calm: Path, tmp_path: Path, method: str, nth: int, when: str) -> None:
    go_on_after(zygote, write_toy_study(tmp_path, **STUDY), calm, ("store", method, when, nth))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("nth", [1, 2, 3, 8])
def test_a_file_put_into_its_place(zygote: Zygote, calm: Path, tmp_path: Path, nth: int, when: str) -> None:
    """`trained.json` and `result.json` of samples, one after the other; `before`, half of it is written elsewhere."""
    go_on_after(zygote, write_toy_study(tmp_path, **STUDY), calm, ("os", "replace", when, nth))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("nth", [1, 4])
def test_a_model_put_into_its_place(zygote: Zygote, calm: Path, tmp_path: Path, nth: int, when: str) -> None:
    study = write_toy_study(tmp_path, **STUDY)
    go_on_after(zygote, study, calm, ("files", "flush", when, nth))
    assert not list(study.parent.glob("studies/toy/artifacts/*/*.tmp-*"))


def test_a_driver_that_is_killed_again_and_again(zygote: Zygote, calm: Path, tmp_path: Path) -> None:
    """At each commit in turn, every driver one further than the last: each leaves at least that one behind."""
    study = write_toy_study(tmp_path, **STUDY)
    for _ in range(60):
        session = zygote.start(study, kill=("store", "add_sample", "after", 1))
        if session.wait() is not None:
            break
    assert session.wait() == 0, session.output()
    assert essence(trials_of(study)) == essence(trials_of(calm))
    assert len(trained(study)) <= 2 * len(set(trained(study)))
    assert zygote.start(study).wait() == 0
    assert essence(trials_of(study)) == essence(trials_of(calm)), "a finished study is left as it is"
