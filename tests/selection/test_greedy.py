import numpy as np
import pytest

from duet_ray.selection import coreset, greedy, logdet
from duet_ray.selection.embeddings import unit
from duet_ray.selection.greedy import greedy_order

OBJECTIVES = {
    "logdet": lambda features: logdet._LogDeterminant(features, 10.0),
    "k-center": coreset._Distances,
}


@pytest.fixture(params=OBJECTIVES)
def objective_of(request):
    return OBJECTIVES[request.param]


def rows(n: int = 300, d: int = 6, *, seed: int = 0) -> np.ndarray:
    """A few clusters, so that some gains fall at once and others late."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(5, d))
    features = unit(centres[generator.integers(5, size=n)] + 0.3 * generator.normal(size=(n, d)))
    return features * np.linspace(0.7, 1, n, dtype=np.float32)[:, None]


def plain_greedy(features: np.ndarray, objective, n_picks: int, first: int) -> list[int]:
    """Every gain brought up to date with every row taken."""
    gains, everyone, taken = objective.start(), np.arange(len(features)), [first]
    while True:
        products = (features @ objective.take(taken[-1]))[:, None]
        gains = objective.lower(gains, products, everyone, np.array(taken[-1:]))
        gains[taken] = -np.inf
        if len(taken) == n_picks:
            return taken
        taken.append(int(np.argmax(gains >= gains.max() - greedy.TIE)))


@pytest.mark.parametrize("pool_rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("max_pending", [1, 5, 256])
def test_a_pool_changes_nothing_but_the_time(objective_of, pool_rows, max_pending, monkeypatch):
    monkeypatch.setattr(greedy, "MAX_PENDING", max_pending)
    monkeypatch.setattr(greedy, "BLOCK_ROWS", 77)
    features = rows()
    order, _ = greedy_order(features, objective_of(features), 120, first=3, pool_rows=pool_rows)
    assert order[:120].tolist() == plain_greedy(features, objective_of(features), 120, 3)
    assert sorted(order) == list(range(300))


def test_the_rows_after_the_greedy_ones_stand_in_order_of_their_gains(objective_of):
    features = rows()
    order, gains = greedy_order(features, objective_of(features), 20, first=0, pool_rows=16)
    assert (np.diff(gains[order[20:]]) <= greedy.TIE).all()
    assert np.isneginf(gains[order[:20]]).all()
    np.testing.assert_array_equal(order[20], np.argmax(gains))


def test_a_longer_order_begins_with_the_shorter_one(objective_of):
    features = rows()
    short, long = (greedy_order(features, objective_of(features), n, first=0, pool_rows=32)[0] for n in (30, 90))
    np.testing.assert_array_equal(short[:30], long[:30])


def test_few_passes_over_all_rows_are_needed(objective_of, monkeypatch):
    passes = []
    catch_up = greedy._Search.catch_up
    monkeypatch.setattr(greedy._Search, "catch_up", lambda self: (passes.append(1), catch_up(self)))
    features = rows(5000, 16)
    greedy_order(features, objective_of(features), 200, first=0, pool_rows=500)
    assert len(passes) < 40
