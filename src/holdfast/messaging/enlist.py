"""Outbox and inbox on the caller's own connection or session, whose transaction he alone begins, commits, rolls back.

What may be passed as `handle`: to an awaited method a SQLAlchemy AsyncSession or AsyncConnection, an asyncpg or
aiosqlite connection, or a psycopg AsyncConnection; to its twin ending in `_sync` a SQLAlchemy Session or Connection, or
a psycopg or sqlite3 connection. The twins need no event loop and may be called from any thread.

Every method raises `InvalidInput` for a handle that it does not know and for one without an open transaction, and the
driver's errors as ours: `Conflict`, `Unavailable`, `ConstraintFailed`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import msgspec

from holdfast.clock import Clock, SystemClock
from holdfast.db.database import Tx
from holdfast.db.enlist import enlist, enlist_sync, run_sync
from holdfast.ids import SharedIdSource
from holdfast.messaging.codec import Codec
from holdfast.messaging.draft import Draft
from holdfast.messaging.inbox import Inbox
from holdfast.messaging.outbox import Outbox
from holdfast.messaging.toolkit import Messaging
from holdfast.messaging.transports.sql.queue_writer import WholeBatchWriter
from holdfast.messaging.transports.sql.rows import Dues, QueueRows


class ConnectionOutbox:
    """Writes messages with the caller's rows: they exist if and only if his transaction commits.

    It needs no transport and no task of its own, so a process that only sends opens nothing else of holdfast; the
    topology must have been declared. Consumers find a message by polling (`poll_ms`, 1 s by default), or at once:

    - `wakes`: the running toolkit whose listeners a SQLAlchemy session's commit wakes, in all processes. Other handles
      do not say when they commit. Construct the outbox on the toolkit's event loop.
    - `notify`: PostgreSQL sends a NOTIFY with the commit, whatever the handle. All commits that notify wait for one
      lock of the server, so this is for moderate loads. It does nothing on SQLite.
    """

    def __init__(
        self,
        types: Mapping[str, type[msgspec.Struct]],
        *,
        clock: Clock | None = None,
        wakes: Messaging | None = None,
        notify: bool = False,
    ) -> None:
        clock = clock or SystemClock()
        ids = SharedIdSource(clock)
        self._wakes = wakes
        self._loop = asyncio.get_running_loop() if wakes is not None else None
        writer = WholeBatchWriter(QueueRows(clock, ids, self._tell), notify=notify)
        self._outbox = Outbox(writer, Codec(types), clock, ids)

    async def add(
        self,
        handle: object,
        exchange: str,
        routing_key: str,
        body: msgspec.Struct,
        *,
        delay_ms: int = 0,
        expires_ms: int | None = None,
        headers: Mapping[str, str] | None = None,
        mandatory: bool = True,
        cancel_key: str | None = None,
    ) -> None:
        """Add one message; see `add_all`."""
        draft = _draft(exchange, routing_key, body, delay_ms, expires_ms, headers, mandatory, cancel_key)
        await self.add_all(handle, [draft])

    async def add_all(self, handle: object, drafts: Sequence[Draft]) -> None:
        """Add messages within the handle's transaction, all or none; two statements, however many they are.

        Raises `Unroutable` for a mandatory message that no queue takes, `PublishRejected` for an unknown exchange and
        `InvalidInput` for a delay below zero or above a century: before anything was written, so the transaction may
        go on.
        """
        if drafts:
            await self._outbox.add_all(await enlist(handle), drafts)

    async def cancel(self, handle: object, *cancel_keys: str) -> int:
        """Remove pending messages by key within the handle's transaction; answers how many.

        One that is being delivered, or was, is not called back.
        """
        return await self._outbox.cancel(await enlist(handle), *cancel_keys) if cancel_keys else 0

    def add_sync(
        self,
        handle: object,
        exchange: str,
        routing_key: str,
        body: msgspec.Struct,
        *,
        delay_ms: int = 0,
        expires_ms: int | None = None,
        headers: Mapping[str, str] | None = None,
        mandatory: bool = True,
        cancel_key: str | None = None,
    ) -> None:
        """`add` on a blocking handle."""
        draft = _draft(exchange, routing_key, body, delay_ms, expires_ms, headers, mandatory, cancel_key)
        self.add_all_sync(handle, [draft])

    def add_all_sync(self, handle: object, drafts: Sequence[Draft]) -> None:
        """`add_all` on a blocking handle."""
        if drafts:
            run_sync(self._outbox.add_all(enlist_sync(handle), drafts))

    def cancel_sync(self, handle: object, *cancel_keys: str) -> int:
        """`cancel` on a blocking handle."""
        return run_sync(self._outbox.cancel(enlist_sync(handle), *cancel_keys)) if cancel_keys else 0

    async def move(self, handle: object, *cancel_keys: str, delay_ms: int = 0, due_us: int | None = None) -> int:
        """Let pending messages be due at another instant, within the handle's transaction; as `Outbox.move`."""
        return await self._outbox.move(await enlist(handle), *cancel_keys, delay_ms=delay_ms, due_us=due_us)

    def move_sync(self, handle: object, *cancel_keys: str, delay_ms: int = 0, due_us: int | None = None) -> int:
        """`move` on a blocking handle."""
        return run_sync(self._outbox.move(enlist_sync(handle), *cancel_keys, delay_ms=delay_ms, due_us=due_us))

    def _tell(self, dues: Dues) -> None:
        # A commit may be made in any thread; waiters live on the loop.
        if self._wakes is not None and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wakes.transport.tell, dues)


class ConnectionInbox:
    """Remembers, in the caller's transaction, which messages a consumer has had its effect from."""

    def __init__(self, *, clock: Clock | None = None) -> None:
        self._inbox = Inbox(clock or SystemClock())

    async def first(self, handle: object, consumer: str, message_id: str) -> bool:
        """Claim the message for the consumer; False when its effect has been committed already.

        While another transaction holds the claim this waits: False if that commits, True if it rolls back. Under
        REPEATABLE READ or SERIALIZABLE its commit raises `Conflict` instead: run the transaction again.
        """
        return await _first(self._inbox, await enlist(handle), consumer, message_id)

    def first_sync(self, handle: object, consumer: str, message_id: str) -> bool:
        """`first` on a blocking handle."""
        return run_sync(_first(self._inbox, enlist_sync(handle), consumer, message_id))


async def _first(inbox: Inbox, tx: Tx, consumer: str, message_id: str) -> bool:
    return bool(await inbox.fresh(tx, consumer, [message_id]))


def _draft(
    exchange: str,
    routing_key: str,
    body: msgspec.Struct,
    delay_ms: int,
    expires_ms: int | None,
    headers: Mapping[str, str] | None,
    mandatory: bool,
    cancel_key: str | None,
) -> Draft:
    return Draft(
        exchange=exchange,
        routing_key=routing_key,
        body=body,
        delay_ms=delay_ms,
        expires_ms=expires_ms,
        headers=headers or {},
        mandatory=mandatory,
        cancel_key=cancel_key,
    )
