"""Indexes other people's webdataset tars, for random access: where each image lies, how large it is, and its label.

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

Each tar is scanned once: its index is kept in a cache file until the tar changes. Our own data sets have their index.npy, see
`dataset_format`; the bytes of samples are read by `reader`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.dataset_format import INDEX_DTYPE, TAR_INDEXES
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_header import Refused, read_header
from alexprep.shards.sources.base import Location
from alexprep.shards.sources.tars import PackedFile, packed_files, plain_name
from alexprep.shards.sources.wds import (
    BadSampleError,
    Sample,
    braces,
    class_names,
    image_of,
    label_of,
    recorded_classes,
    samples_of,
    shards_below,
)
from alexprep.shards.storage import MAX_FILE_BYTES, LocalFiles, as_text, json_bytes, published, user_cache
from alexprep.shards.tar_format import BLOCK, ReadAt, number_of_bytes, padded, read_header_block
from alexprep.shards.worker_pool import Engine, InProcessEngine, as_engine, cores

# A record of `dataset_format.INDEX_DTYPE` and the size of the stored pixels, EXIF orientation not applied.
TAR_INDEX_DTYPE = np.dtype([*INDEX_DTYPE.descr, ("height", "<u4"), ("width", "<u4")])
WAIT_SECONDS = 3600.0  # for another process that scans the same folder
_POLL_SECONDS = 0.1
_FEW_BYTES = 2**28  # of shards are scanned before worker processes have started (0.5 s)
_CACHE_VERSION = 2
_log = logging.getLogger("alexprep")


class UnusableSample(NamedTuple):
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
    bad: tuple[UnusableSample, ...]
    digest: str


class ShardIndex(NamedTuple):
    """The samples of one shard, or of several whose indexes were merged.

    Attributes:
        records: (samples,) of `TAR_INDEX_DTYPE`, in the order of the tars; label is a position in `labels`.
        labels: numbers without leading zeros, or names; there may be more than occur in `records`.
        bad: (number of the shard, key, reason) of the samples that cannot be used.
        warning: what was odd about the shard's .idx file; empty for nothing.
    """

    records: NDArray[np.void]
    labels: list[str]
    bad: list[tuple[int, str, str]]
    warning: str = ""


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
            the user's cache folder.
        engine: scans the shards, one task each; a number stands for so many worker processes, None for one a core. One shard
            or few bytes are scanned in this process.
        progress: called with (shards that are indexed, all shards).

    Raises:
        AlexprepError: there is no such shard, or one is damaged (the byte is named); numbers and names are mixed as labels;
            no sample can be used; `cache` cannot be written; another process scans for longer than `WAIT_SECONDS`.
    """
    paths, names = _find_shards(source, split)
    folders: dict[Path, list[str]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path.name)
    known: dict[Path, CachedIndex] = {}
    for folder, members in folders.items():
        listed = len(known) + len(members)
        scan = functools.partial(_scan_all, folder, engine, lambda left: progress(listed - left, len(paths)))  # noqa: B023  (called in its own turn)
        known |= {folder / name: entry for name, entry in cached_indexes(folder, members, cache, scan).items()}
    progress(len(paths), len(paths))
    return _with_numbered_labels(paths, [known[path] for path in paths], names)


def _find_shards(source: str | Path | Sequence[str | Path], split: str) -> tuple[list[Path], tuple[str, ...]]:
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
            texts = [os.fsencode(place)] if os.path.exists(place) else braces(os.fsencode(place))
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
    any_told = any(name for name, _ in told)
    chosen = [path for name, path in told if not any_told or (name or "train") == split]
    if not chosen:
        others = ", ".join(sorted({name or "train" for name, _ in told}))
        raise AlexprepError(
            f"{files.display()} has no shard of the split {split!r}: looked for .tar files there and in its folders "
            f"train, val and test" + (f"; there are some of {others}" if others else "")
        )
    return chosen


def _scan_all(
    folder: Path, engine: Engine | int | None, progress: Callable[[int], None], states: Mapping[str, FileState]
) -> Iterator[tuple[str, ShardIndex]]:
    """The indexes of some tars of a folder, as they come; `progress` is told how many are left."""
    if engine is None or isinstance(engine, int):
        workers = cores() if engine is None else engine
        few = len(states) == 1 or sum(state.size for state in states.values()) < _FEW_BYTES or workers == 1
        engine = InProcessEngine() if few else as_engine(workers)
    left = len(states)
    for name, index in engine.run(_scan_task, [folder / name for name in states], lambda finished: None):
        if index.warning:  # a worker's own log would go nowhere
            _log.warning("%s", index.warning)
        left -= 1
        progress(left)
        yield name, index


def _scan_task(path: Path, condemned: Mapping[int, str]) -> tuple[str, ShardIndex]:
    # Nothing is ever condemned: no decoder runs here, so no image can end the process.
    return path.name, scan_tar(path)


def _with_numbered_labels(paths: list[Path], known: list[CachedIndex], names: tuple[str, ...]) -> TarIndex:
    """The shards' indexes as one, with class numbers in place of the labels' texts."""
    merged = merge([entry.shard for entry in known])
    records = merged.records
    bad = [(number, UnusableSample(paths[number], key, reason)) for number, key, reason in merged.bad]
    used = [merged.labels[code] for code in np.unique(records["label"])]
    classes = class_names(set(used), names, str(paths[0].parent))
    position = {name: label for label, name in reversed([*enumerate(classes)])}
    numbers = {
        text: int(text) if text.isdecimal() and int(text) < len(classes) else position.get(text, -1) for text in used
    }
    records["label"] = np.array([numbers.get(text, -1) for text in merged.labels] or [-1], np.int32)[records["label"]]
    strange = records["label"] < 0
    for shard, offset in records[strange][["shard", "offset"]].tolist():
        reason = f"has a label that is none of the {len(classes):,} classes of the dataset.json beside the shards"
        bad.append((shard, UnusableSample(paths[shard], f"with its image at byte {offset:,}", reason)))
    records = records[~strange]
    bad.sort(key=lambda entry: entry[0])
    if not len(records):
        why = f"for example {bad[0][1]}" if bad else "they are empty"
        raise AlexprepError(f"no sample can be used of {len(paths):,} shards, {paths[0]} being the first; {why}")
    sizes = [(path.name, entry.state.size) for path, entry in zip(paths, known, strict=True)]
    digest = hashlib.sha256(json_bytes([*sizes, classes]) + records.tobytes())
    return TarIndex(tuple(paths), records, classes, tuple(entry for _, entry in bad), digest.hexdigest())


def merge(indexes: Sequence[ShardIndex]) -> ShardIndex:
    """One index of several shards, whose positions become the shards' numbers."""
    records = np.concatenate([np.empty(0, TAR_INDEX_DTYPE), *(index.records for index in indexes)])
    codes: dict[str, int] = {}
    lookups: dict[int, NDArray[np.int32]] = {}  # by table of labels: those of one cache file share theirs
    begin = 0
    for number, index in enumerate(indexes):
        if id(index.labels) not in lookups:
            own = [codes.setdefault(label, len(codes)) for label in index.labels]
            lookups[id(index.labels)] = np.array(own, np.int32)
        part = records[begin : begin + len(index.records)]
        part["shard"] = number
        part["label"] = lookups[id(index.labels)][part["label"]]
        begin += len(part)
    bad = [(number, key, reason) for number, index in enumerate(indexes) for _, key, reason in index.bad]
    return ShardIndex(records, list(codes), bad)


# Scanning one tar


def scan_tar(path: Path) -> ShardIndex:
    """Indexes one tar: reads its headers, its labels and the first bytes of its images.

    Where NAME.idx of DALI lies beside it and fits, the headers of extensions and of folders are passed over.

    Raises:
        AlexprepError: the tar is damaged or cannot be read; names it and the byte.
    """
    files, name = LocalFiles(os.fsencode(path.parent)), os.fsencode(path.name)
    rows: list[tuple[int, ...]] = []
    codes: dict[str, int] = {}
    bad: list[tuple[int, str, str]] = []
    try:
        with files.reading(name) as read:
            listed, warning = _files_by_dali_index(files, name, read)
            for sample in samples_of(packed_files(files, name) if listed is None else listed):
                try:
                    offset, size, height, width, label = _examine(sample, read)
                except BadSampleError as error:
                    bad.append((0, as_text(sample.key), str(error)))
                else:
                    rows.append((0, offset, size, codes.setdefault(label, len(codes)), height, width))
    except OSError as error:
        raise AlexprepError(f"{path} cannot be read ({error}): see to the disk, then run the same again") from None
    return ShardIndex(np.array(rows, TAR_INDEX_DTYPE), list(codes), bad, warning)


def _examine(sample: Sample, read: ReadAt) -> tuple[int, int, int, int, str]:
    """Offset, size, height and width of the image, and the label; BadSampleError where one of them cannot be had."""
    _, _, offset, size = image_of(sample)
    label = label_of(sample, read)
    if offset < 0:
        raise BadSampleError("has a link or special file as its image: expected a file")
    if size > MAX_FILE_BYTES:
        raise BadSampleError(f"has an image of {size:,} bytes: the limit is {MAX_FILE_BYTES:,}")
    header = read_header(read, offset, size)
    if isinstance(header, Refused):
        raise BadSampleError(f"has an image that cannot be used: {header.reason}")
    return offset, size, header.height, header.width, label


def _files_by_dali_index(files: LocalFiles, name: bytes, read: ReadAt) -> tuple[list[PackedFile] | None, str]:
    """The files by DALI's index, None where there is none that fits; and a warning where it does not fit."""
    index = name.removesuffix(b".tar") + b".idx"
    try:
        return read_dali_index(files.read(index), read, name), ""
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, (
            f"{files.display(index)} does not fit its tar ({error}): the tar itself was read; make the index anew or delete it"
        )


# DALI's index of a tar (`wds2idx`)


_FIELDS = {"v1.1": 3, "v1.2": 4}
_MOST_BETWEEN = 16_384  # bytes of headers before a member's own: a pax header, a long name, a folder
_BESIDES = b"xLK5"  # types of headers that are no member for DALI: extensions and folders
_NOT_PLAIN = (b" size=", b" GNU.sparse.")  # in a pax header: the data are not what the header itself says


def read_dali_index(index: bytes, read: ReadAt, path: bytes) -> list[PackedFile]:
    """The files of a tar by its DALI index, as `packed_files` would list them.

    Every listed member must have a header with a right checksum, its name and its size; nothing but extension headers and
    folders may lie between two members; and the end of the archive must follow the last one.

    Args:
        index: the content of the .idx file.
        read: (offset, size) → those bytes of the tar.
        path: of the tar, for the locations.

    Raises:
        ValueError: the index is damaged, stale, of another version, or has no place for what the tar holds; says which.
    """
    lines = index.decode("utf-8", "surrogateescape").splitlines()
    version, count = (lines[0].split() if lines else []) or ("", "")
    if version not in _FIELDS:
        raise ValueError(f"version {version[:20]!r} is none of {', '.join(_FIELDS)}")
    if int(count) != len(lines) - 1:
        raise ValueError(f"it announces {count} samples and has {len(lines) - 1:,}")
    step = _FIELDS[version]
    found: list[PackedFile] = []
    end = 0
    for number, line in enumerate(lines[1:], 2):
        fields = line.split(" ")
        if len(fields) % step:
            raise ValueError(f"line {number} has {len(fields)} fields, no multiple of {step}")
        for at in range(0, len(fields), step):
            offset, size = int(fields[at + 1]), int(fields[at + 2])
            given = fields[at + 3].encode("utf-8", "surrogateescape") if step == 4 else b""
            name = _checked_name(read(end, offset - end) if 0 < offset - end <= _MOST_BETWEEN else b"", size, given)
            if name is None or not name.lower().endswith(fields[at].encode("utf-8", "surrogateescape").lower()):
                raise ValueError(f"line {number} does not tell what the tar has at byte {offset:,}")
            end = offset + padded(size)
            if clean := plain_name(name):
                found.append(PackedFile(clean, Location(path, clean, offset, size)))
    if read(end, BLOCK) != bytes(BLOCK):
        raise ValueError(f"the tar goes on, or is cut, at byte {end:,}, where the last member ends")
    return found


def _checked_name(headers: bytes, size: int, given: bytes) -> bytes | None:
    """The name of a member by the headers before its data; None where they are not those of a member of that size.

    Args:
        headers: all between the member before and the data.
        size: of the data, bytes.
        given: the name by the index; empty for none.
    """
    at, renamed = 0, False
    while True:
        header = read_header_block(headers[at : at + BLOCK]) if at + BLOCK <= len(headers) else None
        length = number_of_bytes(header.size) if header else None
        if header is None or length is None:
            return None
        if at + BLOCK == len(headers):  # the member's own
            break
        if header.flag not in _BESIDES:
            return None
        renamed |= header.flag == b"L"
        at += BLOCK + padded(length)
    stored, extended = header.path(), headers[:at]
    if header.flag not in b"0\0" or length != size or any(word in extended for word in _NOT_PLAIN):
        return None
    if given:
        return given if given == stored or given in extended else None
    return None if renamed or b" path=" in extended else stored


# The cache: one file for the tars of a folder, numpy's .npz with a checksum, never a pickle


class FileState(NamedTuple):
    """What tells that a file is still the same: bytes, and nanoseconds.

    Tars of equal size are common, and copying tools set the time of modification; that of the last change they cannot set.
    """

    size: int
    mtime_ns: int
    ctime_ns: int


class CachedIndex(NamedTuple):
    """The index of one tar and the state of the tar that it describes."""

    state: FileState
    shard: ShardIndex


ScanAll = Callable[[Mapping[str, FileState]], Iterator[tuple[str, ShardIndex]]]


def cached_indexes(folder: Path, names: Sequence[str], cache: Path | None, scan: ScanAll) -> dict[str, CachedIndex]:
    """The indexes of some tars of one folder, of which only those are scanned that are new or changed.

    What was scanned before an error is kept too. Of several processes one scans, and the others wait for it.

    Args:
        folder: of the tars, absolute.
        names: of the tars.
        cache: a folder for the file, in place of the usual ones.
        scan: called with the tars to be scanned; yields (name, index) in any order.

    Raises:
        AlexprepError: from `scan`; a tar is missing; `cache` cannot be written; another process scans the folder for longer
            than `WAIT_SECONDS`.
    """
    places = _cache_files(folder, cache)
    found, missing = _look_up(folder, names, places)
    if not missing:
        return found
    with _locked(places, explicit=cache is not None) as place:
        found, missing = _look_up(folder, names, places)  # by now another process may have scanned them
        if not missing:
            return found
        try:
            for name, index in scan(missing):
                found[name] = CachedIndex(missing[name], index)
        finally:
            if place is not None and found.keys() & missing.keys():
                _save(place, folder, found)
    return found


def _cache_files(folder: Path, cache: Path | None) -> list[Path]:
    """Where the index of a folder may lie, in order of preference."""
    name = f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]}.npz"
    if cache is not None:
        return [cache / name]
    user = user_cache()
    return [folder / TAR_INDEXES / "tars.npz", *([user / name] if user else [])]


def _look_up(
    folder: Path, names: Sequence[str], places: list[Path]
) -> tuple[dict[str, CachedIndex], dict[str, FileState]]:
    """What is kept of tars that are as they were, and the state of the others."""
    states = {name: _state(folder / name) for name in names}
    found: dict[str, CachedIndex] = {}
    for place in places:
        if len(found) < len(states):
            found |= {name: entry for name, entry in _load(place).items() if states.get(name) == entry.state}
    return found, {name: state for name, state in states.items() if name not in found}


def _state(path: Path) -> FileState:
    try:
        status = path.stat()
    except OSError as error:
        raise AlexprepError(f"{path} cannot be read ({error.strerror}): name shards that are there") from None
    if not stat.S_ISREG(status.st_mode):
        raise AlexprepError(f"{path} is no regular file: name shards that are files")
    return FileState(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _load(place: Path) -> dict[str, CachedIndex]:
    """What a cache file holds, by name; nothing where there is no such file, or a damaged one."""
    try:
        # zipfile compares a checksum once a member is read to its end, which the lengths below make sure of.
        with open(place, "rb") as file, np.load(file, allow_pickle=False) as content:
            records, document = content["records"], json.loads(content["document"].tobytes())
        if document["version"] != _CACHE_VERSION:
            return {}
        shards, labels = document["shards"], document["labels"]
        ends = np.cumsum([0, *(shard[-1] for shard in shards)])
        if records.dtype != TAR_INDEX_DTYPE or records.shape != (ends[-1],):
            raise ValueError(f"{records.dtype} of shape {records.shape}")
        bad: list[list[tuple[int, str, str]]] = [[] for _ in shards]
        for number, key, reason in document["bad"]:
            bad[number].append((0, key, reason))
        return {
            name: CachedIndex(FileState(*state), ShardIndex(records[ends[n] : ends[n + 1]], labels, bad[n]))
            for n, (name, *state, _) in enumerate(shards)
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except Exception as error:  # noqa: BLE001  (a damaged file makes zipfile and numpy raise many kinds)
        _log.info("%s is of no use (%s: %s): the shards are scanned again", place, type(error).__name__, error)
        return {}


def _save(place: Path, folder: Path, found: dict[str, CachedIndex]) -> None:
    """Writes `found` and what else a file keeps of tars that are still as they were; a failure costs time only."""
    everything = dict(found)
    for name, entry in _load(place).items():
        with contextlib.suppress(AlexprepError):
            if name not in found and _state(folder / name) == entry.state:
                everything[name] = entry
    everything = dict(sorted(everything.items()))
    merged = merge([entry.shard for entry in everything.values()])
    shards = [(name, *entry.state, len(entry.shard.records)) for name, entry in everything.items()]
    document = {"version": _CACHE_VERSION, "shards": shards, "labels": merged.labels, "bad": merged.bad}
    try:
        with published(place) as file:
            np.savez(file, records=merged.records, document=np.frombuffer(json_bytes(document, None), np.uint8))
    except OSError as error:
        _log.warning("%s cannot be written (%s): the shards will be scanned again next time", place, error)


@contextlib.contextmanager
def _locked(places: list[Path], explicit: bool) -> Iterator[Path | None]:
    """Yields the first of `places` that can be written, None for none, while no other process has it."""
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            lock = open(place.with_suffix(".lock"), "ab")  # noqa: SIM115
            break
        except OSError as error:
            if explicit:
                raise AlexprepError(
                    f"{place.parent} cannot be written ({error.strerror}): name another folder"
                ) from None
    else:
        _log.warning("no place to keep the index in (tried %s): set XDG_CACHE_HOME", ", ".join(map(str, places)))
        yield None
        return
    with lock:
        _wait_for(lock.fileno(), Path(lock.name))
        yield place


def _wait_for(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise AlexprepError(
                    f"another process has been scanning the shards for more than {WAIT_SECONDS:g} s (it holds {path}): "
                    "wait for it or end it, then run the same again"
                ) from None
            time.sleep(_POLL_SECONDS)
        except OSError:  # no locks on this file system: each scans for itself
            return
