"""Everything that a GPU has to show, in one call: tests, decode rates, AlexNet's step and its kernels, waiting for data, sharding, a training.

python benchmarks/gpu.py PHOTOS [--cifar FOLDER_OR_TAR] [--out gpu.json] [--only tests,loader,…] [--device cuda] [--seconds 480]

PHOTOS: a tree of class folders, a few hundred photos or more; they are linked again and again up to --inputs. Each part is a process
with a time limit of its own; what it found is in --out as soon as it ends, its output beside it as PART.log. With --device cpu and small
numbers the same parts run without a GPU (`make gpu-check`). From a source tree that is not installed: PYTHONPATH=build/types python benchmarks/gpu.py …
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import command_line, described

ROOT = Path(__file__).parents[1]
_TEST_SECONDS = 140.0
MAIN = [sys.executable, "-m", "alexprep.cli"]
Figures = dict[str, Any]


class Call(argparse.Namespace):
    """What the command line asks for; `work` is a folder that all parts share."""

    photos: Path
    cifar: Path | None
    work: Path
    inputs: int
    batch_sizes: list[int]
    device: str
    small: bool

    @property
    def data(self) -> Path:
        """256-pixel JPEGs of the photos, which the part "data" makes."""
        return self.work / "data-cpu"

    @property
    def raw(self) -> Path:
        """The same as pixels, which nobody has to decode."""
        return self.work / "data-raw"


def tests(call: Call) -> Figures:
    """The tests that need a GPU: a process a file, so that what a file found is known also where another has no time to end."""
    files = [path for path in sorted(ROOT.glob("tests/**/*.py")) if "mark.gpu" in path.read_text()]
    with ThreadPoolExecutor(2 if call.small else 8) as pool:
        found = dict(zip([path.name for path in files], pool.map(lambda path: _tested(path, call), files), strict=True))
    return {"rc": int(any(each["failed tests"] for each in found.values())), **found}


def _tested(path: Path, call: Call) -> Figures:
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "--tb=short",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    words += ["--collect-only"] if call.small else []
    with tempfile.TemporaryFile("w+") as output:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([*words, path], cwd=ROOT, stdout=output, stderr=output, check=False, timeout=_TEST_SECONDS)
        output.seek(0)
        text = output.read()
    print(text, flush=True)
    fates = re.findall(r"^tests/\S+::(.+?) (PASSED|FAILED|ERROR|SKIPPED)", text, re.MULTILINE)
    failed = [name for name, fate in fates if fate in ("FAILED", "ERROR")]
    return {
        "tests": len(fates),
        "failed tests": failed,
        "ended": bool(re.search(r"^=+ .* in [0-9.]+s", text, re.MULTILINE)),
    }


def data(call: Call) -> Figures:
    """Shards and statistics of the photos, made on the CPU with all cores; later parts read them."""
    from shard import repeated  # as links

    shutil.rmtree(call.work)  # of an earlier run: what is finished would not be made again
    repeated(call.photos, call.work / "photos", call.inputs)
    workers = len(os.sched_getaffinity(0))
    figures: Figures = {"shard": _sharded(call, "cpu", workers, call.data)}
    began = time.monotonic()
    _alexprep(["pca-stats", str(call.data), "--json"])
    figures["pca-stats, images/s, whole"] = call.inputs / (time.monotonic() - began)
    _sharded(call, "cpu", workers, call.raw, "--format", "raw")
    _alexprep(["pca-stats", str(call.raw), "--json"])
    return figures


def shard(call: Call) -> Figures:
    """`alexprep shard` on the GPU, by the number of workers."""
    workers = (1,) if call.small else (8, 16)
    return {f"{n} workers": _sharded(call, call.device, n, call.work / f"data-{call.device}-{n}") for n in workers}


def _sharded(call: Call, device: str, workers: int, out: Path, *more: str) -> Figures:
    words = [
        "shard",
        str(call.work / "photos"),
        "--out",
        str(out),
        "--workers",
        str(workers),
        "--device",
        device,
        "--json",
    ]
    words += ["--shard-samples", "200" if call.small else "512", *more]
    began = time.monotonic()
    found = _alexprep(words)
    return {"workers": workers, "images/s, whole": call.inputs / (time.monotonic() - began), **found}


def loader(call: Call) -> Figures:
    """Loader's rate by where it decodes, its threads, the share of the JPEG engines and the form of a batch."""
    from alexprep.pipeline.loader import Loader
    from alexprep.pipeline.loader_settings import Tuning

    cuda = call.device == "cuda"
    tunings = [Tuning(threads, 3, "cpu") for threads in ((1,) if call.small else (8, 16))]
    if cuda:
        tunings += [Tuning(4, 3, "cuda", share) for share in (0.0, 0.65, 0.8, 1.0)]
        tunings += [Tuning(8, 3, "cuda", 1.0)]
    forms: list[Any] = [("float32", "channels_last"), ("float16", "channels_last"), ("float32", "NCHW")]
    figures = {}
    for batch_size in call.batch_sizes:
        for tuning in tunings:
            for dtype, memory_format in forms if tuning == tunings[-1] else forms[:1]:
                name = f"batch {batch_size}, {tuning.words(call.device)}, {dtype} {memory_format}"
                name += "" if cuda else f", decode={tuning.decode}"
                options: Any = {"device": call.device, "tuning": tuning, "dtype": dtype, "memory_format": memory_format}
                with Loader(call.data, batch_size=batch_size, drop_last=True, **options) as batches:
                    figures[name] = _rate(batches, batch_size, 0.2 if call.small else 1.2)
                print(name, figures[name], flush=True)
    return figures


def _rate(batches: Any, batch_size: int, seconds: float) -> Figures:
    """Images/s after a warm-up; and what an image costs the thread that feeds, and all threads, in processor time."""
    import torch

    steps, began, threads, processes = 0, 0.0, 0.0, 0.0
    warm = time.perf_counter() + seconds / 2
    while True:
        for _ in batches:
            if not began:
                if time.perf_counter() > warm:
                    began, threads, processes = time.perf_counter(), time.thread_time(), time.process_time()
                continue
            steps += 1
            if time.perf_counter() - began > seconds:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                images = steps * batch_size
                return {
                    "images/s": images / (time.perf_counter() - began),
                    "µs an image of the feeding thread": 1e6 * (time.thread_time() - threads) / images,
                    "µs an image of all threads": 1e6 * (time.process_time() - processes) / images,
                }


def step(call: Call) -> Figures:
    """AlexNet's step on one batch of noise, in each precision and memory format."""
    figures = {}
    for batch_size in call.batch_sizes:
        words = [sys.executable, "step.py", "--device", call.device, "--recipes", "tiny" if call.small else "alexnet"]
        words += ["--batch-size", str(batch_size), "--no-compile", *_turns(call)]
        figures[f"batch {batch_size}"] = _last_json(words, Path(__file__).parent)["figures"]
    return figures


def compiled(call: Call) -> Figures:
    """The same compiled, in bf16 and channels last alone: compiling takes a minute."""
    words = [sys.executable, "step.py", "--device", call.device, "--recipes", "tiny" if call.small else "alexnet"]
    words += ["--batch-size", str(call.batch_sizes[-1]), *_turns(call)]
    return dict(_last_json([*words, "--ways", "bf16, channels last"], Path(__file__).parent)["figures"])


def _turns(call: Call) -> list[str]:
    return ["--rounds", "3", "--turn-seconds", "0.2" if call.small else "0.4"]


def profile(call: Call) -> Figures:
    """Which kernels a step of AlexNet in bf16 and channels last spends its time in."""
    import torch
    from step import Contest, Way
    from torch.profiler import ProfilerActivity

    from alexprep.train.training_state import take_step

    figures: Figures = {}
    for batch_size in call.batch_sizes:
        way = Way("bf16", True, False)
        contest = Contest("tiny" if call.small else "alexnet", torch.device(call.device), [way], batch_size)
        contest.turn(way, 3)
        state, steps = contest.prepared(way), 1 if call.small else 10
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if call.device == "cuda" else [])]
        with torch.profiler.profile(activities=activities) as trace:
            for _ in range(steps):
                take_step(state, contest.images[True], contest.labels)
            if call.device == "cuda":
                torch.cuda.synchronize()
        averages = trace.key_averages()
        time_of = "self_device_time_total" if call.device == "cuda" else "self_cpu_time_total"
        ranked = sorted(averages, key=lambda event: getattr(event, time_of), reverse=True)
        kernels = [event for event in ranked if str(event.device_type).endswith("CUDA")] or ranked
        print(averages.table(sort_by=time_of, row_limit=40, max_name_column_width=90))
        figures[f"batch {batch_size}: µs a step"] = {
            event.key[:120]: [round(getattr(event, time_of) / steps, 1), event.count / steps] for event in kernels[:30]
        }
    return figures


def overlap(call: Call) -> Figures:
    """Training with data, the same steps on one batch, and the loader alone: JPEGs, all on the engines where there are any, and pixels."""
    from alexprep.pipeline.loader_settings import Tuning, save_tuning, this_machine

    settings = dataclasses.asdict(Tuning(4, 3, None, 1.0))
    words = ["bench", "overlap", "--device", call.device, "--json"]
    words += ["--steps", "1", "--rounds", "1"] if call.small else ["--rounds", "2"]
    figures = {}
    for data in (call.data,) if call.small else (call.data, call.raw):
        save_tuning(data, this_machine(call.device), {"settings": settings, "measured_at": "by hand"})
        for batch_size in call.batch_sizes:
            fast = ["--precision", "bf16", "--channels-last", "--batch-size", str(batch_size), "--data", str(data)]
            figures[f"{data.name}, batch {batch_size}"] = _alexprep([*words, *fast])
    return figures


def tune(call: Call) -> Figures:
    """`alexprep tune`: where a pipeline takes 3 s to open, 16 values in turns take minutes."""
    words = ["tune", "--data", str(call.data), "--device", call.device, "--json"]
    return _alexprep([*words, "--seconds", "2" if call.small else "170", "--batch-size", str(call.batch_sizes[-1])])


def codec(call: Call) -> Figures:
    """The codec on the GPU beside that on one core."""
    words = [sys.executable, "shard_cuda.py", str(call.photos), "--device", call.device]
    return dict(_last_json([*words, "--limit", "8" if call.small else "298"], Path(__file__).parent)["figures"])


def cifar(call: Call) -> Figures:
    """A training from JPEGs to a test error."""
    if call.cifar is None:
        return {"left out": "no --cifar"}
    data, figures = call.work / "cifar-data", {}
    _alexprep(["shard", str(call.cifar), "--out", str(data), "--size", "32"])
    _alexprep(["pca-stats", str(data)])
    for recipe, more in (("cifar10-fast", ["--precision", "bf16"]), ("cifar10-quick", [])):
        began = time.monotonic()
        words = [
            "train",
            "--data",
            str(data),
            "--recipe",
            recipe,
            "--device",
            call.device,
            "--runs",
            str(call.work / "runs"),
        ]
        found = _alexprep([*words, *more, "--json", *(["--steps", "2"] if call.small else [])])
        figures[recipe] = {"seconds": time.monotonic() - began, **found}
    return figures


PARTS: dict[str, tuple[Callable[[Call], Figures], float]] = {  # in the order of worth, each with its limit, seconds
    "data": (data, 80),
    "tests": (tests, _TEST_SECONDS + 10),
    "loader": (loader, 90),
    "step": (step, 90),
    "profile": (profile, 40),
    "overlap": (overlap, 90),
    "shard": (shard, 60),
    "codec": (codec, 40),
    "compiled": (compiled, 100),
    "cifar": (cifar, 150),
    "tune": (tune, 200),
}


def _alexprep(words: list[str]) -> Figures:
    """Runs a command; its JSON document where it gives one."""
    return _last_json([*MAIN, *words], None)


def _last_json(words: list[str], folder: Path | None) -> Figures:
    done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout[-8000:], flush=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words[1:4])} … ended with {done.returncode}")
    with contextlib.suppress(IndexError, ValueError):
        found: Figures = json.loads(done.stdout.splitlines()[-1])
        return found
    return {}


def main() -> None:
    """Runs the parts one after the other, each in a process of its own."""
    parser = command_line(__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as class folders or a tar of them")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu" / "gpu.json")
    parser.add_argument("--work", type=Path, help="a folder for data; default: data beside --out")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, in this order")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--inputs", type=int, default=8192)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 512])
    parser.add_argument(
        "--seconds", type=float, default=480.0, help="for all parts; those that come too late are left out"
    )
    parser.add_argument("--small", action="store_true", help="tiny networks and short turns, to try this file")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    call = parser.parse_args(namespace=Call())
    call.photos, call.out = call.photos.resolve(), call.out.resolve()
    call.work = (call.work or call.out.parent / "data").resolve()
    for folder in (call.work, call.out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if call.part:
        print("\n" + json.dumps(PARTS[call.part][0](call)))
        return
    ends = time.monotonic() + call.seconds
    figures: Figures = {}
    for name in call.only.split(","):
        left = ends - time.monotonic()
        if left < 5:
            figures[name] = {"left out": "no time was left"}
            continue
        began = time.monotonic()
        figures[name] = _part(name, min(left, PARTS[name][1]), call.out.parent / f"{name}.log")
        figures[name]["part seconds"] = round(time.monotonic() - began, 1)
        print(f"{name}: {json.dumps(figures[name])[:1500]}", flush=True)
        call.out.write_text(json.dumps(described("gpu", figures), indent=1, ensure_ascii=False) + "\n")
    failed = [name for name, found in figures.items() if "error" in found or found.get("rc")]
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


def _part(name: str, seconds: float, log: Path) -> Figures:
    """What a part's process printed last; an error is a figure too."""
    words = [sys.executable, __file__, *sys.argv[1:], "--part", name]
    alone = {"OMP_NUM_THREADS": "1"} if "--small" in words else {}  # threads that wait for one another make trials slow
    with log.open("w+") as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **alone}
        )
        try:
            code: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"still running after {seconds:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
        output.seek(0)
        text = output.read()
    if code == 0:
        return dict(json.loads(text.splitlines()[-1]))
    return {"error": code, "output": text[-1500:]}


if __name__ == "__main__":
    main()
