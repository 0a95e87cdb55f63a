"""Refunds' SQL; the tables stand with those of payments."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import BigInteger, Executable, bindparam, select, update

from holdfast.db.database import Dialect, Tx
from holdfast.db.prepared import InsertAll, Prepared, among
from holdfast.services.payments.model import Refund, RefundStatus
from holdfast.services.payments.store import payments, refund_log, refunds

PENDING, DONE, REFUSED = (status.value for status in (RefundStatus.PENDING, RefundStatus.DONE, RefundStatus.REFUSED))

insert_refunds = InsertAll(refunds)
insert_steps = InsertAll(refund_log)


def _move(dialect: Dialect) -> Executable:
    return (
        update(refunds)
        .where(among(dialect, refunds.c.id, "refund_ids"), refunds.c.status == bindparam("came"))
        .values(
            status=bindparam("to_status"),
            detail=bindparam("told"),
            ask_us=bindparam("now_us"),
            changed_us=bindparam("now_us"),
        )
        .returning(refunds)
    )


def _shift(_: Dialect) -> Executable:
    return (
        update(payments)
        .where(payments.c.id == bindparam("of_payment"))
        .values(
            refunded_minor=payments.c.refunded_minor + bindparam("by_refunded", type_=BigInteger),
            refunding_minor=payments.c.refunding_minor + bindparam("by_refunding", type_=BigInteger),
            changed_us=bindparam("now_us"),
        )
    )


_MOVE = Prepared(_move)
_SHIFT = Prepared(_shift)
_BY_KEYS = Prepared(lambda dialect: select(refunds).where(among(dialect, refunds.c.key, "keys")))
_BY_IDS = Prepared(
    lambda dialect: select(refunds).where(among(dialect, refunds.c.id, "refund_ids")).order_by(refunds.c.id)
)
_PAYMENTS_OF_ORDERS = Prepared(
    lambda dialect: select(payments.c.id, payments.c.order_id).where(among(dialect, payments.c.order_id, "order_ids"))
)
_POSTPONE = Prepared(
    lambda _: (
        update(refunds)
        .where(refunds.c.id == bindparam("refund_id"), refunds.c.status == PENDING)
        .values(attempts=refunds.c.attempts + 1, ask_us=bindparam("at_us"))
    )
)
_TOUCH = Prepared(
    lambda dialect: (
        update(refunds)
        .where(among(dialect, refunds.c.id, "refund_ids"), refunds.c.status == PENDING)
        .values(ask_us=bindparam("now_us"))
        .returning(refunds.c.id)
    )
)


async def by_keys(tx: Tx, keys: Collection[str]) -> dict[str, Refund]:
    """Refunds by the keys they were asked for under."""
    return {row.key: _refund(row) for row in await _BY_KEYS.rows(tx, keys=sorted(keys))}


async def by_ids(tx: Tx, refund_ids: Collection[int]) -> dict[int, Refund]:
    """Refunds by id."""
    return {row.id: _refund(row) for row in await _BY_IDS.rows(tx, refund_ids=sorted(refund_ids))}


async def payments_of_orders(tx: Tx, order_ids: Collection[int]) -> dict[int, int]:
    """The payment of each order."""
    return {row.order_id: row.id for row in await _PAYMENTS_OF_ORDERS.rows(tx, order_ids=sorted(order_ids))}


async def move(tx: Tx, refund_ids: Collection[int], came: str, to: str, detail: str, now_us: int) -> list[Refund]:
    """Move refunds from one state to another in one conditional UPDATE; answers those that moved, as they are now."""
    rows = await _MOVE.rows(tx, refund_ids=sorted(refund_ids), came=came, to_status=to, told=detail, now_us=now_us)
    return sorted((_refund(row) for row in rows), key=lambda refund: refund.id)


async def shift(tx: Tx, shifts: Mapping[int, tuple[int, int]], now_us: int) -> None:
    """Add (refunded, reserved) to payments; the CHECKs refuse more than was captured and void the transaction."""
    rows = [
        {"of_payment": payment_id, "by_refunded": by[0], "by_refunding": by[1], "now_us": now_us}
        for payment_id, by in sorted(shifts.items())
    ]
    await _SHIFT.many(tx, rows)


async def postpone(tx: Tx, waits: Sequence[tuple[int, int]]) -> None:
    """Note for (refund, instant) pairs that the answer was unknown and when to ask again."""
    await _POSTPONE.many(tx, [{"refund_id": refund_id, "at_us": at_us} for refund_id, at_us in waits])


async def touch(tx: Tx, refund_ids: Collection[int], now_us: int) -> list[int]:
    """Note that pending refunds are being asked about; answers those that are pending."""
    rows = await _TOUCH.rows(tx, refund_ids=sorted(refund_ids), now_us=now_us)
    return sorted(row.id for row in rows)


async def waiting(tx: Tx, before_us: int, limit: int) -> Sequence[int]:
    """Pending refunds that should have been asked about before an instant, the oldest first."""
    statement = (
        select(refunds.c.id)
        .where(refunds.c.status == PENDING, refunds.c.ask_us < before_us)
        .order_by(refunds.c.ask_us, refunds.c.id)
        .limit(limit)
    )
    return (await tx.execute(statement)).scalars().all()


async def page(tx: Tx, after: int, limit: int, payment_id: int | None) -> list[Refund]:
    """Refunds in order of id after the given one, of one payment or of all."""
    statement = select(refunds).where(refunds.c.id > after).order_by(refunds.c.id).limit(limit)
    if payment_id is not None:
        statement = statement.where(refunds.c.payment_id == payment_id)
    return [_refund(row) for row in await tx.execute(statement)]


async def steps(tx: Tx, refund_id: int) -> list[dict[str, Any]]:
    """What happened to a refund, in order."""
    statement = select(refund_log).where(refund_log.c.refund_id == refund_id).order_by(refund_log.c.id)
    return [dict(row._mapping) for row in await tx.execute(statement)]


def _refund(row: Any) -> Refund:
    return Refund(**row._asdict())
