"""What the search has learned: the fitted model, asked the questions that a person has.

Nothing here proposes anything. A model is built from everything told, as for a proposal, and read in four ways:

- **Sensitivity.** How much does the loss depend on one domain's share? Two answers, for neither is enough alone. The
  *change* from the smallest to the largest share, the others in the recommended proportions, has a sign, but is 0 where
  the optimum lies between. The *total effect* is Sobol's total index: the part of the loss's variance over all ratios
  that is left when everything but this share is known. Shares sum to 1, so inputs cannot vary one by one, but a share
  and the *proportions* of the others can: for a ratio drawn evenly from the simplex the two are independent (the
  Dirichlet law is neutral; Connor & Mosimann 1969). So every draw is compared with one whose share was drawn anew and
  whose proportions are the same (Jansen 1999):  T_d = ½ E[(f(r) − f(r'))²] / Var f.  Bounds and constraints cut the
  law off; the comparison stays within them.
- **Slices.** The posterior along the same lines through the recommended ratio, and for three domains on all of the
  triangle. Shares are real numbers here: the lattice of whole rows only matters for what is trained.
- **Uncertainty.** All of it comes from the joint posterior: draws of whole functions for the total effect, the two
  points' covariance for the change. So an interval says what the model does not know; it does not say that the model
  is right.
- **Calibration.** That is what leaving one out is for: every observation is predicted from the others, with the
  hyperparameters of the whole fit, which flatters the model a little. (Where there is nothing to learn the correlation
  is not 0 but negative: without a high value the mean of the rest is low.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np

from duet_ray.errors import FeedbackError
from duet_ray.records import Direction, Point, Settings
from duet_ray.search.simplex import SimplexSpace, _uniform_draws
from duet_ray.search.told import Told
from duet_ray.seeds import child_seed

if TYPE_CHECKING:
    from duet_ray.search.proposer import Proposer

Z95, Z50 = 1.959963984540054, 0.6744897501960817
"""Half the width of the normal law's 95 % and 50 % intervals."""
N_RAYS = 128
"""Proportions of the others that a total effect is averaged over."""
N_DRAWS = 256
"""Functions drawn from the posterior."""
N_ALONG = 41
"""Points of a slice."""
N_EDGE = 40
"""Steps along an edge of the triangle."""
NO_ROOM = 0.01
"""A line whose ends differ by less than this share says nothing of its domain."""
FEW = 6
"""With fewer observations nothing can be said of the calibration."""
MANY = 20
"""With fewer, good numbers may still be luck."""

Trust = Literal["good", "narrow", "wide", "none", "few", "flat"]
"""`narrow`, `wide`: its order can be trusted, its intervals not; `none`: no better than chance; `flat`: all equal."""


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(4)
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2

_Part = TypeVar("_Part")


class Model(Protocol):
    """What is asked of a fitted model (`fitted.Fitted`). All losses are in the units told."""

    @property
    def kernel(self) -> str: ...
    @property
    def length_scales(self) -> Mapping[str, float]: ...
    @property
    def noise_sd(self) -> float: ...
    @property
    def told(self) -> Sequence[Told]:
        """In the order of `leave_one_out`."""
        ...

    def predict(self, shares: np.ndarray, settings: Settings = ()) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the noiseless loss of whole trials at `(n, n_domains)`."""
        ...

    def joint(self, shares: np.ndarray, settings: Settings = ()) -> tuple[np.ndarray, np.ndarray]:
        """Mean `(n,)` and covariance `(n, n)`."""
        ...

    def leave_one_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, noise included, of every observation given the others."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """How much the value depends on one domain's share."""

    domain: str
    shares: tuple[float, float]
    """The smallest and the largest share that the others leave it in the recommended proportions."""
    change: float
    """Of the value, from the one to the other."""
    change_interval: tuple[float, float]
    total: float
    """Total effect in [0, 1]; the effects of all domains need not sum to 1."""
    total_interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The posterior along one domain's share, the others in the recommended proportions."""

    domain: str
    shares: tuple[float, ...]
    """Rising."""
    mean: tuple[float, ...]
    low: tuple[float, ...]
    """Lower ends of the 95 % intervals of the noiseless value, each point for itself."""
    high: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Ternary:
    """The posterior over the ratios of three domains."""

    shares: tuple[tuple[float, float, float], ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Every observation against what the model predicts of it from the others."""

    observed: tuple[float, ...]
    predicted: tuple[float, ...]
    sd: tuple[float, ...]
    """Of the prediction, noise included."""
    residuals: tuple[float, ...]
    """(observed − predicted) / sd."""
    inside_50: float
    """Share of the observations in their 50 % intervals."""
    inside_95: float
    rank_correlation: float | None
    """Spearman's, of observed and predicted; None where one of them does not vary."""
    trust: Trust

    @property
    def sentence(self) -> str:
        """Whether the model can be trusted, in plain words."""
        n = len(self.observed)
        order = "" if self.rank_correlation is None else f"rank correlation {self.rank_correlation:.2f}"
        held = f"its 95 % intervals hold {100 * self.inside_95:.0f} %, its 50 % intervals {100 * self.inside_50:.0f} %"
        if self.trust == "few":
            return f"{n} observations are too few to say whether the model can be trusted: take all this as a guess."
        if self.trust == "flat":
            return "All observations are equal, so there was nothing to learn from them."
        start = f"Predicting each of {n} observations from the others, the model"
        if self.trust == "none":
            return (
                f"{start} orders them no better than chance{f' ({order})' if order else ''}: take all this as a guess, "
                "and rely on what was measured again."
            )
        if self.trust == "narrow":
            return f"{start} gets their order right ({order}), but is too sure of itself: {held}. Distrust its bands."
        if self.trust == "wide":
            return f"{start} gets their order right ({order}), and is surer than it claims: {held}."
        verdict = "It can be trusted." if n >= MANY else "Nothing speaks against trusting it."
        return f"{start} gets their order right ({order}) and knows how far off it may be: {held}. {verdict}"


@dataclass(frozen=True, kw_only=True)
class Insight:
    """What a study's model says, in the user's own units and direction."""

    n_told: int
    domains: tuple[str, ...]
    recommended: tuple[float, ...]
    """Shares of the ratio that lines and slices go through."""
    kernel: str | None
    """None where there is one ratio only, and so no model."""
    length_scales: dict[str, float]
    """Per domain, in the kernel's coordinates: short where the value changes quickly; all equal in most kernels."""
    noise_sd: float | None
    """Standard deviation of one observation around the noiseless value."""
    sensitivities: tuple[Sensitivity, ...]
    """The largest total effect first."""
    slices: tuple[Slice, ...]
    """In the order of `sensitivities`."""
    ternary: Ternary | None
    calibration: Calibration | None
    notes: tuple[str, ...] = ()
    """What there is not, and why."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` gives the same insight back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Insight":
        """Raises `KeyError`, `TypeError` or `ValueError` where it is no insight's data."""
        rest = {name: _tuples(value) for name, value in data.items()}
        rest["sensitivities"] = tuple(_made(Sensitivity, one) for one in data["sensitivities"])
        rest["slices"] = tuple(_made(Slice, one) for one in data["slices"])
        rest["ternary"] = _made(Ternary, data["ternary"]) if data["ternary"] is not None else None
        rest["calibration"] = _made(Calibration, data["calibration"]) if data["calibration"] is not None else None
        return cls(**rest)


def insight(
    proposer: "Proposer",
    told: Sequence[Told],
    *,
    direction: Direction = Direction.MINIMIZE,
    recommended: Point | None = None,
) -> Insight:
    """Fit the study's model and read it. Loads torch and BoTorch; some seconds for many domains.

    Args:
        told: at least one, as `Proposer.propose` would be given.
        direction: of the study's feedback: the insight is in the user's units again.
        recommended: the point that slices go through; None: the posterior's best among whole trials.

    Raises:
        FeedbackError: nothing is told, or something that no search can use.
    """
    if not told:
        raise FeedbackError("there is nothing to learn from yet: no trial has a value")
    proposer.check(told, [])
    if recommended is None:
        from duet_ray.search.recommend import recommend

        whole = any(one.fidelity == 1 for one in told)
        recommended = (recommend(proposer, told) if whole else min(told, key=lambda one: one.loss)).point
    points = proposer.points
    if points.is_single:
        return Insight(
            n_told=len(told), domains=proposer.space.names, recommended=tuple(map(float, recommended.ratio.values)),
            kernel=None, length_scales={}, noise_sd=None, sensitivities=(), slices=(), ternary=None, calibration=None,
            notes=("There is one ratio only, so there is nothing to learn about ratios.",),
        )  # fmt: skip
    from duet_ray.search.fitted import fitted

    model = fitted(proposer, told)
    return explain(model, proposer.space, recommended, free=points.free, seed=proposer.seed, direction=direction)


def explain(
    model: Model,
    space: SimplexSpace,
    recommended: Point,
    *,
    free: Sequence[int],
    seed: int,
    direction: Direction = Direction.MINIMIZE,
) -> Insight:
    """Read a fitted model.

    Args:
        free: the domains whose share is searched, as indices.
        seed: the study's root seed.
    """
    shares = recommended.ratio.values
    rays = Rays(space, free)
    reader = _Reader(model, rays, shares, recommended.settings, direction, seed)
    notes = []
    roomy = [d for d in rays.free if reader.room(d) >= NO_ROOM]
    if not rays.free:
        notes.append("Only one ratio is searched, so there are no slices and no sensitivities.")
    fixed = [name for d, name in enumerate(space.names) if d not in rays.free]
    if rays.free and fixed:
        notes.append(f"Fixed by the bounds, and so left out: {', '.join(fixed)}.")
    if cramped := [space.names[d] for d in rays.free if d not in roomy]:
        notes.append(
            f"Bounds and constraints leave no room for another share of {', '.join(cramped)} while the others keep the "
            "recommended proportions."
        )
    found = sorted((reader.sensitivity(d) for d in roomy), key=lambda s: (-s.total, s.domain))
    index = {name: d for d, name in enumerate(space.names)}
    return Insight(
        n_told=len(model.told),
        domains=space.names,
        recommended=tuple(map(float, shares)),
        kernel=model.kernel,
        length_scales={name: float(scale) for name, scale in model.length_scales.items()},
        noise_sd=float(model.noise_sd),
        sensitivities=tuple(found),
        slices=tuple(reader.slice(index[s.domain]) for s in found),
        ternary=reader.ternary() if space.n_domains == len(rays.free) == 3 else None,
        calibration=calibration(model, direction),
        notes=tuple(notes),
    )


def calibration(model: Model, direction: Direction = Direction.MINIMIZE) -> Calibration | None:
    """Leave-one-out calibration; None for fewer than three observations."""
    if len(model.told) < 3:
        return None
    from scipy.stats import binom, spearmanr

    losses = np.array([one.loss for one in model.told])
    mean, sd = model.leave_one_out()
    z = (losses - mean) / np.maximum(sd, 1e-300)
    n, n_50, n_95 = len(z), int((np.abs(z) <= Z50).sum()), int((np.abs(z) <= Z95).sum())
    flat, constant = bool(np.ptp(losses) == 0), bool(np.ptp(losses) == 0 or np.ptp(mean) == 0)
    ranks = None if constant else spearmanr(losses, mean, alternative="greater")
    trust: Trust = "good"
    if flat:
        trust = "flat"
    elif n < FEW:
        trust = "few"
    elif ranks is None or ranks.pvalue > 0.05:
        trust = "none"
    elif min(binom.cdf(n_95, n, 0.95), binom.cdf(n_50, n, 0.5)) < 0.025:
        trust = "narrow"
    elif binom.sf(n_50 - 1, n, 0.5) < 0.025:
        trust = "wide"
    sign = direction.to_value(1.0)
    return Calibration(
        observed=_floats(sign * losses),
        predicted=_floats(sign * mean),
        sd=_floats(sd),
        residuals=_floats(sign * z),
        inside_50=n_50 / n,
        inside_95=n_95 / n,
        rank_correlation=None if ranks is None else float(ranks.statistic),
        trust=trust,
    )


class Rays:
    """Lines of the simplex on which one domain's share varies and the others keep their proportions.

    Counted above every domain's smallest share, so that a lower bound is never broken: with the rest m = 1 − Σ least,
    x = (r − least) / m lies on the standard simplex, and the ray of domain d through it is t e_d + (1 − t) q, q being
    the proportions of the others.
    """

    def __init__(self, space: SimplexSpace, free: Sequence[int]) -> None:
        self.space = space
        least, most = space.tightest()
        self.least, most = least / space.n_rows, most / space.n_rows
        self.free = tuple(d for d in free if self.least[d] < most[d])
        self.mass = 1 - float(self.least.sum())
        columns = list(self.free)
        self._rooms = (most - self.least)[columns] / self.mass if columns else np.zeros(0)
        matrix, limits = space.linear_inequalities(columns)
        self._matrix, self._limits = matrix * self.mass, limits - matrix @ self.least[columns]

    def standard(self, shares: np.ndarray) -> np.ndarray:
        """`(n, n_domains)` shares as `(n, n_free)` points of the standard simplex."""
        return (shares - self.least)[:, list(self.free)] / self.mass

    def shares(self, points: np.ndarray) -> np.ndarray:
        """The way back."""
        found = np.tile(self.least, (len(points), 1))
        found[:, list(self.free)] += self.mass * points
        return found

    def proportions(self, points: np.ndarray, d: int) -> np.ndarray:
        """`(n, n_free)` proportions of the others, 0 for d itself; even where d has everything."""
        at = self.free.index(d)
        others = np.clip(points, 0, None)
        others[:, at] = 0
        total = others.sum(axis=1, keepdims=True)
        even = np.full(points.shape[1], 1 / (points.shape[1] - 1))
        even[at] = 0
        return np.where(total > 1e-9, others / np.where(total > 1e-9, total, 1), even)

    def interval(self, proportions: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray]:
        """The t from … to of every ray, `(n,)` each, within bounds and constraints; from > to where there is none."""
        at = self.free.index(d)
        low = np.zeros(len(proportions))
        with np.errstate(divide="ignore", invalid="ignore"):
            needs = np.where(proportions > 0, 1 - self._rooms / proportions, 0.0)
        needs[:, at] = 0
        low = np.maximum(low, needs.max(axis=1))
        high = np.full(len(proportions), min(1.0, float(self._rooms[at])))
        for row, limit in zip(self._matrix, self._limits, strict=True):
            start = proportions @ row
            slope = row[at] - start
            edge = (limit - start) / np.where(np.abs(slope) > 1e-12, slope, 1.0)
            high = np.where(slope > 1e-12, np.minimum(high, edge), high)
            low = np.where(slope < -1e-12, np.maximum(low, edge), low)
            high = np.where((np.abs(slope) <= 1e-12) & (start > limit + 1e-9), -1.0, high)
        return low, high

    def along(self, proportions: np.ndarray, d: int, t: np.ndarray) -> np.ndarray:
        """`(n, n_domains)` shares at t `(n,)` on each ray."""
        corner = np.eye(len(self.free))[self.free.index(d)]
        return self.shares(t[:, None] * corner + (1 - t)[:, None] * proportions)

    def allows(self, points: np.ndarray) -> np.ndarray:
        """Which points of the standard simplex lie within bounds and constraints."""
        bounded = np.all((points >= -1e-9) & (points <= self._rooms + 1e-9), axis=1)
        return bounded & np.all(points @ self._matrix.T <= self._limits + 1e-9, axis=1)


class _Reader:
    """One model, asked along the rays through one ratio."""

    def __init__(
        self, model: Model, rays: Rays, shares: np.ndarray, settings: Settings, direction: Direction, seed: int
    ) -> None:
        self._model, self._rays, self._shares, self._settings = model, rays, shares, settings
        self._sign = direction.to_value(1.0)
        self._seed = seed
        self._base: np.ndarray | None = None

    def room(self, d: int) -> float:
        """How much of the mixture lies between the ends of the domain's line."""
        if len(self._rays.free) < 2:
            return 0.0
        _, low, high = self._line(d)
        return self._rays.mass * (high - low)

    def sensitivity(self, d: int) -> Sensitivity:
        proportions, low, high = self._line(d)
        ends = self._rays.along(np.vstack([proportions, proportions]), d, np.array([low, high]))
        mean, covariance = self._model.joint(ends, self._settings)
        change = self._sign * float(mean[1] - mean[0])
        sd = math.sqrt(max(0.0, float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])))
        totals = self._totals(d)
        return Sensitivity(
            domain=self._name(d),
            shares=(float(ends[0, d]), float(ends[1, d])),
            change=change,
            change_interval=(change - Z95 * sd, change + Z95 * sd),
            total=float(np.median(totals)),
            total_interval=(float(np.quantile(totals, 0.025)), float(np.quantile(totals, 0.975))),
        )

    def slice(self, d: int) -> Slice:
        proportions, low, high = self._line(d)
        # Closer at the ends: with a kernel on square roots the loss turns quickly where a share comes near 0.
        t = low + (high - low) * (1 - np.cos(np.linspace(0, np.pi, N_ALONG))) / 2
        points = self._rays.along(np.repeat(proportions, N_ALONG, axis=0), d, t)
        mean, sd = self._model.predict(points, self._settings)
        mean = self._sign * mean
        return Slice(
            domain=self._name(d),
            shares=_floats(points[:, d]),
            mean=_floats(mean),
            low=_floats(mean - Z95 * sd),
            high=_floats(mean + Z95 * sd),
        )

    def ternary(self) -> Ternary | None:
        grid = np.array([(i, j, N_EDGE - i - j) for i in range(N_EDGE + 1) for j in range(N_EDGE + 1 - i)]) / N_EDGE
        shares = self._rays.shares(grid[self._rays.allows(grid)])
        if len(shares) < 3:
            return None
        mean, sd = self._model.predict(shares, self._settings)
        a, b, c = shares.T
        triples = tuple((float(x), float(y), float(z)) for x, y, z in zip(a, b, c, strict=True))
        return Ternary(shares=triples, mean=_floats(self._sign * mean), sd=_floats(sd))

    def _line(self, d: int) -> tuple[np.ndarray, float, float]:
        """The ray through the recommended ratio: its proportions `(1, n_free)`, and where it starts and ends."""
        proportions = self._rays.proportions(self._rays.standard(self._shares[None]), d)
        low, high = self._rays.interval(proportions, d)
        return proportions, float(low[0]), float(high[0])

    def _totals(self, d: int) -> np.ndarray:
        """`(N_DRAWS,)` total effects, one for each function drawn from the posterior."""
        standard = self._rays.standard(self._draws())
        proportions = self._rays.proportions(standard, d)
        low, high = self._rays.interval(proportions, d)
        here = standard[:, self._rays.free.index(d)]
        low, high = np.minimum(low, here), np.maximum(high, here)  # up to rounding the draw itself lies between
        # For even ratios a ray has the density (1 − t)^(n_free − 2): the rule is in its distribution function.
        power = len(self._rays.free) - 1
        top, bottom = ((1 - low) ** power)[:, None], ((1 - high) ** power)[:, None]
        t = 1 - (top + _NODES * (bottom - top)) ** (1 / power)
        points = self._rays.along(np.repeat(proportions, len(_NODES), axis=0), d, t.ravel())
        random = np.random.default_rng(child_seed(self._seed, "insight", d))
        values = _functions(*self._model.joint(points, self._settings), random).reshape(-1, N_RAYS, len(_NODES))
        centres = values @ _WEIGHTS
        within = (np.square(values - centres[..., None]) @ _WEIGHTS).mean(axis=1)
        between = centres.var(axis=1, ddof=1)
        return np.asarray(within / np.maximum(within + between, 1e-300))

    def _draws(self) -> np.ndarray:
        """`(N_RAYS, n_domains)` ratios drawn evenly from what bounds and constraints leave."""
        if self._base is None:
            stream = _uniform_draws(self._rays.space, child_seed(self._seed, "insight"))
            self._base = np.array(list(islice(stream, N_RAYS)))
        return self._base

    def _name(self, d: int) -> str:
        return self._rays.space.names[d]


def _functions(mean: np.ndarray, covariance: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """`(N_DRAWS, n)` draws of a normal law whose covariance may be singular but for rounding."""
    scale = max(float(np.trace(covariance)) / len(mean), 1e-300)
    for jitter in (1e-10, 1e-8, 1e-6, 1e-4):
        try:
            factor = np.linalg.cholesky(covariance + jitter * scale * np.eye(len(mean)))
            break
        except np.linalg.LinAlgError:
            continue
    else:
        spectrum, basis = np.linalg.eigh((covariance + covariance.T) / 2)
        factor = basis * np.sqrt(np.maximum(spectrum, 0))
    return np.asarray(mean + random.standard_normal((N_DRAWS, len(mean))) @ factor.T)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _made(kind: type[_Part], data: Mapping[str, Any]) -> _Part:
    return kind(**{name: _tuples(value) for name, value in data.items()})


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples again."""
    return tuple(_tuples(one) for one in value) if isinstance(value, list | tuple) else value
