"""What the names of folders tell: that they hold a split, a dataset's parts or its masks rather than a class each.

A name proves nothing, so it is never a reason to leave pictures out: `folder_reading` asks, or warns, where one speaks against a class.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from alexprep.shards.sources.base import SPLITS

# Names of folders that hold a dataset's pictures, its labels or its masks.
CONTAINERS = {
    *SPLITS,
    *("annotation", "annotations", "label", "labels", "meta", "metadata"),
    *(
        "data",
        "dataset",
        "datasets",
        "im",
        "image",
        "images",
        "img",
        "imgs",
        "input",
        "inputs",
        "photos",
        "pics",
        "pictures",
    ),
    *("jpeg", "jpegimages", "jpegs", "jpg", "png"),
    *(
        "ground_truth",
        "groundtruth",
        "gt",
        "hr",
        "lr",
        "mask",
        "masks",
        "segmentation",
        "segmentations",
        "target",
        "targets",
    ),
}
WITHOUT_LABELS = {"pred", "predict", "prediction", "predictions", "unlabeled", "unlabelled", "unsup", "unsupervised"}
# What parts of one set are called, each with a number: images_001, HAM10000_images_part_1, 100CANON.
_PARTS = {
    *(
        "batch",
        "canon",
        "chunk",
        "dir",
        "disc",
        "disk",
        "fold",
        "folder",
        "image",
        "images",
        "img",
        "imgs",
        "part",
        "parts",
    ),
    *("section", "set", "shard", "split", "subset", "vol", "volume"),
}
_ROUND = 1000  # folders called 00000, 01000, 02000 hold so many pictures each (FFHQ)
# Of a file, before its ending: what lies beside a picture of the same name to tell more of it.
MASK_ENDINGS = tuple(
    f"_{word}.{ending}".encode()
    for word in ("mask", "seg", "segmentation", "gt", "label")
    for ending in ("png", "jpg", "gif", "bmp", "tif")
)


is_wordnet_id = re.compile(rb"n\d{8}").fullmatch  # also called a synset's, as n01440764


def words_of(name: str) -> list[str]:
    """The words of a name, in lower case.

    >>> words_of("bounding_box_train"), words_of("trainA"), words_of("Test1")
    (['bounding', 'box', 'train'], ['train', 'a'], ['test'])
    """
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def is_no_class(name: str) -> bool:
    """Whether a folder's name is a container's, or one of its words means a split.

    >>> is_no_class("Images"), is_no_class("trainA"), is_no_class("trainer"), is_no_class("abbey")
    (True, True, False, False)
    """
    return name.lower() in CONTAINERS or any(word in SPLITS for word in words_of(name))


def is_unlabelled(name: str) -> bool:
    """Whether a folder's name says that its pictures have no labels, as seg_pred and unlabeled_images."""
    return any(word in WITHOUT_LABELS for word in words_of(name))


def are_parts(names: Sequence[str]) -> bool:
    """Whether names are equal but for a number, and say that they are parts of one set.

    >>> are_parts(["images_001", "images_002"]), are_parts(["class_1", "class_2"]), are_parts(["00000", "01000"])
    (True, False, True)
    """
    if len(names) < 2:
        return False
    if all(name.isascii() and name.isdigit() for name in names):
        return len(names[0]) > 3 and all(int(name) % _ROUND == 0 for name in names)
    stems = {re.sub(r"^\d+|\d+$", "", name).strip("_- .").lower() for name in names}
    words = words_of(stems.pop()) if len(stems) == 1 else []
    return bool(words) and words[-1] in _PARTS and all(any(letter.isdigit() for letter in name) for name in names)


def may_be_list(name: bytes) -> bool:
    """Whether a file may be a list that tells splits or labels, by its name.

    >>> may_be_list(b"TrainImages.txt"), may_be_list(b"README.txt"), may_be_list(b"metadata.jsonl")
    (True, False, True)
    """
    stem, dot, ending = name.decode("utf-8", "replace").rpartition(".")
    telling = re.search(r"train|test|val|split|fold|label|class|annot|ground|metadata|dev", stem.lower())
    return bool(dot) and ending.lower() in ("txt", "csv", "tsv", "lst", "jsonl", "json", "mat") and telling is not None
