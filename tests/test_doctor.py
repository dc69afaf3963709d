"""What the doctor makes of what it finds, and that it finds what is there."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from duet_ray.config import StudyConfig, config_from
from duet_ray.doctor import Dashboard, Facts, Finding, SecretFile, findings, look
from duet_ray.doctor import facts as facts_module
from duet_ray.doctor.facts import dashboard_of
from tests.toy_study import toy_data

GONE = SecretFile(path="/home/ann/.pgpass", mode=None)
WELL = Facts(
    python=(3, 11, 7),
    packages={"ray": (">=2.56,<2.61", "2.60.0"), "torch": (">=2.6,<3", "2.13.0+cpu"), "numpy": ("", "2.4.6")},
    n_cpus=2,
    memory_gib=16,
    gpus=(("H100", 80.0),),
    storage="/data/studies",
    storage_free_gib=100,
    hub_answers=True,
    has_psycopg=True,
    pgpass=GONE,
)


def study(**changes: Any) -> StudyConfig:
    return config_from(toy_data(**changes), folder=Path("/data"))


def judged(about: str, **changes: Any) -> list[Finding]:
    return [finding for finding in findings(replace(WELL, **changes)) if finding.about == about]


def test_a_machine_in_good_health() -> None:
    found = findings(WELL)
    assert {finding.level for finding in found} == {"ok"}
    assert all(finding.says and not finding.remedy for finding in found)


def board(host: str, asks: bool) -> dict[str, Any]:
    return {"dashboards": (Dashboard(url="http://127.0.0.1:8265", listens_on=host, asks_for_token=asks),)}


def token_file(mode: int | None, **more: Any) -> dict[str, Any]:
    return {"token_files": (SecretFile(path="/home/ann/my token", mode=mode, **more),)}


PGPASS = SecretFile(path="/home/ann/.pgpass", mode=0o644)
POSTGRES = study(store="postgresql+psycopg://ann@host/db")

CASES: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("python", {"python": (3, 10, 1)}, "problem", "3.10.1 is too old", "use Python 3.11"),
    ("packages", {"packages": {}}, "note", "not installed", "pip install"),
    ("torch", {"packages": {"torch": (">=2.6,<3", "2.5.1")}}, "problem", "2.5.1 is installed", "'torch>=2.6,<3'"),
    ("torch", {"packages": {"torch": (">=2.6,<3", None)}}, "problem", "is missing", "pip install 'torch>=2.6,<3'"),
    ("ray", {"packages": {"ray": (">=2.50", "2.55.1")}}, "problem", "token authentication", "pip install 'ray["),
    ("gpu", {"gpus": ()}, "note", "no CUDA device", "GPU"),
    ("gpu", {"gpu_error": "OSError: libcuda"}, "problem", "libcuda", "reinstall torch"),
    ("gpu", {"study": study(fleet__gpus_per_worker=2)}, "note", "asks for 2 GPUs and this machine has 1", "cluster"),
    ("authentication", {"auth_mode": "disabled"}, "problem", "run code as you", "unset RAY_AUTH_MODE"),
    ("authentication", {"ray_address": "h:6379"}, "note", "lets anybody in", "RAY_AUTH_MODE=token"),
    ("authentication", {"ray_address": "h:6379", "auth_mode": "token"}, "problem", "no token", "RAY_AUTH_TOKEN_PATH"),
    ("authentication", {"ray_token_length": 6}, "problem", "has 6 characters", "ray get-auth-token"),
    ("authentication", {"ray_token_path": "/x", **token_file(None)}, "problem", "/x: there is no such file", "unset"),
    ("Ray's token", token_file(0o644), "problem", "mode 0644: others", "chmod 600 '/home/ann/my token'"),
    ("Ray's token", token_file(0o640), "problem", "mode 0640: others", "chmod 600"),
    ("Ray's token", token_file(0o644, is_out_of_reach=True), "note", "mode 0644", "chmod 600"),
    ("Ray's token", token_file(0o600), "ok", "mode 0600", ""),
    ("dashboard", board("127.0.0.1", False), "problem", "asks for no token", "RAY_AUTH_MODE=token"),
    ("dashboard", board("0.0.0.0", False), "problem", "asks for no token", "RAY_AUTH_MODE=token"),
    ("dashboard", board("0.0.0.0", True), "note", "open to the network", "--dashboard-host 127.0.0.1"),
    ("dashboard", board("::", True), "note", "open to the network", "--dashboard-host 127.0.0.1"),
    ("dashboard", board("127.0.0.1", True), "ok", "asks for a token", ""),
    ("storage", {"storage_free_gib": 0.2}, "problem", "0.20 GiB free", "make room"),
    ("storage", {"storage_free_gib": 4.0}, "note", "4.0 GiB free", "keep_best"),
    ("storage", {"storage_is_writable": False}, "problem", "cannot be written to", "storage: "),
    ("file system", {"storage_network": "nfs4"}, "note", "SQLite is not safe", "store: postgresql"),
    ("file system", {"storage_network": "nfs4", "study": study()}, "problem", "SQLite is not safe", "store: postg"),
    ("file system", {"storage_network": "nfs4", "study": POSTGRES}, "ok", "nfs4", ""),
    ("hub", {"hub_answers": False}, "note", "does not answer", "HF_HUB_OFFLINE=1"),
    ("hub", {"hub_answers": None, "hub_offline": True}, "ok", "offline", ""),
    ("hub", {"hub_answers": None, "hub_token": "environment"}, "ok", "not asked, HF_TOKEN is set", ""),
    ("model", {"study": study(), "model_is_here": True}, "ok", "is here", ""),
    ("model", {"study": study(), "model_is_here": False}, "note", "not here yet", "fetched"),
    ("model", {"study": study(), "model_is_here": False, "hub_answers": False}, "problem", "neither", "hf download"),
    ("postgresql", {"has_psycopg": False}, "note", "no client", "duet-ray[postgres]"),
    ("postgresql", {"has_psycopg": False, "study": POSTGRES}, "problem", "needs psycopg", "duet-ray[postgres]"),
    ("postgresql", {"pgpass": PGPASS}, "note", "mode 0644", "chmod 600"),
    ("postgresql", {"pgpass": PGPASS, "study": POSTGRES}, "problem", "does not read it", "chmod 600"),
    ("postgresql", {"study": POSTGRES}, "note", "neither PGPASSWORD", ""),
    ("postgresql", {"study": POSTGRES, "database_error": "refused"}, "problem", "ann@host/db: refused", "store"),
    ("postgresql", {"study": POSTGRES, "database_error": "", "has_pgpassword": True}, "ok", "answers", ""),
]


@pytest.mark.parametrize(("about", "changes", "level", "says", "remedy"), CASES, ids=[f"{c[0]}: {c[3]}" for c in CASES])
def test_judgements(about: str, changes: dict[str, Any], level: str, says: str, remedy: str) -> None:
    found = judged(about, **changes)
    assert any(f.level == level and says in f.says and remedy in f.remedy for f in found), found
    assert all(f.remedy for f in found if f.level != "ok"), "there is something to do about each"


def test_code_that_comes_with_a_model_is_named() -> None:
    changed = study(model={"path": "m", "trust_remote_code": True})
    assert any("trust_remote_code is true" in f.says for f in judged("model", study=changed, model_is_here=True))


@pytest.mark.parametrize(
    ("address", "there"),
    [
        (None, None),
        ("auto", None),
        ("local", None),
        ("127.0.0.1:6379", None),
        ("head.example:6379", ("head.example", 8265)),
        ("ray://head.example:10001", ("head.example", 8265)),
        ("https://head.example:443", ("head.example", 443)),
    ],
)
def test_the_dashboard_of_an_address(address: str | None, there: tuple[str, int] | None) -> None:
    assert dashboard_of(address) == there


@contextmanager
def serving(status: int, body: bytes, host: str = "127.0.0.1") -> Iterator[tuple[int, list[dict[str, str]]]]:
    """A stand-in for a dashboard: its port, and the headers of what it was asked."""
    asked: list[dict[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(dict(self.headers) | {"path": self.path})
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer((host, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1], asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "asks"),
    [
        (200, b'{"ray_version": "2.60.0", "version": "4"}', False),
        (401, b"Unauthorized: Missing authentication token", True),
        (401, b"some other server", None),
        (200, b"<html>", None),
        (404, b"", None),
    ],
)
def test_a_dashboard_is_asked_without_a_token(
    monkeypatch: pytest.MonkeyPatch, status: int, body: bytes, asks: bool | None
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "not-to-be-sent-anywhere")
    with serving(status, body, "0.0.0.0") as (port, asked):
        monkeypatch.setattr(facts_module, "DASHBOARD_PORT", port)
        found = [d for d in look(offline=True).dashboards if d.url.endswith(f":{port}")]
    assert len(asked) == 1
    assert asked[0]["path"] == "/api/version"
    assert "not-to-be-sent-anywhere" not in json.dumps(asked)
    if asks is None:
        assert found == []
    else:
        url = f"http://127.0.0.1:{port}"
        assert found == [Dashboard(url=url, listens_on="0.0.0.0", asks_for_token=asks)]


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "token").write_text("a secret that is stored")
    (tmp_path / "token").chmod(0o640)
    (tmp_path / "pgpass").write_text("host:5432:*:ann:word")
    (tmp_path / "pgpass").chmod(0o600)
    environment = {
        **{"HF_HOME": str(tmp_path / "hub"), "HF_TOKEN": "a secret of the hub", "PGPASSWORD": "a secret of a database"},
        **{"RAY_AUTH_TOKEN": "a secret of Ray's", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")},
        **{"PGPASSFILE": str(tmp_path / "pgpass"), "RAY_AUTH_MODE": "token"},
    }
    config = config_from(toy_data(model__path=str(model)), folder=tmp_path)
    found = look(config, offline=True, environment=environment)
    assert found.token_files[0].mode == 0o640
    assert found.token_files[1].mode is None
    assert found.pgpass.mode == 0o600
    assert (found.hub_token, found.hub_answers, found.model_is_here) == ("environment", None, True)
    assert (found.auth_mode, found.ray_token_length) == ("token", 17)
    assert found.storage == str(tmp_path / "studies")
    assert found.storage_free_gib > 0
    assert found.storage_is_writable
    assert found.packages["torch"][1] is not None
    assert "a secret" not in repr(found) + repr(findings(found))


def test_a_closed_storage(tmp_path: Path) -> None:
    config = config_from(toy_data(storage="/proc/nowhere"), folder=tmp_path)
    found = look(config, offline=True)
    assert not found.storage_is_writable or found.storage_free_gib == 0
    assert any(f.level == "problem" for f in findings(found) if f.about == "storage")
