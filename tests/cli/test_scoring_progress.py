"""How far the scoring is, by hand; and what a run tells of it."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from duet_ray.cli.scoring_progress import ScoringProgress
from duet_ray.config import StudyConfig, config_from
from duet_ray.execution.broker import InFlight, Outcome, Task, TaskKind
from duet_ray.execution.study_run import SilentWatcher, StudyRun
from tests.toy_study import toy_data


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    """Domains apples, bricks and clouds, in shards of 20 rows."""
    return config_from(toy_data(selection={"method": "influence", "shard_rows": 20}), folder=tmp_path)


def under_way(kind: TaskKind, domain: int, shard: int | None = None, *, stage: str = "", at: str = "0/0") -> InFlight:
    done, total = map(int, at.split("/"))
    task = Task(key=f"{kind}-{domain}-{shard}", kind=kind, domain=domain, shard=shard)
    return InFlight(task=task, stage=stage, done=done, total=total)


def drawn(progress: ScoringProgress, *, most: int | None = None, encoding: str = "utf-8") -> str:
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=shown, force_terminal=True, width=80, color_system=None, _environ={}).print(progress.bars(most))
    shown.seek(0)
    return shown.read()


def test_rows_and_time_left_by_hand(config: StudyConfig) -> None:
    progress = ScoringProgress(config)
    progress.scored("apples", 0, 50)
    progress.scored("bricks", 0, 30)
    progress.tick([under_way("prepare", 0, stage="fit", at="3/10")], 100.0)
    assert (progress.n_done, progress.n_rows, progress.seconds_left) == (0, 80, None)
    assert progress.headline == "0 % of 80 rows measured"
    assert progress.details() == "apples preparing: fit 3/10, 1 waiting"
    progress.tick([under_way("score", 0, 0)], 110.0)
    assert progress.seconds_left is None, "nothing before the first rows"
    progress.tick([under_way("score", 0, 0, at="4/20")], 120.0)
    assert progress.seconds_left is None, "one look shows no speed"
    # 20 rows of the first shard and half of the last one, which has 10 rows: 25 - 4 = 21 rows in 7 s.
    progress.scored("apples", 20, 50)
    progress.tick([under_way("score", 0, 2, at="5/10"), under_way("prepare", 1)], 127.0)
    assert progress.n_done == 25
    assert progress.seconds_left == pytest.approx(55 / 3)
    assert progress.headline == "31 % of 80 rows measured, about 18 s left"
    assert progress.details() == "apples 25 of 50 rows, bricks preparing"


def test_the_share_of_a_shard_counts_whatever_its_worker_counts_in(config: StudyConfig) -> None:
    progress = ScoringProgress(config)
    progress.scored("apples", 0, 50)
    progress.tick([under_way("score", 0, 1, at="1/4")], 0.0)
    assert progress.n_done == 5


def test_rows_of_an_earlier_session_are_no_speed(config: StudyConfig) -> None:
    progress = ScoringProgress(config)
    progress.scored("apples", 0, 1000)
    for n_done in range(20, 901, 20):
        progress.scored("apples", n_done, 1000)
    progress.tick([under_way("score", 0, 45, at="2/20")], 1.0)
    progress.tick([under_way("score", 0, 45, at="12/20")], 6.0)
    assert progress.seconds_left == pytest.approx(88 / 2), "2 rows a second, and not 180"


def test_from_waiting_to_done(config: StudyConfig) -> None:
    progress = ScoringProgress(config)
    assert not progress.is_under_way
    progress.scored("apples", 0, 20)
    progress.scored("apples", 0, 20)
    assert progress.is_under_way
    progress.scored("apples", 20, 20)
    progress.tick([under_way("weigh", 0)], 5.0)
    assert progress.details() == "apples weighing"
    assert progress.headline == "100 % of 20 rows measured"
    assert progress.is_under_way
    progress.scored("apples", 20, 20)
    progress.tick([], 6.0)
    assert not progress.is_under_way
    assert progress.details() == "1 done"


def test_many_domains_are_counted(tmp_path: Path) -> None:
    names = [f"d{i}" for i in range(12)]
    data = toy_data(domains=[{"name": n, "source": "x.jsonl"} for n in names])
    progress = ScoringProgress(config_from(data, folder=tmp_path))
    for name in names:
        progress.scored(name, 0, 10)
    progress.tick([under_way("prepare", i) for i in range(5)], 0.0)
    assert progress.details(most=2) == "d0 preparing, d1 preparing, 3 more under way, 7 waiting"
    lines = drawn(progress, most=6).splitlines()
    assert [line.split()[0] for line in lines] == ["d0", "d1", "d2", "d3", "d4", "7"]


@pytest.mark.parametrize(("encoding", "bar"), [("utf-8", "━"), ("ascii", "-")])
def test_a_bar_for_every_domain(config: StudyConfig, encoding: str, bar: str) -> None:
    progress = ScoringProgress(config)
    progress.scored("apples", 0, 2000)
    progress.scored("bricks", 0, 30)
    progress.scored("apples", 500, 2000)
    progress.tick([under_way("score", 0, 30, at="1/20"), under_way("prepare", 1, stage="fit", at="1/4")], 0.0)
    apples, bricks = drawn(progress, encoding=encoding).splitlines()
    assert " ".join(apples.replace(bar, "").split()).endswith("501 of 2,000 25 % measuring")
    assert " ".join(bricks.replace(bar, "").split()).endswith("0 of 30 0 % preparing: fit 1/4")
    assert bar in apples


class Listener(SilentWatcher):
    def __init__(self) -> None:
        self.heard: list[tuple[str, int, int]] = []

    def scored(self, domain: str, n_done: int, n_rows: int) -> None:
        self.heard.append((domain, n_done, n_rows))


def test_a_run_tells_of_every_shard(config: StudyConfig) -> None:
    """The steps of one domain of 50 rows without Ray: outcomes are recorded as they come, in any order."""
    nothing: Any = None
    listener = Listener()
    run = StudyRun(
        config=config, store=nothing, space=nothing, assignment=nothing, unscored=[1], n_train=[9, 50, 9],
        watcher=listener,
    )  # fmt: skip

    def ended(tasks: Any) -> list[Outcome]:
        return [Outcome(task=task, status="done", result={}) for task in tasks]

    way = run._weigh(1)
    shards = way.send(ended(next(way)))
    assert [task.shard for task in shards] == [0, 1, 2]
    outcomes = ended(shards)
    for place in (2, 0, 1):
        run._record(outcomes[place])
    weigh = way.send(outcomes)
    with pytest.raises(StopIteration) as end:
        way.send(ended(weigh))
    assert end.value.value is None
    assert [n_done for _, n_done, _ in listener.heard] == [0, 0, 10, 30, 50, 50]
    assert {(name, n_rows) for name, _, n_rows in listener.heard} == {("bricks", 50)}


def test_a_shard_that_failed_is_not_told(config: StudyConfig) -> None:
    nothing: Any = None
    listener = Listener()
    run = StudyRun(
        config=config, store=nothing, space=nothing, assignment=nothing, unscored=[0], n_train=[50, 9, 9],
        watcher=listener,
    )  # fmt: skip
    task = Task(key="score-apples-0", kind="score", domain=0, shard=0)
    run._record(Outcome(task=task, status="done", result={"error": "no gradient"}))
    run._record(Outcome(task=task, status="failed", reason="its worker died"))
    run._record(Outcome(task=task, status="stopped"))
    assert listener.heard == []
