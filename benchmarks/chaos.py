"""What is left of a study whose driver and groups are killed again and again, for as long as it lasts?

    OMP_NUM_THREADS=1 python benchmarks/chaos.py --out chaos
    OMP_NUM_THREADS=1 python benchmarks/chaos.py --out chaos --trials 40 --seed 7

A toy study (three domains, k = 2) runs once in calm and once in chaos, on a local Ray: the real driver, store, search,
broker and files, and light groups, which are Ray actors that train nothing, sleep a little and leave what a worker
leaves. First the times are measured that a driver and a group need to come back after a SIGKILL. Then each of them is
killed at random moments, on average after twice that time: `--seed` says when. Each killed driver is started again with
the same command, at once.

It must end with the observations of the calm study, to the last bit; and no sample may have been trained twice that was
not in flight at a kill. Every event stands in `OUT/chaos-SEED.log`.
"""

import argparse
import importlib.metadata
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the toy study and the worker that trains nothing are the tests'

GROUP_NAME = "LightGroup"


class LightGroup:
    """A group as a plain Ray actor; started anew by Ray for ever."""

    def serve(self, broker_name: str, namespace: str, group: int, assignment: Any, log: str, seconds: float) -> None:
        import uuid

        import ray

        from duet_ray.execution.broker import ask_actor
        from duet_ray.execution.serving import BrokerGone, Seat, serve
        from tests.light.worker import ToyWorker

        broker = ray.get_actor(broker_name, namespace=namespace)

        def ask(method: str, *arguments: Any) -> Any:
            try:
                return ask_actor(broker, method, *arguments)
            except ray.exceptions.RayError as error:
                raise BrokerGone(str(error)) from error

        seat = Seat(
            ask=ask,
            tell=lambda method, *arguments: getattr(broker, method).remote(*arguments),
            group=group,
            incarnation=uuid.uuid4().hex,
        )
        with Path(log).with_name("starts.log").open("a") as file:
            file.write(f"{group} {time.time()}\n")
        serve(seat, assignment, make_worker=partial(ToyWorker, log=Path(log), seconds=seconds))


class LightFleet:
    """Stands in for `duet_ray.execution.fleet.Fleet`."""

    def __init__(self, config: Any, assignment: Any, *, broker_name: str, namespace: str, log: str, seconds: float):
        self._settings = (broker_name, namespace), (assignment, log, seconds)
        self._n_groups = config.fleet.groups

    def __enter__(self) -> "LightFleet":
        import ray

        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(LightGroup)
        self._actors = [actor.remote() for _ in range(self._n_groups)]
        broker, rest = self._settings
        self._running = [one.serve.remote(*broker, group, *rest) for group, one in enumerate(self._actors)]
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ray.wait(self._running, num_returns=len(self._running), timeout=30)
        for actor in self._actors:
            ray.kill(actor)

    def ended(self) -> dict[int, str]:
        return {}

    @property
    def is_gone(self) -> bool:
        return False


def drive(study: Path, log: Path, seconds: float) -> None:
    """`duet run` with light groups: what the driver's process does."""
    from duet_ray.config import load_config
    from duet_ray.execution import platform
    from duet_ray.study import Study

    platform.Fleet = partial(LightFleet, log=str(log), seconds=seconds)  # type: ignore[misc, assignment]
    Study(load_config(study)).run()


class Driver:
    """A driver's process, and the groups below it."""

    def __init__(self, study: Path, seconds: float) -> None:
        command = [sys.executable, __file__, "--drive", str(study), "--seconds", str(seconds)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._output = (study.parent / "driver.log").open("ab")
        self.process = subprocess.Popen(
            command, stdout=self._output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def groups(self) -> list[psutil.Process]:
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        found = []
        for child in children:
            try:
                if GROUP_NAME in " ".join(child.cmdline()):
                    found.append(child)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found

    def kill(self) -> list[psutil.Process]:
        """SIGKILL; what ran below it."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        return below


def n_trained(study: Path) -> int:
    log = study.parent / "trained.log"
    return len(log.read_text().split()) if log.is_file() else 0


def n_starts(study: Path) -> int:
    log = study.parent / "starts.log"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def wait(condition: Callable[[], bool], driver: Driver, seconds: float = 300) -> float:
    """Seconds until a condition holds."""
    started = time.monotonic()
    while not condition():
        if driver.process.poll() is not None or time.monotonic() - started > seconds:
            raise SystemExit(f"the driver ended, or nothing happened: exit code {driver.process.poll()}")
        time.sleep(0.02)
    return time.monotonic() - started


def restart_seconds(folder: Path, n_trials: int, seconds: float) -> tuple[float, float]:
    """(a driver's, a group's): from its SIGKILL until a training is made again, until the group is back."""
    study = write_study(folder, n_trials)
    driver = Driver(study, seconds)
    wait(lambda: n_trained(study) >= 4, driver)
    n = n_starts(study)
    driver.groups()[0].kill()
    group = wait(lambda: n_starts(study) > n, driver)
    below = driver.kill()
    n = n_trained(study)
    killed = time.monotonic()
    driver = Driver(study, seconds)
    wait(lambda: n_trained(study) >= n + 2, driver)
    restart = time.monotonic() - killed
    end(driver.kill() + below)
    return restart, group


def end(processes: list[psutil.Process]) -> None:
    """End what killed drivers have left: Ray does so by itself, a little later."""
    _, alive = psutil.wait_procs(processes, timeout=60)
    for process in alive:
        process.kill()


def write_study(folder: Path, n_trials: int) -> Path:
    from tests.toy_study import write_toy_study

    n_bayesian = n_trials // 4
    return write_toy_study(
        folder,
        n_rows=200,
        mixture__n_rows=100,
        search={"n_start": n_trials - n_bayesian, "n_trials": n_bayesian, "kernel": "se"},
        sampling={"k": 2, "max_retries": 1000},
        fleet={"groups": 2, "cpus_per_worker": 0.5},
    )


def chaos(study: Path, seconds: float, restarts: tuple[float, float], seed: int, log: TextIO) -> dict[str, int]:
    """Run a study to its end, killing its driver and its groups."""
    moments, started = random.Random(seed), time.monotonic()
    counts = {"driver": 0, "group": 0}
    below: list[psutil.Process] = []

    def say(text: str) -> None:
        line = f"{time.monotonic() - started:8.2f} s  {n_trained(study):4d} trained  {text}"
        print(line, file=log, flush=True)
        print(line, flush=True)

    def next_of(which: int) -> float:
        return time.monotonic() + moments.expovariate(1 / (2 * restarts[which]))

    driver, next_driver, next_group = Driver(study, seconds), next_of(0), next_of(1)
    say(f"driver {driver.process.pid} started")
    while driver.process.poll() is None:
        now = time.monotonic()
        if now >= next_driver:
            below += driver.kill()
            counts["driver"] += 1
            driver, next_driver = Driver(study, seconds), next_of(0)
            say(f"driver killed, {driver.process.pid} started")
        elif now >= next_group:
            if groups := driver.groups():
                victim = moments.choice(groups)
                victim.kill()
                counts["group"] += 1
                say(f"group {victim.pid} killed")
            next_group = next_of(1)
        time.sleep(0.05)
    say(f"the study ended with exit code {driver.process.returncode}")
    end(below)
    if driver.process.returncode:
        raise SystemExit(f"the study failed: see {study.parent / 'driver.log'}")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the two studies and the log; must not exist")
    parser.add_argument("--trials", type=int, default=200, help="three quarters of them random, the others Bayesian")
    parser.add_argument("--seconds", type=float, default=0.2, help="that a training takes")
    parser.add_argument("--seed", type=int, default=20261126)
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.drive:
        drive(given.drive, given.drive.parent / "trained.log", given.seconds)
        return
    if given.out is None:
        parser.error("--out is required")
    given.out.mkdir(parents=True)
    from tests.execution.test_study_run import essence, trials_of

    restarts = restart_seconds(given.out / "measured", given.trials, given.seconds)
    print(f"restart of a driver {restarts[0]:.1f} s, of a group {restarts[1]:.1f} s", flush=True)
    calm, study = (write_study(given.out / name, given.trials) for name in ("calm", "chaos"))
    began = time.monotonic()
    driver = Driver(calm, given.seconds)
    if driver.process.wait() != 0:
        raise SystemExit(f"the calm study failed: see {calm.parent / 'driver.log'}")
    calm_seconds = time.monotonic() - began
    began = time.monotonic()
    with (given.out / f"chaos-{given.seed}.log").open("w") as log:
        print(f"seed {given.seed}, {given.trials} trials, restart of a driver {restarts[0]:.1f} s, "
              f"of a group {restarts[1]:.1f} s", file=log)  # fmt: skip
        counts = chaos(study, given.seconds, restarts, given.seed, log)
        seconds = time.monotonic() - began
        same = essence(trials_of(study)) == essence(trials_of(calm))
        trained = Counter((study.parent / "trained.log").read_text().split())
        again = sum(trained.values()) - len(trained)
        in_flight = 2 * counts["driver"] + counts["group"]
        print(f"the same observations: {same}; trained again: {again}, at most {in_flight} were in flight", file=log)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("ray", "ax-platform", "sqlalchemy"))
    print(f"\n{versions}; Python {sys.version.split()[0]}; seed {given.seed}\n")
    print("| | calm | chaos |\n|---|---|---|")
    rows = (
        ("trials", given.trials, given.trials),
        ("samples", len(Counter((calm.parent / "trained.log").read_text().split())), len(trained)),
        ("drivers killed (one restart takes)", 0, f"{counts['driver']} ({restarts[0]:.1f} s)"),
        ("groups killed (one restart takes)", 0, f"{counts['group']} ({restarts[1]:.1f} s)"),
        ("trainings made again", 0, again),
        ("at most in flight at the kills", 0, in_flight),
        ("seconds", f"{calm_seconds:.0f}", f"{seconds:.0f}"),
        ("ratios, rows, values, observations", "", "the same, to the last bit" if same else "NOT THE SAME"),
    )
    for name, one, other in rows:
        print(f"| {name} | {one} | {other} |")
    if not same or again > in_flight:
        raise SystemExit("the study is not what it would have been in calm")


if __name__ == "__main__":
    main()
