"""H⁻¹v over the LoRA linears, for H the damped Gauss–Newton matrix of the mean NLL per completion token.

The exact Hessian of a network is indefinite, so influence functions use the Gauss–Newton matrix, which for a softmax
output equals the Fisher information, F = (1/N) Σ_rows E_y[g gᵀ], g the gradient of a row's loss with labels y drawn
from the model itself and N the number of completion tokens (Martens 2020). All solvers solve (F + λI) x = v, where
the caller sets λ relative to the mean eigenvalue of F, one number for the whole matrix:

- `Ekfac` (George et al. 2018; Grosse et al. 2023): F is taken as block diagonal, one block per linear; a block's
  eigenvectors as Kronecker products of those of its input and output-gradient covariances; its eigenvalues are
  measured in that basis. Two passes over the rows, then any number of solves for nothing. It holds two square matrices
  per linear, of its input and its output width.
- `conjugate_gradient` on `GaussNewton`: no approximation but its iteration cap, and the off-diagonal blocks are in.
  One forward pass with tangents and one backward pass over all rows for every iteration.
- `lissa.neumann_series`: the same matrix, by mini-batches.

The last two also take the exact `Hessian`, which is the Gauss–Newton matrix where the logits are linear in the weights.
Elsewhere it may have negative eigenvalues larger than λ, and then neither has a solution to find: they say so.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call

from duet_ray.likelihood import Batch, autocast, collate
from duet_ray.selection.gradients import AdaptedModel, OnPair, Rows, Vector, add_to, backward_pairs, trainable

OnBatch = Callable[[Batch], OnPair]
"""Makes what is called for every linear of one batch."""


def dot(a: Vector, b: Vector) -> float:
    """aᵀb, summed in float64."""
    return float(sum((x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)))


def completion_logits(adapted: AdaptedModel, model: Callable[..., Any], batch: Batch) -> torch.Tensor:
    """`(batch.n_loss_tokens, vocabulary)` float32: the logits where a token is predicted."""
    with autocast(adapted.model):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return logits[:, :-1][batch.loss_mask[:, 1:]].float()


def sampled_pairs(
    adapted: AdaptedModel, rows: Rows, seed: int, on_batch: OnBatch, on_rows: Callable[[int], None] | None = None
) -> int:
    """Backward passes with labels drawn from the model's own predictions: g of the Fisher information.

    The labels of a row depend on `seed` and its position in `rows` alone: neither the batch size nor a second pass
    changes them.

    Args:
        on_rows: called after each batch with the number of rows done.

    Returns:
        The number of completion tokens, N.
    """
    n_loss_tokens, done = 0, 0
    for ids, batch in adapted.batches(rows):
        counts = batch.loss_mask.sum(dim=1).tolist()
        draws = [np.random.default_rng([seed, i]).random(n) for i, n in zip(ids, counts, strict=True)]
        u = torch.from_numpy(np.concatenate(draws)).to(adapted.device, torch.float32)

        def losses(batch: Batch, u: torch.Tensor = u) -> torch.Tensor:
            logits = completion_logits(adapted, adapted.model, batch)
            cumulated = logits.detach().softmax(dim=-1).cumsum(dim=-1)
            labels = torch.searchsorted(cumulated, u[:, None]).squeeze(1).clamp_(max=logits.shape[-1] - 1)
            return F.cross_entropy(logits, labels, reduction="none")

        backward_pairs(adapted, batch, losses, on_batch(batch))
        n_loss_tokens += sum(counts)
        done += len(ids)
        if on_rows is not None:
            on_rows(done)
    return n_loss_tokens


def mean_eigenvalue(adapted: AdaptedModel, rows: Rows, seed: int) -> float:
    """trace(F) / n_parameters, by Σ|g|² over one draw of labels per row."""
    total = torch.zeros((), dtype=torch.float64, device=adapted.device)

    def on_batch(_: Batch) -> OnPair:
        def on_pair(_index: int, x: torch.Tensor, delta: torch.Tensor) -> None:
            total.add_(_row_gradients(x, delta).square().sum(dtype=torch.float64))

        return on_pair

    n_loss_tokens = sampled_pairs(adapted, rows, seed, on_batch)
    return float(total) / max(1, n_loss_tokens) / adapted.n_parameters


def _row_gradients(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """`(b, out, in)`: every row's gradient for one linear."""
    return delta.transpose(1, 2) @ x


def _rotated_gradients(x: torch.Tensor, delta: torch.Tensor, q_in: torch.Tensor, q_out: torch.Tensor) -> torch.Tensor:
    """`(b, out, in)`: Q_outᵀ g Q_in of every row. A side is turned before or after the sum over tokens: the cheaper."""
    n_tokens, n_in, n_out = x.shape[1], x.shape[2], delta.shape[2]
    early_in, early_out = n_tokens < n_out, n_tokens < n_in
    rotated = _row_gradients(x @ q_in if early_in else x, delta @ q_out if early_out else delta)
    rotated = rotated if early_in else rotated @ q_in
    return rotated if early_out else q_out.T @ rotated


@dataclass(frozen=True)
class Ekfac:
    """An eigenvalue-corrected Kronecker factorisation of F, one block per linear."""

    input_bases: list[torch.Tensor]
    """Per linear, `(in, in)`: columns are eigenvectors of the input covariance. Linears with the same inputs share one.
    """
    output_bases: list[torch.Tensor]
    """Per linear, `(out, out)`: columns are eigenvectors of the output-gradient covariance."""
    eigenvalues: list[torch.Tensor]
    """Per linear, `(out, in)`: (1/N) Σ_rows (Q_outᵀ g Q_in)², the diagonal of F in that basis."""

    @classmethod
    def fit(cls, adapted: AdaptedModel, rows: Rows, seed: int, on_rows: Callable[[int], None] | None = None) -> "Ekfac":
        """Estimate the factors, their eigenbases and the eigenvalues from `rows`, with two passes over them.

        Args:
            on_rows: called after each batch with the number of rows done, up to twice `len(rows)`.
        """
        firsts = first_with_the_same_inputs(adapted, rows)
        inputs = {index: _square(adapted.linears[index].in_features, adapted) for index in sorted(set(firsts))}
        outputs = {index: _square(linear.out_features, adapted) for index, linear in enumerate(adapted.linears)}

        def covariances(batch: Batch) -> OnPair:
            # Inputs on padding are not zero, unlike the gradients there.
            mask = batch.attention_mask[:, :, None].float()

            def on_pair(index: int, x: torch.Tensor, delta: torch.Tensor) -> None:
                delta = delta.flatten(0, 1)
                outputs[index].addmm_(delta.T, delta)
                if index in inputs:
                    x = (x * mask).flatten(0, 1)
                    inputs[index].addmm_(x.T, x)

            return on_pair

        sampled_pairs(adapted, rows, seed, covariances, on_rows)
        # In place of the covariances, one by one: the matrices are the largest thing here.
        for matrices in (inputs, outputs):
            for index in matrices:
                matrices[index] = _eigenvectors(matrices[index])
        eigenvalues = [torch.zeros_like(w, dtype=torch.float32) for w in adapted.weights]

        def squares(_: Batch) -> OnPair:
            def on_pair(index: int, x: torch.Tensor, delta: torch.Tensor) -> None:
                rotated = _rotated_gradients(x, delta, inputs[firsts[index]], outputs[index])
                eigenvalues[index].add_(rotated.square().sum(dim=0))

            return on_pair

        second = None if on_rows is None else lambda done: on_rows(len(rows) + done)
        n_loss_tokens = sampled_pairs(adapted, rows, seed, squares, second)
        return cls(
            [inputs[first] for first in firsts],
            list(outputs.values()),
            [e / max(1, n_loss_tokens) for e in eigenvalues],
        )

    @property
    def mean_eigenvalue(self) -> float:
        """trace(F) / n_parameters."""
        return sum(float(e.sum(dtype=torch.float64)) for e in self.eigenvalues) / sum(
            e.numel() for e in self.eigenvalues
        )

    def solve(self, vector: Vector, damping: float) -> Vector:
        """(F + damping · I)⁻¹ vector, exactly, for this factorisation."""
        solution = []
        for v, q_in, q_out, e in zip(vector, self.input_bases, self.output_bases, self.eigenvalues, strict=True):
            solution.append(q_out @ ((q_out.T @ v @ q_in) / (e + damping)) @ q_in.T)
        return solution


def first_with_the_same_inputs(adapted: AdaptedModel, rows: Rows) -> list[int]:
    """Per linear, the index of the first one that is given the same inputs, as query, key and value are.

    It is looked up on one row, bit by bit: the inputs may be copies of each other. Were they to differ on another row,
    the basis would still be orthonormal, and EK-FAC a little further from F.
    """
    inputs: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        return lambda _module, args: inputs.update({index: args[0]})

    handles = [linear.register_forward_pre_hook(keep(index)) for index, linear in enumerate(adapted.linears)]
    try:
        with torch.no_grad(), autocast(adapted.model):
            batch = collate(rows.rows([0]), adapted.pad_id, adapted.device)
            adapted.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    firsts: dict[Any, int] = {}
    keys = [
        (x.shape, x.float().cpu().numpy().tobytes()) if (x := inputs.get(index)) is not None else index
        for index in range(len(adapted.linears))
    ]
    return [firsts.setdefault(key, index) for index, key in enumerate(keys)]


def _square(size: int, adapted: AdaptedModel) -> torch.Tensor:
    return torch.zeros(size, size, device=adapted.device)


def _eigenvectors(covariance: torch.Tensor) -> torch.Tensor:
    """Eigenvectors as columns. The scale is taken out: gradients of a nearly converged model are tiny."""
    scaled = covariance / covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    try:
        return torch.linalg.eigh(scaled)[1]
    except torch.linalg.LinAlgError:  # float32 did not converge, as it may with many equal eigenvalues
        return torch.linalg.eigh(scaled.double())[1].float()


class Curvature(Protocol):
    """A symmetric matrix over the LoRA linears, known by its products."""

    def product(self, vector: Vector) -> Vector:
        """Matrix · vector. The model's attention must be differentiable twice: call it under `eager_attention`."""
        ...


@dataclass(frozen=True)
class GaussNewton:
    """Products with F over fixed rows: Jᵀ(diag(p) − ppᵀ)J v / N, J the logits' Jacobian."""

    adapted: AdaptedModel
    rows: Rows

    def product(self, vector: Vector) -> Vector:
        return _mean_product(self.adapted, self.rows, vector, self._batch_product)

    def _batch_product(self, batch: Batch, vector: Vector) -> Sequence[torch.Tensor]:
        adapted = self.adapted
        with forward_ad.dual_level():
            duals = {
                f"{name}.weight": forward_ad.make_dual(weight, v.to(weight.dtype))
                for name, weight, v in zip(adapted.names, adapted.weights, vector, strict=True)
            }

            def model(**inputs: Any) -> Any:
                return functional_call(adapted.model, duals, (), inputs)

            logits, tangent = forward_ad.unpack_dual(completion_logits(adapted, model, batch))
            probabilities, tangent = logits.detach().softmax(dim=-1), tangent.detach()
            curved = probabilities * (tangent - (probabilities * tangent).sum(dim=-1, keepdim=True))
        return torch.autograd.grad(logits, adapted.weights, grad_outputs=curved)


@dataclass(frozen=True)
class Hessian:
    """Products with the exact Hessian of the mean NLL over fixed rows, by differentiating twice (Pearlmutter 1994)."""

    adapted: AdaptedModel
    rows: Rows

    def product(self, vector: Vector) -> Vector:
        return _mean_product(self.adapted, self.rows, vector, self._batch_product)

    def _batch_product(self, batch: Batch, vector: Vector) -> Sequence[torch.Tensor]:
        weights = self.adapted.weights
        gradient = torch.autograd.grad(self.adapted.token_nll(batch).sum(), weights, create_graph=True)
        return torch.autograd.grad(gradient, weights, grad_outputs=vector, materialize_grads=True)


def _mean_product(
    adapted: AdaptedModel,
    rows: Rows,
    vector: Vector,
    batch_product: Callable[[Batch, Vector], Sequence[torch.Tensor]],
) -> Vector:
    """The sum of products over all batches, per completion token."""
    result = [torch.zeros_like(v) for v in vector]
    n_loss_tokens = 0
    for _, batch in adapted.batches(rows):
        if batch.n_loss_tokens == 0:
            continue
        with trainable(adapted), torch.enable_grad():
            add_to(result, batch_product(batch, vector))
        n_loss_tokens += batch.n_loss_tokens
    return [r / max(1, n_loss_tokens) for r in result]


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Plain attention for a while: the fused kernels have no forward-mode derivative and no second one."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True)
class Solution:
    """x of A x = b, and how far conjugate gradients got."""

    x: Vector
    residual: float
    """|b − A x| / |b|; NaN or infinite if the product was."""
    n_iterations: int
    negative_curvature: float | None = None
    """dᵀA d / dᵀd <= 0 of the direction in which it had to end: A is not positive definite."""


def conjugate_gradient(
    product: Callable[[Vector], Vector],
    b: Vector,
    *,
    max_iterations: int,
    tolerance: float,
    on_iteration: Callable[[int], None] | None = None,
) -> Solution:
    """Solve A x = b for a symmetric positive definite A, from x = 0 (Hestenes & Stiefel 1952).

    Args:
        product: v → A v.
        tolerance: stop where |b − A x| <= tolerance · |b|.

    Returns:
        The last iterate: it is better than the ones before it in the A-norm, converged or not. The iteration also
        ends early at a direction of negative curvature: if A is indefinite, or by rounding in low precision.
    """
    x = [torch.zeros_like(v) for v in b]
    residual = [v.clone() for v in b]
    direction = [v.clone() for v in b]
    size, start = dot(residual, residual), dot(b, b)
    iteration, negative = 0, None
    while iteration < max_iterations and size > tolerance**2 * start:
        image = product(direction)
        curvature = dot(direction, image)
        if not math.isfinite(curvature):
            return Solution(x, math.nan, iteration)
        if curvature <= 0:
            negative = curvature / dot(direction, direction)
            break
        step = size / curvature
        for xi, ri, di, ai in zip(x, residual, direction, image, strict=True):
            xi.add_(di, alpha=step)
            ri.sub_(ai, alpha=step)
        size, last = dot(residual, residual), size
        direction = [r + (size / last) * d for r, d in zip(residual, direction, strict=True)]
        iteration += 1
        if on_iteration is not None:
            on_iteration(iteration)
    return Solution(x, math.sqrt(size / start) if start > 0 else 0.0, iteration, negative)
