"""Stock's counter: what the edge may ask, each verb through the group commit, each read outside of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence

from holdfast.clock import US_PER_MS, Clock
from holdfast.db.database import Database, Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.errors import HoldfastError
from holdfast.services.contracts.events import StockLocked
from holdfast.services.contracts.values import Fate
from holdfast.services.stock import shelf_store, store
from holdfast.services.stock.actions import Stock
from holdfast.services.stock.model import (
    Adjustment,
    Count,
    Level,
    Receipt,
    Received,
    Sku,
    UnknownLevel,
    UnknownSku,
    Warehouse,
    check_delta,
)
from holdfast.services.stock.needs import Orders
from holdfast.services.stock.shelves import Shelves, received
from holdfast.settings import StockSettings

SWEEP_PAGE = 500


class ShelfService:
    """What staff asks for, and what everybody may know: one call per question or order of the outside world."""

    def __init__(self, database: Database, group: GroupCommit, shelves: Shelves) -> None:
        self._database = database
        self._group = group
        self._shelves = shelves

    async def keep_sku(self, sku: Sku) -> Sku:
        """Create a SKU or change its title and price."""
        return await self._group.submit(self._shelves.keep_skus, sku)

    async def keep_warehouse(self, warehouse: Warehouse) -> Warehouse:
        """Create a warehouse or change its priority, from the next hold on."""
        return await self._group.submit(self._shelves.keep_warehouses, warehouse)

    async def warehouses(self) -> list[Warehouse]:
        """All warehouses, in the order in which they are drawn upon."""
        async with self._database.read() as tx:
            return await shelf_store.read_warehouses(tx)

    async def receive(self, receipt: Receipt) -> list[Level]:
        """Book units that came in, once per key; answers the SKU's levels. Raises `UnknownSku`, `KeyReused`."""
        await self._group.submit(self._shelves.receive, receipt)
        return await self.levels(receipt.sku)

    async def adjust(self, adjustment: Adjustment) -> Level:
        """Add units or take some away, once per key; answers the level as it is now.

        Raises `InvalidInput`, `UnknownLevel`, `LevelChanged`, `TooFewUnits`, `KeyReused`.
        """
        check_delta(adjustment.delta)
        return await self._group.submit(self._shelves.adjust, adjustment)

    async def count(self, count: Count) -> Level:
        """Book what was found on the shelf, once per key; answers the level as it is now.

        Raises `UnknownSku`, `LevelChanged`, `TooFewUnits`, `KeyReused`.
        """
        return await self._group.submit(self._shelves.count, count)

    async def level(self, sku: str, warehouse: str) -> Level:
        """One level; raises `UnknownLevel`."""
        async with self._database.read() as tx:
            found = await shelf_store.read_level(tx, sku, warehouse)
        if found is None:
            raise UnknownLevel(f"there never was a unit of SKU {sku!r} in warehouse {warehouse!r}")
        return found

    async def levels(self, sku: str | None = None) -> list[Level]:
        """The levels of one SKU (raises `UnknownSku`), or of all."""
        async with self._database.read() as tx:
            found = await shelf_store.read_levels(tx, sku)
        if sku is not None and not found:
            raise UnknownSku(f"there is no stock of SKU {sku!r}")
        return found

    async def keep_skus(self, skus: Sequence[Sku]) -> list[Sku | Exception]:
        """Create or change many SKUs; answers each, a failure in its place."""
        return await self._group.submit_all(self._shelves.keep_skus, skus)

    async def receive_all(self, receipts: Sequence[Receipt]) -> list[Exception | None]:
        """Book many receipts, each once by its key; answers for each None or why it was not booked."""
        return await self._group.submit_all(self._shelves.receive, receipts)

    async def refusals(self, receipts: Sequence[Receipt]) -> list[HoldfastError | None]:
        """Why each of these receipts would be refused now; None where it would be booked, or is already."""
        async with self._database.read() as tx:
            return await self._shelves.refusals(tx, receipts)

    async def sku_pages(self) -> AsyncIterator[list[Sku]]:
        """All SKUs, of one snapshot."""
        async with self._database.read(snapshot=True) as tx:
            async for page in shelf_store.sku_pages(tx):
                yield page

    async def level_pages(self) -> AsyncIterator[list[Level]]:
        """All levels, of one snapshot."""
        async with self._database.read(snapshot=True) as tx:
            async for page in shelf_store.level_pages(tx):
                yield page

    async def receipt_pages(self) -> AsyncIterator[list[Received]]:
        """All receipts as they were booked, of one snapshot."""
        async with self._database.read(snapshot=True) as tx:
            async for page in shelf_store.entry_pages(tx, "receive"):
                yield [received(row) for row in page]


class StockService(ShelfService):
    """The shelves, and what becomes of holds."""

    def __init__(
        self,
        database: Database,
        group: GroupCommit,
        shelves: Shelves,
        stock: Stock,
        orders: Orders,
        clock: Clock,
        settings: StockSettings,
    ) -> None:
        super().__init__(database, group, shelves)
        self._stock = stock
        self._orders = orders
        self._clock = clock
        self._settings = settings

    async def look_after(self, holds: Collection[StockLocked]) -> set[int]:
        """Give back what is still held for orders that ended or do not exist; answers the orders that are open.

        A paid order keeps its units: they are deducted by its own message or by the sweeper. Raises what asking for the
        orders raises; then nothing was given back, since unknown never means ended.
        """
        async with self._database.read() as tx:
            held = await store.still_held(tx, {hold.detail_id for hold in holds})
        order_ids = {hold.order_id for hold in holds if hold.detail_id in held}
        if not order_ids:
            return set()
        fates = await self._orders.fates(order_ids)
        ended = sorted(order_id for order_id in order_ids if fates.get(order_id, Fate.ENDED) is Fate.ENDED)
        if ended:
            await self._group.submit(self._release, ended)
        return {order_id for order_id, fate in fates.items() if fate is Fate.OPEN}

    async def sweep(self, older_than_ms: int) -> int:
        """Settle what is held for orders that are paid or ended although no message said so; answers how many.

        What is held for an order that does not exist is given back when it is older than the guard: until then the
        order may be on its way.
        """
        now_us = self._clock.now_us()
        before_us = now_us - older_than_ms * US_PER_MS
        strange_us = now_us - self._settings.guard_ms * US_PER_MS
        found = after = 0
        while True:
            async with self._database.read() as tx:
                page = await store.held_orders(tx, before_us, after, SWEEP_PAGE)
            if not page:
                return found
            after = max(page)
            fates = await self._orders.fates(page)
            strange = [
                order_id for order_id, held_us in page.items() if order_id not in fates and held_us <= strange_us
            ]
            found += await self._settle(fates, strange)

    async def settle(self, order_ids: Sequence[int]) -> int:
        """Ask what became of these orders; give back or deduct what is held for them. Answers how many have ended."""
        return await self._settle(await self._orders.fates(order_ids), [])

    async def _settle(self, fates: Mapping[int, Fate], strange: Sequence[int]) -> int:
        ended = [order_id for order_id, fate in fates.items() if fate is Fate.ENDED] + list(strange)
        paid = [order_id for order_id, fate in fates.items() if fate is Fate.PAID]
        if ended:
            await self.release(ended)
        if paid:
            await self._group.submit(self._deduct, paid)
        return len(ended) + len(paid)

    async def release(self, order_ids: Sequence[int]) -> int:
        """Give back what is still held for these orders, whatever became of them; answers how many details moved."""
        return await self._group.submit(self._release, order_ids)

    async def _release(self, tx: Tx, groups: Sequence[Sequence[int]]) -> list[HoldfastError | int]:
        return [await self._stock.release(tx, group) for group in groups]

    async def _deduct(self, tx: Tx, groups: Sequence[Sequence[int]]) -> list[HoldfastError | int]:
        return [await self._stock.deduct(tx, group) for group in groups]
