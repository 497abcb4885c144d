"""One shard: read, convert, write, publish. The sidecar comes last: a tar without it does not count and is redone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from alexprep.shards.codec import FORMATS, Codec
from alexprep.shards.errors import AlexprepError
from alexprep.shards.files import publish_bytes, publish_json, published
from alexprep.shards.layout import read_json, sample_key, shard_name
from alexprep.shards.opinion import Refused
from alexprep.shards.plan import Shard
from alexprep.shards.sources.base import Source
from alexprep.shards.tar import TarWriter, dali_index


class PlannedInput(NamedTuple):
    """One row of the plan."""

    row: int
    label: int
    location: bytes


def sidecar_path(data: Path, shard: Shard) -> Path:
    """Where a shard's commit mark lies."""
    return data / shard.split / f"{shard_name(shard.split, shard.number)}.json"


def write_shard(
    data: Path,
    shard: Shard,
    plan_digest: str,
    inputs: Iterable[PlannedInput],
    source: Source,
    codec: Codec,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Makes one shard's tar, DALI index and sidecar, in this order, each complete or absent.

    A shard whose every input is refused has a sidecar only, since an empty tar trips readers.

    Args:
        data: the data set's folder.
        shard: which shard of the plan.
        plan_digest: identity of the plan, recorded in the sidecar.
        inputs: the plan's rows of this shard, in order.
        source: reads the inputs.
        codec: converts them.
        tick: called after each input, for progress.

    Raises:
        AlexprepError: the disk is full or another write failed.
    """
    name = shard_name(shard.split, shard.number)
    tar_path = data / shard.split / f"{name}.tar"
    extension = FORMATS[codec.target.format]
    ledger: list[dict[str, Any]] = []
    try:
        with published(tar_path) as file:
            tar = TarWriter(file)
            for row, label, location in inputs:
                entry: dict[str, Any] = {"key": sample_key(row), "label": label}
                result = _convert(source, location, codec)
                entry |= {"width": result.width, "height": result.height}
                if isinstance(result, Refused):
                    entry |= {"status": "rejected", "reason": result.reason}
                else:
                    tar.add(f"{entry['key']}.{extension}", result.data)
                    tar.add(f"{entry['key']}.cls", str(label).encode())
                    entry |= {"status": "written", "kept": result.kept}
                ledger.append(entry)
                tick()
            sha256 = tar.close()
        if tar.members:
            publish_bytes(tar_path.with_suffix(".idx"), dali_index(tar.members).encode())
        else:
            tar_path.unlink()
        sidecar = {
            "plan": plan_digest,
            "bytes": tar.bytes if tar.members else 0,
            "sha256": sha256,
            "samples": len(tar.members) // 2,
            "members": [asdict(member) for member in tar.members],
            "inputs": ledger,
        }
        publish_json(sidecar_path(data, shard), sidecar, indent=None)
    except OSError as error:
        raise AlexprepError(
            f"shard {name} could not be written to {data / shard.split} ({error}): make room or mend the disk, "
            "then run the same command again; finished shards are kept"
        ) from error


def read_sidecar(data: Path, shard: Shard, plan_digest: str) -> dict[str, Any] | None:
    """A shard's sidecar; None where the shard is not finished: no sidecar, another plan's, or a tar of another length."""
    path = sidecar_path(data, shard)
    if not path.exists():
        return None
    sidecar = read_json(path, "delete it and run the same `alexprep shard` again")
    if sidecar.get("plan") != plan_digest:
        return None
    tar = path.with_suffix(".tar")
    if sidecar["samples"] and not (
        path.with_suffix(".idx").exists() and tar.exists() and tar.stat().st_size == sidecar["bytes"]
    ):
        return None
    return sidecar


def _convert(source: Source, location: bytes, codec: Codec) -> Any:
    try:
        encoded = source.read(location)
    except OSError as error:
        return Refused(f"cannot be read: {error.strerror or error}")
    return codec.convert(encoded)
