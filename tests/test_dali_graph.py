"""The public functions over DALI nodes, one by one and in a pipeline that is not ours; and what the package's front offers."""

from __future__ import annotations

import inspect
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, pipeline_def
from PIL import Image

import alexprep.pipeline
from alexprep.pipeline.augmentation import Augmentation, noise_stdevs, resize
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
from alexprep.pipeline.loader import Loader
from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.reader import Samples


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


@pytest.mark.parametrize("memory_format", ["NCHW", "NHWC", "channels_last"])
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
        sliced, fed = _run(
            lambda image, anchor, window: (
                subtract_mean_window(image, mean, anchor, 15, memory_format),
                subtract_image(image, window),
            ),
            image=np.ascontiguousarray(image.transpose(axes)),
            anchor=anchor,
            window=np.ascontiguousarray(window.transpose(axes)),
        )
        np.testing.assert_allclose(sliced, (image - window).transpose(axes), atol=1e-4)
        np.testing.assert_allclose(fed, (image - window).transpose(axes), atol=1e-4)


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


def test_the_front_is_small_and_documented() -> None:
    """Everything public is importable from the package, has a docstring and complete types; nothing else is there."""
    front = alexprep.pipeline
    for name in front.__all__:
        thing = getattr(front, name)
        assert inspect.getdoc(thing), name
        if inspect.isfunction(thing):
            hints = inspect.signature(thing)
            assert hints.return_annotation is not inspect.Signature.empty, name
            assert all(part.annotation is not part.empty for part in hints.parameters.values()), name
    with pytest.raises(AttributeError, match="PipelineRunner"):
        _ = front.PipelineRunner


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


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", ["NCHW", "NHWC", "channels_last"])
@pytest.mark.parametrize("views", ["random", "centre", "ten"])
@pytest.mark.parametrize("decode", ["cpu", "cuda"])
def test_the_gpu_agrees_but_for_its_decoder(
    decode: Any, views: Any, memory_format: Any, photos: Path, tmp_path: Path
) -> None:
    """Raw shards, which nobody decodes, to rounding for every convention; JPEGs, where decoders differ, within bounds."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from alexprep.pipeline.loader_settings import Tuning
    from tests.test_loader import MORE

    for image_format in ("raw", "jpg"):
        folder = tmp_path / image_format
        convert(photos, folder, ShardOptions(Target(size=64, format=image_format)), 1)
        rgb_statistics.publish_statistics(rgb_statistics.pca_stats(folder, "train", 1), folder, "train")
        for name, augmentation in {"paper": Augmentation(crop=51), **MORE}.items():
            options: Any = {
                "batch_size": 20,
                "augmentation": augmentation,
                "views": views,
                "memory_format": memory_format,
            }
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


def test_jpeg_crops_equal_pillow_s(data: Path) -> None:
    """DALI's region decoder against Pillow's whole image, through the library's functions alone."""
    samples = Samples(data, "train")
    for row in range(5):
        encoded = samples.encoded(row)
        (crop,) = _run(lambda encoded: (decode_crop(encoded, 33, 0.25, 0.75),), encoded=encoded)

        whole = np.asarray(Image.open(io.BytesIO(encoded.tobytes())))
        top, left = round(0.75 * 31), round(0.25 * 31)
        np.testing.assert_array_equal(crop, whole[top : top + 33, left : left + 33])
