"""What no layout reads is told by its content, with the next step: each kind by a file of its own writer, or by its specification."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import shutil
import sqlite3
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.foreign_formats import _masked_crc32c
from alexprep.shards.sources.labels import LABEL_COLUMNS
from alexprep.shards.sources.layout_detection import find_source
from tests.source_checks import fails, found, listed

PICTURE = b"\xff\xd8\xff\xe0" + bytes(60)
IMAGES = {"image": [{"bytes": PICTURE, "path": "a.jpg"}], "label": [3]}


def written(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def a_tar(*names: str) -> bytes:
    def write(file: io.BytesIO) -> None:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(PICTURE)
                tar.addfile(info, io.BytesIO(PICTURE))

    return written(write)


def a_zip(name: str) -> bytes:
    def write(file: io.BytesIO) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, PICTURE)

    return written(write)


def an_arrow(new: Callable[..., pa.RecordBatchWriter]) -> bytes:
    def write(file: io.BytesIO) -> None:
        table = pa.table(IMAGES)
        with new(file, table.schema) as writer:
            writer.write_table(table)

    return written(write)


def an_sqlite(folder: Path) -> bytes:
    with sqlite3.connect(folder / "x") as connection:
        connection.execute("create table images (label)")
    connection.close()
    return (folder / "x").read_bytes()


def a_tfrecord(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", _masked_crc32c(length)), data, struct.pack("<I", _masked_crc32c(data))))


LMDB_META = bytes(16) + struct.pack("<II", 0xBEEFC0DE, 1) + bytes(4072)  # a page's header, then mdb.c's MDB_MAGIC
EXPORT = "write its pictures into class folders (CLASS/NAME.jpg) or a webdataset's tars, and name these"
KINDS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "zipped": (lambda _: a_zip("cat/1.jpg"), "a ZIP archive: give it a name that ends in .zip, and name it"),
    "a.npz": (lambda _: written(lambda file: np.savez(file, x=np.zeros(3))), "an archive of numpy arrays (.npz)"),
    "a.npy": (lambda _: written(lambda file: np.save(file, np.zeros(3))), "an array of numpy, which is not read"),
    "a.pt": (lambda _: written(lambda file: torch.save({"x": 1}, file)), "a file of torch.save, which is not read"),
    "a.xlsx": (lambda _: a_zip("[Content_Types].xml"), "a spreadsheet or document: save the sheet as .csv"),
    "a.bin.gz": (lambda _: gzip.compress(b"x"), "a file compressed with gzip: decompress it (gunzip)"),
    "b.bin.bz2": (lambda _: bz2.compress(b"x"), "a file compressed with bzip2: decompress it (bunzip2)"),
    "b.bin.zst": (lambda _: b"\x28\xb5\x2f\xfd\x20\x01", "a file compressed with zstd: decompress it (unzstd)"),
    "tgz": (lambda _: gzip.compress(a_tar("a/1.jpg")), "a tar archive compressed with gzip, which cannot be read at random"),
    "tbz": (lambda _: bz2.compress(a_tar("a/1.jpg")), "a tar archive compressed with bzip2, which cannot be read at"),
    "txz": (lambda _: lzma.compress(a_tar("a/1.jpg")), "a tar archive compressed with xz, which cannot be read at random"),
    "a.tzst": (lambda _: b"\x28\xb5\x2f\xfd\x20\x01", "a tar archive compressed with zstd, which cannot be read at random"),
    "train_images": (
        lambda _: gzip.compress(a_tar("n01440764_18_n01440764.JPEG")),
        "with pictures named by their WordNet ID: give it a name that ends in .tar.gz, and name it",
    ),
    "no_ending": (lambda _: a_tar("a/1.jpg"), "a tar: give it a name that ends in .tar"),
    "a.7z": (lambda _: b"7z\xbc\xaf\x27\x1c\0\4" + bytes(24), "a 7z archive: unpack it"),
    "a.rar": (lambda _: b"Rar!\x1a\x07\x01\0" + bytes(24), "a RAR archive: unpack it"),
    "images": (lambda _: written(lambda f: pq.write_table(pa.table(IMAGES), f)), "a Parquet table with its images inside, in the"),
    "rows": (lambda _: written(lambda f: pq.write_table(pa.table({"x": [1]}), f)), "a Parquet table: name it itself as SOURCE"),
    "a_stream": (lambda _: an_arrow(pa.ipc.new_stream), "an Arrow table: if it has a column of pictures, give it a name that ends in .arrow"),
    "a_file": (lambda _: an_arrow(pa.ipc.new_file), "an Arrow table: if it has a column of pictures, give it a name that ends in .arrow"),
    "a.feather": (lambda _: written(lambda f: pyarrow.feather.write_feather(pa.table(IMAGES), f)), "an Arrow table"),
    "recordio": (lambda _: struct.pack("<II", 0xCED7230A, 8) + bytes(8), "a RecordIO file (MXNet): give it a name that ends in .rec"),
    "database": (lambda _: LMDB_META, "an LMDB database: give it a name that ends in .mdb, and name it"),
    "a.beton": (lambda _: struct.pack("<HHIQQ", 2, 2, 2**23, 9, 99), "an FFCV file, which is not read: name the images"),
    "shard.00000.mds": (lambda _: struct.pack("<III", 1, 12, 40) + bytes(28), "a shard of MosaicML's MDS, which is not read"),
    "a.h5": (lambda _: b"\x89HDF\r\n\x1a\n" + bytes(40), f"an HDF5 file, which is not read: {EXPORT}"),
    "b.mat": (lambda _: b"MATLAB 7.3".ljust(512) + b"\x89HDF\r\n\x1a\n", "an HDF5 file (Matlab 7.3), which is not read"),
    "a.mat": (lambda _: b"MATLAB 5.0 MAT-file, made by".ljust(128), "a Matlab file, which is not read"),
    "data_batch_1": (lambda _: pickle.dumps({"data": 1}), "a pickle, which runs whatever code it holds when it is read"),
    "a.db": (an_sqlite, "an SQLite database, which is not read"),
    "lfs": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "a pointer of Git LFS, not the file"),
    "a.html": (lambda _: b"\n<!DOCTYPE html><title>404 Not Found", "a web page, perhaps what a server said in place of"),
    "a.jpg": (lambda _: PICTURE, "one picture: name the folder that holds the class folders"),
    "coco.json": (lambda _: b'{"images": []}', "JSON, which is not read: write a .csv with the columns path and label"),
    "lines.json": (lambda _: b'{"file_name": "a.jpg", "label": 1}\n', "a list in lines of JSON: give it a name that ends in .jsonl"),
    "list.md": (lambda _: b"im/0.jpg 3\nim/a b.jpg 12\n", "a list of lines `path label`: give it a name that ends in .txt"),
    "win.md": (lambda _: b"im\\0.jpg 3\r\nim\\1.jpg 12\r\n", "name it, with / in place of each Windows back-slash"),
    "lst.md": (lambda _: b"0\t3.000\tim/0.jpg\n1\t4\tim/1.jpg\n", "as MXNet's im2rec reads it: give it a name that ends in .lst"),
    "meta.txt": (lambda _: b"apple_pie/1005649\napple_pie/1014775\n", "a list of paths without labels"),
    "table.txt": (lambda _: b"path,label\na.jpg,1\n", "a text in columns: give it a name that ends in .csv"),
    "tabs.txt": (lambda _: b"the path\tlabel\na.jpg\t1\n", "a text in columns: give it a name that ends in .tsv"),
}  # fmt: skip
NOT_IN_FOLDERS = (
    ".txt",
    ".jpg",
    ".html",
    ".json",
    ".jsonl",
    ".md",
    ".xlsx",
)  # pictures, and papers that may lie beside them


@pytest.mark.parametrize("name", KINDS)
def test_a_file_is_told_by_its_content(name: str, tmp_path: Path) -> None:
    make, words = KINDS[name]
    content = make(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AlexprepError) as error:
        find_source(str(tmp_path / name))
    assert str(error.value).startswith(f"SOURCE {tmp_path / name} is ") and words in str(error.value), error.value
    assert "\n" not in str(error.value)
    (tmp_path / name).write_bytes(content[: len(content) // 2])  # a cut one is told, or nothing is
    with pytest.raises(AlexprepError):
        find_source(str(tmp_path / name))


@pytest.mark.parametrize("name", [name for name in KINDS if not name.endswith(NOT_IN_FOLDERS)])
def test_a_folder_of_them_is_told_too(name: str, tmp_path: Path) -> None:
    (tmp_path / "set/data").mkdir(parents=True)
    make, words = KINDS[name]
    content = make(tmp_path)
    (tmp_path / "set/README.md").write_text("# A data set\n")
    for n in range(3):
        (tmp_path / f"set/data/{n}-{name}").write_bytes(content)
    with pytest.raises(AlexprepError) as error:
        find_source(str(tmp_path / "set"))
    start = f"SOURCE {tmp_path}/set holds 3 files that are no pictures; {tmp_path}/set/data/0-{name} is "
    assert str(error.value).startswith(start) and words in str(error.value), error.value


@pytest.mark.parametrize("ending", ["csv", "tar", "parquet", "arrow", "zip", "jsonl", "tar.gz"])
def test_what_stands_in_a_file_s_place_is_no_damaged_file(ending: str, tmp_path: Path) -> None:
    """A pointer of Git LFS and a server's page under the right name, alone and in a folder."""
    stand_ins = {
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n": "is a pointer of Git LFS, not the file itself: fetch it",
        b"<html><body>403 Forbidden</body></html>": "is a web page, perhaps what a server said in place of the file",
    }
    for n, (content, words) in enumerate(stand_ins.items()):
        (tmp_path / f"{n}/data").mkdir(parents=True)
        (tmp_path / f"{n}/data/train-00000.{ending}").write_bytes(content)
        fails(tmp_path / f"{n}/data/train-00000.{ending}", words)
        if ending not in ("csv", "jsonl"):  # which are lists, and lie in folders beside what they list
            fails(tmp_path / f"{n}", words)


def test_crcs_are_those_of_the_specification(tmp_path: Path) -> None:
    """RFC 3720's check value of CRC-32C, masked by hand."""
    crc = 0xE3069283
    (tmp_path / "records").write_bytes(a_tfrecord(b"an example"))
    fails(tmp_path, "is a TFRecord file: name it, or the folder that holds it and its like")
    fails(tmp_path / "records", "is a TFRecord file without a tf.train.Example")
    assert _masked_crc32c(b"123456789") == (((crc >> 15) | (crc << 17 & 0xFFFFFFFF)) + 0xA282EAD8) % 2**32


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("dataset_dict.json", "train/data-00000-of-00001.arrow"), "names no splits: save the dataset again"),
        (("state.json", "dataset_info.json", "data-00000-of-00001.arrow"), "lists no files of data: save the dataset again"),
        (("data.mdb", "lock.mdb"), "its data.mdb is none, or damaged from its first bytes on"),
        (("index.json", "shard.00000.mds"), "is a dataset in MosaicML's MDS, which is not read"),
        (("0.jpg", "1.jpg", "labels.csv"), "labels.csv: if that list has the path and the label of each picture, name it"),
        (("0.jpg", "1.jpg", "metadata.jsonl"), "metadata.jsonl, line 1: no column for the path"),
        (("train/0.jpg", "validation/0.jpg", "train/metadata.csv", "validation/metadata.csv"), "/train/metadata.csv, line 1: no column"),
        (("0.jpg", "1.jpg"), "holds pictures and no class folders, and nothing tells the classes"),
        (("index.html",), "holds nothing but 1 web page, "),
        (("train/a/notes.txt",), "holds no class folders and no other layout that is known"),
    ],
)  # fmt: skip
def test_folders_of_other_programs_are_told(names: tuple[str, ...], words: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(PICTURE if name.endswith(".jpg") else b"{}")
    fails(tmp_path, words)


def test_a_broken_file_or_pipe_is_no_trouble(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.bin")
    (tmp_path / "empty.bin").touch()
    for name in ("pipe.bin", "empty.bin"):
        fails(tmp_path / name, "is a file of no known layout: name a folder, a tar, or a list")
    (tmp_path / "latin-1.lst").write_bytes(b"0\t3\tim/\xe9.jpg\n")
    fails(tmp_path / "latin-1.lst", "is no text in UTF-8: if it is a list")
    (tmp_path / "set/a").mkdir(parents=True)
    os.mkfifo(tmp_path / "set/a/pipe.zip")
    (tmp_path / "set/a/gone.zip").symlink_to("nowhere")
    fails(tmp_path / "set", "holds no class folders")


def test_tables_say_what_was_seen(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for n in range(2):
        shutil.copy(photos / "train/class0/000.JPEG", tmp_path / f"train/x{n}.jpg")
    cases = {
        b"id,breed\nx0,pug\n": "line 1: no column for the label among 'id', 'breed': name it label, class, wnid",
        b"name,breed\nx1.jpg,pug\n": "line 1: the column 'name' has the names of pictures, as 'x1.jpg', which is train/x1.jpg: say so, and "
        "which column has their labels, with --columns path=name,label=NAME",
        b"where,breed\ntrain/x1.jpg,pug\n": "line 1: the column 'where' has the names of pictures, as 'train/x1.jpg'",
        b"key,breed\ny0,pug\n": "no column for the path among 'key', 'breed': name it path, file,",
        b"key,breed\n": "no column for the path among 'key', 'breed'",
        b"path,breed\nx0,pug\n": f"no column for the label among 'path', 'breed': name it {', '.join(LABEL_COLUMNS[:3])}",
        b"path|label\nx0|pug\n": "the separator is a bar, where a comma (.csv) was expected: put a comma (.csv) in its place",
        b"path,label\ntrain/x0.jpg,0\ntrain\\x1.jpg,0\n": "line 3: the path 'train\\\\x1.jpg' has the back-slashes of Windows, and "
        "'train/x1.jpg' is there: write paths with / in place of each \\",
        b"path,label\nC:\\data\\x1.jpg,0\n": "line 2: the path 'C:\\\\data\\\\x1.jpg' has the back-slashes of Windows: write paths with",
    }
    for content, words in cases.items():
        (tmp_path / "list.csv").write_bytes(content)
        fails(tmp_path / "list.csv", words)
    (tmp_path / "odd\\name.jpg").write_bytes(PICTURE)
    (tmp_path / "list.csv").write_bytes(b"path,label\nodd\\name.jpg,0\nno\\where.jpg,0\n")
    assert len(listed(found(tmp_path / "list.csv", "table"))) == 2  # a back-slash in a name is a back-slash
    (tmp_path / "list.tsv").write_bytes(b"path,label\na.jpg,1\n")
    fails(
        tmp_path / "list.tsv",
        "the separator is a comma (.csv), where a tab (.tsv) was expected: give the file the ending",
    )


def test_the_list_of_an_image_folder_is_a_table(tmp_path: Path) -> None:
    for folder, split in (("train", "train"), ("validation", "val"), ("pictures", "train")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "metadata.csv").write_text("file_name,label\n0.jpg,cat\n1.jpg,dog\n")
        inputs = listed(found(tmp_path / folder / "metadata.csv", "table"))
        assert [(i.split, i.class_name, i.location.path) for i in inputs] == [
            (split, "cat", b"0.jpg"),
            (split, "dog", b"1.jpg"),
        ]
