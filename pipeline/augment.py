"""The four deeds in numpy: crop, subtract the mean, mirror, add colour noise. This is their definition; the DALI graph must
equal it. Images are RGB, rows first, on the 0-255 scale; results are not clipped.

Names end in their axes: N samples, H rows, W columns, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from alexprep.pipeline.draws import Draws
from alexprep.shards.errors import AlexprepError
from alexprep.shards.stats import Statistics


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image. The defaults are the paper's.

    Attributes:
        crop: side of the square that the network sees, pixels; 224 in the paper (section 4.1).
        mirror: whether half of the crops are reflected left to right.
        mean: what is subtracted. "crop": the mean image at the crop's own window (the paper, section 2: from each pixel);
            "centre": always the mean image's centre window, after the reflection (the 2012 code); "channel": the three
            channel means; "none".
        noise: how large the colour noise along each principal axis is, for α ~ N(0, noise_sigma²). "eigenvalue": α λ with
            λ the eigenvalue on the 0-1 scale, times 255 (the paper's formula, section 4.1); "stdev": α √λ on the 0-255
            scale (the 2012 code, whose further division of the image by 1.1 is not done); "none".
        noise_sigma: 0.1 in the paper.
    """

    crop: int = 224
    mirror: bool = True
    mean: Literal["crop", "centre", "channel", "none"] = "crop"
    noise: Literal["eigenvalue", "stdev", "none"] = "eigenvalue"
    noise_sigma: float = 0.1

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        if self.crop < 1:
            raise AlexprepError(f"crop {self.crop} is less than 1 pixel")
        if self.mean not in ("crop", "centre", "channel", "none"):
            raise AlexprepError(f"mean {self.mean!r} is not one of crop, centre, channel, none")
        if self.noise not in ("eigenvalue", "stdev", "none"):
            raise AlexprepError(f"noise {self.noise!r} is not one of eigenvalue, stdev, none")
        if not 0 <= self.noise_sigma < 1e6:
            raise AlexprepError(f"noise_sigma {self.noise_sigma} is not a number from 0 on")

    @property
    def needs_statistics(self) -> bool:
        """Whether the mean image, channel means or eigenpairs are used."""
        return self.mean != "none" or self.noise != "none"


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


def crop(image_HWC: NDArray[np.uint8], top: int, left: int, side: int) -> NDArray[np.uint8]:
    """A square of `side` pixels."""
    return image_HWC[top : top + side, left : left + side]


def subtract_mean(crop_HWC: NDArray[np.float64], mean_HWC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Subtracts what was prepared for this crop: an image of its size, or three numbers."""
    return crop_HWC - mean_HWC


def reflect(crop_HWC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Left becomes right."""
    return crop_HWC[:, ::-1]


def add_noise(crop_HWC: NDArray[np.float64], shift_3: NDArray[np.float64]) -> NDArray[np.float64]:
    """Adds one shift to all pixels."""
    return crop_HWC + shift_3


def augment(
    image_HWC: NDArray[np.uint8],
    draws: Draws,
    n: int,
    augmentation: Augmentation,
    statistics: Statistics | None,
) -> NDArray[np.float64]:
    """What becomes of one image.

    Args:
        image_HWC: uint8 (S, S, 3).
        draws: of a batch.
        n: which of the batch's samples this is.
        augmentation: what is done.
        statistics: of the data set; None where `augmentation.needs_statistics` is false.

    Returns:
        float64 (crop, crop, 3), grey levels about 0.
    """
    side = augmentation.crop
    top, left = draws.offsets_N2[n].tolist()
    image: NDArray[np.float64] = crop(image_HWC, top, left, side).astype(np.float64)
    if statistics is not None and augmentation.mean == "crop":
        image = subtract_mean(image, statistics.mean_HWC[top : top + side, left : left + side])
    if draws.mirror_N[n] and augmentation.mirror:
        image = reflect(image)
    if statistics is not None and augmentation.mean == "centre":
        middle = (len(image_HWC) - side) // 2
        image = subtract_mean(image, statistics.mean_HWC[middle : middle + side, middle : middle + side])
    if statistics is not None and augmentation.mean == "channel":
        image = subtract_mean(image, statistics.channel_means)
    if statistics is not None:
        image = add_noise(image, colour_shifts(draws.alpha_N3[n : n + 1], statistics, augmentation)[0])
    return image


def ten_views(slack: int) -> list[tuple[int, int, bool]]:
    """(top, left, mirrored) of the ten test views (paper, section 4.1): four corners and the centre, then their reflections.

    The order is the 2012 code's.

    >>> ten_views(32)[:5]
    [(0, 0, False), (0, 32, False), (16, 16, False), (32, 0, False), (32, 32, False)]
    """
    middle = slack // 2
    corners = [(0, 0), (0, slack), (middle, middle), (slack, 0), (slack, slack)]
    return [(top, left, mirrored) for mirrored in (False, True) for top, left in corners]
