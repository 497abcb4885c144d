"""From a loss to moved weights: gradients, their sum over the ranks, and the optimizer's step."""

from __future__ import annotations

import math
from typing import Any

import torch

from alexprep.shards.errors import AlexprepError
from alexprep.train.distributed.parallel import Parallel
from alexprep.train.optimizer import MomentumSGD
from alexprep.train.precision import Precision
from alexprep.train.spans import span

LEAST_SCALE = 1.0  # of the loss, in fp16: gradients that overflow without any scaling are no matter of scaling


class Update:
    """Moves the weights of one network with one optimizer; all ranks call it together.

    In fp16 the loss is multiplied before gradients are computed, so that small ones do not vanish, and the gradients are divided after
    their sum over the ranks: `torch.amp.GradScaler`. Where one is infinite or NaN on any rank, no rank moves a weight, and the factor is
    halved on all.

    Attributes:
        skipped: steps, also before the state that was loaded, that moved nothing because a gradient overflowed.
    """

    def __init__(self, parallel: Parallel, optimizer: MomentumSGD, precision: Precision = "fp32") -> None:
        """For the network of `parallel`."""
        self._parallel, self._optimizer = parallel, optimizer
        self._scaler = torch.amp.GradScaler(parallel.world.device.type, enabled=precision == "fp16")
        self.skipped = 0

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by at present; 1 in every precision but fp16. On a GPU this waits for the queue."""
        return float(self._scaler.get_scale())

    def __call__(self, loss: torch.Tensor) -> None:
        """Moves the weights once, down the gradient of a mean loss, float32 (), of the whole batch.

        Raises:
            AlexprepError: in fp16, gradients overflow even where the loss is not multiplied any more.
        """
        self._optimizer.zero_grad()
        with span("backward"):
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        with span("gradient sums"):
            self._parallel.sum_gradients()
        with span("update"):
            if self._scaler.is_enabled():
                self._step_scaled()
            else:
                self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """JSON values: {"skipped", "scaler"}; the latter is empty in every precision but fp16."""
        return {"skipped": self.skipped, "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave in the same precision."""
        self.skipped = state["skipped"]
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])

    def _step_scaled(self) -> None:
        """The optimizer's step, if every gradient of every rank is finite."""
        world = self._parallel.world
        if world.size > 1:
            gradients = [w.grad for w in self._parallel.network.parameters() if w.grad is not None]
            if world.any(not torch.stack([gradient.isfinite().all() for gradient in gradients]).all()):
                gradients[0].fill_(math.inf)  # so that this rank's scaler finds it too
        before = self.loss_scale
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self.loss_scale < before:
            self.skipped += 1
            if self.loss_scale < LEAST_SCALE:
                raise AlexprepError(
                    f"gradients overflow in fp16 with the loss multiplied by only {before:g}: nothing was saved since the last "
                    "checkpoint; train with --precision bf16, or with a lower --lr"
                )
