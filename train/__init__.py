"""What a program of your own imports to train AlexNet, or a network of its own, and to evaluate what was trained.

Shards are made by `alexprep.shards`, batches by `alexprep.pipeline`. Nothing is loaded before it is used: torch takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alexprep.train.binary_codes import BinaryCodes, read_codes, write_codes
    from alexprep.train.checkpoint import Checkpoint, init_from, saved_weights
    from alexprep.train.classifier import Classified, Classifier
    from alexprep.train.config import TrainConfig
    from alexprep.train.data import Examples
    from alexprep.train.distributed.parallel import Parallel
    from alexprep.train.distributed.world import World, from_environment
    from alexprep.train.evaluation import Evaluation, evaluate, evaluate_run
    from alexprep.train.export import Exported, export_run
    from alexprep.train.gradient_check import Checked, check_gradients
    from alexprep.train.launch import RankFailed, launch_ranks
    from alexprep.train.layer_outputs import (
        LayerOutputs,
        layer_names,
        read_outputs,
        write_outputs,
        write_outputs_table,
    )
    from alexprep.train.loading import EvaluationTransform, Loaded, load
    from alexprep.train.lr_schedule import (
        ByHand,
        Cosine,
        DExp,
        EarlyStop,
        Linear,
        OneCycle,
        Plateau,
        Schedule,
        ScheduleState,
        Steps,
        WarmUp,
    )
    from alexprep.train.models.alexnet import AlexNet, alexnet, alexnet_1gpu, alexnet_6conv, alexnet_2012, alexnet_owt
    from alexprep.train.models.cifar import ConvLocal, cifar10_quick_net, conv_local_11pct, conv_local_13pct, tiny_net
    from alexprep.train.models.columns import ColumnNet
    from alexprep.train.models.layers import (
        LocallyConnected2d,
        LocalResponseNorm,
        PaperDropout,
        Scale,
        SpatialResponseNorm,
    )
    from alexprep.train.models.pools_and_dropconnect import DropConnect, L2Pool2d, StochasticPool2d
    from alexprep.train.models.small import SmallNet
    from alexprep.train.optimizer import MomentumSGD, parameter_groups
    from alexprep.train.precision import float32_kernels, logits
    from alexprep.train.prediction_table import PredictionTable, read_predictions, write_predictions
    from alexprep.train.recipes import RECIPES, Recipe, recipe
    from alexprep.train.report.page import WrittenReport, write_report
    from alexprep.train.run_dir import Place, place_named, saved_checkpoint
    from alexprep.train.similar_images import Neighbour, Similar, find_similar
    from alexprep.train.trainer import train

__all__ = [
    "RECIPES",
    "AlexNet",
    "BinaryCodes",
    "ByHand",
    "Checked",
    "Checkpoint",
    "Classified",
    "Classifier",
    "ColumnNet",
    "ConvLocal",
    "Cosine",
    "DExp",
    "DropConnect",
    "EarlyStop",
    "Evaluation",
    "EvaluationTransform",
    "Examples",
    "Exported",
    "L2Pool2d",
    "LayerOutputs",
    "Linear",
    "Loaded",
    "LocalResponseNorm",
    "LocallyConnected2d",
    "MomentumSGD",
    "Neighbour",
    "OneCycle",
    "PaperDropout",
    "Parallel",
    "Place",
    "Plateau",
    "PredictionTable",
    "RankFailed",
    "Recipe",
    "Scale",
    "Schedule",
    "ScheduleState",
    "Similar",
    "SmallNet",
    "SpatialResponseNorm",
    "Steps",
    "StochasticPool2d",
    "TrainConfig",
    "WarmUp",
    "World",
    "WrittenReport",
    "alexnet",
    "alexnet_1gpu",
    "alexnet_6conv",
    "alexnet_2012",
    "alexnet_owt",
    "check_gradients",
    "cifar10_quick_net",
    "conv_local_11pct",
    "conv_local_13pct",
    "evaluate",
    "evaluate_run",
    "export_run",
    "find_similar",
    "float32_kernels",
    "from_environment",
    "init_from",
    "launch_ranks",
    "layer_names",
    "load",
    "logits",
    "parameter_groups",
    "place_named",
    "read_codes",
    "read_outputs",
    "read_predictions",
    "recipe",
    "saved_checkpoint",
    "saved_weights",
    "tiny_net",
    "train",
    "write_codes",
    "write_outputs",
    "write_outputs_table",
    "write_predictions",
    "write_report",
]

_HOMES = {
    "binary_codes": ("BinaryCodes", "read_codes", "write_codes"),
    "checkpoint": ("Checkpoint", "init_from", "saved_weights"),
    "classifier": ("Classified", "Classifier"),
    "config": ("TrainConfig",),
    "data": ("Examples",),
    "distributed.parallel": ("Parallel",),
    "distributed.world": ("World", "from_environment"),
    "gradient_check": ("Checked", "check_gradients"),
    "launch": ("RankFailed", "launch_ranks"),
    "evaluation": ("Evaluation", "evaluate", "evaluate_run"),
    "export": ("Exported", "export_run"),
    "layer_outputs": ("LayerOutputs", "layer_names", "read_outputs", "write_outputs", "write_outputs_table"),
    "loading": ("EvaluationTransform", "Loaded", "load"),
    "lr_schedule": (
        *("ByHand", "Cosine", "DExp", "EarlyStop", "Linear", "OneCycle", "Plateau"),
        *("Schedule", "ScheduleState", "Steps", "WarmUp"),
    ),
    "models.alexnet": ("AlexNet", "alexnet", "alexnet_1gpu", "alexnet_2012", "alexnet_6conv", "alexnet_owt"),
    "models.cifar": ("ConvLocal", "cifar10_quick_net", "conv_local_11pct", "conv_local_13pct", "tiny_net"),
    "models.columns": ("ColumnNet",),
    "models.layers": ("LocalResponseNorm", "LocallyConnected2d", "PaperDropout", "Scale", "SpatialResponseNorm"),
    "models.pools_and_dropconnect": ("DropConnect", "L2Pool2d", "StochasticPool2d"),
    "models.small": ("SmallNet",),
    "optimizer": ("MomentumSGD", "parameter_groups"),
    "precision": ("float32_kernels", "logits"),
    "prediction_table": ("PredictionTable", "read_predictions", "write_predictions"),
    "recipes": ("RECIPES", "Recipe", "recipe"),
    "report.page": ("WrittenReport", "write_report"),
    "run_dir": ("Place", "place_named", "saved_checkpoint"),
    "similar_images": ("Neighbour", "Similar", "find_similar"),
    "trainer": ("train",),
}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first asked for."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
