"""A Loader on each process of Accelerate: `accelerate launch docs/examples/readers/accelerate_loop.py alexprep-data`."""

import sys

import torch
from accelerate import Accelerator
from torch.nn import functional

from alexprep.pipeline import PRESETS, Loader

accelerator = Accelerator()
part = {"rank": accelerator.process_index, "world_size": accelerator.num_processes, "device": accelerator.device}
with Loader(sys.argv[1], batch_size=16, augmentation=PRESETS["resized"], drop_last=True, **part) as loader:
    network = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, len(loader.classes))
    )
    network, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), lr=0.1))
    accelerator.register_for_checkpointing(loader)  # save_state and load_state: exact resume, in mid-epoch too
    for images, labels, _ in loader:  # not prepared: it has divided the step among the processes itself
        loss = functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    accelerator.print(f"{len(loader)} steps, at epoch {loader.epoch}")
