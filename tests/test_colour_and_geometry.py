"""Jitter, blur, affine maps, erasing, RandAugment and TrivialAugment: DALI against numpy, numpy against Pillow and scipy, and what is drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from alexprep.pipeline import colour, policies
from alexprep.pipeline.augmentation import Augmentation, Draws, augment, draw
from alexprep.pipeline.colour import Blur, Jitter, blurred, draw_recolouring, recolour
from alexprep.pipeline.dali_graph import Graph
from alexprep.pipeline.geometry import Affine, Erasing, inverse_maps, warp
from alexprep.pipeline.policies import OPERATIONS, RandAugment, TrivialAugment, operated, operation
from alexprep.pipeline.random_numbers import Words, words_of
from alexprep.shards.errors import AlexprepError
from tests.support.chances import check_as_often

SHAPES = ((61, 43), (33, 90), (40, 40), (57, 58))  # height, width: odd and oblong
PLAIN: dict[str, Any] = {"crop": 31, "mean": "none", "noise": "none"}
EVERYTHING: dict[str, Any] = {
    "affine": Affine(rotate=20, shift=(0.1, 0.2), zoom=(0.8, 1.2), shear=(5, 9)),
    "policy": RandAugment(),
    "jitter": Jitter(0.4, 0.4, 0.4, 0.1, share=0.8),
    "grey": 0.2,
    "blur": Blur(),
    "erasing": Erasing(),
}
# What is compared, and the share of pixels that rounding may move by a grey level.
CASES = {
    "jitter": (Augmentation(**PLAIN, jitter=Jitter(0.4, 0.4, 0.4, 0.1)), 0.0),
    "jitter of some": (Augmentation(**PLAIN, jitter=Jitter(1, 0, 0.8, 0.5, share=0.5), grey=0.3), 0.0),
    "blur": (Augmentation(**PLAIN, blur=Blur((0.1, 4))), 1e-3),
    "affine": (Augmentation(**PLAIN, affine=Affine(30, (0.1, 0.2), (0.5, 1.5), (10, 20), fill=77, share=0.8)), 1e-3),
    "resized and turned": (
        Augmentation(
            crop=(31, 26),
            scale=(0.3, 1),
            mean="imagenet",
            std="imagenet",
            noise="none",
            affine=Affine(30, (0.1, 0.2), (0.5, 1.5), (10, 20)),
        ),
        0.02,
    ),
    "erasing": (Augmentation(**PLAIN, erasing=Erasing(value=3.5)), 0.0),
    "rand": (Augmentation(**PLAIN, policy=RandAugment(3, 11)), 0.01),
    "trivial": (Augmentation(**PLAIN, policy=TrivialAugment(fill=40)), 0.01),
    "all": (Augmentation(crop=31, scale=(0.3, 1), mean="imagenet", std="imagenet", noise="none", **EVERYTHING), 0.1),
}


def _graph(augmentation: Augmentation, count: int, device: str = "cpu", **options: Any) -> Graph:
    usual: dict[str, Any] = {"views": "random", "dtype": "float32", "memory_format": "NCHW"} | options
    return Graph(
        augmentation,
        None,
        raw=True,
        size=None,
        batch_size=count,
        threads=1,
        device=device,
        device_id=None if device == "cpu" else 0,
        decode=device,
        hw_decoder_load=0.5,
        **usual,
    )


def _both(
    augmentation: Augmentation, images: list[NDArray[np.uint8]], **options: Any
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What DALI and what the definition make of these images, (N, H, W, 3) each."""
    count, sizes = len(images), np.array([image.shape[:2] for image in images])
    draws = draw(augmentation, 3, 1, np.arange(count), sizes)
    graph = _graph(augmentation, count, **options)
    pipeline = graph.pipeline()
    pipeline.build()
    for name, values in {"encoded": images, **graph.inputs(1, draws, sizes)}.items():
        pipeline.feed_input(name, values)
    (output,) = pipeline.run()
    found = np.asarray(output.as_tensor()).astype(np.float64)
    if graph.memory_format == "NCHW":
        found = found.transpose(0, 2, 3, 1)
    return found, np.stack([augment(image, draws, n, augmentation, None, 1) for n, image in enumerate(images)])


@pytest.fixture(scope="module")
def pictures(photo: Callable[..., Image.Image]) -> list[NDArray[np.uint8]]:
    shapes = itertools.islice(itertools.cycle(SHAPES), 40)
    return [np.asarray(photo(width, height, seed=n)) for n, (height, width) in enumerate(shapes)]


@pytest.mark.parametrize("name", CASES)
def test_dali_equals_the_definition(name: str, pictures: list[NDArray[np.uint8]]) -> None:
    """To 1e-3 grey levels, but for pixels that lie halfway between two levels, which either way may round."""
    augmentation, halfway = CASES[name]
    scale = 1.0 if augmentation.std == "none" else 57.0
    for memory_format in ("NHWC", "NCHW"):
        found, expected = _both(augmentation, pictures, memory_format=memory_format)
        difference = np.abs(found - expected)
        assert (difference > 1e-3 / scale).mean() <= halfway
        assert difference.max() <= (4 if name in ("rand", "all") else 1.001) / scale  # later operations make more of it
    assert len(np.unique(expected.reshape(len(expected), -1), axis=0)) == len(expected)


def test_bytes_are_rounded_and_evaluation_is_without_chance(pictures: list[NDArray[np.uint8]]) -> None:
    augmentation = Augmentation(**PLAIN, jitter=Jitter(0.4, 0.4, 0.4, 0.1), policy=TrivialAugment(), blur=Blur())
    found, expected = _both(augmentation, pictures, dtype="uint8")
    assert np.abs(found - expected).max() <= 2.5
    everything = Augmentation(**PLAIN, **EVERYTHING)
    for views in ("centre", "ten"):
        assert _graph(everything, 4, views=views).input_names <= {"start", "mirror", "minus", "divisor"}


def test_the_graph_for_a_gpu_can_be_written_down() -> None:
    """Every operator that it needs is there for a GPU, and takes its inputs from where they are."""
    augmentation = Augmentation(crop=31, scale=(0.3, 1), mean="imagenet", std="imagenet", noise="none", **EVERYTHING)
    for dtype, memory_format in (("float32", "NCHW"), ("float16", "NHWC")):
        _graph(augmentation, 4, "cuda", dtype=dtype, memory_format=memory_format).pipeline()


# The definitions, against other people's code.


@pytest.fixture(scope="module")
def image(photo: Callable[..., Image.Image]) -> NDArray[np.uint8]:
    return np.asarray(photo(61, 43, seed=8))


ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def _adjusted(image: NDArray[Any], which: int, value: float) -> NDArray[np.float64]:
    values = [1.0, 1.0, 1.0, 0.0]
    values[which] = value
    return recolour(image, colour.recolouring(*(np.array([each]) for each in values))[0])


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.7])
def test_jitter_is_pillow_s(factor: float, image: NDArray[np.uint8]) -> None:
    """Pillow rounds the mean grey level, each pixel's own, and the result."""
    for which, enhance in enumerate(ENHANCERS):
        pillow = np.asarray(enhance(Image.fromarray(image)).enhance(factor)).astype(float)
        assert np.abs(_adjusted(image, which, factor) - pillow).max() <= 1 + 0.5 * abs(1 - factor) + 1e-9


def test_grey_and_hue(image: NDArray[np.uint8]) -> None:
    def words(purpose: int) -> NDArray[np.uint64]:
        return words_of(0, 0, np.arange(4), purpose)

    grey = recolour(image, draw_recolouring(None, 1.0, words)[0])
    assert np.ptp(grey, axis=2).max() < 1e-9
    assert np.abs(grey[..., 0] - np.asarray(Image.fromarray(image).convert("L"))).max() <= 0.51
    quarter = _adjusted(image // 3 + 80, 3, 0.25)
    assert np.abs((quarter - (image // 3 + 80)) @ colour.LUMA).max() < 1e-3
    np.testing.assert_allclose(_adjusted(image, 3, 1.0), image, atol=1e-9)
    red = np.tile(np.array([[[120, 60, 60]]], np.uint8), (2, 2, 1))
    turned = _adjusted(red, 3, 1 / 6)[0, 0]
    assert turned[1] > turned[2] and turned[0] > turned[2]  # towards yellow


def test_adjustments_follow_one_another_in_any_order(image: NDArray[np.uint8]) -> None:
    """All four at once are one after the other, whichever way round; Pillow's three too, but for what it rounds, where nothing is clamped."""
    mild = (image // 4 + 90).astype(np.uint8)
    values = (1.3, 1.4, 1.2, 0.08)
    whole = recolour(mild, colour.recolouring(*(np.array([value]) for value in values))[0])
    for order in itertools.permutations(range(4)):
        ours, pillow = mild.astype(float), Image.fromarray(mild)
        for which in order:
            ours = _adjusted(ours, which, values[which])
        assert np.abs(ours - whole).max() < 1e-9
        for which in order:
            pillow = ENHANCERS[which](pillow).enhance(values[which]) if which < 3 else pillow
        without_hue = recolour(mild, colour.recolouring(*(np.array([value]) for value in (*values[:3], 0.0)))[0])
        assert np.abs(without_hue - np.asarray(pillow)).max() < 4


def test_blur_is_scipy_s(image: NDArray[np.uint8]) -> None:
    for sigma in (0.3, 1.0, 2.7):
        kernel = colour.gaussian(sigma)
        exact = image.astype(float)
        for axis in (0, 1):
            exact = scipy.ndimage.correlate1d(exact, kernel, axis, mode="mirror")
        assert np.abs(blurred(image, sigma) - exact).max() <= 1.01
        np.testing.assert_allclose(
            kernel,
            scipy.ndimage.gaussian_filter1d(
                np.eye(len(kernel))[len(kernel) // 2], sigma, truncate=math.ceil(3 * sigma) / sigma
            ),
            atol=1e-9,
        )
    np.testing.assert_array_equal(blurred(image, 0.0), image)


def _map(image: NDArray[np.uint8], *values: float) -> NDArray[np.float64]:
    maps = inverse_maps(np.array([image.shape[:2]]), *(np.array([value]) for value in values))
    return np.asarray(maps[0])


def test_warps_are_pillow_s(image: NDArray[np.uint8]) -> None:
    """Pillow is given the inverse map; at the edge of what the image covers it has a rule of its own."""
    chosen = _map(image, math.radians(25), 1.2, 0.2, -0.1, 3.0, -2.5)
    for nearest, kind in ((True, Image.Resampling.NEAREST), (False, Image.Resampling.BILINEAR)):
        ours = warp(image, chosen, 0, nearest).astype(int)
        method, data = Image.Transform.AFFINE, chosen.ravel().tolist()
        pillow = np.asarray(Image.fromarray(image).transform((61, 43), method, data, kind)).astype(int)
        inside = warp(np.full_like(image, 255), chosen, 0, nearest) == 255
        apart = np.abs(ours - pillow)[inside]
        assert inside.mean() > 0.7 and (apart > 1).mean() < 0.005  # Pillow counts in 65,536ths of a pixel
    quarter_turn = warp(np.ascontiguousarray(image[:, :43]), _map(image[:, :43], math.pi / 2, 1, 0, 0, 0, 0), 0, True)
    np.testing.assert_array_equal(quarter_turn, np.rot90(image[:, :43], -1))  # clockwise
    shifted = warp(image, _map(image, 0, 1, 0, 0, 5, 7), 9, False)
    np.testing.assert_array_equal(shifted[7:, 5:], image[:-7, :-5])
    assert (shifted[:7] == 9).all() and (shifted[:, :5] == 9).all()


def test_operations_of_policies_are_pillow_s(image: NDArray[np.uint8]) -> None:
    picture = Image.fromarray(image)
    sizes = np.tile(image.shape[:2], (len(OPERATIONS), 1))
    every = np.arange(len(OPERATIONS))
    negative = np.zeros(len(OPERATIONS), bool)
    drawn = operation(RandAugment(), every, np.full(len(every), 15), negative, sizes)
    ours = dict(zip(OPERATIONS, (operated(image, drawn, n, 0).astype(int) for n in every.tolist()), strict=True))
    factor = 1 + 0.9 / 2
    exact = {
        "identity": picture,
        "posterize": ImageOps.posterize(picture, 6),
        "solarize": ImageOps.solarize(picture, 128),
    }
    for name, pillow in exact.items():
        np.testing.assert_array_equal(ours[name], np.asarray(pillow))
    near = {
        "brightness": (ImageEnhance.Brightness(picture).enhance(factor), 1),
        "color": (ImageEnhance.Color(picture).enhance(factor), 1),
        "contrast": (ImageEnhance.Contrast(picture).enhance(factor), 1),
        "sharpness": (ImageEnhance.Sharpness(picture).enhance(factor), 1),
        "autocontrast": (ImageOps.autocontrast(picture), 1),
    }
    for name, (pillow, levels) in near.items():
        apart = np.abs(ours[name] - np.asarray(pillow).astype(int))[1:-1, 1:-1]  # Pillow does not smooth the border
        assert apart.max() <= levels, name
    np.testing.assert_array_equal(ours["translate_x"][:, 13:], image[:, :-13])  # 150 / 331 * 61 / 2
    np.testing.assert_array_equal(ours["translate_y"][9:], image[:-9])
    np.testing.assert_array_equal(ours["rotate"], warp(image, _map(image, math.radians(15), 1, 0, 0, 0, 0), 0, True))
    np.testing.assert_array_equal(ours["shear_y"], warp(image, _map(image, 0, 1, 0, 0.15, 0, 0), 0, True))
    # Pillow counts in whole 255ths of the pixels.
    large = np.asarray(picture.resize((500, 400), Image.Resampling.BICUBIC))
    theirs = np.asarray(ImageOps.equalize(Image.fromarray(large))).astype(int)
    assert np.abs(policies.equalized(large) - theirs).max() <= 2
    for flat in (policies.stretched, policies.equalized):
        np.testing.assert_array_equal(flat(np.full_like(image, 7)), np.full_like(image, 7))


def test_strengths_of_both_tables() -> None:
    """The ends of the ranges in torchvision's RandAugment and TrivialAugmentWide."""
    every, negative = np.arange(len(OPERATIONS)), np.ones(len(OPERATIONS), bool)
    sizes = np.full((len(OPERATIONS), 2), 331)
    place = {name: n for n, name in enumerate(OPERATIONS)}
    for policy, shear, shift, degrees, factor, bits in (
        (RandAugment(), 0.3, 150, 30, 0.1, 4),
        (TrivialAugment(), 0.99, 32, 135, 0.01, 2),
    ):
        drawn = operation(policy, every, np.full(len(every), 30), negative, sizes)
        assert drawn["map"][place["translate_x"]].tolist() == [[1, 0, shift], [0, 1, 0]]
        np.testing.assert_allclose(drawn["map"][place["shear_x"], 0, 1], shear)
        np.testing.assert_allclose(drawn["map"][place["rotate"], 0, 0], math.cos(math.radians(degrees)))
        for name in ("brightness", "color", "contrast", "sharpness"):
            np.testing.assert_allclose(drawn["factor"][place[name]], factor)
        assert drawn["mask"][place["posterize"]] == 256 - 2 ** (8 - bits)
        assert drawn["threshold"][place["solarize"]] == 0
        none = operation(policy, every, np.zeros(len(every), int), negative, sizes)
        assert (none["factor"] == 1).all() and none["mask"][place["posterize"]] == 255
        np.testing.assert_array_equal(none["map"], np.tile(np.eye(2, 3), (len(every), 1, 1)))


# What is drawn.


def _uniform(values: NDArray[Any], low: float, high: float, bins: int = 20) -> None:
    """Chi-squared at 99.99 %."""
    counts, _ = np.histogram(values, bins, (low, high))
    assert counts.sum() == len(values)
    check_as_often(counts, [1] * len(counts))


def _words(seed: int, count: int) -> Words:
    return lambda purpose: words_of(seed, 5, np.arange(count), purpose)


def test_jitter_has_the_stated_distribution(seed: int) -> None:
    """torchvision's: factors uniform on [max(0, 1 - b), 1 + b], the hue's turn on [-h, h]; and the stated shares."""
    count = 20_000
    words = _words(seed, count)
    for position, most in ((0, 0.4), (1, 1.5), (2, 0.8)):
        settings = {("brightness", "contrast", "saturation")[position]: most}
        drawn = draw_recolouring(Jitter(**settings), 0.0, words)
        factor = drawn[:, 0, 0] if position < 2 else (drawn[:, 0, 0] - 0.299) / (1 - 0.299)
        _uniform(factor, max(0.0, 1 - most), 1 + most)
    turned = draw_recolouring(Jitter(hue=0.1), 0.0, words)[:, :, :3]
    angle = np.arccos(np.clip((np.trace(turned, axis1=1, axis2=2) - 1) / 2, -1, 1)) / (2 * np.pi)
    _uniform(angle, 0, 0.1)
    some = draw_recolouring(Jitter(brightness=0.4, share=0.3), 0.2, words)
    greyed = np.abs(some[:, 0, :3] - some[:, 1, :3]).max(axis=1) < 1e-12
    same = (some[:, :, :3] == np.eye(3)).all(axis=(1, 2))
    assert abs(greyed.mean() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / count)
    assert abs(same.mean() - 0.7 * 0.8) < 4 * math.sqrt(0.56 * 0.44 / count)


def test_shapes_have_the_stated_distribution(seed: int) -> None:
    count = 20_000
    sizes = np.tile([200, 300], (count, 1))

    def drawn(**settings: Any) -> Mapping[str, NDArray[Any]]:
        augmentation = Augmentation(crop=None, mean="none", noise="none", **settings)
        return draw(augmentation, seed, 0, np.arange(count), sizes).more

    maps = drawn(affine=Affine(rotate=40))["affine"]
    _uniform(np.degrees(np.arctan2(maps[:, 0, 1], maps[:, 0, 0])), -40, 40)
    _uniform(1 / drawn(affine=Affine(zoom=(0.5, 2)))["affine"][:, 0, 0], 0.5, 2)
    _uniform(np.degrees(np.arctan(drawn(affine=Affine(shear=(20, 0)))["affine"][:, 0, 1])), -20, 20)
    shifts = drawn(affine=Affine(shift=(0.1, 0.3)))["affine"][:, :, 2]
    _uniform(shifts[:, 0], -30, 30)
    _uniform(shifts[:, 1], -60, 60)
    some = drawn(
        affine=Affine(rotate=9, share=0.25),
        blur=Blur((0.5, 1.5), share=0.4),
        erasing=Erasing(share=0.3, area=(0.1, 0.2), ratio=(0.5, 2)),
    )
    changed = (some["affine"] != np.eye(2, 3)).any(axis=(1, 2))
    assert abs(changed.mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / count)
    sigma = some["sigma"]
    assert abs((sigma > 0).mean() - 0.4) < 4 * math.sqrt(0.4 * 0.6 / count)
    _uniform(sigma[sigma > 0], 0.5, 1.5)
    boxes = some["erased"][some["erased"][:, 2] > 0]
    assert abs(len(boxes) / count - 0.3) < 4 * math.sqrt(0.3 * 0.7 / count)
    area = boxes[:, 2:].prod(axis=1) / (200 * 300)
    _uniform(area[(area > 0.102) & (area < 0.198)], 0.102, 0.198, 10)  # sides are whole pixels
    logs = np.log(boxes[:, 2] / boxes[:, 3])
    _uniform(logs[np.abs(logs) < 0.68], -0.68, 0.68, 10)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= [200, 300]).all()
    _uniform(boxes[:, 0] / (200 - boxes[:, 2] + 1), 0, 1, 10)


def test_policies_draw_each_operation_alike(seed: int) -> None:
    count = 14_000
    sizes = np.full((count, 2), 224)
    for policy in (RandAugment(operations=3), TrivialAugment()):
        turns = policies.draw_policy(policy, sizes, _words(seed, count))
        assert len(turns) == policy.operations
        check_as_often(np.bincount(turns[0]["kind"]), [1, 5, 2, 1, 2, 1, 1, 1])  # of 14 operations
        if isinstance(policy, RandAugment):
            assert len({turn["kind"].tobytes() for turn in turns}) == 3
            assert set(np.round(turns[0]["factor"], 6).tolist()) == {1.27, 0.73}
        else:
            sharp = turns[0]["factor"][turns[0]["kind"] == policies.SHARPENED]
            steps = np.rint(np.abs(sharp - 1) / 0.99 * 30).astype(int)
            check_as_often(np.bincount(steps), [1] * 31)
            assert abs((sharp[steps > 0] > 1).mean() - 0.5) < 4 * 0.5 / math.sqrt(len(sharp))


def test_draws_do_not_depend_on_company() -> None:
    augmentation = Augmentation(crop=31, mean="none", noise="none", **EVERYTHING)
    rows, sizes = np.arange(60), np.tile([40, 50], (60, 1))
    whole = draw(augmentation, 9, 4, rows, sizes)
    for part in (rows[17:18], rows[::-1], rows[[5, 5, 40]]):
        alone = draw(augmentation, 9, 4, part, sizes[part])
        assert alone.more.keys() == whole.more.keys()
        for name, values in alone.more.items():
            np.testing.assert_array_equal(values, whole.more[name][part])
    other = draw(augmentation, 9, 5, rows, sizes)
    assert all((other.more[name] != whole.more[name]).any() for name in ("affine", "recolouring", "sigma", "erased"))
    kept = whole.only([3, 1])
    np.testing.assert_array_equal(kept.more["affine"], whole.more["affine"][[3, 1]])


def test_what_was_drawn_before_stays_as_it_is() -> None:
    """Windows, mirrors and noise of runs that began without these options are those of runs with them."""
    rows, sizes = np.arange(30), np.tile([40, 50], (30, 1))
    plain, more = (draw(Augmentation(**PLAIN, **added), 9, 4, rows, sizes) for added in ({}, EVERYTHING))
    assert plain.more == {} and isinstance(plain, Draws)
    for name in ("windows_N4", "mirror_N", "alpha_N3"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(more, name))
    fixed = draw(Augmentation(**PLAIN, **EVERYTHING), 7, 3, np.array([1]), np.array([[40, 50]]))
    np.testing.assert_allclose(fixed.more["recolouring"][0, 0, :3], [1.21680441, 0.11960514, -0.01703348], atol=1e-8)
    assert fixed.more["erased"].tolist() == [[1, 8, 29, 9]] and fixed.more["policy1.kind"].tolist() == [0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Jitter(brightness=-0.1), "jitter: brightness -0.1"),
        (lambda: Jitter(hue=0.6), r"jitter: hue 0.6 is not a number in \[0, 0.5\]"),
        (lambda: Blur(sigma=(2, 1)), "blur: sigma"),
        (lambda: Blur(share=2), "blur: share 2"),
        (lambda: Affine(rotate=181), "affine: rotate 181"),
        (lambda: Affine(shift=0.1), "affine: shift 0.1 is not two numbers"),  # type: ignore[arg-type]
        (lambda: Affine(shear=(0, 90)), "affine: shear 90"),
        (lambda: Affine(zoom=(0, 1)), "affine: zoom"),
        (lambda: Erasing(area=(0.5, 0.1)), "erasing: area"),
        (lambda: Erasing(ratio=(0, 1)), "erasing: ratio"),
        (lambda: RandAugment(strength=31), "policy: strength 31"),
        (lambda: RandAugment(operations=0), "policy: operations 0"),
        (lambda: TrivialAugment(fill=300), "policy: fill 300"),
        (lambda: Augmentation(grey=1.5), "grey 1.5"),
        (lambda: Augmentation(policy="rand"), r"policy 'rand' is neither None nor RandAugment\(…\) or Trivial"),  # type: ignore[arg-type]
        (lambda: _graph(Augmentation(**PLAIN, erasing=Erasing()), 1, dtype="uint8"), "dtype uint8 holds grey levels"),
    ],
)
def test_what_is_out_of_bounds_is_named(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(AlexprepError, match=words):
        make()
