"""The files of a run: writing them safely, saving and finding checkpoints, and beginning with another run's weights.

What a checkpoint holds is listed here, and filled and read back in `alexprep.train.training_state`; which run and step are meant is
told in `alexprep.train.run_dir`.

    checkpoints/step-00001000-3fa9c1d2.safetensors    named by content, so a second save of one step cannot spoil the first
    checkpoints/step-00001000.json                    the commit mark: facts, and the size and sha256 of the tensors file

The tensors are written first, then the JSON that makes them count. Both appear by rename, on disk when they appear. A checkpoint is
valid when the JSON's own digest and the tensors' sha256 are right. Only what is missing, cut or changed counts as damaged. A file that
cannot be read just now (a broken cable, a file server that is away, no permission) may be sound: it ends the command with words, and
nothing is deleted on the strength of it.

In a store the files are the same. Each appears by one upload, and the mark makes the tensors count there too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch

from alexprep.shards.dataset_format import versions
from alexprep.shards.errors import AlexprepError, StoreError
from alexprep.shards.storage import (
    digest_json,
    expected_bytes,
    is_local,
    json_bytes,
    publish_bytes,
    remove_temporaries,
    sync_folder,
)
from alexprep.train.field_values import BEFORE

FORMAT_VERSION = 1

# What a checkpoint holds. Tensors by name, and facts, which are JSON, by key; `TrainingState` gives and takes the values.
WEIGHT = "weight."  # and the name in the network's state_dict: parameters and buffers
VELOCITY = "velocity."  # and the parameter's number, three digits; of torch's optimizers `SLOT`, a name of theirs, and the number
AVERAGE = "average."  # and such a name: the mean of the weights, where one is kept
TOTALS = "sums"  # of the epoch so far: loss, errors, images
RANDOM_CPU, RANDOM_CUDA = "random.cpu", "random.cuda"  # torch's default generators
POSITION, UPDATE = "position", "update"  # facts: step, epoch and schedule; what fp16 scales the loss by
VELOCITY_RATES = "velocity_rates"  # a fact where velocities follow the rate: the rate that each last moved at, or null

FULL = (errno.ENOSPC, errno.EDQUOT)
GO_ON = "go on with --resume; checkpoints that were saved before are untouched"
NOT_ASKED, NOT_SAVED = "not asked for", "not saved"  # why a layer begins fresh
MOST_TOLD = 6  # differences
READ_AGAIN = 2  # times, of a store: what is cut or changed on the way is not damaged there
UNCOUNTED = {"num_batches_tracked"}  # of batch normalisation: older files lack it, and torch reads them likewise
_MARK = re.compile(r"step-(\d{8,})\.json")


class Checkpoint(NamedTuple):
    """A checkpoint as it was saved."""

    step: int
    tensors: dict[str, torch.Tensor]  # on the CPU
    facts: dict[str, Any]  # JSON values


class Damaged(Exception):
    """A checkpoint that fails its checks; the message says which and why."""


def save(
    folder: Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    facts: dict[str, Any],
    keep: int,
    best: int | None = None,
) -> None:
    """Publishes a checkpoint, see `save_packed`; `facts` are JSON values without NaN."""
    save_packed(folder, step, packed(tensors), facts, keep, best)


def packed(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Tensors as the content of a file, in which they no longer change."""
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def save_packed(
    folder: Path,
    step: int,
    data: bytes,
    facts: Mapping[str, Any],
    keep: int,
    best: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Publishes a checkpoint, then deletes all but the newest `keep`, at least 1, and that of step `best`.

    Checkpoints of later steps go too: this run began below them, so they were found damaged. Where there is no lock, `check` raises if another
    process has the run by now, whose they then are: it is called before the checkpoint counts, and before any is deleted.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    file = f"step-{step:08d}-{sha256[:8]}.safetensors"
    publish(folder / file, data)
    document = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "facts": facts,
        "tensors": {"file": file, "bytes": len(data), "sha256": sha256},
    }
    check()
    publish(folder / f"step-{step:08d}.json", json_bytes(document | {"digest": digest_json(document)}))
    check()
    with writing(folder):
        _prune(folder, step, keep, best)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, if there is one, and a sentence for every newer one that is damaged. Nothing is changed."""
    damage: list[str] = []
    for step, mark in sorted(marks(folder).items(), reverse=True):
        try:
            return read(mark), damage
        except Damaged as error:
            damage.append(f"skipped the checkpoint of step {step}: {error}")
    return None, damage


def marks(folder: Path) -> dict[int, Path]:
    """The commit marks in a run's folder of checkpoints, if there is one, by step, damaged ones too."""
    try:
        # `glob` would pass over a folder that it may not read.
        names = os.listdir(folder) if is_local(folder) else [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _unread(folder, error) from error
    return {int(match[1]): folder / match[0] for match in map(_MARK.fullmatch, names) if match}


def read(mark: Path) -> Checkpoint:
    """One checkpoint, by its JSON file, checked to the last bit; `Damaged` is raised where anything is missing, cut or changed."""
    for _ in range(0 if is_local(mark) else READ_AGAIN):
        with contextlib.suppress(Damaged):
            return _read(mark)
    return _read(mark)


def _read(mark: Path) -> Checkpoint:
    with _damage(mark):
        document = _document(mark)
        record = document["tensors"]
        data = _content(mark.parent / record["file"], record["bytes"])
    if len(data) != record["bytes"]:
        raise Damaged(f"{record['file']} has {len(data)} of {record['bytes']} bytes")
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise Damaged(f"{record['file']} does not have the sha256 in {mark.name}")
    return Checkpoint(int(document["step"]), safetensors.torch.load(data), document["facts"])


def facts_of(mark: Path) -> dict[str, Any]:
    """What a checkpoint says that is no tensor, by its JSON file; `Damaged` is raised where that is missing, cut or changed."""
    with _damage(mark):
        facts: dict[str, Any] = _document(mark)["facts"]
        return facts


@contextlib.contextmanager
def writing(path: Path, size: int | None = None, next_step: str = GO_ON) -> Iterator[None]:
    """Inside the block, a file of a run is written, or a folder is changed; an `OSError` becomes a sentence.

    It names the file, where there is no room the bytes needed (`size`) and those free, and what to do when the cause is mended.
    """
    try:
        yield
    except OSError as error:
        remedy = "mend that"
        if error.errno in FULL:
            needs = "" if size is None else f"it needs {size:,} bytes, "
            with contextlib.suppress(OSError):
                needs += f"{shutil.disk_usage(path.parent).free:,} are free, "
            remedy = f"{needs}make room"
        raise AlexprepError(
            f"{path} cannot be written ({error.strerror or error}): {remedy} and {next_step}"
        ) from error


def publish(path: Path, data: bytes) -> None:
    """Writes a file of a run, atomically and durably; makes its folder. What was there before is untouched by a failure."""
    with writing(path, len(data)):
        if is_local(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        publish_bytes(path, data)


def differences(saved: Any, wanted: Any, name: str = "", words: str = "{0} was {1!r}, is now {2!r}") -> list[str]:
    """Where two JSON documents differ, a sentence a field: `words`, with its name and both values."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        found: list[str] = []
        for key in saved | wanted:
            found += differences(saved.get(key), wanted.get(key), f"{name}.{key}" if name else key, words)
        return found
    return [] if saved == wanted else [words.format(name, saved, wanted)]


def with_defaults(described: Any, value: Any) -> Any:
    """A description of a dataclass as a run recorded it, with the fields that it lacks at the values that held before there were such.

    These are a field's `BEFORE`, or else its default. So a field that is added later does not part a run from its own past.
    `value` is the dataclass as it is now; dataclasses in its fields are looked into. Anything else has no defaults.
    """
    if not isinstance(described, dict) or not is_dataclass(value) or isinstance(value, type):
        return described
    complete = dict(described)
    for field in fields(value):
        if field.name in described:
            complete[field.name] = with_defaults(described[field.name], getattr(value, field.name))
        elif BEFORE in field.metadata:
            before = field.metadata[BEFORE]
            complete[field.name] = _as_recorded(before(described) if callable(before) else before)
        elif field.default is not MISSING:
            complete[field.name] = _as_recorded(field.default)
        elif field.default_factory is not MISSING:
            complete[field.name] = field.default_factory()
    return complete


def _as_recorded(value: Any) -> Any:
    """A value as JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(value, default=str))


def some_of(differences: list[str]) -> str:
    """The first of many differences as one sentence."""
    more = len(differences) - MOST_TOLD
    return "; ".join([*differences[:MOST_TOLD], *([f"and {more} more"] if more > 0 else [])])


@dataclass(frozen=True)
class InitReport:
    """What `init_from` did with every layer, by name."""

    taken: list[str]  # of the network: they begin with saved weights
    fresh: dict[str, str]  # of the network: they keep their initial weights, and why
    unused: list[str]  # among the saved ones: the network has no such layer

    def sentences(self) -> list[str]:
        """The report, to be read by a person."""
        return [
            f"begun with the saved weights of {', '.join(self.taken) or 'no layer'}",
            *(f"{layer} begins fresh: {reason}" for layer, reason in self.fresh.items()),
            *self._advice(),
            *([f"saved, but not in this network: {', '.join(self.unused)}"] if self.unused else []),
        ]

    def _advice(self) -> list[str]:
        """What to do where more than one layer does not fit: one is the last, for another number of classes."""
        misfits = [layer for layer, reason in self.fresh.items() if reason != NOT_ASKED]
        if len(misfits) < 2:
            return []
        return [f"{len(misfits)} layers do not fit: where all should, --init-layers '*' refuses what does not"]


def saved_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint by their names in the network."""
    return {name.removeprefix(WEIGHT): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(WEIGHT)}


def check_layers(checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor], whose: str, parts: bool = False) -> None:
    """Makes sure that a checkpoint has a network's weights, by name and shape; by name alone where a rank has `parts` of them.

    Raises AlexprepError where another release made another network.
    """
    saved = saved_weights(checkpoint)
    if saved.keys() == weights.keys() and (parts or all(saved[name].shape == weights[name].shape for name in saved)):
        return
    made_by, here = checkpoint.facts["versions"].get("alexprep"), versions("alexprep")["alexprep"]
    instead = "train anew" if made_by in (None, here) else f"use alexprep {made_by}, which trained it"
    raise AlexprepError(
        f"{whose} has changed since step {checkpoint.step} was saved: its weights have other names or shapes; {instead}"
    )


def final_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The weights that a training came to: their mean where one is kept, else as `saved_weights`."""
    means = {
        name.removeprefix(AVERAGE): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(AVERAGE)
    }
    return saved_weights(checkpoint) | means


def wanted_layers(patterns: str | None) -> Literal["matching"] | list[str]:
    """The layers that `--init-layers` asks `init_from` for: patterns with commas; by default all that match."""
    if patterns is None or patterns == "matching":
        return "matching"
    return [pattern.strip() for pattern in patterns.split(",")]


def init_from(
    weights: Mapping[str, torch.Tensor],
    saved: Mapping[str, torch.Tensor],
    layers: Literal["matching"] | Sequence[str] = "matching",
) -> InitReport:
    """Copies saved weights into a network's, layer by layer: all tensors of a layer or none. Velocities are not copied.

    Args:
        weights: the network's, `state_dict()`; changed in place, unless an error is raised.
        saved: weights by name, as of `state_dict()` or `saved_weights`.
        layers: "matching": every layer that was saved with the same shapes. Otherwise patterns of layer names, such as
            ["conv*", "fc6"]: exactly the network's layers that match one, each of which must have been saved with the same shapes.

    Raises:
        AlexprepError: no layer would be taken, a pattern matches no layer, a layer asked for does not fit, or a weight is not finite.
    """
    wanted, given = _by_layer(weights), _by_layer(saved)
    patterns = ["*"] if layers == "matching" else [layers] if isinstance(layers, str) else layers
    if idle := [pattern for pattern in patterns if not any(fnmatchcase(layer, pattern) for layer in wanted)]:
        raise AlexprepError(f"{', '.join(idle)} matches no layer of the network: it has {', '.join(wanted)}")
    taken: list[str] = []
    fresh: dict[str, str] = {}
    for layer, here in wanted.items():
        if not any(fnmatchcase(layer, pattern) for pattern in patterns):
            fresh[layer] = NOT_ASKED
        elif reason := _misfit(here, given.get(layer)):
            fresh[layer] = reason
        else:
            taken.append(layer)
    refused = {layer: reason for layer, reason in fresh.items() if layers != "matching" and reason != NOT_ASKED}
    if refused or not taken:
        telling = sorted((refused or fresh).items(), key=lambda pair: pair[1] == NOT_SAVED)
        reasons = some_of([f"{layer}: {reason}" for layer, reason in telling])
        there = ", ".join(list(given)[:MOST_TOLD]) + (", …" if len(given) > MOST_TOLD else "")
        raise AlexprepError(
            f"the saved weights do not fit the network ({reasons}); saved are {there or 'none'}: name the network that they are of, or those "
            "of its layers that fit with --init-layers"
        )
    with torch.no_grad():
        for layer in taken:
            for kind, saved_tensor in given[layer].items():
                wanted[layer][kind].copy_(saved_tensor)
    return InitReport(taken, fresh, [layer for layer in given if layer not in wanted])


def _prune(folder: Path, step: int, keep: int, best: int | None) -> None:
    """Deletes later and superfluous checkpoints: the mark before its tensors, so that no mark lacks them.

    Where a mark that stays does not say which tensors are its own, all tensors stay until a save that can tell.
    """
    found = marks(folder)
    kept = sorted((other for other in found if other <= step), reverse=True)[:keep]
    kept += [best] if best in found and best not in kept else []
    for other in found.keys() - set(kept):
        found[other].unlink()
    if is_local(folder):
        sync_folder(folder)
    remove_temporaries(folder)
    try:
        referenced = {json.loads(found[other].read_bytes())["tensors"]["file"] for other in kept}
    except (OSError, StoreError, ValueError, KeyError, TypeError):
        return
    for path in folder.glob("step-*.safetensors"):
        if path.name not in referenced:
            path.unlink()


def _document(mark: Path) -> dict[str, Any]:
    """A commit mark's JSON, whole and of a version that this alexprep reads."""
    document: dict[str, Any] = json.loads(_content(mark))
    if document.pop("digest") != digest_json(document):
        raise Damaged(f"{mark.name} was changed")
    if document["format_version"] != FORMAT_VERSION:
        raise AlexprepError(
            f"{mark} has format version {document['format_version']!r}, this alexprep reads {FORMAT_VERSION}: use the "
            "alexprep that wrote it"
        )
    return document


@contextlib.contextmanager
def _damage(mark: Path) -> Iterator[None]:
    """Inside the block, a mark that is no JSON, or lacks a field, is damaged."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{mark.name} cannot be read ({error})") from None


def _content(path: Path, size: int = 0) -> bytes:
    try:
        return expected_bytes(path, size)
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise _unread(path, error) from error


def _unread(path: Path, error: OSError) -> AlexprepError:
    remedy = "it may be sound, and nothing was deleted: mend that and run the same command again"
    return AlexprepError(f"{path} cannot be read ({error.strerror or error}): {remedy}")


def _by_layer(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors by layer and kind: LAYER.weight, LAYER.bias. One of the network itself is a layer of its own name."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        layers.setdefault(layer or kind, {})[kind] = tensor
    return layers


def _misfit(here: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor] | None) -> str | None:
    """Why a layer cannot take what was saved; None if it can."""
    if saved is None:
        return NOT_SAVED
    if not here.keys() - UNCOUNTED <= saved.keys() <= here.keys():
        return f"saved {', '.join(saved)}, here {', '.join(here)}"
    for kind, tensor in here.items():
        if kind not in saved:
            continue
        if tensor.shape != saved[kind].shape:
            sizes = ("x".join(map(str, other.shape)) for other in (saved[kind], tensor))
            return "saved {}, here {}".format(*sizes)
        if tensor.is_floating_point() != saved[kind].is_floating_point():
            return f"saved {str(saved[kind].dtype)[6:]}, here {str(tensor.dtype)[6:]}"
        spoilt = ~torch.isfinite(saved[kind]) & (saved[kind] != tensor.cpu())  # a mask of -inf is as it should be
        if spoilt.any():
            raise AlexprepError("the saved weights hold NaN or infinity: choose an earlier checkpoint")
    return None
