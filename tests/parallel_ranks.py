"""What the ranks of tests/test_tensor_parallel.py do: functions for `launch_ranks`, each called as function(world, **arguments)."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.data import Examples
from alexprep.train.distributed.parallel import Parallel
from alexprep.train.distributed.tensor_parallel import SCHEMES, Scheme
from alexprep.train.distributed.world import World
from alexprep.train.models.alexnet import alexnet
from alexprep.train.models.cifar import cifar10_quick_net, tiny_net
from alexprep.train.models.layers import PaperDropout
from alexprep.train.optimizer import MomentumSGD, parameter_groups
from alexprep.train.precision import Precision, logits
from alexprep.train.training_state import Update
from tests.made_up import FAMILY

SIZES = (7, 1, 8, 3)  # images of each step: odd, fewer than ranks, even
CLASSES = 5  # do not divide either
SPLIT: tuple[Scheme, ...] = SCHEMES[1:]
EXACTLY: tuple[Precision, ...] = ("fp32", "bf16")


def network_named(name: str) -> tuple[nn.Sequential, int]:
    """A net of the repository, small, and the side of its input; pools leave maps of odd sides, alexnet's last of 2 x 2 pixels."""
    small: dict[str, tuple[Any, int, float]] = {"tiny": (tiny_net, 29, 0.25), "quick": (cifar10_quick_net, 24, 0.25)}
    small |= {network.name: (network, 67, 0.0625) for network in FAMILY} | {"alexnet": (alexnet, 99, 0.0625)}
    network, side, width = small[name]
    return network(CLASSES, side, seed=3, width=width), side


def batch(step: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = 64 * torch.randn(SIZES[step], 3, side, side, generator=generator)
    return images, torch.randint(CLASSES, (SIZES[step],), generator=generator)


def own_rows(parallel: Parallel, count: int) -> slice:
    """As a loader of `parallel.shard` would take them."""
    rank, ranks = parallel.shard
    return slice(rank * count // ranks, (rank + 1) * count // ranks)


def own_batches(parallel: Parallel, side: int, device: torch.device, dtype: torch.dtype) -> Iterator[Examples]:
    for step, size in enumerate(SIZES):
        images, labels = batch(step, side)
        rows = own_rows(parallel, size)
        odd = step % 2 and dtype == torch.float64  # other arithmetic, whose rounding turns near-ties in float32
        layout = torch.channels_last if odd else torch.contiguous_format
        yield Examples(images[rows].to(device, dtype, memory_format=layout), labels[rows].to(device))


def optimizer_of(network: nn.Module) -> MomentumSGD:
    groups = parameter_groups(network, decay=0.0005, layer_decay={"conv1": 0.001}, bias_lr_factor=2.0)
    return MomentumSGD(groups, lr=0.01)


def apart(found: torch.Tensor, right: torch.Tensor) -> float:
    """Length of the difference over the length of what is right."""
    found, right = found.detach().double().cpu(), right.detach().double().cpu()
    length = float(right.norm())
    return float((found - right).norm()) / length if length else float(found.norm())


def train(world: World, name: str, scheme: Scheme, dtype: torch.dtype) -> tuple[Parallel, MomentumSGD, dict[str, Any]]:
    """A few steps of a scheme beside as many on one device: how far apart losses and gradients are."""
    network, side = network_named(name)
    parallel = Parallel(network.to(dtype), scheme, world)
    optimizer = optimizer_of(parallel.network)
    single = network_named(name)[0].to(world.device, dtype)
    single_optimizer = optimizer_of(single)
    losses, apart_losses, gradients = [], [], []
    torch.manual_seed(5)
    batches = parallel.batches(own_batches(parallel, side, world.device, dtype))
    for step in range(len(SIZES)):
        images, labels = (tensor.to(world.device) for tensor in batch(step, side))
        with torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else []):
            right = F.cross_entropy(single(images.to(dtype)), labels)
            single_optimizer.zero_grad()
            right.backward()  # type: ignore[no-untyped-call]
            after = torch.get_rng_state()
        own_images, own_labels = next(batches)
        assert torch.equal(own_labels, labels), "the labels of the whole batch, in order"
        loss = F.cross_entropy(parallel.network(own_images), own_labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        parallel.sum_gradients()
        assert torch.equal(torch.get_rng_state(), after), "random numbers are those of one device"
        losses.append(loss.item())
        apart_losses.append(apart(loss, right))
        pairs = [(key, own, single.get_parameter(key)) for key, own in parallel.network.named_parameters()]
        gradients.append(max(apart(own.grad, parallel._own(key, whole.grad)) for key, own, whole in pairs))  # type: ignore[arg-type]
        optimizer.step()
        single_optimizer.step()
    whole, expected = parallel.gather_state(), single.state_dict()
    report = {
        "losses": losses,
        "loss": max(apart_losses),
        "gradients": gradients,
        "weights": max(apart(whole[key], weight) for key, weight in expected.items()),
        "form": [(key, w.shape) for key, w in whole.items()] == [(key, w.shape) for key, w in expected.items()],
    }
    return parallel, optimizer, report


def round_trips(
    world: World, name: str, whole: dict[str, torch.Tensor], velocities: dict[str, torch.Tensor]
) -> list[str]:
    """A state into every scheme and out again: the schemes in which a bit changed."""
    wrong: list[str] = []
    for scheme in SCHEMES:
        there = World.alone(world.device) if scheme == "single" else world
        parallel = Parallel(network_named(name)[0], scheme, there)
        optimizer = optimizer_of(parallel.network)
        parallel.scatter_state(whole)
        parallel.scatter_slots(optimizer, velocities)
        weights, moved = parallel.gather_state(), parallel.gather_slots(optimizer)
        equal = all(torch.equal(weights[key], whole[key]) for key in whole)
        if not equal or not all(torch.equal(moved[key], velocities[key]) for key in velocities):
            wrong.append(scheme)
    return wrong


def evaluation(world: World, scheme: Scheme) -> float:
    """How far the logits of ten views are from one device's, in evaluation mode, with fewer images than ranks at last."""
    network, side = network_named("alexnet")
    parallel = Parallel(network.double(), scheme, world)
    parallel.network.eval()
    single = network_named("alexnet")[0].double().eval()
    generator = torch.Generator().manual_seed(1)
    views = [64 * torch.randn(n, 2, 3, side, side, generator=generator, dtype=torch.float64) for n in (3, 1)]
    rows = [own_rows(parallel, len(v)) for v in views]
    own = [Examples(v[r], torch.zeros(len(v), dtype=torch.int64)[r]) for v, r in zip(views, rows, strict=True)]
    worst = 0.0
    with torch.inference_mode():
        for (images, labels), whole in zip(parallel.batches(own), views, strict=True):
            found = parallel.network(images.flatten(0, 1))
            assert len(labels) == len(whole)
            worst = max(worst, apart(found, single(whole.flatten(0, 1))))
    return worst


def gradients_of(network: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}


# Exact arithmetic: integers below 256 are what they are in bfloat16 too, so that no order of adding them up makes a difference.


def exact_network() -> nn.Sequential:
    """Convolutions in groups and over all maps, pools, dropout and linear layers, of weights -1, 0 and 1, most of them 0."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(6, 6, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 2 * 2, 10),
        PaperDropout(),
        nn.Linear(10, CLASSES),
    )
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in network.parameters():
            values = torch.randint(-1, 2, weight.shape, generator=generator)
            weight.copy_(values * (torch.rand(weight.shape, generator=generator) < 0.25))
    return network


def exact_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Seven images, and the loss's gradient: that of the sum of some logits less others."""
    generator = torch.Generator().manual_seed(6)
    images = torch.randint(-1, 2, (7, 3, 19, 19), generator=generator).float()
    return images, torch.randint(-1, 2, (7, CLASSES), generator=generator).float()


def exact(world: World, scheme: Scheme, precision: Precision) -> dict[str, Any]:
    """Whether a step of two ranks is one device's to the last bit; the largest value in it; and in what types it was sent."""
    images, signs = exact_batch()
    single, largest = exact_network(), [0.0]

    def look(*values: torch.Tensor) -> None:
        largest.extend(float(value.abs().max()) for value in values)

    for layer in single:
        layer.register_forward_hook(lambda module, given, made: look(made.detach()))
        if layer is not single[0]:
            layer.register_full_backward_hook(lambda module, to_inputs, to_outputs: look(*to_inputs))
    torch.manual_seed(8)
    expected = logits(single, images, precision)
    right = gradients_of(single, (expected * signs).sum())
    look(*right.values())

    parallel = Parallel(exact_network(), scheme, world)
    rows = own_rows(parallel, len(images))
    torch.manual_seed(8)
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchanges:
        ((own, _),) = parallel.batches([Examples(images[rows], torch.arange(len(images))[rows])])
        found = logits(parallel.network, own, precision)
        gradients = gradients_of(parallel.network, (found * signs).sum())
    parallel.sum_gradients()
    different = [name for name in gradients if not torch.equal(gradients[name], parallel._own(name, right[name]))]
    return {
        "different": different if torch.equal(found, expected) else ["logits", *different],
        "largest": max(largest),
        "zero": [name for name, gradient in right.items() if not gradient.any()],
        "sent": sorted({str(call.args[1].dtype) for call in exchanges.call_args_list} - {"torch.int64"}),
    }


def overflow_on_one(world: World) -> list[Any]:
    """Towers of one layer: rank 1's classes have no share in the loss, so only rank 0 has gradients that overflow."""
    layer = nn.Linear(3, 4)
    nn.init.zeros_(layer.weight)
    layer.bias = nn.Parameter(torch.tensor([0.0, 0.0, -1e4, -1e4]))
    parallel = Parallel(nn.Sequential(layer), "towers", world)
    part = dict(parallel.network.named_parameters())["0.weight"]
    optimizer = MomentumSGD([{"params": list(parallel.network.parameters())}], lr=0.1)
    update = Update(parallel, optimizer, "fp16")
    before = parallel.gather_state()
    finite, moved = [], []
    for _ in range(3):
        loss = F.cross_entropy(logits(parallel.network, torch.full((1, 3), 4.0), "fp16"), torch.tensor([0]))
        (own,) = torch.autograd.grad(loss * update.loss_scale, part, retain_graph=True)
        finite.append(bool(own.isfinite().all()))
        update(loss)
        after = parallel.gather_state()
        moved.append(not all(torch.equal(before[key], after[key]) for key in before))
    return [finite, moved, update.skipped, update.loss_scale]


def different_batches(world: World) -> str:
    """Towers whose loaders disagree."""
    parallel = Parallel(network_named("tiny")[0], "towers", world)
    labels = torch.tensor([world.rank], device=world.device)
    try:
        next(parallel.batches([Examples(torch.zeros(1, 3, 29, 29, device=world.device), labels)]))
    except AlexprepError as error:
        return str(error)
    return "accepted"


def everything(world: World, names: list[str]) -> dict[str, Any]:
    """All that two ranks on a CPU are asked."""
    found: dict[str, Any] = {"overflow": overflow_on_one(world)}
    for scheme in SPLIT:
        for name in names:
            parallel, optimizer, found[f"{name} {scheme}"] = train(world, name, scheme, torch.float64)
            if scheme == "towers":
                whole = {key: weight.float() for key, weight in parallel.gather_state().items()}
                velocities = {key: slot.float() for key, slot in parallel.gather_slots(optimizer).items()}
                found[f"round trips {name}"] = round_trips(world, name, whole, velocities)
        found[f"evaluation {scheme}"] = evaluation(world, scheme)
        found |= {f"exact {scheme} {precision}": exact(world, scheme, precision) for precision in EXACTLY}
    found["refused"] = different_batches(world)
    found["compiler"] = "torch._dynamo" in sys.modules
    return found


def on_gpus(world: World, names: list[str]) -> dict[str, Any]:
    """Trainings in float64 and in float32."""
    return {
        f"{name} {scheme} {dtype}": train(world, name, scheme, dtype)[2]
        for name in names
        for scheme in SPLIT
        for dtype in (torch.float64, torch.float32)
    }


def alone_with_nccl(world: World) -> dict[str, Any]:
    """A world of one GPU: NCCL's group, and sums through it."""
    return {"backend": dist.get_backend(world.group), "report": train(world, "alexnet", "ddp", torch.float32)[2]}


def fault(world: World, kind: str, folder: str) -> str:
    """Steps for ever; at the third, rank 1 comes to harm."""
    Path(folder, str(world.rank)).write_text(str(os.getpid()))
    parallel = Parallel(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)), "towers", world)
    example = Examples(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    endless = (example for _ in iter(int, 1))
    for step, (images, labels) in enumerate(parallel.batches(endless), start=1):
        F.cross_entropy(parallel.network(images), labels).backward()  # type: ignore[no-untyped-call]
        if step == 3 and world.rank == 1:
            if kind in ("kill", "stop"):
                os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
            if kind == "hang":
                time.sleep(1000)
            if kind == "raise":
                print("the last words of rank 1", flush=True)  # noqa: T201
                raise ValueError("a bad day")
        time.sleep(0.01)
    return "never"
