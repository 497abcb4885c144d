"""CIFAR, MNIST and its kin, and small NORB: files of many images of equal size one behind the other, gzipped or not.

Each is a class with the layout's own rules, below what they share. CIFAR as images in class folders, or as a tar of them, is no
matter of this module: see `folders` and `tars`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import NO_CHOICES, SPLITS, Account, Choices, Input, Location, Source, numbered_classes
from alexprep.shards.sources.tree import pass_over_rest
from alexprep.shards.storage import MAX_INFLATED_BYTES, Files, as_text, inflate, read_inflated
from alexprep.shards.tar_format import members, reader_of

_AGAIN = "download it again"
_inflating = threading.Lock()


class RecordFile(NamedTuple):
    """One file's share of a split.

    Attributes:
        split: its name.
        file: where the first record begins.
        record_bytes: of each record.
        labels: one number a record, below the number of classes.
        pictures: what is added to a record's name for each picture in it; a record is divided evenly among them.
    """

    split: str
    file: Location
    record_bytes: int
    labels: NDArray[np.integer]
    pictures: Sequence[bytes] = (b"",)

    def pictures_of(self, record: int) -> Iterator[Location]:
        """Names have as many digits as the last record needs: bytes then sort as numbers do."""
        path, member, offset, _ = self.file
        name = member + b"[%0*d]" % (len(str(len(self.labels) - 1)), record)
        size = self.record_bytes // len(self.pictures)
        for number, suffix in enumerate(self.pictures):
            yield Location(path, name + suffix, offset + record * self.record_bytes + number * size, size)


class RecordSource(Source):
    """A source of files of records."""

    def record_files(self) -> tuple[Sequence[str], list[RecordFile]]:
        """The class names by label, and the files of all splits."""
        raise NotImplementedError

    def lists(self) -> set[bytes]:
        """The files of labels alone."""
        return set()

    def inputs(self, account: Account) -> Iterator[Input]:
        """By split, class (as text: "10" before "2"), file and record."""
        names, files = self.record_files()
        account.found += sum(len(file.labels) * len(file.pictures) for file in files)
        codes = sorted(range(len(names)), key=lambda code: names[code].encode())
        for split in sorted({file.split for file in files}):
            for code in codes:
                for file in files:
                    for record in np.flatnonzero(file.labels == code).tolist() if file.split == split else ():
                        for location in file.pictures_of(record):
                            yield Input(split, names[code], location)
        if self.whole:
            pass_over_rest(self.files, {file.file.path for file in files}, account, lists=self.lists())


def _is_gzipped(path: bytes) -> bool:
    return path.lower().endswith((b".gz", b".tgz"))


@contextlib.contextmanager
def _needed(files: Files, path: bytes) -> Iterator[None]:
    """Around reads that a listing cannot do without: OSError becomes AlexprepError."""
    try:
        yield
    except OSError as error:
        raise AlexprepError(f"{files.display(path)} cannot be read ({error}): check it, or download it again") from None


def _read_whole(files: Files, path: bytes) -> bytes:
    """A file's content for a listing, inflated if gzipped, not kept."""
    with _needed(files, path):
        return inflate(files.read(path), files.display(path))


def _read_record(files: Files, location: Location) -> bytes:
    """The bytes at a location; OSError where the file is shorter than when it was listed. What is inflated is kept."""
    path, _, offset, size = location
    if _is_gzipped(path):
        with _inflating:  # or several threads would inflate it at once
            content = read_inflated(files, path)
        data = content[offset : offset + size]
    else:
        data = files.read(path, offset, size)
    if len(data) != size:
        raise OSError(f"{files.display(path)} has changed: it ends within {location}")
    return data


def _inflated_bytes(files: Files, paths: Iterable[bytes]) -> int:
    """Memory that reading records of these files takes: what is inflated stays, and while it grows it is there twice."""
    sizes = [0]
    for path in filter(_is_gzipped, paths):
        with _needed(files, path):
            length = files.size(path)
            # A gzip file ends in the length of what it holds, 32 bits (RFC 1952, 2.3.1).
            tail = files.read(path, max(0, length - 4), min(4, length))
        sizes.append(min(struct.unpack("<I", tail)[0] if len(tail) == 4 else 0, MAX_INFLATED_BYTES))
    return sum(sizes) + max(sizes)


# CIFAR-10 and CIFAR-100 in the binary version of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked or as downloaded. A record is
# one label byte (CIFAR-100: the coarse label, then the fine one) and the red, green and blue plane of 32 × 32 pixels, row by row.


_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


class _Version(NamedTuple):
    """A binary version: its folder, the file with its class names, its files by split, and the bound of each label byte."""

    folder: bytes
    names: bytes
    splits: dict[str, tuple[bytes, ...]]
    bounds: tuple[int, ...]


_VERSIONS = {
    10: _Version(
        b"cifar-10-batches-bin",
        b"batches.meta.txt",
        {"test": (b"test_batch.bin",), "train": tuple(b"data_batch_%d.bin" % n for n in range(1, 6))},
        (10,),
    ),
    100: _Version(
        b"cifar-100-binary",
        b"fine_label_names.txt",
        {"test": (b"test.bin",), "train": (b"train.bin",)},
        (20, 100),
    ),
}
_ARCHIVE = re.compile(rb"cifar-(100?)-binary\.(tar|tar\.gz|tgz)")
_OTHER = re.compile(rb"cifar-(100?)-(batches-py|python|batches-mat|matlab)(\.tar|\.tar\.gz|\.tgz)?")
_OTHER_FILES = (  # of the other versions, when SOURCE is their folder
    (10, {b"data_batch_1", b"batches.meta"}),
    (10, {b"data_batch_1.mat", b"batches.meta.mat"}),
    (100, {b"train", b"test", b"meta"}),
    (100, {b"train.mat", b"test.mat", b"meta.mat"}),
)


@dataclass(frozen=True)
class Cifar(RecordSource):
    """One binary version of CIFAR. The classes of CIFAR-100 are its 100 fine ones.

    Attributes:
        count: of classes, 10 or 100.
        folder: of the binary files, below the root.
        archive: the file that holds them; empty where they are unpacked.
    """

    count: int = 10
    folder: bytes = b""
    archive: bytes = b""
    layout = "cifar"
    expects = "cifar-10-binary.tar.gz, cifar-100-binary.tar.gz, or the folder that they unpack to"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`: the binary version that is named, that the root is, or that lies in the root; unpacked before packed.

        Refused: another version of CIFAR, or both CIFAR-10 and CIFAR-100.
        """
        folders, plain = ([], [name]) if name else (files.folder_names(), files.file_names())
        for count, version in _VERSIONS.items():
            if version.names in plain and any(file in plain for file in version.splits["train"]):
                return cls(files, count, whole=not name)
        found = {
            count: cls(files, count, v.folder, whole=True) for count, v in _VERSIONS.items() if v.folder in folders
        }
        for file in plain:
            if archive := _ARCHIVE.fullmatch(file):
                found.setdefault(int(archive[1]), cls(files, int(archive[1]), archive=file, whole=not name))
        if len(found) > 1:
            places = " or ".join(files.display(source.archive or source.folder) for source in found.values())
            raise AlexprepError(f"SOURCE {files.display()} holds both CIFAR-10 and CIFAR-100: name {places} as SOURCE")
        if not found:
            _refuse_other_versions(files, folders, plain)
        return next(iter(found.values()), None)

    def record_files(self) -> tuple[Sequence[str], list[RecordFile]]:
        """See `RecordSource`."""
        return _cifar_files(self)

    def read(self, location: Location) -> NDArray[np.uint8]:
        """One image, uint8 (32, 32, 3) RGB."""
        planes = np.frombuffer(_read_record(self.files, location), np.uint8)[-_PIXELS:].reshape(3, _SIDE, _SIDE)
        return np.ascontiguousarray(planes.transpose(1, 2, 0))

    def classes(self, present: set[str]) -> list[str]:
        """The names in the set's own order, all of them."""
        return list(_cifar_files(self)[0])

    def resident_bytes(self) -> int:
        """What a gzipped archive holds."""
        return _inflated_bytes(self.files, [self.archive])


@functools.lru_cache(maxsize=2)
def _cifar_files(source: Cifar) -> tuple[Sequence[str], list[RecordFile]]:
    """See `RecordSource.record_files`; kept, since a gzipped archive takes seconds."""
    version = _VERSIONS[source.count]
    splits = {version.names: ""} | {name: split for split, batches in version.splits.items() for name in batches}
    names: tuple[str, ...] = ()
    batches = []
    for name, location, content in _binary_files(source, list(splits)):
        shown = source.files.display(location.path) + (f"/{as_text(location.member)}" if location.member else "")
        if name == version.names:
            names = _class_names(content, source.count, shown)
        else:
            labels = _cifar_labels(content, version.bounds, shown)
            batches.append(RecordFile(splits[name], location, len(version.bounds) + _PIXELS, labels))
    return names, batches


def _binary_files(source: Cifar, names: list[bytes]) -> Iterator[tuple[bytes, Location, bytes]]:
    """Where each file is and what it holds, in the order of `names`."""
    files, archive = source.files, source.archive
    if not archive:
        for name in names:
            path = os.path.join(source.folder, name)
            yield name, Location(path), _read_whole(files, path)
        return
    shown = files.display(archive)
    with _needed(files, archive):
        if _is_gzipped(archive):
            content = _read_whole(files, archive)
            read, size = reader_of(content), len(content)
        else:
            read, size = (lambda offset, size: files.read(archive, offset, size)), files.size(archive)
        found: dict[bytes, Location] = {}
        for member in members(read, size, shown):
            name = os.path.basename(member.name)
            if member.kind == "file" and name in names:
                if name in found:
                    raise AlexprepError(f"{shown} holds {name.decode()} twice: {_AGAIN}")
                found[name] = Location(archive, member.name, member.offset, member.size)
        for name in names:
            if name not in found:
                raise AlexprepError(f"{shown} has no {name.decode()}: {_AGAIN}")
            yield name, found[name], read(found[name].offset, found[name].size)


def _class_names(content: bytes, count: int, shown: str) -> tuple[str, ...]:
    names = tuple(line.strip() for line in content.decode("utf-8", "replace").split("\n") if line.strip())
    if len(set(names)) != count or len(names) != count or "\ufffd" in "".join(names):
        raise AlexprepError(f"{shown} has {len(set(names))} class names in {len(names)} lines, not {count}: {_AGAIN}")
    return names


def _cifar_labels(content: bytes, bounds: tuple[int, ...], shown: str) -> NDArray[np.uint8]:
    """The last label byte of each record, uint8 (N,)."""
    size = len(bounds) + _PIXELS
    count, rest = divmod(len(content), size)
    if rest or not count:
        raise AlexprepError(
            f"{shown} has {len(content):,} bytes, no multiple of the {size:,} of a record: it ends within record {count:,}; "
            f"{_AGAIN}"
        )
    labels = np.frombuffer(content, np.uint8).reshape(count, size)[:, : len(bounds)]
    wrong = np.argwhere(labels >= np.array(bounds, np.uint8))
    if wrong.size:
        row, column = wrong[0]
        raise AlexprepError(
            f"{shown}, record {row:,}: the label {labels[row, column]} is above {bounds[column] - 1}; {_AGAIN}"
        )
    return labels[:, -1].copy()


def _refuse_other_versions(files: Files, folders: list[bytes], plain: list[bytes]) -> None:
    """Raises for the Python and Matlab versions, by the names in SOURCE; beside other names one of them says little."""
    entries = [*folders, *plain]
    found = [(count, b"") for count, others in _OTHER_FILES if others <= set(plain)]
    if all(entry.startswith(b"cifar-") for entry in entries):
        found += [(int(other[1]), entry) for entry in entries if (other := _OTHER.fullmatch(entry))]
    for count, entry in found:
        raise AlexprepError(
            f"SOURCE {files.display(entry)} is CIFAR's Python or Matlab version. The former is pickled, and unpickling runs "
            f"whatever code a file holds, so neither is read: download cifar-{count}-binary.tar.gz, the binary version, from "
            "https://www.cs.toronto.edu/~kriz/cifar.html and name it as SOURCE"
        )


# MNIST and small NORB: grey images in one file and their labels in another, for each split


@dataclass(frozen=True)
class PairedFiles(RecordSource):
    """The base of such sources.

    Attributes:
        pairs: (split, images file, labels file) in ascending order of the split.
        pattern: of the files' names, with the groups "set", "split" and "kind".
        kinds: of the images file and of the labels file, with "-" for ".".
        header_bytes: before the first image.
        pictures: see `RecordFile`.
        numbering: the class names by label.
    """

    pairs: tuple[tuple[str, bytes, bytes], ...] = ()
    pattern: ClassVar[re.Pattern[bytes]]
    kinds: ClassVar[tuple[bytes, bytes]]
    header_bytes: ClassVar[int]
    pictures: ClassVar[Sequence[bytes]] = (b"",)
    planes: ClassVar[int] = 1  # of grey levels, in a picture
    numbering: ClassVar[Sequence[str]]

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`: the set in the root, or the one that the named file belongs to, with all its splits.

        A file that is there unpacked too is not read gzipped. Refused: images without labels and the other way round, several
        sets of which none is named, two words for one split.
        """
        chosen = cls.pattern.fullmatch(name)
        if name and not chosen:
            return None
        sets: dict[bytes, dict[str, dict[bytes, bytes]]] = {}
        words: dict[tuple[bytes, str], str] = {}
        # First what is named, then unpacked files, then "-" before ".", in which copies of MNIST differ.
        for file in sorted(files.file_names(), key=lambda file: (file != name, _is_gzipped(file), file)):
            match = cls.pattern.fullmatch(file)
            if match is None or (chosen and match["set"] != chosen["set"]):
                continue
            word = match["split"].decode().lower()
            split = (SPLITS | {"t10k": "test", "testing": "test"})[word]
            other = words.setdefault((match["set"], split), word)
            if other != word:
                raise AlexprepError(
                    f"SOURCE {files.display()} holds files named {word} and {other}, which both mean {split!r}: move one of "
                    "them away"
                )
            kind = match["kind"].lower().replace(b".", b"-")
            sets.setdefault(match["set"], {}).setdefault(split, {}).setdefault(kind, file)
        if len(sets) > 1:
            names = [as_text(prefix.strip(b"-_.")) or "(no name)" for prefix in sets]
            first = next(file for splits in sets.values() for found in splits.values() for file in found.values())
            raise AlexprepError(
                f"SOURCE {files.display()} holds {len(sets)} sets: {', '.join(names)}. Name one of their files as SOURCE, such as "
                f"{files.display(first)}, for the set it belongs to"
            )
        pairs = []
        for split, found in sorted(next(iter(sets.values()), {}).items()):
            for kind, other_kind in (cls.kinds, cls.kinds[::-1]):
                if kind not in found:
                    there = found[other_kind]
                    where = cls.pattern.fullmatch(there).span("kind")  # type: ignore[union-attr]  # it has matched above
                    missing = there[: where[0]] + kind + there[where[1] :]
                    raise AlexprepError(
                        f"SOURCE {files.display()} has {there.decode()} and no {missing.decode()}: put it beside it"
                    )
            pairs.append((split, found[cls.kinds[0]], found[cls.kinds[1]]))
        return cls(files, tuple(pairs), whole=not name) if pairs else None

    def dimensions(self, head: bytes, shown: str) -> tuple[int, int, int]:
        """How many records there are, and the images' height and width, by the header of an images file."""
        raise NotImplementedError

    def labels(self, content: bytes, shown: str) -> NDArray[np.integer]:
        """The labels in a labels file, (records,), all below len(numbering)."""
        raise NotImplementedError

    def lists(self) -> set[bytes]:
        """See `RecordSource`."""
        return {labels for _, _, labels in self.pairs}

    def record_files(self) -> tuple[Sequence[str], list[RecordFile]]:
        """See `RecordSource`."""
        record_files = []
        for split, images, labels_file in self.pairs:
            shown, labels_shown = self.files.display(images), self.files.display(labels_file)
            head, length = self._beginning(images)
            count, height, width = self.dimensions(head, shown)
            record_bytes = len(self.pictures) * self.planes * height * width
            _check_length(shown, length, self.header_bytes, count, record_bytes)
            labels = self.labels(_read_whole(self.files, labels_file), labels_shown)
            if len(labels) != count:
                raise AlexprepError(
                    f"{shown} holds {count:,} records, {labels_shown} {len(labels):,} labels: they are not a pair; {_AGAIN}"
                )
            begin = Location(images, b"", self.header_bytes)
            record_files.append(RecordFile(split, begin, record_bytes, labels, self.pictures))
        return self.numbering, record_files

    def read(self, location: Location) -> NDArray[np.uint8]:
        """One image, uint8 (H, W)."""
        height, width = _image_size(self, location.path)
        return np.frombuffer(_read_record(self.files, location), np.uint8).reshape(height, width)

    def resident_bytes(self) -> int:
        """What gzipped image files hold."""
        return _inflated_bytes(self.files, [images for _, images, _ in self.pairs])

    def _beginning(self, images: bytes) -> tuple[bytes, int]:
        """The header of an images file, less where it ends before, and the file's bytes; both after inflating."""
        if _is_gzipped(images):
            content = _read_whole(self.files, images)
            return content[: self.header_bytes], len(content)
        with _needed(self.files, images):
            length = self.files.size(images)
            return self.files.read(images, 0, min(self.header_bytes, length)), length


@functools.lru_cache(maxsize=8)
def _image_size(source: PairedFiles, images: bytes) -> tuple[int, int]:
    """Height and width; kept, or every image would cost a second read."""
    head = _read_record(source.files, Location(images, b"", 0, source.header_bytes))
    _, height, width = source.dimensions(head, source.files.display(images))
    return height, width


def _check_length(shown: str, length: int, header_bytes: int, count: int, record_bytes: int) -> None:
    if length != header_bytes + count * record_bytes:
        raise AlexprepError(
            f"{shown} has {length:,} bytes; with the {count:,} records of {record_bytes:,} bytes that it states it would "
            f"have {header_bytes + count * record_bytes:,}: {_AGAIN}"
        )


def _other_beginning(shown: str, head: bytes, what: str, magic: bytes) -> AlexprepError:
    begins = head[:4].hex(" ") or "(none)"
    return AlexprepError(f"{shown} begins with the bytes {begins}, {what} with {magic.hex(' ')}: {_AGAIN}")


@dataclass(frozen=True)
class Mnist(PairedFiles):
    """MNIST, Fashion-MNIST, KMNIST and EMNIST in idx files: grey images of any one size, and labels from 0 to 255.

    Classes are the labels as text, "0" to the highest one present in any split. Pixels are as in the file. EMNIST's letters
    therefore lie on their sides, mirrored (the file has rows where the image has columns), and the letters of emnist-letters
    are 1 to 26, with no image in class 0.
    """

    layout = "mnist"
    expects = "a folder with train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz, or one of these files"
    pattern = re.compile(
        rb"(?i:(?P<set>(?:.*[-_.])?)(?P<split>train|t10k|test|val)[-_]"
        rb"(?P<kind>images[-.]idx3|labels[-.]idx1)-ubyte(?:\.gz)?)"
    )
    kinds = (b"images-idx3", b"labels-idx1")
    header_bytes = 16
    numbering = tuple(map(str, range(256)))

    def dimensions(self, head: bytes, shown: str) -> tuple[int, int, int]:
        """See `PairedFiles`."""
        count, height, width = _idx_shape(head, 3, shown)
        if not height * width:
            raise AlexprepError(f"{shown} states images of 0 pixels: {_AGAIN}")
        return count, height, width

    def labels(self, content: bytes, shown: str) -> NDArray[np.integer]:
        """See `PairedFiles`."""
        (count,) = _idx_shape(content, 1, shown)
        _check_length(shown, len(content), 8, count, 1)
        return np.frombuffer(content, np.uint8, offset=8)

    def classes(self, present: set[str]) -> list[str]:
        """The numbers from "0" to the highest label, in numeric order."""
        return numbered_classes(present)


def _idx_shape(head: bytes, count: int, shown: str) -> tuple[int, ...]:
    """The dimensions that an idx file of `count` of them states."""
    magic = bytes((0, 0, 8, count))
    if len(head) < 4 + 4 * count or head[:4] != magic:
        what = f"an idx file of uint8 in {count} dimension{'s' * (count > 1)}"
        raise _other_beginning(shown, head, what, magic)
    return struct.unpack_from(f">{count}I", head, 4)


@dataclass(frozen=True)
class SmallNorb(PairedFiles):
    """Small NORB (LeCun, Huang and Bottou, CVPR 2004): 2 × 24,300 stereo pairs of toys, -dat.mat (images) and -cat.mat (labels).

    Each stereo pair becomes two grey images of one class, [N].left and [N].right: a sample has one picture. Papers on NORB
    give a net both at once, as two channels, and count 24,300 test pairs where there are 48,600 images here. The files
    -info.mat (instance, elevation, azimuth, light) are not read.
    """

    layout = "norb"
    expects = "a folder with smallnorb-…-training-dat.mat and -cat.mat, gzipped or not, or one of these files"
    pattern = re.compile(
        rb"(?i:(?P<set>smallnorb)-[0-9x]+-(?P<split>training|testing)-(?P<kind>dat|cat)\.mat(?:\.gz)?)"
    )
    kinds = (b"dat", b"cat")
    header_bytes = 24
    pictures: ClassVar[Sequence[bytes]] = (b".left", b".right")
    numbering = ("animal", "human", "airplane", "truck", "car")  # as the authors' page numbers them

    def dimensions(self, head: bytes, shown: str) -> tuple[int, int, int]:
        """See `PairedFiles`."""
        shape, _ = _norb_shape(head, b"\x55\x4c\x3d\x1e", shown)
        if len(shape) != 4 or shape[1] != 2 or min(shape[2:]) < 1:
            raise AlexprepError(f"{shown} states the dimensions {shape}, not (pairs, 2, height, width): {_AGAIN}")
        return shape[0], shape[2], shape[3]

    def labels(self, content: bytes, shown: str) -> NDArray[np.integer]:
        """See `PairedFiles`."""
        (count, *more), offset = _norb_shape(content, b"\x54\x4c\x3d\x1e", shown)
        if more not in ([], [1, 1]):
            raise AlexprepError(f"{shown} states the dimensions {(count, *more)}, not (pairs,): {_AGAIN}")
        _check_length(shown, len(content), offset, count, 4)
        labels = np.frombuffer(content, "<i4", offset=offset)
        wrong = np.flatnonzero((labels < 0) | (labels >= len(self.numbering)))
        if wrong.size:
            raise AlexprepError(
                f"{shown}, record {wrong[0]:,}: the label {labels[wrong[0]]} is not between 0 and {len(self.numbering) - 1}; "
                f"{_AGAIN}"
            )
        return labels

    def classes(self, present: set[str]) -> list[str]:
        """All five, in the set's own order."""
        return list(self.numbering)


@dataclass(frozen=True)
class StereoNorb(SmallNorb):
    """The same with each stereo pair as one picture, as papers have it: red is the left image, green the right one, blue is 0."""

    layout = "norb-stereo"
    pictures = (b"",)
    planes = 2

    def read(self, location: Location) -> NDArray[np.uint8]:
        """One pair, uint8 (H, W, 3)."""
        height, width = _image_size(self, location.path)
        pair = np.frombuffer(_read_record(self.files, location), np.uint8).reshape(2, height, width)
        return np.stack([*pair, np.zeros_like(pair[0])], axis=2)


def _norb_shape(head: bytes, magic: bytes, shown: str) -> tuple[tuple[int, ...], int]:
    """The dimensions that a matrix states, and where its values begin."""
    if len(head) < 20 or head[:4] != magic:
        raise _other_beginning(shown, head, "a matrix of its kind", magic)
    (count,) = struct.unpack_from("<I", head, 4)
    stored = max(3, count)
    if not 1 <= count <= 4 or len(head) < 8 + 4 * stored:
        raise AlexprepError(f"{shown} states {count:,} dimensions; NORB's files have 1 to 4: {_AGAIN}")
    return struct.unpack_from(f"<{count}I", head, 8), 8 + 4 * stored
