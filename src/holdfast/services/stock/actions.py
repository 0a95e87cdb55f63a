"""Verbs of stock: reserve, release, deduct. Each takes a batch within the caller's transaction."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from holdfast.clock import Clock
from holdfast.db.database import Tx
from holdfast.errors import HoldfastError
from holdfast.ids import IdSource
from holdfast.messaging.draft import Draft
from holdfast.messaging.outbox import Outbox
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import StockLocked
from holdfast.services.contracts.refusals import KeyReused
from holdfast.services.contracts.values import Price, Shortage, Wanted
from holdfast.services.stock import store
from holdfast.services.stock.model import (
    DEDUCTED,
    HELD,
    RELEASED,
    Detail,
    Held,
    Hold,
    HoldMissing,
    again,
    allocate,
    take_part,
    units,
)

Shifts = dict[tuple[str, str], tuple[int, int, int]]


class Stock:
    """What stock can do; what a verb does commits with the caller's `tx` or not at all."""

    def __init__(self, clock: Clock, ids: IdSource, outbox: Outbox) -> None:
        self._clock = clock
        self._ids = ids
        self._outbox = outbox

    async def prices(self, tx: Tx, wanted: Collection[str]) -> Mapping[str, Price]:
        """The prices of those SKUs that exist."""
        return await store.read_prices(tx, wanted)

    async def lock(self, tx: Tx, skus: Collection[str]) -> None:
        """Let no other transaction hold units of these SKUs before this one has ended."""
        await store.lock_levels(tx, skus)

    async def reserve(self, tx: Tx, orders: Sequence[Wanted]) -> list[Shortage | HoldfastError | None]:
        """Hold stock for orders in the given order, each all or nothing; None says that it is held.

        Writes a work order with a detail per SKU and warehouse, the counters, the ledger, and `stock.locked` for each
        detail, which exists if and only if `tx` commits. An order id is held once: asking again for the same changes
        nothing, other lines are `HoldDiffers`, and what was given back, be it before it was asked for, is `HoldEnded`.
        """
        rows = await store.lock_levels(tx, {line.sku for order in orders for line in order.lines})
        shelf = {(row.sku, row.warehouse): row.available for row in rows}
        by_sku: dict[str, list[tuple[str, str]]] = {}
        for row in rows:
            by_sku.setdefault(row.sku, []).append((row.sku, row.warehouse))
        before = await store.holds(tx, {order.order_id for order in orders})
        outcomes: list[Shortage | HoldfastError | None] = []
        held: list[tuple[Wanted, list[Detail]]] = []
        for order in orders:
            if order.order_id in before:
                outcomes.append(again(before[order.order_id], order.lines))
                continue
            taken = allocate(shelf, by_sku, order.lines)
            if isinstance(taken, Shortage):
                outcomes.append(taken)
            else:
                outcomes.append(None)
                held.append((order, taken))
                before[order.order_id] = Hold(lines=units(order.lines), ended=False)
        if held:
            await self._write_holds(tx, held)
        return outcomes

    async def release(self, tx: Tx, order_ids: Collection[int]) -> int:
        """Give back what is still held for these orders; answers how many details moved.

        Safe to repeat and in any order of arrival: only a detail that is held moves, and it moves once. An order that
        holds nothing yet will never hold anything: its later `reserve` is refused.
        """
        now_us = self._clock.now_us()
        moved = list(await store.move_details(tx, order_ids, RELEASED, now_us))
        if missing := set(order_ids) - {row.order_id for row in moved}:
            doors = [{"id": self._ids.next(), "order_id": each, "created_us": now_us} for each in sorted(missing)]
            # Who has a work order got it before, or from a transaction that this one had to wait for.
            if known := missing - await store.close_doors(tx, doors):
                moved += await store.move_details(tx, known, RELEASED, now_us)
        await self._book(tx, "release", moved, available=1, held=-1, sold=0)
        return len(moved)

    async def deduct(self, tx: Tx, order_ids: Collection[int]) -> int:
        """Turn what is held for paid orders into sold; answers how many details moved.

        Raises `HoldMissing` for an order that has neither held nor deducted details.
        """
        moved = await store.move_details(tx, order_ids, DEDUCTED, self._clock.now_us())
        missing = set(order_ids) - {row.order_id for row in moved}
        if missing and (lost := missing - await store.orders_in_state(tx, missing, DEDUCTED)):
            raise HoldMissing(f"paid orders without held stock: {sorted(lost)}")
        await self._book(tx, "deduct", moved, available=0, held=-1, sold=1)
        return len(moved)

    async def deduct_part(self, tx: Tx, order_id: int, quantities: Mapping[str, int], key: str) -> int:
        """Turn some of an order's held units (SKU -> units) into sold and leave the rest held, once per key.

        Answers how many details were sold, 0 when the key was used before. Raises `HoldMissing` for more than is held,
        `KeyReused` for a key that stands for another part, `InvalidInput` for a part of nothing.
        """
        moved = await self._move_part(tx, order_id, quantities, key, "deduct", DEDUCTED)
        await self._book(tx, "deduct", moved, available=0, held=-1, sold=1)
        return len(moved)

    async def release_part(self, tx: Tx, order_id: int, quantities: Mapping[str, int], key: str) -> int:
        """Give back some of an order's held units (SKU -> units), once per key; see `deduct_part`."""
        moved = await self._move_part(tx, order_id, quantities, key, "release", RELEASED)
        await self._book(tx, "release", moved, available=1, held=-1, sold=0)
        return len(moved)

    async def _move_part(
        self, tx: Tx, order_id: int, quantities: Mapping[str, int], key: str, kind: str, to: int
    ) -> list[dict[str, Any]]:
        """Move units of an order to another state; a detail that gives only some of its units is split in two."""
        now_us = self._clock.now_us()
        lines = msgspec.json.encode(dict(sorted(quantities.items()))).decode()
        held = await store.lock_held(tx, order_id)
        part = {"order_id": order_id, "key": key, "kind": kind, "lines": lines, "at_us": now_us}
        if (before := await store.part_before(tx, part)) is not None:
            if (before.kind, before.lines) != (kind, lines):
                raise KeyReused()
            return []
        found = [Held(id=row.id, sku=row.sku, quantity=row.quantity) for row in held.values()]
        taken = take_part(found, quantities)
        whole = [held[each]._asdict() for each, quantity in taken.items() if quantity == held[each].quantity]
        shrunk = {each: quantity for each, quantity in taken.items() if quantity < held[each].quantity}
        split = [
            {**held[each]._asdict(), "id": self._ids.next(), "quantity": quantity, "status": to, "changed_us": now_us}
            for each, quantity in shrunk.items()
        ]
        await store.move_some(tx, [row["id"] for row in whole], to, now_us)
        await store.shrink(tx, shrunk)
        await store.insert_details.many(tx, split)
        await self._book(tx, "split", split, available=0, held=0, sold=0)
        return whole + split

    async def _write_holds(self, tx: Tx, held: Sequence[tuple[Wanted, Sequence[Detail]]]) -> None:
        now_us = self._clock.now_us()
        tasks, details, drafts = [], [], []
        for order, parts in held:
            order_id = order.order_id
            task_id = self._ids.next()
            tasks.append({"id": task_id, "order_id": order_id, "created_us": now_us})
            for part in parts:
                detail_id = self._ids.next()
                details.append(
                    {
                        "id": detail_id,
                        "task_id": task_id,
                        "order_id": order_id,
                        "sku": part.sku,
                        "warehouse": part.warehouse,
                        "quantity": part.quantity,
                        "status": HELD,
                        "changed_us": now_us,
                    }
                )
                locked = StockLocked(
                    task_id=task_id,
                    detail_id=detail_id,
                    order_id=order_id,
                    sku=part.sku,
                    warehouse=part.warehouse,
                    quantity=part.quantity,
                )
                drafts.append(
                    Draft(
                        exchange=topology.STOCK_EVENTS,
                        routing_key=topology.KEY_STOCK_LOCKED,
                        body=locked,
                        trace=tx.trace_of(order),
                        mandatory=False,  # a fact for whoever listens; nobody has to
                    )
                )
        await store.insert_tasks.many(tx, tasks)
        await store.insert_details.many(tx, details)
        await self._book(tx, "reserve", details, available=-1, held=1, sold=0)
        await self._outbox.add_all(tx, drafts)

    async def _book(
        self,
        tx: Tx,
        kind: str,
        moved: Sequence[Any],
        *,
        available: int,
        held: int,
        sold: int,
    ) -> None:
        """Shift the counters by the details' quantities times the signs, and write a ledger row for each detail."""
        if not moved:
            return
        now_us = self._clock.now_us()
        shifts: Shifts = {}
        entries = []
        for each in moved:
            row = each if isinstance(each, dict) else each._asdict()
            place = (row["sku"], row["warehouse"])
            by = (row["quantity"] * available, row["quantity"] * held, row["quantity"] * sold)
            before = shifts.get(place, (0, 0, 0))
            shifts[place] = (before[0] + by[0], before[1] + by[1], before[2] + by[2])
            entries.append(
                {
                    "id": self._ids.next(),
                    "sku": place[0],
                    "warehouse": place[1],
                    "kind": kind,
                    "cause": str(row["id"]),
                    "available_delta": by[0],
                    "held_delta": by[1],
                    "sold_delta": by[2],
                    "actor": "system",
                    "at_us": now_us,
                    "reason": None,
                    "counted": None,
                }
            )
        await store.shift_levels(tx, shifts)
        await store.insert_entries.many(tx, entries)
