"""The keys of the search: every contradiction with its path and remedy."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from duet_ray.config import SEARCHABLE, TrainingConfig, config_from, differences, load_config
from duet_ray.errors import ConfigError
from duet_ray.study_file import set_value

BASE: dict[str, Any] = {
    "name": "s",
    "model": {"path": "m"},
    "domains": [{"name": name, "source": f"{name}.jsonl"} for name in ("maths", "chats", "wiki")],
    "feedback": {"kind": "heldout_loss", "file": "t.jsonl", "name": "exam"},
    "also": [{"kind": "heldout_loss", "file": "u.jsonl", "name": "safety"}],
}


def given(*overrides: str) -> dict[str, Any]:
    """The study as plain data, changed as `--set` changes it."""
    data: dict[str, Any] = yaml.safe_load(yaml.safe_dump(BASE))
    for override in overrides:
        set_value(data, override)
    return data


def problems(*overrides: str) -> list[str]:
    """What is wrong with it; empty if nothing is."""
    try:
        config_from(given(*overrides), folder=Path())
    except ConfigError as error:
        return str(error).splitlines()
    return []


ALSO_RANK = "search.also={training.rank: {choices: [8, 32]}}"


@pytest.mark.parametrize(
    "overrides",
    [
        ("search.acquisition=kg",),
        ("search.acquisition=thompson", "search.kernel=compositional"),
        ("search.beta=theory", "search.kernel=se", "search.rkhs_norm=2", "search.delta=0.05"),
        ("search.prior=sizes",),
        ("search.prior={maths: 0.7, wiki: 0.3}",),
        ("search.prior={maths: 0.333, chats: 0.333, wiki: 0.333}",),
        ('search.constraints=["maths + wiki >= 0.2", "0.1 <= chats <= 30 %", "maths = wiki"]',),
        ("mixture.when_short=repeat", "mixture.max_repeats=2.5"),
        (ALSO_RANK, "search.optimize=both"),
        (ALSO_RANK, "search.optimize=model"),
        ("search.also={training.learning_rate: {log: [1.0e-5, 1.0e-3]}}", "search.optimize=both"),
        ("search.also={training.layers: {choices: [[0], [0, 1]]}}", "search.optimize=both"),
        ("search.also={training.alpha: {range: [8, 64]}}", "search.optimize=both"),
        ("search.objective={weights: {exam: 1, safety: 0.5}}",),
        ("search.objective={pareto: [exam, safety]}", "search.acquisition=qlognei"),
        ('search.objective={require: ["safety <= base + 0.01"]}', "search.acquisition=qlognei"),
        ("search.fidelity={rows: [0.1, 0.5]}",),
        ("sampling.k=auto", "sampling.k_bounds=[2, 6]", "sampling.min_samples=2"),
        ("feedback.limit=100", "confirm.limit=100"),
        ("search.recommend=anywhere",),
    ],
    ids=lambda overrides: " ".join(overrides)[:60],
)
def test_what_is_allowed(overrides: tuple[str, ...]) -> None:
    assert problems(*overrides) == []


KNOWN = f"known here: {', '.join(f'training.{name}' for name in SEARCHABLE)}"

CONTRADICTIONS: list[tuple[tuple[str, ...], str]] = [
    # The acquisition's own keys.
    (
        ("search.beta=theory", "search.acquisition=ei", "search.kernel=se"),
        "search.beta: theory is the factor of search.acquisition: lcb, not of ei",
    ),
    # Rows that repeat.
    (
        ("mixture.max_repeats=3",),
        "mixture.max_repeats: is read with when_short: repeat, not with cap: remove it",
    ),
    # The prior.
    (
        ("search.prior={mats: 1.0}",),
        "search.prior.mats: there is no such domain; did you mean `maths`?",
    ),
    (
        ("search.prior={zzz: 1.0}",),
        "search.prior.zzz: there is no such domain; domains here: maths, chats, wiki",
    ),
    (
        ("search.prior={maths: 70, chats: 30}",),
        "search.prior: shares must sum to 1 (domains left out have 0), got 100",
    ),
    (("search.prior={}",), "search.prior: shares must sum to 1 (domains left out have 0), got 0"),
    (
        ("search.prior={maths: 1.5, chats: -0.5}",),
        "search.prior: shares must be >= 0, got [1.5, -0.5]",
    ),
    (("search.prior={maths: .nan}",), "search.prior.maths: must be a finite number, got nan"),
    (
        ("search.prior=sizes", "search.n_start=1"),
        "search.n_start: must be >= 2 with search.prior: the first ratio is the uniform one",
    ),
    # Cheap trials.
    (
        ("search.fidelity={rows: [0.001]}", "mixture.n_rows=50"),
        "search.fidelity.rows: 0.001 of mixture.n_rows = 50 is no row",
    ),
    # Training settings.
    ((ALSO_RANK,), "search.optimize: must be both or model with search.also: data searches the ratio alone"),
    (
        ("search.optimize=both",),
        "search.also: is required with search.optimize: both: name the settings to search",
    ),
    (
        ("search.also={training.rnak: {choices: [8, 32]}}", "search.optimize=both"),
        "search.also.training.rnak: cannot be searched; did you mean `training.rank`?",
    ),
    (
        ("search.also={feedback.file: {choices: [a, b]}}", "search.optimize=both"),
        f"search.also.feedback.file: cannot be searched; {KNOWN}",
    ),
    (
        (ALSO_RANK, "search.optimize=both", "training.method=full"),
        "search.also.training.rank: is of an adapter, and training.method: full trains none: remove it",
    ),
    (
        ("search.also={training.schedule: {range: [0, 1]}}", "search.optimize=both"),
        "search.also.training.schedule: has no range: give choices",
    ),
    (
        ("search.also={training.layers: {log: [1, 4]}}", "search.optimize=both"),
        "search.also.training.layers: has no range: give choices",
    ),
    (
        ("search.also={training.rank: {choices: [0, 8]}}", "search.optimize=both"),
        "search.also.training.rank: 0 is no value of it: it should be greater than or equal to 1",
    ),
    (
        ("search.also={training.dropout: {range: [0, 1]}}", "search.optimize=both"),
        "search.also.training.dropout: 1.0 is no value of it: it should be less than 1",
    ),
    (
        (
            "search.also={training.batch_size: {choices: [8, 12]}}",
            "search.optimize=both",
            "training.micro_batch_size=8",
        ),
        "search.also.training.batch_size: every value must be a multiple of training.micro_batch_size = 8",
    ),
    (
        (
            "search.also={training.batch_size: {range: [8, 64]}}",
            "search.optimize=both",
            "training.micro_batch_size=8",
        ),
        "search.also.training.batch_size: has values that training.micro_batch_size = 8 does not divide: give choices",
    ),
    (
        (
            "search.also={training.batch_size: {choices: [2, 8]}}",
            "search.optimize=both",
            "fleet.workers_per_group=4",
        ),
        "search.also.training.batch_size: every value must be >= fleet.workers_per_group = 4",
    ),
    (
        ("search.also={training.batch_size: {choices: [many, 8]}}", "search.optimize=both"),
        "search.also.training.batch_size: 'many' is no value of it: it should be a valid integer, unable to parse "
        "string as an integer",
    ),
    (
        ("search.also={training.learning_rate: {log: [1.0e-5, .inf]}}", "search.optimize=both"),
        "search.also.training.learning_rate.log[1]: must be a finite number, got inf",
    ),
    # What is searched for.
    (
        ("search.objective={weights: {}}",),
        "search.objective: needs weights, pareto or require; without any of them remove it",
    ),
    (
        ("search.objective={pareto: [exam, exam]}", "search.acquisition=qlognei"),
        "search.objective.pareto: each metric stands at most once",
    ),
    (
        ("search.objective={weights: {exma: 1}}",),
        "search.objective.weights: there is no metric 'exma'; metrics here: exam, safety",
    ),
    (
        ("search.objective={pareto: [exam, safe]}", "search.acquisition=qlognei"),
        "search.objective.pareto: there is no metric 'safe'; metrics here: exam, safety",
    ),
    (
        ("search.objective={weights: {exam: -1}}",),
        "search.objective.weights: must be > 0: each metric has a direction of its own",
    ),
    (
        ("search.objective={weights: {exam: 1}, pareto: [exam, safety]}", "search.acquisition=qlognei"),
        "search.objective.pareto: cannot stand beside weights: a sum has a best, a front has none",
    ),
    (
        ('search.objective={require: ["safty <= 1"]}', "search.acquisition=qlognei"),
        "search.objective.require[0]: there is no metric 'safty'; did you mean 'safety'?",
    ),
    (
        ('search.objective={require: ["safety < 1"]}', "search.acquisition=qlognei"),
        "search.objective.require[0]: 'safety < 1' is no requirement: write \"metric >= number\" or "
        '"metric <= base + number"',
    ),
    (
        ("search.objective={pareto: [exam, safety]}",),
        "search.acquisition: must be qlognei with a front (search.objective), got lcb",
    ),
    (
        ('search.objective={require: ["safety <= 1"]}',),
        "search.acquisition: must be qlognei with a requirement (search.objective), got lcb",
    ),
    (
        (
            "search.objective={pareto: [exam, safety]}",
            "search.acquisition=qlognei",
            "search.fidelity={rows: [0.5]}",
        ),
        "search.fidelity: cannot stand beside search.objective with pareto or require",
    ),
    (
        ('search.objective={require: ["safety >= base"]}', "search.acquisition=qlognei"),
        "search.objective.require[0]: 'safety >= base' asks for a worse value than it names (direction: minimize); "
        "turn the sign round",
    ),
    (
        ("search.objective={weights: {exam: 1}}", "also[0].name=exam"),
        "also: metrics of search.objective need names of their own, exam stands more than once",
    ),
    # Adaptive k.
    (("sampling.k_bounds=[2, 4]",), "sampling.k_bounds: is read with sampling.k: auto, not with 1: remove it"),
    (
        ("sampling.k=auto", "sampling.min_samples=2"),
        "sampling.min_samples: must be <= the lower end of sampling.k_bounds = 1, got 2",
    ),
    (("sampling.k=2", "sampling.min_samples=3"), "sampling.min_samples: must be <= sampling.k = 2, got 3"),
    (
        ("sampling.k=auto", "sampling.racing={at: [0.5]}"),
        "sampling.racing: needs a number as sampling.k: with auto a ratio's samples are not trained together",
    ),
    # The closer look.
    (
        ("confirm.limit=100",),
        "confirm.limit: the feedback has no limit, so it looks at everything already: remove it",
    ),
    (
        ("feedback.limit=200", "confirm.limit=100"),
        "confirm.limit: must be >= feedback.limit = 200: a confirmation looks closer, not less closely",
    ),
    (
        ("feedback={kind: function, function: 'a:b', direction: maximize, name: exam}", "confirm.limit=100"),
        "confirm.limit: feedback.kind: function has no limit: remove it",
    ),
]


@pytest.mark.parametrize(("overrides", "expected"), CONTRADICTIONS, ids=[e[:70] for _, e in CONTRADICTIONS])
def test_a_contradiction_is_named_with_its_remedy(overrides: tuple[str, ...], expected: str) -> None:
    assert problems(*overrides) == [expected]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("search.kernel=rbf", "search.kernel: must be 'se', 'matern', 'ard', 'compositional' or 'auto'"),
        ("search.acquisition=ucb", "search.acquisition: must be 'lcb', 'qlognei', 'ei', 'kg' or 'thompson'"),
        ("search.beta=-1", "search.beta: must be"),
        ("search.delta=1", "search.delta: must be less than 1, got 1"),
        ("search.rkhs_norm=0", "search.rkhs_norm: must be greater than 0, got 0"),
        ("search.fidelity={rows: []}", "search.fidelity.rows: "),
        ("search.fidelity={rows: [0.5, 0.25]}", "search.fidelity.rows: must be rising shares between 0 and 1"),
        ("search.fidelity={rows: [1.0]}", "search.fidelity.rows: must be rising shares between 0 and 1"),
        ("search.fidelity={row: [0.5]}", "search.fidelity.row: unknown key; did you mean `rows`?"),
        ("sampling.k=0", "sampling.k: must be greater than or equal to 1, or 'auto', got 0"),
        ("sampling.k=some", "sampling.k: must be"),
        ("sampling.k_bounds=[3, 2]", "sampling.k_bounds: must be [fewest, most] with 1 <= fewest <= most, got [3, 2]"),
        ("sampling.k_bounds=[0, 2]", "sampling.k_bounds: must be [fewest, most] with 1 <= fewest <= most, got [0, 2]"),
        ("mixture.max_repeats=0.5", "mixture.max_repeats: must be greater than or equal to 1, got 0.5"),
        ("search.objective={pareto: [exam]}", "search.objective.pareto: "),
        ("search.also={training.rank: {}}", "must be exactly one of choices, range, log; got none"),
        (
            "search.also={training.rank: {choices: [8, 32], log: [1, 2]}}",
            "must be exactly one of choices, range, log; got choices, log",
        ),
        ("search.also={training.rank: {choices: [8, 8]}}", "the choices must differ, got [8, 8]"),
        ("search.also={training.rank: {choices: [8]}}", "search.also"),
        ("search.also={training.alpha: {range: [8, 4]}}", "range must be [low, high] with low < high, got [8.0, 4.0]"),
        (
            "search.also={training.alpha: {log: [0, 4]}}",
            "log must be [low, high] with low < high and low > 0, got [0.0, 4.0]",
        ),
    ],
)
def test_a_value_that_cannot_be(override: str, expected: str) -> None:
    found = problems(override)
    assert len(found) == 1, found
    assert expected in found[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mats <= 0.5", "did you mean"),
        ("maths < 0.5", "write <= or >="),
        ("maths + chats", "write for instance"),
        ("maths <= 40", "40 %"),
    ],
)
def test_a_constraint_that_cannot_be_read(text: str, expected: str) -> None:
    found = problems(f"search.constraints=['wiki <= 0.9', '{text}']")
    assert len(found) == 1, found
    assert found[0].startswith(f"search.constraints[1]: '{text}'")
    assert expected in found[0]


def test_every_contradiction_at_once_and_by_line(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(
        yaml.safe_dump(BASE, sort_keys=False)
        + "search:\n"
        + "  beta: theory\n"
        + "  kernel: se\n"
        + "  acquisition: ei\n"
        + "  prior: {maths: 2.0}\n"
        + "  constraints:\n"
        + "    - maths <= 0.5\n"
        + "    - math <= 0.5\n"
        + "  also:\n"
        + "    training.rank: {choices: [8, 0]}\n"
        + "  objective:\n"
        + "    weights: {exma: 1}\n",
        encoding="utf-8",
    )
    start = path.read_text().splitlines().index("search:") + 1
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert [(p.path, p.line and p.line - start) for p in caught.value.problems] == [
        ("search.optimize", 0),
        ("search.beta", 1),
        ("search.prior", 4),
        ("search.constraints[1]", 7),
        ("search.also.training.rank", 9),
        ("search.objective.weights", 11),
    ]


def test_every_searchable_setting_is_one_of_the_training(tmp_path: Path) -> None:
    assert set(SEARCHABLE) <= set(TrainingConfig.model_fields)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("search.prior=sizes",), "search.prior"),
        (("search.kernel=matern",), "search.kernel"),
        (("search.fidelity={rows: [0.5]}",), "search.fidelity"),
        (("sampling.k=auto",), "sampling.k"),
        ((ALSO_RANK, "search.optimize=both"), "search.also"),
        (("search.constraints=['maths <= 0.5']",), "search.constraints"),
    ],
)
def test_a_resume_with_another_search_is_refused(overrides: tuple[str, ...], key: str) -> None:
    plain, other = config_from(given(), folder=Path()), config_from(given(*overrides), folder=Path())
    assert any(line.startswith(key) for line in differences(plain, other))
    assert differences(other, other) == []
