"""What `duet validate` says of the plan."""

from pathlib import Path
from typing import Any

from duet_ray.cli.validate import _plan
from duet_ray.config import config_from
from tests.toy_study import toy_data


def plan(**changes: Any) -> list[str]:
    return _plan(config_from(toy_data(**changes), folder=Path()))


def test_a_plain_study_is_one_line() -> None:
    assert plan() == [
        "(3 start ratios + 2 Bayesian trials) × k = 2 make 10 trainings of 24 rows, 1 at a time",
    ]


def test_what_else_is_searched_and_what_cheap_trials_cost() -> None:
    also = {"training.rank": {"choices": [2, 8]}, "training.learning_rate": {"log": [1e-3, 1e-1]}}
    lines = plan(
        sampling={"k": "auto", "k_bounds": [1, 3]},
        search__fidelity={"rows": [0.25, 0.5]},
        search__also=also,
        search__optimize="both",
    )
    assert lines == [
        "(3 start ratios + 2 Bayesian trials) × k = 1 to 3 make at most 15 trainings of 24 rows, 1 at a time",
        "cheap trials train on 0.25, 0.5 of these rows and count as much of one: there may be up to 17 trials",
        "searched with the ratio: training.rank 2 or 8, training.learning_rate 0.001 to 0.1",
    ]
