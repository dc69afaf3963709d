"""The lattice of whole rows and the start design."""

import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_ray.config import config_from
from duet_ray.errors import RatioError
from duet_ray.records import Ratio
from duet_ray.search import SimplexSpace, start_design
from duet_ray.search.simplex import _walk_inside, start_stream


def space(n: int, n_rows: int, lower: int | tuple[int, ...] = 0, upper: int | tuple[int, ...] | None = None):
    many = lambda bound: bound if isinstance(bound, tuple) else (bound,) * n  # noqa: E731
    return SimplexSpace(
        names=tuple(f"domain-{i}" for i in range(n)),
        n_rows=n_rows,
        lower=many(lower),
        upper=many(n_rows if upper is None else upper),
    )


@st.composite
def spaces(draw: st.DrawFn, max_domains: int, max_rows: int) -> SimplexSpace:
    """A random feasible space: bounds are put around a random lattice point."""
    n = draw(st.integers(1, max_domains))
    n_rows = draw(st.integers(1, max_rows))
    cuts = sorted(draw(st.lists(st.integers(0, n_rows), min_size=n - 1, max_size=n - 1)))
    inside = np.diff([0, *cuts, n_rows])
    below = draw(st.lists(st.integers(0, n_rows), min_size=n, max_size=n))
    above = draw(st.lists(st.integers(0, n_rows), min_size=n, max_size=n))
    return space(
        n,
        n_rows,
        tuple(int(max(0, i - b)) for i, b in zip(inside, below, strict=True)),
        tuple(int(min(n_rows, i + a)) for i, a in zip(inside, above, strict=True)),
    )


def lattice(s: SimplexSpace) -> np.ndarray:
    """Every lattice point by brute force."""
    ranges = [range(low, high + 1) for low, high in zip(s.lower, s.upper, strict=True)]
    return np.array([p for p in product(*ranges) if sum(p) == s.n_rows])


@settings(max_examples=300, deadline=None)
@given(spaces(50, 100_000), st.integers(0, 2**32 - 1), st.floats(0.01, 5), st.floats(0, 1))
def test_projection_is_on_the_lattice_and_within_bounds(s, seed, alpha, off):
    random = np.random.default_rng(seed)
    point = random.dirichlet(np.full(s.n_domains, alpha)) + off * random.normal(size=s.n_domains)
    ratio = s.project(point)
    assert sum(ratio.counts) == s.n_rows
    assert s.contains(ratio)
    assert s.project(ratio.values) == ratio, "a lattice point is its own projection"
    assert s.project(point) == ratio


@settings(max_examples=300, deadline=None)
@given(spaces(4, 7), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_projection_is_the_nearest_lattice_point(s, seed, off):
    random = np.random.default_rng(seed)
    point = random.dirichlet(np.ones(s.n_domains)) + off * random.normal(size=s.n_domains)
    everything = lattice(s)
    distances = np.square(everything / s.n_rows - point).sum(axis=1)
    found = np.square(s.project(point).values - point).sum()
    assert found == pytest.approx(distances.min(), abs=1e-12)


def test_projection_without_bounds_is_largest_remainder():
    # By hand: 10 · (0.47, 0.31, 0.22) = 4.7, 3.1, 2.2: whole parts 4, 3, 2; the missing row goes to 0.7.
    assert space(3, 10).project(np.array([0.47, 0.31, 0.22])).counts == (5, 3, 2)


def test_equal_remainders_go_to_the_earlier_domains():
    assert space(3, 2).uniform().counts == (1, 1, 0)
    assert space(7, 10).uniform().counts == (2, 2, 2, 1, 1, 1, 1)


def test_fewer_rows_than_domains():
    assert sum(space(50, 3).uniform().counts) == 3


def test_many_points_project_as_one_by_one():
    s = space(9, 1000, 20, 300)
    points = np.random.default_rng(0).dirichlet(np.ones(9), 50)
    assert [tuple(r) for r in s.project_rows(points).tolist()] == [s.project(p).counts for p in points]


@pytest.mark.parametrize("bad", [np.array([0.5, np.nan]), np.array([np.inf, 0.0]), np.array([1e300, 0.0])])
def test_a_point_that_is_no_number_is_refused(bad):
    with pytest.raises(RatioError, match="finite numbers"):
        space(2, 10).project(bad)


def test_a_point_of_the_wrong_length_is_refused():
    with pytest.raises(RatioError, match="expected 2, got shape"):
        space(2, 10).project(np.ones(3) / 3)


@settings(max_examples=100, deadline=None)
@given(spaces(4, 7))
def test_every_lattice_point_is_listed_once(s):
    listed = s.all_rows()
    assert sorted(map(tuple, listed.tolist())) == sorted(map(tuple, lattice(s).tolist()))


def test_a_large_lattice_is_not_listed():
    assert space(30, 10_000).all_rows() is None


@settings(max_examples=100, deadline=None)
@given(spaces(4, 7))
def test_tightest_bounds_are_what_the_lattice_reaches(s):
    least, most = s.tightest()
    assert np.array_equal(least, lattice(s).min(axis=0))
    assert np.array_equal(most, lattice(s).max(axis=0))


def test_contains():
    s = space(3, 10, (0, 2, 0), (10, 10, 4))
    assert s.contains(Ratio(counts=(5, 2, 3)))
    assert not s.contains(Ratio(counts=(6, 1, 3))), "below a lower bound"
    assert not s.contains(Ratio(counts=(3, 2, 5))), "above an upper bound"
    assert not s.contains(Ratio(counts=(50, 20, 30))), "another number of rows"
    assert not s.contains(Ratio(counts=(5, 5))), "another number of domains"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lower": (5, 6), "upper": (10, 10)}, "from 11 to 20 rows in all, a mixture has 10"),
        ({"lower": (0, 0), "upper": (4, 5)}, "from 0 to 9 rows in all, a mixture has 10"),
        ({"lower": (3, 0), "upper": (2, 10)}, r"domain a: the bounds leave no number of rows \(from 3 to 2\)"),
        ({"lower": (0,), "upper": (10, 10)}, "got 2 names, 1 lower and 2 upper bounds"),
        ({"lower": (0, 0), "upper": (0, 0), "n_rows": 0}, "at least one row, got n_rows = 0"),
    ],
)
def test_an_impossible_space_is_refused(kwargs, message):
    with pytest.raises(RatioError, match=message):
        SimplexSpace(**{"names": ("a", "b"), "n_rows": 10, **kwargs})


# From a study --------------------------------------------------------------------------------------------------------


def study(bounds: list[tuple[float, float]], n_rows: int = 100, when_short: str = "cap", **mixture):
    return config_from(
        {
            "name": "toy",
            "model": {"path": "nowhere"},
            "domains": [{"name": f"d{i}", "source": "x.jsonl", "bounds": list(b)} for i, b in enumerate(bounds)],
            "mixture": {"n_rows": n_rows, "when_short": when_short, **mixture},
            "feedback": {"kind": "heldout_loss", "file": "task.jsonl"},
        },
        folder=Path(),
    )


def test_bounds_and_rows_become_whole_rows():
    s = SimplexSpace.of(study([(0.1, 0.3), (0, 1), (0, 0.555)]), [1000, 60, 1000])
    assert (s.lower, s.upper) == ((10, 0, 0), (30, 60, 55))
    assert s.names == ("d0", "d1", "d2")


def test_a_share_that_is_whole_but_for_rounding_counts_as_whole():
    # 0.29 · 100 is 28.999999999999996 in floats, 0.07 · 100 is 7.000000000000001.
    s = SimplexSpace.of(study([(0.07, 0.29), (0, 1)]), [1000, 1000])
    assert (s.lower[0], s.upper[0]) == (7, 29)


def test_repeat_lifts_the_cap_but_not_for_an_empty_domain():
    s = SimplexSpace.of(study([(0, 1)] * 3, when_short="repeat"), [5, 0, 100])
    assert s.upper == (100, 0, 100)


@pytest.mark.parametrize(
    ("config", "rows", "message"),
    [
        (study([(0, 1)] * 2), [40, 50], r"can give 90 rows \(d0 40, d1 50\), a mixture needs mixture.n_rows = 100"),
        (study([(0.5, 1), (0, 1)]), [40, 500], "domain d0: its lower bound asks for 50 rows, it has 40"),
        (study([(0, 1)] * 2, when_short="error"), [100, 99], "d1 has 99 rows and may be asked for 100.*cap or repeat"),
        (study([(0.34, 0.36), (0, 1)], n_rows=10), [99, 99], "domain d0: no whole number of 10 rows.*raise mixture"),
        (study([(0.3, 1)] * 3, n_rows=2), [9, 9, 9], "no mixture of 2 whole rows.*3 to 6; widen domains"),
        (study([(0, 1)] * 2), [100], "one number of rows per domain: got 1 for 2 domains"),
    ],
)
def test_a_study_that_cannot_be_served_says_what_to_change(config, rows, message):
    with pytest.raises(RatioError, match=message):
        SimplexSpace.of(config, rows)


@pytest.mark.parametrize(("repeats", "upper"), [(1, (40, 0, 100)), (2.5, (100, 0, 100)), (1.26, (50, 0, 100))])
def test_a_cap_on_repeats_bounds_a_domain(repeats, upper):
    # 2.5 · 40 = 100 rows and 1.26 · 40 = 50.4.
    s = SimplexSpace.of(study([(0, 1)] * 3, when_short="repeat", max_repeats=repeats), [40, 0, 1000])
    assert s.upper == upper


def test_a_whole_number_of_repeats_is_whole_whatever_floats_say():
    # 1.1 · 10 is 11.000000000000002 in floats, 1.15 · 100 is 114.99999999999999.
    s = SimplexSpace.of(study([(0, 1)] * 2, n_rows=200, when_short="repeat", max_repeats=1.15), [100, 100])
    assert s.upper == (115, 115)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0, 1), r"can give 80 rows \(d0 40, d1 40\) with mixture.max_repeats = 2, .*or raise mixture.max_repeats"),
        ((0.5, 1), "d0: its lower bound asks for 50 rows, with mixture.max_repeats = 2 it has 40; .*or raise mixture"),
    ],
)
def test_too_few_repeats_say_what_to_change(bounds, message):
    with pytest.raises(RatioError, match=message):
        SimplexSpace.of(study([bounds, (0, 1)], when_short="repeat", max_repeats=2), [20, 20])


# Start design --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vertices", [False, True])
@pytest.mark.parametrize("s", [space(4, 100), space(9, 1000, 0, 200), space(3, 4), space(2, 3), space(1, 7)])
def test_the_first_of_a_longer_design_are_the_shorter_design(s, vertices):
    long = start_design(s, 30, seed=3, vertices=vertices)
    assert len(long) == 30
    assert all(s.contains(r) for r in long)
    for n in (1, 2, 7, 29):
        assert start_design(s, n, seed=3, vertices=vertices) == long[:n]


def test_uniform_comes_first_then_the_vertices():
    s = space(3, 30)
    kinds = [kind for kind, _ in zip(start_stream(s, 0, True), range(6), strict=False)]
    assert [kind for kind, _ in kinds] == ["uniform", "vertex", "vertex", "vertex", "random", "random"]
    assert [r.counts for r in start_design(s, 4, 0, True)] == [(10, 10, 10), (30, 0, 0), (0, 30, 0), (0, 0, 30)]
    assert start_design(s, 1, 0, False) == [s.uniform()]


def test_a_prior_ratio_comes_second():
    s, first = space(3, 30), Ratio(counts=(20, 5, 5))
    kinds = [kind for kind, _ in zip(start_stream(s, 0, True, first), range(6), strict=False)]
    assert [kind for kind, _ in kinds] == ["uniform", "prior", "vertex", "vertex", "vertex", "random"]
    design = start_design(s, 8, 0, True, first)
    assert design[1] == first
    assert [design[0], *design[2:]] == start_design(s, 7, 0, True), "the others stay as they were"


def test_a_prior_ratio_that_is_another_anyway_comes_once():
    s = space(3, 30)
    assert start_design(s, 8, 0, True, s.uniform()) == start_design(s, 8, 0, True)
    vertex = Ratio(counts=(0, 30, 0))
    design = start_design(s, 8, 0, True, vertex)
    assert design[1] == vertex
    assert len(set(design)) == 8


def test_a_prior_ratio_outside_the_space_is_refused():
    with pytest.raises(RatioError, match=r"prior ratio .*outside the space.*search.prior"):
        start_design(space(3, 30, 0, 18), 2, 0, False, Ratio(counts=(30, 0, 0)))


def test_vertices_are_projected_into_the_bounds():
    s = space(3, 30, 3, 18)
    # By hand: all that domain 0 may have, 18, and the other 12 rows shared out.
    assert start_design(s, 2, 0, True)[1].counts == (18, 6, 6)


def test_a_design_stays_what_it_was():
    """Studies resume: the same seed must give the same ratios in every later version."""
    assert [r.counts for r in start_design(space(4, 1000, 50, 700), 4, 7, False)[1:]] == [
        (430, 122, 108, 340),
        (211, 334, 278, 177),
        (484, 166, 227, 123),
    ]
    assert [r.counts for r in start_design(space(3, 100_000, 0, 34_000), 3, 7, False)[1:]] == [
        (33984, 33517, 32499),
        (33368, 33056, 33576),
    ]


def test_a_design_depends_on_its_seed():
    s = space(5, 1000)
    assert start_design(s, 5, 0, False)[1:] != start_design(s, 5, 1, False)[1:]


@pytest.mark.parametrize("s", [space(3, 4), space(2, 30), space(4, 50, 0, 13), space(5, 3)])
def test_points_differ_as_long_as_the_lattice_has_others(s):
    n = len(lattice(s))
    design = start_design(s, n + 3, 0, True)
    assert len(set(design[:n])) == n
    assert len(set(design)) == n


@pytest.mark.parametrize("s", [space(3, 100_000), space(3, 100_000, 10_000, 60_000), space(6, 100_000, 0, 25_000)])
def test_draws_are_uniform_within_the_bounds(s):
    """Against plain rejection sampling: means and variances per domain, and equal for all domains."""
    drawn = np.array([r.values for r in start_design(s, 1500, 0, False)[1:]])
    least, most = np.array(s.lower) / s.n_rows, np.array(s.upper) / s.n_rows
    uniform = np.random.default_rng(0).dirichlet(np.ones(s.n_domains), 400_000)
    uniform = uniform[((uniform >= least) & (uniform <= most)).all(axis=1)]
    assert len(uniform) > 300
    error = 4 * uniform.std(axis=0) * (1 / len(drawn) + 1 / len(uniform)) ** 0.5
    assert np.all(np.abs(drawn.mean(axis=0) - uniform.mean(axis=0)) < error)
    assert drawn.std(axis=0) == pytest.approx(uniform.std(axis=0), rel=0.15)


def test_the_walk_is_uniform_too():
    """Where caps leave nothing to rejection; here on a polytope where rejection still works."""
    least, most = np.array([0.0, 0.1, 0.0]), np.array([0.3, 0.9, 0.6])
    walk = _walk_inside(least, most, np.random.default_rng(0))
    walked = np.array([next(walk) for _ in range(1500)])
    assert np.all((walked >= least - 1e-12) & (walked <= most + 1e-12))
    assert walked.sum(axis=1) == pytest.approx(1)
    uniform = np.random.default_rng(0).dirichlet(np.ones(3), 100_000)
    uniform = uniform[((uniform >= least) & (uniform <= most)).all(axis=1)]
    assert walked.mean(axis=0) == pytest.approx(uniform.mean(axis=0), abs=0.02)
    assert walked.std(axis=0) == pytest.approx(uniform.std(axis=0), rel=0.1)


def test_tight_caps_on_many_domains():
    s = space(50, 10_000, 0, 220)
    design = start_design(s, 40, 0, True)
    assert len(set(design)) == 40
    assert all(s.contains(r) for r in design)


def test_importing_the_search_loads_no_heavy_library():
    code = (
        "import sys, duet_ray.search; "
        "print([m for m in ('torch', 'ax', 'botorch', 'ray', 'scipy', 'pandas') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "[]"
