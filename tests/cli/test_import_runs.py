"""`duet import-runs` as its user meets it: before a study, on a started one, again, and on a running one."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from duet_ray.cli.app import app
from duet_ray.config import load_config
from duet_ray.errors import DataError, DuetError, StudyChanged, StudyLocked
from duet_ray.store import Store
from duet_ray.study import Study
from tests.cli.test_cli import duet
from tests.toy_study import write_rows, write_toy_study

ROWS = ["1,0,0,1.5", "0.5,0.5,0,2.5", "0.25,0.25,0.505,3.5"]


def write_runs(folder: Path, rows: list[str], header: str = "apples,bricks,clouds,loss") -> Path:
    path = folder / "runs.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def stored(study: Study) -> list[tuple[tuple[int, ...], float, str]]:
    store = Store(study.folder)
    found = [(run.counts, run.value, run.source) for run in store.past_runs()]
    store.close()
    return found


def invoke(*arguments: object) -> str:
    """The refusal, within this process."""
    result = CliRunner().invoke(app, ["import-runs", *map(str, arguments)])
    assert isinstance(result.exception, DuetError), result.exception
    return str(result.exception)


def toy(folder: Path, **changes: Any) -> Study:
    return Study(load_config(write_toy_study(folder, **changes)))


def test_runs_are_imported_before_the_study_has_started(tmp_path: Path) -> None:
    study = write_toy_study(tmp_path)
    runs = write_runs(tmp_path, [*ROWS, "0,0,1,4.5"])
    code, output, said = duet("import-runs", study, runs, "--set", "domains[2].bounds=[0, 0.75]")
    assert (code, output) == (0, ""), said
    lines = said.splitlines()
    tail = lines[next(i for i, line in enumerate(lines) if "runs read" in line) :]
    assert tail == [
        "4 runs read, 3 imported; value: loss",
        "1 run renormalised: the shares summed to 1 only within 1 %",
        "1 run lies outside the study's bounds, constraints or the rows there are, and is left out (line 5)",
        "each run counts as one sample; a trial's observation is the best of its samples (sampling.k)",
        "best of them: 1.5, with apples 100 % (runs.csv:2)",
        f"next: duet run {study} --set 'domains[2].bounds=[0, 0.75]'",
    ]
    opened = Study(load_config(study, ["domains[2].bounds=[0, 0.75]"]))
    assert stored(opened) == [
        ((24, 0, 0), 1.5, "runs.csv:2"),
        ((12, 12, 0), 2.5, "runs.csv:3"),
        ((6, 6, 12), 3.5, "runs.csv:4"),
    ]


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path: Path) -> None:
    study = toy(tmp_path)
    runs = write_runs(tmp_path, ROWS)
    code, output, said = duet("import-runs", tmp_path / "study.yaml", runs, "--dry-run", "--json")
    assert code == 0, said
    data = json.loads(output)
    assert (data["n_read"], data["n_imported"], data["n_new"], data["dry_run"]) == (3, 0, 3, True)
    assert data["best"]["ratio"] == {"apples": 1.0, "bricks": 0.0, "clouds": 0.0}
    assert not study.folder.exists()
    study.import_runs(runs)
    again = study.import_runs(runs, dry_run=True)
    assert (again.new, again.n_known) == ((), 3)


def test_the_same_file_again_has_no_effect_and_a_longer_one_adds_its_end(tmp_path: Path) -> None:
    study = toy(tmp_path)
    assert len(study.import_runs(write_runs(tmp_path, ROWS)).new) == 3
    before = stored(study)
    assert study.import_runs(write_runs(tmp_path, ROWS)).new == ()
    assert stored(study) == before
    longer = study.import_runs(write_runs(tmp_path, ["0,1,0,9", *ROWS]))
    assert [run.counts for run in longer.new] == [(0, 24, 0)]
    assert len(stored(study)) == 4


def test_a_bad_file_leaves_nothing_behind(tmp_path: Path) -> None:
    write_toy_study(tmp_path)
    runs = write_runs(tmp_path, [*ROWS, "0.5,0.6,0,1", "0.5,0.5,0,nan"])
    code, output, said = duet("import-runs", tmp_path / "study.yaml", runs)
    assert (code, output) == (1, "")
    assert "runs.csv:5: the shares must sum to 1 (within 1 %), got 1.1\n" in said
    assert "runs.csv:6: loss must be finite, got nan" in said
    assert "Traceback" not in said
    assert not (tmp_path / "studies" / "toy").exists()


def test_strict_refuses_what_would_be_left_out(tmp_path: Path) -> None:
    write_toy_study(tmp_path)
    runs = write_runs(tmp_path, ROWS)
    bounds = ("--set", "domains[0].bounds=[0, 0.9]")
    refused = invoke(tmp_path / "study.yaml", runs, "--strict", *bounds)
    assert "outside the study's bounds, constraints or the rows there are: line 2; widen" in refused


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--column", "apples"), "--column apples: must be DOMAIN=NAME, for instance --column maths=share_of_maths"),
        (("--column", "apples=a", "--column", "apples=b"), "--column apples=b: the column of apples is given twice"),
        (("--fidelity", "0.5"), "runs of a fidelity below 1 need search.fidelity in the study"),
        (("--fidelity", "2"), "the fidelity must be a share of a whole trial, above 0 and up to 1, got 2"),
        (("--fidelity", "size"), "there is no column 'size' for the fidelity"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: tuple[str, ...], expected: str) -> None:
    write_toy_study(tmp_path)
    assert expected in invoke(tmp_path / "study.yaml", write_runs(tmp_path, ROWS), *options)


def test_a_running_study_is_refused_as_a_second_driver_is(tmp_path: Path) -> None:
    study = toy(tmp_path)
    runs = write_runs(tmp_path, ROWS)
    with study._session(None):
        with pytest.raises(StudyLocked, match="study toy is already run by process"):
            study.import_runs(runs)
        assert len(study.import_runs(runs, dry_run=True).new) == 3
    assert len(study.import_runs(runs).new) == 3


def test_the_study_stays_what_it_was_started_as(tmp_path: Path) -> None:
    """An import starts the study: what it changes for a resume is what a run would."""
    study = toy(tmp_path)
    runs = write_runs(tmp_path, ROWS)
    study.import_runs(runs)
    store = Store(study.folder)
    record = store.study()
    store.close()
    assert record is not None
    assert (record.status, record.resolved) == ("new", {}), "what auto stands for is found where the study runs"
    other = Study(load_config(tmp_path / "study.yaml", ["training.rank=8"]))
    for act in (other.run, lambda: other.import_runs(runs), lambda: other.import_runs(runs, dry_run=True)):
        with pytest.raises(StudyChanged, match=r"another study file:\n  training.rank: 4 -> 8"):
            act()
    write_rows(tmp_path / "data" / "bricks.jsonl", "xyxy", 60)
    for act in (study.run, lambda: study.import_runs(runs)):
        with pytest.raises(StudyChanged, match="started with other data: domain bricks"):
            act()


def test_the_status_of_a_started_study_is_kept(tmp_path: Path) -> None:
    study = toy(tmp_path)
    with study._session(None):
        pass
    store = Store(study.folder)
    before = store.study()
    study.import_runs(write_runs(tmp_path, ROWS))
    after = store.study()
    store.close()
    assert before is not None
    assert after is not None
    assert (after.status, after.resolved) == (before.status, before.resolved)


def test_status_and_report_of_a_study_with_past_runs_only(tmp_path: Path) -> None:
    study = toy(tmp_path)
    study.import_runs(write_runs(tmp_path, ROWS))
    for verb in ("status", "report"):
        code, _, said = duet(verb, tmp_path / "study.yaml")
        assert "Traceback" not in said
        assert code == 0, said


def test_values_are_in_the_users_direction(tmp_path: Path) -> None:
    feedback = {"kind": "function", "function": "scores:score", "direction": "maximize"}
    (tmp_path / "scores.py").write_text("def score(model, tokenizer):\n    return 1.0\n", encoding="utf-8")
    study = toy(tmp_path, feedback=feedback)
    found = study.import_runs(write_runs(tmp_path, ROWS))
    assert found.best(study.config.direction).value == 3.5
    with sqlite3.connect(study.folder / "study.db") as connection:
        assert connection.execute("SELECT value FROM past_run ORDER BY id").fetchall() == [(1.5,), (2.5,), (3.5,)]


def test_every_run_outside_is_an_error(tmp_path: Path) -> None:
    study = toy(tmp_path, search__constraints=["clouds >= 0.75"])
    with pytest.raises(DataError, match="the rows there are: every run; widen"):
        study.import_runs(write_runs(tmp_path, ROWS))
