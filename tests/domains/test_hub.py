import pytest

from duet_ray.domains import prepare_domains
from duet_ray.domains.hub import HubSource
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


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ({"source": "hf:csv"}, "must be hf:owner/name, or hf:./folder for a local copy, got 'csv'"),
        ({"source": "hf:owner/../../name"}, "must be hf:owner/name"),
        ({"source": "hf:"}, "must be hf:owner/name"),
        ({"subset": "../../elsewhere"}, "subset: '../../elsewhere' is not a name that the hub can have"),
        ({"subset": ".."}, "subset: '..' is not"),
        ({"split": "../x"}, "split: '../x' is not"),
        ({"revision": "../../../x"}, "revision: '../../../x' is not"),
        ({"revision": "/x"}, "revision: '/x' is not"),
        ({"revision": ""}, "revision: '' is not"),
    ],
)
def test_names_that_would_lead_out_of_the_cache(study, plain_tokenizer, monkeypatch, domain, message):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: pytest.fail("it must not come to that"))
    with pytest.raises(DataErrors, match=r"^domains\[0\].source \(x\): ") as error:
        prepare_domains(study({"name": "x", "source": "hf:owner/name", **domain}), plain_tokenizer)
    assert message in str(error.value)


@pytest.mark.parametrize("split", ["train", "train[:10%]", "train[5:-1]+test[50%:]", "validation.clean"])
@pytest.mark.parametrize("revision", [None, "main", "refs/convert/parquet", "0123abcd" * 5, "v1.0-rc1"])
def test_names_that_the_hub_has(split, revision):
    HubSource("owner/Name_1.x", name="hf:owner/Name_1.x", subset="20220301.en", split=split, revision=revision)


def test_a_folder_that_would_be_taken_for_the_hubs(tmp_path, study, plain_tokenizer, monkeypatch):
    write_jsonl(tmp_path / "owner/name/train.jsonl", questions(3))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataErrors, match="owner/name would be read in its place"):
        prepare_domains(study({"name": "x", "source": "hf:owner/name"}), plain_tokenizer)
