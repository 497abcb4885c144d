"""What ranks on several hosts need beside their groups: that all are to do the same, and why the job ended, by the name of a host.

The ranks that `alexprep.train.launch` starts have a parent that watches them. Those of several launchers, torchrun on each host say, have
nobody who sees all: one that fails tells the others why, and each can try whether another's process still lives.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from alexprep.pipeline import sampler
from alexprep.shards import errors
from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import json_bytes
from alexprep.train import signals_and_memory
from alexprep.train.checkpoint import differences, some_of
from alexprep.train.distributed.world import World

ANSWER_SECONDS = 3.0  # for a host to answer that it lives; and for a rank that failed first to have said so
MOST_WORDS = 5_000  # letters of a reason
BACKLOG = 16  # connections that a port keeps for each rank: at the beginning one, at the end a few
# What gloo, NCCL and torch's store say, always in a RuntimeError, where another rank has broken off or is waited for in vain.
LOST = re.compile(r"gloo|nccl|connection|timeout|timed out|socket|broken pipe", re.IGNORECASE)
# Parts of what ranks tell of themselves that must be alike, and what to do where they are not.
ALIKE = {
    "versions": "install the same on every host",
    "options": "start the same command on every host",
    "identity": "give every host the same data, recipe and code",
}


def check_alike(world: World, told: Mapping[str, Any]) -> None:
    """Makes sure that all ranks are to do the same; all call it, each with JSON values of its own.

    Args:
        world: of this rank.
        told: "error", the words of an error or None; "data", where it reads; and the parts of `ALIKE`.

    Raises:
        AlexprepError: on all ranks the same, where one has an error, or is to do otherwise than rank 0.
    """
    if words := refusal(world.gather({"host": socket.gethostname(), **told})):
        raise AlexprepError(words)


def refusal(told: Sequence[Mapping[str, Any]]) -> str | None:
    """Why ranks cannot train together, by what each told, by rank; None where they can."""
    problems = {rank: each["error"] for rank, each in enumerate(told) if each["error"] is not None}
    if len(problems) == len(told) and len(set(problems.values())) == 1:  # no matter of hosts
        return str(problems[0])
    first = told[0]
    for part, next_step in ALIKE.items():
        if part == "identity" and problems:
            rank, words = next(iter(problems.items()))
            return f"rank {rank} on {told[rank]['host']}: {words}"
        for rank, each in enumerate(told):
            if found := differences(first[part], each[part], words="{0} is {2!r}, not {1!r}"):
                who = f"rank {rank} on {each['host']} (data {each['data']})"
                other = f"rank 0 on {first['host']} (data {first['data']})"
                return f"{who} is not as {other}: {some_of(found)}: {next_step}"
    return None


def code_digest() -> str:
    """The sha256, in hex, of the code that training goes through."""
    digest = hashlib.sha256()
    for module in (errors, sampler, signals_and_memory):  # one of each floor
        folder = Path(str(module.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def failures_shared(world: World) -> Iterator[None]:
    """Inside the block, a rank that fails tells the others why; those that wait for one that is gone name it and its host.

    All ranks enter it together.

    Raises:
        AlexprepError: another rank failed, or is gone.
    """
    master = os.environ["MASTER_ADDR"]
    address = _own_address(master)
    elsewhere = world.gather(address)
    with socket.create_server(
        (_listening_at(address, elsewhere), 0), family=_family(master), backlog=BACKLOG * world.size
    ) as own:
        token = world.of_first(lambda: secrets.token_hex(16))
        cards = world.gather([socket.gethostname(), address, own.getsockname()[1]])
        places = [Card(host, (reached or master, port)) for host, reached, port in cards]
        ports = Ports(world.rank, own, places, token)
        try:
            yield
        except Exception as error:
            if (reason := ports.reason(error)) is error:
                raise
            raise reason from error


def _family(master: str) -> socket.AddressFamily:
    return socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0][0]


def _own_address(master: str) -> str | None:
    """The address by which this host reaches the first one; None for the first itself, which others know by that name."""
    family, kind, _, _, place = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # of UDP: chooses an address, and sends nothing
        address = str(probe.getsockname()[0])
    return None if ipaddress.ip_address(address.partition("%")[0]).is_loopback else address


def _listening_at(own: str | None, all_addresses: Sequence[str | None]) -> str:
    """Where a rank listens: on the loopback alone where all are on one machine; a name's own machine may know it by the loopback only."""
    if not any(all_addresses):
        return "localhost"
    return own or ""


class Card(NamedTuple):
    """Where a rank is."""

    host: str
    address: tuple[str, int]  # of its port


class Ports:
    """A port of each rank, by which others know that its process lives, and in which they leave their last words.

    Nobody accepts a connection before there is something to explain: the system keeps it, and what was sent, also when the sender has
    ended. So a reason reaches ranks that are busy, without a thread in any of them.
    """

    def __init__(self, rank: int, own: socket.socket, cards: Sequence[Card], token: str) -> None:
        """`own` listens; `token` is the job's, so that no stranger's words are taken for a rank's."""
        self.rank, self._own, self._cards, self._token = rank, own, cards, token
        self._never = set(self._with_each(lambda connection: None))  # reached: no sign that they are gone

    def reason(self, error: Exception) -> Exception:
        """What to raise where this rank fails with `error`: that; or, where it lost another, what that one said, or that it is gone or silent."""
        if not (isinstance(error, RuntimeError) and LOST.search(str(error))):
            told = error.as_made if isinstance(error, AlexprepError) else f"{type(error).__name__}: {error}"
            self._tell(f"{self._who([self.rank])}: {told}")
            return error
        self._tell(None)
        silent, end = set(range(len(self._cards))) - {self.rank}, time.monotonic() + ANSWER_SECONDS
        while silent and time.monotonic() < end:
            gone = set(self._with_each(lambda connection: None)) - self._never
            for rank, words in self.heard():
                if words is not None:
                    return AlexprepError(words)
                silent.discard(rank)  # it has lost somebody too
            if gone:
                return self._lost(f"{self._who(gone)} is gone: killed, or the host does not answer")
            time.sleep(ANSWER_SECONDS / 20)
        if not silent:
            return self._lost(f"the ranks lost each other ({error})")
        return self._lost(f"{self._who(silent)} does not answer: stopped, stuck or cut off ({error})")

    def _lost(self, words: str) -> AlexprepError:
        words += ". To go on from the last checkpoint, start the same command on all hosts with --resume"
        self._tell(words)
        return AlexprepError(words)

    def _tell(self, words: str | None) -> None:
        """Leaves a reason in the ports of all others; None that this rank has lost somebody."""
        data = json_bytes([self._token, self.rank, words and words[:MOST_WORDS]], indent=None)
        self._with_each(lambda connection: connection.sendall(data))

    def heard(self) -> list[tuple[int, str | None]]:
        """What others left here since the last call: their ranks and words."""
        found: list[tuple[int, str | None]] = []
        self._own.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                with self._own.accept()[0] as connection, contextlib.suppress(OSError, ValueError, TypeError):
                    connection.settimeout(ANSWER_SECONDS)
                    with connection.makefile("rb") as file:
                        token, rank, words = json.loads(file.read(8 * MOST_WORDS))
                    found += [(rank, words)] if token == self._token else []
        return found

    def _with_each(self, use: Callable[[socket.socket], None]) -> list[int]:
        """Connects with each other rank; gives those that cannot be reached."""

        def reached(rank: int) -> bool:
            try:
                with socket.create_connection(self._cards[rank].address, timeout=ANSWER_SECONDS) as connection:
                    use(connection)
            except OSError:
                return False
            return True

        others = [rank for rank in range(len(self._cards)) if rank != self.rank]
        with ThreadPoolExecutor(min(64, len(others) + 1)) as pool:
            return [rank for rank, lives in zip(others, pool.map(reached, others), strict=True) if not lives]

    def _who(self, ranks: Iterable[int]) -> str:
        by_host: dict[str, list[str]] = {}
        for rank in sorted(ranks):
            by_host.setdefault(self._cards[rank].host, []).append(str(rank))
        return "; ".join(f"rank {', '.join(those)} on {host}" for host, those in by_host.items())
