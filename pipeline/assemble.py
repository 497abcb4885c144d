"""The pipelines that `Loader` runs: the functions of `alexprep.pipeline.graph`, put together as an `Augmentation` says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode

from alexprep.pipeline import graph
from alexprep.pipeline.augment import channel_means, channel_stdevs, mean_corners
from alexprep.pipeline.augmentation import Augmentation
from alexprep.pipeline.draws import ten_windows
from alexprep.shards.errors import AlexprepError
from alexprep.shards.stats import Statistics


@dataclass(frozen=True)
class Settings:
    """What the pipelines need to know beside the augmentation.

    Attributes:
        raw: whether samples come as pixels rather than as encoded images.
        size: side of the stored images where all are squares of one side, pixels; otherwise None.
        batch_size: the largest batch that will be fed.
        threads: of DALI.
        device: where images come out, "cpu" or "cuda".
        device_id: which GPU; None for "cpu".
        decode: where they are decoded, "cpu" or "cuda".
        hw_decoder_load: see `graph.decode_crop`.
        dtype: of the images that come out.
        layout: of the images that come out; the N is the batch.
    """

    raw: bool
    size: int | None
    batch_size: int
    threads: int
    device: str
    device_id: int | None
    decode: str
    hw_decoder_load: float
    dtype: graph.Dtype
    layout: graph.Layout

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        for name, choices in (("dtype", get_args(graph.Dtype)), ("layout", get_args(graph.Layout))):
            if getattr(self, name) not in choices:
                raise AlexprepError(f"{name} {getattr(self, name)!r} is not one of {', '.join(choices)}")

    @property
    def feeds_windows(self) -> bool:
        """Whether windows of the mean image are fed rather than sliced: cheaper where they are contiguous in memory."""
        return self.device == "cpu" and self.layout != "NCHW"


def single_view_pipeline(augmentation: Augmentation, statistics: Statistics | None, settings: Settings) -> Pipeline:
    """The pipeline that gives one view of each image; the draws come from outside, so it serves training and evaluation.

    Inputs to feed, one entry a sample: "encoded", uint8 bytes (of raw shards the pixels, HWC); "start" and, with `scale` or without
    `crop`, "shape", int32 (2,), as in `graph.decode_window`; "mirror", int32; with noise "shift", float32 (3,), as in
    `graph.to_tensor`; where noisy images are rescaled "factor", float32, what to multiply by; for a mean image "window",
    float32 (crop, crop, 3), the window to subtract, or "anchor", int32 (2,): see `Settings.feeds_windows`.

    Returns:
        A pipeline with one output: images of `dtype` and `layout`.
    """
    layout, dtype = settings.layout, settings.dtype
    means = channel_means(statistics, augmentation)
    std = channel_stdevs(statistics, augmentation).tolist()
    rescales = augmentation.noise != "none" and augmentation.noise_rescale != 1
    pipeline = _pipeline(settings)
    with pipeline:
        image = _window(augmentation, settings)
        mirrored = _input(settings, "mirror")
        shift = _input(settings, "shift") if augmentation.noise != "none" else (-means).tolist()
        if augmentation.windowed_mean and settings.feeds_windows:
            image = (
                graph.mirror(image, mirrored)
                if augmentation.noise == "none"
                else graph.to_tensor(image, mirrored, shift, layout=layout)
            )
            image = graph.subtract_image(image, _input(settings, "window"))
        elif augmentation.windowed_mean and statistics is not None and augmentation.crop is not None:
            image = graph.to_tensor(image, mirrored, shift, layout=layout)
            anchor, side = _input(settings, "anchor"), augmentation.crop
            image = graph.subtract_mean_window(image, statistics.mean_HWC, anchor, side, layout, settings.device)
        else:
            early = "float32" if rescales else dtype
            image = graph.to_tensor(image, mirrored, shift, std, layout, early)
        if augmentation.windowed_mean and augmentation.std != "none":
            image = image / _channels(std, layout, settings)
        if rescales:
            image = image * _input(settings, "factor")
        if augmentation.windowed_mean or rescales:
            image = graph.cast(image, dtype)
        pipeline.set_outputs(image)
    return pipeline


def ten_view_pipeline(augmentation: Augmentation, statistics: Statistics | None, settings: Settings) -> Pipeline:
    """The pipeline of the paper's test: ten views of each image, stacked before the other axes: five windows, then their reflections.

    Inputs to feed: "encoded", "start0" to "start4" and, with `scale` or without `crop`, "shape", as in `single_view_pipeline`. The mean
    is subtracted as in training.
    """
    layout = settings.layout
    means = (-channel_means(statistics, augmentation)).tolist()
    std = channel_stdevs(statistics, augmentation).tolist()
    pipeline = _pipeline(settings)
    with pipeline:
        whole = _whole(settings)
        shape = _shape(augmentation, settings)
        plain: list[DataNode] = []
        reflected: list[DataNode] = []
        for n in range(5):
            window = fn.slice(whole, start=_input(settings, f"start{n}"), shape=shape, axes=(0, 1))
            if augmentation.scale is not None and augmentation.crop is not None:
                window = graph.resize_square(window, augmentation.crop)
            for mirrored, views in ((False, plain), (True, reflected)):
                if augmentation.windowed_mean and statistics is not None and augmentation.crop is not None:
                    view = graph.to_tensor(window, int(mirrored), layout=layout)
                    view = view - _mean_window(augmentation, statistics, n, mirrored, settings)
                    if augmentation.std != "none":
                        view = view / _channels(std, layout, settings)
                    view = graph.cast(view, settings.dtype)
                else:
                    view = graph.to_tensor(window, int(mirrored), means, std, layout, settings.dtype)
                views.append(view)
        pipeline.set_outputs(fn.stack(*plain, *reflected))
    return pipeline


def probe_pipeline(augmentation: Augmentation, settings: Settings, windowed: bool) -> Pipeline:
    """The decoding alone of one image, with the inputs "encoded" and, if `windowed`, those of `single_view_pipeline`'s window."""
    alone = replace(settings, batch_size=1, threads=1)
    pipeline = _pipeline(alone)
    with pipeline:
        pipeline.set_outputs(_window(augmentation, alone) if windowed else _whole(alone))
    return pipeline


def _pipeline(settings: Settings) -> Pipeline:
    # The dynamic executor owns each output by reference: DALI never writes into a buffer that a tensor still views.
    # At depth 1 each schedule_run starts one step, so the caller alone decides how many are under way.
    return Pipeline(
        batch_size=settings.batch_size,
        num_threads=settings.threads,
        device_id=settings.device_id,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )


def _input(settings: Settings, name: str, **options: Any) -> DataNode:
    # On a CPU what is fed is read in place: the engine keeps it until the step is done.
    return fn.external_source(name=name, no_copy=settings.device == "cpu" and settings.decode == "cpu", **options)


def _window(augmentation: Augmentation, settings: Settings) -> DataNode:
    """uint8 (H, W, 3): what was drawn of each image, resized where it is to be."""
    start, shape = _input(settings, "start"), _shape(augmentation, settings)
    if settings.raw:
        image = fn.slice(_pixels(settings), start=start, shape=shape, axes=(0, 1))
    else:
        encoded = _input(settings, "encoded")
        image = _placed(graph.decode_window(encoded, start, shape, settings.decode, settings.hw_decoder_load), settings)
    if augmentation.scale is not None and augmentation.crop is not None:
        return graph.resize_square(image, augmentation.crop)
    return image


def _whole(settings: Settings) -> DataNode:
    if settings.raw:
        return _pixels(settings)
    encoded = _input(settings, "encoded")
    image = graph.decode_crop(encoded, device=settings.decode, hw_decoder_load=settings.hw_decoder_load)
    return _placed(image, settings)


def _shape(augmentation: Augmentation, settings: Settings) -> DataNode | tuple[int, int]:
    if augmentation.crop is None or augmentation.scale is not None:
        return _input(settings, "shape")
    return (augmentation.crop, augmentation.crop)


def _pixels(settings: Settings) -> DataNode:
    pixels = _input(settings, "encoded", layout="HWC", ndim=3, dtype=types.UINT8)
    return pixels if settings.device == "cpu" else pixels.gpu()


def _placed(image: DataNode, settings: Settings) -> DataNode:
    return image.gpu() if settings.device != "cpu" and settings.decode == "cpu" else image


def _channels(values: list[float], layout: graph.Layout, settings: Settings) -> DataNode:
    shape = (3, 1, 1) if layout == "NCHW" else (1, 1, 3)
    array = np.array(values, np.float32).reshape(shape)
    return types.Constant(array, device="cpu" if settings.device == "cpu" else "gpu")


def _mean_window(
    augmentation: Augmentation, statistics: Statistics, n: int, mirrored: bool, settings: Settings
) -> DataNode:
    """What is subtracted from view `n` or its reflection. Mean images go with stored squares of one size, so it is a constant."""
    size = len(statistics.mean_HWC)
    window = ten_windows(augmentation, np.array([[size, size]]))[:, n]
    top, left = mean_corners(augmentation, window, size)[0].tolist()
    mean = statistics.mean_HWC[top : top + window[0, 2], left : left + window[0, 3]]
    if mirrored and augmentation.mean == "crop":
        mean = mean[:, ::-1]
    if settings.layout == "NCHW":
        mean = mean.transpose(2, 0, 1)
    array = np.ascontiguousarray(mean, np.float32)
    return types.Constant(array, device="cpu" if settings.device == "cpu" else "gpu")
