"""Networks and recipes of the user's own: their code is found by its name, called, and tried before a training relies on it.

docs/own-nets.md says what is promised. What fails in the user's code is told in one sentence, with the file and line in it that the error
came by. Only what the user names on the command line is ever loaded: what a file on the disk names is not.

What a recipe is, and what it says about a network, is in `alexprep.train.recipes`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import operator
import os
import re
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from inspect import Parameter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from alexprep.shards.errors import TRACEBACK, AlexprepError
from alexprep.train.layer_file_lines import ENDING
from alexprep.train.lazy_module import LazyModule
from alexprep.train.model_libraries import NetworkInput, library_factory
from alexprep.train.models.cifar import PIXEL_DEVIATION
from alexprep.train.models.columns import COLUMNS, ColumnNet

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import nn

    from alexprep.train import layer_files
    from alexprep.train.distributed import tensor_parallel
    from alexprep.train.models import pools_and_dropconnect
else:
    torch, F, nn = map(LazyModule, ("torch", "torch.nn.functional", "torch.nn"))
    layer_files = LazyModule("alexprep.train.layer_files")
    tensor_parallel = LazyModule("alexprep.train.distributed.tensor_parallel")
    pools_and_dropconnect = LazyModule("alexprep.train.models.pools_and_dropconnect")

MODEL, RECIPE, HOOK = "--model", "--recipe", "--hook"
CLASSES = ("classes", "num_classes", "n_classes")  # names under which factories take the number of classes
IN_CHANNELS = ("in_channels", "in_chans")  # and of the images' channels
IMAGES = 2  # that a network is tried with
CONTIGUOUS = "alexprep_needs_contiguous"  # attribute of a network that cannot take images with the channels last
REFERENCE = re.compile(r"(?P<place>.+\.py|[\w.]+)(:(?P<name>[\w.]+))?")  # FILE.py, FILE.py:NAME, MODULE, MODULE:NAME
INSTALLED = {"site-packages", "dist-packages"}  # folders of libraries

_imported: set[str] = set()  # modules that lie beside the file that was run last, and came in with it


@dataclass(frozen=True)
class UserNetwork:
    """A user's factory, called as alexprep's own are; the network that it makes is tried before anyone relies on it."""

    factory: Callable[..., Any]
    title: str  # MODULE:NAME
    name: str  # how the user named it, for messages
    for_any_recipe: bool = False  # what the recipe says of layers that the network lacks was said of another network
    pixels: NetworkInput | None = None  # of a library's network, or one from a line: what it is shown
    training: Mapping[str, Any] | None = None  # of a layer file: fields of the recipe that it sets

    @property
    def short_name(self) -> str:
        """What a run of it is called: the module's or the library's name of it, without folders and tags."""
        place = self.title.partition(":")[0]
        return place.rpartition("/")[2].partition(".")[0] if "/" in place else place.rpartition(".")[2]

    def __call__(self, classes: int, crop: int, *, seed: int, width: float, in_channels: int = 3) -> nn.Module:
        """The network on the CPU, with initial weights that depend on the seed alone; torch's random numbers go on as if it had not been made.

        Raises:
            AlexprepError: the factory cannot be called so or fails, or what it returns is no network from float32 (N, in_channels, crop,
                crop) to finite logits (N, classes).
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            with self.errors():
                network = call_factory(self.factory, classes, crop, seed, width, in_channels)
                if not isinstance(network, nn.Module):
                    raise AlexprepError(f"it returned a {type(network).__name__}, not a torch.nn.Module")
            images = _noise(in_channels, crop)
            network.eval()
            with self.errors(f", shown images {tuple(images.shape)}"), torch.no_grad():
                # Channels last, as they lie in training on a CPU. Lazy layers get their shapes here.
                try:
                    outputs = network(images.contiguous(memory_format=torch.channels_last))
                except RuntimeError:  # perhaps of an old `view`, where `flatten` or `reshape` would do
                    outputs = network(images)
                    setattr(network, CONTIGUOUS, True)
                    network.register_forward_pre_hook(lambda _, given: tuple(each.contiguous() for each in given))
                _check_logits(outputs, classes)
        network.train()
        return network

    def try_training(
        self, network: nn.Module, classes: int, crop: int, ranks: int, scheme: str, in_channels: int = 3
    ) -> list[str]:
        """Takes one training step, without its update, with a network that is not used afterwards.

        Returns:
            The names of the parameters that can be trained and got no gradient.

        Raises:
            AlexprepError: the step fails, a checkpoint would not hold all that it changes, or the ranks would not train as one device.
        """
        for layer in network.modules():
            if isinstance(layer, (*tensor_parallel.DROPOUTS, pools_and_dropconnect.Drawing)):
                layer.eval()  # ranks share its random numbers, and no others
        images = _noise(in_channels, crop)
        before = {name: buffer.clone() for name, buffer in network.named_buffers()}
        with torch.random.fork_rng(devices=[]), self.errors(f", in a training step on images {tuple(images.shape)}"):
            state = torch.get_rng_state()
            logits = network(images)
            draws = not torch.equal(state, torch.get_rng_state())
            _check_logits(logits, classes)
            F.cross_entropy(logits, torch.arange(IMAGES) % classes).backward()  # type: ignore[no-untyped-call]
        buffers = dict(network.named_buffers())
        changed = [name for name in buffers if name not in before or not _equal(buffers[name], before[name])]
        idle = [name for name, weight in network.named_parameters() if weight.requires_grad and weight.grad is None]
        with self.errors():
            _check_saved(network, changed)
            own = [*changed, "random numbers (those of nn.Dropout are shared)"] if draws else changed
            if ranks > 1 and own:
                raise AlexprepError(
                    f"in training each rank would have its own {', '.join(own)}: train it on one device"
                )
        if ranks > 1 and scheme != "towers":  # in which every rank has all images
            with self.errors(", on an empty batch, which a rank may get at an epoch's end"):
                network(images[:0]).sum().backward()
        return idle

    def describe(self) -> dict[str, Any]:
        """What a resumed run must have in common: the factory's name, what it tells of itself; `describe_layers` says the rest."""
        own = getattr(self.factory, "describe", None)
        return {"factory": self.title} | ({} if own is None or inspect.isclass(self.factory) else {"options": own()})

    def errors(self, when: str = "", only_own: bool = False) -> contextlib.AbstractContextManager[None]:
        """Inside the block, errors become one sentence about this network; see `errors_in_one_sentence`."""
        return errors_in_one_sentence(f"{self.name}{when}", only_own)


def call_factory(
    factory: Callable[..., Any], classes: int, crop: int, seed: int, width: float, in_channels: int = 3
) -> Any:
    """What a user's factory returns.

    Parameters called crop and seed get what their names say; so do width where it has no default or the recipe scales its network, and
    in_channels (timm's in_chans) where it has no default or the images do not have three. The number of classes goes to the one called classes (num_classes, n_classes), else to the first one, and the crop to the next without a
    default. All others keep their defaults.

    >>> call_factory(lambda n, side, depth=5: (n, side, depth), 10, 32, 0, 1.0)
    (10, 32, 5)
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        raise AlexprepError(f"it is a {type(factory).__name__}, not a function that makes a network: make(classes)")
    signature = inspect.signature(factory)
    parameters = signature.parameters
    values: dict[str, Any] = {name: value for name, value in (("crop", crop), ("seed", seed)) if name in parameters}
    if width != 1 or ("width" in parameters and parameters["width"].default is Parameter.empty):
        values["width"] = width
    for name in IN_CHANNELS:
        if name in parameters and (in_channels != 3 or parameters[name].default is Parameter.empty):
            values[name] = in_channels
    free = [
        name
        for name, parameter in parameters.items()
        if parameter.kind <= Parameter.POSITIONAL_OR_KEYWORD and name not in ("crop", "seed", "width", *IN_CHANNELS)
    ]
    # The factories of torchvision take it as one of **kwargs.
    first = next((name for name in CLASSES if name in parameters), next(iter(free), "num_classes"))
    values[first] = classes
    sides = [name for name in free if name != first and parameters[name].default is Parameter.empty]
    if sides and "crop" not in parameters:
        values[sides[0]] = crop
    if any(name not in parameters for name in values):
        return factory(**values)
    bound = inspect.BoundArguments(signature, OrderedDict(values))
    return factory(*bound.args, **bound.kwargs)


# A network is tried.


def memory_format_of(network: nn.Module, wanted: torch.memory_format) -> torch.memory_format:
    """How a network's weights shall lie: as wanted, unless it was found to work on contiguous tensors alone."""
    return torch.contiguous_format if getattr(network, CONTIGUOUS, False) else wanted


def has_batch_norm(network: nn.Module) -> bool:
    """Whether a layer normalises over the images of a batch."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())


def fails_on(network: nn.Module, images: torch.Tensor) -> bool:
    """Whether a network in training cannot take these images, (N, C, H, W).

    Of one image alone batch normalisation of one value a channel has no variance, and what squeezes all dimensions of 1 loses the first.
    """
    tried = copy.deepcopy(network)
    with torch.random.fork_rng([images.device] if images.is_cuda else []), torch.no_grad():
        try:
            return bool(tried(images).ndim != 2)
        except (ValueError, RuntimeError, IndexError, AssertionError):
            return True


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
    return one.shape == other.shape and bool(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all())


def _noise(channels: int, crop: int) -> torch.Tensor:
    """Images as a loader gives them: noise as deviating as photographs are on the 0-255 scale, their mean subtracted."""
    return torch.randn(IMAGES, channels, crop, crop, generator=torch.Generator().manual_seed(0)) * PIXEL_DEVIATION


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
    from alexprep.shards.dataset_format import versions  # with all that reads and writes data sets

    if "layers" not in identity or made_with.get("torch") == versions("torch")["torch"]:
        return identity
    bare = {name: {**layer, "settings": "of another torch"} for name, layer in identity["layers"].items()}
    return identity | {"layers": bare}


def check_named(
    began: Mapping[str, Any], recipe: str | None, model: str | None, run: Path, hook: str | None = ""
) -> None:
    """Makes sure that the user names the code that a run was trained with: what a file on the disk names is never run by itself.

    Raises:
        AlexprepError: by its options, `began`, the run was trained with code of the user's own, which is not named now. A hook "" is not
            needed.
    """
    named = ((RECIPE, began["recipe"], recipe), (MODEL, began.get("model"), model), (HOOK, began.get("hook"), hook))
    for option, then, now in named:
        if then is not None and is_reference(then) and now is None:
            raise AlexprepError(
                f"{run} was trained with {option} {then}: add that to the command, or say where the file is now; code is only run "
                "where you name it"
            )


# What `--model` names.


class Form(NamedTuple):
    """One way to name a network; all that is known of it, but for the words of `--help`, which a test compares, and its row in docs/own-nets.md."""

    written: str  # in messages
    is_meant: Callable[[str], object]  # whether a reference is of this form
    factory: Callable[[str], Any]  # with its `title`, and `pixels()` and `training()` where they say something
    lasting: Callable[[str], str] = str  # a reference so that it means the same in any folder


def _lasting(reference: str) -> str:
    layers = layer_files.layer_file(reference)
    return f"{layers.definition}:{layers.parameters}"


# The first that is meant; all else is code, FILE.py:FUNCTION or MODULE:FUNCTION.
FORMS = (
    Form("timm/NAME, torchvision/NAME", library_factory, library_factory),
    Form("columns:LINE", lambda text: text.startswith(COLUMNS), lambda text: ColumnNet(text.removeprefix(COLUMNS))),
    Form("LAYERS.cfg", lambda text: text.endswith(ENDING), lambda text: layer_files.layer_file(text), _lasting),
)


def form_of(reference: str) -> Form | None:
    """The form of what `--model` names; None for code."""
    return next((form for form in FORMS if form.is_meant(reference)), None)


def user_network(reference: str) -> UserNetwork:
    """The factory that `--model` names; AlexprepError where there is none."""
    name = f"{MODEL} {reference}"
    if (form := form_of(reference)) is None:
        return UserNetwork(*load(reference, MODEL, "make"), name, for_any_recipe=True)
    made = form.factory(reference)
    more = {what: getattr(made, what)() for what in ("pixels", "training") if hasattr(made, what)}
    return UserNetwork(made, made.title, name, for_any_recipe=True, **more)


# Code is found by its name.


def is_reference(text: str) -> bool:
    """Whether a text names code (FILE.py, FILE.py:NAME, MODULE:NAME) and is no plain name and none of `FORMS`."""
    return (":" in text or text.endswith(".py")) and form_of(text) is None


def absolute(reference: str, option: str) -> str:
    """A reference so that it means the same in any folder: the path of a file is made absolute."""
    if option == MODEL and (form := form_of(reference)):
        return form.lasting(reference)
    place, name = _place_and_name(reference, option)
    file = str(Path(place).expanduser().resolve()) if place.endswith(".py") else place
    return f"{file}:{name}" if name else file


def references(recipe: str | None, model: str | None) -> tuple[str | None, str | None]:
    """What a user named as recipe and model, so that it means the same in any folder: the paths of files are made absolute."""
    if recipe is not None and is_reference(recipe):
        recipe = absolute(recipe, RECIPE)
    return recipe, None if model is None else absolute(model, MODEL)


def load(reference: str, option: str, default: str = "") -> tuple[Any, str]:
    """Runs the named file anew, or imports the named module, and takes the named object out of it.

    Where none is named, that is `default`, or the only function that the code defines.

    Returns:
        The object, and its MODULE:NAME wherever that lies.

    Raises:
        AlexprepError: there is no such file, module or object, or running it failed; the message begins with `option`.
    """
    place, name = _place_and_name(reference, option)
    file = Path(place).expanduser().resolve() if place.endswith(".py") else None
    if file is not None and not file.is_file():
        raise AlexprepError(f"there is no file {file}: say where it is with {option} FILE.py:FUNCTION")
    with errors_in_one_sentence(f"{option} {reference}"):
        module = importlib.import_module(place) if file is None else _run(file)
        if not name:
            own = [each for each, value in vars(module).items() if each[0] != "_" and _is_defined_in(module, value)]
            # A usual name is meant, unless it is alexprep's own `recipe`, which the file imported.
            usual = getattr(vars(module).get(default), "__module__", None) or ""
            meant = default in vars(module) and not usual.startswith("alexprep.")
            name = own[0] if not meant and len(own) == 1 else default
        return operator.attrgetter(name)(module), f"{_package(file)[1] if file else place}:{name}"


@contextlib.contextmanager
def errors_in_one_sentence(what: str, only_own: bool = False) -> Iterator[None]:
    """Inside the block, an exception becomes an AlexprepError of one sentence: `what`, the file and line in the user's code, and how.

    With `only_own`, exceptions that did not come by way of the user's code are left alone; and all are where the environment variable
    ALEXPREP_TRACEBACK is set.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        lines = [
            f"{frame.f_code.co_filename}, line {line}"
            for frame, line in traceback.walk_tb(error.__traceback__)
            if _is_users(frame.f_globals.get("__name__", ""), frame.f_code.co_filename)
        ]
        if os.environ.get(TRACEBACK) or (only_own and not lines):
            raise
        kind = "" if isinstance(error, AlexprepError) else type(error).__name__
        words = next(iter(str(error).splitlines()), "")
        raise AlexprepError(": ".join(part for part in (what, *lines[-1:], kind, words) if part)) from error


def _is_users(module: str, file: str) -> bool:
    """Whether a module is the user's own code: neither alexprep's nor Python's nor a library's."""
    top = module.partition(".")[0]
    return top not in ("alexprep", "torch", *sys.stdlib_module_names) and INSTALLED.isdisjoint(Path(file).parts)


def _is_defined_in(module: ModuleType, value: Any) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _place_and_name(reference: str, option: str) -> tuple[str, str]:
    """The file or module, and the name of what is meant in it, "" where there is none. A module of this folder is its file."""
    parts = REFERENCE.fullmatch(reference)
    if parts is None:
        *others, last = (form.written for form in FORMS)
        more = f", {', '.join(others)} or {last}" if option == MODEL else ""
        raise AlexprepError(
            f"{option} {reference!r} names no Python code: write FILE.py:FUNCTION or MODULE:FUNCTION{more}"
        )
    place, name = parts["place"], parts["name"] or ""
    if not place.endswith(".py"):
        stem = Path.cwd().joinpath(*place.split("."))
        place = next((str(file) for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()), place)
    return place, name


def _package(file: Path) -> tuple[Path, str]:
    """The folder that a file's imports begin at, and its module's name from there: packages around it count."""
    names = [] if file.name == "__init__.py" else [file.stem]
    folder = file.parent
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(names)


def _run(file: Path) -> ModuleType:
    """The file as a module, run anew, with its folder first among those that it imports from, and afterwards last.

    What the file before it imported from its own folder is forgotten: another folder may have a module of the same name.
    """
    for name in _imported:
        sys.modules.pop(name, None)
    folder, dotted = _package(file)
    known, writes = set(sys.modules), sys.dont_write_bytecode
    others = [each for each in sys.path if each != str(folder)]
    sys.path[:] = [str(folder), *others]
    sys.dont_write_bytecode = True  # compiled files are told apart by whole seconds: a quick edit would not be seen
    try:
        if "." in dotted or file.name == "__init__.py":
            return importlib.import_module(dotted)
        # Under a name of its own, so that a file called like a library is not taken for it.
        spec = spec_from_file_location(f"alexprep_own_{file.stem}", file)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look there
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path[:] = [*others, str(folder)]  # for what a function imports when it is called
        sys.dont_write_bytecode = writes
        for name in sys.modules.keys() - known:
            source = getattr(sys.modules[name], "__file__", None) or ""
            if Path(source).is_relative_to(folder) and _is_users(name, source):
                _imported.add(name)
