"""Every JPEG decoder that pip installs, one thread each, in turns over the same photos: images/s as one line of JSON.

All but the last two make RGB of the whole image with the exact inverse DCT and smooth chroma; "luma alone" leaves out the
inverse DCT of chroma, its upsampling and the colours, but must read as many bits.
"""

from __future__ import annotations

import io
import itertools
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS = 5


def decoders() -> dict[str, Callable[[bytes], Any]]:
    """A function for each, from a file's bytes to its pixels."""
    import av  # type: ignore[import-not-found]
    import cv2  # type: ignore[import-not-found]
    import imagecodecs  # type: ignore[import-not-found]
    import numpy as np
    import PIL
    import simplejpeg
    from kornia_rs import io as kornia  # type: ignore[import-not-found]
    from nvidia import nvimgcodec
    from PIL import Image

    cv2.setNumThreads(1)
    cpu = [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)]
    opened = nvimgcodec.Decoder(device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=cpu)
    params = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)
    frames = av.CodecContext.create("mjpeg", "r")
    frames.thread_count = 1
    return {
        f"nvImageCodec {nvimgcodec.__version__}": lambda data: opened.decode(
            nvimgcodec.CodeStream(data), params=params
        ),
        f"simplejpeg {simplejpeg.__version__}": lambda data: simplejpeg.decode_jpeg(
            data, fastdct=False, fastupsample=False
        ),
        f"imagecodecs {imagecodecs.__version__}": imagecodecs.jpeg8_decode,
        f"OpenCV {cv2.__version__}": lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR),
        "kornia-rs (zune-jpeg)": kornia.decode_image_jpeg,
        f"PyAV {av.__version__}, planes as stored": lambda data: frames.decode(av.Packet(data)),
        f"Pillow {PIL.__version__}": lambda data: Image.open(io.BytesIO(data)).convert("RGB"),
        "simplejpeg, fast DCT, no smooth chroma": lambda data: simplejpeg.decode_jpeg(
            data, fastdct=True, fastupsample=True
        ),
        "simplejpeg, luma alone": lambda data: simplejpeg.decode_jpeg(data, "GRAY", fastdct=False),
    }


def main(source: str, limit: str) -> None:
    """Times all on the JPEGs below `source`."""
    import simplejpeg

    paths = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    read = (path.read_bytes() for path in paths)
    # PyAV knows no CMYK, and grey has no chroma to compare.
    headers = ((data, simplejpeg.decode_jpeg_header(data)) for data in read)
    photos = list(itertools.islice(((data, header) for data, header in headers if header[2] == "YCbCr"), int(limit)))
    rates: dict[str, list[float]] = {}
    contestants = decoders()
    for turn in range(ROUNDS + 1):
        for name, decode in contestants.items():
            start = time.perf_counter()
            for data, _ in photos:
                decode(data)
            if turn:
                rates.setdefault(name, []).append(len(photos) / (time.perf_counter() - start))
    said = {
        "photos": len(photos),
        "bytes a photo": sum(len(data) for data, _ in photos) // len(photos),
        "pixels a photo": sum(header[0] * header[1] for _, header in photos) // len(photos),
        "chroma subsampling": dict(Counter(header[3] for _, header in photos)),
        "images/s": {name: statistics.median(values) for name, values in rates.items()},
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
