"""cuda-convnet's layer files: equal to our own nets, malformed ones refused with the line, trained and gone on with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.layer_files import NEURONS, LayerGraph, Neuron, layer_file
from alexprep.train.models.alexnet import alexnet_2012
from alexprep.train.models.cifar import cifar10_quick_net, conv_local_11pct, conv_local_13pct
from alexprep.train.recipes import RECIPES, try_user_network, with_network
from alexprep.train.trainer import train
from alexprep.train.user_code import UserNetwork, user_network
from tests import layer_texts as texts
from tests.made_up import MadeUpLoader, write_data
from tests.training_ranks import small_config

Factory = Callable[..., nn.Module]


def written(folder: Path, definition: str, parameters: str, name: str = "x") -> Path:
    """Both files; the path of the first."""
    (folder / f"layer-params-{name}.cfg").write_text(parameters)
    (folder / f"layers-{name}.cfg").write_text(definition)
    return folder / f"layers-{name}.cfg"


def equal_logits(one: nn.Module, other: nn.Module, side: int) -> None:
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 64
    with torch.no_grad():
        wanted, found = (network.double().eval()(images) for network in (one, other))
    assert wanted.abs().max() > 1e-3
    assert (wanted - found).abs().max() <= 1e-12 * wanted.abs().max()


@pytest.mark.parametrize(
    ("files", "own", "crop", "recipe"),
    [
        (texts.quick(), cifar10_quick_net, 32, "cifar10-quick"),
        (texts.conv_local(norm=False), conv_local_13pct, 24, "cifar10-13pct"),
        (texts.conv_local(norm=True), conv_local_11pct, 24, "cifar10-11pct"),
    ],
    ids=["quick", "13pct", "11pct"],
)
def test_the_nets_for_cifar_are_ours(
    files: tuple[str, str], own: Factory, crop: int, recipe: str, tmp_path: Path
) -> None:
    """Logits, initial weights of a seed, and what the recipe says of rates and decays, under the layers' names there."""
    factory = layer_file(str(written(tmp_path, *files)))
    ours, theirs = own(10, crop, seed=3), factory(10, crop, seed=3)
    assert isinstance(theirs, nn.Sequential)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
        mine.data.mul_(20 if mine.abs().max() < 0.01 else 1)
        other.data.copy_(mine)
    equal_logits(ours, theirs, crop)
    told, wanted = factory.training(), RECIPES[recipe]
    assert told["loss"] == "softmax" and (told["lr"], told["bias_lr_factor"], told["momentum"]) == (0.001, 2, 0.9)
    layers = [name.removesuffix(".weight") for name, _ in ours.named_parameters() if name.endswith("weight")]
    decays = [wanted.layer_decay.get(name, wanted.decay) for name in layers]
    assert list(told["layer_decay"].values()) == decays


def test_net_145_is_ours(tmp_path: Path) -> None:
    """Its towers are the two halves of our groups; every width an eighth, so that it takes no second."""
    theirs = layer_file(str(written(tmp_path, *texts.net_145(8, 7))))(7, 67, seed=1)
    assert isinstance(theirs, LayerGraph)
    ours = alexnet_2012(7, 67, seed=2, width=1 / 8)
    given = dict(theirs.named_parameters())
    generator = torch.Generator().manual_seed(3)
    for name, weight in ours.named_parameters():
        weight.data.normal_(0, 2 * weight[0].numel() ** -0.5, generator=generator)
        layer, _, kind = name.partition(".")
        if layer == "fc8":
            given.pop(name).data.copy_(weight)
        else:
            first, second = weight.chunk(2)
            given.pop(f"{layer}a.{kind}").data.copy_(first)
            given.pop(f"{layer}b.{kind}").data.copy_(second)
    assert not given
    equal_logits(ours, theirs, 67)
    theirs.train()
    torch.manual_seed(4)
    assert not torch.equal(*(theirs.double()(torch.ones(1, 3, 67, 67, dtype=torch.float64)) for _ in range(2)))


GOOD, GOOD_PARAMETERS = texts.quick()
LINE = {text: number for number, text in reversed(list(enumerate(GOOD.splitlines(), 1)))}
MALFORMED = [
    ("[conv1]", "[conv1", LINE["[conv1]"], "'[conv1' is not [NAME], a name without dots"),
    ("[conv2]", "[conv1]", LINE["[conv2]"], f"[conv1] stands in line {LINE['[conv1]']}, too"),
    ("[data]\n", "", 1, "'type=data' stands before the first [NAME]"),
    ("filters=32", "filters 32", LINE["filters=32"], "'filters 32' is neither [NAME] nor KEY=VALUE"),
    ("filters=32", "filters=many", LINE["filters=32"], "[conv1] filters=many is not a whole number"),
    ("filters=32\n", "", LINE["[conv1]"], "[conv1] has no filters, which it needs"),
    (
        "filterSize=5",
        "filterSize=99",
        LINE["filterSize=5"],
        "[conv1] filterSize=99 is more than its input has, 32 pixels",
    ),
    ("inputs=pool1", "inputs=pool9", LINE["inputs=pool1"], "[conv2] inputs: pool9 is not defined before it"),
    ("channels=32", "channels=31", LINE["channels=32"], "[conv2] channels=31, and its inputs have 32"),
    ("neuron=relu", "neuron=tanh[1]", LINE["neuron=relu"], "neuron=tanh[1]: tanh takes 2 numbers, as NAME[A,B]"),
    ("neuron=relu", "neuron=brelu[inf]", LINE["neuron=relu"], "neuron=brelu[inf]: brelu takes 1 numbers"),
    ("neuron=relu", "neuron=relux", LINE["neuron=relu"], "[pool1] neuron=relux: alexprep has ident, relu, "),
    ("outputs=10", "outputs=11", LINE["outputs=10"], "[fc10] has 11 outputs, and the data has 10 classes"),
    (
        "type=cost.logreg",
        "type=cost.sum2",
        LINE["type=cost.logreg"],
        "alexprep trains with cost.logreg, cost.crossent, ",
    ),
    ("pool=avg", "pool=median", LINE["pool=avg"], "[pool2] pool=median: alexprep has max, avg, rand"),
    ("initW=0.1", "weightSource=fc10", LINE["initW=0.1"], "alexprep has no layers that share their weights"),
    ("initW=0.1", "initWFunc=a.b()", LINE["initW=0.1"], "code that a layer file names is not run"),
    ("type=softmax", "type=eltmax", LINE["type=softmax"], "type=eltmax: alexprep has no such layer, it reads conv, "),
    ("stride=1\n", "strode=1\n", LINE["stride=1"], "[conv1] strode: alexprep has no such key for type=conv"),
    ("sharedBiases=1", "sharedBiases=0", LINE["sharedBiases=1"], "sharedBiases=0: alexprep has no such layer"),
    ("dataIdx=1", "dataIdx=0", LINE["dataIdx=1"], "[labels] dataIdx=0 is given by another layer already"),
    ("[pool2]", "[training]", LINE["[pool2]"], "[training] the name training is taken: give the layer another"),
    ("sizeX=3", "sizeX=1", LINE["stride=2"], "[pool1] stride=2 is not within 1 to 1"),
    ("outputs=10", "outputs=9999999", LINE["outputs=10"], "outputs=9,999,999 is not within 1 to 1,048,576"),
]


@pytest.mark.parametrize(("good", "bad", "line", "reason"), MALFORMED, ids=[each[1] or each[0] for each in MALFORMED])
def test_malformed_files_are_refused_with_the_line(good: str, bad: str, line: int, reason: str, tmp_path: Path) -> None:
    path = written(tmp_path, GOOD.replace(good, bad, 1), GOOD_PARAMETERS)
    with pytest.raises(AlexprepError) as caught:
        layer_file(str(path))(10, 32)
    assert str(caught.value).startswith(f"{path}, line {line}: ") and reason in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("change", "line", "reason"),
    [
        (lambda text: text.replace("epsW=0.001", "epsW=fast", 1), 2, "[conv1] epsW=fast is not a number"),
        (lambda text: text.replace("epsW=0.001", "epsW=0.002", 1), 9, "[conv2] epsW=0.001, and [conv1] has 0.002"),
        (lambda text: "[conv7]\n" + text, 1, "[conv7] is no layer of "),
        (lambda text: text.replace("wc=0.004", "filters=3", 1), 6, "[conv1] filters stands in "),
        (lambda text: text.replace("wc=0.004", "wball=1", 1), 6, "[conv1] wball=1 is not within 0 to 0"),
        (lambda text: text.replace("wc=0.004", "updatePeriod=4", 1), 6, "[conv1] updatePeriod=4 is not within 0 to 1"),
        (lambda text: text.replace("coeff=1", "coeff=2"), 37, "alexprep has costs with a coefficient of 1"),
    ],
)
def test_malformed_parameters_too(change: Callable[[str], str], line: int, reason: str, tmp_path: Path) -> None:
    path = written(tmp_path, GOOD, change(GOOD_PARAMETERS))
    with pytest.raises(AlexprepError) as caught:
        made = layer_file(str(path))
        made.training()
        made(10, 32)
    said = f"{path.parent / 'layer-params-x.cfg'}, line {line}: "
    assert str(caught.value).startswith(said) and reason in str(caught.value), caught.value


def test_files_that_are_no_layer_files(tmp_path: Path) -> None:
    with pytest.raises(AlexprepError, match=r"there is no file .*layers-x\.cfg: name both with --model"):
        layer_file(str(tmp_path / "layers-x.cfg"))
    path = written(tmp_path, GOOD, "")
    path.write_bytes(GOOD.encode() + b"\n\xff\n")
    with pytest.raises(AlexprepError, match=f"line {len(GOOD.splitlines()) + 2}: no text in UTF-8"):
        layer_file(str(path))
    path.write_text("# nothing\n")
    with pytest.raises(AlexprepError, match="line 1: there is no layer"):
        layer_file(str(path))
    with pytest.raises(AlexprepError, match="says how wide its layers are: leave out width=2"):
        layer_file(str(written(tmp_path, GOOD, "")))(10, 32, width=2)
    path.write_bytes(b"#" * (2 << 20))
    with pytest.raises(AlexprepError, match="more than 1,048,576 bytes"):
        layer_file(str(path))


def test_other_layers(tmp_path: Path) -> None:
    """Groups, strides over the edge, a norm within maps, dropouts of cuda-convnet2, a cost of logistic units."""
    text = texts.DATA + texts.conv("conv1", "data", "3", 8, 5, 0.1, padding=1, stride=3, neuron="tanh[1.7159,0.6667]")
    text += texts.conv("conv2", "conv1", "8", 8, 3, 0.1, padding=1, groups=2, neuron="brelu[3]")
    text += texts.layer("norm2", "rnorm", "conv2", channels=8, size=3) + texts.pool("pool2", "norm2", "rand")
    text += texts.layer("drop2", "dropout", "pool2", keep=0.75) + texts.layer("act", "neuron", "drop2", neuron="abs")
    text += texts.layer("fc3", "fc", "act", outputs=5, neuron="logistic")
    text += texts.layer("cost", "cost.bce", "labels,fc3")
    made = layer_file(str(written(tmp_path, text, "[norm2]\nscale=0.9\npow=0.5\n[fc3]\ndropout=0.25\n")))
    with pytest.raises(AlexprepError, match="must end in neuron=logistic"):
        made(5, 14)
    made = layer_file(str(written(tmp_path, text, "[norm2]\nscale=0.9\npow=0.5\n")))
    assert made.training()["loss"] == "sigmoid"
    network = made(5, 14, seed=1).eval()
    assert isinstance(network, nn.Sequential)
    kinds = [type(layer).__name__ for layer in network]
    assert kinds[:4] == ["ZeroPad2d", "Conv2d", "Neuron", "Conv2d"] and kinds[-1] == "Linear"
    images = torch.randn(2, 3, 14, 14)
    with torch.no_grad():
        whole = nn.functional.pad(
            images, (1, 2, 1, 2)
        )  # of five filters, 5 wide every 3 pixels, the last hangs over by 1
        conv = network.get_submodule("conv1")
        first = nn.functional.conv2d(whole, conv.get_parameter("weight"), conv.get_parameter("bias"), stride=3)
        assert torch.allclose(network[:3](images), 1.7159 * torch.tanh(0.6667 * first), atol=1e-6)
        assert network(images).shape == (2, 5)
    for name, (count, function) in NEURONS.items():
        numbers = (1.5, 0.5)[:count]
        values = torch.linspace(0.1, 3, 7)
        assert torch.equal(Neuron(name, numbers)(values), function(values, *numbers))
        assert len(function(values, *numbers)) == 7


def test_a_linear_layer_sees_maps_and_numbers_side_by_side(tmp_path: Path) -> None:
    text = texts.DATA + texts.conv("conv1", "data", "3", 4, 3, 0.1, stride=3)
    text += texts.layer("fc2", "fc", "data", outputs=6) + texts.layer("fc3", "fc", "conv1,fc2", outputs=5)
    network = layer_file(str(written(tmp_path, text + texts.COST.format(last="fc3"), "")))(5, 9)
    images = torch.randn(2, 3, 9, 9)
    conv1, fc2, fc3 = (network.get_submodule(name) for name in ("conv1", "fc2", "fc3"))
    seen = torch.cat([conv1(images).flatten(1), fc2(images.flatten(1))], dim=1)
    assert torch.equal(network(images), fc3(seen)) and seen.shape == (2, 4 * 9 + 6)


def test_what_changes_no_result_is_passed_over(tmp_path: Path) -> None:
    """Lines of cuda-convnet2's own files, and its cross-entropy with vectors of labels, which is that of the softmax."""
    more = GOOD_PARAMETERS.replace("wc=0.004", "wc=0.004\nwball=0.00\nupdatePeriod=1", 1) + "topk=5\n"
    wanted = layer_file(str(written(tmp_path, GOOD, GOOD_PARAMETERS)))(10, 32, seed=1)
    made = layer_file(str(written(tmp_path, GOOD.replace("cost.logreg", "cost.crossent"), more)))
    assert made.training()["loss"] == "softmax"
    equal_logits(wanted, made(10, 32, seed=1), 32)


def test_a_layer_file_is_trained_as_it_says_and_gone_on_with(tmp_path: Path) -> None:
    """Its rates and decays are the recipe's; a bare --resume finds it; another file in its place is refused."""
    text, parameters = texts.quick()
    path = written(
        tmp_path,
        text.replace("outputs=10", "outputs=3").replace("filters=32", "filters=4").replace("channels=32", "channels=4"),
        parameters,
    )
    made = with_network(RECIPES["cifar10-quick"], user_network(str(path)))
    assert (made.lr, made.layer_decay["fc64"], made.decay) == (0.001, 0.03, 0.0)
    assert isinstance(made.network, UserNetwork)
    _, _, notes = try_user_network(replace(made, lr=0.5), made.network, 3, 0, "single", 1)
    assert notes[1].startswith("as layer-file/layers-x has it: loss softmax, bias_lr_factor ")
    data = write_data(tmp_path / "data", Little)
    options: dict[str, Any] = {"recipe": "cifar10-quick", "data": data, "model": str(path), "batch_size": 4}
    whole = train(small_config(**options, name="whole", steps=4), Little)
    train(small_config(**options, name="cut", steps=2), Little)
    again: dict[str, Any] = {"data": data, "recipe": None, "name": "cut", "steps": 4, "resume": True}
    assert train(small_config(**again), Little)["weights_sha256"] == whole["weights_sha256"]
    path.write_text(path.read_text().replace("pool=avg", "pool=max", 1))
    with pytest.raises(AlexprepError, match="layers_sha256 was"):
        train(small_config(**{**again, "steps": 6}), Little)
    with pytest.raises(AlexprepError, match=r"line 87: \[fc10\] has 3 outputs, and the data has 5 classes"):
        layer_file(str(path))(5, 32)


class Little(MadeUpLoader):
    side, training, others = 32, 16, 8
