"""Error of a network over a split: top-1 and top-5 in percent, mean cross-entropy, from one centre crop or ten views."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn

from alexprep.shards.errors import AlexprepError


class LabelledBatch(Protocol):
    """What is read of a loader's `Batch`."""

    @property
    def images(self) -> torch.Tensor:
        """Float (N, C, H, W), or (N, 10, C, H, W) for ten views."""

    @property
    def labels(self) -> torch.Tensor:
        """Int64 (N,)."""


def evaluate(network: nn.Module, batches: Iterable[LabelledBatch]) -> dict[str, float]:
    """Runs the network over one pass of a loader.

    With ten views the softmax outputs are averaged over the views before anything is computed (section 4.1; the 2012 code did so too).
    Figures are kept an image and added with one rounding, so they do not depend on where batches end.

    Args:
        network: left in the mode, training or evaluation, that it came in.
        batches: with logits' device; at least one image in all.

    Returns:
        {"top1_error": percent, "top5_error": percent, "loss": nats, "samples": count}. Ties count in parts, see `credit`.
        With fewer than five classes the top-5 error is 0.

    Raises:
        AlexprepError: there is no image, or the network gives NaN or infinity.
    """
    columns: list[torch.Tensor] = []
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            columns.extend(_figures(network, batch) for batch in batches)
    finally:
        network.train(was_training)
    if not columns:
        raise AlexprepError("there is no image to evaluate on: name another --split")
    losses, top1, top5 = torch.cat(columns, dim=1).cpu().tolist()
    samples = len(losses)
    return {
        "top1_error": 100 * (samples - math.fsum(top1)) / samples,
        "top5_error": 100 * (samples - math.fsum(top5)) / samples,
        "loss": math.fsum(losses) / samples,
        "samples": samples,
    }


def credit(scores: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """How far each label is among the `k` best scores, as in the 2012 code.

    1 where it is, 0 where it is not. Where it ties with others for the last places, the places left over the number of those that tie.

    Args:
        scores: (N, classes), finite.
        labels: int64 (N,).
        k: at least 1.

    Returns:
        float64 (N,) within 0 to 1.

    >>> credit(torch.tensor([[3.0, 3.0, 1.0], [3.0, 2.0, 1.0]]), torch.tensor([0, 1]), 1).tolist()
    [0.5, 0.0]
    """
    own = scores.gather(1, labels[:, None])
    better = (scores > own).sum(dim=1)
    equal = (scores == own).sum(dim=1)
    return ((k - better).double() / equal).clamp(0.0, 1.0)


def _figures(network: nn.Module, batch: LabelledBatch) -> torch.Tensor:
    """float64 (3, N): cross-entropy, top-1 credit, top-5 credit of each image."""
    images, labels = batch.images, batch.labels
    views = images.shape[1] if images.ndim == 5 else 1
    logits = network(images.flatten(0, 1) if images.ndim == 5 else images)
    if not torch.isfinite(logits).all():
        raise AlexprepError("the network gives NaN or infinity: its training diverged, train again with a lower --lr")
    # log of the mean over the views of each softmax, in float64
    logs = logits.double().log_softmax(dim=1).unflatten(0, (len(labels), views)).logsumexp(dim=1) - math.log(views)
    loss = -logs.gather(1, labels[:, None]).squeeze(1)
    return torch.stack([loss, credit(logs, labels, 1), credit(logs, labels, 5)])
