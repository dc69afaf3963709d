"""What every feedback's value must be before it leaves this folder: a finite number."""

import math

from duet_ray.errors import FeedbackError, NoValueError
from duet_ray.records import Feedback


def checked(feedback: Feedback, source: str) -> Feedback:
    """Return `feedback` if its value can be told to a search.

    Args:
        source: what measured it, for the message.

    Raises:
        NoValueError: the value is NaN or infinite.
        FeedbackError: the standard error is not a finite number >= 0.
    """
    if not math.isfinite(feedback.value):
        raise NoValueError(f"{source}: the value must be finite, got {feedback.value}")
    if feedback.stderr is not None and not (math.isfinite(feedback.stderr) and feedback.stderr >= 0):
        raise FeedbackError(f"{source}: the standard error must be finite and >= 0, got {feedback.stderr}")
    return feedback
