"""k trial by trial: the knowledge gradient against simulation, and the cases with an obvious answer."""

import math

import numpy as np
import pytest

from duet_ray.records import Ratio
from duet_ray.search import Told
from duet_ray.search.sample_size import n_samples, noise_by_k
from duet_ray.theory import TruncatedExponential

BOUNDS = (1, 8)


def test_the_fewest_where_nothing_is_predicted() -> None:
    noise = noise_by_k([Told(ratio=Ratio(counts=(1, 0)), loss=0.0)], None, 1.0)
    assert n_samples(None, 0.0, BOUNDS, noise) == 1
    assert n_samples((0.0, 1.0), None, BOUNDS, noise) == 1
    assert n_samples((0.0, 1.0), 0.0, (2, 5), None) == 2
    assert n_samples((0.0, 0.0), 0.0, BOUNDS, noise) == 1
    assert n_samples((0.0, 1.0), 0.0, (3, 3), noise) == 3


@pytest.mark.parametrize("single", [0.1, 1.0, 5.0])
def test_the_fewest_where_no_number_changes_the_decision(single: float) -> None:
    """Certain to be worse, and certain to be better: both are decided by the model."""
    noise = lambda k: single / math.sqrt(k)  # noqa: E731
    assert n_samples((10.0, 1.0), 0.0, BOUNDS, noise) == 1
    assert n_samples((-10.0, 1.0), 0.0, BOUNDS, noise) == 1


def test_the_fewest_without_noise() -> None:
    assert n_samples((0.2, 1.0), 0.0, BOUNDS, lambda k: 1e-9) == 1


def test_more_for_a_close_race_in_noise() -> None:
    """Predicted one standard deviation behind, noise twice as large.

    By hand, z = -1 / s̃: s̃² = 1 / 5, 1 / 3, 3 / 7, 1 / 2 for k = 1 … 4, g(k) = 0.0019, 0.0104, 0.0186, 0.0252, and the
    gain for the cost 5 … 8 is largest at 4.
    """
    assert n_samples((1.0, 1.0), 0.0, (1, 4), lambda k: 2 / math.sqrt(k)) == 4
    assert n_samples((0.0, 1.0), 0.0, (1, 4), lambda k: 0.3 / math.sqrt(k)) == 1, "little noise"


def test_where_noise_falls_faster_fewer_are_enough() -> None:
    """As 1 / k (Theorem 3.2 without a cut) instead of 1 / √k."""
    slow = n_samples((0.3, 1.0), 0.0, BOUNDS, lambda k: 3 / math.sqrt(k))
    fast = n_samples((0.3, 1.0), 0.0, BOUNDS, TruncatedExponential(rate=1 / 3).std)
    assert 1 < fast < slow


def test_it_is_the_largest_simulated_gain_for_its_cost() -> None:
    """Draw the truth and the observation, decide by the posterior mean, and count what was gained."""
    generator, n = np.random.default_rng(0), 400_000
    mean, sd, single, best = 0.6, 1.0, 2.0, 0.0
    truth = mean + sd * generator.normal(size=n)
    gains = []
    for k in range(1, 9):
        seen = truth + single / math.sqrt(k) * generator.normal(size=n)
        weight = sd**2 / (sd**2 + single**2 / k)
        believed = mean + weight * (seen - mean)
        gains.append(np.where(believed < best, best - truth, 0.0).mean() / (8 + k))
    chosen = n_samples((mean, sd), best, BOUNDS, lambda k: single / math.sqrt(k))
    assert gains[chosen - 1] == pytest.approx(max(gains), rel=0.02)
    assert chosen > 1


def test_another_unit_and_another_zero_change_nothing() -> None:
    def chosen(unit: float, zero: float) -> int:
        noise = lambda k: 2 * unit / math.sqrt(k)  # noqa: E731
        return n_samples((zero + 0.8 * unit, unit), zero, BOUNDS, noise)

    assert chosen(1.0, 0.0) == chosen(1e-4, 3.0) == chosen(1e5, -7.0) > 1


def test_the_noise_is_the_law_s_then_the_trials_then_the_model_s() -> None:
    law = TruncatedExponential(rate=2.0, cut=1.0)
    pairs = [
        Told(ratio=Ratio(counts=(i, 9 - i)), loss=float(i), k_used=2, samples=(i + 3.0, float(i))) for i in range(9)
    ]
    by_law, by_trials = noise_by_k(pairs, law, 7.0), noise_by_k(pairs, None, 7.0)
    assert by_law is not None
    assert by_law(3) == law.std(3)
    assert by_trials is not None
    assert by_trials(4) == pytest.approx(3 / math.sqrt(2) / 2), "two values 3 apart have the standard deviation 3 / √2"
    by_model = noise_by_k(pairs[:4], None, 7.0)
    assert by_model is not None
    assert by_model(2) == pytest.approx(7.0), "too few differences; the model's is that of k = 2"
    assert by_model(8) == pytest.approx(3.5)
    assert noise_by_k(pairs[:4], None, None) is None
