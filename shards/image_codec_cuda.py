"""Converts images on a GPU: plain JPEGs are decoded, resized and encoded there in batches, anything else on the CPU.

Only JPEGs in YCbCr or grey go to the GPU, where each is decoded whole: nvJPEG before 13.2 refuses a region of an image
with subsampled chroma as long as it interpolates chroma, as libjpeg does. The rest is what `Codec` does, on the CPU:
headers, limits, every other kind of file, JPEGs that libjpeg warns of (the GPU's decoder says nothing), and whatever the GPU refuses,
so that the ledger is the same.

Order: one CUDA stream carries everything. nvImageCodec lets it wait for its own streams, torch launches on it, and both
free their memory in its order; the host waits only for bytes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia import nvimgcodec
from torch.utils.dlpack import from_dlpack

from alexprep.shards.errors import AlexprepError, DeviceLostError
from alexprep.shards.image_codec import Codec, Converted, Target, in_colour
from alexprep.shards.image_header import LIBJPEG, MAX_PIXELS, Frame, Refused, jpeg_frame, reader_of
from alexprep.shards.jpeg_decoder import is_sound
from alexprep.shards.resample import COLUMN_BITS, MIDDLE_BITS, ROW_BITS, Axis, Resize, rounded_weights, weights

_MEMORY_WORDS = ("out of memory", "memoryallocation", "allocator", "alloc failed")
_ROOM = 64 * 2**20  # bytes that nvJPEG's own tables and buffers may take
_MATRICES = 512  # kept on the device, 0.4 MB each for photos of 500 pixels; sizes repeat within a dataset


class _Work(NamedTuple):
    source: Any  # a CodeStream, or pixels: uint8 (H, W, 3)
    resize: Resize
    height: int
    width: int
    kept: bytes | None  # the source's, where they have the target form already


class CudaCodec(Codec):
    """`Codec` with a GPU. `convert_many` is the way to use it; `convert` is a batch of one. Not to be shared by threads.

    The bytes of a sound image do not depend on the images beside it, nor on how many there are.
    """

    batch = 64  # more gains little and holds more memory

    def __init__(self, target: Target, device: str = "cuda") -> None:
        # Device "cpu" takes the same steps with nvImageCodec's CPU decoder, for tests.
        super().__init__(target)
        self._device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        self._free_memory: Callable[[], int] | None = None
        self._handle, self._gpu_decoder, self._gpu_encoder = 0, self._decoder, self._encoder
        self._resizer = Resizer(self._device)
        if self._device.type == "cuda":
            self._open()

    def _open(self) -> None:
        """The decoder is nvJPEG's that takes each image by itself, and no other.

        With the GPU's JPEG engine, where there is one, an image could get other pixels on account of a damaged neighbour,
        or of the GPU's model. And what nvJPEG refuses shall come back, not go to a CPU decoder behind this one.
        """
        check_cuda()
        number = torch.cuda.current_device() if self._device.index is None else self._device.index
        torch.cuda.set_device(number)  # so that "cuda" means one and the same GPU to both libraries
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._handle = self._stream.cuda_stream
        self._free_memory = lambda: int(torch.cuda.mem_get_info()[0])
        probe = bytes(self._encoder.encode(nvimgcodec.as_image(np.zeros((64, 48, 3), np.uint8)), "jpeg"))
        try:
            hybrid = nvimgcodec.Backend(nvimgcodec.BackendKind.HYBRID_CPU_GPU)
            self._gpu_decoder = nvimgcodec.Decoder(device_id=number, backends=[hybrid], max_num_cpu_threads=1)
            self._gpu_encoder = nvimgcodec.Encoder(device_id=number, max_num_cpu_threads=1)
            if (work := self._work(probe)) is not None and self._encoded([work]) != [None]:
                return
            reason = "it refuses a good one"  # as it would all, which would then take the CPU's way in silence
        except RuntimeError as error:
            if _out_of_memory(error):
                raise _too_little_memory("to begin", error) from error
            reason = str(error)
        raise AlexprepError(
            f"--device cuda: nvJPEG does not decode and encode JPEGs here ({reason}); is it installed (pip install "
            "nvidia-nvjpeg-cu12; nvidia-nvjpeg beside nvidia-nvimgcodec-cu13)? --device cpu does without"
        )

    def convert(self, data: bytes | NDArray[np.uint8]) -> Converted | Refused:
        """As `Codec.convert`, with the errors of `convert_many`."""
        return self.convert_many([data])[0]

    def convert_many(self, inputs: Sequence[bytes | NDArray[np.uint8]]) -> list[Converted | Refused]:
        """Converts each of `inputs` (`batch` of what `convert` takes); what one of them holds costs no other.

        Too little free memory on the GPU for one image by itself is an AlexprepError. The CPU's pixels differ, so it cannot stand
        in: bytes would depend on who else uses the GPU.
        """
        works = [(n, work) for n, data in enumerate(inputs) if (work := self._work(data)) is not None]
        done: dict[int, Converted] = {}
        for batch in _batches(works):
            encoded = self._encoded_patiently([work for _, work in batch])
            for (n, work), data in zip(batch, encoded, strict=True):
                if data is not None:
                    done[n] = Converted(data, work.width, work.height, work.resize.size, work.kept is not None)
        return [done.get(n) or Codec.convert(self, data) for n, data in enumerate(inputs)]

    def _work(self, data: bytes | NDArray[np.uint8]) -> _Work | None:
        """What the GPU is to do for an input; None where the CPU does it all."""
        if not isinstance(data, bytes):
            pixels = in_colour(data)
            height, width = pixels.shape[:2]
            if self.target.beyond(height, width):
                return None
            return _Work(pixels, self.target.resize(height, width), height, width, None)
        frame = jpeg_frame(data) if reader_of(data) == LIBJPEG else None
        if not isinstance(frame, Frame):
            return None
        stream = self._parse(data)
        if stream is None or not _plain(stream, data) or not is_sound(data, frame):
            return None
        orientation = self._orientation(data, frame.height, frame.width)
        if (self.target.orient and orientation != 1) or self.target.beyond(frame.height, frame.width):
            return None
        kept = data if orientation == 1 and self._is_target_jpeg(frame) else None
        resize = self.target.resize(stream.height, stream.width)
        return _Work(stream, resize, stream.height, stream.width, kept)

    def _encoded_patiently(self, works: list[_Work]) -> list[bytes | None]:
        """`_encoded`; after an error, such as too little memory on the GPU, and for those it refused, each image by itself."""
        try:
            done = self._encoded(works)
            final = self._free_memory is None  # a GPU may also refuse for want of memory
        except RuntimeError as error:  # of torch and of nvImageCodec, for whatever CUDA reports
            if self._stream is not None:
                _ensure_alive(error)
            done, final = [None] * len(works), False
        if final or None not in done:
            return done
        torch.cuda.empty_cache()  # torch keeps what it frees; here nvImageCodec may need it
        return [self._encoded_alone(work) if data is None else data for work, data in zip(works, done, strict=True)]

    def _encoded_alone(self, work: _Work) -> bytes | None:
        """One image's bytes; None where it is the image that cannot be done, and not the GPU's memory that is too small."""
        purpose = f"for an image of {work.width} x {work.height}"
        try:
            (data,) = self._encoded([work])
        except RuntimeError as error:
            if self._stream is not None:
                _ensure_alive(error)
            if _out_of_memory(error):
                raise _too_little_memory(purpose, error) from error
            data = None
        # With so much one image is never refused for want of memory: coefficients of 2 bytes, planes and pixels, for three channels.
        needed = _ROOM + 16 * work.height * work.width
        if data is None and self._free_memory is not None and (free := self._free_memory()) < needed:
            raise _too_little_memory(purpose, f"{free:,} bytes free")
        return data

    def _encoded(self, works: list[_Work]) -> list[bytes | None]:
        """The bytes that images become; None for one that nvJPEG refuses. All on the one stream."""
        with torch.cuda.stream(self._stream):  # no effect where it is None
            sources = [work.source for work in works]
            streams = [source for source in sources if not isinstance(source, np.ndarray)]
            if streams:
                options = {"params": self._decode_params, "cuda_stream": self._handle}
                decoded = iter(self._gpu_decoder.decode(streams, **options))
                sources = [source if isinstance(source, np.ndarray) else next(decoded) for source in sources]
            result = [work.kept for work in works]
            fitted: dict[int, torch.Tensor] = {}
            for n, (image, work) in enumerate(zip(sources, works, strict=True)):
                if image is None:
                    result[n] = None
                elif work.kept is None:
                    fitted[n] = self._fitted_tensor(image, work.resize)
            for n, data in zip(fitted, self._encode_many(list(fitted.values())), strict=True):
                result[n] = data
        return result

    def _fitted_tensor(self, image: Any, resize: Resize) -> torch.Tensor:
        """uint8 (*resize.size, 3) of pixels or of a decoded image, which is not copied and lives as long as its tensor."""
        if isinstance(image, np.ndarray):
            pixels = torch.tensor(np.ascontiguousarray(image), device=self._device)
        else:
            pixels = torch.from_numpy(np.asarray(image)) if self._stream is None else from_dlpack(image)
        if not resize.only_cuts:
            return self._resizer(pixels, resize)
        top, left, bottom, right = resize.region
        return pixels[top:bottom, left:right].contiguous()

    def _encode_many(self, images: list[torch.Tensor]) -> list[bytes | None]:
        """Encodes uint8 (H, W, 3); None where nvJPEG refuses. Other formats are the CPU's."""
        if not images:
            return []
        if self.target.format != "jpg":
            return [self.encode(pixels.cpu().numpy()) for pixels in images]
        buffers = [image.numpy() for image in images] if self._stream is None else images
        sources = nvimgcodec.as_images(buffers, self._handle)
        streams = self._gpu_encoder.encode(sources, "jpeg", params=self._encode_params, cuda_stream=self._handle)
        return [None if stream is None else bytes(stream) for stream in streams]


def check_cuda() -> None:
    """Raises AlexprepError where there is no GPU."""
    if not torch.cuda.is_available():
        raise AlexprepError("--device cuda: torch finds no CUDA device here; use --device cpu")


def _ensure_alive(error: RuntimeError) -> None:
    """Some errors (an illegal address, say) stay with the process: every later call fails, also for good images."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        raise DeviceLostError(str(error)) from error


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch, of nvImageCodec or of nvJPEG says that the GPU's memory did not suffice."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(word in text for word in _MEMORY_WORDS)


def _too_little_memory(purpose: str, why: object) -> AlexprepError:
    reason = str(why).partition("\n")[0]
    return AlexprepError(
        f"--device cuda: the GPU has too little free memory {purpose} ({reason}): end what else uses it (nvidia-smi lists it) or "
        "use fewer --workers, then run the same command again; finished shards are kept"
    )


def _plain(stream: Any, data: bytes) -> bool:
    """Whether an image is a JPEG of 8 bits in grey or YCbCr: one in RGB has no JFIF marker and is never subsampled."""
    subsampled = stream.chroma_subsampling != nvimgcodec.ChromaSubsampling.CSS_444
    return stream.num_channels == 1 or (stream.num_channels == 3 and (subsampled or data[6:11] == b"JFIF\0"))


def _batches(works: list[tuple[int, _Work]]) -> Iterator[list[tuple[int, _Work]]]:
    """Cuts a batch so that its pixels stay below twice the limit of one image, which bounds the GPU memory it takes."""
    total = itertools.accumulate(max(work.height * work.width, math.prod(work.resize.size)) for _, work in works)
    for _, group in itertools.groupby(zip(works, total, strict=True), key=lambda pair: pair[1] // MAX_PIXELS):
        yield [pair[0] for pair in group]


class Resizer:
    """Applies an `alexprep.shards.resample.Resize` with torch, on any device: the same pixels.

    The weights are the same integers, as whole matrices: a GPU multiplies faster than it skips zeros. Zeros do not touch
    the argument of `resample`: each product and each partial sum, in whatever order and fused or not, is an integer
    below 2**24 (times a power of two) and so exact in float32. TF32 would round the weights to 11 bits, hence "ieee".
    """

    def __init__(self, device: torch.device) -> None:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        # A cache of its own: an evicted matrix is freed in the order of the one stream that reads it.
        self._matrix = functools.lru_cache(maxsize=_MATRICES)(functools.partial(_matrix, device))

    def __call__(self, pixels: torch.Tensor, resize: Resize) -> torch.Tensor:
        """From `pixels`, uint8 (H, W, 3), the whole source, to contiguous uint8 (vertical.count, horizontal.count, 3)."""
        top, left, bottom, right = resize.region
        down = self._matrix(resize.vertical, resize.name, COLUMN_BITS, top, bottom)
        along = self._matrix(resize.horizontal, resize.name, ROW_BITS, left, right)
        region = pixels[top:bottom, left:right].permute(2, 0, 1)
        planes = region.to(torch.float32, memory_format=torch.contiguous_format)
        middle = (down @ planes).mul_(2.0**MIDDLE_BITS).round_()  # halves to even, as numpy's rint
        result = (middle @ along.T).mul_(2.0**-MIDDLE_BITS).round_().clamp_(0, 255)
        return result.to(torch.uint8).permute(1, 2, 0).contiguous()


def _matrix(device: torch.device, axis: Axis, name: str, bits: int, low: int, high: int) -> torch.Tensor:
    """float32 (axis.count, high - low): an axis' weights for the source pixels [low, high), multiples of 2**-bits."""
    first, exact = weights(axis, name)
    source = np.clip(first + np.arange(len(exact))[:, None], 0, axis.source - 1)
    fixed = rounded_weights(exact, bits)
    tap, output = np.nonzero(fixed)
    matrix = np.zeros((axis.count, high - low), np.float32)
    np.add.at(matrix, (output, source[tap, output] - low), fixed[tap, output])
    return torch.from_numpy(matrix).to(device)
