"""Bytes of any image in, bytes of a square RGB image out. A refused image is a reason, not an exception.

Pixels are uint8 (height, width, 3), RGB, 0-255. Only the region that the square needs is decoded.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from nvidia import nvimgcodec
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from alexprep.shards.resample import Axis, Resize

# Pillow's own bound: 256 MiB of RGB. A header that promises more is refused before anything is allocated for it.
MAX_PIXELS = 89_478_485
# What the second opinion may open. A short list keeps rarely used parsers away from hostile files.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
FORMATS = {"jpg": "jpg", "png": "png", "raw": "npy"}  # --format → the member's extension

_SUBSAMPLING = {
    "420": nvimgcodec.ChromaSubsampling.CSS_420,
    "422": nvimgcodec.ChromaSubsampling.CSS_422,
    "444": nvimgcodec.ChromaSubsampling.CSS_444,
}
_EXIF_ORIENTATION = 0x0112
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
    """

    size: int = 256
    filter: Literal["area", "bilinear", "bicubic", "lanczos"] = "area"
    format: Literal["jpg", "png", "raw"] = "jpg"
    reencode: Literal["needed", "always"] = "needed"
    quality: int = 95
    subsampling: Literal["420", "422", "444"] = "420"
    orient: bool = False


@dataclass(frozen=True)
class Converted:
    """An image in the target form; `kept` says that its bytes are the source's own."""

    data: bytes
    width: int
    height: int
    kept: bool


@dataclass(frozen=True)
class Refused:
    """An image that is left out, and why; width and height are 0 where the header could not be read."""

    reason: str
    width: int = 0
    height: int = 0


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


class Codec:
    """Decodes, resizes and encodes on one core. Not to be shared by threads."""

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

    def convert(self, data: bytes) -> Converted | Refused:
        """Brings one encoded image to the target form. Never raises for what `data` holds."""
        if not data:
            return Refused("empty file")
        stream = self._parse(data)
        if stream is not None and stream.height * stream.width > MAX_PIXELS:
            return _too_large(stream.height, stream.width)
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
        if self.target.orient:
            whole = upright(whole, orientation)
        resize = to_square(*whole.shape[:2], self.target.size, self.target.filter)
        top, left, bottom, right = resize.region
        return Converted(self._finish(whole[top:bottom, left:right], resize), width, height, kept=False)

    def encode(self, pixels: NDArray[np.uint8]) -> bytes:
        """Encodes uint8 (H, W, 3) RGB as the target's format says."""
        if self.target.format == "raw":
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(pixels), version=(1, 0), allow_pickle=False)
            return buffer.getvalue()
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
        """The stream's header, or None where nvImageCodec cannot read it or the stream is not whole."""
        try:
            stream = nvimgcodec.CodeStream(data)
            whole = stream.codec_name != "jpeg" or has_end(data)
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


def has_end(data: bytes) -> bool:
    """Whether a JPEG has an end-of-image marker behind its first scan's start: without one it was cut short.

    The region decoder stops after the last row it needs and so cannot notice a cut below it. An EXIF thumbnail has an
    end marker of its own, hence the walk over the segments.
    """
    if data.endswith(b"\xff\xd9"):
        return True
    position = 2
    while data[position : position + 1] == b"\xff":
        marker = data[position + 1 : position + 2]
        if marker == b"\xff":  # a fill byte
            position += 1
        elif marker == b"\xda":  # start of scan; inside a scan ff is always followed by 00 or a restart marker
            return data.find(b"\xff\xd9", position) >= 0
        else:
            position += 2 + max(2, int.from_bytes(data[position + 2 : position + 4], "big"))
    return False


def exif_orientation(data: bytes) -> int:
    """The EXIF orientation, 1-8; 1 (upright) where there is none or it cannot be read."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
            warnings.simplefilter("ignore")
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  (a broken EXIF block must not cost the image)
        return 1
    return orientation if orientation in _UPRIGHT else 1


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turns uint8 (H, W, 3) pixels stored with an EXIF `orientation` upright."""
    transpose, rows, columns = _UPRIGHT[orientation]
    pixels = pixels.transpose(1, 0, 2) if transpose else pixels
    pixels = pixels[::-1] if rows else pixels
    return pixels[:, ::-1] if columns else pixels


def second_opinion(data: bytes) -> NDArray[np.uint8] | Refused:
    """The whole image by Pillow, which reads some files that nvImageCodec refuses, and says why it refuses others."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
                width, height = image.size
                if height * width > MAX_PIXELS:
                    return _too_large(height, width)
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
    except Exception as error:  # noqa: BLE001  (Pillow raises many kinds for what a file holds)
        return Refused(f"cannot be decoded: {error}".splitlines()[0])


def _too_large(height: int, width: int) -> Refused:
    return Refused(f"{width}x{height} pixels are more than the limit of {MAX_PIXELS:,}", width, height)
