"""A source → a training and a validation set per domain, tokenised once and memory-mapped.

The data's way through the folder: `sources` (what a study file names) and `hub` → `readers` (raw records, file:line)
→ `formats` (prompts and completions, or a bad row) → `encode` (tokens and loss mask) → `prepare` (split, cache) →
`rows` (Arrow files on disk) → `domain`; `overlap` looks for the task's text in the training rows.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duet_ray.domains.domain import Domain, DomainReport, open_domain
    from duet_ray.domains.encode import EncodedRow, EncodeSettings, encode_rows
    from duet_ray.domains.formats import Message, ParsedRow, read_rows
    from duet_ray.domains.overlap import Overlap, OverlapExample, find_overlap
    from duet_ray.domains.prepare import prepare_domains
    from duet_ray.domains.readers import BadRow, Record, read_records
    from duet_ray.domains.rows import RowSet

_HOMES = {
    "Domain": "domain",
    "DomainReport": "domain",
    "open_domain": "domain",
    "EncodeSettings": "encode",
    "EncodedRow": "encode",
    "encode_rows": "encode",
    "Message": "formats",
    "ParsedRow": "formats",
    "read_rows": "formats",
    "Overlap": "overlap",
    "OverlapExample": "overlap",
    "find_overlap": "overlap",
    "prepare_domains": "prepare",
    "BadRow": "readers",
    "Record": "readers",
    "read_records": "readers",
    "RowSet": "rows",
}

__all__ = [
    "BadRow",
    "Domain",
    "DomainReport",
    "EncodeSettings",
    "EncodedRow",
    "Message",
    "Overlap",
    "OverlapExample",
    "ParsedRow",
    "Record",
    "RowSet",
    "encode_rows",
    "find_overlap",
    "open_domain",
    "prepare_domains",
    "read_records",
    "read_rows",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
