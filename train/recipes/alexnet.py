"""How each network of the AlexNet family is trained. Numbers without a source are the paper's, section 5."""

from __future__ import annotations

from dataclasses import replace

from alexprep.pipeline.augmentation import augmentation_named
from alexprep.train.lr_schedule import ByHand, DExp, Plateau
from alexprep.train.models import alexnet as networks
from alexprep.train.recipes.recipe import Recipe

STORED = (256, 256)  # section 2

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


def alexnet() -> Recipe:
    """The paper's: section 5 for the numbers, section 4.1 for the augmentation."""
    return Recipe(
        name="alexnet",
        network=networks.alexnet,
        augmentation=augmentation_named("paper"),
        stored_sizes=STORED,
        schedule=Plateau(),
        epochs=90,
    )


def alexnet_2012() -> Recipe:
    """Net #145 of the released code, whose error on the validation set of 2012 is the paper's 40.7 % and 18.2 %."""
    return Recipe(
        name="alexnet-2012",
        network=networks.alexnet_2012,
        augmentation=augmentation_named("2012-code"),
        stored_sizes=STORED,
        schedule=RATES_145,
        epochs=91,
        bias_lr_factor=2.0,  # layer-params-126-2012-full.cfg: epsB 0.02 beside epsW 0.01
    )


def alexnet_1gpu() -> Recipe:
    """The paper's network for one GPU (footnote 2), trained like the one for two."""
    return replace(alexnet(), name="alexnet-1gpu", network=networks.alexnet_1gpu)


def alexnet_6conv() -> Recipe:
    """Net #146, to be trained on more classes than one is after. Its rates were set by hand there; here the paper's rule sets them."""
    return Recipe(
        name="alexnet-6conv",
        network=networks.alexnet_6conv,
        augmentation=augmentation_named("2012-code"),
        stored_sizes=STORED,
        schedule=Plateau(),
        epochs=90,
        bias_lr_factor=2.0,
    )


def alexnet_6conv_tune() -> Recipe:
    """The second half of net #146: from weights of `alexnet-6conv`, all layers but fc8, to the paper's "1 CNN*", 39.0 % and 16.6 %."""
    return replace(
        alexnet_6conv(),
        name="alexnet-6conv-tune",
        augmentation=replace(augmentation_named("2012-code"), noise_epochs=38),
        schedule=RATES_146_TUNE,
        epochs=54,
    )


def alexnet_owt() -> Recipe:
    """cuda-convnet2's example for one GPU: 42.5 % and 19.8 % in the centre, 40.4 % and 18.2 % over ten views (its wiki).

    Its crops and mirrors were drawn for each image (src/jpeg.cpp), its noise never ended; the rest of the augmentation is the 2012 code's.
    """
    return Recipe(
        name="alexnet-owt",
        network=networks.alexnet_owt,
        augmentation=replace(augmentation_named("2012-code"), share=1, noise_epochs=None),
        stored_sizes=STORED,
        schedule=DExp(),
        epochs=90,
        bias_lr_factor=2.0,
    )
