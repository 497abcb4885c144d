"""The lines of a layer file: sections [NAME] of KEY=VALUE, comments, and what is to be said of a line that is not right.

What the sections mean is in `alexprep.train.layer_files`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from alexprep.shards.errors import AlexprepError

ENDING = ".cfg"
MOST_BYTES = 1 << 20
COMMENTS = ("#", ";")
TRUE = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


@dataclass
class Entry:
    """A value with its place."""

    text: str
    file: Path
    line: int
    read: bool = False

    def error(self, why: str) -> AlexprepError:
        """What to say of this line."""
        return AlexprepError(f"{self.file}, line {self.line}: {why}")


@dataclass
class Section:
    """A layer's lines in one file, or, joined, in both."""

    name: str
    file: Path
    line: int
    entries: dict[str, Entry] = field(default_factory=dict)

    def error(self, why: str, key: str = "") -> AlexprepError:
        """What to say of a key's line, or of the line where the section begins."""
        entry = self.entries.get(key)
        where, line = (entry.file, entry.line) if entry else (self.file, self.line)
        return AlexprepError(f"{where}, line {line}: [{self.name}] {why}")

    def text(self, key: str, default: str | None = None) -> str:
        """The text of a key; an error where it is missing without a default."""
        entry = self.entries.get(key)
        if entry is None:
            if default is None:
                raise self.error(f"has no {key}, which it needs")
            return default
        entry.read = True
        return entry.text

    def list(self, key: str) -> list[str]:
        """Words with commas between them."""
        return [word.strip() for word in self.text(key).split(",") if word.strip()]

    def whole(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number; of several with commas, one for each input, all must be the same."""
        return int(self._number(key, low, high, default, int))

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """Likewise."""
        return self._number(key, low, high, default, float)

    def truth(self, key: str, default: bool) -> bool:
        """0 or 1, true or false."""
        text = self.text(key, str(default)).lower()
        if text not in TRUE:
            raise self.error(f"{key}={text} is neither 0 nor 1", key)
        return TRUE[text]

    def _number(self, key: str, low: float, high: float, default: float | None, kind: Callable[[str], float]) -> float:
        words = self.text(key, None if default is None else str(default)).split(",")
        try:
            values = {kind(word) for word in words}
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise self.error(f"{key}={','.join(words)} is not {wanted}", key) from None
        if len(values) > 1:
            raise self.error(f"{key}={','.join(words)} differs between inputs, which alexprep has no layer for", key)
        value = values.pop()
        if not low <= value <= high:
            style = "," if kind is int else "g"
            raise self.error(f"{key}={value:{style}} is not within {low:{style}} to {high:{style}}", key)
        return value


def sections(path: Path) -> dict[str, Section]:
    """A file's sections by name, in order."""
    if path.stat().st_size > MOST_BYTES:
        raise AlexprepError(f"{path} has more than {MOST_BYTES:,} bytes, which no layer file needs")
    found: dict[str, Section] = {}
    section = None
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise AlexprepError(f"{path}, line {number}: no text in UTF-8 ({error.reason})") from None
        if not line or line.startswith(COMMENTS):
            continue
        if line.startswith("["):
            name = line[1:-1].strip()
            if not line.endswith("]") or not name or "." in name:
                raise AlexprepError(f"{path}, line {number}: {line!r} is not [NAME], a name without dots")
            if name in found:
                raise AlexprepError(f"{path}, line {number}: [{name}] stands in line {found[name].line}, too")
            section = found[name] = Section(name, path, number)
            continue
        key, equals, text = (part.strip() for part in line.partition("="))
        if not equals or not key or not text:
            raise AlexprepError(f"{path}, line {number}: {line!r} is neither [NAME] nor KEY=VALUE")
        if section is None:
            raise AlexprepError(f"{path}, line {number}: {line!r} stands before the first [NAME]")
        if key in section.entries:
            raise AlexprepError(f"{path}, line {number}: {key} stands in line {section.entries[key].line}, too")
        section.entries[key] = Entry(text, path, number)
    return found
