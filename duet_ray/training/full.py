"""Full-parameter fine-tuning: every weight of a copy of the base, through DeepSpeed ZeRO (Rajbhandari et al. 2020).

The workers of a group share out the optimizer states (stage 1), the gradients too (2) and the weights too (3). What
remains to each is the bare model, at the beginning and, on the first worker, for the feedback: 2 bytes a weight in
bfloat16 rather than 16 or more. A sample trains a copy; the base itself waits in host memory, is never written to, and
comes back bit for bit. An engine is made for every sample, and leaves nothing behind in the next one.

The loss is that of `training.lora`: Σ NLL over the completion tokens of the effective batch, divided by their number.
Each worker takes its part of every effective batch; DeepSpeed takes the mean over the workers, so each multiplies its
sum by their number. Stages 2 and 3 exchange tensors inside a backward pass: a worker with fewer passes than another
makes up for it with passes of weight 0.

A bfloat16 base is trained with float32 master weights, moments and gradient sums; a float32 base in float32. Adam is
torch's, on every device: DeepSpeed's own is compiled at its first use, which takes minutes and a compiler.

When memory runs out, the sample starts anew with half the micro-batch, once: ZeRO's buffers cannot be taken back to
the start of a step. Where a worker's memory runs out in the middle of an exchange (inside a backward pass from stage 2
on, inside any pass in stage 3), the others wait for a message that never comes. That worker raises `OutOfStep`, which
is for whoever runs the group to start it anew; with a `Halt` folder the next attempt begins with half the micro-batch.
"""

import copy
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from duet_ray.config import TrainingConfig
from duet_ray.errors import ConfigError, Problem, SampleFailed, StoreError
from duet_ray.files import write_json
from duet_ray.likelihood import collate, pad_id, token_nll
from duet_ray.records import TokenRow
from duet_ray.training.base import Checkpoint, Halt, TrainReport
from duet_ray.training.batches import (
    effective_batches,
    learning_rate,
    micro_batch_size,
    micro_batches,
    n_steps_until,
    step_seed,
)
from duet_ray.training.halted import Progress, one_step_on
from duet_ray.training.lora import check_finite, count_loss_tokens, is_due, private_generators
from duet_ray.training.memory import free_memory, is_out_of_memory
from duet_ray.training.ranks import OutOfStep, add_over_ranks, end_if_stopped, n_ranks, on_any_rank, rank

STATE_FILE = "zero.json"
"""Says which DeepSpeed checkpoint in a `Halt` folder is whole; written last."""

EXHAUSTED_FILE = "out_of_memory"
"""In a `Halt` folder, one for each attempt that a worker left out of step: its number, from 0, and the worker's."""


Note = Callable[[], None]


class FullTrainer:
    """Trains one copy of the base after the other. See `training.base.Trainer` for the contract."""

    artifact = "model"

    def __init__(self, model: Any, tokenizer: Any, training: TrainingConfig) -> None:
        """Take a base model in memory. It is frozen and put in eval mode; its weights are never written to.

        Raises:
            ConfigError: DeepSpeed is not installed.
        """
        self._base = model.requires_grad_(False).eval()
        self._device = next(model.parameters()).device
        self._pad_id = pad_id(tokenizer)
        self._training = training
        self._tuned: Any = None
        self._deepspeed = _load_deepspeed(self._device)

    @property
    def model(self) -> Any:
        return self._base if self._tuned is None else self._tuned

    def reset(self) -> None:
        self._tuned = None
        self._base.to(self._device)

    def train(
        self,
        rows: Sequence[TokenRow],
        *,
        seed: int,
        training: TrainingConfig | None = None,
        on_step: Callable[[int, int], None] | None = None,
        on_epoch: Callable[[Checkpoint], None] | None = None,
        halt: Halt | None = None,
    ) -> TrainReport:
        if on_epoch is not None:
            message = "full keeps no checkpoints for scoring; score with training.method: lora"
            raise ConfigError([Problem(path="training.method", message=message)])
        self._make_room()
        try:
            with private_generators(seed, self._device), _group(self._deepspeed, self._device):
                weights, report = self._train(rows, seed, training or self._training, on_step, halt)
            free_memory()  # An engine is a ring of references, and would stay until Python happened to look for such.
            if rank() == 0:
                self._tuned = self._copy(weights)
        except BaseException:
            self.reset()
            raise
        return report

    def save(self, folder: Path) -> None:
        """Write an ordinary model folder, without the tokenizer, that `from_pretrained` and vLLM load."""
        assert self._tuned is not None, "nothing is trained or loaded"
        folder.mkdir(parents=True, exist_ok=True)
        self._tuned.save_pretrained(str(folder))

    def load(self, folder: Path) -> None:
        """Take the weights of a model that `save` wrote.

        Raises:
            StoreError: `folder` holds no model, a damaged one, or another one.
        """
        if not (folder / "config.json").is_file() or not list(folder.glob("model*.safetensors")):
            self.reset()
            raise StoreError(f"{folder} holds no model: config.json and model*.safetensors are needed")
        self._make_room()
        try:
            with private_generators(0, self._device):
                # Wrong shapes are left to the comparison below, which names them.
                loaded, info = type(self._base).from_pretrained(
                    str(folder),
                    dtype=next(self._base.parameters()).dtype,
                    local_files_only=True,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
            wrong = {
                str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]
            }
            weights = dict(loaded.named_parameters())
            wrong |= {n for n, p in self._base.named_parameters() if n not in weights or weights[n].shape != p.shape}
            if wrong:
                raise ValueError(f"{len(wrong)} weights do not fit, such as {min(wrong)}")
            self._tuned = self._copy(weights)
        except (RuntimeError, ValueError, OSError, KeyError, SafetensorError) as error:
            self.reset()
            raise StoreError(f"the model in {folder} is damaged, or is not the base model's: {error}") from error
        except BaseException:
            self.reset()
            raise

    def _make_room(self) -> None:
        """Drop the sample before, and let the base wait in host memory; on the CPU it is there already."""
        self._tuned = None
        self._base.to("cpu")
        free_memory()

    def _copy(self, weights: Mapping[str, torch.Tensor] | None = None, *, trained: bool = False) -> Any:
        """A model like the base on the device, of nothing but its own tensors.

        Args:
            weights: by parameter name; None takes the base's.
            trained: whether its weights take gradients.
        """
        memo: dict[int, Any] = {}
        for name, p in self._base.named_parameters():
            tensor = (weights[name] if weights is not None else p).detach().to(self._device, copy=True)
            memo[id(p)] = torch.nn.Parameter(tensor, requires_grad=trained)
        for buffer in self._base.buffers():
            memo[id(buffer)] = buffer.detach().to(self._device, copy=True)
        return copy.deepcopy(self._base, memo)

    def _train(
        self,
        rows: Sequence[TokenRow],
        seed: int,
        training: TrainingConfig,
        on_step: Callable[[int, int], None] | None,
        halt: Halt | None,
    ) -> tuple[dict[str, torch.Tensor], TrainReport]:
        """Train to the end, if need be twice.

        Returns:
            (the first worker's: weights in host memory by name, of the base's type; the others': none, report).
        """
        if not rows:
            raise SampleFailed("a sample needs at least one row to train on, got none")
        longest = max(map(len, rows))
        first = micro_batch_size(training, longest, self._device.type)
        first = min(first, math.ceil(training.batch_size / n_ranks()))
        n_exhausted = _n_exhausted(halt, self._device)
        while True:
            size = max(1, first >> n_exhausted)
            if n_exhausted > 1 or (n_exhausted == 1 and first == 1):
                sizes = f"{size} x {longest} tokens" if first == 1 else f"{first // 2} x {longest} tokens"
                before = f", and before with {first} x {longest}" if first > 1 else ""
                raise SampleFailed(
                    f"out of memory on {self._device} with a micro-batch of {sizes}{before}; set a smaller "
                    "training.micro_batch_size or training.max_tokens, training.gradient_checkpointing: true, a higher "
                    "training.zero.stage or training.zero.offload_optimizer: true"
                )
            try:
                return self._attempt(
                    rows, seed, size, training, on_step, halt, partial(_note_exhausted, halt, n_exhausted)
                )
            except _Exhausted:
                n_exhausted += 1
            free_memory()

    def _attempt(
        self,
        rows: Sequence[TokenRow],
        seed: int,
        size: int,
        training: TrainingConfig,
        on_step: Callable[[int, int], None] | None,
        halt: Halt | None,
        note: Note,
    ) -> tuple[dict[str, torch.Tensor], TrainReport]:
        started = written = time.perf_counter()
        batches = effective_batches(len(rows), training, seed)
        n_stop = n_steps_until(halt.after, len(batches)) if halt else len(batches)
        passes = _Passes(self._engine(training, note), training.zero.stage, self._pad_id, size, self._device, note)
        engine = passes.engine
        try:
            progress = _take_up(halt.folder, engine, training) if halt else None
            for step in range(progress.n_done if progress else 0, n_stop):
                end_if_stopped(self._device)
                torch.manual_seed(step_seed(seed, step, rank()))
                rate = learning_rate(step, len(batches), training)
                loss = passes.backward([rows[i] for i in batches[step]])
                check_finite(loss, 0.0, step, len(batches), rate)
                for group in engine.optimizer.param_groups:
                    group["lr"] = rate
                passes.step()
                if engine.was_step_applied():
                    check_finite(loss, float(engine.get_global_grad_norm()), step, len(batches), rate)
                progress = one_step_on(progress, loss, size)
                if on_step is not None:
                    on_step(step + 1, len(batches))
                if halt and on_any_rank(is_due(halt, written, step + 1, n_stop, len(batches)), self._device):
                    _write(halt.folder, engine, progress, training)
                    written = time.perf_counter()
            assert progress is not None
            n_skipped = int(engine.skipped_steps)
            weights = self._weights(engine, training)
            if progress.n_done == len(batches):
                self._check_trained(weights, n_skipped, len(batches), training.learning_rate)
        finally:
            engine.destroy()
            if training.zero.stage == 3:
                _empty(engine)
        seconds = time.perf_counter() - started
        return weights, progress.report(rows, training.epochs, seconds, n_skipped)

    def _engine(self, training: TrainingConfig, note: Note) -> Any:
        """A DeepSpeed engine around a fresh copy of the base, in training mode."""
        with _exhaustion(note, self._device, meets=False):
            model = self._copy(trained=True).train()
            if training.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            engine, *_ = self._deepspeed.initialize(
                model=model,
                model_parameters=list(model.parameters()),
                config=_settings(training, next(model.parameters()).dtype),
            )
        return engine

    def _weights(self, engine: Any, training: TrainingConfig) -> dict[str, torch.Tensor]:
        """The whole model's weights, put together parameter by parameter and kept by the first worker only."""
        weights = {}
        for name, p in engine.module.named_parameters():
            with self._deepspeed.zero.GatheredParameters([p], enabled=training.zero.stage == 3):
                if rank() == 0:
                    weights[name] = p.detach().to("cpu", copy=True)
        return weights

    def _check_trained(self, weights: Mapping[str, torch.Tensor], n_skipped: int, n_steps: int, rate: float) -> None:
        if n_skipped == n_steps:
            raise SampleFailed(f"all {n_steps} steps were skipped, since their gradients were not finite")
        untouched = rank() == 0 and all(torch.equal(weights[n], p) for n, p in self._base.named_parameters())
        if on_any_rank(untouched, self._device):
            raise SampleFailed(
                "training left the model untouched: every weight is the base's after the last step "
                f"(training.learning_rate = {rate:g})"
            )


class _Exhausted(Exception):
    """Memory ran out in some worker, and all of them know and have stopped at the same place."""


class _Passes:
    """The forward and backward passes of one sample at one micro-batch size."""

    def __init__(self, engine: Any, stage: int, pad_id: int, size: int, device: torch.device, note: Note) -> None:
        self.engine = engine
        self._stage = stage
        self._pad_id = pad_id
        self._size = size
        self._device = device
        self._note = note

    def backward(self, rows: Sequence[TokenRow]) -> float:
        """Leave the gradients of one effective batch in the engine.

        Args:
            rows: of the whole effective batch; each worker of the group takes its own.

        Returns:
            The mean NLL per completion token of the effective batch.

        Raises:
            SampleFailed: `rows` have no completion token.
            OutOfStep: memory ran out in this worker alone, in the middle of an exchange.
        """
        n_loss_tokens = count_loss_tokens(rows)
        total = torch.zeros((), device=self._device)
        for part, weight in self._parts(rows):
            with _exhaustion(self._note, self._device, meets=self._stage < 3):
                batch = collate(part, self._pad_id, self._device)
                loss = token_nll(self.engine, batch).sum() * (weight / n_loss_tokens)
            with _exhaustion(self._note, self._device, meets=self._stage < 2):
                self.engine.backward(loss * n_ranks())
            total += loss.detach()
            del loss
        add_over_ranks([total])
        return float(total)

    def step(self) -> None:
        with _exhaustion(self._note, self._device, meets=False):
            self.engine.step()

    def _parts(self, rows: Sequence[TokenRow]) -> list[tuple[list[TokenRow], float]]:
        """(rows of a pass, their weight) of this worker: as many in every worker."""
        cuts = [
            [[own[i] for i in group] for group in micro_batches([len(row) for row in own], self._size)]
            for own in (rows[r :: n_ranks()] for r in range(n_ranks()))
        ]
        own = [(part, 1.0) for part in cuts[rank()]]
        shortest = min(rows, key=len)
        return own + [([shortest], 0.0)] * (max(map(len, cuts)) - len(own))


def _empty(engine: Any) -> None:
    """Take out of a stage 3 engine, which is at its end, all that it holds.

    DeepSpeed keeps its model in a list, and after a second pass torch keeps the engine in a ring of references that
    Python cannot see through: every sample would leave a model with its optimizer states behind.
    """
    import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK.clear()
    module, optimizer = engine.module, engine.optimizer
    for p in module.parameters():
        vars(p).clear()
        p.data, p.grad = torch.empty(0, dtype=p.dtype, device=p.device), None
    for holder in (optimizer.parameter_offload, optimizer, engine):
        vars(holder).clear()


def _settings(training: TrainingConfig, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration: https://www.deepspeed.ai/docs/config-json."""
    zero: dict[str, Any] = {"stage": training.zero.stage, "overlap_comm": False}
    if training.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        # Sizes are of no meaning here: rows are cut by us, and each `step` is an optimizer step.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 0.0, "weight_decay": training.weight_decay, "torch_adam": True},
        },
        "zero_optimization": zero,
    }


def _load_deepspeed(device: torch.device) -> Any:
    """The package, told to compute on `device` and to compile nothing.

    Raises:
        ConfigError: it is not installed.
    """
    # On a machine with GPUs, a model on the CPU is to be trained there.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        deepspeed = import_module("deepspeed")
    except ImportError as error:
        message = f'full needs DeepSpeed ({error}): pip install "duet-ray[full]"'
        raise ConfigError([Problem(path="training.method", message=message)]) from error
    deepspeed.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
    # Messages through shared memory between processes on CPUs, which gloo does as well without a compiler.
    import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _group(deepspeed: Any, device: torch.device) -> Iterator[None]:
    """What DeepSpeed asks for: a process group, of this one process if there is none, and the device's number.

    Afterwards all is as before, also what DeepSpeed changes in torch and leaves so.
    """
    before, linear = os.environ.get("LOCAL_RANK"), torch.nn.functional.linear
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    is_ours = not dist.is_initialized()
    if is_ours:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.nn.functional.linear = linear  # Stage 3 puts one in its place that cannot be differentiated forward.
        if is_ours:
            deepspeed.comm.init_distributed()
            deepspeed.comm.destroy_process_group()
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


@contextmanager
def _exhaustion(note: Note, device: torch.device, *, meets: bool) -> Iterator[None]:
    """Raise `_Exhausted` in all workers, where memory runs out in one of them inside the block.

    Args:
        note: called where they cannot meet, for the next attempt to know.
        meets: whether the workers can meet after the block: nothing inside it waits for another worker.

    Raises:
        OutOfStep: they cannot.
    """
    out = False
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if n_ranks() > 1 and not meets:
            note()
            raise OutOfStep(f"out of memory on {device} while the workers of the group exchanged tensors") from error
        # The error is dropped here: its frames hold the tensors.
        out = True
    if on_any_rank(out, device) if meets else out:
        raise _Exhausted


def _note_exhausted(halt: Halt | None, n_exhausted: int) -> None:
    """Leave word that the attempt after `n_exhausted` others ran out of memory too."""
    if halt is not None:
        halt.folder.mkdir(parents=True, exist_ok=True)
        (halt.folder / f"{EXHAUSTED_FILE}-{n_exhausted}-{rank()}").touch()


def _n_exhausted(halt: Halt | None, device: torch.device) -> int:
    """How often memory ran out in earlier attempts at this sample, as the worker says that knows of most."""
    files = halt.folder.glob(f"{EXHAUSTED_FILE}-*") if halt else ()
    noted = max((int(f.name.split("-")[1]) + 1 for f in files), default=0)
    return next(n for n in (2, 1, 0) if n == 0 or on_any_rank(noted >= n, device))


def _write(folder: Path, engine: Any, progress: Progress, training: TrainingConfig) -> None:
    """Write each worker's part of the state, in DeepSpeed's own format; local scratch, which nobody is given."""
    tag = f"step-{progress.n_done}"
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    if rank() == 0:
        about = {"tag": tag, "n_ranks": n_ranks(), "stage": training.zero.stage, "progress": asdict(progress)}
        write_json(folder / STATE_FILE, about)
        for other in folder.glob("step-*"):
            if other.name != tag:
                shutil.rmtree(other, ignore_errors=True)


def _take_up(folder: Path, engine: Any, training: TrainingConfig) -> Progress | None:
    """Go back to where the state was written; None where there is none that this group can read.

    The parts of a checkpoint belong to a number of workers and a stage: with others, the sample starts anew.
    """
    try:
        about = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        progress = Progress(**about["progress"])
        fits = (about["n_ranks"], about["stage"]) == (n_ranks(), training.zero.stage)
        fits = fits and (folder / about["tag"]).is_dir()
    except (OSError, ValueError, KeyError, TypeError):
        fits = False
    if on_any_rank(not fits, engine.device):
        return None
    engine.load_checkpoint(str(folder), tag=about["tag"])
    return progress
