"""Draws some images of a source beside the class and label that they get: a wrong numbering or a shifted list is seen at a glance.

The images are made as `convert` makes them, in a worker process, since a file may be hostile; they are laid out with Pillow.
"""

from __future__ import annotations

import functools
import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from alexprep.shards.image_codec import Codec, Target, read_raw
from alexprep.shards.image_header import Refused
from alexprep.shards.inspection import Inspection, inspect_source, pick, printable
from alexprep.shards.listing import Listing
from alexprep.shards.photos import Photo, convert_photos
from alexprep.shards.shard_writer import bound_memory, open_codec, shared_codec
from alexprep.shards.sources.base import Location, Source
from alexprep.shards.storage import publish_bytes
from alexprep.shards.worker_pool import Engine, as_engine, attending, reading

_CLASSES = 10  # rows: the first, the last, and others at equal distances
_PER_ROW = 10  # images, of all splits together
CELL_SIDE, _GAP, _MARGIN, _NAMES = 96, 4, 12, 210  # pixels; _NAMES is the width of the column of names
_FONT, _SMALL = 15, 11
_INK, _PAPER, _FAINT, _WRONG = (20, 20, 20), (255, 255, 255), (235, 235, 235), (190, 30, 30)

Cell = NDArray[np.uint8] | Refused
_CELL = Target(size=CELL_SIDE, format="raw")


def draw_contact_sheet(listing: Listing, engine: Engine | int = 1) -> Image.Image:
    """Draws up to ten classes, one a row, with images of each split side by side: RGB, at most 1,300 pixels wide.

    Args:
        listing: what `list_inputs` returned.
        engine: decodes; a number stands for so many worker processes on this machine.

    Raises:
        AlexprepError: the way to the images fails.
    """
    found = inspect_source(listing, sample=0)
    per_split = max(1, _PER_ROW // len(found.splits))
    labels = _labels(found)
    chosen = [[pick(listing, split, per_split, label) for split in found.splits] for label in labels]
    places = [location for row in chosen for cells in row for _, location in cells]
    task = functools.partial(_squares, listing.source)
    (cells,) = as_engine(engine).run(task, [places], lambda finished: None)
    return _drawn(found, labels, [list(map(len, row)) for row in chosen], cells)


def publish_contact_sheet(listing: Listing, path: Path) -> None:
    """Writes the contact sheet of a source as a PNG, whole or not at all."""
    publish_picture(draw_contact_sheet(listing), path)


def publish_picture(picture: Image.Image, path: Path) -> None:
    """Writes a picture as a PNG, whole or not at all."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    publish_bytes(path, buffer.getvalue())


def _labels(found: Inspection) -> list[int]:
    """Those of the rows; [-1] where no class is known."""
    count = len(found.classes)
    return sorted({round(label) for label in np.linspace(0, count - 1, min(_CLASSES, count))}) if count else [-1]


def _squares(source: Source, places: Sequence[Location], condemned: Mapping[int, str]) -> list[Cell]:
    """Each image as pixels, uint8 (CELL_SIDE, CELL_SIDE, 3), or why there are none: the task of a worker."""
    codec: Codec = shared_codec(open_codec, _CELL)
    bound_memory(source, codec)
    cells: list[Cell] = []
    for row, location in enumerate(places):
        with attending(row):
            if row in condemned:
                cells.append(Refused(condemned[row]))
                continue
            try:
                with reading(source.files.display(location.path)):
                    data = source.read(location)
                made = codec.convert(data)
            except OSError as error:
                made = Refused(f"cannot be read: {error.strerror or error}")
            except MemoryError:
                made = Refused("needs more memory than a worker may have")
            pixels = made if isinstance(made, Refused) else read_raw(made.data)
            cells.append(Refused("no pixels") if pixels is None else pixels)
    return cells


def _drawn(
    found: Inspection, labels: Sequence[int], counts: Sequence[Sequence[int]], cells: Sequence[Cell]
) -> Image.Image:
    """The sheet; `counts` says how many cells each row has of each split."""
    waiting = iter(cells)
    rows = []
    for label, of_splits in zip(labels, counts, strict=True):
        name = found.classes[label] if label >= 0 else "no class is known"
        rows.append(SheetRow(str(label), name, [list(itertools.islice(waiting, count)) for count in of_splits]))
    return lay_out(list(found.splits), rows)


class SheetRow(NamedTuple):
    """A row of a sheet: its title, a line of words, or up to five small ones, and its images by column group."""

    title: str
    words: str
    groups: Sequence[Sequence[Cell]]


def lay_out(headings: Sequence[str], rows: Sequence[SheetRow]) -> Image.Image:
    """Lays out rows of images, each (CELL_SIDE, CELL_SIDE, 3) uint8 or a reason why there is none, below the headings of their groups: RGB."""
    step = CELL_SIDE + _GAP
    columns = [max(1, *(len(row.groups[group]) for row in rows)) for group in range(len(headings))]
    widths = [count * step - _GAP for count in columns]
    lefts = [_MARGIN + _NAMES + sum(widths[:number]) + number * _MARGIN for number in range(len(widths))]
    top = _MARGIN + _FONT + _GAP + _MARGIN
    size = lefts[-1] + widths[-1] + _MARGIN, top + len(rows) * step - _GAP + _MARGIN
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for left, width, heading in zip(lefts, widths, headings, strict=True):
        _write(draw, (left, _MARGIN), heading, _FONT, width)
    for number, row in enumerate(rows):
        y = top + number * step
        lines = row.words.split("\n")
        top_line, font = (y + CELL_SIDE // 2 - _FONT, _FONT) if len(lines) == 1 else (y, _SMALL)
        _write(draw, (_MARGIN, top_line), row.title, _FONT, _NAMES - _MARGIN)
        for line, words in enumerate(lines):
            _write(draw, (_MARGIN, top_line + _FONT + _GAP + line * (font + 3)), words, font, _NAMES - _MARGIN)
        for left, cells, most in zip(lefts, row.groups, columns, strict=True):
            for column in range(most):
                x = left + column * step
                if column >= len(cells):
                    draw.rectangle((x, y, x + CELL_SIDE - 1, y + CELL_SIDE - 1), fill=_FAINT)
                    continue
                cell = cells[column]
                if isinstance(cell, Refused):
                    _cross(draw, x, y, cell.reason)
                else:
                    sheet.paste(Image.fromarray(cell), (x, y))
    return sheet


def photo_cells(photos: Sequence[Photo], engine: Engine | None = None) -> list[Cell]:
    """Photos as cells of a sheet, decoded in worker processes."""
    made = {number: result for number, _, result in convert_photos(photos, _CELL, engine)}
    cells = [result if isinstance(result, Refused) else read_raw(result.data) for _, result in sorted(made.items())]
    return [Refused("no pixels") if cell is None else cell for cell in cells]


def cell_of(encoded: bytes | NDArray[np.uint8]) -> Cell:
    """An image at hand as a cell of a sheet. It is decoded in this process: for images that are known to be harmless, as samples are."""
    made = shared_codec(open_codec, _CELL).convert(encoded)
    pixels = made if isinstance(made, Refused) else read_raw(made.data)
    return Refused("no pixels") if pixels is None else pixels


def _cross(draw: ImageDraw.ImageDraw, x: int, y: int, reason: str) -> None:
    """A crossed box with the reason in it."""
    right, bottom = x + CELL_SIDE - 1, y + CELL_SIDE - 1
    draw.rectangle((x, y, right, bottom), outline=_WRONG)
    for ends in ((x, y, right, bottom), (x, bottom, right, y)):
        draw.line(ends, fill=_WRONG)
    for number, line in enumerate(textwrap.wrap(reason, 16)[:6]):
        _write(draw, (x + _GAP, y + _GAP + number * (_SMALL + 3)), line, _SMALL, CELL_SIDE - 2 * _GAP, _PAPER)


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    size: int,
    width: int,
    behind: tuple[int, int, int] | None = None,
) -> None:
    """One line in Pillow's own font, cut to `width`; what is not ASCII is written as escapes."""
    font = ImageFont.load_default(size)
    text = printable(text).encode("ascii", "backslashreplace").decode()  # it has no other letters
    if font.getlength(text) > width:
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        text += "..."
    if behind is not None:
        draw.rectangle(draw.textbbox(place, text, font=font), fill=behind)
    draw.text(place, text, fill=_INK, font=font)
