"""Sources of image files: the originals' archives, Kaggle, folders, tars, webdatasets, stores. The same images are the same inputs."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import Literal

import click
import fsspec
import numpy as np
import pytest
from scipy.io import savemat

from alexprep.cli.options import SplitFolders
from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import read_dataset, read_index
from alexprep.shards.errors import AlexprepError, AmbiguousSourceError
from alexprep.shards.image_codec import Target
from alexprep.shards.listing import class_order
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sources import ilsvrc
from alexprep.shards.sources.base import (
    UNLABELLED,
    Account,
    Choices,
    Source,
    as_json,
    as_options,
    choices_of,
    split_of,
)
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.storage import LocalFiles, files_at, folder_at
from alexprep.shards.verification import verify
from alexprep.shards.worker_pool import InProcessEngine
from tests.source_checks import flipped, write_tar

Images = list[tuple[str, str, bytes]]  # name, class, content
OPTIONS = ShardOptions(Target(size=64), shard_samples=7)
ENGINE = InProcessEngine()


def packed(path: Path, *names: str, content: bytes = b"") -> Path:
    """A tar with members of these names."""
    return write_tar(path, [(name, content) for name in names])


def unpacked(root: Path, *names: str | bytes, content: bytes = b"") -> Path:
    """A folder with these files."""
    for name in names:
        path = os.path.join(bytes(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
    return root


def listed(source: Source) -> Images:
    """(split, class, name below the root or in the archive) of each input."""
    return [(split, class_name, at.member or at.path) for split, class_name, at, *_ in source.inputs(Account())]


def test_a_member_or_folder_that_lies_thousands_deep(tmp_path: Path) -> None:
    inner = b"cat/" + b"a/" * 1500 + b"x.jpg"  # deeper than Python calls itself
    tar = packed(tmp_path / "set.tar", os.fsdecode(inner), "dog/y.jpg")
    store = fsspec.filesystem("memory")  # a disk would have it too, and Python would fail to tidy it away
    store.pipe({f"/deep/{name}": b"" for name in (os.fsdecode(inner), "dog/y.jpg")})
    for place in (str(tar), "memory://deep"):
        found = find_source(place, choices=Choices(class_depth=1))
        assert listed(found) == [("train", "cat", inner), ("train", "dog", b"dog/y.jpg")]
    long = packed(tmp_path / "long.tar", "cat/" + "a/" * 9000 + "x.jpg", "dog/y.jpg")
    with pytest.raises(AlexprepError, match=r"a member whose name has 18,009 bytes, more than 16,384: cat/a/a/"):
        listed(find_source(str(long)))


def test_a_split_folder_may_be_an_absolute_path_below_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("a/cat/1.jpg", "a/dog/2.jpg", "b/cat/3.jpg")
    root = unpacked(tmp_path / "set", *names)
    (tmp_path / "link").symlink_to(root)
    tar = packed(tmp_path / "set.tar", *names)
    monkeypatch.chdir(tmp_path)
    found = [("train", "cat", b"a/cat/1.jpg"), ("train", "dog", b"a/dog/2.jpg"), ("val", "cat", b"b/cat/3.jpg")]
    for place, below in [
        ("set", root),
        (f"{root}/", root),
        ("link", root),
        (str(root), tmp_path / "link"),
        ("set.tar", tar),
    ]:
        chosen = Choices((("train", f"{below}/a/"), ("val", "b")), 1)
        source = find_source(place, choices=chosen)
        assert listed(source) == found, place
        assert source.choices == Choices((("train", "a"), ("val", "b")), 1)  # a plan goes on where SOURCE has moved
    for place in ("set", "set.tar"):
        for outside in (f"{root}2/a", "memory://set/a", str(tmp_path)):
            words = f"--split-folders train={outside} does not lie below SOURCE {place}: name a folder there"
            with pytest.raises(AlexprepError, match=re.escape(words)):
                find_source(place, choices=Choices((("train", outside),)))


def test_several_folders_of_one_split(tmp_path: Path) -> None:
    root = unpacked(tmp_path / "set", "a/dog/1.jpg", "b/cat/2.jpg", "b/dog/0.jpg", "c/cat/3.jpg")
    chosen = SplitFolders().convert("train=a,train=b,val=c", None, None)
    choices = Choices(chosen)
    assert choices.split_folders == (("train", "a"), ("train", "b"), ("val", "c"))
    assert choices_of(json.loads(json.dumps(as_json(choices)))) == choices
    assert as_options(choices) == "--split-folders train=a,train=b,val=c"
    found = listed(find_source(str(root), choices=choices))
    assert found == [
        ("train", "cat", b"b/cat/2.jpg"),
        ("train", "dog", b"a/dog/1.jpg"),
        ("train", "dog", b"b/dog/0.jpg"),
        ("val", "cat", b"c/cat/3.jpg"),
    ]
    with pytest.raises(click.BadParameter, match="train=a is given twice: name each folder once"):
        SplitFolders().convert("train=a,train=a", None, None)
    names = [f"train.X{n % 2 + 1}/n0000000{n}/1.jpg" for n in range(4)]
    parts = unpacked(tmp_path / "parts", *names, "val.X/n00000000/1.jpg")
    assert [class_name for split, class_name, _ in listed(find_source(str(parts))) if split == "train"] == [
        f"n0000000{n}" for n in range(4)
    ]
    unpacked(parts, "train.X2/n00000000/1.jpg")  # a class in two parts
    with pytest.raises(AmbiguousSourceError, match=r"train\.X1 and train\.X2, which both mean 'train'") as asked:
        find_source(str(parts))
    assert "--split-folders train=train.X1,train=train.X2,val=val.X" in [way for way, _ in asked.value.ways]


def test_names_of_what_is_passed_over_are_written_where_they_are_kept() -> None:
    account, written = Account(), list[bytes]()

    def shown(path: bytes) -> str:
        written.append(path)
        return path.decode()

    for n in range(100):
        account.pass_over("a rule", (shown, b"folder", b"%d" % n))
    assert (
        account.passed_over["a rule"].names == [f"folder/{n}" for n in range(5)] == [path.decode() for path in written]
    )
    assert account.passed_over_count == 100


def refused(place: Path | str, words: str, layout: str | None = None) -> None:
    """Finding the source or listing its inputs must fail with these words."""
    with pytest.raises(AlexprepError, match=words):
        list(find_source(str(place), layout).inputs(Account()))


def _meta_mat(wnids: list[str], year: int = 2012) -> bytes:
    dtype = [(f"ILSVRC{year}_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(n + 1, wnid, "w", "g", 0) for n, wnid in enumerate(wnids)] + [(len(wnids) + 1, "n00001740", "w", "g", 2)]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=dtype).reshape(-1, 1)})
    return buffer.getvalue()


@pytest.fixture(scope="module")
def val(photos: Path) -> Images:
    """(name, class, bytes) of the val images, named as in ILSVRC, classes in no order."""
    images = sorted((photos / "val").rglob("*.JPEG"), key=lambda path: path.name)
    return [
        (f"ILSVRC2012_val_{n:08d}.JPEG", path.parent.name, path.read_bytes()) for n, path in enumerate(images, start=1)
    ]


@pytest.fixture(scope="module")
def folders(photos: Path, val: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: class folders, val sorted into them under the original names."""
    root = tmp_path_factory.mktemp("folders")
    shutil.copytree(photos / "train", root / "train")
    for name, class_name, content in val:
        (root / "val" / class_name).mkdir(parents=True, exist_ok=True)
        (root / "val" / class_name / name).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def reference(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference")
    convert(folders, out, OPTIONS, ENGINE)
    return out


def shards_of(data: Path) -> dict[str, str]:
    """The sha256 of everything that training reads."""
    files = [path for kind in ("*.tar", "*.idx", "index.npy") for path in data.glob(f"*/{kind}")]
    return {str(path.relative_to(data)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flat_val(root: Path, val: Images, train: Path | None = None) -> Path:
    """Puts the val images into one folder, and class folders of train beside it."""
    (root / "val").mkdir(parents=True)
    for name, _, content in val:
        (root / "val" / name).write_bytes(content)
    if train is not None:
        shutil.copytree(train, root / "train")
    return root


def _ids(val: Images, wnids: list[str]) -> bytes:
    return "".join(f"{wnids.index(class_name) + 1}\n" for _, class_name, _ in sorted(val)).encode()


WNIDS = ["class2", "class0", "class3", "class1"]  # a devkit's IDs are not in the order of the names


@pytest.fixture(scope="module")
def archives(folders: Path, val: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As downloaded: train, val, test and devkit."""
    root = tmp_path_factory.mktemp("archives")
    train = root / "ILSVRC2012_img_train.tar"
    inner = {}  # synsets and images in no order, as tar and the file system left them
    for folder in sorted((folders / "train").iterdir(), reverse=True):
        images = {image.name: image.read_bytes() for image in sorted(folder.iterdir(), reverse=True)}
        inner[f"{folder.name}.tar"] = write_tar(train, images).read_bytes()
    write_tar(train, inner)
    write_tar(root / "ILSVRC2012_img_val.tar", {name: content for name, _, content in val[::-1]})
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": _meta_mat(WNIDS),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": _ids(val, WNIDS),
    }
    packed = write_tar(root / "ILSVRC2012_devkit_t12.tar.gz", devkit)
    packed.write_bytes(gzip.compress(packed.read_bytes()))
    return root


def test_the_original_archives_give_the_same_shards(archives: Path, reference: Path, tmp_path: Path) -> None:
    report = convert(archives, tmp_path / "out", OPTIONS, 2)
    assert report.samples == {"train": 48, "val": 20} and not report.rejected
    assert shards_of(tmp_path / "out") == shards_of(reference)
    dataset = read_dataset(tmp_path / "out")
    assert dataset["source"]["layout"] == "ilsvrc" and dataset["digest"] == read_dataset(reference)["digest"]
    sources = [str(entry.location) for entry in find_source(str(archives)).inputs(Account())]
    assert "ILSVRC2012_img_train.tar/class0.tar/000.JPEG" in sources
    assert not [path for path in archives.iterdir() if not path.name.startswith("ILSVRC2012_")]  # nothing was unpacked


def test_one_archive_alone_and_test_images_without_labels(
    archives: Path, reference: Path, val: Images, tmp_path: Path
) -> None:
    one = convert(archives / "ILSVRC2012_img_train.tar", tmp_path / "train", OPTIONS, ENGINE)
    assert one.samples == {"train": 48}
    # 2010: the test images' labels were published.
    (tmp_path / "old").mkdir()
    write_tar(
        tmp_path / "old/ILSVRC2010_images_test.tar",
        {f"test/{n.replace('2012_val', '2010_test')}": c for n, _, c in val},
    )
    (tmp_path / "old/ILSVRC2010_test_ground_truth.txt").write_bytes(_ids(val, WNIDS))
    (tmp_path / "old/meta.mat").write_bytes(_meta_mat(WNIDS, 2010))
    convert(tmp_path / "old", tmp_path / "old-out", OPTIONS, ENGINE)
    labels = read_index(tmp_path / "old-out", "test")["label"]
    assert sorted(labels.tolist()) == sorted(read_index(reference, "val")["label"].tolist())


def test_kaggle_s_folders_give_the_same_shards(folders: Path, val: Images, reference: Path, tmp_path: Path) -> None:
    images = flat_val(tmp_path / "kaggle/ILSVRC/Data/CLS-LOC", val, folders / "train")
    (images / "test").mkdir()
    for name, _, content in val:
        (images / "test" / name.replace("val", "test")).write_bytes(content)
    with open(tmp_path / "kaggle/LOC_val_solution.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        writer.writerows([name.removesuffix(".JPEG"), f"{class_name} 1 2 30 40"] for name, class_name, _ in val)
    report = convert(tmp_path / "kaggle", tmp_path / "out", OPTIONS, ENGINE)
    assert report.samples == {"train": 48, "val": 20, "test": 20}
    made = {name: digest for name, digest in shards_of(tmp_path / "out").items() if not name.startswith("test")}
    assert made == shards_of(reference)
    (tmp_path / "kaggle/LOC_val_solution.csv").unlink()
    with pytest.raises(AlexprepError, match=r"has no LOC_val_solution\.csv"):
        convert(tmp_path / "kaggle", tmp_path / "new", OPTIONS, ENGINE)


@pytest.mark.parametrize("kind", ["names", "numbers", "devkit"])
def test_a_flat_val_folder_with_a_ground_truth(
    kind: str, folders: Path, val: Images, reference: Path, tmp_path: Path
) -> None:
    root = flat_val(tmp_path / "root", val, folders / "train")
    refused(root, "nothing beside it tells the classes")
    classes = sorted({class_name for _, class_name, _ in val})
    match kind:
        case "names":  # with a byte order mark, as some editors write
            (root / "val.txt").write_text("".join(f"{n} {class_name}\n" for n, class_name, _ in val), "utf-8-sig")
        case "numbers":
            (root / "val.txt").write_text("".join(f"{name} {classes.index(label)}\n" for name, label, _ in val))
        case "devkit":
            data = unpacked(root, "ILSVRC2012_devkit_t12/data/meta.mat", content=_meta_mat(WNIDS))
            truth = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
            unpacked(data, truth, content=_ids(val, WNIDS))
    convert(root, tmp_path / "out", OPTIONS, ENGINE)
    assert shards_of(tmp_path / "out") == shards_of(reference)


OLD_WNIDS = ["class0", "class1", "class2", "class3"]  # the IDs of 2010, say


@pytest.fixture
def two_years(archives: Path, val: Images, tmp_path: Path) -> Path:
    """A folder with the devkits of 2010, unpacked, and 2012."""
    data = tmp_path / "two/ILSVRC2010_devkit-1.0/data"
    unpacked(data, "meta.mat", content=_meta_mat(OLD_WNIDS, 2010))
    unpacked(data, "ILSVRC2010_validation_ground_truth.txt", content=b"1\n" * len(val))
    shutil.copy(archives / "ILSVRC2012_devkit_t12.tar.gz", tmp_path / "two")
    return tmp_path / "two"


def test_of_two_years_devkits_the_images_own_counts(two_years: Path, archives: Path, val: Images) -> None:
    truth = {(class_name, name) for name, class_name, _ in val}
    shutil.copy(archives / "ILSVRC2012_img_val.tar", two_years)
    source = find_source(str(two_years))
    assert {(i.class_name, i.location.member.decode()) for i in source.inputs(Account())} == truth
    assert class_order("ilsvrc-id", set(WNIDS), source) == WNIDS
    # As folders: by the images' names, also below class folders. The wrong devkit alone counts for nothing.
    (two_years / "ILSVRC2012_img_val.tar").unlink()
    flat_val(two_years, val)
    source = find_source(str(two_years), "folders")
    assert {(i.class_name, i.location.path.decode().removeprefix("val/")) for i in source.inputs(Account())} == truth
    assert class_order("ilsvrc-id", set(WNIDS), source) == WNIDS
    (two_years / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    refused(two_years, "nothing beside it tells the classes", "folders")
    # A loose meta.mat tells its year by the name of its IDs.
    (two_years / "ILSVRC2012_validation_ground_truth.txt").write_bytes(_ids(val, WNIDS))
    (two_years / "meta.mat").write_bytes(_meta_mat(OLD_WNIDS, 2010))
    refused(two_years, r"put the devkit's meta\.mat of 2012", "folders")
    (two_years / "meta.mat").write_bytes(_meta_mat(WNIDS))
    assert {i.class_name for i in find_source(str(two_years), "folders").inputs(Account())} == set(WNIDS)


def test_devkits_of_two_years_and_names_that_tell_none(two_years: Path, val: Images) -> None:
    flat_val(two_years, [(name.removeprefix("ILSVRC2012_"), *more) for name, *more in val])  # type: ignore[misc]
    refused(two_years, r"holds devkits of 2010 and 2012 .* move the other devkits away")
    (two_years / "val/class0").mkdir()
    with pytest.raises(AlexprepError, match="holds devkits of 2010 and 2012"):
        class_order("ilsvrc-id", set(WNIDS), find_source(str(two_years)))
    shutil.move(two_years / "ILSVRC2010_devkit-1.0", two_years / "devkit-1.0")  # as its archive has it
    (two_years / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert class_order("ilsvrc-id", {"class0"}, find_source(str(two_years))) == OLD_WNIDS
    (two_years / "val/class0").rmdir()
    assert {i.class_name for i in find_source(str(two_years)).inputs(Account())} == {"class0"}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("v02.jpg 2", None),  # the class "2", or the third of "0", "1", "10", "11", "2", …
        ("v02.jpg 0\nv03.jpg 1", {"0", "1"}),  # the same by both
        ("v02.jpg 2\nv03.jpg 40", {"2", "40"}),  # there is no class number 40
        ("v02.jpg 3", {"11"}),  # there is no class named 3
    ],
)
def test_numbers_that_are_names_of_classes_too(lines: str, expected: set[str] | None, tmp_path: Path) -> None:
    for name in ("0", "1", "2", "10", "11", "40"):
        unpacked(tmp_path / "train" / name, "a.jpg")
    unpacked(tmp_path / "val", *(line.split()[0] for line in lines.splitlines()))
    (tmp_path / "val.txt").write_text(lines)
    if expected is None:
        refused(tmp_path, r"may mean the class named '2', or number 2 of .* which is '10': sort")
    else:
        found = find_source(str(tmp_path)).inputs(Account())
        assert {i.class_name for i in found if i.split == "val"} == expected


def test_a_numbered_list_where_there_is_nothing_to_count(archives: Path, val: Images, tmp_path: Path) -> None:
    shutil.copy(archives / "ILSVRC2012_img_val.tar", tmp_path)
    (tmp_path / "val.txt").write_text("".join(f"{name} 0\n" for name, _, _ in val))
    refused(tmp_path, r"there are 0 train classes.* or the devkit into SOURCE")
    shutil.copy(archives / "ILSVRC2012_devkit_t12.tar.gz", tmp_path)
    assert sorted(i.class_name for i in find_source(str(tmp_path)).inputs(Account())) == sorted(
        label for _, label, _ in val
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("LOC_val_solution.csv", "a," + "b" * 200_000, "line 1: field larger than field limit"),
        ("val.txt", "".join(f"a{n} {n + 1}\n" for n in range(20)), "numbers classes up to 20, but there are 4 train"),
        ("val.txt", "ILSVRC2012_val_00000001.JPEG class0\n", "gives no class to 19 of 20 files"),
        ("val.txt", "one\n", "line 1: expected NAME CLASS"),
        ("LOC_val_solution.csv", "a,\n", "line 1: expected ImageId,PredictionString"),
        ("ILSVRC2012_validation_ground_truth.txt", "1\n" * 20, "put the devkit's meta.mat"),
        ("val.txt", b"\xff\xff 1", "no text in UTF-8"),
        ("val.txt", "a.JPEG cat\nval/a.JPEG dog\n", r"names val/a\.JPEG twice, with the classes 'cat' and 'dog'"),
        ("LOC_val_solution.csv", "a,cat 1 1 2 2\na,dog\n", r"csv names a twice, with the classes 'cat' and 'dog'"),
    ],
)
def test_ground_truths_that_make_no_sense(
    name: str, content: str | bytes, words: str, folders: Path, val: Images, tmp_path: Path
) -> None:
    flat_val(tmp_path, val, folders / "train")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(tmp_path, words)


def test_archives_that_make_no_sense(archives: Path, tmp_path: Path) -> None:
    shutil.copy(archives / "ILSVRC2012_img_val.tar", tmp_path)
    refused(tmp_path, "nothing beside .*ILSVRC2012_img_val.tar tells the classes")
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n" * 19)
    (tmp_path / "meta.mat").write_bytes(_meta_mat(WNIDS))
    refused(tmp_path, "19 lines for 20 images")
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n" * 19 + "5\n")
    refused(tmp_path, "line 20: '5' is no ID between 1 and 4")
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n" * 20)
    good = (archives / "ILSVRC2012_img_val.tar").read_bytes()
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(flipped(good, 0, 0))
    refused(tmp_path, "ILSVRC2012_img_val.tar.* byte 0")
    shutil.copy(archives / "ILSVRC2012_img_val.tar", tmp_path / "ILSVRC2010_images_val.tar")
    refused(tmp_path, "both for 'val'")
    for path in tmp_path.glob("*_val.tar"):
        path.unlink()
    packed(tmp_path / "ILSVRC2012_img_train.tar", "class0/a.jpg")
    refused(tmp_path, "expected one SYNSET.tar a class")


def test_archives_packed_otherwise(tmp_path: Path) -> None:
    """Synsets' tars below a folder, and test images without labels."""
    inner = packed(tmp_path / "inside/x", "b.JPEG", "a.JPEG").read_bytes()
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", {"z/n1.tar": inner, "train/n2.tar": inner, "n0.tar": inner})
    names = [f"ILSVRC2012_val_{n}.JPEG" for n in (1, 2)]
    packed(tmp_path / "ILSVRC2012_img_val.tar", *names)
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n")
    (tmp_path / "meta.mat").write_bytes(_meta_mat(["n1", "n2"]))
    packed(tmp_path / "ILSVRC2012_img_test.tar", "ILSVRC2012_test_1.JPEG", "ILSVRC2012_test_2.JPEG")
    (tmp_path / "test.txt").write_text("ILSVRC2012_test_1.JPEG 0\nILSVRC2012_test_2.JPEG 0\n")  # Caffe's
    inputs = list(find_source(str(tmp_path)).inputs(Account()))
    assert [entry.class_name for entry in inputs if entry.split == "train"] == ["n0", "n0", "n1", "n1", "n2", "n2"]
    val = [(entry.class_name, entry.location.member.decode()) for entry in inputs if entry.split == "val"]
    assert val == [("n1", names[1]), ("n2", names[0])]
    assert [entry.class_name for entry in inputs if entry.split == "test"] == [UNLABELLED] * 2
    packed(tmp_path / "ILSVRC2012_img_val.tar", *names, names[0])
    refused(tmp_path, rf"ILSVRC2012_img_val\.tar holds {names[0]} twice")


def test_published_checksums(archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, _ = files_at(str(archives))
    with pytest.raises(AlexprepError, match="the published one is"):
        ilsvrc.check_archives(files)
    name = "ILSVRC2012_img_val.tar"
    wanted = {name: hashlib.md5((archives / name).read_bytes()).hexdigest()}
    assert ilsvrc.check_archives(files, wanted) == [name]
    with pytest.raises(AlexprepError, match=r"holds none of other\.tar"):
        ilsvrc.check_archives(files, {"other.tar": ""})


def test_tars_of_class_folders_give_the_same_shards(folders: Path, reference: Path, tmp_path: Path) -> None:
    """One a split; how a tar of all splits is laid out is below."""
    for split in ("train", "val"):
        images = {f"./{p.relative_to(folders / split)}": p.read_bytes() for p in (folders / split).rglob("*.JPEG")}
        write_tar(tmp_path / "tars" / f"my-{split}.tar", dict(sorted(images.items(), reverse=True)))
    convert(tmp_path / "tars", tmp_path / "out", OPTIONS, ENGINE)
    assert shards_of(tmp_path / "out") == shards_of(reference)
    (tmp_path / "tars/class0").mkdir()
    assert find_source(str(tmp_path / "tars")).layout == "tar"
    unpacked(tmp_path / "tars", "class0/a.jpg")
    assert find_source(str(tmp_path / "tars")).layout == "folders"


def test_odd_members_of_a_tar_are_rejected_each(photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        tar.add(photos / "train/class0/000.JPEG", "c/good.jpg")
        kinds = {"c/link.jpg": tarfile.SYMTYPE, "c/hard.jpg": tarfile.LNKTYPE, "c/pipe": tarfile.FIFOTYPE}
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        tar.add(photos / "train/class0/000.JPEG", "../../c/up.jpg")
        tar.add(photos / "train/class0/000.JPEG", "c/.hidden.jpg")
    report = convert(tmp_path / "odd.tar", tmp_path / "out", OPTIONS, ENGINE, max_rejects=3)
    assert report.written == 2
    assert dict(report.rejected) == {"cannot be read: a link or special file in an archive": 3}


@pytest.mark.parametrize("form", ["cls", "json"])
def test_webdatasets_are_sharded_anew(form: str, folders: Path, tmp_path: Path) -> None:
    import webdataset as wds

    source, expected = tmp_path / "shards", []
    source.mkdir()
    with wds.ShardWriter(str(source / "set-train-%04d.tar"), maxcount=9, verbose=0) as writer:
        for n, entry in enumerate(sorted(find_source(str(folders / "train")).inputs(Account()))):
            key, label = f"some/where.d/{n:04d}", int(entry.class_name[-1])
            image = (folders / "train" / entry.location.path.decode()).read_bytes()
            target = {"json": {"label": label, "caption": "x"}} if form == "json" else {"cls": label}
            writer.write({"__key__": key, "JPEG": image, **target})
            expected.append((f"{key}.JPEG", str(label)))
    found = find_source(str(source))
    assert found.layout == "webdataset"
    assert [(str(i.location).rpartition(".tar/")[2], i.class_name) for i in found.inputs(Account())] == expected
    report = convert(found, tmp_path / "out", ShardOptions(Target(size=48), shard_samples=10), ENGINE)
    assert report.samples == {"train": 48} and not report.rejected
    assert read_dataset(tmp_path / "out")["classes"] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("form", ["jpg", "raw"])
def test_our_own_shards_with_unknown_classes_and_raw_pixels(
    form: Literal["jpg", "raw"], archives: Path, val: Images, tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    write_tar(
        tmp_path / "source/ILSVRC2012_img_test.tar",
        {name.replace("val", "test"): content for name, _, content in val[:5]},
    )
    first, again = tmp_path / "first", tmp_path / "again"
    convert(tmp_path / "source", first, ShardOptions(Target(size=64, format=form)), ENGINE)
    source = find_source(str(first))
    assert {entry.class_name for entry in source.inputs(Account())} == {UNLABELLED}
    report = convert(source, again, ShardOptions(Target(size=64, format="raw")), ENGINE)
    assert report.samples == {"test": 5} and not report.rejected
    assert read_index(again, "test")["label"].tolist() == [-1] * 5 and read_dataset(again)["classes"] == []
    if form == "raw":  # nothing is lost on the way
        other = find_source(str(again))
        pixels = [
            {np.asarray(s.read(entry.location)).tobytes() for entry in s.inputs(Account())} for s in (source, other)
        ]
        assert pixels[0] == pixels[1] and {len(image) for image in pixels[0]} == {64 * 64 * 3}
        tar = next(first.glob("test/*.tar"))
        tar.write_bytes(tar.read_bytes().replace(b"'descr': '|u1'", b"'descr': '|i1'"))
        with pytest.raises(OSError, match=r"no \.npy of uint8 pixels"):
            source.read(next(iter(source.inputs(Account()))).location)


def test_a_data_set_of_ours_is_sharded_anew_only_whole(reference: Path, folders: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(reference, data)
    shutil.copy(data / "train/train-000000.tar", data / "train/train-000099.tar")
    refused(data, r"train-000099\.tar is none of those that dataset\.json names: move it away")
    (data / "train/train-000099.tar").unlink()
    ours, theirs = (list(find_source(str(place)).inputs(Account())) for place in (data, folders))
    assert sorted((i.split, i.class_name) for i in ours) == sorted((i.split, i.class_name) for i in theirs)
    for ending in ("tar", "idx", "json"):
        (data / f"train/train-000001.{ending}").unlink()
    refused(data, r"train-000001\.tar is missing, but .*: mend it with `alexprep verify .* --repair IMAGES`")
    shutil.rmtree(data / "train")
    refused(data, r"train-000000\.tar is missing")
    (data / "dataset.json").write_text('{"format": "alexprep data set", "classes": [], "splits": {"train": 1}}')
    refused(data, r"dataset\.json is damaged")
    (data / "dataset.json").unlink()
    refused(data, "holds an unfinished data set: run the `alexprep shard` that began it again")
    assert (
        len(list(find_source(f"{data}/val/val-00000{{0..2}}.tar").inputs(Account()))) == 20
    )  # the very tars that are meant
    (data / "plan.json").write_text('{"format": "alexprep plan", ')
    refused(data, r"plan\.json is damaged")
    (data / "plan.json").write_text('{"tasks": "of another program"}')
    assert len(list(find_source(str(data)).inputs(Account()))) == 20


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"name": "mine", "version": 3}', ["1", "x"]),
        ("{broken", ["1", "x"]),
        ("[1, 2]", ["1", "x"]),
        ('{"format": "theirs", "classes": ["a"], "like": "alexprep data set"}', ["1", "x"]),
        ('{"format": "alexprep data set", "classes": ["a", "b", "x"]}', ["b", "x"]),
        ('{"format": "alexprep data set", "classes": ["a"]}', "the label 1, none of the 1 classes of the dataset.json"),
        ('{"format": "alexprep data set", "classes": ["a", "b"]}', "the label 'x', none of the 2 classes"),
        ('{"format": "alexprep data set", "classes": [1]}', "dataset.json is damaged .*no text"),
        ('{"format": "alexprep data set"}', "dataset.json is damaged"),
        ('{"format": "alexprep data set", ', "dataset.json is damaged .* run the `alexprep shard` that made it again"),
    ],
)
def test_only_our_own_dataset_json_names_classes(content: str, expected: str | list[str], tmp_path: Path) -> None:
    write_tar(tmp_path / "set.tar", {"a.jpg": b"", "a.cls": b"1", "b.jpg": b"", "b.cls": b"x"})
    (tmp_path / "dataset.json").write_text(content)
    if isinstance(expected, str):
        refused(tmp_path, expected)
    else:
        assert [entry.class_name for entry in find_source(str(tmp_path)).inputs(Account())] == expected


def test_a_named_layout_is_taken_at_its_word(folders: Path, archives: Path) -> None:
    assert find_source(str(folders), "folders").layout == "folders"
    refused(folders, "has not the layout 'ilsvrc': expected a folder with ILSVRC2012_img_train", "ilsvrc")
    refused(folders, "--layout x is not one of", "x")


def test_split_names() -> None:
    names = (b"train", b"Validation", b"imagenet1k-test-0001.tar", b"train-val.tar", b"trainer")
    assert [split_of(name) for name in names] == ["train", "val", "test", None, None]


# How classes become numbers


def bare(folder: Path) -> Source:
    return Source(LocalFiles(bytes(folder)))


def test_ilsvrc_id_is_the_devkit_s_order(tmp_path: Path) -> None:
    (tmp_path / "meta.mat").write_bytes(_meta_mat(["n07711080", "n01440764", "n04554684"]))
    order = class_order("ilsvrc-id", {"n01440764", "n04554684"}, bare(tmp_path))
    assert order == ["n07711080", "n01440764", "n04554684"]
    with pytest.raises(AlexprepError, match="no number for 1 of 1 classes, among them 'n00001740'"):
        class_order("ilsvrc-id", {"n00001740"}, bare(tmp_path))
    (tmp_path / "meta.mat").write_bytes(b"junk")
    with pytest.raises(AlexprepError, match="not a devkit"):
        class_order("ilsvrc-id", {"n01440764"}, bare(tmp_path))
    with pytest.raises(AlexprepError, match="needs the devkit"):
        class_order("ilsvrc-id", {"n01440764"}, bare(tmp_path / "elsewhere"))


def test_the_devkit_is_found_beside_the_source(photos: Path, tmp_path: Path) -> None:
    source = tmp_path / "imagenet"
    source.mkdir()
    for split in ("train", "val"):
        (source / split).symlink_to(photos / split)
    unpacked(
        tmp_path, "ILSVRC2012_devkit_t12/data/meta.mat", content=_meta_mat(["class3", "class1", "class0", "class2"])
    )
    convert(source, tmp_path / "out", ShardOptions(Target(size=64), labels="ilsvrc-id", limit=4), 1)
    dataset = read_dataset(tmp_path / "out")
    assert dataset["classes"] == ["class3", "class1", "class0", "class2"] and dataset["labels"] == "ilsvrc-id"


def test_a_file_may_give_the_order(tmp_path: Path) -> None:
    listing = tmp_path / "classes.txt"
    listing.write_text("b\na\n\n")
    assert class_order(str(listing), {"a"}, bare(tmp_path)) == ["b", "a"]
    listing.write_bytes(b"\xef\xbb\xbfb\r\n a \r\n\r\n")  # as Windows writes it; folders may begin or end in a space
    assert class_order(str(listing), {" a ", "b"}, bare(tmp_path)) == ["b", " a "]
    listing.write_text("b\na\nb\n")
    with pytest.raises(AlexprepError, match="names class 'b' twice"):
        class_order(str(listing), {"a"}, bare(tmp_path))
    with pytest.raises(AlexprepError, match="neither auto, sorted, ilsvrc-id, nor a text file"):
        class_order("srted", {"a"}, bare(tmp_path))


@pytest.mark.parametrize("rule", ["auto", "sorted"])
def test_sorted_is_by_bytes(rule: str, tmp_path: Path) -> None:
    assert class_order(rule, {"é", "z", "Z", "n2", "n10"}, bare(tmp_path)) == ["Z", "n10", "n2", "z", "é"]


# What could be read in two ways is refused; the same images are the same inputs, packed or not, by path or by URL


@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        ("", ("cat/a.jpg", "dog/b.jpg", "dog/c.jpg")),
        ("", ("train/cat/a.jpg", "docs/cat/b.txt", "cover.jpg")),
        ("", ("train/cat/a.jpg", "train/notes.txt", "Validation/cat/b.jpg", "pictures/dog/c.jpg")),
        ("", ("README", "cat/a.jpg", "dog/b.jpg")),
        ("", ("val/c0/a.jpg", "val/c1/b.jpg")),
        ("", ("Test/c0/a.jpg", "Test/c1/a.jpg")),
        ("set/", ("set/val/c0/a.jpg",)),
        ("set/", ("set/c0/a.jpg", "set/c1/b.jpg")),
        ("train/", ("train/val/c0/a.jpg", "train/test/c0/b.jpg")),
        ("set/", ("set/noise.csv", "set/train/cat/a.jpg", "set/val/cat/b.jpg")),  # as Imagenette
        ("set/", ("set/LICENSE.txt", "set/daisy/a.jpg", "set/rose/b.jpg")),  # as the TensorFlow flowers
        ("set/", ("README.md", "set/docs/b.jpg", "set/train/cat/a.jpg")),
    ],
)
def test_a_tar_has_the_splits_and_classes_of_its_folder(wrap: str, names: tuple[str, ...], tmp_path: Path) -> None:
    """A folder that wraps all others tells nothing, and may hold papers."""
    inputs = listed(find_source(str(packed(tmp_path / "photos.tar", *names))))
    inside = listed(find_source(str(unpacked(tmp_path / "photos", *names) / wrap)))
    assert inputs == [(split, class_name, wrap.encode() + name) for split, class_name, name in inside] and inputs


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("train/a.jpg", "val/b.jpg"), "holds no class folders"),
        (("train/cat/a.jpg", "val/b.jpg"), "holds no class folders"),
        (("train/a.jpg", "cat/b.jpg"), "holds no class folders"),
        (
            ("test/a.jpg", "cat/b.jpg", "dog/c.jpg"),
            "holds test, which by name is a split, and beside it 2 pictures in 2 other",
        ),
        (
            ("cat/a.jpg", "dog/b.jpg", "dog/deep/c.jpg", "dog/deep/d.jpg"),
            "pictures on several levels. Any of these levels may be the classes",
        ),
        (("Test/c0/deep/a.jpg", "Test/c1/a.jpg"), "folders that hold folders .c0/deep"),
        (("train/val/a.jpg", "train/cat/b.jpg"), "by its name val is no class"),
        (("val/test/a.jpg", "val/test/b.jpg"), "holds no class folders, and nothing beside it tells"),
        (("train/cat/a.jpg", "training/cat/b.jpg"), "holds train and training, which both mean 'train'"),
        (("Train/cat/a.jpg", "train/cat/b.jpg"), "holds Train and train, which both mean 'train'"),
    ],
)
def test_a_tar_is_refused_as_its_folder_is(names: tuple[str, ...], words: str, tmp_path: Path) -> None:
    for place in (packed(tmp_path / "photos.tar", *names), unpacked(tmp_path / "photos", *names)):
        refused(place, words)


def test_images_in_no_class_folder_are_told_and_many_are_a_question(tmp_path: Path) -> None:
    loose, classes = ("a.jpg", "b.jpg"), ("cat/c.jpg", "dog/d.jpg", "dog/e.jpg", "0a1f")
    for n, names in enumerate(((*loose[:1], *classes), (*loose, *classes))):
        for place in (packed(tmp_path / f"{n}.tar", *names), unpacked(tmp_path / str(n), *names)):
            if n:
                refused(place, r"2 pictures in .* and in no class folder, such as a\.jpg, beside 2 folders with 3")
                continue
            account = Account()
            assert len(list(find_source(str(place)).inputs(account))) == 3
            assert (
                account.passed_over["a picture in no class folder"].count == 2 and "1 picture in" in account.warnings[0]
            )


@pytest.mark.parametrize("again", ["cat/a.jpg", "./cat/a.jpg", "/cat//a.jpg"])
def test_a_member_that_is_there_twice_is_refused(again: str, tmp_path: Path) -> None:
    refused(packed(tmp_path / "photos.tar", "cat/a.jpg", "dog/a.jpg", again), r"photos\.tar holds cat/a\.jpg twice")


def test_sources_that_hold_no_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\n")
    for place, words in (
        (packed(tmp_path / "empty.tar"), r"empty\.tar holds no images: expected a tar of CLASS/IMAGE"),
        (packed(tmp_path / "hidden.tar", "cat/.a.jpg"), r"hidden\.tar holds no images"),
        (tmp_path / "list.csv", r"list\.csv has no row below its header: it needs one for each image"),
        (write_tar(tmp_path / "set.tar", {"a.jpg": b"", "a.cls": b"1", "b.jpg": b""}), "sample b has no label among"),
        (tmp_path / "nowhere", "does not exist"),
        (unpacked(tmp_path, "file") / "file", "is a file"),
        (unpacked(tmp_path / "bare", ".hidden"), "holds no class folders"),
    ):
        refused(place, words)


def test_two_folders_are_never_one_class(tmp_path: Path) -> None:
    escaped = unpacked(tmp_path / "both", "\\xff/a.jpg", b"\xff/b.jpg")
    tar = packed(tmp_path / "both.tar", "\\xff/a.jpg", os.fsdecode(b"\xff/b.jpg"))
    splits = unpacked(tmp_path / "splits", "train/\\xff/a.jpg", b"val/\xff/b.jpg")
    for place in (escaped, tar, splits):
        refused(place, r"the folders b'.*' and b'.*', both the class \\xff: rename one")


def test_shards_never_hide_the_source_they_are_made_of(photos: Path, tmp_path: Path) -> None:
    content = (photos / "train/class0/000.JPEG").read_bytes()
    tars = tmp_path / "tars"
    tars.mkdir()
    packed(tars / "train.tar", "cat/a.jpg", content=content)
    folders = unpacked(tmp_path / "folders", "training/cat/a.jpg", content=content)
    shards = tmp_path / "shards"
    write_tar(shards / "training/0.tar", {"a.jpg": content, "a.cls": b"0"})
    for source, out in (
        (shards, shards),
        (tars, tars),
        (tars, tars / "a/b"),
        (folders, folders),
        (folders, folders / "Validation"),
        (folders, folders / "training/cat/out"),
        (folders / "training", folders / "training"),
        (folders / "training", folders / "training/a/b"),
    ):
        with pytest.raises(AlexprepError, match="among the images of SOURCE"):
            convert(source, out, OPTIONS, ENGINE)
    for source, out in (
        *((place, place / "out") for place in (tars, folders, shards)),
        (tars / "train.tar", tars),
    ):
        for _ in range(2):  # the second run finds what it began
            assert convert(source, out, OPTIONS, ENGINE).written == 1


def test_a_url_of_this_disk_is_the_path(photos: Path, tmp_path: Path) -> None:
    content = (photos / "train/class0/000.JPEG").read_bytes()
    odd = unpacked(tmp_path / "br{1}", "a::b/c::d.jpg", b"a::b/\xff.jpg", "file::/e.jpg", content=content)
    for place in (f"file://{odd}", f"local://{odd}"):
        source = find_source(place)
        assert source == find_source(str(odd)) and len(listed(source)) == 3
    assert convert(f"file://{odd}", tmp_path / "out", OPTIONS, ENGINE).written == 3
    for source_place, out in (
        (str(odd), f"file://{odd}/a::b/out"),
        (f"file://{odd}", f"{odd}/a::b/out"),
        (f"local://{odd}", f"file://{odd}/out"),
    ):
        with pytest.raises(AlexprepError, match="lies among the images"):
            convert(source_place, out, OPTIONS, ENGINE)
    refused(f"file://{tmp_path}/nowhere", "does not exist")


def test_names_in_a_store_are_no_chains_of_stores_nor_patterns(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("a::b/c::d.jpg", "file::/e.jpg", "x{1}/f.jpg"):
        memory.pipe_file(f"/chains{{0}}/{name}", name.encode())
    tar = packed(tmp_path / "{0..3}.tar", "a.jpg", "a.cls", content=b"0")
    memory.pipe_file("/tars/{0..3}.tar", tar.read_bytes())
    for place in ("memory://tars", str(tmp_path)):
        assert listed(find_source(place + "/{0..3}.tar")) == [("train", "0", b"a.jpg")]
    source = find_source("memory://chains{0}")
    assert [class_name for _, class_name, _ in listed(source)] == ["a::b", "file::", "x{1}"]
    for entry in source.inputs(Account()):
        assert source.read(entry.location) == entry.location.path


def test_links_that_lead_nowhere_are_rejected_each(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "source"
    unpacked(root, "train/cat/a.jpg", "train/dog/b.jpg", content=(photos / "train/class0/000.JPEG").read_bytes())
    loop, below_a_file, long, nothing = "loop", "train/cat/a.jpg/x", "x" * 300, "nowhere"
    for folder in (tmp_path, root, root / "train", root / "train/cat"):
        for name, target in (("loop", loop), ("file", root / below_a_file), ("long", long), ("gone", nothing)):
            (folder / name).symlink_to(target)
    assert {entry.name for entry in LocalFiles(bytes(root / "train")).entries() if entry.is_folder} == {b"cat", b"dog"}
    report = convert(root, tmp_path / "out", OPTIONS, ENGINE, max_rejects=4)
    assert report.written == 2 and report.rejected.total() == 4
    assert all(reason.startswith("cannot be read: ") for reason in report.rejected)
    find_source(str(root)).devkit()  # which looks at the folder above too


@pytest.mark.parametrize("layout", ["folders", "ilsvrc"])
def test_stores_that_fsspec_opens(layout: str, folders: Path, archives: Path, reference: Path, tmp_path: Path) -> None:
    """In this process, from and to fsspec's store in memory; by worker processes, to its file:// store."""
    source = folders if layout == "folders" else archives
    store = fsspec.filesystem("memory")
    store.put(str(source), f"/{layout}", recursive=True)
    convert(f"memory://{layout}", "memory://out", OPTIONS, ENGINE)
    made = folder_at("memory://out")
    got = {name: hashlib.sha256((made / name).read_bytes()).hexdigest() for name in shards_of(reference)}
    assert got == shards_of(reference)
    assert verify("memory://out", ENGINE, decode=True).problems == []
    convert(f"memory://{layout}", "memory://out", OPTIONS, ENGINE)  # nothing to do
    there, here = (rgb_statistics.pca_stats(folder, "train", ENGINE) for folder in (made, reference))
    assert (there.mean_image() == here.mean_image()).all() and (there.covariance == here.covariance).all()
    if layout == "folders":
        with pytest.raises(AlexprepError, match="lies among the images"):
            convert("memory://folders", "memory:///folders/train/out", OPTIONS, ENGINE)
    convert(f"file://{source}", f"file://{tmp_path / 'out'}", OPTIONS, 2)
    assert shards_of(tmp_path / "out") == shards_of(reference)
    refused("memory://nowhere", "does not exist")
    refused("nosuchprotocol://x", "no place that fsspec can open")
