"""A path in a store whose reading is patient: what `alexprep.shards.storage.folder_at` gives for a URL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from upath.extensions import ProxyUPath

from alexprep.shards.errors import StoreError
from alexprep.shards.patience import STALLED, patiently, whole_file

_HTTP = ("http", "https")


class StorePath(ProxyUPath):
    """A `UPath` that asks the store again where the way to it fails, see `alexprep.shards.patience`.

    What is a folder, and what exists, follows from the store's answer alone: an error is never taken for "there is none".
    """

    def read_bytes(self) -> bytes:
        """The whole file, by one request; FileNotFoundError where there is none."""
        return bytes(self._ask(lambda: whole_file(self.fs, self.path)))

    def resolve(self, strict: bool = False) -> StorePath:
        """The path itself: where a web server sends a reader on to is its own business, and may change."""
        return self

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is such a file or folder."""
        try:
            self._ask(lambda: self.fs.info(self.path))
            return True
        except FileNotFoundError:
            return False

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is such a folder."""
        if self.protocol in _HTTP:  # whose folders are pages
            return bool(self._ask(lambda: self.fs.isdir(self.path)))
        try:
            return bool(self._ask(lambda: self.fs.info(self.path))["type"] == "directory")
        except (FileNotFoundError, NotADirectoryError):
            return False

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        """Size and times, as far as the store tells them."""
        return patiently(lambda: super(StorePath, self).stat(), str(self))

    def glob(self, pattern: str, **options: Any) -> Iterator[Any]:
        """The paths below that fit a pattern."""
        yield from self._ask(lambda: list(super(StorePath, self).glob(pattern, **options)))

    def iterdir(self) -> Iterator[Any]:
        """What is in the folder."""
        yield from self._ask(lambda: list(super(StorePath, self).iterdir()))

    def _ask(self, ask: Callable[[], Any]) -> Any:
        """What the store answers; StoreError where it cannot be reached, or refuses."""
        try:
            return patiently(ask, str(self), seconds=lambda: STALLED)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            words = str(error.strerror or error).partition("\n")[0]
            raise StoreError(
                f"{self} cannot be reached ({words}): check the URL, the credentials and the network"
            ) from error
