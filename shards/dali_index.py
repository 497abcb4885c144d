"""The members of a tar by DALI's index beside it (`wds2idx`), where that can be shown to fit: a sound tar lists the same without.

Text: "v1.2 SAMPLES", then a line a sample of EXTENSION OFFSET SIZE NAME for each member, offsets being those of the data;
v1.1 has no NAME.
"""

from __future__ import annotations

from collections.abc import Callable

from alexprep.shards.sources.archive import Packed, shown_name
from alexprep.shards.sources.base import Location
from alexprep.shards.tar_header import BLOCK, number_of_bytes, padded, read_header_block

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
