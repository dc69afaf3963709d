"""One model → one number: the kinds of feedback by name, imported on use."""

from importlib import import_module

from duet_ray.config import AnyFeedback, StudyConfig
from duet_ray.errors import FeedbackError
from duet_ray.feedback.base import FeedbackSource

FEEDBACKS: dict[str, str] = {
    "heldout_loss": "duet_ray.feedback.heldout_loss:HeldoutLoss",
    "lm_eval": "duet_ray.feedback.lm_eval:LmEval",
    "function": "duet_ray.feedback.function:Function",
}
"""`feedback.kind` → `"module:Class"`. A class is made from the study and the section of it that it reads."""


def make_feedback(config: StudyConfig, which: AnyFeedback | None = None) -> FeedbackSource:
    """The feedback of a study, or one of those measured beside it.

    Args:
        which: `config.feedback` (also when None), or one of `config.also`.

    Raises:
        FeedbackError: no feedback has that kind.
    """
    section = config.feedback if which is None else which
    if section.kind not in FEEDBACKS:
        raise FeedbackError(f"feedback.kind: must be one of {', '.join(FEEDBACKS)}, got {section.kind!r}")
    module, name = FEEDBACKS[section.kind].split(":")
    source: FeedbackSource = getattr(import_module(module), name)(config, section)
    return source


__all__ = ["FEEDBACKS", "FeedbackSource", "make_feedback"]
