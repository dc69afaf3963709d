"""Raw scores → the probabilities that rows are drawn by.

A score says which row helps more, not how often to draw it: that is the weighting's choice, and it matters.

- `shift` is Algorithm 2 of DUET as intended: p ∝ I − min(I) + ε. As printed, (I + min(I) + ε) / Σ I, it goes negative.
  It is nearly uniform whenever one row is far below the others.
- `softmax` is p ∝ exp(z / temperature) with z the standardised scores: one standard deviation is a factor of
  exp(1 / temperature), whatever unit the scores have.

Either gives every row a probability above zero, so that a domain can be drawn to its last row. What the weights are
worth is `RowWeights.effective_sample_size`.
"""

import numpy as np

from duet_ray.config import WeightingConfig
from duet_ray.errors import SelectionError

SHIFT_EPSILON = 1e-6
"""Algorithm 2's ε, relative to the range of the scores, so that the unit of the scores has no part in it."""

EQUAL = 1e-12
"""Scores whose range is below this share of their size differ by rounding only."""

_LOWEST_EXPONENT = -600.0
"""exp of it is still a positive float64: no row becomes impossible to draw."""


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
    if len(scores) == 0:
        raise SelectionError(f"domain {domain}: there are no training rows to weigh; check its source")
    if bad := int((~np.isfinite(scores)).sum()):
        raise SelectionError(
            f"domain {domain}: {bad} of {len(scores)} scores are not finite; raise selection.damping, "
            "lower training.learning_rate, or use selection.method: uniform"
        )
    low, high = float(scores.min()), float(scores.max())
    if high - low <= EQUAL * max(abs(low), abs(high)):
        uniform = np.full(len(scores), 1 / len(scores))
        return uniform, (f"all {len(scores)} scores are equal ({low:g}): uniform weights",)
    scores = scores / max(abs(low), abs(high))
    if weighting.kind == "shift":
        weights = scores - scores.min() + SHIFT_EPSILON * np.ptp(scores)
    else:
        exponents = (scores - scores.max()) / (scores.std() * weighting.temperature)
        weights = np.exp(np.maximum(exponents, _LOWEST_EXPONENT))
    return weights / weights.sum(), ()
