"""Verbs of the shelves: SKUs, warehouses, receipts, adjustments and counts, each within the caller's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from holdfast.clock import Clock, rfc3339
from holdfast.db.database import Tx
from holdfast.errors import HoldfastError, Refused
from holdfast.ids import IdSource
from holdfast.services.contracts.refusals import KeyReused
from holdfast.services.stock import shelf_store as store
from holdfast.services.stock.model import (
    Adjustment,
    Count,
    Level,
    LevelChanged,
    Receipt,
    Received,
    Sku,
    TooFewUnits,
    UnknownLevel,
    UnknownSku,
    Warehouse,
    adjusted,
    difference,
)


class Shelves:
    """What staff does to stock; each booking counts once by its key, and the ledger keeps it for good."""

    def __init__(self, clock: Clock, ids: IdSource) -> None:
        self._clock = clock
        self._ids = ids

    async def keep_skus(self, tx: Tx, given: Sequence[Sku]) -> list[Sku | HoldfastError]:
        """Create SKUs or change their title and price; orders keep the price they were placed at."""
        now_us = self._clock.now_us()
        for sku in given:
            await store.keep_sku(tx, sku, now_us)
        return list(given)

    async def keep_warehouses(self, tx: Tx, given: Sequence[Warehouse]) -> list[Warehouse | HoldfastError]:
        """Create warehouses or change their priority, from the next hold on."""
        for warehouse in given:
            await store.write_warehouse(tx, warehouse)
        return list(given)

    async def receive(self, tx: Tx, receipts: Sequence[Receipt]) -> list[HoldfastError | None]:
        """Book units that came in, each receipt once by its key; refuses an unknown SKU."""
        return [await self._receive_one(tx, receipt) for receipt in receipts]

    async def refusals(self, tx: Tx, receipts: Sequence[Receipt]) -> list[HoldfastError | None]:
        """Why each of these receipts would be refused now; None where it would be booked, or is already."""
        known = await store.known_skus(tx, {receipt.sku for receipt in receipts})
        booked = await store.booked_among(tx, "receive", {receipt.key for receipt in receipts})
        answers: list[HoldfastError | None] = []
        for receipt in receipts:
            if receipt.sku not in known:
                answers.append(_unknown(receipt.sku))
            elif receipt.key in booked:
                answers.append(_same(booked[receipt.key], receipt, receipt.quantity, None))
            else:
                answers.append(None)
        return answers

    async def adjust(self, tx: Tx, adjustments: Sequence[Adjustment]) -> list[Level | HoldfastError]:
        """Add available units or take some away, if the level is as it was when that was decided.

        Refuses an unknown level, one that changed since (`LevelChanged`), and more than is available (`TooFewUnits`).
        """
        await store.lock_levels(tx, {each.sku for each in adjustments})
        return [await self._adjust_one(tx, each) for each in adjustments]

    async def count(self, tx: Tx, counts: Sequence[Count]) -> list[Level | HoldfastError]:
        """Book what was found on the shelf: the difference to what is available and held, also when there is none.

        Refuses an unknown SKU, a count below what is held (`TooFewUnits`), and where tags are given a level that
        changed since (`LevelChanged`).
        """
        await store.lock_levels(tx, {each.sku for each in counts})
        return [await self._count_one(tx, each) for each in counts]

    async def _receive_one(self, tx: Tx, receipt: Receipt) -> HoldfastError | None:
        if not await store.known_skus(tx, [receipt.sku]):
            return _unknown(receipt.sku)
        if not await store.book_once(tx, self._entry("receive", receipt, receipt.quantity)):
            return await self._told_before(tx, "receive", receipt, receipt.quantity)
        await store.open_level(tx, receipt.sku, receipt.warehouse)
        await store.add_units(tx, receipt.sku, receipt.warehouse, receipt.quantity)
        return None

    async def _adjust_one(self, tx: Tx, wish: Adjustment) -> Level | HoldfastError:
        level = await store.lock_level(tx, wish.sku, wish.warehouse)
        if level is None:
            return UnknownLevel(f"there never was a unit of SKU {wish.sku!r} in warehouse {wish.warehouse!r}")
        if await store.booked(tx, "adjust", wish.key) is not None:
            return await self._told_before(tx, "adjust", wish, wish.delta, reason=wish.reason) or level
        refusal = level.refuse_unless(wish.tags) or adjusted(level, wish.delta)
        if refusal is not None:
            return refusal
        await store.book_once(tx, self._entry("adjust", wish, wish.delta, reason=wish.reason))
        return await self._changed(tx, wish, wish.delta)

    async def _count_one(self, tx: Tx, wish: Count) -> Level | HoldfastError:
        if not await store.known_skus(tx, [wish.sku]):
            return _unknown(wish.sku)
        level = await store.lock_level(tx, wish.sku, wish.warehouse)
        if (before := await store.booked(tx, "count", wish.key)) is not None:
            same = (before.sku, before.warehouse, before.counted, before.reason)
            told = same == (wish.sku, wish.warehouse, wish.counted, wish.reason)
            return level if level is not None and told else KeyReused()
        if level is None:
            if wish.tags is not None:
                return LevelChanged("there is no such level yet, so it cannot be as you saw it; leave If-Match out")
            await store.open_level(tx, wish.sku, wish.warehouse)
            level = await store.lock_level(tx, wish.sku, wish.warehouse)
            assert level is not None
        if (refusal := level.refuse_unless(wish.tags)) is not None:
            return refusal
        found = difference(level, wish.counted)
        if isinstance(found, TooFewUnits):
            return found
        await store.book_once(tx, self._entry("count", wish, found, reason=wish.reason, counted=wish.counted))
        return await self._changed(tx, wish, found)

    async def _changed(self, tx: Tx, wish: Adjustment | Count, delta: int) -> Level:
        await store.add_units(tx, wish.sku, wish.warehouse, delta)
        level = await store.read_level(tx, wish.sku, wish.warehouse)
        assert level is not None
        return level

    async def _told_before(
        self, tx: Tx, kind: str, wish: Receipt | Adjustment, delta: int, reason: str | None = None
    ) -> Refused | None:
        """An entry is booked under this key: the very same one is no news, another one is refused."""
        booked = await store.booked(tx, kind, wish.key)
        assert booked is not None
        return _same(booked, wish, delta, reason)

    def _entry(
        self,
        kind: str,
        wish: Receipt | Adjustment | Count,
        delta: int,
        *,
        reason: str | None = None,
        counted: int | None = None,
    ) -> dict[str, Any]:
        return {
            "id": self._ids.next(),
            "sku": wish.sku,
            "warehouse": wish.warehouse,
            "kind": kind,
            "cause": wish.key,
            "available_delta": delta,
            "held_delta": 0,
            "sold_delta": 0,
            "actor": wish.actor,
            "at_us": self._clock.now_us(),
            "reason": reason,
            "counted": counted,
        }


def received(row: Any) -> Received:
    """An entry of the ledger as the receipt that it is."""
    return Received(
        key=row.cause,
        sku=row.sku,
        warehouse=row.warehouse,
        quantity=row.available_delta,
        actor=row.actor,
        at=rfc3339(row.at_us),
    )


def _same(booked: Any, wish: Receipt | Adjustment, delta: int, reason: str | None) -> Refused | None:
    same = (booked.sku, booked.warehouse, booked.available_delta, booked.reason)
    return None if same == (wish.sku, wish.warehouse, delta, reason) else KeyReused()


def _unknown(sku: str) -> UnknownSku:
    return UnknownSku(f"there is no SKU {sku!r}; create it first with PUT /v1/skus/{sku}")
