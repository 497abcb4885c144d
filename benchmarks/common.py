"""What the benchmarks share: timing in turns, a table, one JSON line last, and a results file that says how it came about."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alexprep.shards.dataset_format import processor, versions

RESULTS = Path(__file__).parent / "results"


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser with the module's docstring as its help, and --save, for `report`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/NAME.json")
    return parser


def in_turns(contestants: dict[str, Callable[[], int]], rounds: int = 5) -> dict[str, float]:
    """Images/s of each contestant, the median over rounds in which all take their turn, so that a drifting machine hits all alike.

    A contestant is a function that does its work once and returns how many images that were; a first call is not counted.
    """
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in contestants.values():
        contestant()
    for _ in range(rounds):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            images = contestant()
            rates[name].append(images / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def report(name: str, figures: dict[str, Any], save: bool) -> None:
    """Prints the figures as a table and as one JSON line; with `save` also writes results/NAME.json."""
    width = max(map(len, figures))
    for key, value in figures.items():
        print(f"{key:<{width}}  {value:,.3f}" if isinstance(value, float) else f"{key:<{width}}  {value}")
    document = described(name, figures)
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def described(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """The figures with what they came about by: command, commit, date, machine, versions."""
    return {
        "benchmark": name,
        "command": _command(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "gpu": _gpu()},
        "versions": {"python": platform.python_version(), **versions("numpy", "torch", "dali", "nvimgcodec", "pillow")},
        "figures": {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()},
    }


def _command() -> str:
    """The command line, without this machine's folders."""
    script, *words = (
        Path(word).name if Path(word).is_absolute() or word.endswith(".py") else word for word in sys.argv
    )
    return " ".join(["python", f"benchmarks/{script}", *words])


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
