"""Asks stores patiently: what fails on the way is asked again, with growing pauses, as long as the patience lasts.

The files of a store are read in `storage`, the shards of a dataset in `shard_fetcher`.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from alexprep.shards.errors import AlexprepError, number_within

VARIABLE = "ALEXPREP_STORE_PATIENCE"  # environment variable: seconds; worker processes inherit it
PATIENCE = 300.0  # seconds that a store may be away, unless told otherwise
MOST_PATIENCE = 1_000_000  # seconds: eleven days
STALLED = 10.0  # seconds after which a request without an answer is given up, and asked again;
SLOWEST = 250_000  # bytes a second: and so many seconds more as what is expected takes at this pace
_UNDER_WAY = 2 * STALLED  # seconds beyond the patience, for a request that is under way when that ends
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 15.0  # seconds; each is twice the one before

_SAID_EVERY = 15.0  # seconds between two lines about waiting, over all stores
_QUIET = 1.0  # seconds of waiting that nobody is told about
_ABSENT = (404, 410)  # HTTP: not found, gone
# HTTP: what will be refused again: no credentials, or expired ones; a bucket of another region.
_REFUSED = (301, 400, 401, 403, 405, 407)
# Of libraries that need not be installed: no credentials, or a place that cannot be.
_LASTING = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "InvalidRegionError", "InvalidURL"}
_LASTING |= {"ParamValidationError", "UnauthorizedSSOTokenError", "SSOTokenLoadError"}
_LASTING |= {
    "InvalidUrlClientError",
    "NonHttpUrlClientError",
    "HfUriError",
    "HFValidationError",
    "OfflineModeIsEnabled",
}
# huggingface_hub gives up what stalls by itself, and waits after a 429 as long as the answer says, which would pass for stalling.
_UNWATCHED = "hf://"
_MISTAKES = (NotImplementedError, TypeError, LookupError, AttributeError)  # of a program: they would be made again

Result = TypeVar("Result")
_log = logging.getLogger("alexprep")
_jitter = random.Random()  # the caller's own random numbers stay as they are
_saying = threading.Lock()
_said = -_SAID_EVERY  # when the last line about waiting was said


def answer_seconds(size: int) -> float:
    """Seconds that an answer of so many bytes may take before the request counts as stalled.

    >>> answer_seconds(0), answer_seconds(1_000_000)
    (10.0, 14.0)
    """
    return STALLED + size / SLOWEST


def given_up_seconds() -> float:
    """Seconds after which whoever waits for a store that is away has given it up: the patience, and what was under way at its end."""
    return store_patience() + _UNDER_WAY


def store_patience() -> float:
    """Seconds that a store may be away before what needs it ends: $ALEXPREP_STORE_PATIENCE, 300 by default."""
    given = os.environ.get(VARIABLE, "")
    try:
        seconds = float(given) if given else PATIENCE
    except ValueError:
        raise AlexprepError(f"{VARIABLE} {given!r} is no number of seconds: say how long a store may be away") from None
    number_within(VARIABLE, seconds, 0, MOST_PATIENCE)
    return seconds


def be_patient(seconds: float) -> None:
    """Sets the patience of this process, and of those that it starts from now on; AlexprepError where it is out of bounds."""
    number_within("--store-patience", seconds, 0, MOST_PATIENCE)
    os.environ[VARIABLE] = repr(float(seconds))


def patiently(
    ask: Callable[[], Result],
    where: str,
    stop: threading.Event | None = None,
    seconds: Callable[[], float] | None = None,
) -> Result:
    """What `ask` gets from a store, asked again where the way to it fails, or where there is no answer.

    Args:
        ask: may be called several times, also while an earlier call that got no answer goes on in a thread of its own.
        where: what is asked for, for messages.
        stop: ends the waiting when it is set.
        seconds: after which a request counts as stalled; twice as many after each that did, as far as the patience goes. None: requests are not watched,
            and run in this thread.

    Raises FileNotFoundError where there is no such file, PermissionError and others where the store refuses; OSError with errno ECOMM where
    the patience is over, or where asking again would not help.
    """
    pauses = Pauses(where, stop)
    seconds = None if where.startswith(_UNWATCHED) else seconds
    while True:
        try:
            found = ask_store(ask if seconds is None else lambda: _within(pauses.allowed(seconds()), ask), where)
            pauses.over()
            return found
        except OSError as error:
            if error.errno != errno.ECOMM or not passes(error):
                raise
            if not pauses.wait(error):
                raise OSError(errno.ECOMM, f"{error.strerror}{pauses.words()}", where) from error


class Pauses:
    """The pauses between the tries of one thing, as long as the patience lasts.

    Attributes:
        stalled: how many requests in a row were given up without an answer.
    """

    def __init__(self, where: str, stop: threading.Event | None = None) -> None:
        """The patience begins now; `where` and `stop` as for `patiently`."""
        self.stalled = 0
        self._where, self._stop = where, stop or threading.Event()
        self._began, self._patience, self._pause = time.monotonic(), store_patience(), FIRST_PAUSE
        self._told = False

    def allowed(self, seconds: float) -> float:
        """Seconds that the next request may take, of those that a first one may."""
        return min(seconds * 2.0**self.stalled, max(seconds, self._left()))

    def _left(self) -> float:
        return self._began + self._patience - time.monotonic()

    def wait(self, error: OSError) -> bool:
        """Waits before the next try; False where there is none: the patience is over, or the work was stopped."""
        self.stalled += isinstance(error.__cause__, _StalledError)
        left = self._left()
        if left <= 0 or self._stop.is_set():
            return False
        if self._patience - left >= _QUIET or self._told:
            self._say(f"waiting for {self._where} ({error.strerror}): it is asked again for {left:,.0f} s")
        told = _http_answer(error)[1].get("retry-after", "")  # seconds; or a date, which few send
        pause = self._pause * _jitter.uniform(0.75, 1)  # that not all ask at the same instant
        pause = min(max(pause, float(told) if told.isdecimal() else 0.0), left)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        return not self._stop.wait(pause)

    def over(self) -> None:
        """Says that the wait is over, where it was said that there is one."""
        if self._told:
            _log.warning("%s answers after %.0f s", self._where, time.monotonic() - self._began)

    def words(self) -> str:
        """How long it was waited for, as the end of a reason; empty for no time worth a word."""
        seconds = time.monotonic() - self._began
        return f"; for {seconds:,.0f} s" if seconds >= _QUIET else ""

    def _say(self, line: str) -> None:
        global _said
        with _saying:
            now = time.monotonic()
            if now - _said >= _SAID_EVERY:  # one line for all that wait
                _said, self._told = now, True
                _log.warning("%s", line)


class _StalledError(Exception):
    """A request got no answer in the time that it should take."""


def _within(seconds: float, ask: Callable[[], Result]) -> Result:
    """What `ask` returns or raises; `_StalledError` where that takes too long: it then goes on in its thread, and nobody waits for it."""
    answer: queue.SimpleQueue[tuple[bool, object]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((True, ask()))
        except BaseException as error:  # noqa: BLE001  (raised in the thread that waits)
            answer.put((False, error))

    threading.Thread(target=run, name="alexprep-ask", daemon=True).start()
    try:
        good, found = answer.get(timeout=seconds)
    except queue.Empty:
        raise _StalledError(f"no answer in {seconds:.0f} s") from None
    if not good:
        assert isinstance(found, BaseException)
        raise found
    return found  # type: ignore[return-value]


def ask_store(ask: Callable[[], Result], where: str) -> Result:
    """What `ask` gets from a store, asked once. Errors name `where`: errno ENOENT if there is no such file, ECOMM if nothing is said of it.

    What is wrong with the way to a file is never held against the file.
    """
    try:
        return ask()
    except (PermissionError, IsADirectoryError, NotADirectoryError, MemoryError, AlexprepError):
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
        if http_status(cause) in _ABSENT or (isinstance(error, FileNotFoundError) and _is_absent(error)):
            raise FileNotFoundError(errno.ENOENT, "not found", where) from error
        words = f"{type(cause).__name__}: {cause}" if not isinstance(cause, _StalledError) else str(cause)
        raise OSError(errno.ECOMM, words.partition("\n")[0], where) from error


def passes(error: OSError) -> bool:
    """Whether what failed, by the error of `ask_store`, may be asked again with hope: not what is refused or cannot be."""
    cause = error.__cause__
    if isinstance(cause, FileNotFoundError):
        cause = cause.__cause__
    if isinstance(cause, TimeoutError):  # which S3 answers by 400
        return True
    if http_status(cause) in _REFUSED:
        return False
    return not isinstance(cause, _MISTAKES) and type(cause).__name__ not in _LASTING


def http_status(error: BaseException | None) -> int | None:
    """The HTTP status by which a store answered, where an error, or what it came of, tells one."""
    return _http_answer(error)[0]


def _http_answer(error: BaseException | None) -> tuple[int | None, Mapping[str, str]]:
    """That status, and the answer's headers: of aiohttp's errors, of botocore's, and of those that keep the response, as requests and httpx do.

    Names of headers are in small letters, which is how botocore has them, and no matter to the others.
    """
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            told = response.get("ResponseMetadata", {})
            return told.get("HTTPStatusCode"), told.get("HTTPHeaders") or {}
        for answer, name in ((error, "status"), (response, "status_code")):
            status = getattr(answer, name, None)
            if isinstance(status, int):
                return status, getattr(answer, "headers", None) or {}
        error = error.__cause__
    return None, {}


def whole_file(system: Any, path: str) -> bytes:
    """All of a file of an fsspec file system, by one request: s3fs would ask for the size first, unless it is asked for a range."""
    if "s3" not in system.protocol:
        return bytes(system.cat_file(path))
    try:
        return bytes(system.cat_file(path, start=0))
    except OSError as error:
        if error.errno != errno.EINVAL:  # "InvalidRange": an empty file has none
            raise
        return bytes(system.cat_file(path))


def _is_absent(error: FileNotFoundError) -> bool:
    """Whether the store says that there is no such file. fsspec's http calls whatever goes wrong so, and tells the cause."""
    cause = error.__cause__
    if cause is None or isinstance(cause, FileNotFoundError | KeyError):  # of a store in memory
        return not isinstance(cause, FileNotFoundError) or _is_absent(cause)
    status = http_status(cause)  # what has another response has been looked into, as by s3fs
    return status in _ABSENT if status is not None else getattr(cause, "response", None) is not None
