"""In which number format and memory format a network computes, what each means on a CPU and on a GPU, and the error of NaN.

Not for the update of the weights, which is float32 in every precision: that is in `alexprep.train.training_state`. Where a value that
is not finite came from is searched for in `alexprep.train.nonfinite`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch

from alexprep.shards.errors import AlexprepError

MemoryFormat = Literal["NCHW", "channels_last"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# Convolutions and matrix products take their inputs in these, add up in float32 and give back these. Weights, their gradients,
# velocities and the loss stay float32; layers whose sums would suffer choose float32 by themselves (torch.autocast, response norms).
HALF: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
TENSOR_CORES = (8, 0)  # compute capability from which a GPU computes in bfloat16 and TF32 (Ampere)


class Memory(NamedTuple):
    """How images, activations and kernels lie in memory. Their shapes are N C H W either way."""

    memory_format: MemoryFormat  # what a loader is asked for
    format: torch.memory_format  # of a network's weights
    channels_last: bool  # whether the values of one pixel lie side by side


def memory(device: torch.device, channels_last: bool | None = None, precision: Precision = "fp32") -> Memory:
    """The memory format asked for, or the one that suits the device.

    Convolutions on a CPU are faster with the channels last, and so are those on a GPU in bf16 and fp16.
    """
    if channels_last is None:
        channels_last = device.type == "cpu" or precision in HALF
    return (
        Memory("channels_last", torch.channels_last, True)
        if channels_last
        else Memory("NCHW", torch.contiguous_format, False)
    )


@dataclass(frozen=True)
class Arithmetic:
    """How a training computes."""

    precision: Precision  # decides results; part of a run's identity
    memory: Memory  # how images and weights lie in memory; results differ by rounding
    compile: bool = False  # whether steps are compiled by torch.compile; likewise


def arithmetic(
    device: torch.device,
    precision: Precision | None = None,
    channels_last: bool | None = None,
    compile: bool | None = None,
) -> Arithmetic:
    """The arithmetic that is asked for; None stands for float32, for the memory format that suits the device, and for no compilation."""
    precision = precision or "fp32"
    check_precision(precision, device)
    return Arithmetic(precision, memory(device, channels_last, precision), bool(compile))


def check_precision(precision: str, device: torch.device) -> None:
    """Makes sure that there is a precision of this name, and that a device computes in it."""
    if precision not in PRECISIONS:
        raise AlexprepError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if precision == "tf32" and device.type != "cuda":
        raise AlexprepError(f"precision tf32 is a GPU's, this is {device}: use fp32, or bf16")
    if precision in ("tf32", "bf16") and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < TENSOR_CORES:
            raise AlexprepError(
                f"precision {precision} needs a GPU of compute capability 8.0, {torch.cuda.get_device_name(device)} has "
                f"{capability[0]}.{capability[1]}: use fp16 or fp32"
            )


@contextlib.contextmanager
def float32_kernels(precision: Precision) -> Iterator[None]:
    """Inside the block, a GPU computes in float32 with 10 bits of fraction for "tf32", and with all 23 for any other precision.

    torch by itself leaves TF32 on for convolutions and off for matrix products. CPUs are not affected.
    """
    cudnn = torch.backends.cudnn  # rnn too: torch refuses to tell what cuDNN does where its parts differ
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def logits(network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Calls a network with float32 weights on images, float32 (N, C, H, W), in one of `PRECISIONS`.

    What it gives is float32 whatever it was computed in, and its gradient reaches the weights as float32 too.

    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(layer.weight, 1 + 2**-9)  # bfloat16 has 7 bits of fraction
    >>> [logits(layer, torch.ones(1, 1), precision).item() for precision in ("fp32", "bf16")]
    [1.001953125, 1.0]
    """
    if precision not in HALF:
        return network(images)
    with torch.autocast(images.device.type, dtype=HALF[precision]):
        return network(images).float()


What = Literal["weight", "images", "output", "loss", "gradient", "update"]


class NotFinite(AlexprepError):
    """A loss, a weight or a velocity became NaN or infinite. Nothing of it was saved."""

    def __init__(self, what: str, next_step: str = "") -> None:
        """Says what is not finite."""
        super().__init__(f"{what}: {next_step}" if next_step else what)
        self.what = what  # without the next step


class Origin(NamedTuple):
    """The first value of a training that was not finite."""

    step: int
    what: What
    name: str  # of a layer or a parameter; "" where there is but one such value
    value: str  # "nan" or "inf"

    def sentence(self) -> str:
        """For people."""
        words = {
            "weight": f"{self.name} held {self.value} before the step",
            "images": f"the images held {self.value}",
            "output": f"the output of {self.name} became {self.value}",
            "loss": f"the loss became {self.value}",
            "gradient": f"the gradient of {self.name} became {self.value}",
            "update": f"{self.name} became {self.value} when it was updated",
        }
        return f"it began in step {self.step}, where {words[self.what]}"
