"""How far the scoring of the domains is: rows measured, what is going on, and the time that is left.

The speed is rows per second over all domains since the first row was seen to be measured. Rows that an earlier session
measured are found within moments of the start, so they do not count as speed; and a shard under way counts by the share
that its worker tells. Preparing a domain and weighing it have no rows, and are no part of the time left.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from duet_ray.config import StudyConfig
from duet_ray.execution.broker import InFlight
from duet_ray.report.wording import duration, plural

_STAGES = {"prepare": "preparing", "score": "measuring", "weigh": "weighing"}


@dataclass(kw_only=True)
class DomainProgress:
    """One domain on its way to its weights."""

    name: str
    n_rows: int
    n_finished: int = 0
    """Rows of finished shards."""
    n_under_way: float = 0.0
    """Rows done of the shards under way."""
    stage: str = "waiting"
    is_weighed: bool = False

    @property
    def n_done(self) -> int:
        return min(self.n_rows, int(self.n_finished + self.n_under_way))

    @property
    def is_measured(self) -> bool:
        return self.n_finished >= self.n_rows

    @property
    def text(self) -> str:
        """`maths 2,048 of 7,473 rows`, or what is going on where no row is measured yet."""
        if self.is_measured or not self.n_done:
            return f"{self.name} {self.stage}"
        return f"{self.name} {self.n_done:,} of {self.n_rows:,} rows"


class ScoringProgress:
    """Fed with what a `Watcher` is told; answers what people ask."""

    def __init__(self, config: StudyConfig) -> None:
        self._names = config.domain_names
        self._shard_rows = config.selection.shard_rows
        self._first: tuple[float, int] | None = None
        self._now = 0.0
        self.domains: dict[str, DomainProgress] = {}
        """Those that are scored in this session, in the order they began."""

    def scored(self, name: str, n_done: int, n_rows: int) -> None:
        """As `Watcher.scored`: all rows are measured, and once more when they are weighed."""
        domain = self.domains.setdefault(name, DomainProgress(name=name, n_rows=n_rows))
        domain.is_weighed = domain.is_measured
        domain.n_finished = n_done
        if domain.is_weighed:
            domain.stage = "done"

    def tick(self, in_flight: Sequence[InFlight], now: float) -> None:
        """As `Watcher.tick`. `now`: seconds of a clock that never goes back."""
        self._now = now
        for domain in self.domains.values():
            domain.n_under_way = 0.0
            domain.stage = "done" if domain.is_weighed else "waiting"
        for task in in_flight:
            if task.task.domain is None:
                continue
            here = self.domains[self._names[task.task.domain]]
            here.stage = _STAGES[task.task.kind]
            if task.task.kind == "score":
                here.n_under_way += self._rows_of(task, here.n_rows)
            elif task.text:
                here.stage += f": {task.text}"
        if self._first is None and any(domain.n_under_way for domain in self.domains.values()):
            self._first = now, self.n_done

    def _rows_of(self, task: InFlight, n_rows: int) -> float:
        """Rows done of a shard: the share of its stage that is done."""
        assert task.task.shard is not None
        of_shard = min(self._shard_rows, n_rows - task.task.shard * self._shard_rows)
        return of_shard * task.done / task.total if task.total else 0.0

    @property
    def n_rows(self) -> int:
        return sum(domain.n_rows for domain in self.domains.values())

    @property
    def n_done(self) -> int:
        return sum(domain.n_done for domain in self.domains.values())

    @property
    def is_under_way(self) -> bool:
        return any(not domain.is_weighed for domain in self.domains.values())

    @property
    def seconds_left(self) -> float | None:
        """Until all rows are measured, at the speed so far; None before there is any."""
        if self._first is None:
            return None
        since, n_before = self._first
        n_measured = self.n_done - n_before
        return (self.n_rows - self.n_done) * (self._now - since) / n_measured if n_measured > 0 else None

    @property
    def headline(self) -> str:
        """`41 % of 12,345 rows measured, about 3 min 5 s left`."""
        percent = 100 * self.n_done // self.n_rows if self.n_rows else 0
        left = self.seconds_left
        time = f", about {duration(left)} left" if left else ""
        return f"{percent} % of {plural(self.n_rows, 'row')} measured{time}"

    def details(self, most: int = 4) -> str:
        """What is going on, at most `most` domains by name: `a 20 of 60 rows, b preparing, 3 waiting`."""
        active = [d.text for d in self.domains.values() if d.stage not in ("waiting", "done")]
        parts = active[:most]
        if len(active) > most:
            parts.append(f"{len(active) - most} more under way")
        for stage in ("waiting", "done"):
            if n := sum(d.stage == stage for d in self.domains.values()):
                parts.append(f"{n} {stage}")
        return ", ".join(parts)

    def bars(self, most: int | None = None) -> RenderableType:
        """One bar a domain; where there is room for `most` only, those that are not done come first."""
        domains = list(self.domains.values())
        shown = domains
        if most is not None and len(domains) > most:
            shown = sorted(domains, key=lambda d: (d.is_weighed, d.stage == "waiting"))[: max(1, most - 1)]
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, max_width=24, overflow="ellipsis")
        table.add_column(min_width=8, max_width=32, ratio=1)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="ellipsis", no_wrap=True)
        for domain in shown:
            table.add_row(
                Text(domain.name),
                ProgressBar(total=domain.n_rows, completed=domain.n_done),
                Text(f"{domain.n_done:,} of {domain.n_rows:,}"),
                Text(f"{100 * domain.n_done // domain.n_rows} %" if domain.n_rows else ""),
                Text(domain.stage, style="dim"),
            )
        if len(shown) < len(domains):
            table.add_row(Text(f"{len(domains) - len(shown)} more", style="dim"))
        return table
