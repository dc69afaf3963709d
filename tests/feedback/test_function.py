"""The user's function: what may come back from it, and what is refused by name."""

import sys

import pytest

from duet_ray.errors import FeedbackError
from duet_ray.feedback import make_feedback
from duet_ray.records import Feedback
from tests.feedback.studies import study

CODE = """
from duet_ray.records import Feedback
import numpy, torch

def number(model, tokenizer): return 3
def pair(model, tokenizer): return 0.5, 0.1
def pair_alone(model, tokenizer): return 0.5, None
def feedback(model, tokenizer): return Feedback(value=1.5, stderr=0.2, metrics={"n": 4.0})
def tensor(model, tokenizer): return torch.tensor([0.25])
def array(model, tokenizer): return numpy.float32(0.25)
def seeded(model, tokenizer, seed): return seed
def anything(model, tokenizer, **options): return options["seed"] + options["more"]
def scaled(model, tokenizer, factor): return 2 * factor
def sees(model, tokenizer): return float(model == "model" and tokenizer == "tokenizer")
def lazy(model, tokenizer):
    import toy_neighbour
    return toy_neighbour.VALUE

def nan(model, tokenizer): return float("nan")
def infinite(model, tokenizer): return Feedback(value=float("inf"))
def nan_error(model, tokenizer): return 1.0, float("nan")
def text(model, tokenizer): return "0.5"
def boolean(model, tokenizer): return True
def nothing(model, tokenizer): return None
def triple(model, tokenizer): return 1, 2, 3
def vector(model, tokenizer): return torch.zeros(2)
def fails(model, tokenizer): raise KeyError("no such rating")
not_callable = 7
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("function")
    (folder / "toy_scorer.py").write_text(CODE, encoding="utf-8")
    (folder / "toy_broken.py").write_text("import no_such_module_at_all", encoding="utf-8")
    (folder / "toy_neighbour.py").write_text("VALUE = 9", encoding="utf-8")
    return folder


def function(folder, name, module="toy_scorer", **arguments):
    section = {"kind": "function", "function": f"{module}:{name}", "arguments": arguments, "direction": "maximize"}
    return make_feedback(study(folder, section))


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("number", {}, Feedback(value=3.0)),
        ("pair", {}, Feedback(value=0.5, stderr=0.1)),
        ("pair_alone", {}, Feedback(value=0.5)),
        ("feedback", {}, Feedback(value=1.5, stderr=0.2, metrics={"n": 4.0})),
        ("tensor", {}, Feedback(value=0.25)),
        ("array", {}, Feedback(value=0.25)),
        ("seeded", {}, Feedback(value=11.0)),
        ("anything", {"more": 2}, Feedback(value=13.0)),
        ("scaled", {"factor": 4}, Feedback(value=8.0)),
        ("sees", {}, Feedback(value=1.0)),
        ("lazy", {}, Feedback(value=9.0)),
    ],
)
def test_what_may_come_back(folder, name, arguments, expected):
    source = function(folder, name, **arguments)
    assert source.check() == []
    measured = source.measure("model", "tokenizer", seed=11)
    assert measured == expected
    assert type(measured.value) is float


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "the value must be finite, got nan"),
        ("infinite", "the value must be finite, got inf"),
        ("nan_error", "the standard error must be finite and >= 0, got nan"),
        ("text", "must return a number, .* got str: '0.5'"),
        ("boolean", "must return a number, .* got bool: True"),
        ("nothing", "must return a number, .* got NoneType: None"),
        ("triple", r"a tuple must be \(value, standard error\), got \(1, 2, 3\)"),
        ("vector", "must return a number, .* got Tensor: tensor"),
        ("fails", "failed with KeyError: 'no such rating'"),
    ],
)
def test_what_is_refused(folder, name, message):
    with pytest.raises(FeedbackError, match=f"feedback.function 'toy_scorer:{name}'.*{message}"):
        function(folder, name).measure("model", "tokenizer", seed=0)


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("toy_scorer", "nmber", "has no 'nmber'"),
        ("toy_scorer", "not_callable", "must be callable, got int"),
        (
            "toy_nowhere",
            "number",
            "'toy_nowhere' cannot be imported from the environment or from .*ModuleNotFoundError",
        ),
        ("toy_broken", "number", "'toy_broken' cannot be imported .*no_such_module_at_all"),
    ],
)
def test_check_names_what_cannot_be_loaded(folder, module, name, message):
    with pytest.raises(FeedbackError, match=message):
        function(folder, name, module=module).check()


def test_check_compares_the_arguments(folder):
    with pytest.raises(FeedbackError, match=r"cannot be called with \(model, tokenizer\): missing .*'factor'"):
        function(folder, "scaled").check()
    with pytest.raises(FeedbackError, match=r"unexpected keyword argument 'factr'; see feedback.arguments"):
        function(folder, "number", factr=2).check()


def test_the_path_is_left_as_it_was(folder):
    before = list(sys.path)
    function(folder, "number").measure(None, None, seed=0)
    assert sys.path == before


def test_a_function_of_the_environment(tmp_path):
    source = function(tmp_path, "make_feedback", module="duet_ray.feedback")
    assert source.check() == []
    with pytest.raises(FeedbackError, match="AttributeError"):
        source.measure("no study", None, seed=0)
