"""The estimate against hand arithmetic and a real training; what it was calibrated on is `benchmarks/memory.py`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from duet_ray.config import StudyConfig, config_from
from duet_ray.errors import ConfigError
from duet_ray.training import estimate as module
from duet_ray.training.estimate import (
    GIB,
    PROCESS_GIB,
    estimate_memory,
    estimate_time,
    memory_problem,
    resolved_fuse,
    resolved_micro_batch,
)
from tests.tiny_model import tiny_llama
from tests.toy_study import toy_data

N = sum(p.numel() for p in tiny_llama().parameters())
"""Weights of the tiny Llama; every linear layer of its 2 layers has the n_in + n_out below."""

PAIRS = 2 * ((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32) + (32 + 64) + (32 + 64) + (64 + 32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder / "model")
    return folder


def study(folder: Path, **changes: Any) -> StudyConfig:
    return config_from(toy_data(**changes), folder=folder)


def llama_8b(folder: Path, **changes: Any) -> StudyConfig:
    """A study of a model with the shapes of Llama 3 8B: its configuration is enough."""
    from transformers import LlamaConfig

    about = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    about.save_pretrained(folder / "8b")
    sizes = {"training__max_tokens": 512, "training__micro_batch_size": 2, "training__rank": 16}
    return study(folder, **{"model__path": "8b", "model__dtype": "bfloat16", **sizes, **changes})


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    def have(gib: float | None) -> None:
        monkeypatch.setattr(module, "_gpu_gib", lambda: gib)

    return have


def have_ram(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    now = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: now._replace(available=int(gib * GIB)))


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, duet_ray.training.estimate; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_counted_is_the_models(folder: Path) -> None:
    found = estimate_memory(study(folder, training__rank=4))
    assert found.n_parameters == N
    assert found.n_trained == 4 * PAIRS
    assert found.weights_gib == pytest.approx(4 * N / GIB)
    assert estimate_memory(study(folder, model__dtype="bfloat16")).weights_gib == pytest.approx(2 * N / GIB)
    only = estimate_memory(study(folder, training__rank=4, training__target_modules=["q_proj", "down_proj"]))
    assert only.n_trained == 4 * 2 * ((32 + 32) + (64 + 32))


def test_trained_weights_are_what_peft_makes(folder: Path) -> None:
    from duet_ray.training.lora import attach_adapter

    config = study(folder, training__rank=8)
    adapted = attach_adapter(tiny_llama().requires_grad_(False), config.training)
    n_trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert estimate_memory(config).n_trained == n_trained


def test_a_model_that_is_no_llama(folder: Path) -> None:
    """GPT-2 has linear layers of another class, and other names for its sizes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from duet_ray.training.lora import attach_adapter

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=64))
    model.save_pretrained(folder / "gpt2")
    config = study(folder, model__path="gpt2", training__rank=2)
    found = estimate_memory(config)
    assert found.n_parameters == sum(p.numel() for p in model.parameters())
    adapted = attach_adapter(model.requires_grad_(False), config.training)
    assert found.n_trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert estimate_time(config, 20.0) is not None


def test_some_blocks_alone_are_counted(folder: Path) -> None:
    whole = estimate_memory(study(folder, training__rank=4))
    half = estimate_memory(study(folder, training__rank=4, training__layers=[1]))
    assert half.n_trained == whole.n_trained / 2
    assert half.total_gib < whole.total_gib
    assert estimate_time(study(folder, training__layers=[1]), 20.0) is not None
    with pytest.raises(ConfigError, match=r"training\.layers: the model has the transformer blocks 0 to 1, got 2"):
        estimate_memory(study(folder, training__layers=[1, 2]))


def test_memory_is_that_of_the_dearest_settings_searched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    also = {
        "training.rank": {"choices": [2, 64]},
        "training.layers": {"choices": [[0], None]},
        "training.batch_size": {"choices": [4, 12]},
        "training.learning_rate": {"log": [1e-4, 1e-2]},
    }
    found = estimate_memory(study(folder, search__also=also, search__optimize="both"))
    same = estimate_memory(study(folder, training__rank=64, training__batch_size=12, training__micro_batch_size=4))
    assert (found.n_trained, found.total_gib) == (same.n_trained, same.total_gib)
    assert found.describe().endswith(
        "for the dearest of the settings searched: training.rank 64, training.layers all, training.batch_size 12"
    )
    assert "searched" not in same.describe()
    have_ram(monkeypatch, found.total_gib - 0.001)
    config = study(folder, search__also=also, search__optimize="both")
    assert "may be needed" in str(memory_problem(config, estimate_memory(config)))
    gone = {"training.layers": {"choices": [[0], [5]]}}
    with pytest.raises(ConfigError, match=r"training\.layers: .* got 5"):
        estimate_memory(study(folder, search__also=gone, search__optimize="both"))


def test_a_layer_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no linear layer is called query; there are: down_proj, gate_proj"):
        estimate_memory(study(folder, training__target_modules=["query"]))


def test_more_rows_and_longer_ones_take_more(folder: Path) -> None:
    base = study(folder, training__micro_batch_size=2)
    one, twice = estimate_memory(base), estimate_memory(study(folder, training__micro_batch_size=4))
    longer = estimate_memory(study(folder, training__micro_batch_size=2, training__max_tokens=64))
    for other in (twice, longer):
        assert other.activations_gib == pytest.approx(2 * one.activations_gib)
        assert other.logits_gib == pytest.approx(2 * one.logits_gib)
        assert other.weights_gib == one.weights_gib


def test_samples_in_one_pass_share_the_base_alone(folder: Path) -> None:
    one, three = (estimate_memory(study(folder, sampling__k=3, training__fuse=f)) for f in (1, 3))
    assert three.weights_gib == one.weights_gib
    for part in ("states_gib", "activations_gib", "logits_gib"):
        assert getattr(three, part) == pytest.approx(3 * getattr(one, part))


def test_checkpointing_takes_less(folder: Path) -> None:
    for gpus in (0, 1):
        config = llama_8b(folder, fleet__gpus_per_worker=gpus)
        less = llama_8b(folder, fleet__gpus_per_worker=gpus, training__gradient_checkpointing=True)
        assert estimate_memory(less).activations_gib < 0.8 * estimate_memory(config).activations_gib
    assert estimate_memory(less).activations_gib < 0.1 * estimate_memory(config).activations_gib


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_splits_over_the_workers_as_in_the_paper(folder: Path, stage: int) -> None:
    """Rajbhandari et al. 2020, fig. 1: 2 + 2 + 12 bytes a weight, here with gradients summed in float32 (4).

    On top, DeepSpeed's buffers, whole in every worker: of the gradients, and in stage 3 of the gathered weights.
    """

    def of(n_workers: int) -> Any:
        return estimate_memory(
            study(
                folder,
                model__dtype="bfloat16",
                training__method="full",
                training__rank=16,
                training__zero__stage=stage,
                training__batch_size=8,
                fleet__workers_per_group=n_workers,
            )
        )

    one, four, bucket, gathered = of(1), of(4), 4 if stage == 1 else 2, 2 if stage == 3 else 0
    assert one.weights_gib == pytest.approx((2 + gathered) * N / GIB)
    assert one.states_gib == pytest.approx((16 + bucket) * N / GIB)
    assert four.weights_gib == pytest.approx((0.5 + gathered if stage == 3 else 2) * N / GIB)
    assert four.states_gib == pytest.approx((3 + (4 if stage == 1 else 1) + bucket) * N / GIB)


def test_offloaded_states_are_the_hosts(folder: Path) -> None:
    def of(offload: bool) -> Any:
        return estimate_memory(
            llama_8b(
                folder,
                training__method="full",
                training__zero={"stage": 2, "offload_optimizer": offload},
                fleet__gpus_per_worker=1,
            )
        )

    here, there = of(False), of(True)
    n = here.n_parameters
    assert here.states_gib - there.states_gib == pytest.approx(12 * n / GIB)
    assert there.host_gib - here.host_gib == pytest.approx(20 * n / GIB)
    assert here.host_gib == pytest.approx(2 * n / GIB + PROCESS_GIB["cuda"])
    assert "GiB of host memory" in there.describe()


def test_feedback_counts_where_it_takes_the_most(folder: Path) -> None:
    small = llama_8b(folder, feedback__batch_size=1)
    large = llama_8b(folder, feedback__batch_size=64)
    assert estimate_memory(large).total_gib > estimate_memory(small).total_gib + 10
    assert "feedback" in estimate_memory(large).describe()


def test_it_fits_or_the_remedy_makes_it_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = llama_8b(folder, fleet__groups=3, training__micro_batch_size=8)
    need = estimate_memory(config).total_gib
    have_ram(monkeypatch, 3 * need + 0.1)
    assert memory_problem(config, estimate_memory(config)) is None
    have_ram(monkeypatch, 3 * need - 0.1)
    said = memory_problem(config, estimate_memory(config))
    assert said is not None
    assert f"{3 * need:.1f} GiB may be needed by 3 workers" in said
    assert "lower training.micro_batch_size (now 8) to 4" in said
    cured = llama_8b(folder, fleet__groups=3, training__micro_batch_size=4)
    assert memory_problem(cured, estimate_memory(cured)) is None
    few = llama_8b(folder, fleet__groups=3, training__micro_batch_size=1, training__max_tokens=4096)
    need = estimate_memory(few).total_gib
    have_ram(monkeypatch, 2 * need + 0.1)
    assert str(memory_problem(few, estimate_memory(few))).endswith("; lower fleet.groups (now 3) to 2")
    one = estimate_memory(llama_8b(folder, training__micro_batch_size=1)).total_gib
    have_ram(monkeypatch, one + 0.1)
    both = "; lower training.micro_batch_size (now 8) to 1, lower fleet.groups (now 3) to 1"
    assert str(memory_problem(config, estimate_memory(config))).endswith(both)
    have_ram(monkeypatch, 3)
    assert "take a smaller model" in str(memory_problem(config, estimate_memory(config)))


def test_a_gpu_that_is_too_small(folder: Path, one_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = llama_8b(folder, fleet__gpus_per_worker=1, training__method="full")
    have_ram(monkeypatch, 500)
    one_gpu(80)
    said = memory_problem(config, estimate_memory(config))
    assert said is not None
    assert "and this GPU has 80.0; set training.zero.offload_optimizer: true" in said
    have_ram(monkeypatch, 50)
    assert "and this GPU has 80.0; set training.method: lora" in str(memory_problem(config, estimate_memory(config)))
    one_gpu(None)
    assert "no GPU is visible from here" in str(memory_problem(config, estimate_memory(config)))
    shared = llama_8b(folder, fleet__gpus_per_worker=0.5)
    one_gpu(1.9 * estimate_memory(shared).device_gib)
    assert "by the 2 workers that share it" in str(memory_problem(shared, estimate_memory(shared)))
    one_gpu(2.1 * estimate_memory(shared).device_gib)
    assert memory_problem(shared, estimate_memory(shared)) is None


def test_fuse_is_what_the_trial_the_groups_and_the_memory_leave(folder: Path, one_gpu: Any) -> None:
    def fused(gib: float | None, **changes: Any) -> int:
        one_gpu(gib)
        return resolved_fuse(llama_8b(folder, **{"sampling__k": 8, "fleet__gpus_per_worker": 1, **changes}))[0]

    assert fused(10_000) == 8
    assert fused(10_000, fleet__groups=4) == 2
    assert fused(10_000, fleet__groups=4, search__concurrent_trials=3) == 6
    assert fused(10_000, fleet__groups=1, search__concurrent_trials=3) == 8
    assert fused(10_000, fleet__gpus_per_worker=0) == 1
    assert fused(10_000, training__method="full") == 1
    assert fused(10_000, fleet__workers_per_group=2) == 1
    three = estimate_memory(llama_8b(folder, sampling__k=8, training__fuse=3, fleet__gpus_per_worker=1)).device_gib
    assert fused(three / 0.8 + 0.1) == 3
    assert fused(three / 0.8 - 0.1) == 2
    assert fused(2 * three / 0.8 + 0.1, fleet__gpus_per_worker=0.5) == 3
    assert fused(1) == 1
    assert fused(None) == 1
    _, notes = resolved_fuse(llama_8b(folder, sampling__k=8, fleet__gpus_per_worker=1))
    assert "no GPU is visible from here; give a number up to 8" in notes[0]


def test_the_micro_batch_is_the_largest_divisor_up_to_8() -> None:
    assert [resolved_micro_batch(n) for n in (1, 7, 16, 20, 22, 13)] == [1, 7, 8, 5, 2, 1]


def test_time_is_counted_up_from_what_a_pass_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = study(
        folder,
        mixture__n_rows=100,
        training__epochs=2,
        training__micro_batch_size=4,
        search={"n_start": 3, "n_trials": 2, "concurrent_trials": 1},
        sampling__k=2,
        fleet__groups=4,
        confirm={"finalists": 1, "repeats": 3},
    )
    monkeypatch.setattr(module, "_pass_seconds", lambda *_: 0.5)
    found = estimate_time(config, 20.0)
    assert found is not None
    assert found.n_samples == 2 * 5 + 3 * 2
    assert found.tokens_per_second == pytest.approx(4 * 20 / 0.5)
    assert found.seconds_per_sample == pytest.approx(100 * 2 * 20 / 160)
    assert found.seconds == pytest.approx(16 * 25 / 2), "one trial of two samples keeps two of four groups busy"
    big = llama_8b(folder)
    assert estimate_time(big, 100.0) is None, "an 8B model is not timed on a CPU"
    if not torch.cuda.is_available():
        assert estimate_time(study(folder, fleet__gpus_per_worker=1), 20.0) is None


def test_layers_are_timed_for_real_and_leave_no_trace(folder: Path) -> None:
    """Against passes of the tiny Llama without adapters, which are small change for a large model and not for it."""
    config = study(folder, training__max_tokens=128, training__micro_batch_size=8)
    before = torch.get_rng_state()
    found = estimate_time(config, 128.0)
    assert found is not None
    assert _real_pace() / 8 < found.tokens_per_second < 2 * _real_pace()
    assert torch.equal(before, torch.get_rng_state())


def _real_pace() -> float:
    """Tokens per second of a forward and backward pass of the tiny Llama without adapters."""
    import time

    model, ids = tiny_llama(), torch.ones(8, 128, dtype=torch.int64)
    shortest = 1e9
    for _ in range(4):
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        shortest = min(shortest, time.perf_counter() - started)
    return ids.numel() / shortest


@pytest.mark.slow
def test_it_is_not_far_from_what_a_training_takes(tmp_path: Path) -> None:
    """Two rows of `benchmarks/memory.py`: the model's own part, between 0.7 and 1.5 of the measured."""
    benchmark = Path(__file__).parents[2] / "benchmarks" / "memory.py"
    sys.path.insert(0, str(benchmark.parent))
    try:
        import memory
    finally:
        sys.path.pop(0)
    tiny = memory.write_tiny(tmp_path / "tiny")
    for setting in memory.SETTINGS[1:3]:
        measured = memory.measure_apart(setting, tiny, "cpu")
        guess = estimate_memory(memory.study_of(setting, tiny, "cpu")).total_gib - PROCESS_GIB["cpu"]
        own = (max(measured["train"], measured["load"]) - measured["imports"]) / GIB
        assert 0.7 < guess / own < 1.5, json.dumps(measured)
