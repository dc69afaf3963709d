"""How far the best of k samples is from the best that a ratio can give: the laws of DUET's Sections 3.2 and 4.

Theorem 3.2 assumes that the loss of one sample is y* + X, X exponential with rate λ and cut off at c. The observation,
the minimum of k samples, is then y* + ε, and ε has the density

    λ k e^(-λu) / (1 - a) · ((e^(-λu) - a) / (1 - a))^(k-1)   on [0, c],   a = e^(-λc).

Everything here speaks of losses (lower is better); scores are turned round first, by `records.Direction.to_loss`.

The assumption can be tested, and should be: `fit_spacings` estimates λ and c from the k values of several trials,
`goodness_of_fit` says whether the law is tenable, and `MinimumOf` is the recipe of Appendix B.4 for any other law.
The smallest loss y* of every trial is unknown and of no interest there, so the fit sees only the differences
d_i = X_(i) - X_(1) to the best of the same trial. Their density, Theorem 3.2's sample integrated over y*, is

    k! (λ / (1 - a))^k e^(-λ Σd) (1 - e^(-kλ(c - d_k))) / (kλ),   0 <= d_2 <= … <= d_k <= c.

Taking the trial's minimum for y* instead would make λ too large by a factor of about k / (k - 1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.optimize import brentq, minimize, minimize_scalar
from scipy.special import comb, exprel, gammaln, log_expit

from duet_ray.errors import DuetError

CONFIDENCE_DROP = 3.841458820694124 / 2
"""How far the profile log-likelihood falls at the ends of a 95 % interval: half the quantile of χ² with one degree."""

LEVEL = 0.05
"""Of the test of the law."""

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(128)
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2
_NEGLIGIBLE = 45.0
"""e to the minus this is nothing to a float64."""


class TheoryError(DuetError):
    """Values or parameters that a law cannot be made of."""


@dataclass(frozen=True, kw_only=True)
class TruncatedExponential:
    """X of Theorem 3.2, and with `k` in a method the minimum of k independent ones.

    Formulas are written with (1 - e^-x) / x, so that they hold from λc = 0 (uniform on [0, c]) to λc = ∞ (exponential).
    """

    rate: float
    """λ >= 0, in 1 / (unit of the loss); 0 is the uniform law."""
    cut: float = math.inf
    """c > 0, in the loss's units; ∞ is the exponential law."""

    def __post_init__(self) -> None:
        if not (0 <= self.rate < math.inf and self.cut > 0) or (self.rate == 0 and math.isinf(self.cut)):
            raise TheoryError(f"a truncated exponential needs rate >= 0 and cut > 0, got {self.rate} and {self.cut}")

    def sf(self, u: Any, k: int = 1) -> np.ndarray:
        """P(min of k > u), elementwise."""
        return np.exp(k * self._log_sf(np.asarray(u, dtype=float)))

    def cdf(self, u: Any, k: int = 1) -> np.ndarray:
        """P(min of k <= u), elementwise."""
        return -np.expm1(k * self._log_sf(np.asarray(u, dtype=float)))

    def pdf(self, u: Any, k: int = 1) -> np.ndarray:
        """Theorem 3.2's density of the minimum of k at u, elementwise; 0 outside [0, cut]."""
        u = np.asarray(u, dtype=float)
        inside = (u >= 0) & (u <= self.cut)
        at = np.where(inside, u, 0.0)
        others = np.exp((k - 1) * self._log_sf(at)) if k > 1 else 1.0
        return np.where(inside, k / self._scale * np.exp(-self.rate * at) * others, 0.0)

    def ppf(self, p: Any, k: int = 1) -> np.ndarray:
        """The quantile: the u with P(min of k <= u) = p, elementwise."""
        p = np.asarray(p, dtype=float)
        if np.any((p < 0) | (p > 1)):
            raise TheoryError(f"a quantile is asked for at a probability in [0, 1], got {p}")
        with np.errstate(divide="ignore"):
            log_rest = np.log1p(-p) / k
        if self.rate == 0:
            return -self.cut * np.expm1(log_rest)
        reach, left = -math.expm1(-self.rate * self.cut), math.exp(-self.rate * self.cut)
        gone = -np.expm1(log_rest) * reach  # 1 - e^(-λu); each form is exact where the other one cancels
        with np.errstate(divide="ignore"):
            u = -np.where(gone < 0.5, np.log1p(-gone), np.log(left + np.exp(log_rest) * reach)) / self.rate
        return np.minimum(u, self.cut)

    def sample(self, generator: np.random.Generator, size: int | tuple[int, ...], k: int = 1) -> np.ndarray:
        """Independent draws of the minimum of k."""
        return self.ppf(generator.random(size), k)

    def mean(self, k: int = 1) -> float:
        """E[min of k]: how much the observation is too high on average (Lemma B.3's E[ε]).

        Equal to `scale · ₂F₁(1, 1; k + 2; 1 - e^(-λc)) / (k + 1)`, and at most `scale / k` and `cut / (k + 1)`, where
        `scale` is (1 - e^(-λc)) / λ.
        """
        return self._moments(k)[0]

    def variance(self, k: int = 1) -> float:
        """Var[min of k]: the noise of the observation."""
        first, second = self._moments(k)
        return second - first**2

    def std(self, k: int = 1) -> float:
        return math.sqrt(self.variance(k))

    @property
    def subgaussian(self) -> float:
        """R such that X and every minimum of X's is R-sub-Gaussian about its mean: c / 2 (Hoeffding); ∞ without a cut.

        The paper's proof takes R = c² / 4, which is R².
        """
        return self.cut / 2

    def shift(self, values: Sequence[float]) -> tuple[float, float]:
        """The y* of a trial whose values follow y* + this law, and its standard error.

        What the minimum is above y*, given the differences between the values, is again a truncated exponential, with
        rate kλ and cut c - d_k: its mean is Pitman's estimate, unbiased whatever y* is.

        Raises:
            TheoryError: the values spread over more than the cut.
        """
        seen = _finite(values)
        room = self.cut - float(np.ptp(seen))
        if room <= 0:
            raise TheoryError(f"values that spread over {np.ptp(seen):g} do not fit a law that is cut at {self.cut:g}")
        above = TruncatedExponential(rate=len(seen) * self.rate, cut=room)
        return float(seen.min()) - above.mean(), above.std()

    @property
    def _scale(self) -> float:
        """(1 - e^(-λc)) / λ: the inverse of the density, and of the hazard, at 0."""
        return 1 / self.rate if math.isinf(self.cut) else self.cut * float(exprel(-self.rate * self.cut))

    def _log_sf(self, u: np.ndarray) -> np.ndarray:
        u = np.clip(u, 0.0, self.cut)
        if math.isinf(self.cut):
            return -self.rate * u
        left, below = self.cut - u, np.minimum(u * exprel(-self.rate * u) / self._scale, 1.0)
        with np.errstate(divide="ignore"):
            far = np.log(left * exprel(-self.rate * left) / self._scale) - self.rate * u
            return np.where(below < 0.5, np.log1p(-below), np.minimum(far, 0.0))

    def _moments(self, k: int) -> tuple[float, float]:
        """E[ε] and E[ε²] as ∫ P(ε > u) du and ∫ 2u P(ε > u) du.

        The hazard rises from 1 / scale at 0, so P(ε > u) <= e^(-ku / scale), and nothing is left out by stopping there.
        """
        if k < 1:
            raise TheoryError(f"the minimum of k values needs k >= 1, got {k}")
        end = min(self.cut, _NEGLIGIBLE * self._scale / k)
        survival = self.sf(end * _NODES, k) * _WEIGHTS
        return end * float(survival.sum()), 2 * end**2 * float(survival @ _NODES)


@dataclass(frozen=True, kw_only=True)
class MinimumOf:
    """The observation under another law than the paper's: Appendix B.4, steps 1 to 3.

    Step 1, the law of one sample's loss, is `law`: any frozen continuous distribution of scipy, so with its own
    location where y* is known, or fitted. Step 2 is the law of the smallest of k, step 3 its mean and variance, by
    quadrature where the paper bounds them. For step 4 the law must be sub-Gaussian, as every bounded law is.
    """

    law: Any
    k: int

    def __post_init__(self) -> None:
        if not all(hasattr(self.law, name) for name in ("pdf", "sf", "logsf", "ppf", "isf")):
            raise TheoryError(f"MinimumOf needs a frozen continuous distribution of scipy.stats, got {self.law!r}")
        if self.k < 1:
            raise TheoryError(f"the minimum of k values needs k >= 1, got {self.k}")

    def cdf(self, x: Any) -> np.ndarray:
        return -np.expm1(self.k * self.law.logsf(x))

    def pdf(self, x: Any) -> np.ndarray:
        return self.k * self.law.pdf(x) * self.law.sf(x) ** (self.k - 1)

    def ppf(self, p: Any) -> np.ndarray:
        return self.law.ppf(-np.expm1(np.log1p(-np.asarray(p, dtype=float)) / self.k))

    def sample(self, generator: np.random.Generator, size: int | tuple[int, ...]) -> np.ndarray:
        return self.ppf(generator.random(size))

    def mean(self) -> float:
        """Raises `TheoryError` where it does not exist or its integral does not converge."""
        return self._moments[0]

    def variance(self) -> float:
        """Raises `TheoryError` where it does not exist or its integral does not converge."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[float, float]:
        """By the trapezoidal rule over the log-odds of the quantile, where the tails of any law fall exponentially."""
        odds = np.linspace(-60, 60, 2401)
        log_rest = log_expit(-odds) / self.k
        x = np.where(odds < 0, self.law.ppf(-np.expm1(log_rest)), self.law.isf(np.exp(log_rest)))
        weights = np.exp(log_expit(odds) + log_expit(-odds))
        weights /= weights.sum()
        middle = float(self.ppf(0.5))
        parts = weights * (x - middle)
        mean = middle + float(parts.sum())
        squares = weights * (x - mean) ** 2
        for summed in (np.abs(parts), squares):
            if not np.isfinite(summed).all() or max(summed[0], summed[-1]) > 1e-9 * summed.sum():
                raise TheoryError(f"the minimum of {self.k} under this law has no finite mean and variance")
        return mean, float(squares.sum())


def minimum_weights(n: int, k: int) -> np.ndarray:
    """The law of the smallest of k that are drawn without replacement from n measured values: no assumption at all.

    Returns:
        `(n,)` the probability that the i-th smallest of the n values is the smallest of the k: C(n - 1 - i, k - 1) /
        C(n, k), i from 0. With them the mean over all subsets is `weights @ np.sort(values)`.

    Raises:
        TheoryError: k is not within 1 … n.
    """
    if not 1 <= k <= n:
        raise TheoryError(f"{k} values cannot be drawn from {n}")
    return comb(n - 1 - np.arange(n), k - 1) / comb(n, k)


# Section 4 and Appendix B.3 -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NoiseBounds:
    """Upper bounds of the observation's noise ε >= 0."""

    mean: float
    variance: float


def lemma_b3(k: int, cut: float, rate: float = 1.0) -> NoiseBounds:
    """Lemma B.3: E[ε] <= 6 / k + 2 A(c, k) and Var[ε] <= E[ε], for λ = 1 and 0 < c <= 1.

    For another λ it is applied to λε, which has rate 1 and cut λc. Var[ε] is bounded by the bound of E[ε].

    How good it is (the tests check it on a grid of c and k): both inequalities are true for all c <= 1, and loose.
    E[ε] is less than c anyway, so the bound says nothing for k <= 6; and since E[ε] <= (1 - e^(-c)) / k, it is at least
    6 / (1 - 1/e) = 9.5 times too large at every k. Beyond its assumption it is false: for c > 1.594, where
    1 - e^(-c) < c / 2, A(c, k) is negative for even k, and the bound with it as c grows.

    Raises:
        TheoryError: outside the lemma's assumptions, rate * cut > 1.
    """
    _within_assumptions(k, cut, rate)
    mean = 6 / k + 2 * a_of(k, rate * cut)
    return NoiseBounds(mean=mean / rate, variance=mean / rate**2)


def regret_bound(k: int, cut: float, delta: float, rate: float = 1.0) -> float:
    """Theorem 4.1: what the attained average regret is at most as the number of trials grows.

        6 (δ^¼ + √k) / (δ^¼ k) + 2 A(c, k) + √(2 A(c, k)) / δ^¼

    Assumed: λ = 1, c <= 1 (losses are rescaled by `rate`); independent ε_t with the law of Theorem 3.2, the same for
    every ratio; f in the RKHS of a kernel with sublinear information gain (SE has it); LCB with β_t as Chowdhury &
    Gopalan 2017 give it (the experiments use a constant 0.5).

    How to read it:
    - The search's own regret vanishes on average, and what is left is the mean of ε_t, which tends to
      `TruncatedExponential.mean(k)` and is never above c. The bound is above c, and so says nothing, for all
      k <= 36 / (√δ c²): at c = 1 and δ = 0.1 up to k = 125.
    - The reason is Chebyshev's inequality, applied to every ε_t where it could be applied to their mean, and the 6 of
      Lemma B.3. `TruncatedExponential.mean(k)` is the number to plan k by.
    - Its probability: δ_1 = δ_2 = √δ make both events hold with at least 1 - 2√δ, not 1 - δ as printed.
    - A(c, k) is not falling in c, as the paper's remark has it: it rises up to c = 1 at k = 1, 0.96 at k = 2 and 0.51
      at k = 4, and falls only from there.

    Args:
        delta: in (0, 1).

    Raises:
        TheoryError: outside the assumptions.
    """
    _within_assumptions(k, cut, rate)
    if not 0 < delta < 1:
        raise TheoryError(f"delta is a probability in (0, 1), got {delta}")
    a, root = a_of(k, rate * cut), delta**0.25
    return (6 * (root + math.sqrt(k)) / (root * k) + 2 * a + math.sqrt(2 * a) / root) / rate


def a_of(k: int, cut: float) -> float:
    """A(c, k) = c² (1 - e^(-c) - c / 2)^(k-1) / (1 - e^(-c))^k, of Theorem 4.1."""
    reach = -math.expm1(-cut)
    return cut**2 / reach * (1 - cut / (2 * reach)) ** (k - 1)


def _within_assumptions(k: int, cut: float, rate: float) -> None:
    if k < 1:
        raise TheoryError(f"the minimum of k values needs k >= 1, got {k}")
    if not (rate > 0 and 0 < rate * cut <= 1):
        raise TheoryError(
            f"Lemma B.3 and Theorem 4.1 assume 0 < rate * cut <= 1, got {rate:g} * {cut:g} = {rate * cut:g}; "
            "TruncatedExponential.mean and .variance hold for any"
        )


# Fitting the law to a study's own values ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SpacingsFit:
    """The law that fits best, and how much the values say about it."""

    law: TruncatedExponential
    """Of largest marginal likelihood. That always has a cut, if only one well beyond the values: see `cut_is_known`."""
    rate_interval: tuple[float, float]
    """95 %, by the profile likelihood."""
    cut_interval: tuple[float, float]
    """95 %, by the profile likelihood; ∞ at its end means that no cut can be told from the values. Somewhat short where
    there is no cut (it then holds ∞ in 8 to 9 cases of 10)."""
    log_likelihood: float
    group_sizes: tuple[int, ...]
    """The k of every group that was used: those with two values or more."""

    @property
    def cut_is_known(self) -> bool:
        """Whether the values rule out a law without a cut."""
        return math.isfinite(self.cut_interval[1])


@dataclass(frozen=True, kw_only=True)
class GoodnessOfFit:
    """Could the values have come from the fitted law?"""

    statistic: float
    """Cramér and von Mises's, of all differences to the best of their group."""
    p_value: float
    """How often data from the fitted law, fitted again, are at least as far off; at least 1 / (n_bootstrap + 1)."""
    n_bootstrap: int

    @property
    def tenable(self) -> bool:
        """At the 5 % level. Few values reject no law: this is no proof of it."""
        return self.p_value > LEVEL


def fit_spacings(groups: Sequence[Sequence[float]], *, intervals: bool = True) -> SpacingsFit:
    """Estimate λ and c from the values of several trials, each with a y* of its own.

    Only how the values of a group lie to one another counts, so a group of one says nothing and is left out. Of pairs
    only the distance is seen, and most laws have one that could be a truncated exponential's: three values a group and
    more show whether the values crowd at the good end, as the law has it, or elsewhere.

    Args:
        groups: losses (lower is better), one sequence per trial; all samples of a trial have the same ratio.
        intervals: False leaves them out (NaN), which takes a fifth of the time.

    Raises:
        TheoryError: no group has two values, a value is not finite, or the values of every group are all equal.
    """
    return _fit(_spacings(groups), intervals=intervals)


def goodness_of_fit(
    groups: Sequence[Sequence[float]],
    fit: SpacingsFit,
    *,
    n_bootstrap: int = 199,
    seed: int = 0,
    stop_when_tenable: bool = False,
) -> GoodnessOfFit:
    """Test the fitted law by a parametric bootstrap: new groups from it, each fitted again.

    Args:
        groups: as they were given to `fit_spacings`.
        seed: of the bootstrap's own generator.
        stop_when_tenable: end once no further draw can make the law untenable: the same verdict, a tenth of the time
            where the law is true. The p-value is then only a lower bound.
    """
    seen = _spacings(groups)
    statistic = _distance(seen, fit.law)
    generator = np.random.default_rng(seed)
    n_as_far = 0
    for _ in range(n_bootstrap):
        drawn = _spacings([fit.law.sample(generator, int(k)).tolist() for k in seen.sizes])
        n_as_far += _distance(drawn, _fit(drawn).law) >= statistic
        if stop_when_tenable and (n_as_far + 1) / (n_bootstrap + 1) > LEVEL:
            break
    p_value = (n_as_far + 1) / (n_bootstrap + 1)
    return GoodnessOfFit(statistic=statistic, p_value=p_value, n_bootstrap=n_bootstrap)


def spacings_log_likelihood(groups: Sequence[Sequence[float]], law: TruncatedExponential) -> float:
    """The marginal log-likelihood of the module's docstring; -∞ where a group spreads over more than the cut."""
    seen = _spacings(groups)
    return float(seen.log_likelihood(law.rate, 1 / law.cut))


@dataclass(frozen=True)
class _Spacings:
    """What the likelihood needs of the groups."""

    sizes: np.ndarray
    """`(n_groups,)` k."""
    sums: np.ndarray
    """`(n_groups,)` Σ d."""
    ranges: np.ndarray
    """`(n_groups,)` d_k."""
    differences: tuple[np.ndarray, ...]
    """Per group d_2 … d_k, rising."""

    def log_likelihood(self, rate: Any, inverse_cut: Any) -> np.ndarray:
        """For every pair of λ and 1 / c, which are broadcast against each other."""
        rate, inverse = np.broadcast_arrays(
            np.asarray(rate, float)[..., None], np.asarray(inverse_cut, float)[..., None]
        )
        k = self.sizes
        with np.errstate(divide="ignore", invalid="ignore"):
            cut = 1 / inverse
            finite = cut * exprel(-rate * cut)
            log_scale = np.log(np.where(inverse > 0, finite, 1 / rate))
            room = cut - self.ranges
            log_room = np.log(np.where(inverse > 0, room * exprel(-k * rate * room), 1 / (k * rate)))
            total = gammaln(k + 1) - k * log_scale - rate * self.sums + log_room
        total = np.where((inverse > 0) & (room <= 0), -np.inf, total)
        return np.nan_to_num(total.sum(-1), nan=-np.inf)


def _spacings(groups: Sequence[Sequence[float]]) -> _Spacings:
    seen = [np.sort(_finite(values)) for values in groups if len(values) >= 2]
    if not seen:
        raise TheoryError(
            "one value a trial identifies neither rate nor cut: how far a value is from the best possible shows only "
            "beside others of the same ratio; use sampling.k >= 2"
        )
    differences = tuple(values[1:] - values[0] for values in seen)
    if not any(d[-1] > 0 for d in differences):
        raise TheoryError("the values of every trial are equal: they say nothing of how samples differ")
    return _Spacings(
        sizes=np.array([len(v) for v in seen]),
        sums=np.array([d.sum() for d in differences]),
        ranges=np.array([d[-1] for d in differences]),
        differences=differences,
    )


def _finite(values: Sequence[float]) -> np.ndarray:
    found = np.asarray(values, dtype=float)
    if not np.isfinite(found).all() or found.ndim != 1 or not len(found):
        raise TheoryError(f"a group is a list of finite values, got {values}")
    return found


def _fit(seen: _Spacings, *, intervals: bool = False) -> SpacingsFit:
    """Maximise over t = λ / λ_exp, λ_exp being the estimate without a cut, and w = (largest range) / c in [0, 1).

    A cut explains some of the shortness of the differences, so λ with it is below λ_exp: the square holds the maximum.
    """
    unit_rate = float((seen.sizes - 1).sum() / seen.sums.sum())
    widest = float(seen.ranges.max())
    most = 1 - 1e-9

    def loss(t: Any, w: Any) -> Any:
        return -seen.log_likelihood(np.asarray(t) * unit_rate, np.asarray(w) / widest)

    ts, ws = np.linspace(0, 1.1, 23), np.linspace(0, 0.99, 34)
    grid = loss(ts[:, None], ws[None, :])
    i, j = np.unravel_index(np.argmin(grid), grid.shape)
    found = minimize(lambda x: float(loss(*x)), (ts[i], ws[j]), method="L-BFGS-B", bounds=[(0, 2), (0, most)])
    (t, w), least = (found.x, found.fun) if found.fun <= grid[i, j] else ((ts[i], ws[j]), grid[i, j])
    if loss(0.0, w) <= least:  # A law of its own, which the search only comes near.
        t, least = 0.0, loss(0.0, w)

    def law_of(t: float, w: float) -> TruncatedExponential:
        return TruncatedExponential(rate=float(t) * unit_rate, cut=widest / float(w) if w > 0 else math.inf)

    rates = cuts = (math.nan, math.nan)
    if intervals:

        def rise_of_t(t: float) -> float:
            return _least(lambda w: float(loss(t, w)), 0.0, most) - float(least) - CONFIDENCE_DROP

        def rise_of_w(w: float) -> float:
            return _least(lambda t: float(loss(t, w)), 0.0, 2.0) - float(least) - CONFIDENCE_DROP

        high = max(2 * t, 0.5)
        while rise_of_t(high) < 0:
            high *= 2
        rates = (_crossing(rise_of_t, 0.0, t) * unit_rate, _crossing(rise_of_t, high, t) * unit_rate)
        w_low, w_high = _crossing(rise_of_w, 0.0, w), _crossing(rise_of_w, most, w)
        cuts = (widest / w_high, widest / w_low if w_low > 0 else math.inf)
    return SpacingsFit(
        law=law_of(t, w),
        rate_interval=rates,
        cut_interval=cuts,
        log_likelihood=-float(least),
        group_sizes=tuple(int(k) for k in seen.sizes),
    )


def _least(loss: Any, low: float, high: float) -> float:
    """The least of a function on an interval, its ends included."""
    inside = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return min(float(inside.fun), loss(low), loss(high))


def _crossing(rise: Any, far: float, inside: float) -> float:
    """Where a rise that is negative at `inside` becomes 0 on the way to `far`; `far` where it does not."""
    if far == inside or rise(far) <= 0 or rise(inside) >= 0:
        return far if rise(far) <= 0 else inside
    return float(brentq(rise, far, inside, xtol=1e-9))


def _distance(seen: _Spacings, law: TruncatedExponential) -> float:
    """Cramér and von Mises's ω² between all d_i and their law: Σ (F(d_(i)) - (2i - 1) / 2n)² + 1 / 12n."""
    alike = [[d for d, size in zip(seen.differences, seen.sizes, strict=True) if size == k] for k in set(seen.sizes)]
    found = np.sort(np.concatenate([_difference_cdf(np.concatenate(ds), law, len(ds[0]) + 1) for ds in alike]))
    n = len(found)
    return float(np.square(found - (2 * np.arange(1, n + 1) - 1) / (2 * n)).sum() + 1 / (12 * n))


def _difference_cdf(d: np.ndarray, law: TruncatedExponential, k: int) -> np.ndarray:
    """P(X - min of k <= d) of an X that is not the minimum: given the minimum m, X has the law on [m, c]."""
    m = law.ppf(_NODES, k)[:, None]
    return _WEIGHTS @ (1 - np.exp(law._log_sf(m + d[None, :]) - law._log_sf(m)))
