"""What a caller chooses, and what follows from it: the run's folder, its recipe, and its identity."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from alexprep.pipeline.device import choose_device
from alexprep.pipeline.tuning import Tuning, saved_tuning
from alexprep.shards.errors import AlexprepError
from alexprep.shards.versions import versions
from alexprep.train import runs
from alexprep.train.board import writer_class
from alexprep.train.checkpoint import Checkpoint
from alexprep.train.data import DataFacts, data_facts
from alexprep.train.own import OwnNetwork
from alexprep.train.own_run import settle
from alexprep.train.parallel.split import SCHEMES, Scheme
from alexprep.train.places import place_named, saved_checkpoint
from alexprep.train.precision import Arithmetic, Precision, arithmetic
from alexprep.train.recipes import DEFAULT_RECIPE, Recipe, check_named, recipe_of, references

MOST_TRACED = 200  # steps
OPTIONS = (
    "recipe",
    "model",
    "seed",
    "batch_size",
    "lr",
    "init_from",
    "init_layers",
    "precision",
    "channels_last",
    "compile",
)  # what a resumed run takes from its beginning
DECODING = ("decode", "hw_decoder_load")  # likewise, see `_tuning`


@dataclass(frozen=True)
class TrainConfig:
    """What a caller may choose. None means: as the recipe has it, or when resuming, as the run began.

    Args:
        data: folder of the data set.
        recipe: name in the registry, "alexnet" by default; or a user's own: FILE.py, FILE.py:FUNCTION or MODULE:FUNCTION.
        model: the user's own network in the recipe's stead, likewise; see `alexprep.train.own`.
        seed: of the initial weights, dropout, order and augmentation; 0 by default.
        batch_size: images a step.
        lr: learning rate of the first epoch.
        init_from: run (RUN or RUN@STEP) whose weights the network begins with; its own initial weights by default.
        init_layers: which layers of it, see `alexprep.train.init_from.init_from`; "matching" or patterns with commas.
        epochs: stop after this many, counted from the run's beginning.
        steps: stop after this many optimizer steps, counted from the run's beginning.
        runs: folder of all runs.
        name: of this run; that of the recipe or of the model's file, with a number if that is taken, by default.
        resume: continue the named run, or the one last active.
        keep: checkpoints kept.
        checkpoint_steps: steps between checkpoints; one more is made at every epoch's end.
        log_steps: steps between records in log.jsonl.
        threads: for decoding; as `alexprep tune` found, or one a core, by default.
        device: "cpu" or "cuda"; the GPU if there is one by default.
        ranks: processes that share the run, one a GPU where there are any.
        precision: "fp32" by default, "tf32", "bf16" or "fp16": see `alexprep.train.precision`.
        channels_last: whether the values of a pixel lie side by side in memory; by default on a CPU, where it is faster.
        compile: whether steps are compiled by torch.compile; not by default.
        scheme: how they share it: "towers" as in the paper (the default for two), "ddp" (for more), "hybrid"; alone "single".
        trace: steps to record for a trace viewer, see `alexprep.train.trace`.
        tensorboard: whether the log's records are written for TensorBoard too, see `alexprep.train.board`.

    Raises:
        AlexprepError: a number is out of its range.
    """

    data: Path
    recipe: str | None = None
    model: str | None = None
    seed: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    init_from: str | None = None
    init_layers: str | None = None
    precision: Precision | None = None
    channels_last: bool | None = None
    compile: bool | None = None
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
    trace: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        for name in ("epochs", "steps", "keep", "checkpoint_steps", "log_steps", "threads", "ranks", "trace"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AlexprepError(f"{name} is {value}: it must be at least 1")
        if self.trace is not None and self.trace > MOST_TRACED:
            raise AlexprepError(
                f"trace is {self.trace}: at most {MOST_TRACED} steps are recorded, since all stay in memory until the last one"
            )
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
        """The scheme, or what fits the number of ranks: with two, the paper's, but for a network of the user's own."""
        usual = {1: "single", 2: "towers" if self.model is None else "ddp"}
        return self.scheme or usual.get(self.ranks, "ddp")  # type: ignore[return-value]


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
    computing: Arithmetic
    tuning: Tuning
    notes: list[str]  # what to say about it
    identity: dict[str, Any]  # JSON values: what decides the result; a checkpoint of another identity is refused
    source: Checkpoint | None = None  # whose weights it begins with, where it was read already

    def blamed(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block, an exception that comes by way of the user's own network becomes a sentence with its file and line."""
        own = self.recipe.network
        return own.blamed(only=True) if isinstance(own, OwnNetwork) else contextlib.nullcontext()


def prepare(config: TrainConfig, device: torch.device | None = None, *, rehearsal: bool = False) -> Job:
    """Reads the data set's facts, makes or finds the run's folder, and settles the recipe and, if not given, the device.

    A rehearsal, for measurements, has no folder: nothing is written, and the job's `run` is the null device.

    Raises:
        AlexprepError: there is no such data, recipe, device or run, or the data does not suit the recipe.
    """
    device = device or choose_device(config.device)
    if config.tensorboard:
        writer_class()  # made sure of before the run's folder is there
    facts = data_facts(config.data)
    named, model = references(config.recipe, config.model)
    config = replace(config, recipe=named, model=model)
    run, began = Path(os.devnull) if rehearsal else None, None
    if config.resume:
        run = runs.find_run(config.runs, config.name)
        began = runs.read_config(run)["options"]
        check_named(began, config.recipe, config.model, run)
        config = replace(config, **{name: began.get(name) for name in OPTIONS if getattr(config, name) is None})
    tuning, notes = _tuning(config, device, began)
    notes += [f"the split {split} is skipped: none of its images has a label" for split in facts.unlabelled]
    recipe = recipe_of({name: getattr(config, name) for name in OPTIONS})
    recipe.check_size(facts.size)
    computing = arithmetic(device, config.precision, config.channels_last, config.compile)
    if computing.precision == "fp16" and device.type == "cpu":
        notes += ["fp16 on a CPU: gradients of convolutions take hundreds of times as long as in bf16"]
    seed = config.seed or 0
    identity = {"recipe": recipe.describe(), "seed": seed, "classes": facts.classes, "data_digest": facts.digest}
    identity["precision"] = computing.precision
    if isinstance(recipe.network, OwnNetwork):
        recipe, made, said = settle(recipe, recipe.network, facts.classes, seed, config.chosen_scheme, config.ranks)
        identity |= {"recipe": recipe.describe(), "layers": made}
        notes += said
    source = None
    if config.init_from is not None:
        if run is None:  # Made sure of before the run's folder is there; "newest" is settled for good.
            source, skipped = saved_checkpoint(place_named(config.runs, config.init_from))
            notes += skipped
            if "@" not in config.init_from:
                config = replace(config, init_from=f"{config.init_from}@{source.step}")
        identity["init"] = f"{config.init_from}, layers {config.init_layers or 'matching'}"
    if run is None:
        options: dict[str, Any] = {"recipe": config.recipe or DEFAULT_RECIPE, "model": config.model, "seed": seed}
        options |= {"batch_size": recipe.batch_size, "lr": recipe.lr}
        options |= {"init_from": config.init_from, "init_layers": config.init_layers}
        options |= {
            "precision": computing.precision,
            "channels_last": config.channels_last,
            "compile": computing.compile,
        }
        options |= {"decode": tuning.decode_on(device.type), "hw_decoder_load": tuning.hw_decoder_load}
        document = {
            "options": options,
            "data": str(config.data.resolve()),
            "identity": identity,
            "versions": run_versions(),
        }
        run = runs.create_run(config.runs, config.name, _usual_name(recipe, config.model), document)
    return Job(
        config, run, recipe, seed, facts, device, config.chosen_scheme, computing, tuning, notes, identity, source
    )


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


def _usual_name(recipe: Recipe, model: str | None) -> str:
    """What a run is called by default: as the recipe, or as the model's file."""
    network = recipe.network
    name = network.title.partition(":")[0].rpartition(".")[2] if model and isinstance(network, OwnNetwork) else ""
    return name if runs.NAME.fullmatch(name) else recipe.name
