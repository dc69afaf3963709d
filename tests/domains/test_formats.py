import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from duet_ray.domains import BadRow, ParsedRow, read_rows
from duet_ray.domains.formats import parse_record
from duet_ray.domains.readers import Record
from duet_ray.errors import DataError


def parse(data, format, columns=None):
    return parse_record(Record("f", 1, data), format, columns or {})


def turns(row):
    assert isinstance(row, ParsedRow), row
    return [(m.role, m.content) for m in row.messages]


@pytest.mark.parametrize(
    ("format", "data", "columns", "expected"),
    [
        ("prompt_completion", {"prompt": "q", "completion": "a"}, {}, [("user", "q"), ("assistant", "a")]),
        ("prompt_completion", {"prompt": "q", "response": "a"}, {}, [("user", "q"), ("assistant", "a")]),
        (
            "prompt_completion",
            {"question": "q", "answer": "a"},
            {"prompt": "question", "completion": "answer"},
            [("user", "q"), ("assistant", "a")],
        ),
        ("alpaca", {"instruction": "do", "input": " ", "output": "a"}, {}, [("user", "do"), ("assistant", "a")]),
        ("alpaca", {"instruction": "do", "output": "a"}, {}, [("user", "do"), ("assistant", "a")]),
        ("alpaca", {"instruction": "do", "input": "x", "output": "a"}, {}, [("user", "do\n\nx"), ("assistant", "a")]),
        (
            "messages",
            {"m": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                   {"role": "assistant", "content": "a"}]},
            {"messages": "m"},
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {},
            [("user", "q"), ("assistant", "a")],
        ),
        (
            "sharegpt",
            {"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}},
            {},
            [("user", "q"), ("assistant", "a")],
        ),
        ("text", {"text": "all of it"}, {}, [("assistant", "all of it")]),
    ],
)  # fmt: skip
def test_every_format_becomes_turns(format, data, columns, expected):
    assert turns(parse(data, format, columns)) == expected


Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("format", "data", "reason"),
    [
        ("prompt_completion", {"prompt": None, "completion": "a"}, "column 'prompt' is null"),
        ("prompt_completion", {"prompt": "q"}, "column 'completion' not found"),
        ("prompt_completion", {"prompt": "q", "completion": 4}, "column 'completion' must be text, got int"),
        ("prompt_completion", {"prompt": "q", "completion": " \n"}, "completion is empty: nothing to learn"),
        ("prompt_completion", {"prompt": "q\ud800", "completion": "a"},
         "column 'prompt' is not valid Unicode at character 1"),
        ("prompt_completion", {"prompt": "q", "completion": "\udcff"},
         "column 'completion' is not valid UTF-8 at character 0"),
        ("alpaca", {"instruction": "q", "input": 3, "output": "a"}, "column 'input' must be text, got int"),
        ("text", {"text": ""}, "text is empty: nothing to learn"),
        ("messages", {"messages": "hi"}, "column 'messages' must be a list of turns, got str"),
        ("messages", {"messages": []}, "no assistant turn: nothing to learn"),
        ("messages", {"messages": [Q]}, "no assistant turn: nothing to learn"),
        ("messages", {"messages": [A, Q]}, "begins with an assistant turn: there is nothing that it answers"),
        ("messages", {"messages": [Q, "hi"]}, "turn 2 must be an object with role and content, got str"),
        ("messages", {"messages": [Q, {"role": "bot", "content": "a"}]},
         "turn 2: role must be one of system, user, assistant, tool, got 'bot'"),
        ("messages", {"messages": [Q, {"role": ["x"], "content": "a"}]},
         "turn 2: role must be one of system, user, assistant, tool, got list"),
        ("messages", {"messages": [Q, {"role": "assistant", "content": None}]}, "turn 2: content is null"),
        ("messages", {"messages": [Q, {"role": "assistant"}]}, "turn 2: content is missing"),
        ("messages", {"messages": [Q, {"role": "assistant", "content": ""}]},
         "turn 2: content is empty: nothing to learn"),
        ("messages", {"messages": [Q, {**A, "tool_calls": [{"id": 1}]}]}, "turn 2: tool_calls cannot be learned yet"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text"}]}, A]},
         "turn 1: content must be text, got list"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "robot", "value": "a"}]},
         "turn 2: from must be one of human, user, gpt, chatgpt, assistant, system, tool, got 'robot'"),
        ("sharegpt", {"conversations": {"from": ["human"], "value": []}},
         "column 'conversations': lists of different lengths"),
    ],
)  # fmt: skip
def test_bad_rows_say_why(format, data, reason):
    assert parse(data, format) == BadRow("f", 1, reason)


def test_the_same_rows_out_of_every_kind_of_file(tmp_path):
    rows = [{"prompt": f'what is {i}, "né"?', "completion": f"the answer\n{i}"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    import csv

    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    found = {
        suffix: [turns(r) for r in read_rows([tmp_path / f"a.{suffix}"], "prompt_completion", {})]
        for suffix in ("jsonl", "json", "parquet", "csv")
    }
    expected = [[("user", r["prompt"]), ("assistant", r["completion"])] for r in rows]
    assert all(rows == expected for rows in found.values()), found


def test_a_column_that_no_row_has_is_one_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "completion": "a"}\n' * 3)
    with pytest.raises(DataError) as error:
        list(read_rows([tmp_path / "a.jsonl"], "prompt_completion", {}, setting="domains[2].columns"))
    assert str(error.value) == (
        "column 'prompt' not found in any row; columns there: question, completion; set domains[2].columns, "
        "e.g. domains[2].columns: {prompt: <the column in your file>}, or another format"
    )


def test_a_column_that_some_row_has_gives_bad_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"completion": "a"}\n{"prompt": "q", "completion": "a"}\n')
    bad, good = read_rows([tmp_path / "a.jsonl"], "prompt_completion", {})
    assert str(bad) == f"{tmp_path}/a.jsonl:1 column 'prompt' not found"
    assert isinstance(good, ParsedRow)


def test_a_map_of_unknown_columns_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"columns: promt: no such column in format prompt_completion"):
        list(read_rows([tmp_path / "a.jsonl"], "prompt_completion", {"promt": "q"}))


def test_prompt_completion_and_key():
    pair = parse({"prompt": "q", "completion": "a"}, "prompt_completion")
    chat = parse({"messages": [Q, A]}, "messages")
    longer = parse({"messages": [Q, A, {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}]},
                   "messages")  # fmt: skip
    assert (pair.prompt, pair.completion) == ("q", "a")
    assert (longer.prompt, longer.completion) == ("user: q\nassistant: a\nuser: q2", "a2")
    assert pair.key == chat.key != longer.key
    assert parse({"prompt": "q1", "completion": "a"}, "prompt_completion").key != pair.key
    assert parse({"prompt": "ab", "completion": "c"}, "prompt_completion").key != (
        parse({"prompt": "a", "completion": "bc"}, "prompt_completion").key
    )


PUBMED = {"context": {"contexts": ["one", "two"], "labels": ["A", "B"]}, "question": "is it?", "decision": "yes"}
HEADQA = {"qtext": "which?", "ra": 2, "answers": [{"aid": 1, "atext": "no"}, {"aid": 2, "atext": "this"}]}
COMMONSENSE = {"question": "which?", "choices": {"label": ["A", "B"], "text": ["no", "this"]}, "answerKey": "B"}
HELLASWAG = {"ctx": "then", "endings": ["no", "this"], "label": "1"}


@pytest.mark.parametrize(
    ("format", "data", "columns", "expected"),
    [
        ("prompt_completion", {"q": "q", "answer": {"value": "a"}}, {"prompt": "q", "completion": "answer.value"},
         ("q", "a")),
        ("prompt_completion", PUBMED,
         {"prompt": "{context.contexts}\nQuestion: {question}", "completion": "decision"},
         ("one\ntwo\nQuestion: is it?", "yes")),
        ("prompt_completion", {"a.b": "by name", "a": {"b": "by path"}}, {"prompt": "a.b", "completion": "{a.b} {a.b}"},
         ("by name", "by name by name")),
        ("prompt_completion", {"n": 7, "completion": "a"}, {"prompt": "number {n}: {{"}, ("number 7: {{", "a")),
        ("multiple_choice", {"question": "q", "choices": ["no", "this"], "answer": 1}, {}, ("q", "this")),
        ("multiple_choice", {"question": "q", "choices": '["no", "this"]', "answer": "1"}, {}, ("q", "this")),
        ("multiple_choice", HELLASWAG, {"question": "ctx", "choices": "endings", "answer": "label"}, ("then", "this")),
        ("multiple_choice", HEADQA,
         {"question": "Q: {qtext}", "choices": "answers.atext", "labels": "answers.aid", "answer": "ra"},
         ("Q: which?", "this")),
        ("multiple_choice", COMMONSENSE,
         {"choices": "choices.text", "labels": "choices.label", "answer": "answerKey"}, ("which?", "this")),
    ],
)  # fmt: skip
def test_nested_columns_texts_of_columns_and_choices(format, data, columns, expected):
    assert turns(parse(data, format, columns)) == [("user", expected[0]), ("assistant", expected[1])]


@pytest.mark.parametrize(
    ("format", "data", "columns", "reason"),
    [
        ("prompt_completion", {"q": "q", "answer": {"valeu": "a"}}, {"prompt": "q", "completion": "answer.value"},
         "column 'answer.value' not found"),
        ("prompt_completion", {"q": "q", "answer": None}, {"prompt": "q", "completion": "answer.value"},
         "column 'answer.value' not found"),
        ("prompt_completion", {"q": None, "completion": "a"}, {"prompt": "Q: {q}"}, "column 'Q: {q}' not found"),
        ("prompt_completion", {"q": [["deep"]], "completion": "a"}, {"prompt": "Q: {q}"},
         "column 'q' must be text, got list"),
        ("prompt_completion", {"q": ["list"], "completion": "a"}, {"prompt": "q"}, "column 'q' must be text, got list"),
        ("multiple_choice", {"question": "q", "choices": "no list", "answer": 0}, {},
         "column 'choices' must be a list"),
        ("multiple_choice", {"question": "q", "choices": ["a", "b"], "answer": 2}, {},
         "answer must be one of 0, 1, got '2'"),
        ("multiple_choice", {"question": "q", "choices": ["a", "b"], "answer": True}, {},
         "answer must be text or a whole number, got bool"),
        ("multiple_choice", {"question": "q", "choices": ["a"], "labels": [[1]], "answer": 1}, {},
         "a label must be text or a whole number, got list"),
        ("multiple_choice", {"question": "q", "choices": ["a", "b"], "labels": ["A"], "answer": "A"}, {},
         "there are 2 choices and 1 labels"),
        ("multiple_choice", {"question": "q", "choices": ["a", "b"], "labels": ["A", "A"], "answer": "A"}, {},
         "answer must be one of A, A, got 'A'"),
        ("multiple_choice", {"question": "q", "choices": ["a", " "], "answer": 1}, {},
         "the right choice is empty: nothing to learn"),
        ("multiple_choice", {"question": "q", "choices": ["a", 3], "answer": 1}, {},
         "the right choice must be text, got int"),
    ],
)  # fmt: skip
def test_what_leads_nowhere_is_a_bad_row(format, data, columns, reason):
    assert parse(data, format, columns) == BadRow("f", 1, reason)


def test_nested_columns_out_of_a_file_of_columns(tmp_path):
    pq.write_table(pa.Table.from_pylist([{**HEADQA, "other": 1}] * 3), tmp_path / "a.parquet")
    columns = {"question": "qtext", "choices": "answers.atext", "labels": "answers.aid", "answer": "ra"}
    rows = list(read_rows([tmp_path / "a.parquet"], "multiple_choice", columns))
    assert [row.completion for row in rows] == ["this"] * 3
    with pytest.raises(DataError, match=r"column 'qtxt' not found in any row; columns there: qtext, ra"):
        list(read_rows([tmp_path / "a.parquet"], "multiple_choice", {**columns, "question": "qtxt"}))
