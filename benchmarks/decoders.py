"""How fast JPEG can be decoded at all: nvImageCodec, which sharding uses, beside every other decoder that pip installs.

python benchmarks/decoders.py SOURCE [--limit 300] [--save]

SOURCE: a tree of photos. An environment for the others is made below build/benchmarks when it is first asked for.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from common import command_line, report
from processes import CONTESTANTS, Environment, interpreter

NEEDS = Environment(
    ("av", "imagecodecs", "kornia-rs", "nvidia-nvimgcodec-cu12", "opencv-python-headless", "pillow", "simplejpeg")
)


def main() -> None:
    """Runs the benchmark."""
    parser = command_line(__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--limit", type=int, default=300, help="photos")
    arguments = parser.parse_args()
    command = [
        interpreter("decoders", NEEDS),
        str(CONTESTANTS / "decoders.py"),
        str(arguments.source),
        str(arguments.limit),
    ]
    said = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    rates = said.pop("images/s")
    best = max(rate for name, rate in rates.items() if "," not in name)
    figures = said | {f"{name}: images/s": rate for name, rate in rates.items()}
    report(
        "decoders",
        figures | {"nvImageCodec / the fastest exact one": next(iter(rates.values())) / best},
        arguments.save,
    )


if __name__ == "__main__":
    main()
