"""A Loader in a Trainer of transformers: `python docs/examples/readers/huggingface_trainer.py alexprep-data`."""

import sys

from torch.utils.data import DataLoader
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from alexprep.pipeline import PRESETS, Loader


class LoaderTrainer(Trainer):
    def get_train_dataloader(self):  # the Trainer's own would make batches of batches
        return DataLoader(self.train_dataset, batch_size=None, collate_fn=named)


def named(batch):
    return {"pixel_values": batch.images, "labels": batch.labels}


with Loader(sys.argv[1], batch_size=16, augmentation=PRESETS["resized"], seed=1) as loader:
    config = ResNetConfig(hidden_sizes=[16, 32], depths=[1, 1], embedding_size=16, num_labels=len(loader.classes))
    options = TrainingArguments("trainer", num_train_epochs=2, use_cpu=True, save_strategy="no", report_to=[])
    result = LoaderTrainer(ResNetForImageClassification(config), options, train_dataset=loader).train()
    print(f"{result.global_step} steps, at epoch {loader.epoch}")
