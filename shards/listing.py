"""Lists a source whole: every input as columns, its classes by label, and the account of what was passed over.

This is all that `alexprep inspect` shows and all that a plan is drawn up from: which input goes into which shard is decided in
`alexprep.shards.plan`, what a source's folders and files mean in `alexprep.shards.sources`.
"""

from __future__ import annotations

import hashlib
import itertools
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError, AmbiguousSourceError, counted
from alexprep.shards.sources import BY_FOLDERS
from alexprep.shards.sources.base import UNLABELLED, Account, Input, Source, sorted_names
from alexprep.shards.sources.class_words import read_class_words
from alexprep.shards.sources.ground_truth import devkit_order

AUTO = "auto"
SORTED = "sorted"
ILSVRC_ID = "ilsvrc-id"

ClassNames = Literal["exact", "folded"]
_CHUNK = 65_536  # names that are Python objects at a time
# Inputs taken at once: many would cost less by themselves, but Python's search for circles of objects, which begins when 700 tuples
# are held and goes through all that a source has in memory, takes as long as the listing.
_AT_ONCE = 200
# 64-bit offsets (large_binary): the names of 15 million inputs are near what 32 bits can address.
PLACE = [("path", pa.large_binary()), ("member", pa.large_binary()), ("offset", pa.int64()), ("size", pa.int64())]
_LISTING = pa.schema([("class", pa.int32()), *PLACE])


@dataclass(frozen=True)
class Listing:
    """Everything that a source holds.

    Attributes:
        source: that was listed.
        splits: by name, the inputs in the source's order, as columns: class (int32, its code), path, member, offset, size; and metadata
            (large_binary, `Input.metadata`) where some input of the split has any.
        names: the class names by code; one of them may be `UNLABELLED`.
        classes: the class names by label.
        digest: sha256 of the whole list, hex.
        account: what was found and what was passed over.
        words: what classes mean in words, by name, where something tells that.
        metadata: sha256 of where all inputs have their metadata, hex; empty where none has any.
    """

    source: Source
    splits: dict[str, pa.Table]
    names: list[str]
    classes: list[str]
    digest: str
    account: Account
    words: dict[str, str] = field(default_factory=dict)
    metadata: str = ""

    @property
    def class_words(self) -> list[str]:
        """The words by label, "" for none; [] where no class has any."""
        return [self.words.get(name, "") for name in self.classes] if self.words else []

    @property
    def label_of(self) -> NDArray[np.int32]:
        """The label of each class code; -1 for `UNLABELLED`."""
        number = {name: label for label, name in enumerate(self.classes)} | {UNLABELLED: -1}
        return np.array([number[name] for name in self.names], np.int32)

    def counts(self, split: str) -> NDArray[np.int64]:
        """How many inputs of a split each label has: (classes,)."""
        labels = self.label_of[self.splits[split]["class"].to_numpy()]
        return np.bincount(labels[labels >= 0], minlength=len(self.classes))


def list_inputs(
    source: Source,
    labels: str | Sequence[str] = AUTO,
    class_names: ClassNames | None = None,
    class_words: Path | str | None = None,
) -> Listing:
    """Lists a source.

    Args:
        source: where the images are.
        labels: how classes are numbered, as `ShardOptions.labels` has it.
        class_names: what to make of names that are equal but for case or Unicode form, as `ShardOptions.class_names` has it.
        class_words: a file of lines `CLASS words`, which goes before what the source says.

    Raises:
        AlexprepError: there is nothing, or the source is damaged.
        AmbiguousSourceError: names are equal but for case or Unicode form, and `class_names` is None.
    """
    account = Account()
    splits, names, digest, metadata = _as_columns(source.inputs(account))
    if not splits:
        raise AlexprepError(
            f"SOURCE {source.files.display()} holds no files where {source.layout!r} has its images: name the folder that holds them, "
            "or say with --layout what it is (docs/sources.md)"
        )
    account.make_relative(source.files.display())
    inputs = sum(len(table) for table in splits.values())
    if account.found != inputs + account.passed_over_count:
        raise AlexprepError(
            f"SOURCE {source.files.display()}: {account.found:,} files were found, but {inputs:,} are inputs and "
            f"{account.passed_over_count:,} were passed over: SOURCE changed while it was listed; run the same command again"
        )
    if class_names != "exact" and (alike := _alike(names)):
        if class_names is None:
            raise _asked_about(alike, source)
        names = [alike.get(name, name) for name in names]
    classes = class_order(labels, set(names) - {UNLABELLED}, source)
    words = read_class_words(class_words, classes) if class_words else source.words(set(classes))
    listing = Listing(source, splits, names, classes, digest, account, words, metadata)
    account.warnings += _warnings(listing)
    return listing


def renumbered(listing: Listing, classes: list[str]) -> Listing:
    """The same inputs with the same classes by other labels, and the warnings of that numbering in place of the former."""
    again, former = replace(listing, classes=classes), _warnings(listing)
    kept = [sentence for sentence in listing.account.warnings if sentence not in former]
    return replace(again, account=replace(listing.account, warnings=kept + _warnings(again)))


def class_order(rule: str | Sequence[str], present: set[str], source: Source) -> list[str]:
    """The class names by label, for the classes `present` and a rule as `ShardOptions.labels` has it: label i is the i-th name."""
    if rule == AUTO:  # the source's own numbering, or sorted where it has none
        return source.classes(present)
    if rule == SORTED:  # by bytes, as torchvision and Caffe number them
        return sorted(present, key=str.encode)
    if rule == ILSVRC_ID:  # as the 2012 code did: label = ILSVRC ID - 1
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
    for name, times in Counter(order).items():
        if times > 1:
            raise AlexprepError(f"--labels {path} names class {name!r} twice: name each once")
    return order


def _as_columns(inputs: Iterable[Input]) -> tuple[dict[str, pa.Table], list[str], str, str]:
    """All inputs by split, as `Listing.splits` has them; the class names by code; the sha256 of the whole list, hex, and of the metadata.

    As columns, 15 million inputs fit into a few gigabytes.
    """
    recent: dict[str, tuple[list[Any], ...]] = {}  # a list a column
    chunks: dict[str, list[pa.Table]] = {}
    codes: dict[str, int] = {}
    heads: dict[tuple[str, str], bytes] = {}  # how a class begins its lines in what is hashed
    digest, of_metadata, count = hashlib.sha256(), None, 0

    def flush(split: str) -> None:
        *columns, metadata = recent.pop(split)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _LISTING, strict=True)]
        table = pa.table(arrays, schema=_LISTING)
        if any(metadata):
            table = table.append_column("metadata", pa.array(metadata, pa.large_binary()))
        chunks.setdefault(split, []).append(table)

    inputs = iter(inputs)
    while some := list(itertools.islice(inputs, _AT_ONCE)):
        splits, names, places, metadata = zip(*some, strict=True)
        for pair in dict.fromkeys(zip(splits, names, strict=True)):
            if pair not in heads:
                heads[pair] = b"%s\0%s\0" % (pair[0].encode(), pair[1].encode())
                codes.setdefault(pair[1], len(codes))
        lines = zip(splits, names, places, strict=True)
        digest.update(b"".join([b"%s%s\0%s\0%d\0%d\0" % (heads[split, name], *place) for split, name, place in lines]))
        if any(metadata):
            of_metadata = of_metadata or hashlib.sha256()
            of_metadata.update(b"".join([b"%d %d %s" % (n, len(each), each) for n, each in enumerate(metadata, count)]))
        count += len(some)
        for split in dict.fromkeys(splits):
            own = [each == split for each in splits]
            columns = recent.setdefault(split, tuple([] for _ in (*_LISTING, "metadata")))
            columns[0].extend([codes[name] for name in itertools.compress(names, own)])
            for column, values in zip(columns[1:-1], zip(*itertools.compress(places, own), strict=True), strict=True):
                column.extend(values)
            columns[-1].extend(itertools.compress(metadata, own))
            if len(columns[0]) >= _CHUNK:
                flush(split)
    for split in list(recent):
        flush(split)
    tables = {split: pa.concat_tables(parts, promote_options="default") for split, parts in chunks.items()}
    return tables, list(codes), digest.hexdigest(), of_metadata.hexdigest() if of_metadata else ""


# What the class names themselves tell.


def _alike(names: Iterable[str]) -> dict[str, str]:
    """Of names that are equal but for case or Unicode form, each with the first of them in the order of bytes."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        plain = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()
        groups[str(int(plain)) if plain.isascii() and plain.isdigit() else plain].append(name)
    return {name: min(group, key=str.encode) for group in groups.values() if len(group) > 1 for name in group}


def _asked_about(alike: dict[str, str], source: Source) -> AmbiguousSourceError:
    first = next(iter(alike.values()))
    group = sorted(ascii(name) for name in alike if alike[name] == first)
    return AmbiguousSourceError(
        f"SOURCE {source.files.display()} has class names that are equal but for case, Unicode form, outer blanks or zeros in front: {' and '.join(group)}"
        + (f", and {len(alike) - len(group)} more. " if len(alike) > len(group) else ". ")
        + "They may be one class written in two ways, or several.",
        [("--class-names folded", "they are one class"), ("--class-names exact", "each name is a class of its own")],
    )


def _warnings(listing: Listing) -> list[str]:
    """What the numbering of classes should make a user look twice at."""
    words = []
    classes = listing.classes
    if "train" in listing.splits:
        trained = listing.counts("train") > 0
        for split in sorted(set(listing.splits) - {"train"}):
            absent = np.flatnonzero((listing.counts(split) > 0) & ~trained)
            if absent.size:
                words.append(
                    f"images in {split} and none in train: {absent.size:,} of {counted(len(classes), 'class')}, such as "
                    f"{classes[absent[0]]!r}, with labels that a network never learns"
                )
            missing = np.flatnonzero((listing.counts(split) == 0) & trained)
            if missing.size and listing.counts(split).any():
                words.append(
                    f"no image in {split}: {missing.size:,} of {counted(len(classes), 'class')}, such as {classes[missing[0]]!r}; the "
                    "numbering is the same in all splits"
                )
    unseen = np.flatnonzero(sum(listing.counts(split) for split in listing.splits) == 0)
    if unseen.size:
        words.append(
            f"no image at all: {unseen.size:,} of {counted(len(classes), 'class')}, such as {classes[unseen[0]]!r}, which keep their labels"
        )
    words += _warnings_of_numbers(classes, listing.source)
    if len(classes) == 1:
        words.append(f"there is one class only, {classes[0]!r}: is SOURCE the folder that holds the class folders?")
    return words


def _warnings_of_numbers(classes: list[str], source: Source) -> list[str]:
    """Where class names are numbers, whole or in part, and the labels are others."""
    other = {
        name: label for label, name in enumerate(classes) if name.isascii() and name.isdigit() and int(name) != label
    }
    by_bytes = sorted(classes, key=str.encode)
    all_numbers = all(name.isascii() and name.isdigit() for name in classes)
    if (
        all_numbers
        and source.layout in BY_FOLDERS
        and classes == sorted_names(classes)
        and (other or classes != by_bytes)
    ):
        text = f"; --labels sorted numbers them as text ({', '.join(by_bytes[:3])}, …), as torchvision does"
        return [
            f"the class names are numbers and are numbered in their order: {classes[0]} is label 0, {classes[-1]} is label {len(classes) - 1}"
            + text * (classes != by_bytes)
        ]
    if not all_numbers and 2 * len(other) >= len(classes) and classes == by_bytes:
        name = max(other, key=int)
        word = next(name for name in classes if not (name.isascii() and name.isdigit()))
        return [
            f"most class names are numbers, but {word!r} is none: all are sorted as text, and {name} is label {other[name]}"
        ]
    return []
