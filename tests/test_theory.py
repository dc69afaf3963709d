"""The laws of Theorem 3.2, Lemma B.3 and Theorem 4.1 against closed forms, quadrature and simulation."""

import math

import numpy as np
import pytest
from scipy import integrate, stats
from scipy.special import hyp2f1

from duet_ray.theory import (
    MinimumOf,
    SpacingsFit,
    TheoryError,
    TruncatedExponential,
    _difference_cdf,
    _distance,
    _spacings,
    a_of,
    fit_spacings,
    goodness_of_fit,
    lemma_b3,
    minimum_weights,
    regret_bound,
    spacings_log_likelihood,
)

LAWS = [
    TruncatedExponential(rate=0.0, cut=2.0),
    TruncatedExponential(rate=1e-9, cut=2.0),
    TruncatedExponential(rate=1.0, cut=1.0),
    TruncatedExponential(rate=4.0, cut=0.7),
    TruncatedExponential(rate=300.0, cut=2.0),
    TruncatedExponential(rate=3.0),
    TruncatedExponential(rate=30.0, cut=1.0),
]
SIZES = [1, 2, 5, 100]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("k", SIZES)
def test_density_distribution_and_quantile_agree(law: TruncatedExponential, k: int) -> None:
    end = float(law.ppf(1 - 1e-12, k))
    u = np.linspace(0, end, 9)
    for point in u[1:]:
        area, _ = integrate.quad(lambda x: float(law.pdf(x, k)), 0, point, epsabs=1e-12, limit=200)
        assert area == pytest.approx(float(law.cdf(point, k)), abs=1e-8)
    np.testing.assert_allclose(law.cdf(u, k) + law.sf(u, k), 1, atol=1e-14)
    p = np.array([0, 1e-9, 0.01, 0.3, 0.5, 0.9, 0.999])
    np.testing.assert_allclose(law.cdf(law.ppf(p, k), k), p, rtol=1e-9, atol=1e-15)
    assert float(law.ppf(1.0, k)) == pytest.approx(law.cut, rel=1e-9)
    assert list(law.pdf([-0.1, law.cut + 0.1 if math.isfinite(law.cut) else -1], k)) == [0, 0]


def test_the_density_is_the_one_of_theorem_3_2() -> None:
    rate, cut, k, u = 1.3, 0.8, 4, np.linspace(0, 0.8, 7)
    a = math.exp(-rate * cut)
    printed = rate * k * np.exp(-rate * u) / (1 - a) * ((np.exp(-rate * u) - a) / (1 - a)) ** (k - 1)
    np.testing.assert_allclose(TruncatedExponential(rate=rate, cut=cut).pdf(u, k), printed, atol=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_one_value_is_scipys_law(law: TruncatedExponential) -> None:
    if law.rate < 1e-3:
        peer = stats.uniform(scale=law.cut)
    elif math.isinf(law.cut):
        peer = stats.expon(scale=1 / law.rate)
    else:
        peer = stats.truncexpon(b=law.rate * law.cut, scale=1 / law.rate)
    assert law.mean() == pytest.approx(peer.mean(), rel=1e-8)
    assert law.variance() == pytest.approx(peer.var(), rel=1e-6)
    u = np.linspace(0, 0.69, 5)
    np.testing.assert_allclose(law.pdf(u), peer.pdf(u), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("scaled", [1e-12, 1e-4, 0.3, 1.0, 7.0, 40.0])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 30])
def test_means_are_the_closed_form(scaled: float, k: int) -> None:
    law = TruncatedExponential(rate=scaled / 1.7, cut=1.7)
    reach = -math.expm1(-scaled)
    assert law.mean(k) == pytest.approx(1.7 * reach / scaled * hyp2f1(1, 1, k + 2, reach) / (k + 1), rel=1e-9)


@pytest.mark.parametrize("k", SIZES)
def test_the_limits_of_the_moments(k: int) -> None:
    """Without a cut: Exp(kλ). With rate 0: Beta(1, k)."""
    exponential, uniform = TruncatedExponential(rate=3.0), TruncatedExponential(rate=0.0, cut=2.0)
    assert exponential.mean(k) == pytest.approx(1 / (3 * k), rel=1e-10)
    assert exponential.std(k) == pytest.approx(1 / (3 * k), rel=1e-10)
    assert uniform.mean(k) == pytest.approx(2 * stats.beta(1, k).mean(), rel=1e-10)
    assert uniform.std(k) == pytest.approx(2 * stats.beta(1, k).std(), rel=1e-10)
    far, flat = TruncatedExponential(rate=3.0, cut=1e6), TruncatedExponential(rate=1e-10, cut=2.0)
    assert far.mean(k) == pytest.approx(exponential.mean(k), rel=1e-10)
    assert flat.variance(k) == pytest.approx(uniform.variance(k), rel=1e-8)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("k", [1, 3, 40])
def test_moments_are_those_of_draws(law: TruncatedExponential, k: int) -> None:
    """Both of minima of k draws, and of draws of the minimum."""
    generator, n = np.random.default_rng(0), 20_000
    for draws in (law.sample(generator, (n, k)).min(axis=1), law.sample(generator, n, k)):
        assert draws.mean() == pytest.approx(law.mean(k), abs=4.5 * law.std(k) / n**0.5)
        assert draws.std() == pytest.approx(law.std(k), rel=0.05)


@pytest.mark.parametrize("bad", [{"rate": -1, "cut": 1}, {"rate": 1, "cut": 0}, {"rate": 0}, {"rate": math.nan}])
def test_laws_that_do_not_exist(bad: dict[str, float]) -> None:
    with pytest.raises(TheoryError, match="rate >= 0 and cut > 0"):
        TruncatedExponential(**bad)
    with pytest.raises(TheoryError, match="k >= 1"):
        LAWS[0].mean(0)


def test_the_shift_is_found_without_bias() -> None:
    law, generator = TruncatedExponential(rate=2.0, cut=1.0), np.random.default_rng(1)
    found = np.array([law.shift(5.0 + law.sample(generator, 4)) for _ in range(4000)])
    assert found[:, 0].mean() == pytest.approx(5.0, abs=4 * found[:, 0].std() / 4000**0.5)
    assert np.square(found[:, 1]).mean() == pytest.approx(found[:, 0].var(), rel=0.1)
    with pytest.raises(TheoryError, match="spread over 2"):
        law.shift([0.0, 2.0])


# Appendix B.4 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", SIZES)
def test_the_recipe_gives_the_paper_s_law(k: int) -> None:
    law = TruncatedExponential(rate=4.0, cut=0.7)
    recipe = MinimumOf(law=stats.truncexpon(b=2.8, scale=0.25), k=k)
    assert recipe.mean() == pytest.approx(law.mean(k), rel=1e-6)
    assert recipe.variance() == pytest.approx(law.variance(k), rel=1e-5)
    u, p = np.linspace(0.01, 0.6, 5), np.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(recipe.pdf(u), law.pdf(u, k), rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(recipe.cdf(u), law.cdf(u, k), rtol=1e-7)
    np.testing.assert_allclose(recipe.ppf(p), law.ppf(p, k), rtol=1e-7)


def test_the_recipe_under_a_normal_law() -> None:
    """The smallest of 2 is -1 / √π on average, of 3 is -3 / (2√π) (Arnold et al. 2008)."""
    two, three = MinimumOf(law=stats.norm(10, 2), k=2), MinimumOf(law=stats.norm(), k=3)
    assert two.mean() == pytest.approx(10 - 2 / math.pi**0.5, rel=1e-9)
    assert two.variance() == pytest.approx(4 * (1 - 1 / math.pi), rel=1e-8)
    assert three.mean() == pytest.approx(-1.5 / math.pi**0.5, rel=1e-8)
    assert two.sample(np.random.default_rng(0), 20_000).mean() == pytest.approx(two.mean(), abs=0.05)


def test_a_minimum_without_moments_is_refused() -> None:
    with pytest.raises(TheoryError, match="no finite mean"):
        MinimumOf(law=stats.cauchy(), k=3).mean()
    with pytest.raises(TheoryError, match="continuous"):
        MinimumOf(law=stats.binom(10, 0.5), k=3)


def test_the_smallest_of_k_from_a_pool_is_that_of_all_subsets() -> None:
    from itertools import combinations

    values = np.array([0.3, 1.0, 1.0, 2.5, 7.0])
    for k in range(1, 6):
        weights, minima = minimum_weights(5, k), [min(subset) for subset in combinations(values, k)]
        assert weights.sum() == pytest.approx(1)
        assert weights @ values == pytest.approx(np.mean(minima))
    with pytest.raises(TheoryError, match="6 values"):
        minimum_weights(5, 6)


# Lemma B.3 and Theorem 4.1 --------------------------------------------------------------------------------------

CUTS = np.linspace(0.02, 1, 25)


def test_lemma_b3_is_true_and_loose() -> None:
    for k in (1, 2, 3, 6, 7, 8, 20, 100, 1000):
        for cut in CUTS:
            law, bounds = TruncatedExponential(rate=1.0, cut=cut), lemma_b3(k, cut)
            assert law.mean(k) < bounds.mean / 9.4, "the docstring says how loose"
            assert law.variance(k) < bounds.variance
            assert law.variance(k) < law.mean(k), "Var <= E"
            assert law.mean(k) <= min(-math.expm1(-cut) / k, cut / (k + 1)) * (1 + 1e-9), "the simple bounds"
            if k <= 6:
                assert bounds.mean >= cut, "it says nothing"
    assert lemma_b3(7, 1.0).mean < 1


def test_lemma_b3_is_false_beyond_its_assumption() -> None:
    assert 6 / 2 + 2 * a_of(2, 10.0) < 0
    with pytest.raises(TheoryError, match=r"0 < rate \* cut <= 1, got 2 \* 0.6"):
        lemma_b3(2, 0.6, rate=2.0)


def test_other_rates_are_another_unit_of_the_loss() -> None:
    """Losses in cents are a hundred times as large: so are the bounds, and the variance's its square."""
    cents, euros = lemma_b3(3, 80.0, rate=0.01), lemma_b3(3, 0.8, rate=1.0)
    assert cents.mean == pytest.approx(100 * euros.mean)
    assert cents.variance == pytest.approx(1e4 * euros.variance)
    assert regret_bound(3, 80.0, 0.1, rate=0.01) == pytest.approx(100 * regret_bound(3, 0.8, 0.1))


def test_the_regret_bound() -> None:
    # c = 1, k = 4, δ = 1/16, so that δ^¼ = 1/2: A = (1 - 1/e - 1/2)³ / (1 - 1/e)⁴ = 0.0144448.
    a = 0.0144448
    assert a_of(4, 1.0) == pytest.approx(a, rel=1e-4)
    assert regret_bound(4, 1.0, 1 / 16) == pytest.approx(6 * 2.5 / 2 + 2 * a + 2 * (2 * a) ** 0.5, rel=1e-4)
    vacuous = [k for k in range(1, 400) if regret_bound(k, 1.0, 0.1) > 1]
    assert vacuous == list(range(1, 126)), "as the docstring says"
    peaks = [CUTS_OF_A[np.argmax([a_of(k, c) for c in CUTS_OF_A])] for k in (1, 2, 4)]
    assert peaks == pytest.approx([1.0, 0.96, 0.51], abs=0.006)
    with pytest.raises(TheoryError, match="delta"):
        regret_bound(4, 1.0, 1.0)


CUTS_OF_A = np.linspace(0.01, 1, 100)


# The fit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [*LAWS[:4], LAWS[5]])
def test_the_marginal_likelihood_is_the_sample_s_integrated_over_the_shift(law: TruncatedExponential) -> None:
    generator = np.random.default_rng(3)
    groups = [law.sample(generator, k) + generator.normal() for k in (2, 3, 6)]
    expected = 0.0
    for values in groups:

        def density(shift: float, values: np.ndarray = values) -> float:
            return math.factorial(len(values)) * float(np.prod(law.pdf(values - shift)))

        low = max(values.max() - law.cut, values.min() - 20 / max(law.rate, 1))
        expected += math.log(integrate.quad(density, low, values.min(), epsabs=0, epsrel=1e-10)[0])
    assert spacings_log_likelihood(groups, law) == pytest.approx(expected, abs=1e-6)


def test_only_the_differences_count() -> None:
    generator = np.random.default_rng(4)
    groups = [generator.exponential(size=5) for _ in range(6)]
    moved = [[*(values[::-1] + 100 * i), ] for i, values in enumerate(groups)]  # fmt: skip
    first, second = fit_spacings(groups), fit_spacings([*moved, [3.0]])
    assert second.law.rate == pytest.approx(first.law.rate, rel=1e-4)
    assert second.log_likelihood == pytest.approx(first.log_likelihood, abs=1e-6)
    assert second.group_sizes == (5,) * 6, "a single value says nothing"


def test_the_fit_in_another_unit() -> None:
    generator = np.random.default_rng(5)
    groups = [TruncatedExponential(rate=2.0, cut=1.0).sample(generator, 8) for _ in range(6)]
    euros, cents = fit_spacings(groups), fit_spacings([100 * values for values in groups])
    assert cents.law.rate == pytest.approx(euros.law.rate / 100, rel=1e-3)
    assert cents.law.cut == pytest.approx(100 * euros.law.cut, rel=1e-3)
    np.testing.assert_allclose(cents.cut_interval, 100 * np.array(euros.cut_interval), rtol=1e-3)


def test_without_a_cut_the_likelihood_is_the_textbook_s() -> None:
    """Spacings of exponentials: largest at λ = Σ(k - 1) / Σ Σd. The minimum in the place of y* would give Σk above."""
    values = [0.0, 0.01, 0.02, 0.05, 0.1, 0.4, 3.9]
    rates = np.linspace(0.5, 2.5, 2001)
    likelihood = [spacings_log_likelihood([values], TruncatedExponential(rate=rate)) for rate in rates]
    assert rates[np.argmax(likelihood)] == pytest.approx(6 / sum(values), abs=1e-3)
    assert not fit_spacings([values]).cut_is_known


@pytest.mark.parametrize(
    ("law", "sizes"),
    [
        (TruncatedExponential(rate=2.0, cut=1.0), [4] * 25),
        (TruncatedExponential(rate=5.0, cut=1.0), [24] * 4),
        (TruncatedExponential(rate=0.0, cut=1.0), [8] * 10),
    ],
)
def test_the_intervals_hold_the_truth_nine_times_of_ten(law: TruncatedExponential, sizes: list[int]) -> None:
    generator, n = np.random.default_rng(6), 50
    fits = [fit_spacings([law.sample(generator, k) + generator.normal() for k in sizes]) for _ in range(n)]

    def held(interval: tuple[float, float], truth: float) -> bool:
        return interval[0] <= truth <= interval[1]

    assert sum(held(fit.rate_interval, law.rate) for fit in fits) >= 0.86 * n
    assert sum(held(fit.cut_interval, law.cut) for fit in fits) >= 0.82 * n
    assert all(held(fit.rate_interval, fit.law.rate) and held(fit.cut_interval, fit.law.cut) for fit in fits)
    if law.rate:
        assert np.median([fit.law.rate for fit in fits]) == pytest.approx(law.rate, rel=0.15)


def test_many_values_identify_the_law() -> None:
    law = TruncatedExponential(rate=3.0, cut=1.0)
    fit: SpacingsFit = fit_spacings([law.sample(np.random.default_rng(7), 5000)])
    assert fit.law.rate == pytest.approx(3.0, rel=0.1)
    assert fit.law.cut == pytest.approx(1.0, rel=0.01)
    assert fit.cut_is_known


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(TheoryError, match=r"identifies neither .* sampling\.k >= 2"):
        fit_spacings([[1.0], [2.0]])
    with pytest.raises(TheoryError, match="equal"):
        fit_spacings([[1.0, 1.0], [2.0, 2.0]])
    with pytest.raises(TheoryError, match="finite"):
        fit_spacings([[1.0, math.nan]])


def test_p_values_are_uniform_under_the_law_and_small_under_others() -> None:
    generator = np.random.default_rng(8)
    law = TruncatedExponential(rate=2.0, cut=1.0)

    def p_value(groups: list[np.ndarray]) -> float:
        return goodness_of_fit(groups, fit_spacings(groups), n_bootstrap=39, seed=1).p_value

    sound = [p_value([law.sample(generator, 12) for _ in range(3)]) for _ in range(40)]
    assert stats.kstest(sound, "uniform").pvalue > 0.01
    normal = [p_value([generator.normal(size=24) for _ in range(5)]) for _ in range(10)]
    mirrored = [p_value([-generator.exponential(size=24) for _ in range(5)]) for _ in range(10)]
    assert np.median(normal) <= 0.05
    assert np.median(mirrored) <= 0.05


def test_the_law_of_the_differences_is_that_of_draws() -> None:
    law, generator = TruncatedExponential(rate=1.5, cut=1.0), np.random.default_rng(10)
    for k in (2, 3, 10):
        draws = np.sort(law.sample(generator, (4000, k)), axis=1)
        pooled = (draws[:, 1:] - draws[:, :1]).ravel()
        at = np.quantile(pooled, [0.1, 0.3, 0.5, 0.7, 0.9])
        np.testing.assert_allclose(_difference_cdf(at, law, k), [(pooled <= x).mean() for x in at], atol=0.02)


def test_the_bootstrap_is_seeded() -> None:
    groups = [np.random.default_rng(9).exponential(size=6)]
    fit = fit_spacings(groups)
    first = goodness_of_fit(groups, fit, n_bootstrap=19, seed=3)
    assert goodness_of_fit(groups, fit, n_bootstrap=19, seed=3) == first
    assert first.tenable == (first.p_value > 0.05)


@pytest.mark.parametrize("draw", ["exponential", "normal"])
def test_a_test_that_stops_early_gives_the_same_verdict(draw: str) -> None:
    generator = np.random.default_rng(11)
    groups = [getattr(generator, draw)(size=20) for _ in range(5)]
    fit = fit_spacings(groups)
    whole = goodness_of_fit(groups, fit, n_bootstrap=39, seed=2)
    short = goodness_of_fit(groups, fit, n_bootstrap=39, seed=2, stop_when_tenable=True)
    assert short.tenable == whole.tenable == (draw == "exponential")
    assert short.p_value <= whole.p_value


def test_a_fit_without_intervals_is_the_same_law() -> None:
    groups = [np.random.default_rng(12).exponential(size=6) for _ in range(4)]
    fast = fit_spacings(groups, intervals=False)
    assert fast.law == fit_spacings(groups).law
    assert math.isnan(fast.rate_interval[0])
    assert math.isnan(fast.cut_interval[1])


def test_groups_of_different_size_are_compared_with_their_own_law() -> None:
    """Cramér and von Mises's distance against scipy's, of the differences of groups of 2 and of 4."""
    law, generator = TruncatedExponential(rate=1.5, cut=1.0), np.random.default_rng(13)
    groups = [np.sort(law.sample(generator, k)) for k in (4, 2, 4, 2, 2)]
    parts = [_difference_cdf(v[1:] - v[0], law, len(v)) for v in groups]
    expected = stats.cramervonmises(np.concatenate(parts), "uniform").statistic
    assert _distance(_spacings(groups), law) == pytest.approx(expected)
