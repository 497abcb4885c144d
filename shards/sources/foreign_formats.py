"""Tells by its content what a file is that no layout reads, and what to do with it: the words of messages, no reading of images.

`foreign` is for a SOURCE that no layout takes, `what_it_is` for one file. Nothing is opened by a library but the footer of a Parquet
file; nothing is unpickled, and of what is compressed the first bytes at most are decompressed. The first bytes that are looked for are
those of each format's own specification.
"""

from __future__ import annotations

import bz2
import contextlib
import io
import itertools
import lzma
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alexprep.shards.errors import AlexprepError, counted
from alexprep.shards.sources.base import ARCHIVE
from alexprep.shards.sources.picture_names import is_picture
from alexprep.shards.sources.tree import Folder, read_tree, rule_of
from alexprep.shards.storage import Files, LocalFiles, as_text, open_regular
from alexprep.shards.tar_format import BLOCK, COMPRESSED, read_header_block

# What the hubs' image folders call the list that lies beside the pictures.
IMAGE_FOLDER_LISTS = (b"metadata.csv", b"metadata.jsonl", b"metadata.parquet")

# Names, in lower case, of a column of pictures that no schema calls so; the first counts that there is.
IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")

_HEAD, _COMPRESSED_HEAD = 4096, 2**20  # bytes; bzip2 gives nothing before the end of its first block, of 900 kB at most
_FILES_LOOKED_AT = 20  # of a folder
_STAND_INS_LOOKED_FOR = 3  # where one file of a folder was not fetched, seldom any was
_LINES = 20  # of a text
_EXPORT = "write its pictures into class folders (CLASS/NAME.jpg) or a webdataset's tars, and name these"
_UNPACK = "unpack it, and name the folder that it gives"
_DECOMPRESS = "decompress it ({}), and name what it gives"
_LMDB_AT, _LMDB = 16, b"\xde\xc0\xef\xbe"  # behind a page's header: mdb.c's MDB_MAGIC
_LFS = b"version https://git-lfs.github.com/"
_LFS_POINTER = "a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`"
_WEB_PAGE = "a web page, perhaps what a server said in place of the file: download it again"
_is_web_page = re.compile(r"\s*<(!doctype html|html)", re.IGNORECASE).match
_CONTAINERS = (
    # offset, first bytes, what it is
    (0, b"7z\xbc\xaf\x27\x1c", f"a 7z archive: {_UNPACK}"),
    (0, b"Rar!\x1a\x07", f"a RAR archive: {_UNPACK}"),
    (0, b"ARROW1", "an Arrow table: if it has a column of pictures, give it a name that ends in .arrow, and name it"),
    (0, b"FEA1", f"a Feather table, whose images are not read: {_EXPORT}"),
    (0, b"\x0a\x23\xd7\xce", "a RecordIO file (MXNet): give it a name that ends in .rec, and name it"),
    (
        _LMDB_AT,
        _LMDB,
        "an LMDB database: give it a name that ends in .mdb, and name it, or the folder that holds it as data.mdb",
    ),
    (0, b"\x89HDF\r\n\x1a\n", f"an HDF5 file, which is not read: {_EXPORT} (h5py reads it)"),
    (512, b"\x89HDF\r\n\x1a\n", f"an HDF5 file (Matlab 7.3), which is not read: {_EXPORT} (h5py reads it)"),
    (0, b"MATLAB 5.0 MAT-file", f"a Matlab file, which is not read: {_EXPORT} (scipy.io reads it)"),
    (0, b"\x93NUMPY", f"an array of numpy, which is not read: {_EXPORT} (numpy.load reads it)"),
    (0, b"SQLite format 3\0", f"an SQLite database, which is not read: {_EXPORT}"),
    (0, _LFS, _LFS_POINTER),
    *(
        (0, first, "one picture: name the folder that holds the class folders, or a list of path and label")
        for first in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")
    ),
)
_BY_ENDING = {
    b".beton": "an FFCV file, which is not read: name the images that it was made from",
    b".mds": f"a shard of MosaicML's MDS, which is not read: {_EXPORT} (the library streaming reads it)",
    b".tfrecord": "a TFRecord file that is damaged from its first bytes on, or none: get it again",
}
_PICKLE = f"a pickle, which runs whatever code it holds when it is read, and is not read here: {_EXPORT}"
_named_by_wordnet = re.compile(rb"_n[0-9]{8}\.JPEG$").search


def foreign(files: Files, name: bytes) -> str:
    """The message for a SOURCE that no layout takes: the file `name`, or the folder `files` (empty); empty where nothing is known of it."""
    if name:
        words = what_it_is(files, name)
        return f"SOURCE {files.display(name)} is {words}" if words else ""
    root, shown = read_tree(files).root, files.display()
    words = _known_folder(root)
    if words:
        return f"SOURCE {shown} is {words}"
    for folder in root.walk():
        if words := image_folder(folder):
            return f"SOURCE {shown}: {files.display(folder.path)} is {words}"
    others = [
        os.path.join(folder.path, name)
        for folder in root.walk()
        for name in (*folder.papers, *folder.pictures)
        if rule_of(name) == ARCHIVE or (rule_of(name) is None and not is_picture(name))
    ]
    for other in others[:_FILES_LOOKED_AT]:
        if words := what_it_is(files, other):
            if len(others) == 1:
                return f"SOURCE {shown} holds {files.display(other)}, which is {words}"
            return f"SOURCE {shown} holds {len(others):,} files that are no pictures; {files.display(other)} is {words}"
    every = [os.path.join(folder.path, name) for folder in root.walk() for name in (*folder.papers, *folder.pictures)]
    if every and all(path.lower().endswith((b".html", b".htm")) for path in every):
        held = counted(len(every), "web page")
        return f"SOURCE {shown} holds nothing but {held}, {files.display(every[0])}: download the pictures, or the archives of them"
    lists = [name for name in root.papers if name.lower().endswith((b".csv", b".tsv", b".csv.gz", b".tsv.gz"))]
    if lists:
        return (
            f"SOURCE {shown} holds no class folders, but {as_text(lists[0])}: if that list has the path and the label of each picture, "
            "name it as SOURCE"
        )
    return ""


def stand_in(files: Files, name: bytes) -> str:
    """The message for a SOURCE, a file `name` or a folder of packed files, of which one only stands where the file should be; else empty.

    Such a file has the right name, so that its reader would call it damaged.
    """
    paths = [name] if name else list(itertools.islice(_packed(read_tree(files).root), _STAND_INS_LOOKED_FOR))
    for path in paths:
        head = _first_bytes(files, path, _HEAD)
        words = _LFS_POINTER if head.startswith(_LFS) else _WEB_PAGE if _is_web_page(_decoded(head)) else ""
        if words:
            return f"SOURCE {files.display(path)} is {words}" if name else f"{files.display(path)} is {words}"
    return ""


def _packed(root: Folder) -> Iterator[bytes]:
    """The archives and tables of a tree."""
    for folder in root.walk():
        yield from (os.path.join(folder.path, name) for name in folder.papers if rule_of(name) == ARCHIVE)


def what_it_is(files: Files, path: bytes) -> str:
    """What a file is by its first bytes, and what to do with it, as the end of "FILE is …"; empty where nothing is known of it."""
    head = _first_bytes(files, path, _HEAD)
    if not head:
        return ""
    lower = path.lower()
    for offset, first, words in _CONTAINERS:
        if head[offset : offset + len(first)] == first:
            return words
    for known in (_archive, _table_of_images, _records):
        if words := known(files, path, head):
            return words
    for ending, words in _BY_ENDING.items():
        if lower.endswith(ending):
            return words
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _PICKLE
    return _text(lower, head)


def image_folder(folder: Folder) -> str:
    """What a folder with pictures and the list of a hub's image folder is, as the end of "FOLDER is …"; empty for any other."""
    found = next((name for name in IMAGE_FOLDER_LISTS if name in folder.papers), None)
    if found is None or not any(map(is_picture, folder.pictures)):
        return ""
    return (
        f"an image folder with a list, {as_text(found)}, that has no column for the label: say which it is with --columns label=NAME, or name "
        "another list"
    )


def images_inside(schema: Any) -> str:
    """What a Parquet table with images in a column is, given its Arrow schema, as the end of "FILE is …"; empty for any other."""
    for column in schema:
        kind = column.type
        inner = [kind.field(n).type for n in range(kind.num_fields)] if pa.types.is_struct(kind) else []
        whole = _is_bytes(kind) and column.name.lower() in IMAGE_COLUMNS
        if whole or any(map(_is_bytes, inner)):
            return (
                f"a Parquet table with its images inside, in the column {column.name!r} ({kind}), and no column that is surely their "
                f"label: name both, with --columns image={column.name},label=NAME"
            )
    return ""


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


# What is compressed or packed


def _archive(files: Files, path: bytes, head: bytes) -> str:
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip(files, path, head)
    if _is_tar(head):
        step = "" if path.lower().endswith(b".tar") else "give it a name that ends in .tar, and "
        return f"a tar: {step}name it, or the folder that holds it and its like, if it holds CLASS/IMAGE or is a webdataset"
    for first, (method, program) in COMPRESSED.items():
        if head.startswith(first):
            return _compressed(_first_bytes(files, path, _COMPRESSED_HEAD), path, method, program)
    return ""


def _zip(files: Files, path: bytes, head: bytes) -> str:
    """By the name of its first member, which its first header has."""
    (length,) = struct.unpack_from("<H", head, 26) if len(head) >= 30 else (0,)
    first = head[30 : 30 + length]
    if first.endswith(b".npy"):
        return f"an archive of numpy arrays (.npz), which is not read: {_EXPORT} (numpy.load reads it)"
    if first.endswith((b"/data.pkl", b"/.format_version", b"/byteorder")):
        return f"a file of torch.save, which is not read: {_EXPORT} (torch.load reads it)"
    if first == b"[Content_Types].xml" or path.lower().endswith(b".xlsx"):
        return "a spreadsheet or document: save the sheet as .csv with the columns path and label, and name that"
    step = "" if path.lower().endswith(b".zip") else "give it a name that ends in .zip, and "
    return f"a ZIP archive: {step}name it, or the folder that holds it and its like, if it holds CLASS/IMAGE"


def _inflated(data: bytes) -> bytes:
    return zlib.decompressobj(31).decompress(data, _HEAD)


_DECOMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": _inflated,
    "bzip2": lambda data: bz2.BZ2Decompressor().decompress(data, _HEAD),
    "xz": lambda data: lzma.LZMADecompressor().decompress(data, _HEAD),
}


def _compressed(data: bytes, path: bytes, method: str, program: str) -> str:
    inside, decompress = b"", _DECOMPRESSED.get(method)
    with contextlib.suppress(OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
        inside = decompress(data) if decompress else b""
    is_tar = _is_tar(inside) or re.search(rb"\.(tar\.[a-z0-9]+|tgz|tbz2?|txz|tzst)$", path.lower())
    if not is_tar:
        return f"a file compressed with {method}: {_DECOMPRESS.format(program)}"
    what = f"a tar archive compressed with {method}, which cannot be read at random"
    header = read_header_block(inside[:BLOCK]) if len(inside) >= BLOCK else None
    if header and method == "gzip" and _named_by_wordnet(header.name.rstrip(b"\0")):  # ImageNet as one hub packs it
        return f"{what}, with pictures named by their WordNet ID: give it a name that ends in .tar.gz, and name it"
    return f"{what}: {_DECOMPRESS.format(program)}"


def _is_tar(head: bytes) -> bool:
    return len(head) >= BLOCK and head[257:262] == b"ustar" and read_header_block(head[:BLOCK]) is not None


# Tables and records


def _table_of_images(files: Files, path: bytes, head: bytes) -> str:
    if head.startswith(b"PAR1"):
        with (
            contextlib.suppress(OSError, AlexprepError, pa.ArrowException),
            (
                open_regular(os.path.join(files.root, path))
                if isinstance(files, LocalFiles)
                else io.BytesIO(files.read(path))
            ) as file,
        ):
            if words := images_inside(pq.read_schema(file)):
                return words
        return "a Parquet table: name it itself as SOURCE, ending in .parquet, if it has the columns path and label"
    # The stream of record batches that `save_to_disk` writes: a continuation mark, and the size of the schema that follows.
    if head.startswith(b"\xff\xff\xff\xff") and len(head) > 8 and 0 < struct.unpack_from("<i", head, 4)[0] < 2**24:
        return "an Arrow table: if it has a column of pictures, give it a name that ends in .arrow, and name it"
    return ""


def is_lmdb(files: Files, path: bytes) -> bool:
    """Whether a file begins as LMDB's databases do."""
    return _first_bytes(files, path, _LMDB_AT + len(_LMDB))[_LMDB_AT:] == _LMDB


def is_tfrecord(files: Files, path: bytes) -> bool:
    """Whether a file begins as TFRecord files do: a length, and the masked CRC-32C of its eight bytes."""
    return _records(files, path, _first_bytes(files, path, 16)) != ""


def _records(files: Files, path: bytes, head: bytes) -> str:
    if len(head) < 16 or struct.unpack_from("<I", head, 8)[0] != _masked_crc32c(head[:8]):
        return ""
    return "a TFRecord file: name it, or the folder that holds it and its like"


def _masked_crc32c(data: bytes) -> int:
    """As TFRecord files have it: CRC-32C (RFC 3720, reversed polynomial 0x82F63B78), rotated right by 15 bits, plus 0xA282EAD8."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# Texts


def _text(lower: bytes, head: bytes) -> str:
    text = _decoded(head)
    if not text and head and lower.endswith((b".txt", b".lst")):
        return "no text in UTF-8: if it is a list of pictures and labels, save it as UTF-8, or get it again"
    if not text.strip():
        return ""
    lines = [line for line in text.splitlines()[:_LINES] if line.strip()]
    if _is_web_page(text):
        return _WEB_PAGE
    if text.lstrip().startswith(("{", "[")):
        if re.match(r"\{.*\}$", lines[0]) and (len(lines) > 1 or '"file_name"' in lines[0]):
            return "a list in lines of JSON: give it a name that ends in .jsonl, and name it"
        return "JSON, which is not read: write a .csv with the columns path and label, and name that"
    if any("\\" in line for line in lines) and not any("/" in line for line in lines):
        turn = ", with / in place of each Windows back-slash"
    else:
        turn = ""
    if all(re.fullmatch(r"\d+\t[\d.\t]+\t\S.*", line) for line in lines):
        return f"a list of `index label path` as MXNet's im2rec reads it: give it a name that ends in .lst, and name it{turn}"
    if all(re.fullmatch(r"\S.*[./]\S*\s+\S+", line) for line in lines) and not all("," in line for line in lines):
        return f"a list of lines `path label`: give it a name that ends in .txt, and name it{turn}"
    for separator, ending in ((",", ".csv"), ("\t", ".tsv")):
        if all(separator in line for line in lines):
            return f"a text in columns: give it a name that ends in {ending}, and name it, if it has a path and a label in each line{turn}"
    if all(re.fullmatch(r"\S*[./]\S*", line) for line in lines):
        return f"a list of paths without labels: write a .csv with the path and the label in each line{turn}, and name that"
    return ""


def _decoded(head: bytes) -> str:
    """The beginning of a text; empty for bytes that are none."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4 or len(head) < _HEAD:  # more than a letter that is cut
            return ""
        text = head[: error.start].decode("utf-8-sig")
    return "" if re.search(r"[\0-\x08\x0e-\x1f]", text) else text


# Folders


def _known_folder(root: Folder) -> str:
    papers = set(root.papers)
    if b"data.mdb" in papers:
        return "meant for an LMDB database, but its data.mdb is none, or damaged from its first bytes on: get it again"
    if b"index.json" in papers and any(b".mds" in name for name in papers | set(root.pictures)):
        return f"a dataset in MosaicML's MDS, which is not read: {_EXPORT} (the library streaming reads it)"
    return ""


def _first_bytes(files: Files, path: bytes, count: int) -> bytes:
    """The beginning of a file; empty where it cannot be had."""
    with contextlib.suppress(OSError, AlexprepError):
        return files.read(path, 0, count)
    return b""
