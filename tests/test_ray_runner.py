"""Sharding and statistics on a Ray cluster of three nodes, all on this machine: the same bytes, whatever is lost."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.ray_runner import RayEngine
from alexprep.shards.worker_pool import InProcessEngine
from tests.stress.misbehaving import Held, failing, fragile, refusing

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'alexprep[ray]'")
# Ray leaves sockets and processes to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore")

SECONDS = 600  # for a test: nothing here may depend on how fast the machine is
PATIENCE = 300  # for what is waited for
OPTIONS = ShardOptions(Target(size=64), shard_samples=7)
SINGLES = ShardOptions(Target(size=64), shard_samples=1, limit=12)  # 24 shards
MARK = "ALEXPREP_TEST_RAY"
Made = TypeVar("Made")

# The command, with a codec that waits. Its arguments come after the codec's folder.
COMMAND = """
import functools, sys
from alexprep.shards import conversion
from alexprep.cli.main import main
from tests.stress.misbehaving import Held
make_codec = functools.partial(Held, sys.argv.pop(1))
conversion.convert = functools.partial(conversion.convert, make_codec=make_codec)
main()
"""


def fingerprint(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, the statistics left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "stats")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {PATIENCE} s")


def finished(out: Path) -> int:
    """How many shards count."""
    return len(list(out.glob("*/*-*.json")))


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


def patiently(make: Callable[[], Made]) -> Made:
    """Ray gives a node 30 seconds to start, which on a busy machine may not suffice."""
    for _ in range(4):
        with contextlib.suppress(Exception):
            return make()
    return make()


@pytest.fixture(scope="session", autouse=True)
def _importable() -> Iterator[None]:
    """Lets Ray's workers, and commands, import `tests`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def cluster(_importable: None) -> Iterator[Any]:
    """A head without CPUs and two nodes of one, on the loopback interface; one for the whole run."""
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # What keeps Ray from taking the machine's address for 127.0.0.1, in this process and in drivers that it starts.
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        patch.setenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # whether or not this user has a token
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_gcs_server_port_wait_time_s", str(PATIENCE))
        head = {"num_cpus": 0, "include_dashboard": False}
        cluster = patiently(functools.partial(Cluster, initialize_head=True, head_node_args=head))
        for _ in range(2):
            patiently(functools.partial(cluster.add_node, wait=False, num_cpus=1))
        cluster.wait_for_nodes(timeout=PATIENCE)
        yield cluster
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]
        del cluster
        gc.collect()  # here, where Ray's unclosed files are no errors


@contextlib.contextmanager
def connected(cluster: Any, **options: Any) -> Iterator[RayEngine]:
    """An engine that uses the connection which this process has."""
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", **options)
    try:
        yield RayEngine()
        assert ray.is_initialized()  # it stays
    finally:
        ray.shutdown()


def test_the_same_bytes_as_locally(cluster: Any, photos: Path, data: Path, tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    report = convert(
        photos, tmp_path / "out", OPTIONS, RayEngine(cluster.address), lambda *progress: heard.append(progress)
    )
    assert fingerprint(tmp_path / "out") == fingerprint(data)
    assert report.written == 68
    assert heard[-1] == (68, 68) and heard == sorted(heard)
    assert not ray.is_initialized()


def test_results_and_errors_of_tasks_arrive(cluster: Any, data: Path) -> None:
    """Also that an input ends processes; and statistics have the same bits."""
    with connected(cluster) as engine:
        with pytest.raises(AlexprepError, match=r"^--thing 7 is wrong$"):
            list(engine.run(refusing, [7, 7, 7]))
        with pytest.raises(RuntimeError, match=r"^in a Ray worker: ZeroDivisionError: integer division"):
            list(engine.run(failing, [1, 0, 1]))
        assert list(engine.run(failing, [1, 1])) == [1, 1]
        reason = "ends the process that reads it (SIGABRT)"
        assert dict(engine.run(fragile, [0, 2, 9])) == {0: {0: reason}, 2: {2: reason}, 9: {}}
        one, other = (rgb_statistics.pca_stats(data, "train", each) for each in (1, engine))
    assert one.data_digest == other.data_digest
    for name in ("mean_HWC", "covariance", "eigenvalues", "eigenvectors"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes()


def test_a_machine_without_alexprep_is_named(cluster: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'alexprep': raise ModuleNotFoundError(\"No module named 'alexprep'\", name=name)\n"
        "sys.meta_path.insert(0, Without())\n"
    )
    environment = {"env_vars": {"PYTHONPATH": str(tmp_path)}}
    words = "cannot import alexprep: pip install alexprep there"
    with connected(cluster, runtime_env=environment) as engine, pytest.raises(AlexprepError, match=words):
        rgb_statistics.pca_stats(data, "train", engine)


def test_the_driver_a_worker_and_a_node_are_lost(
    cluster: Any, photos: Path, tmp_path: Path, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """One after the other, each with shards that are finished, at work and to come; then the run goes on to its end.

    One node is left, which suffices for the other tests.
    """
    rng, out = random.Random(seed), tmp_path / "out"
    driver = subprocess.Popen(
        command(photos, out, "--ray-address", cluster.address), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: finished(out) >= 4, "the first shards")
    driver.kill()
    driver.wait(timeout=PATIENCE)

    def workers() -> list[int]:
        return sorted(descendants().intersection(processes(b"ray::_in_ray_worker", "cmdline")))

    def disturb() -> None:
        lost = rng.choice(wait_until(workers, "a worker at work"))
        os.kill(lost, signal.SIGKILL)
        wait_until(lambda: [worker for worker in workers() if worker != lost], "its successor, or another one")
        cluster.remove_node(rng.choice(list(cluster.worker_nodes)), allow_graceful=False)
        (tmp_path / "go").touch()

    engine, make_codec = RayEngine(cluster.address, SECONDS), functools.partial(Held, str(tmp_path))
    with ThreadPoolExecutor(1) as beside:
        disturbed = beside.submit(disturb)
        report = convert(photos, out, SINGLES, engine, make_codec=make_codec)
        disturbed.result(PATIENCE)
    assert capfd.readouterr().out == ""
    assert 24 - 8 <= report.made_inputs <= 24 - 4
    convert(photos, tmp_path / "alone", SINGLES, InProcessEngine())
    assert fingerprint(out) == fingerprint(tmp_path / "alone")


def command(source: Path, out: Path, *words: str) -> list[str]:
    """Comes to its end only when somebody makes the file `go` beside `out`."""
    shard = [sys.executable, "-c", COMMAND, str(out.parent), "shard", str(source), "--out", str(out), "--size", "64"]
    return [*shard, "--shard-samples", "1", "--limit", "12", "--image-seconds", str(SECONDS), "--engine", "ray", *words]


def test_ctrl_c_leaves_nothing_and_nobody_can_listen_in(photos: Path, tmp_path: Path) -> None:
    """A Ray started for one command: no port off the loopback interface while it runs, no process after it."""
    out = tmp_path / "out"
    mark = f"{MARK}={tmp_path}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    driver = subprocess.Popen(
        command(photos, out),
        env=environment | dict([mark.split("=", 1)]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wait_until(lambda: finished(out) >= 4 or driver.poll() is not None, "the first shards")
    ours = processes(mark.encode(), "environ")
    addresses = listening(ours)
    os.killpg(driver.pid, signal.SIGINT)
    _, errors = driver.communicate(timeout=PATIENCE)
    assert len(ours) > 5 and len(addresses) >= 4, errors
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
