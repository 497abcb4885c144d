"""The one exception that alexprep raises on purpose."""


class AlexprepError(Exception):
    """Something the caller can mend: the message names the value, the bound and the next step.

    The command line prints the message alone, without a traceback; any other exception is a bug.
    """


class DeviceLostError(Exception):
    """A GPU failed in a way that only a new process mends."""
