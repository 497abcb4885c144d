"""One process that reads a set with alexprep, MosaicML Streaming or LitData, in that library's environment: `stores.py` starts it.

python benchmarks/store_reader.py LIBRARY JOB       tells in lines of JSON that it has begun, and then all that it found
python benchmarks/store_reader.py LIBRARY TARS OUT  writes a library's own format

A job has "data", "epochs" and "batch", and where they matter "resume", "cache", "cache_limit", "rank", "world_size", "order", "decode" and "hold", to wait after the
first batch until a line comes.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

CROP = 224  # pixels, as the paper's augmentation cuts them for alexprep
SHARD_BYTES = 3_300_000  # of a peer's shard: as many as those of alexprep in the set that was measured


class Alexprep:
    """`Loader`, also of older versions: with the paper's augmentation, or small crops where decoding does not matter."""

    def __init__(self, job: dict[str, Any]) -> None:
        """Opens the set."""
        from alexprep.pipeline import Augmentation, Loader

        self.job = job
        augmentation = "paper" if job.get("decode") else Augmentation(crop=64, mean="none", noise="none")
        known = inspect.signature(Loader).parameters
        names = ("order", "rank", "world_size", "epochs", "cache", "cache_limit")
        options = {name: job[name] for name in names if name in job and name in known}
        self.loader = Loader(
            job["data"],
            batch_size=job["batch"],
            augmentation=augmentation,
            memory_format="channels_last",
            threads=1,
            seed=1,
            **options,
        )

    def epoch(self) -> Iterator[tuple[int, int]]:
        """Of each batch how many images it has, and a number by which it is known."""
        for batch in self.loader:
            yield len(batch.labels), int(batch.indices.sum()) * 31 + int(batch.labels.sum())

    def resumed(self) -> Alexprep:
        """The set opened anew, in the middle of the second epoch."""
        other = Alexprep(self.job)
        other.loader.load_state_dict(self.loader.state_dict() | {"epoch": 1, "step": len(self.loader) // 2})
        self.close()
        return other

    def close(self) -> None:
        """Ends its threads."""
        self.loader.close()


class Peer:
    """A loader of `torch.utils.data` whose samples are {"image": bytes, "label": int}: decoded by Pillow, cropped and reflected at random."""

    loader: Any

    def __init__(self, job: dict[str, Any]) -> None:
        """Joins the other ranks, if there are any."""
        self.job, self.random = job, np.random.default_rng(1)
        if job.get("world_size", 1) > 1:
            names = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
            values = zip(names, (job["rank"], job["world_size"]), strict=True)
            os.environ.update({name: str(value) for both, value in values for name in both})
            torch.distributed.init_process_group("gloo")

    def epoch(self) -> Iterator[tuple[int, int]]:
        """As `Alexprep.epoch`."""
        for batch in self.loader:
            if self.job.get("decode"):
                torch.stack([self.decoded(image) for image in batch["image"]])
            yield len(batch["label"]), int(batch["label"].sum())

    def decoded(self, image: bytes) -> torch.Tensor:
        """Float32 (3, CROP, CROP)."""
        pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        top, left = (int(self.random.integers(size - CROP + 1)) for size in pixels.shape[:2])
        window = pixels[top : top + CROP, left : left + CROP]
        if self.random.integers(2):
            window = window[:, ::-1]
        return torch.from_numpy(window.astype(np.float32)).permute(2, 0, 1) - 117

    def resumed(self) -> Peer:
        """The set opened anew with an empty cache, in the middle of an epoch, of which this one reads the first half."""
        for _ in zip(range(len(self.loader) // 2), self.epoch(), strict=False):
            pass
        other = type(self)(self.job | {"cache": f"{self.job['cache']}-resumed"})
        other.loader.load_state_dict(self.loader.state_dict())
        return other

    def close(self) -> None:
        """Nothing to end."""


class Streaming(Peer):
    """MosaicML Streaming."""

    def __init__(self, job: dict[str, Any]) -> None:
        """Opens the set; what is fetched is kept in the cache."""
        from streaming import StreamingDataLoader, StreamingDataset

        super().__init__(job)
        dataset = StreamingDataset(
            remote=job["data"],
            local=job["cache"],
            cache_limit=job.get("cache_limit"),
            shuffle=True,
            batch_size=job["batch"] // job.get("world_size", 1),
        )
        self.loader = StreamingDataLoader(dataset, batch_size=job["batch"] // job.get("world_size", 1), num_workers=0)

    @staticmethod
    def write(samples: Iterator[tuple[bytes, int]], out: str) -> None:
        """Writes MDS."""
        from streaming import MDSWriter

        with MDSWriter(out=out, columns={"image": "bytes", "label": "int"}, size_limit=SHARD_BYTES) as writer:
            for image, label in samples:
                writer.write({"image": image, "label": label})


class LitData(Peer):
    """LitData. A state of it is refused where the cache lies elsewhere, so it is not resumed with an empty one."""

    def __init__(self, job: dict[str, Any]) -> None:
        """Opens the set; what is fetched is kept in the cache."""
        from litdata import StreamingDataLoader, StreamingDataset
        from litdata.streaming import downloader

        getattr(downloader, "_OBSTORE_CLIENT_OPTIONS", {})["allow_http"] = True  # which it has no argument for
        super().__init__(job)
        limit = {"max_cache_size": f"{job['cache_limit'] // 10**6}MB"} if "cache_limit" in job else {}
        dataset = StreamingDataset(
            input_dir=job["data"],
            cache_dir=job["cache"],
            shuffle=True,
            drop_last=False,
            storage_options={
                "endpoint_url": os.environ["AWS_ENDPOINT_URL"],
                "aws_access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
                "aws_secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
            },
            **limit,
        )
        self.loader = StreamingDataLoader(dataset, batch_size=job["batch"] // job.get("world_size", 1), num_workers=0)

    @staticmethod
    def write(samples: Iterator[tuple[bytes, int]], out: str) -> None:
        """Writes chunks."""
        from litdata.streaming.cache import Cache

        cache = Cache(out, chunk_bytes=SHARD_BYTES)
        for number, (image, label) in enumerate(samples):
            cache[number] = {"image": image, "label": label}
        cache.done()
        cache.merge()


LIBRARIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "alexprep": Alexprep,
    "streaming": Streaming,
    "litdata": LitData,
}


def samples_in(tars: Path) -> Iterator[tuple[bytes, int]]:
    """The images and labels of alexprep's shards."""
    for path in sorted(tars.glob("*.tar")):
        with tarfile.open(path) as tar:
            image = b""
            for member in tar:
                file = tar.extractfile(member)
                content = b"" if file is None else file.read()
                if member.name.endswith(".cls"):
                    yield image, int(content)
                elif member.name.endswith(".jpg"):
                    image = content


def read(library: str, job: dict[str, Any], found: dict[str, Any]) -> None:
    """The epochs of a job. Seconds: `opening`; until the `first` batch; the longest `wait` for any other; CPU time of this process.

    `rates` are images/s of each epoch, the first batch's time included; `resume` goes from a set that is opened anew, in the middle of an
    epoch, to its first batch. `order` stands for all batches in their order. All goes into `found`, and `last`, when the last batch came.
    """
    torch.set_num_threads(1)
    used, began = time.process_time(), time.perf_counter()
    reader = LIBRARIES[library](job)
    found |= {"opening": round(time.perf_counter() - began, 2), "rates": [], "images": 0, "order": 0}
    waits: list[float] = []
    for _ in range(job["epochs"]):
        start = last = time.perf_counter()
        images = 0
        for count, known_by in reader.epoch():
            waits.append(time.perf_counter() - last)
            images += count
            if len(waits) == 1:
                print(json.dumps({"begun": True}), flush=True)
                if job.get("hold"):
                    sys.stdin.readline()
            found["order"] = (found["order"] * 1_000_003 + known_by) % 2**61
            last = found["last"] = time.perf_counter()
        found["rates"].append(round(images / (last - start)))
        found["images"] += images
    print(json.dumps({"read": True}), flush=True)
    found |= {
        "first": round(waits[0], 2),
        "wait": round(max(waits[1:]), 2),
        "cpu": round(time.process_time() - used, 1),
    }
    if job.get("resume") and library != "litdata":
        reader = reader.resumed()
        began = time.perf_counter()
        next(reader.epoch())
        found["resume"] = round(time.perf_counter() - began, 2)
    reader.close()


def main() -> None:
    """Tells what was found, or how it ended and how many seconds after the last batch."""
    found: dict[str, Any] = {"last": time.perf_counter()}
    try:
        read(sys.argv[1], json.loads(sys.argv[2]), found)
    except Exception as error:  # noqa: BLE001  (each library has its own kinds)
        found |= {"ended": type(error).__name__, "after": round(time.perf_counter() - found["last"])}
    print(json.dumps(found), flush=True)
    os._exit(0)  # whatever threads go on


if __name__ == "__main__":
    if len(sys.argv) == 4:
        LIBRARIES[sys.argv[1]].write(samples_in(Path(sys.argv[2])), sys.argv[3])  # type: ignore[attr-defined]
    else:
        main()
