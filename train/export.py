"""Writes a run for use without alexprep: a plain state dict, a graph for `torch.export`, ONNX, and a JSON with all that goes with them.

Each graph is run before anything is written, and must give what the run's network gives.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import nn

from alexprep.pipeline.augmentation import centred, channel_means, channel_stdevs, mean_corners, ten_windows
from alexprep.shards.dataset_format import versions
from alexprep.shards.errors import AlexprepError, one_of, whole_number
from alexprep.shards.storage import json_bytes, publish_bytes
from alexprep.train.checkpoint import differences, writing
from alexprep.train.initial_weights import TORCHVISION_ALEXNET, renamed
from alexprep.train.loading import EvaluationTransform, Opened, open_run_of
from alexprep.train.models.cifar import PIXEL_DEVIATION
from alexprep.train.run_dir import Place
from alexprep.train.user_code import memory_format_of

FORMATS = ("safetensors", "pt", "pt2", "onnx")  # and the files' endings
Names = Literal["own", "torchvision"]
FORMAT_VERSION = 1
FOLDER = "export"  # in the run's, unless the user names another
OPSETS = (18, 23)  # of ONNX: the oldest that torch's exporter writes without converting, the newest that it writes
MOST_APART = 1e-5  # of a graph's logits from the run's, over the largest of these
# torchvision's shapes, but for the last layer's (classes, 4096).
SHAPES = {
    "conv1": (64, 3, 11, 11),
    "conv2": (192, 64, 5, 5),
    "conv3": (384, 192, 3, 3),
    "conv4": (256, 384, 3, 3),
    "conv5": (256, 256, 3, 3),
    "fc6": (4096, 9216),
    "fc7": (4096, 4096),
}


CHANNELS = {3: "RGB", 2: "RG", 1: "mean of R, G and B"}  # of the network's input


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    files: dict[str, int]  # names and bytes
    document: dict[str, Any]  # what the JSON file says
    notes: list[str]


def export_run(
    place: Place,
    folder: Path | None = None,
    *,
    formats: Sequence[str] = FORMATS,
    names: Names = "own",
    opset: int = OPSETS[0],
    overwrite: bool = False,
    data: Path | None = None,
    recipe: str | None = None,
    model: str | None = None,
) -> Exported:
    """Writes the files of a run's checkpoint; the weights are those that an evaluation takes.

    Args:
        place: of the checkpoint.
        folder: where the files go; RUN/export by default.
        formats: of "safetensors", "pt", "pt2", "onnx".
        names: "torchvision" for that library's names of an `alexnet-owt`'s layers in the state dicts.
        opset: of ONNX.
        overwrite: whether files of the same names may be there already.
        data: the dataset, where it is no longer where it was.
        recipe: the user's own recipe file, of a run that has one.
        model: likewise the code of the network.

    Raises:
        AlexprepError: there is no such run; files are there; a package is missing; a graph cannot be made, or differs from the run.
    """
    for each in formats:
        one_of("format", each, FORMATS)
    one_of("names", names, ("own", "torchvision"))
    whole_number("opset", opset, *OPSETS)
    if "onnx" in formats:
        check_onnx()
    folder, stem = folder or place.run / FOLDER, place.run.name
    earlier = _check_free(folder, stem, overwrite)
    opened = open_run_of(place, data=data, device="cpu", recipe=recipe, model=model)
    weights = _named_weights(opened.net.network, names)
    contents, facts = _written(opened, weights, formats, opset)
    files = {f"{stem}.{each}": content for each, content in contents.items()}
    document = _document(opened, facts)
    mean = document["preprocessing"]["mean"]
    if opened.transform.augmentation.windowed_mean:
        files[f"{stem}-mean.npy"] = _mean_file(opened.transform)
        mean["file"] = f"{stem}-mean.npy"
    document["names"] = names
    document["files"] = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    files[f"{stem}.json"] = json_bytes(document)  # last: what it names is there
    for name, content in files.items():
        with writing(folder / name, len(content), "run the same command again"):
            folder.mkdir(parents=True, exist_ok=True)
            publish_bytes(folder / name, content)
    for name in earlier - files.keys():
        (folder / name).unlink(missing_ok=True)
    return Exported(folder, {name: len(content) for name, content in files.items()}, document, opened.notes)


def check_onnx() -> None:
    """Raises AlexprepError where what ONNX needs is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise AlexprepError(
            f'ONNX needs onnx, onnxscript and onnxruntime ({error}): pip install "alexprep[export]", or leave it out with --formats pt,pt2'
        ) from None


def _check_free(folder: Path, stem: str, overwrite: bool) -> set[str]:
    """Refuses a folder that has files of these names; with `overwrite`, the names of an earlier export's files."""
    own = [f"{stem}.{each}" for each in (*FORMATS, "json")] + [f"{stem}-mean.npy"]
    there = {name for name in own if (folder / name).exists()}
    if there and not overwrite:
        raise AlexprepError(
            f"{folder} holds {min(there)} already: name another folder with --out, or add --overwrite to replace it"
        )
    return there


def _named_weights(network: nn.Module, names: Names) -> dict[str, torch.Tensor]:
    """The state dict, each tensor whole and dense, under its own names or torchvision's."""
    weights = {name: each.detach().cpu().contiguous().clone() for name, each in network.state_dict().items()}
    if names == "own":
        return weights
    ours = {layer: theirs for theirs, layer in TORCHVISION_ALEXNET.items()}
    layers = {name.rpartition(".")[0] for name in weights}
    shapes = {layer: tuple(weights[f"{layer}.weight"].shape) for layer in layers & SHAPES.keys()}
    if layers != ours.keys() or shapes != SHAPES:
        words = differences(SHAPES, shapes)[:2] or [f"its layers are {', '.join(sorted(layers))}"]
        raise AlexprepError(
            f"--names torchvision is for networks of torchvision's shapes, alexnet-owt at crop 224: {'; '.join(words)}"
        )
    return renamed(weights, ours)


def _written(
    opened: Opened, weights: Mapping[str, torch.Tensor], formats: Sequence[str], opset: int
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files' contents by format, and what was measured of the graphs."""
    contents: dict[str, bytes] = {}
    facts: dict[str, Any] = {}
    if "safetensors" in formats:
        contents["safetensors"] = safetensors.torch.save(dict(weights), {"format": "pt"})
    if "pt" in formats:
        contents["pt"] = _in_memory(lambda file: torch.save(dict(weights), file))
    if {"pt2", "onnx"} & {*formats}:
        images = _images(opened)
        expected = _logits(opened.net.network, images)
        graph = _graph(opened, images[:2])
    if "pt2" in formats:
        contents["pt2"] = _in_memory(lambda file: torch.export.save(graph, file))
        loaded = torch.export.load(io.BytesIO(contents["pt2"])).module()
        facts["pt2"] = _compared("torch.export", lambda given: loaded(given), images, expected)
    if "onnx" in formats:
        contents["onnx"] = _onnx(graph, opset)
        facts["onnx"] = _compared("ONNX", _runtime(contents["onnx"]), images, expected) | {"opset": opset}
    return contents, facts


def _in_memory(write: Callable[[Any], object]) -> bytes:
    file = io.BytesIO()
    with _quiet():
        write(file)
    return file.getvalue()


def _images(opened: Opened) -> torch.Tensor:
    """Noise as deviating as photographs are once they are divided as the recipe says: float32 (3, channels, H, W)."""
    transform = opened.transform
    channels = transform.augmentation.channels
    deviation = PIXEL_DEVIATION / float(channel_stdevs(transform.statistics, transform.augmentation).mean())
    return torch.randn(3, channels, *_view(transform), generator=torch.Generator().manual_seed(0)) * deviation


def _view(transform: EvaluationTransform) -> tuple[int, int]:
    """Height and width of what the network is shown, pixels."""
    view = transform.augmentation.view
    assert view is not None  # a recipe has a crop
    return view


def _logits(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """As an evaluation computes them."""
    form = memory_format_of(network, torch.channels_last)
    with torch.inference_mode():
        result: torch.Tensor = network(images.contiguous(memory_format=form))
    return result


def _graph(opened: Opened, images: torch.Tensor) -> Any:
    """The network in evaluation mode as `torch.export` sees it, for any number of images."""
    network = copy.deepcopy(opened.net.network).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    try:
        with _quiet():
            return torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # noqa: BLE001  (whatever the user's own code does that a graph cannot hold)
        words = next(iter(str(error).splitlines()), type(error).__name__)
        raise AlexprepError(
            f"{opened.net.name} cannot become a graph ({words}): write its weights alone with --formats safetensors,pt"
        ) from None


def _onnx(graph: Any, opset: int) -> bytes:
    import onnx

    try:
        with _quiet():
            program = torch.onnx.export(
                graph, dynamo=True, opset_version=opset, input_names=["images"], output_names=["logits"], verbose=False
            )
            assert program is not None
            onnx.checker.check_model(program.model_proto)
            model: bytes = program.model_proto.SerializeToString()
    except Exception as error:  # noqa: BLE001  (of an operation that ONNX lacks, or a model beyond 2 GiB)
        words = next(iter(str(error).splitlines()), type(error).__name__)
        raise AlexprepError(f"ONNX cannot hold this network ({words}): leave it out with --formats pt2") from None
    return model


def _runtime(model: bytes) -> Callable[[torch.Tensor], torch.Tensor]:
    """What onnxruntime computes on this CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _compared(
    name: str, graph: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, expected: torch.Tensor
) -> dict[str, float]:
    """How far a graph's logits are from the run's, at most, for one image and for all, over the largest of these."""
    with torch.inference_mode():
        found = [graph(images[:count]) for count in (1, len(images))]
    scale = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    apart = max(float((each - expected[: len(each)]).abs().max()) for each in found) / scale
    if not apart <= MOST_APART:
        raise AlexprepError(
            f"{name} gives logits that are {apart:.1e} of the largest from the run's, more than {MOST_APART:g}: leave it out with --formats; this "
            "may be a bug in torch or in alexprep"
        )
    return {"largest_difference": apart}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside the block, the exporters do not warn of their own parts."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _document(opened: Opened, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a program needs to use the files; docs/formats.md has the fields."""
    net = opened.net
    return {
        "format": "alexprep export",
        "format_version": FORMAT_VERSION,
        "run": net.run.name,
        "step": net.step,
        "epochs": net.epochs,
        "recipe": net.recipe.name,
        "data_digest": net.data_digest,
        "input": {
            "name": "images",
            "dtype": "float32",
            "shape": ["batch", net.recipe.augmentation.channels, *_view(opened.transform)],
            "channels": CHANNELS[net.recipe.augmentation.channels],
        },
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", net.classes]},
        "preprocessing": _preprocessing(opened.transform),
        "classes": opened.dataset["classes"],
        "checked": dict(facts),
        "versions": versions("alexprep", "torch", "onnx", "onnxruntime", "onnxscript"),
    }


def _preprocessing(transform: EvaluationTransform) -> dict[str, Any]:
    """From a photo to the network's input, in this order, as numbers."""
    augmentation, target = transform.augmentation, transform.target
    mean: dict[str, Any] = {"grey_levels": channel_means(transform.statistics, augmentation).tolist()}
    told: dict[str, Any] = {
        "pad": augmentation.pad,
        "background": augmentation.background,
        "normalised_width": augmentation.normalised_width,
        "crop": augmentation.crop,
        "resize": augmentation.crop if augmentation.scale is not None else None,
        "shown": augmentation.evaluation_scale if augmentation.scale is not None else None,
        "scale": [0, 255],
        "mean": mean,
        "std": channel_stdevs(transform.statistics, augmentation).tolist(),
    }
    if target is None:  # images of any size, as they are
        return {"stored_image": None, "centre_view": None, "ten_views": None} | told
    stored: dict[str, Any] = {
        "size": target.size,
        "pad": target.pad,
        "filter": target.filter,
        "orient": target.orient,
        "format": target.format,
    }
    if target.format == "jpg":
        stored |= {"quality": target.quality, "subsampling": target.subsampling}
    if target.format == "webp":
        stored |= {"quality": target.quality, "lossless": target.lossless}
    if target.common_size is None:
        stored |= {"fit": target.fit, "only_shrink": target.only_shrink}
        return {"stored_image": stored, "centre_view": None, "ten_views": None} | told
    size = np.array([target.common_size])
    centre, ten = centred(augmentation, size).windows_N4, ten_windows(augmentation, size)[0].tolist()
    if augmentation.windowed_mean:
        corners = mean_corners(augmentation, centre, target.common_size)[0].tolist()
        told["mean"] = {"file": None, "shape": [*target.common_size, 3], "centre_view_top_left": corners}
        told["mean"]["window"] = augmentation.mean  # of the ten views: the crop's own, or always the centre
    views = [[*window, mirrored] for mirrored, window in itertools.product((False, True), ten)]
    return {"stored_image": stored, "centre_view": centre[0].tolist(), "ten_views": views} | told


def _mean_file(transform: EvaluationTransform) -> bytes:
    """The mean image as float32 (height, width, 3), grey levels, in NumPy's format."""
    assert transform.statistics is not None
    file = io.BytesIO()
    np.save(file, transform.statistics.mean_image().astype(np.float32), allow_pickle=False)
    return file.getvalue()
