"""What several nets say of the same images: one pass over a split, all nets in step, nothing kept but the batch at hand."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from alexprep.pipeline.augmentation import Augmentation
from alexprep.shards.errors import AlexprepError
from alexprep.train.data import memory
from alexprep.train.evaluation.columns import Columns
from alexprep.train.evaluation.nets import Net
from alexprep.train.evaluation.sums import Pace
from alexprep.train.metrics import log_probabilities
from alexprep.train.precision import Precision

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
