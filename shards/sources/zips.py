"""Zip archives of class folders as a source, on a disk or in a store: listed by their directory alone, members read in place.

That is one zip with [train|val|test/]CLASS/**/FILE, or a folder with train.zip, val.zip and so on. What the folders mean is decided as
for tars. Offsets, signatures and flags are those of PKWARE's APPNOTE.TXT 6.3.10. Nothing is unpacked to a disk.

An archive may be damaged or hostile: members that lie in each other, two of one name, names and sizes that the directory and the
member tell differently are refused, and a member is inflated up to the size that the directory gives, and no further.
"""

from __future__ import annotations

import itertools
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import NO_CHOICES, Choices, Location, Source
from alexprep.shards.sources.tars import NO_FILE, PackedClassFolders, archives_at, clean_name
from alexprep.shards.sources.tree import rule_of
from alexprep.shards.storage import MAX_FILE_BYTES, Files, as_text
from alexprep.shards.tar_format import ReadAt

_END = struct.Struct(
    "<4s4H2LH"
)  # signature, disk, directory's disk, entries here, entries, its size and offset, comment's length
_LOCATOR = struct.Struct("<4sLQL")  # of the end record with 64 bits: signature, disk, offset, disks
_END_64 = struct.Struct(
    "<4sQ2H2L4Q"
)  # signature, size, made by, needed, disks, entries here, entries, directory's size and offset
# Signature, made by, needed, flags, method, time, crc, packed, size, lengths of name, extra, comment, disk, attributes, offset.
_ENTRY = struct.Struct("<4s2B5HL2L5HLL")
_LOCAL = struct.Struct(
    "<4s5H3L2H"
)  # signature, needed, flags, method, time and date, crc, packed, size, lengths of name, extra
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF  # the value is in a record with 64 bits
_MAX_COMMENT = 0xFFFF
_EXTRA_64, _EXTRA_NAME = 0x0001, 0x7075  # 64-bit sizes; Info-ZIP's name in UTF-8
_ENCRYPTED, _DESCRIPTOR, _UTF8 = 0x2041, 0x0008, 0x0800  # flags: bits 0, 6 and 13; 3; 11
_STORED, _DEFLATED = 0, 8
_METHODS = {
    1: "shrunk",
    6: "imploded",
    9: "Deflate64",
    12: "bzip2",
    14: "LZMA",
    93: "Zstandard",
    95: "xz",
    98: "PPMd",
    99: "AES",
}
_UNIX, _MACOS, _DOS = 3, 19, 0  # who made an entry
_CHUNK = 2**20  # bytes of the directory that are read at once
_SPARE = 128  # bytes that a member's own header may have beyond what the directory tells


class Member(NamedTuple):
    """One entry of an archive's directory.

    Attributes:
        name: without what leads elsewhere; empty for a folder.
        offset: of the member's own header.
        packed: its bytes in the archive, compressed.
        size: its bytes.
        problem: why it cannot be read, such as "is encrypted"; empty for nearly all.
        is_file: whether it is no link or device.
        end: a lower bound of where its data end.
    """

    name: bytes
    offset: int
    packed: int
    size: int
    problem: str
    is_file: bool
    end: int


@dataclass(frozen=True)
class ZipOfClassFolders(PackedClassFolders):
    """Class folders in zips; members are stored or deflated."""

    layout = "zip"
    expects = "a zip of CLASS/IMAGE or train/CLASS/IMAGE, or a folder with train.zip and val.zip"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`: the zip that is named, or those in the root."""
        archives = archives_at(files, name, (b".zip",))
        return cls(files, archives, choices=choices, whole=not name) if archives else None

    def each_once(self, path: bytes, within: Location | None = None) -> Iterator[Location]:
        """Every member that is no folder; the offset is that of its own header, the size its bytes in the archive.

        Members that cannot be read are an AlexprepError, unless their names say that they are no pictures.
        """
        shown, seen = self.files.display(path), set[bytes]()
        size = self.files.size(path)
        with self.files.reading(path) as read:
            for member in zip_members(read, size, shown):
                if not member.name:
                    continue
                if member.name in seen:
                    raise AlexprepError(
                        f"{shown} holds {as_text(member.name)} twice, which programs read differently: pack the archive anew, with each "
                        "file once"
                    )
                seen.add(member.name)
                if member.problem and rule_of(member.name.rpartition(b"/")[2]) is None:
                    raise AlexprepError(f"{shown}: {as_text(member.name)} {member.problem}")
                yield Location(path, member.name, member.offset if member.is_file else NO_FILE, member.packed)

    def read(self, location: Location) -> bytes:
        """The bytes of a member; OSError where it is a link, or is not what the directory says."""
        if location.offset == NO_FILE:
            raise OSError("a link or special file in an archive")
        guess = _LOCAL.size + len(location.member) + _SPARE + location.size
        data = self.files.read(location.path, location.offset, guess)
        if len(data) < _LOCAL.size:
            raise OSError("the archive is shorter than it was when it was listed")
        signature, _, flags, method, *_, crc, packed, size, name_size, extra_size = _LOCAL.unpack_from(data)
        begin = _LOCAL.size + name_size + extra_size
        if signature != b"PK\3\4":
            raise OSError(
                "the archive has no member where its directory says: it is damaged, or was changed since it was listed"
            )
        rest = 24 if flags & _DESCRIPTOR else 0
        if len(data) < begin + location.size + rest:
            data += self.files.read(
                location.path, location.offset + len(data), begin + location.size + rest - len(data)
            )
        body = data[begin : begin + location.size]
        if len(body) != location.size:
            raise OSError("the archive is shorter than it was when it was listed")
        names = {
            clean_name(_decoded(data[_LOCAL.size : _LOCAL.size + name_size], flags, made)) for made in (_UNIX, _DOS)
        }
        extras = list(_extras(data[_LOCAL.size + name_size : begin]))
        if location.member not in names and all(kind != _EXTRA_NAME for kind, _ in extras):
            raise OSError(
                "its name in the archive's directory is another one than beside its data: the archive is damaged"
            )
        if flags & _DESCRIPTOR and size in (0, _FULL_32):
            wide = any(kind == _EXTRA_64 for kind, _ in extras)
            crc, size = _descriptor(data[begin + location.size : begin + location.size + rest], location.size, wide)
        elif _FULL_32 in (packed, size):
            size = next(iter(_sizes_64(data[_LOCAL.size + name_size : begin])), size)
        return _unpacked(body, method, size, crc)


def _unpacked(body: bytes, method: int, size: int, crc: int) -> bytes:
    """A member's bytes, which must be `size` and have the checksum `crc`; OSError where they do not."""
    if size > MAX_FILE_BYTES:
        raise OSError(f"{size:,} bytes are more than the limit of {MAX_FILE_BYTES:,}")
    if method == _DEFLATED:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            body, packed = inflate.decompress(body, size + 1), len(body)
        except zlib.error as error:
            raise OSError(f"its compressed data are damaged ({error})") from None
        if len(body) <= size and (not inflate.eof or inflate.unused_data):
            raise OSError(f"its compressed data do not end after their {packed:,} bytes")
    elif method != _STORED:
        raise OSError(f"it is packed by method {method}, which is not read")
    if len(body) != size:
        raise OSError(
            f"it has {'more than ' * (len(body) > size)}{min(len(body), size):,} bytes, and should have {size:,}"
        )
    if zlib.crc32(body) != crc:
        raise OSError("its bytes have another CRC-32 than the archive tells: it is damaged")
    return body


def _descriptor(data: bytes, packed: int, wide: bool) -> tuple[int, int]:
    """CRC-32 and size from the record behind a member's data, which may have a signature; sizes have 64 bits where it is `wide`."""
    form = "<L2Q" if wide else "<L2L"
    for signature in (b"PK\7\x08", b""):
        if data.startswith(signature) and len(data) >= len(signature) + struct.calcsize(form):
            crc, behind, size = struct.unpack_from(form, data, len(signature))
            if behind == packed:
                return crc, size
    raise OSError("nothing behind its data tells their size and CRC-32: the archive is damaged")


# The directory


def zip_members(read: ReadAt, size: int, shown: str) -> Iterator[Member]:
    """Every entry of a zip's directory, in its order; AlexprepError where that is damaged, or members lie in each other."""
    begin, length, count = _directory(read, size, shown)
    ranges: list[tuple[int, int]] = []
    at, data, place = begin, b"", 0
    for number in range(count):
        wrong = f"{shown}, entry {number + 1:,} of {count:,} of its directory"
        if len(data) - place < _ENTRY.size + 3 * _FULL_16 and at < begin + length:
            more = read(at, min(max(_CHUNK, _ENTRY.size + 3 * _FULL_16), begin + length - at))
            data, place, at = data[place:] + more, 0, at + len(more)
        if len(data) - place < _ENTRY.size or data[place : place + 4] != b"PK\1\2":
            raise AlexprepError(f"{wrong} is damaged: get the archive again, or pack it anew")
        fields = _ENTRY.unpack_from(data, place)
        sizes = fields[11:14]
        whole = data[place : place + _ENTRY.size + sum(sizes)]
        if len(whole) < _ENTRY.size + sum(sizes):
            raise AlexprepError(f"{wrong} is cut short: get the archive again, or pack it anew")
        place += len(whole)
        member = _member(fields, whole[_ENTRY.size :], wrong)
        if member.end > begin:
            raise AlexprepError(f"{wrong} tells of data beyond the directory: get the archive again, or pack it anew")
        ranges.append((member.offset, member.end))
        yield member
    if at - len(data) + place != begin + length:
        raise AlexprepError(
            f"{shown} has more in its directory than the {count:,} entries that it tells of: pack it anew"
        )
    ranges.sort()
    for (_, end), (offset, _) in itertools.pairwise(ranges):
        if offset < end:
            raise AlexprepError(
                f"{shown} has members that lie in each other, at byte {offset:,}: no program for photos packs so, and to inflate them may "
                "take any time; get it from another place"
            )


def _directory(read: ReadAt, size: int, shown: str) -> tuple[int, int, int]:
    """Where the directory begins, its bytes and its entries, as the record at the archive's end tells."""
    tail_at = max(0, size - _END.size - _MAX_COMMENT - _LOCATOR.size)
    tail = read(tail_at, size - tail_at)
    found = len(tail)
    while True:
        found = tail.rfind(b"PK\5\6", 0, found + 3 if found < len(tail) else None)
        if found < 0:
            raise AlexprepError(f"{shown} has no directory at its end: it is no zip, or was cut short: get it again")
        if len(tail) - found >= _END.size and found + _END.size + _END.unpack_from(tail, found)[7] == len(tail):
            break
    _, disk, directory_disk, here, count, length, begin, _ = _END.unpack_from(tail, found)
    end = tail_at + found
    if _FULL_16 in (disk, here, count) or _FULL_32 in (length, begin) or begin + length != end:
        place = found - _LOCATOR.size
        if place >= 0 and tail[place : place + 4] == b"PK\6\7":
            _, _, at, _ = _LOCATOR.unpack_from(tail, place)
            record = read(at, _END_64.size) if at < size else b""
            if len(record) < _END_64.size or record[:4] != b"PK\6\6":
                raise AlexprepError(f"{shown} has no directory where its end says, at byte {at:,}: get it again")
            _, _, _, _, disk, directory_disk, here, count, length, begin = _END_64.unpack(record)
            end = at
    if disk or directory_disk or here != count:
        raise AlexprepError(f"{shown} is one of several parts: join them (`zip -s 0 PART.zip --out WHOLE.zip`)")
    if begin + length != end or count * _ENTRY.size > length:
        raise AlexprepError(
            f"{shown}: its directory is not where its end says, at byte {begin:,}: something was put before or into it, or it was cut; mend it "
            "(`zip -FF ARCHIVE.zip --out MENDED.zip`), or get it again"
        )
    return begin, length, count


def _member(fields: tuple[int, ...], rest: bytes, wrong: str) -> Member:
    """One entry, given its fields and what follows them: its name, extra fields and comment."""
    made, flags, method, (packed, size, name_size, extra_size) = fields[2], fields[4], fields[5], fields[9:13]
    attributes, offset = fields[16:]
    raw, extra = rest[:name_size], rest[name_size : name_size + extra_size]
    extras = dict(_extras(extra))
    wide = _sizes_64(extra)
    try:
        size = next(wide) if size == _FULL_32 else size
        packed = next(wide) if packed == _FULL_32 else packed
        offset = next(wide) if offset == _FULL_32 else offset
    except StopIteration:
        raise AlexprepError(f"{wrong} has no sizes of 64 bits where it needs them: pack the archive anew") from None
    name = _decoded(raw, flags, made)
    apart = extras.get(_EXTRA_NAME, b"")
    if len(apart) > 5 and apart[0] == 1 and struct.unpack_from("<L", apart, 1)[0] == zlib.crc32(raw):
        name = apart[5:]
    if b"\0" in name:
        raise AlexprepError(
            f"{wrong} has the name {as_text(name)!r} with a NUL, which programs read differently: pack the archive anew"
        )
    is_folder = name.endswith(b"/") or (made == _DOS and bool(attributes & 0x10))
    mode = attributes >> 16 if made in (_UNIX, _MACOS) else 0
    is_file = not stat.S_IFMT(mode) or stat.S_ISREG(mode)
    end = offset + _LOCAL.size + name_size + packed
    clean = b"" if is_folder or (stat.S_ISDIR(mode) and not size) else clean_name(name)
    return Member(clean, offset, packed, size, _problem(flags, method, packed, size), is_file, end)


def _problem(flags: int, method: int, packed: int, size: int) -> str:
    if flags & _ENCRYPTED:
        return "is encrypted: unpack it with its password, and name the folder that it gives"
    if method not in (_STORED, _DEFLATED):
        return f"is packed by {_METHODS.get(method, f'method {method}')}: only stored and deflated members are read; pack the archive anew"
    if method == _STORED and packed != size:
        return f"is stored in {packed:,} bytes, and has {size:,}: the archive is damaged; get it again"
    return ""


def _decoded(raw: bytes, flags: int, made: int) -> bytes:
    """A name in UTF-8: as it is where the entry says that it is, or was made on Unix in such bytes; otherwise from code page 437."""
    unix = made in (_UNIX, _MACOS)
    if raw.isascii() or flags & _UTF8 or (unix and _is_utf8(raw)):
        name = raw
    else:
        name = raw.decode("cp437").encode()
    return name.replace(b"\\", b"/") if made == _DOS and b"/" not in name else name


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _extras(extra: bytes) -> Iterator[tuple[int, bytes]]:
    """(kind, content) of the extra fields; those that are cut short end them."""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        content = extra[place + 4 : place + 4 + length]
        if len(content) < length:
            return
        yield kind, content
        place += 4 + length


def _sizes_64(extra: bytes) -> Iterator[int]:
    """The values of 64 bits, in the order in which those that need them stand in the entry: size, packed size, offset."""
    content = dict(_extras(extra)).get(_EXTRA_64, b"")
    for place in range(0, min(len(content), 24) - 7, 8):
        yield int.from_bytes(content[place : place + 8], "little")
