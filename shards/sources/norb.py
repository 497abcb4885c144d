"""Small NORB (LeCun, Huang and Bottou, CVPR 2004): 2 × 24,300 stereo pairs of toys, in the six files as downloaded or unpacked.

The format is the one of https://cs.nyu.edu/~ylclab/data/norb-v1.0-small: a magic number for the type, the number of dimensions,
at least three dimensions (1 where there are fewer), then the values, the last dimension fastest; all numbers are little-endian
and of 32 bits.
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
from alexprep.shards.sources.base import Input, Location, Source
from alexprep.shards.sources.binary import Part, beginning, in_order, numbered, paired, record, resident, whole
from alexprep.shards.sources.files import Files

CLASSES = ("animal", "human", "airplane", "truck", "car")  # by label, as the page above numbers them

_NAME = re.compile(rb"(?i:(?P<set>smallnorb)-[0-9x]+-(?P<split>training|testing)-(?P<kind>dat|cat|info)\.mat(?:\.gz)?)")
_BYTES, _INTEGERS = 0x1E3D4C55, 0x1E3D4C54
_AGAIN = "download it again"


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
        if name and not _NAME.fullmatch(name):
            return None
        pairs = []
        for splits in paired(files, name, _NAME).values():
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
            (labelled, *more), offset = _dimensions(content, _INTEGERS, name)
            if more not in ([], [1, 1]) or len(content) != offset + 4 * labelled:
                raise AlexprepError(
                    f"{name} states {labelled:,} labels and has {len(content):,} bytes; it would have "
                    f"{offset + 4 * labelled:,}: {_AGAIN}"
                )
            if labelled != count:
                raise AlexprepError(
                    f"{self.files.display(images)} holds {count:,} pairs, {name} {labelled:,} labels: {_AGAIN}"
                )
            labels = np.frombuffer(content, "<i4", offset=offset)
            wrong = np.flatnonzero((labels < 0) | (labels >= len(CLASSES)))
            if wrong.size:
                raise AlexprepError(
                    f"{name}, record {wrong[0]:,}: the label {labels[wrong[0]]} is not between 0 and {len(CLASSES) - 1}; "
                    f"{_AGAIN}"
                )
            area = height * width

            def locate(n: int, images: bytes = images, count: int = count, area: int = area) -> Iterator[Location]:
                for side, word in enumerate((b".left", b".right")):
                    yield Location(images, numbered(n, count) + word, 24 + (2 * n + side) * area, area)

            yield from in_order(split, CLASSES, [Part(labels, locate)])

    def read(self, location: Location) -> NDArray[np.uint8]:
        """One image of a pair, uint8 (H, W)."""
        height, width = _shape(self.files, location.path)
        return np.frombuffer(record(self.files, location), np.uint8).reshape(height, width)

    def classes(self, present: set[str]) -> list[str]:
        """All five, in the set's own order."""
        return list(CLASSES)

    def resident_bytes(self) -> int:
        """What gzipped image files hold."""
        return resident(self.files, [images for _, images, _ in self.pairs])


@functools.lru_cache(maxsize=8)
def _shape(files: Files, images: bytes) -> tuple[int, int]:
    """Height and width; kept, or every image would cost a second read."""
    head = record(files, Location(images, b"", 0, 24))
    _, height, width = _image_dimensions(files, images, head, None)
    return height, width


def _image_dimensions(files: Files, images: bytes, head: bytes, length: int | None) -> tuple[int, int, int]:
    """Pairs, height and width; checks the file's length if it is given."""
    name = files.display(images)
    dimensions, offset = _dimensions(head, _BYTES, name)
    if len(dimensions) != 4 or dimensions[1] != 2 or min(dimensions[2:]) < 1:
        raise AlexprepError(f"{name} states the dimensions {dimensions}, not (pairs, 2, height, width): {_AGAIN}")
    count, _, height, width = dimensions
    wanted = offset + 2 * count * height * width
    if length is not None and length != wanted:
        raise AlexprepError(
            f"{name} has {length:,} bytes; with the dimensions {dimensions} it would have {wanted:,}: {_AGAIN}"
        )
    return count, height, width


def _dimensions(head: bytes, magic: int, name: str) -> tuple[tuple[int, ...], int]:
    """The dimensions that a matrix states, and where its values begin."""
    if len(head) < 20 or struct.unpack_from("<I", head) != (magic,):
        raise AlexprepError(
            f"{name} begins with the bytes {head[:4].hex(' ') or '(none)'}, a matrix of its kind with "
            f"{struct.pack('<I', magic).hex(' ')}: {_AGAIN}"
        )
    (count,) = struct.unpack_from("<I", head, 4)
    stored = max(3, count)
    if not 1 <= count <= 4 or len(head) < 8 + 4 * stored:
        raise AlexprepError(f"{name} states {count:,} dimensions; NORB's files have 1 to 4: {_AGAIN}")
    return struct.unpack_from(f"<{count}I", head, 8), 8 + 4 * stored
