"""Changes of shape: the resize, rotation, scale, shift and shear, elastic distortion, a digit's width, and erased rectangles.

Their options, random parameters and numpy definitions; `alexprep.pipeline.dali_ops` has the same over DALI nodes, but for what `resampled` does, which is torch's in
`alexprep.pipeline.resampling`. When each comes is said
in `alexprep.pipeline.augmentation`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alexprep.pipeline.colour import rising
from alexprep.pipeline.random_numbers import AFFINE, ELASTIC, ERASING, Words, below, between, unit
from alexprep.shards.errors import AlexprepError, number_within

Size = int | tuple[int, int]  # the side of a square, or height and width, pixels

_ATTEMPTS = 10  # at a rectangle that fits; torchvision's number
_SPACING, _MARGIN = 1.25, 2.0  # of the coarse grid, and how far it goes beyond the edges, in deviations of the Gaussian
INK = 32  # grey levels from the background, beyond which a pixel belongs to a digit


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True)
class Affine:
    """Rotation, scale, shift and shear about the crop's centre, in one bilinear resampling: the bounds are those of torchvision's RandomAffine.

    Each number is uniform between its bounds. A point of the crop is sheared along the rows, then along the columns, turned, scaled, shifted.

    Attributes:
        rotate: degrees to either side, 0 to 180.
        shift: share of the width and of the height, to either side, 0 to 1.
        zoom: bounds of the factor of size, 1 for none.
        shear: degrees to either side, along the rows and along the columns, below 90.
        fill: grey level of R, G and B where nothing of the crop comes to lie.
        share: of the images that are changed.
    """

    rotate: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    zoom: tuple[float, float] = (1.0, 1.0)
    shear: tuple[float, float] = (0.0, 0.0)
    fill: int = 0
    share: float = 1.0

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        number_within("affine: rotate", self.rotate, 0, 180)
        number_within("affine: fill", self.fill, 0, 255)
        number_within("affine: share", self.share, 0, 1)
        for name, high in (("shift", 1), ("shear", 89)):
            pair = getattr(self, name)
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise AlexprepError(f"affine: {name} {pair!r} is not two numbers: along the rows, along the columns")
            for number in pair:
                number_within(f"affine: {name}", number, 0, high)
        if not rising(self.zoom, 100) or self.zoom[0] < 0.01:
            raise AlexprepError(f"affine: zoom {self.zoom!r} is not two factors, 0.01 <= a <= b <= 100")


@dataclass(frozen=True)
class Elastic:
    """Elastic distortion: each pixel comes from a place moved by a smooth random field (Simard, Steinkraus and Platt, ICDAR 2003).

    There the field is white noise on (-1, 1), one number a pixel and direction, convolved with a Gaussian and multiplied by `alpha`. Here the
    noise is drawn on a grid 1.25 deviations wide and scaled so that the field has the same covariance, to 1 %: of 29 x 29 pixels a tenth of the
    numbers. The displacement's standard deviation is 0.163 alpha / sigma pixels, along the rows and along the columns.

    Attributes:
        sigma: the Gaussian's standard deviation, pixels, 1 to 1,000.
        alpha: bounds of the factor, which is uniform between them. By default those of Ciresan et al. (arXiv 1003.0358, 29 x 29 digits).
    """

    sigma: float = 5.5
    alpha: tuple[float, float] = (36.0, 38.0)

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        number_within("elastic: sigma", self.sigma, 1, 1000)
        if not rising(self.alpha, 1e6):
            raise AlexprepError(f"elastic: alpha {self.alpha!r} is not two factors, 0 < a <= b <= 1,000,000")


@dataclass(frozen=True)
class Erasing:
    """A rectangle of some images set to one value, last of all that is done to an image by itself: torchvision's RandomErasing, its bounds.

    Attributes:
        share: of the images that lose a rectangle.
        area: bounds of the rectangle's share of the image's area, which is uniform between them.
        ratio: bounds of its height / width, drawn log-uniformly.
        value: of the erased pixels, after the mean and the deviations: 0 is the mean.
    """

    share: float = 0.5
    area: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    value: float = 0.0

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        number_within("erasing: share", self.share, 0, 1)
        number_within("erasing: value", self.value, -1e6, 1e6)
        if not rising(self.area, 1):
            raise AlexprepError(f"erasing: area {self.area!r} is not two shares of the area, 0 < a <= b <= 1")
        if not rising(self.ratio, 1e6):
            raise AlexprepError(f"erasing: ratio {self.ratio!r} is not two bounds of height / width, 0 < a <= b")


def draw_affine(affine: Affine, sizes_N2: NDArray[np.int64], words: Words) -> NDArray[np.float64]:
    """What `warp` takes, (N, 2, 3), for crops of these heights and widths; the identity where nothing is changed."""
    first, more = words(AFFINE), words(AFFINE + 1)
    angle = np.radians(between(first[0], -affine.rotate, affine.rotate))
    zoom = between(first[1], *affine.zoom)
    shears = [np.tan(np.radians(between(first[2 + n], -affine.shear[n], affine.shear[n]))) for n in range(2)]
    shift = [between(more[n], -affine.shift[n], affine.shift[n]) * sizes_N2[:, 1 - n] for n in range(2)]
    maps = inverse_maps(sizes_N2, angle, zoom, shears[0], shears[1], shift[0], shift[1])
    maps[unit(more[2]) >= affine.share] = np.eye(2, 3)
    return maps


def inverse_maps(
    sizes_N2: NDArray[np.int64],
    angle_N: NDArray[np.float64],
    zoom_N: NDArray[np.float64],
    along_rows_N: NDArray[np.float64],
    along_columns_N: NDArray[np.float64],
    right_N: NDArray[np.float64],
    down_N: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Where the points of the result come from: (N, 2, 3), from x and y there to x and y in the image, pixels from its top left corner.

    A point is sheared along the rows and then along the columns (tangents), turned clockwise (radians), scaled, all about the centre, and
    shifted (pixels); this is the inverse of it.
    """
    cosine, sine = np.cos(angle_N), np.sin(angle_N)
    one, none = np.ones_like(cosine), np.zeros_like(cosine)

    def matrices(*values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack(values, axis=-1).reshape(-1, 2, 2)

    rows, columns = matrices(one, along_rows_N + none, none, one), matrices(one, none, along_columns_N + none, one)
    turn = matrices(cosine, -sine, sine, cosine) * np.reshape(zoom_N, (-1, 1, 1))
    back = np.linalg.inv(turn @ columns @ rows)
    centre = sizes_N2[:, ::-1] / 2
    start = centre - np.einsum("nij,nj->ni", back, centre + np.stack([right_N, down_N], axis=-1))
    return np.concatenate([back, start[:, :, None]], axis=2)


def reflected_maps(maps_N23: NDArray[np.float64], chosen_N: NDArray[np.bool_], width: int) -> NDArray[np.float64]:
    """Of the chosen maps those that do to an image of this width, reflected left to right, what they do to it as it is, and reflect that."""
    reflection = np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]])
    found = maps_N23.copy()
    found[chosen_N] = reflection[:2, :2] @ found[chosen_N] @ reflection
    found[chosen_N, :, 2] += reflection[:2, 2]
    return found


def warp(image_HWC: NDArray[np.uint8], map_23: NDArray[np.float64], fill: float, nearest: bool) -> NDArray[np.uint8]:
    """Takes each pixel from where `map_23` says: the nearest one there, or the four around it by their distances, rounded.

    Points are the centres of pixels, 0.5 from their corners. Beyond the image all is `fill`.
    """
    height, width = image_HWC.shape[:2]
    rows, columns = np.mgrid[:height, :width] + 0.5
    x, y = (row[0] * columns + row[1] * rows + row[2] for row in map_23)
    padded = np.pad(image_HWC.astype(np.float64), ((1, 1), (1, 1), (0, 0)), constant_values=fill)

    def at(row: NDArray[np.float64], column: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = padded[
            np.clip(row.astype(int) + 1, 0, height + 1), np.clip(column.astype(int) + 1, 0, width + 1)
        ]
        return found

    if nearest:
        return at(np.floor(y), np.floor(x)).astype(np.uint8)
    top, left = np.floor(y - 0.5), np.floor(x - 0.5)
    down, right = (y - 0.5 - top)[..., None], (x - 0.5 - left)[..., None]
    upper = at(top, left) * (1 - right) + at(top, left + 1) * right
    lower = at(top + 1, left) * (1 - right) + at(top + 1, left + 1) * right
    rounded: NDArray[np.uint8] = np.rint(upper * (1 - down) + lower * down).astype(np.uint8)
    return rounded


def draw_elastic(elastic: Elastic, view: tuple[int, int], words: Words) -> NDArray[np.float32]:
    """The coarse noise of each sample, times its alpha: float32 (N, 2, rows, columns); first what moves along the rows of pixels, then down."""
    shape = 2, *(smooth_waves(side, elastic.sigma).shape[1] for side in view)
    count = math.prod(shape)
    alpha = between(words(ELASTIC)[0], *elastic.alpha)
    drawn = words(ELASTIC + 1 + np.arange(-(-count // 4)))  # (4, N, counters)
    noise: NDArray[np.float32] = (
        drawn.transpose(1, 2, 0).reshape(len(alpha), -1)[:, :count].astype(np.float32) * np.float32(2**-31) - 1
    )
    strong: NDArray[np.float32] = noise.reshape(-1, *shape) * alpha.astype(np.float32)[:, None, None, None]
    return strong


@functools.lru_cache(maxsize=64)
def smooth_waves(side: int, sigma: float) -> NDArray[np.float32]:
    """How much each number of the coarse noise moves each pixel of a side: float32 (side, numbers)."""
    spacing = _SPACING * sigma
    count = math.ceil((side + 2 * _MARGIN * sigma) / spacing) + 1
    places = side / 2 + (np.arange(count) - (count - 1) / 2) * spacing
    away = (np.arange(side)[:, None] + 0.5 - places) / sigma
    # The sum over a cell of white noise has a deviation of sqrt(spacing) in each direction.
    waves: NDArray[np.float64] = np.sqrt(spacing) * np.exp(-(away**2) / 2) / (np.sqrt(2 * np.pi) * sigma)
    rounded: NDArray[np.float32] = waves.astype(np.float32)
    return rounded


def digit_map(image_HWC: NDArray[np.uint8], width: int, background: int) -> NDArray[np.float64]:
    """Where points of an image come from whose digit, all that differs from the background, is to be `width` wide, in the middle: (2, 3).

    Heights stay. The identity where nothing differs by more than 32 grey levels in any channel.
    """
    columns = np.flatnonzero((np.abs(image_HWC.astype(int) - background) > INK).any(axis=(0, 2)))
    made = np.eye(2, 3)
    if len(columns):
        left, right = columns[0], columns[-1] + 1
        made[0, 0] = (right - left) / width
        made[0, 2] = (left + right) / 2 - made[0, 0] * image_HWC.shape[1] / 2
    return made


def resampled(
    pixels_HWC: NDArray[np.float64],
    maps: list[NDArray[np.float64]],
    noise_2GG: NDArray[np.float32] | None,
    sigma: float,
    background: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Affine maps and elastic distortion in one bilinear resampling, unrounded; beyond the image all is `background`, (C,).

    A pixel's centre goes through the first map and is moved by the field at that pixel, then through the other maps, (2, 3) each.
    """
    height, width = pixels_HWC.shape[:2]
    down, right = np.mgrid[:height, :width] + 0.5
    places = np.stack([right, down])
    for number, made in enumerate(maps):
        places = np.einsum("ij,jhw->ihw", made[:, :2], places) + made[:, 2, None, None]
        if number == 0 and noise_2GG is not None:
            rows, columns = smooth_waves(height, sigma), smooth_waves(width, sigma)
            places = places + np.einsum("hi,cij,wj->chw", rows, noise_2GG.astype(np.float64), columns)
    x, y = places - 0.5
    left, top = np.floor(x), np.floor(y)
    padded = np.pad(pixels_HWC - background, ((1, 1), (1, 1), (0, 0)))
    total = np.zeros_like(pixels_HWC)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = (1 - np.abs(y - top - row)) * (1 - np.abs(x - left - column))
        i = np.clip(top + row + 1, 0, height + 1).astype(int)
        j = np.clip(left + column + 1, 0, width + 1).astype(int)
        total += weight[..., None] * padded[i, j]
    return total + background


def draw_erased(erasing: Erasing, sizes_N2: NDArray[np.int64], words: Words) -> NDArray[np.int64]:
    """The rectangle of each sample, (N, 4): top, left, height, width; all 0 where nothing is erased.

    torchvision's rule: ten attempts at an area and a ratio that are smaller than the image in height and width, at a uniform place.
    """
    boxes = np.zeros((len(sizes_N2), 4), np.int64)
    open_N = unit(words(ERASING)[0]) < erasing.share
    lowest, highest = (math.log(bound) for bound in erasing.ratio)
    for attempt in range(1, _ATTEMPTS + 1):
        drawn = words(ERASING + attempt)
        area = sizes_N2.prod(axis=1) * between(drawn[0], *erasing.area)
        ratio = np.exp(between(drawn[1], lowest, highest))
        sides = np.rint(np.sqrt(np.stack([area * ratio, area / ratio], axis=1))).astype(np.int64)
        fits = open_N & (sides < sizes_N2).all(axis=1) & (sides > 0).all(axis=1)
        slack = np.maximum(1, sizes_N2 - sides + 1)
        corner = np.stack([below(drawn[2 + n], slack[:, n]) for n in range(2)], axis=1)
        boxes[fits] = np.concatenate([corner, sides], axis=1)[fits]
        open_N &= ~fits
    return boxes


def erased(pixels_HWC: NDArray[np.float64], box_4: NDArray[np.int64], value: float) -> NDArray[np.float64]:
    """The pixels with those of a rectangle at one value."""
    top, left, height, width = box_4.tolist()
    result = pixels_HWC.copy()
    result[top : top + height, left : left + width] = value
    return result


def resize(image_HWC: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Resizes to that size, whatever the proportions, by a triangle filter as wide as an output pixel (antialiased bilinear).

    Beyond an edge its pixels are repeated, as DALI does; Pillow leaves those weights out, which differs near the edges.
    """
    vertical, horizontal = (_triangle(image_HWC.shape[axis], side) for axis, side in enumerate(sides(size)))
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
