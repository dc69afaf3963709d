"""Observations on one footing: against brute force over subsets, and in simulation without bias."""

import re
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest

from duet_ray.records import Ratio
from duet_ray.search import Told
from duet_ray.search.noise import ToldNoise, expected_minima, most_common_k, told_noise, with_laws
from duet_ray.theory import TruncatedExponential

LAW = TruncatedExponential(rate=2.0, cut=1.5)


def trial(values: list[float] | np.ndarray, *, number: int = 0, fidelity: float = 1.0) -> Told:
    samples = tuple(float(v) for v in values)
    ratio = Ratio(counts=(number, 100 - number))
    return Told(ratio=ratio, loss=min(samples), k_used=len(samples), samples=samples, fidelity=fidelity)


Draw = Callable[[np.random.Generator, int], np.ndarray]


def study(sizes: list[int], seed: int = 0, draw: Draw | None = None) -> list[Told]:
    """Trials with these numbers of samples; 0.1 · number is the truth of each."""
    generator = np.random.default_rng(seed)
    draw = draw or LAW.sample
    return [trial(0.1 * i + draw(generator, k), number=i) for i, k in enumerate(sizes)]


def normal(generator: np.random.Generator, k: int) -> np.ndarray:
    return generator.normal(size=k)


def mirrored(generator: np.random.Generator, k: int) -> np.ndarray:
    return -generator.exponential(size=k)


def test_equal_numbers_of_samples_are_left_alone() -> None:
    told = study([3] * 12)
    done = told_noise(told, "inferred")
    assert done == ToldNoise(told=tuple(told), law=None, k=3, note="")
    assert told_noise([], "theory").told == ()


def test_more_samples_count_with_the_mean_of_all_subsets() -> None:
    told = [trial([1.0, 4.0, 2.0, 8.0]), trial([3.0, 5.0]), trial([6.0, 7.0])]
    done = told_noise(told, "inferred")
    assert done.k == most_common_k(told) == 2
    assert done.told[0].loss == pytest.approx(np.mean([min(pair) for pair in combinations([1.0, 4.0, 2.0, 8.0], 2)]))
    assert [one.loss for one in done.told[1:]] == [3.0, 6.0]
    assert "the expected least of 2" in done.note
    means = expected_minima(told, 1)
    assert [one.loss for one in means.told] == pytest.approx([3.75, 4.0, 6.5])
    assert "the mean of its samples" in means.note
    assert all(after.samples == before.samples for after, before in zip(done.told, told, strict=True))


def test_fewer_samples_are_lowered_by_what_the_others_show() -> None:
    """The least of 2 is below their mean by 1, 2 and 3: by 2 on average."""
    told = [trial([0.0, 2.0]), trial([5.0, 9.0]), trial([1.0, 7.0]), trial([10.0])]
    done = expected_minima(told, 2)
    assert [one.loss for one in done.told] == pytest.approx([0, 5, 1, 8])
    assert done.k == 2
    assert "1 with fewer are lowered as the 3 with 2 or more show" in done.note


def test_what_cannot_be_put_on_that_footing_stays_and_is_said() -> None:
    unknown = Told(ratio=Ratio(counts=(1, 1)), loss=0.5, k_used=4)
    done = expected_minima([trial([1.0, 2.0]), trial([1.0, 3.0]), trial([2.0]), unknown], 2)
    assert [one.loss for one in done.told] == [1.0, 1.0, 2.0, 0.5]
    assert done.k is None
    assert "2 stay as they are: 3 trials with 2 known samples" in done.note


@pytest.mark.parametrize("draw", [LAW.sample, normal])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_no_law_is_needed_to_be_without_bias(draw: Draw, k: int) -> None:
    """The mean over many studies is that of minima of k, for trials with fewer and with more."""
    sizes, n = [1, 2, 4, 4, 4, 6], 800
    found = np.array([[o.loss for o in expected_minima(study(sizes, seed, draw), k).told] for seed in range(n)])
    found -= 0.1 * np.arange(len(sizes))
    expected = draw(np.random.default_rng(1), 400_000 * k).reshape(-1, k).min(axis=1).mean()
    assert np.all(np.abs(found.mean(axis=0) - expected) < 4.5 * found.std(axis=0) / n**0.5 + 0.004)


def test_the_law_gives_every_k_its_noise_and_takes_off_its_bias() -> None:
    told = study([4] * 20 + [2] * 10 + [1] * 3)
    done = told_noise(told, "theory")
    law = done.law
    assert law is not None
    assert done.k == 4
    for before, after in zip(told, done.told, strict=True):
        assert after.sem == pytest.approx(law.std(before.k_used))
        assert before.loss - after.loss == pytest.approx(law.mean(before.k_used) - law.mean(4))
    assert "noise by the law" in done.note
    assert "3 trials with one value" in done.note
    assert law.std(4) == pytest.approx(LAW.std(4), rel=0.5)


def test_with_the_true_law_there_is_no_bias() -> None:
    sizes, n = [4, 4, 1, 2, 8], 1500
    found = np.array([[o.loss for o in with_laws(study(sizes, seed), {1.0: LAW}).told] for seed in range(n)])
    found -= 0.1 * np.arange(len(sizes))
    sems = [one.sem for one in with_laws(study(sizes), {1.0: LAW}).told]
    assert np.all(np.abs(found.mean(axis=0) - LAW.mean(4)) < 4.5 * found.std(axis=0) / n**0.5)
    np.testing.assert_allclose(found.std(axis=0), np.array(sems, dtype=float), rtol=0.1)


def test_a_law_that_the_samples_refuse_is_not_used() -> None:
    done = told_noise(study([24] * 8 + [12], draw=mirrored), "theory")
    assert done.law is None
    assert "the samples refuse it" in done.note
    assert done.k == 24, "the footing is reached nevertheless"
    assert all(one.sem is None for one in done.told)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [([1] * 30, r"one value a trial .* sampling\.k >= 2"), ([2] * 5, "5 differences within trials are too few")],
)
def test_why_there_is_no_law(sizes: list[int], reason: str) -> None:
    done = told_noise(study(sizes), "theory")
    assert done.law is None
    assert [one.loss for one in done.told] == [one.loss for one in study(sizes)]
    assert re.search(reason, done.note)


def test_past_runs_alone_are_said_to_tell_nothing() -> None:
    past = [Told(ratio=Ratio(counts=(i, 100 - i)), loss=float(i)) for i in range(12)]
    done = told_noise(past, "theory")
    assert done.told == tuple(past)
    assert "noise is inferred" in done.note


def test_noise_that_the_feedback_tells_is_kept() -> None:
    told = [Told(ratio=Ratio(counts=(i, 9 - i)), loss=1.0, sem=0.1, k_used=2, samples=(1.0, 1.5)) for i in range(9)]
    done = told_noise(told, "theory")
    assert done.told == tuple(told)
    assert "not needed" in done.note


def test_cheap_trials_have_a_law_of_their_own() -> None:
    generator = np.random.default_rng(5)
    whole = [trial(LAW.sample(generator, 4), number=i) for i in range(15)]
    cheap = [trial(5 * LAW.sample(generator, 4), number=i, fidelity=0.25) for i in range(15)]
    done = told_noise([*whole, *cheap], "theory")
    assert done.law is not None
    small, large = done.told[0].sem, done.told[-1].sem
    assert small is not None
    assert large is not None
    assert small == pytest.approx(done.law.std(4))
    assert 2 < large / small < 10
    lone = told_noise([*whole, trial([1.0], number=3, fidelity=0.5)], "theory")
    assert lone.law is None
    assert "fidelity 0.5" in lone.note


def test_the_order_of_telling_does_not_matter() -> None:
    told = study([4, 2, 3, 4, 1, 4, 4, 2], seed=3)
    for noise in ("inferred", "theory"):
        forth, back = told_noise(told, noise), told_noise(told[::-1], noise)
        assert forth.told == back.told[::-1]
        assert (forth.law, forth.k, forth.note) == (back.law, back.k, back.note)
