"""Tells from a parameter's name which layer it is of, and whether it is that layer's bias or a weight."""

from __future__ import annotations


def layer_and_kind(name: str) -> tuple[str, str]:
    """A parameter's layer, "" for one of the network itself, and what it is called there.

    >>> layer_and_kind("features.3.weight"), layer_and_kind("scale")
    (('features.3', 'weight'), ('', 'scale'))
    """
    layer, _, kind = name.rpartition(".")
    return layer, kind


def is_bias(name: str) -> bool:
    """Whether a parameter is its layer's `bias`. All others count as weights, whatever they are called."""
    return layer_and_kind(name)[1] == "bias"


def role(name: str) -> str:
    """LAYER.weight or LAYER.bias: the name by which schedules know a parameter.

    >>> role("conv1.bias"), role("attention.in_proj_weight"), role("scale")
    ('conv1.bias', 'attention.weight', '.weight')
    """
    return f"{layer_and_kind(name)[0]}.{'bias' if is_bias(name) else 'weight'}"
