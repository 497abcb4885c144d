"""Every promise of a data set on disk, checked from the plan and the sidecars."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alexprep.shards.check import Finding, Problem, check_shard
from alexprep.shards.check_whole import (
    check_descriptions,
    check_statistics,
    foreign_files,
    misplaced_tars,
    recorded_files,
)
from alexprep.shards.dataset_format import DATASET, PLAN, PLAN_TABLE
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import kept_decoder
from alexprep.shards.plan import Plan, Shard
from alexprep.shards.plan_table import PlanTable, kept_table
from alexprep.shards.sidecar import sidecar_path
from alexprep.shards.storage import content, file_sha256, folder_at, json_bytes, trouble
from alexprep.shards.worker_pool import Engine, as_engine


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes:
        folder: the data set.
        shards: how many the plan has.
        samples: images in sound shards.
        bytes: of the tars of sound shards.
        problems: everything that is not as it was written; empty for a sound data set.
        seconds: that it took.
    """

    folder: Path
    shards: int
    samples: int
    bytes: int
    problems: list[Problem]
    seconds: float


def verify(
    folder: Path | str,
    engine: Engine | int,
    decode: bool = False,
    progress: Callable[[int, int], None] = lambda finished, total: None,
) -> Verdict:
    """Checks a data set.

    Args:
        folder: the data set.
        engine: runs the work, one task a shard; a number stands for so many worker processes on this machine.
        decode: also decode every image.
        progress: called with (finished shards, or images when they are decoded; how many there are).

    Raises:
        AlexprepError: there is no data set, or neither its plan nor its dataset.json can be read.
    """
    start = time.monotonic()
    folder = folder_at(folder)
    engine = as_engine(engine)
    problems: list[Problem] = []
    plan, dataset = _documents(folder, problems)
    if plan is None:  # nothing can be held against it
        return Verdict(folder, 0, 0, 0, problems, time.monotonic() - start)
    shards, digest = plan.shards(), plan.digest
    table = _plan_table(plan, dataset, problems)
    task = functools.partial(_check_task, plan, digest, decode, table is not None)
    findings: list[Finding] = []
    total = sum(split["inputs"] for split in plan.document["splits"].values())
    show = (lambda finished: progress(finished, total)) if decode else (lambda finished: None)
    for finding in engine.run(task, list(enumerate(shards)), show):
        findings.append(finding)
        if not decode:
            progress(len(findings), len(shards))
    order = {shard: place for place, shard in enumerate(shards)}
    findings.sort(key=lambda finding: order[finding.shard])
    for finding in findings:
        problems += finding.problems
    problems += misplaced_tars(findings, dataset)
    if table is not None and all(finding.sidecar is not None for finding in findings):
        problems += check_descriptions(plan, table, findings, dataset)
    if dataset is not None:
        problems += check_statistics(folder, str(dataset.get("digest")))
    problems += foreign_files(folder, plan, findings)
    good = [finding.sidecar for finding in findings if finding.sidecar is not None and not finding.problems]
    samples, size = (sum(sidecar[key] for sidecar in good) for key in ("samples", "bytes"))
    return Verdict(folder, len(shards), samples, size, problems, time.monotonic() - start)


def _check_task(
    plan: Plan, digest: str, decode: bool, with_table: bool, argument: tuple[int, Shard], condemned: Mapping[int, str]
) -> Finding:
    group, shard = argument
    planned = kept_table(plan.folder, digest).read_row_group(group, columns=["label"]) if with_table else None
    return check_shard(
        plan.folder, shard, digest, plan.document["options"], planned, kept_decoder() if decode else None, condemned
    )


def _documents(folder: Path, problems: list[Problem]) -> tuple[Plan | None, dict[str, Any] | None]:
    """The plan and dataset.json; what is unsound about them goes to `problems`, and a plan that was changed is None."""
    if not (folder / PLAN).exists() and not (folder / DATASET).exists():
        raise AlexprepError(
            f"{folder} holds no data set: name another folder, or make one with `alexprep shard SOURCE`"
        )
    document, dataset = _document(folder, PLAN, problems), _document(folder, DATASET, problems)
    if document is None:
        return None, dataset
    plan = Plan(folder, document)
    try:
        first = list(itertools.islice(plan.each_shard(), 3))  # of a changed plan there may be too many to list
        named = {str(sidecar.get("plan")) for sidecar in _sidecars(folder, first)}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problems.append(Problem(PLAN, "", f"was changed ({type(error).__name__}: {error})"))
        return None, dataset
    by_dataset = plan.digest if dataset is None else dataset.get("plan", plan.digest)
    if plan.digest not in named and (by_dataset in named or by_dataset != plan.digest):
        problems.append(Problem(PLAN, "", "was changed: dataset.json or the sidecars name another plan"))
        return None, dataset
    if dataset is not None and dataset.get("plan") != plan.digest:
        problems.append(Problem(DATASET, "", "names another plan than plan.json and the sidecars"))
    return plan, dataset


def _sidecars(folder: Path, shards: list[Shard]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        with contextlib.suppress(OSError, ValueError):
            document = json.loads(sidecar_path(folder, shard).read_bytes())
            if isinstance(document, dict):
                yield document


def _document(folder: Path, name: str, problems: list[Problem]) -> dict[str, Any] | None:
    raw, what = content(folder / name)
    if raw is None:
        missing = name == DATASET and not (folder / name).exists()
        unfinished = ": the data set is unfinished, run the same `alexprep shard` again" if missing else ""
        problems.append(Problem(name, "", what + unfinished))
        return None
    try:
        document = json.loads(raw)
        if isinstance(document, dict):
            if json_bytes(document) != raw:
                problems.append(Problem(name, "", "was changed"))
            return document
        problems.append(Problem(name, "", "holds no JSON object"))
    except ValueError as error:
        problems.append(Problem(name, "", f"was changed ({error})"))
    return None


def _plan_table(plan: Plan, dataset: dict[str, Any] | None, problems: list[Problem]) -> PlanTable | None:
    """plan.parquet, where it is the one that the shards were made from."""
    wanted = recorded_files(dataset).get(PLAN_TABLE)
    try:
        if wanted is not None and file_sha256(plan.folder / PLAN_TABLE) != wanted:
            problems.append(Problem(PLAN_TABLE, "", "was changed (or its sha256 in dataset.json)"))
            return None
        table = plan.table()
        if table.num_row_groups != len(plan.shards()):
            problems.append(
                Problem(PLAN_TABLE, "", f"describes {table.num_row_groups} shards, the plan has {len(plan.shards())}")
            )
            return None
        return table
    except OSError as error:
        problems.append(Problem(PLAN_TABLE, "", trouble(error)))
    except AlexprepError as error:
        problems.append(Problem(PLAN_TABLE, "", str(error)))
    return None
