"""Changes of colour and sharpness: jitter, grey scale, Gaussian blur; their options, random parameters and numpy definitions.

`alexprep.pipeline.dali_ops` has the same over DALI nodes. When each comes is said in `alexprep.pipeline.augmentation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexprep.pipeline.random_numbers import BLUR, JITTER, Words, between, unit
from alexprep.shards.errors import AlexprepError, number_within

# Of R, G and B in a grey level: ITU-R BT.601, as Pillow and torchvision have it.
LUMA = np.array([0.299, 0.587, 0.114])
# YIQ: that grey level, and two coordinates of the colour, which are 0 for greys (FCC, 1953). Hue is the angle between these.
_YIQ = np.stack([LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])


@dataclass(frozen=True)
class Jitter:
    """Changes of brightness, contrast, saturation and hue: torchvision's ColorJitter, with its bounds.

    Each factor is uniform on [max(0, 1 - b), 1 + b], the hue's turn on [-hue, hue] of a whole turn. The four are linear in the pixels
    (contrast: also in their mean), so they are one linear map, and only its result is clamped to 0-255, and not rounded. torchvision
    rounds and clamps after each, in an order that it draws; but for that, the order changes nothing. Hue turns about the grey axis, which
    keeps grey levels; torchvision's turn in HSV does not.

    Attributes:
        brightness: times so much, b above.
        contrast: away from the image's mean grey level, b above.
        saturation: away from the pixel's own grey level, b above.
        hue: 0 to 0.5 of a turn.
        share: of the images that are changed; 0.8 in SimCLR.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    share: float = 1.0

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        for name, high in (("brightness", 10), ("contrast", 10), ("saturation", 10), ("hue", 0.5), ("share", 1)):
            number_within(f"jitter: {name}", getattr(self, name), 0, high)


@dataclass(frozen=True)
class Blur:
    """A Gaussian blur of some images; by default SimCLR's (appendix A).

    Attributes:
        sigma: bounds of the standard deviation, pixels, which is uniform between them.
        share: of the images that are blurred.
    """

    sigma: tuple[float, float] = (0.1, 2.0)
    share: float = 0.5

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        number_within("blur: share", self.share, 0, 1)
        if not rising(self.sigma, 100):
            raise AlexprepError(f"blur: sigma {self.sigma!r} is not two standard deviations, 0 < a <= b <= 100 pixels")


def rising(pair: Any, high: float) -> bool:
    """Whether a value is a pair of numbers 0 < a <= b <= high."""
    numbers = isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(n, int | float) for n in pair)
    return numbers and 0 < pair[0] <= pair[1] <= high


def draw_recolouring(jitter: Jitter | None, grey: float, words: Words) -> NDArray[np.float64]:
    """What `recolour` takes, (N, 3, 6), of samples with these random words; `grey` is the share of images without colour."""
    drawn, chance = words(JITTER), words(JITTER + 1)
    count = drawn.shape[1]
    found = np.tile(np.concatenate([np.eye(3), np.zeros((3, 3))], axis=1), (count, 1, 1))
    if jitter is not None:
        amounts = (jitter.brightness, jitter.contrast, jitter.saturation)
        light, contrast, vivid = (between(drawn[n], max(0.0, 1 - most), 1 + most) for n, most in enumerate(amounts))
        adjusted = recolouring(light, contrast, vivid, between(drawn[3], -jitter.hue, jitter.hue))
        found = np.where((unit(chance[0]) < jitter.share)[:, None, None], adjusted, found)
    greyed = (unit(chance[1]) < grey)[:, None, None]
    return np.where(greyed, np.einsum("c,ncm->nm", LUMA, found)[:, None], found)


def recolouring(
    brightness_N: NDArray[np.float64],
    contrast_N: NDArray[np.float64],
    saturation_N: NDArray[np.float64],
    hue_N: NDArray[np.float64],
) -> NDArray[np.float64]:
    """What `recolour` takes of three factors and the hue's turn, in whole turns: (N, 3, 6).

    The order does not matter: contrast, saturation and hue keep grey levels or their mean, and brightness multiplies all alike.
    """
    brightness, contrast = brightness_N[:, None, None], contrast_N[:, None, None]
    pixels = brightness * contrast * (_hue_turn(hue_N) @ saturation(saturation_N))
    return np.concatenate([pixels, brightness * (1 - contrast) * np.tile(LUMA, (3, 1))], axis=2)


def recolour(image_HWC: NDArray[Any], recolouring_36: NDArray[np.float64]) -> NDArray[np.float64]:
    """Multiplies each pixel by the first three columns, adds the image's mean times the last three, and clamps to 0-255.

    Gives float64 (H, W, 3), not rounded.
    """
    pixels = image_HWC.astype(np.float64)
    shift = recolouring_36[:, 3:] @ pixels.mean(axis=(0, 1))
    clamped: NDArray[np.float64] = np.clip(pixels @ recolouring_36[:, :3].T + shift, 0, 255)
    return clamped


def draw_sigmas(blur: Blur, words: Words) -> NDArray[np.float64]:
    """The standard deviation of each sample's blur, pixels, (N,); 0 where it is not blurred."""
    drawn = words(BLUR)
    return np.where(unit(drawn[0]) < blur.share, between(drawn[1], *blur.sigma), 0.0)


def gaussian(sigma: float) -> NDArray[np.float64]:
    """The weights of a blur, of sum 1, as far as three standard deviations to either side; a single 1 for 0."""
    if sigma == 0:
        return np.ones(1)
    radius = int(np.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return np.asarray(weights / weights.sum())


def blurred(image_HWC: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    """Blurs down the columns, then along the rows, each rounded to whole grey levels; the image goes on reflected beyond its edges."""
    for axis in (0, 1):
        image_HWC = filtered(image_HWC, np.expand_dims(gaussian(sigma), 1 - axis))
    return image_HWC


def filtered(image_HWC: NDArray[np.uint8], kernel: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Correlates with a kernel of odd sides, and rounds; beyond an edge pixels are reflected, the one at the edge not twice."""
    height, width = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded: NDArray[np.float64] = np.pad(
        image_HWC.astype(np.float64), ((height, height), (width, width), (0, 0)), "reflect"
    )
    found = np.zeros(image_HWC.shape)
    rows, columns = image_HWC.shape[:2]
    for row, column in np.ndindex(*kernel.shape):
        found += kernel[row, column] * padded[row : row + rows, column : column + columns]
    rounded: NDArray[np.uint8] = np.clip(np.rint(found), 0, 255).astype(np.uint8)
    return rounded


def saturation(factors_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """The map of colours (N, 3, 3) that goes away from each pixel's own grey level by a factor."""
    factors = factors_N[:, None, None]
    mixed: NDArray[np.float64] = factors * np.eye(3) + (1 - factors) * np.tile(LUMA, (3, 1))
    return mixed


def _hue_turn(turns_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """The map of colours (N, 3, 3) that turns them about the grey axis, from red to yellow to green."""
    cosine, sine = np.cos(2 * np.pi * turns_N), np.sin(2 * np.pi * turns_N)
    rotation = np.tile(np.eye(3), (len(turns_N), 1, 1))
    rotation[:, 1, 1] = rotation[:, 2, 2] = cosine
    rotation[:, 1, 2], rotation[:, 2, 1] = sine, -sine
    return np.asarray(np.linalg.inv(_YIQ) @ rotation @ _YIQ)
