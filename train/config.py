"""What a caller chooses, and what follows from it: the run's folder, its recipe, and its identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from alexprep.pipeline.device import choose_device
from alexprep.pipeline.tuning import Tuning, saved_tuning
from alexprep.shards.errors import AlexprepError
from alexprep.shards.files import publish_json
from alexprep.shards.versions import versions
from alexprep.train import runs
from alexprep.train.data import DataFacts, data_facts
from alexprep.train.parallel.split import SCHEMES, Scheme
from alexprep.train.places import place_named, saved_checkpoint
from alexprep.train.recipes import Recipe, recipe_named

DEFAULT_RECIPE = "alexnet"
OPTIONS = (
    "recipe",
    "seed",
    "batch_size",
    "lr",
    "init_from",
    "init_layers",
)  # what a resumed run takes from its beginning
DECODING = ("decode", "hw_decoder_load")  # likewise, see `_tuning`


@dataclass(frozen=True)
class TrainConfig:
    """What a caller may choose. None means: as the recipe has it, or when resuming, as the run began.

    Args:
        data: folder of the data set.
        recipe: name in the registry, "alexnet" by default.
        seed: of the initial weights, dropout, order and augmentation; 0 by default.
        batch_size: images a step.
        lr: learning rate of the first epoch.
        init_from: run (RUN or RUN@STEP) whose weights the network begins with; its own initial weights by default.
        init_layers: which layers of it, see `alexprep.train.init_from.init_from`; "matching" or patterns with commas.
        epochs: stop after this many, counted from the run's beginning.
        steps: stop after this many optimizer steps, counted from the run's beginning.
        runs: folder of all runs.
        name: of this run; the recipe's name, with a number if that is taken, by default.
        resume: continue the named run, or the one last active.
        keep: checkpoints kept.
        checkpoint_steps: steps between checkpoints; one more is made at every epoch's end.
        log_steps: steps between records in log.jsonl.
        threads: for decoding; as `alexprep tune` found, or one a core, by default.
        device: "cpu" or "cuda"; the GPU if there is one by default.
        ranks: processes that share the run, one a GPU where there are any.
        scheme: how they share it: "towers" as in the paper (the default for two), "ddp" (for more), "hybrid"; alone "single".

    Raises:
        AlexprepError: a number is out of its range.
    """

    data: Path
    recipe: str | None = None
    seed: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    init_from: str | None = None
    init_layers: str | None = None
    epochs: int | None = None
    steps: int | None = None
    runs: Path = Path("runs")
    name: str | None = None
    resume: bool = False
    keep: int = 3
    checkpoint_steps: int = 1000
    log_steps: int = 20
    threads: int | None = None
    device: str | None = None
    ranks: int = 1
    scheme: Scheme | None = None

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        for name in ("epochs", "steps", "keep", "checkpoint_steps", "log_steps", "threads", "ranks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AlexprepError(f"{name} is {value}: it must be at least 1")
        if self.scheme not in (None, *SCHEMES):
            raise AlexprepError(f"scheme {self.scheme!r} is not one of {', '.join(SCHEMES)}")
        if self.scheme is not None and (self.ranks == 1) != (self.scheme == "single"):
            raise AlexprepError(
                f"scheme {self.scheme} does not go with {self.ranks} ranks: one is single, more are not"
            )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise AlexprepError(f"seed is {self.seed}: it must be within 0 to 2^63 - 1")

    @property
    def chosen_scheme(self) -> Scheme:
        """The scheme, or what fits the number of ranks: with two, the paper's."""
        return self.scheme or {1: "single", 2: "towers"}.get(self.ranks, "ddp")  # type: ignore[return-value]


@dataclass(frozen=True)
class Job:
    """A run that is ready to begin or to go on."""

    config: TrainConfig
    run: Path
    recipe: Recipe
    seed: int
    facts: DataFacts
    device: torch.device
    scheme: Scheme
    tuning: Tuning
    notes: list[str]  # what to say about it
    identity: dict[str, Any]  # JSON values: what decides the result; a checkpoint of another identity is refused


def prepare(config: TrainConfig, device: torch.device | None = None) -> Job:
    """Reads the data set's facts, makes or finds the run's folder, and settles the recipe and, if not given, the device.

    Raises:
        AlexprepError: there is no such data, recipe, device or run, or the data does not suit the recipe.
    """
    device = device or choose_device(config.device)
    facts = data_facts(config.data)
    run, began = None, None
    if config.resume:
        run = runs.find_run(config.runs, config.name)
        began = runs.read_config(run)["options"]
        config = replace(config, **{name: began.get(name) for name in OPTIONS if getattr(config, name) is None})
    tuning, notes = _tuning(config, device, began)
    recipe = recipe_of({name: getattr(config, name) for name in OPTIONS})
    recipe.check_size(facts.size)
    seed = config.seed or 0
    identity = {"recipe": recipe.describe(), "seed": seed, "classes": facts.classes, "data_digest": facts.digest}
    if config.init_from is not None:
        # Made sure of before the run's folder is there; "newest" is settled for good.
        source = saved_checkpoint(place_named(config.runs, config.init_from))[0] if run is None else None
        if source is not None and "@" not in config.init_from:
            config = replace(config, init_from=f"{config.init_from}@{source.step}")
        identity["init"] = f"{config.init_from}, layers {config.init_layers or 'matching'}"
    if run is None:
        run = runs.create_run(config.runs, config.name, recipe.name)
        options = {"recipe": recipe.name, "seed": seed, "batch_size": recipe.batch_size, "lr": recipe.lr}
        options |= {"init_from": config.init_from, "init_layers": config.init_layers}
        options |= {"decode": tuning.decode_on(device.type), "hw_decoder_load": tuning.hw_decoder_load}
        document = {
            "options": options,
            "data": str(config.data.resolve()),
            "identity": identity,
            "versions": run_versions(),
        }
        publish_json(run / runs.CONFIG, document)
    return Job(config, run, recipe, seed, facts, device, config.chosen_scheme, tuning, notes, identity)


def _tuning(config: TrainConfig, device: torch.device, began: Mapping[str, Any] | None) -> tuple[Tuning, list[str]]:
    """The loader's settings, and what to say about them.

    Threads and steps ahead never show in the result. Where an image is decoded does, by a grey level here and there, so a resumed
    run decodes as it began (`began` holds its options), whatever was tuned since.
    """
    saved = saved_tuning(config.data, str(device))
    notes = [f"{problem}: `alexprep tune` makes it anew" for problem in saved.problems]
    tuning, origin = saved.tuning or Tuning(), ["from alexprep tune"] if saved.tuning else []
    if config.threads is not None:
        tuning = replace(tuning, threads=config.threads)
        origin += ["threads as given"] if saved.tuning else []
    if began is not None:
        where = str(device)
        kept = replace(tuning, **{name: began.get(name, getattr(Tuning(), name)) for name in DECODING})
        if (kept.decode_on(where), kept.hw_decoder_load) != (tuning.decode_on(where), tuning.hw_decoder_load):
            origin += ["decoding as the run began"]
        if device.type == "cpu" and kept.decode == "cuda":
            notes += ["the run began with images decoded on a GPU: from here on pixels may differ by a grey level"]
        tuning = kept
    if origin:
        notes += [f"loader settings: {tuning.words(str(device))}, {', '.join(origin)}"]
    return tuning, notes


def run_versions() -> dict[str, str]:
    """The versions that results depend on, down to the last bit."""
    return versions("alexprep", "torch", "numpy", "dali")


def recipe_of(options: Mapping[str, Any]) -> Recipe:
    """The recipe that options name, with their batch size and rate where they are not None.

    >>> recipe_of({"recipe": "tiny", "batch_size": 8, "lr": None}).batch_size
    8
    """
    recipe = recipe_named(options["recipe"] or DEFAULT_RECIPE)
    changes = {name: options[name] for name in ("batch_size", "lr") if options[name] is not None}
    return replace(recipe, **changes)
