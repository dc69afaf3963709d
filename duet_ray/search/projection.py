"""From any point to the nearest mixture of whole rows, many points at once.

Within bounds alone the projection is exact. Under linear constraints it is exact where the plain projection happens to
meet them, and where the lattice is small enough to be listed. Elsewhere the point is first projected onto the region in
reals (Euclidean; a semismooth Newton method on the dual, which has one multiplier per constraint), rounded as if there
were no constraints, and then mended by moving one row at a time from one domain to another: first to whatever violates
the constraints least, then nearer to the point as long as the constraints allow. So no exchange of one row between two
domains brings a result nearer, but an exchange between three might; the best lattice point is a hard integer program,
and a row or two in thousands does not decide a search. The few points on which this ends outside the region are left to
such a program (`Region.nearest`).
"""

import numpy as np

from duet_ray.search.constraints import TOLERANCE, Region

_MOVES = 100_000
"""Exchanges weighed at once: as many as fit into a processor's cache."""


def nearest_rows(target: np.ndarray, total: int, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """The nearest counts within bounds: `(n_points, n_domains)` real rows to int64 rows that sum to `total`.

    The sum of squared distances is separable and convex, so handing out rows one by one, each where it costs least, is
    exact. All rows but the last few are handed out at once: λ solves Σ clip(x + λ, lower, upper) = M, the integer parts
    are certain, and the rows still missing go to the largest fractional parts. Without bounds this is the method of
    largest remainders.
    """
    shifted = np.clip(target + _level(target, lower, upper, total), lower, upper)
    base = np.floor(shifted + 1e-9)
    # Rounded, so that equal fractions stay equal and the tie goes to the earlier domain.
    fraction = np.where(base < upper, np.round(shifted - base, 7), -1.0)
    rank = np.argsort(np.argsort(-fraction, axis=1, kind="stable"), axis=1, kind="stable")
    missing = total - base.sum(axis=1, keepdims=True)
    counts = (base + (rank < missing)).astype(np.int64)
    assert np.all(counts.sum(axis=1) == total), "a projection has exactly n_rows rows"
    return counts


def nearest_rows_in(
    region: Region, target: np.ndarray, listed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest counts in a region, or nearly so: see above.

    Args:
        target: `(n_points, n_domains)` real rows.
        listed: everything in the region, in lexicographic order, where that is known.

    Returns:
        `(n_points, n_domains)` int64 rows that sum to the region's total, and `(n_points,)` whether they lie in it.
    """
    counts = nearest_rows(target, region.total, region.lower, region.upper)
    found = region.allows(counts)
    outside = np.flatnonzero(~found)
    if listed is not None:
        counts[outside], found[outside] = _nearest_of(listed, target[outside]), True
    elif len(outside):
        real = nearest_real(region, target[outside])
        rounded = nearest_rows(real, region.total, region.lower, region.upper).astype(np.float64)
        size = max(1, _MOVES // region.n_domains**2)
        for start in range(0, len(outside), size):
            part = slice(start, start + size)
            mended = _mended(region, rounded[part], target[outside[part]])
            inside = region.allows(mended)
            mended[inside] = _improved(region, mended[inside], target[outside[part]][inside])
            counts[outside[part]], found[outside[part]] = mended, inside
    return counts, found


def tightest_in(region: Region) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest rows each domain can take in a region: two `(n_domains,)` int64 arrays.

    Exact: where linear programs bound a domain, a mixture that reaches the bound is looked for by rounding; only where
    none is found does a program with whole variables decide (and if that takes too long, the bound is left as it is).
    """
    least, most = (bound.copy() for bound in region.real_bounds)
    rounded, inside = nearest_rows_in(region, region.vertices)
    known = rounded[inside]
    for bound, sign in ((least, 1.0), (most, -1.0)):
        for d in range(region.n_domains):
            if least[d] == most[d] or np.any(known[:, d] == bound[d]):
                continue
            held = region.with_fixed(d, bound[d])
            corner = region.vertices[d if sign > 0 else region.n_domains + d]
            if held is not None and nearest_rows_in(held, corner[None])[1][0]:
                continue
            found = region.optimum(sign * np.eye(region.n_domains)[d], whole=True, proven=True)
            bound[d] = bound[d] if found is None else found[d]
    return least.astype(np.int64), most.astype(np.int64)


def nearest_real(region: Region, target: np.ndarray) -> np.ndarray:
    """The Euclidean projection onto the region in reals: `(n_points, n_domains)` to the same shape.

    The projection is clip(t − Gᵀy, lower, upper) for the multipliers y that maximise the dual, which is concave and
    piecewise quadratic: G holds the sum and the constraints, and y >= 0 for the latter. Newton's method on the
    multipliers that are free to move, with a line search, needs a dozen steps; a point that is not done after the last
    one is left as it is.
    """
    sides = np.vstack([-np.ones(region.n_domains), region.matrix])
    ends = np.r_[-float(region.total), region.limits]
    duals = np.zeros((len(target), len(sides)))
    duals[:, 0] = (region.total - target.sum(axis=1)) / region.n_domains
    points, values, slopes = _dual(region, sides, ends, target, duals)
    todo = np.arange(len(target))
    for _ in range(60):
        free = (duals[todo] > 0) | (slopes[todo] > 0)
        free[:, 0] = True
        slope = np.where(free, slopes[todo], 0.0)
        left = np.abs(slope).max(axis=1) > 1e-7 * max(1.0, region.total / 1000)
        todo, free, slope = todo[left], free[left], slope[left]
        if not len(todo):
            break
        moving = (points[todo] > region.lower) & (points[todo] < region.upper)
        curvature = (sides * moving[:, None, :]) @ sides.T
        curvature *= free[:, :, None] & free[:, None, :]
        curvature += np.eye(len(sides)) * np.where(free, 1e-6, 1.0)[:, None, :]
        step = np.linalg.solve(curvature, slope[:, :, None])[:, :, 0]
        _climb(region, sides, ends, target, todo, step, duals, points, values, slopes)
    return points


def _climb(
    region: Region,
    sides: np.ndarray,
    ends: np.ndarray,
    target: np.ndarray,
    todo: np.ndarray,
    step: np.ndarray,
    duals: np.ndarray,
    points: np.ndarray,
    values: np.ndarray,
    slopes: np.ndarray,
) -> None:
    """A line search for the points `todo`, each along its step; updates the last four in place."""
    length = 1.0
    for _ in range(24):
        tried = duals[todo] + length * step
        tried[:, 1:] = np.maximum(tried[:, 1:], 0)
        point, value, slope = _dual(region, sides, ends, target[todo], tried)
        rise = (slopes[todo] * (tried - duals[todo])).sum(axis=1)
        good = value >= values[todo] + 1e-4 * rise - 1e-12 * np.abs(values[todo])
        done = todo[good]
        duals[done], points[done], values[done], slopes[done] = tried[good], point[good], value[good], slope[good]
        todo, step = todo[~good], step[~good]
        if not len(todo):
            return
        length /= 4


def _dual(
    region: Region, sides: np.ndarray, ends: np.ndarray, target: np.ndarray, duals: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The points that belong to multipliers, the dual's values and its slopes."""
    points = np.clip(target - duals @ sides, region.lower, region.upper)
    slopes = points @ sides.T - ends
    values = 0.5 * np.square(points - target).sum(axis=1) + (duals * slopes).sum(axis=1)
    return points, values, slopes


def _nearest_of(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """For every target the nearest of `rows`, which are in lexicographic order; of equally near ones the last."""
    size = max(1, _MOVES // rows.size)
    found = np.empty((len(target), rows.shape[1]), dtype=np.int64)
    for start in range(0, len(target), size):
        distances = np.square(rows - target[start : start + size, None]).sum(axis=2)
        found[start : start + size] = rows[len(rows) - 1 - np.round(distances, 7)[:, ::-1].argmin(axis=1)]
    return found


def _mended(region: Region, counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Move single rows between domains until nothing is violated, or no move helps."""
    todo = np.flatnonzero(~region.allows(counts))
    for _ in range(4 * region.n_domains):
        room = region.limits - counts[todo] @ region.matrix.T
        before = np.maximum(-room - TOLERANCE, 0).sum(axis=1)
        cost = np.where(_possible(region, counts[todo]), 0.0, np.inf)
        for row, free in zip(region.matrix, room.T, strict=True):
            violation = _exchange(row, row) - (free + TOLERANCE)[:, None, None]
            cost += np.maximum(violation, 0, out=violation)
        least = cost.min(axis=(1, 2))
        helps = least < before - 1e-9
        todo, cost, least = todo[helps], cost[helps], least[helps]
        if not len(todo):
            break
        gap = counts[todo] - target[todo]
        farther = np.where(cost <= (least + 1e-9)[:, None, None], _exchange(gap, gap), np.inf)
        _move(counts, todo, farther)
        todo = todo[least > 1e-9]
    return counts


def _improved(region: Region, counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Move single rows between domains, each time the move that brings the counts nearest, while one does."""
    todo = np.arange(len(counts))
    for _ in range(4 * region.n_domains):
        gap = counts[todo] - target[todo]
        farther = np.where(_possible(region, counts[todo]), _exchange(gap, gap), np.inf)
        room = region.limits - counts[todo] @ region.matrix.T
        for row, free in zip(region.matrix, room.T, strict=True):
            farther[_exchange(row, row) > (free + TOLERANCE)[:, None, None]] = np.inf
        # The squared distance changes by 2 (gap_i − gap_j) + 2.
        nearer = farther.min(axis=(1, 2)) < -1 - 1e-7
        todo = todo[nearer]
        if not len(todo):
            break
        _move(counts, todo, farther[nearer])
    return counts


def _exchange(gains: np.ndarray, loses: np.ndarray) -> np.ndarray:
    """`(…, i, j)`: what gaining a row in i and losing one in j adds."""
    return np.asarray(gains[..., :, None] - loses[..., None, :])


def _possible(region: Region, counts: np.ndarray) -> np.ndarray:
    """`(n_points, i, j)`: whether the bounds let domain i gain a row and domain j lose one."""
    return np.asarray((counts < region.upper)[:, :, None] & (counts > region.lower)[:, None, :])


def _move(counts: np.ndarray, which: np.ndarray, cost: np.ndarray) -> None:
    """Make the cheapest exchange for each of `which`; rounded, so that a tie goes to the earlier domains."""
    best = np.round(cost, 7).reshape(len(which), -1).argmin(axis=1)
    gains, loses = np.divmod(best, counts.shape[1])
    counts[which, gains] += 1
    counts[which, loses] -= 1


def _level(target: np.ndarray, lower: np.ndarray, upper: np.ndarray, total: int) -> np.ndarray:
    """λ with Σ clip(target + λ, lower, upper) = total, for every point: `(n_points, 1)`."""
    level = (total - target.sum(axis=1, keepdims=True)) / target.shape[1]
    shifted = target + level
    clipped = ~((shifted >= lower) & (shifted <= upper)).all(axis=1)
    if clipped.any():
        target = target[clipped]
        low, high = (lower - target).min(axis=1, keepdims=True), (upper - target).max(axis=1, keepdims=True)
        for _ in range(80):  # bisection, to the last bit
            middle = (low + high) / 2
            short = np.clip(target + middle, lower, upper).sum(axis=1, keepdims=True) < total
            low, high = np.where(short, middle, low), np.where(short, high, middle)
        level[clipped] = (low + high) / 2
    return level
