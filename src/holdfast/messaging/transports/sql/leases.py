"""Leases: the statements by which rows are claimed, held, given back and removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import BigInteger, Executable, Integer, bindparam, case, delete, func, null, or_, select, update

from holdfast.db.database import Dialect, Tx
from holdfast.db.prepared import Prepared, among
from holdfast.messaging.message import Settlement
from holdfast.messaging.tables import messages

_CLAIMED = (
    messages.c.id,
    messages.c.lease,
    messages.c.ready_us,
    messages.c.attempt,
    messages.c.deliveries,
    messages.c.crashes,
    messages.c.message_id,
    messages.c.exchange,
    messages.c.routing_key,
    messages.c.type,
    messages.c.content_type,
    messages.c.headers,
    messages.c.body,
    messages.c.published_us,
)


def _claim(_: Dialect) -> Executable:
    # A CTE, since PostgreSQL may run a plain subquery with LIMIT more than once and lease more than asked for.
    due = (
        select(messages.c.id)
        .where(messages.c.queue == bindparam("of_queue"), messages.c.due_us <= bindparam("now_us"))
        .where(or_(messages.c.expires_us.is_(None), messages.c.expires_us > bindparam("now_us")))
        .order_by(messages.c.due_us, messages.c.id)
        .limit(bindparam("room", type_=BigInteger))
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    return (
        update(messages)
        .where(messages.c.id.in_(select(due.c.id)))
        .values(
            due_us=bindparam("until_us"),
            lease=bindparam("new_lease"),
            deliveries=messages.c.deliveries + 1,
            crashes=messages.c.crashes + case((messages.c.lease.is_(None), 0), else_=1),
        )
        .returning(*_CLAIMED)
    )


def _put_back(_: Dialect) -> Executable:
    return (
        update(messages)
        .where(messages.c.id == bindparam("row_id"), messages.c.lease == bindparam("held_lease"))
        .values(
            due_us=bindparam("again_us"),
            ready_us=bindparam("again_us"),
            lease=null(),
            attempt=messages.c.attempt + bindparam("counted", type_=Integer),
        )
    )


def _moved(dialect: Dialect) -> Executable:
    return (
        update(messages)
        .where(among(dialect, messages.c.id, "row_ids"), messages.c.lease == bindparam("held_lease"))
        .values(due_us=bindparam("to_us"), lease=bindparam("to_lease"))
    )


def _given_back(dialect: Dialect) -> Executable:
    # Where it was in the queue before, as in RabbitMQ: what came after it stays behind it.
    return (
        update(messages)
        .where(among(dialect, messages.c.id, "row_ids"), messages.c.lease == bindparam("held_lease"))
        .values(due_us=messages.c.ready_us, lease=null())
    )


CLAIM = Prepared(_claim)
SOONEST = Prepared(
    lambda _: select(func.min(messages.c.due_us).label("due_us")).where(
        messages.c.queue == bindparam("of_queue"), messages.c.due_us > bindparam("now_us")
    )
)
DELETE = Prepared(lambda dialect: delete(messages).where(among(dialect, messages.c.id, "row_ids")))
PUT_BACK = Prepared(_put_back)
WHOLE = Prepared(
    lambda dialect: (
        select(*messages.columns)
        .where(among(dialect, messages.c.id, "row_ids"))
        .order_by(messages.c.id)
        .with_for_update()
    )
)
MOVE = Prepared(_moved)
GIVE_BACK = Prepared(_given_back)


class Receipt(msgspec.Struct, frozen=True):
    """Which row, and under which lease."""

    row_id: int
    lease: int


async def move(tx: Tx, receipts: Sequence[Receipt], due_us: int, *, keep: bool) -> None:
    """Set when messages are due again, under the leases they are held by, and keep or drop these."""
    for lease, row_ids in by_lease(receipts):
        await MOVE.rows(tx, row_ids=row_ids, held_lease=lease, to_us=due_us, to_lease=lease if keep else None)


def by_lease(receipts: Sequence[Receipt]) -> list[tuple[int, list[int]]]:
    leases = {receipt.lease for receipt in receipts}
    return [(lease, [each.row_id for each in receipts if each.lease == lease]) for lease in leases]


async def held(tx: Tx, settlements: Sequence[Settlement]) -> list[tuple[Any, str]]:
    """The messages' rows, each with the reason, where the lease is still ours: others are for their new holders.

    They come in the order of the settlements, which is that of their dead letters. They are locked before the rows of
    the error store that they may have come from, as an ack does.
    """
    receipts = [(each, each.delivery.receipt) for each in settlements]
    found = {row.id: row for row in await WHOLE.rows(tx, row_ids=[receipt.row_id for _, receipt in receipts])}
    return [
        (found[receipt.row_id], each.reason)
        for each, receipt in receipts
        if receipt.row_id in found and found[receipt.row_id].lease == receipt.lease
    ]
