"""A shop to test in: SKUs on the shelf, buyers who order and pay, and a look at what became of it."""

from __future__ import annotations

import msgspec
from sqlalchemy import select

from holdfast.audit import audit
from holdfast.bootstrap import System
from holdfast.services.orders.model import OrderLine, OrderStatus, OrderView, Placed, PlaceRequest
from holdfast.services.payments.model import Verdict
from holdfast.services.payments.sandbox import SIGNATURE_HEADER, SignedNotice
from holdfast.services.stock import store as stock_store
from holdfast.services.stock.model import Level, Receipt, Sku
from tests.conftest import eventually

PRICE_MINOR = 1_000


async def stock_up(system: System, sku: str, quantity: int, warehouse: str = "main") -> None:
    """Put units of a SKU on the shelf, creating the SKU."""
    await system.stock.keep_sku(Sku(sku=sku, title=sku, price_minor=PRICE_MINOR, currency="CNY"))
    key = f"receipt-{sku}-{warehouse}-{system.ids.next()}"
    await system.stock.receive(Receipt(key=key, sku=sku, warehouse=warehouse, quantity=quantity, actor="tests"))


def wish(buyer: str, sku: str = "SKU-1", quantity: int = 1, key: str | None = None) -> PlaceRequest:
    """A buyer's wish for some units of one SKU."""
    line = OrderLine(sku=sku, quantity=quantity)
    return PlaceRequest(buyer=buyer, idempotency_key=key or f"key-of-{buyer}", lines=(line,))


async def order(system: System, buyer: str = "ann", sku: str = "SKU-1", quantity: int = 1) -> OrderView:
    """Place an order for some units of one SKU."""
    return placed_view(await system.orders.place(wish(buyer, sku, quantity)))


def placed_view(placed: Placed) -> OrderView:
    return msgspec.json.decode(placed.body, type=OrderView)


async def pay_at_sandbox(system: System, view: OrderView) -> SignedNotice:
    """The buyer pays by the order's link; the notice is not delivered yet."""
    assert view.payment.pay_url is not None
    return await system.sandbox.pay(view.payment.pay_url.rsplit("/", 1)[1])


async def deliver(system: System, notice: SignedNotice) -> Verdict:
    """The provider's notice arrives."""
    headers = {SIGNATURE_HEADER: notice.signature}
    return await system.payments.notice("sandbox", headers, notice.body.encode())


async def pay(system: System, view: OrderView) -> None:
    """Pay and deliver the notice."""
    await deliver(system, await pay_at_sandbox(system, view))


async def status(system: System, view: OrderView, buyer: str = "ann") -> OrderStatus:
    return (await system.orders.get(int(view.id), buyer)).status


async def becomes(system: System, view: OrderView, wanted: OrderStatus, buyer: str = "ann") -> None:
    """Wait until the order is in that state."""

    async def reached() -> bool:
        return await status(system, view, buyer) is wanted

    await eventually(reached, f"order {view.id} becomes {wanted}")


async def level(system: System, sku: str = "SKU-1", warehouse: str = "main") -> Level:
    return next(level for level in await system.stock.levels(sku) if level.warehouse == warehouse)


async def level_becomes(system: System, sku: str = "SKU-1", **wanted: int) -> None:
    """Wait until the SKU's counters are as wanted, e.g. `held=0, sold=3`."""

    async def reached() -> bool:
        now = await level(system, sku)
        return all(getattr(now, name) == value for name, value in wanted.items())

    await eventually(reached, f"level of {sku} becomes {wanted}")


async def detail_states(system: System, order_id: str) -> list[int]:
    """The states of an order's work order details: 1 held, 2 released, 3 deducted."""
    table = stock_store.details
    async with system.database.read() as tx:
        states = await tx.execute(select(table.c.status).where(table.c.order_id == int(order_id)).order_by(table.c.id))
        return list(states.scalars())


async def clean(system: System) -> None:
    """Wait until the audit finds nothing, with no slack; fails naming what it found."""
    report = await audit(system.database, system.clock, 0)

    async def is_clean() -> bool:
        nonlocal report
        report = await audit(system.database, system.clock, 0)
        return report.clean

    try:
        await eventually(is_clean, "the audit is clean")
    except AssertionError:
        raise AssertionError(f"the audit is not clean: {report.findings}") from None
