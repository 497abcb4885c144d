"""Loaders that read from a store which fails, hangs and goes away: the same batches, or one sentence, and no failure that stays."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from alexprep.pipeline.augmentation import Augmentation
from alexprep.pipeline.loader import Loader
from alexprep.pipeline.read_ahead import ReadAhead
from alexprep.pipeline.sampler import StepPlan
from alexprep.shards import patience, shard_fetcher, store_path
from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.rgb_statistics import pca_stats, publish_statistics
from alexprep.shards.storage import files_at, folder_at
from alexprep.shards.worker_pool import InProcessEngine
from alexprep.train.config import TrainConfig, prepare
from alexprep.train.run_dir import read_config
from alexprep.train.trainer import train
from tests.support.failing_store import FailingStore, failing, hurry, wait_for_fetches

__all__ = ["failing"]  # a fixture
URL = "memory://stored"
OPTIONS: Any = {
    "batch_size": 5,
    "augmentation": Augmentation(crop=51, mean="none", noise="none"),
    "order": "blocks",
    "block_shards": 3,
    "seed": 7,
}


@pytest.fixture(scope="module")
def local(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data set of 10 shards on a disk; the same lies in the store."""
    folder = tmp_path_factory.mktemp("stores") / "data"
    convert(photos, folder, ShardOptions(Target(size=64), shard_samples=5), InProcessEngine())
    publish_statistics(pca_stats(folder, "train", InProcessEngine()), folder, "train")
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/stored", recursive=True)
    yield folder
    memory.rm("/stored", recursive=True)


@pytest.fixture(scope="module")
def batches(local: Path) -> list[torch.Tensor]:
    """Of two epochs, from the disk."""
    with Loader(local, **OPTIONS) as loader:
        return [batch.images for _ in range(2) for batch in loader]


def two_epochs(loader: Loader) -> list[torch.Tensor]:
    return [batch.images for _ in range(2) for batch in loader]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(itertools.starmap(torch.equal, zip(ours, theirs, strict=True)))


def shards_asked(store: FailingStore) -> Counter[str]:
    return Counter({path[-10:-4]: times for path, times in store.asked.items() if path.endswith(".tar")})


def raise_(error: BaseException) -> None:
    raise error


def test_shards_and_other_files_may_come_equally_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = []

    def asked(ask: object, where: str, *, seconds: Any) -> bytes:
        allowed.append(seconds())
        return b""

    monkeypatch.setattr(store_path, "patiently", asked)
    folder_at("memory://slow/file").read_bytes(1_000_000)  # type: ignore[call-arg]
    assert allowed == [shard_fetcher._Pace().allowed(1_000_000)] == [14.0]  # 10 s, and 250 kB/s


@pytest.mark.parametrize("fault", ["errors", "cut", "hangs"])
def test_a_failing_store_gives_the_same_batches(
    fault: str, batches: Any, failing: FailingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = 11
    chance, lock, hanging = random.Random(seed), threading.Lock(), threading.Event()
    monkeypatch.setattr(shard_fetcher, "answer_seconds", lambda size: 0.02 + size / patience.SLOWEST)
    monkeypatch.setattr(shard_fetcher, "_AT_LEAST", 0.05)

    def failed(path: str, data: bytes) -> bytes:
        with lock:
            happens = chance.random() < 0.2
        if not happens or not path.endswith(".tar"):
            return data
        if fault == "cut":
            return data[: len(data) // 2]
        if fault == "hangs":
            hanging.wait(60)
        raise ConnectionResetError("reset")

    failing.fault = failed
    with Loader(URL, **OPTIONS) as loader:
        assert same(two_epochs(loader), batches), f"seed {seed}"
    hanging.set()


def test_a_store_that_is_away_is_waited_for_or_named_and_the_loader_goes_on(
    batches: Any, failing: FailingStore, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(patience, "_QUIET", 0.0)
    monkeypatch.setattr(patience, "_said", float("-inf"))

    def away(path: str, data: bytes) -> bytes:
        raise ConnectionRefusedError("nobody there")

    with Loader(URL, **OPTIONS) as loader:
        taken = [next(iter(loader)).images]
        loader._abandon()  # what is held is let go
        failing.fault = away
        threading.Timer(0.3, lambda: setattr(failing, "fault", None)).start()
        with caplog.at_level(logging.WARNING):
            taken.append(next(iter(loader)).images)
        assert "waiting for memory://stored/train/train-0000" in caplog.text and "nobody there" in caplog.text
        assert "answers after" in caplog.text and len(caplog.records) == 2
        hurry(monkeypatch, 0.1)
        failing.fault = away
        loader._abandon()  # what is held is let go
        read = mock.Mock(wraps=loader._dataset.samples.read)
        with monkeypatch.context() as spied:
            spied.setattr(loader._dataset.samples, "read", read)
            for _ in range(2):
                with pytest.raises(
                    AlexprepError, match=r"train-\d+\.tar cannot be read \(ConnectionRefusedError: nobody"
                ):
                    next(iter(loader))
        assert read.call_count == 2  # the patience is asked for once, and not once a step
        failing.fault = None
        taken += [batch.images for batch in loader]
        taken += [batch.images for batch in loader]
    assert same(taken, batches)


def test_streams_are_read_by_one_rank_each_and_a_resume_takes_other_ranks(local: Path, failing: FailingStore) -> None:
    """The batches of a disk and one rank, crops too; four ranks ask for each shard once."""
    options: Any = OPTIONS | {"order": "streams", "streams": 4, "batch_size": 6}
    with Loader(local, **options) as loader:
        whole = [torch.cat([batch.images.flatten(1), batch.indices[:, None]], 1) for batch in loader]
    for before, after in ((1, 4), (4, 2), (4, 3)):
        failing.asked.clear()
        found: list[list[torch.Tensor]] = [[] for _ in whole]
        for number, ranks in enumerate((before, after)):
            for rank in range(ranks):
                with Loader(URL, **options, rank=rank, world_size=ranks) as loader:
                    loader.load_state_dict(loader.state_dict() | {"step": 2 * number})
                    for step in range(2 * number, len(loader) if number else 2):
                        batch = next(iter(loader))
                        found[step].append(torch.cat([batch.images.flatten(1), batch.indices[:, None]], 1))
        assert same([torch.cat(parts) for parts in found], whole)
    failing.asked.clear()
    for rank in range(4):
        with Loader(
            URL, **options, views="centre", rank=rank, world_size=4
        ) as loader:  # which fetches nothing of the next epoch
            assert len(list(loader)) == len(whole)
    shards = shards_asked(failing)
    assert len(shards) == 10 and set(shards.values()) == {1}


@pytest.mark.parametrize("error", [PermissionError("expired"), FileNotFoundError("gone")])
def test_what_a_store_refuses_is_told_at_once(
    error: Exception, local: Path, failing: FailingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, data: bytes) -> bytes:
        raise error

    with Loader(URL, **OPTIONS) as loader:
        failing.fault = refuse
        hurry(monkeypatch, 600)
        with pytest.raises(AlexprepError, match=r"memory://stored/train/train-\d+\.tar cannot be read"):
            next(iter(loader))
        failing.fault = None
        assert len(list(loader)) == len(loader)


def test_closing_does_not_wait_for_a_store_that_is_away(
    local: Path, failing: FailingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(path: str, data: bytes) -> bytes:
        raise TimeoutError

    loader = Loader(URL, **OPTIONS)
    failing.fault = away
    hurry(monkeypatch, 600)
    loader._ahead.reach(0, 0)
    time.sleep(0.05)
    before = time.monotonic()
    loader.close()
    assert time.monotonic() - before < 30
    wait_for_fetches()


def test_a_closed_loader_begins_no_download(
    local: Path, failing: FailingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of shards that others were downloading, for which its threads waited."""
    hurry(monkeypatch, 600)
    with contextlib.ExitStack() as others:
        for shard in read_dataset(local)["splits"]["train"]["shards"]:
            part = others.enter_context((tmp_path / f"{shard['sha256']}.part").open("wb"))
            fcntl.flock(part, fcntl.LOCK_EX)
        loader = Loader(URL, **OPTIONS, cache=tmp_path)
        loader._ahead.reach(0, 0)
        time.sleep(0.05)
        loader.close()
        wait_for_fetches()
    assert shards_asked(failing) == {}


def test_a_shard_is_one_request(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs asks for the size of what it is to read whole, and reads it in parts; an empty file has no range."""
    asked: list[tuple[int | None, int | None]] = []

    class S3:
        protocol = ("s3", "s3a")

        def cat_file(
            self, path: str, version_id: None = None, start: int | None = None, end: int | None = None
        ) -> bytes:
            assert version_id is None
            asked.append((start, end))
            if start is not None and not path:
                raise OSError(errno.EINVAL, "The requested range is not satisfiable")
            return path.encode()[start:end]

    assert patience.whole_file(S3(), "abc") == b"abc" and patience.whole_file(S3(), "") == b""
    assert asked == [(0, None), (0, None), (None, None)]
    monkeypatch.setattr(MemoryFileSystem, "cat_file", S3.cat_file)
    files, name = files_at("memory://stored/dataset.json")
    assert files.read(name, 1, 3) == b"sto" and asked[-1] == (1, 4)


@pytest.mark.parametrize(
    ("cause", "again"),
    [
        ({"ResponseMetadata": {"HTTPStatusCode": 503}}, True),
        ({"ResponseMetadata": {"HTTPStatusCode": 400}}, False),  # InvalidToken
        ({"ResponseMetadata": {"HTTPStatusCode": 301}}, False),  # a bucket elsewhere
        ({}, True),
        (SimpleNamespace(status_code=401), False),
        (SimpleNamespace(status_code=429), True),
    ],
)
def test_what_the_answer_of_a_store_says_of_asking_again(cause: Any, again: bool) -> None:
    error = OSError("as s3fs translates it")
    error.__cause__ = type("ClientError", (Exception,), {"response": cause})()
    for raised in (error, error.__cause__):
        with pytest.raises(OSError) as found:
            patience.ask_store(partial(raise_, raised), "s3://a/b")
        assert patience.passes(found.value) == again
    late = TimeoutError("RequestTimeout, which is an answer 400")
    late.__cause__ = type("ClientError", (Exception,), {"response": cause})()
    with pytest.raises(OSError) as found:
        patience.ask_store(partial(raise_, late), "s3://a/b")
    assert patience.passes(found.value)


def test_s3_says_when_to_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the names of headers as botocore has them."""
    hurry(monkeypatch, 60)
    told = {"ResponseMetadata": {"HTTPStatusCode": 503, "HTTPHeaders": {"retry-after": "7"}}}
    slow = type("ClientError", (Exception,), {"response": told})()
    answers: list[Any] = [partial(raise_, slow), lambda: b"data"]
    pauses: list[float] = []
    stop: Any = SimpleNamespace(is_set=lambda: False, wait=pauses.append)
    assert patience.patiently(lambda: answers.pop(0)(), "s3://a/b", stop) == b"data" and pauses == [7]


def test_ranks_with_a_cache_download_each_shard_once(
    batches: Any, local: Path, failing: FailingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and of 40 % of the set, which spares as much of each epoch."""
    hurry(monkeypatch, 600)  # that for which a shard is waited for that another one downloads
    for rank in range(2):
        with Loader(URL, **OPTIONS, cache=tmp_path / "all", rank=rank, world_size=2) as loader:
            two_epochs(loader)
    shards = shards_asked(failing)
    assert len(shards) == 10 and set(shards.values()) == {1}
    with Loader(URL, **OPTIONS, cache=tmp_path / "all") as loader:
        assert same(two_epochs(loader), batches)
    assert shards_asked(failing) == shards
    limit = int(0.45 * sum(path.stat().st_size for path in (local / "train").glob("*.tar")))
    kept: list[Path] = []
    for _ in range(3):
        failing.asked.clear()
        with Loader(URL, **OPTIONS, cache=tmp_path / "part", cache_limit=limit) as loader:
            assert same([batch.images for batch in loader], batches[: len(loader)])
        assert shards_asked(failing).total() == 10 - len(kept)
        kept = list((tmp_path / "part").glob("*.tar"))  # which depends on whose thread came first
        assert 3 <= len(kept) <= 5 and sum(path.stat().st_size for path in kept) <= limit


def test_what_will_not_be_read_is_not_fetched(batches: Any, failing: FailingStore) -> None:
    """Each shard once in the last of the `epochs`, and not again by a loader that is sent back. What comes all the same is right."""
    with Loader(URL, **OPTIONS, epochs=1) as loader:
        taken = [batch.images for batch in loader]
        assert set(shards_asked(failing).values()) == {1}
        taken += [batch.images for batch in loader]
        assert same(taken, batches)
        assert set(shards_asked(failing).values()) <= {1, 2}
        before = shards_asked(failing).total()
        loader.load_state_dict(loader.state_dict() | {"epoch": 1, "step": len(loader) - 1})
        assert same([batch.images for batch in loader], batches[-1:])
        assert shards_asked(failing).total() == before
    with pytest.raises(AlexprepError, match="epochs 0 is not in"):
        Loader(URL, **OPTIONS, epochs=0)


def test_each_shard_on_its_way_from_s3_has_a_connection() -> None:
    """botocore has ten, unless told otherwise."""
    folder_at("memory://anything")
    assert fsspec.config.conf["s3"]["config_kwargs"]["max_pool_connections"] >= shard_fetcher.FETCHES


class Recorder:
    """Samples in shards, 12 of 4, 5 or 6 by default, which record what is wanted of them."""

    remote = True

    def __init__(self, lengths: Sequence[int] = (4, 5, 6) * 4) -> None:
        import numpy as np

        numbers = np.repeat(np.arange(len(lengths), dtype=np.uint32), lengths)
        self.index = np.zeros(len(numbers), [("shard", "<u4")])
        self.index["shard"] = numbers
        self.wanted: list[list[int]] = []

    def want(self, shards: list[int]) -> None:
        self.wanted.append(shards)

    def let_go(self) -> None:
        self.wanted.append([])


@pytest.mark.parametrize("order", ["blocks", "streams", "sequential"])
@pytest.mark.parametrize(("world_size", "together"), [(1, 1), (3, 1), (40, 1), (1, 3)])
def test_every_step_finds_its_shards_wanted_before(order: Any, world_size: int, together: int) -> None:
    """From any step on, across epochs, within the room that there is; and each shard once an epoch."""
    samples: Any = Recorder()
    for rank in range(0, world_size, 13):
        plan = StepPlan(samples.index["shard"], 7, order, 3, 5, rank, world_size)
        held = plan.open_shards(3)
        ahead = ReadAhead(samples, plan, held, end=9)
        place, fetched = (2, 4), Counter[tuple[int, int]]()
        now: set[int] = set()
        while place[0] < 5:
            samples.wanted.clear()
            steps = min(together, len(plan) - place[1])
            ahead.reach(*place, steps)
            needed: set[int] = set()
            for step in range(place[1], place[1] + steps):
                needed |= set(samples.index["shard"][plan.part(place[0], step)[0]].tolist())
            for wanted in samples.wanted:
                fetched.update((place[0], shard) for shard in set(wanted) - now)
                now = set(wanted)
                assert len(wanted) <= max(held, len(needed))
            assert needed <= now
            place = plan.after(place[0], place[1] + steps - 1)
        assert max(fetched.values(), default=0) <= 2  # once for this epoch, and once for the next


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_fetch_each_shard_once_an_epoch(world_size: int, seed: int) -> None:
    """All together, with 8 streams; of shards that ranks must share, each of these ranks once."""
    chance = random.Random(seed)
    lengths = [chance.choice([1, 6] if seed else [6]) for _ in range(40)]
    samples: Any = Recorder(lengths)
    fetched, needed = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for rank in range(world_size):
        plan = StepPlan(samples.index["shard"], 16, "streams", 16, seed, rank, world_size)
        ahead = ReadAhead(samples, plan, plan.open_shards(3), end=9)
        places = [(epoch, step) for epoch in range(4) for step in range(len(plan))]
        needs = [set(samples.index["shard"][plan.part(*place)[0]].tolist()) for place in places]
        needed.update({(epoch, shard) for (epoch, _), shards in zip(places, needs, strict=True) for shard in shards})
        now: set[int] = set()
        for n, place in enumerate(places[: -len(plan)]):
            samples.wanted.clear()
            ahead.reach(*place)
            for wanted in samples.wanted:
                for shard in set(wanted) - now:
                    following = next(at for at in range(n, len(places)) if shard in needs[at])
                    fetched[places[following][0], shard] += 1
                now = set(wanted)
            assert needs[n] <= now
    assert all(times <= needed[place] for place, times in fetched.items()), f"seed {seed}"
    if not seed and world_size <= 8:
        assert set(needed.values()) == {1}


def test_evaluation_does_not_fetch_beyond_its_epoch() -> None:
    samples: Any = Recorder()
    plan = StepPlan(samples.index["shard"], 7, "sequential", 3, 5, 0, 1)
    ahead = ReadAhead(samples, plan, 4, end=0)
    for step in range(len(plan)):
        ahead.reach(0, step)
    assert samples.wanted[-1] == [11] and samples.wanted[0][:2] == [0, 1]


def test_training_from_a_store_is_training_from_a_disk(
    local: Path, failing: FailingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, with the order that suits a store; a resume from a copy on a disk keeps that order."""
    options: Any = {"recipe": "tiny", "batch_size": 10, "device": "cpu", "runs": tmp_path}
    disk = train(TrainConfig(data=local, order="streams", name="disk", epochs=2, **options))
    store = train(TrainConfig(data=folder_at(URL), name="store", epochs=2, steps=3, **options))
    assert read_config(tmp_path / "store")["data"].rstrip("/") == URL
    store = train(TrainConfig(data=local, name="store", epochs=2, resume=True, **options))
    assert store["weights_sha256"] == disk["weights_sha256"]
    shuffled = train(TrainConfig(data=local, name="shuffled", epochs=2, **options))
    assert shuffled["weights_sha256"] != disk["weights_sha256"]
    with pytest.raises(AlexprepError, match="order"):
        train(TrainConfig(data=local, name="store", epochs=3, resume=True, order="shuffle", **options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["images come in 8 streams of shards, since memory://stored"]),
        ({"ranks": 4, "scheme": "ddp"}, ["8 streams", "each of the 4 ranks fetches training shards of its own"]),
        ({"ranks": 3, "scheme": "ddp"}, ["8 streams", "with order streams, ranks share shards: --cache FOLDER"]),
        ({"ranks": 2, "scheme": "towers", "order": "streams"}, ["with towers, every rank reads every image"]),
        ({"ranks": 2, "scheme": "ddp", "order": "blocks"}, ["with order blocks, ranks share shards"]),
    ],
)
def test_training_says_which_rank_fetches_what(local: Path, options: Any, words: list[str]) -> None:
    """Each in a line of its own; what cannot be is told before the run has a folder."""
    config = TrainConfig(data=folder_at(URL), recipe="tiny", **options)
    notes = [
        note for note in prepare(config, torch.device("cpu"), dry_run=True).notes if "shard" in note or "towers" in note
    ]
    assert len(notes) == len(words) and all(map(str.__contains__, notes, words))
    with pytest.raises(AlexprepError, match=r"--order shuffle reads single images.*take --order streams"):
        prepare(TrainConfig(data=folder_at(URL), recipe="tiny", order="shuffle"), torch.device("cpu"), dry_run=True)
