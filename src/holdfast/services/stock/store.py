"""Stock's tables and SQL."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Executable,
    Index,
    Integer,
    Table,
    Text,
    UniqueConstraint,
    bindparam,
    select,
    update,
)

from holdfast.db.database import Dialect, Tx
from holdfast.db.prepared import InsertAll, Prepared, among, insert
from holdfast.services.contracts.values import Price
from holdfast.services.schema import metadata
from holdfast.services.stock.model import HELD, Level

warehouses = Table(
    "stock_warehouse",
    metadata,
    Column("code", Text, primary_key=True),
    Column("priority", Integer, nullable=False),  # the lowest is drawn upon first
)

skus = Table(
    "stock_sku",
    metadata,
    Column("sku", Text, primary_key=True),
    Column("title", Text, nullable=False),
    Column("price_minor", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    Column("order_max", BigInteger),
    Column("buyer_max", BigInteger),
    Column("time_out_ms", BigInteger),
    Column("changed_us", BigInteger, nullable=False),
    CheckConstraint("price_minor >= 0", name="price"),
)

# The counters; the details and the ledger say the same, and `holdfast verify` compares the three.
levels = Table(
    "stock_level",
    metadata,
    Column("sku", Text, primary_key=True),
    Column("warehouse", Text, primary_key=True),
    Column("available", BigInteger, nullable=False),
    Column("held", BigInteger, nullable=False),
    Column("sold", BigInteger, nullable=False),
    Column("total", BigInteger, nullable=False),
    CheckConstraint("available >= 0 AND held >= 0 AND sold >= 0", name="never_negative"),
    CheckConstraint("available + held + sold = total", name="sums_up"),
)

# The work order: one header per order, a detail per SKU and warehouse.
tasks = Table(
    "stock_task",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("order_id", BigInteger, nullable=False, unique=True),
    Column("created_us", BigInteger, nullable=False),
)

details = Table(
    "stock_task_detail",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("task_id", BigInteger, nullable=False),
    Column("order_id", BigInteger, nullable=False),
    Column("sku", Text, nullable=False),
    Column("warehouse", Text, nullable=False),
    Column("quantity", BigInteger, nullable=False),
    Column("status", Integer, nullable=False),
    Column("changed_us", BigInteger, nullable=False),
    CheckConstraint("quantity > 0", name="quantity"),
    CheckConstraint("status IN (1, 2, 3)", name="status"),
)
Index("ix_stock_task_detail_order_id", details.c.order_id)
Index(
    "ix_stock_task_detail_held",
    details.c.order_id,
    sqlite_where=details.c.status == HELD,
    postgresql_where=details.c.status == HELD,
)

# Append-only. `cause` names what moved the units; with the kind it is unique, so no movement is booked twice.
ledger = Table(
    "stock_ledger",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("sku", Text, nullable=False),
    Column("warehouse", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("cause", Text, nullable=False),
    Column("available_delta", BigInteger, nullable=False),
    Column("held_delta", BigInteger, nullable=False),
    Column("sold_delta", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Column("at_us", BigInteger, nullable=False),
    CheckConstraint("kind IN ('receive', 'reserve', 'release', 'deduct')", name="kind"),
    UniqueConstraint("kind", "cause", name="uq_stock_ledger_kind_cause"),
)


insert_tasks = InsertAll(tasks)
insert_details = InsertAll(details)
insert_entries = InsertAll(ledger)


def _lock_levels(dialect: Dialect) -> Executable:
    # Locked in one written order (SKU, warehouse), whoever comes: so two batches never wait for each other in a ring.
    return (
        select(levels.c.sku, levels.c.warehouse, levels.c.available, warehouses.c.priority)
        .join(warehouses, warehouses.c.code == levels.c.warehouse)
        .where(among(dialect, levels.c.sku, "skus"))
        .order_by(levels.c.sku, levels.c.warehouse)
        .with_for_update(of=levels)
    )


def _shift_levels(_: Dialect) -> Executable:
    return (
        update(levels)
        .where(levels.c.sku == bindparam("of_sku"), levels.c.warehouse == bindparam("of_warehouse"))
        .values(
            available=levels.c.available + bindparam("by_available", type_=BigInteger),
            held=levels.c.held + bindparam("by_held", type_=BigInteger),
            sold=levels.c.sold + bindparam("by_sold", type_=BigInteger),
        )
    )


def _move_details(dialect: Dialect) -> Executable:
    held = (
        select(details.c.id)
        .where(among(dialect, details.c.order_id, "order_ids"), details.c.status == bindparam("held"))
        .order_by(details.c.id)
        .with_for_update()
        .cte("held_details")
    )
    return (
        update(details)
        .where(details.c.id.in_(select(held.c.id)), details.c.status == bindparam("held"))
        .values(status=bindparam("to_status"), changed_us=bindparam("now_us"))
        .returning(details.c.id, details.c.order_id, details.c.sku, details.c.warehouse, details.c.quantity)
    )


_LOCK_LEVELS = Prepared(_lock_levels)
_SHIFT_LEVELS = Prepared(_shift_levels)
_MOVE_DETAILS = Prepared(_move_details)
_IN_STATE = Prepared(
    lambda dialect: (
        select(details.c.order_id)
        .where(among(dialect, details.c.order_id, "order_ids"), details.c.status == bindparam("state"))
        .distinct()
    )
)
_HELD_ORDERS = Prepared(
    lambda _: (
        select(details.c.order_id)
        .where(
            details.c.status == bindparam("held"),
            details.c.changed_us < bindparam("before_us"),
            details.c.order_id > bindparam("after"),
        )
        .distinct()
        .order_by(details.c.order_id)
        .limit(bindparam("room", type_=BigInteger))
    )
)
_PRICES = Prepared(
    lambda dialect: select(
        skus.c.sku, skus.c.price_minor, skus.c.currency, skus.c.order_max, skus.c.buyer_max, skus.c.time_out_ms
    ).where(among(dialect, skus.c.sku, "skus"))
)


async def lock_levels(tx: Tx, wanted: Collection[str]) -> Sequence[Any]:
    """Lock the levels of these SKUs and return them in the order in which warehouses are drawn upon."""
    rows = await _LOCK_LEVELS.rows(tx, skus=sorted(wanted))
    return sorted(rows, key=lambda row: (row.sku, row.priority, row.warehouse))


async def shift_levels(tx: Tx, shifts: Mapping[tuple[str, str], tuple[int, int, int]]) -> None:
    """Add (available, held, sold) to each level; the CHECKs refuse a counter below zero and void the transaction."""
    rows = [
        {"of_sku": sku, "of_warehouse": warehouse, "by_available": by[0], "by_held": by[1], "by_sold": by[2]}
        for (sku, warehouse), by in sorted(shifts.items())
    ]
    await _SHIFT_LEVELS.many(tx, rows)


async def move_details(tx: Tx, order_ids: Collection[int], to: int, now_us: int) -> Sequence[Any]:
    """Move the held details of these orders to another state and return them; one that moved before does not move."""
    return await _MOVE_DETAILS.rows(tx, order_ids=sorted(order_ids), held=HELD, to_status=to, now_us=now_us)


async def orders_in_state(tx: Tx, order_ids: Collection[int], state: int) -> set[int]:
    """Those of the orders that have a detail in this state."""
    return {row.order_id for row in await _IN_STATE.rows(tx, order_ids=sorted(order_ids), state=state)}


async def held_orders(tx: Tx, before_us: int, after: int, limit: int) -> list[int]:
    """Orders with units held since before an instant, in order of id, after the given one."""
    rows = await _HELD_ORDERS.rows(tx, held=HELD, before_us=before_us, after=after, room=limit)
    return [row.order_id for row in rows]


async def read_prices(tx: Tx, wanted: Collection[str]) -> dict[str, Price]:
    """The prices of those SKUs that exist."""
    rows = await _PRICES.rows(tx, skus=sorted(wanted))
    return {
        row.sku: Price(
            amount_minor=row.price_minor,
            currency=row.currency,
            order_max=row.order_max,
            buyer_max=row.buyer_max,
            time_out_ms=row.time_out_ms,
        )
        for row in rows
    }


async def keep_warehouse(tx: Tx, code: str) -> None:
    """Make a warehouse exist; its priority is 100 unless somebody says otherwise."""
    await tx.execute(insert(tx.dialect, warehouses).values(code=code, priority=100).on_conflict_do_nothing())


async def read_levels(tx: Tx, sku: str | None) -> list[Level]:
    """The levels of one SKU, or of all."""
    statement = select(levels).order_by(levels.c.sku, levels.c.warehouse)
    if sku is not None:
        statement = statement.where(levels.c.sku == sku)
    return [Level(**row._mapping) for row in await tx.execute(statement)]
