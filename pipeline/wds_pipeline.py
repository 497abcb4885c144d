"""Reads a finished dataset with plain torch through webdataset, for programs that do without DALI.

Images come out as they are stored, one sample at a time, for torchvision or a `transform` of one's own. Augmentation as the paper has it,
exact resume and decoding on a GPU are `alexprep.pipeline.loader`'s. Nothing here can unpickle or start a process: only local tars are
opened, and of their members only the image and the label are looked at.
"""

from __future__ import annotations

import functools
import io
import itertools
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import webdataset
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.utils import pytorch_worker_info

from alexprep.pipeline.sampler import rank_part, shard_order
from alexprep.shards.dataset_format import FORMATS, read_dataset, read_index, shard_name, split_record
from alexprep.shards.errors import AlexprepError, one_of, whole_number
from alexprep.shards.storage import folder_at, is_local
from alexprep.shards.tar_format import BLOCK

ImageKind = Literal["numpy", "torch", "pil"]

_PARTS = ("image", "label", "key")


class EpochPipeline(webdataset.DataPipeline):  # type: ignore[misc]  # webdataset is untyped
    """A `webdataset.DataPipeline` whose order depends on the epoch that it is told."""

    def __init__(self, samples: Callable[[torch.Tensor], Iterator[Any]], *stages: Any) -> None:
        """`samples` is called with the epoch, int64 (), at the beginning of each iteration."""
        # Workers that are already running see it change.
        self._epoch: torch.Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        super().__init__(functools.partial(samples, self._epoch), *stages)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the iterations that begin from now on; `epoch` from 0."""
        self._epoch.fill_(whole_number("epoch", epoch, 0, 2**32 - 1))


def webdataset_pipeline(
    data: str | Path,
    split: str = "train",
    *,
    parts: Sequence[str] = _PARTS,
    image: ImageKind = "numpy",
    transform: Callable[[Any], Any] | None = None,
    shuffle: bool = True,
    buffer: int = 1000,
    seed: int = 0,
    even: bool = True,
    rank: int | None = None,
    world_size: int | None = None,
) -> EpochPipeline:
    """Makes a webdataset pipeline over one split of a finished dataset: an `IterableDataset` for torch's `DataLoader`.

    One iteration is one epoch. The epoch's order is cut into contiguous parts, one a rank, and these again, one a DataLoader worker:
    by samples and not by shards, of which there may be fewer than workers. So each sample comes once, from one worker of one rank.
    The order depends on (seed, epoch) and on how many ranks and workers there are: call `set_epoch(epoch)` before each epoch, as for
    torch's DistributedSampler, or all epochs have the order of epoch 0. It reaches workers that are already running.

    Args:
        data: a finished dataset in a local folder.
        split: "train", "val" or "test".
        parts: what a sample consists of, in this order: "image"; "label", an int, -1 where there is none; "key", a str.
        image: "numpy", uint8 (H, W, 3); "torch", a uint8 tensor (3, H, W); "pil", a `PIL.Image.Image`. RGB, 0-255.
        transform: called with the image; its result takes the image's place. Spawned workers need one that can be pickled.
        shuffle: whether shards are read in another order each epoch, and samples drawn from a buffer; else all come as stored.
        buffer: encoded samples that a worker keeps to draw from; 0 or 1 for none.
        seed: of the orders, 0 to 2**63 - 1.
        even: whether all ranks get the same number of samples, and so of batches: up to `world_size` - 1 samples of an epoch are
            left out, other ones each epoch. False: none is left out, and ranks' numbers differ by one at most.
        rank: of this process. With `world_size`; by default what torchrun's environment or `torch.distributed` says by now.
        world_size: how many processes share an epoch.

    Returns a `webdataset.DataPipeline` of tuples of `parts`, to which further stages can be composed, with `set_epoch`.

    Raises:
        AlexprepError: no such data or not in a local folder, or an argument out of its bounds; when iterated, a shard that is damaged or
            gone, or an image that cannot be decoded.
    """
    folder = folder_at(str(data))
    if not is_local(folder):
        raise AlexprepError(f"{data} is no local folder: copy the shards to a disk, or use Loader with order='streams'")
    dataset = read_dataset(folder)
    count = split_record(dataset, split, folder)["samples"]
    extension = FORMATS[dataset["image"]["format"]]
    if not parts or not set(parts) <= set(_PARTS):
        raise AlexprepError(f"parts {tuple(parts)} are not some of {', '.join(_PARTS)}")
    one_of("image", image, get_args(ImageKind))
    if rank is None and world_size is None:
        rank, world_size, _, _ = pytorch_worker_info()  # now: worker processes know nothing of torch.distributed
    world_size = whole_number("world_size", world_size, 1, 2**31 - 1)
    rank = whole_number("rank", rank, 0, world_size - 1)
    seed, buffer = whole_number("seed", seed, 0, 2**63 - 1), whole_number("buffer", buffer, 0, 2**31 - 1)
    part = rank_part(0, count - count % world_size * even, rank, world_size)
    shuffling = (seed, rank, buffer) if shuffle else None
    kind = image if "image" in parts else None
    labelled = not dataset.get("unlabelled")
    return EpochPipeline(
        functools.partial(_encoded_samples, folder / split, extension, part, shuffling),
        webdataset.map(functools.partial(_decoded, extension, kind, labelled)),
        webdataset.map_dict(image=transform) if kind and transform else None,
        webdataset.to_tuple(*parts, none_is_error=False),
    )


def _encoded_samples(
    folder: Path, extension: str, part: tuple[int, int], shuffling: tuple[int, int, int] | None, epoch: torch.Tensor
) -> Iterator[dict[str, Any]]:
    """This worker's share of its rank's part of an epoch, each sample as {"__key__", "__url__", extension: bytes, "cls": bytes}."""
    index = read_index(folder.parent, folder.name)
    shards = np.split(np.arange(len(index)), np.flatnonzero(np.diff(index["shard"])) + 1)  # the rows of each
    if shuffling is not None:
        seed, rank, buffer = shuffling
        shards = [shards[n] for n in shard_order(seed, int(epoch), len(shards))]
    _, _, worker, workers = pytorch_worker_info()
    first, last = rank_part(*part, worker, workers)
    rows = np.concatenate(shards)[first:last]
    runs = np.split(rows, np.flatnonzero(np.diff(index["shard"][rows])) + 1)
    samples = itertools.chain.from_iterable(
        _run_of_samples(folder, index[run[0]], len(run), (f".{extension}", ".cls")) for run in runs if len(run)
    )
    if shuffling is None or buffer < 2:
        return samples
    rng = random.Random(f"{seed} {int(epoch)} {rank} {worker}")
    drawn: Iterator[dict[str, Any]] = webdataset.shuffle(buffer, initial=buffer, rng=rng)(samples)
    return drawn


def _run_of_samples(folder: Path, record: np.void, count: int, members: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """`count` samples of a shard from the one on whose `record` of the index says; of their files those that end as `members`."""
    path = folder / f"{shard_name(folder.name, record['shard'])}.tar"
    try:
        with path.open("rb") as file:
            file.seek(int(record["offset"]) - BLOCK)  # to the header of the image, which is a sample's first member
            opened = [{"url": str(path), "stream": file}]
            files = tar_file_expander(opened, select_files=lambda name: name.endswith(members))
            for sample in itertools.islice(group_by_keys(files), count):
                count -= 1
                yield sample
    except (OSError, ValueError, tarfile.TarError) as error:
        raise AlexprepError(f"{path} cannot be read ({error.args[0]}): `alexprep verify` tells more") from error
    if count:
        raise AlexprepError(f"{path} lacks {count:,} samples of its index: `alexprep verify` tells more")


def _decoded(extension: str, kind: ImageKind | None, labelled: bool, sample: dict[str, Any]) -> dict[str, Any]:
    """The parts of an encoded sample; without `kind`, no image."""
    try:
        found = {"key": sample["__key__"], "label": int(sample["cls"]) if labelled else -1}
        if kind is not None:
            found["image"] = _image(sample[extension], extension, kind)
    except Exception as error:  # whatever Pillow raises on damaged bytes
        raise AlexprepError(
            f"{sample['__url__']} holds a sample {sample['__key__']} that cannot be decoded ({type(error).__name__}: {error}): "
            "`alexprep verify` tells more"
        ) from error
    return found


def _image(encoded: bytes, extension: str, kind: ImageKind) -> Any:
    stored = io.BytesIO(encoded)
    if extension == "npy":
        picture = Image.fromarray(np.load(stored, allow_pickle=False))
    else:
        picture = Image.open(stored, formats=("JPEG", "PNG", "WEBP")).convert("RGB")
    if kind == "pil":
        return picture
    pixels = np.array(picture)
    return pixels if kind == "numpy" else torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
