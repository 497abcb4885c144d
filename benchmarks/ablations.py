"""The table of docs/ablations.md: of finished `alexprep ablate` folders, test and training errors, and the recipe's runs as one and with more views.

    python benchmarks/ablations.py cifar=cifar-ablation mnist=mnist-ablation [--save]

An argument is NAME=FOLDER. Every figure is a mean over the seeds, percent, with its standard error; differences are to the recipe with the
same seed, points.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alexprep.train.predictions import EvaluationViews

VIEWS: tuple[EvaluationViews, ...] = ("centre", "two", "ten")


def figures_of(name: str, folder: Path) -> dict[str, Any]:
    """Of one folder, by variant."""
    from alexprep.shards.dataset_format import read_json
    from alexprep.train.ablation import mean_and_error

    document = read_json(folder / "ablation.json", "run alexprep ablate")
    plain = {run["seed"]: (run, training_error(folder, run)) for run in document["runs"] if run["variant"] == ""}
    found: dict[str, Any] = {}
    for variant in document["names"].values():
        runs = [run for run in document["runs"] if run["variant"] == variant]
        trained = [training_error(folder, run) for run in runs]
        columns = {
            "test error": [run["val_top1_error"] for run in runs],
            "training error": trained,
            "training loss": [run["train_loss"] for run in runs],
        }
        if variant:
            columns["less the recipe's test error"] = [
                run["val_top1_error"] - plain[run["seed"]][0]["val_top1_error"] for run in runs
            ]
            columns["less the recipe's training error"] = [
                error - plain[run["seed"]][1] for run, error in zip(runs, trained, strict=True)
            ]
        for what, values in columns.items():
            mean, error = mean_and_error(values)
            found[f"{name}, {variant or 'the recipe'}: {what}"] = [mean, error, len(values)]
    return found


def training_error(folder: Path, run: dict[str, Any]) -> float:
    """Of the last epoch, the mean over its steps, percent."""
    lines = (folder / Path(run["run"]).name / "log.jsonl").read_text().splitlines()
    error: float = [record for record in map(json.loads, lines) if record["kind"] == "epoch"][-1]["top1_error"]
    return error


def several_as_one(name: str, folder: Path) -> dict[str, Any]:
    """The recipe's runs one by one and as the mean of their softmax outputs, by views."""
    from alexprep.shards.dataset_format import read_json
    from alexprep.train.ablation import mean_and_error
    from alexprep.train.evaluation import evaluate
    from alexprep.train.run_dir import Place

    runs = [run for run in read_json(folder / "ablation.json", "")["runs"] if run["variant"] == ""]
    places = [Place(folder / Path(run["run"]).name) for run in runs]
    found: dict[str, Any] = {}
    for views in VIEWS:
        alone = [evaluate([place], views=views).document["top1_error"] for place in places]
        mean, error = mean_and_error(alone)
        found[f"{name}, {views} views: one net"] = [mean, error, len(alone)]
        found[f"{name}, {views} views: {len(places)} averaged"] = evaluate(places, views=views).document["top1_error"]
    return found


def main() -> None:
    """The command line."""
    from common import command_line, report

    parser = command_line(__doc__)
    parser.add_argument("folders", nargs="+", metavar="NAME=FOLDER")
    given = parser.parse_args()
    figures: dict[str, Any] = {}
    for each in given.folders:
        name, _, folder = each.partition("=")
        figures |= figures_of(name, Path(folder)) | several_as_one(name, Path(folder))
    report("ablations", figures, given.save)


if __name__ == "__main__":
    main()
