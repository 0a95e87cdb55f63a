"""Listeners: each message is handled to its end, whoever fails: handler, neighbours in the batch, database, process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import msgspec
import pytest

from holdfast import observe
from holdfast.db.database import Tx
from holdfast.errors import InvalidInput, PublishRejected, Unavailable
from holdfast.messaging.draft import Draft
from holdfast.messaging.injection import Incoming
from holdfast.messaging.listen import Listen
from holdfast.messaging.message import ack, retry
from holdfast.messaging.retry import Reject, Retry, RetryPolicy
from holdfast.messaging.topology import Binding, Queue, Topology
from holdfast.settings import Settings
from tests.conftest import WAIT_S, StartSystem, eventually, quick_settings
from tests.contract.notes import (
    EXCHANGE,
    KEY,
    QUEUE,
    TOPOLOGY,
    Ledger,
    Memo,
    Note,
    Ticket,
    counts,
    counts_become,
    effectively,
    manual_clock,
    note,
    office,
    opened,
    outcome,
    parked_messages,
    parks,
    pass_time,
    plainly,
    publish,
    raw,
    send,
    turn,
    with_messaging,
)
from tests.servers.postgres import PostgresServer, require_postgres

BOTH = TOPOLOGY + Topology(
    exchanges=TOPOLOGY.exchanges,
    queues=[Queue(name="notes.effects")],
    bindings=[Binding(exchange=EXCHANGE, queue="notes.effects", routing_key="#")],
)
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
DURABLE = RetryPolicy(tries=3, interval_ms=10)
PATIENT = {"lease_ms": 600_000, "poll_ms": 60_000}


class Sick(Exception):
    """What a failing handler raises."""


class Desk:
    """A plain handler that keeps what it got, and may be told to fail or to wait."""

    def __init__(self, *, fail: bool = False) -> None:
        self.got: list[str] = []
        self.attempts: list[int] = []
        self.deliveries: list[int] = []
        self.fail = fail
        self.open = asyncio.Event()
        self.open.set()

    async def handle(self, incoming: Incoming) -> None:
        self.got.append(incoming.body.text)
        self.attempts.append(incoming.delivery.attempt)
        self.deliveries.append(incoming.delivery.deliveries)
        await self.open.wait()
        if self.fail:
            raise Sick(f"cannot handle {incoming.body.text}")

    async def has(self, count: int) -> None:
        """Wait until the handler was called so often."""

        async def reached() -> bool:
            return len(self.got) >= count

        await eventually(reached, f"the handler was called {count} times")


# -- handling ---------------------------------------------------------------------------------------------------------


async def test_a_handled_message_is_gone(start_system: StartSystem) -> None:
    system = await office(start_system)
    desk = Desk()
    system.listen(plainly(desk.handle))
    await send(system, "1", "2", "3")
    await counts_become(system, (0, 0, 0))
    assert desk.got == ["1", "2", "3"]
    assert await parked_messages(system) == []


async def test_handlers_are_chosen_by_the_type_of_the_body(start_system: StartSystem) -> None:
    system = await office(start_system)
    ledger = await Ledger.of(system)
    desk = Desk()

    async def memos(tx: Tx, memos: Sequence[Memo]) -> None:
        await ledger.write(tx, [Note(f"memo {each.text}") for each in memos])

    system.listen(Listen(name="both", queue=QUEUE, effects={Memo: memos}, plain={Note: desk.handle}))
    await system.publisher.publish(EXCHANGE, KEY, Memo("1"))
    await system.publisher.publish(EXCHANGE, KEY, Note("2"))
    await counts_become(system, (0, 0, 0))
    assert desk.got == ["2"]
    assert await ledger.entries() == ["memo 1"]


async def test_no_more_plain_handlers_run_at_once_than_allowed(start_system: StartSystem) -> None:
    system = await office(start_system)
    desk = Desk()
    desk.open.clear()
    system.listen(plainly(desk.handle, concurrency=3))
    await send(system, *(str(number) for number in range(10)))
    await desk.has(3)
    await counts_become(system, (0, 10, 0))
    await turn(system)
    assert desk.got == ["0", "1", "2"]
    desk.open.set()
    await counts_become(system, (0, 0, 0))
    assert len(desk.got) == 10


async def test_a_slow_handler_keeps_its_message_beyond_the_lease(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    slow, other = Desk(), Desk()
    slow.open.clear()
    system.listen(plainly(slow.handle, prefetch=1))
    await send(system, "slow")
    await slow.has(1)
    system.listen(plainly(other.handle))
    for _ in range(9):  # three leases
        await pass_time(system, clock, system.settings.messaging.lease_ms / 3_000)
    await send(system, "marker")
    await other.has(1)
    assert other.got == ["marker"]
    slow.open.set()
    await counts_become(system, (0, 0, 0))
    assert slow.got == ["slow"]


async def test_a_slow_handler_keeps_its_message_beyond_the_lease_by_the_system_clock(
    start_system: StartSystem, settings: Settings
) -> None:
    system = await office(start_system, with_messaging(settings, lease_ms=1_000, poll_ms=20))
    slow, other = Desk(), Desk()
    slow.open.clear()
    system.listen(plainly(slow.handle, prefetch=1))
    await send(system, "slow")
    await slow.has(1)
    system.listen(plainly(other.handle))
    until = system.clock.monotonic() + 2.5

    async def past_two_leases() -> bool:
        return system.clock.monotonic() > until

    await eventually(past_two_leases, "two leases have passed")
    assert other.got == []
    slow.open.set()
    await counts_become(system, (0, 0, 0))
    assert slow.deliveries == [1]


# -- retries ----------------------------------------------------------------------------------------------------------


async def test_a_failing_message_is_tried_locally_then_durably_then_parked(start_system: StartSystem) -> None:
    system = await office(start_system)
    desk = Desk(fail=True)
    system.listen(plainly(desk.handle, local=RetryPolicy(tries=2, interval_ms=1), durable=DURABLE))
    (message_id,) = await send(system, "poison")
    (kept,) = await parks(system)
    assert desk.attempts == [1, 1, 2, 2, 3, 3]
    assert desk.deliveries == [1, 1, 2, 2, 3, 3]
    assert (kept.message_id, kept.attempt) == (message_id, 3)
    assert kept.reason.startswith("Sick: cannot handle poison\n")
    assert "in handle" in kept.reason  # the trace says where
    assert await counts(system) == (0, 0, 0)


async def test_a_message_that_recovers_is_not_parked(start_system: StartSystem) -> None:
    system = await office(start_system)
    attempts: list[int] = []

    async def handle(incoming: Incoming) -> None:
        attempts.append(incoming.delivery.attempt)
        if len(attempts) < 4:
            raise Sick

    system.listen(plainly(handle, local=RetryPolicy(tries=2, interval_ms=1), durable=DURABLE))
    await send(system, "recovers")
    await counts_become(system, (0, 0, 0))
    assert attempts == [1, 1, 2, 2]
    assert await parked_messages(system) == []


async def test_a_message_waits_unacked_for_a_local_and_delayed_for_a_durable_retry(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    desk = Desk(fail=True)
    durable = RetryPolicy(tries=3, interval_ms=5_000, multiplier=2.0)
    system.listen(plainly(desk.handle, local=RetryPolicy(tries=2, interval_ms=500), durable=durable))
    await send(system, "poison")
    await desk.has(1)
    await turn(system)
    assert await counts(system) == (0, 1, 0)
    await pass_time(system, clock, 0.5)
    await desk.has(2)
    await counts_become(system, (0, 0, 1))
    await pass_time(system, clock, 4.999)
    assert len(desk.got) == 2
    await pass_time(system, clock, 0.001)
    await desk.has(3)
    await pass_time(system, clock, 0.5)
    await desk.has(4)
    await counts_become(system, (0, 0, 1))
    await pass_time(system, clock, 9.999)  # doubled
    assert len(desk.got) == 4
    await pass_time(system, clock, 0.001)
    await desk.has(5)
    assert desk.attempts == [1, 1, 2, 2, 3]


async def test_the_count_of_attempts_survives_a_restart(settings: Settings) -> None:
    clock = manual_clock()
    desk = Desk(fail=True)
    listen = plainly(desk.handle, durable=RetryPolicy(tries=3, interval_ms=60_000))
    async with opened(settings, clock) as system:
        system.listen(listen)
        await send(system, "poison")
        await counts_become(system, (0, 0, 1))
    clock.advance(60)
    async with opened(settings, clock) as system:
        system.listen(listen)
        await counts_become(system, (0, 0, 1))
    clock.advance(60)
    async with opened(settings, clock) as system:
        system.listen(listen)
        (kept,) = await parks(system)
    assert desk.attempts == [1, 2, 3]
    assert kept.attempt == 3


async def test_the_signal_to_come_again_later_does_not_count(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    attempts: list[int] = []

    async def handle(incoming: Incoming) -> None:
        attempts.append(incoming.delivery.attempt)
        if len(attempts) < 4:
            raise Retry(2_000, "not yet")

    system.listen(plainly(handle, local=RetryPolicy(tries=5, interval_ms=1)))
    await send(system, "later")
    for calls in range(1, 4):
        await counts_become(system, (0, 0, 1))
        assert len(attempts) == calls
        await pass_time(system, clock, 2)
    await counts_become(system, (0, 0, 0))
    assert attempts == [1, 1, 1, 1]
    assert await parked_messages(system) == []


async def test_an_effect_may_ask_to_come_again_later_without_failing_its_neighbours(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    ledger = await Ledger.of(system)
    ready = False

    async def effect(tx: Tx, notes: Sequence[Note]) -> None:
        if not ready and Note("later") in notes:
            raise Retry(2_000)
        await ledger.write(tx, notes)

    await send(system, "1", "later", "2")
    system.listen(effectively(effect))
    await ledger.holds(2)
    await counts_become(system, (0, 0, 1))
    ready = True
    await pass_time(system, clock, 2)
    await ledger.holds(3)
    assert await ledger.entries() == ["1", "2", "later"]
    assert await parked_messages(system) == []


async def test_a_neighbour_that_is_away_does_not_use_up_the_attempts(start_system: StartSystem) -> None:
    system = await office(start_system)
    attempts: list[int] = []

    async def handle(incoming: Incoming) -> None:
        attempts.append(incoming.delivery.attempt)
        if len(attempts) < 6:
            raise Unavailable("the neighbour is away")

    system.listen(plainly(handle, durable=RetryPolicy(tries=2, interval_ms=10)))
    await send(system, "patient")
    await counts_become(system, (0, 0, 0))
    assert attempts == [1] * 6
    assert await parked_messages(system) == []


# -- fatal errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"type": "test.unknown"}, "unknown message type 'test.unknown'"),
        ({"type": ""}, "unknown message type ''"),
        ({"body": b'{"text": 7}'}, "test.note"),
        ({"body": b'{"other": "x"}'}, "test.note"),
        ({"body": b"not json"}, "test.note"),
        ({"body": b""}, "test.note"),
        ({"body": b'{"text": "\xff"}'}, "test.note"),
        ({"body": b'{"a":' * 50_000}, "test.note"),
        ({"content_type": "text/plain"}, "text/plain"),
        ({"type": "test.memo", "body": b'{"text": "x"}'}, "no handler"),
        ({"type": "test.ticket", "body": b'{"seats": 0}'}, "at least one seat"),
    ],
    ids=[
        "unknown type",
        "no type",
        "wrong shape",
        "missing field",
        "no json",
        "no body",
        "no utf-8",
        "too deep",
        "other content type",
        "no handler",
        "the body's own rule",
    ],
)
async def test_a_message_that_cannot_be_decoded_is_parked_at_once(
    start_system: StartSystem, changes: dict[str, str | bytes], why: str
) -> None:
    system = await office(start_system)
    desk, tickets = Desk(), Desk()
    listen = plainly(desk.handle, local=RetryPolicy(tries=5, interval_ms=1), durable=DURABLE)
    listen = msgspec.structs.replace(listen, plain={Note: desk.handle, Ticket: tickets.handle})
    system.listen(listen)
    await publish(system, [raw(note(system, "bad"), **changes)])
    await send(system, "good")
    (kept,) = await parks(system)
    assert kept.attempt == 1
    assert why in kept.reason
    await counts_become(system, (0, 0, 0))
    assert desk.got == ["good"]
    assert tickets.got == []


@pytest.mark.parametrize("error", [InvalidInput("wrong data"), Reject("no use")])
async def test_a_fatal_error_of_a_handler_parks_at_once(start_system: StartSystem, error: Exception) -> None:
    system = await office(start_system)
    calls = 0

    async def handle(_: Incoming) -> None:
        nonlocal calls
        calls += 1
        raise error

    system.listen(plainly(handle, local=RetryPolicy(tries=5, interval_ms=1), durable=DURABLE))
    await send(system, "hopeless")
    (kept,) = await parks(system)
    assert calls == 1
    assert str(error) in kept.reason


@pytest.mark.parametrize("trouble", ["nul \x00 inside", "half a pair \ud800", "x" * 50_000])
async def test_a_poison_message_is_parked_whatever_its_error_says(start_system: StartSystem, trouble: str) -> None:
    system = await office(start_system)

    async def handle(_: Incoming) -> None:
        raise Sick(trouble)

    system.listen(plainly(handle))
    await send(system, "poison")
    (kept,) = await parks(system)
    assert kept.reason.startswith("Sick: ")


# -- neighbours in a batch --------------------------------------------------------------------------------------------


async def test_one_poison_message_does_not_harm_its_fifty_neighbours(start_system: StartSystem) -> None:
    system = await office(start_system)
    ledger = await Ledger.of(system)
    largest = 0
    alone = 0

    async def effect(tx: Tx, notes: Sequence[Note]) -> None:
        nonlocal largest, alone
        largest = max(largest, len(notes))
        alone += list(notes) == [Note("poison")]
        await ledger.write(tx, notes)
        if Note("poison") in notes:
            raise Sick("poison")

    good = [str(number) for number in range(50)]
    await send(system, *good[:25], "poison", *good[25:])
    system.listen(effectively(effect, local=RetryPolicy(tries=2, interval_ms=1), durable=DURABLE))
    (kept,) = await parks(system)
    await counts_become(system, (0, 0, 0))
    assert await ledger.entries() == good
    assert largest == 51  # they did stand in one batch
    assert alone >= 2 * 3  # each try is one more look at it alone, or beside a request that is no message
    assert kept.attempt == 3
    assert kept.reason.startswith("Sick: poison")


async def test_a_message_that_finds_a_neighbour_away_does_not_hold_up_the_others(start_system: StartSystem) -> None:
    """`Unavailable` may come from the effect itself, and then the database is not to blame: the others must go on."""
    system = await office(start_system)
    ledger = await Ledger.of(system)

    async def effect(tx: Tx, notes: Sequence[Note]) -> None:
        await ledger.write(tx, notes)
        if Note("poison") in notes:
            raise Unavailable("what this one needs is away")

    good = [str(number) for number in range(20)]
    await send(system, *good[:10], "poison", *good[10:])
    system.listen(effectively(effect, durable=RetryPolicy(tries=3, interval_ms=50)))
    await ledger.holds(20)
    assert sorted(await ledger.entries()) == sorted(good)


async def test_a_message_that_runs_into_a_taken_key_does_not_hold_up_the_others(start_system: StartSystem) -> None:
    """A key that is taken stays taken: to decide the batch with it again and again keeps the whole process waiting."""
    system = await office(start_system)
    ledger = await Ledger.of(system)
    looks = 0

    async def effect(tx: Tx, notes: Sequence[Note]) -> None:
        nonlocal looks
        looks += Note("poison") in notes
        await ledger.write(tx, notes)
        if Note("poison") in notes:
            await ledger.write_once(tx, "taken")

    async with system.database.transaction() as tx:
        await ledger.write_once(tx, "taken")
    good = [str(number) for number in range(20)]
    await send(system, *good[:10], "poison", *good[10:])
    system.listen(effectively(effect))
    (kept,) = await parks(system)
    assert "unique" in kept.reason
    assert await ledger.entries() == good
    assert looks <= 12  # 21 are split five times until the poison is alone: two looks at each size are plenty


async def test_an_error_with_a_constructor_of_its_own_does_not_stop_the_writer(settings: Settings) -> None:
    class ShopAway(Unavailable):
        """The error of a user, who may want more than one word."""

        def __init__(self, shop: str, *, until_us: int) -> None:
            super().__init__(f"{shop} is away until {until_us}")

    async def check() -> None:
        async with opened(settings) as system:
            ledger = await Ledger.of(system)

            async def effect(tx: Tx, notes: Sequence[Note]) -> None:
                if Note("away") in notes:
                    raise ShopAway("shop", until_us=1)
                await ledger.write(tx, notes)

            await send(system, "away", "away")
            system.listen(effectively(effect, durable=RetryPolicy(tries=2, interval_ms=600_000)))
            await counts_become(system, (0, 0, 2))
            await send(system, "good")
            await ledger.holds(1)

    await asyncio.wait_for(check(), WAIT_S)


# -- stopping ---------------------------------------------------------------------------------------------------------


async def test_stop_lets_a_running_handler_finish_and_ack(start_system: StartSystem) -> None:
    system = await office(start_system)
    desk = Desk()
    desk.open.clear()
    listener = system.listen(plainly(desk.handle))
    await send(system, "running")
    await desk.has(1)
    stopping = asyncio.create_task(listener.stop(WAIT_S))
    await turn(system)
    assert not stopping.done()
    await send(system, "too late")
    desk.open.set()
    await stopping
    assert desk.got == ["running"]
    assert await counts(system) == (1, 0, 0)


async def test_stop_gives_back_what_no_handler_has_begun(settings: Settings) -> None:
    """A handler that has not begun when the stop comes must not begin: the drain would last as long as the backlog."""
    patient = with_messaging(settings, **PATIENT)
    desk = Desk()
    async with opened(patient) as system:
        desk.open.clear()
        listener = system.listen(plainly(desk.handle, concurrency=1))
        await send(system, "running", "2", "3", "4")
        await desk.has(1)
        await counts_become(system, (0, 4, 0))
        stopping = asyncio.create_task(listener.stop(WAIT_S))
        await turn(system)
        desk.open.set()
        await stopping
        assert desk.got == ["running"]
        assert await counts(system) == (3, 0, 0)
    async with opened(patient) as system:
        system.listen(plainly(desk.handle))
        await counts_become(system, (0, 0, 0))
    assert desk.got == ["running", "2", "3", "4"]
    assert desk.attempts == [1, 1, 1, 1]


async def test_a_handler_slower_than_the_drain_is_cancelled_and_its_message_given_back_at_once(
    settings: Settings,
) -> None:
    patient = with_messaging(settings, drain_ms=50, **PATIENT)
    desk = Desk()
    desk.open.clear()
    async with opened(patient) as system:
        system.listen(plainly(desk.handle))
        await send(system, "endless")
        await desk.has(1)
    desk.open.set()
    async with opened(patient) as system:
        system.listen(plainly(desk.handle))
        await counts_become(system, (0, 0, 0))
    assert desk.got == ["endless", "endless"]
    assert desk.attempts == [1, 1]


async def test_stop_during_a_local_retry_gives_the_message_another_attempt_later(settings: Settings) -> None:
    patient = with_messaging(settings, **PATIENT)
    desk = Desk(fail=True)
    async with opened(patient) as system:
        local, durable = RetryPolicy(tries=5, interval_ms=60_000), RetryPolicy(tries=5, interval_ms=0)
        system.listen(plainly(desk.handle, local=local, durable=durable))
        await send(system, "again")
        await desk.has(1)
    desk.fail = False
    async with opened(patient) as system:
        system.listen(plainly(desk.handle))
        await counts_become(system, (0, 0, 0))
        assert await parked_messages(system) == []
    assert len(desk.got) in {2, 3}


async def test_stop_works_before_the_listener_has_begun_and_twice(start_system: StartSystem) -> None:
    system = await office(start_system)
    desk = Desk()
    listener = system.listen(plainly(desk.handle))
    await listener.stop()
    await listener.stop()
    await send(system, "nobody is there")
    assert await counts(system) == (1, 0, 0)


# -- ack modes --------------------------------------------------------------------------------------------------------


async def test_in_manual_mode_the_handler_settles(start_system: StartSystem) -> None:
    system = await office(start_system)
    attempts: list[int] = []

    async def handle(incoming: Incoming) -> None:
        attempts.append(incoming.delivery.attempt)
        delivery = incoming.delivery
        await incoming.settle(retry(delivery, 0) if delivery.attempt == 1 else ack(delivery))

    system.listen(plainly(handle, ack="manual"))
    await send(system, "mine")
    await counts_become(system, (0, 0, 0))
    assert attempts == [1, 2]


async def test_in_none_mode_the_message_is_gone_before_the_handler_runs(start_system: StartSystem) -> None:
    system = await office(start_system)
    desk = Desk()
    desk.open.clear()
    system.listen(plainly(desk.handle, ack="none"))
    await send(system, "at most once")
    await desk.has(1)
    assert await counts(system) == (0, 0, 0)
    desk.open.set()


async def test_in_none_mode_the_handler_does_not_run_for_a_message_that_could_not_be_acked(
    start_system: StartSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most once: what is not known to be gone from the queue comes again, so nobody may have handled it."""
    system = await office(start_system)
    tried = asyncio.Event()

    async def away(*_: object) -> None:
        tried.set()
        raise Unavailable("the transport is away")

    desk = Desk()
    await send(system, "at most once")
    with monkeypatch.context() as patch:
        patch.setattr(type(system.transport.subscribe(QUEUE, prefetch=1)), "settle", away)
        listener = system.listen(plainly(desk.handle, ack="none"))
        await asyncio.wait_for(tried.wait(), WAIT_S)
        await listener.stop()
    assert await counts(system) == (1, 0, 0)
    assert desk.got == []


async def test_in_none_mode_stop_gives_back_what_no_handler_has_begun(start_system: StartSystem) -> None:
    """A message is acked when its handler's turn has come, not before: an ordinary stop must not lose the backlog."""
    system = await office(start_system)
    desk = Desk()
    desk.open.clear()
    listener = system.listen(plainly(desk.handle, ack="none", concurrency=1))
    await send(system, "running", "2", "3", "4")
    await desk.has(1)
    await turn(system)
    stopping = asyncio.create_task(listener.stop(WAIT_S))
    await turn(system)
    desk.open.set()
    await stopping
    assert desk.got == ["running"]
    assert await counts(system) == (3, 0, 0)


# -- trace ------------------------------------------------------------------------------------------------------------


async def test_the_trace_travels_from_the_publisher_through_the_handler_to_what_it_publishes(
    start_system: StartSystem,
) -> None:
    system = await office(start_system)
    traces: dict[str, str] = {}

    async def handle(incoming: Incoming) -> None:
        traces[incoming.body.text] = observe.trace_headers()["traceparent"]
        if incoming.body.text == "question":
            await system.publisher.publish(EXCHANGE, KEY, Note("answer"))

    system.listen(plainly(handle))
    with observe.trace_from(TRACEPARENT):
        await system.publisher.publish(EXCHANGE, KEY, Note("question"))
    await system.publisher.publish(EXCHANGE, KEY, Note("other"))

    async def all_came() -> bool:
        return len(traces) == 3

    await eventually(all_came, "all three were handled")
    assert TRACE_ID in traces["question"]
    assert TRACE_ID in traces["answer"]
    assert TRACE_ID not in traces["other"]


async def test_what_an_effect_sends_continues_the_trace_of_its_message(start_system: StartSystem) -> None:
    system = await office(start_system)
    traces: list[str] = []

    async def effect(tx: Tx, notes: Sequence[Note]) -> None:
        for each in notes:
            draft = Draft(exchange=EXCHANGE, routing_key=KEY, body=Memo(each.text), trace=tx.trace_of(each))
            await system.outbox.add_all(tx, [draft])

    async def handle(incoming: Incoming) -> None:
        traces.append(incoming.delivery.message.headers.get("traceparent", "no trace"))

    system.listen(Listen(name="chain", queue=QUEUE, effects={Note: effect}, plain={Memo: handle}))
    with observe.trace_from(TRACEPARENT):
        await system.publisher.publish(EXCHANGE, KEY, Note("question"))

    async def came() -> bool:
        return bool(traces)

    await eventually(came, "the effect's message was handled")
    assert TRACE_ID in traces[0]


# -- the database away ------------------------------------------------------------------------------------------------


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL that no other test needs, so that it may be crashed."""
    require_postgres()
    with PostgresServer() as server:
        yield server


async def test_listeners_survive_the_database_being_away(own_postgres: PostgresServer) -> None:
    settings = quick_settings(own_postgres.url(own_postgres.create_database()))
    settings = with_messaging(settings, lease_ms=10_000)
    async with opened(settings) as system:
        ledger = await Ledger.of(system)
        desk = Desk()
        system.listen(plainly(desk.handle, durable=RetryPolicy(tries=2, interval_ms=50)))
        await system.transport.declare(BOTH)
        system.listen(msgspec.structs.replace(effectively(ledger.write), queue="notes.effects", durable=DURABLE))
        await send(system, "before")
        await desk.has(1)
        await ledger.holds(1)
        desk.open.clear()
        await send(system, "during")
        await desk.has(2)
        await ledger.holds(2)

        await asyncio.to_thread(own_postgres.crash)
        assert isinstance(await outcome(system, note(system, "lost")), PublishRejected)
        with pytest.raises(Unavailable):
            await system.transport.stats(QUEUE)
        desk.open.set()  # its handler ends while there is no database to ack in
        await asyncio.to_thread(own_postgres.restart)

        async def stored() -> bool:
            return await outcome(system, note(system, "after")) is None

        await eventually(stored, "publishing works again")
        await desk.has(3)
        await ledger.holds(3)
        await counts_become(system, (0, 0, 0))
        await counts_become(system, (0, 0, 0), "notes.effects")
        assert await parked_messages(system) == []
        assert desk.got == ["before", "during", "after"]
        assert await ledger.entries() == ["before", "during", "after"]
