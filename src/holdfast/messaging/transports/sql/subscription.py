"""SqlSubscription: claim rows with a lease, renew it while a handler works, settle within a transaction."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from operator import attrgetter
from types import TracebackType
from typing import Any

import msgspec

from holdfast import observe
from holdfast.clock import US_PER_MS, US_PER_S, Clock
from holdfast.db.database import Database, Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.errors import AlreadySettled, HoldfastError
from holdfast.ids import IdSource
from holdfast.messaging.message import Delivery, Settlement
from holdfast.messaging.topology import Queue
from holdfast.messaging.transports.sql import active_consumer, leases, parking
from holdfast.messaging.transports.sql.lifetimes import Lifetimes
from holdfast.messaging.transports.sql.rows import QueueRows, message_of
from holdfast.messaging.transports.sql.wakeups import Waiter, Wakeups

HALVED_FROM = 50  # messages of prefetch: below it a claim takes all there is room for
SUSPECT_CRASHES = 2
SUSPECT_WAIT_US = US_PER_S
CRASH_LOOP = "CrashLoop: {} deliveries ended without an outcome; its handler may end the process, or outlast the lease"

log = observe.logger("sql_transport")


class _Claimed(msgspec.Struct, frozen=True):
    rows: Sequence[Any]
    next_due_us: int | None


class SqlSubscription:
    """A consumer on one queue."""

    def __init__(
        self,
        queue: str,
        *,
        database: Database,
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
        self._database = database
        self._direct = database.dialect == "postgresql"
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
        self._held: dict[int, leases.Receipt] = {}
        self._suspects: set[int] = set()  # of those held: what may have ended a process before
        self._renewal: asyncio.Task[None] | None = None
        self._scarce_us: int | None = None  # since when there is little room
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
            if self._has_one_active:
                await self._group.submit(self._retire, None)
            await self._lifetimes.leave(self._declared)
            self._declared = None

    def limit(self, prefetch: int) -> None:
        self._prefetch = prefetch
        if self._has_room():  # less is claimed with the next settlement or poll
            self._waiter.wake()

    def stop(self) -> None:
        self._closed = True
        self._waiter.wake()

    async def take(self) -> list[Delivery]:
        while not self._closed:
            self._waiter.begin()
            until_us = self._clock.now_us() + self._poll_us
            if (wanted := self._wanted()) > 0:
                claimed = await self._claimed(wanted)
                if claimed.rows:
                    return self._deliveries(claimed.rows)
                if claimed.next_due_us is not None:
                    until_us = min(until_us, claimed.next_due_us)
                # One that is due and was not claimed is locked by another transaction; polling finds it.
            await self._waiter.sleep(until_us)
        return []

    @property
    def _has_one_active(self) -> bool:
        """Whether one consumer at a time gets all messages of the queue."""
        return self._declared is not None and self._declared.single_active_consumer

    def _has_room(self) -> bool:
        """Whether there is room for so many more that a claim is worth it."""
        worth = self._prefetch // 4 if self._prefetch >= HALVED_FROM else 1
        return self._prefetch - len(self._held) >= worth

    def _wanted(self) -> int:
        """How many to claim now; none while there is so little room that a transaction is not worth it.

        Of many, half at a time: while the database finds one half, the handlers work on the other. Little room is used
        once it stayed little for as long as a poll: what is held may wait for just the messages that fit there.
        """
        room = self._prefetch - len(self._held)
        if self._prefetch < HALVED_FROM:
            return room
        if self._has_room():
            self._scarce_us = None
            return min(room, self._prefetch // 2)
        if self._scarce_us is None:
            self._scarce_us = self._clock.now_us()
        return room if self._clock.now_us() >= self._scarce_us + self._poll_us else 0

    async def settle(self, settlements: Sequence[Settlement], tx: Tx | None = None) -> None:
        for settlement in settlements:
            if settlement.delivery.settled:
                raise AlreadySettled(f"message {settlement.delivery.message.message_id} was settled before")
        if tx is not None:
            await self._settle(tx, settlements)
        elif self._direct and _is_one_statement(settlements):
            async with self._database.single() as single:
                await self._settle(single, settlements)
        else:
            await self._group.submit(self._settle_groups, settlements, traced=False)

    async def _claimed(self, room: int) -> _Claimed:
        if not self._direct or self._has_one_active:
            return await self._group.submit(self._claim, room, traced=False)
        # PostgreSQL runs this beside whatever the writer is doing, in one round trip instead of three.
        now_us = self._clock.now_us()
        async with self._database.single() as single:
            rows = await self._lease(single, room, now_us)
        if any(row.crashes >= SUSPECT_CRASHES for row in rows):
            rows = await self._group.submit(self._sort_out, rows)
            return _Claimed(rows, None if rows else now_us)
        if rows:
            return _Claimed(_in_order(rows), None)
        async with self._database.single() as single:
            return _Claimed((), await self._soonest(single, now_us))

    async def _claim(self, tx: Tx, rooms: Sequence[int]) -> list[_Claimed | HoldfastError]:
        """Lease what is due, in order of its instant; SKIP LOCKED keeps processes out of each other's way."""
        return [await self._claim_once(tx, room) for room in rooms]

    async def _claim_once(self, tx: Tx, room: int) -> _Claimed:
        now_us = self._clock.now_us()
        if self._has_one_active and not await self._is_active(tx, now_us):
            return _Claimed((), None)  # polling finds out when the active one is gone
        rows = await self._lease(tx, room, now_us)
        if rows:
            kept = await self._without_suspects(tx, rows)
            return _Claimed(kept, None if kept else now_us)  # none was to be kept: look again at once
        return _Claimed((), await self._soonest(tx, now_us))

    async def _lease(self, tx: Tx, room: int, now_us: int) -> list[Any]:
        until_us = now_us + self._lease_us
        return await leases.CLAIM.rows(
            tx, of_queue=self._queue, now_us=now_us, room=room, until_us=until_us, new_lease=self._ids.next()
        )

    async def _soonest(self, tx: Tx, now_us: int) -> int | None:
        (soonest,) = await leases.SOONEST.rows(tx, of_queue=self._queue, now_us=now_us)
        due_us: int | None = soonest.due_us
        return due_us

    async def _sort_out(self, tx: Tx, claims: Sequence[Sequence[Any]]) -> list[list[Any] | HoldfastError]:
        return [await self._without_suspects(tx, rows) for rows in claims]

    async def _without_suspects(self, tx: Tx, rows: Sequence[Any]) -> list[Any]:
        """Of the messages that may have ended a process hold one at a time, and park who did so too often.

        All that a process held when it ended count as crashed, so most of them are innocent: held alone, they get
        through, and only the guilty one goes on counting.
        """
        now_us = self._clock.now_us()
        kept: list[Any] = []
        alone = not self._suspects
        for row in _in_order(rows):
            if row.crashes < SUSPECT_CRASHES:
                kept.append(row)
            elif row.crashes >= self._crashes_max:
                (whole,) = await leases.WHOLE.rows(tx, row_ids=[row.id])
                await self._rows.park(tx, [(whole, CRASH_LOOP.format(row.crashes))])
            elif alone:
                alone = False
                kept.append(row)
            else:
                await leases.move(tx, [leases.Receipt(row.id, row.lease)], now_us + SUSPECT_WAIT_US, keep=False)
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

    def _deliveries(self, rows: Sequence[Any]) -> list[Delivery]:
        self._delivered.inc(len(rows))
        self._in_flight.inc(len(rows))
        deliveries = []
        for row in rows:
            receipt = leases.Receipt(row.id, row.lease)
            self._held[row.id] = receipt
            if row.crashes >= SUSPECT_CRASHES:
                self._suspects.add(row.id)
            deliveries.append(
                Delivery(
                    message=message_of(row),
                    queue=self._queue,
                    attempt=row.attempt,
                    deliveries=row.deliveries,
                    receipt=receipt,
                )
            )
        return deliveries

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
            await leases.DELETE.rows(tx, row_ids=row_ids)
            if replayed := parking.replayed(gone):
                await parking.done(tx, replayed, self._clock.now_us(), self._ids)
        if again := by_kind.get("retry"):
            await self._put_back(tx, again)
        tx.on_commit(lambda: self._settled(settlements))

    async def _reject(self, tx: Tx, rejected: Sequence[Settlement]) -> None:
        for row, reason in await leases.held(tx, rejected):
            # One by one: what one of them pushes out of a full queue comes before the next one.
            await self._rows.bury(tx, [row], "rejected", reason)

    async def _park(self, tx: Tx, given_up: Sequence[Settlement]) -> None:
        await self._rows.park(tx, await leases.held(tx, given_up))

    async def _put_back(self, tx: Tx, again: Sequence[Settlement]) -> None:
        # Only under our own lease: if it ran out, another consumer has the message and decides about it.
        now_us = self._clock.now_us()
        dues = [now_us + settlement.after_ms * US_PER_MS for settlement in again]
        rows = [
            {
                "row_id": settlement.delivery.receipt.row_id,
                "held_lease": settlement.delivery.receipt.lease,
                "again_us": due_us,
                "counted": int(settlement.counts),
            }
            for settlement, due_us in zip(again, dues, strict=True)
        ]
        await leases.PUT_BACK.many(tx, rows)
        tx.on_commit(lambda: self._tell({(self._queue, due_us) for due_us in dues}))

    def _settled(self, settlements: Sequence[Settlement]) -> None:
        held = len(self._held)
        twice: AlreadySettled | None = None
        for settlement in settlements:
            try:
                settlement.delivery.mark_settled()
            except AlreadySettled as error:  # by somebody at the same time; its neighbours are settled all the same
                twice = error
            row_id = settlement.delivery.receipt.row_id
            self._held.pop(row_id, None)
            self._suspects.discard(row_id)
        self._in_flight.dec(held - len(self._held))
        for kind, count in Counter([settlement.kind for settlement in settlements]).items():
            observe.messages_handled.labels(self._queue, kind).inc(count)
        self._waiter.wake()
        if twice is not None:
            raise twice

    async def _renew(self) -> None:
        """Extend the leases of what is held, so that a slow handler keeps its message."""
        while True:
            await self._clock.sleep(self._lease_us / 3 / US_PER_S)
            try:
                if self._has_one_active:
                    await self._group.submit(self._stay, None)
                if self._held:
                    await self._group.submit(self._extend, list(self._held.values()))
            except HoldfastError as error:
                log.warning("lease_not_renewed", queue=self._queue, error=error.code)

    async def _extend(self, tx: Tx, groups: Sequence[Sequence[leases.Receipt]]) -> list[HoldfastError | None]:
        due_us = self._clock.now_us() + self._lease_us
        for group in groups:
            await leases.move(tx, group, due_us, keep=True)
        return [None for _ in groups]

    async def _give_back(self, tx: Tx, groups: Sequence[Sequence[leases.Receipt]]) -> list[HoldfastError | None]:
        now_us = self._clock.now_us()
        for lease, row_ids in leases.by_lease([receipt for group in groups for receipt in group]):
            await leases.GIVE_BACK.rows(tx, row_ids=row_ids, held_lease=lease)
        tx.on_commit(lambda: self._tell({(self._queue, now_us)}))
        return [None for _ in groups]


def _in_order(rows: Sequence[Any]) -> list[Any]:
    return sorted(rows, key=attrgetter("ready_us", "id"))


def _is_one_statement(settlements: Sequence[Settlement]) -> bool:
    """Whether all there is to do is to remove rows, or to put them back."""
    kinds = {settlement.kind for settlement in settlements}
    return kinds == {"retry"} or (kinds == {"ack"} and not parking.replayed(settlements))
