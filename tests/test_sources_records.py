"""Sources that are not trees of image files: CIFAR, MNIST, small NORB and tables. Every file here is made by the test itself."""

from __future__ import annotations

import csv
import gzip
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.reader import Samples
from alexprep.shards.sources.base import Input, Source
from alexprep.shards.sources.detection import find_source
from alexprep.shards.worker_pool import LocalEngine

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100 = tuple(f"fine{n * 37 % 100}" for n in range(100))
PREFIX = "smallnorb-5x{}x9x18x6x2x96x96-{}-{}.mat"


def found(place: Path, layout: str) -> Source:
    """The source that is found by looking, which must have this layout."""
    source = find_source(str(place))
    assert source.layout == layout
    return source


def listed(source: Source) -> list[Input]:
    """The inputs, which must come in the order of their bytes, each once, and twice alike."""
    inputs = list(source.inputs())
    assert inputs == list(source.inputs()) == sorted(inputs)
    assert len({i.location for i in inputs}) == len(inputs)
    return inputs


def fails(place: Path, words: str, layout: str | None = None) -> None:
    """Finding or listing must raise an error with these words and the place."""
    with pytest.raises(AlexprepError) as error:
        list(find_source(str(place), layout).inputs())
    assert words in str(error.value), error.value
    assert str(place if place.is_dir() else place.parent) in str(error.value)


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
    fails(folder, "has no data_batch_4.bin")
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


def write(path: Path, data: bytes) -> Path:
    """Writes a file, gzipped if its name says so."""
    path.write_bytes(gzip.compress(data, 1) if path.name.endswith(".gz") else data)
    return path


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
    fails(tmp_path, "holds 2 sets: emnist-letters, (no name). Name one of the image files as SOURCE, such as")
    check_mnist(found(tmp_path / "emnist-letters-test-images-idx3-ubyte.gz", "mnist"), letters)
    check_mnist(found(tmp_path / "train-images-idx3-ubyte.gz", "mnist"), plain)


def test_of_two_names_for_one_idx_file_the_one_with_a_dash_counts(tmp_path: Path) -> None:
    truth = mnist(tmp_path, "{split}-{kind}-idx{d}-ubyte")
    for file in list(tmp_path.iterdir()):
        (tmp_path / file.name.replace("-idx", ".idx")).write_bytes(b"junk")
    check_mnist(found(tmp_path, "mnist"), truth)


def test_an_unpacked_idx_file_goes_before_its_gzipped_copy(tmp_path: Path) -> None:
    truth = mnist(tmp_path, "{split}-{kind}-idx{d}-ubyte")
    for file in list(tmp_path.iterdir()):
        (tmp_path / f"{file.name}.gz").write_bytes(b"junk")
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
    fails(tmp_path, f"has no train-labels-idx1-ubyte{ending}, which holds the labels of the train images")
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


Columns = dict[str, list]


def as_csv(path: Path, columns: Columns) -> Path:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if ".tsv" in path.name else ",")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return write(path, text.getvalue().encode())


def as_parquet(path: Path, columns: Columns) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


@pytest.mark.parametrize("name", ["list.csv", "list.TSV", "list.csv.gz", "list.tsv.gz", "list.parquet"])
def test_a_table_gives_path_label_and_split(name: str, tmp_path: Path) -> None:
    paths = [f"images/{n:03d}, ä.bin" for n in range(40)]
    (tmp_path / "images").mkdir()
    for path in paths:
        (tmp_path / path).write_bytes(path.encode())
    paths[7] = str(tmp_path / paths[7])
    words = ["train", "Training", "val", "validation", " test "]
    columns: Columns = {
        "width": [1] * 40,
        "Filename": paths,
        "CLASS": [f"class {n % 3}" for n in range(40)],
        "split": [words[n % 5] for n in range(40)],
    }
    table = (as_parquet if name.endswith("parquet") else as_csv)(tmp_path / name, columns)
    if name == "list.TSV":
        table.write_text(
            "\n".join("\t".join(map(str, row)) for row in zip(*[[k, *v] for k, v in columns.items()], strict=True))
        )
    source = found(table, "table")
    inputs = listed(source)
    want = {"train": "train", "Training": "train", "val": "val", "validation": "val", " test ": "test"}
    truth = {path: (f"class {n % 3}", want[words[n % 5]]) for n, path in enumerate(paths)}
    assert {i.location.path.decode(): (i.class_name, i.split) for i in inputs} == truth
    for item in inputs:
        assert source.read(item.location) == b"images/" + item.location.path.rpartition(b"/")[2]
    assert source.classes({i.class_name for i in inputs}) == ["class 0", "class 1", "class 2"]


def test_whole_numbers_are_the_labels_themselves(tmp_path: Path) -> None:
    numbers = [10, 2, 0, 12]
    columns: Columns = {"path": ["a.png", "b.png", "c.png", "d.png"], "label": numbers}
    for table in (as_csv(tmp_path / "val.csv", columns), as_parquet(tmp_path / "my-val.parquet", columns)):
        source = found(table, "table")
        inputs = listed(source)
        assert {i.class_name: i.location.path for i in inputs} == {
            str(n): path.encode() for n, path in zip(numbers, columns["path"], strict=True)
        }
        assert {i.split for i in inputs} == {"val"}
        assert source.classes({i.class_name for i in inputs}) == [str(n) for n in range(13)]
    mixed = as_csv(tmp_path / "list.csv", {"path": ["a", "b", "c"], "label": ["1", "01", "A"]})
    source = found(mixed, "table")
    assert source.classes({i.class_name for i in listed(source)}) == ["01", "1", "A"]
    encoded = tmp_path / "list.parquet"
    pq.write_table(pa.table({"path": ["a", "b"], "y": pa.array(["t", "s"]).dictionary_encode()}), encoded)
    assert [i.class_name for i in listed(found(encoded, "table"))] == ["s", "t"]


def test_a_text_of_two_columns_needs_no_header(tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_bytes(b'\xef\xbb\xbfa.png, great white shark\r\n\r\n"b,c.png","tench, Tinca tinca"\r\nd.png,label\r\n')
    inputs = listed(found(table, "table"))
    assert [(i.location.path, i.class_name) for i in inputs] == [
        (b"a.png", "great white shark"),
        (b"d.png", "label"),
        (b"b,c.png", "tench, Tinca tinca"),
    ]
    assert {i.split for i in inputs} == {"train"}
    table.write_text("name,kind\na.png,dog\n")
    fails(table, "line 1: no column for the path among 'name', 'kind': name it path, file, filename, image")
    table.write_text("img.path,label\na.png,dog\n")
    fails(table, "line 1: no column for the path among 'img.path', 'label'")
    table.write_text("a.png,dog,3\n")
    fails(table, "no column for the path")


def test_urls_are_read_where_they_point(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/a.bin", b"far")
    (tmp_path / "b.bin").write_bytes(b"near")
    table = as_csv(tmp_path / "list.csv", {"url": ["memory://bucket/a.bin", "b.bin"], "label": ["x", "y"]})
    source = found(table, "table")
    assert source.files.remote
    assert [source.read(i.location) for i in listed(source)] == [b"far", b"near"]
    memory.pipe_file("/bucket/list.csv", b"path,label\na.bin,0\nmemory://bucket/a.bin,1\n")
    source = find_source("memory://bucket/list.csv")
    assert [source.read(i.location) for i in listed(source)] == [b"far", b"far"]
    memory.pipe_file("/bucket/list.csv", b"path,label\na.bin,0\n/etc/hostname,1\n")
    with pytest.raises(
        AlexprepError, match=r"line 3: the path '/etc/hostname' is absolute, but the table lies at a URL"
    ):
        list(find_source("memory://bucket/list.csv").inputs())


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("", "the label is missing"),
        ("  ", "the label is missing"),
        ("nan", "the label is missing"),
        ("dog|cat", "the cell 'dog|cat' gives one image several labels"),
        ("dog; cat", "several labels"),
        ("1,2", "several labels"),
        ("1 2", "several labels"),
        ("[1]", "several labels"),
        ("['dog', 'cat']", "several labels"),
        ("good, dog", "several labels"),
        ("-1", "the label -1 is below 0: number the classes from 0"),
        ("3.0", "the label 3.0 is no whole number: write it without a point"),
        ("do\tg", "holds a control character"),
        ("x" * 1001, "has 1,001 characters"),
    ],
)
def test_labels_that_make_no_sense_are_refused_with_the_line(label: str, words: str, tmp_path: Path) -> None:
    columns: Columns = {"path": ["a.png", "b.png", "c.png"], "label": ["dog", "good", label]}
    for table, place in (
        (as_csv(tmp_path / "l.csv", columns), "line 4: "),
        (as_parquet(tmp_path / "l.parquet", columns), "row 3: "),
    ):
        fails(table, words)
        fails(table, place)


def test_labels_are_bounded(tmp_path: Path) -> None:
    table = as_csv(tmp_path / "list.csv", {"path": ["a.png", "b.png"], "label": [10**6, 3]})
    assert len(found(table, "table").classes({i.class_name for i in listed(found(table, "table"))})) == 10**6 + 1
    as_csv(table, {"path": ["a.png", "b.png"], "label": [3, 10**6 + 1]})
    fails(table, "line 3: the label 1000001 is above 1,000,000")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty: it needs a row for each image"),
        (b"path,label\na.png,1\n,2\n", "line 3: the path is missing"),
        (b"path,label\na.png,1\nb.png\n", "line 3: 1 cells, where the first line has 2"),
        (b"path,label\na.png,1\nb,png,1\n", "line 3: 3 cells"),
        (b"path,label\na.png,1\n\n\xe4.png,2\n", "line 4: byte 0xe4 is not UTF-8: save the table as UTF-8"),
        ("path,label\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        (b'path,label\n"a.png,1\nb.png,2\n', "line 3: unexpected end of data"),
        (b'path,label\n"a"b.png,1\n', "line 2: ',' expected after '\"'"),
        (b'path,label\n"' + b"a\n" * 80_000, "field larger than field limit"),
        (b"path,label\n" + b"a" * 2**21, "line 2: more than 1,048,576 bytes"),
        (b"path,label\na\0b.png,1\n", "line 2: "),
        (b"path,label\na,1\nb,2\na,1\n", "lines 2 and 4 both name 'a', with the same label: delete one"),
        (b"path,label\na,1\nb,2\na,3\n", "lines 2 and 4 both name 'a', with the labels '1' and '3'"),
        (b"path,label,set\na,1,train\na,1,val\n", "with the same label and in two splits"),
        (b"path,label,fold\na,1,0\n", "line 2: the split '0' is not one of train, training, val"),
        (b"path,label,fold\na,1,\n", "line 2: the split '' is not one of"),
        (b"path,label,label\na,1,2\n", "two columns are named 'label'"),
        (b"label,name\n1,a\n", "no column for the path among 'label', 'name'"),
        (b"path;label\na;1\n", "no column for the path among 'path;label'"),
    ],
)
def test_texts_that_make_no_sense_are_refused_with_the_line(content: bytes, words: str, tmp_path: Path) -> None:
    for name in ("list.csv", "list.csv.gz"):
        fails(write(tmp_path / name, content), words)


def test_a_cut_table_is_refused(tmp_path: Path) -> None:
    columns: Columns = {"path": [f"{n * 7919 % 10_007}.png" for n in range(5000)], "label": [1] * 5000}
    table = as_csv(tmp_path / "list.csv.gz", columns)
    whole = table.read_bytes()
    table.write_bytes(whole + gzip.compress(b"last.png,2\n"))  # as `cat a.gz b.gz` makes them
    assert len(listed(found(table, "table"))) == 5001
    table.write_bytes(whole[: len(whole) // 2])
    fails(table, "cannot be read after line ")
    parquet = as_parquet(tmp_path / "list.parquet", columns)
    good = parquet.read_bytes()
    parquet.write_bytes(good[:-100])
    fails(parquet, "is no Parquet file or damaged")
    parquet.write_bytes(good[:50] + bytes(2000) + good[2050:])
    fails(parquet, "cannot be read after row ")


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([["x"], ["y"]]), "the column 'label' gives one image several labels (list<"),
        (pa.array([1.0, 2.0]), "the column 'label' has the type double, but a label is a string or a whole number"),
        (pa.array([None, "x"]), "row 1: the label is missing"),
        (pa.array([-3, 2]), "row 1: the label -3 is below 0"),
        (pa.array([b"\xff", b"a"]).view(pa.string()), "row 1: b'\\xff' is not UTF-8"),
    ],
)
def test_columns_that_make_no_sense_are_refused(column: pa.Array, words: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a", "b"], "label": column}), tmp_path / "list.parquet")
    fails(tmp_path / "list.parquet", words)


def test_images_inside_a_table_are_refused(tmp_path: Path) -> None:
    table = as_parquet(tmp_path / "list.parquet", {"image": [{"bytes": b"x", "path": "a"}], "label": [1]})
    fails(table, "but a path is a string; images inside a table are not read")


def test_a_table_s_order_is_that_of_bytes_in_any_order_of_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows = [
        (f"{name}/{n}.png", name, split)
        for n in range(30)
        for name in ("z", "é", "Z", "10", "9")
        for split in ("test", "val")
    ]
    rows = [(f"{split}/{path}", name, split) for path, name, split in rows]
    results = []
    for n in range(3):
        order = rng.permutation(len(rows))
        columns: Columns = {key: [rows[i][k] for i in order] for k, key in enumerate(("path", "label", "split"))}
        inputs = listed(found(as_csv(tmp_path / f"{n}.csv", columns), "table"))
        results.append([(i.split, i.class_name.encode(), i.location.path) for i in inputs])
    assert results[0] == results[1] == results[2] == sorted((s, c.encode(), p.encode()) for p, c, s in rows)


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
