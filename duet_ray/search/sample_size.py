"""How many samples a trial should have (`sampling.k: auto`): more where they may change the recommendation.

What a sample costs is known, and what it brings can be computed beforehand. If the ratio is predicted as N(m, s²), and
an observation of it has the variance v_k with k samples, its posterior mean will be N(m, s̃_k²), s̃_k² = s⁴ / (s² + v_k).
The best recommendation so far has the posterior mean b, so k samples lower it by

    g(k) = E[max(0, b − (m + s̃_k Z))] = s̃_k (φ(z) + z Φ(z)),   z = (b − m) / s̃_k,

on average: the knowledge gradient of one ratio (Frazier, Powell & Dayanik 2008). Of the allowed numbers the one with
the largest gain for its cost, g(k) / (k_max + k), is taken: a trial costs its samples, and as much again as a full one
because the number of trials is limited. That several samples are weighed together is KG(*) of Frazier & Powell 2010
("Paradoxes in learning and the marginal value of information"), who show why the gain of one misleads: g may be
S-shaped, worth nothing for one noisy look and much for four. Where even the most samples would hardly make the ratio
the recommended one, nothing is compared with nothing, and the ratio gets the fewest.

In simulation (`benchmarks/noise_law.py`) this is no better than a fixed k with as many samples in all, and no rule that
we tried was: a Gaussian process learns as much from another ratio nearby as from another sample.

Observations with different k are not comparable as they are: `noise.told_noise` comes first.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import ndtr

from duet_ray.search.noise import FEWEST_DIFFERENCES
from duet_ray.search.told import Told
from duet_ray.theory import TruncatedExponential

HARDLY = 0.05
"""Probability of becoming the recommended ratio below which a trial gets the fewest samples."""


def n_samples(
    predicted: tuple[float, float] | None,
    best: float | None,
    bounds: tuple[int, int],
    noise_sd: Callable[[int], float] | None,
) -> int:
    """The number of samples for a proposal.

    Args:
        predicted: posterior mean and standard deviation of the noiseless loss at the ratio; None in the start design.
        best: posterior mean of the loss at the ratio that would be recommended now; None where there is none.
        bounds: fewest and most samples (`sampling.k_bounds`).
        noise_sd: standard deviation of an observation with k samples, for each k: see `noise_by_k`. None: unknown.
    """
    fewest, most = bounds
    if predicted is None or best is None or noise_sd is None:
        return fewest
    mean, sd = predicted
    if not sd > 0:
        return fewest

    def spread(k: int) -> float:
        """s̃_k."""
        return sd**2 / math.hypot(sd, noise_sd(k))

    if ndtr((best - mean) / spread(most)) < HARDLY:
        return fewest

    def worth(k: int) -> float:
        z = (best - mean) / spread(k)
        return spread(k) * (math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) + z * float(ndtr(z))) / (most + k)

    return max(range(fewest, most + 1), key=lambda k: (worth(k), -k))


def noise_by_k(
    told: Sequence[Told], law: TruncatedExponential | None, inferred_sd: float | None
) -> Callable[[int], float] | None:
    """The standard deviation of an observation with k samples, as far as it is known.

    Args:
        told: everything told, with the values of the samples; in any order.
        law: of `told_noise`; it is used where there is one.
        inferred_sd: the model's own estimate, in the unit of the losses; used where trials have too few values to tell.

    Returns:
        None where nothing is known. Without a law the spread falls with √k, as that of a mean of k does.
    """
    if law is not None:
        return law.std
    groups = sorted(tuple(sorted(one.samples)) for one in told if len(one.samples) > 1 and one.fidelity == 1)
    n_differences = sum(len(values) - 1 for values in groups)
    if n_differences >= FEWEST_DIFFERENCES:
        single = math.sqrt(sum((len(v) - 1) * float(np.var(v, ddof=1)) for v in groups) / n_differences)
    elif inferred_sd is not None and told:
        single = inferred_sd * math.sqrt(float(np.mean([one.k_used for one in told])))
    else:
        return None
    return lambda k: single / math.sqrt(k)
