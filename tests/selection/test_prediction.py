from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from duet_ray.config import SelectionConfig, TrainingConfig
from duet_ray.errors import SelectionError
from duet_ray.selection import prediction, select
from duet_ray.selection.base import Findings, RowWeights, SelectionContext
from duet_ray.selection.embeddings import unit
from duet_ray.selection.prediction import Predicted, fit, held_out_correlation, rank_correlation
from duet_ray.selection.scoring import Scoring
from duet_ray.selection.weighting import from_scores
from tests.selection.toy_domain import ToyDomain, toy_domain
from tests.tiny_model import tiny_llama, tiny_tokenizer

N_ROWS, WIDTH, N_EXACT = 400, 6, 100
DOMAIN = toy_domain(N_ROWS)
EMBEDDINGS = unit(np.random.default_rng(0).normal(size=(N_ROWS, WIDTH)))
TRUTH = np.sinh(4 * EMBEDDINGS.astype(np.float64) @ np.arange(1, WIDTH + 1) / WIDTH)
"""Linear in the embeddings on some scale, and with heavy tails on its own."""
NOISE = np.random.default_rng(1).standard_t(2, size=N_ROWS)


@dataclass
class Known:
    """A method whose scores are known, and that counts the rows it is asked for."""

    scores: np.ndarray
    asked: list[int]
    name: str = "influence"

    def prepare(self, domain: Any, context: SelectionContext, folder: Any) -> Findings:
        return Findings(details={"prepared": 1.0})

    def measure(self, domain: Any, rows: np.ndarray, context: SelectionContext, folder: Any) -> np.ndarray:
        self.asked += rows.tolist()
        return self.scores[rows]

    def weigh(self, domain: Any, measured: np.ndarray, context: SelectionContext, folder: Any) -> RowWeights:
        return from_scores(measured, context.settings, domain.name)


@pytest.fixture(autouse=True)
def known_embeddings(monkeypatch):
    monkeypatch.setattr(prediction, "embed", lambda domain, rows, context: EMBEDDINGS[rows])


def run(
    monkeypatch, scores: np.ndarray, *, seed: int = 0, domain: ToyDomain = DOMAIN, **settings
) -> tuple[RowWeights, list[int]]:
    """The weights of a domain by the scoring's three steps, and the rows that were scored exactly."""
    inner = Known(scores, [])
    monkeypatch.setattr("duet_ray.selection.scoring.make_selector", lambda _: Predicted(inner))
    chosen = SelectionConfig(**{"method": "influence", "n_exact_rows": N_EXACT, **settings})
    context = SelectionContext(settings=chosen, training=TrainingConfig(), seed=seed, load_base=lambda: (None, None))
    return select(domain, context), inner.asked


def test_what_is_linear_in_the_embeddings_is_predicted(monkeypatch):
    weights, exact = run(monkeypatch, TRUTH)
    others = np.setdiff1d(np.arange(N_ROWS), exact)
    assert len(exact) == len(set(exact)) == N_EXACT
    assert spearmanr(weights.scores[others], TRUTH[others]).statistic > 0.9
    assert weights.details["rank_correlation"] == pytest.approx(
        spearmanr(weights.scores[others], TRUTH[others]).statistic, abs=0.05
    )
    assert weights.details["exact_rows"] == N_EXACT
    assert weights.details["prepared"] == 1
    assert f"{N_EXACT} of {N_ROWS} rows are scored exactly" in weights.notes[0]


def test_exact_rows_keep_their_scores_to_the_last_bit(monkeypatch):
    weights, exact = run(monkeypatch, TRUTH)
    assert not np.array_equal(TRUTH, TRUTH.astype(np.float32))
    assert weights.scores[exact].tobytes() == TRUTH[exact].tobytes()


def test_predictions_are_on_the_scale_of_exact_scores_and_within_their_range(monkeypatch):
    weights, exact = run(monkeypatch, 1e6 + 1e3 * TRUTH)
    others = np.setdiff1d(np.arange(N_ROWS), exact)
    predicted, known = weights.scores[others], weights.scores[exact]
    assert known.min() <= predicted.min() < predicted.max() <= known.max()
    for share in (25, 50, 75):
        assert np.percentile(predicted, share) == pytest.approx(np.percentile(known, share), abs=0.25 * known.std())


def test_a_monotone_change_of_the_scores_changes_the_predictions_alike(monkeypatch):
    plain, exact = run(monkeypatch, TRUTH)
    cubed, _ = run(monkeypatch, TRUTH**3)
    others = np.setdiff1d(np.arange(N_ROWS), exact)
    assert spearmanr(plain.scores[others], cubed.scores[others]).statistic > 0.999
    assert plain.details["rank_correlation"] == pytest.approx(cubed.details["rank_correlation"], abs=1e-3)


def test_the_length_of_a_row_is_a_feature(monkeypatch):
    monkeypatch.setattr(prediction, "embed", lambda domain, rows, context: np.ones((len(rows), 2), np.float32))
    weights, _ = run(monkeypatch, np.sqrt(DOMAIN.train.n_tokens))
    np.testing.assert_allclose(weights.scores, np.sqrt(DOMAIN.train.n_tokens), atol=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_scores_that_embeddings_say_nothing_of_are_refused(monkeypatch, seed):
    with pytest.raises(
        SelectionError,
        match=r"domain letters: .* correlation of -?0\.\d\d .* held out of 100, and "
        r"selection.min_rank_correlation is 0.3; raise selection.n_exact_rows, .* null .* selection.embedding_model",
    ):
        run(monkeypatch, NOISE, seed=seed)
    weights, _ = run(monkeypatch, NOISE, seed=seed, min_rank_correlation=-1)
    assert np.isfinite(weights.scores).all()


@pytest.mark.parametrize("shard_rows", [9, 150])
def test_the_borders_of_shards_change_nothing(monkeypatch, shard_rows):
    whole, exact = run(monkeypatch, TRUTH)
    cut, again = run(monkeypatch, TRUTH, shard_rows=shard_rows)
    assert exact == again
    np.testing.assert_array_equal(whole.scores, cut.scores)
    np.testing.assert_array_equal(whole.probabilities, cut.probabilities)


def test_which_rows_are_exact_follows_from_the_seed(monkeypatch):
    first, rows = run(monkeypatch, TRUTH)
    again, same = run(monkeypatch, TRUTH)
    _, others = run(monkeypatch, TRUTH, seed=1)
    assert rows == same != others
    np.testing.assert_array_equal(first.scores, again.scores)


def test_what_is_made_of_the_scores_is_the_methods_own_matter(monkeypatch):
    top, _ = run(monkeypatch, TRUTH, method="top_n")
    assert top.order.tolist() == np.argsort(-top.scores, kind="stable").tolist()
    kept, _ = run(monkeypatch, TRUTH, method="remove_harmful", harmful_fraction=0.25)
    assert (kept.probabilities == 0).sum() == N_ROWS // 4
    np.testing.assert_array_equal(top.scores, kept.scores)


def test_a_domain_with_no_more_rows_is_scored_exactly_throughout(monkeypatch):
    monkeypatch.setattr(prediction, "embed", lambda *_: pytest.fail("embeddings are not needed"))
    weights, exact = run(monkeypatch, NOISE, n_exact_rows=N_ROWS)
    assert exact == list(range(N_ROWS))
    np.testing.assert_array_equal(weights.scores, NOISE)
    assert "rank_correlation" not in weights.details


def test_scores_that_are_all_equal_are_uniform_weights(monkeypatch):
    weights, _ = run(monkeypatch, np.full(N_ROWS, 2.5))
    np.testing.assert_array_equal(weights.scores, 2.5)
    np.testing.assert_allclose(weights.probabilities, 1 / N_ROWS)
    assert "have one score" in weights.notes[0]
    assert "uniform weights" in weights.notes[1]


def test_scores_that_are_mostly_equal_are_predicted_all_the_same(monkeypatch):
    weights, exact = run(monkeypatch, np.maximum(TRUTH, 0))
    others = np.setdiff1d(np.arange(N_ROWS), exact)
    assert (TRUTH[others] <= 0).mean() > 0.4
    assert spearmanr(weights.scores[others], np.maximum(TRUTH, 0)[others]).statistic > 0.8


def test_a_score_that_is_not_finite_is_the_methods_own_error(monkeypatch):
    scores = TRUTH.copy()
    scores[run(monkeypatch, TRUTH)[1][3]] = np.nan
    with pytest.raises(SelectionError, match=r"1 of 100 scores are not finite; .*selection\.damping"):
        run(monkeypatch, scores)


def test_a_prediction_never_sees_the_row_it_is_compared_with():
    """What memorises its rows ranks them perfectly, and held-out rows not at all."""
    generator = np.random.default_rng(0)
    features, scores = generator.normal(size=(60, 200)), generator.normal(size=60)
    assert rank_correlation(fit(features, scores)(features), scores) > 0.6
    found = [held_out_correlation(features, generator.normal(size=60), seed) for seed in range(20)]
    assert abs(np.mean(found)) < 0.12


def test_rank_correlation_is_spearmans():
    first, second = np.random.default_rng(0).integers(0, 5, size=(2, 40))
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert rank_correlation(np.ones(5), np.arange(5)) == 0


def test_a_real_method_is_predicted_with_the_base_models_embeddings(monkeypatch, tmp_path):
    monkeypatch.undo()
    settings = SelectionConfig(method="influence", n_exact_rows=32, n_hessian_rows=8, min_rank_correlation=-1)
    model = tiny_llama()
    context = SelectionContext(
        settings=settings,
        training=TrainingConfig(rank=2, learning_rate=1e-2, max_tokens=16, target_modules=["q_proj"]),
        seed=0,
        load_base=lambda: (model, tiny_tokenizer()),
    )
    domain = toy_domain(80, 8)
    weights = select(domain, context)
    scoring = Scoring(domain, replace(context, settings=settings.model_copy(update={"n_exact_rows": None})), tmp_path)
    scoring.prepare()
    scoring.measure(0)
    exact = scoring.weigh().scores
    same = np.isclose(weights.scores, exact, rtol=1e-4, atol=1e-6 * np.abs(exact).max())
    assert same.sum() == 32
    assert -1 <= weights.details["rank_correlation"] <= 1
