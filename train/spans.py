"""Names for what a training does at a time, for the trace of `alexprep.train.profiler`."""

from __future__ import annotations

import contextlib

from torch.autograd.profiler import record_function

recording = False  # set by `Trace` alone
_NOTHING = contextlib.nullcontext()


def span(name: str) -> contextlib.AbstractContextManager[object]:
    """A named range in the trace; while none is recorded, nothing, at the cost of a call.

    >>> with span("forward") as nothing:
    ...     print(nothing)
    None
    """
    return record_function(name) if recording else _NOTHING
