"""Counts that sum, draws that follow their weights, seeds that hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from duet_ray.errors import RatioError
from duet_ray.mixture import RowOrder, at_fidelity, draw_in_order, draw_mixture, draw_rows, rows_digest, rows_per_domain
from duet_ray.records import Ratio


def test_largest_remainder_by_hand() -> None:
    # 10 rows over (0.46, 0.34, 0.20) are 4.6, 3.4 and 2.0: floors 4, 3, 2 and one row over, to the remainder 0.6.
    assert rows_per_domain(np.array([0.46, 0.34, 0.20]), 10).tolist() == [5, 3, 2]
    assert rows_per_domain(np.array([1 / 3, 1 / 3, 1 / 3]), 10).tolist() == [4, 3, 3]
    assert rows_per_domain(np.array([0.0, 1.0, 0.0]), 7).tolist() == [0, 7, 0]
    assert rows_per_domain(np.array([1.0]), 1).tolist() == [1]
    assert rows_per_domain(np.full(5, 0.2), 3).tolist() == [1, 1, 1, 0, 0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(1, 100_000))
def test_counts_always_sum_and_stay_within_one_of_the_share(weights: list[float], n_rows: int) -> None:
    ratio = np.array(weights) + 1e-12
    ratio /= ratio.sum()
    counts = rows_per_domain(ratio, n_rows)
    assert counts.sum() == n_rows
    assert (np.abs(counts - ratio * n_rows) < 1 + 1e-6).all()


def test_off_the_simplex_is_refused() -> None:
    for ratio in ([0.5, 0.6], [1.2, -0.2], [float("nan"), 1.0]):
        with pytest.raises(RatioError, match=r"sums to 1|finite"):
            rows_per_domain(np.array(ratio), 10)


def test_a_lattice_ratio_gives_back_its_own_counts() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        counts = rng.multinomial(997, rng.dirichlet(np.full(9, 0.3)))
        assert rows_per_domain(Ratio(counts=tuple(counts.tolist())).values, 997).tolist() == counts.tolist()


def test_drawing_without_replacement_has_the_law_of_successive_draws() -> None:
    # With weights (1, 2, 3) the ordered pair (i, j) has probability w_i/6 · w_j/(6 − w_i).
    weights = np.array([1.0, 2.0, 3.0])
    rng = np.random.default_rng(1)
    n_draws = 20_000
    pairs = [tuple(draw_rows(weights, 2, rng)) for _ in range(n_draws)]
    expected, seen = [], []
    for i in range(3):
        for j in range(3):
            if i != j:
                expected.append(n_draws * weights[i] / 6 * weights[j] / (6 - weights[i]))
                seen.append(pairs.count((i, j)))
    assert stats.chisquare(seen, expected).pvalue > 1e-3


def test_no_row_twice_and_never_a_row_of_weight_zero() -> None:
    weights = np.r_[np.zeros(50), np.random.default_rng(0).random(50) + 1e-300]
    rows = draw_rows(weights, 50, np.random.default_rng(2))
    assert sorted(rows.tolist()) == list(range(50, 100))


def test_extreme_weights_do_not_overflow() -> None:
    rows = draw_rows(np.array([1e-320, 0.0, 1e300, 1e-310]), 3, np.random.default_rng(0))
    assert rows[0] == 2
    assert sorted(rows.tolist()) == [0, 2, 3]


def test_when_short() -> None:
    weights = np.ones(4)
    with pytest.raises(RatioError, match=r"domain maths: 5 rows asked for and 4 there; set mixture.when_short: repeat"):
        draw_rows(weights, 5, np.random.default_rng(0), domain="maths")
    rows = draw_rows(weights, 10, np.random.default_rng(0), when_short="repeat")
    counts = np.bincount(rows, minlength=4)
    assert counts.sum() == 10
    assert set(counts.tolist()) == {2, 3}


def test_with_replacement_follows_the_weights() -> None:
    rows = draw_rows(np.array([1.0, 3.0]), 40_000, np.random.default_rng(0), replacement=True)
    assert stats.binomtest(int((rows == 1).sum()), 40_000, 0.75).pvalue > 1e-3


def test_bad_weights_are_refused() -> None:
    for weights in ([0.0, 0.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(RatioError, match="domain a: row weights must be finite"):
            draw_rows(np.array(weights), 1, np.random.default_rng(0), domain="a")


def test_a_sample_depends_on_its_place_alone() -> None:
    ratio, weights = Ratio(counts=(30, 0, 70)), [np.ones(100), np.ones(5), np.random.default_rng(0).random(200)]
    draw = {
        (t, s): rows_digest(draw_mixture(ratio, weights, seed=7, trial=t, sample=s)) for t in (0, 1) for s in (0, 1)
    }
    assert len(set(draw.values())) == 4
    again = draw_mixture(ratio, weights, seed=7, trial=1, sample=0)
    assert rows_digest(again) == draw[1, 0]
    assert [len(r) for r in again.rows] == [30, 0, 70]
    assert rows_digest(draw_mixture(ratio, weights, seed=8, trial=1, sample=0)) != draw[1, 0]


ORDER = np.array([4, 2, 0, 1, 3])


def test_an_order_gives_its_first_rows() -> None:
    rng = np.random.default_rng(0)
    assert draw_in_order(RowOrder(ORDER), 3, rng).tolist() == [4, 2, 0]
    assert draw_in_order(RowOrder(ORDER), 5, rng).tolist() == ORDER.tolist()
    assert draw_in_order(RowOrder(ORDER), 0, rng).tolist() == []


def test_a_pool_lets_samples_differ_and_never_reaches_beyond_it() -> None:
    order = np.random.default_rng(1).permutation(1000)
    drawn = [draw_in_order(RowOrder(order, pool=1.5), 100, np.random.default_rng(seed)) for seed in range(200)]
    assert all(len(set(rows.tolist())) == 100 for rows in drawn)
    assert set(np.concatenate(drawn).tolist()) == set(order[:150].tolist())
    counts = np.bincount(np.concatenate(drawn), minlength=1000)[order[:150]]
    # Each row of the pool is in a draw with probability 2/3: 133 of 200, with a standard deviation of 6.7.
    assert (np.abs(counts - 200 * 2 / 3) < 5 * 6.7).all()


def test_a_short_order_repeats_or_is_refused() -> None:
    rng = np.random.default_rng(0)
    assert draw_in_order(RowOrder(ORDER), 12, rng, when_short="repeat").tolist() == [*ORDER, *ORDER, 4, 2]
    with pytest.raises(RatioError, match="domain a: 6 rows asked for and 5 there"):
        draw_in_order(RowOrder(ORDER), 6, rng, domain="a")


def test_orders_and_probabilities_stand_side_by_side_in_a_mixture() -> None:
    ratio = Ratio(counts=(2, 3))
    mixtures = [
        draw_mixture(ratio, [RowOrder(ORDER), np.full(5, 0.2)], seed=0, trial=0, sample=sample) for sample in range(20)
    ]
    assert all(m.rows[0].tolist() == [4, 2] for m in mixtures)
    assert len({tuple(m.rows[1].tolist()) for m in mixtures}) > 1


@pytest.mark.parametrize(
    ("counts", "fidelity", "expected"),
    [
        ((12, 6, 6), 0.5, (6, 3, 3)),
        ((10, 10, 4), 0.25, (3, 2, 1)),  # 6 rows; exactly 2.5, 2.5, 1
        ((23, 1, 0), 0.1, (2, 0, 0)),  # 2.4 → 2 rows; exactly 1.92, 0.08
        ((1, 1, 1), 0.01, (1, 0, 0)),  # never none
        ((0, 7, 0), 0.5, (0, 4, 0)),  # 3.5 is rounded up
    ],
)
def test_a_cheap_look_has_the_same_ratio(counts, fidelity, expected):
    assert at_fidelity(Ratio(counts=counts), fidelity).counts == expected


def test_a_whole_trial_is_the_ratio_itself_and_no_cheap_one_asks_for_more_rows():
    generator = np.random.default_rng(0)
    for _ in range(200):
        ratio = Ratio(counts=(1, *generator.integers(0, 50, size=4).tolist()))
        assert at_fidelity(ratio, 1.0) is ratio
        fidelity = float(generator.uniform(0.001, 1))
        cheap = at_fidelity(ratio, fidelity)
        assert cheap.n_rows == max(1, int(fidelity * ratio.n_rows + 0.5))
        assert all(few <= many for few, many in zip(cheap.counts, ratio.counts, strict=True))
        assert np.abs(np.array(cheap.counts) - fidelity * np.array(ratio.counts)).max() < 1.5


@pytest.mark.parametrize("fidelity", [0.0, -0.1, 1.01, float("nan")])
def test_a_fidelity_is_a_share(fidelity):
    with pytest.raises(RatioError, match="a fidelity is a share of the rows"):
        at_fidelity(Ratio(counts=(1, 1)), fidelity)
