"""Several ranks against one device, and what becomes of a job when a rank or its parent comes to harm."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.distributed.parallel import Parallel
from alexprep.train.distributed.tensor_parallel import SCHEMES, Gather, Scheme, part_of
from alexprep.train.distributed.world import World, from_environment
from alexprep.train.launch import RankFailed, launch_ranks
from alexprep.train.models.alexnet import alexnet, alexnet_6conv
from tests.made_up import FAMILY

ROOT = Path(__file__).parents[1]
RANKS = str(Path(__file__).with_name("parallel_ranks.py"))
EXACT, CLOSE = 1e-12, 1e-5  # relative
NAMES = (*(network.name for network in FAMILY), "tiny", "quick")
SPLIT = SCHEMES[1:]
SECONDS = 150  # for each test


@pytest.fixture(scope="module")
def job() -> list[dict[str, Any]]:
    """What two gloo processes found, each."""
    return launch_ranks(f"{RANKS}:everything", 2, {"names": NAMES}, device="cpu")


@pytest.mark.parametrize("run", [f"{name} {scheme}" for name in NAMES for scheme in SPLIT])
def test_two_ranks_equal_one_device(run: str, job: list[dict[str, Any]]) -> None:
    """In float64: losses, all gradients and the weights over four steps of 7, 1, 8, 3 images, with dropout; states bit for bit."""
    for rank in job:
        report = rank[run]
        assert max(report["loss"], report["weights"], *report["gradients"]) < EXACT
        assert report["form"] and rank[f"round trips {run.split()[0]}"] == []
    assert job[0][run]["losses"] == job[1][run]["losses"], "the same to the last bit"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("scheme", SPLIT)
def test_where_nothing_is_rounded_two_ranks_are_one_device(
    scheme: Scheme, precision: str, job: list[dict[str, Any]]
) -> None:
    """Every value of this net and of its gradients is an integer that bfloat16 holds, so any difference would be another sum."""
    for rank in job:
        report = rank[f"exact {scheme} {precision}"]
        assert 64 < report["largest"] < 256 and report["zero"] == []
        assert report["different"] == []
        assert report["sent"] == [{"fp32": "torch.float32", "bf16": "torch.bfloat16"}[precision]]


def test_an_overflow_on_one_rank_is_skipped_by_all(job: list[dict[str, Any]]) -> None:
    (finite, *decisions), (other_finite, *other_decisions) = job[0]["overflow"], job[1]["overflow"]
    assert finite[0] is False and other_finite[0] is True
    assert decisions == other_decisions == [[False, False, True], 2, 65536 / 4]


def test_what_else_two_ranks_do(job: list[dict[str, Any]]) -> None:
    for rank in job:
        assert max(rank[f"evaluation {scheme}"] for scheme in SPLIT) < EXACT
        assert "different batches" in rank["refused"]
        assert not rank["compiler"]  # of torch, whose import would take a second in every rank


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        (alexnet, ["conv3", "fc6", "fc7", "fc8", "logits"]),  # section 3.2 and figure 2, and what the loss reads
        (alexnet_6conv, ["conv3", "conv6", "fc6", "fc7", "fc8", "logits"]),  # net #146 (layers-146-2011.cfg)
    ],
    ids=["the paper's", "six convolutions"],
)
def test_towers_exchange_where_the_paper_does(network: Any, layers: list[str]) -> None:
    part = part_of(network(1000, width=0.0625), "towers", World(1, 2, torch.device("cpu"))).network
    assert [module.layer for module in part.modules() if isinstance(module, Gather)] == layers


def test_each_tower_has_the_kernels_of_figure_2() -> None:
    network = part_of(alexnet(1000), "towers", World(1, 2, torch.device("cpu"))).network
    shapes = {name: tuple(weight.shape) for name, weight in network.named_parameters() if name.endswith("weight")}
    convolutions = [(48, 3, 11, 11), (128, 48, 5, 5), (192, 256, 3, 3), (192, 192, 3, 3), (128, 192, 3, 3)]
    assert [shapes[f"conv{n}.weight"] for n in range(1, 6)] == convolutions
    assert [shapes[f"fc{n}.weight"] for n in range(6, 9)] == [(2048, 9216), (2048, 4096), (500, 4096)]
    assert len(shapes) == 8


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


FAULTS = {
    "kill": "rank 1 was killed by SIGKILL",
    "stop": "rank 1 is stopped .SIGSTOP.",
    "hang": r"rank 0 failed \(still running: 1\).*[Tt]imed out",
    "raise": r"(?s)rank 1 failed.*ValueError: a bad day.*rank 1 \| the last words of rank 1",
}


Jobs = dict[str, tuple[Path, Future[list[Any]]]]


@pytest.fixture(scope="module")
def faulty_jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """A job for each fault, all at once since most of the time is waiting: where its ranks left their process ids, and its end."""
    jobs: Jobs = {}
    with ThreadPoolExecutor(len(FAULTS)) as pool:
        for kind in FAULTS:
            folder = tmp_path_factory.mktemp(kind)
            arguments = {"kind": kind, "folder": str(folder)}
            timeout = 60 if kind in ("kill", "raise") else 8  # seconds
            ended = pool.submit(launch_ranks, f"{RANKS}:fault", 2, arguments, device="cpu", timeout=timeout)
            jobs[kind] = folder, ended
    return jobs


@pytest.mark.parametrize("kind", FAULTS)
def test_a_dead_or_stuck_rank_ends_the_job(kind: str, faulty_jobs: Jobs) -> None:
    folder, job = faulty_jobs[kind]
    with pytest.raises(RankFailed, match=FAULTS[kind]):
        job.result()
    assert not any(_lives(int((folder / rank).read_text())) for rank in "01")


def test_words_of_a_rank_for_the_user_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(AlexprepError, match=f"^there is no file {tmp_path}/nowhere.py") as caught:
        launch_ranks(f"{tmp_path}/nowhere.py:function", 1, device="cpu")
    assert not isinstance(caught.value, RankFailed)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_what_kills_the_parent_ends_the_ranks(tmp_path: Path) -> None:
    """No orphans. What a SIGTERM does is in tests/test_launch.py."""
    arguments = {"kind": "none", "folder": str(tmp_path)}
    program = f"from alexprep.train.launch import launch_ranks\nlaunch_ranks({f'{RANKS}:fault'!r}, 1, {arguments!r}, device='cpu')"
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    file = tmp_path / "0"
    try:
        end = time.monotonic() + SECONDS / 2
        while not (file.exists() and file.read_text()):
            assert parent.poll() is None and time.monotonic() < end, "the rank did not begin"
            time.sleep(0.02)
    finally:
        parent.kill()
        parent.wait(timeout=60)
    end = time.monotonic() + 60
    while _lives(int(file.read_text())):
        assert time.monotonic() < end, "the rank outlived its parent"
        time.sleep(0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_gpu() -> None:
    """Alone with NCCL, and shared by two ranks with gloo."""
    (found,) = launch_ranks(f"{RANKS}:alone_with_nccl", 1)
    assert found["backend"] == "nccl"
    assert found["report"]["loss"] < CLOSE and statistics.median(found["report"]["gradients"]) < CLOSE
    _check_on_gpus(launch_ranks(f"{RANKS}:on_gpus", 2, {"names": ["alexnet"]}, device="cuda:0", backend="gloo"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_with_nccl() -> None:
    _check_on_gpus(launch_ranks(f"{RANKS}:on_gpus", 2, {"names": NAMES}))


def _check_on_gpus(job: list[dict[str, Any]]) -> None:
    """As on the CPU; in float32, convolutions of half the kernels may be done by other algorithms."""
    for rank in job:
        for run, report in rank.items():
            close = EXACT if "float64" in run else 1e-4
            assert report["loss"] < close and statistics.median(report["gradients"]) < close, run
