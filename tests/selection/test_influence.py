import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from duet_ray.config import SelectionConfig, TrainingConfig, WeightingConfig
from duet_ray.errors import SelectionError
from duet_ray.records import TokenRow
from duet_ray.selection import influence
from duet_ray.selection import select as select_rows
from duet_ray.selection.base import RowWeights, SelectionContext
from tests.selection.softmax_regression import Problem
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


@pytest.mark.parametrize("solver", ["ekfac", "cg", "lissa"])
def test_corrupted_rows_score_lower_and_are_drawn_less(solver):
    domain = toy_domain(96, 24, corrupted=0.3)
    weights = select(domain, solver=solver, epochs=10, cg_iterations=8, lissa_depth=20)
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


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        ("ekfac", [("hessian", 16, 40), ("hessian", 20, 40), ("hessian", 36, 40), ("hessian", 40, 40)]),
        ("lissa", [("hessian", 2, 3), ("hessian", 3, 3)]),
    ],
)
def test_every_solver_reports_progress_to_its_end(solver, expected):
    stages: list[tuple[str, int, int]] = []
    report = lambda stage, done, total: stages.append((stage, done, total))  # noqa: E731
    select(toy_domain(20, 6), solver=solver, lissa_depth=3, on_progress=report)
    assert [stage for stage in stages if stage[0] == "hessian"] == expected


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
    monkeypatch.setattr(influence, "mean_gradient", lambda *_: (1.0, [torch.tensor(math.nan)]))
    with pytest.raises(SelectionError, match=r"domain letters: the gradient of the validation loss is not finite"):
        select(toy_domain(12, 4))


def test_a_product_that_is_not_finite_is_an_error(monkeypatch):
    monkeypatch.setattr(influence.GaussNewton, "product", lambda _self, v: [x * math.nan for x in v])
    with pytest.raises(SelectionError, match=r"domain letters: conjugate gradients broke down.*solver: ekfac"):
        select(toy_domain(12, 4), solver="cg")


def test_negative_curvature_of_the_exact_hessian_is_named_with_its_remedy():
    domain = toy_domain(20, 6)
    loose, tight = (select(domain, solver="cg", curvature="hessian", damping=d) for d in (1e-3, 300))
    assert loose.details["negative_curvature"] < 0
    assert "the Hessian has negative curvature" in loose.notes[0]
    assert "selection.curvature: gauss_newton or raise selection.damping" in loose.notes[0]
    without = loose.details["negative_curvature"] - loose.details["damping"]
    assert f"(above {-without / loose.details['mean_eigenvalue']:.2g} at least)" in loose.notes[0]
    assert "negative_curvature" not in tight.details
    assert tight.details["cg_residual"] <= 1e-3
    assert tight.notes == ()


def test_a_hessian_that_is_negative_from_the_start_is_an_error(monkeypatch):
    monkeypatch.setattr(influence.Hessian, "product", lambda _self, v: [-10 * x for x in v])
    with pytest.raises(SelectionError, match=r"domain letters: conjugate gradients cannot start: .*\(-10, the damping"):
        select(toy_domain(12, 4), solver="cg", curvature="hessian")


@pytest.mark.parametrize("shard_rows", [8, 10])
def test_shards_do_not_change_the_scores(shard_rows):
    domain = toy_domain(40, 6)
    whole, parts = (select(domain, shard_rows=n, batch_size=8).scores for n in (40, shard_rows))
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())


def test_shards_of_the_same_batches_give_the_same_scores_to_the_bit():
    items = [row for row in toy_domain(120, 6).train.items if len(row) == 7][:24]
    domain = ToyDomain(ToyRows(items), toy_domain(1, 6).validation, np.zeros(24, bool))
    whole, parts = (select(domain, shard_rows=n, batch_size=8).scores for n in (24, 8))
    np.testing.assert_array_equal(parts, whole)


def spoiled_model(token: int):
    """A model that is at a loss after one token, and as it was without it."""
    model = tiny_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    return model


def test_a_row_without_a_finite_gradient_is_an_error_and_other_domains_are_not_affected(monkeypatch):
    clean, other = toy_domain(20, 6), toy_domain(16, 6, seed=1)
    ids = clean.train.items[13].input_ids.copy()
    ids[0] = 90  # a token that no other row has
    items = [*clean.train.items[:13], TokenRow(ids, clean.train.items[13].loss_mask), *clean.train.items[14:]]
    domain = ToyDomain(ToyRows(items), clean.validation, clean.corrupted, fingerprint=clean.fingerprint)
    model = spoiled_model(90)
    fitted = np.arange(12)  # the row must not be one that is trained on
    monkeypatch.setattr(influence, "subset", lambda *_: fitted)
    with pytest.raises(SelectionError, match=r"domain letters: 1 of 20 scores are not finite; .*selection\.damping"):
        select(domain, model=model)
    untouched = select(other).scores
    np.testing.assert_array_equal(select(other, model=model).scores, untouched)
    # The rows that shared a batch with the broken one have the scores that they have without it.
    monkeypatch.setattr(influence, "from_scores", lambda scores, *_: RowWeights(scores=scores, order=np.arange(20)))
    scores = select(domain, model=model).scores
    assert np.flatnonzero(~np.isfinite(scores)).tolist() == [13]
    np.testing.assert_array_equal(np.delete(scores, 13), np.delete(select(clean).scores, 13))


@pytest.fixture(scope="module")
def convex() -> Problem:
    return Problem(32, ridge=0.02)


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize(
    "solver", [{"solver": "cg", "cg_iterations": 20, "cg_tolerance": 1e-6}, {"solver": "lissa", "lissa_depth": 120}]
)
def test_on_a_convex_problem_the_scores_are_the_closed_form(monkeypatch, convex, solver, curvature):
    monkeypatch.setattr(influence, "scoring_model", convex.scoring_model)
    weights, expected = convex.weights(**solver, curvature=curvature), convex.closed_form()
    assert weights.details["damping"] == pytest.approx(convex.ridge, rel=1e-5)
    np.testing.assert_allclose(weights.scores, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert weights.notes == ()


@pytest.mark.parametrize(("solver", "at_least"), [("cg", 0.98), ("ekfac", 0.9)])
def test_the_scores_foretell_what_leaving_a_row_out_does(monkeypatch, solver, at_least):
    problem = Problem(64, ridge=0.02)
    monkeypatch.setattr(influence, "scoring_model", problem.scoring_model)
    scores, effects = problem.weights(solver=solver).scores, problem.effects()
    assert spearmanr(scores, effects).statistic > at_least
    if solver == "cg":  # and by how much: a row's share of the mean loss is 1 / n_train
        slope = np.polyfit(scores / problem.n_train, effects, 1)[0]
        assert slope == pytest.approx(1, abs=0.1)


def test_on_a_convex_problem_ekfac_is_near_the_closed_form_and_nearer_than_the_gradient(monkeypatch):
    problem = Problem(64, ridge=0.02)
    monkeypatch.setattr(influence, "scoring_model", problem.scoring_model)
    expected = problem.closed_form()
    by_ekfac = spearmanr(problem.weights(solver="ekfac").scores, expected).statistic
    one_term = problem.weights(solver="lissa", lissa_depth=1)  # the gradient, divided by the scale
    by_gradient = spearmanr(one_term.scores, expected).statistic
    assert by_ekfac > 0.93
    assert by_ekfac > by_gradient
