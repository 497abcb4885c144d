"""What the ranks of tests/test_tensor_parallel.py do: functions for `launch`, each called as function(world, **arguments)."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.data import Examples
from alexprep.train.distributed.parallel import Parallel
from alexprep.train.distributed.tensor_parallel import SCHEMES, Scheme
from alexprep.train.distributed.world import World
from alexprep.train.models.alexnet import alexnet
from alexprep.train.models.cifar import cifar10_quick_net, tiny_net
from alexprep.train.optimizer import MomentumSGD, parameter_groups
from alexprep.train.parallel.prediction import predicted_bytes
from tests.made_up import FAMILY

SIZES = (7, 1, 8, 3)  # images of each step: odd, fewer than ranks, even
CLASSES = 5  # do not divide either


def network_named(name: str) -> tuple[nn.Sequential, int]:
    """A net of the repository, small, and the side of its input; pools leave maps of odd sides, alexnet's last of 2 x 2 pixels."""
    if name == "alexnet":
        return alexnet(CLASSES, 99, seed=3, width=0.0625), 99
    if name == "tiny":
        return tiny_net(CLASSES, 29, seed=3, width=0.25), 29
    if name == "quick":
        return cifar10_quick_net(CLASSES, 24, seed=3, width=0.25), 24
    (network,) = (network for network in FAMILY if network.name == name)
    return network(CLASSES, 67, seed=3, width=0.0625), 67


def batch(step: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = 64 * torch.randn(SIZES[step], 3, side, side, generator=generator)
    return images, torch.randint(CLASSES, (SIZES[step],), generator=generator)


def own_batches(parallel: Parallel, side: int, device: torch.device, dtype: torch.dtype) -> Iterator[Examples]:
    """As a loader of `parallel.shard` would give them."""
    rank, ranks = parallel.shard
    for step, size in enumerate(SIZES):
        images, labels = batch(step, side)
        rows = slice(rank * size // ranks, (rank + 1) * size // ranks)
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


def train(
    world: World, name: str, scheme: Scheme, share: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Parallel, MomentumSGD, dict[str, Any]]:
    """A few steps of a scheme beside as many on one device: how far apart losses and gradients are, and whether bytes are as predicted."""
    network, side = network_named(name)
    parallel = Parallel(network.to(dtype), scheme, world, share_batches=share)
    optimizer = optimizer_of(parallel.network)
    single = network_named(name)[0].to(world.device, dtype)
    single_optimizer = optimizer_of(single)
    worst, losses, bytes_equal = {"loss": 0.0}, [], []
    gradients: list[float] = []
    torch.manual_seed(5)
    world.traffic.since_last()
    batches = parallel.batches(own_batches(parallel, side, world.device, dtype))
    for step in range(len(SIZES)):
        images, labels = (tensor.to(world.device) for tensor in batch(step, side))
        images = images.to(dtype)
        random = torch.get_rng_state()
        on_gpu = torch.cuda.get_rng_state() if world.device.type == "cuda" else None
        right = F.cross_entropy(single(images), labels)
        single_optimizer.zero_grad()
        right.backward()  # type: ignore[no-untyped-call]
        after = torch.get_rng_state()
        torch.set_rng_state(random)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)

        own_images, own_labels = next(batches)
        assert torch.equal(own_labels, labels), "the labels of the whole batch, in order"
        loss = F.cross_entropy(parallel.network(own_images), own_labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        parallel.sum_gradients()
        assert torch.equal(torch.get_rng_state(), after), "as many random numbers as on one device"
        predicted = predicted_bytes(
            network_named(name)[0],
            scheme,
            world.size,
            SIZES[step],
            (3, side, side),
            rank=world.rank,
            share_batches=share,
            itemsize=dtype.itemsize,
        )
        bytes_equal.append(world.traffic.since_last() == predicted)
        losses.append(loss.item())
        worst["loss"] = max(worst["loss"], apart(loss, right))
        weights = dict(single.named_parameters())
        gradients.append(0.0)
        for key, parameter in parallel.network.named_parameters():
            whole = weights[key].grad
            assert whole is not None and parameter.grad is not None
            sizes = parallel._part.split.get(key, [len(whole)])
            rank = world.rank if key in parallel._part.split else 0
            own = whole.narrow(0, sum(sizes[:rank]), sizes[rank])
            gradients[-1] = max(gradients[-1], apart(parameter.grad, own))
        optimizer.step()
        single_optimizer.step()
    whole_state = parallel.gather_state()
    worst["weights"] = max(apart(whole_state[key], weight) for key, weight in single.state_dict().items())
    names_and_shapes = [(key, weight.shape) for key, weight in whole_state.items()]
    same_form = names_and_shapes == [(key, weight.shape) for key, weight in single.state_dict().items()]
    report = {"losses": losses, "bytes": bytes_equal, "form": same_form, "gradients": gradients, **worst}
    return parallel, optimizer, report


def round_trips(world: World, name: str, whole: dict[str, torch.Tensor], velocities: list[torch.Tensor]) -> list[str]:
    """A state into every scheme and out again: the schemes in which a bit changed."""
    wrong: list[str] = []
    for scheme in SCHEMES:
        there = World.alone(world.device) if scheme == "single" else world
        parallel = Parallel(network_named(name)[0], scheme, there)
        optimizer = optimizer_of(parallel.network)
        parallel.scatter_state(whole)
        parallel.scatter_velocities(optimizer, velocities)
        weights, moved = parallel.gather_state(), parallel.gather_velocities(optimizer)
        equal = all(torch.equal(weights[key], whole[key]) for key in whole)
        if not equal or not all(torch.equal(one, other) for one, other in zip(moved, velocities, strict=True)):
            wrong.append(scheme)
    return wrong


def evaluation(world: World, scheme: Scheme) -> float:
    """How far the logits of ten views are from one device's, in evaluation mode, with fewer images than ranks at last."""
    network, side = network_named("alexnet")
    parallel = Parallel(network, scheme, world)
    parallel.network.eval()
    single = network_named("alexnet")[0].eval()
    rank, ranks = parallel.shard
    views = [64 * torch.randn(n, 2, 3, side, side, generator=torch.Generator().manual_seed(n)) for n in (3, 1)]
    rows = [slice(rank * len(v) // ranks, (rank + 1) * len(v) // ranks) for v in views]
    own = [Examples(v[r], torch.zeros(len(v), dtype=torch.int64)[r]) for v, r in zip(views, rows, strict=True)]
    worst = 0.0
    with torch.inference_mode():
        for (images, labels), whole in zip(parallel.batches(own), views, strict=True):
            logits = parallel.network(images.flatten(0, 1))
            assert len(labels) == len(whole)
            worst = max(worst, apart(logits, single(whole.flatten(0, 1))))
    return worst


def schemes(world: World, names: list[str], float32: list[str]) -> dict[str, Any]:
    """Everything about every scheme: in float64 for all nets, in float32 too for some."""
    found: dict[str, Any] = {"compiler": imports_compiler()}
    choices: tuple[Scheme, ...] = ("ddp", "towers", "hybrid")
    for name in names:
        for scheme in choices:
            parallel, optimizer, report = train(world, name, scheme, False, torch.float64)
            whole = {key: weight.float() for key, weight in parallel.gather_state().items()}
            velocities = [velocity.float() for velocity in parallel.gather_velocities(optimizer)]
            report["round_trips"] = round_trips(world, name, whole, velocities)
            found[f"{name} {scheme} float64"] = report
            if name in float32:
                found[f"{name} {scheme} float32"] = train(world, name, scheme)[2]
    found[f"{names[0]} shared float64"] = train(world, names[0], "towers", True, torch.float64)[2]
    if world.device.type == "cpu":
        found["evaluation"] = {scheme: evaluation(world, scheme) for scheme in ("ddp", "towers", "hybrid")}
    found["refused"] = different_batches(world)
    return found


def imports_compiler() -> bool:
    """Whether a training step imports torch's compiler, as those of `torch.optim` do; it takes a second. To be asked first."""
    network, side = network_named("tiny")
    optimizer = optimizer_of(network)
    optimizer.zero_grad()
    network(batch(0, side)[0]).sum().backward()
    optimizer.step()
    return "torch._dynamo" in sys.modules


def different_batches(world: World) -> str:
    """Towers whose loaders disagree."""
    parallel = Parallel(network_named("tiny")[0], "towers", world)
    labels = torch.tensor([world.rank], device=world.device)
    try:
        next(parallel.batches([Examples(torch.zeros(1, 3, 29, 29, device=world.device), labels)]))
    except AlexprepError as error:
        return str(error)
    return "accepted"


def alone_with_nccl(world: World) -> dict[str, Any]:
    """A world of one GPU: NCCL's group, and sums through it."""
    return {"backend": torch.distributed.get_backend(world.group), "report": train(world, "alexnet", "ddp")[2]}


def fault(world: World, kind: str, pids: str | None = None) -> str:
    """Steps for ever; at the third, rank 1 comes to harm."""
    if pids is not None:
        Path(pids, str(world.rank)).write_text(str(os.getpid()))
    parallel = Parallel(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)), "towers", world)
    example = Examples(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    endless = (example for _ in iter(int, 1))
    for step, (images, labels) in enumerate(parallel.batches(endless), start=1):
        F.cross_entropy(parallel.network(images), labels).backward()  # type: ignore[no-untyped-call]
        if step == 3 and world.rank == 1:
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if kind == "hang":
                time.sleep(1000)
            if kind == "raise":
                print("the last words of rank 1", flush=True)  # noqa: T201
                raise ValueError("a bad day")
        time.sleep(0.01)
    return "never"
