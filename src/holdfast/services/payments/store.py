"""Payments' tables and SQL."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Index,
    Integer,
    LargeBinary,
    Row,
    Select,
    Table,
    Text,
    select,
    update,
)

from holdfast.db.database import Tx
from holdfast.db.sql import among
from holdfast.services.payments.model import ENDED, NOT_SUBMITTED, WAITING, PaymentOrder
from holdfast.services.schema import metadata

payments = Table(
    "payment_order",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("order_id", BigInteger, nullable=False, unique=True),
    Column("buyer", Text, nullable=False),
    Column("provider", Text, nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("trade_no", Text),
    Column("captured_minor", BigInteger, nullable=False),
    Column("refunded_minor", BigInteger, nullable=False),
    Column("captured_us", BigInteger),
    Column("pay_by_us", BigInteger, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("changed_us", BigInteger, nullable=False),
    CheckConstraint("status IN (0, 1, 2, 3)", name="status"),
    CheckConstraint("0 <= refunded_minor AND refunded_minor <= captured_minor", name="refunded"),
    CheckConstraint("captured_minor IN (0, amount_minor)", name="captured"),
)

# Every verified notice as it came; the unique event id makes it count once, for ever.
notices = Table(
    "payment_notice",
    metadata,
    Column("provider", Text, primary_key=True),
    Column("event_id", Text, primary_key=True),
    Column("payment_id", BigInteger, nullable=False),
    Column("verdict", Text, nullable=False),
    Column("raw", LargeBinary, nullable=False),
    Column("received_us", BigInteger, nullable=False),
)

refunds = Table(
    "payment_refund",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("payment_id", BigInteger, nullable=False),
    Column("key", Text, nullable=False, unique=True),  # why; a reason refunds a payment once
    Column("amount_minor", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("changed_us", BigInteger, nullable=False),
    CheckConstraint("status IN ('pending', 'done')", name="status"),
    CheckConstraint("amount_minor > 0", name="amount"),
)
Index(
    "ix_payment_refund_pending",
    refunds.c.changed_us,
    sqlite_where=refunds.c.status == "pending",
    postgresql_where=refunds.c.status == "pending",
)

_FIELDS = [payments.c[name] for name in PaymentOrder.__struct_fields__]


def _payment(row: Row[Any]) -> PaymentOrder:
    return PaymentOrder(**row._mapping)


async def lock_payments(tx: Tx, payment_ids: Collection[int]) -> dict[int, PaymentOrder]:
    """Lock these payment orders, in order of id, and read them."""
    statement = _chosen().where(among(tx, payments.c.id, sorted(payment_ids))).order_by(payments.c.id).with_for_update()
    return {row.id: _payment(row) for row in await tx.execute(statement)}


async def of_order(tx: Tx, order_id: int) -> PaymentOrder | None:
    """The payment order of an order."""
    row = (await tx.execute(_chosen().where(payments.c.order_id == order_id))).first()
    return _payment(row) if row else None


async def by_id(tx: Tx, payment_id: int) -> PaymentOrder | None:
    """One payment order."""
    row = (await tx.execute(_chosen().where(payments.c.id == payment_id))).first()
    return _payment(row) if row else None


async def end_open(tx: Tx, order_ids: Collection[int], now_us: int) -> set[int]:
    """End the payment orders of these orders unless money was captured; answers the orders whose payment is ended."""
    ours = (
        select(payments.c.id)
        .where(among(tx, payments.c.order_id, sorted(order_ids)))
        .order_by(payments.c.id)
        .with_for_update()
        .cte("ours")
    )
    statement = (
        update(payments)
        .where(payments.c.id.in_(select(ours.c.id)), payments.c.status.in_((NOT_SUBMITTED, WAITING, ENDED)))
        .values(status=ENDED, changed_us=now_us)
        .returning(payments.c.order_id)
    )
    return set((await tx.execute(statement)).scalars())


async def pending_refunds(tx: Tx, before_us: int, limit: int) -> Sequence[int]:
    """Refunds that have waited since before an instant."""
    statement = (
        select(refunds.c.id)
        .where(refunds.c.status == "pending", refunds.c.changed_us < before_us)
        .order_by(refunds.c.changed_us)
        .limit(limit)
    )
    return (await tx.execute(statement)).scalars().all()


def _chosen() -> Select[Any]:
    return select(*_FIELDS)
