"""The loader's promises: order, ranks, resume, samples that cannot be decoded, lifetimes of processes, threads and memory."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from alexprep.pipeline.augmentation import PRESETS, Augmentation
from alexprep.pipeline.batch import Batch
from alexprep.pipeline.dali_graph import Graph
from alexprep.pipeline.dataset import OnBad
from alexprep.pipeline.loader import Loader, PipelineRunner
from alexprep.pipeline.loader_settings import Tuning
from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import INDEX
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Codec, Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sample_reader import Samples
from alexprep.shards.worker_pool import InProcessEngine

ODD = Augmentation(crop=51)  # of 64: odd, and a slack that is not a power of two
PLAIN = Augmentation(crop=51, mean="none", noise="none")
BAD = (3, 20, 21, 22, 47)
SECONDS = 120


def epochs_of(loader: Loader, count: int) -> Iterator[Batch]:
    return itertools.chain.from_iterable(iter(loader) for _ in range(count))


def _stream(loader: Loader, epochs: int) -> list[tuple[list[int], bytes]]:
    return [(batch.indices.tolist(), batch.images.numpy().tobytes()) for batch in epochs_of(loader, epochs)]


def open_loader(data: Path, **options: Any) -> Loader:
    return Loader(data, **{"batch_size": 7, "augmentation": ODD, "seed": 3, **options})


def _check_ranks(ranks: list[Loader], batches: list[Batch], epochs: int) -> None:
    """From where they stand on, the ranks' parts together make these batches."""
    for whole, parts in zip(batches, zip(*(epochs_of(rank, epochs) for rank in ranks), strict=True), strict=True):
        for name, tensor in whole._asdict().items():
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), tensor)
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 13, 300])
def test_ranks_and_threads_do_not_matter(world_size: int, batch_size: int, data: Path) -> None:
    with open_loader(data, batch_size=batch_size) as loader:
        alone = list(loader)
    options: Any = {"batch_size": batch_size, "world_size": world_size}
    _check_ranks([open_loader(data, rank=rank, threads=1 + rank, **options) for rank in range(world_size)], alone, 1)


@pytest.mark.parametrize("world_size", [1, 3])
def test_resume_from_any_step(world_size: int, data: Path) -> None:
    """The state before every batch of two epochs, each restored into a fresh loader: the remaining stream is the same."""
    batches, states = [], []
    with open_loader(data, batch_size=15) as loader:
        states.append(loader.state_dict())
        for batch in epochs_of(loader, 2):
            batches.append(batch)
            states.append(loader.state_dict())
    for n, state in enumerate(states[:-1]):
        assert json.loads(json.dumps(state)) == state
        ranks = [open_loader(data, batch_size=15, rank=r, world_size=world_size, threads=1) for r in range(world_size)]
        for rank in ranks:
            rank.load_state_dict(state)
            assert rank.state_dict() == state
        _check_ranks(ranks, batches[n:], 2 - state["epoch"])


def test_state_counts_only_what_was_delivered(data: Path) -> None:
    """Prefetched steps do not count; an abandoned loop goes on where it was left; a state can be loaded at any time."""
    with Loader(data, batch_size=13, augmentation=ODD) as loader:
        whole = _stream(loader, 2)
    first, second = ([row for rows, _ in whole[n : n + len(loader)] for row in rows] for n in (0, 4))
    assert sorted(first) == sorted(second) == list(range(48)) and first != second
    with Loader(data, batch_size=13, augmentation=ODD) as loader:
        seen = []
        for batch in loader:
            seen.append(batch.indices.tolist())
            if len(seen) == 2:
                break
        meant = {name: loader.state_dict()[name] for name in ("stream", "augmentation")}
        assert loader.state_dict() == {"seed": 0, "epoch": 0, "step": 2, "batch_size": 13, **meant}
        seen += [rows for rows, _ in _stream(loader, 2)]
        assert seen == [rows for rows, _ in whole]
        loader.load_state_dict({**loader.state_dict(), "epoch": 1, "step": 3})
        assert _stream(loader, 1) == whole[-1:]
        loader.load_state_dict({**loader.state_dict(), "epoch": 0, "step": 0})
        assert _stream(loader, 2) == whole


def test_train_and_evaluation_in_turns(data: Path) -> None:
    """An evaluation in the middle of an epoch, left early or not, changes nothing; the next one sees the whole split."""
    with (
        open_loader(data) as whole,
        open_loader(data) as train,
        open_loader(data, split="val", views="centre", order="sequential") as val,
    ):
        expected = _stream(whole, 2)
        seen = []
        for batch in epochs_of(train, 2):
            seen.append((batch.indices.tolist(), batch.images.numpy().tobytes()))
            if len(seen) % 3 == 0:
                next(iter(val))  # as a sanity check that is left early
            if len(seen) % 5 == 0:
                assert [row for batch in val for row in batch.indices.tolist()] == list(range(20))
        assert seen == expected
        val.load_state_dict({**val.state_dict(), "step": 1})  # restored, it goes on
        assert [batch.indices[0].item() for batch in epochs_of(val, 2)] == [7, 14, 0, 7, 14]


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
        ({"order": "random"}, "order 'random' is not one of shuffle, blocks, streams, sequential"),
        (
            {"order": "blocks", "streams": 4},
            "streams 4 has no effect with order='blocks': take order='streams', or leave",
        ),
        (
            {"block_shards": 16},
            "block_shards 16 has no effect with order='shuffle': take order='blocks' or order='streams'",
        ),
        ({"order": "sequential", "streams": 8}, "streams 8 has no effect with order='sequential'"),
        ({"order": "blocks", "block_shards": 0}, "block_shards 0 is not in"),
        (
            {"cache_limit": 500},
            "--cache-limit 500 has no effect without --cache: name the folder with --cache FOLDER, or leave",
        ),
        ({"on_bad": "warn"}, "on_bad 'warn' is not one of error, skip"),
        ({"augmentation": "alexnet"}, "augmentation 'alexnet' is not one of paper, 2012-code, resized, none"),
        ({"dtype": "uint8"}, "dtype uint8 holds grey levels as they are"),
        ({"device": "cuda:99"}, "there is no cuda:99 here"),
        ({"augmentation": 5}, "augmentation 5 is not one of"),
        ({"statistics": 5}, "statistics 5 are neither"),
        ({"threads": 0}, r"threads 0 is not in \[1, "),
        ({"statistics": "nowhere"}, "nowhere"),
    ],
)
def test_arguments_out_of_bounds(arguments: dict[str, Any], words: str, data: Path) -> None:
    with pytest.raises(AlexprepError, match=words):
        Loader(data, **{"batch_size": 4, "augmentation": ODD, **arguments})


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
                loader.load_state_dict({**loader.state_dict(), **state})
        nothing: Any = None
        with pytest.raises(AlexprepError, match="the state has seed None"):
            loader.load_state_dict(nothing)
        state = loader.state_dict() | {"step": 2}
    grey = replace(ODD, grey=1)
    assert str(grey) == str(replace(ODD, grey=1.0)) != str(ODD)
    with Loader(data, batch_size=13, augmentation=grey) as other:
        own = f"the state has augmentation {ODD}, this Loader {str(ODD)[:-1]}, grey=1): make it"
        with pytest.raises(AlexprepError, match=re.escape(own)):
            other.load_state_dict(state)
        del state["augmentation"]  # as older states are, and as whoever means it says it
        other.load_state_dict(state)
        assert other.step == 2


# Samples that cannot be decoded.


def spoil(data: Path, row: int, kind: str) -> None:
    """Makes one image undecodable: zeros, or a broken marker in its header."""
    record = Samples(data, "train").index[row]
    with (data / "train" / f"train-{record['shard']:06d}.tar").open("r+b") as shard:
        shard.seek(int(record["offset"]) + (0 if kind == "zeros" else 2))
        shard.write(bytes(int(record["size"])) if kind == "zeros" else b"\xff\x01\xff\x02")


@pytest.fixture(scope="module")
def spoilt(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of rows `BAD` are damaged in several ways. Not to be changed."""
    copy = Path(shutil.copytree(data, tmp_path_factory.mktemp("spoilt") / "data"))
    for row, kind in zip(BAD, ("zeros", "zeros", "header", "zeros", "header"), strict=True):
        spoil(copy, row, kind)
    return copy


@pytest.mark.parametrize("kind", ["zeros", "header", "gone"])
def test_an_error_comes_with_its_own_batch(kind: str, data: Path, tmp_path: Path) -> None:
    """The batches before it are delivered, however far the work had gone on ahead."""
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    if kind == "gone":  # with rows 35 to 41
        (copy / "train" / "train-000005.tar").unlink()
    else:
        spoil(copy, 37, kind)
    delivered: list[int] = []
    words = (
        " cannot be read" if kind == "gone" else r" at byte [0-9,]+ \(0+37\.jpg\) holds an image that cannot be decoded"
    )
    with (
        Loader(copy, batch_size=5, augmentation=PLAIN, order="sequential", tuning=Tuning(prefetch=4)) as loader,
        pytest.raises(AlexprepError, match=r"train-000005\.tar" + words),
    ):
        for batch in loader:
            delivered += batch.indices.tolist()
    assert delivered == list(range(35))


@pytest.mark.parametrize("views", ["random", "centre", "ten"])
@pytest.mark.parametrize(
    "augmentation", [PLAIN, replace(PRESETS["resized"], crop=37), PRESETS["none"]], ids=["crop", "resized", "none"]
)
def test_skip_moves_no_other_sample(augmentation: Augmentation, views: Any, data: Path, spoilt: Path) -> None:
    """Two epochs: each step holds what it holds in the sound set, less the bad ones, pixel by pixel."""
    options: Any = {"batch_size": 7, "augmentation": augmentation, "views": views, "seed": 5}
    with Loader(data, **options) as sound, Loader(spoilt, on_bad="skip", **options) as loader:
        assert len(sound) == len(loader) == 7
        for whole, batch in zip(epochs_of(sound, 2), epochs_of(loader, 2), strict=True):
            good = torch.tensor([row not in BAD for row in whole.indices.tolist()])
            assert torch.equal(batch.indices, whole.indices[good])
            assert torch.equal(batch.labels, whole.labels[good])
            assert torch.equal(batch.images, whole.images[good])
        assert loader.skipped == 2 * len(BAD)
        assert sound.skipped == 0


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_skip_keeps_ranks_and_resume_exact(world_size: int, spoilt: Path) -> None:
    """Steps count alike on all ranks, some of which get nothing; from any state the rest is the same."""
    options: Any = {"batch_size": 6, "augmentation": PLAIN, "on_bad": "skip"}
    with open_loader(spoilt, **options) as loader:
        start, batches = loader.state_dict(), list(epochs_of(loader, 2))
    for first in (0, 3, 7, 8, 12):
        ranks = [open_loader(spoilt, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
        for rank in ranks:
            rank.load_state_dict({**start, "epoch": first // 8, "step": first % 8})
        _check_ranks(ranks, batches[first:], 2 - first // 8)


def test_a_step_of_bad_samples_only_is_empty(data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    for row in range(48):
        spoil(copy, row, "zeros")
    with Loader(copy, batch_size=20, augmentation=PLAIN, on_bad="skip", memory_format="channels_last") as loader:
        batches = list(loader)
    assert [tuple(batch.images.shape) for batch in batches] == [(0, 3, 51, 51)] * 3
    assert loader.skipped == 48


def test_a_cut_image_is_judged_by_its_window(data: Path, tmp_path: Path) -> None:
    """An image cut in its middle is left out where its window needs what is missing, whatever batch it comes in."""
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    index = np.load(copy / "train" / INDEX)
    index["size"][::2] = index["size"][::2] * 0.8
    np.save(copy / "train" / INDEX, index)
    kept = []
    for batch_size in (48, 5, 1):
        with Loader(copy, batch_size=batch_size, augmentation=replace(PLAIN, crop=20), on_bad="skip") as loader:
            batches = list(loader)
        assert 0 < loader.skipped < 48
        sums = torch.cat([batch.images.sum((1, 2, 3)) for batch in batches]).tolist()
        kept.append((torch.cat([batch.indices for batch in batches]).tolist(), sums))
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("trouble", [lambda path: os.truncate(path, 2000), os.unlink], ids=["cut", "gone"])
def test_a_shard_cut_or_gone_while_in_use(
    trouble: Callable[[Path], None], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a crash or a hang: an error that names the shard, also where bad images are skipped."""
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    monkeypatch.setattr("alexprep.pipeline.loader._TOGETHER", 2)  # or all would be read by now
    with Loader(copy, batch_size=2, augmentation=PLAIN, order="sequential", on_bad="skip") as loader:
        batches = iter(loader)
        next(batches)
        trouble(copy / "train" / "train-000005.tar")
        with pytest.raises(AlexprepError, match=r"train-000005\.tar (ends inside|cannot be read)"):
            list(batches)
        assert loader.step >= 5  # and what came before was delivered


@pytest.mark.parametrize("shape", [(63, 64, 3), (32, 128, 3)], ids=["smaller", "as many bytes"])
@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_raw_shards_of_the_wrong_size_are_named(
    shape: tuple[int, int, int], on_bad: OnBad, photos: Path, tmp_path: Path
) -> None:
    """Pixels have no header that DALI could judge by; and what holds other images than it says is no bad sample to be skipped."""

    class Careless(Codec):
        def encode(self, pixels: NDArray[np.uint8]) -> bytes:
            return super().encode(np.resize(pixels, shape))

    raw = ShardOptions(Target(size=64, format="raw"), limit=5)
    convert(photos, tmp_path, raw, InProcessEngine(), make_codec=Careless)
    words = r"train-000000\.tar at byte 512 \(\d+\.npy\) holds no 64 x 64 pixels: `alexprep verify`"
    with (
        Loader(tmp_path, batch_size=2, augmentation=PLAIN, order="sequential", on_bad=on_bad) as loader,
        pytest.raises(AlexprepError, match=words),
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


# Lifetimes: nothing hangs, nothing leaks, no batch is another's.


def test_a_batch_is_never_overwritten(data: Path) -> None:
    """Tensors of old batches, kept past many later ones and past the loader itself, still hold what they held."""
    with Loader(data, batch_size=6, augmentation=ODD) as loader:
        batches, copies = [], []
        for batch in epochs_of(loader, 3):
            batches.append(batch)
            copies.append(batch.images.clone())
    del loader
    gc.collect()
    for batch, copy in zip(batches, copies, strict=True):
        assert torch.equal(batch.images, copy)
        batch.images.zero_()  # and they are writable


def test_closed_is_closed(data: Path) -> None:
    loader = Loader(data, batch_size=9, augmentation=ODD)
    next(iter(loader))
    loader.close()
    loader.close()
    with pytest.raises(AlexprepError, match="closed"):
        next(iter(loader))


def test_closing_waits_for_what_a_gpu_still_copies(data: Path) -> None:
    """DALI would give a buffer to another use; the event stands in for a GPU's."""

    class Event:
        waited = False

        def synchronize(self) -> None:
            self.waited = True

    with open_loader(data) as loader:
        next(iter(loader))
        event = Event()
        assert loader._runner is not None
        loader._runner._copied.append((event, None))  # type: ignore[arg-type]
    assert event.waited


def _report_rest(loader: Loader, connection: Any) -> None:
    connection.send(_stream(loader, 1))
    loader.close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_after_a_fork(data: Path) -> None:
    """The child goes on from the parent's state with a pipeline of its own; the parent's is unharmed."""
    context = multiprocessing.get_context("fork")
    with open_loader(data, threads=1) as loader:
        next(iter(loader))
        ours, theirs = context.Pipe()
        child = context.Process(target=_report_rest, args=(loader, theirs))
        child.start()
        try:
            assert ours.poll(SECONDS / 2), "the child does not answer"
            rest = ours.recv()
            child.join(SECONDS / 4)
            assert child.exitcode == 0
        finally:
            child.kill()
        assert rest == _stream(loader, 1)


def test_in_a_new_process(data: Path, spoilt: Path) -> None:
    """As `spawn` does it: the loader is pickled, and a fresh interpreter goes on from its state.

    There, since it may crash: headers that cannot be read never reach DALI 2.4, in large batches split among its threads.
    """
    program = (
        "import hashlib, pickle, sys\n"
        "from alexprep.pipeline import Augmentation, Loader\n"
        "loader = pickle.load(sys.stdin.buffer)\n"
        "digest = hashlib.sha256()\n"
        "for batch in loader: digest.update(batch.images.numpy().tobytes())\n"
        "plain = Augmentation(crop=51, mean='none', noise='none')\n"
        "for seed in range(8):\n"
        "    with Loader(sys.argv[1], batch_size=48, augmentation=plain, threads=2, seed=seed, on_bad='skip') as loader:\n"
        "        assert sum(len(batch.images) for batch in loader) == 43\n"
        "print(digest.hexdigest())\n"
    )
    with open_loader(data) as loader:
        next(iter(loader))
        command = [sys.executable, "-c", program, str(spoilt)]
        done = subprocess.run(command, input=pickle.dumps(loader), capture_output=True, timeout=SECONDS, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        digest = hashlib.sha256(b"".join(images for _, images in _stream(loader, 1)))
        assert done.stdout.decode().strip() == digest.hexdigest()


class _Batches(torch.utils.data.IterableDataset[torch.Tensor]):
    """What people write who are used to DataLoader."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (batch.indices for batch in self.loader)


def test_workers_of_a_dataloader_never_double_samples(data: Path) -> None:
    with open_loader(data) as loader:
        one = torch.utils.data.DataLoader(_Batches(loader), batch_size=None, num_workers=1, timeout=60)
        assert sorted(torch.cat(list(one)).tolist()) == list(range(48))
        two = torch.utils.data.DataLoader(_Batches(loader), batch_size=None, num_workers=2, timeout=60)
        with pytest.raises(AlexprepError, match="each of the 2 workers of a DataLoader would give every sample"):
            list(two)


def test_a_dataloader_around_a_loader_gives_its_batches(data: Path) -> None:
    """Two epochs, and the state is the loader's own."""
    options: Any = {"batch_size": 10, "augmentation": Augmentation(crop=48), "seed": 3}
    with Loader(data, **options) as loader, Loader(data, **options) as inner:
        around: Any = torch.utils.data.DataLoader(inner, batch_size=None)
        assert len(around) == len(loader) == 5
        for _ in range(2):
            for got, expected in zip(around, loader, strict=True):
                assert isinstance(got, Batch) and all(map(torch.equal, got, expected))
        assert inner.state_dict() == loader.state_dict()


def test_a_loader_says_what_it_is(data: Path) -> None:
    with Loader(data, "val", batch_size=8, augmentation="none", rank=1, world_size=2, dtype="float16") as loader:
        next(iter(loader))
        assert repr(loader) == (
            f"<Loader {str(data)!r} val: 20 samples of 4 classes, 3 steps of 8 an epoch, random views, order shuffle, float16 NCHW on cpu, "
            "rank 1 of 2, at epoch 0, step 1>"
        )
