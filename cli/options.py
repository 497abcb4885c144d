"""Options that several commands share."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from alexprep.shards.sources import LAYOUTS

if TYPE_CHECKING:
    _Parameter = click.ParamType[Any]
else:
    _Parameter = click.ParamType  # older releases of click have it without a type

FC = TypeVar("FC", bound=Callable[..., Any] | click.Command)

AT_LEAST_1 = click.IntRange(min=1)
CACHE_LIMIT = "alexprep.cache_limit"  # in click's meta
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Seconds(click.FloatRange):
    """A time above 0 and at most a year; not NaN, which click takes for a number within any range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A float."""
        seconds = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value} is no number of seconds", param, ctx)
        return seconds


class Box(_Parameter):
    """The side of a square, or WIDTHxHEIGHT, which becomes (height, width)."""

    name = "pixels"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """An int, or two."""
        found = re.fullmatch(r"(-?[0-9]{1,9})(?:[xX×](-?[0-9]{1,9}))?", str(value))
        if found is None:
            self.fail(f"{value} is neither a side, such as 256, nor width and height, such as 320x240", param, ctx)
        width, height = found.groups()
        return int(width) if height is None or height == width else (int(height), int(width))


BOX = Box()
SECONDS = Seconds(min=0, max=3.2e7, min_open=True)


def folder(value: str) -> Path:
    """A folder on a disk, or a `UPath` for a URL that fsspec understands; a tar, where other people's tars are read."""
    from alexprep.shards.storage import folder_at

    if not value:
        raise click.BadParameter("the name is empty: name a folder, . for this one")
    found = folder_at(value)
    if found.exists() and not found.is_dir() and not value.endswith(".tar"):
        raise click.BadParameter(f"{value} is a file, not a folder")
    return found


picture_option = click.option(
    "--picture",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.png",
    help="Write a contact sheet too: a row a photo, at most 100.",
)


def check_picture(picture: Path) -> None:
    """Refuses a picture's file that could not be written in the end, before minutes of work."""
    if picture.suffix.lower() != ".png":
        raise click.BadParameter(f"{picture} does not end in .png: the contact sheet is a PNG", param_hint="--picture")
    if not picture.absolute().parent.is_dir():
        raise click.BadParameter(f"{picture.parent} is no folder: make it first", param_hint="--picture")


def local_folder(value: str) -> Path:
    """A folder on a disk."""
    if "://" in value:
        words = "is no local folder: this command works on files here and there, so copy what lies there to a disk"
        raise click.BadParameter(f"{value} {words}")
    return folder(value)


def data_folder_option(name: str, text: str, local: bool = False) -> Callable[[FC], FC]:
    """An option for the data set's folder, with its default and environment variable."""
    return click.option(
        name,
        type=local_folder if local else folder,
        metavar="FOLDER",
        default="alexprep-data",
        envvar="ALEXPREP_DATA",
        show_default=True,
        show_envvar=True,
        help=text,
    )


def on_command_line(name: str) -> bool:
    """Whether an option of the present command was given, not taken from the environment or its default."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def data_folder(command: Callable[..., Any]) -> Callable[..., Any]:
    """The data set's folder as an argument, or as an option with an environment variable; the command receives it as `data`."""

    @functools.wraps(command)
    def with_data(*args: Any, data_argument: Path | None, data: Path, **kwargs: Any) -> Any:
        if data_argument is not None and on_command_line("data"):
            raise click.UsageError(f"DATA {data_argument} and --data {data} are both given: give one.")
        return command(*args, data=data_argument or data, **kwargs)

    with_data = data_folder_option("--data", "The data set's folder.")(with_data)
    return click.argument("data_argument", metavar="[DATA]", type=folder, required=False)(with_data)


def source_options(command: FC) -> FC:
    """Options that say what SOURCE is; the command receives them as `layout`, `choices` and `class_names`."""
    for option in reversed(_SOURCE_OPTIONS):
        command = option(command)

    @functools.wraps(command)
    def with_choices(
        *args: Any, split_folders: Any, class_depth: Any, columns: Any, unlabelled: bool, **kwargs: Any
    ) -> Any:
        from alexprep.shards.sources.base import Choices

        return command(*args, choices=Choices(split_folders, class_depth, columns, unlabelled or None), **kwargs)

    return with_choices  # type: ignore[return-value]


class SplitFolders(_Parameter):
    """The split folders below SOURCE: split=FOLDER,… or "none"."""

    name = "split=folder,…|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of (split, folder); empty for "none"."""
        if not isinstance(value, str):
            return value
        if value == "none":
            return ()
        found: list[tuple[str, str]] = []
        for part in re.split(",(?=(?:train|val|test)=)", value):  # folders may have commas in their names
            split, _, place = part.partition("=")
            if split not in ("train", "val", "test") or not place:
                self.fail(f"{part!r} is not train=FOLDER, val=FOLDER or test=FOLDER", param, ctx)
            if (split, place) in found:
                self.fail(f"{split}={place} is given twice: name each folder once", param, ctx)
            found.append((split, place))
        return tuple(found)


class ClassDepth(_Parameter):
    """How deep the class folders lie: a number from 1, or "leaf"."""

    name = "n|leaf"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """An int, or "leaf"."""
        if value == "leaf" or (isinstance(value, int) and value > 0):
            return value
        if not str(value).isdecimal() or not 1 <= int(value) <= 100:
            self.fail(f"{value!r} is neither a number from 1 to 100 nor leaf", param, ctx)
        return int(value)


class Columns(_Parameter):
    """Which column is for what: image=NAME,label=NAME."""

    name = "use=column,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of (use, column's name). A comma in a name is part of it where no use and "=" follow."""
        if not isinstance(value, str):
            return value
        found: dict[str, str] = {}
        for part in re.split(r",(?=(?:image|path|label|split)=)", value):
            use, _, column = part.partition("=")
            if use not in ("image", "path", "label", "split") or not column:
                self.fail(f"{part!r} is not image=NAME, path=NAME, label=NAME or split=NAME", param, ctx)
            if use in found:
                self.fail(f"{use} is given twice: one column is for it", param, ctx)
            found[use] = column
        return tuple(sorted(found.items()))


class Metadata(_Parameter):
    """What goes along with images: "all", "none", or names with commas between them."""

    name = "all|none|name,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of names, or the word."""
        if not isinstance(value, str) or value in ("all", "none"):
            return value
        names = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
        if not all(names):
            self.fail(f"{value!r} has an empty name: write all, none, or names with commas between them", param, ctx)
        return names


_SOURCE_OPTIONS = (
    click.option("--layout", type=click.Choice(list(LAYOUTS)), help="What SOURCE is.  [default: found by looking]"),
    click.option(
        "--split-folders",
        type=SplitFolders(),
        metavar="train=A,val=B|none",
        help="The folders below SOURCE that are splits, one or more of each; . for SOURCE itself without the others; none: all folders are "
        "classes.  [default: by their names]",
    ),
    click.option(
        "--class-depth",
        type=ClassDepth(),
        metavar="N|leaf",
        help="How many folders below a split the class folders lie; leaf: every folder that holds pictures is a class.  "
        "[default: found by looking]",
    ),
    click.option(
        "--columns",
        type=Columns(),
        default=(),
        metavar="image=A,label=B",
        help="Columns of a table by their names: image holds pictures, path names files, label, split.  [default: found by "
        "looking]",
    ),
    click.option(
        "--unlabelled",
        is_flag=True,
        help="Take all pictures without labels, whatever lies around them: every label is -1, and shards hold no .cls.",
    ),
    click.option(
        "--class-names",
        type=click.Choice(["exact", "folded"]),
        help="Whether names that differ only in case or Unicode form are several classes or one.  [default: ask]",
    ),
)

data_option = data_folder_option("--data", "The data set's folder, or a URL of one, such as s3://….")
local_data_option = data_folder_option("--data", "The data set's folder.", local=True)

runs_option = click.option(
    "--runs",
    type=folder,
    metavar="FOLDER",
    default="runs",
    show_default=True,
    help="Folder of runs, or a URL of one, such as s3://….",
)


def trained_run_options(command: FC) -> FC:
    """Adds what a command needs to find a run, and the user's own code that made it: `runs`, `model` and `recipe`."""
    model = click.option(
        "--model", metavar="FILE.py:FUNCTION", help="Of a run with a network of your own: that network."
    )
    recipe = click.option("--recipe", metavar="FILE.py:FUNCTION", help="Likewise of a recipe file.")
    return model(recipe(runs_option(command)))


trained_data_option = click.option(
    "--data",
    type=folder,
    metavar="FOLDER",
    help="The data set of the training.  [default: where it was]",
)

batch_size_option = click.option("--batch-size", type=AT_LEAST_1, help="Images a step.  [default: the recipe's]")


class Setting(_Parameter):
    """FIELD=VALUE; what there is of these is known where they are used."""

    name = "field=value"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Fields of the recipe that is named before, then the values of one."""
        from alexprep.shards.errors import AlexprepError
        from alexprep.train.recipes import DEFAULT_RECIPE, recipe
        from alexprep.train.settings import completions

        named = ctx.params.get("recipe") or ctx.params.get("name") or DEFAULT_RECIPE
        try:
            found = completions(recipe(named), incomplete)
        except AlexprepError:
            found = completions(recipe(DEFAULT_RECIPE), incomplete)
        return [CompletionItem(each) for each in found]


model_option = click.option(
    "--model",
    metavar="FILE.py:FUNCTION | timm/NAME | torchvision/NAME | columns:LINE | LAYERS.cfg",
    help="A network of your own, of a library, from a line or from a layer file, in place of the recipe's.",
)

settings_option = click.option(
    "--set",
    "settings",
    type=Setting(),
    multiple=True,
    metavar="FIELD=VALUE",
    help="Another value of a recipe's field, such as network.pool=2; repeatable. `alexprep recipes NAME` lists the fields.",
)

threads_option = click.option(
    "--threads",
    type=AT_LEAST_1,
    help="Threads for decoding.  [default: as `alexprep tune` found, or one a core]",
)

# alexprep.train.precision.PRECISIONS, which this list must equal; importing it here would import torch for --help.
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")

precision_option = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Of the network's arithmetic: float32, TF32 (GPUs), or bfloat16 or float16 with float32 weights.  [default: fp32]",
)

_COMPUTING_OPTIONS = (
    precision_option,
    click.option(
        "--channels-last/--no-channels-last",
        default=None,
        help="Whether the values of a pixel lie side by side in memory.  [default: on a CPU; on a GPU in bf16 and fp16]",
    ),
    click.option(
        "--compile/--no-compile",
        default=None,
        help="Compile the steps with torch.compile: a minute or two at the start. It needs g++; on a GPU triton and gcc.",
    ),
)

views_option = click.option(
    "--views",
    type=click.Choice(["centre", "two", "ten"]),
    default="centre",
    show_default=True,
    help="Crops an image: the centre; that and its reflection; corners and centre, and theirs.",
)

on_bad_option = click.option(
    "--on-bad",
    type=click.Choice(["error", "skip"]),
    help="What becomes of samples of other people's tars that cannot be used: the end, or left out.  [default: error]",
)

device_option = click.option("--device", help="cpu or cuda.  [default: cuda where there is a GPU]")

_ENGINE_OPTIONS = (
    click.option("--workers", type=AT_LEAST_1, help="Worker processes on this machine.  [default: one a core]"),
    click.option(
        "--engine",
        "engine_name",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="What runs the work: processes here, or a Ray cluster.",
    ),
    click.option(
        "--ray-address",
        help="The cluster's address.  [default: $RAY_ADDRESS, or a Ray of its own for this command]",
    ),
    click.option(
        "--image-seconds",
        type=SECONDS,
        default=60.0,
        show_default=True,
        help="Longest time for one image: then it is rejected, or the run stops where the image cannot even be read.",
    ),
)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say what runs the work; the command receives an `engine`."""

    @functools.wraps(command)
    def with_engine(
        *args: Any, workers: int | None, engine_name: str, ray_address: str | None, image_seconds: float, **kwargs: Any
    ) -> Any:
        from alexprep.shards.worker_pool import LocalEngine, cores

        if engine_name == "ray":
            from alexprep.shards.ray_runner import RayEngine

            if workers is not None:
                raise click.UsageError(
                    "--workers is for --engine local: a Ray cluster uses the CPUs that it was started with."
                )
            return command(*args, engine=RayEngine(ray_address, image_seconds), **kwargs)
        if ray_address is not None:
            raise click.UsageError("--ray-address needs --engine ray.")
        return command(*args, engine=LocalEngine(workers or cores(), image_seconds), **kwargs)

    for option in reversed(_ENGINE_OPTIONS):
        with_engine = option(with_engine)
    return with_engine


class Size(_Parameter):
    """A number of bytes, such as 500MB, 40GB or 1.5TB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        from alexprep.shards.errors import AlexprepError
        from alexprep.shards.shard_cache import bytes_of

        try:
            return bytes_of(str(value))
        except AlexprepError as error:
            self.fail(str(error), param, ctx)


def _be_patient(context: click.Context, option: click.Parameter, seconds: float | None) -> None:
    from alexprep.shards.patience import be_patient

    if seconds is not None:
        be_patient(seconds)


def _use_cache(context: click.Context, option: click.Parameter, folder: str | None) -> None:
    from alexprep.shards.errors import AlexprepError
    from alexprep.shards.shard_cache import check_limit, use_cache

    limit = context.meta.get(CACHE_LIMIT)
    if folder is not None:
        use_cache(folder, limit)
    elif on_command_line("cache_limit"):  # $ALEXPREP_CACHE_LIMIT alone is for commands that are given a cache
        try:
            check_limit(folder, limit)
        except AlexprepError as error:
            raise click.UsageError(error.as_made) from None


patience_option = click.option(
    "--store-patience",
    type=click.FloatRange(0, 1_000_000),
    envvar="ALEXPREP_STORE_PATIENCE",
    show_envvar=True,
    is_eager=True,  # known before a folder is looked for
    expose_value=False,
    callback=_be_patient,
    metavar="SECONDS",
    help="How long a store such as s3:// may be away.  [default: 300]",
)

_STORE_OPTIONS = (
    click.option(
        "--cache",
        type=click.Path(file_okay=False),  # text, since a Path would take the URL out of a URL
        envvar="ALEXPREP_CACHE",
        show_envvar=True,
        expose_value=False,
        callback=_use_cache,
        metavar="FOLDER",
        help="Where shards of a data set in a store are kept on this disk, for all runs.  [default: nowhere]",
    ),
    click.option(
        "--cache-limit",
        type=Size(),
        envvar="ALEXPREP_CACHE_LIMIT",
        show_envvar=True,
        is_eager=True,  # known before --cache is
        expose_value=False,
        callback=lambda context, option, size: context.meta.update({CACHE_LIMIT: size}),
        metavar="SIZE",
        help="Of all shards there: 500MB, 40GB. What came first stays.  [default: the disk's]",
    ),
    patience_option,
)


def store_options(command: FC) -> FC:
    """How a data set in a store is read, by this process and those that it starts."""
    for option in reversed(_STORE_OPTIONS):
        command = option(command)
    return command


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document as the last line of stdout."
)


labels_option = click.option(
    "--labels",
    default="auto",
    show_default=True,
    metavar="auto|sorted|ilsvrc-id|FILE",
    help="How classes are numbered: as the source does, or by sorted name where it does not; by sorted name; by the "
    "devkit's ID; by a file with one class name a line.",
)


class_words_option = click.option(
    "--class-words",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="What classes mean in words, for people: a text of lines CLASS, tab, words.  [default: as lists or a devkit beside the "
    "images say of WordNet IDs]",
)


def computing_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How a training computes: precision, channels_last and compile, each None unless given."""
    for option in reversed(_COMPUTING_OPTIONS):
        command = option(command)
    return command
