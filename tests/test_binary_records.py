"""CIFAR, MNIST and small NORB as sources. Every file here is made by the test itself."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.reader import Samples
from alexprep.shards.sources.base import Source
from alexprep.shards.sources.detection import find_source
from alexprep.shards.worker_pool import LocalEngine
from tests.source_checks import fails, found, listed, write

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100 = tuple(f"fine{n * 37 % 100}" for n in range(100))
PREFIX = "smallnorb-5x{}x9x18x6x2x96x96-{}-{}.mat"


def cifar(folder: Path, count: int = 10, per_file: int = 3) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Writes a binary version; returns {file: (labels, pixels (N, 32, 32, 3))}."""
    rng = np.random.default_rng(count)
    folder.mkdir(parents=True)
    fives = [f"data_batch_{n}.bin" for n in (1, 2, 3, 4, 5)]
    result = {}
    for name in [*fives, "test_batch.bin"] if count == 10 else ["train.bin", "test.bin"]:
        labels = rng.integers(0, count, per_file, dtype=np.uint8)
        pixels = rng.integers(0, 256, (per_file, 32, 32, 3), dtype=np.uint8)
        with (folder / name).open("wb") as file:
            for label, image in zip(labels, pixels, strict=True):
                file.write(bytes([label]) if count == 10 else bytes([label % 20, label]))
                for channel in range(3):
                    file.write(image[:, :, channel].tobytes())
        result[name] = (labels, pixels)
    names, file_name = (CIFAR10, "batches.meta.txt") if count == 10 else (CIFAR100, "fine_label_names.txt")
    (folder / file_name).write_text("\n".join(names) + "\n\n")
    return result


def packed(folder: Path, archive: Path) -> Path:
    """A folder as an archive."""
    with tarfile.open(archive, "w:gz" if archive.name.endswith("gz") else "w") as tar:
        tar.add(folder, folder.name)
    return archive


def check_cifar(source: Source, truth: dict[str, tuple[np.ndarray, np.ndarray]], names: tuple[str, ...]) -> None:
    inputs = listed(source)
    assert source.classes({"x"}) == list(names)
    assert len(inputs) == sum(len(labels) for labels, _ in truth.values())
    for split, class_name, location in inputs:
        whole = str(location).split("/")[-1]
        name, _, record = whole.rstrip("]").partition("[")
        name = name or str(location).split("/")[-2]
        labels, pixels = truth[name]
        assert split == ("test" if name.startswith("test") else "train")
        assert class_name == names[labels[int(record)]]
        image = source.read(location)
        assert isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.flags.c_contiguous
        assert np.array_equal(image, pixels[int(record)])


@pytest.mark.parametrize("count", [10, 100])
def test_cifar_s_binary_version_is_read_unpacked_and_packed(count: int, tmp_path: Path) -> None:
    name = {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}[count]
    names = {10: CIFAR10, 100: CIFAR100}[count]
    folder = tmp_path / "unpacked" / name
    truth = cifar(folder, count, per_file=12)
    for place in (folder, folder.parent):
        source = found(place, "cifar")
        check_cifar(source, truth, names)
        assert source.resident_bytes() == 0
    for ending in (".tar.gz", ".tar", ".tgz"):
        archive = packed(folder, tmp_path / f"cifar-{count}-binary{ending}")
        source = found(archive, "cifar")
        check_cifar(source, truth, names)
        inflated = len(gzip.decompress(archive.read_bytes())) if ending != ".tar" else 0
        assert source.resident_bytes() == 2 * inflated
    check_cifar(found(tmp_path, "cifar"), truth, names)  # a folder with archives
    assert str(listed(found(archive, "cifar"))[0].location).startswith(f"{archive.name}/{name}/test")


def test_damaged_cifar_is_refused_with_the_record(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    cifar(folder)
    batch = folder / "data_batch_4.bin"
    good = batch.read_bytes()
    batch.write_bytes(good[:-1])
    fails(folder, "data_batch_4.bin has 9,218 bytes, no multiple of the 3,073 of a record: it ends within record 2")
    batch.write_bytes(b"")
    fails(tmp_path, "data_batch_4.bin has 0 bytes")
    batch.write_bytes(good[:3073] + b"\x0a" + good[3074:])
    fails(folder, "data_batch_4.bin, record 1: the label 10 is above 9; download it again")
    fails(packed(folder, tmp_path / "cifar-10-binary.tar.gz"), "/data_batch_4.bin, record 1: the label 10 is above 9")
    batch.unlink()
    fails(folder, "data_batch_4.bin cannot be read ([Errno 2] No such file")
    fails(packed(folder, tmp_path / "cifar-10-binary.tar"), "cifar-10-binary.tar has no data_batch_4.bin")
    batch.write_bytes(good)
    names = folder / "batches.meta.txt"
    names.write_text("\n".join((*CIFAR10[:9], "ship")))
    fails(folder, "batches.meta.txt has 9 class names in 10 lines, not 10")
    names.write_bytes(b"\xff\n" + "\n".join(CIFAR10[1:]).encode())
    fails(folder, "batches.meta.txt has 10 class names in 10 lines")
    hundred = tmp_path / "cifar-100-binary"
    cifar(hundred, 100)
    fails(tmp_path, "holds both CIFAR-10 and CIFAR-100: name ")
    data = bytearray((hundred / "train.bin").read_bytes())
    data[3074] = 20
    (hundred / "train.bin").write_bytes(data)
    fails(hundred, "train.bin, record 1: the label 20 is above 19")


def test_a_damaged_archive_of_cifar_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    cifar(folder)
    archive = packed(folder, tmp_path / "cifar-10-binary.tar.gz")
    good = archive.read_bytes()
    archive.write_bytes(good[: len(good) // 2])
    fails(archive, "cut short")
    archive.write_bytes(good[:1000] + bytes(100) + good[1100:])
    fails(archive, "damaged gzip file")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
        tar.add(folder / "test_batch.bin", "other/test_batch.bin")
    fails(archive, "holds test_batch.bin twice")
    archive.write_bytes(b"")
    fails(archive, str(archive))


@pytest.mark.parametrize(
    "name", ["cifar-10-python.tar.gz", "cifar-100-matlab.tar.gz", "cifar-10-batches-py", "cifar-100-python"]
)
def test_the_pickled_cifar_is_refused(name: str, tmp_path: Path) -> None:
    ten = "cifar-10-" in name
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(b"")
    else:
        (tmp_path / name).mkdir()
        for file in ("data_batch_1", "batches.meta") if ten else ("train", "test", "meta"):
            (tmp_path / name / file).write_bytes(b"")
    for place in (tmp_path / name, tmp_path):
        fails(place, "unpickling runs")
        fails(place, f"download cifar-{10 if ten else 100}-binary.tar.gz")


def idx(array: np.ndarray) -> bytes:
    """An array of bytes in the idx format."""
    return (
        bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


MnistTruth = dict[str, tuple[np.ndarray, np.ndarray]]


def mnist(
    folder: Path, pattern: str, splits: tuple[str, str] = ("train", "t10k"), top: int = 9, size=(28, 28)
) -> MnistTruth:
    """Writes two splits; the pattern has {split} and {kind}, and a "." or "-" before idx."""
    rng = np.random.default_rng(top)
    truth = {}
    for split, count in zip(splits, (23, 11), strict=True):
        images = rng.integers(0, 256, (count, *size), dtype=np.uint8)
        labels = rng.integers(0, top + 1, count, dtype=np.uint8)
        labels[0] = top
        write(folder / pattern.format(split=split, kind="images", d=3), idx(images))
        write(folder / pattern.format(split=split, kind="labels", d=1), idx(labels))
        truth["train" if split == "train" else "test"] = (images, labels)
    return truth


def check_mnist(source: Source, truth: MnistTruth) -> None:
    inputs = listed(source)
    assert len(inputs) == sum(len(labels) for _, labels in truth.values())
    for split, class_name, location in inputs:
        images, labels = truth[split]
        record = int(location.member.strip(b"[]"))
        assert class_name == str(labels[record])
        image = source.read(location)
        assert isinstance(image, np.ndarray) and np.array_equal(image, images[record]) and image.dtype == np.uint8
    top = max(int(labels.max()) for _, labels in truth.values())
    assert source.classes({i.class_name for i in inputs}) == [str(n) for n in range(top + 1)]


@pytest.mark.parametrize(
    ("pattern", "splits", "top", "size"),
    [
        ("{split}-{kind}-idx{d}-ubyte", ("train", "t10k"), 9, (28, 28)),
        ("{split}-{kind}-idx{d}-ubyte.gz", ("train", "t10k"), 9, (28, 28)),
        ("{split}-{kind}.idx{d}-ubyte", ("train", "t10k"), 9, (5, 7)),
        ("{split}-{kind}.idx{d}-ubyte.gz", ("train", "t10k"), 0, (1, 1)),
        ("emnist-letters-{split}-{kind}-idx{d}-ubyte.gz", ("train", "test"), 26, (28, 28)),
    ],
)
def test_idx_files_are_read_under_all_their_names(
    pattern: str, splits: tuple[str, str], top: int, size: tuple[int, int], tmp_path: Path
) -> None:
    truth = mnist(tmp_path, pattern, splits, top, size)
    source = found(tmp_path, "mnist")
    check_mnist(source, truth)
    held = [16 + images.size for images, _ in truth.values()] if pattern.endswith("gz") else [0]
    assert source.resident_bytes() == sum(held) + max(held)
    for file in tmp_path.iterdir():
        check_mnist(found(file, "mnist"), truth)


def test_of_several_sets_one_is_named(tmp_path: Path) -> None:
    letters = mnist(tmp_path, "emnist-letters-{split}-{kind}-idx{d}-ubyte.gz", ("train", "test"), 26)
    plain = mnist(tmp_path, "{split}-{kind}-idx{d}-ubyte.gz")
    fails(tmp_path, "holds 2 sets: emnist-letters, (no name). Name one of their files as SOURCE, such as")
    check_mnist(found(tmp_path / "emnist-letters-test-images-idx3-ubyte.gz", "mnist"), letters)
    check_mnist(found(tmp_path / "train-images-idx3-ubyte.gz", "mnist"), plain)


@pytest.mark.parametrize("other", [("-idx", ".idx"), ("ubyte", "ubyte.gz")], ids=["with a point", "gzipped"])
def test_an_idx_file_with_a_dash_and_unpacked_goes_before_its_copies(other: tuple[str, str], tmp_path: Path) -> None:
    truth = mnist(tmp_path, "{split}-{kind}-idx{d}-ubyte")
    for file in list(tmp_path.iterdir()):
        (tmp_path / file.name.replace(*other)).write_bytes(b"junk")
    check_mnist(found(tmp_path, "mnist"), truth)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_damaged_idx_files_are_refused(ending: str, tmp_path: Path) -> None:
    mnist(tmp_path, "{split}-{kind}-idx{d}-ubyte" + ending)
    images, labels = (tmp_path / f"train-{name}-ubyte{ending}" for name in ("images-idx3", "labels-idx1"))
    good_images, good_labels = images.read_bytes(), labels.read_bytes()
    plain = gzip.decompress(good_images) if ending else good_images
    area = 28 * 28
    for damaged, words in (
        (b"", "begins with the bytes (none)"),
        (plain[:15], "begins with the bytes 00 00 08 03"),
        (
            b"\0\0\x0d\x03" + plain[4:],
            "begins with the bytes 00 00 0d 03, an idx file of uint8 in 3 dimensions with 00 00 08 03",
        ),
        (plain[:-1], f"has {len(plain) - 1:,} bytes; with the 23 records of 784 bytes that it states it would have"),
        (plain + b"\0", f"has {len(plain) + 1:,} bytes"),
        (plain[:4] + struct.pack(">I", 2**32 - 1) + plain[8:], "with the 4,294,967,295 records"),
        (plain[:8] + bytes(8), "states images of 0 pixels"),
        (plain[:4] + struct.pack(">I", 22) + plain[8:-area], "holds 22 records"),
    ):
        write(images, damaged)
        fails(tmp_path, words)
    images.write_bytes(good_images)
    write(labels, idx(np.zeros((23, 1), np.uint8)))
    fails(tmp_path, "begins with the bytes 00 00 08 02, an idx file of uint8 in 1 dimension with 00 00 08 01")
    if ending:
        labels.write_bytes(good_labels[:-9])
        fails(tmp_path, "cut short")
    labels.unlink()
    fails(tmp_path, f"has train-images-idx3-ubyte{ending} and no train-labels-idx1-ubyte{ending}: put it beside it")
    labels.write_bytes(good_labels)
    (tmp_path / f"test-images-idx3-ubyte{ending}").write_bytes(b"")
    fails(tmp_path, "holds files named test and t10k, which both mean 'test'")


def test_records_behind_a_url_are_read_as_from_a_disk(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    truth = mnist(tmp_path, "{split}-{kind}-idx{d}-ubyte.gz")
    for number, ending in enumerate((".gz", "")):
        for file in tmp_path.iterdir():
            data = file.read_bytes()
            memory.pipe_file(
                f"/idx{number}/{file.name.removesuffix('.gz')}{ending}", data if ending else gzip.decompress(data)
            )
        source = find_source(f"memory://idx{number}")
        assert source.files.remote
        check_mnist(source, truth)
    folder = tmp_path / "cifar-10-batches-bin"
    pixels = cifar(folder)
    for archive in (
        packed(folder, tmp_path / "cifar-10-binary.tar.gz"),
        packed(folder, tmp_path / "cifar-10-binary.tar"),
    ):
        memory.pipe_file(f"/cifar/{archive.name}", archive.read_bytes())
        check_cifar(find_source(f"memory://cifar/{archive.name}"), pixels, CIFAR10)


def test_a_file_that_shrinks_after_listing_is_told(tmp_path: Path) -> None:
    mnist(tmp_path, "{split}-{kind}-idx{d}-ubyte")
    source = found(tmp_path, "mnist")
    inputs = listed(source)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((1, 28, 28))))
    with pytest.raises(OSError, match="has changed: it ends within train-images-idx3-ubyte/"):
        for item in inputs:
            source.read(item.location)


def test_the_real_mnist(sample_data: Path) -> None:
    source = found(sample_data / "mnist", "mnist")
    inputs = list(source.inputs())
    truth = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        images = gzip.decompress((sample_data / "mnist" / f"{stem}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((sample_data / "mnist" / f"{stem}-labels-idx1-ubyte.gz").read_bytes())
        truth[split] = (images[16:], labels[8:])
    assert [sum(i.split == split for i in inputs) for split in ("train", "test")] == [60_000, 10_000]
    for split, class_name, location in inputs:
        assert truth[split][1][int(location.member.strip(b"[]"))] == int(class_name)
    for split, _, location in inputs[::97]:
        n = int(location.member.strip(b"[]"))
        image = source.read(location)
        assert isinstance(image, np.ndarray) and image.tobytes() == truth[split][0][n * 784 : n * 784 + 784]
    assert source.classes({i.class_name for i in inputs}) == list("0123456789")


def matrix(array: np.ndarray) -> bytes:
    """An array in NORB's binary format."""
    shape = [*array.shape, *[1] * (3 - array.ndim)]
    magic = 0x1E3D4C55 if array.dtype == np.uint8 else 0x1E3D4C54
    return struct.pack(f"<{2 + len(shape)}I", magic, array.ndim, *shape) + array.tobytes()


def norb(folder: Path, ending: str = "") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Writes a small small NORB; returns {split: (images (N, 2, 96, 96), labels)}."""
    rng = np.random.default_rng(3)
    truth = {}
    for split, word, toys in (("train", "training", "46789"), ("test", "testing", "01235")):
        images = rng.integers(0, 256, (13, 2, 96, 96), dtype=np.uint8)
        labels = rng.integers(0, 5, 13).astype("<i4")
        for kind, array in (("dat", images), ("cat", labels), ("info", np.zeros((13, 4), "<i4"))):
            write(folder / (PREFIX.format(toys, word, kind) + ending), matrix(array))
        truth[split] = (images, labels)
    return truth


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_small_norb_gives_both_images_of_a_pair(ending: str, tmp_path: Path) -> None:
    truth = norb(tmp_path, ending)
    names = ["animal", "human", "airplane", "truck", "car"]
    source = found(tmp_path, "norb")
    inputs = listed(source)
    assert len(inputs) == 2 * 2 * 13
    for split, class_name, location in inputs:
        record, side = location.member.decode().lstrip("[").split("].")
        images, labels = truth[split]
        assert class_name == names[labels[int(record)]]
        image = source.read(location)
        assert isinstance(image, np.ndarray) and np.array_equal(
            image, images[int(record), ["left", "right"].index(side)]
        )
    assert source.classes(set()) == names
    assert source.resident_bytes() == (3 * (24 + 13 * 2 * 96 * 96) if ending else 0)
    some = tmp_path / (PREFIX.format("46789", "training", "dat") + ending)
    assert listed(found(some, "norb")) == inputs


def test_damaged_norb_is_refused(tmp_path: Path) -> None:
    truth = norb(tmp_path)
    dat, cat = (tmp_path / PREFIX.format("01235", "testing", kind) for kind in ("dat", "cat"))
    good_dat, good_cat = dat.read_bytes(), cat.read_bytes()
    for damaged, words in (
        (b"", "begins with the bytes (none), a matrix of its kind with 55 4c 3d 1e"),
        (good_cat, "begins with the bytes 54 4c 3d 1e"),
        (good_dat[:-1], "with the 13 records of 18,432 bytes that it states it would have 239,640"),
        (good_dat[:4] + struct.pack("<I", 2**31) + good_dat[8:], "states 2,147,483,648 dimensions"),
        (good_dat[:22], "states 4 dimensions"),
        (matrix(truth["test"][0][:, :1]), "states the dimensions (13, 1, 96, 96), not (pairs, 2, height, width)"),
        (matrix(truth["test"][0][:12]), "holds 12 records"),
    ):
        dat.write_bytes(damaged)
        fails(tmp_path, words)
    dat.write_bytes(good_dat)
    for damaged, words in (
        (good_cat + b"\0", "has 73 bytes; with the 13 records of 4 bytes that it states it would have 72"),
        (good_cat[:-4] + struct.pack("<i", 5), "record 12: the label 5 is not between 0 and 4"),
        (good_cat[:20] + struct.pack("<i", -1) + good_cat[24:], "record 0: the label -1 is not between 0 and 4"),
        (good_dat, "a matrix of its kind with 54 4c 3d 1e"),
    ):
        cat.write_bytes(damaged)
        fails(tmp_path, words)
    cat.unlink()
    fails(tmp_path, "and no smallnorb-5x01235x9x18x6x2x96x96-testing-cat.mat: put it beside it")


@pytest.mark.parametrize(
    ("make", "side", "samples", "classes"),
    [
        (lambda root: cifar(root / "cifar-10-batches-bin"), 32, {"test": 3, "train": 15}, list(CIFAR10)),
        (lambda root: mnist(root, "{split}-{kind}-idx{d}-ubyte.gz"), 28, {"test": 11, "train": 23}, list("0123456789")),
        (norb, 96, {"test": 26, "train": 26}, ["animal", "human", "airplane", "truck", "car"]),
    ],
    ids=["cifar", "mnist", "norb"],
)
def test_a_build_keeps_every_pixel_and_the_numbering(
    make: Callable[[Path], object], side: int, samples: dict[str, int], classes: list[str], tmp_path: Path
) -> None:
    root, out = tmp_path / "source", tmp_path / "out"
    root.mkdir()
    make(root)
    source = find_source(str(root))
    report = convert(source, out, ShardOptions(Target(size=side, format="raw"), labels="auto"), LocalEngine(1))
    assert report.samples == samples and not report.rejected
    assert read_dataset(out)["classes"] == classes
    for split in samples:
        expected = []
        for item in source.inputs():
            pixels = source.read(item.location)
            assert isinstance(pixels, np.ndarray)
            rgb = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, 2)
            if item.split == split:
                expected.append((classes.index(item.class_name), rgb.tobytes()))
        made = Samples(out, split)
        actual = [
            (int(label), np.load(io.BytesIO(made.encoded(row).tobytes())).tobytes())
            for row, label in enumerate(made.labels)
        ]
        assert sorted(actual) == sorted(expected)
