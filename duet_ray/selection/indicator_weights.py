"""How much each indicator counts: a ridge regression of rewards on the mean indicators of the rows behind them.

    reward_j = a + b · log(tokens of the demonstrations)_j + w · x_j + noise,   x_j the mean indicators of set j.

The number of tokens is a covariate, not an indicator: more context helps by itself, and without it every indicator
that goes with length would be paid for that. Intercept and covariate are not penalised; the penalty on w is the one of
least leave-one-out error, in closed form, in a grid that ends at infinity (w = 0).

A few dozen noisy rewards can always be fitted, and a penalty can always be chosen that looks good. So the gain over
the covariate alone, penalty chosen and all, is compared with the gain on rewards whose residuals were shuffled
(Freedman & Lane 1983): the p-value is the share of shuffles that gain as much.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

N_SHUFFLES = 999
_PENALTIES = (math.inf, *np.logspace(3, -2, 26))
"""Relative to the mean eigenvalue of xᵀx, largest first: the first of equals is taken."""

_SMALLEST_LEFT = 1e-6
"""Smallest 1 − leverage that a leave-one-out residual is divided by."""


@dataclass(frozen=True, kw_only=True)
class LearnedWeights:
    """What the rewards say of the indicators."""

    weights: np.ndarray
    """`(n_indicators,)`: change of reward per standard deviation of a set's mean indicator."""
    r_squared: float
    """The share of the variance left by the covariate that is predicted leave-one-out; 0 where w = 0 is best."""
    rank_correlation: float
    """Spearman, of what the covariate leaves with what is predicted of it, leave-one-out; 0 where w = 0 is best.
    Optimistic, since the penalty was chosen on the same rewards: by chance it is 0.3 with 8 of them, 0.1 with 48."""
    p_value: float
    """How often shuffled rewards are predicted as well: in (0, 1], uniform where indicators have no effect."""
    n_effective: float
    """How many indicators' worth of freedom the penalty leaves, from 0 to n_indicators."""


def learn_weights(
    indicators: np.ndarray, rewards: np.ndarray, covariate: np.ndarray, seed: int | Sequence[int]
) -> LearnedWeights:
    """Regress rewards on indicators.

    Args:
        indicators: `(n, n_indicators)` mean standardised indicators of each set.
        rewards: `(n,)`.
        covariate: `(n,)`.
        seed: of the shuffles.
    """
    basis = _basis(np.column_stack([np.ones(len(rewards)), covariate]))
    x, y = _residual(indicators, basis), _residual(rewards, basis)
    ridge = _Ridge.of(x, basis)
    errors = ridge.errors(y[:, None])[:, 0]
    best = int(np.argmin(errors))
    gain = _gain(errors[:, None])[0]
    generator = np.random.default_rng(seed)
    shuffled = np.stack([generator.permutation(y) for _ in range(N_SHUFFLES)], axis=1)
    by_chance = _gain(ridge.errors(_residual(shuffled, basis)))
    kept = ridge.kept(_PENALTIES[best])
    inverse = np.divide(kept, ridge.s, out=np.zeros_like(kept), where=ridge.s > 0)
    left = ridge.left_out(y[:, None], math.inf)[:, 0]
    predicted = left - ridge.left_out(y[:, None], _PENALTIES[best])[:, 0]
    correlates = best > 0 and np.ptp(left) > 0 and np.ptp(predicted) > 0
    return LearnedWeights(
        weights=ridge.vt.T @ (inverse * (ridge.u.T @ y)),
        r_squared=float(gain),
        rank_correlation=float(spearmanr(left, predicted).statistic) if correlates else 0.0,
        p_value=float((1 + np.sum(by_chance >= gain)) / (1 + N_SHUFFLES)),
        n_effective=float(kept.sum()),
    )


@dataclass(frozen=True)
class _Ridge:
    """Ridge regression on x = u diag(s) vt, beside covariates that are projected out of x and not penalised."""

    u: np.ndarray
    s: np.ndarray
    vt: np.ndarray
    known_leverage: np.ndarray
    """`(n,)`: the covariates' part of each observation's leverage."""

    @classmethod
    def of(cls, x: np.ndarray, basis: np.ndarray) -> "_Ridge":
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        return cls(u, s, vt, np.square(basis).sum(axis=1))

    def kept(self, penalty: float) -> np.ndarray:
        """`(n_directions,)`: the share of each direction that the penalty leaves."""
        scale = max(float(np.mean(self.s**2)), np.finfo(float).tiny)
        return self.s**2 / (self.s**2 + penalty * scale)

    def left_out(self, y: np.ndarray, penalty: float) -> np.ndarray:
        """Leave-one-out residuals, `(n, m)` for m columns of rewards: (y − ŷ)_i / (1 − leverage_i)."""
        kept = self.kept(penalty)
        left = 1 - self.known_leverage - self.u**2 @ kept
        fitted = self.u @ (kept[:, None] * (self.u.T @ y))
        return np.asarray((y - fitted) / np.maximum(left, _SMALLEST_LEFT)[:, None])

    def errors(self, y: np.ndarray) -> np.ndarray:
        """Sums of squared leave-one-out residuals: `(n_penalties, m)`."""
        return np.stack([np.square(self.left_out(y, penalty)).sum(axis=0) for penalty in _PENALTIES])


def _gain(errors: np.ndarray) -> np.ndarray:
    """`(m,)`: what the best penalty gains over none of the indicators, as a share."""
    return np.asarray(1 - errors.min(axis=0) / np.maximum(errors[0], np.finfo(float).tiny))


def _basis(columns: np.ndarray) -> np.ndarray:
    """An orthonormal basis of what the columns span; a constant covariate adds nothing to the intercept."""
    u, s, _ = np.linalg.svd(columns, full_matrices=False)
    return np.asarray(u[:, s / s[0] > 1e-9])


def _residual(values: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """What an orthonormal basis leaves of `values`."""
    return np.asarray(values - basis @ (basis.T @ values))
