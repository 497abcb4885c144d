"""Damaged parts of a data set are removed, and made again from the source by the same plan."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from alexprep.shards.begin import begin, check_apart
from alexprep.shards.check import Problem
from alexprep.shards.conversion import Report, build
from alexprep.shards.dataset_format import DATASET, PLAN, PLAN_TABLE
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.labels import LISTED
from alexprep.shards.plan import ShardOptions, differences, draw_up
from alexprep.shards.sidecar import sidecar_path
from alexprep.shards.sources.base import SPLITS, Source
from alexprep.shards.storage import digest_json
from alexprep.shards.worker_pool import Engine

_LOOK = 64  # sidecars that tell which plan the shards were made by


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
        problems: what `alexprep.shards.verification.verify` found.
        engine: runs the work, one task a shard.
        progress: called with (finished inputs, inputs to do).

    Raises:
        AlexprepError: the source does not give the plan of the data set (nothing is touched then), or other bytes for a damaged
            shard (which is missing then); or nothing tells the options of the data set any more.
    """
    options, damaged = _options(folder), {problem.file for problem in problems}
    check_apart(source, folder)
    document, tables = draw_up(source, options)
    _compare(folder, document, source)
    if PLAN in damaged:
        (folder / PLAN).unlink(missing_ok=True)
    if damaged & {PLAN, PLAN_TABLE}:  # with a plan that nobody can tell goes what was beside it
        (folder / PLAN_TABLE).unlink(missing_ok=True)
    for shard in begin(folder, document, tables).shards():
        sidecar = sidecar_path(folder, shard)
        files = [sidecar, sidecar.with_suffix(".idx"), sidecar.with_suffix(".tar")]
        if damaged & {str(file.relative_to(folder)) for file in files}:
            for file in files:  # the commit mark first: interrupted here, the shard does not count
                file.unlink(missing_ok=True)
    if DATASET in damaged:  # it can no longer say what a shard must become
        (folder / DATASET).unlink(missing_ok=True)
    return build(source, folder, options, engine, progress)


def _compare(folder: Path, document: dict[str, Any], source: Source) -> None:
    """Raises AlexprepError where the plan that the source gives now is not the one that the shards were made by."""
    digest, dataset = digest_json(document), _read(folder / DATASET)
    named = Counter(str(sidecar.get("plan")) for sidecar in map(_read, _some_sidecars(folder)) if sidecar)
    known = {dataset["plan"]} if isinstance(dataset.get("plan"), str) else set()
    known |= {plan for plan, _ in named.most_common(1)}
    if not known or digest in known:  # where nothing was finished, plan.json alone decides
        return
    what = []
    with contextlib.suppress(KeyError, TypeError, AttributeError):  # it may be the damaged file
        source_then = dataset["source"]
        what = differences({**dataset, "layout": source_then["layout"], "inputs": source_then["inputs"]}, document)
    raise AlexprepError(
        f"SOURCE {source.files.display()} does not give the plan that the shards in {folder} were made by: "
        f"{'; '.join(what) or 'its inputs, the options or the versions differ'}. Nothing was touched: name the SOURCE that they "
        "were made from, with all its files"
    )


def _some_sidecars(folder: Path) -> list[Path]:
    """Sidecars from all over the data set, as many as are read in a moment."""
    found = [
        path for split in dict.fromkeys(SPLITS.values()) for path in sorted((folder / split).glob(f"{split}-*.json"))
    ]
    return found[:: max(1, len(found) // _LOOK)]


def _options(folder: Path) -> ShardOptions:
    """The options that a data set was made with: as its plan says, or dataset.json where the plan was changed."""
    plan, dataset = (_read(folder / name) for name in (PLAN, DATASET))
    agree = dataset.get("plan", digest_json(plan)) == digest_json(plan)
    for trusted in (plan, dataset) if agree else (dataset, plan):
        with contextlib.suppress(KeyError, TypeError):
            options = dict(trusted["options"])
            target = Target(**{field.name: options.pop(field.name) for field in fields(Target)})
            if options["labels"] == LISTED:
                options["labels"] = tuple(trusted["classes"])
            return ShardOptions(target, shard_samples=trusted["shard_samples"], **options)
    raise AlexprepError(
        f"neither {folder / PLAN} nor {DATASET} tells the options any more: shard again into a new --out"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
