"""A user's network is tried before a run begins: what it gives, what a training step does to it, whether ranks can share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import UninitializedParameter

from alexprep.shards.errors import AlexprepError
from alexprep.shards.versions import versions
from alexprep.train.distributed.tensor_parallel import DROPOUTS, Scheme, part_of
from alexprep.train.distributed.world import World
from alexprep.train.models.cifar import PIXEL_DEVIATION

IMAGES = 2  # of a trial
CONTIGUOUS = "alexprep_needs_contiguous"  # attribute of a network that cannot take images with the channels last
WHOLE = "the whole"  # the network itself, among its layers


@dataclass(frozen=True)
class Trial:
    """What a training step did.

    Attributes:
        idle: parameters that can be trained and got no gradient.
        changed: buffers that it changed, such as batch normalisation's running means.
        draws: whether the network drew random numbers besides those of `nn.Dropout`.
    """

    idle: list[str]
    changed: list[str]
    draws: bool


def shape_of_images(crop: int) -> tuple[int, ...]:
    """What a trial shows a network."""
    return (IMAGES, 3, crop, crop)


def check_network(made: object) -> None:
    """Makes sure that a factory returned a network.

    Raises:
        AlexprepError: it did not, or its weights are not on the CPU.
    """
    if not isinstance(made, nn.Module):
        raise AlexprepError(f"it returned a {type(made).__name__}, not a torch.nn.Module")
    if elsewhere := {str(tensor.device) for tensor in made.parameters()} - {"cpu"}:
        raise AlexprepError(f"its weights are on {', '.join(elsewhere)}: leave them on the CPU, --device moves them")


def dry_run(network: nn.Module, classes: int, crop: int) -> None:
    """Shows a network two images in evaluation mode. Lazy layers get their shapes here.

    Images and weights lie with the channels last in memory, as they will in training on a CPU; a network that cannot take them so (an old
    `view` where `flatten` or `reshape` would do) is tried with contiguous ones, and gets them ever after.

    Raises:
        AlexprepError: its outputs are not finite logits (N, classes).
        Exception: whatever it raised.
    """
    training = network.training
    network.eval()
    with torch.no_grad():
        if any(isinstance(weight, UninitializedParameter) for weight in network.parameters()):
            network(_pixels(crop))
        try:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            outputs = network(_pixels(crop).contiguous(memory_format=torch.channels_last))
        except RuntimeError:
            network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            outputs = network(_pixels(crop))
            setattr(network, CONTIGUOUS, True)
            network.register_forward_pre_hook(_contiguous)
    _check(outputs, classes)
    network.train(training)


def try_step(network: nn.Module, classes: int, crop: int) -> Trial:
    """One training step without its update, on a network that is not used afterwards.

    Raises:
        AlexprepError: nothing in it can be trained, or its outputs are no logits in training mode.
        Exception: whatever it raised.
    """
    network.train()
    for layer in network.modules():
        if isinstance(layer, DROPOUTS):
            layer.eval()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        logits = network(_pixels(crop))
        draws = not torch.equal(state, torch.get_rng_state())
        _check(logits, classes)
        if not logits.requires_grad:
            raise AlexprepError(
                "nothing in the network can be trained: none of its parameters has a part in its outputs"
            )
        F.cross_entropy(logits, torch.arange(IMAGES) % classes).backward()  # type: ignore[no-untyped-call]
    idle = [name for name, weight in network.named_parameters() if weight.requires_grad and weight.grad is None]
    changed = [
        name for name, buffer in network.named_buffers() if name not in before or not _equal(buffer, before[name])
    ]
    return Trial(idle, changed, draws)


def check_saved(network: nn.Module, trial: Trial) -> None:
    """Makes sure that a checkpoint, which is `state_dict()`, holds all that training changes, and nothing that cannot be put back.

    Raises:
        AlexprepError: it does not; the message names the first of what is in the way.
    """
    saved = network.state_dict()
    tensors = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    if foreign := list(saved.keys() - dict(tensors).keys()):
        raise AlexprepError(
            f"state_dict() holds {min(foreign)}, which is neither a parameter nor a buffer, so a checkpoint cannot hold it: keep it as a "
            "tensor, with register_buffer()"
        )
    if lost := [name for name in trial.changed if name not in saved]:
        raise AlexprepError(
            f"training changes the buffer {lost[0]}, which no checkpoint would hold, so a resumed run would differ: register it without "
            "persistent=False"
        )


def fitting_format(network: nn.Module, wanted: torch.memory_format) -> torch.memory_format:
    """How a network's weights shall lie: as wanted, unless its dry run showed that it works on contiguous tensors alone."""
    return torch.contiguous_format if getattr(network, CONTIGUOUS, False) else wanted


def check_sharing(network: nn.Module, trial: Trial, scheme: Scheme, ranks: int, crop: int) -> None:
    """Makes sure that a network trains on several ranks as it would on one device. It is not used afterwards.

    Raises:
        AlexprepError: it does not, or the scheme cannot split it.
    """
    if ranks == 1:
        return
    failure = _on_nothing(network, crop) if scheme != "towers" else None
    part_of(network, scheme, World(0, ranks, torch.device("cpu")))
    if trial.changed:
        raise AlexprepError(
            f"each rank would have its own {', '.join(trial.changed[:3])}, which training changes: train it on one device"
        )
    if trial.draws:
        raise AlexprepError(
            "the network draws random numbers in training, each rank its own: use nn.Dropout, which ranks share, or train it on one device"
        )
    if failure is not None:
        raise AlexprepError(
            f"the network cannot take an empty batch ({str(failure).splitlines()[0]}), and a rank's share of an epoch's last images may be "
            "none: flatten with torch.flatten(x, 1), or train it on one device"
        )


def layers(network: nn.Module) -> dict[str, dict[str, str]]:
    """What a network is made of: every layer that has tensors of its own or no layers within. JSON values.

    >>> layers(nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))["1"]
    {'kind': 'Linear', 'settings': 'in_features=3, out_features=2, bias=True', 'tensors': 'weight 2x3, bias 2'}
    """
    told = {}
    for name, layer in network.named_modules():
        own = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
        if own or next(layer.children(), None) is None:
            shapes = ", ".join(f"{kind} {_shape(tensor)}" for kind, tensor in own.items())
            told[name or WHOLE] = {"kind": type(layer).__name__, "settings": layer.extra_repr(), "tensors": shapes}
    return told


def comparable(identity: dict[str, Any], made_with: dict[str, str]) -> dict[str, Any]:
    """A run's identity; without the settings of layers where another torch described them, perhaps in other words.

    Args:
        identity: of the run as it was or as it is.
        made_with: the versions of libraries by which it was.
    """
    if "layers" not in identity or made_with.get("torch") == versions("torch")["torch"]:
        return identity
    bare = {name: {**layer, "settings": "of another torch"} for name, layer in identity["layers"].items()}
    return identity | {"layers": bare}


def _on_nothing(network: nn.Module, crop: int) -> Exception | None:
    """What a network raises in a training step without images."""
    try:
        network(_pixels(crop)[:0]).sum().backward()
    except (RuntimeError, ValueError) as error:
        return error
    return None


def _check(outputs: object, classes: int) -> None:
    """Refuses what are no logits."""
    wanted = f"({IMAGES}, {classes})"
    if not isinstance(outputs, torch.Tensor):
        raise AlexprepError(f"the network gives a {type(outputs).__name__}, not a tensor of logits {wanted}")
    if outputs.shape != (IMAGES, classes) or not outputs.is_floating_point():
        raise AlexprepError(f"the network gives {str(outputs.dtype)[6:]} {tuple(outputs.shape)}, not logits {wanted}")
    if not torch.isfinite(outputs).all():
        raise AlexprepError(
            f"the network gives NaN or infinity for pixels of deviation {PIXEL_DEVIATION:g}: divide them by that first, or begin with smaller weights"
        )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two buffers are the same; NaN, which some have where nothing may be read, equals itself."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _pixels(crop: int) -> torch.Tensor:
    """Images as a loader gives them: noise as deviating as photographs are on the 0-255 scale, their mean subtracted."""
    return torch.randn(shape_of_images(crop), generator=torch.Generator().manual_seed(0)) * PIXEL_DEVIATION


def _contiguous(network: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(images.contiguous() for images in given)


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "()"
