"""Batches of a split for torch, epoch after epoch, decoded and augmented by DALI some steps ahead of their use.

`Loader` is the page to read: which samples a step holds, what is drawn for them, and the state that a resume needs. `PipelineRunner` below
keeps DALI at work. The order of samples is made in `alexprep.pipeline.sampler`, the graph in `alexprep.pipeline.dali_graph`; for plain
torch without DALI there is `alexprep.pipeline.wds_pipeline`.
"""

from __future__ import annotations

import ctypes
import functools
import io
import os
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from alexprep.pipeline import normalisation
from alexprep.pipeline.augmentation import Augmentation, Draws, augmentation_named, centred, draw
from alexprep.pipeline.batch import Batch, mixed_batch
from alexprep.pipeline.dali_graph import REFLECTED, VIEWS, Graph, Views, as_tensors, check_hooks
from alexprep.pipeline.dali_ops import Dtype, MemoryFormat
from alexprep.pipeline.dataset import Dataset, OnBad, Source, open_dataset, statistics_for
from alexprep.pipeline.device import choose_device, moved
from alexprep.pipeline.loader_settings import Tuning
from alexprep.pipeline.read_ahead import ReadAhead
from alexprep.pipeline.resampling import finished
from alexprep.pipeline.sampler import BLOCK_SHARDS, STREAMS, Order, StepPlan
from alexprep.shards.errors import AlexprepError, StoreError, counted, one_of, whole_number
from alexprep.shards.image_codec import HeaderCheck, raw_header
from alexprep.shards.rgb_statistics import Statistics
from alexprep.shards.shard_cache import ShardCache, check_limit

_READ_AHEAD = 8  # steps whose samples are asked of the disk before they are decoded
# Smaller steps go through DALI several at a time, up to so many images and pixels.
_TOGETHER, _TOGETHER_PIXELS = 64, 64 * 64 * 64
# Orders that have a use for an argument.
_ORDERS_WITH: dict[str, tuple[Order, ...]] = {"block_shards": ("blocks", "streams"), "streams": ("streams",)}


class Loader(torch.utils.data.IterableDataset[Batch]):
    """Yields the batches of a split, epoch after epoch.

    Step s of an epoch is the slice [s * batch_size, (s + 1) * batch_size) of the epoch's order, and a rank takes its part of
    the slice; so the samples and their augmentation are the same on any number of ranks, threads and devices. `for batch in
    loader` yields the rest of the current epoch; the next such loop, the next epoch. A batch's tensors are the caller's: nothing
    writes to them later. In a forked process, and unpickled in another, a loader goes on from its state. What wants torch's
    `DataLoader` gets `DataLoader(loader, batch_size=None)`.

    Attributes:
        samples: samples in the split.
        digest: identity of the data, hex sha256.
        classes: class names by label.
        bad: samples of other people's tars that the index has left out, with the reason.
        skipped: samples that could not be decoded and are missing from the batches delivered so far.
        epoch: of the next batch.
        step: of the next batch, within its epoch.
    """

    def __init__(
        self,
        data: Source,
        split: str = "train",
        *,
        batch_size: int,
        augmentation: Augmentation | str = "paper",
        views: Views = "random",
        order: Order = "shuffle",
        block_shards: int | None = None,
        streams: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        dtype: Dtype | Literal["bfloat16"] | torch.dtype = "float32",
        memory_format: MemoryFormat = "NCHW",
        on_bad: OnBad = "error",
        statistics: Statistics | str | Path | None = None,
        cache: str | Path | None = None,
        cache_limit: int | None = None,
        drop_last: bool = False,
        epochs: int | None = None,
        threads: int | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        """Opens a split; the DALI pipeline is built when the first batch is asked for.

        Args:
            data: a finished dataset; or anyone's webdataset: a folder of tars, a tar, a pattern like "train-{000..146}.tar", or
                several of these, which are indexed once.
            split: "train", "val" or "test".
            batch_size: samples a step over all ranks.
            augmentation: what is done to the images, or the name of a preset: "paper", "2012-code", "resized", "none".
            views: "random" draws crop, mirror, noise and all else; "centre" gives the centre crop, "two" that and its reflection,
                "ten" the paper's ten test views, all without chance.
            order: "shuffle", a new global permutation each epoch; "blocks", for slow disks, permutes the shards and then the samples of
                `block_shards` shards at a time; "streams", for stores, does so in `streams` parts of the shards, so that ranks read
                different shards (see `stream_order`); "sequential", as stored.
            block_shards: see `order`; None for 16. AlexprepError with an order that has no blocks.
            streams: likewise of the order "streams"; None for 8. Where `world_size` divides it, each shard is read by one rank, but where the split has few of them. A rank's part of
                a step is then as long as its streams: see docs/pipelines.md.
            seed: of orders and random parameters.
            rank: of this process, in [0, world_size).
            world_size: how many processes share each step.
            device: "cpu", or "cuda" with or without an index.
            dtype: "float32", "float16", "bfloat16", or, where the augmentation neither subtracts nor divides, "uint8"; torch's likewise.
            memory_format: "NCHW", "NHWC", or "channels_last": shaped as the first, in memory as the second, and on a CPU the
                fastest.
            on_bad: "error" ends with the name of a damaged sample; "skip" leaves it out of its step, and moves no other.
            statistics: of which dataset, if not of `data`: its folder, or what `alexprep.shards.read_statistics` gave.
            cache: a folder on this disk. Of a dataset in a store its shards are kept there, by default nowhere; of other people's tars the index,
                by default beside them or in the user's cache.
            cache_limit: bytes of shards in that folder; what came first stays.
            drop_last: whether an epoch's last step is left out where it is smaller than the others; other samples each epoch.
            epochs: how many there will be, from epoch 0 on, where that is known: nothing beyond is fetched or decoded ahead of its use.
            threads: of DALI; None for one a core. Short for `tuning`.
            tuning: how the machine is used; `alexprep tune` finds good settings.

        Raises AlexprepError where there is no such data, or no statistics of it, or an argument is out of its bounds.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        self._made_by = functools.partial(Loader, **arguments)
        if not isinstance(augmentation, Augmentation):
            augmentation = augmentation_named(augmentation)
        tuning = tuning or Tuning()
        self._tuning = tuning = tuning if threads is None else replace(tuning, threads=threads)
        block_shards, streams = _mixed_shards(order, block_shards, streams)
        check_limit(cache, cache_limit)
        dataset = open_dataset(data, split, on_bad, cache)
        if augmentation.hooks and views == "random":
            check_hooks(augmentation)
        self._mixes = augmentation.mixing is not None and views == "random"
        self._plan = StepPlan(
            *(dataset.samples.index["shard"], batch_size, order, block_shards, seed, rank, world_size),
            drop_last=drop_last,
            together=2 if self._mixes else 1,
            streams=streams,
        )
        self._most_together = self._steps_together(augmentation.view or dataset.size, views)
        self._one_by_one = False  # since an image could not be decoded: the steps before it are delivered first
        # Batches that were made with others, and how many samples each lacks.
        self._ready: deque[tuple[Batch, int]] = deque()
        if dataset.samples.remote and order == "shuffle":
            raise AlexprepError(f"{data} is remote, where single images are slow to read: use order='streams'")
        if dataset.samples.remote and cache is not None:
            dataset.samples.cache = ShardCache(cache, cache_limit)
        held = self._plan.open_shards(_READ_AHEAD + (tuning.prefetch + 1) * self._most_together)
        last = sys.maxsize if epochs is None else whole_number("epochs", epochs, 1, 2**32 - 1)
        self._end = last if views == "random" else 0  # epochs from this one on are not begun ahead
        self._ahead = ReadAhead(dataset.samples, self._plan, held, end=self._end)
        chosen = statistics_for(dataset, statistics) if augmentation.needs_statistics else None
        dataset.check(augmentation, chosen)
        target = choose_device(device or "cpu")
        kind = str(dtype).removeprefix("torch.")
        one_of("dtype", kind, (*get_args(Dtype), "bfloat16"))
        self._dtype: torch.dtype = getattr(torch, kind)
        self._graph = Graph(
            augmentation,
            chosen,
            views,
            raw=dataset.raw,
            size=dataset.size,
            batch_size=self._plan.largest_part * self._most_together,
            threads=tuning.dali_threads,
            device=target.type,
            device_id=torch.cuda.current_device() if target.type == "cuda" and target.index is None else target.index,
            decode=tuning.decode_on(target.type),
            hw_decoder_load=tuning.hw_decoder_load,
            dtype=cast(Dtype, "float32" if kind == "bfloat16" else kind),  # which DALI does not have
            memory_format=memory_format,
        )
        self._on_bad, self._dataset = on_bad, dataset
        self.samples: int = len(dataset.samples)
        self.digest, self.classes, self.bad = dataset.digest, dataset.classes, dataset.bad
        self.skipped = self.epoch = self.step = 0
        self._runner: PipelineRunner | None = None
        self._stream = zlib.crc32(f"{self.digest} {split} {self._order_words()}".encode())
        self._upcoming = (0, 0)  # the step that the runner is handed next
        self._loaded = False  # a state, since the last loop began
        self._closed = False

    def _order_words(self) -> str:
        plan = self._plan
        blocks = f"blocks of {plan.block_shards} shards"
        return {"blocks": blocks, "streams": f"{plan.streams} streams, {blocks}"}.get(plan.order, plan.order)

    def __len__(self) -> int:
        """Steps an epoch, the same on all ranks; the last one may be smaller."""
        return len(self._plan)

    def __repr__(self) -> str:
        """What is read, how, and where the next batch comes from."""
        arguments, plan, device = self._made_by.keywords, self._plan, "cpu" if self._graph.device == "cpu" else "cuda"
        part = f", rank {plan.rank} of {plan.world_size}" if plan.world_size > 1 else ""
        return (
            f"<Loader {str(arguments['data'])!r} {arguments['split']}: {counted(self.samples, 'sample')} of "
            f"{counted(len(self.classes), 'class')}, {counted(len(self), 'step')} of {plan.batch_size} an epoch, "
            f"{self._graph.views} views, order {plan.order}, {str(self._dtype).removeprefix('torch.')} "
            f"{self._graph.memory_format} on {device}{part}, at epoch {self.epoch}, step {self.step}>"
        )

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the present step to the end of the epoch; where pairs are mixed, each is a `MixedBatch`.

        An evaluation (views "centre", "two" and "ten") begins anew where the last one was left early, unless its state was loaded.
        """
        if self._graph.views != "random" and self.step and not self._loaded:
            self._abandon()
            self.step = 0
        self._loaded = False
        epoch = self.epoch
        while self.epoch == epoch:
            yield self._next_batch()  # which is then the caller's alone

    def _steps_together(self, size: tuple[int, int] | None, views: Views) -> int:
        """How many steps go through DALI as one. Pairs are mixed within a step, whose draws know no other."""
        if self._mixes or size is None:
            return 1
        images = min(_TOGETHER, _TOGETHER_PIXELS // (size[0] * size[1] * VIEWS.get(views, 1)))
        return max(1, images // self._plan.largest_part)

    def _together_from(self, step: int) -> int:
        """How many steps from one on go through DALI as one now."""
        return 1 if self._one_by_one else min(self._most_together, len(self) - step)

    def _next_batch(self) -> Batch:
        try:
            if not self._ready:
                self._make_ready()
            batch, skipped = self._ready.popleft()
            following = self._plan.after(self.epoch, self.step)
        except BaseException:
            # Also after Ctrl-C: what is under way no longer fits the state, which still points at this batch.
            self._abandon()
            raise
        self.epoch, self.step = following
        self.skipped += skipped
        return batch

    def _make_ready(self) -> None:
        """Takes the next steps that went through DALI together, as batches."""
        runner = self._running()
        self._feed_ahead(runner)
        try:
            chunk, images = runner.take()
        except AlexprepError as error:
            if self._one_by_one or self._most_together == 1 or isinstance(error, StoreError):
                raise
            self._abandon()
            self._one_by_one = True
            return self._make_ready()
        self._feed_ahead(runner)  # before the caller works on this batch
        labels = moved(torch.from_numpy(self._dataset.samples.labels[chunk.rows]), images.device)
        whole = Batch(images, labels, torch.from_numpy(chunk.rows.copy()))
        if self._mixes:
            whole = cast(Batch, mixed_batch(whole, chunk.draws, self._graph.memory_format))
        whole = whole._replace(images=whole.images.to(self._dtype))
        if len(chunk.counts) == 1:
            self._ready.append((whole, chunk.skipped))
            return None
        left = [chunk.of_step.count(number) for number in range(len(chunk.counts))]
        parts = zip(*(torch.split(tensor, left) for tensor in whole), chunk.counts, left, strict=True)
        self._ready.extend((Batch(*tensors), count - kept) for *tensors, count, kept in parts)
        return None

    def _feed_ahead(self, runner: PipelineRunner) -> None:
        """Keeps enough steps under way. Training runs on into the next epoch, evaluation ends with its own."""
        graph, plan = self._graph, self._plan
        while len(runner) <= self._tuning.prefetch and not runner.failed:
            epoch, number = self._upcoming
            if epoch >= max(self.epoch + 1, self._end):
                break
            together = self._together_from(number)
            self._ahead.reach(epoch, number, together)
            parts = [plan.part(epoch, number + each) for each in range(together)]
            rows, positions = (np.concatenate(each) for each in zip(*parts, strict=True))
            sizes = self._dataset.sizes_N2[rows]
            if graph.views == "random":
                draws = draw(graph.augmentation, plan.seed, epoch, rows, sizes, positions)
            else:
                draws = centred(graph.augmentation, sizes)
            runner.feed(Step(epoch, number, rows, draws, [len(part) for part, _ in parts]))
            for each in range(number, number + together):
                self._upcoming = plan.after(epoch, each)
                if each + _READ_AHEAD < len(self):
                    self._dataset.samples.expect(plan.part(epoch, each + _READ_AHEAD)[0])

    def keys(self, indices: torch.Tensor | Sequence[int]) -> list[str]:
        """The keys of samples by their indices, as `Batch.indices` has them: the names of their members in the shards, without extension.

        Read from the shards when they are asked for, as `metadata` is: one small read a sample.
        """
        return self._dataset.keys(self._rows(indices))

    def metadata(self, indices: torch.Tensor | Sequence[int]) -> list[dict[str, Any]]:
        """What goes along with samples: of each a dict, by name, as its KEY.json in the shard has it; {} where it has none.

        Raises AlexprepError for other people's tars: make a data set of them with `alexprep shard`.
        """
        return self._dataset.metadata(self._rows(indices))

    def _rows(self, indices: torch.Tensor | Sequence[int]) -> list[int]:
        rows: list[int] = torch.as_tensor(indices, dtype=torch.int64).reshape(-1).tolist()
        for row in rows:
            whole_number("index", row, 0, self.samples - 1)
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from: all that a resume needs, on any number of ranks; a few integers and a line, JSON-serialisable.

        "seed", "epoch" and "step" say where; "batch_size", "stream", which stands for the data and the order, and "augmentation" are there to
        refuse a state that means something else.
        """
        place = {"seed": self._plan.seed, "epoch": self.epoch, "step": self.step}
        meant = {
            "batch_size": self._plan.batch_size,
            "stream": self._stream,
            "augmentation": str(self._graph.augmentation),
        }
        return place | meant

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a state that `state_dict` gave.

        Raises AlexprepError where it is of another seed, batch size, dataset, order or augmentation, or lies outside an epoch. A state without
        "augmentation", as older ones are, is taken: leave it out to go on with another one on purpose.
        """
        own, state = self.state_dict(), state if isinstance(state, Mapping) else {}
        for name in ("seed", "batch_size", "stream"):
            if state.get(name) != own[name]:
                raise AlexprepError(
                    f"the state has {name} {state.get(name)}, this Loader {own[name]}: make it as the one that gave the state "
                    "(the stream stands for the data, the split and the order)"
                )
        if state.get("augmentation", own["augmentation"]) != own["augmentation"]:
            raise AlexprepError(
                f"the state has augmentation {state['augmentation']}, this Loader {own['augmentation']}: make it as the one that gave the state; "
                'or, to go on with other images on purpose, leave "augmentation" out of the state'
            )
        epoch = whole_number("epoch", state.get("epoch"), 0, 2**32 - 1)
        step = whole_number(f"in epochs of {len(self)} steps, step", state.get("step"), 0, len(self) - 1)
        self._abandon(hold=True)  # what DALI already works on is not wanted any more
        self.epoch, self.step = epoch, step
        self._loaded = True

    def close(self) -> None:
        """Frees the pipeline's threads and memory; delivered batches stay valid. Closing twice is fine."""
        self._closed = True
        self._abandon()

    def __enter__(self) -> Loader:
        """The loader itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the loader."""
        self.close()

    def __reduce__(self) -> tuple[Callable[[], Loader], tuple[()], dict[str, Any]]:
        """Pickled, a loader is its arguments and its state; the copy opens the data anew."""
        return self._made_by, (), self.state_dict()

    __setstate__ = load_state_dict

    def _running(self) -> PipelineRunner:
        if self._closed:
            raise AlexprepError("this Loader is closed: make a new one")
        if self._runner is None or not self._runner.usable:
            self._abandon(hold=True)
            # While DALI starts, the store is asked already.
            self._ahead.reach(self.epoch, self.step, self._together_from(self.step))
            self._runner = PipelineRunner(self._dataset, self._graph, self._on_bad)
            self._upcoming = (self.epoch, self.step)
        return self._runner

    def _abandon(self, hold: bool = False) -> None:
        """Leaves the pipeline and what it works on; the next batch is started anew from the state, with the shards that it may `hold`."""
        self._ready.clear()
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()
        if hold:
            self._ahead.forget()
        else:
            self._ahead.stop()


def _mixed_shards(order: Order, block_shards: int | None, streams: int | None) -> tuple[int, int]:
    """How many shards are mixed at a time, and in how many streams; AlexprepError where an order has no use for what was given."""
    for name, value in (("block_shards", block_shards), ("streams", streams)):
        if value is not None and order not in _ORDERS_WITH[name]:
            fitting = " or ".join(f"order='{other}'" for other in _ORDERS_WITH[name])
            raise AlexprepError(
                f"{name} {value} has no effect with order='{order}': take {fitting}, or leave {name} out"
            )
    return BLOCK_SHARDS if block_shards is None else block_shards, STREAMS if streams is None else streams


@dataclass
class Step:
    """A rank's part of one step on its way through DALI, or of several small ones that follow one another in an epoch."""

    epoch: int
    number: int  # of the first, within its epoch
    rows: NDArray[np.int64]
    draws: Draws
    counts: Sequence[int] = ()  # of samples in each; none says that it is one
    skipped: int = 0  # samples that could not be decoded and were taken out of `rows` and `draws`
    failure: AlexprepError | None = None  # raised when the step's turn comes, after the steps before it
    read_in_place: Any = None  # by DALI, until the step is done: on a GPU, until its work is

    def __post_init__(self) -> None:
        """All samples are there."""
        self.counts = self.counts or [len(self.rows)]
        self.of_step = [
            number for number, count in enumerate(self.counts) for _ in range(count)
        ]  # which of them a sample belongs to

    def leave_out(self, bad: Sequence[bool]) -> None:
        """Takes samples out."""
        good = ~np.array(bad, bool)
        self.skipped += int(len(good) - good.sum())
        self.rows, self.draws = self.rows[good], self.draws.only(good)
        self.of_step = [number for number, kept in zip(self.of_step, good.tolist(), strict=True) if kept]


class PipelineRunner:
    """Keeps a DALI pipeline at work: steps in, tensors out, in the order in which the steps were handed in.

    DALI cannot leave out a sample that it fails to decode: the whole step fails. Then each of the step's samples is tried alone,
    with the window that was drawn for it; those that fail are taken out, and the step and those behind it are done again. So
    a sample is left out or not by its bytes and its window alone, whoever its neighbours are. DALI is never given a sample whose
    header cannot be read: up to 2.4 it may crash on it when a batch is split among threads.

    Attributes:
        sizes_N2: heights and widths of the samples, by row; to be changed where other images take their places.
    """

    def __init__(self, dataset: Dataset, graph: Graph, on_bad: OnBad) -> None:
        """Builds the pipeline, or raises AlexprepError where DALI cannot, and in one of several workers of a DataLoader."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise AlexprepError(
                f"each of the {worker.num_workers} workers of a DataLoader would give every sample: iterate over the Loader itself, "
                "which decodes in threads of its own, or give them different ranks"
            )
        self._samples, self.sizes_N2, self._graph, self._on_bad = dataset.samples, dataset.sizes_N2, graph, on_bad
        self._steps: deque[Step] = deque()
        self._suspects: set[int] = set()  # rows that could not be decoded before: they are tried alone first
        self._copied: deque[tuple[torch.cuda.Event, Any]] = deque()  # what DALI read and made, until torch has it
        self._headers = HeaderCheck()
        self._device = torch.device("cpu" if graph.device_id is None else f"cuda:{graph.device_id}")
        self._process = os.getpid()
        self._normaliser = graph.normaliser()
        self._pipeline: Any = self._built()

    def __len__(self) -> int:
        """How many steps were fed and not taken."""
        return len(self._steps)

    @property
    def usable(self) -> bool:
        """Whether this is the process that built the pipeline: DALI's threads do not survive a fork."""
        return self._process == os.getpid()

    @property
    def failed(self) -> bool:
        """Whether `take` will raise an error when it comes to the step that was fed last: further ones would only wait for the same store."""
        return bool(self._steps) and self._steps[-1].failure is not None

    def feed(self, step: Step) -> None:
        """Hands a step to DALI and returns at once. What is wrong with it, `take` raises."""
        self._steps.append(step)
        self._submit(step)

    def take(self) -> tuple[Step, torch.Tensor]:
        """The step that was fed first and not taken yet, and its images. After an AlexprepError the runner cannot go on."""
        step = self._steps[0]
        while True:
            if step.failure is not None:
                raise step.failure
            try:
                images = self._outputs(step)
                break
            except RuntimeError as error:
                # Without a working decoder, for lack of a GPU's memory say, images are not to blame.
                sound = self._decodes_a_sound_image()
                bad = [sound and not self._decodes(step, n) for n in range(len(step.rows))]
                if not any(bad):
                    raise AlexprepError(f"DALI could not make a batch: {error}") from error
                self._suspects.update(step.rows[np.array(bad)].tolist())
                self._leave_out(step, bad)
                self._pipeline = self._built()
                for waiting in self._steps:
                    self._submit(waiting)
        self._steps.popleft()
        return step, images

    def close(self) -> None:
        """Frees the pipeline's threads and memory."""
        if not self.usable:  # its destructor would wait for threads that only the parent has
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._pipeline))
        else:
            for event, _ in self._copied:  # DALI gets no buffer back that is still being copied from
                event.synchronize()
            if self._normaliser is not None:
                self._normaliser.close()
        del self._pipeline
        self._copied.clear()
        self._steps.clear()

    def _built(self) -> Any:
        pipeline = self._graph.pipeline()
        try:
            pipeline.build()
        except RuntimeError as error:  # a GPU without memory, an old driver
            raise AlexprepError(f"DALI cannot build its pipeline: {error}") from error
        return pipeline

    def _submit(self, step: Step) -> None:
        try:
            self._hand_over(step)
        except AlexprepError as error:
            step.failure = error

    def _hand_over(self, step: Step) -> None:
        """Hands a step to DALI without the samples that are known to be bad."""
        rows = step.rows.tolist()
        if self._suspects and not self._suspects.isdisjoint(rows):
            self._leave_out(step, [row in self._suspects and not self._decodes(step, n) for n, row in enumerate(rows)])
        images = self._images(step.rows)
        if not self._graph.raw:
            bad = self._headers.wrong(images, self.sizes_N2[step.rows])
            if any(bad):
                images = [image for image, is_bad in zip(images, bad, strict=True) if not is_bad]
                self._leave_out(step, bad)
        if not len(step.rows):  # DALI knows no empty batch
            return
        inputs = {"encoded": images, **self._graph.inputs(step.epoch, step.draws, self.sizes_N2[step.rows])}
        for name, values in inputs.items():
            if self._normaliser is None or name not in normalisation.INPUTS:
                self._pipeline.feed_input(name, as_tensors(values) if isinstance(values, list) else values)
        step.read_in_place = inputs
        self._pipeline.schedule_run()

    def _leave_out(self, step: Step, bad: list[bool]) -> None:
        """Takes samples out of a step, or ends the work, as `on_bad` says."""
        if self._on_bad == "error" and any(bad):
            raise AlexprepError(
                f"{self._samples.where(int(step.rows[bad.index(True)]))} holds an image that cannot be decoded: leave such "
                "images out with on_bad='skip', or make sound shards of them with `alexprep shard`"
            )
        step.leave_out(bad)

    def _images(self, rows_N: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """What DALI gets of samples: their bytes, or their pixels where the shards are raw."""
        images = self._samples.read(rows_N)
        if not self._graph.raw:
            return images
        sizes = self.sizes_N2[rows_N].tolist()
        return [self._pixels(*one) for one in zip(images, rows_N.tolist(), sizes, strict=True)]

    def _pixels(self, member: NDArray[np.uint8], row: int, size: list[int]) -> NDArray[np.uint8]:
        height, width = size
        header = raw_header(height, width)
        if member[: len(header)].tobytes() != header or len(member) != len(header) + 3 * height * width:
            raise AlexprepError(
                f"{self._samples.where(row)} holds no {height} x {width} pixels: `alexprep verify` tells more"
            )
        return member[len(header) :].reshape(height, width, 3)

    def _decodes(self, step: Step, n: int) -> bool:
        """Whether sample `n` of a step can be decoded by itself, with the window drawn for it."""
        inputs = self._graph.inputs(step.epoch, step.draws.only([n]), self.sizes_N2[step.rows[n : n + 1]])
        return self._decodes_alone(self._images(step.rows[n : n + 1])[0], inputs)

    def _decodes_a_sound_image(self) -> bool:
        """Whether there is a decoder that works."""
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16)).save(buffer, "JPEG")
        return self._decodes_alone(np.frombuffer(buffer.getvalue(), np.uint8), {})

    def _decodes_alone(self, image: NDArray[np.uint8], inputs: Mapping[str, Any]) -> bool:
        """Whether one image can be decoded; with a window among `inputs`, only that where a window can be."""
        if self._graph.raw:
            return True
        try:
            pipeline = self._graph.decoding_pipeline(windowed="start" in inputs)
            pipeline.feed_input("encoded", [image])  # DALI reads it in place
            if "start" in inputs:
                for name in {"start", "shape"} & inputs.keys():
                    pipeline.feed_input(name, inputs[name])
            pipeline.run()
        except RuntimeError:
            return False
        return True

    def _outputs(self, step: Step) -> torch.Tensor:
        graph = self._graph
        if not len(step.rows):
            height, width = graph.augmentation.view or self.sizes_N2[0].tolist()
            form = (height, width, 3) if graph.resamples or graph.memory_format != "NCHW" else (3, height, width)
            images = self._empty((0, VIEWS[graph.views], *form) if graph.views in REFLECTED else (0, *form))
        elif self._device.type == "cuda":
            images = self._on_gpu(step)
        else:
            (output,) = self._pipeline.outputs()
            if self._normaliser is not None:
                dense = output.is_dense_tensor()
                windows = np.asarray(output.as_tensor()) if dense else [np.asarray(each) for each in output]
                images = torch.from_numpy(self._normaliser(windows, step.read_in_place))
            else:  # without a copy: DALI's own buffer, which is ours until the tensor is gone
                images = torch.utils.dlpack.from_dlpack(output.as_tensor())
        step.read_in_place = None
        return finished(images, step.draws, graph)

    def _empty(self, shape: Sequence[int]) -> torch.Tensor:
        dtype = torch.uint8 if self._graph.resamples else getattr(torch, self._graph.dtype)
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _on_gpu(self, step: Step) -> torch.Tensor:
        """A copy: DALI takes a buffer back in the order of its own stream, so perhaps under a kernel of torch's that still reads it."""
        while self._copied and self._copied[0][0].query():  # type: ignore[no-untyped-call]
            self._copied.popleft()
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            (output,) = self._pipeline.outputs(cuda_stream=stream)
            made = output.as_tensor()
            images = self._empty(made.shape())
            made.copy_to_external(
                ctypes.c_void_p(images.data_ptr()), ctypes.c_void_p(stream.cuda_stream), non_blocking=True
            )
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        self._copied.append((event, (output, step.read_in_place)))
        return images
