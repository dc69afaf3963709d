import numpy as np
import pytest
import torch

from duet_ray.errors import SelectionError
from duet_ray.records import TokenRow
from duet_ray.selection import select
from duet_ray.selection.projection import CountSketch
from tests.selection.explicit_gradients import context_of, dense, moments_by_hand, n_loss_tokens, recorded
from tests.selection.toy_domain import ToyDomain, ToyRows, toy_domain


@pytest.mark.parametrize(("projection", "epochs"), [(None, 3), (64, 1)])
def test_the_scores_are_those_of_a_direct_computation(projection, epochs, monkeypatch):
    domain = toy_domain(18, 5)
    sketches = recorded(monkeypatch, CountSketch, "draw")
    context = context_of(method="tracin", projection=projection, epochs=epochs)
    weights = select(domain, context)
    expected = torch.zeros(18, dtype=torch.float64)
    for moment in moments_by_hand(domain, context, epochs):
        train, gradient = moment.train, moment.validation.sum(dim=0) / n_loss_tokens(domain.validation.items).sum()
        if projection is not None:
            matrix = dense(sketches[0])
            train, gradient = train @ matrix.T, matrix @ gradient
        expected += moment.learning_rate * (train @ gradient)
    np.testing.assert_allclose(weights.scores, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
    assert weights.details["checkpoints"] == epochs
    assert weights.details["fit_rows"] == 18


@pytest.mark.parametrize("projection", [None, 64])
def test_batch_size_and_shard_borders_do_not_change_the_scores(projection):
    domain, settings = toy_domain(20, 6), {"method": "tracin", "projection": projection, "epochs": 2}
    whole = select(domain, context_of(batch_size=20, **settings)).scores
    cut = select(domain, context_of(batch_size=3, shard_rows=7, **settings)).scores
    np.testing.assert_allclose(cut, whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())


def test_corrupted_rows_score_lower_and_are_drawn_less():
    domain = toy_domain(192, 24, corrupted=0.3)
    weights = select(domain, context_of(method="tracin"))
    scores, wrong = weights.scores, domain.corrupted
    # The share of (clean, corrupted) pairs in the right order: 0.5 by chance, 0.80 to 0.90 over four seeds.
    assert (scores[~wrong][:, None] > scores[wrong][None]).mean() > 0.75
    assert weights.probabilities[wrong].sum() < 0.6 * wrong.mean()


def test_progress_counts_rows_of_all_checkpoints():
    stages: list[tuple[str, int, int]] = []
    context = context_of(method="tracin", epochs=2, on_progress=lambda *args: stages.append(args))
    select(toy_domain(20, 6), context)
    assert [s for s in stages if s[0] == "validation"] == [("validation", 1, 2), ("validation", 2, 2)]
    assert [s for s in stages if s[0] == "score"] == [("score", n, 40) for n in (16, 20, 36, 40)]


def test_validation_rows_without_completion_tokens_are_an_error():
    empty = ToyRows([TokenRow(np.arange(10, 14, dtype=np.int32), np.zeros(4, dtype=bool))] * 3)
    domain = ToyDomain(toy_domain(12).train, empty, np.zeros(12, bool))
    with pytest.raises(SelectionError, match=r"domain letters: .* none of the 3 rows has a completion.*max_tokens"):
        select(domain, context_of(method="tracin", epochs=1))
