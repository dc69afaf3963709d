"""Two processes train what one trains. All checks share two starts of processes, which cost more than the training."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from duet_ray.config import TrainingConfig, ZeroConfig
from duet_ray.errors import SampleFailed
from duet_ray.records import TokenRow
from duet_ray.training import Halt, Trainer, TrainReport, make_trainer
from duet_ray.training.lora import check_finite
from duet_ray.training.ranks import OutOfStep, add_over_ranks, alone, n_ranks, on_any_rank, rank
from tests.tiny_model import VOCAB_SIZE, tiny_llama, tiny_tokenizer
from tests.training.group import run_group
from tests.training.test_lora import make_rows

CPU = torch.device("cpu")
HAS_DEEPSPEED = find_spec("deepspeed") is not None
REASON = "full-parameter training needs the extra `full` (DeepSpeed)"


def settings(method: str, **changes) -> TrainingConfig:
    """21 rows in steps of 8, 8 and 5: the last step has 3 rows for one process and 2 for the other."""
    if method == "lora":
        changes = {"rank": 4, "learning_rate": 1e-2, **changes}
    else:
        zero = ZeroConfig(stage=int(method[4]), offload_optimizer=method.endswith("offload"))
        changes = {"method": "full", "learning_rate": 1e-3, "zero": zero, **changes}
    return TrainingConfig(**{"batch_size": 8, "max_tokens": 64, "micro_batch_size": 2, **changes})


METHODS = ["lora", "zero1", "zero2-offload", "zero3"]
full = pytest.mark.skipif(not HAS_DEEPSPEED, reason=REASON)
over_methods = pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[full] if m != "lora" else []) for m in METHODS]
)


def base_of(training: TrainingConfig, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Stage 3 leaves weights of fewer than 100,000 numbers whole: with 4,000 tokens, two of them are split."""
    return tiny_llama(4000 if training.method == "full" and training.zero.stage == 3 else VOCAB_SIZE, dtype=dtype)


def trainer_of(training: TrainingConfig, dtype: torch.dtype = torch.float32) -> Trainer:
    return make_trainer(training, base_of(training, dtype), tiny_tokenizer())


def trained(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def distance(method: str, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """How far two models are apart, as a share of how far training has moved the first."""
    assert a.keys() == b.keys()
    base = base_of(settings(method)).state_dict()
    moved = sum((p - base[n] if n in base else p).float().abs().sum() for n, p in a.items())
    apart = sum((p - b[n]).float().abs().sum() for n, p in a.items())
    return (apart / moved).item()


def said(report: TrainReport) -> TrainReport:
    return replace(report, seconds=0.0)


def train_with_norms(trainer: Trainer, rows: list[TokenRow]) -> tuple[TrainReport, list[float]]:
    """Train, and note the gradient norms: Adam's steps hardly tell a gradient from its double."""
    module, norms = import_module(type(trainer).__module__), []

    def note(loss: float, norm: float, *where) -> None:
        norms.extend([norm] if norm else [])
        check_finite(loss, norm, *where)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "check_finite", note)
        return said(trainer.train(rows, seed=0)), norms


def reason(call: Callable[[], Any]) -> str:
    try:
        call()
    except SampleFailed as error:
        return str(error)
    return "none"


def exhaust_second_rank(trainer: Trainer, passes: set[int], *, backward: bool = False) -> None:
    """Memory runs out in the second process alone, in some passes."""
    n_passes = 0

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory: injected")

    def hook(_module, _args, output):
        nonlocal n_passes
        n_passes += 1
        if rank() == 1 and n_passes - 1 in passes:
            if not backward:
                fail()
            output.register_hook(fail)

    trainer.model.model.embed_tokens.register_forward_hook(hook)


def checks(method: str, folder: Path) -> dict[str, Any]:
    """What one process of two sees of a method."""
    rows, found = make_rows(21), {}
    trainer = trainer_of(settings(method))
    untouched = trained(trainer)
    found["report"], found["norms"] = train_with_norms(trainer, rows)
    found["weights"] = trained(trainer)
    trainer.reset()
    after = trained(trainer)
    found["restored"] = all(torch.equal(after[name], p) for name, p in untouched.items())
    # The last step's one row leaves the second process nothing to do.
    found["narrow report"], found["narrow norms"] = train_with_norms(trainer, rows[:9])
    found["narrow weights"] = trained(trainer)
    trainer.train(rows, seed=0)
    found["again"] = trained(trainer)

    halted = trainer_of(settings(method))
    halted.train(rows, seed=0, halt=Halt(folder=folder, after=0.5))
    dist.barrier()
    resumed, steps = trainer_of(settings(method)), []
    found["resumed report"] = said(
        resumed.train(rows, seed=0, on_step=lambda done, _: steps.append(done), halt=Halt(folder=folder))
    )
    found["resumed steps"], found["resumed"] = steps, trained(resumed)

    hopeless = trainer_of(settings(method, learning_rate=1e30, schedule="constant", max_grad_norm=1e30))
    found["not finite"] = reason(lambda: hopeless.train(rows, seed=0))
    found["not finite: base"] = all(torch.equal(p, untouched[name]) for name, p in trained(hopeless).items())

    if not method.startswith("zero3"):  # Inside its passes nobody can be told: `test_a_rank_alone_…`.
        wide = settings(method, micro_batch_size=4)
        for name, passes in {"exhausted": {1}, "exhausted twice": set(range(1, 9))}.items():
            trainer = trainer_of(wide)
            exhaust_second_rank(trainer, passes)
            reports: list[TrainReport] = []
            found[f"{name} reason"] = reason(lambda t=trainer, r=reports: r.append(said(t.train(rows, seed=0))))
            found[f"{name} report"], found[f"{name} weights"] = reports, trained(trainer)
    return found


def in_group(folder: Path) -> dict[str, Any]:
    """Everything that leaves the group whole."""
    found: dict[str, Any] = {}
    tensors = [torch.full((2,), float(rank() + 1)), torch.tensor([rank() + 1]), torch.full((1, 3), 10.0 * rank())]
    add_over_ranks(tensors)
    found["sums"] = tensors
    found["flags"] = [on_any_rank(flag, CPU) for flag in (False, rank() == 1, True)]
    with alone():
        found["alone"] = (rank(), n_ranks(), on_any_rank(rank() == 1, CPU))
    found["ranks"] = (rank(), n_ranks())
    for method in METHODS if HAS_DEEPSPEED else ["lora"]:
        found[method] = checks(method, folder / method)
    if HAS_DEEPSPEED:
        for method in ("zero1", "zero2", "zero3"):
            trainer = trainer_of(settings(method, gradient_checkpointing=True), torch.bfloat16)
            found[f"bfloat16 {method}"] = (said(trainer.train(make_rows(21), seed=0)), trained(trainer))
        trainer = trainer_of(settings("zero1", micro_batch_size=4))
        exhaust_second_rank(trainer, {1}, backward=True)
        found["zero1 backward"] = said(trainer.train(make_rows(21), seed=0))
    return found


def out_of_step(folder: Path) -> str:
    """One process runs out of memory where nobody can be told: what this one sees of it."""
    trainer = trainer_of(settings("zero2", micro_batch_size=4))
    exhaust_second_rank(trainer, {1}, backward=True)
    try:
        trainer.train(make_rows(21), seed=0, halt=Halt(folder=folder))
    except OutOfStep as error:
        dist.destroy_process_group()  # As the process's end would do it.
        return str(error)
    except RuntimeError as error:
        return f"left alone: {error}"
    return "trained"


def after_out_of_step(folder: Path) -> tuple[TrainReport, str]:
    """A new group goes on: with half the micro-batch, and the time after that not at all."""
    report = trainer_of(settings("zero2", micro_batch_size=4)).train(make_rows(21), seed=0, halt=Halt(folder=folder))
    dist.barrier()
    if rank() == 0:
        (folder / "out_of_memory-1-0").touch()
    dist.barrier()
    again = trainer_of(settings("zero2", micro_batch_size=4))
    return said(report), reason(lambda: again.train(make_rows(21), seed=0, halt=Halt(folder=folder)))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("group")
    return run_group(in_group, folder, folder, timeout=240)


def test_processes_add_and_agree(two):
    for found in two:
        assert [t.tolist() for t in found["sums"]] == [[3.0, 3.0], [3], [[10.0, 10.0, 10.0]]]
        assert found["flags"] == [False, True, True]
    assert [found["ranks"] for found in two] == [(0, 2), (1, 2)]
    assert [found["alone"] for found in two] == [(0, 1, False), (0, 1, False)]


@over_methods
def test_two_processes_train_what_one_trains(two, method):
    for name, rows in (("", make_rows(21)), ("narrow ", make_rows(21)[:9])):
        one = trainer_of(settings(method))
        report, norms = train_with_norms(one, rows)
        other = two[0][method][f"{name}report"]
        assert two[0][method][f"{name}norms"] == pytest.approx(norms, rel=1e-4)
        assert [other.first_loss, other.last_loss] == pytest.approx([report.first_loss, report.last_loss], rel=1e-4)
        assert replace(other, first_loss=0, last_loss=0) == replace(report, first_loss=0, last_loss=0)
        assert distance(method, trained(one), two[0][method][f"{name}weights"]) < 1e-4


@over_methods
def test_all_processes_get_the_same_report(two, method):
    for name in ("report", "narrow report", "resumed report"):
        assert two[0][method][name] == two[1][method][name]


@over_methods
def test_the_base_is_restored_bit_for_bit_in_every_process(two, method):
    for found in two:
        assert found[method]["restored"]
    first, again = two[0][method]["weights"], two[0][method]["again"]
    assert all(torch.equal(again[name], p) for name, p in first.items())


@over_methods
def test_interrupted_is_uninterrupted_in_two_processes(two, method):
    whole, resumed = two[0][method]["weights"], two[0][method]["resumed"]
    assert all(torch.equal(resumed[name], p) for name, p in whole.items())
    for found in two:
        assert found[method]["resumed steps"] == [3]
        assert found[method]["resumed report"] == found[method]["report"]


@over_methods
def test_a_sample_fails_in_all_processes_for_the_same_reason(two, method):
    reasons = [found[method]["not finite"] for found in two]
    assert reasons[0].startswith(("the loss is nan", "the gradient norm is"))
    assert reasons[0] == reasons[1]
    assert all(found[method]["not finite: base"] for found in two)


@pytest.mark.parametrize(
    "method", ["lora", pytest.param("zero1", marks=full), pytest.param("zero2-offload", marks=full)]
)
def test_memory_that_runs_out_in_one_process_halves_the_micro_batch_of_all(two, method):
    for found in two:
        (report,) = found[method]["exhausted report"]
        assert (report.micro_batch_size, report.n_steps) == (2, 3)
        assert "with a micro-batch of 2 x" in found[method]["exhausted twice reason"]
        assert "and before with 4 x" in found[method]["exhausted twice reason"]
    assert distance(method, two[0][method]["weights"], two[0][method]["exhausted weights"]) < 1e-4


@full
def test_in_stage_1_a_backward_pass_waits_for_nobody(two):
    assert [found["zero1 backward"].micro_batch_size for found in two] == [2, 2]


@full
@pytest.mark.parametrize("method", ["zero1", "zero2", "zero3"])
def test_a_bfloat16_base_with_recomputed_activations(two, method):
    one = trainer_of(settings(method), torch.bfloat16)
    report = one.train(make_rows(21), seed=0)
    other, weights = two[0][f"bfloat16 {method}"]
    assert [other.first_loss, other.last_loss] == pytest.approx([report.first_loss, report.last_loss], rel=1e-2)
    assert distance(method, trained(one), weights) < 5e-2


@full
def test_a_rank_alone_out_of_memory_ends_the_group_and_the_next_one_takes_less(tmp_path):
    apart = run_group(out_of_step, tmp_path / "first", tmp_path / "halt")
    assert apart[0].startswith("left alone")
    assert apart[1] == "out of memory on cpu while the workers of the group exchanged tensors"
    for report, reason in run_group(after_out_of_step, tmp_path / "second", tmp_path / "halt"):
        assert (report.micro_batch_size, report.n_steps) == (2, 3)
        assert "with a micro-batch of 2 x" in reason
