"""A path in a store whose reading is patient: what `alexprep.shards.storage.folder_at` gives for a URL."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from upath.extensions import ProxyUPath

from alexprep.shards.errors import StoreError
from alexprep.shards.patience import STALLED, answer_seconds, patiently, whole_file

_HTTP = ("http", "https")


class StorePath(ProxyUPath):
    """A `UPath` that asks the store again where the way to it fails, see `alexprep.shards.patience`.

    What is a folder, and what exists, follows from the store's answer alone: an error is never taken for "there is none".
    """

    def read_bytes(self, size: int = 0) -> bytes:
        """The whole file, by one request, which may take the longer, the more bytes are expected; FileNotFoundError where there is none."""
        return bytes(self._ask(lambda: whole_file(self.fs, self.path), answer_seconds(size)))

    def write_bytes(self, data: bytes) -> int:
        """Uploads the whole file, which object stores show when it is complete, and not before."""
        if self.protocol in _HTTP:  # where fsspec would try, though few servers take it
            raise NotImplementedError
        self.fs.pipe_file(self.path, data)
        return len(data)

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

    def modified(self) -> int:
        """When the file was written last, nanoseconds of Unix time."""
        return int(self._ask(lambda: self.fs.modified(self.path)).timestamp() * 1e9)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Makes the folder and those above it, in a store that has folders."""
        self._ask(lambda: self.fs.makedirs(self.path, exist_ok=True))

    def unlink(self, missing_ok: bool = False) -> None:
        """Deletes the file. That there is none may be the work of an earlier request, whose answer was lost: it is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda: self.fs.rm_file(self.path))

    def glob(self, pattern: str, **options: Any) -> Iterator[Any]:
        """The paths below that fit a pattern; none where there is no such folder."""
        with contextlib.suppress(FileNotFoundError):
            yield from self._ask(lambda: list(super(StorePath, self).glob(pattern, **options)))

    def iterdir(self) -> Iterator[Any]:
        """What is in the folder now; FileNotFoundError where there is none."""
        self.forget()
        listed = self._ask(lambda: self.fs.ls(self.path, detail=False))
        own = self.path.rstrip("/")  # which some stores list as if it were inside itself
        yield from (self / path.rpartition("/")[2] for name in listed if (path := name.rstrip("/")) != own)

    def forget(self) -> None:
        """Has the store asked anew for what is in the folder, and in those below it: what was heard before may be out of date."""
        self.fs.invalidate_cache()

    def _ask(self, ask: Callable[[], Any], seconds: float = STALLED) -> Any:
        """What the store answers; StoreError where it cannot be reached, or refuses."""
        try:
            return patiently(ask, str(self), seconds=lambda: seconds)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            words = str(error.strerror or error).partition("\n")[0]
            raise StoreError(
                f"{self} cannot be reached ({words}): check the URL, the credentials and the network"
            ) from error
