"""Random parameters: pure, uniform, of the stated distributions, the same on every machine; the operations in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from alexprep.pipeline.augmentation import (
    PRESETS,
    Augmentation,
    Draws,
    augment,
    centred,
    draw,
    noise_stdevs,
    ten_windows,
)
from alexprep.pipeline.geometry import resize
from alexprep.pipeline.random_numbers import philox
from alexprep.shards.errors import AlexprepError
from alexprep.shards.rgb_statistics import IMAGENET_STDEVS, Statistics

RESIZED = PRESETS["resized"]


def test_philox_known_answers() -> None:
    """Random123's kat_vectors for philox4x32-10."""
    for counter, key, answer in (
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        np.testing.assert_array_equal(philox(np.array(counter, np.uint64)[:, None], key)[:, 0], answer)


def _draw(seed: int, epoch: int, rows: NDArray[np.int64], slack: int) -> Draws:
    return draw(Augmentation(crop=224), seed, epoch, rows, np.full((len(rows), 2), 224 + slack))


def _corners(draws: Draws) -> NDArray[np.int64]:
    return draws.windows_N4[:, :2]


def test_draws_stay_as_they_are() -> None:
    """A change of these numbers changes every run that was begun before it."""
    draws = _draw(7, 3, np.array([0, 41]), 32)
    assert draws.windows_N4.tolist() == [[19, 4, 224, 224], [4, 20, 224, 224]]
    resized = draw(RESIZED, 7, 3, np.array([0, 41]), np.array([[256, 256], [300, 500]]))
    assert resized.windows_N4.tolist() == [[125, 97, 110, 98], [130, 185, 134, 179]]


@pytest.mark.parametrize("augmentation", [Augmentation(), RESIZED, PRESETS["2012-code"]])
def test_draws_do_not_depend_on_company(augmentation: Augmentation) -> None:
    rows = np.arange(200)
    sizes = np.random.default_rng(0).integers(224, 600, (200, 2))
    whole = draw(augmentation, 9, 4, rows, sizes, rows + 1000)
    for part in (rows[17:18], rows[::-1], rows[[5, 5, 180]]):
        alone = draw(augmentation, 9, 4, part, sizes[part], part + 1000)
        np.testing.assert_array_equal(alone.windows_N4, whole.windows_N4[part])
        np.testing.assert_array_equal(alone.mirror_N, whole.mirror_N[part])
        np.testing.assert_array_equal(alone.alpha_N3, whole.alpha_N3[part])


def test_draws_differ_between_seeds_and_epochs() -> None:
    rows = np.arange(50)
    drawn = {_corners(_draw(seed, epoch, rows, 32)).tobytes() for seed in (0, 1, 2**40) for epoch in (0, 1, 90)}
    assert len(drawn) == 9


def test_corners_and_mirrors_are_uniform() -> None:
    """33 x 33 corners (2012 code) and two mirrors: chi-squared bounds at 99.99 %."""
    count = 33 * 33 * 100
    draws = _draw(1, 0, np.arange(count), 32)
    places = _corners(draws)
    corners = np.bincount(places[:, 0] * 33 + places[:, 1], minlength=33 * 33)
    assert ((corners - 100) ** 2 / 100).sum() < 1088 + 3.72 * np.sqrt(2 * 1088)
    assert abs(draws.mirror_N.sum() - count / 2) < 3.9 * np.sqrt(count) / 2
    together = np.corrcoef(np.column_stack([places, draws.mirror_N, draws.alpha_N3]).T)
    assert np.abs(together - np.eye(6)).max() < 3.9 / np.sqrt(count) * 1.3


def test_oblong_images_use_their_whole_rectangle() -> None:
    """Corners reach every row and column of an oblong image, and no further."""
    sizes = np.tile([[230, 260]], (5000, 1))
    corners = _corners(draw(Augmentation(), 0, 0, np.arange(5000), sizes))
    assert sorted(set(corners[:, 0].tolist())) == list(range(7))
    assert sorted(set(corners[:, 1].tolist())) == list(range(37))


def test_no_slack_and_no_chance() -> None:
    assert (_corners(_draw(0, 0, np.arange(9), 0)) == 0).all()
    still = centred(Augmentation(), np.array([[256, 256], [257, 301], [224, 224]]))
    assert still.windows_N4.tolist() == [[16, 16, 224, 224], [16, 38, 224, 224], [0, 0, 224, 224]]
    assert not still.mirror_N.any() and (still.alpha_N3 == 0).all()
    whole = centred(PRESETS["none"], np.array([[20, 31]]))
    assert whole.windows_N4.tolist() == [[0, 0, 20, 31]]


@pytest.mark.parametrize("augmentation", [PRESETS["2012-code"], replace(RESIZED, share=32)], ids=["2012", "resized"])
def test_shared_draws(augmentation: Augmentation) -> None:
    """32 neighbours in the order have one window and mirror, each its own noise; the next 32 others."""
    draws = draw(augmentation, 5, 2, np.arange(960)[::-1], np.full((960, 2), 256), np.arange(960))
    groups = np.column_stack([draws.windows_N4, draws.mirror_N]).reshape(30, 32, 5)
    assert (groups == groups[:, :1]).all()
    assert len(np.unique(groups[:, 0], axis=0)) > 25
    assert len(np.unique(draws.alpha_N3, axis=0)) == 960
    assert groups[:, 0, :2].min() >= 0 and (groups[:, 0, :2] + groups[:, 0, 2:4]).max() <= 256


def _scalar_window(seed: int, epoch: int, row: int, height: int, width: int) -> list[int]:
    """torchvision's RandomResizedCrop.get_params, one image at a time, with the same uniform numbers."""
    low, high = RESIZED.scale or (0, 0)
    for attempt in range(10):
        counter = np.array([[row], [0], [epoch], [16 + attempt]], np.uint64)
        words = [int(word) for word in philox(counter, (seed, 0))[:, 0]]
        a, b = ((word + 0.5) / 2**32 for word in words[:2])
        area = height * width * (low + (high - low) * a)
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * b)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return [words[2] * (height - h + 1) >> 32, words[3] * (width - w + 1) >> 32, h, w]
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * 4 / 3), height
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


def test_resized_windows_follow_torchvision_s_rule() -> None:
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 500, (300, 2))
    sizes[:60] = [[10, 400], [400, 10], [1, 1]] * 20  # those that take several attempts, or none fits
    rows = np.arange(300)
    windows = draw(RESIZED, 11, 3, rows, sizes).windows_N4
    expected = [_scalar_window(11, 3, row, *size) for row, size in enumerate(sizes.tolist())]
    assert windows.tolist() == expected


def test_evaluation_of_resized_crops() -> None:
    """The centre square of 7/8 of the shorter side; the ten views' windows at the corners of the whole rectangle."""
    sizes = np.array([[256, 256], [300, 500], [3, 2]])
    assert centred(RESIZED, sizes).windows_N4.tolist() == [[16, 16, 224, 224], [19, 119, 262, 262], [0, 0, 2, 2]]
    windows = ten_windows(RESIZED, sizes)[1]
    assert windows[:, :2].tolist() == [[0, 0], [0, 238], [19, 119], [38, 0], [38, 238]]
    assert (windows[:, 2:] == 262).all()


def test_resize_is_antialiased_as_pillow_s(photo: Callable[..., Image.Image]) -> None:
    """Away from the edges, which Pillow treats otherwise, the definition is Pillow's bilinear filter, which rounds twice."""
    for height, width, side in ((40, 61, 23), (33, 20, 47), (90, 90, 31)):
        image = np.asarray(photo(width, height, seed=height))
        ours = resize(image, side).astype(int)
        pillow = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)).astype(int)
        edge = 2
        inner = np.abs(ours - pillow)[edge:-edge, edge:-edge]
        assert inner.max() <= 1 and (inner > 0).mean() < 0.25


def test_imagenet_s_noise_is_the_published_one() -> None:
    """With the original's eigenvalues: 5.8, 0.54, 0.15 grey levels by the paper's formula, 12.18, 3.71, 1.97 by the code's."""
    eigenvalues = np.array(IMAGENET_STDEVS) ** 2
    found = Statistics("", 1, np.zeros((1, 1, 3)), np.zeros(3), np.eye(3), eigenvalues, np.eye(3))
    np.testing.assert_allclose(noise_stdevs(found, Augmentation(noise="eigenvalue")), [5.816, 0.539, 0.1525], rtol=1e-3)
    np.testing.assert_allclose(noise_stdevs(found, Augmentation(noise="stdev")), [12.178, 3.709, 1.972], rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"crop": 0}, "crop 0"),
        ({"crop": 24.5}, "crop 24.5 is not a whole number"),
        ({"share": None}, "share None"),
        ({"mirror": "no"}, "mirror 'no'"),
        ({"scale": 0.5, "mean": "none"}, "scale 0.5"),
        ({"scale": (0.5, 0.1), "mean": "none"}, "scale"),
        ({"ratio": (1, float("inf"))}, "ratio"),
        ({"noise_rescale": None}, "noise_rescale None"),
        ({"crop": None}, "need a crop"),
        ({"scale": (0.1, 1)}, "mean 'crop' belongs to crops that are not resized"),
        ({"mean": "median"}, "mean 'median'"),
        ({"noise": "loud"}, "noise 'loud'"),
        ({"noise_sigma": -1}, "noise_sigma -1"),
    ],
)
def test_augmentations_out_of_bounds(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(AlexprepError, match=words):
        Augmentation(**arguments)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(AlexprepError, match="share 32 needs the places in the epoch's order"):
        draw(PRESETS["2012-code"], 0, 0, np.arange(2), np.full((2, 2), 256))
    with pytest.raises(AlexprepError, match="this augmentation needs statistics"):
        augment(np.zeros((256, 256, 3), np.uint8), _draw(0, 0, np.arange(1), 32), 0, Augmentation(), None)
