"""What a run has to settle about a user's network before it begins."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from alexprep.train.distributed.tensor_parallel import Scheme
from alexprep.train.lr_schedule import ByHand, EarlyStop, Schedule, unmatched_patterns
from alexprep.train.optimizer import optimizer_of
from alexprep.train.own.network import OwnNetwork
from alexprep.train.own.tryout import check_saved, check_sharing, fitting_format, layers, shape_of_images, try_step
from alexprep.train.parameters import layer_and_kind
from alexprep.train.recipes.recipe import Recipe


class Settled(NamedTuple):
    """What was found."""

    recipe: Recipe  # without what it says of layers that the network does not have
    layers: dict[str, dict[str, str]]  # of the network: part of the run's identity
    notes: list[str]  # what to say about it


def settle(recipe: Recipe, own: OwnNetwork, classes: int, seed: int, scheme: Scheme, ranks: int) -> Settled:
    """Makes the network, takes a training step with it, and fits the recipe to it.

    Raises:
        AlexprepError: it cannot be trained so; the message says why, and where it can, in which line.
    """
    network = recipe.make_network(classes, seed)
    made = layers(network)
    count = sum(weight.numel() for weight in network.parameters())
    notes = [f"the network is {own.title}, {count:,} parameters"]
    if fitting_format(network, torch.channels_last) != torch.channels_last:
        notes.append(
            f"{own.title} cannot take images with the channels last in memory, which is faster on a CPU: a view() may be to blame, "
            "flatten() and reshape() are not"
        )
    if own.adapt:
        recipe, said = fitted(recipe, [name for name, _ in network.named_parameters()])
        notes += said
    with own.blamed():
        optimizer_of(recipe, network)
    with own.blamed(f", in a training step on images {shape_of_images(recipe.crop)}"):
        trial = try_step(network, classes, recipe.crop)
    with own.blamed():
        check_saved(network, trial)
    with own.blamed(f", on {ranks} ranks"):
        check_sharing(network, trial, scheme, ranks, recipe.crop)
    if trial.idle:
        notes.append(
            f"{', '.join(trial.idle)} of the network had no part in its outputs: without a gradient they stay as they are"
        )
    return Settled(recipe, made, notes)


def fitted(recipe: Recipe, parameters: list[str]) -> tuple[Recipe, list[str]]:
    """The recipe without decays and rates of single layers that a network lacks, and what to say about it.

    Args:
        recipe: made for another network.
        parameters: of the network, by name.
    """
    there = {layer_and_kind(name)[0] for name in parameters}
    decays = {layer: decay for layer, decay in recipe.layer_decay.items() if layer in there}
    patterns = unmatched_patterns(recipe.schedule, parameters)
    missing = [layer for layer in recipe.layer_decay if layer not in there] + patterns
    if not missing:
        return recipe, []
    note = f"the network has no {', '.join(dict.fromkeys(missing))}: what recipe {recipe.name} says of them alone is left out"
    return replace(recipe, layer_decay=decays, schedule=_without(recipe.schedule, patterns)), [note]


def _without(schedule: Schedule, patterns: list[str]) -> Schedule:
    """A schedule without the rows of these patterns."""
    if isinstance(schedule, EarlyStop):
        return replace(schedule, schedule=_without(schedule.schedule, patterns))
    if isinstance(schedule, ByHand):
        return ByHand(tuple(row for row in schedule.rows if row[1] not in patterns))
    return schedule
