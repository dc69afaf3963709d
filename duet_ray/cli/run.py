"""`duet run`: run a study to its end, or go on with it."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from duet_ray.cli.console import AsJson, Overrides, StudyFile, err, open_study, print_json, say
from duet_ray.cli.live import LiveWatcher, LogWatcher
from duet_ray.execution.study_run import Paused


def command(
    study: StudyFile,
    set_: Overrides = None,
    as_json: AsJson = False,
    plain: Annotated[bool, typer.Option("--plain", help="Log lines instead of a live table.")] = False,
) -> None:
    """Find the mixture, and leave the best model, the report and everything measured in the study's folder."""
    from duet_ray.report.plain import to_json

    opened = open_study(study, set_)
    live = err.is_terminal and not plain and not as_json
    watcher = LiveWatcher(opened.config) if live else LogWatcher(opened.config)
    try:
        with watcher:
            summary = opened.run(watcher)
    except (Paused, KeyboardInterrupt):
        say(f"paused; everything finished is kept. To go on: duet run {_command_line(study, set_)}")
        sys.exit(130)
    page = opened.write_report()
    if as_json:
        print_json(to_json(summary))
    else:
        _finish(opened, summary, page, study)


def _finish(opened: Any, summary: Any, page: Path, study: Path) -> None:
    from duet_ray.report.status import trial_table
    from duet_ray.report.verdict import verdict

    err.print(trial_table(summary))
    err.print()
    said = verdict(summary)
    say(said.headline)
    for sentence in said.sentences:
        say(f"  {sentence}")
    best = opened.best()
    sample = best.samples[best.observation.best_sample]
    say("")
    say(f"report   {page}")
    say(f"adapter  {opened.folder / (sample.adapter or '')}")
    say(f"mixture  {best.ratio.describe(summary.domain_names)}")
    say("")
    say("next:")
    say(f"  duet export {study} --out best     the adapter and its training rows, ready to load")
    say(f"  duet run {study} --set search.n_trials={2 * opened.config.search.n_trials or 10}     search on from here")


def _command_line(study: Path, overrides: list[str] | None) -> str:
    return " ".join([str(study), *(f"--set {text}" for text in overrides or [])])
