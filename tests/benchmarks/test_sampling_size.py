"""What the tables of `benchmarks/sampling_size.py` rest on: `pools.py` and `races.py` beside it."""

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from duet_ray.config import load_config
from duet_ray.execution.worker import Assignment, Worker
from duet_ray.preflight import preflight
from duet_ray.records import Ratio, SampleSpec
from tests.toy_study import write_toy_study

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
from pools import POOL_TRIAL, Pool, PoolSample, PoolTrainer
from races import mean_of_best, observation_law, race, races

RATIO = Ratio(counts=(12, 0, 12))


def pool_with(losses: list[tuple[float, ...]]) -> Pool:
    """A pool that compares after 3 and 6 of 12 steps; a step takes 1 s and a measurement 2 s."""
    samples = tuple(
        PoolSample(number=i, losses=one, steps=(3, 6, 12), train_seconds=12.0, feedback_seconds=2.0)
        for i, one in enumerate(losses)
    )
    return Pool(ratio=RATIO, selection="uniform", samples=samples)


def test_the_observation_is_that_of_all_subsets() -> None:
    losses = np.array([3.0, 1.0, 2.0, 5.0, 8.0])
    for k in (1, 2, 3):
        best = [min(subset) for subset in combinations(losses, k)]
        seen = observation_law(losses, k, np.random.default_rng(0))
        assert seen.mean == pytest.approx(np.mean(best))
        assert seen.spread == pytest.approx(np.std(best))


def test_the_error_of_an_observation_is_that_of_other_pools() -> None:
    generator = np.random.default_rng(0)
    means = [observation_law(generator.exponential(size=40), 4, np.random.default_rng(0)).mean for _ in range(300)]
    errors = [observation_law(generator.exponential(size=40), 4, np.random.default_rng(i)).error for i in range(30)]
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.25)


def test_a_race_by_hand() -> None:
    """Of five, 3 go on (0, 2, 4), of these 2 (2, 4); sample 1, the best in the end, is out at the first comparison."""
    losses = np.array([[1.0, 9.0, 2.0, 8.0, 3.0], [7.0, 0.0, 5.0, 0.0, 6.0], [0.0, -1.0, 4.0, 0.0, 3.0]])
    winner, trained = race(losses, 0.5)
    assert winner == 4
    assert trained.tolist() == [5, 3, 2]
    assert race(losses[:, :1], 0.5)[0] == 0


def test_what_racing_saves() -> None:
    """Four samples: 4 · 3 + 2 · 3 + 1 · 6 = 24 of 48 steps, and 4 + 2 + 1 measurements for 4."""
    generator = np.random.default_rng(1)
    foreseen = pool_with([(x, x, x) for x in generator.random(10)])
    found = races(foreseen, 4, 0.5, generator)
    assert found.steps_saved == pytest.approx(0.5)
    assert found.seconds_saved == pytest.approx(1 - (24 + 7 * 2) / (4 * 14))
    assert (found.best_survived, found.change) == (1.0, 0.0)
    blind = pool_with([(x, x, y) for x, y in generator.random((10, 2))])
    assert races(blind, 4, 0.5, generator).best_survived < 0.7
    assert races(blind, 4, 0.5, generator).change > 0


def test_a_race_of_two_compares_once() -> None:
    """2 · 3 + 1 · 9 = 15 of 24 steps; after the first comparison nobody is left to compare with."""
    generator = np.random.default_rng(1)
    found = races(pool_with([(x, x, x) for x in generator.random(6)]), 2, 0.5, generator)
    assert found.steps_saved == pytest.approx(1 - 15 / 24)
    assert found.seconds_saved == pytest.approx(1 - (15 + 3 * 2) / (2 * 14))


def test_the_best_of_a_broken_number_lies_between() -> None:
    losses = np.array([1.0, 2.0, 4.0, 8.0])
    whole = [mean_of_best(losses, k) for k in (1, 2, 3, 4)]
    assert whole[0] == pytest.approx(losses.mean())
    assert whole[3] == 1.0
    assert mean_of_best(losses, 2.25) == pytest.approx(0.75 * whole[1] + 0.25 * whole[2])


def test_a_sample_of_the_pool_is_a_sample_of_a_study(tmp_path: Path) -> None:
    """Trained with breaks for the comparisons or at one go, the worker's or the script's: the same value."""
    config = load_config(write_toy_study(tmp_path))
    ready = preflight(config)
    assignment = Assignment(
        config=ready.config.model_dump(mode="json"),
        folder=str(tmp_path),
        domain_folders=tuple(str(d.folder) for d in ready.domains),
        scoring_folders=tuple(str(d.folder) for d in ready.scoring_domains),
        weights_folder=str(ready.weights_folder),
        weights_keys=ready.weights_keys,
    )
    spec = SampleSpec(trial=POOL_TRIAL, sample=1, kind="confirm", ratio=RATIO)
    expected = Worker(assignment).do_sample(spec, 1, lambda *_: None).value
    said: list[str] = []
    raced = PoolTrainer((0.25, 0.5), said.append).measure(config, RATIO, 2, tmp_path)
    straight = PoolTrainer((), said.append).measure(config, RATIO, 2, tmp_path)
    assert raced.losses[1] == straight.losses[1] == expected
    assert raced.samples[1].steps == (1, 2, 3)
    assert len(set(raced.samples[1].losses)) == 3, "measured on its way"
    assert len(said) == 2
    assert PoolTrainer((0.25, 0.5), said.append).measure(config, RATIO, 2, tmp_path) == raced
    assert len(said) == 2, "nothing was trained again"
