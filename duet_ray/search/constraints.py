"""What bounds and linear constraints leave of the lattice: is it empty, how far does it reach, what is in it.

Everything is in whole rows: a ratio r is allowed when its counts c = M r satisfy Σc = M, lower <= c <= upper and
A c <= limits, exactly. The exact answers (emptiness, bounds, the last resort of a projection) are linear programs with
whole variables, solved by HiGHS through SciPy; for a few dozen domains each takes milliseconds. SciPy is loaded only
where there are constraints.

An equality may be missed by half a row, which is the nearest whole row; where no mixture comes that near (an odd
number of rows to be shared equally by two), by one row. Constraints on one domain alone become its bounds.

Points uniform in the region come from hit-and-run (Smith 1984) with directions drawn from the covariance of the
region's vertices, so that a thin slab around an equality is no obstacle.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from duet_ray.errors import RatioError
from duet_ray.linear import LinearConstraint

TOLERANCE = 1e-6
"""In rows of the domain with the largest coefficient: 0.3 · 10 is 3 rows although it is 2.9999999999999996."""

_FLAT = 1e-5
"""In rows: an extent below it is none."""
_NODE_LIMIT = 20_000
"""Branches of a whole-row program: bounds its time by count, so that the answer does not depend on the machine."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Region:
    """Counts c with Σc = total, lower <= c <= upper and matrix · c <= limits; at least one such c is known to exist."""

    total: int
    lower: np.ndarray
    """`(n_domains,)` rows, as float64; constraints on one domain alone included."""
    upper: np.ndarray
    matrix: np.ndarray
    """`(n_constraints, n_domains)`, each row scaled to a largest |coefficient| of 1."""
    limits: np.ndarray
    """`(n_constraints,)`, in rows."""

    @property
    def n_domains(self) -> int:
        return len(self.lower)

    def allows(self, rows: np.ndarray) -> np.ndarray:
        """`(n_points,)`: which of `(n_points, n_domains)` rows, or real numbers of rows, lie in the region."""
        within = ((rows >= self.lower - TOLERANCE) & (rows <= self.upper + TOLERANCE)).all(axis=1)
        return np.asarray(within & (rows @ self.matrix.T <= self.limits + TOLERANCE).all(axis=1))

    def optimum(self, objective: np.ndarray, *, whole: bool, proven: bool = False) -> np.ndarray | None:
        """The counts with the smallest `objective · c`, in whole rows or in reals; None where there are none.

        Args:
            proven: None, too, where finding the smallest for certain takes too long.
        """
        which = np.full(self.n_domains, whole)
        return _solve(objective, self.total, self.lower, self.upper, self.matrix, self.limits, which, proven)

    def nearest(self, target: np.ndarray) -> np.ndarray:
        """The counts with the smallest Σ|c − target|, by a program with whole variables: always finds one."""
        n, eye = self.n_domains, np.eye(self.n_domains)
        matrix = np.block([[self.matrix, np.zeros((len(self.limits), n))], [eye, -eye], [-eye, -eye]])
        found = _solve(
            np.r_[np.zeros(n), np.ones(n)],
            self.total,
            np.r_[self.lower, np.zeros(n)],
            np.r_[self.upper, np.full(n, np.inf)],
            matrix,
            np.r_[self.limits, target, -target],
            np.repeat([True, False], n),
        )
        if found is None or not self.allows(found[None, :n])[0]:
            found = self.optimum(np.zeros(n), whole=True)
        assert found is not None, "a region is not empty"
        return found[:n]

    @cached_property
    def vertices(self) -> np.ndarray:
        """`(2 n_domains, n_domains)` real counts: where each domain is least, then where each is most."""
        corners = [self.optimum(sign * unit, whole=False) for sign in (1, -1) for unit in np.eye(self.n_domains)]
        assert all(corner is not None for corner in corners), "a region is not empty"
        return np.array(corners)

    @cached_property
    def real_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Whole rows that every domain stays within, by linear programs: tight up to what whole rows forbid."""
        diagonal = np.arange(self.n_domains)
        least = np.ceil(self.vertices[diagonal, diagonal] - TOLERANCE)
        most = np.floor(self.vertices[self.n_domains + diagonal, diagonal] + TOLERANCE)
        return np.maximum(least, self.lower), np.minimum(most, self.upper)

    def with_fixed(self, domain: int, count: float) -> "Region | None":
        """The part of the region where one domain has so many rows; None if the bounds alone leave nothing there."""
        lower, upper = self.lower.copy(), self.upper.copy()
        lower[domain] = upper[domain] = count
        if not lower.sum() <= self.total <= upper.sum():
            return None
        return replace(self, lower=lower, upper=upper)

    def all_rows(self, limit: int) -> np.ndarray | None:
        """Every lattice point `(n_points, n_domains)`, in lexicographic order; None if there are more than `limit`.

        Also None if finding them takes too long, which is counted in branches tried: the constraints can make many
        dead ends.
        """
        least, most = (bound.astype(np.int64) for bound in self.real_bounds)
        n, rows = self.n_domains, self.matrix.tolist()
        least_after = [int(least[d + 1 :].sum()) for d in range(n)]
        most_after = [int(most[d + 1 :].sum()) for d in range(n)]
        # What the domains after d add to a constraint at least.
        smallest = np.minimum(self.matrix * least, self.matrix * most)
        rest = [smallest[:, d + 1 :].sum(axis=1).tolist() for d in range(n)]
        branches_left = limit * (n + 16)

        def extend(done: tuple[int, ...], left: int, room: list[float]) -> Iterator[tuple[int, ...] | None]:
            nonlocal branches_left
            branches_left -= 1
            d = len(done)
            if branches_left < 0:
                yield None
                return
            if d == n:
                yield done
                return
            low = max(int(least[d]), left - most_after[d])
            high = min(int(most[d]), left - least_after[d])
            for row, free, later in zip(rows, room, rest[d], strict=True):
                if row[d] > 0:
                    high = min(high, math.floor((free - later + TOLERANCE) / row[d]))
                elif row[d] < 0:
                    low = max(low, math.ceil((free - later + TOLERANCE) / row[d]))
            for count in range(low, high + 1):
                taken = [free - row[d] * count for row, free in zip(rows, room, strict=True)]
                yield from extend((*done, count), left - count, taken)

        found: list[tuple[int, ...]] = []
        for point in extend((), self.total, self.limits.tolist()):
            if point is None or len(found) == limit:
                return None
            found.append(point)
        listed = np.array(found, dtype=np.int64).reshape(-1, n)
        return listed[self.allows(listed)]

    def walk(self, random: np.random.Generator) -> Iterator[np.ndarray]:
        """Endless points uniform in the region, as real numbers of rows; 20 steps per domain lie between two."""
        centre, spread = self._shape()
        sides = np.vstack([np.eye(self.n_domains), -np.eye(self.n_domains), self.matrix])
        ends = np.r_[self.upper, -self.lower, self.limits]
        point = centre.copy()
        while True:
            steps = random.standard_normal((20 * self.n_domains, spread.shape[1])) @ spread.T
            speeds, lots = steps @ sides.T, random.random(len(steps))
            room = np.maximum(ends - sides @ point, 0)
            for step, speed, lot in zip(steps, speeds, lots, strict=True):
                forward, back = speed > 1e-12, speed < -1e-12
                if not (forward.any() and back.any()):
                    continue
                high, low = (room[forward] / speed[forward]).min(), (room[back] / speed[back]).max()
                moved = low + lot * (high - low)
                point = point + moved * step
                room = np.maximum(room - moved * speed, 0)
            yield point.copy()

    def _shape(self) -> tuple[np.ndarray, np.ndarray]:
        """A point inside, and `(n_domains, n_dimensions)` directions scaled to the region's extent along them."""
        corners = self.vertices
        while True:
            centre = corners.mean(axis=0)
            _, extents, axes = np.linalg.svd((corners - centre) / len(corners) ** 0.5)
            flat = extents <= _FLAT
            # The extreme corners of the domains may lie in a plane although the region does not: look across it.
            across = []
            for axis in axes[flat]:
                ends = [self.optimum(sign * axis, whole=False) for sign in (1, -1)]
                found = np.array([end for end in ends if end is not None])
                if np.ptp(found @ axis) > 4 * _FLAT:
                    across.append(found)
            if not across:
                return centre, (axes[~flat] * extents[~flat, None]).T
            corners = np.vstack([corners, *across])


def region_of(
    names: Sequence[str],
    n_rows: int,
    lower: Sequence[int],
    upper: Sequence[int],
    constraints: Sequence[LinearConstraint],
) -> Region:
    """The region of a study's constraints.

    Args:
        lower, upper: `(n_domains,)` bounds in rows, which leave at least one mixture.

    Raises:
        RatioError: the constraints leave no mixture; names a smallest set of constraints and domains that conflict.
    """
    for constraint in constraints:
        if len(constraint.coefficients) != len(names):
            raise RatioError(
                f'constraint "{constraint.text}": one coefficient per domain: got {len(constraint.coefficients)} for '
                f"{len(names)} domains"
            )
    for widening in (1, 2):
        region = _region(n_rows, lower, upper, constraints, widening)
        if region is not None and region.optimum(np.zeros(len(names)), whole=True) is not None:
            return region
    raise RatioError(_conflict(names, n_rows, lower, upper, constraints))


def _region(
    n_rows: int,
    lower: Sequence[int],
    upper: Sequence[int],
    constraints: Sequence[LinearConstraint],
    widening: int,
    *,
    whole: bool = True,
) -> Region | None:
    """The region, possibly without a point in it; None if the bounds alone leave none.

    Args:
        widening: how many times the slack of an equality.
        whole: count in whole rows, so that a constraint on one domain becomes its bound.
    """
    low, high = np.array(lower, dtype=np.float64), np.array(upper, dtype=np.float64)
    matrix, limits = [], []
    for constraint in constraints:
        coefficients = np.array(constraint.coefficients, dtype=np.float64)
        largest = np.abs(coefficients).max()
        row = coefficients / largest
        limit = constraint.bound * n_rows / largest + widening * constraint.slack_rows
        used = np.flatnonzero(row)
        if len(used) > 1 or not whole:
            matrix.append(row)
            limits.append(limit)
        elif row[used[0]] > 0:
            high[used[0]] = min(high[used[0]], math.floor(limit + TOLERANCE))
        else:
            low[used[0]] = max(low[used[0]], math.ceil(-limit - TOLERANCE))
    if np.any(low > high) or not low.sum() <= n_rows <= high.sum():
        return None
    return Region(
        total=n_rows,
        lower=low,
        upper=high,
        matrix=np.array(matrix).reshape(-1, len(low)),
        limits=np.array(limits),
    )


def _solve(
    objective: np.ndarray,
    total: int,
    lower: np.ndarray,
    upper: np.ndarray,
    matrix: np.ndarray,
    limits: np.ndarray,
    whole: np.ndarray,
    proven: bool = False,
) -> np.ndarray | None:
    """Minimise `objective · x` over lower <= x <= upper, matrix · x <= limits and Σx = total.

    The sum is that of the domains: of the variables in `whole`, or of all where none is. After `_NODE_LIMIT` branches
    the best so far is taken, or None where it must be `proven` to be the best.
    """
    from scipy.optimize import Bounds, milp
    from scipy.optimize import LinearConstraint as Rows

    summed = (whole if whole.any() else np.ones(len(objective), dtype=bool)).astype(np.float64)
    for tighter in (0.0, 1e-4):  # HiGHS may miss a limit by its own tolerance
        solved = milp(
            objective,
            integrality=whole.astype(int),
            bounds=Bounds(lower, upper),
            constraints=Rows(
                np.vstack([summed, matrix]), np.r_[total, np.full(len(limits), -np.inf)], np.r_[total, limits - tighter]
            ),
            options={"node_limit": _NODE_LIMIT, "mip_rel_gap": 0.0},
        )
        if solved.x is None or (proven and solved.status != 0):
            return None
        found = np.where(whole, np.round(solved.x), np.clip(solved.x, lower, upper))
        if not whole.any() or (
            found @ summed == total
            and np.all((found >= lower) & (found <= upper))
            and np.all(matrix[:, whole] @ found[whole] + matrix[:, ~whole] @ found[~whole] <= limits + TOLERANCE)
        ):
            return np.asarray(found)
    return None


def _conflict(
    names: Sequence[str],
    n_rows: int,
    lower: Sequence[int],
    upper: Sequence[int],
    constraints: Sequence[LinearConstraint],
) -> str:
    """What is wrong with constraints that leave nothing: one by one, whatever is not needed for that is dropped."""
    texts = list(dict.fromkeys(constraint.text for constraint in constraints))
    bounded = [d for d in range(len(names)) if lower[d] > 0 or upper[d] < n_rows]

    def empty(texts: Sequence[str], bounded: Sequence[int], whole: bool) -> bool:
        low = [lower[d] if d in bounded else 0 for d in range(len(names))]
        high = [upper[d] if d in bounded else n_rows for d in range(len(names))]
        region = _region(n_rows, low, high, [c for c in constraints if c.text in texts], 2, whole=whole)
        return region is None or region.optimum(np.zeros(len(names)), whole=whole) is None

    whole = not empty(texts, bounded, False)
    for d in list(bounded):
        if empty(texts, rest := [other for other in bounded if other != d], whole):
            bounded = rest
    for text in list(texts):
        if empty(rest_texts := [other for other in texts if other != text], bounded, whole):
            texts = rest_texts
    quoted = ", ".join(f'"{text}"' for text in texts)
    together = f"meets {quoted}" if len(texts) == 1 else f"meets all of {quoted}"
    within = ", ".join(f"{names[d]} {lower[d]} to {upper[d]}" for d in bounded)
    given = (
        f", with these rows of {n_rows} per domain: {within} (domains[].bounds, the rows there are)" if within else ""
    )
    loosen = "search.constraints or domains[].bounds" if within else "search.constraints"
    if whole:
        return (
            f"no mixture of {n_rows} whole rows {together}{given}, although fractions of rows would; raise "
            f"mixture.n_rows or loosen {loosen}"
        )
    return f"no ratio {together}{given}; loosen {loosen}"
