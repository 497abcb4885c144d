"""How much damage `alexprep verify` finds, beside what a plain tar reader notices.

    python benchmarks/verify.py PHOTOS [--flips 20000] [--save]

A small data set is made of PHOTOS (class folders): 12 images of 32 pixels in 4 shards, and its statistics. Each case damages
one file, verifies the whole set, and mends the file. A plain reader (Python's tarfile, streaming, as webdataset and Ray use
it) reads the damaged tars: it "notices" where it raises an error.
"""

from __future__ import annotations

import collections
import random
import tarfile
import tempfile
import time
from pathlib import Path

from common import command_line, report

from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.verification import verify
from alexprep.shards.worker_pool import InProcessEngine

ENGINE = InProcessEngine()


def found(data: Path, path: Path) -> str:
    """What `verify` makes of a damaged file."""
    try:
        problems = verify(data, ENGINE).problems
    except AlexprepError as error:
        return "named" if path.name in str(error) else "found, another file named"
    name = str(path.relative_to(data))
    if any(name == problem.file or name in problem.what for problem in problems):
        return "named"
    return "found, another file named" if problems else "missed"


def seen(path: Path, whole: str) -> str:
    """What a reader that trusts the tar makes of a damaged one; `whole` is what it made of the tar before."""
    content = plain_reader(path)
    return "error" if content == "error" else "silently other" if content != whole else "the same"


def plain_reader(path: Path) -> str:
    """The members of a tar as text, or "error"."""
    try:
        with tarfile.open(path, "r|*") as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    except (tarfile.TarError, OSError, EOFError, ValueError):
        return "error"
    return repr(members)


def main() -> None:
    """Runs the benchmark."""
    parser = command_line(__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--flips", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    result: dict[str, object] = {"flips": arguments.flips, "seed": arguments.seed}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        convert(arguments.photos, data, ShardOptions(Target(size=32), shard_samples=3, limit=12), ENGINE)
        rgb_statistics.publish_statistics(rgb_statistics.pca_stats(data, "train", ENGINE), data, "train")
        files = sorted(path for path in data.rglob("*") if path.is_file())
        sizes = [path.stat().st_size for path in files]
        result["bytes"] = sum(sizes)

        alarms = sum(bool(verify(data, ENGINE, decode=n % 10 == 0).problems) for n in range(1000))
        result["false_alarms_of_1000"] = alarms

        start = time.monotonic()
        flips, plain, cuts, plain_cuts = (collections.Counter[str]() for _ in range(4))
        for n in range(arguments.flips):
            # Every other one in a tar; the rest over all files, small ones too.
            path = rng.choice([p for p in files if p.suffix == ".tar"]) if n % 2 else rng.choice(files)
            good = path.read_bytes()
            position = rng.randrange(len(good))
            bad = bytearray(good)
            bad[position] ^= 1 << rng.randrange(8)
            whole = plain_reader(path) if path.suffix == ".tar" else ""
            path.write_bytes(bad)
            try:
                verdict = found(data, path)
                flips[verdict] += 1
                if verdict != "named":
                    print(f"{path.relative_to(data)} byte {position}: {verdict}")
                if whole:
                    plain[seen(path, whole)] += 1
            finally:
                path.write_bytes(good)
        result["flip_seconds"] = round(time.monotonic() - start, 1)
        result["flips_found"], result["flips_plain_reader"] = dict(flips), dict(plain)

        for path in (p for p in files if p.suffix == ".tar"):
            good, whole = path.read_bytes(), plain_reader(path)
            for length in range(0, len(good), 512):
                path.write_bytes(good[:length])
                cuts[found(data, path)] += 1
                plain_cuts[seen(path, whole)] += 1
            path.write_bytes(good)
        result["cuts_found"], result["cuts_plain_reader"] = dict(cuts), dict(plain_cuts)
    report("verify", result, arguments.save)


if __name__ == "__main__":
    main()
