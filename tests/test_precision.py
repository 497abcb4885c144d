"""Precisions against float64, the scaling of fp16, and compiled steps against steps as they are written. Ranks: test_tensor_parallel.py."""

from __future__ import annotations

import functools
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alexprep.cli.options import PRECISIONS as OFFERED
from alexprep.pipeline.augmentation import Augmentation
from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import digest_json
from alexprep.train import recipes
from alexprep.train.config import TrainConfig
from alexprep.train.data import Examples
from alexprep.train.distributed.parallel import Parallel
from alexprep.train.distributed.tensor_parallel import SCHEMES, Scheme
from alexprep.train.distributed.world import World
from alexprep.train.evaluation import evaluate_run
from alexprep.train.lr_schedule import Steps
from alexprep.train.models.alexnet import alexnet_2012
from alexprep.train.models.cifar import tiny_net
from alexprep.train.models.layers import LocalResponseNorm, PaperDropout, SpatialResponseNorm
from alexprep.train.optimizer import MomentumSGD
from alexprep.train.precision import PRECISIONS, Precision, arithmetic, check_precision, float32_kernels, logits
from alexprep.train.recipes import Recipe
from alexprep.train.trainer import train
from alexprep.train.training_state import Compiled, TrainingState, Update, compiler_errors, take_step
from alexprep.train.training_state import check_compiled as check_compiled_gradients
from tests import made_up
from tests.parallel_ranks import exact_batch, exact_network

SECONDS = 120  # for each test
CPU = torch.device("cpu")
# Half a unit in the last of 24, 11, 8 and 11 bits: what rounding an input or an output of a layer may change.
ROUNDOFF = {"fp32": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

pytestmark = pytest.mark.usefixtures("one_thread")


def apart(found: torch.Tensor, right: torch.Tensor) -> float:
    """Length of the difference over the length of what is right."""
    found, right = found.detach().cpu().double(), right.detach().cpu().double()
    return float((found - right).norm() / right.norm())


def test_the_command_line_offers_every_precision() -> None:
    assert get_args(Precision) == PRECISIONS == OFFERED


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ("fp8", "precision 'fp8' is not one of fp32, tf32, bf16, fp16"),
        ("tf32", "tf32 is a GPU's, this is cpu: use fp32"),
    ],
)
def test_what_a_device_cannot_do_is_refused(precision: str, words: str) -> None:
    with pytest.raises(AlexprepError, match=words):
        check_precision(precision, CPU)


@pytest.mark.parametrize(("precision", "inside"), [("fp32", "ieee"), ("bf16", "ieee"), ("tf32", "tf32")])
def test_tf32_is_on_only_where_it_was_asked_for(precision: Precision, inside: str) -> None:
    def state() -> list[str]:
        return [torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision]  # type: ignore[attr-defined]

    before = state()
    with pytest.raises(KeyError), float32_kernels(precision):
        assert state() == [inside, inside]
        raise KeyError
    assert state() == before


def first_step(
    device: torch.device, precision: Precision, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Logits and gradients of two convolutions of LRN, pools and a grouped convolution, on eight images of noise."""
    network = tiny_net(5, 29, seed=3, width=0.5).to(device, dtype)
    generator = torch.Generator().manual_seed(1)
    images = 64 * torch.randn(8, 3, 29, 29, generator=generator)
    labels = torch.randint(5, (8,), generator=generator).to(device)
    with float32_kernels(precision):
        found = logits(network, images.to(device, dtype), precision)
        F.cross_entropy(found, labels).backward()  # type: ignore[no-untyped-call]
    assert found.dtype == dtype
    return {"logits": found} | {
        name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None
    }


def check_precision_of(device: torch.device, precision: Precision) -> None:
    """Five layers, each of which rounds what it reads, its weights and what it gives.

    Gradients of lower layers are not compared: where rounding turns a near-tie under a max pool, they take another way.
    """
    right, found = first_step(CPU, "fp32", torch.float64), first_step(device, precision)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    for name in ("logits", "fc5.weight", "fc4.weight"):
        roundings = 100 if precision == "fp32" else 10  # sums of hundreds of terms in float32 themselves
        assert apart(found[name], right[name]) < roundings * ROUNDOFF[precision], name
    assert apart(found["logits"], right["logits"]) > ROUNDOFF[precision] / 10  # it is not a finer one


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_is_as_close_to_float64_as_its_precision(precision: Precision) -> None:
    check_precision_of(CPU, precision)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_on_a_gpu_is_as_close_to_float64(precision: Precision) -> None:
    check_precision_of(torch.device("cuda"), precision)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layer", [LocalResponseNorm(), LocalResponseNorm(2, k=1.0), SpatialResponseNorm(alpha=1e-3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_response_norms_round_once(
    dtype: torch.dtype, layer: nn.Module, memory: torch.memory_format, seed: int
) -> None:
    """Outputs are off by their own rounding; gradients also by that of the saved output, which their second term has."""
    torch.manual_seed(seed)
    images = (100 * torch.randn(9, 12, 7, 5)).to(dtype).contiguous(memory_format=memory).requires_grad_()
    sent = torch.randn(9, 12, 7, 5).to(dtype)
    exact = images.detach().double().requires_grad_()
    right, found = layer(exact), layer(images)
    right.backward(sent.double())
    found.backward(sent)
    assert found.dtype == dtype and images.grad is not None and images.grad.dtype == dtype and exact.grad is not None
    assert found.is_contiguous(memory_format=memory) and images.grad.is_contiguous(memory_format=memory)
    roundoff = torch.finfo(dtype).eps / 2 * 1.01
    smallest = torch.finfo(dtype).tiny
    assert ((found - right).abs() <= roundoff * right.abs() + smallest).all()
    # d/da_j is g_j · s_j^-beta less a sum over the window: with everything positive, nothing in that sum cancels.
    positive = exact.detach().abs().requires_grad_()
    output = layer(positive)
    output.backward(sent.double().abs())
    assert positive.grad is not None
    second_term = sent.double().abs() * output.detach() / positive.detach() - positive.grad
    assert ((images.grad - exact.grad).abs() <= roundoff * (exact.grad.abs() + second_term) + smallest).all()


def test_dropout_in_bf16_is_exact(seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.randn(1000).bfloat16()
    dropped = PaperDropout()(values)
    kept = dropped != 0
    assert torch.equal(dropped[kept], values[kept]) and 400 < int(kept.sum()) < 600


def linear(seed: int = 0) -> tuple[nn.Sequential, MomentumSGD]:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return network, MomentumSGD([{"params": list(network.parameters())}], lr=0.1)


def test_scaling_changes_no_bit_and_keeps_what_would_vanish() -> None:
    """The scale is a power of two: only what float16 cannot hold without it becomes different, here gradients near 1e-8."""
    torch.manual_seed(1)
    images, labels = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    for shrink, same in ((1.0, True), (2.0**-20, False)):
        network, _ = linear()
        (F.cross_entropy(logits(network, images, "fp16"), labels) * shrink).backward()  # type: ignore[no-untyped-call]
        plain = [weight.grad for weight in network.parameters()]
        network, optimizer = linear()
        update = Update(Parallel(network, "single", World.alone(CPU)), optimizer, "fp16")
        update(F.cross_entropy(logits(network, images, "fp16"), labels) * shrink)
        scaled = [weight.grad for weight in network.parameters()]
        assert update.skipped == 0 and update.loss_scale == 65536
        assert all(torch.equal(one, other) for one, other in zip(plain, scaled, strict=True)) == same  # type: ignore[arg-type]
    exact, _ = linear()
    (F.cross_entropy(exact(images), labels) * shrink).backward()  # type: ignore[no-untyped-call]
    assert all(apart(one, w.grad) < 0.01 for one, w in zip(scaled, exact.parameters(), strict=True))  # type: ignore[arg-type]


def test_an_overflow_moves_nothing_and_halves_the_scale() -> None:
    network, optimizer = linear()
    update = Update(Parallel(network, "single", World.alone(CPU)), optimizer, "fp16")
    images, labels = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    update(F.cross_entropy(logits(network, images, "fp16"), labels))
    weights = [weight.clone() for weight in network.parameters()]
    velocities = [velocity.clone() for velocity in optimizer.velocities()]
    update(1000 * F.cross_entropy(logits(network, images, "fp16"), labels))
    assert (update.skipped, update.loss_scale) == (1, 32768)
    assert all(torch.equal(*pair) for pair in zip(weights, network.parameters(), strict=True))
    assert all(torch.equal(*pair) for pair in zip(velocities, optimizer.velocities(), strict=True))
    with pytest.raises(AlexprepError, match=r"multiplied by only 1: .* --precision bf16"):
        for _ in range(20):
            update(math.inf * F.cross_entropy(logits(network, images, "fp16"), labels))


def test_the_scaler_s_state_goes_through_json() -> None:
    network, optimizer = linear()
    parallel = Parallel(network, "single", World.alone(CPU))
    update = Update(parallel, optimizer, "fp16")
    for factor in (1e6, 1.0, 1.0):
        update(factor * F.cross_entropy(logits(network, torch.ones(1, 6), "fp16"), torch.tensor([1])))
    again = Update(parallel, optimizer, "fp16")
    again.load_state_dict(json.loads(json.dumps(update.state_dict())))
    assert again.state_dict() == update.state_dict()
    assert (again.skipped, again.loss_scale, again.state_dict()["scaler"]["_growth_tracker"]) == (1, 32768, 2)


# Runs


class MadeUpLoader(made_up.MadeUpLoader):
    """Four steps of eight images an epoch, the last of five."""

    side, training, others = 24, 29, 29


def small_network(classes: int, crop: int, *, seed: int, width: float) -> nn.Module:
    """An average pool that hangs over the edge, a norm, dropout."""
    return nn.Sequential(
        OrderedDict(first=tiny_net(8, crop, seed=seed, width=0.25), drop=PaperDropout(), last=nn.Linear(8, classes))
    )


def recipe(**changes: Any) -> Recipe:
    made = Recipe(
        name="small",
        network=small_network,
        augmentation=Augmentation(crop=MadeUpLoader.side, noise="none"),
        stored_sizes=(MadeUpLoader.side, MadeUpLoader.side),
        schedule=Steps(after=()),
        epochs=2,
        batch_size=8,
    )
    return replace(made, **changes)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set's facts without its images, and the recipe "small" in the registry."""
    monkeypatch.setitem(recipes.RECIPES, "small", recipe())
    return made_up.write_data(tmp_path / "data", MadeUpLoader)


def run(data: Path, name: str, device: str = "cpu", **options: Any) -> dict[str, Any]:
    runs = data.parent / "runs"
    options = {"recipe": None if options.get("resume") else "small", "runs": runs, "log_steps": 2, **options}
    return train(TrainConfig(data, name=name, device=device, **options), MadeUpLoader)


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that begins high and grows soon, so that it is on its way wherever a run is cut."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**20, growth_interval=2)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)


def check_resume(data: Path, device: str, cuts: range) -> None:
    whole = run(data, "whole", device, precision="fp16")
    assert (whole["precision"], whole["steps"]) == ("fp16", 8) and 2 < whole["skipped_steps"] < 8
    log = [json.loads(line) for line in (data.parent / "runs/whole/log.jsonl").read_text().splitlines()]
    scales = [record["loss_scale"] for record in log if record["kind"] == "skip"]
    assert scales[:3] == [2**19, 2**18, 2**17] and len(scales) == whole["skipped_steps"]
    for step in cuts:
        run(data, f"from{step}", device, precision="fp16", steps=step)
        rest = run(data, f"from{step}", device, resume=True, epochs=2)
        assert (rest["weights_sha256"], rest["skipped_steps"]) == (whole["weights_sha256"], whole["skipped_steps"])


@pytest.mark.usefixtures("restless")
def test_a_run_in_fp16_goes_on_with_the_same_bits(data: Path) -> None:
    check_resume(data, "cpu", range(1, 8, 3))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("restless")
def test_a_run_in_fp16_goes_on_on_a_gpu(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    check_resume(data, "cuda", range(2, 5))


def test_precision_is_the_run_s(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(data, "whole", precision="bf16")
    assert "small on cpu in bf16, 29 images" in capsys.readouterr().err
    assert whole["skipped_steps"] is None  # nothing is scaled
    run(data, "cut", precision="bf16", steps=3)
    with pytest.raises(AlexprepError, match="precision was 'bf16', is now 'fp32'"):
        run(data, "cut", precision="fp32", resume=True)
    assert run(data, "cut", resume=True, epochs=2)["weights_sha256"] == whole["weights_sha256"]
    finer = run(data, "finer")
    assert finer["weights_sha256"] != whole["weights_sha256"] and finer["val_loss"] == pytest.approx(
        whole["val_loss"], rel=0.1
    )
    folder = data.parent / "runs/whole"
    found = {
        precision: evaluate_run(folder, device="cpu", open_loader=MadeUpLoader, batch_size=8, precision=precision)
        for precision in ("fp32", "bf16")
    }
    assert (
        found["bf16"]["loss"] == whole["val_loss"] != found["fp32"]["loss"]
    )  # what training measures, it measures as it computes
    assert found["fp32"]["loss"] == pytest.approx(whole["val_loss"], rel=10 * ROUNDOFF["bf16"])
    assert (found["bf16"]["precision"], evaluate_run(folder, device="cpu", open_loader=MadeUpLoader)["precision"]) == (
        "bf16",
        "fp32",
    )


def test_runs_of_before_there_were_precisions_are_fp32(data: Path) -> None:
    whole = run(data, "whole")
    run(data, "old", steps=3)
    folder = data.parent / "runs/old"
    began = json.loads((folder / "config.json").read_text())
    del began["identity"]["precision"]
    for name in ("precision", "channels_last", "compile"):
        del began["options"][name]
    (folder / "config.json").write_text(json.dumps(began))
    mark = folder / "checkpoints/step-00000003.json"
    document = json.loads(mark.read_text())
    del (
        document["digest"],
        document["facts"]["identity"]["precision"],
        document["facts"]["update"],
        document["facts"]["rounding"],
    )
    mark.write_text(json.dumps(document | {"digest": digest_json(document)}))
    with pytest.raises(AlexprepError, match="precision was 'fp32', is now 'bf16'"):
        run(data, "old", resume=True, precision="bf16")
    assert run(data, "old", resume=True, epochs=2)["weights_sha256"] == whole["weights_sha256"]


def test_memory_and_compilation_may_change_with_a_word(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both only round otherwise, as another device or number of ranks does."""
    run(data, "run", steps=2, channels_last=False)
    assert run(data, "run", steps=3, resume=True)["steps"] == 3
    assert "channels_last was" not in capsys.readouterr().err  # it went on as it began
    assert run(data, "run", steps=4, resume=True, channels_last=True)["steps"] == 4
    assert "channels_last was False, is now True: the last bits may differ" in capsys.readouterr().err


# Compilation


def test_alexnet_compiles_in_one_piece() -> None:
    """Both norms, dropout, groups, overlapping pools: nothing breaks the graph."""
    network = alexnet_2012(3, 67, seed=0, width=0.0625)
    whole = torch.compile(network, fullgraph=True, dynamic=False, backend="eager")
    images = torch.randn(2, 3, 67, 67)
    torch.manual_seed(0)
    right = network(images)
    torch.manual_seed(0)
    assert apart(whole(images), right) < 1e-5


def pooled_network(classes: int, crop: int, *, seed: int, width: float) -> nn.Module:
    """A norm, an average pool that hangs over the edge, dropout."""
    side = (crop - 3) // 2 + 1  # of maps of crop - 2 pixels, pooled up
    torch.manual_seed(seed)
    layers = OrderedDict(
        conv=nn.Conv2d(3, 4, 3),
        norm=LocalResponseNorm(2),
        pool=nn.AvgPool2d(3, 2, ceil_mode=True),
        flatten=nn.Flatten(),
        drop=PaperDropout(),
        last=nn.Linear(4 * side * side, classes),
    )
    return nn.Sequential(layers)


def check_compiled(device: torch.device) -> None:
    """Three steps on whole batches, one on a smaller one, of the same network with the same random numbers."""
    made = recipe(network=pooled_network)
    states = [TrainingState(made, 3, 0, device, computing=arithmetic(device, compile=flag)) for flag in (False, True)]
    assert list(states[0].tensors()) == list(states[1].tensors())
    calls = _counted(states[1])
    for step, batch in enumerate(MadeUpLoader("", memory_format="channels_last", device=str(device))):
        losses = []
        for state in states:
            torch.manual_seed(step)
            losses.append(take_step(state, *batch)[0])
        assert apart(losses[1], losses[0]) < 1e-5
    assert calls == [8, 8, 8, 8]  # the first is the check
    weights = [state.parallel.gather_state() for state in states]
    assert max(apart(weights[1][name], weights[0][name]) for name in weights[0]) < 1e-5


def _counted(state: TrainingState) -> list[int]:
    """Batches that the compiled network is given from now on: their sizes."""
    sizes: list[int] = []
    assert state.compiled is not None
    whole = state.compiled._whole

    def counting(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return whole(images)

    state.compiled._whole = counting
    return sizes


def test_a_smaller_batch_is_compiled_on_no_rank() -> None:
    """A rank's share of it may be that of a whole one; and ranks add up gradients as they come, which compiling changes."""
    state = TrainingState(recipe(), 3, 0, CPU)
    state.compiled = lambda images: images.new_zeros(len(images), 3)  # type: ignore[assignment]
    images = torch.ones(4, 3, MadeUpLoader.side, MadeUpLoader.side)
    assert logits(state.called_for(7), images, "fp32").any()
    assert not logits(state.called_for(8), images[:3], "fp32").any()


def test_a_wrong_gradient_is_never_trained_with(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.13 compiles none at all for what lies below a max pool before a flatten, in contiguous memory on a CPU."""

    def wrong(network: nn.Sequential, **options: object) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda images: network(images).detach() + network[-1].bias

    monkeypatch.setattr(torch, "compile", wrong)
    with pytest.raises(AlexprepError, match=r"a wrong gradient of first\S+: it differs .* by 1 times its length"):
        train(
            TrainConfig(data, "small", runs=data / "runs", device="cpu", compile=True, channels_last=False),
            MadeUpLoader,
        )
    assert not list((data / "runs" / "small" / "checkpoints").glob("*"))


def test_the_check_leaves_no_trace() -> None:
    """Neither in random numbers nor in buffers, nor in gradients."""
    state = TrainingState(recipe(network=normalised_network), 3, 0, CPU)
    before = state.tensors()
    images = torch.randn(8, 3, MadeUpLoader.side, MadeUpLoader.side, generator=torch.Generator().manual_seed(0))
    check_compiled_gradients(state, state.network, images, torch.arange(8) % 3)
    after = state.tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(weight.grad is None or not weight.grad.any() for weight in state.network.parameters())


def normalised_network(classes: int, crop: int, *, seed: int, width: float) -> nn.Module:
    """Batch normalisation, whose running means a training step changes, and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * crop * crop, 4), nn.BatchNorm1d(4), PaperDropout(), nn.Linear(4, classes)
    )


def without_kernels(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Compilation as far as to a graph of the step (and with aot_eager of its gradient): to make kernels takes ten seconds more."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda network, *, options, **more: compile_(network, backend=backend, **more)
    )


def test_compiled_steps_are_the_steps_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernels(monkeypatch, "aot_eager")
    check_compiled(CPU)


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


def test_a_pool_over_the_edge_is_compiled_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch 2.13 compiles a wrong gradient of is put in other words, which mean the same to the last bit."""
    without_kernels(monkeypatch, "eager")
    networks = [pooled_network(3, MadeUpLoader.side, seed=0, width=1) for _ in range(2)]
    Compiled(networks[1])
    images, gradients = torch.randn(2, 3, MadeUpLoader.side, MadeUpLoader.side), []
    for network in networks:
        network.eval()(images).square().sum().backward()
        gradients.append([weight.grad for weight in network.parameters()])
    assert not networks[1].pool.count_include_pad  # type: ignore[union-attr]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses what torch deprecates
def test_compiled_steps_on_a_gpu() -> None:
    with float32_kernels("fp32"):
        check_compiled(torch.device("cuda"))


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def failing(images: torch.Tensor) -> torch.Tensor:
        raise TorchDynamoException("InvalidCxxCompiler: No working C++ compiler found\n\nand much more")

    monkeypatch.setattr(torch, "compile", lambda network, **options: failing)
    with (
        pytest.raises(
            AlexprepError, match=r"^--compile: InvalidCxxCompiler: No working C\+\+ compiler found. It needs .*g\+\+"
        ),
        compiler_errors(CPU),
    ):
        Compiled(nn.Linear(2, 2))(torch.zeros(1, 2))
