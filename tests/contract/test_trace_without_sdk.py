"""Trace context where nobody has an OpenTelemetry SDK: it travels all the same, through logs and messages."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from opentelemetry import trace

from holdfast import observe
from holdfast.bootstrap import System
from holdfast.messaging.draft import Draft
from holdfast.messaging.listen import Listen
from holdfast.messaging.message import Message
from holdfast.messaging.retry import RetryPolicy
from tests.conftest import StartSystem
from tests.contract.notes import (
    EXCHANGE,
    KEY,
    ONCE,
    QUEUE,
    Memo,
    Note,
    counts_become,
    note,
    office,
    publish,
    raw,
    send,
)

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"

log = observe.logger("handler")


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Where the log goes."""
    before, stream = structlog.get_config(), io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        observe.configure_logs("json", "info")
    yield stream
    structlog.configure(**before)


def said(logs: io.StringIO) -> list[tuple[str, str]]:
    """What handlers logged: the text, and the trace."""
    lines = [json.loads(line) for line in logs.getvalue().splitlines()]
    return [(line["event"], line.get("trace_id", "")) for line in lines if line.get("part") == "handler"]


def trace_of(message: Message) -> str:
    """The trace id that a message carries; empty without one."""
    return message.headers["traceparent"].split("-")[1] if "traceparent" in message.headers else ""


class Chain:
    """A handler that logs, answers a note with a memo, and logs again; and one that notes the memos."""

    def __init__(self, system: System) -> None:
        self._system = system
        self.memos: list[tuple[str, str]] = []  # text, trace id
        self.headers: list[str] = []
        self.fail: list[Exception] = []

    async def question(self, body: Note) -> None:
        log.info(f"before {body.text}")
        if self.fail:
            raise self.fail.pop()
        await self._system.publisher.publish(EXCHANGE, KEY, Memo(body.text))
        self.headers.append(observe.trace_headers()["traceparent"])
        log.info(f"after {body.text}")

    async def answer(self, body: Memo, message: Message) -> None:
        self.memos.append((body.text, trace_of(message)))

    def listen(self, local: RetryPolicy = ONCE) -> None:
        self._system.listen(
            Listen(name="chain", queue=QUEUE, handlers=[self.question, self.answer], local=local, durable=ONCE)
        )


async def test_there_is_no_sdk_here() -> None:
    assert observe.tracer() is None
    assert trace.get_current_span() is trace.INVALID_SPAN


async def test_a_log_line_and_what_a_handler_publishes_continue_the_trace_it_came_with(
    start_system: StartSystem, logs: io.StringIO
) -> None:
    system = await office(start_system)
    chain = Chain(system)
    chain.listen()
    await publish(system, [raw(note(system, "1"), headers={"traceparent": TRACEPARENT, "tracestate": "shop=7"})])
    await counts_become(system, (0, 0, 0))
    assert said(logs) == [("before 1", TRACE_ID), ("after 1", TRACE_ID)]
    assert chain.memos == [("1", TRACE_ID)]


@pytest.mark.parametrize("headers", [{}, {"traceparent": "no trace"}, {"traceparent": f"00-{'0' * 32}-{'0' * 16}-01"}])
async def test_a_message_without_a_trace_begins_one_that_log_and_messages_agree_on(
    start_system: StartSystem, logs: io.StringIO, headers: dict[str, str]
) -> None:
    system = await office(start_system)
    chain = Chain(system)
    chain.listen()
    await publish(system, [raw(note(system, "1"), headers=headers), raw(note(system, "2"), headers=headers)])
    await counts_become(system, (0, 0, 0))
    lines = said(logs)
    ids = dict(chain.memos)
    assert sorted(lines) == sorted([(f"{when} {text}", ids[text]) for text in "12" for when in ("before", "after")])
    assert len(set(ids.values())) == 2  # a trace of its own for each
    for each in ids.values():
        assert len(each) == 32
        assert int(each, 16) > 0
    assert {each.split("-")[1] for each in chain.headers} == set(ids.values())


async def test_the_tries_of_one_delivery_are_one_trace(start_system: StartSystem, logs: io.StringIO) -> None:
    system = await office(start_system)
    chain = Chain(system)
    chain.fail.append(ZeroDivisionError())
    chain.listen(RetryPolicy(tries=2, interval_ms=1))
    await send(system, "1")
    await counts_become(system, (0, 0, 0))
    (memo,) = chain.memos
    assert said(logs) == [("before 1", memo[1]), ("before 1", memo[1]), ("after 1", memo[1])]


async def test_handlers_side_by_side_keep_their_traces_apart(start_system: StartSystem, logs: io.StringIO) -> None:
    system = await office(start_system)
    chain = Chain(system)
    wanted = {str(number): f"{number:032x}" for number in range(1, 21)}
    await publish(
        system,
        [raw(note(system, text), headers={"traceparent": f"00-{id_}-{1:016x}-01"}) for text, id_ in wanted.items()],
    )
    chain.listen()
    await counts_become(system, (0, 0, 0))
    assert dict(chain.memos) == wanted
    assert all(line.split()[-1] in wanted and wanted[line.split()[-1]] == id_ for line, id_ in said(logs))


async def test_a_draft_of_another_trace_keeps_it_within_a_handler(start_system: StartSystem) -> None:
    system = await office(start_system)
    other = f"00-{7:032x}-{7:016x}-01"
    memos: list[str] = []

    async def question(body: Note) -> None:
        await system.publisher.publish_all(
            [
                Draft(exchange=EXCHANGE, routing_key=KEY, body=Memo("own"), trace={"traceparent": other}),
                Draft(exchange=EXCHANGE, routing_key=KEY, body=Memo("running")),
            ]
        )

    async def answer(body: Memo, message: Message) -> None:
        memos.append(f"{body.text} {trace_of(message)}")

    system.listen(Listen(name="chain", queue=QUEUE, handlers=[question, answer], local=ONCE, durable=ONCE))
    await publish(system, [raw(note(system, "1"), headers={"traceparent": TRACEPARENT})])
    await counts_become(system, (0, 0, 0))
    assert sorted(memos) == [f"own {7:032x}", f"running {TRACE_ID}"]


async def test_nothing_of_a_handlers_trace_stays_behind(start_system: StartSystem, logs: io.StringIO) -> None:
    system = await office(start_system)
    chain = Chain(system)
    chain.listen()
    await publish(system, [raw(note(system, "1"), headers={"traceparent": TRACEPARENT})])
    await counts_become(system, (0, 0, 0))
    log.info("outside")
    assert said(logs)[-1] == ("outside", "")
    assert observe.trace_headers() == {}


@pytest.mark.parametrize("carried", [True, False])
async def test_a_listener_that_was_started_within_a_trace_does_not_hand_it_to_its_messages(
    start_system: StartSystem, logs: io.StringIO, carried: bool
) -> None:
    """Started in a request, say: the messages of the next weeks are none of its consequences."""
    system = await office(start_system)
    chain = Chain(system)
    with observe.trace_from({"traceparent": f"00-{9:032x}-{9:016x}-01"}):
        chain.listen()
    headers: dict[str, Any] = {"traceparent": TRACEPARENT} if carried else {}
    await publish(system, [raw(note(system, "1"), headers=headers)])
    await counts_become(system, (0, 0, 0))
    ((_, id_),) = chain.memos
    assert id_ == TRACE_ID if carried else id_ != f"{9:032x}"
    assert said(logs) == [("before 1", id_), ("after 1", id_)]
