"""How long the fuzz tests look, and what they accept: a result or a message, never a traceback."""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

from duet_ray.errors import DuetError

FACTOR = int(os.environ.get("DUET_FUZZ_FACTOR", "1"))
"""How many times the usual number of examples; above 1 they differ from run to run."""


def looking(n_examples: int) -> settings:
    """So many examples, the same ones each time unless more are asked for."""
    return settings(
        max_examples=n_examples * FACTOR,
        deadline=None,
        derandomize=FACTOR == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


def result_or_message(call: Callable[[], Any]) -> Any:
    """What the call gives, or the text of its `DuetError`, which must have one."""
    try:
        return call()
    except DuetError as caught:
        message, kind = str(caught), type(caught).__name__
    assert message.strip(), f"{kind} without a message"
    assert "Traceback" not in message
    return message
