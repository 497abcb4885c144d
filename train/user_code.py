"""Networks and recipes of the user's own: their code is found by its name, called, and tried before a training relies on it.

docs/own-nets.md says what is promised. What fails in the user's code is told in one sentence, with the file and line in it that the error
came by. Only what the user names on the command line is ever loaded: what a file on the disk names is not.

What a recipe is, and what it says about a network, is in `alexprep.train.recipes`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from inspect import Parameter
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import UninitializedParameter

from alexprep.shards.dataset_format import versions
from alexprep.shards.errors import TRACEBACK, AlexprepError
from alexprep.train.distributed.tensor_parallel import DROPOUTS, Scheme, part_of
from alexprep.train.distributed.world import World
from alexprep.train.models.cifar import PIXEL_DEVIATION

MODEL, RECIPE = "--model", "--recipe"
CLASSES = ("classes", "num_classes", "n_classes")  # names under which factories take the number of classes
FORMS = "a factory is called as make(classes) or make(classes, crop), and gets seed and width where it has them"
BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
IMAGES = 2  # that a network is tried with
CONTIGUOUS = "alexprep_needs_contiguous"  # attribute of a network that cannot take images with the channels last

_roots: set[Path] = set()  # folders that files were loaded from


@dataclass(frozen=True)
class UserNetwork:
    """A user's factory, called as alexprep's own are; the network that it makes is tried before anyone relies on it.

    Attributes:
        factory: a function or class; see `call_factory` for its forms.
        title: MODULE:NAME.
        name: how the user named it, for messages.
        folder: of the user's code; None for an installed library.
        for_any_recipe: whether what a recipe says of layers that the network lacks is left out, since it was made for another network.

    Raises:
        AlexprepError: the factory cannot be called.
    """

    factory: Callable[..., Any]
    title: str
    name: str
    folder: Path | None = None
    for_any_recipe: bool = False

    def __post_init__(self) -> None:
        """Refuses what is no function, with AlexprepError."""
        if not callable(self.factory) or isinstance(self.factory, nn.Module):
            raise AlexprepError(f"{self.name} is a {type(self.factory).__name__}, not a function: {FORMS}")

    def __call__(self, classes: int, crop: int, *, seed: int, width: float) -> nn.Module:
        """The network on the CPU, with initial weights that depend on the seed alone; torch's random numbers go on as if it had not been made.

        Raises:
            AlexprepError: the factory cannot be called so or fails, or what it returns is no network from float32 (N, 3, crop, crop) to
                finite logits (N, classes).
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            with self.errors():
                network = call_factory(self.factory, classes, crop, seed, width)
                if not isinstance(network, nn.Module):
                    raise AlexprepError(f"it returned a {type(network).__name__}, not a torch.nn.Module")
            with self.errors(f", shown images {(IMAGES, 3, crop, crop)}"):
                _show_images(network, classes, crop)
        return network

    def try_training(self, network: nn.Module, classes: int, crop: int, scheme: Scheme, ranks: int) -> list[str]:
        """Takes one training step, without its update, with a network that is not used afterwards.

        Returns:
            The names of the parameters that can be trained and got no gradient.

        Raises:
            AlexprepError: the step fails, a checkpoint would not hold all that it changes, or the ranks would not train as one device.
        """
        network.train()
        for layer in network.modules():
            if isinstance(layer, DROPOUTS):
                layer.eval()  # ranks share its random numbers, and no others
        with self.errors(f", in a training step on images {(IMAGES, 3, crop, crop)}"):
            before = {name: buffer.clone() for name, buffer in network.named_buffers()}
            with torch.random.fork_rng(devices=[]):
                state = torch.get_rng_state()
                logits = network(_noise(crop))
                draws = not torch.equal(state, torch.get_rng_state())
                _check_logits(logits, classes)
                F.cross_entropy(logits, torch.arange(IMAGES) % classes).backward()  # type: ignore[no-untyped-call]
        buffers = dict(network.named_buffers())
        changed = [name for name in buffers if name not in before or not _equal(buffers[name], before[name])]
        idle = [name for name, weight in network.named_parameters() if weight.requires_grad and weight.grad is None]
        with self.errors():
            _check_saved(network, changed)
        if ranks > 1:
            with self.errors(f", on {ranks} ranks"):
                _check_ranks(network, changed, draws, crop, scheme, ranks)
        return idle

    def describe(self) -> dict[str, Any]:
        """What a resumed run must have in common: the factory's name, and what it tells of itself."""
        own = getattr(self.factory, "describe", None)
        return {"factory": self.title} | ({} if own is None or inspect.isclass(self.factory) else {"options": own()})

    def errors(self, when: str = "", only_own: bool = False) -> contextlib.AbstractContextManager[None]:
        """Inside the block, errors become one sentence about this network; see `errors_in_one_sentence`."""
        return errors_in_one_sentence(f"{self.name}{when}", self.folder, only_own)


def user_network(reference: str) -> UserNetwork:
    """The factory that `--model` names; AlexprepError where there is none."""
    found = load(reference, MODEL, "make")
    return UserNetwork(found.value, found.title, f"{MODEL} {reference}", found.folder, for_any_recipe=True)


def call_factory(factory: Callable[..., Any], classes: int, crop: int, seed: int, width: float) -> Any:
    """What a user's factory returns.

    Parameters called classes (num_classes, n_classes), crop and seed get what their names say, wherever they stand; width only where it
    has no default or the recipe scales its network. Where none is called classes, the first other parameter gets the number of classes;
    the next one, if it has no default and none is called crop, gets the crop. All others keep their defaults.

    Raises:
        AlexprepError: its parameters cannot be read, or the recipe scales its network and the factory cannot.
        Exception: whatever it raises; TypeError where a parameter is left without a value.

    >>> call_factory(lambda n, side, depth=5: (n, side, depth), 10, 32, 0, 1.0)
    (10, 32, 5)
    >>> call_factory(lambda *, num_classes=1000, seed: (num_classes, seed), 10, 32, 7, 1.0)
    (10, 7)
    """
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        raise AlexprepError(f"its parameters cannot be read: {FORMS}") from None
    parameters = signature.parameters
    if width != 1 and "width" not in parameters:
        raise AlexprepError(f"the recipe scales its network by {width}, and the factory has no parameter called width")
    needed = [name for name, parameter in parameters.items() if parameter.default is Parameter.empty]
    known: dict[str, Any] = {**dict.fromkeys(CLASSES, classes), "crop": crop, "seed": seed, "width": width}
    values = {name: value for name, value in known.items() if name in parameters}
    if width == 1 and "width" not in needed:
        values.pop("width", None)
    kinds = {name: parameter.kind for name, parameter in parameters.items()}
    others = [name for name, kind in kinds.items() if kind in BY_POSITION and name not in known]
    if not values.keys() & set(CLASSES) and others:
        values[others.pop(0)] = classes
    elif not values.keys() & set(CLASSES):  # as torchvision's factories take it
        values |= {name: {"num_classes": classes} for name, kind in kinds.items() if kind is Parameter.VAR_KEYWORD}
    if others and "crop" not in values and others[0] in needed:
        values[others[0]] = crop
    bound = signature.bind_partial()
    bound.arguments.update(values)
    bound.apply_defaults()
    return factory(*bound.args, **bound.kwargs)


# A network is tried.


def _show_images(network: nn.Module, classes: int, crop: int) -> None:
    """Shows a network two images in evaluation mode, and refuses outputs that are no finite logits. Lazy layers get their shapes here.

    Images and weights lie with the channels last in memory, as they will in training on a CPU. A network that cannot take them so (an old
    `view` where `flatten` or `reshape` would do) is tried with contiguous ones, and gets them ever after.
    """
    training = network.training
    network.eval()
    with torch.no_grad():
        if any(isinstance(weight, UninitializedParameter) for weight in network.parameters()):
            network(_noise(crop))
        try:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            logits = network(_noise(crop).contiguous(memory_format=torch.channels_last))
        except RuntimeError:
            network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            logits = network(_noise(crop))
            setattr(network, CONTIGUOUS, True)
            network.register_forward_pre_hook(lambda _, given: tuple(images.contiguous() for images in given))
    _check_logits(logits, classes)
    network.train(training)


def memory_format_of(network: nn.Module, wanted: torch.memory_format) -> torch.memory_format:
    """How a network's weights shall lie in memory: as wanted, unless it was found to work on contiguous tensors alone."""
    return torch.contiguous_format if getattr(network, CONTIGUOUS, False) else wanted


def _check_saved(network: nn.Module, changed: list[str]) -> None:
    """Refuses a network whose `state_dict()`, which is what a checkpoint holds, lacks what training changes or has what cannot be saved."""
    saved = network.state_dict()
    tensors = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    if foreign := saved.keys() - dict(tensors).keys():
        raise AlexprepError(
            f"state_dict() holds {min(foreign)}, which is neither a parameter nor a buffer, so no checkpoint would hold it: use register_buffer()"
        )
    if lost := [name for name in changed if name not in saved]:
        raise AlexprepError(
            f"training changes the buffer {lost[0]}, which no checkpoint would hold: register it without persistent=False"
        )


def _check_ranks(network: nn.Module, changed: list[str], draws: bool, crop: int, scheme: Scheme, ranks: int) -> None:
    """Refuses a network that several ranks would not train as one device does, or that the scheme cannot split."""
    failure = None
    if scheme != "towers":  # there every rank has all images
        try:
            network(_noise(crop)[:0]).sum().backward()
        except (RuntimeError, ValueError) as error:
            failure = str(error).splitlines()[0]
    part_of(network, scheme, World(0, ranks, torch.device("cpu")))
    if changed:
        raise AlexprepError(
            f"each rank would have its own {', '.join(changed[:3])}, which training changes: train it on one device"
        )
    if draws:
        raise AlexprepError(
            "the network draws random numbers, each rank its own: use nn.Dropout, which ranks share, or train it on one device"
        )
    if failure is not None:
        raise AlexprepError(
            f"the network cannot take an empty batch ({failure}), which a rank may get at an epoch's end: flatten with torch.flatten(x, 1), "
            "or train it on one device"
        )


def _check_logits(outputs: Any, classes: int) -> None:
    wanted = (IMAGES, classes)
    tensor = isinstance(outputs, torch.Tensor)
    if not tensor or outputs.shape != wanted or not outputs.is_floating_point():
        given = f"{str(outputs.dtype)[6:]} {tuple(outputs.shape)}" if tensor else f"a {type(outputs).__name__}"
        raise AlexprepError(f"the network gives {given}, not logits {wanted}")
    if not torch.isfinite(outputs).all():
        raise AlexprepError(
            f"the network gives NaN or infinity for pixels of deviation {PIXEL_DEVIATION:g}: divide them by that first, or begin with smaller weights"
        )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two buffers are the same; NaN, which some have where nothing may be read, equals itself."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _noise(crop: int) -> torch.Tensor:
    """Images as a loader gives them: noise as deviating as photographs are on the 0-255 scale, their mean subtracted."""
    return torch.randn(IMAGES, 3, crop, crop, generator=torch.Generator().manual_seed(0)) * PIXEL_DEVIATION


# A run remembers its network.


def describe_layers(network: nn.Module) -> dict[str, dict[str, str]]:
    """What a network is made of: every layer that has tensors of its own or no layers within. JSON values.

    >>> describe_layers(nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))["1"]
    {'kind': 'Linear', 'settings': 'in_features=3, out_features=2, bias=True', 'tensors': 'weight 2x3, bias 2'}
    """
    told = {}
    for name, layer in network.named_modules():
        own = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
        if own or next(layer.children(), None) is None:
            shapes = [f"{kind} {'x'.join(map(str, tensor.shape)) or '()'}" for kind, tensor in own.items()]
            told[name or "the whole"] = {
                "kind": type(layer).__name__,
                "settings": layer.extra_repr(),
                "tensors": ", ".join(shapes),
            }
    return told


def comparable(identity: dict[str, Any], made_with: Mapping[str, str]) -> dict[str, Any]:
    """A run's identity; without the settings of layers where the run was `made_with` another torch, which may word them otherwise."""
    if "layers" not in identity or made_with.get("torch") == versions("torch")["torch"]:
        return identity
    bare = {name: {**layer, "settings": "of another torch"} for name, layer in identity["layers"].items()}
    return identity | {"layers": bare}


def check_named(began: Mapping[str, Any], recipe: str | None, model: str | None, run: Path) -> None:
    """Makes sure that the user names the code that a run was trained with: what a file on the disk names is never run by itself.

    Raises:
        AlexprepError: by its options, `began`, the run was trained with code of the user's own, which is not named now.
    """
    for option, then, now in ((RECIPE, began["recipe"], recipe), (MODEL, began.get("model"), model)):
        if then is not None and is_reference(then) and now is None:
            raise AlexprepError(
                f"{run} was trained with {option} {then}: add that to the command, or say where the file is now; code is only run "
                "where you name it"
            )


# Code is found by its name.


class Named(NamedTuple):
    """An object that was named, its MODULE:NAME wherever that lies, and the folder of the code (None: it has no file)."""

    value: Any
    title: str
    folder: Path | None


def is_reference(text: str) -> bool:
    """Whether a text names code (FILE.py, FILE.py:NAME, MODULE:NAME) and is no plain name."""
    return ":" in text or text.endswith(".py")


def references(recipe: str | None, model: str | None) -> tuple[str | None, str | None]:
    """What a user named as recipe and model, so that it means the same in any folder; see `resolved`."""
    if recipe is not None and is_reference(recipe):
        recipe = resolved(recipe, RECIPE)
    return recipe, None if model is None else resolved(model, MODEL)


def resolved(reference: str, option: str) -> str:
    """The same reference, understood from any folder: a file's path is made absolute, a module in this folder becomes its file.

    Raises:
        AlexprepError: it is none of FILE.py, FILE.py:NAME, MODULE and MODULE:NAME, or there is no such file; the message names `option`.
    """
    place, name = _parts(reference, option)
    if isinstance(place, str):
        stem = Path.cwd().joinpath(*place.split("."))
        files = [file for file in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py") if file.is_file()]
        if not files:
            return reference
        place = files[0]
    return f"{place.parent.resolve() / place.name}{name and ':'}{name}"


def load(reference: str, option: str, default: str | None = None) -> Named:
    """Runs the named file or imports the named module, and takes the named object out of it.

    A file is run anew each time, with its folder first among those that it imports from; one inside a package (a folder with
    `__init__.py`) is imported as part of it. Where the reference names no object, it is `default`, or the only function there is.

    Raises:
        AlexprepError: there is no such file, module or object, or running it failed; the message begins with `option`.
    """
    place, name = _parts(reference, option)
    said, folder = f"{option} {reference}", None
    if isinstance(place, Path):
        folder, dotted = _package(place)
        with errors_in_one_sentence(said, folder):
            module = _run(place, folder, dotted)
    else:
        spec, dotted = find_spec(place.partition(".")[0]), place
        folder = Path(spec.origin).parent if spec is not None and spec.origin else None
        with errors_in_one_sentence(said, folder):
            module = importlib.import_module(place)
    functions = [
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    there = f"it defines {', '.join(functions) or 'no function'}"
    if not name:
        usual = getattr(module, default or "", None)
        imported = inspect.isfunction(usual) and usual.__module__.startswith("alexprep.")  # alexprep.train.recipe, say
        choices = [default] if default and usual is not None and not imported else functions
        if len(choices) != 1:
            raise AlexprepError(f"{said}: say which function is meant, after a colon: {there}")
        name = choices[0]
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise AlexprepError(f"{said}: {dotted} has no {name!r}: {there}")
        found = getattr(found, part)
    return Named(found, f"{dotted}:{name}", folder)


@contextlib.contextmanager
def errors_in_one_sentence(what: str, folder: Path | None, only_own: bool = False) -> Iterator[None]:
    """Inside the block, an exception becomes an AlexprepError of one sentence: `what`, the file and line in the user's `folder`, and how.

    With `only_own`, exceptions that did not come by way of a file in that folder are left alone; and all are where the environment
    variable ALEXPREP_TRACEBACK is set.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        place = _place(error, folder)
        if os.environ.get(TRACEBACK) or (only_own and place is None):
            raise
        kind = "" if isinstance(error, AlexprepError) else type(error).__name__
        words = error.msg if isinstance(error, SyntaxError) else next(iter(str(error).splitlines()), "")
        raise AlexprepError(": ".join(part for part in (what, place, kind, words) if part)) from error


def _place(error: BaseException, folder: Path | None) -> str | None:
    """File and line of the user's code that an exception last came by; what is installed below its folder is not the user's own."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    place = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        file, module = frame.f_code.co_filename, frame.f_globals.get("__name__", "").partition(".")[0]
        foreign = "site-packages" in file or module == "alexprep" or module in sys.stdlib_module_names
        if folder is not None and not foreign and Path(file).is_relative_to(folder):
            place = f"{file}, line {line}"
    return place


def _parts(reference: str, option: str) -> tuple[Path | str, str]:
    """The file or module, and the name of what is meant in it, "" where there is none."""
    whole = ":" not in reference or reference.endswith(".py")
    place, name = (reference, "") if whole else reference.rsplit(":", 1)
    is_file = place.endswith(".py")
    words = [*([] if is_file else place.split(".")), *([] if whole else name.split("."))]
    if not all(word.isidentifier() for word in words):
        raise AlexprepError(f"{option} {reference!r} names no Python code: write FILE.py:FUNCTION or MODULE:FUNCTION")
    if not is_file:
        return place, name
    file = Path(place).expanduser().absolute()
    if not file.is_file():
        raise AlexprepError(f"there is no file {file}: say where it is with {option} FILE.py:FUNCTION")
    return file, name


def _package(file: Path) -> tuple[Path, str]:
    """The folder that a file's imports begin at, and its module's name from there."""
    names = [] if file.name == "__init__.py" else [file.stem]
    folder = file.parent
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(names)


def _run(file: Path, root: Path, dotted: str) -> ModuleType:
    """The file as a module, run anew: what files before it imported from their folders is forgotten, so that it finds what lies beside it."""
    for name, module in list(sys.modules.items()):
        source, top = str(getattr(module, "__file__", None)), name.partition(".")[0]
        if any(source.startswith((f"{known}/{top}/", f"{known}/{top}.py")) for known in _roots):
            del sys.modules[name]
    if "site-packages" not in root.parts:
        _roots.add(root)
    writes = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # compiled files are told apart by whole seconds: a quick edit would not be seen
    sys.path.insert(0, str(root))
    try:
        if "." in dotted or file.name == "__init__.py":
            return importlib.import_module(dotted)
        # Under a name of its own, so that a file called like a library is not taken for it.
        spec = spec_from_file_location(f"alexprep_own_{dotted}", file)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look there
        spec.loader.exec_module(module)
        return module
    finally:
        sys.dont_write_bytecode = writes
        sys.path.remove(str(root))
        if str(root) not in sys.path:
            sys.path.append(str(root))  # for imports that a function makes when it is called
