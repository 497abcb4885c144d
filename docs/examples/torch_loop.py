"""A plain torch training loop that goes on exactly where it was stopped, in the middle of an epoch too.

    python docs/examples/torch_loop.py alexprep-data
    python docs/examples/torch_loop.py alexprep-data --resume    # after a kill, from checkpoint.pt

A resumed run ends with the same weights, bit for bit, as one that never stopped; on a GPU as far as torch's own kernels repeat.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from alexprep.pipeline import Augmentation, Loader

EPOCHS, SAVE_EVERY = 2, 3  # SAVE_EVERY counts steps


def network(classes: int) -> nn.Module:
    """Small, and for crops of any size."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 7, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(32 * 9, classes)
    )


def main() -> None:
    """Trains, saving every few steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--stop-after", type=int, help="stop after so many steps, as a kill would")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    augmentation = Augmentation(crop=options.crop)
    with Loader(options.data, batch_size=options.batch_size, augmentation=augmentation, device=device) as loader:
        torch.manual_seed(0)
        model = network(len(loader.classes)).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        if options.resume:
            state = torch.load(options.checkpoint, map_location=device)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            loader.load_state_dict(state["loader"])  # a few integers: which batch comes next
        done = 0
        while loader.epoch < EPOCHS:
            for images, labels, _ in loader:  # what is left of the epoch
                loss = functional.cross_entropy(model(images / 64), labels)  # grey levels about 0
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
                if done % SAVE_EVERY == 0 or loader.epoch == EPOCHS:
                    state = {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "loader": loader.state_dict(),
                    }
                    new = options.checkpoint.with_suffix(".new")
                    torch.save(state, new)
                    os.replace(new, options.checkpoint)  # a kill leaves the old checkpoint or the new one, whole
                    print(f"{state['loader']}: loss {loss.item():.3f}")
                if done == options.stop_after:
                    return


if __name__ == "__main__":
    main()
