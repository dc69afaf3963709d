import copy

import numpy as np
import pytest
import torch
from torch import nn

from duet_ray.config import TrainingConfig
from duet_ray.errors import SelectionError
from duet_ray.likelihood import collate, row_nll
from duet_ray.records import TokenRow
from duet_ray.selection import gradients
from duet_ray.selection.gradients import AdaptedModel, RowList, RowView, ghost_products, mean_gradient, trainable
from duet_ray.training.lora import LoraTrainer, autocast
from tests.selection.toy_domain import toy_domain
from tests.tiny_model import tiny_llama, tiny_tokenizer

TRAINING = TrainingConfig(rank=4, alpha=8, learning_rate=1e-2, epochs=2, batch_size=8, max_tokens=16)


def adapted_model(batch_size: int = 5, dtype: torch.dtype = torch.float32) -> AdaptedModel:
    trainer = LoraTrainer(tiny_llama(dtype=dtype), tiny_tokenizer(), TRAINING)
    trainer.train(toy_domain(32).train.items, seed=0)
    return AdaptedModel.of(trainer.model, pad_id=0, batch_size=batch_size)


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    return adapted_model()


def explicit_products(adapted: AdaptedModel, rows: RowList, vector: list[torch.Tensor]) -> np.ndarray:
    """One backward pass a row, and the dot product with the gradients that autograd left."""
    products = []
    with trainable(adapted):
        for row in rows.items:
            batch = collate([row], adapted.pad_id)
            with autocast(adapted.model):
                loss = row_nll(adapted.model, batch).sum()
            gradient = torch.autograd.grad(loss, adapted.weights)
            products.append(sum(float((g * v).sum()) for g, v in zip(gradient, vector, strict=True)))
    return np.array(products)


def random_vector(adapted: AdaptedModel, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(w.shape, generator=generator) for w in adapted.weights]


def test_the_ghost_product_is_the_gradient_dot_the_vector(adapted):
    rows = RowList(toy_domain(23).train.items)  # five lengths, so batches are padded
    vector = random_vector(adapted)
    np.testing.assert_allclose(
        ghost_products(adapted, rows, vector), explicit_products(adapted, rows, vector), rtol=1e-5, atol=1e-5
    )


def test_both_a_and_b_count(adapted):
    assert {name.split(".")[-2] for name in adapted.names} == {"lora_A", "lora_B"}
    rows = RowList(toy_domain(8).train.items)
    for kind in ("lora_A", "lora_B"):
        vector = [v * (kind in name) for v, name in zip(random_vector(adapted), adapted.names, strict=True)]
        products = ghost_products(adapted, rows, vector)
        assert np.abs(products).min() > 0
        np.testing.assert_allclose(products, explicit_products(adapted, rows, vector), rtol=1e-5, atol=1e-5)


def test_the_batch_size_does_not_matter(adapted):
    rows, vector = RowList(toy_domain(23).train.items), random_vector(adapted)
    alone = ghost_products(AdaptedModel.of(adapted.model, pad_id=0, batch_size=1), rows, vector)
    together = ghost_products(AdaptedModel.of(adapted.model, pad_id=0, batch_size=23), rows, vector)
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-5)


def test_shards_do_not_matter(adapted):
    rows, vector = RowList(toy_domain(23).train.items), random_vector(adapted)
    shards = [RowView(rows, ids) for ids in np.split(np.arange(23), [4, 9, 10])]
    parts = np.concatenate([ghost_products(adapted, shard, vector) for shard in shards])
    np.testing.assert_allclose(parts, ghost_products(adapted, rows, vector), rtol=1e-5, atol=1e-5)


def test_what_is_kept_for_the_backward_pass_is_as_narrow_as_the_adapter(adapted, monkeypatch):
    """Otherwise every linear would keep a float32 copy of its inputs, which a plain pass does not."""
    kept: list[int] = []
    tapped = gradients._tapped

    def watched(adapted, shape, on_input):
        def watch(index, x):
            on_delta = on_input(index, x)
            kept.extend(c.cell_contents.shape[-1] for c in on_delta.__closure__ if _is_batch(c.cell_contents, shape))
            return on_delta

        return tapped(adapted, shape, watch)

    def _is_batch(held, shape):
        return isinstance(held, torch.Tensor) and held.shape[:-1] == shape

    monkeypatch.setattr(gradients, "_tapped", watched)
    ghost_products(adapted, RowList(toy_domain(5).train.items), random_vector(adapted))
    assert kept == [TRAINING.rank] * len(adapted.linears)


def test_bfloat16_under_autocast_agrees_with_its_own_gradients():
    adapted = adapted_model(dtype=torch.bfloat16)
    assert adapted.weights[0].dtype == torch.float32
    rows, vector = RowList(toy_domain(12).train.items), random_vector(adapted)
    ghost, explicit = ghost_products(adapted, rows, vector), explicit_products(adapted, rows, vector)
    assert np.linalg.norm(ghost - explicit) < 0.05 * np.linalg.norm(explicit)


def test_a_row_without_completion_tokens_scores_zero(adapted):
    row = TokenRow(np.arange(10, 16, dtype=np.int32), np.zeros(6, dtype=bool))
    products = ghost_products(adapted, RowList([row, *toy_domain(2).train.items]), random_vector(adapted))
    assert products[0] == 0
    assert (products[1:] != 0).all()
    assert ghost_products(adapted, RowList([row]), random_vector(adapted))[0] == 0


def test_scoring_leaves_no_hook_no_gradient_and_no_flag(adapted):
    before = [(p.requires_grad, p.grad is None) for p in adapted.model.parameters()]
    ghost_products(adapted, RowList(toy_domain(4).train.items), random_vector(adapted))
    mean_gradient(adapted, RowList(toy_domain(4).train.items))
    assert [(p.requires_grad, p.grad is None) for p in adapted.model.parameters()] == before
    assert not any(m._forward_hooks for m in adapted.model.modules())


def test_progress_counts_to_the_last_row(adapted):
    done: list[int] = []
    ghost_products(adapted, RowList(toy_domain(12).train.items), random_vector(adapted), done.append)
    assert done == [5, 10, 12]


def test_the_mean_gradient_is_that_of_the_mean_loss_per_token(adapted):
    rows = RowList(toy_domain(11).train.items)
    loss, gradient = mean_gradient(adapted, rows)
    with trainable(adapted):
        batch = collate(rows.items, 0)
        expected = row_nll(adapted.model, batch).sum() / batch.n_loss_tokens
        explicit = torch.autograd.grad(expected, adapted.weights)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(gradient, explicit, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_mean_gradient_needs_a_completion_token(adapted):
    row = TokenRow(np.arange(10, 16, dtype=np.int32), np.zeros(6, dtype=bool))
    with pytest.raises(SelectionError, match="none of the 2 rows has a completion token"):
        mean_gradient(adapted, RowList([row, row]))


def test_adapters_elsewhere_than_on_linears_are_refused():
    training = TRAINING.model_copy(update={"target_modules": ["embed_tokens"]})
    trainer = LoraTrainer(tiny_llama(), tiny_tokenizer(), training)
    trainer.train(toy_domain(8).train.items, seed=0)
    with pytest.raises(SelectionError, match=r"adapters on linear layers only.*target_modules: all-linear"):
        AdaptedModel.of(trainer.model, pad_id=0, batch_size=2)


def test_a_layer_that_mixes_rows_is_refused(adapted):
    model = copy.deepcopy(adapted.model)
    attention = model.get_base_model().model.layers[0].self_attn

    class Flattened(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    attention.q_proj = Flattened(attention.q_proj)
    flattened = AdaptedModel.of(model, pad_id=0, batch_size=3)
    with pytest.raises(SelectionError, match="its rows cannot be told apart"):
        ghost_products(flattened, RowList(toy_domain(3).train.items), random_vector(flattened))
