"""The nets before AlexNet on MNIST: columns of several seeds, columns of several widths and their mean, LeNet-5, single images a step; and speeds.

    python benchmarks/columns.py DATA --runs RUNS [--what columns widths lenet5 online speed] [--seeds 0 1 2] [--widths 10 12 14 16 18]
        [--epochs 10] [--lenet5-epochs 8] [--processes 2] [--save]        DATA: MNIST, `alexprep shard mnist --out DATA --size 28 --format png`

A night's run towards the 0.35 % and 0.23 % of the papers, on two cores: --seeds 0 --widths 10 12 14 16 18 20 --epochs 60. Each training is one
`alexprep train` with one thread, so many at a time; runs that are there are gone on with, so the same command goes on where it was
stopped. CPU seconds are those of all threads of a training, its start and its evaluations among them.

`speed` tells microseconds of CPU time on one core: of a step of one image by `alexprep train`, with all that it does, by a plain loop of the same net
over tensors in memory, and what the distortion of an image of 29 pixels takes, its draws and its resampling.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import command_line, report

ONLINE_EPOCHS = 1
LENET5 = ["--recipe", "lenet5", "--batch-size", "32", "--lr", "0.02", "--set", "momentum=0.9", "--schedule", "linear"]


def trained(arguments: argparse.Namespace, name: str, options: list[str]) -> dict[str, Any]:
    """The summary of one run, begun or gone on with, and its CPU seconds."""
    given = ["--runs", str(arguments.runs), "--name", name, "--device", "cpu", "--json"]
    if (arguments.runs / name).exists():
        epochs = options[options.index("--epochs") + 1]
        given += ["--resume", "--epochs", epochs]
    else:
        given += [*options, "--data", str(arguments.data), "--threads", "1"]
    found = said(["train", *given])
    print(f"{name}: {found['val_top1_error']:.2f} % after {found['epochs']} epochs", file=sys.stderr)
    return found


def said(words: list[str]) -> dict[str, Any]:
    """The JSON line with which a command of alexprep ends."""
    command, env = [sys.executable, "-m", "alexprep.cli", *words], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def plans(arguments: argparse.Namespace) -> dict[str, dict[str, list[str]]]:
    """The options of each run, by what it is for and its name."""
    fast = ["--recipe", "mnist-column-fast", "--epochs", str(arguments.epochs)]
    return {
        "columns": {f"column-{seed}": [*fast, "--seed", str(seed)] for seed in arguments.seeds},
        "widths": {
            f"width-{width}-{seed}": [*fast, "--seed", str(seed), "--set", f"augmentation.normalised_width={width}"]
            for seed in arguments.seeds[:1]
            for width in arguments.widths
        },
        "lenet5": {
            f"lenet5-{seed}": [*LENET5, "--epochs", str(arguments.lenet5_epochs), "--seed", str(seed)]
            for seed in arguments.seeds
        },
        "online": {"online-0": ["--recipe", "mnist-column", "--epochs", str(ONLINE_EPOCHS)]},
    }


def errors(arguments: argparse.Namespace) -> dict[str, Any]:
    """All trainings that are asked for, and the means of nets."""
    figures: dict[str, Any] = {"processes": arguments.processes}
    chosen = {what: runs for what, runs in plans(arguments).items() if what in arguments.what}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with concurrent.futures.ThreadPoolExecutor(arguments.processes) as pool:
        waiting = {
            what: {name: pool.submit(trained, arguments, name, options) for name, options in runs.items()}
            for what, runs in chosen.items()
        }
        found = {what: {name: each.result() for name, each in runs.items()} for what, runs in waiting.items()}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for what, runs in found.items():
        each = {name: summary["val_top1_error"] for name, summary in runs.items()}
        figures[f"{what}: test error, each run"] = each
        figures[f"{what}: epochs"] = [summary["epochs"] for summary in runs.values()]
        figures[f"{what}: mean of the errors"] = statistics.mean(each.values())
        if len(each) > 1:
            figures[f"{what}: standard error of that"] = statistics.stdev(each.values()) / len(each) ** 0.5
            figures[f"{what}: best"] = min(each.values())
            mean = said(["eval", *each, "--runs", str(arguments.runs), "--device", "cpu", "--json"])
            figures[f"{what}: error of the nets' mean"] = mean["top1_error"]
            figures[f"{what}: standard error of that error"] = mean["top1_standard_error"]
    figures["CPU seconds of what was trained now"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return figures


def distortion() -> float:
    """Microseconds of CPU time an image, of what `mnist-column` does to it between decoding and the net."""
    import numpy as np
    import torch

    from alexprep.pipeline.augmentation import draw
    from alexprep.pipeline.resampling import resampled_views
    from alexprep.train.recipes import RECIPES

    augmentation = RECIPES["mnist-column"].augmentation
    rows, sizes = np.arange(64), np.full((64, 2), 28)
    images = torch.randint(0, 256, (64, 29, 29, 3), dtype=torch.uint8)
    begun = time.process_time()
    for epoch in range(30):
        resampled_views(images, draw(augmentation, 0, epoch, rows, sizes), augmentation, None)
    return (time.process_time() - begun) / (30 * 64) * 1e6


def speed(data: Path) -> dict[str, Any]:
    """Microseconds of CPU time: medians of turns."""
    import torch
    import torch.nn.functional as F

    from alexprep.pipeline.loader import Loader
    from alexprep.train.config import TrainConfig
    from alexprep.train.recipes import RECIPES
    from alexprep.train.trainer import Run, train

    torch.set_num_threads(1)
    column, steps, turns = RECIPES["mnist-column"], 1000, 3
    with Loader(data, batch_size=steps, augmentation=column.augmentation, threads=1) as loader:
        batch = next(iter(loader))

    def plain() -> float:
        network = column.make_network(10, 0)
        optimizer = torch.optim.SGD(network.parameters(), lr=column.lr)
        begun = time.process_time()
        for n in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(network(batch.images[n : n + 1]), batch.labels[n : n + 1]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return (time.process_time() - begun) / steps * 1e6

    def ours() -> float:
        marks: list[float] = []
        log, evaluate = Run.log, Run.evaluate

        def logged(run: Run, *told: Any) -> None:
            log(run, *told)
            marks.append(time.process_time())

        Run.log, Run.evaluate = logged, lambda run: None  # type: ignore[method-assign, assignment]
        try:
            with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stderr(io.StringIO()):
                train(TrainConfig(data=data, recipe=column.name, steps=steps, threads=1, runs=Path(runs), device="cpu"))
        finally:
            Run.log, Run.evaluate = log, evaluate  # type: ignore[method-assign]
        return (marks[-1] - marks[99]) / (len(marks) - 100) * 1e6

    found: dict[str, list[float]] = {}
    for _ in range(turns):
        for name, measure in (("plain loop", plain), ("alexprep train", ours), ("distortion", distortion)):
            found.setdefault(name, []).append(measure())
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        "a step of one image, plain loop, us": medians["plain loop"],
        "a step of one image, alexprep train, us": medians["alexprep train"],
        "alexprep train over the plain loop": medians["alexprep train"] / medians["plain loop"],
        "distortion of an image of 29 pixels, us": medians["distortion"],
    }


def main() -> None:
    """Measures what is asked for."""
    parser = command_line(__doc__)
    kinds = ["columns", "widths", "lenet5", "online", "speed"]
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--what", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--widths", type=int, nargs="+", default=[10, 12, 14, 16, 18])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lenet5-epochs", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    figures = errors(arguments) if set(arguments.what) - {"speed"} else {}
    if "speed" in arguments.what:
        figures |= speed(arguments.data)
    report("-".join(["columns", *(arguments.what if arguments.what != kinds else [])]), figures, arguments.save)


if __name__ == "__main__":
    main()
