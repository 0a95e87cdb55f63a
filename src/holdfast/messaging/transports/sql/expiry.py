"""Expiry: takes messages out of their queues at the instant their time to live ends, consumers or not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from sqlalchemy import BigInteger, Executable, bindparam, func, or_, select

from holdfast import observe
from holdfast.clock import Clock
from holdfast.db.database import Dialect, Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.db.prepared import Prepared
from holdfast.errors import HoldfastError, ShuttingDown
from holdfast.messaging.tables import messages
from holdfast.messaging.transports.sql.rows import EXPIRY, QueueRows
from holdfast.messaging.transports.sql.wakeups import Waiter, Wakeups

BATCH = 200
AWAY_S = 1.0

log = observe.logger("sql_transport")


def _expired(_: Dialect) -> Executable:
    # One that a consumer holds is its business until the lease ends, as an unacked one is in RabbitMQ.
    free = or_(messages.c.lease.is_(None), messages.c.due_us <= bindparam("now_us"))
    return (
        select(*messages.columns)
        .where(messages.c.expires_us <= bindparam("now_us"), free)
        .order_by(messages.c.expires_us, messages.c.id)
        .limit(bindparam("so_many", type_=BigInteger))
        .with_for_update(skip_locked=True)
    )


_EXPIRED = Prepared(_expired)
_NEXT = Prepared(
    lambda _: select(func.min(messages.c.expires_us).label("expires_us")).where(
        messages.c.expires_us > bindparam("now_us")
    )
)


class _Swept(msgspec.Struct, frozen=True):
    count: int
    next_us: int | None


class Expiry:
    """One task for each instance; several share the work, each message goes once."""

    def __init__(self, group: GroupCommit, clock: Clock, *, wakeups: Wakeups, rows: QueueRows, poll_us: int) -> None:
        self._group = group
        self._clock = clock
        self._wakeups = wakeups
        self._waiter = Waiter(clock)
        self._rows = rows
        self._poll_us = poll_us
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._wakeups.add(EXPIRY, self._waiter)
        self._task = asyncio.create_task(self._run(), name="expiry")

    async def stop(self) -> None:
        self._wakeups.remove(EXPIRY, self._waiter)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def _run(self) -> None:
        while True:
            self._waiter.begin()
            until_us = self._clock.now_us() + self._poll_us
            try:
                swept = await self._group.submit(self._sweep, BATCH)
            except ShuttingDown:
                return
            except HoldfastError as error:
                log.warning("expiry_failed", error=error.code, detail=error.detail)
                await self._clock.sleep(AWAY_S)
                continue
            if swept.count == BATCH:
                continue
            await self._waiter.sleep(until_us if swept.next_us is None else min(until_us, swept.next_us))

    async def _sweep(self, tx: Tx, limits: Sequence[int]) -> list[_Swept | HoldfastError]:
        return [await self._sweep_once(tx, limit) for limit in limits]

    async def _sweep_once(self, tx: Tx, limit: int) -> _Swept:
        now_us = self._clock.now_us()
        rows = await _EXPIRED.rows(tx, now_us=now_us, so_many=limit)
        await self._rows.bury(tx, rows, "expired")
        (after,) = await _NEXT.rows(tx, now_us=now_us)
        return _Swept(len(rows), after.expires_us)
