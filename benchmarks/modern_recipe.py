"""A recipe of today in the loader and in torch DataLoaders: resized crops, RandAugment or colour jitter, mirror, mixup; the same images.

python benchmarks/modern_recipe.py DATA [--contestants rand,rand-torchvision,...] [--rounds 5] [--save]

DATA: shards of 256-pixel JPEGs; see benchmarks/loader.py, which makes of them what each contestant reads and whose rules hold here: one
process each, one thread or worker, batches of 128 of 224 x 224 in float32, in turns. torchvision and albumentations have an environment of
their own, with torch for the CPU; torchvision's compiled operators do not load beside it, and are not needed here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from common import command_line, report
from contestants.live import Live, Turn
from loader import prepare
from processes import Environment, Missing, interpreter

_PACKAGES = ("torch==2.13.0", "numpy", "pillow==13.0.0", "albumentations==2.0.8")
OTHERS = Environment(_PACKAGES, ("torchvision==0.28.0",))
CONTESTANTS = {  # label, script, environment
    "plain": ("Loader: resized crop, mirror", "modern_alexprep", ""),
    "rand": ("Loader: resized crop, mirror, RandAugment, mixup", "modern_alexprep", ""),
    "jitter": ("Loader: resized crop, mirror, jitter, mixup", "modern_alexprep", ""),
    "simclr": ("Loader: resized crop, mirror, jitter, grey scale, blur", "modern_alexprep", ""),
    "plain-torchvision": ("torchvision: resized crop, mirror", "modern_torchvision", "torchvision"),
    "rand-torchvision": ("torchvision: resized crop, mirror, RandAugment, mixup", "modern_torchvision", "torchvision"),
    "jitter-torchvision": ("torchvision: resized crop, mirror, jitter, mixup", "modern_torchvision", "torchvision"),
    "simclr-torchvision": ("torchvision: resized crop, mirror, jitter, grey scale, blur", "modern_torchvision", "torchvision"),
    "plain-albumentations": ("albumentations: resized crop, mirror", "modern_albumentations", "torchvision"),
    "jitter-albumentations": ("albumentations: resized crop, mirror, jitter, mixup", "modern_albumentations", "torchvision"),
    "simclr-albumentations": ("albumentations: resized crop, mirror, jitter, grey scale, blur", "modern_albumentations", "torchvision"),
}  # fmt: skip


def main() -> None:
    """Has the contestants take turns, and reports."""
    parser = command_line(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--images", type=int, default=2048, help="that each contestant sees in an epoch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="batches that are timed in a turn")
    parser.add_argument("--skip", type=int, default=2, help="batches before them")
    arguments = parser.parse_args()
    names = arguments.contestants.split(",")
    if unknown := set(names) - set(CONTESTANTS):
        parser.error(f"no such contestant: {', '.join(sorted(unknown))}")
    folder = prepare(arguments.data, arguments.images)
    figures: dict[str, Any] = {name: getattr(arguments, name) for name in ("images", "rounds", "steps")}
    report("modern-recipe-cpu-1", figures | compare(names, folder, arguments), arguments.save)


def compare(names: list[str], folder: Path, how: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds, and what each step of a recipe adds to an image."""
    alive: dict[str, Live] = {}
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    figures: dict[str, Any] = {}
    try:
        for name in names:
            _, script, environment = CONTESTANTS[name]
            try:
                python = interpreter(environment, OTHERS if environment else Environment())
                alive[name] = Live(python, script, [str(folder), name.partition("-")[0], "1", "cpu"], 1, False)
            except Missing as reason:
                figures[f"{name}: left out"] = str(reason)
        for number in range(how.rounds + 1):  # the first is not counted
            for name, live in list(alive.items()):
                try:
                    turn = live.turn(how.skip, how.steps if number else 1)
                    turns[name] += [turn] if number else []
                except Missing as reason:
                    figures[f"{name}: left out"] = str(reason)
                    del alive[name]
            words = [f"{name} {1000 / held[-1].cpu:.2f}" for name, held in turns.items() if held]
            print(f"round {number} of {how.rounds}: CPU ms an image: {', '.join(words)}", file=sys.stderr)
        about = {f"{name}: {key}": value for name, live in alive.items() for key, value in live.about.items()}
    finally:
        for live in alive.values():
            live.close()
    cost = {name: 1000 / statistics.median(turn.cpu for turn in turns[name]) for name in alive}
    for name, milliseconds in cost.items():
        figures[f"{CONTESTANTS[name][0]}: CPU ms an image"] = milliseconds
        figures[f"{CONTESTANTS[name][0]}: images/s"] = statistics.median(turn.rate for turn in turns[name])
    for name, milliseconds in cost.items():
        recipe, _, other = name.partition("-")
        if other and recipe in cost:
            figures[f"{recipe}: times as fast as {other}, a CPU second"] = milliseconds / cost[recipe]
    return figures | about


if __name__ == "__main__":
    main()
