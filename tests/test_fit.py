"""Images that are no squares: fits, boxes and WebP, from the codec to the loader's batches and the statistics."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from alexprep.pipeline.augmentation import Augmentation, augment, centred, draw, ten_windows
from alexprep.pipeline.evaluation_views import ViewMaker, too_small
from alexprep.pipeline.loader import Loader
from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import read_dataset, read_index
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Codec, Converted, Target
from alexprep.shards.image_codec_cuda import CudaCodec
from alexprep.shards.image_header import MAX_PIXELS, Refused
from alexprep.shards.photos import target_of
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sample_reader import Samples
from alexprep.shards.verification import verify
from alexprep.shards.worker_pool import InProcessEngine
from alexprep.train.data import stored_sides

SHAPES = ((61, 90), (90, 61), (64, 64), (1, 7), (40, 200), (33, 47), (48, 36), (30, 40), (256, 256))  # heights, widths
SPLITS = {"train": 48, "val": 20}
CROP = (24, 31)

Encode = Callable[..., bytes]


@pytest.fixture(scope="module")
def shorter(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos` with a shorter side of 32 pixels, lossless, with statistics. Not to be changed."""
    folder = tmp_path_factory.mktemp("shorter")
    convert(photos, folder, ShardOptions(Target(size=32, fit="shorter", format="png"), shard_samples=20), _engine())
    rgb_statistics.publish_statistics(rgb_statistics.pca_stats(folder, "train", _engine()), folder, "train")
    return folder


@pytest.fixture(scope="module")
def oblong(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos` cut to 40 x 28 pixels, with statistics. Not to be changed."""
    folder = tmp_path_factory.mktemp("oblong")
    convert(photos, folder, ShardOptions(Target(size=(28, 40)), shard_samples=30), _engine())
    rgb_statistics.publish_statistics(rgb_statistics.pca_stats(folder, "train", _engine()), folder, "train")
    return folder


def _engine() -> InProcessEngine:
    return InProcessEngine()


def _picture(samples: Samples, row: int) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(samples.encoded(row).tobytes())).convert("RGB"))


def _pictures(data: Path, split: str) -> list[NDArray[np.uint8]]:
    samples = Samples(data, split)
    return [_picture(samples, row) for row in range(len(samples))]


def _rounded(value: Fraction) -> int:
    """Half up, as C's round does."""
    return max(1, math.floor(value + Fraction(1, 2)))


@pytest.mark.parametrize("box", [(64, 64), (48, 36), (30, 77)])
@pytest.mark.parametrize("fit", ["square", "shorter", "longer", "none"])
def test_sizes_are_those_of_exact_arithmetic(fit: Any, box: tuple[int, int]) -> None:
    """The scale is a fraction, of which one side becomes the box's exactly; nothing but the cut takes proportions away."""
    for only_shrink in (False, True):
        for shape in SHAPES:
            scales = [Fraction(wanted, side) for wanted, side in zip(box, shape, strict=True)]
            scale = {"longer": min(scales), "none": Fraction(1)}.get(fit, max(scales))
            enlarges = scale > 1
            used = Fraction(1) if only_shrink and enlarges else scale
            whole = tuple(_rounded(side * used) for side in shape)
            cut = tuple(_rounded(side / scale) for side in box) if only_shrink and enlarges else box
            target = Target(size=box, fit=fit, only_shrink=only_shrink)
            resize = target.resize(*shape)
            assert (resize.vertical.target, resize.horizontal.target) == whole
            assert resize.size == (cut if fit == "square" else whole)
            for axis in (resize.vertical, resize.horizontal):
                assert axis.offset == (axis.target - axis.count) // 2 >= 0
            assert resize.only_cuts == (whole == shape) and target.keeps(*shape) == (resize.size == shape == whole)


@pytest.mark.parametrize("fit", ["shorter", "longer"])
def test_pixels_are_the_covered_shares_of_the_whole_image(fit: Any, photo: Any, encoded: Encode) -> None:
    """In float64, of each pixel as many times as there are outputs: within 0.75 grey levels, of which 0.5 are the last rounding."""
    for size in ((91, 60), (60, 91), (65, 200)):
        picture = photo(*size, seed=4)
        made = Codec(Target(size=30, fit=fit, format="png")).convert(encoded(picture, "PNG"))
        assert isinstance(made, Converted)
        got = np.asarray(Image.open(io.BytesIO(made.data)))
        assert got.shape == (*made.size, 3) and (made.width, made.height) == size
        exact = np.asarray(picture, np.float64)
        for axis, (source, target) in enumerate(zip(exact.shape, made.size, strict=False)):
            parts = np.moveaxis(np.repeat(exact, target, axis=axis), axis, 0)
            exact = np.moveaxis(parts.reshape(target, source, *parts.shape[1:]).mean(axis=1), 0, axis)
        assert np.abs(got - exact).max() <= 0.75


def test_images_of_the_wanted_form_keep_their_bytes(photo: Any, encoded: Encode) -> None:
    """Whatever is whole and as large as the fit makes it; a cut is none of these, and nor is a turned one."""
    exif = Image.Exif()
    exif[0x112] = 6
    kinds: tuple[Any, ...] = ("jpg", "png", "webp")
    for kind in kinds:
        data = encoded(photo(50, 32, seed=1), {"jpg": "JPEG"}.get(kind, kind.upper()))
        turned = encoded(photo(50, 32, seed=1), {"jpg": "JPEG"}.get(kind, kind.upper()), exif=exif)
        cases: tuple[tuple[dict[str, Any], bool], ...] = (
            ({"size": 32, "fit": "shorter"}, True),
            ({"size": 50, "fit": "longer"}, True),
            ({"size": (32, 50)}, True),
            ({"fit": "none"}, True),
            ({"size": 300, "fit": "shorter", "only_shrink": True}, True),
            ({"fit": "none", "reencode": "always"}, False),
            ({"size": 32}, False),
            ({"size": 31, "fit": "shorter"}, False),
        )
        for options, keeps in cases:
            codec = Codec(Target(format=kind, **options))
            made, other = codec.convert(data), codec.convert(turned)
            assert isinstance(made, Converted) and isinstance(other, Converted)
            assert made.kept == keeps and (made.data == data) == keeps and not other.kept, (kind, options)


def test_webp_holds_what_it_is_given(photo: Any, encoded: Encode) -> None:
    """Lossless is equal to the pixel, lossy is near, and a smaller file; both are WebP of the right kind."""
    data, made = encoded(photo(60, 45, seed=2), "PNG"), {}
    for lossless in (False, True):
        result = Codec(Target(size=24, fit="shorter", format="webp", lossless=lossless)).convert(data)
        assert isinstance(result, Converted)
        made[lossless] = result.data
        assert (result.data[12:16] == b"VP8L") == lossless and result.data[8:12] == b"WEBP"
    png = Codec(Target(size=24, fit="shorter", format="png")).convert(data)
    assert isinstance(png, Converted)
    exact, near, expected = (
        np.asarray(Image.open(io.BytesIO(each))).astype(int) for each in (made[True], made[False], png.data)
    )
    np.testing.assert_array_equal(exact, expected)
    assert 0 < np.abs(near - expected).mean() < 8 and len(made[False]) < len(made[True])


def test_a_batch_is_what_the_codec_makes_of_each(photo: Any, encoded: Encode) -> None:
    """The way of a GPU, with CPU decoders: cuts, kept bytes and sizes as well."""
    data = [encoded(photo(*size, seed=5), quality=90) for size in ((61, 90), (90, 61), (40, 40), (52, 40), (40, 90))]
    for fit, size in (("shorter", 40), ("longer", 90), ("none", 256), ("square", (40, 40)), ("square", (30, 40))):
        for only_shrink in (False, True)[: 1 + (fit != "none")]:
            target = Target(size=size, fit=fit, only_shrink=only_shrink)  # type: ignore[arg-type]
            alone = Codec(target)
            expected = [alone.convert(each) for each in data]
            assert CudaCodec(target, "cpu").convert_many(data) == expected
            assert (
                len({each.size for each in expected if isinstance(each, Converted)}) == 1
                or fit != "square"
                or only_shrink
            )


def test_what_would_become_too_large_is_refused(encoded: Encode) -> None:
    line = encoded(Image.new("RGB", (1, 300)), "PNG")
    cases = ((Target(size=8000, fit="shorter"), MAX_PIXELS), (Target(size=60, fit="shorter", format="webp"), 16_383))
    for target, limit in cases:
        refused = Codec(target).convert(line)
        assert isinstance(refused, Refused) and f"{limit:,}" in refused.reason and refused.height == 300
    kept = Codec(Target(size=8000, fit="shorter", only_shrink=True)).convert(line)
    assert isinstance(kept, Converted) and kept.size == (300, 1)


def test_a_damaged_jpeg_is_the_same_whatever_was_in_memory(photo: Any, encoded: Encode) -> None:
    """Half of a progressive one, larger than the room that is kept: what is missing has one value."""
    data = encoded(photo(90, 61, seed=3), progressive=True)
    codec, made = Codec(Target(fit="none", format="raw", on_damaged="keep")), set()
    for fill in (0, 255):
        held = [np.full(90 * 61 * 3, fill, np.uint8) for _ in range(20)]
        del held  # what is allocated next finds this
        result = codec.convert(data[: len(data) // 2])
        assert isinstance(result, Converted) and result.damage
        made.add(result.data)
    assert len(made) == 1


def test_the_index_has_the_sizes_that_are_stored(shorter: Path) -> None:
    """As Pillow reads them; verified with and without decoding; of a smallest side of 32."""
    assert verify(shorter, _engine(), decode=True).problems == []
    for split, count in SPLITS.items():
        index, pictures = read_index(shorter, split), _pictures(shorter, split)
        assert len(index) == count
        assert [(r["height"], r["width"]) for r in index] == [picture.shape[:2] for picture in pictures]
        assert {min(picture.shape[:2]) for picture in pictures} == {32}
    dataset = read_dataset(shorter)
    assert (dataset["image"]["fit"], dataset["image"]["size"]) == ("shorter", 32)
    assert replace(target_of(dataset), reencode="needed") == Target(size=32, fit="shorter", format="png")
    assert stored_sides(shorter, dataset) == (32, 32)


def test_a_stored_size_that_was_changed_is_found(photos: Path, tmp_path: Path) -> None:
    """In a sidecar it must be one that the fit gives; with the sha256 of the tar as it was."""
    convert(photos, tmp_path, ShardOptions(Target(fit="none"), limit=4), _engine())
    path = tmp_path / "train/train-000000.json"
    before = path.read_bytes()
    sidecar = json.loads(before)
    entry = sidecar["inputs"][1]
    assert (entry["stored_width"], entry["stored_height"]) == (entry["width"], entry["height"])
    entry["stored_width"] += 1
    path.write_bytes(json.dumps(sidecar, separators=(",", ":")).encode())
    (problem,) = (each for each in verify(tmp_path, _engine()).problems if each.file.startswith("train/train"))
    assert problem.file == "train/train-000000.json" and "stored_width" in problem.what
    path.write_bytes(before)
    assert verify(tmp_path, _engine(), decode=True).problems == []


def test_another_fit_is_another_plan(photos: Path, shorter: Path) -> None:
    options = ShardOptions(Target(size=32, format="png", only_shrink=True), shard_samples=20)
    words = "--fit was shorter, now is square; --only-shrink was not given, now is given"
    with pytest.raises(AlexprepError, match=words):
        convert(photos, shorter, options, _engine())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fit": "none", "size": 64}, "--size 64 says nothing with --fit none"),
        ({"fit": "none", "only_shrink": True}, "--only-shrink says nothing with --fit none"),
        ({"lossless": True}, "--lossless is of WebP.*png"),
        ({"webp_method": 2, "format": "png"}, "--webp-method 2 is of WebP"),
        ({"webp_method": 7, "format": "webp"}, "--webp-method 7 is not between 0 and 6"),
        ({"size": (64, 9000)}, "--size 9000 is not between 1 and 8,192"),
        ({"size": [64, 64]}, r"size \[64, 64\] is neither"),
        ({"fit": "wider"}, "--fit wider is not one of square, shorter, longer, none"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(AlexprepError, match=words):
        ShardOptions(Target(**options))


def test_the_command_takes_boxes_and_fits(command: Any, photos: Path) -> None:
    code, _, _ = command("shard", str(photos), "--size", "52x36", "--format", "webp", "--limit", "5", "--workers", "1")
    image = read_dataset("alexprep-data")["image"]
    assert (code, image["size"], image["extension"]) == (0, [36, 52], "webp")
    assert set(read_index("alexprep-data", "val")[["height", "width"]].tolist()) == {(36, 52)}
    for arguments, words in (
        (("--size", "52x"), "neither a side, such as 256, nor width and height"),
        (("--fit", "none", "--size", "9x8"), "--size 9x8 says nothing"),
        (("--size", "36x52", "--format", "webp"), "--size was 52x36, now is 36x52"),
    ):
        code, _, said = command("shard", str(photos), *arguments, "--limit", "5", "--workers", "1")
        assert code == 1 + (words[:7] == "neither") and words in " ".join(said.split()), said


# Statistics.


def test_moments_of_images_of_different_sizes(shorter: Path, tmp_path: Path) -> None:
    """Those of float64 over all pixels; no mean image, neither on disk nor read back."""
    pixels = np.concatenate([picture.reshape(-1, 3) for picture in _pictures(shorter, "train")]).astype(np.float64)
    found = rgb_statistics.read_statistics(shorter)
    np.testing.assert_allclose(found.channel_means, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(pixels, rowvar=False, bias=True), rtol=1e-10)
    assert found.mean_HWC is None and not list((shorter / "stats").glob("mean*"))
    with pytest.raises(AlexprepError, match="mean 'crop' and 'centre'"):
        found.mean_image()


def test_large_images_are_added_in_parts(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sums as with a mean image, whatever the parts."""
    images = np.random.default_rng(seed).integers(0, 256, (5, 3, 41, 29), np.uint8)
    whole = rgb_statistics.Accumulator(41, 29)
    monkeypatch.setattr(rgb_statistics, "_CHUNK", 512)
    parts = rgb_statistics.ColourAccumulator()
    for image in images:
        whole.add(image)
        parts.add(image)
    one, other = whole.moments(), parts.moments()
    assert (one.images, one.pixels) == (other.images, other.pixels) == (5, 5 * 41 * 29)
    np.testing.assert_array_equal(one.sums.sum(axis=(1, 2)), other.sums)
    np.testing.assert_array_equal(one.products, other.products)


def test_a_mean_image_may_be_oblong(oblong: Path) -> None:
    found = rgb_statistics.read_statistics(oblong)
    samples, codec = Samples(oblong, "train"), Codec(Target())
    decoded = (codec.decode(samples.encoded(row).tobytes()) for row in range(48))
    exact = np.stack([pixels for pixels in decoded if pixels is not None])
    np.testing.assert_allclose(found.mean_image(), exact.mean(axis=0), rtol=1e-12)
    assert json.loads((oblong / "stats/stats.json").read_bytes())["size"] == [28, 40]
    assert verify(oblong, _engine()).problems == []


# The loader.


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _check_batches(data: Path, augmentation: Augmentation, rounding: float, memory_format: Any, device: str) -> None:
    """All batches of an epoch are the numpy definition's, each window drawn within the sample's own height and width."""
    samples = Samples(data, "train")
    found = rgb_statistics.read_statistics(data) if augmentation.needs_statistics else None
    options: Any = {"seed": 6, "memory_format": memory_format, "device": device}
    with Loader(data, batch_size=20, augmentation=augmentation, **options) as loader:
        for step, batch in enumerate(loader):
            rows = batch.indices.numpy()
            pictures = [_picture(samples, row) for row in rows.tolist()]
            sizes = np.array([picture.shape[:2] for picture in pictures])
            draws = draw(augmentation, 6, 0, rows, sizes, 20 * step + np.arange(len(rows)))
            for n, picture in enumerate(pictures):
                expected = augment(picture, draws, n, augmentation, found)
                got = batch.images[n].cpu().numpy()
                got = got if memory_format == "NHWC" else got.transpose(1, 2, 0)
                assert got.shape == (*(augmentation.view or ()), 3)
                difference = np.abs(got - expected)  # a GPU's decoder is another one
                assert difference.max() <= (rounding if device == "cpu" else 16) and difference.mean() < 1


OBLONG_CROPS: dict[str, Augmentation] = {
    "channel": Augmentation(crop=CROP, mean="channel", std="channel"),
    "resized": Augmentation(crop=CROP, scale=(0.2, 1), mean="inception", noise="none", erasing=None),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", OBLONG_CROPS)
def test_oblong_crops_of_images_of_any_size_equal_numpy(
    name: str, memory_format: Any, device: str, shorter: Path
) -> None:
    """A resize rounds to grey levels, so there one level may be one off."""
    _check_batches(shorter, OBLONG_CROPS[name], 1.01 if name == "resized" else 1e-3, memory_format, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", ["NCHW", "NHWC"])
@pytest.mark.parametrize("mean", ["crop", "centre"])
def test_oblong_windows_of_the_mean_image_equal_numpy(mean: Any, memory_format: Any, device: str, oblong: Path) -> None:
    augmentation = Augmentation(crop=CROP, mean=mean, noise="stdev", noise_rescale=1.1)
    _check_batches(oblong, augmentation, 1e-3, memory_format, device)


@pytest.mark.parametrize("views", ["centre", "ten"])
def test_views_without_a_loader_are_a_loaders(views: Any, shorter: Path) -> None:
    """Of images of any size, by their headers; the windows are those of each image's own size."""
    augmentation = Augmentation(crop=CROP, mean="none", noise="none")
    samples = Samples(shorter, "val")
    with Loader(shorter, "val", batch_size=20, augmentation=augmentation, views=views, order="sequential") as loader:
        (batch,) = loader
    with ViewMaker(augmentation, views, size=None, raw=False, batch_size=20) as maker:
        made = maker([samples.encoded(row).tobytes() for row in range(20)])
        np.testing.assert_array_equal(made.numpy(), batch.images.numpy())
        assert too_small(augmentation, 24, 31) is None
        with pytest.raises(AlexprepError, match="30 x 40 pixels are too few for a crop of 31 x 24"):
            maker([Codec(Target(format="png")).encode(np.zeros((40, 30, 3), np.uint8))])
    for row in range(20):
        picture = _picture(samples, row)
        size = np.array([picture.shape[:2]])
        windows = ten_windows(augmentation, size)[0] if views == "ten" else centred(augmentation, size).windows_N4
        shown = batch.images[row, :5].numpy() if views == "ten" else batch.images[row : row + 1].numpy()
        for (top, left, height, width), view in zip(windows.tolist(), shown, strict=True):
            np.testing.assert_array_equal(view.transpose(1, 2, 0), picture[top : top + height, left : left + width])


def test_the_centre_view_of_a_resized_crop_has_its_proportions() -> None:
    """The largest window with them, times the share; of a square the shorter side's, as it was."""
    sizes = np.array([[100, 300], [300, 100], [64, 64]])
    oblong, square = (Augmentation(crop=crop, scale=(0.1, 1), mean="none") for crop in ((50, 100), 50))
    assert centred(oblong, sizes).windows_N4[:, 2:].tolist() == [[88, 175], [44, 88], [28, 56]]
    assert centred(square, sizes).windows_N4[:, 2:].tolist() == [[88, 88], [88, 88], [56, 56]]


def test_what_images_of_different_sizes_cannot_have_is_refused_by_name(shorter: Path, oblong: Path) -> None:
    for mean in ("crop", "centre"):
        with pytest.raises(
            AlexprepError, match=f"mean '{mean}' .*images of several sizes have none: use mean 'channel'"
        ):
            Loader(shorter, batch_size=4, augmentation=Augmentation(crop=CROP, mean=mean))
    with pytest.raises(AlexprepError, match="whole images of several sizes make no batch"):
        Loader(shorter, batch_size=4, augmentation="none")
    with pytest.raises(AlexprepError, match=r"crop of 41 x 28 does not fit 48 of 48.*--size 41x28"):
        Loader(oblong, batch_size=4, augmentation=Augmentation(crop=(28, 41), mean="none", noise="none"))


@pytest.mark.parametrize("crop", [(24,), (24, 0), [24, 24], (24, 3.5), "24", (1, 70_000)])
def test_a_crop_that_is_none_is_refused(crop: Any) -> None:
    with pytest.raises(AlexprepError, match="crop"):
        Augmentation(crop=crop)


def test_webp_and_whole_oblong_images_come_out_of_the_loader(photos: Path, tmp_path: Path) -> None:
    """Every pixel of every image, whole ones where all have one size."""
    target = Target(size=(20, 33), format="webp", lossless=True)
    convert(photos, tmp_path, ShardOptions(target, limit=9), _engine())
    samples = Samples(tmp_path, "train")
    with Loader(tmp_path, batch_size=9, augmentation="none", dtype="uint8", order="sequential") as loader:
        (batch,) = loader
    for row in range(9):
        np.testing.assert_array_equal(batch.images[row].numpy().transpose(1, 2, 0), _picture(samples, row))


# Images on a canvas.


def test_padded_images_are_the_others_in_the_middle_of_a_canvas(photos: Path, oblong: Path, tmp_path: Path) -> None:
    """Boxes and whole images, in an odd rest too; what is verified, gone on with, and made of photos at hand agrees."""
    for fit, box, canvas in (("square", (28, 40), (33, 40)), ("longer", (24, 24), (24, 29))):
        folders = []
        for pad in (None, canvas):
            folders.append(tmp_path / f"{fit}-{pad is None}")
            target = Target(size=box, fit=fit, format="png", pad=pad)  # type: ignore[arg-type]
            options = ShardOptions(target, shard_samples=30, limit=7)
            convert(photos, folders[-1], options, _engine())
            assert not verify(folders[-1], _engine(), decode=True).problems
            assert convert(photos, folders[-1], options, _engine()).made_inputs == 0
        bare, padded = (Samples(folder, "val") for folder in folders)
        assert padded.common_size == canvas and stored_sides(folders[1], read_dataset(folders[1])) == (min(canvas),) * 2
        for row in range(7):
            image, whole = (np.asarray(Image.open(io.BytesIO(each.encoded(row).tobytes()))) for each in (bare, padded))
            assert whole.shape == (*canvas, 3)
            top, left = ((side - part) // 2 for side, part in zip(canvas, image.shape, strict=False))
            assert (whole[top : top + image.shape[0], left : left + image.shape[1]] == image).all()
            assert whole.astype(int).sum() == image.astype(int).sum()
        made = Codec(target_of(read_dataset(folders[1]))).convert(np.full((30, 20, 3), 9, np.uint8))
        assert isinstance(made, Converted) and made.size == canvas
        with pytest.raises(AlexprepError, match=f"--pad was {canvas[1]}x{canvas[0]}, now is not given"):
            convert(photos, folders[1], replace(options, target=replace(target, pad=None)), _engine())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pad": 30}, "--pad 30 is not between --size 32 and 8192 pixels"),
        ({"pad": (40, 9000)}, "--pad 9000x40 is not between"),
        ({"pad": 40, "fit": "shorter"}, "--pad 40 needs images that fit into it: give --fit square or longer"),
        ({"pad": 40, "device": "cuda"}, "--pad 40 is for --device cpu"),
        ({"pad": "40"}, "pad '40' is neither the side"),
    ],
)
def test_canvases_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(AlexprepError) as error:
        ShardOptions(Target(size=32, **options))
    assert words in str(error.value)
