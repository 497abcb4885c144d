"""A network compiled by torch.compile for batches of one size."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.parallel.exchange import Gather, WholeDraw


class Compiled:
    """Calls a network.

    Random numbers are drawn as without compilation; results differ by rounding. The network's modules and the names of its weights stay
    as they are. What ranks exchange in the middle of it is left out of the compilation, which makes several pieces of the rest.

    It is for whole batches: another size would take a minute to compile. All ranks must use it for the same ones, for gradients come in
    another order than without, and ranks add them up as they come.
    """

    def __init__(self, network: nn.Module) -> None:
        """Nothing is compiled before the first call; `network` is in training mode then."""
        self.checked = False  # against the network as written
        _leave_exchanges_out()
        for layer in network.modules():
            # Without padding this says the same; but with the default, torch 2.13 compiles a wrong gradient for windows that hang over the
            # edge (pytorch issue 198119).
            if isinstance(layer, (nn.AvgPool1d, nn.AvgPool2d)) and layer.padding in (0, (0,), (0, 0)):
                layer.count_include_pad = False
        self._whole: Callable[[torch.Tensor], torch.Tensor] = torch.compile(
            network, dynamic=False, options={"fallback_random": True}
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) -> logits."""
        return self._whole(images)


@contextlib.contextmanager
def compiler_blamed(device: torch.device) -> Iterator[None]:
    """Inside the block, in which a compiled network is called and its gradient computed, what the compiler raises becomes a sentence.

    Raises:
        AlexprepError: the compiler is missing or cannot do it.
    """
    try:
        yield
    except Exception as error:
        dynamo = sys.modules.get("torch._dynamo.exc")  # a second to import; whoever compiles has it
        if dynamo is None or not isinstance(error, dynamo.TorchDynamoException):
            raise
        needed = "a C++ compiler (g++)" if device.type == "cpu" else "triton and a C compiler (gcc)"
        raise AlexprepError(
            f"--compile: {str(error).strip().splitlines()[0]}. It needs {needed} and Python's headers: install what is "
            "missing, or go on with --resume --no-compile"
        ) from None


@functools.cache
def _leave_exchanges_out() -> None:
    """Tells the compiler, once, to call what ranks exchange as it is written."""
    for exchange in (Gather, WholeDraw):
        exchange.forward = torch.compiler.disable(exchange.forward)  # type: ignore[method-assign, no-untyped-call]
