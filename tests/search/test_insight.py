"""What is read off a model: closed forms on a model that is written down, and the real one on odd studies."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pytest

from duet_ray.config import SearchConfig
from duet_ray.errors import FeedbackError
from duet_ray.linear import parse_constraints
from duet_ray.records import Direction, Point, Ratio
from duet_ray.search import Proposer, SimplexSpace, Told
from duet_ray.search.insight import Insight, Model, Rays, calibration, explain, insight

N_ROWS = 120


def space(
    n: int, lower: Sequence[int] = (), upper: Sequence[int] = (), constraints: Sequence[str] = ()
) -> SimplexSpace:
    names = tuple("abcdefghijkl"[:n])
    return SimplexSpace(
        names=names,
        n_rows=N_ROWS,
        lower=tuple(lower) or (0,) * n,
        upper=tuple(upper) or (N_ROWS,) * n,
        constraints=parse_constraints(constraints, names),
    )


def ratio(*counts: int) -> Ratio:
    return Ratio(counts=counts)


@dataclass
class Written:
    """A model that knows its function: no uncertainty at all."""

    function: Callable[[np.ndarray], np.ndarray]
    told: Sequence[Told] = ()
    kernel: str = "written"
    length_scales: dict[str, float] = field(default_factory=dict)
    noise_sd: float = 0.1

    def predict(self, shares, settings=()):
        return self.function(shares), np.zeros(len(shares))

    def joint(self, shares, settings=()):
        return self.function(shares), np.zeros((len(shares), len(shares)))

    def leave_one_out(self):
        raise AssertionError("not asked of it")


@dataclass
class Gaussian:
    """A Gaussian process with a squared exponential and mean 0, by the textbook."""

    told: Sequence[Told]
    scale: float = 0.5
    noise_sd: float = 0.3
    kernel: str = "se"
    length_scales: dict[str, float] = field(default_factory=lambda: {"a": 0.5})

    def _kernel(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-np.square(a[:, None] - b[None]).sum(-1) / (2 * self.scale**2))

    @cached_property
    def x(self) -> np.ndarray:
        return np.array([one.ratio.values for one in self.told])

    @cached_property
    def y(self) -> np.ndarray:
        return np.array([one.loss for one in self.told])

    def joint(self, shares, settings=()):
        gram = self._kernel(self.x, self.x) + self.noise_sd**2 * np.eye(len(self.x))
        cross = self._kernel(shares, self.x)
        solved = np.linalg.solve(gram, cross.T)
        return solved.T @ self.y, self._kernel(shares, shares) - cross @ solved

    def predict(self, shares, settings=()):
        mean, covariance = self.joint(shares)
        return mean, np.sqrt(np.maximum(np.diag(covariance), 0))

    def leave_one_out(self):
        found = []
        for i in range(len(self.told)):
            rest = Gaussian(told=[one for j, one in enumerate(self.told) if j != i], noise_sd=self.noise_sd)
            mean, sd = rest.predict(self.x[i : i + 1])
            found.append((mean[0], np.hypot(sd[0], self.noise_sd)))
        mean, sd = np.array(found).T
        return mean, sd


def read(model: Model, s: SimplexSpace, at: Ratio, **rest) -> Insight:
    least, most = s.tightest()
    return explain(model, s, Point(ratio=at), free=np.flatnonzero(least < most).tolist(), seed=5, **rest)


def random_told(s: SimplexSpace, n: int, loss: Callable[[np.ndarray], float], seed: int = 0) -> list[Told]:
    random = np.random.default_rng(seed)
    ratios = [s.project(random.dirichlet(np.ones(s.n_domains))) for _ in range(n)]
    return [Told(ratio=r, loss=float(loss(r.values) + 0.3 * random.standard_normal())) for r in ratios]


# Sensitivity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "slopes", [(1.0, 0.0, 0.0), (2.0, -1.0, 0.5, 0.5), (1.0, 2.0), (0.0, 0.0, 1.0, 3.0, -2.0, 1.0)]
)
def test_total_effects_of_a_linear_function_in_closed_form(slopes: tuple[float, ...]) -> None:
    # r even on the simplex, f = a·r: Var f = Σ(a − ā)² / (n (n + 1)); given the proportions q of the others
    # Var(f | q) = Var(r_d) (a_d − a·q)², Var(r_d) = (n − 1) / (n² (n + 1)), and a·q has mean ā' and the variance of
    # an even draw of n − 1.
    a, n = np.array(slopes), len(slopes)
    of_all = np.square(a - a.mean()).sum() / (n * (n + 1))
    expected = {}
    for d in range(n):
        rest = np.delete(a, d)
        of_rest = np.square(rest - rest.mean()).sum() / ((n - 1) * n)
        expected["abcdef"[d]] = (n - 1) / (n**2 * (n + 1)) * ((a[d] - rest.mean()) ** 2 + of_rest) / of_all
    found = read(Written(lambda r: r @ a), space(n), space(n).uniform())
    for one in found.sensitivities:
        assert one.total == pytest.approx(min(expected[one.domain], 1.0), abs=0.05)
    totals = [one.total for one in found.sensitivities]
    assert totals == sorted(totals, reverse=True)


def test_a_domain_that_does_not_matter_beside_the_others_has_no_change_of_its_own() -> None:
    # f is the proportion of a among (a, b): the share of c changes nothing while a and b keep their proportions.
    found = read(Written(lambda r: (r[:, 0] + 1e-9) / (r[:, 0] + r[:, 1] + 2e-9)), space(3), ratio(40, 40, 40))
    by_name = {one.domain: one for one in found.sensitivities}
    assert by_name["c"].total == pytest.approx(0.0, abs=0.02)
    assert by_name["c"].change == pytest.approx(0.0, abs=1e-6)
    assert by_name["a"].total > 0.5


def test_the_change_goes_from_nothing_to_everything_in_the_recommended_proportions() -> None:
    # at (60, 40, 20) of 120 the others of a stand 2 : 1, so without a the loss is 2/3 · 1 + 1/3 · 4 = 2; with a alone 7
    found = read(Written(lambda r: r @ np.array([7.0, 1.0, 4.0])), space(3), ratio(60, 40, 20))
    change = {one.domain: one for one in found.sensitivities}["a"]
    assert change.shares == (0.0, 1.0)
    assert change.change == pytest.approx(5.0)
    assert change.change_interval == pytest.approx((5.0, 5.0))


def test_the_interval_of_the_change_is_that_of_two_correlated_points() -> None:
    s = space(3)
    model = Gaussian(random_told(s, 8, lambda r: r[0]))
    one = {x.domain: x for x in read(model, s, ratio(60, 40, 20)).sensitivities}["a"]
    mean, covariance = model.joint(np.array([[0, 2 / 3, 1 / 3], [1, 0, 0]]))
    sd = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert one.change_interval == pytest.approx(
        (mean[1] - mean[0] - 1.96 * sd, mean[1] - mean[0] + 1.96 * sd), abs=1e-3
    )


def test_total_effects_narrow_with_data() -> None:
    s = space(3)
    widths = []
    for n in (4, 60):
        found = read(Gaussian(random_told(s, n, lambda r: 3 * r[0])), s, s.uniform())
        low, high = {x.domain: x for x in found.sensitivities}["a"].total_interval
        assert 0 <= low <= high <= 1
        widths.append(high - low)
    assert widths[1] < widths[0]


def test_a_reader_is_deterministic_in_its_seed() -> None:
    s = space(3)
    model = Gaussian(random_told(s, 8, lambda r: r[0]))
    assert read(model, s, s.uniform()) == read(model, s, s.uniform())


# Lines --------------------------------------------------------------------------------------------------------------

SPACES = {
    "plain": space(4),
    "lower": space(4, lower=(12, 0, 24, 0)),
    "upper": space(4, upper=(60, 48, 120, 36)),
    "one fixed": space(4, lower=(0, 30, 0, 0), upper=(120, 30, 120, 120)),
    "constraint": space(4, constraints=["a + b >= 0.3", "c <= 0.5"]),
    "all of it": space(4, (6, 0, 0, 6), (90, 90, 60, 120), ["a - b <= 0.4"]),
}


@pytest.mark.parametrize("name", list(SPACES))
def test_lines_stay_inside_touch_the_edge_and_keep_proportions(name: str) -> None:
    s = SPACES[name]
    free = np.flatnonzero(s.tightest()[0] < s.tightest()[1]).tolist()
    rays = Rays(s, free)
    at = np.array([s.uniform().values])
    for d in free:
        q = rays.proportions(rays.standard(at), d)
        (low,), (high,) = rays.interval(q, d)
        points = rays.along(np.repeat(q, 51, 0), d, np.linspace(low, high, 51))
        assert points.sum(axis=1) == pytest.approx(1.0)
        assert rays.allows(rays.standard(points)).all()
        beyond = rays.along(np.repeat(q, 2, 0), d, np.array([low - 1e-4, high + 1e-4]))
        assert not rays.allows(rays.standard(beyond)).any()
        others = (points - rays.least)[:, [j for j in free if j != d]]
        first = others[0] / others[0].sum()
        inside = others.sum(axis=1) > 1e-6
        assert others[inside] / others[inside].sum(axis=1, keepdims=True) == pytest.approx(
            np.tile(first, (inside.sum(), 1))
        )


@pytest.mark.parametrize("name", list(SPACES))
def test_slices_and_ternary_lie_within_the_space(name: str) -> None:
    s = SPACES[name]
    found = read(Written(lambda r: r @ np.arange(4.0)), s, s.uniform())
    least, most = (rows / N_ROWS for rows in s.tightest())
    for one in found.slices:
        d = s.names.index(one.domain)
        assert one.shares[0] >= least[d] - 1e-9
        assert one.shares[-1] <= most[d] + 1e-9
        assert list(one.shares) == sorted(one.shares)
        assert one.low == one.mean == one.high, "a model without doubts"
    assert [one.domain for one in found.slices] == [one.domain for one in found.sensitivities]


def test_a_slice_reaches_a_vertex_and_leaves_from_one() -> None:
    found = read(Written(lambda r: r[:, 0]), space(3), ratio(120, 0, 0))
    one = {x.domain: x for x in found.slices}["a"]
    assert (one.shares[0], one.shares[-1]) == (0.0, 1.0), "the others take even shares where a has everything"
    assert one.mean == pytest.approx(one.shares)


def test_a_domain_without_room_is_named() -> None:
    # a and b are tied together, so neither has room while the other keeps its proportion to the rest
    s = space(3, constraints=["a = b"])
    found = read(Written(lambda r: r[:, 2]), s, s.project(np.array([0.25, 0.25, 0.5])))
    assert [one.domain for one in found.slices] == ["c"]
    assert any("no room for another share of a, b" in note for note in found.notes)


def test_a_fixed_domain_is_named_and_stays_what_it_is() -> None:
    found = read(Written(lambda r: r[:, 1]), SPACES["one fixed"], ratio(30, 30, 30, 30))
    assert {one.domain for one in found.slices} == {"a", "c", "d"}
    assert any(note.endswith("left out: b.") for note in found.notes)
    assert all(one.mean == pytest.approx([0.25] * 41) for one in found.slices)


def test_the_triangle_is_for_three_free_domains() -> None:
    model = Written(lambda r: r[:, 0])
    triangle = read(model, space(3), ratio(40, 40, 40)).ternary
    assert triangle is not None
    assert len(triangle.shares) == 41 * 42 // 2
    assert all(mean == pytest.approx(shares[0]) for mean, shares in zip(triangle.mean, triangle.shares, strict=True))
    assert read(model, space(4), space(4).uniform()).ternary is None
    assert read(model, space(3, (0, 40, 0), (120, 40, 120)), ratio(40, 40, 40)).ternary is None
    half = read(model, space(3, upper=(60, 60, 60)), ratio(40, 40, 40)).ternary
    assert half is not None
    assert max(itertools.chain(*half.shares)) <= 0.5 + 1e-9


# Calibration --------------------------------------------------------------------------------------------------------


def test_a_model_of_the_right_law_is_trusted() -> None:
    s = space(3)
    random = np.random.default_rng(3)
    blank = [Told(ratio=s.project(random.dirichlet(np.ones(3))), loss=0.0) for _ in range(60)]
    model = Gaussian(blank)
    covariance = model._kernel(model.x, model.x) + model.noise_sd**2 * np.eye(60)
    losses = np.linalg.cholesky(covariance) @ random.standard_normal(60)
    drawn = Gaussian([Told(ratio=b.ratio, loss=float(v)) for b, v in zip(blank, losses, strict=True)])
    found = calibration(drawn)
    assert found is not None
    assert found.trust == "good"
    assert found.inside_95 > 0.85
    assert found.rank_correlation is not None
    assert found.rank_correlation > 0.4
    assert np.std(found.residuals) == pytest.approx(1.0, abs=0.2)
    assert "can be trusted" in found.sentence


@pytest.mark.parametrize(
    ("losses", "predicted", "sd", "trust"),
    [
        (range(10), range(10), 1.0, "wide"),
        (range(20), [i + (-1) ** i * 2 for i in range(20)], 0.5, "narrow"),
        (range(20), [i + (-1) ** (i // 2) * (0.3 + i % 3) for i in range(20)], 1.5, "good"),
        (range(10), range(10, 0, -1), 5.0, "none"),
        (range(10), [1.0] * 10, 5.0, "none"),
        ([2.0] * 10, [2.0] * 10, 1.0, "flat"),
        (range(4), range(4), 1.0, "few"),
    ],
)
def test_how_far_a_model_is_trusted(losses, predicted, sd: float, trust: str) -> None:
    class Fixed(Written):
        def leave_one_out(self):
            return np.array(predicted, dtype=float), np.full(len(predicted), sd)

    found = calibration(Fixed(lambda r: r, told=[Told(ratio=ratio(60, 60), loss=float(y)) for y in losses]))
    assert found is not None
    assert found.trust == trust
    assert found.sentence


def test_shares_inside_are_counted_by_hand() -> None:
    # residuals 0, 0.6, 1, 2 and 3: two within 0.674, three within 1.96
    class Fixed(Written):
        def leave_one_out(self):
            return np.array([0.0, 0.0, 0.0, 0.0, 0.0]), np.array([1.0, 1.0, 2.0, 0.5, 1.0])

    told = [Told(ratio=ratio(60, 60), loss=y) for y in (0.0, 0.6, 2.0, 1.0, 3.0)]
    found = calibration(Fixed(lambda r: r, told=told))
    assert found is not None
    assert (found.inside_50, found.inside_95) == (0.4, 0.6)
    assert found.residuals == pytest.approx((0.0, 0.6, 1.0, 2.0, 3.0))


# The whole of it ----------------------------------------------------------------------------------------------------


def test_a_maximised_study_has_its_own_signs() -> None:
    s = space(3)
    told = random_told(s, 9, lambda r: r[0])
    low = read(Gaussian(told), s, s.uniform())
    high = read(Gaussian(told), s, s.uniform(), direction=Direction.MAXIMIZE)
    for a, b in zip(low.sensitivities, high.sensitivities, strict=True):
        assert b.change == pytest.approx(-a.change)
        assert b.change_interval == pytest.approx((-a.change_interval[1], -a.change_interval[0]))
        assert b.total == pytest.approx(a.total)
    for x, y in zip(low.slices, high.slices, strict=True):
        assert np.array(y.mean) == pytest.approx(-np.array(x.mean))
        assert np.array(y.low) == pytest.approx(-np.array(x.high))
    assert low.calibration is not None
    assert high.calibration is not None
    assert high.calibration.observed == pytest.approx([-v for v in low.calibration.observed])
    assert high.calibration.rank_correlation == pytest.approx(low.calibration.rank_correlation)


@pytest.mark.parametrize("n", [2, 3])
def test_an_insight_survives_json(n: int) -> None:
    s = space(n)
    found = read(Gaussian(random_told(s, 7, lambda r: r[0])), s, s.uniform())
    text = json.dumps(found.to_json(), allow_nan=False)
    assert Insight.from_json(json.loads(text)) == found
    with pytest.raises((KeyError, TypeError, ValueError)):
        Insight.from_json({"n_told": 1})


def real(s: SimplexSpace, told: Sequence[Told], **settings) -> Insight:
    return insight(Proposer(s, SearchConfig(**settings), 1), told)


def test_nothing_told_is_refused() -> None:
    with pytest.raises(FeedbackError, match="no trial has a value"):
        real(space(3), [])


def test_one_domain_has_no_model() -> None:
    found = real(space(1), [Told(ratio=ratio(120), loss=1.0), Told(ratio=ratio(120), loss=1.1)])
    assert (found.kernel, found.slices, found.calibration) == (None, (), None)
    assert "one ratio only" in found.notes[0]


@pytest.mark.parametrize("name", ["two observations", "constant", "bounds", "constraints", "twelve"])
def test_the_real_model_on_odd_studies(name: str) -> None:
    s = {"bounds": SPACES["one fixed"], "constraints": SPACES["all of it"], "twelve": space(12)}.get(name, space(3))
    told = random_told(s, 2 if name == "two observations" else 10, lambda r: r[0])
    if name == "constant":
        told = [Told(ratio=one.ratio, loss=2.0) for one in told]
    found = real(s, told)
    assert found.n_told == len(told)
    assert len(found.slices) == len(found.sensitivities) >= 3
    assert all(np.isfinite([*one.mean, *one.low, *one.high]).all() for one in found.slices)
    assert all(0 <= one.total_interval[0] <= one.total <= one.total_interval[1] <= 1 for one in found.sensitivities)
    assert (found.calibration is None) == (name == "two observations")
    json.dumps(found.to_json(), allow_nan=False)


def test_the_real_model_finds_the_domain_that_matters() -> None:
    s = space(4)
    told = random_told(s, 40, lambda r: 4 * r[2])
    found = real(s, told)
    first = found.sensitivities[0]
    assert first.domain == "c"
    assert first.change_interval[0] > 0
    assert found.calibration is not None
    assert found.calibration.trust in ("good", "wide")
