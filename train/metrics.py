"""What a training measures: errors of a network over a split, running means over an epoch, and where the time of a step goes.

This is what the training loop calls. Evaluating finished runs, alone or several as one, is in `alexprep.train.evaluation`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.data import LoadedBatch
from alexprep.train.precision import NotFinite, Precision, logits

TOP = 5  # guesses an image, in the error that ILSVRC ranks by
FAR = 2.0  # times the loss of a guess, the logarithm of the number of classes
NO_LABELS = "none of the images has a label, so there is no error to measure: name another --split"
SPEED = ("images_per_second", "data_wait_ms", "step_ms")  # what `StepTimer.since` tells


def validate(network: nn.Module, batches: Iterable[LoadedBatch], precision: Precision = "fp32") -> dict[str, float]:
    """Measures the error of a network over one pass of a loader.

    With ten views the softmax outputs are averaged over the views before anything is computed (section 4.1; the 2012 code did so too).
    Figures are kept an image and added with one rounding, so they do not depend on where batches end. Images without a label are
    left out.

    Args:
        network: left in the mode, training or evaluation, that it came in.
        batches: on the network's device; labels are -1 where the class is unknown.
        precision: that the network computes in; all the rest is float64.

    Returns:
        {"top1_error": percent, "top5_error": percent, "loss": nats, "samples": count}. Ties count in parts, see `top_k_credit`.
        With fewer than five classes the top-5 error is 0.

    Raises:
        AlexprepError: there is no image, none has a label, or the network gives NaN or infinity.
    """
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            measured = [
                image_errors(log_probabilities(network, batch.images, precision), batch.labels) for batch in batches
            ]
    finally:
        network.train(was_training)
    if not measured:
        raise AlexprepError("there is no image to evaluate on: name another --split")
    return mean_errors(torch.cat(measured, dim=1).cpu())


def log_probabilities(network: nn.Module, images: torch.Tensor, precision: Precision = "fp32") -> torch.Tensor:
    """Asks a network in evaluation mode for the probability of each class: its logarithm, of the mean over the views.

    Images (N, C, H, W) or (N, views, C, H, W) -> float64 (N, classes), nats: a sure network's small probabilities would be 0.

    Raises:
        NotFinite: the network gives NaN or infinity.
    """
    views = images.shape[1] if images.ndim == 5 else 1
    found = logits(network, images.flatten(0, 1) if images.ndim == 5 else images, precision)
    if not torch.isfinite(found).all():
        too_small = "in fp16 nothing may exceed 65,504: try --precision bf16"
        diverged = "its training diverged, train again with a lower --lr"
        raise NotFinite("the network gives NaN or infinity", too_small if precision == "fp16" else diverged)
    logs: torch.Tensor = found.double().log_softmax(dim=1).reshape(-1, views, found.shape[1])
    return logs.logsumexp(dim=1) - math.log(views)


def image_errors(logs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Measures each image by itself: cross-entropy (nats), top-1 credit and top-5 credit, float64 (3, N).

    Logarithms of probabilities, float64 (N, classes); labels int64 (N,), -1 where unknown, which makes the errors NaN.
    """
    unknown = labels < 0
    labels = labels.clamp(min=0)
    losses = -logs.gather(1, labels[:, None]).squeeze(1)
    return torch.cat([losses[None], top_k_credit(logs, labels, (1, TOP))]).masked_fill(unknown, math.nan)


def mean_errors(errors: torch.Tensor) -> dict[str, float]:
    """Averages what `image_errors` gave, on the CPU, into what `validate` returns."""
    known = errors[:, ~errors[0].isnan()]
    samples = known.shape[1]
    if not samples:
        raise AlexprepError(NO_LABELS)
    losses, top1, top5 = known.tolist()
    return {
        "top1_error": 100 * (samples - math.fsum(top1)) / samples,
        "top5_error": 100 * (samples - math.fsum(top5)) / samples,
        "loss": math.fsum(losses) / samples,
        "samples": samples,
    }


def top_k_credit(scores: torch.Tensor, labels: torch.Tensor, ks: Sequence[int]) -> torch.Tensor:
    """Tells how far each label is among the k best scores, as in the 2012 code.

    1 where it is, 0 where it is not. Where it ties with others for the last places, the places left over the number of those that tie.
    Scores (N, classes), finite; labels int64 (N,), at least 0 -> float64 (len(ks), N).

    >>> top_k_credit(torch.tensor([[3.0, 3.0, 1.0], [3.0, 2.0, 1.0]]), torch.tensor([0, 1]), (1, 2)).tolist()
    [[0.5, 0.0], [1.0, 1.0]]
    """
    own = scores.gather(1, labels[:, None])
    better = torch.count_nonzero(scores > own, dim=1)  # three times as fast as a sum of truths
    equal = torch.count_nonzero(scores == own, dim=1)
    return torch.stack([((k - better).double() / equal).clamp(0.0, 1.0) for k in ks])


class Means(NamedTuple):
    """Averages over some training images: nats, percent, percent."""

    loss: float
    top1_error: float
    top5_error: float


class RunningTotals:
    """Adds up loss and errors of an epoch on the device, so that no step waits for the GPU.

    `totals` is float64 (4,): summed loss, top-1 credit, top-5 credit, images. Saved and restored with a checkpoint.

    >>> totals = RunningTotals(torch.device("cpu"))
    >>> totals.add(torch.tensor(0.5), torch.eye(4), torch.tensor([0, 1, 2, 0]))
    >>> totals.since(torch.zeros(4))
    Means(loss=0.5, top1_error=25.0, top5_error=0.0)
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing added yet."""
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds a batch: its mean loss (), logits (N, classes), labels int64 (N,)."""
        images = len(labels)
        top1, top5 = top_k_credit(logits, labels, (1, TOP)).sum(dim=1)
        self.totals += torch.stack([loss.double() * images, top1, top5, torch.full_like(top1, images)])

    def since(self, earlier: torch.Tensor) -> Means:
        """Means over what was added after `totals` was `earlier`; on a GPU this waits for the queue."""
        loss, top1, top5, images = (self.totals - earlier).tolist()
        return Means(loss / images, 100 * (images - top1) / images, 100 * (images - top5) / images)


def loss_doubt(classes: int, train_loss: float | None, val: Mapping[str, Any] | None) -> str | None:
    """A sentence about a loss far above that of a guess: of the validation, or of the last epoch's training where nothing else is known.

    >>> loss_doubt(8, 78.0, None)
    'the loss of 78 is far above 2.08, that of a guess among 8 classes: the training diverges, begin again with a lower --lr'
    """
    loss, guess = train_loss if val is None else float(val["loss"]), math.log(classes)
    if loss is None or loss <= FAR * guess:
        return None
    return (
        f"the loss of {loss:.3g} is far above {guess:.2f}, that of a guess among {classes} classes: the training diverges, begin again with "
        "a lower --lr"
    )


def doubts(classes: int, train_loss: float | None, val: Mapping[str, Any] | None) -> list[str]:
    """What speaks against a training that ended, as sentences: its loss, and an error as large as a guess's.

    The loss (nats) is that of the last epoch, `val` what `validate` gave; None where there is none. An error counts as a guess's where
    it is within two standard errors of it.
    """
    found = [loss_doubt(classes, train_loss, val)]
    chance = 100 * (1 - 1 / classes)
    if val is not None and val["top1_error"] > chance - 2 * math.sqrt(chance * (100 - chance) / val["samples"]):
        found.append(
            f"the validation error of {val['top1_error']:.1f} % is no better than chance, {chance:.1f} % for {classes} classes, as far as "
            f"{val['samples']:,} images tell: train longer, or with another --lr"
        )
    return [doubt for doubt in found if doubt is not None]


@dataclass
class StepTimer:
    """Counts images, steps and seconds, waiting for data and working apart."""

    images: int = 0
    steps: int = 0
    wait_seconds: float = 0.0
    busy_seconds: float = 0.0
    _last: float = field(default_factory=time.perf_counter)

    def lap(self) -> float:
        """Seconds since the last lap, or since the timer was made."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds

    def count(self, images: int, wait_seconds: float, busy_seconds: float) -> None:
        """Adds a step. On a GPU single times mean little (it works behind the host's back), their sums up to a record are right."""
        self.images += images
        self.steps += 1
        self.wait_seconds += wait_seconds
        self.busy_seconds += busy_seconds

    def since(self, earlier: StepTimer) -> dict[str, float]:
        """Images a second, and milliseconds a step waiting for data and working, after a copy was made. At least one step lies between."""
        steps = self.steps - earlier.steps
        wait, busy = self.wait_seconds - earlier.wait_seconds, self.busy_seconds - earlier.busy_seconds
        rate = (self.images - earlier.images) / (wait + busy)
        return dict(zip(SPEED, (rate, 1000 * wait / steps, 1000 * busy / steps), strict=True))
