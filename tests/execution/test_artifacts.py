"""Which models stay on disk."""

import shutil
from pathlib import Path
from typing import Any

from duet_ray.config import StudyConfig, config_from
from duet_ray.execution.artifacts import adopt_finished, leave_result, prune_adapters, sample_folder
from duet_ray.records import CONFIRM_ANYWHERE, CONFIRM_FIRST, Ratio, SampleResult, Trial
from duet_ray.reduce import reduce_samples
from duet_ray.store import Store
from tests.toy_study import toy_data


def study(folder: Path, **changes: Any) -> StudyConfig:
    return config_from(toy_data(storage="studies", **changes), folder=folder)


def add(store: Store, config: StudyConfig, number: int, *values: float, counts: int, **point: Any) -> None:
    """A trial that is done, its samples with models on disk."""
    kind = "confirm" if number >= CONFIRM_FIRST else "search"
    ratio = Ratio(counts=(counts, 24 - counts, 0))
    store.add_trial(number, kind, ratio, "scripted", **point)
    trial = next(t for t in store.trials() if t.number == number)
    for sample, value in enumerate(values):
        folder = sample_folder(config.study_folder, trial.spec(sample)) / "adapter"
        folder.mkdir(parents=True)
        adapter = str(folder.relative_to(config.study_folder))
        store.add_sample(SampleResult(spec=trial.spec(sample), value=value, adapter=adapter))
    samples = next(t for t in store.trials() if t.number == number).samples
    observation = reduce_samples(samples, config.direction)
    assert observation is not None
    if kind == "search" or number >= CONFIRM_ANYWHERE:
        store.add_observation(number, observation)
    else:
        store.finish_trial(number)


def kept(store: Store, config: StudyConfig) -> set[tuple[int, int]]:
    prune_adapters(config, store)
    found = store.kept_artifacts()
    on_disk = {str(p.relative_to(config.study_folder)) for p in config.study_folder.glob("artifacts/*/*/adapter")}
    assert on_disk == set(found.values())
    return set(found)


def test_the_best_samples_the_uniform_ratio_and_the_finalists_stay(tmp_path: Path) -> None:
    config = study(tmp_path, keep_best=2)
    with Store(config.study_folder, create=True).writing() as store:
        for number, values in enumerate([(5.0, 6.0), (3.0, 3.5), (1.0, 0.5), (4.0, 4.5)]):
            add(store, config, number, *values, counts=number)
        assert kept(store, config) == {(0, 0), (2, 0), (2, 1)}
        # The search is over, and its model prefers a ratio whose models are gone: its best confirmation stays instead.
        store.set_posterior(dict.fromkeys(range(4), (1.0, 0.1)), [1, 2, 3, 0])
        add(store, config, CONFIRM_FIRST + 1, 3.2, 3.1, counts=1)
        add(store, config, CONFIRM_FIRST + 2, 0.9, counts=2)
        add(store, config, CONFIRM_FIRST, 5.1, counts=0)
        assert kept(store, config) == {(0, 0), (2, 0), (2, 1), (CONFIRM_FIRST + 1, 1)}


def test_a_finalist_of_the_model_stays_though_others_were_luckier(tmp_path: Path) -> None:
    config = study(tmp_path, keep_best=1)
    with Store(config.study_folder, create=True).writing() as store:
        for number, value in enumerate([5.0, 3.0, 1.0]):
            add(store, config, number, value, counts=number)
        store.set_posterior(dict.fromkeys(range(3), (1.0, 0.1)), [1, 2, 0])
        assert kept(store, config) == {(0, 0), (1, 0), (2, 0)}


def test_without_confirmations_all_whole_models_stay_until_the_recommended_one_is_known(tmp_path: Path) -> None:
    config = study(tmp_path, keep_best=1, confirm__finalists=0, search__n_start=3, search__n_trials=0)
    with Store(config.study_folder, create=True).writing() as store:
        for number, value in enumerate([5.0, 1.0, 3.0]):
            add(store, config, number, value, counts=number)
        assert kept(store, config) == {(0, 0), (1, 0), (2, 0)}
        store.set_posterior(dict.fromkeys(range(3), (1.0, 0.1)), [2, 1, 0])
        assert kept(store, config) == {(0, 0), (1, 0), (2, 0)}, "uniform, luckiest, recommended"
        store.set_posterior(dict.fromkeys(range(3), (1.0, 0.1)), [1, 2, 0])
        assert kept(store, config) == {(0, 0), (1, 0)}


def test_a_model_whose_deletion_was_cut_off_is_not_taken_to_be_there(tmp_path: Path) -> None:
    config = study(tmp_path, keep_best=1)
    with Store(config.study_folder, create=True).writing() as store:
        add(store, config, 0, 5.0, counts=8)
        add(store, config, 1, 1.0, counts=9)
        shutil.rmtree(config.study_folder / store.kept_artifacts()[1, 0])
        assert kept(store, config) == {(0, 0)}


def test_cheap_models_are_not_handed_over(tmp_path: Path) -> None:
    config = study(tmp_path, keep_best=2)
    with Store(config.study_folder, create=True).writing() as store:
        add(store, config, 0, 5.0, counts=8)
        add(store, config, 1, 1.0, counts=9, fidelity=0.5)
        add(store, config, 2, 3.0, counts=10)
        assert kept(store, config) == {(0, 0), (2, 0)}


def test_the_best_model_of_a_point_that_no_trial_had_stays(tmp_path: Path) -> None:
    config = study(tmp_path, keep_best=1, search__recommend="anywhere")
    with Store(config.study_folder, create=True).writing() as store:
        add(store, config, 0, 5.0, counts=8)
        add(store, config, CONFIRM_ANYWHERE, 2.0, 1.0, 3.0, counts=13)
        assert kept(store, config) == {(0, 0), (CONFIRM_ANYWHERE, 1)}


def test_a_finished_sample_is_adopted_with_its_settings_and_no_other(tmp_path: Path) -> None:
    config = study(tmp_path, sampling={"k": "auto", "k_bounds": [1, 4]})
    settings = (("training.rank", 8),)
    with Store(config.study_folder, create=True).writing() as store:
        store.add_trial(0, "start", Ratio(counts=(8, 8, 8)), "random", settings=settings, k=3)
        (trial,) = store.trials()
        others = Trial(number=0, kind="start", ratio=trial.ratio, status="pending", method="random")
        for of, sample in ((trial, 0), (others, 1), (trial, 2), (trial, 3)):
            folder = sample_folder(config.study_folder, of.spec(sample))
            folder.mkdir(parents=True)
            leave_result(folder, SampleResult(spec=of.spec(sample), value=1.0))
        adopt_finished(config, store)
        assert [s.spec.sample for s in store.trials()[0].samples] == [0, 2], "of three; 1 had other settings"
