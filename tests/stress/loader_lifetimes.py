"""What a loader keeps for good, and what an interruption may leave: long runs, by `python -m pytest tests/stress/loader_lifetimes.py`."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import FrameType

import pytest
import torch

from alexprep.pipeline.batch import Batch
from tests.test_loader import BAD, epochs_of, open_loader, spoil


def test_interrupted_at_any_moment(data: Path) -> None:
    """Ctrl-C again and again: what is delivered is always the batch that the state tells."""
    with open_loader(data) as loader:
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
        with open_loader(data) as loader:
            while interrupted < 12:
                if loader.epoch == 3:
                    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "step": 0})
                try:
                    signal.setitimer(signal.ITIMER_VIRTUAL, moments.uniform(0.0005, 0.02))
                    for batch in loader:
                        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                        place = loader.epoch * 7 + loader.step - 1
                        assert torch.equal(batch.images, expected[place].images)
                        assert torch.equal(batch.indices, expected[place].indices)
                        signal.setitimer(signal.ITIMER_VIRTUAL, moments.uniform(0.0005, 0.02))
                    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                except KeyboardInterrupt:
                    interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _tasks() -> int:
    return len(os.listdir("/proc/self/task"))


def test_closing_and_forgetting_free_the_threads(data: Path) -> None:
    def wait_for(count: int) -> None:
        end = time.monotonic() + 20
        while _tasks() > count and time.monotonic() < end:
            time.sleep(0.01)
        assert _tasks() <= count

    list(open_loader(data))  # whatever DALI and torch keep for good is there now
    gc.collect()
    before = _tasks()
    for _ in range(3):
        with open_loader(data, threads=3) as loader:
            next(iter(loader))
            assert _tasks() > before
        wait_for(before)
        loader = open_loader(data, threads=3)
        batches = iter(loader)
        next(batches)
        del loader, batches
        gc.collect()
        wait_for(before)


def _resident_mib() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_memory_stays_flat(kind: str, data: Path, tmp_path: Path) -> None:
    """160 batches, of which two dozen would be seen if they stayed; with and without images that cannot be decoded."""
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    for row in BAD if kind == "bad" else ():
        spoil(copy, row, "zeros")
    with open_loader(copy, batch_size=12, on_bad="skip") as loader:
        resident = []
        for epochs in (20, 40):
            for _batch in epochs_of(loader, epochs):
                pass
            resident.append(_resident_mib())
        assert resident[1] < resident[0] + 8
