"""A stand-in for the Hugging Face hub: as much of its HTTP as huggingface_hub and datasets need to fill a dataset repository and to read it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import yaml
from huggingface_hub import HfFileSystem

from tests.support.failing_store import hurry

TOKEN = "hf_standin0000000000000000000000000"
LFS = (".tar", ".npy", ".parquet", ".png")  # as .gitattributes of a new dataset repository has it
_API = re.compile(
    r"/api/datasets/(?P<id>[^/]+/[^/]+)(?:/(?P<what>[a-z-]+)(?:/(?P<revision>[^/]+)(?:/(?P<path>.*))?)?)?"
)
_RESOLVE = re.compile(r"/datasets/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class Answer(NamedTuple):
    """Of a request."""

    status: int
    body: Any = b""  # bytes, or what becomes JSON
    headers: Mapping[str, str] = MappingProxyType({})


class Repository:
    """Commits, of which each has all files by their names."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: list[dict[str, bytes]] = [{".gitattributes": b"*.tar filter=lfs\n"}]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]


class Hub:
    """The server, and what it has seen.

    Attributes:
        fault: asked before each request, by method and path: an answer in place of the right one, or None.
        asked: requests by method and kind; uploads: of large files by their sha256.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.uploads: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.fault: Callable[[str, str], Answer | None] = lambda method, path: None
        self._lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                answer = hub.fault(self.command, self.path) or hub.answer(self.command, self.path, self.headers, body)
                if answer.status == 0:  # hangs up
                    self.close_connection = True
                    return
                data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                self.send_response(answer.status)
                for name, value in {"Content-Length": str(len(data)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_HEAD = do_POST = do_PUT = answer

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> Answer:
        """What the hub would answer."""
        split = urllib.parse.urlsplit(target)
        path, query = urllib.parse.unquote(split.path), urllib.parse.parse_qs(split.query)
        if method == "PUT":  # by a signed URL, so without a token
            oid = path.rpartition("/")[2]
            if hashlib.sha256(body).hexdigest() != oid:  # cut off: its sender was killed
                return Answer(400)
            with self._lock:
                self.large[oid] = body
                self.uploads[oid] += 1
            return Answer(200)
        if headers.get("Authorization", f"Bearer {TOKEN}") != f"Bearer {TOKEN}":
            return Answer(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/validate-yaml":  # of a README.md
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return Answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if (found := re.fullmatch(r"/datasets/(.+)\.git/info/lfs/objects/batch", path)) and found[
            1
        ] in self.repositories:
            return Answer(200, {"objects": [self._object(each) for each in json.loads(body)["objects"]]})
        found = _API.fullmatch(path) or _RESOLVE.fullmatch(path)
        repository = self.repositories.get(found["id"]) if found else None
        if found is None or repository is None or (repository.private and not headers.get("Authorization")):
            return Answer(404 if headers.get("Authorization") else 401, {}, {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/datasets/"):
            return self._content(repository, found["path"], headers.get("Range"))
        with self._lock:
            self.asked[found["what"] or "info"] += 1
        return self._api(repository, found["id"], found["what"], found["path"] or "", body, query)

    def _create(self, wanted: dict[str, Any]) -> Answer:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != "user":
            return Answer(
                403,
                {
                    "error": f"You don't have the rights to create a dataset under the namespace {wanted['organization']!r}"
                },
            )
        if name in self.repositories:
            return Answer(409, {"error": "You already created this dataset repo"})
        self.repositories[name] = Repository(wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return Answer(200, {"url": f"{self.url}/datasets/{name}"})

    def _object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """What is to be done with a large file; nothing where it is there."""
        oid = wanted["oid"]
        href = {"href": f"{self.url}/large/{oid}", "header": {}}
        return {"oid": oid, "size": wanted["size"], **({} if oid in self.large else {"actions": {"upload": href}})}

    def _content(self, repository: Repository, name: str, part: str | None) -> Answer:
        data = repository.files.get(name)
        if data is None:
            return Answer(404, {}, {"X-Error-Code": "EntryNotFound"})
        head = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
        if part is None:
            return Answer(200, data, head)
        first, _, last = part.removeprefix("bytes=").partition("-")
        end = min(len(data), int(last or len(data)) + 1)
        return Answer(206, data[int(first) : end], {**head, "Content-Range": f"bytes {first}-{end - 1}/{len(data)}"})

    def _api(self, repository: Repository, name: str, what: str | None, path: str, body: bytes, query: Any) -> Answer:
        if what in (None, "revision"):
            siblings = [{"rfilename": each} for each in repository.files]
            return Answer(
                200, {"id": name, "private": repository.private, "sha": "0" * 40, "siblings": siblings, "tags": []}
            )
        if what == "preupload":
            files = [each["path"] for each in json.loads(body)["files"]]
            modes = [
                {"path": each, "uploadMode": "lfs" if each.endswith(LFS) else "regular", "shouldIgnore": False}
                for each in files
            ]
            return Answer(200, {"files": modes})
        if what == "commit":
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        if what == "tree":
            return Answer(200, list(self._tree(repository.files, path, query.get("recursive") == ["true"])))
        if what == "paths-info":
            wanted = (
                urllib.parse.parse_qs(body.decode()).get("paths", []) if body[:1] != b"{" else json.loads(body)["paths"]
            )
            return Answer(200, [each for each in self._tree(repository.files, "") if each["path"] in wanted])
        return Answer(404, {"error": f"{what} is unknown here"})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> Answer:
        repository = self.repositories[name]
        files = dict(repository.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        repository.commits.append(files)
        oid = f"{len(repository.commits):040x}"
        return Answer(200, {"commitUrl": f"{self.url}/datasets/{name}/commit/{oid}", "commitOid": oid})

    def _tree(self, files: dict[str, bytes], folder: str, whole: bool = True) -> Iterator[dict[str, Any]]:
        """All files and folders below one, or those that lie in it."""
        start = f"{folder}/" if folder else ""
        folders = sorted({name.rpartition("/")[0] for name in files} - {""})
        for name in (
            each for each in (*folders, *files) if each.startswith(start) and (whole or "/" not in each[len(start) :])
        ):
            if name in folders:
                yield {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
                continue
            data = files[name]
            oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            large = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            yield {"type": "file", "path": name, "oid": oid, "size": len(data)} | (
                {"lfs": large} if name.endswith(LFS) else {}
            )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty one, which huggingface_hub takes for the hub in this process and in those that it starts, with a token that it knows."""
    hurry(monkeypatch, 1)
    stand_in = Hub()
    settings = {
        "HF_ENDPOINT": stand_in.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": TOKEN,
    }
    for name, value in {**settings, "HF_HUB_DISABLE_TELEMETRY": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", stand_in.url)  # read when it was imported
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        f"{stand_in.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    HfFileSystem.clear_instance_cache()
    yield stand_in
    HfFileSystem.clear_instance_cache()
    stand_in.close()
