"""Random trees of folders: every file is accounted for, and no picture gets a container's name for its class without a question."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from alexprep.shards.errors import AlexprepError, AmbiguousSourceError
from alexprep.shards.listing import Listing
from tests.support.command_line import listed
from tests.support.trees import CONTAINER_WORDS, SPLIT_WORDS, pack_tree, random_tree, write_tree

MEANING = {word.lower() for word in (*SPLIT_WORDS, *CONTAINER_WORDS)}
MEANT = {word.lower(): {"tr": "train", "te": "test"}.get(word[:2].lower(), "val") for word in SPLIT_WORDS}
Rows = set[tuple[str, str, bytes]]  # split, class, path in the tree


def rows_of(listing: Listing) -> Rows:
    """What is read, with each file once."""
    rows = [
        (split, listing.names[row["class"]], row["member"] or row["path"])
        for split, table in listing.splits.items()
        for row in table.to_pylist()
    ]
    assert len({path for _, _, path in rows}) == len(rows)
    return set(rows)


def check_account(listing: Listing, files: set[bytes]) -> None:
    """Every file is an input or passed over by a rule."""
    rows = rows_of(listing)
    assert {path for _, _, path in rows} <= files
    assert listing.account.found == len(files) == len(rows) + listing.account.passed_over_count
    assert all(passed.count >= len(passed.names) > 0 for passed in listing.account.passed_over.values())


def outcome(place: Path, files: set[bytes], options: str = "") -> Rows | AlexprepError:
    """What is read, with its account, or what is said instead."""
    try:
        listing = listed(place, options)
    except AlexprepError as error:
        return error
    check_account(listing, files)
    return rows_of(listing)


def check_paths(rows: Rows, with_lists: bool) -> None:
    """The path of each picture says its class, if no list does, and its split, where a folder is named as one."""
    for split, class_name, path in rows:
        folders = os.path.dirname(path).decode("utf-8", "backslashreplace")
        assert with_lists or split == "test" or class_name
        assert with_lists or f"/{class_name}/" in f"/{folders}/" or not class_name, (path, class_name)
        told = {MEANT[word.lower()] for word in folders.split("/") if word.lower() in MEANT}
        assert split in (told or {"train", "val", "test"}), (path, split)


def ways_of(error: AmbiguousSourceError, place: Path) -> Iterator[str]:
    """The options of a question; what names another SOURCE is another question."""
    assert error.ways
    for what, _ in error.ways:
        if not what.startswith("SOURCE "):
            yield what


def files_below(place: Path) -> set[bytes]:
    """All files that there are, by another way than the code under test."""
    return {
        os.path.relpath(os.path.join(folder, name), bytes(place))
        for folder, _, names in os.walk(bytes(place))
        for name in names
    }


def check_tree(seed: int, work: Path) -> str:
    """All that is promised of one tree; returns how it ended."""
    tree = random_tree(seed)
    work.mkdir(exist_ok=True)
    place, packed = write_tree(tree, work / "tree"), pack_tree(tree, work / "packed.tar")
    place.mkdir(exist_ok=True)
    files = files_below(place)
    assert files == {path for path in tree if not path.endswith(b"/")}
    got = outcome(place, files)
    if isinstance(got, set):
        words = {word.lower() for _, class_name, _ in got for word in class_name.split("/")}
        assert not words & MEANING, words & MEANING
        check_paths(got, any(path.endswith(b".txt") for path in tree))
    elif isinstance(got, AmbiguousSourceError):
        for way in ways_of(got, place):
            chosen = outcome(place, files, way)
            broken = way in ("--layout tar", "--layout zip")  # the strays of these endings are no archives
            assert isinstance(chosen, AlexprepError if broken else set | AmbiguousSourceError), (way, chosen)
    if not any(path.endswith((b".txt", b".csv")) for path in tree):  # lists in a tar are neither read nor pointed to
        same = outcome(packed, files)
        assert same == got if isinstance(got, set) else type(same) is type(got), (got, same)
    return type(got).__name__


def test_every_file_is_accounted_for(whole: bool, tmp_path: Path) -> None:
    ends: Counter[str] = Counter()
    for seed in range(300 if whole else 60):
        print(f"seed {seed}")  # noqa: T201  (the last one printed is the one that failed)
        ends[check_tree(seed, tmp_path / str(seed))] += 1
    assert ends["set"] > 3 and ends["AmbiguousSourceError"] > 3  # both are met, or nothing is tested
