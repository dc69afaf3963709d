"""`duet score`: weigh the rows of every domain, and stop there."""

import sys
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from duet_ray.cli.console import AsJson, Overrides, StudyFile, err, open_study, out, print_json, say
from duet_ray.cli.live import LogWatcher, ScoreWatcher
from duet_ray.execution.study_run import Paused

if TYPE_CHECKING:
    from duet_ray.study import Study


def command(
    study: StudyFile,
    set_: Overrides = None,
    as_json: AsJson = False,
    plain: Annotated[bool, typer.Option("--plain", help="Log lines instead of bars.")] = False,
) -> None:
    """Compute the row weights that a run will use. What is stored already is not computed again."""
    live = err.is_terminal and not plain and not as_json
    score(open_study(study, set_), live=live, as_json=as_json, again="give the same command again")


def score(opened: "Study", *, live: bool, as_json: bool, again: str) -> None:
    """Weigh the rows of an opened study and show what came of it; exits with 130 when it is paused.

    Args:
        live: bars instead of log lines.
        again: what to do to go on after a pause.
    """
    watcher = ScoreWatcher(opened.config) if live else LogWatcher(opened.config, with_trials=False)
    try:
        with watcher:
            ready = opened.score(watcher)
    except (Paused, KeyboardInterrupt):
        say(f"paused; the rows measured so far are kept. To go on, {again}")
        sys.exit(130)
    assert watcher.scoring is not None
    computed = set(watcher.scoring.domains)
    rows = [_row(ready.config, d, w, d.name in computed) for d, w in zip(ready.domains, ready.weights(), strict=True)]
    if as_json:
        print_json({"method": ready.config.selection.method, "domains": rows})
        return
    if said := already(ready.config, computed):
        say(said)
    show(rows)


def already(config: Any, computed: Collection[str]) -> str | None:
    """What was not computed, and why; None when everything was."""
    from duet_ray.selection import method_of

    stored = [name for name in config.domain_names if name not in computed]
    if not stored:
        return None
    if not method_of(config.selection).needs_model:
        return f"selection.method is {config.selection.method}: there is nothing to score"
    if not computed:
        return "already scored: nothing was computed"
    return f"already scored, not computed again: {', '.join(stored)}"


def show(rows: list[dict[str, Any]]) -> None:
    """The table, and the notes under it."""
    from duet_ray.report.scores import sparkline
    from duet_ray.report.status import has_unicode
    from duet_ray.report.wording import duration

    unicode = has_unicode(out)
    table = Table("domain", "rows", "worth", "lowest", "median", "highest", "histogram", "time", box=None)
    table.padding = (0, 2, 0, 0)
    for column in table.columns[1:]:
        column.no_wrap = True
        column.justify = "right"
    table.columns[6].justify = "left"
    dash = "–" if unicode else "-"
    for row in rows:
        scores = [f"{row[name]:.3g}" if row[name] is not None else dash for name in ("lowest", "median", "highest")]
        shape = row["histogram"]
        table.add_row(
            Text(row["domain"]),
            f"{row['n_rows']:,}",
            f"{row['effective_sample_size']:,.0f}",
            *scores,
            Text(sparkline(shape["counts"], unicode=unicode) if shape else dash),
            duration(row["seconds"]) if row["seconds"] is not None else dash,
        )
    out.print(table)
    out.print()
    lines = ["worth: the effective sample size, how many equally weighted rows the weights are worth"]
    if any(row["histogram"] for row in rows):
        lines.append("histogram: the scores from low to high, without the half percent at either end")
    lines += [f"{row['domain']}: {note}" for row in rows for note in row["notes"]]
    for line in lines:
        out.print(Text(line), soft_wrap=True)


def _row(config: Any, domain: Any, weights: Any, computed: bool) -> dict[str, Any]:
    from duet_ray.report.scores import domain_scores, seconds_spent

    summary = domain_scores(config, domain, weights)
    low, _, middle, _, high = summary["quantiles"] or (None,) * 5
    return {
        "domain": domain.name,
        "computed": computed,
        **summary,
        "lowest": low,
        "median": middle,
        "highest": high,
        "seconds": seconds_spent(summary["details"]),
    }
