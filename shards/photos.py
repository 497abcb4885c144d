"""Finds photos wherever a user names them, in files, folders, tars or on stdin, and brings each to the form of a dataset's images.

This is what predicting needs of a source: no classes and no splits, only pictures, each converted as `convert` would convert it, in worker
processes, since a file may be hostile.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.dataset_format import FORMATS
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Codec, Converted, Target, read_raw
from alexprep.shards.image_header import Refused
from alexprep.shards.plan import target_in
from alexprep.shards.shard_writer import check_device, open_codec, shared_codec
from alexprep.shards.sources.base import Location
from alexprep.shards.sources.tars import NO_FILE, packed_files
from alexprep.shards.sources.tree import read_tree, rule_of
from alexprep.shards.storage import Files, as_text, files_at, local_path
from alexprep.shards.worker_pool import Engine, LocalEngine, attending, cores, limit_memory, reading

STDIN = "-"
_PIXELS = b"." + FORMATS["raw"].encode()  # the ending of members that hold pixels, in shards of ours
_CHUNK = 32  # photos that a worker is handed at a time


@dataclass(frozen=True)
class Photo:
    """One picture: what it is called, and where it lies or what it holds."""

    name: str
    files: Files | None = None
    location: Location | None = None
    held: bytes | NDArray[np.uint8] | None = (
        None  # its bytes, or its pixels (H, W, 3) or (H, W), where it lies in no file
    )

    def read(self) -> bytes | NDArray[np.uint8] | Refused:
        """Its encoded bytes or its pixels; OSError where they cannot be had."""
        if self.held is not None:
            return self.held
        assert self.files is not None and self.location is not None
        if self.location.offset == NO_FILE:
            raise OSError("a link or special file in an archive")
        data = self.files.read(self.location.path, self.location.offset, self.location.size)
        if 0 <= self.location.size != len(data):
            raise OSError("the archive is shorter than it was when it was listed")
        if not self.location.member.lower().endswith(_PIXELS):
            return data
        pixels = read_raw(data)
        if pixels is None or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            return Refused("no .npy of uint8 pixels (height, width, 3)")
        return pixels


class ConvertedPhoto(NamedTuple):
    """What became of a photo: its place in the list, its name, and its bytes in the target form or why there are none."""

    number: int
    name: str
    result: Converted | Refused


def find_photos(places: Iterable[str | Path | bytes | NDArray[np.uint8]]) -> list[Photo]:
    """Lists the photos that some places stand for, in the order in which these are named.

    Args:
        places: paths or URLs of files, of tars (their members, shards of `--format raw` included), and of folders (the pictures below
            them, by name); "-" for one picture on stdin; encoded pictures as bytes; or pixels, uint8 (H, W, 3) RGB or (H, W) grey.

    Raises:
        AlexprepError: a place does not exist or holds no picture, or a tar is damaged.
    """
    found: list[Photo] = []
    for place in places:
        if isinstance(place, bytes | np.ndarray):
            found.append(Photo(f"picture {len(found) + 1}", held=_checked(place)))
        elif str(place) == STDIN:
            found.append(Photo("stdin", held=sys.stdin.buffer.read()))
        else:
            found += _photos_at(str(place))
    if not found:
        raise AlexprepError("no photo is named: name files, folders or tars, or - for stdin")
    return found


def target_of(dataset: Mapping[str, Any]) -> Target:
    """The form of a dataset's images as its dataset.json records it. What has it already is kept as it is."""
    return replace(target_in({**dataset.get("options", {}), **dataset["image"]}), reencode="needed")


def convert_photos(photos: Sequence[Photo], target: Target, engine: Engine | None = None) -> Iterator[ConvertedPhoto]:
    """Brings photos to the target form, in worker processes of this machine unless another engine is given; in any order.

    Raises AlexprepError where the way to the photos fails, or the target's device is not there.
    """
    check_device(target)
    chunks = [(start, photos[start : start + _CHUNK]) for start in range(0, len(photos), _CHUNK)]
    engine = engine or LocalEngine(min(cores(), len(chunks)) if target.device == "cpu" else 1)
    for converted in engine.run(_ConvertTask(target), chunks, lambda finished: None):
        yield from converted


@dataclass(frozen=True)
class _ConvertTask:
    """What a worker does with a chunk of photos."""

    target: Target

    def __call__(self, chunk: tuple[int, Sequence[Photo]], condemned: Mapping[int, str]) -> list[ConvertedPhoto]:
        start, photos = chunk
        codec: Codec = shared_codec(open_codec, self.target)
        if self.target.device == "cpu":
            limit_memory()
        done = []
        for number, photo in enumerate(photos, start):
            with attending(number):
                refused = Refused(condemned[number]) if number in condemned else None
                done.append(ConvertedPhoto(number, photo.name, refused or _converted(photo, codec)))
        return done


def _converted(photo: Photo, codec: Codec) -> Converted | Refused:
    try:
        with reading(photo.name):
            data = photo.read()
    except OSError as error:
        return Refused(f"cannot be read: {error.strerror or error}")
    except MemoryError:
        return Refused("cannot be read: needs more memory than a worker may have")
    return data if isinstance(data, Refused) else codec.convert_many([data])[0]


def _photos_at(place: str) -> list[Photo]:
    path = local_path(place)
    if path is not None and not os.path.exists(path):
        raise AlexprepError(f"{place} does not exist: name photos, folders or tars, or - for stdin")
    files, name = files_at(place)
    if not name:
        paths = list(read_tree(files).root.paths())
        if not paths:
            raise AlexprepError(f"{place} holds no pictures: name a folder that does, or the tars in it one by one")
        return [Photo(files.display(each), files, Location(each)) for each in paths]
    if not name.lower().endswith(b".tar"):
        return [Photo(place, files, Location(name))]
    members = [
        each for each in packed_files(files, name) if rule_of(each.member) is None or each.member.endswith(_PIXELS)
    ]
    # In a webdataset the label's member has an ending of its own, which says nothing of pictures elsewhere.
    members = [each for each in members if not each.member.endswith(b".cls")]
    if not members:
        raise AlexprepError(f"{place} holds no pictures: name another tar")
    return [Photo(f"{place}/{as_text(each.member)}", files, each) for each in members]


def _checked(held: bytes | NDArray[Any]) -> bytes | NDArray[np.uint8]:
    if isinstance(held, np.ndarray) and (
        held.dtype != np.uint8 or not held.size or held.ndim not in (2, 3) or (held.ndim == 3 and held.shape[2] != 3)
    ):
        raise AlexprepError(
            f"pixels are {held.dtype} of shape {held.shape}: give uint8 (height, width, 3) RGB, or (height, width) grey"
        )
    return held
