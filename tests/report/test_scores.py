"""What is kept of a domain's weights. Expected numbers are counted by hand."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from duet_ray.config import SelectionConfig
from duet_ray.report.scores import (
    TEXT_CHARACTERS,
    ShownRow,
    histogram,
    method_text,
    score_summary,
    seconds_spent,
    shortened,
    sparkline,
    visible,
)
from duet_ray.selection.base import RowWeights
from duet_ray.selection.weighting import from_scores


def texts(rows: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {"row": row, "source": "data/a.jsonl", "line": row + 1, "prompt": f"p{row}", "completion": f"c{row}"}
        for row in rows
    ]


def ids(rows: Sequence[ShownRow]) -> list[int]:
    return [row["row"] for row in rows]


# The histogram ------------------------------------------------------------------------------------------------------


def test_a_histogram_by_hand() -> None:
    shape = histogram(np.arange(9.0)[::-1])
    assert shape is not None
    np.testing.assert_allclose(shape["edges"], [0, 8 / 3, 16 / 3, 8])
    assert (shape["counts"], shape["n_below"], shape["n_above"]) == ([3, 3, 3], 0, 0)


def test_far_rows_are_counted_beside_the_histogram() -> None:
    # Half a percent of 1000 rows: the panel goes from the fifth row to the fifth from above, with four on either side.
    scores = np.concatenate([[-1e6] * 4, np.linspace(0, 1, 993), [1e6] * 3])
    shape = histogram(scores)
    assert shape is not None
    assert (shape["edges"][0], shape["n_below"]) == (0.0, 4)
    assert shape["n_above"] == 4
    assert shape["edges"][-1] == pytest.approx(1.0, abs=0.01)
    assert sum(shape["counts"]) == 992
    assert len(shape["counts"]) == 32, "the square root of the rows"


def test_at_most_forty_bins() -> None:
    shape = histogram(np.random.default_rng(0).standard_normal(5000))
    assert shape is not None
    assert len(shape["counts"]) == 40
    assert sum(shape["counts"]) + shape["n_below"] + shape["n_above"] == 5000


@pytest.mark.parametrize("scores", [[0.0] * 5, [3.7] * 4, [1.0, 1.0 + 1e-15], [-2.0]])
def test_equal_scores_have_no_histogram(scores: list[float]) -> None:
    assert histogram(np.array(scores)) is None


def test_two_rows_and_one_row_apart_from_all_others() -> None:
    two = histogram(np.array([1.0, 3.0]))
    assert two == {"edges": pytest.approx([1, 2, 3]), "counts": [1, 1], "n_below": 0, "n_above": 0}
    apart = histogram(np.array([0.0] * 9999 + [5.0]))
    assert apart is not None
    assert (apart["counts"][0], apart["counts"][-1], apart["edges"][-1]) == (9999, 1, 5.0)


@pytest.mark.parametrize("unit", [1e-300, 1e-9, 1.0, 1e300])
def test_the_unit_of_the_scores_changes_nothing(unit: float) -> None:
    scores = np.random.default_rng(1).standard_normal(400)
    shape, other = histogram(scores), histogram(scores * unit)
    assert shape is not None
    assert other is not None
    assert np.abs(np.subtract(shape["counts"], other["counts"])).sum() <= 2, "a row on an edge may change its bin"
    np.testing.assert_allclose(np.array(other["edges"]) / unit, shape["edges"])


# The rows at both ends ----------------------------------------------------------------------------------------------


def test_best_and_worst_rows_by_hand() -> None:
    weights = RowWeights(
        scores=np.array([3.0, 1.0, 2.0, 5.0, 4.0]), probabilities=np.array([0.2, 0.0, 0.1, 0.4, 0.3]), notes=("n",)
    )
    found = score_summary(weights, texts, method="m", n_shown=2)
    assert found["best"] == [
        {
            "row": row, "score": score, "times_uniform": pytest.approx(times), "place": None,
            "source": "data/a.jsonl", "line": row + 1, "prompt": f"p{row}", "completion": f"c{row}",
        }
        for row, score, times in [(3, 5.0, 2.0), (4, 4.0, 1.5)]
    ]  # fmt: skip
    assert [(r["row"], r["score"], r["times_uniform"]) for r in found["worst"]] == [(1, 1.0, 0.0), (2, 2.0, 0.5)]
    assert found["quantiles"] == [1, 2, 3, 4, 5]
    assert (found["n_rows"], found["n_drawable"], found["method"], found["notes"]) == (5, 4, "m", ["n"])
    assert found["effective_sample_size"] == pytest.approx(1 / (0.04 + 0.01 + 0.16 + 0.09))


def test_few_rows_stand_at_one_end_only() -> None:
    weights = from_scores(np.array([3.0, 1.0, 2.0]), SelectionConfig(method="influence"), "d")
    found = score_summary(weights, texts, method="m")
    assert (ids(found["best"]), ids(found["worst"])) == ([0, 2], [1])


def test_equal_scores_are_in_the_order_of_the_rows() -> None:
    weights = from_scores(np.array([1.0, 2.0, 1.0, 2.0]), SelectionConfig(method="influence"), "d")
    found = score_summary(weights, texts, method="m")
    assert (ids(found["best"]), ids(found["worst"])) == ([1, 3], [2, 0])


def test_an_order_is_shown_as_far_as_it_can_be_drawn() -> None:
    weights = RowWeights(order=np.array([4, 2, 0, 3, 1, 5]))
    found = score_summary(weights, texts, method="m", n_drawn=4, n_shown=2)
    assert [(r["row"], r["place"], r["score"], r["times_uniform"]) for r in found["best"]] == [
        (4, 1, None, None),
        (2, 2, None, None),
    ]
    assert [(r["row"], r["place"]) for r in found["worst"]] == [(3, 4), (0, 3)]
    assert (found["n_drawable"], found["has_order"], found["histogram"], found["quantiles"]) == (4, True, None, None)


def test_an_order_with_scores_shows_both() -> None:
    weights = from_scores(np.array([1.0, 9.0, 5.0, 7.0]), SelectionConfig(method="top_n"), "d")
    found = score_summary(weights, texts, method="m", n_drawn=2)
    assert [(r["row"], r["score"], r["place"]) for r in found["best"] + found["worst"]] == [(1, 9.0, 1), (3, 7.0, 2)]
    assert found["histogram"] is not None


@pytest.mark.parametrize("scores", [None, np.full(4, 2.0)], ids=["uniform", "equal"])
def test_rows_that_are_all_alike_have_no_best(scores: np.ndarray | None) -> None:
    def no_texts(_: Sequence[int]) -> list[dict[str, Any]]:
        raise AssertionError("nothing is read for nothing")

    found = score_summary(RowWeights(scores=scores, probabilities=np.full(4, 0.25)), no_texts, method="m")
    assert (found["best"], found["worst"], found["histogram"]) == ([], [], None)


def test_probabilities_without_scores_rank_the_rows() -> None:
    found = score_summary(RowWeights(probabilities=np.array([0.2, 0.7, 0.1])), texts, method="m")
    assert (ids(found["best"]), ids(found["worst"])) == ([1, 0], [2])


def test_a_summary_is_json() -> None:
    weights = RowWeights(
        scores=np.array([1.0, 2.0]),
        probabilities=np.array([0.5, 0.5]),
        details={"cg_residual": float("nan"), "scale": float("inf"), "damping": 0.5},
    )
    found = score_summary(weights, texts, method="m")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["details"] == {"cg_residual": None, "scale": None, "damping": 0.5}


# Texts --------------------------------------------------------------------------------------------------------------


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert visible("a\x1b[31m\x00b\r\nc\td\x7f\x9b\u202ee") == "a␛[31m␀b\nc\td␡\ufffd\ufffde"
    assert visible("مرحبا 数学 🙂") == "مرحبا 数学 🙂"


def test_long_texts_are_cut_and_say_so() -> None:
    def long(rows: Sequence[int]) -> list[dict[str, Any]]:
        return [{**row, "prompt": "x" * (TEXT_CHARACTERS + 1234)} for row in texts(rows)]

    row = score_summary(RowWeights(order=np.arange(2)), long, method="m")["best"][0]
    assert row["prompt"] == "x" * TEXT_CHARACTERS + "… (1,234 more characters)"
    assert row["completion"] == "c0"


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("2 + 2\n =", " 4", "2 + 2 = → 4"),
        ("", "only text", "only text"),
        ("", "0123456789" * 3, "0123456789012345678…"),
        ("a" * 30, "four", "a" * 12 + "… → four"),
        ("a" * 30, "b" * 30, "a" * 11 + "… → " + "b" * 4 + "…"),
        ("ask", "b" * 30, "ask → " + "b" * 13 + "…"),
    ],
)
def test_a_row_in_one_line(prompt: str, completion: str, expected: str) -> None:
    found = shortened(prompt, completion, width=20)
    assert found == expected
    assert len(found) <= 20


def test_sparklines_by_hand() -> None:
    assert sparkline([0, 1, 4, 8, 2]) == " ▁▄█▂"
    assert sparkline([0, 1, 4, 8, 2], unicode=False) == " .=@:"
    assert sparkline([1, 1000]) == "▁█", "a few rows are not none"
    assert sparkline([4] * 32 + [0] * 8, width=5) == "████ ", "bins are put together"


def test_seconds_spent() -> None:
    assert seconds_spent({"prepare_seconds": 2.0, "measure_seconds": 3.5, "damping": 9.0}) == 5.5
    assert seconds_spent({"damping": 9.0}) is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "uniform"}, "uniform"),
        ({"method": "influence"}, "influence (ekfac), rank weighting"),
        ({"method": "influence", "solver": "cg", "weighting": {"kind": "rank"}}, "influence (cg), rank weighting"),
        ({"method": "less", "weighting": {"kind": "shift"}}, "less, shift weighting"),
        ({"method": "remove_harmful"}, "remove_harmful (ekfac), the lowest 20% never drawn"),
        ({"method": "top_n", "solver": "lissa"}, "top_n (lissa), rows in order"),
        ({"method": "coreset", "pool": 2}, "coreset, rows in order, drawn from the first 2 × quota"),
        (
            {"method": "influence", "surrogate": {"path": "small"}, "weighting": {"kind": "rank"}},
            "influence (ekfac) by small, rank weighting",
        ),
    ],
)
def test_the_method_in_words(settings: dict[str, Any], expected: str) -> None:
    assert method_text(SelectionConfig.model_validate(settings)) == expected
