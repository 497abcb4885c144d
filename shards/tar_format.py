"""Reads and writes tars: lists the members of anyone's archive by its headers alone, and writes archives of our own.

Archives that are read may be damaged or hostile. Python's tarfile takes a damaged header for the end of the archive, loops on a
negative size and allocates what a header claims; here these, and all that two programs would read differently, are refused.
Nothing is unpacked, no link is followed, and what members hold is not looked at: samples and class folders are told in
`sources.wds` and `sources.tars`.

Archives that are written are as webdataset wants them and the same on any machine: USTAR, time 0, owner 0.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, NoReturn
from zlib import adler32

from alexprep.shards.errors import AlexprepError

BLOCK = 512  # bytes: a header is one, and data are filled up to whole ones
MAX_EXTENSION_BYTES = 2**20  # of a long name or a pax header; real ones have a few hundred
MAX_PADDING_BYTES = 2**20  # zeros at the end; more are a download that was given its disk space before its data

ReadAt = Callable[[int, int], bytes]  # (offset, size) → exactly those bytes; fewer only where the file ends


def padded(size: int) -> int:
    """The bytes that data of `size` take in a tar.

    >>> padded(0), padded(1), padded(512)
    (0, 512, 512)
    """
    return -(-size // BLOCK) * BLOCK


# Reading


_HEADER = struct.Struct("100s 24x 12s 12x 8s c 100x 8s 80x 155s 12x")  # name, size, checksum, type, magic, prefix
_LOW_BYTES = bytes(range(128))
_octal = re.compile(rb" *([0-7]+)[ \0]*").fullmatch
_LEAST_READ, _MOST_READ = 4096, 65536  # one holds a pax header and its member's, the other many small members
_USTAR = {b"ustar\x0000", b"ustar\0  ", b"ustar\0\0\0"}
_GNU = b"ustar  \0"
_MAGICS = _USTAR | {_GNU, bytes(8)}
_KINDS = {b"\0": "file", b"0": "file", b"7": "file", b"5": "folder", b"1": "link", b"2": "link"}
_KINDS |= dict.fromkeys([b"3", b"4", b"6", b"A", b"D", b"E", b"I", b"S", b"V"], "other")
_WITHOUT_DATA = {b"1", b"2", b"3", b"4", b"5", b"6"}
_EXTENSIONS = {b"x": "pax header", b"g": "global pax header", b"L": "long name", b"K": "long link"}
# First bytes of what is compressed: the method, and what decompresses it.
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
_NO_END = 2**62  # bytes, where the end is not known
_pax_length = re.compile(rb"([1-9][0-9]{0,6}) ").match
_DAMAGED = "the archive is damaged: download it again"
_CUT = "the archive was cut short: download it again"
_ODD = "download it again, or unpack it and pack it anew with GNU tar"


class ListedMember(NamedTuple):
    """One entry of an archive that is read.

    Attributes:
        name: as stored, never empty, without NUL; it may be any path: "../x", "/x", "./x", "x/".
        offset: of its first data byte in the file that is read.
        size: its bytes in the archive; 0 for folders and links.
        kind: "file", "folder", "link" (hard or symbolic) or "other" (device, pipe, sparse file, volume label, …).
    """

    name: bytes
    offset: int
    size: int
    kind: str


def members(read: ReadAt, size: int | None, name: str, start: int = 0) -> Iterator[ListedMember]:
    """The members of a V7, USTAR, GNU or pax archive, in the order in which it has them.

    Damage is found when the listing reaches it: the members are to be trusted once all have been listed. Memory stays
    below a few MiB whatever the archive claims. What is compressed, damaged, cut or open to two readings is an AlexprepError
    that names the archive, the byte and the next step. `start` is not 0 for an archive inside another. Where the `size` is None the
    archive ends where `read` gives no more; its reads are in ascending order then, as always, but for 64 KiB at most.
    """
    archive = _Archive(read, start, None if size is None else start + size, name)
    at = start
    before: dict[bytes, bytes] = {}  # what extension headers say of the next member
    while (header := archive.header(at)) is not None:
        flag, length = header.flag, number_of_bytes(header.size)
        if length is None:
            archive.fail(at, f"the size {header.size!r} is no number of bytes", _DAMAGED)
        if flag in _EXTENSIONS:
            archive.extend(before, flag, at, length)
            at += BLOCK + padded(length)
            continue
        kind = _KINDS.get(flag)
        if kind is None or (flag == b"S" and header.magic != _GNU):
            archive.fail(at, f"members of type {flag!r} are not known", _ODD)
        data = at + BLOCK if flag != b"S" else archive.behind_sparse_map(at)
        member = before.get(b"path") or header.path()
        if not member or b"\0" in member:
            archive.fail(at, "a name is empty or holds a NUL byte", _DAMAGED)
        if before:
            length = archive.pax_size(at, before, length)
            kind = "other" if b"sparse" in before else kind
            before.clear()
        if member[-1] == ord("/") and kind == "file":  # how tars told folders before there was a type for them
            kind = "folder"
        if length and (flag in _WITHOUT_DATA or kind == "folder"):
            archive.fail(at, f"a folder, link or device has {length:,} bytes, which programs read differently", _ODD)
        if data + length > archive.end:
            archive.fail(at, f"a member's {length:,} bytes go beyond the archive's end at byte {archive.end:,}", _CUT)
        at = data + padded(length)
        yield ListedMember(member, data, length, kind)
    if before:
        archive.fail(at, "a long name or pax header has no member behind it", _DAMAGED)
    archive.check_padding(at)


def reader_of(archive: bytes) -> ReadAt:
    """What `members` reads an archive in memory with."""
    return lambda offset, size: archive[offset : offset + size]


class HeaderFields(NamedTuple):
    """The fields of a header that matter for reading, as stored."""

    name: bytes
    size: bytes
    flag: bytes
    magic: bytes
    prefix: bytes

    def path(self) -> bytes:
        """The name with USTAR's prefix before it; behind a NUL in the prefix, star keeps times."""
        name = self.name.rstrip(b"\0")
        if self.magic in _USTAR and self.prefix[0] and name:
            return self.prefix.partition(b"\0")[0] + b"/" + name
        return name


def read_header_block(block: bytes) -> HeaderFields | None:
    """The header in a block; None where its checksum is wrong."""
    name, size, checksum, flag, magic, prefix = _HEADER.unpack(block)
    # The lower half of Adler-32, begun at 0, is the sum of up to 257 bytes: far faster than sum(block).
    total = (adler32(block[:256], 0) & 0xFFFF) + (adler32(block[256:], 0) & 0xFFFF)
    total += 8 * ord(" ") - (adler32(checksum, 0) & 0xFFFF)  # the checksum itself counts as spaces
    digits = _octal(checksum)
    excess = total - int(digits[1], 8) if digits else -1
    if excess and excess != 256 * len(block.translate(None, _LOW_BYTES)):  # old tars summed signed bytes
        return None
    return HeaderFields(name, size, flag, magic, prefix)


def number_of_bytes(field: bytes) -> int | None:
    """A size in octal digits, or as GNU's signed big-endian number behind a set bit; None for neither and below 0."""
    digits = _octal(field)
    if digits:
        return int(digits[1], 8)
    return int.from_bytes(field, "big") - 2**95 if field[0] & 0xC0 == 0x80 else None


class _Archive:
    """Reads and checks the blocks of one archive."""

    def __init__(self, read: ReadAt, start: int, end: int | None, name: str) -> None:
        self._read, self._start, self._name = read, start, name
        self.end, self._open = _NO_END if end is None else end, end is None
        self._base, self._buffer, self._ahead = start, b"", _LEAST_READ

    def fail(self, at: int, problem: str, next_step: str) -> NoReturn:
        raise AlexprepError(f"{self._name}, byte {at:,}: {problem}; {next_step}")

    def _get(self, at: int, size: int) -> bytes:
        """`size` bytes from `at`, fewer where the archive ends. Reads more ahead while reads adjoin one another."""
        begin = at - self._base
        if begin + size > len(self._buffer):
            adjoins = begin < len(self._buffer) + _LEAST_READ
            self._ahead = min(2 * self._ahead, _MOST_READ) if adjoins else _LEAST_READ
            wanted = max(0, min(self.end - at, max(size, self._ahead)))
            self._buffer = self._read(at, wanted) if wanted else b""
            self._base, begin = at, 0
            if self._open and len(self._buffer) < wanted:
                self.end = at + len(self._buffer)
            elif len(self._buffer) != wanted:
                self.fail(at, f"of {wanted:,} bytes {len(self._buffer):,} can be read", _CUT)
        return self._buffer[begin : begin + size]

    def header(self, at: int) -> HeaderFields | None:
        """The header at `at`; None for the empty block that ends the archive."""
        block = self._get(at, BLOCK)
        if block == bytes(BLOCK):
            return None
        header = read_header_block(block) if len(block) == BLOCK else None
        if header is None:
            for magic, (method, program) in COMPRESSED.items():
                if at == self._start and block.startswith(magic):
                    self.fail(at, f"this is compressed with {method}", f"decompress it first: {program}")
            if len(block) < BLOCK:
                self.fail(at, "the file ends before the empty block that ends an archive", _CUT)
            if at == self._start:
                self.fail(at, "this is no tar archive, or its first header is damaged", "download it again")
            self.fail(at, "a header's checksum is wrong", _DAMAGED)
        if header.magic not in _MAGICS:
            self.fail(at, f"the kind of tar {header.magic!r} is not known", _ODD)
        return header

    def extend(self, before: dict[bytes, bytes], flag: bytes, at: int, length: int) -> None:
        """Adds to `before` what an extension header says of the next member, and which header said it."""
        what = _EXTENSIONS[flag]
        if length > MAX_EXTENSION_BYTES:
            self.fail(at, f"a {what} has {length:,} bytes; at most {MAX_EXTENSION_BYTES:,} are sensible", _DAMAGED)
        if before and (flag in b"xg" or flag in before or b"x" in before):
            self.fail(at, f"a {what} follows another header for the same member", _ODD)
        blocks = self._get(at + BLOCK, padded(length))
        if len(blocks) % BLOCK or len(blocks) < length:
            self.fail(at, f"a {what} of {length:,} bytes goes beyond the archive's end at byte {self.end:,}", _CUT)
        if blocks[length:].strip(b"\0"):  # programs read a long name to its size or to the next NUL
            self.fail(at, f"more than zeros follow a {what} of {length:,} bytes", _DAMAGED)
        content = blocks[:length]
        if flag in b"LK":
            before[flag] = text = content.rstrip(b"\0")
            if not text or b"\0" in text:
                self.fail(at, f"a {what} is empty or holds a NUL byte", _DAMAGED)
            if flag == b"L":
                before[b"path"] = text
            return
        found = self._pax(at, content)
        if flag == b"x":
            before |= found | {b"x": b""}
        elif found:
            self.fail(at, f"a {what} gives all members one {b', '.join(found).decode()}", _ODD)

    def _pax(self, at: int, content: bytes) -> dict[bytes, bytes]:
        """Those of a pax header's records that matter here: "path", "size", and "sparse" for any that begins GNU.sparse."""
        found: dict[bytes, bytes] = {}
        begin = 0
        while begin < len(content):
            head = _pax_length(content, begin)
            end = begin + int(head[1]) if head else 0
            key, equals, value = content[head.end() : end - 1].partition(b"=") if head else (b"", b"", b"")
            if not key or not equals or b"\n" in key or content[end - 1 : end] != b"\n":
                self.fail(at, f"record at byte {begin:,} of a pax header makes no sense", _DAMAGED)
            if key.startswith(b"GNU.sparse."):
                found[b"sparse"] = value
            elif key in (b"path", b"size"):
                if key in found or not value or b"\0" in value:
                    self.fail(at, f"a pax header gives the {key.decode()} twice, empty or with a NUL byte", _DAMAGED)
                found[key] = value
            begin = end
        return found

    def pax_size(self, at: int, before: dict[bytes, bytes], length: int) -> int:
        """The size of a member whose header says `length`; they may differ only where the header cannot hold the size."""
        text = before.get(b"size")
        if text is None:
            return length
        if not text.isdigit() or len(text) > 30 or (int(text) != length and int(text) < 8**11):
            self.fail(at, f"a pax header gives the size {text[:32]!r}, the header itself {length:,}", _DAMAGED)
        return int(text)

    def behind_sparse_map(self, at: int) -> int:
        """Where the data of an old GNU sparse file begin: its map may go on in blocks of its own."""
        more = self._get(at, BLOCK)[482]
        while more:
            at += BLOCK
            block = self._get(at, BLOCK)
            if len(block) < BLOCK:
                self.fail(at, "the map of a sparse file goes beyond the end of the archive", _CUT)
            more = block[504]
        return at + BLOCK

    def check_padding(self, at: int) -> None:
        """Sees to it that only zeros follow the end of the archive at `at`."""
        padding = self._get(at, min(self.end - at, MAX_PADDING_BYTES))
        if rest := padding.lstrip(b"\0"):
            where = at + len(padding) - len(rest)
            again = "download it again, or unpack it with `tar --ignore-zeros` and pack it anew if archives were joined"
            self.fail(where, f"data follow the end of the archive at byte {at:,}", again)
        if self.end - at > MAX_PADDING_BYTES:
            problem = f"the file ends in {self.end - at:,} bytes of which the first {MAX_PADDING_BYTES:,} are zero"
            self.fail(at, problem, "the download did not end: download it again")


# Writing


@dataclass(frozen=True)
class WrittenMember:
    """One file of a tar that was written: its name, where its bytes begin, how many there are, and their CRC-32."""

    name: str
    offset: int
    size: int
    crc32: int


class TarWriter:
    """Writes members one after the other, hashing the archive on the way.

    Only `close` writes the end of the archive, so that an interrupted shard never looks whole.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Starts an archive in `file`, which must be empty."""
        self._file = file
        self._sha256 = hashlib.sha256()
        self.bytes = 0
        self.members: list[WrittenMember] = []

    def add(self, name: str, data: bytes) -> WrittenMember:
        """Appends one member (mode 0444)."""
        header = member_header(name, len(data))
        member = WrittenMember(name, self.bytes + len(header), len(data), zlib.crc32(data))
        self._write(b"".join((header, data, bytes(padded(len(data)) - len(data)))))
        self.members.append(member)
        return member

    def close(self) -> str:
        """Writes the end of the archive, and returns the archive's sha256 in hex."""
        self._write(ending(self.bytes))
        return self._sha256.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.bytes += len(data)


def member_header(name: str, size: int) -> bytes:
    """The header of a member: USTAR, mode 0444, time 0, owner 0; the name has at most 100 ASCII characters.

    Tarfile's own takes ten times as long, twice an image, so its header of an empty member is filled in here.

    >>> info = tarfile.TarInfo("00000042.jpg")
    >>> info.size, info.mode = 123456, 0o444
    >>> member_header("00000042.jpg", 123456) == info.tobuf(tarfile.USTAR_FORMAT)
    True
    """
    header = bytearray(_empty_header())
    header[: len(name)] = name.encode("ascii")
    header[124:135] = b"%011o" % size
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * ord(" "))
    return bytes(header)


@functools.cache
def _empty_header() -> bytes:
    info = tarfile.TarInfo()
    info.mode = 0o444
    return info.tobuf(tarfile.USTAR_FORMAT)


def ending(position: int) -> bytes:
    """Two empty blocks, and zeros up to a whole record as POSIX asks, for an archive whose last member ends at `position`."""
    end = position + 2 * BLOCK
    return bytes(end + -end % tarfile.RECORDSIZE - position)


def dali_index(members: list[WrittenMember]) -> str:
    """DALI's index, version 1.2, for members of which neighbours KEY.ext KEY.cls form a sample: what `wds2idx` would write."""
    lines = []
    for _, sample in itertools.groupby(members, lambda member: member.name.partition(".")[0]):
        lines.append(" ".join(f"{m.name.rpartition('.')[2]} {m.offset} {m.size} {m.name}" for m in sample))
    return "\n".join([f"v1.2 {len(lines)}", *lines, ""])
