import numpy as np
import pytest

from duet_ray.config import TrainingConfig
from duet_ray.training.batches import effective_batches, learning_rate, micro_batch_size, micro_batches


def config(**changes) -> TrainingConfig:
    return TrainingConfig(**{"learning_rate": 1.0, **changes})


def test_every_row_comes_once_an_epoch_in_another_order():
    batches = effective_batches(10, config(batch_size=4, epochs=2), seed=3)
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2]
    first, second = np.concatenate(batches[:3]), np.concatenate(batches[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()


def test_the_order_follows_from_the_seed():
    orders = [np.concatenate(effective_batches(50, config(), seed=s)).tolist() for s in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_micro_batches_hold_every_row_once_and_waste_less_than_half():
    lengths = np.random.default_rng(0).integers(1, 512, size=40).tolist()
    groups = list(micro_batches(lengths, 16))
    assert sorted(i for g in groups for i in g) == list(range(40))
    for group in groups:
        ours = [lengths[i] for i in group]
        assert len(group) <= 16
        assert max(ours) <= 64 or min(ours) * 2 >= max(ours)


def test_short_rows_share_a_pass():
    assert list(micro_batches([60, 2, 30, 1], 4)) == [[0, 2, 1, 3]]
    assert list(micro_batches([130, 2, 66, 1], 4)) == [[0, 2], [1, 3]]


def test_the_micro_batch_is_as_configured_or_follows_from_the_longest_row():
    assert micro_batch_size(config(micro_batch_size=2), 512, "cpu") == 2
    assert micro_batch_size(config(batch_size=16), 512, "cpu") == 2
    assert micro_batch_size(config(batch_size=16), 10_000, "cpu") == 1
    assert micro_batch_size(config(batch_size=16), 8, "cpu") == 16
    assert micro_batch_size(config(batch_size=16), 512, "cuda") == 16


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.5]),
        ("cosine", [0.5, 1.0, 1.0, 0.5]),
    ],
)
def test_warm_up_then_the_schedule(schedule, expected):
    training = config(schedule=schedule, warmup_ratio=0.5)
    assert [learning_rate(s, 4, training) for s in range(4)] == pytest.approx(expected)


def test_cosine_is_a_cosine():
    training = config(schedule="cosine")
    assert [learning_rate(s, 4, training) for s in range(4)] == pytest.approx([1, 0.853553, 0.5, 0.146447], rel=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_no_step_has_rate_zero(schedule):
    for n_steps in (1, 2, 7):
        assert all(learning_rate(s, n_steps, config(schedule=schedule, warmup_ratio=0.3)) > 0 for s in range(n_steps))
