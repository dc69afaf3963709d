"""Room for a fleet: what a cluster must have before a study starts on it. Without Ray."""

import time
from pathlib import Path
from typing import Any

import pytest

from duet_ray.config import StudyConfig, config_from
from duet_ray.errors import ResourceError
from duet_ray.execution import ray_session
from duet_ray.execution.ray_session import check_resources, wait_for_room
from tests.toy_study import toy_data


def study(**fleet: Any) -> StudyConfig:
    return config_from(toy_data(fleet=fleet, training__batch_size=8), folder=Path())


def silent(_: str) -> None:
    pass


def test_workers_are_placed_whole() -> None:
    """Four CPUs on two nodes are no room for a worker of three, nor a GPU on one node and the CPUs on another."""
    check_resources(study(groups=2, cpus_per_worker=2), [{"CPU": 2}, {"CPU": 2}])
    with pytest.raises(ResourceError, match=r"room for 1 workers .* of 3 CPUs, and the 2 nodes have room for 0"):
        check_resources(study(cpus_per_worker=3), [{"CPU": 2}, {"CPU": 2}])
    with pytest.raises(ResourceError, match=r"of 1 GPUs, 1 CPUs, and the 2 nodes have room for 0"):
        check_resources(study(gpus_per_worker=1), [{"CPU": 8}, {"GPU": 4}])
    check_resources(study(groups=8, gpus_per_worker=0.5), [{"CPU": 8, "GPU": 2}, {"CPU": 16, "GPU": 2}])


def test_all_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(ResourceError) as error:
        check_resources(study(groups=2, workers_per_group=4, gpus_per_worker=1), [{"CPU": 4, "GPU": 4}])
    first, second = str(error.value).splitlines()
    assert first.startswith("fleet: needs 8 GPUs (2 groups × 4 workers × 1) and there are 4; lower fleet.groups or")
    assert second.startswith("fleet: needs 8 CPUs (2 groups × 4 workers × 1) and there are 4; lower fleet.groups or")


def test_a_study_waits_for_the_groups_it_starts_with_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session, "POLL_SECONDS", 0.0)
    joining = iter([[{}], [{}, {"CPU": 1}], [{}, {"CPU": 1}, {"CPU": 1}]])
    said: list[str] = []
    wait_for_room(study(groups=3, min_groups=2), lambda: next(joining), said.append)
    assert [line.split(":")[0] for line in said] == ["waiting for nodes, 1 is here", "waiting for nodes, 2 are here"]
    assert next(joining, None) is None, "with two of three groups it starts"


def test_a_cluster_that_stays_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session, "POLL_SECONDS", 0.01)
    began = time.monotonic()
    with pytest.raises(ResourceError, match=r"waited 0.001 minutes \(fleet.wait_minutes\) for the cluster's nodes"):
        wait_for_room(study(groups=3, wait_minutes=0.001), lambda: [{"CPU": 2}], silent)
    assert time.monotonic() - began < 10


def test_a_stop_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session, "POLL_SECONDS", 0.0)
    calls = 0

    def stop(_: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wait_for_room(study(groups=3), lambda: [{"CPU": 2}], stop)
