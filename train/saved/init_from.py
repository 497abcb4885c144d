"""A network that begins with another's weights: pre-train on many classes, then fine-tune on those that one is after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch

from alexprep.shards.errors import AlexprepError
from alexprep.train.checkpoint import Checkpoint
from alexprep.train.parameters import layer_and_kind

PREFIX = "weight."  # of the network's tensors in a checkpoint


@dataclass(frozen=True)
class InitReport:
    """What became of every layer, by name."""

    taken: list[str]  # of the network: they begin with saved weights
    fresh: dict[str, str]  # of the network: they keep their initial weights, and why
    unused: list[str]  # among the saved ones: the network has no such layer

    def sentences(self) -> list[str]:
        """The report, to be read by a person.

        >>> InitReport(["conv1"], {"fc8": "saved 9x4, here 3x4"}, []).sentences()
        ['begun with the saved weights of conv1', 'fc8 begins fresh: saved 9x4, here 3x4']
        """
        return [
            f"begun with the saved weights of {', '.join(self.taken) or 'no layer'}",
            *(f"{layer} begins fresh: {reason}" for layer, reason in self.fresh.items()),
            *([f"saved, but not in this network: {', '.join(self.unused)}"] if self.unused else []),
        ]


def saved_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint by their names in the network."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(PREFIX)}


def wanted_layers(patterns: str | None) -> Literal["matching"] | list[str]:
    """What `init_from` is asked for by `--init-layers`, patterns with commas; by default all that match."""
    return (
        "matching"
        if patterns is None or patterns == "matching"
        else [pattern.strip() for pattern in patterns.split(",")]
    )


def init_from(
    weights: Mapping[str, torch.Tensor],
    saved: Mapping[str, torch.Tensor],
    layers: Literal["matching"] | Sequence[str] = "matching",
) -> InitReport:
    """Copies saved weights into a network's, layer by layer: all tensors of a layer or none. Velocities are not copied.

    Args:
        weights: the network's, `state_dict()`; changed in place, unless an error is raised.
        saved: weights by name, as of `state_dict()` or `saved_weights`.
        layers: "matching": every layer that was saved with the same shapes. Otherwise patterns of layer names, such as
            ["conv*", "fc6"]: exactly the network's layers that match one, each of which must have been saved with the same shapes.

    Returns:
        What was taken and what was not.

    Raises:
        AlexprepError: no layer would be taken, a pattern matches no layer, a layer asked for does not fit, or a weight is not finite.
    """
    wanted, given = _by_layer(weights), _by_layer(saved)
    patterns = ["*"] if layers == "matching" else [layers] if isinstance(layers, str) else list(layers)
    if idle := [pattern for pattern in patterns if not any(fnmatchcase(layer, pattern) for layer in wanted)]:
        raise AlexprepError(f"{', '.join(idle)} matches no layer of the network: it has {', '.join(wanted)}")
    taken: list[str] = []
    fresh: dict[str, str] = {}
    for layer, here in wanted.items():
        if not any(fnmatchcase(layer, pattern) for pattern in patterns):
            fresh[layer] = "not asked for"
        elif reason := _misfit(here, given.get(layer)):
            fresh[layer] = reason
        else:
            taken.append(layer)
    refused = {layer: reason for layer, reason in fresh.items() if layers != "matching" and reason != "not asked for"}
    if refused or not taken:
        reasons = "; ".join(f"{layer}: {reason}" for layer, reason in (refused or fresh).items())
        raise AlexprepError(f"the saved weights do not fit the network ({reasons})")
    with torch.no_grad():
        for layer in taken:
            for kind, tensor in wanted[layer].items():
                tensor.copy_(given[layer][kind])
    return InitReport(taken, fresh, [layer for layer in given if layer not in wanted])


def _by_layer(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors by layer and kind: LAYER.weight, LAYER.bias. One of the network itself is a layer of its own name."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer, kind = layer_and_kind(name)
        layers.setdefault(layer or kind, {})[kind] = tensor
    return layers


def _misfit(here: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor] | None) -> str | None:
    """Why a layer cannot take what was saved; None if it can."""
    if saved is None:
        return "not saved"
    if here.keys() != saved.keys():
        return f"saved {', '.join(saved)}, here {', '.join(here)}"
    for kind, tensor in here.items():
        if tensor.shape != saved[kind].shape:
            return f"saved {_size(saved[kind])}, here {_size(tensor)}"
        spoilt = ~torch.isfinite(saved[kind]) & (saved[kind] != tensor.cpu())  # a mask of -inf is as it should be
        if spoilt.any():
            raise AlexprepError("the saved weights hold NaN or infinity: choose an earlier checkpoint")
    return None


def _size(tensor: torch.Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape)
