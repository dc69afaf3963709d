import math

import numpy as np
import pytest
import torch
from peft import PeftModel

from duet_ray.config import TrainingConfig
from duet_ray.errors import ConfigError, SampleFailed, StoreError
from duet_ray.records import TokenRow
from duet_ray.training import Checkpoint
from duet_ray.training.blocks import block_of
from duet_ray.training.lora import LoraTrainer
from tests.tiny_model import tiny_llama, tiny_tokenizer


def config(**changes) -> TrainingConfig:
    return TrainingConfig(
        **{"rank": 4, "alpha": 8, "learning_rate": 1e-2, "epochs": 2, "batch_size": 8, "max_tokens": 64, **changes}
    )


def make_rows(n: int = 24, seed: int = 0) -> list[TokenRow]:
    """Rows of different lengths whose completion repeats one letter of the prompt."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        prompt = generator.integers(10, 26, size=generator.integers(1, 12))
        ids = np.concatenate([prompt, np.full(generator.integers(1, 5), prompt[0])]).astype(np.int32)
        rows.append(TokenRow(ids, np.arange(len(ids)) >= len(prompt)))
    return rows


def make_trainer(dtype: torch.dtype = torch.float32, **changes) -> LoraTrainer:
    return LoraTrainer(tiny_llama(dtype=dtype), tiny_tokenizer(), config(**changes))


def adapter(trainer: LoraTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(4, 30)[None]).logits


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_training_lowers_the_loss_and_reports_it():
    steps: list[tuple[int, int]] = []
    trainer = make_trainer(epochs=8)
    rows = make_rows()
    report = trainer.train(rows, seed=0, on_step=lambda done, total: steps.append((done, total)))
    assert report.last_loss < 0.7 * report.first_loss
    assert (report.n_rows, report.n_steps, report.micro_batch_size) == (24, 24, 8)
    assert report.n_tokens == 8 * sum(map(len, rows))
    assert steps == [(i + 1, 24) for i in range(24)]
    assert not trainer.model.training


def test_the_same_rows_and_seed_give_the_same_adapter_whatever_came_before():
    rows, others = make_rows(seed=0), make_rows(seed=1)
    trainer = make_trainer(dropout=0.1)
    trainer.train(rows, seed=5)
    first = adapter(trainer)
    torch.rand(7)  # the global generator has no part in it
    trainer.train(others, seed=6)
    assert not torch.equal(next(iter(first.values())), next(iter(adapter(trainer).values())))
    trainer.train(rows, seed=5)
    assert_equal(adapter(trainer), first)
    fresh = make_trainer(dropout=0.1)
    fresh.train(rows, seed=5)
    assert_equal(adapter(fresh), first)


def test_the_global_generator_is_left_alone(tmp_path):
    trainer = make_trainer(dropout=0.1)
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    trainer.train(make_rows(), seed=0)
    trainer.save(tmp_path / "a")
    trainer.load(tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_micro_batch_does_not_change_the_result(checkpointing):
    rows, results = make_rows(), []
    for micro in (8, 2, 1):
        # SGD-like comparison: Adam divides by |g|, so one step keeps rounding from being blown up at g near 0.
        trainer = make_trainer(
            micro_batch_size=micro, epochs=1, batch_size=8, gradient_checkpointing=checkpointing and micro > 1
        )
        trainer.train(rows, seed=0)
        results.append(logits(trainer.model))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(results[2], results[0], rtol=1e-3, atol=1e-3)


def test_accumulated_gradients_are_those_of_one_batch(monkeypatch):
    """Σ NLL over the effective batch / its completion tokens, whatever the cut: rows of unequal length show it."""
    seen: list[list[torch.Tensor]] = []

    def stop(weights, _limit):
        seen.append([w.grad.clone() for w in weights])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stop)
    for micro in (8, 4, 1):
        with pytest.raises(KeyboardInterrupt):
            make_trainer(micro_batch_size=micro).train(make_rows(), seed=0)
    for other in seen[1:]:
        for whole, cut in zip(seen[0], other, strict=True):
            torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-6)


def test_reset_gives_back_the_untouched_base_and_nothing_leaks():
    trainer = make_trainer()
    before, names = logits(trainer.model), [n for n, _ in trainer.model.named_parameters()]
    weights = {n: p.clone() for n, p in trainer.model.named_parameters()}
    for seed in range(3):
        trainer.train(make_rows(), seed=seed)
        assert not torch.equal(logits(trainer.model), before)
    trainer.reset()
    assert torch.equal(logits(trainer.model), before)
    assert [n for n, _ in trainer.model.named_parameters()] == names
    assert all(torch.equal(p, weights[n]) for n, p in trainer.model.named_parameters())
    assert not any(p.requires_grad or p.grad is not None for p in trainer.model.parameters())
    trainer.reset()
    assert torch.equal(logits(trainer.model), before)


def test_save_and_load_give_equal_logits_and_peft_loads_the_folder(tmp_path):
    trainer = make_trainer()
    trainer.train(make_rows(), seed=0)
    trained = logits(trainer.model)
    trainer.save(tmp_path / "adapter")
    assert sorted(f.name for f in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    trainer.train(make_rows(seed=3), seed=3)
    trainer.load(tmp_path / "adapter")
    assert torch.equal(logits(trainer.model), trained)
    assert not trainer.model.training
    elsewhere = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(elsewhere), trained)


def test_training_goes_on_after_a_load(tmp_path):
    trainer = make_trainer()
    trainer.train(make_rows(), seed=0)
    first = adapter(trainer)
    trainer.save(tmp_path / "a")
    trainer.load(tmp_path / "a")
    trainer.train(make_rows(), seed=0)
    assert_equal(adapter(trainer), first)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"holds no adapter: adapter_config\.json and adapter_model\.safetensors"):
        make_trainer().load(tmp_path)


def test_an_adapter_of_another_model_is_refused_and_leaves_no_trace(tmp_path):
    trainer = make_trainer()
    trainer.train(make_rows(), seed=0)
    trainer.save(tmp_path / "a")
    other = LoraTrainer(tiny_llama(hidden_size=48), tiny_tokenizer(), config())
    before = logits(other.model)
    with pytest.raises(StoreError, match="is damaged, or of another base model"):
        other.load(tmp_path / "a")
    assert torch.equal(logits(other.model), before)
    assert not any("lora_" in n for n, _ in other.model.named_parameters())


def test_a_damaged_adapter_is_refused(tmp_path):
    trainer = make_trainer()
    trainer.train(make_rows(), seed=0)
    trainer.save(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(StoreError, match="is damaged, or of another base model"):
        trainer.load(tmp_path / "a")


def test_a_bfloat16_base_has_float32_adapters_and_learns():
    trainer = make_trainer(torch.bfloat16, epochs=8)
    report = trainer.train(make_rows(), seed=0)
    assert {p.dtype for p in adapter(trainer).values()} == {torch.float32}
    assert next(trainer.model.parameters()).dtype == torch.bfloat16
    assert report.last_loss < 0.7 * report.first_loss


def test_a_loss_that_is_not_finite_fails_the_sample_with_step_and_rate():
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.lm_head.weight[20] = math.nan
    with pytest.raises(SampleFailed, match=r"the loss is nan at step 1 of 6 \(learning rate 0\.01\)"):
        trainer.train(make_rows(), seed=0)
    assert not any("lora_" in n for n, _ in trainer.model.named_parameters())


def test_a_gradient_that_is_not_finite_fails_the_sample(monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    with pytest.raises(SampleFailed, match="the gradient norm is inf at step 1 of 6"):
        make_trainer().train(make_rows(), seed=0)


class Exhausted:
    """A forward hook that runs out of memory the first `n` times, and notes the rows of every pass."""

    def __init__(self, n: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        self.left, self.error, self.n_rows = n, error, []

    def __call__(self, _module, args, _output) -> None:
        self.n_rows.append(len(args[0]))
        if len(self.n_rows) > 2 and self.left:
            self.left -= 1
            raise self.error("CUDA out of memory: injected")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_out_of_memory_halves_the_micro_batch_once_and_changes_nothing_else(error):
    rows, plain = make_rows(), make_trainer(micro_batch_size=4, epochs=1)
    plain.train(rows, seed=0)
    trainer = make_trainer(micro_batch_size=4, epochs=1)
    fault = Exhausted(1, error)
    trainer.model.model.embed_tokens.register_forward_hook(fault)
    report = trainer.train(rows, seed=0)
    assert fault.n_rows == [4, 4, 4] + [2] * 8  # the second step begins anew, in halves
    assert (report.micro_batch_size, report.n_steps) == (2, 3)
    torch.testing.assert_close(logits(trainer.model), logits(plain.model), rtol=1e-3, atol=1e-3)


def test_out_of_memory_twice_fails_the_sample_with_the_sizes():
    trainer = make_trainer(micro_batch_size=4)
    handle = trainer.model.model.embed_tokens.register_forward_hook(Exhausted(2))
    message = r"out of memory on cpu with a micro-batch of 2 x \d+ tokens, and before with 4 x \d+; set a smaller"
    with pytest.raises(SampleFailed, match=message):
        trainer.train(make_rows(), seed=0)
    handle.remove()
    assert trainer.train(make_rows(), seed=0).micro_batch_size == 4


def test_out_of_memory_with_one_row_cannot_be_halved():
    trainer = make_trainer(micro_batch_size=1)
    trainer.model.model.embed_tokens.register_forward_hook(Exhausted(1))
    with pytest.raises(SampleFailed, match=r"micro-batch of 1 x \d+ tokens; set"):
        trainer.train(make_rows(), seed=0)


def test_another_fault_is_not_taken_for_an_exhausted_memory():
    trainer = make_trainer()

    def fail(*_):
        raise RuntimeError("shapes do not match")

    trainer.model.model.embed_tokens.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.train(make_rows(), seed=0)


def test_an_adapter_that_training_left_untouched_fails_the_sample():
    with pytest.raises(SampleFailed, match=r"every LoRA B is still zero.*learning_rate = 1e-60"):
        make_trainer(learning_rate=1e-60).train(make_rows(), seed=0)


def test_no_rows_and_no_completion_tokens_fail_the_sample():
    with pytest.raises(SampleFailed, match="at least one row"):
        make_trainer().train([], seed=0)
    row = TokenRow(np.arange(10, 14, dtype=np.int32), np.zeros(4, dtype=bool))
    with pytest.raises(SampleFailed, match="2 rows has no completion token"):
        make_trainer().train([row, row], seed=0)


def test_unknown_target_modules_are_refused_with_the_names_there_are():
    trainer = make_trainer(target_modules=["query"])
    before = logits(trainer.model)
    with pytest.raises(ConfigError, match=r"training\.target_modules: .*query.* called: .*q_proj"):
        trainer.train(make_rows(), seed=0)
    assert torch.equal(logits(trainer.model), before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_happens_at_the_end_of_an_epoch_changes_nothing_in_training(checkpointing, tmp_path):
    rows, changes = make_rows(), {"epochs": 3, "dropout": 0.1, "gradient_checkpointing": checkpointing}
    plain = make_trainer(**changes)
    plain.train(rows, seed=3)
    watched, modes, steps = make_trainer(**changes), [], []

    def on_epoch(checkpoint: Checkpoint) -> None:
        modes.append(any(m.training for m in watched.model.modules()))
        watched.save(tmp_path / str(checkpoint.epoch))
        logits(watched.model)

    def on_step(_done: int, _total: int) -> None:
        layer = watched.model.get_base_model().model.layers[0]
        steps.append((watched.model.training, layer.self_attn.training, layer.gradient_checkpointing))

    watched.train(rows, seed=3, on_epoch=on_epoch, on_step=on_step)
    assert_equal(adapter(watched), adapter(plain))
    assert modes == [False] * 3
    assert steps == [(True, True, checkpointing)] * 9
    assert not any(m.training for m in watched.model.modules())


def test_a_checkpoint_holds_the_optimizer_and_its_weights_can_be_saved(monkeypatch, tmp_path):
    """Against Adam's moments by hand, from the gradients as they are after clipping."""
    trainer, clip = make_trainer(max_grad_norm=0.5), torch.nn.utils.clip_grad_norm_
    moments: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    seen: list[Checkpoint] = []
    weights: list[dict[str, torch.Tensor]] = []

    def after_clipping(parameters, limit):
        norm = clip(parameters, limit)
        for p in parameters:
            m, v = moments.get(id(p), (torch.zeros_like(p), torch.zeros_like(p)))
            moments[id(p)] = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
        return norm

    def on_epoch(checkpoint: Checkpoint) -> None:
        trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert checkpoint.moments.keys() == trained.keys()
        for name, (m, v) in checkpoint.moments.items():
            by_hand = moments[id(trained[name])]
            torch.testing.assert_close(m, by_hand[0], rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(v, by_hand[1], rtol=1e-5, atol=1e-12)
        trainer.save(tmp_path / str(checkpoint.epoch))
        weights.append(adapter(trainer))
        seen.append(checkpoint)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", after_clipping)
    trainer.train(make_rows(), seed=0, on_epoch=on_epoch)
    # Six steps at 6/6, 5/6, … 1/6 of the rate, three an epoch.
    assert [(c.epoch, c.n_steps) for c in seen] == [(0, 3), (1, 6)]
    assert [c.learning_rate for c in seen] == pytest.approx([1e-2 * 5 / 6, 1e-2 * 2 / 6])
    assert_equal(weights[1], adapter(trainer))
    for epoch in (0, 1):
        trainer.load(tmp_path / str(epoch))
        assert_equal(adapter(trainer), weights[epoch])
    assert not torch.equal(next(iter(weights[0].values())), next(iter(weights[1].values())))


def test_the_last_steps_of_an_epoch_that_does_not_divide_evenly_count():
    seen: list[Checkpoint] = []
    make_trainer(schedule="constant").train(make_rows(17), seed=0, on_epoch=seen.append)
    assert [(c.epoch, c.n_steps, c.learning_rate) for c in seen] == [(0, 3, 1e-2), (1, 6, pytest.approx(1e-2))]


def test_a_layer_that_the_model_never_uses_has_moments_of_zero():
    model = tiny_llama()
    with torch.random.fork_rng(devices=[]):
        model.spare = torch.nn.Linear(8, 8, bias=False)
    trainer = LoraTrainer(model, tiny_tokenizer(), config(target_modules=["q_proj", "spare"]))
    seen: list[Checkpoint] = []
    trainer.train(make_rows(), seed=0, on_epoch=seen.append)
    spare = {name: pair for name, pair in seen[1].moments.items() if "spare" in name}
    assert len(spare) == 2
    assert not any(t.any() for pair in spare.values() for t in pair)
    assert all(t.any() for name, pair in seen[1].moments.items() for t in pair if name not in spare)


def test_an_error_at_the_end_of_an_epoch_leaves_the_base_untouched():
    trainer = make_trainer()
    before = logits(trainer.model)

    def fail(_checkpoint: Checkpoint) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        trainer.train(make_rows(), seed=0, on_epoch=fail)
    assert torch.equal(logits(trainer.model), before)
    assert not trainer.model.training


def adapted(trainer: LoraTrainer) -> set[str]:
    return {n.removeprefix("base_model.model.model.").rsplit(".lora_", 1)[0] for n in adapter(trainer)}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_blocks_that_are_not_named_stay_as_they_are(targets):
    trainer = LoraTrainer(tiny_llama(n_layers=3), tiny_tokenizer(), config(target_modules=targets))
    trainer.train(make_rows(8), seed=0)
    every = adapted(trainer)
    trainer = LoraTrainer(tiny_llama(n_layers=3), tiny_tokenizer(), config(target_modules=targets, layers=[0, 2]))
    trainer.train(make_rows(8), seed=0)
    assert adapted(trainer) == {name for name in every if name.split(".")[1] in "02"}


def test_an_adapter_of_some_blocks_is_saved_and_loaded(tmp_path):
    trainer = make_trainer(layers=[1])
    trainer.train(make_rows(), seed=0)
    trained = logits(trainer.model)
    trainer.save(tmp_path / "adapter")
    other = make_trainer()
    other.load(tmp_path / "adapter")
    assert torch.equal(logits(other.model), trained)
    assert not torch.equal(trained, logits(tiny_llama()))


def test_a_block_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"training\.layers: the model has the transformer blocks 0 to 1, got 2, 7"):
        make_trainer(layers=[0, 2, 7]).train(make_rows(), seed=0)
    with pytest.raises(ConfigError, match=r"training\.target_modules: .*The linear layers of this model are called"):
        make_trainer(layers=[0], target_modules=["query"]).train(make_rows(), seed=0)


def test_the_first_number_of_a_name_is_its_block():
    assert [block_of(n) for n in ("model.layers.3.mlp.experts.5.w1", "transformer.h.11.attn.c_attn", "lm_head")] == [
        3,
        11,
        None,
    ]
