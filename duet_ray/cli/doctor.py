"""`duet doctor`: what on this machine stands in a study's way, or lets strangers in."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from duet_ray.cli.console import AsJson, Overrides, out, print_json
from duet_ray.config import load_config
from duet_ray.doctor import Finding, findings, look

COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


def command(
    study: Annotated[
        Path | None, typer.Argument(help="A study file: its storage, store and model too.", metavar="[STUDY.YAML]")
    ] = None,
    set_: Overrides = None,
    offline: Annotated[bool, typer.Option("--offline", help="Ask nothing of other machines.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at versions, devices, Ray's authentication, open dashboards, disks, the hub and the database.

    Exits with 1 if there is a problem.
    """
    found = findings(look(load_config(study, set_ or []) if study else None, offline=offline))
    n_problems = sum(finding.level == "problem" for finding in found)
    if as_json:
        print_json({"ok": n_problems == 0, "findings": [asdict(finding) for finding in found]})
    else:
        out.print(_table(found))
    raise typer.Exit(1 if n_problems else 0)


def _table(found: list[Finding]) -> Table:
    table = Table("", "about", "found", "what to do", box=None, pad_edge=False)
    for finding in found:
        level = f"[{COLOURS[finding.level]}]{finding.level}[/]"
        table.add_row(level, escape(finding.about), escape(finding.says), escape(finding.remedy))
    return table
