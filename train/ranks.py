"""A training shared by several processes: ranks started here, or by torchrun."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from alexprep.pipeline.device import choose_device
from alexprep.shards.errors import AlexprepError
from alexprep.train.config import TrainConfig
from alexprep.train.distributed.world import World, from_environment
from alexprep.train.job import prepare
from alexprep.train.launch import launch
from alexprep.train.trainer import train


def train_anyhow(config: TrainConfig) -> dict[str, Any]:
    """Trains in this process, in `config.ranks` processes of this machine, or as one of torchrun's ranks.

    Returns:
        The summary, see `alexprep.train.trainer.train`.

    Raises:
        AlexprepError: see there; or a rank died or did not answer, which ends the others.
    """
    if _among_torchruns():
        if config.ranks not in (1, size := int(os.environ["WORLD_SIZE"])):
            raise AlexprepError(
                f"--gpus {config.ranks}, but torchrun started {size} ranks: leave --gpus out, torchrun's own options say how many"
            )
        return _joined(config)
    if config.ranks == 1:
        return train(config)
    _check_gpus(config)
    # This process makes the run, and the ranks go on with it: so none of them has to tell the others its name.
    job = prepare(config)
    going_on = replace(
        job.config,
        data=job.data.resolve(),
        runs=config.runs.resolve(),
        name=job.run.name,
        resume=True,
        scheme=job.scheme,
    )
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(going_on).items()}
    summary: dict[str, Any] = launch(
        "alexprep.train.ranks:train_rank",
        config.ranks,
        {"options": arguments},
        device=config.device,
        timeout=config.rank_seconds,
    )[0]
    return summary


def leads() -> bool:
    """Whether it is for this process to tell the result: of torchrun's ranks only the first does."""
    return not _among_torchruns() or os.environ.get("RANK") == "0"


def train_rank(world: World, options: Mapping[str, Any]) -> dict[str, Any]:
    """One rank's part; `options` are a `TrainConfig`'s as JSON values."""
    paths = {name: Path(options[name]) for name in ("data", "runs")}
    return train(TrainConfig(**{**options, **paths}), world=world)


def _joined(config: TrainConfig) -> dict[str, Any]:
    """torchrun's way: rank 0 makes the run, and all go on with it."""
    if config.name is None:
        raise AlexprepError("under torchrun the ranks need a common name for the run: give --name")
    world = from_environment(config.device, timeout=config.rank_seconds)
    config = replace(config, ranks=world.size)
    failure: AlexprepError | OSError | None = None
    if world.leads and not config.resume:
        try:
            prepare(config, world.device)
        except (AlexprepError, OSError) as error:
            failure = error
    if world.any(failure is not None):
        raise failure or AlexprepError("rank 0 could not begin the run, see its message")
    summary = train(replace(config, resume=True), world=world)
    world.close()  # only after a good end: else others may still wait in the groups, and closing would wait with them
    return summary


def _check_gpus(config: TrainConfig) -> None:
    """Makes sure, before the run has a folder, that each rank on this machine gets a GPU of its own.

    Raises:
        AlexprepError: there are too few, or one is named for all.
    """
    device = choose_device(config.device)
    if device.type != "cuda":
        return
    if device.index is not None:
        raise AlexprepError(f"{config.ranks} ranks cannot share {device}: name just cuda, for a GPU each")
    if config.ranks > torch.cuda.device_count():
        raise AlexprepError(
            f"{config.ranks} ranks need a GPU each, torch sees {torch.cuda.device_count()} here: start fewer, or take --device cpu"
        )


def _among_torchruns() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
