"""A study that ran to its end holds no pickle and no secret, though secrets were put in its way everywhere."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from duet_ray.store import Store
from tests.safety.no_pickle import assert_no_pickle
from tests.toy_study import WORDS, write_toy_study

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

OF_THE_ENVIRONMENT = "plain-words-of-mine"
OF_AN_ERROR = "hf_" + "Er1" * 12
OF_A_ROW = "hf_" + "Ro2" * 12
SECRETS = (OF_THE_ENVIRONMENT, OF_AN_ERROR, OF_A_ROW)

LEAKY = f'''
"""Feedback that fails now and then, and says too much when it does."""

import os
from pathlib import Path

from duet_ray.errors import NoValueError

CALLS = Path(__file__).parent / "calls.log"


def value(model, tokenizer):
    with CALLS.open("a") as file:
        file.write("call\\n")
    if len(CALLS.read_text().splitlines()) % 3 == 0:
        raise NoValueError(f"the server refused {{os.environ['HF_TOKEN']}} and {OF_AN_ERROR}")
    return 1.0


def beside(model, tokenizer):
    raise RuntimeError(f"nobody is logged in: {{os.environ['HF_TOKEN']}}, {OF_AN_ERROR}")
'''


@dataclass(frozen=True)
class Finished:
    folder: Path
    output: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("leaky")
    function = {"kind": "function", "direction": "minimize"}
    study = write_toy_study(
        folder,
        domains=[
            {"name": "apples", "source": "data/apples.jsonl"},
            {"name": "bricks", "source": "data/bricks.jsonl"},
            {"name": "clouds", "source": "data/clouds.jsonl", "format": "messages"},
        ],
        data={"max_bad_rows": 2},
        feedback={**function, "function": "leaky:value", "name": "value"},
        also=[{**function, "function": "leaky:beside", "name": "beside"}],
        confirm={"finalists": 0},
    )
    (folder / "leaky.py").write_text(LEAKY, encoding="utf-8")
    with (folder / "data" / "apples.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": f"log in with {OF_A_ROW}:", "completion": WORDS["apples"]}) + "\n")
    with (folder / "data" / "clouds.jsonl").open("w") as file:
        for number in range(60):
            turns = [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": f"qp{number}"}]
            file.write(json.dumps({"messages": turns}) + "\n")
        file.write(json.dumps({"messages": [{"role": OF_A_ROW, "content": "x"}]}) + "\n")
    command = [sys.executable, "-c", "from duet_ray.cli import main; main()", "run", str(study), "--plain"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_TOKEN": OF_THE_ENVIRONMENT}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return Finished(folder / "studies" / "toy", ended.stdout + ended.stderr)


def test_there_is_no_pickle_in_it(finished: Finished) -> None:
    assert assert_no_pickle(finished.folder.parent) > 15, "the cache of its storage is looked at too"
    names = {path.name for path in finished.folder.rglob("*")}
    assert {"study.db", "study.yaml", "report.html", "adapter_model.safetensors", "group-0.log"} <= names


def test_there_is_no_secret_in_it(finished: Finished) -> None:
    leaks = [
        f"{secret} in {path.relative_to(finished.folder)}"
        for path in sorted(finished.folder.rglob("*"))
        if path.is_file()
        for secret in SECRETS
        if secret.encode() in path.read_bytes()
    ]
    assert leaks == []
    assert not [secret for secret in SECRETS if secret in finished.output]


def test_the_secrets_were_there_to_be_found(finished: Finished) -> None:
    """What stands in their place."""
    log = (finished.folder / "logs" / "group-0.log").read_text()
    assert "nobody is logged in: [redacted], [redacted]" in log
    assert "Traceback" in log
    assert "the server refused [redacted] and [redacted]" in log
    assert OF_A_ROW in (finished.folder.parent.parent / "data" / "apples.jsonl").read_text()


def test_what_failed_for_good_is_stored_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Finished
) -> None:
    """A copy of the study's store, told of one more failure."""
    monkeypatch.setenv("HF_TOKEN", OF_THE_ENVIRONMENT)
    folder = Path(shutil.copytree(finished.folder, tmp_path / "toy"))
    store = Store(folder)
    try:
        trial = next(trial for trial in store.trials() if trial.samples)
        reason = f"{OF_THE_ENVIRONMENT} and {OF_AN_ERROR}"
        last = trial.samples[0]
        failed = replace(last, spec=replace(last.spec, sample=99), value=None, reason=reason, adapter=None)
        with store.writing():
            assert store.add_sample(failed)
        reasons = [sample.reason for one in store.trials() for sample in one.samples if sample.reason]
    finally:
        store.close()
    assert reasons == ["[redacted] and [redacted]"]
    for path in folder.rglob("study.db*"):
        assert OF_THE_ENVIRONMENT.encode() not in path.read_bytes()
        assert OF_AN_ERROR.encode() not in path.read_bytes()
