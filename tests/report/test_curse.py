"""The winner's curse: differences and intervals by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from duet_ray.records import Direction, PastRun, Ratio
from duet_ray.report.curse import curse_sentences, promises
from duet_ray.report.page import render
from duet_ray.report.plain import to_json
from duet_ray.report.status import log_line
from duet_ray.report.summary import (
    base_measurement,
    best_sample,
    best_trial,
    chosen_trial,
    finalists,
    n_spent,
    past_runs_text,
    progress_text,
    recommended_trial,
    running_best,
    state,
)
from duet_ray.report.verdict import verdict
from tests.report.stored import Written
from tests.report.summaries import gallery, study
from tests.report.test_page import read


def words(html: str) -> str:
    return " ".join(" ".join(read(html).text).split())


def test_the_recommended_trial_is_the_posteriors_best_not_the_luckiest() -> None:
    summary = replace(study([[2.5], [2.0], [2.1]]), posterior={0: (2.4, 0.1), 1: (2.2, 0.1), 2: (2.15, 0.1)})
    assert best_trial(summary).number == 1
    assert recommended_trial(summary).number == 2
    assert chosen_trial(summary).number == 2
    higher = replace(study([[2.5], [2.0], [2.1]], direction=Direction.MAXIMIZE), posterior=summary.posterior)
    assert recommended_trial(higher).number == 0


def test_a_ranking_goes_before_the_means() -> None:
    summary = replace(study([[2.5], [2.0], [2.1]]), posterior={1: (2.2, 0.1), 2: (2.15, 0.1)}, ranking=(0, 2, 1))
    assert recommended_trial(summary).number == 0


def test_without_a_posterior_the_best_observation_is_recommended() -> None:
    summary = study([[2.5], [2.0], [2.1]])
    assert recommended_trial(summary) is best_trial(summary)


def test_an_order_from_before_a_pause_does_not_hide_what_came_after() -> None:
    ordered = {"posterior": {0: (2.4, 0.1), 1: (2.2, 0.1)}, "ranking": (0, 1)}
    assert recommended_trial(replace(study([[2.5], [2.0]]), **ordered)).number == 0
    assert recommended_trial(replace(study([[2.5], [2.0], [1.0]]), **ordered)).number == 2


def test_too_good_by_and_its_interval_by_hand() -> None:
    # observed 2.2; fresh 2.4, 2.5, 2.6: mean 2.5, s = 0.1, error 0.1 / √3; t of 2 degrees at 97.5 % is 4.303
    summary = study([[2.5], [2.4], [2.2]], confirm={2: [2.4, 2.5, 2.6], 0: [2.7, 2.7, 2.8]})
    found = promises(summary)[0]
    assert found.roles == ("naive best", "recommended", "confirmed")
    assert found.too_good == pytest.approx(0.3)
    reach = 4.30265 * 0.1 / math.sqrt(3)
    assert found.interval == pytest.approx((0.3 - reach, 0.3 + reach), abs=1e-5)
    assert curse_sentences(summary)[0] == "The naive best and the recommended ratio are the same: t0002."
    assert "too good by 0.300" in curse_sentences(summary)[1]


def test_luck_has_the_same_sign_where_higher_is_better() -> None:
    summary = study([[0.5], [0.9]], direction=Direction.MAXIMIZE, confirm={1: [0.6, 0.7, 0.8], 0: [0.5, 0.5, 0.6]})
    assert promises(summary)[0].too_good == pytest.approx(0.2)


def test_one_repeat_gives_a_difference_and_no_interval() -> None:
    summary = study([[2.5], [2.2]], confirm={1: [2.4], 0: [2.5]})
    assert promises(summary)[0].too_good == pytest.approx(0.2)
    assert promises(summary)[0].interval is None
    assert "too few repeats" in curse_sentences(summary)[1]


def test_naive_recommended_and_confirmed_side_by_side() -> None:
    summary = study(
        [[2.5], [2.0], [2.1], [2.3]], confirm={1: [2.4, 2.5], 2: [2.3, 2.32], 3: [2.2, 2.21], 0: [2.6, 2.6]}
    )
    summary = replace(summary, posterior={0: (2.5, 0.1), 1: (2.3, 0.1), 2: (2.2, 0.1), 3: (2.25, 0.1)})
    assert [(p.trial.number, p.roles) for p in promises(summary)] == [
        (1, ("naive best",)),
        (2, ("recommended",)),
        (3, ("confirmed",)),
    ]
    text = words(render(summary, []))
    assert "t0001 naive best 2.000 2.300 ± 0.100" in text
    assert "recommends t0002" in text
    told = to_json(summary)
    assert (told["naive_best"], told["recommended"], told["best"]["name"]) == ("t0001", "t0002", "t0003")
    assert told["promises"][0]["too_good_by"] == pytest.approx(0.45)


def test_nothing_to_compare_is_nothing_to_say() -> None:
    assert curse_sentences(study([[2.5], [2.4]])) == []
    assert curse_sentences(study([])) == []
    assert "What was promised" not in render(gallery()["unfinished"], [])


# A ratio from anywhere, and the base measured again -----------------------------------------------------------------


def test_a_ratio_that_was_only_confirmed_may_be_the_one_to_take(tmp_path: Path) -> None:
    written = Written(tmp_path).base(3.0).trial(0, [2.5, 2.6]).trial(1, [2.0, 2.1])
    written.confirm(1, [2.2, 2.25]).confirm(0, [2.5, 2.55]).anywhere(Ratio(counts=(20, 2, 2)), [1.9, 1.8])
    summary = written.summary
    chosen = chosen_trial(summary)
    assert (chosen.name, best_sample(chosen).value) == ("c900000", 1.8)
    assert best_sample(replace(chosen, observation=None), Direction.MINIMIZE).value == 1.8
    assert best_sample(replace(chosen, observation=None)) is None
    assert [t.name for t, _ in finalists(summary)] == ["t0001", "c900000"]
    assert promises(summary)[-1].observed is None
    said = verdict(summary)
    assert said.confirmed
    assert any("is no trial of the search" in sentence for sentence in said.sentences)
    text = words(render(summary, []))
    assert "The best ratio: c900000" in text
    assert "No trial of the search had this ratio" in text
    assert "the model's best of all ratios: heldout_loss loss mean 1.850 ± 0.050" in log_line(summary, chosen)


def test_confirmations_are_compared_with_the_base_measured_as_they_were(tmp_path: Path) -> None:
    written = Written(tmp_path).base(3.0).trial(0, [2.5, 2.6]).trial(1, [2.0, 2.1])
    assert verdict(written.summary).versus_base.other.mean == 3.0
    summary = written.confirm(1, [2.2, 2.25]).confirm(0, [2.5, 2.55]).base(3.4, again=True).summary
    assert base_measurement(summary).mean == 3.4
    assert base_measurement(summary, as_trials=True).mean == 3.0
    assert verdict(summary).versus_base.other.mean == 3.4
    assert list(to_json(summary)["confirmed"]) == ["t0000", "t0001"], "the base is no finalist"


# Cheap trials and past runs -----------------------------------------------------------------------------------------


def test_cheap_trials_are_no_rivals_of_whole_ones(tmp_path: Path) -> None:
    written = Written(tmp_path, search__fidelity={"rows": [0.25]}, search__n_start=2, search__n_trials=1)
    written.base(3.0).trial(0, [2.5, 2.6]).trial(1, [1.0, 1.1], fidelity=0.25).trial(2, [2.4, 2.6])
    summary = written.summary
    assert best_trial(summary).number == 2
    assert [b.number for _, b in running_best(summary)] == [0, 0, 2]
    assert n_spent(summary) == 2.25
    assert progress_text(summary) == "2.25 of 3 whole trials (3 trials)"
    assert state(summary) == "running"
    for number in (3, 4, 5):
        written.trial(number, [2.7, 2.8], fidelity=0.25)
    assert state(written.summary) == "finished"


def test_past_runs_are_counted_and_named(tmp_path: Path) -> None:
    runs = [PastRun(counts=(24, 0, 0), value=v, source=f"runs.csv:{i}") for i, v in enumerate((1.0, 2.0))]
    written = Written(tmp_path).past(*runs)
    assert past_runs_text(written.summary) == "2 past runs from runs.csv were told"
    written.past(PastRun(counts=(0, 24, 0), value=1.0, source="more.csv:2"))
    assert past_runs_text(written.summary) == "3 past runs from runs.csv and more.csv were told"
    assert to_json(written.summary)["n_past_runs"] == 3
    assert past_runs_text(study([])) == ""


def test_where_settings_are_searched_trial_0_is_named_for_them(tmp_path: Path) -> None:
    also = {"training.rank": {"choices": [4, 8]}}
    for optimize, named in (
        ("both", "the uniform ratio with the study's own settings"),
        ("model", "the study's own settings"),
    ):
        written = Written(tmp_path / optimize, search__also=also, search__optimize=optimize, sampling__k=1).base(3.0)
        written.trial(0, [2.5], settings=(("training.rank", 4),), ratio=Ratio(counts=(8, 8, 8)))
        written.trial(1, [2.0], settings=(("training.rank", 8),), ratio=Ratio(counts=(8, 8, 8)))
        said = verdict(written.summary)
        assert said.versus_uniform.outcome == "ahead", "the same ratio is not the same point"
        assert named in said.headline
