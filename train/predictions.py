"""Opens trained networks and asks them about the images of a split: one pass, all nets in step, only the batch at hand in memory.

What becomes of their predictions (means, errors, weights) is in `alexprep.train.evaluation` and `alexprep.train.ensemble`.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import nn

from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.errors import AlexprepError
from alexprep.train import checkpoint, run_dir
from alexprep.train.metrics import StepTimer, log_probabilities
from alexprep.train.precision import Precision, memory
from alexprep.train.recipes import Recipe, recipe_of
from alexprep.train.run_dir import Place, saved_checkpoint
from alexprep.train.user_code import (
    check_named,
    comparable,
    describe_layers,
    is_reference,
    memory_format_of,
    references,
)

# The parts of a recipe that outputs of a trained network depend on; the others belong to the training that is over.
NETWORK = ("network", "width")
PIXELS = ("crop", "scale", "evaluation_scale", "mean", "std")
EvaluationViews = Literal["centre", "ten"]


@dataclass(frozen=True)
class Net:
    """A trained network in evaluation mode.

    Attributes:
        run: its folder.
        step: optimizer steps of its checkpoint.
        epochs: whole epochs of it.
        recipe: with which it was trained.
        options: of its run, as config.json has them.
        data: the data set that it was trained on, as its run says.
        data_digest: of that data set, hex sha256.
        classes: how many it tells apart.
        network: on its device.
        skipped: a sentence for every damaged checkpoint that is newer than the one used.
    """

    run: Path
    step: int
    epochs: int
    recipe: Recipe
    options: dict[str, Any]
    data: Path
    data_digest: str
    classes: int
    network: nn.Module
    skipped: list[str]

    @property
    def name(self) -> str:
        """RUN@STEP, as on the command line."""
        return f"{self.run.name}@{self.step}"

    def training_data(self) -> dict[str, Any] | None:
        """dataset.json of the data that it was trained on; None where that is gone or has changed."""
        try:
            dataset = read_dataset(self.data)
        except (AlexprepError, OSError):
            return None
        return dataset if dataset["digest"] == self.data_digest else None


def open_net(place: Place, device: torch.device, recipe: str | None = None, model: str | None = None) -> Net:
    """Reads a checkpoint and makes its network.

    Args:
        place: of the checkpoint.
        device: for the network.
        recipe: the user's own recipe, if its run has one.
        model: likewise the user's own network.

    Raises:
        AlexprepError: there is no such checkpoint, it is damaged, or its recipe is another by now.
    """
    run = place.run
    config = run_dir.read_config(run)
    saved, skipped = saved_checkpoint(place)
    identity = saved.facts["identity"]
    made_by = recipe_of(_named(run, config["options"], recipe, model))
    then, now = (checkpoint.with_defaults(told, made_by) for told in (identity["recipe"], made_by.describe()))
    if changes := checkpoint.differences(_shown(then), _shown(now)):
        raise AlexprepError(f"recipe {made_by.name} has changed since {run} was trained: {checkpoint.some_of(changes)}")
    network = made_by.make_network(identity["classes"], identity["seed"])
    if "layers" in identity and (changes := _changed_layers(saved, network)):
        raise AlexprepError(f"the network has changed since {run} was trained: {checkpoint.some_of(changes)}")
    network.load_state_dict(checkpoint.saved_weights(saved))
    network.to(device=device, memory_format=memory_format_of(network, memory(device).format))  # type: ignore[call-overload]
    return Net(
        run,
        saved.step,
        saved.facts["position"]["epoch"],
        made_by,
        config["options"],
        Path(config["data"]),
        identity["data_digest"],
        identity["classes"],
        network.eval(),
        skipped,
    )


def data_of(nets: list[Net]) -> Path:
    """Finds the data set that all nets were trained on.

    Raises:
        AlexprepError: they were trained on different ones, or it is not where it was.
    """
    first = nets[0]
    for net in nets[1:]:
        if net.data_digest != first.data_digest:
            raise AlexprepError(
                f"{first.name} and {net.name} were trained on different data: data was {first.data}, is {net.data}; "
                f"data_digest was {first.data_digest[:12]}…, is {net.data_digest[:12]}…. Name the data to evaluate on with --data"
            )
    return run_dir.still_there(first.run, first.data)


def check_classes(net: Net, data: Path, dataset: dict[str, Any]) -> str | None:
    """Makes sure that a net's outputs mean what the labels of a data set mean.

    Args:
        net: to be evaluated.
        data: the folder of the data set to evaluate on, for messages.
        dataset: its dataset.json.

    Returns:
        A sentence where it cannot be known: the data that the net was trained on is gone.

    Raises:
        AlexprepError: number or names of the classes differ.
    """
    classes = dataset["classes"]
    if len(classes) != net.classes:
        raise AlexprepError(
            f"{data} has {len(classes)} classes, {net.run} was trained on {net.classes}: name its data with --data"
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
    parts = {name: recipe.get(name) for name in NETWORK}
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
) -> Generator[Predicted, None, None]:
    """Goes through a split once, all nets in step: batch after batch, what every net says of it. To be closed if left early.

    Args:
        nets: in evaluation mode. Those that see the same pixels share a loader.
        means: a net: the data set whose mean it is shown images without; None for that of the split.
        open_loader: opens the split, given `augmentation` and, for another mean than that of the split, `statistics`.
        precision: that the nets compute in.
        timer: counts images, the time waiting for data, and all other time (the caller's work on a batch included).
        progress: called with images done and images in all.

    Raises:
        AlexprepError: a net gives NaN, or the loaders do not give the same images.
    """
    seen = [
        {"augmentation": net.recipe.augmentation} | ({} if mean is None else {"statistics": mean})
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
            rows = _rows(list(batches.values()), done)
            if rows is None:
                return
            logs = [_logs(net, batches[n].images, precision) for net, n in zip(nets, same, strict=True)]
            yield Predicted(torch.stack(logs, dim=1), batches[0].labels, rows)
            done += len(rows)
            timer.count(len(rows), wait_seconds, timer.lap())
            if progress is not None:
                progress(done, loaders[0].samples)


def _rows(batches: list[Any], done: int) -> torch.Tensor | None:
    """The rows of the batches, None at the end, after making sure that all loaders gave the same images."""
    if all(batch is None for batch in batches):
        return None
    seen = [None if batch is None else (_indices(batch, done), batch.labels.cpu()) for batch in batches]
    for other in seen[1:]:
        if seen[0] is None or other is None or not all(map(torch.equal, seen[0], other)):
            raise AlexprepError(
                f"after {done} images the loaders of two nets give different ones: is the data set being changed? "
                "`alexprep verify` tells"
            )
    assert seen[0] is not None
    return seen[0][0]


def _indices(batch: Any, done: int) -> torch.Tensor:
    found: torch.Tensor | None = getattr(batch, "indices", None)
    return torch.arange(done, done + len(batch.labels)) if found is None else found


def _logs(net: Net, images: torch.Tensor, precision: Precision) -> torch.Tensor:
    try:
        return log_probabilities(net.network, images, precision)
    except AlexprepError as error:
        raise AlexprepError(f"{net.name}: {error}") from None


class StoredPredictions:
    """Keeps predictions on disk, float32 in a file without a name, to go through them again: 1.4 GB for 7 nets on 50,000 images of ImageNet.

    The rounding is 6e-8 of a log-probability. The file lies in the system's folder for such files ($TMPDIR).
    """

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (`close` closes it)
        self._batches = 0

    def add(self, predicted: Predicted) -> None:
        """Takes in a batch.

        Raises:
            AlexprepError: the disk is full.
        """
        packed = io.BytesIO()
        for tensor in predicted._replace(logs=predicted.logs.float()):
            np.save(packed, tensor.cpu().numpy(), allow_pickle=False)
        try:
            self._file.write(packed.getbuffer())
            self._file.flush()
        except OSError as error:
            raise AlexprepError(
                f"predictions cannot be kept in {tempfile.gettempdir()} ({error.strerror}): point TMPDIR at a disk with more "
                "room, or find the weights on another split with --weights-from"
            ) from None
        self._batches += 1

    def __iter__(self) -> Iterator[Predicted]:
        """The batches again, on the CPU."""
        self._file.seek(0)
        for _ in range(self._batches):
            logs, labels, rows = (torch.from_numpy(np.load(self._file, allow_pickle=False)) for _ in range(3))
            yield Predicted(logs.double(), labels, rows)

    def close(self) -> None:
        """Gives the disk back."""
        self._file.close()


class GrowingArray:
    """Grows along its last dimension: an array of what going through images leaves of each, in one piece of memory.

    A list with an array a batch would do as well, were it not for the allocator: those small arrays come to lie between the large ones of the
    networks and keep their memory from being used again, a gigabyte in 50,000 images.

    >>> labels = GrowingArray(np.int64)
    >>> labels.add(np.arange(3)), labels.add(np.arange(2))
    (None, None)
    >>> labels.array.tolist(), len(labels)
    ([0, 1, 2, 0, 1], 5)
    """

    def __init__(self, dtype: DTypeLike) -> None:
        """Nothing yet; what is added first decides the other dimensions."""
        self._dtype = dtype
        self._space: NDArray[Any] = np.empty(0, dtype)
        self._count = 0

    def __len__(self) -> int:
        """Of the last dimension."""
        return self._count

    @property
    def array(self) -> NDArray[Any]:
        """(…, length); it is valid until more is added."""
        return self._space[..., : self._count]

    def add(self, values: NDArray[Any]) -> None:
        """Appends (…, n): all dimensions but the last are the same each time."""
        end = self._count + values.shape[-1]
        if end > self._space.shape[-1] or not self._count:
            space = np.empty((*values.shape[:-1], max(4096, end + end // 2)), self._dtype)
            space[..., : self._count] = self.array
            self._space = space
        self._space[..., self._count : end] = values
        self._count = end
