"""What to do, checked: the options of a training (`TrainConfig`), and the job that they come to on this machine (`prepare`).

Nothing is trained here, and no network lives on. What decides the result is the job's identity: a run is only resumed with the same one.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from alexprep.pipeline.device import choose_device
from alexprep.pipeline.loader_settings import Tuning, saved_tuning
from alexprep.shards import rgb_statistics
from alexprep.shards.dataset_format import versions
from alexprep.shards.errors import AlexprepError
from alexprep.train import run_dir
from alexprep.train.checkpoint import Checkpoint, differences, init_from, saved_weights, wanted_layers, with_defaults
from alexprep.train.data import DataFacts, data_facts
from alexprep.train.distributed.tensor_parallel import SCHEMES, Scheme, part_of
from alexprep.train.distributed.world import TIMEOUT, World
from alexprep.train.logger import writer_class
from alexprep.train.precision import Arithmetic, Precision, arithmetic
from alexprep.train.recipes import DEFAULT_RECIPE, MOST_EPOCHS, Recipe, recipe_of, try_user_network
from alexprep.train.run_dir import place_named, saved_checkpoint
from alexprep.train.user_code import MODEL, RECIPE, UserNetwork, check_named, comparable, is_reference, references

MOST_TRACED = 200  # steps
MOST_SECONDS = 1_000_000  # that ranks wait for one another: eleven days; system clocks take no more than some 10^9
KEEP, CHECKPOINT_STEPS = 3, 1000  # unless the run began with others
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
LENGTH = ("epochs", "steps")
REMEMBERED = (*LENGTH, "keep", "checkpoint_steps")  # likewise; what is given on resuming holds from then on
DECODING = ("decode", "hw_decoder_load")  # likewise, as it was tuned then
# Of fields of an identity that older runs lack, what holds for them: once released, a default never changes. Those of a recipe's
# fields are the defaults of its dataclasses.
IDENTITY_DEFAULTS = {"precision": "fp32"}
TWO_RANKS: tuple[Scheme, ...] = ("towers", "ddp")  # schemes to try by default
ANY_RANKS: tuple[Scheme, ...] = ("ddp",)


@dataclass(frozen=True)
class TrainConfig:
    """What a caller may choose for a training. None means: as the recipe has it, or when resuming, as the run began.

    Args:
        data: folder of the data set; only a resumed run has one of its own.
        recipe: name in the registry, "alexnet" by default; or a user's own: FILE.py, FILE.py:FUNCTION or MODULE:FUNCTION.
        model: the user's own network in the recipe's stead, likewise; see `alexprep.train.user_code`.
        seed: of the initial weights, dropout, order and augmentation; 0 by default.
        batch_size: images a step.
        lr: learning rate of the first epoch.
        init_from: run (RUN or RUN@STEP) whose weights the network begins with; its own initial weights by default.
        init_layers: which layers of it, see `alexprep.train.checkpoint.init_from`; "matching" or patterns with commas.
        epochs: stop after this many, counted from the run's beginning.
        steps: stop after this many optimizer steps, likewise. On resuming, epochs or steps take the place of both.
        runs: folder of all runs.
        name: of this run; that of the recipe or of the model's file, with a number if that is taken, by default.
        resume: continue the named run, or the one last active.
        keep: checkpoints kept, 3 by default.
        checkpoint_steps: steps between checkpoints, 1000 by default; one more is made at every epoch's end.
        log_steps: steps between records in log.jsonl.
        threads: for decoding; as `alexprep tune` found, or one a core, by default.
        device: "cpu" or "cuda"; the GPU if there is one by default.
        ranks: processes that share the run, one a GPU where there are any.
        precision: "fp32" by default, "tf32", "bf16" or "fp16": see `alexprep.train.precision`.
        channels_last: whether the values of a pixel lie side by side in memory; by default on a CPU, where it is faster.
        compile: whether steps are compiled by torch.compile; not by default.
        rank_seconds: that ranks wait for one another: no step, evaluation's step or checkpoint may take one of them longer.
        scheme: how they share it: "towers" as in the paper (the default for two, where it can split the network), "ddp" (the default
            otherwise), "hybrid"; alone "single".
        trace: steps to record for a trace viewer, see `alexprep.train.profiler`.
        tensorboard: whether the log's records are written for TensorBoard too, see `alexprep.train.logger`.

    Raises:
        AlexprepError: a number is out of its range.
    """

    data: Path | None = None
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
    keep: int | None = None
    checkpoint_steps: int | None = None
    log_steps: int = 20
    threads: int | None = None
    device: str | None = None
    ranks: int = 1
    rank_seconds: float = TIMEOUT
    scheme: Scheme | None = None
    trace: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        if self.data is None and not self.resume:
            raise AlexprepError("data is None: name the folder of a data set; only a resumed run has one of its own")
        for name in ("epochs", "steps", "keep", "checkpoint_steps", "log_steps", "threads", "ranks", "trace"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise AlexprepError(f"{name} is {value!r}: it must be a whole number, at least 1")
        if self.epochs is not None and self.epochs > MOST_EPOCHS:
            raise AlexprepError(f"epochs is {self.epochs}: it must be at most {MOST_EPOCHS}")
        if self.trace is not None and self.trace > MOST_TRACED:
            raise AlexprepError(
                f"trace is {self.trace}: at most {MOST_TRACED} steps are recorded, since all stay in memory until the last one"
            )
        if not 0 < self.rank_seconds <= MOST_SECONDS:
            raise AlexprepError(f"rank_seconds is {self.rank_seconds}: it must be above 0, and at most {MOST_SECONDS}")
        if self.scheme not in (None, *SCHEMES):
            raise AlexprepError(f"scheme {self.scheme!r} is not one of {', '.join(SCHEMES)}")
        if self.seed is not None and not (isinstance(self.seed, int) and 0 <= self.seed < 2**63):
            raise AlexprepError(f"seed is {self.seed!r}: it must be a whole number within 0 to 2^63 - 1")


@dataclass(frozen=True)
class Job:
    """A run that is ready to begin or to go on."""

    config: TrainConfig
    run: Path  # its folder
    data: Path  # folder of the data set
    recipe: Recipe
    seed: int
    facts: DataFacts
    device: torch.device
    scheme: Scheme
    computing: Arithmetic
    tuning: Tuning
    notes: list[str]  # what to say about it
    identity: dict[str, Any]  # JSON values: what decides the result; a checkpoint of another identity is refused
    initial: Checkpoint | None = None  # whose weights it begins with, where it was read already

    @property
    def epochs(self) -> int:
        """At most so many are trained."""
        return self.config.epochs or self.recipe.epochs

    @property
    def keep(self) -> int:
        """Checkpoints kept."""
        return self.config.keep or KEEP

    @property
    def checkpoint_steps(self) -> int:
        """Steps between checkpoints."""
        return self.config.checkpoint_steps or CHECKPOINT_STEPS

    def remembered(self) -> dict[str, Any]:
        """What a bare --resume goes on with, though it is no part of the identity."""
        return {name: getattr(self.config, name) for name in REMEMBERED} | {
            "keep": self.keep,
            "checkpoint_steps": self.checkpoint_steps,
        }

    def changes_since(self, earlier: Mapping[str, Any]) -> list[str]:
        """What decides the result and was not so when the run began, a sentence a field.

        Fields that one of both does not know are at their defaults in it: those that were added later change nothing by default.

        Args:
            earlier: of the run: its config.json, or the facts of a checkpoint, from this version or another.
        """
        made_with = earlier.get("versions", {})
        then, now = (
            IDENTITY_DEFAULTS | identity | {"recipe": with_defaults(identity.get("recipe"), self.recipe)}
            for identity in (comparable(earlier["identity"], made_with), comparable(self.identity, made_with))
        )
        return differences(then, now)

    def resume_options(self) -> str:
        """Options that go on with this run as it is trained now: --resume, and those that a run does not remember."""
        config, words = self.config, ["--resume"]
        if config.runs.resolve() != TrainConfig.runs.resolve():
            words += ["--runs", str(config.runs)]
        for option, reference in ((RECIPE, config.recipe), (MODEL, config.model)):
            if reference is not None and is_reference(reference):
                words += [option, reference]
        if config.ranks > 1:
            words += ["--gpus", str(config.ranks), "--scheme", self.scheme]
        return shlex.join([*words, *(["--device", config.device] if config.device else [])])

    def user_errors(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block, an exception from the user's own network becomes a sentence with its file and line."""
        own = self.recipe.network
        return own.errors(only_own=True) if isinstance(own, UserNetwork) else contextlib.nullcontext()


def prepare(
    config: TrainConfig, device: torch.device | None = None, *, dry_run: bool = False, check_statistics: bool = True
) -> Job:
    """Finds out all that a training needs to know, and makes or finds the run's folder.

    A beginning that would fail at once, as far as that can be known, fails here: before the run has a folder and a name.

    Args:
        config: what to do.
        device: of the training; by default as `config` says.
        dry_run: for measurements: there is no folder, nothing is written, and the job's `run` is the null device.
        check_statistics: whether the data set must have the statistics that the augmentation needs; not where batches come from elsewhere.

    Raises:
        AlexprepError: there is no such data, recipe, device or run, or the data does not suit the recipe.
    """
    device = device or choose_device(config.device)
    if config.tensorboard:
        writer_class()  # raises where the package is missing
    named, model = references(config.recipe, config.model)
    config = replace(config, recipe=named, model=model)
    run, earlier = Path(os.devnull) if dry_run else None, None
    if config.resume:
        run = run_dir.find_run(config.runs, config.name)
        document = run_dir.read_config(run)
        earlier = document["options"]
        check_named(earlier, config.recipe, config.model, run)
        config = resumed(config, earlier, config.data or run_dir.still_there(run, Path(document["data"])))
    data = config.data or Path()  # there is one: only a resumed run's may be None, and it is found by now
    facts = data_facts(data)
    tuning, notes = _tuning(config, data, device, earlier)
    notes += [f"the split {split} is skipped: none of its images has a label" for split in facts.unlabelled]
    recipe = recipe_of({name: getattr(config, name) for name in OPTIONS})
    recipe.check_size(facts.size)
    computing = arithmetic(device, config.precision, config.channels_last, config.compile)
    if computing.precision == "fp16" and device.type == "cpu":
        notes += ["fp16 on a CPU: gradients of convolutions take hundreds of times as long as in bf16"]
    seed = config.seed or 0
    identity = {"recipe": recipe.describe(), "seed": seed, "classes": facts.classes, "data_digest": facts.digest}
    identity["precision"] = computing.precision
    scheme = _scheme(config, recipe, facts.classes, seed)
    if isinstance(recipe.network, UserNetwork):
        recipe, made, said = try_user_network(recipe, recipe.network, facts.classes, seed, scheme, config.ranks)
        identity |= {"recipe": recipe.describe(), "layers": made}
        notes += said
    if run is None and recipe.augmentation.needs_statistics and check_statistics:
        rgb_statistics.read_statistics(data, facts.digest)
    initial = None
    if config.init_layers is not None and config.init_from is None:
        raise AlexprepError(
            f"--init-layers {config.init_layers} says which layers of another run: name it with --init-from"
        )
    if config.init_from is not None:
        if run is None:
            initial, skipped = saved_checkpoint(place_named(config.runs, config.init_from))
            notes += skipped
            network = recipe.make_network(facts.classes, seed)
            init_from(network.state_dict(), saved_weights(initial), wanted_layers(config.init_layers))
            if "@" not in config.init_from:
                config = replace(config, init_from=f"{config.init_from}@{initial.step}")
        identity["init"] = f"{config.init_from}, layers {config.init_layers or 'matching'}"
    job = Job(
        config, run or Path(), data, recipe, seed, facts, device, scheme, computing, tuning, notes, identity, initial
    )
    return job if run else replace(job, run=_new_run(job))


def resumed(config: TrainConfig, earlier: Mapping[str, Any], data: Path) -> TrainConfig:
    """What a run goes on with: what is given now, else what held before.

    Epochs and steps are one choice, how long to train: a run of 3 epochs that is given 10,000 steps now has no other end.

    Args:
        config: as given now.
        earlier: the run's options, see `alexprep.train.run_dir.read_config`; older ones lack some.
        data: the run's.
    """
    unless_given = [*OPTIONS, *REMEMBERED]
    if config.epochs is not None or config.steps is not None:
        unless_given = [name for name in unless_given if name not in LENGTH]
    taken: dict[str, Any] = {name: earlier.get(name) for name in unless_given if getattr(config, name) is None}
    return replace(config, data=data, **taken)


def run_versions() -> dict[str, str]:
    """The versions that results depend on, down to the last bit."""
    return versions("alexprep", "torch", "numpy", "dali")


def _scheme(config: TrainConfig, recipe: Recipe, classes: int, seed: int) -> Scheme:
    """How ranks share the network: as chosen; else two as the paper's towers, if it can be split so, and all others by ddp.

    Raises:
        AlexprepError: the scheme is not one for that many ranks, or cannot share this network.
    """
    ranks, scheme = config.ranks, config.scheme
    if ranks == 1:
        if scheme not in (None, "single"):
            raise AlexprepError(f"scheme {scheme} is for several ranks: add --gpus 2 or more")
        return "single"
    if scheme == "single":
        raise AlexprepError(f"scheme single is for one rank, there are {ranks}: use towers, ddp or hybrid")
    if isinstance(recipe.network, UserNetwork) or (scheme is not None and config.resume):
        return scheme or "ddp"
    for tried in [scheme] if scheme is not None else TWO_RANKS if ranks == 2 else ANY_RANKS:
        try:
            part_of(recipe.make_network(classes, seed), tried, World(0, ranks, torch.device("cpu")))
            break
        except AlexprepError:
            if tried in ("ddp", scheme):
                raise
    return tried


def _new_run(job: Job) -> Path:
    """Makes the run's folder, with a config.json that says all that a resumed run takes from its beginning."""
    chosen = {name: getattr(job.config, name) for name in OPTIONS}
    found = {
        "recipe": job.config.recipe or DEFAULT_RECIPE,
        "seed": job.seed,
        "batch_size": job.recipe.batch_size,
        "lr": job.recipe.lr,
        "precision": job.computing.precision,
        "compile": job.computing.compile,
        "decode": job.tuning.decode_on(job.device.type),
        "hw_decoder_load": job.tuning.hw_decoder_load,
    }
    document = {
        "options": chosen | found | job.remembered(),
        "data": str(job.data.resolve()),
        "identity": job.identity,
        "versions": run_versions(),
    }
    return run_dir.create_run(job.config.runs, job.config.name, _usual_name(job.recipe, job.config.model), document)


def _tuning(
    config: TrainConfig, data: Path, device: torch.device, earlier: Mapping[str, Any] | None
) -> tuple[Tuning, list[str]]:
    """The loader's settings, and what to say about them.

    Threads and steps ahead never show in the result. Where an image is decoded does, by a grey level here and there, so a resumed
    run decodes as it began (`earlier` holds its options), whatever was tuned since.
    """
    saved = saved_tuning(data, str(device))
    notes = [f"{problem}: `alexprep tune` makes it anew" for problem in saved.problems]
    tuning, origin = saved.tuning or Tuning(), ["from alexprep tune"] if saved.tuning else []
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks on this host
    if config.threads is not None:
        tuning = replace(tuning, threads=config.threads)
        origin += ["threads as given"] if saved.tuning else []
    elif together > 1:
        tuning = replace(tuning, threads=max(1, tuning.dali_threads // together))
    if earlier is not None:
        where = str(device)
        kept = replace(tuning, **{name: earlier.get(name, getattr(Tuning(), name)) for name in DECODING})
        if (kept.decode_on(where), kept.hw_decoder_load) != (tuning.decode_on(where), tuning.hw_decoder_load):
            origin += ["decoding as the run began"]
        if device.type == "cpu" and kept.decode == "cuda":
            notes += ["the run began with images decoded on a GPU: from here on pixels may differ by a grey level"]
        tuning = kept
    if origin:
        notes += [f"loader settings: {tuning.words(str(device))}, {', '.join(origin)}"]
    return tuning, notes


def _usual_name(recipe: Recipe, model: str | None) -> str:
    """What a run is called by default: as the recipe, or as the model's file."""
    network = recipe.network
    name = network.title.partition(":")[0].rpartition(".")[2] if model and isinstance(network, UserNetwork) else ""
    return name if run_dir.NAME.fullmatch(name) else recipe.name
