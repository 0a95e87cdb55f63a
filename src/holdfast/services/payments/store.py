"""Payments' tables and SQL."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ColumnElement,
    Executable,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    bindparam,
    or_,
    select,
    tuple_,
    update,
)

from holdfast.db.database import Dialect, Tx
from holdfast.db.prepared import InsertAll, Prepared, among, insert
from holdfast.services.payments.model import (
    ENDED,
    SUCCEEDED,
    UNDECIDED,
    WAITING,
    Capture,
    PaymentDetails,
    PaymentOrder,
    Verdict,
)
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
    Column("accepted_us", BigInteger),  # when an order or a refund took charge of the captured money
    Column("pay_by_us", BigInteger, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("changed_us", BigInteger, nullable=False),
    CheckConstraint("status IN (0, 1, 2, 3)", name="status"),
    CheckConstraint("0 <= refunded_minor AND refunded_minor <= captured_minor", name="refunded"),
    CheckConstraint("captured_minor IN (0, amount_minor)", name="captured"),
)

Index(
    "ix_payment_order_unaccepted",
    payments.c.changed_us,
    sqlite_where=(payments.c.status == SUCCEEDED) & payments.c.accepted_us.is_(None),
    postgresql_where=(payments.c.status == SUCCEEDED) & payments.c.accepted_us.is_(None),
)

# The unpaid ones, which are asked about in order of their ids.
Index(
    "ix_payment_order_waiting",
    payments.c.id,
    sqlite_where=payments.c.status == WAITING,
    postgresql_where=payments.c.status == WAITING,
)

# Every verified notice as it came; the unique event id makes it count once, for ever.
notices = Table(
    "payment_notice",
    metadata,
    Column("provider", Text, primary_key=True),
    Column("event_id", Text, primary_key=True),
    Column("payment_id", BigInteger, nullable=False),
    Column("verdict", Text, nullable=False),
    Column("merchant_id", Text, nullable=False),
    Column("trade_no", Text, nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    Column("captured_us", BigInteger, nullable=False),
    Column("raw", LargeBinary, nullable=False),
    Column("received_us", BigInteger, nullable=False),
)
Index(
    "ix_payment_notice_undecided",
    notices.c.provider,
    notices.c.event_id,
    sqlite_where=notices.c.verdict.in_(sorted(UNDECIDED)),
    postgresql_where=notices.c.verdict.in_(sorted(UNDECIDED)),
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

insert_payments = InsertAll(payments)
insert_notices = InsertAll(notices)


def _lock(dialect: Dialect) -> Executable:
    chosen = select(*_FIELDS).where(among(dialect, payments.c.id, "payment_ids"))
    return chosen.order_by(payments.c.id).with_for_update()


def _succeed(_: Dialect) -> Executable:
    return (
        update(payments)
        .where(payments.c.id == bindparam("payment_id"), payments.c.status != SUCCEEDED)
        .values(
            status=SUCCEEDED,
            trade_no=bindparam("by_trade"),
            captured_minor=payments.c.amount_minor,
            captured_us=bindparam("at_us"),
            changed_us=bindparam("now_us"),
        )
    )


def _end_open(dialect: Dialect) -> Executable:
    ours = (
        select(payments.c.id)
        .where(among(dialect, payments.c.order_id, "order_ids"))
        .order_by(payments.c.id)
        .with_for_update()
        .cte("ours")
    )
    return (
        update(payments)
        .where(payments.c.id.in_(select(ours.c.id)), payments.c.status != SUCCEEDED)
        .values(status=ENDED, changed_us=bindparam("now_us"))
        .returning(payments.c.order_id)
    )


def _finish_refunds(dialect: Dialect) -> Executable:
    return (
        update(refunds)
        .where(among(dialect, refunds.c.id, "refund_ids"), refunds.c.status == "pending")
        .values(status="done", changed_us=bindparam("now_us"))
        .returning(refunds.c.payment_id, refunds.c.amount_minor)
    )


_LOCK = Prepared(_lock)
_SUCCEED = Prepared(_succeed)
_END_OPEN = Prepared(_end_open)
_FINISH_REFUNDS = Prepared(_finish_refunds)
_OF_ORDER = Prepared(lambda _: select(*_FIELDS).where(payments.c.order_id == bindparam("of_order")))
_BY_ID = Prepared(lambda _: select(*_FIELDS).where(payments.c.id == bindparam("payment_id")))
_TOLD = Prepared(
    lambda dialect: select(notices.c.provider, notices.c.event_id, notices.c.verdict).where(
        among(dialect, notices.c.event_id, "event_ids")
    )
)
_JUDGE_AGAIN = Prepared(
    lambda _: (
        update(notices)
        .where(notices.c.provider == bindparam("of_provider"), notices.c.event_id == bindparam("of_event"))
        .values(verdict=bindparam("to_verdict"))
    )
)
_UNPAID = Prepared(
    lambda _: (
        select(*_FIELDS)
        .where(
            payments.c.status == WAITING,
            payments.c.created_us < bindparam("before_us"),
            payments.c.id > bindparam("after"),
        )
        .order_by(payments.c.id)
        .limit(bindparam("room", type_=BigInteger))
    )
)
_ACCEPT = Prepared(
    lambda dialect: (
        update(payments)
        .where(among(dialect, payments.c.id, "payment_ids"), payments.c.accepted_us.is_(None))
        .values(accepted_us=bindparam("now_us"))
        .returning(payments.c.id)
    )
)
_UNACCEPTED = Prepared(
    lambda _: (
        select(*_FIELDS)
        .where(
            payments.c.status == SUCCEEDED,
            payments.c.accepted_us.is_(None),
            payments.c.changed_us < bindparam("before_us"),
            payments.c.id > bindparam("after"),
        )
        .order_by(payments.c.id)
        .limit(bindparam("room", type_=BigInteger))
    )
)
_TOUCH_REFUNDS = Prepared(
    lambda dialect: (
        update(refunds)
        .where(among(dialect, refunds.c.id, "refund_ids"))
        .values(changed_us=bindparam("now_us"))
        .returning(refunds.c.id)
    )
)


async def lock_payments(tx: Tx, payment_ids: Collection[int]) -> dict[int, PaymentOrder]:
    """Lock these payment orders, in order of id, and read them."""
    return {row.id: _payment(row) for row in await _LOCK.rows(tx, payment_ids=sorted(payment_ids))}


async def of_order(tx: Tx, order_id: int) -> PaymentOrder | None:
    """The payment order of an order."""
    rows = await _OF_ORDER.rows(tx, of_order=order_id)
    return _payment(rows[0]) if rows else None


async def details(tx: Tx, which: ColumnElement[bool], buyer: str | None) -> PaymentDetails | None:
    """One payment order with its times, of this buyer unless that is None."""
    statement = select(*_FIELDS, payments.c.created_us, payments.c.changed_us).where(which)
    if buyer is not None:
        statement = statement.where(payments.c.buyer == buyer)
    row = (await tx.execute(statement)).first()
    if row is None:
        return None
    fields = dict(row._mapping)
    created_us, changed_us = fields.pop("created_us"), fields.pop("changed_us")
    return PaymentDetails(order=PaymentOrder(**fields), created_us=created_us, changed_us=changed_us)


async def by_id(tx: Tx, payment_id: int) -> PaymentOrder | None:
    """One payment order."""
    rows = await _BY_ID.rows(tx, payment_id=payment_id)
    return _payment(rows[0]) if rows else None


async def told_before(tx: Tx, event_ids: Collection[str]) -> dict[tuple[str, str], Verdict]:
    """What became of earlier notices, by (provider, event id)."""
    rows = await _TOLD.rows(tx, event_ids=sorted(event_ids))
    return {(row.provider, row.event_id): Verdict(row.verdict) for row in rows}


async def judge_again(tx: Tx, verdicts: Mapping[tuple[str, str], Verdict]) -> None:
    """Note what became of notices that were undecided, by (provider, event id)."""
    rows = [
        {"of_provider": provider, "of_event": event_id, "to_verdict": verdict.value}
        for (provider, event_id), verdict in sorted(verdicts.items())
    ]
    await _JUDGE_AGAIN.many(tx, rows)


async def keep_notice(tx: Tx, row: Mapping[str, object]) -> None:
    """Keep a notice unless it is kept already."""
    await tx.execute(insert(tx.dialect, notices).values(**row).on_conflict_do_nothing())


async def undecided(tx: Tx, after: tuple[str, str], limit: int) -> list[Capture]:
    """Notices that can be judged now, in order of (provider, event id), after the given one."""
    known = select(payments.c.id).where(payments.c.id == notices.c.payment_id).exists()
    statement = (
        select(*(notices.c[name] for name in Capture.__struct_fields__))
        .where(
            notices.c.verdict.in_(sorted(UNDECIDED)),
            or_(notices.c.verdict == Verdict.RECEIVED.value, known),
            tuple_(notices.c.provider, notices.c.event_id) > tuple_(*after),
        )
        .order_by(notices.c.provider, notices.c.event_id)
        .limit(limit)
    )
    return [Capture(**row._mapping) for row in await tx.execute(statement)]


async def unpaid(tx: Tx, before_us: int, after: int, limit: int) -> list[PaymentOrder]:
    """Unpaid payment orders opened before an instant, in order of id, after the given one."""
    return [_payment(row) for row in await _UNPAID.rows(tx, before_us=before_us, after=after, room=limit)]


async def mark_succeeded(tx: Tx, captures: Sequence[Capture], now_us: int) -> None:
    """Book captured money on payment orders that have none yet."""
    rows = [
        {
            "payment_id": capture.payment_id,
            "by_trade": capture.trade_no,
            "at_us": capture.captured_us,
            "now_us": now_us,
        }
        for capture in captures
    ]
    await _SUCCEED.many(tx, rows)


async def end_open(tx: Tx, order_ids: Collection[int], now_us: int) -> set[int]:
    """End the payment orders of these orders unless money was captured; answers the orders whose payment is ended."""
    return {row.order_id for row in await _END_OPEN.rows(tx, order_ids=sorted(order_ids), now_us=now_us)}


async def finish_refunds(tx: Tx, refund_ids: Collection[int], now_us: int) -> list[tuple[int, int]]:
    """Mark pending refunds done; answers (payment id, amount in minor units) of those that were pending."""
    rows = await _FINISH_REFUNDS.rows(tx, refund_ids=sorted(refund_ids), now_us=now_us)
    return [(row.payment_id, row.amount_minor) for row in rows]


async def touch_refunds(tx: Tx, refund_ids: Collection[int], now_us: int) -> None:
    """Note that refunds were asked about."""
    await _TOUCH_REFUNDS.rows(tx, refund_ids=sorted(refund_ids), now_us=now_us)


async def accept(tx: Tx, payment_ids: Collection[int], now_us: int) -> None:
    """Note that somebody took charge of the captured money."""
    await _ACCEPT.rows(tx, payment_ids=sorted(payment_ids), now_us=now_us)


async def unaccepted(tx: Tx, before_us: int, after: int, limit: int) -> list[PaymentOrder]:
    """Payments captured before an instant that nobody took charge of, in order of id, after the given one."""
    return [_payment(row) for row in await _UNACCEPTED.rows(tx, before_us=before_us, after=after, room=limit)]


async def pending_refunds(tx: Tx, before_us: int, limit: int) -> Sequence[int]:
    """Refunds that have waited since before an instant."""
    statement = (
        select(refunds.c.id)
        .where(refunds.c.status == "pending", refunds.c.changed_us < before_us)
        .order_by(refunds.c.changed_us)
        .limit(limit)
    )
    return (await tx.execute(statement)).scalars().all()


def _payment(row: Any) -> PaymentOrder:
    return PaymentOrder(**row._asdict())
