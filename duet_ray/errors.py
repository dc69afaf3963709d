"""What can go wrong, as one small family of exceptions.

Every mistake of a user, and every fault that the user can act on, is a `DuetError`. Its message says what was
received, what is allowed and where to change it. `assert` is left for our own invariants.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class DuetError(Exception):
    """The base of every error that a user is meant to read."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with a study file: where it is, what it is, what would be right."""

    path: str
    """The YAML path, e.g. `domains[1].source`; empty for the file as a whole."""
    message: str
    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        where = (
            f" ({self.file} line {self.line})" if self.file and self.line else f" ({self.file})" if self.file else ""
        )
        return f"{self.path}: {self.message}{where}" if self.path else f"{self.message}{where}"


class ConfigError(DuetError):
    """The study file is not usable. Holds every problem found, not only the first."""

    def __init__(self, problems: Sequence[Problem] | str) -> None:
        self.problems = [Problem(path="", message=problems)] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class DataError(DuetError):
    """A data source cannot be used: missing, empty, or with too many bad rows."""


class DataErrors(DataError):
    """Several data problems, reported together."""

    def __init__(self, errors: Iterable[Exception]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(str(e) for e in self.errors))


class RatioError(DuetError):
    """A ratio is off the simplex, outside its bounds, or cannot be served by the rows there are."""


class SelectionError(DuetError):
    """A selection method cannot score a domain. The message names the domain and a remedy."""


class FeedbackError(DuetError):
    """The feedback did not return a usable number."""


class NoValueError(FeedbackError):
    """The feedback worked, and this model has no usable value (NaN, infinite): the model's failure, not the task's."""


class SampleFailed(DuetError):
    """One sample failed for a reason of its own (NaN, out of memory twice): final, never retried."""


class ResourceError(DuetError):
    """The machine or the cluster has less than the study asks for."""


class StoreError(DuetError):
    """The study's store cannot be read or written."""


class StudyLocked(StoreError):
    """Another driver holds this study."""


class StudyChanged(StoreError):
    """The study file or its data differ from what the study was started with."""


class StudyFailed(DuetError):
    """The study ended without a single observation."""
