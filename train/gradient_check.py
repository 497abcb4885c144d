"""Gradients against differences of the loss, in float64: whether the backward pass of a network is that of its forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.losses import image_losses
from alexprep.train.models.cifar import PIXEL_DEVIATION
from alexprep.train.recipes import Recipe

# Steps of a weight, over the size of its tensor's. A difference is taken with each until one agrees: a large one has less rounding, a small one
# crosses no kink of a ReLU or a pool.
STEPS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
TOLERANCE = 1e-5  # of the difference between both, over the larger one
COARSEST = 1e-3  # what rounding may make of it; where it makes more, nothing is told
ROUNDINGS = 32  # of the loss, in a difference of two
LEAST_SIZE = 1e-2  # taken for a tensor of zeros


class Checked(NamedTuple):
    """A parameter whose gradient was looked at."""

    name: str
    shape: tuple[int, ...]
    entries: int  # numbers of it that were changed; 0 where it has no part in the outputs
    apart: float  # both below, their difference over the larger one, where that is largest
    rounding: float  # how far apart rounding alone may bring them there, at the step by which they were nearest
    coarse: bool  # whether that is too far, by the largest step, for a verdict
    gradient: float
    difference: float  # of the loss, over that of the weight

    @property
    def agrees(self) -> bool:
        """Whether the gradient is right, as far as was looked."""
        return self.apart <= max(TOLERANCE, min(self.rounding, COARSEST))

    @property
    def wrong(self) -> bool:
        """Whether it is wrong. Where it neither agrees nor is wrong, it is too small to tell."""
        return not self.agrees and not self.coarse


def check_gradients(recipe: Recipe, classes: int, *, seed: int = 0, images: int = 2, entries: int = 5) -> list[Checked]:
    """Changes a few numbers of every parameter, and compares what that does to the loss with the gradient.

    The network is in training mode and in float64, shown noise as deviating as photographs; random numbers, of dropout, are the same each
    time. Of each parameter the number with the largest gradient is among those that are changed, the others are picked by the seed.

    Args:
        recipe: its network, of any kind, and its loss.
        classes: of the network.
        seed: of initial weights, images and picks.
        images: that the loss is the mean of.
        entries: numbers of each parameter.

    Raises:
        AlexprepError: the network cannot be made, or cannot compute in float64.
    """
    with torch.random.fork_rng(devices=[]):
        network = recipe.make_network(classes, seed).double().train()
    generator = torch.Generator().manual_seed(seed)
    shape = (images, recipe.augmentation.channels, recipe.crop, recipe.crop)
    pictures = torch.randn(shape, generator=generator, dtype=torch.float64) * PIXEL_DEVIATION
    labels = torch.randint(classes, (images,), generator=generator)

    def loss() -> torch.Tensor:
        torch.default_generator.manual_seed(seed)
        return image_losses(recipe.loss, network(pictures), labels, recipe.label_smoothing).mean()

    with torch.random.fork_rng(devices=[]):
        try:
            loss().backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            words = str(error).splitlines()[0]
            raise AlexprepError(
                f"the network cannot compute in float64, in which gradients are checked: {words}"
            ) from None
        with torch.no_grad():
            return list(_checked(network, loss, entries, generator))


def _checked(network: nn.Module, loss: Any, entries: int, generator: torch.Generator) -> Iterator[Checked]:
    for name, weight in network.named_parameters():
        if weight.grad is None:
            yield Checked(name, tuple(weight.shape), 0, 0.0, 0.0, False, 0.0, 0.0)
            continue
        gradients, numbers = weight.grad.flatten(), weight.data.view(-1)
        picked = torch.randperm(len(numbers), generator=generator)[: entries - 1].tolist()
        places = dict.fromkeys([int(gradients.abs().argmax()), *picked])
        size = float(weight.square().mean().sqrt()) or LEAST_SIZE
        found = [
            Checked(
                name, tuple(weight.shape), len(places), *_compared(loss, numbers, place, gradients[place].item(), size)
            )
            for place in places
        ]
        yield max(found, key=lambda one: (one.wrong, not one.agrees, one.apart))


def _compared(
    loss: Any, numbers: torch.Tensor, place: int, gradient: float, size: float
) -> tuple[float, float, bool, float, float]:
    """How far apart gradient and difference are, how far rounding may bring them, whether always too far, and both."""
    before = float(numbers[place])
    found: list[tuple[float, float, float]] = []
    for share in STEPS:
        step = share * size
        sides = []
        for sign in (1, -1):
            numbers[place] = before + sign * step
            sides.append(float(loss()))
        numbers[place] = before
        difference = (sides[0] - sides[1]) / (2 * step)
        larger = max(abs(gradient), abs(difference), 1e-300)
        rounding = ROUNDINGS * torch.finfo(torch.float64).eps * max(1.0, abs(sides[0])) / step
        found.append((abs(gradient - difference) / larger, rounding / larger, difference))
        if found[-1][0] <= TOLERANCE:
            break
    apart, rounding, difference = min(found)
    return apart, rounding, found[0][1] > COARSEST, gradient, difference
