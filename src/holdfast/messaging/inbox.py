"""Inbox: the effect of (consumer, message id) happens once, because its row commits together with the effect."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import BigInteger, Text, literal, select, true

from holdfast.clock import Clock
from holdfast.db.database import Tx
from holdfast.db.sql import insert, rows_of
from holdfast.messaging.tables import inbox


class Inbox:
    """Remembers which messages a consumer has had its effect from."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def fresh(self, tx: Tx, consumer: str, message_ids: Sequence[str]) -> set[str]:
        """Claim the messages within `tx` and answer those whose effect has not happened yet.

        Two transactions that claim one message wait for each other: the second sees it claimed if the first commits.
        Only the unique key decides; any other database error is raised and never taken for a duplicate.
        """
        given = rows_of(tx, sorted(set(message_ids)), Text())  # sorted: one written order, so no deadlock
        claim = select(literal(consumer, Text), given.c.value, literal(self._clock.now_us(), BigInteger)).where(true())
        statement = (
            insert(tx, inbox)
            .from_select(["consumer", "message_id", "done_us"], claim)
            .on_conflict_do_nothing()
            .returning(inbox.c.message_id)
        )
        return set((await tx.execute(statement)).scalars())
