"""Convolutional nets from a line of text, as Ciresan et al. write theirs: 1x29x29-20C4-MP2-40C5-MP3-150N-10N; LeNet-5 is one of them.

The line, part by part, with "-" between:

    1x29x29     the input: channels, height, width; may be left out, where the recipe says it
    20C4        a convolution with 20 maps and 4x4 kernels; 20C4x3 has kernels 4 high and 3 wide
    20C4S1      with a skipping factor: between two applications of a kernel 1 pixel is skipped, a stride of 2; S1x0 only downwards
    20C4R8      each map sees 8 maps of the layer below, drawn by the seed 0; R8s3: by the seed 3
    3C4T0,1+1   connections as they are given: map 0 sees the maps 0 and 1 below, map 1 sees 1, and again from the beginning
    MP2, AP2    the largest or the mean value of each 2x2 square; MP2x3 is 2 high and 3 wide
    LP2, SP2    L2 pooling, or stochastic pooling, which draws among what is over 0
    SS2         LeNet's subsampling: that mean, times a number of its map's own, plus a bias
    150N        a layer that sees everything below; 150ND forgets half of its weights, others for each image (DropConnect)

Maps have no edges added: a kernel of K pixels leaves M - K + 1 of M. A net whose kernels or pools do not go into the maps a whole number of
times is refused. All layers but pools and the last one, which has a number a class, are followed by the activation.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, cast, get_args

from alexprep.pipeline.augmentation import Augmentation, Channels
from alexprep.shards.errors import AlexprepError, number_within, one_of
from alexprep.train.field_values import Pool
from alexprep.train.lazy_module import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import nn

    from alexprep.train.models import column_layers, layers, pools_and_dropconnect
else:
    torch, nn = LazyModule("torch"), LazyModule("torch.nn")
    column_layers, layers, pools_and_dropconnect = (
        LazyModule(f"alexprep.train.models.{name}") for name in ("column_layers", "layers", "pools_and_dropconnect")
    )

Activation = Literal["scaled-tanh", "tanh", "relu"]
Initial = Literal["uniform", "fan-in"]

UNIFORM = 0.05  # the bound of the initial weights of Ciresan et al.
COLUMNS = "columns:"  # what such a --model begins with
LENET5 = (  # LeCun, Bottou, Bengio and Haffner 1998, section II.B and table I, to F6; here the outputs are a layer, there radial bases
    "1x32x32-6C5-SS2-16C5T0,1,2+1,2,3+2,3,4+3,4,5+0,4,5+0,1,5+0,1,2,3+1,2,3,4+2,3,4,5+0,3,4,5+0,1,4,5+0,1,2,5+0,1,3,4+1,2,4,5+0,2,3,5"
    "+0,1,2,3,4,5-SS2-120C5-84N-10N"
)

_INPUT = re.compile(r"(\d+)x(\d+)x(\d+)", re.ASCII)
_SIZE = r"(\d+)(?:x(\d+))?"
_CONVOLUTION = re.compile(
    rf"(?P<maps>\d+)C{_SIZE}(?:S{_SIZE})?(?:R(?P<random>\d+)(?:s(?P<seed>\d+))?|T(?P<table>\d[\d,+]*))?",
    re.ASCII,
)
_POOL = re.compile(rf"(?P<kind>MP|AP|LP|SP|SS){_SIZE}", re.ASCII)
_FULL = re.compile(r"(\d+)ND?", re.ASCII)
_WITHOUT_WEIGHTS: dict[str, Pool] = {"MP": "max", "AP": "average", "LP": "l2", "SP": "stochastic"}
_FORMS = "20C4, 20C4S1, 20C4R8, 20C4T0,1+1,2, MP2, AP2, LP2, SP2, SS2, 150N or 150ND"
_MOST = 1_000_000  # maps, pixels a side
# Weights of a net: 4 GB in float32, 12 with gradient and momentum. AlexNet has a sixteenth of that.
MOST_WEIGHTS = 10**9


class Part(NamedTuple):
    """One layer of a line."""

    text: str
    at: int  # where it begins in the line, from 1
    kind: str  # "C", "MP", "AP", "LP", "SP", "SS" or "N"
    shape: tuple[int, int, int]  # of what it gives: maps, height, width
    kernel: tuple[int, int]
    stride: tuple[int, int]
    table: list[list[int]] | None  # of each map those below that it sees; None for all
    below: int  # maps

    @property
    def fan_in(self) -> int:
        """How many values the sum of one of its units has; of a table, on average."""
        links = self.below if self.table is None else sum(map(len, self.table)) / len(self.table)
        return max(1, round(links * math.prod(self.kernel)))

    @property
    def parameters(self) -> int:
        """Numbers that are learned: of a table's connections those that are there."""
        maps = self.shape[0]
        if self.kind in _WITHOUT_WEIGHTS:
            return 0
        if self.kind == "SS":
            return 2 * maps
        links = maps * self.below if self.table is None else sum(map(len, self.table))
        return links * math.prod(self.kernel) + maps

    @property
    def held(self) -> int:
        """Numbers that the layer has in memory: also the zeros in the place of a table's connections that are not there."""
        return self.parameters if self.table is None else self.shape[0] * (self.below * math.prod(self.kernel) + 1)


@dataclass(frozen=True)
class ColumnNet:
    """A net from a line, see the module.

    Attributes:
        line: of its layers.
        activation: "scaled-tanh", 1.7159 · tanh(2x / 3), as both papers have it; "tanh" or "relu".
        initial: of the weights: "uniform" between -0.05 and 0.05, or "fan-in", of deviation 1 / sqrt(inputs) (LeCun et al. 1998, "Efficient
            BackProp", section 4.6); biases are 0.

    Raises:
        AlexprepError: the line is not of that form; the message names the character.

    >>> print(ColumnNet("1x29x29-20C4-MP2-40C5-MP3-150N-10N").summary())
    1x29x29: 20C4 20x26x26 (340), MP2 20x13x13, 40C5 40x9x9 (20,040), MP3 40x3x3, 150N 150 (54,150), 10N 10 (1,510); 76,040 parameters
    """

    line: str
    activation: Activation = "scaled-tanh"
    initial: Initial = "uniform"

    def __post_init__(self) -> None:
        """Refuses what is no such line, with AlexprepError."""
        one_of("activation", self.activation, get_args(Activation))
        one_of("initial", self.initial, get_args(Initial))
        if self.input is None:
            _check_words(self.line)
        else:
            parsed(self.line, self.input)

    @property
    def input(self) -> tuple[int, int, int] | None:
        """Channels, height and width that the line begins with; None where it leaves that to the recipe.

        >>> ColumnNet("1x29x29-10N").input, ColumnNet("20C4-10N").input
        ((1, 29, 29), None)
        """
        begin = _INPUT.fullmatch(self.line.partition("-")[0])
        return None if begin is None else (int(begin[1]), int(begin[2]), int(begin[3]))

    @property
    def title(self) -> str:
        """As the user names it."""
        return f"{COLUMNS}{self.line}"

    def pixels(self) -> ColumnInput | None:
        """What the beginning of the line says of the images; None where it says nothing."""
        return None if self.input is None else ColumnInput(*self.input)

    def describe(self) -> dict[str, Any]:
        """The switches, part of a run's identity."""
        return asdict(self)

    def summary(self, shape: tuple[int, int, int] | None = None, width: float = 1.0) -> str:
        """Sizes and parameters of all layers, in a sentence; `shape` is the input's where the line does not say it, `width` scales the maps."""
        shape = self.input or shape or (3, 224, 224)
        parts = parsed(self.line, shape, width)
        told = []
        for part in parts:
            size = str(part.shape[0]) if part.kind == "N" else "x".join(map(str, part.shape))
            text = part.text if len(part.text) <= 12 else f"{part.text[:11]}…"
            told.append(f"{text} {size}" + (f" ({part.parameters:,})" if part.parameters else ""))
        count = sum(part.parameters for part in parts)
        return f"{'x'.join(map(str, shape))}: {', '.join(told)}; {count:,} parameters"

    def __call__(
        self, classes: int, crop: int = 29, *, seed: int = 0, width: float = 1.0, in_channels: int = 3
    ) -> nn.Sequential:
        """The network with its initial weights, from float32 (N, in_channels, crop, crop) to logits (N, classes)."""
        shape = (in_channels, crop, crop)
        if self.input is not None and self.input != shape:
            wanted, given = ("x".join(map(str, each)) for each in (self.input, shape))
            raise AlexprepError(
                f"{COLUMNS}{self.line} begins with {wanted}, the recipe gives it {given} (channels, height, width): change augmentation.channels "
                "and augmentation.crop, or the line"
            )
        parts = parsed(self.line, shape, width)
        if parts[-1].shape[0] != classes:
            raise AlexprepError(
                f"{COLUMNS}{self.line}, character {parts[-1].at}: {parts[-1].text} ends the net with {parts[-1].shape[0]} outputs, the data set has "
                f"{classes} classes: end it with {classes}N"
            )
        network = nn.Sequential(OrderedDict(self._layers(parts)))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for part, layer in zip((each for each in parts if each.kind in "CN"), _weighted(network), strict=True):
                if self.initial == "uniform":
                    layer.weight.uniform_(-UNIFORM, UNIFORM, generator=generator)
                else:
                    layer.weight.normal_(0.0, part.fan_in**-0.5, generator=generator)
                if isinstance(layer, column_layers.TableConv2d):
                    layer.weight.mul_(layer.mask)
                assert layer.bias is not None
                layer.bias.zero_()
        return network

    def _layers(self, parts: list[Part]) -> Iterator[tuple[str, nn.Module]]:
        """A largest value of what rises is what rises of the largest value: the activation stands after a max pool, at fewer values."""
        waiting: tuple[str, nn.Module] | None = None
        flat = False
        for number, part in enumerate(parts, 1):
            if waiting is not None and part.kind != "MP":
                yield waiting
                waiting = None
            if part.kind == "N" and not flat:
                yield "flatten", nn.Flatten()
                flat = True
            yield _layer(part, number)
            if waiting is not None:
                yield waiting
                waiting = None
            if number < len(parts) and part.kind not in _WITHOUT_WEIGHTS:
                waiting = f"act{number}", _activation(self.activation)


@dataclass(frozen=True)
class ColumnInput:
    """What the beginning of a line says of the images."""

    channels: int
    height: int
    width: int

    def fitted(self, augmentation: Augmentation, stored_sizes: tuple[int, int]) -> tuple[Augmentation, tuple[int, int]]:
        """An augmentation with these channels and this crop; stored images may be as small as the crop needs."""
        crop = self.height if self.height == self.width else (self.height, self.width)
        low = min(stored_sizes[0], max(1, min(self.height, self.width) - 2 * augmentation.pad))
        channels = cast(Channels, self.channels)
        return replace(augmentation, crop=crop, channels=channels), (low, max(low, stored_sizes[1]))


def parsed(line: str, shape: tuple[int, int, int], width: float = 1.0) -> list[Part]:
    """The layers of a line on an input of channels, height and width, with the sizes of what each gives.

    `width` scales the maps of all layers but the last.

    Raises:
        AlexprepError: the line is not of its form, or does not suit the input; the message names the character.
    """
    number_within("width of a column net", width, 1 / 16, 16)
    words = _check_words(line)
    if not (1 <= shape[0] <= 3 and 1 <= min(shape[1:]) and max(shape[1:]) <= _MOST):
        _refuse(line, 1, f"the input {'x'.join(map(str, shape))} is not of 1 to 3 channels and at least 1 pixel")
    parts: list[Part] = []
    room = MOST_WEIGHTS
    for number, (at, text) in enumerate(words):
        scale = 1.0 if number == len(words) - 1 else width
        below = parts[-1].shape if parts else shape
        parts.append(_part(line, at, text, below, scale, room))
        room -= parts[-1].held
        if len(parts) > 1 and parts[-2].kind == "N" and parts[-1].kind != "N":
            _refuse(line, at, f"{text} comes after {parts[-2].text}, which leaves no maps: only N may follow N")
    if parts[-1].kind != "N":
        _refuse(line, parts[-1].at, f"the line ends with {parts[-1].text}: end it with the classes, such as 10N")
    return parts


def _check_words(line: str) -> list[tuple[int, str]]:
    """The parts of a line behind its input, each with the place of its first character, from 1; AlexprepError where one has no known form."""
    words: list[tuple[int, str]] = []
    at = 1
    for number, text in enumerate(line.split("-")):
        if not (number == 0 and _INPUT.fullmatch(text)):
            forms = (_CONVOLUTION, _POOL, _FULL)
            if not any(form.fullmatch(text) for form in forms):
                matched = max((_matched(form, text) for form in forms), default=0)
                what = f"{text!r} is no layer" if text else "there is nothing between two -, or at the end"
                _refuse(line, at + matched, f"{what}: write {_FORMS}")
            words.append((at, text))
        at += len(text) + 1
    if not words:
        _refuse(line, len(line), f"there are no layers: write {_FORMS}")
    return words


def _matched(form: re.Pattern[str], text: str) -> int:
    """How many characters at its beginning a text has in common with some layer of that form."""
    digits = len(text) - len(text.lstrip("0123456789"))
    return max((end for end in range(len(text), digits, -1) if form.fullmatch(text[:end])), default=digits)


def _part(line: str, at: int, text: str, below: tuple[int, int, int], width: float, room: int) -> Part:
    """One layer on maps, their height and width; `room` is how many weights it may have."""
    if full := _FULL.fullmatch(text):
        units = _scaled(line, at, int(full[1]), width)
        _check_weights(line, at, text, units * (math.prod(below) + 1), room)
        return Part(text, at, "N", (units, 1, 1), below[1:], (1, 1), None, below[0])
    if pool := _POOL.fullmatch(text):
        kernel = int(pool[2]), int(pool[3] or pool[2])
        if pool["kind"] in ("LP", "SP") and kernel[0] != kernel[1]:
            _refuse(line, at, f"{text} is not square: write {pool['kind']}{kernel[0]}")
        sides = [_applied(line, at, text, side, size, size) for side, size in zip(below[1:], kernel, strict=True)]
        return Part(text, at, pool["kind"], (below[0], sides[0], sides[1]), kernel, kernel, None, below[0])
    found = _CONVOLUTION.fullmatch(text)
    assert found is not None
    kernel = int(found[2]), int(found[3] or found[2])
    skipped = int(found[4] or 0), int(found[5] or found[4] or 0)
    stride = skipped[0] + 1, skipped[1] + 1
    sides = [_applied(line, at, text, *each) for each in zip(below[1:], kernel, stride, strict=True)]
    maps = _scaled(line, at, int(found["maps"]), width)
    _check_weights(line, at, text, maps * (below[0] * math.prod(kernel) + 1), room)  # before a table of it is drawn
    table = _table(line, at, found, maps, below[0], width)
    return Part(text, at, "C", (maps, sides[0], sides[1]), kernel, stride, table, below[0])


def _scaled(line: str, at: int, count: int, width: float) -> int:
    if not 1 <= count <= _MOST:
        _refuse(line, at, f"{count:,} maps are not 1 to {_MOST:,}")
    return max(1, round(count * width))


def _check_weights(line: str, at: int, text: str, count: int, room: int) -> None:
    if count > room:
        before = "" if room == MOST_WEIGHTS else f", the layers before it {MOST_WEIGHTS - room:,}"
        _refuse(
            line,
            at,
            f"{text} has {count:,} weights{before}: a net may have {MOST_WEIGHTS:,} ({4 * MOST_WEIGHTS / 1e9:g} GB in float32): take fewer maps "
            "or units, or a larger pool below",
        )


def _applied(line: str, at: int, text: str, side: int, size: int, stride: int) -> int:
    """How often a kernel or pool of a size is applied along a side."""
    if not 1 <= size <= side:
        _refuse(line, at, f"{text} looks at {size} pixels, the maps below it have {side}")
    times, rest = divmod(side - size, stride)
    if rest:
        fitting = [other for other in range(side - rest, side) if (other - size) % stride == 0]
        _refuse(
            line, at, f"{text} does not go into {side} pixels: {rest} left over; {max(fitting, default=size)} would do"
        )
    return times + 1


def _table(line: str, at: int, found: re.Match[str], maps: int, below: int, width: float) -> list[list[int]] | None:
    """Which maps below each map sees; None for all."""
    if found["random"]:
        seen = int(found["random"])
        if not 1 <= seen <= below:
            _refuse(line, at + found.start("random"), f"each map is to see {seen} maps of {below} below")
        generator = torch.Generator().manual_seed(int(found["seed"] or 0))
        drawn = [torch.randperm(below, generator=generator)[:seen].sort().values.tolist() for _ in range(maps)]
        return [[int(number) for number in row] for row in drawn]
    if found["table"] is None:
        return None
    if width != 1:
        _refuse(line, at, "a table of connections is of its own number of maps: leave width at 1")
    rows: list[list[int]] = []
    place = at + found.start("table")
    for text in found["table"].split("+"):
        numbers = text.split(",")
        if not all(numbers) or any(int(number) >= below for number in numbers) or len(set(numbers)) < len(numbers):
            _refuse(line, place, f"{text!r} is no list of different maps from 0 to {below - 1}")
        rows.append(sorted(map(int, numbers)))
        place += len(text) + 1
    if maps % len(rows):
        _refuse(line, at + found.start("table"), f"{len(rows)} lists of connections do not go into {maps} maps")
    return rows * (maps // len(rows))


def _layer(part: Part, number: int) -> tuple[str, nn.Module]:
    maps = part.shape[0]
    if part.kind == "N":
        linear = pools_and_dropconnect.DropConnect if part.text.endswith("D") else nn.Linear
        return f"fc{number}", linear(part.below * math.prod(part.kernel), maps)
    if part.kind == "MP":
        return f"pool{number}", nn.MaxPool2d(part.kernel)
    if part.kind == "AP":
        return f"pool{number}", nn.AvgPool2d(part.kernel)
    if part.kind in _WITHOUT_WEIGHTS:
        pool = pools_and_dropconnect.pool_layer(_WITHOUT_WEIGHTS[part.kind], part.kernel[0], part.kernel[0])
        return f"pool{number}", pool
    if part.kind == "SS":
        return f"pool{number}", column_layers.Subsampling(maps, part.kernel)
    if part.table is not None:
        return f"conv{number}", column_layers.TableConv2d(part.table, part.below, part.kernel, part.stride)
    return f"conv{number}", nn.Conv2d(part.below, maps, part.kernel, part.stride)


def _weighted(network: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


def _activation(name: Activation) -> nn.Module:
    return column_layers.ScaledTanh() if name == "scaled-tanh" else layers.activation_layer(name, inplace=False)


def _refuse(line: str, at: int, why: str) -> NoReturn:
    raise AlexprepError(f"{COLUMNS}{line}, character {at}: {why}")
