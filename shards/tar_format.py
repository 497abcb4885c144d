"""Lists the members of a tar by its headers alone: nothing is unpacked, and what members hold is not looked at.

Archives may be damaged or hostile. Python's tarfile takes a damaged header for the end of the archive, loops on a negative
size and allocates what a header claims; here these, and all that two programs would read differently, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

from alexprep.shards.errors import AlexprepError
from alexprep.shards.tar_header import BLOCK, Header, number_of_bytes, padded, read_header_block

MAX_EXTENSION_BYTES = 2**20  # of a long name or a pax header; real ones have a few hundred
MAX_PADDING_BYTES = 2**20  # zeros at the end; more are a download that was given its disk space before its data

ReadAt = Callable[[int, int], bytes]  # (offset, size) → exactly those bytes; fewer only where the file ends

_LEAST_READ, _MOST_READ = 4096, 65536  # one holds a pax header and its member's, the other many small members
_USTAR = {b"ustar\x0000", b"ustar\0  ", b"ustar\0\0\0"}
_GNU = b"ustar  \0"
_MAGICS = _USTAR | {_GNU, bytes(8)}
_KINDS = {b"\0": "file", b"0": "file", b"7": "file", b"5": "folder", b"1": "link", b"2": "link"}
_KINDS |= dict.fromkeys([b"3", b"4", b"6", b"A", b"D", b"E", b"I", b"S", b"V"], "other")
_WITHOUT_DATA = {b"1", b"2", b"3", b"4", b"5", b"6"}
_EXTENSIONS = {b"x": "pax header", b"g": "global pax header", b"L": "long name", b"K": "long link"}
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
_pax_length = re.compile(rb"([1-9][0-9]{0,6}) ").match
_DAMAGED = "the archive is damaged: download it again"
_CUT = "the archive was cut short: download it again"
_ODD = "download it again, or unpack it and pack it anew with GNU tar"


class Member(NamedTuple):
    """One entry of an archive.

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


def members(read: ReadAt, size: int, name: str, start: int = 0) -> Iterator[Member]:
    """The members of a V7, USTAR, GNU or pax archive, in the order in which it has them.

    Damage is found when the listing reaches it: the members are to be trusted once all have been listed. Memory stays
    below a few MiB whatever the archive claims.

    Args:
        read: from the file that holds the archive.
        size: of the archive, bytes.
        name: of the archive, for messages.
        start: the archive's first byte in the file; not 0 for an archive inside another.

    Raises:
        AlexprepError: compressed, damaged, cut, or open to two readings; names the archive, the byte and the next step.
    """
    archive = _Archive(read, start, start + size, name)
    at = start
    before: dict[bytes, bytes] = {}  # what extension headers say of the next member
    while (header := archive.header(at)) is not None:
        stored_name, stored_size, flag, magic, prefix = header
        length = number_of_bytes(stored_size)
        if length is None:
            archive.fail(at, f"the size {stored_size!r} is no number of bytes", _DAMAGED)
        if flag in _EXTENSIONS:
            archive.extend(before, flag, at, length)
            at += BLOCK + padded(length)
            continue
        kind = _KINDS.get(flag)
        if kind is None or (flag == b"S" and magic != _GNU):
            archive.fail(at, f"members of type {flag!r} are not known", _ODD)
        data = at + BLOCK if flag != b"S" else archive.behind_sparse_map(at)
        member = before.get(b"path") or stored_name.rstrip(b"\0")
        if magic in _USTAR and prefix[0] and member and b"path" not in before:
            member = prefix.partition(b"\0")[0] + b"/" + member  # behind the NUL, star keeps times
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
        yield Member(member, data, length, kind)
    if before:
        archive.fail(at, "a long name or pax header has no member behind it", _DAMAGED)
    archive.check_padding(at)


class _Archive:
    """Reads and checks the blocks of one archive."""

    def __init__(self, read: ReadAt, start: int, end: int, name: str) -> None:
        self._read, self._start, self.end, self._name = read, start, end, name
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
            if len(self._buffer) != wanted:
                self.fail(at, f"of {wanted:,} bytes {len(self._buffer):,} can be read", _CUT)
        return self._buffer[begin : begin + size]

    def header(self, at: int) -> Header | None:
        """The header at `at`; None for the empty block that ends the archive."""
        block = self._get(at, BLOCK)
        if block == bytes(BLOCK):
            return None
        if len(block) < BLOCK:
            self._check_compressed(at, block)
            self.fail(at, "the file ends before the empty block that ends an archive", _CUT)
        header = read_header_block(block)
        if header is None:
            self._check_compressed(at, block)
            if at == self._start:
                self.fail(at, "this is no tar archive, or its first header is damaged", "download it again")
            self.fail(at, "a header's checksum is wrong", _DAMAGED)
        if header.magic not in _MAGICS:
            self.fail(at, f"the kind of tar {header.magic!r} is not known", _ODD)
        return header

    def _check_compressed(self, at: int, block: bytes) -> None:
        for magic, (method, program) in _COMPRESSED.items():
            if at == self._start and block.startswith(magic):
                self.fail(at, f"this is compressed with {method}", f"decompress it first: {program}")

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
            again = "download it again, or unpack it with tar --ignore-zeros and pack it anew if archives were joined"
            self.fail(where, f"data follow the end of the archive at byte {at:,}", again)
        if self.end - at > MAX_PADDING_BYTES:
            problem = f"the file ends in {self.end - at:,} bytes of which the first {MAX_PADDING_BYTES:,} are zero"
            self.fail(at, problem, "the download did not end: download it again")
