"""What only a GPU can show of a loader, in every convention, form and view: `python -m pytest tests/stress/loader_on_gpu.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alexprep.pipeline.loader import Loader
from alexprep.pipeline.loader_settings import Tuning
from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from tests.test_dali_graph import CONVENTIONS, FORMATS
from tests.test_loader import ODD, epochs_of


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("views", ["random", "centre", "ten"])
@pytest.mark.parametrize("decode", ["cpu", "cuda"])
def test_the_gpu_agrees_but_for_its_decoder(
    decode: Any, views: Any, memory_format: Any, photos: Path, tmp_path: Path
) -> None:
    """Raw shards, which nobody decodes, to rounding for every convention; JPEGs, where decoders differ, within bounds."""
    for image_format in ("raw", "jpg"):
        folder = tmp_path / image_format
        convert(photos, folder, ShardOptions(Target(size=64, format=image_format)), 1)
        rgb_statistics.publish_statistics(rgb_statistics.pca_stats(folder, "train", 1), folder, "train")
        for name, augmentation in CONVENTIONS.items():
            options: Any = {"batch_size": 20, "augmentation": augmentation, "views": views}
            options["memory_format"] = memory_format
            with (
                Loader(folder, **options) as cpu,
                Loader(folder, device="cuda", tuning=Tuning(decode=decode), **options) as gpu,
            ):
                for ours, theirs in zip(cpu, gpu, strict=True):
                    assert theirs.images.is_cuda and ours.images.stride() == theirs.images.stride()
                    difference = (ours.images - theirs.images.cpu()).abs()
                    exact = image_format == "raw" or decode == "cpu"
                    rounding = 1.01 if augmentation.scale else 0.0  # a resize rounds to whole levels
                    assert difference.max() <= (2e-3 + rounding if exact else 24), name
                    assert difference.mean() < (0.02 if exact else 1), name


@pytest.mark.gpu
def test_a_batch_outlives_pending_work_on_the_gpu(data: Path) -> None:
    """Slow kernels still reading a dropped batch must read its pixels, not those of the batch that took its memory."""
    with Loader(data, batch_size=48, augmentation=ODD, device="cuda") as loader:
        expected = [batch.images.double().sum().item() for batch in epochs_of(loader, 6)]
    ballast = torch.randn(4096, 4096, device="cuda")
    with Loader(data, batch_size=48, augmentation=ODD, device="cuda") as loader:
        sums = []
        for batch in epochs_of(loader, 6):
            for _ in range(20):
                ballast = torch.tanh(ballast @ ballast)
            sums.append(batch.images.double().sum())
            del batch
        assert [value.item() for value in sums] == expected
