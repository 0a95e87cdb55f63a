"""Stock's listeners: message -> one action."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.db.database import Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.messaging.listen import Listen
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import OrderClosed, OrderPaid
from holdfast.services.stock.actions import Stock


def listeners(stock: Stock, group: GroupCommit) -> list[Listen]:
    """Closed orders give their stock back, paid orders have it deducted; by the writer that owns the stock rows."""

    async def on_closed(tx: Tx, events: Sequence[OrderClosed]) -> None:
        await stock.release(tx, {event.order_id for event in events})

    async def on_paid(tx: Tx, events: Sequence[OrderPaid]) -> None:
        await stock.deduct(tx, {event.order_id for event in events})

    return [
        Listen(name="stock.release", queue=topology.STOCK_RELEASE_QUEUE, effects={OrderClosed: on_closed}, group=group),
        Listen(name="stock.deduct", queue=topology.STOCK_DEDUCT_QUEUE, effects={OrderPaid: on_paid}, group=group),
    ]
