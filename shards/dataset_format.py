"""Defines what a dataset's folder holds: the name and the form of every file, how a finished dataset is read, and what made it.

docs/formats.md says it in words. What fills the files is in `alexprep.shards.plan` and `alexprep.shards.manifest`; samples are
read by `alexprep.shards.sample_reader`.

A format is only ever added to, so that each release reads what earlier ones wrote: a new field or option comes with a default that
means what was done before it existed, and a released default never changes its meaning.
"""

from __future__ import annotations

import contextlib
import io
import json
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import digest_json, folder_at, is_local

FORMAT_VERSION = 2  # of what is begun now: of plan.json and dataset.json, and of the files that follow from them
READ_VERSIONS = (1, 2)  # that this release reads and goes on with. 1: an index without heights and widths

PLAN = "plan.json"
PLAN_FORMAT = "alexprep plan"  # its "format"
PLAN_TABLE = "plan.parquet"
DATASET = "dataset.json"
DATASET_FORMAT = "alexprep data set"  # its "format", by which it is told from anybody else's file of that name
TIMM_INFO = "_info.json"
CARD = "README.md"
INDEX = "index.npy"
LEDGER = "samples.parquet"
TAR_INDEXES = ".alexprep"  # a folder beside tars that were read as other people's
TUNING = "tuning.json"  # of machines, not of the data: no digest depends on it
HUB_FILES = (".gitattributes", ".cache")  # the Hugging Face hub's own, beside what it holds and what it downloads
STATISTICS = Path("stats") / "stats.json"
MEAN_IMAGE = Path("stats") / "mean_image.npy"
MEAN_PICTURE = Path("stats") / "mean_image.png"

FORMATS = {"jpg": "jpg", "png": "png", "webp": "webp", "raw": "npy"}  # --format → the extension of the image's member

# One record a sample, in the order of the shards: where its encoded image lies, its class, and the image's height and width, pixels.
_PLACE_AND_LABEL = [("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<i4")]
INDEX_DTYPE = np.dtype([*_PLACE_AND_LABEL, ("height", "<u4"), ("width", "<u4")])
INDEX_DTYPES = {1: np.dtype(_PLACE_AND_LABEL), 2: INDEX_DTYPE}  # by format version

# What a library is called → the distributions that may hold it, one per CUDA version.
_DISTRIBUTIONS = {
    "dali": ("nvidia-dali-cuda120", "nvidia-dali-cuda130"),
    "nvimgcodec": ("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13"),
    "nvjpeg": ("nvidia-nvjpeg-cu12", "nvidia-nvjpeg-cu13", "nvidia-nvjpeg"),
}
# Releases of alexprep that make the same shards, byte for byte, of the same inputs and options: what one of them began another may
# go on with. A release that makes the same belongs here; one that does not replaces them all.
_SAME_SHARDS = ("0.1.0",)
# Libraries that took over from others with the same pixels: a plan without them is of an earlier release.
_TOOK_OVER = ("simplejpeg",)


def shard_name(split: str, number: int) -> str:
    """The name of a shard's files without their extension, such as train-000007."""
    return f"{split}-{number:06d}"


def sample_key(row: int) -> str:
    """The webdataset key of the input in row `row` of its split's plan: fixed width, no dot."""
    return f"{row:08d}"


def read_json(path: Path, purpose: str) -> dict[str, Any]:
    """A JSON object from `path`; where there is none, an AlexprepError that ends with `purpose`, the next step."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise AlexprepError(f"{path} does not exist: {purpose}") from None
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or error
        raise AlexprepError(f"{path} cannot be read ({words}): {purpose}") from None
    if not isinstance(document, dict):
        raise AlexprepError(f"{path} holds no JSON object: {purpose}")
    return document


def read_dataset(data: Path | str) -> dict[str, Any]:
    """The facts of a finished dataset, as its dataset.json has them.

    Among them are `digest` (the identity of the data), `classes` (names, by label), `image` (size in pixels, fit, format, extension), and
    `splits`: by name, each with its `inputs`, `samples`, `rejected`, `bytes` and `shards`. docs/formats.md lists all.
    Raises AlexprepError where the folder, or URL of one, holds no finished dataset, or one of a later format.
    """
    data = folder_at(data)
    if not (data / DATASET).exists() and (data / PLAN).exists():
        raise AlexprepError(
            f"{data} holds an unfinished data set: run the same `alexprep shard`, or `alexprep push`, again to finish it"
        )
    dataset = read_json(data / DATASET, "make one with `alexprep shard SOURCE`, or name another folder")
    if dataset.get("format_version") not in READ_VERSIONS:
        raise AlexprepError(
            f"{data / DATASET} has format version {dataset.get('format_version')!r}, this alexprep reads "
            f"{' and '.join(map(str, READ_VERSIONS))}: use the alexprep that wrote it, or shard again"
        )
    return dataset


def shown_class(classes: Sequence[str], words: Sequence[str] | None, label: int) -> str:
    """The name of a class as people read it, with its words, where `words` (of a dataset.json, by label) has any.

    >>> shown_class(["n01440764"], ["tench, Tinca tinca"], 0), shown_class(["tench"], None, 0)
    ('n01440764 (tench, Tinca tinca)', 'tench')
    """
    text = words[label] if words else ""
    return f"{classes[label]} ({text})" if text else classes[label]


def shown_classes(dataset: dict[str, Any]) -> list[str]:
    """What `shown_class` says of every class of a dataset, by label."""
    classes, words = dataset["classes"], dataset.get("words")
    return [shown_class(classes, words, label) for label in range(len(classes))]


def short_classes(dataset: dict[str, Any]) -> list[str]:
    """What pictures call the classes, by label: the first of its words, or its name where it has none, or not alone.

    >>> short_classes({"classes": ["n1", "n2", "n3", "n4"], "words": ["tench, Tinca tinca", "crane", "crane, lift", ""]})
    ['tench', 'n2', 'n3', 'n4']
    """
    classes, words = dataset["classes"], dataset.get("words") or [""] * len(dataset["classes"])
    first = [text.partition(",")[0].strip() for text in words]
    often = Counter(first)
    return [word if word and often[word] == 1 else name for word, name in zip(first, classes, strict=True)]


def recorded_shards(dataset: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a dataset.json says of each shard that has a tar: name, samples, bytes, sha256."""
    for record in dataset["splits"].values():
        yield from record["shards"]


def split_record(dataset: dict[str, Any], split: str, data: Path) -> dict[str, Any]:
    """What dataset.json says of one split, which must have samples."""
    record = dataset["splits"].get(split)
    if record is None or not record["samples"]:
        filled = [name for name, other in dataset["splits"].items() if other["samples"]]
        raise AlexprepError(f"{data} has no samples in split {split!r}; it has {', '.join(filled) or 'none at all'}")
    return dict(record)


def read_index(data: Path | str, split: str) -> NDArray[np.void]:
    """Where the samples of a split lie: index.npy, memory-mapped where it is on a local disk.

    `data` is the folder of a finished dataset, or a URL of one; `split` "train", "val" or "test".

    Returns:
        A structured array (samples,), in the order of the shards: `shard` uint32, its number; `offset` uint64 and `size` uint32, bytes,
        of the encoded image in the shard's tar; `label` int32; `height` and `width` uint32, pixels. An index of version 1, whose images
        are all squares of one side, is filled up in memory. AlexprepError where it is missing or is not such an array.
    """
    path = folder_at(data) / split / INDEX
    mapped = is_local(path)
    try:
        index: NDArray[np.void] = np.load(
            path if mapped else io.BytesIO(path.read_bytes()), "r" if mapped else None, allow_pickle=False
        )
    except AlexprepError:
        raise
    except Exception as error:  # noqa: BLE001  (numpy parses the header as Python, and raises what that raises)
        raise AlexprepError(f"{path} cannot be read ({error}): run the same `alexprep shard` again") from None
    if index.dtype not in INDEX_DTYPES.values() or index.ndim != 1:
        raise AlexprepError(f"{path} holds {index.dtype} of shape {index.shape}, not index records: shard again")
    return index if index.dtype == INDEX_DTYPE else _with_sizes(index, int(read_dataset(data)["image"]["size"]))


def _with_sizes(index: NDArray[np.void], side: int) -> NDArray[np.void]:
    """The records of an index of version 1 as those of version 2: images are squares of `side` pixels."""
    full = np.empty(len(index), INDEX_DTYPE)
    for name in index.dtype.names or ():
        full[name] = index[name]
    full["height"] = full["width"] = side
    return full


def data_digest(shards: dict[str, list[dict[str, Any]]], image: dict[str, Any], classes: list[str]) -> str:
    """The identity of a dataset, hex sha256: every shard's bytes, the image form, and the meaning of the labels."""
    digests = {split: [record["sha256"] for record in records] for split, records in shards.items()}
    return digest_json({"shards": digests, "image": image, "classes": classes})


def versions(*names: str) -> dict[str, str]:
    """The installed version of each library; "not installed" where it runs from a source tree or is absent."""
    import importlib.metadata  # takes as long as four images, and workers do without

    found = dict.fromkeys(names, "not installed")
    for name in names:
        for distribution in reversed(_DISTRIBUTIONS.get(name, (name,))):  # the first one that is there counts
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(distribution)
    return found


def interchangeable(name: str, one: object, other: object) -> bool:
    """Whether two versions of a library make the same shards: equal ones do, and releases of alexprep that are known to.

    None stands for a plan that does not name the library.
    """
    same_release = name == "alexprep" and one in _SAME_SHARDS and other in _SAME_SHARDS
    return one == other or same_release or (name in _TOOK_OVER and None in (one, other))


def processor() -> str:
    """The processor's model, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
