"""Every weight, on a CUDA device: DeepSpeed's stages against a plain AdamW loop, and the base left as it was."""

import pytest
import torch

from duet_ray.training.batches import effective_batches
from tests.tiny_model import tiny_llama, tiny_tokenizer
from tests.training.test_lora import logits, make_rows

pytest.importorskip("deepspeed", reason="full-parameter training needs the extra `full` (DeepSpeed)")

from duet_ray.training import full
from duet_ray.training.full import FullTrainer
from tests.training.test_full import ZEROS, config, reference, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS = {"weight_decay": 0.1, "max_grad_norm": 0.5, "schedule": "cosine", "warmup_ratio": 0.2}


@pytest.mark.parametrize(("stage", "offload"), ZEROS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_stage_gives_the_weights_of_a_plain_adamw_loop_on_the_cpu(
    stage: int, offload: bool, dtype: torch.dtype
) -> None:
    settings, rows = config(stage, offload, **SETTINGS), make_rows(21)
    trainer = FullTrainer(tiny_llama(dtype=dtype).cuda(), tiny_tokenizer(), settings)
    before = torch.cuda.memory_allocated()
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
    assert torch.cuda.memory_allocated() <= before + 2**20, "nothing of the sample is left on the device"


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
