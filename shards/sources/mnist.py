"""MNIST and its kin in idx files: MNIST, Fashion-MNIST, KMNIST, EMNIST; as downloaded (gzipped) or unpacked.

The format is the one of http://yann.lecun.com/exdb/mnist: two zero bytes, the type (8: uint8), the number of dimensions, each
dimension as a big-endian 32-bit number, then the values, the last dimension fastest.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import Input, Location, Source, numbered_classes
from alexprep.shards.sources.binary import Part, beginning, in_order, numbered, paired, record, resident, whole
from alexprep.shards.sources.files import Files

_NAME = re.compile(
    rb"(?i:(?P<set>(?:.*[-_.])?)(?P<split>train|t10k|test|val)[-_](?P<kind>images[-.]idx3|labels[-.]idx1)-ubyte(?:\.gz)?)"
)
_AGAIN = "download it again"


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
        if name and not _NAME.fullmatch(name):
            return None
        sets: dict[bytes, dict[str, dict[bytes, bytes]]] = {}
        for prefix, splits in paired(files, name, _NAME).items():
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
            count, height, width = _dimensions(head, 3, self.files.display(images))
            _check_length(self.files.display(images), length, 16, count, height * width)
            content = whole(self.files, labels_file)
            (labelled,) = _dimensions(content, 1, self.files.display(labels_file))
            _check_length(self.files.display(labels_file), len(content), 8, labelled, 1)
            if labelled != count:
                raise AlexprepError(
                    f"{self.files.display(images)} holds {count:,} images, {self.files.display(labels_file)} {labelled:,} "
                    f"labels: they are not a pair; {_AGAIN}"
                )
            labels = np.frombuffer(content, np.uint8, offset=8)
            area = height * width

            def locate(n: int, images: bytes = images, count: int = count, area: int = area) -> tuple[Location]:
                return (Location(images, numbered(n, count), 16 + n * area, area),)

            yield from in_order(split, [str(label) for label in range(256)], [Part(labels, locate)])

    def read(self, location: Location) -> NDArray[np.uint8]:
        """One image, uint8 (H, W)."""
        height, width = _shape(self.files, location.path)
        return np.frombuffer(record(self.files, location), np.uint8).reshape(height, width)

    def classes(self, present: set[str]) -> list[str]:
        """The numbers from "0" to the highest label, in numeric order."""
        return numbered_classes(present)

    def resident_bytes(self) -> int:
        """What gzipped image files hold."""
        return resident(self.files, [images for _, images, _ in self.pairs])


@functools.lru_cache(maxsize=8)
def _shape(files: Files, images: bytes) -> tuple[int, int]:
    """Height and width; kept, or every image would cost a second read."""
    head = record(files, Location(images, b"", 0, 16))
    _, height, width = _dimensions(head, 3, files.display(images))
    return height, width


def _dimensions(head: bytes, count: int, name: str) -> tuple[int, ...]:
    """The dimensions that an idx file of `count` of them states."""
    magic = bytes((0, 0, 8, count))
    if len(head) < 4 + 4 * count or head[:4] != magic:
        raise AlexprepError(
            f"{name} begins with the bytes {head[:4].hex(' ') or '(none)'}, an idx file of uint8 in {count} "
            f"dimension{'s' * (count > 1)} with {magic.hex(' ')}: {_AGAIN}"
        )
    return struct.unpack_from(f">{count}I", head, 4)


def _check_length(name: str, length: int, head: int, count: int, size: int) -> None:
    if size < 1:
        raise AlexprepError(f"{name} states images of {size} pixels: {_AGAIN}")
    if length != head + count * size:
        raise AlexprepError(
            f"{name} has {length:,} bytes; with the {count:,} records of {size:,} bytes that it states it would have "
            f"{head + count * size:,}: {_AGAIN}"
        )
