"""k values → one observation: the first order statistic of DUET's Eq. 5.

The best of the k samples stands for the ratio. A failed sample has no value and none is made up for it; how many
values there were is kept with the observation, because the minimum of 3 is not the minimum of 4.
"""

from collections import Counter
from collections.abc import Sequence

from duet_ray.records import Direction, Observation, SampleResult


def reduce_samples(
    results: Sequence[SampleResult], direction: Direction, *, min_samples: int = 1
) -> Observation | None:
    """Take the best of k.

    Args:
        results: the k samples of one trial, failed ones included.
        direction: whose best: the smallest loss or the largest score.
        min_samples: fewer values than this are no observation.

    Returns:
        The observation, in the user's direction; None when too few samples have a value. Equal values: the earlier.
    """
    values = [(direction.to_loss(r.value), r.spec.sample) for r in results if r.value is not None]
    if len(values) < max(1, min_samples):
        return None
    loss, sample = min(values)
    return Observation(value=direction.to_value(loss), k=len(results), k_used=len(values), best_sample=sample)


def failure_reason(results: Sequence[SampleResult]) -> str:
    """Why a trial has no observation: the reasons of its failed samples, the most frequent first."""
    reasons = Counter(r.reason for r in results if r.failed)
    return "; ".join(f"{reason} ({count} of {len(results)} samples)" for reason, count in reasons.most_common())
