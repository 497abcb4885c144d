"""What goes along with an image: how it is written as `KEY.json` in a shard, and what kinds of values it may have.

A document is a JSON object. Its bytes are a pure function of its values: sorted keys, no blanks, UTF-8. Where a source finds it, the
source knows (`alexprep.shards.sources.base`); docs/formats.md says how each kind of value is written.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Collection, Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

import numpy as np

ALL: Final = "all"
NONE: Final = "none"
EXTENSION: Final = "json"  # of the member of a shard
# Of a document as it is written. Captions, boxes and attributes have far less; DALI and webdataset read it with each sample.
MAX_BYTES = 2**18
MAX_PART_BYTES = 2**22  # of one file or member that documents are made of, of which some fields may be left out


class MetadataError(Exception):
    """Metadata that cannot be taken: damaged, too large, or of unknown types. The message completes "metadata: …"."""


def document_bytes(values: Mapping[str, Any], names: Collection[str] | None = None) -> bytes:
    """A document as it stands in a shard; b"" where it has no values.

    Args:
        values: by name, as Python, numpy or `json` have them: see `_plain` for the kinds.
        names: which are wanted; None for all.

    Raises:
        MetadataError: it is larger than `MAX_BYTES`, or a value is of a kind that has no form in JSON.

    >>> document_bytes({"b": float("nan"), "a": [1, 2.5, b"x"]})
    b'{"a":[1,2.5,{"base64":"eA=="}],"b":null}'
    """
    chosen = {name: values[name] for name in values if names is None or name in names}
    try:
        data = _written({name: _plain(value) for name, value in chosen.items()}) if chosen else b""
    except RecursionError:
        raise MetadataError("it is nested too deeply: leave it out with --metadata") from None
    if len(data) > MAX_BYTES:
        sizes = {name: len(_written(_plain(value))) for name, value in chosen.items()}
        longest = max(sizes, key=lambda name: (sizes[name], name))
        raise MetadataError(
            f"{len(data):,} bytes are more than the limit of {MAX_BYTES:,} ({longest!r} has {sizes[longest]:,}): name with "
            "--metadata what is wanted"
        )
    return data


def parsed(data: bytes, what: str) -> Any:
    """A JSON document that somebody wrote; `what` names it for the MetadataError where it is none."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise MetadataError(f"{what} is no JSON ({error})") from None


def joined(parts: Iterable[tuple[str, bytes]]) -> dict[str, Any]:
    """One document of the files or members that belong to an image, each with its extension in lower case.

    The fields of an object in .json stand at the top; anything else has its extension as its name: JSON where that ends in .json, text
    where it is UTF-8, otherwise bytes.

    >>> joined([("json", b'{"caption": "a cat"}'), ("txt", b"so it is")])
    {'caption': 'a cat', 'txt': 'so it is'}
    """
    values: dict[str, Any] = {}
    for extension, data in parts:
        if len(data) > MAX_PART_BYTES:
            raise MetadataError(f".{extension} has more than {MAX_PART_BYTES:,} bytes")
        value: Any = data
        if extension.rpartition(".")[2] == EXTENSION:
            value = parsed(data, f".{extension}")
        else:
            value = text_or_bytes(data)
        fields = value if extension == EXTENSION and isinstance(value, dict) else {extension: value}
        for name in values.keys() & fields.keys():
            raise MetadataError(f"{name!r} is both a field of .{EXTENSION} and in .{name}: rename one")
        values |= fields
    return values


def text_or_bytes(data: bytes) -> str | bytes:
    """Text where data are some in UTF-8, without NULs; otherwise as they are."""
    try:
        return data if b"\0" in data else data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data


def _written(value: Any) -> bytes:
    def dumped(ascii_only: bool) -> bytes:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=ascii_only
        ).encode()

    try:
        return dumped(False)
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
        return dumped(True)


def _plain(value: Any) -> Any:
    """A value by the kinds that JSON has."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return value if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal | UUID):
        return str(value)
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    raise MetadataError(f"a value of the type {type(value).__name__} has no form in JSON: leave it out with --metadata")
