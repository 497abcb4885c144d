"""The codec: geometry, the rule for each odd kind of file, refusals."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from alexprep.shards import image_codec
from alexprep.shards.image_codec import Codec, Converted, HeaderCheck, Target, upright
from alexprep.shards.image_header import MAX_PIXELS, Refused, scan_at


def _pixels(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _converted(data: bytes, **target: object) -> Converted:
    result = Codec(Target(**{"size": 64, **target})).convert(data)  # type: ignore[arg-type]
    assert isinstance(result, Converted), result
    return result


def _refused(data: bytes, **target: object) -> str:
    result = Codec(Target(**{"size": 64, **target})).convert(data)  # type: ignore[arg-type]
    assert isinstance(result, Refused)
    return result.reason


def _squared(whole: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What all pixels become, read whole and then cut."""
    resize = Target(size=64).resize(*whole.shape[:2])
    top, left, bottom, right = resize.region
    return resize(np.ascontiguousarray(whole[top:bottom, left:right]))


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (256, 256), (68, 56), (1, 7), (257, 1001)])
def test_geometry(shape: tuple[int, int]) -> None:
    """Shorter side to the size, longer side rounded half up as C's round, crop from floor((side - size) / 2)."""
    resize = Target(size=256).resize(*shape)
    height, width = resize.vertical.target, resize.horizontal.target
    assert min(height, width) == 256
    scale = 256 / min(shape)
    assert (height, width) == tuple(int(np.floor(side * scale + 0.5)) for side in shape)
    assert (resize.vertical.offset, resize.horizontal.offset) == ((height - 256) // 2, (width - 256) // 2)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (131, 111), (64, 64), (61, 40)])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_the_region_alone_gives_the_same_pixels(size: tuple[int, int], subsampling: int, photo, encoded) -> None:
    """Decoding only the region equals decoding all (by Pillow) and cutting."""
    data = encoded(photo(*size, seed=3), quality=90, subsampling=subsampling)
    got = _converted(data, format="png")
    assert (got.width, got.height) == size
    np.testing.assert_array_equal(_pixels(got.data), _squared(_pixels(data)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_image_types(kind: str, photo, encoded) -> None:
    data = encoded(photo(131, 97, seed=4), kind)
    np.testing.assert_array_equal(_pixels(_converted(data, format="png").data), _squared(_pixels(data)))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "LA", "1"])
def test_colour_modes_become_rgb_as_in_pillow(mode: str, photo, encoded) -> None:
    """Grey is tripled, CMYK converted, alpha dropped, palettes looked up."""
    image = photo(131, 97, seed=5).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray((np.arange(131 * 97) % 256).astype(np.uint8).reshape(97, 131)))
    for kind in {"L": ("JPEG", "PNG"), "CMYK": ("JPEG", "TIFF")}.get(mode, ("PNG",)):
        data = encoded(image, kind)
        difference = np.abs(_pixels(_converted(data, format="png").data).astype(int) - _squared(_pixels(data)))
        assert difference.max() <= 1, kind


def test_16_bit_is_scaled_not_cut(encoded) -> None:
    """Full white of 16 bits is full white of 8."""
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    got = _pixels(_converted(encoded(Image.fromarray(grey), "PNG"), format="png").data)
    assert np.abs(got - np.rint(grey / 257.0)[:, :, None]).max() <= 1


def test_png_named_jpeg_is_a_png(photo, encoded) -> None:
    """Names do not matter, bytes do: the output is a JPEG all the same."""
    assert _converted(encoded(photo(90, 90, seed=6), "PNG")).data.startswith(b"\xff\xd8")


@pytest.mark.parametrize("target", ["jpg", "png"])
def test_bytes_in_the_target_form_are_kept(target: str, photo, encoded) -> None:
    kind = {"jpg": "JPEG", "png": "PNG"}[target]
    data = encoded(photo(64, 64, seed=7), kind)
    kept = _converted(data, format=target)
    assert kept.kept and kept.data == data
    assert not _converted(data, format=target, reencode="always").kept
    assert not _converted(encoded(photo(64, 65, seed=7), kind), format=target).kept
    assert not _converted(encoded(photo(64, 64, seed=7).convert("L"), kind), format=target).kept
    assert not _converted(encoded(photo(64, 64, seed=7), {"jpg": "PNG", "png": "JPEG"}[target]), format=target).kept
    assert not _converted(data, format="raw").kept


def test_raw_is_the_pixels(photo, encoded) -> None:
    data = encoded(photo(64, 64, seed=8), "PNG")
    member = _converted(data, format="raw").data
    np.testing.assert_array_equal(np.load(io.BytesIO(member), allow_pickle=False), _pixels(data))
    assert len(member) == 128 + 64 * 64 * 3


@pytest.mark.parametrize("subsampling", ["420", "422", "444"])
def test_jpeg_options_reach_the_encoder(subsampling: str, photo, encoded) -> None:
    """nvImageCodec's JPEG has the tables of Pillow's at the same quality, and decodes to the same pixels."""
    image = photo(64, 64, seed=9)
    data = _converted(encoded(image, "PNG"), subsampling=subsampling, quality=83).data
    theirs = encoded(image, "JPEG", quality=83, subsampling=("444", "422", "420").index(subsampling))
    assert Image.open(io.BytesIO(data)).quantization == Image.open(io.BytesIO(theirs)).quantization  # type: ignore[attr-defined]
    assert np.abs(_pixels(data).astype(int) - _pixels(theirs)).max() <= 1


@pytest.mark.parametrize("size", [(120, 300), (300, 120)])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_cut_jpeg_is_never_half_grey(size: tuple[int, int], progressive: bool, photo, encoded) -> None:
    """Cut anywhere, it is refused, unless every pixel is there all the same."""
    data = encoded(photo(*size, seed=10), quality=90, progressive=progressive)
    whole = _converted(data).data
    codec = Codec(Target(size=64))
    verdicts = []
    for cut in [*np.linspace(0, len(data) - 1, 40).astype(int).tolist(), len(data) - 2]:
        result = codec.convert(data[:cut])
        verdicts.append(isinstance(result, Refused))
        assert isinstance(result, Refused) or result.data == whole, f"cut at {cut} of {len(data)}"
    assert sum(verdicts) >= 38 and not verdicts[-1]  # its end marker alone


def test_a_thumbnail_s_end_is_not_the_image_s_end(photo, encoded) -> None:
    thumbnail = encoded(photo(16, 16, seed=11))
    data = encoded(photo(200, 90, seed=12))
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    assert _converted(data[:2] + segment + data[2:] + b"trailing").width == 200
    assert "truncated" in _refused(data[:2] + segment + data[2 : len(data) // 2])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, photo, encoded) -> None:
    """Ignored by default; with `orient` applied as Pillow's exif_transpose does; its bytes are never kept."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for size in ((131, 97), (64, 64)):
        data = encoded(photo(*size, seed=13), quality=90, exif=exif)
        stored = _pixels(data)
        turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        np.testing.assert_array_equal(upright(stored, orientation), turned)
        for orient, expected in ((False, stored), (True, turned)):
            result = _converted(data, orient=orient, format="png")
            np.testing.assert_array_equal(_pixels(result.data), _squared(expected))
            assert (result.width, result.height) == size
        assert _converted(data).kept == (size == (64, 64) and orientation == 1)


def test_a_broken_exif_block_does_not_cost_the_image(photo, encoded) -> None:
    data = encoded(photo(64, 64, seed=14))
    broken = data[:2] + b"\xff\xe1" + struct.pack(">H", 20) + b"Exif\0\0II*\0\xff\xff\xff\xff\0\0\0\0" + data[2:]
    assert _converted(broken, orient=True).width == 64


def test_too_many_pixels_are_refused_from_the_header(encoded, photo) -> None:
    jpeg = bytearray(encoded(photo(16, 16, seed=15)))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    assert "65500x65500" in _refused(bytes(jpeg))
    png = encoded(photo(16, 16, seed=15), "PNG")
    for side in (10_000, 40_000, 2**31 - 1):
        header = b"IHDR" + struct.pack(">II", side, side) + png[24:29]
        bomb = png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
        assert f"limit of {MAX_PIXELS:,}" in _refused(bomb)


def test_what_is_no_image_is_refused_with_a_reason() -> None:
    assert _refused(b"") == "empty file"
    assert "not an image of a known type (first bytes 68 65 6c 6c 6f" in _refused(b"hello, world")
    for junk in (
        b"\xff",
        b"\xff\xd8",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xe0\x00",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        bytes(4096),
    ):
        assert _refused(junk)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["TIFF", "PNG", "WEBP"])
def test_orientation_of_every_type(kind: str, orientation: int, photo, encoded) -> None:
    """Stored pixels without `orient`, upright with it: Pillow turns a TIFF by itself while it reads it."""
    image, exif = photo(80, 64, seed=16), Image.Exif()
    exif[0x0112] = orientation
    how = {"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {"exif": exif, "lossless": True}
    data, stored = encoded(image, kind, **how), np.asarray(image)
    for orient, expected in ((False, stored), (True, upright(stored, orientation))):
        result = _converted(data, orient=orient, format="png")
        np.testing.assert_array_equal(_pixels(result.data), _squared(expected))
        assert (result.width, result.height) == (80, 64)


@pytest.mark.parametrize("own_default", [False, True])
@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_of_an_animation_the_first_picture_is_taken(kind: str, own_default: bool, photo, encoded) -> None:
    frames = [photo(64, 64, seed=seed).quantize(200).convert("RGB") for seed in (17, 18, 19)]
    how = {"default_image": own_default, "lossless": True, "loop": 0, "duration": 50}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **how)
    got = _pixels(_converted(data, format="png").data)
    np.testing.assert_array_equal(got, _pixels(data))
    assert np.abs(got.astype(int) - np.asarray(frames[0])).mean() < 2


def _with_wrong_checksum(png: bytes, kind: bytes) -> bytes:
    at = png.index(kind)
    end = at + 4 + int.from_bytes(png[at - 4 : at], "big")
    return png[:end] + bytes([png[end] ^ 1]) + png[end + 1 :]


def test_a_png_s_checksums_are_checked(photo, encoded) -> None:
    image = photo(64, 64, seed=20)
    good, palette = encoded(image, "PNG"), encoded(image.quantize(16), "PNG")
    for data, kind in ((good, b"IHDR"), (good, b"IDAT"), (good, b"IEND"), (palette, b"PLTE")):
        assert f"the checksum of its {kind.decode()} chunk" in _refused(_with_wrong_checksum(data, kind))
    at = good.index(b"IDAT") - 4
    text = (
        struct.pack(">I", 5) + b"tEXta\0bcd" + bytes(4)
    )  # an ancillary chunk: its checksum is wrong, and nothing depends on it
    np.testing.assert_array_equal(
        _pixels(_converted(good[:at] + text + good[at:], format="png").data), np.asarray(image)
    )
    kept = _converted(_with_wrong_checksum(good, b"IDAT"), format="png", on_damaged="keep")
    np.testing.assert_array_equal(_pixels(kept.data), np.asarray(image))
    assert "IDAT" in (kept.damage or "") and not kept.kept


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "GIF", "TIFF", "WEBP"])
def test_a_cut_file_is_refused_or_kept_with_its_damage(kind: str, photo, encoded) -> None:
    data = encoded(photo(64, 64, seed=21), kind)
    cut = data[: len(data) * 2 // 3]
    reason = _refused(cut)
    result = Codec(Target(size=64, on_damaged="keep")).convert(cut)
    assert isinstance(result, Converted) or kind in ("WEBP", "TIFF")  # their decoders give nothing
    assert isinstance(result, Refused) or (result.damage == reason and not result.kept)


def _bmp(bits: int, pixels: NDArray[np.integer], masks: tuple[int, ...] = ()) -> bytes:
    """A BMP of the rows of `pixels`, the last one first; with masks, compression 3."""
    body, extra = pixels[::-1].tobytes(), struct.pack(f"<{len(masks)}I", *masks)
    height, width = pixels.shape
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 3 if masks else 0, len(body), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(extra) + len(body), 0, 0, 54 + len(extra)) + head + extra + body


@pytest.mark.parametrize(
    ("bits", "masks"),
    [
        (16, ()),
        (16, (0x7C00, 0x3E0, 0x1F)),
        (16, (0xF800, 0x7E0, 0x1F)),
        (16, (0xF00, 0xF0, 0xF)),
        (32, (0xFF0000, 0xFF00, 0xFF)),
        (32, (0xFF, 0xFF00, 0xFF0000)),
        (32, (0xFF000000, 0xFF0000, 0xFF00)),
        (32, (0x3FF00000, 0xFFC00, 0x3FF)),
    ],
)
def test_a_bmp_s_masks_are_right_or_refused(bits: int, masks: tuple[int, ...], seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 2**bits, (64, 64), dtype=np.uint64).astype(f"<u{bits // 8}")
    exact = []
    for mask in masks or (0x7C00, 0x3E0, 0x1F):
        low = mask & -mask
        exact.append((pixels & mask) // low * (255 / (mask // low)))
    result = Codec(Target(size=64, format="png")).convert(_bmp(bits, pixels, masks))
    if isinstance(result, Refused):
        assert "BMP bitfields" in result.reason and masks[0] not in (0x7C00, 0xF800, 0xFF0000)
    else:
        assert np.abs(_pixels(result.data) - np.stack(exact, axis=2)).max() <= 1


@pytest.mark.parametrize("brightest", [15, 255, 1000, 65535])
@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6"])
def test_a_pnm_is_scaled_by_its_brightest_value(kind: str, brightest: int, seed: int) -> None:
    shape = (64, 64, 3) if kind in ("P3", "P6") else (64, 64)
    values = np.random.default_rng(seed).integers(0, brightest + 1, shape)
    head = f"{kind}\n# {kind}\n64 64\n{brightest}\n".encode()
    body = values.astype(">u2" if brightest > 255 else "u1").tobytes()
    data = head + (body if kind in ("P5", "P6") else " ".join(map(str, values.ravel())).encode() + b"\n")
    got = _pixels(_converted(data, format="png").data)
    expected = values * (255 / brightest)
    assert np.abs(got - (expected if expected.ndim == 3 else expected[:, :, None])).max() <= 1


@pytest.mark.parametrize(
    ("begin", "words"),
    [
        (b"\0\0\0\x18ftypheic", "HEIC, which is not read: convert it"),
        (b"\0\0\0\x18ftypavif", "AVIF, which is not read: convert it"),
        (b"\0\0\0\x18ftypisom", "a video"),
        (b"\xff\x0a\x12", "JPEG XL, which is not read"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL, which is not read"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000, which is not read"),
        (b"8BPS\0\1", "PSD"),
        (b"%PDF-1.7", "PDF"),
        (b"\n<!DOCTYPE html><html>", "a web page (HTML), not an image"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "a pointer of Git LFS, not the picture itself: fetch it with `git lfs pull`",
        ),
        (b"<?xml version='1.0'?><svg/>", "SVG"),
        (b"PK\3\4", "a ZIP archive"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"name\0".ljust(257, b"\0") + b"ustar", "a tar"),
        (b"\0" * 64, "nothing but zeros"),
    ],
)
def test_a_file_of_another_type_is_called_by_its_name(begin: bytes, words: str) -> None:
    assert words in _refused(begin if words.endswith("zeros") else begin + b"\1\2\3" * 40)


def test_headers_that_begin_alike_are_parsed_once(photo, encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is found is what a parser finds in each, whatever is damaged where."""
    parsed = []
    real = image_codec.header_size

    def counted(data: NDArray[np.uint8]) -> tuple[int, int] | None:
        parsed.append(data)
        return real(data)

    monkeypatch.setattr(image_codec, "header_size", counted)
    sound = [encoded(photo(37, 53, seed=n), quality=90) for n in range(4)] + [encoded(photo(53, 37, seed=5))]
    sound += [encoded(photo(37, 53, seed=6), "PNG")] * 2
    check, sizes = HeaderCheck(), np.array([[53, 37]] * 4 + [[37, 53]] + [[53, 37]] * 2)
    for again in range(2):
        assert check.wrong([np.frombuffer(data, np.uint8) for data in sound], sizes) == [False] * 7
        assert len(parsed) == (4, 6)[again]  # one JPEG of each size; PNGs always
    assert check.wrong([np.frombuffer(sound[0], np.uint8)], np.array([[53, 38]])) == [True]

    generator = np.random.default_rng(0)
    head = scan_at(sound[0])
    assert 100 < head < len(sound[0]) - 100
    flipped = np.tile(np.frombuffer(sound[0], np.uint8), (2000, 1))
    flipped[np.arange(2000), generator.integers(0, 2 * head, 2000) % len(sound[0])] ^= np.uint8(
        1
    ) << generator.integers(0, 8, 2000).astype(np.uint8)
    cut = [np.frombuffer(sound[0][:length], np.uint8) for length in range(0, head + 40, 7)]
    images = [*flipped, *cut]
    expected = [real(image) != (53, 37) for image in images]
    assert (
        check.wrong(images, np.array([[53, 37]] * len(images))) == expected and 50 < sum(expected) < len(images) - 500
    )


def test_where_a_jpegs_first_scan_begins(photo, encoded) -> None:
    data = encoded(photo(37, 53, seed=1), exif=b"Exif\0\0\xff\xda\0\2")  # a marker within a segment is none
    end = scan_at(data)
    assert data[end - 14 : end - 12] == b"\xff\xda" and data.find(b"\xff\xda") < end - 14
    assert {scan_at(data[:length]) for length in range(end)} == {0} and scan_at(data[:end]) == end
    assert scan_at(data[:2] + b"\xff" + data[2:]) == scan_at(b"\x89PNG" + data) == 0
