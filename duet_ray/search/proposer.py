"""Ask and tell: from everything observed and pending to the next point (DUET, Sec. 3.3 and App. C.1).

The Gaussian process is in `model`; the acquisition (`search.acquisition`) is one of `acquisitions`, optimised by
`acquisition`; the observations are first put on one footing by `noise`.

A proposal is a pure function of (space, settings, seed, trial, told, pending): Ax's experiment is rebuilt from what is
told every time, so that resuming a study means telling a new `Proposer` everything again. The order in which things
are told does not matter either.

**Repeats.** A point already trained or pending is proposed again only where the space has no other, unless the noise
of every observation is told. With known noise the model knows what a second look is worth; with inferred noise the fit
may believe that there is none, and would then spend the rest of the budget on one point. (`confirm` takes the second
looks.)

**Fidelities.** Where a point goes is decided for whole trials, since whole trials are what is recommended. How much of
it is trained is decided after that: the fidelity whose observation narrows the whole trial's loss most for its cost
(`fidelity`).
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

from duet_ray.config import SearchConfig, StudyConfig
from duet_ray.errors import FeedbackError
from duet_ray.records import Point, Ratio, Settings
from duet_ray.search.features import PointSpace
from duet_ray.search.objectives import Targets, check_others
from duet_ray.search.simplex import SimplexSpace, start_stream
from duet_ray.search.told import Told
from duet_ray.seeds import child_seed

if TYPE_CHECKING:
    from duet_ray.search.noise import ToldNoise
    from duet_ray.search.surrogate import Predicted
    from duet_ray.theory import TruncatedExponential


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The next point, and what the model thinks of it."""

    ratio: Ratio
    method: str
    """`uniform`, `vertex`, `prior`, `random`, or `bayesian:` and the acquisition."""
    seconds: float
    """Wall time it took."""
    expected: float | None = None
    """Posterior mean of the loss, in the units told; None without a model."""
    sigma: float | None = None
    """Posterior standard deviation of the noiseless loss, in the units told."""
    settings: Settings = ()
    fidelity: float = 1.0
    k: int | None = None
    """Samples that this trial should have, where that is chosen trial by trial."""


@dataclass(frozen=True)
class Proposer:
    """Proposes points for one study. Holds no state: see `propose`."""

    space: SimplexSpace
    settings: SearchConfig
    seed: int
    prior: Ratio | None = None
    """The ratio of `search.prior`: the second of the start design, and that of all trials with `optimize: model`."""
    own: Settings = ()
    """The study's own values of the settings that are searched: those of the first trial, and of points that name
    none."""
    k_bounds: tuple[int, int] | None = None
    """With `sampling.k: auto` the fewest and the most samples of a trial."""
    targets: Targets = field(default_factory=Targets)

    @classmethod
    def of(
        cls,
        config: StudyConfig,
        space: SimplexSpace,
        n_train_rows: Sequence[int],
        base: Mapping[str, float] | None = None,
    ) -> "Proposer":
        """The proposer of a study.

        Args:
            n_train_rows: `(n_domains,)` training rows per domain, for the prior by sizes.
            base: the untouched model's metrics by name, as losses, for requirements that name it.

        Raises:
            FeedbackError: a requirement names a metric that the untouched model does not have.
        """
        from duet_ray.search.past_runs import prior_ratio

        search = config.search
        points = PointSpace.of(space, search)
        return cls(
            space=space,
            settings=search,
            seed=config.seed,
            prior=prior_ratio(space, search.prior, n_train_rows),
            own=points.own_settings(config.training),
            k_bounds=config.sampling.k_bounds if config.sampling.k == "auto" else None,
            targets=Targets.of(config, base or {}),
        )

    @cached_property
    def points(self) -> PointSpace:
        """Every point that may be proposed."""
        return PointSpace.of(self.space, self.settings, self.prior)

    @cached_property
    def reference(self) -> Point:
        """The first trial of every study: the uniform ratio with the study's own settings."""
        return Point(ratio=self.points.fixed_ratio or self.space.uniform(), settings=self.own)

    def propose(self, trial: int, told: Sequence[Told], pending: Sequence[Point]) -> Proposal:
        """Return the point of trial number `trial`.

        The first `n_start` trials are the start design, whatever is told. While nothing is told at all (every trial
        failed) the start design simply goes on.

        Args:
            trial: 0 …, the number of this trial; keys the random numbers.
            told: every finished trial that the decision may depend on, and past runs, in any order.
            pending: points in training, and those whose trial failed: the model expects no news from where they are, so
                that the search moves on.

        Raises:
            FeedbackError: a loss is not finite, or a standard error is negative or not finite.
            RatioError: a point told or pending lies outside the space.
        """
        started = time.perf_counter()
        self.check(told, pending)
        if trial < self.settings.n_start_trials or not told:
            return replace(self._start(trial), seconds=time.perf_counter() - started)
        method = f"bayesian:{self.settings.acquisition}"
        if self.points.is_single:
            ratio = self.points.fixed_ratio or self.space.uniform()
            return Proposal(ratio=ratio, method=method, seconds=time.perf_counter() - started, k=self._fewest)
        seed = child_seed(self.seed, "propose", trial)
        from duet_ray.search import fitted

        told = sorted(told, key=_told_key)
        footing = self.footing(told)
        ordered = footing.told

        chosen = fitted.next_point(
            space=self.points,
            settings=self.settings,
            seed=seed,
            told=ordered,
            pending=sorted(pending, key=_point_key),
            kernel=fitted.kernel_for(self.settings.kernel, self.points, ordered, self.own),
            targets=self.targets,
            missing=self.own,
        )
        return Proposal(
            ratio=chosen.point.ratio,
            settings=chosen.point.settings,
            fidelity=self._fidelity(chosen.point, told, trial),
            k=self._n_samples(chosen, told, footing.law),
            method=method,
            seconds=time.perf_counter() - started,
            expected=chosen.mean,
            sigma=chosen.sd,
        )

    def footing(self, told: Sequence[Told]) -> "ToldNoise":
        """What is told in an order of its own, and on one footing: see `noise`."""
        from duet_ray.search.noise import told_noise

        return told_noise(sorted(told, key=_told_key), self.settings.noise, seed=self.seed)

    def _start(self, trial: int) -> Proposal:
        """A point of the start design: the uniform ratio with the study's own settings, whole, then others."""
        kind, ratio = "random", self.points.fixed_ratio
        if ratio is None:
            stream = start_stream(self.space, self.seed, self.settings.vertices, first=self.prior)
            kind, ratio = next(islice(stream, trial, None))
        elif trial == 0:
            kind = "uniform" if self.prior is None else "prior"
        draws = child_seed(self.seed, "settings")
        settings = self.own if trial == 0 else self.points.start_settings(trial, draws, self.own)
        return Proposal(
            ratio=ratio,
            settings=settings,
            fidelity=1.0 if trial == 0 else self.points.fidelities[0],
            k=self._fewest,
            method=kind,
            seconds=0.0,
        )

    @property
    def _fewest(self) -> int | None:
        return self.k_bounds[0] if self.k_bounds else None

    def _fidelity(self, point: Point, told: Sequence[Told], trial: int) -> float:
        """How much of a mixture to train at `point`."""
        if not self.points.has_fidelities:
            return 1.0
        n_before = max(0, trial - self.settings.n_start_trials)
        from duet_ray.search.fitted import best_fidelity

        return best_fidelity(self, point, told, n_before)

    def _n_samples(self, chosen: "Predicted", told: Sequence[Told], law: "TruncatedExponential | None") -> int | None:
        if self.k_bounds is None:
            return None
        from duet_ray.search.fitted import fitted
        from duet_ray.search.sample_size import n_samples, noise_by_k

        model = fitted(self, told)
        whole = [m for m, one in zip(model.means_of(told), told, strict=True) if one.fidelity == 1]
        noise = noise_by_k(told, law, model.noise_sd)
        return n_samples((chosen.mean, chosen.sd), min(whole) if whole else None, self.k_bounds, noise)

    def check(self, told: Sequence[Told], pending: Sequence[Point]) -> None:
        """Raise what `propose` raises for things that cannot be told."""
        for one in told:
            if not math.isfinite(one.loss):
                raise FeedbackError(f"only finite losses can be told to the search, got {one.loss}")
            if one.sem is not None and not (math.isfinite(one.sem) and one.sem >= 0):
                raise FeedbackError(f"a standard error must be finite and >= 0, got {one.sem}")
        check_others(told, self.targets)
        self.points.refuse_outside([*(one.point for one in told), *pending])


def _told_key(one: Told) -> tuple:
    sem = -1.0 if one.sem is None else one.sem
    return (*_point_key(one.point), one.loss, sem, one.k_used, one.samples, sorted(one.others.items()))


def _point_key(point: Point) -> tuple:
    return (point.ratio.counts, repr(point.settings), point.fidelity)
