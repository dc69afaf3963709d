"""Millions of short rows in many domains: made on the fly, prepared, opened, drawn from and gathered, for `scale.py`.

Each step that a study takes in a process of its own (prepare in the driver; open, draw and gather in a worker) runs in
one here, so that its memory is its own. Memory is what the process holds for itself (`RssAnon`), sampled ten times a
second; pages of mapped files are not counted, for they are the machine's to take back.
"""

import json
import multiprocessing
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from duet_ray.config import StudyConfig, config_from
from duet_ray.domains import open_domain, prepare_domains
from duet_ray.mixture import draw_mixture, rows_per_domain
from duet_ray.records import Ratio
from duet_ray.selection.base import RowWeights
from duet_ray.selection.weights_cache import load_weights, save_weights

CHUNK = 50_000


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What so many rows cost, from their sources to the tokens of each mixture that they are enough for."""

    n_rows: int
    n_domains: int
    source_bytes: int
    n_tokens: int
    prepare_seconds: float
    prepare_cpu_seconds: float
    base_bytes: int
    """Of the preparing process before it starts: Python, the tokenizer and their libraries."""
    peak_bytes: int
    """The most it holds at any time."""
    cache_bytes: int
    again_seconds: float
    """A second call, which finds the cache."""
    open_seconds: float
    """All domains in a worker."""
    weights_seconds: float
    """All stored weights in a worker."""
    worker_bytes: int
    """That the worker holds for domains and weights."""
    draw_seconds: dict[int, float]
    """Rows of a mixture → seconds to draw it."""
    gather_seconds: dict[int, float]
    """Rows of a mixture → seconds to read its tokens, from files that are in the page cache or not, as it comes."""
    gathered_tokens: dict[int, int]
    all_distinct: bool
    """Whether no mixture held a row twice."""

    @property
    def rows_per_second(self) -> float:
        return self.n_rows / self.prepare_seconds


def write_sources(folder: Path, n_rows: int, n_domains: int) -> int:
    """One jsonl file a domain, of questions of four to ten short words; no two rows are alike. Returns their bytes."""
    folder.mkdir(parents=True)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    total = 0
    for domain, n in enumerate(rows_per_domain(np.full(n_domains, 1 / n_domains), n_rows)):
        generator = np.random.default_rng(domain)
        words = ["".join(generator.choice(letters, size=generator.integers(1, 5))) for _ in range(2000)]
        with (folder / f"d{domain}.jsonl").open("w", encoding="utf-8") as file:
            for first in range(0, int(n), CHUNK):
                size = min(CHUNK, int(n) - first)
                drawn = generator.integers(0, len(words), size=(size, 2)).tolist()
                file.writelines(
                    f'{{"prompt": "{first + i} {words[a]}?", "completion": "{words[b]}"}}\n'
                    for i, (a, b) in enumerate(drawn)
                )
        total += (folder / f"d{domain}.jsonl").stat().st_size
    return total


def measure(folder: Path, n_rows: int, n_domains: int, tokenizer: Path, mixtures: tuple[int, ...]) -> Prepared:
    """Make, prepare and use so many rows under `folder`, which is left empty of them."""
    source_bytes = write_sources(folder / "data", n_rows, n_domains)
    try:
        arguments = (folder, n_domains, tokenizer)
        prepared = _in_a_process(_prepare, *arguments)
        again = _in_a_process(_prepare, *arguments)
        folders = prepared.pop("folders")
        keys = _in_a_process(_save_weights, folder, folders)
        used = _in_a_process(_use, folder, folders, keys, mixtures)
        return Prepared(
            n_rows=n_rows,
            n_domains=n_domains,
            source_bytes=source_bytes,
            again_seconds=again["prepare_seconds"],
            cache_bytes=sum(f.stat().st_size for f in (folder / "studies/cache/domains").rglob("*") if f.is_file()),
            **prepared,
            **used,
        )
    finally:
        for name in ("data", "studies"):
            shutil.rmtree(folder / name, ignore_errors=True)


def _config(folder: Path, n_domains: int) -> StudyConfig:
    domains = [{"name": f"d{i}", "source": f"data/d{i}.jsonl"} for i in range(n_domains)]
    return config_from(
        {
            "name": "scale",
            "model": {"path": "none"},
            "domains": domains,
            "training": {"max_tokens": 64},
            "feedback": {"kind": "function", "function": "none:none", "direction": "minimize"},
            "storage": "studies",
        },
        folder=folder,
    )


def _prepare(folder: Path, n_domains: int, tokenizer_folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer(["warm", "up"])
    config = _config(folder, n_domains)
    base = _own_bytes()
    with _peak() as peak:
        started, cpu = time.perf_counter(), time.process_time()
        domains = prepare_domains(config, tokenizer)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {
        "prepare_seconds": seconds,
        "prepare_cpu_seconds": cpu,
        "base_bytes": base,
        "peak_bytes": peak(),
        "n_tokens": sum(domain.report.n_tokens for domain in domains),
        "folders": [domain.folder for domain in domains],
    }


def _save_weights(folder: Path, folders: list[Path]) -> list[str]:
    """Weights of a heavy tail for every row, stored as selection stores them."""
    keys = []
    for index, place in enumerate(folders):
        scores = np.random.default_rng(index).exponential(size=len(open_domain(place).train))
        keys.append(f"{place.name}-shift")
        weights = RowWeights(scores=scores, probabilities=scores / scores.sum())
        save_weights(folder / "studies/cache", keys[-1], weights)
    return keys


def _use(folder: Path, folders: list[Path], keys: list[str], mixtures: tuple[int, ...]) -> dict[str, Any]:
    base, started = _own_bytes(), time.perf_counter()
    domains = [open_domain(place, index=index) for index, place in enumerate(folders)]
    opened = time.perf_counter()
    weights = [_probabilities(folder / "studies/cache", key) for key in keys]
    held = time.perf_counter()
    result: dict[str, Any] = {
        "open_seconds": opened - started,
        "weights_seconds": held - opened,
        "worker_bytes": _own_bytes() - base,
        "draw_seconds": {},
        "gather_seconds": {},
        "gathered_tokens": {},
        "all_distinct": True,
    }
    for sample, n_rows in enumerate(n for n in mixtures if n <= sum(len(domain.train) for domain in domains)):
        share = np.array([len(domain.train) for domain in domains], dtype=float)
        ratio = Ratio(counts=tuple(rows_per_domain(share / share.sum(), n_rows).tolist()))
        domains[0].train.row(0)  # What Arrow loads once.
        began = time.perf_counter()
        mixture = draw_mixture(ratio, weights, seed=0, trial=0, sample=sample)
        drawn = time.perf_counter()
        rows = [row for domain, ids in zip(domains, mixture.rows, strict=True) for row in domain.train.rows(ids)]
        gathered = time.perf_counter()
        assert len(rows) == n_rows
        result["draw_seconds"][n_rows] = drawn - began
        result["gather_seconds"][n_rows] = gathered - drawn
        result["gathered_tokens"][n_rows] = sum(map(len, rows))
        result["all_distinct"] &= all(len(np.unique(ids)) == len(ids) for ids in mixture.rows)
    return result


def _probabilities(folder: Path, key: str) -> np.ndarray:
    """What a worker keeps of a domain's stored weights."""
    loaded = load_weights(folder, key)
    assert loaded is not None
    assert loaded.probabilities is not None
    return loaded.probabilities


def _in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh Python."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def _own_bytes() -> int:
    """What this process holds for itself: memory that no file stands behind."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return int(psutil.Process().memory_full_info().uss)


@contextmanager
def _peak() -> Iterator[Callable[[], int]]:
    """Sample the process's own memory; the function that it gives says the highest."""
    most, finished = _own_bytes(), threading.Event()

    def sample() -> None:
        nonlocal most
        while not finished.wait(0.1):
            most = max(most, _own_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: most
    finally:
        finished.set()
        thread.join()
        most = max(most, _own_bytes())


def to_json(prepared: Prepared) -> str:
    return json.dumps({name: getattr(prepared, name) for name in prepared.__dataclass_fields__})
