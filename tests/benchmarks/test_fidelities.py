"""What the tables of `benchmarks/fidelities.py` rest on."""

import sys
from pathlib import Path

import numpy as np
import pytest

from duet_ray.search import SimplexSpace

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
import fidelities as study

SIZES = study.made_up_sizes()
SPACE = SimplexSpace(names=("a", "b", "c", "d"), n_rows=study.N_ROWS, lower=(0,) * 4, upper=(study.N_ROWS,) * 4)


def test_past_runs_keep_their_ratio_in_every_order_of_the_domains() -> None:
    for order in (np.arange(4), np.array([2, 0, 3, 1])):
        told = study.past(SIZES, 20, 3, SPACE, order)
        assert {one.fidelity for one in told} == {study.CHEAP}
        shares = np.array([one.ratio.values[order] for one in told])
        # The made-up past runs are without noise, so that ratio and loss belong together.
        np.testing.assert_allclose(SIZES.cheap.loss(shares), [one.loss for one in told], atol=2e-3)
    assert study.past(SIZES, 20, 3, SPACE, order) == study.past(SIZES, 60, 3, SPACE, order)[:20]


def test_every_arm_spends_its_budget_on_what_it_says() -> None:
    whole = study.run(SIZES, study.Arm(name="", n_start=2), 0, [2, 4])
    assert (whole.n_whole, whole.n_cheap, len(whole.gains)) == (4, 0, 2)
    assert np.isnan(whole.past_alone)
    past = study.run(SIZES, study.Arm(name="", n_start=1, n_past=20), 0, [3])
    assert (past.n_whole, past.n_cheap) == (3, 0), "past runs are there for free, and no trial is cheap"
    assert past.past_alone > 0
    first = study.run(SIZES, study.Arm(name="", n_start=2, n_past=20, best_first=True), 0, [2, 3])
    assert first.gains[0] in (0, pytest.approx(first.past_alone, abs=1e-6)), "uniform and the best past ratio"
    for looks in ("search", "yen"):
        found = study.run(SIZES, study.Arm(name="", n_start=2, looks=looks), 0, [2.2])  # type: ignore[arg-type]
        assert found.n_cheap >= 20
        assert found.n_whole + study.CHEAP * found.n_cheap == pytest.approx(2.2, abs=0.999)
        assert found.n_whole + study.CHEAP * found.n_cheap <= 2.2 + 1e-9


def test_a_run_is_reproducible() -> None:
    arm = study.Arm(name="", n_start=1, n_past=20)
    first, again = (study.run(SIZES, arm, 1, [3]) for _ in range(2))
    assert first.gains == again.gains


def test_the_quick_form_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    study.main(["--quick", "--parts", "transfer"])
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == 1 + len(study.TRANSFER)
