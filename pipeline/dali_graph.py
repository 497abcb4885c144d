"""The assembled DALI graph of a `Loader`: how it is built of single operations, which inputs it takes, and what is fed to them.

The operations lie in `alexprep.pipeline.dali_ops`, their definition and the random parameters in `alexprep.pipeline.augmentation`; a graph
is run, batch after batch, by `alexprep.pipeline.loader`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.backend import TensorCPU, TensorListCPU
from nvidia.dali.data_node import DataNode

from alexprep.pipeline import dali_ops, normalisation, policies
from alexprep.pipeline.augmentation import (
    Augmentation,
    Draws,
    channel_means,
    channel_stdevs,
    colour_shifts,
    draw,
    mean_corners,
    ten_windows,
)
from alexprep.pipeline.colour import gaussian
from alexprep.pipeline.dali_ops import Dtype, MemoryFormat
from alexprep.pipeline.geometry import reflected_maps
from alexprep.shards.errors import AlexprepError, one_of
from alexprep.shards.rgb_statistics import Statistics

# All but the first are without chance; the last are the paper's test views.
Views = Literal["random", "centre", "two", "ten"]
Inputs = dict[str, "NDArray[Any] | list[NDArray[np.float32]]"]

# Which of `ten_windows` are seen as they are and reflected: the centre, or all five.
REFLECTED: dict[str, tuple[int, ...]] = {"two": (2,), "ten": (0, 1, 2, 3, 4)}
VIEWS = {"random": 1, "centre": 1} | {name: 2 * len(windows) for name, windows in REFLECTED.items()}  # of an image
POLICY_INPUTS = ("kind", "map", "factor", "from_mean", "threshold", "mask", "kernel")
_STRIP_BYTES = 128 * 2**20  # of windows of the mean image that are kept ready


@dataclass(frozen=True)
class Graph:
    """What is done to the images of a `Loader`, as a DALI pipeline and the inputs that it is fed beside the images."""

    augmentation: Augmentation
    statistics: Statistics | None  # of the dataset, where they are needed
    views: Views
    raw: bool  # whether samples come as pixels rather than as encoded images
    size: tuple[int, int] | None  # height and width of the stored images where all have the same, pixels
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
            raise AlexprepError(
                "dtype uint8 holds grey levels as they are: it needs mean, std and noise 'none', and no erasing, no mixing, no elastic, no width and "
                "not one channel"
            )
        if self.augmentation.normalised_width is not None and self.views in REFLECTED:
            raise AlexprepError(
                f"views {self.views!r} cut windows of what normalised_width puts in the middle: use --views centre"
            )

    def pipeline(self) -> Pipeline:
        """The pipeline, not yet built. It takes the images as "encoded" and what `inputs` makes; its one output is the views.

        Several views are stacked before the other axes: the windows, then their reflections. All three channels are there. What
        `resamples` or `normalises` are windows as they were decoded, uint8 (H, W, 3): `alexprep.pipeline.resampling` or
        `alexprep.pipeline.normalisation` makes the rest.
        """
        pipeline = self._empty_pipeline(self.batch_size, self.threads)
        with pipeline:
            pipeline.set_outputs(self._reflected_views() if self.views in REFLECTED else self._one_view())
        return pipeline

    @property
    def resamples(self) -> bool:
        """Whether warps, mean and all behind them are torch's, see `alexprep.pipeline.resampling`."""
        return self.augmentation.resamples(chance=self.views == "random")

    @functools.cached_property
    def normalises(self) -> bool:
        """Whether all behind the decoding is `alexprep.pipeline.normalisation`'s: on a CPU, where there is nothing between resize and mean."""
        random = self.views == "random"
        more = self.resamples or self.views in REFLECTED or (random and (self._more_names or self.augmentation.hooks))
        # Bytes that are kept are the same in every type; DALI's resize, in the rare value, is not this one's.
        other = self.dtype == "uint8" or (self.augmentation.keeps_bytes and self.augmentation.scale is not None)
        wanted = self.device == "cpu" and any(self._view) and not (more or other)
        return wanted and normalisation.available()

    def normaliser(self) -> normalisation.Normaliser | None:
        """What makes views of the windows that `normalises`; to be closed."""
        if not self.normalises:
            return None
        resized = self.augmentation.scale is not None
        return normalisation.Normaliser(self._view, resized, self.memory_format, self.dtype, self.threads)

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
        (on a CPU, axes HWC, and in what `normalises`, which is not fed to DALI), "window", "minus" and "divisor": see
        `dali_ops.subtract_image` and `dali_ops.subtract_rows`. Otherwise "shift": see `dali_ops.to_tensor`; "anchor": see `dali_ops.subtract_mean_window`; "factor", float32, to multiply by at the end.
        """
        augmentation = self.augmentation
        if self.resamples:
            return frozenset({"start"} | (set() if augmentation.fixed_windows else {"shape"}))
        noise = augmentation.noise != "none"
        names = {"start", "mirror"} | (set() if augmentation.fixed_windows else {"shape"})
        rows_pay = self.device == "cpu" and self.memory_format != "NCHW" and self.dtype != "uint8"
        if self.normalises or (rows_pay and any(self._view) and not augmentation.keeps_bytes):
            names |= {"window"} if augmentation.windowed_mean else set()
            if noise or augmentation.std != "none" or not augmentation.windowed_mean:
                names |= {"minus", "divisor"}
        else:
            names |= {"shift"} if noise else set()
            names |= {"anchor"} if augmentation.windowed_mean else set()
            names |= {"factor"} if noise and augmentation.noise_rescale != 1 else set()
        return frozenset(names | (self._more_names if self.views == "random" else set()))

    @functools.cached_property
    def _more_names(self) -> set[str]:
        """The inputs of what changes shapes, sharpness and colours: see `_more_inputs`."""
        augmentation = self.augmentation
        names = {"warped", "affine"} if augmentation.affine is not None else set()
        names |= {"blurred", "columns_kernel", "rows_kernel"} if augmentation.blur is not None else set()
        names |= {"recoloured", "colours", "means"} if augmentation.recolours else set()
        if augmentation.policy is not None:
            turns = range(augmentation.policy.operations)
            names |= {f"policy{turn}.{name}" for turn in turns for name in POLICY_INPUTS}
        names |= {f"hook{n}.{k}" for n, hook in enumerate(augmentation.hooks) for k in range(hook.numbers)}
        return names | ({"erased"} if augmentation.erasing is not None else set())

    def inputs(self, epoch: int, draws: Draws, sizes_N2: NDArray[np.integer]) -> Inputs:
        """The inputs of a batch beside "encoded", one entry a sample: of images of these heights and widths, (N, 2), pixels."""
        if self.views in REFLECTED:
            windows = ten_windows(self.augmentation, sizes_N2).astype(np.int32)
            starts = {f"start{n}": np.ascontiguousarray(windows[:, n, :2]) for n in REFLECTED[self.views]}
            return {**starts, **self._shape_input(windows[:, 0])}
        augmentation, statistics, names = self.augmentation, self.statistics, self.input_names
        windows, count = draws.windows_N4.astype(np.int32), len(draws.mirror_N)
        if self.resamples:
            return {"start": np.ascontiguousarray(windows[:, :2]), **self._shape_input(windows)}
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
            inputs["minus"] = np.tile(-shift.astype(np.float32), (1, self._view[1]))[:, None]
            inputs["divisor"] = np.tile(divisor.astype(np.float32), (count, 1, self._view[1]))
        if statistics is not None and names & {"window", "anchor"}:
            size = statistics.mean_image().shape[:2]
            corners = mean_corners(augmentation, windows, size)
            reflected = draws.mirror_N & (augmentation.mean == "crop")
            if "window" in names:
                places = zip(corners.tolist(), reflected.tolist(), strict=True)
                inputs["window"] = [
                    self._mean_strip(left, flag)[top : top + self._view[0]] for (top, left), flag in places
                ]
            else:
                inputs["anchor"] = dali_ops.mean_anchor(corners, reflected, size[1], self._view[1])
        return inputs | self._more_inputs(draws)

    def _more_inputs(self, draws: Draws) -> Inputs:
        """Which samples are changed, bool, and how, float32: affine maps, kernels, recolourings, rectangles; see `Draws.more`."""
        inputs: Inputs = {}
        more = draws.more
        if "affine" in more:
            maps = self._maps(more["affine"], draws.mirror_N)
            inputs |= {"warped": _others(more["affine"], np.eye(2, 3)), "affine": _single(maps)}
        for turn, drawn in enumerate(draws.operations()):
            given = drawn | {"map": self._maps(drawn["map"], draws.mirror_N)}
            inputs |= {f"policy{turn}.{name}": values for name, values in _policy_inputs(given).items()}
        if "sigma" in more:
            kernels = [gaussian(sigma).astype(np.float32) for sigma in more["sigma"].tolist()]
            inputs |= {"blurred": more["sigma"] > 0}
            inputs |= {"columns_kernel": [kernel[:, None] for kernel in kernels]}
            inputs |= {"rows_kernel": [kernel[None] for kernel in kernels]}
        if "recolouring" in more:
            colours, means = more["recolouring"][:, :, :3], more["recolouring"][:, :, 3:]
            changed = _others(colours, np.eye(3)) | _others(means, np.zeros((3, 3)))
            inputs |= {"recoloured": changed, "colours": _single(colours), "means": _single(means)}
        if "erased" in more:
            inputs["erased"] = _single(more["erased"])
        inputs |= {name: _single(values) for name, values in more.items() if name.startswith("hook")}
        return inputs

    def _maps(self, maps_N23: NDArray[np.float64], mirror_N: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Affine maps, see `geometry.warp`, for views as they come: of those that the resize reflected, in reflected columns."""
        return reflected_maps(maps_N23, mirror_N, self._view[1]) if self._mirrors_early else maps_N23

    def _shape_input(self, windows_N4: NDArray[np.int32]) -> dict[str, NDArray[np.int32]]:
        return {} if self.augmentation.fixed_windows else {"shape": np.ascontiguousarray(windows_N4[:, 2:])}

    @functools.cached_property
    def _mean_strip(self) -> Callable[[int, bool], NDArray[np.float32]]:
        """The columns of the mean image from `left` on, as wide as a crop: float32, contiguous, so any window of them is."""
        assert self.statistics is not None
        mean, width = self.statistics.mean_image().astype(np.float32), self._view[1]

        @functools.lru_cache(maxsize=max(1, _STRIP_BYTES // (len(mean) * width * 3 * 4)))
        def strip(left: int, reflected: bool) -> NDArray[np.float32]:
            columns = mean[:, left : left + width]
            return np.ascontiguousarray(columns[:, ::-1] if reflected else columns)

        return strip

    @property
    def _view(self) -> tuple[int, int]:
        """Height and width of the views, pixels; 0 where whole images of several sizes come out."""
        return self.augmentation.view or self.size or (0, 0)

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
        # What is fed is read in place, by decoders for a GPU too: whoever feeds it keeps it until the step is done. What is copied to a GPU as
        # it is, DALI copies first into memory from which that goes by itself.
        no_copy = self.device == "cpu" or (name == "encoded" and not self.raw)
        return fn.external_source(name=name, no_copy=no_copy, **options)

    def _one_view(self) -> DataNode:
        if self.normalises:
            return self._window()
        if self.resamples:
            return self._resized(self._window())
        window, mirrored = self._hooked("decode", self._window()), self._input("mirror")
        image = self._changed(self._resized(window, mirrored if self._mirrors_early else None))
        image = self._centred_view(image, mirrored, "float32" if self._finishes else self.dtype)
        return dali_ops.cast(self._finished(image), self.dtype) if self._finishes else image

    def _changed(self, image: DataNode) -> DataNode:
        """All that changes shapes, sharpness and colours: uint8, or float32 where it recolours and shall not be uint8."""
        augmentation, more = self.augmentation, self.input_names
        if "affine" in more and augmentation.affine is not None:
            maps, fill = self._input("affine"), augmentation.affine.fill
            image = self._where("warped", lambda image, maps: dali_ops.warp(image, maps, fill), image, maps)
        if augmentation.policy is not None and self.views == "random":
            for turn in range(augmentation.policy.operations):
                image = self._operated(image, f"policy{turn}.", augmentation.policy.fill)
        if "rows_kernel" in more:
            kernels = [self._on_image_device(self._input(name)) for name in ("columns_kernel", "rows_kernel")]
            image = self._where("blurred", self._blurred, image, *kernels)
        if "colours" in more:
            recoloured = functools.partial(dali_ops.recolour, device=self.device)
            colours, means = self._input("colours"), self._input("means")
            as_float = functools.partial(fn.cast, dtype=types.FLOAT)
            image = dali_ops.where(self._input("recoloured"), recoloured, image, colours, means, otherwise=as_float)
            image = dali_ops.cast(image, "uint8") if self.dtype == "uint8" else image
        return self._hooked("augment", image)

    def _hooked(self, place: str, image: DataNode) -> DataNode:
        """The user's own operations at a place."""
        hooks = enumerate(self.augmentation.hooks) if self.views == "random" else ()
        for number, hook in hooks:
            if hook.after == place:
                image = hook.function(image, *(self._input(f"hook{number}.{n}") for n in range(hook.numbers)))
                if not isinstance(image, DataNode):
                    raise AlexprepError(
                        f"hook {hook.name} gives a {type(image).__name__}, not the image as a DALI node"
                    )
        return image

    def _operated(self, image: DataNode, part: str, fill: float) -> DataNode:
        """One operation of a policy: each kind has a branch, in which are the samples that drew it."""
        given = {name: self._input(f"{part}{name}") for name in POLICY_INPUTS}
        kind, kernel = given["kind"], self._on_image_device(given["kernel"])
        scaled, saturated, stretched = (
            functools.partial(change, device=self.device)
            for change in (dali_ops.scale, dali_ops.saturate, dali_ops.stretch)
        )
        branches: list[tuple[int, Callable[..., DataNode], list[DataNode]]] = [
            (policies.WARPED, lambda image, maps: dali_ops.warp(image, maps, fill, nearest=True), [given["map"]]),
            (policies.SCALED, scaled, [given["factor"], given["from_mean"]]),
            (policies.COLOURED, saturated, [given["factor"]]),
            (policies.TONED, dali_ops.tone, [given["threshold"], given["mask"]]),
            (policies.STRETCHED, stretched, []),
            (policies.EQUALIZED, dali_ops.equalize, []),
            (policies.SHARPENED, dali_ops.filtered, [kernel]),
        ]
        for number, change, arguments in branches:
            image = dali_ops.where(kind == number, change, image, *arguments)
        return image

    def _where(self, name: str, change: Callable[..., DataNode], image: DataNode, *arguments: DataNode) -> DataNode:
        """Changes those samples that the input of this name tells."""
        return dali_ops.where(self._input(name), change, image, *arguments)

    @staticmethod
    def _blurred(image: DataNode, columns: DataNode, rows: DataNode) -> DataNode:
        return dali_ops.filtered(dali_ops.filtered(image, columns), rows)

    @property
    def _finishes(self) -> bool:
        """Whether anything is done after the mean is subtracted and all divided."""
        hooked = any(hook.after == "tensor" for hook in self.augmentation.hooks)
        return self.views == "random" and (self.augmentation.erasing is not None or hooked)

    def _finished(self, image: DataNode) -> DataNode:
        erasing = self.augmentation.erasing
        if erasing is not None:
            image = dali_ops.erase(image, self._input("erased"), erasing.value, self.memory_format)
        return self._hooked("tensor", image)

    @property
    def _mirrors_early(self) -> bool:
        """Whether the reflection is a part of the resize, where by rows it would be a pass of its own.

        Nothing in between tells left from right but affine maps, which are reflected too; what a hook would see is another matter.
        """
        kept = self.views != "random" or not self.augmentation.hooks
        return self.augmentation.scale is not None and kept and "minus" in self.input_names

    def _centred_view(self, image: DataNode, mirrored: DataNode, dtype: Dtype) -> DataNode:
        """Mirrors if that has not been done, subtracts the mean, adds the noise, divides."""
        names = self.input_names
        if names & {"window", "minus"}:
            image = image if self._mirrors_early else dali_ops.mirror(image, mirrored)
            if "window" in names:
                image = dali_ops.subtract_image(image, self._input("window"))
            if "minus" in names:
                image = dali_ops.subtract_rows(image, self._input("minus"), self._input("divisor"), self._view)
            return dali_ops.cast(image, dtype)
        shift = self._input("shift") if "shift" in names else self._minus_means()
        subtract = self._subtract_window if "anchor" in names else None
        factor = self._input("factor") if "factor" in names else None
        return self._tensor(image, mirrored, shift, subtract, factor, dtype)

    def _reflected_views(self) -> DataNode:
        whole, shape = self._whole(), self._shape()
        views: dict[bool, list[DataNode]] = {False: [], True: []}
        for n in REFLECTED[self.views]:
            start = self._input(f"start{n}")
            window = self._resized(self._cut(whole, start, shape))
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
        dtype: Dtype | None = None,
    ) -> DataNode:
        """Mirrors, shifts, subtracts a window of the mean image, divides and multiplies; in one pass where that is possible."""
        std, dtype = channel_stdevs(self.statistics, self.augmentation).tolist(), dtype or self.dtype
        if subtract is None and factor is None:
            return dali_ops.to_tensor(image, mirrored, shift, std, self.memory_format, dtype)
        image = dali_ops.to_tensor(image, mirrored, shift, memory_format=self.memory_format)
        if subtract is not None:
            image = subtract(image)
        if self.augmentation.std != "none":
            image = image / self._constant(np.array(std).reshape(1, 1, 3))
        return dali_ops.cast(image if factor is None else image * factor, dtype)

    def _subtract_window(self, image: DataNode) -> DataNode:
        assert self.statistics is not None
        mean, anchor = self.statistics.mean_image(), self._input("anchor")
        return dali_ops.subtract_mean_window(image, mean, anchor, self._view, self.memory_format, self.device)

    def _constant_window(self, n: int, mirrored: bool) -> DataNode:
        """What is subtracted from view `n` or its reflection. Mean images go with images of one size, so it is a constant."""
        assert self.statistics is not None
        mean = self.statistics.mean_image()
        window = ten_windows(self.augmentation, np.array([mean.shape[:2]]))[:, n]
        top, left = mean_corners(self.augmentation, window, mean.shape[:2])[0].tolist()
        part = mean[top : top + window[0, 2], left : left + window[0, 3]]
        return self._constant(part[:, ::-1] if mirrored and self.augmentation.mean == "crop" else part)

    def _constant(self, values_HWC: NDArray[np.floating[Any]]) -> DataNode:
        values = values_HWC.transpose(2, 0, 1) if self.memory_format == "NCHW" else values_HWC
        device = "cpu" if self.device == "cpu" else "gpu"
        return types.Constant(np.ascontiguousarray(values, np.float32), device=device)

    def _minus_means(self) -> list[float]:
        return [float(-mean) for mean in channel_means(self.statistics, self.augmentation)]

    def _window(self) -> DataNode:
        """uint8 (H, W, 3): the chosen window of each image."""
        start, shape = self._input("start"), self._shape()
        if self.augmentation.pad:
            return self._cut(self._whole(), start, shape)
        if self.raw:
            return dali_ops.cut(self._pixels(), start, shape, self.size)
        window = dali_ops.decode_window(self._input("encoded"), start, shape, self.decode, self.hw_decoder_load)
        return self._on_device(window)

    def _whole(self) -> DataNode:
        """uint8 (H, W, 3): all of each image."""
        if self.raw:
            return self._pixels()
        image = dali_ops.decode_crop(self._input("encoded"), device=self.decode, hw_decoder_load=self.hw_decoder_load)
        return self._on_device(image)

    def _cut(self, whole: DataNode, start: DataNode, shape: DataNode | tuple[int, int]) -> DataNode:
        """A window of each padded image."""
        pad, background = self.augmentation.pad, self.augmentation.background
        if not pad:
            return fn.slice(whole, start=start, shape=shape, axes=(0, 1))
        start = start - np.int32(pad)
        return fn.slice(
            whole, start=start, shape=shape, axes=(0, 1), out_of_bounds_policy="pad", fill_values=background
        )

    def _shape(self) -> DataNode | tuple[int, int]:
        return self._view if self.augmentation.fixed_windows else self._input("shape")

    def _resized(self, window: DataNode, mirrored: DataNode | None = None) -> DataNode:
        return window if self.augmentation.scale is None else dali_ops.resize(window, self._view, mirrored)

    def _pixels(self) -> DataNode:
        pixels = self._input("encoded", layout="HWC", ndim=3, dtype=types.UINT8)
        return pixels if self.device == "cpu" else pixels.gpu()

    def _on_image_device(self, node: DataNode) -> DataNode:
        return node if self.device == "cpu" else node.gpu()

    def _on_device(self, image: DataNode) -> DataNode:
        return image.gpu() if self.device != "cpu" and self.decode == "cpu" else image


def as_tensors(values: list[NDArray[Any]]) -> TensorListCPU:
    """What DALI would make of a list of arrays that it is fed, without a copy, in half the time."""
    make: Any = TensorListCPU  # whose types do not know `contiguous`
    tensors: TensorListCPU = make([TensorCPU(value) for value in values], contiguous=False)
    return tensors


def check_hooks(augmentation: Augmentation) -> None:
    """Runs the user's own operations once, on noise and on the CPU. What they raise, it raises.

    Raises AlexprepError where what comes out is not of the form of what went in, and RuntimeError where DALI cannot run it.
    """
    height, width = (2 * side for side in augmentation.view or (16, 16))
    bare = replace(augmentation, mean="none", std="none", noise="none", noise_epochs=None, share=1, mixing=None)
    views: Any = {"views": "random", "dtype": "float32", "memory_format": "NHWC"}
    where: Any = {"threads": 1, "device": "cpu", "device_id": None, "decode": "cpu", "hw_decoder_load": 0.0}
    graph = Graph(bare, None, raw=True, size=None, batch_size=2, **views, **where)
    sizes = np.array([[height, width]] * 2)
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    pipeline = graph.pipeline()
    pipeline.build()
    for name, values in {"encoded": images, **graph.inputs(0, draw(bare, 0, 0, np.arange(2), sizes), sizes)}.items():
        pipeline.feed_input(name, values)
    (output,) = pipeline.run()
    shapes = {tuple(output.at(n).shape) for n in range(2)}
    wanted = (*(augmentation.view or (height, width)), 3)
    if shapes != {wanted} or output.dtype != types.FLOAT:
        names = ", ".join(hook.name for hook in augmentation.hooks)
        raise AlexprepError(
            f"hook {names} makes float32 {wanted} into {output.dtype} {min(shapes)}: keep type and size"
        )


def _policy_inputs(drawn: Mapping[str, NDArray[Any]]) -> Inputs:
    """What DALI is fed of an operation: see `policies.Operation`; and the kernel that its factor stands for."""
    kinds = {"kind": np.int32, "threshold": np.int32, "mask": np.uint8}
    inputs: Inputs = {name: np.ascontiguousarray(drawn[name], kind) for name, kind in kinds.items()}
    inputs |= {name: _single(drawn[name]) for name in ("map", "factor", "from_mean")}
    inputs["kernel"] = _single(np.stack([policies.sharpening(factor) for factor in drawn["factor"].tolist()]))
    return inputs


def _others(values_N: NDArray[Any], usual: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the arrays differ from the usual one: bool (N,)."""
    different: NDArray[np.bool_] = (values_N != usual).reshape(len(values_N), -1).any(axis=1)
    return different


def _single(values: NDArray[Any]) -> NDArray[np.float32]:
    return np.ascontiguousarray(values, np.float32)
