"""The job: plan → shards → conservation → index, ledger, dataset.json. A rerun does only what is missing."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from alexprep.shards.begin import make_plan
from alexprep.shards.dataset_format import DATASET, PLAN_TABLE, TIMM_INFO, recorded_shards, shard_name
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Codec, Target, check_device, open_codec
from alexprep.shards.manifest import Description
from alexprep.shards.plan import Plan, Shard, ShardOptions, locations
from alexprep.shards.plan_table import PlanTable, kept_table
from alexprep.shards.sidecar import read_sidecar
from alexprep.shards.sources.base import Source
from alexprep.shards.sources.detection import find_source
from alexprep.shards.space import check_space
from alexprep.shards.storage import (
    content,
    file_sha256,
    folder_at,
    is_local,
    json_bytes,
    publish_bytes,
    remove_temporaries,
    sync_folder,
)
from alexprep.shards.witness import Witness
from alexprep.shards.worker_pool import Engine, LocalEngine, as_engine
from alexprep.shards.write import PlannedInput, bound_memory, write_shard

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
    """What a run of `build` did.

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


def build(
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
        return _build(source, folder, options, engine, progress, make_codec)
    except OSError as error:
        place = os.fsdecode(error.filename) if error.filename else folder
        step = _NEXT_STEPS.get(error.errno or 0, "see what is there")
        raise AlexprepError(
            f"{place}: {error.strerror or error}: {step}, then run the same command again; what is finished is kept"
        ) from error


def _build(
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
