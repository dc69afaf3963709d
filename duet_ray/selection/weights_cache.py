"""Keeps scores on disk: computed once per (domain, model, method, settings, seed), reused by every trial and study.

    <folder>/weights/<domain>-<fingerprint>/weights.npz    scores, probabilities, order: those that there are
                                            weights.json   notes, details, the weighting, SHA-256 of the arrays

A folder is written under another name, flushed to the disk and renamed, and its arrays are checked against their hash
on the way in: one that is half written or damaged is never read, but scored again. No pickle is written or read.

The weighting (`selection.weighting`) is no part of the fingerprint: another temperature reweighs the stored scores
within milliseconds instead of scoring again for hours.
"""

import hashlib
import io
import json
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from duet_ray.config import StudyConfig, WeightingConfig, fingerprint
from duet_ray.selection.base import RowWeights
from duet_ray.selection.weighting import weigh

FORMAT = 1
"""Raised when a method's meaning changes, so that scores of an older version are not reused."""

_ARRAYS = ("scores", "probabilities", "order")
_EDGE = 1 << 20
_WEIGHT_FILES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_UNUSED_BY_SOLVER: dict[str, set[str]] = {"ekfac": {"cg_iterations", "cg_tolerance"}, "cg": set()}
_NOT_IN_SCORES = {"method", "weighting", "batch_size", "epochs"}
_NOT_IN_FIT = {"epochs", "micro_batch_size", "gradient_checkpointing", "max_tokens", "loss_on"}
"""Settings that change no score by more than rounding, or are in the domain's fingerprint or the key already."""


_KEY = re.compile(r"(?P<scores>.+-[0-9a-f]{16})-(?P<kind>shift|softmax)(?:-(?P<temperature>[0-9.e+-]+))?")


def weights_key(domain: Any, config: StudyConfig, identity: str | None = None) -> str:
    """The key of a domain's weights: `"chats-0123456789abcdef-softmax-0.5"`.

    Args:
        domain: a `duet_ray.domains.Domain`, of which the name and the fingerprint are used. Its place in the study is
            not: studies that share a domain share its scores.
        identity: `model_identity(config)`, where it is known already.
    """
    settings, training = config.selection, config.training
    inputs: dict[str, Any] = {"format": FORMAT, "domain": domain.fingerprint, "method": settings.method}
    if settings.method != "uniform":
        unused = _UNUSED_BY_SOLVER[settings.solver] | _NOT_IN_SCORES
        epochs = settings.epochs or training.epochs
        inputs |= {
            "settings": settings.model_dump(mode="json", exclude=unused),
            "training": training.model_dump(mode="json", exclude=_NOT_IN_FIT) | {"epochs": epochs},
            "model": identity or model_identity(config),
            "seed": config.seed,
        }
    weighting = settings.weighting
    temperature = f"-{weighting.temperature!r}" if weighting.kind == "softmax" else ""
    return f"{domain.name}-{fingerprint(inputs)}-{weighting.kind}{temperature}"


def _parse(key: str) -> tuple[str, str, WeightingConfig]:
    """(domain, name of the folder, weighting) of a key."""
    match = _KEY.fullmatch(key)
    assert match is not None, f"not a key of weights: {key}"
    temperature = {"temperature": float(match["temperature"])} if match["temperature"] else {}
    weighting = WeightingConfig.model_validate({"kind": match["kind"], **temperature})
    return match["scores"][:-17], match["scores"], weighting


def model_identity(config: StudyConfig) -> str:
    """What tells one base model from another without reading all of it.

    For a local folder a hash over config.json and, of every weight file, its name, its size and its first and last MiB
    (of a safetensors file that includes the header), so that moving the folder changes nothing. For a hub id the id
    and the revision: without a pinned revision, a model that moves on upstream goes unnoticed.
    """
    folder = Path(config.model_path)
    if not folder.is_dir():
        return f"{config.model_path}@{config.model.revision or 'main'}:{config.model.dtype}"
    digest = hashlib.sha256()
    files = [folder / "config.json", *sorted(f for f in folder.iterdir() if f.suffix in _WEIGHT_FILES)]
    for file in filter(Path.is_file, files):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_EDGE))
            stream.seek(max(0, size - _EDGE))
            digest.update(stream.read(_EDGE))
    return f"folder:{digest.hexdigest()[:32]}:{config.model.dtype}"


def load_weights(folder: Path, key: str) -> RowWeights | None:
    """The stored weights, reweighed if `key` asks for another weighting; None if there are none that are whole."""
    domain, name, wanted = _parse(key)
    place = Path(folder) / "weights" / name
    try:
        about = json.loads((place / "weights.json").read_text(encoding="utf-8"))
        data = (place / "weights.npz").read_bytes()
        if hashlib.sha256(data).hexdigest() != about["sha256"]:
            return None
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in _ARRAYS if name in arrays}
        weighting = WeightingConfig.model_validate(about["weighting"])
        notes, details = tuple(about["notes"]), dict(about["details"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if weighting != wanted and "scores" in found and "probabilities" in found:
        stale = weigh(found["scores"], weighting, domain)[1]
        found["probabilities"], fresh = weigh(found["scores"], wanted, domain)
        notes = (*(n for n in notes if n not in stale), *fresh)
    return RowWeights(**found, notes=notes, details=details)


def save_weights(folder: Path, key: str, weights: RowWeights) -> Path:
    """Store weights under `<folder>/weights`, whole or not at all. What is there already and whole is kept.

    Returns:
        The folder they lie in.
    """
    domain, name, weighting = _parse(key)
    parent = Path(folder) / "weights"
    place, temporary = parent / name, parent / f".{name}.{uuid.uuid4().hex[:12]}.tmp"
    stream = io.BytesIO()
    np.savez(stream, **{n: getattr(weights, n) for n in _ARRAYS if getattr(weights, n) is not None})
    data = stream.getvalue()
    about = {
        "domain": domain,
        "weighting": weighting.model_dump(mode="json"),
        "notes": list(weights.notes),
        "details": weights.details,
        "effective_sample_size": weights.effective_sample_size,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    temporary.mkdir(parents=True)
    try:
        _write(temporary / "weights.npz", data)
        _write(temporary / "weights.json", json.dumps(about, indent=1, ensure_ascii=False).encode())
        _flush_folder(temporary)
        if place.exists() and load_weights(folder, key) is None:
            shutil.rmtree(place)
        if not place.exists():
            try:
                temporary.rename(place)
            except OSError:  # another writer was first: the key names the content, so its weights are these
                if not place.exists():
                    raise
            _flush_folder(parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return place


def _write(file: Path, data: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
