"""What a `Loader` opens: our data sets, other people's webdataset tars, stores; and what cannot be used together."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from alexprep.pipeline.augmentation import Augmentation, augment, draw
from alexprep.pipeline.loader import Loader
from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.storage import folder_at
from alexprep.shards.worker_pool import InProcessEngine

SIZES = ((90, 61), (61, 90), (64, 64), (57, 123), (200, 77), (75, 75), (333, 60))
FREE = Augmentation(crop=51, mean="imagenet", std="imagenet", noise="none")
PLAIN = Augmentation(crop=51, mean="none", noise="none")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _write(
    folder: Path, photo: Callable[..., Image.Image], encoded: Callable[..., bytes], spoil: bool = False
) -> dict[int, bytes]:
    """Four shards of 11 photos by webdataset's own writer, and each row's image; with `spoil`, one of each shard is damaged."""
    folder.mkdir()
    images = {}
    with wds.ShardWriter(str(folder / "part-%04d.tar"), maxcount=11, verbose=0) as writer:
        for n in range(44):
            picture = photo(*SIZES[n % len(SIZES)], seed=n)
            kind = "PNG" if n % 5 == 4 else "JPEG"
            data = encoded(picture, kind)
            if spoil and n % 11 == 6:  # half a file, or one without its header
                data = data[: len(data) // 8] if n % 2 else bytes(100) + data[100:]
            writer.write(
                {"__key__": f"img{n:05d}", "png" if kind == "PNG" else "jpg": data, "cls": str(n % 3).encode()}
            )
            images[n] = data
    return images


def test_webdataset_s_own_shards(photo: Any, encoded: Any, tmp_path: Path) -> None:
    """Every pixel against numpy over two epochs, on photos of odd sizes; labels as webdataset reads them."""
    images = _write(tmp_path / "wds", photo, encoded)
    source = tmp_path / "wds"
    named: Any
    for named in (f"{source}/part-{{0000..0003}}.tar", sorted(source.glob("*.tar"))):
        with Loader(named, batch_size=10, augmentation=FREE) as loader:
            assert (loader.samples, loader.classes) == (44, ["0", "1", "2"])
    with Loader(source, batch_size=10, augmentation=FREE, seed=4, memory_format="NHWC") as loader:
        assert (loader.samples, len(loader), loader.classes) == (44, 5, ["0", "1", "2"])
        for epoch in range(2):
            seen = []
            for batch in loader:
                for n, row in enumerate(batch.indices.tolist()):
                    picture = np.asarray(Image.open(io.BytesIO(images[row])).convert("RGB"))
                    draws = draw(FREE, 4, epoch, np.array([row]), np.array([picture.shape[:2]]))
                    expected = augment(picture, draws, 0, FREE, None)
                    limit = 1e-4 if b"PNG" in images[row][:4] else 0.1  # Pillow's JPEG may differ by a level or two
                    assert np.abs(batch.images[n].numpy() - expected).max() < limit
                seen += batch.indices.tolist()
                assert batch.labels.tolist() == [row % 3 for row in batch.indices.tolist()]
            assert sorted(seen) == list(range(44))


def test_augmentations_that_do_not_fit_say_what_does(photo: Any, encoded: Any, data: Path, tmp_path: Path) -> None:
    _write(tmp_path / "wds", photo, encoded)
    with Loader(tmp_path / "wds", batch_size=9, augmentation="resized", views="ten") as loader:
        assert next(iter(loader)).images.shape == (9, 10, 3, 224, 224)
    for name, words in (
        ("none", "whole images of several sizes"),
        ("paper", "stats.json does not exist: run `alexprep pca-stats` on"),
    ):
        with pytest.raises(AlexprepError, match=words):
            Loader(tmp_path / "wds", batch_size=9, augmentation=name)
    with pytest.raises(AlexprepError, match=r"mean 'crop' subtracts a mean image .* of several sizes"):
        Loader(tmp_path / "wds", batch_size=9, augmentation=Augmentation(crop=51), statistics=data)
    borrowed = Augmentation(crop=51, mean="channel", std="channel")
    with Loader(tmp_path / "wds", batch_size=9, augmentation=borrowed, statistics=data) as loader:
        assert abs(float(next(iter(loader)).images.mean())) < 3


def test_one_corrupt_image_each_under_every_policy(photo: Any, encoded: Any, tmp_path: Path) -> None:
    """Three epochs, all counts exact; the index finds those without a header, the decoder the rest."""
    _write(tmp_path / "wds", photo, encoded, spoil=True)
    resized = Augmentation(crop=33, scale=(0.2, 1), mean="none", noise="none")
    options: Any = {"batch_size": 8, "augmentation": resized, "seed": 1}
    with pytest.raises(AlexprepError, match=r"2 samples cannot be used, the first: .*part-0000\.tar: sample img00006 "):
        Loader(tmp_path / "wds", **options)
    with Loader(tmp_path / "wds", on_bad="skip", **options) as loader:
        assert [bad.key for bad in loader.bad] == ["img00006", "img00028"]
        assert (loader.samples, loader.skipped) == (42, 0)
        for epoch in range(3):
            rows = [row for batch in loader for row in batch.indices.tolist()]
            assert len(rows) == len(set(rows)) == 40
            assert loader.skipped == 2 * (epoch + 1)


def test_a_split_of_a_folder(photo: Any, encoded: Any, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name, count in (("train", 1), ("val", 2)):
        with wds.TarWriter(str(tmp_path / "set" / f"{name}-000.tar")) as tar:
            for n in range(count):
                tar.write({"__key__": f"{name}{n}", "jpg": encoded(photo(60, 60, seed=n)), "json": b'{"label": "cat"}'})
    for split, count in (("train", 1), ("val", 2)):
        with Loader(tmp_path / "set", split, batch_size=4, augmentation=FREE) as loader:
            assert (loader.samples, loader.classes) == (count, ["cat"])


@pytest.mark.parametrize("order", ["blocks", "streams", "sequential"])
def test_remote_data_sets(order: Any, data: Path, photos: Path) -> None:
    """A set in a store gives what the same set on a disk gives; shards are fetched ahead and let go."""
    store = f"memory://loader-{order}"
    convert(photos, folder_at(store), ShardOptions(Target(size=64), shard_samples=7), InProcessEngine())
    options: Any = {"batch_size": 5, "augmentation": PLAIN, "order": order}
    options |= {} if order == "sequential" else {"block_shards": 2}
    with Loader(data, **options) as local, Loader(store, **options) as remote:
        assert remote.digest == local.digest
        for _ in range(2):
            assert all(torch.equal(ours.images, theirs.images) for ours, theirs in zip(local, remote, strict=True))
    with pytest.raises(AlexprepError, match="order='streams'"):
        Loader(store, batch_size=5, augmentation=PLAIN)


def test_each_remote_shard_is_fetched_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where eight steps ahead lie in more shards than one step."""
    store = "memory://loader-once"
    convert(photos, folder_at(store), ShardOptions(Target(size=64), shard_samples=2), InProcessEngine())
    fetched: list[str] = []
    cat_file = MemoryFileSystem.cat_file

    def counted(system: MemoryFileSystem, path: str, *arguments: Any, **options: Any) -> Any:
        fetched.append(path)
        return cat_file(system, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    orders: tuple[dict[str, Any], ...] = ({"order": "sequential"}, {"order": "blocks", "block_shards": 2})
    for order in orders:
        fetched.clear()
        with Loader(store, batch_size=5, augmentation=PLAIN, views="centre", **order) as remote:
            list(remote)
        assert sorted(path[-10:] for path in fetched if path.endswith(".tar")) == [f"{n:06d}.tar" for n in range(24)]


def test_data_that_is_not_there(tmp_path: Path, data: Path) -> None:
    with pytest.raises(AlexprepError, match="make one with `alexprep shard SOURCE`"):
        Loader(tmp_path, batch_size=4)
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    shutil.rmtree(copy / "stats")
    with pytest.raises(AlexprepError, match="run `alexprep pca-stats`"):
        Loader(copy, batch_size=4, augmentation=Augmentation(crop=51))
    Loader(copy, batch_size=4, augmentation=PLAIN).close()
    next((copy / "train").glob("*.tar")).unlink()
    with (
        Loader(copy, batch_size=48, augmentation=PLAIN) as loader,
        pytest.raises(AlexprepError, match="cannot be read"),
    ):
        list(loader)
    (copy / "dataset.json").unlink()
    with pytest.raises(AlexprepError, match=r"unfinished data ?set"):
        Loader(copy, batch_size=4)
