"""What every trainer promises. A new one is added to `METHODS`, and has its tests."""

import numpy as np
import pytest
import torch

from duet_ray.config import TrainingConfig
from duet_ray.errors import ConfigError, SampleFailed
from duet_ray.records import TokenRow
from duet_ray.training import TRAINERS, Halt, Trainer, check_installed, make_trainer
from tests.selection.toy_domain import toy_domain
from tests.tiny_model import tiny_llama, tiny_tokenizer

METHODS = [
    TrainingConfig(method="lora", rank=4, learning_rate=1e-2, epochs=2, batch_size=8, max_tokens=16),
    TrainingConfig(method="full", learning_rate=1e-3, epochs=2, batch_size=8, max_tokens=16),
]
IDS = torch.arange(4, 20)[None]


@pytest.fixture(params=METHODS, ids=lambda s: s.method)
def trainer(request) -> Trainer:
    if request.param.method == "full":
        pytest.importorskip("deepspeed")
    return make_trainer(request.param, tiny_llama(), tiny_tokenizer())


def logits(trainer: Trainer) -> torch.Tensor:
    with torch.no_grad():
        return trainer.model(IDS).logits


def rows(seed: int = 0) -> list[TokenRow]:
    return toy_domain(20, seed=seed).train.items


def test_every_trainer_has_its_contract_tests():
    assert {s.method for s in METHODS} == set(TRAINERS)


def test_before_training_the_model_is_the_base(trainer):
    assert torch.equal(logits(trainer), tiny_llama()(IDS).logits)
    assert not trainer.model.training


def test_training_lowers_the_loss_and_reports_what_it_did(trainer):
    steps: list[tuple[int, int]] = []
    report = trainer.train(rows(), seed=0, on_step=lambda *s: steps.append(s))
    assert (report.n_rows, report.n_steps) == (20, 6)
    assert report.n_tokens == 2 * sum(map(len, rows()))
    assert report.last_loss < report.first_loss
    assert report.seconds > 0
    assert steps == [(i + 1, 6) for i in range(6)]
    assert not trainer.model.training
    assert set(report.to_json()) >= {"n_rows", "n_steps", "first_loss", "last_loss", "micro_batch_size"}


def test_the_same_rows_and_seed_give_the_same_model_in_whatever_order_samples_come(trainer):
    trainer.train(rows(), seed=1)
    first = logits(trainer)
    trainer.train(rows(seed=9), seed=2)
    assert not torch.equal(logits(trainer), first)
    trainer.train(rows(), seed=1)
    assert torch.equal(logits(trainer), first)
    trainer.train(rows(), seed=3)
    assert not torch.equal(logits(trainer), first)


def test_a_sample_may_have_settings_of_its_own(trainer):
    """It is what a trainer made with these settings would make of it, and the next sample is as ever."""
    own = trainer._training
    trainer.train(rows(), seed=1)
    before = logits(trainer)
    changes = {"learning_rate": 5e-3, "epochs": 1, "batch_size": 5, "schedule": "cosine", "weight_decay": 0.1}
    other = own.model_copy(update={**changes, **({"rank": 2, "layers": [1]} if own.method == "lora" else {})})
    report = trainer.train(rows(), seed=1, training=other)
    found = logits(trainer)
    assert report.n_steps == 4
    trainer.train(rows(), seed=1)
    assert torch.equal(logits(trainer), before)
    trainer.reset()
    made = make_trainer(other, tiny_llama(), tiny_tokenizer())
    made.train(rows(), seed=1)
    assert torch.equal(logits(made), found)
    assert not torch.equal(found, before)


def test_reset_is_the_untouched_base(trainer):
    before = logits(trainer)
    trainer.train(rows(), seed=0)
    trainer.reset()
    assert torch.equal(logits(trainer), before)


def test_save_and_load_give_the_same_model(trainer, tmp_path):
    trainer.train(rows(), seed=0)
    trained = logits(trainer)
    trainer.save(tmp_path / "new" / "model")
    assert not [f for f in (tmp_path / "new" / "model").iterdir() if f.suffix not in (".json", ".safetensors")]
    trainer.reset()
    trainer.load(tmp_path / "new" / "model")
    assert torch.equal(logits(trainer), trained)
    assert not trainer.model.training


def test_a_failed_sample_leaves_the_untouched_base(trainer):
    before = logits(trainer)
    no_completion = TokenRow(np.arange(10, 14, dtype=np.int32), np.zeros(4, dtype=bool))
    with pytest.raises(SampleFailed):
        trainer.train([no_completion], seed=0)
    assert torch.equal(logits(trainer), before)


def test_an_interrupted_sample_leaves_the_untouched_base(trainer):
    before = logits(trainer)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.train(rows(), seed=0, on_step=interrupt)
    assert torch.equal(logits(trainer), before)
    assert not trainer.model.training


def test_a_sample_that_is_stopped_and_taken_up_is_the_same(trainer, tmp_path):
    trainer.train(rows(), seed=1)
    calm = logits(trainer)
    for after in (0.34, 0.67, 1.0):
        report = trainer.train(rows(), seed=1, halt=Halt(folder=tmp_path / "state", after=after))
    assert report.n_steps == 6
    assert torch.equal(logits(trainer), calm)


def test_a_package_that_is_missing_is_named_before_the_start(monkeypatch):
    monkeypatch.setattr("duet_ray.training.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'training\.method: full needs DeepSpeed.*pip install "duet-ray\[full\]"'):
        check_installed(TrainingConfig(method="full"))
    check_installed(TrainingConfig(method="lora"))


def test_an_unknown_method_lists_the_known_ones():
    unknown = TrainingConfig.model_construct(method="magic")
    with pytest.raises(ConfigError, match=r"training\.method: .*'magic'; there are: full, lora"):
        make_trainer(unknown, None, None)
