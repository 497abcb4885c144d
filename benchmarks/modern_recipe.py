"""Recipes of today in the loader and in torch DataLoaders: resized crops, RandAugment or colour jitter, mirror, mixup; the same images.

python benchmarks/modern_recipe.py DATA [--recipes plain,rand,jitter,simclr] [--others torchvision,v2,timm,albumentations] [--rounds 7] [--save]

DATA: shards of 256-pixel JPEGs; see benchmarks/loader.py, which makes of them what each contestant reads and whose rules hold here: one
process each, one thread or worker, batches of 128 of 224 x 224 in float32. All contestants of a recipe live at the same time and take turns. What
counts is processor time, of all of a contestant's processes, from rest to rest: so that a busy machine changes little, and what was made
ahead nothing. A ratio is the median over the rounds of the ratios within a round. torchvision, timm and albumentations have an environment of
their own, which pip makes at the first time (some 8 GB, where torch comes with CUDA).
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

OTHERS = Environment(
    ("torch==2.14.1", "torchvision==0.29.1", "timm==1.0.31", "albumentations==2.0.8", "numpy", "pillow==13.0.0")
)
RECIPES = {
    "plain": "resized crop, mirror",
    "rand": "resized crop, mirror, RandAugment, mixup",
    "jitter": "resized crop, mirror, jitter, mixup",
    "simclr": "resized crop, mirror, jitter, grey scale, blur",
}
LIBRARIES = {  # in the table; albumentations has no RandAugment
    "torchvision": "torchvision over Pillow, in a DataLoader",
    "v2": "torchvision v2 over tensors, in a DataLoader",
    "timm": "timm, in a DataLoader",
    "albumentations": "albumentations over OpenCV, in a DataLoader",
}


def main() -> None:
    """Has the contestants take turns, and reports."""
    parser = command_line(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--others", default=",".join(LIBRARIES))
    parser.add_argument("--images", type=int, default=2048, help="that each contestant sees in an epoch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="batches that are timed in a turn")
    parser.add_argument("--skip", type=int, default=1, help="batches before them")
    arguments = parser.parse_args()
    recipes, others = arguments.recipes.split(","), arguments.others.split(",")
    if unknown := (set(recipes) - set(RECIPES)) | (set(others) - set(LIBRARIES)):
        parser.error(f"no such recipe or library: {', '.join(sorted(unknown))}")
    folder = prepare(arguments.data, arguments.images)
    figures: dict[str, Any] = {name: getattr(arguments, name) for name in ("images", "rounds", "steps", "skip")}
    about: dict[str, Any] = {}
    for recipe in recipes:
        known = [other for other in others if (recipe, other) != ("rand", "albumentations")]
        turns, more = compare(recipe, known, folder, arguments)
        figures |= table(recipe, turns)
        about |= more
    report("modern-recipe-cpu-1", figures | about, arguments.save)


def compare(
    recipe: str, others: list[str], folder: Path, how: argparse.Namespace
) -> tuple[dict[str, list[Turn]], dict[str, Any]]:
    """The turns of "alexprep" and of each other library, round by round; what each of them says of itself, or why it is missing."""
    alive: dict[str, Live] = {}
    about: dict[str, Any] = {}
    turns: dict[str, list[Turn]] = {}
    try:
        for name in ("alexprep", *others):
            own = name == "alexprep"
            script = "modern_torchvision" if name == "v2" else f"modern_{name}"
            try:
                python = interpreter("" if own else "modern", Environment() if own else OTHERS, minutes=30)
                words = [str(folder), recipe if own else f"{recipe}-{name}", "1", "cpu"]
                alive[name] = Live(python, script, words, 1, False)
                about |= {f"{recipe}, {name}: {key}": value for key, value in alive[name].about.items()}
            except Missing as reason:
                about[f"{recipe}, {name}: left out"] = str(reason)
        for number in range(how.rounds + 1):  # the first is not counted
            for name, live in list(alive.items()):
                try:
                    turn = live.turn(how.skip, how.steps if number else 1)
                    turns.setdefault(name, []).extend([turn] if number else [])
                except Missing as reason:
                    about[f"{recipe}, {name}: left out"] = str(reason)
                    del alive[name]
            words = [f"{name} {1000 / held[-1].cpu:.2f}" for name, held in turns.items() if held and name in alive]
            print(f"{recipe}: round {number} of {how.rounds}: CPU ms an image: {', '.join(words)}", file=sys.stderr)
    finally:
        for live in alive.values():
            live.close()
    return {name: turns[name] for name in alive}, about


def table(recipe: str, turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Medians over the rounds, and how much less processor time the loader takes than the others, round by round."""
    figures: dict[str, Any] = {}
    for name, held in turns.items():
        costs = sorted(1000 / turn.cpu for turn in held)
        label = f"{RECIPES[recipe]}: {LIBRARIES.get(name, 'Loader')}"
        figures[f"{label}: CPU ms an image"] = statistics.median(costs)
        figures[f"{label}: lowest and highest"] = f"{costs[0]:.2f}, {costs[-1]:.2f}"
    for name in turns.keys() - {"alexprep"} if "alexprep" in turns else ():
        ratios = sorted(ours.cpu / theirs.cpu for ours, theirs in zip(turns["alexprep"], turns[name], strict=True))
        figures[f"{recipe}: images a CPU second, to those of {name}"] = statistics.median(ratios)
        figures[f"{recipe}: the same to {name}, lowest and highest round"] = f"{ratios[0]:.2f}, {ratios[-1]:.2f}"
    return figures


if __name__ == "__main__":
    main()
