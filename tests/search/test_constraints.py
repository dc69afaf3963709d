"""Linear constraints over domains, in whole rows: the region, the projection into it, and the start design."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from duet_ray.config import config_from
from duet_ray.errors import ConfigError, RatioError
from duet_ray.linear import LinearConstraint, parse_constraints
from duet_ray.records import Ratio
from duet_ray.search import SimplexSpace, start_design
from duet_ray.search.constraints import Region
from duet_ray.search.projection import nearest_real, nearest_rows_in, tightest_in


def space(n: int, n_rows: int, *texts: str, lower: int = 0, upper: int | None = None) -> SimplexSpace:
    names = tuple(f"d{i}" for i in range(n))
    return SimplexSpace(
        names=names,
        n_rows=n_rows,
        lower=(lower,) * n,
        upper=(n_rows if upper is None else upper,) * n,
        constraints=parse_constraints(texts, names),
    )


@st.composite
def spaces(draw: st.DrawFn, max_domains: int, max_rows: int, max_constraints: int = 4) -> SimplexSpace:
    """A random feasible space: bounds and constraints are put around a random lattice point."""
    n, n_rows = draw(st.integers(1, max_domains)), draw(st.integers(1, max_rows))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    inside = random.multinomial(n_rows, random.dirichlet(np.ones(n)))
    kind = draw(st.sampled_from(["sums", "differences", "reals"]))
    constraints = []
    for number in range(draw(st.integers(1, max_constraints))):
        if kind == "sums":
            coefficients = random.choice([-1.0, 1.0]) * (random.random(n) < 0.4)
        elif kind == "differences":
            coefficients = random.integers(-2, 3, n).astype(float)
        else:
            coefficients = random.normal(size=n).round(2)
        if not coefficients.any():
            coefficients[random.integers(n)] = 1.0
        equal = random.random() < 0.2
        bound = coefficients @ inside / n_rows + (0 if equal else random.choice([0.0, 0.02, 0.2]))
        for sign in (1, -1) if equal else (1,):
            constraints.append(
                LinearConstraint(
                    coefficients=tuple(map(float, sign * coefficients)),
                    bound=float(sign * bound),
                    text=f"constraint {number}",
                    slack_rows=0.5 if equal else 0.0,
                )
            )
    return SimplexSpace(
        names=tuple(f"d{i}" for i in range(n)),
        n_rows=n_rows,
        lower=tuple(int(max(0, i - random.integers(0, n_rows + 1))) for i in inside),
        upper=tuple(int(min(n_rows, i + random.integers(0, n_rows + 1))) for i in inside),
        constraints=tuple(constraints),
    )


def meets(s: SimplexSpace, rows: np.ndarray, widening: float = 1.0) -> np.ndarray:
    """Sum, bounds and constraints from their definition, apart from the code under test."""
    good = (rows.sum(axis=1) == s.n_rows) & (rows >= s.lower).all(axis=1) & (rows <= s.upper).all(axis=1)
    for c in s.constraints:
        largest = max(map(abs, c.coefficients))
        allowed = c.bound * s.n_rows + largest * (widening * c.slack_rows + 1e-6)
        good &= rows @ np.array(c.coefficients) <= allowed
    return good


def lattice(s: SimplexSpace) -> np.ndarray:
    """Every point by brute force."""
    everything = np.array(list(product(*[range(a, b + 1) for a, b in zip(s.lower, s.upper, strict=True)])))
    return everything[meets(s, everything)]


def points_for(s: SimplexSpace, n: int, seed: int, off: float) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.dirichlet(np.full(s.n_domains, 0.5), n) + off * random.normal(size=(n, s.n_domains))


SEEDS = st.integers(0, 2**32 - 1)


# Everything lies in the space ----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(spaces(50, 20_000), SEEDS, st.floats(0, 1))
def test_what_is_projected_meets_sum_bounds_and_constraints(s, seed, off):
    points = points_for(s, 5, seed, off)
    rows = s.project_rows(points)
    assert rows.dtype == np.int64
    assert meets(s, rows).all()
    ratios = [Ratio(counts=tuple(row)) for row in rows.tolist()]
    assert all(s.contains(ratio) for ratio in ratios)
    assert [s.project(point) for point in points] == ratios, "many at once as one by one"
    assert [s.project(ratio.values) for ratio in ratios] == ratios, "a lattice point is its own projection"


@settings(max_examples=12, deadline=None)
@given(spaces(50, 20_000), SEEDS, st.booleans())
def test_the_start_design_meets_them_too(s, seed, vertices):
    design = start_design(s, 8, seed, vertices)
    assert meets(s, np.array([ratio.counts for ratio in design])).all()
    assert design[0] == s.uniform()
    assert start_design(s, 8, seed, vertices) == design
    assert start_design(s, 3, seed, vertices) == design[:3]


@settings(max_examples=60, deadline=None)
@given(spaces(6, 40), SEEDS)
def test_feasible_rows_are_projections_that_were_quick(s, seed):
    points = points_for(s, 20, seed, 0.3)
    quick = s.feasible_rows(points)
    every = s.project_rows(points).tolist()
    remaining = iter(every)
    assert 1 <= len(quick) <= 20
    assert all(row in remaining for row in quick.tolist()), "a subsequence"


def test_one_feasible_row_at_least(monkeypatch):
    s = space(4, 1000, "d0 <= d1")
    points = np.eye(4)
    lost = (np.zeros((4, 4), dtype=np.int64), np.zeros(4, dtype=bool))
    monkeypatch.setattr(SimplexSpace, "_nearest", lambda self, target: (lost[0][: len(target)], lost[1][: len(target)]))
    rows = s.feasible_rows(points)
    assert len(rows) == 1
    assert meets(s, rows).all()


def test_contains_asks_the_constraints():
    s = space(3, 10, "d0 + d1 <= 0.5")
    assert s.contains(Ratio(counts=(5, 0, 5)))
    assert not s.contains(Ratio(counts=(5, 1, 4)))


# Against brute force -------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(spaces(4, 8))
def test_list_and_tightest_bounds_are_the_lattice(s):
    everything = lattice(s)
    assume(len(everything))  # with an equality nothing may come within half a row
    assert sorted(s.all_rows().tolist()) == sorted(everything.tolist())
    for least, most in (s.tightest(), tightest_in(s._region)):
        assert np.array_equal(least, everything.min(axis=0))
        assert np.array_equal(most, everything.max(axis=0))
    assert s.is_single == (len(everything) == 1)
    assert s.all_rows(limit=len(everything) - 1) is None


@settings(max_examples=150, deadline=None)
@given(spaces(4, 8), SEEDS, st.floats(0, 1))
def test_on_a_listed_lattice_the_projection_is_the_nearest_point(s, seed, off):
    everything, points = lattice(s), points_for(s, 5, seed, off)
    assume(len(everything))
    for point, found in zip(points, s.project_rows(points), strict=True):
        distances = np.square(everything / s.n_rows - point).sum(axis=1)
        assert np.square(found / s.n_rows - point).sum() == pytest.approx(distances.min(), abs=1e-9)


def test_without_a_list_the_projection_is_hardly_farther():
    """Over 120 spaces: the nearest point for 98 of 100, never two rows farther, and one of a hundred is not found."""
    random = np.random.default_rng(0)
    farther, n_lost = [], 0
    for _ in range(120):
        n, n_rows = int(random.integers(2, 6)), int(random.integers(3, 14))
        inside = random.multinomial(n_rows, random.dirichlet(np.ones(n)))
        made = []
        for number in range(int(random.integers(1, 4))):
            a = random.integers(-2, 3, n).astype(float)
            if a.any():
                bound = float(a @ inside / n_rows + random.choice([0, 0.02, 0.1]))
                made.append(LinearConstraint(coefficients=tuple(a.tolist()), bound=bound, text=str(number)))
        s = SimplexSpace(
            names=tuple("abcdef"[:n]), n_rows=n_rows, lower=(0,) * n, upper=(n_rows,) * n, constraints=tuple(made)
        )
        if s._region is None:
            continue
        everything = lattice(s)
        target = n_rows * points_for(s, 20, int(random.integers(2**32)), 0.3)
        rows, found = nearest_rows_in(s._region, target)
        n_lost += int((~found).sum())
        assert meets(s, rows[found]).all()
        best = np.sqrt(np.square(everything - target[:, None]).sum(axis=2).min(axis=1))
        farther.extend((np.sqrt(np.square(rows - target).sum(axis=1)) - best)[found])
    assert min(farther) > -1e-9
    assert max(farther) < 2
    assert np.mean(np.array(farther) > 1e-9) < 0.02
    assert n_lost < 0.01 * len(farther)


@settings(max_examples=60, deadline=None)
@given(spaces(12, 2000), SEEDS, st.floats(0, 1))
def test_no_exchange_between_two_domains_brings_a_projection_nearer(s, seed, off):
    target = s.n_rows * points_for(s, 4, seed, off)
    rows, found = nearest_rows_in(s._region, target)
    exchanges = np.eye(s.n_domains, dtype=np.int64)[:, None] - np.eye(s.n_domains, dtype=np.int64)
    for row, point in zip(rows[found], target[found], strict=True):
        others = (row + exchanges).reshape(-1, s.n_domains)
        others = others[s._region.allows(others)]
        assert np.square(others - point).sum(axis=1).min() >= np.square(row - point).sum() - 1e-5


@settings(max_examples=80, deadline=None)
@given(spaces(20, 10_000), SEEDS, st.floats(0, 1))
def test_the_projection_in_reals_is_the_nearest_point(s, seed, off):
    """x is the projection of t just if no v in the region has (t − x)·(v − x) > 0; a linear program finds the best."""
    region, target = s._region, s.n_rows * points_for(s, 1, seed, off)
    found = nearest_real(region, target)[0]
    assert found.sum() == pytest.approx(s.n_rows, abs=1e-3)
    assert np.all(region.matrix @ found <= region.limits + 1e-3)
    away = target[0] - found
    best = region.optimum(-away, whole=False)
    assert best is not None
    assert away @ (best - found) <= 1e-3 * (1 + np.abs(away).sum())


def test_the_last_resort_is_nearest_in_rows_moved():
    # By hand: at most 5 of 10 rows on d0 and d1 together; from (8, 2, 0) five rows must go, wherever they are taken.
    s = space(3, 10, "d0 + d1 <= 0.5")
    found = s._region.nearest(np.array([8.0, 2.0, 0.0]))
    assert found[2] == 5
    assert np.abs(found - [8, 2, 0]).sum() == 10


# By hand -------------------------------------------------------------------------------------------------------------


def test_a_projection_by_hand():
    # In reals (0.8, 0.2, 0) goes to the face r0 + r1 = 0.5, r2 = 0.5: 0.25 is taken from each, but r1 stops at 0.
    assert space(3, 1000, "d0 + d1 <= 0.5").project(np.array([0.8, 0.2, 0.0])).counts == (500, 0, 500)
    assert space(3, 1000, "d0 + d1 <= 0.5").project(np.array([0.6, 0.4, 0.0])).counts == (350, 150, 500)


def test_bounds_are_tight_under_constraints():
    # d1 <= d0 <= 0.3 leaves at least 0.4 for d2.
    least, most = space(3, 10, "d0 <= 0.3", "d1 <= d0").tightest()
    assert (least.tolist(), most.tolist()) == ([0, 0, 4], [3, 3, 10])


def test_bounds_are_tight_in_whole_rows_where_fractions_would_reach_farther():
    # d0 = d1 exactly, so of 11 rows d2 takes an odd number: 1 to 3, although 0 to 4.4 as reals.
    s = space(3, 11, "d0 <= d1", "d1 <= d0", "d2 <= 0.4")
    assert [bound[2] for bound in s.tightest()] == [1, 3]
    assert [bound[2] for bound in tightest_in(s._region)] == [1, 3]


def test_an_equality_is_met_by_the_nearest_whole_row():
    assert {row[0] for row in space(2, 10, "d0 = 0.33").all_rows().tolist()} == {3}
    assert all(a == b for a, b, _ in space(3, 11, "d0 = d1").all_rows().tolist())
    # An odd number of rows cannot be shared equally by two.
    assert space(2, 11, "d0 = d1").all_rows().tolist() == [[5, 6], [6, 5]]


def test_a_constraint_that_excludes_nothing_changes_nothing():
    for n, n_rows in ((3, 7), (5, 40), (9, 1000), (30, 10_000)):
        plain, constrained = space(n, n_rows), space(n, n_rows, "d0 <= d1 + 1")
        points = points_for(plain, 50, 1, 0.2)
        assert np.array_equal(plain.project_rows(points), constrained.project_rows(points))
        assert start_design(plain, 12, 4, True) == start_design(constrained, 12, 4, True)


def test_a_constraint_on_one_domain_is_a_bound():
    for n_rows in (60, 10_000):
        bounded = SimplexSpace(
            names=("d0", "d1", "d2"), n_rows=n_rows, lower=(0, n_rows // 10, 0), upper=(n_rows // 3, n_rows, n_rows)
        )
        written = space(3, n_rows, "d0 <= 0.33334", "d1 >= 10 %")
        points = points_for(bounded, 50, 1, 0.2)
        assert np.array_equal(bounded.project_rows(points), written.project_rows(points))
        assert start_design(bounded, 12, 4, True) == start_design(written, 12, 4, True)
        assert all(np.array_equal(a, b) for a, b in zip(bounded.tightest(), written.tightest(), strict=True))


def test_linear_inequalities_are_the_constraints_over_the_free_domains():
    # d3 is fixed at 0.2, so 2 d0 − d1 + d3 <= 0.4 is d0 − d1 / 2 <= 0.1 over the others.
    s = space(4, 1000, "2*d0 - d1 + d3 <= 0.4", "d3 = 0.2", "d2 <= 0.5")
    matrix, limits = s.linear_inequalities([2, 0, 1])
    assert matrix == pytest.approx(np.array([[0, 1, -0.5]]))
    assert limits == pytest.approx([0.1])
    matrix, limits = space(3, 10).linear_inequalities([0, 1, 2])
    assert matrix.shape == (0, 3)
    assert limits.shape == (0,)


@settings(max_examples=30, deadline=None)
@given(spaces(8, 200), SEEDS)
def test_every_lattice_point_obeys_the_linear_inequalities(s, seed):
    least, most = s.tightest()
    free = np.flatnonzero(least < most).tolist()
    matrix, limits = s.linear_inequalities(free)
    rows = s.project_rows(points_for(s, 10, seed, 0.3))
    assert np.all((rows[:, free] / s.n_rows) @ matrix.T <= limits + 1e-12)


# The start design ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts",
    [("d0 + d1 <= 0.6", "d2 >= d3"), ("d0 >= 0.4", "d1 + d2 <= 0.1"), ("2*d0 - d1 <= 0.05", "d3 <= 0.3")],
)
def test_draws_are_uniform_within_the_constraints(texts):
    """Against plain rejection sampling: means and spreads per domain."""
    s = space(4, 100_000, *texts)
    drawn = np.array([r.values for r in start_design(s, 800, 0, False)[1:]])
    uniform = np.random.default_rng(0).dirichlet(np.ones(4), 400_000)
    keep = np.ones(len(uniform), dtype=bool)
    for c in s.constraints:
        keep &= uniform @ np.array(c.coefficients) <= c.bound
    uniform = uniform[keep]
    assert len(uniform) > 1000
    error = 4 * uniform.std(axis=0) * (1 / len(drawn) + 1 / len(uniform)) ** 0.5
    assert np.all(np.abs(drawn.mean(axis=0) - uniform.mean(axis=0)) < error)
    assert drawn.std(axis=0) == pytest.approx(uniform.std(axis=0), rel=0.15)


def test_the_walk_is_uniform_too():
    s = space(4, 100_000, "d0 + d1 <= 0.6", "d2 >= d3")
    walk = s._region.walk(np.random.default_rng(0))
    walked = np.array([next(walk) for _ in range(1500)]) / s.n_rows
    uniform = np.random.default_rng(0).dirichlet(np.ones(4), 200_000)
    uniform = uniform[(uniform[:, 0] + uniform[:, 1] <= 0.6) & (uniform[:, 2] >= uniform[:, 3])]
    assert np.all(walked >= -1e-9)
    assert walked.sum(axis=1) == pytest.approx(1)
    assert s._region.allows(walked * s.n_rows).all()
    assert walked.mean(axis=0) == pytest.approx(uniform.mean(axis=0), abs=0.02)
    assert walked.std(axis=0) == pytest.approx(uniform.std(axis=0), rel=0.1)


def test_a_thin_slab_is_walked_from_end_to_end():
    # d0 = d1 leaves a triangle with the corners (½, ½, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1): its centre is the mean.
    s = space(4, 100_000, "d0 = d1")
    drawn = np.array([r.counts for r in start_design(s, 400, 0, False)[1:]]) / s.n_rows
    assert np.all(drawn[:, 0] == drawn[:, 1])
    assert drawn.mean(axis=0) == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3], abs=0.03)
    assert drawn[:, 2].max() > 0.8


def test_a_region_wider_than_the_extreme_corners_is_walked_in_all_directions():
    region = space(4, 1000, "d0 <= d1 + 1", upper=500)._region
    region.__dict__["vertices"] = np.array([[500.0, 500, 0, 0]] * 4 + [[0.0, 0, 500, 500]] * 4)  # a segment
    centre, spread = region._shape()
    assert spread.shape == (4, 3)
    assert region.allows(centre[None]).all()


def test_a_flat_region_is_walked_too():
    """Two opposite constraints leave no room at all across them."""
    s = space(5, 10_000, "d0 + d1 <= d2", "d2 <= d0 + d1")
    drawn = np.array([r.counts for r in start_design(s, 60, 0, False)[1:]])
    assert np.all(drawn[:, 0] + drawn[:, 1] == drawn[:, 2])
    assert np.all(drawn.std(axis=0) > 500)
    assert len(np.unique(drawn, axis=0)) == len(drawn)


def test_points_differ_as_long_as_the_lattice_has_others():
    s = space(3, 8, "d0 <= d1", "d2 <= 0.5")
    n = len(lattice(s))
    design = start_design(s, n + 3, 0, True)
    assert len(set(design[:n])) == len(set(design)) == n


def test_a_single_ratio():
    s = space(3, 10, "d0 = 0.3", "d1 = 0.3")
    assert s.is_single
    assert {r.counts for r in start_design(s, 3, 0, True)} == {(3, 3, 4)}


# What cannot be met --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("s", "message"),
    [
        (
            lambda: space(3, 10, "d1 <= 0.9", "d0 <= 0.2", "d0 >= 0.5"),
            'no ratio meets all of "d0 <= 0.2", "d0 >= 0.5"; loosen search.constraints$',
        ),
        (
            lambda: space(3, 10, "d0 + d1 <= 0.2", "d2 <= 0.3"),
            'no ratio meets all of "d0 [+] d1 <= 0.2", "d2 <= 0.3"',
        ),
        (
            lambda: space(3, 10, "d0 >= d1 + 0.5", "d2 <= 0.8", upper=4),
            'no ratio meets "d0 >= d1 [+] 0.5", with these rows of 10 per domain: d0 0 to 4 [(]domains.*; loosen '
            "search.constraints or domains",
        ),
        (
            lambda: space(3, 10, "0.31 <= d0 <= 0.39"),
            'no mixture of 10 whole rows meets "0.31 <= d0 <= 0.39", although fractions of rows would; raise '
            "mixture.n_rows or loosen search.constraints",
        ),
        (
            lambda: space(2, 11, "d0 <= d1", "d1 <= d0"),
            "no mixture of 11 whole rows meets all of",
        ),
    ],
)
def test_constraints_that_leave_nothing_are_named(s, message):
    with pytest.raises(RatioError, match=message):
        s()


def test_a_constraint_of_another_study_is_refused():
    with pytest.raises(RatioError, match=r'"d0 <= 0.5".*got 3 for 2 domains'):
        SimplexSpace(
            names=("a", "b"),
            n_rows=10,
            lower=(0, 0),
            upper=(10, 10),
            constraints=parse_constraints(["d0 <= 0.5"], ["d0", "d1", "d2"]),
        )


def test_a_large_or_stubborn_lattice_is_not_listed():
    assert space(9, 1000, "d0 <= d1").all_rows() is None
    region = space(9, 1000, "d0 <= d1")._region
    assert isinstance(region, Region)
    assert region.all_rows(5) is None


# From a study --------------------------------------------------------------------------------------------------------


def study(constraints: list[str], **mixture):
    return config_from(
        {
            "name": "toy",
            "model": {"path": "nowhere"},
            "domains": [{"name": n, "source": "x.jsonl"} for n in ("code", "maths", "wiki-text")],
            "mixture": {"n_rows": 100, **mixture},
            "search": {"constraints": constraints},
            "feedback": {"kind": "heldout_loss", "file": "task.jsonl"},
        },
        folder=Path(),
    )


def test_a_study_has_its_constraints():
    s = SimplexSpace.of(study(["code + maths >= 20 %", "wiki-text <= 0.5"]), [1000] * 3)
    assert [c.text for c in s.constraints] == ["code + maths >= 20 %", "wiki-text <= 0.5"]
    assert s.tightest()[1].tolist() == [100, 100, 50]


def test_the_rows_there_are_can_conflict_with_a_constraint():
    with pytest.raises(RatioError, match=r'"code >= 0.5", with these rows of 100 per domain: code 0 to 40'):
        SimplexSpace.of(study(["code >= 0.5"]), [40, 1000, 1000])


def test_an_unreadable_constraint_is_refused():
    with pytest.raises(ConfigError, match="unknown domain 'cod'; did you mean `code`"):
        SimplexSpace.of(study(["cod >= 0.5"]), [1000] * 3)
