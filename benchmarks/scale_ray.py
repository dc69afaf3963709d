"""The broker as a Ray actor under load, and what Ray's own processes weigh, for `scale.py`.

How many calls a second one actor serves is measured with client processes that ask as fast as they can. Client and
broker share the machine here, so what the broker itself is busy for (the CPU time of its process, Ray's share
included) is the number to go by: its inverse is what a broker with a core of its own could serve.
"""

import io
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from scale_broker import simulated_trial

from duet_ray.execution.broker import Broker, start_broker
from duet_ray.execution.trial import TrialPlan, as_config, run_in_tune, sample_tasks
from duet_ray.records import Direction

NAMESPACE = "scale"
MIB = 2**20


@contextmanager
def local_ray() -> Iterator[None]:
    """A local Ray on loopback, of this process alone."""
    import ray

    here = str(Path(__file__).parent)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        namespace=NAMESPACE,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([here, *sys.path])}},
    )
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True, kw_only=True)
class Served:
    """One kind of call, asked for as fast as the clients can."""

    name: str
    calls_per_second: float
    broker_microseconds: float
    """CPU time of the broker's process for one call, serialisation and Ray's share included."""
    answer_milliseconds: float
    """From question to answer when nobody else asks, median."""


class _Client:
    """A process that asks, many questions under way at a time, as the processes of many groups would."""

    def ask(self, broker: Any, name: str, arguments: Sequence[Any], seconds: float, at_once: int) -> tuple[int, float]:
        """(answers, seconds)"""
        import ray

        method, n, started = getattr(broker, name), 0, time.perf_counter()
        while (took := time.perf_counter() - started) < seconds:
            ray.get([method.remote(*arguments) for _ in range(at_once)])
            n += at_once
        return n, took


def served(n_groups: int, *, n_clients: int = 2, seconds: float = 3.0, at_once: int = 20) -> list[Served]:
    """The calls of a study's steady state, with `n_groups` groups at work; a local Ray must be there."""
    import ray

    broker = start_broker(f"broker-{n_groups}", NAMESPACE, 1, None)
    trials = [simulated_trial(n, 50) for n in range(-(-n_groups // 4))]
    ray.get(broker.submit.remote([task for trial in trials for task in sample_tasks(trial, range(4))]))
    leased = []
    for group in range(n_groups):
        ray.get(broker.register.remote(group, "a"))
        leased += ray.get(broker.lease.remote(group, "a"))[1]
    ray.get(broker.register.remote(n_groups, "idle"))
    for task, number in leased:
        ray.get(broker.progress.remote(task.key, number, "training", 17, 313))
    task, number = leased[0]
    process = psutil.Process(_pid_of("ray::Broker"))
    clients = [ray.remote(num_cpus=0)(_Client).remote() for _ in range(n_clients)]
    calls: dict[str, tuple[Any, ...]] = {
        "beat": (0, "a", 0),
        "progress": (task.key, number, "training", 18, 313),
        "lease": (n_groups, "idle"),
        "outcomes": ([task.key for task, _ in leased[:4]],),
        "pulse": (0, []),
    }
    while leased_rest := ray.get(broker.lease.remote(n_groups, "idle"))[1]:
        for task, number in leased_rest:  # What the groups left of the last trial: `lease` is to find nothing.
            ray.get(broker.complete.remote(task.key, number, {}))
    results = []
    for name, arguments in calls.items():
        n_at_once = at_once if name != "pulse" else 1
        ray.get([client.ask.remote(broker, name, arguments, 0.3, n_at_once) for client in clients])
        before = _cpu_seconds(process)
        answers = ray.get([client.ask.remote(broker, name, arguments, seconds, n_at_once) for client in clients])
        busy, n = _cpu_seconds(process) - before, sum(n for n, _ in answers)
        rate = sum(n / took for n, took in answers)
        alone = []
        for _ in range(100):
            started = time.perf_counter()
            ray.get(getattr(broker, name).remote(*arguments))
            alone.append(time.perf_counter() - started)
        results.append(
            Served(
                name=name,
                calls_per_second=rate,
                broker_microseconds=1e6 * busy / n,
                answer_milliseconds=1e3 * sorted(alone)[len(alone) // 2],
            )
        )
    for actor in (*clients, broker):
        ray.kill(actor)
    return results


def process_memory() -> dict[str, float]:
    """MiB that no other process shares (USS) of each kind of process that a group and a trial bring along.

    A real Ray Train run whose loop only waits, and a real trial of Ray Tune that waits for a sample nobody trains.
    """
    import ray
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    broker = start_broker("broker-memory", NAMESPACE, 1, None)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        stop = Path(folder) / "stop"
        trainer = TorchTrainer(
            _wait,
            train_loop_config={"until": str(stop)},
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(name="group", storage_path=folder),
        )
        plan = TrialPlan(fuse=1, racing=None, direction=Direction.MINIMIZE)
        config = as_config(simulated_trial(0, 50), 4)

        def trial(_: dict[str, Any]) -> None:
            run_in_tune(config, broker_name="broker-memory", namespace=NAMESPACE, plan=plan)

        tuner = tune.Tuner(
            tune.with_resources(trial, {"node:__internal_head__": 0.001}),
            run_config=tune.RunConfig(name="tune", storage_path=folder, verbose=0),
        )
        threads = [threading.Thread(target=what.fit) for what in (trainer, tuner)]
        for thread in threads:
            thread.start()
        kinds = {"TrainController": "controller", "RayTrainWorker": "worker", "ImplicitFunc": "trial"}
        found: dict[str, float] = {}
        deadline = time.monotonic() + 120
        while len(found) < len(kinds) and time.monotonic() < deadline:
            time.sleep(1)
            found = _uss_of(kinds)
        time.sleep(5)
        found = _uss_of(kinds)
        found["broker"] = psutil.Process(_pid_of("ray::Broker")).memory_full_info().uss / MIB
        stop.touch()
        ray.get(broker.close.remote())
        for thread in threads:
            thread.join()
        ray.kill(broker)
    return found


def broker_memory(n_samples: int) -> tuple[float, float]:
    """MiB of the broker's process (USS) before and after so many samples, their results as large as real ones."""
    import ray
    from scale_broker import simulated_result

    broker: Any = ray.remote(num_cpus=0)(Broker).remote(1)  # type: ignore[call-arg, arg-type]
    ray.get(broker.register.remote(0, "a"))
    process = psutil.Process(_pid_of("ray::Broker"))
    before = process.memory_full_info().uss / MIB
    for number in range(-(-n_samples // 4)):
        tasks = sample_tasks(simulated_trial(number, 50), range(4))
        ray.get(broker.submit.remote(tasks))
        for _ in tasks:
            _, [(task, lease)] = ray.get(broker.lease.remote(0, "a"))
            ray.get(broker.complete.remote(task.key, lease, simulated_result(task.spec).to_json()))
    after = process.memory_full_info().uss / MIB
    ray.kill(broker)
    return before, after


def _wait(settings: dict[str, Any]) -> None:
    import torch  # noqa: F401 (a group loads it)

    while not Path(settings["until"]).exists():
        time.sleep(0.2)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _own_ray_processes() -> Iterator[tuple[psutil.Process, str]]:
    """The processes of this Ray: those below this process."""
    for process in psutil.Process().children(recursive=True):
        try:
            yield process, process.cmdline()[0]
        except (psutil.Error, IndexError):
            continue


def _pid_of(title: str) -> int:
    return max(process.pid for process, name in _own_ray_processes() if name.startswith(title))


def _uss_of(kinds: dict[str, str]) -> dict[str, float]:
    found = {}
    for process, name in _own_ray_processes():
        for title, kind in kinds.items():
            if title in name:
                found[kind] = process.memory_full_info().uss / MIB
    return found
