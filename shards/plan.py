"""Draws up the plan of a dataset: from the inputs of a source and the options, which shard holds which inputs, and in what order.

A plan is written first and never changed, as plan.json (`Plan`) and plan.parquet (`PlanTable`), so that a shard is a pure function
of the plan and its number. This module decides and compares; who publishes a plan and does the work is `alexprep.shards.conversion`.

Two plans are the same where their options mean the same: an option at its default counts as absent, and so does one that this
release does not know where it says nothing (null, false, 0, empty). A new option whose default means what was done before it existed
thus leaves every older dataset as it was. For this to hold, a released default never changes its meaning.
"""

from __future__ import annotations

import functools
import io
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alexprep.shards.dataset_format import (
    FORMAT_VERSION,
    PLAN,
    PLAN_FORMAT,
    PLAN_TABLE,
    READ_VERSIONS,
    interchangeable,
    shard_name,
    versions,
)
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Fit, Target
from alexprep.shards.listing import AUTO, ILSVRC_ID, PLACE, SORTED, ClassNames, Listing, renumbered
from alexprep.shards.metadata import ALL, NONE
from alexprep.shards.resample import FILTERS
from alexprep.shards.sources.base import (
    LIMITED,
    NO_CHOICES,
    Account,
    Location,
    PassedOver,
    Source,
    as_json,
    as_options,
    choices_of,
)
from alexprep.shards.storage import digest_json, is_local, published

LISTED = "listed"  # what a plan says of labels whose order was given class by class

# An ImageNet shard is then about 28 MB. Smaller sets get at least 16 shards of at least 64, so that workers can share them.
SHARD_SAMPLES = 1024
_MANY, _FEW = 16, 64
_DECIDES_BYTES, _ON_A_GPU = ("alexprep", "nvimgcodec", "pillow", "simplejpeg"), ("nvjpeg", "torch")
# Of a target, what a plan has nothing of where it is at its default: releases that did not know it go on.
_ADDED = ("on_damaged", "fit", "only_shrink", "lossless", "webp_method", "pad", "decode")
NO_IDENTITY = ("account", "words")  # of a plan: files that are no inputs; what people read
_TAKEN_OVER = (*NO_IDENTITY, "choices")  # of a plan that is gone on with, without a comparison
_SPLIT_STREAM = {"train": 0, "val": 1, "test": 2}
_WANTED, _TRIED = 3, 16  # files whose sizes machines compare; inputs that are looked at for them
_TABLE = pa.schema(
    [("split", pa.string()), ("shard", pa.uint32()), ("row", pa.uint32()), ("label", pa.int32()), *PLACE]
)
_METADATA = pa.field("metadata", pa.large_binary())  # in plans by which some goes along with the images


@dataclass(frozen=True)
class ShardOptions:
    """Everything that decides what the shards hold; refuses values out of bounds with AlexprepError.

    `labels` says how classes are numbered: "auto" (as the source does, or by sorted name), "sorted", "ilsvrc-id" (the devkit's
    order), a text file with one class name a line, or these names.
    """

    target: Target = field(default_factory=Target)
    seed: int = 0  # of the global shuffle before the inputs are cut into shards, below 2**63
    shard_samples: int | None = None  # inputs a shard; None for 1,024, or fewer where the set is small
    labels: str | tuple[str, ...] = AUTO
    limit: int | None = None  # at most so many inputs of each split, picked by the shuffle; None for all
    # Of class names that are equal but for case or Unicode form: each is a class, or they are one; None asks.
    class_names: ClassNames | None = None
    class_words: str | Path | None = None  # a file that says what classes mean in words; no shard depends on it
    # What goes along with the images: "all", "none", or these names; None for all, and in a folder that was begun what it was begun with.
    metadata: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        t = self.target
        if not isinstance(t.size, int) and not (isinstance(t.size, tuple) and len(t.size) == 2):
            raise AlexprepError(f"size {t.size!r} is neither the side of a square nor (height, width), pixels")
        for name, value, low, high in (
            *(("--size", side, 1, 8192) for side in t.box),
            ("--quality", t.quality, 1, 100),
            ("--webp-method", t.webp_method, 0, 6),
            ("--seed", self.seed, 0, 2**63 - 1),
            ("--shard-samples", self.shard_samples, 1, 10**6),
            ("--limit", self.limit, 1, 10**9),
        ):
            if value is not None and not low <= value <= high:
                raise AlexprepError(f"{name} {value} is not between {low:,} and {high:,}")
        if self.class_names not in (None, "exact", "folded"):
            raise AlexprepError(f"--class-names {self.class_names} is not one of exact, folded")
        if t.on_damaged not in ("reject", "keep"):
            raise AlexprepError(f"--on-damaged {t.on_damaged} is not one of reject, keep")
        if t.decode not in ("exact", "scaled"):
            raise AlexprepError(f"--decode {t.decode} is not one of exact, scaled")
        if t.decode == "scaled" and (t.device == "cuda" or t.fit == "none"):
            why = (
                "--device cuda, whose decoder does not scale"
                if t.device == "cuda"
                else "--fit none, which scales nothing"
            )
            raise AlexprepError(f"--decode scaled does not go with {why}: leave one of them out")
        if isinstance(self.metadata, str) and self.metadata not in (ALL, NONE):
            raise AlexprepError(f"--metadata {self.metadata!r} is not {ALL}, {NONE} or a tuple of names")
        if t.filter not in FILTERS:
            raise AlexprepError(f"--filter {t.filter} is not one of {', '.join(FILTERS)}")
        if t.fit not in get_args(Fit):
            raise AlexprepError(f"--fit {t.fit} is not one of {', '.join(get_args(Fit))}")
        if t.fit == "none" and (t.size != Target.size or t.only_shrink):
            words = "--only-shrink" if t.only_shrink else f"--size {size_words(t.size)}"
            raise AlexprepError(
                f"{words} says nothing with --fit none, which leaves images as large as they are: leave it out"
            )
        self._check_pad()
        if t.format != "webp" and (t.lossless or t.webp_method != Target.webp_method):
            words = "--lossless" if t.lossless else f"--webp-method {t.webp_method}"
            raise AlexprepError(
                f"{words} is of WebP: give --format webp too" + (", or png, which is lossless" if t.lossless else "")
            )

    def _check_pad(self) -> None:
        t = self.target
        if t.pad is None:
            return
        if not isinstance(t.pad, int) and not (isinstance(t.pad, tuple) and len(t.pad) == 2):
            raise AlexprepError(f"pad {t.pad!r} is neither the side of a square nor (height, width), pixels")
        words = size_words(t.pad)
        canvas = t.canvas or (0, 0)
        if t.fit not in ("square", "longer"):
            raise AlexprepError(
                f"--pad {words} needs images that fit into it: give --fit square or longer, not {t.fit}"
            )
        if not all(side <= whole <= 8192 for side, whole in zip(t.box, canvas, strict=True)):
            raise AlexprepError(f"--pad {words} is not between --size {size_words(t.size)} and 8192 pixels")
        if t.device != "cpu":
            raise AlexprepError(f"--pad {words} is for --device cpu: leave one of them out")


@dataclass(frozen=True)
class Shard:
    """One shard of a plan."""

    split: str
    number: int  # in its split
    first_row: int  # in its split's order
    group: int  # its row group in plan.parquet, which is its number in the whole plan
    window: int = 0  # in its split: shards of one are made of the same groups of inputs, and by one task

    @property
    def name(self) -> str:
        """The name of its files without their extension: "train-000007"."""
        return shard_name(self.split, self.number)


@dataclass(frozen=True)
class Plan:
    """A plan on disk: `document` is plan.json, `folder` the dataset's folder."""

    folder: Path
    document: dict[str, Any]

    @functools.cached_property
    def digest(self) -> str:
        """The plan's identity, hex sha256, which sidecars and dataset.json name."""
        return plan_digest(self.document)

    @property
    def options(self) -> dict[str, Any]:
        """The options by name; those that plan.json does not have are at their default."""
        return {**DEFAULTS, **self.document["options"]}

    @functools.cached_property
    def target(self) -> Target:
        """The form of its images."""
        return target_in(self.document["options"])

    @property
    def format_version(self) -> int:
        """That of the release that began it, to which all stays that follows from it."""
        return int(self.document["format_version"])

    @property
    def labelled(self) -> bool:
        """Whether samples have a KEY.cls, if only of -1: not where the source was read without labels."""
        return not self.document.get("unlabelled")

    @property
    def metadata_names(self) -> frozenset[str] | None:
        """Which metadata go along with the images; None for all."""
        wanted = self.options["metadata"]
        return frozenset(wanted or ()) if not isinstance(wanted, str) else None

    @property
    def inputs(self) -> int:
        """How many inputs all splits have together."""
        return sum(split["inputs"] for split in self.document["splits"].values())

    @property
    def found(self) -> int | None:
        """How many files, members or rows the source's listing met; None where an earlier release did not count them."""
        found: int | None = self.document.get("account", {}).get("found")
        return found

    @property
    def passed_over(self) -> dict[str, PassedOver]:
        """What the listing passed over, by rule."""
        return {
            rule: PassedOver(**passed)
            for rule, passed in self.document.get("account", {}).get("passed_over", {}).items()
        }

    def file(self, shard: Shard, suffix: str) -> Path:
        """Where one of a shard's files lies: its ".tar", its ".idx" (DALI's index) or its ".json" (the sidecar)."""
        return self.folder / shard.split / f"{shard.name}{suffix}"

    def table(self) -> PlanTable:
        """plan.parquet, opened."""
        return PlanTable(self.folder / PLAN_TABLE)

    def each_shard(self) -> Iterator[Shard]:
        """One shard after the other, in order."""
        size, group = self.document["shard_samples"], 0
        for split, record in self.document["splits"].items():
            together = max(1, record.get("window_inputs", 0) // size)
            for number in range(record["shards"]):
                yield Shard(split, number, number * size, group, number // together)
                group += 1


def draw_up(listing: Listing, options: ShardOptions) -> tuple[dict[str, Any], list[pa.Table]]:
    """The plan that a listing and options give: plan.json's document and the rows of each shard. Nothing is written."""
    source, account, label_of = listing.source, listing.account, listing.label_of
    splits_of_inputs = dict(listing.splits)
    total = sum(min(len(split), options.limit or len(split)) for split in splits_of_inputs.values())
    size = options.shard_samples or min(SHARD_SAMPLES, max(_FEW, -(-total // _MANY)))
    along = bool(listing.metadata) and options.metadata != NONE
    splits: dict[str, Any] = {}
    tables: list[pa.Table] = []
    for split in sorted(splits_of_inputs, key=_SPLIT_STREAM.__getitem__):
        inputs = splits_of_inputs.pop(split).combine_chunks()
        count = min(len(inputs), options.limit or len(inputs))
        key, window = (options.seed, _SPLIT_STREAM[split]), _window(source.window_inputs(), count, size)
        order = grouped_order(key, _groups(inputs), window) if window else permutation(key, len(inputs))
        inputs = inputs.take(pa.array(order[:count]))
        columns = {
            "split": pa.repeat(split, count),
            "shard": np.arange(count, dtype=np.uint32) // np.uint32(size),
            "row": np.arange(count, dtype=np.uint32),
            "label": label_of[inputs["class"].to_numpy()],
            **{name: inputs[name] for name, _ in PLACE},
        }
        if along:
            known = "metadata" in inputs.column_names
            columns["metadata"] = inputs["metadata"] if known else pa.nulls(count, pa.large_binary())
        table = pa.table(columns, schema=_TABLE.append(_METADATA) if along else _TABLE)
        tables += [table.slice(start, size) for start in range(0, count, size)]
        splits[split] = {"inputs": count, "shards": -(-count // size)} | ({"window_inputs": window} if window else {})
    document = {
        "format": PLAN_FORMAT,
        "format_version": FORMAT_VERSION,
        "layout": source.layout,
        "inputs": listing.digest,
        "options": _recorded(options, along),
        "shard_samples": size,
        "splits": splits,
        "classes": listing.classes,
        "versions": versions(*_DECIDES_BYTES, *(_ON_A_GPU if options.target.device == "cuda" else ())),
        "account": _account(account, sum(map(len, listing.splits.values())) - total),
    }
    if not source.labelled():
        document["unlabelled"] = True
    if along:
        document["metadata"] = listing.metadata
    if listing.class_words:
        document["words"] = listing.class_words
    if source.choices != NO_CHOICES:
        document["choices"] = as_json(source.choices)
    return document, tables


def _account(account: Account, left_out: int) -> dict[str, Any]:
    """What plan.json and dataset.json say of all that was found and is no input; `left_out` are those beyond --limit."""
    passed_over = {rule: asdict(passed) for rule, passed in sorted(account.passed_over.items())}
    if left_out:
        passed_over[LIMITED] = {"count": left_out, "names": []}
    return {"found": account.found, "passed_over": passed_over}


def plan_digest(document: Mapping[str, Any]) -> str:
    """The identity of a plan, hex sha256: of all of plan.json but the account, which tells of files that are no inputs, and words."""
    return digest_json({name: value for name, value in document.items() if name not in NO_IDENTITY})


def locations(rows: pa.Table) -> list[Location]:
    """Where the source has the inputs of some rows of plan.parquet."""
    return list(map(Location, *(rows.column(name).to_pylist() for name in Location._fields)))


def _recorded(options: ShardOptions, along: bool = False) -> dict[str, Any]:
    """What a plan says of options; `along`, whether metadata go along with the images.

    Of a list of classes not where it lay, which may have moved: the plan has the names.
    """
    named = isinstance(options.labels, str) and options.labels in (AUTO, SORTED, ILSVRC_ID)
    labels = options.labels if named else LISTED
    target, (rows, columns) = asdict(options.target), options.target.box
    target |= {name: None for name in _ADDED if target[name] == getattr(Target, name)}
    target["pad"] = list(target["pad"]) if isinstance(target["pad"], tuple) else target["pad"]
    return {
        **target,
        "size": rows if rows == columns else [rows, columns],
        "seed": options.seed,
        "labels": labels,
        "limit": options.limit,
        "class_names": options.class_names,
        # Nothing where nothing goes along, as in all plans of releases that did not know it.
        "metadata": (sorted(options.metadata) if isinstance(options.metadata, tuple) else ALL) if along else None,
    }


DEFAULTS = _recorded(ShardOptions())


def stated(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a plan that are not at their default."""
    return {
        name: value for name, value in options.items() if (value != DEFAULTS[name] if name in DEFAULTS else bool(value))
    }


def _meaning(options: Mapping[str, Any]) -> dict[str, Any]:
    """What is stated, without what says no more than its default: a plan without --class-names has no names that are alike,
    or is of a release to which each name was a class."""
    return {name: value for name, value in stated(options).items() if (name, value) != ("class_names", "exact")}


def _shown(name: str, value: Any) -> str:
    """The value of an option for messages; of one that says nothing what that means."""
    if name in _ADDED and value is None:
        value = getattr(Target, name)
    if name in ("size", "pad") and value is not None:
        return size_words(value)
    if name == "metadata":
        return value if isinstance(value, str) else ",".join(value or [NONE])
    if value is None or isinstance(value, bool):
        return "given" if value else "not given"
    return str(value)


def options_of(document: Mapping[str, Any]) -> ShardOptions:
    """The options that a plan.json or dataset.json was made with; what is unknown here must be at its default."""
    given = stated(document["options"])
    for name in given.keys() - DEFAULTS.keys():
        raise AlexprepError(
            f"the dataset was made with --{name} {given[name]}, which this alexprep does not know: use the release that made it"
        )
    target = target_in(given)
    of_target = {field.name for field in fields(Target)}
    given = {name: value for name, value in given.items() if name not in of_target}
    if given.get("labels") == LISTED:
        given["labels"] = tuple(document["classes"])
    given["metadata"] = _metadata_of(document)
    return ShardOptions(target, shard_samples=document["shard_samples"], **given)


def target_in(options: Mapping[str, Any]) -> Target:
    """The form of images that the options of a plan.json or dataset.json say; what they do not say is at its default."""
    given = {field.name: options.get(field.name) for field in fields(Target)}
    said: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    said |= {name: tuple(said[name]) for name in ("size", "pad") if isinstance(said.get(name), list)}
    return Target(**said)


def size_words(size: int | Sequence[int]) -> str:
    """A box as the command line has it: WIDTHxHEIGHT, or the side of a square.

    >>> size_words((240, 320)), size_words(256)
    ('320x240', '256')
    """
    return str(size) if isinstance(size, int) else f"{size[1]}x{size[0]}"


def _metadata_of(document: Mapping[str, Any]) -> str | tuple[str, ...]:
    """The option --metadata that gives the plan of a plan.json or dataset.json again."""
    metadata = document.get("options", {}).get("metadata") or NONE
    return metadata if isinstance(metadata, str) else tuple(metadata)


def as_begun(options: ShardOptions, earlier: Mapping[str, Any]) -> ShardOptions:
    """The options as the `earlier` plan has them where they were left open."""
    return options if options.metadata is not None else replace(options, metadata=_metadata_of(earlier))


def as_written(document: dict[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """A plan's `document` as an `earlier` one writes it, where they mean the same: then the two are equal."""
    options, made_by, now = earlier.get("options", {}), earlier.get("versions", {}), document["versions"]
    if _meaning(options) == _meaning(document["options"]):
        document = document | {"options": options}
    if earlier.get("format_version") in READ_VERSIONS:  # all that follows from it stays as that version has it
        document = document | {"format_version": earlier["format_version"]}
    if all(interchangeable(name, made_by.get(name), now.get(name)) for name in made_by | now):
        document = document | {"versions": made_by}
    # What lies beside the inputs may change, and another choice may lead to the same reading: what counts are inputs and classes.
    document = {key: value for key, value in document.items() if key not in _TAKEN_OVER}
    return document | {key: earlier[key] for key in _TAKEN_OVER if key in earlier}


def numbered_as_begun(listing: Listing, labels: str | tuple[str, ...], earlier: Mapping[str, Any]) -> Listing:
    """A listing with its classes in the order of the `earlier` plan, where a release that had no account drew that up.

    Such a release numbered class folders by their bytes, this one numbers numbers in their order. Only where `labels` is "auto" and the
    classes are the same; otherwise the listing as it is.
    """
    known = earlier.get("classes")
    if labels != AUTO or "account" in earlier or not isinstance(known, list):
        return listing
    same = all(isinstance(name, str) for name in known) and sorted(known) == sorted(listing.classes)
    return renumbered(listing, known) if same and known != listing.classes else listing


def differences(old: Mapping[str, Any], new: dict[str, Any]) -> list[str]:
    """What keeps a plan's document `new` from going on with `old`, in words."""
    before, now = (
        DEFAULTS | _meaning(plan.get("options", {})) | {"shard_samples": plan.get("shard_samples")}
        for plan in (old, new)
    )
    words = [
        f"--{name.replace('_', '-')} was {_shown(name, value)}, "
        + (f"now is {_shown(name, now[name])}" if name in now else "which this alexprep does not know")
        for name, value in before.items()
        if value != now.get(name)
    ]
    for name, version in new["versions"].items():
        if not interchangeable(name, earlier := old.get("versions", {}).get(name), version):
            words.append(f"{name} was {earlier}, now is {version}")
    if old.get("inputs") != new["inputs"]:
        counts = [sum(split["inputs"] for split in plan.get("splits", {}).values()) for plan in (old, new)]
        then, chosen = (as_options(choices_of(plan.get("choices", {}))) for plan in (old, new))
        if then != chosen:  # by which other files are inputs, or have other classes
            words.append(
                f"SOURCE was read {f'with {then}' if then else 'as found'}, now {f'with {chosen}' if chosen else 'as found'}"
            )
        words.append(f"the files in SOURCE have changed ({counts[0]:,} inputs then, {counts[1]:,} now)")
    if not words and old.get("metadata") != new.get("metadata"):
        words.append("the metadata in SOURCE have changed")
    windows = [
        {split: record.get("window_inputs") for split, record in plan.get("splits", {}).items()} for plan in (old, new)
    ]
    if not words and windows[0] != windows[1]:
        words.append("the groups in which SOURCE has its inputs have other sizes now, which changes the order")
    for name in ("format_version", "layout", "classes", "unlabelled"):
        same = name == "format_version" and old.get(name) in READ_VERSIONS
        if old.get(name) != new.get(name) and not same and not words:
            words.append(f"{name} differs")
    return words


def permutation(key: tuple[int, ...], count: int) -> NDArray[np.int64]:
    """A uniform permutation of range(count), int64 (count,): the order of `count` random 64-bit words, ties by position.

    The generator is Philox 4x64-10 (Salmon, Moraes, Dror, Shaw, SC 2011). Only its raw output is used, which numpy guarantees never
    to change; the distributions that numpy builds on it are not guaranteed. `key` is any number of non-negative integers, which
    numpy's `SeedSequence` hashes to the generator's key.
    """
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(words, kind="stable")


def grouped_order(key: tuple[int, ...], groups: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """An order of inputs that lie in groups, each of which is read as a whole: groups are permuted, then inputs within windows.

    The groups, in random order, are laid end to end and cut into windows of `window` inputs; within each the inputs are permuted. So a
    window needs as many groups as its inputs fill, and a group serves one window, or two where a cut falls into it.

    Args:
        key: of the generator, as `permutation` has it; (*key, 1) permutes groups and (*key, 2) inputs.
        groups: (inputs,), ascending: the number of each input's group, from 0.
        window: inputs, at least 1.

    Returns:
        int64 (inputs,): the inputs in their order.
    """
    sizes = np.bincount(groups)
    rank = np.empty(len(sizes), np.int64)
    rank[permutation((*key, 1), len(sizes))] = np.arange(len(sizes))
    laid = np.argsort(rank[groups], kind="stable")
    words = np.random.Philox(np.random.SeedSequence((*key, 2))).random_raw(len(laid))
    return laid[np.lexsort((words, np.arange(len(laid)) // window))]


def _groups(inputs: pa.Table) -> NDArray[np.int64]:
    """The number of each input's group, which the inputs of one path and offset form: int64 (inputs,), ascending from 0."""
    import pyarrow.compute as pc  # takes as long as ten images, and workers do without

    paths, offsets = inputs["path"].combine_chunks(), inputs["offset"].to_numpy()
    new = pc.not_equal(paths[1:], paths[:-1]).to_numpy(zero_copy_only=False) | (offsets[1:] != offsets[:-1])
    return np.concatenate([[0], np.cumsum(new)]).astype(np.int64)


def _window(inputs: int, count: int, size: int) -> int:
    """The inputs of a window, about as many as a worker can keep the groups of, for `count` inputs in shards of `size`.

    It is whole shards, as long as there are `_MANY` windows that workers can share; or a shard halved as often as need be.
    """
    if not inputs:
        return 0
    if inputs < size:
        return -(-size // (1 << (-(-size // inputs) - 1).bit_length()))
    return size * max(1, min(inputs // size, -(-count // size) // _MANY))


class PlanTable:
    """plan.parquet, opened: row groups in the order of the plan's shards. What cannot be read is an AlexprepError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Not by name, which pyarrow would take for a URL where it has a colon.
            self._file = pq.ParquetFile(
                pa.OSFile(os.fsencode(path)) if is_local(path) else io.BytesIO(path.read_bytes())
            )
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from None
        self.num_row_groups: int = self._file.num_row_groups

    def rows(self, group: int) -> int:
        """How many inputs a shard has."""
        return int(self._file.metadata.row_group(group).num_rows)

    def read_row_group(self, group: int, columns: list[str] | None = None) -> pa.Table:
        """The rows of one shard."""
        try:
            return self._file.read_row_group(group, columns)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from None

    def holds(self, tables: Sequence[pa.Table]) -> bool:
        """Whether its rows are those of `tables`, one a row group; one group is in memory at a time."""
        return self.num_row_groups == len(tables) and all(
            self.read_row_group(group).equals(table) for group, table in enumerate(tables)
        )

    def _unreadable(self, error: Exception) -> AlexprepError:
        why = str(error).partition("\n")[0]
        return AlexprepError(
            f"{self.path} cannot be read ({why}): mend the disk, or delete it and run the same command again"
        )


@functools.lru_cache(maxsize=1)
def shared_table(folder: Path, digest: str) -> PlanTable:
    """plan.parquet, opened once a process and plan: its footer grows with the number of shards."""
    return PlanTable(folder / PLAN_TABLE)


def publish_table(folder: Path, tables: Sequence[pa.Table]) -> None:
    """Writes plan.parquet, one row group for each of `tables`."""
    schema = tables[0].schema if tables else _TABLE
    with published(folder / PLAN_TABLE) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
    shared_table.cache_clear()


@dataclass(frozen=True)
class MachineCheck:
    """Makes sure that a machine that works on a plan sees the same folder, inputs and software as the one that drew it up."""

    machine: str  # that drew it up
    plan: Plan
    source: Source
    sizes: dict[bytes, int]  # of a few files of the source, by path, there
    prefix: str  # of the Python there, which tells its libraries

    @classmethod
    def prepared_here(cls, plan: Plan, source: Source, table: PlanTable) -> MachineCheck:
        """What this machine sees; the inputs are those of the first shard, a random choice."""
        sizes: dict[bytes, int] = {}
        for location in locations(table.read_row_group(0))[:_TRIED]:
            size = _size(source, location.path)
            if isinstance(size, int) and len(sizes) < _WANTED:
                sizes[location.path] = size
        return cls(platform.node(), plan, source, sizes, sys.prefix)

    def run(self) -> None:
        """Compares it with what the machine sees that calls this: an AlexprepError names both machines and what differs."""
        here, path = platform.node(), self.plan.folder / PLAN
        try:
            found = plan_digest(json.loads(path.read_bytes()))
        except Exception as error:  # noqa: BLE001  (each store has its own kinds)
            found = f"{type(error).__name__}: {error}"
        if found != self.plan.digest:
            place = path.absolute() if is_local(path) else path
            raise AlexprepError(
                f"{here} does not see {place} as {self.machine} does ({found}): --out must be one folder that all machines "
                "share under the same path, on a network file system, or a URL such as s3://…"
            )
        sizes = [(name, size, _size(self.source, name)) for name, size in self.sizes.items()]
        if sizes and all(size != now for _, size, now in sizes):  # a single input may vanish while the work goes on
            name, size, now = sizes[0]
            raise AlexprepError(
                f"{here} does not see {self.source.files.display(name)} as {self.machine} does ({size} bytes there, {now} here): "
                "SOURCE must be readable under the same path on every machine, or be a URL"
            )
        if (here, sys.prefix) == (self.machine, self.prefix):
            return
        for library, version in self.plan.document["versions"].items():
            mine = versions(library)[library]
            if not interchangeable(library, mine, version):
                raise AlexprepError(
                    f"{library} is {mine} on {here}, {version} on {self.machine}: install the same version on every machine, "
                    "since it decides the bytes of a shard"
                )


def _size(source: Source, path: bytes) -> int | str:
    """A file's size, or why it cannot be had."""
    try:
        return source.files.size(path)
    except Exception as error:  # noqa: BLE001  (each store has its own kinds)
        return f"{type(error).__name__}: {error}"
