"""The machine a training runs on: its devices, signals that ask for an end, memory."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from alexprep.pipeline.device import choose_device
from alexprep.shards.errors import AlexprepError
from alexprep.train.data import Examples
from alexprep.train.distributed.parallel import Parallel
from alexprep.train.distributed.world import World
from alexprep.train.signals_and_memory import Stopped, StopRequest
from alexprep.train.trainer import until_stopped


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name, message in (("tpu", "not a device"), ("meta", "not supported"), ("cuda:99", "torch sees")):
        with pytest.raises(AlexprepError, match=message):
            choose_device(name)


def test_the_second_signal_has_its_usual_effect() -> None:
    parallel = Parallel(torch.nn.Sequential(torch.nn.Flatten()), "single", World.alone("cpu"))
    batch = Examples(torch.zeros(1, 3, 2, 2), torch.zeros(1, dtype=torch.int64))
    with StopRequest().listening() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(Stopped):
            next(until_stopped(parallel, iter([batch]), stop))
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert list(until_stopped(parallel, iter([batch, batch]), StopRequest())) == [batch, batch]
