import os

import pytest

from duet_ray.domains import prepare_domains
from duet_ray.errors import DataErrors
from tests.domains.domain_toys import questions, write_jsonl


def test_globs_are_sorted_and_files_count_once(tmp_path, study, plain_tokenizer):
    for name in ("b", "a", "c"):
        write_jsonl(tmp_path / f"data/{name}.jsonl", questions(3, name))
    write_jsonl(tmp_path / "data/deep/d.jsonl", questions(3, "d"))
    config = study({"name": "x", "source": ["data/c.jsonl", "data/**/*.jsonl"]}, data={"validation_fraction": 0})
    (domain,) = prepare_domains(config, plain_tokenizer)
    shown = [t["source"] for t in domain.train.texts(range(12))]
    assert shown == [f"data/{n}.jsonl" for n in ("c", "a", "b", "deep/d") for _ in range(3)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data", "data is a folder; name its files, e.g. data/*.jsonl"),
        ("data/chat.jsonl", "data/chat.jsonl; did you mean chats.jsonl or chats.txt?"),
        ("date/chats.jsonl", "there is no folder {}/date; did you mean data?"),
        ("data/*.csv", "nothing matches {}/data/*.csv"),
        ("data/chats.txt", "unknown kind of file '.txt'; must be one of .jsonl,"),
    ],
)
def test_sources_that_are_not_there(tmp_path, study, plain_tokenizer, source, message):
    write_jsonl(tmp_path / "data/chats.jsonl", questions(3))
    (tmp_path / "data/chats.txt").write_text("x")
    with pytest.raises(DataErrors) as error:
        prepare_domains(study({"name": "x", "source": source}), plain_tokenizer)
    assert str(error.value).startswith(f"domains[0].source (x): {source!r}: ")
    assert message.format(tmp_path) in str(error.value)


@pytest.mark.timeout(30)
def test_links_that_form_rings_end(tmp_path, study, plain_tokenizer):
    write_jsonl(tmp_path / "data/deep/a.jsonl", questions(3, "a"))
    write_jsonl(tmp_path / "elsewhere/b.jsonl", questions(3, "b"))
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    for name in ("one", "two", "three"):
        (tmp_path / "data/deep" / name).symlink_to(tmp_path / "data")
    (tmp_path / "data/itself.jsonl").symlink_to(tmp_path / "data/itself.jsonl")
    config = study({"name": "x", "source": "data/**/*.jsonl"}, data={"validation_fraction": 0})
    (domain,) = prepare_domains(config, plain_tokenizer)
    assert domain.report.n_read == 6, "each file once, through a link to a folder too"


@pytest.mark.parametrize(
    "source", ["n" * 300 + ".jsonl", "~nobody-of-that-name/a.jsonl", "ring/a.jsonl", "file/a.jsonl"]
)
def test_paths_that_nothing_can_have(tmp_path, study, plain_tokenizer, source):
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataErrors) as error:
        prepare_domains(study({"name": "x", "source": source}), plain_tokenizer)
    assert str(error.value).startswith(f"domains[0].source (x): {source!r}: ")


def test_a_file_name_that_is_not_utf8(tmp_path, study, plain_tokenizer):
    (tmp_path / "data").mkdir()
    path = os.path.join(os.fsencode(tmp_path), b"data/\xff.jsonl")
    with open(path, "w") as file:
        file.write('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    (domain,) = prepare_domains(study({"name": "x", "source": "data/*"}), plain_tokenizer)
    assert {t["source"] for t in domain.train.texts([0])} == {"data/\\udcff.jsonl"}
