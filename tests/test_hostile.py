"""Files made to hurt: no crash, no hang, each in the ledger once, and the good ones as if they had been alone."""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Codec, Converted, Target
from alexprep.shards.image_header import MAX_SCANS, Refused
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sample_reader import Samples
from alexprep.shards.verification import verify
from alexprep.shards.worker_pool import InProcessEngine, LocalEngine

KINDS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "TGA", "JPEG2000", "ICO")


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, body: bytes, more: bytes = b"") -> bytes:
    header = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + _png_chunk(b"IDAT", body) + _png_chunk(b"IEND", b"")


def made_to_hurt(photo: Callable[..., Image.Image], encoded: Callable[..., bytes]) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of files each of which is a known trick."""
    picture = photo(64, 48, 1)
    jpeg = encoded(picture)
    # Gigapixels promised by a header of a few hundred bytes.
    yield "bomb.png", _png(60000, 60000, zlib.compress(bytes(10**6), 9))
    yield "flat-bomb.png", _png(3000, 3000, zlib.compress(bytes(3000 * 9001), 9))  # legal: 9 Mpx of black in 26 kB
    frame = jpeg.index(b"\xff\xc0")
    yield "bomb.jpg", jpeg[: frame + 5] + b"\xff\xff\xff\xff" + jpeg[frame + 9 :]
    yield "bomb.gif", b"GIF89a\xff\xff\xff\xff" + encoded(picture, "GIF")[10:]
    yield "bomb.bmp", encoded(picture, "BMP")[:18] + struct.pack("<ii", 10**6, 10**6) + encoded(picture, "BMP")[26:]
    yield "negative.bmp", encoded(picture, "BMP")[:18] + struct.pack("<ii", -64, -48) + encoded(picture, "BMP")[26:]
    # Chunks and segments that claim more than there is, or far too much.
    small, bomb = zlib.compress(bytes(200)), b"a\0\0" + zlib.compress(bytes(10**8))
    yield "text-bomb.png", _png(8, 8, small, _png_chunk(b"zTXt", bomb))
    yield "profile-bomb.png", _png(8, 8, small, _png_chunk(b"iCCP", bomb))
    yield "long-chunk.png", _png(8, 8, small)[:33] + b"\x7f\xff\xff\xffIDAT" + bytes(99)
    yield "big-exif.jpg", jpeg[:2] + (b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)) * 200 + jpeg[2:]
    yield (
        "exif-loop.jpg",
        jpeg[:2] + b"\xff\xe1\x00\x20Exif\0\0II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0" + jpeg[2:],
    )
    # Thousands of scans, each of which visits every block.
    buffer = io.BytesIO()
    photo(700, 700, 2).save(buffer, "JPEG", progressive=True)
    progressive = buffer.getvalue()
    last = progressive.rindex(b"\xff\xda")
    yield "scans.jpg", progressive[:-2] + progressive[last:-2] * 300 + b"\xff\xd9"
    # Nothing behind a good beginning, and the wrong thing behind it.
    yield "head.jpg", jpeg[:20]
    yield "two.jpg", jpeg + jpeg
    yield "zip.jpg", jpeg + b"PK\x03\x04" + bytes(999)
    yield "html.jpg", b"<html><body>429 Too Many Requests</body></html>"
    yield "null.jpg", bytes(4096)
    yield "ff.jpg", b"\xff" * 65536
    yield "restart.jpg", jpeg[:-2] + b"\xff\xd0" * 9999 + b"\xff\xd9"
    yield "huge-tiff.tif", b"II*\0\x08\0\0\0\xff\xff" + b"\0\x01\x04\0\xff\xff\xff\xff\0\0\0\0" * 500
    yield "tiff-loop.tif", b"II*\0\x08\0\0\0\0\0\x08\0\0\0"
    yield "script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n"
    yield "svg.jpg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield "layers.psd", b"8BPS\0\x01" + bytes(6) + b"\0\x03\0\0\x75\x30\0\0\x75\x30\0\x08\0\x03" + bytes(99)


@pytest.fixture(scope="module")
def damaged(photo: Callable[..., Image.Image], encoded: Callable[..., bytes]) -> dict[str, bytes]:
    """Good files of every kind after random damage (flips, cuts, splices, repeats), by name."""
    rng, made = random.Random(20_261_121), {}
    for n in range(560):
        kind = KINDS[n % len(KINDS)]
        mode = "P" if n % 7 == 0 and kind in ("PNG", "GIF") else "RGB"
        good = encoded(photo(rng.randrange(1, 90), rng.randrange(1, 90), n).convert(mode), kind)
        bad = bytearray(good)
        match n % 4:
            case 0:
                for _ in range(rng.randrange(1, 20)):
                    bad[rng.randrange(len(bad))] = rng.randrange(256)
            case 1:
                del bad[rng.randrange(len(bad)) :]
            case 2:
                at = rng.randrange(len(bad))
                bad[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 64)))
            case 3:
                at, length = rng.randrange(len(bad)), rng.randrange(1, 200)
                bad[at:at] = bad[at : at + length]
        made[f"{n:03d}.{kind.lower()}"] = bytes(bad)
    return made


def test_hostile_files_change_nothing_for_the_good_ones(
    photos: Path, photo, encoded, damaged: dict[str, bytes], tmp_path: Path
) -> None:
    hostile = dict(made_to_hurt(photo, encoded)) | damaged
    assert len(hostile) >= 580
    shutil.copytree(photos, tmp_path / "source")
    for name, content in hostile.items():
        (tmp_path / "source/train/class1" / f"x{name}").write_bytes(content)
    options = ShardOptions(Target(size=32), shard_samples=50)
    report = convert(
        tmp_path / "source", tmp_path / "out", options, LocalEngine(2, image_seconds=120), max_rejects="100%"
    )
    convert(photos, tmp_path / "alone", options, InProcessEngine())
    assert report.inputs == len(hostile) + 68
    ledgers = {
        folder: pq.read_table(tmp_path / folder / "train/samples.parquet").to_pylist() for folder in ("out", "alone")
    }
    sources = [row["source"] for row in ledgers["out"]]
    assert len(sources) == len(set(sources)) == len(hostile) + 48
    reasons = {row["source"].rpartition("/x")[2]: row["reason"] for row in ledgers["out"] if row["reason"]}
    assert not [reason for reason in reasons.values() if "ends the process" in reason or "takes more" in reason], (
        reasons
    )
    for name in ("bomb.png", "bomb.jpg", "bomb.gif"):
        assert "than the limit" in reasons[name], (name, reasons[name])
    assert f"more than the limit of {MAX_SCANS}" in reasons["scans.jpg"]
    for name, words in (
        ("html.jpg", "HTML"),
        ("script.eps", "PostScript"),
        ("svg.jpg", "SVG"),
        ("layers.psd", "PSD"),
        ("null.jpg", "zeros"),
    ):
        assert words in reasons[name], (name, reasons[name])
    images = {}
    for folder, rows in ledgers.items():
        samples = Samples(tmp_path / folder, "train")
        written = [row["source"] for row in rows if row["status"] == "written"]
        images[folder] = {source: samples.encoded(n).tobytes() for n, source in enumerate(written)}
    assert {source: images["out"][source] for source in images["alone"]} == images["alone"]


def test_what_is_taken_is_what_pillow_sees(damaged: dict[str, bytes]) -> None:
    """A damaged file that both accept gives the same picture, whole: never one that is grey from the damage on."""
    codec = Codec(Target(size=32, format="raw"))
    taken = agreed = 0
    for content in damaged.values():
        result = codec.convert(content)
        assert isinstance(result, Converted | Refused)
        if isinstance(result, Refused):
            continue
        taken += 1
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                theirs = codec.convert(np.asarray(image.convert("RGB")))
        except Exception:  # noqa: BLE001, S112  (damage outside of the region that is read)
            continue
        assert isinstance(theirs, Converted)
        ours, other = (np.load(io.BytesIO(r.data)).astype(int) for r in (result, theirs))
        agreed += np.abs(ours - other).mean() <= 2
    assert taken > 50 and agreed > 0.9 * taken


def test_damaged_images_are_left_out_or_kept_and_the_ledger_says_so(
    photos: Path, encoded, photo, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(photos, source)
    jpeg, png = encoded(photo(90, 80, 1), quality=90), encoded(photo(90, 80, 2), "PNG")
    damaged = {"cut.jpg": jpeg[: len(jpeg) // 2] + b"\xff\xd9", "cut.png": png[: len(png) // 2], "no.jpg": jpeg[:30]}
    for name, content in {**damaged, "whole.jpg": jpeg[:-2]}.items():
        (source / "train/class1" / name).write_bytes(content)
    shards: dict[str, dict[str, bytes]] = {}
    for choice in ("reject", "keep"):
        options, folder = ShardOptions(Target(size=32, on_damaged=choice), shard_samples=50), tmp_path / choice
        report = convert(source, folder, options, InProcessEngine())
        rows = pq.read_table(folder / "train/samples.parquet").to_pylist()
        found = {row["source"].rpartition("/")[2]: row for row in rows if row["reason"]}
        assert found.keys() == damaged.keys()
        assert all("truncated" in found[name]["reason"] for name in ("cut.jpg", "cut.png"))
        taken = {"cut.jpg", "cut.png"} if choice == "keep" else set()
        assert {name for name, row in found.items() if row["status"] == "written"} == taken
        assert (report.damaged.total(), report.rejected.total()) == (len(taken), 3 - len(taken))
        assert verify(folder, InProcessEngine(), decode=True).problems == []
        assert convert(source, folder, options, InProcessEngine()).made_inputs == 0
        samples = Samples(folder, "train")
        written = [row["source"] for row in rows if row["status"] == "written"]
        shards[choice] = {name: samples.encoded(n).tobytes() for n, name in enumerate(written)}
        assert json.loads((folder / "plan.json").read_text())["options"]["on_damaged"] == (choice if taken else None)
    assert shards["reject"].items() < shards["keep"].items()
    with pytest.raises(AlexprepError, match="--on-damaged was keep, now is reject"):
        convert(source, tmp_path / "keep", ShardOptions(Target(size=32), shard_samples=50), InProcessEngine())
