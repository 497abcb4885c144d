"""Networks of timm and torchvision by their names, without pretrained weights, and the pixels that each of them is meant for.

Neither library is required: it is imported where a network of it is named. The names are theirs; nothing is downloaded.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from alexprep.pipeline.augmentation import IMAGENET_MEAN, IMAGENET_STD, MEANS, RGB, STDS, Augmentation
from alexprep.shards.errors import AlexprepError

if TYPE_CHECKING:
    from torch import nn

_REFERENCE = re.compile(r"(timm|torchvision)/([A-Za-z0-9][\w.-]*)")
_WITH_AUXILIARY = ("googlenet", "inception_v3")  # have further outputs in training, unless they are told not to
CROP, EVALUATION_SCALE = 224, 0.875  # where a library does not say


class NetworkInput(Protocol):
    """What a network is shown, whatever the recipe says."""

    def fitted(self, augmentation: Augmentation, stored_sizes: tuple[int, int]) -> tuple[Augmentation, tuple[int, int]]:
        """An augmentation, and the sides of the stored images that it is meant for, changed for the network."""


@dataclass(frozen=True)
class Pixels(NetworkInput):
    """What a network's library shows it."""

    crop: int
    mean: RGB  # grey levels
    std: RGB
    evaluation_scale: float  # crop over the shorter side, in an evaluation
    fixed: bool = False  # whether it is made for one crop

    def fitted(self, augmentation: Augmentation, stored_sizes: tuple[int, int]) -> tuple[Augmentation, tuple[int, int]]:
        """An augmentation with this mean and deviation; and with this crop, where the images that it is meant for are large enough."""
        crop = self.crop if self.crop <= stored_sizes[1] else min(augmentation.view or stored_sizes[:1])
        low = max(crop, stored_sizes[0])
        named = {"mean": _named(self.mean, MEANS), "std": _named(self.std, STDS)}
        scale = self.evaluation_scale if augmentation.scale is not None else augmentation.evaluation_scale
        return replace(augmentation, crop=crop, evaluation_scale=scale, **named), (low, max(low, stored_sizes[1]))


@dataclass(frozen=True)
class LibraryFactory:
    """Makes a network of a library."""

    library: str
    name: str

    @property
    def title(self) -> str:
        """As the user names it: timm/NAME or torchvision/NAME."""
        return f"{self.library}/{self.name}"

    def __call__(self, classes: int, crop: int, in_channels: int = 3) -> nn.Module:
        """The network with the library's initial weights."""
        if self.library != "timm" and in_channels != 3:
            raise AlexprepError(
                f"networks of {self.library} see 3 channels, not {in_channels}: set augmentation.channels to 3"
            )
        timm = self.library == "timm"
        made: nn.Module = self._timm(classes, crop, in_channels) if timm else self._torchvision(classes, crop)
        return made

    def pixels(self) -> Pixels:
        """What the library shows it; for what it does not say, what is usual for ImageNet.

        Raises:
            AlexprepError: the library is not installed, or has no such network.
        """
        return _timm_pixels(self.name) if self.library == "timm" else _torchvision_pixels(self.name)

    def _timm(self, classes: int, crop: int, in_channels: int) -> Any:
        pixels = self.pixels()
        more: dict[str, int] = {} if in_channels == 3 else {"in_chans": in_channels}
        if pixels.fixed and crop != pixels.crop:
            more["img_size"] = crop
        return _library("timm").create_model(self.name, pretrained=False, num_classes=classes, **more)

    def _torchvision(self, classes: int, crop: int) -> Any:
        more: dict[str, Any] = {}
        if self.name in _WITH_AUXILIARY:
            more = {"aux_logits": False, "init_weights": True}
        if self.name.startswith("vit_"):
            more["image_size"] = crop
        return _library("torchvision").models.get_model(self.name, weights=None, num_classes=classes, **more)


def library_factory(reference: str) -> LibraryFactory | None:
    """What timm/NAME or torchvision/NAME names; None where a reference has neither form."""
    parts = _REFERENCE.fullmatch(reference)
    return None if parts is None or reference.endswith(".py") else LibraryFactory(*parts.groups())


@functools.lru_cache
def _timm_pixels(name: str) -> Pixels:
    timm = _library("timm")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    told = timm.get_pretrained_cfg(name, allow_unregistered=True)
    size = getattr(told, "input_size", None) or (3, CROP, CROP)
    return Pixels(
        int(size[-1]),
        _grey_levels(getattr(told, "mean", None), IMAGENET_MEAN),
        _grey_levels(getattr(told, "std", None), IMAGENET_STD),
        getattr(told, "crop_pct", None) or EVALUATION_SCALE,
        bool(getattr(told, "fixed_input_size", False)),
    )


@functools.lru_cache
def _torchvision_pixels(name: str) -> Pixels:
    models = _library("torchvision").models
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    weights = getattr(models.get_model_weights(name), "DEFAULT", None)
    told = None if weights is None else weights.transforms()
    (crop,) = getattr(told, "crop_size", (CROP,))
    (resized,) = getattr(told, "resize_size", (round(crop / EVALUATION_SCALE),))
    return Pixels(
        crop,
        _grey_levels(getattr(told, "mean", None), IMAGENET_MEAN),
        _grey_levels(getattr(told, "std", None), IMAGENET_STD),
        min(1.0, crop / resized),
        name.startswith("vit_"),
    )


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # noqa: BLE001  (beside another torch than its own, torchvision raises whatever its operators do)
        words = next(iter(str(error).splitlines()), type(error).__name__)
        raise AlexprepError(
            f"--model {name}/… needs {name}, which cannot be imported ({words}): pip install {name}, with the torch that it is made for"
        ) from None


def _unknown(library: str, name: str, known: list[str]) -> AlexprepError:
    near = difflib.get_close_matches(name, known, 3)
    hint = f", perhaps {' or '.join(near)} is meant" if near else ""
    where = {"timm": "timm", "torchvision": "torchvision.models"}[library]
    return AlexprepError(f"{library} has no network {name!r}{hint}: {where}.list_models() tells all names")


def _grey_levels(values: Any, usual: RGB) -> RGB:
    """Three numbers of a library, there on the 0-1 scale."""
    if values is None:
        return usual
    red, green, blue = (round(255 * value, 6) for value in values)
    return red, green, blue


def _named(values: RGB, known: dict[str, RGB]) -> Any:
    """The name that an augmentation has for these numbers, if it has one."""
    same = (name for name, other in known.items() if max(abs(a - b) for a, b in zip(values, other, strict=True)) < 1e-3)
    return next(same, values)
