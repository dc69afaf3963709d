"""What a study hands over, from its store alone."""

from pathlib import Path

from duet_ray.config import config_from
from duet_ray.records import CONFIRM_FIRST, Observation, Ratio, SampleResult
from duet_ray.store import Store
from duet_ray.study import Study
from tests.toy_study import toy_data

RATIO = Ratio(counts=(8, 8, 8))


def test_a_model_that_was_deleted_is_replaced_by_a_confirmation_of_the_same_point(tmp_path: Path) -> None:
    """A finalist by the model may have looked poor in its time. Settings are a part of the point."""
    study = Study(config_from(toy_data(storage="studies"), folder=tmp_path))
    other = (("training.rank", 8),)
    with Store(study.folder, create=True).writing() as store:
        store.create_study(name="toy", config=study.config.model_dump(mode="json"), versions={})
        store.add_trial(0, "start", RATIO, "uniform")
        store.add_trial(CONFIRM_FIRST, "confirm", RATIO, "confirm:t0000")
        store.add_trial(CONFIRM_FIRST + 1, "confirm", RATIO, "confirm:t0001", settings=other)
        for trial in store.trials():
            for sample, value in enumerate((2.0, 1.0, 3.0)):
                place = f"artifacts/{trial.name}/s{sample}/adapter"
                store.add_sample(SampleResult(spec=trial.spec(sample), value=value, adapter=place))
                if trial.number and (trial.number, sample) != (CONFIRM_FIRST, 1):
                    (study.folder / place).mkdir(parents=True)
        store.add_observation(0, Observation(value=1.0, k=3, k_used=3, best_sample=1))
        trial = store.trials()[0]
    assert study._handed_over(trial).spec.key == "c0000-s0", "c0000-s1 is better, and gone"
    (study.folder / "artifacts/t0000/s1/adapter").mkdir(parents=True)
    assert study._handed_over(trial).spec.key == "t0000-s1"
