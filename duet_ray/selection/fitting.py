"""The model that a domain is scored with: the base (or a smaller surrogate), fine-tuned on the domain itself.

Shared by the methods that look at gradients. They come after fine-tuning and never before: LoRA's B starts at zero,
and with it every gradient of A is zero.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from duet_ray.errors import SampleFailed, SelectionError
from duet_ray.likelihood import pad_id
from duet_ray.seeds import child_seed
from duet_ray.selection.base import SelectionContext
from duet_ray.selection.gradients import AdaptedModel
from duet_ray.training import Trainer, make_trainer

FIT, FIT_ROWS, HESSIAN_ROWS, LABELS, POWER, PROJECTION, EXACT_ROWS, EMBEDDING, PROMPTS, LISSA = range(10)
"""Uses of the "select" purpose: each has a stream of its own."""


@dataclass(frozen=True)
class ScoringModel:
    """A trainer around the model to score with."""

    trainer: Trainer
    pad_id: int
    batch_size: int

    @property
    def adapted(self) -> AdaptedModel:
        """The model as it is now, with its LoRA linears found; after `trainer.train` or `trainer.load`."""
        return AdaptedModel.of(self.trainer.model, pad_id=self.pad_id, batch_size=self.batch_size)


@contextmanager
def scoring_model(context: SelectionContext) -> Iterator[ScoringModel]:
    """The base model in a trainer with selection's own settings; untouched again at the end.

    Raises:
        SelectionError: the model did not train.
    """
    model, tokenizer = context.load_base()
    settings = context.settings
    own = settings.fit.given
    own |= {name: value for name in ("epochs", "target_modules") if (value := getattr(settings, name))}
    if settings.surrogate is not None:
        own["layers"] = None  # The numbers are of the study's model.
    # Scores are those of an adapter, also where the samples train every weight.
    trainer = make_trainer(context.training.model_copy(update={**own, "method": "lora"}), model, tokenizer)
    try:
        yield ScoringModel(trainer, pad_id(tokenizer), context.settings.batch_size)
    except SampleFailed as error:
        raise SelectionError(f"the model to score with did not train: {error}") from error
    finally:
        trainer.reset()


def domain_seed(context: SelectionContext, domain: Any, use: int) -> int:
    """A seed per use and domain, by the domain's content: its place in a study does not change its scores."""
    content = int.from_bytes(hashlib.sha256(domain.fingerprint.encode()).digest()[:8], "big")
    return child_seed(context.seed, "select", content, use)


def subset(context: SelectionContext, domain: Any, n: int | None, use: int) -> np.ndarray:
    """Ids of `n` seeded training rows in ascending order, or of all."""
    total = len(domain.train)
    if n is None or n >= total:
        return np.arange(total)
    draws = np.random.default_rng(domain_seed(context, domain, use))
    return np.sort(draws.choice(total, size=n, replace=False))


def rows_of(domain: Any, ids: np.ndarray) -> Sequence[Any]:
    """The tokenised training rows with these ids."""
    rows: Sequence[Any] = domain.train.rows(ids.tolist())
    return rows
