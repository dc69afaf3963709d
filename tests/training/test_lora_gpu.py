"""LoRA on a CUDA device: the same as on the CPU, the same every time, and a real out-of-memory."""

from pathlib import Path

import numpy as np
import pytest
import torch

from duet_ray.config import TrainingConfig
from duet_ray.errors import SampleFailed
from duet_ray.execution.trial import scoring_tasks
from duet_ray.records import BASE_TRIAL, SampleSpec, TokenRow
from duet_ray.training import Halt, fused_lora
from duet_ray.training.fused_lora import FusedSample, train_fused
from duet_ray.training.lora import LoraTrainer
from tests.execution.test_worker import SPEC, make_worker, silent
from tests.tiny_model import tiny_llama, tiny_tokenizer
from tests.training.test_fused_lora import TOLERANCE, assert_as_alone, bundle, config, make_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def adapter(trainer: LoraTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().cpu().clone() for n, p in trainer.model.named_parameters() if "lora_" in n}


def trained(device: str, training: TrainingConfig, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    trainer = LoraTrainer(tiny_llama(dtype=dtype).to(device), tiny_tokenizer(), training)
    trainer.train(make_rows(40, 0), seed=3)
    return adapter(trainer)


def test_a_sample_is_what_it_is_on_the_cpu() -> None:
    """Without dropout, whose masks are the device's. In float64 but for the loss, whose rounding Adam blows up."""
    ours, theirs = trained("cuda", config(micro_batch_size=4)), trained("cpu", config(micro_batch_size=4))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.2}, {"gradient_checkpointing": True, "dropout": 0.2}])
def test_the_same_seed_gives_the_same_weights(changes: dict) -> None:
    first, again = (trained("cuda", config(**changes), torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_halted_sample_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    training = config(dropout=0.2)
    expected = trained("cuda", training, torch.float32)
    trainer = LoraTrainer(tiny_llama().cuda(), tiny_tokenizer(), training)
    trainer.train(make_rows(40, 0), seed=3, halt=Halt(folder=tmp_path / "state", after=0.5))
    trainer.reset()
    torch.cuda.manual_seed(99)
    trainer.train(make_rows(40, 0), seed=3, halt=Halt(folder=tmp_path / "state"))
    found = adapter(trainer)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_in_float32_a_bundle_is_what_its_samples_are_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step's gradients to rounding, and what 25 steps of Adam make of it."""
    monkeypatch.setattr("tests.training.test_fused_lora.model_of", lambda dtype: tiny_llama(dtype=dtype).cuda())
    monkeypatch.setitem(TOLERANCE, torch.float32, 1e-3)
    assert_as_alone(tmp_path / "trained", config(dropout=0.1), bundle(tmp_path / "trained", 40, 40), torch.float32)

    training, samples = config(epochs=1, dropout=0.2, max_grad_norm=1e9), bundle(tmp_path, 8, 8)
    model, expected, found = tiny_llama().cuda(), [], []
    clip = torch.nn.utils.clip_grad_norm_
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.nn.utils,
            "clip_grad_norm_",
            lambda weights, limit: (expected.append([w.grad.clone() for w in weights]), clip(weights, limit))[1],
        )
        for sample in samples:
            LoraTrainer(model, tiny_tokenizer(), training).train(sample.rows, seed=sample.seed)
            model = tiny_llama().cuda()

    def keep(self, *_: object) -> None:
        found.extend(list(self.of(i, self.gradients.clone()).values()) for i in range(2))
        raise KeyboardInterrupt

    monkeypatch.setattr(fused_lora._Adapters, "update", keep)
    with pytest.raises(KeyboardInterrupt):
        train_fused(model, tiny_tokenizer(), training, samples)
    for ours, theirs in zip(found, expected, strict=True):
        apart = sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True)) ** 0.5
        whole = sum(float(b.square().sum()) for b in theirs) ** 0.5
        assert apart < 1e-5 * whole


def wide_rows(n: int) -> list[TokenRow]:
    generator = np.random.default_rng(0)
    ids = generator.integers(10, 90, size=(n, 256), dtype=np.int32)
    return [TokenRow(one, np.arange(256) > 0) for one in ids]


def wide(micro_batch_size: int) -> TrainingConfig:
    return config(epochs=1, batch_size=64, micro_batch_size=micro_batch_size, max_tokens=256)


def peak(train) -> int:
    """Bytes that torch's allocator holds at the most while `train` runs."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train()
    return torch.cuda.max_memory_reserved()


class Limit:
    """The allocator gets no more than so many bytes, as if the device were small."""

    def __init__(self, n_bytes: float) -> None:
        self._share = n_bytes / torch.cuda.mem_get_info()[1]

    def __enter__(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(self._share)

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_when_memory_runs_out_for_real_the_micro_batch_is_halved() -> None:
    rows, model = wide_rows(128), tiny_llama(hidden_size=128).cuda()
    peaks, weights = {}, {}
    for size in (64, 32, 16):
        trainer = LoraTrainer(model, tiny_tokenizer(), wide(size))
        peaks[size] = peak(lambda trainer=trainer: trainer.train(rows, seed=0))
        weights[size] = adapter(trainer)
        trainer.reset()
    assert peaks[64] > 1.4 * peaks[32] > 1.8 * peaks[16]
    with Limit((peaks[64] + peaks[32]) / 2):
        trainer = LoraTrainer(model, tiny_tokenizer(), wide(64))
        report = trainer.train(rows, seed=0)
        assert report.micro_batch_size == 32
        found = adapter(trainer)
        for name in found:
            torch.testing.assert_close(found[name], weights[32][name], rtol=0, atol=2e-4)
        trainer.reset()
    with Limit((peaks[32] + peaks[16]) / 2):
        with pytest.raises(SampleFailed, match=r"out of memory on cuda.*32 x 256 tokens, and before with 64 x 256"):
            trainer.train(rows, seed=0)
        assert trainer.train(rows, seed=0, training=wide(16)).n_steps == 2, "the next sample is as ever"
        trainer.reset()


def test_when_memory_runs_out_in_a_bundle_its_micro_batches_are_halved(tmp_path: Path) -> None:
    rows, model = wide_rows(128), tiny_llama(hidden_size=128).cuda()

    def train(size: int, place: str) -> list:
        samples = [FusedSample(rows=rows, seed=s, folder=tmp_path / place / str(s)) for s in range(2)]
        return train_fused(model, tiny_tokenizer(), wide(size), samples)

    peaks = {size: peak(lambda size=size: train(size, f"of-{size}")) for size in (32, 16, 8)}
    with Limit((peaks[32] + peaks[16]) / 2):
        assert [r.micro_batch_size for r in train(32, "halved")] == [16, 16]
    with Limit((peaks[16] + peaks[8]) / 2), pytest.raises(SampleFailed, match="out of memory on cuda"):
        train(32, "failed")
    assert not (tmp_path / "failed").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_worker_works_on_the_gpu(dtype: str, tmp_path: Path) -> None:
    """Scored by influence, one sample alone and the same in a bundle of two, and the base as it was in the end."""
    worker, place = make_worker(
        tmp_path, model__dtype=dtype, selection__method="influence", fleet__gpus_per_worker=1, training__fuse=2
    )
    assert worker._base[0].device.type == "cuda"
    before = torch.cuda.memory_allocated()
    base = worker.do_sample(SampleSpec(trial=BASE_TRIAL, sample=0, kind="base", ratio=None), 1, silent)
    for index in range(3):
        for tasks in scoring_tasks(index, worker._config.domain_names[index], 1):
            for task in tasks:
                worker.do_scoring(task, silent)
    other = SampleSpec(trial=2, sample=0, kind="start", ratio=SPEC.ratio)
    together = [worker.do_sample(s, 2, silent, bundle=(other, SPEC)) for s in (other, SPEC)]
    again = worker.do_sample(SampleSpec(trial=BASE_TRIAL, sample=1, kind="base", ratio=None), 3, silent)
    assert base.value is not None
    assert again.value == base.value
    for result in together:
        assert result.value is not None
        assert result.value < base.value
    assert (place(SPEC) / "adapter" / "adapter_model.safetensors").is_file()
    assert torch.cuda.memory_allocated() <= before + 2**20
