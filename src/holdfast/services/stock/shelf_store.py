"""SQL of the shelves: SKUs, warehouses, levels as staff sees them, and entries of the ledger that staff makes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any

import msgspec
from sqlalchemy import select, tuple_, update

from holdfast.db.database import Tx
from holdfast.db.prepared import insert
from holdfast.services.stock.model import Level, Sku, Warehouse
from holdfast.services.stock.store import ledger, levels, skus, warehouses

PRIORITY = 100  # of a warehouse, unless somebody says otherwise
PAGE = 1_000


async def keep_sku(tx: Tx, sku: Sku, now_us: int) -> None:
    """Write a SKU, new or changed."""
    values = msgspec.structs.asdict(sku) | {"changed_us": now_us}
    statement = insert(tx.dialect, skus).values(**values)
    await tx.execute(statement.on_conflict_do_update(index_elements=["sku"], set_=values))


async def known_skus(tx: Tx, wanted: Collection[str]) -> set[str]:
    """Those of the SKUs that exist."""
    return set((await tx.execute(select(skus.c.sku).where(skus.c.sku.in_(sorted(wanted))))).scalars())


async def sku_pages(tx: Tx) -> AsyncIterator[list[Sku]]:
    """All SKUs in order, page by page."""
    after = ""
    chosen = select(*(skus.c[name] for name in Sku.__struct_fields__))
    while True:
        rows = await tx.execute(chosen.where(skus.c.sku > after).order_by(skus.c.sku).limit(PAGE))
        page = [Sku(**row._mapping) for row in rows]
        if not page:
            return
        yield page
        after = page[-1].sku


async def write_warehouse(tx: Tx, warehouse: Warehouse) -> None:
    """Write a warehouse, new or changed."""
    statement = insert(tx.dialect, warehouses).values(code=warehouse.code, priority=warehouse.priority)
    changed = {"priority": warehouse.priority}
    await tx.execute(statement.on_conflict_do_update(index_elements=["code"], set_=changed))


async def keep_warehouse(tx: Tx, code: str) -> None:
    """Make a warehouse exist."""
    await tx.execute(insert(tx.dialect, warehouses).values(code=code, priority=PRIORITY).on_conflict_do_nothing())


async def read_warehouses(tx: Tx) -> list[Warehouse]:
    """All warehouses in the order in which they are drawn upon."""
    chosen = select(warehouses.c.code, warehouses.c.priority).order_by(warehouses.c.priority, warehouses.c.code)
    return [Warehouse(**row._mapping) for row in await tx.execute(chosen)]


async def read_levels(tx: Tx, sku: str | None) -> list[Level]:
    """The levels of one SKU, or of all."""
    statement = select(levels).order_by(levels.c.sku, levels.c.warehouse)
    if sku is not None:
        statement = statement.where(levels.c.sku == sku)
    return [Level(**row._mapping) for row in await tx.execute(statement)]


async def level_pages(tx: Tx) -> AsyncIterator[list[Level]]:
    """All levels in order of SKU and warehouse, page by page."""
    after = ("", "")
    place = tuple_(levels.c.sku, levels.c.warehouse)
    while True:
        chosen = select(levels).where(place > after).order_by(levels.c.sku, levels.c.warehouse).limit(PAGE)
        page = [Level(**row._mapping) for row in await tx.execute(chosen)]
        if not page:
            return
        yield page
        after = (page[-1].sku, page[-1].warehouse)


async def read_level(tx: Tx, sku: str, warehouse: str) -> Level | None:
    """One level."""
    return await _one_level(tx, sku, warehouse, lock=False)


async def lock_level(tx: Tx, sku: str, warehouse: str) -> Level | None:
    """Lock one level and read it."""
    return await _one_level(tx, sku, warehouse, lock=True)


async def lock_levels(tx: Tx, wanted: Collection[str]) -> None:
    """Lock the levels of these SKUs in the written order: before somebody locks them one by one in another."""
    chosen = select(levels.c.sku).where(levels.c.sku.in_(sorted(wanted))).order_by(levels.c.sku, levels.c.warehouse)
    await tx.execute(chosen.with_for_update())


async def open_level(tx: Tx, sku: str, warehouse: str) -> None:
    """Make a level exist, without units."""
    await keep_warehouse(tx, warehouse)
    nothing = {"available": 0, "held": 0, "sold": 0, "total": 0, "version": 0}
    statement = insert(tx.dialect, levels).values(sku=sku, warehouse=warehouse, **nothing)
    await tx.execute(statement.on_conflict_do_nothing(index_elements=["sku", "warehouse"]))


async def add_units(tx: Tx, sku: str, warehouse: str, quantity: int) -> None:
    """Add units to a level that exists, or take some away; the CHECKs refuse a counter below zero."""
    await tx.execute(
        update(levels)
        .where(levels.c.sku == sku, levels.c.warehouse == warehouse)
        .values(available=levels.c.available + quantity, total=levels.c.total + quantity, version=levels.c.version + 1)
    )


async def book_once(tx: Tx, entry: Mapping[str, Any]) -> bool:
    """Write an entry of the ledger; says if it is new by its kind and cause."""
    booked = insert(tx.dialect, ledger).values(**entry).on_conflict_do_nothing(index_elements=["kind", "cause"])
    return (await tx.execute(booked)).rowcount == 1


async def booked(tx: Tx, kind: str, cause: str) -> Any | None:
    """The entry of this kind and cause."""
    found = select(ledger).where(ledger.c.kind == kind, ledger.c.cause == cause)
    return (await tx.execute(found)).one_or_none()


async def booked_among(tx: Tx, kind: str, causes: Collection[str]) -> dict[str, Any]:
    """The entries of this kind, by their cause."""
    found = select(ledger).where(ledger.c.kind == kind, ledger.c.cause.in_(sorted(causes)))
    return {row.cause: row for row in await tx.execute(found)}


async def entry_pages(tx: Tx, kind: str) -> AsyncIterator[list[Any]]:
    """The ledger's entries of a kind in order of id, page by page."""
    after = 0
    while True:
        chosen = select(ledger).where(ledger.c.kind == kind, ledger.c.id > after).order_by(ledger.c.id).limit(PAGE)
        page = list(await tx.execute(chosen))
        if not page:
            return
        yield page
        after = page[-1].id


async def _one_level(tx: Tx, sku: str, warehouse: str, *, lock: bool) -> Level | None:
    chosen = select(levels).where(levels.c.sku == sku, levels.c.warehouse == warehouse)
    row = (await tx.execute(chosen.with_for_update() if lock else chosen)).one_or_none()
    return None if row is None else Level(**row._mapping)
