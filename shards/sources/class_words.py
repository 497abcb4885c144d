"""What class names mean in words: "tench, Tinca tinca" for n01440764. Read from lists and devkits beside images, or from a file.

Words stand in `dataset.json`, for people; no label, no order and no digest depends on them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection
from pathlib import Path

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.ground_truth import devkit_words
from alexprep.shards.storage import Files

# Lists of lines `WNID words`, as Kaggle's ImageNet, Tiny ImageNet and WordNet's own, and Caffe have them.
LISTS = (b"LOC_synset_mapping.txt", b"words.txt", b"synset_words.txt")
_MAX_LIST_BYTES = 2**26  # WordNet's words.txt has 2.7 MB
_is_wordnet_id = re.compile(r"n\d{8}").fullmatch


def words_beside(
    files: Files, devkit: Callable[[], tuple[str, bytes] | None], present: Collection[str]
) -> dict[str, str]:
    """The words of those of some class names that are WordNet IDs, by a list in the root of `files`, or a devkit; {} for none.

    What is damaged tells nothing: no image depends on it.
    """
    wanted = set(filter(_is_wordnet_id, present))
    if not wanted:
        return {}
    names = files.file_names()
    for name in filter(names.__contains__, LISTS):
        with contextlib.suppress(AlexprepError, OSError, UnicodeDecodeError):
            words = _in_lines(files.read(name, 0, _MAX_LIST_BYTES).decode("utf-8-sig"))
            if found := {each: words[each] for each in wanted & words.keys()}:
                return found
    with contextlib.suppress(AlexprepError, OSError):
        kit = devkit()
        words = devkit_words(*kit) if kit else {}
        return {each: words[each] for each in wanted & words.keys()}
    return {}


def read_class_words(path: Path | str, classes: Collection[str]) -> dict[str, str]:
    """The words of some classes by a text file of lines `CLASS words`; the class ends at a tab, or else at the first blank.

    Classes that it does not name have none. An AlexprepError where it cannot be read, or names none of them.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AlexprepError(f"--class-words {path} is no text file that can be read ({error})") from None
    words = _in_lines(text)
    found = {name: words[name] for name in classes if name in words}
    if classes and not found:
        raise AlexprepError(
            f"--class-words {path} names none of the {len(classes):,} classes, such as {min(classes)!r}: it needs lines of a class's name, "
            "a tab, and its words"
        )
    return found


def _in_lines(text: str) -> dict[str, str]:
    """By lines `NAME words`; those of another form are left out."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, _, words = line.strip().partition("\t") if "\t" in line else line.strip().partition(" ")
        if name and words.strip():
            found.setdefault(name, words.strip())
    return found
