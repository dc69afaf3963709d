"""What the tables of `benchmarks/search_efficiency.py` rest on: `search_objectives.py`, `search_surrogates.py`,
`search_methods.py` and `search_tables.py` beside it.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import check_grad
from sklearn.ensemble import ExtraTreesRegressor, HistGradientBoostingRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern, WhiteKernel

from duet_ray.records import Ratio
from duet_ray.search import SimplexSpace, Told

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
import search_efficiency
import search_methods
from search_efficiency import Kept, Run, Step, arguments, chosen_objectives, main, search, seed_range
from search_methods import FORMS as OPTUNA_FORMS
from search_methods import MethodError, MethodSpec, search_settings, specs
from search_objectives import (
    FORMS,
    Objective,
    ObjectiveError,
    closed_form,
    make,
    problem_objective,
    ratio_of_unit,
    search_best,
    unit_of_ratio,
)
from search_surrogates import ProcessLoss, Table, TreesLoss, misfit, table_objectives
from search_tables import Runs, collected, interval, ratio_to_best_peer

SPACE = SimplexSpace(names=("a", "b", "c"), n_rows=10_000, lower=(0,) * 3, upper=(10_000,) * 3)


def lattice(n_parts: int) -> np.ndarray:
    """All ratios of three domains in whole parts."""
    i, j = np.meshgrid(range(n_parts + 1), range(n_parts + 1))
    inside = i + j <= n_parts
    return np.stack([i[inside], j[inside], n_parts - i[inside] - j[inside]], axis=1) / n_parts


def runs_of(loss: np.ndarray, ratios: np.ndarray, file: Path) -> Path:
    frame = pd.DataFrame(ratios, columns=["train_a", "train_b", "train_c"])
    frame["score"] = loss
    frame.insert(0, "index", range(len(frame)))
    frame.to_csv(file, index=False)
    return file


@pytest.fixture
def table_file(tmp_path: Path) -> Path:
    """120 runs of a smooth loss with noise of 2 % of its spread."""
    random = np.random.default_rng(0)
    ratios = random.dirichlet(np.full(3, 0.6), 120)
    loss = ((ratios - [0.6, 0.3, 0.1]) ** 2).sum(axis=1)
    return runs_of(loss + random.normal(0, 0.02 * loss.std(), 120), ratios, tmp_path / "runs.csv")


# Objectives


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_domains", [3, 9, 30])
def test_no_ratio_beats_the_best_of_a_closed_form(form: str, n_domains: int) -> None:
    objective = closed_form(form, n_domains, 0.1)  # type: ignore[arg-type]
    assert objective.gain(objective.true(np.full(n_domains, 1 / n_domains))) == 0
    assert objective.gain(objective.best) == 1
    assert objective.best_ratio.sum() == pytest.approx(1)
    found = search_best(objective.loss, n_domains, n_random=4000, n_climbs=3)
    assert objective.gain(objective.true(found)) <= 1 + 1e-6
    if n_domains == 3:
        assert objective.gain(float(objective.loss(lattice(200)).min())) == pytest.approx(1, abs=2e-3)


def test_closed_forms_are_where_they_say() -> None:
    used = {form: np.count_nonzero(closed_form(form, 9, 0.1).best_ratio) for form in ("vertex", "face", "inside")}  # type: ignore[arg-type]
    assert used == {"vertex": 1, "face": 3, "inside": 9}
    assert closed_form("face", 9, 0.1).best == closed_form("face", 9, 0.3).best
    wells = closed_form("several", 9, 0.1)
    ends = [objective_after_small_steps(wells, centre) for centre in wells.loss.centres]  # type: ignore[attr-defined]
    assert len({round(end, 2) for end in ends}) >= 3, "several local optima"


def objective_after_small_steps(objective: Objective, ratio: np.ndarray) -> float:
    """The gain where a descent in steps of 0.005 ends."""
    takes, gives = (index.ravel() for index in np.nonzero(~np.eye(len(ratio), dtype=bool)))
    while True:
        points = np.repeat(ratio[None], len(takes), axis=0)
        moved = np.minimum(0.005, ratio[gives])
        points[np.arange(len(takes)), gives] -= moved
        points[np.arange(len(takes)), takes] += moved
        values = objective.loss(points)
        if values.min() >= objective.true(ratio) - 1e-12:
            return objective.gain(objective.true(ratio))
        ratio = points[values.argmin()]


def test_noise_is_of_the_stated_size() -> None:
    objective = closed_form("inside", 9, 0.3)
    assert objective.noise == pytest.approx(0.3 * (objective.uniform - objective.best))
    draws = [objective.draw_noise(np.random.default_rng(i)) for i in range(2000)]
    assert np.std(draws) == pytest.approx(objective.noise, rel=0.06)
    assert draws[7] == objective.draw_noise(np.random.default_rng(7))


def test_an_objective_without_a_gain_is_refused() -> None:
    with pytest.raises(ObjectiveError, match="uniform ratio is the best"):
        make("flat", 3, lambda ratios: ((ratios - 1 / 3) ** 2).sum(axis=1), noise=0.1)


@pytest.mark.parametrize("kernel", ["se", "matern"])
def test_the_process_is_that_of_scikit_learn(kernel: str) -> None:
    random = np.random.default_rng(1)
    ratios = random.dirichlet(np.ones(4), 40)
    losses = np.sin(5 * ratios[:, 0]) + ratios[:, 1]
    scales = np.array([-0.5, 0.2, 0.4, 0.1, 0.3, -3.0])
    ours = ProcessLoss.fit(ratios, losses, "shares", kernel, scales)  # type: ignore[arg-type]
    shape = RBF(np.exp(scales[:4])) if kernel == "se" else Matern(np.exp(scales[:4]), nu=2.5)
    law = ConstantKernel(np.exp(0.3)) * shape + WhiteKernel(np.exp(-3.0))
    theirs = GaussianProcessRegressor(law, optimizer=None, normalize_y=True).fit(ratios, losses)
    points = random.dirichlet(np.ones(4), 20)
    assert ours(points) == pytest.approx(theirs.predict(points), abs=1e-8)
    assert (
        theirs.log_marginal_likelihood_value_
        == pytest.approx(
            -misfit(scales, ratios, (losses - losses.mean()) / losses.std(), kernel)[0]  # type: ignore[arg-type]
            + 0.5 * (scales[:4] ** 2).sum() / 1.5**2
            - 20 * np.log(2 * np.pi)
        )
    )


@pytest.mark.parametrize("kernel", ["se", "matern"])
def test_the_gradient_of_the_fit(kernel: str) -> None:
    random = np.random.default_rng(2)
    points, values = random.dirichlet(np.ones(3), 25), random.normal(size=25)
    scales = np.array([-0.7, 0.3, 0.1, 0.2, -1.5])
    error = check_grad(
        lambda x: misfit(x, points, values, kernel)[0],  # type: ignore[arg-type]
        lambda x: misfit(x, points, values, kernel)[1],  # type: ignore[arg-type]
        scales,
    )
    assert error < 1e-4


def test_trees_as_arrays_are_the_trees() -> None:
    random = np.random.default_rng(3)
    ratios = random.dirichlet(np.ones(5), 200)
    losses = ratios[:, 0] ** 2 - np.abs(ratios[:, 1] - 0.3)
    points = random.dirichlet(np.ones(5), 50)
    boosted = HistGradientBoostingRegressor(max_iter=40, max_leaf_nodes=8, random_state=0).fit(ratios, losses)
    assert TreesLoss.of_boosted(boosted)(points) == pytest.approx(boosted.predict(points), abs=1e-12)
    randomised = ExtraTreesRegressor(20, random_state=0).fit(ratios, losses)
    assert TreesLoss.of_randomised(randomised)(points) == pytest.approx(randomised.predict(points), abs=1e-12)


def test_objectives_of_a_table(table_file: Path, tmp_path: Path) -> None:
    table = Table.read(table_file)
    found = table_objectives(table, "score", noise_fraction=0.5, cache=tmp_path / "cache")
    assert [one.name for one in found] == ["table:score:gp", "table:score:trees"]
    process, trees = found
    assert process.facts["R2"] > 0.97
    assert process.facts["R2"] > trees.facts["R2"] > 0.5
    assert process.best_ratio == pytest.approx([0.6, 0.3, 0.1], abs=0.06)
    for one in found:
        assert one.noise == 0.5 * process.residuals.std(), "of the better surrogate, for both"  # type: ignore[union-attr]
        assert one.gain(float(one.loss(lattice(200)).min())) <= 1 + 1e-6, "nothing on a fine lattice is better"
    draws = {process.draw_noise(np.random.default_rng(i)) for i in range(400)}
    assert len(draws) <= 120, "noise is the residuals' own"
    assert np.std(list(draws)) == pytest.approx(process.noise, rel=0.3)
    again = table_objectives(table, "score", noise_fraction=0.5, cache=tmp_path / "cache")
    assert [one.check for one in again] == [one.check for one in found]
    assert again[1].best == found[1].best


def test_a_poor_surrogate_is_refused(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    file = runs_of(random.normal(size=60), random.dirichlet(np.ones(3), 60), tmp_path / "noise.csv")
    with pytest.raises(ObjectiveError, match="--allow-poor"):
        table_objectives(Table.read(file), "score", classes=("trees",))
    assert table_objectives(Table.read(file), "score", allow_poor=True, classes=("trees",))[0].facts["R2"] < 0.5


def test_a_folder_of_runs_is_joined_and_normalised(tmp_path: Path) -> None:
    for part, rows in (("train", [3, 1, 2]), ("test", [5, 4])):
        ratios = pd.DataFrame({"index": rows, "train_a": [0.5] * len(rows), "train_b": [0.499] * len(rows)})
        ratios.to_csv(tmp_path / f"{part}_mixture_1m.csv", index=False)
        metrics = pd.DataFrame({"index": sorted(rows), "metric/x": range(len(rows)), "metric/y": 0.0})
        metrics.to_csv(tmp_path / f"{part}_pile_loss_1m.csv", index=False)
    table = Table.read(tmp_path)
    assert table.names == ("a", "b")
    assert table.ratios.sum(axis=1) == pytest.approx(np.ones(3), abs=1e-15)
    losses, held_out = table.target("/x")
    assert losses.tolist() == [2, 0, 1], "joined on the index, not by line"
    assert held_out is not None
    assert held_out.tolist() == [1, 0]
    assert table.target("mean")[0].tolist() == [1, 0, 0.5]
    with pytest.raises(ObjectiveError, match="metric/x, metric/y"):
        table.target("metric")


def test_bad_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match="no table of runs"):
        Table.read(tmp_path / "nothing.csv")
    file = runs_of(np.zeros(2), np.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.2]]), tmp_path / "off.csv")
    with pytest.raises(ObjectiveError, match=r"run 1 has shares that sum to 1\.2"):
        Table.read(file)
    with pytest.raises(ObjectiveError, match="0 ratio columns"):
        Table.read(file, ratio_prefix="share_")


def test_units_and_ratios_are_each_others_inverse() -> None:
    random = np.random.default_rng(5)
    ratios = random.dirichlet(np.ones(6), 100)
    units = unit_of_ratio(ratios)
    assert ratio_of_unit(units) == pytest.approx(ratios)
    drawn = ratio_of_unit(random.random((20_000, 5)))
    assert drawn.sum(axis=1) == pytest.approx(np.ones(20_000))
    assert drawn.mean(axis=0) == pytest.approx(np.full(6, 1 / 6), abs=4e-3)
    assert drawn.var(axis=0) == pytest.approx(np.full(6, 5 / 252), rel=0.06), "that of Dirichlet(1): (n−1)/(n²(n+1))"
    assert unit_of_ratio(np.eye(3)).tolist() == [[1, 0], [0, 1], [0, 0]]


def test_a_problem_of_botorch_is_an_objective() -> None:
    from botorch.test_functions.synthetic import Branin, Hartmann

    hartmann = problem_objective(Hartmann(dim=6), noise_share=0.1, mapping="sticks")
    assert hartmann.n_domains == 7
    assert hartmann.best == pytest.approx(Hartmann(dim=6).optimal_value, abs=2e-3)
    negated = problem_objective(Hartmann(dim=6, negate=True), noise_share=0.1, mapping="sticks", maximise=True)
    assert negated.best == hartmann.best
    on_shares = problem_objective(Branin(), noise_share=0.1)
    line = np.stack([np.linspace(0, 1, 2001), np.linspace(1, 0, 2001)], axis=1)
    assert on_shares.best == pytest.approx(float(on_shares.loss(line).min()), abs=1e-2)
    steps = search(Run(objective=on_shares, method=MethodSpec(name="r", kind="random"), seed=0, budget=6, every=3))
    assert len(steps) == 6


# Methods


@pytest.mark.parametrize("form", OPTUNA_FORMS)
def test_forms_reach_the_simplex(form: str) -> None:
    one, random = OPTUNA_FORMS[form], np.random.default_rng(6)
    assert one.ratio(one.uniform(5)) == pytest.approx(np.full(5, 0.2))
    assert len(one.uniform(5)) == one.n_parameters(5)
    for _ in range(20):
        ratio = one.ratio(random.uniform(*one.bounds, one.n_parameters(5)))
        assert ratio.min() >= 0
        assert ratio.sum() == pytest.approx(1)


@pytest.mark.parametrize("name", ["random", "sobol", "tpe", "tpe@sorted", "optuna-gp", "cmaes", "public", "regmix"])
def test_a_peer_searches_the_lattice_and_repeats_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (spec,) = specs([name], [])
    for package in search_methods.PACKAGES.get(spec.kind, ()):
        pytest.importorskip(package)
    monkeypatch.setattr(search_methods.RegMixSearch, "n_simulated", 2000)
    first, again = played(spec), played(spec)
    assert first == again
    assert first[0] == SPACE.uniform()
    assert len(set(first)) > 4
    assert all(SPACE.contains(ratio) for ratio in first)


def played(spec: MethodSpec, n_trials: int = 7) -> list[Ratio]:
    """The ratios of a search for (0.6, 0.3, 0.1), and its recommendation."""
    method, ratio = spec.make(SPACE, 3, n_trials), SPACE.uniform()
    told: list[Told] = []
    for trial in range(n_trials):
        if trial:
            ratio = method.ask(told)
        told.append(Told(ratio=ratio, loss=float(((ratio.values - [0.6, 0.3, 0.1]) ** 2).sum())))
    return [*(one.ratio for one in told), method.recommend(told)]


@pytest.mark.slow
def test_ax_searches_the_lattice() -> None:
    ratios = played(specs(["ax"], [])[0])
    assert ratios[0] == SPACE.uniform()
    assert all(SPACE.contains(ratio) for ratio in ratios)


def test_ours_is_the_proposer_with_the_settings_given() -> None:
    settings = search_settings("acquisition=qlognei, n_start=3,constraints=[a >= 0.1, b <= 0.5],also={}", 20)
    assert (settings.acquisition, settings.n_start, settings.n_trials) == ("qlognei", 3, 17)
    assert settings.constraints == ["a >= 0.1", "b <= 0.5"]
    (spec,) = specs([], ["mine:n_start=4"])
    ratios = played(spec)
    sobol = played(specs(["sobol"], [])[0])
    assert ratios[:4] == sobol[:4], "the same start design"
    assert ratios[4:7] != sobol[4:7]


def test_mistakes_in_methods_are_named() -> None:
    with pytest.raises(MethodError, match="must be one of ours, random"):
        specs(["rnadom"], [])
    with pytest.raises(MethodError, match="softmax, exponential"):
        specs(["tpe@box"], [])
    with pytest.raises(MethodError, match="key=value"):
        specs([], ["mine:lcb"])
    with pytest.raises(MethodError, match="two methods"):
        specs(["ours"], ["ours:n_start=4"])


def test_a_peer_without_its_package_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search_methods, "PACKAGES", {"tpe": ("no_such_package",)})
    found = search_efficiency.chosen_methods(arguments(["--methods", "tpe", "random"]))
    assert [spec.name for spec in found] == ["random"]
    assert "tpe is left out: pip install no_such_package" in capsys.readouterr().out


# Runs and tables


def test_a_run_by_hand() -> None:
    """What a run keeps, from the ratios and noise that it must have had."""
    objective = closed_form("inside", 3, 1.0)
    spec = MethodSpec(name="sobol", kind="sobol")
    steps = search(Run(objective=objective, method=spec, seed=5, budget=7, every=3))
    order = np.random.default_rng([4, 5]).permutation(3)
    method = spec.make(SPACE, 5, 7)
    ratios = [method.ask([None] * i) for i in range(7)]  # type: ignore[list-item]
    losses = np.array([objective.true(ratio.values[order]) for ratio in ratios])
    noise = np.array([objective.draw_noise(np.random.default_rng([5, 5, trial])) for trial in range(7)])
    gains = np.array([objective.gain(loss) for loss in losses])
    assert gains[0] == pytest.approx(0, abs=1e-3), "uniform but for a row"
    assert [s.trained for s in steps] == np.maximum.accumulate(gains).tolist()
    luckiest = [int((losses + noise)[: t + 1].argmin()) for t in range(7)]
    assert [s.observed for s in steps] == gains[luckiest].tolist()
    assert steps[-1].observed < steps[-1].trained, "the luckiest is not the best"
    assert [s.recommended is not None for s in steps] == [False, False, True, False, False, True, True]
    assert steps[-1].recommended == steps[-1].observed


def runs_with(method: str, gains: list[list[float]], *, ours: bool = False) -> Runs:
    recommended = np.array(gains)
    filler = np.zeros((len(gains), 20))
    return Runs(
        objective="o", method=method, ours=ours, n_domains=3, noise=0.1, seeds=tuple(range(len(gains))), budget=20,
        checks=np.array([5, 10, 15, 20]), trained=filler, observed=filler, recommended=recommended, seconds=filler,
    )  # fmt: skip


def test_trials_to_a_gain_by_hand() -> None:
    mine = runs_with("ours", [[0.4, 0.96, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4], [0.95, 0.9, 0.97, 1.0]], ours=True)
    assert mine.trials_to(0.95).tolist() == [10, 21, 5]
    assert mine.trials_to(0.3).tolist() == [5, 15, 5]
    assert mine.median_trials_to(0.95) == 10
    assert mine.final.tolist() == [0.3, 0.4, 1.0]
    slow, never = runs_with("slow", [[0, 0, 0, 1]] * 3), runs_with("never", [[0, 0, 0, 0]] * 3)
    assert ratio_to_best_peer(mine, [never, slow]) == (0.5, "slow", "")
    assert ratio_to_best_peer(mine, [never]) == (pytest.approx(10 / 21), "none", "<")
    assert ratio_to_best_peer(never, [never]) is None
    assert ratio_to_best_peer(mine, [mine]) is None, "ours is no peer"


def test_an_interval_holds_the_mean_of_other_seeds() -> None:
    random = np.random.default_rng(7)
    hits = [low < 0 < high for low, high in (interval(random.normal(size=20)) for _ in range(300))]
    assert 0.88 < np.mean(hits) < 0.98
    assert np.isnan(interval(np.ones(1))).all()


def test_runs_are_kept_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["--quick", "--methods", "random", "sobol", "--objectives", "closed:vertex:3:0.1", "--out", str(tmp_path)]
    main(asked)
    kept = Kept(tmp_path / "runs.csv")
    assert len(kept.steps) == 2 * 2 * 12
    before, tables = (tmp_path / "runs.csv").read_bytes(), (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "closed:vertex:3:0.1" in tables
    assert {path.name for path in tmp_path.glob("*.png")} == {"gain-1.png", "final.png"}
    monkeypatch.setattr(search_efficiency, "search", lambda run: pytest.fail("repeated"))
    main(asked)
    assert (tmp_path / "runs.csv").read_bytes() == before
    assert (tmp_path / "tables.md").read_text(encoding="utf-8") == tables
    monkeypatch.undo()
    main([*asked, "--again", "sobol"])
    again = Kept(tmp_path / "runs.csv").steps
    assert [same(s) for s in sorted(again, key=place)] == [same(s) for s in sorted(kept.steps, key=place)]


def place(step: Step) -> tuple[str, int, int]:
    return step.method, step.seed, step.trial


def same(step: Step) -> tuple:
    """A step without what a clock says."""
    return (*step.run, step.trial, step.trained, step.observed, step.recommended)


@pytest.mark.slow
def test_processes_do_not_change_a_run(tmp_path: Path) -> None:
    asked = ["--quick", "--methods", "random", "--objectives", "closed:vertex:3:0.1", "--out"]
    main([*asked, str(tmp_path / "one")])
    main([*asked, str(tmp_path / "two"), "--jobs", "2"])
    one, two = (sorted(Kept(tmp_path / name / "runs.csv").steps, key=place) for name in ("one", "two"))
    assert [same(s) for s in one] == [same(s) for s in two]


def test_steps_become_arrays_whatever_their_order() -> None:
    objective = closed_form("vertex", 3, 0.1)
    spec = MethodSpec(name="random", kind="random")
    steps = [
        step for seed in (1, 0) for step in search(Run(objective=objective, method=spec, seed=seed, budget=6, every=4))
    ]
    (forwards,), (backwards,) = collected(steps), collected(steps[::-1])
    assert forwards.seeds == (0, 1)
    assert forwards.checks.tolist() == [4, 6]
    assert forwards.trained.tolist() == backwards.trained.tolist()
    assert forwards.trained[1, 2] == steps[2].trained


def test_the_command_line() -> None:
    assert seed_range("2-4") == [2, 3, 4]
    assert seed_range("0,7") == [0, 7]
    asked = arguments(["--objectives", "closed:face:*:0.3", "closed:inside:5:0.2"])
    names = [one.name for one in chosen_objectives(asked)]
    assert names == ["closed:face:3:0.3", "closed:face:9:0.3", "closed:face:30:0.3", "closed:inside:5:0.2"]
    with pytest.raises(ObjectiveError, match="with --table"):
        chosen_objectives(arguments(["--objectives", "table:*"]))
    with pytest.raises(ObjectiveError, match="no objective is called"):
        chosen_objectives(arguments(["--objectives", "open:*"]))
