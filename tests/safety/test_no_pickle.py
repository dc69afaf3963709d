"""The search for pickles finds them, wherever they hide, and nothing else."""

import gzip
import io
import json
import pickle
import sqlite3
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.safety.no_pickle import assert_no_pickle

DATA = {"a": [1, 2.5, "three"], "b": None}


def zipped(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("inner/data", content)
    return stream.getvalue()


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def array(value: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, value, allow_pickle=True)
    return stream.getvalue()


PICKLES = {
    **{f"protocol {n}": pickle.dumps(DATA, protocol=n) for n in range(6)},
    "of one number": pickle.dumps(1),
    "of many numbers": pickle.dumps(list(range(100_000))),
    "broken off": pickle.dumps(list(range(1000)))[:-10],
    "of torch": saved({"w": torch.zeros(3)}),
    "in an archive": zipped(pickle.dumps(DATA)),
    "compressed": gzip.compress(pickle.dumps(DATA)),
    "of objects": array(np.array([DATA, None], dtype=object)),
    "behind other bytes": b"header " * 100 + pickle.dumps(DATA) + b" tail",
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_are_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "harmless.json").write_bytes(PICKLES[name])
    with pytest.raises(AssertionError, match=r"harmless\.json"):
        assert_no_pickle(tmp_path)


def test_a_pickle_in_a_database_is_found(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "study.db")
    connection.execute("CREATE TABLE trial (number INTEGER, state BLOB)")
    connection.execute("INSERT INTO trial VALUES (1, ?)", [b"\0\1\2"])
    connection.commit()
    assert assert_no_pickle(tmp_path) == 1
    connection.execute("INSERT INTO trial VALUES (2, ?)", [pickle.dumps(DATA)])
    connection.commit()
    connection.close()
    with pytest.raises(AssertionError, match=r"trial, row 1"):
        assert_no_pickle(tmp_path)


def test_a_name_is_enough(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(AssertionError, match=r"\.pt"):
        assert_no_pickle(tmp_path)


def test_other_files_pass(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(DATA))
    (tmp_path / "b.txt").write_text("(dp0 is how an old pickle begins, and this text does not.")
    (tmp_path / "c.html").write_text("<html>.</html>")
    (tmp_path / "empty").write_bytes(b"")
    generator = torch.Generator().manual_seed(0)
    save_file({"w": torch.randn(200_000, generator=generator)}, tmp_path / "d.safetensors")
    np.savez(tmp_path / "e.npz", a=np.arange(1000.0), b=np.array(["x", "yz"]))
    for length in range(600, 680):  # a header of 640 bytes looks like the first opcode of a pickle
        (tmp_path / f"{length}.safetensors").write_bytes(length.to_bytes(8, "little") + b" " * length)
    assert assert_no_pickle(tmp_path) == 86
