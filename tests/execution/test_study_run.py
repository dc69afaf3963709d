"""Whole studies on a local Ray, and what happens to them when something is killed for real.

Each study runs as its user runs it, as a `duet run` of its own. Faults are placed by `side.py`, a feedback measured
beside the real one that blocks, or kills its own worker, when a file in the study's folder says so.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from duet_ray.config import StudyConfig, load_config
from duet_ray.preflight import preflight
from duet_ray.records import Trial
from duet_ray.selection import SelectionContext, select
from duet_ray.store import Store
from duet_ray.training import load_base
from tests.toy_study import WORDS, toy_data, write_rows, write_study_file, write_toy_study

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

SIDE = '''
"""Side effects on demand: the files hold the number of the call at which it blocks, kills itself or hangs for good."""

import os, signal, time
from pathlib import Path

HERE = Path(__file__).parent


def effect(model, tokenizer):
    with (HERE / "calls.log").open("a") as file:
        file.write("call\\n")
    n_calls = len((HERE / "calls.log").read_text().splitlines())
    if (HERE / "kill-at").exists() and n_calls == int((HERE / "kill-at").read_text()):
        os.kill(os.getpid(), signal.SIGKILL)
    if (HERE / "memory-at").exists() and n_calls >= int((HERE / "memory-at").read_text()):
        (Path((HERE / "cgroup").read_text()) / "cgroup.procs").write_text(str(os.getpid()))
        hoard = [bytearray(os.urandom(1 << 20)) * 16 for _ in range(64)]
    if (HERE / "hang-at").exists() and n_calls == int((HERE / "hang-at").read_text()):
        time.sleep(3600)
    if (HERE / "hold-at").exists() and n_calls >= int((HERE / "hold-at").read_text()):
        (HERE / "holding").touch()
        (HERE / f"holding-{os.getpid()}").touch()
        while (HERE / "hold-at").exists():
            time.sleep(0.05)
    return 0.0
'''


def write_study(folder: Path, **changes: Any) -> Path:
    side = {"kind": "function", "function": "side:effect", "direction": "minimize", "name": "side"}
    path = write_toy_study(folder, also=[side], **changes)
    (folder / "side.py").write_text(SIDE, encoding="utf-8")
    return path


def start(study: Path, *arguments: str, verb: str = "run") -> subprocess.Popen[str]:
    code = "import sys; from duet_ray.cli import main; main()"
    command = [sys.executable, "-c", code, verb, str(study), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def finish(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str]:
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def trials_of(study: Path) -> list[Trial]:
    store = Store(study.parent / "studies" / "toy")
    try:
        return store.trials()
    finally:
        store.close()


def essence(trials: list[Trial]) -> list[Any]:
    """What must not depend on interruptions or on the number of workers: ratios, rows, values, observations."""
    return [
        (
            *(t.number, t.ratio, t.settings, t.fidelity, t.k, t.method, t.status, t.observation),
            [(s.rows_digest, s.value) for s in t.samples],
        )
        for t in trials
    ]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nothing happened to, on one group."""
    study = write_study(tmp_path_factory.mktemp("calm"))
    code, output = finish(start(study))
    assert code == 0, output
    return study


@pytest.fixture
def processes() -> Iterator[list[psutil.Process]]:
    """Processes that a test must not leave behind; ended by their own ids."""
    seen: list[psutil.Process] = []
    yield seen
    for process in seen:
        if process.is_running():
            process.kill()


def test_a_study_runs_to_its_end(calm: Path) -> None:
    trials = trials_of(calm)
    assert [t.name for t in trials][:6] == ["base", "t0000", "t0001", "t0002", "t0003", "t0004"]
    assert [t.method for t in trials][1:6] == ["uniform", "random", "random", "bayesian:lcb", "bayesian:lcb"]
    assert trials[1].ratio is not None
    assert trials[1].ratio.counts == (8, 8, 8)
    for trial in trials[1:6]:
        assert trial.ratio is not None
        assert sum(trial.ratio.counts) == 24
        assert trial.observation is not None
        assert trial.observation.value == min(s.value for s in trial.samples if s.value is not None)
        assert len({s.rows_digest for s in trial.samples}) == 2, "k samples draw different rows"
    assert {t.method for t in trials[6:]} >= {"confirm:t0000"}
    searched = {s.rows_digest for t in trials[:6] for s in t.samples}
    assert not searched & {s.rows_digest for t in trials[6:] for s in t.samples}, "fresh seeds, fresh rows"
    # More of the domain that answers the task is better: the mean of the ratios above and below uniform tells.
    by_share = sorted((t.ratio.counts[0], t.observation.value) for t in trials[1:6] if t.ratio and t.observation)
    assert by_share[-1][1] < by_share[0][1]


def test_what_a_study_leaves_behind(calm: Path) -> None:
    folder = calm.parent / "studies" / "toy"
    adapters = sorted(str(p.relative_to(folder / "artifacts")) for p in folder.glob("artifacts/*/*/adapter"))
    searched = trials_of(calm)[1:6]
    values = sorted((s.value, t.name, s.spec.sample) for t in searched for s in t.samples if s.value)
    kept = {f"{name}/s{sample}/adapter" for _, name, sample in values[:2]}
    uniform = searched[0].observation
    assert uniform is not None
    kept.add(f"t0000/s{uniform.best_sample}/adapter")
    assert set(adapters) == kept, "keep_best: 2, and the uniform ratio's best"
    assert not list((folder / ".ray").glob("*")), "Ray's own files are gone"
    assert (folder / "report.html").is_file()
    assert not [p for p in folder.rglob("*") if p.suffix in (".pkl", ".pickle", ".pt", ".bin")]


def test_a_finished_study_is_not_run_again(calm: Path) -> None:
    before = essence(trials_of(calm))
    code, output = finish(start(calm))
    assert code == 0, output
    assert essence(trials_of(calm)) == before
    assert "starting Ray" not in output


def test_the_driver_is_killed_in_the_middle_of_a_trial(
    calm: Path, tmp_path: Path, processes: list[psutil.Process]
) -> None:
    """kill -9, the same command again, on two groups now: the same study as one that nothing happened to."""
    study = write_study(tmp_path, fleet__groups=2)
    # Call 1 measures the base; with k = 2, call 7 is a sample of the third trial.
    (tmp_path / "hold-at").write_text("7")
    first = start(study)
    wait_for((tmp_path / "holding").exists, first)
    processes += psutil.Process(first.pid).children(recursive=True)
    finished = {p: p.stat().st_mtime_ns for p in tmp_path.glob("studies/toy/artifacts/*/*/result.json")}
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert len(finished) >= 5
    _, alive = psutil.wait_procs(processes, timeout=60)
    for process in alive:
        process.kill()
    half = trials_of(study)
    assert [t.status for t in half] == ["done", "done", "done", "pending"]
    (tmp_path / "hold-at").unlink()
    code, output = finish(start(study))
    assert code == 0, output
    assert essence(trials_of(study)) == essence(trials_of(calm))
    assert {p: p.stat().st_mtime_ns for p in finished} == finished, "a finished sample is not trained again"


def test_a_worker_is_killed(calm: Path, tmp_path: Path) -> None:
    """SIGKILL inside a sample: that sample is done again, alone, and nothing else changes."""
    study = write_study(tmp_path)
    (tmp_path / "kill-at").write_text("4")
    code, output = finish(start(study))
    assert code == 0, output
    trials = trials_of(study)
    assert essence(trials) == essence(trials_of(calm))
    assert [s.n_retries for t in trials for s in t.samples].count(1) == 1
    assert sum(s.n_retries for t in trials for s in t.samples) == 1
    # The model had been trained when its worker died: only the feedback was repeated.
    log = "".join(p.read_text() for p in tmp_path.glob("studies/toy/logs/*.log"))
    assert "was trained already: only its feedback is repeated" in log


@pytest.fixture
def little_memory(tmp_path: Path) -> Iterator[Path]:
    """A control group that may take 64 MB more, where the rights allow to make one; the kernel kills who takes more."""
    one, other = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    root, limit = (one, "memory.limit_in_bytes") if one.is_dir() else (other, "memory.max")
    group = root / f"duet-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(64 << 20))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no control group of memory can be made here: {error}")
    yield group
    for _ in range(100):
        try:
            group.rmdir()
            break
        except OSError:  # the kernel is still at it
            time.sleep(0.05)


def test_the_kernel_kills_a_worker_for_its_memory(calm: Path, tmp_path: Path, little_memory: Path) -> None:
    """Again and again in one sample: it fails with a reason that says what may have been, and the study goes on."""
    study = write_study(tmp_path, sampling={"k": 2, "max_retries": 1})
    (tmp_path / "cgroup").write_text(str(little_memory))
    (tmp_path / "memory-at").write_text("4")
    process = start(study)
    calls = tmp_path / "calls.log"
    wait_for(lambda: calls.is_file() and len(calls.read_text().splitlines()) >= 5, process)
    (tmp_path / "memory-at").unlink()
    code, output = finish(process)
    assert code == 0, output
    [failed] = [s for t in trials_of(study) for s in t.samples if not s.ok]
    assert failed.reason == "its worker died (killed because memory ran out, or its node is lost?) after 1 retry"
    [trial] = [t for t in trials_of(study) if t.number == failed.spec.trial]
    assert trial.observation is not None
    assert (trial.observation.k, trial.observation.k_used) == (2, 1)
    done = {s.spec.key: s.value for t in trials_of(calm)[:2] for s in t.samples}
    assert {s.spec.key: s.value for t in trials_of(study)[:2] for s in t.samples} == done, (
        "what was before is untouched"
    )


def test_two_trials_at_once_on_one_group_or_on_two(tmp_path: Path) -> None:
    """With influence weights, which are scored on the fleet: how many workers there are changes nothing."""
    settings: dict[str, Any] = {
        "search__concurrent_trials": 2,
        "selection": {"method": "influence", "n_fit_rows": 16, "n_hessian_rows": 8, "shard_rows": 20},
        "confirm": {"finalists": 0},
    }
    studies = [write_study(tmp_path / str(n), fleet__groups=n, **settings) for n in (1, 2)]
    for study in studies:
        code, output = finish(start(study))
        assert code == 0, output
        assert "scoring the rows of 3 domains" in output
    one, two = (essence(trials_of(study)) for study in studies)
    assert one == two
    assert [trial[6] for trial in one] == ["done"] * 6


def test_a_worker_is_killed_while_it_scores(tmp_path: Path, processes: list[psutil.Process]) -> None:
    """SIGKILL inside a shard: that shard is measured again, alone, and the scores are those of a calm run."""
    selection = {"method": "influence", "n_fit_rows": 16, "n_hessian_rows": 8, "batch_size": 1, "shard_rows": 9}
    killed = write_study(tmp_path, selection=selection)
    process = start(killed, verb="score")
    scoring = killed.parent / "studies" / "toy" / "scoring"
    wait_for(lambda: list(scoring.glob("apples-*/00001.npy")), process)
    workers = [c for c in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in c.name()]
    assert workers, "a worker process is found by the name that Ray gives it"
    workers[0].kill()
    code, output = finish(process)
    assert code == 0, output
    log = (killed.parent / "studies" / "toy" / "logs" / "group-0.log").read_text()
    leases = Counter(line.split(": lease")[0].split()[-1] for line in log.splitlines() if ": lease" in line)
    assert [leases[f"prepare-{name}"] for name in WORDS] == [1, 1, 1], "what all rows share is not done again"
    assert 0 < sum(n - 1 for n in leases.values()) <= 1, "one task was under way, and is done again"
    ready = preflight(load_config(killed))
    for domain, weights in zip(ready.scoring_domains, ready.weights(), strict=True):
        calm = select(domain, context_of(ready.config))
        np.testing.assert_array_equal(weights.scores, calm.scores)


def test_a_domain_that_cannot_be_scored_costs_no_other(tmp_path: Path) -> None:
    """Predictions that are never good enough, for two domains; the third is small enough to be scored exactly."""
    selection = {"method": "influence", "n_fit_rows": 16, "n_hessian_rows": 8, "n_exact_rows": 40}
    study = write_study(tmp_path, selection={**selection, "min_rank_correlation": 1.0})
    write_rows(tmp_path / "data" / "bricks.jsonl", WORDS["bricks"], 30)
    code, output = finish(start(study, verb="score"))
    assert code == 1
    for name in ("apples", "clouds"):
        assert f"domain {name}: " in output
    assert "domain bricks: " not in output
    assert "selection.min_rank_correlation" in output
    weights = preflight(load_config(study)).weights()
    assert [w is not None for w in weights] == [False, True, False], "what could be scored is kept"


def context_of(config: StudyConfig) -> SelectionContext:
    """Scores a domain in this process, without a fleet."""
    return SelectionContext(
        settings=config.selection, training=config.training, seed=config.seed, load_base=lambda: load_base(config)
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_pauses_and_the_same_command_goes_on(calm: Path, tmp_path: Path, number: signal.Signals) -> None:
    study = write_study(tmp_path)
    (tmp_path / "hold-at").write_text("5")
    first = start(study)
    wait_for((tmp_path / "holding").exists, first)
    second = start(study)
    code, output = finish(second)
    assert code == 1
    assert f"study toy is already run by process {first.pid} on " in output
    children = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(number)
    code, output = finish(first, 120)
    assert code == 130, output
    assert f"To go on: duet run {study}" in output
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, "children are stopped"
    (tmp_path / "hold-at").unlink()
    code, output = finish(start(study))
    assert code == 0, output
    assert essence(trials_of(study)) == essence(trials_of(calm))


def test_every_sample_fails(tmp_path: Path) -> None:
    """A learning rate that ends in NaN: no value is made up, the exit code says so, the reason comes first."""
    study = write_study(tmp_path, training__learning_rate=1e30, search={"n_start": 2, "n_trials": 1})
    code, output = finish(start(study))
    assert code == 1
    assert "error: every trial failed: " in output
    assert "(6 of 6 samples)" in output
    trials = trials_of(study)
    assert [t.status for t in trials] == ["done", "failed", "failed", "failed"]
    assert all(s.value is None and s.reason for t in trials[1:] for s in t.samples)
    code, again = finish(start(study))
    assert code == 1
    assert "error: every trial failed: " in again
    assert "starting Ray" not in again


def test_the_base_cannot_be_measured(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    feedback = {"kind": "function", "function": "side:no_number", "direction": "minimize"}
    write_study_file(tmp_path, toy_data(feedback=feedback, sampling__max_retries=1))
    (tmp_path / "side.py").write_text("def no_number(model, tokenizer):\n    return float('nan')\n")
    code, output = finish(start(study))
    assert code == 1
    assert "the untouched model cannot be measured, so nothing was trained" in output
    assert "side:no_number" in output
    code, again = finish(start(study))
    assert code == 1
    assert "nothing was trained" in again


def test_the_feedback_goes_away_and_comes_back(calm: Path, tmp_path: Path) -> None:
    """No feedback is nobody's failure: the study pauses, the models are kept, and the same command asks again."""
    study = write_study(tmp_path)
    data = toy_data(feedback={"kind": "function", "function": "rating:rate", "direction": "minimize"})
    write_study_file(tmp_path, {**data, "search": {"n_start": 2, "n_trials": 0}, "confirm": {"finalists": 0}})
    (tmp_path / "rating.py").write_text(
        "from pathlib import Path\n"
        "def rate(model, tokenizer):\n"
        "    calls = Path(__file__).with_name('calls')\n"
        "    calls.write_text(calls.read_text() + 'x' if calls.exists() else 'x')\n"
        "    if len(calls.read_text()) >= 4 and not Path(__file__).with_name('back').exists():\n"
        "        raise ConnectionError('the rating service is away')\n"
        "    return 1.0\n"
    )
    code, output = finish(start(study))
    assert code == 1
    assert "no feedback: " in output
    assert "the rating service is away" in output
    assert "start the same command again when it is mended" in output
    assert [t.status for t in trials_of(study)] == ["done", "done", "pending"]
    trained = {p: p.stat().st_mtime_ns for p in tmp_path.glob("studies/toy/artifacts/*/*/trained.json")}
    (tmp_path / "back").touch()
    code, output = finish(start(study))
    assert code == 0, output
    assert [t.status for t in trials_of(study)] == ["done", "done", "done"]
    assert {p: p.stat().st_mtime_ns for p in trained} == trained


JUDGE = '''
"""The more is learned the better, and the nearer the rank is to 8: it depends on all that is searched."""


def judge(model, tokenizer):
    own = sorted((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    rank = own[0][1].shape[1] if own else 0
    return float(sum(p.abs().mean() for _, p in own)) - 0.01 * abs(rank - 8)
'''


def test_settings_fidelity_and_k_go_on_where_a_killed_driver_left_them(
    tmp_path: Path, processes: list[psutil.Process]
) -> None:
    """Everything that may differ between trials at once: killed, and on two groups, as calm and on one."""
    changes: dict[str, Any] = {
        "feedback": {"kind": "function", "function": "judge:judge", "direction": "maximize"},
        "sampling": {"k": "auto", "k_bounds": [1, 2]},
        "search": {
            "n_start": 2,
            "n_trials": 2,
            "optimize": "both",
            "also": {"training.rank": {"choices": [2, 8]}, "training.learning_rate": {"log": [1e-3, 3e-2]}},
            "fidelity": {"rows": [0.5]},
            "recommend": "anywhere",
        },
    }
    studies = [write_study(tmp_path / name, fleet__groups=n, **changes) for name, n in (("calm", 1), ("killed", 2))]
    for study in studies:
        (study.parent / "judge.py").write_text(JUDGE, encoding="utf-8")
    calm, killed = studies
    code, output = finish(start(calm))
    assert code == 0, output
    (killed.parent / "hold-at").write_text("5")
    first = start(killed)
    wait_for((killed.parent / "holding").exists, first)
    processes += psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.wait()
    _, alive = psutil.wait_procs(processes, timeout=60)
    for process in alive:
        process.kill()
    (killed.parent / "hold-at").unlink()
    code, output = finish(start(killed))
    assert code == 0, output
    trials = trials_of(calm)
    assert essence(trials_of(killed)) == essence(trials)
    searched = [t for t in trials if t.kind in ("start", "search")]
    assert sum(t.fidelity for t in searched) == pytest.approx(4, abs=0.5)
    assert searched[0].fidelity == 1
    for trial in searched:
        assert trial.k is not None
        assert len(trial.samples) == trial.k
        for sample in trial.samples:
            assert sample.train["n_rows"] == round(24 * trial.fidelity)
            assert sample.spec.settings == trial.settings
            if sample.adapter and (folder := calm.parent / "studies" / "toy" / sample.adapter).is_dir():
                about = json.loads((folder / "adapter_config.json").read_text())
                assert about["r"] == dict(trial.settings)["training.rank"]
    again = [t for t in trials if t.kind == "confirm"]
    assert all(t.fidelity == 1 for t in again)
    stores = [Store(study.parent / "studies" / "toy") for study in studies]
    assert stores[0].posterior() == stores[1].posterior()
    assert set(stores[0].posterior()) == {t.number for t in searched}
    code, output = finish(start(killed))
    assert "starting Ray" not in output, "it is complete"


def test_more_than_there_is(tmp_path: Path) -> None:
    study = write_study(tmp_path, fleet__groups=100)
    code, output = finish(start(study))
    assert code == 1
    assert "fleet: needs 100 CPUs (100 groups × 1 workers × 1) and there are" in output
    assert "lower fleet.groups or fleet.cpus_per_worker" in output


def test_json_is_all_that_stands_on_standard_output(calm: Path) -> None:
    code = "import sys; from duet_ray.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code, "status", str(calm), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(ended.stdout)["study"] == "toy"
