"""QueueWriter: route messages and write their rows within a transaction, or take waiting ones out of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
from sqlalchemy import Executable, Text, bindparam, delete, false, func, select

from holdfast import observe
from holdfast.clock import US_PER_MS, Clock
from holdfast.db.database import Dialect, Tx
from holdfast.db.prepared import Prepared, among, insert_all
from holdfast.errors import PublishError, PublishRejected, Unroutable
from holdfast.ids import IdSource
from holdfast.messaging.message import Outgoing
from holdfast.messaging.tables import messages
from holdfast.messaging.transports.sql import routing
from holdfast.messaging.transports.sql.wakeups import CHANNEL, hint

Dues = set[tuple[str, int]]
Reached = Sequence[str] | PublishError

ANY_INSTANCE = 0  # the sender of a hint that every instance is to hear

_INSERT = insert_all(messages)
_LOCK = Prepared(lambda _: delete(messages).where(false()))
_NOTIFY = Prepared(lambda _: select(func.pg_notify(bindparam("channel", type_=Text), bindparam("payload", type_=Text))))


def _cancel(dialect: Dialect) -> Executable:
    waiting = (
        select(messages.c.id)
        .where(among(dialect, messages.c.cancel_key, "cancel_keys"), messages.c.lease.is_(None))
        .with_for_update(skip_locked=True)
    )
    return delete(messages).where(messages.c.id.in_(waiting)).returning(messages.c.id)


_CANCEL = Prepared(_cancel)


class QueueWriter:
    """Writes queue rows; `tell` is called with what was written once that is committed."""

    def __init__(self, clock: Clock, ids: IdSource, tell: Callable[[Dues], None]) -> None:
        self._clock = clock
        self._ids = ids
        self._tell = tell

    async def publish_in(self, tx: Tx, batch: Sequence[Outgoing]) -> list[PublishError | None]:
        """Route and write messages within `tx`; a refused one writes nothing."""
        routed = [await _routed(tx, outgoing) for outgoing in batch]
        await self._write(tx, batch, routed)
        return _outcomes(routed)

    async def cancel_in(self, tx: Tx, cancel_keys: Sequence[str]) -> int:
        """Remove what waits under these keys; SKIP LOCKED leaves what a consumer is about to take."""
        return len(await _CANCEL.rows(tx, cancel_keys=list(cancel_keys)))

    async def _write(self, tx: Tx, batch: Sequence[Outgoing], routed: Sequence[Reached]) -> Dues:
        now_us = self._clock.now_us()
        rows: list[dict[str, object]] = []
        dues: Dues = set()
        sent: Counter[str] = Counter()
        for outgoing, reached in zip(batch, routed, strict=True):
            if not isinstance(reached, PublishError):
                due_us = now_us + outgoing.delay_ms * US_PER_MS
                rows += [self._row(outgoing, queue, due_us) for queue in reached]
                dues |= {(queue, due_us) for queue in reached}
                sent[outgoing.message.exchange] += 1
        if rows:
            await _INSERT.many(tx, rows)
            tx.on_commit(lambda: self._tell(dues))
        for exchange, count in sent.items():
            tx.on_commit(partial(observe.messages_published.labels(exchange).inc, count))
        return dues

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


class WholeBatchWriter(QueueWriter):
    """Writes a batch only if none of it is refused, so that a refusal leaves the caller's transaction as it was.

    With `notify` each wakes the consumers of all processes by a NOTIFY that PostgreSQL sends with the commit.
    """

    def __init__(self, clock: Clock, ids: IdSource, tell: Callable[[Dues], None], *, notify: bool = False) -> None:
        super().__init__(clock, ids, tell)
        self._notify = notify

    async def publish_in(self, tx: Tx, batch: Sequence[Outgoing]) -> list[PublishError | None]:
        if tx.deferred:
            # Reading the topology first would fix a snapshot, which a later write cannot leave (SQLITE_BUSY_SNAPSHOT).
            await _LOCK.many(tx, [{}])
        routed = [await _routed(tx, outgoing) for outgoing in batch]
        outcomes = _outcomes(routed)
        if not any(outcomes):
            dues = await self._write(tx, batch, routed)
            if self._notify and tx.dialect == "postgresql":
                for queue, due_us in sorted(dues):
                    await _NOTIFY.rows(tx, channel=CHANNEL, payload=hint(ANY_INSTANCE, due_us, queue))
        return outcomes


async def _routed(tx: Tx, outgoing: Outgoing) -> Reached:
    """The queues that the message reaches, or why it is refused."""
    try:
        _refuse_unstorable(outgoing)
        reached = await routing.queues_for(tx, outgoing.message)
    except PublishRejected as error:
        return error
    return reached if reached or not outgoing.mandatory else _no_route(outgoing)


def _outcomes(routed: Sequence[Reached]) -> list[PublishError | None]:
    return [reached if isinstance(reached, PublishError) else None for reached in routed]


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
