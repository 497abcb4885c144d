"""Elastic distortion, a digit's width, padding and channels: the loader against the definition, the definition against scipy, and what is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from numpy.typing import NDArray
from PIL import Image

from alexprep.pipeline.augmentation import Augmentation, augment, centred, draw
from alexprep.pipeline.colour import Jitter
from alexprep.pipeline.geometry import Affine, Elastic, digit_map, draw_elastic, resampled, smooth_waves, warp
from alexprep.pipeline.loader import Loader
from alexprep.pipeline.random_numbers import words_of
from alexprep.pipeline.resampling import resampled_views
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import shared_decoder
from alexprep.shards.rgb_statistics import read_statistics
from alexprep.shards.sample_reader import Samples

PLAIN: dict[str, Any] = {"crop": 61, "mean": "imagenet", "std": "imagenet", "noise": "none"}
AFFINE = Affine(rotate=20, shift=(0.1, 0.2), zoom=(0.8, 1.2), shear=(5, 9), fill=40)
ELASTIC = Elastic(4, (20, 60))
CASES = {
    "padded": Augmentation(**PLAIN | {"crop": 71}, pad=5, background=200),
    "padded, with warp and jitter": Augmentation(**PLAIN, pad=3, affine=AFFINE, jitter=Jitter(0.4, 0.4)),
    "grey": Augmentation(**PLAIN, channels=1),
    "two channels of a mean image": Augmentation(crop=50, channels=2),
    "elastic": Augmentation(**PLAIN, elastic=ELASTIC),
    "elastic, oblong": Augmentation(
        **PLAIN | {"crop": (33, 66)}, pad=1, background=40, elastic=ELASTIC, affine=AFFINE, channels=1
    ),
    "resized": Augmentation(**PLAIN | {"crop": 37}, scale=(0.2, 1), elastic=ELASTIC, channels=2),
    "width": Augmentation(**PLAIN, normalised_width=20, background=3),
    "all": Augmentation(**PLAIN, normalised_width=90, background=40, elastic=ELASTIC, affine=AFFINE, channels=1),
}


def _loaded(data: Path, augmentation: Augmentation, count: int, **options: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """So many views and their rows."""
    images, rows = [], []
    with Loader(data, augmentation=augmentation, seed=3, **{"batch_size": 10, "threads": 1} | options) as loader:
        for batch in loader:
            images.append(batch.images.numpy())
            rows.append(batch.indices.numpy())
            if sum(map(len, rows)) >= count:
                break
    return np.concatenate(images)[:count], np.concatenate(rows)[:count]


@pytest.mark.parametrize("name", CASES)
def test_a_loader_gives_what_is_defined(name: str, data: Path) -> None:
    augmentation, samples = CASES[name], Samples(data, "train")
    statistics = read_statistics(data) if augmentation.needs_statistics else None
    found, rows = _loaded(data, augmentation, 10, memory_format="channels_last")
    draws = draw(augmentation, 3, 0, rows, np.full((10, 2), 64))
    pixels = [shared_decoder().decode(samples.encoded(row).tobytes()) for row in rows.tolist()]
    expected = np.stack([augment(each, draws, n, augmentation, statistics) for n, each in enumerate(pixels)])  # type: ignore[arg-type]
    scale = 57 if augmentation.std == "imagenet" else 1
    difference = np.abs(found.transpose(0, 2, 3, 1) - expected) * scale
    # DALI's warps and resizes round to grey levels, which either way may go; torch's resampling does not round.
    rounds = "jitter" in name or name == "resized"
    assert difference.max() <= (1.5 if rounds else 0.02)
    assert (difference > 0.02).mean() < (0.002 if rounds else 1e-9)
    other, _ = _loaded(data, augmentation, 10, memory_format="NHWC", dtype="float16")
    assert np.abs(other - found.transpose(0, 2, 3, 1)).max() <= 0.005 * np.abs(found).max()


@pytest.mark.parametrize("name", ["elastic, oblong", "all"])
def test_views_are_the_same_in_any_batch_on_any_rank_and_after_a_resume(name: str, data: Path) -> None:
    """To the last bit."""
    augmentation = CASES[name]
    whole, rows = _loaded(data, augmentation, 48, batch_size=48)
    by_row = {int(row): view for row, view in zip(rows, whole, strict=True)}
    for batch_size, threads, ranks in ((1, 2, 1), (5, 1, 2), (7, 3, 3)):
        for rank in range(ranks):
            options = {"batch_size": batch_size, "threads": threads, "rank": rank, "world_size": ranks}
            found, some = _loaded(data, augmentation, 12, **options)
            assert all((by_row[int(row)] == view).all() for row, view in zip(some, found, strict=True))
    with Loader(data, batch_size=3, augmentation=augmentation, seed=3, threads=1) as loader:
        batches = iter(loader)
        for _ in range(5):
            next(batches)
        state, expected = loader.state_dict(), next(batches)
    with Loader(data, batch_size=3, augmentation=augmentation, seed=3, threads=2) as loader:
        loader.load_state_dict(state)
        resumed = next(iter(loader))
    assert torch.equal(resumed.images, expected.images) and torch.equal(resumed.indices, expected.indices)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["elastic", "elastic, oblong", "width", "all"])
def test_a_gpu_makes_the_same_views(name: str) -> None:
    augmentation = CASES[name]
    assert augmentation.view is not None
    images = torch.randint(
        0, 256, (5, *augmentation.view, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    draws = draw(augmentation, 3, 0, np.arange(5), np.array([augmentation.view] * 5) - 2 * augmentation.pad)
    one, other = (resampled_views(images.to(device), draws, augmentation, None).cpu() for device in ("cpu", "cuda"))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def test_an_evaluation_has_no_distortion_but_the_width(data: Path) -> None:
    plain = Augmentation(**PLAIN, channels=1)
    for chance in (replace(plain, elastic=ELASTIC), replace(plain, elastic=ELASTIC, affine=replace(AFFINE, fill=0))):
        for views in ("centre", "ten"):
            found, _ = _loaded(data, chance, 3, split="val", views=views, order="sequential")
            assert (found == _loaded(data, plain, 3, split="val", views=views, order="sequential")[0]).all()
    wide = CASES["all"]
    found, rows = _loaded(data, wide, 3, split="val", views="centre", order="sequential")
    samples, alone = Samples(data, "val"), wide.without_chance()
    for n, row in enumerate(rows.tolist()):
        pixels = shared_decoder().decode(samples.encoded(row).tobytes())
        assert pixels is not None
        expected = augment(pixels, centred(alone, np.array([[64, 64]])), 0, alone, None)
        np.testing.assert_allclose(found[n].transpose(1, 2, 0), expected, rtol=0, atol=1e-3)
    with pytest.raises(AlexprepError, match="use --views centre"):
        Loader(data, "val", batch_size=2, augmentation=wide, views="two")


# The definition, against other people's code.


def test_one_resampling_is_scipy_s(photo: Callable[..., Image.Image], seed: int) -> None:
    image = np.asarray(photo(43, 61, seed=1)).astype(float)
    rng = np.random.default_rng(seed)
    first, second = np.eye(2, 3) + rng.normal(0, 0.05, (2, 2, 3))
    noise = rng.uniform(-9, 9, (2, *(smooth_waves(side, 5).shape[1] for side in (61, 43)))).astype(np.float32)
    x, y = np.meshgrid(np.arange(43) + 0.5, np.arange(61) + 0.5)
    field = [smooth_waves(61, 5) @ part @ smooth_waves(43, 5).T for part in noise]
    inner = [row[0] * x + row[1] * y + row[2] + moved for row, moved in zip(first, field, strict=True)]
    places = [row[0] * inner[0] + row[1] * inner[1] + row[2] - 0.5 for row in second]
    background = np.array([10.0, 200.0, 30.0])
    found = resampled(image, [first, second], noise, 5, background)
    for channel in range(3):
        expected = scipy.ndimage.map_coordinates(
            np.pad(image[..., channel], 1, constant_values=background[channel]),
            [places[1] + 1, places[0] + 1],
            order=1,
            mode="constant",
            cval=background[channel],
        )
        np.testing.assert_allclose(found[..., channel], expected, rtol=0, atol=1e-2)  # the field is float32
    alone = resampled(image, [first], None, 1, np.full(3, 7.0))
    assert np.abs(alone - warp(image.astype(np.uint8), first, 7, nearest=False)).max() <= 0.5


def test_the_field_is_that_of_smoothed_noise(seed: int) -> None:
    """Deviation and covariance are those of white noise on (-1, 1), one a pixel, after a Gaussian: Simard et al.'s, drawn in full."""
    sigma, size, count = 3.0, (14, 21), 1500
    elastic = Elastic(sigma, (10, 10))

    def words(purpose: Any) -> NDArray[np.uint64]:
        return words_of(seed, 0, np.arange(count), purpose)

    noise = draw_elastic(elastic, size, words)
    waves = [smooth_waves(side, sigma).astype(float) for side in size]
    fields = np.einsum("hi,ncij,wj->nchw", waves[0], noise, waves[1])
    edge = 15
    white = np.random.default_rng(seed).uniform(-1, 1, (count, *(side + 2 * edge for side in size)))
    full = 10 * scipy.ndimage.gaussian_filter(white, (0, sigma, sigma), truncate=5)[:, edge:-edge, edge:-edge]
    exact = np.sqrt(1 / 3) / (np.sqrt(4 * np.pi) * sigma) * 10
    assert exact == pytest.approx(0.163 * 10 / sigma, rel=0.01)
    for part in (fields[:, 0], fields[:, 1], full):
        np.testing.assert_allclose(part.std(axis=0), exact, rtol=0.09)
        assert np.abs(part.mean(axis=0)).max() < 5 * exact / np.sqrt(count)
    for shift in ((0, 3), (4, 0), (5, 6)):
        pairs = [part[:, 4, 5] * part[:, 4 + shift[0], 5 + shift[1]] for part in (fields[:, 0], fields[:, 1], full)]
        wanted = exact**2 * np.exp(-(shift[0] ** 2 + shift[1] ** 2) / (4 * sigma**2))
        assert all(abs(pair.mean() - wanted) < 5 * exact**2 / np.sqrt(count) for pair in pairs)
    assert abs((fields[:, 0] * fields[:, 1]).mean()) < 5 * exact**2 / np.sqrt(count)
    strengths = np.abs(draw_elastic(replace(elastic, alpha=(10, 20)), size, words)).max(axis=(1, 2, 3))
    assert 9 < strengths.min() and strengths.max() <= 20 and np.median(strengths) == pytest.approx(15, abs=0.5)


@pytest.mark.parametrize("width", [6, 10, 20])
def test_digits_become_as_wide_as_asked(width: int) -> None:
    image = np.full((28, 31, 3), 20, np.uint8)
    image[4:24, 2:14] = 250  # 12 wide
    image[4:24, 25, 1] = 20 + 32  # no ink
    made = resampled(image.astype(float), [digit_map(image, width, 20)], None, 1, np.full(3, 20.0))[..., 0]
    columns = (made - 20).sum(axis=0) / (230 * 20)  # how much of each column is ink
    assert columns.sum() == pytest.approx(width, rel=0.02)
    assert (columns * (np.arange(31) + 0.5)).sum() / columns.sum() == pytest.approx(15.5, abs=0.01)
    assert (made[4:24].max(axis=0) - 20 > 0).sum() <= width + 2 and (made[:4] == 20).all()
    empty = np.full((1, 9, 9, 3), 20, np.uint8)
    assert (digit_map(empty[0], 4, 20) == np.eye(2, 3)).all()
    bare = Augmentation(crop=9, mean="none", noise="none", mirror=False, normalised_width=4, background=20)
    views = resampled_views(torch.from_numpy(empty), centred(bare, np.array([[9, 9]])), bare, None)
    assert (views == 20).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"elastic": Elastic(), "mean": "crop"}, "elastic does not go with mean crop"),
        ({"elastic": Elastic(), "jitter": Jitter()}, "elastic does not go with jitter"),
        ({"normalised_width": 10, "grey": 0.5}, "normalised_width does not go with grey"),
        ({"elastic": Elastic(), "noise": "eigenvalue"}, "elastic does not go with noise eigenvalue"),
        ({"elastic": Elastic(), "affine": Affine(fill=3)}, "fill 3 is not the background, 0"),
        ({"elastic": Elastic(), "crop": None}, "elastic needs a crop"),
        ({"elastic": 3}, "elastic 3 is neither None nor Elastic"),
        ({"pad": 2, "scale": (0.5, 1)}, "pad 2 goes with a crop that is not resized"),
        ({"pad": 2, "mean": "crop"}, "pad 2 goes with"),
        ({"channels": 4}, "channels 4 is not"),
        ({"normalised_width": 0}, "normalised_width 0 is not"),
        ({"background": 256}, "background 256 is not"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(AlexprepError) as error:
        given: dict[str, Any] = {"crop": 20, "mean": "none", "noise": "none"} | options
        Augmentation(**given)
    assert words in str(error.value)


def test_bounds_of_elastic_distortion() -> None:
    wrong: list[dict[str, Any]] = [{"sigma": 0.5}, {"alpha": (3, 2)}, {"alpha": (0, 1)}]
    for options in wrong:
        with pytest.raises(AlexprepError, match="elastic: "):
            Elastic(**options)
