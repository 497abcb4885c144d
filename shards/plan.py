"""Inputs and options → which shard holds what. Written first and never changed: a shard is a pure function of the plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from alexprep.shards import labels
from alexprep.shards.dataset_format import FORMAT_VERSION, PLAN_FORMAT, PLAN_TABLE
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.listing import list_inputs
from alexprep.shards.permute import permutation
from alexprep.shards.plan_table import TABLE, PlanTable
from alexprep.shards.resample import FILTERS
from alexprep.shards.sources.base import UNLABELLED, Location, Source
from alexprep.shards.storage import digest_json
from alexprep.shards.versions import versions

# An ImageNet shard is then about 28 MB. Smaller sets get at least 16 shards of at least 64, so that workers can share them.
SHARD_SAMPLES = 1024
_MANY, _FEW = 16, 64
_DECIDES_BYTES, _ON_A_GPU = ("alexprep", "nvimgcodec", "pillow"), ("nvjpeg", "torch")
_SPLIT_STREAM = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class ShardOptions:
    """Everything that decides what the shards hold.

    Attributes:
        target: the form of the images.
        seed: of the global shuffle before the inputs are cut into shards.
        shard_samples: inputs a shard; None for 1,024, or fewer where the set is small.
        labels: see `alexprep.shards.labels.class_order`.
        limit: at most so many inputs of each split, picked by the shuffle; None for all.
    """

    target: Target = field(default_factory=Target)
    seed: int = 0
    shard_samples: int | None = None
    labels: str | tuple[str, ...] = labels.AUTO
    limit: int | None = None

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        t = self.target
        for name, value, low, high in (
            ("--size", t.size, 1, 8192),
            ("--quality", t.quality, 1, 100),
            ("--seed", self.seed, 0, 2**63 - 1),
            ("--shard-samples", self.shard_samples, 1, 10**6),
            ("--limit", self.limit, 1, 10**9),
        ):
            if value is not None and not low <= value <= high:
                raise AlexprepError(f"{name} {value} is not between {low:,} and {high:,}")
        if t.filter not in FILTERS:
            raise AlexprepError(f"--filter {t.filter} is not one of {', '.join(FILTERS)}")


@dataclass(frozen=True)
class Shard:
    """One shard of the plan: its split, number in the split, and first row in the split's order."""

    split: str
    number: int
    first_row: int


@dataclass(frozen=True)
class Plan:
    """A plan on disk: `document` is plan.json, `folder` the data set's folder."""

    folder: Path
    document: dict[str, Any]

    @property
    def digest(self) -> str:
        """The plan's identity, hex sha256."""
        return digest_json(self.document)

    def table(self) -> PlanTable:
        """plan.parquet.

        Raises:
            AlexprepError: it cannot be read.
        """
        return PlanTable(self.folder / PLAN_TABLE)

    def each_shard(self) -> Iterator[Shard]:
        """One shard after the other, in order."""
        size = self.document["shard_samples"]
        for split, record in self.document["splits"].items():
            for number in range(record["shards"]):
                yield Shard(split, number, number * size)

    def shards(self) -> list[Shard]:
        """All shards, in order."""
        return list(self.each_shard())


def draw_up(source: Source, options: ShardOptions) -> tuple[dict[str, Any], list[pa.Table]]:
    """The plan that inputs and options give: plan.json's document and the rows of each shard. Nothing is written.

    Raises:
        AlexprepError: no input, or labels that make no sense.
    """
    listing, names, inputs_digest = list_inputs(source.inputs())
    if not listing:
        raise AlexprepError(
            f"SOURCE {source.files.display()} holds no files where {source.layout!r} has its images: name the folder that holds them, "
            "or say with --layout what it is (docs/sources.md)"
        )
    classes = labels.class_order(options.labels, set(names) - {UNLABELLED}, source)
    number = {name: label for label, name in enumerate(classes)} | {UNLABELLED: -1}
    label_of = np.array([number[name] for name in names], np.int32)
    total = sum(min(len(split), options.limit or len(split)) for split in listing.values())
    size = options.shard_samples or min(SHARD_SAMPLES, max(_FEW, -(-total // _MANY)))
    splits: dict[str, Any] = {}
    tables: list[pa.Table] = []
    for split in sorted(listing, key=_SPLIT_STREAM.__getitem__):
        order = permutation((options.seed, _SPLIT_STREAM[split]), len(listing[split]))[: options.limit]
        codes, columns = listing.pop(split).columns(order)
        count = len(order)
        rows = {
            "split": pa.repeat(split, count),
            "shard": np.arange(count, dtype=np.uint32) // np.uint32(size),
            "row": np.arange(count, dtype=np.uint32),
            "label": label_of[codes],
        }
        table = pa.table(rows | columns, schema=TABLE)
        tables += [table.slice(start, size) for start in range(0, count, size)]
        splits[split] = {"inputs": count, "shards": -(-count // size)}
    document = {
        "format": PLAN_FORMAT,
        "format_version": FORMAT_VERSION,
        "layout": source.layout,
        "inputs": inputs_digest,
        "options": {
            **asdict(options.target),
            "seed": options.seed,
            "labels": labels.recorded(options.labels),
            "limit": options.limit,
        },
        "shard_samples": size,
        "splits": splits,
        "classes": classes,
        "versions": versions(*_DECIDES_BYTES, *(_ON_A_GPU if options.target.device == "cuda" else ())),
    }
    return document, tables


def locations(rows: pa.Table) -> list[Location]:
    """Where the source has the inputs of some rows of plan.parquet."""
    return list(map(Location, *(rows.column(name).to_pylist() for name in Location._fields)))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What keeps a plan's document `new` from going on with `old`, in words."""
    words = []
    before, now = old.get("options", {}), new["options"]
    for name in [*now, *(name for name in before if name not in now)]:
        if before.get(name) != now.get(name):
            words.append(f"--{name} was {before.get(name)}, now is {now.get(name)}")
    if old.get("shard_samples") != new["shard_samples"]:
        words.append(f"--shard-samples was {old.get('shard_samples')}, now is {new['shard_samples']}")
    for name, version in new["versions"].items():
        if old.get("versions", {}).get(name) != version:
            words.append(f"{name} was {old.get('versions', {}).get(name)}, now is {version}")
    if old.get("inputs") != new["inputs"]:
        counts = [sum(split["inputs"] for split in plan.get("splits", {}).values()) for plan in (old, new)]
        words.append(f"the files in SOURCE have changed ({counts[0]:,} inputs then, {counts[1]:,} now)")
    for name in ("format_version", "layout", "classes"):
        if old.get(name) != new[name] and not words:
            words.append(f"{name} differs")
    return words
