"""Gauges of the queues: the database's counts, asked for seldom, never waited for long, gone when they are old."""

from __future__ import annotations

from contextlib import AsyncExitStack

from sqlalchemy import delete, text

from holdfast import observe
from holdfast.bootstrap import System
from holdfast.clock import US_PER_S, ManualClock
from holdfast.messaging.message import park
from holdfast.messaging.tables import queues
from holdfast.messaging.topology import Queue, Topology
from holdfast.messaging.transports.sql import insight
from holdfast.settings import Settings
from tests.conftest import WAIT_S, StartSystem
from tests.contract.notes import QUEUE, manual_clock, office, opened, send, take

EMPTY = {"ready": 0.0, "unacked": 0.0, "delayed": 0.0, "parked": 0.0}
MINE = "gauges.mine"  # a queue that no other test has


def counted(queue: str = QUEUE) -> dict[str, float] | None:
    """The queue's gauges by state; None when there are none."""
    found = {
        state: observe.registry.get_sample_value("holdfast_queue_messages", {"queue": queue, "state": state})
        for state in EMPTY
    }
    told = {state: value for state, value in found.items() if value is not None}
    assert len(told) in (0, len(EMPTY)), told
    return told or None


def oldest_s(queue: str = QUEUE) -> float | None:
    return observe.registry.get_sample_value("holdfast_queue_oldest_age_seconds", {"queue": queue})


async def clocked(start_system: StartSystem) -> tuple[System, ManualClock]:
    clock = manual_clock()
    return await office(start_system, clock=clock), clock


async def test_gauges_say_what_is_in_the_queues_and_how_old_it_is(start_system: StartSystem) -> None:
    system, clock = await clocked(start_system)
    await send(system, "given up", "held", "held too")
    async with system.transport.subscribe(QUEUE, prefetch=3) as subscription:
        first, *_ = await take(subscription, 3)
        await subscription.settle([park(first, "no")])
        await send(system, "1", "2", "3", "4")
        clock.advance(0.5)
        await send(system, "later", "later", "later", delay_ms=3_600_000)
        await send(system, "5")
        assert await system.messaging.observe_queues()
        assert counted() == {"ready": 5, "unacked": 2, "delayed": 3, "parked": 1}
        assert oldest_s() == 0.5
        at_s = observe.registry.get_sample_value("holdfast_queues_counted_timestamp_seconds")
        assert at_s == clock.now_us() / US_PER_S


async def test_a_queue_without_messages_is_told_as_empty(start_system: StartSystem) -> None:
    system, _ = await clocked(start_system)
    await send(system, "later", delay_ms=1_000)
    await system.transport.declare(Topology(queues=[Queue(name=MINE)]))
    assert await system.messaging.observe_queues()
    assert (counted(MINE), oldest_s(MINE)) == (EMPTY, 0.0)
    assert oldest_s() == 0.0  # what is not due does not wait yet


async def test_the_database_is_asked_every_five_seconds_at_most(start_system: StartSystem) -> None:
    system, clock = await clocked(start_system)
    assert await system.messaging.observe_queues()
    await send(system, "1")
    clock.advance(4.9)
    assert await system.messaging.observe_queues()
    assert counted() == EMPTY
    clock.advance(0.1)
    assert await system.messaging.observe_queues()
    assert counted() == EMPTY | {"ready": 1.0}


async def test_a_queue_that_vanished_has_no_gauges(start_system: StartSystem) -> None:
    system, clock = await clocked(start_system)
    await system.transport.declare(Topology(queues=[Queue(name=MINE)]))
    assert await system.messaging.observe_queues()
    assert counted(MINE) == EMPTY
    async with system.database.transaction() as tx:
        await tx.execute(delete(queues).where(queues.c.name == MINE))
    clock.advance(5)
    assert await system.messaging.observe_queues()
    assert (counted(MINE), oldest_s(MINE)) == (None, None)
    assert counted() == EMPTY


async def test_a_database_that_does_not_answer_holds_up_nobody_and_old_counts_go(start_system: StartSystem) -> None:
    system, clock = await clocked(start_system)
    bus = system.messaging
    assert await bus.observe_queues()
    async with AsyncExitStack() as all_connections:
        limits = system.settings.database
        for _ in range(limits.readers if system.database.dialect == "sqlite" else limits.pool_size):
            await all_connections.enter_async_context(system.database.read())
        clock.advance(5)
        assert not await bus.queue_gauges.refresh(wait_s=0.01)
        assert counted() == EMPTY  # the last that is known, and of when it is stands beside it
        assert not await bus.queue_gauges.refresh(wait_s=0.01)  # waits for the same count: there is only one
        clock.advance(56)
        assert not await bus.queue_gauges.refresh(wait_s=0.01)
        assert (counted(), oldest_s()) == (None, None)
    await bus.queue_gauges.refresh(wait_s=WAIT_S)  # the count that waited all the while
    clock.advance(5)
    assert await bus.queue_gauges.refresh(wait_s=WAIT_S)
    assert counted() == EMPTY


async def test_a_count_that_fails_ends_no_scrape_and_the_next_one_is_tried(start_system: StartSystem) -> None:
    system, clock = await clocked(start_system)
    rename = "ALTER TABLE {} RENAME TO {}"
    async with system.database.transaction() as tx:
        await tx.execute(text(rename.format("hf_parked", "hf_away")))
    assert not await system.messaging.observe_queues()
    assert counted() is None
    async with system.database.transaction() as tx:
        await tx.execute(text(rename.format("hf_away", "hf_parked")))
    assert not await system.messaging.observe_queues()  # not again at once
    clock.advance(5)
    assert await system.messaging.observe_queues()
    assert counted() == EMPTY


async def test_the_gauges_go_with_the_toolkit(settings: Settings) -> None:
    async with opened(settings) as system:
        assert await system.messaging.observe_queues()
        assert counted() == EMPTY
    assert (counted(), oldest_s()) == (None, None)


async def test_what_is_delivered_is_counted_by_queue(start_system: StartSystem) -> None:
    def delivered() -> float:
        return observe.registry.get_sample_value("holdfast_messages_delivered_total", {"queue": QUEUE}) or 0.0

    system = await office(start_system)
    before = delivered()
    await send(system, "1", "2", "3")
    async with system.transport.subscribe(QUEUE, prefetch=2) as subscription:
        await take(subscription, 2)
    assert delivered() - before == 2


async def test_counting_reads_the_index_and_no_row(start_system: StartSystem) -> None:
    """A million delayed messages are counted at each scrape: their bodies must not be read for it."""
    system = await office(start_system)
    await send(system, *map(str, range(20)))
    counting = str(insight.counting(system.clock.now_us()).compile(compile_kwargs={"literal_binds": True}))
    async with system.database.read(snapshot=True) as tx:
        if tx.dialect == "sqlite":
            lines = [row.detail for row in await tx.execute(text(f"EXPLAIN QUERY PLAN {counting}"))]
            assert lines == ["SCAN hf_message USING COVERING INDEX ix_hf_message_ready"]
            return
        # So few rows are read from the table sooner; what is asked here is whether the index could do without it.
        for way in ("seqscan", "bitmapscan", "indexscan"):
            await tx.execute(text(f"SET LOCAL enable_{way} = off"))
        await tx.execute(text("SET LOCAL enable_indexonlyscan = on"))
        lines = [row[0] for row in await tx.execute(text(f"EXPLAIN (COSTS OFF) {counting}"))]
        assert any("Index Only Scan using ix_hf_message_ready" in line for line in lines), lines


def test_growth_is_what_came_less_what_went() -> None:
    def view(queue: str, ready: int, delayed: int = 0) -> insight.QueueView:
        return insight.QueueView(queue=queue, ready=ready, unacked=1, delayed=delayed, parked=9, oldest_s=2.0)

    before = [view("steady", 10, 5), view("draining", 100), view("gone", 3)]
    after = [view("draining", 50), view("new", 3), view("steady", 5, 10)]
    told = insight.growth(before, after, 2.0)
    assert [(each.queue, each.growth_per_s) for each in told] == [("draining", -25.0), ("new", 2.0), ("steady", 0.0)]
    assert (told[0].ready, told[0].parked, told[0].oldest_s) == (50, 9, 2.0)
