"""The verdict: outcomes against hand arithmetic, and the words a reader gets."""

from dataclasses import replace

import pytest

from duet_ray.records import BASE_TRIAL, Direction
from duet_ray.report.summary import Measurement
from duet_ray.report.verdict import compare, verdict
from tests.report.summaries import gallery, study, trial


def said(summary) -> str:
    result = verdict(summary)
    return " ".join([result.headline, *result.sentences, result.advice])


def test_beats_both_with_the_numbers_by_hand() -> None:
    # best: 2.25, 2.27 -> mean 2.26, s = 0.02 / sqrt(2), error 0.01
    # uniform: 2.50, 2.54 -> mean 2.52, error 0.02; difference -0.26, its error sqrt(0.01² + 0.02²) = 0.0224
    # degrees of freedom 0.0005² / (0.0001² + 0.0004²) = 1.47; the base adds no error: 1, where t is 12.706
    result = verdict(gallery()["confirmed"])
    assert result.headline == "The best ratio beats both the untouched model and the uniform ratio."
    assert result.tone == "good"
    assert result.confirmed
    assert result.best.number == 2
    uniform, base = result.versus_uniform, result.versus_base
    assert uniform.difference == pytest.approx(-0.26)
    assert uniform.test.standard_error == pytest.approx(0.0005**0.5)
    assert uniform.test.degrees_of_freedom == pytest.approx(25 / 17)
    assert base.difference == pytest.approx(2.26 - 3.0)
    assert base.test.interval == pytest.approx((-0.74 - 0.12706, -0.74 + 0.12706), abs=1e-5)
    text = " ".join(result.sentences)
    assert (
        "Against the uniform ratio: heldout_loss 2.260 ± 0.010 (2 fresh repeats) against 2.520 ± 0.020 (2 fresh "
        "repeats); 0.260 lower (lower is better), 95 % interval 0.122 to 0.398."
    ) in text
    assert (
        "Against the untouched model: heldout_loss 2.260 ± 0.010 (2 fresh repeats) against 3.000; 0.740 lower (lower "
        "is better), 95 % interval 0.613 to 0.867."
    ) in text
    # observed 2.2 as the best of 2, measured again 2.26
    assert "t0002 was observed at 2.200 (the best of its 2 samples); measured again it has 2.260, 0.060 worse." in text
    assert "confirm.repeats" not in text
    assert "picked from" not in text


@pytest.mark.parametrize(
    ("best", "other", "outcome"),
    [
        # errors 0.1 and 0, one degree of freedom: the interval reaches 1.2706 each way
        ((1.9, 2.1), (3.28, 3.28), "beats"),
        ((1.9, 2.1), (3.26, 3.26), "unclear"),
        ((1.9, 2.1), (0.74, 0.74), "unclear"),
        ((1.9, 2.1), (0.72, 0.72), "loses"),
        # the same error twice, two degrees of freedom: 4.3027 · sqrt(0.02) = 0.6085
        ((1.9, 2.1), (2.51, 2.71), "beats"),
        ((1.9, 2.1), (2.50, 2.70), "unclear"),
        ((2.0,), (2.5, 2.6), "ahead"),
        ((2.0, 2.1), (1.5,), "behind"),
        ((2.0, 2.0), (2.5, 2.5), "ahead"),
        ((2.0, 2.0), (2.0, 2.0), "equal"),
    ],
)
def test_outcomes_at_the_threshold(best: tuple[float, ...], other: tuple[float, ...], outcome: str) -> None:
    a, b = Measurement(values=best), Measurement(values=other)
    assert compare(a, b, Direction.MINIMIZE, against="uniform", basis="confirm").outcome == outcome
    swapped = {"beats": "loses", "loses": "beats", "ahead": "behind", "behind": "ahead"}.get(outcome, outcome)
    assert compare(a, b, Direction.MAXIMIZE, against="uniform", basis="confirm").outcome == swapped


def test_observations_are_never_more_than_an_indication() -> None:
    summary = study([[2.5, 2.6], [2.0, 2.1]])
    result = verdict(summary)
    assert (result.versus_base.outcome, result.versus_uniform.outcome) == ("ahead", "ahead")
    assert result.versus_base.test is None
    assert (
        result.headline
        == "The best ratio looks better than both the untouched model and the uniform ratio (not confirmed)."
    )
    assert result.tone == "open"
    assert "t0001 is the best of 2 trials, and the best of many noisy numbers is too good" in said(summary)
    assert "going by the search's own observations" in said(summary)


def test_one_repeat_is_an_indication() -> None:
    summary = gallery()["one repeat"]
    assert "from one repeat: treat as an indication" in said(summary)
    assert verdict(summary).headline.startswith("The best ratio looks better than")


def test_repeats_without_any_spread_prove_nothing() -> None:
    summary = study([[2.5], [2.4]], confirm={1: [2.4, 2.4], 0: [2.5, 2.5]})
    assert verdict(summary).versus_uniform.outcome == "ahead"
    assert "their spread says nothing" in said(summary)


def test_better_than_base_but_not_than_uniform() -> None:
    # difference -0.01; errors 0.01 and 0.06: 0.0608 at 1.056 degrees of freedom, where t is 11.23
    summary = study([[2.5], [2.4]], confirm={1: [2.49, 2.51], 0: [2.45, 2.57]})
    result = verdict(summary)
    assert result.headline == (
        "The best ratio beats the untouched model, but cannot be told apart from the uniform ratio."
    )
    assert result.tone == "mixed"
    low, high = result.versus_uniform.test.interval
    assert (low, high) == pytest.approx((-0.01 - 0.6831, -0.01 + 0.6831), abs=1e-3)
    assert (
        f"0.0100 lower (lower is better), 95 % interval {-low:.4f} lower to {high:.4f} higher: it includes 0, so this "
        "may be chance."
    ) in said(summary)
    assert (
        "With 2 repeats a side an interval is wide, 11.2 standard errors each way (2.0 with many): more of them "
        in (said(summary))
    )
    assert "(confirm.repeats) would narrow it." in said(summary)
    assert result.advice.startswith("Take the best ratio, but do not count on a gain over the uniform one")


def test_fine_tuning_that_hurts_is_said_plainly() -> None:
    summary = study([[2.5], [2.4]], base=2.0, confirm={1: [2.40, 2.42], 0: [2.50, 2.52]})
    result = verdict(summary)
    assert result.headline == "The best ratio is worse than the untouched model, but beats the uniform ratio."
    assert result.tone == "bad"
    assert result.advice.startswith("Fine-tuning hurts here: keep the untouched model")


def test_many_repeats_need_no_word_on_few() -> None:
    fresh = [2.5 + 0.01 * (i % 5) for i in range(10)]
    text = said(study([[2.5], [2.4]], confirm={1: fresh, 0: [v + 0.001 for v in fresh]}))
    assert "More repeats (confirm.repeats) would narrow the interval." in text
    assert "an interval is wide" not in text


def test_uniform_is_the_one_to_take_where_it_wins_when_measured_again() -> None:
    summary = gallery()["uniform wins"]
    result = verdict(summary)
    assert result.headline == (
        "No mixture found beats the uniform ratio: take the uniform one; it beats the untouched model."
    )
    assert result.best.number == 0
    assert result.confirmed
    assert result.tone == "mixed"
    assert result.versus_uniform.outcome == "same"
    # against the better one of the two finalists: error sqrt(2) · 0.01, two degrees of freedom, t = 4.3027
    assert result.versus_finalist.outcome == "beats"
    assert (
        "Against the best finalist, t0001: heldout_loss 2.510 ± 0.010 (2 fresh repeats) against 2.610 ± 0.010 (2 fresh "
        "repeats); 0.100 lower (lower is better), 95 % interval 0.039 to 0.161."
    ) in said(summary)
    assert "t0001 had the best observation, but measured again the uniform ratio, t0000, has the better mean." in (
        said(summary)
    )
    assert "t0000 was picked from 3 ratios on the same fresh values that stand here" in said(summary)
    assert result.advice.startswith("Use the uniform ratio: the search found nothing better.")


def test_uniform_among_the_finalists_is_compared_with_the_best_of_the_others() -> None:
    summary = study([[2.0], [2.1], [2.2]], confirm={0: [2.0, 2.02], 1: [2.1, 2.12], 2: [2.05, 2.07]})
    result = verdict(summary)
    assert result.best.number == 0
    assert result.versus_finalist.difference == pytest.approx(-0.05)
    assert "Against the best finalist, t0002" in said(summary)
    assert "picked from 3 ratios" in said(summary)


def test_uniform_that_wins_but_does_not_beat_the_untouched_model_is_not_recommended() -> None:
    worse = verdict(study([[2.5], [2.4]], base=2.0, confirm={1: [2.60, 2.62], 0: [2.50, 2.52]}))
    assert worse.headline == (
        "No mixture found beats the uniform ratio, and that one is worse than the untouched model."
    )
    assert worse.tone == "bad"
    assert worse.advice.startswith("Fine-tuning hurts here")
    unclear = verdict(study([[2.5], [2.4]], base=2.55, confirm={1: [2.60, 2.62], 0: [2.50, 2.52]}))
    assert unclear.headline.endswith("and that one cannot be told apart from the untouched model.")
    assert unclear.tone == "mixed"
    alone = verdict(study([[2.5], [2.4]], base=None, confirm={1: [2.60, 2.62], 0: [2.50, 2.52]}))
    assert alone.headline == "No mixture found beats the uniform ratio: take the uniform one."


def test_a_uniform_trial_that_failed_is_recommended_but_not_handed_over() -> None:
    result = verdict(study([[None], [2.4]], confirm={1: [2.60, 2.62], 0: [2.50, 2.52]}))
    assert result.best.number == 1
    assert result.versus_uniform.outcome == "loses"
    assert "no model of it to hand over" in result.advice


def test_a_random_feedback_never_beats_an_untouched_model_measured_once() -> None:
    summary = gallery()["random feedback"]
    result = verdict(summary)
    assert result.headline == ("The best ratio looks better than the untouched model, and beats the uniform ratio.")
    assert (result.versus_base.outcome, result.versus_base.test) == ("ahead", None)
    assert result.tone == "open"
    assert (
        "against 3.000; 0.590 lower (lower is better), looks better (the untouched model was measured once, by a "
        "feedback that varies)."
    ) in said(summary)
    assert result.advice.startswith("Use the best ratio")
    assert "Whether fine-tuning helps at all stays an indication" in result.advice


def test_a_random_feedback_looks_worse_and_not_more() -> None:
    summary = study([[2.5], [2.4]], base=2.0, confirm={1: [2.40, 2.42], 0: [2.50, 2.52]}, feedback_is_random=True)
    assert verdict(summary).versus_base.outcome == "behind"
    assert "looks worse (the untouched model was measured once" in said(summary)
    assert verdict(summary).advice.startswith("Fine-tuning seems to hurt here")


def test_a_random_feedback_can_beat_an_untouched_model_measured_often() -> None:
    summary = gallery()["random feedback"]
    more = trial(BASE_TRIAL, [3.0, 3.02, 2.98], kind="base", method="base")
    summary = replace(summary, trials=(more, *summary.trials[1:]))
    assert verdict(summary).versus_base.outcome == "beats"
    assert "against 3.000 ± 0.012 (3 measurements); 0.590 lower" in said(summary)


def test_maximised_feedback_reads_the_other_way_round() -> None:
    summary = study([[0.3], [0.5]], base=0.2, direction=Direction.MAXIMIZE, confirm={1: [0.44, 0.46], 0: [0.30, 0.32]})
    result = verdict(summary)
    assert result.headline == "The best ratio beats both the untouched model and the uniform ratio."
    assert "0.140 higher (higher is better)" in said(summary)
    assert "observed at 0.500 (one sample); measured again it has 0.450, 0.050 worse" in said(summary)


def test_no_winners_curse_where_the_fresh_mean_is_better() -> None:
    assert "was not too good here" in said(study([[2.5], [2.4]], confirm={1: [2.3, 2.32], 0: [2.5, 2.52]}))


def test_uniform_as_the_best_ratio_is_not_compared_with_itself() -> None:
    summary = study([[2.0], [2.4]], confirm={0: [2.0, 2.02]})
    result = verdict(summary)
    assert result.headline == (
        "No mixture found beats the uniform ratio: take the uniform one; it beats the untouched model."
    )
    assert result.versus_uniform.outcome == "same"
    assert result.versus_finalist is None
    assert "picked from" not in said(summary)
    unconfirmed = verdict(study([[2.0], [2.4]]))
    assert unconfirmed.headline == (
        "The uniform ratio is the best found; it looks better than the untouched model (not confirmed)."
    )
    assert not any(s.startswith("Against the uniform") for s in result.sentences)


def test_one_domain_has_no_ratio_to_choose() -> None:
    result = verdict(gallery()["one domain, confirmed"])
    assert result.headline == "The only ratio there is beats the untouched model."
    assert "With one domain there is no ratio to choose" in result.advice


def test_without_a_fresh_uniform_the_observations_are_compared() -> None:
    """Never a mean over fresh seeds against a best of k: that would favour the best of k."""
    result = verdict(study([[2.5, 2.6], [2.4, 2.45]], confirm={1: [2.7, 2.8]}))
    assert result.versus_base.basis == "confirm"
    assert result.versus_uniform.basis == "observation"
    assert result.versus_uniform.difference == pytest.approx(2.4 - 2.5)


def test_without_base_and_with_a_failed_uniform_there_is_nothing_to_compare() -> None:
    result = verdict(study([[None], [2.4]], base=None, n_planned=5))
    assert result.headline == "The best ratio so far is t0001; there is nothing to compare it with yet."
    assert result.versus_base is None
    assert result.versus_uniform is None


def test_unfinished_failed_and_partly_failed() -> None:
    text = said(gallery()["unfinished"])
    assert "The study is not finished: 3 of 9 trials have ended." in text
    assert "1 trial failed and has no value. Most frequent reason (3 ×): loss is not finite." in text
    assert "t0001 has only 1 of 2 samples" in text
    assert "(not confirmed yet)" in text


def test_all_failed_puts_the_reason_first() -> None:
    result = verdict(gallery()["all failed"])
    assert result.headline == "No ratio has a value: every one of the 2 trials failed."
    assert result.sentences[0] == "4 ×: loss is not finite"
    assert result.tone == "bad"
    partly = verdict(gallery()["all failed, no base"])
    assert partly.headline == "No ratio has a value: the only trial that ended so far failed (of 5 planned)."


def test_base_only_and_empty() -> None:
    assert verdict(gallery()["base only"]).headline == (
        "Only the untouched model has been measured so far: heldout_loss 3.000 (lower is better)."
    )
    assert verdict(gallery()["empty"]).headline == "Nothing has been measured yet."


def test_a_best_observation_without_fresh_values_is_explained() -> None:
    summary = study([[2.5], [2.0], [2.1]], confirm={1: [None, None], 2: [2.2, 2.22], 0: [2.5, 2.52]})
    assert "t0001 had the best observation, but none of its fresh repeats has a value." in said(summary)


def test_the_chosen_finalist_is_explained() -> None:
    summary = study([[2.5], [2.0], [2.1]], confirm={1: [2.4, 2.42], 2: [2.2, 2.22], 0: [2.5, 2.52]})
    assert "t0001 had the best observation, but measured again t0002 has the better mean of the 2 finalists." in said(
        summary
    )
    assert (
        "t0002 was picked from 2 ratios on the same fresh values that stand here, so they still flatter it a little."
    ) in said(summary)


@pytest.mark.parametrize("name", list(gallery()))
def test_every_shape_has_a_verdict_without_broken_words(name: str) -> None:
    result = verdict(gallery()[name])
    text = " ".join([result.headline, *result.sentences, result.advice])
    assert result.headline.endswith(".")
    for broken in ("nan", "None", "  ", "1 trials", "1 samples", " .", ".."):
        assert broken not in text, text
