"""Trains variants of a recipe with several seeds each, and compares their errors: what a switch is worth, and how sure that is.

Every run is a run like any other, of the name that its variant and its seed give. What was trained is not trained again, and what was
broken off goes on, so an ablation is repeated with other variants or more seeds to make it larger: the tables have all that its folder holds.
"""

from __future__ import annotations

import csv
import io
import math
import re
import shlex
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from alexprep.shards.dataset_format import read_json
from alexprep.shards.errors import AlexprepError, whole_number
from alexprep.shards.storage import json_bytes, publish_bytes
from alexprep.train.config import AS_OPTIONS, Job, TrainConfig, prepare
from alexprep.train.precision import NotFinite
from alexprep.train.run_dir import CONFIG, SUMMARY
from alexprep.train.settings import by_field
from alexprep.train.trainer import train

ABLATION, TABLE = "ablation.json", "ablation.csv"
MEASURED = (  # of a run's summary
    *("epochs", "val_top1_error", "val_top5_error", "val_loss", "best_top1_error", "train_loss"),
    *("images_per_second", "seconds"),
)
MOST_SEEDS = 1000
BASE = ("recipe", "model", "settings", *AS_OPTIONS, "steps")
LONGEST = 80  # letters of a variant in the name of a run
PLAIN = ""  # the variant that is the recipe itself


class Trained(NamedTuple):
    """A run that came to its end."""

    variant: str
    seed: int
    summary: dict[str, Any]


def ablate(
    config: TrainConfig, variants: Sequence[str], seeds: int, say: Callable[[str], None] = lambda words: None
) -> dict[str, Any]:
    """Trains the recipe as `config` has it, and each variant of it, with the seeds 0, 1, … below `seeds`.

    All variants have their turn with a seed before the next seed, so that what was trained by then can be compared.

    Args:
        config: what they have in common; its `runs` is the ablation's folder.
        variants: settings FIELD=VALUE, several of them with spaces between, quoted as for a shell.
        seeds: how many.
        say: is told what begins.

    Returns:
        The document that ablation.json in that folder is then, too: base, split; names, what the runs of each variant that the folder has had
        are called, but for their seeds; variants, a list of variant, runs, and the mean and its standard error (None for one run, which tells
        none) of top1_error, top5_error (percent) and loss (nats), and of difference, top1_error less that of the recipe with the same seed
        (points); runs, a list of variant, seed, run and what its summary measured; failed, a list of variant, seed, run and reason, of those
        whose loss was no number; stopped_by, as of a run. What was trained in the folder before is there too, other variants after `variants`.

    Raises:
        AlexprepError: a variant is none, two would be trained under one name, the folder holds an ablation of something else, or there is
            nothing to measure errors on.
    """
    whole_number("seeds", seeds, 1, MOST_SEEDS)
    wanted = {PLAIN: config} | {" ".join(split := _split(text)): _varied(config, split) for text in variants}
    # All of them, so that a wrong variant is told before any is trained.
    plain, *_ = [prepare(each, dry_run=True) for each in wanted.values()]
    if plain.facts.evaluation_split is None:
        raise AlexprepError(
            f"{config.data} has no val or test split with labels: there is nothing to measure errors on"
        )
    short = _short_names(plain, list(wanted))
    names = {(variant, seed): f"{short[variant]}-seed{seed}" for seed in range(seeds) for variant in wanted}
    document = {"base": _base(plain), "split": plain.facts.evaluation_split}
    known, failed = _begin(config.runs, document, short)
    document["names"] = known
    runs = {(one.variant, one.seed): one for one in _trained(config.runs, known)}
    order = list(dict.fromkeys([*wanted, *known.values()]))
    stopped = None
    for number, ((variant, seed), name) in enumerate(names.items(), 1):
        run = config.runs / name
        if (variant, seed) not in runs:
            say(f"run {number} of {len(names)}, {run}: {variant or 'the recipe'}, seed {seed}")
            try:
                summary = train(_to_do(wanted[variant], seed, run))
                stopped = summary["stopped_by"]
                runs |= {(variant, seed): Trained(variant, seed, summary)} if stopped is None else {}
            except NotFinite as error:  # which is a result too: of this variant, not of the ablation
                say(str(error))
                failed[variant, seed] = {"variant": variant, "seed": seed, "run": str(run), "reason": str(error)}
        _publish(config.runs, result := document | _compared(order, runs, failed) | {"stopped_by": stopped})
        if stopped is not None:
            break
    return result


def _split(variant: str) -> list[str]:
    """The settings of a variant."""
    try:
        return shlex.split(variant)
    except ValueError as error:
        raise AlexprepError(
            f"variant {variant!r} is not FIELD=VALUE FIELD=VALUE …, quoted as for a shell: {error}"
        ) from None


def _varied(config: TrainConfig, given: list[str]) -> TrainConfig:
    """A variant's training. What it says takes the place of what the options say of the same field."""
    named = {name: None for name in by_field(given) if name in AS_OPTIONS}
    return replace(config, **named, settings=(*config.settings, *given))  # type: ignore[arg-type]


def _base(job: Job) -> dict[str, Any]:
    """What all runs of an ablation have in common, as JSON values."""
    told = {name: getattr(job.config, name) for name in BASE}
    return told | {
        "settings": list(job.config.settings),
        "precision": job.computing.precision,
        "data": job.facts.digest,
    }


def _begin(
    folder: Path, document: dict[str, Any], short: dict[str, str]
) -> tuple[dict[str, str], dict[tuple[str, int], dict[str, Any]]]:
    """Makes the folder, or makes sure that what it holds has the same base, and no run of another variant under one of the `short` names.

    All variants that the folder has had, by these names, are returned, and noted in it before any is trained; and its runs that failed, by
    variant and seed.
    """
    earlier: dict[str, Any] = {}
    if (folder / ABLATION).exists():
        earlier = read_json(folder / ABLATION, "name another folder with --runs")
    before = earlier.get("base", {})
    known: dict[str, str] = earlier.get("names", {})
    for name, now in document["base"].items() if earlier else ():
        if before.get(name) != now:
            raise AlexprepError(
                f"{folder} holds an ablation whose {name} was {before.get(name)!r}, now it is {now!r}: name another folder with --runs"
            )
    for variant, name in short.items():
        if known.get(name, variant) != variant:
            raise AlexprepError(
                f"{folder} holds runs of the variant {known[name]!r} as {name}, and {variant!r} would be trained as that too: write it otherwise, "
                "or name another folder with --runs"
            )
    names = known | {name: variant for variant, name in short.items()}
    folder.mkdir(parents=True, exist_ok=True)
    _publish(folder, document | _compared([], {}, {}) | {"stopped_by": None} | earlier | {"names": names})
    return names, {(one["variant"], one["seed"]): one for one in earlier.get("failed", [])}


def _trained(folder: Path, names: dict[str, str]) -> Iterator[Trained]:
    """The runs in a folder that came to their end, of all variants that it has had, by what their runs are called but for their seeds."""
    for name, variant in names.items():
        runs = {run.name.removeprefix(f"{name}-seed"): run for run in folder.glob(f"{name}-seed*")}
        for seed in sorted(int(text) for text in runs if re.fullmatch("0|[1-9][0-9]{0,8}", text)):
            if (summary := _finished(runs[str(seed)])) is not None:
                yield Trained(variant, seed, summary)


def _short_names(plain: Job, variants: list[str]) -> dict[str, str]:
    """What the runs of each variant are called, but for their seeds."""
    short = {
        variant: re.sub(r"[^A-Za-z0-9._]+", "-", variant or plain.recipe.name).strip("-._")[:LONGEST]
        for variant in variants
    }
    for variant, name in short.items():
        if other := [each for each in variants if each != variant and short[each] == name]:
            raise AlexprepError(
                f"the variants {variant!r} and {other[0]!r} would both be trained as {name}: write one otherwise"
            )
    return short


def _finished(run: Path) -> dict[str, Any] | None:
    """The summary of a run that came to its end."""
    if not (run / SUMMARY).exists():
        return None
    summary = read_json(run / SUMMARY, "delete it and run the same command again")
    return summary if summary.get("stopped_by") is None else None


def _to_do(config: TrainConfig, seed: int, run: Path) -> TrainConfig:
    """The training of one run, from its beginning, or from where it was broken off: as it began."""
    if not (run / CONFIG).exists():
        return replace(config, seed=seed, name=run.name)
    own = {"data": config.data, "recipe": config.recipe, "model": config.model, "runs": config.runs, "name": run.name}
    return TrainConfig(**own, resume=True, device=config.device, threads=config.threads)  # type: ignore[arg-type]


def _compared(
    order: list[str], found: dict[tuple[str, int], Trained], failures: dict[tuple[str, int], dict[str, Any]]
) -> dict[str, Any]:
    """The runs, and each variant's means over those of its seeds that ended with numbers; what failed once may have ended well since."""
    failed = [one for place, one in failures.items() if place not in found]
    runs = [
        {"variant": one.variant, "seed": one.seed, "run": one.summary["run"]}
        | {name: one.summary.get(name) for name in MEASURED}
        for one in sorted(found.values(), key=lambda one: (one.seed, order.index(one.variant)))
    ]
    plain = {run["seed"]: run["val_top1_error"] for run in runs if run["variant"] == PLAIN}
    variants = []
    tried = {one["variant"] for one in [*runs, *failed]}
    for variant in (each for each in order if each in tried):
        own = [run for run in runs if run["variant"] == variant]
        row: dict[str, Any] = {"variant": variant, "runs": len(own)}
        row["failed"] = sum(each["variant"] == variant for each in failed)
        for name in ("top1_error", "top5_error", "loss"):
            row[name], row[f"{name}_standard_error"] = mean_and_error([run[f"val_{name}"] for run in own])
        apart = [run["val_top1_error"] - plain[run["seed"]] for run in own if run["seed"] in plain]
        row["difference"], row["difference_standard_error"] = mean_and_error(apart)
        variants.append(row)
    return {"variants": variants, "runs": runs, "failed": failed}


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean of some values, and its standard error, which one value does not tell, nor none the mean.

    >>> mean_and_error([1.0, 3.0])
    (2.0, 1.0)
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values) if values else None, error


def _publish(folder: Path, document: dict[str, Any]) -> None:
    """Writes the document, and its runs as a table."""
    publish_bytes(folder / ABLATION, json_bytes(document))
    text = io.StringIO(newline="")
    rows = csv.DictWriter(text, ["variant", "seed", "run", *MEASURED])
    rows.writeheader()
    rows.writerows(document["runs"])
    publish_bytes(folder / TABLE, text.getvalue().encode())


def table_rows(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The comparison as rows of text, the first of which names the columns: variant, runs, error and its standard error, difference to the recipe and its standard error."""

    def shown(row: dict[str, Any], name: str, sign: str = "") -> str:
        error = row[f"{name}_standard_error"]
        if row[name] is None:
            return ""
        return f"{row[name]:{sign}.2f}" + ("" if error is None else f" ± {error:.2f}")

    yield "variant", "runs", "top-1 error, %", "top-5 error, %", "less the recipe's"
    for row in document["variants"]:
        difference = "" if row["variant"] == PLAIN else shown(row, "difference", "+")
        runs = f"{row['runs']}" + (f", {row['failed']} failed" if row["failed"] else "")
        yield (
            row["variant"] or "the recipe",
            runs,
            shown(row, "top1_error"),
            shown(row, "top5_error"),
            difference,
        )
