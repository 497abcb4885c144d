"""What sections of a report are made of: words, facts, tables and pictures; and how plots are drawn, for light pages and for dark ones."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alexprep.shards.errors import AlexprepError

BAR, RIGHT = "#7aa7d9", "#e8837d"  # bars with text on them; of the right one
# Ink, paper and the bars under ink. On each side the ink has a contrast of 5 at least to the others.
SIDE_LIGHT, SIDE_DARK = ("#1d1d1f", "#ffffff", BAR, RIGHT), ("#e8e8ea", "#17181a", "#2f5d8f", "#96352f")
LINES = (
    "#0068b5",
    "#c8501a",
    "#2d8a4e",
    "#8a4fb0",
    "#a67c00",
    "#c2357a",
)  # told apart also without colours: see `STYLES`
STYLES = ("-", "--", "-.", ":")
_JPEG_QUALITY = 88
_PNG_DPI = 150  # of plots
_PNG_LEVEL = 1  # of photos: 6, Pillow's own, takes four times as long for files that are a seventh smaller
Draw = Callable[[Any], None]  # draws into a matplotlib Figure


@dataclass(frozen=True)
class Words:
    """A paragraph; a `warning` says what is not there, and how it is made."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Facts:
    """Names and values in two columns."""

    rows: list[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table; columns whose values are numbers, or None, are set to the right; all can be sorted, and searched where `search` says so.

    Numbers are shown as `formats` says for their column, by default with separators and at most two decimals.
    """

    caption: str
    columns: list[str]
    rows: list[list[Any]]
    search: bool = False
    formats: dict[str, str] = field(default_factory=dict)

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers."""
        return [
            bool(self.rows) and all(row[n] is None or isinstance(row[n], int | float) for row in self.rows)
            for n in range(len(self.columns))
        ]

    def shown(self, column: int, value: Any) -> str:
        """A value as it is printed."""
        if value is None:
            return "–"
        form = self.formats.get(self.columns[column], ",.2f" if isinstance(value, float) else ",")
        return format(value, form) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Picture:
    """Pixels: uint8 (H, W, 3); `scale` says how many screen pixels one of them is wide, for small ones."""

    name: str  # of the file, without its ending
    alt: str
    caption: str
    pixels: NDArray[np.uint8]
    scale: int = 1

    def files(self) -> Iterator[tuple[str, bytes]]:
        """The file beside the page: NAME.png."""
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "PNG", compress_level=_PNG_LEVEL)
        yield f"{self.name}.png", buffer.getvalue()

    @property
    def sources(self) -> tuple[str, str]:
        """What the page shows, as a data URI, in the light and in the dark."""
        buffer, photo = io.BytesIO(), self.scale == 1 and self.pixels.size > 60_000
        options = {"quality": _JPEG_QUALITY} if photo else {"compress_level": _PNG_LEVEL}
        Image.fromarray(self.pixels).save(buffer, "JPEG" if photo else "PNG", **options)
        uri = _uri("jpeg" if photo else "png", buffer.getvalue())
        return uri, uri

    @property
    def width(self) -> int:
        """On the screen, pixels."""
        return int(self.pixels.shape[1]) * self.scale

    @property
    def pixelated(self) -> bool:
        """Whether each pixel is to be seen."""
        return self.scale > 3


@dataclass(frozen=True)
class Plot:
    """A drawing of matplotlib's, made once for light pages and once for dark ones."""

    name: str
    alt: str
    caption: str
    light: bytes  # SVG
    dark: bytes
    png: bytes
    width: int = 640

    pixelated = False

    def files(self) -> Iterator[tuple[str, bytes]]:
        """The files beside the page: NAME.png and NAME.svg, both on white."""
        yield f"{self.name}.png", self.png
        yield f"{self.name}.svg", self.light

    @property
    def sources(self) -> tuple[str, str]:
        """As data URIs, for the light and the dark."""
        return _uri("svg+xml", self.light), _uri("svg+xml", self.dark)


Block = Words | Facts | Table | Picture | Plot


@dataclass
class Section:
    """A part of the page. `name` is its address; `title` its heading."""

    name: str
    title: str
    blocks: list[Block] = field(default_factory=list)

    def add(self, make: Callable[[], Iterable[Block]], what: str) -> None:
        """Adds what `make` gives, or a plain word about why there is no `what`: one broken file costs no other part."""
        try:
            self.blocks += make()
        except AlexprepError as error:
            self.blocks.append(Words(f"There is no {what}: {error}.", warning=True))
        except Exception as error:  # noqa: BLE001  (of files that others may have changed or damaged: any kind)
            words = f"{type(error).__name__}: {error}".splitlines()[0]
            self.blocks.append(
                Words(f"There is no {what}: what it is drawn from is damaged or of another form ({words}).", True)
            )

    @property
    def warnings(self) -> list[str]:
        """What is not there."""
        return [block.text for block in self.blocks if isinstance(block, Words) and block.warning]


def plot(name: str, alt: str, caption: str, draw: Draw, size: tuple[float, float] = (6.4, 3.6)) -> Plot:
    """Draws a plot; `size` in inches of 100 pixels. `draw` is given an empty Figure."""
    light, png = _drawn(draw, size)
    dark = light
    for own, other in zip(SIDE_LIGHT, SIDE_DARK, strict=True):  # no plot uses these for anything else
        dark = dark.replace(own.encode(), other.encode())
    return Plot(name, alt, caption, light, dark, png, round(100 * size[0]))


def check_libraries() -> None:
    """Raises AlexprepError where matplotlib or Jinja2, which draw the report, are not installed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise AlexprepError(f'a report needs matplotlib and Jinja2 ({error}): pip install "alexprep[report]"') from None


def thinned(values: NDArray[Any], most: int = 2000) -> NDArray[np.int64]:
    """The places of at most so many values at equal distances, the last one among them."""
    if len(values) <= most:
        return np.arange(len(values))
    return np.unique(np.rint(np.linspace(0, len(values) - 1, most)).astype(np.int64))


def enlarged(image: NDArray[Any], least: int = 96) -> int:
    """How many screen pixels a pixel of a small image is drawn wide, so that the image has about `least`."""
    return max(1, round(least / len(image)))


def tiled(cells: Sequence[Sequence[NDArray[np.uint8]]], gap: int = 4) -> NDArray[np.uint8]:
    """Puts images of one size in rows, on white; rows may differ in length."""
    height, width = cells[0][0].shape[:2]
    columns = max(map(len, cells))
    sheet = np.full((len(cells) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for row, images in enumerate(cells):
        for column, image in enumerate(images):
            top, left = row * (height + gap), column * (width + gap)
            sheet[top : top + height, left : left + width] = image
    return sheet


def _drawn(draw: Draw, size: tuple[float, float]) -> tuple[bytes, bytes]:
    """A drawing as SVG and as PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink, paper, *_ = SIDE_LIGHT
    inks = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"), ink
    )
    # A fixed salt and no date: the same data give the same bytes.
    style = {"svg.fonttype": "path", "svg.hashsalt": "alexprep", "axes.facecolor": paper, "figure.facecolor": paper}
    spare = {
        "legend.facecolor": paper,
        "legend.edgecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    rules: dict[Any, Any] = {**inks, **style, **spare, "font.size": 9, "grid.alpha": 0.25, "axes.grid": True}
    with matplotlib.rc_context(rules):
        figure = Figure(figsize=size, dpi=100, layout="constrained")
        draw(figure)
        svg, png = io.BytesIO(), io.BytesIO()
        vectors: Any = FigureCanvasSVG(figure)  # and not `savefig`, which draws all twice
        vectors.print_svg(svg, metadata={"Date": None, "Creator": None})
        figure.set_layout_engine("none")  # it stands, and takes as long as the drawing
        figure.set_dpi(_PNG_DPI)
        pixels: Any = FigureCanvasAgg(figure)
        pixels.draw()
        Image.fromarray(np.asarray(pixels.buffer_rgba())[..., :3]).save(png, "PNG", dpi=(_PNG_DPI, _PNG_DPI))
    return svg.getvalue(), png.getvalue()


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
