"""A network compiled by torch.compile for batches of one size; others it computes as it is written."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.parallel.exchange import Gather, WholeDraw


class Compiled:
    """Calls a network.

    Random numbers are drawn as without compilation; results differ by rounding. The network's modules and the names of its weights stay
    as they are. What ranks exchange in the middle of it is left out of the compilation, which makes several pieces of the rest.
    """

    def __init__(self, network: nn.Module, rows: int) -> None:
        """Nothing is compiled before the first call.

        Args:
            network: in training mode.
            rows: images of a whole batch. A last batch of fewer runs uncompiled, for one of each size would take a minute to compile.
        """
        for exchange in (Gather, WholeDraw):
            exchange.forward = torch.compiler.disable(exchange.forward)  # type: ignore[method-assign, no-untyped-call]
        for layer in network.modules():
            # Without padding this says the same; but with the default, torch 2.13 compiles a wrong gradient for windows that hang over the
            # edge (pytorch issue 198119).
            if isinstance(layer, (nn.AvgPool1d, nn.AvgPool2d)) and layer.padding in (0, (0,), (0, 0)):
                layer.count_include_pad = False
        self._network, self._rows = network, rows
        self._whole: Callable[[torch.Tensor], torch.Tensor] = torch.compile(
            network, dynamic=False, options={"fallback_random": True}
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) -> logits.

        Raises:
            AlexprepError: the compiler is missing or cannot do it.
        """
        from torch._dynamo.exc import TorchDynamoException  # what torch.compile raises; it is loaded by now

        if len(images) != self._rows:
            result: torch.Tensor = self._network(images)
            return result
        try:
            return self._whole(images)
        except TorchDynamoException as error:
            needed = "a C++ compiler (g++)" if images.device.type == "cpu" else "triton and a C compiler (gcc)"
            raise AlexprepError(
                f"--compile: {str(error).strip().splitlines()[0]}. It needs {needed} and Python's headers: install what is "
                "missing, or go on with --resume --no-compile"
            ) from None
