"""Loss and errors of an epoch so far, and the clock that goes with them."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from alexprep.train.metrics import TOP, credits

SPEED = ("images_per_second", "data_wait_ms", "step_ms")  # what `Pace.since` tells


class Means(NamedTuple):
    """Averages over some training images: nats, percent, percent."""

    loss: float
    top1_error: float
    top5_error: float


class Sums:
    """Loss and errors added up on the device, so that no step waits for the GPU.

    `totals` is float64 (4,): summed loss, top-1 credit, top-5 credit, images. Saved and restored with a checkpoint.

    >>> sums = Sums(torch.device("cpu"))
    >>> sums.add(torch.tensor(0.5), torch.eye(4), torch.tensor([0, 1, 2, 0]))
    >>> sums.since(torch.zeros(4))
    Means(loss=0.5, top1_error=25.0, top5_error=0.0)
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing added yet."""
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds a batch: its mean loss (), logits (N, classes), labels int64 (N,)."""
        images = len(labels)
        top1, top5 = credits(logits, labels, (1, TOP)).sum(dim=1)
        self.totals += torch.stack([loss.double() * images, top1, top5, torch.full_like(top1, images)])

    def since(self, earlier: torch.Tensor) -> Means:
        """Means over what was added after `totals` was `earlier`; on a GPU this waits for the queue."""
        loss, top1, top5, images = (self.totals - earlier).tolist()
        return Means(loss / images, 100 * (images - top1) / images, 100 * (images - top5) / images)


class Pace:
    """Images, steps and seconds of the training in this process."""

    def __init__(self) -> None:
        """Nothing counted yet; the first lap begins."""
        self.images = self.steps = 0
        self.wait_seconds = self.busy_seconds = 0.0
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds

    def count(self, images: int, wait_seconds: float, busy_seconds: float) -> None:
        """Adds a step. On a GPU single times mean little (it works behind the host's back), their sums up to a record are right."""
        self.images += images
        self.steps += 1
        self.wait_seconds += wait_seconds
        self.busy_seconds += busy_seconds

    def copy(self) -> Pace:
        """The counts so far, to be given to `since` later."""
        other = Pace()
        other.images, other.steps = self.images, self.steps
        other.wait_seconds, other.busy_seconds = self.wait_seconds, self.busy_seconds
        return other

    def since(self, earlier: Pace) -> dict[str, float]:
        """Images a second, and milliseconds a step waiting for data and working, after `earlier`. At least one step lies between."""
        steps = self.steps - earlier.steps
        wait, busy = self.wait_seconds - earlier.wait_seconds, self.busy_seconds - earlier.busy_seconds
        rate = (self.images - earlier.images) / (wait + busy)
        return dict(zip(SPEED, (rate, 1000 * wait / steps, 1000 * busy / steps), strict=True))
