import math

import numpy as np
import pytest
import torch

from duet_ray.config import SelectionConfig, TrainingConfig, WeightingConfig
from duet_ray.errors import SelectionError
from duet_ray.records import TokenRow
from duet_ray.selection import select as select_rows
from duet_ray.selection.base import RowWeights, SelectionContext
from tests.selection.toy_domain import ToyDomain, ToyRows, toy_domain
from tests.tiny_model import tiny_llama, tiny_tokenizer

TRAINING = TrainingConfig(
    rank=4, alpha=8, learning_rate=1e-2, batch_size=8, max_tokens=16, target_modules=["q_proj", "v_proj", "down_proj"]
)


def select(domain: ToyDomain, *, seed: int = 0, model=None, on_progress=None, **settings) -> RowWeights:
    chosen = SelectionConfig(**{"method": "influence", "n_hessian_rows": 24, "batch_size": 16, **settings})
    model = model if model is not None else tiny_llama()
    context = SelectionContext(
        settings=chosen,
        training=TRAINING,
        seed=seed,
        load_base=lambda: (model, tiny_tokenizer()),
        on_progress=on_progress,
    )
    return select_rows(domain, context)


@pytest.mark.parametrize("solver", ["ekfac", "cg"])
def test_corrupted_rows_score_lower_and_are_drawn_less(solver):
    domain = toy_domain(96, 24, corrupted=0.3)
    weights = select(domain, solver=solver, epochs=10, cg_iterations=8)
    scores, wrong = weights.scores, domain.corrupted
    # The share of (clean, corrupted) pairs in the right order: 0.5 by chance, 0.75 to 0.85 here.
    assert (scores[~wrong][:, None] > scores[wrong][None]).mean() > 0.68
    assert scores[~wrong].mean() > scores[wrong].mean()
    assert weights.probabilities[wrong].sum() < 0.7 * wrong.mean()
    assert 1 < weights.effective_sample_size < 96


def test_the_batch_size_does_not_change_the_scores():
    domain = toy_domain(20, 6)
    one, many = (select(domain, batch_size=size, n_hessian_rows=None).scores for size in (1, 20))
    np.testing.assert_allclose(one, many, rtol=2e-3, atol=2e-3 * np.abs(one).max())


def test_scores_follow_from_the_seed_and_not_from_the_global_generator():
    domain = toy_domain(20, 6)
    torch.manual_seed(1)
    first = select(domain, n_fit_rows=12, n_hessian_rows=8)
    torch.manual_seed(2)
    again = select(domain, n_fit_rows=12, n_hessian_rows=8)
    other = select(domain, n_fit_rows=12, n_hessian_rows=8, seed=1)
    np.testing.assert_array_equal(first.scores, again.scores)
    assert not np.array_equal(first.scores, other.scores)


def test_the_base_model_is_left_as_it_was():
    model, ids = tiny_llama(), torch.arange(4, 20)[None]
    before, attention = model(ids).logits, model.config._attn_implementation
    select(toy_domain(12, 4), model=model, solver="cg", cg_iterations=2)
    assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == attention
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_details_and_progress_tell_what_was_done():
    stages: list[tuple[str, int, int]] = []
    weights = select(
        toy_domain(20, 6),
        solver="cg",
        cg_iterations=2,
        n_fit_rows=12,
        n_hessian_rows=8,
        damping=0.5,
        on_progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    assert weights.details["fit_rows"] == 12
    assert weights.details["hessian_rows"] == 8
    assert weights.details["validation_rows"] == 6
    assert weights.details["damping"] == pytest.approx(0.5 * weights.details["mean_eigenvalue"])
    assert stages == [
        ("fit", 1, 2),
        ("fit", 2, 2),
        ("hessian", 1, 2),
        ("hessian", 2, 2),
        ("score", 16, 20),
        ("score", 20, 20),
    ]


def test_a_solver_that_does_not_converge_says_how_far_it_got():
    weights = select(toy_domain(20, 6), solver="cg", cg_iterations=1, cg_tolerance=1e-6)
    assert weights.details["cg_iterations"] == 1
    assert weights.details["cg_residual"] > 1e-6
    assert "stopped at a residual of" in weights.notes[0]
    assert "selection.cg_iterations" in weights.notes[0]


def test_the_weighting_is_applied():
    domain = toy_domain(12, 4)
    sharp = select(domain, weighting=WeightingConfig(kind="softmax", temperature=0.2))
    flat = select(domain, weighting=WeightingConfig(kind="softmax", temperature=5))
    np.testing.assert_array_equal(sharp.scores, flat.scores)
    assert sharp.effective_sample_size < flat.effective_sample_size


def test_no_validation_rows_is_an_error_with_a_remedy():
    with pytest.raises(SelectionError, match=r"domain letters: influence needs validation rows.*validation_fraction"):
        select(toy_domain(12, 0))


def test_one_training_row_has_nothing_to_choose_between():
    weights = select(toy_domain(1, 4))
    assert weights.probabilities.tolist() == [1.0]
    assert "one training row" in weights.notes[0]


def test_no_training_row_is_an_error():
    with pytest.raises(SelectionError, match="domain letters: there are no training rows to choose from"):
        select(toy_domain(0, 4))


def test_validation_rows_without_completion_tokens_are_an_error():
    empty = ToyRows([TokenRow(np.arange(10, 14, dtype=np.int32), np.zeros(4, dtype=bool))] * 3)
    domain = ToyDomain(toy_domain(12).train, empty, np.zeros(12, bool))
    with pytest.raises(SelectionError, match=r"domain letters: .* none of the 3 rows has a completion token"):
        select(domain)


def test_a_model_that_does_not_train_is_an_error_that_names_the_domain():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[20] = math.nan
    with pytest.raises(SelectionError, match=r"domain letters: the model to score with did not train: the loss is nan"):
        select(toy_domain(12, 4), model=model)


def test_a_gradient_that_is_not_finite_is_an_error(monkeypatch):
    from duet_ray.selection import influence

    monkeypatch.setattr(influence, "mean_gradient", lambda *_: (1.0, [torch.tensor(math.nan)]))
    with pytest.raises(SelectionError, match=r"domain letters: the gradient of the validation loss is not finite"):
        select(toy_domain(12, 4))


def test_a_product_that_is_not_finite_is_an_error(monkeypatch):
    from duet_ray.selection import influence

    monkeypatch.setattr(influence.GaussNewton, "product", lambda _self, v: [x * math.nan for x in v])
    with pytest.raises(SelectionError, match=r"domain letters: conjugate gradients broke down.*solver: ekfac"):
        select(toy_domain(12, 4), solver="cg")
