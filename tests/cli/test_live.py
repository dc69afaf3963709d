"""What a run shows while it runs, on a terminal and in a log."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from duet_ray.cli import live
from duet_ray.config import StudyConfig, config_from
from duet_ray.execution.broker import InFlight, Task
from duet_ray.records import Observation, Ratio, SampleResult, SampleSpec
from duet_ray.report.from_store import read_summary
from duet_ray.store import Store
from tests.toy_study import toy_data


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    """A study of 5 planned trials with k = 2, of which the first has ended; each sample took 10 seconds."""
    config = config_from(toy_data(fleet__groups=2), folder=tmp_path)
    with Store(config.study_folder, create=True).writing() as store:
        store.create_study(name="toy", config=config.model_dump(mode="json"), versions={})
        store.add_trial(0, "start", Ratio(counts=(8, 8, 8)), "uniform")
        for sample, value in enumerate((2.5, 2.25)):
            spec = SampleSpec(trial=0, sample=sample, kind="start", ratio=Ratio(counts=(8, 8, 8)))
            store.add_sample(SampleResult(spec=spec, value=value, train_seconds=8.0, feedback_seconds=2.0))
        store.add_observation(0, Observation(value=2.25, k=2, k_used=2, best_sample=1))
        store.add_trial(1, "start", Ratio(counts=(24, 0, 0)), "random")
    return config


def under_way(stage: str, done: int) -> InFlight:
    return InFlight(task=Task(key="t0001-s0", kind="sample"), stage=stage, done=done, total=3)


def _console(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> io.StringIO:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=110, height=40, color_system=None)
    monkeypatch.setattr(live, "err", console)
    return shown


def test_time_left_by_hand(config: StudyConfig) -> None:
    # 4 trials of 2 samples and 2 confirmations are left: 10 samples of 10 s, two at a time.
    assert live.seconds_left(config, read_summary(config.study_folder)) == pytest.approx(50.0)


def test_a_log_says_each_thing_once(config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _console(monkeypatch, terminal=False)
    with live.LogWatcher(config) as watcher:
        watcher.phase("searching")
        watcher.changed()
        watcher.tick([under_way("training", 1)])
        monkeypatch.setattr(live.time, "monotonic", lambda: 1e12)
        watcher.tick([under_way("training", 2)])
    lines = shown.getvalue().splitlines()
    assert sum("t0000 start uniform" in line for line in lines) == 1
    assert sum("searching" in line for line in lines) == 1
    assert sum("training" in line for line in lines) == 1, "what is under way is said now and then"


def test_the_live_table_shows_what_is_under_way(config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _console(monkeypatch, terminal=True)
    with live.LiveWatcher(config) as watcher:
        watcher.phase("searching")
        watcher.changed()
        score = Task(key="score-apples-0", kind="score", domain=0, shard=0)
        watcher.tick([under_way("training", 2), InFlight(task=score, stage="fit", done=1, total=4)])
    text = shown.getvalue()
    for expected in ("t0000", "2.250", "searching", "training 2/3", "score-apples", "fit 1/4"):
        assert expected in text
