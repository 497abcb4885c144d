"""Lifetimes: processes, interruptions, threads, memory. Nothing hangs, nothing leaks, no batch is another's."""

from __future__ import annotations

import gc
import hashlib
import itertools
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from alexprep.pipeline.augmentation import Augmentation
from alexprep.pipeline.loader import Batch, Loader
from alexprep.shards.errors import AlexprepError

ODD = Augmentation(crop=51)
SECONDS = 120


def _open(data: Path, **options: Any) -> Loader:
    return Loader(data, **{"batch_size": 7, "augmentation": ODD, "seed": 3, **options})


def _rest(loader: Loader, epochs: int = 1) -> list[tuple[list[int], bytes]]:
    batches = itertools.chain.from_iterable(iter(loader) for _ in range(epochs))
    return [(batch.indices.tolist(), batch.images.contiguous().numpy().tobytes()) for batch in batches]


def _same(ours: Batch, theirs: Batch) -> bool:
    return torch.equal(ours.images, theirs.images) and torch.equal(ours.indices, theirs.indices)


def _tasks() -> int:
    return len(os.listdir("/proc/self/task"))


def _resident_mib() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_pickled_in_mid_epoch(data: Path) -> None:
    with _open(data) as loader:
        next(iter(loader))
        with pickle.loads(pickle.dumps(loader)) as copy:
            assert copy.state_dict() == loader.state_dict()
            assert _rest(copy, 2) == _rest(loader, 2)


def _report_rest(loader: Loader, connection: Any) -> None:
    connection.send(_rest(loader))
    loader.close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_after_a_fork(data: Path) -> None:
    """The child goes on from the parent's state with a pipeline of its own; the parent's is unharmed."""
    context = multiprocessing.get_context("fork")
    with _open(data, threads=1) as loader:
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
        assert rest == _rest(loader)


def test_in_a_new_process(data: Path) -> None:
    """As `spawn` does it: the loader is pickled, and a fresh interpreter goes on from its state."""
    program = (
        "import hashlib, pickle, sys\n"
        "loader = pickle.load(sys.stdin.buffer)\n"
        "digest = hashlib.sha256()\n"
        "for batch in loader: digest.update(batch.images.numpy().tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    with _open(data) as loader:
        next(iter(loader))
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=pickle.dumps(loader),
            capture_output=True,
            timeout=SECONDS,
            check=True,
        )
        digest = hashlib.sha256()
        for _, images in _rest(loader):
            digest.update(images)
        assert done.stdout.decode().strip() == digest.hexdigest()


def test_interrupted_at_any_moment(data: Path) -> None:
    """Ctrl-C again and again: what is delivered is always the batch that the state tells."""
    with _open(data) as loader:
        expected: dict[int, Batch] = {}
        for epoch in range(3):
            for batch in loader:
                expected[len(expected)] = batch
            assert loader.epoch == epoch + 1

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGVTALRM, interrupt)
    moments = random.Random(5)
    interrupted = 0
    try:
        with _open(data) as loader:
            while interrupted < 12:
                if loader.epoch == 3:
                    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "step": 0})
                try:
                    signal.setitimer(signal.ITIMER_VIRTUAL, moments.uniform(0.0005, 0.02))
                    for batch in loader:
                        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                        place = loader.epoch * 7 + loader.step - 1
                        assert _same(batch, expected[place])
                        signal.setitimer(signal.ITIMER_VIRTUAL, moments.uniform(0.0005, 0.02))
                    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                except KeyboardInterrupt:
                    interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_an_exception_in_the_loop_harms_nothing(data: Path) -> None:
    with _open(data) as whole, _open(data) as loader:
        expected = _rest(whole)
        seen = []
        with pytest.raises(ZeroDivisionError):
            for batch in loader:
                seen.append((batch.indices.tolist(), batch.images.contiguous().numpy().tobytes()))
                if len(seen) == 3:
                    1 / 0  # noqa: B018
        assert seen + _rest(loader) == expected


def test_closing_and_forgetting_free_the_threads(data: Path) -> None:
    def wait_for(count: int) -> None:
        end = time.monotonic() + 20
        while _tasks() > count and time.monotonic() < end:
            time.sleep(0.01)
        assert _tasks() <= count

    _rest(_open(data))  # whatever DALI and torch keep for good is there now
    gc.collect()
    before = _tasks()
    for _ in range(3):
        with _open(data, threads=3) as loader:
            next(iter(loader))
            assert _tasks() > before
        wait_for(before)
        loader = _open(data, threads=3)
        batches = iter(loader)
        next(batches)
        del loader, batches
        gc.collect()
        wait_for(before)


def test_train_and_evaluation_in_turns(data: Path) -> None:
    """An evaluation in the middle of an epoch, left early or not, changes nothing; the next one sees the whole split."""
    with (
        _open(data) as whole,
        _open(data) as train,
        _open(data, split="val", views="centre", order="sequential") as val,
    ):
        expected = _rest(whole, 2)
        seen = []
        for batch in itertools.chain.from_iterable(iter(train) for _ in range(2)):
            seen.append((batch.indices.tolist(), batch.images.contiguous().numpy().tobytes()))
            if len(seen) % 3 == 0:
                next(iter(val))  # as a sanity check that is left early
            if len(seen) % 5 == 0:
                assert [row for batch in val for row in batch.indices.tolist()] == list(range(20))
        assert seen == expected


def test_an_evaluation_that_was_restored_goes_on(data: Path) -> None:
    with _open(data, split="val", views="centre", order="sequential") as val:
        next(iter(val))
        state = val.state_dict()
        val.load_state_dict(state)
        assert [batch.indices[0].item() for batch in val] == [7, 14]
        assert [batch.indices[0].item() for batch in val] == [0, 7, 14]


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_memory_stays_flat(kind: str, data: Path, tmp_path: Path) -> None:
    """Hundreds of batches, of which two dozen would be seen if they stayed, with and without images that cannot be decoded; 10,000 are
    measured in benchmarks/."""
    options: dict[str, Any] = {"batch_size": 12}
    if kind == "bad":
        from tests.test_loader_bad import spoil_copy

        data = spoil_copy(data, tmp_path)
        options["on_bad"] = "skip"
    with _open(data, **options) as loader:
        resident = []
        for epochs in (40, 80 if kind == "good" else 30):
            for _ in range(epochs):
                for _batch in loader:
                    pass
            resident.append(_resident_mib())
        assert resident[1] < resident[0] + 8


def test_closing_waits_for_what_a_gpu_still_copies(data: Path) -> None:
    """DALI would give a buffer to another use; the event stands in for a GPU's."""

    class Event:
        waited = False

        def synchronize(self) -> None:
            self.waited = True

    with _open(data) as loader:
        next(iter(loader))
        event = Event()
        assert loader._runner is not None
        loader._runner._copied.append((event, None))  # type: ignore[arg-type]
    assert event.waited


class _Fed(torch.utils.data.IterableDataset[torch.Tensor]):
    """What people write who are used to DataLoader."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (batch.indices for batch in self.loader)


def test_workers_of_a_dataloader_never_double_samples(data: Path) -> None:
    with _open(data) as loader:
        one = torch.utils.data.DataLoader(_Fed(loader), batch_size=None, num_workers=1, timeout=60)
        assert sorted(torch.cat(list(one)).tolist()) == list(range(48))
        two = torch.utils.data.DataLoader(_Fed(loader), batch_size=None, num_workers=2, timeout=60)
        with pytest.raises(AlexprepError, match="each of the 2 workers of a DataLoader would give every sample"):
            list(two)
