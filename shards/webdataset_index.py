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
from alexprep.shards.sources.tars import Packed, packed_files, shown_name
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
from alexprep.shards.storage import MAX_FILE_BYTES, LocalFiles, json_bytes, published, user_cache
from alexprep.shards.tar_format import BLOCK, number_of_bytes, padded, read_header_block
from alexprep.shards.worker_pool import Engine, InProcessEngine, as_engine, cores

# -------------------- The members of a tar by DALI's index beside it (`wds2idx`), where that can be shown to fit: a sound tar lists the same without.


_FIELDS = {"v1.1": 3, "v1.2": 4}
_MOST_BETWEEN = 16_384  # bytes of headers before a member's own: a pax header, a long name, a folder
_BESIDES = b"xLK5"  # types of headers that are no member for DALI: extensions and folders
_NOT_PLAIN = (b" size=", b" GNU.sparse.")  # in a pax header: the data are not what the header itself says


def packed_by_index(index: bytes, read: Callable[[int, int], bytes], path: bytes) -> list[Packed]:
    """What `packed_files` would list, by the index: each member's header is read, but no header of another kind.

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
    found: list[Packed] = []
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
            if clean := shown_name(name):
                found.append(Packed(clean, Location(path, clean, offset, size)))
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
    while at < len(headers) - BLOCK:
        before = _read_block(headers[at : at + BLOCK])
        if before is None or before[1] not in _BESIDES:
            return None
        renamed |= before[1] == b"L"
        at += BLOCK + padded(before[2])
    last = _read_block(headers[at:])
    stored, extended = last[0] if last else b"", headers[:at]
    if last is None or last[1] not in b"0\0" or last[2] != size or any(word in extended for word in _NOT_PLAIN):
        return None
    if given:
        return given if given == stored or given in extended else None
    return None if renamed or b" path=" in extended else stored


def _read_block(block: bytes) -> tuple[bytes, bytes, int] | None:
    """Name, type and size by a header whose checksum is right and whose size is a number from 0 up."""
    header = read_header_block(block) if len(block) == BLOCK else None
    length = number_of_bytes(header.size) if header else None
    if header is None or length is None:
        return None
    stored = header.name.rstrip(b"\0")
    folder = header.prefix.partition(b"\0")[0] if header.magic[:6] == b"ustar\0" else b""
    return (folder + b"/" + stored if folder else stored), header.flag, length


# -------------------- The index of one tar of somebody else's webdataset: where its images lie, how large they are, what their labels say.


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


# -------------------- Keeps the indexes of a folder's tars, so that each tar is scanned once; numpy's .npz with a checksum, never a pickle.


WAIT_SECONDS = 3600.0  # for another process that scans the same folder
_POLL_SECONDS = 0.1
_VERSION = 2
_log = logging.getLogger("alexprep")


class Stamp(NamedTuple):
    """What tells that a file is still the same: bytes, and nanoseconds.

    Tars of equal size are common, and copying tools set the time of modification; that of the last change they cannot set.
    """

    size: int
    mtime_ns: int
    ctime_ns: int


class Kept(NamedTuple):
    """The index of one tar and the state of the tar that it describes."""

    stamp: Stamp
    part: Part


Scan = Callable[[Mapping[str, Stamp]], Iterator[tuple[str, Part]]]


def kept_parts(folder: Path, names: Sequence[str], cache: Path | None, scan: Scan) -> dict[str, Kept]:
    """The indexes of some tars of one folder, of which only those are scanned that are new or changed.

    What was scanned before an error is kept too.

    Args:
        folder: of the tars, absolute.
        names: of the tars.
        cache: a folder for the file, in place of the usual ones.
        scan: called with the tars to be scanned; yields (name, index) in any order.

    Raises:
        AlexprepError: from `scan`; a tar is missing; `cache` cannot be written; another process scans the folder for longer
            than `WAIT_SECONDS`.
    """
    places = _places(folder, cache)
    found, missing = _unchanged(folder, names, places)
    if not missing:
        return found
    with _alone(places, explicit=cache is not None) as place:
        found, missing = _unchanged(folder, names, places)  # by now another process may have scanned them
        if not missing:
            return found
        try:
            for name, part in scan(missing):
                found[name] = Kept(missing[name], part)
        finally:
            if place is not None and found.keys() & missing.keys():
                _add(place, folder, found)
    return found


def _places(folder: Path, cache: Path | None) -> list[Path]:
    """Where the index of a folder may lie, in order of preference."""
    name = f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]}.npz"
    if cache is not None:
        return [cache / name]
    user = user_cache()
    return [folder / TAR_INDEXES / "tars.npz", *([user / name] if user else [])]


def _unchanged(folder: Path, names: Sequence[str], places: list[Path]) -> tuple[dict[str, Kept], dict[str, Stamp]]:
    """What is kept of tars that are as they were, and the others."""
    stamps = {name: _stamp(folder / name) for name in names}
    found: dict[str, Kept] = {}
    for place in places:
        if len(found) < len(stamps):
            found |= {name: kept for name, kept in _load(place).items() if stamps.get(name) == kept.stamp}
    return found, {name: stamp for name, stamp in stamps.items() if name not in found}


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise AlexprepError(f"{path} cannot be read ({error.strerror}): name shards that are there") from None
    if not stat.S_ISREG(status.st_mode):
        raise AlexprepError(f"{path} is no regular file: name shards that are files")
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _load(place: Path) -> dict[str, Kept]:
    """What a file keeps, by name; nothing where there is no such file, or a damaged one."""
    try:
        # zipfile compares a checksum once a member is read to its end, which the lengths below make sure of.
        with open(place, "rb") as file, np.load(file, allow_pickle=False) as content:
            records, document = content["records"], json.loads(content["document"].tobytes())
        if document["version"] != _VERSION:
            return {}
        shards, labels = document["shards"], document["labels"]
        ends = np.cumsum([0, *(shard[-1] for shard in shards)])
        if records.dtype != TAR_INDEX_DTYPE or records.shape != (ends[-1],):
            raise ValueError(f"{records.dtype} of shape {records.shape}")
        bad: list[list[tuple[str, str]]] = [[] for _ in shards]
        for number, key, reason in document["bad"]:
            bad[number].append((key, reason))
        return {
            name: Kept(Stamp(*stamp), Part(records[ends[n] : ends[n + 1]], labels, bad[n]))
            for n, (name, *stamp, _) in enumerate(shards)
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except Exception as error:  # noqa: BLE001  (a damaged file makes zipfile and numpy raise many kinds)
        _log.info("%s is of no use (%s: %s): the shards are scanned again", place, type(error).__name__, error)
        return {}


def _add(place: Path, folder: Path, found: dict[str, Kept]) -> None:
    """Writes `found` and what else a file keeps of tars that are still as they were; a failure costs time only."""
    others = {name: kept for name, kept in _load(place).items() if name not in found and _is(folder / name, kept.stamp)}
    everything = dict(sorted((others | found).items()))
    whole = merged([kept.part for kept in everything.values()])
    shards = [(name, *kept.stamp, len(kept.part.records)) for name, kept in everything.items()]
    document = {"version": _VERSION, "shards": shards, "labels": whole.labels, "bad": whole.bad}
    try:
        with published(place) as file:
            np.savez(file, records=whole.records, document=np.frombuffer(json_bytes(document, None), np.uint8))
    except OSError as error:
        _log.warning("%s cannot be written (%s): the shards will be scanned again next time", place, error)


def _is(path: Path, stamp: Stamp) -> bool:
    with contextlib.suppress(AlexprepError):
        return _stamp(path) == stamp
    return False


class Whole(NamedTuple):
    """The indexes of several shards as one: as `Part`, but for the shards' numbers, in `records` and first in `bad`."""

    records: NDArray[np.void]
    labels: list[str]
    bad: list[tuple[int, str, str]]


def merged(parts: Sequence[Part]) -> Whole:
    """One index of all parts, whose positions become the shards' numbers."""
    records = np.concatenate([np.empty(0, TAR_INDEX_DTYPE), *(part.records for part in parts)])
    records["shard"] = np.repeat(np.arange(len(parts)), [len(part.records) for part in parts])
    codes: dict[str, int] = {}
    tables = {id(part.labels): part.labels for part in parts}  # those of one file share theirs
    lookups = {
        key: np.array([codes.setdefault(label, len(codes)) for label in labels], np.int32)
        for key, labels in tables.items()
    }
    begin = 0
    for part in parts:
        if len(part.records):
            records["label"][begin : begin + len(part.records)] = lookups[id(part.labels)][part.records["label"]]
        begin += len(part.records)
    bad = [(number, key, reason) for number, part in enumerate(parts) for key, reason in part.bad]
    return Whole(records, list(codes), bad)


@contextlib.contextmanager
def _alone(places: list[Path], explicit: bool) -> Iterator[Path | None]:
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


# -------------------- Random access to other people's webdataset tars: where each image lies, how large it is, and its label.


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
