"""Acquisition functions: against their formulas and Monte Carlo, on models fitted to a handful of observations."""

import math

import numpy as np
import pytest
import torch
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from scipy.stats import norm

from duet_ray.config import SearchConfig
from duet_ray.records import Point, Ratio
from duet_ray.search import Proposer, SimplexSpace, Told, start_design
from duet_ray.search.acquisitions import (
    ExpectedImprovement,
    KnowledgeGradient,
    LowerConfidenceBound,
    ThompsonDraw,
    believing,
)
from duet_ray.search.fitted import Fitted, fitted
from duet_ray.search.model import training_covariance
from duet_ray.search.schedule import theory_beta
from tests.toys import quadratic_toy

NEGATED = ScalarizedPosteriorTransform(weights=torch.tensor([-1.0], dtype=torch.float64))


def space(n: int, n_rows: int) -> SimplexSpace:
    return SimplexSpace(names=tuple("abcdefghi"[:n]), n_rows=n_rows, lower=(0,) * n, upper=(n_rows,) * n)


def observed(s: SimplexSpace, n: int, noise: float = 0.1, sem: float | None = None) -> list[Told]:
    toy = quadratic_toy(np.linspace(1, 2, s.n_domains) / np.linspace(1, 2, s.n_domains).sum(), noise, seed=3)
    return [Told(ratio=r, loss=toy(r, i), sem=sem) for i, r in enumerate(start_design(s, n, 1, True))]


def model(n: int = 3, n_told: int = 8, kernel: str = "se", sem: float | None = None) -> tuple[Fitted, torch.Tensor]:
    """A fitted model, and the points observed as features."""
    s = space(n, 100)
    told = observed(s, n_told, sem=sem)
    found = fitted(Proposer(s, SearchConfig(kernel=kernel), 0), told)
    return found, torch.tensor(np.unique(found.space.encode([one.point for one in told]), axis=0))


def points(n: int, count: int = 7) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(5).dirichlet(np.ones(n), count))


def moments(found: Fitted, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """μ and the covariance of the standardised loss, by the textbook: DUET, Eq. 1."""
    kernel, noise, prior = training_covariance(found.model)
    train, z = found.model.train_inputs[0], found.model.train_targets.numpy()
    with torch.no_grad():
        across, own = found.model.covar_module(x, train).to_dense().numpy(), found.model.covar_module(x).to_dense()
        mean = found.model.mean_module(x).numpy()
    inverse = np.linalg.inv(kernel + np.diag(noise))
    return mean + across @ inverse @ (z - prior), own.numpy() - across @ inverse @ across.T


def values(acquisition, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return acquisition(x.unsqueeze(1)).numpy()


# Expected improvement and the bound ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sem", [None, 0.1])
@pytest.mark.parametrize("kernel", ["se", "compositional"])
def test_expected_improvement_is_the_formula_over_the_best_posterior_mean(kernel, sem):
    found, seen = model(kernel=kernel, sem=sem)
    x = points(3)
    mu, covariance = moments(found, x)
    sigma = np.sqrt(np.diag(covariance))
    best = moments(found, seen)[0].min()  # of a loss; not the luckiest observation
    z = (best - mu) / sigma
    improvement = (best - mu) * norm.cdf(z) + sigma * norm.pdf(z)
    log_ei = values(ExpectedImprovement(found.model, observed=seen, posterior_transform=NEGATED), x)
    assert log_ei == pytest.approx(np.log(improvement), abs=1e-4)


def test_expected_improvement_has_a_logarithm_where_it_underflows():
    """Far above the best, improvement is 1e-300 and less; its logarithm still says which way is down."""
    found, seen = model()
    acquisition = ExpectedImprovement(found.model, observed=seen, posterior_transform=NEGATED)
    acquisition.best_f += 300.0
    far = values(acquisition, points(3))
    assert np.all(np.isfinite(far))
    assert far.max() < -700
    assert len(np.unique(far)) == len(far)


@pytest.mark.parametrize("factor", [0.0, 0.5, 3.0])
def test_the_bound_is_the_formula(factor):
    found, _ = model(kernel="matern")
    x = points(3)
    mu, covariance = moments(found, x)
    bound = values(LowerConfidenceBound(found.model, factor=factor, posterior_transform=NEGATED), x)
    assert bound == pytest.approx(-mu + factor * np.sqrt(np.diag(covariance)), abs=1e-5)


def test_the_factor_of_the_theory_reaches_the_search():
    """`beta: theory` proposes what its number does, which the schedule gives for the fitted kernel and noise."""
    s = space(3, 30)
    told = observed(s, 8)
    asked = {"rkhs_norm": 1.5, "delta": 0.05, "acquisition": "lcb", "kernel": "se"}
    settings = SearchConfig(beta="theory", **asked)
    kernel, noise, _ = training_covariance(fitted(Proposer(s, settings, 0), told).model)
    n_trials = settings.n_start + settings.n_trials
    factor = theory_beta(kernel, math.sqrt(noise.max()), 1.5, 0.05, n_trials=n_trials, model_noise=noise)
    assert factor > 1.5

    def propose(beta):
        return Proposer(s, SearchConfig(beta=beta, **asked), 0).propose(100, told, [])

    theory, number, greedy = propose("theory"), propose(factor), propose(0.0)
    assert (theory.ratio, theory.sigma) == (number.ratio, number.sigma)
    assert theory.sigma > greedy.sigma, "it explores"
    assert theory.expected > greedy.expected


# Knowledge gradient --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sem", [None, 0.1])
def test_the_knowledge_gradient_is_that_of_simulated_outcomes(sem):
    """Draw what would be observed at x, condition on it, and see how much lower the best posterior mean is."""
    found, seen = model(sem=sem)
    acquisition = KnowledgeGradient(found.model, observed=seen, posterior_transform=NEGATED)
    noise = float(training_covariance(found.model)[1].mean())
    random = np.random.default_rng(0).standard_normal(20_000)
    for x in points(3, 4):
        mu, covariance = moments(found, torch.cat([x[None], seen]))
        total = covariance[0, 0] + noise
        outcome = mu[0] + math.sqrt(total) * random
        updated = mu[:, None] + np.outer(covariance[:, 0] / total, outcome - mu[0])
        gains = mu[1:].min() - updated.min(axis=0)
        (value,) = values(acquisition, x[None])
        # 20 nodes of a piecewise linear function: a few per cent of its spread.
        assert value == pytest.approx(gains.mean(), abs=4 * gains.std() / math.sqrt(len(gains)) + 0.02 * gains.std())


@pytest.mark.parametrize("kernel", ["se", "matern", "compositional"])
def test_the_knowledge_gradient_is_never_negative(kernel):
    found, seen = model(4, 12, kernel)
    x = torch.cat([points(4, 60), torch.eye(4, dtype=torch.float64), seen])
    assert values(KnowledgeGradient(found.model, observed=seen, posterior_transform=NEGATED), x).min() > -1e-5


def test_where_nothing_would_be_learnt_the_best_predicted_point_is_worth_most():
    """A straight line, seen at both ends without noise: every gain is 0 but for rounding."""
    s = space(2, 100)
    told = [Told(ratio=Ratio(counts=(100 - c, c)), loss=c / 100, sem=1e-3) for c in range(0, 101, 5)]
    proposal = Proposer(s, SearchConfig(acquisition="kg", kernel="se"), 0).propose(100, told, [])
    assert proposal.ratio.counts[1] <= 2


def test_knowledge_is_worth_more_where_noise_is_smaller():
    found, seen = model()
    acquisition = KnowledgeGradient(found.model, observed=seen, posterior_transform=NEGATED)
    x, by_noise = points(3, 10), []
    for noise in (0.0, 0.1, 1.0, 10.0):
        acquisition.noise = noise
        by_noise.append(values(acquisition, x))
    assert np.all(np.diff(by_noise, axis=0) <= 1e-9)
    assert by_noise[0].max() > 2 * by_noise[-1].max()


# Pending -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sem", [None, 0.1])
def test_a_pending_point_keeps_its_mean_and_loses_its_uncertainty(sem):
    found, _ = model(sem=sem)
    x, pending = points(3), points(3)[2:4]
    mu, covariance = moments(found, torch.cat([x, pending]))
    noise = float(training_covariance(found.model)[1].mean())
    gain = covariance[:, len(x) :] @ np.linalg.inv(covariance[len(x) :, len(x) :] + noise * np.eye(2))
    left = covariance - gain @ covariance[len(x) :]
    with torch.no_grad():
        posterior = believing(found.model, pending).posterior(x)
    assert posterior.mean.reshape(-1).numpy() == pytest.approx(mu[: len(x)], abs=1e-4)
    assert posterior.variance.reshape(-1).numpy() == pytest.approx(np.diag(left)[: len(x)], abs=1e-4)
    assert believing(found.model, None) is found.model


@pytest.mark.parametrize("kind", [ExpectedImprovement, KnowledgeGradient])
def test_where_a_trial_is_pending_another_is_worth_less(kind):
    found, seen = model()
    x = points(3)
    alone = values(kind(found.model, observed=seen, posterior_transform=NEGATED), x)
    best = int(np.argmax(alone))
    beside = values(kind(found.model, observed=seen, posterior_transform=NEGATED, pending=x[best : best + 1]), x)
    assert beside[best] < alone[best]


# Thompson ------------------------------------------------------------------------------------------------------------


def test_draws_are_joint_draws_from_the_posterior():
    """How often each of six points is the best of a draw, against joint normals; 1500 draws, 4 standard errors."""
    found, _ = model(2, 4, sem=0.5)
    x = torch.tensor(np.c_[np.arange(6), 5 - np.arange(6)] / 5)
    acquisition = ThompsonDraw(found.model, posterior_transform=NEGATED)
    n = 1500
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = np.bincount([int(acquisition.draw(x).argmax()) for _ in range(n)], minlength=6) / n
    mu, covariance = moments(found, x)
    random = np.random.default_rng(0).multivariate_normal(mu, covariance, 200_000, check_valid="ignore")
    expected = np.bincount(random.argmin(axis=1), minlength=6) / len(random)
    assert expected.max() < 0.95, "a sure thing tests nothing"
    assert np.all(np.abs(drawn - expected) < 4 * np.sqrt(expected * (1 - expected) / n) + 5e-3)


def test_thompson_proposals_follow_their_seed():
    s = space(3, 40)
    told = observed(s, 6)
    proposer = Proposer(s, SearchConfig(acquisition="thompson", kernel="se"), 0)
    first = [proposer.propose(trial, told, []).ratio for trial in range(100, 106)]
    assert [proposer.propose(trial, told, []).ratio for trial in range(100, 106)] == first
    assert len(set(first)) > 2
    other = Proposer(s, SearchConfig(acquisition="thompson", kernel="se"), 1)
    assert [other.propose(trial, told, []).ratio for trial in range(100, 106)] != first


@pytest.mark.parametrize("acquisition", ["ei", "kg", "thompson"])
def test_the_sign_lower_is_better(acquisition):
    s = space(2, 100)
    told = [Told(ratio=Ratio(counts=(100 - c, c)), loss=c / 100, sem=0.001) for c in (0, 20, 40, 60, 80, 100)]
    mirrored = [Told(ratio=t.ratio, loss=-t.loss, sem=0.001) for t in told]
    proposer = Proposer(s, SearchConfig(acquisition=acquisition, kernel="se"), 0)
    assert proposer.propose(100, told, []).ratio.counts[1] < 20
    assert proposer.propose(100, mirrored, []).ratio.counts[1] > 80


@pytest.mark.parametrize("acquisition", ["ei", "kg", "thompson"])
def test_the_best_ratio_is_found(acquisition):
    """6 + 9 trials on a quadratic: within the noise of its best, well below the uniform ratio's 0.14."""
    s, best = space(3, 1000), np.array([0.6, 0.3, 0.1])
    toy, exact = quadratic_toy(best, 0.01, seed=2), quadratic_toy(best)
    proposer, told = Proposer(s, SearchConfig(acquisition=acquisition, n_start=6, kernel="se"), 2), []
    for trial in range(15):
        ratio = proposer.propose(trial, told, [Point(ratio=Ratio(counts=(0, 0, 1000)))]).ratio
        told.append(Told(ratio=ratio, loss=toy(ratio, trial)))
    assert min(exact(one.ratio, 0) for one in told) < 0.02
