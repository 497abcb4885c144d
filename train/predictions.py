"""What several nets say of the same images: one pass over a split, all nets in step, nothing kept but the batch at hand."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import nn

from alexprep.pipeline.augmentation import Augmentation
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.errors import AlexprepError
from alexprep.train import checkpoint, run_dir
from alexprep.train.data import memory
from alexprep.train.metrics import Pace, log_probabilities
from alexprep.train.precision import Precision
from alexprep.train.recipes import Recipe, recipe_of
from alexprep.train.run_dir import Place, saved_checkpoint
from alexprep.train.training_state import load_weights
from alexprep.train.user_code import (
    check_named,
    comparable,
    describe_layers,
    is_reference,
    references,
)

# -------------------- An array that grows by columns.


class Columns:
    """What a pass over images leaves of each, in one piece of memory.

    A list with an array a batch would do as well, were it not for the allocator: those small arrays settle between the large ones of the
    networks and keep their memory from being used again, a gigabyte in 50,000 images.

    >>> columns = Columns(np.int64)
    >>> columns.add(np.arange(3)), columns.add(np.arange(2))
    (None, None)
    >>> columns.array.tolist(), len(columns)
    ([0, 1, 2, 0, 1], 5)
    """

    def __init__(self, dtype: DTypeLike) -> None:
        """No column yet; the first ones added decide how many rows there are."""
        self._dtype = dtype
        self._space: NDArray[Any] = np.empty(0, dtype)
        self._count = 0

    def __len__(self) -> int:
        """How many columns."""
        return self._count

    @property
    def array(self) -> NDArray[Any]:
        """(…, columns); it is valid until columns are added."""
        return self._space[..., : self._count]

    def add(self, columns: NDArray[Any]) -> None:
        """Appends (…, n): all dimensions but the last are the same each time."""
        end = self._count + columns.shape[-1]
        if end > self._space.shape[-1] or not self._count:
            space = np.empty((*columns.shape[:-1], max(4096, end + end // 2)), self._dtype)
            space[..., : self._count] = self.array
            self._space = space
        self._space[..., self._count : end] = columns
        self._count = end


# -------------------- Trained networks, ready to be evaluated: RUN or RUN@STEP → a network and what must be known of it.


# The parts of a recipe that outputs of a trained network depend on; the others belong to the training that is over.
NETWORK = ("network", "width")
PIXELS = ("crop", "scale", "evaluation_scale", "mean", "std")


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
    if changes := checkpoint.differences(_shown(identity["recipe"]), _shown(made_by.describe())):
        raise AlexprepError(f"recipe {made_by.name} has changed since {run} was trained: {checkpoint.some_of(changes)}")
    network = made_by.make_network(identity["classes"], identity["seed"])
    if "layers" in identity and (changes := _changed_layers(saved, network)):
        raise AlexprepError(f"the network has changed since {run} was trained: {checkpoint.some_of(changes)}")
    load_weights(network, saved)
    network.to(device=device, memory_format=memory(device).format)  # type: ignore[call-overload]
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
    """The data set that all nets were trained on.

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


# -------------------- What several nets say of the same images: one pass over a split, all nets in step, nothing kept but the batch at hand.


EvaluationViews = Literal["centre", "ten"]


class Predicted(NamedTuple):
    """What K nets say of N images, on the nets' device."""

    logs: torch.Tensor  # float64 (N, K, classes): log-probabilities, nats
    labels: torch.Tensor  # int64 (N,); -1 where unknown
    rows: torch.Tensor  # int64 (N,), on the CPU: rows of the split's index


class Reader(NamedTuple):
    """A loader, and the nets that see what it gives."""

    loader: Any  # with the behaviour of `alexprep.pipeline.loader.Loader`
    nets: list[int]


@contextlib.contextmanager
def open_readers(
    nets: Sequence[Net],
    data: Path,
    split: str,
    views: EvaluationViews,
    batch_size: int,
    threads: int | None,
    device: torch.device,
    statistics: Sequence[Path | None],
    open_loader: Callable[..., Any],
) -> Iterator[list[Reader]]:
    """A loader for each augmentation among the nets: those that see the same pixels share the decoding.

    Args:
        nets: each sees images as its own recipe cuts them.
        data: the data set's folder.
        split: of it.
        views: one centre crop, or the paper's ten views.
        batch_size: crops at a time.
        threads: of each loader, for decoding; None for what the loader takes.
        device: of the nets.
        statistics: a net: the data set whose mean it is shown images without; None for `data`'s own.
        open_loader: opens a split.
    """
    shared: list[tuple[tuple[Augmentation, Path | None], list[int]]] = []
    for number, net in enumerate(nets):
        seen = net.recipe.augmentation, statistics[number]
        members = next((members for other, members in shared if other == seen), None)
        if members is None:
            shared.append((seen, [number]))
        else:
            members.append(number)
    with contextlib.ExitStack() as stack:
        readers = []
        for (augmentation, source), members in shared:
            extra = {} if source is None else {"statistics": source}
            loader = open_loader(
                data,
                split,
                batch_size=batch_size if views == "centre" else max(1, batch_size // 10),
                augmentation=augmentation,
                views=views,
                order="sequential",
                device=str(device),
                layout=memory(device).layout,
                threads=threads,
                **extra,
            )
            readers.append(Reader(stack.enter_context(contextlib.closing(loader)), members))
        yield readers


def predictions(
    nets: Sequence[Net],
    readers: Sequence[Reader],
    precision: Precision,
    pace: Pace,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Predicted]:
    """One pass: batch after batch, what every net says of it.

    Args:
        nets: in evaluation mode.
        readers: that together feed each of the nets.
        precision: that they compute in.
        pace: counts images, the time waiting for data, and all other time (the caller's work on a batch included).
        progress: called with images done and images in all.

    Raises:
        AlexprepError: a net gives NaN, or the loaders do not give the same images.
    """
    done = 0
    passes = [iter(reader.loader) for reader in readers]
    pace.lap()
    while True:
        batches: list[Any] = [next(one, None) for one in passes]
        wait_seconds = pace.lap()
        rows = _rows(batches, done)
        if rows is None:
            return
        logs: dict[int, torch.Tensor] = {}
        for batch, (_, members) in zip(batches, readers, strict=True):
            for number in members:
                logs[number] = _logs(nets[number], batch.images, precision)
        yield Predicted(torch.stack([logs[n] for n in range(len(nets))], dim=1), batches[0].labels, rows)
        done += len(rows)
        pace.count(len(rows), wait_seconds, pace.lap())
        if progress is not None:
            progress(done, readers[0].loader.samples)


class Kept:
    """Predictions on disk, float32 in a file without a name, to be gone through again: 1.4 GB for 7 nets on 50,000 images of ImageNet.

    The rounding is 6e-8 of a log-probability. The file lies in the system's folder for such files ($TMPDIR).
    """

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (`close` closes it)
        self._labels, self._rows = Columns(np.int64), Columns(np.int64)
        self._sizes: list[int] = []
        self._shape: tuple[int, ...] = ()

    def add(self, predicted: Predicted) -> None:
        """Takes in a batch.

        Raises:
            AlexprepError: the disk is full.
        """
        self._labels.add(predicted.labels.cpu().numpy())
        self._rows.add(predicted.rows.numpy())
        self._sizes.append(len(predicted.rows))
        self._shape = tuple(predicted.logs.shape[1:])
        try:
            self._file.write(predicted.logs.float().cpu().numpy().tobytes())
            self._file.flush()
        except OSError as error:
            raise AlexprepError(
                f"predictions cannot be kept in {tempfile.gettempdir()} ({error.strerror}): point TMPDIR at a disk with more "
                "room, or find the weights on another split with --weights-from"
            ) from None

    def __iter__(self) -> Iterator[Predicted]:
        """The batches again, on the CPU."""
        self._file.seek(0)
        end = 0
        for size in self._sizes:
            first, end = end, end + size
            shape = (size, *self._shape)
            values = np.frombuffer(self._file.read(4 * int(np.prod(shape))), np.float32).reshape(shape)
            labels, rows = (torch.from_numpy(columns.array[first:end]) for columns in (self._labels, self._rows))
            yield Predicted(torch.from_numpy(values.astype(np.float64)), labels, rows)

    def close(self) -> None:
        """Gives the disk back."""
        self._file.close()


def _rows(batches: list[Any], done: int) -> torch.Tensor | None:
    """The rows of the batches, None at the end, after making sure that all loaders gave the same images."""
    if all(batch is None for batch in batches):
        return None
    rows = [_indices(batch, done) for batch in batches]
    if len(batches) == 1:
        return rows[0]
    labels = [None if batch is None else batch.labels.cpu() for batch in batches]
    for (one_row, one_label), (other_row, other_label) in itertools.pairwise(zip(rows, labels, strict=True)):
        same = one_row is not None and other_row is not None and torch.equal(one_row, other_row)
        if not same or one_label is None or other_label is None or not torch.equal(one_label, other_label):
            raise AlexprepError(
                f"after {done} images the loaders of two nets give different ones: is the data set being changed? "
                "`alexprep verify` tells"
            )
    return rows[0]


def _indices(batch: Any, done: int) -> torch.Tensor | None:
    if batch is None:
        return None
    found: torch.Tensor | None = getattr(batch, "indices", None)
    return torch.arange(done, done + len(batch.labels)) if found is None else found


def _logs(net: Net, images: torch.Tensor, precision: Precision) -> torch.Tensor:
    try:
        return log_probabilities(net.network, images, precision)
    except AlexprepError as error:
        raise AlexprepError(f"{net.name}: {error}") from None
