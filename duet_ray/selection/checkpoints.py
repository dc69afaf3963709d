"""The warm-up that LESS and TracIn score by: a short fine-tuning, with a checkpoint at the end of every epoch.

LESS warms up on 5 % of the rows for 4 epochs. A twentieth of a small domain is too little to learn from, so at least
256 rows are taken (all, of a domain that has fewer). Left in the folder that the shards read:

    checkpoints.json                   the mean learning rate of every epoch
    0/ 1/ 2/ 3/  adapter/              as the trainer saves it
                 moments.safetensors   Adam's m and v (LESS)
                 direction.safetensors what rows are compared with at this checkpoint

They are 5 numbers a LoRA parameter and checkpoint for LESS and 2 for TracIn, and are deleted with the folder.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from duet_ray.errors import SelectionError
from duet_ray.files import write_json
from duet_ray.selection.base import SelectionContext
from duet_ray.selection.fitting import FIT, FIT_ROWS, ScoringModel, domain_seed, rows_of, scoring_model, subset
from duet_ray.selection.gradients import AdaptedModel, Vector
from duet_ray.training import Checkpoint

N_EPOCHS = 4
WARM_UP_SHARE = 0.05
MIN_WARM_UP_ROWS = 256

_ADAPTER, _MOMENTS, _DIRECTION, _INDEX = "adapter", "moments.safetensors", "direction.safetensors", "checkpoints.json"


@dataclass(frozen=True)
class SavedCheckpoint:
    """One epoch's end, on disk."""

    folder: Path
    learning_rate: float
    """Mean over the epoch's steps."""

    def load(self, scoring: ScoringModel) -> AdaptedModel:
        """Put the adapter of this checkpoint on the model."""
        scoring.trainer.load(self.folder / _ADAPTER)
        return scoring.adapted

    def moments(self, adapted: AdaptedModel) -> tuple[Vector, Vector]:
        """Adam's (m, v) at this checkpoint, not bias-corrected."""
        tensors = load_file(self.folder / _MOMENTS, device=str(adapted.device))
        return [tensors[f"{n}.m"] for n in adapted.names], [tensors[f"{n}.v"] for n in adapted.names]

    def direction(self, adapted: AdaptedModel) -> list[torch.Tensor]:
        """What `save_directions` left here, on the model's device."""
        tensors = load_file(self.folder / _DIRECTION, device=str(adapted.device))
        return [tensors[str(index)] for index in range(len(tensors))]


@contextmanager
def warming_model(context: SelectionContext) -> Iterator[ScoringModel]:
    """`scoring_model`, with the warm-up's own number of epochs."""
    settings = context.settings.model_copy(update={"epochs": context.settings.epochs or N_EPOCHS})
    with scoring_model(replace(context, settings=settings)) as scoring:
        yield scoring


def n_warm_up_rows(n_rows: int, asked_for: int | None) -> int:
    """How many of a domain's `n_rows` training rows the warm-up takes."""
    return min(n_rows, asked_for or max(math.ceil(WARM_UP_SHARE * n_rows), MIN_WARM_UP_ROWS))


def warm_up(
    scoring: ScoringModel, domain: Any, context: SelectionContext, folder: Path, *, with_moments: bool
) -> dict[str, float]:
    """Fine-tune on a seeded part of the domain, and leave a checkpoint an epoch in `folder`.

    Returns:
        What there is to tell.
    """
    rates: list[float] = []

    def keep(checkpoint: Checkpoint) -> None:
        place = folder / str(checkpoint.epoch)
        scoring.trainer.save(place / _ADAPTER)
        if with_moments:
            moments = {name: checkpoint.moments[f"{name}.weight"] for name in scoring.adapted.names}
            named = {
                f"{n}.{kind}": t.contiguous() for n, mv in moments.items() for kind, t in zip("mv", mv, strict=True)
            }
            save_file(named, place / _MOMENTS)
        rates.append(checkpoint.learning_rate)

    ids = subset(context, domain, n_warm_up_rows(len(domain.train), context.settings.n_fit_rows), FIT_ROWS)
    report = scoring.trainer.train(
        rows_of(domain, ids),
        seed=domain_seed(context, domain, FIT),
        on_step=lambda done, total: context.progress("fit", total)(done),
        on_epoch=keep,
    )
    write_json(folder / _INDEX, {"learning_rates": rates})
    return {"fit_rows": float(report.n_rows), "fit_loss": report.last_loss, "checkpoints": float(len(rates))}


def saved_checkpoints(folder: Path) -> list[SavedCheckpoint]:
    """The checkpoints that `warm_up` left in `folder`, in order."""
    rates = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["learning_rates"]
    return [SavedCheckpoint(folder / str(epoch), rate) for epoch, rate in enumerate(rates)]


def save_directions(
    scoring: ScoringModel,
    context: SelectionContext,
    folder: Path,
    direction: Callable[[AdaptedModel], Sequence[torch.Tensor]],
) -> None:
    """Ask `direction` at every checkpoint in `folder` what rows are compared with there, and keep it.

    Raises:
        SelectionError: `direction` has none, or one that is not finite.
    """
    checkpoints = saved_checkpoints(folder)
    done = context.progress("validation", len(checkpoints))
    for epoch, checkpoint in enumerate(checkpoints):
        try:
            tensors = direction(checkpoint.load(scoring))
        except SelectionError as error:
            raise SelectionError(
                f"the validation loss has no gradient: {error}; raise training.max_tokens, "
                "or use selection.method: uniform"
            ) from error
        if not all(bool(t.isfinite().all()) for t in tensors):
            raise SelectionError(
                f"the gradient of the validation loss is not finite after epoch {epoch + 1} of the warm-up; "
                "lower training.learning_rate, set model.dtype: float32, or use selection.method: uniform"
            )
        named = {str(index): t.contiguous() for index, t in enumerate(tensors)}
        save_file(named, checkpoint.folder / _DIRECTION)
        done(epoch + 1)


def sum_over_checkpoints(
    context: SelectionContext,
    folder: Path,
    n_rows: int,
    score: Callable[[SavedCheckpoint, AdaptedModel, Callable[[int], None]], np.ndarray],
) -> np.ndarray:
    """Σ_i η_i · (what `score` gives at checkpoint i): `(n_rows,)`.

    Args:
        score: (checkpoint, the model at it, a function to tell how many rows are done) → `(n_rows,)`.
    """
    checkpoints, total = saved_checkpoints(folder), np.zeros(n_rows)
    report = context.progress("score", len(checkpoints) * n_rows)
    with warming_model(context) as scoring:
        for index, checkpoint in enumerate(checkpoints):

            def on_rows(done: int, before: int = index * n_rows) -> None:
                report(before + done)

            total += checkpoint.learning_rate * score(checkpoint, checkpoint.load(scoring), on_rows)
    return total
