"""The four deeds as functions over DALI nodes, and the two pipelines built of them. Device "cpu" and "cuda" are one graph.

Each function takes and returns `nvidia.dali.data_node.DataNode`s and can be used inside any `@pipeline_def`. Images are RGB on the
0-255 scale. Arguments that are drawn per sample stay on the CPU, as DALI wants them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode

from alexprep.pipeline.augment import Augmentation, ten_views
from alexprep.shards.stats import Statistics

Layout = Literal["NCHW", "NHWC"]
Dtype = Literal["float32", "float16"]


def decode_crop(
    encoded: DataNode,
    side: int | None = None,
    x: DataNode | float = 0.5,
    y: DataNode | float = 0.5,
    device: str = "cpu",
) -> DataNode:
    """Decodes a square of an image, or all of it.

    Args:
        encoded: uint8 (bytes,), JPEG or PNG, on the CPU.
        side: pixels; None for the whole image.
        x: left column / (width - side), float32 in 0-1, one a sample; 0.5 is the centre.
        y: top row / (height - side), likewise.
        device: where the pixels are wanted, "cpu" or "cuda".

    Returns:
        uint8 (side, side, 3), layout HWC. An EXIF orientation is not applied; chroma is upsampled alike on both devices.
    """
    options: dict[str, Any] = {
        "device": "cpu" if device == "cpu" else "mixed",
        "output_type": types.RGB,
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,
    }
    if side is None:
        return fn.decoders.image(encoded, **options)
    return fn.decoders.image_crop(encoded, crop=(side, side), crop_pos_x=x, crop_pos_y=y, **options)


def mirror_shift(
    image: DataNode, mirror: DataNode | int, shift: DataNode | list[float], layout: Layout = "NCHW", **crop: Any
) -> DataNode:
    """Mirrors and shifts the colours, in one pass over the pixels.

    Args:
        image: uint8 (H, W, 3), layout HWC.
        mirror: int32, 1 to reflect left to right, one a sample.
        shift: float32 (3,), grey levels added to R, G and B, one triple a sample.
        layout: of the result; the N is the batch.
        **crop: `crop`, `crop_pos_x` and `crop_pos_y` of DALI's crop_mirror_normalize, to cut as well.

    Returns:
        float32 (3, H, W) or (H, W, 3), grey levels.
    """
    minus = [-value for value in shift] if isinstance(shift, list) else -shift
    return fn.crop_mirror_normalize(
        image, mirror=mirror, mean=minus, dtype=types.FLOAT, output_layout=layout[1:], **crop
    )


def subtract_mean_window(
    image: DataNode,
    mean_HWC: NDArray[np.floating[Any]],
    anchor: DataNode,
    side: int,
    layout: Layout = "NCHW",
    device: str = "cpu",
) -> DataNode:
    """Subtracts a window of the mean image, another one for each sample.

    Args:
        image: float32, a result of `mirror_shift`.
        mean_HWC: (S, S, 3), grey levels.
        anchor: int32 (2,), from `mean_anchor`: which window, and whether reflected.
        side: of `image`, pixels.
        layout: of `image`.
        device: of `image`.

    Returns:
        Like `image`.
    """
    # The mean and its reflection side by side: one slice finds either.
    both = np.concatenate([mean_HWC, mean_HWC[:, ::-1]], axis=1)
    axes = (1, 2) if layout == "NCHW" else (0, 1)
    return image - fn.slice(_constant(both, layout, device), start=anchor, shape=(side, side), axes=axes)


def subtract_image(
    image: DataNode, fixed_HWC: NDArray[np.floating[Any]], layout: Layout = "NCHW", device: str = "cpu"
) -> DataNode:
    """Subtracts the same (H, W, 3) grey levels from every sample; otherwise as `subtract_mean_window`."""
    return image - _constant(fixed_HWC, layout, device)


def _constant(image_HWC: NDArray[np.floating[Any]], layout: Layout, device: str) -> DataNode:
    image = image_HWC.transpose(2, 0, 1) if layout == "NCHW" else image_HWC
    return types.Constant(np.ascontiguousarray(image, np.float32), device="cpu" if device == "cpu" else "gpu")


def mean_anchor(offsets_N2: NDArray[np.int64], mirror_N: NDArray[np.bool_], size: int, side: int) -> NDArray[np.int32]:
    """Where `subtract_mean_image` finds the window of a crop: int32 (N, 2).

    Args:
        offsets_N2: int (N, 2), the crop's top row and left column.
        mirror_N: bool (N,), whether it was reflected.
        size: S, the mean image's side.
        side: the crop's side.
    """
    top, left = offsets_N2[:, 0], offsets_N2[:, 1]
    return np.stack([top, np.where(mirror_N, 2 * size - side - left, left)], axis=1).astype(np.int32)


@dataclass(frozen=True)
class Settings:
    """What the two pipelines below need to know beside the augmentation.

    Attributes:
        size: side of the stored images, pixels.
        image_format: "jpg", "png" or "raw", as in dataset.json.
        batch_size: the largest batch that will be fed.
        threads: of DALI.
        device: "cpu" or "cuda".
        device_id: which GPU; None for "cpu".
        dtype: of the images that come out.
        layout: of the images that come out; the N is the batch.
    """

    size: int
    image_format: str
    batch_size: int
    threads: int
    device: str
    device_id: int | None
    dtype: Dtype
    layout: Layout


def single_view_pipeline(augmentation: Augmentation, statistics: Statistics | None, settings: Settings) -> Pipeline:
    """The pipeline that gives one crop of each image; the draws come from outside, so it serves training and evaluation.

    Inputs to feed, one entry a sample: "encoded" (see `decode_crop`; for raw shards the pixels, HWC), "x" and "y" float32 in 0-1,
    "mirror" int32, "shift" float32 (3,) in grey levels (colour noise, less the channel means where those are subtracted), and
    with mean "crop" also "anchor" int32 (2,).

    Returns:
        A pipeline with one output: images of `dtype` and `layout`.
    """
    side, device, layout = augmentation.crop, settings.device, settings.layout
    pipeline = _pipeline(settings)
    with pipeline:
        x, y, mirror, shift = (fn.external_source(name=name) for name in ("x", "y", "mirror", "shift"))
        if settings.image_format == "raw":
            crop = {"crop": (side, side), "crop_pos_x": x, "crop_pos_y": y}
            image = mirror_shift(_raw(device), mirror, shift, layout, **crop)
        else:
            image = mirror_shift(
                decode_crop(fn.external_source(name="encoded"), side, x, y, device), mirror, shift, layout
            )
        if statistics is not None and augmentation.mean == "crop":
            anchor = fn.external_source(name="anchor")
            image = subtract_mean_window(image, statistics.mean_HWC, anchor, side, layout, device)
        elif statistics is not None and augmentation.mean == "centre":
            low = (len(statistics.mean_HWC) - side) // 2
            middle = statistics.mean_HWC[low : low + side, low : low + side]
            image = subtract_image(image, middle, layout, device)
        pipeline.set_outputs(_cast(image, settings.dtype))
    return pipeline


def ten_view_pipeline(augmentation: Augmentation, statistics: Statistics | None, settings: Settings) -> Pipeline:
    """The pipeline of the paper's test: ten views of each image, in the order of `ten_views`, stacked before the other axes.

    Input to feed: "encoded". The mean is subtracted as in training.
    """
    side, device, layout = augmentation.crop, settings.device, settings.layout
    slack = settings.size - side
    pipeline = _pipeline(settings)
    with pipeline:
        whole = (
            _raw(device)
            if settings.image_format == "raw"
            else decode_crop(fn.external_source(name="encoded"), device=device)
        )
        views = []
        for top, left, mirrored in ten_views(slack):
            crop = {"crop": (side, side), "crop_pos_x": left / max(1, slack), "crop_pos_y": top / max(1, slack)}
            shift = [0.0, 0.0, 0.0]
            if statistics is not None and augmentation.mean == "channel":
                shift = (-statistics.channel_means).tolist()
            view = mirror_shift(whole, int(mirrored), shift, layout, **crop)
            if statistics is not None and augmentation.mean in ("crop", "centre"):
                y, x = (top, left) if augmentation.mean == "crop" else (slack // 2, slack // 2)
                mean = statistics.mean_HWC[y : y + side, x : x + side]
                view = subtract_image(
                    view, mean[:, ::-1] if mirrored and augmentation.mean == "crop" else mean, layout, device
                )
            views.append(view)
        pipeline.set_outputs(_cast(fn.stack(*views), settings.dtype))
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


def _raw(device: str) -> DataNode:
    pixels = fn.external_source(name="encoded", layout="HWC", ndim=3, dtype=types.UINT8)
    return pixels if device == "cpu" else pixels.gpu()


def _cast(image: DataNode, dtype: Dtype) -> DataNode:
    return image if dtype == "float32" else fn.cast(image, dtype=types.FLOAT16)
