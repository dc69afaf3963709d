"""What there is on this machine: versions, devices, Ray's authentication, open ports, disks, the hub, the database.

Everything is read, nothing is changed. Of secrets only their presence, their length and their files' modes are taken.
No host is asked anything but this one, the hub, and those that RAY_ADDRESS and the study's store name.
"""

import http.client
import importlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil

from duet_ray.config import StudyConfig
from duet_ray.file_systems import network_file_system

GIB = 2**30
DASHBOARD_PORT = 8265
SECONDS = 3.0
"""How long the hub, a dashboard or a database may take to answer."""


@dataclass(frozen=True, kw_only=True)
class SecretFile:
    """A file that holds a secret."""

    path: str
    mode: int | None
    """Its permission bits; None where it is not there."""
    is_out_of_reach: bool = False
    """Whether a folder above it is closed to everybody else."""


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """A Ray dashboard that answers."""

    url: str
    listens_on: str
    """The address that it is bound to; that of the URL where this is not known."""
    asks_for_token: bool


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was found. None stands for what was not looked at or cannot be known."""

    python: tuple[int, int, int]
    packages: Mapping[str, tuple[str, str | None]]
    """Name → (versions that duet_ray wants, version that is installed); empty where duet_ray is not installed."""
    n_cpus: int
    memory_gib: float
    gpus: tuple[tuple[str, float], ...]
    """(name, GiB) of every CUDA device."""
    gpu_error: str | None = None
    """Why torch cannot say."""
    auth_mode: str | None = None
    """RAY_AUTH_MODE."""
    ray_address: str | None = None
    ray_token_length: int = 0
    """Of RAY_AUTH_TOKEN; 0 where it is not set."""
    ray_token_path: str | None = None
    """RAY_AUTH_TOKEN_PATH."""
    token_files: tuple[SecretFile, ...] = ()
    """Ray's, then the hub's."""
    dashboards: tuple[Dashboard, ...] = ()
    storage: str
    storage_free_gib: float
    storage_network: str | None = None
    """The kind of network file system that it lies on."""
    storage_is_writable: bool = True
    hub_token: Literal["environment", "file"] | None = None
    hub_offline: bool = False
    hub_answers: bool | None = None
    has_psycopg: bool = False
    pgpass: SecretFile
    has_pgpassword: bool = False
    study: StudyConfig | None = None
    model_is_here: bool | None = None
    """Whether the study's model is a local folder, or in the hub's cache."""
    database_error: str | None = None
    """What the study's PostgreSQL said when it was asked; "" where it is well."""


def look(
    study: StudyConfig | None = None, *, offline: bool = False, environment: Mapping[str, str] = os.environ
) -> Facts:
    """Look around.

    Args:
        study: also look at its storage, its store and its model.
        offline: ask nothing of other hosts.
    """
    storage = study.resolve_path(study.storage) if study else Path("studies").resolve()
    there = next(folder for folder in (storage, *storage.parents) if folder.is_dir())
    address = environment.get("RAY_ADDRESS") or None
    hub_home = Path(environment.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    hub_file = Path(environment.get("HF_TOKEN_PATH") or hub_home / "token").expanduser()
    ray_files = [Path(environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()]
    hub_offline = environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    gpus, gpu_error = _gpus()
    return Facts(
        python=sys.version_info[:3],
        packages=_packages(),
        n_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=psutil.virtual_memory().total / GIB,
        gpus=gpus,
        gpu_error=gpu_error,
        auth_mode=environment.get("RAY_AUTH_MODE") or None,
        ray_address=address,
        ray_token_length=len(environment.get("RAY_AUTH_TOKEN", "")),
        ray_token_path=environment.get("RAY_AUTH_TOKEN_PATH") or None,
        token_files=tuple(_secret_file(path) for path in (*ray_files, hub_file)),
        dashboards=tuple(_dashboards(address, offline)),
        storage=str(storage),
        storage_free_gib=shutil.disk_usage(there).free / GIB,
        storage_network=network_file_system(storage),
        storage_is_writable=os.access(there, os.W_OK | os.X_OK),
        hub_token="environment" if environment.get("HF_TOKEN") else "file" if hub_file.is_file() else None,
        hub_offline=hub_offline,
        hub_answers=None if offline or hub_offline else _hub_answers(environment),
        has_psycopg=_can_import("psycopg"),
        pgpass=_secret_file(Path(environment.get("PGPASSFILE") or "~/.pgpass").expanduser()),
        has_pgpassword=bool(environment.get("PGPASSWORD")),
        study=study,
        model_is_here=_model_is_here(study) if study else None,
        database_error=None if offline or study is None else _database_error(study),
    )


def _packages() -> dict[str, tuple[str, str | None]]:
    """What the installed duet_ray requires, and what is there."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("duet-ray") or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, tuple[str, str | None]] = {}
    for line in lines:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        with suppress(metadata.PackageNotFoundError):
            found[wanted.name] = (str(wanted.specifier), metadata.version(wanted.name))
        found.setdefault(wanted.name, (str(wanted.specifier), None))
    return found


def _gpus() -> tuple[tuple[tuple[str, float], ...], str | None]:
    try:
        import torch

        n_gpus = torch.cuda.device_count()
        devices = [torch.cuda.get_device_properties(index) for index in range(n_gpus)]
    except Exception as error:  # torch that does not load, a driver that does not answer
        return (), f"{type(error).__name__}: {error}"
    return tuple((device.name, device.total_memory / GIB) for device in devices), None


def _secret_file(path: Path) -> SecretFile:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        closed = any(not folder.stat().st_mode & 0o011 for folder in path.resolve().parents)
        return SecretFile(path=str(path), mode=mode, is_out_of_reach=closed)
    except (OSError, RuntimeError):
        return SecretFile(path=str(path), mode=None)


def _can_import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


# Ports ---------------------------------------------------------------------------------------------------------------


def _dashboards(address: str | None, offline: bool) -> Iterator[Dashboard]:
    """The Ray dashboards of this machine, asked on loopback, and that of the cluster at RAY_ADDRESS."""
    listening = _listening()
    ports = {DASHBOARD_PORT: listening.get(DASHBOARD_PORT, "127.0.0.1"), **_ray_ports(listening)}
    for port, host in sorted(ports.items()):
        asks = _asks_for_token("127.0.0.1" if "." in host or host == "::" else "::1", port)
        if asks is not None:
            yield Dashboard(url=f"http://127.0.0.1:{port}", listens_on=host, asks_for_token=asks)
    there = dashboard_of(address)
    if there is not None and not offline:
        asks = _asks_for_token(*there)
        if asks is not None:
            yield Dashboard(url=f"http://{there[0]}:{there[1]}", listens_on=there[0], asks_for_token=asks)


def dashboard_of(address: str | None) -> tuple[str, int] | None:
    """(host, port) of the dashboard of a RAY_ADDRESS on another machine; None where it is this one, or none."""
    if address in (None, "", "auto", "local"):
        return None
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    if not parts.hostname or parts.hostname in ("127.0.0.1", "localhost", "::1"):
        return None
    port = parts.port if parts.scheme in ("http", "https") else None
    return parts.hostname, port or DASHBOARD_PORT


def _listening() -> dict[int, str]:
    """Port → the address that a process of this machine listens on; the widest where there are several."""
    found: dict[int, str] = {}
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr:
                host, port = connection.laddr[:2]
                if port not in found or host in ("0.0.0.0", "::"):
                    found[port] = host
    return found


def _ray_ports(listening: Mapping[int, str]) -> dict[int, str]:
    """Of the ports that are listened on, those of Ray's dashboards, by their processes' command lines."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            line = process.cmdline()
            if any("dashboard/dashboard.py" in word.replace(os.sep, "/") for word in line):
                for connection in process.net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_LISTEN and connection.laddr:
                        host, port = connection.laddr[:2]
                        found[port] = listening.get(port, host)
    return found


def _asks_for_token(host: str, port: int) -> bool | None:
    """Whether a dashboard refuses to say its version without a token; None where nothing or something else answers."""
    try:
        with closing(http.client.HTTPConnection(host, port, timeout=SECONDS)) as connection:
            connection.request("GET", "/api/version", headers={"Accept": "application/json"})
            answer = connection.getresponse()
            body = answer.read(10_000)
    except (OSError, http.client.HTTPException):
        return None
    if answer.status in (401, 403) and b"authentication token" in body:
        return True
    with suppress(ValueError):
        if answer.status == 200 and "ray_version" in json.loads(body):
            return False
    return None


# The hub, the model, the database ------------------------------------------------------------------------------------


def _hub_answers(environment: Mapping[str, str]) -> bool:
    """Whether the hub answers a HEAD, whatever it says; through a proxy where the environment names one."""
    import urllib.error
    import urllib.request

    url = environment.get("HF_ENDPOINT") or "https://huggingface.co"
    if urlsplit(url).scheme not in ("http", "https"):
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException):
        return False


def _model_is_here(study: StudyConfig) -> bool:
    if Path(study.model_path).is_absolute():
        return Path(study.model_path, "config.json").is_file()
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(study.model.path, "config.json", revision=study.model.revision)
    except HFValidationError:
        return False
    return isinstance(found, str)


def _database_error(study: StudyConfig) -> str | None:
    """What the study's PostgreSQL says to a connection; None where its store is a file or there is no driver."""
    if study.store is None or not study.store.startswith("postgresql") or not _can_import("psycopg"):
        return None
    import psycopg

    url: Any = study.store.replace("postgresql+psycopg://", "postgresql://", 1)
    try:
        with psycopg.connect(url, connect_timeout=int(SECONDS), autocommit=True) as connection:
            connection.execute("SELECT 1")
    except psycopg.Error as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""
