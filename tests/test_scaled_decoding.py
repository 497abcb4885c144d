"""`--decode scaled`: the geometry of exact decoding, nearly its pixels, its refusals, and a plan of its own."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from alexprep.cli.shard import shard as shard_command
from alexprep.shards import jpeg_decoder
from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Codec, Converted, Target
from alexprep.shards.image_header import Frame, Refused, jpeg_frame
from alexprep.shards.photos import target_of
from alexprep.shards.plan import ShardOptions
from alexprep.shards.verification import verify
from alexprep.shards.worker_pool import InProcessEngine


def _smooth(width: int, height: int) -> Image.Image:
    """Waves along both axes and edges, so that a shift of a quarter of a pixel shows."""
    y, x = np.mgrid[:height, :width]
    along, down = 40 * x / width, 40 * y / height
    waves = [np.sin(along + n) + np.cos(down - n) + (x > width / 3) - (y > height / 2) for n in range(3)]
    return Image.fromarray(np.uint8(np.stack(waves, axis=2) * 40 + 120))


def _pixels(data: bytes, **target: Any) -> NDArray[np.float64]:
    result = Codec(Target(**{"size": 32, "format": "png", **target})).convert(data)
    assert isinstance(result, Converted), result
    return np.asarray(Image.open(io.BytesIO(result.data)), np.float64)


@pytest.mark.parametrize("fit", ["square", "shorter", "longer"])
@pytest.mark.parametrize(("width", "height"), [(400, 300), (301, 257), (257, 301), (173, 171), (129, 401), (1001, 601)])
def test_nearly_the_same_pixels_in_the_same_place(width: int, height: int, fit: str, encoded) -> None:
    """Sides that eighths do not divide among them, and each sampling of chroma. A shift by a quarter of a pixel would give 34 dB or less."""
    for subsampling, least in enumerate((43, 33, 43)):  # halved along rows alone, chroma is upsampled plainly
        data = encoded(_smooth(width, height), quality=92, subsampling=subsampling)
        exact, scaled = (_pixels(data, fit=fit, decode=decode) for decode in ("exact", "scaled"))
        assert exact.shape == scaled.shape and (exact != scaled).any()
        assert 10 * np.log10(255**2 / np.square(exact - scaled).mean()) > least


@pytest.mark.parametrize("filter", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_other_filters_and_turned_photos(filter: str, orientation: int, encoded) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(_smooth(333, 221), quality=92, exif=exif)
    options: dict[str, Any] = {"filter": filter, "orient": True, "fit": "shorter"}
    exact, scaled = (_pixels(data, decode=decode, **options) for decode in ("exact", "scaled"))
    assert exact.shape == ((48, 32, 3) if orientation == 6 else (32, 48, 3))
    assert exact.shape == scaled.shape and (exact != scaled).any()
    assert 10 * np.log10(255**2 / np.square(exact - scaled).mean()) > 34


def test_what_is_decoded_is_what_pillow_drafts(encoded) -> None:
    """At a half, a quarter and an eighth; three eighths Pillow does not have."""
    data = encoded(_smooth(403, 310), quality=92, subsampling=0)
    frame = jpeg_frame(data)
    assert isinstance(frame, Frame)
    for scale, least in ((0.5, (150, 190)), (0.25, (70, 90)), (0.125, (30, 50)), (0.375, (110, 140))):
        found = jpeg_decoder.decode_scaled(data, frame, least)
        assert found is not None and found[1] == scale
        pixels = found[0]
        assert all(side >= wanted for side, wanted in zip(pixels.shape, least, strict=False))
        if scale != 0.375:
            image: Any = Image.open(io.BytesIO(data))
            image.draft("RGB", (least[1], least[0]))
            np.testing.assert_allclose(pixels.astype(int), np.asarray(image).astype(int), atol=1)


def test_images_that_are_not_much_larger_are_the_same_to_the_byte(encoded, photo) -> None:
    """Also those of other types, and those that are kept as they are."""
    for data in (
        *(encoded(photo(*size, seed=1), quality=90) for size in ((127, 200), (32, 32), (20, 31), (200, 100))),
        encoded(photo(300, 300, seed=2), "PNG"),
        encoded(photo(300, 300, seed=3), "WEBP"),
    ):
        exact, scaled = (Codec(Target(size=32, decode=decode)).convert(data) for decode in ("exact", "scaled"))
        assert exact == scaled and isinstance(exact, Converted)


def test_damage_is_found_as_without(encoded) -> None:
    for progressive in (False, True):
        data = encoded(_smooth(400, 300), quality=92, progressive=progressive)
        for cut in (data[: len(data) // 2], data[: len(data) // 2] + b"\xff\xd9", data[:400], data[:-2]):
            for choice in ("reject", "keep"):
                exact, scaled = (
                    Codec(Target(size=32, on_damaged=choice, decode=decode)).convert(cut)
                    for decode in ("exact", "scaled")
                )
                assert exact == scaled and isinstance(exact, Refused | Converted)


def test_it_is_a_part_of_the_plan(encoded, tmp_path: Path) -> None:
    """Recorded where it is chosen, and nowhere else; what was begun with the one does not go on with the other."""
    for n in range(6):
        place = tmp_path / "photos" / f"class{n % 2}" / f"{n}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(_smooth(300 + n, 200), quality=92))
    chosen, folder = ShardOptions(Target(size=32, decode="scaled")), tmp_path / "scaled"
    words = [str(tmp_path / "photos"), "--out", str(folder), "--fit", "none", "--decode", "scaled"]
    with pytest.raises(AlexprepError, match="--decode scaled does not go with --fit none"):
        CliRunner().invoke(shard_command, words, catch_exceptions=False)
    convert(tmp_path / "photos", folder, chosen, InProcessEngine())
    convert(tmp_path / "photos", tmp_path / "exact", ShardOptions(Target(size=32)), InProcessEngine())
    documents = [json.loads((tmp_path / name / "dataset.json").read_text()) for name in ("scaled", "exact")]
    assert documents[0]["image"]["decode"] == "scaled" and "decode" not in documents[1]["image"]
    assert target_of(documents[0]).decode == "scaled" and target_of(documents[1]).decode == "exact"
    assert documents[0]["digest"] != documents[1]["digest"]
    assert verify(folder, InProcessEngine(), decode=True).problems == []
    assert convert(tmp_path / "photos", folder, chosen, InProcessEngine()).made_inputs == 0
    with pytest.raises(AlexprepError, match="--decode was scaled, now is exact"):
        convert(tmp_path / "photos", folder, ShardOptions(Target(size=32)), InProcessEngine())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cuda"}, "--decode scaled does not go with --device cuda, whose decoder does not scale"),
        ({"fit": "none"}, "--decode scaled does not go with --fit none, which scales nothing"),
        ({"decode": "half"}, "--decode half is not one of exact, scaled"),
    ],
)
def test_options_that_do_not_go_with_it(options: dict[str, Any], words: str) -> None:
    with pytest.raises(AlexprepError, match=words):
        ShardOptions(Target(**{"decode": "scaled", **options}))
