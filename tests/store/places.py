"""Where a store may be, so that one test runs over all of them; and processes that use it."""

import multiprocessing
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from duet_ray.records import BASE_TRIAL, Ratio, SampleResult, SampleSpec
from duet_ray.store import Store, schema

KINDS = ["folder", "sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)]


@dataclass(frozen=True, kw_only=True)
class Place:
    """One study's folder and store."""

    folder: Path
    url: str | None = None

    def open(self, *, create: bool = True) -> Store:
        return Store(self.folder, create=create, url=self.url)


def place_of(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    """A place where nothing is yet."""
    folder = tmp_path / f"study-{uuid.uuid4().hex[:8]}"
    if kind == "folder":
        return Place(folder=folder)
    if kind == "sqlite":
        return Place(folder=folder, url=f"sqlite:///{tmp_path}/stores/{folder.name}.db")
    return Place(folder=folder, url=request.getfixturevalue("postgres").url())


def set_driver(store: Store, **values: Any) -> None:
    """Write into the driver's row behind everybody's back."""
    change = update(schema.driver).values(**values)
    store._transactions.exclusive(lambda connection: connection.execute(change) and None)


def result(trial: int, sample: int, value: float | None = 0.5, **more: Any) -> SampleResult:
    ratio = None if trial == BASE_TRIAL else Ratio(counts=(3, 7))
    return SampleResult(
        spec=SampleSpec(trial=trial, sample=sample, kind="start", ratio=ratio),
        value=value,
        **{
            "reason": None if value is not None else "NaN",
            "metrics": {"accuracy": 0.25},
            "adapter": f"artifacts/t{trial}/{sample}/adapter",
            **more,
        },
    )


def forked(target: Callable[[Pipe], None]) -> tuple[ForkProcess, Pipe]:
    """Run a function in a child of this process, with a pipe to it. The child opens its stores itself."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()

    def main() -> None:
        ours.close()
        try:
            target(theirs)
        except (EOFError, BrokenPipeError):
            os._exit(1)  # The test is over.

    process = multiprocessing.get_context("fork").Process(target=main, daemon=True)
    process.start()
    theirs.close()
    return process, ours
