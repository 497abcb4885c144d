"""Indexes other people's webdataset tars, for random access: where each image lies, how large it is, and its label.

Rules:
  * Shards are .tar files on a local disk, in the order of SOURCE: a folder's by name, a pattern's as it expands.
  * A sample is a run of neighbouring members with the same name up to the first dot of the file name. Its image is the one
    member with an image extension; its label is .cls, .class, .label, .index, or a field of .json, in this order: a number or a
    name, as `sources.labels` has it.
  * Labels that are numbers stay what they are, and the classes are "0" to the largest. Labels that are names are sorted and
    numbered. Both at once are an error. The dataset.json of `alexprep shard` gives the class names.
  * What cannot be used is left out and listed with the reason: no image or label, two of one, a label that makes no sense,
    an image that is empty, too large, of another type than JPEG, PNG, WebP, BMP or PNM, or whose header cannot be read, and
    what comes of a key that was there before. A sample that is listed may still prove damaged when it is decoded.
  * A damaged tar is an error: nothing of it is used.
  * DALI's .idx saves time where it fits the tar in every member; else there is a warning, and the tar itself is read. It never
    adds or takes a sample.

Each tar is scanned once: its index is kept in a cache file until the tar changes. Our own data sets have their index.npy, see
`dataset_format`; the bytes of samples are read by `sample_reader`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.dataset_format import INDEX_DTYPE, TAR_INDEXES
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_header import Refused, read_header
from alexprep.shards.sources.base import Location
from alexprep.shards.sources.labels import is_number
from alexprep.shards.sources.tars import packed_files, plain_name
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
from alexprep.shards.storage import MAX_FILE_BYTES, LocalFiles, as_text, json_bytes, user_cache
from alexprep.shards.tar_format import BLOCK, ReadAt, number_of_bytes, padded, read_header_block
from alexprep.shards.worker_pool import InProcessEngine, LocalEngine, cores

_FEW_BYTES = 2**28  # of shards are scanned before worker processes have started (0.5 s)
_CACHE_VERSION = 4
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
        records: (samples,) of `INDEX_DTYPE`, in the order of the shards and, within one, of the tar. Height and width are
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
    """The samples of one shard.

    Attributes:
        records: (samples,) of `INDEX_DTYPE`, in the order of the tar; shard is 0, and label a position in `labels`.
        labels: numbers without leading zeros, or names, each of some sample.
        bad: (key, reason) of the samples that cannot be used.
        warning: what was odd about the shard's .idx file; empty for nothing.
    """

    records: NDArray[np.void]
    labels: list[str]
    bad: list[tuple[str, str]]
    warning: str = ""


def index_tars(
    source: str | Path | Sequence[str | Path], split: str = "train", *, cache: Path | None = None
) -> TarIndex:
    """The index of other people's shards, by one scan of those that are new or changed since the last call.

    Each shard is a task for worker processes, one a core, which the ranks of a host share; one shard or few bytes are scanned in this process.

    Args:
        source: a folder of tars, a tar, a brace pattern such as "train-{0000..0127}.tar", or a sequence of these.
        split: which shards of a folder are meant, where their names or its subfolders tell splits; else all are.
        cache: where the index is kept; None for the folder `.alexprep` beside the shards or, where that cannot be written,
            the user's cache folder.

    Raises:
        AlexprepError: there is no such shard, or one is damaged (the byte is named); numbers and names are mixed as labels;
            no sample can be used; `cache` cannot be written.
    """
    paths, names = _find_shards(source, split)
    states = {path: _state(path) for path in paths}
    known = {path: index for path, state in states.items() if (index := _load(path, state, cache)) is not None}
    missing = [path for path in paths if path not in known]
    few = len(missing) == 1 or sum(states[path][0] for path in missing) < _FEW_BYTES
    workers = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # each rank on this host scans for itself
    engine = InProcessEngine() if few or workers == 1 else LocalEngine(workers)
    trouble: OSError | None = None
    for path, index in engine.run(_scan_task, missing, lambda finished: None):
        if index.warning:  # a worker's own log would go nowhere
            _log.warning("%s", index.warning)
        known[path] = index
        trouble = _save(path, states[path], cache, index) or trouble
        if trouble and cache is not None:
            raise AlexprepError(f"{cache} cannot be written ({trouble.strerror}): name another folder")
    if trouble:
        _log.warning("indexes cannot be kept (%s), so shards will be scanned again: set XDG_CACHE_HOME", trouble)
    return _joined(paths, [known[path] for path in paths], [states[path][0] for path in paths], names)


def _scan_task(path: Path, condemned: Mapping[int, str]) -> tuple[Path, ShardIndex]:
    # Nothing is ever condemned: no decoder runs here, so no image can end the process.
    return path, scan_tar(path)


def _joined(paths: list[Path], shards: list[ShardIndex], sizes: list[int], names: tuple[str, ...]) -> TarIndex:
    """The shards' indexes as one, with class numbers in place of the labels' texts."""
    texts = {label for shard in shards for label in shard.labels}
    classes = class_names(texts, names, str(paths[0].parent))
    position = {name: label for label, name in reversed([*enumerate(classes)])}
    numbers = {
        text: int(text) if is_number(text) and int(text) < len(classes) else position.get(text, -1) for text in texts
    }
    parts: list[NDArray[np.void]] = []
    bad: list[UnusableSample] = []
    for number, (path, shard) in enumerate(zip(paths, shards, strict=True)):
        records = shard.records.copy()
        records["shard"] = number
        records["label"] = np.array([numbers[text] for text in shard.labels], np.int32)[records["label"]]
        strange = records["label"] < 0
        reason = f"has a label that is none of the {len(classes):,} classes of the dataset.json beside the shards"
        bad += [UnusableSample(path, key, why) for key, why in shard.bad]
        bad += [
            UnusableSample(path, f"with its image at byte {offset:,}", reason)
            for offset in records["offset"][strange].tolist()
        ]
        parts.append(records[~strange])
    records = np.concatenate(parts)
    if not len(records):
        why = f"for example {bad[0]}" if bad else "they are empty"
        raise AlexprepError(f"no sample can be used of {len(paths):,} shards, {paths[0]} being the first; {why}")
    named_sizes = [(path.name, size) for path, size in zip(paths, sizes, strict=True)]
    digest = hashlib.sha256(json_bytes([*named_sizes, classes]) + records.tobytes())
    return TarIndex(tuple(paths), records, classes, tuple(bad), digest.hexdigest())


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


def splits_of(folder: Path) -> list[str]:
    """The splits that the tars of a folder tell, in order of their names; train alone where nothing tells one."""
    files = LocalFiles(os.path.realpath(os.fsencode(folder)))
    return sorted({name or "train" for name, _ in shards_below(files)})


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


# Scanning one tar


def scan_tar(path: Path) -> ShardIndex:
    """Indexes one tar: reads its headers, its labels and the first bytes of its images.

    Where NAME.idx of DALI lies beside it and fits, the headers of extensions and of folders are passed over.
    """
    files, name = LocalFiles(os.fsencode(path.parent)), os.fsencode(path.name)
    rows: list[tuple[int, ...]] = []
    codes: dict[str, int] = {}
    bad: list[tuple[str, str]] = []
    try:
        with files.reading(name) as read:
            listed, warning = _files_by_dali_index(files, name, read)
            for sample in samples_of(packed_files(files, name) if listed is None else listed):
                try:
                    offset, size, height, width, label = _examine(sample, read)
                except BadSampleError as error:
                    bad.append((as_text(sample.key), str(error)))
                else:
                    rows.append((0, offset, size, codes.setdefault(label, len(codes)), height, width))
    except OSError as error:
        raise AlexprepError(f"{path} cannot be read ({error}): see to the disk, then run the same again") from None
    return ShardIndex(np.array(rows, INDEX_DTYPE), list(codes), bad, warning)


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


def _files_by_dali_index(files: LocalFiles, name: bytes, read: ReadAt) -> tuple[list[Location] | None, str]:
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


def read_dali_index(index: bytes, read: ReadAt, path: bytes) -> list[Location]:
    """The files of a tar by its DALI index, as `packed_files` would list them.

    Every listed member must have a header with a right checksum, its name and its size; nothing but extension headers and
    folders may lie between two members; and the end of the archive must follow the last one. Else a ValueError says what does
    not fit. `path` is the tar's, for the locations.
    """
    lines = index.decode("utf-8", "surrogateescape").splitlines()
    version, count = (lines[0].split() if lines else []) or ("", "")
    if version not in _FIELDS:
        raise ValueError(f"version {version[:20]!r} is none of {', '.join(_FIELDS)}")
    if int(count) != len(lines) - 1:
        raise ValueError(f"it announces {count} samples and has {len(lines) - 1:,}")
    step = _FIELDS[version]
    found: list[Location] = []
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
                found.append(Location(path, clean, offset, size))
    if read(end, BLOCK) != bytes(BLOCK):
        raise ValueError(f"the tar goes on, or is cut, at byte {end:,}, where the last member ends")
    return found


def _checked_name(headers: bytes, size: int, given: bytes) -> bytes | None:
    """The name of a member by all headers before its data; None where they are not those of a member of that size.

    `given` is its name by the index; empty for none.
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


# The cache: one file a tar, of a checksum, a line of JSON and the records. Whatever is cut, damaged or being written is scanned again


def _state(path: Path) -> list[int]:
    """What tells that a tar is still the same: its bytes, and nanoseconds.

    Tars of equal size are common, and copying tools set the time of modification; that of the last change they cannot set.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise AlexprepError(f"{path} cannot be read ({error.strerror}): name shards that are there") from None
    if not stat.S_ISREG(status.st_mode):
        raise AlexprepError(f"{path} is no regular file: name shards that are files")
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _cache_files(path: Path, cache: Path | None) -> list[Path]:
    """Where the index of a tar may lie, in order of preference."""
    name = f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:24]}.index"
    if cache is not None:
        return [cache / name]
    user = user_cache()
    return [path.parent / TAR_INDEXES / f"{path.name}.index", *([user / name] if user else [])]


def _load(path: Path, state: list[int], cache: Path | None) -> ShardIndex | None:
    for place in _cache_files(path, cache):
        with contextlib.suppress(OSError):
            content = place.read_bytes()
            if hashlib.sha256(content[32:]).digest() == content[:32]:
                head, _, records = content[32:].partition(b"\n")
                document = json.loads(head)
                if document["version"] == _CACHE_VERSION and document["tar"] == state:
                    return ShardIndex(np.frombuffer(records, INDEX_DTYPE), document["labels"], document["bad"])
    return None


def _save(path: Path, state: list[int], cache: Path | None, index: ShardIndex) -> OSError | None:
    """Keeps an index in the first place that can be written; returns why there is none."""
    document = {"version": _CACHE_VERSION, "tar": state, "labels": index.labels, "bad": index.bad}
    content = json_bytes(document, None) + index.records.tobytes()
    trouble: OSError | None = None
    for place in _cache_files(path, cache):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(hashlib.sha256(content).digest() + content)
            return None
        except OSError as error:
            trouble = error
    return trouble
