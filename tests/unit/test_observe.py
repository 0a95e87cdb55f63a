"""Logs that stay on one line and keep secrets, and traces that are handed on."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from holdfast import observe
from holdfast.settings import Secret
from tests.spans import carried, id_of, parent_of, watched_by_an_sdk
from tests.unit.given import steady

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CARRIER = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01", "tracestate": "shop=1"}
NASTY = "first\r\nsecond\x1b[31mred\x00\u2028end"
HIDDEN = "correct-horse-battery"


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)


def logged(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The one JSON line that was written."""
    text = capsys.readouterr().err
    assert text.endswith("\n")
    (line,) = text[:-1].split("\n")
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def fail(text: str, revealed: str = "") -> None:
    """Raise with a secret at hand, as a frame of real code would have it."""
    raise RuntimeError(text)


def test_a_json_log_is_one_line_with_part_level_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    observe.configure_logs("json", "info")
    observe.logger("tests").warning("something_happened", count=3)
    entry = logged(capsys)
    assert (entry["event"], entry["level"], entry["part"], entry["count"]) == (
        "something_happened",
        "warning",
        "tests",
        3,
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", entry["timestamp"])


def test_a_json_log_escapes_line_ends_and_terminal_codes(capsys: pytest.CaptureFixture[str]) -> None:
    observe.configure_logs("json", "info")
    observe.logger("tests").info(NASTY, value=NASTY, **{NASTY: 1})
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert not set(text[:-1]) & set("\r\n\x1b\x00\u2028")
    entry = json.loads(text)
    assert entry["event"] == entry["value"] == NASTY


def test_a_console_log_escapes_line_ends_and_terminal_codes(capsys: pytest.CaptureFixture[str]) -> None:
    observe.configure_logs("console", "info")
    observe.logger("tests").info("message_parked", value=NASTY)
    text = capsys.readouterr().err
    assert text.count("\n") == 1, "one event is not one line"
    assert not set(text[:-1]) & set("\r\x1b\x00")


def test_logs_below_the_level_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    observe.configure_logs("json", "warning")
    observe.logger("tests").info("quiet")
    assert capsys.readouterr().err == ""


def test_a_module_level_logger_follows_a_later_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    observe.configure_logs("console", "error")
    log = observe.logger("tests")
    log.error("before")
    observe.configure_logs("json", "info")
    capsys.readouterr()
    log.info("after")
    assert logged(capsys)["event"] == "after"


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_logged_exception_does_not_show_local_variables(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    observe.configure_logs(form, "info")
    try:
        fail("it failed", Secret(HIDDEN).reveal())
    except RuntimeError:
        observe.logger("tests").exception("it_failed")
    text = capsys.readouterr().err
    assert "it failed" in text
    assert HIDDEN not in text


def test_a_json_log_of_an_exception_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    observe.configure_logs("json", "info")
    try:
        fail(NASTY)
    except RuntimeError:
        observe.logger("tests").exception("it_failed")
    assert logged(capsys)["exception"][0]["exc_type"] == "RuntimeError"


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_secret_does_not_show_itself_in_logs(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    observe.configure_logs(form, "info")
    observe.logger("tests").info("started", secret=Secret(HIDDEN), nested={"key": [Secret(HIDDEN)]})
    assert HIDDEN not in capsys.readouterr().err


def test_logs_carry_the_trace_they_belong_to(capsys: pytest.CaptureFixture[str]) -> None:
    observe.configure_logs("json", "info")
    with observe.trace_from(CARRIER):
        observe.logger("tests").info("inside")
    assert logged(capsys)["trace_id"] == TRACE_ID
    observe.logger("tests").info("outside")
    assert "trace_id" not in logged(capsys)


def test_a_trace_is_handed_on_as_it_came() -> None:
    with observe.trace_from(CARRIER):
        assert observe.trace_headers() == CARRIER


def test_without_a_trace_there_are_no_headers() -> None:
    assert observe.trace_headers() == {}


@pytest.mark.parametrize(
    "carrier", [{}, {"traceparent": ""}, {"traceparent": "garbage"}, {"traceparent": f"00-{'0' * 32}-{'0' * 16}-01"}]
)
def test_a_missing_or_broken_trace_begins_a_new_one(carrier: dict[str, str]) -> None:
    with observe.trace_from(carrier):
        first = observe.trace_headers()["traceparent"]
    with observe.trace_from(carrier):
        second = observe.trace_headers()["traceparent"]
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]", first)
    assert first != second


def test_a_trace_survives_many_hops() -> None:
    carrier: Mapping[str, str] = {}
    seen = set()
    for _ in range(4):
        with observe.trace_from(carrier):
            carrier = observe.trace_headers()
            seen.add(carrier["traceparent"].split("-")[1])
    assert len(seen) == 1


def test_a_trace_ends_with_its_block_also_after_an_error() -> None:
    with pytest.raises(RuntimeError), observe.trace_from(CARRIER):
        raise RuntimeError
    assert observe.trace_headers() == {}


async def test_concurrent_tasks_keep_their_own_traces() -> None:
    async def one(number: int) -> bool:
        carrier = {"traceparent": f"00-{number:032x}-{number:016x}-00"}
        with observe.trace_from(carrier):
            await asyncio.sleep(0)
            return observe.trace_headers() == carrier

    assert all(await asyncio.gather(*(one(number) for number in range(1, 20))))


@steady
@given(carrier=st.dictionaries(st.sampled_from(["traceparent", "tracestate", "x"]), st.text(max_size=80)))
def test_no_header_of_a_stranger_breaks_the_trace(carrier: dict[str, str]) -> None:
    with observe.trace_from(carrier):
        assert "traceparent" in observe.trace_headers()


# -- an SDK -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    yield
    observe.tracer()


def test_without_an_sdk_there_is_no_tracer() -> None:
    assert observe.tracer() is None
    assert observe.known_tracer() is None


def test_a_provider_that_makes_no_spans_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", trace.NoOpTracerProvider())
    assert observe.tracer() is None
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", TracerProvider())
    assert observe.tracer() is None


def test_a_provider_is_found_whenever_it_is_set() -> None:
    assert observe.tracer() is None
    with watched_by_an_sdk():
        assert observe.known_tracer() is None
        found = observe.tracer()
        assert found is not None
        assert observe.tracer() is found
        assert observe.known_tracer() is found


def test_within_a_span_its_headers_are_handed_on_and_its_error_is_recorded() -> None:
    with watched_by_an_sdk() as spans:
        span = spans.tracer.start_span("work", context=observe.context_of(CARRIER))
        told: list[str] = []

        def work() -> None:
            with observe.within(span) as headers:
                told.extend([headers["traceparent"], observe.trace_headers()["traceparent"]])
                raise ValueError("broken")

        with pytest.raises(ValueError, match="broken"):
            work()
        ended = spans.one("work")
    assert [carried(each) for each in told] == [id_of(ended)] * 2
    assert parent_of(ended) == carried(CARRIER["traceparent"])
    assert ended.status.status_code is trace.StatusCode.ERROR
    assert observe.trace_headers() == {}
