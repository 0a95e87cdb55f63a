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
    func,
    select,
    update,
)

from holdfast.db.database import Dialect, Tx
from holdfast.db.prepared import InsertAll, Prepared, among, insert
from holdfast.services.contracts.values import Price
from holdfast.services.schema import metadata
from holdfast.services.stock.model import HELD, RELEASED, Hold

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
    Column("version", BigInteger, nullable=False),  # raised by every change: the level's ETag
    CheckConstraint("available >= 0 AND held >= 0 AND sold >= 0", name="never_negative"),
    CheckConstraint("available + held + sold = total", name="sums_up"),
)

# The work order: one header per order, a detail per SKU and warehouse. A header without details belongs to an order
# that gave its stock back before it asked for any.
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

# Parts of orders that moved on by themselves, each once by its key.
parts = Table(
    "stock_part",
    metadata,
    Column("order_id", BigInteger, primary_key=True, autoincrement=False),
    Column("key", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("lines", Text, nullable=False),  # SKU -> units, JSON in order of SKU
    Column("at_us", BigInteger, nullable=False),
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
    Column("reason", Text),
    Column("counted", BigInteger),  # what a count found
    CheckConstraint("kind IN ('receive', 'reserve', 'release', 'deduct', 'split', 'adjust', 'count')", name="kind"),
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
            version=levels.c.version + 1,
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
_ASKED_BEFORE = Prepared(lambda dialect: select(tasks.c.order_id).where(among(dialect, tasks.c.order_id, "order_ids")))
_DETAILS_OF = Prepared(
    lambda dialect: select(details.c.order_id, details.c.sku, details.c.quantity, details.c.status).where(
        among(dialect, details.c.order_id, "order_ids")
    )
)
_LOCK_HELD = Prepared(
    lambda _: (
        select(details)
        .where(details.c.order_id == bindparam("of_order"), details.c.status == bindparam("held"))
        .order_by(details.c.id)
        .with_for_update()
    )
)
_MOVE_SOME = Prepared(
    lambda dialect: (
        update(details)
        .where(among(dialect, details.c.id, "detail_ids"), details.c.status == bindparam("held"))
        .values(status=bindparam("to_status"), changed_us=bindparam("now_us"))
    )
)
_SHRINK = Prepared(
    lambda _: (
        update(details)
        .where(details.c.id == bindparam("of_detail"), details.c.status == HELD)
        .values(quantity=details.c.quantity - bindparam("by", type_=BigInteger))
    )
)
_IN_STATE = Prepared(
    lambda dialect: (
        select(details.c.order_id)
        .where(among(dialect, details.c.order_id, "order_ids"), details.c.status == bindparam("state"))
        .distinct()
    )
)
_STILL_HELD = Prepared(
    lambda dialect: select(details.c.id).where(
        among(dialect, details.c.id, "detail_ids"), details.c.status == bindparam("held")
    )
)
_HELD_ORDERS = Prepared(
    lambda _: (
        select(details.c.order_id, func.max(details.c.changed_us).label("held_us"))
        .where(
            details.c.status == bindparam("held"),
            details.c.changed_us < bindparam("before_us"),
            details.c.order_id > bindparam("after"),
        )
        .group_by(details.c.order_id)
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


async def holds(tx: Tx, order_ids: Collection[int]) -> dict[int, Hold]:
    """What those of the orders were given that asked for stock, or gave it back, before."""
    asked = [row.order_id for row in await _ASKED_BEFORE.rows(tx, order_ids=sorted(order_ids))]
    if not asked:
        return {}
    lines: dict[int, dict[str, int]] = {order_id: {} for order_id in asked}
    alive: set[int] = set()
    for row in await _DETAILS_OF.rows(tx, order_ids=asked):
        of_order = lines[row.order_id]
        of_order[row.sku] = of_order.get(row.sku, 0) + row.quantity
        if row.status != RELEASED:
            alive.add(row.order_id)
    return {order_id: Hold(lines=of_order, ended=order_id not in alive) for order_id, of_order in lines.items()}


async def close_doors(tx: Tx, rows: Sequence[Mapping[str, Any]]) -> set[int]:
    """Write headers without details for orders that have none; answers those orders."""
    statement = insert(tx.dialect, tasks).values(rows).on_conflict_do_nothing(index_elements=["order_id"])
    return set((await tx.execute(statement.returning(tasks.c.order_id))).scalars())


async def lock_held(tx: Tx, order_id: int) -> dict[int, Any]:
    """Lock the held details of an order, in order of id, and return them by id."""
    return {row.id: row for row in await _LOCK_HELD.rows(tx, of_order=order_id, held=HELD)}


async def move_some(tx: Tx, detail_ids: Collection[int], to: int, now_us: int) -> None:
    """Move these held details, which are locked, to another state."""
    await _MOVE_SOME.rows(tx, detail_ids=sorted(detail_ids), held=HELD, to_status=to, now_us=now_us)


async def shrink(tx: Tx, by: Mapping[int, int]) -> None:
    """Take units out of held details, which are locked."""
    await _SHRINK.many(tx, [{"of_detail": detail_id, "by": quantity} for detail_id, quantity in sorted(by.items())])


async def part_before(tx: Tx, part: Mapping[str, Any]) -> Any | None:
    """Note that a part moves on under its key; answers what was noted there before, None if nothing was."""
    noted = insert(tx.dialect, parts).values(**part).on_conflict_do_nothing(index_elements=["order_id", "key"])
    if (await tx.execute(noted)).rowcount:
        return None
    same = select(parts).where(parts.c.order_id == part["order_id"], parts.c.key == part["key"])
    return (await tx.execute(same)).one()


async def orders_in_state(tx: Tx, order_ids: Collection[int], state: int) -> set[int]:
    """Those of the orders that have a detail in this state."""
    return {row.order_id for row in await _IN_STATE.rows(tx, order_ids=sorted(order_ids), state=state)}


async def still_held(tx: Tx, detail_ids: Collection[int]) -> set[int]:
    """Those of the details that are held."""
    return {row.id for row in await _STILL_HELD.rows(tx, detail_ids=sorted(detail_ids), held=HELD)}


async def held_orders(tx: Tx, before_us: int, after: int, limit: int) -> dict[int, int]:
    """Orders with units held since before an instant -> since when, in order of id, after the given one."""
    rows = await _HELD_ORDERS.rows(tx, held=HELD, before_us=before_us, after=after, room=limit)
    return {row.order_id: row.held_us for row in rows}


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
