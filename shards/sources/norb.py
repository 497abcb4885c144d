"""Small NORB (LeCun, Huang and Bottou, CVPR 2004): 2 × 24,300 stereo pairs of toys, in the six files as downloaded or unpacked.

What it shares with other files of records is in `binary_records`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import Location, Source
from alexprep.shards.sources.binary_records import AGAIN, PairedFiles, check_length, find_sets, read_whole, record_name
from alexprep.shards.storage import Files

_NAME = re.compile(rb"(?i:(?P<set>smallnorb)-[0-9x]+-(?P<split>training|testing)-(?P<kind>dat|cat|info)\.mat(?:\.gz)?)")
_BYTES, _INTEGERS = 0x1E3D4C55, 0x1E3D4C54


@dataclass(frozen=True)
class SmallNorb(PairedFiles):
    """Pairs of -dat.mat (images) and -cat.mat (labels) files; -info.mat (instance, elevation, azimuth, light) is not read.

    Each stereo pair becomes two grey images of one class, [N].left and [N].right: a sample has one picture. Papers on NORB
    give a net both at once, as two channels, and count 24,300 test pairs where there are 48,600 images here.
    """

    layout = "norb"
    expects = "a folder with smallnorb-…-training-dat.mat and -cat.mat, gzipped or not, or one of these files"
    header_bytes = 24
    images_per_record = 2
    numbering = ("animal", "human", "airplane", "truck", "car")  # as the authors' page numbers them

    @classmethod
    def at(cls, files: Files, name: bytes) -> Source | None:
        """See `Source`: the set in the root, or beside the file that is named.

        Raises:
            AlexprepError: a split has images and no labels, or the other way round.
        """
        if name and not _NAME.fullmatch(name):
            return None
        pairs = []
        for splits in find_sets(files, name, _NAME).values():
            for split, kinds in sorted(splits.items()):
                for kind in (b"dat", b"cat"):
                    if kind not in kinds:
                        there = next(iter(kinds.values())).decode()
                        missing = re.sub("(?i)-(dat|cat|info)[.]", f"-{kind.decode()}.", there)
                        raise AlexprepError(f"SOURCE {files.display()} has {there} and no {missing}: put it beside it")
                pairs.append((split, kinds[b"dat"], kinds[b"cat"]))
        return cls(files, tuple(pairs)) if pairs else None

    def locations(self, images: bytes, count: int, area: int, record: int) -> Iterator[Location]:
        """See `PairedFiles`: left before right."""
        for side, word in enumerate((b".left", b".right")):
            offset = self.header_bytes + (2 * record + side) * area
            yield Location(images, record_name(record, count) + word, offset, area)

    def dimensions(self, images: bytes, head: bytes) -> tuple[int, int, int]:
        """See `PairedFiles`."""
        shown = self.files.display(images)
        stated, _ = _stated(head, _BYTES, shown)
        if len(stated) != 4 or stated[1] != 2 or min(stated[2:]) < 1:
            raise AlexprepError(f"{shown} states the dimensions {stated}, not (pairs, 2, height, width): {AGAIN}")
        count, _, height, width = stated
        return count, height, width

    def labels(self, path: bytes) -> NDArray[np.integer]:
        """See `PairedFiles`."""
        content, shown = read_whole(self.files, path), self.files.display(path)
        (count, *more), offset = _stated(content, _INTEGERS, shown)
        if more not in ([], [1, 1]):
            raise AlexprepError(f"{shown} states the dimensions {(count, *more)}, not (pairs,): {AGAIN}")
        check_length(shown, len(content), offset, count, 4)
        labels = np.frombuffer(content, "<i4", offset=offset)
        wrong = np.flatnonzero((labels < 0) | (labels >= len(self.numbering)))
        if wrong.size:
            raise AlexprepError(
                f"{shown}, record {wrong[0]:,}: the label {labels[wrong[0]]} is not between 0 and {len(self.numbering) - 1}; "
                f"{AGAIN}"
            )
        return labels

    def classes(self, present: set[str]) -> list[str]:
        """All five, in the set's own order."""
        return list(self.numbering)


def _stated(head: bytes, magic: int, shown: str) -> tuple[tuple[int, ...], int]:
    """The dimensions that a matrix states, and where its values begin."""
    if len(head) < 20 or struct.unpack_from("<I", head) != (magic,):
        raise AlexprepError(
            f"{shown} begins with the bytes {head[:4].hex(' ') or '(none)'}, a matrix of its kind with "
            f"{struct.pack('<I', magic).hex(' ')}: {AGAIN}"
        )
    (count,) = struct.unpack_from("<I", head, 4)
    stored = max(3, count)
    if not 1 <= count <= 4 or len(head) < 8 + 4 * stored:
        raise AlexprepError(f"{shown} states {count:,} dimensions; NORB's files have 1 to 4: {AGAIN}")
    return struct.unpack_from(f"<{count}I", head, 8), 8 + 4 * stored
