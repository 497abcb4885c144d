"""DALI at work: steps of a split in, tensors out, in the order in which the steps were handed in."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alexprep.pipeline.dali_graph import single_view_pipeline, ten_view_pipeline
from alexprep.pipeline.dataset import OnBad
from alexprep.pipeline.feed import Feed, Inputs
from alexprep.pipeline.probe import decodes, decodes_a_sound_image
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import header_size, raw_header
from alexprep.shards.reader import TarSamples


@dataclass
class Step:
    """A rank's part of one step on its way through the engine.

    Attributes:
        epoch: of the step.
        number: of the step within its epoch.
        rows: int64 (N,), of the samples.
        positions: int64 (N,), their places in the epoch's order.
        skipped: how many samples could not be decoded and were taken out of `rows` and `positions`.
        failure: why the step cannot be made; raised when its turn comes, after the steps before it.
    """

    epoch: int
    number: int
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    skipped: int = 0
    failure: AlexprepError | None = None
    _fed: Any = field(default=None, repr=False)  # what DALI reads in place

    def drop(self, bad: Sequence[bool]) -> None:
        """Takes samples out."""
        good = ~np.asarray(bad, bool)
        self.skipped += len(self.rows) - int(good.sum())
        self.rows, self.positions = self.rows[good], self.positions[good]


class Engine:
    """Decodes and augments steps ahead of their use.

    DALI cannot leave out a sample that it fails to decode: the whole step fails. Then each of the step's samples is tried alone,
    with the window that was drawn for it; those that fail are taken out, and the step and those behind it are done again. So
    a sample is left out or not by its bytes and its draw alone, whoever its neighbours are. DALI is never given a sample whose
    header cannot be read: up to 2.4 it may crash on it when a batch is split among threads.
    """

    def __init__(self, samples: TarSamples, sizes_N2: NDArray[np.integer], feed: Feed, on_bad: OnBad) -> None:
        """Builds the pipeline.

        Args:
            samples: what rows stand for.
            sizes_N2: integer (samples, 2), heights and widths of the stored images, pixels.
            feed: what is done to them.
            on_bad: what becomes of a sample that cannot be decoded: "error" ends the work, "skip" leaves it out.

        Raises:
            AlexprepError: DALI cannot build the pipeline; or this is one of several workers of a DataLoader.
        """
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise AlexprepError(
                f"each of the {worker.num_workers} workers of a DataLoader would give every sample: iterate over the Loader itself, "
                "which decodes in threads of its own, or give them different ranks"
            )
        self._samples, self._sizes, self._feed, self._on_bad = samples, sizes_N2, feed, on_bad
        self._steps: deque[Step] = deque()
        self._suspects: set[int] = set()  # rows that could not be decoded before: they are tried alone first
        self._copied: deque[tuple[torch.cuda.Event, Any]] = deque()  # DALI's buffers until torch has their pixels
        self._process = os.getpid()
        self._pipeline: Any = self._assembled()

    def __len__(self) -> int:
        """How many steps were started and not taken."""
        return len(self._steps)

    @property
    def usable(self) -> bool:
        """Whether this is the process that made the engine: DALI's threads do not survive a fork."""
        return self._process == os.getpid()

    def start(self, step: Step) -> None:
        """Hands a step to DALI and returns at once. What is wrong with it, `take` raises."""
        self._steps.append(step)
        self._submit(step)

    def take(self) -> tuple[Step, torch.Tensor]:
        """The step that was started first and not taken yet, and its images.

        Raises:
            AlexprepError: an image could not be read or decoded. The engine cannot go on after that.
        """
        step = self._steps[0]
        while True:
            if step.failure is not None:
                raise step.failure
            try:
                images = self._outputs(step)
                break
            except RuntimeError as error:
                if not decodes_a_sound_image(self._feed):
                    raise AlexprepError(f"DALI could not make a batch: {error}") from error
                bad = [not self._decodes(step, n) for n in range(len(step.rows))]
                if not any(bad):
                    raise AlexprepError(f"DALI could not make a batch: {error}") from error
                self._suspects.update(step.rows[np.array(bad)].tolist())
                self._leave_out(step, bad)
                self._pipeline = self._assembled()
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
        del self._pipeline
        self._copied.clear()
        self._steps.clear()

    def _assembled(self) -> Any:
        make = ten_view_pipeline if self._feed.views == "ten" else single_view_pipeline
        pipeline = make(self._feed.augmentation, self._feed.statistics, self._feed.settings)
        try:
            pipeline.build()
        except RuntimeError as error:  # a GPU without memory, an old driver
            raise AlexprepError(f"DALI cannot build its pipeline: {error}") from error
        return pipeline

    def _submit(self, step: Step) -> None:
        try:
            self._feed_dali(step)
        except AlexprepError as error:
            step.failure = error

    def _feed_dali(self, step: Step) -> None:
        rows = step.rows.tolist()
        if not self._suspects.isdisjoint(rows):
            self._leave_out(step, [row in self._suspects and not self._decodes(step, n) for n, row in enumerate(rows)])
        encoded = [self._image(row) for row in step.rows.tolist()]
        if not self._feed.settings.raw:
            sizes = zip(encoded, self._sizes[step.rows].tolist(), strict=True)
            unread = [header_size(image) != tuple(size) for image, size in sizes]
            encoded = [image for image, bad in zip(encoded, unread, strict=True) if not bad]
            self._leave_out(step, unread)
        if not len(step.rows):  # DALI knows no empty batch
            return
        inputs = self._inputs(step)
        self._pipeline.feed_input("encoded", encoded)
        for name, values in inputs.items():
            self._pipeline.feed_input(name, values)
        step._fed = (encoded, inputs)
        self._pipeline.schedule_run()

    def _leave_out(self, step: Step, bad: list[bool]) -> None:
        """Takes samples out of a step, or ends the work, as `on_bad` says."""
        if self._on_bad == "error" and any(bad):
            raise AlexprepError(
                f"{self._samples.where(int(step.rows[bad.index(True)]))} holds an image that cannot be decoded: leave such "
                "images out with on_bad='skip', or make sound shards of them with `alexprep shard`"
            )
        step.drop(bad)

    def _outputs(self, step: Step) -> torch.Tensor:
        settings = self._feed.settings
        device = torch.device(settings.device if settings.device_id is None else f"cuda:{settings.device_id}")
        if not len(step.rows):
            side = self._feed.augmentation.crop
            height, width = self._sizes[0].tolist() if side is None else (side, side)
            shape = (3, height, width) if settings.layout == "NCHW" else (height, width, 3)
            views = (10,) if self._feed.views == "ten" else ()
            images = torch.empty((0, *views, *shape), dtype=getattr(torch, settings.dtype), device=device)
        else:
            images = self._on_gpu(device) if device.type == "cuda" else self._on_cpu()
        step._fed = None
        return images.movedim(-1, -3) if settings.layout == "channels_last" else images

    def _on_cpu(self) -> torch.Tensor:
        """DALI's own buffer: it is ours until the tensor is gone."""
        (output,) = self._pipeline.outputs()
        return torch.utils.dlpack.from_dlpack(output.as_tensor())

    def _on_gpu(self, device: torch.device) -> torch.Tensor:
        """A copy: DALI takes a buffer back in the order of its own stream, so perhaps under a kernel of torch's that still reads it."""
        while self._copied and self._copied[0][0].query():  # type: ignore[no-untyped-call]
            self._copied.popleft()
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            (output,) = self._pipeline.outputs(cuda_stream=stream)
            made = output.as_tensor()
            images = torch.empty(made.shape(), dtype=getattr(torch, self._feed.settings.dtype), device=device)
            made.copy_to_external(
                ctypes.c_void_p(images.data_ptr()), ctypes.c_void_p(stream.cuda_stream), non_blocking=True
            )
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        self._copied.append((event, output))
        return images

    def _inputs(self, step: Step) -> Inputs:
        return self._feed.inputs(step.epoch, step.rows, self._sizes[step.rows], step.positions)

    def _image(self, row: int) -> NDArray[np.uint8]:
        """What DALI is fed of a sample: its bytes, or its pixels where the shards are raw."""
        encoded = self._samples.encoded(row)
        if not self._feed.settings.raw:
            return encoded
        height, width = self._sizes[row].tolist()
        header = raw_header(height, width)
        if encoded[: len(header)].tobytes() != header or len(encoded) != len(header) + 3 * height * width:
            raise AlexprepError(
                f"{self._samples.where(row)} holds no {height} x {width} pixels: `alexprep verify` tells more"
            )
        return encoded[len(header) :].reshape(height, width, 3)

    def _decodes(self, step: Step, n: int) -> bool:
        """Whether sample `n` of a step can be decoded by itself, with the window drawn for it."""
        alone = Step(step.epoch, step.number, step.rows[n : n + 1], step.positions[n : n + 1])
        return decodes(self._feed, self._image(int(step.rows[n])), self._inputs(alone))
