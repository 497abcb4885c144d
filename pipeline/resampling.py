"""What is done by torch behind DALI: all warps of an image in one resampling (affine maps, elastic distortion, a digit's width), and fewer channels.

The definition in numpy is `alexprep.pipeline.geometry.resampled`. DALI has no warp by a field on the CPU, so a loader's graph leaves such
images as bytes, and this comes after it. Each image is computed by itself, with sums in one order: it is the same to the last bit in
any batch, by any number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from alexprep.pipeline.augmentation import Augmentation, Draws, channel_means, channel_stdevs
from alexprep.pipeline.dali_graph import Graph
from alexprep.pipeline.device import moved
from alexprep.pipeline.geometry import INK, smooth_waves
from alexprep.shards.rgb_statistics import Statistics


def finished(made: torch.Tensor, draws: Draws, graph: Graph) -> torch.Tensor:
    """What a graph made of samples, to their views as they are wanted: (N, channels, H, W), or (N, H, W, channels) for "NHWC"."""
    channels_last = graph.memory_format != "NCHW"
    if graph.resamples:
        views = resampled_views(made, draws, graph.augmentation, graph.statistics).to(getattr(torch, graph.dtype))
        if channels_last:
            views = views.contiguous(memory_format=torch.channels_last)
        return views.movedim(1, -1) if graph.memory_format == "NHWC" else views
    channels = graph.augmentation.channels
    if channels < 3:
        axis = -1 if channels_last else -3
        red, green, blue = (made.narrow(axis, n, 1) for n in range(3))
        made = (red + green + blue) / 3 if channels == 1 else torch.cat([red, green], dim=axis)
    return made.movedim(-1, -3) if graph.memory_format == "channels_last" else made


def resampled_views(
    images_NHWC: torch.Tensor, draws: Draws, augmentation: Augmentation, statistics: Statistics | None
) -> torch.Tensor:
    """Windows as bytes, uint8 (N, H, W, 3), to what the network sees of them: float32 (N, channels, H, W), on the same device."""
    device, background = images_NHWC.device, float(augmentation.background)
    pixels = images_NHWC.movedim(3, 1)
    places = _places(pixels, draws, augmentation)
    means, stdevs = (
        of(statistics, augmentation).astype(np.float32)[:, None, None] for of in (channel_means, channel_stdevs)
    )
    # Beyond the image grid_sample has zeros, so the background is subtracted before and what it comes to is added afterwards.
    seen, outside = pixels.float() - background, (background - means) / stdevs
    if augmentation.channels == 1:
        red, green, blue = (seen[:, n : n + 1] / float(stdevs[n, 0, 0]) for n in range(3))
        seen, outside = (red + green + blue) / 3, outside.mean(axis=0, keepdims=True)
    else:
        kept = augmentation.channels
        seen, outside = seen[:, :kept] / _on(device, stdevs[:kept]), outside[:kept]
    views = F.grid_sample(seen, places, mode="bilinear", padding_mode="zeros", align_corners=False)
    mirrored = torch.from_numpy(draws.mirror_N)
    if mirrored.any():
        views = torch.where(moved(mirrored, device)[:, None, None, None], views.flip(3), views)
    return views + _on(device, outside) if outside.any() else views


def _places(pixels_NCHW: torch.Tensor, draws: Draws, augmentation: Augmentation) -> torch.Tensor:
    """Where each pixel comes from: float32 (N, H, W, 2), x and y, -1 to 1 from edge to edge."""
    device = pixels_NCHW.device
    count, _, height, width = pixels_NCHW.shape
    maps = draws.more["affine"] if "affine" in draws.more else np.broadcast_to(np.eye(2, 3), (count, 2, 3))
    right, down = np.arange(width) + 0.5, np.arange(height) + 0.5
    # An affine map is the sum of what a column and what a row add to it.
    of_column, of_row = maps[:, :, :1] * right, maps[:, :, 1:2] * down + maps[:, :, 2:]  # (N, 2, W), (N, 2, H)
    places = _on(device, of_column.astype(np.float32))[:, :, None] + _on(device, of_row.astype(np.float32))[..., None]
    if "elastic" in draws.more and augmentation.elastic is not None:
        _add_field(places, _on(device, draws.more["elastic"]), augmentation.elastic.sigma)
    if augmentation.normalised_width is not None:
        _widen(places[:, 0], pixels_NCHW, augmentation.normalised_width, augmentation.background)
    sizes = torch.tensor([width, height], device=device).view(2, 1, 1)
    return places.mul_(2 / sizes).sub_(1).movedim(1, 3)


def _add_field(places: torch.Tensor, noise: torch.Tensor, sigma: float) -> None:
    """Adds the displacements that coarse noise (N, 2, rows, columns) makes to places (N, 2, H, W), pixels.

    Not by matrix products, whose sums come in an order that depends on the batch.
    """
    rows, columns = (_on(noise.device, smooth_waves(side, sigma)) for side in places.shape[2:])
    along = noise[..., :1] * columns[:, 0]
    for n in range(1, columns.shape[1]):
        along.addcmul_(noise[..., n : n + 1], columns[:, n])
    for n in range(rows.shape[1]):
        places.addcmul_(along[:, :, n : n + 1], rows[:, n, None])


def _widen(x: torch.Tensor, pixels_NCHW: torch.Tensor, wanted: int, background: int) -> None:
    """Changes columns of digits that are `wanted` wide, in the middle, to columns of the images: `alexprep.pipeline.geometry.digit_map`."""
    width = pixels_NCHW.shape[3]
    ink = ((pixels_NCHW.int() - background).abs() > INK).any(dim=1).any(dim=1).int()  # (N, W)
    left, right = ink.argmax(dim=1), width - ink.flip(1).argmax(dim=1)
    empty = ink.sum(dim=1) == 0
    factor = ((right - left) / wanted).masked_fill(empty, 1.0)
    start = ((left + right) / 2 - factor * (width / 2)).masked_fill(empty, 0.0)
    x.mul_(factor[:, None, None]).add_(start[:, None, None])


def _on(device: torch.device, values: NDArray[np.float32]) -> torch.Tensor:
    return moved(torch.from_numpy(np.ascontiguousarray(values)), device)
