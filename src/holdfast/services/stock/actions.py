"""Verbs of stock: receive, reserve, release, deduct. Each takes a batch within the caller's transaction."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import select

from holdfast.clock import Clock
from holdfast.db.database import Tx
from holdfast.db.prepared import insert
from holdfast.errors import HoldfastError, Refused
from holdfast.ids import IdSource
from holdfast.messaging.draft import Draft
from holdfast.messaging.outbox import Outbox
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import StockLocked
from holdfast.services.contracts.refusals import KeyReused
from holdfast.services.contracts.values import Price, Shortage, Wanted
from holdfast.services.stock import store
from holdfast.services.stock.model import DEDUCTED, HELD, RELEASED, Detail, Receipt, Sku, allocate

Shifts = dict[tuple[str, str], tuple[int, int, int]]


class UnknownSku(Refused):
    """There is no such SKU."""

    code = "sku_not_found"


class HoldMissing(HoldfastError):
    """A paid order has no held stock to deduct; a human has to look."""

    code = "hold_missing"


class Stock:
    """What stock can do; what a verb does commits with the caller's `tx` or not at all."""

    def __init__(self, clock: Clock, ids: IdSource, outbox: Outbox) -> None:
        self._clock = clock
        self._ids = ids
        self._outbox = outbox

    async def keep_skus(self, tx: Tx, given: Sequence[Sku]) -> list[Sku | HoldfastError]:
        """Create SKUs or change their title and price; orders keep the price they were placed at."""
        for sku in given:
            values = {
                "title": sku.title,
                "price_minor": sku.price_minor,
                "currency": sku.currency,
                "order_max": sku.order_max,
                "buyer_max": sku.buyer_max,
                "time_out_ms": sku.time_out_ms,
                "changed_us": self._clock.now_us(),
            }
            statement = insert(tx.dialect, store.skus).values(sku=sku.sku, **values)
            await tx.execute(statement.on_conflict_do_update(index_elements=["sku"], set_=values))
        return list(given)

    async def receive(self, tx: Tx, receipts: Sequence[Receipt]) -> list[HoldfastError | None]:
        """Book units that came in, each receipt once by its key; refuses an unknown SKU."""
        return [await self._receive_one(tx, receipt) for receipt in receipts]

    async def prices(self, tx: Tx, wanted: Collection[str]) -> Mapping[str, Price]:
        """The prices of those SKUs that exist."""
        return await store.read_prices(tx, wanted)

    async def lock(self, tx: Tx, skus: Collection[str]) -> None:
        """Let no other transaction hold units of these SKUs before this one has ended."""
        await store.lock_levels(tx, skus)

    async def reserve(self, tx: Tx, orders: Sequence[Wanted]) -> list[Shortage | None]:
        """Hold stock for orders in the given order, each all or nothing; None says that it is held.

        Writes a work order with a detail per SKU and warehouse, the counters, the ledger, and `stock.locked` for each
        detail, which exists if and only if `tx` commits. An order id is held once: the second try is a `Conflict`.
        """
        rows = await store.lock_levels(tx, {line.sku for order in orders for line in order.lines})
        shelf = {(row.sku, row.warehouse): row.available for row in rows}
        by_sku: dict[str, list[tuple[str, str]]] = {}
        for row in rows:
            by_sku.setdefault(row.sku, []).append((row.sku, row.warehouse))
        outcomes: list[Shortage | None] = []
        held: list[tuple[Wanted, list[Detail]]] = []
        for order in orders:
            taken = allocate(shelf, by_sku, order.lines)
            if isinstance(taken, Shortage):
                outcomes.append(taken)
            else:
                outcomes.append(None)
                held.append((order, taken))
        if held:
            await self._write_holds(tx, held)
        return outcomes

    async def release(self, tx: Tx, order_ids: Collection[int]) -> int:
        """Give back what is still held for these orders; answers how many details moved.

        Safe to repeat and in any order of arrival: only a detail that is held moves, and it moves once.
        """
        moved = await store.move_details(tx, order_ids, RELEASED, self._clock.now_us())
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

    async def _receive_one(self, tx: Tx, receipt: Receipt) -> HoldfastError | None:
        known = await tx.execute(select(store.skus.c.sku).where(store.skus.c.sku == receipt.sku))
        if known.first() is None:
            return UnknownSku(f"there is no SKU {receipt.sku!r}; create it first with PUT /v1/skus/{receipt.sku}")
        entry = {
            "id": self._ids.next(),
            "sku": receipt.sku,
            "warehouse": receipt.warehouse,
            "kind": "receive",
            "cause": receipt.key,
            "available_delta": receipt.quantity,
            "held_delta": 0,
            "sold_delta": 0,
            "actor": receipt.actor,
            "at_us": self._clock.now_us(),
        }
        booked = (
            insert(tx.dialect, store.ledger).values(**entry).on_conflict_do_nothing(index_elements=["kind", "cause"])
        )
        if (await tx.execute(booked)).rowcount == 0:
            return await self._booked_before(tx, receipt)
        await store.keep_warehouse(tx, receipt.warehouse)
        level = insert(tx.dialect, store.levels).values(
            sku=receipt.sku,
            warehouse=receipt.warehouse,
            available=receipt.quantity,
            held=0,
            sold=0,
            total=receipt.quantity,
        )
        more = {
            "available": store.levels.c.available + level.excluded.available,
            "total": store.levels.c.total + level.excluded.total,
        }
        await tx.execute(level.on_conflict_do_update(index_elements=["sku", "warehouse"], set_=more))
        return None

    async def _booked_before(self, tx: Tx, receipt: Receipt) -> KeyReused | None:
        """A receipt booked under this key: the very same one is no news, another one is refused."""
        found = select(store.ledger).where(store.ledger.c.kind == "receive", store.ledger.c.cause == receipt.key)
        booked = (await tx.execute(found)).one()
        same = (booked.sku, booked.warehouse, booked.available_delta)
        return None if same == (receipt.sku, receipt.warehouse, receipt.quantity) else KeyReused()

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
                }
            )
        await store.shift_levels(tx, shifts)
        await store.insert_entries.many(tx, entries)
