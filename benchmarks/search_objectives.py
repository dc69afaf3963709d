"""What `search_efficiency.py` searches: losses over the simplex with a known best value, and noise of a stated size.

(a) **Tables of real training runs**, through surrogates: `search_surrogates.py`.

(b) **Closed forms** with the best ratio at a vertex, on a face, inside, and several local optima, for any number of
    domains, with normal noise in shares of the achievable gain:

    - vertex: exp(−2 t·r), the exponential law of data mixing (Ye et al. 2024) in one term; the best is the
      vertex of the largest t.
    - face: Σ D (r − t)², with t such that the gradient at r* is zero on the face and positive off it (KKT).
    - inside: Σ w (r + 0.05)^−½, diminishing returns; w = (r* + 0.05)^1.5 makes all slopes equal at r*.
    - several: four Gaussian wells of width 0.2: of depth 1 and 0.85 on faces with other domains, of 0.8 at a vertex, of
      0.6 inside.

(c) **BoTorch's test problems**, through a map from the simplex to the problem's box.

A gain is a share of the best possible improvement over the uniform ratio: (uniform − loss) / (uniform − best).
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from duet_ray.errors import DuetError

if TYPE_CHECKING:
    from botorch.test_functions.base import BaseTestProblem

Form = Literal["vertex", "face", "inside", "several"]

FORMS: tuple[Form, ...] = ("vertex", "face", "inside", "several")
_CHUNK = 2048
"""Points evaluated at once: bounds memory."""


class ObjectiveError(DuetError):
    """A table or a problem cannot serve as an objective."""


class Loss(Protocol):
    """A noiseless loss over the simplex."""

    def __call__(self, ratios: np.ndarray, /) -> np.ndarray:
        """`(n_points, n_domains)` shares to `(n_points,)` losses; lower is better."""
        ...


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss, what can be gained on it, and its noise."""

    name: str
    n_domains: int
    loss: Loss
    best_ratio: np.ndarray
    """`(n_domains,)` shares."""
    best: float
    uniform: float
    noise: float
    """Standard deviation of one observation."""
    residuals: np.ndarray | None = None
    """Noise is drawn from these, scaled to `noise`; None for normal noise."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a reader should know of it: explained variance, distances, sizes."""

    def true(self, shares: np.ndarray) -> float:
        """The noiseless loss of one ratio, `(n_domains,)`."""
        return float(self.loss(np.asarray(shares, dtype=np.float64)[None])[0])

    def draw_noise(self, generator: np.random.Generator) -> float:
        if self.residuals is None:
            return self.noise * float(generator.standard_normal())
        return self.noise * float(generator.choice(self.residuals)) / float(self.residuals.std())

    def gain(self, loss: float) -> float:
        """The share of the achievable improvement over the uniform ratio: 1 at the best, below 0 if worse than it."""
        return (self.uniform - loss) / (self.uniform - self.best)

    @property
    def check(self) -> str:
        """Changes when the objective does, so that runs on another one are not taken for runs on this one."""
        text = f"{self.n_domains} {self.uniform:.5g} {self.best:.4g} {self.noise:.4g}"
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def make(
    name: str,
    n_domains: int,
    loss: Loss,
    *,
    noise: float | None = None,
    noise_share: float | None = None,
    best_ratio: np.ndarray | None = None,
    starts: np.ndarray | None = None,
    residuals: np.ndarray | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Objective:
    """An objective from its loss; the best ratio is searched where it is not known.

    Args:
        noise: standard deviation, or
        noise_share: the same in shares of the achievable gain.
        starts: `(n_starts, n_domains)` ratios that the search for the best begins with, besides random ones.

    Raises:
        ObjectiveError: no ratio is better than the uniform one.
    """
    if best_ratio is None:
        best_ratio = search_best(loss, n_domains, starts)
    uniform = float(loss(np.full((1, n_domains), 1 / n_domains))[0])
    best = float(loss(best_ratio[None])[0])
    if not best < uniform:
        raise ObjectiveError(f"{name}: the uniform ratio is the best one ({uniform:g}), there is nothing to search for")
    if noise is None:
        noise = (noise_share or 0.0) * (uniform - best)
    return Objective(
        name=name,
        n_domains=n_domains,
        loss=loss,
        best_ratio=best_ratio,
        best=best,
        uniform=uniform,
        noise=noise,
        residuals=residuals,
        facts=dict(facts or {}),
    )


def search_best(
    loss: Loss, n_domains: int, starts: np.ndarray | None = None, *, n_random: int = 20_000, n_climbs: int = 8
) -> np.ndarray:
    """The best ratio by brute force: many random ratios, then exchanges between pairs of domains with shrinking steps.

    Needs no gradient, so it serves trees too. Random ratios fill the interior, the edges and the faces.
    """
    random = np.random.default_rng(0)
    drawn = [random.dirichlet(np.full(n_domains, a), n_random // 4) for a in (1.0, 0.3, 0.1, 0.03)]
    points = np.vstack([np.eye(n_domains), *drawn, *([] if starts is None else [starts])])
    points = points[np.isfinite(points).all(axis=1)]
    values = _in_chunks(loss, points)
    found = [_exchange(loss, points[i]) for i in np.argsort(values, kind="stable")[:n_climbs]]
    return min(found, key=lambda pair: pair[1])[0]


def _exchange(loss: Loss, ratio: np.ndarray) -> tuple[np.ndarray, float]:
    n = len(ratio)
    value, step = float(loss(ratio[None])[0]), 0.25
    takes, gives = (index.ravel() for index in np.nonzero(~np.eye(n, dtype=bool)))
    while step > 1e-6:
        moved = np.minimum(step, ratio[gives])
        points = np.repeat(ratio[None], len(takes), axis=0)
        points[np.arange(len(takes)), gives] -= moved
        points[np.arange(len(takes)), takes] += moved
        values = _in_chunks(loss, points)
        best = int(values.argmin())
        if values[best] < value - 1e-12 * abs(value):
            ratio, value = points[best], float(values[best])
        else:
            step /= 2
    return ratio, value


def _in_chunks(loss: Loss, points: np.ndarray) -> np.ndarray:
    return np.concatenate([loss(points[i : i + _CHUNK]) for i in range(0, len(points), _CHUNK)])


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of every point `(n, d)` to every other `(m, d)`: `(n, m)`."""
    return np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T, 0)


# (b) Closed forms


@dataclass(frozen=True, kw_only=True)
class VertexLoss:
    """exp(−2 t·r)."""

    slopes: np.ndarray

    def __call__(self, ratios: np.ndarray) -> np.ndarray:
        return np.exp(-2 * ratios @ self.slopes)


@dataclass(frozen=True, kw_only=True)
class FaceLoss:
    """Σ D (r − t)²."""

    curvature: np.ndarray
    target: np.ndarray

    def __call__(self, ratios: np.ndarray) -> np.ndarray:
        return ((ratios - self.target) ** 2) @ self.curvature


@dataclass(frozen=True, kw_only=True)
class InsideLoss:
    """Σ w (r + 0.05)^−½."""

    weights: np.ndarray

    def __call__(self, ratios: np.ndarray) -> np.ndarray:
        return (ratios + 0.05) ** -0.5 @ self.weights


@dataclass(frozen=True, kw_only=True)
class WellsLoss:
    """−Σ_j depth_j exp(−‖r − centre_j‖² / (2 · 0.2²))."""

    centres: np.ndarray
    depths: np.ndarray

    def __call__(self, ratios: np.ndarray) -> np.ndarray:
        return -np.exp(-squared_distances(ratios, self.centres) / (2 * 0.2**2)) @ self.depths


def closed_form(form: Form, n_domains: int, noise_share: float) -> Objective:
    """One of the closed forms of the module's docstring; always the same one for the same arguments."""
    random = np.random.default_rng([FORMS.index(form), n_domains])
    name = f"closed:{form}:{n_domains}:{noise_share:g}"
    n_used = max(2, math.isqrt(n_domains))
    loss: Loss
    best: np.ndarray | None = np.zeros(n_domains)
    starts = None
    if form == "vertex":
        slopes = random.uniform(-1.0, 0.7, n_domains)
        slopes[random.integers(n_domains)] = 1.0
        loss, best = VertexLoss(slopes=slopes), np.eye(n_domains)[slopes.argmax()]
    elif form == "face":
        used = random.choice(n_domains, n_used, replace=False)
        best = np.zeros(n_domains)
        best[used] = random.dirichlet(np.full(n_used, 5.0))
        curvature = random.permutation(np.geomspace(0.5, 5.0, n_domains))
        rising = random.uniform(0.3, 1.0, n_domains)
        rising[used] = 0
        loss = FaceLoss(curvature=curvature, target=best - rising / (2 * curvature))
    elif form == "inside":
        best = np.exp(random.normal(0, 1, n_domains))
        best /= best.sum()
        loss = InsideLoss(weights=(best + 0.05) ** 1.5)
    else:
        centres = np.zeros((4, n_domains))
        order = random.permutation(n_domains)
        for centre, used in zip(centres, (order[:n_used], order[-n_used:], order[[n_domains // 2]]), strict=False):
            centre[used] = random.dirichlet(np.full(len(used), 5.0))
        centres[3] = random.dirichlet(np.full(n_domains, 2.0))
        loss, best, starts = WellsLoss(centres=centres, depths=np.array([1.0, 0.85, 0.8, 0.6])), None, centres
    return make(
        name, n_domains, loss, noise_share=noise_share, best_ratio=best, starts=starts,
        facts={"noise from": f"normal, {noise_share:g} of the gain"},
    )  # fmt: skip


# (c) BoTorch's test problems


@dataclass(frozen=True, kw_only=True)
class ProblemLoss:
    """A BoTorch test problem as a loss over the simplex.

    `shares`: coordinate d of the box is the share of domain d, scaled to the box; for problems whose inputs are ratios.
    `sticks`: one domain more than coordinates; the box is broken off the simplex stick by stick, so that every point of
    the box is a ratio, and uniform ratios are uniform points.
    """

    problem: "BaseTestProblem"
    maximise: bool = False
    mapping: Literal["shares", "sticks"] = "shares"

    @property
    def n_domains(self) -> int:
        return int(self.problem.dim) + (self.mapping == "sticks")

    @cached_property
    def _box(self) -> tuple[np.ndarray, np.ndarray]:
        bounds: Any = self.problem.bounds
        lower, upper = bounds.double().numpy()
        return lower, upper - lower

    def __call__(self, ratios: np.ndarray) -> np.ndarray:
        import torch

        lower, width = self._box
        inside = ratios if self.mapping == "shares" else unit_of_ratio(ratios)
        with torch.no_grad():
            values = self.problem.forward(torch.as_tensor(lower + width * inside, dtype=torch.double), noise=False)
        flat = values.double().numpy().reshape(len(ratios))
        return -flat if self.maximise else flat


def unit_of_ratio(ratios: np.ndarray) -> np.ndarray:
    """Stick-breaking: `(n_points, n)` ratios to `(n_points, n − 1)` in the unit cube, uniform to uniform."""
    n = ratios.shape[1]
    left = 1 - np.concatenate([np.zeros((len(ratios), 1)), np.cumsum(ratios, axis=1)], axis=1)[:, : n - 1]
    left = np.maximum(left, 0)
    broken = np.divide(ratios[:, : n - 1], left, out=np.zeros_like(left), where=left > 1e-12)
    return 1 - (1 - np.clip(broken, 0, 1)) ** np.arange(n - 1, 0, -1)


def ratio_of_unit(units: np.ndarray) -> np.ndarray:
    """The inverse of `unit_of_ratio`."""
    n = units.shape[1] + 1
    broken = 1 - (1 - units) ** (1 / np.arange(n - 1, 0, -1))
    left = np.cumprod(np.concatenate([np.ones((len(units), 1)), 1 - broken], axis=1), axis=1)
    return np.concatenate([broken, np.ones((len(units), 1))], axis=1) * left


def problem_objective(
    problem: "BaseTestProblem",
    *,
    noise_share: float,
    maximise: bool = False,
    mapping: Literal["shares", "sticks"] = "shares",
    name: str | None = None,
) -> Objective:
    """Any BoTorch test problem with one objective and no outcome constraints.

    Args:
        maximise: BoTorch's synthetic functions are minimised (the default) unless made with `negate=True`.

    Raises:
        ObjectiveError: several objectives.
    """
    if getattr(problem, "num_objectives", 1) != 1:
        raise ObjectiveError(f"{type(problem).__name__} has several objectives; this benchmark searches one")
    loss = ProblemLoss(problem=problem, maximise=maximise, mapping=mapping)
    return make(
        name or f"botorch:{type(problem).__name__}:{noise_share:g}",
        loss.n_domains,
        loss,
        noise_share=noise_share,
        facts={"noise from": f"normal, {noise_share:g} of the gain", "mapping": mapping},
    )
