"""Carts' counter: what the edge may ask."""

from __future__ import annotations

from holdfast.db.database import Database
from holdfast.db.group_commit import GroupCommit
from holdfast.services.carts import store
from holdfast.services.carts.actions import Carts
from holdfast.services.carts.model import Item, PutItem


class CartService:
    """One call per wish or question."""

    def __init__(self, database: Database, group: GroupCommit, carts: Carts) -> None:
        self._database = database
        self._group = group
        self._carts = carts

    async def put(self, wish: PutItem) -> list[Item]:
        """Let a buyer's cart hold so many units of a SKU; answers the cart. Raises `CartFull`."""
        return await self._group.submit(self._carts.put, wish)

    async def read(self, buyer: str) -> list[Item]:
        """What is in a buyer's cart, in order of SKU."""
        async with self._database.read() as tx:
            return await store.read(tx, buyer)
