"""Trainings of two ranks, one after another, each harmed until it is done, and held against one that nobody harmed.

What harms them is in tests/stress/training.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.storage import is_temporary
from alexprep.train import checkpoint, run_dir
from alexprep.train.launch import PARENT
from tests.stress.campaign import DEADLINE_SECONDS, OPTIONS, Campaign, draw_pictures, until

JOB = str(Path(__file__).with_name("training_job.py"))
IMAGES, BATCH = 120, 8  # 90 of them for training, less two that cannot be read: 11 steps an epoch
EVERY = 4  # steps between checkpoints
STEPS = 66  # six epochs
RANK_SECONDS = 20.0  # that ranks wait for one another, where a fault makes them wait
Curve = list[dict[str, Any]]


class End(NamedTuple):
    """How a process ended."""

    status: int
    words: str  # its last ones
    lost: int  # steps that were logged and are in no checkpoint


class Runs:
    """Runs with the same options, one after another.

    Attributes:
        started: the seconds until the first step of the runs that nobody harmed, by their folders.
        run: the folder of the present run.
        options: of `TrainConfig`, the same for all runs.
        reference: what the run that nobody harmed came to.
        most_lost: steps that a fault cost, at most.
    """

    started: ClassVar[dict[Path, float]] = {}

    def __init__(self, campaign: Campaign, steps: int = STEPS, **options: Any) -> None:
        """The data set and the run that is not harmed are made by the first campaign that needs them; `options` are of `TrainConfig`."""
        self.campaign, self.work, self.rng = campaign, campaign.work, campaign.rng
        self.most_lost, self._before = 0, b""
        place = campaign.work.parent / f"unharmed-{steps}-{options.get('checkpoint_steps', EVERY)}"
        self.options: dict[str, Any] = {"data": str(place / "data"), "recipe": "tiny", "batch_size": BATCH}
        self.options |= {"steps": steps, "epochs": steps, "log_steps": 1, "checkpoint_steps": EVERY, "ranks": 2}
        self.options |= {"device": "cpu", "threads": 1, **options}
        self.run = self.whole = place / "runs" / "whole"
        self.options["runs"] = str(self.whole.parent)
        if not place.exists():
            self.started[place] = self._unharmed(place)
        self.start_seconds, self.reference = self.started[place], self.result()
        self.run = self.work / "runs" / "run-0"

    def _unharmed(self, place: Path) -> float:
        """Makes the data set and the run; returns the seconds until its first step."""
        data = place / "data"
        convert(draw_pictures(place / "source", IMAGES), data, OPTIONS, 1)
        rgb_statistics.publish_statistics(rgb_statistics.pca_stats(data, "train", 1), data, "train")
        began = time.monotonic()
        process = self.start()
        assert until(lambda: self.logged() or process.poll() is not None)
        seconds = time.monotonic() - began
        end = self.end(process, {})
        assert end.status == 0, end.words
        return seconds

    def _next_run(self) -> None:
        """A new one, with a number of its own."""
        self.run = self.work / "runs" / f"run-{len(list(self.run.parent.iterdir()))}"

    def start(self, **fault: Any) -> subprocess.Popen[bytes]:
        """The present run begins, or goes on, in a session of its own."""
        begun = (self.run / run_dir.CONFIG).exists()
        self._before = self._log()
        job: dict[str, Any] = {"options": {**self.options, "runs": str(self.run.parent), "name": self.run.name}}
        job["options"]["resume"] = begun
        if fault:
            job["fault"] = fault
            job["options"]["rank_seconds"] = RANK_SECONDS
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.work)}
        with open(self.work / "said", "wb") as said:
            return subprocess.Popen(
                [sys.executable, JOB, json.dumps(job)],
                stdout=subprocess.DEVNULL,
                stderr=said,
                env=environment,
                start_new_session=True,
            )

    def end(self, process: subprocess.Popen[bytes], ranks: dict[int, int]) -> End:
        """Waits until the command and its ranks are gone; counts those that outlive it, and what is left on disk."""
        try:
            status = process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            self.campaign.broken.append("hung")
            ranks |= ranks_of(process.pid)
            process.kill()
            status = process.wait()
        gone = until(lambda: not any(lives(pid) for pid in ranks.values()))
        self.campaign.promise(gone, "times that no rank outlived the command", ranks)
        saved, damage = checkpoint.newest(self.run / run_dir.CHECKPOINTS)
        self.campaign.promise(not damage, "times that no checkpoint was damaged", damage)
        moved = self._log() != self._before  # else what the log holds is of an earlier round
        lost = self.logged() - (saved.step if saved else 0) if moved else 0
        self.most_lost = max(self.most_lost, lost)
        words = (self.work / "said").read_text(errors="replace").strip().splitlines()
        return End(status, "\n".join(words[-20:]), lost)

    def finished(self, end: End) -> bool:
        """Whether the run is done; then it is compared, and the next one begins."""
        if end.status != 0:
            return False
        self.campaign.promise(self.result() == self.reference, "runs equal in weights and every loss", self.run)
        self._next_run()
        return True

    def finish(self) -> None:
        """The present run goes on to its end, unharmed."""
        done = self.finished(self.end(self.start(), {}))
        self.campaign.promise(done, "unharmed runs that ended", (self.work / "said").read_text() if not done else "")

    def result(self) -> tuple[str, Curve]:
        """Digest of the final weights, and the losses and errors of all steps and epochs."""
        return json.loads((self.run / run_dir.SUMMARY).read_text())["weights_sha256"], curve(self.run)

    def wait_for(self, process: subprocess.Popen[bytes], moment: str) -> bool:
        """Waits for a random moment of a kind: "start", "step" or "save"; False where the process ended before."""
        if moment == "start":
            time.sleep(self.rng.uniform(0, self.start_seconds))
            return process.poll() is None
        until(lambda: self._log() != self._before or process.poll() is not None)
        if moment == "save":
            for _ in range(self.rng.randint(1, 3)):
                until(lambda: not any(map(is_temporary, self.files())) or process.poll() is not None)
                until(lambda: any(map(is_temporary, self.files())) or process.poll() is not None)
            time.sleep(self.rng.uniform(0, 0.003))
        else:
            goal = self._log().count(b"\n") + self.rng.randint(0, 10)
            until(lambda: self._log().count(b"\n") >= goal or process.poll() is not None)
            time.sleep(self.rng.uniform(0, 0.1))
        return process.poll() is None

    def ranks_once_there(self, process: subprocess.Popen[bytes]) -> dict[int, int]:
        """The process ids of both ranks, by rank; of fewer where the command ends before."""
        found: dict[int, int] = {}
        while process.poll() is None and len(found) < self.options["ranks"]:
            found = ranks_of(process.pid)
            time.sleep(0.05)
        return found

    def files(self) -> list[str]:
        """Names in the folder of checkpoints."""
        with contextlib.suppress(FileNotFoundError):
            return os.listdir(self.run / run_dir.CHECKPOINTS)
        return []

    def logged(self) -> int:
        """The last step in the log."""
        found = re.findall(rb'"kind": "steps", "step": (\d+)', self._log())
        return int(found[-1]) if found else 0

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        saved, _ = checkpoint.newest(self.run / run_dir.CHECKPOINTS)
        return saved.step if saved else 0

    def _log(self) -> bytes:
        with contextlib.suppress(FileNotFoundError):
            return (self.run / run_dir.LOG).read_bytes()
        return b""


def curve(run: Path) -> Curve:
    """The records of a log without times."""
    records = [json.loads(line) for line in (run / run_dir.LOG).read_text().splitlines()]
    kept = ("kind", "step", "epoch", "loss", "top1_error", "top5_error", "lr", "val")
    return [{name: record[name] for name in kept if name in record} for record in records]


def ranks_of(parent: int) -> dict[int, int]:
    """The process ids of a command's ranks, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pairs = (folder / "environ").read_bytes().split(b"\0")
            environment = dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)
            if environment.get(PARENT.encode()) == str(parent).encode():
                found[int(environment[b"RANK"])] = int(folder.name)
    return found


def lives(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def send(pid: int, number: signal.Signals) -> None:
    """A signal, to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
