"""What the verbs share: consoles, options, and opening a study by its file or its folder."""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from duet_ray.study import Study

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

StudyFile = Annotated[Path, typer.Argument(help="The study file (YAML).", metavar="STUDY.YAML")]
StudyPlace = Annotated[Path, typer.Argument(help="The study file, or the study's folder.", metavar="STUDY")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override one key, e.g. --set search.n_trials=20. Repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output, and nothing else there.")]


def fail(message: str) -> None:
    """Print an error to standard error."""
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


def ending_with_a_code(call: Callable[[], object]) -> None:
    """Call it, and turn what it raises into a message and an exit code.

    0 done, 1 a `DuetError`, 2 a wrong command line or study file, 130 paused.
    """
    from duet_ray.errors import ConfigError, DuetError

    try:
        call()
    except ConfigError as error:
        fail(str(error))
        sys.exit(2)
    except DuetError as error:
        fail(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        fail("interrupted")
        sys.exit(130)


def say(message: str) -> None:
    """Print a line for people; to standard error, so that standard output stays for results."""
    err.print(escape(message), soft_wrap=True)


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def command_line(verb: str, study: Path, overrides: Sequence[str] | None) -> str:
    """The command to type next, quoted for a shell."""
    return shlex.join(["duet", verb, str(study), *set_options(overrides or [])])


def set_options(overrides: Sequence[str]) -> list[str]:
    """Overrides as a command line has them."""
    return [part for text in overrides for part in ("--set", text)]


def open_study(place: Path, overrides: list[str] | None = None) -> "Study":
    """A study by its file, or by the folder that `duet run` made."""
    from duet_ray.config import load_config
    from duet_ray.errors import ConfigError
    from duet_ray.study import Study

    if place.is_dir():
        if overrides:
            raise ConfigError(
                f"--set changes a study file, and {place} is a study's folder; give the study file instead"
            )
        return Study.open(place)
    return Study(load_config(place, overrides or []))
