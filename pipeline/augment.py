"""The deeds in numpy: crop, resize, subtract the mean, mirror, add colour noise, divide. This is their definition; the DALI graph must
equal it. Images are RGB, rows first, on the 0-255 scale; results are not clipped.

Names end in their axes: N samples, H rows, W columns, C channels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alexprep.pipeline.augmentation import IMAGENET_MEAN, IMAGENET_STD, Augmentation
from alexprep.pipeline.draws import Draws
from alexprep.shards.rgb_statistics import Statistics


def noise_stdevs(statistics: Statistics, augmentation: Augmentation) -> NDArray[np.float64]:
    """The colour noise's standard deviation along each principal axis: float64 (3,), grey levels."""
    if augmentation.noise == "none":
        return np.zeros(3)
    if augmentation.noise == "stdev":
        return augmentation.noise_sigma * statistics.stdevs
    return augmentation.noise_sigma * (statistics.eigenvalues / 255**2) * 255


def colour_shifts(
    alpha_N3: NDArray[np.float64], statistics: Statistics, augmentation: Augmentation
) -> NDArray[np.float64]:
    """The shift of each sample's RGB: float64 (N, 3), grey levels. One for all pixels of an image (paper, section 4.1)."""
    return (alpha_N3 * noise_stdevs(statistics, augmentation)) @ statistics.eigenvectors.T


def channel_means(statistics: Statistics | None, augmentation: Augmentation) -> NDArray[np.float64]:
    """What is subtracted from all pixels of R, G and B: float64 (3,), grey levels; 0 where a window of the mean image is."""
    if augmentation.mean == "channel" and statistics is not None:
        return statistics.channel_means
    return np.array(IMAGENET_MEAN) if augmentation.mean == "imagenet" else np.zeros(3)


def channel_stdevs(statistics: Statistics | None, augmentation: Augmentation) -> NDArray[np.float64]:
    """What R, G and B are divided by: float64 (3,), grey levels."""
    if augmentation.std == "channel" and statistics is not None:
        return statistics.channel_stdevs
    return np.array(IMAGENET_STD) if augmentation.std == "imagenet" else np.ones(3)


def mean_corners(augmentation: Augmentation, windows_N4: NDArray[np.integer], mean_side: int) -> NDArray[np.int64]:
    """Top row and left column of the mean image's windows that belong to crops' windows: int64 (N, 2)."""
    if augmentation.mean == "crop":
        return windows_N4[:, :2].astype(np.int64)
    return (mean_side - windows_N4[:, 2:].astype(np.int64)) // 2


def cut(image_HWC: NDArray[np.uint8], window_4: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The pixels of (top, left, height, width)."""
    top, left, height, width = window_4.tolist()
    return image_HWC[top : top + height, left : left + width]


def resize(image_HWC: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Resizes to a square of `side` pixels, by a triangle filter as wide as an output pixel (antialiased bilinear).

    Beyond an edge its pixels are repeated, as DALI does; Pillow leaves those weights out, which differs near the edges.
    """
    vertical, horizontal = (_triangle(image_HWC.shape[axis], side) for axis in (0, 1))
    exact = np.einsum("ih,hwc,jw->ijc", vertical, image_HWC.astype(np.float64), horizontal, optimize=True)
    rounded: NDArray[np.uint8] = np.clip(np.rint(exact), 0, 255).astype(np.uint8)
    return rounded


def _triangle(source: int, target: int) -> NDArray[np.float64]:
    """The filter's weights: float64 (target, source), rows of sum 1."""
    ratio = source / target
    radius = max(ratio, 1.0)
    weights = np.zeros((target, source))
    for n in range(target):
        centre = (n + 0.5) * ratio
        pixels = np.arange(np.floor(centre - radius), np.ceil(centre + radius) + 1)
        taps = np.maximum(0.0, 1.0 - np.abs(pixels + 0.5 - centre) / radius)
        np.add.at(weights[n], np.clip(pixels.astype(int), 0, source - 1), taps / taps.sum())
    return weights


def view(
    image_HWC: NDArray[np.uint8],
    window_4: NDArray[np.int64],
    mirrored: bool,
    shift_3: NDArray[np.float64],
    augmentation: Augmentation,
    statistics: Statistics | None,
    noisy: bool = False,
) -> NDArray[np.float64]:
    """One view of an image.

    Args:
        image_HWC: uint8 (H, W, 3).
        window_4: top, left, height, width.
        mirrored: whether left becomes right.
        shift_3: the colour noise, grey levels.
        augmentation: what is done.
        statistics: of the data set; None where `augmentation.needs_statistics` is false.
        noisy: whether this epoch has noise, and so the division that goes with it.

    Returns:
        float64 (crop, crop, 3), grey levels about 0, or what `std` makes of them.
    """
    image = cut(image_HWC, window_4)
    if augmentation.scale is not None and augmentation.crop is not None:
        image = resize(image, augmentation.crop)
    pixels: NDArray[np.float64] = image.astype(np.float64) - channel_means(statistics, augmentation)
    mean_window: NDArray[np.float64] | None = None
    if augmentation.windowed_mean and statistics is not None:
        top, left = mean_corners(augmentation, window_4[None], len(statistics.mean_HWC))[0].tolist()
        mean_window = statistics.mean_HWC[top : top + len(pixels), left : left + pixels.shape[1]]
    if mean_window is not None and augmentation.mean == "crop":
        pixels = pixels - mean_window
    if mirrored:
        pixels = pixels[:, ::-1]
    if mean_window is not None and augmentation.mean == "centre":  # the 2012 code subtracts after the reflection
        pixels = pixels - mean_window
    pixels = (pixels + shift_3) / channel_stdevs(statistics, augmentation)
    return pixels / augmentation.noise_rescale if noisy else pixels


def augment(
    image_HWC: NDArray[np.uint8],
    draws: Draws,
    n: int,
    augmentation: Augmentation,
    statistics: Statistics | None,
    epoch: int = 0,
) -> NDArray[np.float64]:
    """What becomes of one image in training: `view` of what was drawn for sample `n` of a batch."""
    noisy = augmentation.noisy(epoch)
    shift = np.zeros(3)
    if noisy and statistics is not None:
        shift = colour_shifts(draws.alpha_N3[n : n + 1], statistics, augmentation)[0]
    return view(image_HWC, draws.windows_N4[n], bool(draws.mirror_N[n]), shift, augmentation, statistics, noisy)
