"""The tar listing: Python's tarfile and GNU tar agree on good archives; damaged and hostile ones are refused, quickly."""

from __future__ import annotations

import gzip
import io
import os
import random
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from alexprep.shards.errors import AlexprepError
from alexprep.shards.tar_format import MAX_PADDING_BYTES, ListedMember, members
from alexprep.shards.webdataset_index import read_dali_index
from tests.source_checks import FORMATS, flipped

END = bytes(1024)
# Short and long, split at a slash or not, spaces, dots, not UTF-8, of exactly 100 bytes, beyond what USTAR holds.
NAMES = [b"a", b"./n01440764/x y.JPEG", "é/漢.png".encode(), b"\xff\xfe.jpg", b"d/" * 60 + b"e", b"f" * 100]
LONG_NAMES = [b"g" * 101, b"h/" * 200 + b"i", b"\xff" * 300]


def listed(data: bytes, start: int = 0, size: int | None = None) -> list[ListedMember]:
    end = len(data) - start if size is None else size
    return list(members(lambda offset, size: data[offset : offset + size], end, "x.tar", start))


def refused(data: bytes, **place: int) -> str:
    with pytest.raises(AlexprepError, match=r"^x\.tar, byte [\d,]+: .+; .+") as caught:
        listed(data, **place)
    return str(caught.value)


def listed_by_tarfile(data: bytes) -> list[ListedMember]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
        return [
            ListedMember(os.fsencode(m.name), m.offset_data, m.size if m.isreg() else 0, _kind(m))
            for m in archive.getmembers()
        ]


def _kind(member: tarfile.TarInfo) -> str:
    if member.isdir():
        return "folder"
    if member.issym() or member.islnk():
        return "link"
    return "file" if member.isreg() and not member.issparse() else "other"


def same(ours: list[ListedMember], theirs: list[ListedMember]) -> bool:
    """Equal but for the slash that tarfile takes from folders."""
    return [m._replace(name=m.name.rstrip(b"/")) for m in ours] == theirs


def packed(format: str, names: list[bytes], seed: int = 0) -> bytes:
    """Files of random sizes (0 first), with a folder, both links and a pipe between them."""
    draw = random.Random(seed)
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=FORMATS[format], encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for n, name in enumerate(names):
            data = draw.randbytes(draw.choice([1, 511, 512, 513, 3000, 70_000]) if n else 0)
            entry = tarfile.TarInfo(os.fsdecode(name))
            entry.size, entry.mtime = len(data), 1.5 if format == "pax" else 1
            archive.addfile(entry, io.BytesIO(data))
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
                extra = tarfile.TarInfo(os.fsdecode(name + b"." + kind) if len(name) < 98 else f"{n}{kind!r}")
                extra.type, extra.linkname = kind, os.fsdecode(names[0]) if kind in (b"1", b"2") else ""
                archive.addfile(extra)
    return buffer.getvalue()


def block(
    name: bytes = b"a", size: int | bytes = 0, kind: bytes = b"0", magic: bytes = b"ustar\x0000", **at: int
) -> bytes:
    """A header, made by hand; `at` is ignored bytes to set, as _OFFSET=VALUE."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    raw = bytearray(512)
    raw[: len(name)], raw[124:136], raw[156:157], raw[257:265] = name, field.ljust(12, b"\0"), kind, magic
    for place, value in at.items():
        raw[int(place[1:])] = value
    return summed(raw)


def summed(raw: bytes | bytearray, signed: bool = False) -> bytes:
    """`raw` with its checksum put right."""
    rest = raw[:148] + b" " * 8 + raw[156:]
    total = sum(byte - 256 * (signed and byte > 127) for byte in rest)
    return bytes(raw[:148] + b"%06o\0 " % total + raw[156:])


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def extension(kind: bytes, content: bytes, **changes: int | bytes) -> bytes:
    return block(b"././@Long", **{"size": len(content), "kind": kind, **changes}) + padded(content)  # type: ignore[arg-type]


def record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = next(n for n in range(len(rest), len(rest) + 9) if len(str(n)) + len(rest) == n)
    return b"%d" % length + rest


@pytest.mark.parametrize("format", FORMATS)
def test_same_as_tarfile(format: str, seed: int) -> None:
    data = packed(format, NAMES + (LONG_NAMES if format != "ustar" else []), seed)
    found = listed(data)
    assert same(found, listed_by_tarfile(data))
    assert [m.name for m in found if m.kind == "file"] == NAMES + (LONG_NAMES if format != "ustar" else [])
    assert {m.kind for m in found} == {"file", "folder", "link", "other"}


@pytest.mark.parametrize("format", FORMATS)
def test_an_archive_inside_another(format: str) -> None:
    inner = packed(format, NAMES)
    outer = block(size=700) + bytes(1024) + block(b"in.tar", len(inner)) + inner + block() + END
    (_, nested, _) = listed(outer)
    start = nested.offset
    assert listed(outer, start, nested.size) == [m._replace(offset=m.offset + start) for m in listed(inner)]
    assert f"byte {start + 512:,}" in refused(outer, start=start, size=512)


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar command")
@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_same_as_gnu_tar(format: str, tmp_path: Path) -> None:
    deep = tmp_path / "photos" / ("d" * 30) / ("e" * 30)
    deep.mkdir(parents=True)
    (deep / "1.JPEG").write_bytes(b"x" * 1000)
    os.link(deep / "1.JPEG", deep / "2.JPEG")
    (deep / "3.JPEG").symlink_to("1.JPEG")
    (deep / "empty").touch()
    if format != "v7":
        os.mkfifo(deep / "pipe")
        (deep / ("n" * 90)).write_bytes(b"y")
        (deep / ("l" * (250 if format != "ustar" else 95))).symlink_to("1.JPEG")
    command = ["tar", f"--format={format}", "--sort=name", "-C", str(tmp_path), "-cf", "-", "photos"]
    data = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout
    assert same(listed(data), listed_by_tarfile(data)) and len(listed(data)) >= 6


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar command")
@pytest.mark.parametrize("options", [["gnu"], ["posix"], *(["posix", f"--sparse-version={v}"] for v in ("0.0", "0.1"))])
def test_sparse_files_are_no_files(options: list[str], tmp_path: Path) -> None:
    """What follows them is found all the same, also behind a map too long for its header."""
    with open(tmp_path / "a", "wb") as file:
        for n in range(60):
            file.seek(n * 65536)
            file.write(b"x")
    (tmp_path / "b").write_bytes(b"y")
    command = ["tar", f"--format={options[0]}", *options[1:], "--sparse", "-C", str(tmp_path), "-cf", "-", "a", "b"]
    data = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout
    sparse, plain = listed(data)
    if sparse.size > 10**6:
        pytest.skip("this file system keeps no holes")
    assert sparse.kind == "other" and plain == listed_by_tarfile(data)[-1]
    assert data[plain.offset : plain.offset + 1] == b"y"


def test_rarer_forms() -> None:
    zero = padded(b"z" * 600)
    assert listed(block(magic=bytes(8), kind=b"\0") + END) == [ListedMember(b"a", 512, 0, "file")]
    assert listed(block(b"v/", magic=bytes(8), kind=b"\0") + END) == [ListedMember(b"v/", 512, 0, "folder")]
    for size, kind in ((600, b"7"), (b"\x80" + (600).to_bytes(11, "big"), b"0"), (b"       1130 ", b"0")):
        assert listed(block(size=size, kind=kind) + zero + END) == [ListedMember(b"a", 512, 600, "file")]
    assert listed(summed(block(b"\xff\xfe"), signed=True) + END) == [ListedMember(b"\xff\xfe", 512, 0, "file")]
    assert listed(extension(b"g", record(b"comment", b"1")) + END) == []
    star = block(_345=ord("p"), _476=ord("1"), _508=ord("t"), _509=ord("a"), _510=ord("r"))
    assert listed(star + END) == [ListedMember(b"p/a", 512, 0, "file")]
    longer = extension(b"x", record(b"path", b"long")) + block(_345=ord("p")) + block(b"b") + END
    assert [m.name for m in listed(longer)] == [b"long", b"b"]
    assert listed(extension(b"K", b"l\0") + extension(b"L", b"m\0") + block() + END)[0].name == b"m"


@pytest.mark.parametrize("format", ["gnu", "pax"])
@pytest.mark.parametrize("length", [8**11 - 1, 8**11, 2**50])
def test_huge_members(format: str, length: int) -> None:
    """Up to a PiB, in archives that hold it; the same header in a small file is an error at once."""
    entry = tarfile.TarInfo("a")
    entry.size = length
    head = entry.tobuf(FORMATS[format], "utf-8", "strict")
    tail = len(head) + (length + 511) // 512 * 512
    whole = {**{n: head[n : n + 512] for n in range(0, len(head), 512)}, tail: block(b"b")}

    def read(offset: int, size: int) -> bytes:
        return b"".join(whole.get(place, bytes(512)) for place in range(offset, offset + size, 512))

    expected = [ListedMember(b"a", len(head), length, "file"), ListedMember(b"b", tail + 512, 0, "file")]
    assert list(members(read, tail + 512 + 1024, "x.tar")) == expected
    with pytest.raises(AlexprepError, match="cut short"):
        list(members(read, tail, "x.tar"))
    assert "go beyond" in refused(head + bytes(4096))


@pytest.mark.parametrize(("size", "reads", "share"), [(100, 4, 1.0), (100_000, 51, 0.05)])
def test_headers_alone_are_read(size: int, reads: int, share: float) -> None:
    """Small members share reads, large ones are skipped: no byte is read twice."""
    data = b"".join(block(b"%d" % n, size) + padded(bytes(size)) for n in range(50)) + END
    asked = []

    def read(offset: int, size: int) -> bytes:
        asked.append(size)
        return data[offset : offset + size]

    assert len(list(members(read, len(data), "x.tar"))) == 50
    assert len(asked) <= reads and sum(asked) <= share * len(data)


@pytest.mark.parametrize("format", FORMATS)
def test_a_flipped_bit_of_a_header_is_found(format: str, seed: int) -> None:
    """One of every byte. Legal outcomes: an error; in the checksum's own field, which has several spellings, the same listing."""
    draw = random.Random(seed)
    data = packed(format, [b"\xe9" * 101] if format == "gnu" else [b"a.JPEG"])
    good = listed(data)
    assert (good[0].offset > 512) == (format != "ustar")  # an extension header comes first
    heads = {0, *(m.offset - 512 for m in good)}
    for place in (head + n for head in heads for n in range(512)):
        bit = draw.randrange(8)
        try:
            assert listed(flipped(data, place, bit)) == good and place % 512 in range(148, 156), (place, bit)
        except AlexprepError:
            continue


def test_any_flipped_bit_of_a_pax_header_is_found_or_seen() -> None:
    """Legal outcomes: an error; another name for that member alone; in the comment also the same listing."""
    comment, path = record(b"comment", b"none"), record(b"path", b"n01440764/" + b"x" * 100)
    data = extension(b"x", comment + path) + block(size=3) + padded(b"abc") + block(b"b") + END
    good = listed(data)
    for place in range(512, 512 + len(comment + path)):
        for bit in range(8):
            try:
                found = listed(flipped(data, place, bit))
            except AlexprepError:
                continue
            assert [found[0]._replace(name=good[0].name), *found[1:]] == good
            assert found != good or place < 512 + len(comment), (place, bit)


@pytest.mark.parametrize("format", FORMATS)
def test_any_cut_is_found(format: str) -> None:
    """At every block, around the end and between; only the padding behind the first empty block may be missing."""
    data = packed(format, [b"a.JPEG", *(LONG_NAMES[:1] if format != "ustar" else [])], seed=3)
    good = listed(data)
    end = len(data.rstrip(b"\0")) + 511 & -512
    assert good[-1].offset == end
    for cut in (*range(0, len(data), 512), *range(0, len(data), 37), *range(end - 600, end + 600), len(data)):
        if cut < end + 512:
            assert "cut short" in refused(data[:cut])
        else:
            assert listed(data[:cut]) == good


def _off_by(difference: int) -> bytes:
    head = block()
    return head[:148] + b"%06o" % (int(head[148:154], 8) + difference) + head[154:]


HUGE = b"\x80" + bytes(6) + b"\x01\0\0\0\0"  # 4 GiB
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "ends before the empty block"),
    "a web page": (b"<html>" * 200, "no tar archive"),
    "no checksum": (block()[:148] + bytes(8) + block()[156:] + END, "no tar archive"),
    "second header bad": (block() + b"x" * 512 + END, "byte 512: a header's checksum is wrong"),
    "checksum 256 off": (_off_by(256) + END, "no tar archive"),
    "checksum -256 off": (_off_by(-256) + END, "no tar archive"),
    "odd magic": (block(magic=b"ustar\x0001") + END, "kind of tar"),
    "size -1": (block(size=b"\xff" * 12) + END, "no number"),
    "size -512, back to itself": (block(size=b"\xff" * 10 + b"\xfe\0") + END, "no number"),
    "size -1 in digits": (block(size=b"-0000000001\0") + END, "no number"),
    "size in underscores": (block(size=b"0000000_001\0") + END, "no number"),
    "size in nines": (block(size=b"00000000009\0") + END, "no number"),
    "size of spaces": (block(size=b" " * 12) + END, "no number"),
    "no size": (block(size=bytes(12)) + END, "no number"),
    "size of 2**94": (block(size=b"\xbf" + b"\xff" * 11) + END, "go beyond"),
    "a PiB": (block(size=b"\x80" + (2**50).to_bytes(11, "big")) + END, "go beyond"),
    "one byte too many": (block(size=1025) + END, "go beyond"),
    "empty name": (block(b"") + END, "name is empty"),
    "empty name behind a prefix": (block(b"", _345=97) + END, "name is empty"),
    "NUL in a name": (block(b"a\0b") + END, "NUL"),
    "unknown type": (block(kind=b"\x01") + END, "type"),
    "another volume": (block(kind=b"M") + END, "type"),
    "sparse, not GNU": (block(kind=b"S") + END, "type"),
    "sparse map to the end": (block(kind=b"S", magic=b"ustar  \0", _482=1) + b"\1" * 5120, "map of a sparse file"),
    "folder with data": (block(b"a/", 512) + bytes(512) + END, "read differently"),
    "link with data": (block(size=512, kind=b"1") + bytes(512) + END, "read differently"),
    "device with data": (block(size=512, kind=b"3") + bytes(512) + END, "read differently"),
    "long name of 4 GiB": (block(size=HUGE, kind=b"L") + END, "at most 1,048,576"),
    "pax header of 4 GiB": (block(size=HUGE, kind=b"x") + END, "at most 1,048,576"),
    "global pax header of 4 GiB": (block(size=HUGE, kind=b"g") + END, "at most 1,048,576"),
    "long name beyond the end": (block(size=4096, kind=b"L") + END, "goes beyond"),
    "long name of nothing": (extension(b"L", b"\0\0") + block() + END, "is empty"),
    "NUL in a long name": (extension(b"L", b"a\0b\0") + block() + END, "NUL"),
    "long name that goes on": (block(size=2, kind=b"L") + padded(b"a\0b") + block() + END, "more than zeros follow"),
    "long name behind nothing": (extension(b"L", b"a\0") + END, "no member behind"),
    "long link behind nothing": (extension(b"K", b"a\0") + END, "no member behind"),
    "pax header behind nothing": (extension(b"x", b"") + END, "no member behind"),
    "two long names": (extension(b"L", b"a\0") * 2 + block() + END, "follows another"),
    "two pax headers": (extension(b"x", b"") * 2 + block() + END, "follows another"),
    "pax header and long name": (extension(b"x", b"") + extension(b"L", b"a\0") + block() + END, "follows another"),
    "long link and pax header": (extension(b"K", b"a\0") + extension(b"x", b"") + block() + END, "follows another"),
    "pax and global header": (extension(b"x", b"") + extension(b"g", b"") + block() + END, "follows another"),
    "global path": (extension(b"g", record(b"path", b"b")) + block() + END, "all members one path"),
    "global size": (extension(b"g", record(b"size", b"0")) + block() + END, "all members one size"),
    "data behind the end": (block() + END + block() + END, "byte 1,536: data follow the end"),
    "data behind one empty block": (block() + bytes(512) + block() + END, "data follow the end"),
    "half an empty block": (block() + bytes(511), "cut short"),
    "endless padding": (block() + bytes(MAX_PADDING_BYTES + 512), "did not end"),
    "gzip": (gzip.compress(block() + END), "gunzip"),
    "bzip2": (b"BZh91AY&SY" + b"x" * 600, "bunzip2"),
    "xz": (b"\xfd7zXZ\0" + b"x" * 10, "unxz"),
    "zstd": (b"\x28\xb5\x2f\xfd" + b"x" * 600, "unzstd"),
}
PAX: dict[str, bytes] = {
    "no length": b"path=b\n",
    "length 0": b"0 path=b\n",
    "length in zeros": b"0009 path=b\n",
    "length too small": b"8 path=b\n",
    "length 1": b"1 path=b\n",
    "length too large": b"11 path=b\n",
    "length of 4 GiB": b"4294967296 path=b\n",
    "negative length": b"-9 path=b\n",
    "no key": record(b"", b"b"),
    "no equals sign": b"9 path b\n",
    "no newline": b"9 path=bb",
    "newline in a key": record(b"a\npath", b"b"),
    "zeros behind": record(b"path", b"b") + b"\0",
    "empty path": record(b"path", b""),
    "NUL in a path": record(b"path", b"a\0b"),
    "two paths": record(b"path", b"b") * 2,
    "size -1": record(b"size", b"-1"),
    "size in hex": record(b"size", b"0x1"),
    "size of 5,000 digits": record(b"size", b"9" * 5000),
    "another size": record(b"size", b"512"),
    "a PiB": record(b"size", b"%d" % 2**50),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives(case: str) -> None:
    data, message = HOSTILE[case]
    tracemalloc.start()
    try:
        assert message in refused(data)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", PAX)
def test_hostile_pax_records(case: str) -> None:
    refused(extension(b"x", PAX[case]) + block() + bytes(512) + END)


def test_an_archive_that_shrinks_meanwhile() -> None:
    for there in (0, 600):
        with pytest.raises(AlexprepError, match=f"{there} can be read.* cut short"):
            list(members(lambda offset, size, there=there: bytes(there), 10_240, "x.tar"))  # type: ignore[misc]


def _fill(draw: random.Random, raw: bytearray) -> None:
    """Random bytes into a random field."""
    begin, end = draw.choice([(0, 100), (124, 136), (156, 157), (257, 265), (345, 500), (482, 483), (0, 512)])
    raw[begin:end] = draw.randbytes(end - begin)


def _nudge(draw: random.Random, raw: bytearray) -> None:
    """Up to 4 random bytes, often ones that mean something."""
    for _ in range(draw.randint(1, 4)):
        raw[draw.choice([draw.randrange(512), 124, 135, 156, 257])] = draw.choice(
            b"\0 01257LKxgSM/\x80\xff" + draw.randbytes(1)
        )


def test_random_headers_end_well(seed: int) -> None:
    """5,000 archives, most with checksums put right: an error, or members that ascend within the archive."""
    draw = random.Random(seed)
    mutations: list[Callable[[random.Random, bytearray], None]] = [_fill, _nudge]
    whole = [extension(b"x", record(b"path", b"p")) + block(size=3) + padded(b"abc") + block(b"b") + END]
    whole += [
        extension(b"L", b"long\0", magic=b"ustar  \0") + block(magic=b"ustar  \0") + block(b"c/", kind=b"5") + END
    ]
    listings = 0
    for _ in range(5000):
        data = draw.choice(whole)
        for place in draw.sample(range(0, len(data) - 1024, 512), draw.choice([1, 1, 2])):
            raw = bytearray(data[place : place + 512])
            draw.choice(mutations)(draw, raw)
            data = data[:place] + (summed(raw) if draw.random() < 0.9 else bytes(raw)) + data[place + 512 :]
        try:
            found = listed(data)
        except AlexprepError:
            continue
        listings += 1
        ends = [0, *(place for m in found for place in (m.offset, m.offset + m.size)), len(data) - 512]
        assert ends == sorted(ends) and all(m.name and b"\0" not in m.name for m in found)
    assert 250 < listings < 4750


@pytest.mark.parametrize("size", [b"-0000001000", b"-1", b"\xff" * 12, b"0o10", b"1_0", b"+1"])
def test_an_index_over_a_header_whose_size_is_none(size: bytes) -> None:
    """A negative size before a member would lead back to its own header, for ever."""
    data = block(b"pax", size, b"x") + block(b"a.jpg") + bytes(1024)
    index = b"v1.2 1\njpg 1024 0 a.jpg\n"
    with pytest.raises(ValueError, match="line 2 does not tell what the tar has at byte 1,024"):
        read_dali_index(index, lambda offset, size: data[offset : offset + size], b"x.tar")
    sound = block(b"pax", 0, b"x") + data[512:]
    (found,) = read_dali_index(index, lambda offset, size: sound[offset : offset + size], b"x.tar")
    assert found.member == b"a.jpg"
