"""What a program with an OpenTelemetry SDK sees: spans kept in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from holdfast import observe
from tests.conftest import eventually


class Spans:
    """The spans that ended, and a tracer for the program's own."""

    def __init__(self, provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
        self.tracer = provider.get_tracer("tests")
        self._exporter = exporter

    def all(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        """Those of a name, in order of their end."""
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        found = self.named(name)
        assert len(found) == 1, [span.name for span in self._exporter.get_finished_spans()]
        return found[0]

    async def ended(self, name: str, count: int = 1) -> list[ReadableSpan]:
        """Wait until so many of a name have ended; answers them."""

        async def reached() -> bool:
            return len(self.named(name)) >= count

        await eventually(reached, f"{count} spans {name!r} ended")
        return self.named(name)


@contextmanager
def watched_by_an_sdk() -> Iterator[Spans]:
    """A provider for a block; `trace.set_tracer_provider` sets it for good, and other tests would have it too."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "_TRACER_PROVIDER", provider)
        yield Spans(provider, exporter)
    observe.tracer()
    provider.shutdown()


def id_of(span: ReadableSpan | trace.Span) -> tuple[int, int]:
    """The trace and the span."""
    context = span.get_span_context()
    assert context is not None
    return context.trace_id, context.span_id


def parent_of(span: ReadableSpan) -> tuple[int, int] | None:
    return (span.parent.trace_id, span.parent.span_id) if span.parent is not None else None


def links_of(span: ReadableSpan) -> Sequence[tuple[int, int]]:
    return sorted((link.context.trace_id, link.context.span_id) for link in span.links)


def carried(traceparent: str) -> tuple[int, int]:
    """The trace and the span that a header names."""
    _, trace_id, span_id, _ = traceparent.split("-")
    return int(trace_id, 16), int(span_id, 16)
