"""SqlSubscription: claim rows with a lease, renew it while a handler works, settle within a transaction."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import msgspec
from sqlalchemy import BigInteger, Executable, Integer, bindparam, case, delete, func, null, or_, select, update

from holdfast import observe
from holdfast.clock import US_PER_MS, US_PER_S, Clock
from holdfast.db.database import Dialect, Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.db.prepared import Prepared, among
from holdfast.errors import AlreadySettled, HoldfastError
from holdfast.ids import IdSource
from holdfast.messaging.message import Delivery, Settlement
from holdfast.messaging.tables import messages
from holdfast.messaging.topology import Queue
from holdfast.messaging.transports.sql import active_consumer, parking
from holdfast.messaging.transports.sql.lifetimes import Lifetimes
from holdfast.messaging.transports.sql.rows import QueueRows, message_of
from holdfast.messaging.transports.sql.wakeups import Waiter, Wakeups

SUSPECT_CRASHES = 2
SUSPECT_WAIT_US = US_PER_S
CRASH_LOOP = "CrashLoop: {} deliveries ended without an outcome; its handler may end the process, or outlast the lease"

log = observe.logger("sql_transport")

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
        .returning(messages.c.id)
    )


def _given_back(dialect: Dialect) -> Executable:
    # Where it was in the queue before, as in RabbitMQ: what came after it stays behind it.
    return (
        update(messages)
        .where(among(dialect, messages.c.id, "row_ids"), messages.c.lease == bindparam("held_lease"))
        .values(due_us=messages.c.ready_us, lease=null())
        .returning(messages.c.id)
    )


_CLAIM = Prepared(_claim)
_SOONEST = Prepared(
    lambda _: select(func.min(messages.c.due_us).label("due_us")).where(
        messages.c.queue == bindparam("of_queue"), messages.c.due_us > bindparam("now_us")
    )
)
_DELETE = Prepared(
    lambda dialect: delete(messages).where(among(dialect, messages.c.id, "row_ids")).returning(messages.c.id)
)
_PUT_BACK = Prepared(_put_back)
_MOVE = Prepared(_moved)
_GIVE_BACK = Prepared(_given_back)


class Receipt(msgspec.Struct, frozen=True):
    """Which row, and under which lease."""

    row_id: int
    lease: int


class _Claimed(msgspec.Struct, frozen=True):
    rows: Sequence[Any]
    next_due_us: int | None


class SqlSubscription:
    """A consumer on one queue."""

    def __init__(
        self,
        queue: str,
        *,
        group: GroupCommit,
        clock: Clock,
        ids: IdSource,
        wakeups: Wakeups,
        tell: Callable[[set[tuple[str, int]]], None],
        rows: QueueRows,
        lifetimes: Lifetimes,
        prefetch: int,
        lease_us: int,
        poll_us: int,
        crashes_max: int,
    ) -> None:
        self._queue = queue
        self._group = group
        self._clock = clock
        self._ids = ids
        self._wakeups = wakeups
        self._tell = tell
        self._rows = rows
        self._lifetimes = lifetimes
        self._declared: Queue | None = None
        self._consumer = ids.next()  # by which a single active consumer is known
        self._waiter = Waiter(clock)
        self._in_flight = observe.messages_in_flight.labels(queue)
        self._delivered = observe.messages_delivered.labels(queue)
        self._prefetch = prefetch
        self._lease_us = lease_us
        self._poll_us = poll_us
        self._crashes_max = crashes_max
        self._held: dict[int, Receipt] = {}
        self._suspects: set[int] = set()  # of those held: what may have ended a process before
        self._renewal: asyncio.Task[None] | None = None
        self._closed = False

    async def __aenter__(self) -> SqlSubscription:
        self._declared = await self._lifetimes.enter(self._queue)
        self._wakeups.add(self._queue, self._waiter)
        self._renewal = asyncio.create_task(self._renew(), name=f"renew-{self._queue}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._wakeups.remove(self._queue, self._waiter)
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.wait([self._renewal])
        if self._held:
            await self._group.submit(self._give_back, list(self._held.values()))
            self._in_flight.dec(len(self._held))
            self._held.clear()
        if self._declared is not None:
            if self._declared.single_active_consumer:
                await self._group.submit(self._retire, None)
            await self._lifetimes.leave(self._declared)
            self._declared = None

    def limit(self, prefetch: int) -> None:
        self._prefetch = prefetch
        self._waiter.wake()

    def stop(self) -> None:
        self._closed = True
        self._waiter.wake()

    async def take(self) -> list[Delivery]:
        while not self._closed:
            self._waiter.begin()
            until_us = self._clock.now_us() + self._poll_us
            room = self._prefetch - len(self._held)
            if room > 0:
                claimed = await self._group.submit(self._claim, room)
                if claimed.rows:
                    self._delivered.inc(len(claimed.rows))
                    return [self._delivery(row) for row in claimed.rows]
                if claimed.next_due_us is not None:
                    until_us = min(until_us, claimed.next_due_us)
                # One that is due and was not claimed is locked by another transaction; polling finds it.
            await self._waiter.sleep(until_us)
        return []

    async def settle(self, settlements: Sequence[Settlement], tx: Tx | None = None) -> None:
        for settlement in settlements:
            if settlement.delivery.settled:
                raise AlreadySettled(f"message {settlement.delivery.message.message_id} was settled before")
        if tx is None:
            await self._group.submit(self._settle_groups, settlements)
        else:
            await self._settle(tx, settlements)

    async def _claim(self, tx: Tx, rooms: Sequence[int]) -> list[_Claimed | HoldfastError]:
        """Lease what is due, in order of its instant; SKIP LOCKED keeps processes out of each other's way."""
        return [await self._claim_once(tx, room) for room in rooms]

    async def _claim_once(self, tx: Tx, room: int) -> _Claimed:
        now_us = self._clock.now_us()
        if (
            self._declared is not None
            and self._declared.single_active_consumer
            and not await self._is_active(tx, now_us)
        ):
            return _Claimed((), None)  # polling finds out when the active one is gone
        rows = await _CLAIM.rows(
            tx,
            of_queue=self._queue,
            now_us=now_us,
            room=room,
            until_us=now_us + self._lease_us,
            new_lease=self._ids.next(),
        )
        if rows:
            kept = await self._without_suspects(tx, sorted(rows, key=lambda row: (row.ready_us, row.id)))
            return _Claimed(kept, None if kept else now_us)  # none was to be kept: look again at once
        (soonest,) = await _SOONEST.rows(tx, of_queue=self._queue, now_us=now_us)
        return _Claimed((), soonest.due_us)

    async def _without_suspects(self, tx: Tx, rows: Sequence[Any]) -> list[Any]:
        """Of the messages that may have ended a process hold one at a time, and park who did so too often.

        All that a process held when it ended count as crashed, so most of them are innocent: held alone, they get
        through, and only the guilty one goes on counting.
        """
        now_us = self._clock.now_us()
        kept: list[Any] = []
        alone = not self._suspects
        for row in rows:
            if row.crashes < SUSPECT_CRASHES:
                kept.append(row)
            elif row.crashes >= self._crashes_max:
                (whole,) = (await tx.execute(select(*messages.columns).where(messages.c.id == row.id))).all()
                await self._rows.park(tx, whole, CRASH_LOOP.format(row.crashes))
                await _DELETE.rows(tx, row_ids=[row.id])
            elif alone:
                alone = False
                kept.append(row)
            else:
                await _move(tx, [Receipt(row.id, row.lease)], now_us + SUSPECT_WAIT_US, keep=False)
        return kept

    async def _is_active(self, tx: Tx, now_us: int) -> bool:
        until_us = now_us + self._lease_us
        return bool(
            await active_consumer.ACTIVATE.rows(
                tx, of_queue=self._queue, consumer=self._consumer, now_us=now_us, until_us=until_us
            )
        )

    async def _stay(self, tx: Tx, requests: Sequence[None]) -> list[HoldfastError | None]:
        """Remain the active consumer, if it is this one: also while it holds all it may and asks for no more."""
        until_us = self._clock.now_us() + self._lease_us
        await active_consumer.STAY.rows(tx, of_queue=self._queue, consumer=self._consumer, until_us=until_us)
        return [None for _ in requests]

    async def _retire(self, tx: Tx, requests: Sequence[None]) -> list[HoldfastError | None]:
        await active_consumer.STEP_DOWN.rows(tx, of_queue=self._queue, consumer=self._consumer)
        now_us = self._clock.now_us()
        tx.on_commit(lambda: self._tell({(self._queue, now_us)}))
        return [None for _ in requests]

    def _delivery(self, row: Any) -> Delivery:
        receipt = Receipt(row.id, row.lease)
        if row.crashes >= SUSPECT_CRASHES:
            self._suspects.add(row.id)
        self._held[row.id] = receipt
        self._in_flight.inc()
        return Delivery(
            message=message_of(row), queue=self._queue, attempt=row.attempt, deliveries=row.deliveries, receipt=receipt
        )

    async def _settle_groups(self, tx: Tx, groups: Sequence[Sequence[Settlement]]) -> list[HoldfastError | None]:
        await self._settle(tx, [settlement for group in groups for settlement in group])
        return [None for _ in groups]

    async def _settle(self, tx: Tx, settlements: Sequence[Settlement]) -> None:
        by_kind: dict[str, list[Settlement]] = {}
        for settlement in settlements:
            by_kind.setdefault(settlement.kind, []).append(settlement)
        if rejected := by_kind.get("reject"):
            await self._reject(tx, rejected)
        if given_up := by_kind.get("park"):
            await self._park(tx, given_up)
        if gone := by_kind.get("ack"):
            row_ids = [settlement.delivery.receipt.row_id for settlement in gone]
            await _DELETE.rows(tx, row_ids=row_ids)
            if replayed := parking.replayed(gone):
                await parking.done(tx, replayed, self._clock.now_us(), self._ids)
        if again := by_kind.get("retry"):
            await self._put_back(tx, again)
        tx.on_commit(lambda: self._settled(settlements))

    async def _reject(self, tx: Tx, rejected: Sequence[Settlement]) -> None:
        for settlement in rejected:
            await self._rows.bury(tx, await _held(tx, settlement), "rejected", settlement.reason)

    async def _park(self, tx: Tx, given_up: Sequence[Settlement]) -> None:
        for settlement in given_up:
            for row in await _held(tx, settlement):
                await self._rows.park(tx, row, settlement.reason)
                await _DELETE.rows(tx, row_ids=[row.id])

    async def _put_back(self, tx: Tx, again: Sequence[Settlement]) -> None:
        # Only under our own lease: if it ran out, another consumer has the message and decides about it.
        now_us = self._clock.now_us()
        rows = [
            {
                "row_id": settlement.delivery.receipt.row_id,
                "held_lease": settlement.delivery.receipt.lease,
                "again_us": now_us + settlement.after_ms * US_PER_MS,
                "counted": int(settlement.counts),
            }
            for settlement in again
        ]
        await _PUT_BACK.many(tx, rows)
        dues = [(self._queue, int(str(row["again_us"]))) for row in rows]
        tx.on_commit(lambda: self._tell(set(dues)))

    def _settled(self, settlements: Sequence[Settlement]) -> None:
        for settlement in settlements:
            settlement.delivery.mark_settled()
            self._suspects.discard(settlement.delivery.receipt.row_id)
            if self._held.pop(settlement.delivery.receipt.row_id, None) is not None:
                self._in_flight.dec()
        for kind, count in Counter(settlement.kind for settlement in settlements).items():
            observe.messages_handled.labels(self._queue, kind).inc(count)
        self._waiter.wake()

    async def _renew(self) -> None:
        """Extend the leases of what is held, so that a slow handler keeps its message."""
        while True:
            await self._clock.sleep(self._lease_us / 3 / US_PER_S)
            try:
                if self._declared is not None and self._declared.single_active_consumer:
                    await self._group.submit(self._stay, None)
                if self._held:
                    await self._group.submit(self._extend, list(self._held.values()))
            except HoldfastError as error:
                log.warning("lease_not_renewed", queue=self._queue, error=error.code)

    async def _extend(self, tx: Tx, groups: Sequence[Sequence[Receipt]]) -> list[HoldfastError | None]:
        due_us = self._clock.now_us() + self._lease_us
        for group in groups:
            await _move(tx, group, due_us, keep=True)
        return [None for _ in groups]

    async def _give_back(self, tx: Tx, groups: Sequence[Sequence[Receipt]]) -> list[HoldfastError | None]:
        now_us = self._clock.now_us()
        for lease, row_ids in _by_lease([receipt for group in groups for receipt in group]):
            await _GIVE_BACK.rows(tx, row_ids=row_ids, held_lease=lease)
        tx.on_commit(lambda: self._tell({(self._queue, now_us)}))
        return [None for _ in groups]


async def _move(tx: Tx, receipts: Sequence[Receipt], due_us: int, *, keep: bool) -> None:
    """Set when messages are due again, under the leases they are held by, and keep or drop these."""
    for lease, row_ids in _by_lease(receipts):
        await _MOVE.rows(tx, row_ids=row_ids, held_lease=lease, to_us=due_us, to_lease=lease if keep else None)


def _by_lease(receipts: Sequence[Receipt]) -> list[tuple[int, list[int]]]:
    leases = {receipt.lease for receipt in receipts}
    return [(lease, [each.row_id for each in receipts if each.lease == lease]) for lease in leases]


async def _held(tx: Tx, settlement: Settlement) -> Sequence[Any]:
    """The message's row, if its lease is still ours: one whose lease ran out is for its new holder to decide.

    It is locked before the row of the error store that it may have come from, as an ack does.
    """
    receipt = settlement.delivery.receipt
    held = (messages.c.id == receipt.row_id) & (messages.c.lease == receipt.lease)
    return (await tx.execute(select(*messages.columns).where(held).with_for_update())).all()
