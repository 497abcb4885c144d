"""Starts the processes of a training, watches them, and ends them all where one dies or hangs, with its reason.

`launch_training` is what `alexprep train` calls: it trains in this process, in ranks that it starts, or as one of torchrun's.
`launch_ranks` runs any function in ranks on this machine. What a rank sees of the others is in `alexprep.train.distributed.world`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from alexprep.pipeline.device import choose_device
from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import folder_at
from alexprep.shards.worker_pool import cores
from alexprep.train.config import TrainConfig, prepare
from alexprep.train.distributed.hosts import failures_shared
from alexprep.train.distributed.world import STORE, TIMEOUT, World, from_environment, started_elsewhere
from alexprep.train.signals_and_memory import StopRequest
from alexprep.train.trainer import train
from alexprep.train.user_code import load

PARENT = "ALEXPREP_PARENT"  # process id of the launcher
PR_SET_PDEATHSIG = 1  # sys/prctl.h
POLL_SECONDS = 0.05  # seconds between looks at the ranks
GRACE_SECONDS = 0.3  # after a failure, for others that fell at the same moment
LAST_LINES = 15  # of a failed rank's output, in the reason


class RankFailed(AlexprepError):
    """A rank died or stopped answering; the others were ended. The message says which, and why."""


def launch_training(config: TrainConfig) -> dict[str, Any]:
    """Trains in this process, in `config.ranks` processes of this machine, or as one of torchrun's ranks.

    Returns:
        The summary, see `alexprep.train.trainer.train`.

    Raises:
        AlexprepError: see there; or a rank died or did not answer, which ends the others.
    """
    if started_elsewhere():
        if config.ranks not in (1, size := int(os.environ["WORLD_SIZE"])):
            raise AlexprepError(
                f"--gpus {config.ranks}, but torchrun started {size} ranks: leave --gpus out, torchrun's own options say how many"
            )
        return _train_as_rank(config)
    if config.ranks == 1:
        return train(config)
    _check_gpus(config)
    # This process makes the run, and the ranks go on with it: so none of them has to tell the others its name.
    job = prepare(config)
    going_on = replace(
        job.config,
        data=job.data.resolve(),
        runs=config.runs.resolve(),
        name=job.run.name,
        resume=True,
        scheme=job.scheme,
    )
    places = {"data": str(going_on.data), "runs": str(going_on.runs)}
    summary: dict[str, Any] = launch_ranks(
        "alexprep.train.launch:train_rank",
        config.ranks,
        {"options": asdict(going_on) | places},
        device=config.device,
        timeout=going_on.rank_wait,
    )[0]
    return summary


def leads() -> bool:
    """Tells whether it is for this process to print the result: of torchrun's ranks only the first does."""
    return not started_elsewhere() or os.environ.get("RANK") == "0"


def train_rank(world: World, options: Mapping[str, Any]) -> dict[str, Any]:
    """Trains as one of the ranks that `launch_training` started; `options` are a `TrainConfig`'s as JSON values."""
    paths = {"data": folder_at(options["data"]), "runs": folder_at(options["runs"])}
    return train(TrainConfig(**{**options, **paths}), world=world)


def _train_as_rank(config: TrainConfig) -> dict[str, Any]:
    """torchrun's way: one of ranks that somebody else started, on one host or several."""
    world = from_environment(config.device, timeout=config.rank_wait)
    try:
        with failures_shared(world):
            summary = train(replace(config, ranks=world.size), world=world)
    except Exception:
        atexit.register(_leave, 1)  # when the reason has been said
        raise
    world.close()  # only after a good end: else others may still wait in the groups, and closing would wait with them
    return summary


def _check_gpus(config: TrainConfig) -> None:
    """Makes sure, before the run has a folder, that each rank on this machine gets a GPU of its own."""
    device = choose_device(config.device)
    if device.type != "cuda":
        return
    if device.index is not None:
        raise AlexprepError(f"{config.ranks} ranks cannot share {device}: name just cuda, for a GPU each")
    if config.ranks > torch.cuda.device_count():
        raise AlexprepError(
            f"{config.ranks} ranks need a GPU each, torch sees {torch.cuda.device_count()} here: start fewer, or take --device cpu"
        )


def launch_ranks(
    target: str,
    ranks: int,
    arguments: Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    backend: str | None = None,
    timeout: float = TIMEOUT,
) -> list[Any]:
    """Calls a function in `ranks` fresh processes of this machine, and waits for them.

    Rank 0 has this process's output; what others print is kept for the reason of a failure. SIGTERM, SIGHUP and Ctrl-C go to every rank once,
    so that they can save and leave; a second one ends them and has its usual effect here. Ranks end when this process does.

    Args:
        target: "module:function" or "/path/file.py:function"; called as function(world, **arguments).
        ranks: at least 1.
        arguments: JSON values.
        device: of every rank, see `from_environment`: a GPU each, where there are any.
        backend: "nccl", "gloo" or None.
        timeout: seconds that ranks wait for one another: no step, evaluation's step or checkpoint may take one rank longer.

    Returns:
        What each rank's function returned, by rank: JSON values.

    Raises:
        AlexprepError: a rank raised it: the same words.
        RankFailed: a rank raised something else, was killed, or did not answer.
    """
    joining = {"device": device, "backend": backend, "timeout": timeout}
    job = {"target": target, "arguments": dict(arguments or {}), "joining": joining, "path": sys.path}
    with tempfile.TemporaryDirectory(prefix="alexprep-job-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job))
        store, port = _store(timeout)
        processes: list[subprocess.Popen[bytes]] = []

        def hand_on(number: int) -> None:
            for process in processes:
                process.send_signal(number)

        try:
            with StopRequest(hand_on).listening() as stop:
                for rank in range(ranks):
                    processes.append(_start(folder, rank, ranks, port))
                _watch(processes, folder, timeout, stop)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
            del store
        return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(ranks)]


def _store(timeout: float) -> tuple[Any, int]:
    """Where the ranks find one another: in this process, which outlives any rank, on a free port that only this machine can reach."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    host, port = listener.getsockname()
    limit = timedelta(seconds=timeout)
    store = dist.TCPStore(host, port, None, True, limit, False, master_listen_fd=listener.detach())  # type: ignore[attr-defined]
    return store, port


def _start(folder: Path, rank: int, ranks: int, port: int) -> subprocess.Popen[bytes]:
    """One rank, in a session of its own: a Ctrl-C of the terminal reaches it through this process alone."""
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores() // ranks)),  # torch's; all of the machine's for each would be slower
        **({"GLOO_SOCKET_IFNAME": "lo"} if "lo" in {name for _, name in socket.if_nameindex()} else {}),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        STORE: "1",
        PARENT: str(os.getpid()),
    }
    with contextlib.nullcontext() if rank == 0 else (folder / f"output-{rank}").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "alexprep.train.launch", str(folder)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
        )


def _watch(processes: list[subprocess.Popen[bytes]], folder: Path, timeout: float, stop: StopRequest) -> None:
    """Returns when every rank has ended well; raises the reason why one has not."""
    stopped_since: dict[int, float] = {}
    first_end: float | None = None
    while True:
        codes = [process.poll() for process in processes]
        if any(codes):
            time.sleep(GRACE_SECONDS)
            stop.check([process.poll() for process in processes])
            raise _reason(processes, folder, timeout)
        if all(code == 0 for code in codes):
            return
        now = time.monotonic()
        running = [rank for rank, code in enumerate(codes) if code is None]
        if len(running) < len(codes):
            first_end = first_end or now
            if now - first_end > timeout:
                raise RankFailed(f"rank {running[0]} still runs {timeout:g} s after others had ended")
        for rank in running:
            if not _is_stopped(processes[rank]):
                stopped_since.pop(rank, None)
            elif now - stopped_since.setdefault(rank, now) > timeout:
                raise _stopped(rank, timeout)
        time.sleep(POLL_SECONDS)


def _reason(processes: list[subprocess.Popen[bytes]], folder: Path, timeout: float) -> AlexprepError:
    """Why the job failed: a rank that is stopped, else one killed by a signal, else the first that raised.

    In this order, since NCCL's watchdog kills the ranks that waited for a stopped one.
    """
    codes = [process.poll() for process in processes]
    told: dict[int, dict[str, Any]] = {}
    for rank in range(len(codes)):
        with contextlib.suppress(FileNotFoundError, ValueError):  # it may be cut off by a full disk
            told[rank] = json.loads((folder / f"failure-{rank}.json").read_text())
    silent = [rank for rank, code in enumerate(codes) if code and rank not in told]
    stopped = [rank for rank, code in enumerate(codes) if code is None and _is_stopped(processes[rank])]
    if stopped:
        return _stopped(stopped[0], timeout)
    if silent:
        code = codes[silent[0]] or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return RankFailed(f"rank {silent[0]} {how}{_output(folder, silent[0])}")
    rank = min(told, key=lambda number: float(told[number]["time"]))
    kind, message = told[rank]["kind"], told[rank]["message"]
    if kind == AlexprepError.__name__:
        return AlexprepError(message)
    waiting = [other for other, code in enumerate(codes) if code is None]
    others = f" (still running: {', '.join(map(str, waiting))})" if waiting else ""
    return RankFailed(f"rank {rank} failed{others}: {kind}: {message}{_output(folder, rank)}")


def _stopped(rank: int, timeout: float) -> RankFailed:
    return RankFailed(f"rank {rank} is stopped (SIGSTOP) and did not answer for {timeout:g} s")


def _output(folder: Path, rank: int) -> str:
    """The last lines that a rank printed; rank 0's are on the terminal."""
    file = folder / f"output-{rank}"
    if not file.exists():
        return ""
    lines = file.read_bytes()[-10_000:].decode(errors="replace").splitlines()[-LAST_LINES:]
    return "".join(f"\n  rank {rank} | {line}" for line in lines)


def _is_stopped(process: subprocess.Popen[bytes]) -> bool:
    """Whether a SIGSTOP holds a process, by Linux's /proc; elsewhere nobody is known to be stopped."""
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False


def run_rank() -> None:
    """Is one rank that `launch_ranks` started: joins the job, calls the function, leaves its result or its reason for the parent."""
    _die_with_parent()
    faulthandler.enable()
    folder = Path(sys.argv[1])
    rank = os.environ["RANK"]
    try:
        job = json.loads((folder / "job.json").read_text())
        sys.path[:] = job["path"]
        function = load(job["target"], "target")[0]
        world = from_environment(**job["joining"])
        result = function(world, **job["arguments"])
        (folder / f"result-{rank}.json").write_text(json.dumps(result))
        world.close()
        _leave(0)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)  # so that the parent sees what ended it
    except BaseException as error:  # noqa: BLE001 also SystemExit: a rank that leaves early is a failure
        kind = AlexprepError if isinstance(error, AlexprepError) else type(error)
        if kind is not AlexprepError:
            traceback.print_exc()
        reason = {
            "time": time.time(),
            "kind": kind.__name__,
            "message": error.as_made if isinstance(error, AlexprepError) else str(error),
        }
        try:
            (folder / f"failure-{rank}.json").write_text(json.dumps(reason))
        except OSError:  # the disk that it failed for may be this one too
            print(f"Error in rank {rank}: {error}", file=sys.stderr)  # noqa: T201
        _leave(1)


def _die_with_parent() -> None:
    """The kernel kills this process when the launcher ends, however it ends."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[PARENT]):
        os._exit(1)  # it ended before that


def _leave(code: int) -> None:
    """Ends the process, but not by way of destructors: they may wait for ranks that are gone, and gloo's now and then abort."""
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    run_rank()
