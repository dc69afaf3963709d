"""The paper's four feedbacks, measured: lm-eval's own tasks with the studies' settings, on rows of the hub's shapes."""

from typing import Any

import pytest

from duet_ray.config import load_config
from duet_ray.feedback import make_feedback
from tests.jobs.test_study_files import HUB_ROWS, JOBS
from tests.tiny_model import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.slow

ROWS: dict[str, dict[str, Any]] = {
    "truthfulqa/truthful_qa": HUB_ROWS["truthfulqa"][0],
    "openai/gsm8k": HUB_ROWS["gsm8k"][0],
    "parquet": {"QUESTION": "Does it?", "CONTEXTS": ["One.", "Two."], "final_decision": "maybe"},
    "EleutherAI/headqa": HUB_ROWS["headqa"][0],
    "tau/commonsense_qa": {
        "question": "Where?",
        "choices": {"label": list("ABCDE"), "text": ["here", "there", "up", "down", "in"]},
        "answerKey": "B",
    },
    "mandarjoshi/trivia_qa": HUB_ROWS["triviaqa"][0],
}
"""What lm-eval asks `datasets` for → a row."""

N_ITEMS = 6


@pytest.mark.parametrize(
    ("task", "n_asked", "notes"),
    [
        ("truthfulqa", {"truthfulqa_gen": 3}, ["truthfulqa_gen stays 0-shot"]),
        ("gsm8k", {"gsm8k": 6}, []),
        ("pubmedqa-headqa", {"pubmedqa_labelled": 6, "headqa_en": 6}, ["generates nothing"] * 2),
        ("commonsenseqa-triviaqa", {"commonsense_qa": 6, "triviaqa": 6}, ["commonsense_qa generates nothing"]),
    ],
)
def test_the_feedback_of_a_study_gives_a_number(
    task: str, n_asked: dict[str, int], notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def local(path: str, name: str | None = None, **options: Any) -> Any:
        rows = [_varied(ROWS[path], number) for number in range(N_ITEMS)]
        split = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), split))

    monkeypatch.setattr(datasets, "load_dataset", local)
    source = make_feedback(load_config(JOBS / "paper" / f"{task}-llama3-8b.yaml"))
    said = source.check()
    assert len(said) == len(notes), said
    assert all(note in line for note, line in zip(notes, said, strict=True))
    texts = list(source.task_texts())
    assert len(texts) == sum(n_asked.values())
    if task == "truthfulqa":
        assert [text[-1] for text in texts] == ["1", "3", "5"], "the even ones are trained on"
    measured = source.measure(tiny_llama(max_tokens=2048), tiny_tokenizer(), seed=0)
    assert 0 <= measured.value <= 1
    assert measured.stderr is not None


def _varied(row: dict[str, Any], number: int) -> dict[str, Any]:
    key = next(key for key in ("question", "QUESTION", "qtext") if key in row)
    return {**row, key: f"{row[key]} {number}"}
