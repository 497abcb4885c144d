"""docs/fidelity.md: every row of the table on network and training has a test that exists, and every switch it names."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from alexprep.train import checkpoint, lr_schedule
from alexprep.train.models.alexnet import AlexNet
from alexprep.train.recipes import RECIPES, Recipe

ROOT = Path(__file__).parents[1]
SECTION = (ROOT / "docs/fidelity.md").read_text().partition("## Network and training")[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in SECTION.splitlines()
    if line.startswith("| ") and not line.startswith("| |")
]
TESTS = {
    node.name
    for path in (ROOT / "tests").glob("test_*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef)
}
FIELDS = {f"{kind.__name__}.{field.name}" for kind in (AlexNet, Recipe) for field in dataclasses.fields(kind)}
KNOWN = FIELDS | set(RECIPES) | {"init_from", "alexprep.train.init_from"}
# What is no switch: names, and what follows from the network or is shared by all of them.
NOT_IN_THE_TABLE = {"AlexNet.name", "Recipe.name", "Recipe.network", "Recipe.augmentation", "Recipe.stored_sizes"}
NOT_IN_THE_TABLE |= {"Recipe.lr", "Recipe.width"}
# Nothing of them is in the paper or in its code: docs/training.md has them.
NOT_IN_THE_TABLE |= {f"Recipe.{name}" for name in ("optimizer", "optimizer_options", "norm_decay", "label_smoothing")}
NOT_IN_THE_TABLE |= {f"Recipe.{name}" for name in ("clip", "accumulate", "average")}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_has_its_test_and_its_switches(row: list[str]) -> None:
    assert len(row) == 5
    (test,) = re.findall(r"`(\w+)`", row[4])
    assert test in TESTS, f"{test} does not exist"
    for word in re.findall(r"`([^`]+)`", row[3]):
        assert word in KNOWN or hasattr(lr_schedule, word) or hasattr(checkpoint, word), f"{word} does not exist"


def test_every_switch_has_a_row() -> None:
    assert len(ROWS) > 20
    named = {word for row in ROWS for word in re.findall(r"`([^`]+)`", row[3])}
    assert FIELDS - named == NOT_IN_THE_TABLE
    kinds = {
        name for name, kind in vars(lr_schedule).items() if dataclasses.is_dataclass(kind) and hasattr(kind, "rate")
    }
    assert kinds == set(lr_schedule.KINDS) <= named
    assert {name for name in RECIPES if name.startswith("alexnet-")} <= named
