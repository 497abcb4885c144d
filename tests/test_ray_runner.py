"""Sharding and statistics on a Ray cluster of three nodes, all on this machine: the same bytes, whatever is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.ray_runner import RayEngine

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'alexprep[ray]'")
# Ray leaves sockets and processes to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS = ShardOptions(Target(size=64), shard_samples=7)
MANY = ShardOptions(Target(size=64), shard_samples=3)
MARK = "ALEXPREP_TEST_RAY"

# What the workers import: tests themselves cannot be imported there.
TASKS = """
import os
from alexprep.shards.errors import AlexprepError
from alexprep.shards.worker_pool import attending

def fragile(argument, condemned):
    for row in range(4):
        with attending(row):
            if row == argument and row not in condemned:
                os.abort()
    return argument, dict(condemned)

def refusing(argument, condemned):
    raise AlexprepError(f"--thing {argument} is wrong")

def failing(argument, condemned):
    return 1 // argument
"""


def fingerprint(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder, the statistics left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "stats")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.005)
    raise AssertionError(f"{what}: not within {seconds} s")


def processes(word: bytes, file: str) -> list[int]:
    """Processes of the whole machine with `word` in /proc/PID/`file`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if word in (folder / file).read_bytes():
                found.append(int(folder.name))
    return found


def descendants() -> set[int]:
    """Processes that this one started, and those that they started."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    found, generation = set[int](), {os.getpid()}
    while generation := {process for process, parent in parents.items() if parent in generation}:
        found |= generation
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head without CPUs and two nodes of one, on the loopback interface."""
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    tasks = tmp_path_factory.mktemp("tasks")
    (tasks / "ray_tasks.py").write_text(TASKS)
    with pytest.MonkeyPatch.context() as patch:
        # What keeps Ray from taking the machine's address for 127.0.0.1, in this process and in drivers that it starts.
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        patch.setenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # whether or not this user has a token
        patch.setenv("PYTHONPATH", str(tasks), prepend=os.pathsep)
        patch.syspath_prepend(str(tasks))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(wait=False, num_cpus=1)
        cluster.wait_for_nodes(timeout=60)
        yield cluster
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]
        del cluster
        gc.collect()  # here, where Ray's unclosed files are no errors


@pytest.fixture(scope="module")
def many(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Each photo six times, so that a run is long enough to be disturbed; and what the local engine makes of them."""
    root = tmp_path_factory.mktemp("many")
    for path in photos.rglob("*.JPEG"):
        folder = root / "source" / path.relative_to(photos).parent
        folder.mkdir(parents=True, exist_ok=True)
        for n in range(6):
            (folder / f"{n}-{path.name}").symlink_to(path)
    convert(root / "source", root / "out", MANY, 2)
    return root / "source", fingerprint(root / "out")


def test_the_same_bytes_as_locally(cluster: Any, photos: Path, data: Path, tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    report = convert(
        photos, tmp_path / "out", OPTIONS, RayEngine(cluster.address), lambda *progress: heard.append(progress)
    )
    assert fingerprint(tmp_path / "out") == fingerprint(data)
    assert report.written == 68
    assert heard[-1] == (68, 68) and heard == sorted(heard)
    assert not ray.is_initialized()


def test_statistics_have_the_same_bits(cluster: Any, data: Path) -> None:
    one, other = (rgb_statistics.pca_stats(data, "train", engine) for engine in (1, RayEngine(cluster.address)))
    assert one.data_digest == other.data_digest
    for name in ("mean_HWC", "covariance", "eigenvalues", "eigenvectors"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes()


def test_an_input_that_ends_processes_is_found_out(cluster: Any) -> None:
    from ray_tasks import fragile  # type: ignore[import-not-found]

    found = dict(RayEngine(cluster.address).run(fragile, [0, 2, 9]))
    assert found == {
        0: {0: "ends the process that reads it (SIGABRT)"},
        2: {2: "ends the process that reads it (SIGABRT)"},
        9: {},
    }


def test_errors_of_tasks_arrive(cluster: Any, data: Path, tmp_path: Path) -> None:
    from ray_tasks import failing, refusing

    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")  # and stays so
    engine = RayEngine()
    with pytest.raises(AlexprepError, match=r"^--thing 7 is wrong$"):
        list(engine.run(refusing, [7, 7, 7]))
    with pytest.raises(RuntimeError, match=r"^in a Ray worker: ZeroDivisionError: integer division"):
        list(engine.run(failing, [1, 0, 1]))
    assert list(engine.run(failing, [1, 1])) == [1, 1]
    assert ray.is_initialized()
    ray.shutdown()


def test_a_machine_without_alexprep_is_named(cluster: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'alexprep': raise ModuleNotFoundError(\"No module named 'alexprep'\", name=name)\n"
        "sys.meta_path.insert(0, Without())\n"
    )
    environment = {"env_vars": {"PYTHONPATH": str(tmp_path)}}
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    with pytest.raises(AlexprepError, match="cannot import alexprep: pip install alexprep there"):
        rgb_statistics.pca_stats(data, "train", RayEngine())
    ray.shutdown()


def test_a_worker_and_a_node_are_lost(
    cluster: Any, many: tuple[Path, dict[str, str]], tmp_path: Path, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(seed)
    source, reference = many
    out = tmp_path / "out"
    lost = []

    def workers() -> list[int]:
        return sorted(descendants().intersection(processes(b"ray::_in_ray_worker", "cmdline")))

    def disturb() -> None:
        wait_until(lambda: len(list(out.glob("train/*.json"))) > 5, "the first shards")
        os.kill(rng.choice(wait_until(workers, "a worker at work")), signal.SIGKILL)
        lost.append("worker")
        finished = len(list(out.glob("train/*.json")))
        wait_until(lambda: len(list(out.glob("train/*.json"))) > finished + 5, "more shards")
        node = rng.choice(list(cluster.worker_nodes))
        cluster.remove_node(node, allow_graceful=False)
        lost.append("node" if not (out / "dataset.json").exists() else "nothing")

    with ThreadThatRaises(disturb):
        convert(source, out, MANY, RayEngine(cluster.address))
    assert capfd.readouterr().out == ""
    cluster.add_node(num_cpus=1)
    assert lost == ["worker", "node"]
    assert fingerprint(out) == reference


class ThreadThatRaises(threading.Thread):
    """Beside a `with` block; an exception in it comes out at the block's end."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:  # noqa: BLE001
            self.error = error

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self.join(60)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


def command(source: Path, out: Path, *words: str) -> list[str]:
    start = [sys.executable, "-m", "alexprep.cli", "shard", str(source), "--out", str(out), "--size", "64"]
    return [*start, "--shard-samples", "3", "--engine", "ray", *words]


def test_a_killed_driver_is_run_again(cluster: Any, many: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    source, reference = many
    out = tmp_path / "out"
    driver = subprocess.Popen(
        command(source, out, "--ray-address", cluster.address), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: len(list(out.glob("train/*.json"))) > 10, "the first shards")
    driver.kill()
    driver.wait(timeout=60)
    assert not (out / "dataset.json").exists()
    report = convert(source, out, MANY, RayEngine(cluster.address))
    assert 0 < report.made_inputs < 408
    assert fingerprint(out) == reference


def test_ctrl_c_leaves_nothing_and_nobody_can_listen_in(many: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """A Ray started for one command: no port off the loopback interface while it runs, no process after it."""
    source, _ = many
    out = tmp_path / "out"
    mark = f"{MARK}={tmp_path}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    driver = subprocess.Popen(
        command(source, out),
        env=environment | dict([mark.split("=", 1)]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wait_until(lambda: len(list(out.glob("train/*.json"))) > 5, "the first shards")
    ours = processes(mark.encode(), "environ")
    addresses = listening(ours)
    os.killpg(driver.pid, signal.SIGINT)
    _, errors = driver.communicate(timeout=120)
    assert len(ours) > 5 and len(addresses) >= 4
    assert set(addresses) <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert driver.returncode == 130, errors
    assert b"Traceback" not in errors
    wait_until(lambda: not processes(mark.encode(), "environ"), "all processes gone")


def listening(processes: list[int]) -> list[str]:
    """The addresses, as /proc/net writes them, on which these processes wait for TCP connections."""
    sockets = set()
    for process in processes:
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{process}/fd").iterdir():
                with contextlib.suppress(OSError):
                    sockets.add(os.readlink(descriptor))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


@pytest.mark.parametrize(
    ("address", "words"), [("127.0.0.1:1", "Connection refused"), ("ray://127.0.0.1:1", "Ray Client is not supported")]
)
def test_nobody_at_the_address(address: str, words: str, data: Path) -> None:
    with pytest.raises(AlexprepError, match=rf"--ray-address {address}: no connection \(.*{words}"):
        rgb_statistics.pca_stats(data, "train", RayEngine(address))


def test_versions_with_holes_are_refused(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    monkeypatch.setattr(ray, "__version__", "2.55.1")
    with pytest.raises(AlexprepError, match=r"Ray 2\.55\.1 is older than 2\.56.*pip install 'ray>=2\.56'"):
        rgb_statistics.pca_stats(data, "train", RayEngine())
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(AlexprepError, match=re.escape("pip install 'alexprep[ray]'")):
        rgb_statistics.pca_stats(data, "train", RayEngine())
    with pytest.raises(AlexprepError, match="--image-seconds 0 is not above 0"):
        RayEngine(image_seconds=0)


def test_a_folder_that_a_worker_does_not_see_is_named(photos: Path, tmp_path: Path) -> None:
    """/proc/self/fd/N is a folder that only this process has, as another machine's disk would be."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(AlexprepError, match=f"does not see /proc/self/fd/{descriptor}/out/plan.json as .* does"):
            convert(photos, Path(f"/proc/self/fd/{descriptor}/out"), OPTIONS, 1)
        shutil.copytree(photos, tmp_path / "source")
        with pytest.raises(
            AlexprepError, match=r"does not see /.*JPEG as .* does \(\d+ bytes there, FileNotFoundError"
        ):
            convert(unseen(tmp_path / "source", descriptor), tmp_path / "out", OPTIONS, 1)
    finally:
        os.close(descriptor)


def unseen(source: Path, descriptor: int) -> Any:
    """The source below a folder that only this process has."""
    from alexprep.shards.sources.detection import find_source
    from alexprep.shards.storage import LocalFiles

    there = LocalFiles(f"/proc/self/fd/{descriptor}/source".encode())
    return dataclasses.replace(find_source(str(source)), files=there)
