"""Checkpoints that survive anything but the loss of the disk: tensors first, then the JSON that makes them count.

    checkpoints/step-00001000-3fa9c1d2.safetensors    named by content, so a second save of one step cannot spoil the first
    checkpoints/step-00001000.json                    the commit mark: facts, and the size and sha256 of the tensors file

Both appear by rename, on disk when they appear. A checkpoint is valid when the JSON's own digest and the tensors' sha256 are right.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch

from alexprep.shards.errors import AlexprepError
from alexprep.shards.files import (
    TEMPORARY_MARK,
    digest_json,
    json_bytes,
    remove_temporaries,
    sync_folder,
)
from alexprep.train.saved.disk import publish, writing

FORMAT_VERSION = 1
_MARK = re.compile(r"step-(\d{8,})\.json")


class Checkpoint(NamedTuple):
    """What was saved."""

    step: int
    tensors: dict[str, torch.Tensor]  # on the CPU
    facts: dict[str, Any]  # JSON values


class Damaged(Exception):
    """A checkpoint that fails its checks; the message says which and why."""


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any], keep: int) -> None:
    """Publishes a checkpoint, then deletes all but the newest `keep`.

    Checkpoints of later steps go too: this run began below them, so they were found damaged.

    Args:
        folder: made if missing.
        step: optimizer steps done.
        tensors: on any device; copied as they are, bit for bit.
        facts: JSON values without NaN.
        keep: at least 1.

    Raises:
        AlexprepError: keep is below 1; or the disk is full or broken, and earlier checkpoints are untouched.
    """
    if keep < 1:
        raise AlexprepError(f"--keep is {keep}: it must be at least 1, or nothing could be resumed")
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    sha256 = hashlib.sha256(data).hexdigest()
    file = f"step-{step:08d}-{sha256[:8]}.safetensors"
    publish(folder / file, data)
    document = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "facts": facts,
        "tensors": {"file": file, "bytes": len(data), "sha256": sha256},
    }
    publish(folder / f"step-{step:08d}.json", json_bytes(document | {"digest": digest_json(document)}))
    with writing(folder):
        _prune(folder, step, keep)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and a sentence for every newer one that is damaged. Nothing is changed.

    Returns:
        None when there is no valid one.
    """
    damage: list[str] = []
    for step, mark in sorted(marks(folder).items(), reverse=True):
        try:
            return read(mark), damage
        except Damaged as error:
            damage.append(f"skipped the checkpoint of step {step}: {error}")
    return None, damage


def marks(folder: Path) -> dict[int, Path]:
    """The commit marks in a run's folder of checkpoints, by step, damaged ones too."""
    matches = ((_MARK.fullmatch(path.name), path) for path in folder.glob("step-*.json"))
    return {int(match[1]): path for match, path in matches if match}


def read(mark: Path) -> Checkpoint:
    """One checkpoint, by its JSON file, checked to the last bit.

    Raises:
        Damaged: anything is missing, truncated or changed.
    """
    try:
        document = json.loads(mark.read_bytes())
        digest = document.pop("digest")
        if digest != digest_json(document) or document["format_version"] != FORMAT_VERSION:
            raise Damaged(f"{mark.name} was changed or is of another format")
        record = document["tensors"]
        data = (mark.parent / record["file"]).read_bytes()
    except FileNotFoundError as error:
        raise Damaged(f"{Path(str(error.filename)).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{mark.name} cannot be read ({error})") from None
    if len(data) != record["bytes"]:
        raise Damaged(f"{record['file']} has {len(data)} of {record['bytes']} bytes")
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise Damaged(f"{record['file']} does not have the sha256 in {mark.name}")
    return Checkpoint(int(document["step"]), safetensors.torch.load(data), document["facts"])


def differences(saved: Any, wanted: Any, name: str = "") -> list[str]:
    """Where two JSON documents differ, a sentence a field.

    >>> differences({"lr": 0.01, "seed": 0}, {"lr": 0.02, "seed": 0})
    ['lr was 0.01, is now 0.02']
    """
    if isinstance(saved, dict) and isinstance(wanted, dict):
        keys = [*saved, *(key for key in wanted if key not in saved)]
        lists = (differences(saved.get(key), wanted.get(key), f"{name}.{key}" if name else str(key)) for key in keys)
        return [sentence for sentences in lists for sentence in sentences]
    return [] if saved == wanted else [f"{name} was {saved!r}, is now {wanted!r}"]


def some_of(differences: list[str], most: int = 6) -> str:
    """The first of many differences as one sentence.

    >>> some_of(["a was 1, is now 2", "b was 1, is now 2"], most=1)
    'a was 1, is now 2; and 1 more'
    """
    more = [f"and {len(differences) - most} more"] if len(differences) > most else []
    return "; ".join([*differences[:most], *more])


def _prune(folder: Path, step: int, keep: int) -> None:
    """Deletes later and superfluous checkpoints: the mark before its tensors, so that no mark lacks them."""
    found = marks(folder)
    kept = sorted((other for other in found if other <= step), reverse=True)[:keep]
    for other in found.keys() - set(kept):
        found[other].unlink()
    sync_folder(folder)
    referenced = {_tensors_file(found[other]) for other in kept}
    for path in folder.glob("step-*.safetensors"):
        if path.name not in referenced and TEMPORARY_MARK not in path.name:
            path.unlink()
    remove_temporaries(folder)


def _tensors_file(mark: Path) -> str | None:
    """The tensors file that a mark names; None for a damaged mark, whose tensors are of no use either."""
    try:
        return str(json.loads(mark.read_bytes())["tensors"]["file"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
