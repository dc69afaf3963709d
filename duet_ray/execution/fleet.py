"""The fleet: `fleet.groups` Ray Train runs, each its own failure domain, all fed by one broker.

Each group is a `TorchTrainer.fit()` in a thread of the driver. A worker killed in one group restarts that group alone.
"""

import logging
import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from duet_ray.config import StudyConfig
from duet_ray.execution.broker import Place, ask_actor
from duet_ray.execution.group import group_loop
from duet_ray.execution.worker import Assignment
from duet_ray.processes import started

log = logging.getLogger(__name__)

MAX_GROUP_RESTARTS = 1000
"""Deaths of the infrastructure have a generous bound of their own: see also `sampling.max_retries` for one sample."""


def end_process(place: Place) -> None:
    """Kill a process on its node, if both are there: Ray Train then starts its group anew. Not waited for."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    log.warning("process %d on node %s is taken for hung, and ended", place.pid, place.node)
    there = NodeAffinitySchedulingStrategy(place.node, soft=False)
    ray.remote(num_cpus=0, max_retries=0)(_kill).options(scheduling_strategy=there).remote(place)


def _kill(place: Place) -> None:
    if started(place.pid) == place.started:
        with suppress(ProcessLookupError):
            os.kill(place.pid, signal.SIGKILL)


class Fleet:
    """The groups of one study; started in `__enter__`, ended in `__exit__`."""

    def __init__(self, config: StudyConfig, assignment: Assignment, *, broker_name: str, namespace: str) -> None:
        self._config = config
        self._assignment = assignment
        self._broker_name, self._namespace = broker_name, namespace
        self._scratch = config.study_folder / ".ray" / broker_name
        self._threads: list[threading.Thread] = []
        self._ended: dict[int, str] = {}
        self._closing = False

    def __enter__(self) -> "Fleet":
        # Imported here once: several threads that import it at the same time find it half made.
        import ray.train.torch  # noqa: F401

        for group in range(self._config.fleet.groups):
            thread = threading.Thread(target=self._run_group, args=(group,), daemon=True, name=f"group-{group}")
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        # Groups leave when the broker is closed. Their threads must be out of Ray before Ray is shut down, or Ray ends
        # the whole process; one that is stuck in foreign code is not waited for without end.
        self._closing = True
        deadline = time.monotonic() + 30
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        shutil.rmtree(self._scratch, ignore_errors=True)

    def ended(self) -> dict[int, str]:
        """Group → why it ended, for those that will not come back."""
        return dict(self._ended)

    @property
    def is_gone(self) -> bool:
        """Whether no group is left."""
        return len(self._ended) == len(self._threads)

    def _run_group(self, group: int) -> None:
        reason = "it ended without a word"
        try:
            while True:
                self._trainer(group).fit()
                reason = "it left"
                if self._closing or not self._wants(group):
                    break
                log.warning("group %d left, and starts anew: it had lost the broker for a while", group)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if not self._closing:
                log.error("group %d ended: %s", group, reason)
        finally:
            self._ended[group] = reason

    def _wants(self, group: int) -> bool:
        """Whether a group that has left is to come back."""
        import ray

        try:
            broker = ray.get_actor(self._broker_name, namespace=self._namespace)
            return bool(ask_actor(broker, "wants", group))
        except (ValueError, ray.exceptions.RayError):  # there is none any more
            return False

    def _trainer(self, group: int) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        fleet = self._config.fleet
        resources = {"CPU": fleet.cpus_per_worker}
        if fleet.gpus_per_worker:
            resources["GPU"] = fleet.gpus_per_worker
        settings = {
            "group": group,
            "n_groups": fleet.groups,
            "broker": self._broker_name,
            "namespace": self._namespace,
            "assignment": asdict(self._assignment),
            "uses_gpu": fleet.gpus_per_worker > 0,
            "n_threads": max(1, int(fleet.cpus_per_worker)),
            "log_file": str(self._config.study_folder / "logs" / f"group-{group}.log"),
        }
        return TorchTrainer(
            group_loop,
            train_loop_config=settings,
            scaling_config=ScalingConfig(
                num_workers=fleet.workers_per_group,
                use_gpu=fleet.gpus_per_worker > 0,
                resources_per_worker=resources,
            ),
            run_config=RunConfig(
                name=f"group-{group}",
                storage_path=str(self._scratch),
                failure_config=FailureConfig(max_failures=MAX_GROUP_RESTARTS),
            ),
        )
