"""Where trained models are kept: in their samples' folders, or at any place that fsspec can write (S3, GCS, SFTP, …).

A model is known by its *place*, a text that stands in its sample's result and in the store: a path relative to the
study's folder, or a whole URL. So a study whose `artifacts` changes on the way still finds what it kept before.

An object store has no rename. There a model lies in a folder of its own that no other writer uses, and its list of
files (`complete.json`) is written last: without it, or with a file of another size, there is no model.
"""

import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from duet_ray.config import StudyConfig
from duet_ray.errors import ConfigError, DuetError, Problem, StoreError
from duet_ray.files import new_folder, write_file

log = logging.getLogger(__name__)

COMPLETE = "complete.json"
"""Last file of a model at a URL: name → size in bytes of its files."""

NAMES = ("adapter", "model")
"""What trainers call what they leave; see `Trainer.artifact`."""

TRIES, FIRST_WAIT_SECONDS = 5, 1.0
"""A place across a network that does not answer is asked again, each time after twice as long a wait."""

AWAY_SECONDS = 300.0
"""How long nothing is deleted at a place that did not answer."""

MARK_FILE = ".artifacts"
"""In a study's folder: some letters that belong to it alone."""

T = TypeVar("T")


class ModelsUnreachable(DuetError):
    """The place where models are kept does not answer: nobody's failure, and nothing is lost by trying later."""


@dataclass(frozen=True, kw_only=True)
class KeptModels:
    """The models of one study."""

    study_folder: Path
    url: str | None
    """Where the study's models are kept; None: in its folder."""
    _away_until: dict[str, float] = field(default_factory=dict, repr=False, compare=False)
    """Place that did not answer → when deleting there is tried again, on `time.monotonic`."""

    @classmethod
    def of(cls, config: StudyConfig) -> "KeptModels":
        """The models of a study. At a URL they are in a folder that no other study of the same name uses."""
        url = None
        if config.artifacts is not None:
            mark = config.study_folder / MARK_FILE
            name = f"{config.name}-{mark.read_text(encoding='ascii').strip()}" if mark.is_file() else config.name
            url = f"{config.artifacts}/{name}"
        return cls(study_folder=config.study_folder, url=url)

    @staticmethod
    def set_mark(config: StudyConfig) -> None:
        """Give a study the mark that tells its folder at the URL from those of others; once, by its driver."""
        mark = config.study_folder / MARK_FILE
        if config.artifacts is not None and not mark.is_file():
            write_file(mark, uuid.uuid4().hex[:8].encode())

    def keep(self, folder: Path, name: str, write: Callable[[Path], None]) -> str:
        """Keep the model of a sample, all of it or nothing.

        Args:
            folder: the sample's folder.
            name: one of `NAMES`.
            write: writes the model into an empty local folder.

        Returns:
            Its place. Where the URL does not answer that is the sample's folder: a training of hours is not thrown away
            because a network is away for a minute.
        """
        with new_folder(_cleared(folder / name)) as temporary:
            write(temporary)
        if self.url is not None:
            place = f"{self._of_sample(folder)}/{name}-{uuid.uuid4().hex[:8]}"
            try:
                _insist(place, lambda fs, root: _upload(fs, folder / name, root))
            except ModelsUnreachable as error:
                log.warning("the model stays in the study's folder: %s", error)
            else:
                shutil.rmtree(folder / name, ignore_errors=True)
                return place
        return str((folder / name).relative_to(self.study_folder))

    @contextmanager
    def opened(self, place: str) -> Iterator[Path]:
        """A local folder with the model at a place, for as long as the block lasts.

        Raises:
            StoreError: there is none, or not the whole of one.
            ModelsUnreachable: the place does not answer.
        """
        if not is_url(place):
            yield self._local(place)
            return
        with TemporaryDirectory(prefix="duet-model-") as scratch:
            local = Path(scratch)
            _insist(place, lambda fs, root: _download(fs, root, local, place))
            yield local

    def has(self, place: str | None) -> bool:
        """Whether there is a model at a place.

        Raises:
            ModelsUnreachable: the place does not answer.
        """
        if place is None:
            return False
        if not is_url(place):
            return self._local(place).is_dir()
        return bool(_insist(place, lambda fs, root: fs.exists(f"{root}/{COMPLETE}")))

    def remove(self, place: str) -> bool:
        """Delete the model at a place; one that is gone already counts as deleted.

        Returns:
            False when its place does not answer now.
        """
        if not is_url(place):
            shutil.rmtree(self._local(place), ignore_errors=True)
            return True
        return self._tidy(place, _remove)

    def remove_all_but(self, folder: Path, place: str | None) -> None:
        """Delete what lies in a sample's folder, or of it at the URL, beside the model that stands for it.

        That is a model without a value, and what a worker left that was killed, or too late.
        """
        for name in NAMES:
            if str((folder / name).relative_to(self.study_folder)) != place:
                shutil.rmtree(folder / name, ignore_errors=True)
        if self.url is not None:
            self._tidy(self._of_sample(folder), lambda fs, root: _remove_others(fs, root, place))

    def _tidy(self, place: str, do: Callable[[Any, str], None]) -> bool:
        """Delete something, unless its place does not answer: then nothing there is tried again for a while."""
        host = "/".join(place.split("/")[:3])
        if time.monotonic() < self._away_until.get(host, 0.0):
            return False
        try:
            _insist(place, do, tries=1)
        except ModelsUnreachable as error:
            log.warning("not deleted now: %s", error)
            self._away_until[host] = time.monotonic() + AWAY_SECONDS
            return False
        return True

    def check(self) -> None:
        """See that models can be written, read and deleted where they are to be kept.

        Raises:
            ConfigError: they cannot; names the library that is missing, or what the place answered.
        """
        if self.url is None:
            return
        trial = f"{self.url}/.check-{uuid.uuid4().hex[:8]}"

        def write_and_read(fs: Any, root: str) -> None:
            fs.makedirs(root, exist_ok=True)
            fs.pipe_file(f"{root}/here", b"here")
            if fs.cat_file(f"{root}/here") != b"here":
                raise OSError("what was written is not what is read")
            fs.rm(root, recursive=True)

        try:
            _insist(trial, write_and_read, tries=2)
        except ModelsUnreachable as error:
            raise ConfigError([Problem(path="artifacts", message=str(error))]) from error

    def _local(self, place: str) -> Path:
        path = (self.study_folder / place).resolve()
        if not path.is_relative_to(self.study_folder.resolve()):
            raise StoreError(f"{place}: a model's place that leads out of its study's folder")
        return path

    def _of_sample(self, folder: Path) -> str:
        return f"{self.url}/{folder.parent.name}/{folder.name}"


def is_url(place: str) -> bool:
    """Whether a place is not in the study's folder."""
    return "://" in place


def _cleared(folder: Path) -> Path:
    """The same place, with nothing left there of an earlier try."""
    for stale in (folder, *folder.parent.glob(f"{folder.name}.tmp-*")):
        shutil.rmtree(stale, ignore_errors=True)
    return folder


def _insist(place: str, do: Callable[[Any, str], T], *, tries: int = TRIES) -> T:
    """Do something with a place's file system, again when it fails.

    Raises:
        StoreError: as `do` raises it; it is not tried again.
        ModelsUnreachable: it failed every time.
    """
    import fsspec

    wait = FIRST_WAIT_SECONDS
    for attempt in range(1, tries + 1):
        try:
            fs, root = fsspec.core.url_to_fs(place)
            return do(fs, root)
        except StoreError:
            raise
        except ImportError as error:
            raise ModelsUnreachable(f"{place}: {error}") from error
        except Exception as error:  # each file system has exceptions of its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if attempt == tries:
                raise ModelsUnreachable(f"{place} cannot be used: {type(error).__name__}: {reason}") from error
            log.warning("%s does not answer, tried %d of %d times: %s", place, attempt, tries, reason)
            time.sleep(wait)
            wait *= 2
    raise AssertionError("it was tried at least once")


def _upload(fs: Any, local: Path, root: str) -> None:
    files = sorted(path for path in local.rglob("*") if path.is_file())
    sizes = {path.relative_to(local).as_posix(): path.stat().st_size for path in files}
    for name in sizes:
        target = f"{root}/{name}"
        fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        fs.put_file(str(local / name), target)
    fs.pipe_file(f"{root}/{COMPLETE}", json.dumps(sizes).encode())


def _download(fs: Any, root: str, local: Path, place: str) -> None:
    try:
        sizes = json.loads(fs.cat_file(f"{root}/{COMPLETE}"))
    except FileNotFoundError:
        raise StoreError(f"{place}: there is no model here; it was moved or deleted") from None
    for name, size in sizes.items():
        path = (local / name).resolve()
        if not path.is_relative_to(local.resolve()):
            raise StoreError(f"{place}: {COMPLETE} names a file outside its folder: {name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            fs.get_file(f"{root}/{name}", str(path))
        if not path.is_file() or path.stat().st_size != size:
            raise StoreError(f"{place}: {name} is missing or not whole")


def _remove(fs: Any, root: str) -> None:
    # The list of files goes first: what is half deleted is no model any more.
    for path, recursive in ((f"{root}/{COMPLETE}", False), (root, True)):
        with suppress(FileNotFoundError):
            fs.rm(path, recursive=recursive)


def _remove_others(fs: Any, root: str, place: str | None) -> None:
    kept = place.rstrip("/").rpartition("/")[2] if place is not None and is_url(place) else None
    try:
        there = fs.ls(root, detail=False)
    except FileNotFoundError:
        return
    for path in there:
        if path.rstrip("/").rpartition("/")[2] != kept:
            _remove(fs, path)
