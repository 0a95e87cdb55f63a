"""SqlTransport: queues as rows, claimed with a lease, in the database of the business rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
from sqlalchemy import Executable, case, delete, func, select, update

from holdfast import observe
from holdfast.clock import US_PER_MS, Clock
from holdfast.db.database import Database, Dialect, Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.db.prepared import Prepared, among, insert_all
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
from holdfast.messaging.topology import Topology
from holdfast.messaging.transport import Features, QueueStats
from holdfast.messaging.transports.sql import routing
from holdfast.messaging.transports.sql.subscription import SqlSubscription
from holdfast.messaging.transports.sql.wakeups import Wakeups
from holdfast.settings import MessagingSettings

Tell = Callable[[str, int], None]

_INSERT = insert_all(messages)


def _cancel(dialect: Dialect) -> Executable:
    waiting = (
        select(messages.c.id)
        .where(among(dialect, messages.c.cancel_key, "cancel_keys"), messages.c.lease.is_(None))
        .with_for_update(skip_locked=True)
    )
    return delete(messages).where(messages.c.id.in_(waiting)).returning(messages.c.id)


_CANCEL = Prepared(_cancel)


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
        self._features = Features(
            name=database.dialect,
            shares_database=True,
            native_delay=True,
            several_processes=database.dialect == "postgresql",
        )

    @property
    def features(self) -> Features:
        return self._features

    async def start(self) -> None:
        """Take over what a former process left; on SQLite its leases are void at once: one process writes."""
        if self._database.dialect == "sqlite":
            async with self._database.transaction() as tx:
                held = update(messages).where(messages.c.lease.is_not(None))
                await tx.execute(held.values(lease=None, due_us=self._clock.now_us()))

    async def close(self) -> None:
        """Nothing of its own to give back: database, group commit and notifier belong to who made them."""

    async def declare(self, topology: Topology) -> None:
        async with self._database.transaction() as tx:
            await routing.declare(tx, topology)

    async def publish(self, batch: Sequence[Outgoing]) -> list[PublishError | None]:
        try:
            return await self._group.submit(self._publish_batches, batch)
        except OutcomeUnknown as error:
            return [PublishUnconfirmed(error.detail) for _ in batch]
        except HoldfastError as error:
            return [PublishRejected(error.detail) for _ in batch]

    async def publish_in(self, tx: Tx, batch: Sequence[Outgoing]) -> list[PublishError | None]:
        """Route and write messages within `tx`; a refused one writes nothing."""
        now_us = self._clock.now_us()
        outcomes: list[PublishError | None] = []
        rows: list[dict[str, object]] = []
        for outgoing in batch:
            try:
                _refuse_unstorable(outgoing)
                reached = await routing.queues_for(tx, outgoing.message)
            except PublishRejected as error:
                outcomes.append(error)
                continue
            if not reached and outgoing.mandatory:
                outcomes.append(_no_route(outgoing))
                continue
            due_us = now_us + outgoing.delay_ms * US_PER_MS
            rows += [self._row(outgoing, queue, due_us) for queue in reached]
            outcomes.append(None)
        if rows:
            await _INSERT.many(tx, rows)
            dues = {(str(row["queue"]), int(str(row["due_us"]))) for row in rows}
            tx.on_commit(lambda: self._tell(dues))
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
            prefetch=prefetch,
            lease_us=self._settings.lease_ms * US_PER_MS,
            poll_us=self._settings.poll_ms * US_PER_MS,
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

    def _row(self, outgoing: Outgoing, queue: str, due_us: int) -> dict[str, object]:
        message = outgoing.message
        return {
            "id": self._ids.next(),
            "queue": queue,
            "due_us": due_us,
            "ready_us": due_us,
            "lease": None,
            "attempt": 1,
            "deliveries": 0,
            "cancel_key": outgoing.cancel_key,
            "message_id": message.message_id,
            "exchange": message.exchange,
            "routing_key": message.routing_key,
            "type": message.type,
            "content_type": message.content_type,
            "headers": msgspec.json.encode(message.headers).decode(),
            "body": message.body,
            "published_us": message.timestamp_us,
        }

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
