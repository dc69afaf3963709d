"""The public `Study`: open it, run it, resume it, and take the best mixture and model from it.

study = Study(load_config("study.yaml"))
summary = study.run()          # the same line goes on after an interruption
study.write_report()
study.export("best")
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from duet_ray.config import StudyConfig, config_from, differences
from duet_ray.errors import DuetError, StoreError, StudyChanged
from duet_ray.execution.study_run import Paused, SilentWatcher, StudyRun, Watcher
from duet_ray.execution.worker import Assignment, load_draws, mixture_of
from duet_ray.files import write_file
from duet_ray.kept_models import KeptModels, is_url
from duet_ray.mixture import rows_digest
from duet_ray.preflight import Preflight, preflight, resolved_values
from duet_ray.records import SampleResult, Trial
from duet_ray.report.scores import domain_scores
from duet_ray.report.summary import StudySummary
from duet_ray.search.past_runs import ImportedRuns, RunColumns, imported_runs, read_runs
from duet_ray.store import Store, StudyRecord, find_store, open_folder, open_store

if TYPE_CHECKING:
    from duet_ray.search.insight import Insight

LIBRARIES = ("duet-ray", "ray", "ax-platform", "botorch", "torch", "transformers", "peft", "lm-eval", "datasets")


class Study:
    """A study file and the folder of what came of it.

    Args:
        config: from `load_config`.
    """

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.folder = config.study_folder

    @classmethod
    def open(cls, folder: str | Path) -> "Study":
        """Open a study by its folder, without its study file.

        Raises:
            StoreError: there is no study in that folder.
        """
        folder = Path(folder).resolve()
        store = open_folder(folder)
        record = store.study()
        store.close()
        if record is None:
            raise StoreError(f"{folder}: the study has not started yet; `duet run` starts it")
        data = {**record.config, "name": folder.name, "storage": str(folder.parent), "store": store.url}
        return cls(config_from(data, folder=Path(record.inputs.get("folder", folder.parent))))

    def validate(self, watcher: Watcher | None = None) -> Preflight:
        """Check everything that can be checked without training, and prepare the data.

        Raises:
            DuetError: the study cannot run as it is.
        """
        return preflight(self.config, on_stage=(watcher or SilentWatcher()).phase)

    def score(self, watcher: Watcher | None = None) -> Preflight:
        """Weigh every row of every domain, as `run` would, and stop there. Stored weights are not computed again."""
        with self._session(watcher, ends_as="paused") as (ready, run):
            run.score()
        return ready

    def import_runs(
        self,
        path: str | Path,
        columns: RunColumns | None = None,
        *,
        outside: Literal["skip", "error"] = "skip",
        dry_run: bool = False,
        watcher: Watcher | None = None,
    ) -> ImportedRuns:
        """Tell the search of experiments from before the study. What was imported already has no effect.

        Args:
            path: a CSV with a column of shares per domain and one of values; see `read_runs`.
            outside: leave out runs outside the bounds and constraints, or refuse the file.
            dry_run: check everything and write nothing.

        Raises:
            DataError: the file is not sound, or none of its runs lies within the bounds and constraints.
            StudyLocked: the study is running.
            StudyChanged: as `run` does.
        """
        table = read_runs(path, self.config, columns)
        on_stage = (watcher or SilentWatcher()).phase
        if dry_run:
            store = find_store(self.folder, self.config.store)
            try:
                record = self._check_config(store) if store is not None else None
                ready = preflight(self.config, known=record.resolved if record else {}, on_stage=on_stage)
                return imported_runs(table, ready.space, store.past_runs() if store else (), outside)
            finally:
                if store is not None:
                    store.close()
        store = open_store(self.folder, self.config.store, create=True)
        try:
            with store.writing(on_stage):
                record = self._check_config(store)
                ready = preflight(self.config, known=record.resolved if record else {}, on_stage=on_stage)
                found = imported_runs(table, ready.space, store.past_runs(), outside)
                self._start(store, ready)
                # What `auto` stands for is found where the study runs, which may be another machine.
                store.update_study(
                    status=record.status if record else "new", resolved=record.resolved if record else {}
                )
                if store.add_past_runs(list(found.new)):
                    store.set_posterior({})  # It did not know of them: the next run puts the trials in order anew.
                return found
        finally:
            store.close()

    def run(self, watcher: Watcher | None = None) -> StudySummary:
        """Run the study, or go on with it, to its end.

        Raises:
            Paused: SIGINT or SIGTERM came; the same call goes on.
            StudyLocked: another driver runs this study.
            StudyChanged: the study file or its data are not what the study was started with.
            StudyFailed, SelectionError, ResourceError: see `StudyRun.run`.
        """
        with self._session(watcher) as (_, run):
            run.run()
        return self.summary()

    def summary(self) -> StudySummary:
        """The study as its store holds it now.

        Raises:
            StoreError: the study has not started.
        """
        from duet_ray.report.from_store import read_summary

        return read_summary(self.folder, self.config)

    def best(self) -> Trial:
        """The trial to go with: the best by the search's model, or the best confirmed one once there are confirmations.

        Raises:
            DuetError: no trial has an observation.
        """
        from duet_ray.report.summary import chosen_trial

        best = chosen_trial(self.summary())
        if best is None:
            raise DuetError(f"study {self.config.name} has no observation yet")
        return best

    def insight(self) -> "Insight":
        """What the search has learnt of the domains. Loads torch and BoTorch.

        Raises:
            StoreError: the study has not started.
            DuetError: it has no observation yet.
        """
        from duet_ray.report.learned import insight_of

        return insight_of(self.summary())

    def write_report(self) -> Path:
        """Write `report.html` and the figures into the study's folder, and return the page's path."""
        from duet_ray.report.page import write_report

        return write_report(self.summary(), self.folder)

    def export(self, out: str | Path, *, overwrite: bool = False) -> Any:
        """Write the best adapter and the rows it was trained on into a folder.

        Raises:
            DuetError: there is no best sample yet, its adapter is gone, or the folder is not empty.
        """
        from duet_ray.report.export import export_best

        sample = self._handed_over(self.best())
        spec, models = sample.spec, KeptModels.of(self.config)
        if sample.adapter is None or not models.has(sample.adapter):
            raise DuetError(f"the model of {spec.key} is not at {self.place_of(sample)}; it was moved or deleted")
        ready = preflight(self.config, keeps_models=False)
        store = open_store(self.folder, self.config.store)
        record = store.study()
        store.close()
        assert record is not None, "it has observations"
        self._check_inputs(record, ready)
        mixture = mixture_of(ready.config, spec, load_draws(self._assignment(ready), ready.config))
        if rows_digest(mixture) != sample.rows_digest:
            raise StudyChanged(
                f"the rows that {spec.key} was trained on cannot be drawn again: the stored weights have changed since"
            )
        with models.opened(sample.adapter) as adapter:
            return export_best(
                self.summary(),
                study_folder=self.folder,
                out=Path(out),
                texts=lambda domain, rows: ready.domains[domain].train.texts(list(rows)),
                rows=mixture,
                adapter=adapter,
                sample=sample,
                overwrite=overwrite,
            )

    def place_of(self, sample: SampleResult) -> str:
        """Where a sample's model is kept: a folder, or a URL."""
        if sample.adapter is not None and is_url(sample.adapter):
            return sample.adapter
        return str(self.folder / (sample.adapter or ""))

    # ------------------------------------------------------------------------------------------------------------

    def _handed_over(self, trial: Trial) -> SampleResult:
        """The sample whose model stands for a trial: its best one.

        Where that was deleted in the course of the search, since others looked better then, it is the best of its
        confirmations: another model of the same point.
        """
        from duet_ray.report.summary import best_sample, confirmations

        best = best_sample(trial, self.config.direction)
        assert best is not None, "it has a value"
        models = KeptModels.of(self.config)
        if best.adapter is None or models.has(best.adapter):
            return best
        again = [s for t in confirmations(self.summary()) if t.point == trial.point for s in t.samples]
        there = [s for s in again if s.value is not None and models.has(s.adapter)]
        return min(there, key=lambda s: self.config.direction.to_loss(s.value or 0.0), default=best)

    @contextmanager
    def _session(
        self, watcher: Watcher | None, ends_as: Literal["done", "paused"] = "done"
    ) -> Iterator[tuple[Preflight, StudyRun]]:
        """Hold the study's lease, make everything ready, and keep the study's status true whatever happens."""
        watcher = watcher or SilentWatcher()
        store = open_store(self.folder, self.config.store, create=True)
        started = time.monotonic()
        try:
            with store.writing(watcher.phase):
                record = self._check_config(store)
                self._see_folder(store)
                ready = preflight(self.config, known=record.resolved if record else {}, on_stage=watcher.phase)
                self._start(store, ready)
                run = StudyRun(
                    config=ready.config,
                    store=store,
                    space=ready.space,
                    assignment=self._assignment(ready),
                    unscored=ready.unscored,
                    n_train=[len(domain.train) for domain in ready.domains],
                    watcher=watcher,
                    on_weighed=lambda: store.update_study(domains=_domain_records(ready)),
                )
                status: Literal["paused", "failed", "done"] = "failed"
                try:
                    with _signals_stop(run):
                        yield ready, run
                    status = ends_as
                except (Paused, KeyboardInterrupt):
                    status = "paused"
                    raise
                finally:
                    store.update_study(status=status, domains=_domain_records(ready))
                    store.add_seconds(time.monotonic() - started)
        finally:
            store.close()

    def _check_config(self, store: Store) -> StudyRecord | None:
        """The study's row, if it was started; raises `StudyChanged` if that was with another study file."""
        record = store.study()
        if record is None:
            return None
        stored = config_from(record.config, folder=self.config.folder)
        if found := differences(stored, self.config):
            lines = "\n".join(f"  {line}" for line in found)
            where = f" (in {store.place})" if self.config.store else ""
            raise StudyChanged(
                f"study {self.config.name}{where} was started with another study file:\n{lines}\n"
                f"undo the change, or give the study another name"
            )
        return record

    def _see_folder(self, store: Store) -> None:
        """See that what a study has left is here, where its store is elsewhere.

        Raises:
            StoreError: there is none of it.
        """
        if self.config.store is not None and not (self.folder / "study.yaml").is_file() and store.trials():
            raise StoreError(
                f"study {self.config.name} has begun ({store.place}), and its folder is not at {self.folder}: is the "
                f"share mounted here? `storage` says where it is"
            )

    def _check_inputs(self, record: StudyRecord, ready: Preflight) -> None:
        """Raise `StudyChanged` if the model, the data or the task are not those that the study was started with."""
        known = {name: value for name, value in record.inputs.items() if name != "folder"}
        if known and known != ready.inputs:
            changed = ", ".join(_changed(known, ready.inputs))
            raise StudyChanged(
                f"study {self.config.name} was started with other data: {changed}; "
                f"put the old data back, or give the study another name"
            )

    def _start(self, store: Store, ready: Preflight) -> None:
        """Write the study's row, or see that the data are still those it was started with."""
        inputs = {**ready.inputs, "folder": str(self.config.folder)}
        record = store.study()
        if record is None:
            store.create_study(name=self.config.name, config=self.config.model_dump(mode="json"), versions=_versions())
        else:
            self._check_inputs(record, ready)
        store.update_study(
            config=self.config.model_dump(mode="json"),
            inputs=inputs,
            resolved=resolved_values(ready.config),
            domains=_domain_records(ready),
            status="running",
        )
        head = (
            f"# {self.config.name} with every default filled in; relative paths are taken from {self.config.folder}\n"
        )
        text = head + ready.config.to_yaml()
        KeptModels.set_mark(self.config)
        write_file(self.folder / "study.yaml", text.encode())  # last: workers take it for a sign that all is there

    def _assignment(self, ready: Preflight) -> Assignment:
        return Assignment(
            config=ready.config.model_dump(mode="json"),
            folder=str(ready.config.folder),
            domain_folders=tuple(str(domain.folder) for domain in ready.domains),
            scoring_folders=tuple(str(domain.folder) for domain in ready.scoring_domains),
            weights_folder=str(ready.weights_folder),
            weights_keys=ready.weights_keys,
        )


@contextmanager
def _signals_stop(run: StudyRun) -> Iterator[None]:
    """SIGINT and SIGTERM pause the run; a second one ends the process as usual. Only where we own the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        run.stop()
        signal.signal(number, old[number])

    old: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in old:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _changed(known: dict[str, Any], now: dict[str, Any]) -> list[str]:
    domains_then, domains_now = known.get("domains", {}), now.get("domains", {})
    parts = [f"domain {name}" for name, mark in domains_now.items() if domains_then.get(name) != mark]
    parts += ["the task's files"] if known.get("task") != now.get("task") else []
    parts += ["the model"] if known.get("model") != now.get("model") else []
    return parts


def _domain_records(ready: Preflight) -> list[dict[str, Any]]:
    """What the report says of the data, as plain data."""
    records = []
    for index, (domain, weights) in enumerate(zip(ready.domains, ready.weights(), strict=True)):
        overlap = ready.overlaps[index] if ready.overlaps is not None else None
        records.append(
            {
                "name": domain.name,
                "source": ", ".join(ready.config.domains[index].sources),
                "n_train": len(domain.train),
                "n_validation": len(domain.validation),
                "n_bad": domain.report.n_bad,
                "n_duplicates": domain.report.n_duplicates,
                "n_overlap": overlap.n_overlapping_rows if overlap is not None else None,
                "effective_sample_size": weights.effective_sample_size if weights is not None else None,
                "notes": list(weights.notes) if weights is not None else [],
                "scores": domain_scores(ready.config, domain, weights) if weights is not None else None,
            }
        )
    return records


def _versions() -> dict[str, str]:
    return {"python": sys.version.split()[0], **{name: version(name) for name in LIBRARIES}}
