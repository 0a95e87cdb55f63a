"""Stock's counter: what the edge may ask, each verb through the group commit, each read outside of it."""

from __future__ import annotations

from holdfast.db.database import Database
from holdfast.db.group_commit import GroupCommit
from holdfast.services.stock import store
from holdfast.services.stock.actions import Stock, UnknownSku
from holdfast.services.stock.model import Level, Receipt, Sku


class StockService:
    """One call per question or order of the outside world."""

    def __init__(self, database: Database, group: GroupCommit, stock: Stock) -> None:
        self._database = database
        self._group = group
        self._stock = stock

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
