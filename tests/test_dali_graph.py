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
from nvidia.dali import Pipeline, fn, pipeline_def
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
    resize,
    ten_windows,
)
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
from alexprep.pipeline.loader import Batch, Loader
from alexprep.pipeline.loader_settings import Tuning
from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.reader import Samples

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


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def _run(make: Any, batch_size: int = 3, **inputs: Any) -> list[NDArray[Any]]:
    """The first sample of each output of `make`, which is called in a pipeline with its inputs as nodes."""

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch_size, num_threads=1, device_id=None, exec_dynamic=True
    )
    def pipeline() -> Any:
        nodes = {name: fn.external_source(name=name) for name in inputs}
        return make(**nodes)

    built = pipeline()
    for name, value in inputs.items():
        built.feed_input(name, [value] * batch_size)
    return [np.asarray(output.at(0)) for output in built.run()]


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
        encoded = samples.encoded(row)
        (crop,) = _run(lambda encoded: (decode_crop(encoded, 33, 0.25, 0.75),), encoded=encoded)

        whole = np.asarray(Image.open(io.BytesIO(encoded.tobytes())))
        top, left = round(0.75 * 31), round(0.25 * 31)
        np.testing.assert_array_equal(crop, whole[top : top + 33, left : left + 33])


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

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=count, num_threads=1, device_id=None, seed=12
    )
    def pipeline() -> Any:
        return colour_noise(stdevs, found.eigenvectors)

    (shifts,) = pipeline().run()
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
    with Loader(
        data, batch_size=20, augmentation=augmentation, memory_format=memory_format, seed=6, device=device
    ) as loader:
        for _ in range(2):
            place = 0
            epoch = loader.epoch
            for batch in loader:
                rows = batch.indices.numpy()
                draws = draw(
                    augmentation, 6, epoch, rows, np.full((len(rows), 2), 64), np.arange(place, place + len(rows))
                )
                place += len(rows)
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


@pytest.mark.parametrize("image_format", ["jpg", "png", "raw"])
def test_every_format_gives_the_same_picture(image_format: Any, photos: Path, tmp_path: Path) -> None:
    target = Target(size=48, format=image_format, subsampling="444", quality=100)
    convert(photos, tmp_path, ShardOptions(target, limit=6), 1)
    augmentation, sizes = Augmentation(crop=37, mean="none", noise="none"), np.full((6, 2), 48)
    for views in ("random", "centre", "ten"):
        with Loader(tmp_path, batch_size=6, augmentation=augmentation, views=views) as loader:
            batch = next(iter(loader))
        rows = batch.indices.tolist()
        if views == "ten":
            expected = np.stack([_decode(Samples(tmp_path, "train"), row)[:37, :37] for row in rows])
            np.testing.assert_array_equal(_nhwc(batch, "NCHW")[:, 0], expected)
        else:
            drawn = draw(augmentation, 0, 0, batch.indices.numpy(), sizes)
            draws = drawn if views == "random" else centred(augmentation, sizes)
            reference = _reference(tmp_path, "train", rows, draws, augmentation)
            np.testing.assert_array_equal(_nhwc(batch, "NCHW"), reference)


@pytest.mark.parametrize("mean", ["crop", "centre", "channel", "none"])
@pytest.mark.parametrize("memory_format", ["NCHW", "NHWC"])
def test_ten_views(mean: Any, memory_format: Any, data: Path) -> None:
    """Corners and centre, then their reflections, each as the single-view reference makes it."""
    augmentation = Augmentation(crop=51, mean=mean, noise="none")
    with Loader(
        data,
        "val",
        batch_size=8,
        augmentation=augmentation,
        views="ten",
        order="sequential",
        memory_format=memory_format,
    ) as loader:
        assert [batch.indices.tolist() for batch in loader] == [list(range(8)), list(range(8, 16)), list(range(16, 20))]
        batch = next(iter(loader))
    got = _nhwc(batch, memory_format)
    assert got.shape == (8, 10, 51, 51, 3)
    samples = Samples(data, "val")
    found = rgb_statistics.read_statistics(data, samples.dataset["digest"])
    windows = ten_windows(augmentation, np.array([[64, 64]]))[0]
    for n in range(10):
        for k, row in enumerate(batch.indices.tolist()):
            draws = Draws(windows[n % 5 :][:1], np.array([n >= 5]), np.zeros((1, 3)))
            expected = augment(_decode(samples, row), draws, 0, augmentation, found)
            assert np.abs(got[k, n] - expected).max() <= 1e-3


def test_centre_view_is_without_chance(data: Path) -> None:
    with Loader(
        data, "val", batch_size=7, augmentation=CONVENTIONS["paper"], views="centre", order="sequential", seed=1
    ) as loader:
        epochs = [[batch for batch in loader] for _ in range(2)]
        expected = _reference(
            data, "val", list(range(20)), centred(CONVENTIONS["paper"], np.full((20, 2), 64)), CONVENTIONS["paper"]
        )
        for epoch in epochs:
            assert np.abs(np.concatenate([_nhwc(batch, "NCHW") for batch in epoch]) - expected).max() <= 1e-3
        assert torch.cat([batch.labels for batch in epochs[0]]).tolist() == Samples(data, "val").labels.tolist()


def test_by_hand(photo: Callable[..., Image.Image], tmp_path: Path) -> None:
    """The paper's and the 2012 code's augmentation of two images, pixel by pixel, from the formulas and without our numpy code."""
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
        with Loader(
            tmp_path / "data", batch_size=2, augmentation=augmentation, seed=1, order="sequential", statistics=found
        ) as loader:
            images = next(iter(loader)).images
        for n in range(2):
            top, left, *_ = drawn.windows_N4[n].tolist()
            for y in range(11):
                for x in range(11):
                    column = 10 - x if drawn.mirror_N[n] else x
                    for c in range(3):
                        pixel = pictures[n][top + y, left + column, c]
                        alpha = 0.1 * drawn.alpha_N3[n]
                        if name == "paper":  # the mean where the pixel was; p (α λ) with λ on the 0-1 scale, times 255
                            noise = sum(vectors[c, k] * alpha[k] * values[k] / 255**2 * 255 for k in range(3))
                            expected = pixel - mean[top + y, left + column, c] + noise
                        else:  # the centre's mean after the reflection; p (α √λ), all divided by 1.1
                            noise = sum(vectors[c, k] * alpha[k] * values[k] ** 0.5 for k in range(3))
                            expected = (pixel - mean[2 + y, 2 + x, c] + noise) / 1.1
                        assert abs(float(images[n, c, y, x]) - expected) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("views", ["random", "centre", "ten"])
@pytest.mark.parametrize("decode", ["cpu", "cuda"])
def test_the_gpu_agrees_but_for_its_decoder(
    decode: Any, views: Any, memory_format: Any, photos: Path, tmp_path: Path
) -> None:
    """Raw shards, which nobody decodes, to rounding for every convention; JPEGs, where decoders differ, within bounds."""
    for image_format in ("raw", "jpg"):
        folder = tmp_path / image_format
        convert(photos, folder, ShardOptions(Target(size=64, format=image_format)), 1)
        rgb_statistics.publish_statistics(rgb_statistics.pca_stats(folder, "train", 1), folder, "train")
        for name, augmentation in CONVENTIONS.items():
            options: Any = {"batch_size": 20, "augmentation": augmentation, "views": views}
            options["memory_format"] = memory_format
            with (
                Loader(folder, **options) as cpu,
                Loader(folder, device="cuda", tuning=Tuning(decode=decode), **options) as gpu,
            ):
                for ours, theirs in zip(cpu, gpu, strict=True):
                    assert theirs.images.is_cuda and ours.images.stride() == theirs.images.stride()
                    difference = (ours.images - theirs.images.cpu()).abs()
                    exact = image_format == "raw" or decode == "cpu"
                    rounding = 1.01 if augmentation.scale else 0.0  # a resize rounds to whole levels
                    assert difference.max() <= (2e-3 + rounding if exact else 24), name
                    assert difference.mean() < (0.02 if exact else 1), name
