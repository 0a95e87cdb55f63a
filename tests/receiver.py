"""A receiver of webhooks: a real HTTP server on a free port that answers as it is told and keeps what it got."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

Reply = Callable[["Got", asyncio.StreamWriter], Awaitable[None]]


class Got(NamedTuple):
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.raw)

    @property
    def type(self) -> str:
        return str(self.body["type"])


class Receiver:
    """What stands at the other end of a webhook."""

    def __init__(self) -> None:
        self.got: list[Got] = []
        self.port = 0
        self.reply: Reply = answering(200)
        self.open = 0
        self.open_max = 0

    def url(self, path: str = "/hook", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.open_max = max(self.open_max, self.open)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.strip().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            raw = await reader.readexactly(int(headers.get("content-length", "0")))
            method, path, _ = first.split(" ")
            got = Got(method, path, headers, raw)
            self.got.append(got)
            await self.reply(got, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the sender hung up
        finally:
            self.open -= 1
            writer.close()


def answering(status: int, body: bytes = b"thanks", *headers: str) -> Reply:
    """Answer with this status."""

    async def reply(_: Got, writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status} Whatever", f"content-length: {len(body)}", *headers]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    return reply


def bytes_as_they_are(raw: bytes) -> Reply:
    """Answer with these bytes, whatever they are, and hang up."""

    async def reply(_: Got, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)

    return reply


def never(stop: asyncio.Event) -> Reply:
    """Take the request and say nothing until told to."""

    async def reply(got: Got, writer: asyncio.StreamWriter) -> None:
        await stop.wait()
        await answering(200)(got, writer)

    return reply


@asynccontextmanager
async def receiving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    """A receiver that listens."""
    receiver = Receiver()
    server = await asyncio.start_server(receiver._serve, "127.0.0.1", 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
