"""What the bytes of an encoded image tell before anything is decoded: its type, its size, whether it is within bounds, which decoder reads it.

A file that cannot be used is a `Refused` with its reason, not an exception. Decoding, and what needs a decoder's library,
is in `alexprep.shards.image_codec`; this module imports none.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

# Bounds that keep a worker within 1 GiB (measured: benchmarks/memory.py), checked before anything is allocated. The largest
# photo of ILSVRC 2012 has 61 million pixels.
MAX_PIXELS = 80_000_000
MAX_SIDE = 65_535  # JPEG's own
_MAX_CMYK_PIXELS = 60_000_000  # progressive, these take 12 bytes a pixel
# A progressive JPEG may have thousands of scans, each of which visits every block: a few kilobytes, minutes of work. Encoders
# write about ten; nvImageCodec's first decoder stops at 256, the ones it then asks do not.
MAX_SCANS = 256
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
_HIERARCHICAL = 0xDE  # begins a sequence of frames

_HEAD_BYTES = 2048  # holds the header of any type but of a JPEG with EXIF, a thumbnail or a profile before it
# Camera and editor files have up to about 300 segments before the frame; a file of nothing else has millions.
_MOST_SEGMENTS = 1000
_MOST_CHUNKS = 200_000  # of a PNG; libpng's own are of 8,192 bytes
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by colour type
# JPEG frames by marker (ITU-T T.81, table B.1): which are decoded, and what the others are called.
HUFFMAN, PROGRESSIVE, _ARITHMETIC = (0xC0, 0xC1, 0xC2), 0xC2, 0xC9
_OTHER_FRAMES = dict.fromkeys((0xC3, 0xCB, 0xF7), "lossless JPEG")  # f7: of JPEG-LS (T.87)
_OTHER_FRAMES |= dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical JPEG")
# Of these a cut leaves no trace: encoders may drop the zeros that end a scan, and decoders put in as many as they need.
_OTHER_FRAMES |= dict.fromkeys((_ARITHMETIC, 0xCA), "JPEG with arithmetic coding")
_PLAIN_BMP = {1, 4, 8, 24, 32}  # bits a pixel of a BMP without masks and compression
_pnm = re.compile(rb"P([1-6])(?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,9})\s").match
_bright = re.compile(rb"(?:\s|#[^\n]*\n)*(?:255|65535)\s").match
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"MM*\0", b"II\0*")  # Pillow takes swapped ones too
_CUT = "ends within its header"
# Where a file of another type has which bytes, and what its reason says.
_FOREIGN = (
    (4, b"ftypavi", "AVIF, which is not read: convert it to JPEG or PNG"),
    (4, b"ftyphe", "HEIC, which is not read: convert it to JPEG or PNG"),
    (4, b"ftypmif1", "HEIC or AVIF, which is not read: convert it to JPEG or PNG"),
    (4, b"ftypmsf1", "HEIC or AVIF, which is not read: convert it to JPEG or PNG"),
    (4, b"ftyp", "a video (MP4 or QuickTime), not an image"),
    (0, b"\xff\x0a", "JPEG XL, which is not read: convert it to JPEG or PNG"),
    (4, b"JXL \r\n\x87\n", "JPEG XL, which is not read: convert it to JPEG or PNG"),
    (4, b"jP  \r\n\x87\n", "JPEG 2000, which is not read: convert it to JPEG or PNG"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000, which is not read: convert it to JPEG or PNG"),
    (0, b"8BPS", "Photoshop's PSD, which is not read: convert it to PNG"),
    (0, b"%!PS", "PostScript, which is not read: convert it to PNG"),
    (
        0,
        b"version https://git-lfs.github.com/",
        "a pointer of Git LFS, not the picture itself: fetch it with `git lfs pull`",
    ),
    (0, b"%PDF", "PDF, which is not read: convert it to PNG"),
    (0, b"PK\3\4", "a ZIP archive, not an image: unpack it"),
    (0, b"\x1f\x8b", "compressed with gzip, not an image: unpack it"),
    (0, b"Rar!", "a RAR archive, not an image: unpack it"),
    (0, b"7z\xbc\xaf", "a 7-Zip archive, not an image: unpack it"),
    (257, b"ustar", "a tar, not an image: name it as SOURCE, or unpack it"),
    (0, b"PAR1", "a Parquet table, not an image: name it as SOURCE"),
)
# How files of each format begin.
_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"RIFF": "WebP",
    b"BM": "BMP",
    **{b"P%d" % kind: "PNM" for kind in range(1, 7)},
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
PIXELS: Final = "pixels"  # the format of what a source gives decoded
Read = Callable[[int, int], bytes]  # (offset, size) → those bytes; fewer only where the image ends


@dataclass(frozen=True)
class Refused:
    """An image that is left out, and why; width and height are 0 where the header could not be read."""

    reason: str
    width: int = 0
    height: int = 0


def general_reason(reason: str) -> str:
    """A reason without its particulars, so that like ones are counted together.

    >>> general_reason("JPEG of 1,280x96 pixels: damaged"), general_reason("marker 0xd4"), general_reason("JPEG 2000, which is not read")
    ('JPEG of NxN pixels: damaged', 'marker N', 'JPEG 2000, which is not read')
    """
    return re.sub(r"(?<!JPEG )(?<!\d)(0x[\da-f]+|\d+(,\d{3})*)", "N", reason.split(" (first bytes ")[0])


def format_name(head: bytes) -> str:
    """The format that the first bytes of a file tell, such as "JPEG"; empty for none that is known."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


def tells_orientation(data: bytes) -> bool:
    """Whether an image has a place where an EXIF orientation may stand. Quick: reading EXIF costs more than it tells, mostly nothing."""
    if not data.startswith(b"\xff\xd8"):
        return data[:4] in _TIFF or b"eXIf" in data or b"EXIF" in data or b"tiff:Orientation" in data
    at = 2
    for _ in range(_MOST_SEGMENTS):
        marker, size = data[at + 1 : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at : at + 1] != b"\xff" or marker in (b"\xda", b""):
            return False
        if marker == b"\xe1":  # APP1, where EXIF and XMP stand
            return True
        at += 2 + size if marker != b"\xff" else 1
    return False


class Header(NamedTuple):
    """Height and width of the stored pixels (EXIF orientation not applied), and the number of channels."""

    height: int
    width: int
    channels: int


def read_header(read: Read, offset: int, size: int) -> Header | Refused:
    """The header of the encoded image of `size` bytes at `offset` of what `read(offset, size)` reads.

    It is refused where our decoders would have none of it, as far as a header tells: accepted are JPEG (Huffman, or arithmetic and
    sequential; 8 bits), PNG, WebP, BMP and PNM, whatever the name says, within the bounds of `too_large`.
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
        foreign = reader_of(head if head.strip(b"\0") else read(offset, size))  # nothing but zeros, to the end?
        if isinstance(foreign, Refused):
            return foreign
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


def too_large(height: int, width: int, channels: int = 3) -> Refused | None:
    """The refusal of an image that is beyond the bounds; None for one that is not."""
    limit, side = MAX_PIXELS if channels <= 3 else _MAX_CMYK_PIXELS, max(height, width)
    if height * width > limit:
        return Refused(f"{width}x{height} pixels are more than the limit of {limit:,}", width, height)
    if side > MAX_SIDE:
        return Refused(f"a side of {side:,} pixels is more than the limit of {MAX_SIDE:,}", width, height)
    return None


class Frame(NamedTuple):
    """What a JPEG's frame header says: the marker it begins with, height and width in pixels, channels; and whether it has many scans."""

    marker: int
    height: int
    width: int
    channels: int
    scans: bool  # more than one may be needed for all pixels


# A marker: ff and neither a stuffed zero nor one more fill byte behind it.
next_marker = re.compile(rb"\xff([^\x00\xff])").search


def jpeg_frame(data: bytes) -> Frame | Refused:
    """The frame of a JPEG that begins with its start-of-image marker, or why it is not decoded; as tolerant as libjpeg is."""
    frame, at = None, 2
    for _ in range(_MOST_SEGMENTS):
        found = next_marker(data, at)
        if found is None or found[1][0] == END_OF_IMAGE:
            return Refused("JPEG that ends within its header")
        marker, at = found[1][0], found.start()
        if marker == START_OF_SCAN:
            if frame is None:
                return Refused("damaged JPEG: a scan before any frame")
            frame = frame._replace(scans=frame.scans or data[at + 4 : at + 5] != bytes([frame.channels]))
            return _too_many_scans(data, frame) or frame
        if marker == _HIERARCHICAL:
            return Refused("hierarchical JPEG")
        if frame is None and (marker in HUFFMAN or marker in _OTHER_FRAMES):
            try:
                _, bits, height, width, channels = struct.unpack_from(">HBHHB", data, at + 2)
            except struct.error:
                return Refused("JPEG that ends within its header")
            refusal = _not_decoded(marker, bits, height, width, channels) or too_large(height, width, channels)
            if refusal:
                return refusal
            frame = Frame(marker, height, width, channels, marker == PROGRESSIVE)
        at += 2
        if not (marker == 0x01 or 0xD0 <= marker <= 0xD8):  # those stand alone
            at += max(2, int.from_bytes(data[at : at + 2], "big"))
    return Refused(f"more than {_MOST_SEGMENTS:,} JPEG segments before the picture")


def scan_at(data: bytes) -> int:
    """How many bytes of a JPEG lie before its first scan's data; 0 where it is no JPEG, or cut, or has odd bytes between segments."""
    at = 2 if data.startswith(b"\xff\xd8") else len(data)
    while True:
        marker = data[at : at + 2]
        if not (b"\xff\xc0" <= marker <= b"\xff\xfe") or 0xD0 <= marker[1] <= END_OF_IMAGE:
            return 0
        at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
        if marker[1] == START_OF_SCAN:
            return at if at <= len(data) else 0


def _not_decoded(marker: int, bits: int, height: int, width: int, channels: int) -> Refused | None:
    if marker in _OTHER_FRAMES:
        return Refused(_OTHER_FRAMES[marker], width, height)
    if bits != 8:
        return Refused(f"JPEG of {bits} bits a channel", width, height)
    if not height or not width:
        return Refused(f"JPEG of {width}x{height} pixels: its header is damaged, or the height follows the picture")
    return None if channels in (1, 3, 4) else Refused(f"JPEG of {channels} channels", width, height)


def _too_many_scans(data: bytes, frame: Frame) -> Refused | None:
    if not frame.scans:
        return None  # counting would cost more than a tenth of the decoding
    scans = data.count(b"\xff\xda")
    words = f"{scans:,} scans are more than the limit of {MAX_SCANS}"
    return Refused(words, frame.width, frame.height) if scans > MAX_SCANS else None


LIBJPEG: Final = "libjpeg-turbo"
NVIMGCODEC: Final = "nvImageCodec"
PILLOW: Final = "Pillow"
Reader = Literal["libjpeg-turbo", "nvImageCodec", "Pillow"]


def reader_of(data: bytes) -> Reader | Refused:
    """Which decoder reads an image, by its first bytes: one that was seen to give the right pixels of its kind.

    | JPEG | libjpeg-turbo, which tells what is damaged |
    | PNG, WebP | nvImageCodec; animated ones Pillow, which gives the first picture |
    | BMP | nvImageCodec; those of 16 bits, with masks or compressed Pillow |
    | PNM | nvImageCodec where the brightest is 255 or 65,535; others Pillow |
    | GIF, TIFF, and what nvImageCodec refuses | Pillow |
    """
    if data.startswith(b"\xff\xd8"):
        return LIBJPEG
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PILLOW if data.find(b"acTL", 0, max(0, data.find(b"IDAT"))) > 0 else NVIMGCODEC
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return PILLOW if data[12:16] == b"VP8X" and data[20:21] and data[20] & 2 else NVIMGCODEC
    if data.startswith(b"BM"):
        bits, compression = (int.from_bytes(data[at : at + size], "little") for at, size in ((28, 2), (30, 4)))
        old = data[14:18] == b"\x0c\0\0\0"  # OS/2's header is shorter
        return NVIMGCODEC if not old and bits in _PLAIN_BMP and compression == 0 else PILLOW
    if data[:1] == b"P" and b"1" <= data[1:2] <= b"6":
        pnm = _pnm(data)
        return NVIMGCODEC if pnm is not None and (pnm[1] in b"14" or _bright(data, pnm.end())) else PILLOW
    if data[:4] in _TIFF or data.startswith(b"GIF8"):
        return PILLOW
    return Refused(_what_it_is(data))


def _what_it_is(data: bytes) -> str:
    """Why a file of no known image type is refused: what it is instead, and what to do with it."""
    if not data.strip(b"\0"):
        return "nothing but zeros" if data else "empty file"
    for at, magic, words in _FOREIGN:
        if data.startswith(magic, at):
            return words
    begin = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if begin.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "a web page (HTML), not an image"
    if begin.startswith((b"<svg", b"<?xml")):
        return "SVG or other XML, which is not read: convert it to PNG"
    return f"not an image of a known type (first bytes {data[:8].hex(' ')})"


def png_damage(data: bytes, critical: bool = True) -> Refused | None:
    """What is wrong with the checksums of a PNG's chunks (PNG, third edition, section 5.4); None where nothing is.

    Of those only that the picture depends on, or of all if not `critical`.
    """
    at, view = 8, memoryview(data)
    for _ in range(_MOST_CHUNKS):
        end = at + 12 + int.from_bytes(view[at : at + 4], "big")
        if end > len(data):  # it is cut: its decoder tells whether all pixels are there
            return None
        kind = data[at + 4 : at + 8]
        if not (critical and kind[0] & 0x20) and zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(
            view[end - 4 : end], "big"
        ):
            words = f"damaged PNG: the checksum of its {kind.decode('ascii', 'replace')} chunk is wrong"
            return Refused(words, *struct.unpack_from(">II", data.ljust(24, b"\0"), 16))
        if kind == b"IEND":
            return None
        at = end
    return Refused(f"PNG of more than {_MOST_CHUNKS:,} chunks")


def _jpeg(_head: bytes, get: Read) -> Header | Refused:
    at = 2
    for _ in range(_MOST_SEGMENTS):
        segment = get(at, 10)
        marker = segment[1]
        if segment[0] != 0xFF:
            return Refused(f"no JPEG marker at byte {at:,}: its header is damaged")
        if marker == 0xFF:  # fill bytes may precede any marker
            at += 1
        elif marker in HUFFMAN or marker in _OTHER_FRAMES:
            length, bits, height, width, channels = struct.unpack_from(">HBHHB", segment, 2)
            if bits != 8 or (marker in _OTHER_FRAMES and marker != _ARITHMETIC):  # DALI decodes that
                return _not_decoded(marker, bits, height, width, channels) or Refused(_CUT)
            if length != 8 + 3 * channels:
                return Refused(f"a JPEG frame of {length} bytes for {channels} channels: its header is damaged")
            return Header(height, width, channels)
        elif marker == START_OF_SCAN or not 0xC4 <= marker <= 0xFE or 0xD0 <= marker <= 0xD9:
            return Refused(f"JPEG marker {marker:02x} at byte {at:,} before any frame: its header is damaged")
        else:
            (length,) = struct.unpack_from(">H", segment, 2)
            if length < 2:
                return Refused(f"a JPEG segment of {length} bytes at byte {at:,}: its header is damaged")
            at += 2 + length
    return Refused(f"more than {_MOST_SEGMENTS:,} JPEG segments before the picture")


def _png(head: bytes, _get: Read) -> Header | Refused:
    width, height, colour, checksum = struct.unpack_from(">IIxB3xI", head, 16)
    if colour not in _PNG_CHANNELS:
        return Refused(f"PNG colour type {colour}")
    if checksum != zlib.crc32(head[12:29]):
        return Refused("a PNG header whose checksum is wrong")
    return Header(height, width, _PNG_CHANNELS[colour])


def _webp(head: bytes, _get: Read) -> Header | Refused:
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


def _bmp(head: bytes, _get: Read) -> Header | Refused:
    (length,) = struct.unpack_from("<I", head, 14)
    width, height, _planes, bits = struct.unpack_from("<HHHH" if length == 12 else "<iiHH", head, 18)
    return Header(abs(height), width, 4 if bits == 32 else 3)  # rows from the top have a negative height


def _portable(head: bytes, _get: Read) -> Header | Refused:
    match = _pnm(head)
    if match is None:
        return Refused("a PNM whose header makes no sense")
    kind, width, height = map(int, match.groups())
    return Header(height, width, 3 if kind in (3, 6) else 1)


_PARSERS: dict[bytes, Callable[[bytes, Read], Header | Refused]] = {
    b"\xff\xd8\xff": _jpeg,
    _PNG: _png,
    b"RIFF": _webp,
    b"BM": _bmp,
    **{b"P%d" % kind: _portable for kind in range(1, 7)},
}
