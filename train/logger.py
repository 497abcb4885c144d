"""Tells how a training goes: a JSON-lines log, a live line on a terminal (plain lines elsewhere), and TensorBoard's events if asked for.

log.jsonl holds one JSON object a line:

    {"kind": "steps", "step", "epoch", "loss", "top1_error", "top5_error", "lr", "images_per_second", "data_wait_ms", "step_ms"}
    {"kind": "epoch", "step", "epoch", "loss", "top1_error", "top5_error", "lr", "seconds", "val": {…} or null, "best": {…} or null}
    {"kind": "skip", "step", "epoch", "loss_scale"}      a step that moved nothing since a gradient overflowed in fp16
    {"kind": "change", "step", "epoch", "lr", "changes": {NAME: {"was", "is"}}}     what was given otherwise on resuming
    {"kind": "not finite", "step", "epoch", "lr", "began": {"step", "what", "name", "value"} or null}      the end of the training

`best` is the best evaluation so far, with the step and the epoch (from 1) that it followed. `step` counts optimizer steps done, `epoch` whole epochs done before it; losses are in nats, errors in percent.
A "steps" record is a mean over the steps since the record before; `step_ms` is a step without its wait for data.
On a GPU the wait is an upper bound: the GPU may still be computing meanwhile. What happens within a step is in no log: see `profiler`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import json_bytes
from alexprep.train.checkpoint import publish, writing
from alexprep.train.metrics import SPEED, Means, StepTimer
from alexprep.train.precision import NotFinite, Origin

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LINE_SECONDS = 10.0  # at most one plain line of progress in this time
ETA_SECONDS = 1800.0  # of the past, from which the bar tells how long the rest takes: an evaluation or two among them
QUALITY = Means._fields


class Meter:
    """Writes the log and tells people. Use it as a context manager; the log is open inside."""

    def __init__(
        self,
        log: Path | None,
        *,
        step: int,
        total_steps: int,
        epoch: int | None = None,
        epochs: int | None = None,
        console: Console | None = None,
        board: Board | None = None,
    ) -> None:
        """Nothing is read or written yet.

        Args:
            log: path of log.jsonl; records after `step` are dropped, so that a resumed run logs every step once. None for a rank
                for which another one speaks: nothing is written or shown.
            step: optimizer steps already done.
            total_steps: of the whole training, for the bar.
            epoch: whole epochs already done, with their evaluation; records of later ones are dropped too.
            epochs: of the whole training, for people.
            console: where people read; by default stderr.
            board: is given every record too.
        """
        self.timer = StepTimer()
        self._logged = StepTimer()
        self._logged_step, self._epoch = step, epoch
        self._last_line = -math.inf
        self._stack = contextlib.ExitStack()
        self._console = console or Console(file=_stderr(), stderr=True, quiet=log is None)
        self._log, self._board = log, board
        self._total, self._epochs = total_steps, epochs
        self._bar, self._figures = _Bar(self._console), ""
        self._task = self._bar.add_task("training", total=total_steps, completed=step)

    def __enter__(self) -> Meter:
        """Opens the log and, on a terminal, shows the bar."""
        log = self._log or Path(os.devnull)
        with writing(log):
            if self._log is not None:
                _keep_until(log, self._logged_step, self._epoch)
            # Without a buffer, so that a line which a full disk refused is not tried again when the file is closed.
            self._file = self._stack.enter_context(open(log, "ab", buffering=0))
        if self._console.is_terminal:
            self._stack.enter_context(self._bar)
        return self

    def __exit__(self, *error: object) -> None:
        """Closes both; what was measured last stays on the terminal."""
        self._bar.figures = self._figures
        self._stack.close()

    def say(self, line: str) -> None:
        """A line for people."""
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def record_steps(self, means: Means, *, step: int, epoch: int, lr: float) -> float:
        """Logs the steps since the last record, of which there is at least one.

        Returns:
            Seconds a step.

        Raises:
            NotFinite: the loss is not finite.
        """
        if not math.isfinite(means.loss):
            raise NotFinite(f"the loss became {means.loss} within steps {self._logged_step + 1} to {step}")
        speed = self.timer.since(self._logged)
        self._logged, self._logged_step = replace(self.timer), step
        self._write({"kind": "steps", "step": step, "epoch": epoch, **means._asdict(), "lr": lr, **speed})
        self._show(means, speed, step, epoch)
        return (speed["data_wait_ms"] + speed["step_ms"]) / 1000

    def _show(self, means: Means, speed: dict[str, float], step: int, epoch: int) -> None:
        """The bar and its figures; or, every `LINE_SECONDS`, a line. All fit 80 columns."""
        images, wait, work = (speed[name] for name in SPEED)
        quality = f"loss {means.loss:.4f}  top-1 error {means.top1_error:.1f} %"
        self._figures = f"{quality}  {images:.0f} images/s  data {_ms(wait)}  step {_ms(work)}"
        self._bar.figures = self._figures
        self._bar.update(self._task, completed=step, description=self._epoch_words(epoch))
        if not self._console.is_terminal and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            total = str(self._total)
            self.say(
                f"{self._epoch_words(epoch)}  {step:{len(total)}}/{total}  loss {means.loss:.4f}  error {means.top1_error:5.1f} %  "
                f"{images:5.0f} images/s  wait {100 * wait / (wait + work):.0f} %"
            )

    def _epoch_words(self, epoch: int) -> str:
        """The number of an epoch, from 1."""
        total = "" if self._epochs is None else str(self._epochs)
        return f"epoch {epoch + 1:{len(total) or 1}}{total and '/'}{total}"

    def evaluating(self, images: int, split: str) -> None:
        """Tells that an evaluation has begun."""
        if self._console.is_terminal:
            self._bar.figures = f"evaluating on {images:,} images of {split}"
            self._bar.refresh()
        else:
            self.say(f"evaluating on {images:,} images of {split}")

    def record_skip(self, *, step: int, epoch: int, loss_scale: float) -> None:
        """Logs a step that moved nothing since a gradient overflowed, and what the loss is multiplied by from now on."""
        self._write({"kind": "skip", "step": step, "epoch": epoch, "loss_scale": loss_scale})
        self.say(f"step {step} skipped: a gradient overflowed in fp16; the loss is now multiplied by {loss_scale:g}")

    def record_change(self, changes: dict[str, Any], *, step: int, epoch: int, lr: float) -> None:
        """Logs what decides the result and is otherwise from here on, and the rate that comes of it."""
        self._write({"kind": "change", "step": step, "epoch": epoch, "lr": lr, "changes": changes})
        words = ", ".join(f"{name} was {each['was']}, is now {each['is']}" for name, each in changes.items())
        self.say(f"from step {step} on: {words}; the rate is now {lr:g}")

    def record_not_finite(self, began: Origin | None, *, step: int, epoch: int, lr: float) -> None:
        """Logs that a loss or a weight was not finite after `step`, and where it began, as far as that is known."""
        seen = None if began is None else began._asdict()
        self._write({"kind": "not finite", "step": step, "epoch": epoch, "lr": lr, "began": seen})

    def record_epoch(
        self,
        means: Means,
        *,
        step: int,
        epoch: int,
        lr: float,
        seconds: float,
        val: dict[str, Any] | None,
        best: dict[str, Any] | None = None,
    ) -> None:
        """Logs a whole epoch: `means` over its training images, `val` from `validate`, `best` the best of these so far."""
        where = {"kind": "epoch", "step": step, "epoch": epoch}
        self._write({**where, **means._asdict(), "lr": lr, "seconds": seconds, "val": val, "best": best})
        self.say(f"{self._epoch_words(epoch)} in {duration(seconds)}, rate {lr:.4g}")
        for split, found in (("train", means._asdict()), *([(val["split"], val)] if val else [])):
            best_words = "  best so far" if found is val and best and best["step"] == step else ""
            errors = f"top-1 error {found['top1_error']:6.2f} %  top-5 error {found['top5_error']:6.2f} %"
            self.say(f"  {split:<5}  loss {found['loss']:.4f}  {errors}{best_words}")

    def _write(self, record: dict[str, Any]) -> None:
        line = json_bytes(record, indent=None)
        if self._log is not None:
            with writing(self._log, len(line)):
                while line:  # a disk that has room for a part takes it
                    line = line[self._file.write(line) :]
        if self._board is not None:
            self._board.write(record)


class _Bar(Progress):
    """Where a training stands, on one line of a terminal; under it what was measured last."""

    def __init__(self, console: Console) -> None:
        """Nothing is shown yet."""
        self.figures = ""
        columns = TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn()
        super().__init__(*columns, TextColumn("left"), console=console, expand=True, speed_estimate_period=ETA_SECONDS)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Both lines."""
        yield from super().get_renderables()
        yield Text(self.figures, no_wrap=True, overflow="ellipsis")


def _ms(value: float) -> str:
    """Milliseconds in few characters.

    >>> _ms(2.14), _ms(1234.5)
    ('2.1 ms', '1234 ms')
    """
    return f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"


def _keep_until(log: Path, step: int, epoch: int | None) -> None:
    """Drops records of what comes after a position, and a last line that a kill cut short.

    After an epoch's last step the epoch itself may still be to come, with its evaluation.
    """
    if not log.exists():
        return
    kept, lines = [], log.read_bytes().splitlines(keepends=True)
    for line in lines:
        try:
            record = json.loads(line)
            to_come = record["kind"] == "epoch" and epoch is not None and record["epoch"] >= epoch
            if line.endswith(b"\n") and record["step"] <= step and not to_come:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    if kept != lines:
        publish(log, b"".join(kept))


def duration(seconds: float) -> str:
    """Writes a length of time for people.

    >>> duration(42.4), duration(340), duration(3 * 3600), duration(41 * 86400)
    ('42 s', '6 minutes', '3.0 hours', '41.0 days')
    """
    for unit, length, digits in (("days", 86400, 1), ("hours", 3600, 1), ("minutes", 60, 0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def forecast(recipe: str, device: torch.device, step_seconds: float, epoch_steps: int, epochs: int) -> str:
    """Tells what the whole training will take at the speed of its first steps.

    >>> forecast("alexnet", torch.device("cpu"), 3.2, 10010, 90)
    'alexnet on this CPU: about 8.9 hours an epoch, 33.4 days for 90 epochs; use --steps to try it, or a GPU'
    """
    epoch = step_seconds * epoch_steps
    where = "CPU" if device.type == "cpu" else "GPU"
    advice = "; use --steps to try it, or a GPU" if where == "CPU" and epoch * epochs > 86400 else ""
    return f"{recipe} on this {where}: about {duration(epoch)} an epoch, {duration(epoch * epochs)} for {epochs} epochs{advice}"


class Board:
    """Writes each record of log.jsonl for TensorBoard, as scalars of its step; as float32, which is all that TensorBoard keeps."""

    def __init__(self, folder: Path, step: int) -> None:
        """Opens another file of events, after `step` optimizer steps: what earlier files hold of later ones is no longer shown."""
        self._writer = writer_class()(str(folder), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Adds a record, and hands it to the system, so that killing the process loses none."""
        for tag, value in scalars(record).items():
            self._writer.add_scalar(tag, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Gives the values of a record by their tags in TensorBoard, see docs/watching.md.

    >>> scalars({"kind": "epoch", "step": 9, "loss": 2.0, "top1_error": 70.0, "top5_error": 20.0, "lr": 0.01, "val": None})
    {'epoch/loss': 2.0, 'epoch/top1_error': 70.0, 'epoch/top5_error': 20.0}
    """
    if record["kind"] == "steps":
        found = {f"train/{name}": record[name] for name in QUALITY} | {"train/learning_rate": record["lr"]}
        return found | {f"speed/{name}": record[name] for name in SPEED}
    if record["kind"] == "skip":
        return {"train/loss_scale": record["loss_scale"]}
    if record["kind"] != "epoch":
        return {}  # words, not numbers
    found = {f"epoch/{name}": record[name] for name in QUALITY}
    return found | {f"val/{name}": record["val"][name] for name in QUALITY if record["val"]}


def writer_class() -> type[SummaryWriter]:
    """Imports torch's writer of events, if the package tensorboard is there, which it needs."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise AlexprepError(
            f'--tensorboard needs the package tensorboard ({error}): pip install "alexprep[tensorboard]"'
        ) from None
    return SummaryWriter


class _Stderr:
    """stderr, but words that it cannot take (the pipe or terminal is closed, the disk full) are lost: no reason to end a training."""

    def write(self, text: str) -> int:
        """Writes if it can."""
        with contextlib.suppress(OSError):
            self._stream().write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes if it can."""
        with contextlib.suppress(OSError):
            self._stream().flush()

    def __getattr__(self, name: str) -> Any:
        """All else as it is: its encoding, whether it is a terminal."""
        return getattr(self._stream(), name)

    def _stream(self) -> Any:
        """That of this moment; not what stands in for it while a bar is shown, which writes to this one."""
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)


def _stderr() -> IO[str] | None:
    return cast(IO[str], _Stderr()) if sys.stderr else None  # None where the process began without one
