"""Turns the bytes of any image into the bytes of an RGB image of the wanted form, on one CPU core, and decodes such images again.

Pixels are uint8 (height, width, 3), RGB, 0-255. An image that cannot be used is a `Refused` with its reason, not an exception. Which
decoder reads which type is the table at `alexprep.shards.image_header.reader_of`; how JPEGs are decoded, and their damage found, is in
`alexprep.shards.jpeg_decoder`, how pixels are resized in `alexprep.shards.resample`; the same steps on a GPU are in
`alexprep.shards.image_codec_cuda`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from nvidia import nvimgcodec
from PIL import Image, ImageFile, UnidentifiedImageError

from alexprep.shards import jpeg_decoder
from alexprep.shards.image_header import (
    LIBJPEG,
    MAX_PIXELS,
    MAX_SIDE,
    NVIMGCODEC,
    Frame,
    Refused,
    jpeg_frame,
    png_damage,
    reader_of,
    scan_at,
    too_large,
)
from alexprep.shards.resample import Axis, Resize

Fit = Literal["square", "shorter", "longer", "none"]

# What nvImageCodec is trusted with. Its JPEG 2000 decoder was seen to crash on a damaged file.
_CODECS = ("jpeg", "png", "webp", "bmp", "pnm")
_SUBSAMPLING = {
    "420": nvimgcodec.ChromaSubsampling.CSS_420,
    "422": nvimgcodec.ChromaSubsampling.CSS_422,
    "444": nvimgcodec.ChromaSubsampling.CSS_444,
}
# What Pillow may open. A short list keeps rarely used parsers away from hostile files.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_ROOM_BYTES = 6 * 2**20  # two million pixels: most photos
_PILLOW_MAX_BYTES = 850 * 2**20  # of what Pillow needs for a whole image
_PILLOW_PIXEL_BYTES = {"1": 1, "L": 1, "P": 1, "RGB": 4}  # as it stores them, by mode; other modes are counted as 8
_EXIF_ORIENTATION = 0x0112
_WEBP_MAX_SIDE = 16_383  # pixels, which the format's 14 bits hold
_LONGEST_HEAD, _MOST_HEADS = 4096, 1024  # bytes of a header that is kept, and of how many sizes
# libjpeg's scaled transform keeps the low frequencies of each block: at twice what comes out, the filter that follows sees nearly all that it
# would let through (PSNR in docs/performance.md); at once, it would be the filter.
_SCALED_LEAST = 2
_LOSSLESS_EFFORT = 75  # the `quality` of lossless WebP, which tells only how hard it is tried; cwebp's default


@dataclass(frozen=True)
class Target:
    """The form that images are brought to. `device`, which decodes, resizes and encodes, is a part of it: decoders differ by a grey level.

    `fit` says how `size`, the box, decides the scale, and what of the image is kept: "square" covers the box and cuts the centre to it,
    as the paper (section 2); "shorter" covers it and keeps the whole image, so that the shorter side gets a square box's side;
    "longer" keeps the whole image within it; "none" leaves all pixels as they are, whatever the size.
    """

    size: int | tuple[int, int] = 256  # side of a square box, or height and width, pixels; 256 in the paper (section 2)
    # "area" is what the 2012 data had: area when shrinking, cubic when enlarging.
    filter: Literal["area", "bilinear", "bicubic", "lanczos"] = "area"
    format: Literal["jpg", "png", "webp", "raw"] = "jpg"  # raw: a .npy member
    reencode: Literal["needed", "always"] = (
        "needed"  # needed: the bytes of a source that already has this form are kept
    )
    quality: int = 95  # of JPEG, and of WebP that is not lossless, 1-100; as the original's make-data
    subsampling: Literal["420", "422", "444"] = "420"  # of JPEG's chroma
    orient: bool = False  # apply the EXIF orientation; neither the 2012 code nor torchvision's ImageFolder did
    on_damaged: Literal["reject", "keep"] = "reject"  # keep: what the decoder gives, and the ledger says what is wrong
    device: Literal["cpu", "cuda"] = "cpu"
    fit: Fit = "square"
    # Nothing is enlarged; the centre that "square" cuts is then the largest of the box's shape.
    only_shrink: bool = False
    lossless: bool = False  # of WebP
    webp_method: int = 4  # how hard WebP's encoder tries, 0-6; libwebp's default
    # Side, or height and width, of a black canvas that has the image in its middle, pixels.
    pad: int | tuple[int, int] | None = None
    # "scaled": JPEGs much larger than the box are decoded to a half or less, to at least `_SCALED_LEAST` times what they become.
    decode: Literal["exact", "scaled"] = "exact"

    @property
    def box(self) -> tuple[int, int]:
        """Height and width of the box, pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def common_size(self) -> tuple[int, int] | None:
        """Height and width that every image gets; None where they depend on the image."""
        if self.pad is not None:
            return self.canvas
        return self.box if self.fit == "square" and not self.only_shrink else None

    @property
    def canvas(self) -> tuple[int, int] | None:
        """Height and width of the canvas, pixels."""
        return (self.pad, self.pad) if isinstance(self.pad, int) else self.pad

    def padded(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resized pixels in the middle of the canvas, where there is one; of an odd rest more lies below and to the right.

        >>> Target(pad=4).padded(np.ones((1, 2, 3), np.uint8))[:, :, 0].tolist()
        [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
        """
        if self.canvas is None:
            return pixels
        rest = [whole - side for whole, side in zip(self.canvas, pixels.shape[:2], strict=True)]
        return np.pad(pixels, [*((each // 2, each - each // 2) for each in rest), (0, 0)])

    def resize(self, height: int, width: int) -> Resize:
        """The resize of an image of height x width: the side that decides becomes the box's, the other one is rounded half up.

        The part that is kept is the centre one, from floor((side - part) / 2) on, as in the original's make-data.

        >>> [Target(size=256, fit=fit).resize(300, 400).size for fit in ("square", "shorter", "longer", "none")]
        [(256, 256), (256, 341), (192, 256), (300, 400)]
        """
        scaled, kept = self._scaled(height, width)
        vertical, horizontal = (
            Axis(source, target, (target - count) // 2, count)
            for source, target, count in zip((height, width), scaled, kept, strict=True)
        )
        return Resize(vertical, horizontal, self.filter)

    def _scaled(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of the whole image after the resize, and of the part that is kept."""
        source, (rows, columns) = (height, width), self.box
        if self.fit == "none":
            return source, source
        by_height = (rows * width >= columns * height) == (self.fit != "longer")
        side, wanted = (height, rows) if by_height else (width, columns)
        if self.only_shrink and wanted > side:
            part = max(1, _scale(rows, side, wanted)), max(1, _scale(columns, side, wanted))
            return source, part if self.fit == "square" else source
        scaled = max(1, _scale(height, wanted, side)), max(1, _scale(width, wanted, side))
        return scaled, self.box if self.fit == "square" else scaled

    def keeps(self, height: int, width: int) -> bool:
        """Whether the whole image stays as it is."""
        return self.pad is None and self._scaled(height, width) == ((height, width), (height, width))

    def beyond(self, height: int, width: int) -> str | None:
        """Why an image would become larger than is possible, or than an image may be; None where it would not."""
        _, (rows, columns) = self._scaled(height, width)
        side = _WEBP_MAX_SIDE if self.format == "webp" else MAX_SIDE
        if rows * columns <= MAX_PIXELS and max(rows, columns) <= side:
            return None
        limits = f"{MAX_PIXELS:,} in all and {side:,} a side"
        return f"would be stored with {columns}x{rows} pixels, more than the limits of {limits}"


def _scale(length: int, numerator: int, denominator: int) -> int:
    """A length times a fraction, rounded half up."""
    return (2 * length * numerator + denominator) // (2 * denominator)


@dataclass(frozen=True)
class Converted:
    """An image in the target form; `kept` says that its bytes are the source's own, `damage` what of the source was not right."""

    data: bytes
    width: int  # of the source, pixels
    height: int
    size: tuple[int, int]  # height and width of the image in the target form, pixels
    kept: bool
    damage: str | None = None


class Codec:
    """Decodes, resizes and encodes on one CPU core. Not to be shared by threads."""

    batch = 1  # how many inputs `convert_many` is best given

    def __init__(self, target: Target) -> None:
        self.target = target
        cpu = {
            "device_id": nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            "max_num_cpu_threads": 1,
            "backends": [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
        }
        self._decoder = nvimgcodec.Decoder(**cpu)
        self._encoder = nvimgcodec.Encoder(**cpu)
        self._room = np.empty(_ROOM_BYTES, np.uint8)  # for the pixels of the image in hand
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
        """Brings one image to the target form: an encoded one, or pixels, uint8 (H, W, 3) RGB or (H, W) grey.

        Never raises for what `data` holds.
        """
        try:
            return self._convert(data) if isinstance(data, bytes) else self._convert_pixels(data)
        except MemoryError:
            return Refused("needs more memory than a worker may have")

    def _convert_pixels(self, pixels: NDArray[np.uint8]) -> Converted | Refused:
        return self._fitted(in_colour(pixels))

    def _convert(self, data: bytes) -> Converted | Refused:
        reader = reader_of(data)
        if isinstance(reader, Refused):
            return reader
        if reader == LIBJPEG:
            return self._convert_jpeg(data)
        damage = png_damage(data) if data.startswith(b"\x89PNG") else None
        if damage is not None:
            return damage if self.target.on_damaged == "reject" else self._convert_with_pillow(data, damage.reason)
        if reader == NVIMGCODEC and (stream := self._parse(data)) is not None:
            return too_large(stream.height, stream.width, stream.num_channels) or self._convert_stream(data, stream)
        return self._convert_with_pillow(data)

    def _convert_jpeg(self, data: bytes) -> Converted | Refused:
        frame = jpeg_frame(data)
        if isinstance(frame, Refused):
            return frame
        try:
            if self.target.decode == "scaled" and (converted := self._convert_scaled(data, frame)) is not None:
                return converted
            picture = jpeg_decoder.decode(data, frame, self._room)
        except jpeg_decoder.OddSamplingError:
            return self._convert_odd_jpeg(data, frame)
        if isinstance(picture, Refused):
            return picture
        if picture.damage and self.target.on_damaged == "reject":
            return Refused(picture.damage, frame.width, frame.height)
        orientation = self._orientation(data, frame.height, frame.width)
        if picture.sound and orientation == 1 and self._is_target_jpeg(frame):
            return _kept(data, frame.height, frame.width)
        return self._fitted(picture.pixels, orientation, picture.damage)

    def _convert_scaled(self, data: bytes, frame: Frame) -> Converted | Refused | None:
        """A large JPEG that libjpeg has nothing to say against, by its scaled transform; None for all others."""
        height, width = frame.height, frame.width
        orientation = self._orientation(data, height, width)
        turned = self.target.orient and orientation >= 5
        resize = self.target.resize(*((width, height) if turned else (height, width)))
        axes = (resize.horizontal, resize.vertical) if turned else (resize.vertical, resize.horizontal)
        least = (_SCALED_LEAST * axes[0].target, _SCALED_LEAST * axes[1].target)
        if 2 * least[0] > height or 2 * least[1] > width:
            return None
        small = jpeg_decoder.decode_scaled(data, frame, least, self._room)
        return None if small is None else self._fitted(small[0], orientation, size=(height, width), scale=small[1])

    def _convert_odd_jpeg(self, data: bytes, frame: Frame) -> Converted | Refused:
        """A JPEG with chroma subsampled in an unusual way, by Pillow, which does not tell what is missing: decoded twice, it shows."""
        if frame.height * frame.width > jpeg_decoder.COMPARED:
            words = f"JPEG of unusual chroma subsampling and more than {jpeg_decoder.COMPARED:,} pixels"
            return Refused(words, frame.width, frame.height)
        alone, other = (jpeg_decoder.picture_alone(data, frame, noise) for noise in (b"", jpeg_decoder.NOISE))
        once, again = _decode_with_pillow(alone), _decode_with_pillow(other)
        same = isinstance(once, np.ndarray) and isinstance(again, np.ndarray) and np.array_equal(once, again)
        damage = None if same or not isinstance(once, np.ndarray) else "truncated JPEG"
        return self._convert_with_pillow(data, damage, alone)

    def _convert_stream(self, data: bytes, stream: nvimgcodec.CodeStream) -> Converted | Refused:
        """By nvImageCodec, which decodes only the region that is kept; what it refuses gets a second opinion."""
        height, width = stream.height, stream.width
        orientation = self._orientation(data, height, width)
        if orientation == 1 or not self.target.orient:
            if words := self.target.beyond(height, width):
                return Refused(words, width, height)
            resize = self.target.resize(height, width)
            region = self._decode(stream, resize.region)
            if region is not None:
                if orientation == 1 and self._is_target_stream(stream, data):
                    return _kept(data, height, width)
                return self._in_form(resize(region), width, height)
        return self._convert_with_pillow(data)

    def _convert_with_pillow(self, data: bytes, damage: str | None = None, picture: bytes = b"") -> Converted | Refused:
        """By Pillow, from `picture` where that is given: `data` without what its picture does not need."""
        whole, keep = _decode_with_pillow(picture or data), self.target.on_damaged == "keep"
        if isinstance(whole, Damaged):
            damage = damage or whole.reason
            whole = whole.pixels() if keep else Refused(damage, whole.width, whole.height)
        if isinstance(whole, Refused):
            return whole
        height, width = whole.shape[:2]
        if damage is not None and not keep:
            return Refused(damage, width, height)
        return self._fitted(whole, self._orientation(data, height, width), damage)

    def _fitted(
        self,
        whole: NDArray[np.uint8],
        orientation: int = 1,
        damage: str | None = None,
        size: tuple[int, int] | None = None,
        scale: float = 1.0,
    ) -> Converted | Refused:
        """All pixels as they are stored, in the target form; upright if the target says so.

        Where they are the image's at a smaller `scale`, `size` is its height and width.
        """
        height, width = size or whole.shape[:2]
        turned = self.target.orient and orientation >= 5
        pixels = upright(whole, orientation) if self.target.orient else whole
        sides = (width, height) if turned else (height, width)
        if words := self.target.beyond(*sides):
            return Refused(words, width, height)
        resize = self.target.resize(*sides)
        if size is not None:
            axes = zip((resize.vertical, resize.horizontal), pixels.shape, sides, strict=False)
            vertical, horizontal = (replace(axis, source=have, extent=side * scale) for axis, have, side in axes)
            resize = replace(resize, vertical=vertical, horizontal=horizontal)
        top, left, bottom, right = resize.region
        return self._in_form(resize(pixels[top:bottom, left:right]), width, height, damage)

    def _in_form(self, pixels: NDArray[np.uint8], width: int, height: int, damage: str | None = None) -> Converted:
        """Resized pixels of an image that was so wide and high."""
        whole = self.target.padded(pixels)
        size = whole.shape[0], whole.shape[1]
        return Converted(self.encode(whole), width, height, size, kept=False, damage=damage)

    def encode(self, pixels: NDArray[np.uint8]) -> bytes:
        """Encodes uint8 (H, W, 3) RGB as the target's format says."""
        if self.target.format == "raw":
            return raw_header(*pixels.shape[:2]) + np.ascontiguousarray(pixels).tobytes()
        if self.target.format == "webp":
            return self._encode_webp(pixels)
        image = nvimgcodec.as_image(np.ascontiguousarray(pixels))
        if self.target.format == "png":
            return bytes(self._encoder.encode(image, "png"))
        return bytes(self._encoder.encode(image, "jpeg", params=self._encode_params))

    def _encode_webp(self, pixels: NDArray[np.uint8]) -> bytes:
        target, buffer = self.target, io.BytesIO()
        quality = _LOSSLESS_EFFORT if target.lossless else target.quality
        options: dict[str, Any] = {"quality": quality, "lossless": target.lossless, "method": target.webp_method}
        Image.fromarray(pixels).save(buffer, "WEBP", **options)
        return buffer.getvalue()

    def decode(self, data: bytes, planar: bool = False) -> NDArray[np.uint8] | None:
        """All pixels of a whole image: uint8 (H, W, 3), or (3, H, W) if `planar`; None where it is refused."""
        if data.startswith(b"\xff\xd8") and isinstance(frame := jpeg_frame(data), Frame):
            with contextlib.suppress(jpeg_decoder.OddSamplingError):
                picture = jpeg_decoder.decode(data, frame)
                # Earlier releases kept the bytes of some damaged ones, which stay what they are.
                if isinstance(picture, Refused) or (picture.damage and not data.endswith(b"\xff\xd9")):
                    return None
                return picture.pixels.transpose(2, 0, 1) if planar else picture.pixels
        stream = self._parse(data)
        if stream is None or stream.height * stream.width > MAX_PIXELS:
            return None
        image = self._decoder.decode(stream, params=self._planar_params if planar else self._decode_params)
        return None if image is None else np.asarray(image.cpu())

    def _parse(self, data: bytes) -> nvimgcodec.CodeStream | None:
        """The header as nvImageCodec reads it; None where it is not to decode the image, or cannot."""
        try:
            stream = nvimgcodec.CodeStream(data)
            return stream if stream.codec_name in _CODECS and stream.height > 0 and stream.width > 0 else None
        except RuntimeError:  # the header is not one it knows
            return None

    def _orientation(self, data: bytes, height: int, width: int) -> int:
        """The EXIF orientation where it matters: to turn the image, or to know whether its bytes may be kept."""
        wanted = self.target.orient or (self.target.reencode == "needed" and self.target.keeps(height, width))
        return exif_orientation(data) if wanted else 1

    def _decode(self, stream: nvimgcodec.CodeStream, box: tuple[int, int, int, int]) -> NDArray[np.uint8] | None:
        """The pixels of (top, left, bottom, right); None where the decoder refuses the image."""
        if box != (0, 0, stream.height, stream.width):
            stream = stream.get_sub_code_stream(region=nvimgcodec.Region(*box))
        image = self._decoder.decode(stream, params=self._decode_params)
        return None if image is None else np.asarray(image.cpu())

    def _has_target_form(self, height: int, width: int, form: str) -> bool:
        target = self.target
        return target.reencode == "needed" and target.format == form and target.keeps(height, width)

    def _is_target_jpeg(self, frame: Frame) -> bool:
        return self._has_target_form(frame.height, frame.width, "jpg") and frame.channels == 3

    def _is_target_stream(self, stream: nvimgcodec.CodeStream, data: bytes) -> bool:
        """Whether a PNG or a WebP has the target form already."""
        kind, plain = stream.codec_name, stream.num_channels == 3 and stream.precision == 8
        if kind not in ("png", "webp") or not plain or stream.color_spec == nvimgcodec.ColorSpec.PALETTE:
            return False
        sound = kind == "webp" or png_damage(data, critical=False) is None
        return sound and self._has_target_form(stream.height, stream.width, kind)


def _kept(data: bytes, height: int, width: int) -> Converted:
    """A source of the target form, with its own bytes."""
    return Converted(data, width, height, (height, width), kept=True)


@functools.lru_cache(maxsize=1024)
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


class HeaderCheck:
    """Finds images whose headers do not tell the sizes that they should have, and parses as few headers as possible.

    The headers of a data set are alike: an image that begins, up to its first scan, as another one of its size needs no parsing.
    """

    def __init__(self) -> None:
        self._heads: dict[tuple[int, int], bytes] = {}

    def wrong(self, images: Sequence[NDArray[np.uint8]], sizes_N2: NDArray[np.integer]) -> list[bool]:
        """Which images have a header that `header_size` reads otherwise than these heights and widths, or not at all."""
        heads, sizes = self._heads, [*map(tuple, sizes_N2.tolist())]
        found = []
        for image, size in zip(images, sizes, strict=True):
            head = heads.get(size)
            found.append((head is None or image[: len(head)].tobytes() != head) and self._parsed_wrong(image, size))
        return found

    def _parsed_wrong(self, image: NDArray[np.uint8], size: tuple[int, int]) -> bool:
        if header_size(image) != size:
            return True
        begin = image[:_LONGEST_HEAD].tobytes()
        end = scan_at(begin)
        if end and (size in self._heads or len(self._heads) < _MOST_HEADS):
            self._heads[size] = begin[:end]
        return False


@functools.lru_cache(maxsize=1)
def shared_decoder() -> Codec:
    """A codec for decoding alone, the same one for the whole process: opening one costs more than an image."""
    return Codec(Target())


def in_colour(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixels (H, W, 3), of those or of grey ones (H, W)."""
    return pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turns uint8 (H, W, 3) pixels stored with an EXIF `orientation` upright (EXIF 2.32, section 4.6.4)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


@dataclass(frozen=True)
class Damaged:
    """An image of which Pillow reads the header and not all pixels; `data` is the file."""

    reason: str
    width: int
    height: int
    data: bytes

    def pixels(self) -> NDArray[np.uint8] | Refused:
        """What there is of it; what is missing is black."""
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            found = _decode_with_pillow(self.data)
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before
        return Refused(self.reason, self.width, self.height) if isinstance(found, Damaged) else found


def _decode_with_pillow(data: bytes) -> NDArray[np.uint8] | Refused | Damaged:
    """The whole image by Pillow, as it is stored, or why it is refused."""
    width = height = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
                width, height = image.size
                refusal = too_large(height, width) or _too_heavy(len(data), height, width, image.mode)
                if refusal:
                    return refusal
                tag = image.getexif().get(_EXIF_ORIENTATION, 1) if image.format == "TIFF" else 1
                image.load()
                pixels = _rgb(image)
                if isinstance(pixels, Refused) or tag == 1 or image.getexif().get(_EXIF_ORIENTATION, 1) == tag:
                    return pixels
                return upright(pixels, {6: 8, 8: 6}.get(tag, tag))  # back: loading a TIFF turns it upright
    except UnidentifiedImageError:
        return Refused(f"cannot be decoded: its header is damaged (first bytes {data[:8].hex(' ')})")
    except Image.DecompressionBombError:
        return Refused(f"more pixels than the limit of {MAX_PIXELS:,}")
    except MemoryError:
        raise  # says nothing of the file: the caller knows the bound
    except Exception as error:  # noqa: BLE001  (Pillow raises many kinds for what a file holds)
        reason = f"cannot be decoded: {error}".splitlines()[0]
        return Damaged(reason, width, height, data) if width else Refused(reason)


def _rgb(image: Image.Image) -> NDArray[np.uint8] | Refused:
    """The pixels of what Pillow has read: uint8 (H, W, 3)."""
    if image.mode.startswith("I;16") or (
        image.mode == "I" and image.format == "PPM"
    ):  # of 65,535; Pillow would clip at 255
        grey = np.asarray(image, dtype=np.float64) * (255 / 65535)
        return in_colour(np.rint(grey).astype(np.uint8))
    if image.mode in ("I", "F"):
        return Refused(f"pixel type {image.mode} has no stated range", *image.size)
    return np.asarray(image.convert("RGB"))


def exif_orientation(data: bytes) -> int:
    """The EXIF orientation, 1-8; 1 (upright) where there is none or it cannot be read."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            warnings.simplefilter("ignore")
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  (a broken EXIF block must not cost the image)
        return 1
    return orientation if orientation in range(1, 9) else 1


def _too_heavy(size: int, height: int, width: int, mode: str) -> Refused | None:
    """The refusal of an image for which Pillow would need too much memory."""
    # At worst it holds the file twice, the pixels as they are, those in RGB, and the array twice.
    per_pixel = {"I;16": 24, "I": 30}.get(mode[:4]) or _PILLOW_PIXEL_BYTES.get(mode, 8) + (
        0 if mode == "RGB" else 4
    ) + 6
    needed = 2 * size + height * width * per_pixel
    words = f"needs about {needed / 2**20:,.0f} MiB to decode, more than the limit of {_PILLOW_MAX_BYTES / 2**20:,.0f}"
    return Refused(words, width, height) if needed > _PILLOW_MAX_BYTES else None
