"""Orders' tables and SQL."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Executable,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    UniqueConstraint,
    and_,
    bindparam,
    func,
    literal_column,
    or_,
    select,
    update,
)

from holdfast.clock import rfc3339
from holdfast.db.database import Dialect, Tx
from holdfast.db.prepared import InsertAll, Prepared, among
from holdfast.services.contracts.values import PaymentRef
from holdfast.services.orders.model import (
    ENDED_UNPAID,
    Entry,
    OrderStatus,
    OrderView,
    PlaceRequest,
    PricedLine,
    view,
)
from holdfast.services.schema import metadata

_STATES = ", ".join(f"'{status}'" for status in OrderStatus)

orders = Table(
    "order_order",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("buyer", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    Column("payment", Text, nullable=False),  # the payment reference as placed, JSON
    Column("pay_by_us", BigInteger, nullable=False),
    Column("refunded_minor", BigInteger, nullable=False),
    Column("tracking", Text),
    Column("complete_by_us", BigInteger),
    Column("created_us", BigInteger, nullable=False),
    Column("changed_us", BigInteger, nullable=False),
    CheckConstraint(f"status IN ({_STATES})", name="status"),
    CheckConstraint("amount_minor >= 0", name="amount"),
    CheckConstraint("0 <= refunded_minor AND refunded_minor <= amount_minor", name="refunded"),
)
Index("ix_order_order_buyer", orders.c.buyer, orders.c.id)
# The timer of record: the sweeper finds by it what no message came for.
Index(
    "ix_order_order_due",
    orders.c.pay_by_us,
    sqlite_where=orders.c.status == OrderStatus.PENDING_PAYMENT.value,
    postgresql_where=orders.c.status == OrderStatus.PENDING_PAYMENT.value,
)

Index(
    "ix_order_order_arriving",
    orders.c.complete_by_us,
    sqlite_where=orders.c.status == OrderStatus.SHIPPED.value,
    postgresql_where=orders.c.status == OrderStatus.SHIPPED.value,
)

lines = Table(
    "order_line",
    metadata,
    Column("order_id", BigInteger, primary_key=True, autoincrement=False),
    Column("line_no", Integer, primary_key=True, autoincrement=False),
    Column("sku", Text, nullable=False),
    Column("quantity", BigInteger, nullable=False),
    Column("price_minor", BigInteger, nullable=False),
    CheckConstraint("quantity > 0", name="quantity"),
)

# One row per transition; an order enters a state at most once.
log = Table(
    "order_log",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("order_id", BigInteger, nullable=False),
    Column("from_status", Text),
    Column("to_status", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("note", Text, nullable=False),
    Column("at_us", BigInteger, nullable=False),
    UniqueConstraint("order_id", "to_status", name="uq_order_log_order_id_to_status"),
)

# The answer given under an idempotency key, kept as long as its order.
replies = Table(
    "order_reply",
    metadata,
    Column("key", Text, primary_key=True),
    Column("buyer", Text, primary_key=True),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("order_id", BigInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("created_us", BigInteger, nullable=False),
)


insert_orders = InsertAll(orders)
insert_lines = InsertAll(lines)
insert_entries = InsertAll(log)
insert_replies = InsertAll(replies)


def _lock(dialect: Dialect) -> Executable:
    chosen = select(
        orders.c.id,
        orders.c.buyer,
        orders.c.status,
        orders.c.pay_by_us,
        orders.c.created_us,
        orders.c.complete_by_us,
    )
    return chosen.where(among(dialect, orders.c.id, "order_ids")).order_by(orders.c.id).with_for_update()


def _move(dialect: Dialect) -> Executable:
    return (
        update(orders)
        .where(among(dialect, orders.c.id, "order_ids"), orders.c.status == bindparam("came"))
        .values(status=bindparam("to_status"), changed_us=bindparam("now_us"))
        .returning(orders.c.id)
    )


def _bought(dialect: Dialect) -> Executable:
    live = [status.value for status in OrderStatus if status not in (*ENDED_UNPAID, OrderStatus.REFUNDED)]
    return (
        select(orders.c.buyer, lines.c.sku, func.sum(lines.c.quantity).label("units"))
        .join(lines, lines.c.order_id == orders.c.id)
        .where(among(dialect, orders.c.buyer, "buyers"), among(dialect, lines.c.sku, "skus"))
        .where(or_(*(orders.c.status == literal_column(f"'{status}'") for status in live)))
        .group_by(orders.c.buyer, lines.c.sku)
    )


_BOUGHT = Prepared(_bought)
_MARK_SHIPPED = Prepared(
    lambda _: (
        update(orders)
        .where(orders.c.id == bindparam("order_id"))
        .values(tracking=bindparam("by_tracking"), complete_by_us=bindparam("until_us"))
    )
)
_MARK_REFUNDED = Prepared(
    lambda _: (
        update(orders)
        .where(orders.c.id == bindparam("order_id"), orders.c.refunded_minor < bindparam("given"))
        .values(refunded_minor=bindparam("given"), changed_us=bindparam("now_us"))
    )
)
_SET_DEADLINE = Prepared(
    lambda _: (
        update(orders)
        .where(orders.c.id == bindparam("order_id"))
        .values(pay_by_us=bindparam("until_us"), payment=bindparam("reference"), changed_us=bindparam("now_us"))
    )
)
_LOCK = Prepared(_lock)
_MOVE = Prepared(_move)
_REPLIES = Prepared(lambda dialect: select(replies).where(among(dialect, replies.c.key, "keys")))
_ORDERS = Prepared(lambda dialect: select(orders).where(among(dialect, orders.c.id, "order_ids")))
_ORDERS_OF = Prepared(
    lambda dialect: select(orders).where(
        among(dialect, orders.c.id, "order_ids"), orders.c.buyer == bindparam("of_buyer")
    )
)
_BUYERS_OF = Prepared(
    lambda dialect: select(orders.c.id, orders.c.buyer).where(among(dialect, orders.c.id, "order_ids"))
)
_STATES_OF = Prepared(
    lambda dialect: select(orders.c.id, orders.c.status).where(among(dialect, orders.c.id, "order_ids"))
)
_LINES = Prepared(
    lambda dialect: (
        select(lines).where(among(dialect, lines.c.order_id, "order_ids")).order_by(lines.c.order_id, lines.c.line_no)
    )
)
_DEADLINE = Prepared(lambda _: select(orders.c.status, orders.c.pay_by_us).where(orders.c.id == bindparam("order_id")))


async def stored_replies(tx: Tx, requests: Sequence[PlaceRequest]) -> dict[tuple[str, str], Any]:
    """The answers given before, by (buyer, key)."""
    keys = {request.idempotency_key for request in requests}
    return {(row.buyer, row.key): row for row in await _REPLIES.rows(tx, keys=keys)}


async def lock_orders(tx: Tx, order_ids: Collection[int]) -> dict[int, Any]:
    """Lock these orders, in order of id, and read what decides about them: buyer, status and deadline."""
    return {row.id: row for row in await _LOCK.rows(tx, order_ids=sorted(order_ids))}


async def move(tx: Tx, order_ids: Collection[int], came: OrderStatus, to: OrderStatus, now_us: int) -> list[int]:
    """Move orders from one state to another in one conditional UPDATE; answers those that moved."""
    rows = await _MOVE.rows(tx, order_ids=sorted(order_ids), came=came.value, to_status=to.value, now_us=now_us)
    return sorted(row.id for row in rows)


async def read_views(tx: Tx, order_ids: Collection[int], buyer: str | None) -> dict[int, OrderView]:
    """Orders as their buyer sees them; with a buyer, only his."""
    ids = sorted(order_ids)
    if buyer is None:
        found = await _ORDERS.rows(tx, order_ids=ids)
    else:
        found = await _ORDERS_OF.rows(tx, order_ids=ids, of_buyer=buyer)
    priced: dict[int, list[PricedLine]] = {row.id: [] for row in found}
    for row in await _LINES.rows(tx, order_ids=list(priced)):
        priced[row.order_id].append(PricedLine(sku=row.sku, quantity=row.quantity, price_minor=row.price_minor))
    return {
        row.id: view(
            row.id,
            OrderStatus(row.status),
            tuple(priced[row.id]),
            row.amount_minor,
            row.currency,
            row.created_us,
            row.pay_by_us,
            msgspec.json.decode(row.payment, type=PaymentRef),
            row.refunded_minor,
            row.tracking,
            row.complete_by_us,
        )
        for row in found
    }


async def bought(tx: Tx, buyers: Collection[str], skus: Collection[str]) -> dict[tuple[str, str], int]:
    """(buyer, SKU) -> units in orders that are open or paid."""
    rows = await _BOUGHT.rows(tx, buyers=sorted(buyers), skus=sorted(skus))
    return {(row.buyer, row.sku): int(row.units) for row in rows}


async def mark_shipped(tx: Tx, trackings: Mapping[int, str], complete_by_us: int) -> None:
    """Note how orders travel, and when they complete by themselves."""
    rows = [
        {"order_id": order_id, "by_tracking": tracking, "until_us": complete_by_us}
        for order_id, tracking in trackings.items()
    ]
    await _MARK_SHIPPED.many(tx, rows)


async def mark_refunded(tx: Tx, given: Mapping[int, int], now_us: int) -> None:
    """Note how much of orders' money was given back; a smaller sum is older news."""
    rows = [{"order_id": order_id, "given": amount, "now_us": now_us} for order_id, amount in given.items()]
    await _MARK_REFUNDED.many(tx, rows)


async def set_deadlines(tx: Tx, deadlines: Mapping[int, int], payments: Mapping[int, PaymentRef], now_us: int) -> None:
    """Give orders another deadline, and the payment reference that goes with it."""
    rows = [
        {
            "order_id": order_id,
            "until_us": pay_by_us,
            "reference": msgspec.json.encode(payments[order_id]).decode(),
            "now_us": now_us,
        }
        for order_id, pay_by_us in deadlines.items()
    ]
    await _SET_DEADLINE.many(tx, rows)


async def read_log(tx: Tx, order_id: int) -> list[Entry]:
    """What happened to an order, the oldest first."""
    found = await tx.execute(select(log).where(log.c.order_id == order_id).order_by(log.c.id))
    return [
        Entry(
            at=rfc3339(row.at_us),
            from_status=OrderStatus(row.from_status) if row.from_status else None,
            to_status=OrderStatus(row.to_status),
            actor=row.actor,
            note=row.note,
        )
        for row in found
    ]


async def page_of_ids(
    tx: Tx, *, buyer: str | None, status: OrderStatus | None, before: int, limit: int
) -> Sequence[int]:
    """Ids of orders below the given one, the newest first; with a buyer, only his."""
    wanted = select(orders.c.id).where(orders.c.id < before)
    if buyer is not None:
        wanted = wanted.where(orders.c.buyer == buyer)
    if status is not None:
        wanted = wanted.where(orders.c.status == status.value)
    return (await tx.execute(wanted.order_by(orders.c.id.desc()).limit(limit))).scalars().all()


async def arriving(tx: Tx, now_us: int, limit: int) -> Sequence[int]:
    """Shipped orders whose delivery time is over."""
    overdue_ones = (
        select(orders.c.id)
        .where(orders.c.status == OrderStatus.SHIPPED.value, orders.c.complete_by_us <= now_us)
        .order_by(orders.c.complete_by_us)
        .limit(limit)
    )
    return (await tx.execute(overdue_ones)).scalars().all()


async def overdue(tx: Tx, now_us: int, after: tuple[int, int], limit: int) -> Sequence[tuple[int, int]]:
    """(pay by, id) of orders whose time to pay is over and that still wait, in that order, after the given one."""
    statement = (
        select(orders.c.pay_by_us, orders.c.id)
        .where(
            orders.c.status == OrderStatus.PENDING_PAYMENT.value,
            orders.c.pay_by_us <= now_us,
            or_(orders.c.pay_by_us > after[0], and_(orders.c.pay_by_us == after[0], orders.c.id > after[1])),
        )
        .order_by(orders.c.pay_by_us, orders.c.id)
        .limit(limit)
    )
    return [(row.pay_by_us, row.id) for row in await tx.execute(statement)]


async def states(tx: Tx, order_ids: Collection[int]) -> dict[int, OrderStatus]:
    """Where these orders are."""
    return {row.id: OrderStatus(row.status) for row in await _STATES_OF.rows(tx, order_ids=sorted(order_ids))}


async def buyers(tx: Tx, order_ids: Collection[int]) -> dict[int, str]:
    """Whose these orders are."""
    return {row.id: row.buyer for row in await _BUYERS_OF.rows(tx, order_ids=sorted(order_ids))}


async def deadline(tx: Tx, order_id: int) -> tuple[OrderStatus, int] | None:
    """(status, pay by) of an order."""
    rows = await _DEADLINE.rows(tx, order_id=order_id)
    return (OrderStatus(rows[0].status), rows[0].pay_by_us) if rows else None
