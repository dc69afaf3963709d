import pytest

from duet_ray.domains import prepare_domains
from duet_ray.errors import DataErrors
from tests.domains.domain_toys import prompts, questions, write_jsonl


def test_a_hub_data_set_from_a_local_copy(tmp_path, study, plain_tokenizer, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cache = str(tmp_path / "hub-cache")
    calls = []
    load = datasets.load_dataset

    def load_local(path, **options):
        calls.append((path, options))
        return load(str(tmp_path / "copy"), cache_dir=cache, split=options["split"])

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    write_jsonl(tmp_path / "copy/train.jsonl", questions(12))
    write_jsonl(tmp_path / "copy/test.jsonl", questions(5, "pear"))
    domain = {"name": "x", "source": "hf:owner/name", "subset": "sub", "split": "test", "revision": "abc"}
    (test,) = prepare_domains(study(domain), plain_tokenizer)
    assert calls == [("owner/name", {"name": "sub", "split": "test", "revision": "abc"})]
    assert sorted(prompts(test.train) + prompts(test.validation)) == [q["prompt"] for q in questions(5, "pear")]
    assert {t["source"] for t in test.train.texts(range(4))} == {"hf:owner/name"}
    (train,) = prepare_domains(study({"name": "x", "source": "hf:owner/name"}), plain_tokenizer)
    assert calls[1] == ("owner/name", {"name": None, "split": "train", "revision": None})
    assert train.report.n_read == 12
    assert train.fingerprint != test.fingerprint
    again = prepare_domains(study({"name": "x", "source": "hf:owner/name"}), plain_tokenizer)[0]
    assert again.fingerprint == train.fingerprint
    write_jsonl(tmp_path / "copy/train.jsonl", questions(12, "grape"))
    (changed,) = prepare_domains(study({"name": "x", "source": "hf:owner/name"}), plain_tokenizer)
    assert changed.fingerprint != train.fingerprint
    assert prompts(changed.train)[0].startswith("what is grape")


def test_a_hub_folder_and_what_is_not_there(tmp_path, study, plain_tokenizer, monkeypatch):
    import datasets

    load = datasets.load_dataset
    cache = str(tmp_path / "hub-cache")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: load(*a, cache_dir=cache, **o))
    turns = [{"from": "human", "value": "how"}, {"from": "gpt", "value": "fine"}]
    rows = [{"conversations": turns, "extra": i} for i in range(3)]
    rows += [{"conversations": turns[:1], "extra": 9}]
    write_jsonl(tmp_path / "copy/train.jsonl", rows)
    local = {"name": "x", "source": "hf:./copy", "format": "sharegpt"}
    sections = {"data": {"validation_fraction": 0, "max_bad_rows": 1}}
    (domain,) = prepare_domains(study(local, **sections), plain_tokenizer)
    assert domain.train.texts([0])[0]["text"] == "User: how\n\nAssistant: fine</s>"
    assert [str(r) for r in domain.report.bad] == ["hf:./copy:4 no assistant turn: nothing to learn"]
    with pytest.raises(DataErrors, match=r"column 'text' not found in any row; columns there: conversations, extra"):
        prepare_domains(study({**local, "format": "text"}, **sections), plain_tokenizer)
    with pytest.raises(DataErrors) as error:
        prepare_domains(study({**local, "split": "tset"}, **sections), plain_tokenizer)
    assert "domains[0] (x): hf:./copy: cannot be loaded (subset (default), split tset, revision (newest))" in str(
        error.value
    )
