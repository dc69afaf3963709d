"""What holds for every acquisition and kernel: whole rows on the simplex, no order, no process, no odd loss matters."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duet_ray.config import AlsoConfig, FidelityConfig, SearchConfig
from duet_ray.errors import FeedbackError
from duet_ray.linear import parse_constraints
from duet_ray.records import Point, Ratio
from duet_ray.search import Proposer, SimplexSpace, Told, start_design
from duet_ray.search.kernels import KERNELS
from duet_ray.search.recommend import recommend
from tests.toys import quadratic_toy

ACQUISITIONS = ("lcb", "ei", "kg", "thompson", "qlognei")
EVERY_KERNEL = (*KERNELS, "auto")


def space(n: int, n_rows: int, upper: int | None = None, constraints: tuple[str, ...] = ()) -> SimplexSpace:
    names = tuple(f"d{i}" for i in range(n))
    return SimplexSpace(
        names=names,
        n_rows=n_rows,
        lower=(0,) * n,
        upper=(upper or n_rows,) * n,
        constraints=parse_constraints(list(constraints), names),
    )


def told(s: SimplexSpace, n: int) -> list[Told]:
    """The last has zeros wherever the space lets it."""
    toy = quadratic_toy(np.full(s.n_domains, 1 / s.n_domains), 0.05)
    ratios = [*start_design(s, n - 1, 0, False), s.project(np.eye(s.n_domains)[0])]
    return [Told(ratio=r, loss=toy(r, i)) for i, r in enumerate(ratios)]


def propose(s: SimplexSpace, data: list[Told], pending: tuple[Ratio, ...] = (), **asked):
    return Proposer(s, SearchConfig(**asked), 0).propose(100, data, [Point(ratio=r) for r in pending])


# On the simplex ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("acquisition", ACQUISITIONS)
@pytest.mark.parametrize("kernel", EVERY_KERNEL)
def test_proposals_are_on_the_simplex_and_no_order_matters(acquisition, kernel):
    s = space(3, 20, upper=15, constraints=("d0 + d1 >= 0.3",))
    data = told(s, 6)
    pending = tuple(start_design(s, 8, 3, False)[6:])
    one = propose(s, data, pending, acquisition=acquisition, kernel=kernel)
    other = propose(s, data[::-1], pending[::-1], acquisition=acquisition, kernel=kernel)
    assert (one.ratio, one.expected, one.sigma) == (other.ratio, other.expected, other.sigma)
    assert sum(one.ratio.counts) == 20
    assert max(one.ratio.counts) <= 15
    assert sum(one.ratio.counts[:2]) >= 6
    assert one.ratio not in {*pending, *(t.ratio for t in data)}
    assert np.isfinite([one.expected, one.sigma]).all()


@pytest.mark.parametrize("n", [1, 2, 3, 9, 30, 50])
@pytest.mark.parametrize("acquisition", ["lcb", "kg", "thompson"])
def test_from_one_domain_to_fifty(n, acquisition):
    s = space(n, 1000, upper=700 if n > 1 else None)
    kernel = "se" if acquisition == "lcb" else "compositional"
    proposal = propose(s, told(s, 5), acquisition=acquisition, kernel=kernel)
    assert s.contains(proposal.ratio)
    assert proposal.ratio.n_rows == 1000


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    n=st.integers(1, 5),
    n_rows=st.integers(1, 12),
    n_told=st.integers(1, 5),
    acquisition=st.sampled_from(ACQUISITIONS[:-1]),
    kernel=st.sampled_from(tuple(KERNELS)),
    losses=st.lists(st.sampled_from([0.0, 1.0, -1.0, 1e300, -1e300, 1e-300, 3.5]), min_size=5, max_size=5),
    sem=st.sampled_from([None, 0.0, 1e-12, 0.5, 1e6]),
    seed=st.integers(0, 9),
)
def test_whatever_is_told_a_ratio_comes_back(n, n_rows, n_told, acquisition, kernel, losses, sem, seed):
    s = space(n, n_rows)
    ratios = start_design(s, n_told, seed, True)
    data = [Told(ratio=r, loss=loss, sem=sem) for r, loss in zip(ratios, losses, strict=False)]
    assert s.contains(propose(s, data, acquisition=acquisition, kernel=kernel).ratio)


@pytest.mark.parametrize("acquisition", ACQUISITIONS)
@pytest.mark.parametrize(
    "losses", [[2.5] * 6, [7.0], [1e300, -1e300, 3e299, 0, 5e299, 1e299], [1e-300 * i for i in range(6)]]
)
def test_constant_single_huge_and_tiny_losses(acquisition, losses):
    s = space(3, 15)
    data = [Told(ratio=r, loss=loss) for r, loss in zip(start_design(s, 6, 0, True), losses, strict=False)]
    proposal = propose(s, data, acquisition=acquisition, kernel="se")
    assert s.contains(proposal.ratio)
    assert np.isfinite(proposal.expected)
    assert np.isfinite(proposal.sigma)
    assert recommend(Proposer(s, SearchConfig(kernel="se"), 0), data) in data


@pytest.mark.parametrize("acquisition", ACQUISITIONS)
@pytest.mark.parametrize("loss", [np.inf, -np.inf, np.nan])
def test_infinite_losses_are_refused(acquisition, loss):
    s = space(3, 15)
    data = [*told(s, 4), Told(ratio=s.uniform(), loss=loss)]
    with pytest.raises(FeedbackError, match=f"only finite losses can be told to the search, got {loss}"):
        propose(s, data, acquisition=acquisition)


# In another process --------------------------------------------------------------------------------------------------

SCRIPT = """
from duet_ray.config import SearchConfig
from duet_ray.search import Proposer, SimplexSpace, Told, start_design
from duet_ray.search.kernels import KERNELS
import numpy as np
s = SimplexSpace(names=tuple("abc"), n_rows=20, lower=(0,) * 3, upper=(20,) * 3)
large = SimplexSpace(names=tuple("abcd"), n_rows=5000, lower=(0,) * 4, upper=(5000,) * 4)
def said(space, **asked):
    told = [Told(ratio=r, loss=float(np.square(r.values - 0.2).sum())) for r in start_design(space, 6, 3, False)]
    p = Proposer(space, SearchConfig(**asked), 3).propose(20, told, [])
    print(asked, p.ratio.counts, repr(p.expected), repr(p.sigma))
for acquisition in ("lcb", "ei", "kg", "thompson", "qlognei"):
    for kernel in (*KERNELS, "auto"):
        said(s, acquisition=acquisition, kernel=kernel)
for acquisition in ("ei", "kg", "thompson"):
    said(large, acquisition=acquisition, kernel="compositional")
"""


def test_a_fresh_process_proposes_the_same(capsys):
    exec(compile(SCRIPT, "here", "exec"), {})
    here = capsys.readouterr().out
    there = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=300)
    assert there.stdout == here
    assert here.count("\n") == 5 * len(EVERY_KERNEL) + 3


# With settings -------------------------------------------------------------------------------------------------------

ALSO = {
    "training.rank": AlsoConfig(choices=[8, 32, 128]),
    "training.learning_rate": AlsoConfig(log=(1e-5, 1e-3)),
}
OWN = (("training.rank", 8), ("training.learning_rate", 1e-4))


def with_settings(optimize: str, **asked) -> Proposer:
    also = asked.pop("also", ALSO)
    own = tuple(pair for pair in OWN if pair[0] in also)
    found = SearchConfig(**{"kernel": "se", "n_start": 6, "also": also, "optimize": optimize, **asked})
    return Proposer(space(3, 100), found, 0, own=own)


def loss(point: Point) -> float:
    """Least at (0.5, 0.4, 0.1), rank 32 and a rate of 2e-4."""
    asked = dict(point.settings)
    rank = {8: 0.2, 32: 0.0, 128: 0.3}[asked["training.rank"]]
    off = np.log10(asked.get("training.learning_rate", 2e-4) / 2e-4)
    return float(np.square(point.ratio.values - [0.5, 0.4, 0.1]).sum()) + rank + 0.3 * off**2


def run(proposer: Proposer, n: int, cheap: float = 0.0) -> list[Told]:
    data: list[Told] = []
    for trial in range(n):
        p = proposer.propose(trial, data, [])
        point = Point(ratio=p.ratio, settings=p.settings, fidelity=p.fidelity)
        data.append(
            Told(ratio=p.ratio, settings=p.settings, fidelity=p.fidelity, loss=loss(point) + cheap * (p.fidelity < 1))
        )
    return data


@pytest.mark.parametrize("acquisition", ["ei", "thompson"])
@pytest.mark.parametrize("optimize", ["both", "model"])
def test_settings_are_allowed_ones_and_the_best_are_found(acquisition, optimize):
    proposer = with_settings(optimize, acquisition=acquisition)
    data = run(proposer, 18)
    for one in data:
        asked = dict(one.settings)
        assert list(asked) == list(ALSO)
        assert asked["training.rank"] in (8, 32, 128)
        assert 1e-5 <= asked["training.learning_rate"] <= 1e-3
        assert asked["training.learning_rate"] == float(f"{asked['training.learning_rate']:.6g}")
    assert data[0].point == proposer.reference
    if optimize == "model":
        assert {one.ratio for one in data} == {proposer.space.uniform()}
    assert len({one.point for one in data}) == len(data)
    chosen = dict(recommend(proposer, data).settings)
    assert chosen["training.rank"] == 32
    assert 5e-5 < chosen["training.learning_rate"] < 8e-4


def test_settings_that_can_be_listed_are_all_tried_at_the_best_ratio():
    proposer = with_settings("both", also={"training.rank": ALSO["training.rank"]}, acquisition="ei")
    best = recommend(proposer, run(proposer, 16))
    assert dict(best.settings) == {"training.rank": 32}
    assert np.abs(best.ratio.values - [0.5, 0.4, 0.1]).max() < 0.2


@pytest.mark.parametrize("optimize", ["both", "model"])
@pytest.mark.parametrize("acquisition", ["lcb", "kg", "thompson"])
def test_one_domain_leaves_the_settings(optimize, acquisition):
    asked = SearchConfig(kernel="se", also=ALSO, optimize=optimize, acquisition=acquisition, n_start=3)
    proposer = Proposer(space(1, 10), asked, 0, own=OWN)
    data = []
    for trial in range(5):
        p = proposer.propose(trial, data, [])
        data.append(Told(ratio=p.ratio, settings=p.settings, loss=float(trial)))
    assert {one.ratio.counts for one in data} == {(10,)}
    assert len({one.settings for one in data}) == 5


@pytest.mark.parametrize("domains", [1, 3])
def test_with_one_ratio_the_start_design_repeats_no_settings(domains):
    also = {
        "training.rank": AlsoConfig(choices=[8, 16, 32]),
        "training.schedule": AlsoConfig(choices=["cosine", "linear"]),
    }
    asked = SearchConfig(also=also, optimize="model", n_start=8)
    own = (("training.rank", 16), ("training.schedule", "linear"))
    proposer = Proposer(space(domains, 12), asked, 0, own=own)
    tried = [proposer.propose(trial, [], []).settings for trial in range(8)]
    assert tried[0] == own
    assert len(set(tried[:6])) == 6, "all there are"
    assert set(tried[6:]) <= set(tried[:6])


# With fidelities -----------------------------------------------------------------------------------------------------


def test_cheap_trials_start_the_search_and_a_whole_one_is_recommended():
    """The start design has `n_start` whole trials' worth of rows: one whole, four of a quarter."""
    proposer = with_settings(
        "both", also={"training.rank": ALSO["training.rank"]}, fidelity=FidelityConfig(rows=[0.25]), n_start=2
    )
    data = run(proposer, 14, cheap=0.2)
    assert [one.fidelity for one in data[:5]] == [1.0, 0.25, 0.25, 0.25, 0.25]
    assert {one.fidelity for one in data} <= {0.25, 1.0}
    assert recommend(proposer, data).fidelity == 1


def test_a_point_seen_cheaply_may_be_trained_whole():
    """With few settings and one ratio, else the best would stay out of reach until all others were tried."""
    also = {"training.rank": AlsoConfig(choices=list(range(1, 41)))}
    asked = SearchConfig(
        kernel="se", also=also, optimize="model", fidelity=FidelityConfig(rows=[0.25]), beta=0.0, acquisition="lcb"
    )
    proposer = Proposer(space(2, 10), asked, 0, own=(("training.rank", 1),))
    ratio = proposer.space.uniform()

    def one(rank: int, fidelity: float) -> Told:
        return Told(ratio=ratio, settings=(("training.rank", rank),), fidelity=fidelity, loss=(rank - 20) ** 2 / 100)

    data = [one(1, 1.0), one(40, 1.0), one(10, 1.0), *(one(rank, 0.25) for rank in (1, 5, 10, 15, 20, 25, 30, 40))]
    proposal = proposer.propose(500, data, [])
    assert dict(proposal.settings)["training.rank"] in (19, 20, 21)
    assert Point(ratio=ratio, settings=proposal.settings, fidelity=proposal.fidelity) not in {o.point for o in data}
    pending = [replace(data[-4].point, fidelity=0.25)]
    assert proposer.propose(500, data, pending).settings != pending[0].settings


def test_a_point_that_only_a_cheaper_run_from_before_had_may_be_trained_whole():
    asked = SearchConfig(kernel="se", beta=0.0, fidelity=FidelityConfig(rows=[0.25]))
    proposer = Proposer(space(2, 10), asked, 0)

    def one(count: int, fidelity: float) -> Told:
        loss = (count - 6) ** 2 / 36 + 0.1 * (fidelity < 1)
        return Told(ratio=Ratio(counts=(count, 10 - count)), fidelity=fidelity, loss=loss)

    data = [*(one(count, 1.0) for count in (0, 5, 10)), *(one(count, 0.1) for count in (0, 2, 4, 5, 6, 8, 10))]
    assert proposer.propose(500, data, []).ratio.counts == (6, 4)


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("acquisition", ["qlognei", "kg"])
def test_it_does_not_matter_whether_cheap_trials_are_better_or_worse_throughout(acquisition, seed):
    """Whole trials are what is compared, also with what was looked at cheaply, or is being looked at."""
    random = np.random.default_rng(seed)
    whole, cheap = (random.choice(41, size, replace=False).tolist() for size in (5, 8))
    asked = SearchConfig(kernel="se", acquisition=acquisition, fidelity=FidelityConfig(rows=[0.25]))
    proposer = Proposer(space(2, 40), asked, 0)

    def one(count: int, fidelity: float, off: float) -> Told:
        loss = float(np.sin(count / 6 + seed)) + off
        return Told(ratio=Ratio(counts=(count, 40 - count)), fidelity=fidelity, loss=loss, sem=0.1)

    pending = [Point(ratio=Ratio(counts=(26, 14)), fidelity=0.25)]
    better, worse = (
        proposer.propose(100, [*(one(c, 1.0, 0) for c in whole), *(one(c, 0.25, off) for c in cheap)], pending).ratio
        for off in (-2, 2)
    )
    assert better == worse
