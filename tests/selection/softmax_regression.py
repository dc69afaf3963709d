"""Regularised softmax regression that poses as a language model: influence has a closed form, retraining one answer.

A row is one token, whose embedding is the row's features, and a second one that is predicted: its class. The only
adapted linear is the regression's weight, so that the loss is convex in it. What fine-tunes is Newton's method.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from duet_ray.config import SelectionConfig, TrainingConfig
from duet_ray.records import TokenRow
from duet_ray.selection import select
from duet_ray.selection.base import RowWeights, SelectionContext
from duet_ray.selection.gradients import AdaptedModel
from tests.selection.toy_domain import ToyDomain, ToyRows

N_FEATURES, N_CLASSES = 5, 3


class Regression(nn.Module):
    """logits = W · features(token)."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(features.float(), freeze=True)
        self.linear = nn.Linear(N_FEATURES, N_CLASSES, bias=False)
        self.config = SimpleNamespace(_attn_implementation="eager")

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.linear(self.embedding(input_ids)))


class Problem:
    """A seeded one. Some of the training labels are wrong.

    The objective is (1/n_train) Σ_i w_i loss_i + (ridge / 2) |W|², with w_i = 0 for a row that is left out.
    """

    def __init__(self, n_train: int, n_validation: int = 40, *, ridge: float, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        n = n_train + n_validation
        self.features = torch.from_numpy(generator.normal(size=(n, N_FEATURES)))
        truth = torch.from_numpy(generator.normal(size=(N_CLASSES, N_FEATURES)))
        noise = torch.from_numpy(generator.gumbel(size=(n, N_CLASSES)))
        self.labels = (self.features @ truth.T + 0.5 * noise).argmax(dim=1)
        wrong = generator.random(n_train) < 0.2
        self.labels[:n_train][wrong] = (self.labels[:n_train][wrong] + 1) % N_CLASSES
        rows = [TokenRow(np.array([i, y], np.int32), np.array([False, True])) for i, y in enumerate(self.labels)]
        self.n_train, self.ridge = n_train, ridge
        self.domain = ToyDomain(
            ToyRows(rows[:n_train]), ToyRows(rows[n_train:]), wrong, name="classes", fingerprint=f"classes-{seed}"
        )
        self.optimum = self.retrained(torch.ones(n_train), torch.zeros(N_CLASSES, N_FEATURES))

    def losses(self, weight: torch.Tensor) -> torch.Tensor:
        """Every row's, training rows first."""
        logits = self.features @ weight.view(N_CLASSES, N_FEATURES).T
        return F.cross_entropy(logits, self.labels, reduction="none")

    def objective(self, weight: torch.Tensor, row_weights: torch.Tensor) -> torch.Tensor:
        data = (self.losses(weight)[: self.n_train] * row_weights).sum() / self.n_train
        return data + self.ridge / 2 * weight.square().sum()

    def retrained(self, row_weights: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """The optimum, by Newton's method in float64."""
        weight = start.double()
        for _ in range(30):
            hessian = torch.func.hessian(self.objective)(weight.flatten(), row_weights)
            slope = torch.func.grad(self.objective)(weight.flatten(), row_weights)
            weight = weight - torch.linalg.solve(hessian, slope).view_as(weight)
            if slope.norm() < 1e-12:
                return weight
        raise AssertionError("Newton's method did not converge")

    def validation_loss(self, weight: torch.Tensor) -> torch.Tensor:
        return self.losses(weight)[self.n_train :].mean()

    def closed_form(self) -> np.ndarray:
        """vᵀ H⁻¹ g of every training row, with the dense Hessian of the objective."""
        weight = self.optimum.flatten()
        hessian = torch.func.hessian(self.objective)(weight, torch.ones(self.n_train))
        direction = torch.linalg.solve(hessian, torch.func.grad(self.validation_loss)(weight))
        return (torch.func.jacrev(self.losses)(weight)[: self.n_train] @ direction).numpy()

    def effects(self) -> np.ndarray:
        """By how much the validation loss rises when a training row is left out and the model trained again."""
        before = self.validation_loss(self.optimum)
        effects = []
        for left_out in range(self.n_train):
            row_weights = torch.ones(self.n_train)
            row_weights[left_out] = 0
            effects.append(float(self.validation_loss(self.retrained(row_weights, self.optimum)) - before))
        return np.array(effects)

    def weights(self, **settings: Any) -> RowWeights:
        """What `influence` makes of it, damped by the ridge; `scoring_model` is in place."""
        damping = self.ridge / self._select().details["mean_eigenvalue"]
        return self._select(damping=damping, **settings)

    def _select(self, **settings: Any) -> RowWeights:
        chosen = SelectionConfig(**{"method": "influence", "n_hessian_rows": None, "batch_size": 16, **settings})
        return select(
            self.domain,
            SelectionContext(settings=chosen, training=TrainingConfig(), seed=0, load_base=lambda: (None, None)),
        )

    @contextmanager
    def scoring_model(self, _context: Any) -> Iterator[Any]:
        """In place of `fitting.scoring_model`: a model that fits and is kept, with its one linear as the adapter."""
        model = Regression(self.features)
        adapted = AdaptedModel(model, ("linear",), (model.linear,), 0, 16)

        def set_weight(weight: torch.Tensor) -> None:
            with torch.no_grad():
                model.linear.weight.copy_(weight)

        def train(rows: Any, **_: Any) -> SimpleNamespace:
            set_weight(self.optimum)
            return SimpleNamespace(n_rows=len(rows), last_loss=0.0)

        def save(folder: Path) -> None:
            folder.mkdir()
            save_file({"weight": model.linear.weight.detach()}, folder / "weight.safetensors")

        def load(folder: Path) -> None:
            set_weight(load_file(folder / "weight.safetensors")["weight"])

        yield SimpleNamespace(trainer=SimpleNamespace(train=train, save=save, load=load), adapted=adapted)
