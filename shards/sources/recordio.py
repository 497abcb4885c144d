"""RecordIO files with pictures, as MXNet's im2rec and InsightFace pack them: train.rec, val.rec.

A file is records, each a magic number, a word of three bits and a length, the data, and zeros up to four bytes (dmlc-core, recordio.h);
data in which the magic number stands are cut there into several parts. A record of an image begins with flag, label, id and id2 (MXNet,
python/mxnet/recordio.py, IRHeader), where a flag above 0 is the number of labels that follow. Files are listed by their records alone, so the
.idx beside them is not needed. The format has no checksums: what a picture's bytes are not, it is rejected for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import (
    NO_CHOICES,
    NO_PICTURE,
    UNLABELLED,
    Account,
    Choices,
    Input,
    Location,
    Source,
    numbered_classes,
)
from alexprep.shards.sources.labels import LabelError, check_range, label_in
from alexprep.shards.sources.numbered_files import SplitFiles, files_below, split_of_file
from alexprep.shards.storage import Files, as_text

MAGIC = b"\x0a\x23\xd7\xce"  # 0xced7230a
_WORDS, _IMAGE = struct.Struct("<4sI"), struct.Struct("<IfQQ")
_HEAD_BYTES = _IMAGE.size + 4  # with the first label that may follow
_LENGTH_BITS = 29
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_ALIGNED = 4


class _Record(NamedTuple):
    """A record: where it begins and ends in the file, how many bytes of data it has, and the first of these."""

    begin: int
    end: int
    size: int
    head: bytes


@dataclass(frozen=True)
class RecordIO(SplitFiles):
    """Records of a picture and its label."""

    parts: tuple[tuple[str, bytes], ...] = ()
    layout = "recordio"
    expects = "RecordIO files of images, as train.rec and val.rec"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`: the file that is named, or those below the root."""
        paths = [name] if name else files_below(files, _is_name)
        if not paths or not all(map(_is_name, paths)):
            return None
        parts = sorted((split_of_file(path) or "train", path) for path in paths)
        return cls(files, tuple(parts), choices=choices, whole=not name)

    def inputs(self, account: Account) -> Iterator[Input]:
        """By split, file and place in it. Records without a picture, as InsightFace's that count identities, are passed over."""
        for split, path in self.parts:
            shown = self.files.display(path)
            with self.files.reading(path) as read:
                for number, record in enumerate(_records(read, self.files.size(path), shown)):
                    account.found += 1
                    where = f"{shown}, record {number:,}"
                    header = _image_header(record.head, where)
                    member = b"record %d" % header.identity
                    if header.picture_at >= record.size:
                        account.pass_over(NO_PICTURE, f"{shown}/{as_text(member)}")
                        continue
                    class_name = UNLABELLED if self.choices.unlabelled else _class_name(header, where)
                    yield Input(split, class_name, Location(path, member, record.begin, record.end - record.begin))
        self.pass_over_others(account)

    def read(self, location: Location) -> bytes:
        """The bytes of a picture; OSError where its record is not what it was."""
        data = self.files.read(location.path, location.offset, location.size)
        if len(data) != location.size:
            raise OSError("the file is shorter than it was when it was listed")
        try:
            whole = MAGIC.join(
                data[at : at + size] for _, at, size in _parts(lambda at, size: data[at : at + size], 0, len(data), "")
            )
            return whole[_image_header(whole, "").picture_at :]
        except AlexprepError:
            raise OSError("the record is not what it was when it was listed") from None

    def classes(self, present: set[str]) -> list[str]:
        """The numbers from "0" to the highest."""
        return numbered_classes(present)


def _is_name(name: bytes) -> bool:
    return name.lower().endswith(b".rec")


def _records(read: Callable[[int, int], bytes], size: int, shown: str) -> Iterator[_Record]:
    """The records of a file of `size` bytes; where it is damaged or cut, an AlexprepError names the byte."""
    at = 0
    while at < size:
        begin, length, head = at, -len(MAGIC), b""
        parts = list(_parts(read, begin, size, shown))
        at = parts[-1][0]
        for _, place, part in parts:
            length += len(MAGIC) + part
            if len(head) < _HEAD_BYTES:
                head += MAGIC * (place != begin + _WORDS.size) + read(place, min(part, _HEAD_BYTES))
        yield _Record(begin, at, length, head)


def _parts(read: Callable[[int, int], bytes], at: int, size: int, shown: str) -> Iterator[tuple[int, int, int]]:
    """(where what follows begins, where its data begin, their bytes) of each part of the record at `at`."""
    kind = expected = _FIRST
    while kind not in (_WHOLE, _LAST):
        words = read(at, _WORDS.size)
        magic, word = _WORDS.unpack(words) if len(words) == _WORDS.size else (b"", 0)
        kind, length = word >> _LENGTH_BITS, word & (1 << _LENGTH_BITS) - 1
        fitting = (_WHOLE, _FIRST) if expected == _FIRST else (_MIDDLE, _LAST)
        if magic != MAGIC or kind not in fitting:
            raise AlexprepError(
                f"{shown} has no record at byte {at:,} of {size:,}: it is no RecordIO file, or damaged, or was cut; get it again"
            )
        begin = at + _WORDS.size
        at = begin + length + -length % _ALIGNED
        if at > size:
            raise AlexprepError(
                f"{shown}: the record at byte {begin - _WORDS.size:,} goes beyond the end: the file was cut short, get it again"
            )
        expected = _MIDDLE
        yield at, begin, length


class _Header(NamedTuple):
    """What begins a record of an image: its first label, how many there are, where the picture begins in the data, and the record's id."""

    label: float
    labels: int
    picture_at: int
    identity: int


def _image_header(head: bytes, where: str) -> _Header:
    if len(head) < _IMAGE.size:
        raise AlexprepError(f"{where} has {len(head)} bytes, and no header of an image: it is no record of im2rec")
    flag, label, identity, _ = _IMAGE.unpack_from(head)
    if flag == 1 and len(head) >= _HEAD_BYTES:
        (label,) = struct.unpack_from("<f", head, _IMAGE.size)
    return _Header(label, max(1, flag), _IMAGE.size + 4 * flag, identity)


def _class_name(header: _Header, where: str) -> str:
    """The label as a number in digits."""
    if header.labels > 1:
        raise AlexprepError(
            f"{where} has {header.labels:,} labels; one is needed: pack it again with one, or say --unlabelled"
        )
    try:
        name = label_in(header.label)
        check_range(name)
    except LabelError as error:
        raise AlexprepError(f"{where}: {error}") from None
    return name
