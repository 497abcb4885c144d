"""Transfer: what a net knows of five classes is worth to five others with 500 pictures each, against beginning from scratch.

    python benchmarks/transfer.py cifar10.tar --out transfer [--save]

The source is a tar of pictures as SPLIT/CLASS/NAME with the splits train and test, such as CIFAR-10 in JPEGs. The classes are halved in the order
of their names. A net is trained on the first half; then, on the second half, one from its layers but the last, and one from scratch, with the same
seeds, pictures, rates and epochs. Finished steps are kept: the same command goes on where it was broken off.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

FIRST, OTHER, TESTED = (
    2500,
    500,
    500,
)  # pictures a class: of the classes trained on first, of the others, and of each one's test
FIRST_EPOCHS, EPOCHS = 5, 8
SETTINGS = ("width=0.5",)


def halves(source: Path, out: Path) -> dict[str, Path]:
    """Two tars of the wanted pictures, the first of each class in the order of the source."""
    made = {half: out / f"{half}.tar" for half in ("first", "others")}
    if all(path.exists() for path in made.values()):
        return made
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(source) as tar:
        members = [member for member in tar if member.isfile() and member.name.count("/") == 2]
        classes = sorted({member.name.split("/")[1] for member in members})
        first = set(classes[: len(classes) // 2])
        taken = Counter[tuple[str, str]]()
        with tarfile.open(out / "first.tmp", "w") as one, tarfile.open(out / "others.tmp", "w") as other:
            for member in members:
                split, name, _ = member.name.split("/")
                most = TESTED if split == "test" else FIRST if name in first else OTHER
                if split in ("train", "test") and taken[split, name] < most:
                    taken[split, name] += 1
                    (one if name in first else other).addfile(member, tar.extractfile(member))
    for half, path in made.items():
        (out / f"{half}.tmp").rename(path)
    return made


def dataset(tar: Path, out: Path) -> Path:
    """The shards of a tar, with statistics."""
    from alexprep.cli.main import cli

    cli.main(["shard", str(tar), "--size", "32", "--out", str(out), "--workers", "1"], standalone_mode=False)
    cli.main(["pca-stats", "--data", str(out)], standalone_mode=False)
    return out


def trained(data: Path, runs: Path, name: str, **options: Any) -> float:
    """The test error of a run, percent, trained if it is not yet."""
    from alexprep.shards.dataset_format import read_json
    from alexprep.train.config import TrainConfig
    from alexprep.train.trainer import train

    if not (runs / name / "summary.json").exists():
        begun = {"resume": True} if (runs / name / "config.json").exists() else {"settings": SETTINGS, **options}
        train(TrainConfig(data, "small-net", runs=runs, name=name, threads=1, **begun))
    error: float = read_json(runs / name / "summary.json", "")["val_top1_error"]
    return error


def measured(source: Path, out: Path, seeds: int) -> dict[str, Any]:
    """Trains all, and compares."""
    from alexprep.train.ablation import mean_and_error

    sets = {half: dataset(tar, out / half) for half, tar in halves(source, out).items()}
    runs = out / "runs"
    found: dict[str, list[float]] = {"five other classes, from scratch": [], "five other classes, transferred": []}
    for seed in range(seeds):
        trained(sets["first"], runs, f"first-{seed}", seed=seed, epochs=FIRST_EPOCHS)
        same = {"seed": seed, "epochs": EPOCHS}
        found["five other classes, from scratch"].append(trained(sets["others"], runs, f"scratch-{seed}", **same))
        begin = {"init_from": f"first-{seed}", "init_layers": "conv*,fc3"}
        found["five other classes, transferred"].append(
            trained(sets["others"], runs, f"transferred-{seed}", **same, **begin)
        )
    scratch, transferred = found.values()
    found["less the error from scratch"] = [one - other for one, other in zip(transferred, scratch, strict=True)]
    figures: dict[str, Any] = {"seeds": seeds}
    for what, values in found.items():
        figures[f"{what}: mean, percent"], figures[f"{what}: standard error"] = mean_and_error(values)
        figures[f"{what}: each seed"] = values
    return figures


def main() -> None:
    """The command line."""
    from common import command_line, report

    parser = command_line(__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, default=Path("transfer"), help="folder of the tars, data sets and runs")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    report("transfer", measured(given.source, given.out, given.seeds), given.save)


if __name__ == "__main__":
    main()
