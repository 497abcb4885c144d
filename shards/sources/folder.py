"""Class folders: ROOT/{train,val,test}/CLASS/**/FILE, or one tree ROOT/CLASS/**/FILE, which becomes the split "train"."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import Input

# What people call their splits, and what they are called in a data set.
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
MAX_FILE_BYTES = 2**30  # no photo is that large; an endless file is


@dataclass(frozen=True)
class ClassFolders:
    """A tree of class folders. Names that begin with a dot are passed over: they are never images.

    Attributes:
        root: the tree, as bytes, since file names need not be text.
        splits: (split, folder below the root) in ascending order of the split.
    """

    root: bytes
    splits: tuple[tuple[str, bytes], ...]
    layout: str = "class-folders"

    @classmethod
    def at(cls, path: Path) -> ClassFolders:
        """The class folders at `path`.

        Raises:
            AlexprepError: there are none, or two folders stand for one split.
        """
        root = os.fsencode(path.resolve())
        folders = [name for name in _folders(root) if os.fsdecode(name).lower() in SPLIT_FOLDERS]
        if not folders:
            if not _folders(root):
                raise AlexprepError(
                    f"SOURCE {path} holds no class folders: expected {path}/CLASS/IMAGE or {path}/train/CLASS/IMAGE"
                )
            return cls(root, (("train", b"."),))
        named: dict[str, bytes] = {}
        for name in folders:
            split = SPLIT_FOLDERS[os.fsdecode(name).lower()]
            if split in named:
                both = f"{os.fsdecode(named[split])} and {os.fsdecode(name)}"
                raise AlexprepError(f"SOURCE {path} holds {both}, which both mean {split!r}: move one of them away")
            if not _folders(os.path.join(root, name)):
                flat = f"{path}/{os.fsdecode(name)}"
                raise AlexprepError(
                    f"{flat} holds no class folders: sort its images into {flat}/CLASS/IMAGE, or move it away"
                )
            named[split] = name
        return cls(root, tuple(sorted(named.items())))

    def inputs(self) -> Iterator[Input]:
        """Every file below a class folder that is not hidden, of whatever kind; what is no image is rejected later."""
        for split, folder in self.splits:
            for class_folder in _folders(os.path.join(self.root, folder)):
                class_name = class_folder.decode("utf-8", "backslashreplace")
                below = os.path.normpath(os.path.join(folder, class_folder))
                for location in _files(self.root, below):
                    yield Input(split, class_name, location)

    def read(self, location: bytes) -> bytes:
        """The bytes of one file; OSError where it is no regular file, too large, or cannot be read."""
        # Non-blocking, since opening a named pipe would wait for ever.
        descriptor = os.open(os.path.join(self.root, location), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise OSError(f"{status.st_size:,} bytes are more than the limit of {MAX_FILE_BYTES:,}")
            return file.read(MAX_FILE_BYTES)

    def covers(self, path: Path) -> bool:
        """Whether files written below `path` would become inputs: it lies in a split's folder."""
        target = os.fsencode(path.resolve())
        folders = (os.path.realpath(os.path.join(self.root, folder)) for _, folder in self.splits)
        return any(os.path.commonpath((target, folder)) == folder for folder in folders)

    def label_files(self) -> Iterator[Path]:
        """A devkit's meta.mat in the root or next to it, unpacked as downloaded or not."""
        root = Path(os.fsdecode(self.root))
        for folder in (root, root.parent):
            yield from sorted(folder.glob("meta.mat"))
            yield from sorted(folder.glob("ILSVRC20*_devkit_*/data/meta.mat"))


def _folders(path: bytes) -> list[bytes]:
    """The names of the folders in `path`, links to folders too, ascending."""
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(b".") and entry.is_dir())


def _files(root: bytes, below: bytes) -> Iterator[bytes]:
    """The files under root/below at any depth, as paths from the root, ascending; folder links are not followed (loops)."""
    found: list[bytes] = []
    pending = [below]
    while pending:
        folder = pending.pop()
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                path = os.path.join(folder, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(path)
                elif not entry.is_dir():
                    found.append(path)
    yield from sorted(found)
