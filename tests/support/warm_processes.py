"""Processes of Python that begin with torch, DALI and alexprep imported, which otherwise takes each of them seconds.

`subprocess.Popen` is replaced while `WarmPopen` is `installed`: `python -c CODE`, the repository's modules and torchrun are then forked
from a server, a process of one thread that has done nothing but import. They are this process's own children, with the environment,
folder, descriptors, signal mask and session that they would have. All else starts as ever: other programs, and whatever asks for
another interpreter by its environment. So does everything inside `cold`, for what is promised of a fresh interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import inspect
import io
import json
import os
import pkgutil
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Linux can. With a GPU, libraries may open the driver when they are imported, which does not survive a fork.
POSSIBLE = sys.platform.startswith("linux") and not os.path.exists("/dev/nvidiactl")
PR_SET_CHILD_SUBREAPER = 36  # sys/prctl.h
# What Python and the libraries read when they start, names that begin so; and what is none of it.
AT_START = ("OMP_NUM_THREADS", "LD_", "LC_", "LANG", "PYTHON")
LATER = {"PYTHONPATH", "PYTHONBREAKPOINT"}
STARTERS = ("alexprep.cli", "torch.distributed.run")  # their processes are warm too
_Popen = subprocess.Popen


class Server:
    """The process that others are forked from; it begins with the first of them, and ends with this process at the latest."""

    def __init__(self) -> None:
        self._environment, self._owner, self._lock = dict(os.environ), os.getpid(), threading.Lock()
        self._process = 0

    @staticmethod
    def beside() -> Server:
        """One that is forked from this process, which has a single thread and is itself a child of such a server."""
        server = Server()
        server._socket, theirs = socket.socketpair()
        if child := os.fork():
            theirs.close()
            server._process = child
            return server
        server._socket.close()
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # are for those around it
            signal.signal(each, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        _serve(theirs)()
        os._exit(0)

    def _begin(self) -> int:
        self._socket, theirs = socket.socketpair()
        boot = f"import sys; plain = sys.path[1:]; sys.path[:] = {sys.path!r}; from tests.support.warm_processes import begin"
        # Without pyarrow's thread in the background, so that there is one.
        environment = self._environment | {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
        null = subprocess.DEVNULL
        with theirs:
            words = [sys.executable, "-c", f"{boot}; begin({theirs.fileno()}, plain)"]
            process = _Popen(words, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()], stdin=null, stdout=null)
        process.returncode = 0  # it is waited for by its number
        return process.pid

    def takes(self, words: Sequence[str], environment: Mapping[str, str]) -> bool:
        """Whether a command is one that the server's children can stand for."""
        program = _program(words) if words[:1] == [sys.executable] and os.getpid() == self._owner else None
        names = {name for name in (*self._environment, *environment) if name.startswith(AT_START)} - LATER
        return program is not None and all(self._environment.get(name) == environment.get(name) for name in names)

    def start(self, request: dict[str, Any], descriptors: Sequence[int]) -> int:
        """The process id of a new child of this process."""
        body = json.dumps(
            request | {"mask": [int(each) for each in signal.pthread_sigmask(signal.SIG_BLOCK, [])]}
        ).encode()
        with self._lock, _adopting():
            self._process = self._process or self._begin()
            try:
                socket.send_fds(self._socket, [struct.pack("=I", len(body))], descriptors)
                self._socket.sendall(body)
                (child,) = struct.unpack("=I", _exactly(self._socket, 4))
            except (
                BaseException
            ):  # a test's time is up, say: an answer that comes later would be taken for the next one's
                self.close()
                raise
        return int(child)

    def close(self) -> None:
        """Ends it, even while it still imports."""
        if self._process:
            self._socket.close()
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
            self._process = 0


class WarmPopen(_Popen[Any]):
    """`subprocess.Popen`, but for how the process begins."""

    server: Server | None = None

    def _execute_child(self, *given: Any) -> None:
        method = super()._execute_child  # type: ignore[misc]
        how = inspect.signature(method).bind(*given).arguments
        args = how["args"]
        words = [os.fsdecode(word) for word in ([args] if isinstance(args, (str, bytes)) else args)]
        environment = dict(os.environ if how["env"] is None else how["env"])
        odd = how["shell"] or how["executable"] or how["preexec_fn"] or not how["close_fds"]
        if odd or self.server is None or not self.server.takes(words, environment):
            method(*given)
            return
        inherited = {number: number for number in (0, 1, 2, *how["pass_fds"])}
        piped = {0: how["p2cread"], 1: how["c2pwrite"], 2: how["errwrite"]}
        descriptors = inherited | {number: given for number, given in piped.items() if given != -1}
        request = {"words": words, "environment": environment, "folder": os.fspath(how["cwd"] or os.getcwd())}
        request |= {"session": how["start_new_session"], "descriptors": list(descriptors)}
        self.pid = self.server.start(request, list(descriptors.values()))
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(how[end] for end in ends))  # type: ignore[attr-defined]


def _program(words: Sequence[str]) -> tuple[str, str, list[str]] | None:
    """What Python is to run: "code", "module" or "file", it, and its arguments; None where that is nobody's of here."""
    words = [word for word in words[1:3] if word != "-u"] + list(words[3:])
    if words[:1] == ["-c"] and len(words) > 1:
        return "code", words[1], words[2:]
    if words[:1] == ["-m"] and words[1].startswith(("alexprep.", "tests.", "torch.distributed.run")):
        return "module", words[1], words[2:]
    if words and words[0].startswith(f"{ROOT}/docs/"):
        return "file", words[0], words[1:]
    return None


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Processes begin warm, where that is `POSSIBLE`."""
    if not POSSIBLE:
        yield
        return
    WarmPopen.server = server = Server()
    subprocess.Popen = WarmPopen  # type: ignore[misc]
    try:
        yield
    finally:
        subprocess.Popen, WarmPopen.server = _Popen, None  # type: ignore[misc]
        server.close()


@contextlib.contextmanager
def cold() -> Iterator[None]:
    """Processes begin as they do for a user."""
    warm, subprocess.Popen = subprocess.Popen, _Popen  # type: ignore[misc]
    try:
        yield
    finally:
        subprocess.Popen = warm  # type: ignore[misc]


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """This process becomes the parent of grandchildren whose parent ends."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        if not (more := connection.recv(count - len(data))):
            raise EOFError("the server of warm processes has ended")
        data += more
    return data


# The server's side.


_plain: list[str] = []  # the places of modules that an interpreter has of itself


def begin(descriptor: int, path: Sequence[str]) -> None:
    """Is the server, and then, in a child that was asked for, its program. `path` is what `sys.path` was but for the first place."""
    _plain[:] = [place for place in path if place not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    _load()
    _serve(socket.socket(fileno=descriptor))()


def _serve(connection: socket.socket) -> Callable[[], None]:
    """What a child has to do, in that child; in the server itself, at its end, nothing."""
    while True:
        head, received, _, _ = socket.recv_fds(connection, 4, 64)
        if not head:
            return lambda: None
        request = json.loads(_exactly(connection, *struct.unpack("=I", head)))
        if not os.fork():
            between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.0005)
            # From here on its number is known, and signals wait until it has the mask that it was to have.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
            connection.sendall(struct.pack("=I", os.getpid()))
            connection.close()
            return lambda: _run(request, received)
        for each in received:
            os.close(each)
        os.wait()


def _load() -> None:
    """Imports everything, and nothing else."""
    import alexprep.cli
    import alexprep.pipeline
    import alexprep.shards
    import alexprep.train

    for floor in (alexprep.shards, alexprep.pipeline, alexprep.train, alexprep.cli):
        for module in pkgutil.walk_packages(floor.__path__, f"{floor.__name__}."):
            if not module.name.rpartition(".")[2].startswith("_"):  # programs, and what is C and no module
                importlib.import_module(module.name)
    gc.collect()
    gc.freeze()  # what is never looked at stays shared with the children


def _run(request: dict[str, Any], received: Sequence[int]) -> None:
    """Takes on what the process was to have, and runs its program."""
    high = [
        fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 256) for each in received
    ]  # out of the way of the numbers asked for
    for each in received:
        os.close(each)
    for each, number in zip(high, request["descriptors"], strict=True):
        os.dup2(each, number)
        os.close(each)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if request["session"]:
        os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["mask"])
    _open_streams()
    found = _program(request["words"])
    assert found is not None
    kind, program, words = found
    first = {"code": "", "module": os.getcwd(), "file": os.path.dirname(program)}[kind]
    added = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:] = [first, *added, *_plain]
    if any(each in program for each in STARTERS):
        subprocess.Popen, WarmPopen.server = WarmPopen, Server.beside()  # type: ignore[misc]
    sys.argv = ["-c" if kind == "code" else program, *words]
    if kind == "code":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        _ending(lambda: exec(compile(program, "<string>", "exec"), vars(main)))  # noqa: S102
    elif kind == "module":
        sys.modules.pop(program, None)  # it is run, even if it was imported
        _ending(lambda: runpy.run_module(program, run_name="__main__", alter_sys=True))
    else:
        _ending(lambda: runpy.run_path(program, run_name="__main__"))


def _open_streams() -> None:
    """The server's are of files that could be sought in."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)
        raw = open(number, "wb" if number else "rb", buffering=0 if old.write_through else -1, closefd=False)  # noqa: SIM115
        how = {"line_buffering": old.line_buffering, "write_through": old.write_through}
        stream = io.TextIOWrapper(raw, old.encoding, old.errors, **how)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _ending(work: Callable[[], object]) -> None:
    """As the interpreter ends, but for taking all modules apart, which takes longer than most of these programs."""
    status: object = 0
    try:
        work()
    except SystemExit as left:
        status = left.code
    except BaseException as error:  # noqa: BLE001
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            sys.stderr.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)  # noqa: T201
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)
