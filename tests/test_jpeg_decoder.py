"""What is accepted of a JPEG is right: cut, damaged and odd files, each made here, against the whole picture and against Pillow."""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from alexprep.shards import jpeg_decoder
from alexprep.shards.image_codec import Codec, Converted, Target
from alexprep.shards.image_header import MAX_SCANS, Frame, Refused, jpeg_frame
from alexprep.shards.jpeg_decoder import OddSamplingError, is_sound, picture_alone

Encode = Callable[..., bytes]
END = b"\xff\xd9"


def _pixels(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _convert(data: bytes, **target: object) -> Converted | Refused:
    return Codec(Target(**{"size": 64, "format": "png", **target})).convert(data)  # type: ignore[arg-type]


def _refused(data: bytes) -> str:
    result = _convert(data)
    assert isinstance(result, Refused), result
    kept = _convert(data, on_damaged="keep")
    assert isinstance(kept, Refused) or kept.damage == result.reason
    frame = jpeg_frame(data)
    assert not isinstance(frame, Frame) or not is_sound(data, frame)
    return result.reason


def _scan(data: bytes) -> tuple[int, int]:
    """Where the last scan's data begin and end."""
    at = data.rindex(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big"), data.rindex(END)


@pytest.mark.parametrize(
    "form", [{}, {"subsampling": 0}, {"mode": "L"}, {"restart_marker_blocks": 3}, {"mode": "CMYK"}]
)
@pytest.mark.parametrize("left", [0.02, 0.35, 0.8, 0.97])
def test_a_cut_jpeg_with_an_end_is_told_by_its_rows(form: dict, left: float, photo, encoded: Encode) -> None:
    form = dict(form)
    data = encoded(photo(200, 300, seed=1).convert(form.pop("mode", "RGB")), quality=90, **form)
    first, end = _scan(data)
    cut = data[: first + int((end - first) * left)].rstrip(b"\xff") + END
    reason = _refused(cut)
    if "restart_marker_blocks" in form:
        assert "truncated after" in reason or "instead of RST" in reason
        return
    words = reason.split()
    assert words[:2] == ["truncated", "after"] and words[3:] == ["of", "300", "rows"], reason
    differ = np.flatnonzero((_pixels(cut) != _pixels(data)).any(axis=(1, 2)))
    assert abs(int(words[2]) - differ[0]) <= 16  # a row of blocks
    kept = _convert(cut, on_damaged="keep")
    assert isinstance(kept, Converted) and kept.damage == reason and not kept.kept
    stretched = _convert(np.ascontiguousarray(_pixels(cut)))  # type: ignore[arg-type]
    assert isinstance(stretched, Converted)
    assert np.abs(_pixels(kept.data).astype(int) - _pixels(stretched.data)).max() <= 1


def test_a_cut_progressive_jpeg_is_refused_wherever_it_is_cut(photo, encoded: Encode) -> None:
    data = encoded(photo(200, 150, seed=2), quality=90, progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    assert len(scans) > 5 and not isinstance(_convert(data), Refused)
    for at in scans[1:]:  # between two scans: libjpeg has nothing to say
        assert "scans are missing" in _refused(data[:at] + END)
    for at in np.linspace(scans[0] + 20, len(data) - 12, 12).astype(int).tolist():
        assert "truncated" in _refused(data[:at].rstrip(b"\xff") + END)


@pytest.mark.parametrize("form", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_a_cut_behind_an_ff_and_a_file_filled_up_with_it_are_refused(form: dict, photo, encoded: Encode) -> None:
    data = encoded(photo(200, 300, seed=11), quality=90, **form)
    first, end = _scan(data)
    if form.get("progressive"):
        first = data.index(b"\xff\xda") + 14
    stuffed = [at for at in range(first, end - 200) if data[at : at + 2] == b"\xff\0"]
    assert len(stuffed) >= 6
    for at in stuffed[:: max(1, len(stuffed) // 6)]:
        behind = data[: at + 1]
        for cut in (behind, behind + END, behind + b"\0" + END, behind + b"\xff" * (len(data) - len(behind))):
            # With restart markers libjpeg looks for the next one, and says so.
            assert "truncated" in _refused(cut) or "instead of RST" in _refused(cut)


@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"\x55"])
def test_a_file_whose_end_is_nothing_but_fill_is_refused(fill: bytes, photo, encoded: Encode) -> None:
    """As downloads leave them whose room was made beforehand: zeros may be codes enough for all blocks, and some are left over then."""
    enough = 0
    for seed in range(2 if fill == b"\xff" else 3):
        data = encoded(photo(200, 150, seed=seed), quality=90)
        first, end = _scan(data)
        for part in (0.02, 0.4, 0.9):
            at = first + int((end - first) * part)
            for room in (len(data) - at, 100_000):
                filled = data[:at] + fill * room
                assert _refused(filled) and "truncated after" in _refused(filled + END)
                frame = jpeg_frame(filled)
                assert isinstance(frame, Frame)
                with pytest.raises(ValueError) as said:
                    jpeg_decoder._pixels(picture_alone(filled, frame), frame)
                enough += "extraneous bytes before marker 0xd9" in str(said.value)
        padded = _convert(data[:-2] + fill * 100_000 + END)  # the whole picture, and fill
        whole = _convert(data)
        assert isinstance(padded, Converted) and isinstance(whole, Converted) and padded.data == whole.data
    assert enough or fill == b"\xff"


def test_what_an_early_scan_lacks_is_found_where_libjpeg_notices(photo, encoded: Encode) -> None:
    data = encoded(photo(200, 150, seed=12), quality=90, progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    for at, stop in itertools.pairwise(scans):
        end = data.rindex(b"\xff\xc4", at, stop) if b"\xff\xc4" in data[at:stop] else stop
        if end - at > 100:
            assert "truncated" in _refused(data[: end - 60].rstrip(b"\xff") + data[end:])


@pytest.mark.parametrize("form", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_what_lacks_nothing_but_its_end_is_taken(form: dict, photo, encoded: Encode) -> None:
    for size in ((200, 150), (64, 64)):
        data = encoded(photo(*size, seed=3), quality=90, **form)
        whole = _convert(data)
        assert isinstance(whole, Converted)
        for shorter in (data[:-2], data[:-1]):
            got = _convert(shorter)
            assert isinstance(got, Converted) and got.data == whole.data and got.damage is None
            kept = _convert(shorter, format="jpg")
            assert isinstance(kept, Converted) and not kept.kept and kept.data.endswith(END)


def test_holes_are_refused_and_so_is_what_is_left_over(photo, encoded: Encode, seed: int) -> None:
    data = encoded(photo(200, 150, seed=4), quality=90)
    first, end = _scan(data)
    noise = np.random.default_rng(seed).integers(0, 255, 400, dtype=np.uint8).tobytes()
    for part in (0.1, 0.5, 0.9):
        at = first + int((end - first) * part)
        assert _refused(data[:at].rstrip(b"\xff") + data[at + 200 :])
        assert "truncated" in _refused(data[:at].rstrip(b"\xff") + END)
    assert "bytes of picture data are left over" in _refused(data[:-2] + noise + END)


def test_what_libjpeg_warns_of_without_harm_costs_no_picture(photo, encoded: Encode) -> None:
    data = encoded(photo(64, 64, seed=5), quality=90)
    table, scan = data.index(b"\xff\xdb"), data.index(b"\xff\xda")
    jfif = data.index(b"JFIF\0") + 5
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"
    odd = {
        "JFIF 0.0": data[:jfif] + b"\0\0" + data[jfif + 2 :],
        "bytes before a table": data[:table] + b"\0\1\2" + data[table:],
        "bytes before the scan": data[:scan] + bytes(50) + data[scan:],
        "Adobe's colours 76": data[:2] + adobe + b"\x4c" + data[20:],  # in place of JFIF's segment
        "a scan's fields": data[: scan + 11] + b"\1\2\x13" + data[scan + 14 :],
        "zeros before the end": data[:-2] + bytes(500) + END,
        "a few bytes before the end": data[:-2] + b"\x12\x34\x56\x78\x9a\xbc\xde\xf1\x23\x45" + END,
        "an unknown segment behind the picture": data[:-2] + b"\xff\x05\x00\x02" + END,
        "another picture behind it": data + data[:300],
    }
    for name, content in odd.items():
        result = _convert(content, format="jpg")
        assert isinstance(result, Converted) and result.damage is None, (name, result)
        png = _convert(content)
        assert isinstance(png, Converted)
        np.testing.assert_array_equal(_pixels(png.data), _pixels(data), err_msg=name)
        assert result.kept == (name == "another picture behind it"), name
    first = odd["JFIF 0.0"]  # a harmless warning must not hide another
    assert "truncated" in _refused(first[: scan + 200].rstrip(b"\xff") + END)


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _frame(marker: int, bits: int = 8, channels: int = 3, height: int = 48) -> bytes:
    parts = b"".join(bytes([n + 1, 0x11, 0]) for n in range(channels))
    return _segment(marker, struct.pack(">BHHB", bits, height, 64, channels) + parts)


def test_the_reason_is_the_true_one(photo, encoded: Encode) -> None:
    scan = _segment(0xDA, b"\3\1\0\2\0\3\0\0\x3f\0") + bytes(99)
    for content, words in (
        (_frame(0xC1, bits=12) + scan, "JPEG of 12 bits a channel"),
        (_frame(0xC3) + scan, "lossless JPEG"),
        (_frame(0xC3, bits=5) + scan, "lossless JPEG"),
        (_frame(0xC9) + scan, "JPEG with arithmetic coding"),
        (_frame(0xCA) + scan, "JPEG with arithmetic coding"),
        (_frame(0xF7) + scan, "lossless JPEG"),
        (_frame(0xDE) + _frame(0xC0) + scan, "hierarchical JPEG"),
        (_frame(0xC5) + scan, "hierarchical JPEG"),
        (_frame(0xC0, channels=2) + scan, "JPEG of 2 channels"),
        (_frame(0xC0, height=0) + scan, "JPEG of 64x0 pixels"),
        (scan, "a scan before any frame"),
        (_frame(0xC0), "JPEG that ends within its header"),
        (b"", "JPEG that ends within its header"),
        (_frame(0xC0)[:7], "JPEG that ends within its header"),
        (_frame(0xC0) + scan, "damaged JPEG: Quantization table 0x00 was not defined"),
        (_segment(0xFE, b"") * 10**5, "more than 1,000 JPEG segments"),
        (_frame(0xC0) + _segment(0xDA, b"\1\1\0\0\x3f\0") * 300, f"more than the limit of {MAX_SCANS}"),
    ):
        assert words in _refused(b"\xff\xd8" + content), words
    data = encoded(photo(64, 64, seed=6), quality=90)
    frame = data.index(b"\xff\xc0")
    assert "JPEG of 12 bits" in _refused(data[: frame + 4] + b"\x0c" + data[frame + 5 :])
    assert "its header is damaged" in _refused(
        data[:frame] + b"\xff\xd8" + data[frame:].replace(b"\xff\xdb", b"\xff\x02")
    )


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_is_inverted_with_or_without_adobe_s_marker(adobe: bool, photo, encoded: Encode) -> None:
    data = encoded(photo(64, 64, seed=7).convert("CMYK"), quality=95)
    at = data.index(b"\xff\xee")
    got = _convert(data if adobe else data[:at] + data[at + 16 :])
    assert isinstance(got, Converted)
    assert np.abs(_pixels(got.data).astype(int) - _pixels(data)).max() <= 1
    assert np.abs(_pixels(got.data).astype(int) - np.asarray(photo(64, 64, seed=7))).mean() < 8


def _flat(encoded: Encode, blocks: int, sampling: int) -> bytes:
    """64 x 64 pixels of grey 128 with an own sampling of luma, coded by hand: of each block no difference and no coefficients."""
    data = bytearray(encoded(Image.new("RGB", (64, 64), (128, 128, 128)), quality=90, subsampling=0))
    data[data.index(b"\xff\xc0") + 11] = sampling
    across, down = (-(-64 // (8 * side)) for side in (sampling >> 4, sampling & 15))
    count = (sampling >> 4) * (sampling & 15)
    bits = ("001010" * count + "0000" * 2) * (across * down)  # codes of the standard's tables K.3-K.6
    bits = bits[: len(bits) * blocks // 100]
    bits += "1" * (-len(bits) % 8)
    return (
        bytes(data[: _scan(bytes(data))[0]])
        + int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
        + END
    )


def test_unusual_sampling_is_decoded_by_pillow_and_its_cuts_are_found(encoded: Encode) -> None:
    usual, odd, cut = _flat(encoded, 100, 0x22), _flat(encoded, 100, 0x31), _flat(encoded, 70, 0x31)
    assert isinstance(jpeg_decoder.decode(usual, jpeg_frame(usual)), jpeg_decoder.Picture)  # type: ignore[arg-type]
    with pytest.raises(OddSamplingError):
        jpeg_decoder.decode(odd, jpeg_frame(odd))  # type: ignore[arg-type]
    for data in (usual, odd):
        result = _convert(data)
        assert isinstance(result, Converted) and (_pixels(result.data) == 128).all()
    result = _convert(cut)
    assert isinstance(result, Refused) and result.reason == "truncated JPEG"


def test_random_damage_is_no_error_and_no_endless_work(photo, encoded: Encode, seed: int) -> None:
    rng = np.random.default_rng(seed)
    files = [encoded(photo(90, 70, seed=8), quality=80, progressive=bool(n)) for n in range(2)]
    codec, taken = Codec(Target(size=64, format="raw", on_damaged="keep")), 0
    for n in range(300):
        data = bytearray(files[n % 2])
        for at in rng.integers(2, len(data), 4):
            data[at] = rng.integers(256)
        result = codec.convert(bytes(data))
        taken += isinstance(result, Converted)
        frame = jpeg_frame(bytes(data))
        if isinstance(frame, Frame):
            alone = picture_alone(bytes(data), frame)
            assert alone.endswith(END) and len(alone) <= len(data) + 2
    assert taken > 100
