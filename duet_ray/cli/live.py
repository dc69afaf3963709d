"""Watching a run: a live table where there is a terminal, log lines where there is none."""

import threading
import time
from collections.abc import Sequence
from typing import Any, Self

from rich.console import Group
from rich.live import Live
from rich.text import Text

from duet_ray.cli.console import err
from duet_ray.config import StudyConfig
from duet_ray.execution.broker import InFlight
from duet_ray.records import CONFIRM_FIRST

TICK_SECONDS = 30.0
"""How often a log says what is under way."""


class LogWatcher:
    """One line for each phase and each trial that ends, and now and then what is under way."""

    def __init__(self, config: StudyConfig | None = None) -> None:
        self._config = config
        self._said: set[int] = set()
        self._lock = threading.Lock()
        self._next_tick = time.monotonic() + TICK_SECONDS

    def __enter__(self) -> Self:
        self.changed()
        return self

    def __exit__(self, *_: object) -> None:
        self.changed()

    def phase(self, text: str) -> None:
        self._line(text)

    def tick(self, in_flight: Sequence[InFlight]) -> None:
        if in_flight and time.monotonic() >= self._next_tick:
            self._next_tick = time.monotonic() + TICK_SECONDS
            self._line("  " + ", ".join(sorted(f"{task.task.key} {task.text}".rstrip() for task in in_flight)))

    def scored(self, domain: str, n_done: int, n_rows: int) -> None:
        pass

    def changed(self) -> None:
        from duet_ray.report.status import log_line

        summary = _summary(self._config)
        if summary is None:
            return
        with self._lock:
            for trial in summary.trials:
                if trial.status != "pending" and trial.number not in self._said:
                    self._said.add(trial.number)
                    self._line(log_line(summary, trial))

    def _line(self, text: str) -> None:
        err.print(Text(f"{time.strftime('%H:%M:%S')}  {text}"), soft_wrap=True)


class LiveWatcher:
    """A table that is drawn again whenever something changes."""

    def __init__(self, config: StudyConfig) -> None:
        self._config = config
        self._live = Live(console=err, auto_refresh=False, vertical_overflow="visible", transient=True)
        self._phase, self._in_flight, self._summary = "starting", list[InFlight](), None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def phase(self, text: str) -> None:
        self._phase = text
        self._draw()

    def tick(self, in_flight: Sequence[InFlight]) -> None:
        self._in_flight = list(in_flight)
        self._draw()

    def scored(self, domain: str, n_done: int, n_rows: int) -> None:
        pass

    def changed(self) -> None:
        self._summary = _summary(self._config)
        self._draw()

    def _draw(self) -> None:
        from duet_ray.report.status import trial_table

        with self._lock:
            parts: list[Any] = [Text(self._phase, style="bold")]
            scoring = sorted(f"  {t.task.key}  {t.text}" for t in self._in_flight if t.task.kind != "sample")
            parts += [Text(line, style="dim") for line in scoring]
            if self._summary is not None:
                left = seconds_left(self._config, self._summary)
                samples = {t.task.key: t.text for t in self._in_flight if t.task.kind == "sample"}
                table = trial_table(
                    self._summary, in_flight=samples, seconds_left=left, max_rows=max(4, err.height - 12)
                )
                parts.insert(0, table)
            self._live.update(Group(*parts), refresh=True)


def seconds_left(config: StudyConfig, summary: Any) -> float | None:
    """How long the rest will take if samples stay as quick as they were; None before the first one."""
    samples = [s for t in summary.trials if t.ratio is not None for s in t.samples if s.ok]
    if not samples:
        return None
    mean = sum(s.train_seconds + s.feedback_seconds for s in samples) / len(samples)
    n_trained = sum(len(t.samples) for t in summary.trials if t.kind in ("start", "search"))
    n_confirmed = sum(len(t.samples) for t in summary.trials if t.number >= CONFIRM_FIRST)
    n_to_confirm = (config.confirm.finalists + 1) * config.confirm.repeats if config.confirm.finalists else 0
    left = max(0, config.n_planned_trials * config.sampling.k - n_trained) + max(0, n_to_confirm - n_confirmed)
    at_once = min(config.fleet.groups, config.sampling.k * config.search.concurrent_trials)
    return mean * left / at_once


def _summary(config: StudyConfig | None) -> Any:
    """The study as its store holds it; None before there is one."""
    from duet_ray.errors import StoreError
    from duet_ray.report.from_store import read_summary

    if config is None:
        return None
    try:
        return read_summary(config.study_folder)
    except StoreError:
        return None
