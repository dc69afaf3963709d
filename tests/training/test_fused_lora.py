"""A bundle is compared with `LoraTrainer` on the same rows and seeds, sample by sample."""

import json
import math
import multiprocessing
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from duet_ray.config import TrainingConfig
from duet_ray.errors import ConfigError, SampleFailed
from duet_ray.records import TokenRow
from duet_ray.training import Halt, TrainReport, fused_lora
from duet_ray.training.batches import effective_batches
from duet_ray.training.fused_lora import FusedSample, train_fused
from duet_ray.training.halted import STATE_FILE
from duet_ray.training.lora import LoraTrainer
from tests.tiny_model import VOCAB_SIZE, tiny_llama, tiny_tokenizer

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
"""Of a weight after some 25 steps of AdamW at a learning rate of 0.01."""


def config(**changes) -> TrainingConfig:
    given = {"rank": 4, "alpha": 8, "learning_rate": 1e-2, "epochs": 5, "batch_size": 8, "max_tokens": 128}
    return TrainingConfig(**{**given, "max_grad_norm": 0.5, **changes})


def make_rows(n: int, seed: int, longest: int = 12) -> list[TokenRow]:
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        prompt = generator.integers(10, 26, size=generator.integers(1, longest))
        ids = np.concatenate([prompt, np.full(generator.integers(1, 5), prompt[0])]).astype(np.int32)
        rows.append(TokenRow(ids, np.arange(len(ids)) >= len(prompt)))
    return rows


def model_of(dtype: torch.dtype) -> torch.nn.Module:
    """In float64 the rounding of products in another order is far below what a mistake would do."""
    return tiny_llama(dtype=dtype)


def bundle(folder: Path, *sizes: int, longest: int = 12, **settings) -> list[FusedSample]:
    return [
        FusedSample(rows=make_rows(n, seed=i, longest=longest), seed=20 + i, folder=folder / f"sample{i}", **settings)
        for i, n in enumerate(sizes)
    ]


def alone(model, training: TrainingConfig, sample: FusedSample, folder: Path, **settings) -> TrainReport:
    trainer = LoraTrainer(model, tiny_tokenizer(), training)
    try:
        report = trainer.train(sample.rows, seed=sample.seed, **settings)
        trainer.save(folder)
        return report
    finally:
        trainer.reset()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_adapter(found: Path, expected: Path, atol: float) -> None:
    assert sorted(f.name for f in found.iterdir()) == sorted(f.name for f in expected.iterdir())
    assert json.loads((found / "adapter_config.json").read_text()) == json.loads(
        (expected / "adapter_config.json").read_text()
    )
    a, b = weights(found), weights(expected)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol)


def assert_same_report(found: TrainReport | SampleFailed, expected: TrainReport) -> None:
    assert isinstance(found, TrainReport)
    a, b = found.to_json(), expected.to_json()
    for losses in ("first_loss", "last_loss"):
        assert a.pop(losses) == pytest.approx(b.pop(losses), rel=1e-5)
    assert a.pop("seconds") > 0
    b.pop("seconds")
    assert a == b


def assert_as_alone(
    folder: Path, training: TrainingConfig, samples: Sequence[FusedSample], dtype: torch.dtype = torch.float64
) -> list[TrainReport]:
    reports = train_fused(model_of(dtype), tiny_tokenizer(), training, samples)
    assert len(reports) == len(samples)
    for index, (report, sample) in enumerate(zip(reports, samples, strict=True)):
        expected = alone(model_of(dtype), training, sample, folder / f"alone{index}")
        assert_same_report(report, expected)
        assert_same_adapter(sample.folder, folder / f"alone{index}", TOLERANCE[dtype])
    return reports


SETTINGS = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "decay, warm-up, cosine": {"weight_decay": 0.1, "warmup_ratio": 0.2, "schedule": "cosine"},
    "checkpointing": {"gradient_checkpointing": True, "micro_batch_size": 3},
    "checkpointing, dropout": {"gradient_checkpointing": True, "dropout": 0.3, "micro_batch_size": 3},
    "micro-batches of 1": {"micro_batch_size": 1, "dropout": 0.2},
    "some layers": {"target_modules": ["q_proj", "down_proj"]},
    "the head too": {"target_modules": ["v_proj", "lm_head"], "dropout": 0.1},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_a_bundle_is_what_its_samples_are_alone(changes, tmp_path):
    """25 to 30 steps of AdamW with clipping, rows of other lengths in each sample, other numbers of rows and steps."""
    samples = bundle(tmp_path, 40, 40, 43)
    reports = assert_as_alone(tmp_path, config(**changes), samples)
    assert [r.n_steps for r in reports] == [25, 25, 30]
    start, end = weights(tmp_path / "sample0"), weights(tmp_path / "sample1")
    assert not any(torch.equal(start[name], end[name]) for name in start)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_on_a_gpu_too_a_bundle_is_what_its_samples_are_alone(changes, tmp_path, monkeypatch):
    """Its dropout comes from another generator, with kernels of its own."""
    monkeypatch.setitem(globals(), "model_of", lambda dtype: tiny_llama(dtype=dtype).cuda())
    assert_as_alone(tmp_path, config(**changes), bundle(tmp_path, 40, 40, 43))


def test_in_float32_the_difference_is_rounding(tmp_path):
    assert_as_alone(tmp_path, config(dropout=0.1), bundle(tmp_path, 40, 40), torch.float32)


def test_micro_batches_that_end_at_short_rows_are_no_common_ones(tmp_path):
    """Rows of up to 100 tokens: the samples' passes have other numbers of rows, and are of other numbers."""
    assert_as_alone(tmp_path, config(dropout=0.2, micro_batch_size=4), bundle(tmp_path, 20, 20, longest=100))


def test_gradients_of_one_step_are_those_of_training_alone(monkeypatch, tmp_path):
    """SGD in effect: one step from the same start, before Adam could hide a factor."""
    samples, training = bundle(tmp_path, 8, 8), config(epochs=1, dropout=0.2, max_grad_norm=1e9)
    expected = []
    clip = torch.nn.utils.clip_grad_norm_
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.nn.utils,
            "clip_grad_norm_",
            lambda weights, limit: (expected.append([w.grad.clone() for w in weights]), clip(weights, limit))[1],
        )
        for i, sample in enumerate(samples):
            alone(model_of(torch.float64), training, sample, tmp_path / f"alone{i}")
    found = []

    def keep(self, steps, decay):
        found.extend(list(self.of(i, self.gradients.clone()).values()) for i in range(2))
        raise KeyboardInterrupt

    monkeypatch.setattr(fused_lora._Adapters, "update", keep)
    with pytest.raises(KeyboardInterrupt):
        train_fused(model_of(torch.float64), tiny_tokenizer(), training, samples)
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)
        assert any(bool(g.any()) for g in ours)


def test_a_sample_may_have_a_rank_of_its_own(tmp_path):
    training = config(dropout=0.1)
    samples = [
        FusedSample(rows=make_rows(24, i), seed=i, folder=tmp_path / f"{rank}", rank=rank)
        for i, rank in enumerate((2, 7, None))
    ]
    reports = train_fused(model_of(torch.float64), tiny_tokenizer(), training, samples)
    for sample, report in zip(samples, reports, strict=True):
        own = training.model_copy(update={"rank": sample.rank or training.rank})
        expected = alone(model_of(torch.float64), own, sample, tmp_path / "alone" / sample.folder.name)
        assert_same_report(report, expected)
        assert_same_adapter(sample.folder, tmp_path / "alone" / sample.folder.name, 1e-12)


def test_a_bfloat16_base_has_float32_adapters_and_learns_what_it_learns_alone(tmp_path):
    """Products in bfloat16 round at 4e-3, in another order for a batch: the logits agree to that, not the weights."""
    samples, training = bundle(tmp_path, 24, 24), config(epochs=4)
    reports = train_fused(model_of(torch.bfloat16), tiny_tokenizer(), training, samples)
    for i, (sample, report) in enumerate(zip(samples, reports, strict=True)):
        assert {p.dtype for p in weights(sample.folder).values()} == {torch.float32}
        expected = alone(model_of(torch.bfloat16), training, sample, tmp_path / f"alone{i}")
        assert report.last_loss < 0.8 * report.first_loss
        assert report.last_loss == pytest.approx(expected.last_loss, rel=0.03)
        for name, p in weights(tmp_path / f"alone{i}").items():
            moved = (weights(sample.folder)[name] - p).norm() / p.norm()
            assert moved < 0.1, name


def test_peft_and_the_trainer_load_what_is_written_and_give_the_same_logits(tmp_path):
    samples, training, ids = bundle(tmp_path, 24, 24), config(), torch.arange(4, 30)[None]
    base, trainer = tiny_llama(), LoraTrainer(tiny_llama(), tiny_tokenizer(), config())
    train_fused(base, tiny_tokenizer(), training, samples)
    for i, sample in enumerate(samples):
        alone(tiny_llama(), training, sample, tmp_path / f"alone{i}")
        trainer.load(tmp_path / f"alone{i}")
        with torch.no_grad():
            expected = trainer.model(ids).logits
            trainer.load(sample.folder)
            torch.testing.assert_close(trainer.model(ids).logits, expected, rtol=1e-3, atol=1e-3)
            loaded = PeftModel.from_pretrained(tiny_llama(), str(sample.folder)).eval()
            assert torch.equal(loaded(ids).logits, trainer.model(ids).logits)


def gpt2(dropout: float) -> GPT2LMHeadModel:
    """Its linears are transformers' `Conv1D`, whose weight is transposed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = GPT2Config(
            vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return GPT2LMHeadModel(settings).double().eval()


def test_a_model_of_conv1d_layers_is_trained_as_alone(tmp_path):
    samples, training = bundle(tmp_path, 24, 24), config(dropout=0.2)
    reports = train_fused(gpt2(0.0), tiny_tokenizer(), training, samples)
    for i, (sample, report) in enumerate(zip(samples, reports, strict=True)):
        assert_same_report(report, alone(gpt2(0.0), training, sample, tmp_path / f"alone{i}"))
        assert_same_adapter(sample.folder, tmp_path / f"alone{i}", 1e-12)
    assert any("c_attn" in name for name in weights(samples[0].folder))


# What is left behind.


def traces(model: torch.nn.Module) -> dict[str, object]:
    return {
        "weights": {n: p.clone() for n, p in model.state_dict().items()},
        "modules": [(n, type(m), m.training) for n, m in model.named_modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "checkpointing": model.is_gradient_checkpointing,
        "grads": [p.requires_grad or p.grad is not None for p in model.parameters()],
        "peft": hasattr(model, "peft_config"),
    }


def assert_untouched(model: torch.nn.Module, before: dict[str, object]) -> None:
    after = traces(model)
    old, new = before.pop("weights"), after.pop("weights")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[n], new[n]) for n in old)
    assert after == before


@pytest.mark.parametrize("fault", [None, KeyboardInterrupt, RuntimeError])
def test_the_base_and_the_global_generator_are_as_before_however_it_ends(fault, tmp_path):
    model, training = tiny_llama().requires_grad_(False), config(dropout=0.1, gradient_checkpointing=True)
    before = traces(model)
    torch.manual_seed(11)
    state = torch.random.get_rng_state()

    def on_step(done: int, _total: int) -> None:
        if fault and done == 2:
            raise fault("injected")

    if fault is None:
        train_fused(model, tiny_tokenizer(), training, bundle(tmp_path, 16, 16), on_step=on_step)
    else:
        with pytest.raises(fault, match="injected"):
            train_fused(model, tiny_tokenizer(), training, bundle(tmp_path, 16, 16), on_step=on_step)
        assert not list(tmp_path.iterdir())
    assert_untouched(model, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_bundle_after_a_bundle_is_the_same(tmp_path):
    model, training = tiny_llama(), config(dropout=0.1)
    first = train_fused(model, tiny_tokenizer(), training, bundle(tmp_path / "a", 24, 24))
    torch.rand(7)
    second = train_fused(model, tiny_tokenizer(), training, bundle(tmp_path / "b", 24, 24))
    for i in range(2):
        assert_same_adapter(tmp_path / "a" / f"sample{i}", tmp_path / "b" / f"sample{i}", 0.0)
    assert [r.last_loss for r in first] == [r.last_loss for r in second]


def test_the_company_does_not_matter(tmp_path):
    """The second sample of three is the only one of one."""
    training, all_three = config(dropout=0.1), bundle(tmp_path, 24, 24, 24)
    train_fused(model_of(torch.float64), tiny_tokenizer(), training, all_three)
    (own,) = [s for s in bundle(tmp_path / "other", 24, 24, 24) if s.seed == 21]
    train_fused(model_of(torch.float64), tiny_tokenizer(), training, [own])
    assert_same_adapter(own.folder, all_three[1].folder, 1e-12)


def test_steps_are_told_of_the_longest_sample_and_no_samples_are_no_reports(tmp_path):
    told: list[tuple[int, int]] = []
    train_fused(
        tiny_llama(), tiny_tokenizer(), config(epochs=1), bundle(tmp_path, 8, 24), on_step=lambda *s: told.append(s)
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert train_fused(tiny_llama(), tiny_tokenizer(), config(), []) == []


# One that fails, while the others go on.


@pytest.mark.parametrize("step", [0, 2])
def test_a_sample_that_is_not_finite_fails_alone(step, tmp_path):
    """One of its rows has a token that nobody else has, whose embedding is NaN; the others go on as if alone."""
    samples, training = bundle(tmp_path, 24, 24, 24), config(dropout=0.1)
    spoilt = effective_batches(24, training, samples[1].seed)[step][3]
    samples[1].rows[spoilt].input_ids[0] = 90
    model = model_of(torch.float64)
    with torch.no_grad():
        model.model.embed_tokens.weight[90] = math.nan
    reports = train_fused(model, tiny_tokenizer(), training, samples)
    assert isinstance(reports[1], SampleFailed)
    assert f"the loss is nan at step {step + 1} of 15" in str(reports[1])
    assert not samples[1].folder.exists()
    for i in (0, 2):
        expected = alone(model_of(torch.float64), training, samples[i], tmp_path / f"alone{i}")
        assert_same_report(reports[i], expected)
        assert_same_adapter(samples[i].folder, tmp_path / f"alone{i}", 1e-12)


def test_a_sample_without_rows_or_completions_fails_alone(tmp_path):
    nothing = TokenRow(np.arange(10, 14, dtype=np.int32), np.zeros(4, dtype=bool))
    samples = [
        FusedSample(rows=[], seed=0, folder=tmp_path / "empty"),
        FusedSample(rows=[nothing, nothing], seed=0, folder=tmp_path / "nothing"),
        *bundle(tmp_path, 24),
    ]
    reports = train_fused(model_of(torch.float64), tiny_tokenizer(), config(), samples)
    assert [str(r) for r in reports[:2]] == [
        "a sample needs at least one row to train on, got none",
        "an effective batch of 2 rows has no completion token to learn from",
    ]
    assert_same_report(reports[2], alone(model_of(torch.float64), config(), samples[2], tmp_path / "alone"))
    assert_same_adapter(samples[2].folder, tmp_path / "alone", 1e-12)
    assert not (tmp_path / "empty").exists()


def test_adapters_that_training_left_untouched_fail(tmp_path):
    reports = train_fused(tiny_llama(), tiny_tokenizer(), config(learning_rate=1e-60), bundle(tmp_path, 8, 8))
    assert all("every LoRA B is still zero" in str(r) for r in reports)
    assert not list(tmp_path.iterdir())


class Exhausted:
    """A forward hook that runs out of memory in the third pass, `n` times in all, and notes the rows of every pass."""

    def __init__(self, n: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        self.left, self.error, self.n_rows = n, error, []

    def __call__(self, _module, args, _output) -> None:
        self.n_rows.append(len(args[0]))
        if len(self.n_rows) > 2 and self.left:
            self.left -= 1
            raise self.error("out of memory: injected")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_out_of_memory_halves_all_micro_batches_once_and_repeats_the_step(error, tmp_path):
    """As alone, where memory runs out in the same step: the repeated step draws its dropout anew."""
    samples, training = bundle(tmp_path, 24, 24), config(epochs=1, micro_batch_size=4, dropout=0.2)
    model, fault = model_of(torch.float64), Exhausted(1, error)
    model.model.embed_tokens.register_forward_hook(fault)
    reports = train_fused(model, tiny_tokenizer(), training, samples)
    assert fault.n_rows == [8, 8, 8] + [4] * 8
    for i, (report, sample) in enumerate(zip(reports, samples, strict=True)):
        model = model_of(torch.float64)
        model.model.embed_tokens.register_forward_hook(Exhausted(1, error))
        expected = alone(model, training, sample, tmp_path / f"alone{i}")
        assert report.micro_batch_size == 2
        assert_same_report(report, expected)
        assert_same_adapter(sample.folder, tmp_path / f"alone{i}", 1e-12)


def test_out_of_memory_twice_is_for_the_caller_to_train_them_apart(tmp_path):
    model, samples = tiny_llama(), bundle(tmp_path, 24, 24)
    handle = model.model.embed_tokens.register_forward_hook(Exhausted(2))
    with pytest.raises(SampleFailed, match=r"2 samples in one pass, their micro-batches 2 x \d+ \+ 2 x \d+ tokens"):
        train_fused(model, tiny_tokenizer(), config(micro_batch_size=4), samples)
    handle.remove()
    assert not list(tmp_path.iterdir())
    assert all(isinstance(r, TrainReport) for r in train_fused(model, tiny_tokenizer(), config(), samples))


def test_another_fault_is_not_taken_for_an_exhausted_memory(tmp_path):
    model = tiny_llama()
    model.model.embed_tokens.register_forward_hook(Exhausted(1, OSError))
    with pytest.raises(OSError, match="injected"):
        train_fused(model, tiny_tokenizer(), config(), bundle(tmp_path, 24, 24))


# Leaving off and going on, in a bundle or alone.


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / STATE_FILE)


@pytest.mark.parametrize("first", ["bundle", "alone"])
@pytest.mark.parametrize("second", ["bundle", "alone"])
def test_a_sample_goes_on_in_a_bundle_or_alone_as_if_it_had_never_stopped(first, second, tmp_path):
    """The other sample of the bundle starts at its first step when this one is at its seventh."""
    training, (sample,) = config(dropout=0.2), bundle(tmp_path, 24)
    other = FusedSample(rows=make_rows(24, seed=8), seed=8, folder=tmp_path / "other")
    for number, (where, after) in enumerate(((first, 0.4), (second, 1.0))):
        halt, folder = Halt(folder=tmp_path / "state", after=after), tmp_path / f"part{number}"
        model = model_of(torch.float64)
        if where == "alone":
            report = alone(model, training, sample, folder, halt=halt)
        else:
            part = FusedSample(rows=sample.rows, seed=sample.seed, folder=folder, halt=halt)
            report = train_fused(model, tiny_tokenizer(), training, [other, part])[1]
        assert report.n_steps == (15 if number else 6)
    whole = alone(model_of(torch.float64), training, sample, tmp_path / "whole")
    assert_same_report(report, whole)
    assert_same_adapter(tmp_path / "part1", tmp_path / "whole", 1e-12)
    half = weights(tmp_path / "part0")
    assert not any(torch.equal(p, half[name]) for name, p in weights(tmp_path / "part1").items())


def test_a_bundle_writes_the_state_that_training_alone_writes(tmp_path):
    training, (sample,) = config(dropout=0.2, weight_decay=0.1), bundle(tmp_path, 24)
    alone(model_of(torch.float64), training, sample, tmp_path / "alone", halt=Halt(folder=tmp_path / "a", after=0.4))
    halted = FusedSample(
        rows=sample.rows, seed=sample.seed, folder=tmp_path / "f", halt=Halt(folder=tmp_path / "b", after=0.4)
    )
    train_fused(model_of(torch.float64), tiny_tokenizer(), training, [halted, *bundle(tmp_path, 40)])
    a, b = state(tmp_path / "a"), state(tmp_path / "b")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-9, atol=1e-12)


def test_a_killed_bundle_goes_on_where_its_states_were_written(tmp_path):
    training = config(dropout=0.2)

    def samples(every: float | None) -> list[FusedSample]:
        halts = [Halt(folder=tmp_path / f"state{i}", every_seconds=every) for i in range(2)]
        return [replace(s, halt=halt) for s, halt in zip(bundle(tmp_path, 24, 24), halts, strict=True)]

    def kill(done: int, _total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_fused(model_of(torch.float64), tiny_tokenizer(), training, samples(0.0), on_step=kill)
    told: list[tuple[int, int]] = []
    model = model_of(torch.float64)
    reports = train_fused(model, tiny_tokenizer(), training, samples(None), on_step=lambda *s: told.append(s))
    assert told == [(n, 15) for n in range(6, 16)]
    for i, (report, sample) in enumerate(zip(reports, bundle(tmp_path, 24, 24), strict=True)):
        assert_same_report(report, alone(model_of(torch.float64), training, sample, tmp_path / f"alone{i}"))
        assert_same_adapter(sample.folder, tmp_path / f"alone{i}", 1e-12)


# What a bundle cannot be.


class Reshaped(torch.nn.Module):
    """Gives its linear the rows in another shape than the model's."""

    def __init__(self, inner: torch.nn.Linear, *, whole: bool) -> None:
        super().__init__()
        self.inner, self.whole = inner, whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        found = self.inner(flat) if self.whole else torch.cat([self.inner(flat[:3]), self.inner(flat[3:])])
        return found.unflatten(0, x.shape[:2])


def reshaped(whole: bool) -> torch.nn.Module:
    model = model_of(torch.float64)
    mlp = model.model.layers[1].mlp
    mlp.up_proj = Reshaped(mlp.up_proj, whole=whole)
    return model.requires_grad_(False).eval()


def test_a_layer_that_is_given_all_tokens_in_one_row_is_trained_as_alone(tmp_path):
    samples, training = bundle(tmp_path, 24, 24), config(dropout=0.0)
    reports = train_fused(reshaped(True), tiny_tokenizer(), training, samples)
    for i, (report, sample) in enumerate(zip(reports, samples, strict=True)):
        assert_same_report(report, alone(reshaped(True), training, sample, tmp_path / f"alone{i}"))
        assert_same_adapter(sample.folder, tmp_path / f"alone{i}", 1e-12)


def test_what_cannot_be_told_apart_is_refused_and_leaves_no_trace(tmp_path):
    refused = {
        "the layer model.layers.1.mlp.up_proj.inner is given": (reshaped(False), config()),
        "model.embed_tokens is no linear layer but Embedding": (
            tiny_llama().requires_grad_(False),
            config(target_modules=["embed_tokens", "q_proj"]),
        ),
        "the model has dropout of its own": (gpt2(0.1).requires_grad_(False), config(dropout=0.1)),
    }
    for reason, (model, training) in refused.items():
        before = traces(model)
        with pytest.raises(SampleFailed, match=reason):
            train_fused(model, tiny_tokenizer(), training, bundle(tmp_path, 8, 8))
        assert_untouched(model, before)


def test_unknown_target_modules_are_refused_as_by_the_trainer(tmp_path):
    model = tiny_llama().requires_grad_(False)
    before = traces(model)
    with pytest.raises(ConfigError, match=r"training\.target_modules: .*query.* called: .*q_proj"):
        train_fused(model, tiny_tokenizer(), config(target_modules=["query"]), bundle(tmp_path, 8))
    assert_untouched(model, before)


# Several workers.


def work(own: int, port: int, training: TrainingConfig, samples: list[FusedSample]) -> None:
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=own, world_size=2)
    try:
        reports = train_fused(model_of(torch.float64), tiny_tokenizer(), training, samples)
        assert all(isinstance(r, TrainReport) for r in reports)
    finally:
        torch.distributed.destroy_process_group()


def test_two_workers_train_the_bundle_that_one_trains(tmp_path):
    samples, training = bundle(tmp_path, 20, 20), config(epochs=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(own, port, training, samples)) for own in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    for i, sample in enumerate(samples):
        alone(model_of(torch.float64), training, sample, tmp_path / f"alone{i}")
        assert_same_adapter(sample.folder, tmp_path / f"alone{i}", 1e-12)


def test_some_blocks_in_one_pass_as_alone(tmp_path):
    training = config(layers=[1], epochs=2)
    samples = bundle(tmp_path, 8, 11)
    ended = train_fused(tiny_llama(), tiny_tokenizer(), training, samples)
    for sample, report in zip(samples, ended, strict=True):
        expected = alone(tiny_llama(), training, sample, tmp_path / "alone" / sample.folder.name)
        assert_same_report(report, expected)
        assert_same_adapter(sample.folder, tmp_path / "alone" / sample.folder.name, TOLERANCE[torch.float32])
        assert {name.split(".layers.")[1][0] for name in weights(sample.folder)} == {"1"}
