"""`duet run`: run a study to its end, or go on with it."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from duet_ray.cli.console import AsJson, Overrides, StudyFile, command_line, err, open_study, print_json, say
from duet_ray.cli.live import LiveWatcher, LogWatcher
from duet_ray.execution.study_run import Paused

if TYPE_CHECKING:
    from duet_ray.study import Study

Again = Callable[[Sequence[str]], str]
"""The command that goes on with a study, given its overrides."""


def command(
    study: StudyFile,
    set_: Overrides = None,
    as_json: AsJson = False,
    plain: Annotated[bool, typer.Option("--plain", help="Log lines instead of a live table.")] = False,
) -> None:
    """Find the mixture, and leave the best model, the report and everything measured in the study's folder."""
    run(
        open_study(study, set_),
        study,
        set_ or [],
        again=lambda overrides: command_line("run", study, overrides),
        live=err.is_terminal and not plain and not as_json,
        as_json=as_json,
    )


def run(
    opened: "Study", study: Path, overrides: Sequence[str], *, again: Again, live: bool = False, as_json: bool = False
) -> None:
    """Run an opened study to its end, write its report, and say what came of it and what to do next.

    A study that is paused exits with 130, after saying how it goes on.

    Args:
        study: its file.
        live: a live table instead of log lines.
    """
    from duet_ray.report.plain import to_json

    watcher = LiveWatcher(opened.config) if live else LogWatcher(opened.config)
    try:
        with watcher:
            summary = opened.run(watcher)
    except (Paused, KeyboardInterrupt):
        say(f"paused; everything finished is kept. To go on: {again(overrides)}")
        sys.exit(130)
    page = opened.write_report()
    if as_json:
        print_json(to_json(summary))
    else:
        _finish(opened, summary, page, study, overrides, again)


def _finish(opened: Any, summary: Any, page: Path, study: Path, overrides: Sequence[str], again: Again) -> None:
    from duet_ray.report.status import trial_table
    from duet_ray.report.summary import best_sample
    from duet_ray.report.verdict import verdict

    err.print(trial_table(summary))
    err.print()
    said = verdict(summary)
    say(said.headline)
    for sentence in said.sentences:
        say(f"  {sentence}")
    say(said.advice)
    best = opened.best()
    sample = best_sample(best)
    assert sample is not None
    say("")
    say(f"report   {page}")
    say(f"model    {opened.place_of(sample)}")
    say(f"mixture  {best.ratio.describe(summary.domain_names)}")
    n_more = max(10, 2 * opened.config.search.n_trials)
    others = [text for text in overrides if not text.startswith("search.n_trials=")]
    say("")
    say("next:")
    say(f"  {command_line('export', study, overrides)} --out best")
    say("      the model and the rows it was trained on, ready to load")
    say(f"  {again([*others, f'search.n_trials={n_more}'])}")
    say("      search on from here")
