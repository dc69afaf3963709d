"""The series on small dense matrices, where its sum, its limit and its eigenvalues are known; then on a model."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from duet_ray.config import SelectionConfig, TrainingConfig
from duet_ray.errors import SelectionError
from duet_ray.selection import influence
from duet_ray.selection import select as select_rows
from duet_ray.selection.base import RowWeights, SelectionContext
from duet_ray.selection.lissa import Product, Series, largest_eigenvalue, neumann_series, random_vector
from tests.selection.softmax_regression import Problem
from tests.selection.toy_domain import toy_domain
from tests.tiny_model import tiny_llama, tiny_tokenizer

TRAINING = TrainingConfig(
    rank=4, alpha=8, learning_rate=1e-2, batch_size=8, max_tokens=16, target_modules=["q_proj", "v_proj", "down_proj"]
)


def matrix_with(eigenvalues: list[float]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64))[0]
    return (q * torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


def by(matrix: torch.Tensor) -> Product:
    """Two tensors, as a model with two linears has: the halves of a vector."""

    def product(v: list[torch.Tensor]) -> list[torch.Tensor]:
        return list((matrix @ torch.cat(v)).split([2, len(matrix) - 2]))

    return product


def halves(v: torch.Tensor) -> list[torch.Tensor]:
    return list(v.split([2, len(v) - 2]))


def series_of(matrix: torch.Tensor, v: torch.Tensor, *, depth: int, scale: float) -> Series:
    product = by(matrix)
    return neumann_series(product, lambda x, _: product(x), halves(v), depth=depth, scale=scale)


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_the_series_is_the_sum_of_matrix_powers(depth):
    matrix, scale = matrix_with([0.1, 0.5, 1, 2]), 2.5
    v = torch.ones(4, dtype=torch.float64)
    rest = torch.eye(4, dtype=torch.float64) - matrix / scale
    expected = sum(torch.linalg.matrix_power(rest, j) @ v for j in range(depth)) / scale
    series = series_of(matrix, v, depth=depth, scale=scale)
    torch.testing.assert_close(torch.cat(series.x), expected)
    assert series.n_terms == depth
    residual = v - matrix @ expected
    assert series.residual == pytest.approx(float(residual.norm() / v.norm()))
    assert series.curvature == pytest.approx(float(residual @ matrix @ residual / (residual @ residual)))


@pytest.mark.parametrize("scale", [1.2, 3])
def test_the_series_converges_to_the_solution(scale):
    matrix, v = matrix_with([0.1, 0.5, 1, 2]), torch.ones(4, dtype=torch.float64)
    series = series_of(matrix, v, depth=600, scale=scale)
    torch.testing.assert_close(torch.cat(series.x), torch.linalg.solve(matrix, v), rtol=1e-6, atol=1e-6)
    assert series.residual < 1e-6
    assert not series.diverged


def test_below_half_of_the_largest_eigenvalue_it_diverges_and_shows_that_eigenvalue():
    matrix, v = matrix_with([0.1, 0.5, 1, 2]), torch.ones(4, dtype=torch.float64)
    assert not series_of(matrix, v, depth=60, scale=1.02).diverged
    series = series_of(matrix, v, depth=60, scale=0.9)
    assert series.diverged
    assert series.curvature == pytest.approx(2, rel=1e-3)


def test_a_hopeless_series_is_given_up_while_its_numbers_are_finite():
    matrix, v = matrix_with([0.1, 0.5, 1, 2]), torch.ones(4, dtype=torch.float64)
    series = series_of(matrix, v, depth=10_000, scale=0.5)
    assert series.n_terms < 20
    assert series.diverged
    assert math.isfinite(series.residual)


def test_negative_curvature_shows_in_what_is_left():
    matrix, v = matrix_with([-0.2, 0.5, 1, 2]), torch.ones(4, dtype=torch.float64)
    series = series_of(matrix, v, depth=200, scale=2.5)
    assert series.diverged
    assert series.curvature == pytest.approx(-0.2, rel=1e-3)


def test_a_product_that_is_not_finite_is_a_divergence():
    v = halves(torch.ones(4))
    series = neumann_series(
        lambda x: [t * math.nan for t in x], lambda x, _: [t * math.nan for t in x], v, depth=9, scale=1
    )
    assert series.diverged
    assert series.n_terms == 1


def test_every_term_is_given_its_number():
    seen: list[int] = []
    done: list[int] = []
    product = by(matrix_with([1, 1, 1]))

    def term(x: list[torch.Tensor], index: int) -> list[torch.Tensor]:
        seen.append(index)
        return product(x)

    v = halves(torch.ones(3, dtype=torch.float64))
    neumann_series(product, term, v, depth=4, scale=2, on_term=done.append)
    assert seen == [1, 2, 3]
    assert done == [2, 3, 4]


def test_with_a_scale_far_too_large_it_is_a_multiple_of_the_vector():
    matrix, v = matrix_with([0.1, 0.5, 1, 2]), torch.arange(1, 5, dtype=torch.float64)
    series = series_of(matrix, v, depth=100, scale=1e4)
    torch.testing.assert_close(torch.cat(series.x), v * 100 / 1e4, rtol=0.02, atol=0)
    assert series.residual > 0.97


@pytest.mark.parametrize("eigenvalues", [[0.1, 0.5, 1, 2], [-3, 0.5, 1, 2], [-1, 0.5, 1, 2], [2, 2, 2, 2]])
def test_power_iteration_finds_the_eigenvalue_of_largest_size_with_its_sign(eigenvalues):
    start = halves(random_vector([torch.zeros(4)], seed=0)[0].double())
    found = largest_eigenvalue(by(matrix_with(eigenvalues)), start)
    assert found == pytest.approx(max(eigenvalues, key=abs), rel=0.05)


def test_power_iteration_of_nothing_is_zero_and_of_a_broken_product_not_finite():
    start = halves(torch.ones(4))
    assert largest_eigenvalue(lambda v: [0 * t for t in v], start) == 0
    assert not math.isfinite(largest_eigenvalue(lambda v: [t * math.nan for t in v], start))


def test_a_start_follows_from_the_seed_and_not_from_the_global_generator():
    like = [torch.zeros(3), torch.zeros(2, 2)]
    torch.manual_seed(1)
    first = random_vector(like, seed=5)
    torch.manual_seed(2)
    again, other = random_vector(like, seed=5), random_vector(like, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def select(domain, **settings) -> RowWeights:
    model = tiny_llama()
    chosen = SelectionConfig(
        **{
            "method": "influence",
            "solver": "lissa",
            "lissa_depth": 12,
            "n_hessian_rows": 40,
            "batch_size": 40,
            **settings,
        }
    )
    load = lambda: (model, tiny_tokenizer())  # noqa: E731
    return select_rows(domain, SelectionContext(settings=chosen, training=TRAINING, seed=0, load_base=load))


@pytest.fixture(scope="module")
def usual() -> RowWeights:
    return select(toy_domain(48, 8))


def test_the_scale_is_half_more_than_the_largest_eigenvalue(usual):
    assert usual.details["lissa_scale"] == 1.5 * usual.details["largest_eigenvalue"]
    assert usual.details["lissa_terms"] == 12
    assert 0 < usual.details["lissa_residual"] < 1
    assert usual.notes[0].startswith(f"LiSSA stopped at a residual of {usual.details['lissa_residual']:.2g} after 12 ")
    assert "selection.lissa_depth" in usual.notes[0]


def test_the_batch_size_does_not_change_the_scores(usual):
    """40 rows are more than a term takes: which ones it takes is no matter of `selection.batch_size`."""
    assert usual.details["hessian_rows"] > influence.ROWS_PER_TERM
    scores = select(toy_domain(48, 8), batch_size=18).scores
    np.testing.assert_allclose(scores, usual.scores, rtol=1e-3, atol=1e-3 * np.abs(scores).max())


def test_mini_batches_come_near_to_what_all_rows_give(monkeypatch, usual):
    monkeypatch.setattr(influence, "ROWS_PER_TERM", 40)
    whole = select(toy_domain(48, 8))
    assert spearmanr(whole.scores, usual.scores).statistic > 0.95
    assert not np.allclose(whole.scores, usual.scores, rtol=1e-3)


def test_a_scale_that_is_too_small_is_an_error_that_says_what_is_large_enough(usual):
    largest = usual.details["largest_eigenvalue"]
    with pytest.raises(SelectionError) as caught:
        select(toy_domain(48, 8), lissa_scale=0.1 * largest)
    message = str(caught.value)
    assert message.startswith("domain letters: LiSSA diverged, with a residual of ")
    assert f"a scale of {0.1 * largest:.4g}, where the largest eigenvalue is about {largest:.4g}" in message
    assert "selection.lissa_scale: null" in message
    assert "selection.damping" in message


def test_a_scale_that_is_far_too_large_is_a_dot_product_of_gradients_and_says_so(monkeypatch, usual):
    far = select(toy_domain(48, 8), lissa_scale=1e6 * usual.details["largest_eigenvalue"])
    assert "is 1000000 times the largest eigenvalue" in far.notes[0]
    assert "dot products of gradients" in far.notes[0]
    monkeypatch.setattr(influence._Preparation, "inverse_hessian", lambda _self, _adapted, gradient: gradient)
    plain = select(toy_domain(48, 8)).scores
    assert spearmanr(far.scores, plain).statistic > 0.999
    assert spearmanr(usual.scores, plain).statistic < 0.99


def test_the_exact_hessian_of_a_network_is_indefinite_and_says_so():
    domain = toy_domain(48, 8, corrupted=0.5)
    with pytest.raises(SelectionError, match=r"domain letters: LiSSA diverged.*negative curvature.*gauss_newton"):
        select(domain, curvature="hessian", epochs=3, damping=1e-3, lissa_depth=300, n_hessian_rows=8)


def test_a_hessian_whose_largest_eigenvalue_is_negative_is_refused_before_the_series(monkeypatch):
    monkeypatch.setattr(influence.Hessian, "product", lambda _self, v: [-10 * x for x in v])
    with pytest.raises(SelectionError, match=r"nothing to converge to: the Hessian has negative curvature \(-10, the"):
        select(toy_domain(12, 4), curvature="hessian")


def test_a_product_with_the_hessian_that_is_not_finite_is_an_error(monkeypatch):
    monkeypatch.setattr(influence.GaussNewton, "product", lambda _self, v: [x * math.nan for x in v])
    with pytest.raises(SelectionError, match=r"domain letters: the largest eigenvalue cannot be estimated.*ekfac"):
        select(toy_domain(12, 4))


def test_on_a_convex_problem_mini_batches_are_near_the_closed_form(monkeypatch):
    problem = Problem(64, ridge=0.02)
    monkeypatch.setattr(influence, "scoring_model", problem.scoring_model)
    weights = problem.weights(solver="lissa", lissa_depth=100)
    assert weights.details["hessian_rows"] > influence.ROWS_PER_TERM
    assert spearmanr(weights.scores, problem.closed_form()).statistic > 0.95
