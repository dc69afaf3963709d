"""Requirements: what a study file may write, and what it means, by hand."""

import pytest

from duet_ray.errors import RatioError
from duet_ray.requirements import parse_requirement

METRICS = ("safety", "loss_chat", "lm_eval_acc,none")


@pytest.mark.parametrize(
    ("text", "metric", "sense", "bound_at_base_2", "needs_base"),
    [
        ("loss_chat <= 2.5", "loss_chat", "<=", 2.5, False),
        ("loss_chat<=-2.5e-1", "loss_chat", "<=", -0.25, False),
        ("  safety >= +.5  ", "safety", ">=", 0.5, False),
        ("safety >= base", "safety", ">=", 2.0, True),
        ("safety >= base - 0.01", "safety", ">=", 1.99, True),
        ("safety>=base-0.01", "safety", ">=", 1.99, True),
        ("safety >= base + 1e-2", "safety", ">=", 2.01, True),
        ("safety >= 95 % base", "safety", ">=", 1.9, True),
        ("safety >= 95% base - 0.5", "safety", ">=", 1.4, True),
        ("loss_chat <= 110 % base", "loss_chat", "<=", 2.2, True),
        ("lm_eval_acc,none >= 0 % base", "lm_eval_acc,none", ">=", 0.0, False),
    ],
)
def test_what_may_be_written(text, metric, sense, bound_at_base_2, needs_base):
    required = parse_requirement(text, METRICS)
    assert (required.metric, required.sense, required.text) == (metric, sense, text)
    assert required.needs_base is needs_base
    assert required.bound(2.0) == pytest.approx(bound_at_base_2)
    if not needs_base:
        assert required.bound(None) == required.bound(7.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("safety", "is no requirement: write"),
        ("safety > 0.5", "is no requirement"),
        ("safety == 0.5", "is no requirement"),
        ("safety >= ", "is no requirement"),
        (">= 0.5", "is no requirement"),
        ("safety >= base - ", "is no requirement"),
        ("safety >= 0.5 base", "is no requirement"),
        ("safety >= base * 2", "is no requirement"),
        ("safety >= nan", "is no requirement"),
        ("safety >= 0.5 or loss_chat <= 2", "is no requirement"),
        ("0.5 <= safety", "there is no metric '0.5'|is no requirement"),
        ("safty >= 0.5", "there is no metric 'safty'; did you mean 'safety'"),
        ("fluency >= 0.5", "there is no metric 'fluency'; metrics here: safety, loss_chat, lm_eval_acc,none"),
        ("safety >= 1e999", "the number is not finite"),
        ("safety >= base - 1e999", "the number is not finite"),
        ("safety >= 1e999 % base", "the number is not finite"),
    ],
)
def test_what_may_not(text, said):
    with pytest.raises(RatioError, match=said):
        parse_requirement(text, METRICS)


def test_the_margin_is_positive_on_the_right_side():
    at_least, at_most = parse_requirement("safety >= base", METRICS), parse_requirement("loss_chat <= 2.5", METRICS)
    assert at_least.margin(0.9, base=0.7) == pytest.approx(0.2)
    assert at_least.margin(0.5, base=0.7) == pytest.approx(-0.2)
    assert at_most.margin(2.0, base=None) == pytest.approx(0.5)
    assert at_most.margin(3.0, base=None) == pytest.approx(-0.5)
    assert at_most.margin(2.5, base=None) == 0
