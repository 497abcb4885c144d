"""What a rank's network is fed, and from which place on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from alexprep.train.data import BatchSource, Examples, LoadedBatch, OpenLoader
from alexprep.train.distributed.parallel import Parallel
from alexprep.train.job import Job
from alexprep.train.runtime import Stopped, StopRequest
from alexprep.train.saved.init_from import init_from, saved_weights, wanted_layers
from alexprep.train.saved.places import place_named, saved_checkpoint
from alexprep.train.training_state import TrainingState


def open_split(job: Job, open_loader: OpenLoader, split: str, shard: tuple[int, int]) -> BatchSource:
    """A rank's loader of a split; `shard` is its (rank, world_size)."""
    training = split == "train"
    return open_loader(
        job.data,
        split,
        batch_size=job.recipe.batch_size,
        augmentation=job.recipe.augmentation,
        views="random" if training else "centre",
        order="shuffle" if training else "sequential",
        seed=job.seed,
        rank=shard[0],
        world_size=shard[1],
        device=str(job.device),
        layout=job.computing.memory.layout,
        threads=job.config.threads,
    )


def loader_position(loader: BatchSource, state: TrainingState) -> dict[str, int]:
    """The loader's state at the training's position. After an epoch's last step it is the next epoch's beginning."""
    epoch, step = state.position.epoch, state.position.epoch_step
    return loader.state_dict() | (
        {"epoch": epoch, "step": step} if step < len(loader) else {"epoch": epoch + 1, "step": 0}
    )


def until_stopped(parallel: Parallel, batches: Iterable[LoadedBatch], stop: StopRequest) -> Iterator[Examples]:
    """The ranks' batches; raises `Stopped` on all of them where one was asked to stop."""
    for batch in parallel.batches(batches, lambda: stop.signal):
        if parallel.requested is not None:
            raise Stopped
        yield batch


def where(job: Job, parallel: Parallel) -> str:
    """The devices and what they compute in, for people."""
    world = parallel.world
    devices = str(world.device) if world.size == 1 else f"{world.size} ranks ({parallel.scheme}), {world.device.type}"
    return f"{devices} in {job.computing.precision}{', compiled' if job.computing.compile else ''}"


def begin_with(parallel: Parallel, job: Job) -> list[str]:
    """Gives a network the weights of another run; what to say about it. Every rank does the same to the whole state.

    Raises:
        AlexprepError: there is no such checkpoint, or it does not fit.
    """
    notes: list[str] = []
    source = job.began_from
    if source is None:
        source, notes = saved_checkpoint(place_named(job.config.runs, job.config.init_from))
    whole = parallel.gather_state()
    report = init_from(whole, saved_weights(source), wanted_layers(job.config.init_layers))
    parallel.scatter_state(whole)
    return [*notes, *report.sentences()]
