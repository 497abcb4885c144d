"""Every promise of a data set on disk, checked from the plan and the sidecars."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alexprep.shards.conversion import Report, begin, check_apart, convert
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
    sample_key,
    shard_name,
)
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import FORMATS, Codec, Target, kept_decoder, read_raw
from alexprep.shards.manifest import SIDECAR, Description, sidecar_path
from alexprep.shards.plan import LISTED, Plan, PlanTable, Shard, ShardOptions, differences, draw_up, kept_table
from alexprep.shards.sources.base import SPLITS, Source
from alexprep.shards.storage import content, digest_json, file_sha256, folder_at, is_temporary, json_bytes, trouble
from alexprep.shards.tar_format import BLOCK, WrittenMember, dali_index, ending, member_header, padded
from alexprep.shards.worker_pool import Engine, as_engine, attending

# -------------------- One shard held against its sidecar and the plan: every byte of the tar, the index, every line of the sidecar.


_ENTRY = {"key": str, "label": int, "width": int, "height": int, "status": str}  # of each input in a sidecar


class Problem(NamedTuple):
    """Something that is not as `alexprep shard` wrote it.

    Attributes:
        file: below the data set's folder.
        member: the member or sample concerned; empty where it is the file as a whole.
        what: in words.
    """

    file: str
    member: str
    what: str

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.file}{f', {self.member}' if self.member else ''}: {self.what}"


class Finding(NamedTuple):
    """What was found of a shard: its problems, its sidecar if that is sound, and the sha256 of its tar if there is one."""

    shard: Shard
    problems: list[Problem]
    sidecar: dict[str, Any] | None
    sha256: str | None


def check_shard(
    data: Path,
    shard: Shard,
    plan_digest: str,
    options: dict[str, Any],
    planned: pa.Table | None,
    codec: Codec | None,
    condemned: Mapping[int, str],
) -> Finding:
    """Compares a shard with everything that is recorded of it.

    Args:
        data: the data set's folder.
        shard: which.
        plan_digest: what the sidecar must name.
        options: the plan's.
        planned: the shard's rows of plan.parquet; None where they cannot be read.
        codec: decodes every image; None to leave the pixels alone.
        condemned: positions of samples in the shard whose decoding ends the process, and why.
    """
    name = shard_name(shard.split, shard.number)
    base = f"{shard.split}/{name}"
    problems: list[Problem] = []

    def problem(suffix: str, what: str, member: str = "") -> None:
        problems.append(Problem(f"{base}{suffix}", member, what))

    tar, tar_trouble = content(data / shard.split / f"{name}.tar")
    sha256 = None if tar is None else hashlib.sha256(tar).hexdigest()
    sidecar = _sidecar(sidecar_path(data, shard), shard, plan_digest, FORMATS[options["format"]], planned, problem)
    if sidecar is None:
        return Finding(shard, problems, None, sha256)
    members = [WrittenMember(**member) for member in sidecar["members"]]
    _check_tar(tar, tar_trouble, sha256, members, sidecar, problem)
    idx, idx_trouble = content(data / shard.split / f"{name}.idx")
    if idx != (dali_index(members).encode() if members else None):
        problem(".idx", idx_trouble or "is not the index of this shard")
    if codec is not None and tar is not None and not problems:
        for position, member in enumerate(members[::2]):
            with attending(position):
                what = condemned.get(position) or _undecodable(codec, tar, member, options)
            if what:
                problem(".tar", what, member.name)
    return Finding(shard, problems, sidecar, sha256)


def _sidecar(
    path: Path, shard: Shard, plan_digest: str, extension: str, planned: pa.Table | None, problem: Any
) -> dict[str, Any] | None:
    """The sidecar, where every line of it agrees with the plan and with the others."""
    raw, trouble = content(path)
    if raw is None:
        problem(".json", f"{trouble}, so the shard does not count")
        return None
    try:
        sidecar = json.loads(raw)
        if json_bytes(sidecar, None) != raw:
            problem(".json", "was changed")
            return None
        if {key: type(value) for key, value in sidecar.items()} != SIDECAR:
            problem(".json", "has other fields than it was written with")
            return None
        if sidecar["plan"] != plan_digest:
            problem(".json", f"belongs to another plan ({str(sidecar['plan'])[:16]}…, not {plan_digest[:16]}…)")
            return None
        what = _disagreement(sidecar, shard, extension, planned)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"was changed ({type(error).__name__}: {error})"
    if what:
        problem(".json", what)
        return None
    return sidecar  # type: ignore[no-any-return]


def _disagreement(sidecar: dict[str, Any], shard: Shard, extension: str, planned: pa.Table | None) -> str | None:
    """Where a sidecar contradicts the plan or itself."""
    entries = sidecar["inputs"]
    if planned is not None:
        labels = planned.column("label").to_pylist()
        if len(entries) != len(labels):
            return f"lists {len(entries)} inputs, the plan has {len(labels)}"
        for entry, label in zip(entries, labels, strict=True):
            if entry["label"] != label:
                return f"gives {entry['key']} the label {entry['label']}, the plan says {label}"
    position, names, sizes = 0, [], []
    for row, entry in enumerate(entries, shard.first_row):
        if entry["status"] not in ("written", "rejected"):
            return f"has the status {entry['status']!r} for row {row}"
        special = {"kept": bool} if entry["status"] == "written" else {"reason": str}
        if {key: type(value) for key, value in entry.items()} != _ENTRY | special:
            return f"has other fields than it was written with for row {row}"
        if max(entry["width"], entry["height"]) >= 2**31:
            return f"gives {entry['key']} the size {entry['width']}x{entry['height']}"
        if entry["key"] != sample_key(row):
            return f"has the key {entry['key']!r} for row {row}"
        if entry["status"] == "written":
            names += [f"{entry['key']}.{extension}", f"{entry['key']}.cls"]
            sizes += [None, len(str(entry["label"]))]
    members = [WrittenMember(**member) for member in sidecar["members"]]
    if [member.name for member in members] != names or sidecar["samples"] != len(names) // 2:
        return "lists members that are not those of its samples"
    for member, size in zip(members, sizes, strict=True):
        if member.offset != position + BLOCK or size not in (None, member.size):
            return f"gives {member.name} the place {member.offset} and the size {member.size}, which cannot be"
        position = member.offset + padded(member.size)
    if sidecar["bytes"] != (position + len(ending(position)) if members else 0):
        return f"says {sidecar['bytes']} bytes, its members make another number"
    return None


def _check_tar(
    tar: bytes | None,
    trouble: str,
    sha256: str | None,
    members: list[WrittenMember],
    sidecar: dict[str, Any],
    problem: Any,
) -> None:
    if tar is None or not members:
        if members:
            problem(".tar", trouble)
        elif tar is not None:
            problem(".tar", "exists, though every input of this shard was rejected")
        return
    if len(tar) != sidecar["bytes"]:
        first = next((m.name for m in members if m.offset + padded(m.size) > len(tar)), "")
        problem(".tar", f"has {len(tar):,} bytes instead of {sidecar['bytes']:,}", first)
    damaged = 0
    for member, entry in zip(members, _per_member(sidecar), strict=True):
        what = _damage(tar, member, entry["label"])
        if what and sha256 == sidecar["sha256"]:
            problem(".json", "does not describe this member as it is, though the tar is as it was written", member.name)
        elif what:
            problem(".tar", what, member.name)
        damaged += bool(what)
    end = sidecar["bytes"]
    last = members[-1].offset + padded(members[-1].size)
    if len(tar) >= end and any(tar[last:end]):
        problem(".tar", f"has other bytes than zeros in its end, from byte {last:,} on")
    elif sha256 != sidecar["sha256"] and not damaged and len(tar) == end:
        problem(".json", "has another sha256 than the tar, whose members are all as recorded: the sidecar was changed")


def _per_member(sidecar: dict[str, Any]) -> list[dict[str, Any]]:
    written = (entry for entry in sidecar["inputs"] if entry["status"] == "written")
    return [entry for entry in written for _ in range(2)]


def _damage(tar: bytes, member: WrittenMember, label: int) -> str | None:
    """What is wrong with the bytes of one member."""
    start, end = member.offset - BLOCK, member.offset + member.size
    if end > len(tar):
        return "lies behind the end of the tar" if start >= len(tar) else "is cut off by the end of the tar"
    if tar[start : member.offset] != member_header(member.name, member.size):
        return "its header was changed"
    data = tar[member.offset : end]
    if zlib.crc32(data) != member.crc32:
        return "its bytes were changed"
    if member.name.endswith(".cls") and data != str(label).encode():
        return f"says {data[:20]!r}, the label is {label}"
    if any(tar[end : member.offset + padded(member.size)]):
        return "the zeros behind it were changed"
    return None


def _undecodable(codec: Codec, tar: bytes, member: WrittenMember, options: dict[str, Any]) -> str | None:
    """Why an image is not a square of the right size; None where it is."""
    data = tar[member.offset : member.offset + member.size]
    size = options["size"]
    pixels = read_raw(data) if options["format"] == "raw" else codec.decode(data)
    if pixels is None:
        return "cannot be decoded"
    if pixels.shape != (size, size, 3) or pixels.dtype != np.uint8:
        return f"holds {pixels.dtype} of shape {pixels.shape}, not a square of {size} pixels"
    return None


# -------------------- What describes a data set as a whole, held against what follows from its plan and its sidecars.


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


# -------------------- Every promise of a data set on disk, checked from the plan and the sidecars.


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


# -------------------- Damaged parts of a data set are removed, and made again from the source by the same plan.


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
    return convert(source, folder, options, engine, progress)


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
