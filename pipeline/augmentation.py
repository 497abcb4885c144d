"""Defines the augmentations: their options and presets, the random parameters of a sample, and the operations in numpy.

The DALI graph (`alexprep.pipeline.dali_ops`, `alexprep.pipeline.dali_graph`) must give what `augment` gives. This module decodes nothing and
imports neither DALI nor torch: the order of samples is `alexprep.pipeline.sampler`'s, reading them `alexprep.pipeline.loader`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError, number_within, one_of, whole_number

if TYPE_CHECKING:
    from alexprep.shards.rgb_statistics import Statistics

Mean = Literal["crop", "centre", "channel", "imagenet", "none"]
Std = Literal["channel", "imagenet", "none"]
Noise = Literal["eigenvalue", "stdev", "none"]

# What torchvision's pretrained networks were trained with, there on the 0-1 scale (0.485 0.456 0.406, 0.229 0.224 0.225).
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image: cut a window (and resize it), subtract the mean, mirror, add the colour noise, divide.

    The defaults are the paper's.

    Attributes:
        crop: side of the square that the network sees, pixels; 224 in the paper (section 4.1). None: the whole image.
        scale: None cuts the square as it is. Two numbers a <= b in (0, 1] cut a window whose share of the image's area is drawn
            from [a, b], and resize it: torchvision's RandomResizedCrop, whose default is (0.08, 1).
        ratio: bounds of that window's width / height, drawn log-uniformly.
        evaluation_scale: with `scale`, how much of the shorter side the centre view shows; 224 / 256 is usual.
        mirror: whether half of the crops are reflected left to right.
        share: how many neighbours in the epoch's order share one draw of corner and mirror: 1 in the paper, 32 in the 2012
            code.
        mean: what is subtracted. "crop": the mean image at the crop's own window (the paper, section 2: from each pixel);
            "centre": always the mean image's centre window, after the reflection (the 2012 code); "channel": the dataset's
            three channel means; "imagenet": `IMAGENET_MEAN`; "none".
        std: what is divided by: "channel", the dataset's three channel standard deviations; "imagenet": `IMAGENET_STD`; "none".
        noise: how large the colour noise along each principal axis is, for α ~ N(0, noise_sigma²). "eigenvalue": α λ with
            λ the eigenvalue on the 0-1 scale, times 255 (the paper's formula, section 4.1); "stdev": α √λ on the 0-255
            scale (the 2012 code); "none".
        noise_sigma: 0.1 in the paper.
        noise_rescale: images with noise are divided by this: 1.1 in the 2012 code, where the noise made them larger.
        noise_epochs: noise, and the division that goes with it, end after so many epochs; None for never. 67 in the 2012 code.
    """

    crop: int | None = 224
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    evaluation_scale: float = 0.875
    mirror: bool = True
    share: int = 1
    mean: Mean = "crop"
    std: Std = "none"
    noise: Noise = "eigenvalue"
    noise_sigma: float = 0.1
    noise_rescale: float = 1.0
    noise_epochs: int | None = None

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        for name, choices in (("mean", Mean), ("std", Std), ("noise", Noise)):
            one_of(name, getattr(self, name), get_args(choices))
        for name, low, high in (("crop", 1, 65535), ("share", 1, 2**31 - 1), ("noise_epochs", 0, 2**32 - 1)):
            if getattr(self, name) is not None or name == "share":
                whole_number(name, getattr(self, name), low, high)
        number_within("noise_sigma", self.noise_sigma, 0, 1e6)
        number_within("noise_rescale", self.noise_rescale, 1e-3, 1e3)
        number_within("evaluation_scale", self.evaluation_scale, 1e-3, 1)
        if not isinstance(self.mirror, bool):
            raise AlexprepError(f"mirror {self.mirror!r} is not True or False")
        if self.scale is not None and not _rising(self.scale, 1):
            raise AlexprepError(f"scale {self.scale} is not two shares of the area, 0 < a <= b <= 1")
        if not _rising(self.ratio, 1e6):
            raise AlexprepError(f"ratio {self.ratio} is not two bounds of width / height, 0 < a <= b <= 1,000,000")
        if self.crop is None and (self.scale is not None or self.windowed_mean):
            raise AlexprepError("scale, and mean crop or centre, need a crop: the side of the square that comes out")
        if self.scale is not None and self.windowed_mean:
            raise AlexprepError(
                f"mean {self.mean!r} belongs to crops that are not resized: with scale, use channel, imagenet or none"
            )

    @property
    def windowed_mean(self) -> bool:
        """Whether a window of the mean image is subtracted."""
        return self.mean in ("crop", "centre")

    @property
    def fixed_windows(self) -> bool:
        """Whether all windows have one height and width, the crop's, whatever is drawn and however large the images are."""
        return self.crop is not None and self.scale is None

    @property
    def needs_statistics(self) -> bool:
        """Whether the dataset's mean image, channel moments or eigenpairs are used."""
        return self.windowed_mean or "channel" in (self.mean, self.std) or self.noise != "none"

    @property
    def keeps_bytes(self) -> bool:
        """Whether pixels stay whole numbers from 0 to 255."""
        return (self.mean, self.std, self.noise) == ("none", "none", "none")

    def noisy(self, epoch: int) -> bool:
        """Whether an epoch has colour noise."""
        return self.noise != "none" and (self.noise_epochs is None or epoch < self.noise_epochs)


def _rising(pair: Any, high: float) -> bool:
    numbers = isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(n, int | float) for n in pair)
    return numbers and 0 < pair[0] <= pair[1] <= high


PRESETS = {
    "paper": Augmentation(),
    "2012-code": Augmentation(share=32, mean="centre", noise="stdev", noise_rescale=1.1, noise_epochs=67),
    "resized": Augmentation(scale=(0.08, 1.0), mean="imagenet", std="imagenet", noise="none"),
    "none": Augmentation(crop=None, mirror=False, mean="none", noise="none"),
}


def augmentation_named(name: str) -> Augmentation:
    """One of `PRESETS`: "paper"; "2012-code", the released code's; "resized", usual for later networks; "none", whole images."""
    one_of("augmentation", name, PRESETS)
    return PRESETS[name]


@dataclass(frozen=True)
class Draws:
    """The random parameters of N samples.

    Attributes:
        windows_N4: int64 (N, 4), what is cut out of each image: top row, left column, height, width, pixels.
        mirror_N: bool (N,), whether the crop is reflected left to right.
        alpha_N3: float64 (N, 3), standard normal, one for each principal axis.
    """

    windows_N4: NDArray[np.int64]
    mirror_N: NDArray[np.bool_]
    alpha_N3: NDArray[np.float64]

    def only(self, chosen: NDArray[np.bool_] | list[int]) -> Draws:
        """Those of some samples, in the order in which they are chosen."""
        return Draws(self.windows_N4[chosen], self.mirror_N[chosen], self.alpha_N3[chosen])


def draw(
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    rows_N: NDArray[np.int64],
    sizes_N2: NDArray[np.integer],
    positions_N: NDArray[np.int64] | None = None,
) -> Draws:
    """Draws the random parameters of samples: a pure function of (seed, epoch, row), whoever computes it and with which others.

    A crop's corner is uniform over all positions: 33 x 33 for 224 of 256 pixels, as in the 2012 code (section 4.1 of the paper
    says "2048 x", for 32 x 32 x 2).

    Args:
        augmentation: what is drawn, and within which bounds.
        seed: of the run, 0 to 2**63 - 1.
        epoch: 0 to 2**32 - 1.
        rows_N: int64 (N,), the samples' rows.
        sizes_N2: integer (N, 2), their images' heights and widths, pixels, at least the crop's where nothing is resized.
        positions_N: int64 (N,), their places in the epoch's order; needed with `augmentation.share`.

    Returns:
        The parameters, in the order of `rows_N`. Corners and mirrors are exact on any machine; normals, and the windows of
        `augmentation.scale`, depend on the platform's log, exp and cos in their last bit.

    Raises AlexprepError where `augmentation.share` is above 1 and there are no positions.
    """
    keys = rows = np.asarray(rows_N, np.int64)
    if augmentation.share > 1:
        if positions_N is None:
            raise AlexprepError(f"share {augmentation.share} needs the places in the epoch's order: give positions_N")
        keys = np.asarray(positions_N, np.int64) // augmentation.share
    geometry = _words(seed, epoch, keys, _GEOMETRY if augmentation.share == 1 else _SHARED)
    sizes = np.asarray(sizes_N2, np.int64)
    if augmentation.crop is None:
        windows = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
    elif augmentation.scale is None:
        side = np.full(len(rows), augmentation.crop)
        corners = (_below(geometry[n], sizes[:, n] - side + 1) for n in range(2))
        windows = np.stack([*corners, side, side], axis=1)
    else:
        windows = _resized_windows(augmentation, seed, epoch, keys, sizes)
    mirror = (geometry[2] >> np.uint64(31)).astype(bool) & augmentation.mirror
    return Draws(windows, mirror, _normals(_words(seed, epoch, rows, _NOISE)))


def centred(augmentation: Augmentation, sizes_N2: NDArray[np.integer]) -> Draws:
    """Gives an evaluation's parameters, without chance: the centre window, no mirror, no noise. For the arguments see `draw`."""
    sizes = np.asarray(sizes_N2, np.int64)
    windows = _in_the_centre(sizes, _evaluation_sides(augmentation, sizes))
    return Draws(windows, np.zeros(len(sizes), bool), np.zeros((len(sizes), 3)))


def ten_windows(augmentation: Augmentation, sizes_N2: NDArray[np.integer]) -> NDArray[np.int64]:
    """Gives the windows of the paper's ten test views (section 4.1), the four corners and the centre: int64 (N, 5, 4).

    Each is seen as it is, then all five once more reflected. The order is the 2012 code's.

    >>> ten_windows(Augmentation(crop=224), np.array([[256, 256]]))[0, :, :2].tolist()
    [[0, 0], [0, 32], [16, 16], [32, 0], [32, 32]]
    """
    sizes = np.asarray(sizes_N2, np.int64)
    sides = _evaluation_sides(augmentation, sizes)
    slack = sizes - sides
    places = [(0, 0), (0, 2), (1, 1), (2, 0), (2, 2)]  # in halves of the slack
    corners = [np.stack([slack[:, n] * place[n] // 2 for n in range(2)], axis=1) for place in places]
    return np.stack([np.concatenate([corner, sides], axis=1) for corner in corners], axis=1)


def augment(
    image_HWC: NDArray[np.uint8],
    draws: Draws,
    n: int,
    augmentation: Augmentation,
    statistics: Statistics | None,
    epoch: int = 0,
) -> NDArray[np.float64]:
    """What becomes of one image in training: the definition, which the DALI graph equals.

    Args:
        image_HWC: uint8 (H, W, 3), RGB, the decoded image.
        draws: of a batch, from `draw`.
        n: which sample of the batch this is.
        augmentation: what is done, and what was drawn for.
        statistics: of the dataset; None where `augmentation.needs_statistics` is false.
        epoch: some augmentations lose their noise after some epochs.

    Returns:
        float64 (crop, crop, 3), grey levels about 0, or what `augmentation.std` makes of them.

    Raises AlexprepError where statistics are needed and there are none.
    """
    if statistics is None and augmentation.needs_statistics:
        raise AlexprepError(
            "this augmentation needs statistics: give those of the dataset, from alexprep.shards.read_statistics"
        )
    top, left, height, width = draws.windows_N4[n].tolist()
    image = image_HWC[top : top + height, left : left + width]
    if augmentation.scale is not None and augmentation.crop is not None:
        image = resize(image, augmentation.crop)
    pixels: NDArray[np.float64] = image.astype(np.float64) - channel_means(statistics, augmentation)
    mean_window: NDArray[np.float64] | float = 0.0
    if augmentation.windowed_mean and statistics is not None:
        top, left = mean_corners(augmentation, draws.windows_N4[n : n + 1], len(statistics.mean_HWC))[0].tolist()
        mean_window = statistics.mean_HWC[top : top + height, left : left + width]
    if augmentation.mean == "crop":
        pixels = pixels - mean_window
    if draws.mirror_N[n]:
        pixels = pixels[:, ::-1]
    if augmentation.mean == "centre":  # the 2012 code subtracts after the reflection
        pixels = pixels - mean_window
    noisy = augmentation.noisy(epoch)
    if noisy and statistics is not None:
        pixels = pixels + colour_shifts(draws.alpha_N3[n : n + 1], statistics, augmentation)[0]
    pixels = pixels / channel_stdevs(statistics, augmentation)
    return pixels / augmentation.noise_rescale if noisy else pixels


def resize(image_HWC: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Resizes to a square of `side` pixels, by a triangle filter as wide as an output pixel (antialiased bilinear).

    Beyond an edge its pixels are repeated, as DALI does; Pillow leaves those weights out, which differs near the edges.
    """
    vertical, horizontal = (_triangle(image_HWC.shape[axis], side) for axis in (0, 1))
    exact = np.einsum("ih,hwc,jw->ijc", vertical, image_HWC.astype(np.float64), horizontal, optimize=True)
    rounded: NDArray[np.uint8] = np.clip(np.rint(exact), 0, 255).astype(np.uint8)
    return rounded


def noise_stdevs(statistics: Statistics, augmentation: Augmentation) -> NDArray[np.float64]:
    """The colour noise's standard deviation along each principal axis: float64 (3,), grey levels; 0 where there is no noise."""
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


_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

# Tells the uses of a sample's numbers apart: the counter's last word.
_GEOMETRY, _NOISE, _SHARED, _ATTEMPT = 0, 1, 2, 16
_ATTEMPTS = 10  # at a window that fits; torchvision's number


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox 4x32-10: uint64 (4, N), uniform on [0, 2**32), of a counter of this shape and a key, all below 2**32.

    >>> [hex(word) for word in philox(np.zeros((4, 1), np.uint64), (0, 0))[:, 0].tolist()]  # Random123's known answer
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    a, b, c, d = counter
    for turn in range(_ROUNDS):
        k0, k1 = (np.uint64((key[i] + turn * _WEYL[i]) & 0xFFFFFFFF) for i in range(2))
        left, right = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b, c, d = (right >> _SHIFT) ^ b ^ k0, right & _LOW, (left >> _SHIFT) ^ d ^ k1, left & _LOW
    return np.stack([a, b, c, d])


def _words(seed: int, epoch: int, keys_N: NDArray[np.int64], purpose: int) -> NDArray[np.uint64]:
    keys = keys_N.astype(np.uint64)
    counter = np.stack([keys & _LOW, keys >> _SHIFT, np.full_like(keys, epoch), np.full_like(keys, purpose)])
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32))


def _below(words: NDArray[np.uint64], bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Uniform on [0, bound). Multiply and shift: a value of n has probability within n / 2**32 of 1 / n."""
    scaled: NDArray[np.uint64] = (words * bounds.astype(np.uint64)) >> _SHIFT
    return scaled.astype(np.int64)


def _unit(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniform on (0, 1): the halves keep off both ends."""
    return (words.astype(np.float64) + 0.5) / 2**32


def _normals(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Box and Muller: two uniforms make two normals, of which the fourth is not needed."""
    uniform = _unit(words)
    radius = np.sqrt(-2.0 * np.log(uniform[:2]))
    angle = 2.0 * np.pi * uniform[2:]
    return np.stack([radius[0] * np.cos(angle[0]), radius[0] * np.sin(angle[0]), radius[1] * np.cos(angle[1])]).T


def _evaluation_sides(augmentation: Augmentation, sizes_N2: NDArray[np.int64]) -> NDArray[np.int64]:
    """Height and width of the windows that evaluation cuts."""
    if augmentation.crop is None:
        return sizes_N2.astype(np.int64)
    if augmentation.scale is None:
        return np.full_like(sizes_N2, augmentation.crop)
    sides = np.rint(sizes_N2.min(axis=1) * augmentation.evaluation_scale).astype(np.int64)
    squares: NDArray[np.int64] = np.maximum(1, np.stack([sides, sides], axis=1))
    return squares


def _in_the_centre(sizes_N2: NDArray[np.int64], sides_N2: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([(sizes_N2 - sides_N2) // 2, sides_N2], axis=1)


def _resized_windows(
    augmentation: Augmentation, seed: int, epoch: int, keys: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """torchvision's rule: ten attempts at an area and a ratio, at a uniform place; then the largest centred window.

    Samples of the same key have the same attempts, each in the size of its own image.
    """
    assert augmentation.scale is not None
    low, high = augmentation.scale
    logs = np.log(np.array(augmentation.ratio))
    tallest = np.minimum(sizes[:, 0], np.rint(sizes[:, 1] / augmentation.ratio[0]).astype(np.int64))
    widest = np.minimum(sizes[:, 1], np.rint(sizes[:, 0] * augmentation.ratio[1]).astype(np.int64))
    windows = _in_the_centre(sizes, np.maximum(1, np.stack([tallest, widest], axis=1)))
    open_rows = np.arange(len(keys))
    for attempt in range(_ATTEMPTS):
        words = _words(seed, epoch, keys[open_rows], _ATTEMPT + attempt)
        left = sizes[open_rows]
        area = left.prod(axis=1) * (low + (high - low) * _unit(words[0]))
        ratio = np.exp(logs[0] + (logs[1] - logs[0]) * _unit(words[1]))
        height, width = (np.rint(np.sqrt(part)).astype(np.int64) for part in (area / ratio, area * ratio))
        fits = (height > 0) & (height <= left[:, 0]) & (width > 0) & (width <= left[:, 1])
        slack = np.maximum(1, left - np.stack([height, width], axis=1) + 1)
        found = np.stack([_below(words[2], slack[:, 0]), _below(words[3], slack[:, 1]), height, width], axis=1)
        windows[open_rows[fits]] = found[fits]
        open_rows = open_rows[~fits]
    return windows


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
