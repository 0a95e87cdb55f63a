"""Pending messages listed, and moved to another instant in the caller's transaction."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.bootstrap import System
from holdfast.clock import US_PER_S
from holdfast.errors import InvalidInput
from holdfast.messaging.draft import DELAY_MS_MAX
from holdfast.messaging.injection import Incoming
from holdfast.messaging.listen import Listen
from holdfast.messaging.message import ack, retry
from tests.conftest import StartSystem
from tests.contract.notes import (
    EXCHANGE,
    KEY,
    QUEUE,
    Note,
    counts,
    manual_clock,
    office,
    pass_time,
    rolled_back,
    send,
    take,
    texts,
    turn,
)

LATER_MS = 60_000


async def moved(system: System, *keys: str, **when: int) -> int:
    async with system.database.transaction() as tx:
        return await system.outbox.move(tx, *keys, **when)


async def test_what_is_moved_sooner_wakes_who_waits_for_it(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await send(system, "moved", delay_ms=LATER_MS, cancel_key="order-1")
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        waiting = asyncio.create_task(take(subscription))
        await turn(system)
        assert await moved(system, "order-1", delay_ms=1_000) == 1
        await pass_time(system, clock, 0.999_999)
        assert not waiting.done()
        await pass_time(system, clock, 0.000_001)
        assert texts(await waiting) == ["moved"]


async def test_what_is_moved_later_comes_then_and_not_before(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await send(system, "moved", delay_ms=1_000, cancel_key="order-1")
    await send(system, "stays", delay_ms=1_000, cancel_key="order-2")
    assert await moved(system, "order-1", due_us=clock.now_us() + 10 * US_PER_S) == 1
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        waiting = asyncio.create_task(take(subscription, 2))
        await pass_time(system, clock, 9.999_999)
        assert await counts(system) == (0, 1, 1)
        await pass_time(system, clock, 0.000_001)
        assert texts(await waiting) == ["stays", "moved"]


async def test_a_move_to_an_instant_that_has_passed_is_now(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await send(system, "moved", delay_ms=LATER_MS, cancel_key="order-1")
    assert await moved(system, "order-1", due_us=0) == 1
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        assert texts(await take(subscription)) == ["moved"]


async def test_a_move_takes_many_keys_and_all_messages_of_a_key(start_system: StartSystem) -> None:
    system = await office(start_system, clock=manual_clock())
    for key in ("a", "a", "b", "c"):
        await send(system, key, delay_ms=LATER_MS, cancel_key=key)
    assert await moved(system) == 0
    assert await moved(system, "a", "b", "unknown", "a") == 3
    assert await counts(system) == (3, 0, 1)


async def test_a_move_that_is_rolled_back_changes_nothing(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await send(system, "stays", delay_ms=1_000, cancel_key="order-1")
    async with rolled_back(system) as tx:
        assert await system.outbox.move(tx, "order-1", delay_ms=LATER_MS) == 1
    await pass_time(system, clock, 1)
    assert await counts(system) == (1, 0, 0)


async def test_how_long_it_may_wait_in_its_queue_counts_from_the_new_instant(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await system.publisher.publish(EXCHANGE, KEY, Note("kept"), expires_ms=5_000, message_id="kept")
    async with system.database.transaction() as tx:
        await system.outbox.add(
            tx, EXCHANGE, KEY, Note("moved"), delay_ms=1_000, expires_ms=5_000, cancel_key="order-1"
        )
    assert await moved(system, "order-1", delay_ms=10_000) == 1
    await pass_time(system, clock, 14.999_999)
    assert await counts(system) == (1, 0, 0)  # the other one is long gone
    await pass_time(system, clock, 0.000_001)
    assert await counts(system) == (0, 0, 0)


async def test_what_was_delivered_before_is_not_moved(start_system: StartSystem) -> None:
    """It is being handled, or waits for its retry, whose instant is the listener's to choose."""
    system = await office(start_system, clock=manual_clock())
    await send(system, "held", "put back", cancel_key="order-1")
    async with system.transport.subscribe(QUEUE, prefetch=2) as subscription:
        held, put_back = await take(subscription, 2)
        await subscription.settle([retry(put_back, 5_000)])
        assert await moved(system, "order-1", delay_ms=LATER_MS) == 0
        assert await counts(system) == (0, 1, 1)
        await subscription.settle([ack(held)])


@pytest.mark.parametrize("delay_ms", [-1, DELAY_MS_MAX + 1])
async def test_a_delay_no_message_may_have_is_refused(start_system: StartSystem, delay_ms: int) -> None:
    system = await office(start_system, clock=manual_clock())
    await send(system, "stays", delay_ms=1_000, cancel_key="order-1")
    with pytest.raises(InvalidInput, match=f"not {delay_ms}"):
        await moved(system, "order-1", delay_ms=delay_ms)
    assert await counts(system) == (0, 0, 1)


async def test_a_move_and_a_consumer_do_not_both_have_a_message(start_system: StartSystem) -> None:
    """Moving and taking at once: each message is delivered once, at its old instant or at its new one."""
    system = await office(start_system)
    got: list[str] = []

    async def handle(incoming: Incoming) -> None:
        got.append(incoming.body.text)

    for number in range(20):
        await send(system, str(number), delay_ms=1, cancel_key="all")
    system.listen(Listen(name="taker", queue=QUEUE, plain={Note: handle}, prefetch=1))
    for _ in range(10):
        await moved(system, "all", delay_ms=5)
    while len(got) < 20:
        await turn(system)
    assert sorted(got, key=int) == [str(number) for number in range(20)]


# -- listing ----------------------------------------------------------------------------------------------------------


async def test_pending_messages_are_listed_soonest_first_by_queue_or_key(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await send(system, "ready")
    await send(system, "second", delay_ms=2_000, cancel_key="order-1")
    await send(system, "first", delay_ms=1_000)
    listed = await system.transport.pending(queue=QUEUE)
    assert [(each.due_us - clock.now_us(), each.cancel_key, each.state) for each in listed] == [
        (1 * US_PER_S, None, "delayed"),
        (2 * US_PER_S, "order-1", "delayed"),
    ]
    assert [each.cancel_key for each in await system.transport.pending(cancel_key="order-1")] == ["order-1"]
    assert len(await system.transport.pending(queue=QUEUE, limit=1)) == 1
    assert await system.transport.pending(queue=QUEUE, cancel_key="other") == []
    with pytest.raises(InvalidInput, match="name a queue, a cancel key"):
        await system.transport.pending()
