"""Every selection method's scores for the rows of a domain, beside controls that any method has to beat.

Controls: the plain loss of a row (a high loss is a low score), the dot product of its gradient with the validation
gradient (influence without a Hessian), and random scores. A method that gives an order is scored by the place in it.
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
import torch
from forked import Failure, run_forked
from learners import Learner
from small_domain import MemoryDomain

from duet_ray.likelihood import row_nll
from duet_ray.selection import METHODS, select
from duet_ray.selection.fitting import FIT, domain_seed, scoring_model
from duet_ray.selection.gradients import ghost_products, mean_gradient

T = TypeVar("T")

OURS: dict[str, dict[str, Any]] = {
    "influence, ekfac": {"method": "influence", "solver": "ekfac"},
    "influence, cg": {"method": "influence", "solver": "cg", "n_hessian_rows": 64, "cg_iterations": 10},
    "influence, lissa": {"method": "influence", "solver": "lissa", "n_hessian_rows": 64, "lissa_depth": 50},
    "less": {"method": "less"},
    "tracin": {"method": "tracin"},
    "indicators": {"method": "indicators"},
    "logdet": {"method": "logdet"},
    "coreset": {"method": "coreset"},
}
"""Name in the tables → what its settings have beside the learner's."""
SLOW = ("influence, cg", "influence, lissa")
"""Left out on the real model: an iteration costs several passes over the rows that the Hessian is estimated on."""
GRADIENT_DOT, PLAIN_LOSS, RANDOM = "control: gradient dot product", "control: plain loss", "control: random"


def scores_of(learner: Learner, domain: MemoryDomain, name: str, seed: int) -> dict[str, np.ndarray]:
    """Name → `(n_rows,)`, higher = better; all controls at once, since they share a model."""
    if name != "controls":
        weights = select(domain, learner.context(seed, OURS[name]))
        if weights.scores is not None:
            return {name: weights.scores}
        assert weights.order is not None
        return {name: -np.argsort(weights.order).astype(float)}
    with scoring_model(learner.context(seed)) as scoring:
        train = domain.train
        scoring.trainer.train(train.rows(range(len(train))), seed=domain_seed(learner.context(seed), domain, FIT))
        adapted = scoring.adapted
        _, gradient = mean_gradient(adapted, domain.validation)
        losses = np.zeros(len(train))
        with torch.no_grad():
            for ids, batch in adapted.batches(train):
                n_tokens = batch.loss_mask.sum(dim=1)
                losses[ids] = (row_nll(adapted.model, batch) / n_tokens).double().numpy()
        return {
            GRADIENT_DOT: ghost_products(adapted, train, gradient),
            PLAIN_LOSS: -losses,
            RANDOM: np.random.default_rng(seed).normal(size=len(train)),
        }


def available(asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those whose module is there, with the controls; and those whose module is not."""
    here = [name for name in asked if find_spec(METHODS[OURS[name]["method"]].home.partition(":")[0])]
    return [*here, "controls"], [name for name in asked if name not in here]


def scores_of_all(
    learner: Learner, domains: Sequence[MemoryDomain], names: Sequence[str], n_processes: int
) -> dict[str, list[np.ndarray]]:
    """Name → the scores of every domain."""
    works = [partial(scores_of, learner, domain, name, seed) for name in names for seed, domain in enumerate(domains)]
    started = time.perf_counter()
    found: dict[str, list[np.ndarray]] = {}
    for result in done(works, n_processes, "scoring"):
        for name, scores in result.items():
            found.setdefault(name, []).append(scores)
    print(f"({len(works)} scorings in {time.perf_counter() - started:.0f} s)", file=sys.stderr)
    return found


def done(works: Sequence[Callable[[], T]], n_processes: int, what: str) -> list[T]:
    """The results of all works; a failure of one of them ends the program."""
    started = time.perf_counter()

    def on_done(n: int) -> None:
        print(f"\r{what}: {n} of {len(works)}, {time.perf_counter() - started:.0f} s", end="", file=sys.stderr)

    results = run_forked(works, n_processes, on_done)
    print(file=sys.stderr)
    if failures := [result for result in results if isinstance(result, Failure)]:
        raise SystemExit(f"{what} failed: {failures[0].reason}")
    return [result for result in results if not isinstance(result, Failure)]
