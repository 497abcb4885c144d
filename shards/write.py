"""One shard: read, convert, write, publish. The sidecar comes last: a tar without it does not count and is redone."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.dataset_format import DATASET, sample_key, shard_name
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import FORMATS, Codec, Converted
from alexprep.shards.opinion import Refused
from alexprep.shards.plan import Shard
from alexprep.shards.sidecar import commit, conflict, read_sidecar, sidecar_path
from alexprep.shards.sources.base import Location, Source
from alexprep.shards.sources.files import PAUSES, LocalFiles
from alexprep.shards.storage import file_sha256, publish_bytes, published
from alexprep.shards.tar import TarWriter, dali_index
from alexprep.shards.worker import again, attending, limit_memory, reading

# What a failed read says of the file. Anything else may pass, and is tried again; a sector that stays bad (EIO) is the
# file's, and so is a name that has vanished (ENOENT), while its neighbours are there.
_OF_THE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
_OF_THE_FILE |= {errno.EINVAL, errno.ENXIO, errno.ENODEV}
_JOURNEYS = 16  # reads under way at once where each is a journey over a network


class _EmptyError(Exception):
    """Keeps a tar without members from being published."""


class PlannedInput(NamedTuple):
    """One row of the plan."""

    row: int
    label: int
    location: Location


def write_shard(
    data: Path,
    shard: Shard,
    plan_digest: str,
    inputs: Sequence[PlannedInput],
    source: Source,
    codec: Codec,
    condemned: Mapping[int, str] | None = None,
    recorded: str | None = None,
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
        condemned: rows that are not to be touched, and why.
        recorded: the sha256 that the shard had when the data set was finished, "" where it had no tar; None where that is not known.

    Raises:
        AlexprepError: the disk is full or another write failed; another writer made the same shard with other bytes; or it no longer
            becomes what was recorded. Nothing is published then.
    """
    name = shard_name(shard.split, shard.number)
    tar_path = data / shard.split / f"{name}.tar"
    mark = sidecar_path(data, shard)
    try:
        before = mark.read_bytes() if mark.exists() else b""
        with contextlib.suppress(_EmptyError), published(tar_path) as file:
            tar, ledger = TarWriter(file), []
            for planned, result in _converted(inputs, source, codec, condemned or {}):
                ledger.append(_added(tar, planned, result, FORMATS[codec.target.format]))
            sha256 = tar.close()
            if recorded is not None and recorded != (sha256 if tar.members else ""):
                raise _changed(name, data)
            other = read_sidecar(data, shard, plan_digest)
            if (
                other is not None
                and other["sha256"] != sha256
                and (not other["samples"] or other["sha256"] == file_sha256(tar_path))
            ):
                raise conflict(name, other["sha256"], sha256, "The first one is kept")
            if not tar.members:
                raise _EmptyError
        if tar.members:
            publish_bytes(tar_path.with_suffix(".idx"), dali_index(tar.members).encode())
        else:
            tar_path.unlink(missing_ok=True)  # an earlier run's
        sidecar = {
            "plan": plan_digest,
            "bytes": tar.bytes if tar.members else 0,
            "sha256": sha256,
            "samples": len(tar.members) // 2,
            "members": [vars(member) for member in tar.members],
            "inputs": ledger,
        }
        commit(mark, sidecar, before, name)
    except OSError as error:
        raise AlexprepError(
            f"shard {name} could not be written to {data / shard.split} ({error}): make room or mend the disk, "
            "then run the same command again; finished shards are kept"
        ) from error


def _added(tar: TarWriter, planned: PlannedInput, result: Converted | Refused, extension: str) -> dict[str, Any]:
    """An input's line in the sidecar; its image and label are put into the tar, unless it is refused."""
    entry: dict[str, Any] = {"key": sample_key(planned.row), "label": planned.label}
    entry |= {"width": result.width, "height": result.height}
    if isinstance(result, Refused):
        return entry | {"status": "rejected", "reason": result.reason}
    tar.add(f"{entry['key']}.{extension}", result.data)
    tar.add(f"{entry['key']}.cls", str(planned.label).encode())
    return entry | {"status": "written", "kept": result.kept}


def _changed(name: str, data: Path) -> AlexprepError:
    return AlexprepError(
        f"shard {name} does not become what {data / DATASET} records: the images in SOURCE have changed since, or this machine decodes "
        "differently. Nothing of it was written: name the SOURCE that the data set was made from, or use a new --out"
    )


def bound_memory(source: Source, codec: Codec) -> None:
    """Bounds a worker's memory, once its tools are loaded. Not with CUDA, which reserves address space far beyond its use."""
    if codec.target.device == "cpu":
        limit_memory(source.resident_bytes())


def _converted(
    inputs: Sequence[PlannedInput], source: Source, codec: Codec, condemned: Mapping[int, str]
) -> Iterator[tuple[PlannedInput, Converted | Refused]]:
    """Every input with what became of it, in order."""
    size = 1 if again() else codec.batch  # after a death each by itself, so that the culprit can be told
    with ThreadPoolExecutor(_JOURNEYS) as threads:
        wanted = (planned.location for planned in inputs if planned.row not in condemned)
        ahead = _ahead(wanted, lambda location: _read(source, location), threads) if source.files.remote else None
        for at in range(0, len(inputs), size):
            chunk = inputs[at : at + size]
            with attending(*(planned.row for planned in chunk)):
                read: list[bytes | NDArray[np.uint8] | Refused] = []
                for planned in chunk:
                    if planned.row in condemned:
                        read.append(Refused(condemned[planned.row]))
                    else:
                        with reading(source.files.display(planned.location.path)):
                            read.append(next(ahead) if ahead else _read(source, planned.location))
                converted = iter(codec.convert_many([data for data in read if not isinstance(data, Refused)]))
                results = [data if isinstance(data, Refused) else next(converted) for data in read]
            yield from zip(chunk, results, strict=True)


def _read(source: Source, location: Location) -> bytes | NDArray[np.uint8] | Refused:
    """An input, or why it is left out: what is wrong with the file itself is, what is wrong with the way to it is not.

    Raises:
        AlexprepError: the disk or the network fails, and goes on to fail.
    """
    for pause in (*PAUSES, None):
        try:
            return source.read(location)
        except MemoryError:
            return Refused("cannot be read: needs more memory than a worker may have")
        except OSError as error:
            own = error.errno is None or error.errno in _OF_THE_FILE or (pause is None and error.errno == errno.EIO)
            if own and not (error.errno == errno.ENOENT and _has_gone(source, location)):
                return Refused(f"cannot be read: {error.strerror or error}")
            if pause is None:
                raise AlexprepError(
                    f"{source.files.display(location.path)} cannot be read ({error}): mend the disk or the network, then run "
                    "the same command again; finished shards are kept"
                ) from error
            time.sleep(pause)
    raise AssertionError  # the last pause is None


def _has_gone(source: Source, location: Location) -> bool:
    """Whether more is missing than one file: the archive of many inputs, or a disk, which leaves an empty folder behind."""
    if not isinstance(source.files, LocalFiles):
        return False
    if location.size >= 0 or not os.path.exists(source.files.root):
        return True
    folder = os.path.dirname(os.path.join(source.files.root, location.path))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:  # among them a link to where nothing is any more
        return True


def _ahead(
    locations: Iterable[Location], read: Callable[[Location], Any], threads: ThreadPoolExecutor
) -> Iterator[Any]:
    """The inputs' bytes in order, with several reads under way."""
    pending: deque[Any] = deque()
    for location in locations:
        pending.append(threads.submit(read, location))
        if len(pending) > _JOURNEYS:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
