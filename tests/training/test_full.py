import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from duet_ray.config import TrainingConfig, ZeroConfig
from duet_ray.errors import ConfigError, SampleFailed, StoreError
from duet_ray.likelihood import collate, token_nll
from duet_ray.records import TokenRow
from duet_ray.training import Halt
from duet_ray.training.batches import effective_batches, learning_rate
from tests.tiny_model import tiny_llama, tiny_tokenizer
from tests.training.test_lora import logits, make_rows

pytest.importorskip("deepspeed", reason="full-parameter training needs the extra `full` (DeepSpeed)")

from duet_ray.training import full
from duet_ray.training.full import FullTrainer

ZEROS = [(stage, offload) for stage in (1, 2, 3) for offload in (False, True)]


def config(stage: int = 2, offload: bool = False, **changes) -> TrainingConfig:
    given = {"learning_rate": 1e-3, "epochs": 2, "batch_size": 8, "max_tokens": 64, **changes}
    return TrainingConfig(method="full", zero=ZeroConfig(stage=stage, offload_optimizer=offload), **given)


def make_trainer(dtype: torch.dtype = torch.float32, **changes) -> FullTrainer:
    return FullTrainer(tiny_llama(dtype=dtype), tiny_tokenizer(), config(**changes))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def reference(rows: list[TokenRow], settings: TrainingConfig, seed: int, dtype: torch.dtype):
    """Every weight by torch's AdamW, with float32 master weights beside a model of `dtype`.

    Returns:
        (the losses of the steps, the model).
    """
    model = tiny_llama(dtype=dtype).train()
    masters = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, weight_decay=settings.weight_decay)
    batches, losses = effective_batches(len(rows), settings, seed), []
    for step, ids in enumerate(batches):
        batch = collate([rows[i] for i in ids], 0)
        loss = token_nll(model, batch).sum() / batch.n_loss_tokens
        for master, gradient in zip(masters, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            master.grad = gradient.float()
        torch.nn.utils.clip_grad_norm_(masters, settings.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(batches), settings)
        optimizer.step()
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters, strict=True):
                p.copy_(master)
        losses.append(loss.item())
    return losses, model.eval()


@pytest.mark.parametrize(("stage", "offload"), ZEROS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_stage_gives_the_weights_of_a_plain_adamw_loop(stage, offload, dtype):
    """With clipping (the norm is above 0.5 throughout), decay and a schedule; rows of unequal length in one pass."""
    settings = config(stage, offload, weight_decay=0.1, max_grad_norm=0.5, schedule="cosine", warmup_ratio=0.2)
    trainer, rows = FullTrainer(tiny_llama(dtype=dtype), tiny_tokenizer(), settings), make_rows(21)
    report = trainer.train(rows, seed=3)
    losses, model = reference(rows, settings, 3, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert (report.n_steps, report.n_skipped) == (6, 0)
    assert [report.first_loss, report.last_loss] == pytest.approx([losses[0], losses[-1]], rel=tolerance)
    base, expected, trained = weights(tiny_llama(dtype=dtype)), weights(model), weights(trainer.model)
    assert trained.keys() == expected.keys()
    moved = sum((expected[n] - base[n]).float().abs().sum() for n in base)
    apart = sum((expected[n] - trained[n]).float().abs().sum() for n in base)
    assert apart < (1e-4 if dtype == torch.float32 else 2e-2) * moved
    assert {p.dtype for p in trained.values()} == {dtype}


@pytest.mark.parametrize(("stage", "dtype"), [(1, torch.bfloat16), (2, torch.float32), (3, torch.bfloat16)])
def test_the_micro_batch_does_not_change_the_result(stage, dtype):
    rows, base = make_rows(21), weights(tiny_llama(dtype=dtype))
    results = []
    for micro in (8, 1):
        trainer = make_trainer(dtype, stage=stage, micro_batch_size=micro, gradient_checkpointing=micro == 1)
        trainer.train(rows, seed=0)
        results.append(weights(trainer.model))
    moved = sum((results[0][n] - base[n]).float().abs().sum() for n in base)
    apart = sum((results[0][n] - results[1][n]).float().abs().sum() for n in base)
    assert apart < (1e-3 if dtype == torch.float32 else 5e-2) * moved


def test_the_base_and_all_that_is_global_are_left_as_they_were():
    trainer = make_trainer(stage=3)
    torch.manual_seed(11)
    generator, environment = torch.random.get_rng_state(), dict(os.environ)
    for seed in range(2):
        trainer.train(make_rows(), seed=seed)
        assert not torch.distributed.is_initialized()
        assert not trainer.model.training
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert dict(os.environ) == environment
    trainer.reset()
    untouched = tiny_llama().state_dict()
    assert all(torch.equal(p, untouched[n]) for n, p in trainer.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in trainer.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_saved_model_is_an_ordinary_one(dtype, tmp_path):
    # Loaded as the product loads it: `.to(bfloat16)` would round the rotary frequencies too.
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    before = logits(base.eval())
    trainer = FullTrainer(base, tiny_tokenizer(), config())
    trainer.train(make_rows(), seed=0)
    trainer.save(tmp_path / "model")
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(f.name for f in (tmp_path / "model").iterdir()) == names
    elsewhere = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert elsewhere.dtype == dtype
    trained = logits(trainer.model)
    assert torch.equal(logits(elsewhere), trained)
    trainer.train(make_rows(seed=3), seed=3)
    trainer.load(tmp_path / "model")
    assert torch.equal(logits(trainer.model), trained)
    trainer.reset()
    assert torch.equal(logits(trainer.model), before)


def test_weights_that_the_base_ties_stay_tied(tmp_path):
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    trainer = FullTrainer(model, tiny_tokenizer(), config(stage=3))
    trainer.train(make_rows(), seed=0)
    assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight
    trained = logits(trainer.model)
    trainer.save(tmp_path / "model")
    trainer.load(tmp_path / "model")
    assert torch.equal(logits(trainer.model), trained)


def test_a_folder_without_the_model_is_refused(tmp_path):
    trainer = make_trainer()
    with pytest.raises(StoreError, match=r"holds no model: config\.json and model\*\.safetensors are needed"):
        trainer.load(tmp_path)
    tiny_llama(hidden_size=48).save_pretrained(tmp_path / "wide")
    tiny_llama(n_layers=1).save_pretrained(tmp_path / "flat")
    tiny_llama().save_pretrained(tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"half")
    for name in ("wide", "flat", "damaged"):
        trainer.train(make_rows(), seed=0)
        with pytest.raises(StoreError, match="is damaged, or is not the base model's"):
            trainer.load(tmp_path / name)
        assert torch.equal(logits(trainer.model), logits(tiny_llama()))


def test_a_loss_that_is_not_finite_fails_the_sample_with_step_and_rate():
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.lm_head.weight[20] = math.nan
    with pytest.raises(SampleFailed, match=r"the loss is nan at step 1 of 6 \(learning rate 0\.001\)"):
        trainer.train(make_rows(), seed=0)
    assert not torch.distributed.is_initialized()


class Overflowing(torch.autograd.Function):
    """Nothing forward; backward, a gradient that is not finite."""

    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, gradient):
        return gradient * math.inf


def on_passes(trainer: FullTrainer, act) -> list[int]:
    """Call `act(pass number from 0, output)` after the embeddings of each pass; a list of their rows grows with it."""
    n_rows: list[int] = []

    def hook(_module, args, output):
        n_rows.append(len(args[0]))
        return act(len(n_rows) - 1, output)

    trainer.model.model.embed_tokens.register_forward_hook(hook)
    return n_rows


@pytest.mark.parametrize(("stage", "dtype"), [(1, torch.bfloat16), (2, torch.float32), (3, torch.float32)])
def test_steps_whose_gradients_overflow_are_skipped_and_counted(stage, dtype):
    trainer = make_trainer(dtype, stage=stage)
    on_passes(trainer, lambda i, output: Overflowing.apply(output) if i in (1, 4) else output)
    report = trainer.train(make_rows(), seed=0)
    assert (report.n_steps, report.n_skipped) == (6, 2)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_sample_all_of_whose_steps_are_skipped_fails():
    trainer = make_trainer()
    on_passes(trainer, lambda _, output: Overflowing.apply(output))
    with pytest.raises(SampleFailed, match="all 6 steps were skipped"):
        trainer.train(make_rows(), seed=0)


def test_a_model_that_training_left_untouched_fails_the_sample():
    with pytest.raises(SampleFailed, match=r"every weight is the base's.*learning_rate = 1e-60"):
        make_trainer(learning_rate=1e-60).train(make_rows(), seed=0)


def test_no_rows_and_no_completion_tokens_fail_the_sample():
    with pytest.raises(SampleFailed, match="at least one row"):
        make_trainer().train([], seed=0)
    row = TokenRow(np.arange(10, 14, dtype=np.int32), np.zeros(4, dtype=bool))
    with pytest.raises(SampleFailed, match="2 rows has no completion token"):
        make_trainer().train([row, row], seed=0)


def exhausted(output, *, backward: bool):
    """Run out of memory, now or when the gradient comes by."""

    def fail(_=None):
        raise torch.OutOfMemoryError("CUDA out of memory: injected")

    if not backward:
        fail()
    output.register_hook(fail)
    return output


@pytest.mark.parametrize(("stage", "backward"), [(1, False), (2, True), (3, False), (3, True)])
def test_out_of_memory_halves_the_micro_batch_once_and_begins_anew(stage, backward):
    rows = make_rows()
    plain = make_trainer(stage=stage, micro_batch_size=2, epochs=1)
    plain.train(rows, seed=0)
    trainer = make_trainer(stage=stage, micro_batch_size=4, epochs=1)
    n_rows = on_passes(trainer, lambda i, output: exhausted(output, backward=backward) if i == 2 else output)
    report = trainer.train(rows, seed=0)
    assert n_rows == [4, 4, 4] + [2] * 12
    assert (report.micro_batch_size, report.n_steps) == (2, 3)
    trained, expected = weights(trainer.model), weights(plain.model)
    assert all(torch.equal(trained[name], expected[name]) for name in expected)


def test_out_of_memory_twice_fails_the_sample_with_the_sizes():
    trainer = make_trainer(micro_batch_size=4)
    on_passes(trainer, lambda i, output: exhausted(output, backward=False) if i in (2, 3) else output)
    message = r"out of memory on cpu with a micro-batch of 2 x \d+ tokens, and before with 4 x \d+; set a smaller"
    with pytest.raises(SampleFailed, match=message):
        trainer.train(make_rows(), seed=0)
    assert torch.equal(logits(trainer.model), logits(tiny_llama()))
    assert trainer.train(make_rows(), seed=0).micro_batch_size == 4


def test_out_of_memory_with_one_row_cannot_be_halved():
    trainer = make_trainer(micro_batch_size=1)
    on_passes(trainer, lambda i, output: exhausted(output, backward=False) if i == 0 else output)
    with pytest.raises(SampleFailed, match=r"micro-batch of 1 x \d+ tokens; set"):
        trainer.train(make_rows(), seed=0)


def test_another_fault_is_not_taken_for_an_exhausted_memory():
    trainer = make_trainer()

    def fail(*_):
        raise RuntimeError("shapes do not match")

    on_passes(trainer, fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.train(make_rows(), seed=0)


@pytest.mark.parametrize(
    ("stage", "offload", "dtype"),
    [
        (1, False, torch.bfloat16),
        (1, True, torch.float32),
        (2, False, torch.float32),
        (2, True, torch.bfloat16),
        (3, False, torch.bfloat16),
        (3, True, torch.float32),
    ],
)
def test_interrupted_is_uninterrupted(stage, offload, dtype, tmp_path):
    rows, changes = make_rows(), {"stage": stage, "offload": offload, "weight_decay": 0.1}
    plain = make_trainer(dtype, **changes)
    whole = plain.train(rows, seed=0)
    first = make_trainer(dtype, **changes)
    half = first.train(rows, seed=0, halt=Halt(folder=tmp_path, after=0.5))
    assert half.n_steps == 3
    resumed = make_trainer(dtype, **changes)
    resumed.train(make_rows(seed=5), seed=5)
    steps: list[int] = []
    report = resumed.train(rows, seed=0, on_step=lambda done, _: steps.append(done), halt=Halt(folder=tmp_path))
    assert steps == [4, 5, 6]
    assert (report.first_loss, report.last_loss) == (whole.first_loss, whole.last_loss)
    trained, expected = weights(resumed.model), weights(plain.model)
    assert all(torch.equal(trained[name], expected[name]) for name in expected)


def test_the_state_is_written_every_so_often_and_only_the_last_is_kept(tmp_path):
    trainer, plain = make_trainer(), make_trainer()
    plain.train(make_rows(), seed=0)

    def stop(done: int, _total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.train(make_rows(), seed=0, on_step=stop, halt=Halt(folder=tmp_path, every_seconds=0))
    assert [f.name for f in tmp_path.glob("step-*")] == ["step-4"]
    assert torch.equal(logits(trainer.model), logits(tiny_llama()))
    steps: list[int] = []
    trainer.train(make_rows(), seed=0, on_step=lambda done, _: steps.append(done), halt=Halt(folder=tmp_path))
    assert steps == [5, 6]
    assert torch.equal(logits(trainer.model), logits(plain.model))


def test_where_a_sample_stopped_it_can_be_had_again(tmp_path):
    """As `sampling.racing` does: the state is all that is left, and no step is taken."""
    trainer, halt = make_trainer(), Halt(folder=tmp_path, after=0.5)
    trainer.train(make_rows(), seed=0, halt=halt)
    stopped = logits(trainer.model)
    trainer.reset()
    assert trainer.train(make_rows(), seed=0, halt=halt).n_steps == 3
    assert torch.equal(logits(trainer.model), stopped)


@pytest.mark.parametrize("damage", ["missing", "half", "other stage"])
def test_a_state_that_cannot_be_read_is_not_taken_up(damage, tmp_path):
    trainer, steps = make_trainer(), []
    trainer.train(make_rows(), seed=0, halt=Halt(folder=tmp_path, after=0.5))
    file = tmp_path / "zero.json"
    if damage == "missing":
        file.unlink()
    elif damage == "half":
        file.write_text(file.read_text()[:20])
    else:
        file.write_text(json.dumps({**json.loads(file.read_text()), "stage": 3}))
    trainer.train(make_rows(), seed=0, on_step=lambda done, _: steps.append(done), halt=Halt(folder=tmp_path))
    assert steps == [1, 2, 3, 4, 5, 6]


def test_checkpoints_for_scoring_are_refused():
    with pytest.raises(ConfigError, match=r"training\.method: full keeps no checkpoints"):
        make_trainer().train(make_rows(), seed=0, on_epoch=lambda _: None)


def test_without_deepspeed_the_study_file_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r'training\.method: full needs DeepSpeed .*pip install "duet-ray\[full\]"'):
        make_trainer()


def test_nothing_is_compiled(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for stage, offload in ZEROS:
        make_trainer(stage=stage, offload=offload, epochs=1).train(make_rows(8), seed=0)
    assert not list(tmp_path.iterdir())


def test_torch_is_left_as_it_was():
    """Stage 3 puts a linear function of its own into torch, with which influence scores could not be computed."""
    before = torch.nn.functional.linear
    make_trainer(stage=3).train(make_rows(8), seed=0)
    assert torch.nn.functional.linear is before


def test_however_many_workers_ran_out_of_memory_in_an_attempt_it_is_one(tmp_path):
    halt = Halt(folder=tmp_path)
    device = torch.device("cpu")
    assert full._n_exhausted(halt, device) == 0
    for worker in (0, 1):
        (tmp_path / f"{full.EXHAUSTED_FILE}-0-{worker}").touch()
    assert full._n_exhausted(halt, device) == 1
    full._note_exhausted(halt, 1)
    assert full._n_exhausted(halt, device) == 2
    assert full._n_exhausted(None, device) == 0
