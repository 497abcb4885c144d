"""Keeps the indexes of a folder's tars, so that each tar is scanned once; numpy's .npz with a checksum, never a pickle.

A folder has one file for all its tars: FOLDER/.alexprep/tars.npz, or, where that cannot be written, a file named after the
folder's path in $XDG_CACHE_HOME/alexprep or ~/.cache/alexprep. A tar counts as unchanged while its size and times of
modification and change are. Of several processes one scans and the others wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.dataset_format import TAR_INDEXES
from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import json_bytes, published, user_cache
from alexprep.shards.tar_scan import TAR_INDEX_DTYPE, Part

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
