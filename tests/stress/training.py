"""Harm to the processes of a training from outside and from inside, again and again."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import faults_training_job
from faults_training_field import EVERY, TIMEOUT, Field, ranks_of, send

from alexprep.shards.storage import is_temporary

STEPS = 66  # six epochs
Figures = dict[str, Any]
Rows = list[
    list[Any]
]  # of each round: what, when or where, exit status, seconds until all processes were gone, steps lost


def kills(work: Path, rng: random.Random, rounds: int) -> Figures:
    """SIGKILL, again and again, also to runs that go on after one."""
    field = Field(work, rng, STEPS)
    kinds: Counter[str] = Counter()
    rows: Rows = []
    while len(rows) < rounds:
        process = field.start()
        target, moment = rng.choice(["rank 0", "rank 1", "both", "command"]), rng.choice(["start", "step", "save"])
        if not field.wait_for(process, moment):
            assert field.finished(field.end(process, {}, time.monotonic())), (work / "said").read_text()
            continue
        ranks = ranks_of(process.pid)
        wanted = {"rank 0": [0], "rank 1": [1], "both": [0, 1], "command": []}[target]
        if not set(wanted) <= ranks.keys():
            target, wanted = "command", []
        in_save = any(map(is_temporary, field.files()))
        since = time.monotonic()
        for pid in [ranks[rank] for rank in wanted] or [process.pid]:
            send(pid, signal.SIGKILL)
        end = field.end(process, ranks, since)
        field.counts["not told"] += target != "command" and "was killed by SIGKILL" not in end.words
        kinds.update([f"of {target}", f"at {moment}"] + ["with a file being written"] * in_save)
        rows.append([target, moment, end.status, round(end.seconds, 2), end.lost])
        print(*rows[-1], flush=True)
    field.finish()
    return {
        "kills": len(rows),
        **dict(sorted(kinds.items())),
        "seconds until all processes were gone, at most": max(row[3] for row in rows),
        "steps lost, at most": max(row[4] for row in rows),
        "steps between checkpoints": EVERY,
        "ranks killed without the command saying so": field.counts["not told"],
        **common_figures(field, rows),
    }


def culprits(work: Path, rng: random.Random, rounds: int) -> Figures:
    """A rank comes to harm by itself; `rounds` times each kind."""
    words = {
        "SIGSTOP": "is stopped (SIGSTOP)",
        "a loader that hangs": "still running: ",
        "an exception": "ValueError: a bad day",
        "sys.exit": "SystemExit: 3",
        "os._exit": "ended with exit status 3",
        "no more memory (RLIMIT_AS)": "memory",
        "killed for memory (cgroup)": "was killed by SIGKILL",
    }
    waiting = ("SIGSTOP", "a loader that hangs")
    field = Field(work, rng, STEPS)
    rows: Rows = []
    kinds = [kind for kind in words if "cgroup" not in kind or faults_training_job.CGROUP.exists()]
    todo = kinds * rounds
    rng.shuffle(todo)
    while todo:
        kind, note = todo[-1], work / "note"
        note.unlink(missing_ok=True)
        fault = {"kind": kind, "rank": rng.randrange(2), "step": field.saved() + rng.randint(1, 8), "note": str(note)}
        process = field.start(**fault)
        end = field.end(process, field.ranks_once_there(process), time.monotonic())
        for group in faults_training_job.CGROUP.glob("alexprep-faults-*"):
            group.rmdir()
        if field.finished(end):
            continue
        todo.pop()
        seconds = time.time() - float(note.read_text())
        field.counts["not told"] += words[kind] not in end.words
        field.counts["late"] += seconds > 10 + TIMEOUT * (kind in waiting)
        rows.append([kind, fault["rank"], end.status, round(seconds, 2), end.lost])
        print(*rows[-1], flush=True)
        if words[kind] not in end.words:
            print(end.words, flush=True)
    field.finish()
    slowest = {kind: max(row[3] for row in rows if row[0] == kind) for kind in kinds}
    return {
        "faults": len(rows),
        "of each kind": rounds,
        "seconds that ranks wait for one another": TIMEOUT,
        "seconds from fault to end, at most": slowest,
        "later than 10 s, and the wait where ranks must wait": field.counts["late"],
        "ended without a reason that names it": field.counts["not told"],
        **common_figures(field, rows),
    }


def signals(work: Path, rng: random.Random, rounds: int) -> Figures:
    """SIGTERM and SIGINT to the command alone, as a scheduler and a terminal send them."""
    field = Field(work, rng, STEPS)
    rows: Rows = []
    kinds: Counter[str] = Counter()
    while len(rows) < rounds:
        process = field.start()
        number, twice = rng.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT]), rng.random() < 0.2
        moment = rng.choice(["start", "step", "step", "save"])
        if not field.wait_for(process, moment):
            assert field.finished(field.end(process, {}, time.monotonic())), (work / "said").read_text()
            continue
        ranks, since = ranks_of(process.pid), time.monotonic()
        send(process.pid, number)
        if twice:
            time.sleep(rng.uniform(0, 0.2))
            send(process.pid, number)
        end = field.end(process, ranks, since)
        if end.status == 0:  # it came behind the last step
            field.finished(end)
            continue
        kind = f"{number.name}{' twice' if twice else ''}"
        kinds.update([kind, f"at {moment}"])
        field.counts["late"] += end.seconds > 10
        field.counts["lost by one signal"] += 0 if twice else end.lost
        field.counts["status"] += end.status not in (128 + number, -number)
        rows.append([kind, moment, end.status, round(end.seconds, 2), end.lost])
        print(*rows[-1], flush=True)
    field.finish()
    return {
        "stops": len(rows),
        **dict(sorted(kinds.items())),
        "seconds until all processes were gone, at most": max(row[3] for row in rows),
        "later than 10 s": field.counts["late"],
        "steps lost by one signal, in all": field.counts["lost by one signal"],
        "steps lost by two, at most": max((row[4] for row in rows if "twice" in row[0]), default=0),
        "exit status that is not the signal's": field.counts["status"],
        **common_figures(field, rows),
    }


def common_figures(field: Field, rows: Rows) -> Figures:
    """What every mode counts."""
    return {
        "hung": field.counts["hung"],
        "ranks that outlived the command": field.counts["orphans"],
        "damaged checkpoints": field.counts["damaged checkpoints"],
        "runs": field.counts["runs"] - 1,
        "equal in final weights and in every loss": field.counts["equal"],
        **({"each: what, when or where, exit status, seconds, steps lost": rows} if rows else {}),
    }
