"""What a trained net's features find on CIFAR-10: nearest images, binary codes, exchanged labels; and that `predict` equals `eval`.

    python benchmarks/similar.py CIFAR.tar DATA RUN [--work FOLDER] [--save]

CIFAR.tar has the pictures as train/CLASS/… and test/CLASS/…; DATA is what `alexprep shard CIFAR.tar --size 32` and `pca-stats` made of it, RUN the
folder of a run that was trained on that. Times are CPU time, which other programs disturb less; all is computed by one thread.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import command_line, report
from numpy.typing import NDArray

QUERIES, NEAREST, EXCHANGED, MEMBERS = 1000, 10, 100, 1000
BITS = (64, 128, 256)


def main() -> None:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("tar", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--work", type=Path, help="keep the dataset with exchanged labels here")
    parser.add_argument("--recipe", help="where the run's recipe file is, if it has one")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    figures = agreement(given.data, given.run, given.recipe) | equality(given.data, given.run, given.recipe)
    with tempfile.TemporaryDirectory() as folder:
        figures |= exchanged(given.tar, given.run, given.work or Path(folder), given.recipe)
    report("similar", figures, given.save)


def agreement(data: Path, run: Path, recipe: str | None) -> dict[str, Any]:
    """How often the ten nearest training images have a test image's class: by features, by codes of them, by pixels."""
    from alexprep.shards import read_index
    from alexprep.train import Place, write_codes, write_outputs

    train, test = (
        write_outputs(Place(run), split=split, data=data, threads=1, recipe=recipe) for split in ("train", "test")
    )
    labels, wanted = (np.asarray(read_index(data, split)["label"]) for split in ("train", "test"))
    chosen = np.sort(np.random.default_rng(0).choice(len(wanted), QUERIES, replace=False))
    queries = np.asarray(test.array()[chosen])
    values = int(train.array().shape[1])

    def share(rows: NDArray[np.int64]) -> float:
        return 100 * float(np.mean(labels[rows] == wanted[chosen][:, None]))

    found: dict[str, Any] = {
        "images searched": len(labels),
        "layer": train.facts["layer"],
        "features: bytes an image": 4 * values,
        "chance: class agreement, percent": 100 * float(np.mean(np.bincount(labels)[wanted[chosen]] / len(labels))),
        "features: class agreement, percent": share(train.nearest(queries, NEAREST)[1]),
        "features: CPU ms a search, one image": milliseconds(lambda: train.nearest(queries[:1], NEAREST)),
        "features: CPU ms a search, 100 images at a time": milliseconds(lambda: train.nearest(queries[:100], NEAREST))
        / 100,
    }
    for bits in BITS:
        begun = time.process_time()
        codes = write_codes(train, bits)
        found[f"codes of {bits} bits: CPU s to make"] = time.process_time() - begun
        found[f"codes of {bits} bits: bytes an image"] = bits // 8
        for among in (10, 100):
            found[f"codes of {bits} bits: recall@10 among {among}"] = codes.facts[f"recall@10 among {among}"]
        found[f"codes of {bits} bits: class agreement, percent"] = share(codes.nearest(queries, NEAREST)[1])
        one = milliseconds(lambda codes=codes: codes.nearest(queries[:1], NEAREST))  # type: ignore[misc]
        found[f"codes of {bits} bits: CPU ms a search, one image"] = one
    return found | {"pixels: class agreement, percent": share(by_pixels(data, chosen))}


def by_pixels(data: Path, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """The nearest training images by the Euclidean distance of pixels."""
    from PIL import Image

    from alexprep.shards import Samples
    from alexprep.train.neighbour_search import nearest

    def pixels(split: str, rows: Any) -> NDArray[np.float32]:
        samples = Samples(data, split)
        images = [np.asarray(Image.open(io.BytesIO(samples.encoded(int(row)).tobytes()))) for row in rows]
        return np.stack(images).reshape(len(images), -1).astype(np.float32)

    return nearest(pixels("train", range(len(Samples(data, "train")))), pixels("test", chosen), NEAREST)[1]


def milliseconds(search: Callable[[], object], rounds: int = 20) -> float:
    """CPU time of a search, the least of some."""
    times = []
    for _ in range(rounds):
        begun = time.process_time()
        search()
        times.append(time.process_time() - begun)
    return 1000 * min(times)


def equality(data: Path, run: Path, recipe: str | None) -> dict[str, Any]:
    """Whether `predict` says of shards' members what `eval` says, in every bit."""
    from alexprep.shards import InProcessEngine, Samples
    from alexprep.train import Classifier, Place, evaluate
    from alexprep.train.evaluation import predictions_of

    whole = evaluate([Place(run)], data=data, split="test", threads=1, recipe=recipe)
    table = predictions_of(whole)
    samples = Samples(data, "test")
    members = [samples.encoded(row).tobytes() for row in range(MEMBERS)]
    with Classifier.open(run, data=data, threads=1, recipe=recipe) as classifier:
        found = classifier.predict(members, InProcessEngine()).table
    same = (found.best == table.best[:MEMBERS]).all(axis=1) & (
        found.probabilities == table.probabilities[:MEMBERS]
    ).all(axis=1)
    return {
        "the net: top-1 error on test, percent": whole.document["top1_error"],
        f"members of {MEMBERS:,} whose predictions equal eval's in every bit": int(same.sum()),
    }


def exchanged(tar: Path, run: Path, work: Path, recipe: str | None) -> dict[str, Any]:
    """How many of 100 exchanged labels are among the 200 images that a report calls worst predicted."""
    from alexprep.shards import ShardOptions, Target, convert, find_source, read_dataset
    from alexprep.train import Place, evaluate
    from alexprep.train.evaluation import predictions_of
    from alexprep.train.report.training_section import WORST, worst_predicted

    wrong = exchange(tar, work / "exchanged.tar")
    data = work / "exchanged"
    convert(find_source(str(work / "exchanged.tar")), data, ShardOptions(Target(size=32)), 1)
    split = next(iter(read_dataset(data)["splits"]))
    table = predictions_of(evaluate([Place(run)], data=data, split=split, threads=1, recipe=recipe))
    worst = [table.sources[row] for row in worst_predicted(table)]
    chance = WORST * len(wrong) / len(table)
    return {
        "labels exchanged": len(wrong),
        f"of them among the {WORST} worst predicted": len(wrong & set(worst)),
        "by chance": chance,
    }


def exchange(tar: Path, path: Path) -> set[str]:
    """Writes a tar of the test pictures in which pairs of different classes have one another's folder; gives the names of these."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tar) as source, tarfile.open(path, "w") as made:
        members = [member for member in source if member.isfile() and "test" in Path(member.name).parts[:-2]]
        order = np.random.default_rng(0).permutation(len(members)).tolist()
        folder = {n: str(Path(member.name).parent) for n, member in enumerate(members)}
        wrong: set[int] = set()
        while len(wrong) < EXCHANGED:
            one, other = order.pop(), order.pop()
            if folder[one] != folder[other]:
                folder[one], folder[other] = folder[other], folder[one]
                wrong |= {one, other}
        names = {n: f"{folder[n]}/{n:05d}{Path(member.name).suffix}" for n, member in enumerate(members)}
        for n, member in enumerate(members):
            content = source.extractfile(member)
            assert content is not None
            info = tarfile.TarInfo(names[n])
            info.size = member.size
            made.addfile(info, content)
    return {f"{path.name}/{names[n]}" for n in wrong}  # as the ledger calls them


if __name__ == "__main__":
    main()
