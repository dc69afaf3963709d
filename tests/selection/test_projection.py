import numpy as np
import pytest
import torch

from duet_ray.selection.projection import CountSketch
from tests.selection.explicit_gradients import dense, flat

SHAPES = [(4, 9), (16, 4), (1, 1)]
SIZE = 12


def weights() -> list[torch.Tensor]:
    return [torch.empty(shape) for shape in SHAPES]


def vector(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def test_a_projection_is_the_product_with_its_matrix():
    sketch, x = CountSketch.draw(weights(), SIZE, seed=3), vector(0)
    matrix = dense(sketch)
    assert (matrix.abs().sum(dim=0) == 1).all()  # one ±1 a column
    np.testing.assert_allclose(sketch.project(x), matrix @ flat(x), rtol=1e-5, atol=1e-6)


def test_rows_are_projected_as_they_would_be_alone():
    sketch, rows = CountSketch.draw(weights(), SIZE, seed=3), [vector(seed) for seed in range(5)]
    sums = sketch.zeros(5)
    for index in (2, 0, 1):
        sketch.add(sums, index, torch.stack([row[index].flatten() for row in rows]))
    for ours, row in zip(sketch.finish(sums), rows, strict=True):
        torch.testing.assert_close(ours, sketch.project(row))


def test_back_is_the_transpose():
    sketch, x = CountSketch.draw(weights(), SIZE, seed=3), vector(0)
    y = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    back = sketch.back(y, x)
    assert [b.shape for b in back] == [b.shape for b in x]
    np.testing.assert_allclose(flat(back), dense(sketch).T @ y.double(), rtol=1e-6)


def test_the_seed_decides():
    first, again, other = (CountSketch.draw(weights(), SIZE, seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.buckets, again.buckets, strict=True))
    assert not torch.equal(first.buckets[0], other.buckets[0])
    assert not torch.equal(first.buckets[0][:16], first.buckets[1][:16])  # linears have buckets of their own


@pytest.mark.parametrize("cosine", [0.0, 0.9])
def test_inner_products_are_unbiased_and_vary_as_the_formula_says(cosine):
    x, noise = vector(0), vector(1)
    y = [cosine * a + (1 - cosine**2) ** 0.5 * b for a, b in zip(x, noise, strict=True)]
    a, b = flat(x), flat(y)
    n = 2000
    sketches = (CountSketch.draw(weights(), SIZE, seed) for seed in range(n))
    products = np.array([float(sketch.project(x) @ sketch.project(y)) for sketch in sketches])
    variance = float((a @ a) * (b @ b) + (a @ b) ** 2 - 2 * (a * a * b * b).sum()) / SIZE
    assert abs(products.mean() - float(a @ b)) < 4 * (variance / n) ** 0.5
    assert products.var() == pytest.approx(variance, rel=0.2)
