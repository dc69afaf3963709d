"""How fast is a row scored, in how much memory, and how close is that to the floor, and to what others need?

    OMP_NUM_THREADS=1 python benchmarks/influence.py --model .demo/model
    OMP_NUM_THREADS=1 python benchmarks/influence.py --quick

With one vector H⁻¹v a domain, the score of a row needs one forward and one backward pass to the activations, and no
gradient of a weight. So the floor is a plain batched pass over the same rows in the same batches: (i) backward as far
as the embeddings, (ii) backward with the gradients of the LoRA weights, as in training. Beside it, on the same model,
adapter, vector and rows: ours, a loop of gradients, `vmap(grad)`, bergson and kronfluence, where they are installed.

Every contender and every repeat is a process of its own, forked from one that only holds the base model, so that
nothing that one of them leaves in memory counts for another; the repeats of all contenders are interleaved, and each
process first scores two rows that are not counted. CPU seconds of one thread, since the machine may be shared; memory
is what the resident set grows by at its highest, above the model with its adapter. Linux only.

The second table is of whole methods, as a study runs them: fine-tune, prepare, measure all rows. Their memory is above
the base model's. bergson is in the first one only: its ways to H⁻¹v are command lines over files.

Rows are made up, since their content is no matter of speed; `selection_quality.py` asks what the scores are worth.
"""

import argparse
import ctypes
import gc
import os
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peers
import torch
import transformers
from forked import Failure, run_forked
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from small_domain import MemoryDomain, machine, repeating_rows, tiny_llama
from transformers import AutoModelForCausalLM

from duet_ray.config import SelectionConfig, StudyConfig, TrainingConfig
from duet_ray.selection import METHODS, RowWeights, Scoring, load_weights, save_weights, weights_key
from duet_ray.selection.base import SelectionContext
from duet_ray.selection.fitting import scoring_model
from duet_ray.selection.gradients import (
    AdaptedModel,
    RowList,
    Rows,
    RowView,
    Vector,
    ghost_products,
    mean_gradient,
    trainable,
)
from duet_ray.selection.hessian import Ekfac

OURS, TO_EMBEDDINGS, AS_TRAINED = "ours", "floor (i): backward to the embeddings", "floor (ii): backward as in training"
LOOP, VMAP, BERGSON, KRONFLUENCE = "loop of gradients", "vmap(grad)", "bergson", "kronfluence"
PEERS = {BERGSON: "bergson", KRONFLUENCE: "kronfluence"}
N_WARM_UP = {"less": 2, "tracin": 2}
"""Epochs, and so checkpoints."""
WHOLE = ("influence ekfac", "influence cg", "influence lissa", "less", "tracin")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model, its rows, and the settings to score them with."""

    name: str
    model: Any
    domain: MemoryDomain
    settings: SelectionConfig
    training: TrainingConfig

    def context(self, **settings: Any) -> SelectionContext:
        return SelectionContext(
            settings=self.settings.model_copy(update=settings),
            training=self.training,
            seed=0,
            load_base=lambda: (self.model, SimpleNamespace(pad_token_id=0, eos_token_id=0)),
        )


class Clock:
    """CPU seconds since the last start."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._started = time.process_time()

    def read(self) -> float:
        return time.process_time() - self._started


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a child process has to say."""

    seconds: float
    mib: float
    scores: list[float] | None = None
    details: dict[str, float] | None = None


def in_child(work: Callable[[], Measured]) -> Measured | str:
    """Run `work` in a process of its own; the reason if it fails, since a peer may."""
    (found,) = run_forked([work])
    return f"failed: {found.reason[:80]}" if isinstance(found, Failure) else found


class Memory:
    """How far the resident set has grown since the start, at its highest."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the heap keeps for later would hide a growth
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self._start = self._status("VmRSS")

    def mib(self) -> float:
        return (self._status("VmHWM") - self._start) / 1024

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))


# Preparation: one adapter and one vector for all scorers.

VECTOR, ADAPTER = "vector.safetensors", "adapter"
DAMPING = "damping per row"


def prepare(case: Case, folder: Path) -> Measured:
    """Fit the model on the rows and leave the adapter and H⁻¹v, by our EK-FAC."""
    with scoring_model(case.context()) as scoring:
        train = case.domain.train
        scoring.trainer.train(train.rows(range(len(train))), seed=0)
        scoring.trainer.save(folder / ADAPTER)
        adapted, clock, memory = scoring.adapted, Clock(), Memory()
        _, gradient = mean_gradient(adapted, case.domain.validation)
        factors = Ekfac.fit(adapted, RowList(hessian_rows(case)), 0)
        damping = case.settings.damping * factors.mean_eigenvalue
        vector = factors.solve(gradient, damping)
        seconds, mib = clock.read(), memory.mib()
        tensors = {name: v.contiguous() for name, v in zip(adapted.names, vector, strict=True)}
        save_file(tensors, folder / VECTOR)
    n_tokens = np.mean([row.loss_mask[1:].sum() for row in hessian_rows(case)])
    return Measured(seconds=seconds, mib=mib, details={DAMPING: damping * float(n_tokens)})


def hessian_rows(case: Case) -> list[Any]:
    return case.domain.train.rows(range(case.settings.n_hessian_rows or len(case.domain.train)))


# Scorers of rows, given the vector.


def ours(adapted: AdaptedModel, vector: Vector) -> peers.Scorer:
    return lambda rows: ghost_products(adapted, rows, vector)


def to_embeddings(adapted: AdaptedModel, vector: Vector) -> peers.Scorer:
    """Floor (i): the loss's gradient at the embeddings, and no weight's."""

    def score(rows: Rows) -> np.ndarray:
        found: list[torch.Tensor] = []
        handle = adapted.model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: found.append(output.requires_grad_(True))
        )
        for _, batch in adapted.batches(rows):
            found.clear()
            torch.autograd.grad(adapted.token_nll(batch).sum(), found)
        handle.remove()
        return np.zeros(len(rows))

    return score


def as_trained(adapted: AdaptedModel, vector: Vector) -> peers.Scorer:
    """Floor (ii): the gradients of the LoRA weights, summed over a batch."""

    def score(rows: Rows) -> np.ndarray:
        with trainable(adapted):
            for _, batch in adapted.batches(rows):
                adapted.token_nll(batch).sum().backward()
        return np.zeros(len(rows))

    return score


SCORERS: dict[str, Callable[[AdaptedModel, Vector], peers.Scorer]] = {
    TO_EMBEDDINGS: to_embeddings,
    AS_TRAINED: as_trained,
    OURS: ours,
    LOOP: peers.loop_of_gradients,
    VMAP: peers.vmap_of_gradients,
    BERGSON: peers.bergson,
}


def score(case: Case, folder: Path, name: str, rows: Rows, damping: float = 0.0) -> Measured:
    """Score rows with the prepared adapter and vector, after two rows to warm up."""
    with scoring_model(case.context()) as scoring:
        scoring.trainer.load(folder / ADAPTER)
        adapted = scoring.adapted
        found = load_file(folder / VECTOR)
        vector = [found[linear] for linear in adapted.names]
        clock = Clock()
        if name == KRONFLUENCE:
            peer = peers.Kronfluence(adapted, folder / KRONFLUENCE, on_rows=clock.start)
            scorer: peers.Scorer = partial(peer.score, validation=case.domain.validation, damping=damping)
        else:
            scorer = SCORERS[name](adapted, vector)
        memory = Memory()
        scorer(RowView(rows, np.arange(2)))
        clock.start()
        scores = scorer(rows)
        return Measured(seconds=clock.read(), mib=memory.mib(), scores=scores.tolist())


def fit_kronfluence(case: Case, folder: Path, damping: float) -> Measured:
    """Its factors, and a query gradient: what our preparation does."""
    with scoring_model(case.context()) as scoring:
        scoring.trainer.load(folder / ADAPTER)
        clock, read = Clock(), []
        peer = peers.Kronfluence(scoring.adapted, folder / KRONFLUENCE, on_rows=lambda: read.append(clock.read()))
        memory = Memory()
        clock.start()
        peer.fit(hessian_rows(case))
        peer.score(RowView(case.domain.train, np.arange(case.settings.batch_size)), case.domain.validation, damping)
        return Measured(seconds=read[0], mib=memory.mib())


def whole_method(case: Case, name: str) -> Measured:
    """A method as a study runs it. `fit` ends with the last step of training, and `prepare` is what follows."""
    method, _, solver = name.partition(" ")
    clock, fitted = Clock(), [0.0]

    def on_progress(stage: str, done: int, total: int) -> None:
        if stage == "fit":
            fitted[0] = clock.read()

    context = case.context(method=method, solver=solver or case.settings.solver, epochs=N_WARM_UP.get(method))
    with tempfile.TemporaryDirectory() as place:
        scoring = Scoring(case.domain, replace(context, on_progress=on_progress), Path(place) / "domain")
        memory = Memory()
        clock.start()
        scoring.prepare()
        prepared = clock.read()
        clock.start()
        for shard in range(scoring.n_shards):
            scoring.measure(shard)
        seconds = clock.read()
        mib = memory.mib()
        details = {"fit": fitted[0], "prepare": prepared - fitted[0]}
        scores = scoring.weigh().scores
    assert scores is not None
    return Measured(seconds=seconds, mib=mib, scores=scores.tolist(), details=details)


# Tables.


def scoring_table(
    case: Case, folder: Path, damping: float, repeats: int, states: dict[str, str]
) -> dict[str, list[Measured]]:
    """Every scorer on the same rows.

    Args:
        states: why a scorer is left out.
    """
    rows = case.domain.train
    names = [*SCORERS, KRONFLUENCE]
    runs: dict[str, list[Measured]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            if name not in states:
                found = in_child(partial(score, case, folder, name, rows, damping))
                if not isinstance(found, str):
                    runs[name].append(found)
                elif name in (TO_EMBEDDINGS, AS_TRAINED, OURS, LOOP):
                    raise SystemExit(f"{name} {found}")
                else:
                    states[name] = found
    print("| scorer | rows / s | time / (i) | time / (ii) | memory, MiB | Spearman with ours |")
    print("|---|---|---|---|---|---|")
    for name in names:
        if name in states:
            print(f"| {name} | {states[name]} | | | | |")
            continue
        of_floors = [_ratio(runs[name], runs[floor]) for floor in (TO_EMBEDDINGS, AS_TRAINED)]
        rate = len(rows) / statistics.median(run.seconds for run in runs[name])
        rank = "" if name in (TO_EMBEDDINGS, AS_TRAINED) else f"{_spearman(runs[name][-1], runs[OURS][-1]):.4f}"
        memory = statistics.median(run.mib for run in runs[name])
        print(f"| {name} | {rate:.1f} | {of_floors[0]:.2f} | {of_floors[1]:.2f} | {memory:.0f} | {rank} |")
    return runs


def verdict(runs: dict[str, list[Measured]], name: str, goal: float) -> str:
    """Ours against a floor, where the goal is a most; or against a peer, where it is a least."""
    if name in (TO_EMBEDDINGS, AS_TRAINED):
        value = _ratio(runs[OURS], runs[name])
        met = "met" if value <= goal else "NOT met"
        return f"Ours takes {value:.2f} × the time of {name} (goal: at most {goal:g}; {met})"
    value = _ratio(runs[name], runs[OURS])
    met = "met" if value >= goal else "NOT met"
    most = _ratio(runs[name], runs[TO_EMBEDDINGS])
    return f"Ours is {value:.2f} × as fast as the {name}, floor (i) {most:.2f} × (goal: at least {goal:g}; {met})"


def _ratio(a: list[Measured], b: list[Measured]) -> float:
    """The median of the ratios of runs that stood side by side."""
    return statistics.median(x.seconds / y.seconds for x, y in zip(a, b, strict=True))


def _spearman(a: Measured, b: Measured) -> float:
    return float(spearmanr(a.scores, b.scores).statistic)


def whole_table(case: Case, methods: Sequence[str], kronfluence: Measured | str) -> None:
    """Every method from the base model to the scores, once."""
    print("| method | fit, s | preparation after it, s | scoring, s | rows / s | memory, MiB | Spearman with ekfac |")
    print("|---|---|---|---|---|---|---|")
    first: Measured | None = None
    for name in methods:
        method = METHODS[name.partition(" ")[0]]
        if find_spec(method.home.partition(":")[0]) is None:
            print(f"| {name} | not there yet | | | | | |", flush=True)
            continue
        found = in_child(partial(whole_method, case, name))
        if isinstance(found, str):
            print(f"| {name} | {found} | | | | | |", flush=True)
            continue
        first = first or found
        assert found.details is not None
        cells = [found.details["fit"], found.details["prepare"], found.seconds, len(case.domain.train) / found.seconds]
        shown = " | ".join(f"{cell:.1f}" for cell in cells)
        print(f"| {name} | {shown} | {found.mib:.0f} | {_spearman(found, first):.4f} |", flush=True)
    if isinstance(kronfluence, str):
        print(f"| kronfluence | {kronfluence} | | | | | |", flush=True)
    else:
        print(f"| kronfluence | as ours | {kronfluence.seconds:.1f} | as above | | {kronfluence.mib:.0f} | as above |")


def memory_line(case: Case, folder: Path) -> None:
    train = case.domain.train
    few = np.arange(max(case.settings.batch_size, len(train) // 4))
    found = [in_child(partial(score, case, folder, OURS, RowView(train, np.tile(few, n)))) for n in (1, 4)]
    shown = [one if isinstance(one, str) else f"{one.mib:.0f} MiB" for one in found]
    print(f"Memory of ours: {shown[0]} for {len(few)} rows, {shown[1]} for these rows four times.")


def stored_line(model: Path | None, n_rows: int) -> None:
    """A second call on the same inputs: the key of the weights, and the weights."""
    config = StudyConfig.model_validate(
        {
            "name": "benchmark",
            "model": {"path": str((model or Path("model")).resolve()), "dtype": "float32"},
            "domains": [{"name": "rows", "source": "rows.jsonl"}],
            "selection": {"method": "influence"},
            "feedback": {"kind": "heldout_loss", "file": "task.jsonl"},
        }
    )
    empty = repeating_rows(0, 10, (8, 8), np.random.default_rng(0))
    domain = MemoryDomain("rows", empty, empty, "0123456789abcdef")
    draws = np.random.default_rng(0)
    weights = RowWeights(scores=draws.normal(size=n_rows), probabilities=draws.dirichlet(np.ones(n_rows)))
    with tempfile.TemporaryDirectory() as folder:
        save_weights(Path(folder), weights_key(domain, config), weights)
        started = time.perf_counter()
        assert load_weights(Path(folder), weights_key(domain, config)) is not None
        seconds = time.perf_counter() - started
    print(f"A second call, {n_rows:,} rows: {seconds:.3f} s to find and read the stored weights; nothing is trained.")


def run(case: Case, repeats: int, goals: Mapping[str, float]) -> None:
    tokens = case.domain.train.n_tokens
    print(f"\n### {case.name}: {len(tokens)} rows of {tokens.min()}–{tokens.max()} tokens, ", end="")
    print(f"batches of {case.settings.batch_size}, rank {case.training.rank}; medians of {repeats}\n", flush=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepared = in_child(partial(prepare, case, folder))
        if isinstance(prepared, str):
            raise SystemExit(prepared)
        assert prepared.details is not None
        damping = prepared.details[DAMPING]
        states = {name: "not installed" for name, package in PEERS.items() if find_spec(package) is None}
        kronfluence = states.get(KRONFLUENCE) or in_child(partial(fit_kronfluence, case, folder, damping))
        if isinstance(kronfluence, str):
            states[KRONFLUENCE] = kronfluence
        runs = scoring_table(case, folder, damping, repeats, states)
        for name, goal in goals.items():
            print("\n" + verdict(runs, name, goal), end="")
        print("\n", flush=True)
        memory_line(case, folder)
        s = case.settings
        print(
            f"\nWhole methods: {len(case.domain.validation)} validation rows, {s.n_hessian_rows} rows for the Hessian, "
            f"{s.cg_iterations} iterations of CG at most, {s.lissa_depth} of LiSSA, 2 checkpoints of LESS and TracIn\n"
        )
        whole_table(case, WHOLE, kronfluence)
    print(f"\n({time.perf_counter() - started:.0f} s in all)", flush=True)


def tiny_case(
    n_rows: int, n_tokens: tuple[int, int], batch_size: int, settings: Mapping[str, int] | None = None
) -> Case:
    draws = np.random.default_rng(0)
    train, validation = (repeating_rows(n, 512, n_tokens, draws) for n in (n_rows, 32))
    return Case(
        name="Tiny Llama (2 layers, hidden 64)",
        model=tiny_llama(512, 0),
        domain=MemoryDomain("rows", train, validation, "tiny"),
        settings=SelectionConfig.model_validate(
            {"method": "influence", "n_hessian_rows": 64, "batch_size": batch_size, **(settings or {})}
        ),
        training=TrainingConfig(rank=16, learning_rate=1e-3, batch_size=16, max_tokens=512),
    )


def real_case(folder: Path, n_rows: int, n_tokens: tuple[int, int], batch_size: int) -> Case:
    transformers.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()
    draws = np.random.default_rng(0)
    train, validation = (repeating_rows(n, 4096, n_tokens, draws) for n in (n_rows, batch_size))
    settings = SelectionConfig(
        method="influence",
        n_hessian_rows=batch_size,
        cg_iterations=5,
        lissa_depth=5,
        batch_size=batch_size,
    )
    return Case(
        name=f"{model.config.model_type}, {model.num_parameters() / 1e6:.0f} million parameters, float32",
        model=model,
        domain=MemoryDomain("rows", train, validation, "real"),
        settings=settings,
        training=TrainingConfig(rank=16, learning_rate=2e-4, batch_size=16, micro_batch_size=8, max_tokens=512),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a real model, e.g. .demo/model; without it, the tiny one")
    parser.add_argument("--rows", type=int, default=24, help="rows for the real model")
    parser.add_argument("--tiny-rows", type=int, default=512, help="rows for the tiny one")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs=2, default=(16, 48), help="of the shortest and the longest row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the tiny model with few rows: does it run?")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("ignore", message=".*performance drop.*")
    print(f"`OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')} python {shlex.join(sys.argv)}`", end=", ")
    print(machine("torch", "transformers", "peft", "kronfluence", "bergson"))
    tokens = (arguments.tokens[0], arguments.tokens[1])
    goals = {TO_EMBEDDINGS: 1.2, AS_TRAINED: 1.2, LOOP: 3.0}
    if arguments.quick:
        few = {"cg_iterations": 3, "lissa_depth": 3, "n_hessian_rows": 16}
        run(tiny_case(64, tokens, arguments.batch_size, few), 1, goals)
    else:
        # A run of the tiny model takes a second: more of them for the same steadiness.
        run(tiny_case(arguments.tiny_rows, tokens, arguments.batch_size), 2 * arguments.repeats + 1, goals)
        if arguments.model is not None:
            case = real_case(arguments.model, arguments.rows, tokens, arguments.batch_size)
            run(case, arguments.repeats, goals | {LOOP: 1.5})
    print()
    stored_line(arguments.model, 200_000)


if __name__ == "__main__":
    main()
