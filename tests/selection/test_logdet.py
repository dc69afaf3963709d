from dataclasses import replace

import numpy as np
import pytest
from scipy.linalg.lapack import dpstrf

from duet_ray.config import SelectionConfig, TrainingConfig
from duet_ray.selection import select
from duet_ray.selection.base import SelectionContext
from duet_ray.selection.embeddings import unit
from duet_ray.selection.logdet import logdet_order
from tests.selection.toy_domain import ToyRows, toy_domain
from tests.tiny_model import tiny_llama, tiny_tokenizer


def context(**settings) -> SelectionContext:
    model = tiny_llama()
    return SelectionContext(
        settings=SelectionConfig(method="logdet", **settings),
        training=TrainingConfig(),
        seed=0,
        load_base=lambda: (model, tiny_tokenizer()),
    )


def random_rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Vectors of different lengths, so that no two gains tie at the start."""
    features = unit(np.random.default_rng(seed).normal(size=(n, d)))
    return features * np.linspace(0.7, 1, n, dtype=np.float32)[:, None]


def log_determinant(features: np.ndarray, scale: float) -> float:
    e = features.astype(np.float64)
    return float(np.linalg.slogdet(np.eye(len(e)) + scale * e @ e.T)[1])


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("seed", range(4))
def test_every_pick_is_the_one_that_brute_force_makes(scale, seed):
    features = random_rows(12, 4, seed)  # picks 5 to 12 are beyond the rank of K
    order, total = logdet_order(features, 12, scale=scale)
    taken: list[int] = []
    for pick in order:
        gains = {i: log_determinant(features[[*taken, i]], scale) for i in range(12) if i not in taken}
        assert pick == max(gains, key=gains.__getitem__)
        taken.append(int(pick))
    assert total == pytest.approx(log_determinant(features, scale), abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_order_is_that_of_a_pivoted_cholesky_decomposition(scale):
    features = random_rows(60, 6)
    kernel = np.eye(60) + scale * features.astype(np.float64) @ features.T.astype(np.float64)
    factor, pivots, rank, info = dpstrf(kernel)  # LAPACK's takes the largest remaining diagonal element, too
    assert (rank, info) == (60, 0)
    order, total = logdet_order(features, 60, scale=scale)
    assert order.tolist() == (pivots - 1).tolist()
    assert total == pytest.approx(2 * np.log(np.diag(factor)).sum(), abs=1e-4)


def test_copies_of_a_row_come_after_all_different_rows():
    basis = np.eye(8, dtype=np.float32)
    features = np.concatenate([np.repeat(basis[:1], 5, axis=0), basis[1:]])
    order, _ = logdet_order(features, 12)
    assert order.tolist() == [0, 5, 6, 7, 8, 9, 10, 11, 1, 2, 3, 4]  # equal rows by their ids


def test_gains_that_differ_by_rounding_only_are_equal():
    features = unit(np.random.default_rng(0).normal(size=(50, 20)))
    squares = np.square(features.astype(np.float64)).sum(axis=1)
    assert 0 < np.ptp(squares) < 1e-6
    assert np.argmax(squares) != 0
    assert logdet_order(features, 50)[0][0] == 0


def test_rows_without_direction_come_last():
    features = np.concatenate([np.zeros((2, 3), np.float32), np.eye(3, dtype=np.float32)])
    assert logdet_order(features, 5)[0].tolist() == [2, 3, 4, 0, 1]


def test_the_domain_is_ordered_by_its_centred_embeddings():
    domain = toy_domain(30)
    whole = select(domain, context())
    assert sorted(whole.order) == list(range(30))
    assert whole.probabilities is None
    assert whole.scores is None
    assert whole.details["greedy_rows"] == 30
    np.testing.assert_array_equal(select(domain, context(shard_rows=7, batch_size=3)).order, whole.order)
    short = select(domain, replace(context(), n_drawn=10))
    np.testing.assert_array_equal(short.order[:10], whole.order[:10])
    assert short.details["greedy_rows"] == 10
    assert 0 < short.details["logdet"] < whole.details["logdet"]


def test_rows_that_are_all_the_same_stay_in_order_and_say_so():
    domain = toy_domain(6)
    domain = replace(domain, train=ToyRows(domain.train.items[:1] * 6))
    weights = select(domain, context())
    assert weights.order.tolist() == list(range(6))
    assert "all 6 rows have one embedding" in weights.notes[0]
