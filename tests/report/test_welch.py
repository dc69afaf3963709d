"""The interval of a difference, against SciPy's own tests and printed tables of Student's t."""

import math

import pytest
from scipy import stats

from duet_ray.report.summary import Measurement
from duet_ray.report.welch import welch

BASE = Measurement(values=(3.0,), trained=False, exact=True)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((2.25, 2.27), (2.50, 2.54)),
        ((1.0, 2.0, 4.0), (1.5, 1.6, 1.4, 1.55)),
        ((1e-9, 3e-9), (2e-9, 5e-9, 4e-9)),
        ((1e-170, 3e-170), (2e-170, 5e-170, 4e-170)),
    ],
)
def test_two_sides_as_scipy_has_them(a: tuple[float, ...], b: tuple[float, ...]) -> None:
    found, scale = welch(Measurement(values=a), Measurement(values=b)), 1 / a[0]
    # SciPy's squares of squares underflow for tiny values, and the test does not depend on the unit.
    reference = stats.ttest_ind([v * scale for v in a], [v * scale for v in b], equal_var=False)
    low, high = reference.confidence_interval(0.95)
    assert found.degrees_of_freedom == pytest.approx(reference.df)
    assert [v * scale for v in found.interval] == pytest.approx([low, high])
    assert found.excludes_zero == (reference.pvalue < 0.05)


def test_an_exact_side_leaves_the_test_of_one_sample() -> None:
    values = (2.1, 2.4, 2.2, 2.6)
    found = welch(Measurement(values=values), BASE)
    reference = stats.ttest_1samp(values, 3.0)
    low, high = reference.confidence_interval(0.95)
    assert found.degrees_of_freedom == pytest.approx(3)
    assert found.interval == pytest.approx((low - 3.0, high - 3.0))


@pytest.mark.parametrize(("n", "quantile"), [(2, 4.3027), (3, 2.7764), (6, 2.2281), (31, 2.0003)])
def test_quantiles_of_the_tables_for_equal_sides(n: int, quantile: float) -> None:
    # Equal errors and n repeats a side: 2 n - 2 degrees of freedom.
    values = tuple((-1.0) ** i for i in range(n))
    found = welch(Measurement(values=values), Measurement(values=values))
    assert found.degrees_of_freedom == pytest.approx(2 * n - 2)
    assert found.quantile == pytest.approx(quantile, abs=1e-4)
    assert found.standard_error == pytest.approx(math.sqrt(2) * Measurement(values=values).standard_error)


def test_no_interval_where_the_error_is_not_known() -> None:
    pair, once = Measurement(values=(2.0, 2.1)), Measurement(values=(2.0,))
    assert welch(pair, once) is None
    assert welch(once, BASE) is None
    assert welch(pair, Measurement(values=(3.0,), trained=False)) is None, "a random feedback, measured once"
    assert welch(Measurement(values=(2.0, 2.0)), BASE) is None, "no spread anywhere"
