"""A Ray to run on: a local one of our own, or the cluster at `RAY_ADDRESS` once it has room for the fleet.

Where a job's nodes join one after the other, a study that looked at once would find too few; one that never looked
would hang. So it waits a stated time (`fleet.wait_minutes`), says for what, and then says what is missing.
"""

import json
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from duet_ray.config import StudyConfig
from duet_ray.errors import ResourceError

POLL_SECONDS = 1.0

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray's own name: set in the entry point of a submitted job, to JSON with the job's runtime environment."""

OF_WORKERS = (
    *("RAY_CHDIR_TO_TRIAL_DIR", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "TOKENIZERS_PARALLELISM", "DS_ACCELERATOR"),
    *("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"),
)
"""Variables of the driver that workers on other nodes are given. No secret is among them: Ray shows them to everybody
who may look at a job, so tokens come from each node's own environment."""


@contextmanager
def ray_session(config: StudyConfig, say: Callable[[str], None] = lambda _: None) -> Iterator[Any]:
    """A Ray to run on: the one at `RAY_ADDRESS` or already connected, else a local one, stopped at the end.

    Args:
        say: told what is waited for, again and again; what it raises ends the wait.

    Raises:
        ResourceError: it cannot be reached, or has no room for the fleet.
    """
    # Before ray is imported: workers stay in their folder, Tune prints nothing of its own, nothing is sent anywhere.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # A local Ray on a busy machine needs longer than the half minute that Ray gives it.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # what a newer Ray does by itself
    import ray

    if ray.is_initialized():
        wait_for_room(config, _nodes, say)
        yield ray
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    with _own_sigterm():
        if address:
            _connect(ray, address, quiet)
        else:
            # The token is this run's own and is written to no file.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            ray.init(address="local", include_dashboard=False, **quiet)
    try:
        if address:
            wait_for_room(config, _nodes, say)
        else:
            check_resources(config, _nodes())
        yield ray
    finally:
        ray.shutdown()


def job_environment(variables: Mapping[str, str]) -> dict[str, Any] | None:
    """The runtime environment of the Ray job that a process with these variables is; None where it is no job."""
    job = variables.get(JOB_VARIABLE)
    return (json.loads(job).get("runtime_env") or {}) if job else None


def _connect(ray: Any, address: str, quiet: Mapping[str, Any]) -> None:
    if address.startswith("ray://"):
        raise ResourceError(
            f"RAY_ADDRESS: the driver of a study runs inside the cluster, got {address}; "
            "start it there by `ray job submit` (see cluster/README.md)"
        )
    given = job_environment(os.environ) or {}
    ours = {name: os.environ[name] for name in OF_WORKERS if name in os.environ}
    ours = {name: value for name, value in ours.items() if name not in given.get("env_vars", {})}
    try:
        ray.init(address=address, runtime_env={"env_vars": ours}, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ResourceError(
            f"cannot join the Ray at RAY_ADDRESS = {address}: {reason}; is it up, and does this process have its "
            "token (RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH)?"
        ) from error


def _nodes() -> list[dict[str, float]]:
    """The resources of every node that is alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep our SIGTERM handler: `ray.init` puts its own in its place, which would end the process without a pause."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def wait_for_room(
    config: StudyConfig, nodes: Callable[[], Sequence[Mapping[str, float]]], say: Callable[[str], None]
) -> None:
    """Wait until a cluster has room for the groups that a study starts with.

    Args:
        nodes: the resources of the nodes that are there now.
        say: told what is missing, every second; what it raises ends the wait.

    Raises:
        ResourceError: it has not within `fleet.wait_minutes`.
    """
    deadline = time.monotonic() + 60 * config.fleet.wait_minutes
    while True:
        there = nodes()
        try:
            check_resources(config, there, n_groups=config.fleet.groups_at_start)
            return
        except ResourceError as error:
            if time.monotonic() >= deadline:
                waited = f"waited {config.fleet.wait_minutes:g} minutes (fleet.wait_minutes) for the cluster's nodes"
                raise ResourceError(f"{error}\n{waited}") from None
            n_there = f"{len(there)} {'is' if len(there) == 1 else 'are'} here"
            say(f"waiting for nodes, {n_there}: {error}".splitlines()[0])
        time.sleep(POLL_SECONDS)


def check_resources(config: StudyConfig, nodes: Sequence[Mapping[str, float]], *, n_groups: int | None = None) -> None:
    """Say at once when the fleet asks for more than there is.

    Args:
        nodes: resource → amount, for every node.
        n_groups: so many groups; None: `fleet.groups`.

    Raises:
        ResourceError: names need, have and the settings to change.
    """
    fleet = config.fleet
    n_groups = fleet.groups if n_groups is None else n_groups
    n_workers = n_groups * fleet.workers_per_group
    wanted = (("GPU", fleet.gpus_per_worker, "gpus_per_worker"), ("CPU", fleet.cpus_per_worker, "cpus_per_worker"))
    problems = []
    for resource, each, setting in wanted:
        need, there = n_workers * each, sum(node.get(resource, 0) for node in nodes)
        if need > there + 1e-9:
            problems.append(
                f"fleet: needs {need:g} {resource}s ({n_groups} groups × {fleet.workers_per_group} workers × "
                f"{each:g}) and there are {there:g}; lower fleet.groups or fleet.{setting}"
            )
    if not problems and (n_there := _n_placed(wanted, nodes)) < n_workers:
        takes = ", ".join(f"{amount:g} {resource}s" for resource, amount, _ in wanted if amount)
        problems.append(
            f"fleet: needs room for {n_workers} workers ({n_groups} groups × {fleet.workers_per_group}) of {takes}, "
            f"and the {len(nodes)} nodes have room for {n_there}; lower fleet.groups or what a worker takes"
        )
    if problems:
        raise ResourceError("\n".join(problems))


def _n_placed(wanted: Sequence[tuple[str, float, str]], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many workers fit on the nodes, each whole on one."""
    return sum(
        min(int(node.get(resource, 0) / each + 1e-9) for resource, each, _ in wanted if each > 0) for node in nodes
    )
