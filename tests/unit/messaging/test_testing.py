"""The test bus: time that moves when told, queues that can be looked at, and faults that happen as scripted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

import msgspec
import pytest
import uvloop
from sqlalchemy import text

from holdfast.clock import ManualClock, SystemClock
from holdfast.db.database import Tx
from holdfast.errors import InvalidInput
from holdfast.messaging import testing
from holdfast.messaging.draft import Draft
from holdfast.messaging.injection import Incoming
from holdfast.messaging.listen import Listen
from holdfast.messaging.message import ack
from holdfast.messaging.recover import Republish, error_topology
from holdfast.messaging.retry import RetryPolicy
from holdfast.messaging.testing import Bus, ScriptedFailure
from holdfast.messaging.topology import Binding, Exchange, Queue, Topology

DAY_S = 86_400
QUEUE = "notes.work"
DEAD = "notes.dead"
ONCE = RetryPolicy(tries=1)


class Note(msgspec.Struct, frozen=True):
    """A body."""

    text: str


TYPES = {"test.note": Note}
TOPOLOGY = Topology(
    exchanges=[Exchange(name="notes", kind="topic"), Exchange(name="dead", kind="fanout")],
    queues=[
        Queue(name=QUEUE, dead_letter_exchange="dead"),
        Queue(name=DEAD),
        Queue(name="notes.brief", expires_ms=60_000),
    ],
    bindings=[
        Binding(exchange="notes", queue=QUEUE, routing_key="note.#"),
        Binding(exchange="dead", queue=DEAD),
    ],
) + error_topology("desk")


@pytest.fixture
async def bus() -> AsyncIterator[Bus]:
    async with testing.bus(TYPES, TOPOLOGY) as running:
        yield running


async def send(bus: Bus, *texts: str, **options: int) -> None:
    """Publish notes one after the other."""
    for each in texts:
        await bus.publisher.publish("notes", "note.written", Note(each), **options)  # type: ignore[arg-type]


class Seen:
    """What a handler got, and when, in seconds since the test began."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._start_us = bus.clock.now_us()
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.at: list[float] = []
        self.calls = 0

    def note(self) -> float:
        return (self._bus.clock.now_us() - self._start_us) / 1_000_000

    async def plain(self, incoming: Incoming) -> None:
        self.texts.append(incoming.body.text)
        self.ids.append(incoming.delivery.message.message_id)
        self.at.append(self.note())

    async def broken(self, incoming: Incoming) -> None:
        await self.plain(incoming)
        raise RuntimeError("broken")

    async def effect(self, tx: Tx, notes: Sequence[Note]) -> None:
        self.calls += 1
        tx.on_commit(lambda: self.texts.extend(each.text for each in notes))


def listen(bus: Bus, *, broken: bool = False, local: RetryPolicy = ONCE, durable: RetryPolicy = ONCE) -> Seen:
    """Start a plain listener that tries once unless told otherwise."""
    seen = Seen(bus)
    handler = seen.broken if broken else seen.plain
    bus.listen(Listen(name="desk", queue=QUEUE, plain={Note: handler}, local=local, durable=durable))
    return seen


# -- time -------------------------------------------------------------------------------------------------------------


async def test_a_delay_of_eight_years_is_over_at_its_instant_and_takes_no_time(bus: Bus) -> None:
    seen = listen(bus)
    delay_s = 8 * 365 * DAY_S
    began = time.process_time()
    await send(bus, "late", delay_ms=delay_s * 1_000)
    await bus.advance(delay_s - 1)
    assert seen.texts == []
    await bus.advance(2)
    assert seen.texts == ["late"]
    assert seen.at == [delay_s]
    assert time.process_time() - began < 1.0


async def test_one_step_over_many_instants_stops_at_each_in_order(bus: Bus) -> None:
    seen = listen(bus)
    for second in (5, 1, 3):
        await send(bus, f"after {second}", delay_ms=second * 1_000)
    await bus.advance(10)
    assert seen.texts == ["after 1", "after 3", "after 5"]
    assert seen.at == [1, 3, 5]
    assert seen.note() == 10


async def test_what_an_instant_causes_happens_within_the_same_step(bus: Bus) -> None:
    left: list[float] = []
    seen = Seen(bus)

    async def again(incoming: Incoming) -> None:
        left.append(seen.note())
        if len(left) < 4:
            await bus.publisher.publish("notes", "note.written", incoming.body, delay_ms=DAY_S * 1_000)

    bus.listen(Listen(name="chain", queue=QUEUE, plain={Note: again}))
    await send(bus, "first")
    await bus.advance(7 * DAY_S)
    assert left == [0, DAY_S, 2 * DAY_S, 3 * DAY_S]


async def test_local_and_durable_retries_happen_at_their_instants_until_the_message_is_parked(bus: Bus) -> None:
    policy = RetryPolicy(tries=2, interval_ms=1_000)
    seen = listen(bus, broken=True, local=policy, durable=RetryPolicy(tries=2, interval_ms=60_000))
    await send(bus, "bad")
    await bus.advance(DAY_S)
    assert seen.at == [0, 1, 61, 62]
    (kept,) = await bus.parked(QUEUE)
    assert kept.reason.startswith("RuntimeError: broken")
    assert await bus.parked(DEAD) == []
    await bus.drained()


async def test_a_message_expires_at_its_instant(bus: Bus) -> None:
    await send(bus, "brief", expires_ms=60_000)
    await bus.advance(59)
    assert (await bus.messages(QUEUE), await bus.messages(DEAD)) == ([Note("brief")], [])
    await bus.advance(1)
    assert (await bus.messages(QUEUE), await bus.messages(DEAD)) == ([], [Note("brief")])


async def test_a_queue_that_nobody_uses_is_removed_at_its_instant(bus: Bus) -> None:
    await bus.advance(59)
    assert await bus.messages("notes.brief") == []
    await bus.advance(2)
    with pytest.raises(InvalidInput, match=r"no queue 'notes\.brief'"):
        await bus.messages("notes.brief")


async def test_a_message_held_for_years_is_not_delivered_twice(bus: Bus) -> None:
    seen = Seen(bus)
    held: list[Incoming] = []

    async def hold(incoming: Incoming) -> None:
        await seen.plain(incoming)
        held.append(incoming)

    bus.listen(Listen(name="desk", queue=QUEUE, plain={Note: hold}, ack="manual"))
    await send(bus, "held")
    await bus.advance(3 * 365 * DAY_S)
    assert seen.texts == ["held"]
    await held[0].settle(ack(held[0].delivery))
    await bus.drained()


async def test_a_handler_that_sleeps_on_the_clock_goes_on_at_its_instant(bus: Bus) -> None:
    seen = Seen(bus)

    async def slow(incoming: Incoming) -> None:
        await bus.clock.sleep(90)
        await seen.plain(incoming)

    bus.listen(Listen(name="slow", queue=QUEUE, plain={Note: slow}))
    await send(bus, "slow")
    await bus.advance(89)
    assert seen.texts == []
    await bus.advance(1)
    assert seen.at == [90]


async def test_time_does_not_go_back(bus: Bus) -> None:
    with pytest.raises(InvalidInput, match="time does not go back"):
        await bus.advance(-1)


async def test_advance_within_a_transaction_is_refused_at_once(bus: Bus) -> None:
    async with bus.database.transaction():
        with pytest.raises(RuntimeError, match="already has a transaction open"):
            await bus.advance(1)


async def test_who_never_comes_to_rest_is_told_what_keeps_it(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "REST_S", 0.05)

    async def spin() -> None:
        while True:
            await SystemClock().sleep(0)

    async def hold() -> None:
        async with bus.database.transaction():
            await asyncio.Event().wait()

    for work, told in ((spin, "some task never waits"), (hold, "a transaction is open all the while")):
        task = asyncio.create_task(work())
        await SystemClock().sleep(0.01)
        with pytest.raises(AssertionError, match=told):
            await bus.idle()
        task.cancel()
        await asyncio.wait([task])
    await bus.idle()


async def test_two_tasks_may_wait_for_rest_at_once(bus: Bus) -> None:
    seen = listen(bus)
    await send(bus, "one")
    await asyncio.gather(bus.drained(), bus.idle(), bus.drained())
    assert seen.texts == ["one"]


def test_on_a_loop_that_does_not_show_what_is_ready() -> None:
    async def main() -> tuple[list[str], list[float]]:
        async with testing.bus(TYPES, TOPOLOGY) as bus:
            seen = listen(
                bus, broken=True, durable=RetryPolicy(tries=3, interval_ms=DAY_S * 1_000, interval_ms_max=1 << 40)
            )
            await send(bus, "bad")
            await bus.advance(7 * DAY_S)
            return [each.queue for each in await bus.parked()], seen.at

    assert uvloop.run(main()) == ([QUEUE], [0, DAY_S, 2 * DAY_S])


async def test_the_next_wake_forgets_who_was_cancelled() -> None:
    clock = ManualClock()
    assert clock.next_wake_us() is None
    first, second = asyncio.create_task(clock.sleep(1)), asyncio.create_task(clock.sleep(2))
    await SystemClock().sleep(0)
    assert clock.next_wake_us() == 1_000_000
    first.cancel()
    await asyncio.wait([first])
    assert clock.next_wake_us() == 2_000_000
    clock.advance(0.5)
    assert clock.next_wake_us() == 1_500_000
    second.cancel()


# -- drained ----------------------------------------------------------------------------------------------------------


async def test_drained_waits_for_a_handler_in_another_thread(bus: Bus) -> None:
    opened = threading.Event()
    done: list[str] = []

    async def elsewhere(incoming: Incoming) -> None:
        await asyncio.to_thread(opened.wait, 5)
        done.append(incoming.body.text)

    bus.listen(Listen(name="thread", queue=QUEUE, plain={Note: elsewhere}))
    await send(bus, "far")
    await bus.idle()
    assert done == []
    opened.set()
    await bus.drained()
    assert done == ["far"]


async def test_drained_names_the_queues_that_are_not(bus: Bus) -> None:
    await send(bus, "one", "two")
    await send(bus, "later", delay_ms=1)
    with pytest.raises(AssertionError, match=r"not drained within 0 s: notes\.work \(2 ready, 0 unacked\);"):
        await bus.drained(wait_s=0)


async def test_drained_counts_what_a_handler_holds_and_leaves_what_is_delayed(bus: Bus) -> None:
    listen(bus, broken=True, local=RetryPolicy(tries=2, interval_ms=1_000), durable=RetryPolicy(tries=9))
    await send(bus, "bad")
    with pytest.raises(AssertionError, match=r"notes\.work \(0 ready, 1 unacked\)"):
        await bus.drained(wait_s=0)
    await bus.advance(1)
    await bus.drained(wait_s=0)
    assert await bus.messages(QUEUE) == []
    assert await bus.messages(QUEUE, delayed=True) == [Note("bad")]


# -- looking ----------------------------------------------------------------------------------------------------------


async def test_published_tells_what_was_committed_in_order(bus: Bus) -> None:
    await send(bus, "one")
    async with bus.database.transaction() as tx:
        await bus.outbox.add(tx, "notes", "note.kept", Note("two"))
    with suppress(ZeroDivisionError):
        async with bus.database.transaction() as tx:
            await bus.outbox.add(tx, "notes", "note.undone", Note("never"))
            raise ZeroDivisionError
    (refused,) = await bus.publisher.publish_all([Draft(exchange="notes", routing_key="other", body=Note("nobody"))])
    assert refused is not None
    await send(bus, "three")
    assert bus.published == [
        ("notes", "note.written", Note("one")),
        ("notes", "note.kept", Note("two")),
        ("notes", "note.written", Note("three")),
    ]
    assert await bus.messages(QUEUE) == [Note("one"), Note("two"), Note("three")]


async def test_what_a_recoverer_sends_is_published_too(bus: Bus) -> None:
    seen = Seen(bus)
    recover = Republish(service="desk")
    bus.listen(Listen(name="desk", queue=QUEUE, plain={Note: seen.broken}, local=ONCE, durable=ONCE, recover=recover))
    await send(bus, "bad")
    await bus.idle()
    assert await bus.messages("desk.error.queue") == [Note("bad")]
    assert bus.published[-1] == ("error.direct", "desk", Note("bad"))


async def test_a_body_that_cannot_be_decoded_is_shown_as_bytes(bus: Bus) -> None:
    await send(bus, "sound")
    async with bus.database.transaction() as tx:
        await tx.execute(text("UPDATE hf_message SET body = :body"), {"body": b"{"})
    assert await bus.messages(QUEUE) == [b"{"]


async def test_two_buses_know_nothing_of_each_other(bus: Bus) -> None:
    async with testing.bus(TYPES, TOPOLOGY) as other:
        await send(other, "theirs")
        assert await other.messages(QUEUE) == [Note("theirs")]
        assert await bus.messages(QUEUE) == []
        assert bus.published == []


async def test_nothing_is_left_behind_and_the_start_is_quick() -> None:
    threads, tasks = set(threading.enumerate()), asyncio.all_tasks()
    began = time.process_time()
    async with testing.bus(TYPES, TOPOLOGY) as bus:
        assert time.process_time() - began < 0.3  # of work, whatever else the machine does
        listen(bus)
        await send(bus, "late", delay_ms=1_000)
        await bus.advance(0)
    assert asyncio.all_tasks() == tasks
    for thread in set(threading.enumerate()) - threads:
        thread.join(5)  # it was told to end and may be about to
        assert not thread.is_alive()


# -- faults -----------------------------------------------------------------------------------------------------------


async def test_a_dropped_message_was_confirmed_and_reaches_nobody(bus: Bus) -> None:
    bus.faults.drop(QUEUE, n=2)
    seen = listen(bus)
    await send(bus, "one", "two", "three")
    await bus.drained()
    assert seen.texts == ["three"]
    assert len(bus.published) == 3
    assert (await bus.parked(), bus.faults.left) == ([], {})


async def test_a_duplicate_comes_under_the_same_id_and_an_effect_happens_once(bus: Bus) -> None:
    bus.faults.duplicate(QUEUE)
    seen = listen(bus)
    await send(bus, "one", "two")
    await bus.drained()
    assert sorted(seen.texts) == ["one", "one", "two"]
    assert len(set(seen.ids)) == 2


async def test_the_inbox_drops_a_duplicate(bus: Bus) -> None:
    bus.faults.duplicate(QUEUE, n=3)
    seen = Seen(bus)
    bus.listen(Listen(name="books", queue=QUEUE, effects={Note: seen.effect}))
    await send(bus, "one", "two", "three")
    await bus.drained()
    assert sorted(seen.texts) == ["one", "three", "two"]
    assert bus.faults.left == {}


async def test_reordered_messages_come_last_one_first_however_they_arrive(bus: Bus) -> None:
    bus.faults.reorder(QUEUE, n=3)
    seen = listen(bus)
    await send(bus, "one", "two")
    await bus.idle()
    assert seen.texts == []
    await send(bus, "three", "four")
    await bus.drained()
    assert seen.texts == ["three", "two", "one", "four"]


async def test_what_waits_to_be_reordered_goes_back_when_the_listener_stops(bus: Bus) -> None:
    bus.faults.reorder(QUEUE)
    seen = listen(bus)
    await send(bus, "alone")
    await bus.idle()
    assert await bus.messages(QUEUE) == []
    await bus.stop_listeners()
    assert seen.texts == []
    assert await bus.messages(QUEUE) == [Note("alone")]


async def test_reordering_holds_no_more_than_the_listener_takes(bus: Bus) -> None:
    bus.faults.reorder(QUEUE, n=5)
    seen = Seen(bus)
    bus.listen(Listen(name="desk", queue=QUEUE, plain={Note: seen.plain}, prefetch=2))
    await send(bus, "one", "two")
    await bus.drained()
    assert seen.texts == ["two", "one"]


async def test_a_scripted_failure_comes_before_the_handler_and_is_retried(bus: Bus) -> None:
    bus.faults.fail(QUEUE, times=3, error=ConnectionError("the bank is away"))
    seen = listen(bus, local=RetryPolicy(tries=2, interval_ms=1_000), durable=RetryPolicy(tries=2, interval_ms=60_000))
    await send(bus, "pay")
    await bus.advance(60)
    assert (seen.texts, bus.faults.left) == ([], {QUEUE: {"fail": 1}})
    await bus.advance(2)
    assert (seen.at, bus.faults.left) == ([62], {})


async def test_a_scripted_failure_of_an_effect_hits_one_message_of_a_batch(bus: Bus) -> None:
    bus.faults.fail(QUEUE)
    seen = Seen(bus)
    await send(bus, "one", "two", "three")
    bus.listen(Listen(name="books", queue=QUEUE, effects={Note: seen.effect}, local=ONCE, durable=ONCE))
    await bus.idle()
    assert seen.texts == ["two", "three"]
    assert [each.body for each in await bus.parked()] == [b'{"text":"one"}']


async def test_a_failure_that_outlasts_all_tries_is_parked_under_its_name(bus: Bus) -> None:
    bus.faults.fail(QUEUE)
    listen(bus)
    await send(bus, "bad")
    await bus.drained()
    (kept,) = await bus.parked()
    assert kept.error.endswith(ScriptedFailure.__name__)


async def test_a_failure_in_the_mode_none_loses_the_message(bus: Bus) -> None:
    bus.faults.fail(QUEUE)
    seen = Seen(bus)
    bus.listen(Listen(name="lax", queue=QUEUE, plain={Note: seen.plain}, ack="none"))
    await send(bus, "lost", "kept")
    await bus.drained()
    assert seen.texts == ["kept"]


async def test_faults_of_one_queue_leave_others_alone(bus: Bus) -> None:
    bus.faults.drop("desk.error.queue")
    seen = listen(bus)
    await send(bus, "one")
    await bus.drained()
    assert seen.texts == ["one"]
    assert bus.faults.left == {"desk.error.queue": {"drop": 1}}


async def test_a_script_of_nothing_is_refused(bus: Bus) -> None:
    with pytest.raises(InvalidInput, match="n is at least 1, not 0"):
        bus.faults.drop(QUEUE, n=0)
    with pytest.raises(InvalidInput, match="n is at least 1, not -1"):
        bus.faults.duplicate(QUEUE, n=-1)
    with pytest.raises(InvalidInput, match="two messages or more, not 1"):
        bus.faults.reorder(QUEUE, n=1)
    with pytest.raises(InvalidInput, match="times is at least 1, not 0"):
        bus.faults.fail(QUEUE, times=0)
    assert bus.faults.left == {}
