"""Several ranks against one device, and what becomes of a job when a rank or its parent comes to harm."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.distributed.parallel import Parallel
from alexprep.train.distributed.tensor_parallel import Scheme, part_of
from alexprep.train.distributed.world import World, from_environment
from alexprep.train.launch import RankFailed, launch
from alexprep.train.models.alexnet import alexnet, alexnet_6conv
from alexprep.train.parallel.prediction import predicted_bytes
from tests.made_up import FAMILY

ROOT = Path(__file__).parents[1]
RANKS = str(Path(__file__).with_name("parallel_ranks.py"))
EXACT, CLOSE = 1e-12, 1e-5  # relative
NAMES = (*(network.name for network in FAMILY), "tiny", "quick")
FLOAT32 = ("alexnet", "tiny")
SCHEMES = ("ddp", "towers", "hybrid")


SECONDS = 150  # for each test


@pytest.fixture(scope="module")
def job() -> list[dict[str, Any]]:
    """What two gloo processes found, each."""
    return launch(f"{RANKS}:schemes", 2, {"names": NAMES, "float32": FLOAT32}, device="cpu")


@pytest.mark.parametrize("run", [f"{name} {scheme}" for name in NAMES for scheme in SCHEMES] + ["alexnet shared"])
def test_two_ranks_equal_one_device(run: str, job: list[dict[str, Any]]) -> None:
    """Losses, all gradients and the weights over four steps of 7, 1, 8, 3 images, with dropout; bytes; states bit for bit."""
    for rank in job:
        report = rank[f"{run} float64"]
        assert max(report["loss"], report["weights"], *report["gradients"]) < EXACT
        assert report["form"] and report["bytes"] == [True] * 4 and not report.get("round_trips")
    assert job[0][f"{run} float64"]["losses"] == job[1][f"{run} float64"]["losses"], "the same to the last bit"


@pytest.mark.parametrize("run", [f"{name} {scheme}" for name in FLOAT32 for scheme in SCHEMES])
def test_two_ranks_equal_one_device_in_float32(run: str, job: list[dict[str, Any]]) -> None:
    """Rounding may turn a near-tie under a max pool, which moves a gradient of these few maps but no loss: in a step or two, no more."""
    for rank in job:
        report = rank[f"{run} float32"]
        assert report["loss"] < CLOSE and statistics.median(report["gradients"]) < CLOSE
        assert report["bytes"] == [True] * 4


def test_evaluation_on_two_ranks(job: list[dict[str, Any]]) -> None:
    for rank in job:
        assert max(rank["evaluation"].values()) < CLOSE


def test_training_does_not_wait_for_torch_s_compiler(job: list[dict[str, Any]]) -> None:
    """Its import takes a second, in every rank."""
    assert [rank["compiler"] for rank in job] == [False, False]


def test_towers_with_different_batches_are_refused(job: list[dict[str, Any]]) -> None:
    for rank in job:
        assert "different batches" in rank["refused"]


def test_towers_exchange_where_the_paper_does() -> None:
    """Section 3.2 and figure 2: conv3's input and the fully connected layers', and what the loss reads."""
    sent = predicted_bytes(alexnet(1000), "towers", 2, 128)
    maps, units = 128 * 128 * 13 * 13 * 4, 128 * 2048 * 4
    both: tuple[tuple[str, int], ...] = (("conv3", maps), ("fc6", 128 * 128 * 36 * 4), ("fc7", units), ("fc8", units))
    expected = {(layer, phase): size for layer, size in both for phase in ("forward", "backward")}
    assert sent == expected | {("logits", "forward"): 128 * 500 * 4}


def test_the_sixth_convolution_reads_both_towers() -> None:
    """Net #146 (layers-146-2011.cfg), at its input alone beside those of the paper's net."""
    layers = [layer for layer, phase in predicted_bytes(alexnet_6conv(1000), "towers", 2, 128) if phase == "forward"]
    assert layers == ["conv3", "conv6", "fc6", "fc7", "fc8", "logits"]


def test_each_tower_has_the_kernels_of_figure_2() -> None:
    network = part_of(alexnet(1000), "towers", World(1, 2, torch.device("cpu"))).network
    shapes = {name: tuple(weight.shape) for name, weight in network.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "conv1.weight": (48, 3, 11, 11),
        "conv2.weight": (128, 48, 5, 5),
        "conv3.weight": (192, 256, 3, 3),
        "conv4.weight": (192, 192, 3, 3),
        "conv5.weight": (128, 192, 3, 3),
        "fc6.weight": (2048, 9216),
        "fc7.weight": (2048, 4096),
        "fc8.weight": (500, 4096),
    }


def test_one_rank_is_the_network_itself() -> None:
    network = alexnet(3, 67, width=0.0625)
    parallel = Parallel(network, "single", World.alone("cpu"))
    assert parallel.network is network and parallel.shard == (0, 1)
    state = parallel.gather_state()
    assert all(torch.equal(state[name], weight) for name, weight in network.state_dict().items())


class Unknown(nn.Module):
    """A layer that nobody knows."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values


@pytest.mark.parametrize(
    ("network", "scheme", "ranks", "words"),
    [
        (nn.Sequential(nn.Conv2d(4, 6, 1, groups=2)), "towers", 3, "start 2 ranks"),
        (nn.Sequential(nn.Conv2d(3, 1, 1)), "towers", 2, "start fewer ranks"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), "hybrid", 2, "use ddp"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), Unknown()), "towers", 2, "cannot split 1, a Unknown: use ddp"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "ddp", 2, "not of the batch"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2)), "towers", 2, "must flatten"),
        (nn.Sequential(nn.Linear(3, 4), nn.Conv2d(4, 4, 1)), "hybrid", 2, "cannot split 1"),
        (Unknown(), "towers", 2, "needs an nn.Sequential"),
        (Unknown(), "single", 2, "for one rank"),
        (Unknown(), "rings", 2, "no scheme 'rings'"),
    ],
)
def test_what_cannot_be_split_is_refused(network: nn.Module, scheme: Scheme, ranks: int, words: str) -> None:
    with pytest.raises(AlexprepError, match=words):
        part_of(network, scheme, World(0, ranks, torch.device("cpu")))


def test_a_process_that_is_no_rank_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(AlexprepError, match="torchrun"):
        from_environment()


@pytest.mark.parametrize(
    ("kind", "words", "timeout"),
    [
        ("kill", "rank 1 was killed by SIGKILL", 30),
        ("stop", "rank 1 is stopped .SIGSTOP.", 2),
        ("hang", r"rank 0 failed \(still running: 1\).*[Tt]imed out", 2),
        ("raise", r"(?s)rank 1 failed.*ValueError: a bad day.*rank 1 \| the last words of rank 1", 30),
    ],
)
def test_a_dead_or_stuck_rank_ends_the_job(kind: str, words: str, timeout: float, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=words):
        launch(f"{RANKS}:fault", 2, {"kind": kind, "pids": str(tmp_path)}, device="cpu", timeout=timeout)
    for rank in "01":
        assert not _lives(int((tmp_path / rank).read_text()))


def test_words_of_a_rank_for_the_user_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(AlexprepError, match=f"^target {tmp_path}/nowhere.py:function: FileNotFoundError") as caught:
        launch(f"{tmp_path}/nowhere.py:function", 2, device="cpu")
    assert not isinstance(caught.value, RankFailed)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_what_kills_the_parent_ends_the_ranks(tmp_path: Path) -> None:
    """No orphans. What a SIGTERM does is in tests/test_launch.py."""
    arguments = {"kind": "none", "pids": str(tmp_path)}
    program = f"from alexprep.train.launch import launch\nlaunch({f'{RANKS}:fault'!r}, 2, {arguments!r}, device='cpu')"
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    files = [tmp_path / "0", tmp_path / "1"]
    try:
        end = time.monotonic() + SECONDS / 2
        while not all(file.exists() and file.read_text() for file in files):
            assert parent.poll() is None and time.monotonic() < end, "the ranks did not begin"
            time.sleep(0.02)
    finally:
        parent.kill()
        parent.wait(timeout=10)
    began = time.monotonic()
    pids = [int((tmp_path / rank).read_text()) for rank in "01"]
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() - began < 10, "a rank outlived its parent"
        time.sleep(0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nccl_on_one_gpu() -> None:
    (found,) = launch(f"{RANKS}:alone_with_nccl", 1)
    assert found["backend"] == "nccl"
    assert found["report"]["loss"] < CLOSE and statistics.median(found["report"]["gradients"]) < CLOSE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_ranks_share_a_gpu_with_gloo() -> None:
    _check_on_gpus(
        launch(f"{RANKS}:schemes", 2, {"names": ["alexnet"], "float32": ["alexnet"]}, device="cuda:0", backend="gloo")
    )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_with_nccl() -> None:
    _check_on_gpus(launch(f"{RANKS}:schemes", 2, {"names": NAMES, "float32": NAMES}))


def _check_on_gpus(job: list[dict[str, Any]]) -> None:
    """As on the CPU; in float32, convolutions of half the kernels may be done by other algorithms."""
    for rank in job:
        for run, report in rank.items():
            if run not in ("refused", "compiler"):
                close = EXACT if "float64" in run else 1e-4
                assert report["loss"] < close and statistics.median(report["gradients"]) < close, run
                assert report["bytes"] == [True] * 4 and not report.get("round_trips")
