"""Samples that cannot be decoded, in the middle of an epoch: named, or left out without moving another."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from alexprep.pipeline.augmentation import PRESETS, Augmentation
from alexprep.pipeline.dali_graph import Graph
from alexprep.pipeline.dataset import OnBad
from alexprep.pipeline.loader import Batch, Loader, PipelineRunner
from alexprep.pipeline.loader_settings import Tuning
from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import INDEX
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Codec, Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.reader import Samples
from alexprep.shards.worker_pool import InProcessEngine

PLAIN = Augmentation(crop=51, mean="none", noise="none")
BAD = (3, 20, 21, 22, 47)


def _damage(shard: Path, offset: int, content: bytes) -> None:
    with shard.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def _spoil(data: Path, row: int, kind: str) -> None:
    """Makes one image undecodable: zeros, or a broken marker in its header."""
    record = Samples(data, "train").index[row]
    offset, size = int(record["offset"]), int(record["size"])
    shard = data / "train" / f"train-{record['shard']:06d}.tar"
    if kind == "zeros":
        _damage(shard, offset, bytes(size))
    else:
        _damage(shard, offset + 2, b"\xff\x01\xff\x02")


def spoil_copy(data: Path, folder: Path) -> Path:
    """A copy of `data` with the images of rows `BAD` damaged in several ways."""
    copy = folder / "data"
    shutil.copytree(data, copy)
    for row, kind in zip(BAD, ("zeros", "zeros", "header", "zeros", "header"), strict=True):
        _spoil(copy, row, kind)
    return copy


@pytest.fixture(scope="module")
def spoilt(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return spoil_copy(data, tmp_path_factory.mktemp("spoilt"))


def _epochs(loader: Loader, count: int) -> list[Batch]:
    return list(itertools.chain.from_iterable(iter(loader) for _ in range(count)))


def test_error_names_the_member(spoilt: Path) -> None:
    with (
        Loader(spoilt, batch_size=10, augmentation=PLAIN, order="sequential") as loader,
        pytest.raises(
            AlexprepError, match=r"train-000000\.tar at byte [0-9,]+ \(0+3\.jpg\) holds an image that cannot"
        ),
    ):
        list(loader)


@pytest.mark.parametrize("kind", ["zeros", "header", "gone"])
def test_an_error_comes_with_its_own_batch(kind: str, data: Path, tmp_path: Path) -> None:
    """The batches before it are delivered, however far the work had gone on ahead."""
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    if kind == "gone":
        shard = int(Samples(copy, "train").index[37]["shard"])
        first = Samples(copy, "train").rows_of(shard)[0]
        (copy / "train" / f"train-{shard:06d}.tar").unlink()
    else:
        _spoil(copy, first := 37, kind)
    delivered: list[int] = []
    with (
        Loader(copy, batch_size=5, augmentation=PLAIN, order="sequential", tuning=Tuning(prefetch=4)) as loader,
        pytest.raises(AlexprepError),
    ):
        for batch in loader:
            delivered += batch.indices.tolist()
    assert delivered == list(range(first // 5 * 5))


@pytest.mark.parametrize("views", ["random", "centre", "ten"])
@pytest.mark.parametrize("augmentation", [PLAIN, PRESETS["resized"], PRESETS["none"]], ids=["crop", "resized", "none"])
def test_skip_moves_no_other_sample(augmentation: Augmentation, views: Any, data: Path, spoilt: Path) -> None:
    """Two epochs: each step holds what it holds in the sound set, less the bad ones, pixel by pixel."""
    options: Any = {"batch_size": 7, "augmentation": augmentation, "views": views, "seed": 5}
    with Loader(data, **options) as sound, Loader(spoilt, on_bad="skip", **options) as loader:
        assert len(sound) == len(loader) == 7
        for whole, batch in zip(_epochs(sound, 2), _epochs(loader, 2), strict=True):
            good = torch.tensor([row not in BAD for row in whole.indices.tolist()])
            assert torch.equal(batch.indices, whole.indices[good])
            assert torch.equal(batch.labels, whole.labels[good])
            assert torch.equal(batch.images, whole.images[good])
        assert loader.skipped == 2 * len(BAD)
        assert sound.skipped == 0


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_skip_keeps_ranks_and_resume_exact(world_size: int, spoilt: Path) -> None:
    """Steps count alike on all ranks, some of which get nothing; from any state the rest is the same."""
    options: Any = {"batch_size": 6, "augmentation": PLAIN, "on_bad": "skip", "seed": 2}
    with Loader(spoilt, **options) as loader:
        states, batches = [], []
        for _ in range(2):
            states.append(loader.state_dict())
            for batch in loader:
                batches.append(batch)
                states.append(loader.state_dict())
    ranks = [Loader(spoilt, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for first in (0, 3, 7, 8, 12):
        for rank in ranks:
            rank.load_state_dict({**states[0], "epoch": first // 8, "step": first % 8})
        parts = zip(*(_epochs(rank, 2 - first // 8) for rank in ranks), strict=True)
        for whole, part in zip(batches[first:], parts, strict=True):
            assert torch.equal(torch.cat([batch.images for batch in part]), whole.images)
            assert torch.equal(torch.cat([batch.indices for batch in part]), whole.indices)
    for rank in ranks:
        rank.close()


def test_a_step_of_bad_samples_only_is_empty(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    for row in range(48):
        _spoil(copy, row, "zeros")
    with Loader(copy, batch_size=20, augmentation=PLAIN, on_bad="skip", memory_format="channels_last") as loader:
        batches = list(loader)
    assert [tuple(batch.images.shape) for batch in batches] == [(0, 3, 51, 51)] * 3
    assert loader.skipped == 48


def test_a_cut_image_is_judged_by_its_window(data: Path, tmp_path: Path) -> None:
    """An image cut in its middle is left out where its window needs what is missing, whatever batch it comes in."""
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    index = np.load(copy / "train" / INDEX)
    index["size"][::2] = index["size"][::2] * 0.8
    np.save(copy / "train" / INDEX, index)
    kept = []
    for batch_size in (48, 5, 1):
        with Loader(
            copy, batch_size=batch_size, augmentation=Augmentation(crop=20, mean="none", noise="none"), on_bad="skip"
        ) as loader:
            batches = _epochs(loader, 2)
        kept.append([(batch.indices.tolist(), batch.images.sum((1, 2, 3)).tolist()) for batch in batches])
        assert 0 < loader.skipped < 48
    flat = [[pair for rows, sums in run for pair in zip(rows, sums, strict=True)] for run in kept]
    assert flat[0] == flat[1] == flat[2]


def test_a_shard_cut_or_gone_while_in_use(data: Path, tmp_path: Path) -> None:
    """Never a crash or a hang: an error that names the shard, also where bad images are skipped."""
    for trouble in ("cut", "gone"):
        copy = tmp_path / trouble
        shutil.copytree(data, copy)
        with Loader(copy, batch_size=2, augmentation=PLAIN, order="sequential", on_bad="skip") as loader:
            batches = iter(loader)
            next(batches)
            victim = copy / "train" / "train-000005.tar"
            if trouble == "cut":
                with victim.open("r+b") as file:
                    file.truncate(2000)
            else:
                victim.unlink()
            with pytest.raises(AlexprepError, match=r"train-000005\.tar (ends inside|cannot be read)"):
                for _ in batches:
                    pass
            assert loader.step >= 5  # and what came before was delivered


def test_headers_that_cannot_be_read_never_reach_dali(spoilt: Path) -> None:
    """DALI 2.4 may crash on one in a batch that is split among its threads, hence a process of its own and large batches."""
    program = (
        "import sys\n"
        "from alexprep.pipeline import Augmentation, Loader\n"
        "plain = Augmentation(crop=51, mean='none', noise='none')\n"
        "for seed in range(16):\n"
        "    with Loader(sys.argv[1], batch_size=48, augmentation=plain, threads=2, seed=seed, on_bad='skip') as loader:\n"
        "        assert sum(len(batch.images) for batch in loader) == 43\n"
    )
    done = subprocess.run([sys.executable, "-c", program, spoilt], capture_output=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("shape", [(63, 64, 3), (32, 128, 3)], ids=["smaller", "as many bytes"])
@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_raw_shards_of_the_wrong_size_are_named(
    shape: tuple[int, int, int], on_bad: OnBad, photos: Path, tmp_path: Path
) -> None:
    """Pixels have no header that DALI could judge by; and what holds other images than it says is no bad sample to be skipped."""

    class Careless(Codec):
        def encode(self, pixels: NDArray[np.uint8]) -> bytes:
            return super().encode(np.resize(pixels, shape))

    convert(
        photos, tmp_path, ShardOptions(Target(size=64, format="raw"), limit=5), InProcessEngine(), make_codec=Careless
    )
    with (
        Loader(tmp_path, batch_size=2, augmentation=PLAIN, order="sequential", on_bad=on_bad) as loader,
        pytest.raises(
            AlexprepError,
            match=r"train-000000\.tar at byte 512 \(\d+\.npy\) holds no 64 x 64 pixels: `alexprep verify`",
        ),
    ):
        next(iter(loader))


def test_images_are_not_blamed_where_nothing_can_be_decoded(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without memory left, say: nothing may be left out for that."""

    def failing(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA runtime API error cudaErrorMemoryAllocation (2)")

    monkeypatch.setattr(PipelineRunner, "_outputs", failing)
    monkeypatch.setattr(Graph, "decoding_pipeline", failing)
    with (
        Loader(data, batch_size=48, augmentation=PLAIN, on_bad="skip") as loader,
        pytest.raises(AlexprepError, match="DALI could not make a batch: CUDA runtime"),
    ):
        next(iter(loader))
