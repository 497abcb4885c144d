"""Ranks that somebody else starts, as on several hosts: each has its own folder of runs, and one its own copy of the data."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import distributed as dist

from alexprep.cli.main import cli
from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.train import signals_and_memory
from alexprep.train.distributed import hosts, world
from alexprep.train.distributed.hosts import Card, Ports, code_digest, refusal

SECONDS = 150  # for each test
HERE = socket.gethostname()
BATCHES = ("--recipe", "tiny", "--device", "cpu", "--batch-size", "13")


@contextlib.contextmanager
def nodes(*words: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """A rank a host, each with its own words after `train`; their store is here, as it is in torchrun's process on the first host."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=SECONDS), False)  # type: ignore[attr-defined]
    job = {"WORLD_SIZE": str(len(words)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    job |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "alexprep.cli", "train", *BATCHES, *each],
            env={**os.environ, **job, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, each in enumerate(words)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate(timeout=SECONDS)
        del store


def ends(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit status, output and messages of each."""
    said = [rank.communicate(timeout=SECONDS) for rank in ranks]
    return [(rank.returncode, out, err) for rank, (out, err) in zip(ranks, said, strict=True)]


def words(data: Path, runs: Path, *more: str) -> list[str]:
    return ["--data", str(data), "--runs", str(runs), *more]


def saved(runs: Path) -> dict[str, torch.Tensor]:
    return load_file(max((runs / "tiny" / "checkpoints").glob("*.safetensors")))


def test_hosts_that_share_nothing_train_to_the_bits_of_one(data: Path, tmp_path: Path) -> None:
    """Begun, and gone on with while the second host has an empty folder of runs; its data are a copy, in another place."""
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    one, first = tmp_path / "one", tmp_path / "first"
    alone = ["train", *BATCHES, *words(data, one, "--gpus", "2", "--scheme", "ddp", "--steps", "6")]
    assert CliRunner().invoke(cli, alone).exit_code == 0
    shared = ("--scheme", "ddp", "--steps", "3")
    with nodes(words(data, first, *shared), words(copy, tmp_path / "second", *shared)) as ranks:
        begun = ends(ranks)
    assert [status for status, _, _ in begun] == [0, 0], begun
    assert begun[0][1].count("its folder") == 1 and not begun[1][1]
    assert not (tmp_path / "second").exists()
    rest = ("--resume", "--steps", "6")
    with nodes(words(data, first, *rest), words(copy, tmp_path / "third", *rest)) as ranks:
        gone_on = ends(ranks)
    assert [status for status, _, _ in gone_on] == [0, 0], gone_on
    assert "2 ranks (ddp)" in gone_on[0][2] and not (tmp_path / "third").exists()
    right, found = saved(one), saved(first)
    assert right.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in right.items())


def test_a_host_that_is_killed_is_named(data: Path, tmp_path: Path) -> None:
    endless = ("--scheme", "ddp", "--epochs", "500", "--name", "tiny")
    with nodes(words(data, tmp_path / "a", *endless), words(data, tmp_path / "b", *endless)) as ranks:
        log, end = tmp_path / "a" / "tiny" / "log.jsonl", time.monotonic() + SECONDS
        while not (log.exists() and log.read_text().count("\n") > 2):
            assert ranks[0].poll() is None and time.monotonic() < end, "it did not begin"
            time.sleep(0.05)
        ranks[1].kill()
        killed = time.monotonic()
        (status, _, said), _ = ends(ranks)
        assert time.monotonic() - killed < 10
    assert status == 1 and f"Error: rank 1 on {HERE} is gone" in said and "bug" not in said


@pytest.mark.parametrize("kind", ["absent", "other"])
def test_a_host_that_sees_no_or_other_data_is_named(kind: str, data: Path, photos: Path, tmp_path: Path) -> None:
    """Everywhere, before there is a run."""
    place = tmp_path / kind
    if kind == "other":
        convert(photos, place, ShardOptions(Target(size=64), shard_samples=7, seed=1), 1)
        rgb_statistics.publish_statistics(rgb_statistics.pca_stats(place, "train", 1), place, "train")
    begin = time.monotonic()
    with nodes(words(data, tmp_path / "a"), words(place, tmp_path / "b")) as ranks:
        ended = ends(ranks)
        assert time.monotonic() - begin < SECONDS / 2
    told = (
        f"Error: rank 1 on {HERE}: {place}" if kind == "absent" else f"Error: rank 1 on {HERE} (data {place}) is not as"
    )
    for status, _, said in ended:
        assert status == 1 and told in said, said
    assert kind == "absent" or all("data_digest" in said for _, _, said in ended)
    assert not (tmp_path / "a").exists()


def told(host: str, **changes: Any) -> dict[str, Any]:
    """What a rank tells of itself."""
    usual = {"host": host, "error": None, "data": f"/{host}", "versions": {"torch": "2", "code": "1"}}
    return usual | {"options": {"steps": 3}, "identity": {"seed": 0, "recipe": {"lr": 0.1}}} | changes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        (
            {"versions": {"torch": "2", "code": "2"}},
            "rank 1 on b .* rank 0 on a .*: code is '2', not '1': install the same",
        ),
        ({"options": {"steps": 4}}, "rank 1 on b .*steps is 4, not 3: start the same command"),
        ({"identity": {"seed": 1, "recipe": {"lr": 0.1}}}, "data /b. .*data /a.: seed is 1, not 0: give every host"),
        ({"identity": {"seed": 0, "recipe": {"lr": 0.2}}}, "recipe.lr is 0.2, not 0.1"),
        ({"error": "there is no /b", "identity": {}}, "^rank 1 on b: there is no /b$"),
        ({"error": "no --x", "options": {"x": 1}}, "rank 1 on b .* x is 1, not None"),
    ],
)
def test_ranks_that_would_not_do_the_same_are_refused(change: dict[str, Any], words: str | None) -> None:
    found = refusal([told("a"), told("b", **change), told("c")])
    assert found is None if words is None else found is not None and re.search(words, found), found


def test_what_is_wrong_on_every_host_is_said_plainly() -> None:
    assert refusal([told("a", error="no GPU", identity={}), told("b", error="no GPU", identity={})]) == "no GPU"


def test_other_code_has_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = code_digest()
    assert right == code_digest()
    (tmp_path / "signals_and_memory.py").write_text("")
    monkeypatch.setattr(signals_and_memory, "__file__", str(tmp_path / "signals_and_memory.py"))
    assert code_digest() != right


def test_a_rank_that_fails_says_why_and_one_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks, of which in the end one lives no more, then two."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=32)) for _ in range(3)]
        cards = [Card(host, own.getsockname()) for host, own in zip("abc", sockets, strict=True)]
        ports = [Ports(rank, own, cards, "token") for rank, own in enumerate(sockets)]
        own, lost = ValueError("a bad day"), RuntimeError("Connection closed by peer")
        with socket.create_connection(cards[0].address) as stranger:
            stranger.sendall(b'["other", 1, "words"]')
        assert ports[1].reason(own) is own
        assert str(ports[0].reason(lost)) == "rank 1 on b: ValueError: a bad day"
        monkeypatch.setattr(hosts, "ANSWER_SECONDS", 0.2)
        assert str(ports[0].reason(lost)).startswith(
            "rank 1 on b; rank 2 on c does not answer: stopped, stuck or cut off (Connection"
        )
        assert str(ports[1].reason(lost)).startswith("rank 1 on b; rank 2 on c does not answer")  # as it has heard
        sockets[2].close()
        assert [port.heard() for port in ports[:2]] == [[(1, None)], []]
        gone = str(ports[1].reason(lost))
        assert gone.startswith("rank 2 on c is gone: killed")
        assert str(ports[0].reason(lost)) == gone
        late = Ports(0, sockets[0], cards, "token")  # of which rank 2 was never reached, by a firewall say
        sockets[1].close()
        assert str(late.reason(lost)).startswith("rank 1 on b is gone")
        assert str(ports[0].reason(lost)).startswith("rank 1 on b; rank 2 on c is gone")


def test_what_a_rank_raises_itself_keeps_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    cause = KeyError("the cause")
    with pytest.raises(ValueError) as found, hosts.failures_shared(world.World.alone("cpu")):
        raise ValueError("what came of it") from cause
    assert found.value.__cause__ is cause


def test_a_rank_that_cannot_take_part_or_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before there are groups: the store alone is there."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=SECONDS), False)  # type: ignore[attr-defined]
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**there, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(world, "START", timedelta(seconds=0.2))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(AlexprepError, match=r"^rank 1 of 2 did not come within 0:00:00.2"):
        world.from_environment("cpu")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(AlexprepError, match=r"^backend nccl does not go with cpu"):
        world.from_environment("cpu", "nccl")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(AlexprepError, match=f"^rank 1 on {HERE}: backend nccl does not go with cpu"):
        world.from_environment("cpu")
    assert not dist.is_initialized()
    del store


def test_where_a_rank_listens() -> None:
    """On the loopback where all are on one machine. The first host's own name may be one of the loopback there, and not elsewhere."""
    assert hosts._own_address("127.0.0.1") is hosts._own_address("localhost") is None
    assert hosts._listening_at(None, [None, None]) == "localhost"
    assert hosts._listening_at(None, [None, "10.0.0.2"]) == ""
    assert hosts._listening_at("10.0.0.2", [None, "10.0.0.2"]) == "10.0.0.2"
