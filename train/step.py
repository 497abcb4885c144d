"""One step of a training: forward, loss, backward, update."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from alexprep.train.compiled import Compiled, compiler_blamed
from alexprep.train.compiled_check import check_compiled
from alexprep.train.spans import span
from alexprep.train.training_state import TrainingState


def take_step(state: TrainingState, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Changes weights, velocities and random numbers; the position is the caller's to move. All ranks call it.

    Args:
        state: of the training.
        images: this rank's, float32 (n, C, H, W).
        labels: of the whole batch, int64 (N,).

    Returns:
        The mean loss (), nats, and the logits (N, classes), both of the whole batch, from before the update.
    """
    with compiler_blamed(state.device):
        network = state.called_for(len(labels))
        if isinstance(network, Compiled) and not network.checked:
            check_compiled(state, network, images, labels)
            network.checked = True
        with span("forward"):
            logits = state.logits(images, len(labels))
            loss = F.cross_entropy(logits, labels)  # the negative of the paper's objective, section 3.5
        state.update(loss)
    return loss, logits
