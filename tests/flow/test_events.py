"""The event feed: what happened, once each, in an order that no reader can lose his place in."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
import pytest

from holdfast.bootstrap import System
from holdfast.clock import US_PER_S, ManualClock
from holdfast.errors import InvalidInput
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import OrderClosed, OrderCreated, OrderPaid, PaymentSucceeded
from holdfast.services.feed import store
from holdfast.services.feed.actions import Feed, Told
from holdfast.services.feed.model import EventsExpired, EventView
from holdfast.services.orders.model import OrderStatus
from holdfast.settings import EventsSettings, Settings
from tests.conftest import StartSystem, eventually
from tests.shop import NOON_US, becomes, deliver, order, pay, pay_at_sandbox, rows, stock_up, two_systems

DAY_S = 86_400


class Nobody:
    """Follows nothing, and knows no buyers."""

    async def fan_out(self, tx: object, events: object) -> None:
        return None

    async def buyers(self, tx: object, order_ids: object) -> dict[int, str]:
        return {}


async def events_of(system: System, owner: str | None = None) -> list[EventView]:
    return (await system.events.read(owner=owner, limit=500)).events


async def become(system: System, wanted: Sequence[str], owner: str | None = None) -> list[EventView]:
    """Wait until the feed has events of these types and no others, in whatever order."""

    async def reached() -> bool:
        return sorted(each.type for each in await events_of(system, owner)) == sorted(wanted)

    await eventually(reached, f"the feed tells of {wanted}")
    return await events_of(system, owner)


async def test_an_order_is_told_from_its_placing_to_its_end(system: System) -> None:
    await stock_up(system, "SKU-1", 5)
    paid, cancelled = await order(system, "ann", quantity=2), await order(system, "bob")
    await pay(system, paid)
    await becomes(system, paid, OrderStatus.PAID)
    await system.orders.cancel(int(cancelled.id), "bob")

    anns = await become(system, ["order.created", "payment.succeeded", "order.paid"], "ann")
    bobs = await become(system, ["order.created", "order.closed"], "bob")
    everything = await events_of(system)
    assert sorted((*anns, *bobs), key=lambda each: int(each.id)) == everything
    ids = [int(each.id) for each in everything]
    assert ids == sorted(set(ids))

    created = next(each for each in anns if each.type == "order.created")
    assert created.data["orderId"] == paid.id
    assert created.data["lines"] == [{"sku": "SKU-1", "quantity": 2}]
    assert created.data["payBy"].endswith("Z")
    closed = next(each for each in bobs if each.type == "order.closed")
    assert closed.data == {"orderId": cancelled.id, "status": "cancelled"}
    assert not {"payByUs", "capturedUs"} & {name for each in everything for name in each.data}


async def test_what_is_told_twice_stands_there_once(system: System) -> None:
    await stock_up(system, "SKU-1", 5)
    view = await order(system)
    notice = await pay_at_sandbox(system, view)
    await deliver(system, notice)
    await becomes(system, view, OrderStatus.PAID)
    for _ in range(3):  # payments tell again of what nobody took charge of, each time in a message of its own
        succeeded = PaymentSucceeded(
            payment_id=int(view.payment.id), order_id=int(view.id), amount_minor=1, currency="CNY", captured_us=1
        )
        await system.publisher.publish(topology.PAY, topology.KEY_PAY_SUCCESS, succeeded)
        await system.publisher.publish(
            topology.ORDER_EVENTS, topology.KEY_ORDER_PAID, OrderPaid(order_id=int(view.id), payment_id=1)
        )

    async def settled() -> bool:
        return (await system.transport.stats(topology.FEED_QUEUE)).total == 0

    await eventually(settled, "the feed has read everything")
    await become(system, ["order.created", "order.paid", "payment.succeeded"])


async def test_pages_follow_each_other_without_a_gap(system: System) -> None:
    await stock_up(system, "SKU-1", 50)
    await asyncio.gather(*(order(system, f"buyer-{number}") for number in range(12)))
    everything = await become(system, ["order.created"] * 12)
    seen: list[EventView] = []
    after, more = 0, True
    while more:
        page = await system.events.read(after=after, limit=5)
        assert len(page.events) <= 5
        seen += page.events
        after, more = int(page.next), page.more
    assert seen == everything

    empty = await system.events.read(after=after)
    assert (empty.events, empty.next, empty.more) == ([], str(after), False)
    # Who asks for what does not happen goes on all the same.
    filtered = await system.events.read(types=["order.closed"])
    assert (filtered.events, int(filtered.next)) == ([], after)
    ahead = await system.events.read(after=after + 1_000)
    assert (ahead.events, ahead.next) == ([], str(after + 1_000))
    for wrong in ({"limit": 0}, {"limit": 501}, {"types": ["order.due"]}, {"types": ["order"]}):
        with pytest.raises(InvalidInput):
            await system.events.read(**wrong)


async def test_no_reader_misses_an_event_that_commits_late(start_system: StartSystem, settings: Settings) -> None:
    """Two processes write, a transaction that began first commits last, a reader asks all the time."""
    systems = await two_systems(start_system, settings, work=False)
    feeds = [Feed(system.clock, Nobody(), Nobody()) for system in systems]
    total, seen, done = 60, [], asyncio.Event()

    async def write(number: int) -> None:
        system, feed = systems[number % len(systems)], feeds[number % len(feeds)]
        fact = OrderClosed(order_id=number + 1, status="closed")
        async with system.database.transaction() as tx:
            await feed.record(tx, [Told(fact=fact, at_us=number)])
            if number % 3 == 0:  # so that it commits long after it has its id
                await system.clock.sleep(0.01)
            if number % 7 == 0:
                raise Withdrawn

    async def read() -> None:
        after = 0
        while True:
            finished = done.is_set()
            page = await systems[-1].events.read(after=after, limit=3)
            ids = [int(each.id) for each in page.events]
            assert ids == sorted(ids)
            assert all(each > after for each in ids)
            seen.extend(page.events)
            after = int(page.next)
            if finished and not page.more:
                return

    reader = asyncio.create_task(read())
    outcomes = await asyncio.gather(*(write(number) for number in range(total)), return_exceptions=True)
    done.set()
    await reader
    assert sum(isinstance(each, Withdrawn) for each in outcomes) == len(range(0, total, 7))
    assert all(each is None or isinstance(each, Withdrawn) for each in outcomes)
    wanted = {str(number + 1) for number in range(total) if number % 7}
    assert {each.data["orderId"] for each in seen} == wanted
    assert len(seen) == len(wanted)
    assert [each.id for each in seen] == [each.id for each in await events_of(systems[0])]


class Withdrawn(Exception):
    """Raised in a transaction that is to be rolled back."""


async def test_a_counter_is_held_until_the_commit(start_system: StartSystem, settings: Settings) -> None:
    """The proof of the order: whoever comes second gets his ids when the first one's are there to be read."""
    systems = await two_systems(start_system, settings, work=False)
    began = asyncio.Event()

    async def second() -> int:
        await began.wait()
        async with systems[-1].database.transaction() as tx:
            return await store.take_ids(tx, 1)

    late = asyncio.create_task(second())
    async with systems[0].database.transaction() as tx:
        first = await store.take_ids(tx, 4)
        began.set()
        await systems[0].clock.sleep(0.05)
        assert not late.done()
    assert await late == first + 4


async def test_old_events_go_and_whoever_was_too_slow_is_told(start_system: StartSystem, settings: Settings) -> None:
    clock = ManualClock(NOON_US)
    kept = msgspec.structs.replace(settings, events=EventsSettings(keep_days=2))
    system = await start_system(kept, work=False, clock=clock)
    feed = Feed(clock, Nobody(), Nobody())

    async def happen(*order_ids: int) -> None:
        facts = [Told(fact=OrderClosed(order_id=each, status="closed"), at_us=clock.now_us()) for each in order_ids]
        async with system.database.transaction() as tx:
            await feed.record(tx, facts)

    await happen(1, 2, 3)
    clock.advance(DAY_S)
    await happen(4)
    assert await system.events.sweep() == 0
    clock.advance(DAY_S + 1)
    assert await system.events.sweep() == 3
    assert await system.events.sweep() == 0
    (left,) = (await system.events.read()).events  # from the oldest kept
    assert left.data["orderId"] == "4"
    with pytest.raises(EventsExpired):
        await system.events.read(after=2)
    assert (await system.events.read(after=3)).events == [left]
    clock.advance(3 * DAY_S)
    assert await system.events.sweep() == 1
    await happen(5)  # ids go on
    assert [each.id for each in (await system.events.read()).events] == ["5"]


async def test_events_of_one_batch_keep_their_order_and_their_owner(start_system: StartSystem) -> None:
    system = await start_system(work=False, clock=ManualClock(NOON_US))

    class Book(Nobody):
        async def buyers(self, tx: object, order_ids: object) -> dict[int, str]:
            return {1: "ann"}

    created = OrderCreated(order_id=1, buyer="ann", amount_minor=5, currency="CNY", lines=(), pay_by_us=US_PER_S)
    paid = OrderPaid(order_id=1, payment_id=2)
    unknown = OrderPaid(order_id=9, payment_id=3)
    feed = Feed(system.clock, Book(), Nobody())
    async with system.database.transaction() as tx:
        await feed.record(tx, [Told(fact=each, at_us=NOON_US) for each in (created, paid, created, unknown, paid)])
    found = await rows(system, "SELECT id, type, owner FROM feed_event ORDER BY id")
    assert [(each["type"], each["owner"]) for each in found] == [
        ("order.created", "ann"),
        ("order.paid", "ann"),
        ("order.paid", None),
    ]
    assert [each.id for each in await events_of(system, "ann")] == [str(each["id"]) for each in found[:2]]
    assert len(await events_of(system)) == 3
