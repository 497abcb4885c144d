"""Lightning's Trainer on a `Loader`, with an exact resume in the middle of an epoch.

    pip install "pytorch-lightning>=2.6.4"    # 2.6.2 and 2.6.3 on PyPI were malicious
    python docs/examples/lightning_module.py alexprep-data
    python docs/examples/lightning_module.py alexprep-data --resume checkpoints/step=1000.ckpt

Lightning keeps the loader's `state_dict` in its checkpoints and gives it back on a resume. It forgets to where
`trainer.estimated_stepping_batches` is asked for in `configure_optimizers` (Lightning-AI/pytorch-lightning#20550); the number of
steps is `max_epochs * len(loader)`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional

from alexprep.pipeline import Augmentation, Batch, Loader


class Classifier(LightningModule):
    """A small network and its data."""

    def __init__(self, data: Path, crop: int, batch_size: int) -> None:
        """See `Loader` for the arguments."""
        super().__init__()
        self.data, self.augmentation, self.batch_size = data, Augmentation(crop=crop), batch_size
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(3, 32, 7, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(32 * 9, 1000)
        )

    def train_dataloader(self) -> Loader:
        """This rank's part of each step; Lightning calls it when the rank and its device are known."""
        return Loader(
            self.data,
            batch_size=self.batch_size,
            augmentation=self.augmentation,
            rank=self.global_rank,
            world_size=self.trainer.world_size,
            device=self.device,
        )

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        """On one device; on more, weigh the loss as ddp.py does."""
        return functional.cross_entropy(self.network(batch.images / 64), batch.labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def main() -> None:
    """Trains two epochs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--save-every", type=int, default=1000, help="steps")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()
    trainer = Trainer(
        max_epochs=2,
        use_distributed_sampler=False,  # the loader has divided the samples already
        callbacks=[
            ModelCheckpoint(options.checkpoints, "{step}", every_n_train_steps=options.save_every, save_top_k=-1)
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(options.data, options.crop, options.batch_size), ckpt_path=options.resume)
    trainer.save_checkpoint(options.checkpoints / "last.ckpt")


if __name__ == "__main__":
    main()
