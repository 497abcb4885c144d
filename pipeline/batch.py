"""What a `Loader` yields: a batch, and a batch whose pairs are mixed, by mixup or CutMix as `alexprep.pipeline.mixing` defines them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from alexprep.pipeline import mixing
from alexprep.pipeline.augmentation import Draws
from alexprep.pipeline.device import moved

_BLOCK = 2**15  # numbers of a pair that are mixed at once: small enough for a core's own cache


class Batch(NamedTuple):
    """A rank's part of one step: images and labels on the loader's device, and rows of the split's index on the CPU, int64 (N,).

    Images are (N, 3, H, W) or (N, H, W, 3), with views "two" or "ten" (N, 2, …) or (N, 10, …): grey levels about 0, or what the augmentation's `std` makes
    of them. Labels are int64 (N,).
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor

    @property
    def partner_labels(self) -> torch.Tensor | None:
        """None: nothing is mixed. See `MixedBatch`."""
        return None

    @property
    def weights(self) -> torch.Tensor | None:
        """None: nothing is mixed. See `MixedBatch`."""
        return None


class MixedBatch(NamedTuple):
    """A batch whose pairs are mixed, which a loader with `Augmentation.mixing` gives: of five tensors, so that nobody takes it for a `Batch`.

    The loss of a sample is weight · loss(label) + (1 - weight) · loss(partner's label). Partner labels are int64 (N,), weights float32 (N,), both
    on the loader's device; a sample without a partner has its own label there. All else is as in `Batch`.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    partner_labels: torch.Tensor
    weights: torch.Tensor


def mixed_batch(batch: Batch, draws: Draws, memory_format: str) -> MixedBatch:
    """Mixes the pairs of a batch, as `alexprep.pipeline.mixing.mixed` defines it; a CPU's images in their own memory."""
    images, labels, indices = batch
    if not len(labels):
        return MixedBatch(images, labels, indices, labels, torch.empty(0, device=labels.device))
    if not images.is_contiguous() and not images.movedim(1, -1).is_contiguous():
        images = images.contiguous()
    partner_N, weight_N, exchanged_N4 = (
        mixing.partners(draws.more["pair"]),
        draws.more["weight"],
        draws.more["exchanged"],
    )
    partner, weights = (moved(torch.from_numpy(values), labels.device) for values in (partner_N, weight_N))
    pixels = images if memory_format != "NHWC" else images.movedim(-1, 1)  # (N, 3, H, W), wherever they lie
    if images.device.type == "cuda":  # few calls for all pairs
        pairs = zip(weight_N, exchanged_N4, strict=True)
        shares = zip(*(mixing.shares(*pair, *pixels.shape[2:]) for pair in pairs), strict=True)
        rows, columns = (moved(torch.from_numpy(np.stack(part)).to(images.dtype), images.device) for part in shares)
        pixels += (pixels[partner] - pixels) * (rows[:, None, :, None] * columns[:, None, None])
    else:  # few bytes: one pair after the other, by numpy, for torch's threads would wait for one another at each
        values = pixels.numpy()
        flat = (images if images.is_contiguous() else images.movedim(1, -1)).view(len(labels), -1).numpy()
        room = np.empty(_BLOCK, flat.dtype)
        for n in np.flatnonzero(partner_N > np.arange(len(partner_N))).tolist():
            top, left, height, width = exchanged_N4[n].tolist()
            if height and width:
                _exchange(*values[n : n + 2, :, top : top + height, left : left + width])
            elif weight_N[n] < 1:
                _mix(flat[n], flat[n + 1], 1 - float(weight_N[n]), room)
    return MixedBatch(images, labels, indices, labels[partner], weights.float())


def _exchange(one: NDArray[Any], other: NDArray[Any]) -> None:
    """Exchanges pixels in their own memory."""
    kept = one.copy()
    one[...], other[...] = other, kept


def _mix(one: NDArray[Any], other: NDArray[Any], share: float, room: NDArray[Any]) -> None:
    """Gives each of two rows of numbers so much of the other, in their own memory, a block at a time: `room`."""
    for start in range(0, len(one), len(room)):
        mine, theirs = (row[start : start + len(room)] for row in (one, other))
        difference = np.subtract(theirs, mine, out=room[: len(mine)])
        difference *= share
        mine += difference
        theirs -= difference
