from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from duet_ray.config import SelectionConfig, TrainingConfig
from duet_ray.selection import select
from duet_ray.selection.base import SelectionContext
from duet_ray.selection.coreset import k_center_order
from duet_ray.selection.embeddings import unit
from tests.selection.toy_domain import toy_domain
from tests.tiny_model import tiny_llama, tiny_tokenizer


def context(**settings) -> SelectionContext:
    model = tiny_llama()
    return SelectionContext(
        settings=SelectionConfig(method="coreset", **settings),
        training=TrainingConfig(),
        seed=0,
        load_base=lambda: (model, tiny_tokenizer()),
    )


def random_rows(n: int, d: int, seed: int) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(n, d)))


def radius(features: np.ndarray, centres: np.ndarray) -> float:
    """The largest distance of any row to its nearest centre."""
    return float(np.linalg.norm(features[:, None] - features[centres][None], axis=2).min(axis=1).max())


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_the_cover_is_at_most_twice_as_wide_as_the_best(k, seed):
    features = random_rows(12, 3, seed)
    order, found = k_center_order(features, k)
    best = min(radius(features, np.array(centres)) for centres in combinations(range(12), k))
    assert found == pytest.approx(radius(features, order[:k]), abs=1e-5)
    assert best <= found + 1e-5 <= 2 * best + 1e-5


def test_every_row_is_the_farthest_from_those_before_it():
    features = random_rows(60, 5, 0)
    order, _ = k_center_order(features, 60)
    assert order[0] == np.argmin(np.linalg.norm(features - features.mean(axis=0), axis=1))
    for place in range(1, 60):
        nearest = np.linalg.norm(features[:, None] - features[order[:place]][None], axis=2).min(axis=1)
        assert nearest[order[place]] == pytest.approx(nearest.max(), abs=1e-5)


def test_each_cluster_is_visited_before_any_is_visited_again():
    generator = np.random.default_rng(0)
    sizes = [50, 20, 5, 1]
    cluster = np.repeat(np.arange(4), sizes)
    features = unit(np.eye(8)[cluster] + 0.05 * generator.normal(size=(76, 8)))
    order, _ = k_center_order(features, 10)
    assert set(cluster[order[:4]]) == {0, 1, 2, 3}


def test_copies_of_a_row_come_last():
    features = np.concatenate([random_rows(20, 4, 1), random_rows(20, 4, 1)[:6]])
    order, found = k_center_order(features, 20)
    assert sorted(order[:20]) == list(range(20))
    assert found == pytest.approx(0, abs=1e-3)
    assert order[20:].tolist() == [20, 21, 22, 23, 24, 25]


def test_the_domain_is_ordered_by_its_centred_embeddings():
    domain = toy_domain(30)
    whole = select(domain, context())
    assert sorted(whole.order) == list(range(30))
    assert whole.probabilities is None
    assert whole.scores is None
    assert whole.details["radius"] == 0
    np.testing.assert_array_equal(select(domain, context(shard_rows=7, batch_size=3)).order, whole.order)
    short = select(domain, replace(context(), n_drawn=10))
    np.testing.assert_array_equal(short.order[:10], whole.order[:10])
    assert short.details["radius"] > 0
