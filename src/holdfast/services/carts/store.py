"""Carts' table and SQL."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import BigInteger, CheckConstraint, Column, Table, Text, bindparam, delete, func, select

from holdfast.db.database import Tx
from holdfast.db.prepared import Prepared, among, insert
from holdfast.services.carts.model import Item
from holdfast.services.contracts.values import Line
from holdfast.services.schema import metadata

items = Table(
    "cart_item",
    metadata,
    Column("buyer", Text, primary_key=True),
    Column("sku", Text, primary_key=True),
    Column("quantity", BigInteger, nullable=False),
    Column("changed_us", BigInteger, nullable=False),
    CheckConstraint("quantity > 0", name="quantity"),
)

_CONTENTS = Prepared(
    lambda dialect: (
        select(items.c.buyer, items.c.sku, items.c.quantity)
        .where(among(dialect, items.c.buyer, "buyers"))
        .order_by(items.c.buyer, items.c.sku)
    )
)
_TAKE_OUT = Prepared(
    lambda dialect: (
        delete(items)
        .where(items.c.buyer == bindparam("of_buyer"), among(dialect, items.c.sku, "skus"))
        .returning(items.c.sku)
    )
)


async def contents(tx: Tx, buyers: Collection[str]) -> dict[str, list[Line]]:
    """The lines in these buyers' carts, in order of SKU."""
    found: dict[str, list[Line]] = {}
    for row in await _CONTENTS.rows(tx, buyers=sorted(buyers)):
        found.setdefault(row.buyer, []).append(Line(sku=row.sku, quantity=row.quantity))
    return found


async def read(tx: Tx, buyer: str) -> list[Item]:
    """What is in a buyer's cart, in order of SKU."""
    return [Item(sku=line.sku, quantity=line.quantity) for line in (await contents(tx, [buyer])).get(buyer, [])]


async def put(tx: Tx, buyer: str, sku: str, quantity: int, now_us: int) -> None:
    """Let there be so many units of a SKU."""
    values = {"quantity": quantity, "changed_us": now_us}
    row = insert(tx.dialect, items).values(buyer=buyer, sku=sku, **values)
    await tx.execute(row.on_conflict_do_update(index_elements=["buyer", "sku"], set_=values))


async def count(tx: Tx, buyer: str) -> int:
    """How many different SKUs are in a buyer's cart."""
    found = await tx.execute(select(func.count()).select_from(items).where(items.c.buyer == buyer))
    return int(found.scalar_one())


async def take_out(tx: Tx, buyer: str, skus: Collection[str]) -> None:
    """Take SKUs out of a buyer's cart; what is not in it does not matter."""
    await _TAKE_OUT.rows(tx, of_buyer=buyer, skus=sorted(skus))
