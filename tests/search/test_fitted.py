"""The fitted model: leave-one-out against refits, what a proposal says of itself, fidelities and sample counts."""

from dataclasses import replace

import numpy as np
import pytest

from duet_ray.config import AlsoConfig, FidelityConfig, SearchConfig
from duet_ray.records import Point, Ratio
from duet_ray.search import Proposer, SimplexSpace, Told, start_design
from duet_ray.search.fitted import best_fidelity, fitted, kernel_for
from duet_ray.search.kernels import AUTO, KERNELS
from duet_ray.search.model import LossScale, training_covariance
from tests.toys import quadratic_toy

SPACE = SimplexSpace(names=("a", "b", "c"), n_rows=100, lower=(0, 0, 0), upper=(100, 100, 100))


def proposer(**settings) -> Proposer:
    return Proposer(SPACE, SearchConfig(**{"kernel": "se", **settings}), 0)


def told(n: int, noise: float = 0.02, seed: int = 0) -> list[Told]:
    toy = quadratic_toy(np.array([0.5, 0.4, 0.1]), noise, seed)
    return [Told(ratio=r, loss=toy(r, i)) for i, r in enumerate(start_design(SPACE, n, seed, True))]


@pytest.mark.parametrize(
    ("losses", "mean", "spread"), [([1, 3], 2, 2**0.5), ([5], 5, 1), ([2, 2, 2], 2, 1), ([0, 0], 0, 1)]
)
def test_losses_are_standardised(losses, mean, spread):
    scale = LossScale.of(losses)
    assert (scale.mean, scale.spread) == pytest.approx((mean, spread))
    assert scale.standardise(losses) == pytest.approx((np.array(losses) - mean) / spread)


@pytest.mark.parametrize("sem", [None, 0.03, 1e-9])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_proposal_and_the_report_speak_of_one_model(kernel, sem):
    """What Ax fitted to propose, and what is fitted without it: the same mean and deviation at the proposal."""
    data = [replace(one, sem=sem) for one in told(8)]
    asked = proposer(kernel=kernel, acquisition="lcb")
    proposal = asked.propose(100, data, [])
    mean, sd = fitted(asked, data).predict(proposal.ratio.values)
    spread = LossScale.of([one.loss for one in data]).spread
    assert proposal.expected == pytest.approx(mean[0], abs=1e-3 * spread)
    assert proposal.sigma == pytest.approx(sd[0], abs=1e-3 * spread)


@pytest.mark.parametrize("sem", [None, 0.02])
def test_leave_one_out_is_that_of_models_without_the_one(sem):
    """The same hyperparameters, an observation left out, and the constant mean estimated anew: generalised least
    squares on the others, and its uncertainty (Rasmussen & Williams 2006, Sec. 2.7)."""
    model = fitted(proposer(), [replace(one, sem=sem) for one in told(7)])
    kernel, noise, _ = training_covariance(model.model)
    losses, covariance = np.array([one.loss for one in model.told]), kernel + np.diag(noise)
    mean, sd = model.leave_one_out()
    for i in range(len(losses)):
        rest = np.arange(len(losses)) != i
        solve = np.linalg.inv(covariance[np.ix_(rest, rest)])
        ones, across = np.ones(rest.sum()), kernel[i, rest]
        level = ones @ solve @ losses[rest] / (ones @ solve @ ones)
        left = 1 - across @ solve @ ones
        variance = covariance[i, i] - across @ solve @ across + left**2 / (ones @ solve @ ones)
        assert mean[i] == pytest.approx(level + across @ solve @ (losses[rest] - level), abs=1e-6)
        assert sd[i] == pytest.approx(model.scale.spread * np.sqrt(variance), abs=1e-6)


def test_predictions_are_those_of_the_joint_posterior():
    model = fitted(proposer(), told(9))
    shares = np.random.default_rng(0).dirichlet(np.ones(3), 6)
    mean, sd = model.predict(shares)
    joint, covariance = model.joint(shares)
    assert joint == pytest.approx(mean)
    assert np.diag(covariance) == pytest.approx(sd**2)
    assert model.predict(SPACE.uniform().values)[1] == pytest.approx(model.at([Point(ratio=SPACE.uniform())])[1])
    assert model.predict(shares[0])[0] == pytest.approx(mean[:1])


def test_auto_is_one_of_its_choices_and_does_not_depend_on_the_order():
    data = told(9)
    points, own = proposer().points, ()
    chosen = kernel_for("auto", points, proposer().footing(data).told, own)
    assert chosen in AUTO
    assert kernel_for("auto", points, proposer().footing(data[::-1]).told, own) == chosen
    assert kernel_for("auto", points, data[:2], own) == AUTO[0], "two observations choose nothing"
    assert kernel_for("matern", points, data, own) == "matern"
    assert fitted(proposer(kernel="auto"), data).kernel == chosen


# On one footing, once ------------------------------------------------------------------------------------------------


def uneven(n: int = 10) -> list[Told]:
    """Trials with one or three samples, which the model must not be told as they are."""
    random, found = np.random.default_rng(4), []
    for i, one in enumerate(told(n, noise=0.0)):
        samples = tuple((one.loss + random.exponential(0.3, 1 if i % 3 == 0 else 3)).tolist())
        found.append(replace(one, loss=min(samples), samples=samples, k_used=len(samples)))
    return found


def test_observations_are_put_on_one_footing_once(monkeypatch):
    """Twice would lower a trial with fewer samples twice: the fit that chooses k is the one that proposes."""
    import duet_ray.search.fitted as module

    fits: list[list[float]] = []
    plain = module._fit

    def spied(kernel, space, footing, own):
        fits.append([one.loss for one in footing])
        return plain(kernel, space, footing, own)

    monkeypatch.setattr(module, "_fit", spied)
    asked = replace(proposer(), k_bounds=(1, 6))
    data = uneven()
    proposal = asked.propose(100, data, [])
    assert 1 <= proposal.k <= 6
    assert fits == [[one.loss for one in asked.footing(data).told]]
    assert fits[0] != [one.loss for one in asked.footing(asked.footing(data).told).told], "else this tests nothing"
    assert asked.propose(100, data[::-1], []).k == proposal.k


def test_the_law_of_the_samples_decides_their_number(monkeypatch):
    """`noise: theory` told as standard errors must not hide the law from the choice of k."""
    import duet_ray.search.sample_size as module
    from duet_ray.search.noise import told_noise

    asked = replace(proposer(noise="theory"), k_bounds=(1, 6))
    random, laws = np.random.default_rng(1), []
    draws = -np.log1p(-random.random((24, 4)) * (1 - np.exp(-3))) / 3  # the law with λ = 3, c = 1
    data = [
        replace(one, loss=one.loss + min(mine), samples=tuple(one.loss + mine), k_used=len(mine))
        for i, (one, row) in enumerate(zip(told(24, noise=0.0), draws, strict=True))
        for mine in [row[: 2 + i % 3]]
    ]
    plain = module.noise_by_k
    monkeypatch.setattr(module, "noise_by_k", lambda told, law, sd: laws.append(law) or plain(told, law, sd))
    asked.propose(100, data, [])
    law = told_noise(data, "theory", seed=0).law
    assert law is not None
    assert laws == [law]


# Fidelities ----------------------------------------------------------------------------------------------------------


def cheap_and_whole(relation: str) -> list[Told]:
    """Ten ratios, each trained cheaply and whole; cheap losses are shifted ones, or have nothing to do with whole."""
    random, whole = np.random.default_rng(0), told(10, noise=0.005)
    losses = [one.loss + 0.3 for one in whole] if relation == "informative" else random.normal(0.5, 0.2, 10).tolist()
    return [*whole, *(replace(one, fidelity=0.1, loss=loss) for one, loss in zip(whole, losses, strict=True))]


def test_cheap_trials_are_taken_where_they_tell_and_whole_ones_where_they_do_not():
    asked = proposer(fidelity=FidelityConfig(rows=[0.1]))
    points = [Point(ratio=Ratio(counts=c)) for c in ((45, 45, 10), (70, 15, 15), (5, 90, 5))]
    informative, useless = cheap_and_whole("informative"), cheap_and_whole("useless")
    assert [best_fidelity(asked, p, informative, 0) for p in points] == [0.1] * 3
    assert [best_fidelity(asked, p, useless, 200) for p in points] == [1.0] * 3
    # Once looked at cheaply, the same cheap look is not taken again.
    seen = [*informative, Told(ratio=points[0].ratio, loss=0.4, fidelity=0.1)]
    assert best_fidelity(asked, points[0], seen, 0) == 1.0


def test_a_cheap_look_without_settings_was_one_at_the_studys_own():
    also = {"training.rank": AlsoConfig(choices=[8, 32])}
    settings = SearchConfig(kernel="se", optimize="both", also=also, fidelity=FidelityConfig(rows=[0.1]))
    asked = Proposer(SPACE, settings, 0, own=(("training.rank", 8),))
    data = cheap_and_whole("informative")
    mine = Point(ratio=data[3].ratio, settings=asked.own)
    assert best_fidelity(asked, mine, [one for one in data if one is not data[3]], 0) == 1.0


def test_a_cheap_look_is_corrected_by_what_it_is_off():
    """Cheap trials are 0.3 worse everywhere: a ratio seen only cheaply is predicted at its whole loss."""
    asked = proposer(fidelity=FidelityConfig(rows=[0.1]))
    data = [one for i, one in enumerate(cheap_and_whole("informative")) if i != 2]
    exact = quadratic_toy(np.array([0.5, 0.4, 0.1]))
    cheap_only = next(
        one for one in data if one.fidelity < 1 and one.ratio not in {w.ratio for w in data if w.fidelity == 1}
    )
    mean, _ = fitted(asked, data).at([Point(ratio=cheap_only.ratio)])
    assert mean[0] == pytest.approx(exact(cheap_only.ratio, 0), abs=0.1)
    assert abs(mean[0] - cheap_only.loss) > 0.2
