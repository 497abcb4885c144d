"""Damaged parts of a data set are removed, and made again from the source by the same plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from alexprep.shards.build import Report, build
from alexprep.shards.check import Problem
from alexprep.shards.codec import Target
from alexprep.shards.engines import Engine
from alexprep.shards.errors import AlexprepError
from alexprep.shards.files import digest_json
from alexprep.shards.layout import DATASET, INDEX, LEDGER, PLAN, PLAN_TABLE, TIMM_INFO
from alexprep.shards.plan import ShardOptions, make_plan
from alexprep.shards.sources.base import SPLITS, Source
from alexprep.shards.write import sidecar_path


def repair(
    folder: Path,
    source: Source,
    problems: list[Problem],
    engine: Engine,
    progress: Callable[[int, int], None] = lambda finished, total: None,
) -> Report:
    """Makes exactly the damaged shards again, and whatever describes the whole.

    Files that belong to nothing are left alone, and so are statistics: `alexprep pca-stats` makes them.

    Args:
        folder: the data set.
        source: what it was made from.
        problems: what `alexprep.shards.verify.verify` found.
        engine: runs the work, one task a shard.
        progress: called with (finished inputs, inputs to do).

    Raises:
        AlexprepError: the source has other inputs now, or nothing tells the options of the data set any more.
    """
    options, damaged = _options(folder), {problem.file for problem in problems}
    for name in {PLAN, PLAN_TABLE} & damaged:
        (folder / name).unlink(missing_ok=True)
    for shard in make_plan(source, options, folder).shards():
        sidecar = sidecar_path(folder, shard)
        files = [sidecar, sidecar.with_suffix(".idx"), sidecar.with_suffix(".tar")]
        if damaged & {str(file.relative_to(folder)) for file in files}:
            for file in files:  # the commit mark first: interrupted here, the shard does not count
                file.unlink(missing_ok=True)
    for name in (DATASET, TIMM_INFO, *(f"{split}/{name}" for split in SPLITS.values() for name in (INDEX, LEDGER))):
        (folder / name).unlink(missing_ok=True)
    return build(source, folder, options, engine, progress)


def _options(folder: Path) -> ShardOptions:
    """The options that a data set was made with: as its plan says, or dataset.json where the plan was changed."""
    plan, dataset = (_read(folder / name) for name in (PLAN, DATASET))
    trusted = plan if plan and dataset.get("plan", digest_json(plan)) == digest_json(plan) else dataset
    try:
        options = dict(trusted["options"])
        target = Target(**{field.name: options.pop(field.name) for field in fields(Target)})
        return ShardOptions(target, shard_samples=trusted["shard_samples"], **options)
    except (KeyError, TypeError):
        raise AlexprepError(
            f"neither {folder / PLAN} nor {DATASET} tells the options any more: shard again into a new --out"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
