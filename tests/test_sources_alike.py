"""The same images are the same inputs, packed or not, by path or by URL; what could be read in two ways is refused."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import fsspec
import pytest

from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sources.base import Source
from alexprep.shards.sources.detection import find_source
from alexprep.shards.storage import LocalFiles
from alexprep.shards.worker_pool import InProcessEngine

OPTIONS = ShardOptions(Target(size=32))
ENGINE = InProcessEngine()


def packed(path: Path, *names: str, content: bytes = b"") -> Path:
    """A tar with these members, in this order."""
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def unpacked(root: Path, *names: str | bytes, content: bytes = b"") -> Path:
    """A folder with these files."""
    for name in names:
        path = os.path.join(bytes(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
    return root


def listed(source: Source) -> list[tuple[str, str, bytes]]:
    """(split, class, name below the root or in the archive) of each input."""
    return [(split, class_name, at.member or at.path) for split, class_name, at in source.inputs()]


@pytest.mark.parametrize(
    "names",
    [
        ("cat/a.jpg", "dog/b.jpg", "dog/deep/c.jpg"),
        ("train/cat/a.jpg", "docs/cat/b.jpg", "cover.jpg"),
        ("train/cat/a.jpg", "train/notes.txt", "Validation/cat/b.jpg", "pictures/dog/c.jpg"),
        ("train/val/a.jpg", "train/cat/b.jpg"),
        ("README", "cat/a.jpg", "dog/b.jpg"),
    ],
)
def test_a_tar_has_the_splits_and_classes_of_its_folder(names: tuple[str, ...], tmp_path: Path) -> None:
    inputs = listed(find_source(str(packed(tmp_path / "photos.tar", *names))))
    assert inputs == listed(find_source(str(unpacked(tmp_path / "photos", *names)))) and inputs


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("train/a.jpg", "val/b.jpg"), "holds (no class folders|train/, which means a split, without class folders)"),
        (("train/cat/a.jpg", "val/b.jpg"), "holds (no class folders|val/, which means a split, without class folders)"),
        (("train/a.jpg", "cat/b.jpg"), "holds (no class folders|train/, which means a split, without class folders)"),
        (("train/cat/a.jpg", "training/cat/b.jpg"), "holds train and training, which both mean 'train': move one"),
        (("Train/cat/a.jpg", "train/cat/b.jpg"), "holds Train and train, which both mean 'train': move one"),
    ],
)
def test_a_tar_is_refused_as_its_folder_is(names: tuple[str, ...], words: str, tmp_path: Path) -> None:
    for place in (packed(tmp_path / "photos.tar", *names), unpacked(tmp_path / "photos", *names)):
        with pytest.raises(AlexprepError, match=words):
            listed(find_source(str(place)))


@pytest.mark.parametrize(
    "names",
    [
        ("set/noise.csv", "set/train/cat/a.jpg", "set/val/cat/b.jpg"),  # as Imagenette
        ("set/LICENSE.txt", "set/daisy/a.jpg", "set/rose/b.jpg"),  # as the TensorFlow flowers
        ("README.md", "set/docs/b.jpg", "set/train/cat/a.jpg"),
    ],
)
def test_a_folder_that_wraps_all_others_may_hold_papers(names: tuple[str, ...], tmp_path: Path) -> None:
    inputs = listed(find_source(str(packed(tmp_path / "set.tar", *names))))
    inside = listed(find_source(str(unpacked(tmp_path, *names) / "set")))
    assert inputs == [(split, class_name, b"set/" + name) for split, class_name, name in inside] and inputs


def test_images_of_a_tar_in_no_class_folder_are_refused(tmp_path: Path) -> None:
    for names in (("a.jpg", "cat/b.jpg"), ("train/a.jpg", "train/cat/b.jpg"), ("0a1f", "cat/b.jpg")):
        with pytest.raises(AlexprepError, match=rf"photos\.tar/{names[0]} lies in no class folder"):
            listed(find_source(str(packed(tmp_path / "photos.tar", *names))))


@pytest.mark.parametrize("again", ["cat/a.jpg", "./cat/a.jpg", "/cat//a.jpg"])
def test_a_member_that_is_there_twice_is_refused(again: str, tmp_path: Path) -> None:
    with pytest.raises(AlexprepError, match=r"photos\.tar holds cat/a\.jpg twice"):
        listed(find_source(str(packed(tmp_path / "photos.tar", "cat/a.jpg", "dog/a.jpg", again))))


def test_an_empty_tar_and_a_table_of_a_header_are_named(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\n")
    for place, words in (
        (packed(tmp_path / "empty.tar"), r"empty\.tar holds no images: expected a tar of CLASS/IMAGE"),
        (packed(tmp_path / "hidden.tar", "cat/.a.jpg"), r"hidden\.tar holds no images"),
        (tmp_path / "list.csv", r"list\.csv has no row below its header: it needs one for each image"),
    ):
        with pytest.raises(AlexprepError, match=words):
            listed(find_source(str(place)))


def test_two_folders_are_never_one_class(tmp_path: Path) -> None:
    escaped = unpacked(tmp_path / "both", "\\xff/a.jpg", b"\xff/b.jpg")
    tar = packed(tmp_path / "both.tar", "\\xff/a.jpg", os.fsdecode(b"\xff/b.jpg"))
    splits = unpacked(tmp_path / "splits", "train/\\xff/a.jpg", b"val/\xff/b.jpg")
    for place in (escaped, tar, splits):
        with pytest.raises(AlexprepError, match=r"the folders b'.*' and b'.*', both the class \\xff: rename one"):
            listed(find_source(str(place)))


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
    with pytest.raises(AlexprepError, match="does not exist"):
        find_source(f"file://{tmp_path}/nowhere")


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
    for entry in source.inputs():
        assert source.read(entry.location) == entry.location.path


def test_links_that_lead_nowhere_are_rejected_each(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "source"
    unpacked(root, "train/cat/a.jpg", "train/dog/b.jpg", content=(photos / "train/class0/000.JPEG").read_bytes())
    loop, below_a_file, long, nothing = "loop", "train/cat/a.jpg/x", "x" * 300, "nowhere"
    for folder in (tmp_path, root, root / "train", root / "train/cat"):
        for name, target in (("loop", loop), ("file", root / below_a_file), ("long", long), ("gone", nothing)):
            (folder / name).symlink_to(target)
    assert {entry.name for entry in LocalFiles(bytes(root / "train")).entries() if entry.is_folder} == {b"cat", b"dog"}
    report = convert(root, tmp_path / "out", OPTIONS, ENGINE)
    assert report.written == 2 and report.rejected.total() == 4
    assert all(reason.startswith("cannot be read: ") for reason in report.rejected)
    find_source(str(root)).devkit()  # which looks at the folder above too


def test_shards_never_hide_the_source_they_are_made_of(photos: Path, tmp_path: Path) -> None:
    content = (photos / "train/class0/000.JPEG").read_bytes()
    tars = tmp_path / "tars"
    tars.mkdir()
    packed(tars / "train.tar", "cat/a.jpg", content=content)
    folders = unpacked(tmp_path / "folders", "training/cat/a.jpg", content=content)
    shards = tmp_path / "shards"
    (shards / "training").mkdir(parents=True)
    with tarfile.open(shards / "training/0.tar", "w") as tar:
        for name, data in (("a.jpg", content), ("a.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for source, out in (
        (shards, shards),
        (tars, tars),
        (tars, tars / "a/b"),
        (folders, folders),
        (folders, folders / "Validation"),
        (folders, folders / "training/cat/out"),
    ):
        with pytest.raises(AlexprepError, match="among the images of SOURCE"):
            convert(source, out, OPTIONS, ENGINE)
    for source, out in (
        (tars, tars / "out"),
        (folders, folders / "out"),
        (shards, shards / "out"),
        (tars / "train.tar", tars),
    ):
        for _ in range(2):  # the second run finds what it began
            assert convert(source, out, OPTIONS, ENGINE).written == 1


def test_one_file_under_two_spellings_in_a_table(tmp_path: Path) -> None:
    for paths in (("a.jpg", "./a.jpg"), ("x//a.jpg", "x/./a.jpg"), ("/x/a.jpg", "file:///x/a.jpg")):
        (tmp_path / "list.csv").write_text(f"path,label\n{paths[0]},cat\n{paths[1]},dog\n")
        with pytest.raises(AlexprepError, match=r"lines 2 and 3 both name '.*a\.jpg', with the labels 'cat' and 'dog'"):
            listed(find_source(str(tmp_path / "list.csv")))
