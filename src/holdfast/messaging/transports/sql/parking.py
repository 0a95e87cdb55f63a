"""Parking: a rejected message goes to the error store, a replayed one back to the row it came from.

A row of the error store and the message that replays it know each other by two ids: the message names the row in a
header, the row names the message in `replay_id`. Only when both agree is the row touched, so a header that was copied
or made up changes nothing. Rows are locked in one order: the message first, then the row it came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, insert, null, update

from holdfast.db.database import Tx
from holdfast.db.prepared import InsertAll
from holdfast.ids import ID_MAX, IdSource
from holdfast.messaging.fingerprint import fingerprint, group_key
from holdfast.messaging.message import HEADER_PARKED_ID, Settlement, handed_on
from holdfast.messaging.tables import messages, parked, parked_audit

QUEUE_ACTOR = "holdfast"  # in the audit: no human did it
REASON_CHARS_MAX = 4_000
AUDIT_REASON_CHARS_MAX = 500

_INSERT = InsertAll(parked)
_KEPT = [column.name for column in parked.columns if column.name in messages.columns]


async def park(tx: Tx, given: Sequence[tuple[Any, str]], now_us: int, ids: IdSource) -> None:
    """Copy rows of `messages` to the error store, each with the reason; the caller deletes them.

    One that was replayed goes into the row it came from.
    """
    fresh: list[dict[str, Any]] = []
    for row, told in given:
        reason = _storable(told)
        if HEADER_PARKED_ID in row.headers:  # the text; nearly always none
            headers = msgspec.json.decode(row.headers, type=dict[str, str])
            if HEADER_PARKED_ID in headers and await _failed_again(tx, row, headers, reason, now_us, ids):
                continue
        seen = fingerprint(reason)
        kept = {name: getattr(row, name) for name in _KEPT}
        added = {
            "reason": reason,
            "parked_us": now_us,
            "failed_us": now_us,
            "error": seen.error,
            "group_key": group_key(row.queue, seen),
            "state": "parked",
            "loops": 0,
            "replay_id": None,
        }
        fresh.append(kept | added)
    await _INSERT.many(tx, fresh)


def replayed(acked: Sequence[Settlement]) -> list[Settlement]:
    """Those of the acked deliveries that say they came from the error store; nearly always none."""
    return [each for each in acked if HEADER_PARKED_ID in each.delivery.message.headers]


async def done(tx: Tx, acked: Sequence[Settlement], now_us: int, ids: IdSource) -> None:
    """Mark the rows of replayed messages that were acked; to be called after the messages were deleted."""
    for settlement in acked:
        delivery = settlement.delivery
        await _end(tx, delivery.receipt.row_id, delivery.message.headers, "done", now_us, ids)


async def moved_on(tx: Tx, row_id: int, headers: Mapping[str, str], now_us: int, ids: IdSource) -> Mapping[str, str]:
    """A replayed message left its queue as a dead letter: its row is done; answers the headers without its id."""
    await _end(tx, row_id, headers, "dead-lettered", now_us, ids)
    return handed_on(headers)


async def _end(tx: Tx, row_id: int, headers: Mapping[str, str], action: str, now_us: int, ids: IdSource) -> None:
    parked_id = _parked_id(headers)
    settled = await tx.execute(
        update(parked).where(_replayed_by(row_id, parked_id)).values(state="done", replay_id=null())
    )
    if settled.rowcount:
        await _note(tx, action, parked_id, "", now_us, ids)


async def _failed_again(tx: Tx, row: Any, headers: Mapping[str, str], reason: str, now_us: int, ids: IdSource) -> bool:
    """Park a replayed message in the row it came from; False when there is no such row."""
    seen = fingerprint(reason)
    parked_id = _parked_id(headers)
    back = await tx.execute(
        update(parked)
        .where(_replayed_by(row.id, parked_id))
        .values(
            state="parked",
            replay_id=null(),
            loops=parked.c.loops + 1,
            attempt=row.attempt,
            deliveries=parked.c.deliveries + row.deliveries,
            reason=reason,
            failed_us=now_us,
            error=seen.error,
            group_key=group_key(row.queue, seen),
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


def _parked_id(headers: Mapping[str, str]) -> int:
    """The row that the header names; 0, which is no row's id, when it names none."""
    told = headers.get(HEADER_PARKED_ID, "")
    if not (told.isascii() and told.isdigit() and len(told) <= len(str(ID_MAX))):
        return 0
    return int(told) if int(told) <= ID_MAX else 0


def _replayed_by(row_id: int, parked_id: int) -> ColumnElement[bool]:
    """The pending row that this very message replays."""
    pending: ColumnElement[bool] = (
        (parked.c.id == parked_id) & (parked.c.replay_id == row_id) & (parked.c.state == "pending")
    )
    return pending


def _storable(reason: str) -> str:
    """A reason that any database takes: an error may say anything, NUL and half a surrogate pair included."""
    return reason[:REASON_CHARS_MAX].replace("\x00", "").encode("utf-8", "replace").decode()
