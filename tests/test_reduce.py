"""The first order statistic, with failures that stay failures."""

from duet_ray.records import Direction, Observation, Ratio, SampleResult, SampleSpec
from duet_ray.reduce import failure_reason, reduce_samples


def _results(*values: float | None) -> list[SampleResult]:
    return [
        SampleResult(
            spec=SampleSpec(trial=3, sample=i, kind="search", ratio=Ratio(counts=(1, 2))),
            value=value,
            reason=None if value is not None else "the loss is not finite",
        )
        for i, value in enumerate(values)
    ]


def test_best_of_k_in_both_directions() -> None:
    results = _results(0.4, 0.2, 0.9)
    assert reduce_samples(results, Direction.MINIMIZE) == Observation(value=0.2, k=3, k_used=3, best_sample=1)
    assert reduce_samples(results, Direction.MAXIMIZE) == Observation(value=0.9, k=3, k_used=3, best_sample=2)


def test_a_failed_sample_has_no_value_and_is_counted() -> None:
    observation = reduce_samples(_results(None, 0.5, None), Direction.MAXIMIZE)
    assert observation == Observation(value=0.5, k=3, k_used=1, best_sample=1)


def test_min_samples() -> None:
    assert reduce_samples(_results(None, 0.5, None), Direction.MAXIMIZE, min_samples=2) is None
    assert reduce_samples(_results(None, None), Direction.MINIMIZE) is None


def test_equal_values_take_the_earlier_sample() -> None:
    for direction in Direction:
        observation = reduce_samples(_results(0.5, 0.5), direction)
        assert observation is not None
        assert observation.best_sample == 0


def test_the_most_frequent_reason_comes_first() -> None:
    assert failure_reason(_results(None, 1.0, None)) == "the loss is not finite (2 of 3 samples)"
