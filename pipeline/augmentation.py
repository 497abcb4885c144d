"""What is done to an image, every convention by name, and the combinations that have a name of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from alexprep.shards.errors import AlexprepError, number_within, whole_number

Mean = Literal["crop", "centre", "channel", "imagenet", "none"]
Std = Literal["channel", "imagenet", "none"]
Noise = Literal["eigenvalue", "stdev", "none"]

# What torchvision's pretrained networks were trained with, there on the 0-1 scale (0.485 0.456 0.406, 0.229 0.224 0.225).
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image. The defaults are the paper's.

    In this order: cut a window (and resize it), subtract the mean, mirror, add the colour noise, divide.

    Attributes:
        crop: side of the square that the network sees, pixels; 224 in the paper (section 4.1). None: the whole image.
        scale: None cuts the square as it is. Two numbers a <= b in (0, 1] cut a window whose share of the image's area is drawn
            from [a, b], and resize it: torchvision's RandomResizedCrop, whose default is (0.08, 1).
        ratio: bounds of that window's width / height, drawn log-uniformly.
        evaluation_scale: with `scale`, how much of the shorter side the centre view shows; 224 / 256 is usual.
        mirror: whether half of the crops are reflected left to right.
        share: how many neighbours in the epoch's order share one draw of corner and mirror: 1 in the paper, 32 in the 2012
            code.
        mean: what is subtracted. "crop": the mean image at the crop's own window (the paper, section 2: from each pixel);
            "centre": always the mean image's centre window, after the reflection (the 2012 code); "channel": the data set's
            three channel means; "imagenet": `IMAGENET_MEAN`; "none".
        std: what is divided by: "channel", the data set's three channel standard deviations; "imagenet": `IMAGENET_STD`; "none".
        noise: how large the colour noise along each principal axis is, for α ~ N(0, noise_sigma²). "eigenvalue": α λ with
            λ the eigenvalue on the 0-1 scale, times 255 (the paper's formula, section 4.1); "stdev": α √λ on the 0-255
            scale (the 2012 code); "none".
        noise_sigma: 0.1 in the paper.
        noise_rescale: images with noise are divided by this: 1.1 in the 2012 code, where the noise made them larger.
        noise_epochs: noise, and the division that goes with it, end after so many epochs; None for never. 67 in the 2012 code.
    """

    crop: int | None = 224
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    evaluation_scale: float = 0.875
    mirror: bool = True
    share: int = 1
    mean: Mean = "crop"
    std: Std = "none"
    noise: Noise = "eigenvalue"
    noise_sigma: float = 0.1
    noise_rescale: float = 1.0
    noise_epochs: int | None = None

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        for name, choices in (("mean", Mean), ("std", Std), ("noise", Noise)):
            if getattr(self, name) not in get_args(choices):
                raise AlexprepError(f"{name} {getattr(self, name)!r} is not one of {', '.join(get_args(choices))}")
        for name, low, high in (("crop", 1, 65535), ("share", 1, 2**31 - 1), ("noise_epochs", 0, 2**32 - 1)):
            if getattr(self, name) is not None or name == "share":
                whole_number(name, getattr(self, name), low, high)
        number_within("noise_sigma", self.noise_sigma, 0, 1e6)
        number_within("noise_rescale", self.noise_rescale, 1e-3, 1e3)
        number_within("evaluation_scale", self.evaluation_scale, 1e-3, 1)
        if not isinstance(self.mirror, bool):
            raise AlexprepError(f"mirror {self.mirror!r} is not True or False")
        if self.scale is not None and not _rising(self.scale, 1):
            raise AlexprepError(f"scale {self.scale} is not two shares of the area, 0 < a <= b <= 1")
        if not _rising(self.ratio, 1e6):
            raise AlexprepError(f"ratio {self.ratio} is not two bounds of width / height, 0 < a <= b <= 1,000,000")
        if self.crop is None and (self.scale is not None or self.windowed_mean):
            raise AlexprepError("scale, and mean crop or centre, need a crop: the side of the square that comes out")
        if self.scale is not None and self.windowed_mean:
            raise AlexprepError(
                f"mean {self.mean!r} belongs to crops that are not resized: with scale, use channel, imagenet or none"
            )

    @property
    def windowed_mean(self) -> bool:
        """Whether a window of the mean image is subtracted."""
        return self.mean in ("crop", "centre")

    @property
    def fixed_windows(self) -> bool:
        """Whether all windows have one height and width, the crop's, whatever is drawn and however large the images are."""
        return self.crop is not None and self.scale is None

    @property
    def needs_statistics(self) -> bool:
        """Whether the data set's mean image, channel moments or eigenpairs are used."""
        return self.windowed_mean or "channel" in (self.mean, self.std) or self.noise != "none"

    @property
    def keeps_bytes(self) -> bool:
        """Whether pixels stay whole numbers from 0 to 255."""
        return (self.mean, self.std, self.noise) == ("none", "none", "none")

    def noisy(self, epoch: int) -> bool:
        """Whether an epoch has colour noise."""
        return self.noise != "none" and (self.noise_epochs is None or epoch < self.noise_epochs)


def _rising(pair: Any, high: float) -> bool:
    numbers = isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(n, int | float) for n in pair)
    return numbers and 0 < pair[0] <= pair[1] <= high


PRESETS = {
    "paper": Augmentation(),
    "2012-code": Augmentation(share=32, mean="centre", noise="stdev", noise_rescale=1.1, noise_epochs=67),
    "resized": Augmentation(scale=(0.08, 1.0), mean="imagenet", std="imagenet", noise="none"),
    "none": Augmentation(crop=None, mirror=False, mean="none", noise="none"),
}


def augmentation_named(name: str) -> Augmentation:
    """One of `PRESETS`: "paper"; "2012-code", the released code's; "resized", usual for later networks; "none", whole images.

    Raises:
        AlexprepError: there is no preset of this name.

    >>> augmentation_named("2012-code").share
    32
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise AlexprepError(f"augmentation {name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]
