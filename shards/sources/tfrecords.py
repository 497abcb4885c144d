"""TFRecord files with pictures: ImageNet in the form of Inception and Slim (image/encoded, image/class/…), and TFDS (image, label).

A file is records, each a length, its masked CRC-32C, the data and theirs (TensorFlow, lib/io/record_writer.h). A record holds a
tf.train.Example, in protobuf's wire format, of which only what is needed is read here: messages of two kinds, nested four deep, are no reason
to bring TensorFlow along. To list a file, labels and names are read, and pictures are skipped; a picture is read with its record, whose
checksum must hold.
"""

from __future__ import annotations

import os
import re
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from alexprep.shards.errors import AlexprepError
from alexprep.shards.metadata import MetadataError, text_or_bytes
from alexprep.shards.sources.base import (
    NO_CHOICES,
    NO_LABEL,
    UNLABELLED,
    Account,
    Choices,
    Input,
    Location,
    Source,
    not_installed,
    numbered_classes,
)
from alexprep.shards.sources.foreign_formats import is_tfrecord
from alexprep.shards.sources.labels import LabelError, check_range, is_number, label_in
from alexprep.shards.sources.numbered_files import SplitFiles, check_complete, files_below, split_of_file
from alexprep.shards.sources.protobuf_wire import LENGTH, Get, WireError, fields, varint
from alexprep.shards.storage import Files, as_text

_IMAGES = ("image/encoded", "image")
_LABELS = ("image/class/label", "label")
_SYNSET, _WORDS = "image/class/synset", "image/class/text"
_NAMED_CLASS = ("image/class/label", _WORDS)  # say no more than the WordNet ID beside them
_NAMED_LABELS = (_SYNSET, _WORDS)  # texts beside Inception's number, which counts from 1
_FILE_NAMES = ("image/filename", "file_name", "filename", "image/filename_id")
_LABEL_NAMES = ("label.labels.txt", "labels.txt")  # TFDS: a name a line; Slim: 0:daisy
_HEADER, _CRC_BYTES = struct.Struct("<QI"), 4
_READ_BYTES = 4096  # of a record at once, where it is listed
_MAX_TEXT_BYTES = 1000
_MASK_DELTA = 0xA282EAD8
_is_name = re.compile(rb".*\.tfrecords?(-\d{5}-of-\d{5})?|[\w.-]*\w-\d{5}-of-\d{5}", re.IGNORECASE).fullmatch
_FILES_LOOKED_AT = 20  # where the first of a folder is none, to tell damage from other files


class Features(NamedTuple):
    """The features that are read of a record: its picture, its label, and the name of its file; None where there is none."""

    image: str
    label: str | None
    name: str | None


NO_FEATURES = Features("", None, None)


@dataclass(frozen=True)
class TFRecords(SplitFiles):
    """Records of a picture and its label.

    Attributes:
        features: those that are read.
        names: the class names by label, where a list beside the files tells them.
        lists: that list.
    """

    parts: tuple[tuple[str, bytes], ...] = ()
    features: Features = NO_FEATURES
    names: tuple[str, ...] = ()
    lists: tuple[bytes, ...] = ()
    layout = "tfrecord"
    expects = "TFRecord files, as train-00000-of-01024 or NAME-train.tfrecord-00000-of-01024, with pictures and labels"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`: the file that is named, or those below the root, of which the first must be one by its first bytes."""
        paths = [name] if name else files_below(files, _is_name)
        if not paths:
            return None
        if not is_tfrecord(files, paths[0]):
            if other := next((path for path in paths[1:_FILES_LOOKED_AT] if is_tfrecord(files, path)), None):
                raise AlexprepError(
                    f"{files.display(paths[0])} is damaged from its first bytes on, or no TFRecord file as {files.display(other)} is: get it "
                    "again, or move it away"
                )
            return None
        if not name:
            check_complete(files, paths)
        shown = files.display(paths[0])
        with files.reading(paths[0]) as read:
            (_, size), *_ = [*_records(read, files.size(paths[0]), shown, 1), (0, 0)]
            found = _features(_getter(read, _HEADER.size, size), size, shown)
        features = _chosen(found, choices, shown)
        lists = _lists_in(files, os.path.dirname(paths[0])) if features.label in _LABELS else ()
        names = _label_names(files, lists[0]) if lists else ()
        parts = sorted((split_of_file(path) or "train", path) for path in paths)
        evidence = (
            f"pictures in {features.image!r}, labels in {features.label!r}"
            if features.label
            else f"pictures in {features.image!r}"
        )
        return cls(files, tuple(parts), features, names, lists, choices=choices, whole=not name, evidence=evidence)

    def inputs(self, account: Account) -> Iterator[Input]:
        """By split, class and the pictures' names, as from class folders. Of a split in which no record has a label, all, if it is not train."""
        for split in sorted({split for split, _ in self.parts}):
            listed = [(path, _Listed(self, path)) for own, path in self.parts if own == split]
            for _, each in listed:
                self.__dict__.setdefault("_words", {}).update(each.words)
            total = sum(len(each.codes) for _, each in listed)
            account.found += total
            labelled = sum(code >= 0 for _, each in listed for code in each.codes)
            if self.choices.unlabelled:
                labelled = 0
            elif not labelled and split == "train":
                raise AlexprepError(
                    f"{self.files.display(listed[0][0])}: no record of train has a label: name the feature with --columns label=NAME, or say --unlabelled"
                )
            elif labelled < total:
                words = "they are passed over" if labelled else "their label is -1"
                account.warnings.append(f"{total - labelled:,} of {total:,} records of {split} have no label: {words}")
            found = (item for path, each in listed for item in each.inputs(path, split, account if labelled else None))
            yield from sorted(found, key=_as_in_folders)
        self.pass_over_others(account, self.lists)

    def read(self, location: Location) -> bytes:
        """The bytes of a picture; OSError where its record is not what its checksums say, or holds none."""
        data = self._record(location)
        try:
            found = dict(_features_in(lambda at, size: data[at : at + size], len(data)))
            kind, begin, end = found[self.features.image]
            pictures = list(_messages(lambda at, size: data[at : at + size], begin, end, 1)) if kind == _BYTES else []
        except (WireError, KeyError):
            pictures = []
        if len(pictures) != 1:
            raise OSError(f"the record holds {len(pictures)} pictures in {self.features.image!r}")
        begin, end = pictures[0]
        return data[begin:end]

    def metadata(self, location: Location, reference: bytes) -> dict[str, Any]:
        """See `Source`: the other features of the record, each a list, as tf.train.Example has them."""
        data = self._record(location)

        def get(at: int, size: int) -> bytes:
            return data[at : at + size]

        try:
            found = dict(_features_in(get, len(data)))
            return {name: _values_in(get, feature) for name, feature in found.items() if name not in self.used}
        except WireError as error:
            raise MetadataError(f"the record holds no tf.train.Example ({error})") from None

    @property
    def used(self) -> set[str]:
        """The names of the features that are read for something else than metadata."""
        label = None if self.choices.unlabelled else self.features.label
        said = _NAMED_CLASS if label == _SYNSET else ()
        return {name for name in (self.features.image, label, self.features.name, *said) if name is not None}

    def words(self, present: set[str]) -> dict[str, str]:
        """See `Source`: those of lists beside the files, else those that records of Inception's form have of their WordNet IDs."""
        found: dict[str, str] = self.__dict__.get("_words", {})
        return {name: found[name] for name in present & found.keys()} | super().words(present)

    def _record(self, location: Location) -> bytes:
        """A record without what frames it."""
        whole = self.files.read(location.path, location.offset, _HEADER.size + location.size + _CRC_BYTES)
        data = whole[_HEADER.size : _HEADER.size + location.size]
        if len(whole) != _HEADER.size + location.size + _CRC_BYTES:
            raise OSError("the file is shorter than it was when it was listed")
        for summed, at in ((whole[:8], 8), (data, len(whole) - _CRC_BYTES)):
            if _masked(summed) != int.from_bytes(whole[at : at + _CRC_BYTES], "little"):
                raise OSError("the record has another CRC-32C than the file tells: it is damaged")
        return data

    def classes(self, present: set[str]) -> list[str]:
        """The names that a list tells; the numbers from "0" to the highest where all are numbers; otherwise sorted as bytes."""
        if self.names and not self.choices.unlabelled:
            return list(self.names)
        if present and all(map(is_number, present)):
            return numbered_classes(present)
        return super().classes(present)


def _as_in_folders(item: Input) -> tuple[bytes, bytes, Location]:
    """What orders the inputs of a split: class and name; then file and place, which alone tell those without names apart."""
    return item.class_name.encode(), item.location.member.partition(b"/")[2], item.location._replace(member=b"")


class _Listed:
    """The records of one file: where each lies, its label by a code, its name."""

    def __init__(self, source: TFRecords, path: bytes) -> None:
        files, self._shown = source.files, source.files.display(path)
        self.codes, self._offsets, self._sizes, self._more = array("i"), array("q"), array("q"), array("b")
        self._names: list[bytes] = []
        self._classes: dict[str, int] = {}
        self.words: dict[str, str] = {}
        features = source.features
        label = None if source.choices.unlabelled else features.label
        with files.reading(path) as read:
            for number, (offset, size) in enumerate(_records(read, files.size(path), self._shown)):
                get = _getter(read, offset + _HEADER.size, size)
                where = f"{self._shown}, record {number:,}"
                try:
                    found = dict(_features_in(get, size))
                    text = "" if label is None else _label_in(get, found.get(label), source.names, where)
                    name = next(_texts_in(get, found.get(features.name or "")), b"")
                except WireError as error:
                    raise AlexprepError(f"{where} holds no tf.train.Example ({error}): get the file again") from None
                if (
                    label == _SYNSET
                    and text not in self._classes
                    and (words := next(_texts_in(get, found.get(_WORDS)), b""))
                ):
                    self.words[text] = as_text(words)
                self.codes.append(self._classes.setdefault(text, len(self._classes)) if text else -1)
                self._more.append(not found.keys() <= source.used)
                self._offsets.append(offset)
                self._sizes.append(size)
                self._names.append(b"record %d" % number + (b"/" + name if name else b""))

    def inputs(self, path: bytes, split: str, account: Account | None) -> Iterator[Input]:
        """Every record. Those without a label are passed over, in the `account`; without one they are inputs too."""
        classes = list(self._classes)
        places = zip(self.codes, self._offsets, self._sizes, self._names, self._more, strict=True)
        for code, offset, size, name, more in places:
            if code < 0 and account is not None:
                account.pass_over(NO_LABEL, f"{self._shown}/{as_text(name)}")
            else:
                location = Location(path, name, offset, size)
                yield Input(split, UNLABELLED if code < 0 else classes[code], location, b"+" * more)


def _chosen(found: dict[str, int], choices: Choices, shown: str) -> Features:
    """The features that are meant, of those that the first record has."""
    listed = ", ".join(map(repr, sorted(found)[:20])) or "none"
    for use in ("image", "label"):
        if (name := choices.column(use)) is not None and name not in found:
            raise AlexprepError(f"--columns {use}={name}: {shown} has no such feature; it has {listed}")
    image = choices.column("image") or next((name for name in _IMAGES if found.get(name) == _BYTES), None)
    if image is None:
        raise AlexprepError(
            f"{shown} is a TFRecord file with the features {listed}: name the one of encoded pictures with --columns image=NAME"
        )
    named = next((name for name in _NAMED_LABELS if found.get(name) == _BYTES), None)
    label = choices.column("label") or named or next((name for name in _LABELS if name in found), None)
    return Features(image, label, next((name for name in _FILE_NAMES if found.get(name) == _BYTES), None))


def _label_in(get: Get, feature: tuple[int, int, int] | None, names: Sequence[str], where: str) -> str:
    """The class of a record; empty for none, or -1."""
    if feature is None:
        return ""
    values = list(_texts_in(get, feature)) if feature[0] == _BYTES else _values_in(get, feature)
    if len(values) > 1:
        raise AlexprepError(
            f"{where}: {len(values)} labels; one is needed: name another feature with --columns label=NAME"
        )
    if not values or values[0] in (-1, b""):
        return ""
    try:
        label = label_in(values[0])
        check_range(label)
    except LabelError as error:
        raise AlexprepError(f"{where}: {error}") from None
    if not names:
        return label
    if not is_number(label) or int(label) >= len(names):
        raise AlexprepError(
            f"{where}: the label {label} is none of the {len(names):,} that the list of labels names: mend the list, or move it away"
        )
    return names[int(label)]


def _lists_in(files: Files, folder: bytes) -> tuple[bytes, ...]:
    """The lists in a folder that may tell the class names by label, of which the first is read."""
    return tuple(os.path.join(folder, name) for name in files.file_names(folder) if as_text(name) in _LABEL_NAMES)


def _label_names(files: Files, path: bytes) -> tuple[str, ...]:
    """The class names by label that a list tells."""
    try:
        lines = files.read(path).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise AlexprepError(f"{files.display(path)} cannot be read ({error}): mend it, or move it away") from None
    lines = [line.strip() for line in lines if line.strip()]
    if all(line.startswith(f"{n}:") for n, line in enumerate(lines)):
        lines = [line.partition(":")[2].strip() for line in lines]
    if len(set(lines)) < len(lines) or not all(lines):
        raise AlexprepError(f"{files.display(path)} names a class twice, or not at all: mend it, or move it away")
    return tuple(lines)


# Records


def _records(read: Get, size: int, shown: str, limit: int | None = None) -> Iterator[tuple[int, int]]:
    """(offset, bytes of data) of the records of a file of `size` bytes, of the first `limit` ones; a cut or damage is an AlexprepError."""
    at = number = 0
    while at < size and number != limit:
        header = read(at, _HEADER.size)
        again = "get the file again"
        if len(header) < _HEADER.size:
            raise AlexprepError(
                f"{shown} ends inside the header of record {number:,}, at byte {at:,}: it was cut short, {again}"
            )
        length, crc = _HEADER.unpack(header)
        if _masked(header[:8]) != crc:
            raise AlexprepError(f"{shown}: record {number:,}, at byte {at:,}, has a damaged length: {again}")
        end = at + _HEADER.size + length + _CRC_BYTES
        if end > size:
            raise AlexprepError(
                f"{shown}: record {number:,}, at byte {at:,}, goes beyond the end: the file was cut short, {again}"
            )
        yield at, length
        at, number = end, number + 1


def _masked(data: bytes) -> int:
    """The CRC-32C of data as TFRecord files have it: rotated right by 15 bits, plus a constant."""
    try:
        import google_crc32c
    except ImportError as error:
        raise not_installed("a TFRecord file", error) from None
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def _getter(read: Get, start: int, size: int) -> Get:
    """Reads parts of the record at `start`, a few kilobytes at once."""
    kept, kept_at = b"", 0

    def get(at: int, count: int) -> bytes:
        nonlocal kept, kept_at
        if not kept_at <= at <= at + count <= kept_at + len(kept):
            kept, kept_at = read(start + at, min(max(count, _READ_BYTES), size - at)), at
        return kept[at - kept_at : at - kept_at + count]

    return get


_BYTES, _FLOATS, _INTEGERS = 1, 2, 3  # fields of tf.train.Feature


def _features(get: Get, size: int, shown: str) -> dict[str, int]:
    """The kind of each feature of a record, by name."""
    try:
        return {name: kind for name, (kind, _, _) in _features_in(get, size)}
    except WireError as error:
        raise AlexprepError(
            f"{shown} is a TFRecord file without a tf.train.Example ({error}), which is not read"
        ) from None


def _features_in(get: Get, size: int) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """(name, (kind, begin and end of its list)) of the features of an Example: Example.features.feature is a map."""
    for features in _messages(get, 0, size, 1):
        for entry in _messages(get, *features, 1):
            name = b"".join(get(at, end - at) for at, end in _messages(get, *entry, 1) if end - at <= _MAX_TEXT_BYTES)
            for value in _messages(get, *entry, 2):
                lists = ((kind, at, end) for kind, wire, at, end in fields(get, *value) if wire == LENGTH)
                if (found := next(lists, None)) is not None:
                    yield name.decode("utf-8", "replace"), found


def _messages(get: Get, at: int, end: int, number: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each value of a field of messages, bytes or text."""
    return ((begin, to) for found, kind, begin, to in fields(get, at, end) if found == number and kind == LENGTH)


def _texts_in(get: Get, feature: tuple[int, int, int] | None) -> Iterator[bytes]:
    """The values of a feature of bytes, each cut to what a label or name may have."""
    if feature is not None and feature[0] == _BYTES:
        for begin, end in _messages(get, *feature[1:], 1):
            yield get(begin, min(end - begin, _MAX_TEXT_BYTES))


def _values_in(get: Get, feature: tuple[int, int, int]) -> list[Any]:
    """The values of a feature: whole numbers, floats, texts, or bytes that are no text in UTF-8."""
    kind, begin, end = feature
    if kind == _INTEGERS:
        return list(_integers_in(get, begin, end))
    if kind == _FLOATS:  # packed or not, 4 bytes each
        packed = b"".join(get(at, to - at) for _, _, at, to in fields(get, begin, end))
        if len(packed) % 4:
            raise WireError("a list of floats ends within one")
        return [value for (value,) in struct.iter_unpack("<f", packed)]
    return [text_or_bytes(get(at, to - at)) for at, to in _messages(get, begin, end, 1)]


def _integers_in(get: Get, at: int, end: int) -> Iterator[int]:
    """The values of an Int64List, packed or not."""
    for _, _, begin, to in fields(get, at, end):
        while begin < to:
            value, begin = varint(get, begin, to)
            yield value - (1 << 64) if value >> 63 else value
