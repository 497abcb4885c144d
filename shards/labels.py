"""How classes become numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import Source
from alexprep.shards.sources.devkit import devkit_order

AUTO = "auto"
SORTED = "sorted"
ILSVRC_ID = "ilsvrc-id"
LISTED = "listed"  # what a plan says of an order that was given class by class


def recorded(rule: str | Sequence[str]) -> str:
    """What a plan says of a rule: not where a list lay, which may have moved, since the plan holds the names."""
    return rule if isinstance(rule, str) and rule in (AUTO, SORTED, ILSVRC_ID) else LISTED


def class_order(rule: str | Sequence[str], present: set[str], source: Source) -> list[str]:
    """The class names by label: label i is the i-th name.

    Args:
        rule: "auto" (the source's own numbering, or sorted where it has none), "sorted" (ascending by bytes, as
            torchvision and Caffe number them), "ilsvrc-id" (the devkit's order, as the 2012 code did: label = ILSVRC ID - 1),
            or the path of a text file with one class name a line, in label order; or these names themselves.
        present: the classes that the inputs have.
        source: where they come from, and where a devkit's meta.mat may be.

    Raises:
        AlexprepError: a class has no number, or the rule's file is missing or unreadable.
    """
    if rule == AUTO:
        return source.classes(present)
    if rule == SORTED:
        return sorted(present, key=str.encode)
    if rule == ILSVRC_ID:
        devkit = source.devkit()
        if devkit is None:
            raise AlexprepError(
                "--labels ilsvrc-id needs the devkit: put ILSVRC2012_devkit_t12.tar.gz, or its meta.mat, into SOURCE, "
                "or give --labels FILE with one class name a line"
            )
        where, order = devkit[0], devkit_order(*devkit)
    elif isinstance(rule, str):
        where, order = rule, _listed_order(Path(rule))
    else:
        where, order = "the list of classes", list(rule)
    unknown = sorted(present - set(order))
    if unknown:
        raise AlexprepError(
            f"{where} has no number for {len(unknown)} of {len(present)} classes, among them {unknown[0]!r}"
        )
    return order


def _listed_order(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # text mode: "\r\n" has become "\n"
    except (OSError, UnicodeDecodeError) as error:
        raise AlexprepError(
            f"--labels {path} is neither auto, sorted, ilsvrc-id, nor a text file that can be read ({error})"
        ) from None
    order = [line for line in lines if line.strip()]
    repeated = (
        next((name for i, name in enumerate(order) if name in order[:i]), None)
        if len(set(order)) < len(order)
        else None
    )
    if repeated is not None:
        raise AlexprepError(f"--labels {path} names class {repeated!r} twice: name each once")
    return order
