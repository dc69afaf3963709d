"""Models in the study's folder and at a URL: the same contract, and what a killed writer leaves is no model."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from duet_ray import kept_models
from duet_ray.config import config_from
from duet_ray.errors import ConfigError, StoreError
from duet_ray.kept_models import COMPLETE, KeptModels, ModelsUnreachable
from tests.toy_study import toy_data


def write(folder: Path, text: str = "weights") -> None:
    (folder / "adapter_model.safetensors").write_text(text)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")


def text_of(folder: Path) -> str:
    assert (folder / "tokenizer" / "vocab.json").read_text() == "{}"
    return (folder / "adapter_model.safetensors").read_text()


@pytest.fixture(params=["folder", "file", "memory"])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KeptModels]:
    urls = {"folder": None, "file": f"file://{tmp_path}/elsewhere/toy", "memory": f"memory://{tmp_path.name}/toy"}
    yield KeptModels(study_folder=tmp_path / "studies" / "toy", url=urls[request.param])
    MemoryFileSystem.store.clear()


@pytest.fixture
def sample(models: KeptModels) -> Path:
    folder = models.study_folder / "artifacts" / "t0001" / "s0"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_models, "FIRST_WAIT_SECONDS", 0.001)


def test_a_model_is_kept_opened_and_removed(models: KeptModels, sample: Path) -> None:
    models.check()
    place = models.keep(sample, "adapter", write)
    assert models.has(place)
    assert not models.has(None)
    with models.opened(place) as folder:
        assert text_of(folder) == "weights"
    assert models.remove(place)
    assert not models.has(place)
    assert models.remove(place), "gone already is gone"


def test_a_second_try_takes_the_place_of_the_first(models: KeptModels, sample: Path) -> None:
    first = models.keep(sample, "adapter", write)
    second = models.keep(sample, "adapter", lambda folder: write(folder, "again"))
    with models.opened(second) as folder:
        assert text_of(folder) == "again"
    models.remove_all_but(sample, second)
    assert models.has(second)
    assert models.url is None or not models.has(first)
    models.remove_all_but(sample, None)
    assert not models.has(second)


def test_a_writer_that_dies_leaves_no_model(models: KeptModels, sample: Path) -> None:
    def die(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.keep(sample, "adapter", die)
    assert not (sample / "adapter").exists()
    models.remove_all_but(sample, None)


@pytest.fixture
def at_url(tmp_path: Path) -> KeptModels:
    return KeptModels(study_folder=tmp_path / "studies" / "toy", url=f"file://{tmp_path}/elsewhere/toy")


def on_disk(place: str) -> Path:
    return Path(place.removeprefix("file://"))


def test_the_list_of_files_is_written_last(at_url: KeptModels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that dies between two files leaves none that says it is whole."""
    local = type(fsspec.filesystem("file"))
    put, there = local.put_file, []

    def dying(self: object, *arguments: str, **named: object) -> object:
        there.extend((tmp_path / "elsewhere").rglob(COMPLETE))
        if arguments[0].endswith("vocab.json"):
            raise KeyboardInterrupt
        return put(self, *arguments, **named)

    monkeypatch.setattr(local, "put_file", dying)
    with pytest.raises(KeyboardInterrupt):
        at_url.keep(at_url.study_folder / "artifacts" / "t0001" / "s0", "adapter", write)
    assert list((tmp_path / "elsewhere").rglob("adapter_model.safetensors")), "one file was there"
    assert not there
    assert not list((tmp_path / "elsewhere").rglob(COMPLETE))


def test_half_an_upload_is_no_model(at_url: KeptModels) -> None:
    folder = at_url.study_folder / "artifacts" / "t0001" / "s0"
    for damage in ("list", "file", "size"):
        place = at_url.keep(folder, "adapter", write)
        there = on_disk(place)
        if damage == "list":
            (there / COMPLETE).unlink()
            assert not at_url.has(place)
        elif damage == "file":
            (there / "tokenizer" / "vocab.json").unlink()
        else:
            (there / "adapter_model.safetensors").write_text("weigh")
        with pytest.raises(StoreError, match=r"there is no model here|is missing or not whole"), at_url.opened(place):
            pass


def test_a_list_of_files_cannot_lead_out_of_its_folder(at_url: KeptModels, tmp_path: Path) -> None:
    place = at_url.keep(at_url.study_folder / "artifacts" / "t0001" / "s0", "adapter", write)
    (on_disk(place) / COMPLETE).write_text(json.dumps({"../../escaped": 3}))
    with pytest.raises(StoreError, match="names a file outside its folder"), at_url.opened(place):
        pass
    with pytest.raises(StoreError, match="leads out of its study's folder"):
        at_url.has("../other/artifacts/t0001/s0/adapter")


def test_what_was_kept_before_the_url_is_still_found(at_url: KeptModels) -> None:
    before = KeptModels(study_folder=at_url.study_folder, url=None)
    sample = at_url.study_folder / "artifacts" / "t0001" / "s0"
    sample.mkdir(parents=True)
    place = before.keep(sample, "adapter", write)
    assert place == "artifacts/t0001/s0/adapter"
    with at_url.opened(place) as folder:
        assert text_of(folder) == "weights"
    at_url.remove_all_but(sample, place)
    assert at_url.has(place)


def test_a_place_that_comes_back_and_one_that_does_not(at_url: KeptModels, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = at_url.study_folder / "artifacts" / "t0001" / "s0"
    local = type(fsspec.filesystem("file"))
    put, n_calls = local.put_file, 0

    def flaky(self: object, *arguments: object, **named: object) -> object:
        nonlocal n_calls
        n_calls += 1
        if n_calls < 3:
            raise ConnectionError("the network is away")
        return put(self, *arguments, **named)

    monkeypatch.setattr(local, "put_file", flaky)
    place = at_url.keep(folder, "adapter", write)
    assert at_url.has(place)
    monkeypatch.setattr(local, "put_file", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("for good")))
    stays = at_url.keep(folder, "adapter", write)
    assert stays == "artifacts/t0001/s0/adapter", "a training is not thrown away for that"
    with at_url.opened(stays) as there:
        assert text_of(there) == "weights"
    monkeypatch.setattr(local, "exists", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("for good")))
    with pytest.raises(ModelsUnreachable, match=re.escape("ConnectionError: for good")):
        at_url.has(place)


def test_deleting_waits_for_a_place_that_is_away(at_url: KeptModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """One question, and then none for a while: the driver has other things to do."""
    sample = at_url.study_folder / "artifacts" / "t0001" / "s0"
    places = [at_url.keep(sample, "adapter", write) for _ in range(3)]
    local, asked = type(fsspec.filesystem("file")), []

    def away(*_: object, **__: object) -> None:
        asked.append(1)
        raise ConnectionError("away")

    remove = local.rm
    monkeypatch.setattr(local, "rm", away)
    assert [at_url.remove(place) for place in places] == [False] * 3
    at_url.remove_all_but(sample, places[0])
    assert len(asked) == 1
    monkeypatch.setattr(local, "rm", remove)
    monkeypatch.setattr(kept_models.time, "monotonic", lambda: 1e12)
    assert at_url.remove(places[0])


def test_two_studies_of_one_name_keep_apart(tmp_path: Path) -> None:
    models = []
    for who in ("hers", "his"):
        config = config_from(toy_data(artifacts=f"file://{tmp_path}/bucket"), folder=tmp_path / who)
        config.study_folder.mkdir(parents=True)
        KeptModels.set_mark(config)
        before = KeptModels.of(config).url
        KeptModels.set_mark(config)
        assert KeptModels.of(config).url == before, "once"
        models.append(KeptModels.of(config))
    assert models[0].url != models[1].url
    places = [one.keep(one.study_folder / "artifacts" / "t0001" / "s0", "adapter", write) for one in models]
    models[1].remove_all_but(models[1].study_folder / "artifacts" / "t0001" / "s0", None)
    assert (models[0].has(places[0]), models[1].has(places[1])) == (True, False)


def test_a_place_that_cannot_be_used_is_found_at_once(tmp_path: Path) -> None:
    for url, said in (("nosuch://bucket/x", "Protocol not known: nosuch"), (f"file://{tmp_path}/file/x", "Not a dir")):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(ConfigError, match=r"^artifacts: ") as error:
            KeptModels(study_folder=tmp_path, url=url).check()
        assert said in str(error.value)


def test_an_s3_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol that most clusters have, against a server of its own on loopback."""
    server = pytest.importorskip("moto.server", reason="moto[server] and s3fs are not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        fsspec.filesystem("s3").mkdir("bucket")
        models = KeptModels(study_folder=tmp_path, url="s3://bucket/duet/toy")
        models.check()
        sample = tmp_path / "artifacts" / "t0001" / "s0"
        first, second = (models.keep(sample, "adapter", write) for _ in range(2))
        with models.opened(second) as folder:
            assert text_of(folder) == "weights"
        models.remove_all_but(sample, second)
        assert (models.has(first), models.has(second)) == (False, True)
        assert models.remove(second)
        assert not models.has(second)
    finally:
        running.stop()
        shutil.rmtree(tmp_path, ignore_errors=True)
        os.environ.pop("AWS_ENDPOINT_URL", None)
