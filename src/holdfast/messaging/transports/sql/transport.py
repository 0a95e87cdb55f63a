"""SqlTransport: queues as rows, claimed with a lease, in the database of the business rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from weakref import WeakSet

from sqlalchemy import Executable, case, delete, func, select, update

from holdfast import observe
from holdfast.clock import US_PER_MS, Clock
from holdfast.db.database import Database, Dialect, Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.db.prepared import Prepared, among
from holdfast.errors import (
    HoldfastError,
    InvalidInput,
    OutcomeUnknown,
    PublishError,
    PublishRejected,
    PublishUnconfirmed,
    Unroutable,
)
from holdfast.ids import IdSource
from holdfast.messaging.message import Outgoing
from holdfast.messaging.tables import messages, queues
from holdfast.messaging.topology import Queue, Topology
from holdfast.messaging.transport import Features, QueueStats
from holdfast.messaging.transports.sql import routing
from holdfast.messaging.transports.sql.expiry import Expiry
from holdfast.messaging.transports.sql.lifetimes import Lifetimes
from holdfast.messaging.transports.sql.subscription import SqlSubscription
from holdfast.messaging.transports.sql.wakeups import Wakeups
from holdfast.messaging.transports.sql.writer import Writer
from holdfast.settings import MessagingSettings

Tell = Callable[[str, int], None]


def _cancel(dialect: Dialect) -> Executable:
    waiting = (
        select(messages.c.id)
        .where(among(dialect, messages.c.cancel_key, "cancel_keys"), messages.c.lease.is_(None))
        .with_for_update(skip_locked=True)
    )
    return delete(messages).where(messages.c.id.in_(waiting)).returning(messages.c.id)


_CANCEL = Prepared(_cancel)


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
        self._writer = Writer(clock, ids, self._tell)
        self._lifetimes = Lifetimes(database, clock, self._instance, lease_us=settings.lease_ms * US_PER_MS)
        self._expiry = Expiry(
            group, clock, wakeups=self._wakeups, writer=self._writer, poll_us=settings.poll_ms * US_PER_MS
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
            return await self._group.submit(self._publish_batches, batch)
        except OutcomeUnknown as error:
            return [PublishUnconfirmed(error.detail) for _ in batch]
        except InvalidInput:
            raise  # asked from within a transaction that this would have to wait for
        except HoldfastError as error:
            return [PublishRejected(error.detail) for _ in batch]

    async def publish_in(self, tx: Tx, batch: Sequence[Outgoing]) -> list[PublishError | None]:
        """Route and write messages within `tx`; a refused one writes nothing."""
        outcomes: list[PublishError | None] = []
        sent: list[tuple[Outgoing, Sequence[Queue]]] = []
        for outgoing in batch:
            try:
                _refuse_unstorable(outgoing)
                reached = await routing.queues_for(tx, outgoing.message)
                await self._writer.room_for(tx, reached)
            except PublishRejected as error:
                outcomes.append(error)
                continue
            if not reached and outgoing.mandatory:
                outcomes.append(_no_route(outgoing))
                continue
            sent.append((outgoing, reached))
            outcomes.append(None)
        await self._writer.write(tx, sent)
        stored = (outgoing for outgoing, outcome in zip(batch, outcomes, strict=True) if outcome is None)
        for exchange, count in Counter(outgoing.message.exchange for outgoing in stored).items():
            tx.on_commit(partial(observe.messages_published.labels(exchange).inc, count))
        return outcomes

    async def cancel_in(self, tx: Tx, cancel_keys: Sequence[str]) -> int:
        """Remove what waits under these keys; SKIP LOCKED leaves what a consumer is about to take."""
        return len(await _CANCEL.rows(tx, cancel_keys=list(cancel_keys)))

    def subscribe(self, queue: str, *, prefetch: int) -> SqlSubscription:
        return SqlSubscription(
            queue,
            group=self._group,
            clock=self._clock,
            ids=self._ids,
            wakeups=self._wakeups,
            tell=self._tell,
            writer=self._writer,
            lifetimes=self._lifetimes,
            prefetch=prefetch,
            lease_us=self._settings.lease_ms * US_PER_MS,
            poll_us=self._settings.poll_ms * US_PER_MS,
            crashes_max=self._settings.crashes_max,
        )

    def tell(self, dues: set[tuple[str, int]]) -> None:
        """For each (queue, instant) wake who waits, here and in other processes; for rows that others wrote."""
        self._tell(dues)

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

    async def _publish_batches(
        self, tx: Tx, batches: Sequence[Sequence[Outgoing]]
    ) -> list[list[PublishError | None] | HoldfastError]:
        together = [outgoing for batch in batches for outgoing in batch]
        outcomes = iter(await self.publish_in(tx, together))
        return [[next(outcomes) for _ in batch] for batch in batches]

    def _tell(self, dues: set[tuple[str, int]]) -> None:
        self._wakeups.tell(dues)
        if self._tell_others is not None:
            for queue, due_us in dues:
                self._tell_others(queue, due_us)


def _refuse_unstorable(outgoing: Outgoing) -> None:
    """Raise `PublishRejected` for text that no database stores: NUL, or half a surrogate pair."""
    message = outgoing.message
    texts = (message.exchange, message.routing_key, message.message_id, message.type, message.content_type)
    for text in (*texts, outgoing.cancel_key or "", *message.headers, *message.headers.values()):
        if "\x00" in text or not (text.isascii() or _is_unicode(text)):
            raise PublishRejected(
                f"message {message.message_id!r:.60}: {text!r:.60} holds characters that cannot be stored"
            )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_route(outgoing: Outgoing) -> Unroutable:
    message = outgoing.message
    return Unroutable(
        f"no queue takes key {message.routing_key!r} of exchange {message.exchange!r} (312 NO_ROUTE); "
        f"message {message.message_id} is stored nowhere: bind a queue, or send it with mandatory=False"
    )
