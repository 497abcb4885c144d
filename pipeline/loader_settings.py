"""How a `Loader` uses the machine: settings that change speed and memory but no result, and the file where they are kept.

    tuning.json    {"machines": {"AMD EPYC 7763, 8 cores, NVIDIA H200, cuda": {"settings": {…}, …}, …}}

It lies in the dataset's folder, one entry a kind of machine, since several may share the folder. For other people's tars, and
where the folder cannot be written, it lies in $XDG_CACHE_HOME/alexprep or ~/.cache/alexprep; there an entry's name ends with the
data's path. The settings are found by `alexprep.pipeline.autotune`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from alexprep.pipeline.dali_ops import HW_DECODER_LOAD
from alexprep.shards.dataset_format import DATASET, TUNING, processor
from alexprep.shards.errors import AlexprepError, number_within, one_of, whole_number
from alexprep.shards.storage import folder_at, publish_json, user_cache
from alexprep.shards.worker_pool import cores


@dataclass(frozen=True)
class Tuning:
    """Settings of a `Loader` for a machine, as `alexprep tune` finds them. Values out of bounds raise AlexprepError.

    Attributes:
        threads: of DALI, 1 to 4,096; None for one a core.
        prefetch: steps that are worked on ahead of the one being consumed, 1 to 64.
        decode: where images are decoded: "cpu", "cuda", or None for the loader's device. What comes after happens on the
            device. The two decoders differ by a grey level here and there.
        hw_decoder_load: the share of a batch that a GPU's JPEG engines get, 0-1, where it has them.
    """

    threads: int | None = None
    prefetch: int = 2
    decode: Literal["cpu", "cuda"] | None = None
    hw_decoder_load: float = HW_DECODER_LOAD

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        if self.threads is not None:
            whole_number("threads", self.threads, 1, 4096)
        whole_number("prefetch", self.prefetch, 1, 64)
        number_within("hw_decoder_load", self.hw_decoder_load, 0, 1)
        if self.decode is not None:
            one_of("decode", self.decode, ("cpu", "cuda"))

    @property
    def dali_threads(self) -> int:
        """`threads`, or one a core that this process may use."""
        return self.threads or cores()

    def decode_on(self, device: str) -> Literal["cpu", "cuda"]:
        """Where images are decoded for a loader on `device`, "cpu" or "cuda" with or without an index."""
        return "cpu" if device.startswith("cpu") or self.decode == "cpu" else "cuda"

    def words(self, device: str) -> str:
        """The settings for people.

        >>> Tuning(8, decode="cuda", hw_decoder_load=0.8).words("cuda")
        '8 threads, 2 steps ahead, decode on the GPU with 0.8 of it on its JPEG engines'
        """
        threads, ahead = self.dali_threads, self.prefetch
        words = f"{threads} thread{'s' * (threads > 1)}, {ahead} step{'s' * (ahead > 1)} ahead"
        if device.startswith("cpu"):
            return words
        on_gpu = f"the GPU with {self.hw_decoder_load:g} of it on its JPEG engines"
        return f"{words}, decode on {'the CPU' if self.decode_on(device) == 'cpu' else on_gpu}"


def tuning_for(data: str | Path, device: str = "cpu") -> Tuning:
    """The settings that `alexprep tune` found for this data on this machine, or the defaults; a damaged file counts as none.

    `data` is as for `Loader`; `device` is "cpu", or "cuda" with or without an index. Raises AlexprepError where there is none.
    """
    return saved_tuning(data, device)[0] or Tuning()


def saved_tuning(data: str | Path, device: str) -> tuple[Tuning | None, list[str]]:
    """The newest settings that were saved for this data and this machine, and a sentence for every file that cannot be used."""
    found: list[tuple[str, Tuning]] = []
    problems = []
    for path, name in _places(data, this_machine(device)).items():
        machines, problem = _machines(path)
        try:
            if name in machines:
                settings = {field.name: machines[name]["settings"][field.name] for field in fields(Tuning)}
                found.append((str(machines[name].get("measured_at")), Tuning(**settings)))
        except (AlexprepError, AttributeError, KeyError, TypeError, ValueError) as error:
            problem = problem or f"{path} has no usable settings for this machine ({error})"
        problems += [problem] if problem else []
    return max(found, key=lambda pair: pair[0])[1] if found else None, problems


def save_tuning(data: str | Path, machine: str, entry: Mapping[str, Any]) -> tuple[Path | None, list[str]]:
    """Publishes the entry of one machine, as `this_machine` names it; those of other machines stay.

    Returns where it was written, None where no place can be written; and a sentence for each thing that was not as it should be.
    """
    notes = []
    for path, name in _places(data, machine).items():
        machines, problem = _machines(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            publish_json(path, {"machines": {**machines, name: dict(entry)}})
        except OSError as error:
            notes.append(f"{path} cannot be written ({error.strerror or error})")
            continue
        return path, notes + ([f"{problem}: it was replaced"] if problem else [])
    return None, notes


def this_machine(device: str) -> str:
    """What settings depend on, seen by a loader on `device`: the processor, the cores that this process may use, the GPU."""
    kind = device.partition(":")[0]
    return ", ".join([processor(), f"{cores()} cores", *([_gpu_name(device)] if kind == "cuda" else []), kind])


def _gpu_name(device: str) -> str:
    import torch

    from alexprep.pipeline.device import choose_device

    return torch.cuda.get_device_name(choose_device(device))


def _places(data: str | Path, machine: str) -> dict[Path, str]:
    """Where settings may lie, the best place first, with the entry's name there: a dataset of ours, then the user's cache."""
    folder = folder_at(data)
    places = {folder / TUNING: machine} if (folder / DATASET).exists() else {}
    if cache := user_cache():
        where = str(data) if "://" in str(data) else os.path.abspath(data)
        places[cache / TUNING] = f"{machine}: {where}"
    return places


def _machines(path: Path) -> tuple[dict[str, Any], str | None]:
    """The entries of a file, and what is wrong with it. A file that does not exist is an empty one."""
    try:
        machines = json.loads(path.read_bytes())["machines"]
        if not isinstance(machines, dict):
            raise TypeError("its machines are no JSON object")
    except (FileNotFoundError, NotADirectoryError):
        return {}, None
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        return {}, f"{path} is damaged ({type(error).__name__}: {error})"
    return machines, None
