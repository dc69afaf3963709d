"""The contract of a feedback: one model → one number.

A feedback sees the fine-tuned model in memory and returns a value in the user's own direction. It never sees the
ratio, and the search never sees anything but the value.
"""

from collections.abc import Iterable
from typing import Any, Protocol

from duet_ray.records import Feedback


class FeedbackSource(Protocol):
    """Measures a model on the task."""

    def check(self) -> list[str]:
        """Fail fast, without a model: raise `FeedbackError` if the task cannot be measured.

        Returns:
            Notes for the user, e.g. a setting that the task overrules.
        """
        ...

    def measure(self, model: Any, tokenizer: Any, *, seed: int) -> Feedback:
        """Measure a model.

        Args:
            model: a causal LM in eval mode, in memory on its device; not changed.
            tokenizer: the model's tokenizer.
            seed: seeds every random choice (few-shot examples, sampling temperature).

        Raises:
            FeedbackError: the value is not finite, or the task cannot be run.
        """
        ...

    def task_texts(self) -> Iterable[str]:
        """The task's questions where they are at hand, for the overlap check; empty where the task is unseen."""
        ...
