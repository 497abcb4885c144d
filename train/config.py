"""What to do, checked: the options of a training (`TrainConfig`), and the job that they come to on this machine (`prepare`).

Nothing is trained here, and no network lives on. What decides the result is the job's identity: a run is only resumed with the same one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch

from alexprep.pipeline.augmentation import Place
from alexprep.pipeline.dataset import OnBad, open_dataset
from alexprep.pipeline.device import choose_device
from alexprep.pipeline.loader_settings import Tuning, saved_tuning
from alexprep.pipeline.sampler import STREAMS, Order
from alexprep.shards import rgb_statistics
from alexprep.shards.dataset_format import versions
from alexprep.shards.errors import AlexprepError, number_within, one_of, whole_number
from alexprep.shards.shard_cache import CACHE
from alexprep.shards.storage import folder_at, is_local, local_path
from alexprep.train import run_dir
from alexprep.train.checkpoint import differences, with_defaults
from alexprep.train.data import DataFacts, data_facts
from alexprep.train.distributed.hosts import check_alike, code_digest
from alexprep.train.distributed.tensor_parallel import SCHEMES, Scheme, part_of
from alexprep.train.distributed.world import TIMEOUT, World, rank_wait, started_elsewhere
from alexprep.train.initial_weights import begin_with, find_weights
from alexprep.train.logger import writer_class
from alexprep.train.lr_schedule import (
    ScheduleState,
    around,
    describe,
    is_per_step,
    looks_at_errors,
    planned,
    planned_epochs,
    rate_at,
    recorded_schedule,
    within,
)
from alexprep.train.precision import Arithmetic, Precision, arithmetic
from alexprep.train.recipes import (
    DEFAULT_RECIPE,
    MOST_EPOCHS,
    Recipe,
    hooked,
    try_user_network,
)
from alexprep.train.settings import PART, SET, by_field, recipe_of, schedule_named, value_of, with_settings
from alexprep.train.user_code import (
    HOOK,
    MODEL,
    RECIPE,
    UserNetwork,
    absolute,
    check_named,
    comparable,
    is_reference,
    references,
)

MOST_TRACED = 200  # steps; all stay in memory until the last one
MOST_SECONDS = 1_000_000  # that ranks wait for one another: eleven days; system clocks take no more than some 10^9
KEEP, CHECKPOINT_STEPS = 3, 1000  # unless the run began with others
SCHEDULING = ("schedule", "warmup", "early_stop")
# What holds from then on where it is given on resuming, as settings of the schedule's fields do; a change is kept in the run's history.
CHANGEABLE = ("lr", *SCHEDULING)
OPTIONS = (  # what a resumed run takes from its beginning
    *("recipe", "model", "seed", "batch_size", "order", *CHANGEABLE, "init_from", "init_layers"),
    *("precision", "channels_last", "compile", "hook", "hook_after", "statistics", "on_bad"),
)
LENGTH = ("epochs", "steps")
AS_OPTIONS = ("batch_size", *CHANGEABLE, "epochs")  # settings that are options: they mean these
# Likewise; what is given on resuming holds from then on.
REMEMBERED = (*LENGTH, "keep", "checkpoint_steps", "evaluate_every")
DECODING = ("decode", "hw_decoder_load")  # likewise, as it was tuned then
# What may be another on each host of a training: where things lie there, and how they are read.
OF_A_HOST = ("data", "runs", "name", "statistics", "recipe", "model", "hook", "init_from", "threads", "tensorboard")
# Of fields of an identity that older runs lack, what holds for them: once released, a default never changes. Those of a recipe's
# fields are the defaults of its dataclasses.
IDENTITY_DEFAULTS = {"precision": "fp32", "order": "shuffle"}


@dataclass(frozen=True)
class TrainConfig:
    """What a caller may choose for a training. None means: as the recipe has it, or when resuming, as the run began.

    Raises:
        AlexprepError: a number is out of its range.
    """

    # Folder of the data set, or anyone's webdataset, a folder, tar or pattern of tars; only a resumed run has one of its own.
    data: Path | None = None
    # Name in the registry, "alexnet" by default; or a user's own: FILE.py, FILE.py:FUNCTION or MODULE:FUNCTION.
    recipe: str | None = None
    # A network in the recipe's stead, likewise, see `alexprep.train.user_code`.
    model: str | None = None
    # An operation of the user's own in the augmentation, likewise; see `alexprep.pipeline.Hook`.
    hook: str | None = None
    hook_after: Place | None = None  # where: "decode", "augment" (the default) or "tensor"
    statistics: Path | str | None = None  # whose mean image and eigenpairs, if not the data's: a folder with stats/
    order: Order | None = (
        None  # of the training images, see `Loader`; "shuffle" by default, "streams" where the data are in a store
    )
    # What becomes of samples of other people's tars that cannot be used: "error" by default, or "skip".
    on_bad: OnBad | None = None
    seed: int | None = None  # of the initial weights, dropout, order and augmentation; 0 by default
    batch_size: int | None = None  # images a step
    lr: float | None = None  # highest learning rate, of which the schedule makes all others; on resuming, from now on
    schedule: str | None = None  # in the recipe's stead, see `alexprep.train.settings.schedule_named`
    warmup: float | None = None  # epochs in which the rate rises, in front of any schedule
    # End after so many epochs of which none had a lower validation error than all before; 0: never.
    early_stop: int | None = None
    # FIELD=VALUE, fields of the recipe that are other than it says: see `alexprep.train.settings`. On resuming, beside those of before.
    settings: tuple[str, ...] = ()
    # Whose weights the network begins with: RUN, RUN@STEP or RUN@best, or a state dict's file; see `alexprep.train.initial_weights`.
    init_from: str | None = None
    init_layers: str | None = None  # which layers of it: "matching", the default, or patterns with commas
    precision: Precision | None = None  # "fp32" by default, "tf32", "bf16" or "fp16": see `alexprep.train.precision`
    channels_last: bool | None = None  # whether a pixel's values lie side by side in memory; by default on a CPU
    compile: bool | None = None  # whether steps are compiled by torch.compile; not by default
    # Epochs and optimizer steps after which to stop, counted from the run's beginning. On resuming, either takes the place of both.
    epochs: int | None = None
    steps: int | None = None
    runs: Path = run_dir.RUNS  # folder of all runs
    name: str | None = None  # of this run; by default the recipe's or the model's file's, with a number if it is taken
    resume: bool = False  # go on with the named run, or with the one last active
    keep: int | None = None  # checkpoints kept, 3 by default
    checkpoint_steps: int | None = None  # between checkpoints, 1000 by default; one more is made at every epoch's end
    # Epochs between evaluations, 1 by default; after the last epoch there always is one.
    evaluate_every: int | None = None
    log_steps: int = 20  # between records in log.jsonl
    threads: int | None = None  # for decoding; as `alexprep tune` found, or one a core, by default
    device: str | None = None  # "cpu" or "cuda"; the GPU if there is one by default
    ranks: int = 1  # processes that share the run, one a GPU where there are any
    rank_seconds: float = TIMEOUT  # that they wait for one another: no step or checkpoint may take one of them longer
    # How they share it: "towers" as in the paper (the default for two, where it can split the network), "ddp" (the default
    # otherwise), "hybrid"; alone "single".
    scheme: Scheme | None = None
    trace: int | None = None  # steps to record for a trace viewer, see `alexprep.train.profiler`
    tensorboard: bool = False  # whether the log's records are written for TensorBoard too, see `alexprep.train.logger`

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError; settings that are options become these."""
        self._take_options(by_field(self.settings))
        if self.data is None and not self.resume:
            raise AlexprepError("data is None: name the folder of a data set; only a resumed run has one of its own")
        most, least = {"epochs": MOST_EPOCHS, "trace": MOST_TRACED}, {"early_stop": 0}
        for name in (
            "epochs",
            "steps",
            "early_stop",
            "keep",
            "checkpoint_steps",
            "evaluate_every",
            "log_steps",
            "threads",
            "ranks",
            "trace",
        ):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), least.get(name, 1), most.get(name, 2**40))
        if self.seed is not None:
            whole_number("seed", self.seed, 0, 2**63 - 1)
        if self.warmup is not None:
            number_within("warmup", self.warmup, 0, MOST_EPOCHS)
        if self.hook_after is not None:
            one_of("hook_after", self.hook_after, get_args(Place))
            if self.hook is None and not self.resume:
                raise AlexprepError(f"--hook-after {self.hook_after} says where a hook goes: name it with --hook")
        if self.on_bad is not None:
            one_of("on_bad", self.on_bad, get_args(OnBad))
            if self.on_bad == "skip" and self.ranks > 1:
                raise AlexprepError(
                    "--on-bad skip is for one rank, since ranks must agree on every step: make a data set with `alexprep shard`"
                )
        if self.order is not None:
            one_of("order", self.order, get_args(Order))
        if self.scheme is not None:
            one_of("scheme", self.scheme, SCHEMES)
        number_within("rank_seconds", self.rank_seconds, 1e-3, MOST_SECONDS)

    @property
    def rank_wait(self) -> float:
        """Seconds that ranks wait for one another, see `alexprep.train.distributed.world.rank_wait`."""
        places = (self.runs, self.data, self.statistics, self.init_from)
        return rank_wait(self.rank_seconds, any(map(_is_in_store, places)) or self._goes_on_in_store())

    def _goes_on_in_store(self) -> bool:
        """Whether a run that goes on has something of its own in a store; or whether that cannot be known, on a host without the run."""
        if not self.resume:
            return False
        try:
            began = _found_run(self)["config"]
        except (AlexprepError, OSError):
            return True
        own = [began["options"].get(name) for name in ("statistics", "init_from")]
        return any(map(_is_in_store, own if self.data is not None else (*own, began["data"])))

    def _take_options(self, settings: dict[str, str]) -> None:
        """Moves those of `AS_OPTIONS` to their fields, so that there is one place for each."""
        for name in AS_OPTIONS:
            text = settings.pop(name, None)
            if text is None:
                continue
            if getattr(self, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise AlexprepError(f"{option} {getattr(self, name)} and {SET} {name}={text} say the same: give one")
            object.__setattr__(self, name, value_of(text, TrainConfig, name))
        object.__setattr__(self, "settings", tuple(f"{name}={text}" for name, text in settings.items()))


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
    order: Order  # in which the training images come
    computing: Arithmetic
    tuning: Tuning
    notes: list[str]  # what to say about it
    identity: dict[str, Any]  # JSON values: what decides the result; a checkpoint of another identity is refused
    changes: dict[str, Any] = field(default_factory=dict)  # made on resuming, of what may change: {"was", "is"} by name

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

    @property
    def evaluate_every(self) -> int:
        """Epochs between evaluations."""
        return self.config.evaluate_every or 1

    def remembered(self) -> dict[str, Any]:
        """What a bare --resume goes on with, though it is no part of the identity."""
        taken = (*LENGTH, *(name for name in CHANGEABLE if name in self.changes))
        told = {name: getattr(self.config, name) for name in taken}
        told |= {"scheme": self.scheme} if self.config.ranks > 1 else {}
        rhythm = {name: getattr(self, name) for name in ("keep", "checkpoint_steps", "evaluate_every")}
        return told | {"settings": list(self.config.settings)} | rhythm

    def differences(self, config: Mapping[str, Any], facts: Mapping[str, Any] | None) -> list[str]:
        """Why a run cannot go on with this job: what its config.json, and its checkpoint's facts if there is one, say otherwise.

        What may change on resuming is compared with config.json alone, which has the last change before this one.
        """
        leaving = {"lr" if name == "lr" else "schedule" for name in self.changes}
        found = self.changes_since(config, leaving)
        found += [] if facts is None else self.changes_since(facts, {"lr", "schedule"})
        return list(dict.fromkeys(found))

    def changes_since(self, earlier: Mapping[str, Any], leaving: Collection[str] = ()) -> list[str]:
        """What decides the result and was not so in a run's config.json or a checkpoint's facts, a sentence a field.

        `leaving` names fields of the recipe that are not compared. Fields that one of both does not know are at their defaults in it: those that were added later change nothing by default.
        """
        made_with = earlier.get("versions", {})
        then, now = (
            IDENTITY_DEFAULTS | identity | {"recipe": with_defaults(identity.get("recipe"), self.recipe)}
            for identity in (comparable(earlier["identity"], made_with), comparable(self.identity, made_with))
        )
        for one in (then, now):
            if isinstance(one["recipe"], dict):
                one["recipe"] = {name: value for name, value in one["recipe"].items() if name not in leaving}
        return differences(then, now)

    def resume_options(self) -> str:
        """Options that go on with this run as it is trained now: --resume, and those that a run does not remember."""
        config, words = self.config, ["--resume", *run_dir.runs_option(self.config.runs)]
        for option, reference in ((RECIPE, config.recipe), (MODEL, config.model), (HOOK, config.hook)):
            if reference is not None and is_reference(reference):
                words += [option, reference]
        if config.ranks > 1 and not started_elsewhere():
            words += ["--gpus", str(config.ranks)]
        return shlex.join([*words, *(["--device", config.device] if config.device else [])])

    def user_errors(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block, an exception from the user's own network becomes a sentence with its file and line."""
        own = self.recipe.network
        return own.errors(only_own=True) if isinstance(own, UserNetwork) else contextlib.nullcontext()


def _initial_weights(config: TrainConfig, recipe: Recipe, classes: int, seed: int) -> tuple[TrainConfig, list[str]]:
    """The options with the weights to begin with by the name that finds them again, and what is to be said of them."""
    if config.init_from is None:
        if config.init_layers is None:
            return config, []
        raise AlexprepError(
            f"--init-layers {config.init_layers} says which layers of other weights: name these with --init-from"
        )
    weights = find_weights(config.runs, config.init_from)
    begin_with(recipe.make_network(classes, seed).state_dict(), weights, config.init_layers)
    return replace(config, init_from=weights.name), list(weights.notes)


def prepare(
    config: TrainConfig, device: torch.device | None = None, *, dry_run: bool = False, check_statistics: bool = True
) -> Job:
    """Finds out all that a training needs to know, and makes or finds the run's folder.

    A beginning that would fail at once, as far as that can be known, fails here: before the run has a folder and a name. With
    `dry_run`, for measurements, nothing is written and the job's `run` is the null device. Where batches come from elsewhere, the
    statistics that the augmentation needs are not checked.
    """
    found = _found_run(config) if config.resume else None
    job = _planned(config, device or choose_device(config.device), found, dry_run, check_statistics)
    return job if found or dry_run else replace(job, run=_new_run(job))


def prepare_together(config: TrainConfig, world: World, *, check_statistics: bool = True) -> Job:
    """`prepare` by all ranks of a training: rank 0 makes or finds the run's folder, which the others need not see.

    Raises:
        AlexprepError: on all ranks the same, where one of them cannot begin, or would not do the same as rank 0.
    """
    if world.size == 1:
        return prepare(config, world.device, check_statistics=check_statistics)
    found = world.of_first(lambda: _found_run(config) if config.resume else None)
    job = error = None
    try:
        job = _planned(config, world.device, found, False, check_statistics, leads=world.leads)
    except AlexprepError as problem:
        error = problem.as_made
    check_alike(world, _told(config, job, error))
    assert job is not None
    if found is not None:
        return job
    planned = job
    made = world.of_first(lambda: [_new_run(planned).name, *(getattr(planned.tuning, name) for name in DECODING)])
    decoding = dict(zip(DECODING, made[1:], strict=True))
    return replace(job, run=config.runs / made[0], tuning=replace(job.tuning, **decoding))


def _told(config: TrainConfig, job: Job | None, error: str | None) -> dict[str, Any]:
    """What a rank tells the others of its job, see `check_alike`."""
    options = {name: value for name, value in asdict(config).items() if name not in OF_A_HOST}
    identity = {} if job is None else {name: value for name, value in job.identity.items() if name != "init"}
    return {
        "error": error,
        "data": str(config.data if job is None else job.data),
        "versions": run_versions() | {"code": code_digest()},
        "options": options | {"init_from": config.init_from is not None},
        "identity": identity,
    }


def _is_in_store(place: object) -> bool:
    """Whether a path or the text of one is in a store; None is nowhere."""
    return local_path(str(place)) is None


def _found_run(config: TrainConfig) -> dict[str, Any]:
    """The run to go on with: the name of its folder, and its config.json."""
    run = run_dir.find_run(config.runs, config.name)
    return {"name": run.name, "config": run_dir.read_config(run)}


def _planned(
    config: TrainConfig,
    device: torch.device,
    found: Mapping[str, Any] | None,
    dry_run: bool,
    check_statistics: bool,
    leads: bool = True,
) -> Job:
    """The job, whose run has no folder yet unless it was `found`; the weights to begin with are looked at by the rank that leads."""
    if config.tensorboard:
        writer_class()  # raises where the package is missing
    named, model = references(config.recipe, config.model)
    config = replace(config, recipe=named, model=model, hook=config.hook and absolute(config.hook, HOOK))
    run, earlier, began = Path(os.devnull) if dry_run else None, None, None
    changes: dict[str, Any] = {}
    if found is not None:
        run, document = config.runs / found["name"], found["config"]
        earlier, began = document["options"], document["identity"].get("recipe", {})
        check_named(earlier, config.recipe, config.model, run, config.hook)
        changes = _changes(config, earlier, began)
        config = resumed(config, earlier, config.data or run_dir.still_there(run, folder_at(document["data"])))
    data = config.data or Path()  # there is one: only a resumed run's may be None, and it is found by now
    facts = data_facts(data)
    if config.statistics is not None:
        config = replace(config, statistics=str(folder_at(config.statistics).resolve()))
    tuning, notes = _tuning(config, data, device, earlier)
    notes += [f"the split {split} is skipped: none of its images has a label" for split in facts.unlabelled]
    notes += [f"with {', '.join(config.settings)}"] if config.settings else []
    recipe = recipe_of({name: getattr(config, name) for name in (*OPTIONS, "settings")}, began)
    recipe = _scheduled(recipe, config, began, earlier or {}, changes)
    if config.hook is not None:
        recipe = hooked(recipe, config.hook, config.hook_after or "augment")
    recipe.check_sides(facts.sides)
    computing = arithmetic(device, config.precision, config.channels_last, config.compile)
    if computing.precision == "fp16" and device.type == "cpu":
        notes += ["fp16 on a CPU: gradients of convolutions take hundreds of times as long as in bf16"]
    seed = config.seed or 0
    identity = {"recipe": recipe.describe(), "seed": seed, "classes": facts.classes, "data_digest": facts.digest}
    order = config.order or ("shuffle" if is_local(data) else "streams")
    identity |= {"precision": computing.precision} | ({"order": order} if order != "shuffle" else {})
    scheme = _scheme(config, recipe, facts.classes, seed, (earlier or {}).get("scheme"))
    notes += [] if is_local(data) else _notes_of_a_store(config, data, order, scheme)
    recipe.check_scheme(scheme)
    if isinstance(recipe.network, UserNetwork):
        recipe, made, said = try_user_network(recipe, recipe.network, facts.classes, seed, scheme, config.ranks)
        identity |= {"recipe": recipe.describe(), "layers": made}
        notes += said
    if summary := recipe.summary():
        notes.append(f"layers of {summary}")
    several_sizes = recipe.early_crops or recipe.evaluation_crop is not None
    if several_sizes or (config.settings and not isinstance(recipe.network, UserNetwork)):  # nobody tried them
        notes += recipe.check_network(facts.classes, seed, config.epochs or recipe.epochs, computing.compile)
    if check_statistics:
        identity |= _check_images(config, data, recipe, begins=run is None)
    if run is None and leads:
        config, said = _initial_weights(config, recipe, facts.classes, seed)
        notes += said
    if config.init_from is not None:
        identity["init"] = f"{config.init_from}, layers {config.init_layers or 'matching'}"
    decided = data, recipe, seed, facts, device, scheme, order, computing, tuning, notes, identity, changes
    return Job(config, run or Path(), *decided)


def _notes_of_a_store(config: TrainConfig, data: Path, order: Order, scheme: Scheme) -> list[str]:
    """Which order was chosen, and which rank fetches what; AlexprepError for the order that a store is too slow for."""
    if order == "shuffle":
        raise AlexprepError(
            f"--order shuffle reads single images, which is slow where they are in a store, {data}: take --order streams"
        )
    notes = []
    if config.order is None:
        notes = [f"images come in {STREAMS} streams of shards, since {data} is a store: --order says otherwise"]
    if config.ranks > 1 and order == "streams" and scheme != "towers" and STREAMS % config.ranks == 0:
        notes.append(f"each of the {config.ranks} ranks fetches training shards of its own (order streams)")
    elif config.ranks > 1 and not os.environ.get(CACHE):
        why = "towers, every rank reads every image" if scheme == "towers" else f"order {order}, ranks share shards"
        notes.append(f"with {why}: --cache FOLDER fetches each shard once a host")
    return notes


def _check_images(config: TrainConfig, data: Path, recipe: Recipe, *, begins: bool) -> dict[str, Any]:
    """Makes sure that a training that begins can augment its images so; of statistics that are not the data's own gives whose they are."""
    statistics = None
    if recipe.augmentation.needs_statistics and (begins or config.statistics is not None):
        statistics = rgb_statistics.read_statistics(config.statistics or data)
    if begins:
        open_dataset(data, "train", config.on_bad or "error").check(recipe.augmentation, statistics)
    return {} if statistics is None or config.statistics is None else {"statistics": statistics.data_digest}


def _scheduled(
    recipe: Recipe,
    config: TrainConfig,
    began: Mapping[str, Any] | None,
    earlier: Mapping[str, Any],
    changes: Mapping[str, Any],
) -> Recipe:
    """A recipe with the schedule that is asked for, as long as the run; one that goes on has the schedule and the length that it began with.

    That of a recipe of ours is taken from the run's record, since a release may ship a better one; a user's own is as the file has it.
    """
    length = epochs = config.epochs or recipe.epochs
    settings = _schedule_settings(config.settings)
    schedule = recipe.schedule if config.schedule is None else schedule_named(config.schedule)
    if began is not None and "schedule" not in changes:
        described = began.get("schedule", {})
        length = planned_epochs(described) or length
        recorded = None if is_reference(config.recipe or DEFAULT_RECIPE) else recorded_schedule(described)
        if recorded is not None:
            schedule = within(recorded, earlier.get("warmup"), earlier.get("early_stop"))
            settings = {name: text for name, text in settings.items() if name in changes}
    schedule = with_settings(replace(recipe, schedule=schedule), settings).schedule
    schedule = around(planned(schedule, length), config.warmup, config.early_stop)
    if (every := config.evaluate_every or 1) > 1 and looks_at_errors(schedule):
        raise AlexprepError(
            f"--evaluate-every {every} does not go with a schedule that looks at every epoch's error, as this {describe(schedule)['kind']} "
            "does: take --evaluate-every 1, or another --schedule, without --early-stop"
        )
    if is_per_step(schedule) and epochs > length and not rate_at(schedule, 1.0, ".weight", epochs, ScheduleState()):
        asked = (
            "are asked for: add"
            if config.epochs
            else f"are the recipe's: add --epochs {length}, to go on as planned, or"
        )
        raise AlexprepError(
            f"the schedule has brought the rate to 0 after {length} epochs, and {epochs} {asked} --schedule {config.schedule or 'linear'}, "
            "which plans the rate anew for all of them"
        )
    return replace(recipe, schedule=schedule)


def _schedule_settings(settings: Iterable[str]) -> dict[str, str]:
    """Those of the schedule's fields."""
    return {name: text for name, text in by_field(settings).items() if name.startswith(PART)}


def _changes(config: TrainConfig, earlier: Mapping[str, Any], began: Mapping[str, Any]) -> dict[str, Any]:
    """What is given on resuming and may change, where it is not as before: {"was", "is"} by name."""
    given = {name: getattr(config, name) for name in CHANGEABLE if getattr(config, name) is not None}
    changes = {name: {"was": earlier.get(name), "is": now} for name, now in given.items() if now != earlier.get(name)}
    before = by_field(earlier.get("settings") or ())
    for name, text in _schedule_settings(config.settings).items():
        if text == before.get(name):
            continue
        was: Any = began
        for part in name.split("."):
            was = was.get(part) if isinstance(was, Mapping) else None
        with contextlib.suppress(ValueError):
            text = json.loads(text)
        changes[name] = {"was": was, "is": text}
    return changes


def resumed(config: TrainConfig, earlier: Mapping[str, Any], data: Path) -> TrainConfig:
    """What a run goes on with: what is given now, else what held before.

    Epochs and steps are one choice, how long to train: a run of 3 epochs that is given 10,000 steps now has no other end. Older
    runs' options lack some.
    """
    unless_given = [*OPTIONS, *REMEMBERED]
    if config.epochs is not None or config.steps is not None:
        unless_given = [name for name in unless_given if name not in LENGTH]
    taken: dict[str, Any] = {name: earlier.get(name) for name in unless_given if getattr(config, name) is None}
    before = [text for text in earlier.get("settings") or () if config.schedule is None or not text.startswith(PART)]
    return replace(config, data=data, settings=(*before, *config.settings), **taken)


def run_versions() -> dict[str, str]:
    """The versions that results depend on, down to the last bit."""
    return versions("alexprep", "torch", "numpy", "dali")


def _scheme(config: TrainConfig, recipe: Recipe, classes: int, seed: int, earlier: Scheme | None) -> Scheme:
    """How ranks share the network: as chosen; else as several did earlier; else two as the paper's towers, and all others by ddp.

    What was not chosen gives way to ddp where the network cannot be split so.
    """
    ranks, scheme = config.ranks, config.scheme
    if ranks == 1:
        if scheme not in (None, "single"):
            raise AlexprepError(f"scheme {scheme} is for several ranks: add --gpus 2 or more")
        return "single"
    if scheme == "single":
        raise AlexprepError(f"scheme single is for one rank, there are {ranks}: use towers, ddp or hybrid")
    if isinstance(recipe.network, UserNetwork) or (scheme is not None and config.resume):
        return scheme or earlier or "ddp"
    tried = scheme or earlier or ("towers" if ranks == 2 else "ddp")
    try:
        part_of(recipe.make_network(classes, seed), tried, World(0, ranks, torch.device("cpu")))
    except AlexprepError:
        if scheme is not None or tried == "ddp":
            raise
        return _scheme(replace(config, scheme="ddp"), recipe, classes, seed, None)
    return tried


def _new_run(job: Job) -> Path:
    """Makes the run's folder, with a config.json that says all that a resumed run takes from its beginning."""
    chosen = {name: getattr(job.config, name) for name in OPTIONS}
    found = {
        "recipe": job.config.recipe or DEFAULT_RECIPE,
        "seed": job.seed,
        "batch_size": job.recipe.batch_size,
        "lr": job.recipe.lr,
        "order": job.order,
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
    usual_name, network = job.recipe.name, job.recipe.network
    if job.config.model is not None and isinstance(network, UserNetwork):
        usual_name = network.short_name if run_dir.NAME.fullmatch(network.short_name) else usual_name
    return run_dir.create_run(job.config.runs, job.config.name, usual_name, document)


def _tuning(
    config: TrainConfig, data: Path, device: torch.device, earlier: Mapping[str, Any] | None
) -> tuple[Tuning, list[str]]:
    """The loader's settings, and what to say about them.

    Threads and steps ahead never show in the result. Where an image is decoded does, by a grey level here and there, so a resumed
    run decodes as it began (`earlier` holds its options), whatever was tuned since.
    """
    saved, problems = saved_tuning(data, str(device))
    notes = [f"{problem}: `alexprep tune` makes it anew" for problem in problems]
    tuning, origin = saved or Tuning(), ["from alexprep tune"] if saved else []
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks on this host
    if config.threads is not None:
        tuning = replace(tuning, threads=config.threads)
        origin += ["threads as given"] if saved else []
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
