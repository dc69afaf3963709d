"""What others do for the score of a row: loops of gradients, vmap, kronfluence, bergson; all behind one call.

A scorer takes rows and returns one score for each, the dot product of the row's gradient with H⁻¹v. The first two and
bergson are given the vector; kronfluence computes its own, with EK-FAC factors of its own, and the same damping.

The libraries are installed beside the project, never into it, and without what they ask for: torchvision's wheel breaks
transformers on a CPU build of torch.

    pip install --no-deps kronfluence==1.0.1 einconv einops opt-einsum bergson==2.5.1 simple-parsing docstring-parser \
        ml_dtypes natsort petname torchopt optree jaxtyping wadler-lindig bitsandbytes
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

from duet_ray.likelihood import Batch, collate, token_nll
from duet_ray.records import TokenRow
from duet_ray.selection.gradients import AdaptedModel, Rows, Vector, trainable

Scorer = Callable[[Rows], np.ndarray]

LABELS = "labels"


def loop_of_gradients(adapted: AdaptedModel, vector: Vector) -> Scorer:
    """One backward pass a row, as the public code of the method does."""

    def score(rows: Rows) -> np.ndarray:
        scores = np.zeros(len(rows))
        with trainable(adapted):
            for i, row in enumerate(rows.rows(range(len(rows)))):
                loss = adapted.token_nll(collate([row], adapted.pad_id)).sum()
                gradients = torch.autograd.grad(loss, adapted.weights)
                scores[i] = sum(float((g * v).sum()) for g, v in zip(gradients, vector, strict=True))
        return scores

    return score


def vmap_of_gradients(adapted: AdaptedModel, vector: Vector) -> Scorer:
    """All gradients of a batch at once, by `torch.func`."""
    weights = {f"{name}.weight": weight.detach() for name, weight in zip(adapted.names, adapted.weights, strict=True)}

    def loss(weights: dict[str, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        # No attention mask: attention is causal, and padding is on the right.
        logits = functional_call(adapted.model, weights, (), {"input_ids": ids[None], "use_cache": False}).logits[0]
        return (F.cross_entropy(logits[:-1].float(), ids[1:], reduction="none") * mask[1:]).sum()

    gradients = vmap(grad(loss), in_dims=(None, 0, 0), randomness="error")

    def score(rows: Rows) -> np.ndarray:
        scores = np.zeros(len(rows))
        for ids, batch in adapted.batches(rows):
            found = gradients(weights, batch.input_ids, batch.loss_mask.float())
            pairs = zip(found.values(), vector, strict=True)
            scores[ids] = sum((g * v).flatten(1).sum(1).double() for g, v in pairs).numpy()  # type: ignore[union-attr]
        return scores

    return score


def bergson(adapted: AdaptedModel, vector: Vector) -> Scorer:
    """bergson's collector of gradients with a scorer, both in memory; the model is set up as bergson's loader does."""
    from bergson import GradientProcessor, InMemoryCollector
    from bergson import Scorer as BergsonScorer
    from bergson.collector.collector import CollectorComputer
    from bergson.config.config import IndexConfig
    from bergson.score.score_writer import InMemorySequenceScoreWriter
    from datasets import Dataset

    model, names = adapted.model, list(adapted.names)
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    queries = {name: v.flatten()[None] for name, v in zip(names, vector, strict=True)}
    logging.disable(logging.INFO)

    def score(rows: Rows) -> np.ndarray:
        items = rows.rows(range(len(rows)))
        labels = [np.where(row.loss_mask, row.input_ids, -100).tolist() for row in items]
        data = Dataset.from_dict({"input_ids": [row.input_ids.tolist() for row in items], LABELS: labels})
        writer = InMemorySequenceScoreWriter(len(items), 1)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            config = IndexConfig(run_path=f"{folder}/run")
            config.partial_run_path.mkdir(parents=True)
            collector = InMemoryCollector(
                model=model,
                cfg=config,
                data=data,
                processor=GradientProcessor(),
                target_modules=set(names),
                scorer=BergsonScorer(queries, names, writer, torch.device("cpu"), torch.float32),
            )
            batches = [ids for ids, _ in adapted.batches(rows)]
            computer = CollectorComputer(model, data, collector=collector, batches=batches, cfg=config)
            computer.run_with_collector_hooks(desc="scores")
        return np.asarray(writer.scores[:, 0].double())

    return score


class Kronfluence:
    """kronfluence's EK-FAC: factors left in a folder, then scores for one summed query gradient.

    Args:
        on_rows: called when the first training row is about to be scored; what came before is preparation.
    """

    FACTORS = "factors"

    def __init__(self, adapted: AdaptedModel, folder: Path, on_rows: Callable[[], None] = lambda: None) -> None:
        from kronfluence import Analyzer, prepare_model
        from kronfluence.utils.dataset import DataLoaderKwargs

        self._adapted = adapted
        self._pad_id = adapted.pad_id
        task = _kronfluence_task(adapted.names, on_rows)
        adapted.model.requires_grad_(False)
        self._task = task
        self._analyzer = Analyzer(
            "scores",
            prepare_model(adapted.model, task),
            task,
            cpu=True,
            disable_tqdm=True,
            log_level=logging.ERROR,
            output_dir=str(folder),
        )
        self._analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=self._collate))

    def fit(self, rows: Sequence[TokenRow]) -> None:
        """Factors with sampled labels, in float32 as ours."""
        from kronfluence.arguments import FactorArguments

        self._task.scoring = False
        self._analyzer.fit_all_factors(
            self.FACTORS,
            dataset=self._in_batches(rows),
            per_device_batch_size=self._adapted.batch_size,
            factor_args=FactorArguments(strategy="ekfac", eigendecomposition_dtype=torch.float32),
            overwrite_output_dir=True,
        )

    def score(self, rows: Rows, validation: Rows, damping: float) -> np.ndarray:
        """Scores for the gradient of the summed validation loss.

        Args:
            damping: added to the Hessian per row, not per token; one number for all layers.
        """
        from kronfluence.arguments import ScoreArguments

        self._task.scoring = True
        self._analyzer.compute_pairwise_scores(
            "scores",
            self.FACTORS,
            query_dataset=self._in_batches(validation.rows(range(len(validation)))),
            train_dataset=self._in_batches(rows.rows(range(len(rows)))),
            per_device_query_batch_size=self._adapted.batch_size,
            per_device_train_batch_size=self._adapted.batch_size,
            score_args=ScoreArguments(damping_factor=damping, aggregate_query_gradients=True),
            overwrite_output_dir=True,
        )
        found = self._analyzer.load_pairwise_scores("scores")
        assert found is not None
        scores = np.zeros(len(rows))
        scores[_order(rows.n_tokens)] = found["all_modules"][0].double().numpy()
        return scores

    def _in_batches(self, rows: Sequence[TokenRow]) -> Any:
        """Rows in the order of their lengths: a plain loader then makes the batches that ours are."""
        return [rows[i] for i in _order(np.array([len(row) for row in rows]))]

    def _collate(self, rows: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
        batch = collate(rows, self._pad_id)
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "loss_mask": batch.loss_mask}


def _order(n_tokens: np.ndarray) -> np.ndarray:
    return np.argsort(n_tokens, kind="stable")


def _kronfluence_task(names: Sequence[str], on_rows: Callable[[], None]) -> Any:
    from kronfluence import Task

    class LanguageModelling(Task):  # type: ignore[misc]
        """The summed NLL of completions, over the LoRA linears."""

        scoring = False

        def compute_train_loss(self, batch: dict[str, torch.Tensor], model: Any, sample: bool = False) -> torch.Tensor:
            if self.scoring:
                self.scoring = False
                on_rows()
            if not sample:
                return self.compute_measurement(batch, model)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            logits = logits[:, :-1][batch["loss_mask"][:, 1:]].float()
            with torch.no_grad():
                labels = torch.multinomial(logits.softmax(dim=-1), 1).flatten()
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: dict[str, torch.Tensor], model: Any) -> torch.Tensor:
            return token_nll(model, Batch(**batch)).sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return list(names)

        def get_attention_mask(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return batch["attention_mask"]

    return LanguageModelling()
