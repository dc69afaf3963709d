"""What trials cost, against counting by hand."""

from pathlib import Path
from typing import Any

import pytest

from duet_ray.budget import is_spent, n_confirmations, n_left, n_samples, spent
from duet_ray.config import StudyConfig, config_from
from duet_ray.records import BASE_TRIAL, CONFIRM_BASE, CONFIRM_FIRST, Ratio, Trial
from tests.toy_study import toy_data

RATIO = Ratio(counts=(8, 8, 8))


def study(**changes: Any) -> StudyConfig:
    """3 + 2 whole trials of two samples each."""
    return config_from(toy_data(**changes), folder=Path())


def trials(*fidelities: float, pending: int = 0) -> list[Trial]:
    """Trials of these fidelities, the last of them pending, beside a base and a confirmation, which cost nothing."""
    last = len(fidelities) - pending
    found = [
        Trial(
            number=n,
            kind="search",
            ratio=RATIO,
            status="done" if n < last else "pending",
            method="random",
            fidelity=f,
        )
        for n, f in enumerate(fidelities)
    ]
    base = Trial(number=BASE_TRIAL, kind="base", ratio=None, status="done", method="base")
    again = Trial(number=CONFIRM_FIRST, kind="confirm", ratio=RATIO, status="pending", method="confirm:t0000")
    return [base, *found, again]


def test_without_fidelities_trials_are_counted() -> None:
    config = study()
    assert [n_left(trials(*[1.0] * n), config) for n in range(6)] == [5, 4, 3, 2, 1, 0]
    assert [is_spent(trials(*[1.0] * n), config) for n in (4, 5, 6)] == [False, True, True]
    assert n_left(trials(*[1.0] * 5, pending=2), config) == 2


def test_a_cheap_trial_counts_as_its_share() -> None:
    config = study(search__fidelity={"rows": [0.25, 0.5]})
    assert spent(trials(1.0, 0.25, 0.5, pending=1)) == 1.75
    assert spent(trials(1.0, 0.25, 0.5, pending=1), ended=True) == 1.25
    assert n_left(trials(1.0, 0.25, 0.5, pending=1), config) == 13 + 1
    assert n_left([], config) == 20


@pytest.mark.parametrize(("n", "ends"), [(13, False), (14, True)])
def test_it_ends_when_what_is_left_does_not_pay_for_the_cheapest_trial(n: int, ends: bool) -> None:
    """One whole trial and 12 of 0.3 leave 0.4 of 5; 13 leave 0.1."""
    config = study(search__fidelity={"rows": [0.3]})
    assert is_spent(trials(1.0, *[0.3] * (n - 1)), config) is ends
    assert (n_left(trials(1.0, *[0.3] * (n - 1)), config) == 0) is ends


def test_samples_of_a_trial() -> None:
    config = study(confirm={"finalists": 2, "repeats": 3}, sampling={"k": "auto", "k_bounds": [1, 4]})
    of = [
        Trial(number=0, kind="start", ratio=RATIO, status="done", method="uniform", k=2),
        Trial(number=1, kind="start", ratio=RATIO, status="done", method="random"),
        Trial(number=CONFIRM_FIRST, kind="confirm", ratio=RATIO, status="done", method="confirm:t0000"),
        Trial(number=BASE_TRIAL, kind="base", ratio=None, status="done", method="base"),
        Trial(number=CONFIRM_BASE, kind="confirm", ratio=None, status="done", method="confirm:base"),
    ]
    assert [n_samples(trial, config) for trial in of] == [2, 4, 3, 1, 1]


def test_models_that_confirm() -> None:
    assert n_confirmations(study(confirm={"finalists": 0})) == 0
    assert n_confirmations(study(confirm={"finalists": 2, "repeats": 3})) == 9
    assert n_confirmations(study(confirm={"finalists": 2, "repeats": 3}, search__recommend="anywhere")) == 12
