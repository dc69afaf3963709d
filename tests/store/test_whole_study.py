"""A whole study whose store is on a server that is stopped and started in the middle."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.store.postgres_server import PostgresServer
from tests.toy_study import write_toy_study

pytest_plugins = ("tests.store.postgres_fixture",)
DUET = [sys.executable, "-c", "from duet_ray.cli import main; main()"]


@pytest.mark.ray
@pytest.mark.postgres
def test_a_run_outlives_its_server(postgres: PostgresServer, tmp_path: Path) -> None:
    file = write_toy_study(tmp_path, storage="studies", store=postgres.url())
    run = subprocess.Popen([*DUET, "run", str(file), "--plain"], stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    said = list[str]()
    to_come = [("base untouched", "immediate"), ("t0001 start", "fast"), ("t0003 search", "immediate")]
    for line in run.stderr:
        said.append(line)
        if to_come and to_come[0][0] in line:
            postgres.stop(to_come.pop(0)[1])
            postgres.start()
    assert run.wait(60) == 0, "".join(said)
    assert not to_come
    text = "".join(said)
    assert "answers again after" in text
    assert not (tmp_path / "studies" / "toy" / "study.db").exists()
    status = subprocess.run(
        [*DUET, "status", str(tmp_path / "studies" / "toy"), "--json"], capture_output=True, text=True, check=True
    )
    trials = json.loads(status.stdout)["trials"]
    assert [trial["status"] for trial in trials] == ["done"] * len(trials)
    searched = [trial for trial in trials if trial["kind"] in ("start", "search")]
    assert len(searched) == 5
    assert all(len(trial["samples"]) == 2 for trial in searched)
