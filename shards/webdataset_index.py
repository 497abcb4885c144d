"""Random access to other people's webdataset tars: where each image lies, how large it is, and its label.

Rules:
  * Shards are .tar files on a local disk, in the order of SOURCE: a folder's by name, a pattern's as it expands.
  * A sample is a run of neighbouring members with the same name up to the first dot of the file name. Its image is the one
    member with an image extension; its label is .cls, .class, .label, .index, or a field of .json, in this order.
  * Labels that are numbers stay what they are, and the classes are "0" to the largest. Labels that are names are sorted and
    numbered. Both at once are an error. The dataset.json of `alexprep shard` gives the class names.
  * What cannot be used is left out and listed with the reason: no image or label, two of one, a label that makes no sense,
    an image that is empty, too large, of another type than JPEG, PNG, WebP, BMP or PNM, or whose header cannot be read, and
    what comes of a key that was there before. A sample that is listed may still prove damaged when it is decoded.
  * A damaged tar is an error: nothing of it is used.
  * DALI's .idx saves time where it fits the tar in every member; else there is a warning, and the tar itself is read. It never
    adds or takes a sample.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.shards.index_cache import Kept, Stamp, kept_parts, merged
from alexprep.shards.sources.files import LocalFiles
from alexprep.shards.sources.samples import class_names
from alexprep.shards.sources.wds import braces, recorded_classes, shards_below
from alexprep.shards.storage import json_bytes
from alexprep.shards.tar_scan import TAR_INDEX_DTYPE, Part, scan
from alexprep.shards.worker_pool import Engine, InProcessEngine, as_engine, cores

__all__ = ["TAR_INDEX_DTYPE", "Bad", "TarIndex", "index_tars"]

# Fewer bytes of shards are scanned before worker processes have started (0.5 s).
_ALONE_BYTES = 2**28
_log = logging.getLogger("alexprep")


class Bad(NamedTuple):
    """A sample that cannot be used: its shard, its key, and why, as the end of the sentence "sample KEY …"."""

    shard: Path
    key: str
    reason: str

    def __str__(self) -> str:
        """The whole sentence."""
        return f"{self.shard}: sample {self.key} {self.reason}"


@dataclass(frozen=True)
class TarIndex:
    """The samples of a set of shards.

    Attributes:
        paths: the shards, absolute, by number.
        records: (samples,) of `TAR_INDEX_DTYPE`, in the order of the shards and, within one, of the tar. Height and width are
            those of the stored pixels: EXIF orientation is not applied.
        classes: the class names by label.
        bad: the samples that are left out.
        digest: hex sha256 over the shards' names and sizes, the classes and the records; no byte of the images is in it.
    """

    paths: tuple[Path, ...]
    records: NDArray[np.void]
    classes: list[str]
    bad: tuple[Bad, ...]
    digest: str


def index_tars(
    source: str | Path | Sequence[str | Path],
    split: str = "train",
    *,
    cache: Path | None = None,
    engine: Engine | int | None = None,
    progress: Callable[[int, int], None] = lambda finished, total: None,
) -> TarIndex:
    """The index of other people's shards, by one scan of those that are new or changed since the last call.

    Args:
        source: a folder of tars, a tar, a brace pattern such as "train-{0000..0127}.tar", or a sequence of these.
        split: which shards of a folder are meant, where their names or its subfolders tell splits; else all are.
        cache: where the index is kept; None for the folder `.alexprep` beside the shards or, where that cannot be written,
            the user's cache folder. See `index_cache`.
        engine: scans the shards, one task each; a number stands for so many worker processes, None for one a core. One shard
            or few bytes are scanned in this process.
        progress: called with (shards that are indexed, all shards).

    Raises:
        AlexprepError: there is no such shard, or one is damaged (the byte is named); numbers and names are mixed as labels;
            no sample can be used; or see `index_cache.kept_parts`.
    """
    paths, names = _found(source, split)
    folders: dict[Path, list[str]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path.name)
    kept: dict[Path, Kept] = {}
    for folder, members in folders.items():
        known = len(kept) + len(members)
        new = functools.partial(_scanned, folder, engine, lambda left: progress(known - left, len(paths)))  # noqa: B023  (called in its own turn)
        kept |= {folder / name: entry for name, entry in kept_parts(folder, members, cache, new).items()}
    progress(len(paths), len(paths))
    return _finished(paths, [kept[path] for path in paths], names)


def _scanned(
    folder: Path, engine: Engine | int | None, progress: Callable[[int], None], stamps: Mapping[str, Stamp]
) -> Iterator[tuple[str, Part]]:
    """The indexes of some tars of a folder, as they come; `progress` is told how many are left."""
    chosen = _engine(engine, [stamp.size for stamp in stamps.values()])
    left = len(stamps)
    for name, part in chosen.run(_task, [folder / name for name in stamps], lambda finished: None):
        if part.warning:  # a worker's own log would go nowhere
            _log.warning("%s", part.warning)
        left -= 1
        progress(left)
        yield name, part


def _task(path: Path, condemned: Mapping[int, str]) -> tuple[str, Part]:
    # Nothing is ever condemned: no decoder runs here, so no image can end the process.
    return path.name, scan(path)


def _engine(engine: Engine | int | None, sizes: list[int]) -> Engine:
    if engine is not None and not isinstance(engine, int):
        return engine
    workers = cores() if engine is None else engine
    few = len(sizes) == 1 or sum(sizes) < _ALONE_BYTES or workers == 1
    return InProcessEngine() if few else as_engine(workers)


def _finished(paths: list[Path], kept: list[Kept], names: tuple[str, ...]) -> TarIndex:
    """The parts as one, with labels for texts."""
    whole = merged([part for _, part in kept])
    records, bad = whole.records, [(number, Bad(paths[number], key, reason)) for number, key, reason in whole.bad]
    used = [whole.labels[code] for code in np.unique(records["label"])]
    classes = class_names(set(used), names, str(paths[0].parent))
    position = {name: label for label, name in reversed([*enumerate(classes)])}
    numbers = {
        text: int(text) if text.isdecimal() and int(text) < len(classes) else position.get(text, -1) for text in used
    }
    records["label"] = np.array([numbers.get(text, -1) for text in whole.labels] or [-1], np.int32)[records["label"]]
    strange = records["label"] < 0
    for shard, offset in records[strange][["shard", "offset"]].tolist():
        reason = f"has a label that is none of the {len(classes):,} classes of the dataset.json beside the shards"
        bad.append((shard, Bad(paths[shard], f"with its image at byte {offset:,}", reason)))
    records = records[~strange]
    bad.sort(key=lambda entry: entry[0])
    if not len(records):
        why = f"for example {bad[0][1]}" if bad else "they are empty"
        raise AlexprepError(f"no sample can be used of {len(paths):,} shards, {paths[0]} being the first; {why}")
    digest = hashlib.sha256(
        json_bytes([*((path.name, entry.stamp.size) for path, entry in zip(paths, kept, strict=True)), classes])
    )
    digest.update(records.tobytes())
    return TarIndex(tuple(paths), records, classes, tuple(entry for _, entry in bad), digest.hexdigest())


def _found(source: str | Path | Sequence[str | Path], split: str) -> tuple[list[Path], tuple[str, ...]]:
    """The shards in their order, and the class names of a dataset.json beside them, if there is one."""
    paths: list[Path] = []
    named: set[tuple[str, ...]] = set()
    for place in [source] if isinstance(source, str | Path) else source:
        if "://" in str(place):
            raise AlexprepError(
                f"{place} is a URL: shards are read at random and must lie on a disk; copy them, or make a data set of "
                "them with `alexprep shard`"
            )
        if os.path.isdir(place):
            files = LocalFiles(os.path.realpath(os.fsencode(place)))
            paths += [Path(os.fsdecode(os.path.join(files.root, path))) for path in _of_split(files, split)]
            named |= {recorded_classes(files) or ()} - {()}
        else:
            there = os.path.exists(place)
            texts = [os.fsencode(place)] if there else braces(os.fsencode(place))
            paths += [
                Path(os.path.realpath(os.path.dirname(text))) / os.path.basename(text)
                for text in map(os.fsdecode, texts)
            ]
    if not paths:
        raise AlexprepError(f"SOURCE {source} names no shard")
    for path in paths:
        if path.suffix != ".tar":
            raise AlexprepError(f"{path} is no .tar: expected a folder of tars, a tar, or a brace pattern of tars")
    if len(set(paths)) != len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise AlexprepError(f"{twice} is named twice: name each shard once")
    if len(named) > 1:
        raise AlexprepError("the dataset.json of one folder names other classes than that of another: use them apart")
    return paths, named.pop() if named else ()


def _of_split(files: LocalFiles, split: str) -> list[bytes]:
    """The shards of a folder, all of them where nothing tells a split; as `wds.Webdataset`, without a word "train"."""
    told = sorted(shards_below(files), key=lambda entry: entry[1])
    chosen = (
        [path for name, path in told if (name or "train") == split]
        if any(name for name, _ in told)
        else [path for _, path in told]
    )
    if not chosen:
        others = ", ".join(sorted({name or "train" for name, _ in told}))
        raise AlexprepError(
            f"{files.display()} has no shard of the split {split!r}: looked for .tar files there and in its folders "
            f"train, val and test" + (f"; there are some of {others}" if others else "")
        )
    return chosen
