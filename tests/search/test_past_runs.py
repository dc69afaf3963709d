"""Past runs from a CSV, and the prior ratio: what is read, what is mended, and what is refused by line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_ray.config import StudyConfig, config_from
from duet_ray.errors import DataError, DataErrors
from duet_ray.records import Direction, PastRun
from duet_ray.search import Proposer, SimplexSpace
from duet_ray.search.past_runs import (
    RunColumns,
    RunTable,
    imported_runs,
    new_runs,
    place_runs,
    prior_ratio,
    read_runs,
)

NAMES = ("maths", "chats", "wiki")


def study(**search: Any) -> StudyConfig:
    data = {
        "name": "s",
        "model": {"path": "m"},
        "domains": [{"name": name, "source": "x.jsonl"} for name in NAMES],
        "mixture": {"n_rows": 100},
        "search": search,
        "feedback": {"kind": "heldout_loss", "file": "t.jsonl", "name": "exam"},
    }
    return config_from(data, folder=Path("/nowhere"))


def space(lower: tuple[int, ...] = (0, 0, 0), upper: tuple[int, ...] = (100, 100, 100)) -> SimplexSpace:
    return SimplexSpace(names=NAMES, n_rows=100, lower=lower, upper=upper)


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "runs.csv"
    path.write_bytes(text.encode(encoding))
    return path


def read(folder: Path, text: str, config: StudyConfig | None = None, **columns: Any) -> RunTable:
    return read_runs(write(folder, text), config or study(), RunColumns(**columns))


def refusal(folder: Path, text: str, config: StudyConfig | None = None, **columns: Any) -> list[str]:
    """The lines of the refusal, without the folder."""
    with pytest.raises(DataError) as caught:
        read(folder, text, config, **columns)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


PLAIN = "maths,chats,wiki,exam\n0.5,0.25,0.25,3.5\n0,0.1,0.9,4.25\n"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (PLAIN, "utf-8"),
        (PLAIN, "utf-8-sig"),
        (PLAIN.replace(",", ";"), "utf-8"),
        (PLAIN.replace(",", "\t"), "utf-8"),
        (PLAIN.replace(",", ";").replace(".", ","), "utf-8-sig"),
        (PLAIN.replace("\n", "\r\n"), "utf-8"),
        (PLAIN.replace("maths,", '"maths", '), "utf-8"),
        (PLAIN.rstrip("\n"), "utf-8"),
    ],
    ids=["plain", "bom", "semicolon", "tab", "decimal-comma", "crlf", "quoted", "no-last-newline"],
)
def test_every_dialect_reads_the_same(tmp_path: Path, text: str, encoding: str) -> None:
    table = read_runs(write(tmp_path, text, encoding), study())
    assert [(row.line, row.shares, row.value, row.sem, row.fidelity) for row in table.rows] == [
        (2, (0.5, 0.25, 0.25), 3.5, None, 1.0),
        (3, (0.0, 0.1, 0.9), 4.25, None, 1.0),
    ]
    assert (table.name, table.value_column, table.ignored, table.n_renormalised) == ("runs.csv", "exam", (), 0)


def test_a_comma_is_a_decimal_comma_only_where_no_number_has_a_point(tmp_path: Path) -> None:
    (text,) = refusal(tmp_path, "maths;chats;wiki;exam\n0.5;0.25;0.25;1,234\n")
    assert text == "runs.csv:2: exam must be a number, got '1,234'"


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    """Empty lines and line breaks within quotes count, as they do in an editor."""
    text = 'note,maths,chats,wiki,exam\n"two\nlines",1,0,0,1\n\n,,,,\nx,0,1,0,2\n'
    table = read(tmp_path, text)
    assert [row.line for row in table.rows] == [2, 6]
    assert table.ignored == ("note",)


@pytest.mark.parametrize(
    ("header", "columns", "expected"),
    [
        ("maths,chats,wiki,value,exam", {}, "exam"),
        ("maths,chats,wiki,other,value", {}, "value"),
        ("maths,chats,wiki,date,score", {}, "score"),
        ("maths,chats,wiki,score,sem", {}, "score"),
        ("maths,chats,wiki,score,error", {"sem": "error"}, "score"),
        ("maths,chats,wiki,score,exam", {"value": "score"}, "score"),
    ],
)
def test_which_column_holds_the_value(tmp_path: Path, header: str, columns: dict[str, str], expected: str) -> None:
    fourth = "may" if "date" in header else "7"
    assert read(tmp_path, f"{header}\n1,0,0,{fourth},8\n", **columns).value_column == expected


def test_a_value_column_that_nobody_can_tell(tmp_path: Path) -> None:
    assert refusal(tmp_path, "maths,chats,wiki,a,b\n1,0,0,7,8\n") == [
        "runs.csv:1: which column holds the value? There is no 'exam' and no 'value', and a, b could be it; name it "
        "with --value COLUMN"
    ]
    (text,) = refusal(tmp_path, "maths,chats,wiki,note\n1,0,0,x\n")
    assert "no other column holds numbers" in text


def test_standard_errors_fidelities_and_renamed_columns(tmp_path: Path) -> None:
    text = "share_m,chats,wiki,acc,se,size,seed\n1,0,0,0.5,0.01,0.1,7\n0,0,1,0.25,0.02,1,8\n"
    table = read(
        tmp_path,
        text,
        study(fidelity={"rows": [0.25]}),
        domains={"maths": "share_m"},
        value="acc",
        sem="se",
        fidelity="size",
    )
    assert [(row.value, row.sem, row.fidelity) for row in table.rows] == [(0.5, 0.01, 0.1), (0.25, 0.02, 1.0)]
    assert table.ignored == ("seed",)
    assert read(tmp_path, PLAIN, study(fidelity={"rows": [0.25]}), fidelity=0.3).rows[0].fidelity == 0.3


def test_every_bad_row_is_named_at_once(tmp_path: Path) -> None:
    rows = [
        "0.5,0.5,0,1,0.1",  # sound
        "0.5,0.6,0,1,0.1",
        "50,30,20,1,0.1",
        "-0.5,1.5,0,1,0.1",
        "0.5,0.5,,1,0.1",
        "0.5,half,0,1,0.1",
        "0.5,0.5,0,nan,0.1",
        "0.5,0.5,0,-inf,0.1",
        "0.5,0.5,0,1e999,0.1",
        "0.5,0.5,0,,0.1",
        "0.5,0.5,0,1,0",
        "0.5,0.5,0,1,0.1,9",
        "0.5,0.5",
        "nan,0.5,0,1_0,0.1",
    ]
    assert refusal(tmp_path, "maths,chats,wiki,exam,se\n" + "\n".join(rows) + "\n", sem="se") == [
        "runs.csv:3: the shares must sum to 1 (within 1 %), got 1.1",
        "runs.csv:4: the shares must sum to 1 (within 1 %), got 100; write shares, not percent or numbers of rows",
        "runs.csv:5: maths must be a share >= 0, got -0.5",
        "runs.csv:6: wiki is missing",
        "runs.csv:7: chats must be a number, got 'half'",
        "runs.csv:8: exam must be finite, got nan",
        "runs.csv:9: exam must be finite, got -inf",
        "runs.csv:10: exam must be finite, got 1e999",
        "runs.csv:11: exam is missing",
        "runs.csv:12: se must be > 0, got 0",
        "runs.csv:13: has 6 cells, the header 5",
        "runs.csv:14: wiki is missing",
        "runs.csv:14: exam is missing",
        "runs.csv:14: se is missing",
        "runs.csv:15: maths must be finite, got nan",
        "runs.csv:15: exam must be a number, got '1_0'",
    ]


def test_of_many_problems_the_first_twenty_are_shown(tmp_path: Path) -> None:
    lines = refusal(tmp_path, "maths,chats,wiki,exam\n" + "1,1,1,1\n" * 25)
    assert len(lines) == 21
    assert lines[19].startswith("runs.csv:21: ")
    assert lines[20] == "… and 5 more like these"


def test_missing_columns_are_named_with_what_there_is(tmp_path: Path) -> None:
    remedy = "or add it (0 where it was not used)"
    assert refusal(tmp_path, "math,wiki,exam\n1,0,1\n", sem="se", fidelity="size") == [
        f"runs.csv:1: there is no column 'maths' for domain maths (did you mean 'math'?); "
        f"name it with --column maths=COLUMN, {remedy}",
        f"runs.csv:1: there is no column 'chats' for domain chats (columns here: math, wiki, exam); "
        f"name it with --column chats=COLUMN, {remedy}",
        "runs.csv:1: there is no column 'se' for the standard error (columns here: math, wiki, exam)",
        "runs.csv:1: there is no column 'size' for the fidelity (columns here: math, wiki, exam)",
    ]
    assert refusal(tmp_path, PLAIN, domains={"math": "maths", "wiki": "wikis"}) == [
        "--column math=maths: there is no domain math; did you mean 'maths'?",
        "runs.csv:1: there is no column 'wikis' for domain wiki (did you mean 'wiki'?)",
    ]
    assert refusal(tmp_path, "maths,chats,wiki,wiki,exam\n1,0,0,0,1\n", value="chats") == [
        "runs.csv:1: column 'chats' cannot be domain chats and the value at once",
        "runs.csv:1: column 'wiki' stands 2 times",
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty; it needs a header and a row per run"),
        (b"\n\n", "is empty; it needs a header and a row per run"),
        (b"maths,chats,wiki,exam\n", "has a header and no runs"),
        ("maths,chats,wiki,exam\n1,0,0,1".encode("utf-16"), "is not UTF-8 text (byte 0); save it as CSV in UTF-8"),
        (b'maths,chats,wiki,exam\n1,0,0,"1\n', "is no CSV: "),
    ],
    ids=["empty", "blank", "no-runs", "utf-16", "open-quote"],
)
def test_files_that_are_no_table(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_runs(path, study())
    assert expected in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_runs(tmp_path / "gone.csv", study())
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_runs(tmp_path, study())


@pytest.mark.parametrize(
    ("search", "columns", "expected"),
    [
        ({}, {"fidelity": 0.1}, "runs of a fidelity below 1 need search.fidelity in the study"),
        ({}, {"fidelity": 0.0}, "the fidelity must be a share of a whole trial, above 0 and up to 1, got 0"),
        ({}, {"fidelity": 1.5}, "the fidelity must be a share"),
        ({"objective": {"weights": {"exam": 1}}}, {}, "search.objective needs several metrics of every run"),
        ({"optimize": "model", "also": {"training.rank": {"choices": [8, 16]}}}, {}, "tries one ratio only"),
    ],
)
def test_a_study_that_cannot_use_such_runs(
    tmp_path: Path, search: dict[str, Any], columns: dict[str, Any], expected: str
) -> None:
    lines = refusal(tmp_path, PLAIN, study(**search), **columns)
    assert len(lines) == 1
    assert expected in lines[0]


def test_shares_within_one_percent_are_renormalised(tmp_path: Path) -> None:
    """100 rows of shares that sum to 1.01 and 0.99; renormalised they are those of a half and a quarter twice."""
    text = "maths,chats,wiki,exam\n0.505,0.2525,0.2525,1\n0.495,0.2475,0.2475,1\n0.5,0.25,0.25,1\n"
    table = read(tmp_path, text)
    assert table.n_renormalised == 2
    placed = place_runs(table, space())
    assert [run.counts for run in placed.runs] == [(50, 25, 25)] * 3
    assert (placed.n_moved, placed.farthest, placed.outside) == (0, 0.0, ())
    with pytest.raises(DataErrors):
        read(tmp_path, "maths,chats,wiki,exam\n0.5101,0.25,0.25,1\n")


def test_moves_of_more_than_a_row_are_counted(tmp_path: Path) -> None:
    """Of 1000 rows a share of 0.505 is 505, and renormalised to a half it is 500: five rows away."""
    table = read(tmp_path, "maths,chats,wiki,exam\n0.505,0.2525,0.2525,1\n1,0,0,1\n")
    fine = SimplexSpace(names=NAMES, n_rows=1000, lower=(0, 0, 0), upper=(1000, 1000, 1000))
    placed = place_runs(table, fine)
    assert placed.n_moved == 1
    assert placed.farthest == pytest.approx(5)


def test_runs_outside_the_space_stay_out(tmp_path: Path) -> None:
    table = read(tmp_path, "maths,chats,wiki,exam\n1,0,0,1\n0.4,0.3,0.3,2\n0.41,0.3,0.29,3\n")
    within = space(upper=(40, 100, 100))
    found = imported_runs(table, within, ())
    assert found.placed.outside == (2, 4)
    assert [(run.counts, run.source) for run in found.new] == [((40, 30, 30), "runs.csv:3")]
    assert all(within.contains(run.ratio) for run in found.new)
    with pytest.raises(DataError, match="outside the study's bounds, constraints or the rows there are: lines 2, 4; "):
        imported_runs(table, within, (), "error")
    with pytest.raises(DataError, match="the rows there are: every run; widen"):
        imported_runs(table, space(upper=(10, 100, 100), lower=(0, 60, 0)), ())


def test_the_best_is_that_of_the_highest_fidelity_in_the_users_direction(tmp_path: Path) -> None:
    text = "maths,chats,wiki,exam,f\n1,0,0,1,0.1\n0,1,0,2,1\n0,0,1,3,1\n"
    table = read(tmp_path, text, study(fidelity={"rows": [0.1]}), fidelity="f")
    found = imported_runs(table, space(), ())
    assert found.best(Direction.MINIMIZE).value == 2
    assert found.best(Direction.MAXIMIZE).value == 3


def as_file(contents: list[tuple[tuple[int, int], float]]) -> list[PastRun]:
    return [PastRun(counts=c, value=v, source=f"runs.csv:{line}") for line, (c, v) in enumerate(contents, start=2)]


contents = st.lists(st.tuples(st.sampled_from([(1, 0), (0, 1)]), st.sampled_from([0.5, 1.5])), max_size=8)


@given(contents, contents, st.randoms())
def test_a_file_imported_again_adds_what_was_added_to_it(before: Any, added: Any, random: Any) -> None:
    """Wherever the lines have moved to: what is new says what was added, and none of it is stored already."""
    known = as_file(before)
    assert new_runs(known, known) == []
    now = [*before, *added]
    random.shuffle(now)
    new = new_runs(known, as_file(now))
    assert sorted((run.counts, run.value) for run in new) == sorted(added)
    assert not set(new) & set(known), "the store takes a run from the same line that says the same for the same"


def test_the_same_run_from_another_file_is_another_run() -> None:
    here, there = (PastRun(counts=(1, 0), value=1.0, source=f"{name}.csv:2") for name in ("a", "b"))
    assert new_runs([here], [there]) == [there]
    assert new_runs([here], [PastRun(counts=(1, 0), value=1.0, sem=0.1, source="a.csv:2")])


def test_the_prior_by_sizes_is_in_proportion_to_the_rows() -> None:
    ratio = prior_ratio(space(), "sizes", [600, 300, 100])
    assert ratio is not None
    assert ratio.counts == (60, 30, 10)
    assert prior_ratio(space(), None, [600, 300, 100]) is None


def test_a_prior_outside_the_bounds_is_the_nearest_inside() -> None:
    """The rows above the bound are shared out evenly: the Euclidean projection, by hand."""
    within = space(upper=(40, 100, 100))
    ratio = prior_ratio(within, "sizes", [600, 300, 100])
    assert ratio is not None
    assert ratio.counts == (40, 40, 20)
    assert within.contains(ratio)


def test_a_prior_by_name_and_within_one_percent() -> None:
    ratio = prior_ratio(space(), {"wiki": 0.755, "maths": 0.25}, [1, 1, 1])
    assert ratio is not None
    assert ratio.counts == (25, 0, 75)


def test_the_prior_is_the_second_trial() -> None:
    config = study(prior={"maths": 0.1, "wiki": 0.9}, n_start=3)
    proposer = Proposer.of(config, space(), [10, 10, 10])
    first, second = (proposer.propose(trial, (), ()) for trial in (0, 1))
    assert (first.ratio.counts, second.ratio.counts) == ((34, 33, 33), (10, 0, 90))
    assert second.method == "prior"
    np.testing.assert_allclose(second.ratio.values, [0.1, 0, 0.9])
