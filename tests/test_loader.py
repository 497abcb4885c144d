"""The DALI graph against its definition in numpy; the loader's promises on order, ranks, resume and lifetimes."""

from __future__ import annotations

import gc
import io
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from alexprep.pipeline.augment import Augmentation, augment, colour_shifts, noise_stdevs, ten_views
from alexprep.pipeline.draws import Draws, centred, draw
from alexprep.pipeline.loader import Batch, Loader
from alexprep.shards import stats
from alexprep.shards.build import build
from alexprep.shards.codec import Target
from alexprep.shards.errors import AlexprepError
from alexprep.shards.plan import ShardOptions
from alexprep.shards.read import Samples

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
    data: Path, split: str, rows: list[int], draws: Draws, augmentation: Augmentation
) -> NDArray[np.float64]:
    samples = Samples(data, split)
    found = stats.read(data, samples.dataset["digest"]) if augmentation.needs_statistics else None
    return np.stack([augment(_decode(samples, row), draws, n, augmentation, found) for n, row in enumerate(rows)])


def _nhwc(batch: Batch, layout: str) -> NDArray[np.float32]:
    images = batch.images.float().cpu()
    return np.asarray(images if layout == "NHWC" else images.movedim(-3, -1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("noise", ["eigenvalue", "stdev", "none"])
@pytest.mark.parametrize("mean", ["crop", "centre", "channel", "none"])
def test_pipeline_equals_numpy(mean: Any, noise: Any, layout: Any, device: str, data: Path) -> None:
    """At most 1e-3 grey level apart on the CPU; on a GPU the decoder may differ by a few levels, which is bounded apart."""
    augmentation = Augmentation(crop=51, mean=mean, noise=noise)
    with Loader(data, batch_size=17, augmentation=augmentation, layout=layout, seed=3, device=device) as loader:
        for batch in loader:
            rows = batch.indices.tolist()
            expected = _reference(data, "train", rows, draw(3, 0, batch.indices.numpy(), 13), augmentation)
            difference = np.abs(_nhwc(batch, layout) - expected)
            assert batch.images.dtype == torch.float32 and difference.max() <= (1e-3 if device == "cpu" else 16)
            assert device == "cpu" or difference.mean() < 1


def test_mirror_can_be_off(data: Path) -> None:
    augmentation = Augmentation(crop=51, mirror=False, noise="none")
    with Loader(data, batch_size=48, augmentation=augmentation) as loader:
        batch = next(iter(loader))
        draws = draw(0, 0, batch.indices.numpy(), 13)
        assert draws.mirror_N.any()
        expected = _reference(data, "train", batch.indices.tolist(), draws, augmentation)
        assert np.abs(_nhwc(batch, "NCHW") - expected).max() <= 1e-3


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_float16_is_the_rounded_float32(layout: Any, data: Path) -> None:
    loaders = [
        Loader(data, batch_size=20, augmentation=ODD, layout=layout, dtype=dtype) for dtype in ("float32", "float16")
    ]
    for single, half in zip(*loaders, strict=True):
        assert half.images.dtype == torch.float16
        assert (single.images.half() - half.images).abs().max() <= 2**-3  # a unit in the last place below 256
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("image_format", ["jpg", "png", "raw"])
@pytest.mark.parametrize("views", ["random", "centre", "ten"])
def test_every_format_gives_the_same_picture(image_format: Any, views: Any, photos: Path, tmp_path: Path) -> None:
    target = Target(size=48, format=image_format, subsampling="444", quality=100)
    build(photos, tmp_path, ShardOptions(target, limit=6), 1)
    augmentation = Augmentation(crop=37, mean="none", noise="none")
    with Loader(tmp_path, batch_size=6, augmentation=augmentation, views=views) as loader:
        batch = next(iter(loader))
        rows = batch.indices.tolist()
        if views == "ten":
            first = np.asarray(batch.images[:, 0].movedim(1, -1))
            expected = np.stack([_decode(Samples(tmp_path, "train"), row)[:37, :37] for row in rows])
            np.testing.assert_array_equal(first, expected)
        else:
            draws = draw(0, 0, np.array(rows), 11) if views == "random" else centred(6, 11)
            np.testing.assert_array_equal(
                _nhwc(batch, "NCHW"), _reference(tmp_path, "train", rows, draws, augmentation)
            )


@pytest.mark.parametrize("mean", ["crop", "centre", "channel", "none"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_ten_views(mean: Any, layout: Any, data: Path) -> None:
    """Corners and centre, then their reflections, each as the single-view reference makes it."""
    augmentation = Augmentation(crop=51, mean=mean, noise="none")
    with Loader(
        data, "val", batch_size=8, augmentation=augmentation, views="ten", shuffle=False, layout=layout
    ) as loader:
        assert [batch.indices.tolist() for batch in loader] == [list(range(8)), list(range(8, 16)), list(range(16, 20))]
        batch = next(iter(loader))
    got = _nhwc(batch, layout)
    assert got.shape == (8, 10, 51, 51, 3)
    for n, (top, left, mirrored) in enumerate(ten_views(13)):
        draws = Draws(np.tile([top, left], (8, 1)), np.full(8, mirrored), np.zeros((8, 3)))
        expected = _reference(data, "val", batch.indices.tolist(), draws, augmentation)
        assert np.abs(got[:, n] - expected).max() <= 1e-3


def test_centre_view_is_without_chance(data: Path) -> None:
    with Loader(data, "val", batch_size=7, augmentation=ODD, views="centre", shuffle=False, seed=1) as loader:
        epochs = [[batch for batch in loader] for _ in range(2)]
        expected = _reference(data, "val", list(range(20)), centred(20, 13), ODD)
        for epoch in epochs:
            assert np.abs(np.concatenate([_nhwc(batch, "NCHW") for batch in epoch]) - expected).max() <= 1e-3
        assert torch.cat([batch.labels for batch in epochs[0]]).tolist() == Samples(data, "val").labels.tolist()


def test_crop_of_the_whole_image(data: Path) -> None:
    whole = Augmentation(crop=64, noise="none")
    for views in ("random", "centre", "ten"):
        with Loader(data, batch_size=5, augmentation=whole, views=views) as loader:
            batch = next(iter(loader))
            draws = draw(0, 0, batch.indices.numpy(), 0) if views == "random" else centred(5, 0)
            images = batch._replace(images=batch.images[:, 0]) if views == "ten" else batch
            expected = _reference(data, "train", batch.indices.tolist(), draws, whole)
            assert np.abs(_nhwc(images, "NCHW") - expected).max() <= 1e-3


def test_noise_has_the_stated_covariance(data: Path) -> None:
    """Cov = sigma² V diag(s²) Vᵀ, with s the eigenvalue on the 0-1 scale times 255, or its square root on 0-255."""
    found = stats.read(data, Samples(data, "train").dataset["digest"])
    alpha = draw(0, 0, np.arange(200_000), 0).alpha_N3
    noise: Any
    for noise, scale in (("eigenvalue", found.eigenvalues / 255), ("stdev", np.sqrt(found.eigenvalues))):
        augmentation = Augmentation(noise=noise)
        np.testing.assert_allclose(noise_stdevs(found, augmentation), 0.1 * scale)
        shifts = colour_shifts(alpha, found, augmentation)
        expected = found.eigenvectors @ np.diag((0.1 * scale) ** 2) @ found.eigenvectors.T
        np.testing.assert_allclose(np.cov(shifts.T), expected, rtol=0.03, atol=0.02 * np.abs(expected).max())


def test_imagenet_s_noise_is_the_published_one() -> None:
    """With the original's eigenvalues: 5.8, 0.54, 0.15 grey levels by the paper's formula, 12.18, 3.71, 1.97 by the code's."""
    eigenvalues = np.array(stats.IMAGENET_STDEVS) ** 2
    found = stats.Statistics("", 1, np.zeros((1, 1, 3)), np.zeros(3), np.eye(3), eigenvalues, np.eye(3))
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
        states, rows, images = [], [], []
        for batch in itertools.chain.from_iterable(iter(loader) for _ in range(2)):
            rows.append(batch.indices)
            images.append(batch.images)
            states.append(loader.state_dict())
        states = [{"seed": 4, "epoch": 0, "step": 0}, *states[:-1]]
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
        assert loader.state_dict() == {"seed": 0, "epoch": 0, "step": 2}
        seen += [rows for rows, _ in _stream(loader, 2)]
        assert seen == [rows for rows, _ in whole]
        loader.load_state_dict({"seed": 0, "epoch": 1, "step": 3})
        assert _stream(loader, 1) == whole[-1:]
        loader.load_state_dict({"seed": 0, "epoch": 0, "step": 0})
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
        train.load_state_dict({"seed": 0, "epoch": 0, "step": 0})
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
        ({"layout": "CHW"}, "layout 'CHW'"),
        ({"seed": -1}, "seed -1"),
        ({"split": "test"}, "no samples in split 'test'; it has train, val"),
        ({"augmentation": Augmentation(crop=65)}, "a crop of 65 pixels does not fit the 64-pixel images"),
    ],
)
def test_arguments_out_of_bounds(arguments: dict[str, Any], words: str, data: Path) -> None:
    with pytest.raises(AlexprepError, match=words):
        Loader(data, **{"batch_size": 4, "augmentation": ODD, **arguments})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"crop": 0}, "crop 0"),
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
            ({"seed": 1, "epoch": 0, "step": 0}, "seed 1"),
            ({"seed": 0, "epoch": 0, "step": 4}, "an epoch of 4 steps"),
            ({"seed": 0, "epoch": -1, "step": 0}, "epoch -1"),
        ):
            with pytest.raises(AlexprepError, match=words):
                loader.load_state_dict(state)


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
