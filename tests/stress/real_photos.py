"""Real photos, sound and malformed, where ALEXPREP_SAMPLE_DATA names the folder that holds them: `pytest tests/stress/real_photos.py`."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.image_codec import Codec, Converted, Target
from alexprep.shards.image_header import Header
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sample_reader import Samples
from tests.source_checks import found
from tests.test_binary_records import Truth, check, digits
from tests.test_webdataset_index import header_of


@pytest.mark.parametrize("orient", [False, True])
def test_real_exif_orientations(orient: bool, sample_data: Path, tmp_path: Path) -> None:
    """Two photos, each stored in all eight orientations: --orient makes all alike, without it none is turned."""
    files = sorted((sample_data / "exif-orientation").glob("*.jpg"))
    codec = Codec(Target(size=64, orient=orient, format="raw"))
    pixels = {}
    for path in files:
        result = codec.convert(path.read_bytes())
        assert isinstance(result, Converted)
        pixels[path.stem] = np.load(io.BytesIO(result.data)).astype(float)
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image) if orient else image
            expected = codec.convert(np.asarray(upright.convert("RGB")))
        assert isinstance(expected, Converted)
        assert np.abs(pixels[path.stem] - np.load(io.BytesIO(expected.data))).mean() < 1, path.stem
    for photo in ("Landscape", "Portrait"):
        far = max(np.abs(pixels[f"{photo}_1"] - pixels[f"{photo}_{n}"]).mean() for n in range(2, 9))
        assert far < 12 if orient else far > 20


def test_real_malformed_jpegs(sample_data: Path, tmp_path: Path) -> None:
    """2,136 of them among real photos: every file in the ledger once, the photos as if they had been alone."""
    source = tmp_path / "source" / "malformed"
    source.mkdir(parents=True)
    with tarfile.open(sample_data / "malformed-jpegs.tar") as tar:
        for n, member in enumerate(member for member in tar if member.isfile()):
            content = tar.extractfile(member)
            assert content is not None
            (source / f"{n:05d}.jpg").write_bytes(content.read())
    for class_folder in (sample_data / "imagenet-sample/train").iterdir():
        (tmp_path / "source" / class_folder.name).symlink_to(class_folder)
    report = convert(tmp_path / "source", tmp_path / "out", ShardOptions(), 2, max_rejects="100%")
    ledger = pq.read_table(tmp_path / "out/train/samples.parquet").to_pylist()
    assert report.inputs == len(ledger) == len({row["source"] for row in ledger}) == 2136 + 298
    convert(sample_data / "imagenet-sample", tmp_path / "alone", ShardOptions(), 2)
    alone = pq.read_table(tmp_path / "alone/train/samples.parquet").to_pylist()
    images: dict[str, bytes] = {}
    for folder, rows in (("alone", alone), ("out", ledger)):
        samples = Samples(tmp_path / folder, "train")
        for n, row in enumerate(row for row in rows if row["status"] == "written"):
            name = row["source"].rpartition("/")[2]
            if not row["source"].startswith("malformed"):
                assert images.setdefault(name, samples.encoded(n).tobytes()) == samples.encoded(n).tobytes()
    assert len(images) == 298


def test_real_photos_have_imagenet_s_axes(sample_data: Path, tmp_path: Path) -> None:
    report = convert(sample_data / "imagenet-sample", tmp_path / "out", ShardOptions(), 2)
    assert report.inputs == 298 == report.written + report.rejected.total()
    found = rgb_statistics.pca_stats(tmp_path / "out", "train", 2)
    assert (found.angles_to_imagenet() < 5).all()


def test_headers_of_real_photos_and_of_malformed_ones(sample_data: Path) -> None:
    """Of every photo, and of every malformed file that the decoder makes pixels of, the header is read as it reads it."""
    codec, decoded = Codec(Target()), 0
    for path in sorted(sample_data.glob("imagenet-sample/train/*/*.JPEG")):
        with Image.open(path) as image:
            found = header_of(path.read_bytes())
            assert isinstance(found, Header) and found[:2] == (image.height, image.width)
    with tarfile.open(sample_data / "malformed-jpegs.tar") as tar:
        for content in (tar.extractfile(member) for member in tar if member.isfile() and member.size < 20_000):
            assert content is not None
            found, pixels = header_of(data := content.read()), codec.decode(data)
            decoded += pixels is not None
            assert pixels is None or (isinstance(found, Header) and found[:2] == pixels.shape[:2])
    assert decoded > 50


def test_the_real_mnist(sample_data: Path) -> None:
    truth: Truth = []
    for split, stem in (("train", "train"), ("test", "t10k")):
        images, labels = (
            gzip.decompress((sample_data / "mnist" / f"{stem}-{name}-ubyte.gz").read_bytes())
            for name in ("images-idx3", "labels-idx1")
        )
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
        truth += [(split, str(label), image) for label, image in zip(labels[8:], pixels, strict=True)]
    assert len(truth) == 70_000
    check(found(sample_data / "mnist", "mnist"), truth, digits())


def test_real_cifar_from_its_tar(sample_data: Path, tmp_path: Path) -> None:
    report = convert(sample_data / "cifar10-jpeg.tar", tmp_path / "out", ShardOptions(Target(size=32), limit=2000), 2)
    assert report.samples == {"train": 2000, "test": 2000}
    classes = read_dataset(tmp_path / "out")["classes"]
    assert classes == ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
