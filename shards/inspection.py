"""Tells what a source holds and how `convert` would read it, before anything is decoded or written: `inspect_source`.

`alexprep inspect` shows all of it, `alexprep shard` its first lines (`Inspection.opening`). Which inputs there are and which labels
they have is decided in `alexprep.shards.listing`; pictures of them are drawn in `alexprep.shards.contact_sheet`.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from alexprep.shards.dataset_format import shown_class
from alexprep.shards.errors import AlexprepError, counted
from alexprep.shards.image_header import PIXELS, Header, Refused, format_name, general_reason, read_header, too_large
from alexprep.shards.listing import Listing
from alexprep.shards.sources.base import SPLITS, UNLABELLED, Location, PassedOver, Source, sorted_names
from alexprep.shards.sources.tars import ArchiveSource

SAMPLE = 200  # a share of 1 % of all inputs is missed by 13 in 100 such samples, one of 3 % by 2 in 1,000
_ROWS = 10
_SEED = 0  # of what is picked: two looks at one source show the same
_READS_AT_ONCE = 16  # where each goes over a network
_HEAD_BYTES = 65_536  # of a file, read at first: most have their header there, behind EXIF and a profile too
_REASONS = 5  # shown; --json has all

BY_NAME = "sorted by name"
AS_NUMBERS = "sorted as numbers"
OWN = "by the source's own numbering"
AS_GIVEN = "as --labels says"


class Spread(NamedTuple):
    """The least, the median and the greatest of some numbers."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[int] | NDArray[np.int64]) -> Spread | None:
        """None where there are no values."""
        if not len(values):
            return None
        return cls(*(_plain(float(value)) for value in (np.min(values), np.median(values), np.max(values))))


@dataclass(frozen=True)
class SplitContents:
    """How many inputs a split has: in all, without a label, and, over all classes, per class.

    `classes` is how many classes have any; `fewest` is the first class that has the least.
    """

    inputs: int
    unlabelled: int
    classes: int
    per_class: Spread | None
    fewest: str | None


class SampleRow(NamedTuple):
    """One input, and what becomes of it: the split, class name and label (-1 for none) that it gets."""

    file: str
    split: str
    class_name: str
    label: int


@dataclass(frozen=True)
class FileSample:
    """What the headers of a random sample of inputs tell.

    `files` were looked at; `formats` counts those that have a header, and `width`, `height` (pixels as stored) and `bytes` (of encoded
    images) are theirs. `refused` counts the others by reason.
    """

    files: int
    formats: dict[str, int]
    width: Spread | None
    height: Spread | None
    bytes: Spread | None
    refused: dict[str, int]


@dataclass(frozen=True)
class Inspection:
    """What a source holds, and what `convert` would make of it; as text, what `alexprep inspect` prints.

    Attributes:
        layout: as `--layout` names it.
        evidence: why it is read so; empty where the layout's name says it.
        root: the folder or URL that names of files are relative to.
        found: how many files, members of archives or rows there are.
        splits: what each holds.
        classes: the class names by label.
        numbering: how they got their labels: `BY_NAME`, `AS_NUMBERS`, `OWN` or `AS_GIVEN`.
        rows: a few inputs, picked at random from every split, with their labels.
        sample: what the headers of a random sample of inputs tell.
        passed_over: by rule.
        warnings: sentences that need no decision.
        words: what classes mean in words, by label; [] where nothing tells it.
    """

    layout: str
    evidence: str
    root: str
    found: int
    splits: dict[str, SplitContents]
    classes: list[str]
    numbering: str
    rows: list[SampleRow]
    sample: FileSample
    passed_over: dict[str, PassedOver]
    warnings: list[str]
    words: list[str] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        """In all splits together."""
        return sum(split.inputs for split in self.splits.values())

    def opening(self) -> str:
        """The first lines: the layout and why, the splits, the classes, the warnings."""
        layout = f"{self.layout}: {self.evidence}" if self.evidence else self.layout
        rows = [("layout", layout), *((split, _split_line(held)) for split, held in self.splits.items())]
        lines = [
            f"SOURCE holds {counted(self.inputs, 'input')}.",
            *_aligned([*rows, ("classes", self._classes_line())]),
        ]
        return "\n".join(lines + [f"Warning: {printable(words)}" for words in self.warnings])

    def __str__(self) -> str:
        """The whole, in lines."""
        counts = [
            ("found", f"{self.found:,}"),
            ("inputs", f"{self.inputs:,}"),
            *passed_over_rows(self.passed_over),
        ]
        lines = [self.opening(), "What is there", *_aligned(counts)]
        lines += ["Some inputs, and the split, label and class that they get", *self._sample_lines()]
        if self.sample.files:
            some = "All" if self.sample.files == self.inputs else f"A random sample of {self.sample.files:,}"
            lines += [
                f"{some} of {counted(self.inputs, 'input')}, by their headers",
                *_aligned(_sample_rows(self.sample)),
            ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints; the keys are listed in docs/formats.md."""
        sample = {name: _without_types(value) for name, value in vars(self.sample).items()}
        splits = {
            split: {name: _without_types(value) for name, value in vars(held).items()}
            for split, held in self.splits.items()
        }
        return {
            "layout": self.layout,
            "evidence": self.evidence,
            "root": self.root,
            "found": self.found,
            "inputs": self.inputs,
            "passed_over": {rule: asdict(passed) for rule, passed in self.passed_over.items()},
            "splits": splits,
            "classes": self.classes,
            "words": self.words,
            "numbering": self.numbering,
            "rows": [dict(zip(("file", "split", "class", "label"), row, strict=True)) for row in self.rows],
            "sample": sample,
            "warnings": self.warnings,
        }

    def _classes_line(self) -> str:
        if not self.classes:
            return "none is known: every label is -1"
        shown = [repr(shown_class(self.classes, self.words, label)) for label in (0, -1)]
        first, last = f"{shown[0]} is 0", f"{shown[1]} is {len(self.classes) - 1:,}"
        ends = (
            first if len(self.classes) == 1 else f"{first}, {last}" if len(self.classes) == 2 else f"{first} … {last}"
        )
        return f"{len(self.classes):,}, {self.numbering}: {ends}"

    def _sample_lines(self) -> list[str]:
        cells = []
        for row in self.rows:
            name = shown_class(self.classes, self.words, row.label) if row.label >= 0 else row.class_name
            cells.append((printable(row.file), row.split, str(row.label), printable(name)))
        file, split, label = (max(len(row[column]) for row in cells) for column in range(3))
        return [f"  {row[0]:<{file}} → {row[1]:<{split}}  {row[2]:>{label}}  {row[3]}" for row in cells]


def inspect_source(listing: Listing, sample: int = SAMPLE) -> Inspection:
    """Describes what was listed of a source. Nothing is decoded; only of a sample of inputs are headers read.

    Args:
        listing: what `list_inputs` returned.
        sample: how many inputs, picked at random, are looked at; 0 for none. One that cannot be read is counted with the reason.
    """
    label_of, looked_at = listing.label_of, _look(listing.source, _anywhere(listing, sample))
    splits = {split: _contents(listing, split) for split in dict.fromkeys(SPLITS.values()) if split in listing.splits}
    rows = []
    for share, split in zip(_shares(_ROWS, len(splits)), splits, strict=True):
        for code, location in pick(listing, split, share):
            name = listing.names[code]
            rows.append(SampleRow(str(location), split, name, int(label_of[code])))
    return Inspection(
        listing.source.layout,
        listing.source.evidence,
        listing.source.files.display(),
        listing.account.found,
        splits,
        listing.classes,
        _numbering(listing),
        rows,
        looked_at,
        dict(sorted(listing.account.passed_over.items())),
        list(dict.fromkeys([*_warning_of(looked_at), *listing.account.warnings])),
        listing.class_words,
    )


def passed_over_rows(passed_over: Mapping[str, PassedOver]) -> list[tuple[str, str]]:
    """Lines of a table: how many files were passed over, then by rule with some of their names."""
    rows = [("passed over", f"{sum(passed.count for passed in passed_over.values()):,}")]
    for rule, passed in passed_over.items():
        names = ", ".join(passed.names) + (", …" if passed.count > len(passed.names) else "")
        rows.append((f"  {passed.count:,}", f"{rule}: {names}" if passed.names else rule))
    return rows


def printable(text: str) -> str:
    """Text of one line for a terminal: control characters, which names of files may hold, are written as escapes.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


# The listing as figures.


def _contents(listing: Listing, split: str) -> SplitContents:
    counts, inputs = listing.counts(split), len(listing.splits[split])
    labelled = int(counts.sum())
    fewest = listing.classes[int(counts.argmin())] if labelled else None
    per_class = Spread.of(counts) if labelled else None
    return SplitContents(inputs, inputs - labelled, int(np.count_nonzero(counts)), per_class, fewest)


def _numbering(listing: Listing) -> str:
    """How the classes got their labels, as the order of their names tells it."""
    classes = listing.classes
    in_order = sorted_names(classes)
    if classes and classes == in_order and all(name.isascii() and name.isdigit() for name in classes):
        return AS_NUMBERS
    if classes == sorted(classes, key=str.encode):
        return BY_NAME
    return OWN if classes == listing.source.classes(set(listing.names) - {UNLABELLED}) else AS_GIVEN


def _shares(count: int, parts: int) -> list[int]:
    """`count` in so many parts, as equal as can be, at least 1 each."""
    return [max(1, count * (part + 1) // parts - count * part // parts) for part in range(parts)]


def pick(listing: Listing, split: str, count: int, label: int | None = None) -> list[tuple[int, Location]]:
    """The class codes and places of at most `count` inputs of a split, or of one of its classes, picked at random with a fixed seed.

    They come in the order of the source.
    """
    table = listing.splits[split]
    if label is None:
        candidates = np.arange(len(table))
    else:
        candidates = np.flatnonzero(listing.label_of[table["class"].to_numpy()] == label)
    chosen = np.random.default_rng(_SEED).choice(candidates, min(count, len(candidates)), replace=False)
    return [(_code(table, row), _location(table, row)) for row in sorted(chosen.tolist())]


def _anywhere(listing: Listing, count: int) -> list[Location]:
    """The places of `count` inputs, picked at random from all splits."""
    tables = list(listing.splits.values())
    ends = np.cumsum([len(table) for table in tables])
    chosen = np.random.default_rng(_SEED).choice(int(ends[-1]), min(count, int(ends[-1])), replace=False)
    places = []
    for row in sorted(chosen.tolist()):
        part = int(np.searchsorted(ends, row, side="right"))
        places.append(_location(tables[part], row - int(ends[part]) + len(tables[part])))
    return places


def _location(table: pa.Table, row: int) -> Location:
    return Location(*(table[name][row].as_py() for name in Location._fields))


def _code(table: pa.Table, row: int) -> int:
    return int(table["class"][row].as_py())


# The headers of some files.


def _look(source: Source, places: Sequence[Location]) -> FileSample:
    """Reads the headers at `places`."""
    if source.files.remote:
        with ThreadPoolExecutor(_READS_AT_ONCE) as threads:
            seen = list(threads.map(lambda place: _header(source, place), places))
    else:
        seen = [_header(source, place) for place in places]
    good = [each for each in seen if not isinstance(each, str)]
    formats = Counter(kind for kind, _, _ in good)
    refused = Counter(each for each in seen if isinstance(each, str))
    return FileSample(
        len(seen),
        dict(formats.most_common()),
        Spread.of([header.width for _, header, _ in good]),
        Spread.of([header.height for _, header, _ in good]),
        Spread.of([size for kind, _, size in good if kind != PIXELS]),
        dict(refused.most_common()),
    )


def _warning_of(sample: FileSample) -> list[str]:
    """A sentence where most of a sample is of no use: then `shard` will most likely stop."""
    bad = sum(sample.refused.values())
    if 2 * bad <= sample.files:
        return []
    reason, count = next(iter(sample.refused.items()))
    seen = f"{bad:,} of the {counted(sample.files, 'input')} that were looked at cannot be used ({count:,}: {reason})"
    return [f"{seen}: `alexprep shard` stops where more than half are no pictures, unless --max-rejects allows it"]


def _header(source: Source, place: Location) -> tuple[str, Header, int] | str:
    """The format, the header and the bytes of one input; or why it cannot be used."""
    try:
        head, size = _beginning(source, place)
        if not isinstance(head, bytes):
            height, width = head.shape[:2]
            return PIXELS, Header(height, width, 3 if head.ndim > 2 else 1), size

        def read(offset: int, count: int) -> bytes:
            return (
                head[offset : offset + count]
                if offset + count <= len(head) or len(head) == size
                else _bytes(source, place, offset, count)
            )

        kind = format_name(head)
        header = _by_pillow(read(0, size), kind) if kind in ("GIF", "TIFF") else read_header(read, 0, size)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return general_reason(header.reason) if isinstance(header, Refused) else (kind, header, size)


def _beginning(source: Source, place: Location) -> tuple[bytes | NDArray[np.uint8], int]:
    """The first bytes of an input, or its pixels; and the bytes of the whole. OSError where it cannot be read."""
    if type(source).read in (Source.read, ArchiveSource.read):  # others may need the whole, or give pixels
        with contextlib.suppress(AlexprepError):  # a server that sends whole files only, or does not tell their size
            size = source.files.size(place.path) if place.size < 0 else place.size
            return _bytes(source, place, 0, min(size, _HEAD_BYTES)), size
    whole = source.read(place)
    return whole, len(whole) if isinstance(whole, bytes) else whole.nbytes


def _bytes(source: Source, place: Location, offset: int, size: int) -> bytes:
    data = source.read(place._replace(offset=place.offset + offset, size=size))
    assert isinstance(data, bytes)
    return data


def _by_pillow(data: bytes, kind: str) -> Header | Refused:
    """The header of a format that only Pillow reads here; it decodes when pixels are asked for, not before."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=(kind,)) as image:
                header = Header(image.height, image.width, len(image.getbands()))
    except Exception:  # noqa: BLE001  (a damaged file may raise anything)
        return Refused(f"a {kind} whose header makes no sense")
    return too_large(*header) or header


# What is shown.


def _without_types(value: Any) -> Any:
    return value._asdict() if isinstance(value, Spread) else value


def _plain(number: float) -> float:
    """A whole number as an int."""
    return int(number) if number == int(number) else number


def _range(spread: Spread, unit: str, of_least: str = "") -> str:
    least, median, most = (f"{number:,.0f}" for number in spread)
    return f"{least} {unit}" if least == most else f"{least}{of_least} to {most} {unit}, median {median}"


def _split_line(held: SplitContents) -> str:
    if held.per_class is None:
        return f"{counted(held.inputs, 'input')} without a label"
    words = f"{counted(held.inputs, 'input')}, {counted(held.classes, 'class')}: {_range(held.per_class, 'each', f' ({held.fewest!r})')}"
    return words + (f"; {counted(held.unlabelled, 'input')} without a label" if held.unlabelled else "")


def _sample_rows(sample: FileSample) -> list[tuple[str, str]]:
    rows = [(kind, f"{count:,}") for kind, count in sample.formats.items()]
    for name, spread, unit in (
        ("width", sample.width, "pixels"),
        ("height", sample.height, "pixels"),
        ("encoded", sample.bytes, "bytes"),
    ):
        rows += [(name, _range(spread, unit))] if spread else []
    if sample.refused:
        rows.append(("no usable header", f"{sum(sample.refused.values()):,}"))
        rows += [(f"  {count:,}", reason) for reason, count in list(sample.refused.items())[:_REASONS]]
    return rows


def _aligned(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Names and values in two columns, as tables of the command line have them."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {printable(value)}" for name, value in rows]
