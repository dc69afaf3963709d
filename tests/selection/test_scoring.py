"""The steps of a domain: what is shared out, what is found again, and what must not depend on it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duet_ray.config import SelectionConfig, TrainingConfig
from duet_ray.errors import SelectionError
from duet_ray.selection import METHODS, Findings, RowWeights, Scoring, SelectionContext, n_shards, scoring, select
from duet_ray.selection.weighting import from_scores
from tests.selection.toy_domain import toy_domain

DOMAIN = toy_domain(10, 4)


@dataclass
class Counting:
    """Scores a row by its length, and remembers what it was asked."""

    asked: list[Any] = field(default_factory=list)
    name: str = "influence"

    def prepare(self, domain: Any, context: SelectionContext, folder: Path) -> Findings:
        self.asked.append("prepare")
        (folder / "shift.json").write_text("7")
        return Findings(details={"damping": 0.5}, notes=("prepared",))

    def measure(self, domain: Any, rows: np.ndarray, context: SelectionContext, folder: Path) -> np.ndarray:
        self.asked.append(rows.tolist())
        return domain.train.n_tokens[rows] + json.loads((folder / "shift.json").read_text())

    def weigh(self, domain: Any, measured: np.ndarray, context: SelectionContext, folder: Path) -> RowWeights:
        self.asked.append("weigh")
        return from_scores(measured, context.settings, domain.name)


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> Counting:
    method = Counting()
    monkeypatch.setattr(scoring, "make_selector", lambda _: method)
    return method


def context(**settings: Any) -> SelectionContext:
    chosen = SelectionConfig(**{"method": "influence", "shard_rows": 4, **settings})
    return SelectionContext(settings=chosen, training=TrainingConfig(), seed=0, load_base=lambda: (None, None))


def test_every_row_is_in_one_shard() -> None:
    assert [n_shards(n, 4) for n in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]


def test_the_steps_in_order(method: Counting, tmp_path: Path) -> None:
    steps = Scoring(DOMAIN, context(), tmp_path / "place")
    steps.prepare()
    for shard in (2, 0, 1):  # in any order
        steps.measure(shard)
    weights = steps.weigh()
    assert method.asked == ["prepare", [8, 9], [0, 1, 2, 3], [4, 5, 6, 7], "weigh"]
    np.testing.assert_array_equal(weights.scores, DOMAIN.train.n_tokens + 7)
    assert weights.notes[0] == "prepared"
    assert weights.details["damping"] == 0.5
    assert weights.details["prepare_seconds"] >= 0
    assert weights.details["measure_seconds"] >= 0
    steps.remove()
    assert not (tmp_path / "place").exists()


def test_what_is_done_is_not_done_again(method: Counting, tmp_path: Path) -> None:
    for _ in range(2):
        steps = Scoring(DOMAIN, context(), tmp_path / "place")
        steps.prepare()
        steps.measure(0)
    assert method.asked == ["prepare", [0, 1, 2, 3]]


def test_a_preparation_that_dies_leaves_nothing_that_is_taken_for_done(
    method: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Scoring(DOMAIN, context(), tmp_path / "place")
    monkeypatch.setattr(method, "prepare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        steps.prepare()
    monkeypatch.undo()
    monkeypatch.setattr(scoring, "make_selector", lambda _: method)
    steps.prepare()
    assert method.asked == ["prepare"]


def test_a_shard_whose_array_was_not_written_any_more_is_measured_again(
    method: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before any of a shard's two files, or between them: the other shards stand, and weighing goes well."""
    for name in ("write_file", "write_json"):
        method.asked.clear()
        steps = Scoring(DOMAIN, context(), tmp_path / name)
        steps.prepare()
        for shard in (0, 1):
            steps.measure(shard)
        with monkeypatch.context() as patch:
            patch.setattr(scoring, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                steps.measure(2)
        for shard in (0, 1, 2):
            steps.measure(shard)
        assert method.asked == ["prepare", [0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [8, 9]]
        assert steps.weigh().n_rows == 10


def test_an_error_names_the_domain_once(method: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for message in ("it broke", "domain letters: it broke"):

        def broken(*_: Any, message: str = message) -> Findings:
            raise SelectionError(message)

        monkeypatch.setattr(method, "prepare", broken)
        with pytest.raises(SelectionError) as caught:
            Scoring(DOMAIN, context(), tmp_path / "place").prepare()
        assert str(caught.value) == "domain letters: it broke"


@pytest.mark.parametrize("name", sorted(m for m, about in METHODS.items() if about.needs_validation))
def test_a_domain_without_validation_rows_is_an_error_with_a_remedy(name: str) -> None:
    with pytest.raises(SelectionError, match=rf"domain letters: {name} needs validation rows.*validation_fraction"):
        select(toy_domain(5, 0), context(method=name))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_one_row_has_nothing_to_choose_between(name: str) -> None:
    weights = select(toy_domain(1, 4), context(method=name))
    assert weights.probabilities is not None
    assert weights.probabilities.tolist() == [1.0]
    assert "one training row" in weights.notes[0]
