"""`alexprep ablate`: variants are trained once, compared with their seeds, and gone on with."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from alexprep.cli.ablate import ablate as command
from alexprep.shards.errors import AlexprepError
from alexprep.train import ablation
from alexprep.train.ablation import ablate
from alexprep.train.config import TrainConfig
from alexprep.train.precision import NotFinite
from alexprep.train.recipes import RECIPES
from tests.made_up import write_data

LR, DECAY = "lr=0.02 clip=1", "decay=0.001"
ERRORS = {("", 0): 50.0, (LR, 0): 40.0, (DECAY, 0): 55.0, ("", 1): 54.0, (LR, 1): 42.0, (DECAY, 1): 55.0}


class Trainings:
    """Stands for `train`: makes the run's folder as that does, and says of it what a table says."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.stop_at: str | None = None
        self.spoilt: set[str] = set()

    def __call__(self, config: TrainConfig) -> dict[str, Any]:
        run = config.runs / str(config.name)
        assert config.resume == run.exists()
        self.begun.append(run.name + (" on" if config.resume else ""))
        if run.name in self.spoilt:
            raise NotFinite("the loss became nan")
        run.mkdir(exist_ok=True)
        (run / "config.json").write_text("{}")
        stopped = "SIGINT" if run.name == self.stop_at else None
        variant, _, seed = run.name.rpartition("-seed")
        known = {"tiny": "", "lr-0.02-clip-1": LR, "decay-0.001": DECAY}
        error = ERRORS[known[variant], int(seed)]
        summary = {
            "run": str(run),
            "stopped_by": stopped,
            "val_top1_error": error,
            "val_top5_error": 1.0,
            "val_loss": 2.0,
        }
        (run / "summary.json").write_text(json.dumps(summary))
        return summary


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    made = Trainings()
    monkeypatch.setattr(ablation, "train", made)
    return made


@pytest.fixture
def common(tmp_path: Path) -> TrainConfig:
    """Made-up images, as many pixels wide as the recipe wants."""
    data = write_data(tmp_path / "data", image={"size": 64, "format": "jpg"})
    return TrainConfig(data, "tiny", runs=tmp_path / "runs", device="cpu")


def test_variants_are_compared_by_seed(common: TrainConfig, trainings: Trainings) -> None:
    found = ablate(common, [LR], 2)
    assert trainings.begun == ["tiny-seed0", "lr-0.02-clip-1-seed0", "tiny-seed1", "lr-0.02-clip-1-seed1"]
    plain, faster = found["variants"]
    assert (plain["variant"], plain["runs"], plain["top1_error"], plain["top1_error_standard_error"]) == (
        "",
        2,
        52.0,
        2.0,
    )
    assert (faster["variant"], faster["top1_error"], faster["difference"]) == (LR, 41.0, -11.0)
    apart = [ERRORS[LR, seed] - ERRORS["", seed] for seed in (0, 1)]
    assert faster["difference_standard_error"] == pytest.approx(statistics.stdev(apart) / 2**0.5)
    assert json.loads((common.runs / "ablation.json").read_text()) == found
    rows = list(csv.DictReader((common.runs / "ablation.csv").read_text().splitlines()))
    assert [(row["variant"], int(row["seed"]), float(row["val_top1_error"])) for row in rows] == [
        (variant, seed, ERRORS[variant, seed]) for seed in (0, 1) for variant in ("", LR)
    ]
    # What is trained is not trained again; what is new is.
    again = ablate(common, [LR], 2)
    assert again == found and len(trainings.begun) == 4
    assert ablate(common, [f" {LR} "], 1) == found and len(trainings.begun) == 4


def test_the_tables_keep_what_was_trained_before(common: TrainConfig, trainings: Trainings) -> None:
    """Other variants and other seeds, whether this command comes to its end or not; what failed is kept until it has a result."""
    trainings.spoilt = {"tiny-seed1"}
    ablate(common, [LR], 2)
    trainings.stop_at = "decay-0.001-seed0"
    stopped = ablate(common, [DECAY], 1)
    trainings.stop_at, trainings.spoilt = None, set()
    (common.runs / "tiny-seed01").mkdir()  # of nobody
    fewer = ablate(common, [DECAY], 1)
    runs = [("", 0), (DECAY, 0), (LR, 0), (LR, 1)]
    assert [(run["variant"], run["seed"]) for run in stopped["runs"]] == [runs[0], *runs[2:]]
    assert [(run["variant"], run["seed"]) for run in fewer["runs"]] == runs
    assert [(row["variant"], row["runs"], row["failed"]) for row in fewer["variants"]] == [
        ("", 1, 1),
        (DECAY, 1, 0),
        (LR, 2, 0),
    ]
    assert (common.runs / "ablation.csv").read_text().count("\n") == 1 + len(runs)
    whole = ablate(common, [], 2)
    assert whole["failed"] == [] and whole["variants"][0]["runs"] == 2


def test_it_goes_on_where_it_was_broken_off(common: TrainConfig, trainings: Trainings) -> None:
    trainings.stop_at = "lr-0.02-clip-1-seed0"
    found = ablate(common, [LR], 1)
    assert (found["stopped_by"], [row["variant"] for row in found["variants"]]) == ("SIGINT", [""])
    trainings.stop_at = None
    assert ablate(common, [LR], 1)["stopped_by"] is None
    assert trainings.begun[1:] == ["lr-0.02-clip-1-seed0", "lr-0.02-clip-1-seed0 on"]


def test_a_variant_that_ends_in_nan_is_a_result(common: TrainConfig, trainings: Trainings) -> None:
    trainings.spoilt = {"lr-0.02-clip-1-seed1", "tiny-seed1"}
    said: list[str] = []
    found = ablate(common, [LR], 2, said.append)
    assert [(row["runs"], row["failed"]) for row in found["variants"]] == [(1, 1), (1, 1)]
    assert "the loss became nan" in said and found["failed"][0]["reason"] == "the loss became nan"
    rows = list(ablation.table_rows(found))
    assert rows[2] == (LR, "1, 1 failed", "40.00", "1.00", "-10.00")


def test_what_does_not_go_together_is_refused_before_anything_is_trained(
    common: TrainConfig, trainings: Trainings, tmp_path: Path
) -> None:
    for variants, words in (
        (["lr=x"], "lr takes: number"),
        (["network.pool=2"], "network of recipe tiny is tiny, which has no fields"),
        (["lr=1 lr"], "'lr' is not FIELD=VALUE"),
        (['lr="1'], "quoted as for a shell: No closing quotation"),
        (["optimizer=Foo"], "no optimizer 'Foo'"),
        (["clip=1", "clip=+1"], r"'clip=1' and 'clip=.1' would both be trained as clip-1: write one otherwise"),
    ):
        with pytest.raises(AlexprepError, match=words):
            ablate(common, variants, 1)
    with pytest.raises(AlexprepError, match=r"seeds 0 is not in"):
        ablate(common, [], 0)
    bare = TrainConfig(
        write_data(tmp_path / "bare", splits=("train",), image={"size": 64, "format": "jpg"}), "tiny", runs=common.runs
    )
    with pytest.raises(AlexprepError, match=r"no val or test split with labels"):
        ablate(bare, [], 1)
    assert trainings.begun == [] and not common.runs.exists()


def test_a_folder_is_of_one_base(common: TrainConfig, trainings: Trainings) -> None:
    ablate(common, [], 1)
    other = TrainConfig(common.data, "tiny", runs=common.runs, device="cpu", settings=("epochs=3",))
    with pytest.raises(
        AlexprepError, match=r"holds an ablation whose epochs was None, now it is 3: name another folder"
    ):
        ablate(other, [LR], 1)
    assert trainings.begun == ["tiny-seed0"]


def test_a_run_of_another_variant_is_not_taken_for_its_own(common: TrainConfig, trainings: Trainings) -> None:
    """Of variants that come one after the other, as of those that come together."""
    ablate(common, [LR], 1)
    with pytest.raises(
        AlexprepError, match=r"holds runs of the variant 'lr=0.02 clip=1' as lr-0.02-clip-1, and 'lr=0.02 clip=.1'"
    ):
        ablate(common, ["lr=0.02 clip=+1"], 1)
    ablate(common, [], 1)  # what is not asked for is remembered all the same
    with pytest.raises(AlexprepError, match=r"holds runs of the variant 'lr=0.02 clip=1'"):
        ablate(common, ["lr=0.02 clip=+1"], 1)
    assert trainings.begun == ["tiny-seed0", "lr-0.02-clip-1-seed0"]


def test_the_command_prints_a_table(data: Path, tmp_path: Path) -> None:
    """With real shards and trainings."""
    words = ["--data", data, "--recipe", "tiny", "--epochs", 1, "--seeds", 1, "--runs", tmp_path / "ablation"]
    words += ["--device", "cpu", "--set", "batch_size=24", "lr=0.001", "--json"]
    result = CliRunner().invoke(command, [*map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    titles, plain, slower, line = result.stdout.splitlines()
    assert titles.split() == [
        "variant",
        "runs",
        "top-1",
        "error,",
        "%",
        "top-5",
        "error,",
        "%",
        "less",
        "the",
        "recipe's",
    ]
    found = json.loads(line)
    assert plain.split()[:3] == ["the", "recipe", "1"] and slower.split()[:2] == ["lr=0.001", "1"]
    runs = {row["variant"]: row for row in found["runs"]}
    for variant, rate in (("", RECIPES["tiny"].lr), ("lr=0.001", 0.001)):
        run = Path(runs[variant]["run"])
        assert json.loads((run / "config.json").read_text())["options"]["lr"] == rate
        assert json.loads((run / "summary.json").read_text())["val_top1_error"] == runs[variant]["val_top1_error"]
        assert runs[variant]["epochs"] == 1
