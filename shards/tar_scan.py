"""The index of one tar of somebody else's webdataset: where its images lie, how large they are, what their labels say."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.dali_index import packed_by_index
from alexprep.shards.dataset_format import INDEX_DTYPE
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_header import read_header
from alexprep.shards.opinion import Refused
from alexprep.shards.sources.archive import Packed, packed_files
from alexprep.shards.sources.files import MAX_FILE_BYTES, LocalFiles
from alexprep.shards.sources.samples import BadSampleError, Sample, image_of, label_of, samples_of

# A record of `layout.INDEX_DTYPE` and the size of the stored pixels, EXIF orientation not applied.
TAR_INDEX_DTYPE = np.dtype([*INDEX_DTYPE.descr, ("height", "<u4"), ("width", "<u4")])


class Part(NamedTuple):
    """What one shard holds.

    Attributes:
        records: (samples,) of `TAR_INDEX_DTYPE`, in the order of the tar; shard is 0, label a position in `labels`.
        labels: numbers without leading zeros, or names; there may be more than occur in `records`.
        bad: (key, reason) of the samples that cannot be used; reasons complete the sentence "sample KEY …".
        warning: what was odd about the shard's .idx file; empty for nothing.
    """

    records: NDArray[np.void]
    labels: list[str]
    bad: list[tuple[str, str]]
    warning: str = ""


def scan(path: Path) -> Part:
    """Indexes one tar: reads its headers, its labels and the first bytes of its images.

    Where NAME.idx of DALI lies beside it and fits, the headers of extensions and of folders are passed over.

    Raises:
        AlexprepError: the tar is damaged or cannot be read; names it and the byte.
    """
    files, name = LocalFiles(os.fsencode(path.parent)), os.fsencode(path.name)
    rows: list[tuple[int, ...]] = []
    codes: dict[str, int] = {}
    bad: list[tuple[str, str]] = []
    try:
        with files.reading(name) as read:
            listed, warning = _by_index(files, name, read)
            for sample in samples_of(packed_files(files, name) if listed is None else listed):
                try:
                    offset, size, height, width, label = _record(sample, read)
                except BadSampleError as error:
                    reason = sample.problem or f"has {error}"
                    bad.append((sample.key.decode("utf-8", "backslashreplace"), reason))
                else:
                    rows.append((0, offset, size, codes.setdefault(label, len(codes)), height, width))
    except OSError as error:
        raise AlexprepError(f"{path} cannot be read ({error}): see to the disk, then run the same again") from None
    return Part(np.array(rows, TAR_INDEX_DTYPE), list(codes), bad, warning)


def _by_index(files: LocalFiles, name: bytes, read: Callable[[int, int], bytes]) -> tuple[list[Packed] | None, str]:
    """The members by DALI's index, None where there is none that fits; and a warning where it does not fit."""
    index = name.removesuffix(b".tar") + b".idx"
    try:
        return packed_by_index(files.read(index), read, name), ""
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        shown = files.display(index)
        return (
            None,
            f"{shown} does not fit its tar ({error}): the tar itself was read; make the index anew or delete it",
        )


def _record(sample: Sample, read: Callable[[int, int], bytes]) -> tuple[int, int, int, int, str]:
    """Offset, size, height and width of the image, and the label; BadSampleError where one of them cannot be had."""
    if sample.problem:
        raise BadSampleError(sample.problem)
    _, _, offset, size = image_of(sample)
    label = label_of(sample, read)
    if offset < 0:
        raise BadSampleError("a link or special file as its image: expected a file")
    if size > MAX_FILE_BYTES:
        raise BadSampleError(f"an image of {size:,} bytes: the limit is {MAX_FILE_BYTES:,}")
    header = read_header(read, offset, size)
    if isinstance(header, Refused):
        raise BadSampleError(f"an image that cannot be used: {header.reason}")
    return offset, size, header.height, header.width, label
