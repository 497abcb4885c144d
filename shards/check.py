"""One shard held against its sidecar and the plan: every byte of the tar, the index, every line of the sidecar."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from alexprep.shards.dataset_format import sample_key, shard_name
from alexprep.shards.image_codec import FORMATS, Codec, read_raw
from alexprep.shards.plan import Shard
from alexprep.shards.sidecar import SIDECAR, sidecar_path
from alexprep.shards.storage import content, json_bytes
from alexprep.shards.tar import Member, dali_index, ending, header
from alexprep.shards.tar_header import BLOCK, padded
from alexprep.shards.worker import attending

_ENTRY = {"key": str, "label": int, "width": int, "height": int, "status": str}  # of each input in a sidecar


class Problem(NamedTuple):
    """Something that is not as `alexprep shard` wrote it.

    Attributes:
        file: below the data set's folder.
        member: the member or sample concerned; empty where it is the file as a whole.
        what: in words.
    """

    file: str
    member: str
    what: str

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.file}{f', {self.member}' if self.member else ''}: {self.what}"


class Finding(NamedTuple):
    """What was found of a shard: its problems, its sidecar if that is sound, and the sha256 of its tar if there is one."""

    shard: Shard
    problems: list[Problem]
    sidecar: dict[str, Any] | None
    sha256: str | None


def check_shard(
    data: Path,
    shard: Shard,
    plan_digest: str,
    options: dict[str, Any],
    planned: pa.Table | None,
    codec: Codec | None,
    condemned: Mapping[int, str],
) -> Finding:
    """Compares a shard with everything that is recorded of it.

    Args:
        data: the data set's folder.
        shard: which.
        plan_digest: what the sidecar must name.
        options: the plan's.
        planned: the shard's rows of plan.parquet; None where they cannot be read.
        codec: decodes every image; None to leave the pixels alone.
        condemned: positions of samples in the shard whose decoding ends the process, and why.
    """
    name = shard_name(shard.split, shard.number)
    base = f"{shard.split}/{name}"
    problems: list[Problem] = []

    def problem(suffix: str, what: str, member: str = "") -> None:
        problems.append(Problem(f"{base}{suffix}", member, what))

    tar, tar_trouble = content(data / shard.split / f"{name}.tar")
    sha256 = None if tar is None else hashlib.sha256(tar).hexdigest()
    sidecar = _sidecar(sidecar_path(data, shard), shard, plan_digest, FORMATS[options["format"]], planned, problem)
    if sidecar is None:
        return Finding(shard, problems, None, sha256)
    members = [Member(**member) for member in sidecar["members"]]
    _check_tar(tar, tar_trouble, sha256, members, sidecar, problem)
    idx, idx_trouble = content(data / shard.split / f"{name}.idx")
    if idx != (dali_index(members).encode() if members else None):
        problem(".idx", idx_trouble or "is not the index of this shard")
    if codec is not None and tar is not None and not problems:
        for position, member in enumerate(members[::2]):
            with attending(position):
                what = condemned.get(position) or _undecodable(codec, tar, member, options)
            if what:
                problem(".tar", what, member.name)
    return Finding(shard, problems, sidecar, sha256)


def _sidecar(
    path: Path, shard: Shard, plan_digest: str, extension: str, planned: pa.Table | None, problem: Any
) -> dict[str, Any] | None:
    """The sidecar, where every line of it agrees with the plan and with the others."""
    raw, trouble = content(path)
    if raw is None:
        problem(".json", f"{trouble}, so the shard does not count")
        return None
    try:
        sidecar = json.loads(raw)
        if json_bytes(sidecar, None) != raw:
            problem(".json", "was changed")
            return None
        if {key: type(value) for key, value in sidecar.items()} != SIDECAR:
            problem(".json", "has other fields than it was written with")
            return None
        if sidecar["plan"] != plan_digest:
            problem(".json", f"belongs to another plan ({str(sidecar['plan'])[:16]}…, not {plan_digest[:16]}…)")
            return None
        what = _disagreement(sidecar, shard, extension, planned)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"was changed ({type(error).__name__}: {error})"
    if what:
        problem(".json", what)
        return None
    return sidecar  # type: ignore[no-any-return]


def _disagreement(sidecar: dict[str, Any], shard: Shard, extension: str, planned: pa.Table | None) -> str | None:
    """Where a sidecar contradicts the plan or itself."""
    entries = sidecar["inputs"]
    if planned is not None:
        labels = planned.column("label").to_pylist()
        if len(entries) != len(labels):
            return f"lists {len(entries)} inputs, the plan has {len(labels)}"
        for entry, label in zip(entries, labels, strict=True):
            if entry["label"] != label:
                return f"gives {entry['key']} the label {entry['label']}, the plan says {label}"
    position, names, sizes = 0, [], []
    for row, entry in enumerate(entries, shard.first_row):
        if entry["status"] not in ("written", "rejected"):
            return f"has the status {entry['status']!r} for row {row}"
        special = {"kept": bool} if entry["status"] == "written" else {"reason": str}
        if {key: type(value) for key, value in entry.items()} != _ENTRY | special:
            return f"has other fields than it was written with for row {row}"
        if max(entry["width"], entry["height"]) >= 2**31:
            return f"gives {entry['key']} the size {entry['width']}x{entry['height']}"
        if entry["key"] != sample_key(row):
            return f"has the key {entry['key']!r} for row {row}"
        if entry["status"] == "written":
            names += [f"{entry['key']}.{extension}", f"{entry['key']}.cls"]
            sizes += [None, len(str(entry["label"]))]
    members = [Member(**member) for member in sidecar["members"]]
    if [member.name for member in members] != names or sidecar["samples"] != len(names) // 2:
        return "lists members that are not those of its samples"
    for member, size in zip(members, sizes, strict=True):
        if member.offset != position + BLOCK or size not in (None, member.size):
            return f"gives {member.name} the place {member.offset} and the size {member.size}, which cannot be"
        position = member.offset + padded(member.size)
    if sidecar["bytes"] != (position + len(ending(position)) if members else 0):
        return f"says {sidecar['bytes']} bytes, its members make another number"
    return None


def _check_tar(
    tar: bytes | None,
    trouble: str,
    sha256: str | None,
    members: list[Member],
    sidecar: dict[str, Any],
    problem: Any,
) -> None:
    if tar is None or not members:
        if members:
            problem(".tar", trouble)
        elif tar is not None:
            problem(".tar", "exists, though every input of this shard was rejected")
        return
    if len(tar) != sidecar["bytes"]:
        first = next((m.name for m in members if m.offset + padded(m.size) > len(tar)), "")
        problem(".tar", f"has {len(tar):,} bytes instead of {sidecar['bytes']:,}", first)
    damaged = 0
    for member, entry in zip(members, _per_member(sidecar), strict=True):
        what = _damage(tar, member, entry["label"])
        if what and sha256 == sidecar["sha256"]:
            problem(".json", "does not describe this member as it is, though the tar is as it was written", member.name)
        elif what:
            problem(".tar", what, member.name)
        damaged += bool(what)
    end = sidecar["bytes"]
    last = members[-1].offset + padded(members[-1].size)
    if len(tar) >= end and any(tar[last:end]):
        problem(".tar", f"has other bytes than zeros in its end, from byte {last:,} on")
    elif sha256 != sidecar["sha256"] and not damaged and len(tar) == end:
        problem(".json", "has another sha256 than the tar, whose members are all as recorded: the sidecar was changed")


def _per_member(sidecar: dict[str, Any]) -> list[dict[str, Any]]:
    written = (entry for entry in sidecar["inputs"] if entry["status"] == "written")
    return [entry for entry in written for _ in range(2)]


def _damage(tar: bytes, member: Member, label: int) -> str | None:
    """What is wrong with the bytes of one member."""
    start, end = member.offset - BLOCK, member.offset + member.size
    if end > len(tar):
        return "lies behind the end of the tar" if start >= len(tar) else "is cut off by the end of the tar"
    if tar[start : member.offset] != header(member.name, member.size):
        return "its header was changed"
    data = tar[member.offset : end]
    if zlib.crc32(data) != member.crc32:
        return "its bytes were changed"
    if member.name.endswith(".cls") and data != str(label).encode():
        return f"says {data[:20]!r}, the label is {label}"
    if any(tar[end : member.offset + padded(member.size)]):
        return "the zeros behind it were changed"
    return None


def _undecodable(codec: Codec, tar: bytes, member: Member, options: dict[str, Any]) -> str | None:
    """Why an image is not a square of the right size; None where it is."""
    data = tar[member.offset : member.offset + member.size]
    size = options["size"]
    pixels = read_raw(data) if options["format"] == "raw" else codec.decode(data)
    if pixels is None:
        return "cannot be decoded"
    if pixels.shape != (size, size, 3) or pixels.dtype != np.uint8:
        return f"holds {pixels.dtype} of shape {pixels.shape}, not a square of {size} pixels"
    return None
