"""How far do the broker, the store and the data reach, and where do they bend?

    OMP_NUM_THREADS=1 python benchmarks/scale.py
    OMP_NUM_THREADS=1 python benchmarks/scale.py --parts data --rows 100000 1000000 10000000

- `broker`: a whole study on a simulated clock, the real `Broker` and everybody who calls it: how many calls, how long
  each takes in the broker's own Python, whether every sample is leased and done once (`scale_broker.py`).
- `ray`: the broker as an actor of a local Ray, asked as fast as clients can: CPU seconds a call; what the processes
  that Ray starts for a group and for a trial weigh (`scale_ray.py`).
- `store`: a store of so many samples and what the driver asks of it for every trial (`scale_store.py`).
- `data`: rows made on the fly: preparing, opening, drawing, gathering (`scale_data.py`). `--tokenizer` names a model's
  folder; without it a tokenizer of one token a character. 10,000,000 rows need 6 GB of disk and half an hour.

Only sizes are simulated: the broker, the searcher, the store and the domains are the package's own.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from scale_broker import Pace, Simulated, Simulation, broker_bytes
from scale_data import Prepared, measure
from scale_ray import Served, broker_memory, local_ray, process_memory, served
from scale_store import Grown, grow

GIB, MIB, KIB = 2**30, 2**20, 2**10
PARTS = ("broker", "ray", "store", "data")
CALLS = ("beat", "progress", "outcomes", "lease", "pulse")


def gentle(n_groups: int) -> Pace:
    """A pace that would keep all groups together at about 1,000 calls a second, however many there are."""
    return Pace(
        beat_seconds=max(1.0, n_groups / 500),
        progress_seconds=max(0.5, n_groups / 250),
        poll_seconds=max(1.0, n_groups / 500),
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def broker_table(done: Sequence[tuple[str, Simulated]]) -> str:
    head = ["pace", "groups", "samples", "deaths", "study, s", "calls a sample", "calls a second",
            *(f"`{name}` a second" for name in CALLS), "µs a lease", "ms a pulse (worst)", "KiB a pulse",
            "busy in its own Python"]  # fmt: skip
    rows = [
        [
            pace,
            f"{one.n_groups:,}",
            f"{one.n_samples:,}",
            f"{one.n_deaths}",
            f"{one.seconds:.0f}",
            f"{one.calls_per_sample:.0f}",
            f"{one.calls_per_second:,.0f}",
            *(f"{one.calls[name] / one.seconds:,.0f}" for name in CALLS),
            f"{one.mean_microseconds('lease'):.1f}",
            f"{one.mean_microseconds('pulse') / 1000:.2f} ({1000 * one.slowest['pulse']:.1f})",
            f"{one.pulse_bytes / KIB:.0f}",
            f"{100 * one.load:.2f} %",
        ]
        for pace, one in done
    ]
    return table(head, rows)


def once(one: Simulated) -> str:
    """Whether every sample was leased and done as often as it should be."""
    leases = one.n_leases.total()
    is_right = len(one.n_done) == one.n_samples == one.n_done.total() and leases <= one.n_samples + one.n_deaths
    return f"{leases:,} leases for {one.n_samples:,} samples: {'right' if is_right else 'WRONG'}"


def served_table(results: Sequence[tuple[int, Served]]) -> str:
    head = [
        "call",
        "groups at work",
        "calls a second, here",
        "CPU µs of the broker",
        "one core would serve",
        "ms alone",
    ]
    rows = [
        [
            f"`{one.name}`",
            f"{n_groups:,}",
            f"{one.calls_per_second:,.0f}",
            f"{one.broker_microseconds:,.0f}",
            f"{1e6 / one.broker_microseconds:,.0f} a second",
            f"{one.answer_milliseconds:.1f}",
        ]
        for n_groups, one in results
    ]
    return table(head, rows)


def store_table(grown: Sequence[Grown]) -> str:
    head = ["samples", "file, MiB", "one sample, ms", "read all, ms", "times a trial", "suggest, ms", "complete, ms",
            "tidy (twice), ms", "**driver a trial, ms**", "summary, ms", "all in memory, MiB",
            "process, MiB"]  # fmt: skip
    rows = [
        [
            f"{one.n_samples:,}",
            f"{one.file_bytes / MIB:.1f}",
            *(f"{1000 * seconds:.1f}" for seconds in (one.sample_seconds, one.read_seconds)),
            f"{one.n_reads:.0f}",
            *(f"{1000 * seconds:.0f}" for seconds in (one.suggest_seconds, one.complete_seconds)),
            f"{1000 * one.tidy_seconds:.0f}",
            f"{1000 * one.trial_seconds:.0f}",
            f"{1000 * one.summary_seconds:.0f}",
            f"{one.trials_bytes / MIB:.1f}",
            f"{one.rss_bytes / MIB:.0f}",
        ]
        for one in grown
    ]
    return table(head, rows)


def data_table(results: Sequence[Prepared]) -> str:
    head = ["", *(f"{one.n_rows:,} rows" for one in results)]

    rows = [
        _line("sources, GiB", [f"{one.source_bytes / GIB:.3f}" for one in results]),
        _line("tokens a row", [f"{one.n_tokens / one.n_rows:.1f}" for one in results]),
        _line("prepare, s (CPU s)", [f"{r.prepare_seconds:.0f} ({r.prepare_cpu_seconds:.0f})" for r in results]),
        _line("rows a CPU second", [f"{r.n_rows / r.prepare_cpu_seconds:,.0f}" for r in results]),
        _line("memory before, MiB", [f"{one.base_bytes / MIB:.0f}" for one in results]),
        _line("highest above that, MiB", [f"{(one.peak_bytes - one.base_bytes) / MIB:.0f}" for one in results]),
        _line("cache, GiB", [f"{one.cache_bytes / GIB:.3f}" for one in results]),
        _line("bytes a row in the cache", [f"{one.cache_bytes / one.n_rows:.0f}" for one in results]),
        _line("prepare again (cached), s", [f"{one.again_seconds:.2f}" for one in results]),
        _line("open all in a worker, s", [f"{one.open_seconds:.3f}" for one in results]),
        _line("read stored weights, s", [f"{one.weights_seconds:.3f}" for one in results]),
        _line("worker holds for both, MiB", [f"{one.worker_bytes / MIB:.1f}" for one in results]),
    ]
    for n_rows in sorted({n for one in results for n in one.draw_seconds}):
        drawn, gathered = [r.draw_seconds.get(n_rows) for r in results], [r.gather_seconds.get(n_rows) for r in results]
        rows.append(_line(f"draw {n_rows:,} rows, s", [_seconds(one) for one in drawn]))
        rows.append(_line("gather their tokens, s", [_seconds(one) for one in gathered]))
    return table(head, rows)


def _seconds(found: float | None) -> str:
    return "" if found is None else f"{found:.3f}"


def _line(name: str, texts: Sequence[str]) -> list[str]:
    return [name, *texts]


def versions() -> str:
    names = ("ray", "sqlalchemy", "numpy", "pyarrow", "tokenizers", "transformers")
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{machine}; {found} ({time.strftime('%Y-%m-%d')})"


def run_broker(sizes: Sequence[tuple[int, int]], k: int, seconds: float) -> None:
    done = []
    for n_groups, n_samples in sizes:
        whole, largest = (n_groups, n_samples), max(sizes)
        cases: list[tuple[str, Pace | None, int]] = [("as it is", None, 0)]
        if whole == largest:
            cases += [("as it is", None, n_samples // 100), ("gentle", gentle(n_groups), 0)]
        for name, pace, n_deaths in cases:
            one = Simulation(n_groups, n_samples // k, k, seconds=seconds, n_deaths=n_deaths, pace=pace).run()
            print(f"- {n_groups:,} groups, {name}, {one.n_deaths} deaths: {once(one)}", flush=True)
            done.append((name, one))
    print(f"\nA study of samples of {seconds:g} s, k = {k}, 50 domains:\n\n{broker_table(done)}")
    sizes_in_memory = [100, 1000, 10_000] if max(n for _, n in sizes) >= 10_000 else [max(n for _, n in sizes)]
    held = ", ".join(f"{n:,} samples {broker_bytes(n) / MIB:.1f} MiB" for n in sizes_in_memory)
    print(f"The broker holds in memory after {held}.\n", flush=True)


def run_ray(groups: Sequence[int], n_samples: int) -> None:
    with local_ray():
        results = [(n, one) for n in groups for one in served(n)]
        print(f"\n{served_table(results)}", flush=True)
        before, after = broker_memory(n_samples)
        print(f"The broker's process: {before:.0f} MiB, after {n_samples:,} samples {after:.0f} MiB.")
        found = process_memory()
        print(
            "MiB of each process: " + ", ".join(f"{name} {mib:.0f}" for name, mib in found.items()) + ".\n", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--groups", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--samples", nargs="+", type=int, default=[100, 1000, 10_000], help="as many as --groups")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60.0, help="that a simulated sample takes")
    parser.add_argument("--rows", nargs="+", type=int, default=[100_000, 1_000_000])
    parser.add_argument("--domains", type=int, default=50)
    parser.add_argument("--mixtures", nargs="+", type=int, default=[10_000, 100_000])
    parser.add_argument("--tokenizer", type=Path, help="a model's folder")
    parser.add_argument("--scratch", type=Path, help="where temporary files go")
    asked = parser.parse_args()
    if len(asked.groups) != len(asked.samples):
        parser.error("--groups and --samples: as many of the one as of the other")
    print(versions())
    with tempfile.TemporaryDirectory(dir=asked.scratch) as name:
        folder = Path(name)
        if "broker" in asked.parts:
            print("\n## Broker, simulated\n", flush=True)
            run_broker(list(zip(asked.groups, asked.samples, strict=True)), asked.k, asked.seconds)
        if "ray" in asked.parts:
            print("\n## Broker, on Ray", flush=True)
            run_ray(asked.groups, max(asked.samples) // 10)
        if "store" in asked.parts:
            print("\n## Store\n", flush=True)
            print(store_table(grow(folder, asked.samples, k=asked.k)), flush=True)
        if "data" in asked.parts:
            print(f"\n## Data, {asked.domains} domains\n", flush=True)
            tokenizer = asked.tokenizer or _character_tokenizer(folder / "tokenizer")
            results = []
            for n_rows in asked.rows:
                results.append(measure(folder / "rows", n_rows, asked.domains, tokenizer, tuple(asked.mixtures)))
                print(f"- {n_rows:,}: {results[-1]}", file=sys.stderr, flush=True)
            print(data_table(results))


def _character_tokenizer(folder: Path) -> Path:
    """One token a character, as the tests have it."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokens = [*special.values(), "\n", *map(chr, range(32, 127))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
