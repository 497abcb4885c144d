"""ILSVRC's devkits, which tell what class a number means: those of 2010 and of 2012 number different classes."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.files import Files, inflated
from alexprep.shards.tar_format import members

_FOLDER = re.compile(rb"(?:ILSVRC(20\d\d)_)?devkit[\w.-]*")
_ARCHIVE = re.compile(rb"(?:ILSVRC(20\d\d)_)?devkit[\w.-]*\.(?:tar|tgz|tar\.gz)")
_YEAR = re.compile(rb"(?:^|/)ILSVRC(20\d\d)_")
_META = rb"meta\.mat"


class DevkitFile(NamedTuple):
    """A file of a devkit.

    Attributes:
        place: the folder or archive in the root that holds it; empty for the root itself.
        year: of the devkit, as "2012"; empty where nothing tells it.
        origin: its name, for messages.
        content: its bytes.
    """

    place: bytes
    year: str
    origin: str
    content: bytes


def year_of(names: Iterable[bytes]) -> str:
    """The year that names such as ILSVRC2012_val_00000001.JPEG tell; empty where they tell none, or several.

    >>> year_of([b"val/ILSVRC2012_val_00000001.JPEG", b"n01440764_10026.JPEG"])
    '2012'
    """
    found = {match[1] for name in names if (match := _YEAR.search(name))}
    return found.pop().decode() if len(found) == 1 else ""


def find_meta_mat(files: Files, year: str) -> tuple[str, bytes] | None:
    """The name and content of meta.mat: in the root, or in a devkit there, unpacked or as downloaded.

    Args:
        files: where to look.
        year: of the images; empty where it is not known.

    Raises:
        AlexprepError: there are some of several years, and no year tells which one counts.
    """
    found = _one_year(files, [*_meta_mats(files, year)])
    return (found[0].origin, found[0].content) if found else None


def find_ground_truth(files: Files, split: str, year: str) -> tuple[DevkitFile, DevkitFile | None] | None:
    """The list of IDs of a split's images, and the meta.mat of the same year, of the same devkit if it is there.

    Args:
        files: where to look.
        split: "val" or "test".
        year: of the images; empty where it is not known.

    Raises:
        AlexprepError: there are some of several years, and no year tells which one counts.
    """
    word = {"val": "validation"}.get(split, split)
    any_year = r"20\d\d"
    named = rf"ILSVRC{year or any_year}_{word}_ground_truth\.txt".encode()
    truths = _one_year(files, [*_held(files, named, year)])
    if not truths:
        return None
    metas = [*_meta_mats(files, truths[0].year)]
    pairs = [(truth, meta) for truth in truths for meta in metas]
    together = (pair for pair in pairs if pair[0].place == pair[1].place)
    return next(together, pairs[0] if pairs else (truths[0], None))


def _one_year(files: Files, found: list[DevkitFile]) -> list[DevkitFile]:
    """What was found, where all that tell a year tell the same one."""
    years = {file.year: file.origin for file in found if file.year}
    if len(years) > 1:
        raise AlexprepError(
            f"{files.display()} holds devkits of {' and '.join(sorted(years))} ({', '.join(sorted(years.values()))}), which "
            "number classes differently, and the images' names do not tell their year: move the other devkits away"
        )
    return found


def _meta_mats(files: Files, year: str) -> Iterator[DevkitFile]:
    """Those of a year, and those that tell none; of all years where `year` is empty."""
    for file in _held(files, _META, year):
        told = file._replace(year=file.year or _year_within(file.content))
        if not year or told.year in ("", year):
            yield told


def _held(files: Files, pattern: bytes, year: str) -> Iterator[DevkitFile]:
    """The files of that name in the root and in the devkits there, but for devkits whose name tells another year."""
    for entry in files.entries():
        place = (_FOLDER if entry.is_folder else _ARCHIVE).fullmatch(entry.name)
        if place and year and place[1] and place[1].decode() != year:
            continue
        told = (place[1] or b"").decode() if place else ""
        if entry.is_folder:
            for below in files.entries(entry.name + b"/data") if place else ():
                if re.fullmatch(pattern, below.name):
                    path = entry.name + b"/data/" + below.name
                    own = year_of([below.name]) or told
                    yield DevkitFile(entry.name, own, files.display(path), files.read(path))
        elif re.fullmatch(pattern, entry.name):
            yield DevkitFile(b"", year_of([entry.name]), files.display(entry.name), files.read(entry.name))
        elif place:
            shown = files.display(entry.name)
            found = _member(inflated(files, entry.name), shown, b"(^|/)" + pattern + b"$")
            if found is not None:
                own = year_of([found[0].encode()]) or told
                yield DevkitFile(entry.name, own, f"{shown}/{found[0]}", found[1])


def _member(content: bytes, name: str, pattern: bytes) -> tuple[str, bytes] | None:
    """The name and content of the first member of a tar in memory whose name matches `pattern`."""
    for member in members(lambda offset, size: content[offset : offset + size], len(content), name):
        if member.kind == "file" and re.search(pattern, member.name):
            shown = member.name.decode("utf-8", "backslashreplace")
            return shown, content[member.offset : member.offset + member.size]
    return None


def devkit_order(name: str, content: bytes) -> list[str]:
    """The low-level synsets of a 2010 or 2012 devkit's meta.mat (see its readme.txt), by ID; IDs above are ancestors.

    Raises:
        AlexprepError: `content`, read from the file `name`, is none.
    """
    try:
        synsets, identity = _synsets(content)
        leaves = [(int(s[identity]), str(s["WNID"])) for s in synsets if int(s["num_children"]) == 0]
    except Exception as error:  # noqa: BLE001  (scipy raises many kinds)
        raise AlexprepError(f"{name} is not a devkit's meta.mat ({error}): give --labels FILE instead") from None
    return [wnid for _, wnid in sorted(leaves)]


def _year_within(content: bytes) -> str:
    """The year by the name that a meta.mat gives its IDs (ILSVRC2012_ID); empty where it is none."""
    try:
        return year_of([_synsets(content)[1].encode()])
    except Exception:  # noqa: BLE001  (scipy raises many kinds; whoever needs the file will say so)
        return ""


@functools.lru_cache(maxsize=2)
def _synsets(content: bytes) -> tuple[Any, str]:
    """The table of synsets, and the name of the column with their IDs."""
    from scipy.io import loadmat

    synsets = loadmat(io.BytesIO(content), squeeze_me=True, struct_as_record=True)["synsets"]
    return synsets, next(name for name in synsets.dtype.names if name.endswith("_ID"))
