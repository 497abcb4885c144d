"""What many tests share: small sets of photo-like images, data sets made of them, and a deadline for each."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from alexprep.cli.main import main
from alexprep.pipeline.autotune import search
from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.errors import command_line_words
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions

# Sizes as photos have them and as they should not: oblong both ways, odd, smaller than the target, exactly the target.
SIZES = ((90, 61), (61, 90), (64, 64), (33, 47), (47, 33), (128, 65), (65, 200), (40, 40), (100, 75), (75, 100))

Photo = Callable[..., Image.Image]

SECONDS = 600  # for a test, however busy the machine; its module may have another `SECONDS`
FIXTURE_SECONDS = 1200  # for fixtures, some of which many tests share
GRACE = 60  # seconds more, for what is late to be ended
_stderr = 2
_words = (
    contextlib.ExitStack()
)  # tests are told options as users of the command line are; what programs are told has its own

# For `from tests.made_up import …`, also in ranks and workers, which inherit it.
sys.path.append(str(Path(__file__).parents[1]))

# The nets of tests are so small that torch's threads would only wait for each other, long where the machine is busy.
# Processes that tests start inherit it. OMP_NUM_THREADS=N in the environment asks for others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Jobs in the background are started with these ignored, which processes that tests start would inherit.
for _signal in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, signal.default_int_handler if _signal is signal.SIGINT else signal.SIG_DFL)
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make stress` gives --whole."""
    parser.addoption(
        "--whole", action="store_true", help="only tests that try a seeded sample: let them try every case"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --whole the tests that have no more cases to try, which do not ask for the fixture `whole`, are left out."""
    if config.getoption("--whole"):
        items[:] = [item for item in items if "whole" in getattr(item, "fixturenames", ())]


def pytest_configure() -> None:
    """Keeps the real descriptor 2: but for this moment, pytest holds back what is written there."""
    global _stderr
    _stderr = os.dup(2)
    _words.enter_context(command_line_words())


@contextlib.contextmanager
def deadline(what: str, seconds: int) -> Iterator[None]:
    """Fails a test, or its fixtures, that hang.

    The failure is no `Exception`, so that the code under test does not take it for its own, and comes again where something
    still waits on the way out. What Python cannot interrupt, C code that waits, ends the process: with the stacks of all threads.
    """

    def late(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"{what}: not done in {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, GRACE / 4)
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=_stderr)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with deadline(f"what is made for {item.nodeid}", FIXTURE_SECONDS):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with deadline(item.nodeid, getattr(getattr(item, "module", None), "SECONDS", SECONDS)):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    with deadline(f"what is put away after {item.nodeid}", FIXTURE_SECONDS):
        return (yield)


def make_photo(width: int, height: int, seed: int) -> Image.Image:
    """A smooth random RGB picture with fine detail on top."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    detail = rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + detail, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """An image's bytes in a format that Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def _memory_store() -> Iterator[None]:
    """What a test leaves in fsspec's store in memory, of which a process has one, the next test does not find."""
    files, folders = MemoryFileSystem.store.copy(), MemoryFileSystem.pseudo_dirs.copy()
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.store.update(files)
    MemoryFileSystem.pseudo_dirs[:] = folders


@pytest.fixture(scope="session", autouse=True)
def _warm_processes() -> Iterator[None]:
    from tests.support import warm_processes

    with warm_processes.installed():
        yield


@pytest.fixture
def cold_processes() -> Iterator[None]:
    """Processes of Python begin with nothing imported, as they do for a user."""
    from tests.support import warm_processes

    with warm_processes.cold():
        yield


@pytest.fixture(scope="session")
def whole(request: pytest.FixtureRequest) -> bool:
    """Whether every case is to be tried, as `make stress` wants it, and not a seeded sample of them."""
    return bool(request.config.getoption("--whole"))


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Exit status, output and messages of a command in this process, which has imported torch, and in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["alexprep", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def photo() -> Photo:
    return make_photo


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    return encode


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with splits: 48 train and 20 val images in 4 classes, of all `SIZES`."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 48), ("val", 20)):
        for n in range(count):
            folder = root / split / f"class{n % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            image = make_photo(*SIZES[n % len(SIZES)], seed=n + 1000 * (split == "val"))
            (folder / f"{n:03d}.JPEG").write_bytes(encode(image, quality=92))
    return root


@pytest.fixture(scope="session")
def data(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos` as a finished data set of 64-pixel images in shards of 7, with statistics. Not to be changed."""
    folder = tmp_path_factory.mktemp("data")
    convert(photos, folder, ShardOptions(Target(size=64), shard_samples=7), 1)
    rgb_statistics.publish_statistics(rgb_statistics.pca_stats(folder, "train", 1), folder, "train")
    return folder


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """Real photos, where ALEXPREP_SAMPLE_DATA names the folder that holds them."""
    folder = os.environ.get("ALEXPREP_SAMPLE_DATA")
    if not folder:
        pytest.skip("ALEXPREP_SAMPLE_DATA is not set")
    return Path(folder)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> Iterator[int]:
    """A fixed seed that is printed when the test fails."""
    value = 20_261_121
    yield value
    print(f"seed {value} in {request.node.name}")  # noqa: T201


@pytest.fixture
def patient_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """`alexprep tune` has all its turns, one a value, in half a second by its clock, of which no turn takes more than a small part, however late it is."""
    shown, last = 0.0, time.monotonic()

    def clock() -> float:
        nonlocal shown, last
        now = time.monotonic()
        shown, last = shown + min(now - last, 0.012), now
        return shown

    monkeypatch.setattr("alexprep.pipeline.autotune.ROUNDS", 1)
    monkeypatch.setattr("alexprep.pipeline.autotune.search", functools.partial(search, clock=clock))
