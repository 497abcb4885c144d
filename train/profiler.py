"""Records some steps of a training as a Chrome trace: what the host, a GPU and the loader's threads did, and when.

The file opens at https://ui.perfetto.dev and in chrome://tracing. It holds what torch's profiler sees: the ranges that `span` names,
torch's operators, and on a GPU every kernel and copy of the process, DALI's among them. The profiler does not see DALI's own threads;
the trace tells how many cores they kept busy in each step, as the operating system counts it.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from torch.profiler import ProfilerActivity, profile, schedule

from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import published
from alexprep.train import signals_and_memory
from alexprep.train.distributed.world import World
from alexprep.train.logger import Meter
from alexprep.train.signals_and_memory import span

T = TypeVar("T")
SKIPPED = 10  # steps before the first one recorded: in them memory is allocated, kernels are chosen, queues filled
WARM_UP = 2  # of them, in which the profiler is already on
COUNTER = "DALI's threads"
_THREAD_NAME = "[DALI]"  # how the names of DALI's threads begin


class Trace:
    """Records some steps of this process and writes them to a file. Use it as a context manager around the training."""

    def __init__(
        self, folder: Path, steps: int | None, meter: Meter, world: World, *, step: int, last_step: int
    ) -> None:
        """Nothing is recorded yet.

        Args:
            folder: where the file goes; made when there is one.
            steps: to record, if as many are left after the first one, which never is; None for no trace.
            meter: says where the file is; its clock leaves out what the trace itself takes.
            world: the ranks of the training; each writes a file of its own.
            step: steps of the run that are already done.
            last_step: the last step of the run.
        """
        self._folder, self._meter, self._world, self._done = folder, meter, world, step
        self._wanted = steps
        self._steps = min(steps or 0, last_step - step - 1)
        self._skipped = min(SKIPPED, last_step - step - self._steps)
        self._begun = 0  # steps of this process
        self._ticks: list[tuple[int, int]] = []  # where recorded steps begin and end: Unix time, DALI's CPU time, in ns
        self._profile: profile | None = None

    def __enter__(self) -> Trace:
        """Says so if there is nothing to trace."""
        if self._wanted is not None and self._steps < 1:
            self._meter.say("nothing is traced: fewer than two steps are left")
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Writes what there is if the training ends among the steps to record, unless it is left at once (a second Ctrl-C)."""
        if self._profile is None:
            return
        if kind is not None and not issubclass(kind, Exception):
            self._profile.on_trace_ready = None
            self._meter.say("the trace is dropped, nothing of it is left")
        elif signals_and_memory.recording:
            self._tick()
        else:
            self._meter.say(f"nothing is traced: the training ended before step {self._first}")
        self._end()

    def steps(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches. To ask for one begins a step, and to wait for it is the step's first range."""
        if self._steps < 1:
            yield from batches
            return
        iterator = iter(batches)
        while True:
            self._begin_step()
            with span("wait for data"):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch

    @property
    def _first(self) -> int:
        """The first step to record, counted from the run's beginning as people do: from 1."""
        return self._done + self._skipped + 1

    def _begin_step(self) -> None:
        self._begun += 1
        if self._begun == 1:
            self._start()
        if self._profile is None:
            return
        if signals_and_memory.recording:
            self._tick()
        self._profile.step()  # after the last step to record, this writes the file
        if self._begun == self._skipped + 1:
            signals_and_memory.recording = True
            self._tick()
        if self._begun == self._skipped + self._steps + 1:
            self._end()
        self._meter.timer.lap()

    def _start(self) -> None:
        # Beyond its highest level: else each start and stop of the profiler is a line on the terminal.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        warm_up = min(WARM_UP, self._skipped)
        self._profile = profile(
            activities=activities,
            schedule=schedule(skip_first=self._first - warm_up, wait=0, warmup=warm_up, active=self._steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.step_num = self._done  # it names steps by number, as the log does
        self._profile.start()

    def _end(self) -> None:
        finished, self._profile = self._profile, None
        try:
            if finished is not None:
                finished.stop()
        finally:
            signals_and_memory.recording = False

    def _tick(self) -> None:
        self._ticks.append((time.time_ns(), dali_nanoseconds()))

    def _write(self, finished: profile) -> None:
        steps = len(self._ticks) - 1
        last = self._first + steps - 1
        rank = f"-rank{self._world.rank}" if self._world.size > 1 else ""
        path = self._folder / f"steps-{self._first:08d}-{last:08d}{rank}.json.gz"
        try:
            with tempfile.TemporaryDirectory(prefix="alexprep-trace-") as scratch:
                raw = Path(scratch) / "trace.json"
                finished.export_chrome_trace(str(raw))
                document = json.loads(raw.read_bytes())
            document["traceEvents"] += self._counter(document.get("baseTimeNanoseconds", 0))
            self._folder.mkdir(parents=True, exist_ok=True)  # a host without the run has no folder of it either
            with published(path) as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
                packed.write(json.dumps(document).encode())
        except (OSError, ValueError, AlexprepError) as error:
            self._meter.say(f"the trace could not be written, the training goes on: {error}")
            return
        others = ", and a file of each other rank beside it" if rank else ""
        count = "" if steps == self._wanted else f" (of {self._wanted} asked for)"
        what = f"step {last}" if steps == 1 else f"steps {self._first} to {last}"
        self._meter.say(
            f"trace of {what}{count}: {path}{others}; open it at https://ui.perfetto.dev or in chrome://tracing"
        )
        if self._world.device.type == "cuda" and not any(
            event.get("cat") == "kernel" for event in document["traceEvents"]
        ):
            self._meter.say("it shows no GPU kernels: CUPTI gave none; KINETO_LOG_LEVEL=2 tells why")

    def _counter(self, base: int) -> list[dict[str, Any]]:
        """Events that tell how many cores DALI's threads kept busy in each step; `base` is the Unix time of the trace's zero, ns."""
        busy = [(used - before) / (now - then) for (then, before), (now, used) in itertools.pairwise(self._ticks)]
        if not any(busy):
            return []
        about = {"ph": "C", "name": COUNTER, "pid": os.getpid()}
        return [
            {**about, "ts": (now - base) / 1000, "args": {"cores busy": cores}}
            for (now, _), cores in zip(self._ticks, [*busy, 0.0], strict=True)
        ]


def dali_nanoseconds() -> int:
    """Adds up the CPU time that DALI's threads in this process have used so far; 0 where the system does not tell."""
    total = 0
    for task in Path("/proc/self/task").glob("*"):
        try:
            if (task / "comm").read_text().startswith(_THREAD_NAME):
                total += int((task / "schedstat").read_text().split()[0])
        except (OSError, ValueError, IndexError):  # it has just ended, or the kernel keeps no such account
            continue
    return total
