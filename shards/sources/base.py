"""What a source is, and how one is found for a path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from alexprep.shards.errors import AlexprepError


class Input(NamedTuple):
    """One image to be: the split and class it belongs to, and where its source finds it."""

    split: str
    class_name: str
    location: bytes


class Source(Protocol):
    """A place that images come from. It is sent to worker processes, so it holds paths and no open files."""

    @property
    def layout(self) -> str:
        """The name that the plan records."""

    def inputs(self) -> Iterator[Input]:
        """Every input once, ascending by (split, class, location) as bytes, so that any two listings agree."""

    def read(self, location: bytes) -> bytes:
        """The encoded bytes of one input; OSError where they cannot be had."""

    def covers(self, path: Path) -> bool:
        """Whether files written below `path` would become inputs."""

    def label_files(self) -> Iterator[Path]:
        """Files beside the images that may say how classes are numbered (a devkit's meta.mat)."""


def find_source(path: Path) -> Source:
    """The source that understands `path`.

    Raises:
        AlexprepError: there is nothing there, or nothing that is understood.
    """
    from alexprep.shards.sources.folder import ClassFolders

    if not path.exists():
        raise AlexprepError(f"SOURCE {path} does not exist")
    if not path.is_dir():
        raise AlexprepError(f"SOURCE {path} is a file: name the folder that holds the class folders")
    return ClassFolders.at(path)
