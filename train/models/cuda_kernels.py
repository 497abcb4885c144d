"""Kernels for a GPU, in Triton, of what torch does in many passes: response normalisation across maps and its gradient, and the paper's update
of weights.

Triton comes with torch for CUDA; where it is not, `HERE` is False. The definition they are tested against is in
`alexprep.train.models.layers` and `alexprep.train.optimizer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

HERE = triton is not None

_BLOCK = 512  # values a program works on; on an H200 a quarter faster than 1024, and twice where gradients are taken


def _kernel(function: Callable[..., Any]) -> Any:
    """To be compiled when it is first launched."""
    return triton.jit(function) if HERE else function


@_kernel
def _power(scale, BETA: tl.constexpr):  # type: ignore[no-untyped-def]
    """scale^-BETA; for the paper's 0.75 by two roots."""
    if BETA == 0.75:
        root = tl.rsqrt(scale)
        return root * tl.sqrt(root)
    return tl.exp2(-BETA * tl.log2(scale))


@_kernel
def _forward(  # type: ignore[no-untyped-def]
    images, normalised, count, k, alpha,
    STRIDE: tl.constexpr, MAPS: tl.constexpr, TOWER: tl.constexpr, REACH: tl.constexpr, BETA: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One value a lane, in the order of memory: its neighbours lie STRIDE apart."""
    place = (tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    number = (place // STRIDE) % MAPS % TOWER  # of the map in its tower
    value = tl.load(images + place, mask=inside, other=0.0).to(tl.float32)
    total = value * value
    for distance in tl.static_range(-REACH, REACH + 1):
        if distance != 0:
            there = inside & (number + distance >= 0) & (number + distance < TOWER)
            neighbour = tl.load(images + place + distance * STRIDE, mask=there, other=0.0).to(tl.float32)
            total += neighbour * neighbour
    result = value * _power(k + alpha * total, BETA)
    tl.store(normalised + place, result.to(normalised.dtype.element_ty), mask=inside)


@_kernel
def _backward(  # type: ignore[no-untyped-def]
    images, gradient, result, count, k, alpha,
    STRIDE: tl.constexpr, MAPS: tl.constexpr, TOWER: tl.constexpr, REACH: tl.constexpr, BETA: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """g_j · s_j^-beta - 2 · alpha · beta · a_j · sum over the window of g_i · a_i · s_i^(-beta - 1): every s is computed anew, none is stored."""
    place = (tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    number = (place // STRIDE) % MAPS % TOWER
    value = tl.load(images + place, mask=inside, other=0.0).to(tl.float32)
    squares = ()
    for distance in tl.static_range(-2 * REACH, 2 * REACH + 1):
        there = inside & (number + distance >= 0) & (number + distance < TOWER)
        neighbour = tl.load(images + place + distance * STRIDE, mask=there, other=0.0).to(tl.float32)
        squares += (neighbour * neighbour,)  # type: ignore[assignment]
    own = tl.zeros([BLOCK], tl.float32)
    crossed = tl.zeros([BLOCK], tl.float32)
    for distance in tl.static_range(-REACH, REACH + 1):
        total = squares[REACH + distance]  # type: ignore[var-annotated]
        for further in tl.static_range(1, 2 * REACH + 1):
            total += squares[REACH + distance + further]
        there = inside & (number + distance >= 0) & (number + distance < TOWER)
        scale = k + alpha * total
        theirs = tl.load(gradient + place + distance * STRIDE, mask=there, other=0.0).to(tl.float32) * _power(
            scale, BETA
        )
        if distance == 0:
            own = theirs
        neighbour = tl.load(images + place + distance * STRIDE, mask=there, other=0.0).to(tl.float32)
        crossed += theirs * neighbour / scale
    changed = own - 2 * alpha * BETA * value * crossed
    tl.store(result + place, changed.to(result.dtype.element_ty), mask=inside)


def _launch(kernel, tensors, towers: int, reach: int, k: float, alpha: float, beta: float) -> None:  # type: ignore[no-untyped-def]
    first = tensors[0]
    maps, count = first.shape[1], first.numel()
    if count:
        kernel[(math.ceil(count / _BLOCK),)](
            *tensors, count, k, alpha,
            STRIDE=first.stride(1), MAPS=maps, TOWER=maps // towers, REACH=reach, BETA=beta, BLOCK=_BLOCK,
            WIDE=count > 2**31 - _BLOCK,
        )  # fmt: skip


class ResponseNorm(torch.autograd.Function):
    """Response normalisation across maps, one pass each way; nothing is kept for the gradient but the input."""

    @staticmethod
    def forward(ctx, images, reach, towers, k, alpha, beta):  # type: ignore[no-untyped-def]
        """Float32, float16 or bfloat16 (N, C, H, W) -> the same; sums are float32."""
        if not images.is_contiguous():
            images = images.contiguous(memory_format=torch.channels_last)
        normalised = torch.empty_like(images)
        _launch(_forward, (images, normalised), towers, reach, k, alpha, beta)
        ctx.save_for_backward(images)
        ctx.numbers = towers, reach, k, alpha, beta
        return normalised

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        """The gradient of the images, and none of the numbers."""
        (images,) = ctx.saved_tensors
        result = torch.empty_like(images)
        if gradient.stride() != images.stride():
            gradient = torch.empty_like(images).copy_(gradient)
        _launch(_backward, (images, gradient, result), *ctx.numbers)
        return result, None, None, None, None, None


@_kernel
def _move(weights, velocities, gradients, count, keep, decay, rate, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    weight = tl.load(weights + place, mask=inside)
    velocity = tl.load(velocities + place, mask=inside) * keep - weight * decay
    velocity -= tl.load(gradients + place, mask=inside) * rate
    tl.store(velocities + place, velocity, mask=inside)
    tl.store(weights + place, weight + velocity, mask=inside)


def alike(*tensors: torch.Tensor) -> bool:
    """Whether they lie on a GPU, as float32, their values in one and the same order without gaps."""
    first = tensors[0]
    gapless = first.is_contiguous() or first.is_contiguous(memory_format=torch.channels_last)
    return gapless and all(
        each.is_cuda and each.stride() == first.stride() and each.dtype == torch.float32 for each in tensors
    )


def move(
    weight: torch.Tensor, velocity: torch.Tensor, gradient: torch.Tensor, keep: float, decay: float, rate: float
) -> None:
    """v <- keep · v - decay · w - rate · gradient, then w <- w + v, in place; tensors that are `alike`."""
    count = weight.numel()
    _move[(math.ceil(count / _BLOCK),)](weight, velocity, gradient, count, keep, decay, rate, BLOCK=_BLOCK)
