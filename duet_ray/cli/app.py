"""Puts the verbs together, and turns a `DuetError` into a message and an exit code."""

import typer

from duet_ray.cli import doctor, export, import_runs, init, report, run, score, status, validate
from duet_ray.cli.console import ending_with_a_code, log_to_standard_error

app = typer.Typer(
    name="duet",
    help="Find the mixture of your data to fine-tune a language model on, for a task you cannot look into.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (init, validate, import_runs, score, run, status, report, export, doctor):
    app.command(name=verb.__name__.rsplit(".", 1)[-1].replace("_", "-"))(verb.command)


def main() -> None:
    """What `duet` runs; its exit codes are those of `ending_with_a_code`."""
    log_to_standard_error()
    ending_with_a_code(app)
