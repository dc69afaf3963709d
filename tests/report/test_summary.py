"""The questions one asks of a study, with answers by hand."""

import math

import pytest

from duet_ray.records import Direction
from duet_ray.report.summary import (
    Measurement,
    base_measurement,
    best_sample,
    best_trial,
    chosen_trial,
    confirmation_of,
    failure_reasons,
    finalists,
    metric_means,
    running_best,
    searched,
    state,
    uniform_trial,
    value_format,
)
from tests.report.summaries import gallery, study


def test_running_best_follows_the_direction_and_skips_failures() -> None:
    values = [[2.5], [None], [2.7], [2.1], [2.2]]
    low = running_best(study(values))
    assert [b.observation.value for _, b in low] == [2.5, 2.5, 2.5, 2.1, 2.1]
    high = running_best(study(values, direction=Direction.MAXIMIZE))
    assert [b.observation.value for _, b in high] == [2.5, 2.5, 2.7, 2.7, 2.7]


def test_running_best_before_the_first_value_is_none() -> None:
    assert next(b for _, b in running_best(study([[None], [2.0]]))) is None


def test_running_best_up_to_a_trial_does_not_look_ahead() -> None:
    pairs = running_best(study([[2.5], [2.4], [2.0]]), up_to=1)
    assert [t.number for t, _ in pairs] == [0, 1]
    assert pairs[-1][1].observation.value == 2.4


def test_the_earlier_of_two_equal_trials_is_the_best() -> None:
    assert best_trial(study([[2.5], [2.0], [2.0]])).number == 1


def test_best_trial_uses_the_best_of_k_not_the_mean() -> None:
    best = best_trial(study([[2.3, 2.3], [2.0, 9.0]]))
    assert best.number == 1
    assert best_sample(best).value == 2.0
    assert best_sample(best).spec.key == "t0001-s0"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("empty", "empty"),
        ("base only", "base_only"),
        ("all failed", "failed"),
        ("all failed, no base", "failed"),
        ("unfinished", "running"),
        ("confirmed", "finished"),
        ("one trial, k=1", "finished"),
    ],
)
def test_state(name: str, expected: str) -> None:
    assert state(gallery()[name]) == expected


def test_standard_error_by_hand() -> None:
    # mean 2, deviations -1, 0, 1: s = sqrt(2 / 2) = 1, error 1 / sqrt(3)
    measured = Measurement(values=(1.0, 2.0, 3.0))
    assert measured.mean == 2.0
    assert measured.spread == pytest.approx(1.0)
    assert measured.standard_error == pytest.approx(1 / math.sqrt(3))
    assert Measurement(values=(1.0,)).standard_error is None
    assert Measurement(values=(1.0,), trained=False, exact=True).standard_error == 0.0
    assert Measurement(values=(1.0, 3.0), trained=False, exact=True).standard_error == pytest.approx(1.0)


@pytest.mark.parametrize(("is_random", "error"), [(False, 0.0), (True, None)])
def test_one_value_of_the_untouched_model_is_exact_unless_the_feedback_is_random(
    is_random: bool, error: float | None
) -> None:
    assert base_measurement(study([[2.5]], feedback_is_random=is_random)).standard_error == error


def test_confirmation_leaves_failed_samples_out_and_counts_them() -> None:
    again = confirmation_of(study([[2.5], [2.4]], confirm={1: [2.5, None, 2.7]}), "t0001")
    assert again.values == (2.5, 2.7)
    assert again.n_failed == 1
    assert confirmation_of(study([[2.5], [2.4]], confirm={1: [None]}), "t0001") is None


def test_the_finalist_with_the_best_fresh_mean_is_chosen_over_the_best_observation() -> None:
    summary = study([[2.5], [2.0], [2.1]], n_start=1, confirm={1: [2.4, 2.4], 2: [2.2, 2.2], 0: [2.3, 2.3]})
    assert best_trial(summary).number == 1
    assert chosen_trial(summary).number == 2
    # The uniform ratio is measured for comparison; it is no finalist unless it is the best observed.
    assert [t.number for t, _ in finalists(summary)] == [1, 2]


@pytest.mark.parametrize(
    ("direction", "fresh", "expected"),
    [
        (Direction.MINIMIZE, [2.1, 2.2], 0),
        (Direction.MINIMIZE, [2.2, 2.2], 2),  # a tie goes to the search's own
        (Direction.MAXIMIZE, [2.4, 2.5], 0),
        (Direction.MAXIMIZE, [2.3, 2.4], 1),
    ],
)
def test_uniform_is_chosen_where_it_beats_every_finalist(
    direction: Direction, fresh: list[float], expected: int
) -> None:
    values = [[2.25], [2.3], [2.2]] if direction is Direction.MINIMIZE else [[2.0], [2.3], [2.2]]
    summary = study(values, direction=direction, confirm={1: [2.4, 2.4], 2: [2.2, 2.2], 0: fresh})
    assert best_trial(summary) is not uniform_trial(summary)
    assert chosen_trial(summary).number == expected


def test_uniform_is_not_chosen_without_a_model_of_its_own_or_without_a_confirmed_finalist() -> None:
    assert chosen_trial(study([[None], [2.4]], confirm={1: [2.5, 2.5], 0: [2.0, 2.0]})).number == 1
    assert chosen_trial(study([[2.5], [2.4]], confirm={1: [None], 0: [2.0, 2.0]})).number == 1


def test_uniform_is_chosen_where_it_is_the_best_observed() -> None:
    summary = study([[2.0], [2.5]], confirm={0: [2.1, 2.1]})
    assert chosen_trial(summary) is uniform_trial(summary)


def test_failure_reasons_are_first_lines_the_most_frequent_first() -> None:
    summary = study([[None, None]], reason="\nout of memory: 3 GiB\nTraceback (most recent call last)")
    assert failure_reasons(searched(summary)) == (("out of memory: 3 GiB", 2),)


def test_metric_means_ignore_failed_samples() -> None:
    assert metric_means(study([[2.0, None]]).trials[1].samples) == {"accuracy": 0.25}


def test_decimals_follow_the_spread_and_not_an_outlier() -> None:
    assert value_format(study([[2.10], [2.15], [2.2], [2.25]], base=None))(2.1234567) == "2.1235"
    assert value_format(study([[210.0], [350.0], [420.0]], base=None))(210.4) == "210"
    assert value_format(study([[2.10], [2.15], [2.2], [1e6]], base=2.12)).decimals >= 3
    assert value_format(study([[2.5]], base=None))(2.5) == "2.500"
    assert value_format(study([], base=None)).decimals == 3


def test_a_difference_is_never_rounded_to_nothing() -> None:
    values = value_format(study([[200.0], [300.0], [400.0]], base=None))
    assert values.difference(0.0312) == "0.03"
    assert values.difference(-12.4) == "12"
