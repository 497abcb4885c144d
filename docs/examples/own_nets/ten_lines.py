"""A network of one's own: alexprep train --recipe tiny --model ten_lines.py:make"""

from torch import nn

from alexprep.train import Scale


def make(classes: int) -> nn.Module:
    """From images (N, 3, H, W) to logits (N, classes)."""
    return nn.Sequential(
        *(Scale(1 / 64), nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(64 * 16, classes)),
    )
