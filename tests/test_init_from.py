"""A network that begins with another's weights: what is taken, what is not, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.checkpoint import Checkpoint, init_from, saved_weights
from alexprep.train.models.alexnet import AlexNet, alexnet_6conv, alexnet_2012
from alexprep.train.training_state import weights_digest

ALL = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]


def narrow(design: AlexNet, classes: int, seed: int) -> nn.Sequential:
    """With random biases: those that networks begin with are constants, equal in all of them."""
    network = design(classes, 67, seed=seed, width=0.0625)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(generator=generator)
    return network


def equal_layers(one: nn.Module, other: dict[str, torch.Tensor]) -> list[str]:
    """The layers of which every tensor is the same."""
    tensors = one.state_dict()
    layers = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return [
        layer
        for layer in layers
        if all(
            other.get(name) is not None and torch.equal(tensor, other[name])
            for name, tensor in tensors.items()
            if name.rpartition(".")[0] == layer
        )
    ]


def test_fine_tuning_takes_all_but_the_classes() -> None:
    """As net #146 went from 21,843 classes to 1,000."""
    saved, network = narrow(alexnet_6conv, 9, seed=1).state_dict(), narrow(alexnet_6conv, 4, seed=2)
    fresh = network.get_parameter("fc8.weight").clone()
    report = init_from(network.state_dict(), saved)
    assert report.taken == [*ALL[:5], "conv6", "fc6", "fc7"] == equal_layers(network, saved)
    assert report.fresh == {"fc8": "saved 9x256, here 4x256"}
    assert report.unused == []
    assert torch.equal(network.get_parameter("fc8.weight"), fresh)
    assert report.sentences()[1] == "fc8 begins fresh: saved 9x256, here 4x256"


def test_a_layer_more_or_less() -> None:
    """As net #146 began with the convolutions of #145."""
    saved, network = narrow(alexnet_2012, 4, seed=1).state_dict(), narrow(alexnet_6conv, 4, seed=2)
    report = init_from(network.state_dict(), saved, ["conv[1-5]"])
    assert report.taken == ALL[:5] == equal_layers(network, saved)
    assert report.fresh == dict.fromkeys(("conv6", "fc6", "fc7", "fc8"), "not asked for")
    back = init_from(narrow(alexnet_2012, 4, seed=3).state_dict(), network.state_dict())
    assert (back.taken, back.fresh, back.unused) == (ALL, {}, ["conv6"])
    assert back.sentences()[-1] == "saved, but not in this network: conv6"
    assert init_from(network.state_dict(), saved).fresh == {"conv6": "not saved"}


def test_weights_come_out_of_a_checkpoint() -> None:
    saved = narrow(alexnet_2012, 4, seed=1).state_dict()
    tensors = {f"weight.{name}": tensor for name, tensor in saved.items()} | {"velocity.000": torch.ones(3)}
    found = saved_weights(Checkpoint(7, tensors, {}))
    assert found.keys() == saved.keys()
    network = narrow(alexnet_2012, 4, seed=2)
    assert init_from(network.state_dict(), found).taken == ALL == equal_layers(network, saved)


def test_taken_weights_are_copies() -> None:
    saved, network = narrow(alexnet_2012, 4, seed=1).state_dict(), narrow(alexnet_2012, 4, seed=2)
    init_from(network.state_dict(), saved)
    with torch.no_grad():
        network.get_parameter("fc8.weight").zero_()
    assert saved["fc8.weight"].abs().sum() > 0
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["conv*", "fc8"], "fc8: saved 9x256, here 4x256"),
        (["conv*", "conv9"], "conv9 matches no layer"),
        (["conv6"], "conv6: not saved"),
        ([], "do not fit"),
    ],
)
def test_a_choice_that_cannot_be_had_is_refused(layers: list[str], message: str) -> None:
    saved, network = narrow(alexnet_2012, 9, seed=1).state_dict(), narrow(alexnet_6conv, 4, seed=2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(AlexprepError, match=message):
        init_from(network.state_dict(), saved, layers)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_strangers_and_spoilt_weights_are_refused() -> None:
    network = narrow(alexnet_2012, 4, seed=2)
    with pytest.raises(AlexprepError, match="do not fit"):
        init_from(network.state_dict(), {"stem.weight": torch.ones(3)})
    saved = narrow(alexnet_2012, 4, seed=1).state_dict()
    saved["fc7.bias"][0] = float("nan")
    before = network.get_parameter("conv1.weight").clone()
    with pytest.raises(AlexprepError, match="NaN"):
        init_from(network.state_dict(), saved)
    assert torch.equal(network.get_parameter("conv1.weight"), before)


def test_a_layer_without_its_bias_is_not_taken_in_part() -> None:
    saved = {"0.weight": torch.ones(2, 2)}
    with pytest.raises(AlexprepError, match="saved weight, here weight, bias"):
        init_from(nn.Sequential(nn.Linear(2, 2)).state_dict(), saved)


def test_weights_of_the_network_itself_can_be_begun_with() -> None:
    saved = {"scale": torch.ones(1), "fc.weight": torch.ones(2, 2)}
    weights = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    assert init_from(weights, saved, ["scale"]).taken == ["scale"]
    assert (float(weights["scale"]), float(weights["fc.weight"].sum())) == (1, 0)


def test_digests_of_every_type_of_tensor() -> None:
    values = torch.tensor([1.0, 2.0])
    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
    digests = {weights_digest({"x": values.to(kind)}) for kind in kinds}
    assert len(digests | {weights_digest({"x": values[0]}), weights_digest({"x": values[:1]})}) == 6
