"""A fault at every file-system call of a run that makes shards: SIGKILL on its entry, or an error in its place.

strace makes them, so that no call is missed. tests/stress/file_system_faults.py does the same in Python, for the suite.
"""

from __future__ import annotations

import collections
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.stress.campaign import (
    DEADLINE_SECONDS,
    SMALL,
    Campaign,
    Fingerprint,
    command,
    convert_here,
    draw_pictures,
    exit_status,
    fingerprint,
    finish,
    forked,
    kill_group,
    load_modules,
    said,
    start,
    until,
)

# What changes a file system or makes it last; openat counts where it makes a file.
CALLS = "openat,write,writev,pwrite64,ftruncate,fallocate,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink"
CALLS += ",unlinkat,mkdir,mkdirat,rmdir,symlink,flock"
Point = tuple[str, int]  # a call, and the how manieth of its kind in the process


def kill_at_calls(campaign: Campaign) -> None:
    """Kills one process at each call, and every other time the run that goes on too."""
    source, out = draw_pictures(campaign.work / "source", 40), campaign.work / "out"
    reference, points = calls_of_a_run(source, campaign.work)
    campaign.counts["calls that change files under the folder"] = len(points)
    for number, point in enumerate(campaign.some(points)):
        for call, when in [point, campaign.rng.choice(points[: len(points) // 2])][: 1 + number % 2]:
            killed = traced(lambda: convert_here(source, out), campaign.work, killing(call, when)) == -9
            campaign.counts["killed at a call"] += killed
            campaign.no_partial_files(out, reference)
        campaign.promise(goes_on(source, out, reference), "reruns equal in every file", point)


def kill_command_at_calls(campaign: Campaign) -> None:
    """Kills `alexprep shard` at calls of any of its processes: the whole group, or the process alone that made the call."""
    source, out, log = draw_pictures(campaign.work / "source", 40), campaign.work / "out", campaign.work / "strace.log"
    counts, words = campaign.counts, command(source, out, *SMALL)
    subprocess.run(strace(log, [], words), check=True, capture_output=True, timeout=DEADLINE_SECONDS)
    points = [point for found in changing(log, out).values() for point in found]
    reference = fingerprint(out)
    shutil.rmtree(out)
    counts["calls of the command's processes"] = len(points)
    for number, (call, when) in enumerate(campaign.some(points, 80)):
        log.unlink(missing_ok=True)
        process = start(strace(log, killing(call, when), words))
        if number % 4:
            until(lambda: "killed by SIGKILL" in text(log) or process.poll() is not None)  # noqa: B023
            kill_group(process)
            counts["groups killed at a call"] += "killed by SIGKILL" in text(log)
        else:  # strace kills each new process at its own N-th call, so this may end with a refusal, but not with a loss
            status, line = finish(process)
            counts["processes killed alone at a call"] += "killed by SIGKILL" in text(log)
            kept = status == 0 or (status == 1 and line.startswith("Error: ")) or status < 0
            campaign.promise(kept, "recovered by itself or ended with one line", (status, line))
        campaign.no_partial_files(out, reference)
        equal = finish(start(words))[0] == 0 and fingerprint(out) == reference
        campaign.promise(equal, "reruns equal in every file", (call, when))
        shutil.rmtree(out, ignore_errors=True)


def fail_at_calls(campaign: Campaign) -> None:
    """Each call fails with each error, alone or with all later calls that change files."""
    source, out = draw_pictures(campaign.work / "source", 16), campaign.work / "out"
    reference, points = calls_of_a_run(source, campaign.work)
    campaign.counts["calls that change files under the folder"] = len(points)
    cases = [
        (number, error, forever)
        for error in ("ENOSPC", "EIO", "EDQUOT", "EINTR")
        for forever in (False, True)
        for number, (call, _) in enumerate(points)
        if error != "EINTR" or call in ("write", "openat")  # the others are not interrupted on a local disk
    ]
    for number, error, forever in campaign.some(cases):
        call = points[number][0]
        for shift in (0, 1, -1, 2, -2, 3, -3, 4, -4):  # libraries open a few files more or fewer each time
            rules = failing(points, number, error, forever, shift if call == "openat" else 0)
            status = traced(lambda: convert_here(source, out), campaign.work, rules)
            words, case = said(), (call, number, error, forever)
            met = bool(re.search(rf"{call}\(.*{out}.*\(INJECTED\)", text(campaign.work / "strace.log")))
            campaign.no_partial_files(out, reference)
            campaign.promise(goes_on(source, out, reference), "reruns equal in every file", case)
            if met:
                break
        campaign.counts["faults" if met else "faults that met no such call"] += 1
        if not met:
            continue
        campaign.counts["survived"] += status == 0
        campaign.promise(
            status == 0 or (status in (1, 2) and str(campaign.work) in words),
            "survived, or ended with words that name the file",
            (*case, status, words),
        )
        if call in ("fsync", "write", "rename", "link") and error != "EINTR":
            campaign.promise(status != 0, "failed writes, fsyncs, renames and links that were not ignored", case)


def calls_of_a_run(source: Path, work: Path) -> tuple[Fingerprint, list[Point]]:
    """What an undisturbed run makes, and its calls."""
    out = work / "out"
    load_modules(source, out)
    assert exit_status(forked(lambda: convert_here(source, out))) == 0, said()
    reference = fingerprint(out)
    shutil.rmtree(out)
    assert traced(lambda: convert_here(source, out), work, []) == 0, said()
    assert fingerprint(out) == reference
    shutil.rmtree(out)
    (points,) = changing(work / "strace.log", out).values()  # one process, one thread
    return reference, points


def goes_on(source: Path, out: Path, reference: Fingerprint) -> bool:
    """Whether the same run again ends with the undisturbed run's files and no others. Clears the folder."""
    equal = exit_status(forked(lambda: convert_here(source, out))) == 0 and fingerprint(out) == reference
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
    attached = until(lambda: "TracerPid:\t0" not in Path(f"/proc/{child}/status").read_text(), 60)
    time.sleep(0.002)
    os.write(opener, b"x")
    status = exit_status(child)
    tracer.wait(DEADLINE_SECONDS)
    os.close(gate)
    os.close(opener)
    assert attached and tracer.returncode in (0, -9, 1), f"strace ended with {tracer.returncode}"
    return status


def text(path: Path) -> str:
    """A file's text; nothing where there is none yet."""
    return path.read_text(errors="replace") if path.exists() else ""
