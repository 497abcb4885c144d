"""A net for images with several tags each: targets from the metadata that go along with the images.

    python docs/examples/multi_label.py alexprep-data --name tags

For regression the targets are numbers, `documents[n]["score"]`, with `mse_loss`; for captions they are texts for a tokenizer.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn import functional

from alexprep.pipeline import Augmentation, Loader


def main() -> None:
    """Trains some epochs, and tells the loss of the first and the last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--name", default="tags", help="which of the metadata is a list of tags")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    with Loader(options.data, batch_size=64, augmentation=Augmentation(crop=options.crop)) as loader:
        documents = loader.metadata(range(loader.samples))  # one a sample, in the order of `indices`
        tags = sorted({tag for document in documents for tag in document.get(options.name, ())})
        targets = torch.tensor(
            [[tag in document.get(options.name, ()) for tag in tags] for document in documents]
        ).float()
        model = nn.Sequential(
            nn.Conv2d(3, 32, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(288, len(tags))
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses = []
        while loader.epoch < options.epochs:
            for images, _, indices in loader:
                loss = functional.binary_cross_entropy_with_logits(model(images / 64), targets[indices])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    print(f"{len(targets)} samples, {len(tags)} tags: loss {losses[0]:.3f}, then {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
