"""A path in a store whose reading is patient: what `alexprep.shards.storage.folder_at` gives for a URL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from upath.extensions import ProxyUPath

from alexprep.shards.patience import STALLED, patiently

_HTTP = ("http", "https")


class StorePath(ProxyUPath):
    """A `UPath` that asks the store again where the way to it fails, see `alexprep.shards.patience`.

    What is a folder, and what exists, follows from the store's answer alone: an error is never taken for "there is none".
    """

    def read_bytes(self) -> bytes:
        """The whole file, by one request."""
        return self.whole()

    def whole(self, **waiting: Any) -> bytes:
        """The whole file, by one request; `waiting` as for `patiently`."""
        return bytes(
            patiently(lambda: self.fs.cat_file(self.path), str(self), **{"seconds": lambda: STALLED, **waiting})
        )

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is such a file or folder."""
        try:
            patiently(lambda: self.fs.info(self.path), str(self), seconds=lambda: STALLED)
            return True
        except FileNotFoundError:
            return False

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is such a folder."""
        if self.protocol in _HTTP:  # whose folders are pages
            return bool(patiently(lambda: self.fs.isdir(self.path), str(self)))
        try:
            return bool(patiently(lambda: self.fs.info(self.path), str(self))["type"] == "directory")
        except (FileNotFoundError, NotADirectoryError):
            return False

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        """Size and times, as far as the store tells them."""
        return patiently(lambda: super(StorePath, self).stat(), str(self))

    def glob(self, pattern: str, **options: Any) -> Iterator[Any]:
        """The paths below that fit a pattern."""
        yield from patiently(lambda: list(super(StorePath, self).glob(pattern, **options)), str(self))

    def iterdir(self) -> Iterator[Any]:
        """What is in the folder."""
        yield from patiently(lambda: list(super(StorePath, self).iterdir()), str(self))
