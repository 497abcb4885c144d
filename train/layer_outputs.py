"""What any layer of a trained network gives for every image of a split, in a file that is mapped into memory; and for photos.

A layer is named as `torch.nn.Module.named_modules` names it. The work goes on where it was left: rows that are on the disk are not computed again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import nn

from alexprep.pipeline.device import choose_device
from alexprep.pipeline.loader import Loader
from alexprep.shards.dataset_format import read_dataset, read_index, read_json, split_record
from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import folder_at, is_local, json_bytes, publish_json, published, sync_folder
from alexprep.train import run_dir
from alexprep.train.data import stored_sides
from alexprep.train.evaluation import mean_of, sample_names, tuning_of
from alexprep.train.neighbour_search import nearest
from alexprep.train.precision import Precision, check_precision, float32_kernels, logits, memory
from alexprep.train.predictions import check_classes, data_of, filled, open_net
from alexprep.train.run_dir import Place
from alexprep.train.training_state import weights_digest

FORMAT = "alexprep layer outputs"
_SAVED_EVERY = 64  # batches
_TABLE_ROWS = 4096  # in a row group of a table: 67 MB of 4,096 values


@dataclass(frozen=True)
class LayerOutputs:
    """A finished file of outputs.

    Attributes:
        path: of the .npy.
        facts: of the .json beside it: run, step, layer, shape of one image's output, data, data_digest, split, images, precision,
            weights_sha256.
    """

    path: Path
    facts: dict[str, Any]

    def command(self) -> str:
        """The command that writes this file again, in backticks."""
        run, layer, split = folder_at(self.facts["run"]), self.facts["layer"], self.facts["split"]
        return features_command(run, layer, split, step=self.facts["step"], path=self.path)

    def nearest(self, outputs_QD: NDArray[np.float32], count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The Euclidean distances of the images nearest to some outputs, and their rows, both (Q, count), nearest first."""
        return nearest(self.array(), outputs_QD, count)

    def array(self) -> NDArray[np.float32]:
        """float32 (images, values), mapped into memory, in the order of the split's index. AlexprepError where it cannot be read."""
        try:
            outputs: NDArray[np.float32] = np.load(self.path, "r", allow_pickle=False)
        except Exception as error:  # noqa: BLE001  (numpy parses the header as Python, and raises what that raises)
            raise AlexprepError(f"{self.path} cannot be read ({error}): write it again with {self.command()}") from None
        if outputs.dtype != np.float32 or outputs.ndim != 2 or len(outputs) != self.facts["images"]:
            raise AlexprepError(
                f"{self.path} holds {outputs.dtype} of shape {outputs.shape}: write it again with {self.command()}"
            )
        return outputs


def layer_names(network: nn.Module) -> list[str]:
    """The layers that have no layers inside, in the order in which the network has them."""
    return [name for name, module in network.named_modules() if name and not any(module.children())]


def last_hidden_layer(network: nn.Module) -> str:
    """The layer before the last linear one, dropout left out, as for figure 4 of the paper.

    Raises AlexprepError where there is none before a linear layer.
    """
    modules = dict(network.named_modules())
    names = [name for name in layer_names(network) if "Dropout" not in type(modules[name]).__name__]
    linear = [n for n, name in enumerate(names) if isinstance(modules[name], nn.Linear)]
    if not linear or not linear[-1]:
        raise AlexprepError(f"the network has no layer before a linear one: name one with --layer: {_listed(names)}")
    return names[linear[-1] - 1]


@contextlib.contextmanager
def tapped(network: nn.Module, layer: str) -> Iterator[list[torch.Tensor]]:
    """Inside the block, what `layer` gives in each call of the network is added to the list, one image a row.

    Raises AlexprepError where the network has no such layer.
    """
    modules = dict(network.named_modules())
    if layer not in modules or not layer:
        raise AlexprepError(f"the network has no layer {layer!r}: there are {_listed(layer_names(network))}")
    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            raise AlexprepError(f"layer {layer!r} gives {type(output).__name__}, no tensor: name another with --layer")
        outputs.append(
            output.detach().float().clone(memory_format=torch.contiguous_format)
        )  # the next layer may work in place

    hook = modules[layer].register_forward_hook(keep)
    try:
        yield outputs
    finally:
        hook.remove()


def outputs_of(
    network: nn.Module, layer: str, images: torch.Tensor, precision: Precision, batch_size: int
) -> torch.Tensor:
    """What a layer gives for images: float32 (N, …). A batch is filled up to `batch_size`, so that no image depends on the others."""
    with torch.inference_mode(), float32_kernels(precision), tapped(network, layer) as outputs:
        logits(network, filled(images, batch_size), precision)
    if len(outputs) != 1:
        raise AlexprepError(f"layer {layer!r} is used {len(outputs)} times for an image: name another with --layer")
    return outputs[0][: len(images)]


def outputs_file(run: Path, layer: str, split: str) -> Path:
    """Where the outputs of a layer lie unless another place is named: RUN/features-LAYER-SPLIT.npy."""
    return run / f"features-{layer}-{split}.npy"


def features_command(
    run: Path, layer: str, split: str, *options: str, step: int | None = None, path: Path | None = None
) -> str:
    """The command that writes outputs of a run, or of a checkpoint of it, in backticks; `path` is of the file, None for the usual one."""
    out = [] if path in (None, outputs_file(run, layer, split)) else ["--out", str(path)]
    return run_dir.command("features", run, "--layer", layer, "--split", split, *out, *options, step=step)


def read_outputs(path: Path) -> LayerOutputs:
    """Finds finished outputs. Raises AlexprepError, with the command that makes them, where there are none."""
    facts = read_json(path.with_suffix(".json"), "make it with `alexprep features RUN`")
    if facts.get("format") != FORMAT or not path.exists():
        raise AlexprepError(f"{path} is not what `alexprep features` wrote: make it with `alexprep features RUN`")
    return LayerOutputs(path, facts)


def write_outputs(
    place: Place,
    layer: str | None = None,
    *,
    data: Path | None = None,
    split: str = "train",
    out: Path | None = None,
    batch_size: int = 128,
    precision: Precision = "fp32",
    threads: int | None = None,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    recipe: str | None = None,
    model: str | None = None,
) -> LayerOutputs:
    """Writes what a layer gives for the centre view of every image of a split: a .npy and, beside it, a .json that says of what.

    Begun outputs of the same weights, data and layer are gone on with; finished ones are returned as they are. Others of that name are
    replaced when the new ones are whole.

    Args:
        place: a checkpoint of a run.
        layer: as `layer_names` names it; the last hidden one by default.
        data: the dataset; by default the one that the net was trained on.
        split: "train", "val" or "test".
        out: the .npy; by default `outputs_file`.
        batch_size: images at a time.
        precision: that the network computes in; outputs are float32.
        threads: for decoding.
        device: "cpu" or "cuda"; the GPU if there is one by default.
        progress: called with images done and images in all.
        recipe: where the recipe file of a run that has one is now.
        model: likewise the file of a net of the user's own.

    Raises:
        AlexprepError: there is no such checkpoint, layer, data or split, or the disk is full.
    """
    where = choose_device(device)
    check_precision(precision, where)
    net = open_net(place, where, recipe, model)
    layer = layer or last_hidden_layer(net.network)
    data = data or data_of([net])
    dataset = read_dataset(data)
    check_classes(net, data, dataset)
    net.recipe.check_sides(stored_sides(data, dataset))
    path = out or outputs_file(net.run, layer, split)
    if not is_local(path):
        raise AlexprepError(f"{path} cannot be written: outputs are written to a disk, so name a file there with --out")
    facts: dict[str, Any] = {
        "format": FORMAT,
        "run": str(net.run),
        "step": net.step,
        "layer": layer,
        "data": str(data.absolute()),
        "data_digest": dataset["digest"],
        "split": split,
        "images": split_record(dataset, split, data)["samples"],
        "precision": precision,
        "weights_sha256": weights_digest(net.network.state_dict()),
    }
    with contextlib.suppress(AlexprepError):
        done = read_outputs(path)
        if same_outputs(done.facts, facts) and len(done.array()) == facts["images"]:
            return done
    notes: list[str] = []
    mean = mean_of(net, dataset, notes)
    loader = Loader(
        data,
        split,
        batch_size=batch_size,
        augmentation=net.recipe.evaluation_augmentation,
        views="centre",
        order="sequential",
        threads=threads,
        tuning=tuning_of([net], data, where),
        device=str(where),
        memory_format=memory(where).memory_format,
        **({} if mean is None else {"statistics": mean}),  # type: ignore[arg-type]
    )
    with loader, _Begun(path, facts) as begun:
        first = 0
        if begun.rows:
            step = min(begun.rows // batch_size, len(loader) - 1)
            loader.load_state_dict(loader.state_dict() | {"step": step})
            first = step * batch_size
        for number, batch in enumerate(loader, 1):
            rows = outputs_of(net.network, layer, batch.images, precision, batch_size)
            begun.write(first, rows.flatten(1).cpu().numpy(), list(rows.shape[1:]))
            first += len(rows)
            if number % _SAVED_EVERY == 0:
                begun.save()
            if progress is not None:
                progress(first, facts["images"])
        return begun.finish()


def write_outputs_table(outputs: LayerOutputs, path: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Writes outputs as a Parquet table too: key, source, label (null for none) and class of each image, and its values as a list of float32.

    Raises AlexprepError where the outputs are not of the data that lie where theirs lay, or the ledger is damaged.
    """
    values, data, split = outputs.array(), folder_at(outputs.facts["data"]), outputs.facts["split"]
    dataset = read_dataset(data)
    keys, sources = sample_names(data, split)
    labels = np.asarray(read_index(data, split)["label"])
    if dataset["digest"] != outputs.facts["data_digest"] or not len(values) == len(keys) == len(labels):
        raise AlexprepError(
            f"{outputs.path} is of other data than {data} holds now: make it again with {outputs.command()}"
        )
    names = np.array([*dataset["classes"], None], object)  # -1, no label, is the last one
    fields = [("key", pa.string()), ("source", pa.string()), ("label", pa.int32()), ("class", pa.string())]
    kind = pa.list_(pa.float32(), values.shape[1])
    schema = pa.schema([*fields, ("values", kind)], {b"alexprep": json_bytes(outputs.facts, indent=None)})
    with published(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for first in range(0, len(values), _TABLE_ROWS):
            rows = slice(first, first + _TABLE_ROWS)
            part = labels[rows]
            columns = [keys[rows], sources[rows], pa.array(part, pa.int32(), mask=part < 0), list(names[part])]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=False)]
            flat = pa.array(np.asarray(values[rows]).reshape(-1))
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, values.shape[1]))
            writer.write_table(pa.table(arrays, schema=schema))
            if progress is not None:
                progress(min(first + _TABLE_ROWS, len(values)), len(values))


class _Begun:
    """Outputs that are being written: NAME.npy.part, and NAME.part.json, which says how many rows of it count."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.rows = 0  # that are there
        self._path, self._facts = path, facts
        self._part, self._mark = path.with_name(path.name + ".part"), path.with_name(path.stem + ".part.json")
        self._array: np.memmap[Any, Any] | None = None

    def __enter__(self) -> _Begun:
        """Opens what an earlier process began, if that was the same."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            mark = json.loads(self._mark.read_bytes())
            array = np.lib.format.open_memmap(self._part, "r+")
            if same_outputs(mark, self._facts) and len(array) == self._facts["images"] and array.dtype == np.float32:
                self._array, self.rows = array, int(mark["done"])
                self._facts = self._facts | {"shape": mark["shape"]}
        return self

    def __exit__(self, *error: object) -> None:
        """Keeps what is there for the next time."""
        with contextlib.suppress(OSError):
            self.save()
        self._array = None

    def write(self, first: int, rows: NDArray[np.float32], shape: list[int]) -> None:
        """Puts rows in their place."""
        try:
            if self._array is None:
                self._mark.unlink(missing_ok=True)
                size = (self._facts["images"], rows.shape[1])
                self._array = np.lib.format.open_memmap(self._part, "w+", np.float32, size)
                with open(
                    self._part, "r+b"
                ) as file:  # room for all of it, so that a full disk is told now and is no crash
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(self._part))
                self._facts = self._facts | {"shape": shape}
            self._array[first : first + len(rows)] = rows
            self.rows = first + len(rows)
        except OSError as error:
            raise AlexprepError(
                f"{self._part} cannot be written ({error.strerror or error}): make room, or name another place with --out; then run the "
                "same command again"
            ) from None

    def save(self) -> None:
        """What is there counts from now on."""
        if self._array is not None:
            self._array.flush()
            publish_json(self._mark, self._facts | {"done": self.rows})

    def finish(self) -> LayerOutputs:
        """Puts the whole in its place; the .json, which says of what it is, comes last."""
        assert self._array is not None
        self._array.flush()
        self._array = None
        with open(self._part, "rb") as file:
            os.fsync(file.fileno())
        about = self._path.with_suffix(".json")
        about.unlink(missing_ok=True)
        os.replace(self._part, self._path)
        sync_folder(self._path.parent)
        publish_json(about, self._facts)
        self._mark.unlink(missing_ok=True)
        return LayerOutputs(self._path, self._facts)


def same_outputs(earlier: dict[str, Any], facts: dict[str, Any]) -> bool:
    """Whether outputs, or what was made of them, are of the same weights, data and layer; where run and data lie may have changed."""
    names = ("layer", "data_digest", "split", "images", "precision", "weights_sha256")
    return all(earlier.get(name) == facts[name] for name in names)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
