"""`webdataset_pipeline`: each sample once over ranks and workers, as it is stored, and nothing but images and labels is looked at."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from alexprep.pipeline.wds_pipeline import webdataset_pipeline
from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sample_reader import Samples

COUNT = 48  # of the training split, in seven shards, the last of which is smaller


def keys_of(data: Path, **options: Any) -> list[str]:
    return [key for (key,) in webdataset_pipeline(data, parts=["key"], **options)]


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_each_sample_once_over_ranks_and_workers(
    shuffle: bool, even: bool, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = keys_of(data, shuffle=False)
    assert len(whole) == len(set(whole)) == COUNT and whole == sorted(whole)
    for world_size, workers in itertools.product((1, 2, 5), (1, 3, 11)):
        monkeypatch.setenv("NUM_WORKERS", str(workers))
        parts = []
        for rank, worker in itertools.product(range(world_size), range(workers)):
            monkeypatch.setenv("WORKER", str(worker))
            parts.append(keys_of(data, shuffle=shuffle, even=even, rank=rank, world_size=world_size, buffer=5))
        seen = list(itertools.chain.from_iterable(parts))
        left_out = COUNT % world_size if even else 0
        assert len(seen) == COUNT - left_out and set(seen) <= set(whole) and len(set(seen)) == len(seen)
        sizes = [[len(part) for part in parts[rank * workers : (rank + 1) * workers]] for rank in range(world_size)]
        ranks = [sum(counts) for counts in sizes]
        assert max(ranks) - min(ranks) <= (0 if even else 1)
        assert all(max(counts) - min(counts) <= 1 for counts in sizes)
        assert not even or all(counts == sizes[0] for counts in sizes)  # and so the same batches
        assert shuffle or seen == whole[: len(seen)]


def test_the_place_of_a_rank_is_torchruns(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert keys_of(data) == keys_of(data, rank=1, world_size=3) != keys_of(data, rank=0, world_size=3)


def test_orders_follow_seed_and_epoch(data: Path) -> None:
    pipeline = webdataset_pipeline(data, parts=["key"], seed=3, buffer=20)
    orders = []
    for epoch in (0, 1, 2, 0):
        pipeline.set_epoch(epoch)
        orders.append([key for (key,) in pipeline])
    assert orders[0] == orders[3] == keys_of(data, seed=3, buffer=20)
    assert len({tuple(order) for order in orders}) == 3 and keys_of(data, seed=4, buffer=20) not in orders
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    shards = Samples(data, "train").index["shard"][[int(key) for key in keys_of(data, seed=3, buffer=0)]]
    assert np.count_nonzero(np.diff(shards)) == 6 and shards.tolist() != sorted(shards.tolist())  # shard by shard


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_dataloader(workers: int, data: Path) -> None:
    """Epoch after epoch in workers that stay; labels are the index's, which the keys find."""
    pipeline = webdataset_pipeline(data, image="torch", seed=1, transform=torch.Tensor.float)
    loader: Any = DataLoader(
        pipeline, batch_size=5, num_workers=workers, persistent_workers=workers > 0, timeout=60 * (workers > 0)
    )
    labels = Samples(data, "train").labels.tolist()
    orders = []
    for epoch in range(2):
        pipeline.set_epoch(epoch)
        keys: list[str] = []
        for images, batch_labels, batch_keys in loader:
            assert images.dtype == torch.float32 and images.shape[1:] == (3, 64, 64)
            assert batch_labels.tolist() == [labels[int(key)] for key in batch_keys]
            keys += batch_keys
        assert sorted(map(int, keys)) == list(range(COUNT))
        orders.append(keys)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("image_format", ["jpg", "png", "raw"])
def test_images_are_those_that_are_stored(image_format: Any, photos: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path, ShardOptions(Target(size=48, format=image_format), limit=5), 1)
    samples = Samples(tmp_path, "train")
    options: Any = {"shuffle": False, "parts": ["label", "image"]}
    kinds = [list(webdataset_pipeline(tmp_path, image=image, **options)) for image in ("numpy", "torch", "pil")]
    assert [len(kind) for kind in kinds] == [5, 5, 5]
    for row, ((label, array), (_, tensor), (_, picture)) in enumerate(zip(*kinds, strict=True)):
        stored = io.BytesIO(samples.encoded(row).tobytes())
        expected = np.load(stored, allow_pickle=False) if image_format == "raw" else np.asarray(Image.open(stored))
        assert label == samples.labels[row] and array.dtype == np.uint8 and tensor.dtype == torch.uint8
        np.testing.assert_array_equal(array, expected)
        np.testing.assert_array_equal(tensor.permute(1, 2, 0).numpy(), expected)
        np.testing.assert_array_equal(np.asarray(picture), expected)
        assert picture.mode == "RGB"


class Trap:
    """Makes the folder "sprung" when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("sprung",)


def test_nothing_is_unpickled_and_no_shell_is_called(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    shard = copy / "train" / "train-000000.tar"
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(Trap())
    with tarfile.open(shard, "a") as tar:
        last = tar.getnames()[-1].partition(".")[0]
        for extension in ("pyd", "pickle", "pkl", "pth", "npy", "ten"):
            member = tarfile.TarInfo(f"{last}.{extension}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setenv("GOPEN_REWRITE", f"{copy}=pipe:mkdir sprung; cat {data}")
    assert sorted(map(int, keys_of(copy))) == list(range(COUNT))
    assert not Path("sprung").exists()
    pickle.loads(content)
    assert Path("sprung").exists()  # it would have been
    with pytest.raises(AlexprepError, match=r"pipe:true/dataset\.json does not exist"):
        webdataset_pipeline("pipe:true")
    with pytest.raises(AlexprepError, match=r"memory://data is no local folder: copy the shards"):
        webdataset_pipeline("memory://data")


def test_damage_is_named(data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    shard, index = copy / "train" / "train-000002.tar", Samples(data, "train").index
    content, at = shard.read_bytes(), int(index[index["shard"] == 2][3]["offset"])
    for damaged, words in (
        (content[: at + 100], "cannot be read"),
        (content[: at - 512], "lacks 4 samples of its index"),
        (content[:at] + bytes(400) + content[at + 400 :], r"holds a sample \d+ that cannot be decoded"),
        (None, "cannot be read"),
    ):
        shard.unlink()
        if damaged is not None:
            shard.write_bytes(damaged)
        with pytest.raises(AlexprepError, match=rf"train-000002\.tar {words}.*`alexprep verify`"):
            list(webdataset_pipeline(copy))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "test"}, "no samples in split 'test'"),
        ({"parts": ()}, "parts"),
        ({"parts": ["image", "name"]}, "parts .* are not some of image, label, key"),
        ({"image": "jax"}, "image 'jax' is not one of numpy, torch, pil"),
        ({"rank": 0}, "world_size None is not a whole number"),
        ({"rank": 2, "world_size": 2}, r"rank 2 is not in \[0, 1\]"),
        ({"seed": -1}, "seed -1"),
        ({"buffer": 0.5}, "buffer 0.5 is not a whole number"),
    ],
)
def test_arguments_out_of_bounds(arguments: dict[str, Any], words: str, data: Path) -> None:
    with pytest.raises(AlexprepError, match=words):
        webdataset_pipeline(data, **arguments)
    with pytest.raises(AlexprepError, match="epoch -1"):
        webdataset_pipeline(data).set_epoch(-1)
