"""What a training says, the machine it runs on, and the sums in between."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from alexprep.pipeline.device import choose_device
from alexprep.shards.errors import AlexprepError
from alexprep.train.data import Examples
from alexprep.train.distributed.parallel import Parallel
from alexprep.train.distributed.world import World
from alexprep.train.logger import Meter, duration, forecast
from alexprep.train.metrics import Means, Pace, Sums
from alexprep.train.runtime import Stopped, StopRequest
from alexprep.train.trainer import until_stopped

MEANS = Means(loss=1.5, top1_error=50.0, top5_error=10.0)


def test_sums_are_means_of_what_was_added() -> None:
    sums = Sums(torch.device("cpu"))
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 2.0]])
    sums.add(torch.tensor(3.0), logits, torch.tensor([0, 0, 2]))  # one of three wrong
    earlier = sums.totals.clone()
    sums.add(torch.tensor(1.0), logits[:1], torch.tensor([1]))  # wrong
    assert sums.since(earlier) == Means(1.0, 100.0, 0.0)
    assert sums.since(torch.zeros(4)) == Means(2.5, 50.0, 0.0)


def test_pace_tells_waiting_from_working() -> None:
    pace = Pace()
    pace.count(10, 1.0, 3.0)
    earlier = pace.copy()
    for _ in range(4):
        pace.count(8, 0.25, 0.75)
    assert pace.since(earlier) == {"images_per_second": 8.0, "data_wait_ms": 250.0, "step_ms": 750.0}
    assert pace.since(Pace())["images_per_second"] == 42 / 8


@pytest.mark.parametrize("terminal", [True, False])
def test_meter_logs_on_a_terminal_and_elsewhere(tmp_path: Path, terminal: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=200)
    with Meter(tmp_path / "log.jsonl", step=0, total_steps=10, console=console) as meter:
        for step in (1, 2, 3):
            meter.pace.count(8, 0.01, 0.03)
            assert meter.record_steps(MEANS, step=step, epoch=0, lr=0.01) == pytest.approx(0.04)
        val = {"split": "val", "top1_error": 40.0, "top5_error": 5.0, "loss": 1.0}
        meter.record_epoch(MEANS, step=3, epoch=0, lr=0.01, seconds=90.0, val=val)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert lines[0] == {
        "kind": "steps",
        "step": 1,
        "epoch": 0,
        "loss": 1.5,
        "top1_error": 50.0,
        "top5_error": 10.0,
        "lr": 0.01,
        "images_per_second": pytest.approx(200.0),
        "data_wait_ms": pytest.approx(10.0),
        "step_ms": pytest.approx(30.0),
    }
    assert lines[3]["val"] == val
    shown = screen.getvalue()
    assert (
        "epoch 1 in 90 s at rate 0.01: loss 1.5000, top-1 error 50.00 %; val: top-1 error 40.00 %, top-5 5.00 %"
        in shown
    )
    assert ("\x1b[" in shown) == terminal  # the bar moves the cursor
    plain = [line for line in shown.splitlines() if line.startswith("epoch 1 step")]
    assert terminal or len(plain) == 1  # a line every ten seconds, not every record


def test_a_resumed_log_drops_what_will_be_logged_again(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    kept = [{"kind": "steps", "step": step} for step in (2, 4)]
    text = "".join(json.dumps(record) + "\n" for record in [*kept, {"step": 6}])
    for tail in ('{"kind": "st', '{"step": 3}', "[]\n", "\udcff\n", '{"loss": 1}\n', ""):
        log.write_bytes((text + tail).encode(errors="surrogateescape"))
        with Meter(log, step=4, total_steps=10, console=Console(quiet=True)):
            pass
        assert [json.loads(line) for line in log.read_text().splitlines()] == kept


def test_an_epoch_that_still_lacks_its_evaluation_is_logged_once(tmp_path: Path) -> None:
    """Stopped after its last step, gone on with, and killed between its record and its checkpoint."""
    log = tmp_path / "log.jsonl"
    records = [
        {"kind": "epoch", "step": 3, "epoch": 0},
        {"kind": "steps", "step": 6},
        {"kind": "epoch", "step": 6, "epoch": 1},
    ]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    for epoch, kept in ((2, records), (1, records[:2])):
        with Meter(log, step=6, total_steps=10, epoch=epoch, console=Console(quiet=True)):
            pass
        assert [json.loads(line) for line in log.read_text().splitlines()] == kept


def test_a_loss_that_is_no_number_is_told_with_its_steps(tmp_path: Path) -> None:
    with Meter(tmp_path / "log.jsonl", step=20, total_steps=99, console=Console(quiet=True)) as meter:
        meter.pace.count(8, 0.1, 0.1)
        meter.record_steps(MEANS, step=40, epoch=0, lr=0.5)
        for loss in (float("nan"), float("inf")):
            with pytest.raises(AlexprepError, match=f"loss became {loss} within steps 41 to 60$"):
                meter.record_steps(Means(loss, 90.0, 50.0), step=60, epoch=0, lr=0.5)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_forecast_is_honest_about_a_cpu() -> None:
    assert (
        forecast("tiny", torch.device("cpu"), 0.02, 50, 12)
        == "tiny on this CPU: about 1 s an epoch, 12 s for 12 epochs"
    )
    assert "or a GPU" in forecast("alexnet", torch.device("cpu"), 3.2, 10010, 90)
    assert "or a GPU" not in forecast("alexnet", torch.device("cuda"), 3.2, 10010, 90)
    assert duration(119) == "119 s"
    assert duration(120) == "2 minutes"


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


PAGE_FAULTS = """
import resource, torch
from alexprep.train.runtime import keep_freed_memory
def step():
    return [torch.ones(10_000_000) for _ in range(2)]
def faults():
    for _ in range(5):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_kept_memory_is_not_cleared_again() -> None:
    command = [sys.executable, "-c", PAGE_FAULTS]
    many, kept, few = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.split()
    if kept == "False":
        pytest.skip("this malloc has no mallopt")
    # 40 MB, above the largest size that glibc would come to keep by itself: 10,000 pages each.
    assert int(few) * 10 < int(many)
