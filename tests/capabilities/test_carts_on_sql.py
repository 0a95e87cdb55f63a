"""Rows H25 and H37 of the capability table, checked as they stand there, on SQL."""
# ruff: noqa: N802  # the rows keep their names

from __future__ import annotations

from typing import Any

import pytest

from holdfast.clock import ManualClock
from holdfast.services.carts.model import Item, PutItem
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import CartOrdered
from holdfast.services.orders.model import OrderStatus, PlaceRequest
from holdfast.settings import Settings
from tests.conftest import StartSystem, eventually, with_orders
from tests.shop import NOON_US, clean, count, drained, in_time, order, placed_view, status, stock_up


@pytest.mark.parametrize("time_out_s", [10, 900])
async def test_H25_timeout_order_message(start_system: StartSystem, settings: Settings, time_out_s: int) -> None:
    clock = ManualClock(NOON_US)
    system = await start_system(with_orders(settings, time_out_ms=time_out_s * 1_000), clock=clock)
    await stock_up(system, "SKU-1", 5)
    view = await order(system)
    handled: list[int] = []
    expire = system.orders.expire

    async def counted(order_id: int) -> Any:
        handled.append(clock.now_us())
        return await expire(order_id)

    system.orders.expire = counted  # type: ignore[method-assign]  # to see when it is called
    clock.advance(time_out_s - 0.5)
    assert (await system.transport.stats(topology.ORDER_DUE_QUEUE)).delayed == 1

    async def closed() -> bool:
        return await status(system, view) is OrderStatus.CLOSED

    await in_time(clock, closed, "the order is closed", within_s=5)
    assert len(handled) == 1
    assert 0 <= handled[0] - NOON_US - time_out_s * 1_000_000 <= 1_000_000


async def test_H37_cart_cleared_by_order_message(start_system: StartSystem) -> None:
    system = await start_system()
    await stock_up(system, "SKU-1", 5)
    for buyer in ("ann", "bob"):
        await system.carts.put(PutItem(buyer=buyer, sku="SKU-1", quantity=2))
        await system.carts.put(PutItem(buyer=buyer, sku="LATER", quantity=1))
    await system.carts.put(PutItem(buyer="ann", sku="LATER", quantity=0))

    request = PlaceRequest(buyer="ann", idempotency_key="key-1", lines=(), from_cart=True)
    view = placed_view(await system.orders.place(request))

    async def gone() -> bool:
        return await system.carts.read("ann") == []

    await eventually(gone, "the rows of ann are gone")
    untouched = [Item(sku="LATER", quantity=1), Item(sku="SKU-1", quantity=2)]
    assert await system.carts.read("bob") == untouched

    # The message again, as a message of its own: harmless, also for what was put in since.
    await system.carts.put(PutItem(buyer="ann", sku="NEW", quantity=1))
    ordered = CartOrdered(order_id=int(view.id), skus=("SKU-1",))
    for _ in range(3):
        await system.publisher.publish(
            topology.TRADE, topology.KEY_CART_ORDERED, ordered, headers={topology.USER_HEADER: "ann"}
        )

    async def handled() -> bool:
        return await drained(system, topology.CART_CLEAR_QUEUE)

    await eventually(handled, "the duplicates are handled")
    assert await system.carts.read("ann") == [Item(sku="NEW", quantity=1)]
    assert await system.carts.read("bob") == untouched
    await clean(system)

    # Whose cart it is has to be said: a message that does not is parked, and changes nothing.
    await system.publisher.publish(topology.TRADE, topology.KEY_CART_ORDERED, ordered)

    async def parked() -> bool:
        return await count(system, "SELECT id FROM hf_parked WHERE queue = :queue", queue="cart.clear.queue") == 1

    await eventually(parked, "the message without a user is parked")
    assert await system.carts.read("bob") == untouched
