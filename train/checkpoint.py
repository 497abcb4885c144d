"""Checkpoints that survive anything but the loss of the disk: tensors first, then the JSON that makes them count.

    checkpoints/step-00001000-3fa9c1d2.safetensors    named by content, so a second save of one step cannot spoil the first
    checkpoints/step-00001000.json                    the commit mark: facts, and the size and sha256 of the tensors file

Both appear by rename, on disk when they appear. A checkpoint is valid when the JSON's own digest and the tensors' sha256 are right.
Only what is missing, cut or changed counts as damaged. A file that cannot be read just now (a broken cable, a file server that is
away, no permission) may be sound: it ends the command with words, and nothing is deleted on the strength of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch

from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import TEMPORARY_MARK, digest_json, json_bytes, remove_temporaries, sync_folder
from alexprep.train.saved.disk import publish, writing

FORMAT_VERSION = 1
UNREAD = "it may be sound, and nothing was deleted: mend that and run the same command again"
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

    Raises:
        AlexprepError: the folder or a file cannot be read, or is of another format.
    """
    damage: list[str] = []
    for step, mark in sorted(marks(folder).items(), reverse=True):
        try:
            return read(mark), damage
        except Damaged as error:
            damage.append(f"skipped the checkpoint of step {step}: {error}")
    return None, damage


def marks(folder: Path) -> dict[int, Path]:
    """The commit marks in a run's folder of checkpoints, by step, damaged ones too.

    Raises:
        AlexprepError: the folder cannot be read; one that does not exist has none.
    """
    try:
        with os.scandir(folder) as entries:  # `glob` would pass over a folder that it may not read
            matches = [_MARK.fullmatch(entry.name) for entry in entries]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _unread(folder, error) from error
    return {int(match[1]): folder / match[0] for match in matches if match}


def read(mark: Path) -> Checkpoint:
    """One checkpoint, by its JSON file, checked to the last bit.

    Raises:
        Damaged: anything is missing, truncated or changed.
        AlexprepError: a file cannot be read, or the checkpoint is of another format.
    """
    try:
        document = json.loads(_content(mark))
        if document.pop("digest") != digest_json(document):
            raise Damaged(f"{mark.name} was changed")
        if document["format_version"] != FORMAT_VERSION:
            raise AlexprepError(
                f"{mark} has format version {document['format_version']!r}, this alexprep reads {FORMAT_VERSION}: use the "
                "alexprep that wrote it"
            )
        record = document["tensors"]
        data = _content(mark.parent / record["file"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
    """Deletes later and superfluous checkpoints: the mark before its tensors, so that no mark lacks them.

    Where a mark that stays does not say which tensors are its own, all tensors stay until a save that can tell.
    """
    found = marks(folder)
    kept = sorted((other for other in found if other <= step), reverse=True)[:keep]
    for other in found.keys() - set(kept):
        found[other].unlink()
    sync_folder(folder)
    try:
        referenced = {json.loads(found[other].read_bytes())["tensors"]["file"] for other in kept}
    except (OSError, ValueError, KeyError, TypeError):
        referenced = None
    for path in folder.glob("step-*.safetensors"):
        if referenced is not None and path.name not in referenced and TEMPORARY_MARK not in path.name:
            path.unlink()
    remove_temporaries(folder)


def _content(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        Damaged: there is no such file.
        AlexprepError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise _unread(path, error) from error


def _unread(path: Path, error: OSError) -> AlexprepError:
    return AlexprepError(f"{path} cannot be read ({error.strerror or error}): {UNREAD}")
