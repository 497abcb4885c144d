"""Resampling against its definition in float64, and against Pillow's independent implementation."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from alexprep.shards import resample
from alexprep.shards.image_codec import Fit, Target
from alexprep.shards.resample import FILTERS, Axis, Resize, weights
from tests.support import compiled

SECONDS = 3600  # for 100,000 shapes, however busy the machine

SHAPES = [(375, 500), (500, 331), (301, 1203), (257, 256), (64, 97), (1031, 777)]
_PILLOW = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """resize.c, compiled."""
    source = Path(resample.__file__).parent / "compiled" / "resize.c"
    return compiled.library(source, tmp_path_factory.mktemp("compiled"))


@pytest.fixture(params=["compiled", "numpy"])
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything that resizes runs with the compiled code, then without."""
    function = None
    if request.param == "compiled":
        function = resample._loaded(request.getfixturevalue("library"))
        assert function is not None
    monkeypatch.setattr(resample, "compiled", lambda: function)
    yield


def _axes(height: int, width: int, size: int) -> tuple[Axis, Axis]:
    scale = size / min(height, width)
    targets = [max(size, int(np.floor(side * scale + 0.5))) for side in (height, width)]
    vertical, horizontal = (Axis(s, t, (t - size) // 2, size) for s, t in zip((height, width), targets, strict=True))
    return vertical, horizontal


def _dense(axis: Axis, name: str) -> NDArray[np.float64]:
    first, w = weights(axis, name)
    matrix = np.zeros((axis.count, axis.source))
    for i in range(axis.count):
        for t in range(len(w)):
            matrix[i, np.clip(first[i] + t, 0, axis.source - 1)] += w[t, i]
    return matrix


def _resize(image: NDArray[np.uint8], size: int, name: str) -> NDArray[np.uint8]:
    resize = Resize(*_axes(image.shape[0], image.shape[1], size), name)
    top, left, bottom, right = resize.region
    return resize(image[top:bottom, left:right])


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_weights_in_float64(name: str, shape: tuple[int, int], seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    vertical, horizontal = _axes(*shape, 96)
    rows = np.einsum("ij,jkc->ikc", _dense(vertical, name), image.astype(np.float64))
    exact = np.einsum("lk,ikc->ilc", _dense(horizontal, name), rows)
    error = np.abs(_resize(image, 96, name) - np.clip(exact, 0, 255))
    assert error.max() < 0.75  # 0.5 is the final rounding alone
    assert error.mean() < 0.26


def _fixed(axis: Axis, name: str, bits: int) -> NDArray[np.float64]:
    """The matrix in multiples of 2**-bits, integers: each output's running sums rounded, then their differences."""
    first, w = weights(axis, name)
    sums = np.rint(w.cumsum(axis=0) * 2**bits)
    matrix = np.zeros((axis.count, axis.source))
    places = np.clip(first + np.arange(len(w))[:, None], 0, axis.source - 1)
    np.add.at(matrix, (np.arange(axis.count), places), np.diff(sums, axis=0, prepend=0))
    return matrix


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("size", [1, 5, 96, 227])
def test_the_pixels_are_those_of_integers(code: None, name: str, size: int, seed: int) -> None:
    """Every bit, for any shape: the shards' bytes depend on it. Blocks, groups and float32 must leave no trace."""
    random = np.random.default_rng(seed)
    shapes = [(1, 1), (1, 9), (3, 2), (size, size), (size + 1, 2 * size), (40, 700)]
    for height, width in [*shapes, *random.integers(1, 500, (6, 2)).tolist()]:
        image = random.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255  # extremes overshoot most
        vertical, horizontal = _axes(height, width, size)
        middle = np.rint(np.tensordot(_fixed(vertical, name, 15), image, (1, 0)) / 2**13)
        exact = np.tensordot(middle, _fixed(horizontal, name, 12), (1, 1)).transpose(0, 2, 1) / 2**14
        np.testing.assert_array_equal(_resize(image, size, name), np.clip(np.rint(exact), 0, 255))


def test_threads_do_not_share_memory(code: None, seed: int) -> None:
    shapes = [(375, 500), (90, 101), (600, 401), (96, 96)] * 4
    images = [np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    alone = [_resize(image, 96, "bicubic") for image in images]
    with ThreadPoolExecutor(4) as pool:
        for expected, got in zip(alone * 5, pool.map(_resize, images * 5, [96] * 80, ["bicubic"] * 80), strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_area_is_the_covered_share(shape: tuple[int, int]) -> None:
    """The area filter by its definition: the integral of the piecewise constant image over each output pixel."""
    vertical, _ = _axes(*shape, 50)
    step = vertical.source / vertical.target
    matrix = _dense(vertical, "area")
    for i in range(vertical.count):
        low, high = (vertical.offset + i) * step, (vertical.offset + i + 1) * step
        covered = [max(0.0, min(j + 1, high) - max(j, low)) / step for j in range(vertical.source)]
        np.testing.assert_allclose(matrix[i], covered, atol=1e-12)


@pytest.mark.parametrize("name", sorted(_PILLOW))
@pytest.mark.parametrize("shape", [(375, 500), (301, 203), (60, 97)])
def test_agrees_with_pillow(name: str, shape: tuple[int, int], photo: object) -> None:
    # Kept off 0 and 255: Pillow clips between the two axes, we only at the end.
    image = 60 + np.asarray(photo(shape[1], shape[0], seed=1)) // 2  # type: ignore[operator]
    vertical, horizontal = _axes(*shape, 96)
    whole = Image.fromarray(image).resize((horizontal.target, vertical.target), _PILLOW[name])
    theirs = np.asarray(whole)[vertical.offset :, horizontal.offset :][:96, :96].astype(int)
    difference = np.abs(theirs - _resize(image, 96, name))
    assert difference.max() <= 1  # Pillow rounds to whole grey levels between the two axes
    assert difference.mean() < 0.3


@pytest.mark.parametrize("name", FILTERS)
def test_a_flat_image_stays_flat(code: None, name: str) -> None:
    for level in (0, 1, 127, 254, 255):
        image = np.full((211, 340, 3), level, np.uint8)
        assert (_resize(image, 64, name) == level).all()


@pytest.mark.parametrize("name", FILTERS)
def test_products_are_exact_in_float32(name: str) -> None:
    """The sum of absolute weights stays below what the bits were chosen for."""
    for source in (3, 17, 63, 64, 65, 100, 257, 1000, 5003):
        _, w = weights(Axis(source, 64, 0, 64), name)
        assert np.abs(w).sum(axis=0).max() < 1.6


def test_only_the_region_is_read() -> None:
    """Pixels outside the region have no weight: the region's box is all that an axis reads."""
    for name in FILTERS:
        vertical, horizontal = _axes(301, 1203, 64)
        resize = Resize(vertical, horizontal, name)
        top, left, bottom, right = resize.region
        assert 0 <= top < bottom <= 301 and 0 < left < right < 1203
        used = np.flatnonzero(_dense(horizontal, name).any(axis=0))
        assert (used[0], used[-1] + 1) == (left, right)


def _random_resize(random: np.random.Generator) -> tuple[Resize, tuple[int, int]]:
    """A resize as any target may have it, of an image with these sides: of a pixel or a row, oblong, enlarged, or large."""

    def side(most: float) -> int:
        return int(2 ** random.uniform(0, most))

    while True:
        long = random.random() < 0.02
        height, width = (side(12.5), side(5)) if long else (side(9.3), side(9.3))
        shape = (height, width) if random.random() < 0.5 else (width, height)
        fits = [name for name in get_args(Fit) if name != "none"]
        target = Target(
            size=(side(8.3), side(8.3)),
            fit=fits[random.integers(len(fits))],
            filter=FILTERS[random.integers(len(FILTERS))],  # type: ignore[arg-type]
            only_shrink=bool(random.random() < 0.1),
        )
        resize = target.resize(*shape)
        if (
            random.random() < 0.2
        ):  # as of pictures decoded to a part of their size, whose last pixels are only partly of the image
            axes = (resize.vertical, resize.horizontal)
            parts = [replace(axis, extent=axis.source - random.uniform(0, 0.9)) for axis in axes]
            resize = replace(resize, vertical=parts[0], horizontal=parts[1])
        if not resize.only_cuts and resize.size[0] * resize.size[1] <= 2**18:
            return resize, shape


def test_compiled_code_equals_numpy_for_any_shape(library: Path, whole: bool, seed: int) -> None:
    """Every bit: of 100,000 shapes with `make stress`."""
    function = resample._loaded(library)
    assert function is not None
    for number in range(100_000 if whole else 250):
        random = np.random.default_rng([seed, number])
        resize, shape = _random_resize(random)
        image = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
        if number % 2:
            image = np.where(image < 128, 0, 255).astype(np.uint8)  # extremes overshoot most
        top, left, bottom, right = resize.region
        box = image[top:bottom, left:right]
        assert np.array_equal(function(*resize._taps, box), resize.in_numpy(box)), (number, resize)


def test_compiled_code_that_differs_is_not_used(library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = Resize.in_numpy
    monkeypatch.setattr(Resize, "in_numpy", lambda self, pixels: right(self, pixels) ^ 1)
    assert resample._loaded(library) is None
    (tmp_path / "resize.so").write_bytes(b"no library")
    assert resample._loaded(tmp_path / "resize.so") is None
    assert resample._loaded(tmp_path / "absent.so") is None


def test_rows_that_lie_apart_and_turned_images(code: None, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (90, 131, 3), dtype=np.uint8)
    for view in (image, image[::-1], image[:, ::-1], image.transpose(1, 0, 2), image[5:80:2, 7:120]):
        np.testing.assert_array_equal(_resize(view, 33, "lanczos"), _resize(view.copy(), 33, "lanczos"))
