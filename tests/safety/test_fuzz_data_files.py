"""Whatever lies in a data file, reading it ends in rows, bad rows or a message: no traceback, and it does end.

The whole way is taken, from the study file's domain to tokenised rows on disk, and what comes out is looked at again.
"""

import bz2
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_ray.config import config_from
from duet_ray.domains import Domain, prepare_domains
from duet_ray.domains.formats import COLUMNS, ParsedRow, read_rows
from duet_ray.domains.readers import READERS, BadRow
from tests.safety.fuzzing import looking, result_or_message
from tests.tiny_model import tiny_tokenizer

FORMATS = sorted(COLUMNS)
GOOD_ROWS: list[dict[str, Any]] = [
    {
        **{"prompt": f"say {n}", "completion": f"word {n}", "text": f"once {n}"},
        **{"instruction": f"do {n}", "input": "", "output": f"done {n}"},
        "messages": [{"role": "user", "content": f"how {n}"}, {"role": "assistant", "content": f"so {n}"}],
        "conversations": [{"from": "human", "value": f"how {n}"}, {"from": "gpt", "value": f"so {n}"}],
        **{"question": f"which {n}", "choices": ["this", "that"], "answer": n % 2, "labels": []},
    }
    for n in range(4)
]
"""Rows that every format finds its columns in."""

odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["", " ", "\0", "\ufeff", "\ud800", "\u2028", "user", "assistant", "gpt", "\x1b[2J", "{{x}}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@st.composite
def changed_row(draw: st.DrawFn) -> Any:
    """A good row with something in it changed; now and then no row at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(odd)
    row = json.loads(json.dumps(GOOD_ROWS[draw(st.integers(0, 3))]))
    for name in draw(st.lists(st.sampled_from(sorted(row)), max_size=3, unique=True)):
        kind = draw(st.sampled_from(["replace", "remove", "turn"]))
        if kind == "replace":
            row[name] = draw(odd)
        elif kind == "remove":
            del row[name]
        elif isinstance(row[name], list) and row[name] and isinstance(row[name][0], dict):
            turn = draw(st.sampled_from(row[name]))
            turn[draw(st.sampled_from([*turn, "tool_calls"]))] = draw(odd)
            row[name] += draw(st.lists(st.sampled_from(row[name]), max_size=2))
    return row


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes with pieces cut off, doubled, overwritten or put in between."""
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(good)))
        end = min(len(good), start + draw(st.integers(0, 30)))
        junk = draw(
            st.sampled_from([b"", b"\xff", b"\0", b"\xef\xbb\xbf", b'"', b"\n", b"\r", b"[", b"{", b",", b"\xc3"])
        )
        kind = draw(st.sampled_from(["cut", "end", "double", "over", "put"]))
        pieces = {
            "cut": good[:start] + good[end:],
            "end": good[:start],
            "double": good[:end] + good[start:end] + good[end:],
            "over": good[:start] + junk + good[start + len(junk) :],
            "put": good[:start] + junk + good[start:],
        }
        good = pieces[kind]
    return good


def as_lines(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def as_csv(rows: list[Any], delimiter: str) -> bytes:
    names = list(GOOD_ROWS[0])
    lines = [delimiter.join(names)]
    for row in rows:
        cells = [row.get(name, "") if isinstance(row, dict) else row for name in names]
        shown = (cell if isinstance(cell, str) else json.dumps(cell) for cell in cells)
        lines.append(delimiter.join('"' + text.replace('"', '""') + '"' for text in shown))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def as_parquet(rows: list[Any]) -> bytes:
    try:
        table = pa.Table.from_pylist([row for row in rows if isinstance(row, dict)] or GOOD_ROWS)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, UnicodeError):
        return as_parquet(GOOD_ROWS)  # values of several types in a column, which parquet does not have
    return bytes(sink.getvalue())


def written_as(suffix: str, rows: list[Any]) -> bytes:
    if suffix == ".parquet":
        return as_parquet(rows)
    if suffix in (".csv", ".tsv"):
        return as_csv(rows, "," if suffix == ".csv" else "\t")
    return json.dumps(rows, indent=1).encode() if suffix == ".json" else as_lines(rows)


@pytest.fixture(scope="module")
def tokenizers() -> list[Any]:
    return [tiny_tokenizer(), tiny_tokenizer(chat_template=True)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def prepare(folder: Path, tokenizer: Any, source: str, format: str, **domain: Any) -> list[Domain] | str:
    """Take the way of `duet run`; check what came out, and that nothing was written but below the storage."""
    study = {
        "name": "fuzz",
        "model": {"path": "none"},
        "domains": [{"name": "x", "source": source, "format": format, **domain}],
        "data": {"max_bad_rows": 0.999, "validation_fraction": 0.1},
        "training": {"max_tokens": 32},
        "feedback": {"kind": "heldout_loss", "file": "task.jsonl"},
    }
    before = {path for path in folder.rglob("*") if "studies" not in path.parts}

    def call() -> list[Domain]:
        return prepare_domains(config_from(study, folder=folder), tokenizer)

    found = result_or_message(call)
    assert {path for path in folder.rglob("*") if "studies" not in path.parts} == before
    if isinstance(found, str):
        assert len(found) < 20_000
        assert not list((folder / "studies").rglob("*.arrow")), "nothing half made is left"
        return found
    report = found[0].report
    assert report.n_read == report.n_bad + report.n_train + report.n_validation
    for half in (found[0].train, found[0].validation):
        for row, text in zip(half.rows(range(len(half))), half.texts(range(len(half))), strict=True):
            assert 0 < len(row) <= 32
            assert row.loss_mask.any()
            text["text"].encode()
    for bad in report.bad:
        assert len(str(bad)) < 2_000, "a reason is a line"
    return found


def in_new_folder(content: bytes, suffix: str, format: str, tokenizer: Any, **domain: Any) -> list[Domain] | str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / f"data{suffix}").write_bytes(content)
        return prepare(folder, tokenizer, f"data{suffix}", format, **domain)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("suffix", sorted(READERS))
def test_good_rows_are_good(tokenizers: list[Any], suffix: str, format: str) -> None:
    found = in_new_folder(written_as(suffix, GOOD_ROWS), suffix, format, tokenizers[0])
    if suffix in (".csv", ".tsv") and format in ("messages", "sharegpt"):
        assert isinstance(found, str), "a cell holds no turns"
    else:
        assert not isinstance(found, str), found
        assert found[0].report.n_bad == 0


@looking(150)
@given(data=st.data(), suffix=st.sampled_from(sorted(READERS)), format=st.sampled_from(FORMATS), chat=st.booleans())
def test_rows_with_changes(tokenizers: list[Any], data: st.DataObject, suffix: str, format: str, chat: bool) -> None:
    rows = [*GOOD_ROWS, *data.draw(st.lists(changed_row(), min_size=1, max_size=5))]
    in_new_folder(written_as(suffix, rows), suffix, format, tokenizers[chat])


@looking(200)
@given(data=st.data(), suffix=st.sampled_from(sorted(READERS)), format=st.sampled_from(FORMATS))
def test_files_with_damage(tokenizers: list[Any], data: st.DataObject, suffix: str, format: str) -> None:
    content = data.draw(damaged(written_as(suffix, GOOD_ROWS)))
    in_new_folder(content, suffix, format, tokenizers[0])


@looking(100)
@given(content=st.binary(max_size=80), suffix=st.sampled_from(sorted(READERS)), format=st.sampled_from(FORMATS))
def test_random_bytes(tokenizers: list[Any], content: bytes, suffix: str, format: str) -> None:
    for magic in (b"", b"PAR1"):
        found = in_new_folder(magic + content + magic, suffix, format, tokenizers[0])
        assert isinstance(found, str) or found[0].report.n_train


MAPPED = ("prompt", "text", "messages.content", "messages", "{prompt}{text}", "{", "{}", "{a.b}", "a" + ".a" * 3000)


@looking(120)
@given(
    columns=st.dictionaries(
        st.sampled_from(["prompt", "completion", "text", "messages", "answer", "x"]),
        st.sampled_from(MAPPED) | st.text(max_size=8),
        min_size=1,
        max_size=2,
    ),
    rows=st.sampled_from([None, None, "::2", "1:", ":1", "5:2", "999999999999:", "1:2:0", "x", ":"]),
    format=st.sampled_from(FORMATS),
)
def test_maps_and_slices(tokenizers: list[Any], columns: dict[str, str], rows: str | None, format: str) -> None:
    in_new_folder(as_lines(GOOD_ROWS), ".jsonl", format, tokenizers[0], columns=columns, rows=rows)


PIECES = ("..", "/", "*", "**", "?", "[", "]", "~", "data", ".jsonl", "ring", "hf:", "\0", ".")


@looking(80)
@given(source=st.text(max_size=12) | st.lists(st.sampled_from(PIECES), max_size=6).map("".join))
def test_sources(tokenizers: list[Any], source: str) -> None:
    if source.startswith(("/", "~", "..")) or "/.." in source:
        source = "data/" + source.replace("..", ".").lstrip("/~")  # not all over this machine's disk
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        (folder / "data" / "a.jsonl").write_bytes(as_lines(GOOD_ROWS))
        for link in ("ring", "round"):
            (folder / "data" / link).symlink_to(folder)
        prepare(folder, tokenizers[0], source, "text")


def nested(depth: int, value: str = "1") -> str:
    return "[" * depth + value + "]" * depth


CHOICE = b'{"question": "q", "choices": ["a", "b"], "answer": %s}'
GOOD_TAIL = b"\n" + as_lines(GOOD_ROWS)

CASES: dict[str, tuple[str, bytes]] = {
    "empty jsonl": (".jsonl", b""),
    "empty json": (".json", b""),
    "empty csv": (".csv", b""),
    "empty parquet": (".parquet", b""),
    "only a header": (".csv", b"text\n"),
    "only white space": (".json", b" \n\n "),
    "only a byte order mark": (".jsonl", b"\xef\xbb\xbf"),
    "a byte order mark": (".jsonl", b"\xef\xbb\xbf" + as_lines(GOOD_ROWS)),
    "utf-16": (".jsonl", as_lines(GOOD_ROWS).decode().encode("utf-16")),
    "utf-16 csv": (".csv", as_csv(GOOD_ROWS, ",").decode().encode("utf-16")),
    "utf-32": (".json", json.dumps(GOOD_ROWS).encode("utf-32")),
    "latin-1": (".jsonl", '{"text": "déjà"}'.encode("latin-1") + GOOD_TAIL),
    "latin-1 csv": (".csv", "text\ndéjà\nvu\nda\n".encode("latin-1")),
    "latin-1 json": (".json", '[{"text": "déjà"}]'.encode("latin-1")),
    "gzip": (".jsonl", gzip.compress(as_lines(GOOD_ROWS))),
    "bzip2": (".csv", bz2.compress(as_csv(GOOD_ROWS, ","))),
    "old ends of lines": (".jsonl", as_lines(GOOD_ROWS).replace(b"\n", b"\r")),
    "a huge line": (".jsonl", b'{"text": "' + b"a" * 2_000_000 + b'"}' + GOOD_TAIL),
    "a huge line that breaks off": (".jsonl", GOOD_TAIL + b'\n{"text": "' + b"a" * 2_000_000),
    "a huge cell": (".csv", b"text\n" + b"a" * 1_000_000 + b"\nb\nc\n"),
    "an open quote": (".csv", b'text\n"' + b"a\n" * 80_000),
    "a huge role": (".jsonl", b'{"messages": [{"role": "' + b"r" * 500_000 + b'", "content": "x"}]}' + GOOD_TAIL),
    "a nested role": (".jsonl", b'{"messages": [{"role": ' + nested(300).encode() + b', "content": "x"}]}' + GOOD_TAIL),
    "thousands of brackets": (".jsonl", nested(100_000).encode() + GOOD_TAIL),
    "thousands of brackets in an array": (".json", b"[" + nested(100_000).encode() + b"]"),
    "brackets below a text": (".jsonl", b'{"text": "x", "more": ' + nested(900).encode() + b"}" + GOOD_TAIL),
    "thousands of digits": (".jsonl", b'{"text": ' + b"9" * 100_000 + b"}" + GOOD_TAIL),
    "an answer of thousands of digits": (".jsonl", CHOICE % (b"9" * 4200) + GOOD_TAIL),
    "a nested answer": (".jsonl", CHOICE % nested(900).encode() + GOOD_TAIL),
    "an answer that is no number": (".jsonl", CHOICE % b"NaN" + GOOD_TAIL),
    "a path of 3,000 parts": (".jsonl", json.dumps({"text" + ".text" * 3000: "x"}).encode() + GOOD_TAIL),
    "not a number": (".jsonl", b'{"text": NaN}\n{"text": -Infinity}' + GOOD_TAIL),
    "half a character": (".jsonl", b'{"text": "\\ud800"}\n{"text\\ud800": "x"}' + GOOD_TAIL),
    "a NUL": (".jsonl", b'{"text": "a\\u0000b"}' + GOOD_TAIL),
    "NULs": (".csv", b"text\na\0b\n\0\nc\nd\n"),
    "a key twice": (".jsonl", b'{"text": "a", "text": "b"}' + GOOD_TAIL),
    "a column twice": (".csv", b"text,text\na,b\n"),
    "a column without a name": (".csv", b",text\na,b\nc,d\n"),
    "an array that breaks off": (".json", b'[{"text": "a"}, {"text": '),
    "two arrays": (".json", b'[{"text": "a"}] [{"text": "b"}]'),
    "a number": (".json", b"12"),
    "an array of arrays": (".json", b"[[], [1], [[2]]]"),
    "half a parquet file": (".parquet", as_parquet(GOOD_ROWS)[:-40]),
    "the end of a parquet file": (".parquet", as_parquet(GOOD_ROWS)[-200:]),
    "parquet by its name": (".parquet", as_lines(GOOD_ROWS)),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", CASES)
def test_cases(folder: Path, tokenizers: list[Any], name: str) -> None:
    suffix, content = CASES[name]
    (folder / f"data{suffix}").write_bytes(content)
    for format in FORMATS:
        prepare(folder, tokenizers[0], f"data{suffix}", format)
        shutil.rmtree(folder / "studies", ignore_errors=True)


ARROW: dict[str, pa.Table] = {
    "no rows": pa.table({"text": pa.array([], pa.string())}),
    "no columns": pa.table({}),
    "numbers": pa.table({"text": [1, 2, 3]}),
    "bytes": pa.table({"text": [b"\xff\xfe", b"ok", b"ok too"]}),
    "words by number": pa.table({"text": pa.array(["a", "b", "a", "c"]).dictionary_encode()}),
    "the year 200,000": pa.table({"text": ["a", "b"], "prompt": pa.array([2**58, 1], pa.timestamp("us"))}),
    "the year 200,000 as a text": pa.table({"text": pa.array([2**58, 1], pa.timestamp("us"))}),
    "a time zone of nowhere": pa.table({"text": pa.array([1, 2], pa.timestamp("us", tz="Nowhere/Land"))}),
    "nanoseconds": pa.table({"text": pa.array([1, 2], pa.timestamp("ns"))}),
    "durations": pa.table({"text": pa.array([2**62, 2], pa.duration("s"))}),
    "decimals": pa.table({"text": pa.array([1, 2], pa.decimal128(38, 0))}),
    "nulls": pa.table({"text": pa.array([None, None], pa.null())}),
    "a map": pa.table({"messages": pa.array([[("a", "b")], []], pa.map_(pa.string(), pa.string()))}),
    "a column twice": pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]),
    "a column with a dot": pa.table({"text.x": ["a", "b"], "text": [{"x": "c"}, {"x": "d"}]}),
}


@pytest.mark.parametrize("name", ARROW)
def test_what_parquet_can_hold(folder: Path, tokenizers: list[Any], name: str) -> None:
    pq.write_table(ARROW[name], folder / "data.parquet")
    for format in FORMATS:
        prepare(folder, tokenizers[0], "data.parquet", format)
        shutil.rmtree(folder / "studies", ignore_errors=True)


def test_one_value_that_python_cannot_hold_is_one_bad_row(folder: Path) -> None:
    times = pa.array([0, 2**58, 1], pa.timestamp("us"))
    path = folder / "data.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "completion": times}), path)
    rows = list(read_rows([path], "prompt_completion", {}))
    assert all(isinstance(row, BadRow) for row in rows)
    assert [row.line for row in rows] == [1, 2, 3]
    assert "cannot be read" in str(rows[1])
    assert "must be text, got datetime" in str(rows[0])
    assert not any(isinstance(row, ParsedRow) for row in rows)


@pytest.mark.parametrize("kind", ["folder", "ring", "pipe", "closed", "closed folder", "gone", "device"])
def test_what_is_no_file(folder: Path, tokenizers: list[Any], kind: str) -> None:
    path, source = folder / "data.jsonl", "data.jsonl"
    if kind == "folder":
        path.mkdir()
    elif kind == "ring":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind.startswith("closed"):
        (folder / "inner").mkdir()
        (folder / "inner" / "data.jsonl").write_bytes(as_lines(GOOD_ROWS))
        (folder / "inner" / ("data.jsonl" if kind == "closed" else "")).chmod(0)
        source = "inner/data.jsonl"
        if os.access(folder / source, os.R_OK):
            pytest.skip("this user may read everything")
    found = prepare(folder, tokenizers[0], source, "text")
    (folder / "inner").exists() and (folder / "inner").chmod(0o700)
    assert isinstance(found, str)
    assert found.startswith("domains[0]")


def test_a_file_that_changes_its_kind_while_it_is_read(folder: Path, tokenizers: list[Any]) -> None:
    """The file is there when the sources are looked for, and a folder when they are read."""
    path = folder / "data.jsonl"
    path.write_bytes(as_lines(GOOD_ROWS))
    names: list[str] = []

    def swap(name: str, n_rows: int) -> None:
        names.append(name)
        path.unlink()
        path.mkdir()

    study = {
        "name": "fuzz",
        "model": {"path": "none"},
        "domains": [{"name": "x", "source": "data.jsonl", "format": "text"}],
        "feedback": {"kind": "heldout_loss", "file": "task.jsonl"},
    }
    config = config_from(study, folder=folder)
    found = result_or_message(lambda: prepare_domains(config, tokenizers[0], on_progress=swap))
    assert names == ["x"]
    assert "changed while it was read" in found
