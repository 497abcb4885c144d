"""The job: plan → shards → conservation → index, ledger, dataset.json. A rerun does only what is missing."""

from __future__ import annotations

import functools
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alexprep.shards.codec import FORMATS, Codec, Target
from alexprep.shards.engines import run_local, tick
from alexprep.shards.errors import AlexprepError
from alexprep.shards.files import publish_json, published, remove_temporaries
from alexprep.shards.layout import (
    DATASET,
    FORMAT_VERSION,
    INDEX,
    INDEX_DTYPE,
    LEDGER,
    TIMM_INFO,
    data_digest,
    shard_name,
)
from alexprep.shards.plan import Plan, Shard, ShardOptions, display_location, make_plan
from alexprep.shards.sources.base import Source, find_source
from alexprep.shards.write import PlannedInput, read_sidecar, write_shard

Progress = Callable[[int, int], None]


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
    source_path: Path,
    folder: Path,
    options: ShardOptions,
    workers: int,
    progress: Progress = lambda finished, total: None,
) -> Report:
    """Turns a source of images into a finished data set.

    Args:
        source_path: what `find_source` understands.
        folder: the data set's folder, made if need be.
        options: what the shards hold.
        workers: processes.
        progress: called with (finished inputs, inputs to do in this run).

    Raises:
        AlexprepError: nothing usable at the source, other options than those the folder was begun with, a full disk.
    """
    start = time.monotonic()
    source = find_source(source_path)
    if source.covers(folder):
        raise AlexprepError(f"--out {folder} lies among the images of SOURCE {source_path}: name a folder elsewhere")
    plan = make_plan(source, source_path, options, folder)
    for split in plan.document["splits"]:
        (folder / split).mkdir(exist_ok=True)
        remove_temporaries(folder / split)
    remove_temporaries(folder)
    digest = plan.digest
    missing = [shard for shard in plan.shards() if read_sidecar(folder, shard, digest) is None]
    table = plan.table()
    groups = {(shard.split, shard.number): group for group, shard in enumerate(plan.shards())}
    rows = [table.metadata.row_group(groups[shard.split, shard.number]).num_rows for shard in missing]
    if missing:
        task = functools.partial(_shard_task, plan, digest, source, options.target)
        arguments = [(shard, groups[shard.split, shard.number]) for shard in missing]
        for _ in run_local(task, arguments, workers, lambda finished: progress(finished, sum(rows))):
            pass
        progress(sum(rows), sum(rows))
    return _finish(plan, digest, table, sum(rows), start, fresh=bool(missing))


def _shard_task(plan: Plan, digest: str, source: Source, target: Target, argument: tuple[Shard, int]) -> None:
    shard, group = argument
    rows = plan.table().read_row_group(group)
    columns = (rows.column(name).to_pylist() for name in ("row", "label", "location"))
    write_shard(plan.folder, shard, digest, map(PlannedInput, *columns), source, _codec(target), tick)


@functools.lru_cache(maxsize=1)
def _codec(target: Target) -> Codec:
    """One codec a process: opening one costs more than an image."""
    return Codec(target)


def _finish(plan: Plan, digest: str, table: pq.ParquetFile, made: int, start: float, fresh: bool) -> Report:
    """Reads every sidecar, checks that each input is accounted for once, and publishes what describes the whole."""
    records: dict[str, list[dict[str, Any]]] = {split: [] for split in plan.document["splits"]}
    indexes: dict[str, list[Any]] = {split: [] for split in records}
    ledgers: dict[str, list[pa.Table]] = {split: [] for split in records}
    reasons: Counter[str] = Counter()
    kept = 0
    for group, shard in enumerate(plan.shards()):
        sidecar = read_sidecar(plan.folder, shard, digest)
        if sidecar is None:
            raise AlexprepError(f"shard {shard_name(shard.split, shard.number)} vanished during the run: run again")
        planned = table.read_row_group(group)
        ledgers[shard.split].append(_ledger(planned, sidecar, shard))
        indexes[shard.split].append(_index(sidecar, shard))
        reasons.update(_general(entry["reason"]) for entry in sidecar["inputs"] if entry["status"] == "rejected")
        kept += sum(entry.get("kept", False) for entry in sidecar["inputs"])
        if sidecar["samples"]:
            record = {"name": shard_name(shard.split, shard.number)}
            records[shard.split].append(record | {key: sidecar[key] for key in ("samples", "bytes", "sha256")})
    inputs = sum(split["inputs"] for split in plan.document["splits"].values())
    samples = {split: sum(record["samples"] for record in records[split]) for split in records}
    if sum(samples.values()) + reasons.total() != inputs:
        raise AlexprepError(
            f"{inputs:,} inputs, but {sum(samples.values()):,} written and {reasons.total():,} rejected: "
            f"{plan.folder} was changed by another program; use a new --out"
        )
    if not sum(samples.values()):
        worst = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        raise AlexprepError(f"none of the {inputs:,} inputs is a usable image: {worst}")
    described = [plan.folder / DATASET, plan.folder / TIMM_INFO]
    described += [plan.folder / split / name for split in records for name in (INDEX, LEDGER)]
    if fresh or not all(path.exists() for path in described):
        for split in records:
            with published(plan.folder / split / INDEX) as file:
                np.save(file, np.concatenate(indexes[split]), allow_pickle=False)
            with published(plan.folder / split / LEDGER) as file:
                pq.write_table(pa.concat_tables(ledgers[split]), file, compression="zstd")
        _describe(plan, digest, records, samples)
    total_bytes = sum(record["bytes"] for shards in records.values() for record in shards)
    seconds = time.monotonic() - start
    return Report(plan.folder, inputs, sum(samples.values()), reasons, kept, total_bytes, made, seconds, samples)


def _ledger(planned: pa.Table, sidecar: dict[str, Any], shard: Shard) -> pa.Table:
    """The ledger's rows of one shard: every planned input, in order, with what became of it."""
    entries = sidecar["inputs"]
    if len(entries) != planned.num_rows:
        raise AlexprepError(
            f"{shard_name(shard.split, shard.number)}.json lists {len(entries)} of {planned.num_rows} inputs"
        )
    return pa.table(
        {
            "key": pa.array([entry["key"] for entry in entries]),
            "shard": planned["shard"],
            "label": planned["label"],
            "source": pa.array([display_location(location) for location in planned["location"].to_pylist()]),
            "width": pa.array([entry["width"] for entry in entries], pa.int32()),
            "height": pa.array([entry["height"] for entry in entries], pa.int32()),
            "status": pa.array([entry["status"] for entry in entries]),
            "kept": pa.array([entry.get("kept", False) for entry in entries]),
            "reason": pa.array([entry.get("reason") for entry in entries], pa.string()),
        }
    )


def _index(sidecar: dict[str, Any], shard: Shard) -> Any:
    written = [entry for entry in sidecar["inputs"] if entry["status"] == "written"]
    images = sidecar["members"][::2]
    return np.array(
        [(shard.number, m["offset"], m["size"], e["label"]) for m, e in zip(images, written, strict=True)], INDEX_DTYPE
    )


def _general(reason: str) -> str:
    """A reason without its particulars, so that like ones are counted together.

    >>> _general("cannot be decoded: image file is truncated (17 bytes not processed)")
    'cannot be decoded: image file is truncated (N bytes not processed)'
    """
    return re.sub(r"\d[\d,]*", "N", reason.split(" (first bytes ")[0])


def _describe(plan: Plan, digest: str, records: dict[str, list[dict[str, Any]]], samples: dict[str, int]) -> None:
    """Publishes _info.json for timm and, last of all, dataset.json."""
    document = plan.document
    image = {key: document["options"][key] for key in ("size", "filter", "format", "quality", "subsampling", "orient")}
    dataset = {
        "format": "alexprep data set",
        "format_version": FORMAT_VERSION,
        "digest": data_digest(records, image, document["classes"]),
        "image": image | {"extension": FORMATS[image["format"]]},
        "labels": document["options"]["labels"],
        "classes": document["classes"],
        "splits": {
            split: {
                "inputs": document["splits"][split]["inputs"],
                "samples": samples[split],
                "rejected": document["splits"][split]["inputs"] - samples[split],
                "bytes": sum(record["bytes"] for record in records[split]),
                "shards": records[split],
            }
            for split in records
        },
        "plan": digest,
        "options": document["options"],
        "source": {"layout": document["layout"], "inputs": document["inputs"]},
        "versions": document["versions"],
    }
    timm = {
        "splits": {
            split: {
                "name": split,
                "num_samples": samples[split],
                "filenames": [f"{split}/{record['name']}.tar" for record in records[split]],
                "shard_lengths": [record["samples"] for record in records[split]],
            }
            for split in records
            if samples[split]
        }
    }
    publish_json(plan.folder / TIMM_INFO, timm)
    publish_json(plan.folder / DATASET, dataset)
