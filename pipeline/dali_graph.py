"""The assembled DALI graph of a `Loader`: how it is built of single operations, which inputs it takes, and what is fed to them.

The operations lie in `alexprep.pipeline.dali_ops`, their definition and the random parameters in `alexprep.pipeline.augmentation`; a graph
is run, batch after batch, by `alexprep.pipeline.loader`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode

from alexprep.pipeline import dali_ops
from alexprep.pipeline.augmentation import (
    Augmentation,
    Draws,
    channel_means,
    channel_stdevs,
    colour_shifts,
    mean_corners,
    ten_windows,
)
from alexprep.pipeline.dali_ops import Dtype, MemoryFormat
from alexprep.shards.errors import AlexprepError, one_of
from alexprep.shards.rgb_statistics import Statistics

Views = Literal["random", "centre", "ten"]  # the last are the paper's test views, without chance as the second
Inputs = dict[str, "NDArray[Any] | list[NDArray[np.float32]]"]

_STRIP_BYTES = 128 * 2**20  # of windows of the mean image that are kept ready


@dataclass(frozen=True)
class Graph:
    """What is done to the images of a `Loader`, as a DALI pipeline and the inputs that it is fed beside the images."""

    augmentation: Augmentation
    statistics: Statistics | None  # of the dataset, where they are needed
    views: Views
    raw: bool  # whether samples come as pixels rather than as encoded images
    size: int | None  # side of the stored images where all are squares of one side, pixels
    batch_size: int  # the largest that will be fed
    threads: int  # of DALI
    device: str  # where images come out, "cpu" or "cuda"
    device_id: int | None  # which GPU; None for "cpu"
    decode: str  # where they are decoded, "cpu" or "cuda"
    hw_decoder_load: float  # see `dali_ops.decode_crop`
    dtype: Dtype
    memory_format: MemoryFormat  # the N is the batch

    def __post_init__(self) -> None:
        """Refuses values out of bounds, or that do not go together, with AlexprepError."""
        for name, choices in (("views", Views), ("dtype", Dtype), ("memory_format", MemoryFormat)):
            one_of(name, getattr(self, name), get_args(choices))
        if self.dtype == "uint8" and not self.augmentation.keeps_bytes:
            raise AlexprepError("dtype uint8 holds grey levels as they are: it needs mean, std and noise 'none'")

    def pipeline(self) -> Pipeline:
        """The pipeline, not yet built. It takes the images as "encoded" and what `inputs` makes; its one output is the views.

        Ten views are stacked before the other axes: five windows, then their reflections.
        """
        pipeline = self._empty_pipeline(self.batch_size, self.threads)
        with pipeline:
            pipeline.set_outputs(self._ten_views() if self.views == "ten" else self._one_view())
        return pipeline

    def decoding_pipeline(self, windowed: bool) -> Pipeline:
        """The decoding alone, of one image, with the inputs "encoded" and, if `windowed`, "start" and "shape"."""
        pipeline = self._empty_pipeline(batch_size=1, threads=1)
        with pipeline:
            pipeline.set_outputs(self._window() if windowed else self._whole())
        return pipeline

    @functools.cached_property
    def input_names(self) -> frozenset[str]:
        """The inputs of one view beside "encoded", one entry a sample.

        "start", "shape": see `dali_ops.decode_window`. "mirror": int32. By rows, that is where passes over whole rows read and write least
        (on a CPU, axes HWC), "window", "minus" and "divisor": see `dali_ops.subtract_image` and `dali_ops.subtract_rows`. Otherwise
        "shift": see `dali_ops.to_tensor`; "anchor": see `dali_ops.subtract_mean_window`; "factor", float32, to multiply by at the end.
        """
        augmentation = self.augmentation
        noise = augmentation.noise != "none"
        names = {"start", "mirror"} | (set() if augmentation.fixed_windows else {"shape"})
        rows_pay = self.device == "cpu" and self.memory_format != "NCHW" and self.dtype != "uint8"
        if rows_pay and self._side and not augmentation.keeps_bytes:
            names |= {"window"} if augmentation.windowed_mean else set()
            if noise or augmentation.std != "none" or not augmentation.windowed_mean:
                names |= {"minus", "divisor"}
        else:
            names |= {"shift"} if noise else set()
            names |= {"anchor"} if augmentation.windowed_mean else set()
            names |= {"factor"} if noise and augmentation.noise_rescale != 1 else set()
        return frozenset(names)

    def inputs(self, epoch: int, draws: Draws, sizes_N2: NDArray[np.integer]) -> Inputs:
        """The inputs of a batch beside "encoded", one entry a sample: of images of these heights and widths, (N, 2), pixels."""
        if self.views == "ten":
            windows = ten_windows(self.augmentation, sizes_N2).astype(np.int32)
            starts = {f"start{n}": np.ascontiguousarray(windows[:, n, :2]) for n in range(5)}
            return {**starts, **self._shape_input(windows[:, 0])}
        augmentation, statistics, names = self.augmentation, self.statistics, self.input_names
        windows, count = draws.windows_N4.astype(np.int32), len(draws.mirror_N)
        inputs: Inputs = {
            "start": np.ascontiguousarray(windows[:, :2]),
            "mirror": draws.mirror_N.astype(np.int32),
            **self._shape_input(windows),
        }
        noisy = self.views == "random" and augmentation.noisy(epoch)
        shift = np.tile(-channel_means(statistics, augmentation), (count, 1))
        if noisy and statistics is not None:
            shift += colour_shifts(draws.alpha_N3, statistics, augmentation)
        rescale = augmentation.noise_rescale if noisy else 1.0
        if "shift" in names:
            inputs["shift"] = shift.astype(np.float32)
        if "factor" in names:
            inputs["factor"] = np.full(count, 1 / rescale, np.float32)
        if "minus" in names:
            divisor = channel_stdevs(statistics, augmentation) * rescale
            inputs["minus"] = np.tile(-shift.astype(np.float32), (1, self._side))[:, None]
            inputs["divisor"] = np.tile(divisor.astype(np.float32), (count, 1, self._side))
        if statistics is not None and names & {"window", "anchor"}:
            size = len(statistics.mean_HWC)
            corners = mean_corners(augmentation, windows, size)
            reflected = draws.mirror_N & (augmentation.mean == "crop")
            if "window" in names:
                places = zip(corners.tolist(), reflected.tolist(), strict=True)
                inputs["window"] = [
                    self._mean_strip(left, flag)[top : top + self._side] for (top, left), flag in places
                ]
            else:
                inputs["anchor"] = dali_ops.mean_anchor(corners, reflected, size, self._side)
        return inputs

    def _shape_input(self, windows_N4: NDArray[np.int32]) -> dict[str, NDArray[np.int32]]:
        return {} if self.augmentation.fixed_windows else {"shape": np.ascontiguousarray(windows_N4[:, 2:])}

    @functools.cached_property
    def _mean_strip(self) -> Callable[[int, bool], NDArray[np.float32]]:
        """The columns of the mean image from `left` on, as wide as a crop: float32, contiguous, so any window of them is."""
        assert self.statistics is not None
        mean, side = self.statistics.mean_HWC.astype(np.float32), self._side

        @functools.lru_cache(maxsize=max(1, _STRIP_BYTES // (len(mean) * side * 3 * 4)))
        def strip(left: int, reflected: bool) -> NDArray[np.float32]:
            columns = mean[:, left : left + side]
            return np.ascontiguousarray(columns[:, ::-1] if reflected else columns)

        return strip

    @property
    def _side(self) -> int:
        """Of the views, pixels; 0 where whole images of several sizes come out."""
        return self.augmentation.crop or self.size or 0

    def _empty_pipeline(self, batch_size: int, threads: int) -> Pipeline:
        # The dynamic executor owns each output by reference: DALI never writes into a buffer that a tensor still views.
        # At depth 1 each schedule_run starts one step, so the caller alone decides how many are under way.
        return Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=self.device_id,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )

    def _input(self, name: str, **options: Any) -> DataNode:
        # On a CPU what is fed is read in place: whoever feeds it keeps it until the step is done.
        no_copy = self.device == "cpu" and self.decode == "cpu"
        return fn.external_source(name=name, no_copy=no_copy, **options)

    def _one_view(self) -> DataNode:
        names, image, mirrored = self.input_names, self._window(), self._input("mirror")
        if names & {"window", "minus"}:
            image = dali_ops.mirror(image, mirrored)
            if "window" in names:
                image = dali_ops.subtract_image(image, self._input("window"))
            if "minus" in names:
                image = dali_ops.subtract_rows(image, self._input("minus"), self._input("divisor"), self._side)
            return dali_ops.cast(image, self.dtype)
        shift = self._input("shift") if "shift" in names else self._minus_means()
        subtract = self._subtract_window if "anchor" in names else None
        return self._tensor(image, mirrored, shift, subtract, self._input("factor") if "factor" in names else None)

    def _ten_views(self) -> DataNode:
        whole, shape = self._whole(), self._shape()
        views: dict[bool, list[DataNode]] = {False: [], True: []}
        for n in range(5):
            start = self._input(f"start{n}")
            window = self._resized(fn.slice(whole, start=start, shape=shape, axes=(0, 1)))
            for mirrored in (False, True):
                mean = self._constant_window(n, mirrored) if self.augmentation.windowed_mean else None
                subtract = None if mean is None else lambda image, mean=mean: image - mean
                views[mirrored].append(self._tensor(window, int(mirrored), self._minus_means(), subtract))
        return fn.stack(*views[False], *views[True])

    def _tensor(
        self,
        image: DataNode,
        mirrored: DataNode | int,
        shift: DataNode | list[float],
        subtract: Callable[[DataNode], DataNode] | None,
        factor: DataNode | None = None,
    ) -> DataNode:
        """Mirrors, shifts, subtracts a window of the mean image, divides and multiplies; in one pass where that is possible."""
        std = channel_stdevs(self.statistics, self.augmentation).tolist()
        if subtract is None and factor is None:
            return dali_ops.to_tensor(image, mirrored, shift, std, self.memory_format, self.dtype)
        image = dali_ops.to_tensor(image, mirrored, shift, memory_format=self.memory_format)
        if subtract is not None:
            image = subtract(image)
        if self.augmentation.std != "none":
            image = image / self._constant(np.array(std).reshape(1, 1, 3))
        return dali_ops.cast(image if factor is None else image * factor, self.dtype)

    def _subtract_window(self, image: DataNode) -> DataNode:
        assert self.statistics is not None
        mean, anchor = self.statistics.mean_HWC, self._input("anchor")
        return dali_ops.subtract_mean_window(image, mean, anchor, self._side, self.memory_format, self.device)

    def _constant_window(self, n: int, mirrored: bool) -> DataNode:
        """What is subtracted from view `n` or its reflection. Mean images go with stored squares of one size, so it is a constant."""
        assert self.statistics is not None
        mean = self.statistics.mean_HWC
        window = ten_windows(self.augmentation, np.array([mean.shape[:2]]))[:, n]
        top, left = mean_corners(self.augmentation, window, len(mean))[0].tolist()
        part = mean[top : top + window[0, 2], left : left + window[0, 3]]
        return self._constant(part[:, ::-1] if mirrored and self.augmentation.mean == "crop" else part)

    def _constant(self, values_HWC: NDArray[np.floating[Any]]) -> DataNode:
        values = values_HWC.transpose(2, 0, 1) if self.memory_format == "NCHW" else values_HWC
        device = "cpu" if self.device == "cpu" else "gpu"
        return types.Constant(np.ascontiguousarray(values, np.float32), device=device)

    def _minus_means(self) -> list[float]:
        return [float(-mean) for mean in channel_means(self.statistics, self.augmentation)]

    def _window(self) -> DataNode:
        """uint8 (H, W, 3): the chosen window of each image, resized where it is to be."""
        start, shape = self._input("start"), self._shape()
        if self.raw:
            return self._resized(dali_ops.cut(self._pixels(), start, shape, self.size))
        window = dali_ops.decode_window(self._input("encoded"), start, shape, self.decode, self.hw_decoder_load)
        return self._resized(self._on_device(window))

    def _whole(self) -> DataNode:
        """uint8 (H, W, 3): all of each image."""
        if self.raw:
            return self._pixels()
        image = dali_ops.decode_crop(self._input("encoded"), device=self.decode, hw_decoder_load=self.hw_decoder_load)
        return self._on_device(image)

    def _shape(self) -> DataNode | tuple[int, int]:
        return (self._side, self._side) if self.augmentation.fixed_windows else self._input("shape")

    def _resized(self, window: DataNode) -> DataNode:
        return window if self.augmentation.scale is None else dali_ops.resize_square(window, self._side)

    def _pixels(self) -> DataNode:
        pixels = self._input("encoded", layout="HWC", ndim=3, dtype=types.UINT8)
        return pixels if self.device == "cpu" else pixels.gpu()

    def _on_device(self, image: DataNode) -> DataNode:
        return image.gpu() if self.device != "cpu" and self.decode == "cpu" else image
