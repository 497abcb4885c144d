"""Files of many images of equal size one behind the other, gzipped or not: what CIFAR, MNIST and small NORB have in common."""

from __future__ import annotations

import contextlib
import functools
import re
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import SPLITS, Input, Location, Source, numbered_classes
from alexprep.shards.storage import MAX_INFLATED_BYTES, Files, inflated

# -------------------- Files of many images of equal size one behind the other, gzipped or not: what CIFAR, MNIST and small NORB have in common.


_lock = threading.Lock()


class Part(NamedTuple):
    """One file's share of a split.

    Attributes:
        labels: one number a record, any integer dtype, (N,).
        locate: record number → the inputs that it holds.
    """

    labels: NDArray[np.integer]
    locate: Callable[[int], Iterable[Location]]


def in_order(split: str, names: Sequence[str], parts: Sequence[Part]) -> Iterator[Input]:
    """The inputs of a split by class name as bytes, then by part and record. All labels must lie below len(names)."""
    for code in sorted(range(len(names)), key=lambda code: names[code].encode()):
        for part in parts:
            for record in np.flatnonzero(part.labels == code).tolist():
                for location in part.locate(record):
                    yield Input(split, names[code], location)


def numbered(record: int, count: int) -> bytes:
    """A record's number as a member's name, with as many digits as the last one needs: bytes then sort as numbers do.

    >>> numbered(7, 1000)
    b'[007]'
    """
    return b"[%0*d]" % (len(str(count - 1)), record)


def paired(files: Files, name: bytes, pattern: re.Pattern[bytes]) -> dict[bytes, dict[str, dict[bytes, bytes]]]:
    """The files in the root whose names match, as {set: {split: {kind: file}}}; those of one set where `name` is given.

    Args:
        files: where to look.
        name: a file of the set that is meant, or empty.
        pattern: with the groups "set", "split" and "kind". A file that is there unpacked too is not read gzipped.

    Raises:
        AlexprepError: two files of a set stand for one split and kind.
    """
    found: dict[bytes, dict[str, dict[bytes, bytes]]] = {}
    words: dict[tuple[bytes, str], bytes] = {}
    chosen = pattern.fullmatch(name)
    entries = [entry.name for entry in files.entries() if not entry.is_folder]
    # First what is named, then unpacked files, then "-" before ".", in which copies of MNIST differ.
    for file in sorted(entries, key=lambda file: (file != name, is_gzipped(file), file)):
        match = pattern.fullmatch(file)
        if match is None or (chosen and match["set"] != chosen["set"]):
            continue
        word = match["split"].lower()
        split = (SPLITS | {"t10k": "test", "testing": "test"})[word.decode()]
        if words.setdefault((match["set"], split), word) != word:
            other = words[match["set"], split].decode()
            raise AlexprepError(
                f"SOURCE {files.display()} holds files named {word.decode()} and {other}, which both mean {split!r}: "
                "move one of them away"
            )
        found.setdefault(match["set"], {}).setdefault(split, {}).setdefault(match["kind"].lower(), file)
    return found


def is_gzipped(path: bytes) -> bool:
    """Whether a file is read by inflating it, by its name."""
    return path.lower().endswith((b".gz", b".tgz"))


@contextlib.contextmanager
def listing(files: Files, path: bytes) -> Iterator[None]:
    """Around reads that a listing cannot do without: OSError becomes AlexprepError."""
    try:
        yield
    except OSError as error:
        raise AlexprepError(f"{files.display(path)} cannot be read ({error}): check it, or download it again") from None


def whole(files: Files, path: bytes) -> bytes:
    """A file's content, inflated if gzipped, not kept.

    Raises:
        AlexprepError: it cannot be read or is damaged.
    """
    with listing(files, path):
        return inflated.__wrapped__(files, path)


def beginning(files: Files, path: bytes, size: int) -> tuple[bytes, int]:
    """A file's first `size` bytes, fewer where it ends before, and how many it has; both after inflating.

    Raises:
        AlexprepError: it cannot be read or is damaged.
    """
    if is_gzipped(path):
        content = whole(files, path)
        return content[:size], len(content)
    with listing(files, path):
        length = files.size(path)
        return files.read(path, 0, min(size, length)), length


def record(files: Files, location: Location) -> bytes:
    """The bytes at a location.

    Raises:
        OSError: they cannot be read, or the file is shorter than when it was listed.
    """
    path, _, offset, size = location
    if is_gzipped(path):
        with _lock:  # or several threads would inflate it at once
            content = inflated(files, path)
        data = content[offset : offset + size]
    else:
        data = files.read(path, offset, size)
    if len(data) != size:
        raise OSError(f"{files.display(path)} has changed: it ends within {location}")
    return data


def resident(files: Files, paths: Iterable[bytes]) -> int:
    """Memory that reading records of these files takes: what is inflated stays, and while it grows it is there twice."""
    sizes = [0]
    for path in paths:
        if is_gzipped(path):
            with listing(files, path):
                length = files.size(path)
                # A gzip file ends in the length of what it holds, 32 bits (RFC 1952, 2.3.1).
                tail = files.read(path, max(0, length - 4), min(4, length))
            sizes.append(min(struct.unpack("<I", tail)[0] if len(tail) == 4 else 0, MAX_INFLATED_BYTES))
    return sum(sizes) + max(sizes)


# -------------------- MNIST and its kin in idx files: MNIST, Fashion-MNIST, KMNIST, EMNIST; as downloaded (gzipped) or unpacked.


_MNIST_NAME = re.compile(
    rb"(?i:(?P<set>(?:.*[-_.])?)(?P<split>train|t10k|test|val)[-_](?P<kind>images[-.]idx3|labels[-.]idx1)-ubyte(?:\.gz)?)"
)
_MNIST_AGAIN = "download it again"


@dataclass(frozen=True)
class Mnist(Source):
    """Pairs of idx files: grey images of any one size, and labels from 0 to 255.

    Classes are the labels as text, "0" to the highest one present in any split. Pixels are as in the file. EMNIST's letters
    therefore lie on their sides, mirrored (the file has rows where the image has columns), and the letters of emnist-letters
    are 1 to 26, with no image in class 0.

    Attributes:
        pairs: (split, images file, labels file) in ascending order of the split.
    """

    pairs: tuple[tuple[str, bytes, bytes], ...] = ()
    layout = "mnist"
    expects = "a folder with train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz, or one of these files"

    @classmethod
    def at(cls, files: Files, name: bytes) -> Mnist | None:
        """The set in the root, or the one that the named file belongs to, with all its splits.

        Raises:
            AlexprepError: images without labels, or several sets and none named.
        """
        if name and not _MNIST_NAME.fullmatch(name):
            return None
        sets: dict[bytes, dict[str, dict[bytes, bytes]]] = {}
        for prefix, splits in paired(files, name, _MNIST_NAME).items():
            kinds: dict[str, dict[bytes, bytes]] = {split: {} for split in splits}
            for split, by_kind in splits.items():
                for kind, file in by_kind.items():  # the one to be preferred first
                    kinds[split].setdefault(kind[:6], file)
            if any(b"images" in found for found in kinds.values()):
                sets[prefix] = kinds
        if len(sets) > 1:
            images = [found[b"images"] for splits in sets.values() for found in splits.values() if b"images" in found]
            names = [prefix.strip(b"-_.").decode("utf-8", "backslashreplace") or "(no name)" for prefix in sets]
            raise AlexprepError(
                f"SOURCE {files.display()} holds {len(sets)} sets: {', '.join(names)}. Name one of the image files as SOURCE, such as "
                f"{files.display(images[0])}, for the set it belongs to"
            )
        pairs = []
        for splits in sets.values():
            for split, found in sorted(splits.items()):
                if b"images" in found and b"labels" not in found:
                    missing = found[b"images"].decode("utf-8", "backslashreplace").replace("images", "labels")
                    missing = missing.replace("idx3", "idx1")
                    raise AlexprepError(
                        f"SOURCE {files.display()} has no {missing}, which holds the labels of the {split} images: "
                        "put it beside them"
                    )
                if b"images" in found:
                    pairs.append((split, found[b"images"], found[b"labels"]))
        return cls(files, tuple(pairs)) if pairs else None

    def inputs(self) -> Iterator[Input]:
        """By split, class (as text: "10" before "2"), and place in the file.

        Raises:
            AlexprepError: a file is no idx file of bytes, or its length or count is wrong.
        """
        for split, images, labels_file in self.pairs:
            head, length = beginning(self.files, images, 16)
            count, height, width = _mnist_dimensions(head, 3, self.files.display(images))
            _check_length(self.files.display(images), length, 16, count, height * width)
            content = whole(self.files, labels_file)
            (labelled,) = _mnist_dimensions(content, 1, self.files.display(labels_file))
            _check_length(self.files.display(labels_file), len(content), 8, labelled, 1)
            if labelled != count:
                raise AlexprepError(
                    f"{self.files.display(images)} holds {count:,} images, {self.files.display(labels_file)} {labelled:,} "
                    f"labels: they are not a pair; {_MNIST_AGAIN}"
                )
            labels = np.frombuffer(content, np.uint8, offset=8)
            area = height * width

            def locate(n: int, images: bytes = images, count: int = count, area: int = area) -> tuple[Location]:
                return (Location(images, numbered(n, count), 16 + n * area, area),)

            yield from in_order(split, [str(label) for label in range(256)], [Part(labels, locate)])

    def read(self, location: Location) -> NDArray[np.uint8]:
        """One image, uint8 (H, W)."""
        height, width = _mnist_shape(self.files, location.path)
        return np.frombuffer(record(self.files, location), np.uint8).reshape(height, width)

    def classes(self, present: set[str]) -> list[str]:
        """The numbers from "0" to the highest label, in numeric order."""
        return numbered_classes(present)

    def resident_bytes(self) -> int:
        """What gzipped image files hold."""
        return resident(self.files, [images for _, images, _ in self.pairs])


@functools.lru_cache(maxsize=8)
def _mnist_shape(files: Files, images: bytes) -> tuple[int, int]:
    """Height and width; kept, or every image would cost a second read."""
    head = record(files, Location(images, b"", 0, 16))
    _, height, width = _mnist_dimensions(head, 3, files.display(images))
    return height, width


def _mnist_dimensions(head: bytes, count: int, name: str) -> tuple[int, ...]:
    """The dimensions that an idx file of `count` of them states."""
    magic = bytes((0, 0, 8, count))
    if len(head) < 4 + 4 * count or head[:4] != magic:
        raise AlexprepError(
            f"{name} begins with the bytes {head[:4].hex(' ') or '(none)'}, an idx file of uint8 in {count} "
            f"dimension{'s' * (count > 1)} with {magic.hex(' ')}: {_MNIST_AGAIN}"
        )
    return struct.unpack_from(f">{count}I", head, 4)


def _check_length(name: str, length: int, head: int, count: int, size: int) -> None:
    if size < 1:
        raise AlexprepError(f"{name} states images of {size} pixels: {_MNIST_AGAIN}")
    if length != head + count * size:
        raise AlexprepError(
            f"{name} has {length:,} bytes; with the {count:,} records of {size:,} bytes that it states it would have "
            f"{head + count * size:,}: {_MNIST_AGAIN}"
        )


# -------------------- Small NORB (LeCun, Huang and Bottou, CVPR 2004): 2 × 24,300 stereo pairs of toys, in the six files as downloaded or unpacked.


CLASSES = ("animal", "human", "airplane", "truck", "car")  # by label, as the page above numbers them

_NORB_NAME = re.compile(
    rb"(?i:(?P<set>smallnorb)-[0-9x]+-(?P<split>training|testing)-(?P<kind>dat|cat|info)\.mat(?:\.gz)?)"
)
_BYTES, _INTEGERS = 0x1E3D4C55, 0x1E3D4C54
_NORB_AGAIN = "download it again"


@dataclass(frozen=True)
class SmallNorb(Source):
    """Pairs of -dat.mat (images) and -cat.mat (labels) files; -info.mat (instance, elevation, azimuth, light) is not read.

    Each stereo pair becomes two grey images of one class, [N].left and [N].right: a sample has one picture. Papers on NORB
    give a net both at once, as two channels, and count 24,300 test pairs where there are 48,600 images here.

    Attributes:
        pairs: (split, images file, labels file) in ascending order of the split.
    """

    pairs: tuple[tuple[str, bytes, bytes], ...] = ()
    layout = "norb"
    expects = "a folder with smallnorb-…-training-dat.mat and -cat.mat, gzipped or not, or one of these files"

    @classmethod
    def at(cls, files: Files, name: bytes) -> SmallNorb | None:
        """The set in the root, or beside the file that is named.

        Raises:
            AlexprepError: a split has images and no labels, or the other way round.
        """
        if name and not _NORB_NAME.fullmatch(name):
            return None
        pairs = []
        for splits in paired(files, name, _NORB_NAME).values():
            for split, found in sorted(splits.items()):
                for kind in (b"dat", b"cat"):
                    if kind not in found:
                        there = next(iter(found.values())).decode()
                        missing = re.sub("(?i)-(dat|cat|info)[.]", f"-{kind.decode()}.", there)
                        raise AlexprepError(f"SOURCE {files.display()} has {there} and no {missing}: put it beside it")
                pairs.append((split, found[b"dat"], found[b"cat"]))
        return cls(files, tuple(pairs)) if pairs else None

    def inputs(self) -> Iterator[Input]:
        """By split, class, place in the file, and left before right.

        Raises:
            AlexprepError: a file is no matrix of the kind its name tells, of another length, or has an unknown label.
        """
        for split, images, labels_file in self.pairs:
            count, height, width = _image_dimensions(self.files, images, *beginning(self.files, images, 24))
            content, name = whole(self.files, labels_file), self.files.display(labels_file)
            (labelled, *more), offset = _norb_dimensions(content, _INTEGERS, name)
            if more not in ([], [1, 1]) or len(content) != offset + 4 * labelled:
                raise AlexprepError(
                    f"{name} states {labelled:,} labels and has {len(content):,} bytes; it would have "
                    f"{offset + 4 * labelled:,}: {_NORB_AGAIN}"
                )
            if labelled != count:
                raise AlexprepError(
                    f"{self.files.display(images)} holds {count:,} pairs, {name} {labelled:,} labels: {_NORB_AGAIN}"
                )
            labels = np.frombuffer(content, "<i4", offset=offset)
            wrong = np.flatnonzero((labels < 0) | (labels >= len(CLASSES)))
            if wrong.size:
                raise AlexprepError(
                    f"{name}, record {wrong[0]:,}: the label {labels[wrong[0]]} is not between 0 and {len(CLASSES) - 1}; "
                    f"{_NORB_AGAIN}"
                )
            area = height * width

            def locate(n: int, images: bytes = images, count: int = count, area: int = area) -> Iterator[Location]:
                for side, word in enumerate((b".left", b".right")):
                    yield Location(images, numbered(n, count) + word, 24 + (2 * n + side) * area, area)

            yield from in_order(split, CLASSES, [Part(labels, locate)])

    def read(self, location: Location) -> NDArray[np.uint8]:
        """One image of a pair, uint8 (H, W)."""
        height, width = _norb_shape(self.files, location.path)
        return np.frombuffer(record(self.files, location), np.uint8).reshape(height, width)

    def classes(self, present: set[str]) -> list[str]:
        """All five, in the set's own order."""
        return list(CLASSES)

    def resident_bytes(self) -> int:
        """What gzipped image files hold."""
        return resident(self.files, [images for _, images, _ in self.pairs])


@functools.lru_cache(maxsize=8)
def _norb_shape(files: Files, images: bytes) -> tuple[int, int]:
    """Height and width; kept, or every image would cost a second read."""
    head = record(files, Location(images, b"", 0, 24))
    _, height, width = _image_dimensions(files, images, head, None)
    return height, width


def _image_dimensions(files: Files, images: bytes, head: bytes, length: int | None) -> tuple[int, int, int]:
    """Pairs, height and width; checks the file's length if it is given."""
    name = files.display(images)
    dimensions, offset = _norb_dimensions(head, _BYTES, name)
    if len(dimensions) != 4 or dimensions[1] != 2 or min(dimensions[2:]) < 1:
        raise AlexprepError(f"{name} states the dimensions {dimensions}, not (pairs, 2, height, width): {_NORB_AGAIN}")
    count, _, height, width = dimensions
    wanted = offset + 2 * count * height * width
    if length is not None and length != wanted:
        raise AlexprepError(
            f"{name} has {length:,} bytes; with the dimensions {dimensions} it would have {wanted:,}: {_NORB_AGAIN}"
        )
    return count, height, width


def _norb_dimensions(head: bytes, magic: int, name: str) -> tuple[tuple[int, ...], int]:
    """The dimensions that a matrix states, and where its values begin."""
    if len(head) < 20 or struct.unpack_from("<I", head) != (magic,):
        raise AlexprepError(
            f"{name} begins with the bytes {head[:4].hex(' ') or '(none)'}, a matrix of its kind with "
            f"{struct.pack('<I', magic).hex(' ')}: {_NORB_AGAIN}"
        )
    (count,) = struct.unpack_from("<I", head, 4)
    stored = max(3, count)
    if not 1 <= count <= 4 or len(head) < 8 + 4 * stored:
        raise AlexprepError(f"{name} states {count:,} dimensions; NORB's files have 1 to 4: {_NORB_AGAIN}")
    return struct.unpack_from(f"<{count}I", head, 8), 8 + 4 * stored
