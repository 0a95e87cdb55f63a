"""QueueWriter: route messages and write their rows within a transaction, or take waiting ones out of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

from sqlalchemy import BigInteger, Executable, Text, bindparam, delete, false, func, select, update

from holdfast import observe
from holdfast.db.database import Dialect, Tx
from holdfast.db.prepared import Prepared, among
from holdfast.errors import PublishError, PublishRejected, Unroutable, Unstorable
from holdfast.messaging.message import Outgoing
from holdfast.messaging.tables import messages
from holdfast.messaging.topology import Queue
from holdfast.messaging.transports.sql import routing
from holdfast.messaging.transports.sql.rows import Dues, QueueRows, refuses
from holdfast.messaging.transports.sql.wakeups import CHANNEL, hint

Reached = Sequence[Queue] | PublishError

ANY_INSTANCE = 0  # the sender of a hint that every instance is to hear

_LOCK = Prepared(lambda _: delete(messages).where(false()))
_NOTIFY = Prepared(lambda _: select(func.pg_notify(bindparam("channel", type_=Text), bindparam("payload", type_=Text))))


def _cancel(dialect: Dialect) -> Executable:
    waiting = (
        select(messages.c.id)
        .where(among(dialect, messages.c.cancel_key, "cancel_keys"), messages.c.lease.is_(None))
        .with_for_update(skip_locked=True)
    )
    return delete(messages).where(messages.c.id.in_(waiting)).returning(messages.c.id)


def _reschedule(dialect: Dialect) -> Executable:
    # A message that was delivered before is on its retries, whose instant is not the sender's to choose.
    waiting = (
        select(messages.c.id)
        .where(among(dialect, messages.c.cancel_key, "cancel_keys"))
        .where(messages.c.lease.is_(None), messages.c.deliveries == 0)
        .with_for_update(skip_locked=True)
    )
    to_us = bindparam("to_us", type_=BigInteger)
    return (
        update(messages)
        .where(messages.c.id.in_(waiting))
        .values(due_us=to_us, ready_us=to_us, expires_us=messages.c.expires_us - messages.c.due_us + to_us)
        .returning(messages.c.queue, messages.c.due_us, messages.c.expires_us)
    )


_CANCEL = Prepared(_cancel)
_RESCHEDULE = Prepared(_reschedule)


class QueueWriter:
    """Routes messages and hands them to the rows of the queues they reach."""

    def __init__(self, rows: QueueRows) -> None:
        self._rows = rows

    async def publish_in(self, tx: Tx, batch: Sequence[Outgoing]) -> list[PublishError | None]:
        """Route and write messages within `tx`; a refused one writes nothing."""
        routed = await self._routed(tx, batch)
        await self._write(tx, batch, routed)
        return _outcomes(routed)

    async def cancel_in(self, tx: Tx, cancel_keys: Sequence[str]) -> int:
        """Remove what waits under these keys; SKIP LOCKED leaves what a consumer is about to take."""
        return len(await _CANCEL.rows(tx, cancel_keys=list(cancel_keys)))

    async def move_in(self, tx: Tx, cancel_keys: Sequence[str], due_us: int) -> int:
        """Let what waits under these keys be due at another instant, its time to live counted from there."""
        moved = await _RESCHEDULE.rows(tx, cancel_keys=list(cancel_keys), to_us=due_us)
        dues = self._rows.will_tell(tx, moved)
        await self._notify(tx, dues)
        return len(moved)

    async def _notify(self, tx: Tx, dues: Dues) -> None:
        """Tell other processes within the transaction, for a writer that does so."""

    async def _routed(self, tx: Tx, batch: Sequence[Outgoing]) -> list[Reached]:
        """For each message the queues that it reaches, or why it is refused."""
        known = await routing.known_to(tx)
        routes: dict[tuple[str, str], Sequence[Queue]] = {}
        routed: list[Reached] = []
        for outgoing in batch:
            message = outgoing.message
            try:
                _refuse_unstorable(outgoing)
                key = (message.exchange, message.routing_key)
                reached = routes.get(key)
                if reached is None:
                    reached = routes[key] = known.route(*key)
                if any(map(refuses, reached)):
                    await self._rows.room_for(tx, reached, delayed=outgoing.delay_ms > 0)
            except PublishRejected as error:
                routed.append(error)
            else:
                routed.append(reached if reached or not outgoing.mandatory else _no_route(outgoing))
        return routed

    async def _write(self, tx: Tx, batch: Sequence[Outgoing], routed: Sequence[Reached]) -> Dues:
        sent = [
            (outgoing, reached)
            for outgoing, reached in zip(batch, routed, strict=True)
            if not isinstance(reached, PublishError)
        ]
        dues = await self._rows.write(tx, sent)
        for exchange, count in Counter(outgoing.message.exchange for outgoing, _ in sent).items():
            tx.on_commit(partial(observe.messages_published.labels(exchange).inc, count))
        return dues


class WholeBatchWriter(QueueWriter):
    """Writes a batch only if none of it is refused, so that a refusal leaves the caller's transaction as it was.

    With `notify` each wakes the consumers of all processes by a NOTIFY that PostgreSQL sends with the commit.
    """

    def __init__(self, rows: QueueRows, *, notify: bool = False) -> None:
        super().__init__(rows)
        self._notifies = notify

    async def publish_in(self, tx: Tx, batch: Sequence[Outgoing]) -> list[PublishError | None]:
        if tx.deferred:
            # Reading the topology first would fix a snapshot, which a later write cannot leave (SQLITE_BUSY_SNAPSHOT).
            await _LOCK.many(tx, [{}])
        routed = await self._routed(tx, batch)
        outcomes = _outcomes(routed)
        if not any(outcomes):
            await self._notify(tx, await self._write(tx, batch, routed))
        return outcomes

    async def _notify(self, tx: Tx, dues: Dues) -> None:
        if self._notifies and tx.dialect == "postgresql":
            for queue, due_us in sorted(dues):
                await _NOTIFY.rows(tx, channel=CHANNEL, payload=hint(ANY_INSTANCE, due_us, queue))


def _outcomes(routed: Sequence[Reached]) -> list[PublishError | None]:
    return [reached if isinstance(reached, PublishError) else None for reached in routed]


def _refuse_unstorable(outgoing: Outgoing) -> None:
    """Raise `Unstorable` for text that no database stores: NUL, or half a surrogate pair."""
    message = outgoing.message
    texts = (
        message.exchange,
        message.routing_key,
        message.message_id,
        message.type,
        message.content_type,
        outgoing.cancel_key or "",
        *message.headers,
        *message.headers.values(),
    )
    whole = "".join(texts)
    if "\x00" not in whole and (whole.isascii() or _is_unicode(whole)):
        return
    for text in texts:
        if "\x00" in text or not _is_unicode(text):
            raise Unstorable(f"message {message.message_id!r:.60}: {text!r:.60} holds characters that cannot be stored")


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
