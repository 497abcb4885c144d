"""How classes become numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from alexprep.shards.errors import AlexprepError

SORTED = "sorted"
ILSVRC_ID = "ilsvrc-id"


def class_order(rule: str, present: Iterable[str], label_files: Iterable[Path]) -> list[str]:
    """The class names by label: label i is the i-th name.

    Args:
        rule: "sorted" (ascending by bytes, as torchvision and Caffe number them), "ilsvrc-id" (the devkit's order, as the
            2012 code did: label = ILSVRC ID - 1), or the path of a text file with one class name a line, in label order.
        present: the classes that the inputs have.
        label_files: where a devkit's meta.mat may be.

    Raises:
        AlexprepError: a class has no number, or the rule's file is missing or unreadable.

    >>> class_order("sorted", ["n02", "n01"], [])
    ['n01', 'n02']
    """
    found = set(present)
    if rule == SORTED:
        return sorted(found, key=str.encode)
    if rule == ILSVRC_ID:
        source = next(iter(label_files), None)
        if source is None:
            raise AlexprepError(
                "--labels ilsvrc-id needs the devkit: put ILSVRC2012_devkit_t12/data/meta.mat into SOURCE or beside it, "
                "or give --labels FILE with one class name a line"
            )
        order = _devkit_order(source)
    else:
        source = Path(rule)
        order = _listed_order(source)
    unknown = sorted(found - set(order))
    if unknown:
        raise AlexprepError(
            f"{source} has no number for {len(unknown)} of {len(found)} classes, among them {unknown[0]!r}"
        )
    return order


def _listed_order(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise AlexprepError(
            f"--labels {path} is neither sorted, ilsvrc-id, nor a text file that can be read ({error})"
        ) from None
    order = [line.strip() for line in lines if line.strip()]
    repeated = (
        next((name for i, name in enumerate(order) if name in order[:i]), None)
        if len(set(order)) < len(order)
        else None
    )
    if repeated is not None:
        raise AlexprepError(f"--labels {path} names class {repeated!r} twice: name each once")
    return order


def _devkit_order(path: Path) -> list[str]:
    """The low-level synsets of a 2010 or 2012 devkit (facts in its readme.txt), by ID; IDs above them are ancestors."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(path, squeeze_me=True, struct_as_record=True)["synsets"]
        names = synsets.dtype.names
        identity = next(name for name in names if name.endswith("_ID"))
        leaves = [(int(s[identity]), str(s["WNID"])) for s in synsets if int(s["num_children"]) == 0]
    except Exception as error:  # noqa: BLE001  (scipy raises many kinds)
        raise AlexprepError(f"{path} is not a devkit's meta.mat ({error}): give --labels FILE instead") from None
    return [wnid for _, wnid in sorted(leaves)]
