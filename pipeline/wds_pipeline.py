"""Reads a finished dataset with plain torch through webdataset, for programs that do without DALI.

Images come out as they are stored, one sample at a time, for torchvision or a `transform` of one's own. Augmentation as the paper has it,
exact resume and decoding on a GPU are `alexprep.pipeline.loader`'s. Nothing here can unpickle or start a process: only local tars are
opened, and of their members only the image and the label are looked at.
"""

from __future__ import annotations

import io
import itertools
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.utils import pytorch_worker_info

from alexprep.pipeline.sampler import rank_part, shard_order
from alexprep.shards.dataset_format import FORMATS, read_dataset, read_index, shard_name, split_record
from alexprep.shards.errors import AlexprepError, whole_number
from alexprep.shards.storage import folder_at, is_local
from alexprep.shards.tar_format import BLOCK

ImageKind = Literal["numpy", "torch", "pil"]

_PARTS = ("image", "label", "key")


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
        transform: called with the image; its result takes the image's place. With worker processes that are spawned, a function
            that can be pickled.
        shuffle: whether shards are read in another order each epoch, and samples drawn from a buffer; else all come as stored.
        buffer: encoded samples that a worker keeps to draw from; 0 or 1 for none.
        seed: of the orders, 0 to 2**63 - 1.
        even: whether all ranks get the same number of samples, and so of batches: up to `world_size` - 1 samples of an epoch are
            left out, other ones each epoch. False: none is left out, and ranks' numbers differ by one at most.
        rank: of this process, in [0, world_size). Together with `world_size`; by default what torchrun's environment or
            `torch.distributed` says when the pipeline is made.
        world_size: how many processes share an epoch.

    Returns:
        A `webdataset.DataPipeline`, to which further stages can be composed, with `set_epoch`. It yields tuples of `parts`.

    Raises:
        AlexprepError: no such data or not in a local folder, or an argument out of its bounds; when iterated, a shard that is damaged or
            gone, or an image that cannot be decoded.
    """
    folder = folder_at(str(data))
    if not is_local(folder):
        raise AlexprepError(f"{data} is no local folder: copy the shards to a disk, or use Loader with order='blocks'")
    dataset = read_dataset(folder)
    split_record(dataset, split, folder)
    if not parts or not set(parts) <= set(_PARTS):
        raise AlexprepError(f"parts {tuple(parts)} are not some of {', '.join(_PARTS)}")
    if image not in get_args(ImageKind):
        raise AlexprepError(f"image {image!r} is not one of {', '.join(get_args(ImageKind))}")
    if (rank is None) != (world_size is None):
        raise AlexprepError(f"rank {rank} and world_size {world_size} go together: give both or none")
    if rank is None:
        rank, world_size, _, _ = pytorch_worker_info()  # now: worker processes know nothing of torch.distributed
    world_size = whole_number("world_size", world_size, 1, 2**31 - 1)
    rank = whole_number("rank", rank, 0, world_size - 1)
    member = FORMATS[dataset["image"]["format"]]
    seed, buffer = whole_number("seed", seed, 0, 2**63 - 1), whole_number("buffer", buffer, 0, 2**31 - 1)
    # Workers that are already running see it change.
    epoch: torch.Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
    source = _EncodedSamples(
        folder, split, (f".{member}", ".cls"), shuffle, buffer, seed, even, rank, world_size, epoch
    )
    decode = _Decode(member, image, transform, tuple(parts))
    return EpochPipeline(source, webdataset.map(decode), epoch=epoch)


class EpochPipeline(webdataset.DataPipeline):  # type: ignore[misc]  # webdataset is untyped
    """A `webdataset.DataPipeline` whose order depends on the epoch that it is told."""

    def __init__(self, *stages: Any, epoch: torch.Tensor) -> None:
        """Made by `webdataset_pipeline`; `epoch` is int64 (), in memory that worker processes share."""
        super().__init__(*stages)
        self._epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the iterations that begin from now on; `epoch` from 0."""
        self._epoch.fill_(whole_number("epoch", epoch, 0, 2**32 - 1))


@dataclass(frozen=True)
class _EncodedSamples:
    """The pipeline's first stage: this worker's part of an epoch, each sample as {"__key__", "__url__", extension: bytes, …}."""

    folder: Path
    split: str
    members: tuple[str, ...]  # how the names of those end that are read
    shuffle: bool
    buffer: int
    seed: int
    even: bool
    rank: int
    world_size: int
    epoch: torch.Tensor

    def __call__(self) -> Iterator[dict[str, Any]]:
        """One epoch."""
        _, _, worker, workers = pytorch_worker_info()
        index, epoch = read_index(self.folder, self.split), int(self.epoch)
        count = len(index) - len(index) % self.world_size * self.even
        part = rank_part(*rank_part(0, count, self.rank, self.world_size), worker, workers)
        samples = itertools.chain.from_iterable(
            self._span(*span) for span in _spans(index, part, (self.seed, epoch) if self.shuffle else None)
        )
        if not self.shuffle or self.buffer < 2:
            return samples
        rng = random.Random(f"{self.seed} {epoch} {self.rank} {worker}")
        drawn: Iterator[dict[str, Any]] = webdataset.shuffle(self.buffer, initial=self.buffer, rng=rng)(samples)
        return drawn

    def _span(self, shard: int, offset: int, count: int) -> Iterator[dict[str, Any]]:
        """`count` samples of a shard, the first of which has its image at byte `offset`."""
        path = self.folder / self.split / f"{shard_name(self.split, shard)}.tar"
        try:
            with path.open("rb") as file:
                file.seek(offset - BLOCK)  # to the header of the image, which is a sample's first member
                opened = [{"url": str(path), "stream": file}]
                files = tar_file_expander(opened, select_files=lambda name: name.endswith(self.members))
                for sample in itertools.islice(group_by_keys(files), count):
                    count -= 1
                    yield sample
        except (OSError, ValueError, tarfile.TarError) as error:
            raise AlexprepError(f"{path} cannot be read ({error.args[0]}): `alexprep verify` tells more") from error
        if count:
            raise AlexprepError(f"{path} lacks {count:,} samples of its index: `alexprep verify` tells more")


def _spans(
    index: NDArray[np.void], part: tuple[int, int], seed_and_epoch: tuple[int, int] | None
) -> Iterator[tuple[int, int, int]]:
    """Where the samples [first, last) of an epoch's order lie: shard, offset of the first image, number of samples."""
    shards, starts, counts = np.unique(index["shard"], return_index=True, return_counts=True)
    order = np.arange(len(shards)) if seed_and_epoch is None else shard_order(*seed_and_epoch, len(shards))
    first, last = part
    at = 0
    for n in order.tolist():
        low, high = max(first - at, 0), min(last - at, int(counts[n]))
        if low < high:
            yield int(shards[n]), int(index["offset"][starts[n] + low]), high - low
        at += int(counts[n])


@dataclass(frozen=True)
class _Decode:
    """The pipeline's second stage: an encoded sample to a tuple of its parts."""

    member: str
    image: ImageKind
    transform: Callable[[Any], Any] | None
    parts: tuple[str, ...]

    def __call__(self, sample: dict[str, Any]) -> tuple[Any, ...]:
        found = {"key": sample["__key__"]}
        try:
            if "image" in self.parts:
                found["image"] = self._image(sample[self.member])
            found["label"] = int(sample["cls"])
        except Exception as error:  # whatever Pillow raises on damaged bytes
            raise AlexprepError(
                f"{sample['__url__']} holds a sample {sample['__key__']} that cannot be decoded ({type(error).__name__}: {error}): "
                "`alexprep verify` tells more"
            ) from error
        if "image" in self.parts and self.transform is not None:
            found["image"] = self.transform(found["image"])
        return tuple(found[part] for part in self.parts)

    def _image(self, encoded: bytes) -> Any:
        if self.member == "npy":
            pixels: NDArray[np.uint8] = np.load(io.BytesIO(encoded), allow_pickle=False)
            if pixels.dtype != np.uint8:
                raise ValueError(f"{pixels.dtype} where uint8 belongs")
        else:
            opened = Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")).convert("RGB")
            if self.image == "pil":
                return opened
            pixels = np.array(opened)
        if self.image == "pil":
            return Image.fromarray(pixels)
        return pixels if self.image == "numpy" else torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
