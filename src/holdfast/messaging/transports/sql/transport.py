"""SqlTransport: queues as rows, claimed with a lease, in the database of the business rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakSet

from sqlalchemy import case, func, select, update

from holdfast.clock import US_PER_MS, Clock
from holdfast.db.database import Database, Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.errors import (
    HoldfastError,
    InvalidInput,
    OutcomeUnknown,
    PublishError,
    PublishRejected,
    PublishUnconfirmed,
)
from holdfast.ids import IdSource
from holdfast.messaging.message import Outgoing
from holdfast.messaging.tables import messages, queues
from holdfast.messaging.topology import Topology
from holdfast.messaging.transport import Features, QueueStats
from holdfast.messaging.transports.sql import routing
from holdfast.messaging.transports.sql.expiry import Expiry
from holdfast.messaging.transports.sql.insight import Peeked, pending
from holdfast.messaging.transports.sql.lifetimes import Lifetimes
from holdfast.messaging.transports.sql.queue_writer import QueueWriter
from holdfast.messaging.transports.sql.rows import QueueRows
from holdfast.messaging.transports.sql.subscription import SqlSubscription
from holdfast.messaging.transports.sql.wakeups import Wakeups
from holdfast.settings import MessagingSettings

Tell = Callable[[str, int], None]


_TAKEN_OVER: WeakSet[Database] = WeakSet()


class SqlTransport:
    """The transport over SQLite and PostgreSQL.

    `tell_others` spreads wake-ups to other processes; SQLite has none, since one process owns the file.
    """

    def __init__(
        self,
        database: Database,
        group: GroupCommit,
        clock: Clock,
        ids: IdSource,
        settings: MessagingSettings,
        *,
        wakeups: Wakeups | None = None,
        tell_others: Tell | None = None,
    ) -> None:
        self._database = database
        self._group = group
        self._clock = clock
        self._ids = ids
        self._settings = settings
        self._wakeups = wakeups or Wakeups()
        self._tell_others = tell_others
        self._instance = ids.next()  # whom its exclusive queues belong to
        self._rows = QueueRows(clock, ids, self.tell)
        self._writer = QueueWriter(self._rows)
        self._lifetimes = Lifetimes(database, clock, self._instance, lease_us=settings.lease_ms * US_PER_MS)
        self._expiry = Expiry(
            group, clock, wakeups=self._wakeups, rows=self._rows, poll_us=settings.poll_ms * US_PER_MS
        )
        self._features = Features(
            name=database.dialect,
            shares_database=True,
            native_delay=True,
            several_processes=database.dialect == "postgresql",
            declares=routing.OFFERED,
        )

    @property
    def features(self) -> Features:
        return self._features

    async def start(self) -> None:
        """Take over what a former process left; on SQLite its leases are void at once: one process writes.

        Only the first transport on an opened database does so: what the others find may be the first one's.
        """
        if self._database.dialect == "sqlite" and self._database not in _TAKEN_OVER:
            _TAKEN_OVER.add(self._database)
            async with self._database.transaction() as tx:
                held = update(messages).where(messages.c.lease.is_not(None))
                await tx.execute(held.values(lease=None, due_us=self._clock.now_us(), crashes=messages.c.crashes + 1))
                await self._lifetimes.forget_all(tx)
        self._lifetimes.start()
        self._expiry.start()

    async def close(self) -> None:
        """Remove the queues of this instance; database, group commit and notifier belong to who made them."""
        await self._expiry.stop()
        await self._lifetimes.stop()

    async def declare(self, topology: Topology) -> None:
        topology.refuse_unless(self._features.name, self._features.declares)
        async with self._database.transaction() as tx:
            await routing.declare(tx, topology, self._instance, self._clock.now_us())

    async def check(self, topology: Topology) -> None:
        async with self._database.read() as tx:
            routing.check(await routing.known_to(tx), topology, passive=True)

    async def topology(self) -> Topology:
        async with self._database.read() as tx:
            return (await routing.known_to(tx)).topology()

    async def publish(self, batch: Sequence[Outgoing]) -> list[PublishError | None]:
        try:
            return await self._group.submit(self._publish_batches, batch, traced=False)
        except OutcomeUnknown as error:
            return [PublishUnconfirmed(error.detail) for _ in batch]
        except InvalidInput:
            raise  # asked from within a transaction that this would have to wait for
        except HoldfastError as error:
            return [PublishRejected(error.detail) for _ in batch]

    async def publish_in(self, tx: Tx, batch: Sequence[Outgoing]) -> list[PublishError | None]:
        return await self._writer.publish_in(tx, batch)

    async def cancel_in(self, tx: Tx, cancel_keys: Sequence[str]) -> int:
        return await self._writer.cancel_in(tx, cancel_keys)

    async def move_in(self, tx: Tx, cancel_keys: Sequence[str], due_us: int) -> int:
        return await self._writer.move_in(tx, cancel_keys, due_us)

    def subscribe(self, queue: str, *, prefetch: int) -> SqlSubscription:
        return SqlSubscription(
            queue,
            database=self._database,
            group=self._group,
            clock=self._clock,
            ids=self._ids,
            wakeups=self._wakeups,
            tell=self.tell,
            rows=self._rows,
            lifetimes=self._lifetimes,
            prefetch=prefetch,
            lease_us=self._settings.lease_ms * US_PER_MS,
            poll_us=self._settings.poll_ms * US_PER_MS,
            crashes_max=self._settings.crashes_max,
        )

    async def stats(self, queue: str) -> QueueStats:
        now_us = self._clock.now_us()
        leased = messages.c.lease.is_not(None)
        due = messages.c.due_us <= now_us
        async with self._database.read() as tx:
            known = (await tx.execute(select(queues.c.name).where(queues.c.name == queue))).first()
            if known is None:
                raise InvalidInput(f"there is no queue {queue!r}")
            counts = select(
                func.coalesce(func.sum(case((leased & ~due, 1), else_=0)), 0).label("unacked"),
                func.coalesce(func.sum(case((due, 1), else_=0)), 0).label("ready"),
                func.coalesce(func.sum(case((~leased & ~due, 1), else_=0)), 0).label("delayed"),
            ).where(messages.c.queue == queue)
            row = (await tx.execute(counts)).one()
        return QueueStats(ready=row.ready, unacked=row.unacked, delayed=row.delayed)

    async def pending(
        self, *, queue: str | None = None, cancel_key: str | None = None, limit: int = 100
    ) -> Sequence[Peeked]:
        """Messages that are not due yet, the soonest first; see `insight.pending`."""
        async with self._database.read() as tx:
            return await pending(tx, self._clock.now_us(), queue=queue, cancel_key=cancel_key, limit=limit)

    async def _publish_batches(
        self, tx: Tx, batches: Sequence[Sequence[Outgoing]]
    ) -> list[list[PublishError | None] | HoldfastError]:
        together = [outgoing for batch in batches for outgoing in batch]
        outcomes = iter(await self.publish_in(tx, together))
        return [[next(outcomes) for _ in batch] for batch in batches]

    def tell(self, dues: set[tuple[str, int]]) -> None:
        """Wake who waits for these (queue, instant), here and in other processes; for what is committed."""
        self._wakeups.tell(dues)
        if self._tell_others is not None:
            for queue, due_us in dues:
                self._tell_others(queue, due_us)
