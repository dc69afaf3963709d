"""lm-eval on a local task, offline: its numbers against `heldout_loss`, and every mistake before a model is loaded."""

import random
import socket

import numpy as np
import pytest
import torch

from duet_ray.errors import FeedbackError
from duet_ray.feedback import make_feedback
from duet_ray.feedback.lm_eval import LmEval
from tests.feedback.studies import ITEMS, study, write_jsonl, write_task
from tests.tiny_model import tiny_llama, tiny_tokenizer

GENERATE_YAML = """\
task: toy_generate
dataset_path: json
dataset_kwargs:
  data_files:
    test: toy_task.jsonl
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
num_fewshot: 0
metric_list:
  - metric: exact_match
"""


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a network attempt: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def lm_eval(folder, tasks=None, **section) -> LmEval:
    settings = {"direction": "maximize", "tasks_folder": "tasks", **section}
    return make_feedback(study(folder, {"kind": "lm_eval", "tasks": tasks or {"toy_task": 1.0}, **settings}))


class TestMeasure:
    def test_agrees_with_heldout_loss(self, tmp_path, tokenizer):
        """lm-eval's acc_norm and our accuracy are the same number by two implementations."""
        write_task(tmp_path / "tasks")
        write_jsonl(tmp_path / "task.jsonl", ITEMS)
        section = {"kind": "heldout_loss", "file": "task.jsonl", "format": "multiple_choice", "metric": "accuracy"}
        ours = make_feedback(study(tmp_path, {**section, "direction": "maximize"}))
        theirs = lm_eval(tmp_path, metric="acc_norm,none")
        values = set()
        for seed in range(4):
            model = tiny_llama(seed=seed)
            measured = theirs.measure(model, tokenizer, seed=0)
            expected = ours.measure(model, tokenizer, seed=0)
            assert measured.value == expected.value
            assert measured.stderr == pytest.approx(expected.stderr)
            assert "acc,none" in measured.metrics
            values.add(measured.value)
        assert len(values) > 1, "models of different seeds must differ, or the test shows nothing"

    def test_several_tasks_are_weighted(self, tmp_path, model, tokenizer):
        write_task(tmp_path / "tasks", "one", ITEMS)
        write_task(tmp_path / "tasks", "two", [*ITEMS[::-1], *ITEMS[1:3]])
        one = lm_eval(tmp_path, {"one": 1}).measure(model, tokenizer, seed=0)
        two = lm_eval(tmp_path, {"two": 1}).measure(model, tokenizer, seed=0)
        both = lm_eval(tmp_path, {"one": 1, "two": 3}).measure(model, tokenizer, seed=0)
        assert both.value == pytest.approx((one.value + 3 * two.value) / 4)
        assert both.stderr == pytest.approx(np.hypot(one.stderr, 3 * two.stderr) / 4)
        assert both.metrics["two: acc,none"] == two.value

    def test_every_task_has_its_own_metric_if_it_is_given_one(self, tmp_path, model, tokenizer):
        items = [*ITEMS, {"question": "it", "choices": ["a much longer right answer than that", "b"], "answer": 0}] * 2
        write_task(tmp_path / "tasks", "one", items)
        write_task(tmp_path / "tasks", "two", items[1:])
        tasks = {"one": 1, "two": 1}
        metrics = {"one": "acc,none", "two": "acc_norm,none"}
        mixed = lm_eval(tmp_path, tasks, metric=metrics).measure(model, tokenizer, seed=0)
        values = [lm_eval(tmp_path, {n: 1}, metric=m).measure(model, tokenizer, seed=0) for n, m in metrics.items()]
        assert mixed.value == pytest.approx((values[0].value + values[1].value) / 2)
        assert mixed.stderr == pytest.approx(np.hypot(values[0].stderr, values[1].stderr) / 2)
        swapped = lm_eval(tmp_path, tasks, metric={"one": "acc_norm,none", "two": "acc,none"})
        assert swapped.measure(model, tokenizer, seed=0).value != mixed.value, "or the test shows nothing"

    def test_some_items_of_a_task(self, tmp_path, model, tokenizer):
        write_task(tmp_path / "tasks", "whole", ITEMS)
        write_task(tmp_path / "tasks", "half", ITEMS[1::2])
        some = lm_eval(tmp_path, {"whole": 1}, rows={"whole": "1::2"})
        assert some.check() == []
        assert list(some.task_texts()) == ["two and two", "ice is"]
        half = lm_eval(tmp_path, {"half": 1}).measure(model, tokenizer, seed=0)
        assert some.measure(model, tokenizer, seed=0) == half
        with pytest.raises(FeedbackError, match=r"feedback.rows: whole has 4 items, and 9: leaves none of them"):
            lm_eval(tmp_path, {"whole": 1}, rows={"whole": "9:"}).check()

    def test_limit_and_texts(self, tmp_path, model, tokenizer):
        write_task(tmp_path / "tasks")
        source = lm_eval(tmp_path, limit=2)
        assert list(source.task_texts()) == ["sky", "two and two"]
        assert source.measure(model, tokenizer, seed=0).value in (0, 0.5, 1)

    def test_global_generators_are_left_alone(self, tmp_path, model, tokenizer):
        write_task(tmp_path / "tasks")
        (tmp_path / "tasks" / "generate.yaml").write_text(GENERATE_YAML)
        source = lm_eval(tmp_path, {"toy_generate": 1}, metric="exact_match,none", temperature=0.9)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        source.check()
        source.measure(model, tokenizer, seed=5)
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        assert before[:2] == after[:2]
        assert torch.equal(before[2], after[2])

    def test_the_seed_drives_sampling(self, tmp_path, tokenizer, monkeypatch):
        """What the model writes at a temperature is the same for a seed and differs between seeds."""
        write_task(tmp_path / "tasks")
        (tmp_path / "tasks" / "generate.yaml").write_text(GENERATE_YAML)
        source = lm_eval(tmp_path, {"toy_generate": 1}, metric="exact_match,none", temperature=1.0)
        model = tiny_llama(seed=3)
        written: list[list[int]] = []
        generate = model.generate

        def recording(*args, **kwargs):
            output = generate(*args, **kwargs)
            written.append(output.tolist())
            return output

        monkeypatch.setattr(model, "generate", recording)
        outputs = []
        for seed in (1, 1, 2):
            written.clear()
            source.measure(model, tokenizer, seed=seed)
            outputs.append([list(row) for row in written])
        assert outputs[0] == outputs[1]
        assert outputs[0] != outputs[2]

    def test_few_shot_examples_follow_n_shot_and_the_seed(self, tmp_path, model, tokenizer):
        write_task(
            tmp_path / "tasks",
            items=[{**item, "question": f"{n} {item['question']}"} for n, item in enumerate(ITEMS * 3)],
        )
        source = lm_eval(tmp_path, n_shot=2)
        prompts = []
        for seed in (1, 1, 2):
            source.measure(model, tokenizer, seed=seed)
            instances = source._tasks()["tasks"]["toy_task"].instances
            prompts.append([instance.arguments[0] for instance in instances])
        assert all(prompt.count("\n\n") == 2 for prompt in prompts[0])
        assert prompts[0] == prompts[1]
        assert prompts[0] != prompts[2]


class TestCheck:
    def test_a_sound_task_has_no_notes(self, tmp_path):
        write_task(tmp_path / "tasks")
        assert lm_eval(tmp_path).check() == []

    def test_settings_that_a_task_overrules(self, tmp_path):
        write_task(tmp_path / "tasks")
        (tmp_path / "tasks" / "generate.yaml").write_text(GENERATE_YAML)
        notes = lm_eval(tmp_path, {"toy_generate": 1}, metric="exact_match,none", n_shot=3).check()
        assert notes == ["toy_generate stays 0-shot: its task file says so, and n_shot = 3 has no effect on it"]
        notes = lm_eval(tmp_path, temperature=0.7, direction="minimize").check()
        assert notes == [
            "toy_task generates nothing (it compares likelihoods): temperature has no effect on it",
            "toy_task: acc,none is better when higher, but feedback.direction is minimize",
        ]

    def test_an_unknown_task_gets_suggestions(self, tmp_path):
        """From the harness's own tasks, whose index takes seconds to build, and from the folder."""
        write_task(tmp_path / "tasks")
        expected = r"knows no task 'hellaswagg'; did you mean hellaswag.*; tasks in .*/tasks: toy_task$"
        with pytest.raises(FeedbackError, match=expected):
            lm_eval(tmp_path, {"hellaswagg": 1}).check()

    def test_a_metric_the_task_lacks(self, tmp_path):
        write_task(tmp_path / "tasks")
        expected = r"toy_task has no metric 'acc', it has: acc,none, acc_norm,none; did you mean 'acc,none'\?"
        with pytest.raises(FeedbackError, match=expected):
            lm_eval(tmp_path, metric="acc").check()

    def test_missing_data(self, tmp_path):
        write_task(tmp_path / "tasks", data="elsewhere.jsonl")
        with pytest.raises(FeedbackError, match=r"toy_task cannot be loaded: .*elsewhere.jsonl.*are taken from"):
            lm_eval(tmp_path).check()

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(FeedbackError, match=f"feedback.tasks_folder: no such folder: {tmp_path}/tasks"):
            lm_eval(tmp_path).check()

    @pytest.mark.parametrize(("weights", "given"), [((0, 0), "only zeros"), ((1, -1), "b: -1")])
    def test_weights(self, tmp_path, weights, given):
        with pytest.raises(FeedbackError, match=f"at least one above 0, got {given}"):
            lm_eval(tmp_path, dict(zip("ab", weights, strict=True))).check()

    def test_data_may_come_from_any_working_folder(self, tmp_path, monkeypatch):
        write_task(tmp_path / "tasks")
        source = lm_eval(tmp_path)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert source.check() == []
