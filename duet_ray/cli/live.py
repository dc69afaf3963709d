"""Watching a run: a live table or bars where there is a terminal, log lines where there is none."""

import threading
import time
from collections.abc import Sequence
from typing import Any, Self

from rich.console import Group
from rich.live import Live
from rich.text import Text

from duet_ray.budget import n_confirmations, n_samples, searched, spent
from duet_ray.cli.console import err
from duet_ray.cli.scoring_progress import ScoringProgress
from duet_ray.config import StudyConfig
from duet_ray.execution.broker import InFlight
from duet_ray.records import CONFIRM_FIRST
from duet_ray.report.wording import plural

TICK_SECONDS = 30.0
"""How often a log says what is under way."""

READ_SECONDS = 1.0
"""How often the store is read at most: a large one takes its time, and small samples end many times a second."""


class LogWatcher:
    """One line for each phase, each domain whose rows are measured, each trial that ends; now and then what goes on.

    Args:
        config: None before there is a study to tell of.
        with_trials: whether to tell of trials.
    """

    def __init__(self, config: StudyConfig | None = None, *, with_trials: bool = True) -> None:
        self.scoring = ScoringProgress(config) if config else None
        self._study = _StudyReader(config) if config and with_trials else None
        self._said: set[int] = set()
        self._lock = threading.Lock()
        self._next_tick = time.monotonic() + TICK_SECONDS

    def __enter__(self) -> Self:
        self.changed()
        return self

    def __exit__(self, *_: object) -> None:
        self._say_trials(self._study.read() if self._study else None)

    def phase(self, text: str) -> None:
        self._line(text)

    def tick(self, in_flight: Sequence[InFlight]) -> None:
        now = time.monotonic()
        if self.scoring:
            self.scoring.tick(in_flight, now)
        if in_flight and now >= self._next_tick:
            self._next_tick = now + TICK_SECONDS
            parts = sorted(f"{t.task.spec.key} {t.text}".rstrip() for t in in_flight if t.task.spec is not None)
            if self.scoring and self.scoring.is_under_way:
                parts = [f"{self.scoring.headline}: {self.scoring.details()}", *parts]
            self._line("  " + ", ".join(parts))
        self._say_trials(self._study.read_if_due() if self._study else None)

    def scored(self, domain: str, n_done: int, n_rows: int) -> None:
        if self.scoring is None:
            return
        known = self.scoring.domains.get(domain)
        was_measured = known is not None and known.is_measured
        self.scoring.scored(domain, n_done, n_rows)
        if self.scoring.domains[domain].is_measured and not was_measured:
            self._line(f"{domain}: {plural(n_rows, 'row')} measured")

    def changed(self) -> None:
        if self._study:
            self._study.is_stale = True
            self._say_trials(self._study.read_if_due())

    def _say_trials(self, summary: Any) -> None:
        from duet_ray.report.status import log_line

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
        self._study, self.scoring = _StudyReader(config), ScoringProgress(config)
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
        with self._lock:
            self.scoring.tick(in_flight, time.monotonic())
        self._draw()

    def scored(self, domain: str, n_done: int, n_rows: int) -> None:
        with self._lock:
            self.scoring.scored(domain, n_done, n_rows)

    def changed(self) -> None:
        self._study.is_stale = True
        self._draw()

    def _draw(self) -> None:
        from duet_ray.report.status import trial_table

        with self._lock:
            self._summary = self._study.read_if_due() or self._summary
            parts: list[Any] = [Text(self._phase, style="bold")]
            if self.scoring.is_under_way:
                parts += [Text(f"  {self.scoring.headline}"), Text(f"  {self.scoring.details()}", style="dim")]
            if self._summary is not None:
                left = seconds_left(self._config, self._summary)
                samples = {t.task.spec.key: t.text for t in self._in_flight if t.task.spec is not None}
                table = trial_table(
                    self._summary, in_flight=samples, seconds_left=left, max_rows=max(4, err.height - 12)
                )
                parts.insert(0, table)
            self._live.update(Group(*parts), refresh=True)


class ScoreWatcher:
    """A bar for every domain that is scored, and the time that is left."""

    def __init__(self, config: StudyConfig) -> None:
        self.scoring = ScoringProgress(config)
        self._live = Live(console=err, auto_refresh=False, transient=True)
        self._phase = "starting"
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
        with self._lock:
            self.scoring.tick(in_flight, time.monotonic())
        self._draw()

    def scored(self, domain: str, n_done: int, n_rows: int) -> None:
        with self._lock:
            self.scoring.scored(domain, n_done, n_rows)

    def changed(self) -> None:
        pass

    def _draw(self) -> None:
        with self._lock:
            parts: list[Any] = [Text(self._phase, style="bold")]
            if self.scoring.domains:
                parts += [self.scoring.bars(most=max(4, err.height - 4)), Text(self.scoring.headline)]
            self._live.update(Group(*parts), refresh=True)


class _StudyReader:
    """The study as its store holds it, read when it is stale, and not again within a second."""

    def __init__(self, config: StudyConfig) -> None:
        self._config = config
        self._next_read = 0.0
        self.is_stale = False

    def read_if_due(self) -> Any:
        """A summary; None while nothing is new, or a reading is too soon: the next tick asks again."""
        return self.read() if self.is_stale and time.monotonic() >= self._next_read else None

    def read(self) -> Any:
        """A summary; None before there is a study."""
        from duet_ray.errors import StoreError
        from duet_ray.report.from_store import read_summary

        self.is_stale, self._next_read = False, time.monotonic() + READ_SECONDS
        try:
            return read_summary(self._config.study_folder, self._config)
        except StoreError:
            return None


def seconds_left(config: StudyConfig, summary: Any) -> float | None:
    """How long the rest will take, at most, if samples stay as quick as they were; None before the first one."""
    samples = [s for t in summary.trials if t.ratio is not None for s in t.samples if s.ok]
    if not samples:
        return None
    mean = sum(s.train_seconds + s.feedback_seconds for s in samples) / sum(s.spec.fidelity for s in samples)
    # All in whole samples: one on a quarter of the rows is a quarter of one.
    left = (config.n_planned_trials - spent(summary.trials)) * config.sampling.k_most
    under_way = [t for t in searched(summary.trials) if t.status == "pending"]
    left = max(0.0, left) + sum((n_samples(t, config) - len(t.samples)) * t.fidelity for t in under_way)
    n_confirmed = sum(len(t.samples) for t in summary.trials if t.number >= CONFIRM_FIRST)
    left += max(0, n_confirmations(config) - n_confirmed)
    at_once = min(config.fleet.groups, config.sampling.k_most * config.search.concurrent_trials)
    return mean * left / at_once
