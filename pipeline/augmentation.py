"""Defines the augmentations: their options and presets, the random parameters of a sample, and the operations in numpy.

The DALI graph (`alexprep.pipeline.dali_ops`, `alexprep.pipeline.dali_graph`) must give what `augment` gives. This module decodes nothing and
imports neither DALI nor torch: the order of samples is `alexprep.pipeline.sampler`'s, reading them `alexprep.pipeline.loader`'s.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from alexprep.pipeline.colour import Blur, Jitter, blurred, draw_recolouring, draw_sigmas, recolour, rising
from alexprep.pipeline.geometry import (
    Affine,
    Elastic,
    Erasing,
    Size,
    digit_map,
    draw_affine,
    draw_elastic,
    draw_erased,
    erased,
    resampled,
    resize,
    sides,
    warp,
)
from alexprep.pipeline.mixing import Mixing, draw_mixing
from alexprep.pipeline.policies import Policy, RandAugment, TrivialAugment, draw_policy, operated
from alexprep.pipeline.random_numbers import (
    ATTEMPT,
    GEOMETRY,
    HOOK,
    NOISE,
    SHARED,
    Words,
    below,
    normals,
    unit,
    words_of,
)
from alexprep.shards.errors import AlexprepError, number_within, one_of, whole_number

if TYPE_CHECKING:
    from alexprep.shards.rgb_statistics import Statistics

Mean = Literal["crop", "centre", "channel", "imagenet", "inception", "clip", "none"]
Std = Literal["channel", "imagenet", "inception", "clip", "none"]
RGB = tuple[float, float, float]  # grey levels
Noise = Literal["eigenvalue", "stdev", "none"]
Position = Literal["random", "centre"]
Place = Literal["decode", "augment", "tensor"]  # of a hook
Channels = Literal[1, 2, 3]

_HOOK_WORDS = 16  # draws of four numbers that a hook may have

# What torchvision's pretrained networks were trained with, there on the 0-1 scale (0.485 0.456 0.406, 0.229 0.224 0.225).
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
# What pixels are subtracted and divided by, by name. "inception": to -1 … 1, as Inception and many vision transformers have it. "clip": OpenAI's
# CLIP, there on the 0-1 scale (0.48145466 0.4578275 0.40821073, 0.26862954 0.26130258 0.27577711).
MEANS: dict[str, RGB] = {
    "imagenet": IMAGENET_MEAN,
    "inception": (127.5, 127.5, 127.5),
    "clip": (122.7709383, 116.7460125, 104.09373615),
}
STDS: dict[str, RGB] = {
    "imagenet": IMAGENET_STD,
    "inception": (127.5, 127.5, 127.5),
    "clip": (68.5005327, 66.6321579, 70.32316305),
}


@dataclass(frozen=True)
class Hook:
    """An operation of the user's own in the graph of a training: a function over DALI nodes, at a named place.

    Its first parameter is the image. Each further one without a default is a random number of the sample, float32 () on the CPU, uniform on
    (0, 1): a pure function of (seed, epoch, sample) as everything else, so what begins in mid-epoch or on other ranks is the same. DALI's own
    generators in it would not be. It gives the image as it came: its type, axes and size.

    Attributes:
        function: called once, when the pipeline is built; a function of a module, so that a loader can be pickled.
        after: "decode", the decoded window, uint8 (H, W, 3), whose size the function may change where `Augmentation.scale` resizes it;
            "augment", after all that changes shapes and colours, uint8 (H, W, 3) or, after jitter or grey scale, float32 from 0 to 255;
            "tensor", the finished image, float32, its axes in the loader's memory format, before pairs are mixed.
        name: in messages, and in the identity of a run; by default MODULE:FUNCTION.
    """

    function: Callable[..., Any]
    after: Place = "augment"
    name: str = ""

    def __post_init__(self) -> None:
        """Refuses what is no such function, with AlexprepError."""
        if not callable(self.function):
            raise AlexprepError(f"hook {self.function!r} is not a function over DALI nodes")
        one_of("hook: after", self.after, get_args(Place))
        if not self.name:
            named = getattr(self.function, "__qualname__", type(self.function).__name__)
            object.__setattr__(self, "name", f"{getattr(self.function, '__module__', '')}:{named}")
        whole_number(f"hook {self.name}: its random numbers", self.numbers, 0, 4 * _HOOK_WORDS)

    @property
    def numbers(self) -> int:
        """How many random numbers a sample it takes."""
        taken = [
            parameter
            for parameter in inspect.signature(self.function).parameters.values()
            if parameter.kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty
        ]
        return len(taken) - 1

    def describe(self) -> dict[str, Any]:
        """What a resumed run must have in common: JSON values."""
        return {"function": self.name, "after": self.after, "numbers": self.numbers}


def _check_crop(crop: Any) -> None:
    """Refuses what is neither None, nor a side, nor height and width."""
    if isinstance(crop, list) or (isinstance(crop, tuple) and len(crop) != 2):
        raise AlexprepError(f"crop {crop!r} is neither the side of a square nor (height, width), pixels")
    for side in () if crop is None else crop if isinstance(crop, tuple) else (crop,):
        whole_number("crop", side, 1, 65535)


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image, in this order; the defaults are the paper's.

    The image is padded, a window is cut (and resized), warped, given to RandAugment or TrivialAugment, blurred, recoloured (jitter, then grey
    scale), reflected; the mean is subtracted, the colour noise added, all divided; a rectangle is erased; channels are joined; and pairs are
    mixed. With `elastic` or `normalised_width` all warps are one resampling, whose result is not rounded; of the rest there are then reflection,
    mean, deviation, channels and mixing.

    Attributes:
        crop: side of the square that the network sees, or (height, width), pixels; 224 in the paper (section 4.1). None: the whole image.
        pad: pixels of `background` around the image before the window is cut: 1 brings digits of 28 pixels to crops of 29, 2 to 32.
        background: grey level of R, G and B around the image, and around what elastic distortion and a normalised width move.
        normalised_width: what a digit, all that differs from the background, is made wide, in the middle and in evaluation too, its height
            staying: 10 to 20 of 28 pixels in Ciresan, Meier and Schmidhuber (arXiv 1202.2745, section 3.1); None leaves it.
        scale: None cuts the crop as it is. Two numbers a <= b in (0, 1] cut a window whose share of the image's area is drawn
            from [a, b], and resize it: torchvision's RandomResizedCrop, whose default is (0.08, 1).
        position: of that square or window: "random"; or "centre", the one that evaluation shows.
        ratio: bounds of that window's width / height, drawn log-uniformly.
        evaluation_scale: with `scale`, how much of the shorter side the centre view shows (of an oblong crop: of the largest window of
            its proportions); 224 / 256 is usual.
        mirror: whether half of the crops are reflected left to right.
        share: how many neighbours in the epoch's order share one draw of corner and mirror: 1 in the paper, 32 in the 2012
            code.
        mean: what is subtracted. "crop": the mean image at the crop's own window (the paper, section 2: from each pixel);
            "centre": always the mean image's centre window, after the reflection (the 2012 code); "channel": the dataset's
            three channel means; "imagenet", "inception", "clip": see `MEANS`; three grey levels of one's own; "none".
        std: what is divided by: "channel", the dataset's three channel standard deviations; "imagenet", "inception", "clip": see `STDS`;
            three grey levels of one's own; "none".
        noise: how large the colour noise along each principal axis is, for α ~ N(0, noise_sigma²). "eigenvalue": α λ with
            λ the eigenvalue on the 0-1 scale, times 255 (the paper's formula, section 4.1); "stdev": α √λ on the 0-255
            scale (the 2012 code); "none".
        noise_sigma: 0.1 in the paper.
        noise_rescale: images with noise are divided by this: 1.1 in the 2012 code, where the noise made them larger.
        noise_epochs: noise, and the division that goes with it, end after so many epochs; None for never. 67 in the 2012 code.
        affine: rotation, scale, shift and shear, see `Affine`; None for none.
        elastic: distortion by a smooth random field, see `Elastic`; None for none.
        policy: `RandAugment` or `TrivialAugment`; None for none.
        jitter: changes of brightness, contrast, saturation and hue, see `Jitter`; None for none.
        grey: share of the images that lose their colours, 0 to 1.
        blur: see `Blur`; None for none.
        erasing: a rectangle that is erased, see `Erasing`; None for none.
        channels: that the network sees: 3; 1, their mean, which of a grey image is itself; 2, the first two, for stereo pairs stored so.
        mixing: mixup and CutMix of the pairs of a step, see `Mixing`; None for none.
        hooks: operations of the user's own over DALI nodes, in the order in which they are done where they have one place, see `Hook`.
    """

    crop: Size | None = 224
    pad: int = 0
    background: int = 0
    normalised_width: int | None = None
    scale: tuple[float, float] | None = None
    position: Position = "random"
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    evaluation_scale: float = 0.875
    mirror: bool = True
    share: int = 1
    mean: Mean | RGB = "crop"
    std: Std | RGB = "none"
    noise: Noise = "eigenvalue"
    noise_sigma: float = 0.1
    noise_rescale: float = 1.0
    noise_epochs: int | None = None
    affine: Affine | None = None
    elastic: Elastic | None = None
    policy: Policy | None = None
    jitter: Jitter | None = None
    grey: float = 0.0
    blur: Blur | None = None
    erasing: Erasing | None = None
    channels: Channels = 3
    mixing: Mixing | None = None
    hooks: tuple[Hook, ...] = ()

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        for name, choices, least in (("mean", Mean, -1e4), ("std", Std, 1e-3)):
            if isinstance(getattr(self, name), str):
                one_of(name, getattr(self, name), get_args(choices))
            else:
                _check_rgb(name, getattr(self, name), get_args(choices), least)
        one_of("noise", self.noise, get_args(Noise))
        _check_crop(self.crop)
        for name, low, high in (("pad", 0, 1024), ("background", 0, 255), ("channels", 1, 3)):
            whole_number(name, getattr(self, name), low, high)
        if self.normalised_width is not None:
            whole_number("normalised_width", self.normalised_width, 1, 65535)
        one_of("position", self.position, get_args(Position))
        for name, low, high in (("share", 1, 2**31 - 1), ("noise_epochs", 0, 2**32 - 1)):
            if getattr(self, name) is not None or name == "share":
                whole_number(name, getattr(self, name), low, high)
        number_within("noise_sigma", self.noise_sigma, 0, 1e6)
        number_within("noise_rescale", self.noise_rescale, 1e-3, 1e3)
        number_within("evaluation_scale", self.evaluation_scale, 1e-3, 1)
        number_within("grey", self.grey, 0, 1)
        for name, *kinds in PARTS:
            if not isinstance(getattr(self, name), (*kinds, type(None))):
                words = " or ".join(f"{kind.__name__}(…)" for kind in kinds)
                raise AlexprepError(f"{name} {getattr(self, name)!r} is neither None nor {words}")
        if not isinstance(self.hooks, tuple) or not all(isinstance(hook, Hook) for hook in self.hooks):
            raise AlexprepError(f"hooks {self.hooks!r} are not a tuple of Hook(…)")
        if not isinstance(self.mirror, bool):
            raise AlexprepError(f"mirror {self.mirror!r} is not True or False")
        if self.scale is not None and not rising(self.scale, 1):
            raise AlexprepError(f"scale {self.scale} is not two shares of the area, 0 < a <= b <= 1")
        if not rising(self.ratio, 1e6):
            raise AlexprepError(f"ratio {self.ratio} is not two bounds of width / height, 0 < a <= b <= 1,000,000")
        if self.crop is None and (self.scale is not None or self.windowed_mean):
            raise AlexprepError("scale, and mean crop or centre, need a crop: the size that comes out")
        if self.scale is not None and self.windowed_mean:
            raise AlexprepError(
                f"mean {self.mean!r} belongs to crops that are not resized: with scale, use channel, imagenet or none"
            )
        if self.pad and (self.crop is None or self.scale is not None or self.windowed_mean):
            raise AlexprepError(
                f"pad {self.pad} goes with a crop that is not resized, and a mean that is no image: leave out scale, and use mean channel or none"
            )
        self._check_resampling()

    def _check_resampling(self) -> None:
        """Refuses what is not done where all warps are one resampling."""
        if self.elastic is None and self.normalised_width is None:
            return
        asked = "elastic" if self.elastic is not None else "normalised_width"
        others = [name for name in ("policy", "jitter", "blur", "erasing") if getattr(self, name) is not None]
        others += ["grey"] * (self.grey > 0) + ["hooks"] * bool(self.hooks)
        others += [f"noise {self.noise}"] * (self.noise != "none") + [f"mean {self.mean}"] * self.windowed_mean
        if others:
            raise AlexprepError(f"{asked} does not go with {others[0]}: leave out one of them")
        if self.crop is None:
            raise AlexprepError(f"{asked} needs a crop: give its side")
        if self.affine is not None and self.affine.fill != self.background:
            raise AlexprepError(
                f"affine: fill {self.affine.fill} is not the background, {self.background}, though with {asked} all is one resampling: make them equal"
            )

    @property
    def view(self) -> tuple[int, int] | None:
        """Height and width of the crop, pixels; None where whole images come out."""
        return None if self.crop is None else sides(self.crop)

    def resamples(self, chance: bool) -> bool:
        """Whether all warps are one resampling, by torch after DALI, see `alexprep.pipeline.resampling`; with chance or without."""
        return self.normalised_width is not None or (chance and self.elastic is not None)

    def padded(self, sizes_N2: NDArray[np.integer]) -> NDArray[np.int64]:
        """Heights and widths of images with what is padded: int64 (N, 2)."""
        return np.asarray(sizes_N2, np.int64) + 2 * self.pad

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
        """Whether the dataset's mean image, channel moments or eigenpairs are used."""
        return self.windowed_mean or "channel" in (self.mean, self.std) or self.noise != "none"

    @property
    def keeps_bytes(self) -> bool:
        """Whether pixels stay on the scale from 0 to 255, as whole numbers but for what `recolours`."""
        kept = (self.mean, self.std, self.noise, self.erasing, self.mixing) == ("none", "none", "none", None, None)
        return kept and self.channels != 1 and not self.resamples(chance=True)

    @property
    def recolours(self) -> bool:
        """Whether colours change by jitter or grey scale, to values between whole grey levels."""
        return self.jitter is not None or self.grey > 0

    def __str__(self) -> str:
        """What differs from the paper's, in a line: the same for all augmentations that do the same."""
        return _worded(self)

    def without_chance(self) -> Augmentation:
        """What evaluation shows of an image: the same crop, in the centre, less the same mean, and nothing else."""
        return Augmentation(
            crop=self.crop,
            pad=self.pad,
            background=self.background,
            normalised_width=self.normalised_width,
            channels=self.channels,
            scale=self.scale,
            position="centre",
            ratio=self.ratio,
            evaluation_scale=self.evaluation_scale,
            mirror=False,
            mean=self.mean,
            std=self.std,
            noise="none",
        )

    def noisy(self, epoch: int) -> bool:
        """Whether an epoch has colour noise."""
        return self.noise != "none" and (self.noise_epochs is None or epoch < self.noise_epochs)


def _worded(value: Any) -> str:
    """A value in words that are the same for 1 and 1.0, of a part only what differs from its defaults; a hook by its name."""
    if isinstance(value, Hook):
        return f"{value.name} after {value.after}"
    if is_dataclass(value) and not isinstance(value, type):
        own = {
            each.name: getattr(value, each.name) for each in fields(value) if getattr(value, each.name) != each.default
        }
        return f"{type(value).__name__}({', '.join(f'{name}={_worded(each)}' for name, each in own.items())})"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_worded, value))})"
    return repr(int(value)) if isinstance(value, float) and value.is_integer() else repr(value)


PARTS = (
    *(("affine", Affine), ("elastic", Elastic), ("policy", RandAugment, TrivialAugment), ("jitter", Jitter)),
    *(("blur", Blur), ("erasing", Erasing), ("mixing", Mixing)),
)

PRESETS = {
    "paper": Augmentation(),
    "2012-code": Augmentation(share=32, mean="centre", noise="stdev", noise_rescale=1.1, noise_epochs=67),
    "resized": Augmentation(scale=(0.08, 1.0), mean="imagenet", std="imagenet", noise="none"),
    "none": Augmentation(crop=None, mirror=False, mean="none", noise="none"),
}


def augmentation_named(name: str) -> Augmentation:
    """One of `PRESETS`: "paper"; "2012-code", the released code's; "resized", usual for later networks; "none", whole images."""
    one_of("augmentation", name, PRESETS)
    return PRESETS[name]


@dataclass(frozen=True)
class Draws:
    """The random parameters of N samples.

    Attributes:
        windows_N4: int64 (N, 4), what is cut out of each padded image: top row, left column, height, width, pixels.
        mirror_N: bool (N,), whether the crop is reflected left to right.
        alpha_N3: float64 (N, 3), standard normal, one for each principal axis.
        more: what else the augmentation draws, one entry a sample: "affine", see `alexprep.pipeline.geometry.warp`; "elastic", see
            `draw_elastic` there; "sigma", see
            `alexprep.pipeline.colour.blurred`; "recolouring", see `recolour` there; "erased", see `alexprep.pipeline.geometry.erased`;
            "policy0.kind" and so on, the operations of a policy, see `alexprep.pipeline.policies.Operation`; "pair", "weight" and
            "exchanged", see `alexprep.pipeline.mixing.draw_mixing`; "hook0.0" and so on, a hook's numbers, uniform on (0, 1). What is not in it is not done.
    """

    windows_N4: NDArray[np.int64]
    mirror_N: NDArray[np.bool_]
    alpha_N3: NDArray[np.float64]
    more: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def only(self, chosen: NDArray[np.bool_] | list[int]) -> Draws:
        """Those of some samples, in the order in which they are chosen."""
        more = {name: values[chosen] for name, values in self.more.items()}
        return Draws(self.windows_N4[chosen], self.mirror_N[chosen], self.alpha_N3[chosen], more)

    def operations(self) -> list[dict[str, NDArray[Any]]]:
        """Those of a policy, in the order in which they are done."""
        turns = sum(name.endswith(".kind") for name in self.more)
        parts = [f"policy{turn}." for turn in range(turns)]
        return [
            {name.removeprefix(part): values for name, values in self.more.items() if name.startswith(part)}
            for part in parts
        ]


def draw(
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    rows_N: NDArray[np.int64],
    sizes_N2: NDArray[np.integer],
    positions_N: NDArray[np.int64] | None = None,
) -> Draws:
    """Draws the random parameters of samples: a pure function of (seed, epoch, row), whoever computes it and with which others.

    A crop's corner is uniform over all positions: 33 x 33 for 224 of 256 pixels, as in the 2012 code (section 4.1 of the paper
    says "2048 x", for 32 x 32 x 2).

    Args:
        augmentation: what is drawn, and within which bounds.
        seed: of the run, 0 to 2**63 - 1.
        epoch: 0 to 2**32 - 1.
        rows_N: int64 (N,), the samples' rows.
        sizes_N2: integer (N, 2), their images' heights and widths, pixels, at least the crop's where nothing is resized.
        positions_N: int64 (N,), their places in the epoch's order; needed with `augmentation.share` and `augmentation.mixing`.

    Returns:
        The parameters, in the order of `rows_N`. Corners and mirrors are exact on any machine; normals, and the windows of
        `augmentation.scale`, depend on the platform's log, exp and cos in their last bit.

    Raises AlexprepError where there are no positions, and `augmentation.share` is above 1 or `augmentation.mixing` on.
    """
    keys = rows = np.asarray(rows_N, np.int64)
    if positions_N is None and (augmentation.share > 1 or augmentation.mixing is not None):
        needing = "mixing" if augmentation.mixing is not None else f"share {augmentation.share}"
        raise AlexprepError(f"{needing} needs the places in the epoch's order: give positions_N")
    if augmentation.share > 1:
        keys = np.asarray(positions_N, np.int64) // augmentation.share
    if augmentation.share == 1:  # at once, which is nearly as fast as one of them
        geometry, noise = np.moveaxis(words_of(seed, epoch, rows, np.array([GEOMETRY, NOISE])), 2, 0)
    else:
        geometry, noise = words_of(seed, epoch, keys, SHARED), words_of(seed, epoch, rows, NOISE)
    sizes = augmentation.padded(sizes_N2)
    views = sizes if augmentation.view is None else np.broadcast_to(np.array(augmentation.view, np.int64), sizes.shape)
    if augmentation.crop is None:
        windows = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
    elif augmentation.position == "centre":
        windows = centred(augmentation, sizes_N2).windows_N4
    elif augmentation.scale is None:
        corners = (below(geometry[n], sizes[:, n] - views[:, n] + 1) for n in range(2))
        windows = np.stack([*corners, *views.T], axis=1)
    else:
        windows = _resized_windows(augmentation, seed, epoch, keys, sizes)
    mirror = (geometry[2] >> np.uint64(31)).astype(bool) & augmentation.mirror
    words = functools.partial(words_of, seed, epoch, rows)
    more = _draw_more(augmentation, views, words)
    if augmentation.mixing is not None and positions_N is not None and len(rows):
        height, width = views[0].tolist()
        more |= draw_mixing(augmentation.mixing, seed, epoch, np.asarray(positions_N, np.int64), height, width)
    return Draws(windows, mirror, normals(noise), more)


def _draw_more(augmentation: Augmentation, views_N2: NDArray[np.int64], words: Words) -> dict[str, NDArray[Any]]:
    """`Draws.more` of samples whose views have these heights and widths."""
    more: dict[str, NDArray[Any]] = {}
    if augmentation.affine is not None:
        more["affine"] = draw_affine(augmentation.affine, views_N2, words)
    if augmentation.elastic is not None and augmentation.view is not None:
        more["elastic"] = draw_elastic(augmentation.elastic, augmentation.view, words)
    if augmentation.policy is not None:
        for turn, operation in enumerate(draw_policy(augmentation.policy, views_N2, words)):
            more |= {f"policy{turn}.{name}": values for name, values in operation.items()}
    if augmentation.blur is not None:
        more["sigma"] = draw_sigmas(augmentation.blur, words)
    if augmentation.recolours:
        more["recolouring"] = draw_recolouring(augmentation.jitter, augmentation.grey, words)
    if augmentation.erasing is not None:
        more["erased"] = draw_erased(augmentation.erasing, views_N2, words)
    for number, hook in enumerate(augmentation.hooks):
        for n in range(hook.numbers):
            more[f"hook{number}.{n}"] = unit(words(HOOK + _HOOK_WORDS * number + n // 4)[n % 4])
    return more


def centred(augmentation: Augmentation, sizes_N2: NDArray[np.integer]) -> Draws:
    """Gives an evaluation's parameters, without chance: the centre window, no mirror, no noise. For the arguments see `draw`."""
    sizes = augmentation.padded(sizes_N2)
    windows = _in_the_centre(sizes, _evaluation_sides(augmentation, sizes))
    return Draws(windows, np.zeros(len(sizes), bool), np.zeros((len(sizes), 3)))


def ten_windows(augmentation: Augmentation, sizes_N2: NDArray[np.integer]) -> NDArray[np.int64]:
    """Gives the windows of the paper's ten test views (section 4.1), the four corners and the centre: int64 (N, 5, 4).

    Each is seen as it is, then all five once more reflected. The order is the 2012 code's.

    >>> ten_windows(Augmentation(crop=224), np.array([[256, 256]]))[0, :, :2].tolist()
    [[0, 0], [0, 32], [16, 16], [32, 0], [32, 32]]
    """
    sizes = augmentation.padded(sizes_N2)
    sides = _evaluation_sides(augmentation, sizes)
    slack = sizes - sides
    places = [(0, 0), (0, 2), (1, 1), (2, 0), (2, 2)]  # in halves of the slack
    corners = [np.stack([slack[:, n] * place[n] // 2 for n in range(2)], axis=1) for place in places]
    return np.stack([np.concatenate([corner, sides], axis=1) for corner in corners], axis=1)


def augment(
    image_HWC: NDArray[np.uint8],
    draws: Draws,
    n: int,
    augmentation: Augmentation,
    statistics: Statistics | None,
    epoch: int = 0,
) -> NDArray[np.float64]:
    """What becomes of one image in training: the definition, which the DALI graph equals. Pairs of these are mixed by `mixing.mixed`.

    Args:
        image_HWC: uint8 (H, W, 3), RGB, the decoded image.
        draws: of a batch, from `draw`.
        n: which sample of the batch this is.
        augmentation: what is done, and what was drawn for.
        statistics: of the dataset; None where `augmentation.needs_statistics` is false.
        epoch: some augmentations lose their noise after some epochs.

    Returns:
        float64 (H, W, channels) of the crop's size, grey levels about 0, or what `augmentation.std` makes of them.

    Raises AlexprepError where statistics are needed and there are none, or there is a hook, which has no definition in numpy.
    """
    if augmentation.hooks:
        raise AlexprepError(f"hook {augmentation.hooks[0].name} is a function over DALI nodes, which numpy cannot call")
    if statistics is None and augmentation.needs_statistics:
        raise AlexprepError(
            "this augmentation needs statistics: give those of the dataset, from alexprep.shards.read_statistics"
        )
    top, left, height, width = draws.windows_N4[n].tolist()
    edge = augmentation.pad
    image = np.pad(image_HWC, ((edge, edge), (edge, edge), (0, 0)), constant_values=augmentation.background)
    image = image[top : top + height, left : left + width]
    if augmentation.scale is not None and augmentation.crop is not None:
        image = resize(image, augmentation.crop)
    pixels = _changed(image, draws, n, augmentation) - channel_means(statistics, augmentation)
    mean_window: NDArray[np.float64] | float = 0.0
    if augmentation.windowed_mean and statistics is not None:
        mean = statistics.mean_image()
        top, left = mean_corners(augmentation, draws.windows_N4[n : n + 1], mean.shape[:2])[0].tolist()
        mean_window = mean[top : top + height, left : left + width]
    if augmentation.mean == "crop":
        pixels = pixels - mean_window
    if draws.mirror_N[n]:
        pixels = pixels[:, ::-1]
    if augmentation.mean == "centre":  # the 2012 code subtracts after the reflection
        pixels = pixels - mean_window
    noisy = augmentation.noisy(epoch)
    if noisy and statistics is not None:
        pixels = pixels + colour_shifts(draws.alpha_N3[n : n + 1], statistics, augmentation)[0]
    pixels = pixels / channel_stdevs(statistics, augmentation)
    pixels = pixels / augmentation.noise_rescale if noisy else pixels
    if augmentation.erasing is not None and "erased" in draws.more:
        pixels = erased(pixels, draws.more["erased"][n], augmentation.erasing.value)
    return pixels.mean(axis=2, keepdims=True) if augmentation.channels == 1 else pixels[..., : augmentation.channels]


def _changed(image_HWC: NDArray[np.uint8], draws: Draws, n: int, augmentation: Augmentation) -> NDArray[np.float64]:
    """The view before its mean is subtracted, on the 0-255 scale: all that changes shapes, sharpness and colours."""
    image, more = image_HWC, draws.more
    if augmentation.resamples(chance=True):
        return _resampled(image, draws, n, augmentation)
    if augmentation.affine is not None and "affine" in more:
        image = warp(image, more["affine"][n], augmentation.affine.fill, nearest=False)
    if augmentation.policy is not None:
        for operation in draws.operations():
            image = operated(image, operation, n, augmentation.policy.fill)
    if "sigma" in more:
        image = blurred(image, more["sigma"][n])
    return recolour(image, more["recolouring"][n]) if "recolouring" in more else image.astype(np.float64)


def _resampled(image_HWC: NDArray[np.uint8], draws: Draws, n: int, augmentation: Augmentation) -> NDArray[np.float64]:
    """The view after its one resampling, on the 0-255 scale."""
    background, width = augmentation.background, augmentation.normalised_width
    maps = [draws.more["affine"][n] if "affine" in draws.more else np.eye(2, 3)]
    if width is not None:
        maps.append(digit_map(image_HWC, width, background))
    noise = draws.more["elastic"][n] if "elastic" in draws.more else None
    sigma = 1.0 if augmentation.elastic is None else augmentation.elastic.sigma
    return resampled(image_HWC.astype(np.float64), maps, noise, sigma, np.full(3, float(background)))


def noise_stdevs(statistics: Statistics, augmentation: Augmentation) -> NDArray[np.float64]:
    """The colour noise's standard deviation along each principal axis: float64 (3,), grey levels; 0 where there is no noise."""
    if augmentation.noise == "none":
        return np.zeros(3)
    if augmentation.noise == "stdev":
        return augmentation.noise_sigma * statistics.stdevs
    return augmentation.noise_sigma * (statistics.eigenvalues / 255**2) * 255


def colour_shifts(
    alpha_N3: NDArray[np.float64], statistics: Statistics, augmentation: Augmentation
) -> NDArray[np.float64]:
    """The shift of each sample's RGB: float64 (N, 3), grey levels. One for all pixels of an image (paper, section 4.1)."""
    return (alpha_N3 * noise_stdevs(statistics, augmentation)) @ statistics.eigenvectors.T


def channel_means(statistics: Statistics | None, augmentation: Augmentation) -> NDArray[np.float64]:
    """What is subtracted from all pixels of R, G and B: float64 (3,), grey levels; 0 where a window of the mean image is."""
    if augmentation.mean == "channel" and statistics is not None:
        return statistics.channel_means
    return _rgb(augmentation.mean, MEANS, 0.0)


def channel_stdevs(statistics: Statistics | None, augmentation: Augmentation) -> NDArray[np.float64]:
    """What R, G and B are divided by: float64 (3,), grey levels."""
    if augmentation.std == "channel" and statistics is not None:
        return statistics.channel_stdevs
    return _rgb(augmentation.std, STDS, 1.0)


def _rgb(chosen: str | RGB, named: Mapping[str, RGB], usual: float) -> NDArray[np.float64]:
    return np.array(named.get(chosen, (usual,) * 3) if isinstance(chosen, str) else chosen, np.float64)


def _check_rgb(name: str, values: Any, choices: tuple[str, ...], least: float) -> None:
    """Refuses what is no three numbers."""
    if not isinstance(values, tuple | list) or len(values) != 3:
        raise AlexprepError(
            f"{name} {values!r} is neither one of {', '.join(choices)} nor three grey levels, of R, G and B"
        )
    for value in values:
        number_within(name, value, least, 1e4)


def mean_corners(
    augmentation: Augmentation, windows_N4: NDArray[np.integer], mean_size: tuple[int, ...]
) -> NDArray[np.int64]:
    """Top row and left column of the windows of a mean image of that height and width that belong to crops' windows: int64 (N, 2)."""
    if augmentation.mean == "crop":
        return windows_N4[:, :2].astype(np.int64)
    return (np.array(mean_size) - windows_N4[:, 2:].astype(np.int64)) // 2


_ATTEMPTS = 10  # at a window that fits; torchvision's number


def _evaluation_sides(augmentation: Augmentation, sizes_N2: NDArray[np.int64]) -> NDArray[np.int64]:
    """Height and width of the windows that evaluation cuts."""
    if augmentation.view is None:
        return sizes_N2.astype(np.int64)
    view = np.array(augmentation.view, np.int64)
    if augmentation.scale is None:
        return np.broadcast_to(view, sizes_N2.shape)
    # The largest window of the crop's proportions: one side is the image's, the other follows.
    largest = np.minimum(sizes_N2, sizes_N2[:, ::-1] * view / view[::-1])
    return np.maximum(1, np.rint(largest * augmentation.evaluation_scale).astype(np.int64))


def _in_the_centre(sizes_N2: NDArray[np.int64], sides_N2: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([(sizes_N2 - sides_N2) // 2, sides_N2], axis=1)


def _resized_windows(
    augmentation: Augmentation, seed: int, epoch: int, keys: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """torchvision's rule: ten attempts at an area and a ratio, at a uniform place; then the largest centred window.

    Samples of the same key have the same attempts, each in the size of its own image.
    """
    assert augmentation.scale is not None
    low, high = augmentation.scale
    logs = np.log(np.array(augmentation.ratio))
    tallest = np.minimum(sizes[:, 0], np.rint(sizes[:, 1] / augmentation.ratio[0]).astype(np.int64))
    widest = np.minimum(sizes[:, 1], np.rint(sizes[:, 0] * augmentation.ratio[1]).astype(np.int64))
    windows = _in_the_centre(sizes, np.maximum(1, np.stack([tallest, widest], axis=1)))
    open_rows = np.arange(len(keys))
    for attempt in range(_ATTEMPTS):
        if not len(open_rows):
            break
        words = words_of(seed, epoch, keys[open_rows], ATTEMPT + attempt)
        left = sizes[open_rows]
        area = left.prod(axis=1) * (low + (high - low) * unit(words[0]))
        ratio = np.exp(logs[0] + (logs[1] - logs[0]) * unit(words[1]))
        height, width = (np.rint(np.sqrt(part)).astype(np.int64) for part in (area / ratio, area * ratio))
        fits = (height > 0) & (height <= left[:, 0]) & (width > 0) & (width <= left[:, 1])
        slack = np.maximum(1, left - np.stack([height, width], axis=1) + 1)
        found = np.stack([below(words[2], slack[:, 0]), below(words[3], slack[:, 1]), height, width], axis=1)
        windows[open_rows[fits]] = found[fits]
        open_rows = open_rows[~fits]
    return windows
