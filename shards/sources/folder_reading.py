"""Decides what the folders of a tree mean: which of them are splits, which are classes, and which only wrap others.

A reading needs positive evidence, and there must be one reading only: where two fit, `AmbiguousSourceError` says what was found and
which `Choices` choose. How a tree is read from a disk, a store or a tar is in `tree`; lists that tell the classes of pictures in one
flat folder are in `ground_truth`, and sets whose publishers list their splits or classes in `published`.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from alexprep.shards.errors import AlexprepError, AmbiguousSourceError, counted
from alexprep.shards.sources.base import (
    ARCHIVE,
    NO_CHOICES,
    SPLITS,
    Choices,
    as_options,
    split_of,
)
from alexprep.shards.sources.folder_names import (
    CONTAINERS,
    MASK_ENDINGS,
    are_parts,
    is_no_class,
    is_unlabelled,
    is_wordnet_id,
    may_be_list,
)
from alexprep.shards.sources.foreign_formats import image_folder
from alexprep.shards.sources.ground_truth import GroundTruth, stem
from alexprep.shards.sources.picture_names import is_picture
from alexprep.shards.sources.split_folders import Depth, SplitFolder, candidates, class_folders, class_names
from alexprep.shards.sources.tree import Folder, rule_of
from alexprep.shards.storage import as_text

# Gives what tells the classes of pictures in one flat folder: (split, folder, train classes) → ground truth, or None.
FindTruth = Callable[[str, Folder, list[str]], GroundTruth | None]

_LEVELS_SHOWN = 6  # of class folders, in a question
_SISTERS = 10  # one name in more than so many that speaks against a class is a warning; else it is a question
_word_and_number = re.compile(rb"([^\d.]*[^\d._ -])[._ -]*\d+\.\w+").fullmatch


def _few(count: int) -> int:
    """How many pictures may lie elsewhere, of so many in all, to be passed over with a warning; more are a question."""
    return max(1, count // 20)


@dataclass
class Reading:
    """What the folders of a tree mean.

    Attributes:
        splits: in ascending order of the split.
        evidence: why, in words.
        warnings: what needs no decision.
        skipped: how many folders between a split's folder and its class folders only wrap these, by split.
    """

    splits: list[SplitFolder]
    evidence: str = ""
    warnings: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)


def read_folders(
    root: Folder, shown: str, truth_of: FindTruth, choices: Choices = NO_CHOICES, split: str = "train"
) -> Reading:
    """What the folders below `root` mean; `shown` is its name for messages, `split` the one that it is if no folder tells.

    Raises:
        AmbiguousSourceError: two readings fit.
        AlexprepError: none does, or `choices` name what is not there.
    """
    if not choices.unlabelled:
        _refuse_detection_sets(root, shown)

    def read(choices: Choices) -> Reading:
        return _read(root, shown, truth_of, choices, split)

    try:
        return read(choices)
    except _Question as question:
        refusals = [(way, _refusal(read, choices, way)) for way, _ in question.ways]
        ways = [
            (as_options(way), words) for (way, words), (_, no) in zip(question.ways, refusals, strict=True) if not no
        ]
        if not ways:
            raise AlexprepError(f"{question.found} {refusals[0][1]}") from None
        raise AmbiguousSourceError(question.found, ways) from None


def _refusal(read: Callable[[Choices], Reading], choices: Choices, way: Choices) -> str:
    """Why a way out of a question ends in a refusal, perhaps after more questions; empty where it leads to a reading."""
    chosen = replace(choices, **{name: value for name, value in vars(way).items() if value is not None})
    try:
        read(chosen)
    except _Question as next_one:
        refusals = ["no way out"] if chosen == choices else [_refusal(read, chosen, way) for way, _ in next_one.ways]
        return "" if "" in refusals else refusals[0]
    except AlexprepError as error:
        return str(error)
    return ""


class _Question(Exception):
    """A doubt: what was found, and (what to choose, what it means) of each way out."""

    def __init__(self, found: str, ways: Sequence[tuple[Choices, str]]) -> None:
        super().__init__(found)
        self.found, self.ways = found, ways


def _read(root: Folder, shown: str, truth_of: FindTruth, choices: Choices, split: str) -> Reading:
    reading = Reading([])
    if choices.split_folders is None:
        parts, where = _split_parts(root, shown, split, reading)
    else:
        parts, where = _chosen_parts(root, shown, choices.split_folders, split), "as chosen"
    if choices.unlabelled:
        reading.splits = sorted(
            (SplitFolder(name, folder.path, without=without, unlabelled=True) for name, folder, without in parts),
            key=lambda found: found.split,
        )
        reading.evidence = "all pictures, without labels" + (f"; {where}" if where.startswith("split") else "")
        return reading
    classes_of: dict[str, list[str]] = {}
    numbered: list[str] = []  # the class folders of train, empty ones too: lists of labels count them
    for name, folder, without in sorted(parts, key=lambda part: (part[0] != "train", part[0])):
        found = _read_split(name, folder, without, shown, choices, truth_of, numbered, reading)
        reading.splits.append(found)
        if not found.flat:
            together = dict.fromkeys([*classes_of.get(name, ()), *class_names(found, root)])
            classes_of[name] = sorted(together, key=str.encode)
            if name == "train":
                here = [as_text(folder) for folder, _ in candidates(found, root.at(found.path) or root)]
                numbered = sorted({*numbered, *here}, key=str.encode)
    if choices.split_folders is None:
        _check_shared(classes_of, reading, shown)
    if choices == NO_CHOICES:
        _check_names(classes_of, reading, root, shown)
    _warn_of_lists(root, reading, shown)
    _warn_of_masks(root, reading)
    reading.splits.sort(key=lambda found: found.split)
    reading.evidence = where
    return reading


# Which folders are splits.

_Part = tuple[str, Folder, tuple[bytes, ...]]  # split, its folder, folders in it that belong to others


def _split_parts(root: Folder, shown: str, split: str, reading: Reading) -> tuple[list[_Part], str]:
    """The split folders below `root`, or `root` itself where there are none; and the evidence in words."""
    base = _unwrapped(root)
    filled = base.filled
    named = {folder.path: SPLITS.get(_lower(folder)) for folder in filled}
    told = {folder.path: split_of(folder.name) for folder in filled}  # also test1 and seg_train
    if any(named.values()):
        exact = set(named.values())
        named |= {path: name for path, name in told.items() if not named[path] and name not in exact}
    else:
        silent = [f for f in filled if not told[f.path] and not is_unlabelled(as_text(f.name))]
        if len({name for name in told.values() if name}) > 1 and not silent:
            named = told
    splits = {folder.path: name for folder in filled if (name := named[folder.path])}
    if not splits:
        wraps = f" in {as_text(base.path)}" if base.path else ""
        return [(split, base, ())], f"class folders{wraps}"
    _check_one_each(splits, base, shown)
    beside = [folder for folder in filled if folder.path not in splits]
    if beside or _loose(base):
        _weigh_beside(splits, beside, base, shown, reading)
    _refuse_packed_splits(splits, base, shown)
    empty = [folder for folder in base.folders if not folder.count and _lower(folder) in SPLITS]
    for folder in empty:
        reading.warnings.append(f"{_shown(folder, shown)} holds no pictures: there is no such split")
    parts: list[_Part] = [(name, folder, ()) for folder in filled if (name := splits.get(folder.path))]
    return parts, f"split folders {', '.join(as_text(folder.path) for _, folder, _ in parts)}"


def _refuse_packed_splits(splits: dict[bytes, str], base: Folder, shown: str) -> None:
    """Asks where a split lies beside the others as archives: train.tar, or train/ full of tars."""
    packed = [
        name for name in base.papers if rule_of(name) == ARCHIVE and split_of(name) not in (None, *splits.values())
    ]
    for folder in base.folders:
        if not folder.count and _lower(folder) in SPLITS:
            inside = (
                below.path + b"/" + name for below in folder.walk() for name in below.papers if rule_of(name) == ARCHIVE
            )
            packed += [path.removeprefix(base.path + b"/") for path in itertools.islice(inside, 1)]
    if packed:
        given = tuple((split, as_text(path)) for path, split in splits.items())
        raise _Question(
            f"SOURCE {_shown(base, shown)} holds another split in archives ({as_text(packed[0])}), which are not read beside folders: "
            "unpack them, or name one of them as SOURCE.",
            [(Choices(given), "the folders alone, without what is packed")],
        )


def _unwrapped(folder: Folder) -> Folder:
    """The folder without those that only wrap it: each holds no pictures and one folder that holds all, in folders again."""
    while len(folder.filled) == 1 and len(_loose(folder)) <= _few(folder.count):
        (inner,) = folder.filled
        if not inner.filled or len(_loose(inner)) > _few(inner.count):
            return folder
        inside = {SPLITS.get(_lower(below)) for below in inner.filled}
        if _lower(inner) in SPLITS and (len(inside) < 2 or None in inside):
            return folder  # a split alone, which tells something
        folder = inner
    return folder


def _check_one_each(splits: dict[bytes, str], base: Folder, shown: str) -> None:
    """Asks where two folders mean one split, unless they are parts of it: their names say so, and each has WordNet IDs of its own."""
    for name in sorted(set(splits.values())):
        paths = [as_text(path) for path, split in splits.items() if split == name]
        if len(paths) > 1 and not _are_parts_of_one(
            [folder for folder in base.filled if splits.get(folder.path) == name]
        ):
            others = [(split, as_text(path)) for path, split in splits.items() if split != name]
            raise _Question(
                f"SOURCE {_shown(base, shown)} holds {' and '.join(os.path.basename(path) for path in paths)}, which both mean {name!r}.",
                [
                    *(
                        (Choices(((name, path), *others)), f"{os.path.basename(path)} is, and the other is passed over")
                        for path in paths
                    ),
                    (Choices((*((name, path) for path in paths), *others)), "both are, with the classes of both"),
                ],
            )


def _are_parts_of_one(folders: Sequence[Folder]) -> bool:
    """Whether folders hold parts of one split: their names are equal but for a number, and no two share a class, which are WordNet IDs."""
    stems = {re.sub(rb"\d+$", b"", folder.name) for folder in folders}
    classes = [below.name for folder in folders for below in folder.filled]
    return len(stems) == 1 and len(set(classes)) == len(classes) and all(map(is_wordnet_id, classes))


def _weigh_beside(splits: dict[bytes, str], beside: list[Folder], base: Folder, shown: str, reading: Reading) -> None:
    """Warns of pictures beside the splits' folders, or asks where they may be classes."""
    inside = sum(folder.count for folder in base.filled if folder.path in splits)
    outside = sum(folder.count for folder in beside) + len(_loose(base))
    plain = [folder for folder in beside if not is_unlabelled(as_text(folder.name))]
    loose = sum(folder.count for folder in plain) + len(_loose(base))
    names = ", ".join(as_text(folder.name) for folder in beside[:5]) or as_text(_loose(base)[0])
    if "train" in splits.values() and loose <= _few(inside):
        reading.warnings.append(
            f"passed over: {counted(outside, 'picture')} beside the split folders of {_shown(base, shown)} ({names})"
        )
        return
    given = tuple((split, as_text(path)) for path, split in splits.items())
    ways = [(Choices(given), "these are the splits, and what lies beside them is passed over")]
    if "train" not in splits.values():
        here = as_text(base.path) or "."
        ways.append((Choices((("train", here), *given)), "the folders beside them are the classes of train"))
        wide = [folder for folder in beside if folder.filled]
        ways += [(Choices((("train", as_text(f.path)), *given)), f"{as_text(f.name)} is train") for f in wide[:3]]
    if 2 * sum(is_no_class(as_text(folder.name)) for folder in base.filled) <= len(base.filled):
        ways.append((Choices(()), "no folder means a split: all of them are classes of train"))
    found = " and ".join(os.path.basename(as_text(path)) for path in splits)
    raise _Question(
        f"SOURCE {_shown(base, shown)} holds {found}, which by name {'is a split' if len(splits) == 1 else 'are splits'}, and beside "
        f"{'it' if len(splits) == 1 else 'them'} {counted(outside, 'picture')} in {counted(len(beside), 'other folder')} ({names}).",
        ways,
    )


def _chosen_parts(root: Folder, shown: str, chosen: tuple[tuple[str, str], ...], split: str) -> list[_Part]:
    """The folders that the user named; the root, where none means a split."""
    if not chosen:
        return [(split, _unwrapped(root), ())]
    parts: list[_Part] = []
    paths = [os.fsencode(os.path.normpath(place)) for _, place in chosen]
    for (name, place), path in zip(chosen, paths, strict=True):
        folder = root.at(b"" if path == b"." else path)
        if folder is None or not folder.count:
            what = "does not exist" if folder is None else "holds no pictures"
            raise AlexprepError(
                f"--split-folders {name}={place}: {_join(shown, place)} {what}; name a folder below SOURCE"
            )
        inner = b"" if path == b"." else path + b"/"
        parts.append((name, folder, tuple(other for other in paths if other != path and other.startswith(inner))))
    return parts


# Which folders are classes.


def _read_split(
    split: str,
    folder: Folder,
    without: tuple[bytes, ...],
    shown: str,
    choices: Choices,
    truth_of: FindTruth,
    numbered: list[str],
    reading: Reading,
) -> SplitFolder:
    """How the pictures of one split are labelled."""
    folder = folder.without(without)
    top = folder
    while (
        len(top.filled) == 1
        and len(_loose(top)) <= _few(top.count) < top.count - len(top.pictures)
        and (top.filled[0].filled or _wraps_pictures(top, top.filled[0], split))
    ):
        top = top.filled[0]
        reading.skipped[split] = reading.skipped.get(split, 0) + 1
    if choices.class_depth is not None:
        found = SplitFolder(split, folder.path, choices.class_depth, without=without)
        if class_folders(found, folder):
            return found
        if not top.leaf:
            raise AlexprepError(
                f"--class-depth {choices.class_depth}: {_shown(folder, shown)} has no folder with pictures so deep; give a smaller number"
            )
    if top.pictures:
        flat = _flat(split, top, shown, truth_of, numbered, reading)
        if flat is not None:
            return flat
        _weigh_loose(split, top, shown, reading)
    packed = [name for name in top.papers if rule_of(name) == ARCHIVE]
    if packed:
        reading.warnings.append(
            f"not read: {counted(len(packed), 'archive')} beside the class folders of {_shown(top, shown)}, such as {as_text(packed[0])}"
        )
    depth, by_last_name = _class_depth(split, top, shown, reading)
    return SplitFolder(split, top.path, depth, by_last_name=by_last_name, without=without)


def _wraps_pictures(outer: Folder, inner: Folder, split: str) -> bool:
    """Whether a folder with pictures in a split's folder is no class: test/images, val/val."""
    tells_nothing = _lower(inner) in CONTAINERS or inner.name == outer.name or split_of(inner.name) == split
    return bool(outer.path) and inner.leaf and tells_nothing


def _flat(
    split: str, top: Folder, shown: str, truth_of: FindTruth, numbered: list[str], reading: Reading
) -> SplitFolder | None:
    """The flat split whose pictures lie in `top`; None where its folders are classes, and the pictures in none of them."""
    strays = top.count - len(top.pictures)
    if strays > len(top.pictures):
        return None
    truth = truth_of(split, top, numbered)
    place = _shown(top, shown)
    if truth is None and strays:
        return None
    if truth is None and (words := image_folder(top)):
        raise AlexprepError(f"{place} is {words}")
    if truth is None and split != "test":
        raise AlexprepError(
            f"{place} holds no class folders, and nothing beside it tells the classes of its images: sort them into "
            f"{place}/CLASS/IMAGE, put a ground truth into SOURCE (LOC_{split}_solution.csv, {split}.txt, or the devkit), "
            f"or move it away; --unlabelled takes all pictures of SOURCE without labels{_words_in_names(top)}"
        )
    if truth is None:
        reading.warnings.append(
            f"nothing tells the classes of the {len(top.pictures):,} images in {place}: their label is -1"
        )
    else:
        known = {stem(name) for _, name in truth.sorted(top.pictures)}  # it must know them all
        gone = [name for name in truth.classes if name not in known]
        if gone:
            reading.warnings.append(
                f"{counted(len(gone), 'picture')} that {truth.origin} names are not in {place}, such as {as_text(min(gone))}"
            )
    if truth is not None and top.folders:
        names = ", ".join(as_text(folder.name) for folder in top.folders[:5])
        reading.warnings.append(
            f"{place} is read by {truth.origin}; passed over: {counted(strays, 'picture')} in folders in it ({names})"
        )
    return SplitFolder(split, top.path, flat=True, truth=truth)


def flat_question(top: Folder, shown: str) -> AmbiguousSourceError:
    """The question that a source of pictures without any class folder is."""
    return AmbiguousSourceError(
        f"SOURCE {shown} holds pictures and no class folders, and nothing tells the classes of its pictures. Sort them into class folders "
        f"(SOURCE/CLASS/IMAGE), or name a list of path and label (CSV) as SOURCE{_words_in_names(top)}.",
        [("--unlabelled", "the pictures have no labels, and need none")],
    )


def _words_in_names(top: Folder) -> str:
    """A hint where the names of pictures begin with a few words, as cat.0.jpg and dog.0.jpg: they may be the classes."""
    words = [match[1] for name in top.pictures if (match := _word_and_number(name))]
    kinds = sorted(set(words))
    if len(words) < len(top.pictures) or not 1 < len(kinds) <= max(2, len(words) // 2):
        return ""
    return (
        f". The names begin with {', '.join(map(as_text, kinds[:3]))}{', …' if len(kinds) > 3 else ''}: if these are the classes, write "
        "a list of path and label (CSV) by them, and name that as SOURCE"
    )


def _weigh_loose(split: str, top: Folder, shown: str, reading: Reading) -> None:
    """Warns of pictures beside class folders, or asks where they are many."""
    place, sure = _shown(top, shown), _loose(top)
    if not sure:
        return
    loose = len(sure)
    words = f"{counted(loose, 'picture')} in {place} and in no class folder, such as {as_text(sure[0])}"
    if loose <= _few(top.count):
        reading.warnings.append(f"passed over: {words}")
        return
    raise _Question(
        f"SOURCE holds {words}, beside {counted(len(top.filled), 'folder')} with {counted(sum(f.count for f in top.filled), 'picture')}.",
        [
            (
                Choices(class_depth=1 + reading.skipped.get(split, 0)),
                "the folders are classes, and the pictures beside them are passed over",
            )
        ],
    )


def _class_depth(split: str, top: Folder, shown: str, reading: Reading) -> tuple[Depth, bool]:
    """How deep the class folders lie below `top`, where one answer only is possible, and whether their own names alone name the classes."""
    children = top.filled
    if all(child.leaf for child in children):
        return 1, False
    nested = sum(child.count - len(child.pictures) for child in children)
    if all(child.pictures for child in children) and nested <= _few(top.count):
        some = next(child for child in children if child.filled).filled[0]
        reading.warnings.append(
            f"counted for the class around them: {counted(nested, 'picture')} in folders within class folders, as {_shown(some, shown)}"
        )
        return 1, False
    inner = {below.name for child in children for below in child.filled}
    alone = all(not child.pictures and len(child.filled) == 1 and child.filled[0].leaf for child in children)
    if alone and len(inner) == 1 and len(children) > 1 and is_no_class(as_text(next(iter(inner)))):
        return 1, False  # CLASS/images/IMAGE: the inner folder tells nothing
    levels = list(_levels(top))
    marked = [depth for depth, names in enumerate(levels, 1) if names and all(map(is_wordnet_id, names))]
    if len(marked) == 1 and not any(is_no_class(as_text(name)) for names in levels[marked[0] :] for name in names):
        found = [os.path.basename(name) for name, _ in class_folders(SplitFolder(split, top.path, marked[0]), top)]
        if len(set(found)) == len(found):  # or parts of one synset, or domains of it
            return marked[0], True
    if _is_by_letter(children):
        return "leaf", False  # a/abbey, and also a/apartment_building/outdoor
    depths = range(1, min(len(levels), _LEVELS_SHOWN) + 1)
    ways: list[tuple[Choices, str]] = []
    for depth in depths:
        found = [name for name, _ in class_folders(SplitFolder(split, top.path, depth), top)]
        ways.append(
            (
                Choices(class_depth=depth + reading.skipped.get(split, 0)),
                f"{counted(len(found), 'class')}, such as {as_text(found[0])}",
            )
        )
    leaves = [name for name, _ in class_folders(SplitFolder(split, top.path, "leaf"), top)]
    ways.append(
        (
            Choices(class_depth="leaf"),
            f"each folder that holds pictures is a class: {len(leaves):,}, such as {as_text(leaves[0])}",
        )
    )
    mixed = any(child.pictures and child.filled for child in top.walk() if child is not top)
    what = "pictures on several levels" if mixed else f"folders that hold folders ({_example(children)})"
    raise _Question(
        f"SOURCE: {_shown(top, shown)} holds {counted(len(children), 'folder')}, and in them {what}. Any of these levels may be the classes; or name one of the folders as SOURCE.",
        ways,
    )


def _levels(top: Folder) -> Iterator[set[bytes]]:
    """The names of the filled folders on each level below."""
    here = top.filled
    while here:
        yield {folder.name for folder in here}
        here = [below for folder in here for below in folder.filled]


def _is_by_letter(children: Sequence[Folder]) -> bool:
    """Whether folders of one letter each only sort the class folders, whose names begin with it."""
    return len(children) > 1 and all(
        len(child.name) == 1
        and child.name.isalpha()
        and not child.pictures
        and all(below.name[:1].lower() == child.name.lower() for below in child.filled)
        for child in children
    )


# What the names of classes tell.


def shares_few(train: Collection[str], names: Collection[str]) -> bool:
    """Whether fewer than half of the class names of a split are among those of train, where there are any."""
    return bool(train) and 2 * len(set(train).intersection(names)) < len(names)


def _check_shared(classes_of: dict[str, list[str]], reading: Reading, shown: str) -> None:
    """Asks where train and another split share few class names."""
    train = set(classes_of.get("train", ()))
    for split, names in classes_of.items():
        if split == "train" or not shares_few(train, names):
            continue
        shared = len(train.intersection(names))
        odd = next(name for name in names if name not in train)
        paths = [(part.split, as_text(part.path) or ".") for part in reading.splits]
        ways = [
            (Choices(tuple(paths)), "this is so: the classes of all splits are numbered together"),
            *(
                (Choices(tuple(each for each in paths if each[0] == one)), f"take {one} alone")
                for one in ("train", split)
            ),
        ]
        raise _Question(
            f"SOURCE {shown}: only {shared:,} of the {len(names):,} class names of {split} are among the {len(train):,} of train "
            f"({odd!r} is not).",
            ways,
        )


def _check_names(classes_of: dict[str, list[str]], reading: Reading, root: Folder, shown: str) -> None:
    """Asks where a class would get the name of a folder that usually holds classes; warns of folders without pictures."""
    present = {name for names in classes_of.values() for name in names}
    present |= {name for part in reading.splits if part.truth for name in part.truth.classes.values()}
    empty: dict[str, None] = {}
    for part in reading.splits:
        top = root.at(part.path)
        if top is None or part.flat:
            continue
        _doubt_names(part, top, class_names(part, root), reading, shown)
        empty |= {as_text(name): None for name, folder in candidates(part, top) if not folder.count}
    gone = [name for name in empty if name not in present]
    if gone:
        reading.warnings.append(
            f"without pictures: {counted(len(gone), 'class folder')} ({', '.join(map(repr, gone[:5]))}), which get no label; the classes after "
            "are numbered as if these were not there"
        )


def _doubt_names(part: SplitFolder, top: Folder, names: list[str], reading: Reading, shown: str) -> None:
    """Asks where names speak against classes: containers, splits, or parts of one set. One among many is a warning."""
    odd = [name for name in names if any(map(is_no_class, name.split("/")))]
    parts = are_parts(names)
    if not odd and not parts:
        return
    folders = {as_text(name): folder for name, folder in class_folders(part, top)}
    if not parts and len(names) > _SISTERS * len(odd) and not any(folders[name].filled for name in odd):
        reading.warnings.append(
            f"taken for {counted(len(odd), 'class')} among {len(names):,}, though the name is also a container's or split's: {', '.join(odd[:5])}"
        )
        return
    first = names[0] if parts else odd[0]
    depth = 1 + reading.skipped.get(part.split, 0)
    ways = [(Choices(class_depth=depth), f"{'they are classes' if parts else f'{first} is a class'}")]
    if any(folder.filled for folder in folders.values()):
        ways.append((Choices(class_depth="leaf"), "each folder that holds pictures is a class"))
    if not parts:
        alone = os.path.join(as_text(part.path), first)
        ways.append(
            (Choices(((part.split, alone),)), f"{alone} alone is {part.split}, and what lies beside it is passed over")
        )
    what = (
        f"by their names {first}, {names[1]} … are parts of one set"
        if parts
        else f"by its name {first} is no class but holds a dataset's pictures"
    )
    raise _Question(
        f"SOURCE: {_shown(top, shown)} holds {counted(len(names), 'folder')} with pictures, and {what}.", ways
    )


def _warn_of_lists(root: Folder, reading: Reading, shown: str) -> None:
    """Warns of lists that nobody reads, where they may tell more than the folders: splits, or the labels of a flat split."""
    unlabelled = [part for part in reading.splits if part.flat and part.truth is None]
    every = len(reading.splits) == 1 or unlabelled
    read = {part.truth.origin for part in reading.splits if part.truth}
    lists = [
        place
        for folder in root.walk()
        if not folder.count or folder is root or folder in root.folders
        for name in folder.papers
        if may_be_list(name)
        and (every or name.startswith(b"metadata."))
        and (place := f"{_shown(folder, shown)}/{as_text(name)}") not in read
    ]
    if lists:
        reading.warnings.append(f"not read, though splits or labels may stand there: {', '.join(lists[:5])}")


def _warn_of_masks(root: Folder, reading: Reading) -> None:
    """Warns of pictures in class folders that are called masks."""
    masks = total = 0
    example = b""
    for part in reading.splits:
        top = root.at(part.path)
        for _, folder in class_folders(part, top) if top and not part.flat else ():
            found = [name for name in folder.pictures if name.endswith(MASK_ENDINGS)]
            total += len(folder.pictures)
            masks += len(found)
            example = example or (found[0] if found else b"")
    if masks:
        reading.warnings.append(
            f"masks by their names: {masks:,} of {counted(total, 'picture')}, such as {as_text(example)}; they count as pictures of their classes"
        )


# What is no set of labelled pictures at all.


def _refuse_detection_sets(root: Folder, shown: str) -> None:
    for folder in root.walk():
        names = {below.name.lower(): below for below in folder.folders}
        form = ""
        if any(
            (name.startswith((b"instances_", b"person_keypoints_")) and name.endswith(b".json"))
            or name.endswith(b".coco.json")
            for name in folder.papers
        ):
            form = "COCO's"
        elif b"jpegimages" in names and b"annotations" in names:
            form = "Pascal VOC's"
        elif b"images" in names and b"labels" in names and _are_yolo_labels(names[b"images"], names[b"labels"]):
            form = "YOLO's"
        if form:
            raise AlexprepError(
                f"SOURCE {shown} is a detection set in {form} form ({_shown(folder, shown)}): its pictures have several objects and no one "
                "class. Write a list of path and label (CSV) for those that have, and name that as SOURCE"
            )


def _are_yolo_labels(images: Folder, labels: Folder) -> bool:
    """Whether texts in `labels` are named like the pictures in `images`."""
    if labels.count or not images.count:
        return False
    texts = {os.path.splitext(name)[0] for folder in labels.walk() for name in folder.papers if name.endswith(b".txt")}
    first = next(images.paths())
    return os.path.splitext(os.path.basename(first))[0] in texts


def _loose(folder: Folder) -> list[bytes]:
    """The files in a folder that are pictures by their ending; any other may be anything."""
    return [name for name in folder.pictures if is_picture(name)]


def _lower(folder: Folder) -> str:
    return folder.name.decode("utf-8", "replace").lower()


def _example(children: Sequence[Folder]) -> str:
    child = next(child for child in children if child.filled)
    return as_text(os.path.join(child.name, child.filled[0].name))


def _shown(folder: Folder, shown: str) -> str:
    return _join(shown, as_text(folder.path))


def _join(shown: str, path: str) -> str:
    return f"{shown}/{path}" if path and path != "." else shown
