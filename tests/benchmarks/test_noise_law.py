"""What the tables of `benchmarks/noise_law.py` rest on."""

import sys
from pathlib import Path

import numpy as np
import pytest

from duet_ray.search import Told
from duet_ray.search.schedule import information_gain, theory_beta
from duet_ray.theory import TruncatedExponential

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
import noise_law as study

PLAIN = study.plain


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_objectives_gain_one_over_the_uniform_ratio(seed: int) -> None:
    truth = study.objective(seed, "law", 0.5)
    assert truth.values.min() == 0
    assert truth.values[study.PLACE[study.SPACE.uniform()]] == pytest.approx(1)
    best = study.POINTS[np.argmin(truth.values)]
    assert np.count_nonzero(best) >= 2 - (seed == 2), "inside, on a face, at a vertex"


@pytest.mark.parametrize("law", study.LAWS)
def test_the_noise_has_the_stated_size(law: str) -> None:
    truth = study.objective(0, law, 0.5)
    middle = int(np.argmin(np.abs(truth.values - truth.values.max() / 2)))
    draws = truth.draw(np.random.default_rng(0), middle, 20_000)
    assert draws.std() == pytest.approx(0.5, rel=0.05)
    if law == "changing":
        worst = truth.draw(np.random.default_rng(0), int(np.argmax(truth.values)), 20_000)
        least = truth.draw(np.random.default_rng(0), int(np.argmin(truth.values)), 20_000)
        assert worst.std() / least.std() == pytest.approx(3, rel=0.05)


def test_the_model_is_the_posterior_of_its_own_kernel() -> None:
    generator = np.random.default_rng(1)
    places = generator.choice(len(study.RATIOS), 12, replace=False)
    truth = study.objective(1, "law", 0.5).values
    told = [Told(ratio=study.RATIOS[p], loss=float(truth[p]), sem=0.1 + 0.01 * i) for i, p in enumerate(places)]
    model = study.fit(told)
    sems = np.array([one.sem for one in told], dtype=float)
    np.testing.assert_allclose(model.noise, (sems / model.spread) ** 2)
    gain = model.kernel @ np.linalg.inv(model.kernel + np.diag(model.noise))
    left = np.diag(model.kernel - gain @ model.kernel)
    np.testing.assert_allclose(model.sd[places], model.spread * np.sqrt(left), rtol=1e-6)
    assert np.corrcoef(model.mean[places], truth[places])[0, 1] > 0.9


def test_a_study_spends_its_samples_and_is_reproducible() -> None:
    first = study.run(0, "law", 0.5, lambda: PLAIN, k=(1, 4), budget=30)
    assert first == study.run(0, "law", 0.5, lambda: PLAIN, k=(1, 4), budget=30)
    assert first.n_samples == 30
    assert first.n_trials <= 30
    fixed = study.run(0, "law", 0.5, study.ByTheory, k=4, budget=60, n_trials=12)
    assert (fixed.n_trials, fixed.n_samples) == (12, 48)
    assert 0 <= fixed.regret < study.objective(0, "law", 0.5).values.max()


def test_the_simulated_search_has_the_theorem_s_factor() -> None:
    law = TruncatedExponential(rate=1.0, cut=0.5)
    found = study.attained_regret(0, 2, law, 30)
    kernel = np.exp(-np.square(found.tried[:, None] - found.tried[None]).sum(-1) / (2 * 0.3**2))
    assert found.information == pytest.approx(information_gain(kernel, np.full(30, 1 + 2 / 30)))
    expected = theory_beta(kernel[:-1, :-1], law.subgaussian, 1.0, 0.1, n_trials=30)
    assert found.last_beta == pytest.approx(expected)
    assert found.regret <= found.attained <= found.regret + law.cut, "ε lies within [0, c]"


def test_without_noise_and_with_time_regret_vanishes() -> None:
    law = TruncatedExponential(rate=1.0, cut=1e-3)
    few, many = (study.attained_regret(1, 1, law, n, constant=0.5).regret for n in (20, 300))
    assert many < few / 3
