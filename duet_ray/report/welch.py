"""How sure is a difference of two means? Welch's test, told as an interval.

    (mean_a - mean_b) ± t · sqrt(e_a² + e_b²),      e = s / sqrt(n)
    df = (e_a² + e_b²)² / (e_a⁴ / (n_a - 1) + e_b⁴ / (n_b - 1))      (Welch 1947, Satterthwaite 1946)

t is the 97.5 % quantile of Student's distribution with df degrees of freedom: it pays for a spread that was estimated
from a few repeats, where the usual "two standard errors" would promise far too much (t is 12.7 at one degree of
freedom, 4.3 at two, 2.2 at ten). A side without error, such as the untouched model under a deterministic feedback,
drops out of df, which leaves the n - 1 of the other side. The price is the assumption that repeats are roughly normal.
"""

import math
from dataclasses import dataclass

from duet_ray.report.summary import Measurement

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Welch:
    """A difference of two means and what is known of its error, in the feedback's units."""

    difference: float
    standard_error: float
    """> 0."""
    degrees_of_freedom: float
    """Between the smaller n - 1 and n_a + n_b - 2; not whole in general."""
    quantile: float
    """How many standard errors the interval reaches each way."""

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high end of the 95 % interval of the difference."""
        reach = self.quantile * self.standard_error
        return self.difference - reach, self.difference + reach

    @property
    def excludes_zero(self) -> bool:
        low, high = self.interval
        return low > 0 or high < 0


def welch(a: Measurement, b: Measurement) -> Welch | None:
    """The difference a - b with its 95 % interval.

    Returns:
        None where there is no interval: a side that varies was measured once, or no side shows any spread.
    """
    if a.standard_error is None or b.standard_error is None:
        return None
    error = math.hypot(a.standard_error, b.standard_error)
    if error == 0:
        return None
    # Shares of the squared error keep the fourth powers away from underflow; a side without error has none.
    shares = [(m, (m.standard_error / error) ** 2) for m in (a, b) if m.standard_error]
    freedom = 1 / sum(share**2 / (m.n - 1) for m, share in shares)
    return Welch(
        difference=a.mean - b.mean,
        standard_error=error,
        degrees_of_freedom=freedom,
        quantile=_student_quantile(freedom),
    )


def mean_reach(measurement: Measurement) -> float | None:
    """How far the 95 % interval of a mean reaches each way: t s / √n, n − 1 degrees of freedom; None: not known."""
    error = measurement.standard_error
    if error is None or measurement.n < 2:
        return error
    return _student_quantile(measurement.n - 1) * error if error > 0 else None


def _student_quantile(degrees_of_freedom: float) -> float:
    from scipy.stats import t  # a second to import: only when there is something to weigh

    return float(t.ppf((1 + CONFIDENCE) / 2, degrees_of_freedom))
