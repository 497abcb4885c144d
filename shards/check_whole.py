"""What describes a data set as a whole, held against what follows from its plan and its sidecars."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from alexprep.shards.check import Finding, Problem
from alexprep.shards.dataset_format import (
    DATASET,
    INDEX,
    LEDGER,
    MEAN_IMAGE,
    MEAN_PICTURE,
    PLAN,
    PLAN_TABLE,
    STATISTICS,
    TAR_INDEXES,
    TIMM_INFO,
    TUNING,
    recorded_shards,
    shard_name,
)
from alexprep.shards.manifest import Description
from alexprep.shards.plan import Plan
from alexprep.shards.plan_table import PlanTable
from alexprep.shards.storage import content, digest_json, is_temporary, json_bytes


def recorded_files(dataset: dict[str, Any] | None) -> dict[str, Any]:
    """The sha256 of files that a dataset.json records, by name; of a damaged one none."""
    files = (dataset or {}).get("files")
    return files if isinstance(files, dict) else {}


def misplaced_tars(findings: list[Finding], dataset: dict[str, Any] | None) -> Iterator[Problem]:
    """Tars that hold the bytes of another shard, by what dataset.json recorded."""
    recorded = {}
    with contextlib.suppress(KeyError, TypeError, AttributeError):  # it may be the damaged file
        for record in recorded_shards(dataset or {}):
            recorded[record["sha256"]] = record["name"]
    for finding in findings:
        name = shard_name(finding.shard.split, finding.shard.number)
        other = recorded.get(finding.sha256 or "")
        if other is not None and other != name:
            yield Problem(f"{finding.shard.split}/{name}.tar", "", f"is the tar of {other}")


def check_descriptions(
    plan: Plan, table: PlanTable, findings: list[Finding], dataset: dict[str, Any] | None
) -> Iterator[Problem]:
    """Index, ledger, _info.json and dataset.json, against those that follow from the sidecars, which must all be sound."""
    description = Description(plan)
    for group, finding in enumerate(findings):
        assert finding.sidecar is not None
        description.add(finding.shard, table.read_row_group(group), finding.sidecar)
    recorded = recorded_files(dataset)
    for name, wanted in description.files().items():
        found, trouble = content(plan.folder / name)
        if found is None:
            yield Problem(name, "", trouble)
            continue
        differs = _index_difference if name.endswith(INDEX) else _ledger_difference
        what, recorded_sha256 = differs(found, wanted), recorded.get(name)
        if what and hashlib.sha256(found).hexdigest() == recorded_sha256:
            yield Problem(*_blamed(name, *what))
        elif what:
            yield Problem(name, what[1], what[2])
        elif recorded and hashlib.sha256(found).hexdigest() != recorded_sha256:
            # The very bytes that we would write: then the record is wrong. Another pyarrow writes other bytes.
            if found == wanted:
                yield Problem(DATASET, "", f"has another sha256 for {name} than the file, which is as it must be")
            else:
                yield Problem(name, "", "was changed (or its sha256 in dataset.json)")
    info, trouble = content(plan.folder / TIMM_INFO)
    if info != json_bytes(description.timm_info()):
        yield Problem(TIMM_INFO, "", trouble or "does not describe these shards")
    expected = json.loads(json_bytes(description.dataset(recorded)))
    if dataset is not None and dataset.get("plan") == expected["plan"] and dataset != expected:
        keys = [key for key in {**expected, **dataset} if dataset.get(key) != expected.get(key)]
        yield Problem(DATASET, "", f"does not describe these shards (in {', '.join(keys)})")


def check_statistics(folder: Path, data_digest: str) -> Iterator[Problem]:
    """The files of the statistics, each as it was written; nothing where there are none."""
    again = "run `alexprep pca-stats` again"
    if not (folder / STATISTICS).exists():
        return
    raw, trouble = content(folder / STATISTICS)
    if raw is None:
        yield Problem(str(STATISTICS), "", f"{trouble}: {again}")
        return
    try:
        document = json.loads(raw)
        if json_bytes(document) != raw or document.pop("digest", None) != digest_json(document):
            raise ValueError
        hashes = {MEAN_IMAGE: document["mean_image_sha256"], MEAN_PICTURE: document["mean_picture_sha256"]}
        of_these_shards = document["data_digest"] == data_digest
    except (ValueError, KeyError, TypeError, AttributeError):
        yield Problem(str(STATISTICS), "", f"was changed: {again}")
        return
    if not of_these_shards:
        yield Problem(str(STATISTICS), "", f"describes other shards: {again}")
    for path, sha256 in hashes.items():
        found, trouble = content(folder / path)
        if found is None or hashlib.sha256(found).hexdigest() != sha256:
            yield Problem(str(path), "", f"{trouble or 'was changed'}: {again}")


def _blamed(name: str, shard: int, member: str, what: str) -> tuple[str, str, str]:
    """A difference between a file that is as it was written and the sidecar that it was made from."""
    split = name.partition("/")[0]
    return f"{split}/{shard_name(split, shard)}.json", member, f"was changed: {name} {what}"


def _index_difference(found: bytes, wanted: bytes) -> tuple[int, str, str] | None:
    """The shard of the first difference, its record, and what differs."""
    if found == wanted:
        return None
    try:
        have, want = (np.load(io.BytesIO(file), allow_pickle=False) for file in (found, wanted))
    except Exception as error:  # noqa: BLE001  (numpy parses the header as Python, and raises what that raises)
        return 0, "", f"cannot be read ({error})"
    if have.dtype != want.dtype or have.shape != want.shape:
        return 0, "", f"holds {len(have):,} records of {have.dtype}, expected {len(want):,}"
    rows = np.flatnonzero(have != want)
    if not len(rows):
        return 0, "", "was changed"
    return (
        int(want["shard"][rows[0]]),
        f"record {rows[0]}",
        f"is {have[rows[0]].tolist()}, should be {want[rows[0]].tolist()} (shard, offset, size, label)",
    )


def _ledger_difference(found: bytes, wanted: bytes) -> tuple[int, str, str] | None:
    """The shard of the first difference, its key, and what differs."""
    if found == wanted:
        return None
    try:
        # In this thread alone: a thread of pyarrow's that still reads when the process ends would abort it.
        have, want = (pq.read_table(io.BytesIO(file), use_threads=False, pre_buffer=False) for file in (found, wanted))
        if have.equals(want):
            return None
        if have.schema != want.schema or have.num_rows != want.num_rows:
            return 0, "", f"has {have.num_rows:,} rows, expected {want.num_rows:,}, or other columns"
        for have_row, want_row in zip(have.to_pylist(), want.to_pylist(), strict=True):
            if have_row != want_row:
                column = next(key for key in want_row if have_row[key] != want_row[key])
                what = f"has {column} {have_row[column]!r}, should be {want_row[column]!r}"
                return want_row["shard"], want_row["key"], what
    except Exception as error:  # noqa: BLE001  (a damaged file makes pyarrow raise many kinds)
        return 0, "", f"cannot be read ({error})".splitlines()[0]
    return 0, "", "was changed"


def foreign_files(folder: Path, plan: Plan, findings: list[Finding]) -> Iterator[Problem]:
    """What lies in the folder and belongs to nothing."""
    expected = {PLAN, PLAN_TABLE, DATASET, TIMM_INFO, TUNING, *map(str, (STATISTICS, MEAN_IMAGE, MEAN_PICTURE))}
    for split in plan.document["splits"]:
        expected |= {f"{split}/{INDEX}", f"{split}/{LEDGER}"}
    for finding in findings:
        base = f"{finding.shard.split}/{shard_name(finding.shard.split, finding.shard.number)}"
        expected |= {f"{base}{suffix}" for suffix in (".tar", ".idx", ".json")}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name not in expected and TAR_INDEXES not in path.parts and not path.is_dir():
            unfinished = is_temporary(path.name)
            yield Problem(
                name,
                "",
                "is being written, or left from an interrupted run" if unfinished else "is no file of this data set",
            )
