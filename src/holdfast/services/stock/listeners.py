"""Stock's listeners: message -> one action."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.db.database import Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.errors import HoldfastError
from holdfast.messaging.listen import Listen
from holdfast.messaging.retry import Retry
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import OrderClosed, OrderPaid, StockLocked
from holdfast.services.stock.actions import Stock
from holdfast.services.stock.service import StockService
from holdfast.settings import StockSettings

UNKNOWN_AGAIN_MS = 5_000  # nobody could say what became of the order
OPEN_AGAIN_MS = 30_000  # the order waits for its money; sooner where the guard is shorter


def listeners(service: StockService, stock: Stock, group: GroupCommit, settings: StockSettings) -> list[Listen]:
    """Closed orders give their stock back, paid orders have it deducted; by the writer that owns the stock rows.

    `StockLocked` comes to the same queue when a hold has stood for as long as the guard allows: then orders are asked
    what became of its order, and asked again for as long as it is open or nobody knows.
    """

    open_again_ms = min(OPEN_AGAIN_MS, settings.guard_ms)

    async def on_closed(tx: Tx, events: Sequence[OrderClosed]) -> None:
        await stock.release(tx, {event.order_id for event in events})

    async def on_paid(tx: Tx, events: Sequence[OrderPaid]) -> None:
        await stock.deduct(tx, {event.order_id for event in events})

    async def on_locked(holds: Sequence[StockLocked]) -> list[Exception | None]:
        try:
            waiting = await service.look_after(holds)
        except (HoldfastError, OSError) as error:
            if isinstance(error, HoldfastError) and not error.retryable:
                raise
            return [Retry(UNKNOWN_AGAIN_MS, f"what became of the order is unknown: {error}") for _ in holds]
        return [Retry(open_again_ms, "the order is open") if hold.order_id in waiting else None for hold in holds]

    return [
        Listen(
            name="stock.release",
            queue=topology.STOCK_RELEASE_QUEUE,
            effects={OrderClosed: on_closed},
            handlers=[on_locked],
            group=group,
        ),
        Listen(name="stock.deduct", queue=topology.STOCK_DEDUCT_QUEUE, effects={OrderPaid: on_paid}, group=group),
    ]
