"""The DALI graph against its definition in numpy; the loader's promises on order, ranks, resume and lifetimes."""

from __future__ import annotations

import gc
import io
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from alexprep.pipeline.augmentation import (
    PRESETS,
    Augmentation,
    Draws,
    augment,
    centred,
    channel_stdevs,
    colour_shifts,
    draw,
    noise_stdevs,
    resize,
    ten_windows,
    view,
)
from alexprep.pipeline.loader import Batch, Loader
from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.reader import Samples

ODD = Augmentation(crop=51)  # of 64: odd, and a slack that is not a power of two
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def _decode(samples: Samples, row: int) -> NDArray[np.uint8]:
    encoded = samples.encoded(row).tobytes()
    if samples.dataset["image"]["format"] == "raw":
        return np.asarray(np.load(io.BytesIO(encoded), allow_pickle=False))
    return np.asarray(Image.open(io.BytesIO(encoded)))


def _reference(
    data: Path, split: str, rows: list[int], draws: Draws, augmentation: Augmentation, epoch: int = 0
) -> NDArray[np.float64]:
    samples = Samples(data, split)
    found = rgb_statistics.read_statistics(data, samples.dataset["digest"]) if augmentation.needs_statistics else None
    return np.stack(
        [augment(_decode(samples, row), draws, n, augmentation, found, epoch) for n, row in enumerate(rows)]
    )


def _draw(augmentation: Augmentation, seed: int, epoch: int, rows: NDArray[np.int64], size: int = 64) -> Draws:
    return draw(augmentation, seed, epoch, rows, np.full((len(rows), 2), size))


def _nhwc(batch: Batch, memory_format: str) -> NDArray[np.float32]:
    images = batch.images.float().cpu()
    return np.asarray(images if memory_format == "NHWC" else images.movedim(-3, -1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", ["NCHW", "NHWC"])
@pytest.mark.parametrize("noise", ["eigenvalue", "stdev", "none"])
@pytest.mark.parametrize("mean", ["crop", "centre", "channel", "none"])
def test_pipeline_equals_numpy(mean: Any, noise: Any, memory_format: Any, device: str, data: Path) -> None:
    """At most 1e-3 grey level apart on the CPU; on a GPU the decoder may differ by a few levels, which is bounded apart."""
    augmentation = Augmentation(crop=51, mean=mean, noise=noise)
    with Loader(
        data, batch_size=17, augmentation=augmentation, memory_format=memory_format, seed=3, device=device
    ) as loader:
        for batch in loader:
            rows = batch.indices.tolist()
            expected = _reference(data, "train", rows, _draw(augmentation, 3, 0, batch.indices.numpy()), augmentation)
            difference = np.abs(_nhwc(batch, memory_format) - expected)
            assert batch.images.dtype == torch.float32 and difference.max() <= (1e-3 if device == "cpu" else 16)
            assert device == "cpu" or difference.mean() < 1


def test_mirror_can_be_off(data: Path) -> None:
    augmentation = Augmentation(crop=51, mirror=False, noise="none")
    with Loader(data, batch_size=48, augmentation=augmentation) as loader:
        batch = next(iter(loader))
        draws = _draw(augmentation, 0, 0, batch.indices.numpy())
        assert not draws.mirror_N.any()
        expected = _reference(data, "train", batch.indices.tolist(), draws, augmentation)
        assert np.abs(_nhwc(batch, "NCHW") - expected).max() <= 1e-3


MORE = {
    "std": Augmentation(crop=51, mean="crop", std="channel"),
    "std-centre": Augmentation(crop=51, mean="centre", std="imagenet", noise="stdev"),
    "channel": Augmentation(crop=51, mean="channel", std="channel", noise="none"),
    "imagenet": Augmentation(crop=33, mean="imagenet", std="imagenet", noise="eigenvalue"),
    "2012-code": replace(PRESETS["2012-code"], crop=51, share=5, noise_epochs=1),
    "bytes": Augmentation(crop=51, mean="none", noise="none"),
    "none": PRESETS["none"],
    "resized": replace(PRESETS["resized"], crop=37),
    "enlarged": Augmentation(
        crop=71, scale=(0.3, 1), ratio=(0.5, 1.5), mean="channel", noise="stdev", noise_rescale=1.1
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", ["NCHW", "NHWC", "channels_last"])
@pytest.mark.parametrize("name", MORE)
def test_every_convention_equals_numpy(name: str, memory_format: Any, device: str, data: Path) -> None:
    """Two epochs, so that noise ends in one of them. A resize rounds to grey levels, so there one level may be one off."""
    augmentation = MORE[name]
    rounding = 1.01 / min(channel_stdevs(None, augmentation)) if augmentation.scale else 0
    with Loader(
        data, batch_size=20, augmentation=augmentation, memory_format=memory_format, seed=6, device=device
    ) as loader:
        for _ in range(2):
            place = 0
            epoch = loader.epoch
            for batch in loader:
                rows = batch.indices.numpy()
                draws = draw(
                    augmentation, 6, epoch, rows, np.full((len(rows), 2), 64), np.arange(place, place + len(rows))
                )
                place += len(rows)
                expected = _reference(data, "train", rows.tolist(), draws, augmentation, epoch)
                difference = np.abs(_nhwc(batch, memory_format) - expected)
                assert difference.max() <= (1e-3 + rounding if device == "cpu" else 16)
                assert difference.mean() < (0.002 if device == "cpu" else 1)
                if memory_format == "channels_last":
                    assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", ["NCHW", "NHWC", "channels_last"])
@pytest.mark.parametrize("views", ["random", "centre", "ten"])
@pytest.mark.parametrize("name", ["paper", "2012-code", "imagenet", "resized"])
def test_float16_is_the_rounded_float32(name: str, views: Any, memory_format: Any, device: str, data: Path) -> None:
    augmentation = {**MORE, "paper": ODD}[name]
    options: Any = {
        "batch_size": 20,
        "augmentation": augmentation,
        "memory_format": memory_format,
        "device": device,
        "views": views,
    }
    loaders = [Loader(data, dtype=dtype, **options) for dtype in ("float32", "float16")]
    for single, half in zip(*loaders, strict=True):
        assert half.images.dtype == torch.float16
        assert (single.images.half() - half.images).abs().max() <= 2**-3  # a unit in the last place below 256
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("memory_format", ["NCHW", "NHWC", "channels_last"])
@pytest.mark.parametrize("views", ["random", "centre", "ten"])
@pytest.mark.parametrize("name", ["bytes", "none", "resized"])
def test_uint8_is_the_same_as_float32(name: str, views: Any, memory_format: Any, data: Path) -> None:
    augmentation = replace(MORE[name], mean="none", std="none")
    options: Any = {"batch_size": 20, "augmentation": augmentation, "memory_format": memory_format, "views": views}
    with Loader(data, **options) as floats, Loader(data, dtype="uint8", **options) as integers:
        for single, integer in zip(floats, integers, strict=True):
            assert integer.images.dtype == torch.uint8
            assert torch.equal(single.images, integer.images.float())


def test_resize_is_antialiased_as_pillow_s(photo: Callable[..., Image.Image]) -> None:
    """Away from the edges, which Pillow treats otherwise, the definition is Pillow's bilinear filter, which rounds twice."""
    for height, width, side in ((40, 61, 23), (33, 20, 47), (90, 90, 31)):
        image = np.asarray(photo(width, height, seed=height))
        ours = resize(image, side).astype(int)
        pillow = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)).astype(int)
        edge = 2
        inner = np.abs(ours - pillow)[edge:-edge, edge:-edge]
        assert inner.max() <= 1 and (inner > 0).mean() < 0.25


@pytest.mark.parametrize("image_format", ["jpg", "png", "raw"])
@pytest.mark.parametrize("views", ["random", "centre", "ten"])
def test_every_format_gives_the_same_picture(image_format: Any, views: Any, photos: Path, tmp_path: Path) -> None:
    target = Target(size=48, format=image_format, subsampling="444", quality=100)
    convert(photos, tmp_path, ShardOptions(target, limit=6), 1)
    augmentation = Augmentation(crop=37, mean="none", noise="none")
    with Loader(tmp_path, batch_size=6, augmentation=augmentation, views=views) as loader:
        batch = next(iter(loader))
        rows = batch.indices.tolist()
        if views == "ten":
            first = np.asarray(batch.images[:, 0].movedim(1, -1))
            expected = np.stack([_decode(Samples(tmp_path, "train"), row)[:37, :37] for row in rows])
            np.testing.assert_array_equal(first, expected)
        else:
            sizes = np.full((6, 2), 48)
            draws = (
                draw(augmentation, 0, 0, np.array(rows), sizes) if views == "random" else centred(augmentation, sizes)
            )
            np.testing.assert_array_equal(
                _nhwc(batch, "NCHW"), _reference(tmp_path, "train", rows, draws, augmentation)
            )


@pytest.mark.parametrize("mean", ["crop", "centre", "channel", "none"])
@pytest.mark.parametrize("memory_format", ["NCHW", "NHWC"])
def test_ten_views(mean: Any, memory_format: Any, data: Path) -> None:
    """Corners and centre, then their reflections, each as the single-view reference makes it."""
    augmentation = Augmentation(crop=51, mean=mean, noise="none")
    with Loader(
        data,
        "val",
        batch_size=8,
        augmentation=augmentation,
        views="ten",
        order="sequential",
        memory_format=memory_format,
    ) as loader:
        assert [batch.indices.tolist() for batch in loader] == [list(range(8)), list(range(8, 16)), list(range(16, 20))]
        batch = next(iter(loader))
    got = _nhwc(batch, memory_format)
    assert got.shape == (8, 10, 51, 51, 3)
    samples = Samples(data, "val")
    found = rgb_statistics.read_statistics(data, samples.dataset["digest"])
    windows = ten_windows(augmentation, np.array([[64, 64]]))[0]
    for n in range(10):
        for k, row in enumerate(batch.indices.tolist()):
            expected = view(_decode(samples, row), windows[n % 5], n >= 5, np.zeros(3), augmentation, found)
            assert np.abs(got[k, n] - expected).max() <= 1e-3


def test_centre_view_is_without_chance(data: Path) -> None:
    with Loader(data, "val", batch_size=7, augmentation=ODD, views="centre", order="sequential", seed=1) as loader:
        epochs = [[batch for batch in loader] for _ in range(2)]
        expected = _reference(data, "val", list(range(20)), centred(ODD, np.full((20, 2), 64)), ODD)
        for epoch in epochs:
            assert np.abs(np.concatenate([_nhwc(batch, "NCHW") for batch in epoch]) - expected).max() <= 1e-3
        assert torch.cat([batch.labels for batch in epochs[0]]).tolist() == Samples(data, "val").labels.tolist()


def test_crop_of_the_whole_image(data: Path) -> None:
    whole = Augmentation(crop=64, noise="none")
    for views in ("random", "centre", "ten"):
        with Loader(data, batch_size=5, augmentation=whole, views=views) as loader:
            batch = next(iter(loader))
            draws = (
                _draw(whole, 0, 0, batch.indices.numpy()) if views == "random" else centred(whole, np.full((5, 2), 64))
            )
            images = batch._replace(images=batch.images[:, 0]) if views == "ten" else batch
            expected = _reference(data, "train", batch.indices.tolist(), draws, whole)
            assert np.abs(_nhwc(images, "NCHW") - expected).max() <= 1e-3


def test_noise_has_the_stated_covariance(data: Path) -> None:
    """Cov = sigma² V diag(s²) Vᵀ, with s the eigenvalue on the 0-1 scale times 255, or its square root on 0-255."""
    found = rgb_statistics.read_statistics(data, Samples(data, "train").dataset["digest"])
    alpha = _draw(ODD, 0, 0, np.arange(200_000)).alpha_N3
    noise: Any
    for noise, scale in (("eigenvalue", found.eigenvalues / 255), ("stdev", np.sqrt(found.eigenvalues))):
        augmentation = Augmentation(noise=noise)
        np.testing.assert_allclose(noise_stdevs(found, augmentation), 0.1 * scale)
        shifts = colour_shifts(alpha, found, augmentation)
        expected = found.eigenvectors @ np.diag((0.1 * scale) ** 2) @ found.eigenvectors.T
        np.testing.assert_allclose(np.cov(shifts.T), expected, rtol=0.03, atol=0.02 * np.abs(expected).max())


def test_imagenet_s_noise_is_the_published_one() -> None:
    """With the original's eigenvalues: 5.8, 0.54, 0.15 grey levels by the paper's formula, 12.18, 3.71, 1.97 by the code's."""
    eigenvalues = np.array(rgb_statistics.IMAGENET_STDEVS) ** 2
    found = rgb_statistics.Statistics("", 1, np.zeros((1, 1, 3)), np.zeros(3), np.eye(3), eigenvalues, np.eye(3))
    np.testing.assert_allclose(noise_stdevs(found, Augmentation(noise="eigenvalue")), [5.816, 0.539, 0.1525], rtol=1e-3)
    np.testing.assert_allclose(noise_stdevs(found, Augmentation(noise="stdev")), [12.178, 3.709, 1.972], rtol=1e-3)


# Order, ranks, resume.


def _stream(loader: Loader, epochs: int) -> list[tuple[list[int], bytes]]:
    batches = itertools.chain.from_iterable(iter(loader) for _ in range(epochs))
    return [(batch.indices.tolist(), batch.images.numpy().tobytes()) for batch in batches]


def test_two_epochs_hold_each_sample_once(data: Path) -> None:
    with Loader(data, batch_size=13, augmentation=ODD) as loader:
        assert len(loader) == 4
        first, second = ([row for rows, _ in _stream(loader, 1) for row in rows] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(48))
    assert first != second


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 13, 300])
def test_ranks_see_the_same_global_batches(world_size: int, batch_size: int, data: Path) -> None:
    with Loader(data, batch_size=batch_size, augmentation=ODD, seed=8) as loader:
        alone = list(loader)
    loaders = [
        Loader(data, batch_size=batch_size, augmentation=ODD, seed=8, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    for whole, *parts in zip(alone, *loaders, strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("world_size", [1, 3])
def test_resume_from_any_step(world_size: int, data: Path) -> None:
    """The state before every batch of two epochs, each restored into a fresh loader: the remaining stream is the same."""

    def fresh(rank: int) -> Loader:
        return Loader(data, batch_size=15, augmentation=ODD, seed=4, rank=rank, world_size=world_size, threads=1)

    with Loader(data, batch_size=15, augmentation=ODD, seed=4) as loader:
        states, rows, images = [loader.state_dict()], [], []
        for batch in itertools.chain.from_iterable(iter(loader) for _ in range(2)):
            rows.append(batch.indices)
            images.append(batch.images)
            states.append(loader.state_dict())
        states.pop()
    for n, state in enumerate(states):
        assert json.loads(json.dumps(state)) == state
        for_ranks = []
        for rank in range(world_size):
            with fresh(rank) as loader:
                loader.load_state_dict(state)
                assert loader.state_dict() == state
                epochs = itertools.chain.from_iterable(iter(loader) for _ in range(2 - state["epoch"]))
                for_ranks.append([(batch.indices, batch.images) for batch in epochs])
        assert len(for_ranks[0]) == len(states) - n
        for k, parts in enumerate(zip(*for_ranks, strict=True)):
            assert torch.equal(torch.cat([part[0] for part in parts]), rows[n + k])
            assert torch.equal(torch.cat([part[1] for part in parts]), images[n + k])


def test_state_counts_only_what_was_delivered(data: Path) -> None:
    """Prefetched steps do not count; an abandoned loop goes on where it was left; a state can be loaded at any time."""
    with Loader(data, batch_size=13, augmentation=ODD) as loader:
        whole = _stream(loader, 2)
    with Loader(data, batch_size=13, augmentation=ODD) as loader:
        seen = []
        for batch in loader:
            seen.append(batch.indices.tolist())
            if len(seen) == 2:
                break
        stream = loader.state_dict()["stream"]
        assert loader.state_dict() == {"seed": 0, "epoch": 0, "step": 2, "batch_size": 13, "stream": stream}
        seen += [rows for rows, _ in _stream(loader, 2)]
        assert seen == [rows for rows, _ in whole]
        loader.load_state_dict({**loader.state_dict(), "epoch": 1, "step": 3})
        assert _stream(loader, 1) == whole[-1:]
        loader.load_state_dict({**loader.state_dict(), "epoch": 0, "step": 0})
        assert _stream(loader, 2) == whole


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(threads: int, data: Path) -> None:
    with (
        Loader(data, batch_size=13, augmentation=ODD, threads=threads) as loader,
        Loader(data, batch_size=13, augmentation=ODD) as other,
    ):
        assert _stream(loader, 1) == _stream(other, 1)


# Lifetimes.


def test_a_batch_is_never_overwritten(data: Path) -> None:
    """Tensors of old batches, kept past many later ones and past the loader itself, still hold what they held."""
    with Loader(data, batch_size=6, augmentation=ODD) as loader:
        batches, copies = [], []
        for batch in itertools.chain.from_iterable(iter(loader) for _ in range(3)):
            batches.append(batch)
            copies.append(batch.images.clone())
    del loader
    gc.collect()
    for batch, copy in zip(batches, copies, strict=True):
        assert torch.equal(batch.images, copy)
        batch.images.zero_()  # and they are writable


@pytest.mark.gpu
def test_a_batch_outlives_pending_work_on_the_gpu(data: Path) -> None:
    """Slow kernels still reading a dropped batch must read its pixels, not those of the batch that took its memory."""
    with Loader(data, batch_size=48, augmentation=ODD, device="cuda") as loader:
        expected = [
            batch.images.double().sum().item()
            for batch in itertools.chain.from_iterable(iter(loader) for _ in range(6))
        ]
    ballast = torch.randn(4096, 4096, device="cuda")
    with Loader(data, batch_size=48, augmentation=ODD, device="cuda") as loader:
        sums = []
        for batch in itertools.chain.from_iterable(iter(loader) for _ in range(6)):
            for _ in range(20):
                ballast = torch.tanh(ballast @ ballast)
            sums.append(batch.images.double().sum())
            del batch
        assert [value.item() for value in sums] == expected


def test_two_loaders_at_once(data: Path) -> None:
    with (
        Loader(data, batch_size=9, augmentation=ODD) as train,
        Loader(data, "val", batch_size=9, augmentation=ODD, views="centre") as val,
    ):
        alone = _stream(train, 1)
        train.load_state_dict({**train.state_dict(), "epoch": 0, "step": 0})
        both = []
        for batch, _ in zip(train, itertools.cycle(val), strict=False):
            both.append((batch.indices.tolist(), batch.images.numpy().tobytes()))
    assert both == alone


def test_closed_is_closed(data: Path) -> None:
    loader = Loader(data, batch_size=9, augmentation=ODD)
    next(iter(loader))
    loader.close()
    loader.close()
    with pytest.raises(AlexprepError, match="closed"):
        next(iter(loader))


# Errors.


def test_a_corrupt_image_is_named(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    samples = Samples(copy, "train")
    record = samples.index[20]
    shard = copy / "train" / f"train-{record['shard']:06d}.tar"
    raw = bytearray(shard.read_bytes())
    raw[record["offset"] : record["offset"] + record["size"]] = bytes(record["size"])
    shard.write_bytes(raw)
    with (
        Loader(copy, batch_size=10, augmentation=ODD) as loader,
        pytest.raises(AlexprepError, match=rf"{shard.name} at byte {record['offset']:,}"),
    ):
        list(loader)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, r"batch_size 0 is not in \[1, "),
        ({"rank": 2, "world_size": 2}, r"rank 2 is not in \[0, 1\]"),
        ({"views": "both"}, "views 'both'"),
        ({"dtype": "float64"}, "dtype 'float64'"),
        ({"memory_format": "CHW"}, "memory_format 'CHW'"),
        ({"seed": -1}, "seed -1"),
        ({"split": "test"}, "no samples in split 'test'; it has train, val"),
        (
            {"augmentation": Augmentation(crop=65)},
            r"a crop of 65 pixels does not fit 48 of 48 images, .*\.tar at byte 512 \(0.*\.jpg\) with 64 x 64",
        ),
        ({"order": "random"}, "order 'random' is not one of shuffle, blocks, sequential"),
        ({"on_bad": "warn"}, "on_bad 'warn' is not one of error, skip"),
        ({"augmentation": "alexnet"}, "augmentation 'alexnet' is not one of paper, 2012-code, resized, none"),
        ({"dtype": "uint8"}, "dtype uint8 holds grey levels as they are"),
        ({"batch_size": 2.5}, r"batch_size 2.5 is not a whole number"),
        ({"rank": "0"}, r"rank '0' is not a whole number"),
        ({"device": "cuda:99"}, "there is no cuda:99 here"),
        ({"device": "gpu"}, "'gpu' is not a device"),
        ({"device": "meta"}, "'meta' is not supported"),
        ({"augmentation": 5}, "augmentation 5 is not one of"),
        ({"statistics": 5}, "statistics 5 are neither"),
        ({"threads": 0}, r"threads 0 is not in \[1, "),
        ({"statistics": "nowhere"}, "nowhere"),
    ],
)
def test_arguments_out_of_bounds(arguments: dict[str, Any], words: str, data: Path) -> None:
    with pytest.raises(AlexprepError, match=words):
        Loader(data, **{"batch_size": 4, "augmentation": ODD, **arguments})


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


def test_states_that_do_not_fit(data: Path) -> None:
    with Loader(data, batch_size=13, augmentation=ODD) as loader:
        for state, words in (
            ({"seed": 1}, "seed 1"),
            ({"batch_size": 12}, "batch_size 12"),
            ({"stream": 49}, "stream 49"),
            ({"step": 4}, r"in epochs of 4 steps, step 4 is not in \[0, 3\]"),
            ({"step": 1.0}, "step 1.0 is not a whole number"),
            ({"epoch": 2**32}, "epoch 4294967296"),
            ({"epoch": -1}, "epoch -1"),
        ):
            with pytest.raises(AlexprepError, match=words):
                loader.load_state_dict({**loader.state_dict(), **state})  # type: ignore[dict-item]
        nothing: Any
        for nothing in (None, []):
            with pytest.raises(AlexprepError, match="the state has seed None"):
                loader.load_state_dict(nothing)


def test_data_that_is_not_there(tmp_path: Path, data: Path) -> None:
    with pytest.raises(AlexprepError, match="make one with `alexprep shard SOURCE`"):
        Loader(tmp_path, batch_size=4)
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    shutil.rmtree(copy / "stats")
    with pytest.raises(AlexprepError, match="run `alexprep pca-stats`"):
        Loader(copy, batch_size=4, augmentation=ODD)
    Loader(copy, batch_size=4, augmentation=Augmentation(crop=51, mean="none", noise="none")).close()
    next((copy / "train").glob("*.tar")).unlink()
    plain = Augmentation(crop=51, mean="none", noise="none")
    with (
        Loader(copy, batch_size=48, augmentation=plain) as loader,
        pytest.raises(AlexprepError, match="cannot be read"),
    ):
        list(loader)
    (copy / "dataset.json").unlink()
    with pytest.raises(AlexprepError, match="unfinished data set"):
        Loader(copy, batch_size=4)


def test_by_hand(photo: Callable[..., Image.Image], tmp_path: Path) -> None:
    """The paper's and the 2012 code's augmentation of two images, pixel by pixel, from the formulas and without our numpy code."""
    for n in range(2):
        (tmp_path / "source" / f"class{n}").mkdir(parents=True)
        photo(16, 16, seed=n).save(tmp_path / "source" / f"class{n}" / "a.png")
    convert(tmp_path / "source", tmp_path / "data", ShardOptions(Target(size=16, format="png")), 1)
    mean = np.arange(16 * 16 * 3, dtype=np.float64).reshape(16, 16, 3) / 5
    values, vectors = np.array([9000.0, 500.0, 80.0]), np.linalg.qr(np.array([[1.0, 2, 3], [0, 1, 4], [5, 6, 0]]))[0]
    found = rgb_statistics.Statistics(
        "", 2, mean, mean.mean((0, 1)), vectors @ np.diag(values) @ vectors.T, values, vectors
    )
    samples = Samples(tmp_path / "data", "train")
    pictures = [_decode(samples, row).astype(float) for row in range(2)]
    for name in ("paper", "2012-code"):
        augmentation = replace(PRESETS[name], crop=11)
        drawn = draw(augmentation, 1, 0, np.arange(2), np.full((2, 2), 16), np.arange(2))
        with Loader(
            tmp_path / "data", batch_size=2, augmentation=augmentation, seed=1, order="sequential", statistics=found
        ) as loader:
            images = next(iter(loader)).images
        for n in range(2):
            top, left, *_ = drawn.windows_N4[n].tolist()
            for y in range(11):
                for x in range(11):
                    column = 10 - x if drawn.mirror_N[n] else x
                    for c in range(3):
                        pixel = pictures[n][top + y, left + column, c]
                        alpha = 0.1 * drawn.alpha_N3[n]
                        if name == "paper":  # the mean where the pixel was; p (α λ) with λ on the 0-1 scale, times 255
                            noise = sum(vectors[c, k] * alpha[k] * values[k] / 255**2 * 255 for k in range(3))
                            expected = pixel - mean[top + y, left + column, c] + noise
                        else:  # the centre's mean after the reflection; p (α √λ), all divided by 1.1
                            noise = sum(vectors[c, k] * alpha[k] * values[k] ** 0.5 for k in range(3))
                            expected = (pixel - mean[2 + y, 2 + x, c] + noise) / 1.1
                        assert abs(float(images[n, c, y, x]) - expected) < 1e-3
