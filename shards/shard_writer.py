"""Writes one shard of a plan: reads its inputs, converts each, and publishes the tar, DALI's index of it and the sidecar.

The sidecar comes last: a tar without one does not count and is made again. This runs in worker processes, perhaps on other machines;
which shards are made is decided in `alexprep.shards.conversion`, how one image is converted in `alexprep.shards.image_codec`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from alexprep.shards.dataset_format import DATASET, FORMATS, sample_key
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Codec, Converted, Target
from alexprep.shards.image_header import Refused
from alexprep.shards.input_facts import facts_of
from alexprep.shards.manifest import (
    Rejects,
    conflict,
    input_record,
    publish_sidecar,
    read_sidecar,
    rejects_in,
    sidecar_of,
    stored_record,
)
from alexprep.shards.metadata import EXTENSION, MetadataError, document_bytes
from alexprep.shards.plan import MachineCheck, Plan, Shard, locations, shared_table
from alexprep.shards.sources.base import Location, Source
from alexprep.shards.storage import PAUSES, LocalFiles, file_sha256, publish_bytes, published
from alexprep.shards.tar_format import TarWriter, dali_index
from alexprep.shards.worker_pool import attending, is_retry, limit_memory, reading

MakeCodec = Callable[[Target], Codec]

# What a failed read says of the file. Anything else may pass, and is tried again; a sector that stays bad (EIO) is the
# file's, and so is a name that has vanished (ENOENT), while its neighbours are there.
_OF_THE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
_OF_THE_FILE |= {errno.EINVAL, errno.ENXIO, errno.ENODEV}
_READS_AHEAD = 16  # reads under way at once where each goes over a network

_checked: set[str] = set()  # plans of which this process has been found to see what their maker does


class PlannedInput(NamedTuple):
    """One row of the plan; `metadata` says where the source has what goes along, and is empty where nothing does."""

    row: int
    label: int
    location: Location
    metadata: bytes


def planned_inputs(rows: pa.Table) -> list[PlannedInput]:
    """The inputs of some rows of plan.parquet."""
    along = rows.column("metadata").to_pylist() if "metadata" in rows.column_names else itertools.repeat(None)
    numbers, labels = (rows.column(name).to_pylist() for name in ("row", "label"))
    return [
        PlannedInput(row, label, location, metadata or b"")
        for row, label, location, metadata in zip(numbers, labels, locations(rows), along, strict=False)
    ]


class InputRead(NamedTuple):
    """What was read of an input: its bytes or pixels, and its KEY.json, or why it has none (`problem`)."""

    data: bytes | NDArray[np.uint8]
    metadata: bytes = b""
    problem: str | None = None


class Made(NamedTuple):
    """What became of an input; `metadata` is its KEY.json, or b"", and `facts` are those of `facts_of`, {} where it could not be read."""

    planned: PlannedInput
    result: Converted | Refused
    metadata: bytes
    facts: dict[str, Any]


@dataclass(frozen=True)
class ShardWriter:
    """Makes the shards of a plan. An engine sends it to its workers, which call it once a window of shards, mostly one."""

    plan: Plan
    source: Source
    target: Target
    make_codec: MakeCodec
    check: MachineCheck  # run once in each worker, since it may be on another machine

    def __call__(self, argument: Sequence[tuple[Shard, str | None]], condemned: Mapping[int, str]) -> Rejects:
        """Makes some shards of one split, each unless another writer has made it meanwhile; returns their rejects.

        `argument` is each shard, and the sha256 that its tar had when the dataset was finished ("" where it had none; None where
        that is not known). `condemned` has the rows that are not to be touched, and why.
        """
        if self.plan.digest not in _checked:
            self.check.run()
            _checked.add(self.plan.digest)
        made = [self._make(shard, recorded, condemned) for shard, recorded in argument]
        return functools.reduce(Rejects.plus, made)

    def _make(self, shard: Shard, recorded: str | None, condemned: Mapping[int, str]) -> Rejects:
        if (made := read_sidecar(self.plan, shard)) is not None:
            return rejects_in(made)
        codec = shared_codec(self.make_codec, self.target)
        rows = shared_table(self.plan.folder, self.plan.digest).read_row_group(shard.group)
        inputs = planned_inputs(rows)
        bound_memory(self.source, codec)
        folder = self.plan.folder / shard.split
        try:
            return self._write(shard, recorded, self._converted(inputs, codec, condemned))
        except OSError as error:
            raise AlexprepError(
                f"shard {shard.name} could not be written to {folder} ({error}): make room or mend the disk, "
                "then run the same command again; finished shards are kept"
            ) from error

    def _write(self, shard: Shard, recorded: str | None, inputs: Iterator[Made]) -> Rejects:
        """Makes one shard's tar, DALI index and sidecar, in this order, each complete or absent; returns its rejects.

        A shard whose every input is refused has a sidecar only, since an empty tar trips readers. Nothing is published where it does
        not become what was recorded, or where another writer made it with other bytes.
        """
        plan, tar_path, sidecar_path = self.plan, self.plan.file(shard, ".tar"), self.plan.file(shard, ".json")
        before = sidecar_path.read_bytes() if sidecar_path.exists() else b""
        with contextlib.suppress(_EmptyError), published(tar_path) as file:
            tar = TarWriter(file)
            records = [_added(tar, made, self.target, plan.labelled) for made in inputs]
            sha256 = tar.close()
            if recorded is not None and recorded != (sha256 if tar.members else ""):
                raise AlexprepError(
                    f"shard {shard.name} does not become what {plan.folder / DATASET} records: the images in SOURCE have changed "
                    f"since, or this machine decodes differently{_other_rules(plan)}. Nothing of it was written: name the SOURCE "
                    "that the data set was made from, or use a new --out"
                )
            first = (read_sidecar(plan, shard) or {}).get("sha256", sha256)
            if first != sha256 and (not tar_path.exists() or first == file_sha256(tar_path)):
                raise conflict(shard, first, sha256, "The first one is kept")
            if not tar.members:
                raise _EmptyError
        if tar.members:
            publish_bytes(plan.file(shard, ".idx"), dali_index(tar.members).encode())
        else:
            tar_path.unlink(missing_ok=True)  # an earlier run's
        sidecar = sidecar_of(plan, records, list(map(vars, tar.members)), sha256)
        publish_sidecar(plan, shard, sidecar, before)
        return rejects_in(sidecar)

    def _converted(self, inputs: Sequence[PlannedInput], codec: Codec, condemned: Mapping[int, str]) -> Iterator[Made]:
        """Every input with what became of it, in order."""
        source = self.source
        size = 1 if is_retry() else codec.batch  # after a death each by itself, so that the input at fault is known
        read = functools.partial(_read, source, names=self.plan.metadata_names)
        with ThreadPoolExecutor(_READS_AHEAD) as threads:
            wanted = (planned for planned in inputs if planned.row not in condemned)
            ahead = _ahead(wanted, read, threads) if source.files.remote else None
            for at in range(0, len(inputs), size):
                chunk = inputs[at : at + size]
                with attending(*(planned.row for planned in chunk)):
                    found: list[InputRead | Refused] = []
                    for planned in chunk:
                        if planned.row in condemned:
                            found.append(Refused(condemned[planned.row]))
                        else:
                            with reading(source.files.display(planned.location.path)):
                                found.append(next(ahead) if ahead else read(planned))
                    converted = iter(codec.convert_many([each.data for each in found if not isinstance(each, Refused)]))
                    made = [_made(planned, each, converted) for planned, each in zip(chunk, found, strict=True)]
                yield from made


def _other_rules(plan: Plan) -> str:
    """A third reason for other bytes, of plans from before JPEGs were decoded by simplejpeg."""
    if "simplejpeg" in plan.document["versions"]:
        return ""
    return (
        ", or it holds damaged or odd images, for which the earlier release of alexprep that began it had other rules: that release "
        "makes this shard again"
    )


class _EmptyError(Exception):
    """Keeps a tar without members from being published."""


def _added(tar: TarWriter, made: Made, target: Target, labelled: bool) -> dict[str, Any]:
    """What the sidecar says of an input; its image, label and metadata are put into the tar, unless it is refused."""
    (row, label, *_), result = made.planned, made.result
    width, height = result.width, result.height
    if isinstance(result, Refused):
        return input_record(row, label, width, height, kept=False, reason=result.reason) | made.facts
    tar.add(f"{sample_key(row)}.{FORMATS[target.format]}", result.data)
    if labelled:
        tar.add(f"{sample_key(row)}.cls", str(label).encode())
    if made.metadata:
        tar.add(f"{sample_key(row)}.{EXTENSION}", made.metadata)
    record = input_record(row, label, width, height, result.kept, reason=None, damage=result.damage)
    record |= stored_record(target, result.size)
    return record | made.facts | ({"metadata": json.loads(made.metadata)} if made.metadata else {})


def _made(planned: PlannedInput, read: InputRead | Refused, converted: Iterator[Converted | Refused]) -> Made:
    """What became of an input, given what was read of it; the next of `converted` is its image."""
    if isinstance(read, Refused):
        return Made(planned, read, b"", {})
    result = next(converted)
    if read.problem is not None and not isinstance(result, Refused):
        result = Refused(read.problem, result.width, result.height)
    return Made(planned, result, read.metadata, facts_of(read.data))


def _ahead(
    inputs: Iterable[PlannedInput], read: Callable[[PlannedInput], Any], threads: ThreadPoolExecutor
) -> Iterator[Any]:
    """What is read of the inputs in order, with several reads under way."""
    pending: deque[Any] = deque()
    for planned in inputs:
        pending.append(threads.submit(read, planned))
        if len(pending) > _READS_AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _read(source: Source, planned: PlannedInput, names: Collection[str] | None) -> InputRead | Refused:
    """An input, or why it is left out: a fault of the file itself. One of the way to it that stays is an AlexprepError.

    Of its metadata what has one of the `names`, or all.
    """
    location = planned.location
    for pause in (*PAUSES, None):
        try:
            data = source.read(location)
            if not planned.metadata:
                return InputRead(data)
            try:
                return InputRead(data, document_bytes(source.metadata(location, planned.metadata), names))
            except MetadataError as error:
                return InputRead(data, problem=f"metadata: {error}")
        except MemoryError:
            return Refused("cannot be read: needs more memory than a worker may have")
        except OSError as error:
            own = error.errno is None or error.errno in _OF_THE_FILE or (pause is None and error.errno == errno.EIO)
            if own and not (error.errno == errno.ENOENT and _has_gone(source, location)):
                return Refused(f"cannot be read: {error.strerror or error}")
            if pause is None or error.errno == errno.ECOMM:  # a store was asked as long as the patience lasts
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


def open_codec(target: Target) -> Codec:
    """The codec of the target's device."""
    if target.device == "cuda":
        from alexprep.shards.image_codec_cuda import CudaCodec

        return CudaCodec(target)
    return Codec(target)


def check_device(target: Target) -> None:
    """Raises AlexprepError where the target's device is not there."""
    if target.device == "cuda":
        from alexprep.shards.image_codec_cuda import check_cuda

        check_cuda()


@functools.lru_cache(maxsize=1)
def shared_codec(make_codec: MakeCodec, target: Target) -> Codec:
    """One codec a process: opening one costs more than an image."""
    return make_codec(target)


def bound_memory(source: Source, codec: Codec) -> None:
    """Bounds a worker's memory, once its tools are loaded. Not with CUDA, which reserves address space far beyond its use."""
    if codec.target.device == "cpu":
        limit_memory(source.resident_bytes())
