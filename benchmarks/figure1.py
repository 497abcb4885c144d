"""Fig. 1 of the paper: epochs to 25 % training error on CIFAR-10 with ReLU and with tanh, each at the fastest rate of its own.

    python benchmarks/figure1.py run DATA relu --runs RUNS [--save]      DATA: CIFAR-10, `alexprep shard --size 32` and `pca-stats`
    python benchmarks/figure1.py run DATA tanh --runs RUNS [--save]
    python benchmarks/figure1.py plot PICTURE                            from results/figure1-{relu,tanh}.json

Rates are tried for SEARCH epochs each, a factor of 2 apart, until the best has a worse one on either side. The best run then goes on to
25 %. An epoch's training error is the mean over its steps, as the net learns, of which there is nothing but the update rule: no decay, no
dropout, no crops, no mirrors. A run that was broken off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import RESULTS, report

GOAL, SEARCH, MOST_EPOCHS = 25.0, 2, 80  # percent; epochs; epochs
FIRST_RATES = (0.0005, 0.001, 0.002)


def errors(data: Path, runs: Path, activation: str, rate: float, epochs: int) -> list[float]:
    """Training errors of the epochs so far, percent, of the run with this rate after at least `epochs`; diverged ones count 100."""
    from alexprep.shards.errors import AlexprepError
    from alexprep.train.config import TrainConfig
    from alexprep.train.trainer import train

    run = runs / f"{activation}-{rate:g}"
    resume = (run / "config.json").exists()
    config = TrainConfig(
        data, f"cifar10-{activation}", lr=rate, epochs=epochs, runs=runs, name=run.name, resume=resume, keep=1
    )
    try:
        train(config)
    except AlexprepError as error:
        if "the loss became" not in str(error):
            raise
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    found = [record["top1_error"] for record in records if record["kind"] == "epoch"]
    return (found + [100.0] * epochs)[: max(epochs, len(found))]


def run(data: Path, runs: Path, activation: str, save: bool) -> None:
    """Finds the rate and trains to the goal."""
    tried = {rate: errors(data, runs, activation, rate, SEARCH) for rate in FIRST_RATES}
    while True:
        best = min(tried, key=lambda rate: tried[rate][SEARCH - 1])
        beyond = [rate for rate in (best / 2, best * 2) if rate not in tried]
        if not beyond:
            break
        tried[beyond[0]] = errors(data, runs, activation, beyond[0], SEARCH)
    epochs = len(tried[best])
    while min(tried[best]) > GOAL and epochs < MOST_EPOCHS:
        epochs += 1
        tried[best] = errors(data, runs, activation, best, epochs)
    reached = [epoch for epoch, error in enumerate(tried[best], start=1) if error <= GOAL]
    figures = {
        "activation": activation,
        "rate": best,
        "epochs_to_25_percent": reached[0] if reached else None,
        "training_errors_percent": tried[best],
        "search_errors_percent": {f"{rate:g}": found[:SEARCH] for rate, found in sorted(tried.items())},
    }
    report(f"figure1-{activation}", figures, save)


def plot(picture: Path) -> None:
    """Draws both curves from the results."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    for activation, style in (("relu", "-"), ("tanh", "--")):
        found = json.loads((RESULTS / f"figure1-{activation}.json").read_text())["figures"]
        curve = found["training_errors_percent"]
        label = f"{activation}, rate {found['rate']:g}"
        axes.plot(range(1, len(curve) + 1), curve, f"k{style}", label=label)
    axes.axhline(GOAL, color="0.6", linewidth=0.8)
    axes.set(xlabel="epochs", ylabel="training error, %", ylim=(0, 75))
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("data", type=Path)
    running.add_argument("activation", choices=["relu", "tanh"])
    running.add_argument("--runs", type=Path, default=Path("runs-figure1"))
    running.add_argument("--save", action="store_true")
    plotting = commands.add_parser("plot")
    plotting.add_argument("picture", type=Path)
    given = parser.parse_args()
    if given.command == "plot":
        plot(given.picture)
    else:
        run(given.data, given.runs, given.activation, given.save)


if __name__ == "__main__":
    main()
