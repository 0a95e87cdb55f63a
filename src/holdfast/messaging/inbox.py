"""Inbox: the effect of (consumer, message id) happens once, because its row commits together with the effect."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import BigInteger, Executable, Text, bindparam, select, true

from holdfast.clock import Clock
from holdfast.db.database import Dialect, Tx
from holdfast.db.prepared import Prepared, insert, rows_of
from holdfast.messaging.tables import inbox


def _claim(dialect: Dialect) -> Executable:
    given = rows_of(dialect, "message_ids", Text())
    rows = select(bindparam("consumer", type_=Text), given.c.value, bindparam("now_us", type_=BigInteger)).where(true())
    claim = insert(dialect, inbox).from_select(["consumer", "message_id", "done_us"], rows)
    return claim.on_conflict_do_nothing().returning(inbox.c.message_id)


_CLAIM = Prepared(_claim)


class Inbox:
    """Remembers which messages a consumer has had its effect from."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def fresh(self, tx: Tx, consumer: str, message_ids: Sequence[str]) -> set[str]:
        """Claim the messages within `tx` and answer those whose effect has not happened yet.

        Two transactions that claim one message wait for each other: the second sees it claimed if the first commits.
        Only the unique key decides; any other database error is raised and never taken for a duplicate.
        """
        ids = sorted(set(message_ids))  # one written order, so no deadlock
        claimed = await _CLAIM.rows(tx, consumer=consumer, message_ids=ids, now_us=self._clock.now_us())
        return {row.message_id for row in claimed}
