"""Rows G11, G13, G15 and G16 of the capability table: what becomes of holds that no message settles, on SQL."""
# ruff: noqa: N802  # the rows keep their names

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence

import msgspec
import pytest

from holdfast.bootstrap import System
from holdfast.clock import ManualClock
from holdfast.db.database import Tx
from holdfast.errors import Unavailable
from holdfast.messaging.message import Message, Outgoing
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import OrderClosed, StockLocked
from holdfast.services.contracts.values import Fate, Line, Wanted
from holdfast.services.orders.model import OrderStatus
from holdfast.services.orders.service import OrderService
from holdfast.services.stock.actions import Stock
from holdfast.services.stock.listeners import OPEN_AGAIN_MS, UNKNOWN_AGAIN_MS
from holdfast.services.stock.model import DEDUCTED, HELD, RELEASED
from holdfast.settings import Settings, StockSettings
from tests.conftest import StartSystem, eventually, with_orders
from tests.shop import (
    NOON_US,
    becomes,
    clean,
    clean_in_time,
    count,
    detail_states,
    drained,
    in_time,
    level,
    lose,
    one_by_one,
    order,
    pay,
    rows,
    status,
    stock_up,
    two_systems,
    waiting,
)

GUARD_MS = 40_000
STRANGER = 77  # an order id that nobody ever placed


def guarded(settings: Settings, guard_ms: int = GUARD_MS) -> Settings:
    """The settings with another guard; orders have 60 s to pay."""
    return msgspec.structs.replace(settings, stock=StockSettings(guard_ms=guard_ms))


async def hold(system: System, order_id: int, sku: str = "SKU-1", quantity: int = 1) -> None:
    """Hold units for an order that is never placed, as when placing it fails after the stock side has committed."""
    stock = Stock(system.clock, system.ids, system.outbox)
    async with system.database.transaction() as tx:
        assert await stock.reserve(tx, [Wanted(order_id=order_id, lines=(Line(sku=sku, quantity=quantity),))]) == [None]


def listen(system: System) -> None:
    """Start the listeners and not the sweepers: what is settled, messages have settled."""
    for each in system.listens:
        system.listen(each)


async def states_become(system: System, clock: ManualClock, order_id: int | str, wanted: list[int]) -> None:
    async def reached() -> bool:
        return await detail_states(system, str(order_id)) == wanted

    await in_time(clock, reached, f"the details of {order_id} become {wanted}")


async def parked(system: System) -> int:
    return await count(system, "SELECT id FROM hf_parked")


async def test_G11_auto_unlock_after_order_rollback(start_system: StartSystem, settings: Settings) -> None:
    clock = ManualClock(NOON_US)
    system = await start_system(guarded(settings), work=False, clock=clock)
    await stock_up(system, "SKU-1", 2, "east")
    await stock_up(system, "SKU-1", 3, "west")
    await hold(system, STRANGER, quantity=4)
    assert await detail_states(system, str(STRANGER)) == [HELD, HELD]
    assert len(await waiting(system, StockLocked, topology.STOCK_DELAY_QUEUE)) == 2
    listen(system)

    clock.advance(GUARD_MS / 1_000 - 1)
    assert await detail_states(system, str(STRANGER)) == [HELD, HELD]
    clock.advance(1)
    await states_become(system, clock, STRANGER, [RELEASED, RELEASED])
    now = {each.warehouse: (each.available, each.held) for each in await system.stock.levels("SKU-1")}
    assert now == {"east": (2, 0), "west": (3, 0)}
    assert await count(system, "SELECT id FROM stock_ledger WHERE kind = 'release'") == 2
    await clean_in_time(system, clock)
    assert await parked(system) == 0


async def test_G11_the_sweeper_does_it_when_the_message_is_lost(start_system: StartSystem, settings: Settings) -> None:
    clock = ManualClock(NOON_US)
    system = await start_system(guarded(settings), work=False, clock=clock)
    await stock_up(system, "SKU-1", 5)
    await hold(system, STRANGER)
    kept = await order(system, "ann")
    assert await lose(system, "stock.locked") == 2
    clock.advance(GUARD_MS / 1_000 - 1)
    assert await system.stock.sweep(500) == 0  # the order may still be on its way
    clock.advance(1)
    assert await system.stock.sweep(500) == 1
    assert await detail_states(system, str(STRANGER)) == [RELEASED]
    assert await detail_states(system, kept.id) == [HELD]
    await clean(system)


async def test_G12_the_same_guard_delivered_50_times(start_system: StartSystem, settings: Settings) -> None:
    systems = await two_systems(start_system, one_by_one(guarded(settings), prefetch=8), work=False)
    system = systems[0]
    await stock_up(system, "SKU-1", 9)
    await order(system, "bob", quantity=4)  # keeps its units
    await hold(system, STRANGER, quantity=3)
    (told,) = [
        each for each in await waiting(system, StockLocked, topology.STOCK_DELAY_QUEUE) if each.order_id == STRANGER
    ]
    await asyncio.gather(
        *(
            systems[number % len(systems)].publisher.publish(topology.STOCK_EVENTS, topology.KEY_STOCK_RELEASE, told)
            for number in range(50)
        )
    )
    closed = OrderClosed(order_id=STRANGER, status=OrderStatus.CLOSED)  # both handlers at once: nothing moves twice
    await system.publisher.publish(topology.ORDER_EVENTS, topology.KEY_ORDER_CLOSED, closed)
    for each in systems:
        listen(each)

    async def all_handled() -> bool:
        return await drained(system, topology.STOCK_RELEASE_QUEUE)

    await eventually(all_handled, "all 51 messages are handled")
    assert await detail_states(system, str(STRANGER)) == [RELEASED]
    assert await count(system, "SELECT id FROM stock_ledger WHERE kind = 'release'") == 1
    now = await level(system)
    assert (now.available, now.held) == (5, 4)
    await clean(system)


async def test_G13_unlock_failure_keeps_the_message(
    start_system: StartSystem, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock(NOON_US)
    system = await start_system(guarded(settings), work=False, clock=clock)
    await stock_up(system, "SKU-1", 5)
    for order_id in (STRANGER, STRANGER + 1):
        await hold(system, order_id)
    asked = 0
    fates = OrderService.fates

    async def nobody_there(_: OrderService, order_ids: Collection[int]) -> Mapping[int, Fate]:
        nonlocal asked
        asked += 1
        raise (Unavailable, ConnectionRefusedError)[asked % 2]("the orders service is down")

    monkeypatch.setattr(OrderService, "fates", nobody_there)
    listen(system)
    clock.advance(GUARD_MS / 1_000)

    async def asked_often() -> bool:
        return asked >= 40

    # Far more often than any number of tries that a failing message has, and without a hot loop.
    began_us = clock.now_us()
    await in_time(clock, asked_often, "the orders service is asked 40 times", within_s=300, step_s=1.0)
    passed_ms = (clock.now_us() - began_us) // 1_000
    assert asked <= 2 * (2 + passed_ms // UNKNOWN_AGAIN_MS)
    assert await parked(system) == 0
    for order_id in (STRANGER, STRANGER + 1):
        assert await detail_states(system, str(order_id)) == [HELD]

    monkeypatch.setattr(OrderService, "fates", fates)
    for order_id in (STRANGER, STRANGER + 1):
        await states_become(system, clock, order_id, [RELEASED])
    assert (await level(system)).available == 5
    await clean_in_time(system, clock)


async def test_G15_two_payload_types_one_queue(start_system: StartSystem, settings: Settings) -> None:
    system = await start_system(guarded(settings), work=False)
    await stock_up(system, "SKU-1", 5)
    await hold(system, STRANGER)
    await hold(system, STRANGER + 1)
    (told, _) = await waiting(system, StockLocked, topology.STOCK_DELAY_QUEUE)
    await system.publisher.publish(topology.STOCK_EVENTS, topology.KEY_STOCK_RELEASE, told)
    closed = OrderClosed(order_id=STRANGER + 1, status=OrderStatus.CANCELLED)
    await system.publisher.publish(topology.ORDER_EVENTS, topology.KEY_ORDER_CLOSED, closed)
    garbage = Message(
        exchange=topology.STOCK_EVENTS,
        routing_key=topology.KEY_STOCK_RELEASE,
        body=b"{}",
        message_id="garbage",
        timestamp_us=system.clock.now_us(),
        type="nobody.knows",
    )
    assert await system.transport.publish([Outgoing(message=garbage)]) == [None]
    listen(system)

    async def handled() -> bool:
        return await drained(system, topology.STOCK_RELEASE_QUEUE)

    await eventually(handled, "all three are handled")
    assert await detail_states(system, str(STRANGER)) == [RELEASED]
    assert await detail_states(system, str(STRANGER + 1)) == [RELEASED]
    assert await rows(system, "SELECT message_id, queue FROM hf_parked") == [
        {"message_id": "garbage", "queue": topology.STOCK_RELEASE_QUEUE}
    ]


async def test_G16_unpaid_order_at_stock_TTL(start_system: StartSystem, settings: Settings) -> None:
    """The guard runs out before the order does, and the message of its closing is lost: its stock is freed anyway.

    The order that is paid meanwhile keeps its units, although the message that sells them is lost too.
    """
    clock = ManualClock(NOON_US)
    system = await start_system(guarded(with_orders(settings, time_out_ms=90_000)), work=False, clock=clock)
    await stock_up(system, "SKU-1", 5)
    unpaid = await order(system, "ann", quantity=2)
    paid = await order(system, "bob", quantity=1)

    async def lost(tx: Tx, events: Sequence[OrderClosed]) -> None:
        """The close message, dropped."""

    for each in system.listens:
        if each.queue == topology.STOCK_RELEASE_QUEUE:
            system.listen(msgspec.structs.replace(each, effects={OrderClosed: lost}))
        elif each.queue != topology.STOCK_DEDUCT_QUEUE:
            system.listen(each)
    clock.advance(GUARD_MS / 1_000)

    async def asked() -> bool:
        stats = await system.transport.stats(topology.STOCK_RELEASE_QUEUE)
        return (stats.ready, stats.unacked, stats.delayed) == (0, 0, 2)

    await in_time(clock, asked, "both guards found their orders open and wait for another look")
    assert await detail_states(system, unpaid.id) == [HELD]
    await pay(system, paid)
    await becomes(system, paid, OrderStatus.PAID, "bob")

    async def closed() -> bool:
        return await status(system, unpaid) is OrderStatus.CLOSED

    async def freed() -> bool:
        return await detail_states(system, unpaid.id) == [RELEASED]

    await in_time(clock, closed, "the order closes", within_s=90, step_s=1.0)
    assert await detail_states(system, unpaid.id) == [HELD]
    await in_time(clock, freed, "its stock is freed", within_s=2 * OPEN_AGAIN_MS / 1_000, step_s=1.0)
    assert await detail_states(system, paid.id) == [HELD]
    now = await level(system)
    assert (now.available, now.held) == (4, 1)
    assert await parked(system) == 0
    assert await system.stock.sweep(0) == 1  # what sells the paid order's units when their message is lost
    assert await detail_states(system, paid.id) == [DEDUCTED]
