"""Puts a finished dataset on the Hugging Face hub: shards first, what describes them last, and nothing that is there already.

What is sent, in which pieces and how often it is tried is huggingface_hub's business; where the data are read back is that of `storage`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from alexprep.shards.dataset_format import (
    CARD,
    DATASET,
    HUB_FILES,
    PLAN,
    STATISTICS,
    TAR_INDEXES,
    TUNING,
    read_dataset,
    recorded_shards,
)
from alexprep.shards.errors import AlexprepError
from alexprep.shards.patience import http_status, patiently
from alexprep.shards.storage import file_sha256, folder_at, is_local
from alexprep.shards.verification import Progress, verify
from alexprep.shards.worker_pool import Engine

# Files in one commit: https://huggingface.co/docs/huggingface_hub/guides/upload advises 50 to 100.
COMMIT_FILES = 96
_SENT_AT_ONCE = 24  # files, of which every third is a tar, between two looks at how far it is
_FORM = "name it hf://datasets/USER/NAME"
_TOKEN = (
    "make one with write access at https://huggingface.co/settings/tokens, then run `hf auth login` or set HF_TOKEN"
)
_REFUSED = {  # by HTTP's status
    401: f"the hub does not take this token: {_TOKEN}",
    403: f"this token may not write there, or the account may not: see to the name and the account, or {_TOKEN}",
}

Result = TypeVar("Result")


def _quiet(what: str, unit: str) -> AbstractContextManager[Progress]:
    return contextlib.nullcontext(lambda finished, total: None)


@dataclass(frozen=True)
class Pushed:
    """What `push` did: of all `files` of the dataset so many were `sent`, with `bytes`; the others were there. `seconds` is the time that it took.

    `private` says who may read them: whoever the owner lets, or everybody. `kept` are files of the repository that differ and were left as they are.
    """

    url: str
    private: bool
    files: int
    sent: int
    bytes: int
    kept: list[str]
    seconds: float


def push(
    data: Path | str,
    url: str,
    engine: Engine | int,
    public: bool = False,
    progress: Callable[[str, str], AbstractContextManager[Progress]] = _quiet,
) -> Pushed:
    """Puts the dataset in the folder `data` into the repository at `url`, hf://datasets/USER/NAME, which is made if need be.

    Every byte is checked first, by `engine` as in `verify`. Then shards are sent, some a commit, and when the hub has them all with the sha256
    that were recorded, what describes them in one last commit, dataset.json with it: no reader meets a dataset.json without its shards. Interrupted,
    it goes on where it was, since the hub has what it has by its sha256.

    A repository that is made is private unless `public`; one that is there stays as visible as it is. A README.md there is kept, since a card may be
    its owner's own. `progress` is given what is done and in which unit, and gives a function to be called with (finished, total) meanwhile.

    Raises AlexprepError where the dataset is unfinished or damaged, where the repository holds anything else, and where the hub refuses.
    """
    started, data = time.monotonic(), folder_at(data)
    if not is_local(data):
        raise AlexprepError(f"{data} is no local folder: copy the data set to a disk, and push it from there")
    recorded = {
        f"{record['name'].rpartition('-')[0]}/{record['name']}.tar": record["sha256"]
        for record in recorded_shards(read_dataset(data))
    }
    repository = _Repository(url)
    exists = repository.private() is not None
    files = _files(data)
    missing, kept = _missing(data, files, recorded, repository) if exists else (files, [])
    with progress("verifying", "shards") as show:
        problems = verify(data, engine, progress=show).problems
    if problems:
        more = f", and {len(problems) - 1:,} more" if len(problems) > 1 else ""
        raise AlexprepError(
            f"{data} is not as it was written, so nothing is pushed: {problems[0]}{more}. "
            f"`{shlex.join(['alexprep', 'verify', str(data)])}` tells all"
        )
    if not exists:
        repository.create(public)
    size, there = sum((data / name).stat().st_size for name in missing), len(files) - len(missing)
    with _without_bars(), progress("pushing", "files") as show:
        for names in _commits(missing):
            if DATASET in names:
                _check_arrived(data, recorded, repository)
            for sent in repository.commit(data, names):
                show(there + sent, len(files))
            there += len(names)
    private = bool(repository.private())
    folder_at(repository.url).fs.invalidate_cache()  # type: ignore[attr-defined]  # what this process knew of it before
    return Pushed(url, private, len(files), len(missing), size, kept, time.monotonic() - started)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """huggingface_hub shows no bars of its own."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _files(data: Path) -> list[str]:
    """The names of all that belongs to a dataset, below its folder; what is the machine's or the hub's own is left out."""
    found = (path.relative_to(data) for path in sorted(data.rglob("*")) if not path.is_dir())
    return [str(path) for path in found if path.parts[0] not in (TUNING, *HUB_FILES) and TAR_INDEXES not in path.parts]


def _missing(
    data: Path, files: Sequence[str], recorded: Mapping[str, str], repository: _Repository
) -> tuple[list[str], list[str]]:
    """Which files the repository lacks, and which differ and are kept; AlexprepError where it holds anything but an earlier push of these."""
    there = repository.files()
    differing = {name for name in files if name in there and not _same(data, name, there[name], recorded)}
    renewed = {
        name for name in differing if Path(name).parent == STATISTICS.parent
    }  # of the same shards, computed anew
    others = sorted({name for name in there if name not in files and name not in HUB_FILES} - {CARD}) + sorted(
        differing - renewed - {CARD}
    )
    if others:
        more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
        what = "differs from this data set's" if others[0] in files else "is no file of this data set"
        raise AlexprepError(
            f"{repository.url} holds something else: {others[0]}{more} {what}. Name another repository, or delete this one on the hub first"
        )
    return [name for name in files if name not in there or name in renewed], sorted(differing - renewed)


def _same(data: Path, name: str, entry: Any, recorded: Mapping[str, str]) -> bool:
    """Whether the hub's entry of a file tells the content that the file has here."""
    path = data / name
    if entry.size != path.stat().st_size:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == (recorded.get(name) or file_sha256(path)))
    content = path.read_bytes()
    return bool(
        entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    )  # as git has it


def _commits(missing: Sequence[str]) -> Iterator[list[str]]:
    """The files of each commit, in order: the plan, by which a reader knows an unfinished set; the shards; what describes them."""
    shards = [name for name in missing if re.fullmatch(r"(\w+)/\1-\d+\.(tar|idx|json)", name)]
    first = [name for name in (PLAN, *shards) if name in missing]
    for start in range(0, len(first), COMMIT_FILES):
        yield first[start : start + COMMIT_FILES]
    last = [name for name in missing if name not in set(first)]
    if last:
        yield last


def _check_arrived(data: Path, recorded: Mapping[str, str], repository: _Repository) -> None:
    """Makes sure that the hub has every shard as it was recorded, before it is told of in dataset.json."""
    there = repository.files()
    for name in recorded:
        if name not in there or not _same(data, name, there[name], recorded):
            raise AlexprepError(
                f"{repository.url}/{name} is not what {data} records: somebody else changes one of them. Run the same command again when that is over"
            )


class _Repository:
    """A dataset repository of the hub, asked patiently; what it refuses is an AlexprepError."""

    def __init__(self, url: str) -> None:
        found = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)/?", url)
        if found is None:
            raise AlexprepError(f"{url} is no data set of the hub: {_FORM}")
        try:
            import huggingface_hub
            from huggingface_hub.utils import HFValidationError, validate_repo_id
        except ImportError:
            raise AlexprepError(f'{url} needs huggingface_hub: `pip install "alexprep[hub]"`') from None
        self.url, self._id = url.rstrip("/"), found[1]
        try:
            validate_repo_id(self._id)
        except HFValidationError as error:
            raise AlexprepError(f"{url} is no data set of the hub ({error}): {_FORM}") from None
        if huggingface_hub.get_token() is None:
            raise AlexprepError(f"{self.url} needs a token: {_TOKEN}")
        self._api = huggingface_hub.HfApi(library_name="alexprep")
        self._common = {"repo_id": self._id, "repo_type": "dataset"}

    def private(self) -> bool | None:
        """Whether it is private; None where there is none."""
        from huggingface_hub.utils import RepositoryNotFoundError

        def ask() -> bool | None:
            try:
                return bool(self._api.repo_info(**self._common).private)
            except RepositoryNotFoundError as error:
                if error.response is not None and error.response.status_code == 404:  # others are called so too
                    return None
                raise

        return self._ask(ask)

    def create(self, public: bool) -> None:
        """Makes it."""
        self._ask(lambda: self._api.create_repo(**self._common, private=not public, exist_ok=True))

    def files(self) -> dict[str, Any]:
        """What it holds: huggingface_hub's entry of each file by its name."""

        def ask() -> dict[str, Any]:
            entries = self._api.list_repo_tree(**self._common, recursive=True)
            return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}

        return self._ask(ask)

    def commit(self, data: Path, names: Sequence[str]) -> Iterator[int]:
        """Sends files of a dataset, then makes them visible at once; yields now and then how many are sent."""
        from huggingface_hub import CommitOperationAdd

        operations = [CommitOperationAdd(name, data / name) for name in names]
        for start in range(0, len(operations), _SENT_AT_ONCE):
            part = operations[start : start + _SENT_AT_ONCE]
            self._ask(functools.partial(self._api.preupload_lfs_files, self._id, part, repo_type="dataset"))
            yield start + len(part)
        message = f"alexprep push: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        self._ask(lambda: self._api.create_commit(**self._common, operations=operations, commit_message=message))

    def _ask(self, ask: Callable[[], Result]) -> Result:
        """What the hub answers. huggingface_hub itself asks again after 429 and 5xx, and waits as long as the answer tells it to."""

        def asked() -> Result:
            try:
                return ask()
            except RuntimeError as error:  # around what failed in a thread
                raise error.__cause__ or error from None
            except ValueError as error:
                if http_status(error) or isinstance(error, json.JSONDecodeError):  # a page of a server in trouble
                    raise
                words = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise AlexprepError(
                    f"{self.url} cannot be written ({words}): see whether huggingface_hub is up to date"
                ) from error

        try:
            return patiently(asked, self.url)
        except OSError as error:
            status = http_status(error)
            words = _REFUSED.get(status or 0, "run the same command again to go on: what was sent is kept")
            said = getattr(error.__cause__, "server_message", None) or error.strerror or error
            raise AlexprepError(f"{self.url} cannot be written ({said}): {words}") from None
