"""MNIST and its kin in idx files: MNIST, Fashion-MNIST, KMNIST, EMNIST; as downloaded (gzipped) or unpacked.

What it shares with other files of records is in `binary_records`.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import Source, numbered_classes
from alexprep.shards.sources.binary_records import AGAIN, PairedFiles, check_length, find_sets, read_whole
from alexprep.shards.storage import Files, as_text

_NAME = re.compile(
    rb"(?i:(?P<set>(?:.*[-_.])?)(?P<split>train|t10k|test|val)[-_]"
    rb"(?P<kind>images(?=[-.]idx3)|labels(?=[-.]idx1))[-.]idx[13]-ubyte(?:\.gz)?)"
)


@dataclass(frozen=True)
class Mnist(PairedFiles):
    """Pairs of idx files: grey images of any one size, and labels from 0 to 255.

    Classes are the labels as text, "0" to the highest one present in any split. Pixels are as in the file. EMNIST's letters
    therefore lie on their sides, mirrored (the file has rows where the image has columns), and the letters of emnist-letters
    are 1 to 26, with no image in class 0.
    """

    layout = "mnist"
    expects = "a folder with train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz, or one of these files"
    header_bytes = 16
    numbering = tuple(map(str, range(256)))

    @classmethod
    def at(cls, files: Files, name: bytes) -> Source | None:
        """See `Source`: the set in the root, or the one that the named file belongs to, with all its splits.

        Raises:
            AlexprepError: images without labels, or several sets and none named.
        """
        if name and not _NAME.fullmatch(name):
            return None
        sets = {
            prefix: {split: kinds for split, kinds in sorted(splits.items()) if b"images" in kinds}
            for prefix, splits in find_sets(files, name, _NAME).items()
        }
        sets = {prefix: splits for prefix, splits in sets.items() if splits}
        if len(sets) > 1:
            names = [as_text(prefix.strip(b"-_.")) or "(no name)" for prefix in sets]
            first = next(kinds[b"images"] for splits in sets.values() for kinds in splits.values())
            raise AlexprepError(
                f"SOURCE {files.display()} holds {len(sets)} sets: {', '.join(names)}. Name one of the image files as SOURCE, such as "
                f"{files.display(first)}, for the set it belongs to"
            )
        pairs = []
        for split, kinds in next(iter(sets.values()), {}).items():
            if b"labels" not in kinds:
                missing = as_text(kinds[b"images"]).replace("images", "labels").replace("idx3", "idx1")
                raise AlexprepError(
                    f"SOURCE {files.display()} has no {missing}, which holds the labels of the {split} images: "
                    "put it beside them"
                )
            pairs.append((split, kinds[b"images"], kinds[b"labels"]))
        return cls(files, tuple(pairs)) if pairs else None

    def dimensions(self, images: bytes, head: bytes) -> tuple[int, int, int]:
        """See `PairedFiles`."""
        count, height, width = _stated(head, 3, self.files.display(images))
        if not height * width:
            raise AlexprepError(f"{self.files.display(images)} states images of 0 pixels: {AGAIN}")
        return count, height, width

    def labels(self, path: bytes) -> NDArray[np.integer]:
        """See `PairedFiles`."""
        content, shown = read_whole(self.files, path), self.files.display(path)
        (count,) = _stated(content, 1, shown)
        check_length(shown, len(content), 8, count, 1)
        return np.frombuffer(content, np.uint8, offset=8)

    def classes(self, present: set[str]) -> list[str]:
        """The numbers from "0" to the highest label, in numeric order."""
        return numbered_classes(present)


def _stated(head: bytes, count: int, shown: str) -> tuple[int, ...]:
    """The dimensions that an idx file of `count` of them states."""
    magic = bytes((0, 0, 8, count))
    if len(head) < 4 + 4 * count or head[:4] != magic:
        raise AlexprepError(
            f"{shown} begins with the bytes {head[:4].hex(' ') or '(none)'}, an idx file of uint8 in {count} "
            f"dimension{'s' * (count > 1)} with {magic.hex(' ')}: {AGAIN}"
        )
    return struct.unpack_from(f">{count}I", head, 4)
