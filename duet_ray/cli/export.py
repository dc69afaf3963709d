"""`duet export`: the best model and the best mixture, ready to be used elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from duet_ray.cli.console import AsJson, Overrides, StudyPlace, open_study, print_json, say


def command(
    study: StudyPlace,
    to: Annotated[Path, typer.Option("--out", help="Folder to write into.")] = Path("best"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in that folder.")] = False,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write the best model (an adapter, or a whole one), its training rows (parquet) and a README: how to load them."""
    result = open_study(study, set_).export(to, overwrite=overwrite)
    if as_json:
        print_json({"exported": str(to)})
    else:
        say(f"Wrote {to}: {result.adapter.name}/, mixture.parquet, ratio.json and README.md, how to load them.")
