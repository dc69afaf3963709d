"""The study file: every problem at once, with path, line and remedy; nothing accepted and ignored."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_ray.cli.init import template
from duet_ray.config import StudyConfig, config_from, differences, load_config
from duet_ray.errors import ConfigError, DuetError
from duet_ray.records import Direction
from tests.toy_study import toy_data

GOOD = """\
name: maths
model: {path: some/model}
domains:
  - {name: a, source: a.jsonl}
  - name: b
    source: [b1.csv, "b2/*.csv"]
    bounds: [0.1, 0.5]
search: {n_trials: 3}
feedback: {kind: lm_eval, tasks: {gsm8k: 1.0}, direction: maximize}
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(_write(folder, text), overrides)
    return str(caught.value).splitlines()


def test_a_good_file(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path, GOOD))
    assert config.domains[1].sources == ("b1.csv", "b2/*.csv")
    assert config.direction is Direction.MAXIMIZE
    assert config.n_planned_trials == 13
    assert config.study_folder == tmp_path / "studies" / "maths"
    assert config.resolve_path("x.jsonl") == tmp_path / "x.jsonl"
    assert config.model_path == "some/model", "no such folder: a hub id"
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert config.model_path == str(tmp_path / "some" / "model")


def test_every_problem_at_once_with_path_line_and_suggestion(tmp_path: Path) -> None:
    text = (
        GOOD.replace("n_trials: 3", "n_trails: 3, beta: high")
        .replace("source: a.jsonl", "sorce: a.jsonl")
        .replace("direction: maximize", "direction: up")
        .replace("bounds: [0.1, 0.5]", "bounds: [0.5, 0.1]")
    )
    assert _problems(tmp_path, text) == [
        "domains[0].sorce: unknown key; did you mean `source`? (study.yaml line 4)",
        "domains[0].source: is required and missing (study.yaml line 4)",
        "domains[1].bounds: must be 0 <= low <= high <= 1 with high > 0, got [0.5, 0.1] (study.yaml line 7)",
        "search.beta: must be a valid number, unable to parse string as a number, or 'theory', got 'high' "
        "(study.yaml line 8)",
        "search.n_trails: unknown key; did you mean `n_trials`? (study.yaml line 8)",
        "feedback.direction: must be 'minimize' or 'maximize', got 'up' (study.yaml line 9)",
    ]


SEARCH = "search: {n_trials: 3}"

MISTAKES = [
    ("name: maths", "name: ../x", "name: must be 1 to 64 letters, digits, '-' or '_', starting with"),
    ("name: maths", "name: maths\nname: twice", "name: stands twice; keep one (study.yaml line 2)"),
    ("name: maths", "name: {", "not valid YAML: "),
    ("path: some/model", "path: hf_" + "a1" * 15, "model.path: looks like a secret; take it out"),
    ("name: b", "name: a", "domains: domain names must differ, a stands more than once"),
    ("kind: lm_eval, ", "", "feedback: needs `kind`: one of heldout_loss, lm_eval, function"),
    (
        "kind: lm_eval",
        "kind: lm_evall",
        "feedback.kind: must be one of heldout_loss, lm_eval, function, got 'lm_evall'",
    ),
    ("kind: lm_eval", "kind: deferred", "(deferred is planned and not built yet)"),
    (SEARCH, "search: {n_trials: -1}", "search.n_trials: must be greater than or equal to 0"),
    (SEARCH, "search: {acquisition: lbc}", "got 'lbc'; did you mean `lcb`?"),
    (SEARCH, "sampling: {k: 2, min_samples: 3}", "sampling.min_samples: must be <= sampling.k = 2, got 3"),
    (SEARCH, "sampling: {racing: {at: [0.5, 0.2]}}", "sampling.racing.at: must be rising shares between 0 and 1"),
    (SEARCH, "store: postgresql://x", "store: must start with postgresql+psycopg:// or sqlite:////"),
    (
        SEARCH,
        "store: postgresql+psycopg://me:word@db/duet",
        "store: take the password out of the URL, and set PGPASSWORD",
    ),
    (SEARCH, "store: sqlite:///study.db", "store: must name a file by its whole path"),
    (SEARCH, "artifacts: models", "artifacts: must be a URL such as s3://bucket/folder, got 'models'"),
    (SEARCH, "artifacts: s3://key:word@bucket/x", "artifacts: take the password out of the URL"),
    (
        SEARCH,
        "fleet: {workers_per_group: 2, gpus_per_worker: 0.5}",
        "fleet.gpus_per_worker: must be 0 or >= 1 with fleet",
    ),
    (SEARCH, "fleet: {groups: 2, min_groups: 3}", "fleet.min_groups: must be <= fleet.groups = 2, got 3"),
    (SEARCH, "search: {kernel: maternn}", "did you mean `matern`?"),
    (SEARCH, "training: {fuse: 0}", "training.fuse"),
    (SEARCH, "training: {fuse: 2}", "training.fuse: must be <= sampling.k = 1, got 2"),
    (SEARCH, "training: {method: full, fuse: 2}", "only adapters train in one pass, not training.method: full"),
    (SEARCH, "training: {method: full, rank: 8}", "training.rank: is of an adapter, and nothing here trains one"),
    (SEARCH, "training: {zero: {stage: 3}}", "training.zero: is read by training.method: full, not by lora"),
    (
        SEARCH,
        "sampling: {k: 2}\ntraining: {fuse: 2}\nfleet: {workers_per_group: 2}",
        "must be 1 with fleet.worker",
    ),
    (SEARCH, "sampling: {racing: {}}", "sampling.racing: needs sampling.k > 1"),
    (SEARCH, "sampling: {k: 4, min_samples: 2, racing: {}}", "sampling.min_samples: must be <= 1, the samples that"),
    (SEARCH, "training: {batch_size: 2}\nfleet: {workers_per_group: 3}", "must be <= training.batch_size = 2, got 3"),
    (SEARCH, "training: {batch_size: 6, micro_batch_size: 4}", "must divide training.batch_size = 6, got 4"),
    (
        SEARCH,
        "selection: {method: influence}\ndata: {validation_fraction: 0}",
        "data.validation_fraction: must be > 0 with selection.method: influence, got 0",
    ),
    (
        SEARCH,
        "selection: {method: less}\ndata: {validation_fraction: 0}",
        "data.validation_fraction: must be > 0 with selection.method: less, got 0",
    ),
    (SEARCH, "selection: {method: tracing}", "got 'tracing'; did you mean `tracin`?"),
    (SEARCH, "selection: {method: less, examples: a.jsonl}", "selection.examples: is read by selection.method: indic"),
    (SEARCH, "selection: {method: logdet, n_exact_rows: 99}", "selection.n_exact_rows: logdet scores no rows"),
    (SEARCH, "selection: {method: coreset, surrogate: {path: a/b}}", "selection.surrogate: coreset fine-tunes no mod"),
    (SEARCH, "selection: {method: top_n}\nmixture: {replacement: true}", "mixture.replacement: must be false with sel"),
    (SEARCH, "selection: {method: indicators, indicators: [length, length]}", "each indicator stands at most once"),
    (
        SEARCH,
        "selection: {method: remove_harmful, harmful_fraction: 1}",
        "selection.harmful_fraction: must be less than",
    ),
    (GOOD, "- a list", "a study file is a mapping of keys to values"),
    (GOOD, "", "a study file is a mapping of keys to values"),
]


@pytest.mark.parametrize(("old", "new", "expected"), MISTAKES, ids=[new[:30] or "empty" for _, new, _ in MISTAKES])
def test_mistakes(tmp_path: Path, old: str, new: str, expected: str) -> None:
    text = GOOD.replace(old, new)
    assert text != GOOD
    assert any(expected in line for line in _problems(tmp_path, text))


def test_bounds_that_no_ratio_fits(tmp_path: Path) -> None:
    text = GOOD.replace("{name: a, source: a.jsonl}", "{name: a, source: a.jsonl, bounds: [0, 0.3]}")
    (line,) = _problems(tmp_path, text)
    assert "no ratio fits the bounds: the lower ones sum to 0.1 (must be <= 1), the upper ones to 0.8" in line


def test_overrides(tmp_path: Path) -> None:
    path = _write(tmp_path, GOOD)
    config = load_config(path, ["search.n_trials=20", "domains[0].bounds=[0, 0.5]", "training.rank=64"])
    assert (config.search.n_trials, config.domains[0].bounds, config.training.rank) == (20, (0, 0.5), 64)
    assert _problems(tmp_path, GOOD, "search.n_trails=1")[0].startswith("search.n_trails: unknown key; did you mean")
    assert _problems(tmp_path, GOOD, "domains[9].name=x") == [
        "--set domains[9].name=x: there is no `domains[9]` in the study file"
    ]
    assert "must be path=value" in _problems(tmp_path, GOOD, "search")[0]


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such study file; `duet init .*nothing.yaml` writes one"):
        load_config(tmp_path / "nothing.yaml")


def test_the_template_is_sound_and_shows_the_defaults(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path, template()))
    bare = config_from(
        {name: getattr(config, name) for name in ("name",)}
        | {"model": {"path": "./my-model"}, "domains": config.model_dump()["domains"]}
        | {"feedback": config.model_dump()["feedback"], "fleet": {"gpus_per_worker": 1}},
        folder=tmp_path,
    )
    assert config == bare, "the template says that keys left out have the value shown"


def test_what_a_resume_may_change() -> None:
    old = config_from(toy_data(), folder=Path())

    def changed(**changes: Any) -> list[str]:
        return differences(old, config_from(toy_data(**changes), folder=Path()))

    assert changed() == []
    assert changed(search__n_trials=9, fleet__groups=4, keep_best=9, confirm__repeats=5) == []
    assert changed(search__n_trials=1) == ["search.n_trials: 2 -> 1"]
    assert changed(training__rank=8, seed=4) == ["seed: 3 -> 4", "training.rank: 4 -> 8"]


def test_a_resolved_study_survives_its_yaml(tmp_path: Path) -> None:
    config = config_from(toy_data(), folder=tmp_path)
    assert load_config(_write(tmp_path, config.to_yaml())) == config


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(StudyConfig.model_fields)), json_values)
def test_any_value_at_any_key_ends_in_a_config_or_a_config_error(key: str, value: Any) -> None:
    message = "sound"
    try:
        config_from({**toy_data(), key: value}, folder=Path())
    except ConfigError as error:
        message = str(error)
    assert message


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_ends_in_a_message(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DuetError):
        load_config(path)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"metric": {"one": "acc,none"}}, "feedback.metric: has none for two: give one metric for all tasks"),
        ({"metric": {"one": "a,b", "two": "a,b", "tow": "a,b"}}, "feedback.metric.tow: there is no such task; tasks"),
        ({"rows": {"tow": "::2"}}, "feedback.rows.tow: there is no such task; tasks here: one, two"),
        ({"rows": {"two": "-1:"}}, "feedback.rows.two: "),
    ],
)
def test_settings_by_task_name_tasks_that_are_there(section: dict, expected: str) -> None:  # type: ignore[type-arg]
    feedback = {"kind": "lm_eval", "tasks": {"one": 1, "two": 1}, "direction": "maximize", **section}
    with pytest.raises(ConfigError, match=re.escape(expected)):
        config_from(toy_data(feedback=feedback), folder=Path())


def test_settings_for_scoring_alone_need_a_model_that_is_fine_tuned_for_it() -> None:
    config_from(toy_data(selection={"method": "influence", "fit": {"rank": 8}}), folder=Path())
    with pytest.raises(ConfigError, match=r"selection.fit: uniform fine-tunes no model: remove it"):
        config_from(toy_data(selection={"fit": {"rank": 8}}), folder=Path())
