"""DUET-UR: every row of a domain is as likely as every other (DUET, section 3.2, the uniform random estimator).

The baseline that any selection has to beat, and the right choice where rows are clean: it costs nothing.
"""

from typing import Any

import numpy as np

from duet_ray.errors import SelectionError
from duet_ray.selection.base import RowWeights, SelectionContext


class Uniform:
    """The same probability for every row."""

    name = "uniform"
    needs_model = False

    def select(self, domain: Any, context: SelectionContext) -> RowWeights:
        n_rows = len(domain.train)
        if n_rows == 0:
            raise SelectionError(f"domain {domain.name}: there are no training rows to draw from; check its source")
        return RowWeights(probabilities=np.full(n_rows, 1 / n_rows))
