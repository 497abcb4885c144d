"""Datasets that are cut into files: which of them there are below a folder, of which split each is, and whether any is missing.

Their names are those of the hubs and of TFDS: train-00000-of-00005.parquet, imagenet2012-train.tfrecord-00000-of-01024.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import Account, Source, split_of
from alexprep.shards.sources.tree import pass_over_rest, read_tree
from alexprep.shards.storage import Files

Wanted = Callable[[bytes], object]  # whether a file is of the kind, by its name

_LOOKED_AT = 200  # names in a folder that are looked at for a file of the kind, and folders
of_several = re.compile(rb"(?P<stem>.*?)-?(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.\w+)?").fullmatch


@dataclass(frozen=True)
class SplitFiles(Source):
    """A source of some files, each of which belongs to a split.

    Attributes:
        parts: (split, file), ascending.
    """

    parts: tuple[tuple[str | None, bytes], ...] = ()

    @property
    def paths(self) -> list[bytes]:
        """The files."""
        return [path for _, path in self.parts]

    def covers(self, target: str) -> bool:
        """Whether one of the files lies in the folder `target`, or below it."""
        below = self.files.below(target) if self.whole else None
        return below is not None and any(
            path.startswith(b"".join(name + b"/" for name in below)) for path in self.paths
        )

    def pass_over_others(self, account: Account, lists: Container[bytes] = ()) -> None:
        """Where all of the root is meant, counts what else lies there; see `pass_over_rest`."""
        if self.whole:
            pass_over_rest(self.files, set(self.paths), account, lists=lists)


def files_below(files: Files, wanted: Wanted) -> list[bytes]:
    """The files of a kind below the root, ascending, without hidden ones; the whole tree is read only where a look finds one."""
    if not any(map(wanted, names_near_root(files))):
        return []
    found = []
    for folder in read_tree(files).root.walk():
        found += [os.path.join(folder.path, name) for name in (*folder.papers, *folder.pictures) if wanted(name)]
    return sorted(found)


@functools.lru_cache(maxsize=1)
def names_near_root(files: Files) -> list[bytes]:
    """The first names of files in the root, and in folders at most two names below it, without hidden ones.

    Where there are many folders, they are class folders, and not looked into. The answer is kept for whoever asks next of the same files, so
    `find_source` begins with `names_near_root.cache_clear()`.
    """
    found, level = list[bytes](), [b""]
    for _ in range(3):
        below: list[bytes] = []
        for folder in level:
            names: list[tuple[bytes, bool | None]] = []
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                names = list(itertools.islice(files.listed(folder, links=True), _LOOKED_AT))
            found += [name for name, inner in names if not inner and name[:1] != b"."]
            below += [os.path.join(folder, name) for name, inner in names if inner and name[:1] != b"."]
        if len(below) > _LOOKED_AT:
            break
        level = below
    return found


def split_of_file(path: bytes) -> str | None:
    """The split that a file's name tells, or else the nearest of its folders; None for none."""
    folder, name = os.path.split(path)
    return split_of(os.path.splitext(name)[0]) or next(filter(None, map(split_of, folder.split(b"/")[::-1])), None)


def check_complete(files: Files, paths: Sequence[bytes]) -> None:
    """Sees to it that of train-00000-of-00005 and so on none is missing, or too many; AlexprepError names the first one."""
    sets: dict[tuple[bytes, ...], set[int]] = {}
    for path in paths:
        if numbered := of_several(path):
            number, count = int(numbered["number"]), int(numbered["count"])
            if number >= count:
                raise AlexprepError(f"{files.display(path)}: there is no number {number:05d} of {count:05d}: rename it")
            sets.setdefault((numbered["stem"], numbered["count"], numbered["ending"] or b""), set()).add(number)
    for (stem, total, ending), present in sets.items():
        count = int(total)
        if len(present) < count:
            first = next(number for number in range(count) if number not in present)
            dash = b"" if stem.endswith(b"/") or not stem else b"-"
            missing = b"%s%s%05d-of-%s%s" % (stem, dash, first, total, ending)
            raise AlexprepError(
                f"{files.display(missing)} is missing, with {count - len(present) - 1:,} others of {count:,}: download what is missing, or "
                "name one file as SOURCE"
            )
