"""A fleet over several Ray nodes: one joins in the middle, one dies in the middle, and the study is the same.

The nodes are `ray start`s on loopback with token authentication; one is killed with all that runs on it.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.execution.ray_nodes import Nodes
from tests.execution.test_study_run import essence, finish, start, trials_of, wait_for, write_study

pytestmark = [pytest.mark.ray, pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with Nodes(tmp_path) as started:
        yield started


def start_on(nodes: Nodes, study: Path, *arguments: str) -> subprocess.Popen[str]:
    code = "import sys; from duet_ray.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", str(study), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=nodes.environment,
        start_new_session=True,
    )


def until(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 240) -> None:
    wait_for(condition, process, seconds)


def log_of(study: Path, group: int) -> str:
    file = study.parent / "studies" / "toy" / "logs" / f"group-{group}.log"
    return file.read_text() if file.is_file() else ""


def test_a_node_joins_and_another_is_lost_in_the_middle_of_a_trial(tmp_path: Path, nodes: Nodes) -> None:
    calm = write_study(tmp_path / "calm")
    code, output = finish(start(calm))
    assert code == 0, output
    first = nodes.add()
    study = write_study(tmp_path / "study", fleet={"groups": 2, "min_groups": 1})
    hold = study.parent / "hold-at"
    hold.write_text("2")
    driver = start_on(nodes, study)

    def held() -> list[int]:
        return [int(path.name.rpartition("-")[2]) for path in study.parent.glob("holding-*")]

    # One node has room for one group, which measures the base and comes to the first sample.
    until(lambda: len(held()) == 1, driver)
    assert nodes.runs_on(first, held()[0])
    # Another node: the second group starts there, and takes the trial's second sample.
    second = nodes.add()
    until(lambda: len(held()) == 2, driver)
    [on_second] = [pid for pid in held() if nodes.runs_on(second, pid)]
    assert len(trials_of(study)) == 2, "base and one trial"
    nodes.kill(second)
    assert not os.path.exists(f"/proc/{on_second}")
    hold.unlink()
    code, output = finish(driver, 400)
    assert code == 0, output
    trials = trials_of(study)
    assert essence(trials) == essence(trials_of(calm))
    retries = {s.spec.key: s.n_retries for t in trials for s in t.samples if s.n_retries}
    assert retries == {"t0000-s1": 1} or retries == {"t0000-s0": 1}, (
        "the sample that was on the lost node, and no other"
    )
    finished_by = [n for n in (0, 1) if "is ready" in log_of(study, n)]
    assert finished_by == [0, 1], "both groups were at work"


def test_a_cluster_that_stays_too_small_is_named_and_not_waited_for_without_end(tmp_path: Path, nodes: Nodes) -> None:
    nodes.add()
    study = write_study(tmp_path / "study", fleet={"groups": 3, "wait_minutes": 0.05})
    began = time.monotonic()
    code, output = finish(start_on(nodes, study))
    assert code == 1
    assert time.monotonic() - began < 120
    assert "waiting for nodes, 2 are here: fleet: needs 3 CPUs (3 groups × 1 workers × 1) and there are 1" in output
    assert "waited 0.05 minutes (fleet.wait_minutes)" in output


def test_a_driver_without_the_token_is_refused_with_the_remedy(tmp_path: Path, nodes: Nodes) -> None:
    study = write_study(tmp_path / "study")
    nodes.environment = {**nodes.environment, "RAY_AUTH_MODE": "disabled"}
    code, output = finish(start_on(nodes, study))
    assert code == 1
    assert f"cannot join the Ray at RAY_ADDRESS = {nodes.environment['RAY_ADDRESS']}" in output
    assert "RAY_AUTH_TOKEN_PATH" in output
    assert "Traceback" not in output
