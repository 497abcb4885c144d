"""ImageNet as the hub packs it, in gzipped tars: read group by group, each archive decompressed once to be listed; damage is told."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest

from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.listing import list_inputs
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sources import grouped, hub_archives
from alexprep.shards.sources.base import Location
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.verification import verify
from alexprep.shards.worker_pool import InProcessEngine
from tests.source_checks import fails, flipped, pictures, tars
from tests.support.record_files import gzipped_tar

ENGINE = InProcessEngine()
WNIDS = ("n01443537", "n01629819", "n02124075", "n04067472")
OPTIONS = ShardOptions(Target(size=64, format="png"), shard_samples=7)


@pytest.fixture(scope="module")
def hub(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """`photos` as the hub packs ImageNet, and the same as class folders. Not to be changed."""
    root = tmp_path_factory.mktemp("hub")
    found: dict[str, list[tuple[str, bytes]]] = {"train": [], "val": []}
    for split, names in found.items():
        paths = sorted((photos / split).rglob("*.JPEG"), key=lambda path: hashlib.sha256(path.name.encode()).digest())
        for n, path in enumerate(paths, 1):
            wnid, data = WNIDS[int(path.parent.name[-1])], path.read_bytes()
            name = f"{wnid}_{n}_{wnid}.JPEG" if split == "train" else f"ILSVRC2012_val_{n:08d}_{wnid}.JPEG"
            names.append((name, data))
            folder = root / "folders" / split / wnid
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    (root / "hub/data").mkdir(parents=True)
    (root / "hub/README.md").write_text("a card")
    gzipped_tar(root / "hub/data/train_images_0.tar.gz", found["train"][:30])
    gzipped_tar(root / "hub/data/train_images_1.tar.gz", found["train"][30:])
    gzipped_tar(root / "hub/data/val_images.tar.gz", found["val"])
    gzipped_tar(root / "hub/data/test_images.tar.gz", [("ILSVRC2012_test_00000001.JPEG", found["val"][0][1])])
    return root / "hub", root / "folders"


def test_pictures_labels_and_names_are_those_of_class_folders(
    hub: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_archives, "SPACING_BYTES", 2**15 + 1)  # the least that there can be
    report = convert(hub[0], tmp_path / "a", OPTIONS, ENGINE)
    assert report.samples == {"test": 1, "train": 48, "val": 20} and report.found == 70
    convert(hub[1], tmp_path / "b", OPTIONS, ENGINE)
    found = pictures(tmp_path / "a")
    assert [label for _, label in found.pop("test")] == [""]
    assert found == pictures(tmp_path / "b")
    assert verify(tmp_path / "a", ENGINE).problems == []


def test_each_group_is_read_once_and_any_other_order_gives_the_same(
    hub: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_archives, "SPACING_BYTES", 2**15 + 1)
    source = find_source(str(hub[0]))
    listing = list_inputs(source)
    groups = {(row["path"], row["offset"]) for table in listing.splits.values() for row in table.to_pylist()}
    assert len(groups) > 6
    read: list[tuple[bytes, int]] = []
    once = hub_archives.HubArchives.read_group

    def counted(self: hub_archives.HubArchives, path: bytes, number: int) -> object:
        read.append((path, number))
        return once(self, path, number)

    monkeypatch.setattr(hub_archives.HubArchives, "read_group", counted)
    convert(source, tmp_path / "a", OPTIONS, ENGINE)
    assert sorted(read) == sorted(groups)
    first = tars(tmp_path / "a")
    for name in ("train-000003", "val-000001"):
        (tmp_path / "a" / name[:-7] / f"{name}.json").unlink()
        (tmp_path / "a" / name[:-7] / f"{name}.tar").unlink()
    grouped._groups.clear()
    convert(find_source(str(hub[0])), tmp_path / "a", OPTIONS, ENGINE)
    assert tars(tmp_path / "a") == first


def test_damage_is_told_before_anything_is_written(hub: tuple[Path, Path], tmp_path: Path) -> None:
    whole = (hub[0] / "data/val_images.tar.gz").read_bytes()
    place = tmp_path / "val_images.tar.gz"
    for data, words in [
        (flipped(whole, len(whole) // 2, 3), "download it again"),
        (whole[:-3000], "download it again"),
        (whole[: len(whole) // 2], ""),
        (whole[:-8] + bytes(8), "it is damaged or was cut: download it again"),
        (gzip.compress(gzip.decompress(whole)[:-20000]), "the archive was cut short"),
    ]:
        place.write_bytes(data)
        fails(place, words)
        with pytest.raises(AlexprepError):
            convert(str(place), tmp_path / "out", OPTIONS, ENGINE)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    gzipped_tar(place, [("a_n01443537.JPEG", b"x")] * 2)
    fails(place, "twice")


def test_an_archive_that_changed_since_it_was_listed_costs_its_own_pictures(
    hub: tuple[Path, Path], tmp_path: Path
) -> None:
    place = tmp_path / "train_images_0.tar.gz"
    place.write_bytes((hub[0] / "data/train_images_0.tar.gz").read_bytes())
    source = find_source(str(place))
    (item, *_) = list(list_inputs(source).splits["train"].to_pylist())
    gzipped_tar(place, [("n_n01443537.JPEG", b"short")])
    with pytest.raises(OSError, match="are not what they were when it was listed"):
        source.read(Location(item["path"], item["member"], item["offset"], item["size"]))


def test_pictures_of_train_without_a_class(tmp_path: Path) -> None:
    gzipped_tar(tmp_path / "train_images_0.tar.gz", [("a_n01443537.JPEG", b"x"), ("b.JPEG", b"y"), ("notes.txt", b"z")])
    listing = list_inputs(find_source(str(tmp_path)))
    assert len(listing.splits["train"]) == 1 and listing.account.passed_over_count == 2
    assert "1 of 2 pictures of train have no class in their name: they are passed over" in listing.account.warnings
