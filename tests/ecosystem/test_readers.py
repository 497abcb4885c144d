"""What other libraries read of our shards, with and without metadata, and the programs that show how."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alexprep.shards.conversion import convert
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sample_reader import Samples
from alexprep.shards.sources.base import Choices
from alexprep.shards.sources.layout_detection import find_source

datasets: Any = pytest.importorskip("datasets", reason="datasets is not installed: `make ecosystem` has it")
timm_data: Any = pytest.importorskip("timm.data", reason="timm is not installed: `make ecosystem` has it")

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples" / "readers"
# What an example prints last.
READERS = {
    "torchvision_transforms": "48 samples in 3 batches of (3, 48, 48)",
    "timm_reader": "20 samples in 2 batches of (3, 48, 48)",
    "ray_data": "48 samples of 4 classes",
    "huggingface_datasets": "48 samples, and in other splits 20",
    "huggingface_trainer": "6 steps, at epoch 2",
    "accelerate_loop": "3 steps, at epoch 1",
    "torch_dataloader": "48 samples in 3 batches",
    "dali_iterator": "48 samples in 3 batches",
    "webdataset_alone": "48 samples in 3 batches",
}
# Data sets: how they differ from 64-pixel JPEGs with labels and without metadata.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "along": {},
    "png": {"format": "png"},
    "webp": {"format": "webp", "fit": "shorter"},
    "raw": {"format": "raw"},
    "oblong": {"format": "raw", "fit": "longer"},
    "unlabelled": {},
}


@pytest.fixture(scope="module", autouse=True)
def _no_network_and_a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        patch.setenv("HF_HOME", str(cache))
        patch.setenv("HF_HUB_OFFLINE", "1")
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="module")
def sets(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shared photos as data sets: without metadata, with them for every other picture, lossless, as pixels, without labels."""
    root = tmp_path_factory.mktemp("sets")
    along = Path(shutil.copytree(photos, root / "photos"))
    for path in along.glob("*/*/*.JPEG"):
        if int(path.stem) % 2:
            path.with_suffix(".json").write_text(json.dumps({"caption": f"{path.stem} é", "boxes": [[1, 2.5, 3, 4]]}))
    for kind, form in KINDS.items():
        options = ShardOptions(Target(size=64, **form), shard_samples=7)
        source: Any = along if kind == "along" else photos
        if kind == "unlabelled":
            source = find_source(str(photos / "train"), None, Choices(unlabelled=True))
        convert(source, root / kind, options, 1)
    return {kind: root / kind for kind in KINDS}


def _pixels(samples: Samples, row: int) -> np.ndarray[Any, Any]:
    encoded = samples.encoded(row).tobytes()
    if encoded.startswith(b"\x93NUMPY"):
        return np.asarray(np.load(io.BytesIO(encoded)))
    return np.array(Image.open(io.BytesIO(encoded)).convert("RGB"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset_gives_images_class_labels_and_metadata(kind: str, streaming: bool, sets: dict[str, Path]) -> None:
    splits = datasets.load_dataset(str(sets[kind]), streaming=streaming)
    assert list(splits) == (["train"] if kind == "unlabelled" else ["train", "val"])
    for split, table in splits.items():
        samples = Samples(sets[kind], split)
        (column,) = set(table.features) - {"cls", "json", "__key__"}
        form = KINDS[kind].get("format", "jpg")
        assert column == ("npy" if form == "raw" else form)
        assert isinstance(table.features[column], datasets.Image) == (form != "raw")
        assert ("cls" in table.features) == (kind != "unlabelled") and ("json" in table.features) == (kind == "along")
        if "cls" in table.features:
            assert table.features["cls"].names == samples.dataset["classes"]
        rows = list(table)
        assert len(rows) == len(samples)
        for number, row in enumerate(rows):
            assert row["__key__"] == samples.key(number) and row.get("cls", -1) == samples.labels[number]
            assert (row.get("json") or {}) == samples.metadata(number)
            np.testing.assert_array_equal(np.array(row[column], np.uint8), _pixels(samples, number))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["plain", "along", "png", "webp"])
def test_timm_reads_all_of_a_split(kind: str, sets: dict[str, Path]) -> None:
    samples = Samples(sets[kind], "val")
    dataset = timm_data.create_dataset("wds/x", root=str(sets[kind]), split="val", is_training=False, batch_size=8)
    found = list(dataset)
    assert [label for _, label in found] == samples.labels.tolist()
    for number, (image, _) in enumerate(found):
        np.testing.assert_array_equal(np.array(image), _pixels(samples, number))
    del dataset
    gc.collect()  # it leaves tars to be closed whenever that is; here, where the warning is expected


@pytest.mark.parametrize("kind", ["plain", "along"])
@pytest.mark.parametrize("name", READERS)
def test_examples(name: str, kind: str, sets: dict[str, Path], tmp_path: Path) -> None:
    """As a user runs them; these libraries warn of each other, so warnings are not errors here."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), str(sets[kind])]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "local", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == READERS[name], done.stdout
    assert "Traceback" not in done.stderr, done.stderr
