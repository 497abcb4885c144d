"""What a scheme will send, from the shapes of the whole network alone; `Traffic` counts what it did send."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from alexprep.train.distributed.tensor_parallel import DROPOUTS, LOGITS, Gather, Scheme, divide, part_of
from alexprep.train.distributed.world import Bytes, Traffic, World, ring_bytes
from alexprep.train.models.layers import LocalResponseNorm
from alexprep.train.precision import HALF, Precision

LABEL = 8  # bytes


def predicted_bytes(
    network: nn.Sequential,
    scheme: Scheme,
    ranks: int,
    batch: int,
    image: Sequence[int] = (3, 224, 224),
    *,
    rank: int = 0,
    share_batches: bool = False,
    itemsize: int = 4,
    precision: Precision = "fp32",
) -> Bytes:
    """What a rank sends to the others in one training step, as `Traffic` counts it.

    Args:
        network: the whole one; with "ddp" its dropout is replaced, as by `part_of`.
        scheme: how it is split.
        ranks: how many there are.
        batch: images of the whole batch.
        image: (C, H, W).
        rank: whose bytes.
        share_batches: as in `Parallel`.
        itemsize: bytes of a pixel, a weight and, but for bf16 and fp16, an activation.
        precision: of the training.

    >>> predicted_bytes(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), "towers", 2, 10, image=(8,))
    {('1', 'forward'): 80, ('1', 'backward'): 80, ('logits', 'forward'): 40}
    """
    sent = Traffic()
    activation = HALF[precision].itemsize if precision in HALF else itemsize
    shapes, learnt = _inputs(network, batch, image)
    rows = divide(batch, ranks)
    part = part_of(network, scheme, World(rank, ranks, torch.device("cpu")))
    for gather in [module for module in part.network.modules() if isinstance(module, Gather)]:
        whole = shapes[gather.layer].numel() * activation
        parts = gather.sizes if gather.dim else rows
        own = whole * parts[rank] // sum(parts)
        sent.add(gather.layer, "forward", own * (ranks - 1))
        if not gather.replicated and gather.layer in learnt:
            sent.add(gather.layer, "backward", whole - own)
    if scheme == "ddp":  # its gather is a hook, no module
        own = shapes[LOGITS].numel() * activation * rows[rank] // batch
        sent.add(LOGITS, "forward", own * (ranks - 1))
    if part.rows is not None or share_batches:
        sent.add("labels", "forward", rows[rank] * LABEL * (ranks - 1))
    if share_batches:
        sent.add("images", "forward", rows[rank] * math.prod(image) * itemsize * (ranks - 1))
    for name, parameter in part.network.named_parameters():
        if name in part.summed and parameter.requires_grad:
            sent.add(name.rpartition(".")[0], "gradients", ring_bytes(parameter.numel() * itemsize, ranks))
    return sent.since_last()


@torch.no_grad()
def _inputs(network: nn.Sequential, batch: int, image: Sequence[int]) -> tuple[dict[str, torch.Size], set[str]]:
    """The shape that each layer reads, and the layers that have weights to learn below them."""
    values = torch.empty((batch, *image), device="meta")
    shapes, learnt, learning = {}, set(), False
    for name, layer in _flat(network):
        shapes[name] = values.shape
        if learning:
            learnt.add(name)
        learning = learning or any(parameter.requires_grad for parameter in layer.parameters())
        if not isinstance(layer, (LocalResponseNorm, *DROPOUTS)):  # these keep the shape
            weights = {key: weight.to("meta") for key, weight in layer.named_parameters()}
            values = torch.func.functional_call(layer, weights, (values,))
    shapes[LOGITS] = values.shape
    return shapes, learnt


def _flat(network: nn.Sequential, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The layers in order, of nested sequences too."""
    layers: list[tuple[str, nn.Module]] = []
    for name, layer in network.named_children():
        layers += _flat(layer, f"{prefix}{name}.") if isinstance(layer, nn.Sequential) else [(prefix + name, layer)]
    return layers
