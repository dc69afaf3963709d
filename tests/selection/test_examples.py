import json

import pytest

from duet_ray.config import config_from
from duet_ray.errors import SelectionError
from duet_ray.selection.examples import read_examples
from tests.tiny_model import tiny_tokenizer
from tests.toy_study import toy_data


def read(folder, *lines: str):
    (folder / "few.jsonl").write_text("\n".join(lines))
    data = toy_data(selection={"method": "indicators", "examples": "few.jsonl"})
    return read_examples(config_from(data, folder=folder), tiny_tokenizer())


def test_prompt_and_completion_become_tokens(tmp_path):
    (row,) = read(tmp_path, json.dumps({"prompt": "ab", "completion": "c"}))
    text = tiny_tokenizer().decode(row.input_ids)
    assert "ab" in text
    assert "c" in tiny_tokenizer().decode(row.input_ids[row.loss_mask])
    assert "ab" not in tiny_tokenizer().decode(row.input_ids[row.loss_mask])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([""], "few.jsonl has no rows"),
        (['{"prompt": "a", "completion": "b"}', '{"prompt": "a"}'], r"1 bad rows, the first: .*few.jsonl:2"),
        (["no json"], "selection.examples"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, lines, message):
    with pytest.raises(SelectionError, match=message):
        read(tmp_path, *lines)


def test_a_missing_file_is_named(tmp_path):
    data = toy_data(selection={"method": "indicators", "examples": "nowhere.jsonl"})
    with pytest.raises(SelectionError, match=r"selection\.examples: .*nowhere\.jsonl"):
        read_examples(config_from(data, folder=tmp_path), tiny_tokenizer())


def test_a_study_without_examples_has_none(tmp_path):
    assert read_examples(config_from(toy_data(), folder=tmp_path), tiny_tokenizer()) == []
