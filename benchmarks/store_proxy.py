"""A proxy in front of a store's server that counts, delays and fails: as far and as unreliable a store as one likes, on one machine.

python benchmarks/store_proxy.py UPSTREAM_PORT

Prints its own port. A line of JSON on stdin sets some of `Behaviour`'s fields; the answer is what was counted since the last such line. What was
fetched once is kept in memory until something is written, so that the server's own speed is left out.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from dataclasses import dataclass, fields

_CHUNK = 2**17  # bytes that are sent at once
_HANGING = 3600.0  # seconds
_REFUSAL = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>The request is refused.</Message></Error>"
_HOP_BY_HOP = (b"connection", b"transfer-encoding", b"keep-alive")


@dataclass
class Behaviour:
    """How the store behaves."""

    latency: float = 0.0  # seconds before an answer begins
    rate: float = 0.0  # bytes a second of a connection; 0: no limit
    failing: float = 0.0  # share of the requests that are answered by 503,
    cut: float = 0.0  # whose answer ends in the middle,
    hanging: float = 0.0  # that get no answer
    away: bool = False  # whether connections are closed without an answer
    refusing: str = ""  # S3's code of an error, such as ExpiredToken, that answers all requests


@dataclass
class Counts:
    """What went by."""

    requests: int = 0
    sent: int = 0  # bytes of bodies


class Proxy:
    """Answers requests by those of an upstream server on this machine."""

    def __init__(self, upstream: int, seed: int = 0) -> None:
        self.behaviour, self.counts = Behaviour(), Counts()
        self._upstream, self._random = upstream, random.Random(seed)
        self._kept: dict[bytes, tuple[bytes, list[bytes], bytes]] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers the requests of one connection."""
        try:
            while not self.behaviour.away and await self._answer(reader, writer):
                pass
        except (OSError, EOFError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; False where the connection is to be closed."""
        request = await reader.readuntil(b"\r\n\r\n")
        self.counts.requests += 1
        behaviour, chance = self.behaviour, self._random.random()
        await asyncio.sleep(behaviour.latency)
        if behaviour.away:
            return False
        if behaviour.refusing:
            words = _REFUSAL % behaviour.refusing.encode()
            writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n" % len(words))
            writer.write(b"" if request.startswith(b"HEAD ") else words)
            await writer.drain()
            return True
        if chance < behaviour.failing:
            writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            return True
        chance -= behaviour.failing
        if chance < behaviour.hanging:
            await asyncio.sleep(_HANGING)
        cut = 0 <= chance - behaviour.hanging < behaviour.cut
        status, headers, body = await self._fetched(request, await _body(request, reader, writer))
        head = b"\r\n".join([status, *headers, b"", b""])
        writer.write(head)
        await self._send(writer, body[: len(body) // 2] if cut else body)
        return not cut

    async def _send(self, writer: asyncio.StreamWriter, body: bytes) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        for at in range(0, len(body), _CHUNK):
            if self.behaviour.away:
                raise ConnectionAbortedError
            part = body[at : at + _CHUNK]
            writer.write(part)
            await writer.drain()
            self.counts.sent += len(part)
            if self.behaviour.rate:
                await asyncio.sleep(began + (at + len(part)) / self.behaviour.rate - loop.time())

    async def _fetched(self, request: bytes, given: bytes) -> tuple[bytes, list[bytes], bytes]:
        lines = request.split(b"\r\n")
        if not request.startswith((b"GET ", b"HEAD ")):
            self._kept.clear()
        ranges = b"".join(line for line in lines if line.lower().startswith(b"range:"))
        key = lines[0] + ranges
        if key not in self._kept:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream)
            sent = [line for line in lines[:-2] if line.split(b":")[0].lower() not in (b"connection", b"expect")]
            writer.write(b"\r\n".join([*sent, b"Connection: close", b"", given]))
            head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
            writer.close()
            status, *headers = head.split(b"\r\n")
            chunked = any(line.lower().startswith(b"transfer-encoding: chunked") for line in headers)
            body = _unchunked(body) if chunked else body
            headers = [line for line in headers if line.split(b":")[0].lower() not in _HOP_BY_HOP]
            if not any(line.lower().startswith(b"content-length:") for line in headers):
                headers.append(b"Content-Length: %d" % len(body))
            self._kept[key] = status.replace(b"HTTP/1.0", b"HTTP/1.1"), headers, body
        return self._kept[key]


async def _body(request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """What a request sends."""
    fields = dict(line.lower().split(b": ", 1) for line in request.split(b"\r\n")[1:-2])
    if b"expect" in fields:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return await reader.readexactly(int(fields.get(b"content-length", 0)))


def _unchunked(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        whole += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    return whole


async def _controlled(proxy: Proxy) -> None:
    """Behaves as stdin says, until that ends."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    known = {field.name for field in fields(Behaviour)}
    while line := await lines.readline():
        given = json.loads(line)
        assert given.keys() <= known, given
        proxy.behaviour = Behaviour(**{**vars(proxy.behaviour), **given})
        print(json.dumps(vars(proxy.counts)), flush=True)
        proxy.counts = Counts()


async def main() -> None:
    """Serves on a free port of this machine."""
    proxy = Proxy(int(sys.argv[1]))
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=2**20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await _controlled(proxy)


if __name__ == "__main__":
    asyncio.run(main())
