"""Structured logs, metrics and trace context: how every room is watched.

Logs go to standard error, one event per line. Metrics are Prometheus collectors in one registry of ours. Trace context
is W3C `traceparent`, taken from the HTTP request or the message and handed on in every message sent meanwhile; that
needs no OpenTelemetry SDK. Where the program has one, `tracer` finds it, and spans are made as well.
"""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Any

import structlog
from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from structlog.processors import ExceptionRenderer
from structlog.tracebacks import ExceptionDictTransformer

DESCRIPTION_CHARS_MAX = 500

registry = CollectorRegistry(auto_describe=True)

batch_size = Histogram(
    "holdfast_group_commit_batch_size",
    "Requests decided by one transaction.",
    ["name"],
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500),
    registry=registry,
)
batch_wait = Histogram(
    "holdfast_group_commit_wait_seconds",
    "Time from handing in the oldest request of a batch to the start of the transaction that decides it.",
    ["name"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
    registry=registry,
)
queue_refusals = Counter(
    "holdfast_group_commit_refused", "Requests refused because the bounded queue was full.", ["name"], registry=registry
)
batch_splits = Counter(
    "holdfast_group_commit_splits", "Batches split to isolate a crashing request.", ["name"], registry=registry
)
messages_published = Counter(
    "holdfast_messages_published", "Messages stored, by exchange.", ["exchange"], registry=registry
)
messages_handled = Counter(
    "holdfast_messages_handled", "Deliveries settled, by queue and outcome.", ["queue", "outcome"], registry=registry
)
messages_dead = Counter(
    "holdfast_messages_dead_lettered", "Messages taken out of a queue, by reason.", ["reason"], registry=registry
)
messages_delivered = Counter(
    "holdfast_messages_delivered", "Deliveries handed to this process, by queue.", ["queue"], registry=registry
)
messages_in_flight = Gauge(
    "holdfast_messages_in_flight", "Deliveries claimed and not yet settled.", ["queue"], registry=registry
)
queue_messages = Gauge(
    "holdfast_queue_messages",
    "Messages in a queue of the database: ready, unacked, delayed, parked.",
    ["queue", "state"],
    registry=registry,
)
queue_oldest_age = Gauge(
    "holdfast_queue_oldest_age_seconds",
    "How long the oldest ready message of a queue has been waiting; 0 without one.",
    ["queue"],
    registry=registry,
)
queues_counted = Gauge(
    "holdfast_queues_counted_timestamp_seconds",
    "When the queues of the database were last counted; 0: not yet.",
    registry=registry,
)
http_requests = Counter(
    "holdfast_http_requests", "HTTP requests, by route and status.", ["route", "status"], registry=registry
)
http_seconds = Histogram(
    "holdfast_http_request_seconds",
    "Time from request to response, by route.",
    ["route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
    registry=registry,
)
orders_moved = Counter(
    "holdfast_orders_moved", "Order transitions committed, by target state.", ["state"], registry=registry
)
payment_notices = Counter(
    "holdfast_payment_notices",
    "Notices and answers of payment providers kept, by provider and verdict; of most verdicts somebody should know.",
    ["provider", "verdict"],
    registry=registry,
)

ASK_EVERY = 32  # calls

_propagator = TraceContextTextMapPropagator()
_calls = count()
# The provider that was asked last, and the tracer it gave; None for one that makes no spans.
_asked: tuple[trace.TracerProvider | None, trace.Tracer | None] = (None, None)
# The span that `trace_from` or `within` made current, with its headers ready: writing them per message costs more.
_carried: ContextVar[tuple[trace.Span, Mapping[str, str]] | None] = ContextVar("carried", default=None)


def configure_logs(form: str, level: str) -> None:
    """Send structured logs to standard error as `console` or `json` lines, from `level` upward."""
    # Tracebacks without local variables: these may hold secrets and buyers' data.
    console = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    tracebacks = ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
    renderer: Any = structlog.processors.JSONRenderer() if form == "json" else console
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_trace,
            tracebacks if form == "json" else structlog.processors.StackInfoRenderer(),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )


def logger(name: str) -> Any:
    """A structured logger bound to the name of a part."""
    return structlog.get_logger(part=name)


def _add_trace(_: Any, __: str, event: Any) -> Any:
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        event["trace_id"] = trace.format_trace_id(span.trace_id)
    elif (on_demand := _on_demand.get()) is not None:
        _, event["trace_id"], *_ = on_demand.headers["traceparent"].split("-")
    return event


@contextmanager
def trace_from(carrier: Mapping[str, str]) -> Iterator[None]:
    """Continue the trace that `traceparent` in the carrier names, or begin one when there is none."""
    found, headers = _continued(carrier)
    token = context.attach(found)
    carried = _carried.set((trace.get_current_span(), headers))
    try:
        yield
    finally:
        _carried.reset(carried)
        context.detach(token)


def _continued(carrier: Mapping[str, str]) -> tuple[context.Context, Mapping[str, str]]:
    found = _propagator.extract(carrier)
    if trace.get_current_span(found).get_span_context().is_valid:
        return found, trace_in(carrier)
    # Identifiers of a trace are no secrets, but they must not collide: 128 and 64 random bits as W3C asks.
    span = trace.SpanContext(secrets.randbits(128) or 1, secrets.randbits(64) or 1, is_remote=False)
    found = trace.set_span_in_context(trace.NonRecordingSpan(span), found)
    headers: dict[str, str] = {}
    _propagator.inject(headers, found)
    return found, headers


class _OnDemand:
    """A trace that came with a message: read, or begun, only when a log line or a message asks for it."""

    __slots__ = ("_carrier", "_headers", "_token")

    def __init__(self, carrier: Mapping[str, str]) -> None:
        self._carrier = carrier
        self._headers: Mapping[str, str] | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        if self._headers is None:
            self._headers = _continued(self._carrier)[1]
        return self._headers

    def __enter__(self) -> None:
        self._token = _on_demand.set(self)

    def __exit__(self, *_: object) -> None:
        _on_demand.reset(self._token)


_on_demand: ContextVar[_OnDemand | None] = ContextVar("on_demand", default=None)


def trace_on_demand(carrier: Mapping[str, str]) -> AbstractContextManager[None]:
    """`trace_from` where nobody has an SDK: for a tenth of its price, since most messages never ask for their trace.

    The trace does not show in OpenTelemetry's own context then, only in our logs and messages.
    """
    return trace_from(carrier) if trace.get_current_span() is not trace.INVALID_SPAN else _OnDemand(carrier)


def tracer() -> trace.Tracer | None:
    """The tracer of the program's OpenTelemetry SDK, or None: then nobody would see a span, and none is to be made.

    A program may set its provider at any time. To ask costs about a microsecond, so ask for a batch, not for a message;
    `known_tracer` is what the last one to ask found.
    """
    global _asked  # noqa: PLW0603
    provider = trace.get_tracer_provider()
    if provider is not _asked[0]:
        found = None
        if not isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider)):
            found = provider.get_tracer("holdfast")
        _asked = (provider, None if isinstance(found, trace.NoOpTracer) else found)  # the SDK may be switched off
    return _asked[1]


def known_tracer() -> trace.Tracer | None:
    """What `tracer` found when it was asked last."""
    return _asked[1]


def recent_tracer() -> trace.Tracer | None:
    """`tracer` at a fraction of the price: one in `ASK_EVERY` calls asks, the others answer what was found last."""
    return _asked[1] if next(_calls) % ASK_EVERY else tracer()


def context_of(headers: Mapping[str, str]) -> context.Context:
    """The trace context that headers carry, and nothing of the running one; without a valid one it begins anew."""
    return _propagator.extract(headers)


@contextmanager
def within(span: trace.Span) -> Iterator[Mapping[str, str]]:
    """Make a started span the running one and give the headers that carry it; it ends with the block.

    An error that leaves the block is recorded in the span, and raised on.
    """
    headers: dict[str, str] = {}
    _propagator.inject(headers, trace.set_span_in_context(span))
    carried = _carried.set((span, headers))
    try:
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                yield headers
            except Exception as error:
                record(span, error)
                raise
    finally:
        _carried.reset(carried)


def record(span: trace.Span, error: Exception) -> None:
    """Note in a span what it ended with: the exception as an event, and what it says as the status."""
    if span.is_recording():
        span.record_exception(error)
        span.set_attribute("error.type", type(error).__name__)
        told = f"{type(error).__name__}: {error}"[:DESCRIPTION_CHARS_MAX]
        span.set_status(trace.Status(trace.StatusCode.ERROR, told))


def trace_in(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Of a message's headers those that carry the trace; the others are its own and pass to nobody."""
    return {name: headers[name] for name in _propagator.fields if name in headers}


def trace_headers() -> Mapping[str, str]:
    """The `traceparent` (and `tracestate`) of the running trace, to be carried in a message; empty without one."""
    carried = _carried.get()
    span = trace.get_current_span()
    if carried is not None and carried[0] is span:
        return carried[1]
    if not span.get_span_context().is_valid:
        on_demand = _on_demand.get()
        return {} if on_demand is None else on_demand.headers
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier
