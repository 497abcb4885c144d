"""Turns a source of images into a finished dataset: `convert` is the whole job, and a rerun of it does only what is missing.

Which input goes into which shard is decided in `alexprep.shards.plan`, one shard is written by `alexprep.shards.shard_writer`, and
the tasks are run by an engine: `alexprep.shards.worker_pool` here, `alexprep.shards.ray_runner` on many machines.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import math
import os
import re
import secrets
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa

from alexprep.shards.dataset_card import MARK
from alexprep.shards.dataset_format import CARD, DATASET, PLAN, PLAN_TABLE, TIMM_INFO, read_json, recorded_shards
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Codec, Target
from alexprep.shards.image_header import Refused, general_reason
from alexprep.shards.listing import Listing, list_inputs
from alexprep.shards.manifest import Manifest, Rejects, read_sidecar, rejects_in
from alexprep.shards.metadata import MAX_BYTES, MetadataError, document_bytes
from alexprep.shards.plan import (
    MachineCheck,
    Plan,
    PlanTable,
    Shard,
    ShardOptions,
    as_begun,
    as_written,
    differences,
    draw_up,
    locations,
    numbered_as_begun,
    publish_table,
)
from alexprep.shards.shard_writer import (
    MakeCodec,
    PlannedInput,
    ShardWriter,
    bound_memory,
    check_device,
    open_codec,
    planned_inputs,
    shared_codec,
)
from alexprep.shards.sources.base import SPLITS, PassedOver, Source
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.storage import (
    content,
    file_sha256,
    folder_at,
    is_local,
    json_bytes,
    make_folder,
    publish_bytes,
    publish_first,
    remove_temporaries,
    sync_folder,
)
from alexprep.shards.tar_format import BLOCK, padded
from alexprep.shards.worker_pool import Engine, LocalEngine, as_engine, attending, reading

Progress = Callable[[int, int], None]

_NEXT_STEPS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO), "make room or mend the disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "see to its permissions"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n)"),
}
_PROBES = 256  # JPEG sizes of photos spread by about 40 %, so the mean of 256 is within 10 % in 99.99 % of cases
MAX_NO_PICTURES = "50%"  # more, and SOURCE is hardly what its user takes it for, as a folder of pages that say "404"
# Beyond what the images of any set are on average: one side over the other; and bytes, those of 22 million pixels.
_MOST_OBLONG, _MOST_AS_IT_IS = 8, 64 * 2**20
_WORST_REASONS = 3  # that an error names
_LINE_BYTES = 600  # of an input in sidecar, index and ledger, measured: 340-380 with usual names
_METADATA_COPIES = 3  # of a KEY.json: in the shard, its sidecar and the ledger


@dataclass(frozen=True)
class Report:
    """What a run of `convert` did.

    Of the `inputs` of the plan `written` are images in shards (`samples` by split, `bytes` in all tars), `kept` of these with the
    source's own bytes. `rejected` says how often each reason occurred; the numbers in reasons are replaced by "N". `damaged` says the
    same of images that were written for all that (`--on-damaged keep`). `passed_over` says how many files each rule passed over, and the
    first names. `made_inputs` is what this run converted, in `seconds`. `warnings` are sentences about what came of it, such as classes of
    which every picture was rejected; `metadata` the names of what goes along with the images.
    """

    folder: Path
    inputs: int
    written: int
    rejected: Counter[str]
    passed_over: dict[str, PassedOver]
    kept: int
    bytes: int
    made_inputs: int
    seconds: float
    samples: dict[str, int]
    damaged: Counter[str]
    warnings: list[str]
    metadata: list[str]

    @property
    def found(self) -> int:
        """How many files, members or rows there are at the source: the inputs, and what was passed over."""
        return self.inputs + sum(passed.count for passed in self.passed_over.values())


def convert(
    source: Source | Path | str,
    folder: Path | str,
    options: ShardOptions,
    engine: Engine | int,
    progress: Progress = lambda finished, total: None,
    make_codec: MakeCodec = open_codec,
    announce: Callable[[Listing], None] = lambda listing: None,
    max_rejects: int | str | None = None,
) -> Report:
    """Turns a source of images into a finished dataset.

    Several runs with the same options may work in one folder at the same time, on one machine or on many that share it:
    each begins at another shard, and passes over those that are finished.

    Args:
        source: where the images are; for a path or URL see `find_source`.
        folder: the dataset's folder, made if need be: a path, or a `UPath` on a store that fsspec opens.
        options: what the shards hold.
        engine: runs the work, one task a shard; a number stands for so many worker processes on this machine.
        progress: called with (finished inputs, inputs to do in this run).
        make_codec: makes the codec in each worker.
        announce: called with what the source holds, before anything is written.
        max_rejects: how many inputs may be rejected, as a number or as a share such as "2.5%". More are an error and nothing is
            published, but shards that are finished stay: a run with a higher number goes on from there. None allows damaged
            pictures, each of which is told, and half of the inputs to be no pictures, even by their headers.

    Raises:
        AlexprepError: nothing usable at the source, too many rejects, other options than those the folder was begun with, a full
            disk.
    """
    started = time.monotonic()
    folder, engine = folder_at(folder), as_engine(engine)
    source = source if isinstance(source, Source) else find_source(str(source))
    RejectLimit.of(max_rejects, 0)  # refused before any work where it makes no sense
    with _system_errors_in_words(folder):
        if isinstance(engine, LocalEngine):  # before the folder is bound to it
            check_device(options.target)
        plan = make_plan(source, options, folder, announce)  # published, or refused where another one is there
        _make_folders(plan)
        table = plan.table()
        missing, rejected = _missing(plan)
        total = sum(table.rows(shard.group) for shard in missing)
        # What was published once is published again.
        limit, whole = RejectLimit.of("100%" if _finished(plan) else max_rejects, plan.inputs), not missing
        if missing and limit.allows(rejected):
            check_space(
                plan, source, functools.partial(shared_codec, make_codec, options.target), missing, table, engine
            )
            check = MachineCheck.prepared_here(plan, source, table)
            writer = ShardWriter(plan, source, options.target, make_codec, check)
            tasks = _in_turn(plan, missing)
            made = engine.run(writer, tasks, lambda finished: progress(finished, total))
            try:
                whole = _all_made(made, len(tasks), rejected, limit)
            finally:
                getattr(made, "close", lambda: None)()  # ends its workers, before what they were writing is removed
                _tidy(plan)
            if whole:
                progress(total, total)
        manifest = _checked_account(plan, table) if whole else None  # found = written + rejected + passed over
        if manifest is None or not limit.allows(manifest.rejects):
            raise _too_many_rejects(plan, table, limit)
        _publish(manifest)
    samples, seconds = manifest.samples, time.monotonic() - started
    written, reasons = sum(samples.values()), manifest.reasons
    done = (
        plan.passed_over,
        manifest.kept,
        manifest.tar_bytes,
        total,
        seconds,
        samples,
        manifest.damaged,
        manifest.warnings,
        manifest.metadata,
    )
    return Report(folder, plan.inputs, written, reasons, *done)


@contextlib.contextmanager
def _system_errors_in_words(folder: Path) -> Iterator[None]:
    """Raises AlexprepError for an OSError: which file, what is wrong, and what helps."""
    try:
        yield
    except OSError as error:
        place = os.fsdecode(error.filename) if error.filename else folder
        step = _NEXT_STEPS.get(error.errno or 0, "see what is there")
        raise AlexprepError(
            f"{place}: {error.strerror or error}: {step}, then run the same command again; what is finished is kept"
        ) from error


# The plan.


def make_plan(
    source: Source,
    options: ShardOptions,
    folder: Path,
    announce: Callable[[Listing], None] = lambda listing: None,
) -> Plan:
    """The plan of `folder`: published if there is none, checked against the present one otherwise.

    Of several that begin in one folder at the same time, one wins; the others go on with its plan, or are refused.
    """
    check_apart(source, folder)
    listing = list_inputs(source, options.labels, options.class_names, options.class_words)
    if (folder / PLAN).exists():
        earlier = read_json(folder / PLAN, "use a new --out")
        options = as_begun(options, earlier)
        listing = numbered_as_begun(listing, options.labels, earlier)
        if options.class_words and listing.class_words != earlier.get("words", []):
            raise AlexprepError(
                f"--class-words {options.class_words} has other words than {folder} was begun with, and those stay: leave it out, or use a new --out"
            )
    announce(listing)
    return publish_plan(folder, *draw_up(listing, options))


def check_apart(source: Source, folder: Path) -> None:
    """Raises AlexprepError where the dataset's folder, or a split's folder in it, lies among the images of `source`."""
    for place in (folder, *(folder / split for split in dict.fromkeys(SPLITS.values()))):
        if source.covers(str(place)):
            what = "lies" if place == folder else f"would put shards into {place}, which lies"
            raise AlexprepError(
                f"--out {folder} {what} among the images of SOURCE {source.files.display()}: name a folder elsewhere"
            )


def publish_plan(folder: Path, document: dict[str, Any], tables: Sequence[pa.Table]) -> Plan:
    """Publishes the plan that `draw_up` returned, or goes on with the one in `folder`, as its plan.json writes it."""
    make_folder(folder)
    if publish_first(folder / PLAN, json_bytes(document)) != json_bytes(document):
        old, new = read_json(folder / PLAN, "use a new --out"), document
        document = as_written(new, old)
        if document != old:
            raise AlexprepError(
                f"{folder} was begun differently: {'; '.join(differences(old, new)) or 'its plan was edited'}. "
                "Use the same options and inputs, or a new --out"
            )
    plan, path = Plan(folder, document), folder / PLAN_TABLE
    if not path.exists() or all(read_sidecar(plan, shard) is None for shard in plan.each_shard()):
        publish_table(folder, tables)  # also in place of another one, as long as no shard was made from it
    elif not plan.table().holds(tables):
        recorded = _finished(plan).get("files", {}).get(PLAN_TABLE)
        if recorded is not None and recorded != file_sha256(path):  # it was another one when the shards were finished
            step = f": mend it with `alexprep verify {folder} --repair SOURCE`"
        else:
            step = ", and shards may have been made from it: shard again into a new --out"
        raise AlexprepError(f"{path} has other rows than these inputs and options give{step}")
    return plan


def _finished(plan: Plan) -> dict[str, Any]:
    """dataset.json; empty where it tells nothing of this plan. What is wrong with it, `verify` will say."""
    with contextlib.suppress(AlexprepError):
        dataset = read_json(plan.folder / DATASET, "")
        if dataset.get("plan") == plan.digest:
            return dataset
    return {}


# The shards that are missing.


def _make_folders(plan: Plan) -> None:
    """Makes the splits' folders, and removes what interrupted writers left in them."""
    if is_local(plan.folder):
        for split in plan.document["splits"]:
            (plan.folder / split).mkdir(exist_ok=True)
        sync_folder(plan.folder)
    _tidy(plan)


def _tidy(plan: Plan) -> None:
    for folder in (plan.folder, *(plan.folder / split for split in plan.document["splits"])):
        remove_temporaries(folder)


def _missing(plan: Plan) -> tuple[list[Shard], Rejects]:
    """The shards that are not finished, and the rejects of the others."""
    missing, rejected = [], Rejects(0, 0)
    for shard in plan.each_shard():
        sidecar = read_sidecar(plan, shard)
        if sidecar is None:
            missing.append(shard)
        else:
            rejected = rejected.plus(rejects_in(sidecar))
    return missing, rejected


def _all_made(made: Iterator[Rejects], tasks: int, rejected: Rejects, limit: RejectLimit) -> bool:
    """Whether all `tasks` were done: no more are, as soon as it is certain that more inputs are rejected than allowed.

    `made` gives the rejects of each as it is finished.
    """
    for finished, more in enumerate(made, 1):
        rejected = rejected.plus(more)
        if not limit.allows(rejected) and finished < tasks:
            return False
    return True


def _in_turn(plan: Plan, missing: list[Shard]) -> list[list[tuple[Shard, str | None]]]:
    """The tasks, from a random one on, so that two writers seldom begin with the same shard. Each is the shards of one window.

    With each shard goes the sha256 that a finished dataset records of it: what is made again must be the same.
    """
    known: dict[str, str] | None = None
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        known = {record["name"]: str(record["sha256"]) for record in recorded_shards(_finished(plan))}
    tasks = [
        [(shard, None if known is None else known.get(shard.name, "")) for shard in shards]
        for _, shards in itertools.groupby(missing, lambda shard: (shard.split, shard.window))
    ]
    begin = secrets.randbelow(len(tasks))
    return tasks[begin:] + tasks[:begin]


def check_space(
    plan: Plan,
    source: Source,
    make: Callable[[], Codec],
    missing: list[Shard],
    table: PlanTable,
    engine: Engine,
) -> None:
    """Raises AlexprepError where the missing shards need more room than is free; tries images only where that could be."""
    if not is_local(plan.folder):
        return  # a store has no free space to ask for
    inputs = sum(table.rows(shard.group) for shard in missing)
    free = shutil.disk_usage(plan.folder).free
    along = _METADATA_COPIES * MAX_BYTES if plan.options["metadata"] else 0
    if inputs * (_most_bytes(plan.target) + along + 4096) < free:
        return
    needed = predict(source, make, missing, table, engine)
    if needed > free:
        raise AlexprepError(
            f"{inputs:,} inputs will need about {needed / 1e9:.3f} GB in {Path(plan.folder).absolute()}, "
            f"{free / 1e9:.3f} GB are free: make room, use a smaller --size or --quality, or another --out"
        )


def _most_bytes(target: Target) -> int:
    """What the images of a set take on average at the most."""
    if target.fit == "none":
        return _MOST_AS_IT_IS
    # No encoding is larger than the pixels; metadata in kept bytes may be.
    return 3 * math.prod(target.canvas or target.box) * (_MOST_OBLONG if target.fit == "shorter" else 1)


def predict(source: Source, make: Callable[[], Codec], missing: list[Shard], table: PlanTable, engine: Engine) -> int:
    """The bytes that the `missing` shards, their indexes and sidecars will take, about: from the first, which the shuffle picked."""
    inputs = sum(table.rows(shard.group) for shard in missing)
    groups = (table.read_row_group(shard.group) for shard in missing)
    probes = list(itertools.islice(itertools.chain.from_iterable(map(planned_inputs, groups)), _PROBES))
    (used,) = engine.run(functools.partial(_bytes_used, source, make), [probes], lambda finished: None)
    return int(sum(used) / len(used) * inputs) + len(missing) * tarfile.RECORDSIZE // 2


def _bytes_used(
    source: Source, make: Callable[[], Codec], probes: list[PlannedInput], condemned: Mapping[int, str]
) -> list[int]:
    """What each input takes: members with their headers, padded to blocks, and its line in the sidecar; metadata thrice."""
    codec = make()
    bound_memory(source, codec)
    used = []
    for row, (_, _, location, metadata) in enumerate(probes):
        with attending(row):
            size = 0
            if row not in condemned:
                with contextlib.suppress(OSError, MetadataError):
                    with reading(source.files.display(location.path)):
                        data = source.read(location)
                        along = document_bytes(source.metadata(location, metadata)) if metadata else b""
                    result = codec.convert(data)
                    if not isinstance(result, Refused):
                        size = 3 * BLOCK + padded(len(result.data))
                        size += BLOCK + padded(len(along)) + 2 * len(along) if along else 0
            used.append(size + _LINE_BYTES)
    return used


# Too many rejects.


@dataclass(frozen=True)
class RejectLimit:
    """How many inputs may be rejected: `words` as the user gave it, or the default, `count` of them; or only of those that are no pictures."""

    words: str
    count: int
    of_all: bool

    @classmethod
    def of(cls, given: int | str | None, inputs: int) -> RejectLimit:
        """The limit that a number, a share, or None for the default means for so many inputs.

        Raises:
            AlexprepError: `given` is neither.

        >>> [RejectLimit.of(given, 1000).count for given in (10, "2.5%", None)]
        [10, 25, 500]
        """
        text = MAX_NO_PICTURES if given is None else str(given)
        number = re.fullmatch(r"[0-9]{1,15}", text)
        share = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)%", text)
        if number:
            return cls(text, int(text), given is not None)
        if not share or Fraction(share[1]) > 100:
            raise AlexprepError(
                f"--max-rejects {text} is neither a number of inputs, such as 100, nor a share of them from 0% to 100%, such as 2.5%"
            )
        words = f"{text} (the default)" if given is None else text
        return cls(words, int(Fraction(share[1]) * inputs / 100), given is not None)

    def allows(self, rejects: Rejects) -> bool:
        """Whether so many may be rejected."""
        return (rejects.all if self.of_all else rejects.no_pictures) <= self.count


def _too_many_rejects(plan: Plan, table: PlanTable, limit: RejectLimit) -> AlexprepError:
    """Names the worst reasons in the shards that are finished, each with a file."""
    counts: Counter[str] = Counter()
    first: dict[str, tuple[Shard, int]] = {}
    for shard in plan.each_shard():
        with contextlib.suppress(KeyError, TypeError):  # a damaged one: `verify` tells more
            for position, entry in enumerate((read_sidecar(plan, shard) or {"inputs": []})["inputs"]):
                if entry["status"] == "rejected" and (limit.of_all or not entry["width"]):
                    reason = general_reason(entry["reason"])
                    counts[reason] += 1
                    first.setdefault(reason, (shard, position))
    worst = []
    for reason, count in counts.most_common(_WORST_REASONS):
        shard, position = first[reason]
        location = locations(table.read_row_group(shard.group))[position]
        worst.append(f"{reason} ({count:,}, such as {location})")
    what = "rejected" if limit.of_all else "no pictures"
    return AlexprepError(
        f"{counts.total():,} of {plan.inputs:,} inputs are {what}, more than the {limit.count:,} that --max-rejects {limit.words} "
        f"allows: {'; '.join(worst)}. Nothing is published, and the shards that are finished are kept: look at these files, then "
        "allow more by --max-rejects, or mend SOURCE and use a new --out"
    )


# What describes the whole.


def _checked_account(plan: Plan, table: PlanTable) -> Manifest:
    """Takes in every sidecar, and makes sure that all that was found is accounted for once, and something is a usable image."""
    manifest = Manifest(plan)
    for shard in plan.each_shard():
        sidecar = read_sidecar(plan, shard)
        if sidecar is None:
            raise AlexprepError(f"shard {shard.name} vanished during the run: run again")
        try:
            manifest.add(shard, table.read_row_group(shard.group), sidecar)
        except (KeyError, TypeError, ValueError) as error:
            raise AlexprepError(
                f"{shard.name}.json is damaged ({error!r}): `alexprep verify --repair SOURCE` mends it"
            ) from error
    written, rejected = sum(manifest.samples.values()), manifest.reasons
    if written + rejected.total() != plan.inputs:
        raise AlexprepError(
            f"{plan.inputs:,} inputs, but {written:,} written and {rejected.total():,} rejected: "
            f"{plan.folder} was changed by another program; use a new --out"
        )
    passed_over = sum(passed.count for passed in plan.passed_over.values())
    if plan.found is not None and plan.found != plan.inputs + passed_over:
        raise AlexprepError(
            f"{plan.folder / PLAN} tells of {plan.found:,} files, but has {plan.inputs:,} inputs and {passed_over:,} files passed "
            "over: it was edited; use a new --out"
        )
    if not written:
        worst = ", ".join(f"{reason} ({count})" for reason, count in rejected.most_common(3))
        raise AlexprepError(f"none of the {plan.inputs:,} inputs is a usable image: {worst}")
    return manifest


def _publish(manifest: Manifest) -> None:
    """Publishes indexes, ledgers, card, _info.json and, last, dataset.json, which makes the dataset a finished one."""
    folder, files = manifest.plan.folder, manifest.files()
    if (card := _card(manifest)) is not None:
        files[CARD] = card
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    digests[PLAN_TABLE] = file_sha256(folder / PLAN_TABLE)
    files[TIMM_INFO] = json_bytes(manifest.timm_info())
    files[DATASET] = json_bytes(manifest.dataset(digests))
    for name, data in files.items():
        if content(folder / name)[0] != data:  # a finished set may be read-only
            publish_bytes(folder / name, data)


def _card(manifest: Manifest) -> bytes | None:
    """README.md as it is to lie there; None where there is none of ours: in a set that was finished without, and beside somebody else's."""
    found, wanted = content(manifest.plan.folder / CARD)[0], manifest.card()
    finished = _finished(manifest.plan)
    if not finished:
        return wanted if found is None or MARK.encode() in found else None
    recorded = finished.get("files", {}).get(CARD)
    if recorded is None:
        return None
    return (
        found if found is not None and hashlib.sha256(found).hexdigest() == recorded else wanted
    )  # another release's too
