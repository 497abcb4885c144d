"""RandAugment and TrivialAugment: tables of operations and strengths, their random parameters, and each operation in numpy.

The tables are those of the papers (arXiv 1909.13719, arXiv 2103.10158) in the numbers of torchvision's RandAugment and TrivialAugmentWide.
`alexprep.pipeline.dali_ops` has the same operations over DALI nodes. When they come is said in `alexprep.pipeline.augmentation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexprep.pipeline.colour import LUMA, filtered, saturation
from alexprep.pipeline.geometry import inverse_maps, warp
from alexprep.pipeline.random_numbers import POLICY, Words, below
from alexprep.shards.errors import number_within, whole_number

STRENGTHS = 31  # steps from none to the strongest
OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast"),
    *("sharpness", "posterize", "solarize", "autocontrast", "equalize"),
)
# How an image is changed, by number: what a sample's operation comes to, so that DALI has a branch for each.
KEPT, WARPED, SCALED, COLOURED, TONED, STRETCHED, EQUALIZED, SHARPENED = range(8)
_SIGNED = 9  # operations from the second to the tenth go either way
# Pillow's ImageFilter.SMOOTH, which its Sharpness enhances against.
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
_SHARP = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]])


@dataclass(frozen=True)
class RandAugment:
    """Some operations out of fourteen, one after the other, each drawn anew and of one strength.

    Attributes:
        operations: how many, 1 to 8; 2 in the paper.
        strength: 0 to 30; 9 in the paper for ImageNet (ResNet-50). Which way a warp or a factor goes is drawn.
        fill: grey level of R, G and B where nothing of the image comes to lie.
    """

    operations: int = 2
    strength: int = 9
    fill: int = 0

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        whole_number("policy: operations", self.operations, 1, 8)
        whole_number("policy: strength", self.strength, 0, STRENGTHS - 1)
        number_within("policy: fill", self.fill, 0, 255)


@dataclass(frozen=True)
class TrivialAugment:
    """One operation out of fourteen, of a strength that is drawn too, over wider ranges: TrivialAugment (wide).

    Attributes:
        fill: grey level of R, G and B where nothing of the image comes to lie.
    """

    fill: int = 0

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        number_within("policy: fill", self.fill, 0, 255)

    @property
    def operations(self) -> int:
        """How many: one."""
        return 1


Policy = RandAugment | TrivialAugment
# One operation of each sample: "kind" int64 (N,), one of KEPT … SHARPENED; "map" float64 (N, 2, 3), see `geometry.warp`; "factor" (N,),
# what pixels or colours are multiplied by; "from_mean" (N,), 1 where that goes away from the image's mean grey level rather than from black;
# "threshold" and "mask" int64 (N,), see `toned`.
Operation = dict[str, NDArray[Any]]


def draw_policy(policy: Policy, sizes_N2: NDArray[np.int64], words: Words) -> list[Operation]:
    """The operations of samples of these heights and widths, in the order in which they are done."""
    drawn = []
    for turn in range(policy.operations):
        random = words(POLICY + turn)
        which = below(random[0], len(OPERATIONS))
        if isinstance(policy, RandAugment):
            strength = np.full(len(which), policy.strength, np.int64)
        else:
            strength = below(random[1], STRENGTHS)
        drawn.append(operation(policy, which, strength, random[2] >> np.uint64(31) == 1, sizes_N2))
    return drawn


def operation(
    policy: Policy,
    which_N: NDArray[np.int64],
    strength_N: NDArray[np.int64],
    negative_N: NDArray[np.bool_],
    sizes_N2: NDArray[np.int64],
) -> Operation:
    """What operations, numbers of `OPERATIONS`, of strengths from 0 to 30 do to images of these heights and widths."""
    is_ = {name: which_N == number for number, name in enumerate(OPERATIONS)}
    share = strength_N / (STRENGTHS - 1)
    wide = isinstance(policy, TrivialAugment)
    sign = np.where(negative_N & (which_N >= 1) & (which_N <= _SIGNED), -1.0, 1.0)
    shear = sign * share * (0.99 if wide else 0.3)
    shifts = [
        sign * share * (np.full(len(which_N), 32.0) if wide else 150 / 331 * sizes_N2[:, 1 - n]) for n in range(2)
    ]
    angle = sign * share * np.radians(135.0 if wide else 30.0)
    factor = 1 + sign * share * (0.99 if wide else 0.9)
    bits = 8 - np.rint(share * (6 if wide else 4)).astype(np.int64)
    none = np.zeros(len(which_N))
    kind = np.full(len(which_N), KEPT)
    for name, number in (
        ("color", COLOURED),
        ("autocontrast", STRETCHED),
        ("equalize", EQUALIZED),
        ("sharpness", SHARPENED),
    ):
        kind[is_[name]] = number
    for names, number in (
        (OPERATIONS[1:6], WARPED),
        (("brightness", "contrast"), SCALED),
        (("posterize", "solarize"), TONED),
    ):
        kind[np.any([is_[name] for name in names], axis=0)] = number
    maps = inverse_maps(
        sizes_N2,
        np.where(is_["rotate"], angle, none),
        none + 1,
        np.where(is_["shear_x"], shear, none),
        np.where(is_["shear_y"], shear, none),
        np.where(is_["translate_x"], np.trunc(shifts[0]), none),
        np.where(is_["translate_y"], np.trunc(shifts[1]), none),
    )
    return {
        "kind": kind,
        "map": maps,
        "factor": factor,
        "from_mean": is_["contrast"].astype(np.float64),
        "threshold": np.where(is_["solarize"], np.ceil(255 * (1 - share)).astype(np.int64), 256),
        "mask": np.where(is_["posterize"], 256 - 2 ** (8 - bits), 255),
    }


def operated(image_HWC: NDArray[np.uint8], drawn: Operation, n: int, fill: float) -> NDArray[np.uint8]:
    """What an operation makes of the image of sample `n`: uint8 (H, W, 3)."""
    kind, factor = drawn["kind"][n], drawn["factor"][n]
    if kind == WARPED:
        return warp(image_HWC, drawn["map"][n], fill, nearest=True)
    if kind == SCALED:
        start = drawn["from_mean"][n] * (LUMA @ image_HWC.mean(axis=(0, 1)))
        return _rounded(start + factor * (image_HWC - start))
    if kind == COLOURED:
        return _rounded(image_HWC @ saturation(np.array([factor]))[0].T)
    if kind == TONED:
        return toned(image_HWC, int(drawn["threshold"][n]), int(drawn["mask"][n]))
    if kind == STRETCHED:
        return stretched(image_HWC)
    if kind == EQUALIZED:
        return equalized(image_HWC)
    return filtered(image_HWC, sharpening(factor)) if kind == SHARPENED else image_HWC


def toned(image_HWC: NDArray[np.uint8], threshold: int, mask: int) -> NDArray[np.uint8]:
    """Inverts levels from `threshold` on (solarize; 256 for none), then keeps the bits of `mask` (posterize; 255 for all)."""
    inverted = np.where(image_HWC >= threshold, 255 - image_HWC, image_HWC)
    kept: NDArray[np.uint8] = (inverted & mask).astype(np.uint8)
    return kept


def stretched(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Autocontrast: each channel's lowest level becomes 0 and its highest 255; a channel of one level stays."""
    low, high = image_HWC.min(axis=(0, 1)).astype(np.float64), image_HWC.max(axis=(0, 1)).astype(np.float64)
    flat = low == high
    return _rounded((image_HWC - low * ~flat) * np.where(flat, 1, 255) / np.where(flat, 1, high - low))


def equalized(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Equalizes each channel's histogram: a level becomes 255 times the share of pixels below or at it, the lowest level's left out.

    That is OpenCV's equalizeHist. Pillow's differs by a level or two. A channel of one level stays.
    """
    result = image_HWC.copy()
    for channel in range(3):
        counts = np.bincount(image_HWC[..., channel].ravel(), minlength=256)
        least = counts[np.flatnonzero(counts)[0]]
        if least < counts.sum():
            table = np.rint((counts.cumsum() - least) * (255 / (counts.sum() - least)))
            result[..., channel] = np.clip(table, 0, 255).astype(np.uint8)[image_HWC[..., channel]]
    return result


def sharpening(factor: float) -> NDArray[np.float64]:
    """The kernel (3, 3) that goes away from the smoothed image by a factor: 0 smooths, 1 changes nothing, 2 sharpens."""
    kernel: NDArray[np.float64] = factor * _SHARP + (1 - factor) * _SMOOTH
    return kernel


def _rounded(pixels: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
