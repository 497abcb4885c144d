"""A rank started by `launch`: joins the job, calls the function, leaves its result or its reason for the parent.

python -m alexprep.train.parallel.rank FOLDER      FOLDER/job.json: target, arguments, device, backend, timeout, path
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from alexprep.shards.errors import AlexprepError
from alexprep.train.user_code import load

PARENT = "ALEXPREP_PARENT"  # process id of the launcher
PR_SET_PDEATHSIG = 1  # sys/prctl.h


def main() -> None:
    """Runs one rank; ends the process with 1 if the function raised."""
    _die_with_parent()
    faulthandler.enable()
    folder = Path(sys.argv[1])
    rank = os.environ["RANK"]
    try:
        job = json.loads((folder / "job.json").read_text())
        sys.path[:] = job["path"]
        function = load(job["target"], "target").value
        from alexprep.train.distributed.world import from_environment

        world = from_environment(job["device"], job["backend"], job["timeout"])
        result = function(world, **job["arguments"])
        (folder / f"result-{rank}.json").write_text(json.dumps(result))
        world.close()
        _leave(0)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)  # so that the parent sees what ended it
    except BaseException as error:  # noqa: BLE001 also SystemExit: a rank that leaves early is a failure
        if not isinstance(error, AlexprepError):
            traceback.print_exc()
        reason = {"time": time.time(), "kind": type(error).__name__, "message": str(error)}
        try:
            (folder / f"failure-{rank}.json").write_text(json.dumps(reason))
        except OSError:  # the disk that it failed for may be this one too
            print(f"Error in rank {rank}: {error}", file=sys.stderr)  # noqa: T201
        _leave(1)


def _die_with_parent() -> None:
    """The kernel kills this process when the launcher ends, however it ends."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[PARENT]):
        os._exit(1)  # it ended before that


def _leave(code: int) -> None:
    """Ends the process, but not by way of destructors: they may wait for ranks that are gone, and gloo's now and then abort."""
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
