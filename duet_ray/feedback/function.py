"""Feedback from a function of the user's own: `function: "module:callable"`.

The callable is called as `callable(model, tokenizer, **arguments)`, with `seed=…` as well where it takes a seed. It
returns a number, a `(number, standard error)` pair, or a `duet_ray.records.Feedback`. What it returns is checked, not
trusted: a search that is told a NaN, a tensor or a string has lost its GPU hours before anyone notices.

The module is imported from the environment or from the folder of the study file. It is the only place where a study
file names code.
"""

import importlib
import inspect
import numbers
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from duet_ray.config import FunctionConfig, StudyConfig
from duet_ray.errors import FeedbackError
from duet_ray.feedback.value import checked
from duet_ray.records import Feedback


class Function:
    """Measures a model by calling the user's function. See `feedback.base.FeedbackSource` for the contract."""

    def __init__(self, config: StudyConfig, section: FunctionConfig) -> None:
        self._folder = str(config.folder)
        self._section = section

    def check(self) -> list[str]:
        """Import the module and compare the callable's signature with `feedback.arguments`.

        Raises:
            FeedbackError: the module or the callable is missing, or does not take these arguments.
        """
        function = self._load()
        try:
            inspect.signature(function).bind(None, None, **self._arguments(function, seed=0))
        except TypeError as error:
            raise FeedbackError(
                f"{self._name} cannot be called with (model, tokenizer"
                f"{''.join(f', {name}=…' for name in self._section.arguments)}): {error}; see feedback.arguments"
            ) from error
        except ValueError:
            return [f"{self._name}: its signature cannot be read, so feedback.arguments are not checked"]
        return []

    def measure(self, model: Any, tokenizer: Any, *, seed: int) -> Feedback:
        """Call the function. An exception of its own is a `FeedbackError` that names it."""
        function = self._load()
        with _importable_from(self._folder):
            try:
                returned = function(model, tokenizer, **self._arguments(function, seed))
            except Exception as error:
                raise FeedbackError(f"{self._name} failed with {type(error).__name__}: {error}") from error
        return checked(self._feedback(returned), self._name)

    def task_texts(self) -> Iterable[str]:
        """None: what the function reads is not known."""
        return ()

    @property
    def _name(self) -> str:
        return f"feedback.function {self._section.function!r}"

    def _load(self) -> Callable[..., Any]:
        module_name, attribute = self._section.function.split(":")
        with _importable_from(self._folder):
            try:
                module = importlib.import_module(module_name)
            except Exception as error:
                raise FeedbackError(
                    f"{self._name}: module {module_name!r} cannot be imported from the environment or from "
                    f"{self._folder}: {type(error).__name__}: {error}"
                ) from error
        function = getattr(module, attribute, None)
        if function is None:
            raise FeedbackError(f"{self._name}: {module_name!r} ({module.__file__}) has no {attribute!r}")
        if not callable(function):
            raise FeedbackError(f"{self._name}: must be callable, got {type(function).__name__}")
        return function  # type: ignore[no-any-return]

    def _arguments(self, function: Callable[..., Any], seed: int) -> dict[str, Any]:
        arguments = dict(self._section.arguments)
        return {"seed": seed, **arguments} if _takes_seed(function) else arguments

    def _feedback(self, returned: Any) -> Feedback:
        if isinstance(returned, Feedback):
            return returned
        if isinstance(returned, tuple):
            if len(returned) != 2:
                raise FeedbackError(f"{self._name}: a tuple must be (value, standard error), got {_short(returned)}")
            value, stderr = returned
            return Feedback(value=self._number(value), stderr=None if stderr is None else self._number(stderr))
        return Feedback(value=self._number(returned))

    def _number(self, value: Any) -> float:
        """A Python float from a real number; a one-element tensor or array counts as one, a bool does not."""
        if getattr(value, "size", None) == 1 or (callable(getattr(value, "numel", None)) and value.numel() == 1):
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise FeedbackError(
                f"{self._name}: must return a number, a (value, standard error) pair or a Feedback, "
                f"got {type(value).__name__}: {_short(value)}"
            )
        return float(value)


def _takes_seed(function: Callable[..., Any]) -> bool:
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    named = "seed" in parameters and parameters["seed"].kind is not inspect.Parameter.POSITIONAL_ONLY
    return named or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


@contextmanager
def _importable_from(folder: str) -> Iterator[None]:
    """Let modules in `folder` be imported, after those of the environment, for the time of an import or a call."""
    sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
