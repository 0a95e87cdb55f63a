"""Stock's counter: what the edge may ask, each verb through the group commit, each read outside of it."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.clock import US_PER_MS, Clock
from holdfast.db.database import Database, Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.errors import HoldfastError
from holdfast.services.contracts.values import Fate
from holdfast.services.stock import store
from holdfast.services.stock.actions import Stock, UnknownSku
from holdfast.services.stock.model import Level, Receipt, Sku
from holdfast.services.stock.needs import Orders

SWEEP_PAGE = 500


class StockService:
    """One call per question or order of the outside world."""

    def __init__(self, database: Database, group: GroupCommit, stock: Stock, orders: Orders, clock: Clock) -> None:
        self._database = database
        self._group = group
        self._stock = stock
        self._orders = orders
        self._clock = clock

    async def keep_sku(self, sku: Sku) -> Sku:
        """Create a SKU or change its title and price."""
        return await self._group.submit(self._stock.keep_skus, sku)

    async def receive(self, receipt: Receipt) -> list[Level]:
        """Book units that came in, once per key; answers the SKU's levels. Raises `UnknownSku`."""
        await self._group.submit(self._stock.receive, receipt)
        return await self.levels(receipt.sku)

    async def levels(self, sku: str | None = None) -> list[Level]:
        """The levels of one SKU (raises `UnknownSku`), or of all."""
        async with self._database.read() as tx:
            found = await store.read_levels(tx, sku)
        if sku is not None and not found:
            raise UnknownSku(f"there is no stock of SKU {sku!r}")
        return found

    async def sweep(self, older_than_ms: int) -> int:
        """Settle what is held for orders that are paid or ended although no message said so; answers how many."""
        before_us = self._clock.now_us() - older_than_ms * US_PER_MS
        found = after = 0
        while True:
            async with self._database.read() as tx:
                page = await store.held_orders(tx, before_us, after, SWEEP_PAGE)
            if not page:
                return found
            after = page[-1]
            found += await self.settle(page)

    async def settle(self, order_ids: Sequence[int]) -> int:
        """Ask what became of these orders; give back or deduct what is held for them. Answers how many have ended."""
        fates = await self._orders.fates(order_ids)
        ended = [order_id for order_id, fate in fates.items() if fate is Fate.ENDED]
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
