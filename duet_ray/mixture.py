"""Ratio → row counts → rows: the mixture that a sample is trained on (DUET, Algorithm 2).

`rows_per_domain` splits any ratio into whole rows by largest remainder, so that the counts sum to M exactly; a study's
own ratios are whole rows from the start (`records.Ratio`). Each domain's share is drawn by its row weights.

Without replacement, the draw gives row i the key E_i / w_i with E_i a standard exponential, and takes the smallest
keys (Efraimidis & Spirakis 2006; the same law as Gumbel top-k on log w): one pass over the weights, exact, and 10,000
of 10 million rows take a fraction of a second. The generator is keyed on (root seed, trial, sample, domain), so a
mixture depends on nothing but the study file and its place in the study.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from duet_ray.errors import RatioError
from duet_ray.records import Mixture, Ratio
from duet_ray.seeds import generator

WhenShort = Literal["cap", "repeat", "error"]


@dataclass(frozen=True)
class RowOrder:
    """A nested order of a domain's rows, for selection methods that choose sets of rows rather than weigh them."""

    order: np.ndarray
    """`(n_rows,)` int64 permutation, best first."""
    pool: float = 1.0
    """A quota is drawn uniformly among the first `pool` × quota rows; at 1 it is those rows, in that order."""


DrawBy = np.ndarray | RowOrder
"""What a domain's rows are drawn by: `(n_rows,)` probabilities, or an order."""


def rows_per_domain(ratio: np.ndarray, n_rows: int) -> np.ndarray:
    """Split a budget of rows over the domains by largest remainder.

    Args:
        ratio: `(n_domains,)`, on the simplex, in the study's domain order.
        n_rows: rows in the whole mixture (DUET's M).

    Returns:
        `(n_domains,)` int64 that sum to exactly `n_rows`. Ties go to the earlier domain; a ratio of 0 gets no row.

    Raises:
        RatioError: `ratio` is off the simplex by more than 1e-6, or not finite.
    """
    ratio = np.asarray(ratio, dtype=np.float64)
    if ratio.ndim != 1 or not len(ratio) or not np.all(np.isfinite(ratio)):
        raise RatioError(f"a ratio is a vector of finite numbers, got {ratio!r}")
    if ratio.min() < -1e-6 or abs(ratio.sum() - 1) > 1e-6:
        raise RatioError(f"a ratio is >= 0 and sums to 1, got {ratio.tolist()} with sum {ratio.sum():.9g}")
    exact = np.clip(ratio, 0, None) / np.clip(ratio, 0, None).sum() * n_rows
    # A share that is whole but for rounding must not lose its row to the floor.
    counts = np.floor(exact + 1e-9).astype(np.int64)
    remainder = exact - counts
    for index in np.argsort(-remainder, kind="stable")[: n_rows - counts.sum()]:
        counts[index] += 1
    return counts


def at_fidelity(ratio: Ratio, fidelity: float) -> Ratio:
    """The ratio of a cheap look: a share of the rows, split as the whole is, by largest remainder.

    Args:
        fidelity: in (0, 1]; 1 is the ratio itself.

    Returns:
        `fidelity · n_rows` rows, rounded, at least one; no domain has more than in the whole ratio.

    Raises:
        RatioError: `fidelity` is no such share.
    """
    if not 0 < fidelity <= 1:
        raise RatioError(f"a fidelity is a share of the rows above 0 and up to 1, got {fidelity}")
    if fidelity == 1:
        return ratio
    n_rows = max(1, math.floor(fidelity * ratio.n_rows + 0.5))
    return Ratio(counts=tuple(rows_per_domain(ratio.values, n_rows).tolist()))


def draw_rows(
    probabilities: np.ndarray,
    n_rows: int,
    rng: np.random.Generator,
    *,
    replacement: bool = False,
    when_short: WhenShort = "error",
    domain: str = "",
) -> np.ndarray:
    """Draw rows of one domain by their weights.

    Args:
        probabilities: `(n_available,)` weights >= 0, not all 0; need not be normalised. A weight of 0 is never drawn.
        n_rows: rows to draw.
        rng: a private generator; used up in a fixed way, whatever the weights.
        replacement: draw independently, so that a row may come more than once.
        when_short: without replacement and with fewer rows than asked for: `repeat` takes all rows as often as they
            fit and draws the rest; `cap` and `error` raise (the search must not ask for it).
        domain: the domain's name, for the message.

    Returns:
        `(n_rows,)` int64 row ids in the order drawn.

    Raises:
        RatioError: the domain has too few rows.
    """
    if n_rows == 0:
        return np.empty(0, dtype=np.int64)
    weights = np.asarray(probabilities, dtype=np.float64)
    n_drawable = int(np.count_nonzero(weights > 0))
    if not np.all(np.isfinite(weights)) or weights.min() < 0 or n_drawable == 0:
        raise RatioError(f"domain {domain}: row weights must be finite, >= 0 and not all 0")
    if replacement:
        return rng.choice(len(weights), size=n_rows, p=weights / weights.sum()).astype(np.int64)
    if n_rows > n_drawable:
        _check_not_short(n_rows, n_drawable, when_short, domain)
    rounds = []
    for _ in range(n_rows // n_drawable):
        rounds.append(_smallest_keys(weights, n_drawable, rng))
    if rest := n_rows % n_drawable:
        rounds.append(_smallest_keys(weights, rest, rng))
    return np.concatenate(rounds)


def draw_in_order(
    by: RowOrder, n_rows: int, rng: np.random.Generator, *, when_short: WhenShort = "error", domain: str = ""
) -> np.ndarray:
    """Draw rows of one domain from the front of an order; arguments and errors as for `draw_rows`."""
    order, n_available = np.asarray(by.order, dtype=np.int64), len(by.order)
    if n_rows > n_available:
        _check_not_short(n_rows, n_available, when_short, domain)
    whole, rest = divmod(n_rows, n_available)
    front = order[: math.ceil(by.pool * rest)]
    last = front if len(front) == rest else rng.choice(front, size=rest, replace=False)
    return np.concatenate([*[order] * whole, last])


def draw_mixture(
    ratio: Ratio,
    weights: Sequence[DrawBy],
    *,
    seed: int,
    trial: int,
    sample: int,
    replacement: bool = False,
    when_short: WhenShort = "error",
    names: Sequence[str] | None = None,
) -> Mixture:
    """Draw one of the k samples of a trial.

    Args:
        ratio: rows per domain.
        weights: per domain, `(n_rows_of_domain,)` row probabilities, or an order of its rows.
        seed: the study's root seed.
        trial, sample: the sample's place in the study: other places, other rows.
    """
    if len(weights) != ratio.n_domains:
        raise RatioError(f"{ratio.n_domains} domains in the ratio and weights for {len(weights)}")
    rows = []
    for index, (count, by) in enumerate(zip(ratio.counts, weights, strict=True)):
        rng = generator(seed, "draw", trial, sample, index)
        name = names[index] if names else str(index)
        if isinstance(by, RowOrder):
            rows.append(draw_in_order(by, count, rng, when_short=when_short, domain=name))
        else:
            rows.append(draw_rows(by, count, rng, replacement=replacement, when_short=when_short, domain=name))
    return Mixture(rows=tuple(rows))


def rows_digest(mixture: Mixture) -> str:
    """SHA-256 of the drawn row ids, domain by domain in the order drawn: equal digests, equal training rows."""
    digest = hashlib.sha256()
    for rows in mixture.rows:
        digest.update(len(rows).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(rows, dtype="<i8").tobytes())
    return digest.hexdigest()


def _check_not_short(n_rows: int, n_available: int, when_short: WhenShort, domain: str) -> None:
    if when_short != "repeat":
        raise RatioError(
            f"domain {domain}: {n_rows} rows asked for and {n_available} there; "
            f"set mixture.when_short: repeat, lower mixture.n_rows, or add rows"
        )


def _smallest_keys(weights: np.ndarray, n_rows: int, rng: np.random.Generator) -> np.ndarray:
    # The largest weight is made 1 and the smallest positive ones are held above 1e-290, so that no key of a drawable
    # row overflows to the infinity that marks a weight of 0.
    scaled = weights / weights.max()
    weights = np.where(weights > 0, np.maximum(scaled, 1e-290), 0.0)
    with np.errstate(divide="ignore"):
        keys = rng.standard_exponential(len(weights)) / weights
    if n_rows < len(keys):
        chosen = np.argpartition(keys, n_rows - 1)[:n_rows]
    else:
        chosen = np.arange(len(keys))
    return chosen[np.argsort(keys[chosen], kind="stable")].astype(np.int64)
