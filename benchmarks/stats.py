"""pca-stats beside decoding alone, on one core.

python benchmarks/stats.py DATA [--save]        DATA: a data set made by `alexprep shard`
"""

from __future__ import annotations

from pathlib import Path

from common import command_line, in_turns, report

from alexprep.shards import rgb_statistics
from alexprep.shards.image_codec import Codec, Target
from alexprep.shards.rgb_statistics import Accumulator
from alexprep.shards.sample_reader import Samples
from alexprep.shards.worker_pool import one_thread


def main() -> None:
    """Times decoding, the moments of decoded images, and both as the command does them."""
    parser = command_line(__doc__)
    parser.add_argument("data", type=Path)
    arguments = parser.parse_args()
    one_thread()
    samples = Samples(arguments.data, "train")
    size = samples.common_size
    assert size is not None, "a mean image needs images of one size"
    codec = Codec(Target())
    encoded = [samples.encoded(row).tobytes() for row in range(min(len(samples), 1000))]
    planes = [image for data in encoded[:50] if (image := codec.decode(data, planar=True)) is not None]

    def decode() -> int:
        for data in encoded:
            codec.decode(data)
        return len(encoded)

    def moments() -> int:
        accumulator = Accumulator(*size)
        for _ in range(4):
            for image in planes:
                accumulator.add(image)
        return 4 * len(planes)

    def both() -> int:
        accumulator = Accumulator(*size)
        for row in range(len(encoded)):
            image = rgb_statistics._planes(samples.encoded(row), samples.dataset["image"])
            assert image is not None
            accumulator.add(image)
        return len(encoded)

    rates = in_turns({"decode": decode, "moments": moments, "both": both})
    figures = {
        "images": len(encoded),
        "decode alone, images/s": rates["decode"],
        "moments alone, images/s": rates["moments"],
        "pca-stats, images/s": rates["both"],
        "pca-stats / decode alone": rates["both"] / rates["decode"],
    }
    report("stats", figures, arguments.save)


if __name__ == "__main__":
    main()
