"""What to make of the facts: each a finding that is well, worth knowing, or a problem, with what to do about it.

A problem stops a study, or lets somebody in; everything else is a note.
"""

import ipaddress
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from duet_ray.config import StudyConfig
from duet_ray.doctor.facts import Dashboard, Facts, SecretFile

LEAST_PYTHON = (3, 11)
LEAST_RAY = "2.56"
"""Since then a local Ray asks for a token unless it is told not to."""

SHOWN = ("torch", "transformers", "ax-platform", "botorch", "peft", "datasets", "lm-eval")
LEAST_TOKEN = 16
LITTLE_DISK_GIB, NO_DISK_GIB = 10.0, 0.5


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's."""

    about: str
    level: Literal["ok", "note", "problem"]
    says: str
    remedy: str = ""


def findings(facts: Facts) -> list[Finding]:
    """Everything there is to say, in the order in which one would look."""
    return [
        *_versions(facts),
        *_devices(facts),
        *_authentication(facts),
        *_dashboards(facts),
        *_storage(facts),
        *_hub(facts),
        *_model(facts),
        *_database(facts),
    ]


def _ok(about: str, says: str) -> Finding:
    return Finding(about=about, level="ok", says=says)


def _note(about: str, says: str, remedy: str) -> Finding:
    return Finding(about=about, level="note", says=says, remedy=remedy)


def _problem(about: str, says: str, remedy: str) -> Finding:
    return Finding(about=about, level="problem", says=says, remedy=remedy)


def _versions(facts: Facts) -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    python = ".".join(map(str, facts.python))
    if facts.python < LEAST_PYTHON:
        yield _problem("python", f"{python} is too old", f"use Python {'.'.join(map(str, LEAST_PYTHON))} or newer")
    else:
        yield _ok("python", python)
    if not facts.packages:
        yield _note(
            "packages",
            "duet-ray is not installed as a package, so its requirements are not known here",
            "pip install -e .",
        )
        return
    wrong = False
    for name, (wanted, there) in sorted(facts.packages.items()):
        if there is None:
            wrong = True
            yield _problem(name, f"is missing; {wanted or 'any version'} is wanted", _install(name, wanted))
        elif name.lower() == "ray" and Version(there) < Version(LEAST_RAY):
            wrong = True
            yield _problem(
                "ray",
                f"{there}: its token authentication is not on by itself before {LEAST_RAY}",
                _install("ray[default,train,tune]", wanted),
            )
        elif not SpecifierSet(wanted).contains(there, prereleases=True):
            wrong = True
            yield _problem(name, f"{there} is installed and {wanted} is wanted", _install(name, wanted))
    if "ray" in facts.packages and not wrong:
        yield _ok("ray", str(facts.packages["ray"][1]))
    if not wrong:
        shown = [f"{name} {facts.packages[name][1]}" for name in SHOWN if name in facts.packages]
        yield _ok("packages", ", ".join(shown) or f"all {len(facts.packages)} as wanted")


def _install(name: str, wanted: str) -> str:
    return f"pip install '{name}{wanted}', or all that were tested together: pip install -c constraints.txt duet-ray"


def _devices(facts: Facts) -> Iterator[Finding]:
    yield _ok("cpu", f"{facts.n_cpus} cores, {facts.memory_gib:.0f} GiB of memory")
    if facts.gpu_error is not None:
        yield _problem("gpu", f"torch cannot say: {facts.gpu_error}", "reinstall torch for this machine's driver")
        return
    if facts.gpus:
        yield _ok("gpu", ", ".join(f"{name} ({gib:.0f} GiB)" for name, gib in facts.gpus))
    else:
        yield _note("gpu", "no CUDA device", "small models train on the CPU; for others use a machine with a GPU")
    if facts.study is not None:
        fleet = facts.study.fleet
        need = fleet.groups_at_start * fleet.workers_per_group * fleet.gpus_per_worker
        if need > len(facts.gpus) and facts.ray_address is None:
            yield _note(
                "gpu",
                f"the study asks for {need:g} GPUs and this machine has {len(facts.gpus)}",
                "run it on a cluster, or lower fleet.groups or fleet.gpus_per_worker",
            )


def _authentication(facts: Facts) -> Iterator[Finding]:
    ray_file, hub_file = (*facts.token_files, None, None)[:2]
    has_file = ray_file is not None and ray_file.mode is not None
    has_token = facts.ray_token_length > 0 or has_file
    mode = (facts.auth_mode or "").lower()
    where = "authentication"
    if mode not in ("", "token"):
        yield _problem(
            where,
            f"RAY_AUTH_MODE = {facts.auth_mode}: whoever reaches Ray's ports can run code as you",
            "unset RAY_AUTH_MODE, or set it to token",
        )
    elif facts.ray_address is not None and mode != "token":
        yield _note(
            where,
            "RAY_ADDRESS is set and RAY_AUTH_MODE is not: a cluster without a token lets anybody in",
            "set RAY_AUTH_MODE=token here and on the cluster",
        )
    elif facts.ray_address is not None and not has_token:
        yield _problem(
            where,
            "RAY_ADDRESS is set, and there is no token to join the cluster with",
            "set RAY_AUTH_TOKEN_PATH to a file with the cluster's token",
        )
    elif facts.ray_address is not None:
        yield _ok(where, "a token for the cluster at RAY_ADDRESS")
    else:
        yield _ok(where, "a local run asks for a token of its own")
    if 0 < facts.ray_token_length < LEAST_TOKEN:
        yield _problem(
            where,
            f"RAY_AUTH_TOKEN has {facts.ray_token_length} characters, which can be guessed",
            "unset it, or take one from: ray get-auth-token --generate",
        )
    if facts.ray_token_path is not None and not has_file:
        yield _problem(
            where,
            f"RAY_AUTH_TOKEN_PATH = {facts.ray_token_path}: there is no such file",
            "unset it, or write the token there",
        )
    for about, file in (("Ray's token", ray_file), ("the hub's token", hub_file)):
        if file is not None and file.mode is not None:
            yield _private(about, file, "problem")


def _private(about: str, file: SecretFile, level: Literal["note", "problem"]) -> Finding:
    """A secret's file is for its owner alone."""
    assert file.mode is not None
    if file.mode & 0o077:
        says, remedy = f"{file.path} has mode {file.mode:04o}", f"chmod 600 {shlex.quote(file.path)}"
        if level == "problem" and not file.is_out_of_reach:
            return _problem(about, f"{says}: others on this machine may read it", remedy)
        return _note(about, says, remedy)
    return _ok(about, f"{file.path} has mode {file.mode:04o}")


def _dashboards(facts: Facts) -> Iterator[Finding]:
    if not facts.dashboards:
        yield _ok("dashboard", "none is open")
    for board in facts.dashboards:
        where = f"{board.url} (listens on {board.listens_on})"
        if not board.asks_for_token:
            yield _problem(
                "dashboard",
                f"{where} asks for no token: whoever reaches it can run code",
                "stop that Ray, and start it with RAY_AUTH_MODE=token",
            )
        elif not _is_loopback(board):
            yield _note(
                "dashboard",
                f"{where} asks for a token, and is open to the network, without encryption",
                "start it with --dashboard-host 127.0.0.1, and use an SSH tunnel or a NetworkPolicy",
            )
        else:
            yield _ok("dashboard", f"{where} asks for a token")


def _is_loopback(board: Dashboard) -> bool:
    try:
        return ipaddress.ip_address(board.listens_on).is_loopback
    except ValueError:
        return board.listens_on == "localhost"


def _storage(facts: Facts) -> Iterator[Finding]:
    where = "storage"
    if not facts.storage_is_writable:
        yield _problem(
            where, f"{facts.storage} cannot be written to", "choose another one: storage: /a/folder/of/yours"
        )
    if facts.storage_free_gib < NO_DISK_GIB:
        yield _problem(where, f"{facts.storage} has {facts.storage_free_gib:.2f} GiB free", "make room")
    elif facts.storage_free_gib < LITTLE_DISK_GIB:
        yield _note(
            where,
            f"{facts.storage} has {facts.storage_free_gib:.1f} GiB free",
            "`duet validate` says what a study needs; keep_best says how many models are kept",
        )
    elif facts.storage_is_writable:
        yield _ok(where, f"{facts.storage} has {facts.storage_free_gib:.0f} GiB free")
    if facts.storage_network is None:
        yield _ok("file system", "local")
    elif facts.study is None:
        yield _note(
            "file system",
            f"{facts.storage} lies on {facts.storage_network}, where SQLite is not safe",
            "a study here needs store: postgresql+psycopg://user@host/database",
        )
    elif facts.study.store is None:
        yield _problem(
            "file system",
            f"{facts.storage} lies on {facts.storage_network}, where SQLite is not safe",
            "store: postgresql+psycopg://user@host/database, or a storage on a local disk",
        )
    else:
        yield _ok("file system", f"{facts.storage_network}, with the store elsewhere")


def _hub(facts: Facts) -> Iterator[Finding]:
    token = {"environment": "HF_TOKEN is set", "file": "a token is stored", None: "no token: public models only"}
    if facts.hub_offline:
        yield _ok("hub", f"offline (HF_HUB_OFFLINE), {token[facts.hub_token]}")
    elif facts.hub_answers is None:
        yield _ok("hub", f"not asked, {token[facts.hub_token]}")
    elif facts.hub_answers:
        yield _ok("hub", f"answers, {token[facts.hub_token]}")
    else:
        yield _note(
            "hub",
            f"does not answer, {token[facts.hub_token]}",
            "models and data must be here already: set HF_HUB_OFFLINE=1, or set HTTPS_PROXY",
        )


def _model(facts: Facts) -> Iterator[Finding]:
    study = facts.study
    if study is None:
        return
    path = study.model.path
    if facts.model_is_here:
        yield _ok("model", f"{path} is here")
    elif facts.hub_offline or facts.hub_answers is False:
        yield _problem(
            "model",
            f"{path} is neither a model's folder nor in the hub's cache, and the hub cannot be asked",
            "model.path: a local folder; or fetch it: hf download " + path,
        )
    else:
        yield _note("model", f"{path} is not here yet", "it is fetched when the study starts")
    if study.model.trust_remote_code:
        yield _note(
            "model",
            "trust_remote_code is true: code that comes with the model runs as you",
            "pin model.revision to a commit that you have read",
        )


def _database(facts: Facts) -> Iterator[Finding]:
    wanted = facts.study is not None and (facts.study.store or "").startswith("postgresql")
    about = "postgresql"
    if not wanted:
        if facts.pgpass.mode is not None:
            yield _private(about, facts.pgpass, "note")
        if not facts.has_psycopg:
            yield _note(
                about, "no client (psycopg)", "only for store: postgresql+psycopg://…: pip install 'duet-ray[postgres]'"
            )
        return
    if not facts.has_psycopg:
        yield _problem(about, "the study's store needs psycopg", "pip install 'duet-ray[postgres]'")
    if facts.pgpass.mode is not None:
        if facts.pgpass.mode & 0o077:
            yield _problem(
                about,
                f"{facts.pgpass.path} has mode {facts.pgpass.mode:04o}: PostgreSQL does not read it",
                f"chmod 600 {shlex.quote(facts.pgpass.path)}",
            )
        else:
            yield _private(about, facts.pgpass, "problem")
    elif not facts.has_pgpassword:
        yield _note(
            about, "neither PGPASSWORD nor ~/.pgpass", "well where the server trusts this user without a password"
        )
    if facts.database_error:
        yield _problem(
            about, f"{_place(facts.study)}: {facts.database_error}", "see that it runs, and that store names it"
        )
    elif facts.database_error == "":
        yield _ok(about, f"{_place(facts.study)} answers")


def _place(study: StudyConfig | None) -> str:
    return (study.store if study else "") or ""
