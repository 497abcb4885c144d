"""Finds the weights that a training begins with: those of another run, or of a file of anyone's, under the names that the network has.

A file is a state dict, `.safetensors`, or what `torch.save` wrote: that is read with `weights_only`, so nothing in it is ever run.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch

from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import folder_at
from alexprep.train.checkpoint import (
    RANDOM_CPU,
    TOTALS,
    Checkpoint,
    InitReport,
    final_weights,
    init_from,
    wanted_layers,
)
from alexprep.train.run_dir import place_at, place_named, saved_checkpoint

TORCH_FILES, SAFETENSORS = (".pt", ".pth", ".bin", ".ckpt"), ".safetensors"  # files by their endings
WITHIN = ("state_dict", "model_state_dict", "model")  # where programs put a state dict in what they save
WRAPPERS = ("module", "_orig_mod", "model", "network", "net")  # what DDP, torch.compile and Lightning put before names
# torchvision's alexnet, layer by layer: the widths and the order of values are those of `alexnet-owt`, so every tensor fits as it is.
TORCHVISION_ALEXNET = {
    "features.0": "conv1",
    "features.3": "conv2",
    "features.6": "conv3",
    "features.8": "conv4",
    "features.10": "conv5",
    "classifier.1": "fc6",
    "classifier.4": "fc7",
    "classifier.6": "fc8",
}
_DIGEST = re.compile(r"(?P<file>.+)@sha256:(?P<digest>[0-9a-f]{64})")


class Weights(NamedTuple):
    """Weights to begin with."""

    name: str  # RUN@STEP, or FILE@sha256:DIGEST: names the same weights for ever
    tensors: dict[str, torch.Tensor]  # by their names there, on the CPU
    notes: list[str]  # what to say about them


def find_weights(runs: Path, text: str) -> Weights:
    """The weights that `--init-from` names: a file, by its ending; else RUN, RUN@STEP or RUN@best in a folder of runs, or a run's URL.

    Raises:
        AlexprepError: there is no such file or run, the file is damaged or holds more than tensors, or it is not the one of the digest.
    """
    known = _DIGEST.fullmatch(text)
    file = known["file"] if known else text
    if not file.endswith((*TORCH_FILES, SAFETENSORS)):
        url = "://" in text
        place = place_at(text) if url else place_named(runs, text)
        saved, skipped = saved_checkpoint(place)
        return Weights(f"{place.run if url else place.run.name}@{saved.step}", final_weights(saved), skipped)
    path = folder_at(file).expanduser().resolve()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AlexprepError(
            f"{path} cannot be read ({error.strerror or error}): name a .safetensors or .pt file, or a run"
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    if known and digest != known["digest"]:
        raise AlexprepError(
            f"{path} is not the file that was named: its sha256 is {digest[:12]}…, not {known['digest'][:12]}…"
        )
    return Weights(f"{path}@sha256:{digest}", state_dict_of(data, path), [])


def state_dict_of(data: bytes, path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file's bytes, by name, on the CPU; of a run's checkpoint its weights. `path` is for its ending, and for messages.

    Raises:
        AlexprepError: it is no such file, is damaged, or holds what only running code could make.
    """
    other = "save network.state_dict() with torch.save, or as .safetensors, and name that file"
    try:
        if path.suffix == SAFETENSORS:
            found: Any = safetensors.torch.load(data)
        else:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  (of a damaged or hostile file torch raises whatever its parts do)
        if type(error).__name__ == "UnpicklingError":
            words = "holds more than tensors, which could only be had by running code, or is damaged"
        else:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            words = f"is damaged, or no such file as its ending says ({first})"
        raise AlexprepError(f"{path} {words}: {other}") from None
    document = found if isinstance(found, dict) else {}
    inner = next((document[name] for name in WITHIN if isinstance(document.get(name), dict)), document)
    tensors = {name: each for name, each in inner.items() if isinstance(each, torch.Tensor) and isinstance(name, str)}
    if not tensors:
        raise AlexprepError(f"{path} holds a {type(found).__name__} without tensors by name: {other}")
    if {TOTALS, RANDOM_CPU} <= tensors.keys():  # a checkpoint's own file
        return final_weights(Checkpoint(0, tensors, {}))
    return tensors


def under_names_of(wanted: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Saved weights under the names that a network has, `wanted`: without what programs put before them, and torchvision's alexnet either way.

    >>> list(under_names_of({"fc.bias": torch.ones(1)}, {"module.fc.bias": torch.ones(1)}))
    ['fc.bias']
    """
    named = dict(saved)
    while (first := {name.partition(".")[0] for name in named}) <= set(WRAPPERS) and len(first) == 1:
        wrapper = f"{next(iter(first))}."
        if any(name.startswith(wrapper) for name in wanted) or wrapper[:-1] in named:
            break
        named = {name.removeprefix(wrapper): tensor for name, tensor in named.items()}
    layers, wanted_ones = ({name.rpartition(".")[0] for name in some} for some in (named, wanted))
    for names in (TORCHVISION_ALEXNET, {ours: theirs for theirs, ours in TORCHVISION_ALEXNET.items()}):
        if layers == names.keys() and wanted_ones >= set(names.values()):
            return renamed(named, names)
    return named


def renamed(tensors: Mapping[str, torch.Tensor], layers: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Tensors with their layers called otherwise, each the same object."""
    parts = {name: name.rpartition(".") for name in tensors}
    return {f"{layers[layer]}.{kind}": tensors[name] for name, (layer, _, kind) in parts.items()}


def begin_with(network: Mapping[str, torch.Tensor], weights: Weights, patterns: str | None) -> InitReport:
    """Copies weights into those of a network, `state_dict()`, as `--init-layers` says; see `alexprep.train.checkpoint.init_from`."""
    try:
        return init_from(network, under_names_of(network, weights.tensors), wanted_layers(patterns))
    except AlexprepError as error:
        raise AlexprepError(f"--init-from {weights.name.partition('@sha256:')[0]}: {error}") from None
