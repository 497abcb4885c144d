"""The same images are the same inputs, packed or not, by path or by URL; what could be read in two ways is refused."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import fsspec
import pytest

from alexprep.shards.build import build
from alexprep.shards.codec import Target
from alexprep.shards.engines import InProcessEngine
from alexprep.shards.errors import AlexprepError
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sources.base import Source
from alexprep.shards.sources.files import LocalFiles
from alexprep.shards.sources.find import find_source

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


def test_a_url_of_this_disk_is_the_path(photos: Path, tmp_path: Path) -> None:
    content = (photos / "train/class0/000.JPEG").read_bytes()
    odd = unpacked(tmp_path / "br{1}", "a::b/c::d.jpg", b"a::b/\xff.jpg", "file::/e.jpg", content=content)
    for place in (f"file://{odd}", f"local://{odd}"):
        source = find_source(place)
        assert source == find_source(str(odd)) and len(listed(source)) == 3
    assert build(f"file://{odd}", tmp_path / "out", OPTIONS, ENGINE).written == 3
    for source_place, out in (
        (str(odd), f"file://{odd}/a::b/out"),
        (f"file://{odd}", f"{odd}/a::b/out"),
        (f"local://{odd}", f"file://{odd}/out"),
    ):
        with pytest.raises(AlexprepError, match="lies among the images"):
            build(source_place, out, OPTIONS, ENGINE)
    with pytest.raises(AlexprepError, match="does not exist"):
        find_source(f"file://{tmp_path}/nowhere")


def test_names_in_a_store_are_no_chains_of_stores() -> None:
    memory = fsspec.filesystem("memory")
    for name in ("a::b/c::d.jpg", "file::/e.jpg", "x{1}/f.jpg"):
        memory.pipe_file(f"/chains{{0}}/{name}", name.encode())
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
    report = build(root, tmp_path / "out", OPTIONS, ENGINE)
    assert report.written == 2 and report.rejected.total() == 4
    assert all(reason.startswith("cannot be read: ") for reason in report.rejected)
    find_source(str(root)).devkit()  # which looks at the folder above too


def test_one_file_under_two_spellings_in_a_table(tmp_path: Path) -> None:
    for paths in (("a.jpg", "./a.jpg"), ("x//a.jpg", "x/./a.jpg"), ("/x/a.jpg", "file:///x/a.jpg")):
        (tmp_path / "list.csv").write_text(f"path,label\n{paths[0]},cat\n{paths[1]},dog\n")
        with pytest.raises(AlexprepError, match=r"lines 2 and 3 both name '.*a\.jpg', with the labels 'cat' and 'dog'"):
            listed(find_source(str(tmp_path / "list.csv")))
