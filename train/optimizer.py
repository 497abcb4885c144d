"""The paper's update rule, section 5, as a torch optimizer; torch's own ones in the same form; and groups of parameters.

What the rates are at a time is a schedule's to say (`alexprep.train.lr_schedule`); `Recipe.make_optimizer` puts both together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from alexprep.shards.errors import AlexprepError
from alexprep.train.field_values import PAPER
from alexprep.train.models import cuda_kernels
from alexprep.train.models.layers import LocallyConnected2d

SLOT = "optimizer."  # and the name that torch's optimizers give to a tensor of their state
BY_ELEMENT = {
    *(PAPER, "sgd", "nesterov", "adamw", "SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam"),
    *("RMSprop", "Rprop", "Adagrad", "Adadelta", "ASGD"),
}
NOT_BY_GRADIENTS_ALONE = {"LBFGS", "SparseAdam"}  # they need the loss anew, or sparse gradients
VELOCITY, RATE = "velocity", "rate"  # of a parameter's state: the second is the rate at which the first last moved


class MomentumSGD(Optimizer):
    """v <- momentum · v - decay · lr · w - lr · gradient, then w <- w + v: section 5.

    The learning rate is inside the velocity. `torch.optim.SGD` keeps it outside, so a lower rate there shrinks the whole running step at
    once, here only what is added from now on. At a constant rate the two agree.

    At a rate of 0 the rule would still carry a weight on by its velocity. Here, as in the 2012 code (src/weights.cu), such a weight is
    frozen: neither it nor its velocity changes, and when the rate is raised again it goes on with the velocity that it had.

    With `momentum_correction` a velocity is multiplied by the new rate over the old one where the rate changes, before it is used
    (Goyal et al. 2017, "Accurate, large minibatch SGD", section 3): what was added to it at another rate counts as if it had been added
    at this one. That is `torch.optim.SGD`, at every rate. Without, as in the paper and its code, a rate divided by 10 leaves a
    velocity ten times too large, which takes some twenty steps to die away.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = MomentumSGD([{"params": [weight]}], lr=0.5, decay=0.0)
    >>> weight.grad = torch.tensor([0.25])
    >>> optimizer.step()
    >>> weight.tolist()
    [0.875]
    """

    # torch wraps these so that its compiler leaves them alone, and imports the compiler for that: a second of every process's start.
    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        decay: float = 0.0005,
        momentum_correction: bool = False,
    ) -> None:
        """Groups of parameters and their rates; momentum and decay are the paper's by default.

        Args:
            groups: dictionaries of `params`, and optionally of `names` of these, `lr_factor` (times the rate) and `decay`; see
                `parameter_groups`.
            lr: the learning rate of all parameters, times their group's `lr_factor`, until `set_rates` sets others.
            momentum: at least 0, below 1.
            decay: weight decay of the groups that name none.
            momentum_correction: whether velocities follow a change of the rate.
        """
        self.momentum_correction = momentum_correction
        super().__init__(groups, {"momentum": momentum, "decay": decay, "lr_factor": 1.0})
        for group in self.param_groups:
            group["rates"] = [lr * group["lr_factor"]] * len(group["params"])

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Sets the rate of every parameter by its name, whatever its group's `lr_factor`; all have names.

        Raises:
            AlexprepError: a rate is negative or not a number, or a parameter has none.
        """
        if wrong := [rate for rate in rates.values() if not rate >= 0]:
            raise AlexprepError(f"the learning rate is {wrong[0]}, it must be 0 or more")
        for group in self.param_groups:
            if missing := [name for name in group["names"] if name not in rates]:
                raise AlexprepError(f"there is no learning rate for {', '.join(missing)}")
            group["rates"] = [rates[name] for name in group["names"]]

    def velocities(self) -> list[torch.Tensor]:
        """The velocity of every parameter, in the order of the groups; zeros before the first step. They are the live tensors."""
        return [self._velocity(weight) for weight in self.weights()]

    def slots(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """What a checkpoint holds of it: a name, the parameter's number in the order of the groups, and the live tensor."""
        return ((VELOCITY, number, velocity) for number, velocity in enumerate(self.velocities()))

    def make_slot(self, name: str, number: int, like: torch.Tensor) -> torch.Tensor:
        """The live tensor of a name and a number that `slots` gave."""
        return self._velocity(self.weights()[number])

    def velocity_rates(self) -> list[float | None]:
        """The rate at which each velocity last moved, in the order of the groups; None where it has not, or where none is kept.

        With the velocities it is the whole state, where `momentum_correction` is on; without, they alone are.
        """
        return [self.state[weight].get(RATE) for weight in self.weights()]

    def set_velocity_rates(self, rates: Sequence[float | None]) -> None:
        """Takes back what `velocity_rates` gave."""
        for weight, rate in zip(self.weights(), rates, strict=True):
            self.state[weight][RATE] = rate

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient and a rate above 0."""
        for group in self.param_groups:
            alike: dict[tuple[float, float], list[torch.Tensor]] = {}
            for weight, rate in zip(group["params"], group["rates"], strict=True):
                if weight.grad is not None and rate > 0:
                    alike.setdefault((rate, self._follow(weight, rate)), []).append(weight)
            for (lr, ratio), weights in alike.items():
                velocities = [self._velocity(weight) for weight in weights]
                if self._in_one_pass(weights, velocities, group["momentum"] * ratio, group["decay"] * lr, lr):
                    continue
                # One call for all of them, not one a tensor.
                torch._foreach_mul_(velocities, group["momentum"] * ratio)
                if group["decay"]:
                    torch._foreach_add_(velocities, weights, alpha=-group["decay"] * lr)
                torch._foreach_add_(velocities, [cast(torch.Tensor, weight.grad) for weight in weights], alpha=-lr)
                torch._foreach_add_(weights, velocities)

    @staticmethod
    def _in_one_pass(
        weights: list[torch.Tensor], velocities: list[torch.Tensor], keep: float, decay: float, rate: float
    ) -> bool:
        """Moves weights that lie on a GPU, each read and written once, which takes half the time; False where that cannot be done."""
        gradients = [cast(torch.Tensor, weight.grad) for weight in weights]
        moved = [*zip(weights, velocities, gradients, strict=True)]
        if not cuda_kernels.HERE or not all(cuda_kernels.alike(*tensors) for tensors in moved):
            return False
        for tensors in moved:
            cuda_kernels.move(*tensors, keep, decay, rate)
        return True

    def weights(self) -> list[torch.Tensor]:
        """All parameters, in the order of the groups."""
        return [weight for group in self.param_groups for weight in group["params"]]

    def _follow(self, weight: torch.Tensor, rate: float) -> float:
        """What a velocity is to be multiplied by as its parameter's rate becomes `rate`, which is noted."""
        if not self.momentum_correction:
            return 1.0
        before, self.state[weight][RATE] = self.state[weight].get(RATE), rate
        return 1.0 if before is None else rate / before

    def _velocity(self, weight: torch.Tensor) -> torch.Tensor:
        state = self.state[weight]
        if VELOCITY not in state:
            state[VELOCITY] = torch.zeros_like(weight)
        return cast(torch.Tensor, state[VELOCITY])


class TorchRule:
    """One of torch's optimizers in the form of `MomentumSGD`: a rate for every parameter, and a state that a checkpoint can hold.

    A parameter whose rate is 0 is frozen: neither it nor its state changes.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> rule = TorchRule("sgd", [{"params": [weight], "names": ["w"], "decay": 0.0}], lr=0.5, momentum=0.9)
    >>> weight.grad = torch.tensor([0.25])
    >>> rule.step()
    >>> weight.tolist()
    [0.875]
    """

    def __init__(
        self,
        name: str,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Groups as `parameter_groups` makes them.

        Args:
            name: see `torch_class`.
            groups: dictionaries of `params`, `names`, `decay` (the optimizer's own weight decay) and `lr_factor`.
            lr: the rate of all parameters until `set_rates` sets others.
            momentum: of "sgd" and "nesterov".
            options: further arguments of torch's class, such as {"betas": (0.9, 0.95)}.

        Raises:
            AlexprepError: torch's class does not take them.
        """
        kind, own = torch_class(name, momentum)
        self._groups = groups
        made = [
            {"params": group["params"], "weight_decay": group["decay"], "lr": lr} for group in groups if group["params"]
        ]
        try:
            self.inner = kind(made, lr=lr, **{**own, **(options or {})})  # type: ignore[call-arg]
        except (TypeError, ValueError) as error:
            raise AlexprepError(f"optimizer {name} cannot be made: {error}") from None
        self._settings = {id(group["params"][0]): dict(group) for group in self.inner.param_groups}
        self._before: list[Callable[..., Any]] = []

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of torch's optimizer that move at present: parameters of one decay and one rate each."""
        return self.inner.param_groups

    def weights(self) -> list[torch.Tensor]:
        """All parameters, in the order of the groups."""
        return [weight for group in self._groups for weight in group["params"]]

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Sets the rate of every parameter by its name.

        Raises:
            AlexprepError: a rate is negative or not a number.
        """
        if wrong := [rate for rate in rates.values() if not rate >= 0]:
            raise AlexprepError(f"the learning rate is {wrong[0]}, it must be 0 or more")
        moving: list[dict[str, Any]] = []
        for group in filter(lambda group: group["params"], self._groups):
            by_rate: dict[float, list[torch.Tensor]] = {}
            for weight, name in zip(group["params"], group["names"], strict=True):
                by_rate.setdefault(rates[name], []).append(weight)
            settings = self._settings[id(group["params"][0])]
            moving += [settings | {"params": weights, "lr": rate} for rate, weights in by_rate.items() if rate > 0]
        self.inner.param_groups[:] = moving

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> None:
        """Has `hook` called before every step."""
        self._before.append(hook)

    def zero_grad(self) -> None:
        """Forgets the gradients of all parameters."""
        for weight in self.weights():
            weight.grad = None

    def step(self) -> None:
        """Moves every parameter that has a gradient and a rate above 0."""
        for hook in self._before:
            hook()
        self.inner.step()

    def slots(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """What a checkpoint holds of it: a name, the parameter's number in the order of the groups, and the live tensor."""
        for number, weight in enumerate(self.weights()):
            for name, value in self.inner.state.get(weight, {}).items():
                if isinstance(value, torch.Tensor):
                    yield f"{SLOT}{name}", number, value

    def make_slot(self, name: str, number: int, like: torch.Tensor) -> torch.Tensor:
        """The live tensor of a name and a number that `slots` gave, made where there is none: in the form of the parameter if it has its shape."""
        state, weight = self.inner.state[self.weights()[number]], self.weights()[number]
        if like.shape == weight.shape:
            made = torch.zeros_like(weight, dtype=like.dtype)
        else:  # a count of steps, which torch keeps on the CPU, or sums over rows
            made = torch.zeros_like(like, device=weight.device if like.dim() else "cpu")
        return cast(torch.Tensor, state.setdefault(name.removeprefix(SLOT), made))


Rule = MomentumSGD | TorchRule


def torch_class(name: str, momentum: float) -> tuple[type[Optimizer], dict[str, Any]]:
    """The class of torch.optim that a recipe names, and its arguments: "sgd", "nesterov", "adamw", or the class's own name.

    Raises:
        AlexprepError: there is none that can be stepped by gradients alone.
    """
    if name in ("sgd", "nesterov"):
        return torch.optim.SGD, {"momentum": momentum, "nesterov": name == "nesterov"}
    kind = getattr(torch.optim, "AdamW" if name == "adamw" else name, None)
    plain = isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
    if not plain or name in NOT_BY_GRADIENTS_ALONE:
        raise AlexprepError(
            f"there is no optimizer {name!r}: choose {PAPER}, sgd, nesterov, adamw, or a class of torch.optim such as RMSprop"
        )
    return cast("type[Optimizer]", kind), {}


def by_element(name: str) -> bool:
    """Whether a rule moves each number by its own gradients alone, so that ranks can share a tensor's parts."""
    return name in BY_ELEMENT


def add_l1(groups: Sequence[Mapping[str, Any]], strength: float) -> None:
    """Adds the gradient of strength · sum of |w| to those of all weights that have one; biases, the last group, have no such penalty.

    >>> weight = torch.nn.Parameter(torch.tensor([2.0, 0.0, -1.0]))
    >>> weight.grad = torch.zeros(3)
    >>> add_l1([{"params": [weight]}, {"params": []}], 0.5)
    >>> weight.grad.tolist()
    [0.5, 0.0, -0.5]
    """
    for group in groups[:-1]:
        for weight in group["params"]:
            if weight.grad is not None:
                weight.grad.add_(weight.detach().sign(), alpha=strength)


@torch.no_grad()
def shorten_kernels(network: nn.Module, longest: float) -> None:
    """Makes the weights into each unit a vector that is no longer than `longest`, if it is (max-norm, Srebro et al. 2005; Srivastava et al. 2014).

    Of linear layers, convolutions and locally connected layers; a unit's weights lie whole on one rank, however these share a network.

    >>> layer = torch.nn.Linear(2, 2)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    >>> shorten_kernels(layer, 1.0)
    >>> layer.weight.detach().norm(dim=1).tolist()
    [1.0, 0.5]
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            inputs = tuple(range(1, layer.weight.dim()))
        elif isinstance(layer, LocallyConnected2d):
            inputs = (2, 3, 4)
        else:
            continue
        if layer.weight.requires_grad:
            lengths = torch.linalg.vector_norm(layer.weight, dim=inputs, keepdim=True)
            layer.weight.mul_((longest / lengths.clamp(min=1e-30)).clamp(max=1.0))


def parameter_groups(
    network: nn.Module,
    *,
    decay: float,
    layer_decay: Mapping[str, float],
    bias_lr_factor: float,
    bias_decay: float = 0.0,
    norm_decay: bool = True,
) -> list[dict[str, Any]]:
    """Groups for an update rule: weights by their decay, then all biases.

    Args:
        network: what is called `bias` in its layer is a bias, every other parameter a weight.
        decay: of the layers that `layer_decay`, by layer name, does not have.
        layer_decay: see `decay`.
        bias_lr_factor: the biases' rate over the weights'; 1 in the paper, 2 in the 2012 code.
        bias_decay: of the biases; they have none in the 2012 code.
        norm_decay: whether weights of one dimension, which are those of norms, decay as other weights do, and not as biases.

    Returns:
        Dictionaries of `params`, their `names`, `decay` and `lr_factor`.

    Raises:
        AlexprepError: `layer_decay` names a layer that the network does not have.
    """
    by_decay: dict[float, dict[str, nn.Parameter]] = {}
    biases: dict[str, nn.Parameter] = {}
    unused = set(layer_decay)
    for name, parameter in network.named_parameters():
        layer, _, kind = name.rpartition(".")
        unused.discard(layer)
        if kind == "bias":
            biases[name] = parameter
        else:
            bare = not norm_decay and parameter.dim() <= 1 and layer not in layer_decay
            by_decay.setdefault(bias_decay if bare else layer_decay.get(layer, decay), {})[name] = parameter
    if unused:
        raise AlexprepError(f"layer_decay names {', '.join(sorted(unused))}, which the network does not have")
    groups = [(weights, value, 1.0) for value, weights in by_decay.items()] + [(biases, bias_decay, bias_lr_factor)]
    return [
        {"params": list(named.values()), "names": list(named), "decay": value, "lr_factor": factor}
        for named, value, factor in groups
    ]
