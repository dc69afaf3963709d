"""Toy objectives with a known best ratio: a study's answer can be checked, in no time and without a model."""

from collections.abc import Callable

import numpy as np

from duet_ray.records import Ratio
from duet_ray.seeds import generator

Toy = Callable[[Ratio, int], float]
"""(ratio, trial number) → loss, lower is better. The same call always gives the same loss."""


def quadratic_toy(best: np.ndarray, noise: float = 0.0, seed: int = 0) -> Toy:
    """‖r − best‖² plus Gaussian noise that belongs to the trial: the least noiseless loss is 0, at `best`.

    Args:
        best: `(n_domains,)`, on the simplex.
        noise: standard deviation.
    """

    def loss(ratio: Ratio, trial: int) -> float:
        exact = float(np.square(ratio.values - best).sum())
        return exact + noise * float(generator(seed, "evaluate", trial).standard_normal())

    return loss
