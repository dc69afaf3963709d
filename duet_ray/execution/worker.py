"""One task, from lease to files: the work that a group does, without Ray.

What a task leaves on disk, and how a half-done one is taken up again, is said in `artifacts`.
"""

import errno
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from duet_ray.config import StudyConfig, config_from
from duet_ray.domains import Domain, open_domain
from duet_ray.errors import FeedbackError, NoValueError, SampleFailed, StoreError
from duet_ray.execution.artifacts import leave_result, read_json, read_result, sample_folder
from duet_ray.execution.broker import Task
from duet_ray.feedback import make_feedback
from duet_ray.files import new_folder, write_json
from duet_ray.mixture import DrawBy, RowOrder, draw_mixture, rows_digest
from duet_ray.records import Mixture, SampleResult, SampleSpec, TokenRow
from duet_ray.seeds import child_seed
from duet_ray.selection import RowWeights, Scoring, SelectionContext, load_weights, n_drawn, save_weights
from duet_ray.selection.examples import read_examples
from duet_ray.training import load_base, make_trainer

log = logging.getLogger(__name__)


class Progress(Protocol):
    """Is told how far a task is."""

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        """`done` of `total` steps of a stage; 0 where that is not known."""
        ...


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Everything a worker must know of the study; plain data, so that it travels as it is."""

    config: Mapping[str, Any]
    """The resolved study file."""
    folder: str
    """The folder that its relative paths are taken from."""
    domain_folders: tuple[str, ...]
    scoring_folders: tuple[str, ...]
    """The same domains as the model that scores them has them."""
    weights_folder: str
    weights_keys: tuple[str, ...]

    def study_config(self) -> StudyConfig:
        return config_from(self.config, folder=Path(self.folder))


class Worker:
    """Does tasks with one base model in memory. Domains, weights and the model are loaded when first needed."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._config = assignment.study_config()
        self._feedback = make_feedback(self._config)
        self._also = [make_feedback(self._config, which) for which in self._config.also]

    @cached_property
    def _base(self) -> tuple[Any, Any]:
        return load_base(self._config)

    @cached_property
    def _trainer(self) -> Any:
        model, tokenizer = self._base
        return make_trainer(self._config.training, model, tokenizer)

    @cached_property
    def _domains(self) -> list[Domain]:
        return [open_domain(Path(folder), index=i) for i, folder in enumerate(self._assignment.domain_folders)]

    @cached_property
    def _weights(self) -> list[DrawBy]:
        return load_draws(self._assignment, self._config)

    @cached_property
    def _surrogate(self) -> tuple[Any, Any]:
        return load_base(self._config.for_scoring)

    @cached_property
    def _examples(self) -> list[TokenRow]:
        return read_examples(self._config, self._scoring_model()[1])

    def preload(self) -> None:
        """Load the model now rather than inside the first task."""
        _ = self._trainer

    def do_sample(self, spec: SampleSpec, lease: int, progress: Progress) -> SampleResult:
        """Train one sample if need be, measure it, and leave `result.json`.

        Returns:
            The result that stands: this one, or an earlier one found in place.

        Raises:
            Exception: whatever is not the sample's own fault. What was finished stays in place.
        """
        folder = sample_folder(self._config.study_folder, spec)
        if (earlier := read_result(folder)) is not None:
            return earlier
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        digest = None
        trained: dict[str, Any] = {}
        try:
            if spec.ratio is None:
                self._trainer.reset()
            else:
                mixture = mixture_of(self._config, spec, self._weights)
                digest = rows_digest(mixture)
                trained = self._train(spec, mixture, digest, folder, progress)
            train_seconds = time.monotonic() - started
            progress("feedback")
            started = time.monotonic()
            seed = child_seed(self._config.seed, "evaluate", max(spec.trial, 0), spec.sample)
            measured = self._feedback.measure(self._trainer.model, self._base[1], seed=seed)
            metrics = {**measured.metrics, **self._measure_also(spec, seed)}
            result = SampleResult(
                spec=spec,
                value=measured.value,
                stderr=measured.stderr,
                metrics=metrics,
                train=trained,
                train_seconds=train_seconds,
                feedback_seconds=time.monotonic() - started,
                rows_digest=digest,
                adapter=str((folder / "adapter").relative_to(self._config.study_folder)) if trained else None,
                lease=lease,
            )
        except (SampleFailed, NoValueError) as error:
            result = SampleResult(spec=spec, value=None, reason=str(error), rows_digest=digest, lease=lease)
        finally:
            # Nothing of this sample may be in the next one, nor in a domain's scores.
            if "_trainer" in self.__dict__:
                self._trainer.reset()
        return leave_result(folder, result)

    def do_scoring(self, task: Task, progress: Progress) -> dict[str, Any]:
        """One step on a domain's way to its weights; found done, nothing is computed.

        Raises:
            SelectionError: the domain cannot be scored.
        """
        assert task.domain is not None
        scoring = self._scoring(task.domain, progress)
        if self._weights_of(task.domain) is None:
            if "_trainer" in self.__dict__:
                self._trainer.reset()
            if task.kind == "prepare":
                scoring.prepare()
            elif task.kind == "score":
                assert task.shard is not None
                scoring.measure(task.shard)
            else:
                key = self._assignment.weights_keys[task.domain]
                save_weights(Path(self._assignment.weights_folder), key, scoring.weigh())
        if task.kind == "weigh":
            scoring.remove()
        return {"domain": scoring.domain.name}

    def _weights_of(self, index: int) -> RowWeights | None:
        return load_weights(Path(self._assignment.weights_folder), self._assignment.weights_keys[index])

    def _scoring(self, index: int, progress: Progress) -> Scoring:
        settings = self._config.selection
        domain = open_domain(Path(self._assignment.scoring_folders[index]), index=index)
        context = SelectionContext(
            settings=settings,
            training=self._config.training,
            seed=self._config.seed,
            load_base=self._scoring_model,
            on_progress=progress,
            n_drawn=n_drawn(self._config, index, len(domain.train)),
            embedding_model=self._config.place_of(settings.embedding_model) if settings.embedding_model else None,
            examples=self._examples if settings.examples else (),
        )
        place = self._config.study_folder / "scoring" / self._assignment.weights_keys[index]
        return Scoring(domain, context, place)

    def _scoring_model(self) -> tuple[Any, Any]:
        return self._base if self._config.selection.surrogate is None else self._surrogate

    def _measure_also(self, spec: SampleSpec, seed: int) -> dict[str, float]:
        """The measurements that are shown and never told; one that fails is left out, and costs no sample."""
        metrics = {}
        for source, settings in zip(self._also, self._config.also, strict=True):
            name = settings.metric_key
            try:
                metrics[name] = source.measure(self._trainer.model, self._base[1], seed=seed).value
            except FeedbackError as error:
                log.warning("%s: %s is left out: %s", spec.key, name, error)
        return metrics

    def _train(
        self, spec: SampleSpec, mixture: Mixture, digest: str, folder: Path, progress: Progress
    ) -> dict[str, Any]:
        """Train, or take what an earlier worker trained on the very same rows."""
        report = read_json(folder / "trained.json")
        if report is not None and report.get("rows_digest") == digest and (folder / "adapter").is_dir():
            try:
                self._trainer.load(folder / "adapter")
            except StoreError as error:
                log.warning("%s: its adapter is damaged and is trained again: %s", spec.key, error)
            else:
                log.info("%s was trained already: only its feedback is repeated", spec.key)
                return {name: value for name, value in report.items() if name != "rows_digest"}
        for stale in (folder / "adapter", *folder.glob("adapter.tmp-*")):
            shutil.rmtree(stale, ignore_errors=True)
        rows = [
            row
            for domain, ids in zip(self._domains, mixture.rows, strict=True)
            if len(ids)
            for row in domain.train.rows(ids.tolist())
        ]
        seed = child_seed(self._config.seed, "train", spec.trial, spec.sample)
        report = self._trainer.train(
            rows, seed=seed, on_step=lambda done, total: progress("training", done, total)
        ).to_json()
        with new_folder(folder / "adapter") as temporary:
            self._trainer.save(temporary)
        write_json(folder / "trained.json", {**report, "rows_digest": digest})
        return report


def load_draws(assignment: Assignment, config: StudyConfig) -> list[DrawBy]:
    """Per domain, what its rows are drawn by: the stored probabilities, or the stored order.

    Raises:
        StoreError: a domain has no stored weights.
    """
    loaded: list[DrawBy] = []
    for name, key in zip(config.domain_names, assignment.weights_keys, strict=True):
        weights = load_weights(Path(assignment.weights_folder), key)
        if weights is None:
            raise StoreError(f"domain {name} has no stored weights; `duet score` computes them")
        if weights.probabilities is not None:
            loaded.append(weights.probabilities)
        else:
            assert weights.order is not None
            loaded.append(RowOrder(weights.order, config.selection.pool))
    return loaded


def mixture_of(config: StudyConfig, spec: SampleSpec, weights: Sequence[DrawBy]) -> Mixture:
    """The rows of a sample: a function of the study file and the sample's place, wherever it is called."""
    assert spec.ratio is not None
    return draw_mixture(
        spec.ratio,
        weights,
        seed=config.seed,
        trial=spec.trial,
        sample=spec.sample,
        replacement=config.mixture.replacement,
        when_short=config.mixture.when_short,
        names=config.domain_names,
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a full disk or a used-up quota."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # safetensors reports the system's error as text only.
        if "No space left on device" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
