"""Settings FIELD=VALUE: what they may say, what is refused, what a run keeps of them, and that every field of every recipe is one."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from alexprep.cli import recipes as recipes_command
from alexprep.cli.options import Setting
from alexprep.cli.train import SYNONYMS
from alexprep.cli.train import train as train_command
from alexprep.pipeline.augmentation import Augmentation, augment, centred, draw
from alexprep.pipeline.colour import Jitter
from alexprep.pipeline.mixing import Mixing
from alexprep.pipeline.policies import RandAugment
from alexprep.shards.errors import AlexprepError
from alexprep.train import checkpoint, recipes
from alexprep.train.config import TrainConfig, prepare
from alexprep.train.distributed.tensor_parallel import part_of
from alexprep.train.distributed.world import World
from alexprep.train.evaluation import evaluate_run
from alexprep.train.lr_schedule import ByHand, Cosine, DExp, Steps, WarmUp
from alexprep.train.models.alexnet import AlexNet, alexnet_owt
from alexprep.train.models.cifar import ConvLocal
from alexprep.train.recipes import RECIPES, Recipe
from alexprep.train.settings import by_field, completions, settable, with_settings
from alexprep.train.trainer import train
from tests import training_ranks as ranks
from tests.made_up import MadeUpLoader, write_data
from tests.training_ranks import small_config as config


def changed(name: str, *settings: str) -> Recipe:
    return with_settings(RECIPES[name], by_field(settings))


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_is_a_setting_with_its_type_and_meaning(name: str) -> None:
    """And what is shown of it, given back, changes nothing; parts that no text can say are said field by field."""
    recipe = RECIPES[name]
    told = {one.path: one for one in settable(recipe)}
    for path, one in told.items():
        assert one.type and one.meaning, path
        if one.value != "of its own":
            assert with_settings(recipe, {path: one.value}) == recipe, path
    parts: list[tuple[str, Any]] = [
        ("", recipe),
        ("augmentation.", recipe.augmentation),
        ("schedule.", recipe.schedule),
    ]
    parts += [("network.", recipe.network)] if dataclasses.is_dataclass(recipe.network) else []
    every = {prefix + field.name for prefix, part in parts for field in dataclasses.fields(part)}
    assert every - told.keys() == {"name", "augmentation.hooks"} | ({"network.name"} & every)


@pytest.mark.parametrize(
    ("name", "settings", "wanted"),
    [
        ("alexnet", ["lr=2e-2", "epochs=3", "clip=1", "momentum_correction=true"], (0.02, 3, 1.0, True)),
        ("alexnet", ["network.then2=relu,pool", "network.without=conv3,fc7"], (("relu", "pool"), ("conv3", "fc7"))),
        ("alexnet", ["network=alexnet-owt"], (alexnet_owt,)),
        ("alexnet", ["network=alexnet-owt", "network.pool=2"], (replace(alexnet_owt, pool=2), 2)),
        ("alexnet", ["augmentation.scale=0.08,1", "augmentation.mean=imagenet"], ((0.08, 1.0), "imagenet")),
        ("alexnet", ["augmentation.mean=1,2.5,3"], ((1.0, 2.5, 3.0),)),
        ("alexnet", ["augmentation.noise_epochs=67", "augmentation.mirror=False"], (67, False)),
        ("alexnet", ["augmentation.jitter.brightness=0.4"], (0.4,)),
        ("alexnet", ["augmentation.jitter=Jitter"], (Jitter(),)),
        ("alexnet", ["augmentation.mixing.mixup=0.2"], (0.2,)),
        ("alexnet", ["augmentation.policy=RandAugment", "augmentation.policy.strength=3"], (RandAugment(2, 3), 3)),
        ("alexnet", ["augmentation=2012-code"], (RECIPES["alexnet-2012"].augmentation,)),
        ("tiny", ["augmentation=2012-code", "augmentation.share=1"], (None, 1)),
        ("alexnet-2012", ["layer_decay.fc8=0.01", "layer_decay.conv1=0"], (0.01, 0.0)),
        ("alexnet", ['layer_decay={"fc8": 1}'], ({"fc8": 1.0},)),
        ("tiny", ["optimizer=adamw", "optimizer_options.betas=[0.9,0.95]"], ("adamw", [0.9, 0.95])),
        ("tiny", ["schedule=dexp"], (DExp(),)),
        ("tiny", ["schedule=steps:3", "schedule.divisor=2"], (Steps((3,), 2.0), 2.0)),
        ("tiny", ["schedule=steps:3", "schedule.after=4,5"], (Steps((4, 5)), (4, 5))),
        ("tiny", ["schedule=alexnet-2012"], (RECIPES["alexnet-2012"].schedule,)),
        (
            "tiny",
            ['schedule={"kind": "WarmUp", "schedule": {"kind": "Cosine"}, "epochs": 1}', "schedule.schedule.final=0.5"],
            (WarmUp(Cosine(final=0.5), 1.0), 0.5),
        ),
        ("tiny", ['schedule={"kind":"ByHand","rows":[[3,"conv1.*",0.1]]}'], (ByHand(((3, "conv1.*", 0.1),)),)),
    ],
)
def test_settings_say(name: str, settings: list[str], wanted: tuple[Any, ...]) -> None:
    made = changed(name, *settings)
    for field, value in zip(by_field(settings), wanted, strict=True):
        found: Any = made
        for part in field.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        assert value is None or (found == value and type(found) is type(value)), field


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["lr"], "'lr' is not FIELD=VALUE"),
        (["lr=x"], "lr=x: 'x' does not fit, lr takes: number"),
        (["lr=nan"], "'nan' does not fit"),
        (["lr=-1"], "recipe alexnet: lr -1.0 is not a number in"),
        (["batch_size=1e3"], "batch_size takes: whole number"),
        (["network.pol=2"], "perhaps network.pool is meant; `alexprep recipes alexnet` lists all"),
        (["netwrk.pool=2"], "perhaps network.pool is meant"),
        (["network.pool=4"], "pools 2 or 3 wide"),
        (["network.kernels=1,2"], "network.kernels takes: 5 whole numbers with commas"),
        (["network.without=conv9"], "takes: some of conv2, conv3, conv4, conv5, fc6, fc7; none"),
        (["network.norm=1"], "network.norm takes: true or false"),
        (["network=vgg"], "a network is that of a recipe, one of alexnet, .*--model"),
        (["network=mine.py:make"], "one of your own is named with --model"),
        (["augmentation=all"], "'all' is not one of paper, 2012-code, resized, none"),
        (["augmentation.mean=center"], "augmentation.mean takes: crop, centre, .* or 3 numbers with commas"),
        (["augmentation.policy.strength=1"], "say first which, augmentation.policy=RandAugment or TrivialAugment"),
        (["augmentation.jitter.bright=1"], "there are augmentation.jitter.brightness, "),
        (["augmentation.hooks=x"], "named with --hook"),
        (["name=x"], "--name names the run"),
        (["lr.x=3"], "lr of recipe alexnet is 0.01, which has no fields"),
        (["schedule.after=3"], "schedule of recipe alexnet, Plateau, has no such field: .*there are schedule.patience"),
        (["schedule=cosin"], "there is no schedule 'cosin': choose one of constant, linear"),
        (['schedule={"kind"'], "is not JSON as a run's config.json has it"),
        (['schedule={"kind": "WarmUp"}'], "missing 2 required"),
        (['schedule={"kind": "Linear", "end": 1}'], "Linear has no end"),
        (['schedule={"kind": "Linear", "epochs": 1.5}'], "epochs 1.5 does not fit, it takes: whole number or none"),
        (["layer_decay=[1]"], "layer_decay takes: JSON object"),
        (['layer_decay={"fc8": "x"}'], "layer_decay takes: JSON object"),
        (["layer_decay.fc8=x"], "layer_decay.fc8 takes: number"),
    ],
)
def test_what_is_no_setting_is_refused(settings: list[str], words: str) -> None:
    with pytest.raises(AlexprepError, match=words):
        changed("alexnet", *settings)


def test_a_function_has_no_fields_and_a_user_s_object_has() -> None:
    with pytest.raises(AlexprepError, match=r"network of recipe tiny is tiny, which has no fields"):
        changed("tiny", "network.pool=2")
    wide = recipes.user_recipe(f"{__file__}:own")
    deeper = with_settings(wide, {"network.maps": "5"})
    assert deeper.describe()["network"]["options"] == {"maps": 5}
    assert deeper.make_network(3, 0).get_parameter("0.weight").shape[0] == 5


@dataclasses.dataclass(frozen=True)
class Maker:
    maps: int = 4

    def describe(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __call__(self, classes: int, crop: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, self.maps, 1), nn.Flatten(), nn.LazyLinear(classes))


def own() -> Recipe:
    return replace(RECIPES["tiny"], name="own", network=Maker())


def test_a_later_setting_takes_the_place_of_earlier_ones() -> None:
    assert by_field(["lr=1", "schedule.final=0.1", "lr=2", "schedule=cosine", "schedulers=1"]) == {
        "lr": "2",
        "schedule": "cosine",
        "schedulers": "1",
    }


def test_what_a_damaged_run_says_is_refused() -> None:
    with pytest.raises(AlexprepError, match=r"3 is not FIELD=VALUE"):
        by_field([3])  # type: ignore[list-item]


def test_settings_that_are_options_are_these(tmp_path: Path) -> None:
    said = TrainConfig(
        tmp_path, settings=("lr=0.5", "epochs=3", "warmup=1", "schedule=cosine", "clip=1", "schedule.final=0.1")
    )
    assert (said.lr, said.epochs, said.warmup, said.schedule) == (0.5, 3, 1.0, "cosine")
    assert said.settings == ("clip=1", "schedule.final=0.1")
    assert replace(said, lr=0.25).lr == 0.25
    with pytest.raises(AlexprepError, match=r"--batch-size 4 and --set batch_size=8 say the same: give one"):
        TrainConfig(tmp_path, batch_size=4, settings=("batch_size=8",))
    with pytest.raises(AlexprepError, match=r"early_stop takes: whole number"):
        TrainConfig(tmp_path, settings=("early_stop=none",))
    assert set(SYNONYMS) <= {one.path for one in settable(RECIPES["tiny"])}
    twice = CliRunner().invoke(
        train_command, ["--data", str(write_data(tmp_path / "data")), "--clip", "1", "--set", "clip=2"]
    )
    assert twice.exit_code == 2 and "--clip and --set clip=… say the same: give one." in twice.output


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return ranks.registered(tmp_path, monkeypatch, MadeUpLoader)


def test_a_run_keeps_its_settings(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It goes on with them to the bit, is evaluated with them, and refuses others by name."""
    settings = ("width=0.0625", "label_smoothing=0.1", "schedule=linear", "schedule.final=0.5")
    wanted = train(config(data, name="whole", epochs=2, settings=settings), MadeUpLoader)["weights_sha256"]
    train(config(data, name="part", epochs=2, steps=3, settings=settings), MadeUpLoader)
    assert "with width=0.0625, label_smoothing=0.1, schedule.final=0.5" in capsys.readouterr().err
    bare = config(data, name="part", recipe=None, resume=True)
    for other, words in (
        ("width=0.125", "recipe.width was 0.0625, is now 0.125"),
        ("momentum=0.5", "recipe.momentum was 0.9"),
    ):
        with pytest.raises(AlexprepError, match=words):
            train(replace(bare, settings=(other,)), MadeUpLoader)
    same = replace(bare, epochs=2, settings=("width=0.06250",))
    assert train(same, MadeUpLoader)["weights_sha256"] == wanted
    run = data.parent / "runs" / "part"
    assert evaluate_run(run, device="cpu", open_loader=MadeUpLoader)["step"] == 12
    told = json.loads((run / "config.json").read_text())
    assert told["options"]["settings"] == ["label_smoothing=0.1", "schedule.final=0.5", "width=0.06250"]
    assert (told["options"]["schedule"], "history" in told) == ("linear", False)


def test_a_schedule_s_fields_may_change_on_resuming(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As rate and schedule may; config.json and the log keep it."""
    train(
        config(data, name="run", epochs=3, steps=6, settings=("schedule.divisor=2", "schedule.after=1,2")), MadeUpLoader
    )
    bare = config(data, name="run", recipe=None, resume=True, epochs=3)
    train(replace(bare, settings=("schedule.divisor=4",)), MadeUpLoader)
    assert "from step 6 on: schedule.divisor was 2.0, is now 4; the rate is now 0.0025" in capsys.readouterr().err
    run = data.parent / "runs" / "run"
    told = json.loads((run / "config.json").read_text())
    assert told["history"] == [{"step": 6, "changes": {"schedule.divisor": {"was": 2.0, "is": 4}}}]
    assert told["identity"]["recipe"]["schedule"] == {"kind": "Steps", "after": [1, 2], "divisor": 4.0}
    assert [record["lr"] for record in ranks.records(run, "change")] == [0.0025]
    later = prepare(replace(bare, settings=("schedule=cosine",)), check_statistics=False)
    assert later.recipe.schedule == Cosine(epochs=3) and later.config.settings == ()
    assert later.changes == {"schedule": {"was": None, "is": "cosine"}}


def test_what_cannot_be_trained_is_refused_before_there_is_a_run(data: Path) -> None:
    for settings, words in (
        (("layer_decay.fc9=0.1",), "layer_decay names fc9, which the network does not have"),
        (("schedule=alexnet-6conv-tune", "network=cifar10-quick"), "the schedule names fc8.weight"),
        (("optimizer=Foo",), "there is no optimizer 'Foo'"),
    ):
        with pytest.raises(AlexprepError, match=words):
            prepare(config(data, settings=settings), check_statistics=False)
    assert not (data.parent / "runs").exists()


def test_the_11_percent_net_of_older_runs_has_its_wide_layer() -> None:
    """They recorded `norm`, which meant both."""
    for norm, kernels in ((True, 64), (False, 32)):
        net = ConvLocal("net", norm=norm, local3=kernels)
        older = {"name": "net", "activation": "relu", "norm": norm}
        assert checkpoint.with_defaults(older, net) == net.describe()


def test_the_mean_may_be_the_centre_s_for_the_nets_for_cifar() -> None:
    """cuda-convnet's provider of crops subtracted the centre of the mean image from each: facts about its convdata.py."""
    made = changed("cifar10-13pct", "augmentation.mean=centre")
    assert made.augmentation == replace(RECIPES["cifar10-13pct"].augmentation, mean="centre")


@pytest.mark.parametrize("scale", [None, (0.3, 0.6)])
def test_without_chance_training_shows_what_evaluation_shows(scale: tuple[float, float] | None) -> None:
    usual = Augmentation(crop=5, scale=scale, mean="imagenet", std="imagenet", noise="none", jitter=Jitter(0.4))
    still = with_settings(replace(RECIPES["tiny"], augmentation=usual), {"augmentation": "none"}).augmentation
    assert (still.mean, still.std, still.jitter, still.mirror) == ("imagenet", "imagenet", None, False)
    sizes = np.array([[9, 12], [7, 7], [8, 30]])
    drawn, shown = draw(still, 3, 1, np.arange(3), sizes), centred(usual, sizes)
    assert np.array_equal(drawn.windows_N4, shown.windows_N4) and not drawn.mirror_N.any() and not drawn.more
    image = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    assert np.array_equal(
        augment(image, drawn, 0, still, None), augment(image, shown, 0, replace(usual, jitter=None), None)
    )
    assert Augmentation(crop=5, mixing=Mixing(mixup=0.2)).without_chance().mixing is None


def test_recipes_tells_and_changes_fields() -> None:
    def said(*words: str) -> list[str]:
        return CliRunner().invoke(recipes_command.recipes, words, catch_exceptions=False).stdout.splitlines()

    plain, other = said("alexnet", "--json"), said("alexnet", "--json", "--set", "network.pool=2", "--set", "clip=none")
    pool = plain.index("network.pool=3  (whole number)")
    assert plain[pool + 1] == "    side of the pools' windows, at stride 2: 3 overlap (section 3.4), 2 do not."
    assert "network.pool=2  (whole number)" in other
    wanted = json.loads(plain[-1])
    wanted["network"]["pool"] = 2
    assert json.loads(other[-1]) == wanted
    alone = CliRunner().invoke(recipes_command.recipes, ["--set", "lr=1"])
    assert alone.exit_code == 2 and "--set is for one recipe: name it" in alone.output


def test_a_shell_completes_fields_and_values() -> None:
    recipe = RECIPES["alexnet"]
    assert completions(recipe, "augmentation.mi") == ["augmentation.mirror=", "augmentation.mixing="]
    assert completions(recipe, "augmentation.mirror=t") == ["augmentation.mirror=true"]
    assert completions(recipe, "augmentation.policy=T") == ["augmentation.policy=TrivialAugment"]
    assert completions(recipe, "schedule=co") == ["schedule=constant", "schedule=cosine"]
    assert "network=alexnet-owt" in completions(recipe, "network=")

    def asked(begun: str, **params: str) -> list[str]:
        context = click.Context(train_command)
        context.params = params
        parameter = next(each for each in train_command.params if each.name == "settings")
        return [item.value for item in Setting().shell_complete(context, parameter, begun)]

    assert asked("network.act", recipe="cifar10-11pct") == ["network.activation="]
    assert asked("network.po", recipe="nobody") == asked("network.po") == ["network.pool="]


def test_a_network_with_settings_is_trained_by_two_towers() -> None:
    narrow = AlexNet(without=("conv4",), activation="tanh", dropout=False)(3, 67, width=0.0625)
    part = part_of(narrow, "towers", World(0, 2, torch.device("cpu"))).network
    assert "conv4" not in dict(part.named_children()) and "conv5" in dict(part.named_children())
