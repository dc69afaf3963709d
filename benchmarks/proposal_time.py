"""How long does a proposal take, and is it as good as that of Ax's own optimiser of the acquisition?

    OMP_NUM_THREADS=1 python benchmarks/proposal_time.py
    OMP_NUM_THREADS=1 python benchmarks/proposal_time.py --domains 3 9 --observations 10 60 --repeats 1

For every number of domains and observations, on the same quadratic toy with 1 % noise: median CPU seconds of a whole
proposal (rebuild Ax's experiment, fit the Gaussian process, optimise LCB, project onto whole rows), with our optimiser
on the simplex and with Ax's stock one; and the value of LCB at each proposal, in standard deviations of the losses
(lower is better). Everything but the optimiser is the same in both columns.

CPU seconds, since the machine may be shared; they are what one core needs.
"""

import argparse
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
from ax.generators.torch.botorch_modular.acquisition import Acquisition

from duet_ray.config import SearchConfig
from duet_ray.search import Proposal, Proposer, SimplexSpace, Told, start_design, surrogate
from duet_ray.search.model import LossScale

N_ROWS = 10_000
BETA = 0.5


class StockAcquisition(Acquisition):
    """Ax's optimiser, whatever options it is given."""


@contextmanager
def stock_optimiser() -> Iterator[None]:
    with mock.patch.object(surrogate, "SimplexAcquisition", StockAcquisition):
        yield


def observations(space: SimplexSpace, n_told: int, seed: int) -> list[Told]:
    """A start design, measured on a quadratic with its minimum at a random ratio."""
    random = np.random.default_rng(seed)
    best = random.dirichlet(np.ones(space.n_domains))
    design = start_design(space, n_told, seed, vertices=True)
    return [Told(ratio=r, loss=float(np.square(r.values - best).sum() + random.normal(0, 0.01))) for r in design]


def measure(space: SimplexSpace, told: list[Told], seed: int) -> tuple[float, float]:
    """CPU seconds of one proposal, and LCB at it in standard deviations of the losses."""
    proposer = Proposer(space, SearchConfig(n_start=1, beta=BETA), seed)
    started = time.process_time()
    proposal: Proposal = proposer.propose(len(told), told, [])
    seconds = time.process_time() - started
    assert proposal.expected is not None
    assert proposal.sigma is not None
    scale = LossScale.of([one.loss for one in told])
    return seconds, (proposal.expected - BETA * proposal.sigma - scale.mean) / scale.spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", type=int, nargs="+", default=[3, 9, 17, 30])
    parser.add_argument("--observations", type=int, nargs="+", default=[10, 60, 200])
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()

    names = ("ax-platform", "botorch", "gpytorch", "torch", "numpy")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, one thread;", end=" ")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names), f"({time.strftime('%Y-%m-%d')})")
    print(f"M = {N_ROWS} rows, lcb, beta {BETA}; medians of {asked.repeats}\n")
    print("| domains | observations | CPU s, ours | CPU s, Ax stock | LCB, ours | LCB, Ax stock |")
    print("|---|---|---|---|---|---|")
    warm = SimplexSpace(names=("a", "b", "c"), n_rows=N_ROWS, lower=(0,) * 3, upper=(N_ROWS,) * 3)
    measure(warm, observations(warm, 5, 0), 0)
    for n in asked.domains:
        space = SimplexSpace(
            names=tuple(f"domain{i}" for i in range(n)), n_rows=N_ROWS, lower=(0,) * n, upper=(N_ROWS,) * n
        )
        for n_told in asked.observations:
            told = [observations(space, n_told, seed) for seed in range(asked.repeats)]
            ours = [measure(space, one, seed) for seed, one in enumerate(told)]
            with stock_optimiser():
                stock = [measure(space, one, seed) for seed, one in enumerate(told)]
            cells = [statistics.median(x) for pair in (zip(*ours, strict=True), zip(*stock, strict=True)) for x in pair]
            print(f"| {n} | {n_told} | {cells[0]:.2f} | {cells[2]:.2f} | {cells[1]:.4f} | {cells[3]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
