"""Names what a training does at a time, for the traces that `alexprep.train.profiler` records.

A module of its own below all that name something; torch's ranges cost 7 µs each even where nobody records, these next to nothing.
"""

from __future__ import annotations

import contextlib

from torch.autograd.profiler import record_function

recording = False  # set by `Trace` alone
_NOTHING = contextlib.nullcontext()


def span(name: str) -> contextlib.AbstractContextManager[object]:
    """Opens a named range in the trace; while none is recorded it does nothing, at the cost of a call.

    >>> with span("forward") as nothing:
    ...     print(nothing)
    None
    """
    return record_function(name) if recording else _NOTHING
