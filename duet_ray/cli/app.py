"""Puts the verbs together, and turns a `DuetError` into a message and an exit code."""

import logging
import sys

import typer

from duet_ray.cli import export, import_runs, init, report, run, score, status, validate
from duet_ray.cli.console import fail
from duet_ray.errors import ConfigError, DuetError

app = typer.Typer(
    name="duet",
    help="Find the mixture of your data to fine-tune a language model on, for a task you cannot look into.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (init, validate, import_runs, score, run, status, report, export):
    app.command(name=verb.__name__.rsplit(".", 1)[-1].replace("_", "-"))(verb.command)


def main() -> None:
    """Exit codes: 0 done, 1 a `DuetError`, 2 a wrong command line or study file, 130 paused."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        app()
    except ConfigError as error:
        fail(str(error))
        sys.exit(2)
    except DuetError as error:
        fail(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        fail("interrupted")
        sys.exit(130)
