import math

import numpy as np
import pytest

from duet_ray.config import SelectionConfig, WeightingConfig
from duet_ray.errors import SelectionError
from duet_ray.selection.weighting import SHIFT_EPSILON, from_scores, weigh

SHIFT = WeightingConfig(kind="shift")
SOFTMAX = WeightingConfig(kind="softmax", temperature=1.0)
RANK = WeightingConfig(kind="rank")


def test_shift_is_algorithm_2_as_intended():
    # By hand: I − min I = 0, 1, 3; ε is 3e-6.
    probabilities, notes = weigh(np.array([-1.0, 0.0, 2.0]), SHIFT, "a")
    epsilon = 3 * SHIFT_EPSILON
    np.testing.assert_allclose(probabilities, np.array([epsilon, 1 + epsilon, 3 + epsilon]) / (4 + 3 * epsilon))
    assert notes == ()


def test_shift_with_a_positive_minimum_still_starts_at_zero():
    low, _ = weigh(np.array([5.0, 6.0, 8.0]), SHIFT, "a")
    lower, _ = weigh(np.array([-1.0, 0.0, 2.0]), SHIFT, "a")
    np.testing.assert_allclose(low, lower, rtol=1e-9)


def test_one_standard_deviation_is_a_factor_of_exp_one_over_temperature():
    scores = np.array([0.0, 1.0])  # standard deviation 1/2: two of them lie between the rows
    for temperature in (0.5, 1.0, 4.0):
        probabilities, _ = weigh(scores, WeightingConfig(kind="softmax", temperature=temperature), "a")
        assert probabilities[1] / probabilities[0] == pytest.approx(math.exp(2 / temperature))


@pytest.mark.parametrize("weighting", [SHIFT, SOFTMAX, RANK])
def test_the_unit_of_the_scores_does_not_matter(weighting):
    scores = np.random.default_rng(0).normal(size=50)
    for factor in (1e-30, 1e-3, 1e30):
        np.testing.assert_allclose(weigh(scores * factor, weighting, "a")[0], weigh(scores, weighting, "a")[0])


@pytest.mark.parametrize("weighting", [SHIFT, WeightingConfig(kind="softmax", temperature=0.01)])
def test_every_row_can_be_drawn_and_the_sum_is_one(weighting):
    scores = np.concatenate([np.random.default_rng(0).normal(size=999), [1e4]])
    probabilities, _ = weigh(scores, weighting, "a")
    assert (probabilities > 0).all()
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert probabilities.argmax() == 999


@pytest.mark.parametrize("weighting", [SHIFT, SOFTMAX, RANK])
@pytest.mark.parametrize("value", [0.0, 3.0, -1e-20])
def test_equal_scores_are_uniform_and_say_so(weighting, value):
    probabilities, notes = weigh(np.full(4, value), weighting, "a")
    np.testing.assert_array_equal(probabilities, np.full(4, 0.25))
    assert "equal" in notes[0]
    assert "uniform" in notes[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_an_error_with_a_remedy(bad):
    with pytest.raises(
        SelectionError, match=r"domain maths: 1 of 3 scores are not finite; lower training\.learning_rate"
    ):
        weigh(np.array([0.0, bad, 1.0]), SOFTMAX, "maths")


def test_no_rows_is_an_error():
    with pytest.raises(SelectionError, match="domain maths: there are no training rows"):
        weigh(np.zeros(0), SOFTMAX, "maths")


def test_rank_is_the_place_in_the_order_and_equal_scores_share_theirs():
    # By hand: the places of 5, 1, 5, 100 from the lowest are (2 + 3) / 2, 1, (2 + 3) / 2 and 4; they sum to 10.
    probabilities, notes = weigh(np.array([5.0, 1.0, 5.0, 100.0]), RANK, "a")
    np.testing.assert_allclose(probabilities, [0.25, 0.1, 0.25, 0.4])
    assert notes == ()


def test_under_rank_a_heavy_tail_has_no_part_in_the_weights():
    scores = np.random.default_rng(0).standard_t(1.2, size=1000)
    scores[0] = 1e9
    ess = {}
    for weighting in (SHIFT, SOFTMAX, RANK):
        probabilities, _ = weigh(scores, weighting, "a")
        ess[weighting.kind] = 1 / np.square(probabilities).sum()
    assert ess["softmax"] < 2, "one row is drawn, and little else"
    # Ranks 1 … N have (Σr)² / Σr² = N (N + 1) / 2 · 3 / (2N + 1), which is 3/4 of N.
    assert ess["rank"] == pytest.approx(1000 * 1001 / 2 * 3 / 2001)


def test_remove_harmful_drops_the_lowest_share_and_knows_no_other_difference():
    scores = np.array([0.3, -5.0, 9.0, 0.1, 0.2])
    settings = SelectionConfig(method="remove_harmful", harmful_fraction=0.4)
    weights = from_scores(scores, settings, "a")
    np.testing.assert_allclose(weights.probabilities, [1 / 3, 0, 1 / 3, 0, 1 / 3])
    assert weights.effective_sample_size == pytest.approx(3)
    # A fifth of 9 rows is 1.8: one row is dropped, so that a study knows the number before anything is scored.
    nine = from_scores(np.arange(9.0), SelectionConfig(method="remove_harmful"), "a")
    assert np.flatnonzero(nine.probabilities == 0).tolist() == [0]


def test_remove_harmful_says_when_its_choice_means_nothing():
    weights = from_scores(np.zeros(10), SelectionConfig(method="remove_harmful"), "a")
    assert np.flatnonzero(weights.probabilities == 0).tolist() == [8, 9]
    assert "which rows are dropped means nothing" in weights.notes[0]


def test_top_n_is_the_order_of_the_scores():
    weights = from_scores(np.array([0.3, -5.0, 9.0, 0.3]), SelectionConfig(method="top_n"), "a")
    assert weights.order.tolist() == [2, 0, 3, 1]
    assert weights.probabilities is None


@pytest.mark.parametrize("name", ["top_n", "remove_harmful", "influence"])
def test_scores_that_are_not_finite_are_an_error_under_every_use(name):
    with pytest.raises(SelectionError, match="domain a: 1 of 3 scores are not finite"):
        from_scores(np.array([1.0, math.nan, 2.0]), SelectionConfig(method=name), "a")
