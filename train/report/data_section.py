"""The part of a report on the data: what dataset.json, the ledger and the index say, and contact sheets of the samples."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alexprep.shards.contact_sheet import SheetRow, cell_of, lay_out
from alexprep.shards.dataset_format import LEDGER, read_dataset, read_index, shard_name, short_classes, shown_classes
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import target_in
from alexprep.shards.sample_reader import Samples
from alexprep.shards.storage import is_local
from alexprep.train.report.blocks import LINES, STYLES, Block, Facts, Picture, Section, Table, Words, plot, thinned

_LISTED_REJECTS = 200  # by name
_SHEET_ROWS, _SHEET_COLUMNS = 10, 10
_COLUMNS = ["label", "width", "height", "status", "kept"]  # of the ledger, for every input


@dataclass(frozen=True)
class Ledger:
    """A split's ledger as arrays, an entry an input; a rejected one has its reason and source among `rejects`."""

    labels: NDArray[np.int32]
    widths: NDArray[np.int32]  # pixels, 0 where a header could not be read
    heights: NDArray[np.int32]
    written: NDArray[np.bool_]
    kept: int
    rejects: list[tuple[str, str]]  # (reason, source)
    # Of the originals: files, and bytes of all; empty where an earlier release wrote the ledger.
    formats: dict[str, tuple[int, int]]


def data_section(data: Path | None) -> Section:
    """The section of a dataset; None where there is none."""
    section = Section("data", "Data")
    if data is None:
        section.blocks.append(
            Words(
                "There is no dataset: name its folder, `alexprep report DATA`, or make one with `alexprep shard SOURCE`.",
                True,
            )
        )
        return section
    try:
        dataset = read_dataset(data)
    except AlexprepError as error:
        section.blocks.append(Words(f"There is no finished dataset: {error}.", True))
        return section
    section.add(lambda: _facts(data, dataset), "summary of the dataset")
    ledgers: dict[str, Ledger] = {}
    for split in _filled(dataset):
        section.add(lambda split=split: _read(data, split, ledgers), f"ledger of {split!r}")  # type: ignore[misc]
    section.add(lambda: _classes(dataset, ledgers), "table of the classes")
    section.add(lambda: _originals(ledgers), "table of the originals' formats")
    section.add(lambda: _sizes(ledgers), "plot of the original sizes")
    section.add(lambda: _file_sizes(data, dataset), "plot of the file sizes")
    section.add(lambda: _rejects(dataset, ledgers), "list of rejects")
    section.add(lambda: _passed_over(dataset), "list of what was passed over")
    for title, chosen in _sheets(dataset):
        section.add(lambda title=title, chosen=chosen: _sheet(data, dataset, title, chosen), f"contact sheet, {title}")  # type: ignore[misc]
    return section


def read_ledger(data: Path, split: str) -> Ledger:
    """Reads the ledger of a split; only of rejected inputs are sources and reasons kept. Raises AlexprepError where it cannot be read."""
    path = data / split / LEDGER
    try:
        file = path if is_local(path) else pa.BufferReader(path.read_bytes())
        table = pq.read_table(file, columns=_COLUMNS)
        rejected = pc.not_equal(table["status"], "written")
        count = pc.sum(rejected).as_py() or 0
        rejects: list[tuple[str, str]] = []
        if count:
            names = pq.read_table(file, columns=["reason", "source"]).filter(rejected)
            rejects = list(zip(names["reason"].to_pylist(), names["source"].to_pylist(), strict=True))
        labels, widths, heights = (pc.fill_null(table[name], 0).to_numpy() for name in _COLUMNS[:3])
        written = ~rejected.to_numpy()
        kept = int(pc.sum(table["kept"]).as_py() or 0)
        return Ledger(labels, widths, heights, written, kept, rejects, _formats(file))
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        words = str(error).splitlines()[0]
        raise AlexprepError(f"{path} cannot be read ({words}): run the same `alexprep shard` again") from None


def _formats(ledger: Path | pa.BufferReader) -> dict[str, tuple[int, int]]:
    if not {"format", "bytes"} <= set(pq.read_schema(ledger).names):
        return {}
    table = pq.read_table(ledger, columns=["format", "bytes"])
    sums = (
        table.filter(pc.is_valid(table["format"])).group_by("format").aggregate([("bytes", "sum"), ("bytes", "count")])
    )
    return {row["format"]: (row["bytes_count"], row["bytes_sum"] or 0) for row in sums.to_pylist()}


def _filled(dataset: dict[str, Any]) -> list[str]:
    return [split for split in ("train", "val", "test") if split in dataset["splits"]]


def _facts(data: Path, dataset: dict[str, Any]) -> list[Block]:
    options, source, target = dataset["options"], dataset["source"], target_in(dataset["image"])
    rows = [
        ("folder", str(data)),
        ("digest", dataset["digest"]),
        ("images", f"{_size_words(target)}, {_format_words(target)}, filter {target.filter}"),
        ("classes", f"{len(dataset['classes']):,}, numbered by {dataset['labels']!r}"),
        ("source", f"layout {source['layout']!r}, listing {source['inputs'][:16]}…"),
        ("options", ", ".join(f"{name} {value}" for name, value in sorted(options.items()))),
        ("choices", ", ".join(f"{name} {value}" for name, value in dataset.get("choices", {}).items()) or "none"),
        ("made with", ", ".join(f"{name} {version}" for name, version in dataset["versions"].items())),
    ]
    splits = [
        [name, split["inputs"], split["samples"], split["rejected"], len(split["shards"]), split["bytes"] / 1e6]
        for name, split in ((name, dataset["splits"][name]) for name in _filled(dataset))
    ]
    return [Facts(rows), Table("Splits", ["split", "inputs", "samples", "rejected", "shards", "MB"], splits)]


def _size_words(target: Target) -> str:
    height, width = target.box
    words = {
        "square": f"{width} x {height} pixels",
        "shorter": f"whole, to cover {width} x {height} pixels",
        "longer": f"whole, within {width} x {height} pixels",
        "none": "of their own sizes",
    }
    canvas = f", in the middle of {target.canvas[1]} x {target.canvas[0]}" if target.canvas else ""
    return words[target.fit] + (", smaller ones as they are" if target.only_shrink else "") + canvas


def _format_words(target: Target) -> str:
    if target.format == "jpg":
        return f"jpg, quality {target.quality}, {target.subsampling}"
    if target.format == "webp":
        return "webp, lossless" if target.lossless else f"webp, quality {target.quality}"
    return target.format


def _read(data: Path, split: str, ledgers: dict[str, Ledger]) -> list[Block]:
    ledgers[split] = read_ledger(data, split)
    return []


def _classes(dataset: dict[str, Any], ledgers: dict[str, Ledger]) -> list[Block]:
    names = shown_classes(dataset)
    counts, lost = {}, np.zeros(len(names), np.int64)
    for split, ledger in ledgers.items():
        known = ledger.labels >= 0
        counts[split] = np.bincount(ledger.labels[known & ledger.written], minlength=len(names))
        lost += np.bincount(ledger.labels[known & ~ledger.written], minlength=len(names))
    columns = ["label", "class", *counts, "rejected"]
    rows = [
        [label, name, *(int(count[label]) for count in counts.values()), int(lost[label])]
        for label, name in enumerate(names)
    ]
    blocks: list[Block] = [Table("Classes: samples of each in each split", columns, rows, search=True)]
    if names and counts:

        def draw(figure: Any) -> None:
            axes = figure.subplots()
            for n, (split, count) in enumerate(counts.items()):
                shown = thinned(count)
                axes.plot(
                    shown + 1,
                    np.sort(count)[::-1][shown],
                    LINES[n],
                    linestyle=STYLES[n],
                    label=split,
                    drawstyle="steps-mid",
                )
            axes.set(xlabel="classes, largest first", ylabel="samples", ylim=(0, None))
            axes.legend()

        words = "; ".join(f"{split}: {min(count):,} to {max(count):,} a class" for split, count in counts.items())
        blocks.append(
            plot(
                "classes",
                f"Samples a class, in descending order. {words}.",
                f"Samples a class. {words}.",
                draw,
                (5, 3.8),
            )
        )
    return blocks


def _originals(ledgers: dict[str, Ledger]) -> list[Block]:
    files: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for ledger in ledgers.values():
        for name, (count, size) in ledger.formats.items():
            files[name] += count
            sizes[name] += size
    rows: list[list[Any]] = [[name, count, sizes[name] / 1000 / max(1, count)] for name, count in files.most_common()]
    return [Table("Formats of the originals", ["format", "files", "kB on average"], rows)] if rows else []


def _sizes(ledgers: dict[str, Ledger]) -> list[Block]:
    widths, heights = (
        np.concatenate(
            [getattr(ledger, name)[ledger.written] for ledger in ledgers.values()] or [np.zeros(0, np.int32)]
        )
        for name in ("widths", "heights")
    )
    seen = (widths > 0) & (heights > 0)
    if not seen.any():
        return []
    widths, heights = widths[seen].astype(np.float64), heights[seen].astype(np.float64)

    def sizes(figure: Any) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes = figure.subplots()
        low, high = (np.log10(bound(np.concatenate([widths, heights]))) for bound in (np.min, np.max))
        spare = max(0.02, (0.6 - (high - low)) / 2)  # a factor of 4 at least, so that ticks at 1, 2 and 5 are among it
        edges = np.logspace(low - spare, high + spare, 60)
        drawn = axes.hist2d(widths, heights, bins=[edges, edges], cmin=1, cmap="viridis", rasterized=True)[3]
        axes.set(xscale="log", yscale="log", xlabel="width, pixels", ylabel="height, pixels")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:,.0f}")
            axis.set_minor_formatter(NullFormatter())
        figure.colorbar(drawn, label="images")

    def ratios(figure: Any) -> None:
        axes = figure.subplots()
        axes.hist(np.clip(widths / heights, 0.25, 4), bins=np.logspace(-2, 2, 49, base=2), color=LINES[0])
        axes.set(
            xscale="log",
            xlabel="width / height",
            ylabel="images",
            xticks=[0.25, 0.5, 1, 2, 4],
            xticklabels=["≤ ¼", "½", "1", "2", "≥ 4"],
        )
        axes.minorticks_off()

    median = f"median {np.median(widths):,.0f} x {np.median(heights):,.0f} pixels"
    span = f"from {widths.min():,.0f} x {heights.min():,.0f} (each the least) to {widths.max():,.0f} x {heights.max():,.0f}"
    share = f"{100 * np.mean(widths > heights):.0f} % are wider than high"
    return [
        plot(
            "sizes",
            f"Widths and heights of the originals: {median}.",
            f"Original sizes: {median}, {span}.",
            sizes,
            (5, 3.8),
        ),
        plot(
            "ratios",
            f"Aspect ratios of the originals: {share}.",
            f"Aspect ratios of the originals: {share}.",
            ratios,
            (5, 3.8),
        ),
    ]


def _file_sizes(data: Path, dataset: dict[str, Any]) -> list[Block]:
    sizes = {split: np.asarray(read_index(data, split)["size"]) / 1000 for split in _filled(dataset)}
    sizes = {split: values for split, values in sizes.items() if len(values)}
    if not sizes:
        return []

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        every = np.concatenate(list(sizes.values()))
        edges = np.linspace(0, float(np.quantile(every, 0.999)) * 1.02 + 1e-9, 60)
        for n, (split, values) in enumerate(sizes.items()):
            axes.hist(
                np.clip(values, None, edges[-1]),
                bins=edges,
                histtype="step",
                color=LINES[n],
                linestyle=STYLES[n],
                label=split,
            )
        axes.set(xlabel="kB a sample", ylabel="samples")
        axes.legend()

    words = "; ".join(f"{split}: {values.mean():,.1f} kB on average" for split, values in sizes.items())
    return [plot("file_sizes", f"Sizes of the encoded samples. {words}.", f"Encoded samples. {words}.", draw, (5, 3.8))]


def _rejects(dataset: dict[str, Any], ledgers: dict[str, Ledger]) -> list[Block]:
    rejects = [(split, *reject) for split, ledger in ledgers.items() for reject in ledger.rejects]
    kept = sum(ledger.kept for ledger in ledgers.values())
    words = f"{kept:,} samples have the bytes of their source, which had the target form already."
    if not rejects:
        return [Words(f"No input was rejected. {words}")]
    reasons: dict[str, list[str]] = {}
    for _, reason, source in rejects:
        reasons.setdefault(re.sub(r"\d[\d,]*", "N", reason.split(" (first bytes ")[0]), []).append(source)
    rows = [
        [reason, len(names), ", ".join(names[:3])]
        for reason, names in sorted(reasons.items(), key=lambda pair: -len(pair[1]))
    ]
    listed = [[split, source, reason] for split, reason, source in rejects[:_LISTED_REJECTS]]
    shown = f", the first {len(listed)}" if len(rejects) > len(listed) else ""
    return [
        Words(f"{len(rejects):,} inputs were rejected. {words}"),
        Table("Rejects by reason", ["reason", "inputs", "for example"], rows),
        Table(f"Rejects by name{shown}", ["split", "source", "reason"], [list(row) for row in listed], search=True),
    ]


def _passed_over(dataset: dict[str, Any]) -> list[Block]:
    account = dataset.get("account")
    if account is None:
        return [Words("What was passed over is not recorded: the dataset was made by an earlier release.")]
    rows = [[rule, entry["count"], ", ".join(entry["names"])] for rule, entry in account["passed_over"].items()]
    found = f"{account['found']:,} files, members or rows were found in the source"
    if not rows:
        return [Words(f"{found}; none was passed over.")]
    return [Words(f"{found}."), Table("Passed over", ["rule", "files", "for example"], rows)]


Chosen = Callable[[NDArray[np.void]], list[tuple[str, str, list[int]]]]  # of an index: (title, words, rows) of each row


def _sheets(dataset: dict[str, Any]) -> list[tuple[str, Chosen]]:
    """The contact sheets: what each shows, and which samples."""
    names = short_classes(dataset)

    def spread(count: int, most: int) -> list[int]:
        return sorted({int(n) for n in np.rint(np.linspace(0, count - 1, min(count, most)))}) if count else []

    def by_class(index: NDArray[np.void]) -> list[tuple[str, str, list[int]]]:
        return [
            (str(label), names[label], np.flatnonzero(index["label"] == label)[:_SHEET_COLUMNS].tolist())
            for label in spread(len(names), _SHEET_ROWS)
        ]

    def at_random(index: NDArray[np.void]) -> list[tuple[str, str, list[int]]]:
        picked = np.random.default_rng(0).permutation(len(index))[: 4 * _SHEET_COLUMNS].tolist()
        return [("", "", picked[at : at + _SHEET_COLUMNS]) for at in range(0, len(picked), _SHEET_COLUMNS)]

    def by_shard(index: NDArray[np.void]) -> list[tuple[str, str, list[int]]]:
        shards = np.unique(index["shard"])
        rows = []
        for n in spread(len(shards), 5):
            first, last = np.searchsorted(index["shard"], [shards[n], shards[n] + 1]).tolist()
            words = f"{last - first:,} samples"
            rows.append((str(shards[n]), words, list(range(first, min(last, first + _SHEET_COLUMNS)))))
        return rows

    return [("by class", by_class), ("at random", at_random), ("by shard", by_shard)]


def _sheet(data: Path, dataset: dict[str, Any], title: str, chosen: Chosen) -> list[Block]:
    split = next((name for name in _filled(dataset) if dataset["splits"][name]["samples"]), None)
    if split is None:
        return []
    samples = Samples(data, split)
    rows = [
        SheetRow(
            shard_name(split, int(name)) if title == "by shard" else name,
            words,
            [[cell_of(samples.encoded(row).tobytes()) for row in numbers]],
        )
        for name, words, numbers in chosen(samples.index)
    ]
    caption = f"Samples of {split}, {title}" + (
        ", in the order in which they are stored." if title == "by shard" else "."
    )
    shown = (
        ", ".join(row.words for row in rows if row.words)
        if title == "by class"
        else f"{sum(len(row.groups[0]) for row in rows)} samples"
    )
    return [
        Picture(
            f"sheet_{title.replace(' ', '_')}",
            f"Contact sheet of {split}, {title}: {shown}.",
            caption,
            np.asarray(lay_out([split], rows)),
        )
    ]


def decoded(samples: Samples, row: int) -> NDArray[np.uint8]:
    """The pixels of a sample, uint8 (H, W, 3). Raises AlexprepError where it cannot be decoded."""
    from alexprep.shards.image_codec import read_raw, shared_decoder

    data = samples.encoded(row).tobytes()
    raw = samples.dataset["image"]["format"] == "raw"
    pixels = read_raw(data) if raw else shared_decoder().decode(data)
    if pixels is None:
        raise AlexprepError(f"{samples.where(row)} cannot be decoded: `alexprep verify --decode` tells more")
    return pixels


def typical_row(samples: Samples) -> int:
    """A sample to show effects on: of some, the one whose encoded size is the median, so neither flat nor noise."""
    some: Sequence[int] = np.linspace(0, len(samples) - 1, min(len(samples), 101)).astype(int).tolist()
    return sorted(some, key=lambda row: int(samples.index[row]["size"]))[len(some) // 2]
