"""Which store is a study's: the one that the study file names, or the one that the study's folder remembers.

Every run leaves the study file, with all its defaults, in the study's folder, and `store` there says where the study
was kept. So a folder is enough to read a study. And a study file that names another store than the folder remembers
is looked at twice: a study that was moved goes on, and none is started anew over one that has begun.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from duet_ray.errors import StoreError
from duet_ray.store.store import NoStudy, Store


@dataclass(frozen=True, kw_only=True)
class _Remembered:
    """What a study's folder says of its store."""

    name: str
    url: str | None


def open_folder(folder: Path) -> Store:
    """The store of the study in a folder, wherever it is.

    Raises:
        StoreError: there is no study in the folder, or its store cannot be read.
    """
    remembered = _remembered(folder)
    if remembered is None:
        return Store(folder)  # which says so
    if remembered.url is not None and remembered.name != folder.name:
        raise StoreError(
            f"{folder}: this is the folder of study {remembered.name}, which is kept under that name in "
            f"{remembered.url}; call the folder {remembered.name} again"
        )
    return Store(folder, url=remembered.url)


def open_store(folder: Path, url: str | None, *, create: bool = False) -> Store:
    """The store that a study file names.

    Args:
        folder: the study's.
        url: `store` of the study file.

    Raises:
        StoreError: as of `Store`; or the study was kept elsewhere, and has not been moved to the store named now.
    """
    remembered = _remembered(folder)
    if remembered is not None and _place(folder, remembered.url) != _place(folder, url):
        _refuse_another_start(folder, url, remembered)
    return Store(folder, create=create, url=url)


def find_store(folder: Path, url: str | None) -> Store | None:
    """The store that a study file names; None where there is none yet. Raises as `open_store` does."""
    try:
        return open_store(folder, url)
    except NoStudy:
        return None


def _refuse_another_start(folder: Path, url: str | None, remembered: _Remembered) -> None:
    here = _n_drivers(folder, url)
    said = ""
    try:
        there = _n_drivers(folder, remembered.url)
    except StoreError as error:
        there, said = 1, f"\n(not to be read now: {error})"  # What is known is that it was there.
    if here >= there:
        return
    holds = f"an older copy of it, of {here} sessions instead of {there}" if here else "no study of that name"
    raise StoreError(
        f"study {folder.name} was last kept in {_place(folder, remembered.url)}, and the study file names another "
        f"store, {_place(folder, url)}, which holds {holds}: set `store: {remembered.url or 'null'}`, or move the "
        f"study's database there first, or give the study another name to start anew{said}"
    )


def _n_drivers(folder: Path, url: str | None) -> int:
    """How many drivers a study has had; 0 where none has started."""
    try:
        store = Store(folder, url=url)
    except NoStudy:
        return 0
    try:
        return store.n_drivers() if store.study() is not None else 0
    finally:
        store.close()


def _remembered(folder: Path) -> _Remembered | None:
    """None where no study has run."""
    try:
        data = yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        data = None
    if isinstance(data, Mapping) and isinstance(data.get("store"), str):
        return _Remembered(name=str(data.get("name", folder.name)), url=data["store"])
    if (folder / "study.db").is_file():
        return _Remembered(name=folder.name, url=None)
    return None


def _place(folder: Path, url: str | None) -> str:
    if url is None:
        return str((folder / "study.db").resolve())
    if url.startswith("sqlite:///"):
        return str(Path(url.removeprefix("sqlite:///")).resolve())
    return url
