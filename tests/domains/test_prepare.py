import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from duet_ray.domains import BadRow, Domain, open_domain, prepare_domains, rows
from duet_ray.domains import prepare as prepare_module
from duet_ray.domains.prepare import cache_folder, check_bad_rows, held_out, tokenizer_identity
from duet_ray.errors import DataError, DataErrors
from tests.domains.domain_toys import make_tokenizer, prompts, questions, write_jsonl


def test_a_source_becomes_two_sets(tmp_path, study, plain_tokenizer):
    write_jsonl(tmp_path / "a.jsonl", questions(40))
    seen = []
    config = study({"name": "a", "source": "a.jsonl"})
    (domain,) = prepare_domains(config, plain_tokenizer, on_progress=lambda *where: seen.append(where))
    assert (domain.name, domain.index, len(domain.train), len(domain.validation)) == ("a", 0, 36, 4)
    assert sorted(prompts(domain.train) + prompts(domain.validation)) == sorted(q["prompt"] for q in questions(40))
    text = domain.train.texts([3, 0])
    assert text[1] == {
        "row": 0,
        "source": "a.jsonl",
        "line": text[1]["line"],
        "prompt": (question := questions(40)[text[1]["line"] - 1])["prompt"],
        "completion": question["completion"],
        "text": f"{question['prompt']} {question['completion']}</s>",
    }
    assert text[0]["row"] == 3
    row = domain.train.row(0)
    assert plain_tokenizer.decode(row.input_ids) == text[1]["text"]
    assert domain.train.n_tokens.dtype == np.int32
    assert domain.train.n_tokens.tolist() == [len(r) for r in domain.train.rows(range(36))]
    report = domain.report
    assert report.n_tokens == domain.train.n_tokens.sum() + domain.validation.n_tokens.sum()
    assert (report.n_read, report.n_bad, report.n_cut, report.n_duplicates) == (40, 0, 0, 0)
    assert (report.n_train, report.n_validation) == (36, 4)
    assert seen == [("a", 40)]
    assert domain.folder == tmp_path / "studies/cache/domains" / f"a-{domain.fingerprint}"
    assert sorted(p.name for p in domain.folder.iterdir()) == ["meta.json", "train.arrow", "validation.arrow"]


def test_rows_of_many_batches_come_in_the_order_asked(tmp_path, study, plain_tokenizer, monkeypatch):
    monkeypatch.setattr(rows, "BATCH_ROWS", 7)
    monkeypatch.setattr(prepare_module, "BATCH_ROWS", 5)
    write_jsonl(tmp_path / "a.jsonl", questions(60))
    config = study({"name": "a", "source": "a.jsonl"}, data={"validation_fraction": 0.3})
    (domain,) = prepare_domains(config, plain_tokenizer)
    train = domain.train
    assert train._file.num_record_batches == 6
    assert len(train) == 42
    assert [t["line"] for t in train.texts(range(42))] == sorted(t["line"] for t in train.texts(range(42)))
    ids = [41, 0, 13, 14, 13, 6, 7]
    assert [t["row"] for t in train.texts(ids)] == ids
    for row, shown in zip(train.rows(ids), train.texts(ids), strict=True):
        assert plain_tokenizer.decode(row.input_ids) == shown["text"]
        assert plain_tokenizer.decode(row.input_ids[row.loss_mask]) == f" {shown['completion']}</s>"
    assert train.rows([]) == []
    for outside in (-1, 42):
        with pytest.raises(IndexError, match="rows 0 to 41"):
            train.row(outside)
    with pytest.raises(ValueError, match="read-only"):
        train.row(0).input_ids[0] = 1


def test_a_second_call_opens_the_cache(tmp_path, study, plain_tokenizer, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", [*questions(30), {"prompt": "no answer"}])
    config = study({"name": "a", "source": "a.jsonl"}, data={"max_bad_rows": 1})
    (first,) = prepare_domains(config, plain_tokenizer)
    plain_tokenizer(["some", "longer call"], truncation=True, max_length=3)
    monkeypatch.setattr(prepare_module, "encode_rows", None)
    (second,) = prepare_domains(config, plain_tokenizer)
    assert (second.fingerprint, second.report, second.folder) == (first.fingerprint, first.report, first.folder)
    assert second.report.bad == (BadRow("a.jsonl", 31, "column 'completion' not found"),)
    # Fewer bad rows allowed: the cache knows how many there were.
    with pytest.raises(DataErrors, match=r"1 of 31 rows are bad, more than data.max_bad_rows = 0 allows"):
        prepare_domains(study({"name": "a", "source": "a.jsonl"}, data={"max_bad_rows": 0}), plain_tokenizer)


def test_what_changes_the_rows_changes_the_fingerprint(tmp_path, study, plain_tokenizer, chat_tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", questions(10))
    base = {"name": "a", "source": "a.jsonl"}

    def mark(tokenizer=plain_tokenizer, domain=base, **sections) -> str:
        return prepare_domains(study(domain, **sections), tokenizer)[0].fingerprint

    marks = [
        mark(),
        mark(training={"max_tokens": 14}),
        mark(training={"loss_on": "all"}),
        mark(seed=1),
        mark(data={"validation_fraction": 0.2}),
        mark(chat_tokenizer),
        mark(domain={**base, "format": "text", "columns": {"text": "prompt"}}),
        mark(domain={**base, "format": "text", "columns": {"text": "completion"}}),
        mark(domain={**base, "name": "b"}),
    ]
    assert len(set(marks)) == len(marks)
    # What does not change the rows does not change the fingerprint.
    assert mark(chat_tokenizer, model={"path": "none", "chat_template": "none"}) == marks[0]
    assert mark(mixture={"n_rows": 3}, training={"rank": 2}) == marks[0]
    # Other content of the same size, at the same time.
    before = file.stat()
    write_jsonl(file, questions(10, "grape"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert mark() not in marks


def test_an_incomplete_cache_is_made_anew(tmp_path, study, plain_tokenizer):
    write_jsonl(tmp_path / "a.jsonl", questions(10))
    config = study({"name": "a", "source": "a.jsonl"})
    (good,) = prepare_domains(config, plain_tokenizer)
    expected = prompts(good.train)
    for break_it in (
        lambda folder: (folder / "meta.json").unlink(),
        lambda folder: (folder / "meta.json").write_text("{"),
        lambda folder: (folder / "train.arrow").write_bytes((folder / "train.arrow").read_bytes()[:200]),
        lambda folder: (folder / "validation.arrow").unlink(),
    ):
        break_it(good.folder)
        with pytest.raises(DataError, match=r"not a prepared domain|not a file of tokenised rows"):
            open_domain(good.folder)
        (again,) = prepare_domains(config, plain_tokenizer)
        assert prompts(again.train) == expected
    assert [p.name for p in cache_folder(config).iterdir()] == [good.folder.name]


def test_a_cache_with_other_rows_than_it_says(tmp_path, study, plain_tokenizer):
    write_jsonl(tmp_path / "a.jsonl", questions(10))
    (domain,) = prepare_domains(study({"name": "a", "source": "a.jsonl"}), plain_tokenizer)
    (domain.folder / "validation.arrow").replace(domain.folder / "train.arrow")
    (domain.folder / "validation.arrow").write_bytes((domain.folder / "train.arrow").read_bytes())
    with pytest.raises(DataError, match=r"holds 1 \+ 1 rows, not the number it was made with"):
        open_domain(domain.folder)


def test_a_killed_preparation_leaves_nothing_that_is_read(tmp_path, study, plain_tokenizer, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", questions(10))
    config = study({"name": "a", "source": "a.jsonl"})

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_write_meta", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_domains(config, plain_tokenizer)
    assert list(cache_folder(config).iterdir()) == []
    old = cache_folder(config) / "a-0123456789abcdef.tmp-dead"
    old.mkdir()
    os.utime(old, (0, 0))
    young = cache_folder(config) / "a-0123456789abcdef.tmp-alive"
    young.mkdir()
    assert len(prepare_domains(config, plain_tokenizer)[0].train) == 9
    assert not old.exists()
    assert young.exists()


def test_two_processes_at_once_are_harmless(tmp_path, study, plain_tokenizer, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", questions(10))
    config = study({"name": "a", "source": "a.jsonl"})
    write_meta = prepare_module._write_meta

    def other_is_quicker(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(prepare_module, "_write_meta", write_meta)
            prepare_domains(config, plain_tokenizer)
        write_meta(*arguments)

    monkeypatch.setattr(prepare_module, "_write_meta", other_is_quicker)
    (domain,) = prepare_domains(config, plain_tokenizer)
    assert len(domain.train) == 9
    assert [p.name for p in cache_folder(config).iterdir()] == [domain.folder.name]


def test_a_source_that_changes_while_it_is_read(tmp_path, study, plain_tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", questions(10))

    def append(*_):
        with file.open("a") as out:
            out.write("\n")

    with pytest.raises(DataErrors, match=r"domains\[0\] \(a\): a source was changed while it was read"):
        prepare_domains(study({"name": "a", "source": "a.jsonl"}), plain_tokenizer, on_progress=append)


def test_another_process_reads_the_same_rows(tmp_path, study, chat_tokenizer):
    write_jsonl(tmp_path / "a.jsonl", questions(20))
    (domain,) = prepare_domains(study({"name": "a", "source": "a.jsonl"}), chat_tokenizer)
    code = (
        "import json, sys; from pathlib import Path; from duet_ray.domains import open_domain\n"
        "d = open_domain(Path(sys.argv[1]), index=3)\n"
        "rows = d.train.rows(range(len(d.train)))\n"
        "print(json.dumps([d.index, d.fingerprint, [[r.input_ids.tolist(), r.loss_mask.tolist()] for r in rows]]))\n"
        "assert not {'torch', 'ray', 'transformers', 'datasets'} & set(sys.modules), sorted(sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, str(domain.folder)], check=True, capture_output=True, text=True
    )
    here = [[r.input_ids.tolist(), r.loss_mask.tolist()] for r in domain.train.rows(range(18))]
    assert json.loads(output.stdout) == [3, domain.fingerprint, here]


def test_a_domain_can_be_pickled(tmp_path, study, plain_tokenizer):
    import pickle

    write_jsonl(tmp_path / "a.jsonl", questions(10))
    (domain,) = prepare_domains(study({"name": "a", "source": "a.jsonl"}), plain_tokenizer)
    copy = pickle.loads(pickle.dumps(domain))
    assert isinstance(copy, Domain)
    assert prompts(copy.train) == prompts(domain.train)


# Bad rows


def test_bad_rows_are_counted_and_the_first_ten_shown(tmp_path, study, plain_tokenizer):
    bad = [{"prompt": "q", "completion": ""}] * 12
    rows = [*questions(5), *bad, {"prompt": "two " * 50, "completion": "four"}, *questions(5, "pear")]
    write_jsonl(tmp_path / "data/a.jsonl", rows)
    training = {"max_tokens": 40}
    with pytest.raises(DataErrors) as error:
        prepare_domains(study({"name": "a", "source": "data/a.jsonl"}, training=training), plain_tokenizer)
    lines = str(error.value).splitlines()
    assert lines[0] == "domains[0] (a): 13 of 23 rows are bad, more than data.max_bad_rows = 0.01 allows:"
    assert lines[1] == "  data/a.jsonl:6 completion is empty: nothing to learn"
    assert lines[10:] == ["  data/a.jsonl:15 completion is empty: nothing to learn", "  … and 3 more"]
    for most in (13, 0.6):
        config = study({"name": "a", "source": "data/a.jsonl"}, training=training, data={"max_bad_rows": most})
        (domain,) = prepare_domains(config, plain_tokenizer)
        assert (domain.report.n_read, domain.report.n_bad, len(domain.report.bad)) == (23, 13, 10)
        assert len(domain.train) + len(domain.validation) == 10


def test_bad_rows_stand_in_the_order_of_the_file(tmp_path, study, plain_tokenizer):
    rows = [{"prompt": "two " * 50, "completion": "x"}, {"prompt": "q", "completion": 1}, *questions(3)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    config = study({"name": "a", "source": "a.jsonl"}, training={"max_tokens": 40}, data={"max_bad_rows": 2})
    (domain,) = prepare_domains(config, plain_tokenizer)
    assert [str(row) for row in domain.report.bad] == [
        "a.jsonl:1 nothing left to predict within training.max_tokens = 40 of its 54 tokens",
        "a.jsonl:2 column 'completion' must be text, got int",
    ]


@pytest.mark.parametrize(("n_bad", "most", "fine"), [(1, 1, True), (2, 1, False), (1, 0.01, True), (2, 0.01, False),
                                                     (2, 2.0, True), (0, 0, True), (1, 0, False)])  # fmt: skip
def test_max_bad_rows_is_a_number_or_a_share(tmp_path, study, plain_tokenizer, n_bad, most, fine):
    write_jsonl(tmp_path / "a.jsonl", questions(3))
    report = prepare_domains(study({"name": "a", "source": "a.jsonl"}), plain_tokenizer)[0].report
    report = replace(report, n_read=100, n_bad=n_bad)
    if fine:
        check_bad_rows(report, most)
    else:
        with pytest.raises(DataError, match=f"{n_bad} of 100 rows are bad"):
            check_bad_rows(report, most)


def test_the_problems_of_all_domains_at_once(tmp_path, study, plain_tokenizer):
    write_jsonl(tmp_path / "good.jsonl", questions(5))
    write_jsonl(tmp_path / "one.jsonl", questions(1))
    write_jsonl(tmp_path / "same.jsonl", questions(1) * 4)
    write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "q", "completion": None}])
    (tmp_path / "empty.jsonl").write_text("\n")
    config = study(
        {"name": "good", "source": "good.jsonl"},
        {"name": "gone", "source": ["godo.jsonl", "data/*.jsonl"]},
        {"name": "one", "source": "one.jsonl"},
        {"name": "same", "source": "same.jsonl"},
        {"name": "bad", "source": "bad.jsonl"},
        {"name": "empty", "source": "empty.jsonl"},
        {"name": "alpaca", "source": "good.jsonl", "format": "alpaca"},
        {"name": "typo", "source": "good.jsonl", "columns": {"promt": "prompt"}},
        data={"max_bad_rows": 5},
    )
    with pytest.raises(DataErrors) as error:
        prepare_domains(config, plain_tokenizer)
    assert [str(e) for e in error.value.errors] == [
        f"domains[1].source (gone): 'godo.jsonl': there is no file {tmp_path}/godo.jsonl; did you mean good.jsonl?",
        f"domains[1].source (gone): 'data/*.jsonl': there is no folder {tmp_path}/data",
        "domains[2] (one): has one row, and a validation set needs two different ones: add rows or set "
        "data.validation_fraction: 0",
        "domains[3] (same): has 4 rows that are all the same, and a validation set needs two different ones: add rows "
        "or set data.validation_fraction: 0",
        "domains[4] (bad): no good row among 1; the first: bad.jsonl:1 column 'completion' is null",
        "domains[5] (empty): no rows in empty.jsonl",
        "domains[6] (alpaca): columns 'instruction', 'output' not found in any row; columns there: prompt, completion; "
        "set domains[6].columns, e.g. domains[6].columns: {instruction: <the column in your file>}, or another format",
        "domains[7] (typo): domains[7].columns: promt: no such column in format prompt_completion; a map goes from "
        "ours (prompt, completion) to those in your file",
    ]


# The split


def test_the_split_does_not_depend_on_the_order_of_domains(tmp_path, study, plain_tokenizer):
    a = {"name": "a", "source": str(write_jsonl(tmp_path / "a.jsonl", questions(50)))}
    b = {"name": "b", "source": str(write_jsonl(tmp_path / "b.jsonl", questions(50)))}
    first = prepare_domains(study(a, b), plain_tokenizer)
    second = prepare_domains(study(b, a, storage="elsewhere"), plain_tokenizer)
    assert [d.index for d in second] == [0, 1]
    assert prompts(first[0].validation) == prompts(second[1].validation)
    assert prompts(first[0].validation) != prompts(first[1].validation)
    other = prepare_domains(study(a, seed=1), plain_tokenizer)
    assert prompts(other[0].validation) != prompts(first[0].validation)


def test_no_validation_set_when_none_is_asked_for(tmp_path, study, plain_tokenizer):
    write_jsonl(tmp_path / "a.jsonl", questions(1))
    config = study({"name": "a", "source": "a.jsonl"}, data={"validation_fraction": 0})
    (domain,) = prepare_domains(config, plain_tokenizer)
    assert (len(domain.train), len(domain.validation)) == (1, 0)
    assert domain.validation.n_tokens.tolist() == []


def test_copies_are_counted_and_stay_in_training(tmp_path, study, plain_tokenizer):
    rows = questions(20) + questions(10) * 2
    write_jsonl(tmp_path / "a.jsonl", rows)
    config = study({"name": "a", "source": "a.jsonl"}, data={"validation_fraction": 0.2})
    (domain,) = prepare_domains(config, plain_tokenizer)
    assert domain.report.n_duplicates == 20
    assert len(domain.validation) == 8
    assert not set(prompts(domain.train)) & set(prompts(domain.validation))
    assert len(domain.train) == 32


@pytest.mark.parametrize("seed", range(20))
def test_held_out_in_every_case(seed):
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, rng.integers(2, 30), size=rng.integers(2, 40)).astype(np.uint64)
    if len(set(keys)) < 2:
        keys[0] = 99
    fraction = rng.uniform(0.01, 0.49)
    chosen = held_out(keys, fraction, np.random.default_rng(seed))
    assert 1 <= chosen.sum() < len(keys)
    assert not set(keys[chosen]) & set(keys[~chosen])
    if all((keys == k).sum() == 1 for k in keys):
        assert chosen.sum() == max(1, round(fraction * len(keys)))
    assert np.array_equal(chosen, held_out(keys, fraction, np.random.default_rng(seed)))


def test_held_out_where_every_row_has_a_copy():
    chosen = held_out(np.array([1, 1, 1, 2, 2], dtype=np.uint64), 0.1, np.random.default_rng(0))
    assert chosen.tolist() == [False, False, False, True, True]


def test_held_out_two_rows():
    assert held_out(np.array([1, 2], dtype=np.uint64), 0.01, np.random.default_rng(0)).sum() == 1


def test_tokenizers_that_differ_have_other_identities(plain_tokenizer):
    assert tokenizer_identity(plain_tokenizer) == tokenizer_identity(make_tokenizer())
    assert tokenizer_identity(plain_tokenizer) != tokenizer_identity(make_tokenizer(bos=True))


def test_some_rows_of_a_source_and_a_bound_on_bad_rows_of_its_own(tmp_path, study, plain_tokenizer):
    rows = questions(12)
    rows[1] = rows[3] = {"prompt": "p", "completion": ""}
    write_jsonl(tmp_path / "a.jsonl", rows)
    every = {"name": "a", "source": "a.jsonl", "max_bad_rows": 2}
    (whole,) = prepare_domains(study(every), plain_tokenizer)
    assert (whole.report.n_read, whole.report.n_bad) == (12, 2)
    (half,) = prepare_domains(study({**every, "rows": "::2"}), plain_tokenizer)
    assert half.fingerprint != whole.fingerprint
    seen = prompts(half.train) + prompts(half.validation)
    assert sorted(seen) == sorted(q["prompt"] for q in questions(12)[::2])
    (other,) = prepare_domains(study({**every, "rows": "1:8:2"}), plain_tokenizer)
    assert sorted(t["line"] for t in other.train.texts(range(len(other.train)))) <= [6, 8]
    assert other.report.n_read == 4
    with pytest.raises(DataErrors, match=r"2 of 12 rows are bad, more than domains\[0\].max_bad_rows = 0.1 allows"):
        prepare_domains(study({**every, "max_bad_rows": 0.1}), plain_tokenizer)
    with pytest.raises(DataErrors, match=r"2 of 12 rows are bad, more than data.max_bad_rows = 0.01 allows"):
        prepare_domains(study({"name": "a", "source": "a.jsonl"}), plain_tokenizer)
