"""Networks from cuda-convnet's layer files: what is in them is read, checked line by line, and made of this project's layers.

A network is two files, in the form of INI files: the definition (layers.cfg) with a section a layer, in order, and the parameters
(layer-params.cfg) with rates, decays and the norms' numbers for the layers of the same names. They are data: nothing in them is run. Where a layer,
a key or a value has no counterpart here, the file is refused with the line. docs/layer-files.md lists what is read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.field_values import Loss, Pool
from alexprep.train.layer_file_lines import ENDING, Section, sections
from alexprep.train.models.layers import (
    Conv2d,
    LocallyConnected2d,
    LocalResponseNorm,
    PaperDropout,
    SpatialResponseNorm,
    initialised,
)
from alexprep.train.models.pools_and_dropconnect import pool_layer, pooled_up

MOST_SIDE, MOST_MAPS = 4096, 1 << 20
INIT_DEVIATION = 0.01  # initW where a layer has none
# Of speed, of places on several GPUs, of what is printed: they change no result.
PASSED_OVER = ("partialSum", "sumWidth", "gpu", "usesActs", "usesInputs", "topk")
RATES = ("epsW", "epsB", "momW", "momB", "wc")
POOLS: dict[str, Pool] = {"max": "max", "avg": "average", "rand": "stochastic"}


class Value(NamedTuple):
    """What a layer gives: maps of side x side pixels, or, with a side of 0, so many numbers."""

    maps: int
    side: int


@dataclass
class Step:
    """A layer of the file: its modules, one after another, by name, and the layers whose outputs they are given, side by side."""

    section: Section
    inputs: list[str]
    modules: list[tuple[str, nn.Module]]
    gives: Value


class LayerGraph(nn.Module):
    """Layers of which some have several inputs, which lie side by side, or feed several others."""

    def __init__(self, steps: list[tuple[str, list[str], list[str]]], layers: nn.Sequential, first: str) -> None:
        """Steps, each the name of what it gives, of what it is given, and of its modules among `layers`; `first` names the images."""
        super().__init__()
        self._steps, self._first = steps, first
        for name, layer in layers.named_children():
            self.add_module(name, layer)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, C, H, W) -> what the last step gives."""
        values = {self._first: images}
        for name, inputs, modules in self._steps:
            given = [values[each] for each in inputs]
            if len({each.shape[2:] for each in given}) > 1:  # of what only sees numbers
                given = [each.flatten(1) for each in given]
            value = given[0] if len(given) == 1 else torch.cat(given, dim=1)
            for module in modules:
                value = self._modules[module](value)  # type: ignore[misc]
            values[name] = value
        return value


class Neuron(nn.Module):
    """An activation of cuda-convnet by its name and numbers, such as tanh[1.7159,0.6667]."""

    mixes_maps = False

    def __init__(self, name: str, numbers: tuple[float, ...]) -> None:
        """One of `NEURONS`, with as many numbers as it has."""
        super().__init__()
        self.name, self.numbers = name, numbers

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Any float tensor -> the same shape."""
        return NEURONS[self.name][1](values, *self.numbers)

    def extra_repr(self) -> str:
        """The name and the numbers, for print(network)."""
        return f"{self.name}{list(self.numbers) or ''}"


class KeptDropout(PaperDropout):
    """The paper's dropout at another share."""

    def __init__(self, keep: float) -> None:
        """Keeps units with this probability."""
        super().__init__()
        self.KEEP = keep

    def extra_repr(self) -> str:
        """The number, for print(network)."""
        return f"keep={self.KEEP}"


# By name: how many numbers it has, and what it is of them.
NEURONS: dict[str, tuple[int, Callable[..., torch.Tensor]]] = {
    "ident": (0, lambda x: x),
    "relu": (0, torch.relu),
    "logistic": (0, torch.sigmoid),
    "abs": (0, torch.abs),
    "square": (0, torch.square),
    "sqrt": (0, torch.sqrt),
    "softrelu": (0, nn.functional.softplus),
    "tanh": (2, lambda x, a, b: a * torch.tanh(b * x)),
    "brelu": (1, lambda x, a: x.clamp(0, a)),
    "linear": (2, lambda x, a, b: a * x + b),
}


@dataclass(frozen=True)
class LayerFile:
    """A definition and its parameters, read and found well-formed; called, it makes the network. See `layer_file`."""

    definition: Path
    parameters: Path

    @property
    def title(self) -> str:
        """What the network is called."""
        return f"layer-file/{self.definition.stem}"

    def describe(self) -> dict[str, Any]:
        """A fingerprint of what the network is made of, part of a run's identity: which layer feeds which, too."""
        _, told = self._read()
        return {"layers_sha256": hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()}

    def __call__(
        self, classes: int, crop: int, *, seed: int = 0, width: float = 1.0, in_channels: int = 3
    ) -> nn.Module:
        """The network with its initial weights, from float (N, in_channels, crop, crop) to logits (N, classes): an `nn.Sequential` where no layer has two inputs.

        Raises:
            AlexprepError: the file has something that alexprep has no layer for, or that fits neither the classes nor the crop; with the line.
        """
        if width != 1:
            raise AlexprepError(f"{self.definition} says how wide its layers are: leave out width={width:g}")
        return _Builder(self._read()[0], classes, Value(in_channels, crop)).network(seed)

    def training(self) -> dict[str, Any]:
        """What the files say of a recipe's fields: loss; and lr, bias_lr_factor, momentum, decay and layer_decay, where they have rates."""
        return _training(self._read()[0])

    def _read(self) -> tuple[dict[str, Section], dict[str, dict[str, str]]]:
        """The layers with what both files say of them; and the texts of that without rates."""
        layers, more = sections(self.definition), sections(self.parameters)
        if not layers:
            raise AlexprepError(f"{self.definition}, line 1: there is no layer: one begins with [NAME]")
        for name, section in more.items():
            if name not in layers:
                raise section.error(f"is no layer of {self.definition}")
            for key, entry in section.entries.items():
                if key in layers[name].entries:
                    raise entry.error(
                        f"[{name}] {key} stands in {self.definition}, line {layers[name].entries[key].line}, too"
                    )
                layers[name].entries[key] = entry
        told = {
            name: {key: e.text for key, e in each.entries.items() if key not in (*RATES, *PASSED_OVER)}
            for name, each in layers.items()
        }
        return layers, told


def layer_file(reference: str) -> LayerFile:
    """The layer file that LAYERS.cfg or LAYERS.cfg:PARAMETERS.cfg names; by default the parameters of layers-X.cfg are in layer-params-X.cfg beside it.

    Raises:
        AlexprepError: there is no such file, or its form is not right; with the line.
    """
    first, _, second = reference.partition(f"{ENDING}:")
    definition = Path(f"{first}{ENDING}" if second else first).expanduser().resolve()
    parameters = Path(second).expanduser().resolve() if second else _beside(definition)
    for path in (definition, parameters):
        if not path.is_file():
            raise AlexprepError(
                f"there is no file {path}: name both with --model LAYERS.cfg:PARAMETERS.cfg, or call them layers-X.cfg and layer-params-X.cfg"
            )
    made = LayerFile(definition, parameters)
    made.describe()  # reads both
    return made


def _beside(definition: Path) -> Path:
    rest = definition.name.removeprefix("layers")
    return definition.with_name(f"layer-params{rest}" if rest != definition.name else f"layer-params-{rest}")


class _Builder:
    """Goes through the layers of a file in order, and knows what each gives."""

    def __init__(self, layers: dict[str, Section], classes: int, images: Value) -> None:
        self.layers, self.classes, self.images = layers, classes, images
        self.steps: dict[str, Step] = {}
        self.data: dict[str, int] = {}  # names of data layers: 0 gives the images, 1 the labels
        self.probabilities: dict[str, str] = {}  # softmax layers, and what they are of
        self.deviations: dict[str, float] = {}
        self.biases: dict[str, float] = {}
        self.cost: Section | None = None
        self.used: set[str] = set()
        self.makers: dict[str, Callable[[Section], Step]] = {
            "conv": self._conv,
            "local": self._local,
            "fc": self._fc,
            "pool": self._pool,
            "neuron": self._neurons,
            "cmrnorm": self._norm,
            "rnorm": self._norm,
            **dict.fromkeys(("dropout", "dropout2", "hs"), self._dropout),
        }

    def network(self, seed: int) -> nn.Module:
        for section in self.layers.values():
            self._layer(section)
            for key, entry in section.entries.items():
                if not entry.read and key not in (*PASSED_OVER, *RATES):
                    raise entry.error(
                        f"[{section.name}] {key}: alexprep has no such key for type={section.entries['type'].text}"
                    )
        if self.cost is None:
            last = list(self.layers.values())[-1]
            raise last.error("is the last layer, and there is no cost: add one, type=cost.logreg")
        for name, step in self.steps.items():
            if name not in self.used:
                raise step.section.error("feeds no other layer")
        return self._assembled(seed)

    def _assembled(self, seed: int) -> nn.Module:
        modules = [module for step in self.steps.values() for module in step.modules]
        layers = initialised(modules, seed, self.deviations, self.biases)
        images = next(name for name, index in self.data.items() if index == 0)
        names = [images, *self.steps]
        if all(step.inputs == [before] for step, before in zip(self.steps.values(), names, strict=False)):
            return layers
        steps = [(name, step.inputs, [each for each, _ in step.modules]) for name, step in self.steps.items()]
        return LayerGraph(steps, layers, images)

    def _layer(self, section: Section) -> None:
        kind = section.text("type")
        if "weightSource" in section.entries:
            raise section.error("weightSource: alexprep has no layers that share their weights", "weightSource")
        for key in ("initWFunc", "initBFunc"):
            if key in section.entries:
                raise section.error(f"{key}: code that a layer file names is not run; give initW and initB", key)
        if kind == "data":
            self._data(section)
        elif kind == "softmax":
            (given,) = self._inputs(section, 1)
            self.used.add(given)
            self.probabilities[section.name] = given
        elif kind.startswith("cost."):
            self._cost(section, kind)
        elif kind in self.makers:
            step = self.makers[kind](section)
            self._check_names(step)
            self.steps[section.name] = step
        else:
            known = ", ".join([*self.makers, "data", "softmax", "cost.logreg", "cost.bce"])
            raise section.error(f"type={kind}: alexprep has no such layer, it reads {known}", "type")

    def _check_names(self, step: Step) -> None:
        taken = {name for other in self.steps.values() for name, _ in other.modules}
        for name, _ in step.modules:
            if name in taken or any(
                hasattr(each, name) for each in (nn.Sequential(), LayerGraph([], nn.Sequential(), ""))
            ):
                raise step.section.error(f"the name {name} is taken: give the layer another")

    def _data(self, section: Section) -> None:
        index = section.whole("dataIdx", 0, 1)
        if index in self.data.values():
            raise section.error(f"dataIdx={index} is given by another layer already", "dataIdx")
        self.data[section.name] = index

    def _cost(self, section: Section, kind: str) -> None:
        if kind not in COSTS:
            raise section.error(f"type={kind}: alexprep trains with {', '.join(COSTS)}", "type")
        if self.cost is not None:
            raise section.error(f"is a second cost, after [{self.cost.name}]: alexprep has one")
        if section.number("coeff", 0, 1e9, 1.0) != 1:
            raise section.error("coeff: alexprep has costs with a coefficient of 1; give the rates a factor", "coeff")
        words = section.list("inputs")
        if len(words) != 2 or self.data.get(words[0]) != 1:
            raise section.error(
                "inputs: a cost has two, the labels (a data layer, dataIdx=1) and the outputs", "inputs"
            )
        given = words[1]
        if COSTS[kind] == "softmax":
            if given not in self.probabilities:
                raise section.error(f"inputs: {given} is no layer with type=softmax before it", "inputs")
            given = self.probabilities[given]
        step = self.steps.get(given)
        if step is None:
            raise section.error(f"inputs: there is no layer {given} before it", "inputs")
        if COSTS[kind] == "sigmoid":
            last = step.modules[-1][1]
            if not (isinstance(last, Neuron) and last.name == "logistic"):
                raise section.error(f"inputs: {given} must end in neuron=logistic", "inputs")
            step.modules.pop()  # the loss has it
        if step.gives != Value(self.classes, 0):
            found = f"{step.gives.maps} outputs" if not step.gives.side else "pictures as outputs"
            raise step.section.error(f"has {found}, and the data has {self.classes} classes", "outputs")
        if list(self.steps)[-1] != given:
            raise section.error(f"inputs: {given} is not the last layer before the cost", "inputs")
        self.used.add(given)
        self.cost = section

    def _inputs(self, section: Section, most: int | None = None) -> list[str]:
        """The names of the layers that feed a layer."""
        names = section.list("inputs")
        for name in names:
            if name not in self.steps and self.data.get(name) != 0:
                why = "gives labels" if name in self.data else "is not defined before it"
                why = "is a softmax, which only a cost takes" if name in self.probabilities else why
                raise section.error(f"inputs: {name} {why}", "inputs")
        if not names or (most and len(names) > most):
            raise section.error(f"inputs: {len(names)} layers, and it takes {most or 'one or more'}", "inputs")
        self.used.update(names)
        return names

    def _given(self, section: Section, names: list[str], images: bool = True) -> Value:
        """What such layers give side by side."""
        values = [self.images if name in self.data else self.steps[name].gives for name in names]
        sides = {value.side for value in values}
        if len(sides) > 1 and not images:
            return Value(sum(value.maps * max(1, value.side) ** 2 for value in values), 0)
        if len(sides) > 1:
            raise section.error(f"inputs: {', '.join(names)} give maps of different sides", "inputs")
        (side,) = sides
        if images and not side:
            raise section.error(f"inputs: {names[0]} gives no maps but single numbers", "inputs")
        if "channels" in section.entries:
            words = section.list("channels")
            found = [str(value.maps) for value in values]
            if images and words not in (found, found[:1] if len(set(found)) == 1 else found):
                raise section.error(f"channels={','.join(words)}, and its inputs have {','.join(found)}", "channels")
        return Value(sum(value.maps for value in values), side)

    def _conv(self, section: Section) -> Step:
        names = self._inputs(section)
        given = self._given(section, names)
        filters = section.whole("filters", 1, MOST_MAPS)
        size = section.whole("filterSize", 1, MOST_SIDE)
        stride, padding = section.whole("stride", 1, size, 1), abs(section.whole("padding", -MOST_SIDE, MOST_SIDE, 0))
        groups = section.whole("groups", 1, MOST_MAPS, 1)
        if given.maps % groups or filters % groups or (groups > 1 and len(names) > 1):
            raise section.error(f"groups={groups} do not divide {given.maps} maps and {filters} filters", "groups")
        self._no_more(section, {"sharedBiases": True, "randSparse": False})
        left = given.side + 2 * padding - size
        if left < 0:
            raise section.error(f"filterSize={size} is more than its input has, {given.side} pixels", "filterSize")
        side = -(-left // stride) + 1  # rounded up: the last filters hang over the right and the bottom edge
        overhang = (side - 1) * stride - left
        layer = Conv2d(given.maps, filters, size, stride, padding, groups=groups)
        modules: list[tuple[str, nn.Module]] = [(section.name, layer)]
        if overhang:
            modules.insert(0, (f"{section.name}_overhang", nn.ZeroPad2d((0, overhang, 0, overhang))))
        self._initial(section)
        return Step(section, names, [*modules, *self._neuron(section)], Value(filters, side))

    def _local(self, section: Section) -> Step:
        names = self._inputs(section)
        given = self._given(section, names)
        filters = section.whole("filters", 1, MOST_MAPS)
        size = section.whole("filterSize", 1, MOST_SIDE)
        padding = abs(section.whole("padding", -MOST_SIDE, MOST_SIDE, 0))
        for key, wanted in (("stride", 1), ("groups", 1)):
            if section.whole(key, 1, MOST_MAPS, 1) != wanted:
                raise section.error(f"{key}: alexprep has local layers with a {key} of {wanted} only", key)
        if size % 2 == 0 or padding != size // 2:
            raise section.error("filterSize, padding: alexprep has local layers that keep the side only", "filterSize")
        self._no_more(section, {"sharedBiases": False, "randSparse": False})
        layer = LocallyConnected2d(given.maps, filters, given.side, size)
        self._initial(section)
        return Step(section, names, [(section.name, layer), *self._neuron(section)], Value(filters, given.side))

    def _fc(self, section: Section) -> Step:
        names = self._inputs(section)
        given = self._given(section, names, images=False)
        outputs = section.whole("outputs", 1, MOST_MAPS)
        flat: list[tuple[str, nn.Module]] = [(f"{section.name}_flatten", nn.Flatten())] if given.side else []
        layer = nn.Linear(given.maps * max(1, given.side) ** 2, outputs)
        self._initial(section)
        dropped = section.number("dropout", 0, 0.999, 0.0)
        after = [(f"{section.name}_dropout", KeptDropout(1 - dropped))] if dropped else []
        modules = [*flat, (section.name, layer), *self._neuron(section), *after]
        return Step(section, names, modules, Value(outputs, 0))

    def _pool(self, section: Section) -> Step:
        names = self._inputs(section, 1)
        given = self._given(section, names)
        kind, size = section.text("pool"), section.whole("sizeX", 1, MOST_SIDE)
        stride = section.whole("stride", 1, size, 1)
        if kind not in POOLS:
            raise section.error(f"pool={kind}: alexprep has {', '.join(POOLS)}", "pool")
        if section.whole("start", -MOST_SIDE, MOST_SIDE, 0):
            raise section.error("start: alexprep's pools start at 0", "start")
        if size > given.side:
            raise section.error(f"sizeX={size} is more than its input has, {given.side} pixels", "sizeX")
        side = pooled_up(given.side, size, stride)
        if section.whole("outputsX", 0, MOST_SIDE, 0) not in (0, side):
            raise section.error(f"outputsX: windows of {size} every {stride} pixels give {side}", "outputsX")
        modules = [(section.name, pool_layer(POOLS[kind], size, stride)), *self._neuron(section)]
        return Step(section, names, modules, Value(given.maps, side))

    def _norm(self, section: Section) -> Step:
        names = self._inputs(section, 1)
        given = self._given(section, names)
        size = section.whole("size", 1, MOST_MAPS)
        if size % 2 == 0:
            raise section.error(f"size={size}: alexprep's norms have an odd number of neighbours", "size")
        scale, power = section.number("scale", 0, 1e6), section.number("pow", 0, 100)
        least = section.number("minDiv", 1e-9, 1e9, 1.0)
        layer: nn.Module
        if section.text("type") == "cmrnorm":
            layer = LocalResponseNorm(size=size, k=least, alpha=scale / size, beta=power)
        else:  # in 2012, as in net #145, minDiv had no effect within a map; in cuda-convnet2 it has
            layer = SpatialResponseNorm(size, k=1.0, alpha=scale / size**2, beta=power)
        return Step(section, names, [(section.name, layer), *self._neuron(section)], given)

    def _neurons(self, section: Section) -> Step:
        names = self._inputs(section, 1)
        ((_, layer),) = self._neuron(section, section.text("neuron")) or [("", Neuron("ident", ()))]
        return Step(section, names, [(section.name, layer)], self._given(section, names, images=False))

    def _dropout(self, section: Section) -> Step:
        names = self._inputs(section, 1)
        keep = section.number("keep", 1e-3, 1, 0.5)
        if not section.truth("enable", True):
            raise section.error("enable: leave the layer out instead", "enable")
        # Of cuda-convnet2's two kinds, "dropout" scales in training, as torch's does; the others in evaluation.
        layer = nn.Dropout(1 - keep) if section.text("type") == "dropout" else KeptDropout(keep)
        return Step(section, names, [(section.name, layer)], self._given(section, names, images=False))

    def _neuron(self, section: Section, default: str = "ident") -> list[tuple[str, nn.Module]]:
        """The activation that a layer has, if it has one."""
        text = section.text("neuron", default)
        name, bracket, rest = text.partition("[")
        words = rest.removesuffix("]").split(",") if bracket else []
        if name not in NEURONS:
            raise section.error(f"neuron={text}: alexprep has {', '.join(NEURONS)}", "neuron")
        try:
            numbers = tuple(float(word) for word in words)
        except ValueError:
            numbers = ()
        if (
            not all(map(math.isfinite, numbers))
            or len(numbers) != NEURONS[name][0]
            or rest.endswith("]") != bool(bracket)
        ):
            raise section.error(f"neuron={text}: {name} takes {NEURONS[name][0]} numbers, as NAME[A,B]", "neuron")
        return [] if name == "ident" else [(f"{section.name}_neuron", Neuron(name, numbers))]

    def _initial(self, section: Section) -> None:
        section.number("wball", 0, 0, 0.0)  # a decay that alexprep does not have
        section.whole("updatePeriod", 0, 1, 0)  # likewise steps between two updates
        self.deviations[section.name] = section.number("initW", 0, 1e6, INIT_DEVIATION)
        self.biases[section.name] = section.number("initB", -1e6, 1e6, 0.0)

    def _no_more(self, section: Section, wanted: Mapping[str, bool]) -> None:
        """Refuses switches in the position that alexprep has no layer for."""
        for key, position in wanted.items():
            if section.truth(key, position) != position:
                raise section.error(f"{key}={section.text(key)}: alexprep has no such layer", key)


# Of cuda-convnet2's crossent the labels are vectors; where these tell one class it is logreg.
COSTS: dict[str, Loss] = {"cost.logreg": "softmax", "cost.crossent": "softmax", "cost.bce": "sigmoid"}


def _training(layers: dict[str, Section]) -> dict[str, Any]:
    """Fields of a recipe: see `LayerFile.training`."""
    kinds = {name: section.text("type") for name, section in layers.items()}
    told: dict[str, Any] = {"loss": next((COSTS[kind] for kind in kinds.values() if kind in COSTS), "softmax")}
    weighted = [layers[name] for name, kind in kinds.items() if kind in ("conv", "local", "fc")]
    rates = {key: list(_same(weighted, key)) for key in ("epsW", "epsB", "momW", "momB")}
    if rates["epsW"]:
        told["lr"] = rates["epsW"][0]
        told["bias_lr_factor"] = rates["epsB"][0] / told["lr"] if rates["epsB"] and told["lr"] else 1.0
    if moments := rates["momW"] + rates["momB"]:
        if len(set(moments)) > 1:
            raise weighted[0].error("momW, momB: alexprep has one momentum for weights and biases", "momB")
        told["momentum"] = moments[0]
    if decays := {each.name: each.number("wc", 0, 1) for each in weighted if "wc" in each.entries}:
        told |= {"decay": 0.0, "layer_decay": decays}
    return told


def _same(weighted: list[Section], key: str) -> Iterator[float]:
    """A rate that all layers must share, if any has it."""
    found = [(section, section.number(key, 0, 100)) for section in weighted if key in section.entries]
    for section, value in found:
        if value != found[0][1]:
            raise section.error(
                f"{key}={value:g}, and [{found[0][0].name}] has {found[0][1]:g}: alexprep begins with one for all layers; take a "
                "schedule `ByHand` for single ones",
                key,
            )
    yield from [value for _, value in found[:1]]
