"""`duet init`: write a commented study file to start from."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from duet_ray.cli.console import AsJson, print_json, say
from duet_ray.errors import DuetError


def command(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("study.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a study file with every field explained."""
    if path.exists() and not force:
        raise DuetError(f"{path} exists already; give another name, or --force to overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(template(), encoding="utf-8")
    if as_json:
        print_json({"written": str(path)})
    else:
        say(f"Wrote {path}. Put your model, your files and your task in, then: duet validate {path}")


def template() -> str:
    """The commented study file."""
    return files("duet_ray.cli").joinpath("template.yaml").read_text(encoding="utf-8")
