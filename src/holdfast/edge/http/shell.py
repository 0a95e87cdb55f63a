"""The outermost layer of every request: trace, measure, and end it in time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from opentelemetry import trace

from holdfast import observe
from holdfast.clock import Clock
from holdfast.edge.http.problems import MEDIA_TYPE, RETRY_AFTER_S, problem

METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
TRACE_BYTES_MAX = 512  # W3C Trace Context asks to carry at least so much; it is stored with every message


class Shell:
    """An ASGI layer around the application."""

    def __init__(self, app: ASGIApp, clock: Clock, timeout_s: float) -> None:
        self._app = app
        self._clock = clock
        self._timeout_s = timeout_s
        observe.tracer()  # asked once, not for each request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        started = self._clock.monotonic()
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with _traced(scope) as span:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._app(scope, receive, watched)
            except TimeoutError:
                if status == 0:
                    status = 503
                    await _too_late(send, self._timeout_s)
            route = str(scope.get("path_template") or "unmatched")
            if span is not None:
                _tell(span, scope, route, status)
        observe.http_requests.labels(route, str(status)).inc()
        observe.http_seconds.labels(route).observe(self._clock.monotonic() - started)


@contextmanager
def _traced(scope: Any) -> Iterator[trace.Span | None]:
    """Within the caller's trace, or a new one; in a span where there is an SDK and nobody made one around us."""
    tracer = observe.known_tracer()
    if tracer is None:
        with observe.trace_from(_headers(scope)):
            yield None
    elif trace.get_current_span().is_recording():
        yield None
    else:
        parent = observe.context_of(_headers(scope))
        span = tracer.start_span(_method(scope), context=parent, kind=trace.SpanKind.SERVER)
        with observe.within(span):
            yield span


def _tell(span: trace.Span, scope: Any, route: str, status: int) -> None:
    """Name the span by its route: a path may hold ids, and would make every request a name of its own."""
    span.update_name(f"{_method(scope)} {route}")
    span.set_attributes(
        {"http.request.method": _method(scope), "http.route": route, "http.response.status_code": status}
    )
    if status >= 500:
        span.set_status(trace.Status(trace.StatusCode.ERROR))


def _method(scope: Any) -> str:
    return scope["method"] if scope["method"] in METHODS else "_OTHER"


def _headers(scope: Scope) -> dict[str, str]:
    wanted = (b"traceparent", b"tracestate")
    return {
        name.decode(): value.decode("latin-1")
        for name, value in scope["headers"]
        if name in wanted and len(value) <= TRACE_BYTES_MAX
    }


async def _too_late(send: Send, timeout_s: float) -> None:
    detail = f"no answer within {timeout_s} s; ask again with the same idempotency key"
    body = msgspec.json.encode(problem(503, "outcome_unknown", detail))
    headers = [
        (b"content-type", MEDIA_TYPE.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", RETRY_AFTER_S.encode()),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
