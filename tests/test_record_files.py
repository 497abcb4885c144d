"""TFRecord, RecordIO and LMDB: written by others' own writers or by their specifications, read as class folders are; damage is told."""

from __future__ import annotations

import random
import struct
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.listing import Listing, list_inputs
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sources.base import Account, Choices
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.verification import verify
from alexprep.shards.worker_pool import InProcessEngine
from tests.source_checks import fails, flipped, pictures, tars
from tests.support.record_files import a_datum, an_example, database, gzipped_tar, image_record, recordio, tfrecord

ENGINE = InProcessEngine()
OPTIONS = ShardOptions(Target(size=64, format="png"), shard_samples=9)
WNIDS = ("n01443537", "n01629819", "n02124075", "n04067472")
Row = tuple[str, int, bytes]  # name, class, encoded picture


def inception(name: str, label: int, data: bytes) -> bytes:
    return an_example(
        image__height=1, image__colorspace=b"RGB", image__class__label=label + 1, image__class__synset=WNIDS[label].encode(),
        image__class__text=b"a fish, a word", image__object__bbox__xmin=[0.1, 0.5], image__filename=name.encode(), image__encoded=data,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(photos: Path) -> dict[str, list[Row]]:
    """The pictures of `photos` by split, their classes as numbers, in an order of their own."""
    found: dict[str, list[Row]] = {}
    for split in ("train", "val"):
        paths = sorted((photos / split).rglob("*.JPEG"))[:: 1 if split == "val" else 2]
        random.Random(1).shuffle(paths)
        found[split] = [(f"{path.stem}.JPEG", int(path.parent.name[-1]), path.read_bytes()) for path in paths]
    return found


@pytest.fixture(scope="module")
def folders(rows: dict[str, list[Row]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What class folders of the same pictures give, their classes called by WordNet IDs."""
    root = tmp_path_factory.mktemp("folders")
    for split, some in rows.items():
        for name, label, data in some:
            (root / "in" / split / WNIDS[label]).mkdir(parents=True, exist_ok=True)
            (root / "in" / split / WNIDS[label] / name).write_bytes(data)
    convert(root / "in", root / "out", OPTIONS, ENGINE)
    return root / "out"


@pytest.fixture(scope="module")
def reference(folders: Path) -> dict[str, Counter[tuple[str, str]]]:
    return pictures(folders)


def by_number(reference: dict[str, Counter[tuple[str, str]]]) -> dict[str, Counter[tuple[str, str]]]:
    return {
        split: Counter({(pixels, str(WNIDS.index(name))): n for (pixels, name), n in some.items()})
        for split, some in reference.items()
    }


def listed(place: Path, *, choices: Choices = Choices()) -> Listing:  # noqa: B008
    return list_inputs(find_source(str(place), None, choices))


def fates(place: Path, out: Path) -> Counter[str]:
    return convert(str(place), out, OPTIONS, ENGINE, max_rejects="100%").rejected


# TFRecord


def test_imagenet_as_inception_has_it(rows: dict[str, list[Row]], folders: Path, tmp_path: Path) -> None:
    for n in range(2):
        tfrecord(tmp_path / f"in/train-{n:05d}-of-00002", [inception(*row) for row in rows["train"][n::2]])
    tfrecord(tmp_path / "in/validation-00000-of-00001", [inception(*row) for row in rows["val"]])
    assert list_inputs(find_source(str(tmp_path / "in"))).class_words == ["a fish, a word"] * len(WNIDS)
    alone = replace(OPTIONS, metadata="none")  # without the height, which each record has
    assert convert(tmp_path / "in", tmp_path / "out", alone, ENGINE).found == len(rows["train"]) + len(rows["val"])
    assert tars(tmp_path / "out") == tars(folders)
    assert verify(tmp_path / "out", ENGINE).problems == []
    names = {row["member"] for row in listed(tmp_path / "in").splits["val"].to_pylist()}
    assert names == {b"record %d/%s" % (n, row[0].encode()) for n, row in enumerate(rows["val"])}
    (tmp_path / "in/train-00001-of-00002").unlink()
    fails(tmp_path / "in", "train-00001-of-00002 is missing, with 0 others of 2")


def test_imagenet_as_tfds_has_it(rows: dict[str, list[Row]], reference: Any, tmp_path: Path) -> None:
    folder = tmp_path / "imagenet2012/5.1.0"
    for split, some in (("train", rows["train"]), ("validation", rows["val"])):
        examples = [an_example(file_name=name.encode(), image=data, label=label) for name, label, data in some]
        tfrecord(folder / f"imagenet2012-{split}.tfrecord-00000-of-00001", examples)
    unlabelled = [an_example(file_name=b"t", image=rows["val"][0][2], label=-1)]
    tfrecord(folder / "imagenet2012-test.tfrecord-00000-of-00001", unlabelled)
    (folder / "label.labels.txt").write_text("\n".join(WNIDS) + "\n")
    (folder / "features.json").write_text("{}")
    convert(folder, tmp_path / "out", OPTIONS, ENGINE)
    found = pictures(tmp_path / "out")
    assert list(found.pop("test").values()) == [1] and found == reference
    assert read_dataset(tmp_path / "out")["classes"] == list(WNIDS)
    (folder / "label.labels.txt").unlink()
    assert listed(tmp_path / "imagenet2012").classes == ["0", "1", "2", "3"]
    assert listed(folder, choices=Choices(unlabelled=True)).classes == []


def test_other_features_and_bad_labels_of_tfrecords(tmp_path: Path) -> None:
    place = tfrecord(tmp_path / "train.tfrecord", [an_example(jpeg=b"x", kind=b"cat", more=[1, 2], share=0.5)])
    fails(place, "has the features 'jpeg', 'kind', 'more', 'share'".replace("has", "with"))
    chosen = Choices(columns=(("image", "jpeg"), ("label", "kind")))
    assert listed(place, choices=chosen).classes == ["cat"]
    floats = [an_example(image=b"x", label=[2.0])]
    assert listed(tfrecord(tmp_path / "whole.tfrecord", floats)).names == ["2"]
    for label, words in (
        ("more", "2 labels; one is needed"),
        ("share", "no whole number"),
        ("none", "has no such feature"),
    ):
        with pytest.raises(AlexprepError, match=words):
            listed(place, choices=Choices(columns=(("image", "jpeg"), ("label", label))))
    fails(tfrecord(tmp_path / "a.tfrecord", [b"\xff\xff\xff"]), "without a tf.train.Example")
    fails(tfrecord(tmp_path / "b.tfrecord", [an_example(image=b"x")]), "no record of train has a label")
    (tmp_path / "labels.txt").write_text("0:cat\n1:dog\n")
    fails(
        tfrecord(tmp_path / "c.tfrecord", [an_example(image=b"x", label=2)]),
        "the label 2 is none of the 2 that the list of labels names",
    )
    (tmp_path / "labels.txt").write_text("cat\ncat\n")
    fails(tmp_path / "c.tfrecord", "names a class twice")


def test_damaged_tfrecords(rows: dict[str, list[Row]], tmp_path: Path) -> None:
    place = tfrecord(tmp_path / "train.tfrecord", [inception(*row) for row in rows["val"]])
    whole = place.read_bytes()
    place.write_bytes(flipped(whole, whole.index(rows["val"][3][2]) + 500, 2))  # in a picture
    assert fates(place, tmp_path / "out") == {
        "cannot be read: the record has another CRC-NC than the file tells: it is damaged": 1
    }
    second = struct.unpack("<Q", whole[:8])[0] + 16
    for data, words in [
        (whole[:-3], "goes beyond the end: the file was cut short"),
        (whole + b"abc", "ends inside the header of record 20"),
        (flipped(whole, second + 3, 1), f"record 1, at byte {second:,}, has a damaged length"),
    ]:
        place.write_bytes(data)
        fails(place, words)
    place.write_bytes(flipped(whole, 2, 1))
    fails(place, "is a TFRecord file that is damaged from its first bytes on")
    (tmp_path / "val.tfrecord").write_bytes(whole)
    fails(tmp_path, f"{place} is damaged from its first bytes on, or no TFRecord file as {tmp_path}/val.tfrecord is")


# RecordIO


def test_records_of_im2rec(rows: dict[str, list[Row]], reference: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for split, some in rows.items():
        records = [image_record(label, n, data) for n, (_, label, data) in enumerate(some, 1)]
        # InsightFace puts a record without a picture before them.
        recordio(tmp_path / f"in/{split}.rec", [image_record(0, 0, b"", 48.0, 60.0), *records])
        (tmp_path / f"in/{split}.idx").write_text("0\t0\n")
    report = convert(tmp_path / "in", tmp_path / "out", OPTIONS, ENGINE)
    assert report.passed_over["a record without a picture"].count == 2
    assert pictures(tmp_path / "out") == by_number(reference)
    assert verify(tmp_path / "out", ENGINE).problems == []


def test_records_that_hold_the_magic_number(tmp_path: Path) -> None:
    magic = struct.pack("<I", 0xCED7230A)
    data = [b"abcd" * 3 + magic + b"x" + b"efg" + magic + magic + b"tail", magic, b"ab" + magic + b"cd"]
    place = recordio(tmp_path / "train.rec", [image_record(n, n, each) for n, each in enumerate(data)])
    assert place.read_bytes().count(magic) > len(data)
    source = find_source(str(place))
    assert [source.read(item.location) for item in source.inputs(Account())] == data


def test_damaged_records_and_labels(rows: dict[str, list[Row]], tmp_path: Path) -> None:
    place = recordio(
        tmp_path / "train.rec", [image_record(label, n, data) for n, (_, label, data) in enumerate(rows["val"])]
    )
    whole = place.read_bytes()
    for data, words in [
        (whole[:-5], "the file was cut short"),
        (whole + b"abcd", f"has no record at byte {len(whole):,} of {len(whole) + 4:,}"),
        (flipped(whole, 7, 6), "has no record at byte"),
        (whole[4:], "has no record at byte 0"),
    ]:
        place.write_bytes(data)
        fails(place, words)
    for record, words in [
        (image_record(0.5, 0, b"x"), "label 0.5 is no whole number"),
        (image_record(-1, 0, b"x"), "below 0"),
        (image_record(0, 0, b"x", 1.0, 2.0), "has 2 labels; one is needed"),
        (b"short", "no header of an image"),
    ]:
        fails(recordio(place, [record]), words)
    assert listed(recordio(place, [image_record(0, 0, b"x", 1.0, 2.0)]), choices=Choices(unlabelled=True)).classes == []
    assert listed(recordio(place, [image_record(0, 0, b"x", 3.0)])).names == ["3"]
    many = struct.pack("<IfQQ", 2**32 - 1, 0.0, 0, 0) + b"x"  # labels, of which no list is made
    assert listed(recordio(place, [image_record(5, 0, b"x"), many])).names == ["5"]
    place.write_bytes(flipped(whole, whole.index(rows["val"][3][2]), 4))
    assert len(fates(place, tmp_path / "out")) == 1


# LMDB


def test_databases_of_caffe(rows: dict[str, list[Row]], reference: Any, tmp_path: Path) -> None:
    for split, some in rows.items():
        values = {
            f"{n:08d}_{name}".encode(): a_datum(data=data, label=label, encoded=True)
            for n, (name, label, data) in enumerate(some)
        }
        database(tmp_path / f"in/ilsvrc12_{split}_lmdb", values)
    report = convert(tmp_path / "in", tmp_path / "out", OPTIONS, ENGINE)
    assert report.samples == {split: len(some) for split, some in rows.items()}
    assert pictures(tmp_path / "out") == by_number(reference)
    assert verify(tmp_path / "out", ENGINE).problems == []


def test_raw_pixels_of_caffe_are_blue_green_red_by_channel(tmp_path: Path) -> None:
    pixels = np.random.default_rng(7).integers(0, 256, (5, 3, 3), np.uint8)
    bgr = pixels[:, :, ::-1].transpose(2, 0, 1).tobytes()
    values = {
        b"0": a_datum(channels=3, height=5, width=3, data=bgr, label=2),
        b"1": a_datum(channels=1, height=5, width=3, data=pixels[:, :, 0].tobytes()),
        b"2": a_datum(channels=3, height=5, width=4, data=bgr, label=1),
        b"3": a_datum(channels=3, height=1, width=1, float_data=[1.0, 2.0, 3.0], label=1),
    }
    source = find_source(str(database(tmp_path / "train_lmdb", values)))
    colour, grey, wrong, floats = source.inputs(Account())
    assert (colour.split, colour.class_name, grey.class_name) == ("train", "2", "0")
    np.testing.assert_array_equal(source.read(colour.location), pixels)
    np.testing.assert_array_equal(source.read(grey.location), pixels[:, :, 0])
    for bad in (wrong, floats):
        with pytest.raises(OSError, match="are no pixels of"):
            source.read(bad.location)


@pytest.mark.parametrize("how", ["folders", "list"])
def test_databases_of_plain_pictures(how: str, rows: dict[str, list[Row]], folders: Path, tmp_path: Path) -> None:
    keys = [f"{WNIDS[label]}/{name}" if how == "folders" else name for name, label, _ in rows["val"]]
    values = {key.encode(): data for key, (_, _, data) in zip(keys, rows["val"], strict=True)}
    place = database(tmp_path / "val", values)
    if how == "list":
        fails(place, "nothing tells the class of the key '")
        assert listed(place, choices=Choices(unlabelled=True)).names == [""]
        (place / "labels.txt").write_text("".join(f"{name} {WNIDS[label]}\n" for name, label, _ in rows["val"]))
    convert(place, tmp_path / "out", OPTIONS, ENGINE)
    assert pictures(tmp_path / "out") == {"val": pictures(folders)["val"]}
    if how == "folders":
        assert tars(tmp_path / "out") == {name: data for name, data in tars(folders).items() if name.startswith("val")}


def test_damaged_databases(rows: dict[str, list[Row]], tmp_path: Path) -> None:
    values = {
        b"%d" % n: a_datum(data=data, label=label, encoded=True) for n, (_, label, data) in enumerate(rows["val"])
    }
    place = database(tmp_path / "x", values) / "data.mdb"
    whole = place.read_bytes()
    for data, words in [
        (whole[: len(whole) // 2], "it was cut short, get it again"),
        (whole[:16] + bytes(4) + whole[20:], "its data.mdb is none, or damaged from its first bytes on"),
    ]:
        place.write_bytes(data)
        fails(place.parent, words)
    at = whole.index(rows["val"][3][2])
    place.write_bytes(whole[:at] + bytes(64) + whole[at + 64 :])
    assert fates(place.parent, tmp_path / "out").total() == 1
    fails(database(tmp_path / "y", {b"0": a_datum(data=b"x", label=-1, encoded=True)}), "is not between 0 and")
    twice: Callable[[str], Path] = lambda name: database(tmp_path / "z" / name, values)
    twice("train_lmdb"), twice("training_lmdb")
    fails(tmp_path / "z", "holds several databases of one split")


@pytest.mark.parametrize(
    ("package", "name"), [("google_crc32c", "a.tfrecord"), ("lmdb", "a.mdb"), ("indexed_gzip", "train.tar.gz")]
)
def test_a_package_that_is_not_installed_is_named(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / name
    if package == "lmdb":
        database(tmp_path, {b"0": a_datum(data=b"x", label=1, encoded=True)}, name)
    elif package == "indexed_gzip":
        gzipped_tar(place, [("1_n01440764.JPEG", b"x")])
    else:
        tfrecord(place, [inception("1.JPEG", 1, b"x")])
    monkeypatch.setitem(sys.modules, package, None)
    words = rf"needs the package {package} .*: pip install 'alexprep\[sources\]'"
    with pytest.raises(AlexprepError, match=words):
        list(find_source(str(place)).inputs(Account()))
