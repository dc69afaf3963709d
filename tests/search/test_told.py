"""What a stored trial and a past run tell the search."""

from pathlib import Path

import pytest

from duet_ray.config import config_from
from duet_ray.records import Observation, PastRun, Ratio, SampleResult, SampleSpec, Trial
from duet_ray.search.told import metric_losses, told_of, told_of_run
from tests.toy_study import toy_data

ALSO = [{"kind": "function", "function": "score:safety", "direction": "maximize", "name": "safety"}]
LOSS = "heldout_loss_loss"


def sample(index: int, value: float | None, **metrics: float) -> SampleResult:
    spec = SampleSpec(trial=3, sample=index, kind="search", ratio=Ratio(counts=(12, 6, 6)))
    return SampleResult(spec=spec, value=value, reason=None if value is not None else "diverged", metrics=metrics)


def trial(*samples: SampleResult, best: int, value: float, **rest) -> Trial:
    seen = Observation(value=value, k=len(samples), k_used=sum(s.ok for s in samples), best_sample=best, sem=0.1)
    return Trial(
        number=3, kind="search", ratio=Ratio(counts=(12, 6, 6)), status="done", method="", samples=samples,
        observation=seen, **rest,
    )  # fmt: skip


def test_everything_a_trial_knows_is_told_as_losses(tmp_path: Path) -> None:
    config = config_from(toy_data(also=ALSO), folder=tmp_path)
    settings = (("training.rank", 8),)
    samples = sample(0, 2.0, safety=0.5), sample(1, None), sample(2, 1.5, safety=0.75, other=7.0)
    told = told_of(trial(*samples, best=2, value=1.5, settings=settings, fidelity=0.25), config)
    assert told is not None
    assert (told.loss, told.sem, told.k_used, told.samples) == (1.5, 0.1, 2, (2.0, 1.5))
    assert (told.settings, told.fidelity) == (settings, 0.25)
    assert told.others == {LOSS: 1.5, "safety": -0.75}


def test_scores_become_losses(tmp_path: Path) -> None:
    feedback = {"kind": "function", "function": "score:model", "direction": "maximize"}
    config = config_from(toy_data(feedback=feedback), folder=tmp_path)
    told = told_of(trial(sample(0, 0.5), sample(1, 0.75), best=1, value=0.75), config)
    assert told is not None
    assert (told.loss, told.samples, told.others) == (-0.75, (-0.5, -0.75), {"function": -0.75})
    run = told_of_run(PastRun(counts=(24, 0, 0), value=0.5, sem=0.2, fidelity=0.25), config)
    assert (run.loss, run.sem, run.fidelity, run.k_used, run.samples) == (-0.5, 0.2, 0.25, 1, (-0.5,))


def test_of_a_sum_the_feedbacks_own_number_is_a_metric(tmp_path: Path) -> None:
    config = config_from(
        toy_data(also=ALSO, search__objective={"weights": {LOSS: 1.0, "safety": 2.0}}), folder=tmp_path
    )
    told = told_of(trial(sample(0, 1.0, heldout_loss_loss=2.0, safety=0.5), best=0, value=1.0), config)
    assert told is not None
    assert told.loss == 1.0
    assert told.others == {LOSS: 2.0, "safety": -0.5}


def test_metrics_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    config = config_from(toy_data(also=ALSO), folder=tmp_path)
    assert metric_losses(sample(0, 2.0, safety=float("nan")), config) == {LOSS: 2.0}
    assert metric_losses(sample(0, None, safety=0.5), config) == {}


@pytest.mark.parametrize("change", [{"observation": None}, {"kind": "confirm"}, {"ratio": None}])
def test_what_is_no_observation_of_the_search_tells_nothing(tmp_path: Path, change: dict) -> None:
    from dataclasses import replace

    config = config_from(toy_data(), folder=tmp_path)
    assert told_of(replace(trial(sample(0, 2.0), best=0, value=2.0), **change), config) is None
