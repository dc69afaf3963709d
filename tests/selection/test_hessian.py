"""The Gauss–Newton matrix is formed densely here, from the Jacobian of the logits; the rest is held against it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from duet_ray.config import TrainingConfig
from duet_ray.likelihood import collate
from duet_ray.records import TokenRow
from duet_ray.selection import hessian
from duet_ray.selection.gradients import AdaptedModel, RowList, Vector, ghost_products, mean_gradient, trainable
from duet_ray.selection.hessian import (
    Ekfac,
    GaussNewton,
    Hessian,
    completion_logits,
    conjugate_gradient,
    dot,
    eager_attention,
    first_with_the_same_inputs,
    mean_eigenvalue,
    sampled_pairs,
)
from duet_ray.training.lora import LoraTrainer
from tests.selection.toy_domain import toy_domain
from tests.tiny_model import tiny_llama, tiny_tokenizer


def adapted_model(targets: Any, *, rank: int = 1, batch_size: int = 4, dtype: torch.dtype = torch.float32) -> Any:
    training = TrainingConfig(
        rank=rank, alpha=2 * rank, learning_rate=2e-2, epochs=4, batch_size=8, max_tokens=16, target_modules=targets
    )
    model = tiny_llama(vocab_size=32, hidden_size=16, dtype=dtype)
    trainer = LoraTrainer(model, tiny_tokenizer(), training)
    trainer.train(toy_domain(32).train.items, seed=0)
    return AdaptedModel.of(trainer.model, pad_id=0, batch_size=batch_size)


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    return adapted_model(["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def rows() -> RowList:
    return RowList(toy_domain(6).train.items)


@pytest.fixture(scope="module")
def dense(adapted, rows) -> torch.Tensor:
    return dense_gauss_newton(adapted, rows)


def dense_gauss_newton(adapted: AdaptedModel, rows: RowList) -> torch.Tensor:
    """Jᵀ(diag(p) − ppᵀ)J / N in float64, `(n_parameters, n_parameters)`."""
    batch = collate(rows.items, 0)
    with trainable(adapted):
        logits = completion_logits(adapted, adapted.model, batch)
        jacobian = torch.stack(
            [flat(list(torch.autograd.grad(entry, adapted.weights, retain_graph=True))) for entry in logits.flatten()]
        )
    p = logits.detach().double().softmax(-1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    j = jacobian.double().unflatten(0, p.shape)
    return torch.einsum("tia,tij,tjb->ab", j, curvature, j) / len(p)


def flat(vector: Vector) -> torch.Tensor:
    return torch.cat([v.flatten() for v in vector])


def random_vector(adapted: AdaptedModel) -> Vector:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(w.shape, generator=generator) for w in adapted.weights]


def test_the_product_is_that_of_the_dense_matrix(adapted, rows, dense):
    vector = random_vector(adapted)
    with eager_attention(adapted.model):
        product = GaussNewton(adapted, rows).product(vector)
    torch.testing.assert_close(flat(product).double(), dense @ flat(vector).double(), rtol=1e-4, atol=1e-6)


def test_the_product_in_bfloat16_is_near(rows):
    adapted = adapted_model(["q_proj", "down_proj"], dtype=torch.bfloat16)
    vector = random_vector(adapted)
    with eager_attention(adapted.model):
        product = flat(GaussNewton(adapted, rows).product(vector))
        adapted.model.float()
        reference = flat(GaussNewton(adapted, rows).product(vector))
    assert (product - reference).norm() < 0.1 * reference.norm()


def test_the_product_with_the_exact_hessian_is_the_slope_of_the_gradient(adapted, rows):
    vector, step = [v / 30 for v in random_vector(adapted)], 1e-2
    before = [w.detach().clone() for w in adapted.weights]

    def gradient(sign: int) -> torch.Tensor:
        with torch.no_grad():
            for w, start, v in zip(adapted.weights, before, vector, strict=True):
                w.copy_(start + sign * step * v)
        return flat(mean_gradient(adapted, rows)[1])

    expected = (gradient(1) - gradient(-1)) / (2 * step)
    gradient(0)
    with eager_attention(adapted.model):
        product = flat(Hessian(adapted, rows).product(vector))
        gauss_newton = flat(GaussNewton(adapted, rows).product(vector))
    assert (product - expected).norm() < 0.01 * expected.norm()
    assert (gauss_newton - expected).norm() > 0.1 * expected.norm()


def test_the_product_with_the_exact_hessian_in_bfloat16_is_near(rows):
    adapted = adapted_model(["q_proj", "down_proj"], dtype=torch.bfloat16)
    with eager_attention(adapted.model):
        product = flat(Hessian(adapted, rows).product(random_vector(adapted)))
        adapted.model.float()
        reference = flat(Hessian(adapted, rows).product(random_vector(adapted)))
    assert (product - reference).norm() < 0.1 * reference.norm()


@pytest.mark.parametrize("curvature", [GaussNewton, Hessian])
def test_products_leave_rows_without_completion_tokens_out(adapted, rows, curvature):
    empty = TokenRow(np.arange(10, 14, dtype=np.int32), np.zeros(4, dtype=bool))
    vector = random_vector(adapted)
    with eager_attention(adapted.model):
        alone = curvature(adapted, rows).product(vector)
        beside = curvature(adapted, RowList([empty] * 4 + rows.items)).product(vector)
        nothing = curvature(adapted, RowList([empty])).product(vector)
    torch.testing.assert_close(flat(beside), flat(alone), rtol=1e-4, atol=1e-6)
    assert not flat(nothing).any()


def test_conjugate_gradients_solve_the_damped_system(adapted, rows, dense):
    damping = 0.1 * float(dense.diagonal().mean())
    _, gradient = mean_gradient(adapted, RowList(toy_domain(1, 8).validation.items))
    curvature = GaussNewton(adapted, rows)
    with eager_attention(adapted.model):
        solution = conjugate_gradient(
            lambda v: [h + damping * x for h, x in zip(curvature.product(v), v, strict=True)],
            gradient,
            max_iterations=200,
            tolerance=1e-6,
        )
    expected = torch.linalg.solve(dense + damping * torch.eye(len(dense)), flat(gradient).double())
    assert solution.residual <= 1e-6
    assert (flat(solution.x) - expected).norm() < 1e-3 * expected.norm()


def test_the_mean_eigenvalue_is_the_trace_over_the_parameters(adapted, rows, dense):
    draws = [mean_eigenvalue(adapted, rows, seed) for seed in range(40)]
    expected = float(dense.diagonal().mean())
    assert np.mean(draws) == pytest.approx(expected, abs=4 * np.std(draws) / np.sqrt(40))
    assert np.std(draws) < expected


def test_both_solvers_take_the_same_mean_eigenvalue(adapted, rows):
    assert Ekfac.fit(adapted, rows, seed=3).mean_eigenvalue == pytest.approx(
        mean_eigenvalue(adapted, rows, seed=3), rel=1e-4
    )


def test_eager_attention_is_for_a_while_only(adapted):
    before = adapted.model.config._attn_implementation
    with eager_attention(adapted.model):
        assert adapted.model.config._attn_implementation == "eager"
    assert adapted.model.config._attn_implementation == before != "eager"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_with_the_same_inputs_are_found(rows, dtype):
    adapted = adapted_model("all-linear", dtype=dtype)
    first = first_with_the_same_inputs(adapted, rows)
    layers = [name.split(".layers.")[1].replace(".default", "") for name in adapted.names]
    shared = {layers[i]: layers[j] for i, j in enumerate(first) if i != j}
    assert shared == {
        f"{layer}.{block}.{name}_proj.lora_A": f"{layer}.{block}.{leader}_proj.lora_A"
        for layer in (0, 1)
        for block, name, leader in (("self_attn", "k", "q"), ("self_attn", "v", "q"), ("mlp", "up", "gate"))
    }
    assert not any(m._forward_pre_hooks for m in adapted.model.modules())


def test_sharing_a_basis_changes_nothing(monkeypatch, rows):
    adapted = adapted_model(["q_proj", "k_proj", "v_proj"], rank=2)
    vector = random_vector(adapted)
    shared = Ekfac.fit(adapted, rows, seed=0)
    monkeypatch.setattr(hessian, "first_with_the_same_inputs", lambda adapted, _: list(range(len(adapted.linears))))
    apart = Ekfac.fit(adapted, rows, seed=0)
    assert len({id(q) for q in shared.input_bases}) < len({id(q) for q in apart.input_bases})
    torch.testing.assert_close(flat(shared.solve(vector, 0.01)), flat(apart.solve(vector, 0.01)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("n_tokens", [2, 5, 20])
@pytest.mark.parametrize(("n_in", "n_out"), [(3, 9), (9, 3)])
def test_gradients_are_turned_alike_before_and_after_the_sum_over_tokens(n_tokens, n_in, n_out):
    generator = torch.Generator().manual_seed(0)
    x, delta, q_in, q_out = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((4, n_tokens, n_in), (4, n_tokens, n_out), (n_in, n_in), (n_out, n_out))
    )
    gradients = torch.einsum("bto,bti->boi", delta, x)
    expected = torch.einsum("op,boi,ij->bpj", q_out, gradients, q_in)
    torch.testing.assert_close(hessian._rotated_gradients(x, delta, q_in, q_out), expected)


class OneLinear(nn.Module):
    """logits = W · onehot(token): one linear, and for rows that start alike a Fisher matrix that is a Kronecker one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.eye(size), freeze=True)
        self.linear = nn.Linear(size, size, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.linear(self.embedding(input_ids)))


def test_ekfac_is_exact_where_the_fisher_matrix_is_a_kronecker_product():
    model = OneLinear(6)
    adapted = AdaptedModel(model, ("linear",), (model.linear,), 0, 16)
    # Every row is token 2, then a token that is predicted: F = E[xxᵀ] ⊗ E[δδᵀ] with x always the same.
    rows = RowList([TokenRow(np.array([2, 1 + i % 5], np.int32), np.array([False, True])) for i in range(200)])
    gradients: list[torch.Tensor] = []
    sampled_pairs(
        adapted, rows, 7, lambda _: lambda _index, x, delta: gradients.extend((delta.transpose(1, 2) @ x).flatten(1))
    )
    g = torch.stack(gradients).double()
    fisher = g.T @ g / len(rows)
    vector, damping = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)), 0.05
    expected = torch.linalg.solve(fisher + damping * torch.eye(36), vector.flatten().double())
    (solution,) = Ekfac.fit(adapted, rows, seed=7).solve([vector], damping)
    torch.testing.assert_close(solution.flatten().double(), expected, rtol=1e-4, atol=1e-5)
    # With labels drawn from the model, the Fisher matrix is the Gauss–Newton matrix, within the noise of 200 draws.
    exact = dense_gauss_newton(adapted, RowList(rows.items[:1]))  # labels have no part in it: one row is as good as all
    assert (fisher - exact).norm() < 0.25 * exact.norm()


def dense_fisher_blocks(adapted: AdaptedModel, rows: RowList, n_draws: int) -> list[torch.Tensor]:
    """Per linear, (1/N) Σ_rows E_y[g gᵀ], over draws of labels that `Ekfac.fit` with seed 0 does not see."""
    gradients: list[list[torch.Tensor]] = [[] for _ in adapted.linears]

    def keep(index: int, x: torch.Tensor, delta: torch.Tensor) -> None:
        gradients[index].extend((delta.transpose(1, 2) @ x).flatten(1).double())

    n = sum(sampled_pairs(adapted, rows, seed, lambda _: keep) for seed in range(1, 1 + n_draws))
    return [torch.stack(g).T @ torch.stack(g) / n for g in gradients]


def test_ekfac_ranks_rows_as_the_dense_block_diagonal_solve_does():
    adapted = adapted_model("all-linear", rank=2, batch_size=16)
    domain = toy_domain(60, 16, corrupted=0.3)
    train = RowList(domain.train.items)
    _, gradient = mean_gradient(adapted, domain.validation)
    factors = Ekfac.fit(adapted, train, seed=0)
    damping = 0.1 * factors.mean_eigenvalue
    exact = [
        torch.linalg.solve(block + damping * torch.eye(len(block)), v.flatten().double()).float().view_as(v)
        for block, v in zip(dense_fisher_blocks(adapted, train, n_draws=16), gradient, strict=True)
    ]
    reference = ghost_products(adapted, train, exact)
    by_ekfac = spearmanr(ghost_products(adapted, train, factors.solve(gradient, damping)), reference).statistic
    by_gradient = spearmanr(ghost_products(adapted, train, gradient), reference).statistic
    assert by_ekfac > 0.9
    assert by_ekfac > by_gradient + 0.05


def test_the_batch_size_does_not_matter_to_ekfac(rows):
    solutions = []
    for batch_size in (1, 10):
        adapted = adapted_model(["q_proj"], batch_size=batch_size)
        factors = Ekfac.fit(adapted, rows, seed=0)
        solutions.append(flat(factors.solve(random_vector(adapted), 0.1 * factors.mean_eigenvalue)))
    torch.testing.assert_close(*solutions, rtol=1e-3, atol=1e-3 * float(solutions[0].abs().max()))


def spd(n: int) -> torch.Tensor:
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
    return a @ a.T / n + 0.1 * torch.eye(n)


def test_conjugate_gradients_stop_at_the_tolerance_and_report_the_residual():
    matrix, b = spd(30), torch.ones(30)
    counted: list[int] = []
    solution = conjugate_gradient(
        lambda v: [matrix @ v[0]], [b], max_iterations=100, tolerance=1e-3, on_iteration=counted.append
    )
    true = float((b - matrix @ solution.x[0]).norm() / b.norm())
    assert solution.residual <= 1e-3
    assert true == pytest.approx(solution.residual, rel=0.05)
    assert counted == list(range(1, solution.n_iterations + 1))


def test_conjugate_gradients_that_run_out_of_iterations_say_how_far_they_are():
    matrix = spd(30)
    solution = conjugate_gradient(lambda v: [matrix @ v[0]], [torch.ones(30)], max_iterations=3, tolerance=1e-8)
    assert solution.n_iterations == 3
    assert solution.residual > 1e-8


def test_conjugate_gradients_of_a_broken_product_are_not_finite():
    solution = conjugate_gradient(lambda v: [v[0] * np.nan], [torch.ones(3)], max_iterations=3, tolerance=1e-8)
    assert np.isnan(solution.residual)


def test_conjugate_gradients_end_at_negative_curvature_and_say_so():
    matrix = spd(30) - 0.5 * torch.eye(30)
    assert torch.linalg.eigvalsh(matrix)[0] < 0
    solution = conjugate_gradient(lambda v: [matrix @ v[0]], [torch.ones(30)], max_iterations=100, tolerance=1e-8)
    assert torch.linalg.eigvalsh(matrix)[0] <= solution.negative_curvature < 0
    assert 0 < solution.n_iterations < 30
    definite = conjugate_gradient(lambda v: [spd(30) @ v[0]], [torch.ones(30)], max_iterations=9, tolerance=1e-8)
    assert definite.negative_curvature is None


def test_conjugate_gradients_of_zero_are_zero():
    solution = conjugate_gradient(lambda v: v, [torch.zeros(3)], max_iterations=3, tolerance=1e-8)
    assert (solution.residual, solution.n_iterations) == (0.0, 0)
    assert dot(solution.x, solution.x) == 0
