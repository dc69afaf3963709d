import codecs
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from duet_ray.domains import BadRow, Record, readers
from duet_ray.domains.readers import read_records
from duet_ray.errors import DataError


def read(path, **options):
    return list(read_records(path, name=path.name, **options))


def test_jsonl_reads_on_behind_bad_rows(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [b'{"a": 1}', b"", b'{"a": "\xff"}', b'{"a": ', b"[1]", b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 2}']
    file.write_bytes(codecs.BOM_UTF8 + b"\n".join(lines))
    found = read(file)
    assert found[0] == Record("a.jsonl", 1, {"a": 1})
    assert found[-1] == Record("a.jsonl", 7, {"a": 2})
    bad = [str(row) for row in found[1:-1]]
    assert bad[:3] == [
        "a.jsonl:3 not valid UTF-8 at byte 7 of the line",
        "a.jsonl:4 not valid JSON: Expecting value at column 7",
        "a.jsonl:5 must be a JSON object, got list",
    ]
    assert bad[3].startswith("a.jsonl:6 not usable JSON")
    assert len(bad) == 4


def test_jsonl_nested_too_deeply_is_a_bad_row(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": ' + b"[" * 200_000 + b"\n" + b'{"a": 1}\n')
    bad, good = read(file)
    assert isinstance(bad, BadRow)
    assert good == Record("a.jsonl", 2, {"a": 1})


def test_json_array_in_small_pieces_equals_json_loads(tmp_path, monkeypatch):
    rows = [{"a": "x" * n, "b": [n, {"c": 'say "hi", [ok]\n'}], "é": None} for n in range(40)]
    for indent in (None, 2):
        text = json.dumps(rows, indent=indent, ensure_ascii=False)
        (tmp_path / "a.json").write_text("\n " + text + "\n", encoding="utf-8-sig")
        for size in (1, 7, 1 << 20):
            monkeypatch.setattr(readers, "_CHUNK", size)
            found = read(tmp_path / "a.json")
            assert [r.data for r in found] == rows
            lines = text.splitlines()
            first = [0 if indent is None else lines.index(f'    "a": "{r["a"]}",') - 1 for r in rows]
            assert [r.line for r in found] == [2 + line for line in first]


def test_json_array_never_cuts_a_number(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("[12345, 67]")
    monkeypatch.setattr(readers, "_CHUNK", 1)
    assert [str(row) for row in read(tmp_path / "a.json")] == ["a.json:1 must be a JSON object, got int"] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"a": }]', "a.json:2: not valid JSON: Expecting value"),
        ('[{"a": 1}\n {"a": 2}]', "a.json:2: ',' or ']' after a row expected, got '{'"),
        ('[{"a": 1},', "a.json:1: not valid JSON"),
        ('[{"a": 1}', "got 'the end of the file'"),
        ("[] []", "text behind the array's end"),
        ('{"data":\n [{"a": 1}]}', "a.json: must hold an array of objects"),
    ],
)
def test_broken_json_array_says_where(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError) as error:
        read(tmp_path / "a.json")
    assert message in str(error.value)


def test_json_with_one_object_a_line_and_empty_files(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}\n{"a": 2}\n')
    assert [r.data for r in read(tmp_path / "a.json")] == [{"a": 1}, {"a": 2}]
    for name, text in [("b.json", ""), ("c.json", "[]"), ("d.jsonl", ""), ("e.csv", "")]:
        (tmp_path / name).write_text(text)
        assert read(tmp_path / name) == []


def test_csv_lines_quotes_and_bad_rows(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b'\xef\xbb\xbfq,a\n"two\nlines","say ""hi"""\n\nonly one\n"x"y,z\n\xff,b\nlast,row\n')
    found = read(file)
    assert found[0] == Record("a.csv", 2, {"q": "two\nlines", "a": 'say "hi"'})
    assert str(found[1]) == "a.csv:5 has 1 cells where the header has 2"
    assert str(found[2]).startswith("a.csv:6 not valid CSV")
    assert found[3].line == 7
    assert found[3].data["q"] == "\udcff"
    assert found[4] == Record("a.csv", 8, {"q": "last", "a": "row"})


def test_csv_header_named_twice(tmp_path):
    (tmp_path / "a.tsv").write_text("q\ta\tq\n1\t2\t3\n")
    with pytest.raises(DataError, match=r"a.tsv:1: the header names q more than once"):
        read(tmp_path / "a.tsv")


def test_parquet_reads_wanted_columns_and_names_bad_text(tmp_path):
    text = pa.array([b"ok", b"\xff\xfe", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": text, "big": ["x"] * 3}), tmp_path / "a.parquet")
    first, bad, last = read(tmp_path / "a.parquet", wanted={"text"})
    assert (first, last) == (Record("a.parquet", 1, {"text": "ok"}), Record("a.parquet", 3, {"text": "fine"}))
    assert str(bad) == "a.parquet:2 not valid UTF-8 at byte 0 of a value"


def test_files_that_cannot_be_read_at_all(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"unknown kind of file '.txt'; must be one of .jsonl, .ndjson, .json"):
        read(tmp_path / "a.txt")
