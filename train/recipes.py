"""What is trained and how: the `Recipe` type, the recipes that come with alexprep, and a recipe by its name.

A new recipe is one value here and its entry in `RECIPES`. Networks are in `alexprep.train.models`, learning rates over time in
`alexprep.train.lr_schedule`; how a field is changed by its name is in `alexprep.train.settings`, how code of the user's own is found and called in
`alexprep.train.user_code`.

Numbers without a source are, of the AlexNet family, the paper's (section 5); of the nets for CIFAR-10, cuda-convnet's
(example-layers/layer-params-*.cfg).
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, get_args

from alexprep.pipeline.augmentation import Augmentation, Hook, Place, augmentation_named
from alexprep.pipeline.geometry import Affine, Elastic, sides
from alexprep.shards.errors import AlexprepError, counted, number_within, one_of, whole_number
from alexprep.train.field_values import BEFORE, PAPER, Loss
from alexprep.train.lr_schedule import (
    ByHand,
    DExp,
    Linear,
    Plateau,
    Schedule,
    ScheduleState,
    Steps,
    WarmUp,
    describe,
    is_bias,
    planned,
    rate_at,
    without_unmatched,
)
from alexprep.train.models import alexnet as alexnets
from alexprep.train.models import cifar as cifar_nets
from alexprep.train.models.columns import LENET5, ColumnNet
from alexprep.train.models.small import small_net
from alexprep.train.user_code import (
    HOOK,
    RECIPE,
    UserNetwork,
    describe_layers,
    errors_in_one_sentence,
    fails_on,
    is_reference,
    load,
    memory_format_of,
)

if TYPE_CHECKING:  # what it takes to train is loaded where it is used: a recipe is read without torch
    from torch import nn

    from alexprep.train.distributed.tensor_parallel import Scheme
    from alexprep.train.optimizer import Rule

DEFAULT_RECIPE = "alexnet"
MOST_EPOCHS = 100_000
MOST_COMPILED = 8  # sizes of images; torch.compile leaves further ones uncompiled


class NetworkFactory(Protocol):
    """Makes a network, see `Recipe`."""

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The network with its initial weights."""


@dataclass(frozen=True)
class Recipe:
    """One way of training: everything that decides its result but the data and the seed.

    Args:
        name: as on the command line.
        network: makes the network, from float32 (N, 3, crop, crop) to logits (N, classes), with its initial weights: a function of
            (classes, crop, *, seed, width), and in_channels where it sees other than three; or an object with switches that is called so and whose `describe` tells them. In a user's
            recipe file, any form that docs/own-nets.md lists.
        augmentation: crop side, mirror, mean, noise.
        stored_sizes: sides of stored images, pixels, that the recipe is meant for: from, to.
        schedule: of the learning rates, and perhaps of the end.
        epochs: at most.
        batch_size: images a step.
        lr: learning rate of the first epoch; the schedule may have layers begin at another.
        momentum: of the update rule.
        optimizer: "paper", the paper's rule; "sgd", "nesterov" or "adamw", torch's; or another class of torch.optim by its name.
        optimizer_options: further arguments of torch's class, JSON values.
        momentum_correction: of the paper's rule: whether a change of the rate scales the velocities with it, as in `torch.optim.SGD`. Off in the paper's
            recipes and the 2012 code's, where the rate is inside the velocity; runs from before this field go on without.
        decay: weight decay of the layers that `layer_decay` does not name.
        layer_decay: weight decay by layer name.
        bias_decay: of the biases.
        norm_decay: whether weights of one dimension, which are those of norms, decay as other weights do, and not as biases.
        bias_lr_factor: the biases' rate over the weights'.
        width: scales the network's kernels.
        loss: what is made small: "softmax", the cross-entropy with the softmax of the outputs, which is the paper's; "sigmoid", the sum over
            the classes of that with the logistic function of each; "euclidean", half the squared distance from 1 for the class and 0 for
            the others. Evaluations tell the first, and its probabilities, whatever was trained.
        l1: strength of a penalty on the sum of all |weights|, biases apart: its gradient is added to the step's after `clip`. With `decay` it is
            the elastic net.
        max_norm: the weights into a unit are, after each step, made no longer a vector than this; None for any length.
        label_smoothing: share of the target that is spread over all classes.
        clip: the gradient is made no longer than this, over all parameters; None for never.
        accumulate: parts into which a step's batch is cut; their gradients are added up, and they need memory for a part only.
        early_crops: sides of the crops that the first epochs see, one each, before all others see the augmentation's: progressive resizing, for
            networks that take images of several sizes.
        evaluation_crop: side of the crops that evaluations see, for networks that take images of several sizes; None for the augmentation's. Somewhat
            larger ones show more of the image; of random resized crops, which show things larger, also at the size of the training (Touvron
            et al. 2019, arXiv 1906.06423).
        average: of the weights, an exponential mean is kept with this decay, and evaluated; 0 for none.

    Raises:
        AlexprepError: a number is out of its range; the message names it.
    """

    name: str
    network: NetworkFactory
    augmentation: Augmentation
    stored_sizes: tuple[int, int]
    schedule: Schedule
    epochs: int
    batch_size: int = 128
    lr: float = 0.01
    optimizer: str = PAPER
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    momentum: float = 0.9
    momentum_correction: bool = field(default=True, metadata={BEFORE: False})
    decay: float = 0.0005
    layer_decay: Mapping[str, float] = field(default_factory=dict)
    bias_decay: float = 0.0
    norm_decay: bool = True
    bias_lr_factor: float = 1.0
    width: float = 1.0
    loss: Loss = "softmax"
    l1: float = 0.0
    max_norm: float | None = None
    label_smoothing: float = 0.0
    clip: float | None = None
    accumulate: int = 1
    average: float = 0.0
    early_crops: tuple[int, ...] = field(default=(), metadata={BEFORE: ()})
    evaluation_crop: int | None = field(default=None, metadata={BEFORE: None})

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        for name, most in (("epochs", MOST_EPOCHS), ("batch_size", 1_000_000)):
            whole_number(f"recipe {self.name}: {name}", getattr(self, name), 1, most)
        highest = {"lr": 100, "momentum": 0.9999, "decay": 1, "l1": 1, "bias_decay": 1, "bias_lr_factor": 100}
        for name, high in highest.items():
            number_within(f"recipe {self.name}: {name}", getattr(self, name), 0, high)
        for name, high in {"label_smoothing": 0.999, "average": 0.99999}.items():
            number_within(f"recipe {self.name}: {name}", getattr(self, name), 0, high)
        for name in ("clip", "max_norm"):
            if getattr(self, name) is not None:
                number_within(f"recipe {self.name}: {name}", getattr(self, name), 1e-9, 1e9)
        one_of(f"recipe {self.name}: loss", self.loss, get_args(Loss))
        whole_number(f"recipe {self.name}: accumulate", self.accumulate, 1, self.batch_size)
        if self.batch_size % self.accumulate:
            raise AlexprepError(
                f"recipe {self.name} cuts batches of {self.batch_size} into {self.accumulate} parts: give a divisor of the batch size"
            )
        for side in self.early_crops:
            whole_number(f"recipe {self.name}: early_crops (or none), at most the crop,", side, 1, self.crop)
        if self.evaluation_crop is not None:
            whole_number(f"recipe {self.name}: evaluation_crop (or none)", self.evaluation_crop, 1, 65535)
        (low_size, high_size), largest = self.stored_sizes, max(self.crop, self.evaluation_crop or 0)
        room = low_size + 2 * self.augmentation.pad
        if largest > room or low_size > high_size:
            name = "evaluation_crop" if largest > self.crop else "augmentation.crop"
            raise AlexprepError(
                f"recipe {self.name} cuts {largest} pixels out of stored sizes {self.stored_sizes}: {name} is at most {room} here; for larger images set "
                "stored_sizes too"
            )

    @property
    def crop(self) -> int:
        """Side of the square that the network sees, pixels."""
        if self.augmentation.crop is None:
            raise AlexprepError(f"recipe {self.name} has no crop: a network needs images of one size")
        height, width = sides(self.augmentation.crop)
        if height != width:
            raise AlexprepError(
                f"recipe {self.name} has a crop of {width} x {height}: its network is made for a square"
            )
        return height

    @property
    def evaluation_augmentation(self) -> Augmentation:
        """The augmentation at the crop that evaluations see."""
        return replace(self.augmentation, crop=self.evaluation_crop or self.crop)

    def make_network(self, classes: int, seed: int) -> nn.Module:
        """The network with its initial weights, on the CPU."""
        channels = self.augmentation.channels
        told = {"in_channels": channels} if "in_channels" in inspect.signature(self.network).parameters else {}
        if channels != 3 and not told:
            raise AlexprepError(
                f"recipe {self.name} has a network that sees 3 channels, and augmentation.channels is {channels}: take another --model"
            )
        return self.network(classes, self.crop, seed=seed, width=self.width, **told)

    def check_network(self, classes: int, seed: int, epochs: int, compiled: bool) -> list[str]:
        """Makes sure that the network can be trained as the recipe says, for so many epochs; gives what to say of it.

        Raises:
            AlexprepError: it cannot; the message names the field.
        """
        import torch

        network, sides_seen = self.make_network(classes, seed), {*self.early_crops, self.crop}
        self.make_optimizer(network)
        named = {side: "early_crops" for side in sorted(self.early_crops)}
        if self.evaluation_crop is not None:
            named.setdefault(self.evaluation_crop, "evaluation_crop")
        for side, where in named.items():
            if fails_on(network, torch.zeros(2, self.augmentation.channels, side, side)):
                raise AlexprepError(
                    f"the network of recipe {self.name} does not take images of {side} pixels, as {where} has them, but of {self.crop}: name larger ones, take "
                    f"--set {where}=none, or let it pool over whole maps before the first linear layer"
                )
        if compiled and len(sides_seen) > MOST_COMPILED:
            raise AlexprepError(
                f"early_crops and the crop are {len(sides_seen)} sizes, and at most {MOST_COMPILED} are compiled: name fewer, or leave --compile out"
            )
        notes = []
        if epochs <= len(self.early_crops):
            notes.append(f"no epoch sees crops of {self.crop}: early_crops has one for each")
        if self.evaluation_crop is not None and self.evaluation_crop < self.crop:
            notes.append(
                f"evaluations see crops of {self.evaluation_crop} pixels, smaller than the training's, {self.crop}: --set evaluation_crop=none has them alike"
            )
        return notes

    def summary(self) -> str | None:
        """Sizes and parameters of the network's layers in a sentence, where it can tell them."""
        own = self.network.factory if isinstance(self.network, UserNetwork) else self.network
        shape = self.augmentation.channels, self.crop, self.crop
        return own.summary(shape, self.width) if isinstance(own, ColumnNet) else None

    def make_optimizer(self, network: nn.Module) -> Rule:
        """The optimizer of this recipe's network, or of a rank's part of it, with its decays and momentum.

        Raises:
            AlexprepError: the schedule or `layer_decay` names a layer that the network does not have.
        """
        from alexprep.train.optimizer import MomentumSGD, TorchRule, add_l1, parameter_groups

        _, unmatched = without_unmatched(self.schedule, [name for name, _ in network.named_parameters()])
        if unmatched:
            raise AlexprepError(f"the schedule names {', '.join(unmatched)}, which the network does not have")
        groups = parameter_groups(
            network,
            decay=self.decay,
            layer_decay=self.layer_decay,
            bias_lr_factor=self.bias_lr_factor,
            bias_decay=self.bias_decay,
            norm_decay=self.norm_decay,
        )
        rule: Rule
        if self.optimizer != PAPER:
            rule = TorchRule(self.optimizer, groups, lr=self.lr, momentum=self.momentum, options=self.optimizer_options)
        elif self.optimizer_options:
            words = ", ".join(sorted(self.optimizer_options))
            raise AlexprepError(
                f"optimizer_options {words}: optimizer {PAPER} takes none, name another with --optimizer"
            )
        else:
            rule = MomentumSGD(
                groups,
                lr=self.lr,
                momentum=self.momentum,
                decay=self.decay,
                momentum_correction=self.momentum_correction,
            )
        if self.l1:
            rule.register_step_pre_hook(lambda *_: add_l1(groups, self.l1))
        return rule

    def check_scheme(self, scheme: Scheme) -> None:
        """Makes sure that ranks that share the work by a scheme can update weights as this recipe says.

        Raises:
            AlexprepError: they cannot; the message names the field and the schemes that can.
        """
        from alexprep.train.optimizer import by_element, torch_class

        if self.optimizer != PAPER:
            torch_class(self.optimizer, self.momentum)
        if scheme in ("towers", "hybrid") and not by_element(self.optimizer):
            raise AlexprepError(
                f"optimizer {self.optimizer} looks at whole tensors, of which ranks have parts with --scheme {scheme}: take --scheme ddp"
            )
        if scheme != "single" and self.accumulate > 1:
            raise AlexprepError(f"--accumulate {self.accumulate} is for one rank: leave it out with --scheme {scheme}")

    def planned(self, epochs: int | None = None) -> Recipe:
        """This recipe with a schedule as long as a run of so many epochs, by default its own, where the schedule leaves that open."""
        return replace(self, schedule=planned(self.schedule, epochs or self.epochs))

    def rates(self, parameters: Iterable[str], epoch: float, state: ScheduleState) -> dict[str, float]:
        """The learning rate of every parameter.

        Args:
            parameters: their names; those called `bias` in their layer are biases, all others weights.
            epoch: epochs done, with the part of the present one.
            state: of the schedule after the whole ones.
        """
        bases = {name: self.lr * (self.bias_lr_factor if is_bias(name) else 1) for name in parameters}
        return {name: rate_at(self.schedule, base, name, epoch, state) for name, base in bases.items()}

    def describe(self) -> dict[str, Any]:
        """Every field as JSON values: what a resumed run must have in common with the first part."""
        own = getattr(self.network, "describe", None)
        told = {
            "name": self.name,
            "network": getattr(self.network, "__name__", type(self.network).__name__) if own is None else own(),
            "width": self.width,
            "augmentation": asdict(replace(self.augmentation, hooks=()))
            | {"hooks": [hook.describe() for hook in self.augmentation.hooks]},
            "schedule": describe(self.schedule),
            "batch_size": self.batch_size,
            "lr": self.lr,
            "optimizer": self.optimizer,
            "optimizer_options": dict(self.optimizer_options),
            "momentum": self.momentum,
            "momentum_correction": self.momentum_correction,
            "decay": self.decay,
            "layer_decay": dict(self.layer_decay),
            "bias_decay": self.bias_decay,
            "norm_decay": self.norm_decay,
            "loss": self.loss,
            "l1": self.l1,
            "max_norm": self.max_norm,
            "label_smoothing": self.label_smoothing,
            "clip": self.clip,
            "accumulate": self.accumulate,
            "average": self.average,
            "early_crops": self.early_crops,
            "evaluation_crop": self.evaluation_crop,
            "bias_lr_factor": self.bias_lr_factor,
        }
        values: dict[str, Any] = json.loads(json.dumps(told))
        return values

    def check_sides(self, stored: tuple[int, int] | None) -> None:
        """Makes sure that images stored with shorter sides from the first to the second number of pixels suit this recipe.

        Whether other people's images of several sizes do, None, a loader tells.

        Raises:
            AlexprepError: they do not; the message names a recipe that suits them, or the `--size` to shard with.
        """
        low, high = self.stored_sizes
        if stored is None or (low <= stored[0] and stored[1] <= high):
            return
        shortest, longest = stored
        suitable = [
            one.name for one in RECIPES.values() if one.stored_sizes[0] <= shortest and longest <= one.stored_sizes[1]
        ]
        other = f"train with --recipe {suitable[0]}, or " if suitable else ""
        wanted = f"{low}" if low == high else f"{low} to {high}"
        found = f"a side of {shortest}" if shortest == longest else f"shorter sides of {shortest} to {longest}"
        raise AlexprepError(
            f"the stored images have {found} pixels, recipe {self.name} is for {wanted}: {other}shard again with --size {low}"
        )


def recipe(name: str) -> Recipe:
    """A recipe by its name in `RECIPES`, or one of the user's own: FILE.py, FILE.py:FUNCTION or MODULE:FUNCTION.

    Raises:
        AlexprepError: there is none of this name, or the user's code fails.

    >>> recipe("cifar10-quick").batch_size
    128
    """
    if is_reference(name):
        return user_recipe(name)
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 1)
        hint = f", perhaps {near[0]} is meant" if near else ""
        raise AlexprepError(
            f"there is no recipe {name!r}{hint}: choose one of {', '.join(RECIPES)}; or FILE.py:FUNCTION, a recipe of your own"
        )
    return RECIPES[name]


def with_network(named: Recipe, network: UserNetwork) -> Recipe:
    """A recipe with a network of the user's own; one of a library brings its mean, deviation and crop, one of a layer file its rates and decays.

    `early_crops` and `evaluation_crop`, which the recipe's own network takes, are left out. See `alexprep.train.model_libraries` and
    `alexprep.train.layer_files`.
    """
    named = replace(named, early_crops=(), evaluation_crop=None)
    if network.pixels is None:
        return replace(named, network=network, **(network.training or {}))
    augmentation, stored_sizes = network.pixels.fitted(named.augmentation, named.stored_sizes)
    return replace(named, network=network, augmentation=augmentation, stored_sizes=stored_sizes)


def as_begun(made: Recipe, recorded: Mapping[str, Any]) -> Recipe:
    """A recipe for a run that goes on: what it `recorded` of its recipe lacks fields that came later, which are as they were before.

    `alexprep.train.checkpoint.with_defaults` reads the record likewise.
    """
    newer = {each.name: each.metadata[BEFORE] for each in fields(made) if BEFORE in each.metadata}
    return replace(made, **{name: before for name, before in newer.items() if name not in recorded})


def hooked(made: Recipe, reference: str, after: Place) -> Recipe:
    """A recipe with an operation of the user's own in its augmentation, FILE.py:FUNCTION or MODULE:FUNCTION, which was tried once.

    Raises:
        AlexprepError: there is no such function, or it fails, or gives no image of the form that it got.
    """
    from alexprep.pipeline.dali_graph import check_hooks

    function, title = load(reference, HOOK, "hook")
    with errors_in_one_sentence(f"{HOOK} {reference}"):
        hook = Hook(function, after, title)
        augmentation = replace(made.augmentation, hooks=(*made.augmentation.hooks, hook))
        check_hooks(augmentation)
    return replace(made, augmentation=augmentation)


# The AlexNet family.

# layer-params-145.cfg, as its notes tell it. Biases stayed at 0.02, but for those of conv1, frozen with its weights.
RATES_145 = ByHand(
    (
        (25, "*.weight", 1e-1),
        (51, "*.weight", 1e-2),
        (67, "conv1.weight", 1e-3),
        (72, "conv1.*", 0.0),
        (79, "*.weight", 1e-3),
        (79, "conv1.*", 0.0),
    )
)

# layer-params-146-2012-2011.cfg, likewise: factors on 0.01. fc8 had the others' 0.001 for its first 300 steps, here never. The file ends
# with 0.022 for conv6's biases and 0.02 for the others'; conv1's are 0 there, here from when its weights are.
RATES_146_TUNE = ByHand(
    (
        (0, "*.weight", 1e-1),
        (0, "conv1.weight", 1e-2),
        (0, "fc8.weight", 1.0),
        (5, "conv1.weight", 1e-3),
        (7, "conv1.*", 0.0),
        (9, "fc8.weight", 1e-1),
        (22, "*.weight", 1e-2),
        (22, "conv1.*", 0.0),
        (42, "*.weight", 1e-3),
        (42, "conv1.*", 0.0),
    )
)


# The paper's: section 5 for the numbers, section 4.1 for the augmentation.
ALEXNET = Recipe(
    name="alexnet",
    network=alexnets.alexnet,
    augmentation=augmentation_named("paper"),
    stored_sizes=(256, 256),  # section 2
    schedule=Plateau(),
    epochs=90,
    momentum_correction=False,  # section 5: the rate is inside the velocity
)

# The paper's network for one GPU (footnote 2), trained like the one for two.
ALEXNET_1GPU = replace(ALEXNET, name="alexnet-1gpu", network=alexnets.alexnet_1gpu)

# Net #145 of the released code, whose error on the validation set of 2012 is the paper's 40.7 % and 18.2 %.
ALEXNET_2012 = replace(
    ALEXNET,
    name="alexnet-2012",
    network=alexnets.alexnet_2012,
    augmentation=augmentation_named("2012-code"),
    schedule=RATES_145,
    epochs=91,
    bias_lr_factor=2.0,  # layer-params-126-2012-full.cfg: epsB 0.02 beside epsW 0.01
)

# Net #146, to be trained on more classes than one is after. Its rates were set by hand there; here the paper's rule sets them.
ALEXNET_6CONV = replace(
    ALEXNET_2012, name="alexnet-6conv", network=alexnets.alexnet_6conv, schedule=Plateau(), epochs=90
)

# The second half of net #146: from weights of `alexnet-6conv`, all layers but fc8, to the paper's "1 CNN*", 39.0 % and 16.6 %.
ALEXNET_6CONV_TUNE = replace(
    ALEXNET_6CONV,
    name="alexnet-6conv-tune",
    augmentation=replace(augmentation_named("2012-code"), noise_epochs=38),
    schedule=RATES_146_TUNE,
    epochs=54,
)

# cuda-convnet2's example for one GPU: 42.5 % and 19.8 % in the centre, 40.4 % and 18.2 % over ten views (its wiki). Its crops and mirrors
# were drawn for each image (src/jpeg.cpp), its noise never ended; the rest of the augmentation is the 2012 code's.
ALEXNET_OWT = replace(
    ALEXNET_2012,
    name="alexnet-owt",
    network=alexnets.alexnet_owt,
    augmentation=replace(augmentation_named("2012-code"), share=1, noise_epochs=None),
    schedule=DExp(),
    epochs=90,
)


# The nets for CIFAR-10.

# Fig. 1's solid line: the four-layer net on whole images, "no regularization of any kind"; the rate is the fastest of those tried.
CIFAR10_RELU = Recipe(
    name="cifar10-relu",
    network=cifar_nets.conv_local_13pct,
    augmentation=Augmentation(crop=32, mirror=False, mean="crop", noise="none"),
    stored_sizes=(32, 32),
    schedule=Steps(after=()),
    epochs=40,
    lr=0.002,
    momentum_correction=False,
    decay=0.0,
    bias_lr_factor=2.0,
)

# Fig. 1's dashed line: the same with tanh, and the fastest rate of its own.
CIFAR10_TANH = replace(CIFAR10_RELU, name="cifar10-tanh", network=cifar_nets.conv_local_13pct_tanh, lr=0.016)

# cuda-convnet's fast CIFAR-10 net and its decays; mirrors, twice its rate and 15 epochs bring its 26 % error to 22 %. The original
# (layer-params-80sec.cfg) has no augmentation, rate 0.001, divided by 10 after 8 epochs.
CIFAR10_QUICK = replace(
    CIFAR10_RELU,
    name="cifar10-quick",
    network=cifar_nets.cifar10_quick_net,
    augmentation=replace(CIFAR10_RELU.augmentation, mirror=True),
    schedule=Steps(after=(12, 14)),
    epochs=15,
    momentum_correction=True,
    decay=0.004,
    layer_decay={"fc4": 0.03, "fc5": 0.03},
)

# For minutes of a CPU: rate, momentum, smoothing and the linear fall are of the kind of K. Jordan's airbench (arXiv 2404.00498); the crop moves by
# two pixels to each side.
CIFAR10_FAST = Recipe(
    name="cifar10-fast",
    network=cifar_nets.cifar10_fast_net,
    augmentation=Augmentation(crop=28, mirror=True, mean="channel", std="channel", noise="none"),
    stored_sizes=(32, 32),
    schedule=WarmUp(Linear(), epochs=1.0),
    epochs=7,
    lr=0.25,
    optimizer="nesterov",
    momentum=0.85,
    decay=0.001,
    norm_decay=False,
    bias_lr_factor=16.0,  # of the norms: 550 steps end at 24.0 % instead of 24.7, one seed
    label_smoothing=0.2,
    early_crops=(24, 24, 24, 24),
    evaluation_crop=30,
)

# The paper's four-layer net without normalisation, whose error on CIFAR-10 is 13 % (section 3.3). There (notes in
# layer-params-conv-local-11pct.cfg) 350 epochs were on four fifths of the images and 150 on all of them, then 10 at a tenth of the rate and
# 10 at a hundredth; here all 520 are on all images.
CIFAR10_13PCT = replace(
    CIFAR10_RELU,
    name="cifar10-13pct",
    augmentation=replace(CIFAR10_RELU.augmentation, crop=24, mirror=True),
    schedule=Steps(after=(500, 510)),
    epochs=520,
    lr=0.001,
    layer_decay={"local3": 0.004, "local4": 0.004, "fc5": 0.004},
)

# The same with response normalisation, for the paper's 11 %.
CIFAR10_11PCT = replace(
    CIFAR10_13PCT,
    name="cifar10-11pct",
    network=cifar_nets.conv_local_11pct,
    layer_decay={"local3": 0.004, "local4": 0.004, "fc5": 0.01},
)

# The nets before AlexNet: columns of Ciresan et al. (IJCAI 2011, CVPR 2012), and LeNet-5. Pixels are from -1 to 1.

_COLUMN = ColumnNet("1x29x29-20C4-MP2-40C5-MP3-150N-10N")
_WHOLE = Augmentation(crop=29, position="centre", mirror=False, mean="inception", std="inception", noise="none")

# The column for MNIST (CVPR 2012, section 3.1): one image a step, a rate that is multiplied by 0.993 after each epoch until it is 0.00003, after 500.
# Elastic distortion and turns by 15 degrees are those of arXiv 1003.0358, section 2; there sizes change by 15 to 20 % along rows and columns apart, here
# by 15 % in both. Classes are told apart by softmax and cross-entropy.
MNIST_COLUMN = Recipe(
    name="mnist-column",
    network=_COLUMN,
    augmentation=replace(
        _WHOLE,
        pad=1,
        channels=1,
        affine=Affine(rotate=15, zoom=(0.85, 1.15), shift=(0.05, 0.05)),
        elastic=Elastic(),
    ),
    stored_sizes=(28, 28),
    schedule=DExp(epochs=500, factor=1 / 0.03, steps=500, bias_factor=1 / 0.03, bias_steps=500),
    epochs=800,
    batch_size=1,
    lr=0.001,
    momentum=0.0,
    decay=0.0,
)

# The same images in minutes of a CPU: half as many maps again, ReLU, mini-batches, momentum, a rate that falls to 0. The paper's own net, trained so for
# 20 epochs, gives 0.81 % (one seed) and still errs on 1.2 % of its distorted digits.
MNIST_COLUMN_FAST = replace(
    MNIST_COLUMN,
    name="mnist-column-fast",
    network=ColumnNet("1x29x29-32C4-MP2-64C5-MP3-150N-10N", activation="relu", initial="fan-in"),
    schedule=Linear(),
    epochs=10,
    batch_size=64,
    lr=0.03,
    momentum=0.9,
)

# Small NORB: stereo pairs as two channels (`shard --layout norb-stereo`), 5 epochs and shifts of 5 % as in IJCAI 2011. The sizes of that paper's nets for NORB
# and CIFAR-10 could not be looked up: these are of its kind.
NORB_COLUMN = replace(
    MNIST_COLUMN,
    name="norb-column",
    network=ColumnNet("2x48x48-20C5-MP2-40C5-MP3-60C3-MP2-150N-5N"),
    augmentation=replace(_WHOLE, crop=48, channels=2, affine=Affine(shift=(0.05, 0.05), fill=255)),
    stored_sizes=(48, 48),
    schedule=Steps(after=()),
    epochs=5,
)

# CIFAR-10: likewise, 100 maps a layer and shifts of 5 %.
CIFAR_COLUMN = replace(
    NORB_COLUMN,
    name="cifar-column",
    network=ColumnNet("3x32x32-100C3-MP2-100C4-MP2-100C3-MP2-100N-10N"),
    augmentation=replace(NORB_COLUMN.augmentation, crop=32, channels=3, affine=Affine(shift=(0.05, 0.05))),
    stored_sizes=(32, 32),
    schedule=MNIST_COLUMN.schedule,
    epochs=800,
)

# LeCun et al. 1998: digits of 28 pixels on 32, no distortion, one image a step, 20 epochs whose rates fall about as there, which are those of a second-order
# method (0.0005 to 0.00001 over a mean curvature). Background and ink are -0.1 and 1.175 there, mean 0 and deviation 1: so here.
LENET_5 = replace(
    MNIST_COLUMN,
    name="lenet5",
    network=ColumnNet(LENET5, initial="fan-in"),
    augmentation=replace(_WHOLE, crop=32, pad=2, channels=1, mean=(20.0,) * 3, std=(200.0,) * 3),
    schedule=Steps(after=(10, 15, 18), divisor=3.0),
    epochs=20,
    lr=0.002,
)

# For trying things out: images of about 64 pixels, a few classes, a second an epoch on a laptop. Small batches, since a set of hundreds has few
# steps an epoch otherwise.
TINY = Recipe(
    name="tiny",
    network=cifar_nets.tiny_net,
    augmentation=Augmentation(crop=56, mirror=True, mean="crop", noise="eigenvalue", noise_sigma=0.1),
    stored_sizes=(56, 96),
    schedule=Linear(final=0.02),
    epochs=14,
    batch_size=8,
    lr=0.015,
)

# What docs/ablations.md measures: a baseline without any regulariser but mirrors and crops, seconds an epoch of 5,000 pictures.
SMALL = Recipe(
    name="small-net",
    network=small_net,
    augmentation=Augmentation(crop=28, mirror=True, mean="crop", noise="none"),
    stored_sizes=(28, 32),
    schedule=Linear(),
    epochs=15,
    batch_size=32,
    lr=0.01,
    decay=0.0005,
)

RECIPES = {
    made.name: made
    for made in (
        *(ALEXNET, ALEXNET_2012, ALEXNET_1GPU, ALEXNET_6CONV, ALEXNET_6CONV_TUNE, ALEXNET_OWT),
        *(CIFAR10_FAST, CIFAR10_QUICK, CIFAR10_13PCT, CIFAR10_11PCT, CIFAR10_RELU, CIFAR10_TANH, TINY),
        *(MNIST_COLUMN, MNIST_COLUMN_FAST, NORB_COLUMN, CIFAR_COLUMN, LENET_5, SMALL),
    )
}


# Recipes and networks of the user's own.


def user_recipe(reference: str) -> Recipe:
    """The recipe that a user's function returns: FILE.py, FILE.py:FUNCTION or MODULE:FUNCTION.

    Raises:
        AlexprepError: there is no such function, or it returns no `Recipe` that a run can begin with.
    """
    found, title = load(reference, RECIPE, "recipe")
    said = f"{RECIPE} {reference}"
    with errors_in_one_sentence(said):
        made = found()
    if not isinstance(made, Recipe):
        raise AlexprepError(f"{said}: {title} gives a {type(made).__name__}, not an alexprep.train.Recipe")
    factory = made.network
    if (getattr(factory, "__module__", None) or "").partition(".")[0] != "alexprep":
        name = getattr(factory, "__qualname__", type(factory).__name__)
        title = f"{title.partition(':')[0]}:{name}"
        made = replace(made, network=UserNetwork(factory, title, f"{said}: its network"))
    with errors_in_one_sentence(
        f"{said}: what a run has to remember of a recipe must be JSON values and frozen dataclasses"
    ):
        json.dumps(made.describe(), allow_nan=False)
    return made


def try_user_network(
    tried: Recipe, own: UserNetwork, classes: int, seed: int, scheme: Scheme, ranks: int
) -> tuple[Recipe, dict[str, dict[str, str]], list[str]]:
    """Makes a user's network, takes a training step with it, and fits the recipe to it, before a run begins.

    Returns:
        The recipe without what it says of layers that the network does not have; the network's layers, part of the run's identity; and
        notes about them for the user.

    Raises:
        AlexprepError: it cannot be trained so; the message says why, and where it can, in which line.
    """
    import torch

    from alexprep.train.distributed.tensor_parallel import part_of
    from alexprep.train.distributed.world import World

    network = tried.make_network(classes, seed)
    layers = describe_layers(network)
    count = sum(weight.numel() for weight in network.parameters())
    # A summary tells them itself, of a table's connections those that there are.
    notes = [f"the network is {own.title}" + (f", {count:,} parameters" if tried.summary() is None else "")]
    if own.training is not None:  # of that what no setting has changed
        kept = [f"{name} {value}" for name, value in own.training.items() if getattr(tried, name) == value]
        notes.append(f"as {own.title} has it: {', '.join(kept)}")
    if own.pixels is not None:
        seen = tried.augmentation
        channels = f" in {counted(seen.channels, 'channel')}" if seen.channels != 3 else ""
        notes.append(
            f"as {own.title} has it, crops of {seen.crop} pixels{channels} less mean {seen.mean}, divided by std {seen.std}"
        )
    if memory_format_of(network, torch.channels_last) != torch.channels_last:
        notes.append(
            f"{own.title} cannot take images with the channels last in memory, which is faster on a CPU: a view() may be to blame, "
            "flatten() and reshape() are not"
        )
    if own.for_any_recipe:
        tried, left_out = fitted(tried, [name for name, _ in network.named_parameters()])
        notes += left_out
    with own.errors():
        tried.make_optimizer(network)
    if ranks > 1:
        with own.errors(f", on {ranks} ranks"):
            part_of(tried.make_network(classes, seed), scheme, World(0, ranks, torch.device("cpu")))
    if idle := own.try_training(network, classes, tried.crop, ranks, scheme, tried.augmentation.channels):
        notes.append(
            f"{', '.join(idle)} of the network had no part in its outputs: without a gradient they stay as they are"
        )
    return tried, layers, notes


def fitted(made: Recipe, parameters: list[str]) -> tuple[Recipe, list[str]]:
    """A recipe made for another network, without decays and rates of single layers that lack among these parameters; and what to say of it."""
    layers = {name.rpartition(".")[0] for name in parameters}
    schedule, patterns = without_unmatched(made.schedule, parameters)
    missing = [layer for layer in made.layer_decay if layer not in layers] + patterns
    if not missing:
        return made, []
    decays = {layer: decay for layer, decay in made.layer_decay.items() if layer in layers}
    note = f"the network has no {', '.join(missing)}: what recipe {made.name} says of them alone is left out"
    return replace(made, layer_decay=decays, schedule=schedule), [note]
