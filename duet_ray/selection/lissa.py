"""LiSSA: A⁻¹v by a Neumann series over mini-batches (Agarwal et al. 2017; Koh & Liang 2017, section 3).

For a symmetric A with eigenvalues in (0, 2σ),

    A⁻¹ v = (1/σ) Σ_j (I − A/σ)^j v,    or x ← x + (v − A x)/σ from x = v/σ on,

in which every term may put the curvature of another small mini-batch in place of A's. A term's cost then does not grow
with the number of rows; conjugate gradients, which take all rows for every product, need far fewer of them. The noise
of the mini-batches stays in the result, the smaller the larger σ is.

A direction of eigenvalue μ is solved after about σ/μ terms; until then it is multiplied by depth/σ. So the scale σ
decides everything. Below half the largest eigenvalue the series diverges. Far above it (the 1e4 of published code, on
a model whose largest eigenvalue is 1) no direction is solved within a usual depth, and the result is v times a
constant: scores are plain dot products of gradients, in the same order. 1.5 times the largest eigenvalue leaves a
mini-batch room to have a larger one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from duet_ray.selection.gradients import Vector
from duet_ray.selection.hessian import dot

Product = Callable[[Vector], Vector]

POWER_ITERATIONS = 20
_POWER_TOLERANCE = 0.01
_HOPELESS = 1e6
"""A term whose residual is so many times |v| is on its way to infinity."""


@dataclass(frozen=True)
class Series:
    """What a Neumann series came to, by all rows."""

    x: Vector
    n_terms: int
    """Fewer than asked for if it was given up."""
    residual: float
    """|v − A x| / |v|. Not finite if a product was."""
    curvature: float
    """rᵀA r / rᵀr of r = v − A x. Where a series grows, r turns to the eigenvector that makes it grow: this is then an
    eigenvalue below 0 or above twice the scale. NaN if r is 0."""

    @property
    def diverged(self) -> bool:
        """x is worse than no solution at all, by more than rounding."""
        return not self.residual <= 1.01


def neumann_series(
    product: Product,
    term: Callable[[Vector, int], Vector],
    v: Vector,
    *,
    depth: int,
    scale: float,
    on_term: Callable[[int], None] | None = None,
) -> Series:
    """The sum of the first `depth` terms.

    Args:
        product: x → A x.
        term: (x, index) → A x by the mini-batch of that term; 1, 2, … depth − 1.
    """
    x = [t / scale for t in v]
    size = math.sqrt(dot(v, v))
    n_terms = 1
    while n_terms < depth:
        rest = _minus(v, term(x, n_terms))
        if not math.sqrt(dot(rest, rest)) <= _HOPELESS * size:
            break
        for xi, ri in zip(x, rest, strict=True):
            xi.add_(ri, alpha=1 / scale)
        n_terms += 1
        if on_term is not None:
            on_term(n_terms)
    rest = _minus(v, product(x))
    left = dot(rest, rest)
    curvature = dot(rest, product(rest)) / left if left > 0 else math.nan
    return Series(x, n_terms, math.sqrt(left) / size if size > 0 else 0.0, curvature)


def _minus(a: Vector, b: Vector) -> Vector:
    return [x - y for x, y in zip(a, b, strict=True)]


def largest_eigenvalue(product: Product, start: Vector, on_iteration: Callable[[int], None] | None = None) -> float:
    """The eigenvalue of largest size, with its sign, by power iteration.

    Args:
        start: a random vector.

    Returns:
        A Rayleigh quotient: at most the true one in size, and some 20 % below it at worst where many are close to it.
        0 or not finite where the product is.
    """
    x, value = start, 0.0
    for iteration in range(1, POWER_ITERATIONS + 1):
        length = math.sqrt(dot(x, x))
        if not (math.isfinite(length) and length > 0):
            return length
        x = [t / length for t in x]
        image = product(x)
        last, value = value, dot(x, image)
        if on_iteration is not None:
            on_iteration(iteration)
        if abs(value - last) <= _POWER_TOLERANCE * abs(value):
            break
        x = image
    return value


def random_vector(like: Vector, seed: int) -> Vector:
    """Standard normal entries, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(v.shape, generator=generator).to(v.device) for v in like]
