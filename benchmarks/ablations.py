"""The table of docs/ablations.md: of finished `alexprep ablate` folders, test and training errors, and the recipe's runs as one and with more views.

    python benchmarks/ablations.py cifar=cifar-ablation mnist=mnist-ablation [--save]

An argument is NAME=FOLDER; the nets of the first are evaluated as one, too. Every figure is a mean over the seeds, percent, with its standard error; differences are to the recipe with the
same seed, points.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alexprep.train.predictions import EvaluationViews

VIEWS: tuple[EvaluationViews, ...] = ("centre", "two", "ten")


def finished(folder: Path, short: str) -> dict[int, tuple[Path, dict[str, Any]]]:
    """The runs of a variant that came to their end, by seed, with their summaries."""
    found = {}
    for path in folder.glob(f"{short}-seed*/summary.json"):
        summary = json.loads(path.read_text())
        if summary["stopped_by"] is None:
            found[int(path.parent.name.rpartition("-seed")[2])] = path.parent, summary
    return dict(sorted(found.items()))


def variants(folder: Path) -> dict[str, str]:
    """Every variant that the folder has had, and what its runs are called."""
    names: dict[str, str] = json.loads((folder / "ablation.json").read_text())["names"]
    return {variant: short for short, variant in names.items()}


def figures_of(name: str, folder: Path) -> dict[str, Any]:
    """Of one folder, by variant: mean, standard error and number of runs."""
    from alexprep.train.ablation import mean_and_error

    plain: dict[str, dict[int, float]] = {}
    found: dict[str, Any] = {}
    for variant, short in variants(folder).items():
        runs = finished(folder, short)
        columns = {
            "test error": {seed: summary["val_top1_error"] for seed, (_, summary) in runs.items()},
            "training error": {seed: training_error(run) for seed, (run, _) in runs.items()},
            "training loss": {seed: summary["train_loss"] for seed, (_, summary) in runs.items()},
        }
        plain = plain or columns  # the recipe comes first
        for what, values in columns.items():
            found[f"{name}, {variant or 'the recipe'}: {what}"] = [*mean_and_error([*values.values()]), len(values)]
            apart = [value - plain[what][seed] for seed, value in values.items()]
            if variant:
                found[f"{name}, {variant}: {what} less the recipe's"] = [*mean_and_error(apart), len(apart)]
    return found


def training_error(run: Path) -> float:
    """Of the last epoch, the mean over its steps, percent."""
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    error: float = [record for record in records if record["kind"] == "epoch"][-1]["top1_error"]
    return error


def several_as_one(name: str, folder: Path) -> dict[str, Any]:
    """The recipe's runs one by one and as the mean of their softmax outputs, by views."""
    from alexprep.train.ablation import mean_and_error
    from alexprep.train.evaluation import evaluate
    from alexprep.train.run_dir import Place

    places = [Place(run) for run, _ in finished(folder, variants(folder)[""]).values()]
    found: dict[str, Any] = {}
    for views in VIEWS:
        document = evaluate(places, views=views).document
        mean, error = mean_and_error([net["top1_error"] for net in document["nets"]])
        found[f"{name}, {views} views: one net"] = [mean, error, len(places)]
        found[f"{name}, {views} views: {len(places)} averaged"] = document["top1_error"]
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
        figures |= figures_of(name, Path(folder))
    name, _, folder = given.folders[0].partition("=")
    figures |= several_as_one(name, Path(folder))
    report("ablations", figures, given.save)


if __name__ == "__main__":
    main()
