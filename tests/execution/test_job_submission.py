"""`ray job submit` and `ray job stop` as their users call them: the commands of cluster/README.md, on two nodes.

Token authentication is on. The study that is submitted, stopped, submitted, killed and submitted again is, to the last
bit, the study that `duet run` makes on one machine.
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.commands import blocks
from tests.execution.ray_nodes import free_port
from tests.execution.shell import Shell
from tests.execution.test_study_run import essence, finish, start, trials_of, write_study

pytestmark = [pytest.mark.ray, pytest.mark.cluster, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]


def until(condition: Callable[[], Any], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `--working-dir .` sends: a clean copy of the package and of jobs/."""
    folder = tmp_path / "checkout"
    for name in ("duet_ray", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_a_study_is_submitted_stopped_killed_and_submitted_again(tmp_path: Path, checkout: Path) -> None:
    calm = write_study(tmp_path / "calm")
    code, output = finish(start(calm))
    assert code == 0, output
    shared = tmp_path / "shared"
    study = write_study(shared, fleet__groups=2, storage=str(shared / "studies"))
    (shared / "hold-at").write_text("5")
    settings, start_nodes, submit, stop_and_submit, end_nodes = (
        block.text for block in blocks() if block.run_in == "tests/execution/test_job_submission.py"
    )
    environment = {
        **{"SHARED": str(shared), "STUDY": str(study)},
        **{name: str(free_port()) for name in ("GCS_PORT", "DASHBOARD_PORT", "CLIENT_PORT", "AGENT_PORT")},
        # Nothing of what this test runs in may stand in for the token of the README.
        **{"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    }
    shell = Shell(checkout, environment)
    try:
        shell.run("unset RAY_AUTH_TOKEN RAY_ADDRESS")
        assert shell.run(settings)[0] == 0
        token = shared / "ray-token"
        assert token.stat().st_mode & 0o777 == 0o600
        code, printed = shell.run(start_nodes)
        assert code == 0, printed
        code, printed = shell.run("RAY_AUTH_MODE=disabled RAY_AUTH_TOKEN_PATH= ray job list")
        assert code != 0, "nobody comes in without the token"
        assert re.search(r"[Uu]nauthorized|[Uu]nauthenticated|401|authentication", printed), printed
        code, printed = shell.run(submit)
        assert code == 0, printed
        until((shared / "holding").exists, "the study to be in the middle of a trial")
        (shared / "hold-at").write_text("9")
        # `ray job stop` pauses; the same again goes on. It is killed in the middle by its own test.
        stop, submit_again = stop_and_submit.split("ray job submit", 1)
        code, printed = shell.run(stop)
        assert code == 0, printed
        assert "stopped" in shell.run("ray job status duet-1")[1].lower()
        assert record(study) == "paused"
        done = {t.number for t in trials_of(study) if t.status == "done"}
        assert done, "the base at least"
        (shared / "holding").unlink(missing_ok=True)
        code, printed = shell.run(f"ray job submit{submit_again.replace('duet-2', 'duet-2 --no-wait')}")
        assert code == 0, printed
        until((shared / "holding").exists, "the study to go on")
        drivers = all_drivers(study)
        assert len(drivers) == 1
        os.kill(drivers[0], 9)
        until(lambda: "failed" in shell.run("ray job status duet-2")[1].lower(), "the job to be known as failed")
        assert record(study) == "running", "a killed driver says nothing"
        (shared / "hold-at").unlink()
        code, printed = shell.run(f"ray job submit{submit_again.replace('duet-2', 'duet-3')}", seconds=600)
        assert code == 0, printed
        assert "Job 'duet-3' succeeded" in printed
        assert str(token.read_text()).strip() not in printed
        code, printed = shell.run(end_nodes)
        assert code == 0, printed
    finally:
        shell.end()
    assert essence(trials_of(study)) == essence(trials_of(calm))
    assert not token.exists()


def record(study: Path) -> str:
    from duet_ray.store import Store

    store = Store(study.parent / "studies" / "toy")
    try:
        found = store.study()
        assert found is not None
        return found.status
    finally:
        store.close()


def all_drivers(study: Path) -> list[int]:
    """The processes that run this study as a job."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[1:2] == ["jobs/run_study.py"] and str(study) in words:
            found.append(process.pid)
    return found
