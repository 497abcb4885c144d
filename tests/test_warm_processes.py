"""Processes that are forked from a warm one are those that the interpreter would start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.warm_processes import POSSIBLE, WarmPopen, cold

pytestmark = pytest.mark.skipif(not POSSIBLE, reason="here, all processes begin cold")
FIRST = "import json, os, signal, sys\n"
SEEN = """
masked = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))
handlers = [str(signal.getsignal(number)).partition(" at ")[0] for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
streams = [[stream.encoding, stream.errors, stream.line_buffering, stream.write_through] for stream in (sys.stdin, sys.stdout, sys.stderr)]
descriptors = [number for number in range(64) if os.path.exists(f"/proc/self/fd/{number}")]
seen = [sys.argv, sys.path, __name__, os.getcwd(), dict(os.environ), os.getppid(), os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid()]
print(json.dumps([seen, masked, handlers, streams, descriptors, sys.stdin.read()]))
"""
ENDS = {
    "in the end": "print('words')",
    "with a status": "print('words'); sys.exit(3)",
    "with words": "sys.exit('words')",
    "with an error": "int('words')",
    "by a Ctrl-C": "signal.raise_signal(signal.SIGINT)",
    "by a kill": "os.kill(os.getpid(), signal.SIGKILL)",
    "at last": "import atexit; atexit.register(print, 'words')",
}


def _both(words: list[str], **how: Any) -> list[subprocess.CompletedProcess[str]]:
    """What becomes of a command, warm and cold."""
    assert subprocess.Popen is WarmPopen
    command = [sys.executable, *words]
    how |= {"capture_output": True, "text": True, "timeout": 300}
    warm = subprocess.run(command, check=False, **how)
    with cold():
        return [warm, subprocess.run(command, check=False, **how)]


@pytest.mark.parametrize("session", [False, True])
def test_what_a_program_finds(session: bool, tmp_path: Path) -> None:
    """Also which signals are held back, and descriptors beyond the usual three."""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}/one{os.pathsep}{tmp_path}/other", "NEW": "ä"}
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    source, end = os.pipe()
    try:
        how: dict[str, Any] = {"env": environment, "cwd": tmp_path, "start_new_session": session}
        warm, as_ever = _both(["-c", FIRST + SEEN, "a", "-b"], input="given", pass_fds=[source], **how)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        os.close(source)
        os.close(end)
    assert (warm.stderr, as_ever.stderr) == ("", "")
    assert json.loads(warm.stdout) == json.loads(as_ever.stdout)


@pytest.mark.parametrize("end", ENDS)
def test_how_a_program_ends(end: str) -> None:
    warm, as_ever = _both(["-c", FIRST + ENDS[end]])
    assert (warm.returncode, warm.stdout) == (as_ever.returncode, as_ever.stdout)
    assert warm.stderr.splitlines()[-1:] == as_ever.stderr.splitlines()[-1:]


def test_a_module_is_the_program(tmp_path: Path) -> None:
    warm, as_ever = _both(["-m", "alexprep.cli", "verify", "nowhere"], cwd=tmp_path)
    assert (warm.returncode, warm.stdout, warm.stderr) == (as_ever.returncode, as_ever.stdout, as_ever.stderr)
    assert warm.returncode == 1 and "nowhere holds no data set" in warm.stderr


def test_another_interpreter_is_asked_for() -> None:
    """By a variable that Python reads when it starts: such a process is no warm one."""
    program = "import sys; print(sys.stdout.encoding, 'torch' in sys.modules)"
    for name, answer in (("OTHER", "utf-8 True"), ("PYTHONIOENCODING", "ascii False")):
        environment = {**os.environ, name: "ascii"}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == answer
