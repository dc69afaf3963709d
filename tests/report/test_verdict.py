"""The verdict: outcomes against hand arithmetic, and the words a reader gets."""

import pytest

from duet_ray.records import Direction
from duet_ray.report.summary import Measurement
from duet_ray.report.verdict import compare, verdict
from tests.report.summaries import gallery, study


def said(summary) -> str:
    result = verdict(summary)
    return " ".join([result.headline, *result.sentences, result.advice])


def test_beats_both_with_the_numbers_by_hand() -> None:
    # best: 2.25, 2.27 -> mean 2.26, s = 0.02 / sqrt(2), error 0.01
    # uniform: 2.50, 2.54 -> mean 2.52, error 0.02; difference -0.26, its error sqrt(0.01² + 0.02²) = 0.0224
    result = verdict(gallery()["confirmed"])
    assert result.headline == "The best ratio beats both the untouched model and the uniform ratio."
    assert result.tone == "good"
    assert result.confirmed
    assert result.best.number == 2
    uniform, base = result.versus_uniform, result.versus_base
    assert uniform.difference == pytest.approx(-0.26)
    assert uniform.standard_error == pytest.approx(0.0005**0.5)
    assert base.difference == pytest.approx(2.26 - 3.0)
    assert base.standard_error == pytest.approx(0.01)
    text = " ".join(result.sentences)
    assert (
        "Against the uniform ratio: heldout_loss 2.260 ± 0.010 (2 fresh repeats) against 2.520 ± 0.020 (2 fresh "
        "repeats); 0.260 lower (lower is better), more than twice the standard error of that difference, 0.022."
    ) in text
    assert "Against the untouched model: heldout_loss 2.260 ± 0.010 (2 fresh repeats) against 3.000;" in text
    # observed 2.2 as the best of 2, measured again 2.26
    assert "t0002 was observed at 2.200 (the best of its 2 samples); measured again it has 2.260, 0.060 worse." in text
    assert "With 2 repeats a side the standard error is itself rough" in text


@pytest.mark.parametrize(
    ("best", "other", "outcome"),
    [
        # errors 0.1 and 0: twice the error of the difference is 0.2
        ((1.9, 2.1), (2.21, 2.21), "beats"),
        ((1.9, 2.1), (2.19, 2.19), "unclear"),
        ((1.9, 2.1), (1.81, 1.81), "unclear"),
        ((1.9, 2.1), (1.79, 1.79), "loses"),
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
    assert result.versus_base.standard_error is None
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
    summary = study([[2.5], [2.4]], confirm={1: [2.4, 2.6], 0: [2.45, 2.57]})
    result = verdict(summary)
    assert result.headline == (
        "The best ratio beats the untouched model, but cannot be told apart from the uniform ratio."
    )
    assert result.tone == "mixed"
    assert "it may be chance" in said(summary)
    assert "The uniform ratio is the simpler choice" in result.advice


def test_fine_tuning_that_hurts_is_said_plainly() -> None:
    summary = study([[2.5], [2.4]], base=2.0, confirm={1: [2.40, 2.42], 0: [2.50, 2.52]})
    result = verdict(summary)
    assert result.headline == "The best ratio is worse than the untouched model, but beats the uniform ratio."
    assert result.tone == "bad"
    assert result.advice.startswith("Fine-tuning hurts here: keep the untouched model")


def test_worse_than_uniform_when_measured_again() -> None:
    result = verdict(study([[2.5], [2.4]], confirm={1: [2.60, 2.62], 0: [2.50, 2.52]}))
    assert result.versus_uniform.outcome == "loses"
    assert result.advice.startswith("Use the uniform ratio")


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
    assert result.headline == "The uniform ratio is the best found; it beats the untouched model."
    assert result.versus_uniform.outcome == "same"
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


def test_the_chosen_finalist_is_explained() -> None:
    summary = study([[2.5], [2.0], [2.1]], confirm={1: [2.4, 2.42], 2: [2.2, 2.22], 0: [2.5, 2.52]})
    assert "t0001 had the best observation, but measured again t0002 has the better mean of the 2 finalists." in said(
        summary
    )


@pytest.mark.parametrize("name", list(gallery()))
def test_every_shape_has_a_verdict_without_broken_words(name: str) -> None:
    result = verdict(gallery()[name])
    text = " ".join([result.headline, *result.sentences, result.advice])
    assert result.headline.endswith(".")
    for broken in ("nan", "None", "  ", "1 trials", "1 samples", " .", ".."):
        assert broken not in text, text
