"""Kernels over ratios against their formulas, leave-one-out against refits, and behaviour at a share of exactly 0."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from gpytorch.likelihoods import GaussianLikelihood
from scipy.stats import multivariate_normal, norm

from duet_ray.config import SearchConfig
from duet_ray.errors import ConfigError
from duet_ray.search.kernels import (
    AUTO,
    KERNELS,
    OFFSET,
    CompositionalKernel,
    fit_start,
    leave_one_out,
    leave_one_out_log_likelihood,
    ratio_model,
    square_roots,
    typical_distance,
)
from duet_ray.search.model import Recipe, fit_model, training_covariance


def ratios(n_domains: int, n: int, seed: int = 0) -> np.ndarray:
    """Sparse ones: every second share or so is exactly 0."""
    drawn = np.random.default_rng(seed).dirichlet(np.full(n_domains, 0.5), n)
    drawn[drawn < 0.5 / n_domains] = 0
    return drawn / drawn.sum(axis=1, keepdims=True)


def covariance(name: str, points: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return ratio_model(name, points.shape[1]).kernel(torch.from_numpy(points)).to_dense().numpy()


def test_every_name_of_the_configuration_has_a_kernel():
    names = set(get_args(SearchConfig.model_fields["kernel"].annotation))

    assert names == {*KERNELS, "auto"}
    assert set(AUTO) <= set(KERNELS)


def test_an_unknown_kernel_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match="'rbf'; choose one of se, matern, ard, compositional or auto"):
        ratio_model("rbf", 3)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("n_domains", [1, 2, 9, 17, 50])
def test_values_and_slopes_are_finite_at_vertices(name, n_domains):
    kernel = ratio_model(name, n_domains).kernel
    points = torch.eye(n_domains, dtype=torch.float64).requires_grad_(True)
    others = torch.from_numpy(ratios(n_domains, 5))

    for inputs in [(points, others), (points, points)]:
        value = kernel(*inputs).to_dense()
        (slope,) = torch.autograd.grad(value.sum(), points)

        assert torch.isfinite(value).all()
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("n_domains", [1, 2, 9, 50])
def test_covariances_are_symmetric_and_positive(name, n_domains):
    found = covariance(name, np.vstack([ratios(n_domains, 20), np.eye(n_domains)]))

    np.testing.assert_allclose(found, found.T, atol=1e-14)
    assert np.linalg.eigvalsh(found).min() > -1e-10


@pytest.mark.parametrize("name", KERNELS)
def test_no_domain_is_treated_differently(name):
    points, order = ratios(6, 12), np.random.default_rng(3).permutation(6)

    np.testing.assert_allclose(covariance(name, points[:, order]), covariance(name, points), atol=1e-14)


@pytest.mark.parametrize("name", KERNELS)
def test_columns_after_the_shares_are_not_read(name):
    kernel, points = ratio_model(name, 4).kernel, torch.from_numpy(ratios(4, 7))
    wide = torch.hstack([points, torch.randn(7, 2, dtype=torch.float64)])

    torch.testing.assert_close(kernel(wide).to_dense(), kernel(points).to_dense(), rtol=0, atol=0)


def test_the_compositional_kernel_is_its_formula():
    n, points = 4, ratios(4, 6)
    kernel = CompositionalKernel(n)
    relief = np.array([0.3, -0.2, 0.0, 0.5])
    kernel.initialize(log_length_scale=0.4, log_relief=torch.from_numpy(relief), log_signal=-0.7, log_linear=0.2)
    roots = np.sqrt(points + OFFSET) - math.sqrt(OFFSET)
    uniform = math.sqrt(1 / n + OFFSET) - math.sqrt(OFFSET)
    scales = typical_distance(n, 0.5) * np.exp(0.4 + relief)
    expected = np.zeros((6, 6))
    for i in range(6):
        for j in range(6):
            gap, trend = (roots[i] - roots[j]) / scales, (roots[i] - uniform) @ (roots[j] - uniform)
            expected[i, j] = math.exp(-0.7 - gap @ gap / 2) + math.exp(0.2) * trend * 2 / typical_distance(n, 0.5) ** 2

    with torch.no_grad():
        x = torch.from_numpy(points)
        np.testing.assert_allclose(kernel(x).to_dense().numpy(), expected, rtol=1e-12)
        np.testing.assert_allclose(kernel(x, diag=True).numpy(), np.diag(expected), rtol=1e-12)
        np.testing.assert_allclose(kernel(x[:2], x[2:]).to_dense().numpy(), expected[:2, 2:], rtol=1e-12)
        np.testing.assert_allclose(kernel.length_scales.numpy(), scales, rtol=1e-12)


def test_square_roots_start_at_zero_with_the_stated_slope():
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(square_roots(zero).sum(), zero)

    assert square_roots(zero).item() == 0
    assert slope.item() == pytest.approx(1 / (2 * math.sqrt(OFFSET)))


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("n_domains", [2, 9, 30])
def test_the_typical_distance_is_that_of_uniform_draws(n_domains, exponent):
    random = np.random.default_rng(0)
    one, other = (random.dirichlet(np.ones(n_domains), 200_000) ** exponent for _ in range(2))

    simulated = math.sqrt(((one - other) ** 2).sum(axis=1).mean())

    assert typical_distance(n_domains, exponent) == pytest.approx(simulated, rel=5e-3)


def test_the_priors_of_a_standard_kernel_peak_where_they_say():
    kernel = ratio_model("ard", 5).kernel
    logs = torch.linspace(-3, 5, 8001, dtype=torch.float64)
    density = kernel.lengthscale_prior.log_prob(logs.exp())

    assert logs[density.argmax()].exp().item() == pytest.approx(5 * typical_distance(5), rel=2e-3)


def test_the_papers_kernel_has_no_priors():
    for name in ("se", "matern"):
        model = ratio_model(name, 3)
        assert model.noise_prior is None
        assert not list(model.kernel.named_priors())


# --- where a fit starts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["se", "compositional"])
@pytest.mark.parametrize("known", [False, True])
def test_a_fit_starts_at_the_best_of_its_grid(name, known):
    """Against the density by SciPy, the mean at its generalised least-squares value."""
    random = np.random.default_rng(1)
    points = ratios(4, 15)
    losses = np.sqrt(points) @ random.normal(size=4) + 0.2 * random.normal(size=15)
    noise = np.full(15, 0.3) if known else None
    model = ratio_model(name, 4)

    values, variance = fit_start(model, points, losses, noise)

    def density(parameters, noise_variance):
        model.kernel.initialize(**parameters)
        with torch.no_grad():
            k = model.kernel(torch.from_numpy(points)).to_dense().numpy() + noise_variance * np.eye(15)
        inverse = np.linalg.inv(k)
        mean = (inverse @ losses).sum() / inverse.sum()
        prior = sum(float(p.log_prob(read(m)).sum().detach()) for _, m, p, read, _ in model.kernel.named_priors())
        if not known and model.noise_prior is not None:
            prior += float(model.noise_prior.log_prob(torch.tensor(noise_variance)))
        return multivariate_normal.logpdf(losses, np.full(15, mean), k) + prior

    variances = [0.09] if known else np.geomspace(1.1e-4, 1.0, 9)
    best = max(density(parameters, v) for parameters in model.grid for v in variances)
    assert density(values, 0.09 if known else variance) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_starting_sets_the_kernel_and_the_noise(name):
    points = ratios(3, 10)
    losses, model, likelihood = points[:, 0] * 3 - 1, ratio_model(name, 3), GaussianLikelihood().double()
    values, variance = fit_start(model, points, losses, None)

    model.start(likelihood, points, losses, None)

    for parameter, value in values.items():
        assert getattr(model.kernel, parameter).detach().numpy() == pytest.approx(value)
    assert likelihood.noise.item() == pytest.approx(variance)
    assert model.length_scales().shape == ((3,) if name in ("ard", "compositional") else (1,))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("n_domains", "n_told"), [(1, 1), (2, 2), (5, 40), (50, 6)])
def test_every_kernel_fits_few_and_equal_observations(name, n_domains, n_told):
    points = ratios(n_domains, n_told)
    for losses in (np.zeros(n_told), np.linspace(-1, 1, n_told)):
        for noise in (None, np.full(n_told, 0.1)):
            model = fit_model(points, losses, noise, Recipe(kernel=name, n_free=n_domains))
            with torch.no_grad():
                found = model.posterior(torch.from_numpy(np.eye(n_domains)))
            assert torch.isfinite(found.mean).all()
            assert (found.variance > -1e-9).all()


def test_the_compositional_kernel_learns_what_is_steep_at_zero_from_fewer_trials():
    """A scaling law per domain, 17 domains, 30 trials: the error at new ratios, as a share of the spread."""

    def law(points):
        return ((points + 0.01) ** -0.3) @ np.linspace(0, 1, 17)

    points, new = ratios(17, 30), ratios(17, 300, seed=1)
    losses = law(points)
    mean, spread = losses.mean(), losses.std()
    noisy = (losses - mean) / spread + 0.1 * np.random.default_rng(2).normal(size=30)
    errors = {}
    for name in ("se", "compositional"):
        model = fit_model(points, noisy, None, Recipe(kernel=name, n_free=17))
        with torch.no_grad():
            predicted = mean + spread * model.posterior(torch.from_numpy(new)).mean.reshape(-1).numpy()
        errors[name] = np.std(predicted - law(new)) / np.std(law(new))

    assert errors["compositional"] < 0.6 * errors["se"]


# --- leave one out ---------------------------------------------------------------------------------------------------


def by_refits(kernel: np.ndarray, losses: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ordinary kriging from all but one, once per observation: its mean and its variance with the mean unknown."""
    means, sds = [], []
    for i in range(len(losses)):
        rest = np.arange(len(losses)) != i
        k = kernel[np.ix_(rest, rest)] + np.diag(noise[rest])
        inverse, cross, ones = np.linalg.inv(k), kernel[i, rest], np.ones(rest.sum())
        weight = ones @ inverse @ ones
        mean = (ones @ inverse @ losses[rest]) / weight
        means.append(mean + cross @ inverse @ (losses[rest] - mean))
        unknown = (1 - ones @ inverse @ cross) ** 2 / weight
        sds.append(math.sqrt(kernel[i, i] - cross @ inverse @ cross + unknown + noise[i]))
    return np.array(means), np.array(sds)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("n_told", [2, 3, 12])
def test_leave_one_out_is_what_refits_predict(name, n_told):
    random = np.random.default_rng(4)
    kernel, losses = covariance(name, ratios(5, n_told)), random.normal(size=n_told)
    noise = random.uniform(0.05, 0.5, n_told)

    mean, sd = leave_one_out(kernel, losses, noise)

    expected_mean, expected_sd = by_refits(kernel, losses, noise)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(sd, expected_sd, rtol=1e-8)
    assert leave_one_out_log_likelihood(kernel, losses, noise) == pytest.approx(
        norm.logpdf(losses, expected_mean, expected_sd).sum()
    )


def test_leave_one_out_does_not_depend_on_the_level_of_the_losses():
    kernel, losses = covariance("se", ratios(4, 8)), np.random.default_rng(5).normal(size=8)
    noise = np.full(8, 0.1)

    mean, sd = leave_one_out(kernel, losses, noise)
    raised, same = leave_one_out(kernel, losses + 7, noise)

    np.testing.assert_allclose(raised, mean + 7)
    np.testing.assert_allclose(same, sd)


def test_leave_one_out_prefers_the_kernel_that_predicts():
    points = ratios(6, 40)
    losses = np.sqrt(points) @ np.linspace(-1, 1, 6)
    losses = (losses - losses.mean()) / losses.std() + 0.1 * np.random.default_rng(6).normal(size=40)
    found = {}
    for name in AUTO:
        model = fit_model(points, losses, None, Recipe(kernel=name, n_free=6))
        kernel, noise, prior = training_covariance(model)
        found[name] = leave_one_out_log_likelihood(kernel, losses - prior, noise)

    assert max(found, key=found.__getitem__) == "compositional"
