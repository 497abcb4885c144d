"""The records of a training's log as TensorBoard events."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alexprep.shards.errors import AlexprepError
from alexprep.train.evaluation.sums import SPEED, Means

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

QUALITY = Means._fields


class Board:
    """Writes each record of log.jsonl as scalars of its step; as float32, which is all that TensorBoard keeps.

    Tags: train/loss, train/top1_error, train/top5_error, train/learning_rate, speed/images_per_second, speed/data_wait_ms and
    speed/step_ms, means since the record before; train/loss_scale where a step was skipped; epoch/… and val/… (loss and both errors), of
    whole epochs and their evaluations.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """Opens another file of events.

        Args:
            folder: of the event files, made if missing.
            step: optimizer steps already done: what earlier files hold of later steps is no longer shown.

        Raises:
            AlexprepError: the package tensorboard is missing.
        """
        # TensorBoard reads files in the order of their names, which begin with the second in which they were opened.
        while any(folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.02)
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
    """The values of a record by tag.

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
    """torch's writer of events.

    Raises:
        AlexprepError: the package tensorboard, which it needs, is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise AlexprepError(
            f'--tensorboard needs the package tensorboard ({error}): pip install "alexprep[tensorboard]"'
        ) from None
    return SummaryWriter
