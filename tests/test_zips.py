"""Zips of class folders: what Python's zipfile writes is read in place; what is damaged, hostile or encrypted is refused."""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sources import zips
from alexprep.shards.sources.base import Account, Location
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.sources.zips import ZipOfClassFolders, zip_members
from alexprep.shards.storage import LocalFiles
from alexprep.shards.worker_pool import InProcessEngine
from tests.source_checks import fails, flipped

MEMBERS = {"a/1.jpg": b"one" * 50, "b/2.jpg": bytes(1000), "b/3.jpg": b"", "b/ä.jpg": b"four"}
DEFLATED, STORED = zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED


def write_zip(path: Path, members: dict[str, bytes], method: int = DEFLATED, comment: bytes = b"") -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.comment = comment
    return path


def read_back(path: Path) -> dict[str, bytes]:
    """What our reader gives of every member."""
    source = ZipOfClassFolders(LocalFiles(str(path.parent).encode()), ((None, path.name.encode()),))
    return {
        at.member.decode("utf-8", "surrogateescape"): source.read(at) for at in source.each_once(path.name.encode())
    }


def entry(archive: bytes, number: int = 0) -> int:
    """Where an entry of the directory begins."""
    place = -1
    for _ in range(number + 1):
        place = archive.index(b"PK\1\2", place + 1)
    return place


@pytest.mark.parametrize("where", ["disk", "store"])
def test_shards_are_those_of_the_same_class_folders(where: str, photos: Path, data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for n, path in enumerate(sorted(photos.rglob("*.JPEG"), reverse=True)):
            archive.write(path, path.relative_to(photos), STORED if n % 2 else DEFLATED)
        archive.writestr("__MACOSX/train/class0/._000.JPEG", b"a fork")
        archive.writestr("train/.DS_Store", b"")
        archive.writestr("train/README.txt", b"")
        archive.mkdir("empty")
    place = str(tmp_path / "photos.zip")
    if where == "store":
        fsspec.filesystem("memory").put(place, "/zips/photos.zip")
        place = "memory://zips/photos.zip"
        source = find_source(place)
        first = next(iter(source.inputs(Account())))
        assert source.read(first.location) == (photos / first.location.member.decode()).read_bytes()
        return
    report = convert(place, tmp_path / "out", ShardOptions(Target(size=64), shard_samples=7), InProcessEngine())
    assert sum(passed.count for passed in report.passed_over.values()) == 3
    for path in sorted(data.rglob("*.tar")):
        assert (tmp_path / "out" / path.relative_to(data)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_every_form_that_zipfile_writes_is_read(method: int, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", MEMBERS, method, comment=b"PK\5\6 is no end" * 9)
    assert read_back(path) == MEMBERS

    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: object) -> int:
            raise OSError("a pipe")

    for wide in (False, True):  # sizes behind the data, also of 64 bits
        stream = Stream()
        with zipfile.ZipFile(stream, "w", method) as archive:
            for name, content in MEMBERS.items():
                with archive.open(name, "w", force_zip64=wide) as file:
                    file.write(content)
        path.write_bytes(stream.getvalue())
        assert read_back(path) == MEMBERS
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in MEMBERS.items():
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(content)
    assert read_back(path) == MEMBERS


def test_a_directory_of_64_bits_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As zipfile writes it where an archive has 4 GiB or 65,535 members."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    monkeypatch.setattr(zips, "_CHUNK", 1)
    path = write_zip(tmp_path / "x.zip", MEMBERS)
    raw = path.read_bytes()
    assert b"PK\6\6" in raw and b"PK\6\7" in raw
    assert read_back(path) == MEMBERS
    path.write_bytes(raw.replace(b"PK\6\6", b"PK\6\5"))
    with pytest.raises(AlexprepError, match=r"has no directory where its end says"):
        read_back(path)


def test_names_are_those_that_unpacking_gives(tmp_path: Path) -> None:
    """UTF-8 where it says so, or was made on Unix in such bytes; else code page 437; and \\ from DOS is /."""
    path = tmp_path / "x.zip"
    for made, flag, raw, name in (
        (0, 0, b"k\x84se/1.jpg", "käse/1.jpg"),
        (3, 0, "käse/1.jpg".encode(), "käse/1.jpg"),
        (0, 0x800, "käse/1.jpg".encode(), "käse/1.jpg"),
        (3, 0, b"k\x84se/1.jpg", "käse/1.jpg"),
        (0, 0, b"kase\\1.jpg", "kase/1.jpg"),
        (3, 0, b"k\\se/1.jpg", "k\\se/1.jpg"),
        (3, 0, b".././/a/b.jpg", "a/b.jpg"),
    ):
        info = zipfile.ZipInfo("x" * len(raw))
        info.create_system = made
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(info, b"data")
        data = bytearray(path.read_bytes().replace(b"x" * len(raw), raw))
        for place, flags_at in ((0, 6), (entry(bytes(data)), 8)):
            struct.pack_into("<H", data, place + flags_at, flag)
        path.write_bytes(data)
        assert read_back(path) == {name: b"data"}
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("ascii/1.jpg")
        info.extra = struct.pack("<2HBL", 0x7075, 5 + 12, 1, zlib.crc32(b"ascii/1.jpg")) + "käsé/1.jpg".encode()
        archive.writestr(info, b"data")
    assert read_back(path) == {"käsé/1.jpg": b"data"}


def test_links_are_rejected_and_folders_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("a/link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("a/1.jpg", b"one")
        archive.mkdir("b")
    source = find_source(str(path))
    inputs = [item.location for item in source.inputs(Account())]
    assert [at.member for at in inputs] == [b"a/1.jpg", b"a/link.jpg"]
    with pytest.raises(OSError, match="a link or special file in an archive"):
        source.read(inputs[1])


def changed(number: int, at: int, form: str, value: int, *, own: int | None = None) -> Callable[[bytes], bytes]:
    """Changes a field of an entry, and of the member's own header."""

    def change(raw: bytes) -> bytes:
        data = bytearray(raw)
        struct.pack_into(form, data, entry(raw, number) + at, value)
        if own is not None:
            struct.pack_into(form, data, own, value)
        return bytes(data)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw[:-1], "has no directory at its end: it is no zip, or was cut short"),
        (lambda raw: raw + b"x", "has no directory at its end"),
        (lambda raw: b"#!/bin/sh\n" + raw, "its directory is not where its end says"),
        (lambda raw: raw[:40] + raw[50:], "its directory is not where its end says"),
        (
            lambda raw: raw[: entry(raw)] + raw[entry(raw) :].replace(b"PK\1\2", b"PK\1\3"),
            "entry 1 of 4 of its directory is damaged",
        ),
        (changed(1, 8, "<H", 1), "b/2.jpg is encrypted: unpack it with its password"),
        (changed(1, 10, "<H", 99), "b/2.jpg is packed by AES: only stored and deflated members are read"),
        (changed(1, 10, "<H", 77), "b/2.jpg is packed by method 77"),
        (changed(1, 10, "<H", 0), "b/2.jpg is stored in 11 bytes, and has 1,000"),
        (changed(1, 42, "<L", 0), "has members that lie in each other"),
        (changed(1, 20, "<L", 10**6), "entry 2 of 4 of its directory tells of data beyond the directory"),
        (changed(1, 24, "<L", 2**32 - 1), "entry 2 of 4 of its directory has no sizes of 64 bits where it needs them"),
        (lambda raw: raw.replace(b"b/2.jpg", b"a/1.jpg"), "holds a/1.jpg twice, which programs read differently"),
        (lambda raw: raw.replace(b"b/2.jpg", b"b/2\0jpg"), "with a NUL, which programs read differently"),
        (lambda raw: raw[:-14] + struct.pack("<2H", 4, 5) + raw[-10:], "is one of several parts"),
        (lambda raw: raw[:-14] + struct.pack("<2H", 3, 3) + raw[-10:], "has more in its directory than the 3 entries"),
        (lambda raw: raw[:-14] + struct.pack("<2H", 5, 5) + raw[-10:], "its directory is not where its end says"),
        (lambda raw: raw[:0], "has no directory at its end"),
    ],
)
def test_archives_that_make_no_sense_are_refused(change: Callable[[bytes], bytes], words: str, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", MEMBERS)
    path.write_bytes(change(path.read_bytes()))
    fails(path, words)


def test_what_is_no_picture_may_be_packed_as_it_likes(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", MEMBERS)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("readme.txt", b"text" * 100)
    assert len(list(find_source(str(path)).inputs(Account()))) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda raw: flipped(raw, 45, 2),
            "another CRC-32|compressed data are damaged|has .*bytes, and should|do not end",
        ),
        (lambda raw: raw[:22] + struct.pack("<L", 149) + raw[26:], "it has more than 149 bytes|has more than"),
        (lambda raw: raw[:22] + struct.pack("<L", 151) + raw[26:], "it has 150 bytes, and should have 151"),
        (lambda raw: raw[:14] + struct.pack("<L", 7) + raw[18:], "its bytes have another CRC-32"),
        (lambda raw: raw[:8] + struct.pack("<H", 12) + raw[10:], "it is packed by method 12"),
        (lambda raw: b"XX" + raw[2:], "has no member where its directory says"),
        (lambda raw: raw[:30] + b"z" + raw[31:], "is another one than beside its data"),
        (lambda raw: raw[:60], "is shorter than it was when it was listed|bytes"),
        (lambda raw: raw[:9], "is shorter than it was when it was listed"),
        (lambda raw: raw[:22] + struct.pack("<L", 2**30 + 1) + raw[26:], "more than the limit of 1,073,741,824"),
    ],
)
def test_a_damaged_member_is_rejected_alone(change: Callable[[bytes], bytes], words: str, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"a/1.jpg": random.Random(3).randbytes(75) * 2, "b/2.jpg": b"two"})
    source = find_source(str(path))
    first, second = (item.location for item in source.inputs(Account()))
    raw = path.read_bytes()
    path.write_bytes(change(raw))
    with pytest.raises(OSError, match=words):
        source.read(first)
    if len(path.read_bytes()) == len(raw):
        assert source.read(second) == b"two"


def test_a_member_is_inflated_no_further_than_it_tells(tmp_path: Path) -> None:
    """A megabyte of zeros that claims to be ten bytes."""
    path = write_zip(tmp_path / "x.zip", {"a/1.jpg": bytes(2**20)})
    raw = bytearray(path.read_bytes())
    for place in (22, entry(bytes(raw)) + 24):
        struct.pack_into("<L", raw, place, 10)
    path.write_bytes(raw)
    with pytest.raises(OSError, match="it has more than 10 bytes, and should have 10"):
        read_back(path)


def test_any_flipped_bit_gives_the_same_or_an_error(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = write_zip(tmp_path / "x.zip", MEMBERS)
    good = path.read_bytes()
    for _ in range(200):
        path.write_bytes(flipped(good, rng.randrange(len(good)), rng.randrange(8)))
        try:
            found = read_back(path)
        except (AlexprepError, OSError):
            continue
        assert sorted(found.values()) == sorted(MEMBERS.values()) or len(found) < 4
    for length in range(len(good)):
        cut = good[:length]
        with pytest.raises(AlexprepError):
            list(zip_members(lambda offset, size: cut[offset : offset + size], length, "x.zip"))  # noqa: B023


def test_several_zips_are_splits(photos: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        names = sorted((photos / split).rglob("*.JPEG"))
        write_zip(
            tmp_path / f"{split}.zip", {str(path.relative_to(photos / split)): path.read_bytes() for path in names}
        )
    (tmp_path / "list.txt").write_text("")
    account = Account()
    inputs = list(find_source(str(tmp_path)).inputs(account))
    assert [(item.split, item.class_name, item.location.member) for item in inputs] == sorted(
        (path.parts[-3], path.parent.name, f"{path.parent.name}/{path.name}".encode())
        for path in photos.rglob("*.JPEG")
    )
    assert account.found == 69 and account.passed_over_count == 1
    assert isinstance(inputs[0].location, Location)
    write_zip(tmp_path / "more.zip", MEMBERS)
    fails(tmp_path, "more.zip names no split, and there are 3 archives")
