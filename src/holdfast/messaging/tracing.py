"""Spans of sending and handling, named as in OpenTelemetry's conventions for messaging.

`send` is one span for each call of publisher or outbox, and its messages carry it. `process` is one span for each
delivery: the child of what its message carries, so that every durable retry stands beside the one before. `apply` is
one span for each batch that an effect decides: it has several causes, so it links to the spans of its deliveries.

Without an SDK no span is made; trace context travels in the headers all the same (`observe.trace_from`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import msgspec
from opentelemetry import trace
from opentelemetry.trace import Link, SpanKind

from holdfast import observe
from holdfast.errors import PublishError, ShuttingDown
from holdfast.messaging.draft import Draft
from holdfast.messaging.message import Delivery, Outgoing
from holdfast.messaging.retry import Retry

SYSTEM = "holdfast"
NO_FAILURES = (Retry, ShuttingDown)  # signals: the message comes again, and nothing went wrong

Compose = Callable[[Draft, Mapping[str, str]], Outgoing]
E = TypeVar("E", bound=Exception | None)


class Sending:
    """A batch on its way, and the span that watches it, if there is one."""

    __slots__ = ("_span", "batch")

    def __init__(self, batch: list[Outgoing], span: trace.Span | None = None) -> None:
        self.batch = batch
        self._span = span

    def __enter__(self) -> Sending:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing ends here: where there is a span, `sending` ends it."""

    def ended(self, problems: Sequence[PublishError | None]) -> None:
        """Note in the span what became of each message; the first problem stands for all."""
        if self._span is not None and (failed := [problem for problem in problems if problem is not None]):
            observe.record(self._span, failed[0])


def sending(drafts: Sequence[Draft], compose: Compose) -> AbstractContextManager[Sending]:
    """Compose messages that carry the running trace, within one span for all of them.

    A draft with a trace of its own stays in it: where all have the same one, the span is its child; where they have
    several, it links to them, and each message carries its own.
    """
    tracer = observe.recent_tracer()
    if tracer is None or not drafts:
        running = observe.trace_headers()
        return Sending([compose(draft, running) for draft in drafts])
    return _sending(tracer, drafts, compose)


def processing(delivery: Delivery) -> AbstractContextManager[object]:
    """See one delivery through: within its span where there is an SDK, else within the trace that it came with."""
    tracer = observe.known_tracer()
    if tracer is None:
        return observe.trace_on_demand(delivery.message.headers)
    return _processing(tracer, delivery)


def failed(error: E) -> E:
    """Note in the running span what a handler ended with, if it failed, and give it back."""
    if error is not None and not isinstance(error, NO_FAILURES):
        observe.record(trace.get_current_span(), error)
    return error


def trace_of(delivery: Delivery) -> Mapping[str, str]:
    """The headers that carry the trace of a delivery: of its span, or as its message came with them."""
    return delivery.trace or observe.trace_in(delivery.message.headers)


def processing_many(queue: str, deliveries: Sequence[Delivery]) -> AbstractContextManager[object]:
    """See a batch through: within one span that links to the traces of its messages, or in a trace of its own."""
    if observe.tracer() is None:
        return observe.trace_on_demand({})
    return together("process", queue, lambda: [trace_of(each) for each in deliveries], len(deliveries))


def together(
    operation: str, queue: str, causes: Callable[[], Sequence[Mapping[str, str]]], count: int
) -> AbstractContextManager[object]:
    """One span for a batch of `count` messages, which links to the traces that caused it; nothing without an SDK."""
    tracer = observe.tracer()
    if tracer is None:
        return nullcontext()
    distinct = _distinct(causes())
    span = tracer.start_span(
        _name(operation, queue),
        context=observe.context_of(distinct[0] if len(distinct) == 1 else {}),
        kind=SpanKind.CONSUMER,
        links=_links(distinct),
        attributes=_attributes(operation, "process", queue) | {"messaging.batch.message_count": count},
    )
    return observe.within(span)


@contextmanager
def _sending(tracer: trace.Tracer, drafts: Sequence[Draft], compose: Compose) -> Iterator[Sending]:
    causes = _distinct([draft.trace for draft in drafts])
    together = len(causes) == 1 and all(draft.trace for draft in drafts)
    span = tracer.start_span(
        _name("send", target := _target(drafts)),
        context=observe.context_of(causes[0]) if together else None,
        kind=SpanKind.PRODUCER,
        links=[] if together else _links(causes),
        attributes=_attributes("send", "send", target) | _told(drafts),
    )
    with observe.within(span) as headers:
        if together:
            drafts = [msgspec.structs.replace(draft, trace={}) for draft in drafts]
        batch = [compose(draft, headers) for draft in drafts]
        if len(batch) == 1:
            span.set_attribute("messaging.message.id", batch[0].message.message_id)
        yield Sending(batch, span)


@contextmanager
def _processing(tracer: trace.Tracer, delivery: Delivery) -> Iterator[None]:
    message = delivery.message
    span = tracer.start_span(
        _name("process", delivery.queue),
        context=observe.context_of(message.headers),
        kind=SpanKind.CONSUMER,
        attributes=_attributes("process", "process", delivery.queue)
        | {
            "messaging.message.id": message.message_id,
            "messaging.message.body.size": len(message.body),
            "messaging.destination_publish.name": message.exchange,
            "messaging.holdfast.destination.routing_key": message.routing_key,
            "messaging.holdfast.message.delivery_attempt": delivery.attempt,
        },
    )
    with observe.within(span) as headers:
        delivery.trace = headers
        yield


def _distinct(traces: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Each trace context once, in order; what has none is left out."""
    return list({tuple(sorted(headers.items())): headers for headers in traces if headers}.values())


def _links(causes: Sequence[Mapping[str, str]]) -> list[Link]:
    spans = [trace.get_current_span(observe.context_of(headers)).get_span_context() for headers in causes]
    return [Link(span) for span in spans if span.is_valid]


def _target(drafts: Sequence[Draft]) -> str:
    """Where all of them go: an exchange, or by the default exchange a queue; empty where that is several."""
    targets = {draft.exchange or draft.routing_key for draft in drafts}
    return targets.pop() if len(targets) == 1 else ""


def _name(operation: str, target: str) -> str:
    return f"{operation} {target}" if target else operation


def _attributes(operation: str, kind: str, target: str) -> dict[str, Any]:
    attributes = {
        "messaging.system": SYSTEM,
        "messaging.operation.name": operation,
        "messaging.operation.type": kind,
    }
    return attributes | {"messaging.destination.name": target} if target else attributes


def _told(drafts: Sequence[Draft]) -> dict[str, Any]:
    keys = {draft.routing_key for draft in drafts}
    told: dict[str, Any] = {"messaging.holdfast.destination.routing_key": keys.pop()} if len(keys) == 1 else {}
    return told if len(drafts) == 1 else told | {"messaging.batch.message_count": len(drafts)}
