"""The regression against refits by brute force, and what it makes of planted effects and of none."""

import math

import numpy as np
import pytest

from duet_ray.selection.indicator_weights import _PENALTIES, learn_weights


def planted(generator, n, weights, noise):
    """Indicators that go together, a covariate that goes with the first, rewards that depend on all."""
    x = generator.normal(size=(n, len(weights))) @ (np.eye(len(weights)) + 0.3)
    covariate = 5 + 0.5 * x[:, 0] + generator.normal(size=n)
    return x, x @ weights + 2 * covariate + 7 + noise * generator.normal(size=n), covariate


def ridge(x, y, covariate, absolute: float) -> tuple[np.ndarray, np.ndarray]:
    """(intercept and covariate, weights) of ‖y − a − bc − xw‖² + absolute ‖w‖², by the normal equations."""
    design = np.column_stack([np.ones(len(y)), covariate, x])
    penalty = np.diag([0.0, 0.0, *[absolute] * x.shape[1]])
    solution = np.linalg.solve(design.T @ design + penalty, design.T @ y)
    return solution[:2], solution[2:]


def test_weights_are_those_of_the_penalty_with_the_least_leave_one_out_error():
    x, y, c = planted(np.random.default_rng(0), 20, np.array([1.0, -0.5, 0.0]), noise=2.0)
    known = np.column_stack([np.ones(20), c])
    residual = x - known @ np.linalg.lstsq(known, x, rcond=None)[0]
    scale = np.trace(residual.T @ residual) / 3

    def left_out(penalty: float) -> np.ndarray:
        errors = []
        for i in range(20):
            rest = np.arange(20) != i
            if math.isinf(penalty):
                errors.append(y[i] - known[i] @ np.linalg.lstsq(known[rest], y[rest], rcond=None)[0])
            else:
                base, w = ridge(x[rest], y[rest], c[rest], penalty * scale)
                errors.append(y[i] - known[i] @ base - x[i] @ w)
        return np.array(errors)

    errors = [np.sum(left_out(penalty) ** 2) for penalty in _PENALTIES]
    best = int(np.argmin(errors))
    found = learn_weights(x, y, c, seed=0)
    assert 0 < best < len(errors) - 1
    np.testing.assert_allclose(found.weights, ridge(x, y, c, _PENALTIES[best] * scale)[1], rtol=1e-8)
    assert found.r_squared == pytest.approx(1 - errors[best] / errors[0], rel=1e-8)
    without, with_ = left_out(math.inf), left_out(_PENALTIES[best])
    ranks = [np.argsort(np.argsort(v)) for v in (without, without - with_)]
    assert found.rank_correlation == pytest.approx(np.corrcoef(*ranks)[0, 1], rel=1e-8)
    assert 0 < found.n_effective < 3


def test_planted_weights_are_found_and_the_covariate_takes_its_own():
    weights = np.array([0.8, -0.4, 0.0, 0.2])
    x, y, c = planted(np.random.default_rng(1), 48, weights, noise=0.1)
    found = learn_weights(x, y, c, seed=0)
    np.testing.assert_allclose(found.weights, weights, atol=0.06)
    assert found.p_value == 1 / 1000
    assert found.rank_correlation > 0.9
    assert found.r_squared > 0.9


@pytest.mark.parametrize("n", [8, 48])
def test_p_values_are_uniform_where_there_is_no_effect(n):
    generator = np.random.default_rng(2)
    results = [learn_weights(*planted(generator, n, np.zeros(6), noise=1.0), seed=s) for s in range(120)]
    # Binomial(120, 0.05) is at most 14 with probability 0.998, Binomial(120, 0.5) within 18 of 60 likewise.
    assert sum(r.p_value <= 0.05 for r in results) <= 14
    assert sum(r.p_value <= 0.5 for r in results) <= 78


def test_where_no_penalty_helps_all_weights_are_zero():
    generator = np.random.default_rng(3)
    results = [learn_weights(*planted(generator, 48, np.zeros(3), noise=1.0), seed=s) for s in range(40)]
    none = [r for r in results if not r.weights.any()]
    assert len(none) >= 10
    assert {(r.r_squared, r.rank_correlation, r.p_value, r.n_effective) for r in none} == {(0.0, 0.0, 1.0, 0.0)}


def test_equal_rewards_and_a_constant_covariate_are_no_trouble():
    x = np.random.default_rng(4).normal(size=(12, 2))
    flat = learn_weights(x, np.full(12, 3.0), np.ones(12), seed=0)
    assert not flat.weights.any()
    assert flat.p_value > 0.05
    steady = learn_weights(x, x @ [1.0, -1.0], np.ones(12), seed=0)
    np.testing.assert_allclose(steady.weights, [1.0, -1.0], atol=0.05)


def test_more_indicators_than_rewards_can_tell_apart():
    x, y, c = planted(np.random.default_rng(5), 8, np.ones(6), noise=0.5)
    assert np.isfinite(learn_weights(x, y, c, seed=0).weights).all()
    same = np.repeat(x[:, :1], 2, axis=1)
    first, second = learn_weights(same, y, c, seed=0).weights
    assert first == pytest.approx(second)


def test_the_seed_decides_the_shuffles_only():
    x, y, c = planted(np.random.default_rng(6), 24, np.array([0.8, 0.0]), noise=1.0)
    one, again, other = (learn_weights(x, y, c, seed=[s]) for s in (0, 0, 1))
    assert 0.001 < one.p_value < 1
    assert one.p_value == again.p_value
    assert one.p_value != other.p_value
    np.testing.assert_array_equal(one.weights, other.weights)
