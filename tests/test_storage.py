"""Stores that fail: what is wrong with the way to a file is never held against the file. What is published: see test_faults."""

from __future__ import annotations

import errno
import functools
import gzip
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from alexprep.shards import storage
from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.listing import list_inputs
from alexprep.shards.plan import ShardOptions, draw_up
from alexprep.shards.sources.base import Account
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.storage import RemoteFiles, files_at, folder_at, read_inflated
from alexprep.shards.worker_pool import InProcessEngine
from tests.support.failing_store import hurry


class Answer(Exception):
    """As aiohttp's ClientResponseError."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


def _failing(deed: str) -> Any:
    """The store's own method, before which it fails as it is told."""

    def call(self: Shaky, path: str, *args: Any, **kwargs: Any) -> Any:
        self.asked.append(deed)
        if waiting := self.failures.get((deed, self._strip_protocol(path))):
            raise waiting.pop(0)
        return getattr(MemoryFileSystem, deed)(self, path, *args, **kwargs)

    return call


class Shaky(MemoryFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """A store in memory that fails as it is told: `failures` maps a deed and a path to what is raised, in turn."""

    protocol = "shaky"
    store: dict[str, Any] = {}  # noqa: RUF012  (fsspec's memory store is shared by design)
    pseudo_dirs = [""]  # noqa: RUF012
    failures: dict[tuple[str, str], list[BaseException]] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012
    ls, info, cat_file = _failing("ls"), _failing("info"), _failing("cat_file")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("shaky://", "memory://")))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Shaky:
    fsspec.register_implementation("shaky", Shaky, clobber=True)
    hurry(monkeypatch)
    for name, value in (("store", {}), ("pseudo_dirs", [""]), ("failures", {}), ("asked", [])):
        monkeypatch.setattr(Shaky, name, value)
    system = Shaky()
    for name in ("train/a/1.jpg", "train/a/deep/2.jpg", "train/b/3.jpg"):
        system.pipe_file(f"/set/{name}", name.encode())
    system.asked.clear()
    return system


def passes_by(failure: BaseException) -> bool:
    """Whether asking again may help: not where a store refuses."""
    return getattr(failure.__cause__, "status", None) != 403


def not_found(cause: BaseException | None) -> FileNotFoundError:
    error = FileNotFoundError("/set/train/a/1.jpg")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (not_found(None), FileNotFoundError),
        (not_found(Answer(404)), FileNotFoundError),
        (Answer(410), FileNotFoundError),
        (not_found(Answer(403)), errno.ECOMM),
        (not_found(Answer(503)), errno.ECOMM),
        (not_found(ConnectionRefusedError("refused")), errno.ECOMM),
        (not_found(TimeoutError()), errno.ECOMM),
        (Answer(503), errno.ECOMM),
        (PermissionError("no"), PermissionError),
        (MemoryError(), MemoryError),
    ],
)
def test_only_the_store_s_own_word_makes_a_file_absent(failure: Exception, expected: Any, store: Shaky) -> None:
    waits = expected == errno.ECOMM and passes_by(failure)
    store.failures["cat_file", "/set/train/a/1.jpg"] = [failure] * (99 if waits else 1)
    files = RemoteFiles("shaky://set")
    kind = OSError if isinstance(expected, int) else expected
    with pytest.raises(kind) as caught:
        files.read(b"train/a/1.jpg")
    assert caught.value.errno == expected if isinstance(expected, int) else type(caught.value) is expected
    assert store.asked.count("cat_file") > 3 if waits else store.asked == ["cat_file"]
    store.failures.clear()
    assert files.read(b"train/a/1.jpg") == b"train/a/1.jpg"
    assert "info" not in store.asked  # one journey a file
    assert files.read(b"train/a/1.jpg", 6, 1) == b"a" and files.read(b"train/a/1.jpg", 6, 0) == b""


def test_a_listing_that_fails_is_tried_again_and_never_leaves_out_a_folder(store: Shaky) -> None:
    wanted = [str(entry.location) for entry in find_source("shaky://set").inputs(Account())]
    assert wanted == ["train/a/1.jpg", "train/a/deep/2.jpg", "train/b/3.jpg"]
    for place in ("/set", "/set/train", "/set/train/a", "/set/train/a/deep"):
        for once in (TimeoutError(), not_found(Answer(503))):
            store.failures["ls", place] = [once, once]
            assert [str(entry.location) for entry in find_source("shaky://set").inputs(Account())] == wanted
        store.failures["ls", place] = [TimeoutError("late")] * 99
        with pytest.raises(AlexprepError, match=f"{place}.* (cannot be listed|cannot be reached) .*TimeoutError: late"):
            list(find_source("shaky://set").inputs(Account()))
        store.failures.clear()
    for refusal in (not_found(None), PermissionError("not yours")):
        store.failures["ls", "/set/train/a/deep"] = [refusal]
        with pytest.raises(AlexprepError, match="shaky://set/train/a/deep cannot be listed"):
            list(find_source("shaky://set").inputs(Account()))


def test_a_size_that_fails_is_tried_again(store: Shaky) -> None:
    files = RemoteFiles("shaky://set")
    store.failures["info", "/set/train/b/3.jpg"] = [not_found(Answer(500)), not_found(OSError("reset"))]
    assert files.size(b"train/b/3.jpg") == 13
    store.failures["info", "/set/train/b/3.jpg"] = [not_found(OSError("reset"))] * 99
    with pytest.raises(AlexprepError, match=r"cannot be read .*OSError: reset.*see to the network"):
        files.size(b"train/b/3.jpg")
    store.failures.clear()
    with pytest.raises(FileNotFoundError):
        files.size(b"train/b/4.jpg")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Python's own server, which knows no range requests."""

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """`tmp_path` behind http."""
    pytest.importorskip("aiohttp")
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(60)
        assert not thread.is_alive()


def test_http(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    (tmp_path / "train/a").mkdir(parents=True)
    content = bytes(range(256)) * 8192
    (tmp_path / "train/a/1.jpg").write_bytes(content)
    source = find_source(served)
    assert [str(entry.location) for entry in source.inputs(Account())] == ["train/a/1.jpg"]
    assert source.files.read(b"train/a/1.jpg") == content
    for deed in (source.files.read, source.files.size):
        with pytest.raises(FileNotFoundError):
            deed(b"train/a/2.jpg")
    assert source.files.entries(b"nowhere") == []
    with pytest.raises(AlexprepError, match=r"1\.jpg: the server does not answer range requests"):
        source.files.read(b"train/a/1.jpg", 512, 10)
    with source.files.reading(b"train/a/1.jpg") as read:
        assert read(0, 4) == content[:4]
        with pytest.raises(AlexprepError, match="does not answer range requests"):
            read(1_500_000, 10)
    folder = folder_at(served)
    assert folder.is_dir() and folder.resolve() == folder and not (folder / "train/b").is_dir()
    assert (folder / "train/a/1.jpg").exists() and not (folder / "train/a/2.jpg").exists()
    gone = RemoteFiles("http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(AlexprepError, match=r"127\.0\.0\.1:9/a\.jpg cannot be reached .*check the URL"):
        (folder_at("http://127.0.0.1:9").resolve() / "a.jpg").exists()
    with pytest.raises(OSError, match="ClientConnectorError") as caught:
        gone.read(b"a.jpg")
    assert caught.value.errno == errno.ECOMM and caught.value.filename == "http://127.0.0.1:9/a.jpg"
    with pytest.raises(AlexprepError, match=r"a\.tar cannot be read .*ClientConnectorError"):
        gone.size(b"a.tar")


def same_plan(one: str, other: str) -> None:
    """Both places must give the same plan, and the same bytes for each input of it."""
    sources = [find_source(one), find_source(other)]
    (document, tables), again = (draw_up(list_inputs(source), ShardOptions()) for source in sources)
    assert (document, tables) == again and document["splits"]["train"]["inputs"] > 0
    for entry in sources[0].inputs(Account()):
        assert sources[0].read(entry.location) == sources[1].read(entry.location)


def test_names_that_a_url_must_escape_are_the_same_over_http(served: str, tmp_path: Path) -> None:
    names = (
        "p%41.jpg",
        "h#2.jpg",
        "q?x=1.jpg",
        "ü ö.jpg",
        "a&b;c=d.jpg",
        "&amp;.jpg",
        "s::t.jpg",
        "br{1}.jpg",
        "+@,'.jpg",
    )
    classes = ("has space", "é", "%C3%A9", "50%", "c#", "w?t", "a&lt;b")
    for class_name in classes:
        (tmp_path / "set" / class_name).mkdir(parents=True)
        for name in names:
            (tmp_path / "set" / class_name / name).write_bytes(f"{class_name}/{name}".encode())
    same_plan(str(tmp_path / "set"), f"{served}/set")
    rows = [f'"{class_name}/{name}",{number % 3}' for number, class_name in enumerate(classes) for name in names]
    (tmp_path / "set/l#st.csv").write_text("path,label\n" + "\n".join(rows))
    same_plan(str(tmp_path / "set/l#st.csv"), f"{served}/set/l%23st.csv")


def test_links_of_a_page_that_are_no_files_of_its_folder_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Page:
        """As fsspec lists Apache's page of a folder: with links that sort it, and what the page links besides."""

        def ls(self, place: str, detail: bool) -> list[dict[str, str]]:
            links = ("?C=N;O=D", "a.jpg#top", "./b&#39;.jpg", "c&amp;d.jpg", "deep/e.jpg", "f%2Fg.jpg", ".hidden", "h/")
            return [{"name": f"{place}/{link}", "type": "directory" if link[-1] == "/" else "file"} for link in links]

    monkeypatch.setattr(storage, "_open_store", lambda url: (Page(), url))
    entries = RemoteFiles("http://nowhere/x").entries(b"y z")
    assert [name for name, _ in entries] == [b"b'.jpg", b"c&d.jpg", b"h"] and entries[-1].is_folder


def test_rows_that_a_server_has_not_are_rejected_with_one_reason(served: str, tmp_path: Path) -> None:
    rows = "".join(f"{served}/gone/{number}.jpg,x\n" for number in range(3))
    (tmp_path / "list.csv").write_text(f"url,label\n{rows}")
    for place in (str(tmp_path / "list.csv"), f"{served}/list.csv"):
        source = find_source(place)
        paths = [entry.location.path for entry in source.inputs(Account())]
        assert [source.files.display(path) for path in paths] == [path.decode() for path in paths]
        with pytest.raises(
            AlexprepError, match=r"none of the 3 inputs is a usable image: cannot be read: not found \(3\)"
        ):
            convert(source, tmp_path / f"out{len(place)}", ShardOptions(), InProcessEngine())


def test_gzip_is_inflated_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_INFLATED_BYTES", 10_000)
    here, _ = files_at(str(tmp_path))
    (tmp_path / "two.gz").write_bytes(gzip.compress(b"a" * 4000) + gzip.compress(b"b" * 4000))
    assert read_inflated(here, b"two.gz") == b"a" * 4000 + b"b" * 4000
    for name, content, words in (
        ("bomb.gz", gzip.compress(bytes(10**6)), "more than the limit of 10,000"),
        ("cut.gz", gzip.compress(b"abc" * 99)[:-9], "cut short"),
        ("junk.gz", b"\x1f\x8b" + b"junk" * 9, "damaged gzip"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OSError, match=words):
            read_inflated(here, name.encode())
    many = gzip.compress(b"ab") + gzip.compress(b"") * 50_000 + gzip.compress(bytes(5000), 0) + gzip.compress(b"c")
    (tmp_path / "many.gz").write_bytes(many)  # 1 MB; copying the rest for each part would move 25 GB
    assert read_inflated(here, b"many.gz") == b"ab" + bytes(5000) + b"c"
