"""Makes, checks, describes and reads datasets of resized images in webdataset shards: the public names, each loaded when first asked for.

`inspect_source` tells what a source of images (`find_source`, `list_inputs`) holds, and `convert` turns it into a finished dataset;
`verify` and `repair` look after that, `push` puts it on the Hugging Face hub, `pca_stats` computes its mean image and principal components, `read_dataset` and `Samples` read
it. Training batches come from `alexprep.pipeline.Loader`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alexprep.shards.contact_sheet import draw_contact_sheet
    from alexprep.shards.conversion import Report, convert
    from alexprep.shards.dataset_format import read_dataset, read_index
    from alexprep.shards.errors import AlexprepError
    from alexprep.shards.hub import Pushed, push
    from alexprep.shards.image_codec import Target
    from alexprep.shards.inspection import Inspection, inspect_source
    from alexprep.shards.listing import Listing, list_inputs
    from alexprep.shards.plan import ShardOptions
    from alexprep.shards.ray_runner import RayEngine
    from alexprep.shards.rgb_statistics import Statistics, pca_stats, publish_statistics, read_statistics
    from alexprep.shards.sample_reader import Samples
    from alexprep.shards.sources.base import Input, Location, Source
    from alexprep.shards.sources.layout_detection import find_source
    from alexprep.shards.verification import Problem, Verdict, repair, verify
    from alexprep.shards.webdataset_index import TarIndex, index_tars
    from alexprep.shards.worker_pool import Engine, InProcessEngine, LocalEngine

__all__ = [
    "AlexprepError",
    "Engine",
    "InProcessEngine",
    "Input",
    "Inspection",
    "Listing",
    "LocalEngine",
    "Location",
    "Problem",
    "Pushed",
    "RayEngine",
    "Report",
    "Samples",
    "ShardOptions",
    "Source",
    "Statistics",
    "TarIndex",
    "Target",
    "Verdict",
    "convert",
    "draw_contact_sheet",
    "find_source",
    "index_tars",
    "inspect_source",
    "list_inputs",
    "pca_stats",
    "publish_statistics",
    "push",
    "read_dataset",
    "read_index",
    "read_statistics",
    "repair",
    "verify",
]

_HOMES = {
    "contact_sheet": ("draw_contact_sheet",),
    "conversion": ("Report", "convert"),
    "dataset_format": ("read_dataset", "read_index"),
    "errors": ("AlexprepError",),
    "hub": ("Pushed", "push"),
    "image_codec": ("Target",),
    "inspection": ("Inspection", "inspect_source"),
    "listing": ("Listing", "list_inputs"),
    "plan": ("ShardOptions",),
    "ray_runner": ("RayEngine",),
    "sample_reader": ("Samples",),
    "rgb_statistics": ("Statistics", "pca_stats", "publish_statistics", "read_statistics"),
    "sources.base": ("Input", "Location", "Source"),
    "sources.layout_detection": ("find_source",),
    "verification": ("Problem", "Verdict", "repair", "verify"),
    "webdataset_index": ("TarIndex", "index_tars"),
    "worker_pool": ("Engine", "InProcessEngine", "LocalEngine"),
}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first asked for: decoders and pyarrow take half a second to import."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return __all__
