"""Lifetimes: queues that pass are removed with their instance, after their last consumer, or when nobody uses them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection

from sqlalchemy import delete, or_, select, update

from holdfast import observe
from holdfast.clock import US_PER_MS, US_PER_S, Clock
from holdfast.db.database import Database, Tx
from holdfast.errors import HoldfastError, NoSuchQueue, TopologyMismatch
from holdfast.messaging.tables import bindings, messages, queues
from holdfast.messaging.topology import Queue
from holdfast.messaging.transports.sql import routing

log = observe.logger("sql_transport")


class Lifetimes:
    """Keeps alive what this instance uses and removes what nobody does.

    An instance shows that it lives by touching its queues three times per lease; one that has not for a whole lease is
    taken for dead. So the exclusive queue of a killed process, and an auto-delete queue whose last consumer was in
    another process, go within about a lease. Messages of a removed queue are removed with it, as in RabbitMQ.
    """

    def __init__(self, database: Database, clock: Clock, instance: int, *, lease_us: int) -> None:
        self._database = database
        self._clock = clock
        self._instance = instance
        self._lease_us = lease_us
        self._consumers: Counter[str] = Counter()
        self._passing: dict[str, Queue] = {}  # those of them that may pass
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="queue-lifetimes")

    async def stop(self) -> None:
        """Stop, and remove the exclusive queues of this instance."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        self._task = None
        try:
            async with self._database.transaction() as tx:
                mine = await tx.execute(select(queues.c.name).where(queues.c.owner == self._instance))
                await remove(tx, mine.scalars().all())
        except HoldfastError as error:
            log.warning("exclusive_queues_not_removed", error=error.code, detail=error.detail)  # others do it later

    async def forget_all(self, tx: Tx) -> None:
        """Where one process owns the database: what a former one left behind has no instance any more."""
        await remove(tx, (await tx.execute(select(queues.c.name).where(queues.c.owner.is_not(None)))).scalars().all())

    async def enter(self, name: str) -> Queue:
        """A consumer comes; raises `NoSuchQueue`, or `TopologyMismatch` for the exclusive queue of another instance."""
        async with self._database.read() as tx:
            queue = (await routing.known_to(tx)).queues.get(name)
            if queue is None:
                raise NoSuchQueue(f"there is no queue {name!r} (404 NOT_FOUND); declare it first")
            owner = (await tx.execute(select(queues.c.owner).where(queues.c.name == name))).scalar_one_or_none()
        if owner is not None and owner != self._instance:
            raise TopologyMismatch(f"queue {name!r} is exclusive to another instance (405 RESOURCE_LOCKED)")
        self._consumers[name] += 1
        if queue.passes:
            self._passing[name] = queue
            async with self._database.transaction() as tx:
                await self._touch(tx)
        return queue

    async def leave(self, queue: Queue) -> None:
        """A consumer goes; an exclusive auto-delete queue goes with the last one at once."""
        self._consumers[queue.name] -= 1
        if self._consumers[queue.name] > 0:
            return
        del self._consumers[queue.name]
        self._passing.pop(queue.name, None)
        if queue.exclusive and queue.auto_delete:
            async with self._database.transaction() as tx:
                await remove(tx, [queue.name])

    async def _run(self) -> None:
        while True:
            try:
                soon_us = await self._keep_and_remove()
            except HoldfastError as error:
                log.warning("queue_lifetimes_failed", error=error.code, detail=error.detail)
                soon_us = None
            wait_us = self._lease_us // 3
            if soon_us is not None:
                wait_us = max(10_000, min(wait_us, soon_us - self._clock.now_us()))
            await self._clock.sleep(wait_us / US_PER_S)

    async def _keep_and_remove(self) -> int | None:
        """Answers when the next queue ends; where none may pass, as in most programs, nothing is written."""
        async with self._database.read() as tx:
            if not any(queue.passes for queue in (await routing.known_to(tx)).queues.values()):
                return None
        async with self._database.transaction() as tx:
            await self._touch(tx)
            await self._remove_unused(tx)
            return await self._next_end(tx)

    async def _touch(self, tx: Tx) -> None:
        used = or_(queues.c.owner == self._instance, queues.c.name.in_(sorted(self._passing)))
        await tx.execute(update(queues).where(used).values(used_us=self._clock.now_us()))

    async def _remove_unused(self, tx: Tx) -> None:
        now_us = self._clock.now_us()
        passing = [queue for queue in (await routing.known_to(tx)).queues.values() if queue.passes]
        if not passing:
            return
        names = sorted(queue.name for queue in passing)
        state = select(queues.c.name, queues.c.used_us, queues.c.owner).where(queues.c.name.in_(names))
        used = {row.name: row.used_us for row in await tx.execute(state.with_for_update(skip_locked=True))}
        ended = [
            queue.name for queue in passing if queue.name in used and self._end_us(queue, used[queue.name]) <= now_us
        ]
        await remove(tx, ended)

    async def _next_end(self, tx: Tx) -> int | None:
        expiring = [queue for queue in (await routing.known_to(tx)).queues.values() if queue.expires_ms is not None]
        if not expiring:
            return None
        state = select(queues.c.name, queues.c.used_us).where(queues.c.name.in_([queue.name for queue in expiring]))
        used = {row.name: row.used_us for row in await tx.execute(state)}
        return min((self._end_us(queue, used[queue.name]) for queue in expiring if queue.name in used), default=None)

    def _end_us(self, queue: Queue, used_us: int) -> int:
        """When a queue that nobody touches any more is to be removed."""
        ends = []
        if queue.exclusive or queue.auto_delete:
            ends.append(used_us + self._lease_us)
        if queue.expires_ms is not None:
            ends.append(used_us + queue.expires_ms * US_PER_MS)
        return min(ends)


async def remove(tx: Tx, names: Collection[str]) -> None:
    """Remove queues with their bindings and messages."""
    if names:
        await tx.execute(delete(bindings).where(bindings.c.queue.in_(names)))
        await tx.execute(delete(messages).where(messages.c.queue.in_(names)))
        await tx.execute(delete(queues).where(queues.c.name.in_(names)))
        tx.memo.clear()
        log.info("queues_removed", queues=sorted(names)[:20])
