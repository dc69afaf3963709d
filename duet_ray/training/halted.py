"""The state of a sample's training in the middle of it, on disk: a retry goes on from there, to the same result (but
for rounding where it trains along with others, who may be at other steps then).

It is what the next step needs and nothing else: trained weights, Adam's moments, and how far the training is. No
generator is in it, since every step seeds its own (`batches.step_seed`). safetensors, written to a temporary name and
renamed, so that a kill leaves the state before it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from duet_ray.files import write_file
from duet_ray.records import TokenRow
from duet_ray.training.base import TrainReport

STATE_FILE = "state.safetensors"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a sample's training is, and what its report needs of the steps before."""

    n_done: int
    """Optimizer steps."""
    first_loss: float
    last_loss: float
    micro_batch_size: int

    def report(self, rows: Sequence[TokenRow], epochs: int, seconds: float, n_skipped: int = 0) -> TrainReport:
        """What a trainer says of a sample that ends here."""
        return TrainReport(
            n_rows=len(rows),
            n_steps=self.n_done,
            n_tokens=epochs * sum(map(len, rows)),
            first_loss=self.first_loss,
            last_loss=self.last_loss,
            micro_batch_size=self.micro_batch_size,
            seconds=seconds,
            n_skipped=n_skipped,
        )


def one_step_on(before: Progress | None, loss: float, micro_batch_size: int) -> Progress:
    """How far a sample is after another step; `before` is None at its first."""
    return Progress(
        n_done=before.n_done + 1 if before else 1,
        first_loss=before.first_loss if before else loss,
        last_loss=loss,
        micro_batch_size=micro_batch_size,
    )


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Names are the trainer's own."""

    progress: Progress
    weights: Mapping[str, torch.Tensor]
    moments: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    """Adam's running means (m, v); a parameter that no gradient has reached has none."""


def write_state(folder: Path, state: TrainingState) -> None:
    """Replace the state in a folder."""
    tensors = {f"weight.{name}": p for name, p in state.weights.items()}
    for name, (mean, square) in state.moments.items():
        tensors |= {f"mean.{name}": mean, f"square.{name}": square}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / STATE_FILE, save(tensors, {"progress": json.dumps(asdict(state.progress))}))


def read_state(folder: Path) -> TrainingState | None:
    """The state in a folder, on the CPU; None where there is none, or it is damaged."""
    try:
        with safe_open(folder / STATE_FILE, framework="pt") as file:
            progress = Progress(**json.loads(file.metadata()["progress"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    kinds: dict[str, dict[str, torch.Tensor]] = {"weight": {}, "mean": {}, "square": {}}
    for name, tensor in tensors.items():
        kind, rest = name.split(".", 1)
        kinds[kind][rest] = tensor
    moments = {name: (mean, kinds["square"][name]) for name, mean in kinds["mean"].items()}
    return TrainingState(progress=progress, weights=kinds["weight"], moments=moments)
