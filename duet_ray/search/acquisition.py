"""Optimising an acquisition function on the exact simplex, on the lattice of whole rows.

Ax's stock optimiser starts from random points of the polytope, and returns floats that no mixture of whole rows
realises. This subclass of Ax's `Acquisition` starts where optima of mixtures lie (vertices, faces, the interior,
around what was observed), follows the gradient under the constraints, then projects onto the lattice and **scores
again**: the value compared is the value of the point that will be trained. A lattice small enough to be listed is
searched completely instead. Training settings, where they are searched too, are drawn along, moved to values that a
trial can have, and at the best points all tried.

Nothing depends on the order of the domains except the random draws, so the optimum is symmetric in them.
"""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from ax.core.search_space import SearchSpaceDigest
from ax.generators.torch.botorch_modular.acquisition import Acquisition
from botorch.exceptions.warnings import OptimizationWarning
from botorch.optim.optimize import optimize_acqf

from duet_ray.records import Point, Ratio
from duet_ray.search.acquisitions import ThompsonDraw
from duet_ray.search.features import PointSpace
from duet_ray.search.simplex import SMALL_LATTICE

Constraints = list[tuple[torch.Tensor, torch.Tensor, float]]

_N_STARTS = 4
"""Gradient searches per proposal."""
_N_STEPS = 50
"""Steps of a gradient search: what it has found after that many is within hundredths of a standard deviation."""
_JOINT_VARIABLES = 100
"""Searches run jointly, up to so many variables: a step of SLSQP costs the cube of them."""
_N_DRAWS = 256
"""Draws from each of Dirichlet(1), which fills the interior, Dirichlet(0.2), which keeps to the edges, and faces."""
_JITTERS = (0.1, 0.03, 0.01)
"""Standard deviations, in shares, of the noise around observed and pending ratios."""
_CHUNK = 512
"""Points scored at once: bounds the memory of the posterior."""
_N_POLISHED = 3
"""Best points at which every combination of settings is tried."""


@dataclass(frozen=True, kw_only=True)
class SimplexOptions:
    """What the optimiser must know beyond Ax's search space; handed over as `acquisition_options["simplex"]`."""

    space: PointSpace
    seed: int
    avoid: frozenset[Point]
    """Points that are proposed only if there is no other. Their fidelity is not looked at."""


@dataclass(frozen=True)
class Candidates:
    """Points of the lattice, as arrays."""

    rows: np.ndarray
    """`(n_points, n_domains)` whole rows per domain."""
    settings: np.ndarray
    """`(n_points, n_settings)` features of settings that a trial can have."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: np.ndarray) -> "Candidates":
        return Candidates(self.rows[chosen], self.settings[chosen])

    def joined(self, *others: "Candidates") -> "Candidates":
        """All distinct points of both."""
        every = [self, *others]
        both = np.unique(np.vstack([np.hstack([c.rows, c.settings]) for c in every]), axis=0)
        n_domains = self.rows.shape[1]
        return Candidates(both[:, :n_domains].astype(np.int64), both[:, n_domains:])

    def point(self, index: int, space: PointSpace) -> Point:
        ratio = Ratio(counts=tuple(self.rows[index].tolist()))
        return Point(ratio=ratio, settings=space.decode_settings(self.settings[index]))


class SimplexAcquisition(Acquisition):
    """Ax's acquisition with the optimiser of this module."""

    def optimize(
        self,
        n: int,
        search_space_digest: SearchSpaceDigest,
        inequality_constraints: Constraints | None = None,
        equality_constraints: Constraints | None = None,
        fixed_features: dict[int, float] | None = None,
        *unused: Any,
        **unused_options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Find the point with the largest acquisition value.

        Returns:
            the point, `(1, n_features)`, at the fidelity of a whole trial; its acquisition value, `(1,)`; its weight,
            always 1.
        """
        assert n == 1, "one point at a time"
        assert not fixed_features, "fixed domains are no features"
        assert not inequality_constraints, "they come from the space, which Ax need not check again"
        options: SimplexOptions = self.options["simplex"]
        candidates = _listed(options.space)
        if candidates is None:
            candidates = self._starts(options)
            if not isinstance(self.acqf, ThompsonDraw):  # A draw is one value a point, and has no gradient to follow.
                best = np.argsort(-self._score(candidates, options), kind="stable")[:_N_STARTS]
                bounds = torch.tensor(search_space_digest.bounds, dtype=self.dtype).T
                climbed = self._climb(self._features(candidates[best], options), bounds, equality_constraints)
                candidates = candidates.joined(self._on_lattice(climbed, options))
        values = self._score(candidates, options)
        if (combinations := _every_setting(options.space)) is not None and not isinstance(self.acqf, ThompsonDraw):
            best = np.argsort(-values, kind="stable")[:_N_POLISHED]
            rows = np.repeat(candidates.rows[best], len(combinations), axis=0)
            candidates = candidates.joined(Candidates(rows, np.tile(combinations, (len(best), 1))))
            values = self._score(candidates, options)
        chosen = _best_allowed(candidates, values, options)
        return (
            self._features(candidates[np.array([chosen])], options),
            torch.tensor(values[[chosen]], dtype=self.dtype),
            torch.ones(1, dtype=self.dtype),
        )

    def _starts(self, options: SimplexOptions) -> Candidates:
        """Distinct points among which an optimum's basin should be."""
        space = options.space
        random = np.random.default_rng(options.seed)
        known = [x.detach().reshape(-1, space.n_features) for x in (self.X_observed, self.X_pending) if x is not None]
        if space.free:
            rows = space.simplex.feasible_rows(self._drawn_shares(options, known, random))
            rows = np.unique(rows, axis=0)
        else:
            only = space.fixed_ratio or space.simplex.uniform()
            rows = np.tile(np.array(only.counts), (_N_DRAWS, 1))
        if not space.knobs:
            return Candidates(rows, np.empty((len(rows), 0)))
        drawn = Candidates(rows, space.snap_settings(random.random((len(rows), space.n_settings))))
        seen = [self._on_lattice(x, options) for x in known]
        beside = [
            Candidates(s.rows, space.snap_settings(s.settings + random.normal(0, 0.2, s.settings.shape))) for s in seen
        ]
        return drawn.joined(*seen, *beside)

    def _drawn_shares(
        self, options: SimplexOptions, known: list[torch.Tensor], random: np.random.Generator
    ) -> np.ndarray:
        """Shares `(n_points, n_domains)`, not on the lattice yet."""
        free = list(options.space.free)
        n_free = len(free)
        fixed = np.array(options.space.simplex.tightest()[0]) / options.space.simplex.n_rows
        drawn = np.vstack(
            [
                random.dirichlet(np.full(n_free, 1.0), _N_DRAWS),
                random.dirichlet(np.full(n_free, 0.2), _N_DRAWS),
                _on_faces(n_free, random),
                np.eye(n_free),
                np.full((1, n_free), 1 / n_free),
            ]
        )
        inside = np.tile(fixed, (len(drawn), 1))
        inside[:, free] += (1 - fixed.sum()) * drawn
        seen = [self._shares(x, options) for x in known]
        around = [k + random.normal(0, scale, k.shape) for k in seen for scale in _JITTERS]
        return np.vstack([inside, *seen, *around])

    def _climb(self, starts: torch.Tensor, bounds: torch.Tensor, equality: Constraints | None) -> torch.Tensor:
        """Follow the gradient from each of `starts`, `(n_starts, n_features)`; returns as many points."""
        space = self.options["simplex"].space
        with warnings.catch_warnings():
            # A line search that ends early returns its best point, which is all that is needed: it is scored again.
            warnings.simplefilter("ignore", OptimizationWarning)
            points, _ = optimize_acqf(
                acq_function=self.acqf,
                bounds=bounds,
                q=1,
                num_restarts=len(starts),
                batch_initial_conditions=starts.unsqueeze(1),
                equality_constraints=equality,
                inequality_constraints=_inequalities(space, self.dtype),
                fixed_features={space.n_features - 1: 0.0} if space.has_fidelities else None,
                options={"maxiter": _N_STEPS, "batch_limit": max(2, _JOINT_VARIABLES // starts.shape[-1])},
                return_best_only=False,
            )
        points = points.detach().reshape(-1, starts.shape[-1])
        return points[torch.isfinite(points).all(dim=1)]

    def _score(self, candidates: Candidates, options: SimplexOptions) -> np.ndarray:
        """The acquisition value of every point: `(n_points,)`."""
        points = self._features(candidates, options)
        with torch.no_grad():
            if isinstance(self.acqf, ThompsonDraw):
                return self.acqf.draw(points).numpy()
            return torch.cat([self.evaluate(X=chunk) for chunk in points.unsqueeze(1).split(_CHUNK)]).numpy()

    def _features(self, candidates: Candidates, options: SimplexOptions) -> torch.Tensor:
        """Candidates as Ax's features `(n_points, n_features)`, whole trials."""
        space = options.space
        shares = candidates.rows[:, list(space.free)] / space.simplex.n_rows
        whole = np.zeros((len(candidates), int(space.has_fidelities)))
        return torch.tensor(np.hstack([shares, candidates.settings, whole]), dtype=self.dtype)

    def _on_lattice(self, points: torch.Tensor, options: SimplexOptions) -> Candidates:
        """Features `(n_points, n_features)` moved to points that a trial can have."""
        space, n_free = options.space, len(options.space.free)
        points = points.detach().reshape(-1, space.n_features)
        if space.fixed_ratio is not None:
            rows = np.tile(np.array(space.fixed_ratio.counts), (len(points), 1))
        else:
            rows = space.simplex.project_rows(self._shares(points, options))
        settings = points[:, n_free : n_free + space.n_settings].numpy()
        return Candidates(rows, space.snap_settings(settings))

    def _shares(self, points: torch.Tensor, options: SimplexOptions) -> np.ndarray:
        """Ax's features `(n_points, n_features)` as shares `(n_points, n_domains)`."""
        simplex, free = options.space.simplex, list(options.space.free)
        shares = np.tile(np.array(simplex.tightest()[0]) / simplex.n_rows, (len(points), 1))
        shares[:, free] = points[:, : len(free)].numpy()
        return shares


def _listed(space: PointSpace) -> Candidates | None:
    """Every point, where they are few enough to be scored one by one."""
    combinations = _every_setting(space)
    if space.knobs and combinations is None:
        return None
    n_settings = 1 if combinations is None else len(combinations)
    if space.fixed_ratio is not None:
        rows: np.ndarray | None = np.array([space.fixed_ratio.counts])
    else:
        rows = space.simplex.all_rows(max(1, SMALL_LATTICE // n_settings))
    if rows is None:
        return None
    if combinations is None:
        return Candidates(rows, np.empty((len(rows), 0)))
    return Candidates(np.repeat(rows, n_settings, axis=0), np.tile(combinations, (len(rows), 1)))


def _every_setting(space: PointSpace) -> np.ndarray | None:
    """`(n_combinations, n_settings)`; None without settings, and where they are too many."""
    combinations = space.all_settings() if space.knobs else None
    return None if combinations is None else np.array([space.encode_settings(s) for s in combinations])


def _inequalities(space: PointSpace, dtype: torch.dtype | None) -> Constraints | None:
    """The linear constraints over domains as BoTorch writes them: Σ coefficients · x >= bound."""
    if not space.free:
        return None
    matrix, bounds = space.simplex.linear_inequalities(space.free)
    columns = torch.arange(len(space.free))
    return [
        (columns, -torch.tensor(row, dtype=dtype), -float(bound)) for row, bound in zip(matrix, bounds, strict=True)
    ] or None


def _on_faces(n_free: int, random: np.random.Generator) -> np.ndarray:
    """Points uniform on random faces: `(_N_DRAWS, n_free)`, each with 2 to n_free − 1 domains in use."""
    points = random.exponential(size=(_N_DRAWS, n_free))
    n_used = random.integers(2, max(3, n_free), size=(_N_DRAWS, 1))
    order = np.argsort(random.random((_N_DRAWS, n_free)), axis=1)
    points[np.argsort(order, axis=1) >= n_used] = 0
    return points / points.sum(axis=1, keepdims=True)


def _best_allowed(candidates: Candidates, values: np.ndarray, options: SimplexOptions) -> int:
    """The index of the largest value outside `avoid`, or of the largest value where nothing else is left."""
    ranked = np.argsort(-values, kind="stable")
    avoid = {replace(point, fidelity=1.0) for point in options.avoid}
    return int(next((i for i in ranked if candidates.point(i, options.space) not in avoid), ranked[0]))
