"""Opens trained networks and asks them about the images of a split: one pass, all nets in step, only the batch at hand in memory.

What becomes of their predictions (means, errors, weights) is in `alexprep.train.evaluation` and `alexprep.train.ensemble`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import nn

from alexprep.pipeline.dali_graph import VIEWS
from alexprep.shards.any_dataset import dataset_facts
from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import folder_at
from alexprep.train import checkpoint, run_dir
from alexprep.train.metrics import StepTimer, log_probabilities
from alexprep.train.precision import Precision, memory
from alexprep.train.recipes import Recipe
from alexprep.train.run_dir import Place, saved_checkpoint
from alexprep.train.settings import recipe_of
from alexprep.train.user_code import (
    check_named,
    comparable,
    describe_layers,
    is_reference,
    memory_format_of,
    references,
)

# The parts of a recipe that outputs of a trained network depend on; the others belong to the training that is over.
NETWORK_FIELDS = ("network", "width", "evaluation_crop")
PIXELS = ("crop", "pad", "background", "normalised_width", "channels", "scale", "evaluation_scale", "mean", "std")
EvaluationViews = Literal["centre", "two", "ten"]


@dataclass(frozen=True)
class Net:
    """A trained network in evaluation mode, on its device."""

    run: Path
    step: int  # optimizer steps of its checkpoint
    epochs: int  # whole epochs of it
    recipe: Recipe  # with which it was trained
    options: dict[str, Any]  # of its run, as config.json has them
    data: Path  # the data set that it was trained on, as its run says
    data_digest: str  # of that data set, hex sha256
    classes: int
    network: nn.Module
    skipped: list[str]  # a sentence for every damaged checkpoint that is newer than the one used

    @property
    def name(self) -> str:
        """RUN@STEP, as on the command line."""
        return f"{self.run.name}@{self.step}"

    def training_data(self) -> dict[str, Any] | None:
        """The facts of the data that it was trained on; None where that is gone or has changed."""
        try:
            dataset = dataset_facts(self.data)
        except (AlexprepError, OSError):
            return None
        return dataset if dataset["digest"] == self.data_digest else None


def open_net(place: Place, device: torch.device, recipe: str | None = None, model: str | None = None) -> Net:
    """Reads a checkpoint and makes its network; `recipe` and `model` name the user's own code, if its run has any."""
    run = place.run
    config = run_dir.read_config(run)
    saved, skipped = saved_checkpoint(place)
    identity = saved.facts["identity"]
    made_by = recipe_of(_named(run, config["options"], recipe, model), began=identity["recipe"])
    then, now = (checkpoint.with_defaults(told, made_by) for told in (identity["recipe"], made_by.describe()))
    if changes := checkpoint.differences(_shown(then), _shown(now)):
        raise AlexprepError(f"recipe {made_by.name} has changed since {run} was trained: {checkpoint.some_of(changes)}")
    network = made_by.make_network(identity["classes"], identity["seed"])
    if "layers" in identity and (changes := _changed_layers(saved, network)):
        raise AlexprepError(f"the network has changed since {run} was trained: {checkpoint.some_of(changes)}")
    checkpoint.check_layers(saved, network.state_dict(), f"the network of recipe {made_by.name}")
    network.load_state_dict(checkpoint.final_weights(saved))
    network.to(device=device, memory_format=memory_format_of(network, memory(device).format))  # type: ignore[call-overload]
    return Net(
        run,
        saved.step,
        saved.facts["position"]["epoch"],
        made_by,
        config["options"],
        folder_at(config["data"]),
        identity["data_digest"],
        identity["classes"],
        network.eval(),
        skipped,
    )


def images_at_once(crops: int, views: EvaluationViews) -> int:
    """How many images have so many crops, at least one."""
    return max(1, crops // VIEWS[views])


def data_of(nets: list[Net]) -> Path:
    """Finds the data set that all nets were trained on, if it is one and where it was."""
    first = nets[0]
    for net in nets[1:]:
        if net.data_digest != first.data_digest:
            raise AlexprepError(
                f"{first.name} and {net.name} were trained on different data: data was {first.data}, is {net.data}; "
                f"data_digest was {first.data_digest[:12]}…, is {net.data_digest[:12]}…. Name the data to evaluate on with --data"
            )
    return run_dir.still_there(first.run, first.data)


def check_classes(net: Net, data: Path, dataset: dict[str, Any]) -> str | None:
    """Makes sure that a net's outputs mean what the labels of a data set mean; `dataset` are its facts.

    A sentence is returned where it cannot be known, since the data that the net was trained on is gone.
    """
    classes = dataset["classes"]
    if len(classes) != net.classes:
        raise AlexprepError(
            f"{data} has {len(classes)} classes, {net.run} was trained on {net.classes}: name the data of its training"
        )
    if dataset["digest"] == net.data_digest:
        return None
    trained = net.training_data()
    if trained is None:
        return (
            f"{net.name} was trained on {net.data}, which is gone or has changed: it has as many classes as {data}, "
            "whether they are the same ones cannot be told"
        )
    changed = [n for n, (old, new) in enumerate(zip(trained["classes"], classes, strict=True)) if old != new]
    if changed:
        old, new = trained["classes"][changed[0]], classes[changed[0]]
        raise AlexprepError(
            f"{data} has other classes than {net.data}, on which {net.run} was trained: {len(changed)} of {len(classes)} labels "
            f"differ, classes[{changed[0]}] was {old!r}, is now {new!r}"
        )
    return None


def _changed_layers(saved: checkpoint.Checkpoint, network: nn.Module) -> list[str]:
    """Where a network of the user's own is not what it was."""
    then, now = ({"layers": made} for made in (saved.facts["identity"]["layers"], describe_layers(network)))
    made_with = saved.facts["versions"]
    return checkpoint.differences(comparable(then, made_with), comparable(now, made_with))


def _named(run: Path, options: dict[str, Any], recipe: str | None, model: str | None) -> dict[str, Any]:
    """A run's options with its user's own code as it is named now."""
    check_named(options, recipe, model, run)
    recipe, model = references(recipe, model)
    own = {
        "recipe": recipe if is_reference(options["recipe"]) else None,
        "model": model if options.get("model") else None,
    }
    return options | {name: reference for name, reference in own.items() if reference is not None}


def _shown(recipe: dict[str, Any]) -> dict[str, Any]:
    """What a described recipe says of its network and of the pixels that it is shown in an evaluation."""
    augmentation = recipe.get("augmentation", {})
    parts = {name: recipe.get(name) for name in NETWORK_FIELDS}
    return parts | {"augmentation": {name: augmentation.get(name) for name in PIXELS}}


class Predicted(NamedTuple):
    """What K nets say of N images, on the nets' device."""

    logs: torch.Tensor  # float64 (N, K, classes): log-probabilities, nats
    labels: torch.Tensor  # int64 (N,); -1 where unknown
    rows: torch.Tensor  # int64 (N,), on the CPU: rows of the split's index


def predictions(
    nets: Sequence[Net],
    means: Sequence[Path | None],
    open_loader: Callable[..., Any],
    precision: Precision,
    timer: StepTimer,
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = 1,
) -> Generator[Predicted, None, None]:
    """Goes through a split once, all nets in step: batch after batch, what every net says of it. To be closed if left early.

    Args:
        nets: in evaluation mode. Those that see the same pixels share a loader.
        means: a net: the data set whose mean it is shown images without; None for that of the split.
        open_loader: opens the split, given `augmentation` and, for another mean than that of the split, `statistics`.
        precision: that the nets compute in.
        timer: counts images, the time waiting for data, and all other time (the caller's work on a batch included).
        progress: called with images done and images in all.
        batch_size: images that every net is shown at a time, see `ask`.

    Raises:
        AlexprepError: a net gives NaN, or the loaders do not give the same images.
    """
    seen = [
        {"augmentation": net.recipe.evaluation_augmentation} | ({} if mean is None else {"statistics": mean})
        for net, mean in zip(nets, means, strict=True)
    ]
    same = [seen.index(pixels) for pixels in seen]  # the first net that sees the same
    done = 0
    with contextlib.ExitStack() as stack:
        loaders = {n: stack.enter_context(contextlib.closing(open_loader(**seen[n]))) for n in dict.fromkeys(same)}
        sources = {n: iter(loader) for n, loader in loaders.items()}
        timer.lap()
        while True:
            batches: dict[int, Any] = {n: next(source, None) for n, source in sources.items()}
            wait_seconds = timer.lap()
            batch = batches[0]
            if any(_differ(batch, other) for other in batches.values()):
                raise AlexprepError(
                    f"after {done} images the loaders of two nets give different ones: is the data set being changed? "
                    "`alexprep verify` tells"
                )
            if batch is None:
                return
            logs = [ask(net, batches[n].images, precision, batch_size) for net, n in zip(nets, same, strict=True)]
            end = done + len(batch.labels)
            rows = getattr(batch, "indices", torch.arange(done, end))
            yield Predicted(torch.stack(logs, dim=1), batch.labels, rows)
            timer.count(end - done, wait_seconds, timer.lap())
            done = end
            if progress is not None:
                progress(done, loaders[0].samples)


def _differ(batch: Any, other: Any) -> bool:
    """Whether two loaders gave different images; None where one of them is at its end."""
    if batch is None or other is None or batch is other:
        return batch is not other
    same_labels = torch.equal(batch.labels, other.labels)
    return not same_labels or not torch.equal(*(getattr(each, "indices", each.labels) for each in (batch, other)))


def ask(net: Net, images: torch.Tensor, precision: Precision, batch_size: int) -> torch.Tensor:
    """Asks a net for the logarithms of its probabilities, as `log_probabilities` gives them.

    Of a batch of one size the same arithmetic is done for each image wherever in it the image stands; of another size the kernels differ,
    and with them the last bits. So a batch that is smaller than `batch_size` is filled up, and an image has the same probabilities to the
    last digit whichever others are asked about with it.

    Raises AlexprepError, with the net's name, where it gives NaN or infinity.
    """
    try:
        return log_probabilities(net.network, filled(images, batch_size), precision)[: len(images)]
    except AlexprepError as error:
        raise AlexprepError(f"{net.name}: {error}") from None


def filled(images: torch.Tensor, count: int) -> torch.Tensor:
    """Repeats the last of some images until there are `count`, in the same memory format; (N, …) -> (count, …)."""
    if not 0 < len(images) < count:
        return images
    rows = torch.arange(count, device=images.device).clamp(max=len(images) - 1)
    if images.is_contiguous():
        return images.index_select(0, rows)
    return images.movedim(-3, -1).index_select(0, rows).movedim(-1, -3)


class GrowingArray:
    """Collects what going through images leaves of each, in one piece of memory.

    A list with an array a batch would do as well, were it not for the allocator: those small arrays come to lie between the large ones of the
    networks and keep their memory from being used again, a gigabyte in 50,000 images.

    >>> labels = GrowingArray(np.int64)
    >>> labels.add(np.arange(3))
    >>> labels.add(torch.arange(2))
    >>> labels.array.tolist(), len(labels)
    ([0, 1, 2, 0, 1], 5)
    """

    def __init__(self, dtype: DTypeLike, *shape: int) -> None:
        """Nothing yet; `shape` are all dimensions but the first, unless what is added first decides them."""
        self._dtype = np.dtype(dtype)
        self._bytes = bytearray()
        self._shape: tuple[int, ...] = shape

    def __len__(self) -> int:
        """Of the first dimension."""
        return len(self.array)

    @property
    def array(self) -> NDArray[Any]:
        """(length, …). While it is in use nothing can be added."""
        return np.frombuffer(self._bytes, self._dtype).reshape(-1, *self._shape)

    def add(self, values: torch.Tensor | NDArray[Any]) -> None:
        """Appends (n, …)."""
        added = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values, self._dtype)
        self._shape = added.shape[1:]
        self._bytes += added.tobytes()
