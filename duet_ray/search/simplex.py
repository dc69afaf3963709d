"""The space of mixing ratios: points of the simplex on the lattice of whole rows, within bounds.

A mixture of M rows (`n_rows`) can only realise ratios of the form counts / M. Everything the search proposes is
projected onto that lattice *before* it is scored, trained and told, so that the ratio trained is the ratio told.
Bounds are kept in rows too: a share of 0.33 of 10 rows is at most 3 rows, whatever floats say.

Nothing here treats one domain differently from another: there is no "last domain that takes the rest".
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np

from duet_ray.errors import RatioError
from duet_ray.records import Ratio
from duet_ray.seeds import child_seed

if TYPE_CHECKING:
    from duet_ray.config import StudyConfig

SMALL_LATTICE = 2048
"""Up to so many points a lattice is listed and searched exhaustively."""

_SHARE_TOLERANCE = 1e-9
"""0.3 · 10 is 3 rows although it is 2.9999999999999996 in floats."""

StartKind = Literal["uniform", "vertex", "random"]


@dataclass(frozen=True, kw_only=True)
class SimplexSpace:
    """All ratios a study may train: whole rows per domain that sum to M, within bounds.

    Raises:
        RatioError: no ratio lies within the bounds.
    """

    names: tuple[str, ...]
    """Domain names, in the study's order."""
    n_rows: int
    """Rows in a mixture (the paper's M)."""
    lower: tuple[int, ...]
    """`(n_domains,)` smallest number of rows per domain."""
    upper: tuple[int, ...]
    """`(n_domains,)` largest number of rows per domain."""

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

    @classmethod
    def of(cls, config: "StudyConfig", n_train_rows: Sequence[int]) -> "SimplexSpace":
        """The space of a study.

        Args:
            config: the study; its bounds, `mixture.n_rows` and `mixture.when_short` decide.
            n_train_rows: `(n_domains,)` training rows that each domain really has.

        Raises:
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
        else:
            upper = tuple(high if rows else 0 for high, rows in zip(upper, n_train_rows, strict=True))
        return cls(names=names, n_rows=n_rows, lower=lower, upper=upper)

    @property
    def n_domains(self) -> int:
        return len(self.names)

    def project(self, point: np.ndarray) -> Ratio:
        """The lattice point nearest to `point` (Euclidean), within the bounds.

        Args:
            point: `(n_domains,)` shares; need not lie on the simplex.

        Returns:
            The ratio; its rows sum to exactly `n_rows`. Of equally near points the one that gives the extra row to
            the earlier domain.

        Raises:
            RatioError: wrong length, or an entry is not finite.
        """
        point = np.asarray(point, dtype=np.float64)
        if point.shape != (self.n_domains,):
            raise RatioError(f"a ratio has one share per domain: expected {self.n_domains}, got shape {point.shape}")
        return Ratio(counts=tuple(int(c) for c in self.project_rows(point[None])[0]))

    def project_rows(self, points: np.ndarray) -> np.ndarray:
        """`project` for many points at once: `(n_points, n_domains)` shares to as many int64 rows per domain.

        The sum of squared distances is separable and convex, so handing out rows one by one, each where it costs
        least, is exact. All rows but the last few are handed out at once: λ solves Σ clip(x + λ, lower, upper) = M,
        the integer parts are certain, and the rows still missing go to the largest fractional parts. Without bounds
        this is the method of largest remainders.
        """
        points = np.asarray(points, dtype=np.float64)
        # Beyond 1e6 the fractions of a row would drown in rounding; no share is near that.
        if not np.all(np.abs(points) < 1e6):
            raise RatioError("a ratio's shares must be finite numbers")
        lower, upper = np.array(self.lower, dtype=np.float64), np.array(self.upper, dtype=np.float64)
        target = points * self.n_rows
        shifted = np.clip(target + _level(target, lower, upper, self.n_rows), lower, upper)
        base = np.floor(shifted + 1e-9)
        # Rounded, so that equal fractions stay equal and the tie goes to the earlier domain.
        fraction = np.where(base < upper, np.round(shifted - base, 7), -1.0)
        rank = np.argsort(np.argsort(-fraction, axis=1, kind="stable"), axis=1, kind="stable")
        missing = self.n_rows - base.sum(axis=1, keepdims=True)
        counts = (base + (rank < missing)).astype(np.int64)
        assert np.all(counts.sum(axis=1) == self.n_rows), "a projection has exactly n_rows rows"
        return counts

    def contains(self, ratio: Ratio) -> bool:
        """Whether a study with this space may train `ratio`."""
        return (
            ratio.n_domains == self.n_domains
            and ratio.n_rows == self.n_rows
            and all(low <= c <= high for low, c, high in zip(self.lower, ratio.counts, self.upper, strict=True))
        )

    def uniform(self) -> Ratio:
        """The uniform ratio, projected into the bounds."""
        return self.project(np.full(self.n_domains, 1 / self.n_domains))

    def tightest(self) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and largest rows each domain can really take, given that the others must sum to the rest.

        Returns:
            two `(n_domains,)` int64 arrays; a domain with both equal is fixed.
        """
        lower, upper = np.array(self.lower, dtype=np.int64), np.array(self.upper, dtype=np.int64)
        least = np.maximum(lower, self.n_rows - (upper.sum() - upper))
        most = np.minimum(upper, self.n_rows - (lower.sum() - lower))
        return least, most

    @property
    def is_single(self) -> bool:
        """Whether the bounds leave one ratio only."""
        least, most = self.tightest()
        return bool(np.all(least == most))

    def all_rows(self, limit: int = SMALL_LATTICE) -> np.ndarray | None:
        """Every lattice point as `(n_points, n_domains)` int64 rows, or None if there are more than `limit`."""
        found = list(islice(self._walk(), limit + 1))
        return None if len(found) > limit else np.array(found, dtype=np.int64)

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


def start_design(space: SimplexSpace, n: int, seed: int, vertices: bool) -> list[Ratio]:
    """The first `n` ratios of a study: what it trains before a Gaussian process has anything to say.

    The uniform ratio, then (if asked) every domain alone, projected into the bounds, then scrambled Sobol draws,
    uniform on the part of the simplex within the bounds. Points differ as long as the lattice has others. The first
    m ratios of a longer design are the shorter design, so a study may go on drawing from it.

    Args:
        seed: the study's root seed.
    """
    return [ratio for _, ratio in islice(start_stream(space, seed, vertices), n)]


def start_stream(space: SimplexSpace, seed: int, vertices: bool) -> Iterator[tuple[StartKind, Ratio]]:
    """The endless stream behind `start_design`, each ratio with where it came from."""
    seen: set[tuple[int, ...]] = set()

    def fresh(ratio: Ratio) -> bool:
        if ratio.counts in seen:
            return False
        seen.add(ratio.counts)
        return True

    uniform = space.uniform()
    fresh(uniform)
    yield "uniform", uniform
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
    """Endless points uniform on {lower/M <= r <= upper/M, Σr = 1}.

    Normalised exponentials of a scrambled Sobol sequence are uniform on the simplex above the lower bounds, and treat
    all domains alike; points above an upper bound are rejected. Where caps are so tight that hardly any point
    survives, a random walk inside the bounds takes over.
    """
    least, most = (rows / space.n_rows for rows in space.tightest())
    if space.is_single:
        while True:
            yield least
    free = 1 - least.sum()
    exponentials = _exponentials(space.n_domains, seed)
    walk = _walk_inside(least, most, np.random.default_rng(seed))
    while True:
        for _ in range(64):
            gaps = next(exponentials)
            point = least + free * gaps / gaps.sum()
            if np.all(point <= most + 0.5 / space.n_rows):
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
    names: Sequence[str], lower: Sequence[int], upper: Sequence[int], n_train_rows: Sequence[int], n_rows: int
) -> tuple[int, ...]:
    """The upper bounds, lowered to the rows there are."""
    capped = tuple(min(high, int(rows)) for high, rows in zip(upper, n_train_rows, strict=True))
    for name, low, rows in zip(names, lower, n_train_rows, strict=True):
        if rows < low:
            raise RatioError(
                f"domain {name}: its lower bound asks for {low} rows, it has {rows}; lower domains[].bounds or "
                "mixture.n_rows, or choose mixture.when_short: repeat"
            )
    if sum(capped) < n_rows:
        have = ", ".join(f"{name} {cap}" for name, cap in zip(names, capped, strict=True))
        raise RatioError(
            f"the domains can give {sum(capped)} rows ({have}), a mixture needs mixture.n_rows = {n_rows}; lower "
            "mixture.n_rows, raise domains[].bounds, add data, or choose mixture.when_short: repeat"
        )
    return capped
