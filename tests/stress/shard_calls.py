"""A fault at every file-system call: SIGKILL on its entry, or an error in its place. By strace, so that no call is missed."""

from __future__ import annotations

import collections
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults_common import (
    DEADLINE,
    SMALL,
    build_here,
    command,
    ended,
    fingerprint,
    finish,
    forked,
    kill_group,
    said,
    small_set,
    start,
    until,
    warm,
    wrong,
)

# What changes a file system or makes it last; openat counts where it makes a file.
CALLS = "openat,write,writev,pwrite64,ftruncate,fallocate,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink"
CALLS += ",unlinkat,mkdir,mkdirat,rmdir,symlink,flock"
Point = tuple[str, int]  # a call, and the how manieth of its kind in the process


def syscalls(work: Path, rng: random.Random, sample: int) -> dict[str, Any]:
    """Kills one process at each call; then the whole command, and its worker alone, at a sample of the calls."""
    source, out = small_set(work / "source"), work / "out"
    reference, points = enumerated(source, work)
    counts: collections.Counter[str] = collections.Counter()
    for number, (call, when) in enumerate(points):
        status = traced(lambda: build_here(source, out), work, killing(call, when))
        counts["reached"] += status == -9
        counts["partial files under a final name"] += len(wrong(out, reference))
        if number % 2:  # compound: the run that goes on is killed too
            other = rng.choice(points[: max(1, len(points) // 2)])
            counts["kills in the run that went on"] += (
                traced(lambda: build_here(source, out), work, killing(*other)) == -9
            )
            counts["partial files under a final name"] += len(wrong(out, reference))
        counts["equal"] += goes_on(source, out, reference)
    whole = whole_command(source, work, rng, sample, reference)
    return {
        "kill points: calls that change files under the folder, one process": len(points),
        "by call": dict(collections.Counter(call for call, _ in points)),
        "killed there": counts["reached"],
        "kills in the run that went on": counts["kills in the run that went on"],
        "partial files under a final name": counts["partial files under a final name"],
        "reruns equal in every file": counts["equal"],
        **whole,
    }


def whole_command(
    source: Path, work: Path, rng: random.Random, sample: int, reference: dict[str, str]
) -> dict[str, Any]:
    """Kills `alexprep shard` at calls of any of its processes: the group, and then the process alone that made the call."""
    out, log = work / "out", work / "strace.log"
    subprocess.run(strace(log, [], command(source, out, *SMALL)), check=True, capture_output=True, timeout=DEADLINE)
    points = [point for found in changing(log, out).values() for point in found]
    assert fingerprint(out) == reference
    shutil.rmtree(out)
    counts: collections.Counter[str] = collections.Counter()
    for number, (call, when) in enumerate(rng.sample(points, min(sample, len(points)))):
        log.unlink(missing_ok=True)
        process = start(strace(log, killing(call, when), command(source, out, *SMALL)))
        if number % 4:
            struck = until(lambda: "killed by SIGKILL" in text(log) or process.poll() is not None)  # noqa: B023
            kill_group(process)
            counts["group"] += struck and "killed by SIGKILL" in text(log)
        else:  # strace kills each new process at its own N-th call, so this may end with a refusal, but not with a loss
            status, words = finish(process)
            counts["alone"] += "killed by SIGKILL" in text(log)
            counts["alone, recovered by itself"] += status == 0
            counts["alone, ended with words"] += status == 1 and words.startswith("Error: ")
        counts["partial"] += len(wrong(out, reference))
        status, _ = finish(start(command(source, out, *SMALL)))
        counts["equal"] += status == 0 and fingerprint(out) == reference
        shutil.rmtree(out, ignore_errors=True)
    return {
        "command: calls of its processes": len(points),
        "command: sampled": number + 1,
        "command: group killed there": counts["group"],
        "command: process killed there alone": counts["alone"],
        "command: of these recovered by itself": counts["alone, recovered by itself"],
        "command: of these ended with one line": counts["alone, ended with words"],
        "command: partial files under a final name": counts["partial"],
        "command: reruns equal in every file": counts["equal"],
    }


def errors(work: Path, rng: random.Random, sample: int) -> dict[str, Any]:
    """Each call fails, alone or with all later calls that change files; `sample` of them also in the whole command."""
    source, out = small_set(work / "source", 16), work / "out"
    reference, points = enumerated(source, work)
    counts: collections.Counter[str] = collections.Counter()
    odd: list[str] = []
    for error in ("ENOSPC", "EIO", "EDQUOT", "EINTR"):
        for forever in (False, True):
            for number, (call, _) in enumerate(points):
                if error == "EINTR" and call not in ("write", "openat"):
                    continue  # the others are not interrupted on a local disk
                for shift in (0, 1, -1, 2, -2, 3, -3, 4, -4):  # libraries open a few files more or fewer each time
                    rules = failing(points, number, error, forever, shift if call == "openat" else 0)
                    status = traced(lambda: build_here(source, out), work, rules)
                    words = said()
                    bad, equal = wrong(out, reference), goes_on(source, out, reference)
                    if met := bool(re.search(rf"{call}\(.*{out}.*\(INJECTED\)", text(work / "strace.log"))):
                        break
                counts["missed"] += not met
                if not met:
                    continue
                counts["faults"] += 1
                counts["partial"] += len(bad)
                counts["equal"] += equal
                counts[f"status {status}"] += 1
                if call in ("fsync", "write", "rename", "link") and error != "EINTR":
                    counts["must fail"] += 1
                    counts["ignored"] += status == 0
                clear = status == 0 or (status in (1, 2) and str(work) in words)
                counts["clear"] += clear
                if bad or not equal or not clear:
                    odd.append(f"{call} {number} {error} {forever}: {status} {words} {bad} {equal}")
    for line in odd[:20]:
        print(line)
    return {
        "calls": len(points),
        "faults: ENOSPC, EIO, EDQUOT, EINTR, once and for ever": counts["faults"],
        "faults that met no such call": counts["missed"],
        "ended with words that name the file": counts["clear"] - counts["status 0"],
        "survived": counts["status 0"],
        "neither": counts["faults"] - counts["clear"],
        "failed write, fsync, rename, link": counts["must fail"],
        "of these ignored": counts["ignored"],
        "partial files under a final name": counts["partial"],
        "reruns equal in every file": counts["equal"],
    }


def enumerated(source: Path, work: Path) -> tuple[dict[str, str], list[Point]]:
    """What an undisturbed run makes, and its calls."""
    out = work / "out"
    warm(source, out)
    assert ended(forked(lambda: build_here(source, out))) == 0, said()
    reference = fingerprint(out)
    shutil.rmtree(out)
    assert traced(lambda: build_here(source, out), work, []) == 0, said()
    assert fingerprint(out) == reference
    shutil.rmtree(out)
    (points,) = changing(work / "strace.log", out).values()  # one process, one thread
    return reference, points


def goes_on(source: Path, out: Path, reference: dict[str, str]) -> bool:
    """Whether the same run again ends with the undisturbed run's files and no others. Clears the folder."""
    equal = ended(forked(lambda: build_here(source, out))) == 0 and fingerprint(out) == reference
    shutil.rmtree(out)
    said()
    return equal


def changing(log: Path, out: Path) -> dict[str, list[Point]]:
    """The calls in a log that change files under `out`, by process."""
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    points: dict[str, list[Point]] = {}
    for line in text(log).splitlines():
        found = re.match(r"(\d+) +(\w+)\((.*)", line)
        if not found:
            continue
        process, call, rest = found.groups()
        seen[process, call] += 1
        if str(out) in rest and (call != "openat" or "O_CREAT" in rest):
            points.setdefault(process, []).append((call, seen[process, call]))
    return points


def killing(call: str, when: int) -> list[str]:
    """strace's words for a SIGKILL on entry of a call, which is then not made."""
    return ["-e", f"inject={call}:signal=SIGKILL:when={when}"]


def failing(points: list[Point], number: int, error: str, forever: bool, shift: int = 0) -> list[str]:
    """strace's words for a point that fails; `forever`: with all from there on (EINTR: with two more of its kind)."""
    call, when = points[number][0], points[number][1] + shift
    if not forever:
        return ["-e", f"inject={call}:error={error}:when={when}"]
    if error == "EINTR":
        return ["-e", f"inject={call}:error={error}:when={when}..{when + 2}"]
    first = {call: when}
    for name, at in points[number:]:
        if name != "openat":  # an open that fails is also one of an input or of a library
            first.setdefault(name, at)
    rules = []
    for name, at in first.items():
        only = "" if name == "openat" else "+"
        rules += ["-e", f"inject={name}:error={error}:when={at}{only}"]
    return rules


def strace(log: Path, rules: list[str], words: list[str]) -> list[str]:
    """A command under strace."""
    return ["strace", "-f", "-qq", "-y", "-o", str(log), "--seccomp-bpf", "-e", f"trace={CALLS}", *rules, *words]


def traced(work: Callable[[], None], folder: Path, rules: list[str]) -> int:
    """The exit status of `work` in a child under strace, whose log is `folder`/strace.log."""
    log = folder / "strace.log"
    log.unlink(missing_ok=True)
    gate, opener = os.pipe()

    def waiting() -> None:
        os.read(gate, 1)
        work()

    child = forked(waiting)
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-y", "-o", str(log), "-e", f"trace={CALLS}", *rules, "-p", str(child)]
    )
    attached = until(lambda: "TracerPid:\t0" not in Path(f"/proc/{child}/status").read_text(), 10)
    time.sleep(0.002)
    os.write(opener, b"x")
    status = ended(child)
    tracer.wait(DEADLINE)
    os.close(gate)
    os.close(opener)
    assert attached and tracer.returncode in (0, -9, 1), f"strace ended with {tracer.returncode}"
    return status


def text(path: Path) -> str:
    """A file's text; nothing where there is none yet."""
    return path.read_text(errors="replace") if path.exists() else ""
