"""One task, from lease to files: the work that a group does, without Ray.

What a task leaves on disk, and how a half-done one is taken up again, is said in `artifacts`.
"""

import errno
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np

from duet_ray.config import AnyFeedback, StudyConfig, TrainingConfig, config_from, fingerprint
from duet_ray.domains import Domain, open_domain
from duet_ray.errors import FeedbackError, NoValueError, SampleFailed, StoreError
from duet_ray.execution.artifacts import (
    TRAINING,
    Comparison,
    clear_ended,
    leave_comparisons,
    leave_result,
    read_comparisons,
    read_json,
    read_result,
    sample_folder,
)
from duet_ray.execution.broker import Task
from duet_ray.feedback import FeedbackSource, make_feedback
from duet_ray.files import seen, write_json
from duet_ray.kept_models import KeptModels
from duet_ray.mixture import DrawBy, RowOrder, at_fidelity, draw_mixture, rows_digest
from duet_ray.records import Feedback, Mixture, SampleResult, SampleSpec, TokenRow
from duet_ray.requirements import parse_requirement
from duet_ray.seeds import child_seed
from duet_ray.selection import RowWeights, Scoring, SelectionContext, load_weights, n_drawn, save_weights
from duet_ray.selection.examples import read_examples
from duet_ray.training import Halt, Stopped, load_base, make_trainer
from duet_ray.training.searched import training_of

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


@dataclass(frozen=True, kw_only=True)
class _Work:
    """A sample to train: its rows and settings."""

    spec: SampleSpec
    mixture: Mixture
    training: TrainingConfig

    @cached_property
    def rows_digest(self) -> str:
        return rows_digest(self.mixture)

    @cached_property
    def mark(self) -> str:
        """What is trained of it is known by this: the same mark, the same rows and settings."""
        settings = self.spec.settings
        return fingerprint([self.rows_digest, settings]) if settings else self.rows_digest


class _Instruments:
    """The feedback and what is measured beside it, with the limits of one use."""

    def __init__(self, config: StudyConfig, change: Callable[[AnyFeedback], AnyFeedback] = lambda one: one) -> None:
        self.main = make_feedback(config, change(config.feedback))
        self.also: dict[str, FeedbackSource] = {
            which.metric_key: make_feedback(config, change(which)) for which in config.also
        }


def _quicker(section: AnyFeedback, limit: int | None) -> AnyFeedback:
    """The same with a limit of its own, where it can have one."""
    can = limit is not None and hasattr(section, "limit")
    return section.model_copy(update={"limit": limit}) if can else section


def _closer(section: AnyFeedback, limit: int | None) -> AnyFeedback:
    """The same with a limit that is at least so large; one without a limit looks at everything already."""
    known = getattr(section, "limit", None)
    return section if limit is None or known is None else section.model_copy(update={"limit": max(known, limit)})


class Worker:
    """Does tasks with one base model in memory. Domains, weights and the model are loaded when first needed.

    Args:
        on_follow: has the other processes of the group `follow` what it is given.
    """

    def __init__(self, assignment: Assignment, on_follow: Callable[[Mapping[str, Any]], None] = lambda _: None) -> None:
        self._assignment = assignment
        self._config = assignment.study_config()
        self._instruments = _Instruments(self._config)
        self._on_follow = on_follow
        self._apart: set[tuple[SampleSpec, ...]] = set()
        self.others_wait = False
        """Whether this process failed in the middle of what the group's others do along with it."""

    @cached_property
    def _quick(self) -> _Instruments:
        """For the comparisons of a race."""
        racing = self._config.sampling.racing
        return _Instruments(self._config, lambda one: _quicker(one, racing.limit if racing else None))

    @cached_property
    def _close(self) -> _Instruments:
        """For confirmations."""
        return _Instruments(self._config, lambda one: _closer(one, self._config.confirm.limit))

    @cached_property
    def _needed(self) -> frozenset[str]:
        """The metrics that the search cannot do without."""
        objective = self._config.search.objective
        if objective is None:
            return frozenset()
        names = [one.metric_key for one in (self._config.feedback, *self._config.also)]
        required = (parse_requirement(text, names).metric for text in objective.require)
        return frozenset([*(objective.weights or {}), *(objective.pareto or ()), *required])

    @cached_property
    def _base(self) -> tuple[Any, Any]:
        return load_base(self._config)

    @cached_property
    def _trainer(self) -> Any:
        model, tokenizer = self._base
        return make_trainer(self._config.training, model, tokenizer)

    @cached_property
    def _models(self) -> KeptModels:
        return KeptModels.of(self._config)

    @cached_property
    def _domains(self) -> list[Domain]:
        return [open_domain(Path(folder), index=i) for i, folder in enumerate(self._assignment.domain_folders)]

    @cached_property
    def _weights(self) -> list[DrawBy]:
        found: list[list[DrawBy]] = []

        def are_there() -> bool:
            with suppress(StoreError):
                found.append(load_draws(self._assignment, self._config))
            return bool(found)

        return found[0] if seen(are_there) else load_draws(self._assignment, self._config)  # it says which is missing

    @cached_property
    def _surrogate(self) -> tuple[Any, Any]:
        return load_base(self._config.for_scoring)

    @cached_property
    def _examples(self) -> list[TokenRow]:
        return read_examples(self._config, self._scoring_model()[1])

    def preload(self) -> None:
        """Load the model now rather than inside the first task."""
        _ = self._trainer

    def do_sample(
        self, spec: SampleSpec, lease: int, progress: Progress, *, bundle: Sequence[SampleSpec] = ()
    ) -> SampleResult:
        """Train one sample if need be, measure it, and leave `result.json`.

        Args:
            bundle: the samples to train in one pass, this one among them; none: it trains alone.

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
        work: _Work | None = None
        trained: dict[str, Any] = {}
        compared = read_comparisons(folder)
        try:
            if spec.ratio is None:
                self._trainer.reset()
            else:
                work = self._work(spec)
                trained = self._train(work, progress, tuple(bundle))
            train_seconds = time.monotonic() - started
            progress("feedback")
            started = time.monotonic()
            measured = self._measure(spec, self._close if spec.kind == "confirm" else self._instruments)
            place = trained.pop(MODEL, None)
            result = SampleResult(
                spec=spec,
                value=measured.value,
                stderr=measured.stderr,
                metrics=measured.metrics,
                train={**trained, **({"compared": {f"{c.share:g}": c.value for c in compared}} if compared else {})},
                train_seconds=train_seconds + sum(c.train_seconds for c in compared),
                feedback_seconds=time.monotonic() - started + sum(c.feedback_seconds for c in compared),
                rows_digest=work.rows_digest if work else None,
                adapter=place,
                lease=lease,
            )
        except (SampleFailed, NoValueError) as error:
            result = SampleResult(
                spec=spec, value=None, reason=str(error), rows_digest=work.rows_digest if work else None, lease=lease
            )
        finally:
            # Nothing of this sample may be in the next one, nor in a domain's scores.
            if "_trainer" in self.__dict__:
                self._trainer.reset()
        result = leave_result(folder, result)
        clear_ended(folder, result, self._models)
        return result

    def do_comparison(self, task: Task, progress: Progress) -> dict[str, Any]:
        """Train one sample until a share of its steps, and measure it quickly: `sampling.racing`.

        Returns:
            A `Comparison` as plain data; also left in the sample's folder, where it stands for good.
        """
        spec, racing = task.spec, self._config.sampling.racing
        assert spec is not None
        assert racing is not None
        folder = sample_folder(self._config.study_folder, spec)
        if (earlier := next((c for c in read_comparisons(folder) if c.share == task.until), None)) is not None:
            return asdict(earlier)
        folder.mkdir(parents=True, exist_ok=True)
        before = read_comparisons(folder)
        started = time.monotonic()
        value, reason = None, None
        try:
            self._train(self._work(spec), progress, task.bundle, task.until)
            train_seconds = time.monotonic() - started
            progress("comparing")
            started = time.monotonic()
            value = self._measure(spec, self._quick, only_needed=True).value
        except (SampleFailed, NoValueError) as error:
            reason, train_seconds = str(error), time.monotonic() - started
            started = time.monotonic()
        finally:
            self._trainer.reset()
        found = Comparison(
            share=task.until,
            value=value,
            reason=reason,
            train_seconds=train_seconds,
            feedback_seconds=time.monotonic() - started,
        )
        leave_comparisons(folder, [*before, found])
        return asdict(found)

    def follow(self, what: Mapping[str, Any]) -> None:
        """Train a sample along with the group's first process, which alone keeps and measures it."""
        work = self._work(SampleSpec.from_json(what["spec"]))
        halt = self._halt(work, what["until"]) if what["halts"] else None
        with suppress(SampleFailed):  # It is the same in all processes; the first one says so.
            self._trainer.train(self._rows(work), seed=self._train_seed(work.spec), training=work.training, halt=halt)

    def do_scoring(self, task: Task, progress: Progress) -> dict[str, Any]:
        """One step on a domain's way to its weights; found done, nothing is computed.

        Raises:
            SelectionError: the domain cannot be scored.
        """
        from duet_ray.training.ranks import alone

        assert task.domain is not None
        scoring = self._scoring(task.domain, progress)
        if self._weights_of(task.domain) is None:
            if "_trainer" in self.__dict__:
                self._trainer.reset()
            with alone():
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

    def _measure(self, spec: SampleSpec, by: _Instruments, *, only_needed: bool = False) -> Feedback:
        """Measure the model in memory.

        Where the search is for a weighted sum of metrics (`search.objective.weights`), the value is that sum, and its
        parts stand among the metrics. Each part is a loss in its own direction, so the sum is one too; it is turned to
        the feedback's direction: of scores alone that are made large, it is the plain sum of weight times score.

        Args:
            only_needed: leave out what is only shown.
        """
        seed, weights = self._feedback_seed(spec), self._weights_of_metrics
        measured = by.main.measure(self._trainer.model, self._base[1], seed=seed)
        beside = {}
        for name, source in by.also.items():
            if only_needed and name not in weights:
                continue
            try:
                beside[name] = source.measure(self._trainer.model, self._base[1], seed=seed).value
            except FeedbackError as error:
                if name in self._needed:
                    raise
                log.warning("%s: %s is left out: %s", spec.key, name, error)
        if not weights:
            return replace(measured, metrics={**measured.metrics, **beside})
        parts = {**measured.metrics, self._config.feedback.metric_key: measured.value, **beside}
        directions = {one.metric_key: one.direction for one in (self._config.feedback, *self._config.also)}
        loss = math.fsum(weight * directions[name].to_loss(parts[name]) for name, weight in weights.items())
        # The feedback's own standard error is of a part, not of the sum.
        return Feedback(value=self._config.direction.to_value(loss), metrics=parts)

    @property
    def _weights_of_metrics(self) -> Mapping[str, float]:
        """Empty where the feedback's own value is what is searched for."""
        objective = self._config.search.objective
        return (objective.weights or {}) if objective else {}

    def _train(
        self,
        work: _Work,
        progress: Progress,
        bundle: tuple[SampleSpec, ...],
        until: float = 1.0,
    ) -> dict[str, Any]:
        """Train until a share of the steps, or take what an earlier worker made of the same rows and settings.

        Returns:
            The trainer's report. The model is in memory.
        """
        from duet_ray.training.ranks import was_stopped

        spec = work.spec
        folder = sample_folder(self._config.study_folder, spec)
        if (report := self._trained(work, folder, until)) is not None:
            return report
        if len(bundle) > 1 and bundle not in self._apart:
            if self._train_together(bundle, until, progress):
                report = self._trained(work, folder, until)
                assert report is not None, "it was in the bundle"
                return report
            self._apart.add(bundle)
        halt = self._halt(work, until)
        self._on_follow({"spec": spec.to_json(), "until": until, "halts": halt is not None})
        self.others_wait = True
        try:
            report = self._trainer.train(
                self._rows(work),
                seed=self._train_seed(spec),
                training=work.training,
                on_step=lambda done, total: progress("training", done, total),
                halt=halt,
            ).to_json()
        except SampleFailed:
            self.others_wait = False
            raise
        self.others_wait = False
        if was_stopped():
            raise Stopped
        if until == 1:
            report[MODEL] = self._models.keep(folder, self._trainer.artifact, self._trainer.save)
            write_json(trained_file(folder), {**report, MARK: work.mark})
        return report

    def _trained(self, work: _Work, folder: Path, until: float) -> dict[str, Any] | None:
        """What was trained already, and is in memory now; None where it must be trained.

        Raises:
            SampleFailed: it was trained along with others, and failed.
        """
        report = read_json(trained_file(folder, until))
        if report is None or report.pop(MARK, None) != work.mark:
            return None
        if (reason := report.get("reason")) is not None:
            raise SampleFailed(reason)
        if until < 1:  # The state of the training is all there is of it, and takes no step more.
            halt, seed = self._halt(work, until), self._train_seed(work.spec)
            self._trainer.train(self._rows(work), seed=seed, training=work.training, halt=halt)
            return report
        report.setdefault(MODEL, self._place(folder))
        if not self._models.has(report[MODEL]):
            return None
        try:
            with self._models.opened(report[MODEL]) as local:
                self._trainer.load(local)
        except StoreError as error:
            log.warning("%s: its model is damaged and is trained again: %s", work.spec.key, error)
            self._models.remove(report[MODEL])
            trained_file(folder, until).unlink(missing_ok=True)
            return None
        log.info("%s was trained already: only its feedback is repeated", work.spec.key)
        return report

    def _train_together(self, bundle: tuple[SampleSpec, ...], until: float, progress: Progress) -> bool:
        """Train the adapters of a bundle in one pass, and leave each in its sample's folder.

        The bundle is trained as a whole also where some of it is done: who trains along has a part in the rounding.

        Returns:
            False if they do not fit into memory together.
        """
        from duet_ray.training.fused_lora import FusedSample, train_fused

        works = [self._work(spec) for spec in bundle]
        folders = [sample_folder(self._config.study_folder, spec) for spec in bundle]
        assert len({spec.settings for spec in bundle}) == 1, "a bundle is of one trial"
        self._trainer.reset()
        log.info("%s train in one pass", ", ".join(spec.key for spec in bundle))
        with TemporaryDirectory(dir=folders[0].parent, prefix="together.tmp-") as scratch:
            adapters = [Path(scratch) / spec.key for spec in bundle]
            samples = [
                FusedSample(
                    rows=self._rows(work),
                    seed=self._train_seed(work.spec),
                    folder=adapter,
                    halt=self._halt(work, until),
                )
                for work, adapter in zip(works, adapters, strict=True)
            ]
            try:
                ended = train_fused(
                    self._trainer.model,
                    self._base[1],
                    works[0].training,
                    samples,
                    on_step=lambda done, total: progress(f"training {len(bundle)} samples in one pass", done, total),
                )
            except SampleFailed as error:
                log.warning("%s and others do not fit in one pass, and train one by one: %s", bundle[0].key, error)
                return False
            for folder, adapter, work, report in zip(folders, adapters, works, ended, strict=True):
                folder.mkdir(parents=True, exist_ok=True)
                known = read_json(trained_file(folder, until))
                place = (known or {}).get(MODEL, self._place(folder))
                if known is not None and known.get(MARK) == work.mark and self._models.has(place):
                    continue
                if isinstance(report, SampleFailed):
                    write_json(trained_file(folder, until), {"reason": str(report), MARK: work.mark})
                    continue
                said = {**report.to_json(), "n_fused": len(bundle), MARK: work.mark}
                if until == 1:
                    copy = partial(shutil.copytree, adapter, dirs_exist_ok=True)
                    said[MODEL] = self._models.keep(folder, self._trainer.artifact, copy)
                write_json(trained_file(folder, until), said)
        return True

    def _halt(self, work: _Work, until: float) -> Halt | None:
        """Where a sample's training is written down in the middle, if it is at all."""
        minutes = work.training.checkpoint_minutes
        place = sample_folder(self._config.study_folder, work.spec) / TRAINING / work.mark[:16]
        # Where every weight is trained, it also holds the word that memory ran out, for the next attempt.
        if minutes is None and until == 1 and work.training.method == "lora" and not place.is_dir():
            return None
        return Halt(folder=place, every_seconds=minutes * 60 if minutes is not None else None, after=until)

    def _work(self, spec: SampleSpec) -> _Work:
        training = training_of(self._config, spec.settings)
        return _Work(spec=spec, mixture=mixture_of(self._config, spec, self._weights), training=training)

    def _rows(self, work: _Work) -> list[TokenRow]:
        drawn = zip(self._domains, work.mixture.rows, strict=True)
        rows = [row for domain, ids in drawn if len(ids) for row in domain.train.rows(ids.tolist())]
        # The domains are made for the study's own `loss_on`; of a trial's own, `all` alone can be made of them.
        is_wider = work.training.loss_on == "all" != self._config.training.loss_on
        return [_learned_throughout(row) for row in rows] if is_wider else rows

    def _place(self, folder: Path) -> str:
        """The place of a sample's model where nothing is said of it: it was kept by a version without `artifacts`."""
        return str((folder / self._trainer.artifact).relative_to(self._config.study_folder))

    def _train_seed(self, spec: SampleSpec) -> int:
        return child_seed(self._config.seed, "train", spec.trial, spec.sample)

    def _feedback_seed(self, spec: SampleSpec) -> int:
        return child_seed(self._config.seed, "evaluate", max(spec.trial, 0), spec.sample)


MODEL = "model"
"""Key of the model's place in the file of a trained sample."""

MARK = "rows_digest"
"""Key of `_Work.mark` in the file of a trained sample; without settings of its trial it is the digest of the rows."""


def _learned_throughout(row: TokenRow) -> TokenRow:
    """The row as `training.loss_on: all` has it."""
    mask = np.ones(len(row), dtype=bool)
    mask[:1] = False
    return replace(row, loss_mask=mask)


def trained_file(folder: Path, until: float = 1.0) -> Path:
    """What the trainer reports of a sample, once it is trained until a share of its steps."""
    return folder / ("trained.json" if until == 1 else f"trained-{until:g}.json")


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
        at_fidelity(spec.ratio, spec.fidelity),
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
