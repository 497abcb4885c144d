"""The pipelines that `Loader` runs: the functions of `alexprep.pipeline.dali_ops`, put together as an `Augmentation` says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode

from alexprep.pipeline import dali_ops
from alexprep.pipeline.augment import channel_means, channel_stdevs, mean_corners
from alexprep.pipeline.augmentation import Augmentation
from alexprep.pipeline.draws import ten_windows
from alexprep.pipeline.settings import Settings, fed
from alexprep.shards.rgb_statistics import Statistics


def single_view_pipeline(augmentation: Augmentation, statistics: Statistics | None, settings: Settings) -> Pipeline:
    """The pipeline that gives one view of each image; the draws come from outside, so it serves training and evaluation.

    Returns:
        A pipeline with the inputs that `fed` names and one output: images of `dtype` and `layout`.
    """
    names = fed(augmentation, settings)
    pipeline = _pipeline(settings)
    with pipeline:
        image = _window(augmentation, settings)
        if names & {"window", "minus"}:
            pipeline.set_outputs(_by_rows(image, names, augmentation, settings))
        else:
            pipeline.set_outputs(_by_pixels(image, names, augmentation, statistics, settings))
    return pipeline


def _by_rows(image: DataNode, names: frozenset[str], augmentation: Augmentation, settings: Settings) -> DataNode:
    image = dali_ops.mirror(image, _input(settings, "mirror"))
    if "window" in names:
        image = dali_ops.subtract_image(image, _input(settings, "window"))
    if "minus" in names:
        side = augmentation.crop or settings.size or 0
        image = dali_ops.subtract_rows(image, _input(settings, "minus"), _input(settings, "divisor"), side)
    return dali_ops.cast(image, settings.dtype)


def _by_pixels(
    image: DataNode,
    names: frozenset[str],
    augmentation: Augmentation,
    statistics: Statistics | None,
    settings: Settings,
) -> DataNode:
    layout = settings.layout
    mirrored = _input(settings, "mirror")
    std = channel_stdevs(statistics, augmentation).tolist()
    shift = _input(settings, "shift") if "shift" in names else (-channel_means(statistics, augmentation)).tolist()
    if not names & {"anchor", "factor"}:
        return dali_ops.to_tensor(image, mirrored, shift, std, layout, settings.dtype)
    image = dali_ops.to_tensor(image, mirrored, shift, layout=layout)
    if "anchor" in names and statistics is not None and augmentation.crop is not None:
        anchor, side = _input(settings, "anchor"), augmentation.crop
        image = dali_ops.subtract_mean_window(image, statistics.mean_HWC, anchor, side, layout, settings.device)
    if augmentation.std != "none":
        image = image / _channels(std, layout, settings)
    if "factor" in names:
        image = image * _input(settings, "factor")
    return dali_ops.cast(image, settings.dtype)


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
                window = dali_ops.resize_square(window, augmentation.crop)
            for mirrored, views in ((False, plain), (True, reflected)):
                if augmentation.windowed_mean and statistics is not None and augmentation.crop is not None:
                    view = dali_ops.to_tensor(window, int(mirrored), layout=layout)
                    view = view - _mean_window(augmentation, statistics, n, mirrored, settings)
                    if augmentation.std != "none":
                        view = view / _channels(std, layout, settings)
                    view = dali_ops.cast(view, settings.dtype)
                else:
                    view = dali_ops.to_tensor(window, int(mirrored), means, std, layout, settings.dtype)
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
        image = dali_ops.cut(_pixels(settings), start, shape, settings.size)
    else:
        encoded = _input(settings, "encoded")
        image = _placed(
            dali_ops.decode_window(encoded, start, shape, settings.decode, settings.hw_decoder_load), settings
        )
    if augmentation.scale is not None and augmentation.crop is not None:
        return dali_ops.resize_square(image, augmentation.crop)
    return image


def _whole(settings: Settings) -> DataNode:
    if settings.raw:
        return _pixels(settings)
    encoded = _input(settings, "encoded")
    image = dali_ops.decode_crop(encoded, device=settings.decode, hw_decoder_load=settings.hw_decoder_load)
    return _placed(image, settings)


def _shape(augmentation: Augmentation, settings: Settings) -> DataNode | tuple[int, int]:
    side = augmentation.crop
    return _input(settings, "shape") if side is None or not augmentation.fixed_windows else (side, side)


def _pixels(settings: Settings) -> DataNode:
    pixels = _input(settings, "encoded", layout="HWC", ndim=3, dtype=types.UINT8)
    return pixels if settings.device == "cpu" else pixels.gpu()


def _placed(image: DataNode, settings: Settings) -> DataNode:
    return image.gpu() if settings.device != "cpu" and settings.decode == "cpu" else image


def _channels(values: list[float], layout: dali_ops.Layout, settings: Settings) -> DataNode:
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
