"""Spans of a program with an OpenTelemetry SDK: from what sends, over what handles, to what that sends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from opentelemetry.trace import SpanKind, StatusCode

from holdfast import observe
from holdfast.db.database import Tx
from holdfast.errors import Unroutable
from holdfast.messaging.draft import Draft
from holdfast.messaging.injection import Incoming
from holdfast.messaging.listen import Listen
from holdfast.messaging.retry import Reject, Retry, RetryPolicy
from tests.conftest import StartSystem
from tests.contract.notes import (
    EXCHANGE,
    KEY,
    ONCE,
    QUEUE,
    Memo,
    Note,
    counts_become,
    effectively,
    note,
    office,
    outcome,
    parks,
    plainly,
    raw,
    rolled_back,
    take,
)
from tests.spans import Spans, carried, id_of, links_of, parent_of, watched_by_an_sdk

SEND, PROCESS, APPLY = f"send {EXCHANGE}", f"process {QUEUE}", f"apply {QUEUE}"
TWICE = RetryPolicy(tries=2, interval_ms=10)


class Sick(Exception):
    """What a failing handler raises."""


@pytest.fixture
def spans() -> Iterator[Spans]:
    with watched_by_an_sdk() as spans:
        yield spans


async def nothing(incoming: Incoming) -> None:
    """Handle it."""


def draft(text: str, **options: object) -> Draft:
    return Draft(exchange=EXCHANGE, routing_key=KEY, body=Note(text), **options)  # type: ignore[arg-type]


# -- sending ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["publisher", "outbox"])
async def test_a_message_carries_the_span_that_sent_it(start_system: StartSystem, spans: Spans, way: str) -> None:
    system = await office(start_system)
    with spans.tracer.start_as_current_span("app") as app:
        if way == "publisher":
            await system.publisher.publish(EXCHANGE, KEY, Note("1"))
        else:
            async with system.database.transaction() as tx:
                await system.outbox.add(tx, EXCHANGE, KEY, Note("1"))
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        (delivery,) = await take(subscription)
    sent = spans.one(SEND)
    assert parent_of(sent) == id_of(app)
    assert carried(delivery.message.headers["traceparent"]) == id_of(sent)
    assert sent.kind is SpanKind.PRODUCER
    assert sent.status.status_code is StatusCode.UNSET
    assert dict(sent.attributes or {}) == {
        "messaging.system": "holdfast",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": EXCHANGE,
        "messaging.holdfast.destination.routing_key": KEY,
        "messaging.message.id": delivery.message.message_id,
    }


async def test_a_batch_is_sent_in_one_span(start_system: StartSystem, spans: Spans) -> None:
    system = await office(start_system)
    drafts = [draft(str(number)) for number in range(5)]
    assert await system.publisher.publish_all(drafts) == [None] * 5
    async with system.transport.subscribe(QUEUE, prefetch=5) as subscription:
        deliveries = await take(subscription, 5)
    sent = spans.one(SEND)
    assert sent.parent is None
    assert {carried(each.message.headers["traceparent"]) for each in deliveries} == {id_of(sent)}
    attributes = dict(sent.attributes or {})
    assert attributes["messaging.batch.message_count"] == 5
    assert "messaging.message.id" not in attributes


async def test_a_batch_for_several_places_names_none_of_them(start_system: StartSystem, spans: Spans) -> None:
    system = await office(start_system)
    away = Draft(exchange="", routing_key=QUEUE, body=Note("2"))
    assert await system.publisher.publish_all([draft("1"), away]) == [None, None]
    attributes = dict(spans.one("send").attributes or {})
    assert not {"messaging.destination.name", "messaging.holdfast.destination.routing_key"} & set(attributes)
    await system.publisher.publish_all([])
    assert spans.named("send")[1:] == []  # nothing was sent


@pytest.mark.parametrize("way", ["publisher", "outbox"])
async def test_what_was_not_sent_shows_in_the_span(start_system: StartSystem, spans: Spans, way: str) -> None:
    system = await office(start_system)
    if way == "publisher":
        with pytest.raises(Unroutable):
            await system.publisher.publish(EXCHANGE, "nobody", Note("1"))
    else:
        async with rolled_back(system) as tx:
            with pytest.raises(Unroutable):
                await system.outbox.add(tx, EXCHANGE, "nobody", Note("1"))
    sent = spans.one(SEND)
    assert sent.status.status_code is StatusCode.ERROR
    assert [event.name for event in sent.events] == ["exception"]


async def test_drafts_of_several_traces_keep_them_and_those_of_one_get_the_span(
    start_system: StartSystem, spans: Spans
) -> None:
    system = await office(start_system)
    first, second = ({"traceparent": f"00-{number:032x}-{number:016x}-01"} for number in (1, 2))
    await system.publisher.publish_all([draft("a", trace=first), draft("b", trace=second), draft("c")])
    await system.publisher.publish_all([draft("d", trace=first), draft("e", trace=first)])
    async with system.transport.subscribe(QUEUE, prefetch=5) as subscription:
        deliveries = await take(subscription, 5)
    several, alone = spans.named(SEND)
    assert links_of(several) == [(1, 1), (2, 2)]
    assert parent_of(alone) == (1, 1)
    assert not alone.links
    got = [carried(each.message.headers["traceparent"]) for each in deliveries]
    assert got == [(1, 1), (2, 2), id_of(several), id_of(alone), id_of(alone)]


# -- handling ---------------------------------------------------------------------------------------------------------


async def test_one_trace_leads_from_the_program_through_every_handler(start_system: StartSystem, spans: Spans) -> None:
    system = await office(start_system)
    inside: list[tuple[int, int]] = []

    async def answer(incoming: Incoming) -> None:
        inside.append(carried(observe.trace_headers()["traceparent"]))
        await system.publisher.publish(EXCHANGE, KEY, Memo("answer"))

    system.listen(Listen(name="chain", queue=QUEUE, plain={Note: answer, Memo: nothing}, local=ONCE, durable=ONCE))
    with spans.tracer.start_as_current_span("app") as app:
        message_id = await system.publisher.publish(EXCHANGE, KEY, Note("question"))
    processed = await spans.ended(PROCESS, 2)
    sent = spans.named(SEND)
    question, reply = processed
    assert parent_of(sent[0]) == id_of(app)
    assert parent_of(question) == id_of(sent[0])
    assert inside == [id_of(question)]
    assert parent_of(sent[1]) == id_of(question)
    assert parent_of(reply) == id_of(sent[1])
    assert question.kind is SpanKind.CONSUMER
    attributes = dict(question.attributes or {})
    assert attributes.pop("messaging.message.body.size", 0)
    assert attributes == {
        "messaging.system": "holdfast",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": QUEUE,
        "messaging.destination_publish.name": EXCHANGE,
        "messaging.message.id": message_id,
        "messaging.holdfast.destination.routing_key": KEY,
        "messaging.holdfast.message.delivery_attempt": 1,
    }


async def test_every_durable_retry_is_a_span_beside_the_one_before(start_system: StartSystem, spans: Spans) -> None:
    system = await office(start_system)
    failures = [Sick("first"), Sick("second")]

    async def fail(incoming: Incoming) -> None:
        if failures:
            raise failures.pop(0)

    system.listen(plainly(fail, durable=RetryPolicy(tries=5, interval_ms=10)))
    await system.publisher.publish(EXCHANGE, KEY, Note("1"))
    tries = await spans.ended(PROCESS, 3)
    assert {parent_of(each) for each in tries} == {id_of(spans.one(SEND))}
    assert len({id_of(each) for each in tries}) == 3
    told = [
        (
            (each.attributes or {})["messaging.holdfast.message.delivery_attempt"],
            each.status.status_code,
            [(event.attributes or {})["exception.message"] for event in each.events],
        )
        for each in tries
    ]
    assert told == [
        (1, StatusCode.ERROR, ["first"]),
        (2, StatusCode.ERROR, ["second"]),
        (3, StatusCode.UNSET, []),
    ]


async def test_local_retries_are_one_span_that_ends_well(start_system: StartSystem, spans: Spans) -> None:
    system = await office(start_system)
    failures = [Sick("first")]

    async def fail(incoming: Incoming) -> None:
        if failures:
            raise failures.pop(0)

    system.listen(plainly(fail, local=TWICE))
    await system.publisher.publish(EXCHANGE, KEY, Note("1"))
    (processed,) = await spans.ended(PROCESS)
    assert processed.status.status_code is StatusCode.UNSET
    await counts_become(system, (0, 0, 0))
    assert failures == []


@pytest.mark.parametrize("mode", ["manual", "none"])
async def test_a_handler_that_fails_shows_in_every_mode(start_system: StartSystem, spans: Spans, mode: str) -> None:
    system = await office(start_system)

    async def fail(incoming: Incoming) -> None:
        raise Reject("no")

    system.listen(plainly(fail, ack=mode))
    await system.publisher.publish(EXCHANGE, KEY, Note("1"))
    (processed,) = await spans.ended(PROCESS)
    assert processed.status.status_code is StatusCode.ERROR
    assert (processed.attributes or {})["error.type"] == "Reject"


async def test_what_cannot_be_decoded_shows_and_not_now_is_no_failure(start_system: StartSystem, spans: Spans) -> None:
    system = await office(start_system)
    waits = [Retry(10)]

    async def wait(incoming: Incoming) -> None:
        if waits:
            raise waits.pop()

    system.listen(plainly(wait))
    assert await outcome(system, raw(note(system, "x"), body=b"{")) is None
    await parks(system)
    (broken,) = await spans.ended(PROCESS)
    assert (broken.attributes or {})["error.type"] == "CannotDecode"
    assert broken.parent is None  # it came without a trace; the listener's own start is none of its causes
    await system.publisher.publish(EXCHANGE, KEY, Note("1"))
    _, later, done = await spans.ended(PROCESS, 3)
    assert [each.status.status_code for each in (later, done)] == [StatusCode.UNSET] * 2


# -- effects ----------------------------------------------------------------------------------------------------------


async def test_a_batch_of_effects_links_to_its_deliveries_and_each_goes_on_in_its_own_trace(
    start_system: StartSystem, spans: Spans
) -> None:
    system = await office(start_system)

    async def effect(tx: Tx, notes: Sequence[Note]) -> None:
        answers = [
            Draft(exchange=EXCHANGE, routing_key=KEY, body=Memo(each.text), trace=tx.trace_of(each)) for each in notes
        ]
        await system.outbox.add_all(tx, answers)

    async with system.database.transaction() as tx:
        for number in range(4):
            with spans.tracer.start_as_current_span(f"app {number}"):
                await system.outbox.add(tx, EXCHANGE, KEY, Note(str(number)))
    sent = spans.named(SEND)
    system.listen(
        Listen(
            name="both",
            queue=QUEUE,
            effects={Note: effect},
            plain={Memo: nothing},
            local=ONCE,
            durable=ONCE,
            prefetch=4,
        )
    )
    processed = await spans.ended(PROCESS, 8)
    notes = [each for each in processed if parent_of(each) in {id_of(span) for span in sent}]
    memos = [each for each in processed if each not in notes]
    assert len(notes) == len(memos) == 4
    batches = spans.named(APPLY)
    assert sorted(link for each in batches for link in links_of(each)) == sorted(id_of(each) for each in notes)
    assert sum(int(str((each.attributes or {})["messaging.batch.message_count"])) for each in batches) == 4
    assert {id_of(each)[0] for each in memos} == {id_of(each)[0] for each in sent}
    ours = {id_of(each) for each in spans.named(SEND) + notes}
    assert all(parent_of(each) in ours for each in memos)


async def test_an_effect_that_fails_shows_in_its_batch_and_in_its_delivery(
    start_system: StartSystem, spans: Spans
) -> None:
    system = await office(start_system)

    async def effect(tx: Tx, notes: Sequence[Note]) -> None:
        raise Sick("never")

    system.listen(effectively(effect))
    await system.publisher.publish(EXCHANGE, KEY, Note("1"))
    (processed,) = await spans.ended(PROCESS)
    batches = spans.named(APPLY)  # several, where the writer split it from what was decided with it
    assert {parent_of(each) for each in batches} == {id_of(processed)}
    assert all(links_of(each) == [id_of(processed)] for each in batches)
    for span in (processed, *batches):
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description == "Sick: never"
        assert (span.attributes or {})["error.type"] == "Sick"
        assert [(event.attributes or {})["exception.type"] for event in span.events] == [f"{__name__}.Sick"]


# -- without, and late ------------------------------------------------------------------------------------------------


async def test_a_provider_that_is_set_before_the_listener_starts_sees_its_spans(start_system: StartSystem) -> None:
    system = await office(start_system)
    await system.publisher.publish(EXCHANGE, KEY, Note("1"))  # asked for a provider, and found none
    assert observe.known_tracer() is None
    with watched_by_an_sdk() as spans:
        listener = system.listen(plainly(nothing))
        (processed,) = await spans.ended(PROCESS)
        assert spans.named(SEND) == []
        assert processed.parent is None
        await listener.stop()
    assert observe.known_tracer() is None
