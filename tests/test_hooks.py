"""Operations of the user's own in the augmentation: at every place, exact on resume and over ranks, and part of a run's identity."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, math, types

from alexprep.pipeline.augmentation import PRESETS, Augmentation, Hook, augment, draw
from alexprep.pipeline.loader import Loader
from alexprep.shards.errors import AlexprepError
from alexprep.train.config import TrainConfig
from alexprep.train.evaluation import evaluate_run
from alexprep.train.trainer import train

BYTES = Augmentation(crop=51, mirror=False, mean="none", noise="none")
IMAGENET = replace(BYTES, mean="imagenet", std="imagenet")


def dim(image: Any, share: Any) -> Any:
    """Grey levels times a random number, rounded."""
    return fn.cast(math.clamp(image * share, 0, 255), dtype=types.UINT8)


def upside_down(image: Any) -> Any:
    return fn.flip(image, horizontal=0, vertical=1)


def add(image: Any, first: Any, second: Any, factor: float = 10.0) -> Any:
    return image + (first - second) * factor


def widen(image: Any) -> Any:
    return fn.resize(image, size=(90, 120))


def _images(data: Path, augmentation: Augmentation, **options: Any) -> NDArray[np.float32]:
    """Those of an epoch as stored, (N, H, W, 3)."""
    usual: dict[str, Any] = {"batch_size": 20, "seed": 3, "memory_format": "NHWC", "order": "sequential"}
    with Loader(data, augmentation=augmentation, **(usual | options)) as loader:
        return np.concatenate([batch.images.numpy() for batch in loader])


def _numbers(hook: Hook, augmentation: Augmentation, count: int = 48) -> list[NDArray[np.float64]]:
    whole = replace(augmentation, hooks=(hook,))
    more = draw(whole, 3, 0, np.arange(count), np.full((count, 2), 64)).more
    return [more[f"hook0.{n}"][:, None, None, None] for n in range(hook.numbers)]


def test_each_place(data: Path) -> None:
    plain = _images(data, BYTES)
    dimmed = _images(data, replace(BYTES, hooks=(Hook(dim),)))
    (share,) = _numbers(Hook(dim), BYTES)
    assert np.abs(dimmed - np.rint(plain * share)).max() <= 1 and len(np.unique(share)) == 48
    turned = _images(data, replace(BYTES, hooks=(Hook(dim), Hook(upside_down))))
    np.testing.assert_array_equal(turned, dimmed[:, ::-1])
    first, second = _numbers(Hook(add, "tensor"), IMAGENET)
    added = _images(data, replace(IMAGENET, hooks=(Hook(add, "tensor"),)))
    np.testing.assert_allclose(added, _images(data, IMAGENET) + 10 * (first - second), atol=1e-4)
    resized = replace(PRESETS["resized"], crop=33, hooks=(Hook(widen, "decode"), Hook(upside_down, "decode")))
    assert _images(data, resized).shape == (48, 33, 33, 3)
    for views in ("centre", "ten"):  # they are for training
        np.testing.assert_array_equal(
            _images(data, replace(BYTES, hooks=(Hook(dim),)), views=views), _images(data, BYTES, views=views)
        )


def test_numbers_are_uniform_and_a_matter_of_the_sample(seed: int) -> None:
    count = 20_000
    augmentation = replace(BYTES, hooks=(Hook(dim), Hook(add)))
    more = draw(augmentation, seed, 4, np.arange(count), np.full((count, 2), 64)).more
    drawn = np.stack([more[name] for name in ("hook0.0", "hook1.0", "hook1.1")])
    for values in drawn:
        counts, _ = np.histogram(values, 20, (0, 1))
        assert ((counts - count / 20) ** 2 / (count / 20)).sum() < 54  # chi-squared, 99.99 %
    assert np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 4 / np.sqrt(count)
    alone = draw(augmentation, seed, 4, np.array([17]), np.full((1, 2), 64)).more
    assert all(alone[name] == more[name][17] for name in alone)


def test_hooks_are_exact_on_resume_and_over_ranks(data: Path) -> None:
    options: Any = {"augmentation": replace(IMAGENET, hooks=(Hook(add, "tensor"), Hook(dim))), "batch_size": 20}
    with Loader(data, **options) as loader:
        first = next(iter(loader))
        state = loader.state_dict()
        second = next(iter(loader))
    assert not torch.equal(first.images, second.images)
    parts = []
    for rank in range(2):
        with Loader(data, rank=rank, world_size=2, **options) as loader:
            loader.load_state_dict(state)
            parts.append(next(iter(loader)).images)
    assert torch.equal(torch.cat(parts), second.images)


def broken(image: Any) -> Any:
    raise KeyError("no such thing")


def nothing(image: Any) -> None:
    return None


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Hook(3), AlexprepError, "hook 3 is not a function"),  # type: ignore[arg-type]
        (lambda: Hook(dim, "before"), AlexprepError, "hook: after 'before' is not one of decode, augment, tensor"),  # type: ignore[arg-type]
        (lambda: Hook(lambda: None), AlexprepError, "its random numbers -1"),
        (lambda: Augmentation(hooks=dim), AlexprepError, "hooks .* are not a tuple"),  # type: ignore[arg-type]
        (lambda: Hook(broken), KeyError, "no such thing"),
        (lambda: Hook(nothing), AlexprepError, "hook .*:nothing gives a NoneType, not the image"),
        (lambda: Hook(widen), AlexprepError, r"widen makes float32 \(51, 51, 3\) into .* \(90, 120, 3\)"),
    ],
)
def test_mistakes_are_told_before_the_first_batch(make: Any, error: Any, words: str, data: Path) -> None:
    with pytest.raises(error, match=words):
        Loader(data, batch_size=4, augmentation=replace(BYTES, hooks=(make(),)))


def test_numpy_has_no_definition_of_a_hook() -> None:
    augmentation = replace(BYTES, hooks=(Hook(dim),))
    draws = draw(augmentation, 0, 0, np.arange(1), np.full((1, 2), 64))
    with pytest.raises(AlexprepError, match="dim is a function over DALI nodes, which numpy cannot call"):
        augment(np.zeros((64, 64, 3), np.uint8), draws, 0, augmentation, None)


HOOK = """
from nvidia.dali import fn, types

def darker(image, share):
    return fn.cast(image * share, dtype=types.UINT8)

def fails(image):
    return image.no_such_operator()
"""


def test_a_run_remembers_its_hook(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(HOOK)

    def run(name: str, **options: Any) -> dict[str, Any]:
        usual: dict[str, Any] = {"data": data, "recipe": "tiny", "runs": tmp_path / "runs", "device": "cpu"}
        return train(TrainConfig(name=name, **(usual | options)))

    hook: Any = {"hook": f"{file}:darker"}
    whole = run("whole", steps=3, **hook)
    assert whole["weights_sha256"] != run("plain", steps=3)["weights_sha256"]
    run("parts", steps=1, **hook)
    resumed = run("parts", steps=3, resume=True, recipe=None, **hook)
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    told = json.loads((tmp_path / "runs" / "parts" / "config.json").read_text())["identity"]["recipe"]["augmentation"]
    assert told["hooks"] == [{"function": "mine:darker", "after": "augment", "numbers": 1}]
    with pytest.raises(AlexprepError, match=r"was trained with --hook .*mine\.py:darker: add that to the command"):
        run("parts", steps=4, resume=True)
    shutil.copy(file, tmp_path / "moved.py")
    with pytest.raises(AlexprepError, match=r"cannot be resumed.*moved:darker"):
        run("parts", steps=4, resume=True, hook=f"{tmp_path / 'moved.py'}:darker")
    with pytest.raises(AlexprepError, match=r"cannot be resumed.*hooks"):
        run("plain", steps=4, resume=True, **hook)
    with pytest.raises(AlexprepError, match=r"--hook .*mine\.py:fails: .*mine\.py, line 8"):
        run("bad", steps=1, hook=f"{file}:fails")
    assert not (tmp_path / "runs" / "bad").exists()
    assert evaluate_run(tmp_path / "runs" / "parts")["samples"] == 20  # needs no hook


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    for options, words in (({"hook_after": "tensor"}, "name it with --hook"), ({"hook_after": "x"}, "hook_after 'x'")):
        with pytest.raises(AlexprepError, match=words):
            TrainConfig(data=tmp_path, **options)  # type: ignore[arg-type]
