"""A TCP proxy in front of PostgreSQL that can lose what a network loses."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self

from tests.servers.postgres import HOST

READY_AND_IDLE = b"Z\x00\x00\x00\x05I"  # ReadyForQuery, outside of any transaction: COMMIT is done


class LossyProxy:
    """Forwards everything, until told otherwise.

    Once armed it passes COMMIT on, keeps the reply to itself and cuts the connection. While `hold` is set, replies wait
    from the statement on that contains it, until `release`.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.armed = False
        self.before_commit = False
        self.swallowed = 0
        self.hold: bytes | None = None
        self.held = asyncio.Event()
        self.release = asyncio.Event()
        self.port = 0
        self._clients: list[asyncio.StreamWriter] = []

    def say(self, reply: bytes) -> None:
        """Tell every client something that the server did not say."""
        for to_client in self._clients:
            to_client.write(reply)

    def cut(self) -> None:
        """Hang up on every client; a reply that is held never comes."""
        for to_client in self._clients:
            to_client.close()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, HOST, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        server, to_server = await asyncio.open_connection(HOST, self._target_port)
        link = _Link(self, to_client, to_server)
        self._clients.append(to_client)
        try:
            await asyncio.wait(
                [asyncio.ensure_future(link.upwards(client)), asyncio.ensure_future(link.downwards(server))],
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            self._clients.remove(to_client)
            link.cut()


class _Link:
    """One connection through the proxy."""

    def __init__(self, proxy: LossyProxy, to_client: asyncio.StreamWriter, to_server: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._to_client = to_client
        self._to_server = to_server
        self._swallowing = False
        self._holding = False

    async def upwards(self, client: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while data := await client.read(65_536):
                if self._proxy.armed and b"COMMIT" in data:
                    self._proxy.armed = False
                    self._swallowing = True
                    if self._proxy.before_commit:
                        return
                if self._proxy.hold is not None and self._proxy.hold in data:
                    self._holding = True
                    self._proxy.held.set()
                self._to_server.write(data)

    async def downwards(self, server: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while data := await server.read(65_536):
                if self._holding:
                    await self._proxy.release.wait()
                if not self._swallowing:
                    self._to_client.write(data)
                elif READY_AND_IDLE in data:
                    self._proxy.swallowed += 1
                    return

    def cut(self) -> None:
        for writer in (self._to_client, self._to_server):
            writer.close()


def fatal(sqlstate: str, message: str) -> bytes:
    """The server's last word on a connection, an ErrorResponse."""
    fields = b"SFATAL\x00VFATAL\x00C" + sqlstate.encode() + b"\x00M" + message.encode() + b"\x00\x00"
    return b"E" + (len(fields) + 4).to_bytes(4, "big") + fields


class RefusingServer:
    """Speaks just enough of PostgreSQL's protocol to refuse every connection with one error."""

    def __init__(self, sqlstate: str, message: str) -> None:
        self._reply = fatal(sqlstate, message)
        self._server: asyncio.Server | None = None
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._refuse, HOST, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()

    async def _refuse(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                length = int.from_bytes(await client.readexactly(4), "big")
                body = await client.readexactly(length - 4)
                if body[:4] == (80_877_103).to_bytes(4, "big"):  # SSLRequest: not spoken here
                    to_client.write(b"N")
                    continue
                to_client.write(self._reply)
                break
        to_client.close()
