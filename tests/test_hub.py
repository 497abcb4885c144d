"""Data sets on the Hugging Face hub, by a stand-in for it: pushed whole or not at all, and read back as they are here."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alexprep.pipeline.augmentation import Augmentation
from alexprep.pipeline.loader import Loader
from alexprep.shards import hub as hub_module
from alexprep.shards.errors import AlexprepError
from alexprep.shards.hub import push
from alexprep.shards.patience import patiently
from alexprep.shards.rgb_statistics import pca_stats, publish_statistics
from alexprep.shards.storage import folder_at
from alexprep.shards.verification import verify
from alexprep.shards.worker_pool import InProcessEngine
from tests.support.failing_store import hurry
from tests.support.hub import TOKEN, Answer, Hub, Repository, hub

__all__ = ["hub"]  # a fixture
ID = "user/photos"
URL = f"hf://datasets/{ID}"
HERE = InProcessEngine()
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's of httpx2


@pytest.fixture
def copied(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "data"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_whole(hub: Hub, data: Path) -> None:
    """The repository has the data set, each large file came once, and no commit ever had a dataset.json without its shards."""
    found = hub.repositories[ID]
    assert {name: content for name, content in found.files.items() if name != ".gitattributes"} == files_of(data)
    assert set(hub.uploads.values()) == {1}
    tars = {name for name in found.files if name.endswith(".tar")}
    assert all(tars <= files.keys() for files in found.commits if "dataset.json" in files)


def test_a_pushed_set_is_read_back_as_it_is_here(hub: Hub, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "COMMIT_FILES", 7)
    (copied / "tuning.json").write_text("{}")  # the machine's, not the data's
    with pytest.raises(AlexprepError):  # and what is known of it from before is forgotten
        verify(URL, HERE)
    pushed = push(copied, URL, HERE)
    (copied / "tuning.json").unlink()
    check_whole(hub, copied)
    assert hub.repositories[ID].private and pushed.private and len(hub.repositories[ID].commits) > 5
    assert pushed.files == pushed.sent == len(files_of(copied))
    assert push(copied, URL, HERE).sent == 0 and set(hub.uploads.values()) == {1}

    verdict = verify(URL, HERE)
    assert not verdict.problems and verdict.samples == 68
    (here, there) = (pca_stats(place, "train", HERE) for place in (copied, URL))
    assert torch.equal(torch.tensor(here.mean_HWC), torch.tensor(there.mean_HWC))
    batches = []
    for place in (copied, URL):
        with Loader(place, batch_size=9, augmentation=Augmentation(crop=48), order="blocks", block_shards=2) as loader:
            batches.append([(batch.images, batch.labels) for batch in loader])
    for ours, theirs in zip(*batches, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_push_goes_on(number: signal.Signals, hub: Hub, data: Path) -> None:
    command = [sys.executable, "-m", "alexprep.cli", "push", str(data), URL, "--workers", "1"]
    puts, lock, process = Counter[str](), threading.Lock(), list[subprocess.Popen[str]]()

    def interrupt(method: str, path: str) -> Answer | None:
        with lock:
            puts[method] += 1
            if method == "PUT" and puts[method] == 5:
                os.kill(process[0].pid, number)
        return None

    hub.fault = interrupt
    process.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    _, said = process[0].communicate(timeout=300)
    if number == signal.SIGINT:
        assert process[0].returncode == 130
        assert said.splitlines()[-1] == "Interrupted. What was sent is kept: run the same command again to go on.", said
        assert TOKEN not in said
    assert 5 <= len(hub.uploads) < 11 and "dataset.json" not in hub.repositories[ID].files
    with pytest.raises(AlexprepError, match=r"unfinished data set|does not exist"):
        Loader(URL, batch_size=9)
    push(data, URL, HERE)
    check_whole(hub, data)


@pytest.mark.parametrize("answer", [Answer(429, {}, {"Retry-After": "0"}), Answer(503), Answer(0)])
def test_a_hub_in_trouble_is_asked_again(answer: Answer, hub: Hub, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of request fails once."""
    hurry(monkeypatch, 10)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    seen, lock = set[str](), threading.Lock()

    def fail(method: str, path: str) -> Answer | None:
        kind = f"{method} {path.split('?')[0].replace(ID, '').replace('/main', '')[:22]}"
        with lock:
            first = kind not in seen
            seen.add(kind)
        return answer if first and "agent-harnesses" not in path else None

    hub.fault = fail
    push(data, URL, HERE)
    check_whole(hub, data)
    assert len(seen) >= 7, seen
    with Loader(URL, batch_size=9, augmentation=Augmentation(crop=48), order="blocks") as loader:
        assert len(list(loader)) == len(loader)


def test_a_hub_that_is_asked_too_often_says_when_to_ask_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """And when that is later than the patience lasts, it is asked once more at its end."""
    hurry(monkeypatch, 60)
    hub.repositories[ID] = Repository(private=True)
    pauses: list[float] = []
    stop: Any = SimpleNamespace(is_set=lambda: False, wait=pauses.append)
    answers: list[Answer] = []
    hub.fault = lambda method, path: answers.pop() if answers else None
    repository = hub_module._Repository(URL)
    for seconds in ("7", "100", "Wed, 21 Oct 2026 07:28:00 GMT"):
        answers.append(Answer(429, {}, {"retry-after": seconds}))
        assert patiently(lambda: list(repository._api.repo_info(ID, repo_type="dataset").siblings), URL, stop)
    assert pauses[0] == 7 and 55 < pauses[1] <= 60 and pauses[2] < 1, pauses


def test_a_hub_that_stays_away_is_told_in_one_sentence(hub: Hub, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch, 0.05)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    hub.fault = lambda method, path: Answer(503) if method == "PUT" else None
    with pytest.raises(AlexprepError, match="run the same command again to go on") as told:
        push(data, URL, HERE)
    assert "\n" not in str(told.value) and "dataset.json" not in hub.repositories[ID].files


@pytest.mark.parametrize(
    ("url", "token", "told"),
    [
        (
            URL,
            "hf_wrong",
            "does not take this token: make one with write access at https://huggingface.co/settings/tokens",
        ),
        (URL, "", "needs a token"),
        ("hf://datasets/other/photos", TOKEN, "rights to create a dataset under the namespace 'other'"),
        ("hf://user/photos", TOKEN, "name it hf://datasets/USER/NAME"),
        ("hf://datasets/user", TOKEN, "name it hf://datasets/USER/NAME"),
        ("hf://datasets/user/a..b", TOKEN, "name it hf://datasets/USER/NAME"),
        ("s3://user/photos", TOKEN, "name it hf://datasets/USER/NAME"),
    ],
)
def test_what_is_refused(
    url: str,
    token: str,
    told: str,
    hub: Hub,
    data: Path,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    status, _, said = command("push", str(data), url, "--workers", "1")
    assert status == 1 and told in said and len(said.splitlines()) == 1, said
    assert (not token or token not in said) and not hub.repositories


def test_without_huggingface_hub(
    data: Path, command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    status, _, said = command("push", str(data), URL)
    assert status == 1 and said == f'Error: {URL} needs huggingface_hub: `pip install "alexprep[hub]"`\n'


def test_sets_that_are_not_pushed(hub: Hub, copied: Path) -> None:
    with pytest.raises(AlexprepError, match="no local folder"):
        push(folder_at("memory://photos"), URL, HERE)
    shard = copied / "train/train-000002.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:3000] + b"x" + whole[3001:])
    with pytest.raises(AlexprepError, match=r"nothing is pushed: train/train-000002\.tar, 0.*changed"):
        push(copied, URL, HERE)
    shard.write_bytes(whole)
    (copied / "dataset.json").unlink()
    with pytest.raises(AlexprepError, match="unfinished"):
        push(copied, URL, HERE)
    assert not hub.repositories


def test_a_repository_that_holds_something_else(hub: Hub, data: Path, copied: Path) -> None:
    push(data, URL, HERE)
    files = hub.repositories[ID].files
    for name, told in {
        "notes.txt": "notes.txt is no file",
        "train/train-000001.json": "train-000001.json differs",
    }.items():
        before = files.get(name)
        files[name] = b"something else"
        with pytest.raises(AlexprepError, match=f"holds something else: .*{told}"):
            push(data, URL, HERE)
        files.pop(name) if before is None else files.update({name: before})
    assert push(data, URL, HERE).sent == 0


def test_a_card_of_the_owners_is_kept_and_statistics_are_renewed(hub: Hub, copied: Path) -> None:
    push(copied, URL, HERE, public=True)
    files, private = hub.repositories[ID].files, hub.repositories[ID].private
    assert not private
    files["README.md"] = b"---\nlicense: mit\n---\n"
    publish_statistics(pca_stats(copied, "val", HERE), copied, "val")
    pushed = push(copied, URL, HERE)  # private, were it new
    assert pushed.kept == ["README.md"] and pushed.sent == 3 and not pushed.private
    assert hub.repositories[ID].files["README.md"] == files["README.md"]
    assert hub.repositories[ID].files["stats/stats.json"] == (copied / "stats/stats.json").read_bytes()


def test_a_shard_that_arrived_otherwise_is_told_before_the_set_is_announced(hub: Hub, data: Path) -> None:
    def damage(method: str, path: str) -> None:
        if path.endswith("/commit/main") and method == "POST":
            for oid in hub.large:
                hub.large[oid] = b"damaged"

    hub.fault = damage
    with pytest.raises(AlexprepError, match=r"train-000000\.tar is not what"):
        push(data, URL, HERE)
    assert "dataset.json" not in hub.repositories[ID].files
