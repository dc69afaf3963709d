"""β_t of Chowdhury & Gopalan 2017 against closed forms, and the rescaling against the theorem itself."""

import math

import numpy as np
import pytest

from duet_ray.errors import FeedbackError
from duet_ray.search.schedule import information_gain, theory_beta


def covariance(n: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).dirichlet(np.ones(3), n)
    return np.exp(-np.square(points[:, None] - points[None]).sum(-1) / (2 * 0.3**2))


def test_before_anything_is_told() -> None:
    expected = 2 + 0.5 * math.sqrt(2 * (1 + math.log(10)))
    assert theory_beta(np.zeros((0, 0)), 0.5, 2.0, 0.1, n_trials=20) == pytest.approx(expected)


@pytest.mark.parametrize("n_told", [1, 7])
def test_ratios_that_have_nothing_in_common(n_told: int) -> None:
    """K = I: each of t − 1 observations says ½ ln(1 + 1 / λ)."""
    ridge = 1 + 2 / 20
    gained = n_told / 2 * math.log(1 + 1 / ridge)
    expected = 1 + 0.3 * math.sqrt(2 * (gained + 1 + math.log(20)))
    assert theory_beta(np.eye(n_told), 0.3, 1.0, 0.05, n_trials=20) == pytest.approx(expected)


def test_one_ratio_again_and_again() -> None:
    """K = 1 everywhere has one eigenvalue, t − 1."""
    ridge = 1 + 2 / 10
    gained = 0.5 * math.log(1 + 6 / ridge)
    assert information_gain(np.ones((6, 6)), np.full(6, ridge)) == pytest.approx(gained)
    expected = 1 + math.sqrt(2 * (gained + 1 + math.log(10)))
    assert theory_beta(np.ones((6, 6)), 1.0, 1.0, 0.1, n_trials=10) == pytest.approx(expected)


def test_the_information_is_that_of_predictions_one_by_one() -> None:
    """½ Σ ln(1 + σ²_{t-1}(r_t) / λ): Srinivas et al. 2010, Lemma 5.3."""
    kernel, ridge = covariance(8), np.full(8, 1.3)
    left, gained = kernel.copy(), 0.0
    for t in range(8):
        gained += 0.5 * math.log1p(left[t, t] / ridge[t])
        left = left - np.outer(left[t], left[t]) / (ridge[t] + left[t, t])
    assert information_gain(kernel, ridge) == pytest.approx(gained, rel=1e-9)


def test_another_noise_is_the_theorem_in_another_unit() -> None:
    """In units of s / √λ the noise variance is λ. The norm of f stays, as the kernel changes by the square of the unit.

    What is left over is 1 / √λ, which the theorem rounds up to 1.
    """
    kernel, n_trials, variance = covariance(9), 12, 0.04
    ridge = 1 + 2 / n_trials
    unit = math.sqrt(variance / ridge)
    theorem = theory_beta(kernel / unit**2, 0.3 / unit, 1.0, 0.1, n_trials=n_trials)
    mine = theory_beta(kernel, 0.3, 1.0, 0.1, n_trials=n_trials, model_noise=variance)
    assert mine - 1 == pytest.approx((theorem - 1) / math.sqrt(ridge))


def test_the_bound_holds_for_the_model_s_own_sigma() -> None:
    """Functions of the RKHS with norm B, noisy observations with noises of different size: never outside, in 200."""
    generator = np.random.default_rng(3)
    points = generator.dirichlet(np.ones(3), 60)
    kernel = np.exp(-np.square(points[:, None] - points[None]).sum(-1) / (2 * 0.3**2))
    n_outside = 0
    for _ in range(200):
        weights = generator.normal(size=60)
        f = kernel @ weights / math.sqrt(weights @ kernel @ weights)
        told = generator.integers(0, 60, 15)
        sd = generator.choice([0.1, 0.3], 15)
        losses = f[told] + sd * generator.normal(size=15)
        inverse = np.linalg.inv(kernel[np.ix_(told, told)] + np.diag(sd**2))
        across = kernel[:, told]
        mean, variance = across @ inverse @ losses, 1 - np.einsum("ij,jk,ik->i", across, inverse, across)
        # R / s is 1 at every trial, so R is the smallest s.
        beta = theory_beta(kernel[np.ix_(told, told)], 0.1, 1.0, 0.1, n_trials=15, model_noise=sd**2)
        n_outside += bool(np.any(np.abs(mean - f) > beta * np.sqrt(np.maximum(variance, 0)) + 1e-9))
    assert n_outside <= 20, "1 − δ = 90 %"


def test_noise_that_differs_between_trials() -> None:
    """Unrelated ratios say ½ ln(1 + 1 / s²) each, and the factor is that of the trial with the largest R / s."""
    variance = np.array([0.01, 0.04, 0.25])
    gained = 0.5 * float(np.log1p(1 / variance).sum())
    expected = 1 + 0.3 / 0.1 * math.sqrt(2 * (gained + 1 + math.log(10)))
    assert theory_beta(np.eye(3), 0.3, 1.0, 0.1, n_trials=9, model_noise=variance) == pytest.approx(expected)


def test_more_trials_more_noise_and_more_certainty_explore_more() -> None:
    kernel = covariance(10)

    def beta(n: int = 10, noise_sd: float = 0.5, norm: float = 1.0, delta: float = 0.1) -> float:
        return theory_beta(kernel[:n, :n], noise_sd, norm, delta, n_trials=30)

    assert beta(5) < beta(10)
    assert beta(noise_sd=0.4) < beta() < beta(delta=0.01)
    assert beta(norm=3.0) == pytest.approx(beta() + 2)


@pytest.mark.parametrize(
    ("noise_sd", "norm", "delta", "n_trials"),
    [(-1, 1, 0.1, 5), (1, 0, 0.1, 5), (1, 1, 0, 5), (1, 1, 1, 5), (1, 1, 0.1, 0), (math.nan, 1, 0.1, 5)],
)
def test_what_no_schedule_can_be_made_of(noise_sd: float, norm: float, delta: float, n_trials: int) -> None:
    with pytest.raises(FeedbackError, match=r"search\.delta"):
        theory_beta(np.eye(2), noise_sd, norm, delta, n_trials=n_trials)


def test_shapes_and_variances_are_checked() -> None:
    with pytest.raises(FeedbackError, match="shape"):
        theory_beta(np.ones((2, 3)), 1.0, 1.0, 0.1, n_trials=3)
    with pytest.raises(FeedbackError, match="> 0 at every trial"):
        theory_beta(np.eye(2), 1.0, 1.0, 0.1, n_trials=3, model_noise=np.array([0.1, 0.0]))
