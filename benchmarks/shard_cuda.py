"""The codec on a GPU beside the codec on one core, on the same photos from memory: images/s, and how far the pixels differ.

python benchmarks/shard_cuda.py SOURCE [--limit N] [--device cuda] [--save]      SOURCE: a tree of class folders

From a source tree that is not installed: PYTHONPATH=build/types python benchmarks/shard_cuda.py … (`make build/types`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from common import command_line, in_turns, report
from numpy.typing import NDArray
from nvidia import nvimgcodec
from PIL import Image

from alexprep.shards.image_codec import Codec, Converted, Target
from alexprep.shards.image_codec_cuda import CudaCodec
from alexprep.shards.image_header import Refused
from alexprep.shards.sources.base import Account
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.worker_pool import one_thread


def main() -> None:
    """Times both codecs and the GPU's decoders alone, then compares what came out."""
    parser = command_line(__doc__)
    parser.add_argument("source")
    parser.add_argument("--limit", type=int, default=1024, help="images")
    parser.add_argument("--device", default="cuda", help="cpu: the same batches without a GPU, to try this file")
    arguments = parser.parse_args()
    one_thread()
    source = find_source(arguments.source)
    read = (
        source.read(item.location) for item, _ in zip(source.inputs(Account()), range(arguments.limit), strict=False)
    )
    images = [data for data in read if not isinstance(data, Refused)]
    cpu, gpu = Codec(Target()), CudaCodec(Target(), arguments.device)
    contestants: dict[str, Callable[[], int]] = {
        "cpu": lambda: len([cpu.convert(data) for data in images]),
        "gpu": lambda: len(_in_batches(gpu, images)),
        "one": lambda: len([gpu.convert(data) for data in images[: CudaCodec.batch]]),
        "decode": lambda: _decode(gpu, gpu._gpu_decoder, images),
    }
    if arguments.device != "cpu":  # with the GPU's JPEG engine where it has one, which CudaCodec leaves alone
        every = nvimgcodec.Decoder(device_id=gpu._gpu_decoder.device_id)
        contestants["engine"] = lambda: _decode(gpu, every, images)
    rates = in_turns(contestants)
    ours, theirs = _in_batches(gpu, images), [cpu.convert(data) for data in images]
    works = [work for data in images if (work := gpu._work(data)) is not None]
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(a, Converted) and isinstance(b, Converted)]
    means, peaks = zip(*(_difference(a.data, b.data) for a, b in pairs), strict=True)
    figures: dict[str, Any] = {
        "images": len(images),
        "images a batch": CudaCodec.batch,
        "images for the GPU": len(works),
        "of them decoded and encoded there": sum(
            data is not None
            for at in range(0, len(works), CudaCodec.batch)
            for data in gpu._encoded(works[at : at + CudaCodec.batch])
        ),
        "codec, one core, images/s": rates["cpu"],
        "codec, GPU, batches, images/s": rates["gpu"],
        "codec, GPU, one by one, images/s": rates["one"],
        "GPU / one core": rates["gpu"] / rates["cpu"],
        "decode on the GPU alone, images/s": rates["decode"],
        "decode alone with all backends, images/s": rates.get("engine"),
        "fates that differ": sum(type(a) is not type(b) for a, b in zip(ours, theirs, strict=True)),
        "mean difference, grey levels": float(np.mean(means)),
        "mean difference of the worst image, grey levels": max(means),
        "largest difference of a pixel, grey levels": max(peaks),
        "bytes, GPU / CPU": sum(len(a.data) for a, _ in pairs) / sum(len(b.data) for _, b in pairs),
    }
    report("shard_cuda", figures, arguments.save)


def _in_batches(codec: CudaCodec, images: Sequence[bytes | NDArray[np.uint8]]) -> list[Converted | Refused]:
    return [
        done
        for at in range(0, len(images), CudaCodec.batch)
        for done in codec.convert_many(images[at : at + CudaCodec.batch])
    ]


def _decode(codec: CudaCodec, decoder: Any, images: Sequence[bytes | NDArray[np.uint8]]) -> int:
    """Headers and whole images, no more; waits for the pixels."""
    count = 0
    for at in range(0, len(images), CudaCodec.batch):
        works = [work for data in images[at : at + CudaCodec.batch] if (work := codec._work(data)) is not None]
        options = {"params": codec._decode_params, "cuda_stream": codec._handle}
        decoded = decoder.decode([work.source for work in works], **options)
        if codec._stream is not None:
            codec._stream.synchronize()
        count += len(decoded)
    return count


def _difference(ours: bytes, theirs: bytes) -> tuple[float, int]:
    """The mean and the largest difference of two encoded images, grey levels."""
    a, b = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16) for data in (ours, theirs))
    return float(np.abs(a - b).mean()), int(np.abs(a - b).max())


if __name__ == "__main__":
    main()
