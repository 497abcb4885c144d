"""CIFAR, MNIST and small NORB as sources. Every file here is made by the test itself."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import fsspec
import numpy as np
import pytest

from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sample_reader import Samples
from alexprep.shards.sources.base import Source
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.worker_pool import LocalEngine
from tests.source_checks import fails, found, listed, write

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100 = tuple(f"fine{n * 37 % 100}" for n in range(100))
PREFIX = "smallnorb-5x{}x9x18x6x2x96x96-{}-{}.mat"


Truth = list[tuple[str, str, np.ndarray]]  # split, class and pixels of each image


def cifar(folder: Path, count: int = 10, per_file: int = 3) -> Truth:
    """Writes a binary version."""
    rng = np.random.default_rng(count)
    folder.mkdir(parents=True)
    fives = [f"data_batch_{n}.bin" for n in (1, 2, 3, 4, 5)]
    names, names_file = (CIFAR10, "batches.meta.txt") if count == 10 else (CIFAR100, "fine_label_names.txt")
    (folder / names_file).write_text("\n".join(names) + "\n\n")
    truth = []
    for name in [*fives, "test_batch.bin"] if count == 10 else ["train.bin", "test.bin"]:
        with (folder / name).open("wb") as file:
            for _ in range(per_file):
                label, pixels = int(rng.integers(count)), rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                file.write(bytes([label] if count == 10 else [label % 20, label]))
                file.write(pixels.transpose(2, 0, 1).tobytes())
                truth.append(("test" if name.startswith("test") else "train", names[label], pixels))
    return truth


def check(source: Source, truth: Truth, names: Sequence[str]) -> None:
    """The source must have exactly these images, and these class names in the order of the labels."""
    inputs = listed(source)
    found: Truth = []
    for split, class_name, location, *_ in inputs:
        pixels = source.read(location)
        assert isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
        found.append((split, class_name, pixels))
    facts = [
        sorted((split, class_name, pixels.shape, pixels.tobytes()) for split, class_name, pixels in images)
        for images in (found, truth)
    ]
    assert facts[0] == facts[1] and source.classes({i.class_name for i in inputs}) == list(names)


def packed(folder: Path, archive: Path) -> Path:
    """A folder as an archive."""
    with tarfile.open(archive, "w:gz" if archive.name.endswith("gz") else "w") as tar:
        tar.add(folder, folder.name)
    return archive


@pytest.mark.parametrize("count", [10, 100])
def test_cifar_s_binary_version_is_read_unpacked_and_packed(count: int, tmp_path: Path) -> None:
    name = {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}[count]
    names = {10: CIFAR10, 100: CIFAR100}[count]
    folder = tmp_path / "unpacked" / name
    truth = cifar(folder, count, per_file=12)
    for place in (folder, folder.parent):
        source = found(place, "cifar")
        check(source, truth, names)
        assert source.resident_bytes() == 0
    for ending in (".tar.gz", ".tar", ".tgz"):
        archive = packed(folder, tmp_path / f"cifar-{count}-binary{ending}")
        source = found(archive, "cifar")
        check(source, truth, names)
        inflated = len(gzip.decompress(archive.read_bytes())) if ending != ".tar" else 0
        assert source.resident_bytes() == 2 * inflated
    check(found(tmp_path, "cifar"), truth, names)  # a folder with archives
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


def mnist(
    folder: Path, pattern: str, splits: tuple[str, str] = ("train", "t10k"), top: int = 9, size=(28, 28)
) -> Truth:
    """Writes two splits; the pattern has {split} and {kind}, and a "." or "-" before idx."""
    rng = np.random.default_rng(top)
    truth: Truth = []
    for split, count in zip(splits, (23, 11), strict=True):
        images = rng.integers(0, 256, (count, *size), dtype=np.uint8)
        labels = rng.integers(0, top + 1, count, dtype=np.uint8)
        labels[0] = top
        write(folder / pattern.format(split=split, kind="images", d=3), idx(images))
        write(folder / pattern.format(split=split, kind="labels", d=1), idx(labels))
        name = "train" if split == "train" else "test"
        truth += [(name, str(label), image) for label, image in zip(labels, images, strict=True)]
    return truth


def digits(top: int = 9) -> list[str]:
    return [str(n) for n in range(top + 1)]


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
    check(source, truth, digits(top))
    held = [16 + count * size[0] * size[1] for count in (23, 11)] if pattern.endswith("gz") else [0]
    assert source.resident_bytes() == sum(held) + max(held)
    for file in tmp_path.iterdir():
        assert listed(found(file, "mnist")) == listed(source)


def test_of_several_sets_one_is_named(tmp_path: Path) -> None:
    letters = mnist(tmp_path, "emnist-letters-{split}-{kind}-idx{d}-ubyte.gz", ("train", "test"), 26)
    plain = mnist(tmp_path, "{split}-{kind}-idx{d}-ubyte.gz")
    fails(tmp_path, "holds 2 sets: emnist-letters, (no name). Name one of their files as SOURCE, such as")
    check(found(tmp_path / "emnist-letters-test-images-idx3-ubyte.gz", "mnist"), letters, digits(26))
    check(found(tmp_path / "train-images-idx3-ubyte.gz", "mnist"), plain, digits())


@pytest.mark.parametrize("other", [("-idx", ".idx"), ("ubyte", "ubyte.gz")], ids=["with a point", "gzipped"])
def test_an_idx_file_with_a_dash_and_unpacked_goes_before_its_copies(other: tuple[str, str], tmp_path: Path) -> None:
    truth = mnist(tmp_path, "{split}-{kind}-idx{d}-ubyte")
    for file in list(tmp_path.iterdir()):
        (tmp_path / file.name.replace(*other)).write_bytes(b"junk")
    check(found(tmp_path, "mnist"), truth, digits())


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
        check(source, truth, digits())
    folder = tmp_path / "cifar-10-batches-bin"
    pixels = cifar(folder)
    for ending in (".tar.gz", ".tar"):
        archive = packed(folder, tmp_path / f"cifar-10-binary{ending}")
        memory.pipe_file(f"/cifar/{archive.name}", archive.read_bytes())
        check(find_source(f"memory://cifar/{archive.name}"), pixels, CIFAR10)


def test_a_file_that_shrinks_after_listing_is_told(tmp_path: Path) -> None:
    mnist(tmp_path, "{split}-{kind}-idx{d}-ubyte")
    source = found(tmp_path, "mnist")
    inputs = listed(source)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((1, 28, 28))))
    with pytest.raises(OSError, match="has changed: it ends within train-images-idx3-ubyte/"):
        for item in inputs:
            source.read(item.location)


def matrix(array: np.ndarray) -> bytes:
    """An array in NORB's binary format."""
    shape = [*array.shape, *[1] * (3 - array.ndim)]
    magic = 0x1E3D4C55 if array.dtype == np.uint8 else 0x1E3D4C54
    return struct.pack(f"<{2 + len(shape)}I", magic, array.ndim, *shape) + array.tobytes()


TOYS = ["animal", "human", "airplane", "truck", "car"]


def norb(folder: Path, ending: str = "") -> Truth:
    """Writes a small small NORB."""
    rng = np.random.default_rng(3)
    truth: Truth = []
    for split, word, toys in (("train", "training", "46789"), ("test", "testing", "01235")):
        pairs = rng.integers(0, 256, (13, 2, 96, 96), dtype=np.uint8)
        labels = rng.integers(0, 5, 13).astype("<i4")
        for kind, array in (("dat", pairs), ("cat", labels), ("info", np.zeros((13, 4), "<i4"))):
            write(folder / (PREFIX.format(toys, word, kind) + ending), matrix(array))
        truth += [(split, TOYS[label], image) for label, pair in zip(labels, pairs, strict=True) for image in pair]
    return truth


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_small_norb_gives_both_images_of_a_pair(ending: str, tmp_path: Path) -> None:
    truth = norb(tmp_path, ending)
    source = found(tmp_path, "norb")
    check(source, truth, TOYS)
    inputs = listed(source)
    sides = [source.read(i.location).tobytes() for i in inputs if i.location.member in (b"[00].left", b"[00].right")]  # type: ignore[union-attr]
    assert sides == [image.tobytes() for n in (26, 0) for _, _, image in truth[n : n + 2]]  # test before train
    assert source.resident_bytes() == (3 * (24 + 13 * 2 * 96 * 96) if ending else 0)
    some = tmp_path / (PREFIX.format("46789", "training", "dat") + ending)
    assert listed(found(some, "norb")) == inputs


def test_stereo_norb_gives_a_pair_as_one_picture(tmp_path: Path) -> None:
    truth = norb(tmp_path)
    assert find_source(str(tmp_path)).layout == "norb"  # only where it is named
    pairs = zip(truth[::2], truth[1::2], strict=True)
    whole = [
        (split, name, np.stack([left, right, np.zeros_like(left)], axis=2))
        for (split, name, left), (_, _, right) in pairs
    ]
    check(find_source(str(tmp_path), "norb-stereo"), whole, TOYS)


def test_damaged_norb_is_refused(tmp_path: Path) -> None:
    norb(tmp_path)
    dat, cat = (tmp_path / PREFIX.format("01235", "testing", kind) for kind in ("dat", "cat"))
    good_dat, good_cat = dat.read_bytes(), cat.read_bytes()
    for damaged, words in (
        (b"", "begins with the bytes (none), a matrix of its kind with 55 4c 3d 1e"),
        (good_cat, "begins with the bytes 54 4c 3d 1e"),
        (good_dat[:-1], "with the 13 records of 18,432 bytes that it states it would have 239,640"),
        (good_dat[:4] + struct.pack("<I", 2**31) + good_dat[8:], "states 2,147,483,648 dimensions"),
        (good_dat[:22], "states 4 dimensions"),
        (matrix(np.zeros((13, 1, 96, 96), np.uint8)), "states the dimensions (13, 1, 96, 96), not (pairs, 2, height,"),
        (matrix(np.zeros((12, 2, 96, 96), np.uint8)), "holds 12 records"),
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
    ("make", "side", "classes"),
    [
        (lambda root: cifar(root / "cifar-10-batches-bin"), 32, list(CIFAR10)),
        (lambda root: mnist(root, "{split}-{kind}-idx{d}-ubyte.gz"), 28, digits()),
        (norb, 96, TOYS),
    ],
    ids=["cifar", "mnist", "norb"],
)
def test_a_build_keeps_every_pixel_and_the_numbering(
    make: Callable[[Path], Truth], side: int, classes: list[str], tmp_path: Path
) -> None:
    root, out = tmp_path / "source", tmp_path / "out"
    root.mkdir()
    truth = make(root)
    options = ShardOptions(Target(size=side, format="raw"), labels="auto")
    report = convert(find_source(str(root)), out, options, LocalEngine(1))
    assert report.written == len(truth) and not report.rejected
    assert read_dataset(out)["classes"] == classes
    for split in ("train", "test"):
        expected = [
            (classes.index(name), (image if image.ndim == 3 else np.repeat(image[..., None], 3, 2)).tobytes())
            for where, name, image in truth
            if where == split
        ]
        made = Samples(out, split)
        actual = [
            (int(label), np.load(io.BytesIO(made.encoded(row).tobytes())).tobytes())
            for row, label in enumerate(made.labels)
        ]
        assert sorted(actual) == sorted(expected)
