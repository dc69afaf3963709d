"""Every weight, on a CUDA device: DeepSpeed's stages against a plain AdamW loop, and the base left as it was."""

import gc

import pytest
import torch

from duet_ray.training.batches import effective_batches
from tests.tiny_model import tiny_llama, tiny_tokenizer
from tests.training.test_lora import logits, make_rows

pytest.importorskip("deepspeed", reason="full-parameter training needs the extra `full` (DeepSpeed)")

from duet_ray.training import full
from duet_ray.training.full import FullTrainer
from tests.training.test_full import ZEROS, config, reference, weights

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SETTINGS = {"weight_decay": 0.1, "max_grad_norm": 0.5, "schedule": "cosine", "warmup_ratio": 0.2}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("stage", "offload"), ZEROS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_stage_gives_the_weights_of_a_plain_adamw_loop_on_the_cpu(
    stage: int, offload: bool, dtype: torch.dtype
) -> None:
    settings, rows = config(stage, offload, **SETTINGS), make_rows(21)
    trainer = FullTrainer(tiny_llama(dtype=dtype).cuda(), tiny_tokenizer(), settings)
    report = trainer.train(rows, seed=3)
    losses, model = reference(rows, settings, 3, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert (report.n_steps, report.n_skipped) == (len(effective_batches(21, settings, 3)), 0)
    assert [report.first_loss, report.last_loss] == pytest.approx([losses[0], losses[-1]], rel=tolerance)
    base, expected = weights(tiny_llama(dtype=dtype)), weights(model)
    trained = {name: p.cpu() for name, p in weights(trainer.model).items()}
    assert {p.device.type for p in trainer.model.parameters()} == {"cuda"}
    moved = sum((expected[n] - base[n]).float().abs().sum() for n in base)
    apart = sum((expected[n] - trained[n]).float().abs().sum() for n in base)
    assert apart < (1e-3 if dtype == torch.float32 else 4e-2) * moved
    trainer.reset()
    untouched = tiny_llama(dtype=dtype)
    assert all(torch.equal(p.cpu(), untouched.state_dict()[n]) for n, p in trainer.model.state_dict().items())


def n_bytes_held() -> int:
    """Of all tensors that Python knows."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_sample_leaves_no_tensors_behind(stage: int) -> None:
    """On the CPU too: what an engine holds is several times the model."""
    trainer = FullTrainer(tiny_llama(hidden_size=128), tiny_tokenizer(), config(stage))
    before, model = n_bytes_held(), sum(p.numel() * 4 for p in trainer.model.parameters())
    for _ in range(3):
        trainer.train(make_rows(), seed=0)
        trainer.reset()
    assert n_bytes_held() < before + model / 2


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_nothing_of_a_sample_is_left_on_the_device(stage: int) -> None:
    trainer, held = FullTrainer(tiny_llama(hidden_size=128).cuda(), tiny_tokenizer(), config(stage)), []
    for _ in range(3):  # The first one leaves what cuBLAS works in.
        trainer.train(make_rows(), seed=0)
        trainer.reset()
        held.append(torch.cuda.memory_allocated())
    assert held[2] - held[1] < 2**16


@pytest.mark.gpu
@needs_gpu
def test_a_saved_model_is_taken_up_again(tmp_path) -> None:
    trainer = FullTrainer(tiny_llama().cuda(), tiny_tokenizer(), config())
    trainer.train(make_rows(), seed=0)
    trainer.save(tmp_path / "model")
    trained = trainer.model.state_dict()
    trainer.reset()
    trainer.load(tmp_path / "model")
    assert {p.device.type for p in trainer.model.parameters()} == {"cuda"}
    assert all(torch.equal(p, trained[n]) for n, p in trainer.model.state_dict().items())
    assert full.rank() == 0
    assert logits(trainer.model.cpu()).isfinite().all()
