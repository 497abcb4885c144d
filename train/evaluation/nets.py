"""Trained networks, ready to be evaluated: RUN or RUN@STEP → a network and what must be known of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.errors import AlexprepError
from alexprep.train import checkpoint, run_dir
from alexprep.train.data import memory
from alexprep.train.own.tryout import comparable, fitting_format, layers
from alexprep.train.recipes.recipe import Recipe
from alexprep.train.recipes.registry import check_named, recipe_of, references
from alexprep.train.saved.places import Place, saved_checkpoint
from alexprep.train.training_state import load_weights
from alexprep.train.user_code import is_reference

# The parts of a recipe that outputs of a trained network depend on; the others belong to the training that is over.
NETWORK = ("network", "width")
PIXELS = ("crop", "scale", "evaluation_scale", "mean", "std")


@dataclass(frozen=True)
class Net:
    """A trained network in evaluation mode.

    Attributes:
        run: its folder.
        step: optimizer steps of its checkpoint.
        epochs: whole epochs of it.
        recipe: with which it was trained.
        options: of its run, as config.json has them.
        data: the data set that it was trained on, as its run says.
        data_digest: of that data set, hex sha256.
        classes: how many it tells apart.
        network: on its device.
        skipped: a sentence for every damaged checkpoint that is newer than the one used.
    """

    run: Path
    step: int
    epochs: int
    recipe: Recipe
    options: dict[str, Any]
    data: Path
    data_digest: str
    classes: int
    network: nn.Module
    skipped: list[str]

    @property
    def name(self) -> str:
        """RUN@STEP, as on the command line."""
        return f"{self.run.name}@{self.step}"

    def training_data(self) -> dict[str, Any] | None:
        """dataset.json of the data that it was trained on; None where that is gone or has changed."""
        try:
            dataset = read_dataset(self.data)
        except (AlexprepError, OSError):
            return None
        return dataset if dataset["digest"] == self.data_digest else None


def open_net(place: Place, device: torch.device, recipe: str | None = None, model: str | None = None) -> Net:
    """Reads a checkpoint and makes its network.

    Args:
        place: of the checkpoint.
        device: for the network.
        recipe: the user's own recipe, if its run has one.
        model: likewise the user's own network.

    Raises:
        AlexprepError: there is no such checkpoint, it is damaged, or its recipe is another by now.
    """
    run = place.run
    config = run_dir.read_config(run)
    saved, skipped = saved_checkpoint(place)
    identity = saved.facts["identity"]
    made_by = recipe_of(_named(run, config["options"], recipe, model))
    if changes := checkpoint.differences(_shown(identity["recipe"]), _shown(made_by.describe())):
        raise AlexprepError(f"recipe {made_by.name} has changed since {run} was trained: {checkpoint.some_of(changes)}")
    network = made_by.make_network(identity["classes"], identity["seed"])
    if "layers" in identity and (changes := _changed_layers(saved, network)):
        raise AlexprepError(f"the network has changed since {run} was trained: {checkpoint.some_of(changes)}")
    load_weights(network, saved)
    network.to(device=device, memory_format=fitting_format(network, memory(device).format))  # type: ignore[call-overload]
    return Net(
        run,
        saved.step,
        saved.facts["position"]["epoch"],
        made_by,
        config["options"],
        Path(config["data"]),
        identity["data_digest"],
        identity["classes"],
        network.eval(),
        skipped,
    )


def data_of(nets: list[Net]) -> Path:
    """The data set that all nets were trained on.

    Raises:
        AlexprepError: they were trained on different ones, or it is not where it was.
    """
    first = nets[0]
    for net in nets[1:]:
        if net.data_digest != first.data_digest:
            raise AlexprepError(
                f"{first.name} and {net.name} were trained on different data: data was {first.data}, is {net.data}; "
                f"data_digest was {first.data_digest[:12]}…, is {net.data_digest[:12]}…. Name the data to evaluate on with --data"
            )
    return run_dir.still_there(first.run, first.data)


def check_classes(net: Net, data: Path, dataset: dict[str, Any]) -> str | None:
    """Makes sure that a net's outputs mean what the labels of a data set mean.

    Args:
        net: to be evaluated.
        data: the folder of the data set to evaluate on, for messages.
        dataset: its dataset.json.

    Returns:
        A sentence where it cannot be known: the data that the net was trained on is gone.

    Raises:
        AlexprepError: number or names of the classes differ.
    """
    classes = dataset["classes"]
    if len(classes) != net.classes:
        raise AlexprepError(
            f"{data} has {len(classes)} classes, {net.run} was trained on {net.classes}: name its data with --data"
        )
    if dataset["digest"] == net.data_digest:
        return None
    trained = net.training_data()
    if trained is None:
        return (
            f"{net.name} was trained on {net.data}, which is gone or has changed: it has as many classes as {data}, "
            "whether they are the same ones cannot be told"
        )
    changed = [n for n, (old, new) in enumerate(zip(trained["classes"], classes, strict=True)) if old != new]
    if changed:
        old, new = trained["classes"][changed[0]], classes[changed[0]]
        raise AlexprepError(
            f"{data} has other classes than {net.data}, on which {net.run} was trained: {len(changed)} of {len(classes)} labels "
            f"differ, classes[{changed[0]}] was {old!r}, is now {new!r}"
        )
    return None


def _changed_layers(saved: checkpoint.Checkpoint, network: nn.Module) -> list[str]:
    """Where a network of the user's own is not what it was."""
    then, now = ({"layers": made} for made in (saved.facts["identity"]["layers"], layers(network)))
    made_with = saved.facts["versions"]
    return checkpoint.differences(comparable(then, made_with), comparable(now, made_with))


def _named(run: Path, options: dict[str, Any], recipe: str | None, model: str | None) -> dict[str, Any]:
    """A run's options with its user's own code as it is named now."""
    check_named(options, recipe, model, run)
    recipe, model = references(recipe, model)
    own = {
        "recipe": recipe if is_reference(options["recipe"]) else None,
        "model": model if options.get("model") else None,
    }
    return options | {name: reference for name, reference in own.items() if reference is not None}


def _shown(recipe: dict[str, Any]) -> dict[str, Any]:
    """What a described recipe says of its network and of the pixels that it is shown in an evaluation."""
    augmentation = recipe.get("augmentation", {})
    parts = {name: recipe.get(name) for name in NETWORK}
    return parts | {"augmentation": {name: augmentation.get(name) for name in PIXELS}}
