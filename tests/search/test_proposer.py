"""Proposals: against closed forms, on toys with a known best ratio, and on everything that can go wrong."""

import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from duet_ray.config import SearchConfig
from duet_ray.errors import FeedbackError, RatioError
from duet_ray.records import Point, Ratio
from duet_ray.search import Proposer, SimplexSpace, Told, start_design
from duet_ray.search.fitted import fitted as search_fitted
from tests.toys import Toy, quadratic_toy

PAPERS = {"acquisition": "lcb", "beta": 0.5, "kernel": "se"}
"""The paper's search, which closed forms are written for."""
PAPER = SearchConfig(**PAPERS)


def space(n: int, n_rows: int, lower: Sequence[int] | None = None, upper: Sequence[int] | None = None) -> SimplexSpace:
    return SimplexSpace(
        names=tuple(f"domain {i} (β-1)" for i in range(n)),  # not names that sympy could parse
        n_rows=n_rows,
        lower=tuple(lower or [0] * n),
        upper=tuple(upper or [n_rows] * n),
    )


def told_by(toy: Toy, ratios: Sequence[Ratio], sem: float | None = None) -> list[Told]:
    return [Told(ratio=ratio, loss=toy(ratio, trial), sem=sem) for trial, ratio in enumerate(ratios)]


def propose(
    s: SimplexSpace, told: Sequence[Told], pending: Sequence[Ratio] = (), *, trial: int = 100, seed: int = 0, **settings
):
    points = [Point(ratio=ratio) for ratio in pending]
    return Proposer(s, SearchConfig(**{**PAPERS, **settings}), seed).propose(trial, told, points)


def run(s: SimplexSpace, toy: Toy, n_trials: int, seed: int, **settings) -> list[Told]:
    """A whole sequential study."""
    proposer, told = Proposer(s, SearchConfig(**{**PAPERS, **settings}), seed), []
    for trial in range(n_trials):
        ratio = proposer.propose(trial, told, []).ratio
        told.append(Told(ratio=ratio, loss=toy(ratio, trial)))
    return told


# Against closed forms ------------------------------------------------------------------------------------------------


def closed_form(
    at: np.ndarray, x: np.ndarray, z: np.ndarray, noise: np.ndarray, scale: float, mean: float
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and standard deviation of a Gaussian process (DUET, Eq. 1, with a constant mean)."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-np.square(a[:, None] - b[None]).sum(axis=-1) / (2 * scale**2))

    solved = np.linalg.solve(kernel(x, x) + np.diag(noise), np.c_[z - mean, kernel(x, at)])
    mu = mean + kernel(at, x) @ solved[:, 0]
    variance = 1 - np.einsum("ij,ji->i", kernel(at, x), solved[:, 1:])
    return mu, np.sqrt(np.maximum(variance, 0))


def fitted(s: SimplexSpace, told: Sequence[Told], infer_noise: bool, pending: Sequence[Ratio] = ()):
    """The fitted model's length-scale, noise variance and mean, on standardised losses."""
    found = search_fitted(Proposer(s, PAPER, 0), told)
    ordered, scale, model = found.told, found.scale, found.model
    x, z = np.stack([one.ratio.values for one in ordered]), scale.standardise([one.loss for one in ordered])
    noise = model.likelihood.noise.detach().double().numpy() * np.ones(len(z))
    return x, z, noise, model.covar_module.lengthscale.item(), model.mean_module.constant.item(), scale


@pytest.mark.parametrize("beta", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("infer_noise", [False, True])
@pytest.mark.parametrize("n_pending", [0, 2])
def test_lcb_is_the_closed_form(beta, infer_noise, n_pending):
    """The proposal minimises μ − β σ over the whole lattice: right sign, β and not √β, σ shrunk by pending ratios."""
    s = space(3, 24)
    design = start_design(s, 9, 5, True)
    toy = quadratic_toy(np.array([0.5, 0.3, 0.2]), noise=0.05, seed=1)
    told = told_by(toy, design[:7], None if infer_noise else 0.05)
    pending = design[7 : 7 + n_pending]
    proposal = propose(s, told, pending, beta=beta)

    x, z, noise, length_scale, mean, scale = fitted(s, told, infer_noise)
    rows = s.all_rows()
    mu, sigma = closed_form(rows / s.n_rows, x, z, noise, length_scale, mean)
    believed = sigma
    if pending:  # seen exactly as predicted: μ stays, σ is that of the longer data set
        places = np.stack([r.values for r in pending])
        _, believed = closed_form(
            rows / s.n_rows,
            np.vstack([x, places]),
            np.r_[z, closed_form(places, x, z, noise, length_scale, mean)[0]],
            np.r_[noise, np.full(len(pending), noise.mean())],
            length_scale,
            mean,
        )
    lcb = mu - beta * believed
    if infer_noise:  # no repeats
        used = {r.counts for r in [*(t.ratio for t in told), *pending]}
        lcb[[tuple(row) in used for row in rows.tolist()]] = np.inf
    chosen = [tuple(row) for row in rows.tolist()].index(proposal.ratio.counts)
    assert lcb[chosen] == pytest.approx(lcb.min(), abs=1e-4)
    assert proposal.expected == pytest.approx(scale.mean + scale.spread * mu[chosen], abs=1e-4)
    assert proposal.sigma == pytest.approx(scale.spread * sigma[chosen], abs=1e-4)


def test_the_sign_lower_is_better():
    s = space(2, 100)
    told = [Told(ratio=Ratio(counts=(100 - c, c)), loss=c / 100) for c in (0, 20, 40, 60, 80, 100)]
    assert propose(s, told, beta=0.0).ratio.counts[1] < 10
    mirrored = [Told(ratio=t.ratio, loss=-t.loss) for t in told]
    assert propose(s, mirrored, beta=0.0).ratio.counts[1] > 90


def test_hyperparameters_are_the_maximum_of_the_likelihood():
    """Against a fine grid over length-scale and noise, with the mean profiled out."""
    s = space(3, 1000)
    told = told_by(quadratic_toy(np.array([0.6, 0.2, 0.2]), 0.02, 3), start_design(s, 25, 2, True))
    x, z, noise, length_scale, _, _ = fitted(s, told, infer_noise=True)

    def likelihood(scale: float, variance: float) -> float:
        covariance = np.exp(-np.square(x[:, None] - x[None]).sum(-1) / (2 * scale**2)) + variance * np.eye(len(z))
        ones = np.ones(len(z))
        solved = np.linalg.solve(covariance, np.c_[z, ones])
        mean = ones @ solved[:, 0] / (ones @ solved[:, 1])
        return float(-0.5 * ((z - mean) @ np.linalg.solve(covariance, z - mean) + np.linalg.slogdet(covariance)[1]))

    grid = [likelihood(a, b) for a in np.geomspace(0.05, 5, 60) for b in np.geomspace(1e-4, 1, 40)]
    assert likelihood(length_scale, float(noise[0])) > max(grid) - 0.01


def test_the_gradient_search_finds_what_a_listing_finds(monkeypatch):
    """On a lattice that can be listed, the same proposal with the list switched off, up to its value."""
    s = space(4, 20)
    told = told_by(quadratic_toy(np.array([0.7, 0.3, 0.0, 0.0])), start_design(s, 14, 0, True))
    listed = propose(s, told)
    monkeypatch.setattr(SimplexSpace, "all_rows", lambda self, limit=0: None)
    searched = propose(s, told)
    assert searched.expected - 0.5 * searched.sigma == pytest.approx(listed.expected - 0.5 * listed.sigma, abs=1e-9)


# Toys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [(0.6, 0.3, 0.1), (0.0, 0.25, 0.75), (0.0, 0.0, 1.0)])
def test_the_best_ratio_is_found_and_random_search_is_beaten(best):
    """Inside, on an edge and at a vertex; 8 + 8 trials against 16 random ones, over 3 seeds."""
    s, budget = space(3, 1000), 16
    regret = {"search": [], "random": []}
    for seed in range(3):
        toy = quadratic_toy(np.array(best), noise=0.01, seed=seed)
        exact = quadratic_toy(np.array(best))
        told = run(s, toy, budget, seed, n_start=8)
        drawn = start_design(s, budget, seed, False)
        regret["search"].append(min(exact(t.ratio, 0) for t in told))
        regret["random"].append(min(exact(ratio, 0) for ratio in drawn))
    assert max(regret["search"]) < 0.005
    assert np.mean(regret["search"]) < 0.5 * np.mean(regret["random"])


def test_zeros_are_exact():
    s = space(4, 1000)
    told = told_by(quadratic_toy(np.array([0.8, 0.2, 0.0, 0.0])), start_design(s, 25, 0, True))
    assert propose(s, told).ratio.counts[2:] == (0, 0)


# Determinism ---------------------------------------------------------------------------------------------------------

SCRIPT = """
from duet_ray.config import SearchConfig
from duet_ray.records import Point
from duet_ray.search import Proposer, SimplexSpace, Told, start_design
import numpy as np
s = SimplexSpace(names=tuple("abcde"), n_rows=5000, lower=(0,) * 5, upper=(5000,) * 5)
design = start_design(s, 12, 3, False)
told = [Told(ratio=r, loss=float(np.square(r.values - 0.2).sum())) for r in design[:10]]
p = Proposer(s, SearchConfig(), 3).propose(20, told, [Point(ratio=r) for r in design[10:]])
print(p.ratio.counts, p.expected, p.sigma)
"""


def test_a_fresh_process_proposes_the_same(capsys):
    exec(compile(SCRIPT, "here", "exec"), {})
    here = capsys.readouterr().out
    there = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=200)
    assert there.stdout == here != ""
    assert "INFO" not in there.stderr, "the bookkeeping of Ax stays off the terminal"


@pytest.mark.parametrize("acquisition", ["lcb", "qlognei"])
def test_the_same_call_twice_gives_the_same(acquisition):
    s = space(4, 3000)
    design = start_design(s, 10, 0, False)
    told = told_by(quadratic_toy(np.full(4, 0.25), 0.1), design[:8])
    first = propose(s, told, design[8:], acquisition=acquisition)
    torch.rand(7)  # somebody else's use of the global generator
    np.random.rand(7)  # noqa: NPY002
    second = propose(s, told, design[8:], acquisition=acquisition)
    assert (first.ratio, first.expected, first.sigma) == (second.ratio, second.expected, second.sigma)
    assert first.method == f"bayesian:{acquisition}"


def test_global_state_is_left_alone():
    s = space(3, 100)
    told = told_by(quadratic_toy(np.full(3, 1 / 3)), start_design(s, 5, 0, False))
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = torch.rand(1), np.random.rand()  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    propose(s, told)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert (torch.rand(1), np.random.rand()) == expected  # noqa: NPY002
    assert torch.get_default_dtype() == torch.float32


def test_the_order_of_telling_does_not_matter():
    s = space(5, 3000)
    design = start_design(s, 14, 0, False)
    told = told_by(quadratic_toy(np.full(5, 0.2), 0.1), design[:11])
    one, other = propose(s, told, design[11:]), propose(s, told[::-1], design[11:][::-1])
    assert (one.ratio, one.expected, one.sigma) == (other.ratio, other.expected, other.sigma)


def test_resumed_equals_uninterrupted():
    s, settings = space(3, 500), {"n_start": 5, "vertices": True}
    toy = quadratic_toy(np.array([0.1, 0.2, 0.7]), 0.05, 4)
    whole = run(s, toy, 9, 0, **settings)
    for stopped in (3, 7):
        resumed = list(whole[:stopped])
        proposer = Proposer(s, SearchConfig(**PAPERS, **settings), 0)
        for trial in range(stopped, 9):
            ratio = proposer.propose(trial, resumed, []).ratio
            resumed.append(Told(ratio=ratio, loss=toy(ratio, trial)))
        assert resumed == whole


def test_no_domain_is_special():
    """The same study with its domains in another order: the acquisition's optimum is the same."""
    s, order = space(5, 10_000), np.array([3, 0, 4, 2, 1])
    told = told_by(quadratic_toy(np.array([0.5, 0.1, 0.0, 0.3, 0.1]), 0.01), start_design(s, 15, 0, True))
    permuted = [Told(ratio=Ratio(counts=tuple(np.array(t.ratio.counts)[order].tolist())), loss=t.loss) for t in told]
    one, other = propose(s, told), propose(s, permuted)
    assert other.expected - 0.5 * other.sigma == pytest.approx(one.expected - 0.5 * one.sigma, abs=1e-4)
    assert other.ratio.values == pytest.approx(one.ratio.values[order], abs=0.01)


# Pending, bounds, repeats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("acquisition", ["lcb", "qlognei"])
def test_pending_ratios_change_the_proposal(acquisition):
    s = space(3, 1000)
    told = told_by(quadratic_toy(np.array([0.2, 0.3, 0.5]), 0.1), start_design(s, 6, 0, True))
    pending: list[Ratio] = []
    for _ in range(4):
        ratio = propose(s, told, pending, acquisition=acquisition, beta=2.0).ratio
        assert ratio not in pending
        pending.append(ratio)


def test_many_pending_ratios_do_not_drive_the_search_away():
    """With four good ratios pending the fifth is good too (BoTorch's qUCB proposed one 17 σ worse here)."""
    s = space(3, 10_000)
    random = np.random.default_rng(1)
    best = random.dirichlet(np.ones(3))
    told = [
        Told(ratio=r, loss=float(np.square(r.values - best).sum() + random.normal(0, 0.01)))
        for r in start_design(s, 10, 0, True)
    ]
    pending: list[Ratio] = []
    for k in range(5):
        proposal = propose(s, told, pending, trial=100 + k)
        assert np.square(proposal.ratio.values - best).sum() < 0.02
        pending.append(proposal.ratio)


def test_bounds_hold():
    lower, upper = [0, 100, 200, 50], [300, 100, 900, 400]
    s = space(4, 1000, lower, upper)
    toy = quadratic_toy(np.array([0.9, 0.1, 0.0, 0.0]))
    told = run(s, toy, 14, 0, n_start=6, vertices=True)
    assert all(s.contains(t.ratio) for t in told)
    # By hand: 0.9 is out of reach, so 0.3; 0.1 is fixed; the other 0.6 goes half and half but for the cap of 0.4.
    assert told[-1].ratio.values == pytest.approx([0.3, 0.1, 0.3, 0.3], abs=0.05)


def test_repeats_only_where_nothing_is_left():
    s = space(2, 3)
    toy = quadratic_toy(np.array([1.0, 0.0]))
    everything = start_design(s, 4, 0, True)
    for left in range(4):
        told = told_by(toy, [r for i, r in enumerate(everything) if i != left])
        assert propose(s, told).ratio == everything[left]
    assert propose(s, told_by(toy, everything)).ratio.counts == (3, 0), "all used: the best again"


def test_repeats_are_free_where_the_noise_is_known():
    s = space(2, 3)
    told = told_by(quadratic_toy(np.array([1.0, 0.0])), start_design(s, 3, 0, True), sem=0.01)
    assert propose(s, told, beta=0.0).ratio.counts == (3, 0)


def test_a_missing_standard_error_means_inferred_noise():
    s = space(3, 100)
    told = told_by(quadratic_toy(np.full(3, 1 / 3), 0.1), start_design(s, 8, 0, False), sem=0.1)
    mixed = [*told[:-1], Told(ratio=told[-1].ratio, loss=told[-1].loss)]
    without = [Told(ratio=t.ratio, loss=t.loss) for t in told]
    assert propose(s, mixed).sigma == propose(s, without).sigma != propose(s, told).sigma


# What can go wrong ---------------------------------------------------------------------------------------------------


def test_the_start_design_comes_first_whatever_is_told():
    s = space(4, 100)
    design = start_design(s, 6, 7, True)
    told = told_by(quadratic_toy(np.full(4, 0.25)), design[:4])
    proposals = [propose(s, told, trial=t, seed=7, n_start=6, vertices=True) for t in range(6)]
    assert [p.ratio for p in proposals] == design
    assert [p.method for p in proposals] == ["uniform", "vertex", "vertex", "vertex", "vertex", "random"]
    assert propose(s, told, trial=6, seed=7, n_start=6).method == "bayesian:lcb"


def test_nothing_told_at_all_goes_on_with_the_start_design():
    s = space(4, 100)
    proposal = propose(s, [], trial=9, seed=7, n_start=6)
    assert (proposal.ratio, proposal.method) == (start_design(s, 10, 7, False)[9], "random")
    assert proposal.expected is None
    assert proposal.sigma is None


@pytest.mark.parametrize("acquisition", ["lcb", "qlognei"])
@pytest.mark.parametrize(
    ("s", "losses"),
    [
        (space(1, 10), [1.0]),
        (space(3, 30, [10, 10, 10], [10, 10, 10]), [1.0, 2.0]),
        (space(3, 30, [0, 10, 0], [20, 10, 20]), [1.0, 2.0, 1.5]),
        (space(2, 1000), [1.0]),
        (space(4, 1000), [3.0] * 6),
        (space(4, 1000), [0.0] * 3),
        (space(6, 3), [1.0, 2.0, 1.5, 3.0]),
        (space(50, 10_000), list(range(20))),
        (space(3, 1), [1.0, 2.0]),
    ],
    ids=["one domain", "all fixed", "one fixed", "one told", "constant", "zero", "few rows", "50 domains", "one row"],
)
def test_edge_cases(acquisition, s, losses):
    told = [
        Told(ratio=r, loss=float(loss)) for r, loss in zip(start_design(s, len(losses), 0, True), losses, strict=True)
    ]
    proposal = propose(s, told, acquisition=acquisition)
    assert s.contains(proposal.ratio)
    assert proposal.expected is None or np.isfinite(proposal.expected)


def test_repeats_in_what_is_told():
    s = space(3, 1000)
    design = start_design(s, 5, 0, True)
    told = told_by(quadratic_toy(np.full(3, 1 / 3), 0.1), [*design, *design, *design])
    assert s.contains(propose(s, told, [design[0], design[0]]).ratio)


@pytest.mark.parametrize("scale", [2.0**-500, 2.0**-60, 2.0**60, 2.0**500])
def test_the_unit_of_the_loss_does_not_matter(scale):
    s = space(3, 200)
    told = told_by(quadratic_toy(np.array([0.5, 0.5, 0.0]), 0.1), start_design(s, 8, 0, False))
    plain = propose(s, told)
    scaled = propose(s, [Told(ratio=t.ratio, loss=t.loss * scale) for t in told])
    assert scaled.ratio == plain.ratio
    assert scaled.expected == pytest.approx(plain.expected * scale, rel=1e-6)


@pytest.mark.parametrize(("loss", "sem"), [(np.nan, None), (np.inf, None), (1.0, np.nan), (1.0, -0.1)])
def test_only_numbers_are_told(loss, sem):
    s = space(2, 10)
    with pytest.raises(FeedbackError, match=r"only finite losses|standard error must be finite and >= 0"):
        propose(s, [Told(ratio=s.uniform(), loss=loss, sem=sem)], trial=0)


def test_a_ratio_from_elsewhere_is_refused():
    s = space(2, 10, upper=[6, 10])
    with pytest.raises(RatioError, match=r"\(7, 3\) \(rows per domain\) lies outside the space of this study: 10 rows"):
        propose(s, [Told(ratio=Ratio(counts=(7, 3)), loss=1.0)])
    with pytest.raises(RatioError, match="lies outside the space"):
        propose(s, [], [Ratio(counts=(50, 50))])
