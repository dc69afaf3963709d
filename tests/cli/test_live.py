"""What a run shows while it runs, on a terminal and in a log."""

import io
from pathlib import Path
from typing import Any

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
    spec = SampleSpec(trial=1, sample=0, kind="start", ratio=Ratio(counts=(24, 0, 0)))
    return InFlight(task=Task(key="t0001-s0@0.5", kind="compare", spec=spec), stage=stage, done=done, total=3)


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
        watcher.tick([under_way("training", 2)])
    text = shown.getvalue()
    for expected in ("t0000", "2.250", "searching", "training 2/3"):
        assert expected in text


def scoring(watcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two domains of 30 rows: one is measured at 2 rows a second, the other waits; then both are done."""
    watcher.phase("scoring the rows of 2 domains")
    watcher.scored("apples", 0, 30)
    watcher.scored("bricks", 0, 30)
    task = Task(key="score-apples-0", kind="score", domain=0, shard=0)
    for now, done in ((1e6, 10), (1e6 + 5, 20)):
        monkeypatch.setattr(live.time, "monotonic", lambda now=now: now)
        watcher.tick([InFlight(task=task, stage="score", done=done, total=30)])
    for name in ("apples", "bricks"):
        for _ in range(2):
            watcher.scored(name, 30, 30)
    watcher.tick([])


def test_the_live_table_shows_the_scoring(config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _console(monkeypatch, terminal=True)
    with live.LiveWatcher(config) as watcher:
        scoring(watcher, monkeypatch)
    text = shown.getvalue()
    assert "33 % of 60 rows measured, about 20 s left" in text
    assert "apples 20 of 30 rows, 1 waiting" in text
    last = text.rsplit("scoring the rows", 1)[1]
    assert "measured" not in last, "when all is weighed there is nothing more to say"


def test_a_bar_for_every_domain_while_only_scoring(config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _console(monkeypatch, terminal=True)
    with live.ScoreWatcher(config) as watcher:
        scoring(watcher, monkeypatch)
    text = " ".join(shown.getvalue().replace("━", "").split())
    assert "apples 20 of 30 66 % measuring" in text
    assert "bricks 0 of 30 0 % waiting" in text
    assert "33 % of 60 rows measured, about 20 s left" in text
    assert "bricks 30 of 30 100 % done" in text


def test_a_log_of_the_scoring(config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _console(monkeypatch, terminal=False)
    monkeypatch.setattr(live, "TICK_SECONDS", 3.0)
    with live.LogWatcher(config, with_trials=False) as watcher:
        scoring(watcher, monkeypatch)
    lines = [line[10:] for line in shown.getvalue().splitlines()]
    assert lines == [
        "scoring the rows of 2 domains",
        "  16 % of 60 rows measured: apples 10 of 30 rows, 1 waiting",
        "  33 % of 60 rows measured, about 20 s left: apples 20 of 30 rows, 1 waiting",
        "apples: 30 rows measured",
        "bricks: 30 rows measured",
    ]


@pytest.mark.parametrize("kind", [live.LogWatcher, live.LiveWatcher])
def test_the_store_is_read_once_a_second(kind: Any, config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    _console(monkeypatch, terminal=kind is live.LiveWatcher)
    reads = []
    read = live._StudyReader.read
    monkeypatch.setattr(live._StudyReader, "read", lambda self: reads.append(1) or read(self))
    monkeypatch.setattr(live.time, "monotonic", lambda: 100.0)
    watcher = kind(config)
    for _ in range(5):
        watcher.changed()
        watcher.tick([])
    assert len(reads) == 1
    monkeypatch.setattr(live.time, "monotonic", lambda: 101.5)
    watcher.tick([])
    watcher.tick([])
    assert len(reads) == 2, "what came meanwhile is not forgotten"
