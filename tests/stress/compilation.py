"""What `--compile` leaves whole, puts in other words, and leaves out: `pytest tests/stress/compilation.py`."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from alexprep.train.data import Examples
from alexprep.train.distributed.parallel import Parallel
from alexprep.train.distributed.tensor_parallel import SCHEMES, Scheme
from alexprep.train.distributed.world import World
from alexprep.train.models.alexnet import alexnet_2012
from alexprep.train.models.layers import LocalResponseNorm, PaperDropout
from alexprep.train.precision import logits
from alexprep.train.training_state import Compiled
from tests.parallel_ranks import apart, exact_batch, exact_network

CPU = torch.device("cpu")


def without_kernels(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Compilation as far as to a graph of the step (and with aot_eager of its gradient): to make kernels takes ten seconds more."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda network, *, options, **more: compile_(network, backend=backend, **more)
    )


def test_alexnet_compiles_in_one_piece() -> None:
    """Both norms, dropout, groups, overlapping pools: nothing breaks the graph."""
    network = alexnet_2012(3, 67, seed=0, width=0.0625)
    whole = torch.compile(network, fullgraph=True, dynamic=False, backend="eager")
    images = torch.randn(2, 3, 67, 67)
    torch.manual_seed(0)
    right = network(images)
    torch.manual_seed(0)
    assert apart(whole(images), right) < 1e-5


def pooled_network() -> nn.Sequential:
    """A norm, an average pool that hangs over the edge, dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 4, 3),
            norm=LocalResponseNorm(2),
            pool=nn.AvgPool2d(3, 2, ceil_mode=True),
            flatten=nn.Flatten(),
            drop=PaperDropout(),
            last=nn.Linear(4 * 11 * 11, 3),
        )
    )


def test_a_pool_over_the_edge_is_compiled_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch 2.13 compiles a wrong gradient of is put in other words, which mean the same to the last bit."""
    without_kernels(monkeypatch, "eager")
    networks = [pooled_network() for _ in range(2)]
    Compiled(networks[1])
    images, gradients = torch.randn(2, 3, 24, 24), []
    for network in networks:
        network.eval()(images).square().sum().backward()
        gradients.append([weight.grad for weight in network.parameters()])
    assert not networks[1].pool.count_include_pad  # type: ignore[union-attr]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # where torch's compiler leaves off and goes on
@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_what_lies_between_exchanges_is_compiled(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part with its exchanges, in a world of one rank, which has nobody to exchange with."""
    without_kernels(monkeypatch, "eager")
    parallel = Parallel(exact_network(), scheme, World.alone(CPU))
    compiled = Compiled(parallel.network)
    images, signs = exact_batch()
    gradients = []
    for forward in (parallel.network, compiled):
        torch.manual_seed(0)
        parallel.network.zero_grad()
        ((own, _),) = parallel.batches([Examples(images, torch.arange(len(images)))])
        (logits(forward, own, "bf16") * signs).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([weight.grad for weight in parallel.network.parameters()])
    assert all(torch.equal(other, one) for one, other in zip(*gradients, strict=True))  # nothing is rounded in this net
