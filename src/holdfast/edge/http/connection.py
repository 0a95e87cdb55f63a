"""A client's connection: uvicorn's HTTP/1.1 protocol with limits on the head of a request.

uvicorn bounds neither how large a head grows nor how long it may take, so a client that sends headers for ever, or one
byte a minute, would hold memory and a connection (slowloris).
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from holdfast.edge.http.problems import MEDIA_TYPE, problem


class Connection(HttpToolsProtocol):
    """One client's connection; what is no HTTP, too large or too slow is answered with a problem and closed.

    The head's time runs from its first byte, on a new connection from its beginning.
    """

    def __init__(self, *arguments: Any, head_bytes_max: int, head_timeout_s: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_bytes_max = head_bytes_max
        self._head_timeout_s = head_timeout_s
        self._head_bytes = 0  # of whole headers
        self._received = 0  # of a head that has not ended yet
        self._another = False  # whether the bytes at hand ended a head or a body
        self._head_timer: asyncio.TimerHandle | None = None
        self._refusal = (400, "invalid_input", "this is no HTTP/1.1 request")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_here()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._another = False
        super().data_received(data)
        # A header that never ends: the parser tells of whole ones only. What came with the end of another is not ours.
        self._received = 0 if self._another or self._head_timer is None else self._received + len(data)
        if self._received > self._head_bytes_max:
            self._too_large()
            self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._await_head()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_is_here()
        self._another = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._another = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser, or a limit, refused."""
        self._head_is_here()
        if self.transport.is_closing():
            return
        status, code, detail = self._refusal
        body = msgspec.json.encode(problem(status, code, detail))
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: {MEDIA_TYPE}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._head_bytes_max:
            self._too_large()
            raise _HeadTooLarge()

    def _too_large(self) -> None:
        self._refusal = (431, "head_too_large", f"path and headers have at most {self._head_bytes_max} bytes here")

    def _await_head(self) -> None:
        self._head_is_here()
        self._head_timer = self.loop.call_later(self._head_timeout_s, self._too_slow)

    def _head_is_here(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._refusal = (408, "request_timeout", f"the headers were not complete within {self._head_timeout_s} s")
        self.send_400_response("")


class _HeadTooLarge(Exception):
    """Raised within the parser's callbacks, which ends the parsing."""
