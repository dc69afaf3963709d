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
