"""The DALI operations one by one, and the graphs that a `Loader` runs, against their definition in numpy."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn
from PIL import Image

from alexprep.pipeline.augmentation import (
    PRESETS,
    Augmentation,
    Draws,
    augment,
    centred,
    channel_stdevs,
    draw,
    noise_stdevs,
    ten_windows,
)
from alexprep.pipeline.batch import Batch
from alexprep.pipeline.dali_ops import (
    colour_noise,
    decode_crop,
    decode_window,
    mean_anchor,
    mirror,
    resize_square,
    subtract_image,
    subtract_mean_window,
    to_tensor,
)
from alexprep.pipeline.geometry import resize
from alexprep.pipeline.loader import Loader
from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sample_reader import Samples

FORMATS = ["NCHW", "NHWC", "channels_last"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Crops of 51 of 64 pixels: odd, and a slack that is not a power of two.
CONVENTIONS = {
    "paper": Augmentation(crop=51),
    "whole": Augmentation(crop=64, noise="none"),
    "unmirrored": Augmentation(crop=51, mirror=False, noise="none"),
    "stdev": Augmentation(crop=51, mean="crop", noise="stdev"),
    "centre": Augmentation(crop=51, mean="centre"),
    "channel": Augmentation(crop=51, mean="channel", noise="stdev"),
    "noise": Augmentation(crop=51, mean="none"),
    "std": Augmentation(crop=51, mean="crop", std="channel"),
    "std-centre": Augmentation(crop=51, mean="centre", std="imagenet", noise="stdev"),
    "channels": Augmentation(crop=51, mean="channel", std="channel", noise="none"),
    "imagenet": Augmentation(crop=33, mean="imagenet", std="imagenet", noise="eigenvalue"),
    "2012-code": replace(PRESETS["2012-code"], crop=51, share=5, noise_epochs=1),
    "bytes": Augmentation(crop=51, mean="none", noise="none"),
    "none": PRESETS["none"],
    "resized": replace(PRESETS["resized"], crop=37),
    "resized-bytes": replace(PRESETS["resized"], crop=37, mean="none", std="none"),
    "enlarged": Augmentation(
        crop=71, scale=(0.3, 1), ratio=(0.5, 1.5), mean="channel", noise="stdev", noise_rescale=1.1
    ),
}


def _run(make: Any, batch_size: int = 3, **inputs: Any) -> list[NDArray[Any]]:
    """The first sample of each output of `make`, which is called in a pipeline with its inputs as nodes."""
    pipeline = Pipeline(batch_size=batch_size, num_threads=1, device_id=None, exec_dynamic=True)
    with pipeline:
        pipeline.set_outputs(*make(**{name: fn.external_source(name=name) for name in inputs}))
    for name, value in inputs.items():
        pipeline.feed_input(name, [value] * batch_size)
    return [np.asarray(output.at(0)) for output in pipeline.run()]


@pytest.fixture(scope="module")
def image(photo: Any) -> NDArray[np.uint8]:
    return np.asarray(photo(61, 43, seed=5))


@pytest.fixture(scope="module")
def png(photo: Any, encoded: Any) -> NDArray[np.uint8]:
    return np.frombuffer(encoded(photo(61, 43, seed=5), "PNG"), np.uint8)


def test_decoding(png: Any, image: Any) -> None:
    whole, centre, corner, window = _run(
        lambda png, start: (
            decode_crop(png),
            decode_crop(png, 21),
            decode_crop(png, 21, 1.0, 0.0),
            decode_window(png, start, (7, 9)),
        ),
        png=png,
        start=np.array([30, 4], np.int32),
    )
    np.testing.assert_array_equal(whole, image)
    np.testing.assert_array_equal(centre, image[11:32, 20:41])
    np.testing.assert_array_equal(corner, image[:21, 40:])
    np.testing.assert_array_equal(window, image[30:37, 4:13])


def test_jpeg_crops_equal_pillow_s(data: Path) -> None:
    """DALI's region decoder against Pillow's whole image, through the library's functions alone."""
    samples = Samples(data, "train")
    for row in range(5):
        (crop,) = _run(lambda encoded: (decode_crop(encoded, 33, 0.25, 0.75),), encoded=samples.encoded(row))
        np.testing.assert_array_equal(crop, _decode(samples, row)[23 : 23 + 33, 8 : 8 + 33])


@pytest.mark.parametrize("memory_format", FORMATS)
def test_to_tensor_and_mirror(memory_format: Any, image: Any) -> None:
    shift, std = np.array([3.5, -100.25, 7], np.float32), [2.0, 0.5, 4.0]
    floats, halves, integers, plain, turned = _run(
        lambda image, shift, flag: (
            to_tensor(image, flag, shift, std, memory_format),
            to_tensor(image, flag, shift, std, memory_format, "float16"),
            to_tensor(image, flag, memory_format=memory_format, dtype="uint8"),
            to_tensor(image, 0, [1.0, 2.0, 3.0], memory_format=memory_format),
            mirror(image, flag),
        ),
        image=image,
        shift=shift,
        flag=np.array(1, np.int32),
    )
    expected = (image[:, ::-1].astype(np.float64) + shift) / std
    axes = (2, 0, 1) if memory_format == "NCHW" else (0, 1, 2)
    assert floats.dtype == np.float32
    np.testing.assert_allclose(floats, expected.transpose(axes), atol=1e-4)
    np.testing.assert_array_equal(halves, floats.astype(np.float16))
    np.testing.assert_array_equal(integers, image[:, ::-1].transpose(axes))
    np.testing.assert_array_equal(plain, (image + np.array([1.0, 2, 3])).transpose(axes))
    np.testing.assert_array_equal(turned, image[:, ::-1])


def test_resize(image: Any) -> None:
    """The numpy definition to the level that rounding makes, shrinking and enlarging."""
    for side in (17, 43, 90):
        (ours,) = _run(lambda image, side=side: (resize_square(image, side),), image=image)
        difference = np.abs(ours.astype(int) - resize(image, side).astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize("memory_format", ["NCHW", "NHWC"])
def test_mean_windows(memory_format: Any) -> None:
    rng = np.random.default_rng(1)
    mean, image = rng.uniform(0, 255, (24, 24, 3)), rng.uniform(0, 255, (15, 15, 3)).astype(np.float32)
    axes = (2, 0, 1) if memory_format == "NCHW" else (0, 1, 2)
    for top, left, mirrored in ((0, 0, False), (9, 2, False), (3, 9, True), (5, 0, True)):
        anchor = mean_anchor(np.array([[top, left]]), np.array([mirrored]), 24, 15)[0]
        window = mean[top : top + 15, left : left + 15]
        window = (window[:, ::-1] if mirrored else window).astype(np.float32)
        sliced, subtracted = _run(
            lambda image, anchor, window: (
                subtract_mean_window(image, mean, anchor, 15, memory_format),
                subtract_image(image, window),
            ),
            image=np.ascontiguousarray(image.transpose(axes)),
            anchor=anchor,
            window=np.ascontiguousarray(window.transpose(axes)),
        )
        np.testing.assert_allclose(sliced, (image - window).transpose(axes), atol=1e-4)
        np.testing.assert_allclose(subtracted, (image - window).transpose(axes), atol=1e-4)


def test_colour_noise_has_the_stated_covariance(data: Path) -> None:
    """The sample covariance of 20,000 draws lies within five standard errors of V diag(s²) Vᵀ in every entry."""
    found = rgb_statistics.read_statistics(data, Samples(data, "train").dataset["digest"])
    stdevs = noise_stdevs(found, Augmentation(noise="stdev"))
    count = 20_000
    pipeline = Pipeline(batch_size=count, num_threads=1, device_id=None, seed=12)
    with pipeline:
        pipeline.set_outputs(colour_noise(stdevs, found.eigenvectors))
    (shifts,) = pipeline.run()
    drawn = np.asarray(shifts.as_tensor(), np.float64)
    expected = found.eigenvectors @ np.diag(stdevs**2) @ found.eigenvectors.T
    scale = np.sqrt(np.diag(expected))
    error = np.abs(np.cov(drawn.T) - expected) / np.outer(scale, scale)
    assert drawn.shape == (count, 3) and error.max() < 5 * np.sqrt(2 / count)
    assert (np.abs(drawn.mean(axis=0)) < 5 * scale / np.sqrt(count)).all()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_decodes_whole_images(device: str) -> None:
    """nvJPEG refuses regions of images with subsampled chroma: they would all be decoded on the CPU."""
    with Pipeline(batch_size=1, num_threads=1, device_id=None if device == "cpu" else 0):
        encoded, start = fn.external_source(name="encoded"), fn.external_source(name="start")
        nodes = [decode_window(encoded, start, (4, 4), device), decode_crop(encoded, 4, device=device)]
        nodes.append(decode_crop(encoded, device=device))
    operators = []
    for node in nodes:
        names = []
        while node.source.name not in ("encoded", "start"):
            names.append(node.source.name.strip("_").partition("_")[0])
            node = node.source.inputs[0]
        operators.append(names)
    regions = [["ImageSlice"], ["ImageCrop"]] if device == "cpu" else [["Slice", "Image"], ["Crop", "Image"]]
    assert operators == [*regions, ["Image"]]


def _decode(samples: Samples, row: int) -> NDArray[np.uint8]:
    encoded = samples.encoded(row).tobytes()
    if samples.dataset["image"]["format"] == "raw":
        return np.asarray(np.load(io.BytesIO(encoded), allow_pickle=False))
    return np.asarray(Image.open(io.BytesIO(encoded)))


def _reference(
    data: Path, split: str, rows: list[int], draws: Draws, augmentation: Augmentation, epoch: int = 0
) -> NDArray[np.float64]:
    samples = Samples(data, split)
    found = rgb_statistics.read_statistics(data, samples.dataset["digest"]) if augmentation.needs_statistics else None
    return np.stack(
        [augment(_decode(samples, row), draws, n, augmentation, found, epoch) for n, row in enumerate(rows)]
    )


def _nhwc(batch: Batch, memory_format: str) -> NDArray[np.float32]:
    images = batch.images.float().cpu()
    return np.asarray(images if memory_format == "NHWC" else images.movedim(-3, -1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", CONVENTIONS)
def test_every_convention_equals_numpy(name: str, memory_format: Any, device: str, data: Path) -> None:
    """Two epochs, so that noise ends in one of them. A resize rounds to grey levels, so there one level may be one off."""
    augmentation = CONVENTIONS[name]
    rounding = 1.01 / min(channel_stdevs(None, augmentation)) if augmentation.scale else 0
    options: Any = {"memory_format": memory_format, "device": device}
    with Loader(data, batch_size=20, augmentation=augmentation, seed=6, **options) as loader:
        for epoch in range(2):
            for step, batch in enumerate(loader):
                rows = batch.indices.numpy()
                places = 20 * step + np.arange(len(rows))
                draws = draw(augmentation, 6, epoch, rows, np.full((len(rows), 2), 64), places)
                expected = _reference(data, "train", rows.tolist(), draws, augmentation, epoch)
                difference = np.abs(_nhwc(batch, memory_format) - expected)
                assert difference.max() <= (1e-3 + rounding if device == "cpu" else 16)
                assert difference.mean() < (0.002 if device == "cpu" else 1)
                if memory_format == "channels_last":
                    assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", ["paper", "2012-code", "imagenet", "resized", "resized-bytes", "bytes", "none"])
def test_other_dtypes_hold_the_same_values(name: str, memory_format: Any, device: str, data: Path) -> None:
    """float16 is the rounded float32; where grey levels stay as they are, uint8 is the same."""
    options: Any = {"batch_size": 20, "augmentation": CONVENTIONS[name], "memory_format": memory_format}
    dtypes: Any = ("float32", "float16", *(["uint8"] if CONVENTIONS[name].keeps_bytes else []))
    for views in ("random", "centre", "ten"):
        loaders = [Loader(data, dtype=dtype, views=views, device=device, **options) for dtype in dtypes]
        for single, half, *integer in zip(*loaders, strict=True):
            assert half.images.dtype == torch.float16
            assert (single.images.half() - half.images).abs().max() <= 2**-3  # a unit in the last place below 256
            for batch in integer:
                assert batch.images.dtype == torch.uint8 and torch.equal(single.images, batch.images.float())
        for loader in loaders:
            loader.close()


def _first(data: Path, split: str = "train", **options: Any) -> Batch:
    with Loader(data, split, **options) as loader:
        return next(iter(loader))


@pytest.mark.parametrize("image_format", ["jpg", "png", "raw"])
def test_every_format_gives_the_same_picture(image_format: Any, photos: Path, tmp_path: Path) -> None:
    target = Target(size=48, format=image_format, subsampling="444", quality=100)
    convert(photos, tmp_path, ShardOptions(target, limit=6), 1)
    augmentation, sizes = Augmentation(crop=37, mean="none", noise="none"), np.full((6, 2), 48)
    views: Any
    for views in ("random", "centre", "ten"):
        batch = _first(tmp_path, batch_size=6, augmentation=augmentation, views=views)
        drawn = draw(augmentation, 0, 0, batch.indices.numpy(), sizes)
        draws = drawn if views == "random" else centred(augmentation, sizes)
        images = _nhwc(batch, "NCHW")
        expected = _reference(tmp_path, "train", batch.indices.tolist(), draws, augmentation)
        np.testing.assert_array_equal(
            images[:, 2] if views == "ten" else images, expected
        )  # of ten, the third is the centre


@pytest.mark.parametrize("mean", ["crop", "centre", "channel", "none"])
@pytest.mark.parametrize("memory_format", ["NCHW", "NHWC"])
def test_several_views(mean: Any, memory_format: Any, data: Path) -> None:
    """Corners and centre, then their reflections, each as the single-view reference makes it; two are the third of each five."""
    augmentation = Augmentation(crop=51, mean=mean, noise="none")
    options: Any = {"augmentation": augmentation, "memory_format": memory_format}
    batch = _first(data, "val", batch_size=8, views="ten", order="sequential", **options)
    got, windows = _nhwc(batch, memory_format), ten_windows(augmentation, np.full((8, 2), 64))
    assert got.shape == (8, 10, 51, 51, 3)
    for n in range(10):
        draws = Draws(windows[:, n % 5], np.full(8, n >= 5), np.zeros((8, 3)))
        assert np.abs(got[:, n] - _reference(data, "val", list(range(8)), draws, augmentation)).max() <= 1e-3
    two = _first(data, "val", batch_size=8, views="two", order="sequential", **options)
    assert np.array_equal(_nhwc(two, memory_format), got[:, [2, 7]])


def test_centre_view_is_without_chance(data: Path) -> None:
    paper, samples = CONVENTIONS["paper"], Samples(data, "val")
    expected = _reference(data, "val", list(range(20)), centred(paper, np.full((20, 2), 64)), paper)
    with Loader(data, "val", batch_size=20, augmentation=paper, views="centre", order="sequential", seed=1) as loader:
        for _ in range(2):
            (batch,) = loader
            assert np.abs(_nhwc(batch, "NCHW") - expected).max() <= 1e-3
            assert batch.labels.tolist() == samples.labels.tolist()


def test_by_hand(photo: Callable[..., Image.Image], tmp_path: Path) -> None:
    """The paper's and the 2012 code's augmentation of two images, from the formulas and without our own code."""
    for n in range(2):
        (tmp_path / "source" / f"class{n}").mkdir(parents=True)
        photo(16, 16, seed=n).save(tmp_path / "source" / f"class{n}" / "a.png")
    convert(tmp_path / "source", tmp_path / "data", ShardOptions(Target(size=16, format="png")), 1)
    mean = np.arange(16 * 16 * 3, dtype=np.float64).reshape(16, 16, 3) / 5
    values, vectors = np.array([9000.0, 500.0, 80.0]), np.linalg.qr(np.array([[1.0, 2, 3], [0, 1, 4], [5, 6, 0]]))[0]
    found = rgb_statistics.Statistics(
        "", 2, mean, mean.mean((0, 1)), vectors @ np.diag(values) @ vectors.T, values, vectors
    )
    samples = Samples(tmp_path / "data", "train")
    pictures = [_decode(samples, row).astype(float) for row in range(2)]
    for name in ("paper", "2012-code"):
        augmentation = replace(PRESETS[name], crop=11)
        drawn = draw(augmentation, 1, 0, np.arange(2), np.full((2, 2), 16), np.arange(2))
        options: Any = {"augmentation": augmentation, "seed": 1, "order": "sequential", "statistics": found}
        images = _first(tmp_path / "data", batch_size=2, **options).images
        for n in range(2):
            top, left, *_ = drawn.windows_N4[n].tolist()
            window = slice(top, top + 11), slice(left, left + 11)
            turned = slice(None, None, -1 if drawn.mirror_N[n] else 1)
            alpha = 0.1 * drawn.alpha_N3[n]
            if name == "paper":  # the mean where the pixel was; p (α λ) with λ on the 0-1 scale, times 255
                noise = vectors @ (alpha * values / 255**2 * 255)
                expected = (pictures[n][window] - mean[window])[:, turned] + noise
            else:  # the centre's mean after the reflection; p (α √λ), all divided by 1.1
                noise = vectors @ (alpha * values**0.5)
                expected = (pictures[n][window][:, turned] - mean[2:13, 2:13] + noise) / 1.1
            np.testing.assert_allclose(images[n].movedim(0, -1), expected, atol=1e-3)
