"""The hottest routes as plain ASGI and msgspec, in front of the framework.

A request of these costs about 40 us here and 390 us with the framework's routing, dependencies and parsing (CPU, one
small JSON body, Litestar 2.25). On sale day everybody asks for the same two things.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial

import msgspec
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Receive, Scope, Send

from holdfast.edge.http.problems import MEDIA_TYPE, BodyTooLarge, answer, problem
from holdfast.errors import InvalidInput

Headers = Mapping[str, str]


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent back."""

    status: int
    body: bytes
    media_type: str = "application/json"
    headers: Mapping[str, str] = {}


ReadBody = Callable[[], Awaitable[bytes]]
Handler = Callable[[Headers, ReadBody], Awaitable[Reply]]


class HotRoutes:
    """Answers exact (method, path) pairs itself and leaves everything else to the application behind it.

    `behind` are pairs of these paths that the application answers.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Mapping[tuple[str, str], Handler],
        body_bytes_max: int,
        behind: Collection[tuple[str, str]] = (),
    ) -> None:
        self._app = app
        self._routes = routes
        self._behind = frozenset(behind)
        self._body_bytes_max = body_bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = None
        if scope["type"] == ScopeType.HTTP:
            handler = self._routes.get((scope["method"], scope["path"])) or self._wrong_method(scope)
        if handler is None:
            await self._app(scope, receive, send)
            return
        scope["path_template"] = scope["path"]
        try:
            reply = await handler(_headers(scope), partial(self._body, receive))
        except Exception as error:
            told, headers = answer(error)
            reply = Reply(status=told.status, body=msgspec.json.encode(told), media_type=MEDIA_TYPE, headers=headers)
        await _send(reply, send)

    def _wrong_method(self, scope: HTTPScope) -> Handler | None:
        """For a path of ours the answer to every other method; None for a path that is not ours."""
        here = [method for method, path in self._routes if path == scope["path"]]
        if not here or (scope["method"], scope["path"]) in self._behind:
            return None
        allowed = ", ".join(here + sorted(method for method, path in self._behind if path == scope["path"]))
        asked = scope["method"] == "OPTIONS"

        async def refuse(_: Headers, __: ReadBody) -> Reply:
            body = msgspec.json.encode(problem(405, "method_not_allowed", f"use {allowed}"))
            headers = {"allow": f"OPTIONS, {allowed}"}
            if asked:
                return Reply(status=204, body=b"", headers=headers)
            return Reply(status=405, body=body, media_type=MEDIA_TYPE, headers=headers)

        return refuse

    async def _body(self, receive: Receive) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise InvalidInput("the client went away before its body was complete")
            chunks.append(message["body"])
            size += len(message["body"])
            if size > self._body_bytes_max:
                raise BodyTooLarge(f"a body has at most {self._body_bytes_max} bytes here")
            if not message.get("more_body"):
                return b"".join(chunks)


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


async def _send(reply: Reply, send: Send) -> None:
    headers = [
        (b"content-type", reply.media_type.encode()),
        (b"content-length", str(len(reply.body)).encode()),
        *((name.encode(), value.encode()) for name, value in reply.headers.items()),
    ]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body, "more_body": False})
