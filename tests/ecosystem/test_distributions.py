"""What our augmentations draw beside what torchvision and timm draw of the same bounds: chi-squared tests of both samples, and their tables."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from alexprep.pipeline import policies
from alexprep.pipeline.augmentation import PRESETS, Augmentation, draw
from alexprep.pipeline.colour import Blur, Jitter
from alexprep.pipeline.geometry import Affine, Erasing
from alexprep.pipeline.mixing import Mixing
from alexprep.pipeline.policies import OPERATIONS, RandAugment, TrivialAugment, operation
from tests.support.chances import check_alike, check_tallies

transforms: Any = pytest.importorskip(
    "torchvision.transforms", reason="torchvision is not installed: `make ecosystem` has it"
)
timm_data: Any = pytest.importorskip("timm.data", reason="timm is not installed: `make ecosystem` has it")

COUNT = 3000
HEIGHT, WIDTH = 200, 300
# Their names for our operations.
THEIRS = {name.replace("_", "").lower(): name for name in OPERATIONS} | {
    "color": "color",
    "autocontrast": "autocontrast",
}


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def ours(augmentation: Augmentation, seed: int) -> Any:
    rows = np.arange(COUNT)
    return draw(augmentation, seed, 0, rows, np.tile([[HEIGHT, WIDTH]], (COUNT, 1)), rows)


def more(seed: int, **options: Any) -> Any:
    return ours(Augmentation(crop=None, mean="none", noise="none", **options), seed).more


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_resized_crops(library: str, seed: int) -> None:
    image = Image.new("RGB", (WIDTH, HEIGHT))
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    kind = (
        transforms.RandomResizedCrop
        if library == "torchvision"
        else timm_data.transforms.RandomResizedCropAndInterpolation
    )
    theirs = np.array([kind.get_params(image, scale, ratio) for _ in range(COUNT)])  # top, left, height, width
    found = ours(replace(PRESETS["resized"], crop=64), seed).windows_N4
    _check_boxes(theirs, found)


def test_colour_jitter_and_blur(seed: int) -> None:
    for position, most in enumerate((0.4, 1.5, 0.8, 0.1)):
        amounts = [most if n == position else 0.0 for n in range(4)]
        bounds = [(max(0.0, 1 - each), 1 + each) for each in amounts[:3]] + [(-amounts[3], amounts[3])]
        theirs = [float(transforms.ColorJitter.get_params(*bounds)[1 + position]) for _ in range(COUNT)]
        found = more(seed, jitter=Jitter(*amounts))["recolouring"]
        if position == 3:  # the angle of the turn, without its sign
            theirs = list(np.abs(theirs))
            values = np.arccos(np.clip((np.trace(found[:, :, :3], axis1=1, axis2=2) - 1) / 2, -1, 1)) / (2 * np.pi)
        else:
            values = found[:, 0, 0] if position < 2 else (found[:, 0, 0] - 0.299) / (1 - 0.299)
        low = 0.0 if position == 3 else bounds[position][0]
        check_alike(theirs, values, np.linspace(low - 1e-9, bounds[position][1] + 1e-9, 11))
    sigmas = [transforms.GaussianBlur.get_params(0.1, 2.0) for _ in range(COUNT)]
    check_alike(sigmas, more(seed, blur=Blur(share=1))["sigma"], np.linspace(0.1, 2.0, 11))


def test_affine_maps(seed: int) -> None:
    theirs = [
        transforms.RandomAffine.get_params((-40.0, 40.0), (0.1, 0.3), (0.5, 2.0), (-20.0, 20.0), (WIDTH, HEIGHT))
        for _ in range(COUNT)
    ]  # angle, shift, scale, shear
    turned, zoomed = (more(seed, affine=each)["affine"] for each in (Affine(rotate=40), Affine(zoom=(0.5, 2))))
    shifted = more(seed, affine=Affine(shift=(0.1, 0.3)))["affine"]
    sheared = more(seed, affine=Affine(shear=(20, 0)))["affine"]
    check_alike(
        [each[0] for each in theirs], np.degrees(np.arctan2(turned[:, 0, 1], turned[:, 0, 0])), np.linspace(-40, 40, 11)
    )
    check_alike([each[2] for each in theirs], 1 / zoomed[:, 0, 0], np.linspace(0.5, 2, 11))
    check_alike([each[3][0] for each in theirs], np.degrees(np.arctan(sheared[:, 0, 1])), np.linspace(-20, 20, 11))
    for n, most in enumerate((0.1 * WIDTH, 0.3 * HEIGHT)):  # theirs in whole pixels
        check_alike(
            [each[1][n] for each in theirs], np.rint(-shifted[:, n, 2]), np.linspace(-most - 0.5, most + 0.5, 7)
        )


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_erased_rectangles(library: str, seed: int) -> None:
    image = torch.ones(3, HEIGHT, WIDTH)
    area, ratio = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's
    if library == "torchvision":
        drawn = [transforms.RandomErasing.get_params(image, area, ratio, [0.0])[:4] for _ in range(COUNT)]
    else:
        erase = timm_data.random_erasing.RandomErasing(1.0, *area, min_aspect=ratio[0], mode="const", device="cpu")
        drawn = [_box(erase(image.clone())[0]) for _ in range(COUNT // 3)]
    theirs, found = np.array(drawn), more(seed, erasing=Erasing(1.0, area, ratio))["erased"]
    _check_boxes(theirs, found)


def _check_boxes(theirs: NDArray[Any], found: NDArray[Any]) -> None:
    """Top, left, height and width of rectangles: their share of the area, their place and their proportions."""
    edges = [*[np.linspace(0, 1, 21)] * 3, np.linspace(-1.4, 1.4, 29)]
    for one, other, bins in zip(_measures(theirs), _measures(found), edges, strict=True):
        check_alike(one, other, bins)


def _measures(boxes_N4: NDArray[Any]) -> list[NDArray[np.float64]]:
    top, left, height, width = boxes_N4.T
    return [height * width / (HEIGHT * WIDTH), top / HEIGHT, left / WIDTH, np.log(width / height)]


def _box(image_HW: torch.Tensor) -> tuple[int, int, int, int]:
    """Top, left, height and width of what is 0."""
    rows, columns = (np.flatnonzero((image_HW == 0).any(dim=axis).numpy()) for axis in (1, 0))
    return int(rows[0]), int(columns[0]), len(rows), len(columns)


def test_weights_of_mixup_and_cutmix(seed: int) -> None:
    """A pair here is a batch there."""
    edges = np.linspace(-1e-9, 1 + 1e-9, 21)
    for alpha in (0.2, 1.0):
        mixup, cutmix = timm_data.Mixup(mixup_alpha=alpha), timm_data.Mixup(mixup_alpha=0.0, cutmix_alpha=alpha)
        beta = [mixup._params_per_batch()[0] for _ in range(COUNT // 2)]
        check_alike(beta, more(seed, mixing=Mixing(mixup=alpha))["weight"][::2], edges)
        left = [
            timm_data.mixup.cutmix_bbox_and_lam((1, 3, HEIGHT, WIDTH), cutmix._params_per_batch()[0])[1]
            for _ in range(COUNT // 2)
        ]
        check_alike(left, more(seed, mixing=Mixing(cutmix=alpha))["weight"][::2], edges)
    both = timm_data.Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, switch_prob=0.3)
    exchanged = more(seed, mixing=Mixing(mixup=0.2, cutmix=1.0, cutmix_share=0.3))["exchanged"][::2]
    switched = sum(both._params_per_batch()[1] for _ in range(COUNT // 2))
    # A rectangle may be empty, where its λ is nearly 1.
    assert abs(switched - np.count_nonzero(exchanged[:, 2] * exchanged[:, 3])) < 5 * math.sqrt(
        COUNT / 2 * 2 * 0.3 * 0.7
    )


@pytest.mark.parametrize("policy", [RandAugment(), TrivialAugment()])
def test_policies_of_torchvision(policy: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation is drawn as often as there, at the strengths that its table has."""
    module = transforms.autoaugment
    drawn: list[tuple[str, float]] = []

    def note(image: Any, name: str, magnitude: float, **_: Any) -> Any:
        drawn.append((THEIRS[name.lower()], magnitude))
        return image

    monkeypatch.setattr(module, "_apply_op", note)
    theirs = transforms.RandAugment() if isinstance(policy, RandAugment) else transforms.TrivialAugmentWide()
    image = Image.new("RGB", (WIDTH, HEIGHT))
    for _ in range(COUNT // policy.operations):
        theirs(image)
    counted = Counter(name for name, _ in drawn)
    kinds = [_operation(policy, name, 30, False)["kind"][0] for name in OPERATIONS]
    there = np.bincount(kinds, weights=[counted[name] for name in OPERATIONS], minlength=8)
    here = np.bincount(more(seed, policy=policy)["policy0.kind"], minlength=8)
    check_tallies([there, here])
    for name in ("brightness", "sharpness", "rotate", "translate_x", "posterize", "solarize"):
        strengths = [9] if isinstance(policy, RandAugment) else range(31)
        known = {
            round(_magnitude(policy, name, strength, negative), 3)
            for strength in strengths
            for negative in (False, True)
        }
        seen = {round(float(magnitude), 3) for each, magnitude in drawn if each == name}
        assert seen <= known | {-0.0}, name


def _operation(policy: Any, name: str, strength: int, negative: bool) -> dict[str, NDArray[Any]]:
    number = np.array([OPERATIONS.index(name)])
    return operation(policy, number, np.array([strength]), np.array([negative]), np.array([[HEIGHT, WIDTH]]))


def _magnitude(policy: Any, name: str, strength: int, negative: bool) -> float:
    """What torchvision hands to the operation."""
    found = {key: values[0] for key, values in _operation(policy, name, strength, negative).items()}
    if name == "rotate":
        return float(np.degrees(np.arctan2(found["map"][0, 1], found["map"][0, 0])))
    if name == "translate_x":
        exact = (32.0 if isinstance(policy, TrivialAugment) else 150 / 331 * WIDTH) * strength / 30
        assert -found["map"][0, 2] == int(-exact if negative else exact)  # it cuts off what is no whole pixel
        return -exact if negative else exact
    if name == "posterize":
        return float(8 - int(256 - found["mask"]).bit_length() + 1)
    if name == "solarize":
        exact = 255 * (1 - strength / 30)
        assert found["threshold"] == math.ceil(exact)
        return exact
    return float(found["factor"] - 1)


def test_all_operations_are_known() -> None:
    names = {THEIRS[name.lower()] for name in transforms.RandAugment()._augmentation_space(31, (HEIGHT, WIDTH))}
    assert names == set(OPERATIONS) and len(policies.OPERATIONS) == 14
