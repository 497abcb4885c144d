"""The job: plan → shards → conservation → index, ledger, dataset.json. A rerun does only what is missing."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import secrets
import shutil
import tarfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from alexprep.shards.dataset_format import (
    DATASET,
    PLAN,
    PLAN_TABLE,
    TIMM_INFO,
    read_json,
    recorded_shards,
    sample_key,
    shard_name,
)
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import FORMATS, Codec, Converted, Refused, Target, check_device, open_codec
from alexprep.shards.manifest import Description, commit, conflict, read_sidecar, sidecar_path
from alexprep.shards.plan import (
    Plan,
    PlanTable,
    Shard,
    ShardOptions,
    Witness,
    differences,
    draw_up,
    kept_table,
    locations,
    publish_table,
)
from alexprep.shards.sources.base import SPLITS, Location, Source
from alexprep.shards.sources.detection import find_source
from alexprep.shards.storage import (
    PAUSES,
    LocalFiles,
    content,
    file_sha256,
    folder_at,
    is_local,
    json_bytes,
    make_folder,
    publish_bytes,
    publish_first,
    published,
    remove_temporaries,
    sync_folder,
)
from alexprep.shards.tar_format import BLOCK, TarWriter, dali_index, padded
from alexprep.shards.worker_pool import Engine, LocalEngine, again, as_engine, attending, limit_memory, reading

# -------------------- One shard: read, convert, write, publish. The sidecar comes last: a tar without it does not count and is redone.


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


# -------------------- Whether the shards to be made will fit on the disk, asked before the work starts.


_PROBES = 256  # JPEG sizes of photos spread by about 40 %, so the mean of 256 is within 10 % in 99.99 % of cases
_LINE_BYTES = 400  # of an input in sidecar, index and ledger, measured: 190-230 with usual names


def check_space(
    plan: Plan,
    source: Source,
    make: Callable[[], Codec],
    missing: list[tuple[Shard, int]],
    table: PlanTable,
    engine: Engine,
) -> None:
    """Compares the room that the missing shards need with what is free.

    Only where the disk could be too small are images tried: the shuffle has made the first ones a random sample.

    Raises:
        AlexprepError: there is not enough room; both figures are named.
    """
    if not is_local(plan.folder):
        return  # a store has no free space to ask for
    inputs = sum(table.rows(group) for _, group in missing)
    free = shutil.disk_usage(plan.folder).free
    side = plan.document["options"]["size"]
    if inputs * (3 * side * side + 4096) < free:  # no encoding is larger than the pixels; metadata in kept bytes may be
        return
    needed = predict(source, make, missing, table, engine)
    if needed > free:
        raise AlexprepError(
            f"{inputs:,} inputs will need about {needed / 1e9:.3f} GB in {Path(plan.folder).absolute()}, "
            f"{free / 1e9:.3f} GB are free: make room, use a smaller --size or --quality, or another --out"
        )


def predict(
    source: Source,
    make: Callable[[], Codec],
    missing: list[tuple[Shard, int]],
    table: PlanTable,
    engine: Engine,
) -> int:
    """The bytes that the `missing` shards (each with its row group), their indexes and sidecars will take, about."""
    inputs = sum(table.rows(group) for _, group in missing)
    probes: list[Location] = []
    for _, group in missing:
        probes += locations(table.read_row_group(group, columns=list(Location._fields)))
        if len(probes) >= _PROBES:
            break
    (used,) = engine.run(functools.partial(_stored, source, make), [probes[:_PROBES]], lambda finished: None)
    return int(sum(used) / len(used) * inputs) + len(missing) * tarfile.RECORDSIZE // 2


def _stored(
    source: Source, make: Callable[[], Codec], probes: list[Location], condemned: Mapping[int, str]
) -> list[int]:
    """What each input takes: two members with their headers, padded to blocks, and its line in the sidecar."""
    codec = make()
    bound_memory(source, codec)
    used = []
    for row, location in enumerate(probes):
        with attending(row):
            size = 0
            if row not in condemned:
                with contextlib.suppress(OSError):
                    with reading(source.files.display(location.path)):
                        data = source.read(location)
                    result = codec.convert(data)
                    if not isinstance(result, Refused):
                        size = 3 * BLOCK + padded(len(result.data))
            used.append(size + _LINE_BYTES)
    return used


# -------------------- A plan is published in the data set's folder, or compared with the one that is there.


def make_plan(source: Source, options: ShardOptions, folder: Path) -> Plan:
    """The plan of `folder`: published if there is none, checked against the present one otherwise.

    Of several that begin in one folder at the same time, one wins; the others go on with its plan, or are refused.

    Raises:
        AlexprepError: the shards would lie among the images; no input; or the folder has the plan of other inputs or options
            (the message says which differ).
    """
    check_apart(source, folder)
    return begin(folder, *draw_up(source, options))


def check_apart(source: Source, folder: Path) -> None:
    """Raises AlexprepError where the data set's folder, or a split's folder in it, lies among the images of `source`."""
    for place in (folder, *(folder / split for split in dict.fromkeys(SPLITS.values()))):
        if source.covers(str(place)):
            what = "lies" if place == folder else f"would put shards into {place}, which lies"
            raise AlexprepError(
                f"--out {folder} {what} among the images of SOURCE {source.files.display()}: name a folder elsewhere"
            )


def begin(folder: Path, document: dict[str, Any], tables: Sequence[pa.Table]) -> Plan:
    """As `make_plan`, for what `draw_up` returned."""
    make_folder(folder)
    if publish_first(folder / PLAN, json_bytes(document)) != json_bytes(document):
        old = read_json(folder / PLAN, "use a new --out")
        differing = differences(old, document)
        if differing or old != document:
            raise AlexprepError(
                f"{folder} was begun differently: {'; '.join(differing) or 'its plan was edited'}. "
                "Use the same options and inputs, or a new --out"
            )
    plan = Plan(folder, document)
    if not _has_table(plan, tables):
        publish_table(folder, tables)
    return plan


def _has_table(plan: Plan, tables: Sequence[pa.Table]) -> bool:
    """Whether plan.parquet is there and has these rows; a wrong one may be replaced only while no shard was made from it.

    Raises:
        AlexprepError: shards count that may have been made from other rows.
    """
    path = plan.folder / PLAN_TABLE
    if not path.exists():
        return False
    unreadable = None
    try:
        if PlanTable(path).holds(tables):
            return True
    except AlexprepError as error:
        unreadable = error
    digest = plan.digest
    if all(read_sidecar(plan.folder, shard, digest) is None for shard in plan.shards()):
        return False
    if unreadable is not None:
        raise unreadable
    what = "has other rows than these inputs and options give"
    recorded = None
    if (plan.folder / DATASET).exists():
        recorded = read_json(plan.folder / DATASET, "use a new --out").get("files", {}).get(PLAN_TABLE)
    if recorded is not None and recorded != file_sha256(path):  # it was another one when the shards were finished
        raise AlexprepError(f"{path} {what}: mend it with `alexprep verify {plan.folder} --repair SOURCE`")
    raise AlexprepError(f"{path} {what}, and shards may have been made from it: shard again into a new --out")


# -------------------- The job: plan → shards → conservation → index, ledger, dataset.json. A rerun does only what is missing.


Progress = Callable[[int, int], None]
_NEXT_STEPS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO), "make room or mend the disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "see to its permissions"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n)"),
}
MakeCodec = Callable[[Target], Codec]

_compared: set[str] = set()  # plans that this process has been found to see as their maker does


@dataclass(frozen=True)
class Report:
    """What a run of `convert` did.

    Attributes:
        folder: the data set.
        inputs: images in the plan.
        written: images in shards.
        rejected: how often each reason occurred; the numbers in reasons are replaced by "N".
        kept: images whose bytes are the source's own.
        bytes: of all tars.
        made_inputs: inputs that this run converted; 0 when there was nothing to do.
        seconds: that this run took.
        samples: written images by split.
    """

    folder: Path
    inputs: int
    written: int
    rejected: Counter[str]
    kept: int
    bytes: int
    made_inputs: int
    seconds: float
    samples: dict[str, int] = field(default_factory=dict)


def convert(
    source: Source | Path | str,
    folder: Path | str,
    options: ShardOptions,
    engine: Engine | int,
    progress: Progress = lambda finished, total: None,
    make_codec: MakeCodec = open_codec,
) -> Report:
    """Turns a source of images into a finished data set.

    Several builds with the same options may work in one folder at the same time, on one machine or on many that share it:
    each begins at another shard, and passes over those that are finished.

    Args:
        source: where the images are; for a path or URL see `alexprep.shards.sources.detection.find_source`.
        folder: the data set's folder, made if need be: a path, or a `UPath` on a store that fsspec opens.
        options: what the shards hold.
        engine: runs the work, one task a shard; a number stands for so many worker processes on this machine.
        progress: called with (finished inputs, inputs to do in this run).
        make_codec: makes the codec in each worker.

    Raises:
        AlexprepError: nothing usable at the source, other options than those the folder was begun with, a full disk.
    """
    folder = folder_at(folder)
    source = source if isinstance(source, Source) else find_source(str(source))
    engine = as_engine(engine)
    try:
        return _convert(source, folder, options, engine, progress, make_codec)
    except OSError as error:
        place = os.fsdecode(error.filename) if error.filename else folder
        step = _NEXT_STEPS.get(error.errno or 0, "see what is there")
        raise AlexprepError(
            f"{place}: {error.strerror or error}: {step}, then run the same command again; what is finished is kept"
        ) from error


def _convert(
    source: Source, folder: Path, options: ShardOptions, engine: Engine, progress: Progress, make_codec: MakeCodec
) -> Report:
    start = time.monotonic()
    if isinstance(engine, LocalEngine):  # before the folder is bound to it
        check_device(options.target)
    plan = make_plan(source, options, folder)
    if is_local(folder):
        for split in plan.document["splits"]:
            (folder / split).mkdir(exist_ok=True)
        sync_folder(folder)
    _tidy(plan)
    digest = plan.digest
    groups = {shard: group for group, shard in enumerate(plan.shards())}
    missing = [shard for shard in groups if read_sidecar(folder, shard, digest) is None]
    table = plan.table()
    total = sum(table.rows(groups[shard]) for shard in missing)
    if missing:
        make = functools.partial(_codec, make_codec, options.target)
        check_space(plan, source, make, [(shard, groups[shard]) for shard in missing], table, engine)
        turn = secrets.randbelow(len(missing))  # so that two writers seldom begin with the same shard
        recorded = _recorded(folder, digest)
        arguments = [(shard, groups[shard], recorded(shard)) for shard in missing[turn:] + missing[:turn]]
        task = functools.partial(_shard_task, plan, digest, source, make, Witness.here(plan, source, table))
        try:
            for _ in engine.run(task, arguments, lambda finished: progress(finished, total)):
                pass
        finally:
            _tidy(plan)
        progress(total, total)
    return _finish(plan, digest, table, total, start)


def _tidy(plan: Plan) -> None:
    for folder in (plan.folder, *(plan.folder / split for split in plan.document["splits"])):
        remove_temporaries(folder)


def _recorded(folder: Path, digest: str) -> Callable[[Shard], str | None]:
    """What a finished data set says of a shard's sha256, for `write_shard`: what is made again must be the same."""
    raw, _ = content(folder / DATASET)
    try:
        dataset = json.loads(raw or b"{}")
        if dataset.get("plan") == digest:
            known = {record["name"]: str(record["sha256"]) for record in recorded_shards(dataset)}
            return lambda shard: known.get(shard_name(shard.split, shard.number), "")
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # `verify` will say what is wrong with it
    return lambda shard: None


def _shard_task(
    plan: Plan,
    digest: str,
    source: Source,
    make: Callable[[], Codec],
    witness: Witness,
    argument: tuple[Shard, int, str | None],
    condemned: Mapping[int, str],
) -> None:
    if digest not in _compared:  # once a process: it may run on another machine
        witness.compare()
        _compared.add(digest)
    shard, group, recorded = argument
    if read_sidecar(plan.folder, shard, digest) is not None:  # another writer was quicker
        return
    codec = make()
    rows = kept_table(plan.folder, digest).read_row_group(group)
    inputs = list(map(PlannedInput, rows.column("row").to_pylist(), rows.column("label").to_pylist(), locations(rows)))
    bound_memory(source, codec)
    write_shard(plan.folder, shard, digest, inputs, source, codec, condemned, recorded)


@functools.lru_cache(maxsize=1)
def _codec(make_codec: MakeCodec, target: Target) -> Codec:
    """One codec a process: opening one costs more than an image."""
    return make_codec(target)


def _finish(plan: Plan, digest: str, table: PlanTable, made: int, start: float) -> Report:
    """Reads every sidecar, checks that each input is accounted for once, and publishes what describes the whole."""
    description = Description(plan)
    for group, shard in enumerate(plan.shards()):
        sidecar = read_sidecar(plan.folder, shard, digest)
        if sidecar is None:
            raise AlexprepError(f"shard {shard_name(shard.split, shard.number)} vanished during the run: run again")
        try:
            description.add(shard, table.read_row_group(group), sidecar)
        except (KeyError, TypeError, ValueError) as error:
            name = shard_name(shard.split, shard.number)
            raise AlexprepError(
                f"{name}.json is damaged ({error!r}): `alexprep verify --repair SOURCE` mends it"
            ) from error
    inputs = sum(split["inputs"] for split in plan.document["splits"].values())
    samples, rejected = description.samples, description.reasons
    written = sum(samples.values())
    if written + rejected.total() != inputs:
        raise AlexprepError(
            f"{inputs:,} inputs, but {written:,} written and {rejected.total():,} rejected: "
            f"{plan.folder} was changed by another program; use a new --out"
        )
    if not written:
        worst = ", ".join(f"{reason} ({count})" for reason, count in rejected.most_common(3))
        raise AlexprepError(f"none of the {inputs:,} inputs is a usable image: {worst}")
    files = description.files()
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    digests[PLAN_TABLE] = file_sha256(plan.folder / PLAN_TABLE)
    files[TIMM_INFO] = json_bytes(description.timm_info())
    files[DATASET] = json_bytes(description.dataset(digests))  # comes last
    for name, data in files.items():
        if content(plan.folder / name)[0] != data:  # a finished set may be read-only
            publish_bytes(plan.folder / name, data)
    seconds = time.monotonic() - start
    return Report(
        plan.folder, inputs, written, rejected, description.kept, description.tar_bytes, made, seconds, samples
    )
