"""DUET-UR: every row of a domain is as likely as every other (DUET, section 3.2, the uniform random estimator).

The baseline that any selection has to beat, and the right choice where rows are clean: it costs nothing.
"""

from pathlib import Path
from typing import Any

import numpy as np

from duet_ray.selection.base import Findings, RowWeights, SelectionContext


class Uniform:
    """The same probability for every row."""

    name = "uniform"

    def prepare(self, domain: Any, context: SelectionContext, folder: Path) -> Findings:
        return Findings()

    def measure(self, domain: Any, rows: np.ndarray, context: SelectionContext, folder: Path) -> np.ndarray:
        return np.ones(len(rows))

    def weigh(self, domain: Any, measured: np.ndarray, context: SelectionContext, folder: Path) -> RowWeights:
        return RowWeights(probabilities=measured / len(measured))
