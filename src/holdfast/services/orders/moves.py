"""One step of orders in their graph: a conditional UPDATE and a log entry each; the second comer moves nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from holdfast import observe
from holdfast.clock import Clock
from holdfast.db.database import Tx
from holdfast.ids import IdSource
from holdfast.services.orders import store
from holdfast.services.orders.model import EDGES, OrderStatus


class Moves:
    """Moves orders within the caller's `tx`."""

    def __init__(self, clock: Clock, ids: IdSource) -> None:
        self._clock = clock
        self._ids = ids

    async def move(
        self,
        tx: Tx,
        order_ids: Collection[int],
        came: OrderStatus,
        to: OrderStatus,
        actor: str | Mapping[int, str],
        notes: Mapping[int, str] | None = None,
    ) -> list[int]:
        """Move those of the orders that are where they should be; answers which, in order of id.

        `actor` is who did it, for all of them or by order; `notes` by order stand in the log.
        """
        assert to in EDGES[came]
        if not order_ids:
            return []
        now_us = self._clock.now_us()
        moved = await store.move(tx, order_ids, came, to, now_us)
        if moved:
            entries = [
                {
                    "id": self._ids.next(),
                    "order_id": order_id,
                    "from_status": came.value,
                    "to_status": to.value,
                    "actor": actor if isinstance(actor, str) else actor[order_id],
                    "note": (notes or {}).get(order_id, ""),
                    "at_us": now_us,
                }
                for order_id in moved
            ]
            await store.insert_entries.many(tx, entries)
            tx.on_commit(lambda: observe.orders_moved.labels(to.value).inc(len(moved)))
        return moved
