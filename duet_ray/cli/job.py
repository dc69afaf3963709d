"""What the entry points in `jobs/` share: they run a verb of `duet` as a job that was submitted to a Ray cluster.

`ray job submit --working-dir .` sends a copy of the folder to the cluster, and Ray deletes that copy some time after
the job. Whatever a study leaves must therefore lie elsewhere, on a disk that every node sees; that is checked before
anything is trained. `ray job stop` sends SIGTERM, which pauses a study, and kills what is still there after
RAY_JOB_STOP_WAIT_TIME_S (3 seconds by default): that costs the samples in flight and nothing else.
"""

import os
import re
import shlex
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from duet_ray.cli.console import ending_with_a_code, log_to_standard_error, open_study, set_options
from duet_ray.config import StudyConfig
from duet_ray.errors import ConfigError, Problem
from duet_ray.execution.ray_session import JOB_VARIABLE, job_environment
from duet_ray.study import Study

Config = Annotated[Path, typer.Option("--config", help="The study file (YAML).", metavar="STUDY.YAML")]

_SESSION = re.compile(r"session_\d{4}-\d\d-\d\d_.*")
"""A folder of one life of a Ray cluster, below Ray's temporary folder."""


def main(command: Callable[..., None]) -> None:
    """Read the command line, call `command`, exit as `duet` does. SIGTERM pauses, as Ctrl-C does."""
    log_to_standard_error()
    signal.signal(signal.SIGTERM, _interrupt)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    ending_with_a_code(app)


def open_in_job(config: Path, overrides: Sequence[str]) -> Study:
    """A study by its file, if what it leaves will outlive the job.

    Raises:
        ConfigError: the study file is wrong, or its storage or store lie where Ray deletes them.
    """
    study = open_study(config, list(overrides))
    if problems := fleeting(study.config, os.environ, Path.cwd()):
        raise ConfigError(problems)
    return study


def fleeting(config: StudyConfig, environment: Any, here: Path) -> list[Problem]:
    """What of a study would be lost with the job.

    Args:
        environment: of the process.
        here: its working folder, which in a job submitted with `--working-dir` is the copy.
    """
    job = job_environment(environment)
    if job is None:
        return []
    is_copy = bool(job.get("working_dir"))
    problems = []
    for key, value, example in (
        ("storage", str(config.study_folder.parent), "/shared/studies"),
        ("store", (config.store or "").removeprefix("sqlite:///"), "postgresql+psycopg://user@host/database"),
        ("artifacts", (config.artifacts or "").removeprefix("file://"), "s3://bucket/folder"),
    ):
        place = Path(value)
        if not place.is_absolute():
            continue
        if is_copy and place.is_relative_to(here.resolve()):
            where = "lies in the copy of --working-dir, which Ray deletes after the job"
        elif any(_SESSION.fullmatch(part) for part in place.parts):
            where = "lies in a folder of Ray's, which goes with the cluster"
        else:
            continue
        message = f"{place} {where}; give a place that every node sees and that stays: --set {key}={example}"
        problems.append(Problem(path=key, message=message))
    return problems


def job_line(script: str, config: Path, overrides: Sequence[str]) -> str:
    """The command that starts or goes on with this job, quoted for a shell."""
    words = ["python", script, "--config", str(config), *set_options(overrides)]
    submit = ["ray", "job", "submit", "--working-dir", ".", "--"] if os.environ.get(JOB_VARIABLE) else []
    return shlex.join([*submit, *words])


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
