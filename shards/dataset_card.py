"""Writes the dataset card, by which Hugging Face's `load_dataset` and its Hub know what to read in a dataset's folder, and as what.

The card is YAML between two lines of `---`, then text for people. Its form is that of https://huggingface.co/docs/datasets/repository_structure
and, for the features, https://huggingface.co/docs/datasets/about_dataset_features.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from alexprep.shards.dataset_format import FORMATS
from alexprep.shards.errors import counted
from alexprep.shards.image_codec import Target
from alexprep.shards.metadata import EXTENSION

# Also by this line a README.md is known to be a card of ours.
MARK = "# Written by `alexprep shard`. What describes the data is dataset.json; `alexprep verify` holds this file against it."
_UNPRINTABLE = re.compile(
    "[\x7f-\x9f\ud800-\udfff\u2028\u2029\ufeff\ufffe\uffff]"
)  # to YAML, which JSON writes as they are


def dataset_card(
    samples: Mapping[str, int], classes: Sequence[str], target: Target, labelled: bool, metadata: Sequence[str]
) -> bytes:
    """README.md of a dataset.

    Args:
        samples: how many each split has.
        classes: names, by label.
        target: the form of the images.
        labelled: whether samples have a label.
        metadata: names of what goes along with the samples.
    """
    filled = {split: count for split, count in samples.items() if count}
    features = [f"  - name: {name}\n    {kind}" for name, kind in _features(classes, target, labelled, metadata)]
    files = [f"  - split: {split}\n    path: {split}/{split}-*.tar" for split in filled]
    counts = ", ".join(f"{count:,} in {split}" for split, count in filled.items())
    common = target.common_size
    size = "of several sizes" if common is None else f"{common[1]} x {common[0]} pixels"
    labels = f" of {counted(len(classes), 'class')}" if labelled else ""
    return "\n".join(
        [
            *("---", MARK, "configs:", "- config_name: default", "  data_files:", *files),
            *("dataset_info:", "  features:", *features, "---", ""),
            f"Images{labels}: {counts}; {target.format}, {size}. They lie in webdataset shards.",
            "",
        ]
    ).encode()


def _features(
    classes: Sequence[str], target: Target, labelled: bool, metadata: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Each column that `load_dataset` makes of a sample, and its type in YAML."""
    if target.format != "raw":
        pixels = "dtype: image"
    elif target.common_size:
        pixels = f"dtype:\n      array3_d:\n        shape: {[*target.common_size, 3]}\n        dtype: uint8"
    else:  # arrays of several sizes have no type of their own
        pixels = "list:\n      list:\n        list: uint8"
    yield FORMATS[target.format], pixels
    if labelled:
        names = "".join(f"\n          '{label}': {_quoted(name)}" for label, name in enumerate(classes))
        yield "cls", f"dtype:\n      class_label:\n        names:{names}"
    if metadata:
        yield EXTENSION, "dtype: json"
    yield "__key__", "dtype: string"


def _quoted(name: str) -> str:
    """A string as YAML has it in quotes; JSON's strings are such, but for what YAML calls unprintable."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(name, ensure_ascii=False))
