"""Features of a network for scikit-learn: the centre crop of each image of a split, once, without chance.

    python docs/examples/features.py alexprep-data

The network here is untrained, and random features are worth little; put your own in its place.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from alexprep.pipeline import Augmentation, Loader


@torch.inference_mode()
def features(network: nn.Module, data: Path, split: str, crop: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Float32 (N, features), and the labels int64 (N,)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    augmentation = Augmentation(crop=crop)
    with Loader(data, split, batch_size=128, augmentation=augmentation, views="centre", device=device) as loader:
        network.to(device).eval()
        found = [(network(images / 64).cpu(), labels.cpu()) for images, labels, _ in loader]  # grey levels about 0
    vectors, labels = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    return vectors, labels


def main() -> None:
    """Fits a classifier on the features of train and tells its accuracy on val."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--crop", type=int, default=224)
    options = parser.parse_args()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 11, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(*features(network, options.data, "train", options.crop))
    vectors, labels = features(network, options.data, "val", options.crop)
    print(f"{len(labels)} val images, {vectors.shape[1]} features, accuracy {classifier.score(vectors, labels):.2f}")


if __name__ == "__main__":
    main()
