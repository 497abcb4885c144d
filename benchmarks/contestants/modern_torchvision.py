"""torchvision in the variants of benchmarks/modern_recipe.py: its older transforms over Pillow images, or its v2 transforms over tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from contestants.modern_files import COLOURS, SIMCLR, take_turns
from contestants.serve import SIDE
from PIL import Image


def main(folder: str, variant: str, threads: str, device: str) -> None:
    """Takes turns; `variant` is RECIPE-torchvision or RECIPE-v2."""
    prepare_torchvision()
    recipe, _, kind = variant.partition("-")
    load, work = (tensors if kind == "v2" else pictures)(recipe)
    mixes = recipe in ("rand", "jitter")
    take_turns(folder, load, mixes, work + ", mixup of a batch" * mixes, ("torchvision", "pillow"))


def prepare_torchvision() -> None:
    """Imports torchvision, also where its compiled operators do not load beside this torch; transforms of pictures need none of them."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # it asks about operators that are not there: they get a name, and no work
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        operators: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.modules[f"{__name__}.operators"] = operators  # they live as long as this object


def pictures(recipe: str) -> tuple[Callable[[str], torch.Tensor], str]:
    """Loads a file by Pillow and torchvision.transforms, as its ImageFolder and references do."""
    from torchvision import transforms

    transform = transforms.Compose([*steps(transforms, recipe), transforms.ToTensor(), normalize(transforms)])

    def load(file: str) -> torch.Tensor:
        with Image.open(file) as image:
            made: torch.Tensor = transform(image.convert("RGB"))
        return made

    return load, f"Pillow, {named(transform)}"


def tensors(recipe: str) -> tuple[Callable[[str], torch.Tensor], str]:
    """Loads a file by torchvision.io (or Pillow, where its decoder does not load) and transforms.v2 on uint8 tensors."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    transform = v2.Compose([*steps(v2, recipe), v2.ToDtype(torch.float32, scale=True), normalize(v2)])

    def opened(file: str) -> torch.Tensor:
        with Image.open(file) as image:
            made: torch.Tensor = v2.functional.pil_to_tensor(image.convert("RGB"))
        return made

    compiled = hasattr(torch.ops.image, "decode_image")

    def load(file: str) -> torch.Tensor:
        made: torch.Tensor = transform(decode_image(file, ImageReadMode.RGB) if compiled else opened(file))
        return made

    return load, f"{'torchvision.io' if compiled else 'Pillow'}, v2 on tensors: {named(transform)}"


def steps(transforms: Any, recipe: str) -> list[Any]:
    """What changes a picture, of either family of transforms."""
    return [
        transforms.RandomResizedCrop(SIDE),
        transforms.RandomHorizontalFlip(),
        *{
            "plain": [],
            "rand": [transforms.RandAugment()],
            "jitter": [transforms.ColorJitter(*COLOURS)],
            "simclr": [
                transforms.RandomApply([transforms.ColorJitter(*SIMCLR)], 0.8),
                transforms.RandomGrayscale(0.2),
                transforms.RandomApply([transforms.GaussianBlur(23, (0.1, 2.0))], 0.5),
            ],
        }[recipe],
    ]


def normalize(transforms: Any) -> Any:
    """torchvision's own mean and deviation."""
    return transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def named(transform: Any) -> str:
    """The names of the steps of a Compose."""
    return ", ".join(type(each).__name__ for each in transform.transforms)


if __name__ == "__main__":
    main(*sys.argv[1:])
