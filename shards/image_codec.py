"""Bytes of any image in, bytes of a square RGB image out. A refused image is a reason, not an exception.

Pixels are uint8 (height, width, 3), RGB, 0-255. Only the region that the square needs is decoded.
"""

from __future__ import annotations

import functools
import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from nvidia import nvimgcodec
from PIL import Image, UnidentifiedImageError

from alexprep.shards.resample import Axis, Resize

# -------------------- What is known about an image without nvImageCodec: whether a JPEG is whole, its EXIF orientation, and a second opinion.


# Bounds that keep a worker within 1 GiB (measured: benchmarks/memory.py), checked before anything is allocated. The largest
# photo of ILSVRC 2012 has 61 million pixels.
MAX_PIXELS = 80_000_000
MAX_SIDE = 65_535  # JPEG's own
_MAX_CMYK_PIXELS = 60_000_000  # progressive, these take 12 bytes a pixel
_MAX_BYTES = 850 * 2**20  # of what Pillow needs for a whole image
_STORED = {"1": 1, "L": 1, "P": 1, "RGB": 4}  # bytes a pixel in Pillow, by mode; other modes are counted as 8
# A progressive JPEG may have thousands of scans, each of which visits every block: a few kilobytes, minutes of work. Encoders
# write about ten; nvImageCodec's first decoder stops at 256, the ones it then asks do not.
MAX_SCANS = 256
_START_OF_SCAN, _PROGRESSIVE = 0xDA, 0xC2
# What the second opinion may open. A short list keeps rarely used parsers away from hostile files.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Refused:
    """An image that is left out, and why; width and height are 0 where the header could not be read."""

    reason: str
    width: int = 0
    height: int = 0


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(marker, position) of a JPEG's segments up to its first scan."""
    position = 2
    while data[position : position + 1] == b"\xff" and position + 1 < len(data):
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        yield marker, position
        if marker == _START_OF_SCAN:
            return
        position += 2 + max(2, int.from_bytes(data[position + 2 : position + 4], "big"))


def has_end(data: bytes) -> bool:
    """Whether a JPEG has an end-of-image marker behind its first scan's start: without one it was cut short.

    The region decoder stops after the last row it needs and so cannot notice a cut below it. An EXIF thumbnail has an
    end marker of its own, hence the walk over the segments.
    """
    if data.endswith(b"\xff\xd9"):
        return True
    # Inside a scan ff is always followed by 00 or a restart marker.
    return any(
        marker == _START_OF_SCAN and data.find(b"\xff\xd9", position) >= 0 for marker, position in _segments(data)
    )


def too_many_scans(data: bytes) -> Refused | None:
    """The refusal of a progressive JPEG with more than `MAX_SCANS`; None for all else."""
    if not any(marker == _PROGRESSIVE for marker, _ in _segments(data)):
        return None  # counting would cost more than a tenth of the decoding
    scans = data.count(b"\xff\xda")
    return Refused(f"{scans:,} scans are more than the limit of {MAX_SCANS}") if scans > MAX_SCANS else None


def exif_orientation(data: bytes) -> int:
    """The EXIF orientation, 1-8; 1 (upright) where there is none or it cannot be read."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            warnings.simplefilter("ignore")
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  (a broken EXIF block must not cost the image)
        return 1
    return orientation if orientation in range(1, 9) else 1


def second_opinion(data: bytes) -> NDArray[np.uint8] | Refused:
    """The whole image by Pillow, which reads some files that nvImageCodec refuses, and says why it refuses others."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
                refusal = too_large(height, width) or _too_heavy(len(data), height, width, image.mode)
                if refusal:
                    return refusal
                if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
                    grey = np.asarray(image, dtype=np.float64) * (255 / 65535)
                    return np.repeat(np.rint(grey).astype(np.uint8)[:, :, None], 3, axis=2)
                if image.mode in ("I", "F"):
                    return Refused(f"pixel type {image.mode} has no stated range", width, height)
                return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        return Refused(f"not an image of a known type (first bytes {data[:8].hex(' ')})")
    except Image.DecompressionBombError:
        return Refused(f"more pixels than the limit of {MAX_PIXELS:,}")
    except MemoryError:
        raise  # says nothing of the file: the caller knows the bound
    except Exception as error:  # noqa: BLE001  (Pillow raises many kinds for what a file holds)
        return Refused(f"cannot be decoded: {error}".splitlines()[0])


def too_large(height: int, width: int, channels: int = 3) -> Refused | None:
    """The refusal of an image that is beyond the bounds; None for one that is not."""
    limit = MAX_PIXELS if channels <= 3 else _MAX_CMYK_PIXELS
    if height * width > limit:
        return Refused(f"{width}x{height} pixels are more than the limit of {limit:,}", width, height)
    if max(height, width) > MAX_SIDE:
        return Refused(f"a side of {max(height, width):,} pixels is more than the limit of {MAX_SIDE:,}", width, height)
    return None


def _too_heavy(size: int, height: int, width: int, mode: str) -> Refused | None:
    """The refusal of an image for which Pillow would need too much memory.

    At worst it holds the file twice, the pixels as they are, those in RGB, and the array twice.
    """
    per_pixel = 24 if mode.startswith("I;16") else _STORED.get(mode, 8) + (0 if mode == "RGB" else 4) + 6
    needed = 2 * size + height * width * per_pixel
    if needed <= _MAX_BYTES:
        return None
    words = f"needs about {needed / 2**20:,.0f} MiB to decode, more than the limit of {_MAX_BYTES / 2**20:,.0f}"
    return Refused(words, width, height)


# -------------------- Which pixels of a source make the square, and which way up.


# EXIF orientation → (transpose first, flip rows, flip columns) that make the picture upright (EXIF 2.32, section 4.6.4).
_UPRIGHT = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def resized(height: int, width: int, size: int) -> tuple[int, int]:
    """The height and width after the shorter side has become `size`: the longer one rounded half up.

    >>> resized(375, 500, 256), resized(2, 5, 1)
    ((256, 341), (1, 3))
    """
    short = min(height, width)
    return tuple((2 * side * size + short) // (2 * short) for side in (height, width))  # type: ignore[return-value]


def to_square(height: int, width: int, size: int, filter_name: str) -> Resize:
    """ "Shorter side to `size`, centre crop `size` x `size`" for a source of height x width.

    The crop starts at floor((side - size) / 2), as the original's make-data.
    """
    vertical, horizontal = (
        Axis(source, target, (target - size) // 2, size)
        for source, target in zip((height, width), resized(height, width, size), strict=True)
    )
    return Resize(vertical, horizontal, filter_name)


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turns uint8 (H, W, 3) pixels stored with an EXIF `orientation` upright."""
    transpose, rows, columns = _UPRIGHT[orientation]
    pixels = pixels.transpose(1, 0, 2) if transpose else pixels
    pixels = pixels[::-1] if rows else pixels
    return pixels[:, ::-1] if columns else pixels


# -------------------- The size of a stored image, from a few hundred of its bytes.


_HEAD_BYTES = 2048  # holds the header of any type but of a JPEG with EXIF, a thumbnail or a profile before it
# Camera and editor files have up to about 300 segments before the frame; a file of nothing else has millions.
_MOST_SEGMENTS = 1000
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by colour type
_FRAMES = {0xC0: "", 0xC1: "", 0xC2: "", 0xC9: "", 0xC3: "lossless", 0xCB: "lossless"}
_FRAMES |= dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCA, 0xCD, 0xCE, 0xCF), "hierarchical or arithmetic progressive")
_pnm = re.compile(rb"P([1-6])(?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,9})\s").match
_CUT = "ends within its header"

Get = Callable[[int, int], bytes]  # (offset in the image, size) → those bytes; fewer only where the image ends


class Header(NamedTuple):
    """Height and width of the stored pixels (EXIF orientation not applied), and the number of channels."""

    height: int
    width: int
    channels: int


def read_header(read: Callable[[int, int], bytes], offset: int, size: int) -> Header | Refused:
    """The header of an encoded image; a refusal where our decoders would have none of it, as far as a header tells.

    Accepted are JPEG (Huffman, or arithmetic and sequential; 8 bits), PNG, WebP, BMP and PNM, whatever the name says, within
    the bounds of `opinion.too_large`. What comes behind the header is not looked at.

    Args:
        read: (offset, size) → those bytes of the file that holds the image.
        offset: of the image's first byte.
        size: of the image, bytes.
    """
    head = read(offset, min(size, _HEAD_BYTES))

    def get(at: int, count: int) -> bytes:
        if at + count <= len(head):
            return head[at : at + count]
        return read(offset + at, max(0, min(count, size - at)))

    if not size:
        return Refused("empty file")
    parse = next((parse for magic, parse in _PARSERS.items() if head.startswith(magic)), None)
    if parse is None:
        return Refused(f"not a JPEG, PNG, WebP, BMP or PNM image (first bytes {head[:8].hex(' ')})")
    try:
        found = parse(head, get)
    except (struct.error, IndexError):
        return Refused(_CUT)
    if isinstance(found, Refused):
        return found
    if found.height < 1 or found.width < 1:
        return Refused(f"{found.width}x{found.height} pixels: its header is damaged")
    return too_large(*found) or found


def _jpeg(_head: bytes, get: Get) -> Header | Refused:
    at = 2
    for _ in range(_MOST_SEGMENTS):
        segment = get(at, 10)
        marker = segment[1]
        if segment[0] != 0xFF:
            return Refused(f"no JPEG marker at byte {at:,}: its header is damaged")
        if marker == 0xFF:  # fill bytes may precede any marker
            at += 1
        elif marker in _FRAMES:
            length, bits, height, width, channels = struct.unpack_from(">HBHHB", segment, 2)
            if _FRAMES[marker] or bits != 8:
                return Refused(f"a JPEG of a kind that is not decoded ({_FRAMES[marker] or f'{bits} bits a channel'})")
            if length != 8 + 3 * channels:
                return Refused(f"a JPEG frame of {length} bytes for {channels} channels: its header is damaged")
            return Header(height, width, channels)
        elif marker == 0xDA or not 0xC4 <= marker <= 0xFE or 0xD0 <= marker <= 0xD9:
            return Refused(f"JPEG marker {marker:02x} at byte {at:,} before any frame: its header is damaged")
        else:
            (length,) = struct.unpack_from(">H", segment, 2)
            if length < 2:
                return Refused(f"a JPEG segment of {length} bytes at byte {at:,}: its header is damaged")
            at += 2 + length
    return Refused(f"more than {_MOST_SEGMENTS:,} JPEG segments before the picture")


def _png(head: bytes, _get: Get) -> Header | Refused:
    width, height, colour, checksum = struct.unpack_from(">IIxB3xI", head, 16)
    if checksum != zlib.crc32(head[12:29]) or colour not in _PNG_CHANNELS:
        return Refused(
            "a PNG header whose checksum is wrong" if colour in _PNG_CHANNELS else f"PNG colour type {colour}"
        )
    return Header(height, width, _PNG_CHANNELS[colour])


def _webp(head: bytes, _get: Get) -> Header | Refused:
    kind = head[12:16]
    if kind == b"VP8X":
        flags, wide, high = head[20], head[24:27], head[27:30]
        if len(high) < 3:
            return Refused(_CUT)
        return Header(int.from_bytes(high, "little") + 1, int.from_bytes(wide, "little") + 1, 4 if flags & 16 else 3)
    if kind == b"VP8L" and head[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", head, 21)
        return Header((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, 4 if bits >> 28 & 1 else 3)
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 26)
        return Header(height & 0x3FFF, width & 0x3FFF, 3)
    return Refused(f"a WebP that begins with {kind!r}: its header is damaged")


def _bmp(head: bytes, _get: Get) -> Header | Refused:
    (length,) = struct.unpack_from("<I", head, 14)
    width, height, _planes, bits = struct.unpack_from("<HHHH" if length == 12 else "<iiHH", head, 18)
    return Header(abs(height), width, 4 if bits == 32 else 3)  # rows from the top have a negative height


def _portable(head: bytes, _get: Get) -> Header | Refused:
    match = _pnm(head)
    if match is None:
        return Refused("a PNM whose header makes no sense")
    kind, width, height = map(int, match.groups())
    return Header(height, width, 3 if kind in (3, 6) else 1)


_PARSERS: dict[bytes, Callable[[bytes, Get], Header | Refused]] = {
    b"\xff\xd8\xff": _jpeg,
    _PNG: _png,
    b"RIFF": _webp,
    b"BM": _bmp,
    **{b"P%d" % kind: _portable for kind in range(1, 7)},
}


# -------------------- Bytes of any image in, bytes of a square RGB image out. A refused image is a reason, not an exception.


FORMATS = {"jpg": "jpg", "png": "png", "raw": "npy"}  # --format → the member's extension

# What nvImageCodec is trusted with. Its JPEG 2000 decoder was seen to crash on a damaged file; Pillow reads the other types.
_CODECS = ("jpeg", "png", "webp", "bmp", "pnm")

_SUBSAMPLING = {
    "420": nvimgcodec.ChromaSubsampling.CSS_420,
    "422": nvimgcodec.ChromaSubsampling.CSS_422,
    "444": nvimgcodec.ChromaSubsampling.CSS_444,
}


@dataclass(frozen=True)
class Target:
    """The form that images are brought to.

    Attributes:
        size: side of the square, pixels. 256 in the paper (section 2).
        filter: one of `alexprep.shards.resample.FILTERS`; "area" is what the 2012 data had (area when shrinking, cubic
            when enlarging).
        format: "jpg", "png" or "raw" (a .npy member).
        reencode: "needed" keeps the bytes of a source that already has this form; "always" does not.
        quality: JPEG quality, 1-100; 95 as the original's make-data.
        subsampling: JPEG chroma subsampling, "420", "422" or "444".
        orient: whether the EXIF orientation is applied; neither the 2012 code nor torchvision's ImageFolder did.
        device: what decodes, resizes and encodes, "cpu" or "cuda". It is part of the form, since decoders differ by a
            grey level here and there.
    """

    size: int = 256
    filter: Literal["area", "bilinear", "bicubic", "lanczos"] = "area"
    format: Literal["jpg", "png", "raw"] = "jpg"
    reencode: Literal["needed", "always"] = "needed"
    quality: int = 95
    subsampling: Literal["420", "422", "444"] = "420"
    orient: bool = False
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True)
class Converted:
    """An image in the target form; `kept` says that its bytes are the source's own."""

    data: bytes
    width: int
    height: int
    kept: bool


class Codec:
    """Decodes, resizes and encodes on one core. Not to be shared by threads."""

    batch = 1  # how many inputs `convert_many` is best given

    def __init__(self, target: Target) -> None:
        """Opens the decoder and the encoder for one `target`."""
        self.target = target
        cpu = {
            "device_id": nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            "max_num_cpu_threads": 1,
            "backends": [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
        }
        self._decoder = nvimgcodec.Decoder(**cpu)
        self._encoder = nvimgcodec.Encoder(**cpu)
        plain = {"apply_exif_orientation": False, "color_spec": nvimgcodec.ColorSpec.SRGB}
        self._decode_params = nvimgcodec.DecodeParams(**plain)
        self._planar_params = nvimgcodec.DecodeParams(**plain, sample_format=nvimgcodec.SampleFormat.P_RGB)
        self._encode_params = nvimgcodec.EncodeParams(
            quality_type=nvimgcodec.QualityType.QUALITY,
            quality_value=target.quality,
            chroma_subsampling=_SUBSAMPLING[target.subsampling],
        )

    def convert_many(self, inputs: Sequence[bytes | NDArray[np.uint8]]) -> list[Converted | Refused]:
        """`convert` of each."""
        return [self.convert(data) for data in inputs]

    def convert(self, data: bytes | NDArray[np.uint8]) -> Converted | Refused:
        """Brings one image to the target form. Never raises for what `data` holds.

        Args:
            data: an encoded image, or pixels: uint8 (H, W, 3) RGB or (H, W) grey.
        """
        try:
            return self._convert(data) if isinstance(data, bytes) else self._convert_pixels(data)
        except MemoryError:
            return Refused("needs more memory than a worker may have")

    def _convert_pixels(self, pixels: NDArray[np.uint8]) -> Converted | Refused:
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[:, :, None], 3, axis=2)
        height, width = pixels.shape[:2]
        resize = to_square(height, width, self.target.size, self.target.filter)
        top, left, bottom, right = resize.region
        return Converted(self._finish(pixels[top:bottom, left:right], resize), width, height, kept=False)

    def _convert(self, data: bytes) -> Converted | Refused:
        if not data:
            return Refused("empty file")
        if refusal := too_many_scans(data):
            return refusal
        stream = self._parse(data)
        if stream is not None and (refusal := too_large(stream.height, stream.width, stream.num_channels)):
            return refusal
        orientation = self._orientation(data, stream)
        if stream is not None and (orientation == 1 or not self.target.orient):
            resize = to_square(stream.height, stream.width, self.target.size, self.target.filter)
            region = self._decode(stream, resize.region)
            if region is not None:
                keep = orientation == 1 and self._has_target_form(stream)
                encoded = data if keep else self._finish(region, resize)
                return Converted(encoded, stream.width, stream.height, keep)
        whole = second_opinion(data)
        if isinstance(whole, Refused):
            return whole
        height, width = whole.shape[:2]
        square = self._convert_pixels(upright(whole, orientation) if self.target.orient else whole)
        return replace(square, width=width, height=height)

    def encode(self, pixels: NDArray[np.uint8]) -> bytes:
        """Encodes uint8 (H, W, 3) RGB as the target's format says."""
        if self.target.format == "raw":
            return raw_header(*pixels.shape[:2]) + np.ascontiguousarray(pixels).tobytes()
        image = nvimgcodec.as_image(np.ascontiguousarray(pixels))
        if self.target.format == "png":
            return bytes(self._encoder.encode(image, "png"))
        return bytes(self._encoder.encode(image, "jpeg", params=self._encode_params))

    def decode(self, data: bytes, planar: bool = False) -> NDArray[np.uint8] | None:
        """All pixels of a whole image: uint8 (H, W, 3), or (3, H, W) if `planar`; None where it is refused."""
        stream = self._parse(data)
        if stream is None or stream.height * stream.width > MAX_PIXELS:
            return None
        image = self._decoder.decode(stream, params=self._planar_params if planar else self._decode_params)
        return None if image is None else np.asarray(image.cpu())

    def _parse(self, data: bytes) -> nvimgcodec.CodeStream | None:
        """The stream's header, or None where nvImageCodec is not to decode it: another type, or not whole."""
        try:
            stream = nvimgcodec.CodeStream(data)
            whole = stream.codec_name in _CODECS and (stream.codec_name != "jpeg" or has_end(data))
            return stream if whole and stream.height > 0 and stream.width > 0 else None
        except RuntimeError:  # the header is not one it knows
            return None

    def _orientation(self, data: bytes, stream: nvimgcodec.CodeStream | None) -> int:
        """The EXIF orientation where it matters: to turn the image, or to know whether its bytes may be kept."""
        wanted = self.target.orient or (
            self.target.reencode == "needed"
            and stream is not None
            and stream.height == stream.width == self.target.size
        )
        return exif_orientation(data) if wanted else 1

    def _decode(self, stream: nvimgcodec.CodeStream, box: tuple[int, int, int, int]) -> NDArray[np.uint8] | None:
        """The pixels of (top, left, bottom, right); None where the decoder refuses the image."""
        if box != (0, 0, stream.height, stream.width):
            stream = stream.get_sub_code_stream(region=nvimgcodec.Region(*box))
        image = self._decoder.decode(stream, params=self._decode_params)
        return None if image is None else np.asarray(image.cpu())

    def _finish(self, region: NDArray[np.uint8], resize: Resize) -> bytes:
        size = self.target.size
        done = (resize.vertical.source, resize.horizontal.source) == (size, size)
        return self.encode(region if done else resize(np.ascontiguousarray(region)))

    def _has_target_form(self, stream: nvimgcodec.CodeStream) -> bool:
        if self.target.reencode == "always" or not stream.height == stream.width == self.target.size:
            return False
        codec = {"jpg": "jpeg", "png": "png", "raw": None}[self.target.format]
        plain = stream.num_channels == 3 and stream.precision == 8
        return bool(stream.codec_name == codec and plain and stream.color_spec != nvimgcodec.ColorSpec.PALETTE)


@functools.lru_cache(maxsize=16)
def raw_header(height: int, width: int) -> bytes:
    """How a raw member begins, before its pixels: a .npy file of version 1.0."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (height, width, 3)})
    return buffer.getvalue()


def read_raw(data: bytes) -> NDArray[np.uint8] | None:
    """The pixels of a raw member (.npy); None where it holds no bytes."""
    try:
        pixels: NDArray[np.uint8] = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception:  # noqa: BLE001  (numpy parses the header as Python, and raises what that raises)
        return None
    return pixels if pixels.dtype == np.uint8 else None


def header_size(data: NDArray[np.uint8]) -> tuple[int, int] | None:
    """Height and width that nvImageCodec, and so DALI, reads from an encoded image's header; None where it cannot."""
    try:
        stream = nvimgcodec.CodeStream(data)
        return int(stream.height), int(stream.width)
    except RuntimeError:
        return None


@functools.lru_cache(maxsize=1)
def kept_decoder() -> Codec:
    """A codec for decoding only, one a process: opening one costs more than an image."""
    return Codec(Target())


def check_device(target: Target) -> None:
    """Raises AlexprepError where the target's device is not there."""
    if target.device == "cuda":
        from alexprep.shards.image_codec_cuda import check_cuda

        check_cuda()


def open_codec(target: Target) -> Codec:
    """The codec of the target's device."""
    if target.device == "cuda":
        from alexprep.shards.image_codec_cuda import CudaCodec

        return CudaCodec(target)
    return Codec(target)
