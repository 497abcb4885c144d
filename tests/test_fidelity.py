"""docs/fidelity.md: every row of the table on network and training has a test that exists, and every switch of the page is an option."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from alexprep.cli.train import train
from alexprep.train import checkpoint, launch, lr_schedule
from alexprep.train.config import TrainConfig, prepare
from alexprep.train.models.alexnet import AlexNet
from alexprep.train.recipes import RECIPES, Recipe
from alexprep.train.settings import SETTING, settable
from tests.made_up import write_data

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/fidelity.md").read_text()
SECTION = PAGE.partition("## Network and training")[2]
WORDS = list(dict.fromkeys(re.findall(r"`([^`\n]+)`", PAGE)))
SWITCHES = [word for word in WORDS if SETTING.fullmatch(word)]
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
NOT_IN_THE_TABLE |= {
    f"Recipe.{name}"
    for name in ("clip", "accumulate", "average", "loss", "l1", "max_norm", "early_crops", "evaluation_crop")
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_has_its_test_and_its_switches(row: list[str]) -> None:
    assert len(row) == 5
    (test,) = re.findall(r"`(\w+)`", row[4])
    assert test in TESTS, f"{test} does not exist"
    for word in re.findall(r"`([^`]+)`", row[3]):
        known = word in KNOWN or word in SWITCHES or hasattr(lr_schedule, word) or hasattr(checkpoint, word)
        assert known, f"{word} does not exist"


def test_every_switch_has_a_row() -> None:
    assert len(ROWS) > 20
    named = {word for row in ROWS for word in re.findall(r"`([^`]+)`", row[3])}
    fields = {word.partition("=")[0].partition(".")[::2] for word in named & set(SWITCHES)}
    named |= {f"AlexNet.{below}" if head == "network" else f"Recipe.{head}" for head, below in fields}
    assert FIELDS - named == NOT_IN_THE_TABLE
    kinds = {
        name for name, kind in vars(lr_schedule).items() if dataclasses.is_dataclass(kind) and hasattr(kind, "rate")
    }
    assert kinds == set(lr_schedule.KINDS) <= named
    assert {name for name in RECIPES if name.startswith("alexnet-")} <= named


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What dataset.json says of a set for AlexNet."""
    return write_data(tmp_path_factory.mktemp("fidelity") / "data", image={"size": 256, "format": "jpg"})


def _begun(photos: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[object, int]:
    """What decides the result of a training that the command begins, a narrow one, and its epochs."""
    told: list[TrainConfig] = []

    def launched(config: TrainConfig) -> dict[str, object]:
        told.append(config)
        raise SystemExit  # nothing is trained

    monkeypatch.setattr(launch, "launch_training", launched)
    options = [option for word in ("width=0.0625", *words) for option in ("--set", word)]
    CliRunner().invoke(train, ["--data", str(photos), "--device", "cpu", *options], catch_exceptions=False)
    job = prepare(told[0], dry_run=True, check_statistics=False)
    return job.identity, job.epochs


@pytest.mark.parametrize("word", SWITCHES)
def test_every_switch_is_an_option(word: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command takes it as the page has it, makes the network, and the run's identity has it; but for what `alexnet` is anyway."""
    assert len(SWITCHES) > 40
    usual = {f"{one.path}={one.value}" for one in settable(RECIPES["alexnet"])}
    same = _begun(photos, monkeypatch, word) == _begun(photos, monkeypatch)
    assert same == (word in usual), word
