"""The operations of an augmentation as functions over DALI nodes, for use inside any DALI pipeline.

Each takes and returns `nvidia.dali.data_node.DataNode`s and can be called inside any `@pipeline_def`, on device "cpu" and "cuda" alike.
Images are RGB on the 0-255 scale. Arguments of each sample stay on the CPU, as DALI wants them. What the operations mean is defined in
numpy in `alexprep.pipeline.augmentation`; `alexprep.pipeline.dali_graph` puts them together for a `Loader`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

# DALI frees and asks for the same tens of megabytes at each step, and without a pool the system clears fresh pages each time:
# a fifth of the CPU pipeline's time. Read when DALI first allocates; whoever set it knows better.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "1M")

from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode

from alexprep.pipeline.colour import LUMA
from alexprep.pipeline.geometry import Size, sides

MemoryFormat = Literal["NCHW", "NHWC", "channels_last"]
Dtype = Literal["float32", "float16", "uint8"]
HW_DECODER_LOAD = 0.65  # DALI's own default: the share of a batch that a GPU's JPEG engines get

_TYPES = {"float32": types.FLOAT, "float16": types.FLOAT16, "uint8": types.UINT8}


def decode_crop(
    encoded: DataNode,
    size: Size | None = None,
    x: DataNode | float = 0.5,
    y: DataNode | float = 0.5,
    device: str = "cpu",
    hw_decoder_load: float = HW_DECODER_LOAD,
) -> DataNode:
    """Decodes a crop of an image, or all of it; on a CPU only what the crop needs is decoded.

    Args:
        encoded: uint8 (bytes,), an encoded image, on the CPU.
        size: side of a square, or height and width, pixels; None for the whole image.
        x: left column / (image's width - crop's width), float32 in 0-1, one a sample; 0.5 is the centre.
        y: top row / (image's height - crop's height), likewise.
        device: where the pixels are wanted, "cpu" or "cuda".
        hw_decoder_load: on "cuda", the share of a batch that goes to the JPEG engines, 0-1, where the GPU has them.

    Returns:
        uint8 (H, W, 3), HWC. An EXIF orientation is not applied; chroma is upsampled alike on both devices.
    """
    options = _decoding(device, hw_decoder_load)
    if size is None or device != "cpu":
        whole = fn.decoders.image(encoded, **options)
        return whole if size is None else fn.crop(whole, crop=sides(size), crop_pos_x=x, crop_pos_y=y)
    return fn.decoders.image_crop(encoded, crop=sides(size), crop_pos_x=x, crop_pos_y=y, **options)


def decode_window(
    encoded: DataNode,
    start: DataNode,
    shape: DataNode | Sequence[int],
    device: str = "cpu",
    hw_decoder_load: float = HW_DECODER_LOAD,
) -> DataNode:
    """Decodes a window given in pixels: uint8 (height, width, 3). For the arguments see also `decode_crop`.

    On a GPU the whole image is decoded, for nvJPEG before 13.2 has no windows of subsampled chroma.

    Args:
        start: int32 (2,), top row and left column, one pair a sample.
        shape: int32 (2,), height and width, one pair a sample or one for all.
    """
    options = _decoding(device, hw_decoder_load)
    if device != "cpu":
        return cut(fn.decoders.image(encoded, **options), start, shape)
    return fn.decoders.image_slice(encoded, start=start, shape=shape, axes=(0, 1), **options)


def _decoding(device: str, hw_decoder_load: float) -> dict[str, Any]:
    options = {"output_type": types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}
    if device == "cpu":
        return {**options, "device": "cpu"}
    return {**options, "device": "mixed", "hw_decoder_load": hw_decoder_load}


def cut(image: DataNode, start: DataNode, shape: DataNode | Sequence[int], size: Size | None = None) -> DataNode:
    """Cuts a window out of pixels, uint8 (H, W, 3); for `start` and `shape` see `decode_window`.

    Where all images have one `size`, and one `shape` is for all, rows are copied whole, six times as fast.
    """
    if size is None or isinstance(shape, DataNode):
        return fn.slice(image, start=start, shape=shape, axes=(0, 1))
    (height, width), (whole_height, whole_width) = shape, sides(size)
    rows = fn.reshape(image, shape=(whole_height, 3 * whole_width), layout="HW")
    part = fn.slice(rows, start=start * np.array([1, 3], np.int32), shape=(height, 3 * width), axes=(0, 1))
    return fn.reshape(part, shape=(height, width, 3), layout="HWC")


def resize_square(image: DataNode, side: int) -> DataNode:
    """Resizes uint8 (H, W, 3) to uint8 (side, side, 3), see `resize`."""
    return resize(image, side)


def resize(image: DataNode, size: Size, mirrored: DataNode | None = None) -> DataNode:
    """Resizes uint8 (H, W, 3) to that size, whatever the proportions, by an antialiased bilinear filter, as `geometry.resize` defines it.

    With `mirrored`, int32, it also reflects as `mirror` does, for a quarter of the time; one value in 5,000 then differs by one.
    """
    options: dict[str, Any] = {"size": sides(size), "interp_type": types.INTERP_LINEAR, "antialias": True}
    return fn.resize(image, **options) if mirrored is None else fn.resize_crop_mirror(image, mirror=mirrored, **options)


def mirror(image: DataNode, mirrored: DataNode | int) -> DataNode:
    """Reflects (H, W, 3) left to right where `mirrored`, int32, is 1."""
    return fn.flip(image, horizontal=mirrored, vertical=0)


def colour_noise(stdevs: NDArray[np.floating[Any]], eigenvectors: NDArray[np.floating[Any]]) -> DataNode:
    """Draws the paper's colour noise (section 4.1) with DALI's own generator, for pipelines without `alexprep`'s random parameters.

    `stdevs`, (3,), grey levels, are those along the principal axes, from `noise_stdevs`; the axes are columns, (3, 3), from
    `Statistics.eigenvectors`. Gives a `shift` for `to_tensor`: float32 (3,), grey levels, another one for each sample.
    """
    axes = np.asarray(eigenvectors * stdevs, np.float32)
    alpha = fn.random.normal(shape=(3,))
    return alpha[0] * axes[:, 0] + alpha[1] * axes[:, 1] + alpha[2] * axes[:, 2]


def to_tensor(
    image: DataNode,
    mirrored: DataNode | int = 0,
    shift: DataNode | Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    memory_format: MemoryFormat = "NCHW",
    dtype: Dtype = "float32",
) -> DataNode:
    """Mirrors, shifts the colours, divides, converts and orders the axes, in one pass over the pixels.

    Args:
        image: uint8 (H, W, 3), HWC.
        mirrored: int32, 1 to reflect left to right, one a sample.
        shift: float32 (3,), grey levels added to R, G and B: colour noise less the means; one triple a sample or one for all.
        std: what R, G and B are divided by, grey levels.
        memory_format: of the result; the N is the batch. "channels_last" lies in memory as "NHWC" does.
        dtype: of the result; "uint8" keeps grey levels as they are, and takes no shift and no std.

    Returns:
        (3, H, W) or (H, W, 3).
    """
    if dtype == "uint8" and memory_format != "NCHW":
        return mirror(image, mirrored)
    minus = -shift if isinstance(shift, DataNode) else [-value for value in shift]
    return fn.crop_mirror_normalize(
        image,
        mirror=mirrored,
        mean=minus,
        std=list(std),
        dtype=_TYPES[dtype],
        output_layout="CHW" if memory_format == "NCHW" else "HWC",
    )


def cast(image: DataNode, dtype: Dtype) -> DataNode:
    """Converts float32 to `dtype`."""
    return image if dtype == "float32" else fn.cast(image, dtype=_TYPES[dtype])


def subtract_mean_window(
    image: DataNode,
    mean_HWC: NDArray[np.floating[Any]],
    anchor: DataNode | Sequence[int],
    size: Size,
    memory_format: MemoryFormat = "NCHW",
    device: str = "cpu",
) -> DataNode:
    """Subtracts a window of the mean image or of its reflection, another one for each sample.

    Args:
        image: float32, a result of `to_tensor`, of this `size`, `memory_format` and `device`.
        mean_HWC: (H, W, 3), grey levels.
        anchor: int32 (2,), row and column of the window in the mean image with its reflection right of it: (H, 2 W, 3).
    """
    # The mean and its reflection side by side: one slice finds either.
    both = np.concatenate([mean_HWC, mean_HWC[:, ::-1]], axis=1)
    axes = (1, 2) if memory_format == "NCHW" else (0, 1)
    if memory_format == "NCHW":
        both = both.transpose(2, 0, 1)
    constant = types.Constant(np.ascontiguousarray(both, np.float32), device="cpu" if device == "cpu" else "gpu")
    return image - fn.slice(constant, start=anchor, shape=sides(size), axes=axes)


def mean_anchor(
    corners_N2: NDArray[np.int64], mirror_N: NDArray[np.bool_], mean_width: int, width: int
) -> NDArray[np.int32]:
    """Where `subtract_mean_window` finds windows of a width in a mean image of `mean_width`, reflected or not: int32 (N, 2)."""
    top, left = corners_N2[:, 0], corners_N2[:, 1]
    return np.stack([top, np.where(mirror_N, 2 * mean_width - width - left, left)], axis=1).astype(np.int32)


def subtract_rows(image: DataNode, subtrahend: DataNode, divisor: DataNode, size: Size) -> DataNode:
    """Subtracts and divides with the same numbers in every row: channel means, noise and deviations, where axes stay HWC.

    DALI's `crop_mirror_normalize`, which `to_tensor` is, takes twice the time for this on a CPU, three numbers at a time. Both
    operands are float32 (1, 3 * width), R, G and B repeated for each pixel of a row, one a sample. Gives float32 (height, width, 3).
    """
    height, width = sides(size)
    rows = fn.reshape(image, shape=(height, 3 * width))
    return fn.reshape(
        fn.normalize(rows, mean=subtrahend, stddev=divisor, axes=(0,)), shape=(height, width, 3), layout="HWC"
    )


def subtract_image(image: DataNode, subtrahend: DataNode) -> DataNode:
    """Subtracts float32 pixels of the same shape, one a sample; of all ways that DALI has on a CPU, this reads and writes least."""
    return fn.normalize(image, mean=subtrahend, stddev=1.0)


def where(
    predicate: DataNode,
    change: Callable[..., DataNode],
    image: DataNode,
    *arguments: DataNode,
    otherwise: Callable[[DataNode], DataNode] | None = None,
) -> DataNode:
    """Changes the samples for which `predicate`, bool, holds: by `change` of the image and of other nodes, one entry a sample.

    The others are left as they are, or what `otherwise` makes of them; no work is done twice. Both give one type, and make what they give of
    these nodes and of numbers alone.
    """
    # What DALI makes of an `if` in a pipeline function with conditionals.
    branches: Any = fn._conditional  # type: ignore[attr-defined]
    parts = [branches.split(node, predicate=predicate) for node in (image, *arguments)]
    rest = parts[0][1] if otherwise is None else otherwise(parts[0][1])
    return branches.merge(change(*(part[0] for part in parts)), rest, predicate=predicate)


def warp(image: DataNode, maps: DataNode, fill: float, nearest: bool = False) -> DataNode:
    """Resamples uint8 (H, W, 3) by an affine map, float32 (2, 3), one a sample, as `geometry.warp` defines it."""
    kind = types.INTERP_NN if nearest else types.INTERP_LINEAR
    return fn.warp_affine(image, matrix=maps, fill_value=float(fill), interp_type=kind)


def filtered(image: DataNode, kernel: DataNode) -> DataNode:
    """Correlates uint8 (H, W, 3) with a kernel, float32 of odd sides, one a sample and on the image's device; see `colour.filtered`."""
    return _settled("filter")(image, kernel)


def recolour(image: DataNode, colours: DataNode, means: DataNode, device: str = "cpu") -> DataNode:
    """Multiplies each pixel of (H, W, 3) by `colours` and adds the image's mean times `means`, both float32 (3, 3), one a sample.

    Gives float32 (H, W, 3) from 0 to 255, as `colour.recolour` defines it.
    """
    mean = fn.reductions.mean(image, axes=(0, 1), keep_dims=True)
    shift = fn.coord_transform(mean, M=means)
    if device == "cpu":
        shift = fn.reshape(shift, shape=(3,))
        changed = fn.coord_transform(image, M=colours, T=shift, dtype=types.FLOAT)
        return math.min(math.max(changed, 0.0), 255.0)  # which takes 0.7 of the time of a clamp
    return math.clamp(fn.coord_transform(image, M=colours, dtype=types.FLOAT) + shift, 0.0, 255.0)


def scale(image: DataNode, factor: DataNode, from_mean: DataNode, device: str = "cpu") -> DataNode:
    """Multiplies the distance of uint8 (H, W, 3) from a grey level by `factor`, float32, and rounds.

    The level is the image's mean one where `from_mean`, float32, is 1, and 0 where it is 0. Both one a sample, on the CPU.
    """
    mean = fn.reductions.mean(image, axes=(0, 1), keep_dims=True)
    level = fn.coord_transform(mean, M=LUMA.tolist()) * from_mean
    if device == "cpu":
        return fn.brightness_contrast(image, contrast=factor, contrast_center=fn.reshape(level, shape=[]))
    return fn.cast(math.clamp(image * factor + level * (1.0 - factor), 0.0, 255.0), dtype=types.UINT8)


def saturate(image: DataNode, factor: DataNode, device: str = "cpu") -> DataNode:
    """Goes away from each pixel's own grey level by `factor`, float32, one a sample, of uint8 (H, W, 3), and rounds; see `colour.saturation`."""
    grey = [(1.0 - factor) * share for share in LUMA.tolist()]
    if device == "cpu":  # one sum for a pixel's three colours; three of them take three times as long
        weights = fn.reshape(fn.stack(*grey), shape=(1, 3))
        return fn.cast(image * factor + fn.coord_transform(image, M=weights, dtype=types.FLOAT), dtype=types.UINT8)
    colours = [grey[column] + factor if row == column else grey[column] for row in range(3) for column in range(3)]
    return fn.coord_transform(image, M=fn.reshape(fn.stack(*colours), shape=(3, 3)), dtype=types.UINT8)


def tone(image: DataNode, threshold: DataNode, mask: DataNode) -> DataNode:
    """Inverts levels from `threshold`, int32, on, and keeps the bits of `mask`, uint8, one a sample; see `policies.toned`."""
    return (image ^ ((image >= threshold) * np.uint8(255))) & mask


def stretch(image: DataNode, device: str = "cpu") -> DataNode:
    """Autocontrast of uint8 (H, W, 3), see `policies.stretched`."""
    low, high = (reduce(image, axes=(0, 1), keep_dims=True) for reduce in (fn.reductions.min, fn.reductions.max))
    varies = fn.cast(high > low, dtype=types.FLOAT)
    span = (high - low) * varies + (1.0 - varies)
    full = 255.0 * varies + (1.0 - varies)
    if device == "cpu":  # in half of the time
        return fn.cast(fn.normalize(image, mean=low * varies, stddev=span / full, axes=(0, 1)), dtype=types.UINT8)
    return fn.cast(math.clamp((image - low * varies) * (full / span), 0.0, 255.0), dtype=types.UINT8)


def equalize(image: DataNode) -> DataNode:
    """Equalizes the histogram of each channel of uint8 (H, W, 3), see `policies.equalized`."""
    return _settled("equalize")(image)


def erase(image: DataNode, box: DataNode, value: float, memory_format: MemoryFormat = "NCHW") -> DataNode:
    """Sets a rectangle of the image to one value; `box` is float32 (4,), top, left, height and width, one a sample."""
    axes = (1, 2) if memory_format == "NCHW" else (0, 1)
    return fn.erase(image, anchor=box[0:2], shape=box[2:4], axes=axes, fill_value=value)


def _settled(name: str) -> Callable[..., DataNode]:
    """An operator that DALI has called experimental up to 2.3, and since then deprecates by that name."""
    operator: Callable[..., DataNode] = getattr(fn, name, None) or getattr(fn.experimental, name)
    return operator
