"""One task at a time, in this process: what a worker leaves on disk, and what it finds there."""

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duet_ray.config import load_config
from duet_ray.errors import ConfigError, FeedbackError, RatioError, SampleFailed
from duet_ray.execution.artifacts import read_result, sample_folder
from duet_ray.execution.broker import Task
from duet_ray.execution.trial import scoring_tasks
from duet_ray.execution.worker import Assignment, Worker, is_disk_full, mixture_of
from duet_ray.preflight import preflight
from duet_ray.records import BASE_TRIAL, CONFIRM_BASE, CONFIRM_FIRST, Ratio, SampleSpec
from duet_ray.search import Proposer, Told
from tests.tiny_model import write_tiny_model
from tests.toy_study import write_rows, write_toy_study

SPEC = SampleSpec(trial=2, sample=1, kind="start", ratio=Ratio(counts=(12, 0, 12)))


def silent(stage: str, done: int = 0, total: int = 0) -> None:
    pass


def make_worker(folder: Path, **changes: Any) -> tuple[Worker, Callable[[SampleSpec], Path]]:
    ready = preflight(load_config(write_toy_study(folder, **changes)))
    assignment = Assignment(
        config=ready.config.model_dump(mode="json"),
        folder=str(folder),
        domain_folders=tuple(str(d.folder) for d in ready.domains),
        scoring_folders=tuple(str(d.folder) for d in ready.scoring_domains),
        weights_folder=str(ready.weights_folder),
        weights_keys=ready.weights_keys,
    )
    return Worker(assignment), lambda spec: sample_folder(ready.config.study_folder, spec)


def test_a_sample_from_draw_to_result(tmp_path: Path) -> None:
    worker, place = make_worker(tmp_path)
    base = worker.do_sample(SampleSpec(trial=BASE_TRIAL, sample=0, kind="base", ratio=None), 1, silent)
    result = worker.do_sample(SPEC, 2, silent)
    assert result.value is not None
    assert base.value is not None
    assert result.value < base.value, "twelve rows of the right domain help"
    assert base.adapter is None
    assert result.adapter == "artifacts/t0002/s1/adapter"
    files = {p.name for p in (place(SPEC) / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert {p.name for p in place(SPEC).iterdir()} == {"adapter", "trained.json", "result.json"}
    assert read_result(place(SPEC)) == result
    again = worker.do_sample(SampleSpec(trial=BASE_TRIAL, sample=1, kind="base", ratio=None), 3, silent)
    assert again.value == base.value, "nothing of a sample is left in the model"


def test_a_finished_sample_is_returned_and_not_made_again(tmp_path: Path) -> None:
    worker, place = make_worker(tmp_path)
    first = worker.do_sample(SPEC, 1, silent)
    changed = {**first.to_json(), "value": 123.0}
    (place(SPEC) / "result.json").write_text(json.dumps(changed))
    assert worker.do_sample(SPEC, 2, silent).value == 123.0


@pytest.mark.parametrize("torn", ["", '{"spec": {"trial": 2', "[]", '{"value": 1.0}'])
def test_a_torn_result_is_made_again(tmp_path: Path, torn: str) -> None:
    worker, place = make_worker(tmp_path)
    first = worker.do_sample(SPEC, 1, silent)
    (place(SPEC) / "result.json").write_text(torn)
    second = worker.do_sample(SPEC, 1, silent)
    times = {"train_seconds": 0.0, "feedback_seconds": 0.0}
    assert replace(second, **times) == replace(first, **times)


def test_only_the_feedback_is_repeated_when_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, place = make_worker(tmp_path)
    expected = worker.do_sample(SPEC, 1, silent)
    (place(SPEC) / "result.json").unlink()
    measure = worker._instruments.main.measure

    def broken(*_: Any, **__: Any) -> Any:
        raise ConnectionError("the rating service is away")

    monkeypatch.setattr(worker._instruments.main, "measure", broken)
    with pytest.raises(ConnectionError):
        worker.do_sample(SPEC, 2, silent)
    assert read_result(place(SPEC)) is None
    monkeypatch.setattr(worker._instruments.main, "measure", measure)
    monkeypatch.setattr(worker._trainer, "train", broken)
    assert worker.do_sample(SPEC, 3, silent).value == expected.value


def test_a_model_trained_on_other_rows_is_not_taken(tmp_path: Path) -> None:
    worker, place = make_worker(tmp_path)
    expected = worker.do_sample(SPEC, 1, silent)
    (place(SPEC) / "result.json").unlink()
    report = json.loads((place(SPEC) / "trained.json").read_text())
    (place(SPEC) / "trained.json").write_text(json.dumps({**report, "rows_digest": "another"}))
    steps: list[tuple[str, int, int]] = []
    again = worker.do_sample(SPEC, 2, lambda *step: steps.append(step))
    assert again.value == expected.value
    assert ("training", 3, 3) in steps, "it was trained again"


def test_a_sample_that_fails_has_a_reason_and_no_value(tmp_path: Path) -> None:
    worker, place = make_worker(tmp_path, training__learning_rate=1e30)
    result = worker.do_sample(SPEC, 1, silent)
    assert result.value is None
    assert result.reason is not None
    assert "learning rate" in result.reason
    assert read_result(place(SPEC)) == result
    base = SampleSpec(trial=BASE_TRIAL, sample=0, kind="base", ratio=None)
    assert worker.do_sample(base, 2, silent).ok, "the next sample is not harmed"


def test_a_ratio_at_a_vertex(tmp_path: Path) -> None:
    worker, _ = make_worker(tmp_path)
    alone = SampleSpec(trial=0, sample=0, kind="start", ratio=Ratio(counts=(24, 0, 0)))
    without = SampleSpec(trial=1, sample=0, kind="start", ratio=Ratio(counts=(0, 24, 0)))
    good, bad = worker.do_sample(alone, 1, silent), worker.do_sample(without, 2, silent)
    assert good.value is not None
    assert bad.value is not None
    assert good.value < bad.value
    assert good.train["n_rows"] == bad.train["n_rows"] == 24


def test_one_domain_has_one_ratio(tmp_path: Path) -> None:
    domain = {"name": "apples", "source": "data/apples.jsonl"}
    ready = preflight(load_config(write_toy_study(tmp_path, domains=[domain])))
    proposer = Proposer(ready.space, ready.config.search, ready.config.seed)
    told = [Told(ratio=Ratio(counts=(24,)), loss=float(t)) for t in range(4)]
    assert [proposer.propose(t, told[:t], []).ratio.counts for t in range(5)] == [(24,)] * 5


def test_fewer_rows_than_domains(tmp_path: Path) -> None:
    worker, _ = make_worker(tmp_path, mixture__n_rows=2, training__batch_size=2)
    ready = preflight(load_config(tmp_path / "study.yaml"))
    uniform = ready.space.uniform()
    assert sorted(uniform.counts) == [0, 1, 1]
    assert worker.do_sample(SampleSpec(trial=0, sample=0, kind="start", ratio=uniform), 1, silent).ok


def test_a_domain_smaller_than_the_mixture(tmp_path: Path) -> None:
    """`cap` bounds its share by what it has, `repeat` lets its rows come again, `error` says what to change."""
    write_toy_study(tmp_path)
    write_rows(tmp_path / "data" / "clouds.jsonl", "qqqp", 10)
    capped = preflight(load_config(tmp_path / "study.yaml"))
    assert capped.space.upper == (24, 24, 9)
    repeated = preflight(load_config(tmp_path / "study.yaml", ["mixture.when_short=repeat"]))
    assert repeated.space.upper == (24, 24, 24)
    with pytest.raises(RatioError, match="clouds"):
        preflight(load_config(tmp_path / "study.yaml", ["mixture.when_short=error"]))


def test_scoring_is_done_once(tmp_path: Path) -> None:
    worker, _ = make_worker(tmp_path, selection={"method": "influence", "n_fit_rows": 16, "n_hessian_rows": 8})
    stages: list[str] = []

    def score(index: int) -> None:
        for tasks in scoring_tasks(index, worker._config.domain_names[index], 1):
            for task in tasks:
                assert worker.do_scoring(task, lambda stage, *_: stages.append(stage))["domain"]

    score(0)
    assert set(stages) >= {"fit", "score"}
    stages.clear()
    score(0)
    assert not stages
    for index in (1, 2):
        score(index)
    assert worker.do_sample(SPEC, 1, silent).ok
    assert not any((tmp_path / "studies" / "toy" / "scoring").iterdir()), "nothing is left of the steps"


def test_a_step_of_scoring_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    """A worker that died after its step, and before the driver knew of it."""
    settings = {"method": "influence", "n_fit_rows": 16, "n_hessian_rows": 8, "shard_rows": 20}
    worker, _ = make_worker(tmp_path, selection=settings)
    (prepare,), shards, (weigh,) = scoring_tasks(0, "apples", 3)
    stages: list[str] = []
    for task in (prepare, prepare, *shards, *shards):
        worker.do_scoring(task, lambda stage, *_: stages.append(stage))
    assert stages.count("fit") == 2, "two optimizer steps of one fit"
    assert [s for s in stages if s == "score"] == ["score"] * (3 + 3 + 2), "20, 20 and 14 rows in batches of 8"
    # Half a file of a killed worker has another name, and is not read.
    place = next((tmp_path / "studies" / "toy" / "scoring").iterdir())
    (place / ".00000.npy-abc").write_bytes(b"half")
    worker.do_scoring(weigh, silent)
    sharded = worker._weights_of(0)
    whole, _ = make_worker(tmp_path / "whole", selection={**settings, "shard_rows": 54})
    for task in [t for tasks in scoring_tasks(0, "apples", 1) for t in tasks]:
        whole.do_scoring(task, silent)
    np.testing.assert_allclose(sharded.scores, whole._weights_of(0).scores, rtol=1e-3, atol=1e-6)


def test_rows_are_drawn_in_the_stored_order(tmp_path: Path) -> None:
    """`top_n`: the k samples of a trial hold the same best rows, and differ by their training seed alone."""
    worker, _ = make_worker(tmp_path, selection={"method": "top_n", "n_fit_rows": 16, "n_hessian_rows": 8})
    for index, name in enumerate(worker._config.domain_names):
        for task in [t for tasks in scoring_tasks(index, name, 1) for t in tasks]:
            worker.do_scoring(task, silent)
    first, second = (worker.do_sample(replace(SPEC, sample=s), 1, silent) for s in (0, 1))
    assert first.rows_digest == second.rows_digest
    assert first.value != second.value
    order = worker._weights_of(0).order
    best = mixture_of(worker._config, SPEC, worker._weights).rows[0]
    assert best.tolist() == order[:12].tolist()


def test_a_surrogate_scores_and_the_study_s_model_trains(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "small", seed=5)
    settings = {"method": "influence", "n_fit_rows": 16, "n_hessian_rows": 8}
    own, _ = make_worker(tmp_path, selection=settings)
    other, _ = make_worker(tmp_path, selection={**settings, "surrogate": {"path": "small", "dtype": "float32"}})
    for worker in (own, other):
        for task in [t for tasks in scoring_tasks(0, "apples", 1) for t in tasks]:
            worker.do_scoring(task, silent)
    assert not np.allclose(own._weights_of(0).scores, other._weights_of(0).scores)
    assert "_base" not in other.__dict__, "the study's own model was not needed"
    same, _ = make_worker(tmp_path, selection={**settings, "surrogate": {"path": "model", "dtype": "float32"}})
    assert same._weights_of(0) is not None, "the same model under another key of the study file has the same scores"


def test_a_surrogate_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    write_toy_study(tmp_path, selection={"method": "influence", "surrogate": {"path": "./nowhere"}})
    with pytest.raises(ConfigError, match=r"selection\.surrogate\.path: no such folder: .*nowhere"):
        preflight(load_config(tmp_path / "study.yaml"))


def test_what_remove_harmful_drops_cannot_be_asked_for(tmp_path: Path) -> None:
    ready = preflight(
        load_config(write_toy_study(tmp_path, mixture__n_rows=60, selection={"method": "remove_harmful"}))
    )
    # 54 training rows, of which a fifth (10.8, so 10) is dropped.
    assert ready.space.upper == (44, 44, 44)


def test_a_full_disk_is_recognised() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert is_disk_full(wrapped)
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(errno.ENOENT, "No such file"))


RACE: dict[str, Any] = {"sampling": {"k": 4, "racing": {"at": [0.4], "limit": 5}}, "training__epochs": 2}


def comparison(spec: SampleSpec, until: float = 0.4) -> Task:
    return Task(key=f"{spec.key}@{until:g}", kind="compare", spec=spec, until=until)


def test_a_sample_that_was_compared_on_its_way_ends_as_one_that_was_not(tmp_path: Path) -> None:
    calm, _ = make_worker(tmp_path / "calm", training__epochs=2)
    expected = calm.do_sample(SPEC, 1, silent)
    worker, place = make_worker(tmp_path / "race", **RACE)
    steps: list[int] = []
    found = worker.do_comparison(comparison(SPEC), lambda stage, done=0, total=0: steps.append(done))
    assert [s for s in steps if s] == [1, 2], "of 6"
    assert found["value"] is not None
    assert (place(SPEC) / "training").is_dir()
    assert worker.do_comparison(comparison(SPEC), silent) == found, "done once"
    steps.clear()
    result = worker.do_sample(SPEC, 1, lambda stage, done=0, total=0: steps.append(done))
    assert [s for s in steps if s] == [3, 4, 5, 6]
    assert result.value == expected.value
    assert result.train["compared"] == {"0.4": found["value"]}
    assert result.train_seconds > found["train_seconds"]
    assert not (place(SPEC) / "training").exists()
    assert read_result(place(SPEC)) == result


def test_a_comparison_measures_less(tmp_path: Path) -> None:
    worker, _ = make_worker(tmp_path, **RACE)
    quick = worker.do_comparison(comparison(SPEC, 0.99), silent)
    full = worker.do_sample(SPEC, 1, silent)
    assert quick["value"] != full.value
    assert worker._quick.main is not worker._instruments.main


def test_a_sample_that_fails_on_its_way_is_out_of_the_race_with_its_reason(tmp_path: Path) -> None:
    worker, place = make_worker(tmp_path, **RACE, training__learning_rate=1e30)
    found = worker.do_comparison(comparison(SPEC, 0.8), silent)
    assert found["value"] is None
    assert "learning rate" in found["reason"]
    assert not (place(SPEC) / "result.json").exists(), "the trial says how it ended"


def test_a_training_that_died_goes_on_where_it_was_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, _ = make_worker(tmp_path / "calm", training__dropout=0.1)
    expected = calm.do_sample(SPEC, 1, silent)
    worker, place = make_worker(tmp_path / "died", training__dropout=0.1, training__checkpoint_minutes=1e-9)

    class Killed(BaseException):
        pass

    def die(stage: str, done: int = 0, total: int = 0) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        worker.do_sample(SPEC, 1, die)
    assert (place(SPEC) / "training").is_dir()
    other, _ = make_worker(tmp_path / "died", training__dropout=0.1, training__checkpoint_minutes=1e-9)
    steps: list[int] = []
    result = other.do_sample(SPEC, 2, lambda stage, done=0, total=0: steps.append(done))
    assert [s for s in steps if s] == [3], "two of three steps were written down"
    assert result.value == expected.value
    assert not (place(SPEC) / "training").exists()


BUNDLE = tuple(replace(SPEC, sample=s) for s in range(3))


def test_samples_that_train_in_one_pass_end_as_those_that_train_alone(tmp_path: Path) -> None:
    alone, _ = make_worker(tmp_path / "alone")
    expected = [alone.do_sample(spec, 1, silent) for spec in BUNDLE]
    worker, place = make_worker(tmp_path / "together", sampling__k=3, training__fuse=3)
    found = [worker.do_sample(spec, 1, silent, bundle=BUNDLE) for spec in BUNDLE]
    assert [f.rows_digest for f in found] == [e.rows_digest for e in expected]
    np.testing.assert_allclose([f.value for f in found], [e.value for e in expected], rtol=1e-4)
    assert [f.train["n_fused"] for f in found] == [3, 3, 3]
    assert {p.name for p in place(SPEC).iterdir()} == {"adapter", "trained.json", "result.json"}
    assert not list(place(SPEC).parent.glob("together*"))


def test_a_part_of_a_bundle_that_is_done_again_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    worker, place = make_worker(tmp_path, sampling__k=3, training__fuse=3)
    first = [worker.do_sample(spec, 1, silent, bundle=BUNDLE) for spec in BUNDLE]
    for name in ("result.json", "trained.json"):
        (place(SPEC) / name).unlink()
    before = (place(BUNDLE[0]) / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    again = worker.do_sample(SPEC, 2, silent, bundle=BUNDLE)
    assert again.value == first[1].value
    assert (place(BUNDLE[0]) / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_one_bad_sample_of_a_bundle_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from duet_ray.training import fused_lora

    worker, _ = make_worker(tmp_path, sampling__k=3, training__fuse=3)
    train_fused = fused_lora.train_fused

    def spoilt(*arguments: Any, **settings: Any) -> list[Any]:
        ended = train_fused(*arguments, **settings)
        return [ended[0], SampleFailed("the loss is nan at step 2"), ended[2]]

    monkeypatch.setattr(fused_lora, "train_fused", spoilt)
    found = [worker.do_sample(spec, 1, silent, bundle=BUNDLE) for spec in BUNDLE]
    assert [f.ok for f in found] == [True, False, True]
    assert found[1].reason == "the loss is nan at step 2"


def test_a_bundle_that_does_not_fit_trains_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from duet_ray.training import fused_lora

    calls: list[int] = []

    def too_large(*_: Any, **__: Any) -> list[Any]:
        calls.append(1)
        raise SampleFailed("out of memory")

    monkeypatch.setattr(fused_lora, "train_fused", too_large)
    alone, _ = make_worker(tmp_path / "alone")
    worker, _ = make_worker(tmp_path / "together", sampling__k=3, training__fuse=3)
    for spec in BUNDLE:
        assert worker.do_sample(spec, 1, silent, bundle=BUNDLE).value == alone.do_sample(spec, 1, silent).value
    assert calls == [1], "it is not tried again"


def test_the_others_of_a_group_train_the_same_sample(tmp_path: Path) -> None:
    """What the first process says is all that another needs to train along with it."""
    said: list[Any] = []
    worker, _ = make_worker(tmp_path / "first")
    worker._on_follow = said.append
    other, _ = make_worker(tmp_path / "other")
    first, second = [], []
    train = worker._trainer.train

    def noted(rows: Any, **settings: Any) -> Any:
        first.append((rows, settings["seed"]))
        return train(rows, **settings)

    worker._trainer.train = noted
    worker.do_sample(SPEC, 1, silent)
    other._trainer.train = lambda rows, **settings: second.append((rows, settings["seed"]))
    other.follow(said[0])
    assert first[0][1] == second[0][1]
    for a, b in zip(first[0][0], second[0][0], strict=True):
        np.testing.assert_array_equal(a.input_ids, b.input_ids)


SEARCHED: dict[str, Any] = {
    "search__optimize": "both",
    "search__also": {
        "training.rank": {"choices": [2, 8]},
        "training.layers": {"choices": [[1], None]},
        "training.loss_on": {"choices": ["completion", "all"]},
        "training.learning_rate": {"log": [1e-3, 1e-1]},
    },
}
SET = replace(
    SPEC,
    settings=(
        ("training.rank", 8),
        ("training.layers", (1,)),
        ("training.loss_on", "all"),
        ("training.learning_rate", 0.05),
    ),
)


def test_a_trial_s_settings_are_those_of_a_study_that_has_them(tmp_path: Path) -> None:
    own = {"rank": 8, "layers": [1], "loss_on": "all", "learning_rate": 0.05, "batch_size": 8, "max_tokens": 32}
    other, other_place = make_worker(tmp_path / "other", training=own)
    expected = other.do_sample(SPEC, 1, silent)
    worker, place = make_worker(tmp_path / "searched", **SEARCHED)
    plain = worker.do_sample(replace(SPEC, trial=3), 1, silent)
    found = worker.do_sample(SET, 1, silent)
    assert (found.value, found.rows_digest) == (expected.value, expected.rows_digest)
    assert found.spec == SET
    assert read_result(place(SET)) == found
    weights = "adapter/adapter_model.safetensors"
    assert (place(SET) / weights).read_bytes() == (other_place(SPEC) / weights).read_bytes()
    assert worker.do_sample(replace(SPEC, trial=3, sample=2), 1, silent).value != plain.value
    (place(replace(SPEC, trial=3)) / "result.json").unlink()
    assert worker.do_sample(replace(SPEC, trial=3), 1, silent).value == plain.value, "the study's own are unharmed"


def test_a_model_trained_with_other_settings_is_not_taken(tmp_path: Path) -> None:
    """The same place and the same rows: as in a study whose store was deleted and whose files were not."""
    worker, place = make_worker(tmp_path, **SEARCHED)
    plain = worker.do_sample(SPEC, 1, silent)
    (place(SPEC) / "result.json").unlink()
    found = worker.do_sample(SET, 1, silent)
    assert found.rows_digest == plain.rows_digest
    assert found.value != plain.value


def test_a_bundle_has_its_trial_s_settings(tmp_path: Path) -> None:
    alone, _ = make_worker(tmp_path / "alone", **SEARCHED)
    together, place = make_worker(tmp_path / "together", sampling__k=3, training__fuse=3, **SEARCHED)
    bundle = tuple(replace(SET, sample=s) for s in range(3))
    found = [together.do_sample(spec, 1, silent, bundle=bundle) for spec in bundle]
    assert [f.train["n_fused"] for f in found] == [3, 3, 3]
    np.testing.assert_allclose(
        [f.value for f in found], [alone.do_sample(s, 1, silent).value for s in bundle], rtol=1e-4
    )
    assert json.loads((place(bundle[0]) / "adapter" / "adapter_config.json").read_text())["r"] == 8


def test_the_state_of_a_training_is_of_its_settings(tmp_path: Path) -> None:
    worker, place = make_worker(tmp_path, training__checkpoint_minutes=1e-9, **SEARCHED)
    calm, _ = make_worker(tmp_path / "calm", **SEARCHED)

    class Killed(BaseException):
        pass

    def die(stage: str, done: int = 0, total: int = 0) -> None:
        if done == 2:
            raise Killed

    for spec in (SPEC, SET):
        with pytest.raises(Killed):
            worker.do_sample(spec, 1, die)
    assert len(list((place(SPEC) / "training").iterdir())) == 2
    assert worker.do_sample(SET, 1, silent).value == calm.do_sample(SET, 1, silent).value


def test_a_cheap_trial_trains_on_a_share_of_the_rows(tmp_path: Path) -> None:
    worker, _ = make_worker(tmp_path)
    cheap = replace(SPEC, fidelity=0.25)
    assert [len(rows) for rows in mixture_of(worker._config, cheap, worker._weights).rows] == [3, 0, 3]
    found = worker.do_sample(cheap, 1, silent)
    assert found.train["n_rows"] == 6
    assert found.spec.fidelity == 0.25


SAFETY = "def measure(model, tokenizer):\n    return 0.25 * (1 + len(getattr(model, 'peft_config', {})))\n"
SIDE = {"kind": "function", "function": "safety:measure", "direction": "maximize", "name": "safety"}


def test_a_weighted_sum_of_metrics_is_the_value(tmp_path: Path) -> None:
    """Loss, 2 of it, and safety, which is made large, 10 of it: 2 · loss - 10 · safety; a race compares the same."""
    (tmp_path / "safety.py").write_text(SAFETY)
    weights = {"heldout_loss_loss": 2.0, "safety": 10.0}
    worker, _ = make_worker(tmp_path, also=[SIDE], search__objective={"weights": weights}, **RACE)
    found = worker.do_sample(SPEC, 1, silent)
    assert set(found.metrics) == {"heldout_loss_loss", "safety"}
    assert found.metrics["safety"] == 0.5
    assert found.value == pytest.approx(2 * found.metrics["heldout_loss_loss"] - 10 * 0.5)
    compared = worker.do_comparison(comparison(replace(SPEC, sample=0)), silent)
    assert -5 < compared["value"] < 15
    base = worker.do_sample(SampleSpec(trial=BASE_TRIAL, sample=0, kind="base", ratio=None), 1, silent)
    assert base.value == pytest.approx(2 * base.metrics["heldout_loss_loss"] - 10 * 0.25)


def test_a_metric_that_the_search_needs_is_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "gone.py").write_text("def measure(model, tokenizer):\n    raise ConnectionError('away')\n")
    gone = {**SIDE, "function": "gone:measure"}
    shown, _ = make_worker(tmp_path, name="shown", also=[gone])
    assert shown.do_sample(SPEC, 1, silent).metrics == {}
    needed, _ = make_worker(
        tmp_path, also=[gone], search__acquisition="qlognei", search__objective={"require": ["safety >= 0.5"]}
    )
    with pytest.raises(FeedbackError, match="away"):
        needed.do_sample(SPEC, 1, silent)


def test_a_confirmation_looks_closer(tmp_path: Path) -> None:
    """`confirm.limit`: as many rows as a study with that limit would look at, and never fewer than a metric has."""
    wide = {"kind": "heldout_loss", "file": "data/task.jsonl", "limit": 12, "name": "wide"}
    task = {"kind": "heldout_loss", "file": "data/task.jsonl", "limit": 4}
    worker, _ = make_worker(tmp_path / "a", feedback=task, also=[wide], confirm={"limit": 8})
    larger, _ = make_worker(tmp_path / "b", feedback={**task, "limit": 8}, also=[wide])
    again = SampleSpec(trial=CONFIRM_FIRST + 2, sample=0, kind="confirm", ratio=SPEC.ratio)
    base = SampleSpec(trial=CONFIRM_BASE, sample=0, kind="confirm", ratio=None)
    for spec in (again, base):
        found, expected = worker.do_sample(spec, 1, silent), larger.do_sample(spec, 1, silent)
        assert (found.value, found.metrics) == (expected.value, expected.metrics)
    assert worker.do_sample(SPEC, 1, silent).value != larger.do_sample(SPEC, 1, silent).value


def test_models_may_be_kept_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a URL: the same values, whole models there, and after a lost result only the feedback is repeated."""
    here, _ = make_worker(tmp_path / "here")
    expected = here.do_sample(SPEC, 1, silent)
    worker, place = make_worker(tmp_path / "there", artifacts=f"file://{tmp_path}/bucket")
    found = worker.do_sample(SPEC, 1, silent)
    assert found.value == expected.value
    assert found.adapter is not None
    assert found.adapter.startswith(f"file://{tmp_path}/bucket/toy/t0002/s1/adapter-")
    assert {p.name for p in place(SPEC).iterdir()} == {"trained.json", "result.json"}
    kept = Path(found.adapter.removeprefix("file://"))
    assert {"adapter_model.safetensors", "complete.json"} <= {p.name for p in kept.iterdir()}
    assert "model" not in found.train
    (place(SPEC) / "result.json").unlink()
    monkeypatch.setattr(worker._trainer, "train", lambda *_, **__: pytest.fail("it was trained already"))
    assert worker.do_sample(SPEC, 2, silent).value == expected.value
    # A model that is not whole is made again, and what is left of the old one goes.
    monkeypatch.undo()
    (place(SPEC) / "result.json").unlink()
    (kept / "adapter_model.safetensors").write_bytes(b"torn")
    again = worker.do_sample(SPEC, 3, silent)
    assert again.value == expected.value
    assert again.adapter != found.adapter
    assert not kept.exists()
