"""What the verbs share: consoles, options, and opening a study by its file or its folder.

Everything said here, tables, errors, log lines and JSON, passes one place on its way out, where secrets are taken out.
"""

import json
import logging
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, cast

import typer
from rich.console import Console
from rich.markup import escape

from duet_ray.secret_text import RedactingFormatter, redact, redact_data

if TYPE_CHECKING:
    from duet_ray.study import Study


class _Outgoing:
    """Standard output or standard error, whichever it is at the moment, less secrets."""

    def __init__(self, name: Literal["stdout", "stderr"]) -> None:
        self._name = name

    def write(self, text: str) -> int:
        # Half a character, as a file's name may hold one, has no UTF-8.
        self._stream.write(redact(text).encode("utf-8", "backslashreplace").decode("utf-8"))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def _stream(self) -> TextIO:
        return cast(TextIO, getattr(sys, self._name))


out = Console(file=cast(TextIO, _Outgoing("stdout")), highlight=False)
err = Console(file=cast(TextIO, _Outgoing("stderr")), stderr=True, highlight=False)

StudyFile = Annotated[Path, typer.Argument(help="The study file (YAML).", metavar="STUDY.YAML")]
StudyPlace = Annotated[Path, typer.Argument(help="The study file, or the study's folder.", metavar="STUDY")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override one key, e.g. --set search.n_trials=20. Repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output, and nothing else there.")]


def fail(message: str) -> None:
    """Print an error to standard error."""
    err.print(f"[bold red]error:[/] {escape(_printable(message))}", soft_wrap=True)


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
    except Exception:  # A mistake of ours: its whole trace, less secrets.
        _Outgoing("stderr").write(traceback.format_exc())
        sys.exit(1)


def _printable(message: str) -> str:
    """Control characters as `\\x1b`: names and values of a user's files must not command the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", message)


def say(message: str) -> None:
    """Print a line for people; to standard error, so that standard output stays for results."""
    err.print(escape(_printable(message)), soft_wrap=True)


def print_json(data: Any) -> None:
    """Print data to standard output. Redacted before it is JSON, which it stays."""
    text = json.dumps(redact_data(data), indent=2, ensure_ascii=False, default=lambda value: redact(str(value)))
    _Outgoing("stdout").write(text + "\n")
    sys.stdout.flush()


def log_to_standard_error() -> None:
    """Warnings and worse, ours and other libraries'."""
    handler = logging.StreamHandler(cast(TextIO, _Outgoing("stderr")))
    handler.setFormatter(RedactingFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


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
