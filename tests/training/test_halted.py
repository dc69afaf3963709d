"""Leaving off and taking up: the result is that of a training that nothing happened to."""

from pathlib import Path
from typing import Any

import pytest
import torch

from duet_ray.config import TrainingConfig
from duet_ray.training import Halt
from duet_ray.training.batches import n_steps_until, step_seed
from duet_ray.training.halted import STATE_FILE, Progress, TrainingState, read_state, write_state
from duet_ray.training.lora import LoraTrainer
from tests.selection.toy_domain import toy_domain
from tests.tiny_model import tiny_llama, tiny_tokenizer

ROWS = toy_domain(20, seed=0).train.items
N_STEPS = 6


class Killed(BaseException):
    pass


def make_trainer() -> LoraTrainer:
    settings = TrainingConfig(
        rank=4, learning_rate=1e-2, epochs=2, batch_size=8, max_tokens=16, dropout=0.2, weight_decay=0.1
    )
    return LoraTrainer(tiny_llama(), tiny_tokenizer(), settings)


def train(halt: Halt | None = None, *, kill_at: int | None = None, trainer: LoraTrainer | None = None) -> Any:
    """(adapter's weights, report, steps made)."""
    trainer = trainer or make_trainer()
    steps: list[int] = []

    def on_step(done: int, total: int) -> None:
        assert total == N_STEPS
        steps.append(done)
        if done == kill_at:
            raise Killed

    report = trainer.train(ROWS, seed=7, on_step=on_step, halt=halt)
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n}
    return weights, report, steps


def assert_same(first: Any, second: Any) -> None:
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0] | second[0])
    assert (first[1].first_loss, first[1].last_loss) == (second[1].first_loss, second[1].last_loss)
    assert first[1].n_steps == second[1].n_steps == N_STEPS


def test_killed_at_every_step_and_taken_up_by_another_worker(tmp_path: Path) -> None:
    calm = train()
    for kill_at in range(1, N_STEPS + 1):
        halt = Halt(folder=tmp_path / str(kill_at), every_seconds=0.0)
        with pytest.raises(Killed):
            train(halt, kill_at=kill_at)
        again = train(halt)
        assert_same(again, calm)
        assert again[2] == list(range(kill_at, N_STEPS + 1)), "the step under way is made again, and no other"


def test_stopped_at_shares_of_the_steps(tmp_path: Path) -> None:
    calm = train()
    trainer = make_trainer()
    made = []
    for after in (0.34, 0.34, 0.5, 1.0):
        found = train(Halt(folder=tmp_path, after=after), trainer=trainer)
        made.append(found[2])
        trainer.reset()
    assert made == [[1, 2], [], [3], [4, 5, 6]]
    assert_same(found, calm)


def test_a_stop_leaves_the_model_of_that_moment_in_memory(tmp_path: Path) -> None:
    first = train(Halt(folder=tmp_path, after=0.5))
    again = train(Halt(folder=tmp_path, after=0.5))
    assert first[1].n_steps == again[1].n_steps == 3
    assert again[2] == []
    assert all(torch.equal(first[0][name], again[0][name]) for name in first[0])
    assert not torch.equal(next(iter(first[0].values())), next(iter(train()[0].values())))


def test_nothing_is_written_without_being_asked(tmp_path: Path) -> None:
    train(Halt(folder=tmp_path / "state"))
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("damage", [b"", b"\x10", "cut"])
def test_a_damaged_state_is_no_state(tmp_path: Path, damage: bytes | str) -> None:
    train(Halt(folder=tmp_path, after=0.5))
    whole = (tmp_path / STATE_FILE).read_bytes()
    (tmp_path / STATE_FILE).write_bytes(whole[: len(whole) // 2] if isinstance(damage, str) else damage)
    assert read_state(tmp_path) is None
    found = train(Halt(folder=tmp_path))
    assert found[2] == list(range(1, N_STEPS + 1))
    assert_same(found, train())


def test_a_state_comes_back_as_it_was_written(tmp_path: Path) -> None:
    weights = {"a.b": torch.randn(3, 2), "c": torch.randn(4).bfloat16()}
    state = TrainingState(
        progress=Progress(n_done=3, first_loss=0.1 + 0.2, last_loss=1e-300, micro_batch_size=4),
        weights=weights,
        moments={"a.b": (torch.randn(3, 2), torch.rand(3, 2))},
    )
    write_state(tmp_path / "new", state)
    found = read_state(tmp_path / "new")
    assert found is not None
    assert found.progress == state.progress
    assert all(torch.equal(found.weights[name], weights[name]) for name in weights)
    assert all(torch.equal(a, b) for a, b in zip(found.moments["a.b"], state.moments["a.b"], strict=True))
    assert set(found.moments) == {"a.b"}
    assert read_state(tmp_path / "nowhere") is None


def test_shares_of_steps() -> None:
    assert [n_steps_until(share, 10) for share in (0.01, 0.25, 0.5, 0.99, 1.0)] == [1, 2, 5, 9, 10]
    assert n_steps_until(0.5, 1) == 1


def test_every_step_and_every_worker_has_a_seed_of_its_own() -> None:
    seeds = {step_seed(seed, step, rank) for seed in (0, 1) for step in range(50) for rank in (0, 1)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
