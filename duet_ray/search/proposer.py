"""Ask and tell: from everything observed and pending to the next ratio (DUET, Sec. 3.3 and App. C.1).

The Gaussian process is in `surrogate`; the acquisition, optimised by `acquisition`, is

- `lcb`: the lower confidence bound μ(r) − β σ(r), minimised (the paper's; β = `search.beta`, 0.5);
- `qlognei`: noisy expected improvement, in logarithms.

A proposal is a pure function of (space, settings, seed, trial, told, pending): Ax's experiment is rebuilt from what is
told every time, so that resuming a study means telling a new `Proposer` everything again. The order in which things
are told does not matter either.

**Repeats.** A ratio already trained or pending is proposed again only where the space has no other, unless the noise
of every observation is told. With known noise the model knows what a second look is worth; with inferred noise the fit
may believe that there is none, and would then spend the rest of the budget on one point. (`confirm` takes the second
looks.)
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from types import ModuleType

from duet_ray.config import SearchConfig
from duet_ray.errors import FeedbackError, RatioError
from duet_ray.records import Ratio
from duet_ray.search.simplex import SimplexSpace, start_stream
from duet_ray.seeds import child_seed


@dataclass(frozen=True, kw_only=True)
class Told:
    """One finished trial, as the search sees it."""

    ratio: Ratio
    loss: float
    """Finite; lower is better."""
    sem: float | None = None
    """Standard error of `loss` under a repeat with other seeds. Used only if every observation has one."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The next ratio, and what the model thinks of it."""

    ratio: Ratio
    method: str
    """`uniform`, `vertex`, `random`, or `bayesian:` and the acquisition."""
    seconds: float
    """Wall time it took."""
    expected: float | None = None
    """Posterior mean of the loss, in the units told; None without a model."""
    sigma: float | None = None
    """Posterior standard deviation of the noiseless loss, in the units told."""


class Proposer:
    """Proposes ratios for one study. Holds no state: see `propose`."""

    def __init__(self, space: SimplexSpace, settings: SearchConfig, seed: int) -> None:
        self.space = space
        self.settings = settings
        self.seed = seed

    def propose(self, trial: int, told: Sequence[Told], pending: Sequence[Ratio]) -> Proposal:
        """Return the ratio of trial number `trial`.

        The first `n_start` trials are the start design, whatever is told. While nothing is told at all (every trial
        failed) the start design simply goes on.

        Args:
            trial: 0 …, the number of this trial; keys the random numbers.
            told: every finished trial that the decision may depend on, in any order.
            pending: ratios in training, and those whose trial failed: the model expects no news from where they are, so
                that the search moves on.

        Raises:
            FeedbackError: a loss is not finite, or a standard error is negative or not finite.
            RatioError: a ratio told or pending lies outside the space.
        """
        started = time.perf_counter()
        self._check(told, pending)
        if trial < self.settings.n_start or not told:
            kind, ratio = next(islice(start_stream(self.space, self.seed, self.settings.vertices), trial, None))
            return Proposal(ratio=ratio, method=kind, seconds=time.perf_counter() - started)
        method = f"bayesian:{self.settings.acquisition}"
        if self.space.is_single:
            return Proposal(ratio=self.space.uniform(), method=method, seconds=time.perf_counter() - started)
        surrogate = _surrogate()
        # Sorted: floating-point sums must not depend on who finished first.
        ordered = sorted(told, key=lambda t: (t.ratio.counts, t.loss, -1.0 if t.sem is None else t.sem))
        ratio, expected, sigma = surrogate.next_ratio(
            space=self.space,
            settings=self.settings,
            seed=child_seed(self.seed, "propose", trial),
            ratios=[one.ratio for one in ordered],
            losses=[one.loss for one in ordered],
            sems=[one.sem for one in ordered],
            pending=sorted(pending, key=lambda ratio: ratio.counts),
        )
        return Proposal(
            ratio=ratio, method=method, seconds=time.perf_counter() - started, expected=expected, sigma=sigma
        )

    def _check(self, told: Sequence[Told], pending: Sequence[Ratio]) -> None:
        for one in told:
            if not math.isfinite(one.loss):
                raise FeedbackError(f"only finite losses can be told to the search, got {one.loss}")
            if one.sem is not None and not (math.isfinite(one.sem) and one.sem >= 0):
                raise FeedbackError(f"a standard error must be finite and >= 0, got {one.sem}")
        for ratio in [*(one.ratio for one in told), *pending]:
            if not self.space.contains(ratio):
                raise RatioError(
                    f"the ratio {ratio.counts} (rows per domain) lies outside the space of this study: "
                    f"{self.space.n_rows} rows, from {self.space.lower} to {self.space.upper}"
                )


def _surrogate() -> ModuleType:
    """The module that wraps torch, BoTorch and Ax: seconds to load, so only once a model is needed.

    Ax writes a line about its SQL storage to the terminal when it is imported; we do not use that storage.
    """
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        from duet_ray.search import surrogate
    finally:
        logging.disable(before)
    return surrogate
