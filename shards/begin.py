"""A plan is published in the data set's folder, or compared with the one that is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from alexprep.shards.dataset_format import DATASET, PLAN, PLAN_TABLE, read_json
from alexprep.shards.errors import AlexprepError
from alexprep.shards.plan import Plan, ShardOptions, differences, draw_up
from alexprep.shards.plan_table import PlanTable, publish_table
from alexprep.shards.sidecar import read_sidecar
from alexprep.shards.sources.base import SPLITS, Source
from alexprep.shards.storage import file_sha256, json_bytes, make_folder, publish_first


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
