"""`reader` and `label` in a DALI pipeline of one's own, against what `Samples` and `Loader` read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from alexprep.pipeline import Loader, decode_crop, label, reader
from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sample_reader import Samples
from alexprep.shards.sources.base import Choices
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.worker_pool import InProcessEngine


@pipeline_def(batch_size=8, num_threads=1, device_id=None)
def _pictures(data: Path, split: str = "train", options: Any = None) -> Any:
    encoded, digits = reader(data, split, **(options or {}))
    return decode_crop(encoded), label(digits)


def _read(data: Path, split: str) -> tuple[Any, Any]:
    """All of a split, in order: images and labels."""
    batches = DALIGenericIterator(_pictures(data, split), ["images", "labels"], reader_name="shards", auto_reset=True)
    count, parts = len(Samples(data, split)), [batch for (batch,) in batches]  # the last one is filled up
    assert all(part["labels"].shape == part["labels"].shape[:1] for part in parts)
    images, labels = (np.concatenate([part[name].numpy() for part in parts])[:count] for name in ("images", "labels"))
    return images, labels


def _small(tmp_path: Path, photos: Path, target: Target, labels: bool = True) -> Path:
    for n in range(6):
        folder = tmp_path / "source" / f"c{n % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / "train" / f"class{n % 4}" / f"{n:03d}.JPEG", folder)
        if n % 2 == 0:
            (folder / f"{n:03d}.json").write_text(json.dumps({"caption": str(n)}))
    source = find_source(str(tmp_path / "source"), None, Choices(unlabelled=None if labels else True))
    convert(source, tmp_path / "data", ShardOptions(target), InProcessEngine())
    return tmp_path / "data"


def test_images_and_labels_are_the_loader_s(data: Path) -> None:
    images, labels = _read(data, "val")
    with Loader(data, "val", batch_size=20, augmentation="none", order="sequential", memory_format="NHWC") as loader:
        (batch,) = loader
    np.testing.assert_array_equal(images, batch.images.numpy())
    assert labels.dtype == np.int64 and labels.tolist() == batch.labels.tolist()


def test_members_with_metadata_are_passed_over(photos: Path, tmp_path: Path) -> None:
    data = _small(tmp_path, photos, Target(size=16, format="png"))
    assert _read(data, "train")[1].tolist() == Samples(data, "train").labels.tolist()


def test_no_label_is_minus_one(photos: Path, tmp_path: Path) -> None:
    assert _read(_small(tmp_path, photos, Target(size=16), labels=False), "train")[1].tolist() == [-1] * 6


def test_parts_of_several_processes_are_a_whole(data: Path) -> None:
    found: list[int] = []
    for shard in range(3):
        pipeline = _pictures(data, options={"shard_id": shard, "num_shards": 3, "random_shuffle": True, "seed": 5})
        batches = DALIGenericIterator(pipeline, ["images", "labels"], reader_name="shards")
        found += [each for (batch,) in batches for each in batch["labels"].tolist()]
    assert sorted(found) == sorted(Samples(data, "train").labels.tolist())


@pytest.mark.parametrize("number", [0, 7, 10, 999, 123456789])
def test_every_length_of_a_number(number: int) -> None:
    @pipeline_def(batch_size=2, num_threads=1, device_id=None)
    def numbers() -> Any:
        digits = [np.frombuffer(str(each).encode(), np.uint8) for each in (number, 42)]
        return label(fn.external_source(source=[digits], cycle=True, batch=True))

    (found,) = numbers().run()
    assert np.array(found.as_tensor()).tolist() == [number, 42]


def test_what_dali_s_reader_cannot(photos: Path, tmp_path: Path, data: Path) -> None:
    with pytest.raises(AlexprepError, match="raw pixels, which DALI has no decoder for: use Loader"):
        _pictures(_small(tmp_path, photos, Target(size=16, format="raw")))
    with pytest.raises(AlexprepError, match="has no samples in split 'test'; it has train, val"):
        _pictures(data, "test")
