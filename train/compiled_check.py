"""A compiled network's gradients are held against those of the network as written: torch's compiler has silently given wrong ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from alexprep.shards.errors import AlexprepError
from alexprep.train.precision import HALF, logits
from alexprep.train.training_state import TrainingState

# Length of the difference over length, in one layer. Rounding alone makes 0.004 of it in AlexNet's float32, and in bf16 0.4.
MOST_APART, MOST_APART_IN_HALF = 0.1, 0.8


def check_compiled(
    state: TrainingState,
    compiled: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
) -> None:
    """Computes the gradients of a batch in both ways. Weights, buffers and random numbers stay as they are; all ranks call it.

    Args:
        state: of the training.
        compiled: its network, compiled.
        images: this rank's part of a whole batch.
        labels: of the whole batch.

    Raises:
        AlexprepError: the gradients of a layer differ by more than rounding.
    """
    right = _gradients(state, state.network, images, labels)
    found = _gradients(state, compiled, images, labels)
    state.optimizer.zero_grad()
    last = images.is_contiguous(memory_format=torch.channels_last)
    most = MOST_APART_IN_HALF if state.precision in HALF else MOST_APART
    for name, gradient in right.items():
        other = found.get(name, torch.zeros_like(gradient))
        apart, length = float((other - gradient).norm()), float(gradient.norm())
        if not apart <= most * length:
            raise AlexprepError(
                f"--compile: torch {torch.__version__} compiles a wrong gradient of {name}: it differs from that of the network as "
                f"written by {apart / length if length else apart:.2g} times its length. Nothing was trained with it: go on with "
                f"--resume --no-compile{'' if last else ', or with --channels-last'}"
            )


def _gradients(
    state: TrainingState,
    network: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Of the mean loss, by parameter, in float32, times the factor that fp16 needs."""
    state.optimizer.zero_grad()
    with _left_alone(state):
        loss = F.cross_entropy(logits(network, images, state.precision), labels)
        (loss * state.update.loss_scale).backward()  # type: ignore[no-untyped-call]
        state.parallel.sum_gradients()
    named = state.network.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


@contextlib.contextmanager
def _left_alone(state: TrainingState) -> Iterator[None]:
    """After the block random numbers and buffers are as before."""
    devices = [state.device] if state.device.type == "cuda" else []
    buffers = {name: buffer.clone() for name, buffer in state.network.named_buffers()}
    with torch.random.fork_rng(devices):
        yield
    with torch.no_grad():
        for name, buffer in state.network.named_buffers():
            buffer.copy_(buffers[name])
