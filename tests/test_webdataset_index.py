"""Other people's tars, indexed: every offset by tarfile, every size by Pillow; what is bad, stale, damaged or contended."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alexprep.shards import webdataset_index
from alexprep.shards.dataset_format import INDEX_DTYPE
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Codec, Target
from alexprep.shards.image_header import Header, Refused, read_header
from alexprep.shards.webdataset_index import TarIndex, index_tars
from tests.source_checks import FORMATS, flipped, make_idx, write_tar

Encode = Callable[..., bytes]
Images = list[tuple[str, bytes]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture(scope="module")
def images(photo: Callable[..., Image.Image], encoded: Encode) -> Images:
    """(extension, bytes): odd, oblong, grey, with alpha, with EXIF before the frame, of each type."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn, which is not to be applied
    exif[0x010E] = "x" * 5000  # the frame lies behind the first 2 KiB
    return [
        ("jpg", encoded(photo(33, 47, 1))),
        ("jpg", encoded(photo(61, 20, 2), exif=exif)),
        ("jpeg", encoded(photo(47, 33, 3).convert("L"))),
        ("JPEG", encoded(photo(40, 31, 4).convert("CMYK"))),
        ("jpg", encoded(photo(90, 17, 5), progressive=True)),
        ("png", encoded(photo(17, 90, 6), "PNG")),
        ("png", encoded(photo(19, 8, 7).convert("P"), "PNG")),
        ("img.png", encoded(photo(21, 22, 8).convert("RGBA"), "PNG")),
        ("webp", encoded(photo(75, 100, 9), "WEBP")),
        ("webp", encoded(photo(31, 29, 10), "WEBP", lossless=True)),
        ("webp", encoded(photo(30, 41, 11), "WEBP", exif=exif)),
        ("bmp", encoded(photo(13, 27, 12), "BMP")),
        ("ppm", encoded(photo(14, 9, 13), "PPM")),
    ]


@pytest.fixture(scope="module")
def jpg(images: Images) -> bytes:
    return images[0][1]


def pairs(images: Images, key: str = "{:04d}", count: int = 0) -> Images:
    """Members KEY.image KEY.cls."""
    chosen = images if not count else [images[n % len(images)] for n in range(count)]
    return [
        member
        for n, (extension, content) in enumerate(chosen)
        for member in ((f"{key.format(n)}.{extension}", content), (f"{key.format(n)}.cls", str(n % 5).encode()))
    ]


def check_against_others(found: TarIndex) -> None:
    """Offsets and sizes are those that tarfile finds, heights and widths those that Pillow finds."""
    assert found.records.dtype == INDEX_DTYPE
    expected: list[tuple[int, ...]] = []
    for number, path in enumerate(found.paths):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile() and not member.name.endswith((".cls", ".json", ".txt")):
                    content = tar.extractfile(member)
                    assert content is not None
                    with Image.open(content) as image:
                        expected.append((number, member.offset_data, member.size, image.height, image.width))
    assert found.records[["shard", "offset", "size", "height", "width"]].tolist() == expected


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the tars that are scanned, as they are."""
    names: list[str] = []
    scan = webdataset_index.scan_tar

    def counting(path: Path) -> Any:
        names.append(path.name)
        return scan(path)

    monkeypatch.setattr(webdataset_index, "scan_tar", counting)
    yield names


@pytest.mark.parametrize("form", FORMATS)
def test_everything_is_where_tarfile_and_pillow_find_it(form: str, images: Images, tmp_path: Path) -> None:
    long = "d/" * 10 + "e" * 70 + "/" if form == "ustar" else "d/" * 60 + "e" * 100 + "/"
    write_tar(tmp_path / "a.tar", pairs(images, "./some.where/{:03d}"), form)
    write_tar(tmp_path / "b.tar", pairs(images, long + "{:03d}"), form)
    found = index_tars(tmp_path)
    assert [path.name for path in found.paths] == ["a.tar", "b.tar"] and not found.bad
    check_against_others(found)
    assert found.records["label"].tolist() == [n % 5 for n in range(len(images))] * 2
    assert found.classes == ["0", "1", "2", "3", "4"]


def test_shards_of_webdataset_and_numbers_in_json(images: Images, tmp_path: Path) -> None:
    import webdataset as wds

    with wds.ShardWriter(str(tmp_path / "set-%04d.tar"), maxcount=5, verbose=0) as writer:
        for n, (extension, content) in enumerate(images):
            writer.write({"__key__": f"k{n:03d}", extension: content, "json": {"label": 10 * n, "caption": "x"}})
    found = index_tars(f"{tmp_path}/set-{{0000..0002}}.tar")
    check_against_others(found)
    assert found.records["label"].tolist() == [10 * n for n in range(len(images))]
    assert found.classes == [str(n) for n in range(121)]


def test_names_as_labels(jpg: bytes, tmp_path: Path) -> None:
    texts = ["tabby cat", "Zebra", "zebu", "é", "tabby cat"]
    members = {f"{n}.{e}": c for n, text in enumerate(texts) for e, c in (("jpg", jpg), ("label", text.encode()))}
    write_tar(tmp_path / "x.tar", members)
    found = index_tars(tmp_path / "x.tar")
    assert found.classes == ["Zebra", "tabby cat", "zebu", "é"]
    assert [found.classes[label] for label in found.records["label"]] == texts
    write_tar(tmp_path / "y.tar", {"a.jpg": jpg, "a.cls": b"7"})
    with pytest.raises(AlexprepError, match="has numbers as labels, but also 'Zebra': make them alike"):
        index_tars(tmp_path)


def test_class_names_of_a_dataset_json(jpg: bytes, tmp_path: Path) -> None:
    labels = [b"2", b"crane", b"1", b"3", b"stork", b"0"]
    members = {f"{n}.{e}": c for n, label in enumerate(labels) for e, c in (("jpg", jpg), ("cls", label))}
    write_tar(tmp_path / "train" / "0.tar", members)
    document = {"format": "alexprep data set", "classes": ["crane", "heron", "crane"]}
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    found = index_tars(tmp_path)
    assert found.classes == ["crane", "heron", "crane"]  # ImageNet has such a pair
    assert found.records["label"].tolist() == [2, 0, 1, 0]
    assert len(found.bad) == 2 and all("none of the 3 classes of the dataset.json" in bad.reason for bad in found.bad)


def huge(width: int, height: int) -> bytes:
    """The header of a large PNG."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header)) + bytes(50)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"b.jpg": None}, "has no label among jpg"),
        ({"b.jpg": None, "b.png": b"", "b.cls": b"1"}, "has 2 images among jpg, png, cls"),
        ({"b.jpg": None, "b.JPG": None, "b.cls": b"1"}, "has two .jpg"),
        ({"b.jpg": None, "b.cls": b"9" * 5000}, "has no label in its .cls: the label has 5,000 characters"),
        ({"b.jpg": None, "b.json": b"[" * 100_000}, "has no label in its .json"),
        ({"b.jpg": None, "b.json": b'{"text": 1}'}, "has no label in its .json"),
        ({"b.jpg": None, "b.json": b'{"label": null}'}, "has no label in its .json"),
        ({"b.jpg": None, "b.json": b"[1]"}, "has no label in its .json"),
        ({"b.jpg": None, "b.json": b'{"label": "\\ud800"}'}, "has no label in its .json"),
        ({"b.jpg": None, "b.json": b'{"label": NaN}'}, "has no label in its .json"),
        ({"b.jpg": None, "b.json": b'{"label": -Infinity}'}, "has no label in its .json"),
        ({"b.jpg": None, "b.json": b'{"label": [1, 2]}'}, "has no label in its .json: it has several labels"),
        ({"b.jpg": None, "b.cls": b"\xff\xfe"}, "has no label in its .cls"),
        ({"b.jpg": None, "b.cls": b""}, "has no label in its .cls: the label is missing"),
        (
            {"b.jpg": None, "b.cls": b"-1"},
            "has no label in its .cls: the label -1 is below 0: number the classes from 0",
        ),
        ({"b.jpg": None, "b.cls": b"1", "b.CLS": b"2"}, "has two .cls"),
        ({"b.npy": b"x", "b.cls": b"1"}, "has 0 images among npy, cls, expected one; .npy counts only below"),
        ({"b.jpg": None, "b.cls": b"1" * (2**20 + 1)}, "has a label of 1,048,577 bytes"),
        ({"b.jpg": b"", "b.cls": b"1"}, "cannot be used: empty file"),
        ({"b.jpg": b"not an image", "b.cls": b"1"}, "not an image of a known type (first bytes 6e 6f"),
        ({"b.gif": b"GIF89a" + bytes(50), "b.cls": b"1"}, "not a JPEG, PNG"),
        ({"b.png": huge(20_000, 10_000), "b.cls": b"1"}, "20000x10000 pixels are more than the limit of 80,000,000"),
        ({"b.png": huge(70_000, 10), "b.cls": b"1"}, "a side of 70,000 pixels"),
        ({"b.png": huge(0, 10), "b.cls": b"1"}, "0x10 pixels"),
        ({"b.jpg": b"link", "b.cls": b"1"}, "has a link or special file as its image"),
        ({"b.jpg": None, "b.cls": b"link"}, "has a link or special file as its .cls"),
    ],
)
def test_one_bad_sample_costs_nothing_but_itself(
    members: dict[str, Any], words: str, jpg: bytes, tmp_path: Path
) -> None:
    whole = {"a.jpg": jpg, "a.cls": b"3", **members, "c.cls": b"4", "c.jpg": jpg}
    write_tar(tmp_path / "x.tar", {name: jpg if content is None else content for name, content in whole.items()})
    found = index_tars(tmp_path)
    assert found.records["label"].tolist() == [3, 4]
    ((shard, key, reason),) = found.bad
    assert (shard, key) == (tmp_path / "x.tar", "b") and words in reason


def test_scattered_samples(jpg: bytes, tmp_path: Path) -> None:
    names = ["a.jpg", "a.cls", "b.jpg", "b.cls", "a.txt", "c.jpg", "b.jpg", "b.cls", "c.cls"]
    write_tar(tmp_path / "x.tar", [(name, jpg if name.endswith("jpg") else b"1") for name in names])
    found = index_tars(tmp_path)
    assert len(found.records) == 2
    scattered = [(bad.key, "is scattered" in bad.reason) for bad in found.bad]
    assert scattered == [("a", True), ("c", False), ("b", True), ("c", True)]


def test_damaged_tars_are_errors_and_the_others_are_kept(
    jpg: bytes, images: Images, tmp_path: Path, scanned: list[str]
) -> None:
    write_tar(tmp_path / "a.tar", pairs(images))
    whole = write_tar(tmp_path / "b.tar", pairs(images)).read_bytes()
    with tarfile.open(tmp_path / "b.tar") as tar:
        place = tar.getmembers()[4].offset
    for damaged, words in (
        (whole[:place] + b"#" + whole[place + 1 :], rf"b\.tar, byte {place:,}: a header's checksum is wrong"),
        (whole[: place + 700], rf"b\.tar, byte {place:,}: a member's .+ bytes go beyond"),
    ):
        (tmp_path / "b.tar").write_bytes(damaged)
        with pytest.raises(AlexprepError, match=words):
            index_tars(tmp_path)
    assert scanned.count("a.tar") == 1
    (tmp_path / "b.tar").write_bytes(whole)
    assert len(index_tars(tmp_path).records) == 2 * len(images)
    write_tar(tmp_path / "b.tar", {"x.txt": b"", "y.jpg": jpg})
    with pytest.raises(AlexprepError, match=r"no sample can be used of 1 shards, .+b\.tar: sample x has 0 images"):
        index_tars(tmp_path / "b.tar")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("version", ["v1.1", "v1.2"])
def test_a_dali_index_changes_nothing(
    form: str,
    version: str,
    images: Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tar = write_tar(tmp_path / "x.tar", pairs(images, "some/{:03d}"), form)
    by_scan = index_tars(tar, cache=tmp_path / "one")
    make_idx(tar, version)
    monkeypatch.setattr(webdataset_index, "packed_files", lambda *_: pytest.fail("listed although there is an index"))
    by_index = index_tars(tar, cache=tmp_path / "two")
    assert (by_index.records == by_scan.records).all() and by_index.digest == by_scan.digest and not caplog.records


def test_a_dali_index_beside_long_names_and_folders(
    images: Images, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for form in FORMATS:
        names = f"folder/{'e' * (88 if form == 'ustar' else 120)}{{:03d}}"
        make_idx(write_tar(tmp_path / f"{form}.tar", [("folder/", b""), *pairs(images, names)], form))
    check_against_others(index_tars(tmp_path))
    # By GNU tar 1.34 and others, wds2idx gives the place of the long name as that of the data.
    assert all("gnu.idx does not fit" in record.getMessage() for record in caplog.records)


def _stale(text: str, line: int, field: int, change: Callable[[int], int]) -> str:
    lines = text.splitlines()
    fields = lines[line].split(" ")
    fields[field] = str(change(int(fields[field])))
    lines[line] = " ".join(fields)
    return "\n".join([*lines, ""])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda text: "", "version '' is none of v1.1, v1.2"),
        (lambda text: text.replace("v1.2", "v9.9"), "version 'v9.9'"),
        (lambda text: text.replace("v1.2 13", "v1.2 14"), "announces 14 samples and has 13"),
        (lambda text: text[:-5], "line 14 "),
        (lambda text: "v1.2 12\n" + "".join(text.splitlines(True)[1:-1]), "the tar goes on"),
        (lambda text: "v1.2 12\n" + "".join(text.splitlines(True)[2:]), "line 2 does not tell what the tar has"),
        (lambda text: _stale(text, 3, 1, lambda offset: offset + 512), "line 4 does not tell"),
        (lambda text: _stale(text, 3, 1, lambda offset: -offset), "line 4 does not tell"),
        (lambda text: _stale(text, 3, 2, lambda size: size - 1), "line 4 does not tell"),
        (lambda text: _stale(text, 3, 6, lambda size: 2), "line 4 does not tell"),
        (lambda text: text.replace("0002.cls", "0003.cls"), "line 4 does not tell"),
        (lambda text: text.replace("jpeg", "xxx"), "line 4 does not tell"),
        (lambda text: text.replace("cls", "c s"), "fields, no multiple of 4"),
        (lambda text: text.replace("jpg 512 ", "jpg what "), "invalid literal"),
        (lambda text: text.replace("jpg", "\0\xff"), "line 2 does not tell"),
    ],
)
def test_an_index_that_does_not_fit_is_passed_over_with_a_warning(
    harm: Callable[[str], str],
    words: str,
    images: Images,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tar = write_tar(tmp_path / "x.tar", pairs(images))
    idx = make_idx(tar)
    idx.write_text(harm(idx.read_text()))
    check_against_others(index_tars(tar))
    (record,) = caplog.records
    assert record.name == "alexprep" and record.levelno == logging.WARNING
    assert f"{idx} does not fit its tar" in record.getMessage() and words in record.getMessage()


def test_which_shards_a_source_names(jpg: bytes, tmp_path: Path) -> None:
    def named(source: Any, split: str = "train") -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in index_tars(source, split).paths]

    sample = {"a.jpg": jpg, "a.cls": b"0"}
    for name in ("plain/1.tar", "plain/0.tar", "told/set-val-0.tar", "told/set-train-0.tar", "told/rest.tar"):
        write_tar(tmp_path / name, sample)
    for name in ("deep/train/0.tar", "deep/validation/0.tar", "deep/other/0.tar"):
        write_tar(tmp_path / name, sample)
    assert named(tmp_path / "plain") == named(str(tmp_path / "plain"), "val") == ["plain/0.tar", "plain/1.tar"]
    assert named(tmp_path / "told") == ["told/rest.tar", "told/set-train-0.tar"]
    assert named(tmp_path / "told", "val") == ["told/set-val-0.tar"]
    assert named(tmp_path / "deep", "val") == ["deep/validation/0.tar"]
    assert named(f"{tmp_path}/plain/{{1,0}}.tar") == ["plain/1.tar", "plain/0.tar"]
    assert named(f"{tmp_path}/{{plain,deep/train}}/0.tar", "test") == ["plain/0.tar", "deep/train/0.tar"]
    several = named([tmp_path / "told/set-val-0.tar", tmp_path / "plain"])
    assert several == ["told/set-val-0.tar", "plain/0.tar", "plain/1.tar"]
    (tmp_path / "x.txt").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.tar")
    for source, split, words in (
        (tmp_path / "told", "test", r"told has no shard of the split 'test': .+; there are some of train, val"),
        (tmp_path / "user-cache", "train", r"no shard of the split 'train'"),
        (tmp_path / "nowhere.tar", "train", r"nowhere\.tar cannot be read \(No such file"),
        (f"{tmp_path}/plain/{{0..2}}.tar", "train", r"plain/2\.tar cannot be read \(No such file"),
        (tmp_path / "x.txt", "train", r"x\.txt is no \.tar"),
        (tmp_path / "pipe.tar", "train", "is no regular file"),
        ([], "train", "names no shard"),
        ([tmp_path / "plain", tmp_path / "plain/1.tar"], "train", r"plain/1\.tar is named twice"),
        ("s3://bucket/train-{0..9}.tar", "train", "is a URL: shards are read at random and must lie on a disk"),
    ):
        (tmp_path / "user-cache").mkdir(exist_ok=True)
        with pytest.raises(AlexprepError, match=words):
            index_tars(source, split)


def test_only_what_is_new_is_scanned(images: Images, tmp_path: Path, scanned: list[str]) -> None:
    folder = tmp_path / "set"
    for n in range(4):
        write_tar(folder / f"{n}.tar", [*pairs(images, f"{n}-{{:03d}}"), ("bad.jpg", b""), ("bad.cls", b"%d" % n)])
    first = index_tars(folder)
    assert sorted(scanned) == ["0.tar", "1.tar", "2.tar", "3.tar"] and len(first.bad) == 4
    again = index_tars(folder)
    assert len(scanned) == 4 and (again.records == first.records).all()
    assert again == replace(first, records=again.records)
    two = index_tars([folder / "3.tar", folder / "1.tar"])
    assert len(scanned) == 4 and [bad.shard.name for bad in two.bad] == ["3.tar", "1.tar"]
    assert two.records["offset"].tolist() == first.records["offset"][: 2 * len(images)].tolist()
    write_tar(folder / "1.tar", pairs(images[:3], "new{:03d}"))
    (folder / "2.tar").unlink()
    write_tar(folder / "4.tar", pairs(images[3:5], "more{:03d}"))
    changed = index_tars(folder)
    assert sorted(scanned[4:]) == ["1.tar", "4.tar"]
    assert np.bincount(changed.records["shard"]).tolist() == [len(images), 3, len(images), 2]
    assert changed.digest != first.digest
    os.utime(folder / "0.tar", ns=(1, 1))
    assert index_tars(folder).digest == changed.digest and scanned[6:] == ["0.tar"]


def test_a_tar_of_the_same_size_and_time_is_read_again(jpg: bytes, tmp_path: Path, scanned: list[str]) -> None:
    """As tools leave it that copy times: `rsync -a`, `cp -p`."""
    tar = tmp_path / "set" / "0.tar"
    for labels in ((0, 1), (1, 0)):
        members = {f"{n}.{e}": c for n, label in enumerate(labels) for e, c in (("jpg", jpg), ("cls", b"%d" % label))}
        write_tar(tar, members)
        os.utime(tar, ns=(10**18, 10**18))
        assert index_tars(tmp_path / "set").records["label"].tolist() == list(labels)
    assert scanned == ["0.tar", "0.tar"]


def test_a_moved_folder_keeps_its_index_and_its_digest(jpg: bytes, tmp_path: Path, scanned: list[str]) -> None:
    write_tar(tmp_path / "here" / "0.tar", {"a.jpg": jpg, "a.cls": b"1"})
    first = index_tars(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert index_tars(tmp_path / "there").digest == first.digest and len(scanned) == 1
    assert index_tars(tmp_path / "there" / "0.tar").digest == first.digest and len(bytes.fromhex(first.digest)) == 32
    write_tar(tmp_path / "other" / "0.tar", {"a.jpg": jpg, "a.cls": b"2"})
    assert index_tars(tmp_path / "other").digest != first.digest


def test_a_damaged_index_is_made_anew(images: Images, tmp_path: Path, scanned: list[str], seed: int) -> None:
    write_tar(tmp_path / "set" / "0.tar", [*pairs(images), ("bad.jpg", b"")])
    first = index_tars(tmp_path / "set")
    kept = tmp_path / "set" / ".alexprep" / "0.tar.index"
    whole = kept.read_bytes()
    draw = random.Random(seed)
    harmed = [b"", whole[:100], whole[:-1], b"x" * 1000]
    for _ in range(50):
        harmed.append(flipped(whole, draw.randrange(len(whole)), draw.randrange(8)))
    for content in harmed:
        kept.write_bytes(content)
        found = index_tars(tmp_path / "set")
        assert (found.records == first.records).all() and (found.bad, found.digest) == (first.bad, first.digest)
    assert len(scanned) == 1 + len(harmed)


def test_places_to_keep_an_index_in(
    jpg: bytes,
    tmp_path: Path,
    scanned: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_tar(tmp_path / "set" / "0.tar", {"a.jpg": jpg, "a.cls": b"1"})
    blocked = tmp_path / "set" / ".alexprep"
    blocked.write_bytes(b"")  # a folder of that name cannot be made, not even by root
    for _ in range(2):
        index_tars(tmp_path / "set")
    assert len(list((tmp_path / "user-cache" / "alexprep").iterdir())) == len(scanned) == 1
    for _ in range(2):
        index_tars(tmp_path / "set", cache=tmp_path / "mine")
    assert len(list((tmp_path / "mine").iterdir())) == 1 and len(scanned) == 2
    with pytest.raises(AlexprepError, match=r"cannot be written .+: name another folder"):
        index_tars(tmp_path / "set", cache=blocked / "x")
    assert not caplog.records
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    for _ in range(2):
        index_tars(tmp_path / "set")
    assert len(scanned) == 5 and "indexes cannot be kept ([Errno" in caplog.text


def test_workers_find_the_same(images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        write_tar(tmp_path / f"{n}.tar", pairs(images, f"{n}-{{:03d}}"))
    here = index_tars(tmp_path, cache=tmp_path / "one")
    monkeypatch.setattr(webdataset_index, "_FEW_BYTES", 0)
    monkeypatch.setattr(webdataset_index, "cores", lambda: 2)
    monkeypatch.setattr(webdataset_index, "scan_tar", lambda path: pytest.fail("scanned in this process"))
    there = index_tars(tmp_path, cache=tmp_path / "two")
    assert (there.records == here.records).all() and there.digest == here.digest
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # one core is left for each rank
    with pytest.raises(pytest.fail.Exception, match="scanned in this process"):
        index_tars(tmp_path, cache=tmp_path / "three")


def header_of(data: bytes) -> Header | Refused:
    return read_header(lambda offset, size: data[offset : offset + size], 0, len(data))


def test_headers_agree_with_the_decoder(images: Images, encoded: Encode) -> None:
    codec = Codec(Target())
    pixels = np.random.default_rng(5).integers(0, 256, (17, 31, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    frame = (jpeg := encoded(photo)).index(b"\xff\xc0")
    portable = b"P6 # two\n# lines\n31 #\n17\n255\n" + pixels.tobytes()
    core = b"BM" + struct.pack("<IHHIIHHHH", 26 + 96 * 17, 0, 0, 26, 12, 31, 17, 1, 24) + bytes(96 * 17)
    bitmap = encoded(photo, "BMP")
    upside_down = bitmap[:22] + struct.pack("<i", -17) + bitmap[26:]
    filled = jpeg[:frame] + b"\xff" * 9 + jpeg[frame:]
    alpha = encoded(photo.convert("RGBA"), "WEBP", lossless=True, exact=True)
    grey = encoded(photo.convert("L"), "PPM")
    rarer = (portable, grey, core, bitmap, upside_down, filled, alpha)
    for data in (*(content for _, content in images), *rarer):
        found, decoded = header_of(data), codec.decode(data)
        assert isinstance(found, Header) and decoded is not None and found[:2] == decoded.shape[:2]


def test_grey_portable_images_are_images_of_a_tar(
    encoded: Encode, photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    for kind, mode in (("pgm", "L"), ("pbm", "1"), ("pnm", "RGB")):
        write_tar(
            tmp_path / f"{kind}.tar", [(f"a.{kind}", encoded(photo(14, 9, 1).convert(mode), "PPM")), ("a.cls", b"1")]
        )
    assert len(index_tars(tmp_path, cache=tmp_path / "cache").records) == 3


def test_hostile_headers(encoded: Encode, photo: Callable[..., Image.Image], seed: int) -> None:
    jpeg, png = encoded(photo(31, 17, 1)), encoded(photo(31, 17, 1), "PNG")
    frame = jpeg.index(b"\xff\xc0")
    for data, words in (
        (b"\xff\xd8" + b"\xff\xfe\0\2" * 100_000 + jpeg[2:], "more than 1,000 JPEG segments"),
        (b"\xff\xd8" + b"\xff" * 10**6, "more than 1,000 JPEG segments"),
        (b"\xff\xd8\xff\xe0\0\1" + jpeg[2:], "a JPEG segment of 1 bytes at byte 2"),
        (jpeg[:frame] + jpeg[frame + 19 :], "JPEG marker da at byte"),
        (jpeg[:2] + jpeg, "JPEG marker d8 at byte 2"),
        (jpeg[:frame] + b"\0" + jpeg[frame:], f"no JPEG marker at byte {frame}"),
        (jpeg[: frame + 1] + b"\xc3" + jpeg[frame + 2 :], "lossless JPEG"),
        (jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :], "JPEG of 12 bits a channel"),
        (jpeg[: frame + 5] + b"\0\0" + jpeg[frame + 7 :], "31x0 pixels"),
        (jpeg[: frame + 6], "ends within its header"),
        (png[:20] + b"\xff" + png[21:], "checksum is wrong"),
        (png[:20], "ends within its header"),
        (b"RIFF\0\0\0\0WEBPVP8X", "ends within its header"),
        (b"RIFF\0\0\0\0AVI LIST" + bytes(50), "a WebP that begins with b'LIST'"),
        (b"P6 " + b"9" * 10**6, "makes no sense"),
        (b"BM", "ends within its header"),
    ):
        found = header_of(data)
        assert isinstance(found, Refused) and re.search(words, found.reason), (words, found)
    draw = random.Random(seed)
    for _ in range(3000):
        harmed = bytearray(draw.choice([jpeg, png])[: draw.randrange(1, 700)])
        for _ in range(draw.randrange(4)):
            harmed[draw.randrange(len(harmed))] = draw.randrange(256)
        header_of(bytes(harmed))
