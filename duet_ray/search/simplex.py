"""The space of mixing ratios: points of the simplex on the lattice of whole rows, within bounds.

A mixture of M rows (`n_rows`) can only realise ratios of the form counts / M. Everything the search proposes is
projected onto that lattice *before* it is scored, trained and told, so that the ratio trained is the ratio told.
Bounds are kept in rows too: a share of 0.33 of 10 rows is at most 3 rows, whatever floats say. Linear constraints over
several domains hold in whole rows as well; what they leave is the `Region` of `constraints`, and the way there is in
`projection`. Without them nothing of either is computed.

Nothing here treats one domain differently from another: there is no "last domain that takes the rest".
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np

from duet_ray.errors import RatioError
from duet_ray.linear import LinearConstraint, parse_constraints
from duet_ray.records import Ratio
from duet_ray.search.constraints import TOLERANCE, Region, region_of
from duet_ray.search.projection import nearest_rows, nearest_rows_in, tightest_in
from duet_ray.seeds import child_seed

if TYPE_CHECKING:
    from duet_ray.config import StudyConfig

SMALL_LATTICE = 2048
"""Up to so many points a lattice is listed and searched exhaustively."""

_SHARE_TOLERANCE = 1e-9
"""0.3 · 10 is 3 rows although it is 2.9999999999999996 in floats."""

StartKind = Literal["uniform", "prior", "vertex", "random"]


@dataclass(frozen=True, kw_only=True)
class SimplexSpace:
    """All ratios a study may train: whole rows per domain that sum to M, within bounds and linear constraints.

    Raises:
        RatioError: no ratio lies within the bounds, or none of those meets the constraints in whole rows; the message
            names the constraints and domains that conflict.
    """

    names: tuple[str, ...]
    """Domain names, in the study's order."""
    n_rows: int
    """Rows in a mixture (the paper's M)."""
    lower: tuple[int, ...]
    """`(n_domains,)` smallest number of rows per domain."""
    upper: tuple[int, ...]
    """`(n_domains,)` largest number of rows per domain."""
    constraints: tuple[LinearConstraint, ...] = ()
    """Over the shares; exact in whole rows, an equality to the nearest whole row (`constraints`)."""

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.lower) == len(self.upper) > 0:
            raise RatioError(
                f"one lower and one upper bound per domain: got {len(self.names)} names, "
                f"{len(self.lower)} lower and {len(self.upper)} upper bounds"
            )
        if self.n_rows < 1:
            raise RatioError(f"a mixture needs at least one row, got n_rows = {self.n_rows}")
        for name, low, high in zip(self.names, self.lower, self.upper, strict=True):
            if not 0 <= low <= high:
                raise RatioError(f"domain {name}: the bounds leave no number of rows (from {low} to {high})")
        if not sum(self.lower) <= self.n_rows <= sum(self.upper):
            raise RatioError(
                f"no ratio fits the bounds: the domains take from {sum(self.lower)} to {sum(self.upper)} rows in all, "
                f"a mixture has {self.n_rows} (mixture.n_rows)"
            )
        _ = self._region  # found now, so that an empty one is refused now

    @cached_property
    def _region(self) -> Region | None:
        """What the constraints leave; None without constraints."""
        if not self.constraints:
            return None
        return region_of(self.names, self.n_rows, self.lower, self.upper, self.constraints)

    @cached_property
    def _listed(self) -> np.ndarray | None:
        """The lattice points that meet the constraints, where they are few."""
        return None if self._region is None else self._region.all_rows(SMALL_LATTICE)

    @cached_property
    def _reach(self) -> tuple[np.ndarray, np.ndarray] | None:
        """`tightest` under constraints."""
        if self._listed is not None:
            return self._listed.min(axis=0), self._listed.max(axis=0)
        return None if self._region is None else tightest_in(self._region)

    @classmethod
    def of(cls, config: "StudyConfig", n_train_rows: Sequence[int]) -> "SimplexSpace":
        """The space of a study.

        Args:
            config: the study; its bounds, `search.constraints`, `mixture.n_rows`, `mixture.when_short` and
                `mixture.max_repeats` decide.
            n_train_rows: `(n_domains,)` training rows that each domain really has.

        Raises:
            ConfigError: a constraint cannot be read.
            RatioError: no mixture can be served; the message names the domains and the keys to change.
        """
        n_rows, when_short = config.mixture.n_rows, config.mixture.when_short
        names = config.domain_names
        if len(n_train_rows) != len(names):
            raise RatioError(f"one number of rows per domain: got {len(n_train_rows)} for {len(names)} domains")
        lower = tuple(math.ceil(d.bounds[0] * n_rows - _SHARE_TOLERANCE) for d in config.domains)
        upper = tuple(math.floor(d.bounds[1] * n_rows + _SHARE_TOLERANCE) for d in config.domains)
        _check_whole_rows(names, lower, upper, n_rows)
        if when_short == "error":
            _refuse_short(names, upper, n_train_rows)
        elif when_short == "cap":
            upper = _capped(names, lower, upper, n_train_rows, n_rows)
        elif (repeats := config.mixture.max_repeats) is not None:
            upper = _capped(names, lower, upper, n_train_rows, n_rows, repeats)
        else:
            upper = tuple(high if rows else 0 for high, rows in zip(upper, n_train_rows, strict=True))
        constraints = parse_constraints(config.search.constraints, names)
        return cls(names=names, n_rows=n_rows, lower=lower, upper=upper, constraints=constraints)

    @property
    def n_domains(self) -> int:
        return len(self.names)

    def project(self, point: np.ndarray) -> Ratio:
        """The lattice point nearest to `point` (Euclidean), within the bounds and constraints.

        Args:
            point: `(n_domains,)` shares; need not lie on the simplex.

        Returns:
            The ratio; its rows sum to exactly `n_rows`. Of equally near points the one that gives the extra row to
            the earlier domain. Under constraints on a large lattice (`SMALL_LATTICE`) it lies in the space exactly
            and is nearest but for an exchange of a few rows (`projection`).

        Raises:
            RatioError: wrong length, or an entry is not finite.
        """
        point = np.asarray(point, dtype=np.float64)
        if point.shape != (self.n_domains,):
            raise RatioError(f"a ratio has one share per domain: expected {self.n_domains}, got shape {point.shape}")
        return Ratio(counts=tuple(int(c) for c in self.project_rows(point[None])[0]))

    def project_rows(self, points: np.ndarray) -> np.ndarray:
        """`project` for many points at once: `(n_points, n_domains)` shares to as many int64 rows per domain."""
        target = self._rows_of(points)
        rows, found = self._nearest(target)
        if self._region is not None:
            for index in np.flatnonzero(~found):
                rows[index] = self._region.nearest(target[index])
        return rows

    def feasible_rows(self, points: np.ndarray) -> np.ndarray:
        """`project_rows` without the points that take long: for candidates, of which some may be lost.

        Returns:
            `(n_found, n_domains)` int64 rows in the order of the points, at least one for one point or more. Without
            constraints, and nearly always with them, there is one for each point.
        """
        target = self._rows_of(points)
        rows, found = self._nearest(target)
        return rows[found] if found.any() else self.project_rows(points[:1])

    def _rows_of(self, points: np.ndarray) -> np.ndarray:
        points = np.asarray(points, dtype=np.float64)
        # Beyond 1e6 the fractions of a row would drown in rounding; no share is near that.
        if not np.all(np.abs(points) < 1e6):
            raise RatioError("a ratio's shares must be finite numbers")
        return points * self.n_rows

    def _nearest(self, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The projection of real rows, and where it was found."""
        if self._region is None:
            lower, upper = np.array(self.lower, dtype=np.float64), np.array(self.upper, dtype=np.float64)
            return nearest_rows(target, self.n_rows, lower, upper), np.ones(len(target), dtype=bool)
        return nearest_rows_in(self._region, target, self._listed)

    def contains(self, ratio: Ratio) -> bool:
        """Whether a study with this space may train `ratio`."""
        return (
            ratio.n_domains == self.n_domains
            and ratio.n_rows == self.n_rows
            and all(low <= c <= high for low, c, high in zip(self.lower, ratio.counts, self.upper, strict=True))
            and (self._region is None or bool(self._region.allows(np.array([ratio.counts], dtype=np.float64))[0]))
        )

    def uniform(self) -> Ratio:
        """The uniform ratio, projected into the bounds and constraints."""
        return self.project(np.full(self.n_domains, 1 / self.n_domains))

    def tightest(self) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and largest rows each domain can really take, given that the others must sum to the rest.

        Exact under constraints too, where whole-row programs find them (once: some milliseconds per domain).

        Returns:
            two `(n_domains,)` int64 arrays; a domain with both equal is fixed.
        """
        if self._reach is not None:
            return self._reach
        lower, upper = np.array(self.lower, dtype=np.int64), np.array(self.upper, dtype=np.int64)
        least = np.maximum(lower, self.n_rows - (upper.sum() - upper))
        most = np.minimum(upper, self.n_rows - (lower.sum() - lower))
        return least, most

    @property
    def is_single(self) -> bool:
        """Whether the bounds and constraints leave one ratio only."""
        least, most = self.tightest()
        return bool(np.all(least == most))

    def all_rows(self, limit: int = SMALL_LATTICE) -> np.ndarray | None:
        """Every lattice point as `(n_points, n_domains)` int64 rows, or None if there are more than `limit`.

        Under constraints also None where listing them takes too long.
        """
        if self._region is not None:
            return self._listed if limit == SMALL_LATTICE else self._region.all_rows(limit)
        found = list(islice(self._walk(), limit + 1))
        return None if len(found) > limit else np.array(found, dtype=np.int64)

    def linear_inequalities(self, free: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The constraints as A r <= b over the shares r of some domains, for a search that follows gradients.

        A point on the lattice obeys them; constraints on one domain alone are not among them but in `tightest`.
        (BoTorch's `inequality_constraints` are `>=`: there it is −A r >= −b.)

        Args:
            free: the domains in r, in its order; every other domain must be fixed (see `tightest`).

        Returns:
            A, `(n_constraints, n_free)`, and b, `(n_constraints,)`; both of length 0 without constraints.
        """
        if self._region is None:
            return np.zeros((0, len(free))), np.zeros(0)
        columns, fixed = list(free), np.array(self.tightest()[0], dtype=np.float64)
        fixed[columns] = 0
        matrix = self._region.matrix[:, columns]
        used = np.any(matrix != 0, axis=1)
        limits = self._region.limits + TOLERANCE - self._region.matrix @ fixed
        return matrix[used], limits[used] / self.n_rows

    def _walk(self) -> Iterator[tuple[int, ...]]:
        """Every lattice point; no dead ends, so that stopping early is cheap."""
        n = self.n_domains
        least_after = [sum(self.lower[d + 1 :]) for d in range(n)]
        most_after = [sum(self.upper[d + 1 :]) for d in range(n)]

        def extend(done: tuple[int, ...], left: int) -> Iterator[tuple[int, ...]]:
            d = len(done)
            if d == n:
                yield done
                return
            for count in range(max(self.lower[d], left - most_after[d]), min(self.upper[d], left - least_after[d]) + 1):
                yield from extend((*done, count), left - count)

        return extend((), self.n_rows)


def start_design(space: SimplexSpace, n: int, seed: int, vertices: bool, first: Ratio | None = None) -> list[Ratio]:
    """The first `n` ratios of a study: what it trains before a Gaussian process has anything to say.

    The uniform ratio, then a prior one (if given, and if it differs), then (if asked) every domain alone, projected
    into the space, then scrambled Sobol draws, uniform on the part of the simplex within the bounds and constraints.
    Points differ as long as the lattice has others. The first m ratios of a longer design are the shorter design, so
    a study may go on drawing from it.

    Args:
        seed: the study's root seed.
        first: the ratio that is tried right after the uniform one, for instance the domains' natural sizes.

    Raises:
        RatioError: `first` lies outside the space.
    """
    return [ratio for _, ratio in islice(start_stream(space, seed, vertices, first), n)]


def start_stream(
    space: SimplexSpace, seed: int, vertices: bool, first: Ratio | None = None
) -> Iterator[tuple[StartKind, Ratio]]:
    """The endless stream behind `start_design`, each ratio with where it came from."""
    if first is not None and not space.contains(first):
        raise RatioError(
            f"the prior ratio {first.counts} (rows per domain) lies outside the space of this study; change "
            "search.prior, or the bounds and constraints"
        )
    seen: set[tuple[int, ...]] = set()

    def fresh(ratio: Ratio) -> bool:
        if ratio.counts in seen:
            return False
        seen.add(ratio.counts)
        return True

    uniform = space.uniform()
    fresh(uniform)
    yield "uniform", uniform
    if first is not None and fresh(first):
        yield "prior", first
    if vertices:
        for corner in np.eye(space.n_domains):
            if fresh(ratio := space.project(corner)):
                yield "vertex", ratio
    draws = _uniform_draws(space, child_seed(seed, "start"))
    lattice: Iterator[Ratio] | None = None
    while True:
        ratio = space.project(next(draws))
        if lattice is None:
            for _ in range(32):
                if ratio.counts not in seen:
                    break
                ratio = space.project(next(draws))
            else:
                # So many repeats mean a tiny lattice: from now on take what is left of it, then repeat.
                if (rows := space.all_rows()) is not None:
                    lattice = iter([Ratio(counts=tuple(row)) for row in rows.tolist()])
        if lattice is not None:
            ratio = next((other for other in lattice if other.counts not in seen), ratio)
        fresh(ratio)
        yield "random", ratio


def _uniform_draws(space: SimplexSpace, seed: int) -> Iterator[np.ndarray]:
    """Endless points uniform on {lower/M <= r <= upper/M, Σr = 1} and the constraints.

    Normalised exponentials of a scrambled Sobol sequence are uniform on the simplex above the lower bounds, and treat
    all domains alike; points above an upper bound, or against a constraint, are rejected. Where bounds and constraints
    are so tight that hardly any point survives, a random walk inside them takes over.
    """
    least, most = (rows / space.n_rows for rows in space.tightest())
    if space.is_single:
        while True:
            yield least
    region = space._region
    free = 1 - least.sum()
    exponentials = _exponentials(space.n_domains, seed)
    random = np.random.default_rng(seed)
    walk = (
        _walk_inside(least, most, random) if region is None else (rows / space.n_rows for rows in region.walk(random))
    )
    while True:
        for _ in range(64):
            gaps = next(exponentials)
            point = least + free * gaps / gaps.sum()
            if np.all(point <= most + 0.5 / space.n_rows) and (
                region is None or np.all(region.matrix @ point * space.n_rows <= region.limits)
            ):
                yield point
                break
        else:
            yield next(walk)


def _exponentials(n_domains: int, seed: int) -> Iterator[np.ndarray]:
    """Endless `(n_domains,)` standard exponentials, low-discrepancy."""
    import torch

    sobol = torch.quasirandom.SobolEngine(n_domains, scramble=True, seed=seed)
    while True:
        block = sobol.draw(64, dtype=torch.float64).numpy()
        yield from -np.log(np.clip(block, 1e-12, 1 - 1e-12))


def _walk_inside(least: np.ndarray, most: np.ndarray, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless points of the bounded simplex by Gibbs sampling: two domains at a time share out what they have.

    Each exchange is uniform on its segment, so the uniform distribution on the polytope is kept; 20 exchanges per
    domain lie between two points.
    """
    n_domains = len(least)
    point = least + (most - least) * (1 - least.sum()) / (most - least).sum()
    while True:
        for _ in range(20 * n_domains):
            i, j = random.choice(n_domains, size=2, replace=False)
            together = point[i] + point[j]
            low, high = max(least[i], together - most[j]), min(most[i], together - least[j])
            point[i] = random.uniform(low, max(low, high))
            point[j] = together - point[i]
        yield point.copy()


def _check_whole_rows(names: Sequence[str], lower: Sequence[int], upper: Sequence[int], n_rows: int) -> None:
    """Bounds that are sound as shares may leave nothing once rows are whole."""
    for name, low, high in zip(names, lower, upper, strict=True):
        if low > high:
            raise RatioError(
                f"domain {name}: no whole number of {n_rows} rows lies within its bounds; widen domains[].bounds or "
                "raise mixture.n_rows"
            )
    if not sum(lower) <= n_rows <= sum(upper):
        raise RatioError(
            f"no mixture of {n_rows} whole rows fits the bounds: in whole rows they allow {sum(lower)} to "
            f"{sum(upper)}; widen domains[].bounds or raise mixture.n_rows"
        )


def _refuse_short(names: Sequence[str], upper: Sequence[int], n_train_rows: Sequence[int]) -> None:
    short = [
        f"{name} has {rows} rows and may be asked for {high}"
        for name, high, rows in zip(names, upper, n_train_rows, strict=True)
        if rows < high
    ]
    if short:
        raise RatioError(
            f"mixture.when_short is error, and too few rows: {'; '.join(short)}. Lower domains[].bounds or "
            "mixture.n_rows, or choose mixture.when_short: cap or repeat"
        )


def _capped(
    names: Sequence[str],
    lower: Sequence[int],
    upper: Sequence[int],
    n_train_rows: Sequence[int],
    n_rows: int,
    max_repeats: float | None = None,
) -> tuple[int, ...]:
    """The upper bounds, lowered to the rows there are, or to so many repeats of them."""
    if max_repeats is None:
        have, remedy = "it has", "or choose mixture.when_short: repeat"
    else:
        n_train_rows = [math.floor(max_repeats * rows + _SHARE_TOLERANCE) for rows in n_train_rows]
        have, remedy = f"with mixture.max_repeats = {max_repeats:g} it has", "or raise mixture.max_repeats"
    capped = tuple(min(high, int(rows)) for high, rows in zip(upper, n_train_rows, strict=True))
    for name, low, rows in zip(names, lower, n_train_rows, strict=True):
        if rows < low:
            raise RatioError(
                f"domain {name}: its lower bound asks for {low} rows, {have} {rows}; lower domains[].bounds or "
                f"mixture.n_rows, {remedy}"
            )
    if sum(capped) < n_rows:
        given = ", ".join(f"{name} {cap}" for name, cap in zip(names, capped, strict=True))
        with_repeats = "" if max_repeats is None else f" with mixture.max_repeats = {max_repeats:g}"
        raise RatioError(
            f"the domains can give {sum(capped)} rows ({given}){with_repeats}, a mixture needs mixture.n_rows = "
            f"{n_rows}; lower mixture.n_rows, raise domains[].bounds, add data, {remedy}"
        )
    return capped
