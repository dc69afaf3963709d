"""Feedback from EleutherAI's lm-evaluation-harness, in this process, on the model in memory.

Tasks are the harness's own by name, or those of a folder of YAML files (`tasks_folder`) with local data, which work
offline; relative `data_files` in them are taken from that folder. Prompts are the tasks' own: no chat template.

The harness's `simple_evaluate` reseeds Python's, NumPy's and torch's global generators with fixed numbers at every
call and spends half a second on describing the machine. So tasks are loaded and set up here, and only its `evaluate`
runs them, with the generators seeded by us for that time and put back as they were. Loading is done once.

With several tasks, the value is Σ w_i v_i / Σ w_i and its standard error √(Σ (w_i s_i)²) / Σ w_i: the tasks' items are
taken as independent. A standard error here is the sampling of the task's items, which all trials share.
"""

import contextlib
import difflib
import io
import logging
import math
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from duet_ray.config import LmEvalConfig, StudyConfig
from duet_ray.errors import FeedbackError
from duet_ray.feedback.value import checked
from duet_ray.records import Direction, Feedback

N_BOOTSTRAPS = 100
"""Resamples for the standard error of metrics without a closed form (BLEU, F1): it is shown only, and BLEU is slow."""

log = logging.getLogger(__name__)


class LmEval:
    """Measures a model with lm-eval tasks. See `feedback.base.FeedbackSource` for the contract."""

    def __init__(self, config: StudyConfig, section: LmEvalConfig) -> None:
        self._section = section
        metric = section.metric
        self._metrics = metric if isinstance(metric, dict) else dict.fromkeys(section.tasks, metric)
        self._folder = config.resolve_path(section.tasks_folder) if section.tasks_folder else None
        self._loaded: Mapping[str, Any] | None = None

    def check(self) -> list[str]:
        """Load the tasks with their data and compare them with the settings.

        Raises:
            FeedbackError: a task is unknown or its data are missing, a metric is not one of the task's, or a weight
                is not usable.
        """
        loaded = self._tasks()
        notes: list[str] = []
        for name in self._section.tasks:
            self._check_metric(name, loaded)
        for name, task in loaded["tasks"].items():
            notes.extend(self._notes(name, task))
        return notes

    def measure(self, model: Any, tokenizer: Any, *, seed: int) -> Feedback:
        """Run the tasks. `seed` picks the few-shot examples and drives sampling at a temperature."""
        tasks = self._tasks()
        with _private_generators(seed, next(model.parameters()).device), _quietly():
            for task in tasks["tasks"].values():
                self._set_up(task, seed)
            results = self._evaluate(model, tokenizer, tasks)
        return checked(self._combine(results), "feedback.tasks")

    def task_texts(self) -> Iterable[str]:
        """The questions of every task, up to `limit` a task."""
        for task in self._tasks()["tasks"].values():
            for number, document in enumerate(task.eval_docs):
                if self._section.limit is not None and number >= self._section.limit:
                    break
                text = task.doc_to_text(document)
                if isinstance(text, str):
                    yield text

    def _tasks(self) -> Mapping[str, Any]:
        """lm-eval's `{"tasks": {name: Task}, "groups": …}`, loaded on first use."""
        if self._loaded is None:
            _check_weights(self._section.tasks)
            with _private_generators(seed=0):
                manager = self._manager()
                for name in self._section.tasks:
                    _check_name(name, manager, self._folder)
                self._loaded = self._load(manager)
        return self._loaded

    def _manager(self) -> Any:
        """The index of tasks: the folder's alone where it has all of them, for the harness's own takes seconds."""
        from lm_eval.tasks import TaskManager

        with _quietly():
            if self._folder is None:
                return TaskManager()
            if not self._folder.is_dir():
                raise FeedbackError(f"feedback.tasks_folder: no such folder: {self._folder}")
            manager = TaskManager(include_path=str(self._folder), include_defaults=False)
            if all(name in manager.all_tasks for name in self._section.tasks):
                return manager
            return TaskManager(include_path=str(self._folder))

    def _load(self, manager: Any) -> Mapping[str, Any]:
        try:
            with _inside(self._folder), _quietly():
                loaded: Mapping[str, Any] = manager.load(list(self._section.tasks))
        except Exception as error:
            where = f" (relative data files are taken from {self._folder})" if self._folder else ""
            raise FeedbackError(
                f"feedback.tasks: {', '.join(self._section.tasks)} cannot be loaded: "
                f"{type(error).__name__}: {error}{where}"
            ) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise FeedbackError(
                    f"feedback.tasks: {name} runs code that the model writes, which is not allowed here"
                )
        for name, rows in self._section.rows.items():
            _keep_rows(loaded, name, rows)
        return loaded

    def _check_metric(self, name: str, loaded: Mapping[str, Any]) -> None:
        if name in loaded["groups"]:
            self._check_group_metric(name, loaded["groups"][name])
        else:
            metrics = _metrics(loaded["tasks"][name])
            if self._metrics[name] not in metrics:
                raise FeedbackError(_no_metric(self._metrics[name], name, metrics))

    def _check_group_metric(self, name: str, group: Any) -> None:
        members = ", ".join(group.child_names)
        metrics = _group_metrics(group)
        if not metrics:
            raise FeedbackError(
                f"feedback.tasks: {name} is a group without a metric of its own; name its tasks: {members}"
            )
        if self._metrics[name] not in metrics:
            raise FeedbackError(_no_metric(self._metrics[name], name, metrics))

    def _notes(self, name: str, task: Any) -> Iterator[str]:
        section = self._section
        own_n_shot = task.get_config("num_fewshot")
        if section.n_shot and own_n_shot == 0:
            yield f"{name} stays 0-shot: its task file says so, and n_shot = {section.n_shot} has no effect on it"
        if section.temperature is not None and task.get_config("output_type") != "generate_until":
            yield f"{name} generates nothing (it compares likelihoods): temperature has no effect on it"
        # A group's tasks are not named, and have the group's metric where there is one metric for all.
        metric = section.metric if isinstance(section.metric, str) else self._metrics.get(name, "")
        better_higher = task.higher_is_better().get(metric.split(",")[0])
        if better_higher is not None and better_higher != (section.direction is Direction.MAXIMIZE):
            word = "higher" if better_higher else "lower"
            yield f"{name}: {metric} is better when {word}, but feedback.direction is {section.direction.value}"

    def _set_up(self, task: Any, seed: int) -> None:
        """What `simple_evaluate` does to a task: few-shot count and seed, and how answers are generated."""
        if task.get_config("num_fewshot") != 0:
            if self._section.n_shot is not None:
                task.set_config(key="num_fewshot", value=self._section.n_shot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
        if self._section.temperature is not None and task.get_config("output_type") == "generate_until":
            sampling = {"do_sample": self._section.temperature > 0, "temperature": self._section.temperature}
            task.set_config(key="generation_kwargs", value=sampling, update=True)

    def _evaluate(self, model: Any, tokenizer: Any, tasks: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Run the tasks: lm-eval's numbers by task and group, e.g. `{"arc": {"acc,none": 0.5, …}}`."""
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        mixed = next(model.parameters()).element_size() == 2
        try:
            wrapped = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=self._section.batch_size,
                mixed_precision_dtype="bfloat16" if mixed else None,
            )
            results = evaluate(
                wrapped, tasks, limit=self._section.limit, bootstrap_iters=N_BOOTSTRAPS, log_samples=False
            )
        except Exception as error:
            names = ", ".join(self._section.tasks)
            raise FeedbackError(f"feedback.tasks: {names} failed: {type(error).__name__}: {error}") from error
        return {**results["results"], **results.get("groups", {})}

    def _combine(self, results: Mapping[str, Mapping[str, Any]]) -> Feedback:
        metrics, weights = self._metrics, self._section.tasks
        for name in weights:
            if metrics[name] not in results[name]:
                raise FeedbackError(_no_metric(metrics[name], name, _values(results[name])))
        total = math.fsum(weights.values())
        value = math.fsum(weight * results[name][metrics[name]] for name, weight in weights.items()) / total
        stderrs: dict[str, Any] = {name: results[name].get(_stderr_key(metrics[name])) for name in weights}
        errors = [weight * float(stderrs[name]) for name, weight in weights.items() if _is_number(stderrs[name])]
        stderr = math.hypot(*errors) / total if len(errors) == len(weights) else None
        shown = {
            (other if len(results) == 1 else f"{name}: {other}"): number
            for name, numbers in results.items()
            for other, number in _values(numbers).items()
            if not (len(results) == 1 and other == metrics.get(name))
        }
        return Feedback(value=value, stderr=stderr, metrics=shown)


def _check_weights(weights: Mapping[str, float]) -> None:
    bad = [f"{name}: {weight:g}" for name, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)]
    if bad or math.fsum(weights.values()) <= 0:
        given = ", ".join(bad) or "only zeros"
        raise FeedbackError(f"feedback.tasks: weights must be finite and >= 0, at least one above 0, got {given}")


def _check_name(name: str, manager: Any, folder: Path | None) -> None:
    if name in manager.all_tags:
        members = ", ".join(sorted(manager.task_index[name].tags))
        raise FeedbackError(f"feedback.tasks: {name} is a tag over several tasks; name the tasks: {members}")
    if name in manager.all_tasks:
        return
    close = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    if folder is not None:
        own = sorted(key for key, entry in manager.task_index.items() if _stands_in(entry.yaml_path, folder))
        hint += f"; tasks in {folder}: {', '.join(own) or 'none (a task is a .yaml file with a `task:` key)'}"
    raise FeedbackError(f"feedback.tasks: lm-eval knows no task {name!r}{hint}")


def _keep_rows(loaded: Mapping[str, Any], name: str, rows: str) -> None:
    """Leave a task only the items of `start:stop:step`; few-shot examples from the same split are among them.

    Raises:
        FeedbackError: `name` is a group, or no item is left.
    """
    if name not in loaded["tasks"]:
        raise FeedbackError(f"feedback.rows: {name} is a group; name its tasks instead")
    task = loaded["tasks"][name]
    split = task.config.test_split if task.has_test_docs() else task.config.validation_split
    items = task.dataset[split]
    kept = range(len(items))[slice(*(int(part) if part else None for part in rows.split(":")))]
    if not kept:
        raise FeedbackError(f"feedback.rows: {name} has {len(items)} items, and {rows} leaves none of them")
    task.dataset[split] = items.select(kept)


def _stands_in(file: Path | None, folder: Path) -> bool:
    return file is not None and Path(file).resolve().is_relative_to(folder)


def _metrics(task: Any) -> list[str]:
    """The metrics of a task as lm-eval prints them: `metric,filter`."""
    filters = task.get_config("filter_list") or [{"name": "none"}]
    return [f"{metric},{each['name']}" for each in filters for metric in task.aggregation()]


def _group_metrics(group: Any) -> list[str]:
    """The metrics that a group makes of its tasks'; those without filters named take every filter of the tasks."""
    of_tasks = {metric for task in group.get_all_tasks() for metric in _metrics(task)}
    filters = sorted({metric.split(",", 1)[1] for metric in of_tasks})
    return [
        f"{each.metric},{name}" for each in group.aggregate_metric_list or [] for name in each.filter_list or filters
    ]


def _no_metric(metric: str, name: str, metrics: Iterable[str]) -> str:
    known = sorted(metrics)
    close = difflib.get_close_matches(metric, known, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"feedback.metric: {name} has no metric {metric!r}, it has: {', '.join(known)}{hint}"


def _stderr_key(metric: str) -> str:
    """`"acc,none"` → `"acc_stderr,none"`."""
    return re.sub(r"^([^,]*)", r"\1_stderr", metric, count=1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _values(numbers: Mapping[str, Any]) -> dict[str, float]:
    """The metrics among a task's entries: no standard errors, no names and sizes."""
    return {
        key: float(value)
        for key, value in numbers.items()
        if _is_number(value) and "," in key and not key.split(",")[0].endswith("_stderr")
    }


@contextmanager
def _private_generators(seed: int, device: Any = None) -> Iterator[None]:
    """Seed the global generators, which tasks and `generate` use, and put them back as they were."""
    import torch

    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the harness's progress bars and advice out of a worker's output, and its bootstrap in this process."""
    harness = logging.getLogger("lm_eval")
    level, alone = harness.level, os.environ.get("DISABLE_MULTIPROC")
    harness.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            yield
    finally:
        harness.setLevel(level)
        if alone is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = alone
        log.debug("lm-eval: %s", output.getvalue())


def _inside(folder: Path | None) -> contextlib.AbstractContextManager[None]:
    """The folder that relative `data_files` of a task are read from."""
    return contextlib.nullcontext() if folder is None else contextlib.chdir(folder)
