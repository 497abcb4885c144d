"""What a training makes small, beside the softmax's cross-entropy: sigmoid cross-entropy, the Euclidean distance; and mixed pairs.

All are of outputs (N, classes) and labels, int64 (N,), and give nats or squares an image, float32 (N,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from alexprep.train.field_values import Loss


def image_losses(kind: Loss, output: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """The loss of each image.

    Args:
        kind: "softmax": cross-entropy with the softmax of the outputs. "sigmoid": the sum over the classes of the binary cross-entropy with
            the logistic function of each output. "euclidean": half the squared distance of the outputs from the target.
        output: float (N, classes).
        labels: int64 (N,); the target is 1 there and 0 elsewhere.
        smoothing: share of the target that is spread over all classes.

    >>> image_losses("euclidean", torch.tensor([[1.0, 3.0]]), torch.tensor([0])).tolist()
    [4.5]
    """
    if kind == "softmax":
        return F.cross_entropy(output, labels, reduction="none", label_smoothing=smoothing)
    classes = output.shape[1]
    target = F.one_hot(labels, classes).to(output.dtype) * (1 - smoothing) + smoothing / classes
    if kind == "sigmoid":
        return F.binary_cross_entropy_with_logits(output, target, reduction="none").sum(dim=1)
    return (output - target).square().sum(dim=1) / 2


def mixed_loss(
    output: torch.Tensor,
    labels: torch.Tensor,
    partner_labels: torch.Tensor,
    weights: torch.Tensor,
    smoothing: float = 0.0,
    kind: Loss = "softmax",
) -> torch.Tensor:
    """The mean over a batch of weight · loss of the own label + (1 - weight) · loss of the partner's (mixup, arXiv 1710.09412)."""
    own, partners = (image_losses(kind, output, each, smoothing) for each in (labels, partner_labels))
    return (weights * own + (1 - weights) * partners).mean()
