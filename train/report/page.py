"""Makes the report: which data and runs are meant, the sections one after the other, and the page, whole in one file.

The page asks no network for anything: styles, the script and all pictures are inside. The pictures lie beside it as well, for papers and slides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from alexprep.shards.dataset_format import DATASET, PLAN, versions
from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import folder_at, is_local, make_folder, publish_bytes
from alexprep.train.report.augmentation_section import augmentation_section
from alexprep.train.report.blocks import Picture, Plot, Section, Words, check_libraries
from alexprep.train.report.data_section import data_section
from alexprep.train.report.paper_section import paper_section
from alexprep.train.report.statistics_section import statistics_section
from alexprep.train.report.training_section import training_section
from alexprep.train.run_dir import CONFIG, find_run, read_config

PAGE, PICTURES = "report.html", "pictures"
_OURS = "· alexprep report</title>"  # in every page
_NAMED = re.compile(r'<figure data-name="(\w+)"')  # the pictures that lie beside a page


@dataclass(frozen=True)
class WrittenReport:
    """Where a report is, and a sentence for each thing that it could not show."""

    path: Path
    missing: list[str]


def write_report(
    data: Path | None,
    runs: Sequence[Path],
    out: Path,
    say: Callable[[str], None] = lambda words: None,
    notes: Sequence[str] = (),
) -> WrittenReport:
    """Writes OUT/report.html, and its pictures as .png, and .svg where they are plots, into OUT/pictures.

    Args:
        data: the folder of a dataset; None where there is none.
        runs: folders of runs, in the order in which they are drawn.
        out: the folder, made where there is none; an earlier report in it is replaced, and nothing else.
        say: told what is being drawn.
        notes: sentences on what was named and is not there.

    Raises:
        AlexprepError: matplotlib or Jinja2 is not installed, or a file of somebody else has the name of one of the report's. OSError: the
            folder cannot be written to.
    """
    check_libraries()
    earlier = _earlier(out)
    make_folder(out / PICTURES)
    sections = []
    parts: list[tuple[str, Callable[[], Section]]] = [
        ("data", lambda: data_section(data)),
        ("statistics", lambda: statistics_section(data)),
        ("augmentation", lambda: augmentation_section(data, runs)),
        ("training", lambda: training_section(data, runs)),
        ("the paper's pictures", lambda: paper_section(data, runs)),
    ]
    for words, make in parts:
        say(words)
        sections.append(make())
    sections[0].blocks[:0] = [Words(note, warning=True) for note in notes]
    title = " · ".join(path.resolve().name for path in (*([data] if data else []), *runs)) or "nothing"
    pictures = [block for section in sections for block in section.blocks if isinstance(block, Picture | Plot)]
    files = {out / PICTURES / name: content for block in pictures for name, content in block.files()}
    _check_free(files.keys() - earlier)
    for path in earlier:
        path.unlink(missing_ok=True)
    for path, content in files.items():
        publish_bytes(path, content)
    publish_bytes(out / PAGE, render(title, sections).encode("utf-8", "surrogateescape"))
    return WrittenReport(out / PAGE, [words for section in sections for words in section.warnings])


def _earlier(out: Path) -> set[Path]:
    """The pictures of an earlier report in a folder. Raises AlexprepError where its page is no report of ours."""
    page = out / PAGE
    if not page.exists():
        return set()
    text = page.read_text(encoding="utf-8", errors="replace")
    if _OURS not in text:
        _check_free([page])
    return {out / PICTURES / f"{name}.{kind}" for name in _NAMED.findall(text) for kind in ("png", "svg")}


def _check_free(paths: Iterable[Path]) -> None:
    """Raises AlexprepError where one of the files exists."""
    for path in sorted(paths):
        if path.exists():
            raise AlexprepError(
                f"{path} is not of an earlier report: move or delete it, or name another folder with --out"
            )


def render(title: str, sections: Sequence[Section]) -> str:
    """The page of some sections; text is escaped wherever it comes from."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["kind"] = lambda block: type(block).__name__
    template = environment.from_string(Path(__file__).with_name("template.html").read_text(encoding="utf-8"))
    return template.render(title=title, sections=sections, version=versions("alexprep")["alexprep"])


def find_places(
    places: Sequence[str], data: Path, runs: Path, insist: bool = False
) -> tuple[Path | None, list[Path], list[str]]:
    """Tells what is meant by the arguments of `alexprep report`: (data, runs, a sentence for what is neither).

    An argument is the folder of a dataset, the folder of a run, or a run's name in `runs`. Where no dataset is named, the one that the first
    run was trained on is meant, or `data`, which goes first where `insist` says so; where nothing is named at all, also the run last active.

    Raises AlexprepError where nothing is found, or nothing of what is named.
    """
    chosen: Path | None = None
    found: list[Path] = []
    notes = []
    for place in places:
        folder = folder_at(place)
        if is_local(folder) and _holds_data(folder):
            if chosen is not None:
                notes.append(f"{place} is a second dataset: a report shows one, {chosen}.")
            chosen = chosen or folder
        elif (folder / CONFIG).exists():
            found.append(folder)
        elif (runs / place / CONFIG).exists():
            found.append(runs / place)
        else:
            notes.append(f"{place} is neither a dataset's folder, nor a run's, nor the name of a run in {runs}.")
    if not places:
        found += _last_active(runs)
    if chosen is None and (
        found or insist or not places
    ):  # names that are all wrong do not mean the data that are there
        there = [data] if _holds_data(data) else []
        trained_on = [] if insist and there else list(_trained_on(found))
        chosen = next(iter([*trained_on, *there]), None)
    if insist and chosen != data:
        notes.append(
            f"{data} is no dataset's folder."
            if not _holds_data(data)
            else f"{data} is a second dataset: a report shows one, {chosen}."
        )
    if chosen is None and not found:
        none = f"There is no dataset in {data} and no run in {runs}."
        raise AlexprepError(f"{' '.join(notes) or none} A report needs a dataset or a run: name its folder")
    return chosen, found, notes


def _holds_data(folder: Path) -> bool:
    return (folder / DATASET).exists() or (folder / PLAN).exists()


def _last_active(runs: Path) -> list[Path]:
    try:
        return [find_run(runs, None)]
    except AlexprepError:
        return []


def _trained_on(runs: Sequence[Path]) -> Iterator[Path]:
    """The datasets of runs, where they still are."""
    for run in runs:
        try:
            data = folder_at(read_config(run)["data"])
        except AlexprepError:
            continue
        if (data / DATASET).exists():
            yield data
