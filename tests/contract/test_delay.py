"""Delays of any length: never early, on time, not held up by each other, and cancelable in the caller's transaction."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.errors import InvalidInput
from holdfast.messaging.draft import DELAY_MS_MAX, Draft
from holdfast.messaging.message import ack
from holdfast.settings import Settings
from tests.conftest import StartSystem
from tests.contract.notes import (
    EXCHANGE,
    KEY,
    QUEUE,
    Note,
    Reader,
    counts,
    counts_become,
    manual_clock,
    note,
    office,
    opened,
    pass_time,
    publish,
    read,
    rolled_back,
    send,
    take,
    texts,
    turn,
    with_messaging,
)

DAY_S = 86_400


async def test_a_delayed_message_is_never_early_and_comes_on_time(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        await send(system, "later", delay_ms=60_000)
        waiting = asyncio.create_task(take(subscription))
        await pass_time(system, clock, 59.999_999)
        assert await counts(system) == (0, 0, 1)
        assert not waiting.done()
        await pass_time(system, clock, 0.000_001)
        assert texts(await waiting) == ["later"]


async def test_a_delay_keeps_its_time_by_the_system_clock(start_system: StartSystem, settings: Settings) -> None:
    system = await office(start_system, with_messaging(settings, poll_ms=60_000))
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        waiting = asyncio.create_task(take(subscription))
        await turn(system)
        sent_us = system.clock.now_us()
        await send(system, "later", delay_ms=400)
        await waiting
        assert 400_000 <= system.clock.now_us() - sent_us < 2_400_000


async def test_a_short_delay_is_not_held_up_by_a_longer_one(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        await send(system, "60 s", delay_ms=60_000)
        await send(system, "1 s", delay_ms=1_000)
        waiting = asyncio.create_task(take(subscription))
        await pass_time(system, clock, 1)
        (first,) = await waiting
        assert read(first) == "1 s"
        await subscription.settle([ack(first)])
        assert await counts(system) == (0, 0, 1)
        await pass_time(system, clock, 59)
        assert texts(await take(subscription)) == ["60 s"]


async def test_mixed_delays_each_come_at_their_instant(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    delays_s = [7, 3, 9, 1, 8, 2, 5, 4, 10, 6]
    await publish(system, [note(system, str(delay), delay_ms=delay * 1_000) for delay in delays_s])
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        for second in range(1, 11):
            await pass_time(system, clock, 1)
            assert await counts(system) == (1, second - 1, 10 - second)
            assert texts(await take(subscription)) == [str(second)]


@pytest.mark.parametrize("prefetch", [1, 10])
async def test_what_became_due_while_nobody_listened_comes_in_order_of_its_instant(
    start_system: StartSystem, prefetch: int
) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await send(system, "due third", delay_ms=3_000)
    await send(system, "due second", delay_ms=2_000)
    await send(system, "due first", delay_ms=1_000)
    await pass_time(system, clock, 10)
    async with system.transport.subscribe(QUEUE, prefetch=prefetch) as subscription:
        got: list[str] = []
        while len(got) < 3:
            deliveries = await subscription.take()
            got += texts(deliveries)
            await subscription.settle([ack(each) for each in deliveries])
    assert got == ["due first", "due second", "due third"]


async def test_a_long_delay_survives_a_restart(settings: Settings) -> None:
    clock = manual_clock()
    async with opened(settings, clock) as system:
        await send(system, "in a year", delay_ms=365 * DAY_S * 1_000)
    clock.advance(364 * DAY_S)
    async with opened(settings, clock) as system, system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        assert await counts(system) == (0, 0, 1)
        await pass_time(system, clock, DAY_S)
        assert texts(await take(subscription)) == ["in a year"]


async def test_a_deadline_as_an_instant_is_kept_and_one_in_the_past_is_due_now(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    now_us = clock.now_us()
    drafts = [
        Draft(exchange=EXCHANGE, routing_key=KEY, body=Note("at 1.5 ms"), due_us=now_us + 1_500),
        Draft(exchange=EXCHANGE, routing_key=KEY, body=Note("past"), due_us=now_us - 1),
    ]
    async with system.database.transaction() as tx:
        await system.outbox.add_all(tx, drafts)
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        assert texts(await take(subscription)) == ["past"]
        await pass_time(system, clock, 0.001_499)
        assert (await counts(system))[2] == 1
        await pass_time(system, clock, 0.000_501)  # milliseconds are rounded up, so that nothing is early
        assert texts(await take(subscription)) == ["at 1.5 ms"]


@pytest.mark.parametrize("delay_ms", [-1, DELAY_MS_MAX + 1])
async def test_an_impossible_delay_is_refused(start_system: StartSystem, delay_ms: int) -> None:
    system = await office(start_system)
    with pytest.raises(InvalidInput):
        await system.publisher.publish(EXCHANGE, KEY, Note("never"), delay_ms=delay_ms)
    with pytest.raises(InvalidInput):
        async with system.database.transaction() as tx:
            await system.outbox.add(tx, EXCHANGE, KEY, Note("never"), delay_ms=delay_ms)
    assert await counts(system) == (0, 0, 0)


async def test_the_longest_delay_is_stored(start_system: StartSystem) -> None:
    system = await office(start_system)
    await system.publisher.publish(EXCHANGE, KEY, Note("in a century"), delay_ms=DELAY_MS_MAX)
    assert await counts(system) == (0, 0, 1)


# -- cancel -----------------------------------------------------------------------------------------------------------


async def test_cancel_removes_a_pending_message_with_the_commit(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await send(system, "cancelled", delay_ms=1_000, cancel_key="order-1")
    await send(system, "other key", delay_ms=1_000, cancel_key="order-2")
    await send(system, "no key", delay_ms=1_000)
    async with system.database.transaction() as tx:
        assert await system.outbox.cancel(tx, "order-1") == 1
    assert await counts(system) == (0, 0, 2)
    await pass_time(system, clock, 1)
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        assert texts(await take(subscription, 2)) == ["other key", "no key"]


async def test_cancel_takes_many_keys_and_all_messages_of_a_key(start_system: StartSystem) -> None:
    system = await office(start_system)
    for key in ("a", "a", "b", "c"):
        await send(system, key, delay_ms=60_000, cancel_key=key)
    async with system.database.transaction() as tx:
        assert await system.outbox.cancel(tx) == 0
        assert await system.outbox.cancel(tx, "a", "b", "unknown", "a") == 3
        assert await system.outbox.cancel(tx, "a") == 0
    assert await counts(system) == (0, 0, 1)


async def test_a_message_can_be_cancelled_in_the_transaction_that_added_it(start_system: StartSystem) -> None:
    system = await office(start_system)
    async with system.database.transaction() as tx:
        await system.outbox.add(tx, EXCHANGE, KEY, Note("never"), delay_ms=1_000, cancel_key="order-1")
        assert await system.outbox.cancel(tx, "order-1") == 1
    assert await counts(system) == (0, 0, 0)


async def test_a_cancel_that_is_rolled_back_keeps_the_message(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await send(system, "kept", delay_ms=1_000, cancel_key="order-1")
    async with rolled_back(system) as tx:
        assert await system.outbox.cancel(tx, "order-1") == 1
    await pass_time(system, clock, 1)
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        assert texts(await take(subscription)) == ["kept"]


async def test_cancel_of_a_delivered_message_does_nothing(start_system: StartSystem) -> None:
    system = await office(start_system)
    await send(system, "under way", cancel_key="order-1")
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        (delivery,) = await take(subscription)
        async with system.database.transaction() as tx:
            assert await system.outbox.cancel(tx, "order-1") == 0
        assert await counts(system) == (0, 1, 0)
        await subscription.settle([ack(delivery)])
    async with system.database.transaction() as tx:
        assert await system.outbox.cancel(tx, "order-1") == 0


async def test_cancel_does_not_wait_for_a_consumer_and_one_of_them_wins(start_system: StartSystem) -> None:
    """Cancelling and taking at once: each message is either cancelled or delivered, never both, never neither."""
    system = await office(start_system)
    keys = [f"order-{number}" for number in range(60)]
    await publish(system, [note(system, key, cancel_key=key) for key in keys])
    readers = [Reader(system) for _ in range(2)]
    cancelled = 0
    for start in range(0, len(keys), 3):
        async with system.database.transaction() as tx:
            cancelled += await system.outbox.cancel(tx, *keys[start : start + 3])
    await counts_become(system, (0, 0, 0))
    for reader in readers:
        await reader.stop()
    delivered = [body for reader in readers for body in reader.got]
    assert cancelled + len(delivered) == len(keys)
    assert len(set(delivered)) == len(delivered)
