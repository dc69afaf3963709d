"""What can be known of a study without a hub, a network, a device, or a tokenizer: `duet validate --offline`.

Made for study files that name models and data sets of the hub, where the machine that will run them is elsewhere. It
finds the mistakes of typing and of arithmetic in seconds, all of them at once, and says plainly what it did not look
at: a study that passes is well-formed, and not yet known to run.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from duet_ray.config import LmEvalConfig, StudyConfig
from duet_ray.domains.formats import check_columns, parse_records, wanted_columns
from duet_ray.domains.sources import find_sources
from duet_ray.errors import ConfigError, DuetError, Problem
from duet_ray.feedback import make_feedback
from duet_ray.feedback.task_files import known_tasks, metrics_of, task_files
from duet_ray.search import SimplexSpace

N_ROWS_READ = 100
"""Rows of a local source that are looked at: enough to miss no column."""

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Offline:
    """What was looked at, and what was not."""

    checked: tuple[str, ...]
    not_checked: tuple[str, ...]


class _Findings:
    """Problems and lines, collected over the whole study."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.checked: list[str] = []
        self.not_checked: list[str] = []

    def wrong(self, path: str, message: str) -> None:
        self.problems.append(Problem(path=path, message=message))


def check_offline(config: StudyConfig) -> Offline:
    """Check a study file that `load_config` has read.

    Raises:
        ConfigError: with every problem found.
    """
    found = _Findings()
    found.checked.append("every key, value and contradiction of the study file")
    _check_models(config, found)
    _check_domains(config, found)
    _check_space(config, found)
    for path, feedback in [("feedback", config.feedback), *((f"also[{i}]", f) for i, f in enumerate(config.also))]:
        if feedback.kind == "lm_eval":
            _check_tasks(config, feedback, path, found)
            continue
        try:
            make_feedback(config, feedback).check()
            found.checked.append(f"{path}: {feedback.kind} can be measured")
        except DuetError as error:
            found.wrong("", str(error) if path == "feedback" else f"{path}: {error}")
    found.not_checked += _beyond(config)
    if found.problems:
        raise ConfigError(found.problems)
    return Offline(checked=tuple(found.checked), not_checked=tuple(found.not_checked))


def _check_models(config: StudyConfig, found: _Findings) -> None:
    models = [("model.path", config.model.path)]
    if config.selection.surrogate is not None:
        models.append(("selection.surrogate.path", config.selection.surrogate.path))
    if config.selection.embedding_model is not None:
        models.append(("selection.embedding_model", config.selection.embedding_model))
    for key, path in models:
        folder = config.resolve_path(path)
        if folder.is_dir():
            if (folder / "config.json").is_file():
                found.checked.append(f"{key}: {path} is a model's folder")
            else:
                found.wrong(key, f"{folder} has no config.json: not a model as save_pretrained writes it")
        elif is_hub_id(path):
            found.checked.append(f"{key}: {path} has the form of a hub id")
            found.not_checked.append(f"{path}: that it is on the hub and may be read, its architecture and size")
        else:
            found.wrong(key, f"neither a folder ({folder}) nor a hub id (owner/name), got {path!r}")


def _check_domains(config: StudyConfig, found: _Findings) -> None:
    hub: list[str] = []
    n_local = 0
    for index, domain in enumerate(config.domains):
        path = f"domains[{index}]"
        try:
            check_columns(domain.format, domain.columns, f"{path}.columns")
            sources = find_sources(config, index)
        except DuetError as error:
            found.wrong("", str(error))
            continue
        on_hub = [pattern for pattern in domain.sources if pattern.startswith("hf:")]
        hub += [f"{domain.name} ({_described(domain.subset, domain.split, pattern)})" for pattern in on_hub]
        for folder in [pattern.removeprefix("hf:") for pattern in on_hub]:
            if folder.startswith((".", "/", "~")) and not config.resolve_path(folder).is_dir():
                found.wrong(f"{path}.source", f"no such folder: {config.resolve_path(folder)}")
        for source in [source for source in sources if source.name not in on_hub]:
            n_local += 1
            records = islice(source.records(wanted_columns(domain.format, domain.columns)), N_ROWS_READ)
            try:
                for _ in parse_records(
                    records, domain.format, domain.columns, there=source.columns, setting=f"{path}.columns"
                ):
                    pass
            except DuetError as error:
                found.wrong("", f"{path} ({domain.name}): {error}")
    found.checked.append(f"{len(config.domains)} domains: formats and columns")
    if n_local:
        found.checked.append(f"{n_local} local files: they are there and have these columns")
        found.not_checked.append(f"rows of local files after the first {N_ROWS_READ}")
    if hub:
        found.checked.append(f"{len(hub)} data sets of the hub: the form of their names")
        found.not_checked.append(f"data sets of the hub, their subsets, splits, columns and rows: {', '.join(hub)}")


def _described(subset: str | None, split: str, pattern: str) -> str:
    return ", ".join(part for part in (pattern, subset, split) if part)


def is_hub_id(text: str) -> bool:
    """Whether a text has the form `owner/name` of the hub."""
    return len(text) <= 96 and bool(_HUB_ID.fullmatch(text)) and not re.search(r"--|\.\.|[.-](/|$)", text)


def _check_space(config: StudyConfig, found: _Findings) -> None:
    """Bounds, constraints and whole rows, as if every domain had all the rows that it may be asked for."""
    try:
        space = SimplexSpace.of(config, [config.mixture.n_rows] * len(config.domains))
        space.uniform()
    except ConfigError as error:
        found.problems += error.problems
    except DuetError as error:
        found.wrong("", str(error))
    else:
        found.checked.append(f"bounds and constraints: there are mixtures of {config.mixture.n_rows} whole rows")
        found.not_checked.append("whether every domain has the rows that its share may ask for (mixture.when_short)")


def _check_tasks(config: StudyConfig, section: LmEvalConfig, path: str, found: _Findings) -> None:
    own: dict[str, Path] = {}
    if section.tasks_folder is not None:
        folder = config.resolve_path(section.tasks_folder)
        if not folder.is_dir():
            found.wrong(f"{path}.tasks_folder", f"no such folder: {folder}")
        own = dict(task_files(folder))
    for name in section.tasks:
        file = own.get(name) or known_tasks().get(name)
        if file is None:
            found.wrong(f"{path}.tasks.{name}", f"no task of lm-eval has that name{_hint(name, own)}")
            continue
        wanted = section.metric[name] if isinstance(section.metric, dict) else section.metric
        metrics = metrics_of(file)
        if metrics is not None and wanted not in metrics:
            found.wrong(f"{path}.metric", f"{name} has no metric {wanted!r}, it has: {', '.join(metrics)}")
        elif metrics is None:
            found.not_checked.append(f"{name}: whether {wanted} is one of its metrics")
        found.not_checked.append(f"{name}: its data")
    found.checked.append(f"{path}: tasks {', '.join(section.tasks)} and their metrics, by lm-eval's task files")


def _hint(name: str, own: dict[str, Path]) -> str:
    close = difflib.get_close_matches(name, [*own, *known_tasks()], n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _beyond(config: StudyConfig) -> Iterator[str]:
    """What no study can be told without its machines."""
    fleet = config.fleet
    n_workers = fleet.groups * fleet.workers_per_group
    yield "the rows as tokens: lengths, bad rows, duplicates, overlap with the task"
    yield (
        f"the machines: {n_workers * fleet.gpus_per_worker:g} GPUs and {n_workers * fleet.cpus_per_worker:g} CPUs, "
        "their memory, and the time it takes"
    )
    yield f"storage {config.storage}: its free space, and that every node sees it"
    if config.store is not None:
        yield "store: that the database answers"
    if config.artifacts is not None:
        yield "artifacts: that they can be written"
