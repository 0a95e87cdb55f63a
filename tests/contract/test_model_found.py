"""What the random walk of test_model.py found, each as short as it gets."""

from __future__ import annotations

import asyncio

from holdfast.bootstrap import System
from holdfast.clock import ManualClock
from holdfast.errors import PublishRejected
from holdfast.messaging.topology import Queue, Topology
from holdfast.settings import Settings
from tests.conftest import StartSystem
from tests.contract.notes import (
    counts,
    manual_clock,
    note,
    office,
    pass_time,
    send,
    take,
    texts,
    turn,
    vanish,
    with_messaging,
)

LEASE_S = 30


async def opened_with(start_system: StartSystem, settings: Settings, queue: Queue) -> tuple[System, ManualClock]:
    clock = manual_clock()
    system = await office(start_system, with_messaging(settings, lease_ms=LEASE_S * 1_000), clock=clock)
    await system.transport.declare(Topology(queues=[queue]))
    return system, clock


async def test_what_a_leaving_consumer_gives_back_stands_where_it_was(
    start_system: StartSystem, settings: Settings
) -> None:
    system, clock = await opened_with(start_system, settings, Queue(name="q"))
    await send(system, "a", "b", exchange="", key="q")
    await pass_time(system, clock, 1)
    async with system.transport.subscribe("q", prefetch=1) as leaving:
        await take(leaving)
    async with system.transport.subscribe("q", prefetch=1) as next_one:
        assert texts(await take(next_one)) == ["a"]


async def test_a_delayed_message_takes_no_room_from_the_next_in_its_batch(
    start_system: StartSystem, settings: Settings
) -> None:
    system, _ = await opened_with(start_system, settings, Queue(name="q", max_length=1, overflow="reject-publish"))
    later, now, more = (note(system, exchange="", key="q", delay_ms=delay_ms) for delay_ms in (60_000, 0, 0))
    told = await system.transport.publish([later, now, more])
    assert [type(each) for each in told] == [type(None), type(None), PublishRejected]
    assert await counts(system, "q") == (1, 0, 1)


async def test_what_a_dead_consumer_held_counts_for_the_length_once_its_lease_ended(
    start_system: StartSystem, settings: Settings
) -> None:
    system, clock = await opened_with(start_system, settings, Queue(name="q", max_length=1))
    await send(system, "a", exchange="", key="q")
    dead = system.transport.subscribe("q", prefetch=1)
    await dead.__aenter__()
    await take(dead)
    vanish(dead)
    await pass_time(system, clock, LEASE_S)
    await send(system, "b", exchange="", key="q")
    assert await counts(system, "q") == (1, 0, 0)


async def test_an_active_consumer_that_is_busy_for_longer_than_a_lease_stays_the_active_one(
    start_system: StartSystem, settings: Settings
) -> None:
    system, clock = await opened_with(start_system, settings, Queue(name="q", single_active_consumer=True))
    await send(system, "a", "b", exchange="", key="q")
    async with (
        system.transport.subscribe("q", prefetch=1) as busy,
        system.transport.subscribe("q", prefetch=1) as standby,
    ):
        assert texts(await take(busy)) == ["a"]
        taking = asyncio.create_task(take(standby))
        for _ in range(9):
            await pass_time(system, clock, LEASE_S / 3)
        assert await counts(system, "q") == (1, 1, 0)
        assert not taking.done()
        taking.cancel()
        await asyncio.wait([taking])
        await turn(system)
