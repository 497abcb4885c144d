"""ImageNet-1k as Hugging Face's hub keeps it: train_images_0.tar.gz … , val_images.tar.gz and test_images.tar.gz.

In each member's name its class stands last: n01440764_10026_n01440764.JPEG, ILSVRC2012_val_00000293_n01440764.JPEG; those of test have
none. What is gzipped has no places to begin at, so each archive is decompressed once to be listed, and seek points are kept on the way
(the library indexed_gzip). The members that begin between two of them form a group, and groups are read as a whole (`grouped`).
"""

from __future__ import annotations

import io
import os
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from alexprep.shards.errors import AlexprepError
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
    split_of,
)
from alexprep.shards.sources.grouped import DamagedGroupError, FileView, GroupedSource, Sizes, check_group
from alexprep.shards.sources.numbered_files import SplitFiles
from alexprep.shards.sources.tree import rule_of
from alexprep.shards.storage import Files, as_text
from alexprep.shards.tar_format import BLOCK, members, padded, read_header_block, reader_of

# Of an archive, decompressed, between two seek points. Each has 32 KiB of it, so all of ImageNet's take 75 MB.
SPACING_BYTES = 2**26
_BLOCK_BYTES = 2**20
_HEAD_BYTES = 2**14  # of an archive, in which its first member is found
_ENDINGS = (b".tar.gz", b".tgz")
_AT_ONCE = 4  # archives that are listed at the same time
_class_in_name = re.compile(rb"(?:.*_)?(n[0-9]{8})\.jpe?g", re.IGNORECASE).fullmatch


class Scan(NamedTuple):
    """What a listing keeps of an archive.

    Attributes:
        points: indexed_gzip's seek points, as it writes them to a file.
        starts: where each group begins in the decompressed archive, and where the last one ends.
        names: of the members that are files, in their order.
        groups: the number of each one's group.
    """

    points: bytes
    starts: list[int]
    names: list[bytes]
    groups: list[int]


@dataclass(frozen=True)
class HubArchives(SplitFiles, GroupedSource):
    """Gzipped tars of pictures whose classes stand in their names."""

    parts: tuple[tuple[str, bytes], ...] = ()
    layout = "hub-imagenet"
    expects = "train_images_0.tar.gz and so on, val_images.tar.gz, with members NAME_WNID.JPEG"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`: the archive that is named, or those in the root or its folder data, of which one must have a class in a name."""
        folders = [b""] if name else [b"", b"data"]
        for folder in folders:
            paths = [name] if name else [os.path.join(folder, file) for file in files.file_names(folder)]
            found = sorted((split_of(os.path.basename(path)) or "train", path) for path in paths if _is_gzipped(path))
            if any(_class_of(_first_member(files, path)) for _, path in found):
                return cls(
                    files,
                    tuple(found),
                    whole=not name,
                    evidence="gzipped archives, classes in the names of their members",
                )
        return None

    def inputs(self, account: Account) -> Iterator[Input]:
        """By split, archive and place in it; of a split in which no name tells a class, all, if it is not train."""
        self.begin_listing()
        self.__dict__.pop("_scans_of", None)
        self.sizes()
        scans = self._scans()
        for split in sorted({split for split, _ in self.parts}):
            own = [path for each, path in self.parts if each == split]
            pictures = sum(rule_of(name) is None for path in own for name in map(os.path.basename, scans[path].names))
            named = sum(bool(_class_of(name)) for path in own for name in scans[path].names)
            if not named and split == "train":
                raise AlexprepError(
                    f"{self.files.display(own[0])}: no member's name ends in a WordNet ID, as n01440764_18_n01440764.JPEG"
                )
            if named < pictures:
                words = "their label is -1" if not named else "they are passed over"
                account.warnings.append(
                    f"{pictures - named:,} of {pictures:,} pictures of {split} have no class in their name: {words}"
                )
            for path in own:
                yield from self._inputs_in(path, split, bool(named), scans[path], account)
        self.pass_over_others(account)

    def _inputs_in(self, path: bytes, split: str, named: bool, scan: Scan, account: Account) -> Iterator[Input]:
        shown, row, before = self.files.display(path), 0, -1
        for name, group in zip(scan.names, scan.groups, strict=True):
            account.found += 1
            row = row + 1 if group == before else 0
            before = group
            class_name, rule = _class_of(name), rule_of(os.path.basename(name))
            if rule is None and named and not class_name:
                rule = NO_LABEL
            if rule is not None:
                account.pass_over(rule, f"{shown}/{as_text(name)}")
            else:
                yield Input(split, class_name or UNLABELLED, Location(path, name, group, row))

    def measured(self) -> Sizes:
        """See `GroupedSource`."""
        inputs, total, largest = 0, 0, 0
        for path, scan in self._scans().items():
            inputs, total = inputs + len(scan.names), total + scan.starts[-1]
            for number, (begin, end) in enumerate(zip(scan.starts, scan.starts[1:], strict=False)):
                check_group(end - begin, number, self.files.display(path))
                largest = max(largest, end - begin)
        return Sizes(inputs, total, largest)

    def resident_bytes(self) -> int:
        """Also the seek points."""
        return super().resident_bytes() + 2 * sum(len(scan.points) for scan in self._scans().values())

    def read_group(self, path: bytes, number: int) -> pa.ChunkedArray:
        """See `GroupedSource`."""
        scan = self._scans()[path]
        begin, end = scan.starts[number : number + 2]
        try:
            with FileView(self.files, path) as file, _opened(file, scan.points) as archive:
                archive.seek(begin)
                data = archive.read(end - begin)
            # A block of zeros ends what `members` reads.
            whole = data + bytes(BLOCK) if len(data) == end - begin else b""
            held = [
                data[at : at + size]
                for _, at, size, kind in members(reader_of(whole), len(whole), as_text(path))
                if kind == "file"
            ]
        except (AlexprepError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DamagedGroupError(
                f"bytes {begin:,} to {end:,} of the archive are not what they were when it was listed"
            ) from None
        return pa.chunked_array([pa.array(held, pa.large_binary())])

    def _scans(self) -> dict[bytes, Scan]:
        """What was found in each archive, once; it goes with the source to workers."""
        known: dict[bytes, Scan] | None = self.__dict__.get("_scans_of")
        if known is None:
            paths = self.paths
            with ThreadPoolExecutor(_AT_ONCE) as threads:
                known = dict(zip(paths, threads.map(lambda path: _scan(self.files, path), paths), strict=True))
            object.__setattr__(self, "_scans_of", known)
        return known


def _is_gzipped(path: bytes) -> bool:
    return path.lower().endswith(_ENDINGS)


def _class_of(name: bytes) -> str:
    """The WordNet ID that ends a member's name; empty for none.

    >>> _class_of(b"val/ILSVRC2012_val_00000293_n01440764.JPEG"), _class_of(b"ILSVRC2012_test_00000001.JPEG")
    ('n01440764', '')
    """
    match = _class_in_name(os.path.basename(name))
    return match[1].decode() if match else ""


def _first_member(files: Files, path: bytes) -> bytes:
    """The name of the first member that is no folder, of those in the archive's first bytes; empty for none."""
    try:
        data = zlib.decompressobj(31).decompress(files.read(path, 0, _HEAD_BYTES), _HEAD_BYTES)
    except (OSError, zlib.error):
        return b""
    for at in range(0, len(data) - BLOCK + 1, BLOCK):
        header = read_header_block(data[at : at + BLOCK])
        if header is None or header.flag not in (b"5", b"x", b"g", b"L"):
            return header.path() if header else b""
    return b""


def _opened(file: io.RawIOBase, points: bytes = b"") -> Any:
    try:
        import indexed_gzip
    except ImportError as error:
        raise not_installed("a gzipped tar", error) from None
    archive = indexed_gzip.IndexedGzipFile(fileobj=file, spacing=SPACING_BYTES, buffer_size=_step_bytes())
    if points:
        archive.import_index(fileobj=io.BytesIO(points))
    return archive


def _step_bytes() -> int:
    """What is decompressed at once: of a longer read than between two seek points, none would be kept."""
    return min(_BLOCK_BYTES, SPACING_BYTES // 8)


class _Forward:
    """Reads a gzipped file from its beginning to its end, some of what was read last again, and sums it up."""

    def __init__(self, archive: Any) -> None:
        self._archive, self._kept, self._at = archive, b"", 0  # what was read last, and where that begins
        self.crc, self.size = 0, 0

    def read(self, offset: int, size: int) -> bytes:
        """Some bytes, fewer only at the end."""
        while self._at + len(self._kept) < offset + size and self._more():
            if len(self._kept) > 2 * _BLOCK_BYTES and offset > self._at:
                drop = min(offset - self._at, len(self._kept))
                self._kept, self._at = self._kept[drop:], self._at + drop
        return self._kept[offset - self._at : offset - self._at + size] if offset >= self._at else b""

    def rest(self) -> None:
        """Reads to the end."""
        while self._more():
            self._kept, self._at = b"", self.size

    def _more(self) -> bool:
        data = self._archive.read(_step_bytes())
        self.crc, self.size = zlib.crc32(data, self.crc), self.size + len(data)
        self._kept += data
        return bool(data)


def _scan(files: Files, path: bytes) -> Scan:
    """Lists an archive by decompressing it once; one that is damaged, cut or no tar is an AlexprepError."""
    shown, names, begins, end = files.display(path), [], [], 0
    seen: set[bytes] = set()
    again = "it is damaged or was cut: download it again"
    try:
        with FileView(files, path) as file, _opened(file) as archive:
            stream = _Forward(archive)
            for name, at, size, kind in members(stream.read, None, shown):
                if kind == "file":
                    if name in seen:
                        raise AlexprepError(
                            f"{shown} holds {as_text(name)} twice, which programs read differently: download it again"
                        )
                    seen.add(name)
                    names.append(name)
                    begins.append(end)
                end = at + padded(size)
            stream.rest()
            points = io.BytesIO()
            archive.export_index(fileobj=points)
            places = [place for place, _ in archive.seek_points()]
            file.seek(-8, io.SEEK_END)
            crc, size = np.frombuffer(file.read(8), "<u4").tolist()  # RFC 1952: CRC-32, and the size modulo 2**32
    except OSError as error:
        raise AlexprepError(f"{shown} cannot be decompressed ({error}): {again}") from None
    if (crc, size) != (stream.crc, stream.size % 2**32):
        raise AlexprepError(f"{shown} has another CRC-32 than its end tells: {again}")
    if not names:
        raise AlexprepError(f"{shown} holds no files: download it again")
    between = np.searchsorted(places, begins, "right")
    _, first, groups = np.unique(between, return_index=True, return_inverse=True)
    return Scan(points.getvalue(), [*(begins[n] for n in first.tolist()), end], names, groups.tolist())
