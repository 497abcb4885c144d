"""Statistics against float64 over all pixels and scikit-learn's PCA; the same bits for any split of the work."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA

from alexprep.pipeline.augmentation import Augmentation
from alexprep.pipeline.loader import Loader
from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import MEAN_IMAGE, STATISTICS
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.rgb_statistics import Accumulator, Statistics
from alexprep.shards.sample_reader import Samples
from alexprep.shards.storage import digest_json, file_sha256, publish_json
from alexprep.shards.worker_pool import InProcessEngine

ENGINE = InProcessEngine()


def _images(data: Path, split: str) -> NDArray[np.uint8]:
    samples = Samples(data, split)
    encoded = (io.BytesIO(samples.encoded(row).tobytes()) for row in range(len(samples)))
    return np.stack([np.asarray(Image.open(buffer)) for buffer in encoded])


@pytest.fixture(scope="module")
def found(data: Path) -> Statistics:
    return rgb_statistics.pca_stats(data, "train", ENGINE)


def test_equals_float64_over_all_pixels(found: Statistics, data: Path) -> None:
    images = _images(data, "train").astype(np.float64)
    pixels = images.reshape(-1, 3)
    np.testing.assert_allclose(found.mean_image(), images.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.channel_means, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(pixels, rowvar=False, bias=True), rtol=1e-10)
    pca = PCA(svd_solver="full").fit(pixels)
    count = len(pixels)
    np.testing.assert_allclose(found.eigenvalues, pca.explained_variance_ * (count - 1) / count, rtol=1e-10)
    signs = np.sign((pca.components_ * found.eigenvectors.T).sum(axis=1))
    np.testing.assert_allclose(found.eigenvectors.T * signs[:, None], pca.components_, atol=1e-9)


def test_form_of_the_eigenpairs(found: Statistics) -> None:
    assert (np.diff(found.eigenvalues) < 0).all()
    np.testing.assert_allclose(found.eigenvectors.T @ found.eigenvectors, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(
        found.covariance @ found.eigenvectors, found.eigenvectors * found.eigenvalues, rtol=1e-9, atol=1e-9
    )
    largest = np.abs(found.eigenvectors).argmax(axis=0)
    assert (found.eigenvectors[largest, np.arange(3)] > 0).all()


def test_bits_do_not_depend_on_the_number_of_workers(data: Path, tmp_path: Path) -> None:
    """One made those in `data`."""
    for workers in (2, 3):
        rgb_statistics.publish_statistics(rgb_statistics.pca_stats(data, "train", workers), tmp_path, "train")
        for path in (data / "stats").iterdir():
            assert (tmp_path / "stats" / path.name).read_bytes() == path.read_bytes(), path.name


def test_bits_do_not_depend_on_the_sharding(found: Statistics, photos: Path, tmp_path: Path) -> None:
    """Other shards, another order, the same images: the same numbers."""
    convert(photos, tmp_path / "other", ShardOptions(Target(size=64), shard_samples=48, seed=5), ENGINE)
    other = rgb_statistics.pca_stats(tmp_path / "other", "train", ENGINE)
    assert found.data_digest != other.data_digest
    assert (found.mean_image() == other.mean_image()).all() and (found.covariance == other.covariance).all()


@pytest.mark.parametrize("size", [1, 15, 16, 17, 61])
def test_moments_are_exact_at_the_extremes(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (5, 3, size, size)
    for images in (np.full(shape, 255, np.uint8), rng.integers(0, 256, shape, dtype=np.uint8)):
        accumulator = Accumulator(size, size)
        for image in images:
            accumulator.add(image)
        moments = accumulator.moments()
        pixels = images.transpose(1, 0, 2, 3).reshape(3, -1).astype(object)
        assert (moments.products == pixels @ pixels.T).all()
        assert (moments.sums == images.sum(axis=0, dtype=np.int64)).all()


def test_many_images_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 holds its sums exactly, up to the moment when they are added to integers; and after it all goes on."""
    assert rgb_statistics._FLUSH * 255 < 2**24 and rgb_statistics._BLOCK * 255**2 < 2**24
    monkeypatch.setattr(rgb_statistics, "_FLUSH", 64)
    accumulator = Accumulator(1, 1)
    white = np.full((3, 1, 1), 255, np.uint8)
    for _ in range(3 * 64 + 5):
        accumulator.add(white)
    moments = accumulator.moments()
    assert (moments.sums == 197 * 255).all() and (moments.products == 197 * 255**2).all()


def test_other_formats(photos: Path, tmp_path: Path) -> None:
    """The pixels of lossless shards are the same, whatever holds them."""
    for form in ("png", "raw"):
        convert(photos / "val", tmp_path / form, ShardOptions(Target(size=32, format=form)), ENGINE)
        found = rgb_statistics.pca_stats(tmp_path / form, "train", ENGINE)
        pixels = _images(tmp_path / "png", "train").reshape(-1, 3).astype(np.float64)
        np.testing.assert_allclose(found.covariance, np.cov(pixels, rowvar=False, bias=True), rtol=1e-10)


def test_one_colour_has_no_variance(tmp_path: Path, encoded) -> None:
    (tmp_path / "source" / "grey").mkdir(parents=True)
    for n in range(3):
        (tmp_path / "source" / "grey" / f"{n}.png").write_bytes(encoded(Image.new("RGB", (40, 30), (9, 9, 9)), "PNG"))
    convert(tmp_path / "source", tmp_path / "out", ShardOptions(Target(size=16, format="png")), ENGINE)
    found = rgb_statistics.pca_stats(tmp_path / "out", "train", ENGINE)
    assert (found.eigenvalues == 0).all() and np.isfinite(found.eigenvectors).all()


def test_read_gives_back_what_was_published(found: Statistics, data: Path) -> None:
    for read in (rgb_statistics.read_statistics(str(data)), rgb_statistics.read_statistics(data, found.data_digest)):
        assert (read.mean_image() == found.mean_image()).all() and (read.eigenvectors == found.eigenvectors).all()


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "copy"))


def _edit(data: Path, key: str, value: object, signed: bool = True) -> None:
    """Changes stats.json, or takes `key` out where `value` is None; `signed` also brings its digest up to date."""
    document = json.loads((data / STATISTICS).read_bytes())
    digest = document.pop("digest")
    document = {name: old for name, old in document.items() if name != key} | ({} if value is None else {key: value})
    publish_json(data / STATISTICS, document | {"digest": digest_json(document) if signed else digest})


def _cut_mean(data: Path) -> None:
    """A mean image that is half there, as stats.json says."""
    mean = data / MEAN_IMAGE
    mean.write_bytes(mean.read_bytes()[: mean.stat().st_size // 2])
    _edit(data, "mean_image_sha256", file_sha256(mean))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: _edit(data, "data_digest", "0" * 64), r"stats\.json describes other shards"),
        (lambda data: _edit(data, "images", 3, signed=False), r"stats\.json was changed since it was written"),
        (lambda data: (data / MEAN_IMAGE).write_bytes(b""), r"mean_image\.npy is not the file that stats\.json"),
        (lambda data: _edit(data, "eigenvalues", None), r"or its mean image is damaged \('eigenvalues'\)"),
        (_cut_mean, r"or its mean image is damaged \(.*array"),
        (lambda data: (data / MEAN_IMAGE).unlink(), r"or its mean image is damaged \(.*No such file"),
        (lambda data: (data / STATISTICS).unlink(), r"stats\.json does not exist"),
    ],
)
def test_statistics_that_cannot_be_used_are_refused(
    damage: Callable[[Path], object], words: str, data: Path, copy: Path
) -> None:
    damage(copy)
    with pytest.raises(AlexprepError, match=rf"{words}.*: run `alexprep pca-stats`"):
        rgb_statistics.read_statistics(copy, Samples(data, "train").dataset["digest"])


def test_statistics_of_another_split_are_refused(copy: Path) -> None:
    rgb_statistics.publish_statistics(rgb_statistics.pca_stats(copy, "val", ENGINE), copy, "val")
    with pytest.raises(AlexprepError, match="describes the split 'val', not 'train'"):
        Loader(copy, "val", batch_size=4, augmentation=Augmentation(crop=48))


def test_a_damaged_image_is_named(copy: Path) -> None:
    shard = copy / "train" / "train-000002.tar"
    raw = bytearray(shard.read_bytes())
    raw[512:1024] = bytes(512)
    shard.write_bytes(raw)
    with pytest.raises(AlexprepError, match=r"train-000002\.tar at byte 512"):
        rgb_statistics.pca_stats(copy, "train", ENGINE)
