"""The weighing of one domain, in steps whose results lie on disk.

    <place>/prepared/        what the method prepared, and findings.json
            00000.npy …      what was measured of each shard of `selection.shard_rows` rows

Any worker may do any step; a step that is done is not done again, and a killed one leaves nothing that is read. The
borders of shards depend on the domain alone, so that one worker or many, interrupted or not, get the same scores.
"""

import io
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from duet_ray.errors import SelectionError
from duet_ray.files import new_folder, write_file, write_json
from duet_ray.selection.base import Findings, RowWeights, SelectionContext
from duet_ray.selection.methods import make_selector, method_of

FINDINGS = "findings.json"


def n_shards(n_rows: int, shard_rows: int) -> int:
    return -(-n_rows // shard_rows)


@dataclass(frozen=True)
class Scoring:
    """One domain's way to its weights.

    Args:
        place: a folder of this domain's own.
    """

    domain: Any
    context: SelectionContext
    place: Path

    @property
    def n_shards(self) -> int:
        return n_shards(len(self.domain.train), self.context.settings.shard_rows)

    def prepare(self) -> None:
        """The first step: what all rows share.

        Raises:
            SelectionError: the domain cannot be scored; names the domain and a remedy.
        """
        self._check()
        if self._is_trivial or self._prepared.is_dir():
            return
        started = time.perf_counter()
        with new_folder(self._prepared) as folder, self._naming_the_domain():
            found = make_selector(self.context.settings).prepare(self.domain, self.context, folder)
            details = {**found.details, "prepare_seconds": time.perf_counter() - started}
            write_json(folder / FINDINGS, {"details": details, "notes": list(found.notes)})

    def measure(self, shard: int) -> None:
        """The second step, for one shard. `prepare` comes first."""
        file = self._file(shard)
        if self._is_trivial or file.is_file():
            return
        size = self.context.settings.shard_rows
        rows = np.arange(shard * size, min((shard + 1) * size, len(self.domain.train)))
        started = time.perf_counter()
        with self._naming_the_domain():
            selector = make_selector(self.context.settings)
            measured = np.asarray(selector.measure(self.domain, rows, self.context, self._prepared))
        assert len(measured) == len(rows)
        stream = io.BytesIO()
        np.save(stream, measured, allow_pickle=False)
        # The array comes last: a shard is done where it is there.
        write_json(file.with_suffix(".json"), {"seconds": time.perf_counter() - started})
        write_file(file, stream.getvalue())

    def weigh(self) -> RowWeights:
        """The third step. All shards are measured by now."""
        self._check()
        if self._is_trivial:
            note = "there is one training row only: nothing to choose between"
            return RowWeights(probabilities=np.ones(1), notes=(note,))
        started = time.perf_counter()
        measured = np.concatenate([np.load(self._file(s), allow_pickle=False) for s in range(self.n_shards)])
        with self._naming_the_domain():
            selector = make_selector(self.context.settings)
            weights = selector.weigh(self.domain, measured, self.context, self._prepared)
        weigh_seconds = time.perf_counter() - started
        found = self.findings()
        seconds = [json.loads(self._file(s).with_suffix(".json").read_text())["seconds"] for s in range(self.n_shards)]
        return replace(
            weights,
            notes=(*found.notes, *weights.notes),
            details={
                **found.details,
                **weights.details,
                "measure_seconds": sum(seconds),
                "weigh_seconds": weigh_seconds,
            },
        )

    def findings(self) -> Findings:
        data = json.loads((self._prepared / FINDINGS).read_text(encoding="utf-8"))
        return Findings(details=data["details"], notes=tuple(data["notes"]))

    def remove(self) -> None:
        """Delete the files of all steps: the weights are stored elsewhere now."""
        shutil.rmtree(self.place, ignore_errors=True)

    @property
    def _prepared(self) -> Path:
        return self.place / "prepared"

    def _file(self, shard: int) -> Path:
        return self.place / f"{shard:05d}.npy"

    @property
    def _is_trivial(self) -> bool:
        return len(self.domain.train) == 1

    def _check(self) -> None:
        name, method, n_rows = self.domain.name, method_of(self.context.settings), len(self.domain.train)
        if n_rows == 0:
            raise SelectionError(f"domain {name}: there are no training rows to choose from; check its source")
        if method.needs_validation and len(self.domain.validation) == 0 and not self.context.examples:
            raise SelectionError(
                f"domain {name}: {self.context.settings.method} needs validation rows, and none of its {n_rows} rows "
                "is held out; raise data.validation_fraction, add rows, or use selection.method: uniform"
            )

    @contextmanager
    def _naming_the_domain(self) -> Iterator[None]:
        """Every error of a method names the domain, whatever the method did."""
        prefix = f"domain {self.domain.name}: "
        try:
            yield
        except SelectionError as error:
            if str(error).startswith(prefix):
                raise
            raise SelectionError(f"{prefix}{error}") from error


def select(domain: Any, context: SelectionContext) -> RowWeights:
    """All steps in this process, one after the other; nothing is kept on disk. Raises as the steps do."""
    with tempfile.TemporaryDirectory(prefix="duet-selection-") as folder:
        scoring = Scoring(domain, context, Path(folder) / domain.name)
        scoring.prepare()
        for shard in range(scoring.n_shards):
            scoring.measure(shard)
        return scoring.weigh()
