"""Raw scores → the probabilities that rows are drawn by, or the order they are taken in.

A score says which row helps more, not how often to draw it: that is the weighting's choice, and it matters. The tails
of influence scores decide: on those published with DUET, weights by `shift` are worth 0.97 to 0.999 of most domains'
rows, and by `softmax` at temperature 1 less than a thousandth in half of them (`benchmarks/weighting.py`). Hence the
default is `rank`.

- `shift` is Algorithm 2 of DUET as intended: p ∝ I − min(I) + ε. As printed, (I + min(I) + ε) / Σ I, it goes negative.
  It is nearly uniform whenever one row is far below the others.
- `softmax` is p ∝ exp(z / temperature) with z the standardised scores: one standard deviation is a factor of
  exp(1 / temperature), whatever unit the scores have. Where a few rows are far above the others, it draws little else.
- `rank` is p ∝ the row's rank, 1 for the lowest score: heavy tails have no part in it. It is worth 3/4 of the rows.

Each of them gives every row a probability above zero, so that a domain can be drawn to its last row. What the weights
are worth is `RowWeights.effective_sample_size`. Two methods use scores otherwise: `remove_harmful` drops the lowest
and draws the rest uniformly; `top_n` takes the highest in order.
"""

import numpy as np
from scipy.stats import rankdata

from duet_ray.config import SelectionConfig, WeightingConfig
from duet_ray.errors import SelectionError
from duet_ray.selection.base import RowWeights
from duet_ray.selection.methods import n_drawable

SHIFT_EPSILON = 1e-6
"""Algorithm 2's ε, relative to the range of the scores, so that the unit of the scores has no part in it."""

EQUAL = 1e-12
"""Scores whose range is below this share of their size differ by rounding only."""

_LOWEST_EXPONENT = -600.0
"""exp of it is still a positive float64: no row becomes impossible to draw."""


def from_scores(scores: np.ndarray, settings: SelectionConfig, domain: str) -> RowWeights:
    """What the method in `settings` makes of raw scores, by its weighting or its own rule.

    Args:
        scores: `(n_rows,)`, higher = more helpful.
        domain: its name, for messages.

    Raises:
        SelectionError: there are no scores, or one is not finite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if settings.method == "top_n":
        _check(scores, domain)
        return RowWeights(scores=scores, order=np.argsort(-scores, kind="stable"))
    if settings.method == "remove_harmful":
        probabilities, notes = keep_best(scores, n_drawable(settings, len(scores)), domain)
    else:
        probabilities, notes = weigh(scores, settings.weighting, domain)
    return RowWeights(scores=scores, probabilities=probabilities, notes=notes)


def weigh(scores: np.ndarray, weighting: WeightingConfig, domain: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Turn scores into probabilities.

    Args:
        scores: `(n_rows,)`, higher = more helpful.
        domain: its name, for messages.

    Returns:
        `(n_rows,)` float64, all > 0, sum 1; and notes for the user: all scores equal gives uniform weights.

    Raises:
        SelectionError: there are no scores, or one is not finite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    _check(scores, domain)
    if all_equal(scores):
        uniform = np.full(len(scores), 1 / len(scores))
        return uniform, (f"all {len(scores)} scores are equal ({scores.min():g}): uniform weights",)
    scores = scores / np.abs(scores).max()
    if weighting.kind == "shift":
        weights = scores - scores.min() + SHIFT_EPSILON * np.ptp(scores)
    elif weighting.kind == "rank":
        weights = rankdata(scores)  # equal scores share the mean of their ranks
    else:
        exponents = (scores - scores.max()) / (scores.std() * weighting.temperature)
        weights = np.exp(np.maximum(exponents, _LOWEST_EXPONENT))
    return weights / weights.sum(), ()


def keep_best(scores: np.ndarray, n_kept: int, domain: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Uniform probabilities on the `n_kept` rows with the highest scores, 0 on the others. Raises as `weigh` does.

    Among equal scores the rows that come first are kept.
    """
    _check(scores, domain)
    probabilities = np.zeros(len(scores))
    probabilities[np.argsort(-scores, kind="stable")[:n_kept]] = 1 / n_kept
    notes: tuple[str, ...] = ()
    if all_equal(scores):
        notes = (f"all {len(scores)} scores are equal ({scores[0]:g}): which rows are dropped means nothing",)
    return probabilities, notes


def all_equal(scores: np.ndarray) -> bool:
    """Whether scores, at least one, differ by no more than rounding."""
    return bool(np.ptp(scores) <= EQUAL * np.abs(scores).max())


def _check(scores: np.ndarray, domain: str) -> None:
    if len(scores) == 0:
        raise SelectionError(f"domain {domain}: there are no training rows to weigh; check its source")
    if bad := int((~np.isfinite(scores)).sum()):
        raise SelectionError(
            f"domain {domain}: {bad} of {len(scores)} scores are not finite; lower training.learning_rate, set "
            "model.dtype: float32, raise selection.damping (influence), or use selection.method: uniform"
        )
