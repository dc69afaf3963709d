"""Nobody joins the Ray of a local run without its token, and the token is written nowhere."""

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.toy_study import write_toy_study

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

# Starts Ray as a run does, says where it is and under which token, and stops it when its standard input ends.
RUN = """
import os, sys
from duet_ray.config import load_config
from duet_ray.execution.ray_session import ray_session

with ray_session(load_config(sys.argv[1])) as ray:
    print(ray.get_runtime_context().gcs_address, ray._private.worker._global_node.get_session_dir_path(), flush=True)
    print(os.environ["RAY_AUTH_TOKEN"], flush=True)
    sys.stdin.read()
"""

JOIN = """
import logging, sys
import ray

ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.CRITICAL, configure_logging=False)
print("joined", ray.get(ray.remote(lambda: 6 * 7).remote()))
"""


@dataclass(frozen=True)
class LocalRay:
    address: str
    session: Path
    token: str
    home: Path
    study: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRay]:
    folder, home = tmp_path_factory.mktemp("study"), tmp_path_factory.mktemp("home")
    study = write_toy_study(folder)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(study)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    try:
        words = process.stdout.readline().split()
        assert len(words) == 2, process.communicate()
        token = process.stdout.readline().strip()
        yield LocalRay(words[0], Path(words[1]), token, home, study, environment)
    finally:
        process.communicate(timeout=120)


def join(local_ray: LocalRay, **settings: str) -> subprocess.Popen[str]:
    """Try to run a task there, as somebody else on this machine would."""
    environment = {**local_ray.environment, **settings, "RAY_gcs_rpc_server_reconnect_timeout_s": "10"}
    command = [sys.executable, "-c", JOIN, local_ray.address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


STRANGERS = {
    "nothing set": {},
    "authentication off": {"RAY_AUTH_MODE": "disabled"},
    "no token": {"RAY_AUTH_MODE": "token"},
    "a wrong token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)},
}


def test_without_the_token_nobody_joins(local_ray: LocalRay) -> None:
    tries = {name: join(local_ray, **settings) for name, settings in STRANGERS.items()}  # at once: Ray tries for long
    for name, tried in tries.items():
        output, errors = tried.communicate(timeout=240)
        assert tried.returncode != 0, name
        assert "joined" not in output, name
        assert re.search(r"(?i)unauthenticated|authentication|token", errors), (name, errors)


def test_with_the_token_one_joins(local_ray: LocalRay) -> None:
    tried = join(local_ray, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=local_ray.token)
    output, errors = tried.communicate(timeout=240)
    assert output == "joined 42\n", errors


def test_the_token_is_this_runs_own_and_in_no_file(local_ray: LocalRay) -> None:
    assert len(local_ray.token) == 64
    assert not (local_ray.home / ".ray").exists()
    looked_at = 0
    for folder in (local_ray.home, local_ray.session, local_ray.study.parent):
        for file in folder.rglob("*"):
            if file.is_file():
                looked_at += 1
                assert local_ray.token.encode() not in file.read_bytes(), file
    assert looked_at > 10, "Ray's logs are among them"
