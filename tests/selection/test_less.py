import math

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from duet_ray.errors import SelectionError
from duet_ray.records import TokenRow
from duet_ray.selection import less, select
from duet_ray.selection.gradients import AdaptedModel, RowList
from duet_ray.selection.less import AdamUpdate, mean_direction
from duet_ray.selection.projection import CountSketch
from duet_ray.training.lora import LoraTrainer
from tests.selection.explicit_gradients import (
    TRAINING,
    context_of,
    dense,
    moments_by_hand,
    n_loss_tokens,
    recorded,
)
from tests.selection.toy_domain import ToyDomain, ToyRows, toy_domain
from tests.tiny_model import tiny_llama, tiny_tokenizer

WORDLESS = TokenRow(np.arange(10, 14, dtype=np.int32), np.zeros(4, dtype=bool))
"""A row without completion tokens."""


def normalised(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(("projection", "epochs"), [(None, 3), (None, 1), (64, 2)])
def test_the_scores_are_those_of_a_direct_computation(projection, epochs, monkeypatch):
    domain = toy_domain(18, 5)
    sketches = recorded(monkeypatch, CountSketch, "draw")
    context = context_of(method="less", projection=projection, epochs=epochs)
    weights = select(domain, context)
    moments = moments_by_hand(domain, context, epochs)
    expected = torch.zeros(18, dtype=torch.float64)
    for at in moments:
        g = at.train / n_loss_tokens(domain.train.items)[:, None]
        update = (0.9 * at.m + 0.1 * g) / torch.sqrt(0.999 * at.v + 0.001 * g**2 + 1e-8)
        validation = at.validation / n_loss_tokens(domain.validation.items)[:, None]
        if projection is not None:
            matrix = dense(sketches[0])
            update, validation = update @ matrix.T, validation @ matrix.T
        cosines = normalised(update) @ normalised(validation).T  # (rows, validation rows), as the authors have it
        expected += at.learning_rate / sum(a.learning_rate for a in moments) * cosines.mean(dim=1)
    np.testing.assert_allclose(weights.scores, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
    assert weights.details["checkpoints"] == epochs
    assert weights.details["validation_rows"] == 5


@pytest.mark.parametrize("projection", [None, 64])
def test_batch_size_and_shard_borders_do_not_change_the_scores(projection):
    domain, settings = toy_domain(20, 6), {"method": "less", "projection": projection, "epochs": 2}
    whole = select(domain, context_of(batch_size=20, **settings)).scores
    cut = select(domain, context_of(batch_size=3, shard_rows=7, **settings)).scores
    np.testing.assert_allclose(cut, whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())


def test_a_projection_comes_near_the_exact_scores_within_its_bound():
    domain, n_seeds, size = toy_domain(20, 6), 4, 256
    exact = select(domain, context_of(method="less", epochs=1)).scores
    errors, own_seed = [], less.domain_seed
    for seed in range(n_seeds):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(less, "domain_seed", lambda *args, s=seed: own_seed(*args) + s)
            errors.append(select(domain, context_of(method="less", epochs=1, projection=size)).scores - exact)
    error = np.sqrt(np.square(errors).mean())
    assert 0 < error < math.sqrt(2 / size)


def test_corrupted_rows_score_lower_and_are_drawn_less():
    domain = toy_domain(192, 24, corrupted=0.3)
    weights = select(domain, context_of(method="less"))
    scores, wrong = weights.scores, domain.corrupted
    # The share of (clean, corrupted) pairs in the right order: 0.5 by chance, 0.86 to 0.94 over four seeds.
    assert (scores[~wrong][:, None] > scores[wrong][None]).mean() > 0.8
    assert weights.probabilities[wrong].sum() < 0.5 * wrong.mean()


def test_without_moments_an_update_is_a_bounded_gradient():
    zeros = [torch.zeros(3)]
    g = torch.tensor([[0.0, 1e-12, -5.0]])
    update = AdamUpdate.of((zeros, [torch.zeros(3)])).apply_(0, g.clone())
    torch.testing.assert_close(update, 0.1 * g / torch.sqrt(0.001 * g**2 + 1e-8))
    assert update[0, 0] == 0


def test_a_row_without_completion_tokens_scores_zero():
    items = toy_domain(12).train.items
    domain = ToyDomain(ToyRows([WORDLESS, *items]), toy_domain(1, 4).validation, np.zeros(13, bool))
    scores = select(domain, context_of(method="less", epochs=1)).scores
    assert scores[0] == 0
    assert (scores[1:] != 0).all()


def adapted_model(target_modules=("q_proj", "down_proj")) -> AdaptedModel:
    training = TRAINING.model_copy(update={"target_modules": list(target_modules)})
    trainer = LoraTrainer(tiny_llama(), tiny_tokenizer(), training)
    trainer.train(toy_domain(16).train.items, seed=0)
    return AdaptedModel.of(trainer.model, pad_id=0, batch_size=4)


@pytest.mark.parametrize("size", [None, 32])
def test_validation_rows_without_completion_tokens_have_no_part_in_the_direction(size):
    adapted, rows = adapted_model(), toy_domain(9).train.items
    sketch = size and CountSketch.draw(adapted.weights, size, seed=0)
    with_them = mean_direction(adapted, RowList([WORDLESS, *rows, WORDLESS]), sketch)
    without = mean_direction(adapted, RowList(rows), sketch)
    for a, b in zip(with_them, without, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert math.sqrt(sum(float(t.square().sum()) for t in without)) < 1  # a mean of unit vectors


def test_validation_rows_without_any_completion_token_are_an_error():
    domain = ToyDomain(toy_domain(12).train, ToyRows([WORDLESS] * 3), np.zeros(12, bool))
    with pytest.raises(SelectionError, match=r"domain letters: .* none of the 3 rows has a completion.*max_tokens"):
        select(domain, context_of(method="less", epochs=1))


def test_a_gradient_that_is_not_finite_is_an_error_with_a_remedy(monkeypatch):
    original = less.row_gradients

    def spoilt(adapted, batch, on_block):
        def first_row(index, block):
            block[0] *= math.nan
            on_block(index, block)

        original(adapted, batch, first_row if len(batch.input_ids) == 12 else on_block)

    monkeypatch.setattr(less, "row_gradients", spoilt)
    with pytest.raises(SelectionError, match=r"domain letters: the gradients of 1 of 12 rows are not finite; lower"):
        select(toy_domain(12, 4), context_of(method="less", epochs=1))
    with pytest.raises(SelectionError, match=r"domain letters: the gradient of the validation loss is not finite"):
        select(toy_domain(9, 12), context_of(method="less", epochs=1))


def test_a_linear_that_is_used_twice_is_refused():
    adapted = adapted_model(["q_proj"])
    layers = adapted.model.get_base_model().model.layers
    layers[1].self_attn.q_proj = layers[0].self_attn.q_proj
    shared = AdaptedModel.of(adapted.model, pad_id=0, batch_size=4)
    with pytest.raises(SelectionError, match=r"q_proj.* is used more than once .*selection\.target_modules"):
        mean_direction(shared, RowList(toy_domain(3).train.items), None)


def test_an_adapted_layer_that_the_model_never_uses_changes_nothing():
    scores = []
    for modules in (["q_proj"], ["q_proj", "spare"]):
        model = tiny_llama()
        with torch.random.fork_rng(devices=[]):
            model.spare = torch.nn.Linear(8, 8, bias=False).requires_grad_(False)
        training = TRAINING.model_copy(update={"target_modules": modules})
        scores.append(select(toy_domain(12, 4), context_of(model, method="less", epochs=2, training=training)).scores)
    np.testing.assert_array_equal(scores[0], scores[1])


@pytest.mark.parametrize("projection", [None, 64])
def test_no_gradient_outlives_its_linear_and_batch(projection, monkeypatch):
    alive: list[int] = []
    blocks: list[StorageWeakRef] = []
    original = less.row_gradients

    def watched(adapted, batch, on_block):
        def on_watched(index, block):
            alive.append(sum(not b.expired() for b in blocks))
            blocks.append(StorageWeakRef(block.untyped_storage()))
            on_block(index, block)

        original(adapted, batch, on_watched)

    monkeypatch.setattr(less, "row_gradients", watched)
    select(toy_domain(24, 6), context_of(method="less", epochs=1, batch_size=4, projection=projection))
    # 24 rows and 6 to 12 of validation in batches of 4, 12 linears each; when one is handed over, all others are gone.
    assert len(alive) >= 8 * 12
    assert max(alive) == 0
