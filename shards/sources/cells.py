"""What a table's cells mean: where a path points, and what is wrong with a label."""

from __future__ import annotations

import re

from alexprep.shards.sources.files import local_path

NUMBER = re.compile(r"0|[1-9][0-9]*")
_MAX_NAME = 1000  # characters; beyond that it is prose


def located(cell: str) -> bytes:
    """Where the cell of a path points, in one spelling: a/./b, a//b and file:///a/b are a/b and /a/b; other URLs as they are."""
    local = local_path(cell)
    if local is None:
        return cell.encode()
    if not re.search(r"(^|/)(\./|/)", local):
        return local.encode()
    parts = [part for part in local.split("/") if part not in ("", ".")]
    return ("/" * local.startswith("/") + "/".join(parts)).encode()


def label_problem(label: str) -> str:
    """What is wrong with a label by itself; empty if nothing."""
    if label in ("", "nan", "NaN"):
        return "the label is missing: fill it in, or delete the row"
    if len(label) > _MAX_NAME:
        return f"the label has {len(label):,} characters, more than {_MAX_NAME:,}: is this column the label?"
    parts = re.split(r"[\s,]+", label.strip("[]() "))
    if (
        re.search(r"[|;]", label)
        or re.fullmatch(r"\[.*\]", label)
        or (len(parts) > 1 and all(map(NUMBER.fullmatch, parts)))
    ):
        return several(label)
    if re.fullmatch(r"-[0-9]+", label):
        return f"the label {label} is below 0: number the classes from 0"
    if re.fullmatch(r"[+-]?[0-9]*\.[0-9]*", label):
        return f"the label {label} is no whole number: write it without a point"
    if any(ord(character) < 32 for character in label):
        return f"the label {label!r} holds a control character"
    return ""


def several(label: str) -> str:
    """What is wrong with a label that is more than one."""
    return f"the cell {label!r} gives one image several labels; one is needed: keep one, or write one without | ; and ,"
