"""The pipelines that `Loader` runs: the functions of `alexprep.pipeline.dali_ops`, put together as an `Augmentation` says."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode

from alexprep.pipeline import dali_ops
from alexprep.pipeline.augmentation import (
    Augmentation,
    Draws,
    centred,
    channel_means,
    channel_stdevs,
    colour_shifts,
    draw,
    mean_corners,
    ten_windows,
)
from alexprep.pipeline.dali_ops import Dtype, Layout, mean_anchor
from alexprep.shards.errors import AlexprepError
from alexprep.shards.rgb_statistics import Statistics

# -------------------- What a pipeline is built for, and which inputs it takes.


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
    dtype: Dtype
    layout: Layout

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        for name, choices in (("dtype", get_args(Dtype)), ("layout", get_args(Layout))):
            if getattr(self, name) not in choices:
                raise AlexprepError(f"{name} {getattr(self, name)!r} is not one of {', '.join(choices)}")

    @property
    def by_rows(self) -> bool:
        """Whether numbers are fed as rows and windows of pixels, for passes that read and write least: on a CPU, axes HWC."""
        return self.device == "cpu" and self.layout != "NCHW" and self.dtype != "uint8"


def fed(augmentation: Augmentation, settings: Settings) -> frozenset[str]:
    """The inputs of `single_view_pipeline`, one entry a sample.

    "encoded": uint8 bytes; of raw shards the pixels, HWC. "start", "shape": int32 (2,), see `graph.decode_window`. "mirror": int32.
    By rows, "window", "minus" and "divisor": see `graph.subtract_image` and `graph.subtract_rows`. Otherwise "shift", float32 (3,),
    see `graph.to_tensor`; "anchor", int32 (2,), see `graph.subtract_mean_window`; "factor", float32, to multiply by at the end.
    """
    names = {"encoded", "start", "mirror"}
    noise = augmentation.noise != "none"
    if not augmentation.fixed_windows:
        names.add("shape")
    if settings.by_rows and (augmentation.crop or settings.size) and not augmentation.keeps_bytes:
        if augmentation.windowed_mean:
            names.add("window")
        if noise or augmentation.std != "none" or not augmentation.windowed_mean:
            names |= {"minus", "divisor"}
    else:
        names |= {"shift"} if noise else set()
        names |= {"anchor"} if augmentation.windowed_mean else set()
        names |= {"factor"} if noise and augmentation.noise_rescale != 1 else set()
    return frozenset(names)


# -------------------- The pipelines that `Loader` runs: the functions of `alexprep.pipeline.dali_ops`, put together as an `Augmentation` says.


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


# -------------------- What the graph is fed: encoded images and, beside them, the draws as numbers.


Views = Literal["random", "centre", "ten"]
Inputs = dict[str, "NDArray[Any] | list[NDArray[np.float32]]"]

_STRIP_BYTES = 128 * 2**20  # of windows of the mean image that are kept ready


@dataclass(frozen=True)
class Feed:
    """Turns the rows of a step into what a pipeline of `alexprep.pipeline.dali_graph` takes, apart from the images.

    Attributes:
        augmentation: what is done.
        statistics: of the data set, where they are needed.
        views: "random" draws; "centre" and "ten" are without chance.
        seed: of the draws.
        settings: of the pipeline.
    """

    augmentation: Augmentation
    statistics: Statistics | None
    views: Views
    seed: int
    settings: Settings

    def __post_init__(self) -> None:
        """Refuses values that do not go together, with AlexprepError."""
        if self.views not in get_args(Views):
            raise AlexprepError(f"views {self.views!r} is not one of {', '.join(get_args(Views))}")
        if self.settings.dtype == "uint8" and not self.augmentation.keeps_bytes:
            raise AlexprepError("dtype uint8 holds grey levels as they are: it needs mean, std and noise 'none'")

    def inputs(
        self, epoch: int, rows: NDArray[np.int64], sizes: NDArray[np.integer], positions: NDArray[np.int64]
    ) -> Inputs:
        """The named inputs of a step, one entry a sample; for the arguments see `draws.draw`."""
        if self.views == "ten":
            windows = ten_windows(self.augmentation, sizes).astype(np.int32)
            starts = {f"start{n}": np.ascontiguousarray(windows[:, n, :2]) for n in range(5)}
            return {**starts, **self._shape(windows[:, 0])}
        if self.views == "random":
            draws = draw(self.augmentation, self.seed, epoch, rows, sizes, positions)
        else:
            draws = centred(self.augmentation, sizes)
        return self._single(draws, self.views == "random" and self.augmentation.noisy(epoch))

    def _single(self, draws: Draws, noisy: bool) -> Inputs:
        augmentation, statistics = self.augmentation, self.statistics
        windows, count = draws.windows_N4.astype(np.int32), len(draws.mirror_N)
        names = fed(augmentation, self.settings)
        inputs: Inputs = {
            "start": np.ascontiguousarray(windows[:, :2]),
            "mirror": draws.mirror_N.astype(np.int32),
            **self._shape(windows),
        }
        shift = np.tile(-channel_means(statistics, augmentation), (count, 1))
        if noisy and statistics is not None:
            shift += colour_shifts(draws.alpha_N3, statistics, augmentation)
        rescale = augmentation.noise_rescale if noisy else 1.0
        if "shift" in names:
            inputs["shift"] = shift.astype(np.float32)
        if "factor" in names:
            inputs["factor"] = np.full(count, 1 / rescale, np.float32)
        if "minus" in names:
            side = augmentation.crop or self.settings.size or 0
            divisor = channel_stdevs(statistics, augmentation) * rescale
            inputs["minus"] = np.tile(-shift.astype(np.float32), (1, side))[:, None]
            inputs["divisor"] = np.tile(divisor.astype(np.float32), (count, 1, side))
        if statistics is not None and names & {"window", "anchor"}:
            size = len(statistics.mean_HWC)
            corners = mean_corners(augmentation, windows, size)
            reflected = draws.mirror_N & (augmentation.mean == "crop")
            if "window" in names:
                inputs["window"] = self._mean_windows(corners, reflected)
            else:
                inputs["anchor"] = mean_anchor(corners, reflected, size, augmentation.crop or 0)
        return inputs

    def _shape(self, windows_N4: NDArray[np.int32]) -> dict[str, NDArray[np.int32]]:
        return {} if self.augmentation.fixed_windows else {"shape": np.ascontiguousarray(windows_N4[:, 2:])}

    def _mean_windows(self, corners: NDArray[np.int64], reflected: NDArray[np.bool_]) -> list[NDArray[np.float32]]:
        side = self.augmentation.crop or 0
        strip = self._strip
        return [
            strip(left, flag)[top : top + side]
            for (top, left), flag in zip(corners.tolist(), reflected.tolist(), strict=True)
        ]

    @functools.cached_property
    def _strip(self) -> Any:
        """The columns of the mean image from `left` on, as wide as a crop: float32, contiguous, so any window of them is."""
        assert self.statistics is not None
        mean = self.statistics.mean_HWC.astype(np.float32)
        side = self.augmentation.crop or 0
        kept = max(1, _STRIP_BYTES // (len(mean) * side * 3 * 4))

        @functools.lru_cache(maxsize=kept)
        def strip(left: int, reflected: bool) -> NDArray[np.float32]:
            columns = mean[:, left : left + side]
            return np.ascontiguousarray(columns[:, ::-1] if reflected else columns)

        return strip
