"""Publishing: a confirmed message is stored, every other outcome says what is known, and keys choose the queues."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import msgspec
import pytest

from holdfast import observe
from holdfast.bootstrap import System
from holdfast.db.database import Database, Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.errors import (
    HoldfastError,
    InvalidInput,
    NoSuchExchange,
    OutcomeUnknown,
    PublishRejected,
    PublishUnconfirmed,
    TopologyMismatch,
    Unroutable,
)
from holdfast.messaging.draft import DELAY_MS_MAX, Draft
from holdfast.messaging.message import Message, ack
from holdfast.messaging.publisher import Publisher
from holdfast.messaging.retry import RetryPolicy
from holdfast.messaging.topology import Binding, Exchange, ExchangeKind, Queue, Topology
from holdfast.messaging.transports.sql.transport import SqlTransport
from holdfast.settings import Settings
from tests.conftest import WAIT_S, StartSystem
from tests.contract.notes import (
    EXCHANGE,
    KEY,
    QUEUE,
    TOPOLOGY,
    Ledger,
    Note,
    counts,
    counts_become,
    effectively,
    manual_clock,
    needs_several_processes,
    needs_shared_database,
    note,
    office,
    opened,
    outcome,
    pass_time,
    publish,
    raw,
    send,
    take,
    texts,
)


async def test_a_confirmed_message_is_stored_with_all_its_properties(start_system: StartSystem) -> None:
    system = await office(start_system)
    message = Message(
        exchange=EXCHANGE,
        routing_key="note.grüße.世界",
        body=bytes(range(256)),
        message_id="id-1",
        timestamp_us=1_770_000_000_123_456,
        type="test.bytes",
        content_type="application/octet-stream",
        headers={"tenant": "grüße", "empty": ""},
    )
    await publish(system, [msgspec.structs.replace(note(system), message=message)])
    assert await counts(system) == (1, 0, 0)
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        (delivery,) = await take(subscription)
        assert delivery.message == message
        assert (delivery.queue, delivery.attempt, delivery.deliveries) == (QUEUE, 1, 1)


async def test_the_publisher_answers_the_message_id(start_system: StartSystem) -> None:
    system = await office(start_system)
    given = await system.publisher.publish(EXCHANGE, KEY, Note("mine"), message_id="chosen")
    drawn = await system.publisher.publish(EXCHANGE, KEY, Note("drawn"))
    assert given == "chosen"
    assert drawn
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        assert [each.message.message_id for each in await take(subscription, 2)] == [given, drawn]


async def test_a_confirmed_message_survives_a_restart_of_the_system(settings: Settings) -> None:
    async with opened(settings) as system:
        await send(system, "kept")
    async with opened(settings) as system, system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        assert texts(await take(subscription)) == ["kept"]


async def test_a_message_no_queue_takes_is_unroutable_and_stored_nowhere(start_system: StartSystem) -> None:
    system = await office(start_system)
    problem = await outcome(system, note(system, key="letter.written", message_id="lost-1"))
    assert isinstance(problem, Unroutable)
    for part in ("312", "letter.written", EXCHANGE, "lost-1"):
        assert part in problem.detail
    assert await counts(system) == (0, 0, 0)


async def test_an_optional_message_no_queue_takes_is_confirmed_and_dropped(start_system: StartSystem) -> None:
    system = await office(start_system)
    assert await outcome(system, note(system, key="letter.written", mandatory=False)) is None
    assert await counts(system) == (0, 0, 0)


@pytest.mark.parametrize("mandatory", [True, False])
async def test_an_unknown_exchange_rejects_the_message(start_system: StartSystem, mandatory: bool) -> None:
    system = await office(start_system)
    problem = await outcome(system, note(system, exchange="nowhere", mandatory=mandatory))
    assert isinstance(problem, PublishRejected)
    assert "nowhere" in problem.detail


async def test_the_publisher_raises_what_went_wrong(start_system: StartSystem) -> None:
    system = await office(start_system)
    with pytest.raises(Unroutable):
        await system.publisher.publish(EXCHANGE, "letter.written", Note("lost"))
    with pytest.raises(PublishRejected):
        await system.publisher.publish("nowhere", KEY, Note("lost"))
    with pytest.raises(InvalidInput):
        await system.publisher.publish(EXCHANGE, KEY, Note("lost"), delay_ms=-1)
    assert await counts(system) == (0, 0, 0)


async def test_each_message_of_a_batch_has_its_own_outcome(start_system: StartSystem) -> None:
    system = await office(start_system)
    batch = [
        note(system, "first"),
        note(system, "unroutable", key="letter.written"),
        note(system, "rejected", exchange="nowhere"),
        note(system, "last"),
    ]
    outcomes = await system.transport.publish(batch)
    assert [type(each) for each in outcomes] == [type(None), Unroutable, NoSuchExchange, type(None)]
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        assert texts(await take(subscription, 2)) == ["first", "last"]


async def test_an_empty_batch_is_no_trouble(start_system: StartSystem) -> None:
    system = await office(start_system)
    assert await system.transport.publish([]) == []


async def test_a_message_the_backend_cannot_store_is_rejected_and_its_neighbours_are_stored(
    start_system: StartSystem,
) -> None:
    """PostgreSQL stores no NUL in text and nobody stores half a surrogate pair; a backend that can may confirm it."""
    system = await office(start_system)
    bad = note(system, "bad")
    batch = [
        note(system, "first"),
        raw(bad, routing_key="note.\x00"),
        raw(bad, message_id="half \ud800"),
        note(system, "last"),
    ]
    outcomes = await system.transport.publish(batch)
    assert outcomes[0] is None
    assert outcomes[3] is None
    assert all(each is None or isinstance(each, PublishRejected) for each in outcomes[1:3])
    stored = outcomes.count(None)
    assert await counts(system) == (stored, 0, 0)


async def test_many_publishers_at_once_each_get_their_own_outcome(start_system: StartSystem) -> None:
    system = await office(start_system)
    wishes = [note(system, str(number), key=KEY if number % 2 else "letter") for number in range(40)]
    outcomes = await asyncio.gather(*(outcome(system, wish) for wish in wishes))
    assert [type(each) for each in outcomes] == [Unroutable, type(None)] * 20
    async with system.transport.subscribe(QUEUE, prefetch=100) as subscription:
        assert sorted(texts(await take(subscription, 20)), key=int) == [str(number) for number in range(1, 40, 2)]


class RepliesLost:
    """A database that commits, and whose reply to COMMIT never arrives."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.dialect = database.dialect
        self.losing = True

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Tx]:
        async with self._database.transaction() as tx:
            yield tx
        if self.losing:
            raise OutcomeUnknown("the reply to COMMIT was lost")

    def single(self) -> AbstractAsyncContextManager[Tx]:
        return self.transaction()

    @asynccontextmanager
    async def read(self, *, snapshot: bool = False) -> AsyncIterator[Tx]:
        async with self._database.read(snapshot=snapshot) as tx:
            yield tx

    async def close(self) -> None:
        pass


async def test_a_lost_confirm_is_unconfirmed_and_publishing_again_has_one_effect(start_system: StartSystem) -> None:
    system = await office(start_system)
    needs_shared_database(system)
    ledger = await Ledger.of(system)
    database = RepliesLost(system.database)
    group = GroupCommit(database, system.clock)
    group.start()
    try:
        transport = SqlTransport(database, group, system.clock, system.ids, system.settings.messaging)
        publisher = Publisher(transport, system.codec, system.clock, system.ids)
        with pytest.raises(PublishUnconfirmed):
            await publisher.publish(EXCHANGE, KEY, Note("once"), message_id="same")
        database.losing = False
        await publisher.publish(EXCHANGE, KEY, Note("once"), message_id="same")
    finally:
        await group.close()
    assert await counts(system) == (2, 0, 0)  # nobody could know that the first one was stored
    system.listen(effectively(ledger.write))
    await ledger.holds(1)
    await send(system, "marker")
    await ledger.holds(2)
    assert await ledger.entries() == ["once", "marker"]


async def test_a_publish_past_its_deadline_is_unconfirmed(start_system: StartSystem) -> None:
    system = await office(start_system)
    held = asyncio.Event()

    async def slow(tx: Tx, requests: object) -> list[HoldfastError | None]:
        await held.wait()
        return [None]

    before = asyncio.create_task(system.group.submit(slow, None))
    try:
        await asyncio.sleep(0)
        with pytest.raises(PublishUnconfirmed):
            await system.publisher.publish(EXCHANGE, KEY, Note("late"), deadline_s=0.05)
    finally:
        held.set()
        await before


# -- routing ----------------------------------------------------------------------------------------------------------


async def routed(system: System, kind: ExchangeKind, bindings: dict[str, list[str]], key: str) -> dict[str, int]:
    """Declare an exchange with queues bound to it by these keys, publish once, and count what each queue got."""
    topology = Topology(
        exchanges=[Exchange(name="ex", kind=kind)],
        queues=[Queue(name=queue) for queue in bindings],
        bindings=[
            Binding(exchange="ex", queue=queue, routing_key=each) for queue, keys in bindings.items() for each in keys
        ],
    )
    await system.transport.declare(topology)
    await publish(system, [note(system, exchange="ex", key=key, mandatory=False)])
    return {queue: (await counts(system, queue))[0] for queue in bindings}


async def test_a_direct_exchange_routes_by_the_exact_key(start_system: StartSystem) -> None:
    system = await office(start_system)
    bindings = {"q.a": ["red"], "q.b": ["red", "blue"], "q.c": ["blue"], "q.d": ["#"], "q.e": ["re"]}
    assert await routed(system, "direct", bindings, "red") == {"q.a": 1, "q.b": 1, "q.c": 0, "q.d": 0, "q.e": 0}


async def test_a_fanout_exchange_routes_to_every_queue_whatever_the_key(start_system: StartSystem) -> None:
    system = await office(start_system)
    assert await routed(system, "fanout", {"q.a": [""], "q.b": ["blue"]}, "red") == {"q.a": 1, "q.b": 1}


async def test_a_topic_exchange_routes_by_pattern(start_system: StartSystem) -> None:
    system = await office(start_system)
    bindings = {
        "q.exact": ["order.eu.paid"],
        "q.star": ["order.*.paid"],
        "q.hash": ["order.#"],
        "q.all": ["#"],
        "q.tail": ["#.paid"],
        "q.short": ["order.*"],
        "q.other": ["order.us.*"],
        "q.none": [],
    }
    got = await routed(system, "topic", bindings, "order.eu.paid")
    assert [queue for queue, count in got.items() if count] == ["q.exact", "q.star", "q.hash", "q.all", "q.tail"]
    assert set(got.values()) == {0, 1}


@pytest.mark.parametrize("kind", ["direct", "topic", "fanout"])
async def test_a_queue_bound_twice_gets_one_copy(start_system: StartSystem, kind: ExchangeKind) -> None:
    system = await office(start_system)
    assert await routed(system, kind, {"q.twice": ["red", "red", "#", "*"]}, "red") == {"q.twice": 1}


async def test_each_bound_queue_gets_its_own_copy(start_system: StartSystem) -> None:
    system = await office(start_system)
    await routed(system, "fanout", {"q.a": [""], "q.b": [""]}, "red")
    async with (
        system.transport.subscribe("q.a", prefetch=1) as first,
        system.transport.subscribe("q.b", prefetch=1) as second,
    ):
        (one,), (other,) = await take(first), await take(second)
        assert one.message == other.message
        assert (one.queue, other.queue) == ("q.a", "q.b")


async def test_the_default_exchange_routes_to_the_queue_by_name(start_system: StartSystem) -> None:
    system = await office(start_system)
    await send(system, "direct", exchange="", key=QUEUE)
    assert await counts(system) == (1, 0, 0)
    assert isinstance(await outcome(system, note(system, exchange="", key="no.such.queue")), Unroutable)


# -- declarations -----------------------------------------------------------------------------------------------------


async def test_declaring_twice_is_fine_and_keeps_the_messages(start_system: StartSystem) -> None:
    system = await office(start_system)
    await send(system, "kept")
    await system.transport.declare(TOPOLOGY)
    await system.transport.declare(TOPOLOGY + TOPOLOGY)
    await send(system, "one copy")
    assert await counts(system) == (2, 0, 0)


async def test_declaring_another_kind_is_a_mismatch_that_names_both_and_changes_nothing(
    start_system: StartSystem,
) -> None:
    system = await office(start_system)
    other = Topology(exchanges=[Exchange(name=EXCHANGE, kind="fanout")], queues=[Queue(name="brand.new")])
    with pytest.raises(TopologyMismatch) as refusal:
        await system.transport.declare(other)
    for part in (EXCHANGE, "topic", "fanout"):
        assert part in refusal.value.detail
    assert isinstance(await outcome(system, note(system, key="letter")), Unroutable)  # still a topic exchange
    with pytest.raises(InvalidInput):
        await system.transport.stats("brand.new")


async def test_declaring_one_exchange_as_two_kinds_at_once_is_refused(start_system: StartSystem) -> None:
    system = await office(start_system)
    with pytest.raises((TopologyMismatch, InvalidInput)):
        await system.transport.declare(
            Topology(exchanges=[Exchange(name="torn", kind="direct"), Exchange(name="torn", kind="fanout")])
        )


async def test_two_systems_declare_the_same_at_once(start_system: StartSystem) -> None:
    system = await office(start_system)
    needs_several_processes(system)
    other = await office(start_system)
    topology = Topology(
        exchanges=[Exchange(name=f"ex.{number}", kind="direct") for number in range(20)],
        queues=[Queue(name=f"q.{number}") for number in range(20)],
        bindings=[Binding(exchange=f"ex.{n}", queue=f"q.{n}", routing_key="k") for n in range(20)],
    )
    backwards = Topology(
        exchanges=topology.exchanges[::-1], queues=topology.queues[::-1], bindings=topology.bindings[::-1]
    )
    await asyncio.gather(*(each.transport.declare(topology) for each in (system, other)))
    await asyncio.gather(system.transport.declare(topology), other.transport.declare(backwards))
    await send(system, "one copy", exchange="ex.7", key="k")
    assert await counts(other, "q.7") == (1, 0, 0)


async def test_a_binding_made_by_another_system_counts_at_once(start_system: StartSystem) -> None:
    system = await office(start_system)
    needs_several_processes(system)
    other = await office(start_system)
    assert isinstance(await outcome(system, note(system, key="letter")), Unroutable)
    bound = Topology(
        exchanges=TOPOLOGY.exchanges,
        queues=TOPOLOGY.queues,
        bindings=[Binding(exchange=EXCHANGE, queue=QUEUE, routing_key="letter")],
    )
    await other.transport.declare(bound)
    assert await outcome(system, note(system, key="letter")) is None


async def test_stats_of_an_unknown_queue_are_refused(start_system: StartSystem) -> None:
    system = await office(start_system)
    with pytest.raises(InvalidInput, match=r"no\.such\.queue"):
        await system.transport.stats("no.such.queue")


async def test_the_trace_of_the_publisher_travels_with_the_message(start_system: StartSystem) -> None:
    system = await office(start_system)
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    with observe.trace_from({"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}):
        await system.publisher.publish(EXCHANGE, KEY, Note("traced"))
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        (delivery,) = await take(subscription)
        assert trace_id in delivery.message.headers["traceparent"]


# -- the publisher ----------------------------------------------------------------------------------------------------


def draft(text: str, **options: Any) -> Draft:
    fields: dict[str, Any] = {"exchange": EXCHANGE, "routing_key": KEY, "body": Note(text)} | options
    return Draft(**fields)


async def test_headers_travel_with_the_message_and_expiry_ends_it(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await system.publisher.publish(EXCHANGE, KEY, Note("kept"), headers={"user-info": "42"})
    await system.publisher.publish(EXCHANGE, KEY, Note("gone"), expires_ms=1_000)
    async with system.database.transaction() as tx:
        await system.outbox.add(tx, EXCHANGE, KEY, Note("gone too"), expires_ms=1_000, headers={"user-info": "7"})
    assert await counts(system) == (3, 0, 0)
    await pass_time(system, clock, 1)
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        (kept,) = await take(subscription)
    assert texts([kept]) == ["kept"]
    assert kept.message.headers["user-info"] == "42"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"headers": {"x-holdfast-parked-id": "1"}}, "ours to write"),
        ({"headers": {"number": 1}}, "names and values of headers are text"),
        ({"expires_ms": -1}, "expires_ms must be in"),
        ({"expires_ms": DELAY_MS_MAX + 1}, "expires_ms must be in"),
    ],
)
async def test_a_draft_that_cannot_be_sent_is_told_and_none_of_its_batch_is(
    start_system: StartSystem, options: dict[str, Any], told: str
) -> None:
    system = await office(start_system)
    with pytest.raises(InvalidInput, match=told):
        await system.publisher.publish_all([draft("good"), draft("bad", **options)])
    with pytest.raises(InvalidInput, match=told):
        async with system.database.transaction() as tx:
            await system.outbox.add_all(tx, [draft("good"), draft("bad", **options)])
    assert await counts(system) == (0, 0, 0)


async def test_a_batch_of_the_publisher_has_an_outcome_for_each_and_tries_again_only_what_may_be_mended(
    start_system: StartSystem,
) -> None:
    system = await office(start_system)
    await system.transport.declare(
        Topology(queues=[Queue(name="full", max_length=1, overflow="reject-publish"), Queue(name="other")])
    )
    await send(system, "in the way", exchange="", key="full")
    patient = Publisher(
        system.transport, system.codec, system.clock, system.ids, RetryPolicy(tries=1_000, interval_ms=10)
    )
    batch = [
        draft("fits", exchange="", routing_key="other"),
        draft("waits for room", exchange="", routing_key="full"),
        draft("for nobody", routing_key="letter.written"),
        draft("nowhere", exchange="nowhere"),
    ]
    publishing = asyncio.create_task(patient.publish_all(batch, deadline_s=WAIT_S))
    await counts_become(system, (1, 0, 0), "other")
    async with system.transport.subscribe("full", prefetch=1) as subscription:
        (first,) = await take(subscription)
        await subscription.settle([ack(first)])
    outcomes = await publishing
    assert [type(each) for each in outcomes] == [type(None), type(None), Unroutable, NoSuchExchange]
    assert await counts(system, "other") == (1, 0, 0)  # sent once, although another was tried again
    async with system.transport.subscribe("full", prefetch=1) as subscription:
        assert texts(await take(subscription)) == ["waits for room"]


async def test_what_was_refused_when_the_deadline_came_is_known_not_to_be_stored(start_system: StartSystem) -> None:
    system = await office(start_system)
    await system.transport.declare(Topology(queues=[Queue(name="full", max_length=0, overflow="reject-publish")]))
    patient = Publisher(
        system.transport, system.codec, system.clock, system.ids, RetryPolicy(tries=1_000, interval_ms=60_000)
    )
    outcomes = await patient.publish_all([draft("no room", exchange="", routing_key="full")], deadline_s=0.5)
    assert [type(each) for each in outcomes] == [PublishRejected]
