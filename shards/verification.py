"""Checks a dataset on disk, byte by byte, against its plan and what was recorded when it was written; and repairs it.

There is one way to check a file: what it must be follows from what is trusted more (the plan before the sidecars, these before what
describes the whole), and the first place where it is something else is named. Nothing here is ever needed to read a dataset.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from alexprep.shards.conversion import Report, check_apart, convert, publish_plan
from alexprep.shards.dataset_format import (
    CARD,
    DATASET,
    FORMATS,
    HUB_FILES,
    INDEX,
    INDEX_DTYPES,
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
from alexprep.shards.image_codec import Target, read_raw, shared_decoder
from alexprep.shards.listing import ClassNames, list_inputs
from alexprep.shards.manifest import (
    Manifest,
    Sidecar,
    image_members,
    input_record,
    sidecar_of,
    stored_record,
    stored_size,
)
from alexprep.shards.metadata import EXTENSION, MetadataError, document_bytes
from alexprep.shards.plan import (
    NO_IDENTITY,
    Plan,
    PlanTable,
    Shard,
    ShardOptions,
    as_written,
    differences,
    draw_up,
    numbered_as_begun,
    options_of,
    plan_digest,
    shared_table,
)
from alexprep.shards.sources import LAYOUTS
from alexprep.shards.sources.base import NO_CHOICES, SPLITS, Choices, Source, as_json, choices_of
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.storage import content, digest_json, file_sha256, folder_at, is_temporary, json_bytes, trouble
from alexprep.shards.tar_format import BLOCK, WrittenMember, dali_index, member_header, padded
from alexprep.shards.worker_pool import Engine, as_engine, attending

Progress = Callable[[int, int], None]

_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, IndexError)  # what a document of another form raises
_CHANGED = "was changed (or its sha256 in dataset.json)"
_LOOKED_AT = 64  # sidecars that tell which plan the shards were made by


class Problem(NamedTuple):
    """Something in a dataset that is not as `alexprep shard` wrote it."""

    file: str  # its name below the dataset's folder
    member: str  # or sample concerned; empty where it is the file as a whole
    what: str  # is wrong, in words

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.file}{f', {self.member}' if self.member else ''}: {self.what}"


@dataclass(frozen=True)
class Verdict:
    """What `verify` found: all `problems`, of which a sound dataset has none; and how many `shards` there are in the plan.

    `samples` are the images in sound shards, `bytes` those of their tars, `seconds` the time that it took.
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
    progress: Progress = lambda finished, total: None,
) -> Verdict:
    """Checks a dataset: every byte of it against what was recorded when it was written; with `decode`, every image too.

    `engine` runs the work, one task a shard; a number stands for so many worker processes on this machine. `progress` is called with
    (finished shards, or images when they are decoded; how many there are). Raises AlexprepError where the folder has no dataset.
    """
    started = time.monotonic()
    folder, engine = folder_at(folder), as_engine(engine)
    problems: list[Problem] = []
    plan, dataset = _trusted_plan(folder, problems)
    if plan is None:  # nothing can be held against it
        return Verdict(folder, 0, 0, 0, problems, time.monotonic() - started)
    shards = list(plan.each_shard())
    table = _plan_table(plan, len(shards), dataset, problems)
    checked: list[_CheckedShard] = []
    show = (lambda finished: progress(finished, plan.inputs)) if decode else (lambda finished: None)
    for result in engine.run(functools.partial(_check_shard, plan, decode, table is not None), shards, show):
        checked.append(result)
        if not decode:
            progress(len(checked), len(shards))
    checked.sort(key=lambda result: result.shard.group)
    for result in checked:
        problems += result.problems
    problems += _misplaced_tars(checked, dataset)
    if table is not None and all(result.described for result in checked):
        problems += _check_descriptions(plan, table, dataset)
    if dataset:
        problems += _check_statistics(folder, str(dataset.get("digest")))
    problems += _foreign_files(plan, shards, {CARD} & _recorded_files(dataset).keys())
    sound = [result for result in checked if not result.problems]
    samples, size = sum(result.samples for result in sound), sum(result.bytes for result in sound)
    return Verdict(folder, len(shards), samples, size, problems, time.monotonic() - started)


def source_of(data: Path | str, place: str, layout: str | None = None, choices: Choices = NO_CHOICES) -> Source:
    """The source at a path or URL, read as it was when the dataset in `data` was begun: by the same layout and choices.

    A `layout` and `choices` that are given go before what is recorded. A dataset of an earlier release, which looked otherwise, may
    need them; whether they give its plan, `repair` sees.
    """
    folder = folder_at(data)
    for name in (PLAN, DATASET):
        document = _parsed(content(folder / name)[0])
        recorded = document.get("layout") or document.get("source", {}).get("layout")
        if recorded in LAYOUTS:
            if layout in (None, recorded):
                known = as_json(choices_of(document.get("choices", {})))
                choices = choices_of(known | as_json(choices))
            return find_source(place, layout or recorded, choices)
    return find_source(place, layout, choices)


def repair(
    folder: Path | str,
    source: Source,
    problems: Sequence[Problem],
    engine: Engine | int,
    progress: Progress = lambda finished, total: None,
    class_names: ClassNames | None = None,
) -> Report:
    """Makes exactly the damaged shards again, by the same plan, and whatever describes the whole.

    Files that belong to nothing are left alone, and so are statistics: `alexprep pca-stats` makes them. `source` is what the dataset
    was made from, `problems` what `verify` found; `engine` and `progress` are as in `convert`. `class_names`, as `ShardOptions` has it,
    goes before what is recorded.

    Raises:
        AlexprepError: the source does not give the plan of the dataset (nothing is touched then), or other bytes for a damaged
            shard (which is missing then); or nothing tells the options of the dataset any more.
    """
    folder, damaged = folder_at(folder), {problem.file for problem in problems}
    options, trusted = _options(folder)
    check_apart(source, folder)
    options = replace(options, class_names=class_names or options.class_names)
    listing = list_inputs(source, options.labels, options.class_names)
    document, tables = draw_up(numbered_as_begun(listing, options.labels, trusted), options)
    document = as_written(document, trusted)
    _check_same_plan(folder, document, source)
    if PLAN in damaged:
        (folder / PLAN).unlink(missing_ok=True)
    if damaged & {PLAN, PLAN_TABLE}:  # with a plan that nobody can tell goes what was beside it
        (folder / PLAN_TABLE).unlink(missing_ok=True)
    plan = publish_plan(folder, document, tables)
    for shard in plan.each_shard():
        files = [plan.file(shard, suffix) for suffix in (".json", ".idx", ".tar")]
        if damaged & {str(file.relative_to(folder)) for file in files}:
            for file in files:  # the sidecar first: interrupted here, the shard does not count
                file.unlink(missing_ok=True)
    if DATASET in damaged:  # it can no longer say what a shard must become
        (folder / DATASET).unlink(missing_ok=True)
    return convert(source, folder, options, engine, progress, max_rejects="100%")  # it was published with these rejects


def _trusted_plan(folder: Path, problems: list[Problem]) -> tuple[Plan | None, dict[str, Any]]:
    """The plan and dataset.json; what is unsound about them goes to `problems`, and a plan that was changed is None."""
    if not (folder / PLAN).exists() and not (folder / DATASET).exists():
        raise AlexprepError(
            f"{folder} holds no data set: name another folder, or make one with `alexprep shard SOURCE`"
        )
    document, dataset = (_document(folder, name, problems) for name in (PLAN, DATASET))
    if not document:
        return None, dataset
    plan, named, what = Plan(folder, document), _named_plans(folder, dataset), ""
    if named and plan.digest not in named:
        what = ": dataset.json or the sidecars name another plan"
    try:
        next(plan.each_shard(), None)
        FORMATS[plan.target.format], plan.target.common_size, INDEX_DTYPES[plan.format_version]
    except _DAMAGED as error:
        what = f" ({type(error).__name__}: {error})"
    if what:
        problems.append(Problem(PLAN, "", f"was changed{what}"))
        return None, dataset
    if dataset and dataset.get("plan") != plan.digest:
        problems.append(Problem(DATASET, "", "names another plan than plan.json and the sidecars"))
    return plan, dataset


def _document(folder: Path, name: str, problems: list[Problem]) -> dict[str, Any]:
    """plan.json or dataset.json; empty where nothing can be read. What is wrong with it goes to `problems`."""
    raw, what = content(folder / name)
    document = _parsed(raw)
    if raw is None and name == DATASET and not (folder / name).exists():
        what += ": the data set is unfinished, run the same `alexprep shard` again"
    elif raw is not None and (not document or json_bytes(document) != raw):
        what = "was changed"
    if what:
        problems.append(Problem(name, "", what))
    return document


def _parsed(raw: bytes | None) -> dict[str, Any]:
    """The JSON object in `raw`; an empty one where there is none."""
    with contextlib.suppress(ValueError):
        document = json.loads(raw or b"{}")
        json_bytes(document)  # refuses NaN and infinity
        return document if isinstance(document, dict) else {}
    return {}


def _named_plans(folder: Path, dataset: dict[str, Any]) -> set[str]:
    """The plans that dataset.json names, and most of the sidecars: as many as are read in a moment, from all over the dataset."""
    paths = [
        path for split in dict.fromkeys(SPLITS.values()) for path in sorted((folder / split).glob(f"{split}-*.json"))
    ]
    sidecars = (_parsed(content(path)[0]) for path in paths[:: max(1, len(paths) // _LOOKED_AT)])
    named = Counter(str(sidecar.get("plan")) for sidecar in sidecars if sidecar)
    return {plan for plan, _ in named.most_common(1)} | ({str(dataset["plan"])} if "plan" in dataset else set())


def _plan_table(plan: Plan, count: int, dataset: dict[str, Any], problems: list[Problem]) -> PlanTable | None:
    """plan.parquet, where it is the one that the `count` shards were made from."""
    wanted = _recorded_files(dataset).get(PLAN_TABLE)
    try:
        if wanted is not None and file_sha256(plan.folder / PLAN_TABLE) != wanted:
            what = _CHANGED
        else:
            table = plan.table()
            if table.num_row_groups == count:
                return table
            what = f"describes {table.num_row_groups} shards, the plan has {count}"
    except OSError as error:
        what = trouble(error)
    except AlexprepError as error:
        what = str(error)
    problems.append(Problem(PLAN_TABLE, "", what))
    return None


def _recorded_files(dataset: dict[str, Any]) -> dict[str, Any]:
    """The sha256 of files that a dataset.json records, by name; of a damaged one none."""
    files = dataset.get("files")
    return files if isinstance(files, dict) else {}


class _CheckedShard(NamedTuple):
    shard: Shard
    problems: list[Problem]
    sha256: str | None  # of its tar, where there is one
    described: bool = False  # by a sound sidecar
    samples: int = 0  # by that
    bytes: int = 0


# One shard: its sidecar against the plan, then tar and index against the sidecar.


def _check_shard(
    plan: Plan, decode: bool, with_table: bool, shard: Shard, condemned: Mapping[int, str]
) -> _CheckedShard:
    """Compares a shard with everything that is recorded of it. `condemned`: samples that end the process when decoded, and why."""
    problems: list[Problem] = []

    def note(suffix: str, what: str | None, member: str = "") -> None:
        if what:
            problems.append(Problem(f"{shard.split}/{shard.name}{suffix}", member, what))

    labels = None
    if with_table:
        planned = shared_table(plan.folder, plan.digest).read_row_group(shard.group, columns=["label"])
        labels = planned.column("label").to_pylist()
    tar, tar_trouble = content(plan.file(shard, ".tar"))
    sha256 = None if tar is None else hashlib.sha256(tar).hexdigest()
    sidecar, what = _checked_sidecar(plan, shard, labels)
    note(".json", what)
    if sidecar is None:
        return _CheckedShard(shard, problems, sha256)
    members = [WrittenMember(**member) for member in sidecar["members"]]
    if not members:
        note(".tar", None if tar is None else "exists, though every input of this shard was rejected")
    elif tar is None:
        note(".tar", tar_trouble)
    else:
        _check_tar(tar, sha256 == sidecar["sha256"], members, sidecar, note)
    idx, idx_trouble = content(plan.file(shard, ".idx"))
    if idx != (dali_index(members).encode() if members else None):
        note(".idx", idx_trouble or "is not the index of this shard")
    if decode and tar is not None and not problems:
        images = (WrittenMember(**each) for each in image_members(sidecar["members"]))
        written = (entry for entry in sidecar["inputs"] if entry["status"] == "written")
        for position, (member, entry) in enumerate(zip(images, written, strict=True)):
            with attending(position):
                size = stored_size(plan.target, entry)
                note(".tar", condemned.get(position) or _undecodable(tar, member, plan.target, size), member.name)
    return _CheckedShard(shard, problems, sha256, True, sidecar["samples"], sidecar["bytes"])


def _checked_sidecar(plan: Plan, shard: Shard, labels: list[int] | None) -> tuple[Sidecar | None, str | None]:
    """A shard's sidecar, where every line of it is as it must be, or what is wrong with it."""
    raw, what = content(plan.file(shard, ".json"))
    if raw is None:
        return None, f"{what}, so the shard does not count"
    found = _parsed(raw)
    try:
        wanted = _sidecar_as_it_must_be(found, plan, shard, labels)
    except _DAMAGED as error:
        return None, f"was changed ({type(error).__name__}: {error})"
    if json_bytes(wanted, None) == raw:
        return wanted, None
    difference = _first_difference(found["inputs"], wanted["inputs"], "inputs") or _first_difference(found, wanted)
    return None, f"was changed: {difference or 'it is written in another way'}"


def _sidecar_as_it_must_be(found: Sidecar, plan: Plan, shard: Shard, labels: list[int] | None) -> Sidecar:
    """What follows from the plan, and from what only the sidecar tells: fates, sizes of sources and members, checksums.

    `labels` are those of its rows by plan.parquet; None where that cannot be read.
    """
    extension, position = FORMATS[plan.options["format"]], 0
    inputs: list[dict[str, Any]] = []
    members: list[dict[str, Any]] = []
    recorded = iter(found["members"])
    if labels is None:
        labels = [_integer(entry["label"], -1) for entry in found["inputs"]]
    if len(found["inputs"]) != len(labels):
        raise ValueError(f"it lists {len(found['inputs'])} inputs, the plan has {len(labels)}")
    for row, (entry, label) in enumerate(zip(found["inputs"], labels, strict=True), shard.first_row):
        width, height = (_integer(entry[side], 0, 2**31) for side in ("width", "height"))
        reason = None if "kept" in entry else str(entry["reason"])
        damage = str(entry["reason"]) if "kept" in entry and "reason" in entry else None
        record = input_record(row, label, width, height, bool(entry.get("kept")), reason, damage)
        record |= _stored_as_it_must_be(plan.target, entry) if reason is None else {}
        along = _metadata_as_it_must_be(plan, entry) if reason is None else b""
        inputs.append(record | _facts_as_they_must_be(entry) | ({"metadata": json.loads(along)} if along else {}))
        kinds = [(extension, None), ("cls", str(label).encode())][: 1 + plan.labelled] if reason is None else []
        kinds += [(EXTENSION, along)] if along else []
        for kind, known in kinds:
            member: dict[str, Any] = next(recorded, {})
            size = _integer(member["size"], 0) if known is None else len(known)
            crc32 = _integer(member["crc32"], 0, 2**32) if known is None else zlib.crc32(known)
            name, offset = f"{sample_key(row)}.{kind}", position + BLOCK
            members.append({"name": name, "offset": offset, "size": size, "crc32": crc32})
            position = offset + padded(size)
    return sidecar_of(plan, inputs, members, str(found["sha256"]))


def _stored_as_it_must_be(target: Target, entry: dict[str, Any]) -> dict[str, Any]:
    """What a sidecar's entry of a written image must say of its stored size."""
    if target.common_size:
        return {}
    source = tuple(_integer(entry[side], 1) for side in ("height", "width"))
    found = tuple(_integer(entry[side], 1) for side in ("stored_height", "stored_width"))
    # An image may have been turned before.
    possible = [target.resize(*sides).size for sides in (source, source[::-1])[: 1 + target.orient]]
    return stored_record(target, found if found in possible else possible[0])


def _metadata_as_it_must_be(plan: Plan, entry: dict[str, Any]) -> bytes:
    """The KEY.json that goes along with a sample by its line in the sidecar; b"" for none."""
    values = entry.get("metadata")
    if values is None or plan.options["metadata"] is None:
        return b""
    try:
        return document_bytes(dict(values), plan.metadata_names)
    except MetadataError as error:
        raise ValueError(f"metadata: {error}") from None


def _facts_as_they_must_be(entry: dict[str, Any]) -> dict[str, Any]:
    """What a line of a sidecar says of the file that was read; {} where that could not be, or by an earlier release."""
    if "sha256" not in entry:
        return {}
    kind, sha256 = entry["format"], entry["sha256"]
    if not (kind is None or type(kind) is str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"{_short(kind)} is no format, or {_short(sha256)} no sha256")
    facts = {"format": kind, "bytes": _integer(entry["bytes"], 0), "sha256": sha256}
    return facts | ({"orientation": _integer(entry["orientation"], 2, 9)} if "orientation" in entry else {})


def _integer(value: Any, low: int, high: int = 2**63) -> int:
    if type(value) is not int or not low <= value < high:
        raise ValueError(f"{_short(value)} is no whole number in [{low}, {high})")
    return value


def _check_tar(tar: bytes, is_recorded: bool, members: list[WrittenMember], sidecar: Sidecar, note: Any) -> None:
    """Notes every member that is not as recorded. Where `is_recorded`, the sha256 is right: then the sidecar is to blame."""
    end, last = sidecar["bytes"], members[-1].offset + padded(members[-1].size)
    if len(tar) != end:
        first = next((m.name for m in members if m.offset + padded(m.size) > len(tar)), "")
        note(".tar", f"has {len(tar):,} bytes instead of {end:,}", first)
    labels = {entry["key"]: entry["label"] for entry in sidecar["inputs"]}
    damaged = 0
    for member in members:
        what = _damage(tar, member, labels[member.name.partition(".")[0]])
        damaged += bool(what)
        if what and is_recorded:
            note(".json", "does not describe this member as it is, though the tar is as it was written", member.name)
        else:
            note(".tar", what, member.name)
    if len(tar) >= end and any(tar[last:end]):
        note(".tar", f"has other bytes than zeros in its end, from byte {last:,} on")
    elif not is_recorded and not damaged and len(tar) == end:
        note(".json", "has another sha256 than the tar, whose members are all as recorded: the sidecar was changed")


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


def _undecodable(tar: bytes, member: WrittenMember, target: Target, size: tuple[int, int]) -> str | None:
    """Why an image is not one of this height and width; None where it is."""
    data = tar[member.offset : member.offset + member.size]
    pixels = read_raw(data) if target.format == "raw" else shared_decoder().decode(data)
    if pixels is None:
        return "cannot be decoded"
    if pixels.shape != (*size, 3) or pixels.dtype != np.uint8:
        return f"holds {pixels.dtype} of shape {pixels.shape}, not {size[1]} x {size[0]} pixels"
    return None


# The whole: what describes it follows from the plan and the sidecars.


def _misplaced_tars(checked: list[_CheckedShard], dataset: dict[str, Any]) -> Iterator[Problem]:
    """Tars that hold the bytes of another shard, by what dataset.json recorded."""
    with contextlib.suppress(*_DAMAGED):  # it may be the damaged file
        names = {str(record["sha256"]): str(record["name"]) for record in recorded_shards(dataset)}
        for result in checked:
            shard = result.shard
            other = names.get(result.sha256 or "", shard.name)
            if other != shard.name:
                yield Problem(f"{shard.split}/{shard.name}.tar", "", f"is the tar of {other}")


def _check_descriptions(plan: Plan, table: PlanTable, dataset: dict[str, Any]) -> Iterator[Problem]:
    """Index, ledger, card, _info.json and dataset.json, against those that follow from the sidecars, which must all be sound."""
    manifest, recorded = Manifest(plan), _recorded_files(dataset)
    for shard in plan.each_shard():  # one sidecar in memory at a time
        manifest.add(shard, table.read_row_group(shard.group), _parsed(content(plan.file(shard, ".json"))[0]))
    files = manifest.files()
    for name, wanted in files.items():
        found, trouble = content(plan.folder / name)
        if found is None:
            yield Problem(name, "", trouble)
            continue
        as_recorded = recorded.get(name) == hashlib.sha256(found).hexdigest()
        wrong_row = None if found == wanted else _first_row_that_differs(name, found, wanted)
        if wrong_row and as_recorded:  # then it is the sidecar that it was made from
            number, row, what = wrong_row
            split = name.partition("/")[0]
            yield Problem(f"{split}/{shard_name(split, number)}.json", row, f"was changed: {name} {what}")
        elif wrong_row:
            yield Problem(name, *wrong_row[1:])
        elif name in recorded and not as_recorded:
            yield Problem(name, "", _CHANGED)
    info, trouble = content(plan.folder / TIMM_INFO)
    if info != json_bytes(manifest.timm_info()):
        yield Problem(TIMM_INFO, "", trouble or "does not describe these shards")
    if CARD in recorded:
        card, trouble = content(plan.folder / CARD)
        if card is None or hashlib.sha256(card).hexdigest() != recorded[CARD]:
            yield Problem(CARD, "", trouble if card is None else _CHANGED)
    if dataset.get("plan") == plan.digest:
        names = (*files, PLAN_TABLE, *({CARD} & recorded.keys()))
        digests = {name: str(recorded.get(name)) for name in names}
        if difference := _first_difference(dataset, json.loads(json_bytes(manifest.dataset(digests)))):
            # What no digest covers may have been changed in either file.
            either = f", or {PLAN} was changed" if difference.startswith(NO_IDENTITY) else ""
            yield Problem(DATASET, "", f"does not describe these shards: {difference}{either}")


def _first_row_that_differs(name: str, found: bytes, wanted: bytes) -> tuple[int, str, str] | None:
    """Of an index or a ledger: the shard, the name of the row, and what differs; None where all rows are equal."""
    try:
        have, want = (_rows(name, file) for file in (found, wanted))
    except Exception as error:  # noqa: BLE001  (numpy and pyarrow raise many kinds for what a damaged file holds)
        return 0, "", f"cannot be read ({error})".splitlines()[0]
    if len(have) != len(want):
        return 0, "", f"has {len(have):,} rows, must have {len(want):,}"
    for number, (one, other) in enumerate(zip(have, want, strict=True)):
        if what := _first_difference(one, other):
            return other["shard"], other.get("key", f"record {number}"), what
    # Only the ledger's bytes may differ where its rows do not: other releases of pyarrow compress differently.
    return None if name.endswith(LEDGER) else (0, "", "was changed")


def _rows(name: str, file: bytes) -> list[dict[str, Any]]:
    if name.endswith(LEDGER):
        # In this thread alone: a thread of pyarrow's that still reads when the process ends would abort it.
        return pq.read_table(io.BytesIO(file), use_threads=False, pre_buffer=False).to_pylist()  # type: ignore[no-any-return]
    index = np.load(io.BytesIO(file), allow_pickle=False)
    return [dict(zip(index.dtype.names, record, strict=True)) for record in index.tolist()]


def _check_statistics(folder: Path, data_digest: str) -> Iterator[Problem]:
    """The files of the statistics, each as it was written; nothing where there are none."""
    if not (folder / STATISTICS).exists():
        return
    raw, what = content(folder / STATISTICS)
    document = _parsed(raw)
    signed = {key: value for key, value in document.items() if key != "digest"}
    if raw is not None and (json_bytes(document) != raw or document.get("digest") != digest_json(signed)):
        what, document = "was changed", {}
    elif raw is not None and document.get("data_digest") != data_digest:
        what = "describes other shards"
    wrong = {STATISTICS: what}
    for path, key in ((MEAN_IMAGE, "mean_image_sha256"), (MEAN_PICTURE, "mean_picture_sha256")):
        if document.get("size", 0) is None:  # images of different sizes have no mean image
            wrong[path] = "belongs to other statistics" if (folder / path).exists() else ""
            continue
        found, wrong[path] = content(folder / path)
        if found is not None and key in document and hashlib.sha256(found).hexdigest() != document[key]:
            wrong[path] = "was changed"
    for path, what in wrong.items():
        if what:
            yield Problem(str(path), "", f"{what}: run `alexprep pca-stats` again")


def _foreign_files(plan: Plan, shards: list[Shard], recorded: set[str]) -> Iterator[Problem]:
    """What lies in the folder and belongs to nothing; `recorded` are the names of what only some sets have."""
    known = recorded | {PLAN, PLAN_TABLE, DATASET, TIMM_INFO, TUNING, *map(str, (STATISTICS, MEAN_IMAGE, MEAN_PICTURE))}
    known |= {f"{split}/{name}" for split in plan.document["splits"] for name in (INDEX, LEDGER)}
    known |= {f"{shard.split}/{shard.name}{suffix}" for shard in shards for suffix in (".tar", ".idx", ".json")}
    for path in sorted(plan.folder.rglob("*")):
        name = str(path.relative_to(plan.folder))
        if (
            name not in known
            and TAR_INDEXES not in path.parts
            and name.partition("/")[0] not in HUB_FILES
            and not path.is_dir()
        ):
            left = "is being written, or left from an interrupted run"
            yield Problem(name, "", left if is_temporary(path.name) else "is no file of this data set")


def _first_difference(found: Any, wanted: Any, place: str = "") -> str | None:
    """Where a JSON value differs first from what it must be, such as "a[1].b is 2, must be 3"; None where they are equal."""
    if isinstance(found, list) and isinstance(wanted, list):
        if len(found) != len(wanted):
            return f"{place or 'it'} has {len(found):,} entries, must have {len(wanted):,}"
        pairs = ((f"{place}[{n}]", one, other) for n, (one, other) in enumerate(zip(found, wanted, strict=True)))
    elif isinstance(found, dict) and isinstance(wanted, dict):
        if found.keys() != wanted.keys():
            return f"{place or 'it'} has the fields {_short(list(found))}, must have {_short(list(wanted))}"
        pairs = ((f"{place}.{key}".lstrip("."), found[key], wanted[key]) for key in wanted)
    elif type(found) is type(wanted) and found == wanted:
        return None
    else:
        return f"{place or 'it'} is {_short(found)}, must be {_short(wanted)}"
    return next((what for at, one, other in pairs if (what := _first_difference(one, other, at))), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 70 else f"{text[:69]}…"


def _options(folder: Path) -> tuple[ShardOptions, dict[str, Any]]:
    """The options that a dataset was made with, and what tells them: its plan, or dataset.json where the plan was changed."""
    plan, dataset = (_parsed(content(folder / name)[0]) for name in (PLAN, DATASET))
    agree = dataset.get("plan", plan_digest(plan)) == plan_digest(plan)
    for trusted in (plan, dataset) if agree else (dataset, plan):
        with contextlib.suppress(*_DAMAGED):
            return options_of(trusted), trusted
    raise AlexprepError(
        f"neither {folder / PLAN} nor {DATASET} tells the options any more: shard again into a new --out"
    )


def _check_same_plan(folder: Path, document: dict[str, Any], source: Source) -> None:
    """Raises AlexprepError where the plan that the source gives now is not the one that the shards were made by."""
    dataset = _parsed(content(folder / DATASET)[0])
    known = _named_plans(folder, dataset)
    if not known or plan_digest(document) in known:  # where nothing was finished, plan.json alone decides
        return
    what = []
    with contextlib.suppress(*_DAMAGED):  # it may be the damaged file
        source_then = dataset["source"]
        what = differences({**dataset, "layout": source_then["layout"], "inputs": source_then["inputs"]}, document)
    raise AlexprepError(
        f"SOURCE {source.files.display()} does not give the plan that the shards in {folder} were made by: "
        f"{'; '.join(what) or 'its inputs, the options or the versions differ'}. Nothing was touched: name the SOURCE that they "
        "were made from, with all its files"
    )
