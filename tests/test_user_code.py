"""Networks and recipes of a user's own: every form that is taken, every mistake told in one sentence before anything is begun."""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from alexprep.cli.train import train as train_command
from alexprep.shards.dataset_format import versions
from alexprep.shards.errors import AlexprepError
from alexprep.train.config import Job, TrainConfig, prepare
from alexprep.train.evaluation import evaluate_run
from alexprep.train.launch import launch_training
from alexprep.train.predictions import open_net
from alexprep.train.recipes import RECIPES, user_recipe
from alexprep.train.run_dir import Place
from alexprep.train.trainer import train
from alexprep.train.training_state import weights_digest
from alexprep.train.user_code import FORMS, UserNetwork, call_factory, load, references, user_network
from tests import made_up
from tests.made_up import BATCH, CLASSES

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SAMPLES, CROP = 30, 8  # 4 steps an epoch, the last of 6 images

RECIPE = f"""
from alexprep.pipeline.augmentation import Augmentation
from alexprep.train.recipes import Recipe
from alexprep.train.lr_schedule import Steps
from nets import make

def recipe(**changes):
    fields = dict(name="small", network=make, stored_sizes=({CROP}, {CROP}), schedule=Steps(after=(9,)), epochs=3, batch_size={BATCH})
    return Recipe(augmentation=Augmentation(crop={CROP}, noise="none"), lr=0.01, **fields | changes)
"""
# Batch normalisation, an attention layer's names, a parameter of the network itself, one that is frozen, and a layer that nobody asks.
NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 1 / 64))
        self.shift = nn.Parameter(torch.ones(3, 1, 1), requires_grad=False)
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.drop = nn.Dropout(0.2)
        self.dead = nn.Linear(2, 2)
        self.out = nn.Linear(8, classes)

    def forward(self, images):
        maps = torch.relu(self.norm(self.conv(images * self.scale + self.shift)))
        words = maps.flatten(2).transpose(1, 2)
        read, _ = self.attention(words, words, words, need_weights=False)
        return self.out(self.drop((words + read).mean(1)))

make = Net
"""
NN = "from torch import nn\n"
MEANS = "nn.AdaptiveAvgPool2d(1), nn.Flatten()"  # of an image's three channels
SHARED = NETS.replace("nn.BatchNorm2d(8)", "nn.GroupNorm(2, 8)")  # ranks can train it
TRACKING = "nn.InstanceNorm2d(8, track_running_stats=True)"
NAMED: dict[str, Any] = {"recipe": "recipe.py", "model": "nets.py:make"}


class MadeUpLoader(made_up.MadeUpLoader):
    side, training, others = CROP, SAMPLES, SAMPLES


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of the user's code that a test adds to Python's path go with it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: nets.py, recipe.py, and in `data` a data set's facts without its images."""
    made_up.write_data(tmp_path / "data", MadeUpLoader)
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "recipe.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**changes: Any) -> TrainConfig:
    """Settings for a run in the current folder."""
    settings: dict[str, Any] = {"data": Path("data"), "recipe": "recipe.py", "device": "cpu", "log_steps": 4}
    return TrainConfig(**settings | changes)


def begun(**changes: Any) -> Job:
    """A run that is ready to begin, of the network in nets.py."""
    return prepare(config(**changes), check_statistics=False)


def check_refused(words: str, **changes: Any) -> None:
    """One sentence with these words is said instead of beginning, and nothing is left behind."""
    with pytest.raises(AlexprepError, match=words) as error:
        begun(**changes)
    assert not Path("runs").exists()
    assert "\n" not in str(error.value)


def test_every_form_of_model_stands_in_help_and_in_docs() -> None:
    forms = ["FILE.py:FUNCTION", *", ".join(form.written for form in FORMS).split(", ")]
    (option,) = (each for each in train_command.params if each.name == "model")
    assert option.metavar is not None and option.metavar.split(" | ") == forms
    page = (ROOT / "docs" / "own-nets.md").read_text()
    assert [form for form in forms if f"| `{form}` |" not in page] == []


# The network.


@pytest.mark.parametrize(
    ("factory", "got"),
    [
        (lambda number=1000, depth=18: (number, depth), (10, 18)),
        (lambda number, /, *rest: (number, rest), (10, ())),
        (lambda number, side, depth=18: (number, side, depth), (10, 32, 18)),
        (lambda depth=18, num_classes=1000: (depth, num_classes), (18, 10)),
        (lambda crop, classes: (crop, classes), (32, 10)),
        (lambda classes, crop, *, seed, width: (classes, crop, seed, width), (10, 32, 7, 1.0)),
        (lambda classes, width=64: (classes, width), (10, 64)),  # its own width, no scale
        (lambda *, weights=None, **others: (weights, others), (None, {"num_classes": 10})),  # torchvision's form
        (functools.partial(lambda depth, classes: (depth, classes), 18), (18, 10)),
    ],
)
def test_forms_of_factories(factory: Callable[..., Any], got: Any) -> None:
    assert call_factory(factory, 10, 32, 7, 1.0) == got


def test_a_factory_scales_its_network_as_the_recipe_says() -> None:
    assert call_factory(lambda classes, width=1.0: (classes, width), 10, 32, 7, 0.5) == (10, 0.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'width'"):
        call_factory(lambda classes: None, 10, 32, 7, 0.5)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_initial_weights_depend_on_the_seed_alone() -> None:
    """Lazy layers too, and dropout goes on as if no network had been made."""

    def lazy(classes: int) -> nn.Module:
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.Dropout(), nn.Flatten(), nn.LazyLinear(classes))

    own = UserNetwork(lazy, "here:lazy", "here")
    digests = []
    for before, seed in ((0, 3), (1, 3), (0, 4)):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        network = own(CLASSES, CROP, seed=seed, width=1.0)
        assert torch.equal(state, torch.get_rng_state()) and network.training
        digests.append(weights_digest(network.state_dict()))
    assert digests[0] == digests[1] != digests[2]


def test_references_mean_the_same_in_any_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "sub").mkdir()
    monkeypatch.chdir(here / "sub")
    found = references("../recipe.py", "../nets.py:make")
    assert found == (f"{here}/recipe.py", f"{here}/nets.py:make") == references(*found)
    assert references("tiny", "torch.nn:Linear") == ("tiny", "torch.nn:Linear")
    assert load("torch.nn:Linear", "--model") == (nn.Linear, "torch.nn:Linear")
    assert load("../nets.py", "--model", "make")[1] == "nets:make"
    assert load("../nets.py:Net.forward", "--model", "make")[1] == "nets:Net.forward"
    monkeypatch.chdir(here)
    assert references(None, "nets:make")[1] == f"{here}/nets.py:make"  # a module of this folder
    assert load("nets:make", "--model")[1] == "nets:make"
    (here / "one.py").write_text("def _helper(): ...\ndef only(classes): ...")
    (here / "bound.py").write_text("import functools\ndef net(depth, n): ...\nmake = functools.partial(net, 3)")
    assert load("bound.py", "--model", "make")[1] == "bound:make"
    assert load("one.py", "--model", "make")[1] == "one:only"


def test_files_find_what_lies_beside_them_and_nothing_else(here: Path) -> None:
    """Two folders with modules of one name, one of them called as Python's own; quick edits."""
    code = "from blocks import number\ndef make(classes):\n    import blocks\n    return number"
    for number in (1, 2):
        (here / f"net{number}").mkdir()
        (here / f"net{number}" / "blocks.py").write_text(f"number = {number}")
        (here / f"net{number}" / "random.py").write_text(code)
    assert [load(f"net{number}/random.py:make", "--model")[0](3) for number in (1, 2)] == [1, 2]
    (here / "net1" / "blocks.py").write_text("number = 3")
    assert load("net1/random.py:make", "--model")[0](3) == 3
    assert not hasattr(sys.modules["random"], "make")


def test_a_file_in_a_package_is_part_of_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "pkg").mkdir()
    for name, code in (
        ("__init__", ""),
        ("blocks", "number = 7"),
        ("net", "from .blocks import number\nimport pkg.blocks"),
    ):
        (here / "pkg" / f"{name}.py").write_text(
            f"{code}\ndef make(classes): return number\n" if name == "net" else code
        )
    for reference in ("pkg/net.py:make", "pkg.net:make"):
        factory, title = load(reference, "--model")
        assert (factory(3), title) == (7, "pkg.net:make")
    assert sys.path[-1] == str(here) and not list(here.rglob("__pycache__"))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def make(c:", r"wrong.py:make: SyntaxError: '\(' was never closed \(wrong.py, line 1\)"),
        ("\nimport no_such_library", "wrong.py, line 2: ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise SystemExit(2)", "--model .*/wrong.py:make: .*/wrong.py, line 1: SystemExit: 2"),
        ("def mak(classes): ...", "AttributeError: module .*wrong' has no attribute 'make'"),
        ("def make(c):\n  return h(c)\ndef h(n):\n  raise ValueError('1\\n2')", "wrong.py, line 4: ValueError: 1$"),
        ("def make(classes): ...", "wrong.py:make: it returned a NoneType, not a torch.nn.Module"),
        (f"{NN}make = nn.Linear(1, 1)", "make: it is a Linear, not a function that makes a network"),
        (f"{NN}def make(n): return nn.Conv2d(4, 2, 1)", r"shown images \(2, 3, 8, 8\): RuntimeError: Given"),
        (f"{NN}def make(n): return nn.Flatten()", r"gives float32 \(2, 192\), not logits \(2, 3\)"),
        (f"{NN}def make(n): return nn.AdaptiveMaxPool2d(1, return_indices=True)", r"a tuple, not logits \(2, 3\)"),
        (f"{NN}def make(n): return nn.Sequential({MEANS}, nn.Softplus(1e-40))", "NaN or infinity for pixels of"),
        (f"{NN}def make(n): return nn.Sequential({MEANS})", r"in a training step .*: RuntimeError: .* require grad"),
    ],
)
def test_mistakes_are_told_before_a_run_is_begun(here: Path, code: str, words: str) -> None:
    (here / "wrong.py").write_text(code)
    check_refused(words, model="wrong.py:make")


def test_mistakes_of_a_reference(here: Path) -> None:
    check_refused(f"^there is no file {here}/gone.py: say where it is with --model", model="gone.py:make")
    check_refused("No module named 'nowhere'", model="nowhere:make")
    for odd in ("nets/make", "nets.py:", "nets.py:a b"):
        check_refused("names no Python code: write FILE.py:FUNCTION or MODULE:FUNCTION", model=odd)
    check_refused("no recipe 'alexnt', perhaps alexnet is meant: choose one of alexnet, alexnet-2", recipe="alexnt")


def test_a_traceback_for_those_who_ask(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "wrong.py").write_text("def make(classes): return 1 / 0")
    monkeypatch.setenv("ALEXPREP_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        begun(model="wrong.py:make")


def test_an_error_in_mid_training_names_its_line(here: Path) -> None:
    late = "    steps = 0\n    def forward(self, images):\n        self.steps += self.training\n"
    late += "        if self.steps > 3: raise KeyError('late')"
    (here / "late.py").write_text(NETS.replace("    def forward(self, images):", late))
    with pytest.raises(AlexprepError, match=r"--model .*/late.py:make: .*/late.py, line \d+: KeyError: 'late'"):
        train(config(model="late.py:make"), MadeUpLoader)


def test_a_net_that_views_its_maps_gets_contiguous_ones(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the channels last in memory `view` fails; it is trained nevertheless, to the bits of one that flattens so."""
    code = "from torch import nn\nclass make(nn.Module):\n  def __init__(self, n):\n    super().__init__()\n"
    code += "    self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, n)\n  def forward(self, x):\n    return "
    (here / "views.py").write_text(code + "self.fc(self.conv(x / 64).view(-1, 256))")
    (here / "flattens.py").write_text(code + "self.fc(self.conv(x / 64).flatten(1))")
    runs = [train(config(model=f"{name}.py:make", epochs=1), MadeUpLoader) for name in ("views", "flattens")]
    assert [Path(run["run"]).name for run in runs] == ["views", "flattens"]
    assert runs[0]["val_loss"] == pytest.approx(runs[1]["val_loss"], rel=1e-5)
    assert capsys.readouterr().err.count("cannot take images with the channels last in memory") == 1
    viewing: dict[str, Any] = {"recipe": "recipe.py", "model": "views.py:make"}
    found = evaluate_run(Path(runs[0]["run"]), device="cpu", open_loader=MadeUpLoader, **viewing)
    assert found["loss"] == pytest.approx(runs[0]["val_loss"], rel=1e-5)


# A network that has what alexprep's own have not.


def test_a_net_with_batch_norm_trains_as_with_torch(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Running means, an integer among them; dropout; parameters of any name, frozen, unused, of the network itself."""
    summary = train(config(epochs=2, log_steps=1, name="whole"), MadeUpLoader)
    torch.manual_seed(0)
    network = user_network("nets.py:make")(CLASSES, CROP, seed=0, width=1.0)
    fresh = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    biases = [weight for name, weight in network.named_parameters() if name.endswith(".bias")]
    weights = [weight for name, weight in network.named_parameters() if not name.endswith(".bias")]
    groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": 0.0005}, {"params": biases}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    loader = MadeUpLoader("data", memory_format="channels_last")
    for images, labels in [*loader, *loader]:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    tensors = load_file(max(Path(summary["run"]).glob("checkpoints/*.safetensors")))
    saved = {name.removeprefix("weight."): tensor for name, tensor in tensors.items() if name.startswith("weight.")}
    assert saved.keys() == fresh.keys()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    assert saved["norm.num_batches_tracked"].dtype == torch.int64 and saved["norm.num_batches_tracked"] == 8
    for name in ("dead.weight", "shift"):  # not even decayed
        assert torch.equal(saved[name], fresh[name])
    said = capsys.readouterr().err
    assert "dead.weight, dead.bias of the network had no part in its outputs" in said and "recipe:Net, " in said
    # Stopped on the way and resumed, it ends with the same bits; evaluated, it has the same error.
    train(config(steps=6, name="part"), MadeUpLoader)
    rest = train(config(epochs=2, name="part", resume=True), MadeUpLoader)
    assert rest["weights_sha256"] == summary["weights_sha256"]
    found = evaluate_run(Path(summary["run"]), batch_size=BATCH, device="cpu", open_loader=MadeUpLoader, **NAMED)
    assert (found["top1_error"], found["loss"]) == (summary["val_top1_error"], summary["val_loss"])


def keeping(buffer: str, step: str = "pass", more: str = "") -> None:
    """A network with a buffer, what its forward pass does with it, and more methods, in keeping.py."""
    code = "import torch\nfrom torch import nn\nclass make(nn.Module):\n  def __init__(self, classes, crop):\n"
    code += f"    super().__init__()\n    self.out = nn.Linear(3 * crop * crop, classes)\n    {buffer}\n{more}\n"
    code += f"  def forward(self, images):\n    words = images.flatten(1) / 64\n    {step}\n    return self.out(words)"
    Path("keeping.py").write_text(code)


def test_what_a_checkpoint_would_not_hold_is_refused(here: Path) -> None:
    """But a buffer that stays as it is need not be saved."""
    buffer = "self.register_buffer('mean', torch.zeros(()), persistent=False)"
    keeping(buffer, "self.mean += 0.1 * words.detach().mean() * self.training; words = words - self.mean")
    words = "training changes the buffer mean, which no checkpoint would hold: .*without persistent=False"
    check_refused(words, model="keeping.py")
    more = "  def get_extra_state(self): return torch.tensor(self.seen)\n  def set_extra_state(self, state): pass"
    keeping("self.seen = 0", "self.seen += 1", more)
    words = r"state_dict\(\) holds _extra_state, which is neither a parameter nor a buffer.*register_buffer"
    check_refused(words, model="keeping.py")
    mask = "self.register_buffer('mask', torch.tensor([float('nan'), -float('inf'), 1.0]), persistent=False); "
    keeping(mask + "self.register_buffer('seen', torch.zeros((), dtype=torch.int64))", "self.seen += 1")
    assert begun(model="keeping.py").recipe.epochs == 3


def test_a_mask_of_infinities_is_trained_and_saved(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As causal attention has one. Another run may begin with it, and NaN elsewhere is still found."""
    mask = "self.register_buffer('mask', torch.full((crop, crop), -float('inf')).triu(1))"
    keeping(mask, "words = words + self.mask.exp().sum() / 1e6")
    train(config(model="keeping.py", name="whole", steps=1), MadeUpLoader)
    assert train(config(model="keeping.py", name="whole", resume=True, steps=2), MadeUpLoader)["steps"] == 2
    assert train(config(model="keeping.py", name="tuned", init_from="whole", steps=1), MadeUpLoader)["steps"] == 1

    monkeypatch.setattr("alexprep.train.nonfinite.SECONDS", 0.0)
    with pytest.raises(AlexprepError, match=r"now out.weight, out.bias are not finite"):
        train(
            config(model="keeping.py", name="wild"), made_up.changed(lambda _, images: images * math.nan, MadeUpLoader)
        )


# What a run remembers.


def test_another_network_is_refused_and_a_comment_is_not(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path(train(config(steps=1), MadeUpLoader)["run"])
    nets = here / "nets.py"
    nets.write_text(f"# A comment.\n{NETS}")
    assert train(config(resume=True, steps=2), MadeUpLoader)["steps"] == 2

    def check_other(old: str, new: str, words: str) -> None:
        nets.write_text(NETS.replace(old, new))
        with pytest.raises(AlexprepError, match=words):
            train(config(resume=True, steps=3), MadeUpLoader)
        with pytest.raises(AlexprepError, match=words):
            open_net(Place(run), CPU, **NAMED)

    settings = r"layers.drop.settings was 'p=0.2, inplace=False', is now "
    shapes = "layers.dead.tensors was 'weight 2x2, bias 2', is now 'weight 3x2, bias 3'"
    check_other("nn.Dropout(0.2)", "nn.Dropout(0.3)", settings + "'p=0.3")
    check_other("nn.Linear(2, 2)", "nn.Linear(2, 3)", shapes)
    check_other("self.drop", "self.more", "layers.more was None, is now {'kind': 'Dropout'")
    check_other(
        "make = Net", "Net.__qualname__ = 'Other'\nmake = Net", "factory was 'recipe:Net', is now 'recipe:Other'"
    )
    # Another torch may describe layers in other words, as it did when batch normalisation got a `bias`: names and shapes still count.
    monkeypatch.setattr(nn.Dropout, "extra_repr", lambda layer: f"probability={layer.p}")
    check_other("", "", settings + "'probability=0.2'")
    newer = versions("torch") | {"torch": "99.0"}
    monkeypatch.setattr("alexprep.shards.dataset_format.versions", lambda *names: newer)
    assert train(config(resume=True, steps=2), MadeUpLoader)["steps"] == 2
    assert open_net(Place(run), CPU, **NAMED).step == 2
    check_other("nn.Linear(2, 2)", "nn.Linear(2, 3)", shapes)


def test_code_is_run_only_where_it_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json says where it was; the files may have moved, and a stranger's run cannot start anything by itself."""
    summary = train(config(model="nets.py:make", steps=1), MadeUpLoader)
    run = (here / summary["run"]).resolve()
    options = json.loads((run / "config.json").read_text())["options"]
    assert (options["recipe"], options["model"]) == (str(here / "recipe.py"), f"{here / 'nets.py'}:make")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    for name in ("nets.py", "recipe.py"):
        (here / name).rename(here / "elsewhere" / name)
    going_on: dict[str, Any] = {"data": here / "data", "runs": here / "runs", "resume": True, "steps": 3}
    for unnamed, other in (("recipe", "model"), ("model", "recipe")):
        named: dict[str, Any] = {other: NAMED[other], unnamed: None}
        words = f"{re.escape(f'{run} was trained with --{unnamed} {here}')}.*only run where you name it"
        with pytest.raises(AlexprepError, match=words):
            train(config(**going_on, **named), MadeUpLoader)
        with pytest.raises(AlexprepError, match=words):
            evaluate_run(run, **named, device="cpu", open_loader=MadeUpLoader)
    assert train(config(**going_on, **NAMED), MadeUpLoader)["steps"] == 3
    assert evaluate_run(run, **NAMED, device="cpu", open_loader=MadeUpLoader)["step"] == 3


# The recipe.


def test_a_recipe_file(here: Path) -> None:
    assert begun().run.name == "small"
    assert begun(recipe="recipe.py:recipe", batch_size=4).recipe.batch_size == 4
    (here / "recipe.py").write_text(f"{RECIPE}\ndef longer():\n    return recipe(epochs=7, name='longer')")
    job = begun(recipe="recipe.py:longer")
    assert (job.recipe.epochs, job.run.name) == (7, "longer")
    assert job.identity["recipe"]["network"] == {"factory": "recipe:Net"}
    code = "from alexprep.train.recipes import RECIPES, replace\n"
    (here / "plain.py").write_text(code + "def recipe():\n    return replace(RECIPES['alexnet'], epochs=5)")
    assert user_recipe("plain.py") == replace(RECIPES["alexnet"], epochs=5)  # alexprep's own network, as it is


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("def recipe(**changes):", "def recipe(depth):", "TypeError: recipe.. missing 1 required positional argument"),
        ("    return Recipe(", "    return dict(", "gives a dict, not an alexprep.train.Recipe"),
        ("epochs=3", "epochs=0", r"recipe.py, line 9: recipe small: epochs 0 is not in \[1, 100000\]"),
        ("network=make", "network=make(3)", "its network: it is a Net, not a function"),
        ("network=make", "network=None", "its network: it is a NoneType, not a function"),
        ("Steps(after=(9,))", "object()", "must be JSON values and frozen dataclasses: TypeError"),
        ("lr=0.01", "lr=make", r"lr <class .* is not a number in \[0, 100\]"),
        ('name="small"', 'name="../small"', "'../small' cannot name a run"),
        ('name="small"', 'name="small", layer_decay={"fc9": 0.1}', "layer_decay names fc9, which the network does not"),
        ('name="small"', 'name="small", width=0.5', "unexpected keyword argument 'width'"),
        ("schedule=Steps(after=(9,))", "schedule=ByHand(((1, 'fc9.*', 0.1),))", "schedule names fc9"),
    ],
)
def test_mistakes_in_recipe_files(here: Path, old: str, new: str, words: str) -> None:
    changed = RECIPE.replace("import Steps", "import ByHand, Steps").replace(old, new)
    assert changed != RECIPE
    (here / "recipe.py").write_text(changed)
    check_refused(words)


# Several ranks.


@pytest.mark.parametrize(
    ("old", "new", "scheme", "words"),
    [
        ("nn.GroupNorm(2, 8)", "nn.BatchNorm2d(8)", "ddp", "on 2 ranks: norm normalises over the images of a rank"),
        ("nn.GroupNorm(2, 8)", TRACKING, "ddp", "its own norm.running_mean, norm.running_var"),
        ("nn.GroupNorm(2, 8)", "nn.Dropout2d()", "ddp", r"its own random numbers \(those of nn.Dropout are shared"),
        ("", "", "towers", "towers needs an nn.Sequential, not Net: use ddp"),
        (
            "maps.flatten(2)",
            "maps.reshape(len(maps), 8, -1)",
            "ddp",
            "on an empty batch, .*line .*Error: cannot reshape",
        ),
    ],
)
def test_what_ranks_cannot_share_is_refused(here: Path, old: str, new: str, scheme: str, words: str) -> None:
    (here / "nets.py").write_text(SHARED.replace(old, new))
    check_refused(words, ranks=2, scheme=scheme)


def test_two_ranks_train_as_one(data: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From another folder, with a layer that has no gradient and a frozen weight; 13 images on two ranks do not divide."""
    (here / "nets.py").write_text(SHARED.replace("(images * ", "(images[..., ::8, ::8] * "))
    settings: dict[str, Any] = {"data": data, "recipe": "tiny", "model": "nets.py:make", "batch_size": 13, "steps": 2}
    runs = [launch_training(config(**settings, ranks=ranks, name=f"ranks{ranks}")) for ranks in (1, 2)]
    weights = [load_file(max(Path(run["run"]).glob("checkpoints/*.safetensors"))) for run in runs]
    assert "tiny on 2 ranks (ddp)" in capfd.readouterr().err  # towers are for the paper's nets
    for name, tensor in weights[0].items():
        if not name.startswith("random"):
            torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_the_pages_example_has_ten_lines() -> None:
    """Its commands, also for the residual example, are run by test_docs."""
    code = (ROOT / "docs/examples/own_nets/ten_lines.py").read_text()
    assert f"```python\n{code}```" in (ROOT / "docs/own-nets.md").read_text()
    assert len([line for line in code.splitlines() if line and not line.lstrip().startswith('"""')]) <= 10
