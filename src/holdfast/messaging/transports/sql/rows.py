"""Writes messages into queues: their rows, their expiry, the limits of queues, and where dead letters go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import BigInteger, Executable, bindparam, func, select

from holdfast import observe
from holdfast.clock import US_PER_MS, Clock
from holdfast.db.database import Dialect, Tx
from holdfast.db.prepared import InsertAll, Prepared
from holdfast.errors import PublishRejected
from holdfast.ids import IdSource
from holdfast.messaging.dead_letters import Reason, deaths, goes_in_circles, with_death
from holdfast.messaging.message import HEADER_PARKED_ID, Message, Outgoing
from holdfast.messaging.tables import messages, queues
from holdfast.messaging.topology import Queue
from holdfast.messaging.transports.sql import leases, parking, routing

Dues = set[tuple[str, int]]  # (queue, instant)

NO_HEADERS = "{}"
EXPIRY = "amq.expiry"  # whoever waits for messages to expire hears of them under this name, which no queue can have

log = observe.logger("sql_transport")

_headers = msgspec.json.Decoder(dict[str, str]).decode
_INSERT = InsertAll(messages)
_LOCK = Prepared(lambda _: select(queues.c.name).where(queues.c.name == bindparam("of_queue")).with_for_update())


def _ready(*columns: Any) -> Any:
    # What is held is not due before its lease ends; then it is as ready as any other.
    return select(*columns).where(messages.c.queue == bindparam("of_queue"), messages.c.due_us <= bindparam("now_us"))


def _oldest(_: Dialect) -> Executable:
    ready: Executable = (
        _ready(*messages.columns)
        .order_by(messages.c.due_us, messages.c.id)
        .limit(bindparam("so_many", type_=BigInteger))
        .with_for_update(skip_locked=True)
    )
    return ready


_LENGTH = Prepared(lambda _: _ready(func.count().label("length")))
_OLDEST = Prepared(_oldest)


class QueueRows:
    """What publishes, dead-letters and parks, always within the caller's transaction."""

    def __init__(self, clock: Clock, ids: IdSource, tell: Callable[[Dues], None]) -> None:
        self._clock = clock
        self._ids = ids
        self._tell = tell

    async def room_for(self, tx: Tx, reached: Sequence[Queue], *, delayed: bool) -> None:
        """Count one more message for the queues that refuse when full; raises `PublishRejected` and counts none.

        A delayed one is refused as well, but takes no room: only what is ready has a length.
        """
        limited = [queue for queue in reached if refuses(queue)]
        for queue in limited:
            if await self._length(tx, queue) >= (queue.max_length or 0):
                raise PublishRejected(
                    f"queue {queue.name!r} is full: it has {queue.max_length} messages and overflow=reject-publish"
                )
        for queue in limited if not delayed else ():
            tx.memo["length", queue.name] += 1

    async def write(self, tx: Tx, sent: Sequence[tuple[Outgoing, Sequence[Queue]]]) -> Dues:
        """Store messages in the queues they reach, and push the oldest out of those that are too long.

        Answers which queue has something when.
        """
        now_us = self._clock.now_us()
        rows = [self._row(outgoing, queue, now_us) for outgoing, reached in sent for queue in reached]
        limits = {queue.name: queue for _, reached in sent for queue in reached if _drops(queue)}
        dues = await self._insert(tx, rows)
        await self._trim(tx, limits)
        return dues

    async def bury(self, tx: Tx, rows: Sequence[Any], reason: Reason, told: str = "") -> None:
        """Take rows of `messages` out of their queues: to the dead-letter exchange, or where there is none out.

        A rejected message without one is parked, and so is every dead letter that no queue takes: it was accepted, and
        nobody said that it may be lost. What goes in circles by itself is dropped, as RabbitMQ does.
        """
        known = await routing.known_to(tx)
        now_us = self._clock.now_us()
        again: list[_Row] = []
        limits: dict[str, Queue] = {}
        given_up: list[tuple[Any, str]] = []
        for row in rows:
            queue = known.queues.get(row.queue) or Queue(name=row.queue)
            message = message_of(row)
            headers = message.headers
            if queue.dead_letter_exchange is None:
                if reason == "rejected":
                    given_up.append((row, told or "rejected, and its queue has no dead-letter exchange"))
                elif HEADER_PARKED_ID in headers:
                    await parking.moved_on(tx, row.id, headers, now_us, self._ids)
                continue
            reached = self._targets(known, queue, row)
            if isinstance(reached, str):
                given_up.append((row, f"{reason}, and its dead letter was not taken: {reached}"))
                continue
            if HEADER_PARKED_ID in headers:
                headers = await parking.moved_on(tx, row.id, headers, now_us, self._ids)
            headers = with_death(
                headers,
                queue=row.queue,
                reason=reason,
                exchange=row.exchange,
                routing_key=row.routing_key,
                now_us=now_us,
            )
            history = deaths(headers)
            for target in reached:
                if goes_in_circles(history, target.name):
                    log.warning("dead_letter_in_circles", queue=target.name, message_id=row.message_id)
                    continue
                letter = msgspec.structs.replace(
                    message,
                    exchange=queue.dead_letter_exchange,
                    routing_key=_dead_key(queue, row),
                    headers=headers,
                )
                # What a publisher said about its expiry is over with its first death.
                again.append(self._row(Outgoing(message=letter), target, now_us))
                if _drops(target):
                    limits[target.name] = target
        await self._keep(tx, given_up)
        if rows:
            await leases.DELETE.rows(tx, row_ids=[row.id for row in rows])
            tx.on_commit(lambda: observe.messages_dead.labels(reason).inc(len(rows)))
        await self._insert(tx, again)
        await self._trim(tx, limits)

    async def park(self, tx: Tx, given: Sequence[tuple[Any, str]]) -> None:
        """Take rows out of their queues into the error store, each with the reason."""
        if given:
            await self._keep(tx, given)
            await leases.DELETE.rows(tx, row_ids=[row.id for row, _ in given])

    async def _keep(self, tx: Tx, given: Sequence[tuple[Any, str]]) -> None:
        """Copy rows to the error store, each with the reason; the caller deletes them."""
        await parking.park(tx, given, self._clock.now_us(), self._ids)
        for row, reason in given:
            log.warning(
                "message_parked", queue=row.queue, message_id=row.message_id, type=row.type[:80], reason=reason[:300]
            )

    def _targets(self, known: routing.Known, queue: Queue, row: Any) -> Sequence[Queue] | str:
        exchange = queue.dead_letter_exchange or ""
        key = _dead_key(queue, row)
        try:
            reached = known.route(exchange, key)
        except PublishRejected as error:
            return error.detail
        return reached or f"no queue takes key {key!r} of exchange {exchange!r}"

    async def _insert(self, tx: Tx, rows: Sequence[_Row]) -> Dues:
        if not rows:
            return set()
        await _INSERT.tuples(tx, rows)
        return self.will_tell(tx, rows)

    def will_tell(self, tx: Tx, rows: Sequence[Any]) -> Dues:
        """Wake with the commit who waits for these rows; answers which queue has something when."""
        dues = {(row.queue, row.due_us) for row in rows}
        dues |= {(EXPIRY, row.expires_us) for row in rows if row.expires_us is not None}
        tx.on_commit(lambda: self._tell(dues))
        return dues

    async def _trim(self, tx: Tx, limits: dict[str, Queue]) -> None:
        for queue in limits.values():
            tx.memo.pop(("length", queue.name), None)
            surplus = await self._length(tx, queue) - (queue.max_length or 0)
            if surplus > 0:
                oldest = await _OLDEST.rows(tx, of_queue=queue.name, now_us=self._clock.now_us(), so_many=surplus)
                await self.bury(tx, oldest, "maxlen")

    async def _length(self, tx: Tx, queue: Queue) -> int:
        """How many messages are ready; the queue's row stays locked, so that no neighbour counts the same room."""
        key = ("length", queue.name)
        if key not in tx.memo:
            if tx.dialect == "postgresql":
                await _LOCK.rows(tx, of_queue=queue.name)
            (row,) = await _LENGTH.rows(tx, of_queue=queue.name, now_us=self._clock.now_us())
            tx.memo[key] = row.length
        length: int = tx.memo[key]
        return length

    def _row(self, outgoing: Outgoing, queue: Queue, now_us: int) -> _Row:
        message = outgoing.message
        due_us = now_us + outgoing.delay_ms * US_PER_MS
        expires_us = None
        if outgoing.expires_ms is not None or queue.message_ttl_ms is not None:
            expires_us = _expiry(due_us, outgoing.expires_ms, queue.message_ttl_ms)
        return _Row(
            self._ids.next(),
            queue.name,
            due_us,
            due_us,
            None,
            1,
            0,
            0,
            outgoing.cancel_key,
            expires_us,
            message.message_id,
            message.exchange,
            message.routing_key,
            message.type,
            message.content_type,
            msgspec.json.encode(message.headers).decode() if message.headers else NO_HEADERS,
            message.body,
            message.timestamp_us,
        )


class _Row(NamedTuple):
    """A new row of `messages`; its fields are the table's columns, in their order."""

    id: int
    queue: str
    due_us: int
    ready_us: int
    lease: None
    attempt: int
    deliveries: int
    crashes: int
    cancel_key: str | None
    expires_us: int | None
    message_id: str
    exchange: str
    routing_key: str
    type: str
    content_type: str
    headers: str
    body: bytes
    published_us: int


assert _Row._fields == tuple(messages.columns.keys())


def message_of(row: Any) -> Message:
    """The message that a row of `messages` holds."""
    return Message(
        exchange=row.exchange,
        routing_key=row.routing_key,
        body=row.body,
        message_id=row.message_id,
        timestamp_us=row.published_us,
        type=row.type,
        content_type=row.content_type,
        headers=_headers(row.headers) if row.headers != NO_HEADERS else {},
    )


def _dead_key(queue: Queue, row: Any) -> str:
    key: str = row.routing_key if queue.dead_letter_routing_key is None else queue.dead_letter_routing_key
    return key


def refuses(queue: Queue) -> bool:
    """Whether it takes no more when it is full."""
    return queue.max_length is not None and queue.overflow == "reject-publish"


def _drops(queue: Queue) -> bool:
    return queue.max_length is not None and queue.overflow == "drop-head"


def _expiry(due_us: int, *ttls_ms: int | None) -> int | None:
    """The time to live counts from when the message is due; of the message's and the queue's the shorter one."""
    given = [ttl_ms for ttl_ms in ttls_ms if ttl_ms is not None]
    return due_us + min(given) * US_PER_MS if given else None
