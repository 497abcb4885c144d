"""Devices: which one is meant, how values get there, when it is done, what room it has."""

from __future__ import annotations

import torch

from alexprep.shards.errors import AlexprepError


def choose_device(name: str | torch.device | None) -> torch.device:
    """The named device, or by default the GPU where there is one. Raises AlexprepError where there is no such device.

    >>> choose_device("cpu:0")
    device(type='cpu')
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise AlexprepError(f"{name!r} is not a device: use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise AlexprepError(f"{str(name)!r} is not supported: use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise AlexprepError(f"there is no {name} here, torch sees {torch.cuda.device_count()} GPUs: use --device cpu")
    return device if device.type == "cuda" else torch.device("cpu")


def moved(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor in the CPU's memory, on `device`; the caller does not wait for what that device still has to do."""
    # From pageable memory the copy would.
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def wait_for(device: torch.device) -> None:
    """Returns when a GPU has done all that it was given; at once for the CPU, which works while it is called."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_bytes(device: torch.device) -> int | None:
    """Bytes of a GPU's memory that nobody uses, other processes included; None for the CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None
