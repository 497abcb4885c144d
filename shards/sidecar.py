"""A shard's sidecar: what it holds, line by line, and the mark that it is finished."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from alexprep.shards.dataset_format import read_json, shard_name
from alexprep.shards.errors import AlexprepError
from alexprep.shards.plan import Shard
from alexprep.shards.storage import json_bytes, publish_bytes, publish_first

SIDECAR = {"plan": str, "bytes": int, "sha256": str, "samples": int, "members": list, "inputs": list}


def sidecar_path(data: Path, shard: Shard) -> Path:
    """Where a shard's commit mark lies."""
    return data / shard.split / f"{shard_name(shard.split, shard.number)}.json"


def read_sidecar(data: Path, shard: Shard, plan_digest: str) -> dict[str, Any] | None:
    """A shard's sidecar; None where the shard is not finished: no sidecar, another plan's, or a tar of another length."""
    path = sidecar_path(data, shard)
    if not path.exists():
        return None
    again = "delete it and run the same `alexprep shard` again"
    sidecar = read_json(path, again)
    if sidecar.get("plan") != plan_digest:
        return None
    if {key: type(value) for key, value in sidecar.items()} != SIDECAR:
        raise AlexprepError(f"{path} has other fields than it was written with: {again}")
    tar = path.with_suffix(".tar")
    if sidecar["samples"] and not (
        path.with_suffix(".idx").exists() and tar.exists() and tar.stat().st_size == sidecar["bytes"]
    ):
        return None
    return sidecar


def _sha256_of(sidecar: bytes, plan_digest: str) -> str | None:
    """The sha256 that a sidecar names; None for a damaged one, or another plan's."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        document = json.loads(sidecar)
        return str(document["sha256"]) if document["plan"] == plan_digest else None
    return None


def commit(mark: Path, sidecar: dict[str, Any], before: bytes, name: str) -> None:
    """Publishes a sidecar, which makes its shard count; of several writers the first one wins.

    Args:
        mark: the sidecar's place.
        sidecar: what it is to hold.
        before: what it held before the shard was made, which no longer counts.
        name: of the shard, for messages.

    Raises:
        AlexprepError: another writer made the shard meanwhile, with other bytes; now neither counts.
    """
    wanted = json_bytes(sidecar, indent=None)
    found = publish_first(mark, wanted)
    if found == wanted:
        return
    if found != before and (first := _sha256_of(found, sidecar["plan"])) not in (None, sidecar["sha256"]):
        mark.unlink(missing_ok=True)  # our tar or index may lie over theirs, which it describes
        raise conflict(name, str(first), sidecar["sha256"], "Neither counts, so the next run makes it again")
    publish_bytes(mark, wanted)  # in place of a stale or damaged one


def conflict(name: str, first: str, second: str, outcome: str) -> AlexprepError:
    """The refusal of a shard that was made with two different sha256; `outcome` says what became of them."""
    return AlexprepError(
        f"shard {name} was made twice with different bytes (sha256 {first[:16]}… and {second[:16]}…): the machines decode "
        f"differently, or an input changed meanwhile. {outcome}. Use a new --out with one kind of machine"
    )
