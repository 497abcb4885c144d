"""What a run is: its options, what it remembers, and its identity, also of runs that release 0.1.0 began."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alexprep.shards.dataset_format import INDEX_DTYPE
from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import digest_json
from alexprep.train import checkpoint, recipes
from alexprep.train.config import CHECKPOINT_STEPS, KEEP, REMEMBERED, TrainConfig, prepare
from alexprep.train.evaluation import evaluate_run
from alexprep.train.lr_schedule import Cosine, EarlyStop, Steps, WarmUp, recorded_schedule
from alexprep.train.trainer import train
from tests import training_ranks as ranks
from tests.made_up import MadeUpLoader, small_recipe, write_data
from tests.training_ranks import small_config as config

RELEASED = Path(__file__).parent / "fixtures" / "release-0.1.0"
Document = dict[str, Any]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return ranks.registered(tmp_path, monkeypatch, MadeUpLoader)


@pytest.fixture
def released(tmp_path: Path) -> TrainConfig:
    """How to go on with a copy of the run that release 0.1.0 left after step 5, whose data have moved."""
    shutil.copytree(RELEASED / "runs", tmp_path / "runs")
    return TrainConfig(RELEASED / "alexprep-data", runs=tmp_path / "runs", device="cpu", resume=True, steps=8)


def _options(run: Path) -> Document:
    options: Document = json.loads((run / "config.json").read_text())["options"]
    return options


def _saved(run: Path) -> list[int]:
    return sorted(checkpoint.marks(run / "checkpoints"))


def rewrite(runs: Path, change: Callable[[Document], object]) -> None:
    """Changes what config.json and the checkpoint of the released run say, as another version would have written it."""
    file = runs / "tiny" / "config.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    (mark,) = (runs / "tiny" / "checkpoints").glob("*.json")
    document = json.loads(mark.read_text())
    change(document["facts"])
    del document["digest"]
    mark.write_text(json.dumps(document | {"digest": digest_json(document)}))


def _older(document: Document) -> None:
    """Lacks fields that were added since, in this imagined past, with defaults under which nothing changes."""
    recipe = document["identity"]["recipe"]
    del document["identity"]["precision"], recipe["width"], recipe["bias_decay"], recipe["layer_decay"]
    del recipe["augmentation"]["std"], recipe["augmentation"]["ratio"], recipe["schedule"]["divisor"]
    del document["versions"]
    if "position" in document:
        del document["position"]["schedule"]["stop_best"], document["position"]["epoch_seconds"], document["update"]
        del document["rounding"]
    else:
        for name in (*REMEMBERED, "precision", "channels_last", "compile", "init_from"):
            document["options"].pop(name, None)


def test_a_run_of_the_first_release_goes_on(released: TrainConfig, tmp_path: Path) -> None:
    """And one that lacks fields goes on alike, at their defaults."""
    rewrite(released.runs, _older)
    other = shutil.copytree(RELEASED / "runs", tmp_path / "other")
    summary = train(replace(released, runs=other))
    assert (summary["steps"], summary["epochs"], summary["stopped_by"]) == (8, 2, None)
    assert summary["val_split"] == "val" and summary["val_loss"] is not None
    assert _saved(other / "tiny") == [6, 8]  # the best, which ended the first epoch, and the last
    assert train(released)["weights_sha256"] == summary["weights_sha256"]
    facts = checkpoint.read(checkpoint.marks(other / "tiny" / "checkpoints")[8]).facts
    assert facts["identity"]["recipe"]["momentum_correction"] is False  # it was not there: the run goes on without
    options = _options(released.runs / "tiny")
    assert (options["keep"], options["checkpoint_steps"]) == (KEEP, CHECKPOINT_STEPS) == (3, 1000)
    for changes, words in (
        ({"precision": "bf16"}, r"precision was 'fp32', is now 'bf16'"),
        ({"seed": 1}, r"seed was 0, is now 1"),
    ):
        with pytest.raises(AlexprepError, match=words):
            train(replace(released, steps=9, **changes))


@pytest.mark.parametrize("place", ["recipe", "augmentation", "schedule", "identity", "position"])
def test_a_run_with_a_field_that_nobody_knows_is_refused(place: str, released: TrainConfig) -> None:
    """This version would train on without what it says."""

    def change(document: Document) -> None:
        identity = document["identity"]
        recipe = identity["recipe"]
        places = {"recipe": recipe, "identity": identity, "position": document.get("position", {})}
        (places | {name: recipe[name] for name in ("augmentation", "schedule")})[place]["cutmix"] = 0.5

    rewrite(released.runs, change)
    with pytest.raises(
        AlexprepError, match=r"cutmix was 0.5, is now None|position has cutmix, which this alexprep does"
    ):
        train(released)


def test_a_released_recipe_means_what_it_meant() -> None:
    """For its runs: fields may be added; those that are there keep their values, and so do the defaults by which older runs are completed.

    Rate, batch size and schedule may change: a run has its own in config.json, also where it took the recipe's.
    """
    told = json.loads((RELEASED / "recipes.json").read_text())
    assert told.keys() <= recipes.RECIPES.keys()
    own = json.loads((RELEASED / "runs" / "tiny" / "config.json").read_text())["options"]
    assert own["lr"] == told["tiny"]["lr"] and own["batch_size"] is not None
    for name, before in told.items():
        schedule = recorded_schedule(before["schedule"])
        assert schedule is not None
        kept = {"schedule": schedule, "batch_size": before["batch_size"], "lr": before["lr"]}
        recipe = replace(recipes.as_begun(recipes.RECIPES[name], before), **kept)
        now = checkpoint.with_defaults(json.loads(json.dumps(recipe.describe())), recipe)
        assert checkpoint.differences(checkpoint.with_defaults(before, recipe), now) == []

    def off(part: str, name: str, value: object) -> bool:
        """Whether a field changes nothing; the network's switches of the paper's layers are on."""
        return value in (None, 0.0, [], "random") or (part, name, value) in paper

    paper = [("network", "activation", "relu"), ("network", "norm", True), ("network", "dropout", True)]
    paper += [("augmentation", "channels", 3)]
    plain = recipes.RECIPES["alexnet"]
    defaults = {
        name: told["alexnet"][name] for name in ("batch_size", "lr", "momentum", "decay", "bias_decay", "width")
    }
    bare = checkpoint.with_defaults({"augmentation": {}, "network": {}, "schedule": {}}, plain)
    assert {name: bare[name] for name in defaults} == defaults
    for part in ("augmentation", "network", "schedule"):  # alexnet's are at their defaults throughout
        before, now = told["alexnet"][part], bare[part]
        assert {name: before[name] for name in now.keys() & before.keys()} == {
            name: now[name] for name in now.keys() & before.keys()
        }
        assert all(off(part, name, now[name]) for name in now.keys() - before.keys())  # added since


def test_resuming_with_other_settings_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipes.RECIPES, "other", small_recipe(name="other"))
    train(config(data, steps=1), MadeUpLoader)
    other: list[tuple[Document, str]] = [
        ({"batch_size": 4}, r"recipe.batch_size was 8, is now 4"),
        ({"seed": 5}, r"seed was 0, is now 5"),
        ({"recipe": "other"}, r"recipe.name was 'small', is now 'other'"),
        ({"data": write_data(data.parent / "other", digest="another")}, r"data_digest was 'made up', is now 'another'"),
    ]
    for changes, message in other:
        with pytest.raises(AlexprepError, match=message):
            train(replace(config(data, resume=True), **changes), MadeUpLoader)
    assert train(config(data, resume=True, recipe=None, steps=2), MadeUpLoader)["steps"] == 2


def test_a_rate_that_is_given_on_resuming_holds_from_then_on(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the schedule had said so, to the last bit; also where the process was killed before it could save a checkpoint."""
    monkeypatch.setitem(recipes.RECIPES, "small", small_recipe(schedule=Steps(after=(1, 2))))
    wanted = train(config(data, name="planned", epochs=3), MadeUpLoader)["weights_sha256"]
    train(config(data, name="hand", schedule="constant", epochs=1), MadeUpLoader)
    bare = config(data, name="hand", recipe=None, resume=True, epochs=3)
    run = data.parent / "runs" / "hand"
    kept = shutil.copytree(run / "checkpoints", data.parent / "kept")
    train(replace(bare, lr=0.001, steps=7), MadeUpLoader)
    assert "from step 6 on: lr was 0.01, is now 0.001; the rate is now 0.001" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(kept, run / "checkpoints")
    train(replace(bare, epochs=2), MadeUpLoader)
    train(replace(bare, lr=0.0001), MadeUpLoader)
    assert train(bare, MadeUpLoader)["weights_sha256"] == wanted
    document = json.loads((run / "config.json").read_text())
    assert [(change["step"], change["changes"]["lr"]["is"]) for change in document["history"]] == [
        (6, 0.001),
        (12, 0.0001),
    ]
    assert (document["options"]["lr"], document["identity"]["recipe"]["lr"]) == (0.0001, 0.0001)
    assert [record["lr"] for record in ranks.records(run, "change")] == [0.001, 0.0001]


def test_a_schedule_is_an_option(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is planned for the run's length, goes on as it began, and may be planned anew."""
    whole = train(config(data, name="whole", schedule="linear", warmup=1, epochs=3), MadeUpLoader)
    run = data.parent / "runs" / "part"
    train(config(data, name="part", schedule="linear", warmup=1, epochs=3, steps=8), MadeUpLoader)
    bare = config(data, name="part", recipe=None, resume=True)
    assert train(replace(bare, epochs=3), MadeUpLoader)["weights_sha256"] == whole["weights_sha256"]
    rates = [record["lr"] for record in ranks.records(run, "steps")]
    assert len(set(rates)) == len(rates) and max(rates) < 0.01
    with pytest.raises(AlexprepError, match=r"to 0 after 3 epochs, and 4 are asked for: add --schedule linear"):
        train(replace(bare, epochs=4), MadeUpLoader)
    train(config(data, name="short", schedule="linear", epochs=2, steps=8), MadeUpLoader)
    with pytest.raises(
        AlexprepError, match=r"after 2 epochs, and 3 are the recipe's: add --epochs 2, .*, or --schedule"
    ):
        train(replace(bare, name="short", steps=10), MadeUpLoader)
    assert train(replace(bare, epochs=4, schedule="cosine", warmup=0), MadeUpLoader)["steps"] == 24
    document = json.loads((run / "config.json").read_text())
    assert document["identity"]["recipe"]["schedule"] == {"kind": "Cosine", "epochs": 4, "final": 0.0}
    assert document["history"][0]["changes"]["schedule"] == {"was": "linear", "is": "cosine"}
    with pytest.raises(AlexprepError, match=r"no schedule 'steps:x': choose one of constant, linear"):
        train(config(data, schedule="steps:x"), MadeUpLoader)
    # A release may ship a recipe with another schedule: a run keeps its own, and what is put around it.
    train(config(data, name="older", warmup=1, steps=1), MadeUpLoader)
    monkeypatch.setitem(recipes.RECIPES, "small", small_recipe(schedule=Cosine()))
    job = prepare(config(data, name="older", recipe=None, resume=True, early_stop=4), check_statistics=False)
    assert job.recipe.schedule == EarlyStop(WarmUp(Steps(after=(2,)), 1.0), 4)


def test_a_bare_resume_goes_on_as_the_run_began(data: Path) -> None:
    """With its data, its length, and as many checkpoints as often; what is given on resuming holds from then on."""
    run = data.parent / "runs" / "small"
    bare = TrainConfig(runs=run.parent, device="cpu", resume=True)
    assert train(config(data, epochs=1, keep=6, checkpoint_steps=2), MadeUpLoader)["steps"] == 6
    assert _saved(run) == [2, 4, 6]
    assert train(bare, MadeUpLoader)["epochs"] == 1
    assert json.loads((run / "config.json").read_text())["data"] == str(data)
    # Epochs and steps are one choice: either takes the place of both.
    assert train(replace(bare, steps=8, keep=2, checkpoint_steps=1), MadeUpLoader)["steps"] == 8
    remembered = {"epochs": None, "steps": 8, "keep": 2, "checkpoint_steps": 1, "evaluate_every": 1}
    assert {name: _options(run)[name] for name in REMEMBERED} == remembered
    assert train(bare, MadeUpLoader)["steps"] == 8
    assert train(replace(bare, epochs=2), MadeUpLoader)["steps"] == 12
    assert _saved(run) == [6, 11, 12]  # the first epoch's is the best
    longer = train(replace(bare, epochs=3), MadeUpLoader)["weights_sha256"]
    assert longer == train(config(data, name="whole"), MadeUpLoader)["weights_sha256"]


def test_data_that_moved_is_told_and_found_again(data: Path) -> None:
    run = data.parent / "runs" / "small"
    train(config(data, steps=1), MadeUpLoader)
    moved = data.rename(data.with_name("moved"))
    bare = TrainConfig(runs=run.parent, device="cpu", resume=True, steps=2)
    words = rf"small was trained on {data}, which holds no data set now: name the folder where it is"
    with pytest.raises(AlexprepError, match=words):
        train(bare, MadeUpLoader)
    with pytest.raises(AlexprepError, match=words):
        evaluate_run(run, device="cpu", open_loader=MadeUpLoader)
    assert train(replace(bare, data=moved), MadeUpLoader)["steps"] == 2
    assert train(replace(bare, steps=3), MadeUpLoader)["steps"] == 3
    assert evaluate_run(run, device="cpu", open_loader=MadeUpLoader)["step"] == 3


def test_options_that_go_on_with_a_run(data: Path) -> None:
    job = prepare(config(data, name="two", ranks=2, scheme="ddp", runs=Path("runs"), device=None), dry_run=True)
    assert job.resume_options() == "--resume --gpus 2"


def test_the_split_that_is_evaluated_on(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first of val and test that has samples with labels; where there is none, it says so."""

    def labelled(folder: Path, *labels: int) -> None:
        (folder / "val").mkdir(exist_ok=True)
        np.save(folder / "val" / "index.npy", np.array([(0, 0, 0, label, 64, 64) for label in labels], INDEX_DTYPE))

    def summary_of(folder: Path) -> dict[str, Any]:
        return train(config(folder, epochs=1), MadeUpLoader)

    bare = summary_of(write_data(data.parent / "bare", splits=("train",)))
    assert "there is no val or test split" in capsys.readouterr().err
    assert [bare[key] for key in ("val_split", "val_top1_error", "val_top5_error", "val_loss")] == [None] * 4
    assert summary_of(write_data(data.parent / "tested", splits=("train", "test")))["val_split"] == "test"
    labelled(data, -1, -1)
    summary = summary_of(data)
    said = capsys.readouterr().err
    assert "the split val is skipped: none of its images has a label" in said
    assert "there is no val or test split with labels" in said
    assert (summary["epochs"], summary["val_split"], summary["val_loss"]) == (1, None, None)
    labelled(data, -1, 2)
    assert summary_of(data)["val_split"] == "val"
    both = write_data(data.parent / "both", splits=("train", "val", "test"))
    labelled(both, -1)
    assert summary_of(both)["val_split"] == "test"


def test_an_unfitting_data_set_is_refused(data: Path) -> None:
    large = write_data(data.parent / "large", image={"size": 256, "format": "jpg"})
    words = r"side of 256 pixels, recipe small is for 67: train with --recipe alexnet, or shard"
    with pytest.raises(AlexprepError, match=words):
        train(config(large), MadeUpLoader)
    single = write_data(data.parent / "single", classes=["only"])
    with pytest.raises(AlexprepError, match="has 1 classes"):
        train(config(single), MadeUpLoader)
    assert not (data.parent / "runs").exists()  # nothing is begun that cannot go on


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("steps", "epochs", "keep", "threads", "trace")),
        *(("seed", -1), ("trace", 201), ("data", None)),
    ],
)
def test_senseless_settings_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(AlexprepError, match=f"{name} "):
        TrainConfig(**{"data": tmp_path, name: value})
