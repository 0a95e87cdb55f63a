"""Parking: a rejected message goes to the error store, a replayed one back to the row it came from.

A row of the error store and the message that replays it know each other by two ids: the message names the row in a
header, the row names the message in `replay_id`. Only when both agree is the row touched, so a header that was copied
or made up changes nothing. Rows are locked in one order: the message first, then the row it came from.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import BigInteger, ColumnElement, Integer, Text, delete, insert, literal, null, select, update

from holdfast.db.database import Tx
from holdfast.ids import ID_MAX, IdSource
from holdfast.messaging.fingerprint import fingerprint, group_key
from holdfast.messaging.message import HEADER_PARKED_ID, Settlement
from holdfast.messaging.tables import messages, parked, parked_audit

QUEUE_ACTOR = "holdfast"  # in the audit: no human did it
REASON_CHARS_MAX = 4_000
AUDIT_REASON_CHARS_MAX = 500

_KEPT = [column.name for column in parked.columns if column.name in messages.columns]


async def park(tx: Tx, settlement: Settlement, now_us: int, ids: IdSource) -> bool:
    """Take a rejected message out of its queue into the error store; False when it is no longer ours to decide."""
    reason = _storable(settlement.reason)
    if HEADER_PARKED_ID in settlement.delivery.message.headers:
        # Locked before the row it came from, as an ack does; a message that somebody else holds now is his.
        held = select(messages.c.id).where(_held_by(settlement)).with_for_update()
        if (await tx.execute(held)).first() is None:
            return False
        if await _failed_again(tx, settlement, reason, now_us, ids):
            await tx.execute(delete(messages).where(_held_by(settlement)))
            return True
    seen = fingerprint(reason)
    added = {
        "reason": literal(reason, Text),
        "parked_us": literal(now_us, BigInteger),
        "failed_us": literal(now_us, BigInteger),
        "error": literal(seen.error, Text),
        "group_key": literal(group_key(settlement.delivery.queue, seen), Text),
        "state": literal("parked", Text),
        "loops": literal(0, Integer),
    }
    kept = select(*(messages.c[name] for name in _KEPT), *added.values()).where(_held_by(settlement))
    moved = await tx.execute(insert(parked).from_select([*_KEPT, *added], kept))
    await tx.execute(delete(messages).where(_held_by(settlement)))
    return bool(moved.rowcount)


def replayed(acked: Sequence[Settlement]) -> list[Settlement]:
    """Those of the acked deliveries that say they came from the error store; nearly always none."""
    return [each for each in acked if HEADER_PARKED_ID in each.delivery.message.headers]


async def done(tx: Tx, acked: Sequence[Settlement], now_us: int, ids: IdSource) -> None:
    """Mark the rows of replayed messages that were acked; to be called after the messages were deleted."""
    for settlement in acked:
        parked_id = _parked_id(settlement)
        settled = await tx.execute(
            update(parked).where(_replayed_by(settlement, parked_id)).values(state="done", replay_id=null())
        )
        if settled.rowcount:
            await _note(tx, "done", parked_id, "", now_us, ids)


async def _failed_again(tx: Tx, settlement: Settlement, reason: str, now_us: int, ids: IdSource) -> bool:
    """Park a replayed message in the row it came from; False when there is no such row."""
    seen = fingerprint(reason)
    parked_id = _parked_id(settlement)
    back = await tx.execute(
        update(parked)
        .where(_replayed_by(settlement, parked_id))
        .values(
            state="parked",
            replay_id=null(),
            loops=parked.c.loops + 1,
            attempt=settlement.delivery.attempt,
            deliveries=parked.c.deliveries + settlement.delivery.deliveries,
            reason=reason,
            failed_us=now_us,
            error=seen.error,
            group_key=group_key(settlement.delivery.queue, seen),
        )
    )
    if not back.rowcount:
        return False
    await _note(tx, "failed again", parked_id, reason.partition("\n")[0], now_us, ids)
    return True


async def _note(tx: Tx, action: str, parked_id: int, reason: str, now_us: int, ids: IdSource) -> None:
    await tx.execute(
        insert(parked_audit).values(
            id=ids.next(),
            at_us=now_us,
            actor=QUEUE_ACTOR,
            action=action,
            parked_id=parked_id,
            reason=reason[:AUDIT_REASON_CHARS_MAX],
        )
    )


def _parked_id(settlement: Settlement) -> int:
    """The row that the header names; 0, which is no row's id, when it names none."""
    told = settlement.delivery.message.headers[HEADER_PARKED_ID]
    if not (told.isascii() and told.isdigit() and len(told) <= len(str(ID_MAX))):
        return 0
    return int(told) if int(told) <= ID_MAX else 0


def _replayed_by(settlement: Settlement, parked_id: int) -> ColumnElement[bool]:
    """The pending row that this very message replays."""
    row_id = settlement.delivery.receipt.row_id
    pending: ColumnElement[bool] = (
        (parked.c.id == parked_id) & (parked.c.replay_id == row_id) & (parked.c.state == "pending")
    )
    return pending


def _held_by(settlement: Settlement) -> ColumnElement[bool]:
    """The message, if its lease is still ours: one whose lease ran out is for its new holder to decide."""
    receipt = settlement.delivery.receipt
    held: ColumnElement[bool] = (messages.c.id == receipt.row_id) & (messages.c.lease == receipt.lease)
    return held


def _storable(reason: str) -> str:
    """A reason that any database takes: an error may say anything, NUL and half a surrogate pair included."""
    return reason[:REASON_CHARS_MAX].replace("\x00", "").encode("utf-8", "replace").decode()
