"""Values that are not finite: the error that they are, and a watch that finds the first one of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.distributed.world import World

What = Literal["weight", "images", "output", "loss", "gradient", "update"]


class NotFinite(AlexprepError):
    """A loss, a weight or a velocity became NaN or infinite. Nothing of it was saved.

    Attributes:
        what: the message without the next step.
    """

    def __init__(self, what: str, next_step: str = "") -> None:
        """Says what is not finite."""
        super().__init__(f"{what}: {next_step}" if next_step else what)
        self.what = what


class Sight(NamedTuple):
    """A value that was not finite."""

    step: int
    what: What
    name: str  # of a layer or a parameter; "" where there is but one such value
    value: str  # "nan" or "inf"

    def sentence(self) -> str:
        """For people.

        >>> Sight(11, "output", "conv3", "inf").sentence()
        'it began in step 11, where the output of conv3 became inf'
        """
        words = {
            "weight": f"{self.name} held {self.value} before the step",
            "images": f"the images held {self.value}",
            "output": f"the output of {self.name} became {self.value}",
            "loss": f"the loss became {self.value}",
            "gradient": f"the gradient of {self.name} became {self.value}",
            "update": f"{self.name} became {self.value} when it was updated",
        }
        return f"it began in step {self.step}, where {words[self.what]}"


class Watch:
    """Looks at the values of a step in the order in which they come about.

    The ranks of a training look at the same values in the same order, each at its own part; what one of them sees first is what
    all of them tell.

    >>> watch = Watch(World.alone("cpu"))
    >>> watch.see("loss", "", torch.tensor(2.0))
    >>> watch.see("gradient", "fc8.weight", torch.tensor([1.0, float("inf")]))
    >>> watch.first(step=7)
    Sight(step=7, what='gradient', name='fc8.weight', value='inf')
    """

    def __init__(self, world: World) -> None:
        """Nothing seen yet."""
        self.world = world
        self._seen: list[tuple[What, str]] = []
        self._first: tuple[int, int] | None = None  # place in `_seen`, and whether it is NaN

    def see(self, what: What, name: str, tensor: torch.Tensor) -> None:
        """Looks at a value; on a GPU it waits for it."""
        if self._first is None and not torch.isfinite(tensor).all():
            self._first = len(self._seen), int(tensor.isnan().any())
        self._seen.append((what, name))

    @contextlib.contextmanager
    def outputs(self, network: nn.Module) -> Iterator[None]:
        """Inside the block, looks at every layer's output, also where the next layer overwrites it."""
        layers = [(name, layer) for name, layer in network.named_modules() if not isinstance(layer, nn.Sequential)]
        handles = [layer.register_forward_hook(self._looking_at(name)) for name, layer in layers if name]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def first(self, step: int) -> Sight | None:
        """The first value that was not finite on any rank since the last call, if there is one; all ranks call it."""
        none = len(self._seen), 0
        place, is_nan = min(map(tuple, self.world.exchange(self._first or none)))
        seen, self._seen, self._first = self._seen, [], None
        return None if place == len(seen) else Sight(step, *seen[place], "nan" if is_nan else "inf")

    def _looking_at(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(layer: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                self.see("output", name, output)

        return look
