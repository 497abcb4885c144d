"""Random trees of folders, as people have them and as nobody should: a pure function of a seed."""

from __future__ import annotations

import io
import os
import random
import tarfile
from pathlib import Path

SPLIT_WORDS = ("train", "Train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing", "TEST")
CONTAINER_WORDS = (
    "images",
    "Images",
    "img",
    "data",
    "dataset",
    "annotations",
    "meta",
    "labels",
    "jpg",
    "masks",
    "photos",
)
_CLASSES = (
    "cat",
    "dog",
    "zebra",
    "airplane",
    "n01440764",
    "n01443537",
    "n02124075",
    "Cat",
    "apple_pie",
    "001.Ape",
    "2",
    "10",
)
_LETTERS = ("abbey", "airfield", "bar", "beach", "castle")
_ODD = (
    b"with space",
    "café".encode(),
    "cafe\u0301".encode(),  # the same in another Unicode form
    b"\xff\xfe",
    b"\\xff",
    b"new\nline",
    b"a=b,c",
    b"--layout",
    b'it\'s "so"',
    "猫".encode(),
    b"$HOME",
    b"~",
    b"*",
    b"{a}",
    b"pred",
    b"seg_train",
    b"seg_test",
    b"train2017",
    b"val2017",
    b"unlabeled",
)
_ENDINGS = (b".jpg", b".JPEG", b".png", b"", b".webp")
_STRAYS = (
    *(b"README.md", b"LICENSE", b"Thumbs.db", b".DS_Store", b"._a.jpg", b"notes.txt", b"labels.csv", b"boxes.xml"),
    *(b"archive.zip", b"part.tar.gz", b"data.parquet", b"loose.jpg", b"stray.png", b"no_ending", b"a.mat"),
    *(b".hidden/a.jpg", b"__MACOSX/._b.jpg", b"@eaDir/c.jpg", b"sub/deeper/d.jpg", b"empty/", b".cache/"),
)

Tree = dict[bytes, bytes]  # content by path; a path that ends in "/" is a folder, which may stay empty


def random_tree(seed: int) -> Tree:
    """A tree of at most some hundred files."""
    rng = random.Random(seed)
    tree: Tree = {}
    top = b"".join(_name(rng, 0.5) + b"/" for _ in range(rng.choice((0, 0, 0, 1, 1, 2))))
    if rng.random() < 0.25:
        _wild(rng, tree, top, 0)
    else:
        _dataset(rng, tree, top)
    folders = sorted({b"", *(path[: path.rfind(b"/") + 1] for path in tree)})
    if rng.random() < 0.1:
        _add(tree, b"preview.jpg")
    for _ in range(rng.choice((0, 0, 1, 2, 4))):
        _add(tree, rng.choice(folders) + rng.choice(_STRAYS))
    return tree


def write_tree(tree: Tree, root: Path) -> Path:
    """Makes the tree below a folder."""
    for path, content in tree.items():
        place = os.path.join(bytes(root), path)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if not path.endswith(b"/"):
            with open(place, "wb") as file:
                file.write(content)
    return root


def pack_tree(tree: Tree, path: Path) -> Path:
    """Makes a tar of the tree, in no order."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in random.Random(len(tree)).sample(sorted(tree), len(tree)):
            info = tarfile.TarInfo(os.fsdecode(name))
            if name.endswith(b"/"):
                info.type = tarfile.DIRTYPE
            info.size = len(tree[name])
            tar.addfile(info, io.BytesIO(tree[name]))
    return path


def _dataset(rng: random.Random, tree: Tree, top: bytes) -> None:
    """Splits or none, and classes in one of the forms that sets have."""
    splits = [b""]
    if rng.random() < 0.7:
        splits = [word.encode() + b"/" for word in rng.sample(SPLIT_WORDS, rng.choice((1, 2, 2, 2, 3)))]
        splits = [split + (split if rng.random() < 0.1 else b"") for split in splits]
        splits += [b""] * (rng.random() < 0.1)  # classes beside the splits
    form = rng.choice((*("plain",) * 6, "inner", "groups", "letters", "mixed", "flat", "parts", "inside"))
    classes = _some_classes(rng)
    for split in splits:
        if form == "flat" or (split and rng.random() < 0.15):
            inner = rng.choice((b"", b"", b"images/"))
            names = _pictures(rng, tree, top + split + inner, rng.randint(1, 6))
            if split and rng.random() < 0.5:
                lines = [os.fsdecode(name) + " " + rng.choice(("0", "1", "cat")) for name in names]
                _add(tree, top + split.split(b"/")[0] + b".txt", "\n".join(lines).encode("utf-8", "replace"))
            continue
        for name in classes if rng.random() < 0.7 else rng.sample(classes, rng.randint(1, len(classes))):
            for _ in range(2 if form in ("parts", "inside", "mixed") else 1):
                folder = top + split + _class_path(rng, form, name) + b"/"
                _add(tree, folder)
                _pictures(rng, tree, folder, rng.choice((0, 1, 2, 3, 30)) if rng.random() < 0.3 else 2)


def _class_path(rng: random.Random, form: str, name: bytes) -> bytes:
    if form == "inner":
        return name + b"/images"
    if form == "groups":
        return rng.choice((b"Aves", b"Plantae", b"data")) + b"/" + name
    if form == "letters":
        return name[:1] + b"/" + name
    if form == "parts":
        return name + rng.choice((b"/images", b"/masks", b"/img"))
    if form == "inside":
        return name + b"/" + rng.choice(SPLIT_WORDS).encode()
    if form == "mixed":
        return name + rng.choice((b"", b"/extra", b"/extra/more"))
    return name


def _some_classes(rng: random.Random) -> list[bytes]:
    kind = rng.random()
    if kind < 0.15:
        return [str(n).encode() for n in range(rng.randint(2, 12))]
    if kind < 0.3:
        return [word.encode() for word in _LETTERS]
    return list({_name(rng, 0.07): None for _ in range(rng.randint(1, 5))})


def _wild(rng: random.Random, tree: Tree, folder: bytes, depth: int) -> None:
    """Folders within folders, with no sense."""
    if rng.random() < 0.6:
        _pictures(rng, tree, folder, rng.randint(1, 4))
    for _ in range(rng.randint(0, 3) if depth < 4 else 0):
        inner = folder + _name(rng, 0.35) + b"/"
        _add(tree, inner)
        _wild(rng, tree, inner, depth + 1)


def _name(rng: random.Random, meaning: float) -> bytes:
    """A folder's name: with the probability `meaning` a split's or a container's."""
    if rng.random() < meaning:
        return rng.choice((*SPLIT_WORDS, *CONTAINER_WORDS)).encode()
    return rng.choice(_ODD) if rng.random() < 0.15 else rng.choice(_CLASSES).encode()


def _pictures(rng: random.Random, tree: Tree, folder: bytes, count: int) -> list[bytes]:
    ending = rng.choice(_ENDINGS)
    names = [b"%d%s" % (rng.randint(0, 10**6), ending) for _ in range(count)]
    for name in names:
        _add(tree, folder + name)
    return names


def _add(tree: Tree, path: bytes, content: bytes | None = None) -> None:
    """Adds a path, unless one of its folders is a file, or it is a folder already."""
    above = [path[:n] for n, byte in enumerate(path) if byte == ord("/") and n < len(path) - 1]
    bare = path.rstrip(b"/")
    if any(folder in tree for folder in above) or bare in tree or any(other.startswith(bare + b"/") for other in tree):
        return
    tree[path] = b"" if path.endswith(b"/") else b"content of " + path if content is None else content
