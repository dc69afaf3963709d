"""Looks for pickle in what a study leaves behind: by content, in files, in archives and in databases."""

import gzip
import io
import pickletools
import re
import sqlite3
import struct
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

SUFFIXES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".dill"})
FRAME = re.compile(rb"\x80[\x04\x05]\x95")
"""How a pickle of protocol 4 or 5 begins: PROTO, FRAME; the length of the frame follows."""


def assert_no_pickle(folder: Path) -> int:
    """Fail on the first pickle below a folder; the number of files that were looked at."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        for place, what in pickles_in(path):
            raise AssertionError(f"{place}: {what}")
    return len(files)


def pickles_in(path: Path) -> Iterator[tuple[str, str]]:
    """(place, what is there) for everything in a file that is, or holds, a pickle."""
    if path.suffix in SUFFIXES:
        yield str(path), f"a file called {path.suffix}"
    data = path.read_bytes()
    if data.startswith(b"SQLite format 3\0"):
        yield from _in_database(path)
    else:
        yield from _in_bytes(data, str(path))


def _in_bytes(data: bytes, place: str) -> Iterator[tuple[str, str]]:
    if _is_pickle(data):
        yield place, "a pickle"
    for found in FRAME.finditer(data):
        start = found.end()
        length = int.from_bytes(data[start : start + 8], "little") if start + 8 <= len(data) else len(data)
        if length and start + 8 + length <= len(data):
            yield f"{place}, byte {found.start()}", "a pickle inside"
    if data.startswith(b"\x93NUMPY") and _holds_objects(data):
        yield place, "an array of Python objects, which is a pickle"
    if data.startswith(b"\x1f\x8b"):
        yield from _in_bytes(gzip.decompress(data), f"{place}, decompressed")
    if data.startswith(b"PK") and zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                if Path(name).suffix in SUFFIXES:
                    yield f"{place}: {name}", "a file with a pickle's name in an archive"
                yield from _in_bytes(archive.read(name), f"{place}: {name}")


def _is_pickle(data: bytes) -> bool:
    """Whether bytes are opcodes of a pickle from their first on; of a long one its head is enough."""
    n_opcodes = 0
    try:
        for _, _, _ in pickletools.genops(data):
            n_opcodes += 1
            if n_opcodes == 200:
                return True
    except Exception:  # text and numbers fail in many ways
        return data[:1] == b"\x80" and n_opcodes >= 10
    return n_opcodes >= 2


def _holds_objects(data: bytes) -> bool:
    wide = data[6] >= 2
    length = struct.unpack("<I", data[8:12])[0] if wide else struct.unpack("<H", data[8:10])[0]
    header = data[12 if wide else 10 :][:length]
    return b"'descr': '|O" in header or b"'O'" in header


def _in_database(path: Path) -> Iterator[tuple[str, str]]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        connection.text_factory = bytes
        tables = [
            name.decode() for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        for table in tables:
            for number, row in enumerate(connection.execute(f'SELECT * FROM "{table}"')):
                for value in row:
                    if isinstance(value, bytes):
                        yield from _in_bytes(value, f"{path}: {table}, row {number}")
