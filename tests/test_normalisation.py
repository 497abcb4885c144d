"""What is done in C behind DALI's decoding, against numpy and against DALI, which does it where there is no compiler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alexprep.pipeline import normalisation
from alexprep.pipeline.augmentation import PRESETS, Augmentation
from alexprep.pipeline.dali_ops import Dtype, MemoryFormat
from alexprep.pipeline.geometry import resize
from alexprep.pipeline.loader import Loader
from alexprep.pipeline.normalisation import Normaliser
from alexprep.shards import resample
from tests.support import compiled

AUGMENTATIONS = {
    "paper": Augmentation(crop=51),
    "rescaled": replace(PRESETS["2012-code"], crop=51),
    "channels": Augmentation(crop=(33, 50), mean="channel", std="channel", noise="none"),
    "bytes": Augmentation(crop=51, mean="none", noise="none"),
    "grey": Augmentation(crop=51, channels=1),
    "resized": replace(PRESETS["resized"], crop=37),
}


@pytest.fixture(scope="module", autouse=True)
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Both C sources, compiled and used."""
    folder = tmp_path_factory.mktemp("compiled")
    sources = (normalisation, "views.c"), (resample, "resize.c")
    paths = [Path(str(module.__file__)).parent / "compiled" / name for module, name in sources]
    views, resizes = (compiled.library(path, folder) for path in paths)
    functions = normalisation.loaded(views), resample._loaded(resizes)
    assert None not in functions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalisation, "compiled_views", lambda: functions[0])
        patch.setattr(resample, "compiled", lambda: functions[1])
        yield views


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("memory_format", ["NCHW", "NHWC"])
def test_equals_numpy_to_the_bit(memory_format: str, dtype: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    for width in (1, 2, 7, 64, 224):
        count, height = 5, 3
        windows = [random.integers(0, 256, (height, width + 2, 3), dtype=np.uint8)[:, 1:-1] for _ in range(count)]
        inputs: dict[str, Any] = {
            "mirror": random.integers(0, 2, count, dtype=np.int32),
            "minus": np.tile(random.normal(0, 40, (count, 1, 3)).astype(np.float32), (1, 1, width)),
            # So that float16 meets its smallest numbers and goes beyond its largest.
            "divisor": np.tile(2 ** random.uniform(-10, 34, (count, 1, 3)).astype(np.float32), (1, 1, width)),
        }
        means = random.uniform(0, 255, (count, height, width, 3)).astype(np.float32)
        for window in (None, means):
            given = inputs if window is None else inputs | {"window": list(window)}
            maker = Normaliser((height, width), False, memory_format, dtype, 3)
            made = maker(windows, given)
            np.testing.assert_array_equal(maker(np.stack(windows), given), made)
            maker.close()
            for n in range(count):
                mean = None if window is None else window[n]
                numbers = mean, inputs["minus"][n, 0], 1 / inputs["divisor"][n, 0], inputs["mirror"][n]
                with np.errstate(over="ignore"):
                    expected = normalisation.in_numpy(windows[n], *numbers, memory_format == "NCHW", dtype)
                np.testing.assert_array_equal(made[n], expected)


def test_all_halves_are_rounded_right() -> None:
    """Each half-precision number, its neighbours among floats, and what lies between two of them."""
    halves = np.arange(2**15, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    between = (halves[1:] + halves[:-1]) / 2
    values = np.concatenate(
        [halves, between, np.nextafter(between, 0), np.nextafter(between, 1e6), [65519, 65520, 1e9]]
    )
    width = -(-len(values) // 3)
    minus = np.zeros((1, 1, 3 * width), np.float32)
    minus[0, 0, : len(values)] = -values
    for sign in (1, -1):
        given = {"mirror": [0], "minus": minus, "divisor": np.full_like(minus, sign)}
        maker = Normaliser((1, width), False, "NHWC", "float16", 1)
        made = maker([np.zeros((1, width, 3), np.uint8)], given).reshape(-1)
        with np.errstate(over="ignore"):
            expected = (sign * -minus.reshape(-1)).astype(np.float16)
        np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize(
    ("memory_format", "dtype"),
    [("channels_last", "float32"), ("NCHW", "float32"), ("NHWC", "float16"), ("NCHW", "float16")],
)
def test_equals_dali(
    name: str, memory_format: MemoryFormat, dtype: Dtype, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels last to the bit, but for a resize, which rounds; channels first DALI sums in another order."""
    form: Any = {"batch_size": 20, "augmentation": AUGMENTATIONS[name], "memory_format": memory_format, "dtype": dtype}
    with Loader(data, threads=2, **form) as loader:
        ours = list(loader)
        assert loader._graph.normalises
    monkeypatch.setattr(normalisation, "available", lambda: False)
    with Loader(data, threads=1, **form) as loader:
        theirs = list(loader)
        assert not loader._graph.normalises
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.images.stride() == other.images.stride() and mine.images.dtype == other.images.dtype
        difference = (mine.images.float() - other.images.float()).abs()
        if name == "resized":
            assert difference.max() < 0.02 and (difference > 1e-3).float().mean() < 0.002  # a level is a 58th
        elif memory_format != "NCHW" and dtype == "float32":
            assert torch.equal(mine.images, other.images)
        else:
            assert difference.max() <= (1e-4 if dtype == "float32" else 0.13)


def test_resizes_as_the_definition(seed: int) -> None:
    """To the level that rounding makes, in one value of 1,000 at the most."""
    random = np.random.default_rng(seed)
    windows = [random.integers(0, 256, (*random.integers(1, 300, 2), 3), dtype=np.uint8) for _ in range(12)]
    inputs = {"mirror": np.arange(12) % 2}
    maker = Normaliser((57, 40), True, "NHWC", "float32", 2)
    for made, window, mirrored in zip(maker(windows, inputs), windows, inputs["mirror"], strict=True):
        expected = resize(window, (57, 40)).astype(int)
        difference = np.abs(made - (expected[:, ::-1] if mirrored else expected))
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    maker.close()


@pytest.mark.parametrize("by", ["numpy", "torch"])
def test_a_batch_s_memory_is_used_again_when_nothing_refers_to_it(by: str) -> None:
    maker = Normaliser((4, 4), False, "NHWC", "float32", 1)
    windows, inputs = [np.full((4, 4, 3), 7, np.uint8)], {"mirror": [0]}
    first = maker(windows, inputs)
    place = first.ctypes.data
    part = first[0, 1:] if by == "numpy" else torch.from_numpy(first)[0, 1:]
    del first
    second = maker(windows, inputs)
    assert second.ctypes.data != place and bool((part == 7).all())
    del part
    assert maker(windows, inputs).ctypes.data == place


def test_without_compiled_code_dali_does_it(libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert normalisation.available()
    right = normalisation.in_numpy
    monkeypatch.setattr(normalisation, "in_numpy", lambda *arguments: right(*arguments) + 1)
    assert normalisation.loaded(libraries) is None
    (tmp_path / "views.so").write_bytes(b"no library")
    assert normalisation.loaded(tmp_path / "views.so") is None
    monkeypatch.setattr(resample, "compiled", lambda: None)
    assert not normalisation.available()
