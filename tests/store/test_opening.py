"""Which store a study opens: the study file's, the folder's, and when the two differ."""

import shutil
from pathlib import Path

import pytest
import yaml

from duet_ray.config import load_config
from duet_ray.errors import StoreError, StudyChanged
from duet_ray.report.from_store import read_summary
from duet_ray.store import NoStudy, Store, find_store, open_folder, open_store
from duet_ray.study import Study
from tests.store.places import KINDS, Place, place_of
from tests.toy_study import write_toy_study

pytest_plugins = ("tests.store.postgres_fixture",)


def start(folder: Path, url: str | None, *, n_sessions: int = 1) -> None:
    """A study that has begun, with what a run leaves in its folder."""
    for session in range(n_sessions):
        with Store(folder, create=True, url=url).writing() as store:
            if session == 0:
                store.create_study(name=folder.name, config={}, versions={})
        store.close()
    remember(folder, url)


def remember(folder: Path, url: str | None) -> None:
    folder.mkdir(exist_ok=True)
    text = yaml.safe_dump({"name": folder.name, "store": url})
    (folder / "study.yaml").write_text(f"# a head\n{text}", encoding="utf-8")


def file_url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return place_of(request.param, tmp_path, request)


def test_a_folder_is_enough_to_find_the_store(place: Place) -> None:
    with pytest.raises(NoStudy, match="there is no study here"):
        open_folder(place.folder)
    start(place.folder, place.url)
    assert open_folder(place.folder).url == place.url
    assert open_store(place.folder, place.url).study() is not None
    found = find_store(place.folder, place.url)
    assert found is not None
    assert found.study() is not None


def test_where_nothing_has_started_there_is_nothing_to_find(place: Place) -> None:
    assert find_store(place.folder, place.url) is None
    open_store(place.folder, place.url, create=True).close()
    found = find_store(place.folder, place.url)
    assert found is not None
    assert found.study() is None


def test_the_file_of_before_a_move_is_not_read(tmp_path: Path) -> None:
    """`study.db` may be left behind when the study was moved to another store, and went on there."""
    folder, moved = tmp_path / "x", tmp_path / "moved.db"
    start(folder, None)
    shutil.copy(folder / "study.db", moved)
    start_again = open_store(folder, file_url(moved), create=True)
    with start_again.writing():
        remember(folder, file_url(moved))
    assert open_folder(folder).place == str(moved)
    with pytest.raises(
        StoreError, match=r"an older copy of it, of 1 sessions instead of 2: set `store: sqlite:////.*mov"
    ):
        open_store(folder, None, create=True)


@pytest.mark.parametrize("create", [True, False])
def test_a_started_study_is_not_started_anew_elsewhere(tmp_path: Path, create: bool) -> None:
    folder, other = tmp_path / "x", file_url(tmp_path / "other.db")
    start(folder, None)
    with pytest.raises(StoreError) as refused:
        open_store(folder, other, create=create)
    said = str(refused.value)
    assert f"study x was last kept in {folder}/study.db" in said
    assert f"{tmp_path}/other.db, which holds no study of that name: set `store: null`" in said
    assert not (tmp_path / "other.db").exists()
    # Nor back, from a store by URL to the folder.
    start(tmp_path / "y", other)
    with pytest.raises(StoreError, match=r"y/study.db, which holds no study of that name: set `store: sqlite:////"):
        open_store(tmp_path / "y", None, create=create)
    assert not (tmp_path / "y" / "study.db").exists()


def test_a_store_that_is_gone_for_good_is_forgotten_only_with_what_it_held(tmp_path: Path) -> None:
    folder, url = tmp_path / "x", file_url(tmp_path / "gone.db")
    start(folder, url)
    (tmp_path / "gone.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(StoreError, match=r"holds no study of that name(.|\n)*not to be read now: .*gone\.db"):
        open_store(folder, None, create=True)
    (tmp_path / "gone.db").unlink()
    open_store(folder, None, create=True)  # There is nothing to lose.


def test_a_renamed_folder_whose_study_is_kept_elsewhere(tmp_path: Path) -> None:
    start(tmp_path / "x", file_url(tmp_path / "x.db"))
    (tmp_path / "x").rename(tmp_path / "y")
    with pytest.raises(StoreError, match="call the folder x again"):
        open_folder(tmp_path / "y")
    start(tmp_path / "z", None)
    (tmp_path / "z").rename(tmp_path / "w")
    assert open_folder(tmp_path / "w").study() is not None, "its store has moved with it"


@pytest.mark.parametrize("text", ["", "[", "store: 3", "- a list", "\x00", "store: null"])
def test_a_torn_study_file_in_the_folder_leaves_the_file_beside_it(tmp_path: Path, text: str) -> None:
    start(tmp_path / "x", None)
    (tmp_path / "x" / "study.yaml").write_text(text, encoding="utf-8")
    assert open_folder(tmp_path / "x").study() is not None


@pytest.mark.parametrize("url", ["mysql://host/db", "postgresql+psycopg://host:port/db"])
def test_a_store_that_cannot_be(tmp_path: Path, url: str) -> None:
    remember(tmp_path / "x", url)
    with pytest.raises(StoreError, match=r"^store: must "):
        open_folder(tmp_path / "x")


def test_a_whole_study_by_url(place: Place, tmp_path: Path) -> None:
    """From the study file and from the folder alone; with another study file it is refused by its store's name."""
    overrides = [f"name={place.folder.name}", "storage=.", *([f"store={place.url}"] if place.url else [])]
    file = write_toy_study(tmp_path)
    config = load_config(file, overrides)
    with Study(config)._session(None, ends_as="paused"):
        pass
    assert (place.folder / "study.db").exists() is (place.url is None)
    opened = Study.open(place.folder)
    assert opened.config.store == place.url
    assert opened.summary().name == place.folder.name
    assert read_summary(place.folder, config).name == place.folder.name
    where = rf"study {place.folder.name} \(in .*\) was" if place.url else "was"
    with pytest.raises(StudyChanged, match=rf"{where} started with another study file:\n  training.rank: 4 -> 8"):
        Study(load_config(file, [*overrides, "training.rank=8"])).run()
