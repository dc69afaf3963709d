"""Several samples' adapters trained in one pass over one frozen base: for a sample, the same as training it alone.

The j-th micro-batches of all samples are put together into one batch. The base sees one batch of them all; behind
every adapted layer a hook adds, for each sample's slice of the batch, the product of its own A and B: of all slices at
once where they have as many rows, so the samples' micro-batches are cut at the same places (with dropout they are
each sample's own, since its masks follow from them). What a sample
is does not depend on its company: the loss, the clipping, Adam's moments, the learning rate, the state on disk and
the end, good or bad, are each sample's own, and so is dropout, whose masks are those that `LoraTrainer` would draw.
The pass is worth it where a single sample does not fill the device, and where a second base would not fit into the
memory; its activations grow with the number of samples.

All adapters lie side by side in one block, `(n_samples, n_weights)`, and so do gradients and moments: a layer's A and
B are views of the block, clipping and AdamW are a handful of operations on the whole of it, and a row of it is one
sample's. Hooks instead of modules put around the layers, since a hook leaves nothing behind in the base.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers.pytorch_utils import Conv1D

from duet_ray.config import TrainingConfig
from duet_ray.errors import SampleFailed
from duet_ray.files import new_folder
from duet_ray.likelihood import autocast, collate, pad_id, token_nll
from duet_ray.records import TokenRow
from duet_ray.training.base import Halt, TrainReport
from duet_ray.training.batches import (
    common_micro_batches,
    effective_batches,
    learning_rate,
    micro_batch_size,
    micro_batches,
    n_steps_until,
    step_seed,
)
from duet_ray.training.halted import Progress, TrainingState, one_step_on, read_state, write_state
from duet_ray.training.lora import (
    attach_adapter,
    check_finite,
    check_trained,
    count_loss_tokens,
    is_due,
    private_generators,
    training_mode,
    write_adapter,
)
from duet_ray.training.memory import free_memory, is_out_of_memory
from duet_ray.training.ranks import add_over_ranks, n_ranks, on_any_rank, rank

ALIGNED = 64
"""Every weight starts at a multiple of so many numbers in the block, so that matrix products may load them whole."""

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of `torch.optim.AdamW`, which `LoraTrainer` uses."""


@dataclass(frozen=True, kw_only=True)
class FusedSample:
    """One sample of a bundle: what `LoraTrainer.train` and `save` would be called with."""

    rows: Sequence[TokenRow]
    seed: int
    folder: Path
    """Where the trained adapter is written, as `LoraTrainer.save` does; it appears whole or not at all."""
    halt: Halt | None = None
    """The state is that of `LoraTrainer`: a sample may leave off in a bundle and go on alone, and the other way."""
    rank: int | None = None
    """Another rank than `training.rank`."""


def train_fused(
    model: Any,
    tokenizer: Any,
    training: TrainingConfig,
    samples: Sequence[FusedSample],
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> list[TrainReport | SampleFailed]:
    """Train all samples at once, and write their adapters.

    Args:
        model: the base in memory. It is frozen and put in eval mode; its weights are never written to, and however
            this ends, nothing of the adapters is left in it.
        training: as for `LoraTrainer`; `micro_batch_size` is rows of each sample in one pass.
        on_step: called after each step of the bundle with (steps done, steps in all) of the sample that has the most
            steps left.

    Returns:
        For every sample, in order, its report or why it alone failed. A report's `seconds` are those until the
        sample's end, in company. A sample that was halted before its end has its adapter written too.

    Raises:
        SampleFailed: this bundle cannot be trained in one pass: memory ran out twice, or the model has what a bundle
            cannot give to each sample on its own (dropout of its own, an adapted layer that is no linear one). The
            samples are then to be trained apart.
        ConfigError: no layer of the model is called as `training.target_modules` says.
    """
    if not samples:
        return []
    # The gradients go into views of a block, which is what is wanted here.
    warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
    base = model.requires_grad_(False).eval()
    try:
        with private_generators(0, next(base.parameters()).device):
            return _train(base, pad_id(tokenizer), training, samples, on_step)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            reason = f"out of memory for {len(samples)} adapters at once (training.rank = {training.rank})"
            raise SampleFailed(reason) from error
        raise


def _train(
    base: Any,
    pad_id: int,
    training: TrainingConfig,
    samples: Sequence[FusedSample],
    on_step: Callable[[int, int], None] | None,
) -> list[TrainReport | SampleFailed]:
    settings = [training if s.rank is None else training.model_copy(update={"rank": s.rank}) for s in samples]
    adapters = _Adapters.fresh(base, settings, [sample.seed for sample in samples])
    runs = [
        _Run(index, sample, own, adapters) for index, (sample, own) in enumerate(zip(samples, settings, strict=True))
    ]
    passes = _Passes(base, adapters, pad_id, training)
    with adapters.hooked(base), training_mode(base, training):
        while going := [run for run in runs if run.has_work()]:
            longest = max(going, key=lambda run: run.n_stop - run.n_done)
            losses = passes.backward(going)
            norms = adapters.norms()
            measured = torch.stack([losses, norms]).tolist()
            for run in going:
                run.check(measured[0][run.index], measured[1][run.index])
            going = [run for run in going if run.outcome is None]
            adapters.clip(norms, training.max_grad_norm)
            adapters.update({run.index: (run.n_done + 1, run.rate) for run in going}, training.weight_decay)
            for run in going:
                run.stepped(measured[0][run.index])
            if on_step is not None:
                on_step(longest.n_done, len(longest.batches))
    if rank() == 0:
        _write(base, adapters, [run for run in runs if isinstance(run.outcome, TrainReport)])
    return [run.outcome for run in runs if run.outcome is not None]


def _write(base: Any, adapters: "_Adapters", runs: Sequence["_Run"]) -> None:
    """Write trained adapters through PEFT's own, one after the other in the same one."""
    by_rank = sorted(runs, key=lambda run: run.training.rank)
    for _, alike in groupby(by_rank, key=lambda run: run.training.rank):
        of_rank = list(alike)
        with _adapter(base, of_rank[0].training) as adapted, torch.no_grad():
            for run in of_rank:
                own = adapters.of(run.index, adapters.weights)
                for name, p in _trained(adapted).items():
                    p.copy_(own[name])
                with new_folder(run.sample.folder) as folder:
                    write_adapter(adapted, folder)


class _Run:
    """One sample's way through its steps."""

    def __init__(self, index: int, sample: FusedSample, training: TrainingConfig, adapters: "_Adapters") -> None:
        self.index = index
        self.sample = sample
        self.training = training
        self.outcome: TrainReport | SampleFailed | None = None
        self.progress: Progress | None = None
        self.batches = effective_batches(len(sample.rows), training, sample.seed) if sample.rows else []
        self.n_stop = n_steps_until(sample.halt.after, len(self.batches)) if sample.halt else len(self.batches)
        self._adapters = adapters
        self._started = self._written = time.perf_counter()
        if not sample.rows:
            self.outcome = SampleFailed("a sample needs at least one row to train on, got none")
            return
        micro = micro_batch_size(training, max(map(len, sample.rows)), adapters.weights.device.type)
        self.size = self.first_size = min(micro, math.ceil(training.batch_size / n_ranks()))
        if sample.halt and (state := read_state(sample.halt.folder)) is not None:
            adapters.take_up(index, state)
            self.progress = state.progress
            self.size = state.progress.micro_batch_size

    @property
    def n_done(self) -> int:
        return self.progress.n_done if self.progress else 0

    @property
    def rate(self) -> float:
        """The learning rate of the step that is next."""
        return learning_rate(self.n_done, len(self.batches), self.training)

    @property
    def rows(self) -> list[TokenRow]:
        """The effective batch that is next."""
        return [self.sample.rows[i] for i in self.batches[self.n_done]]

    @property
    def seed(self) -> int:
        """Of this worker's dropout in the step that is next."""
        return step_seed(self.sample.seed, self.n_done, rank())

    def has_work(self) -> bool:
        """Whether there is another step; the report or the failure is made up when there is none."""
        if self.outcome is None:
            try:
                if self.n_done < self.n_stop:
                    self.n_loss_tokens = count_loss_tokens(self.rows)
                else:
                    self._end()
            except SampleFailed as error:
                self.outcome = error
        return self.outcome is None

    def check(self, loss: float, norm: float) -> None:
        try:
            check_finite(loss, norm, self.n_done, len(self.batches), self.rate)
        except SampleFailed as error:
            self.outcome = error

    def stepped(self, loss: float) -> None:
        """Note a step, and write the state where it is due."""
        self.progress = one_step_on(self.progress, loss, self.size)
        halt = self.sample.halt
        if halt and is_due(halt, self._written, self.n_done, self.n_stop, len(self.batches)):
            if rank() == 0:
                write_state(halt.folder, self._adapters.state(self.index, self.progress))
            self._written = time.perf_counter()

    def _end(self) -> None:
        assert self.progress is not None
        if self.n_done == len(self.batches):
            weights = self._adapters.of(self.index, self._adapters.weights)
            check_trained([p for name, p in weights.items() if "lora_B" in name], self.training)
        seconds = time.perf_counter() - self._started
        self.outcome = self.progress.report(self.sample.rows, self.training.epochs, seconds)


@dataclass(frozen=True, kw_only=True)
class _Slice:
    """One sample's rows in a pass."""

    index: int
    """Of the sample."""
    rows: slice
    """In the batch."""
    width: int
    """Tokens of its longest row: the width it would be padded to alone."""
    stream: "_Stream"

    @property
    def n_rows(self) -> int:
        return self.rows.stop - self.rows.start


class _Stream:
    """One sample's random numbers: torch's global generator as it would be if the sample were trained alone."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.state = torch.Generator(device).manual_seed(seed).get_state()


class _Passes:
    """The forward and backward passes of a bundle. If memory runs out, all micro-batches are halved once."""

    def __init__(self, base: Any, adapters: "_Adapters", pad_id: int, training: TrainingConfig) -> None:
        self._base = base
        self._adapters = adapters
        self._pad_id = pad_id
        self._device = adapters.weights.device
        self._replayed = training.gradient_checkpointing
        self._has_dropout = training.dropout > 0
        self._is_checked = False

    def backward(self, runs: Sequence[_Run]) -> torch.Tensor:
        """Leave the gradients of the next effective batch of every run in the block.

        Returns:
            `(n_samples,)`: the mean NLL per completion token of every run's effective batch, 0 for the others.

        Raises:
            SampleFailed: memory ran out twice.
        """
        while on_any_rank((losses := self._try(runs)) is None, self._device):
            free_memory()
            sizes = " + ".join(f"{run.size} x {max(map(len, run.rows))}" for run in runs)
            if all(run.size == 1 for run in runs) or any(run.size < run.first_size for run in runs):
                raise SampleFailed(
                    f"out of memory on {self._device} with {len(runs)} samples in one pass, their micro-batches "
                    f"{sizes} tokens; set a smaller training.fuse or training.micro_batch_size"
                )
            for run in runs:
                run.size = max(1, run.size // 2)
        assert losses is not None
        if n_ranks() > 1:
            add_over_ranks([losses, self._adapters.gradients])
        return losses

    def _try(self, runs: Sequence[_Run]) -> torch.Tensor | None:
        """The losses, with the gradients left in the block; None if memory ran out.

        The error is dropped here: its frames hold the tensors.
        """
        self._adapters.gradients.zero_()
        losses = torch.zeros(len(self._adapters.weights), device=self._device)
        own = [run.rows[rank() :: n_ranks()] for run in runs]
        streams = [_Stream(run.seed, self._device) for run in runs]
        try:
            for groups in self._cuts(runs, [[len(row) for row in rows] for rows in own]):
                slices, together, n_predicted = [], list[TokenRow](), []
                for run, rows, stream, group in zip(runs, own, streams, groups, strict=True):
                    if group:
                        picked = [rows[i] for i in group]
                        where = slice(len(together), len(together) + len(picked))
                        width = max(map(len, picked))
                        slices.append(_Slice(index=run.index, rows=where, width=width, stream=stream))
                        together += picked
                        n_predicted.append((run, sum(int(row.loss_mask[1:].sum()) for row in picked)))
                batch = collate(together, self._pad_id, self._device)
                self._adapters.begin(slices, batch.input_ids.shape[1], replayed=self._replayed)
                with autocast(self._base), self._no_randomness_of_its_own():
                    nll = token_nll(self._base, batch).split([n for _, n in n_predicted])
                    parts = [of.sum() / run.n_loss_tokens for (run, _), of in zip(n_predicted, nll, strict=True)]
                    total = torch.stack(parts).sum()
                self._adapters.end_forward()
                total.backward()
                for (run, _), part in zip(n_predicted, parts, strict=True):
                    losses[run.index] += part.detach()
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                return None
            raise
        return losses

    def _cuts(self, runs: Sequence[_Run], lengths: Sequence[Sequence[int]]) -> Iterator[Sequence[list[int]]]:
        """Every pass, as the positions of its rows in each run's effective batch; none where a run has no more."""
        if not self._has_dropout:
            return common_micro_batches(lengths, min(run.size for run in runs))
        cuts = [micro_batches(own, run.size) for run, own in zip(runs, lengths, strict=True)]
        return zip_longest(*cuts, fillvalue=[])

    @contextmanager
    def _no_randomness_of_its_own(self) -> Iterator[None]:
        """Refuse a base that draws random numbers: for the samples together, they would be others than apart."""
        before = None if self._is_checked else _generator(self._device).get_state()
        yield
        if before is not None and not torch.equal(before, _generator(self._device).get_state()):
            raise SampleFailed(
                "the model has dropout of its own, which would be another one for samples that are trained in one "
                "pass; set training.fuse: 1, or the dropout in the model's config.json to 0"
            )
        self._is_checked = True


@dataclass
class _Layer:
    """One adapted linear of the base, with every sample's A and B."""

    name: str
    """As PEFT calls it."""
    a: torch.Tensor
    """`(n_samples, rank, n_in)`, a view of the block; a sample of a smaller rank has zeros, which stay zero."""
    b: torch.Tensor
    """`(n_samples, n_out, rank)`."""
    drawn: list[list[torch.Tensor]] = field(default_factory=list)
    """The states of the streams before each draw of a pass, where the pass may be computed again."""


class _Adapters:
    """The adapters of all samples, their gradients and Adam's moments, each `(n_samples, n_weights)`."""

    def __init__(
        self, shapes: dict[str, tuple[int, int]], ranks: Sequence[int], scales: Sequence[float], dropout: float,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        """Zeros.

        Args:
            shapes: PEFT's name of an adapted layer → (n_in, n_out).
            ranks: of every sample.
            scales: of every sample: alpha / rank.
        """
        self._ranks = ranks
        self._scales = scales
        self._dropout = dropout
        width = max(ranks)
        offsets, n_weights = {}, 0
        for name, (n_in, n_out) in shapes.items():
            for part, size in (("a", width * n_in), ("b", n_out * width)):
                offsets[name, part] = n_weights
                n_weights += -(-size // ALIGNED) * ALIGNED
        blocks = (torch.zeros(len(ranks), n_weights, dtype=dtype, device=device) for _ in range(4))
        self.weights, self.gradients, self.means, self.squares = blocks
        self._places = {
            (name, part): (offsets[name, part], (width, n_in) if part == "a" else (n_out, width))
            for name, (n_in, n_out) in shapes.items()
            for part in ("a", "b")
        }
        self.layers = [_Layer(name, self._leaf(name, "a"), self._leaf(name, "b")) for name in shapes]
        self._slices: Sequence[_Slice] = ()
        self._n_tokens = 0
        self._is_recorded = self._is_replayed = False

    @classmethod
    def fresh(cls, base: Any, settings: Sequence[TrainingConfig], seeds: Sequence[int]) -> "_Adapters":
        """As `LoraTrainer` starts them: PEFT draws each from its own seed.

        Raises:
            SampleFailed: a layer that would be adapted is no linear one.
        """
        adapters: _Adapters | None = None
        for index, (training, seed) in enumerate(zip(settings, seeds, strict=True)):
            with private_generators(seed, next(base.parameters()).device), _adapter(base, training) as adapted:
                weights = _trained(adapted)
                if adapters is None:
                    some = next(iter(weights.values()))
                    scales = [training.alpha / training.rank for training in settings]
                    ranks = [training.rank for training in settings]
                    adapters = cls(_shapes(adapted), ranks, scales, training.dropout, some.dtype, some.device)
                adapters.write(index, adapters.weights, weights)
        assert adapters is not None
        return adapters

    @contextmanager
    def hooked(self, base: Any) -> Iterator[None]:
        """The base computes with the adapters."""
        handles = []
        try:
            for layer in self.layers:
                module = base.get_submodule(layer.name.removeprefix(_PREFIX))
                handles.append(module.register_forward_hook(self._hook(layer)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, slices: Sequence[_Slice], n_tokens: int, *, replayed: bool) -> None:
        """Whose rows the next pass is of, padded to `n_tokens`, and whether the backward pass repeats the forward."""
        self._slices, self._n_tokens = slices, n_tokens
        self._is_recorded, self._is_replayed = replayed, False
        for layer in self.layers:
            layer.drawn.clear()

    def end_forward(self) -> None:
        self._is_replayed = True

    def of(self, index: int, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """One sample's part of a block, by PEFT's names: views."""
        r = self._ranks[index]
        found = {}
        for layer in self.layers:
            found[f"{layer.name}.lora_A.default.weight"] = self._view(block, layer.name, "a")[index, :r]
            found[f"{layer.name}.lora_B.default.weight"] = self._view(block, layer.name, "b")[index, :, :r]
        return found

    def write(self, index: int, block: torch.Tensor, values: dict[str, torch.Tensor]) -> None:
        """Copy one sample's values into a block."""
        with torch.no_grad():
            for name, view in self.of(index, block).items():
                if name in values:
                    view.copy_(values[name])

    def state(self, index: int, progress: Progress) -> TrainingState:
        means, squares = self.of(index, self.means), self.of(index, self.squares)
        return TrainingState(
            progress=progress,
            weights=self.of(index, self.weights),
            moments={name: (mean, squares[name]) for name, mean in means.items()},
        )

    def take_up(self, index: int, state: TrainingState) -> None:
        """Go back to where a sample's state was written."""
        self.write(index, self.weights, dict(state.weights))
        self.write(index, self.means, {name: mean for name, (mean, _) in state.moments.items()})
        self.write(index, self.squares, {name: square for name, (_, square) in state.moments.items()})

    def norms(self) -> torch.Tensor:
        """`(n_samples,)`: the norm of every sample's gradient; in two stages, which rounds less."""
        pieces = self.gradients.view(len(self.gradients), -1, ALIGNED)
        return torch.linalg.vector_norm(torch.linalg.vector_norm(pieces, dim=2), dim=1)

    def clip(self, norms: torch.Tensor, limit: float) -> None:
        """As `torch.nn.utils.clip_grad_norm_` does, sample for sample."""
        self.gradients.mul_((limit / (norms + 1e-6)).clamp(max=1.0)[:, None])

    def update(self, steps: dict[int, tuple[int, float]], weight_decay: float) -> None:
        """A step of AdamW (Loshchilov & Hutter 2019), each sample at its own step number and learning rate.

        Overwrites the gradients. Samples that are not in `steps` keep their weights.

        Args:
            steps: sample → (number of this step, from 1; learning rate).
        """
        rates, firsts, seconds = [], [], []
        for index in range(len(self.weights)):
            n, rate = steps.get(index, (1, 0.0))
            rates.append(rate / (1 - BETAS[0] ** n))
            firsts.append(1 - weight_decay * rate)
            seconds.append(1 / math.sqrt(1 - BETAS[1] ** n))
        gradients = self.gradients
        self.means.lerp_(gradients, 1 - BETAS[0])
        self.squares.mul_(BETAS[1]).addcmul_(gradients, gradients, value=1 - BETAS[1])
        torch.sqrt(self.squares, out=gradients)
        gradients.mul_(self._column(seconds)).add_(EPSILON)
        torch.div(self.means, gradients, out=gradients).mul_(self._column(rates))
        if weight_decay:
            self.weights.mul_(self._column(firsts))
        self.weights.sub_(gradients)

    def _hook(self, layer: _Layer) -> Callable[..., torch.Tensor]:
        def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            slices = self._slices
            n_rows, x = slices[-1].rows.stop, args[0]
            if tuple(x.shape[:-1]) not in ((n_rows, self._n_tokens), (n_rows * self._n_tokens,)):
                raise SampleFailed(
                    f"the layer {layer.name.removeprefix(_PREFIX)} is given {tuple(x.shape)}, from which the samples "
                    "of one pass cannot be told apart; set training.fuse: 1, or other training.target_modules"
                )
            x = x.reshape(n_rows, self._n_tokens, -1)
            if self._dropout:
                x = self._dropped(layer, x.to(layer.a.dtype))
            out = output.reshape(n_rows, self._n_tokens, -1)
            if len({s.n_rows for s in slices}) == 1:
                return self._batched(layer, x, out).view_as(output)
            all_a, all_b = layer.a.unbind(), layer.b.unbind()
            parts = []
            for s in slices:
                inner = x[s.rows].flatten(0, 1) @ all_a[s.index].T * self._scales[s.index]
                parts.append(torch.addmm(out[s.rows].flatten(0, 1), inner, all_b[s.index].T))
            return torch.cat(parts).view_as(output)

        return add

    def _batched(self, layer: _Layer, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """All slices in one product. The scale goes to the narrow side, and the base's output is added on the way."""
        indices = [s.index for s in self._slices]
        a, b = layer.a, layer.b
        if indices != list(range(len(a))):
            all_a, all_b = a.unbind(), b.unbind()
            a, b = torch.stack([all_a[i] for i in indices]), torch.stack([all_b[i] for i in indices])
        inner = torch.bmm(x.reshape(len(indices), -1, x.shape[-1]), a.mT)
        scales = [self._scales[i] for i in indices]
        inner = inner * (scales[0] if len(set(scales)) == 1 else self._column(scales)[:, :, None])
        return torch.baddbmm(out.reshape(len(indices), -1, out.shape[-1]), inner, b.mT)

    def _dropped(self, layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        """Dropout slice by slice, with the masks that each sample would draw alone: of its own width.

        A pass that is computed again for its gradient (gradient checkpointing) gets the same masks again.
        """
        if self._is_replayed:
            (states,) = layer.drawn
        else:
            states = [s.stream.state for s in self._slices]
            if self._is_recorded:
                layer.drawn.append(states)
                if len(layer.drawn) > 1:
                    raise SampleFailed(
                        f"the layer {layer.name.removeprefix(_PREFIX)} is used twice in a pass, and its dropout cannot "
                        "be repeated; set training.fuse: 1, or training.gradient_checkpointing: false"
                    )
        generator = _generator(x.device)
        kept = generator.get_state()
        parts = []
        try:
            for s, state in zip(self._slices, states, strict=True):
                generator.set_state(state)
                dropped = F.dropout(x[s.rows, : s.width].contiguous(), self._dropout)
                parts.append(F.pad(dropped, (0, 0, 0, self._n_tokens - s.width)))
                if not self._is_replayed:
                    s.stream.state = generator.get_state()
        finally:
            generator.set_state(kept)
        return torch.cat(parts)

    def _leaf(self, name: str, part: str) -> torch.Tensor:
        """A weight whose gradient autograd adds to the block."""
        leaf = self._view(self.weights, name, part).detach().requires_grad_()
        leaf.grad = self._view(self.gradients, name, part)
        return leaf

    def _view(self, block: torch.Tensor, name: str, part: str) -> torch.Tensor:
        first, shape = self._places[name, part]
        return block[:, first : first + math.prod(shape)].view(-1, *shape)

    def _column(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=self.weights.dtype, device=self.weights.device)[:, None]


_PREFIX = "base_model.model."
"""What PEFT puts before the base's names."""


@contextmanager
def _adapter(base: Any, training: TrainingConfig) -> Iterator[PeftModel]:
    """PEFT's own adapter on the base, for as long as the block lasts."""
    adapted = attach_adapter(base, training)
    try:
        yield adapted
    finally:
        adapted.unload().eval()


def _trained(adapted: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p for name, p in adapted.named_parameters() if p.requires_grad}


def _shapes(adapted: PeftModel) -> dict[str, tuple[int, int]]:
    """PEFT's name of every adapted layer → (n_in, n_out).

    Raises:
        SampleFailed: one of them is no linear layer.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for name, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer):
            base_layer = layer.get_base_layer()
            if not isinstance(base_layer, torch.nn.Linear | Conv1D):
                raise SampleFailed(
                    f"{name.removeprefix(_PREFIX)} is no linear layer but {type(base_layer).__name__}; samples can be "
                    "trained in one pass on linear layers only: set training.fuse: 1, or other training.target_modules"
                )
            assert layer.in_features is not None
            assert layer.out_features is not None
            shapes[name] = layer.in_features, layer.out_features
    return shapes


def _generator(device: torch.device) -> torch.Generator:
    """torch's global generator of a device."""
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]
