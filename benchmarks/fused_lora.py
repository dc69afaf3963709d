"""What is gained by training k samples' adapters in one pass over one base, in time and in memory?

    OMP_NUM_THREADS=1 python benchmarks/fused_lora.py
    OMP_NUM_THREADS=1 python benchmarks/fused_lora.py --model .demo/model --rows 16 --k 1 2 4
    python benchmarks/fused_lora.py --shape 1b --rows 32 --tokens 64 256 --micro-batch-size 8

For every k: `train_fused` with k samples, `LoraTrainer` with one after the other in one process, and k processes with a
base each, of which as many run at once as the machine has cores (`--processes`; on a GPU all k). A run is a process of
its own, or several, forked from one that holds no model; each loads the base and trains a short sample that is not
counted; then all start at once. Time is from then to the last adapter written; tokens are counted without padding. On
a GPU, whose memory can be emptied between runs, one process does all of the first two contenders' runs.

Memory is the highest of the run, above that of a process without the model: `torch.cuda`'s of allocated tensors on a
GPU (the CUDA context of each process is not in it), else the resident set, summed over processes. Beside it what it
should be: base + k (adapter + activations), where base and adapter (weights, gradients, two moments) are counted from
the sizes of their tensors, and the activations of one sample are what is left of the run with the smallest k.

The two rates: tokens per second are what one waits for, on a machine that does nothing else; tokens per CPU second do
not depend on what else it does, and are the ones to compare where it is shared.

Linux only. Rows are made up, since their content is no matter of speed; the last column shows that the fused samples
learned what the separate ones did.
"""

import argparse
import csv
import ctypes
import gc
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from memory import SHAPES, made_up
from small_domain import machine, repeating_rows, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from duet_ray.config import TrainingConfig
from duet_ray.records import TokenRow
from duet_ray.training import TrainReport
from duet_ray.training.fused_lora import FusedSample, train_fused
from duet_ray.training.lora import LoraTrainer

FUSED, SEQUENTIAL, PROCESSES = "fused", "one after the other", "processes"
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=0)
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Case:
    """The model, the samples and how they are trained."""

    model: str | None
    shape: str | None
    dtype: str
    training: TrainingConfig
    n_rows: int
    n_tokens: tuple[int, int]
    device: str
    threads: int

    def load(self) -> Any:
        if self.shape is not None:
            model: Any = made_up(SHAPES[self.shape], self.dtype, self.device)
        elif self.model is None:
            model = tiny_llama(self.vocab_size, seed=0).to(getattr(torch, self.dtype))
        else:
            model = AutoModelForCausalLM.from_pretrained(self.model, dtype=getattr(torch, self.dtype))
        return model.to(self.device).requires_grad_(False).eval()

    @property
    def vocab_size(self) -> int:
        if self.shape is not None:
            return int(SHAPES[self.shape]["vocab_size"])
        return 512 if self.model is None else int(AutoConfig.from_pretrained(self.model).vocab_size)

    def rows(self, index: int) -> Sequence[TokenRow]:
        return repeating_rows(self.n_rows, self.vocab_size, self.n_tokens, np.random.default_rng(index)).items


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What a process says once it has loaded the base."""

    base_mib: float
    adapter_mib: float


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a process has done since it was last asked."""

    cpu_seconds: float
    peak_mib: float
    reports: list[TrainReport]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One contender's run with k samples."""

    k: int
    contender: str
    n_at_once: int
    seconds: float
    cpu_seconds: float
    peak_mib: float
    n_tokens: int
    losses: list[float]


class Memory:
    """How far this process's memory has grown since it held no model, at its highest since the last start."""

    def __init__(self, device: str) -> None:
        self._is_gpu = device == "cuda"
        self._before = 0 if self._is_gpu else self._trimmed()

    def start(self) -> None:
        if self._is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._trimmed()
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark

    def mib(self) -> float:
        if self._is_gpu:
            return torch.cuda.max_memory_allocated() / MIB
        return (self._status("VmHWM") - self._before) / 1024

    def _trimmed(self) -> int:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the heap keeps for later would hide a growth
        return self._status("VmRSS")

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))


def serve(connection: Connection, case: Case, folder: Path) -> None:
    """Load the base, then train what is asked for, together or one by one, until told to end."""
    torch.set_num_threads(case.threads)
    quiet()
    other = tiny_llama(64, seed=1)
    warm_up = TrainingConfig(method="lora", rank=2, batch_size=2)
    LoraTrainer(other, TOKENIZER, warm_up).train(repeating_rows(2, 64, (8, 8), np.random.default_rng(0)).items, seed=0)
    del other
    memory = Memory(case.device)
    model = case.load()
    base = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    trainer = LoraTrainer(model, TOKENIZER, case.training)
    trainer.train(case.rows(10**6)[:2], seed=0)
    adapter = 4 * sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    trainer.reset()
    connection.send(Ready(base_mib=base / MIB, adapter_mib=adapter / MIB))
    while (job := connection.recv()) is not None:
        is_fused, indices = job
        rows = {index: case.rows(index) for index in indices}
        with tempfile.TemporaryDirectory(dir=folder) as place:
            memory.start()
            cpu = time.process_time()
            if is_fused:
                samples = [FusedSample(rows=rows[i], seed=i, folder=Path(place) / str(i)) for i in indices]
                reports = train_fused(model, TOKENIZER, case.training, samples)
            else:
                reports = []
                for index in indices:
                    reports.append(trainer.train(rows[index], seed=index))
                    trainer.save(Path(place) / str(index))
                trainer.reset()
            if case.device == "cuda":
                torch.cuda.synchronize()
            failed = [r for r in reports if not isinstance(r, TrainReport)]
            if failed:
                raise failed[0]
            connection.send(Done(cpu_seconds=time.process_time() - cpu, peak_mib=memory.mib(), reports=reports))


@contextmanager
def processes(case: Case, n: int) -> Iterator[tuple[list[Connection], Ready]]:
    """`n` processes that wait for jobs, and what the first says of the base."""
    context = multiprocessing.get_context("fork")
    ours, workers = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(n):
            one, other = context.Pipe()
            process = context.Process(target=serve, args=(other, case, Path(folder)), daemon=True)
            process.start()
            other.close()
            ours.append(one)
            workers.append(process)
        (ready, *_) = [connection.recv() for connection in ours]
        yield ours, ready
        for connection, process in zip(ours, workers, strict=True):
            connection.send(None)
            process.join()


def run(k: int, contender: str, ours: Sequence[Connection]) -> Run:
    """One measurement, in waiting processes."""
    jobs = [(False, [i]) for i in range(k)] if contender == PROCESSES else [(contender == FUSED, list(range(k)))]
    started = time.perf_counter()
    done: dict[Connection, list[Done]] = {connection: [] for connection in ours}
    busy = []
    for connection in ours:
        connection.send(jobs.pop(0))
        busy.append(connection)
    while busy:
        for connection in wait(busy):
            assert isinstance(connection, Connection)
            done[connection].append(connection.recv())
            if jobs:
                connection.send(jobs.pop(0))
            else:
                busy.remove(connection)
    seconds = time.perf_counter() - started
    reports = [report for several in done.values() for one in several for report in one.reports]
    return Run(
        k=k,
        contender=contender,
        n_at_once=len(ours),
        seconds=seconds,
        cpu_seconds=sum(one.cpu_seconds for several in done.values() for one in several),
        peak_mib=sum(max(one.peak_mib for one in several) for several in done.values()),
        n_tokens=sum(report.n_tokens for report in reports),
        losses=sorted(report.last_loss for report in reports),
    )


def table(runs: Sequence[Run], ready: Ready) -> list[dict[str, Any]]:
    """One line for every k and contender: medians over the repeats."""
    first = min(r.k for r in runs)
    of_first = [r.peak_mib for r in runs if r.contender == FUSED and r.k == first]
    activations = statistics.median(of_first) / first - ready.base_mib / first - ready.adapter_mib
    lines = []
    for k in sorted({r.k for r in runs}):
        rates, of_cpu = {}, {}
        for contender in (FUSED, SEQUENTIAL, PROCESSES):
            own = [r for r in runs if r.k == k and r.contender == contender]
            if not own:
                continue
            rates[contender] = statistics.median(r.n_tokens / r.seconds for r in own)
            of_cpu[contender] = statistics.median(r.n_tokens / r.cpu_seconds for r in own)
            n_bases = own[0].n_at_once
            n_adapters = k if contender == FUSED else n_bases
            expected = n_bases * ready.base_mib + n_adapters * (ready.adapter_mib + activations)
            peak = statistics.median(r.peak_mib for r in own)
            line: dict[str, Any] = {
                "k": k,
                "contender": contender + (f", {own[0].n_at_once} at once" if contender == PROCESSES else ""),
                "tokens / s": round(rates[contender], 1),
                "fused / this": f"{rates[FUSED] / rates[contender]:.2f}",
                "tokens / CPU s": round(of_cpu[contender], 1),
                "fused / this, CPU s": f"{of_cpu[FUSED] / of_cpu[contender]:.2f}",
                "memory, MiB": round(peak),
                "base + k (adapter + activations), MiB": round(expected),
                "measured / that": f"{peak / expected:.2f}",
                "largest difference of last losses": "",
            }
            if contender == FUSED:
                apart = [r for r in runs if r.k == k and r.contender == SEQUENTIAL]
                if apart:
                    pairs = zip(own[0].losses, apart[0].losses, strict=True)
                    line["largest difference of last losses"] = f"{max(abs(a - b) / b for a, b in pairs):.1e}"
            lines.append(line)
    return lines


def device_of_a_child() -> str:
    """Whether there is a GPU: asked in a fork, since a process that has asked for CUDA cannot be forked."""
    context = multiprocessing.get_context("fork")
    one, other = context.Pipe()
    process = context.Process(target=lambda: other.send("cuda" if torch.cuda.is_available() else "cpu"))
    process.start()
    found = str(one.recv())
    process.join()
    return found


def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="a model folder; a Llama of two layers, hidden width 64, if not given")
    parser.add_argument("--shape", choices=SHAPES, help="random weights in the shape of a well-known model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU, else float32")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rows", type=int, default=256, help="of every sample")
    parser.add_argument("--tokens", type=int, nargs=2, default=(16, 48), help="shortest and longest row")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--processes", type=int, help="at once; all of them on a GPU, else as many as cores")
    parser.add_argument("--contenders", nargs="+", default=[FUSED, SEQUENTIAL, PROCESSES], metavar="NAME")
    parser.add_argument("--csv", type=Path, help="write every single run there")
    args = parser.parse_args()
    quiet()
    device = device_of_a_child()
    case = Case(
        model=args.model,
        shape=args.shape,
        dtype=args.dtype or ("bfloat16" if device == "cuda" else "float32"),
        training=TrainingConfig(
            method="lora",
            rank=args.rank,
            dropout=args.dropout,
            batch_size=args.batch_size,
            micro_batch_size=args.micro_batch_size,
            gradient_checkpointing=args.gradient_checkpointing,
            learning_rate=1e-3,
        ),
        n_rows=args.rows,
        n_tokens=tuple(args.tokens),
        device=device,
        threads=args.threads,
    )
    n_at_once = args.processes or (max(args.k) if device == "cuda" else len(os.sched_getaffinity(0)))
    print(f"`python {shlex.join(sys.argv)}`, {machine('torch', 'transformers', 'peft')}; on the {device.upper()},")
    threads = "one thread" if args.threads == 1 else f"{args.threads} threads"
    print(f"{case.dtype}, {threads} a process, medians of {args.repeats}.\n", flush=True)
    runs: list[Run] = []
    with ExitStack() as stack:
        kept = stack.enter_context(processes(case, 1)) if device == "cuda" else None
        for _ in range(args.repeats):
            for k in args.k:
                for contender in args.contenders:
                    if contender == PROCESSES or kept is None:
                        n = min(k, n_at_once) if contender == PROCESSES else 1
                        with processes(case, n) as (ours, ready):
                            found = run(k, contender, ours)
                    else:
                        ours, ready = kept
                        found = run(k, contender, ours)
                    runs.append(found)
                    shown = f"{found.n_tokens / found.seconds:.1f} tokens / s, {found.peak_mib:.0f} MiB"
                    print(f"k = {k}, {contender}: {shown}", file=sys.stderr, flush=True)
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(runs[0])))
            writer.writeheader()
            writer.writerows(asdict(r) for r in runs)
    print(f"Base {ready.base_mib:.1f} MiB, an adapter with gradients and moments {ready.adapter_mib:.1f} MiB.\n")
    lines = table(runs, ready)
    print("| " + " | ".join(lines[0]) + " |")
    print("|" + "---|" * len(lines[0]))
    for line in lines:
        print("| " + " | ".join(str(value) for value in line.values()) + " |")


if __name__ == "__main__":
    main()
