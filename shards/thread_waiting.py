"""How the threads of torch's operators wait for one another: chosen before torch is loaded, by what else runs on the machine.

Between two operators each OpenMP thread waits for the others. By itself GNU's runtime has it spin, which saves the microseconds of waking it
up; where another process wants the core, a thread that spins keeps it from the thread that is waited for, and a small step takes fifty times
as long. How many threads there are is not decided here: sums depend on it down to the last bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # whoever sets one of these has decided
ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}
# Turns of the loop, some tens of microseconds: enough between the operators of a large step, and a bound for what a neighbour that comes
# later can cost. The runtime's own is 300,000.
BRIEFLY = {"GOMP_SPINCOUNT": "10000"}
LOOKS, PAUSE_SECONDS = 10, 0.005
TURNS = 6  # of so many looks: what starts with this command, such as the reader of its output, has done so by then, and is no neighbour
MOST_OTHERS = 0.5  # processes that want a core, in the mean: a command that is just ending is no neighbour


def waiting(environment: Mapping[str, str], others: float | None, cores: int, processors: int) -> dict[str, str]:
    """What to set in the environment.

    Args:
        environment: as it is.
        others: how many other threads of this machine want to run, in the mean; None where nobody knows.
        cores: that this process may use.
        processors: of the machine.

    >>> waiting({}, 4.0, cores=2, processors=2)
    {'OMP_WAIT_POLICY': 'PASSIVE'}
    """
    if any(name in environment for name in SETTINGS) or others is None:
        return {}
    if others > processors - cores + MOST_OTHERS:
        return dict(ASLEEP)
    return dict(BRIEFLY)


def others_running() -> float | None:
    """How many threads of other processes want a core: the mean over 50 ms, of six such times the least; None on a system without /proc/stat.

    The first time in which hardly any did is the last.
    """
    least = _others_now()
    for _ in range(TURNS - 1):
        if least is None or least <= MOST_OTHERS:
            break
        now = _others_now()
        least = None if now is None else min(now, least)
    return least


def _others_now() -> float | None:
    """The mean over one time; None where it is not told."""
    counts = []
    try:
        for _ in range(LOOKS):
            lines = Path("/proc/stat").read_text().splitlines()
            counts += [int(line.split()[1]) - 1 for line in lines if line.startswith("procs_running ")]
            time.sleep(PAUSE_SECONDS)
    except (OSError, ValueError):
        return None
    return sum(counts) / len(counts) if counts else None


def choose_waiting() -> None:
    """Sets how the threads of this process and of those that it starts will wait; torch must not have been loaded."""
    others = None if any(name in os.environ for name in SETTINGS) else others_running()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.update(waiting(os.environ, others, cores, os.cpu_count() or cores))
