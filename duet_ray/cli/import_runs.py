"""`duet import-runs`: tell the search of experiments from before the study."""

from pathlib import Path
from typing import Annotated, Any

import typer

from duet_ray.cli.console import AsJson, Overrides, StudyFile, command_line, open_study, print_json, say
from duet_ray.cli.live import LogWatcher
from duet_ray.errors import DuetError


def command(
    study: StudyFile,
    runs: Annotated[Path, typer.Argument(help="Past runs: a column per domain and one of values.", metavar="RUNS.CSV")],
    value: Annotated[str | None, typer.Option("--value", help="Column of the values.", metavar="COLUMN")] = None,
    sem: Annotated[
        str | None, typer.Option("--sem", help="Column of the values' standard errors.", metavar="COLUMN")
    ] = None,
    fidelity: Annotated[
        str,
        typer.Option(
            "--fidelity",
            help="Below 1: runs of fewer rows or a smaller model. A share, or its column.",
            metavar="SHARE",
        ),
    ] = "1",
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column", help="A domain's column where it has another name. Repeatable.", metavar="DOMAIN=NAME"
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse the file if a run lies outside the study's bounds.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, and import nothing.")] = False,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Start the search from a CSV of earlier experiments."""
    from duet_ray.search.past_runs import RunColumns

    opened = open_study(study, set_)
    columns = RunColumns(domains=_domain_columns(column or []), value=value, sem=sem, fidelity=_number_or(fidelity))
    found = opened.import_runs(
        runs, columns, outside="error" if strict else "skip", dry_run=dry_run, watcher=LogWatcher()
    )
    if as_json:
        print_json(_to_json(opened.config, found, dry_run))
        return
    for line in _lines(opened.config, found, dry_run):
        say(line)
    say("nothing was written (--dry-run)" if dry_run else f"next: {command_line('run', study, set_)}")


def _domain_columns(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        domain, equals, name = text.partition("=")
        if not (domain and equals and name):
            raise DuetError(f"--column {text}: must be DOMAIN=NAME, for instance --column maths=share_of_maths")
        if domain in found:
            raise DuetError(f"--column {text}: the column of {domain} is given twice")
        found[domain] = name
    return found


def _number_or(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _lines(config: Any, found: Any, dry_run: bool) -> list[str]:
    """What there is to say, for people."""
    from duet_ray.report.wording import plural
    from duet_ray.search.past_runs import lines_of

    table, placed = found.table, found.placed
    verb = "would be imported" if dry_run else "imported"
    known = f", {found.n_known} known already" if found.n_known else ""
    lines = [f"{plural(len(table.rows), 'run')} read, {len(found.new)} {verb}{known}; value: {table.value_column}"]
    if table.ignored:
        lines.append(f"columns that are not read: {', '.join(table.ignored)}")
    if table.n_renormalised:
        lines.append(f"{plural(table.n_renormalised, 'run')} renormalised: the shares summed to 1 only within 1 %")
    if placed.n_moved:
        lines.append(
            f"{plural(placed.n_moved, 'run')} moved to the nearest mixture of {config.mixture.n_rows} whole rows, by "
            f"up to {placed.farthest:.2g} rows of a domain"
        )
    if placed.outside:
        lie, are = ("lies", "is") if len(placed.outside) == 1 else ("lie", "are")
        lines.append(
            f"{plural(len(placed.outside), 'run')} {lie} outside the study's bounds, constraints or the rows there are"
            f", and {are} left out ({lines_of(placed.outside)})"
        )
    if config.search.also:
        lines.append("the runs are taken to have the study's own training settings, as they are under `training`")
    if config.sampling.k_most > 1:
        lines.append("each run counts as one sample; a trial's observation is the best of its samples (sampling.k)")
    best = found.best(config.direction)
    cheap = f" at fidelity {best.fidelity:g}" if best.fidelity < 1 else ""
    lines.append(
        f"best of them: {best.value:.6g}{cheap}, with {best.ratio.describe(config.domain_names)} ({best.source})"
    )
    return lines


def _to_json(config: Any, found: Any, dry_run: bool) -> dict[str, Any]:
    best = found.best(config.direction)
    return {
        "n_read": len(found.table.rows),
        "n_imported": 0 if dry_run else len(found.new),
        "n_new": len(found.new),
        "n_known": found.n_known,
        "n_renormalised": found.table.n_renormalised,
        "n_moved": found.placed.n_moved,
        "farthest_move_rows": found.placed.farthest,
        "lines_outside": list(found.placed.outside),
        "value_column": found.table.value_column,
        "ignored_columns": list(found.table.ignored),
        "best": {
            "value": best.value,
            "fidelity": best.fidelity,
            "ratio": dict(zip(config.domain_names, best.ratio.values.tolist(), strict=True)),
            "source": best.source,
        },
        "dry_run": dry_run,
    }
