"""One root seed, and from it a seed of its own for every purpose, trial and sample.

Nothing in duet_ray uses a global generator: libraries reseed those behind our back (lm-eval does, at every call).
A child seed depends on its key alone, never on how many numbers were drawn before, so that the order in which
workers finish cannot change a single row.
"""

import hashlib

import numpy as np

PURPOSES = ("split", "start", "settings", "propose", "draw", "train", "evaluate", "select", "insight")
"""The purposes in use. A new purpose is added here, so that two uses never share a stream by accident."""


def child_seed(root: int, purpose: str, *key: int) -> int:
    """Return the seed in [0, 2**63) that belongs to (root, purpose, key).

    Args:
        root: the study's `seed`.
        purpose: one of `PURPOSES`.
        key: integers that name the use, usually (trial, sample).
    """
    assert purpose in PURPOSES, purpose
    text = ":".join([str(root), purpose, *map(str, key)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(root: int, purpose: str, *key: int) -> np.random.Generator:
    """Return a private NumPy generator for (root, purpose, key)."""
    return np.random.default_rng(child_seed(root, purpose, *key))
