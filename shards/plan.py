"""Inputs and options → which shard holds what. Written first and never changed: a shard is a pure function of the plan."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import platform
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alexprep.shards.dataset_format import FORMAT_VERSION, PLAN, PLAN_FORMAT, PLAN_TABLE
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.resample import FILTERS
from alexprep.shards.sources.base import UNLABELLED, Input, Location, Source
from alexprep.shards.sources.ground_truth import devkit_order
from alexprep.shards.storage import digest_json, is_local, published
from alexprep.shards.versions import versions

# -------------------- Permutations that are a pure function of a few integers, on any machine and with any numpy.


def permutation(key: tuple[int, ...], count: int) -> NDArray[np.int64]:
    """A uniform permutation of range(count): the order of `count` random 64-bit words, ties by position.

    The generator is Philox 4x64-10 (Salmon, Moraes, Dror, Shaw, SC 2011). Only its raw output is used, which numpy guarantees never
    to change; the distributions that numpy builds on it are not guaranteed.

    Args:
        key: any number of non-negative integers; numpy's `SeedSequence` hashes them to the generator's key.
        count: how many.

    Returns:
        int64 (count,).

    >>> permutation((0,), 5).tolist() == permutation((0,), 5).tolist()
    True
    >>> sorted(permutation((3, 1), 100).tolist()) == list(range(100))
    True
    """
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(words, kind="stable")


# -------------------- How classes become numbers.


AUTO = "auto"
SORTED = "sorted"
ILSVRC_ID = "ilsvrc-id"
LISTED = "listed"  # what a plan says of an order that was given class by class


def recorded(rule: str | Sequence[str]) -> str:
    """What a plan says of a rule: not where a list lay, which may have moved, since the plan holds the names."""
    return rule if isinstance(rule, str) and rule in (AUTO, SORTED, ILSVRC_ID) else LISTED


def class_order(rule: str | Sequence[str], present: set[str], source: Source) -> list[str]:
    """The class names by label: label i is the i-th name.

    Args:
        rule: "auto" (the source's own numbering, or sorted where it has none), "sorted" (ascending by bytes, as
            torchvision and Caffe number them), "ilsvrc-id" (the devkit's order, as the 2012 code did: label = ILSVRC ID - 1),
            or the path of a text file with one class name a line, in label order; or these names themselves.
        present: the classes that the inputs have.
        source: where they come from, and where a devkit's meta.mat may be.

    Raises:
        AlexprepError: a class has no number, or the rule's file is missing or unreadable.
    """
    if rule == AUTO:
        return source.classes(present)
    if rule == SORTED:
        return sorted(present, key=str.encode)
    if rule == ILSVRC_ID:
        devkit = source.devkit()
        if devkit is None:
            raise AlexprepError(
                "--labels ilsvrc-id needs the devkit: put ILSVRC2012_devkit_t12.tar.gz, or its meta.mat, into SOURCE, "
                "or give --labels FILE with one class name a line"
            )
        where, order = devkit[0], devkit_order(*devkit)
    elif isinstance(rule, str):
        where, order = rule, _listed_order(Path(rule))
    else:
        where, order = "the list of classes", list(rule)
    unknown = sorted(present - set(order))
    if unknown:
        raise AlexprepError(
            f"{where} has no number for {len(unknown)} of {len(present)} classes, among them {unknown[0]!r}"
        )
    return order


def _listed_order(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # text mode: "\r\n" has become "\n"
    except (OSError, UnicodeDecodeError) as error:
        raise AlexprepError(
            f"--labels {path} is neither auto, sorted, ilsvrc-id, nor a text file that can be read ({error})"
        ) from None
    order = [line for line in lines if line.strip()]
    repeated = (
        next((name for i, name in enumerate(order) if name in order[:i]), None)
        if len(set(order)) < len(order)
        else None
    )
    if repeated is not None:
        raise AlexprepError(f"--labels {path} names class {repeated!r} twice: name each once")
    return order


# -------------------- The inputs of a source as columns: 15 million of them fit into a few gigabytes.


_CHUNK = 65_536


class SplitListing:
    """The inputs of one split, in the source's order."""

    def __init__(self) -> None:
        """Starts empty."""
        self._classes = array("i")
        self._offsets = array("q")
        self._sizes = array("q")
        self._recent: tuple[list[bytes], list[bytes]] = ([], [])
        self._chunks: tuple[list[pa.Array], list[pa.Array]] = ([], [])

    def __len__(self) -> int:
        """How many inputs."""
        return len(self._classes)

    def add(self, class_code: int, path: bytes, member: bytes, offset: int, size: int) -> None:
        """Appends one input."""
        self._classes.append(class_code)
        self._offsets.append(offset)
        self._sizes.append(size)
        for recent, value in zip(self._recent, (path, member), strict=True):
            recent.append(value)
        if len(self._recent[0]) == _CHUNK:
            self._flush()

    def columns(self, order: NDArray[np.int64]) -> tuple[NDArray[np.int32], dict[str, pa.Array]]:
        """Class codes, int32, and the columns path, member, offset and size, in an `order` of rows."""
        self._flush()
        text = {name: _taken(chunks, order) for name, chunks in zip(("path", "member"), self._chunks, strict=True)}
        numbers = {
            name: np.array(column, np.int64)[order]
            for name, column in (("offset", self._offsets), ("size", self._sizes))
        }
        return np.array(self._classes, np.int32)[order], text | {
            name: pa.array(column) for name, column in numbers.items()
        }

    def _flush(self) -> None:
        for recent, chunks in zip(self._recent, self._chunks, strict=True):
            chunks.append(pa.array(recent, pa.binary()))
            recent.clear()


def _taken(chunks: list[pa.Array], order: NDArray[np.int64]) -> pa.Array:
    # 64-bit offsets: the names of 15 million inputs are near what 32 bits can address.
    whole = pa.concat_arrays([chunk.cast(pa.large_binary()) for chunk in chunks])
    return whole.take(pa.array(order))


def list_inputs(inputs: Iterable[Input]) -> tuple[dict[str, SplitListing], list[str], str]:
    """All inputs by split, the class names by code, and the sha256 of the whole list, hex."""
    listing: dict[str, SplitListing] = {}
    codes: dict[str, int] = {}
    digest = hashlib.sha256()
    for split, class_name, location in inputs:
        if split not in listing:
            listing[split] = SplitListing()
        listing[split].add(codes.setdefault(class_name, len(codes)), *location)
        path, member, offset, size = location
        digest.update(b"%s\0%s\0%s\0%s\0%d\0%d\0" % (split.encode(), class_name.encode(), path, member, offset, size))
    return listing, list(codes), digest.hexdigest()


# -------------------- plan.parquet: what each shard is made of, one row group a shard.


TABLE = pa.schema(
    [
        ("split", pa.string()),
        ("shard", pa.uint32()),
        ("row", pa.uint32()),
        ("label", pa.int32()),
        ("path", pa.large_binary()),
        ("member", pa.large_binary()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)


class PlanTable:
    """plan.parquet, opened: row groups in the order of the plan's shards.

    Attributes:
        path: the file.
        num_row_groups: how many shards it describes.
    """

    def __init__(self, path: Path) -> None:
        """Reads the footer.

        Raises:
            AlexprepError: it cannot be read.
        """
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
        """The rows of one shard.

        Raises:
            AlexprepError: they cannot be read.
        """
        try:
            return self._file.read_row_group(group, columns)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from None

    def holds(self, tables: Sequence[pa.Table]) -> bool:
        """Whether its rows are those of `tables`, one a row group; one group is in memory at a time."""
        if self.num_row_groups != len(tables):
            return False
        return all(self.read_row_group(group).equals(table) for group, table in enumerate(tables))

    def _unreadable(self, error: Exception) -> AlexprepError:
        why = str(error).partition("\n")[0]
        return AlexprepError(
            f"{self.path} cannot be read ({why}): mend the disk, or delete it and run the same command again"
        )


@functools.lru_cache(maxsize=1)
def kept_table(folder: Path, digest: str) -> PlanTable:
    """plan.parquet, opened once a process and plan: its footer grows with the number of shards."""
    return PlanTable(folder / PLAN_TABLE)


def publish_table(folder: Path, tables: Sequence[pa.Table]) -> None:
    """Writes plan.parquet, one row group for each of `tables`."""
    with published(folder / PLAN_TABLE) as file, pq.ParquetWriter(file, TABLE, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
    kept_table.cache_clear()


# -------------------- Inputs and options → which shard holds what. Written first and never changed: a shard is a pure function of the plan.


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
        labels: see `alexprep.shards.plan.class_order`.
        limit: at most so many inputs of each split, picked by the shuffle; None for all.
    """

    target: Target = field(default_factory=Target)
    seed: int = 0
    shard_samples: int | None = None
    labels: str | tuple[str, ...] = AUTO
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
    classes = class_order(options.labels, set(names) - {UNLABELLED}, source)
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
            "labels": recorded(options.labels),
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


# -------------------- Whether a machine that works on a plan sees what the one that drew it up sees: the same folder, inputs and software.


_WANTED, _TRIED = 3, 16


@dataclass(frozen=True)
class Witness:
    """What a machine saw.

    Attributes:
        machine: its name.
        folder: the data set's folder.
        digest: of the plan in it.
        source: where the images are.
        sizes: a few files of it with their sizes: (path, bytes).
        versions: of what decides the bytes of a shard: (name, version).
    """

    machine: str
    folder: Path
    digest: str
    source: Source
    sizes: tuple[tuple[bytes, int], ...]
    versions: tuple[tuple[str, str], ...]

    @classmethod
    def here(cls, plan: Plan, source: Source, table: PlanTable) -> Witness:
        """What this machine sees; the inputs are those of the first shard, a random choice."""
        sizes: dict[bytes, int] = {}
        for location in locations(table.read_row_group(0))[:_TRIED]:
            size = _size(source, location.path)
            if isinstance(size, int) and len(sizes) < _WANTED:
                sizes[location.path] = size
        return cls(
            platform.node(),
            plan.folder,
            plan.digest,
            source,
            tuple(sizes.items()),
            tuple(plan.document["versions"].items()),
        )

    def compare(self) -> None:
        """Compares it with what the machine sees that calls this.

        An input may vanish while the work goes on, so it takes all of them to be missing.

        Raises:
            AlexprepError: it sees another folder, none of the inputs, or runs other versions; both machines are named.
        """
        here = platform.node()
        path = self.folder / PLAN
        try:
            found = digest_json(json.loads(path.read_bytes()))
        except Exception as error:  # noqa: BLE001  (each store has its own kinds)
            found = f"{type(error).__name__}: {error}"
        if found != self.digest:
            place = path.absolute() if is_local(path) else path
            raise AlexprepError(
                f"{here} does not see {place} as {self.machine} does ({found}): --out must be one folder that all machines "
                "share under the same path, on a network file system, or a URL such as s3://…"
            )
        sizes = [(name, size, _size(self.source, name)) for name, size in self.sizes]
        if sizes and all(size != now for _, size, now in sizes):
            name, size, now = sizes[0]
            raise AlexprepError(
                f"{here} does not see {self.source.files.display(name)} as {self.machine} does ({size} bytes there, {now} here): "
                "SOURCE must be readable under the same path on every machine, or be a URL"
            )
        for library, version in self.versions:
            mine = versions(library)[library]
            if mine != version:
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
