"""Keeps scores on disk: computed once per (domain, model, method, settings, seed), reused by every trial and study.

    <folder>/weights/<domain>-<fingerprint>/weights.npz    scores, probabilities, order: those that there are
                                            weights.json   notes, details, the weighting, SHA-256 of the arrays

A folder is written under another name, flushed to the disk and renamed, and its arrays are checked against their hash
on the way in: one that is half written or damaged is never read, but scored again. No pickle is written or read.

What is made of the scores is no part of the fingerprint: another temperature, another weighting, or `remove_harmful`
in place of `influence`, takes the stored scores within milliseconds instead of scoring again for hours.
"""

import hashlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from duet_ray.config import SelectionConfig, StudyConfig, fingerprint
from duet_ray.files import new_folder, remove_stale, write_file, write_json
from duet_ray.selection.base import RowWeights
from duet_ray.selection.methods import method_of, n_drawn, settings_read
from duet_ray.selection.weighting import from_scores

FORMAT = 2
"""Raised when a method's meaning changes, so that scores of an older version are not reused."""

ARRAYS, ABOUT = "weights.npz", "weights.json"

_NAMES = ("scores", "probabilities", "order")
_EDGE = 1 << 20
_WEIGHT_FILES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_NOT_IN_FIT = {
    "epochs",
    "micro_batch_size",
    "gradient_checkpointing",
    "max_tokens",
    "loss_on",
    "method",
    "fuse",
    "zero",
    "checkpoint_minutes",
}
"""Settings that change no score by more than rounding, or are in the domain's fingerprint or the key already."""

_KEY = re.compile(r"(?P<place>(?P<domain>.+)-[0-9a-f]{16})-(?P<use>plain|shift|rank|top|softmax-[^-]+.*|drop-[^-]+.*)")


def weights_key(domain: Any, config: StudyConfig, identity: str | None = None) -> str:
    """The key of a domain's weights: `"chats-0123456789abcdef-softmax-0.5"`.

    Args:
        domain: a `duet_ray.domains.Domain`, tokenised for the model that scores it. Studies that share a domain share
            its scores: its place in the study counts only where an order ends at the most rows that may be drawn.
        identity: `model_identity` of the model that scores, where it is known already.
    """
    settings, method = config.selection, method_of(config.selection)
    inputs: dict[str, Any] = {
        "format": FORMAT,
        "domain": domain.fingerprint,
        "method": method.scores_of or settings.method,
    }
    if method.needs_model:
        read = settings_read(settings)
        inputs |= {
            "settings": settings.model_dump(mode="json", include=set(read) - {"surrogate", "examples"}),
            "model": identity or model_identity(config.for_scoring),
            "seed": config.seed,
        }
        if method.fits:
            # LESS and TracIn have a number of epochs of their own.
            default = None if settings.method in ("less", "tracin") else config.training.epochs
            own = {**settings.fit.given, "epochs": settings.epochs or default, "method": "lora"}
            inputs["training"] = config.training.model_dump(mode="json", exclude=_NOT_IN_FIT) | own
            if config.training.layers is None:
                del inputs["training"]["layers"]  # as before there was such a setting
        if method.gives == "order":
            inputs["n_drawn"] = n_drawn(config, domain.index, len(domain.train))
        if settings.embedding_model and "embedding_model" in read:
            inputs["embedding_model"] = _path_identity(config, settings.embedding_model, None)
        if settings.examples and "examples" in read:
            inputs["examples"] = hashlib.sha256(config.resolve_path(settings.examples).read_bytes()).hexdigest()
    return f"{domain.name}-{fingerprint(inputs)}-{_use(settings)}"


def _use(settings: SelectionConfig) -> str:
    """What is made of the scores, as the end of a key."""
    if method_of(settings).gives != "scores":
        return "plain"
    if settings.method == "top_n":
        return "top"
    if settings.method == "remove_harmful":
        return f"drop-{settings.harmful_fraction!r}"
    weighting = settings.weighting
    return f"softmax-{weighting.temperature!r}" if weighting.kind == "softmax" else weighting.kind


def _settings_of(use: str) -> SelectionConfig:
    """The settings that `_use` made a name of, as far as `from_scores` needs them."""
    kind, _, number = use.partition("-")
    if kind == "top":
        return SelectionConfig(method="top_n")
    if kind == "drop":
        return SelectionConfig(method="remove_harmful", harmful_fraction=float(number))
    weighting = {"kind": kind, **({"temperature": float(number)} if number else {})}
    return SelectionConfig.model_validate({"method": "influence", "weighting": weighting})


def _parse(key: str) -> tuple[str, str, str]:
    """(domain, name of the folder, what is made of the scores) of a key."""
    match = _KEY.fullmatch(key)
    assert match is not None, f"not a key of weights: {key}"
    return match["domain"], match["place"], match["use"]


def model_identity(config: StudyConfig) -> str:
    """What tells one base model from another without reading all of it.

    For a local folder a hash over config.json and, of every weight file, its name, its size and its first and last MiB
    (of a safetensors file that includes the header), so that moving the folder changes nothing. For a hub id the id
    and the revision: without a pinned revision, a model that moves on upstream goes unnoticed.
    """
    model = config.model
    return f"{_path_identity(config, model.path, model.revision)}:{model.dtype}"


def _path_identity(config: StudyConfig, path: str, revision: str | None) -> str:
    folder = config.resolve_path(path)
    if not folder.is_dir():
        return f"{path}@{revision or 'main'}"
    digest = hashlib.sha256()
    files = [folder / "config.json", *sorted(f for f in folder.iterdir() if f.suffix in _WEIGHT_FILES)]
    for file in filter(Path.is_file, files):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_EDGE))
            stream.seek(max(0, size - _EDGE))
            digest.update(stream.read(_EDGE))
    return f"folder:{digest.hexdigest()[:32]}"


def load_weights(folder: Path, key: str) -> RowWeights | None:
    """The stored weights, made anew from the scores if `key` asks for another use; None if there are none whole."""
    domain, name, wanted = _parse(key)
    place = Path(folder) / "weights" / name
    try:
        about = json.loads((place / ABOUT).read_text(encoding="utf-8"))
        data = (place / ARRAYS).read_bytes()
        if hashlib.sha256(data).hexdigest() != about["sha256"]:
            return None
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in _NAMES if name in arrays}
        stored = str(about["use"])
        notes, details = tuple(about["notes"]), dict(about["details"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if stored != wanted and "scores" in found:
        stale = from_scores(found["scores"], _settings_of(stored), domain).notes
        fresh = from_scores(found["scores"], _settings_of(wanted), domain)
        found = {n: v for n in _NAMES if (v := getattr(fresh, n)) is not None}
        notes = (*(n for n in notes if n not in stale), *fresh.notes)
    return RowWeights(**found, notes=notes, details=details)


def save_weights(folder: Path, key: str, weights: RowWeights) -> Path:
    """Store weights under `<folder>/weights`, whole or not at all. What is there already and whole is kept.

    Returns:
        The folder they lie in.
    """
    domain, name, use = _parse(key)
    parent = Path(folder) / "weights"
    place = parent / name
    stream = io.BytesIO()
    np.savez(stream, **{n: getattr(weights, n) for n in _NAMES if getattr(weights, n) is not None})
    data = stream.getvalue()
    if place.exists() and load_weights(folder, key) is None:
        shutil.rmtree(place)
    if not place.exists():
        remove_stale(parent, f"{domain}-*")
        with new_folder(place) as work:
            write_file(work / ARRAYS, data)
            about = {
                "domain": domain,
                "use": use,
                "notes": list(weights.notes),
                "details": weights.details,
                "effective_sample_size": weights.effective_sample_size,
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            write_json(work / ABOUT, about)
    return place
