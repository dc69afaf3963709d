"""The held-out loss against a reference that scores one unpadded row at a time with log-softmax."""

import json
import math

import numpy as np
import pytest
import torch

from duet_ray.errors import ConfigError, FeedbackError
from duet_ray.feedback import make_feedback
from tests.feedback.studies import ITEMS, PAIRS, study, write_jsonl
from tests.tiny_model import tiny_llama, tiny_tokenizer

EOS = "<eos>"


def reference_nll(model, tokenizer, prompt, completion):
    """(Σ −log p of the completion's tokens given all before, their number), one row, by hand."""
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = tokenizer(completion, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_p = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    return -sum(float(log_p[len(before) + i - 1, token]) for i, token in enumerate(after)), len(after)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def feedback(folder, **section):
    return make_feedback(study(folder, {"kind": "heldout_loss", **section}))


class TestCompletions:
    def test_is_the_mean_per_token_of_the_reference(self, tmp_path, model, tokenizer):
        write_jsonl(tmp_path / "task.jsonl", PAIRS)
        measured = feedback(tmp_path, file="task.jsonl").measure(model, tokenizer, seed=0)
        rows = [reference_nll(model, tokenizer, r["prompt"], f" {r['completion']}{EOS}") for r in PAIRS]
        nll, n = np.array(rows).T
        assert measured.value == pytest.approx(nll.sum() / n.sum(), rel=1e-5)
        residuals = nll - measured.value * n
        expected = math.sqrt(len(n) / (len(n) - 1) * (residuals**2).sum()) / n.sum()
        assert measured.stderr == pytest.approx(expected, rel=1e-4)

    def test_the_chat_template_frames_the_rows(self, tmp_path, model):
        tokenizer = tiny_tokenizer(chat_template=True)
        write_jsonl(tmp_path / "task.jsonl", PAIRS)
        measured = feedback(tmp_path, file="task.jsonl").measure(model, tokenizer, seed=0)
        frame = "user: {}" + EOS + "assistant: "
        rows = [reference_nll(model, tokenizer, frame.format(r["prompt"]), r["completion"] + EOS) for r in PAIRS]
        nll, n = np.array(rows).T
        assert measured.value == pytest.approx(nll.sum() / n.sum(), rel=1e-5)

    @pytest.mark.parametrize("batch_size", [1, 2, 64])
    def test_the_batch_size_does_not_matter(self, tmp_path, model, tokenizer, batch_size):
        write_jsonl(tmp_path / "task.jsonl", PAIRS)
        one = feedback(tmp_path, file="task.jsonl", batch_size=3).measure(model, tokenizer, seed=0)
        other = feedback(tmp_path, file="task.jsonl", batch_size=batch_size).measure(model, tokenizer, seed=1)
        assert other.value == pytest.approx(one.value, rel=1e-5)

    def test_training_max_tokens_does_not_cut_the_task(self, tmp_path, model, tokenizer):
        write_jsonl(tmp_path / "task.jsonl", PAIRS)
        section = {"kind": "heldout_loss", "file": "task.jsonl"}
        cut = make_feedback(study(tmp_path, section, training={"max_tokens": 8})).measure(model, tokenizer, seed=0)
        assert cut.value == make_feedback(study(tmp_path, section)).measure(model, tokenizer, seed=0).value

    def test_limit_takes_the_first_rows(self, tmp_path, model, tokenizer):
        write_jsonl(tmp_path / "task.jsonl", PAIRS)
        write_jsonl(tmp_path / "first.jsonl", PAIRS[:2])
        limited = feedback(tmp_path, file="task.jsonl", limit=2).measure(model, tokenizer, seed=0)
        assert limited == feedback(tmp_path, file="first.jsonl").measure(model, tokenizer, seed=0)

    def test_one_row_has_no_standard_error(self, tmp_path, model, tokenizer):
        write_jsonl(tmp_path / "task.jsonl", PAIRS[:1])
        assert feedback(tmp_path, file="task.jsonl").measure(model, tokenizer, seed=0).stderr is None

    def test_a_bfloat16_model_is_measured_in_bfloat16(self, tmp_path, model, tokenizer):
        write_jsonl(tmp_path / "task.jsonl", PAIRS)
        exact = feedback(tmp_path, file="task.jsonl").measure(model, tokenizer, seed=0).value
        half = feedback(tmp_path, file="task.jsonl").measure(tiny_llama(dtype=torch.bfloat16), tokenizer, seed=0).value
        assert half == pytest.approx(exact, rel=0.02)
        assert half != exact


class TestMultipleChoice:
    def test_loss_is_the_mean_of_the_right_answers_sums(self, tmp_path, model, tokenizer):
        write_jsonl(tmp_path / "task.jsonl", ITEMS)
        measured = feedback(tmp_path, file="task.jsonl", format="multiple_choice").measure(model, tokenizer, seed=0)
        right = [f" {item['choices'][item['answer']]}" for item in ITEMS]
        nll = np.array(
            [reference_nll(model, tokenizer, i["question"], a)[0] for i, a in zip(ITEMS, right, strict=True)]
        )
        assert measured.value == pytest.approx(nll.mean(), rel=1e-5)
        assert measured.stderr == pytest.approx(nll.std(ddof=1) / 2, rel=1e-4)

    def test_accuracy_takes_the_lowest_nll_per_byte(self, tmp_path, tokenizer):
        write_jsonl(tmp_path / "task.jsonl", ITEMS)
        section = {"file": "task.jsonl", "format": "multiple_choice"}
        values = set()
        for seed in range(6):
            model = tiny_llama(seed=seed)
            measured = feedback(tmp_path, **section, metric="accuracy", direction="maximize").measure(
                model, tokenizer, seed=0
            )
            right = []
            for item in ITEMS:
                scores = [
                    reference_nll(model, tokenizer, item["question"], f" {c}")[0] / len(c) for c in item["choices"]
                ]
                right.append(int(np.argmin(scores)) == item["answer"])
            assert measured.value == np.mean(right)
            assert measured.stderr == pytest.approx(np.std(right, ddof=1) / 2)
            loss = feedback(tmp_path, **section).measure(model, tokenizer, seed=0).value
            assert measured.metrics["loss"] == pytest.approx(loss, rel=1e-6)
            values.add(measured.value)
        assert len(values) > 1, "models of different seeds must differ, or the test shows nothing"

    def test_columns_and_csv(self, tmp_path, model, tokenizer):
        write_jsonl(tmp_path / "task.jsonl", ITEMS)
        lines = ["q,options,right"]
        for item in ITEMS:
            options = json.dumps(item["choices"]).replace('"', '""')
            lines.append(f'{item["question"]},"{options}",{item["answer"]}')
        (tmp_path / "task.csv").write_text("\n".join(lines), encoding="utf-8")
        columns = {"question": "q", "choices": "options", "answer": "right"}
        from_csv = feedback(tmp_path, file="task.csv", format="multiple_choice", columns=columns)
        from_jsonl = feedback(tmp_path, file="task.jsonl", format="multiple_choice")
        assert from_csv.measure(model, tokenizer, seed=0) == from_jsonl.measure(model, tokenizer, seed=0)

    def test_its_texts_are_the_questions(self, tmp_path):
        write_jsonl(tmp_path / "task.jsonl", ITEMS)
        source = feedback(tmp_path, file="task.jsonl", format="multiple_choice", limit=2)
        assert list(source.task_texts()) == ["sky", "two and two"]


class TestMistakes:
    def test_every_bad_row_is_named_by_file_and_line(self, tmp_path):
        rows = [
            ITEMS[0],
            {**ITEMS[1], "answer": 2},
            {**ITEMS[1], "answer": True},
            {**ITEMS[1], "choices": ["one"]},
            {"question": "q", "choices": ["a", "b"]},
            {**ITEMS[1], "question": 3},
        ]
        file = write_jsonl(tmp_path / "task.jsonl", rows)
        with pytest.raises(FeedbackError) as caught:
            feedback(tmp_path, file="task.jsonl", format="multiple_choice").check()
        message = str(caught.value)
        assert "5 rows of" in message
        assert f"{file}:2 answer must be the index of a choice, 0 to 1, got 2" in message
        assert f"{file}:3 answer must be the index of a choice, 0 to 1, got True" in message
        assert f"{file}:4 choices must be a list of at least two texts" in message
        assert f"{file}:5 column 'answer' not found or null; columns there: question, choices" in message
        assert f"{file}:6 question must be text, got int" in message

    def test_a_bad_completion_row(self, tmp_path):
        file = write_jsonl(tmp_path / "task.jsonl", [*PAIRS, {"prompt": "x", "completion": " "}])
        with pytest.raises(FeedbackError, match=f"{file}:6 completion is empty"):
            feedback(tmp_path, file="task.jsonl").check()

    def test_no_such_file(self, tmp_path):
        with pytest.raises(FeedbackError, match=f"feedback.file: no such file: {tmp_path}/task.jsonl"):
            feedback(tmp_path, file="task.jsonl").check()

    def test_an_empty_file(self, tmp_path):
        (tmp_path / "task.jsonl").write_text("")
        with pytest.raises(FeedbackError, match="has no rows"):
            feedback(tmp_path, file="task.jsonl").check()

    def test_an_unknown_kind_of_file(self, tmp_path):
        (tmp_path / "task.txt").write_text("x")
        with pytest.raises(FeedbackError, match=r"unknown kind of file '.txt'; must be one of .jsonl"):
            feedback(tmp_path, file="task.txt", format="multiple_choice").check()

    def test_accuracy_needs_choices(self, tmp_path):
        with pytest.raises(ConfigError, match=r"feedback.metric: accuracy needs format: multiple_choice"):
            feedback(tmp_path, file="task.jsonl", metric="accuracy", direction="maximize")

    def test_accuracy_is_to_be_maximized(self, tmp_path):
        with pytest.raises(ConfigError, match=r"feedback.direction: accuracy is to be maximized, got minimize"):
            feedback(tmp_path, file="task.jsonl", format="multiple_choice", metric="accuracy")

    def test_a_wrong_column_map(self, tmp_path):
        write_jsonl(tmp_path / "task.jsonl", ITEMS)
        with pytest.raises(FeedbackError, match="prompt: no such column in format multiple_choice"):
            feedback(tmp_path, file="task.jsonl", format="multiple_choice", columns={"prompt": "q"}).check()

    def test_a_row_longer_than_the_context(self, tmp_path, tokenizer):
        write_jsonl(tmp_path / "task.jsonl", [{"prompt": "x" * 50, "completion": "y" * 50}])
        with pytest.raises(FeedbackError, match=r"a row of .* has 102 tokens, the model's context has 64"):
            feedback(tmp_path, file="task.jsonl").measure(tiny_llama(max_tokens=64), tokenizer, seed=0)

    def test_a_model_of_nan_is_no_value(self, tmp_path, tokenizer):
        write_jsonl(tmp_path / "task.jsonl", PAIRS)
        broken = tiny_llama()
        broken.lm_head.weight.data.fill_(float("nan"))
        with pytest.raises(FeedbackError, match="the value must be finite, got nan"):
            feedback(tmp_path, file="task.jsonl").measure(broken, tokenizer, seed=0)

    def test_notes_on_direction_and_limit(self, tmp_path):
        write_jsonl(tmp_path / "task.jsonl", PAIRS)
        notes = feedback(tmp_path, file="task.jsonl", limit=9, direction="maximize").check()
        assert notes == [
            "task.jsonl has 5 rows, fewer than feedback.limit = 9",
            "loss is better when lower, but feedback.direction is maximize",
        ]
