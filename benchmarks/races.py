"""What a pool says of k samples: the law of their best one, measured and by Theorem 3.2, and what a race would do.

Nothing is trained here. The best of k is taken over all subsets of the pool, exactly; races are held among random
subsets. Either rests on a finite pool: where k is not small beside it, the subsets overlap and vary too little.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pools import Pool

from duet_ray.errors import DuetError
from duet_ray.theory import GoodnessOfFit, SpacingsFit, fit_spacings, goodness_of_fit, minimum_weights

RACES = 4000
RESAMPLES = 400


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The law of Theorem 3.2 on one pool."""

    fit: SpacingsFit
    goodness: GoodnessOfFit
    shift: float
    """y*, the estimated best loss of the ratio."""
    shift_error: float


def fitted(pool: Pool, n_bootstrap: int, seed: int) -> Fitted | None:
    """None where the pool's values are all equal, or fewer than two."""
    try:
        fit = fit_spacings([pool.losses.tolist()])
    except DuetError:
        return None
    shift, error = fit.law.shift(pool.losses.tolist())
    goodness = goodness_of_fit([pool.losses.tolist()], fit, n_bootstrap=n_bootstrap, seed=seed)
    return Fitted(fit=fit, goodness=goodness, shift=shift, shift_error=error)


@dataclass(frozen=True, kw_only=True)
class ObservationLaw:
    """The best of k over all subsets of a pool."""

    mean: float
    error: float
    """Standard error of `mean`: another pool would give another one."""
    spread: float


def observation_law(losses: np.ndarray, k: int, generator: np.random.Generator) -> ObservationLaw:
    """The smallest of k values: exact over the subsets, its error from resampled pools."""
    weights, ordered = minimum_weights(len(losses), k), np.sort(losses)
    mean = float(weights @ ordered)
    again = np.sort(generator.choice(losses, size=(RESAMPLES, len(losses))), axis=1) @ weights
    spread = math.sqrt(max(0.0, float(weights @ np.square(ordered - mean))))
    return ObservationLaw(mean=mean, error=float(again.std(ddof=1)), spread=spread)


def sizes_of(pool: Pool, sizes: Sequence[int]) -> list[int]:
    """The k of which the pool has at least two subsets."""
    return [k for k in sizes if k < len(pool.samples)]


@dataclass(frozen=True, kw_only=True)
class Races:
    """What racing does to trials of k samples, on average over subsets of a pool."""

    steps_saved: float
    """Share of the optimizer steps that are not trained."""
    seconds_saved: float
    """Share of the seconds, the comparisons counted as full measurements."""
    best_survived: float
    """Share of the races that the sample with the best final loss won."""
    change: float
    """Mean rise of the observation's loss, >= 0."""
    equal_k: float
    """How many samples run to the end cost as much as the race."""
    equal_change: float
    """Mean rise of the observation's loss if so many are run to the end instead of k, >= 0."""


def race(losses: np.ndarray, keep: float) -> tuple[int, np.ndarray]:
    """Successive halving of one trial, as `sampling.racing` has it.

    Args:
        losses: `(n_moments, k)`, at the comparisons and, last, in the end.
        keep: share that goes on; at least one does.

    Returns:
        The winner, and `(n_moments,)` how many trained up to each moment.
    """
    alive = np.arange(losses.shape[1])
    trained = []
    for compared in losses[:-1]:
        trained.append(len(alive))
        n_kept = max(1, math.ceil(keep * len(alive) - 1e-9))
        alive = alive[np.argsort(compared[alive], kind="stable")[:n_kept]]
    trained.append(len(alive))
    return int(alive[np.argmin(losses[-1][alive])]), np.array(trained)


def races(pool: Pool, k: int, keep: float, generator: np.random.Generator) -> Races:
    """Races among random subsets of a pool."""
    losses = np.array([sample.losses for sample in pool.samples]).T
    steps = np.array(pool.samples[0].steps, dtype=float)
    per_moment = np.diff(steps, prepend=0.0)
    train = float(np.mean([sample.train_seconds for sample in pool.samples]))
    feedback = float(np.mean([sample.feedback_seconds for sample in pool.samples]))
    used, spent, changes, survived = [], [], [], []
    for _ in range(RACES):
        chosen = losses[:, generator.choice(losses.shape[1], size=k, replace=False)]
        winner, trained = race(chosen, keep)
        # A race that is down to one sample compares nothing any more.
        n_measured = sum(n for n in trained[:-1] if n > 1) + trained[-1]
        used.append(trained @ per_moment / (k * steps[-1]))
        spent.append((used[-1] * k * train + n_measured * feedback) / (k * (train + feedback)))
        changes.append(chosen[-1][winner] - chosen[-1].min())
        survived.append(changes[-1] == 0)
    equal_k = max(1.0, k * float(np.mean(spent)))
    return Races(
        steps_saved=1 - float(np.mean(used)),
        seconds_saved=1 - float(np.mean(spent)),
        best_survived=float(np.mean(survived)),
        change=float(np.mean(changes)),
        equal_k=equal_k,
        equal_change=mean_of_best(pool.losses, equal_k) - mean_of_best(pool.losses, k),
    )


def mean_of_best(losses: np.ndarray, k: float) -> float:
    """The mean smallest of k; between whole numbers, of a draw between the two."""
    low = min(int(k), len(losses))
    means = [float(minimum_weights(len(losses), n) @ np.sort(losses)) for n in (low, min(low + 1, len(losses)))]
    return means[0] + (k - low) * (means[1] - means[0]) if k > low else means[0]


def rank_correlations(pool: Pool) -> list[float]:
    """Spearman's, between the losses at each comparison and the final ones."""
    from scipy.stats import spearmanr

    losses = np.array([sample.losses for sample in pool.samples]).T
    return [float(spearmanr(early, losses[-1]).statistic) for early in losses[:-1]]
