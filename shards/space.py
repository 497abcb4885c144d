"""Whether the shards to be made will fit on the disk, asked before the work starts."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Codec
from alexprep.shards.opinion import Refused
from alexprep.shards.plan import Plan, Shard, locations
from alexprep.shards.plan_table import PlanTable
from alexprep.shards.sources.base import Location, Source
from alexprep.shards.storage import is_local
from alexprep.shards.tar_header import BLOCK, padded
from alexprep.shards.worker import attending, reading
from alexprep.shards.worker_pool import Engine
from alexprep.shards.write import bound_memory

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
