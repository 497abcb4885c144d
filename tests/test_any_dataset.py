"""Anyone's webdataset tars, from their statistics to a trained network that is shown photos."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alexprep.pipeline.augmentation import Augmentation
from alexprep.pipeline.loader import Loader
from alexprep.shards.any_dataset import dataset_facts, is_tars
from alexprep.shards.errors import AlexprepError
from alexprep.shards.rgb_statistics import pca_stats, publish_statistics, read_statistics
from alexprep.shards.worker_pool import InProcessEngine
from alexprep.train.config import TrainConfig
from alexprep.train.evaluation import evaluate_run
from alexprep.train.loading import load
from alexprep.train.trainer import train
from tests.source_checks import write_tar

Command = Callable[..., tuple[int, str, str]]
HERE = InProcessEngine()
RECIPE = """
from dataclasses import replace
from alexprep.pipeline import Augmentation
from alexprep.train import recipe as named

def recipe():
    seen = Augmentation(crop=32, scale=(0.5, 1), mean="channel", std="channel", noise="eigenvalue")
    return replace(named("tiny"), name="mixed", stored_sizes=(32, 600), augmentation=seen)
"""


def write_split(
    folder: Path, split: str, images: list[Image.Image], classes: int, more: dict[str, bytes] | None = None
) -> None:
    """Two tars of pictures without loss, with numbers as labels."""
    for shard in range(2):
        members: dict[str, bytes] = {}
        for n, image in list(enumerate(images))[shard::2]:
            file = io.BytesIO()
            image.save(file, "PNG")
            members |= {f"{n:03d}.png": file.getvalue(), f"{n:03d}.cls": str(n % classes).encode()}
        write_tar(folder / split / f"{shard:02d}.tar", members | (more or {} if shard else {}))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Of several sizes."""
    rng = np.random.default_rng(3)
    sizes = [(48, 40), (40, 64), (33, 33), (64, 47)]
    return [Image.fromarray(rng.integers(0, 256, (*sizes[n % 4], 3), np.uint8)) for n in range(14)]


@pytest.fixture
def tars(pictures: list[Image.Image], tmp_path: Path) -> Path:
    """12 training and 2 validation pictures of 3 and 2 classes."""
    write_split(tmp_path / "tars", "train", pictures[:12], 3)
    write_split(tmp_path / "tars", "val", pictures[12:], 2)
    return tmp_path / "tars"


def test_facts_are_those_of_the_tars(tars: Path, data: Path) -> None:
    facts = dataset_facts(tars)
    assert (facts["classes"], facts["image"]) == (["0", "1", "2"], {"size": None, "format": "tars"})
    assert facts["splits"] == {"train": {"samples": 12}, "val": {"samples": 2}}
    pattern = dataset_facts(f"{tars}/train/{{00..01}}.tar")
    assert list(pattern["splits"]) == ["train"] and pattern["digest"] != facts["digest"]
    assert is_tars(tars) and not is_tars(data)
    assert dataset_facts(data) == json.loads((data / "dataset.json").read_bytes())


def test_names_of_classes_must_be_the_same_in_all_splits(tmp_path: Path, encoded: Any, photo: Any) -> None:
    jpg = encoded(photo(40, 40, 1))
    write_tar(tmp_path / "train" / "0.tar", {"a.jpg": jpg, "a.cls": b"cat", "b.jpg": jpg, "b.cls": b"dog"})
    write_tar(tmp_path / "val" / "0.tar", {"a.jpg": jpg, "a.cls": b"dog"})
    with pytest.raises(
        AlexprepError, match=r"has other classes in val than elsewhere.*make a data set of them with `alexprep shard`"
    ):
        dataset_facts(tmp_path)


@pytest.mark.parametrize("equal", [True, False])
def test_statistics_are_those_of_the_pixels(equal: bool, pictures: list[Image.Image], tmp_path: Path) -> None:
    """By float64 over all pixels. Of several sizes there is no mean image."""
    images = [each.resize((36, 36)) for each in pictures] if equal else pictures
    write_split(tmp_path / "tars", "train", images, 3)
    found = pca_stats(tmp_path / "tars", "train", HERE)
    pixels = np.concatenate([np.asarray(each, np.float64).reshape(-1, 3) for each in images])
    np.testing.assert_allclose(found.channel_means, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(pixels.T, bias=True), rtol=1e-9)
    mean = np.mean([np.asarray(each, np.float64) for each in images], axis=0) if equal else None
    if mean is None:
        assert found.mean_HWC is None
    else:
        np.testing.assert_allclose(found.mean_image(), mean, rtol=1e-12)
    publish_statistics(found, tmp_path / "tars", "train")
    again = read_statistics(tmp_path / "tars")
    assert again.data_digest == dataset_facts(tmp_path / "tars")["digest"]
    if mean is None:
        assert again.mean_HWC is None
    else:
        assert np.array_equal(again.mean_image(), found.mean_image())
        whole = Augmentation(crop=36)
        with Loader(tmp_path / "tars", batch_size=14, augmentation=whole, views="centre", order="sequential") as loader:
            (batch,) = loader
        shown = np.asarray(images[0], np.float32) - mean.astype(np.float32)
        np.testing.assert_allclose(batch.images[0].permute(1, 2, 0), shown, atol=1e-4)


def test_samples_that_cannot_be_used_are_left_out_where_that_is_asked(
    pictures: list[Image.Image], tmp_path: Path
) -> None:
    write_split(tmp_path / "tars", "train", pictures, 3, {"x.png": b"no picture", "x.cls": b"1"})
    with pytest.raises(AlexprepError, match=r"1 samples cannot be used, the first: .*--on-bad skip"):
        pca_stats(tmp_path / "tars", "train", HERE)
    assert pca_stats(tmp_path / "tars", "train", HERE, on_bad="skip").images == 14
    (tmp_path / "mixed.py").write_text(RECIPE)
    publish_statistics(pca_stats(tmp_path / "tars", "train", HERE, on_bad="skip"), tmp_path / "tars", "train")
    options: dict[str, Any] = {"recipe": str(tmp_path / "mixed.py"), "device": "cpu", "batch_size": 7, "threads": 1}
    options |= {"data": tmp_path / "tars", "runs": tmp_path / "runs", "epochs": 1}
    with pytest.raises(AlexprepError, match="leave such samples out with"):
        train(TrainConfig(**options))
    assert not (tmp_path / "runs").exists()
    assert train(TrainConfig(**options, on_bad="skip"))["steps"] == 2
    with pytest.raises(AlexprepError, match="--on-bad skip is for one rank"):
        TrainConfig(**options, on_bad="skip", ranks=2)


def test_a_mean_image_needs_images_of_one_size(tars: Path, data: Path, tmp_path: Path) -> None:
    publish_statistics(pca_stats(tars, "train", HERE), tars, "train")
    options: dict[str, Any] = {"recipe": "tiny", "runs": tmp_path / "runs", "device": "cpu", "threads": 1}
    with pytest.raises(AlexprepError, match="images of several sizes have none: use mean 'channel'"):
        train(TrainConfig(data=tars, **options))
    with pytest.raises(AlexprepError, match="images of 64 x 64 pixels have none: use mean 'channel'"):
        train(TrainConfig(data=data, statistics=tars, **options))
    assert not (tmp_path / "runs").exists()
    settings = ("augmentation.mean=channel", "augmentation.scale=0.5,1", "batch_size=6", "epochs=1")
    assert train(TrainConfig(data=tars, settings=settings, **options))["steps"] == 2


def test_from_tars_to_a_network_that_is_shown_photos(
    tars: Path, pictures: list[Image.Image], tmp_path: Path, command: Command
) -> None:
    """An evaluation of the tars and the transform of a run give the same values."""
    assert command("pca-stats", str(tars), "--workers", "1")[1].count("no mean image") == 1
    (tmp_path / "mixed.py").write_text(RECIPE)
    recipe = ("--recipe", "mixed.py", "--device", "cpu", "--threads", "1")
    status, out, err = command("train", "--data", str(tars), *recipe, "--epochs", "2", "--batch-size", "5", "--json")
    assert status == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert (summary["steps"], summary["val_split"]) == (6, "val")
    run = tmp_path / "runs" / "mixed"
    found = evaluate_run(run, recipe="mixed.py", device="cpu", threads=1)
    assert (found["samples"], found["top1_error"]) == (2, summary["val_top1_error"])
    from alexprep.train.recipes import recipe as named

    _, classes, transform = load(run, recipe="mixed.py")
    seen = named("mixed.py").augmentation
    options: dict[str, Any] = {"augmentation": seen, "views": "centre", "order": "sequential", "threads": 1}
    with Loader(tars, "val", batch_size=2, statistics=tars, **options) as loader, transform:
        (batch,) = loader
        assert np.array_equal(transform(pictures[12:]).numpy(), batch.images.numpy())
        with pytest.raises(AlexprepError, match="picture 1 cannot be decoded: not an image"):
            transform(b"no picture")
    assert classes == ["0", "1", "2"]
    status, _, err = command("eval", "mixed", *recipe, "--predictions", "p.csv")
    assert status == 1 and "is no data set of `alexprep shard`" in err


def test_a_pattern_has_its_statistics_elsewhere(tars: Path, tmp_path: Path, command: Command) -> None:
    pattern = f"{tars}/train/{{00..01}}.tar"
    status, _, err = command("pca-stats", pattern)
    assert status == 2 and "is no folder that could take the result: name one with --out" in err
    (tmp_path / "mixed.py").write_text(RECIPE)
    words = (
        "train",
        "--data",
        pattern,
        "--recipe",
        "mixed.py",
        "--device",
        "cpu",
        "--batch-size",
        "6",
        "--threads",
        "1",
    )
    assert "with --out FOLDER, and name that folder with --statistics" in command(*words)[2]
    assert command("pca-stats", pattern, "--out", "found", "--workers", "1")[0] == 0
    assert command(*words, "--statistics", "found", "--steps", "1")[0] == 0
    config = json.loads((tmp_path / "runs/mixed/config.json").read_text())
    assert config["options"]["statistics"] == str(tmp_path / "found")
    assert config["identity"]["statistics"] == config["identity"]["data_digest"] == dataset_facts(pattern)["digest"]
    status, _, err = command("train", "--resume", "--recipe", "mixed.py", "--device", "cpu", "--steps", "2")
    assert status == 0, err
