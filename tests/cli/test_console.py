"""What is said to people holds no secret, however it is said."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from duet_ray.cli.console import ending_with_a_code, err, fail, out, print_json, say
from duet_ray.errors import ConfigError, DuetError

SECRET = "plain-words-of-mine"


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)


def test_lines_tables_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("key", "value")
    table.add_row("token", SECRET)
    say(f"a {SECRET} [bold]b[/]")
    fail(f"c {SECRET}")
    err.print(Text(f"d {SECRET}"))
    err.print(table)
    out.print(f"e {SECRET}")
    shown = capsys.readouterr()
    assert SECRET not in shown.err + shown.out
    assert shown.err.startswith("a [redacted] [bold]b[/]\nerror: c [redacted]\nd [redacted]\n")
    assert shown.out == "e [redacted]\n"
    assert shown.err.count("[redacted]") == 4


def test_json_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    key = "-----BEGIN PRIVATE KEY-----\nMII"
    print_json({"a": [SECRET, 1], "path": Path(f"/home/{SECRET}"), "key": key, "half": "\udc80"})
    assert json.loads(capsys.readouterr().out) == {
        "a": ["[redacted]", 1],
        "path": "/home/[redacted]",
        "key": "[redacted]",
        "half": "\udc80",
    }


def test_what_would_command_the_terminal_is_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b[2Jb\tc\nd\x9b")
    assert capsys.readouterr().err == "a\\x1b[2Jb\tc\nd\\x9b\n".expandtabs()


@pytest.mark.parametrize(("error", "code"), [(DuetError(SECRET), 1), (ConfigError(SECRET), 2), (ValueError(SECRET), 1)])
def test_exit_codes(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def call() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        ending_with_a_code(call)
    assert end.value.code == code
    shown = capsys.readouterr().err
    assert "[redacted]" in shown
    assert SECRET not in shown
    assert ("Traceback" in shown) == isinstance(error, ValueError)


def test_warnings_of_libraries() -> None:
    code = (
        "import logging\n"
        "from duet_ray.cli.console import log_to_standard_error\n"
        "log_to_standard_error()\n"
        f"logging.getLogger('some.library').warning('using %s', {SECRET!r})\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr == "WARNING using [redacted]\n"
    assert logging.getLogger("some.library").handlers == []
