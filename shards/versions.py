"""Tells what decides the bytes that alexprep writes: the versions of software, and the processor."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

# What a library is called → the distributions that may hold it, one per CUDA version.
_DISTRIBUTIONS = {
    "dali": ("nvidia-dali-cuda120", "nvidia-dali-cuda130"),
    "nvimgcodec": ("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13"),
    "nvjpeg": ("nvidia-nvjpeg-cu12", "nvidia-nvjpeg-cu13", "nvidia-nvjpeg"),
}
# Releases of alexprep that make the same shards, byte for byte, of the same inputs and options: what one of them began another may
# go on with. A release that makes the same belongs here; one that does not replaces them all.
_SAME_SHARDS = ("0.1.0",)


def versions(*names: str) -> dict[str, str]:
    """The installed version of each library; "not installed" where it runs from a source tree or is absent.

    >>> versions("no-such-library")
    {'no-such-library': 'not installed'}
    """
    return {name: _version(name) for name in names}


def interchangeable(name: str, one: object, other: object) -> bool:
    """Whether two versions of a library make the same shards: equal ones do, and releases of alexprep that are known to."""
    return one == other or (name == "alexprep" and one in _SAME_SHARDS and other in _SAME_SHARDS)


def _version(name: str) -> str:
    for distribution in _DISTRIBUTIONS.get(name, (name,)):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def processor() -> str:
    """The processor's model, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
