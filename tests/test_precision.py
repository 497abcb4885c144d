"""Precisions against float64, the scaling of fp16, and compiled steps against steps as they are written. Ranks: test_tensor_parallel.py."""

from __future__ import annotations

import functools
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alexprep.cli.options import PRECISIONS as OFFERED
from alexprep.pipeline.augmentation import Augmentation
from alexprep.shards.errors import AlexprepError
from alexprep.train import recipes
from alexprep.train.config import TrainConfig
from alexprep.train.distributed.parallel import Parallel
from alexprep.train.distributed.world import World
from alexprep.train.evaluation import evaluate_run
from alexprep.train.models.cifar import tiny_net
from alexprep.train.models.layers import LocalResponseNorm, PaperDropout, Scale
from alexprep.train.optimizer import MomentumSGD
from alexprep.train.precision import PRECISIONS, Precision, arithmetic, check_precision, float32_kernels, logits
from alexprep.train.recipes import Recipe
from alexprep.train.trainer import train
from alexprep.train.training_state import Compiled, TrainingState, Update, check_compiled, compiler_errors, take_step
from tests import made_up
from tests.parallel_ranks import apart

SECONDS = 120  # for each test
CPU = torch.device("cpu")
# Half a unit in the last of 24, 11, 8 and 11 bits: what rounding an input or an output of a layer may change.
ROUNDOFF = {"fp32": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11}
ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


def test_the_command_line_offers_every_precision() -> None:
    assert get_args(Precision) == PRECISIONS == OFFERED


def test_what_a_device_cannot_do_is_refused() -> None:
    with pytest.raises(AlexprepError, match="precision 'fp8' is not one of fp32, tf32, bf16, fp16"):
        check_precision("fp8", CPU)
    with pytest.raises(AlexprepError, match="tf32 is a GPU's, this is cpu: use fp32"):
        check_precision("tf32", CPU)


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


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        *(("cpu", precision) for precision in ("fp32", "bf16", "fp16")),
        *(pytest.param("cuda", precision, marks=ON_GPU) for precision in PRECISIONS),
    ],
)
def test_a_step_is_as_close_to_float64_as_its_precision(device: str, precision: Precision) -> None:
    """Five layers, each of which rounds what it reads, its weights and what it gives.

    Gradients of lower layers are not compared: where rounding turns a near-tie under a max pool, they take another way.
    """
    right, found = first_step(CPU, "fp32", torch.float64), first_step(torch.device(device), precision)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    for name in ("logits", "fc5.weight", "fc4.weight"):
        roundings = 100 if precision == "fp32" else 10  # sums of hundreds of terms in float32 themselves
        assert apart(found[name], right[name]) < roundings * ROUNDOFF[precision], name
    assert apart(found["logits"], right["logits"]) > ROUNDOFF[precision] / 10  # it is not a finer one


IMAGES, LABELS = torch.linspace(-1.5, 1.5, 24).reshape(4, 6), torch.tensor([0, 1, 2, 0])


def linear() -> tuple[nn.Sequential, MomentumSGD, Update]:
    """Two layers of which everything is small, and their updates in fp16."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = MomentumSGD([{"params": list(network.parameters())}], lr=0.1)
    return network, optimizer, Update(Parallel(network, "single", World.alone(CPU)), optimizer, "fp16")


def loss_of(network: nn.Module, precision: Precision = "fp16") -> torch.Tensor:
    return F.cross_entropy(logits(network, IMAGES, precision), LABELS)


def test_scaling_changes_no_bit_and_keeps_what_would_vanish() -> None:
    """The scale is a power of two: only what float16 cannot hold without it becomes different, here gradients near 1e-8."""
    for shrink, same in ((1.0, True), (2.0**-20, False)):
        plain, exact, (network, _, update) = linear()[0], linear()[0], linear()
        (loss_of(plain) * shrink).backward()  # type: ignore[no-untyped-call]
        (loss_of(exact, "fp32") * shrink).backward()  # type: ignore[no-untyped-call]
        update(loss_of(network) * shrink)
        assert update.skipped == 0 and update.loss_scale == 65536
        gradients = [[weight.grad for weight in each.parameters()] for each in (network, plain, exact)]
        assert all(torch.equal(*pair) for pair in zip(*gradients[:2], strict=True)) == same
        assert all(apart(*pair) < 0.01 for pair in zip(gradients[0], gradients[2], strict=True))  # type: ignore[arg-type]


def test_an_overflow_moves_nothing_and_halves_the_scale() -> None:
    network, optimizer, update = linear()
    update(loss_of(network))
    before = [tensor.clone() for tensor in (*network.parameters(), *optimizer.velocities())]
    update(1000 * loss_of(network))
    assert (update.skipped, update.loss_scale) == (1, 32768)
    after = [*network.parameters(), *optimizer.velocities()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    with pytest.raises(AlexprepError, match=r"multiplied by only 1: .* --precision bf16"):
        for _ in range(20):
            update(math.inf * loss_of(network))


def test_the_scaler_s_state_goes_through_json() -> None:
    network, _, update = linear()
    for factor in (1e6, 1.0, 1.0):
        update(factor * loss_of(network))
    again = linear()[2]
    again.load_state_dict(json.loads(json.dumps(update.state_dict())))
    assert again.state_dict() == update.state_dict()
    assert (again.skipped, again.loss_scale, again.state_dict()["scaler"]["_growth_tracker"]) == (1, 32768, 2)


# Runs


class MadeUpLoader(made_up.MadeUpLoader):
    """Four steps of eight images an epoch, the last of five."""

    side, training, others = 24, 29, 29


def small_network(classes: int, crop: int, *, seed: int, width: float) -> nn.Module:
    """A norm, an average pool that hangs over the edge, dropout."""
    side = (crop - 3) // 2 + 1  # of maps of crop - 2 pixels, pooled up
    torch.manual_seed(seed)
    layers = OrderedDict(
        scale=Scale(1 / 64),
        conv=nn.Conv2d(3, 4, 3),
        norm=LocalResponseNorm(2),
        pool=nn.AvgPool2d(3, 2, ceil_mode=True),
        flatten=nn.Flatten(),
        drop=PaperDropout(),
        last=nn.Linear(4 * side * side, classes),
    )
    return nn.Sequential(layers)


def recipe(**changes: Any) -> Recipe:
    side = MadeUpLoader.side
    cut = {"augmentation": Augmentation(crop=side, noise="none"), "stored_sizes": (side, side)}
    return made_up.small_recipe(**{"network": small_network, "epochs": 2, "width": 1.0, **cut, **changes})


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set's facts without its images, and the recipe "small" in the registry."""
    monkeypatch.setitem(recipes.RECIPES, "small", recipe())
    return made_up.write_data(tmp_path / "data", MadeUpLoader)


def run(data: Path, name: str, device: str = "cpu", **options: Any) -> dict[str, Any]:
    runs = data.parent / "runs"
    options = {"recipe": None if options.get("resume") else "small", "runs": runs, "log_steps": 2, **options}
    return train(TrainConfig(data, name=name, device=device, **options), MadeUpLoader)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_a_run_in_fp16_goes_on_with_the_same_bits(device: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a scale that begins high and grows soon, so that it is on its way wherever a run is cut."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**20, growth_interval=2)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    whole = run(data, "whole", device, precision="fp16")
    assert (whole["precision"], whole["steps"]) == ("fp16", 8) and 2 < whole["skipped_steps"] < 8
    log = [json.loads(line) for line in (data.parent / "runs/whole/log.jsonl").read_text().splitlines()]
    scales = [record["loss_scale"] for record in log if record["kind"] == "skip"]
    assert scales[:2] == [2**19, 2**18] and len(scales) == whole["skipped_steps"]
    for step in (2, 5):
        run(data, f"from{step}", device, precision="fp16", steps=step)
        rest = run(data, f"from{step}", device, resume=True, epochs=2)
        assert (rest["weights_sha256"], rest["skipped_steps"]) == (whole["weights_sha256"], whole["skipped_steps"])


def test_precision_is_the_run_s(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(data, "whole", precision="bf16")
    assert "small on cpu in bf16\n29 images" in capsys.readouterr().err
    assert whole["skipped_steps"] is None  # nothing is scaled
    run(data, "cut", precision="bf16", steps=3)
    with pytest.raises(AlexprepError, match="precision was 'bf16', is now 'fp32'"):
        run(data, "cut", precision="fp32", resume=True)
    assert run(data, "cut", resume=True, epochs=2)["weights_sha256"] == whole["weights_sha256"]
    finer = run(data, "finer")
    assert finer["weights_sha256"] != whole["weights_sha256"]
    assert finer["val_loss"] == pytest.approx(whole["val_loss"], rel=0.1)
    view: dict[str, Any] = {"device": "cpu", "open_loader": MadeUpLoader, "batch_size": 8}
    found = evaluate_run(data.parent / "runs/whole", **view)
    assert found["precision"] == "fp32" and found["loss"] != whole["val_loss"]
    assert found["loss"] == pytest.approx(whole["val_loss"], rel=10 * ROUNDOFF["bf16"])
    found = evaluate_run(data.parent / "runs/whole", precision="bf16", **view)
    assert found["precision"] == "bf16" and found["loss"] == whole["val_loss"]  # training measures as it computes


def test_memory_and_compilation_may_change_with_a_word(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both only round otherwise, as another device or number of ranks does."""
    run(data, "run", steps=2, channels_last=False)
    assert run(data, "run", steps=3, resume=True)["steps"] == 3
    assert "channels_last was" not in capsys.readouterr().err  # it went on as it began
    assert run(data, "run", steps=4, resume=True, channels_last=True)["steps"] == 4
    assert "channels_last was False, is now True: the last bits may differ" in capsys.readouterr().err


# Compilation


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
    with pytest.raises(AlexprepError, match=r"a wrong gradient of conv\S+: it differs .* by 1 times its length"):
        run(data, "wrong", compile=True, channels_last=False)
    assert not list((data.parent / "runs/wrong/checkpoints").glob("*"))


def test_the_check_leaves_no_trace() -> None:
    """Neither in random numbers nor in buffers, such as running means, nor in gradients."""

    def normalised_network(classes: int, crop: int, *, seed: int, width: float) -> nn.Module:
        normalised = nn.Sequential(nn.Flatten(), nn.Linear(3 * crop * crop, 4), nn.BatchNorm1d(4), PaperDropout())
        return normalised.append(nn.Linear(4, classes))

    state = TrainingState(recipe(network=normalised_network), 3, 0, CPU)
    before = state.tensors()
    images = torch.randn(8, 3, MadeUpLoader.side, MadeUpLoader.side, generator=torch.Generator().manual_seed(0))
    check_compiled(state, state.network, images, torch.arange(8) % 3)
    after = state.tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(weight.grad is None or not weight.grad.any() for weight in state.network.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses what torch deprecates
@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_compiled_steps_are_the_steps_as_written(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps on whole batches, one on a smaller one, of the same network with the same random numbers."""
    if kind == "cpu":  # to make kernels takes ten seconds more
        compile_ = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda net, *, options, **more: compile_(net, backend="aot_eager", **more)
        )
    device = torch.device(kind)
    states = [TrainingState(recipe(), 3, 0, device, computing=arithmetic(device, compile=on)) for on in (False, True)]
    assert list(states[0].tensors()) == list(states[1].tensors())
    compiled = states[1].compiled
    assert compiled is not None
    batches = MadeUpLoader("", memory_format="channels_last", device=kind)
    with float32_kernels("fp32"), mock.patch.object(compiled, "_whole", wraps=compiled._whole) as whole:
        for step, batch in enumerate(batches):
            losses = []
            for state in states:
                torch.manual_seed(step)
                losses.append(take_step(state, *batch)[0])
            assert apart(losses[1], losses[0]) < 1e-5
    assert [len(call.args[0]) for call in whole.call_args_list] == [8, 8, 8, 8]  # the first is the check
    weights = [state.parallel.gather_state() for state in states]
    assert max(apart(weights[1][name], weights[0][name]) for name in weights[0]) < 1e-5


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def failing(images: torch.Tensor) -> torch.Tensor:
        raise TorchDynamoException("InvalidCxxCompiler: No working C++ compiler found\n\nand much more")

    monkeypatch.setattr(torch, "compile", lambda network, **options: failing)
    words = r"^--compile: InvalidCxxCompiler: No working C\+\+ compiler found. It needs .*g\+\+"
    with pytest.raises(AlexprepError, match=words), compiler_errors(CPU):
        Compiled(nn.Linear(2, 2))(torch.zeros(1, 2))
