"""What does a trial cost beside its training and its evaluation, on this fleet and with one Ray Train run per sample?

    OMP_NUM_THREADS=1 python benchmarks/overhead.py
    OMP_NUM_THREADS=1 python benchmarks/overhead.py --trials 20 --peers 5

One toy study (a tiny Llama, three domains of letters, k = 1, one group) runs on a local Ray as `duet run` runs it. The
peer trains the same samples with the same function on the same Ray, the usual way: a `TorchTrainer.fit()` each, which
starts a worker, loads the base, trains, measures and ends.

Overhead of a trial on the fleet: the time from the end of the sample before to the end of its own, less its training
and feedback. That is all in between: the observation told, the next ratio proposed, Tune's turn, the lease, the files.
The first trial of the search, which waits for Tune to start, and the first proposal by the Gaussian process, which
imports Ax and BoTorch, are one-time costs, said apart. Overhead of the peer: a `fit()` less the same two.

Goals: ten times less than the peer's, and less than 2 % of a sample of one minute, 1.2 s.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from memory import write_tiny

from duet_ray.config import StudyConfig, load_config
from duet_ray.execution.broker import InFlight
from duet_ray.execution.ray_session import ray_session
from duet_ray.execution.worker import Assignment
from duet_ray.preflight import preflight
from duet_ray.search import start_design
from duet_ray.study import Study

WORDS = {"apples": "aaab", "bricks": "zzyy", "clouds": "qqqp"}
GOAL_SECONDS, GOAL_RATIO = 1.2, 10.0


def write_study(folder: Path, name: str, n_start: int, n_bayesian: int, n_rows: int) -> Path:
    """Model, data and study file."""
    write_tiny(folder / "model")
    files = [*((f"{domain}.jsonl", word, 80, 0) for domain, word in WORDS.items()), ("task.jsonl", "aaab", 16, 1000)]
    for file, word, n, first in files:
        rows = ({"prompt": f"say {i}:", "completion": word * 2} for i in range(first, first + n))
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {
        "name": name,
        "model": {"path": "model", "dtype": "float32"},
        "domains": [{"name": domain, "source": f"{domain}.jsonl"} for domain in WORDS],
        "mixture": {"n_rows": n_rows},
        "search": {"n_start": n_start, "n_trials": n_bayesian},
        "training": {"rank": 4, "learning_rate": 1e-2, "batch_size": 8, "max_tokens": 32},
        "feedback": {"kind": "heldout_loss", "file": "task.jsonl"},
        "confirm": {"finalists": 0},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


class PhaseTimes:
    """Notes when the parts of a run begin."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}

    def phase(self, text: str) -> None:
        self.began[text] = time.time()

    def tick(self, in_flight: Sequence[InFlight]) -> None:
        pass

    def scored(self, domain: str, n_done: int, n_rows: int) -> None:
        pass

    def changed(self) -> None:
        pass


def fleet_overheads(config: StudyConfig) -> tuple[list[float], list[float], dict[str, float]]:
    """Run the study.

    Returns:
        (overhead of every trial in order, the first one's with Tune's start; seconds of training and feedback of every
        trial; one-time seconds by name).
    """
    watcher = PhaseTimes()
    Study(config).run(watcher)
    ended, busy = [], []
    for file in sorted(config.study_folder.glob("artifacts/*/*/result.json"), key=lambda f: f.stat().st_mtime):
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["spec"]["kind"] in ("start", "search"):
            ended.append(file.stat().st_mtime)
            busy.append(result["train_seconds"] + result["feedback_seconds"])
    began = watcher.began["searching"]
    overheads = [end - before - own for before, end, own in zip([began, *ended], ended, busy, strict=False)]
    ready = next(t for text, t in watcher.began.items() if text.startswith("measuring the untouched"))
    return overheads, busy, {"the fleet and the base's measurement": began - min(ready, began)}


def peer_loop(settings: dict[str, Any]) -> None:
    """One sample from start to end: the `train_loop_per_worker` of the peer."""
    import torch
    from ray import train

    from duet_ray.execution.worker import Worker
    from duet_ray.records import Ratio, SampleSpec

    torch.set_num_threads(1)
    worker = Worker(Assignment(**settings["assignment"]))
    worker.preload()
    ratio = Ratio(counts=tuple(settings["counts"]))
    spec = SampleSpec(trial=settings["trial"], sample=0, kind="start", ratio=ratio)
    result = worker.do_sample(spec, 0, lambda *_: None)
    Path(settings["out"]).write_text(json.dumps(result.to_json()), encoding="utf-8")
    train.report({"value": result.value})


def peer_overheads(config: StudyConfig, n_samples: int, scratch: Path) -> tuple[list[float], list[float]]:
    """Train so many samples with a Ray Train run each: their overheads, and the seconds of training and feedback."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    study = Study(config)
    ready = preflight(config)
    assignment = asdict(study._assignment(ready))
    overheads, busy = [], []
    for trial, ratio in enumerate(start_design(ready.space, n_samples, config.seed, vertices=False)):
        out = scratch / f"peer-{trial}.json"
        settings = {"assignment": assignment, "counts": list(ratio.counts), "trial": trial, "out": str(out)}
        started = time.perf_counter()
        TorchTrainer(
            peer_loop,
            train_loop_config=settings,
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(name=f"peer-{trial}", storage_path=str(scratch)),
        ).fit()
        seconds = time.perf_counter() - started
        result = json.loads(out.read_text(encoding="utf-8"))
        busy.append(result["train_seconds"] + result["feedback_seconds"])
        overheads.append(seconds - busy[-1])
    return overheads, busy


def row(name: str, overheads: Sequence[float], busy: Sequence[float]) -> str:
    mean, median = statistics.mean(overheads), statistics.median(overheads)
    worst = max(overheads)
    return f"| {name} | {len(overheads)} | {mean:.2f} | {median:.2f} | {worst:.2f} | {statistics.mean(busy):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=int, default=6, help="trials of the start design")
    parser.add_argument("--bayesian", type=int, default=8, help="trials that a Gaussian process proposes")
    parser.add_argument("--peers", type=int, default=4, help="samples of the peer")
    parser.add_argument("--rows", type=int, default=48, help="rows of a mixture")
    asked = parser.parse_args()

    names = ("ray", "torch", "ax-platform", "botorch", "transformers", "peft")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()};", end=" ")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names), f"({time.strftime('%Y-%m-%d')})")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = asked.start, asked.bayesian, asked.rows
        ours, theirs = (load_config(write_study(folder, name, *sizes)) for name in ("fleet", "peer"))
        began = time.perf_counter()
        with ray_session(ours):
            started = time.perf_counter() - began
            overheads, busy, once = fleet_overheads(ours)
            peer, peer_busy = peer_overheads(theirs, asked.peers, folder / "peers")
    # Trial 0 waits for Tune; the first Bayesian one, for imports.
    first, imports = overheads[0], overheads[asked.start]
    start_design_, bayesian = overheads[1 : asked.start], overheads[asked.start + 1 :]
    steady = [*start_design_, *bayesian]
    print("\nseconds beside training and feedback:\n")
    print("| | trials | mean | median | worst | training and feedback |")
    print("|---|---|---|---|---|---|")
    print(row("fleet, start design", start_design_, busy[1 : asked.start]))
    print(row("fleet, Bayesian", bayesian, busy[asked.start + 1 :]))
    print(row("fleet, both", steady, [*busy[1 : asked.start], *busy[asked.start + 1 :]]))
    print(row("one `TorchTrainer.fit()` per sample", peer, peer_busy))
    print(f"\nonce a study: Ray {started:.1f} s, ", end="")
    print(", ".join(f"{what} {seconds:.1f} s" for what, seconds in once.items()), end="")
    print(
        f", Tune's start (in the first trial) {first:.1f} s, the first Bayesian proposal with imports {imports:.1f} s"
    )
    ours_mean, ratio = statistics.mean(steady), statistics.mean(peer) / statistics.mean(steady)
    for what, is_met in (
        (f"{ratio:.0f} times less than the peer (goal {GOAL_RATIO:g})", ratio >= GOAL_RATIO),
        (f"{100 * ours_mean / 60:.2f} % of a sample of one minute (goal 2 %)", ours_mean <= GOAL_SECONDS),
    ):
        print(f"{what}: {'met' if is_met else 'missed'}")
    print("all, in order: " + " ".join(f"{seconds:.2f}" for seconds in overheads))


if __name__ == "__main__":
    main()
